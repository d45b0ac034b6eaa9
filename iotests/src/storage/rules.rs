//! Which requests to the simulated storage are held, delayed or failed. This file only decides; the storage carries
//! it out.

use std::{
    collections::BTreeMap,
    future::Future,
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use block_core::error::ErrorKind;
use parking_lot::Mutex;

use super::content::BESIDE;

/// What a request to the storage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum OpKind {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    Truncate,
}

impl OpKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Read,
        Self::Write,
        Self::WriteZeroes,
        Self::Discard,
        Self::Flush,
        Self::Truncate,
    ];

    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Truncate => "truncate",
        }
    }
}

/// Chooses requests.
#[derive(Debug, Clone, Default)]
pub struct Choose {
    kinds: Vec<OpKind>,
    range: Option<Range<u64>>,
    containing: Option<Vec<u8>>,
    noise: bool,
    skip: u64,
    times: Option<u64>,
}

impl Choose {
    /// Every request.
    pub fn any() -> Self {
        Self::default()
    }

    /// Requests of that kind; may be called again for more kinds.
    #[must_use]
    pub fn kind(mut self, kind: OpKind) -> Self {
        self.kinds.push(kind);
        self
    }

    /// Reads.
    pub fn reads() -> Self {
        Self::any().kind(OpKind::Read)
    }

    /// Writes of data.
    pub fn writes() -> Self {
        Self::any().kind(OpKind::Write)
    }

    /// Whatever makes a range zero: discards and zero writes.
    pub fn punches() -> Self {
        Self::any().kind(OpKind::Discard).kind(OpKind::WriteZeroes)
    }

    /// Those that touch a byte of `range` (offsets in the storage).
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Writes in which some 512-byte sector begins with `needle`.
    #[must_use]
    pub fn containing(mut self, needle: &[u8]) -> Self {
        self.containing = Some(needle.to_vec());
        self
    }

    /// Not the first `skip` that match, but those after.
    #[must_use]
    pub fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }

    /// The same where data may be stored encrypted, so that its owner doesn't show: also the next write of what looks like
    /// noise, or each if whoever wrote it doesn't matter.
    pub(super) fn on_noise(mut self) -> Self {
        if let Some(needle) = &self.containing {
            self.noise = true;
            if needle.len() > 4 && self.times.is_none() {
                self.times = Some(1);
            }
        }
        self
    }

    /// Only that many.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    fn matches(&self, op: &OpInfo, data: Option<&[u8]>, making: bool) -> bool {
        if !self.kinds.is_empty() && !self.kinds.contains(&op.kind) {
            return false;
        }
        if let Some(range) = &self.range {
            let end = op.offset.saturating_add(op.len);
            if end <= range.start || range.end <= op.offset {
                return false;
            }
        }
        match &self.containing {
            None => true,
            Some(needle) => data.is_some_and(|data| {
                data.chunks(512).any(|s| s.starts_with(needle))
                    || self.noise && !making && is_noise(data)
            }),
        }
    }
}

/// Whether these are sectors as a cipher leaves them: metadata is mostly zeroes.
fn is_noise(data: &[u8]) -> bool {
    data.len() >= 512
        && data.chunks_exact(512).any(|sector| {
            let mut seen = [false; 256];
            for byte in sector {
                seen[usize::from(*byte)] = true;
            }
            // Of random bytes 221 values are seen, give or take 6.
            seen.iter().filter(|seen| **seen).count() > 180
        })
}

/// At which side of its effect on the content something happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before it reads or changes anything.
    Before,
    /// After its effect, before it is reported as complete.
    After,
}

/// What happens to the chosen requests.
#[derive(Clone)]
pub enum Fate {
    /// They wait until they are let go.
    Hold(Stage, Arc<HoldState>),
    /// They take so much virtual time longer.
    Delay(Duration),
    /// They fail; with [`Stage::After`] although they took effect.
    Fail(ErrorKind, Stage),
}

/// One request, as rules and the log see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpInfo {
    /// Counts up from 0 on each disk.
    pub id: u64,
    /// What it does.
    pub kind: OpKind,
    /// Offset in the storage; for truncates the new length. Both from [`BESIDE`] on for an image's second file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl std::fmt::Display for OpInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (of, offset) = match self.offset.checked_sub(BESIDE) {
            Some(offset) => (" of the data file", offset),
            None => ("", self.offset),
        };
        match self.kind {
            OpKind::Flush => write!(f, "#{} flush{of}", self.id),
            OpKind::Truncate => write!(f, "#{} truncate{of} to {offset:#x}", self.id),
            kind => {
                let (id, kind, len) = (self.id, kind.name(), self.len);
                write!(f, "#{id} {kind}{of} at {offset:#x}+{len:#x}")
            }
        }
    }
}

