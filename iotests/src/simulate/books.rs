//! The books that the simulator keeps of an image's host space, apart from the driver's own, and the three things that must
//! hold at every step: **no cluster has two owners, no link leads to a free cluster, no allocatable cluster has I/O in flight.**
//!
//! How: the driver tells each step as it makes it ([`block_core::space`]): a refcount leaves 0 or comes back to it, an entry
//! of a mapping table changes, a slice is read. The state can't change in any other way, so checking each of these, and
//! each request to the storage as it arrives, is the same as an audit of everything after every poll, at a cost of a few
//! nanoseconds. Whether I/O is in flight is asked of the tracked requests of the file's node: those know it for
//! requests that wait there, too.
//!
//! One thing is looked at a little later: a driver may drop the last reference before it changes the entry, as long as
//! nobody sees it (its metadata lock is held). Such a link must be gone when the cluster is handed out again, or when
//! metadata is written back.
//!
//! A driver that tells nothing isn't covered, and is counted as such.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Weak},
};

use block_core::{
    Node,
    driver::ChildRole,
    space::{Link, SpaceEvent, SpaceWatch},
    tracked::TrackedRange,
};
use parking_lot::Mutex;

use super::record::{Failure, FailureKind, Recorder};
use crate::storage::{OpInfo, OpKind};

/// Spreads cluster numbers.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What is known of one host cluster.
#[derive(Default)]
struct Host {
    /// `None` until the allocator was seen to give or take it.
    free: Option<bool>,
    /// Guest offsets of those that link to it, and whether they allow others.
    owners: Vec<(u64, bool)>,
}

#[derive(Default)]
struct State {
    hosts: HashMap<u64, Host, BuildHasherDefault<Spread>>,
    /// Free, but still linked.
    dangling: BTreeSet<u64>,
}

/// Headers are read in one piece, whatever lies behind them when clusters are small.
const HEAD: u64 = 4096;

fn only_the_head_is_read(file: &Node, range: TrackedRange) -> bool {
    let list = file.tracker().list();
    list.iter()
        .filter(|entry| entry.range.overlaps(range))
        .all(|entry| entry.range.start() == 0 && entry.range.end() <= HEAD)
}

/// The books of one image.
pub struct Books {
    recorder: Arc<Recorder>,
    image: String,
    /// Bytes of a host cluster.
    unit: u64,
    /// Whether anything is made of what is found.
    strict: bool,
    file: Weak<Node>,
    state: Mutex<State>,
}

impl Books {
    /// Begins to keep books of the image at `node`, whose clusters have `unit` bytes. Without `strict` they are only for the
    /// timeline. `None` when its driver tells nothing.
    pub fn open(
        recorder: &Arc<Recorder>,
        node: &Arc<Node>,
        image: &str,
        unit: u64,
        strict: bool,
    ) -> Option<Arc<Self>> {
        let books = Self::unheard(recorder, node, image, unit, strict)?;
        node.driver().watch_space(books.clone()).then_some(books)
    }

    /// The same, but somebody else listens to the driver and passes on what it tells.
    pub(crate) fn unheard(
        recorder: &Arc<Recorder>,
        node: &Arc<Node>,
        image: &str,
        unit: u64,
        strict: bool,
    ) -> Option<Arc<Self>> {
        let edges = node.edges();
        let file = edges.child(ChildRole::File)?.node();
        Some(Arc::new(Self {
            recorder: recorder.clone(),
            image: image.to_owned(),
            unit,
            strict,
            file: Arc::downgrade(file),
            state: Mutex::default(),
        }))
    }

    fn violated(&self, text: String) {
        // Once the power is cut, tasks are dropped wherever they are: what is taken apart then is nobody's doing.
        if !self.strict || self.recorder.was_cut() {
            return;
        }
        let text = format!("{}: {text}", self.image);
        self.recorder
            .fail(Failure::new(FailureKind::Invariant, text));
    }

    fn units(&self, host: u64, len: u64) -> impl Iterator<Item = u64> + use<> {
        let unit = self.unit;
        (host / unit..(host + len).div_ceil(unit)).map(move |n| n * unit)
    }

    fn note(&self, what: u64, a: u64, b: u64, text: impl FnOnce() -> String) {
        let image = &self.image;
        self.recorder
            .note([what, a, b], || format!("{image}: {}", text()));
    }

    fn taken(&self, state: &mut State, host: u64) {
        let entry = state.hosts.entry(host).or_default();
        if entry.free == Some(false) {
            self.violated(format!("cluster {host:#x} is handed out, but it is in use"));
        } else if let Some((guest, _)) = entry.owners.first() {
            self.violated(format!(
                "cluster {host:#x} is handed out while guest {guest:#x} is linked to it"
            ));
        }
        entry.free = Some(false);
    }

