//! What a disk may hold when some of the requests to it have failed, one request at a time: now, and after a cut of the
//! power. And the image that the sweeps work on, which is put back to its beginning for each run.

use std::sync::Arc;

use block_core::{
    BlockHandle, Capabilities, Error, ErrorKind, Graph, Node, Options, RequestFlags, Result,
    driver::Truncate,
};

use crate::{
    case::{Failure, Scene, Verdict},
    lab::after_discard,
    oracle::AfterDiscard,
    pattern::{Seen, stamped},
    stack::{NONE, check, lacks, probe, writer},
    storage::{Content, Disk},
};

/// The image's name.
pub(super) const IMAGE: &str = "image";
/// Its backing file's.
pub(super) const BELOW: &str = "below";
/// Units of the image.
pub(super) const UNITS: u64 = 12;

/// What each sector may hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    /// Now, as whoever reads it sees it.
    now: Vec<Vec<Seen>>,
    /// After a cut of the power: what it may have held since the last flush that succeeded.
    since: Vec<Vec<Seen>>,
    lengths_now: Vec<u64>,
    lengths_since: Vec<u64>,
}

fn add(set: &mut Vec<Seen>, seen: Seen) {
    if !set.contains(&seen) {
        set.push(seen);
    }
}

impl Model {
    /// A disk that shows exactly this, durably.
    pub fn of(bytes: &[u8]) -> Self {
        let now: Vec<Vec<Seen>> = bytes.chunks(512).map(|one| vec![Seen::of(one)]).collect();
        Self {
            since: now.clone(),
            now,
            lengths_now: vec![bytes.len() as u64],
            lengths_since: vec![bytes.len() as u64],
        }
    }

    /// A request that was to put this into a range, and whether it said that it did.
    pub fn change(&mut self, offset: u64, new: &[Seen], done: bool) {
        let first = (offset / 512) as usize;
        for (n, seen) in new.iter().enumerate() {
            let at = first + n;
            if done {
                self.now[at].clear();
            }
            add(&mut self.now[at], *seen);
            add(&mut self.since[at], *seen);
        }
    }

    /// A discard that may leave any of what is there, zeroes, or `below`.
    pub fn blur(&mut self, offset: u64, below: &[Seen]) {
        let zeroes = vec![Seen::Zero; below.len()];
        self.change(offset, &zeroes, false);
        self.change(offset, below, false);
    }

    /// The disk was resized, or may have been. What it gained is zero.
    pub fn resize(&mut self, length: u64, done: bool) {
        let sectors = (length / 512) as usize;
        for set in [&mut self.now, &mut self.since] {
            if set.len() < sectors {
                set.resize(sectors, vec![Seen::Zero]);
            }
        }
        if done {
            self.lengths_now.clear();
        }
        self.lengths_now.push(length);
        self.lengths_since.push(length);
    }

    /// It may as well hold what it might have held at another time.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in [(&mut self.now, &other.now), (&mut self.since, &other.since)] {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                for seen in theirs {
                    add(mine, *seen);
                }
            }
        }
    }

    /// A flush succeeded.
    pub fn flushed(&mut self) {
        self.since.clone_from(&self.now);
        self.lengths_since.clone_from(&self.lengths_now);
    }

    /// Judges a whole disk: as it is, or after a cut of the power.
    pub fn judge(&self, bytes: &[u8], after_cut: bool, when: &str) -> Result<(), Failure> {
        let (sectors, lengths) = if after_cut {
            (&self.since, &self.lengths_since)
        } else {
            (&self.now, &self.lengths_now)
        };
        let length = bytes.len() as u64;
        // A cut may keep a part of what grew by being written.
        let between =
            lengths.iter().any(|one| *one < length) && lengths.iter().any(|one| *one > length);
        if !(lengths.contains(&length) || (after_cut && between)) {
            return Err(format!("{when}: {} bytes, not any of {lengths:?}", bytes.len()).into());
        }
        for (n, (bytes, allowed)) in bytes.chunks(512).zip(sectors).enumerate() {
            let found = Seen::of(bytes);
            if !allowed.contains(&found) {
                let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                let allowed = allowed.join(" or ");
                return Err(format!("{when}: sector {n} holds {found}, not {allowed}").into());
            }
        }
        Ok(())
    }
}

