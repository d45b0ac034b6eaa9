//! Who waits for whom: the tables of what is in flight on one node, and the waiting itself.
//!
//! It knows ranges, orders and wakers. It never sees an I/O, and never polls anything.
//!
//! # Order
//!
//! Every request has an *order*, and one rule decides everything: **X waits for Y when they conflict
//! and Y's order is smaller.** The k-th serialising request of the node has the order 2k. A plain
//! one has 2k + 1, where k is the number of serialising requests that had visited its shard when it
//! was entered there. Plain requests do not conflict with one another, so it does not matter that many
//! share an order. Orders are numbers and waiting goes from larger to smaller: there is no
//! cycle. The two ends of a copy-range within one node get the same order, and thereby never wait for each other.
//!
//! # Where things are
//!
//! * A plain request is in one [`Shard`], its submitter's.
//! * A serialising request is in [`Serial`], and its range is copied into every *live* shard, under the
//!   `Serial` lock. A shard is live once its first request came. So a plain request learns under
//!   its own shard's lock, and nowhere else, whether anything serialising is in its way: that lock also
//!   decides which of the two came first. (The copies are the "flag that everyone sees" of the
//!   design; being one per shard and under the shard's lock, nobody has to load a line that others write.)
//! * Only a plain request that does find something in its way takes the `Serial` lock, and enters its
//!   shard while holding that.
//!
//! # Waiting
//!
//! A request that must wait watches *one* of the requests in its way; among the serialising ones it is the youngest
//! of the older ones, so that a queue is a chain and not a fan. When that ends, whoever ends it looks, on behalf of the
//! watchers, for the next one in their way, and only a watcher without any is woken. So a waiting request is
//! in one list, whatever the depth of the queue, and takes itself out of it when it is dropped.
//!
//! A serialising request first waits out `Serial`, then each shard that held something in its way when
//! it arrived. Every request that came later to such a place has a larger order, so a place that has
//! been waited out stays so.
//!
//! # Locks
//!
//! `Serial` → `Shard` → [`Wait::state`]; of two nodes (copy-range) both `Serial`, the lower node id first.
//! At most one `Shard` and one `Wait::state` is held at a time. Wakers are called and dropped without any lock.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64 as StaticCounter;
use std::task::{Context, Poll, Waker};

use crossbeam_utils::CachePadded;
use smallvec::SmallVec;

use super::ranges::RangeIndex;
use super::{InFlight, RequestKind, TrackedRange};
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};

/// Plain requests are spread over so many shards, by submitting thread.
pub(super) const SHARDS: usize = if cfg!(loom) { 2 } else { 16 };

pub(super) type Wakers = SmallVec<[Waker; 4]>;
type Watchers = Vec<Watcher>;

/// A set of shards, one bit each.
type ShardSet = u32;
const _: () = assert!(SHARDS <= ShardSet::BITS as usize);

fn members(mut set: ShardSet) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if set == 0 {
            return None;
        }
        let first = set.trailing_zeros() as usize;
        set &= set - 1;
        Some(first)
    })
}

/// What is to happen when something is in a request's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnConflict {
    /// Wait for it.
    Wait,
    /// Do not begin at all.
    Refuse,
    /// Begin regardless: the gate is off, or the request is in flight already.
    Ignore,
}

/// A waiting request, shared between its future and the request that it watches.
#[derive(Debug)]
pub(super) struct Wait {
    order: u64,
    range: TrackedRange,
    state: Mutex<WaitState>,
}

#[derive(Debug)]
struct WaitState {
    /// Shards that are still to be waited out.
    left: ShardSet,
    /// Whose list of watchers this is in. While a watched request is ending this may be out of date.
    watching: Option<Place>,
    done: bool,
    cancelled: bool,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy)]
enum Place {
    Serial(u32),
    Shard(usize, u32),
}

#[derive(Debug)]
struct Watcher {
    order: u64,
    wait: Arc<Wait>,
}