    fn freed(&self, state: &mut State, host: u64) {
        let entry = state.hosts.entry(host).or_default();
        if entry.free == Some(true) {
            self.violated(format!(
                "cluster {host:#x} is freed, but it is free already"
            ));
        }
        entry.free = Some(true);
        if !entry.owners.is_empty() {
            state.dangling.insert(host);
        }
        let range = TrackedRange::from_len(host, self.unit);
        if let Some(file) = self.file.upgrade()
            && file.tracker().overlapping(range)
            && !(host < HEAD && only_the_head_is_read(&file, range))
        {
            self.violated(format!(
                "cluster {host:#x} becomes allocatable while I/O to it is in flight"
            ));
        }
    }

    fn linked(&self, state: &mut State, link: Link, how: &str) {
        for host in self.units(link.host, link.len) {
            let entry = state.hosts.entry(host).or_default();
            if entry.free == Some(true) {
                self.violated(format!(
                    "guest {:#x} is {how} to cluster {host:#x}, which is free",
                    link.guest
                ));
            }
            let mut known = false;
            for (guest, shared) in &entry.owners {
                if *guest == link.guest {
                    known = true;
                } else if !(*shared && link.shared) {
                    self.violated(format!(
                        "cluster {host:#x} has two owners: guest {guest:#x}, and guest {:#x} is {how} to it",
                        link.guest
                    ));
                }
            }
            if !known {
                entry.owners.push((link.guest, link.shared));
            }
        }
    }

    fn unlinked(&self, state: &mut State, link: Link) {
        for host in self.units(link.host, link.len) {
            if let Entry::Occupied(mut entry) = state.hosts.entry(host) {
                entry
                    .get_mut()
                    .owners
                    .retain(|(guest, _)| *guest != link.guest);
                if entry.get().owners.is_empty() {
                    state.dangling.remove(&host);
                }
            }
        }
    }

    /// What must have come right by now.
    fn check_dangling(&self, state: &State) {
        if let Some(host) = state.dangling.first() {
            let guest = state.hosts.get(host).and_then(|host| host.owners.first());
            let guest = guest.map_or(0, |owner| owner.0);
            self.violated(format!(
                "cluster {host:#x} is free, and guest {guest:#x} is still linked to it"
            ));
        }
    }

    /// At rest.
    pub fn check(&self) {
        self.check_dangling(&self.state.lock());
    }

    /// A request to the image's storage arrives.
    pub fn disk_op(&self, op: &OpInfo) {
        let reads_head = op.kind == OpKind::Read && op.offset == 0 && op.len <= HEAD;
        if matches!(op.kind, OpKind::Flush | OpKind::Truncate) || reads_head {
            return;
        }
        let state = self.state.lock();
        for host in self.units(op.offset, op.len) {
            if state
                .hosts
                .get(&host)
                .is_some_and(|host| host.free == Some(true))
            {
                drop(state);
                self.violated(format!(
                    "{op} goes to cluster {host:#x}, which is allocatable"
                ));
                return;
            }
        }
    }
}

impl SpaceWatch for Books {
    fn space(&self, event: SpaceEvent) {
        let mut state = self.state.lock();
        match event {
            SpaceEvent::Taken { host, len } => {
                self.note(10, host, len, || format!("cluster {host:#x} is taken"));
                for host in self.units(host, len) {
                    self.taken(&mut state, host);
                }
            }
            SpaceEvent::Free { host, len } => {
                self.note(11, host, len, || {
                    format!("cluster {host:#x} is free to be taken")
                });
                for host in self.units(host, len) {
                    self.freed(&mut state, host);
                }
            }
            SpaceEvent::Found(link) => self.linked(&mut state, link, "found linked"),
            SpaceEvent::Linked(link) => {
                self.note(12, link.guest, link.host, || {
                    format!(
                        "guest {:#x} is linked to cluster {:#x}",
                        link.guest, link.host
                    )
                });
                self.linked(&mut state, link, "linked");
            }
            SpaceEvent::Unlinked(link) => {
                self.note(13, link.guest, link.host, || {
                    format!(
                        "guest {:#x} is unlinked from cluster {:#x}",
                        link.guest, link.host
                    )
                });
                self.unlinked(&mut state, link);
            }
            SpaceEvent::WriteBack(step) => {
                self.recorder.write_back_at(&self.image, step);
                self.note(14, step.len() as u64, 0, || {
                    if step == "data" {
                        "write-back: done".to_owned()
                    } else {
                        format!("write-back: {step}")
                    }
                });
                if step == "refcounts" {
                    self.check_dangling(&state);
                }
            }
            SpaceEvent::Forgotten => {
                self.note(15, 0, 0, || "metadata is read again".to_owned());
                *state = State::default();
            }
        }
    }
}