/// The image of the sweeps, as it is at the beginning of each run.
pub(super) struct Start {
    pub scene: Arc<Scene>,
    pub capabilities: Capabilities,
    /// Bytes of a cluster, at least 4096.
    pub unit: u64,
    /// The storage of the image, and of its backing file if it has one.
    pub content: Content,
    below: Option<Content>,
    /// What the disk shows.
    pub shown: Vec<u8>,
    /// What the backing file shows.
    pub shown_below: Vec<u8>,
}

impl Start {
    /// Makes the image: data, zeroes, something compressed if that can be, holes that show the backing file if there
    /// can be one.
    pub async fn new(
        scene: &Arc<Scene>,
        needs: Capabilities,
    ) -> Result<Result<Self, Verdict>, Failure> {
        let (lab, format) = (&scene.lab, &scene.format);
        let (capabilities, unit) = probe(scene).await?;
        if let Some(verdict) = lacks(capabilities, needs | Capabilities::WRITE) {
            return Ok(Err(verdict));
        }
        let size = UNITS * unit;
        let mut shown = vec![0; size as usize];
        let mut below = None;
        if capabilities.contains(Capabilities::BACKING) {
            lab.create(&format.name, BELOW, size, &format.create, None)
                .await?;
            let node = lab.open(&format.name, BELOW, None, &Options::new()).await?;
            let handle = writer(&lab.graph, &node, "maker")?;
            let data = stamped(1, 1, 0, size - 2 * unit);
            shown[..data.len()].copy_from_slice(&data);
            handle.write(0, data, NONE).await?;
            handle.flush().await?;
            drop(handle);
            lab.graph.release(&node).await?;
            below = Some(lab.disk(BELOW)?.content());
        }
        let shown_below = shown.clone();
        let backing = below.is_some().then_some((BELOW, format.name.as_str()));
        lab.create(&format.name, IMAGE, size, &format.create, backing)
            .await?;
        let node = lab
            .open(&format.name, IMAGE, backing, &Options::new())
            .await?;
        let handle = writer(&lab.graph, &node, "maker")?;
        for k in [0, 1, 2, 4] {
            let compress = k == 4 && capabilities.contains(Capabilities::COMPRESSED);
            let flags = if compress {
                RequestFlags::WRITE_COMPRESSED
            } else {
                NONE
            };
            let data = stamped(2, k + 1, k * unit, unit);
            shown[(k * unit) as usize..((k + 1) * unit) as usize].copy_from_slice(&data);
            handle.write(k * unit, data, flags).await?;
        }
        handle.write_zeroes(3 * unit, unit, NONE).await?;
        shown[(3 * unit) as usize..(4 * unit) as usize].fill(0);
        handle.flush().await?;
        drop(handle);
        lab.graph.release(&node).await?;
        Ok(Ok(Self {
            scene: scene.clone(),
            capabilities,
            unit,
            content: lab.disk(IMAGE)?.content(),
            below,
            shown,
            shown_below,
        }))
    }

    /// The storage of the image.
    pub fn disk(&self) -> Result<Arc<Disk>, Failure> {
        Ok(self.scene.lab.disk(IMAGE)?)
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.scene.lab.graph
    }

    /// Puts everything back to the beginning.
    pub fn reset(&self) -> Result<(), Failure> {
        let disks = &self.scene.lab.disks;
        for (name, content) in [(IMAGE, Some(&self.content)), (BELOW, self.below.as_ref())] {
            if let (Some(disk), Some(content)) = (disks.get(name), content) {
                disk.clear_rules();
                disk.restore(content.clone());
                disk.track_durability();
            }
        }
        Ok(())
    }

    /// Opens the image.
    pub async fn open(&self) -> Result<Arc<Node>> {
        let format = self.scene.format.name.as_str();
        let backing = self.below.is_some().then_some((BELOW, format));
        self.scene
            .lab
            .open(format, IMAGE, backing, &Options::new())
            .await
    }