impl Wait {
    fn new(order: u64, range: TrackedRange, left: ShardSet, watching: Option<Place>) -> Arc<Self> {
        let state = WaitState {
            left,
            watching,
            done: false,
            cancelled: false,
            waker: None,
        };
        Arc::new(Self {
            order,
            range,
            state: Mutex::new(state),
        })
    }

    pub(super) fn is_done(&self) -> bool {
        self.state.lock().done
    }

    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Cloned before, dropped after the lock: both run foreign code.
        let mut waker = Some(cx.waker().clone());
        let mut state = self.state.lock();
        if state.done {
            drop(state);
            return Poll::Ready(());
        }
        std::mem::swap(&mut state.waker, &mut waker);
        drop(state);
        drop(waker);
        Poll::Pending
    }
}

/// One request in a [`Table`].
#[derive(Debug)]
struct Slot {
    order: u64,
    range: TrackedRange,
    /// Waiting requests that watch this one, by ascending order.
    watchers: Watchers,
}

/// The requests of one place, under small reusable numbers.
#[derive(Debug, Default)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: RangeIndex,
    /// How many requests ever began here.
    begun: u64,
}

impl Table {
    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn begin(&mut self, order: u64, range: TrackedRange) -> u32 {
        self.begun += 1;
        let slot = if let Some(slot) = self.free.pop() {
            let reused = &mut self.slots[slot as usize];
            reused.order = order;
            reused.range = range;
            slot
        } else {
            self.slots.push(Slot {
                order,
                range,
                watchers: Watchers::new(),
            });
            (self.slots.len() - 1) as u32
        };
        self.index.insert(slot, range);
        slot
    }

    /// Takes a request out. Its watchers are to be settled before the lock is released.
    fn end(&mut self, slot: u32) -> Watchers {
        let ended = &mut self.slots[slot as usize];
        let watchers = std::mem::take(&mut ended.watchers);
        self.index.remove(slot, ended.range);
        self.free.push(slot);
        watchers
    }

    /// Gives a request another range. Its watchers are to be settled before the lock is released.
    fn reshape(&mut self, slot: u32, range: TrackedRange) -> Watchers {
        let changed = &mut self.slots[slot as usize];
        let watchers = std::mem::take(&mut changed.watchers);
        let old = std::mem::replace(&mut changed.range, range);
        self.index.remove(slot, old);
        self.index.insert(slot, range);
        watchers
    }

    /// The youngest request in the way of one with that range and order.
    fn youngest_blocker(&mut self, range: TrackedRange, order: u64) -> Option<u32> {
        let mut youngest: Option<(u64, u32)> = None;
        let slots = &self.slots;
        self.index.search::<()>(range, |slot| {
            let theirs = slots[slot as usize].order;
            if theirs < order && youngest.is_none_or(|(best, _)| best < theirs) {
                youngest = Some((theirs, slot));
            }
            ControlFlow::Continue(())
        });
        youngest.map(|(_, slot)| slot)
    }

    /// Some request in the way of one with that range and order.
    fn any_blocker(&mut self, range: TrackedRange, order: u64) -> Option<u32> {
        let slots = &self.slots;
        self.index.search(range, |slot| {
            if slots[slot as usize].order < order {
                ControlFlow::Break(slot)
            } else {
                ControlFlow::Continue(())
            }
        })
    }

    fn watch(&mut self, slot: u32, wait: Arc<Wait>) {
        let watchers = &mut self.slots[slot as usize].watchers;
        let order = wait.order;
        let at = watchers.partition_point(|other| other.order <= order);
        watchers.insert(at, Watcher { order, wait });
    }

    fn unwatch(&mut self, slot: u32, wait: &Arc<Wait>) -> Option<Watcher> {
        let watchers = &mut self.slots[slot as usize].watchers;
        let from = watchers.partition_point(|other| other.order < wait.order);
        let same = watchers[from..]
            .iter()
            .take_while(|other| other.order == wait.order);
        let at = same
            .enumerate()
            .find(|(_, other)| Arc::ptr_eq(&other.wait, wait))?
            .0;
        Some(watchers.remove(from + at))
    }

