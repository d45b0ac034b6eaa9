//! Tracked requests: what is in flight on a node, and the gate at which overlapping requests wait.
//!
//! Every request of every producer is tracked with its range from before it is driven until its last I/O
//! has ended. Two requests *conflict* when their ranges overlap and at least one of them is
//! serialising. A request waits for every conflicting request that **began before it**, and for
//! nothing else: first come, first served among conflicting ones, side by side otherwise. There is
//! no cycle, so there is no deadlock, and nobody starves.
//!
//! This module decides only *when* a request may go on. It never shapes or splits a request, never issues I/O,
//! and knows neither the graph nor a clock; how a sub-request rides on its ancestor's ticket is the
//! request path's business (such a one waits for nothing, so it has nothing to ask here).
//!
//! ```
//! use block_core::tracked::{RequestKind, TrackedRange, Tracker};
//! # futures::executor::block_on(async {
//! let tracker = Tracker::new();
//! let range = TrackedRange::from_len(0, 4096);
//!
//! let write = tracker.begin(range, false, RequestKind::Write).await;
//! let mut discard = tracker.begin(range, true, RequestKind::Discard);
//! assert!(!discard.is_ready());
//! let read = tracker.begin(range, false, RequestKind::Read);
//! assert!(!read.is_ready(), "the discard came first");
//!
//! drop(write); // ends it
//! let discard = discard.await;
//! drop(discard);
//! read.await;
//! # });
//! ```
//!
//! # What it costs
//!
//! A plain request that nothing stands in the way of takes its thread's shard lock twice, allocates nothing
//! once the tables have grown, and shares no cache line with other threads. A serialising request
//! visits every shard that was ever used. A search is logarithmic in what is in flight (amortised, see
//! `ranges.rs`) plus the number of requests that really overlap. A request that waits allocates once.

mod gate;
mod ranges;
#[cfg(all(test, not(loom)))]
mod tests;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crossbeam_utils::CachePadded;

use self::gate::{Core, Entered, OnConflict, Request, SHARDS, Wait};
use crate::sync::{Arc, thread_index};

/// What a tracked request is. For statistics and debugging: whether it waits depends on its range and on
/// whether it is serialising, never on its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RequestKind {
    /// Reads data.
    Read,
    /// Writes data.
    Write,
    /// Writes zeroes, whichever call it came through.
    ZeroWrite,
    /// Discards data.
    Discard,
    /// Changes the length of the node.
    Truncate,
    /// One end of a copy within the storage.
    CopyRange,
    /// Holds a range for some other purpose: a snapshot, an amendment, a repair, a wait for quiet.
    Reserve,
}

impl RequestKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Write,
        Self::ZeroWrite,
        Self::Discard,
        Self::Truncate,
        Self::CopyRange,
        Self::Reserve,
    ];

    const COUNT: usize = Self::ALL.len();
}

/// The bytes `start .. end` of a node. The byte `u64::MAX` is in no range, so an `end` of `u64::MAX` is infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TrackedRange {
    start: u64,
    end: u64,
}

impl TrackedRange {
    /// The whole node, whatever its length is or becomes.
    pub const EVERYTHING: Self = Self {
        start: 0,
        end: u64::MAX,
    };

    /// `start .. end`.
    ///
    /// # Panics
    ///
    /// If `start` is greater than `end`.
    #[inline]
    pub const fn new(start: u64, end: u64) -> Self {
        assert!(start <= end, "a range starts at or before its end");
        Self { start, end }
    }

    /// `len` bytes from `offset`; without an end if that is past `u64::MAX`.
    #[inline]
    pub const fn from_len(offset: u64, len: u64) -> Self {
        Self {
            start: offset,
            end: offset.saturating_add(len),
        }
    }

    /// Everything from `start`.
    #[inline]
    pub const fn from_start(start: u64) -> Self {
        Self {
            start,
            end: u64::MAX,
        }
    }