    /// Opens what `content` is, judges and checks it, and closes it. Leaks are allowed: they are what errors and cuts
    /// leave behind.
    pub async fn reopened(
        &self,
        content: Content,
        model: &Model,
        after_cut: bool,
        when: &str,
    ) -> Result<(), Failure> {
        // A driver with metadata that claims no safeguards of its own owes nothing to a cut of the power.
        let has_metadata = self.capabilities.contains(Capabilities::CHECK);
        if after_cut && has_metadata && !self.scene.format.safeguards {
            return Ok(());
        }
        let disk = self.disk()?;
        disk.clear_rules();
        disk.restore(content);
        let node = self
            .open()
            .await
            .map_err(|error| Failure(format!("{when}: it can't be opened: {error}")))?;
        let bytes = crate::stack::content(self.graph(), &node).await?;
        model.judge(&bytes, after_cut, when)?;
        check(self.graph(), &node, false)
            .await
            .map_err(|failure| Failure(format!("{when}: {failure}")))?;
        self.graph().release(&node).await?;
        Ok(())
    }

    /// Nothing of a node is left.
    pub fn nothing_left(&self, when: &str) -> Result<(), Failure> {
        match self.graph().nodes().first() {
            Some(node) => Err(format!("{when}: '{}' is left", node.name()).into()),
            None => Ok(()),
        }
    }
}

/// One guest, one request at a time, and what came of each.
pub(super) struct Runner<'a> {
    pub start: &'a Start,
    pub handle: Arc<BlockHandle>,
    pub model: Model,
    pub errors: Vec<Error>,
    seq: u64,
    zeroes: AfterDiscard,
}

impl<'a> Runner<'a> {
    pub fn new(start: &'a Start, node: &Arc<Node>) -> Result<Self, Failure> {
        Ok(Self {
            start,
            handle: start.scene.lab.attach(node, "guest")?,
            model: Model::of(&start.shown),
            errors: Vec::new(),
            seq: 100,
            zeroes: after_discard(node),
        })
    }

    fn note<T>(&mut self, result: Result<T>) -> bool {
        match result {
            Ok(_) => true,
            Err(error) => {
                self.errors.push(error);
                false
            }
        }
    }

    pub async fn write(&mut self, offset: u64, len: u64, flags: RequestFlags) {
        self.seq += 1;
        let data = stamped(3, self.seq, offset, len);
        let seen: Vec<Seen> = data.chunks(512).map(Seen::of).collect();
        let result = self.handle.write(offset, data, flags).await;
        let done = self.note(result);
        self.model.change(offset, &seen, done);
        if done && flags.contains(RequestFlags::FUA) {
            let (from, to) = ((offset / 512) as usize, (offset + len) as usize / 512);
            for at in from..to {
                self.model.since[at].clone_from(&self.model.now[at]);
            }
        }
    }

    pub async fn zero(&mut self, offset: u64, len: u64, flags: RequestFlags) {
        let result = self.handle.write_zeroes(offset, len, flags).await;
        let done = self.note(result);
        let seen = vec![Seen::Zero; (len / 512) as usize];
        self.model.change(offset, &seen, done);
    }

    pub async fn discard(&mut self, offset: u64, len: u64) {
        let result = self.handle.discard(offset, len).await;
        let done = self.note(result);
        if self.zeroes == AfterDiscard::Zeroes {
            let seen = vec![Seen::Zero; (len / 512) as usize];
            self.model.change(offset, &seen, done);
        } else {
            let range = offset as usize..(offset + len) as usize;
            let below: Vec<Seen> = self.start.shown_below[range]
                .chunks(512)
                .map(Seen::of)
                .collect();
            self.model.blur(offset, &below);
        }
    }

    pub async fn flush(&mut self) {
        let result = self.handle.flush().await;
        if self.note(result) {
            self.model.flushed();
        }
    }

    /// True if it has the new length.
    pub async fn truncate(&mut self, length: u64) -> bool {
        let how = Truncate {
            exact: true,
            ..Truncate::default()
        };
        let result = self.handle.truncate(length, how).await;
        if let Err(error) = &result
            && error.kind() == ErrorKind::NotSupported
        {
            return false;
        }
        let done = self.note(result);
        self.model.resize(length, done);
        done
    }

    /// What is there is judged at once, if it can be read.
    pub async fn read_back(&mut self) -> Result<(), Failure> {
        let length = self.handle.length();
        let result = self.handle.read(0, length as usize).await;
        match result {
            Ok(bytes) => self.model.judge(&bytes, false, "read back at once"),
            Err(error) => {
                self.errors.push(error);
                Ok(())
            }
        }
    }
}