    /// Lets each of `watchers` watch the next request here that is in its way, which `place` says how to
    /// find again, and returns those that have none left.
    fn settle(
        &mut self,
        watchers: Watchers,
        next: impl Fn(&mut Self, TrackedRange, u64) -> Option<u32>,
        place: impl Fn(u32) -> Place,
    ) -> Watchers {
        let mut free = Watchers::new();
        for watcher in watchers {
            let mut state = watcher.wait.state.lock();
            if state.cancelled {
                continue;
            }
            let next = next(self, watcher.wait.range, watcher.order);
            state.watching = next.map(&place);
            drop(state);
            match next {
                Some(slot) => self.watch(slot, watcher.wait),
                None => free.push(watcher),
            }
        }
        free
    }
}

/// The plain requests of some threads, and a copy of every serialising range.
#[derive(Debug, Default)]
struct Shard {
    live: bool,
    /// The order of the last serialising request that visited.
    last: u64,
    plain: Table,
    /// By slot in [`Serial::table`].
    serialising: RangeIndex,
}

impl Shard {
    /// See [`Table::settle`]. Who watches plain requests is serialising and has the others of its kind behind it:
    /// any blocker will do, and is found sooner.
    fn settle(&mut self, watchers: Watchers, index: usize) -> Watchers {
        self.plain.settle(watchers, Table::any_blocker, |slot| {
            Place::Shard(index, slot)
        })
    }
}

/// The serialising requests.
#[derive(Debug, Default)]
pub(super) struct Serial {
    table: Table,
    /// The order of the last serialising request.
    last: u64,
    live: ShardSet,
    /// How many entries of `table` belong to requests that are in a shard too.
    upgraded: usize,
}

/// Where an admitted request is, and what it waits for, if anything.
#[derive(Debug)]
pub(super) struct Entered {
    pub(super) slot: u32,
    pub(super) wait: Option<Arc<Wait>>,
    pub(super) id: u64,
}

/// Everything that is in flight on one node.
#[derive(Debug)]
pub(super) struct Core {
    /// Tells nodes apart, and orders their locks.
    id: u64,
    gate: bool,
    serial: CachePadded<Mutex<Serial>>,
    shards: [CachePadded<Mutex<Shard>>; SHARDS],
    waits: [AtomicU64; RequestKind::COUNT],
}

/// What is asked of [`Core::enter`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) shard: usize,
    pub(super) range: TrackedRange,
    pub(super) serialising: bool,
    pub(super) kind: RequestKind,
}

impl Request {
    /// An empty range is in nobody's way, whatever its kind: it is kept in its submitter's shard.
    pub(super) fn goes_to_serial(&self) -> bool {
        self.serialising && !self.range.is_empty()
    }
}