    /// The first byte.
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The byte after the last one.
    #[inline]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Whether there is no byte in it.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Whether some byte is in both. An empty range overlaps nothing.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// Whether every byte of `other` is in this one too.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }
}

impl fmt::Display for TrackedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.end == u64::MAX {
            write!(f, "[{:#x}, end)", self.start)
        } else {
            write!(f, "[{:#x}, {:#x})", self.start, self.end)
        }
    }
}

/// One entry of [`Tracker::list`].
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// Its bytes.
    pub range: TrackedRange,
    /// Whether it is in everybody's way.
    pub serialising: bool,
    /// Requests wait for conflicting ones of smaller order.
    pub order: u64,
    /// Tells apart what is tracked at the same time; reused.
    pub slot: u32,
    /// Order and range of those who wait for this one just now. (A waiting request watches one of those in its way.)
    pub watched_by: Vec<(u64, TrackedRange)>,
}

/// A tracker and one of its shards. Requests keep it rather than the tracker, because the
/// reference count of one object for all threads would be the only line that they share.
#[derive(Debug)]
struct Home {
    core: Arc<Core>,
    shard: usize,
}

/// What one node has in flight. The node owns it; requests that outlive the node keep what they need of it.
pub struct Tracker {
    homes: [Arc<CachePadded<Home>>; SHARDS],
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("in_flight", &self.in_flight())
            .field("waits", &self.waits())
            .finish_non_exhaustive()
    }
}

impl Default for Tracker {
    fn default() -> Self {
        Self::new()
    }
}

/// One end of [`Tracker::begin_pair`].
#[derive(Debug, Clone, Copy)]
pub struct PairEnd<'a> {
    /// Where it is tracked.
    pub tracker: &'a Tracker,
    /// Its bytes.
    pub range: TrackedRange,
    /// Whether it is serialising.
    pub serialising: bool,
    /// What it is.
    pub kind: RequestKind,
}

impl Tracker {
    /// A tracker with nothing in flight.
    pub fn new() -> Self {
        Self::with_gate(true)
    }

    /// A tracker that tracks and counts, but lets everything through at once.
    ///
    /// It exists to prove that the gate is what keeps content whole: race tests have to fail with it.
    /// Nothing but a test may call this.
    #[doc(hidden)]
    pub fn new_without_gate_for_tests() -> Self {
        Self::with_gate(false)
    }

    fn with_gate(gate: bool) -> Self {
        let core = Arc::new(Core::new(gate));
        Self {
            homes: std::array::from_fn(|shard| {
                Arc::new(CachePadded::new(Home {
                    core: Arc::clone(&core),
                    shard,
                }))
            }),
        }
    }

    fn core(&self) -> &Core {
        &self.homes[0].core
    }

    /// Begins a request: takes its ticket now, before this returns, whether it has to wait or not.
    ///
    /// What the request needs must be known before, and does not grow later. Whoever holds a ticket and
    /// does not go on holds up those behind, so the returned future has to be polled (or dropped).
    ///
    /// **Cancellation:** dropping the [`Pending`] leaves no trace of the request. It may be done at any time.
    #[inline]
    pub fn begin(&self, range: TrackedRange, serialising: bool, kind: RequestKind) -> Pending {
        let home = &self.homes[thread_index() % SHARDS];
        let request = Request {
            shard: home.shard,
            range,
            serialising,
            kind,
        };
        match home.core.enter(&request, OnConflict::Wait) {
            Some(entered) => Pending::new(home, &request, entered),
            None => unreachable!("only a request that is to be refused is refused"),
        }
    }

    /// Begins a request if it does not have to wait. Otherwise it returns `None`, and nothing of it is left behind.
    #[inline]
    pub fn try_begin(
        &self,
        range: TrackedRange,
        serialising: bool,
        kind: RequestKind,
    ) -> Option<Tracked> {
        let home = &self.homes[thread_index() % SHARDS];
        let request = Request {
            shard: home.shard,
            range,
            serialising,
            kind,
        };
        let entered = home.core.enter(&request, OnConflict::Refuse)?;
        Some(Tracked::new(home, &request, &entered))
    }