/// The rules of one disk.
#[derive(Default)]
pub(super) struct Rules {
    next: u64,
    rules: BTreeMap<u64, (Choose, Fate)>,
}

impl Rules {
    pub fn add(&mut self, choose: Choose, fate: Fate) -> u64 {
        let id = self.next;
        self.next += 1;
        self.rules.insert(id, (choose, fate));
        id
    }

    pub fn remove(&mut self, id: u64) {
        self.rules.remove(&id);
    }

    pub fn clear(&mut self) {
        self.rules.clear();
    }

    /// What happens to this request: the fates of every rule that chooses it, oldest rule first. While an image is being made
    /// (`making`), what looks like noise is a key.
    pub fn judge(&mut self, op: &OpInfo, data: Option<&[u8]>, making: bool) -> Vec<Fate> {
        let mut fates = Vec::new();
        for (choose, fate) in self.rules.values_mut() {
            if !choose.matches(op, data, making) {
                continue;
            }
            if choose.skip > 0 {
                choose.skip -= 1;
                continue;
            }
            match &mut choose.times {
                Some(0) => continue,
                Some(times) => *times -= 1,
                None => {}
            }
            fates.push(fate.clone());
        }
        fates
    }
}

/// The requests that one hold has stopped.
#[derive(Default)]
pub struct HoldState {
    arrivals: AtomicU64,
    inner: Mutex<HoldInner>,
}

#[derive(Default)]
struct HoldInner {
    open: bool,
    held: BTreeMap<u64, Held>,
    watchers: Vec<Waker>,
}

struct Held {
    info: OpInfo,
    let_go: bool,
    waker: Option<Waker>,
}

impl HoldState {
    pub(super) fn is_holding(&self, id: u64) -> bool {
        self.inner.lock().held.contains_key(&id)
    }

    /// Stops a request until it is let go.
    pub(super) fn stop(self: &Arc<Self>, info: OpInfo) -> Stopped {
        let watchers = {
            let mut inner = self.inner.lock();
            let held = Held {
                info,
                let_go: inner.open,
                waker: None,
            };
            inner.held.insert(info.id, held);
            std::mem::take(&mut inner.watchers)
        };
        self.arrivals.fetch_add(1, Ordering::SeqCst);
        for watcher in watchers {
            watcher.wake();
        }
        Stopped {
            hold: self.clone(),
            id: info.id,
        }
    }

    pub(super) fn arrivals(&self) -> u64 {
        self.arrivals.load(Ordering::SeqCst)
    }

    pub(super) fn waiting(&self) -> Vec<OpInfo> {
        let inner = self.inner.lock();
        let waiting = inner.held.values().filter(|held| !held.let_go);
        waiting.map(|held| held.info).collect()
    }

    pub(super) fn let_go(&self, which: impl Fn(&OpInfo) -> bool) {
        let wakers: Vec<Waker> = {
            let mut inner = self.inner.lock();
            inner
                .held
                .values_mut()
                .filter(|held| which(&held.info))
                .filter_map(|held| {
                    held.let_go = true;
                    held.waker.take()
                })
                .collect()
        };
        for waker in wakers {
            waker.wake();
        }
    }

    pub(super) fn open(&self) {
        self.inner.lock().open = true;
        self.let_go(|_| true);
    }

    pub(super) fn poll_arrived(&self, cx: &mut Context<'_>, wanted: u64) -> Poll<()> {
        if self.arrivals() >= wanted {
            return Poll::Ready(());
        }
        self.inner.lock().watchers.push(cx.waker().clone());
        if self.arrivals() >= wanted {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

/// Completes when the request is let go.
pub(super) struct Stopped {
    hold: Arc<HoldState>,
    id: u64,
}

impl Future for Stopped {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.hold.inner.lock();
        match inner.held.get_mut(&self.id) {
            Some(held) if !held.let_go => {
                held.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.hold.inner.lock().held.remove(&self.id);
    }
}