impl Core {
    pub(super) fn new(gate: bool) -> Self {
        // Not from `sync`: it is no part of any algorithm, and loom has no statics.
        static NEXT_ID: StaticCounter = StaticCounter::new(0);
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            gate,
            serial: CachePadded::new(Mutex::new(Serial::default())),
            shards: std::array::from_fn(|_| CachePadded::new(Mutex::new(Shard::default()))),
            waits: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Enters a request; `None` only if it was to be refused and had to wait.
    #[inline]
    pub(super) fn enter(&self, request: &Request, on_conflict: OnConflict) -> Option<Entered> {
        if !request.goes_to_serial() {
            let mut shard = self.shards[request.shard].lock();
            if shard.live && (!self.gate || !shard.serialising.overlaps(request.range)) {
                let order = shard.last + 1;
                let slot = shard.plain.begin(order, request.range);
                let id = id_of(shard.plain.begun, request.shard);
                return Some(Entered {
                    slot,
                    wait: None,
                    id,
                });
            }
        }
        self.enter_slowly(request, on_conflict)
    }

    #[cold]
    fn enter_slowly(&self, request: &Request, on_conflict: OnConflict) -> Option<Entered> {
        let mut serial = self.serial.lock();
        let order = serial.next_order(request.goes_to_serial());
        self.enter_at(&mut serial, request, order, on_conflict)
    }

    /// Enters two requests as one step, so that everyone else sees both before it or both after it.
    pub(super) fn enter_pair(a: (&Self, &Request), b: (&Self, &Request)) -> (Entered, Entered) {
        const WAITS: &str = "only a request that is to be refused is refused";
        let wait = OnConflict::Wait;
        if a.0.id == b.0.id {
            let mut serial = a.0.serial.lock();
            let order = serial.next_order(a.1.goes_to_serial() || b.1.goes_to_serial());
            let first = a.0.enter_at(&mut serial, a.1, order, wait).expect(WAITS);
            let second = b.0.enter_at(&mut serial, b.1, order, wait).expect(WAITS);
            return (first, second);
        }
        let swapped = b.0.id < a.0.id;
        let (low, high) = if swapped { (b, a) } else { (a, b) };
        let mut low_serial = low.0.serial.lock();
        let mut high_serial = high.0.serial.lock();
        let order = low_serial.next_order(low.1.goes_to_serial());
        let first = low
            .0
            .enter_at(&mut low_serial, low.1, order, wait)
            .expect(WAITS);
        let order = high_serial.next_order(high.1.goes_to_serial());
        let second = high
            .0
            .enter_at(&mut high_serial, high.1, order, wait)
            .expect(WAITS);
        if swapped {
            (second, first)
        } else {
            (first, second)
        }
    }

    fn enter_at(
        &self,
        serial: &mut Serial,
        request: &Request,
        order: u64,
        on_conflict: OnConflict,
    ) -> Option<Entered> {
        let on_conflict = if self.gate {
            on_conflict
        } else {
            OnConflict::Ignore
        };
        let entered = if request.goes_to_serial() {
            self.enter_serialising(serial, request.range, order, on_conflict)
        } else {
            self.enter_plain(serial, request, order, on_conflict)
        }?;
        if entered.wait.is_some() {
            self.waits[request.kind as usize].fetch_add(1, Ordering::Relaxed);
        }
        Some(entered)
    }

    fn enter_plain(
        &self,
        serial: &mut Serial,
        request: &Request,
        order: u64,
        on_conflict: OnConflict,
    ) -> Option<Entered> {
        let range = request.range;
        let blocker = match on_conflict {
            OnConflict::Ignore => None,
            OnConflict::Wait | OnConflict::Refuse => serial.table.youngest_blocker(range, order),
        };
        if blocker.is_some() && on_conflict == OnConflict::Refuse {
            return None;
        }
        let mut shard = self.shards[request.shard].lock();
        if !shard.live {
            // Nobody serialising visits a shard before it is live: it catches up now.
            shard.live = true;
            shard.last = serial.last;
            serial.live |= 1 << request.shard;
            serial.copy_ranges(&mut shard.serialising);
        }
        let slot = shard.plain.begin(order, range);
        let id = id_of(shard.plain.begun, request.shard);
        drop(shard);
        let wait = blocker.map(|blocker| {
            let wait = Wait::new(order, range, 0, Some(Place::Serial(blocker)));
            serial.table.watch(blocker, Arc::clone(&wait));
            wait
        });
        Some(Entered { slot, wait, id })
    }

    fn enter_serialising(
        &self,
        serial: &mut Serial,
        range: TrackedRange,
        order: u64,
        on_conflict: OnConflict,
    ) -> Option<Entered> {
        let waits = on_conflict != OnConflict::Ignore;
        let refuse = on_conflict == OnConflict::Refuse;
        let blocker = if waits {
            serial.table.youngest_blocker(range, order)
        } else {
            None
        };
        if refuse && blocker.is_some() {
            return None;
        }
        serial.last = order;
        let slot = serial.table.begin(order, range);
        let id = id_of(serial.table.begun, SHARDS);
        let mut left: ShardSet = 0;
        // Every shard is visited before anything is waited for. Waiting out one shard before the next
        // has been visited would let a plain request into that one unseen.
        for index in members(serial.live) {
            let mut shard = self.shards[index].lock();
            shard.last = order;
            shard.serialising.insert(slot, range);
            if waits && shard.plain.any_blocker(range, order).is_some() {
                left |= 1 << index;
                if refuse {
                    drop(shard);
                    // Shards that were not reached come after this one.
                    for visited in members(serial.live).take_while(|&visited| visited <= index) {
                        self.shards[visited].lock().serialising.remove(slot, range);
                    }
                    let watchers = serial.table.end(slot);
                    debug_assert!(watchers.is_empty(), "watched while the lock was held");
                    return None;
                }
            }
        }
        let wait = if let Some(blocker) = blocker {
            let wait = Wait::new(order, range, left, Some(Place::Serial(blocker)));
            serial.table.watch(blocker, Arc::clone(&wait));
            Some(wait)
        } else if left != 0 {
            let wait = Wait::new(order, range, left, None);
            let waker = self.wait_out_shards(&wait);
            debug_assert!(waker.is_none(), "nobody has polled it yet");
            // What was in its way may have ended since the visit.
            if wait.is_done() { None } else { Some(wait) }
        } else {
            None
        };
        Some(Entered { slot, wait, id })
    }

    /// Looks through the shards that `wait` has not waited out yet for one more request to watch.
    /// If there is none, `wait` is done, and its waker, if it has one, is returned.
    ///
    /// Called by whoever has `wait` in hand: nothing watched has it in its list.
    fn wait_out_shards(&self, wait: &Arc<Wait>) -> Option<Waker> {
        loop {
            let index = {
                let mut state = wait.state.lock();
                if state.cancelled {
                    return None;
                }
                if state.left == 0 {
                    state.done = true;
                    return state.waker.take();
                }
                let index = state.left.trailing_zeros();
                state.left &= state.left - 1;
                index as usize
            };
            let mut shard = self.shards[index].lock();
            let Some(slot) = shard.plain.any_blocker(wait.range, wait.order) else {
                continue;
            };
            let mut state = wait.state.lock();
            if state.cancelled {
                return None;
            }
            state.watching = Some(Place::Shard(index, slot));
            drop(state);
            shard.plain.watch(slot, Arc::clone(wait));
            return None;
        }
    }

    fn release(&self, watchers: Watchers) {
        let wakers: Wakers = watchers
            .into_iter()
            .filter_map(|w| self.wait_out_shards(&w.wait))
            .collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ends a request that is in a shard.
    #[inline]
    pub(super) fn end_plain(&self, index: usize, slot: u32) {
        let mut shard = self.shards[index].lock();
        let watchers = shard.plain.end(slot);
        if !watchers.is_empty() {
            let free = shard.settle(watchers, index);
            drop(shard);
            self.release(free);
        }
    }

    /// Ends a serialising request, or what [`Core::upgrade`] made of a plain one.
    pub(super) fn end_serialising(&self, slot: u32, upgraded: bool) {
        let mut serial = self.serial.lock();
        let range = serial.table.slots[slot as usize].range;
        let watchers = serial.table.end(slot);
        serial.upgraded -= usize::from(upgraded);
        // Under the `Serial` lock, or the slot's next user could meet this one's copies.
        for index in members(serial.live) {
            self.shards[index].lock().serialising.remove(slot, range);
        }
        if !watchers.is_empty() {
            let free = serial
                .table
                .settle(watchers, Table::youngest_blocker, Place::Serial);
            drop(serial);
            self.release(free);
        }
    }

    /// Makes a plain request serialising for all that begin from now on. Returns its slot among the
    /// serialising; the one in its shard stays, for those who began in between and watch it there.
    pub(super) fn upgrade(&self, range: TrackedRange) -> u32 {
        let mut serial = self.serial.lock();
        serial.upgraded += 1;
        let order = serial.next_order(true);
        self.enter_serialising(&mut serial, range, order, OnConflict::Ignore)
            .expect("only a request that is to be refused is refused")
            .slot
    }

    /// Gives a request in a shard a smaller range.
    pub(super) fn shrink_plain(&self, index: usize, slot: u32, range: TrackedRange) {
        let mut shard = self.shards[index].lock();
        let watchers = shard.plain.reshape(slot, range);
        let free = shard.settle(watchers, index);
        drop(shard);
        self.release(free);
    }

    /// Gives a serialising request a smaller range.
    pub(super) fn shrink_serialising(&self, slot: u32, range: TrackedRange) {
        let mut serial = self.serial.lock();
        let old = serial.table.slots[slot as usize].range;
        let watchers = serial.table.reshape(slot, range);
        for index in members(serial.live) {
            let mut shard = self.shards[index].lock();
            shard.serialising.remove(slot, old);
            shard.serialising.insert(slot, range);
        }
        let free = serial
            .table
            .settle(watchers, Table::youngest_blocker, Place::Serial);
        drop(serial);
        self.release(free);
    }

    /// Takes a waiting request out of the list that it is in. Its own entry is ended separately.
    pub(super) fn cancel(&self, wait: &Arc<Wait>) {
        let (waker, watching) = {
            let mut state = wait.state.lock();
            state.cancelled = true;
            (state.waker.take(), state.watching.take())
        };
        drop(waker);
        // If what it watched has ended meanwhile it is not found, and whoever has it in hand sees that it
        // is cancelled.
        let removed = match watching {
            Some(Place::Serial(slot)) => self.serial.lock().table.unwatch(slot, wait),
            Some(Place::Shard(index, slot)) => self.shards[index].lock().plain.unwatch(slot, wait),
            None => None,
        };
        drop(removed);
    }

    pub(super) fn in_flight(&self) -> usize {
        let serial = self.serial.lock();
        let plain: usize = members(serial.live)
            .map(|i| self.shards[i].lock().plain.len())
            .sum();
        plain + serial.table.len() - serial.upgraded
    }

    pub(super) fn overlapping(&self, range: TrackedRange) -> bool {
        let mut serial = self.serial.lock();
        serial.table.index.overlaps(range)
            || members(serial.live).any(|i| self.shards[i].lock().plain.index.overlaps(range))
    }

    pub(super) fn waits(&self, kind: RequestKind) -> u64 {
        self.waits[kind as usize].load(Ordering::Relaxed)
    }

    /// What is tracked, and who watches whom. See [`super::InFlight`].
    pub(super) fn list(&self) -> Vec<InFlight> {
        fn entries(table: &Table, serialising: bool, into: &mut Vec<InFlight>) {
            for (slot, entry) in table.slots.iter().enumerate() {
                if table.free.contains(&(slot as u32)) {
                    continue;
                }
                into.push(InFlight {
                    range: entry.range,
                    serialising,
                    order: entry.order,
                    slot: slot as u32,
                    watched_by: entry
                        .watchers
                        .iter()
                        .map(|watcher| (watcher.order, watcher.wait.range))
                        .collect(),
                });
            }
        }
        let serial = self.serial.lock();
        let mut list = Vec::new();
        entries(&serial.table, true, &mut list);
        for index in members(serial.live) {
            entries(&self.shards[index].lock().plain, false, &mut list);
        }
        list
    }

    #[cfg(any(test, loom))]
    pub(super) fn watchers(&self) -> usize {
        let count = |table: &Table| {
            table
                .slots
                .iter()
                .map(|slot| slot.watchers.len())
                .sum::<usize>()
        };
        let serial = self.serial.lock();
        let plain: usize = members(serial.live)
            .map(|i| count(&self.shards[i].lock().plain))
            .sum();
        plain + count(&serial.table)
    }
}

impl Serial {
    fn next_order(&self, serialising: bool) -> u64 {
        self.last + if serialising { 2 } else { 1 }
    }

    fn copy_ranges(&mut self, into: &mut RangeIndex) {
        let slots = &self.table.slots;
        self.table
            .index
            .search::<()>(TrackedRange::EVERYTHING, |slot| {
                into.insert(slot, slots[slot as usize].range);
                ControlFlow::Continue(())
            });
    }
}

/// A number that no other request of the node ever has.
fn id_of(begun: u64, place: usize) -> u64 {
    (begun - 1) * (SHARDS as u64 + 1) + place as u64
}