    /// Begins both ends of one request, which may be on one node or on two.
    ///
    /// Both tickets are taken as one step: of two such requests the same one is first on both nodes, so
    /// that they do not wait for each other crosswise. The two ends never wait for one another, even
    /// if they overlap and are serialising.
    ///
    /// **Cancellation:** as with [`Tracker::begin`], for either end.
    pub fn begin_pair(a: PairEnd<'_>, b: PairEnd<'_>) -> (Pending, Pending) {
        let shard = thread_index() % SHARDS;
        let (home_a, home_b) = (&a.tracker.homes[shard], &b.tracker.homes[shard]);
        let request = |end: &PairEnd<'_>| Request {
            shard,
            range: end.range,
            serialising: end.serialising,
            kind: end.kind,
        };
        let (request_a, request_b) = (request(&a), request(&b));
        let (entered_a, entered_b) =
            Core::enter_pair((&home_a.core, &request_a), (&home_b.core, &request_b));
        (
            Pending::new(home_a, &request_a, entered_a),
            Pending::new(home_b, &request_b, entered_b),
        )
    }

    /// How many requests ever had to wait. Grows when one begins, not when it is done waiting.
    pub fn waits(&self) -> u64 {
        RequestKind::ALL
            .into_iter()
            .map(|kind| self.waits_of(kind))
            .sum()
    }

    /// How many requests of that kind ever had to wait.
    pub fn waits_of(&self, kind: RequestKind) -> u64 {
        self.core().waits(kind)
    }

    /// How many requests are tracked, those that wait included.
    ///
    /// The shards are counted one after the other: while others begin requests this is an estimate. Once no
    /// new ones come, a 0 means that all have ended. (To *wait* for that, begin a serialising
    /// [`RequestKind::Reserve`] over [`TrackedRange::EVERYTHING`].)
    pub fn in_flight(&self) -> usize {
        self.core().in_flight()
    }

    /// Whether any tracked request, waiting or not, overlaps `range`. For assertions and tests; it may have
    /// changed by the time the answer arrives.
    pub fn overlapping(&self, range: TrackedRange) -> bool {
        self.core().overlapping(range)
    }

    /// What is tracked, for people who want to see who waits for whom. Slow.
    #[doc(hidden)]
    pub fn list(&self) -> Vec<InFlight> {
        self.core().list()
    }

    /// How many list entries of waiting requests there are: each is to be in one list at most.
    #[cfg(any(test, loom))]
    #[doc(hidden)]
    pub fn watchers(&self) -> usize {
        self.core().watchers()
    }
}

/// A request that has its ticket and waits for those before it.
///
/// It is ready when it is polled, or by [`Pending::into_ready`]; an uncontended one is ready from the start.
///
/// **Cancellation:** dropping it ends the request. Those who waited for it go on, and it
/// disappears from the lists of those that it waited for.
#[must_use = "a request that is not polled holds up those behind it"]
#[derive(Debug)]
pub struct Pending {
    /// `None` once it has been handed out.
    tracked: Option<Tracked>,
    wait: Option<Arc<Wait>>,
}

impl Pending {
    #[inline]
    fn new(home: &Arc<CachePadded<Home>>, request: &Request, entered: Entered) -> Self {
        Self {
            tracked: Some(Tracked::new(home, request, &entered)),
            wait: entered.wait,
        }
    }

    /// Whether there is nothing to wait for (any more).
    pub fn is_ready(&self) -> bool {
        self.wait.as_ref().is_none_or(|wait| wait.is_done())
    }

    /// The tracked request, if there is nothing to wait for (any more).
    #[inline]
    pub fn into_ready(mut self) -> Result<Tracked, Self> {
        if self.is_ready() {
            self.wait = None;
            self.tracked.take().ok_or(self)
        } else {
            Err(self)
        }
    }

    /// See [`Tracked::id`].
    pub fn id(&self) -> Option<u64> {
        self.tracked.as_ref().map(Tracked::id)
    }
}

impl Future for Pending {
    type Output = Tracked;

    /// # Panics
    ///
    /// If it is polled again after it was ready.
    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Tracked> {
        if let Some(wait) = &self.wait {
            if wait.poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.wait = None;
        }
        Poll::Ready(
            self.tracked
                .take()
                .expect("polled again after it was ready"),
        )
    }
}

impl Drop for Pending {
    #[inline]
    fn drop(&mut self) {
        if let (Some(wait), Some(tracked)) = (&self.wait, &self.tracked) {
            tracked.home.core.cancel(wait);
        }
        // `tracked`, which is dropped next, ends the request itself.
    }
}

/// No slot.
const NOWHERE: u32 = u32::MAX;

/// A request that may go on. It is tracked until this is dropped, which may happen on any thread.
///
/// It belongs to the I/O, not to the future that issued it: it must live until nothing can touch the data
/// any more. If the future goes first, see [`Tracked::upgrade_to_serialising`].
#[must_use = "dropping it ends the request"]
pub struct Tracked {
    home: Arc<CachePadded<Home>>,
    range: TrackedRange,
    id: u64,
    /// Its slots, or [`NOWHERE`]. It has both once it has been upgraded.
    plain: u32,
    serial: u32,
    kind: RequestKind,
    serialising: bool,
}

impl Tracked {
    #[inline]
    fn new(home: &Arc<CachePadded<Home>>, request: &Request, entered: &Entered) -> Self {
        let in_serial = request.goes_to_serial();
        Self {
            home: Arc::clone(home),
            range: request.range,
            id: entered.id,
            plain: if in_serial { NOWHERE } else { entered.slot },
            serial: if in_serial { entered.slot } else { NOWHERE },
            kind: request.kind,
            serialising: request.serialising,
        }
    }

    /// What is tracked.
    pub fn range(&self) -> TrackedRange {
        self.range
    }

    /// What it is.
    pub fn kind(&self) -> RequestKind {
        self.kind
    }

    /// Whether plain requests that overlap it and began later wait for it.
    pub fn is_serialising(&self) -> bool {
        self.serialising
    }

    /// A number for traces, unique within its tracker.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// From now on every overlapping request that begins waits for this one, plain or not. It itself waits for nothing, and
    /// what runs beside it already goes on doing so.
    ///
    /// For a request whose future was dropped while its I/O is in flight: a new write must
    /// not be acknowledged while an old, cancelled one can still land on top of it.
    pub fn upgrade_to_serialising(&mut self) {
        if !self.serialising {
            self.serialising = true;
            if !self.range.is_empty() {
                self.serial = self.home.core.upgrade(self.range);
            }
        }
    }

    /// Ends the request for the bytes before `start`, and goes on with the rest: what waited only
    /// for the front of a long request does not have to wait for all of it.
    ///
    /// A `start` at or before the range's own does nothing; one past its end leaves an empty range.
    pub fn release_front(&mut self, start: u64) {
        if self.range.is_empty() || start <= self.range.start {
            return;
        }
        self.range.start = start.min(self.range.end);
        if self.serial != NOWHERE {
            self.home.core.shrink_serialising(self.serial, self.range);
        }
        if self.plain != NOWHERE {
            self.home
                .core
                .shrink_plain(self.home.shard, self.plain, self.range);
        }
    }
}

impl Drop for Tracked {
    #[inline]
    fn drop(&mut self) {
        if self.serial != NOWHERE {
            self.home
                .core
                .end_serialising(self.serial, self.plain != NOWHERE);
        }
        if self.plain != NOWHERE {
            self.home.core.end_plain(self.home.shard, self.plain);
        }
    }
}

impl fmt::Debug for Tracked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracked")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("range", &format_args!("{}", self.range))
            .field("serialising", &self.serialising)
            .finish_non_exhaustive()
    }
}
