//! Pins: nothing that is freed is used again while somebody may still be at it.
//!
//! A format driver *pins* before it loads a mapping and holds the pin while data I/O to the cluster is in flight.
//! Whoever frees a cluster unlinks it first, then *retires* it, and lets it be allocated only once the
//! [`Grace`] that it got is over: when every pin that was published before has ended. Pins are not
//! per cluster, so a pin costs the same few nanoseconds whatever it protects, and needs no table.
//!
//! This module never knows what is protected: it has no clusters, no queue of freed things and no I/O.
//! It also never blocks, and it does not keep anyone from *reading* stale data: that is the tracked
//! requests' business.
//!
//! ```
//! use block_core::pins::Pins;
//! # futures::executor::block_on(async {
//! let pins = Pins::new();
//! let pin = pins.pin(); // 1. pin, 2. load the mapping, 3. do the I/O
//!
//! // … unlinked by someone else meanwhile
//! let mut grace = pins.retire();
//! assert!(!pins.observe(&mut grace), "the I/O may still be going to the old cluster");
//!
//! drop(pin); // 4. the I/O has ended
//! assert!(pins.observe(&mut grace));
//!
//! let grace = pins.retire();
//! pins.wait(grace).await;
//! # });
//! ```
//!
//! # Why it is right
//!
//! A pin adds one to a counter (of its thread's shard, of one of two *parities*) and takes it away again at its end. A
//! counter that is seen at zero at some time after the retirement counts no pin from before it. So a grace
//! is over once each counter has been seen at zero, at whatever time, after it was handed out. That is
//! the whole proof for the pins whose increment the freer sees. For the others there is a full fence on
//! both sides: the pinning side increments, fences, loads the mapping; the freeing side unlinks, fences, loads the
//! counters. If the freer does not see the increment, then the other side sees the unlink.
//!
//! # Why it gets there
//!
//! Under a constant stream of pins a counter may never be seen at zero. So there are two per shard, and whoever observes a
//! grace that is not over starts a *phase*: new pins go to the other parity, and those of the old one only become
//! fewer. The phase is complete when each of the old counters has been seen at zero. Phases follow one another and
//! alternate, so two of them begun after a retirement have seen all counters at zero: each takes about
//! as long as the longest pin.

use std::fmt;
use std::future::Future;
use std::pin::Pin as TaskPin;
use std::sync::atomic::AtomicU64 as StaticCounter;
use std::task::{Context, Poll, Waker};

use crossbeam_utils::CachePadded;
use smallvec::SmallVec;

use crate::sync::{
    Arc, AtomicBool, AtomicU64, AtomicUsize, Mutex, Ordering, fence, fence_after_rmw, thread_index,
};

const SHARDS: usize = if cfg!(loom) { 2 } else { 16 };

/// Counters, one bit each: bit `2 * shard + parity`.
type Counters = u64;
const _: () = assert!(2 * SHARDS <= Counters::BITS as usize);

/// All counters of parity 0.
const EVEN: Counters = 0x5555_5555_5555_5555 & (Counters::MAX >> (64 - 2 * SHARDS));

type Wakers = SmallVec<[Waker; 4]>;

#[derive(Debug)]
struct Shard {
    /// How many pins there are, by parity.
    pins: [AtomicUsize; 2],
}

impl Shard {
    fn new() -> Self {
        Self {
            pins: [AtomicUsize::new(0), AtomicUsize::new(0)],
        }
    }
}

#[derive(Debug)]
struct Shared {
    /// Tells sets of pins apart.
    id: u64,
    enabled: bool,
    /// Where new pins go. A pin that read it a moment ago may still go to the other one.
    parity: CachePadded<AtomicUsize>,
    /// Whether anyone is in `Phases::waiting`: whether unpinning has to look.
    waited_for: CachePadded<AtomicBool>,
    shards: [CachePadded<Shard>; SHARDS],
    phases: Mutex<Phases>,
    deferred: AtomicU64,
}

/// The graces in progress. Everything here is slow path.
#[derive(Debug, Default)]
struct Phases {
    /// How many phases were ever started. At most the last one is not complete.
    started: u64,
    /// The old parity's counters that the phase in progress has not seen at zero; none if it is complete.
    draining: Counters,
    waiting: Vec<Waiting>,
    next_id: u64,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    grace: Grace,
    waker: Waker,
}

impl Phases {
    fn completed(&self) -> u64 {
        self.started - u64::from(self.draining != 0)
    }
}

/// What everyone who pins shares by shard: the reference count of one object for all threads
/// would be a line that they all write.
#[derive(Debug)]
struct Home {
    shared: Arc<Shared>,
    shard: usize,
}

/// A set of pins, usually one per image.
pub struct Pins {
    homes: [Arc<CachePadded<Home>>; SHARDS],
}

/// Holds back whatever is retired after it was published. Dropping it, on any thread, unpins.
#[must_use = "dropping it unpins"]
pub struct Pin {
    home: Arc<CachePadded<Home>>,
    parity: usize,
}

/// What is left to be seen before something that was retired may be used again.
///
/// Dropping it without having seen its end is harmless to the pins; what was retired must then
/// never be used again (it is leaked), or be retired again.
#[must_use = "what was retired may be used again only when the grace is over"]
#[derive(Debug)]
pub struct Grace {
    /// Whose it is.
    pins: u64,
    /// Counters that have not been seen at zero since it was handed out.
    unseen: Counters,
    /// Over, too, when so many phases are complete.
    phase: u64,
    /// Whether it has been counted as deferred.
    deferred: bool,
}

impl Grace {
    /// Whether it was seen to be over. Does not look: see [`Pins::observe`].
    pub fn is_over(&self) -> bool {
        self.unseen == 0
    }
}

impl Default for Pins {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pins")
            .field("enabled", &self.shared().enabled)
            .field("active", &self.active())
            .field("deferred", &self.deferred())
            .finish_non_exhaustive()
    }
}

impl Pins {
    /// No pins.
    pub fn new() -> Self {
        Self::with(true)
    }

    /// Pins that hold nothing back: every grace is over at once.
    ///
    /// It exists to prove that pins are what keeps recycled clusters whole: race tests have to fail with it.
    /// Nothing but a test may call this.
    #[doc(hidden)]
    pub fn new_disabled_for_tests() -> Self {
        Self::with(false)
    }

    fn with(enabled: bool) -> Self {
        // Not from `sync`: it is no part of any algorithm, and loom has no statics.
        static NEXT_ID: StaticCounter = StaticCounter::new(0);
        let shared = Arc::new(Shared {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            enabled,
            parity: CachePadded::new(AtomicUsize::new(0)),
            waited_for: CachePadded::new(AtomicBool::new(false)),
            shards: std::array::from_fn(|_| CachePadded::new(Shard::new())),
            phases: Mutex::new(Phases::default()),
            deferred: AtomicU64::new(0),
        });
        Self {
            homes: std::array::from_fn(|shard| {
                Arc::new(CachePadded::new(Home {
                    shared: Arc::clone(&shared),
                    shard,
                }))
            }),
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.homes[0].shared
    }

    /// Publishes a pin. **Load the mapping after this has returned, never before.**
    ///
    /// What the load then finds is not used again before the pin is dropped, provided that who frees it
    /// unlinks it before calling [`Pins::retire`] and minds the grace.
    #[inline]
    pub fn pin(&self) -> Pin {
        let home = &self.homes[thread_index() % SHARDS];
        let parity = home.shared.parity.load(Ordering::Relaxed);
        home.shared.shards[home.shard].pins[parity].fetch_add(1, Ordering::SeqCst);
        // The increment comes before the caller's load of the mapping; pairs with the fence in `retire`.
        fence_after_rmw();
        Pin {
            home: Arc::clone(home),
            parity,
        }
    }

    /// Begins a grace for something that **has been unlinked already**: pins that are published from now on
    /// cannot find it any more.
    pub fn retire(&self) -> Grace {
        let shared = self.shared();
        if !shared.enabled {
            return shared.grace(0, 0);
        }
        // The caller's unlink comes before the loads of the counters; pairs with the fence in `pin`.
        fence(Ordering::SeqCst);
        let unseen = shared.in_use();
        if unseen == 0 {
            return shared.grace(unseen, 0);
        }
        // The phase in progress may have seen some counters before now, so it does not count.
        let phase = shared.phases.lock().started + 2;
        shared.grace(unseen, phase)
    }

    /// Whether `grace`, which these pins handed out, is over: whether no pin that was published before it is
    /// left. Once it is, it stays so.
    ///
    /// Calling this also is what keeps things going: under a constant stream of pins, a grace that nobody
    /// observes or [waits](Pins::wait) for may never end, one that is observed now and then does.
    ///
    /// # Panics
    ///
    /// If other pins handed out the grace.
    pub fn observe(&self, grace: &mut Grace) -> bool {
        self.shared().observe(grace)
    }

    /// Completes when `grace`, which these pins handed out, is over.
    ///
    /// Polling panics if other pins handed it out.
    ///
    /// **Cancellation:** dropping the future forgets the grace and leaves no trace of the wait. What was retired is then
    /// to be treated as described at [`Grace`].
    pub fn wait(&self, grace: Grace) -> GraceWait {
        GraceWait {
            home: Arc::clone(&self.homes[0]),
            state: WaitState::New(grace),
        }
    }

    /// How many pins there are. An estimate while others pin and unpin.
    pub fn active(&self) -> usize {
        let count = |pins: &AtomicUsize| pins.load(Ordering::Relaxed);
        self.shared()
            .shards
            .iter()
            .map(|shard| shard.pins.iter().map(count).sum::<usize>())
            .sum()
    }

    /// How many graces were not over when they were first observed (or waited for).
    pub fn deferred(&self) -> u64 {
        self.shared().deferred.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn grace(&self, unseen: Counters, phase: u64) -> Grace {
        Grace {
            pins: self.id,
            unseen,
            phase,
            deferred: false,
        }
    }

    /// The counters that are not at zero now.
    fn in_use(&self) -> Counters {
        let mut in_use = 0;
        for (index, shard) in self.shards.iter().enumerate() {
            for (parity, pins) in shard.pins.iter().enumerate() {
                // Acquires what was done under the pins that have ended.
                if pins.load(Ordering::Acquire) != 0 {
                    in_use |= 1 << (2 * index + parity);
                }
            }
        }
        in_use
    }

    /// Looks at the counters, tells every grace what was seen, and starts a phase if one of them needs it.
    /// Those that are over leave `waiting`, and their wakers are handed out.
    fn advance(&self, phases: &mut Phases, mut grace: Option<&mut Grace>, wakers: &mut Wakers) {
        // A grace needs two phases at most, and the loop ends when none is missing or one does not
        // complete at once.
        loop {
            let in_use = self.in_use();
            phases.draining &= in_use;
            let completed = phases.completed();
            let mut wanted = 0;
            let mut saw = |grace: &mut Grace| {
                grace.unseen &= in_use;
                if completed >= grace.phase {
                    grace.unseen = 0;
                }
                if !grace.is_over() {
                    wanted = wanted.max(grace.phase);
                }
                grace.is_over()
            };
            if let Some(grace) = grace.as_deref_mut() {
                saw(grace);
            }
            let over = phases
                .waiting
                .extract_if(.., |waiting| saw(&mut waiting.grace));
            wakers.extend(over.map(|waiting| waiting.waker));
            if phases.draining != 0 || phases.started >= wanted {
                break;
            }
            let old = self.parity.load(Ordering::Relaxed);
            self.parity.store(1 - old, Ordering::Relaxed);
            phases.started += 1;
            phases.draining = EVEN << old;
        }
        if phases.waiting.is_empty() {
            self.waited_for.store(false, Ordering::Relaxed);
        }
    }

    /// See [`Pins::observe`].
    fn observe(&self, grace: &mut Grace) -> bool {
        self.assert_owns(grace);
        if !grace.is_over() {
            let mut wakers = Wakers::new();
            let mut phases = self.phases.lock();
            self.advance(&mut phases, Some(grace), &mut wakers);
            drop(phases);
            wakers.into_iter().for_each(Waker::wake);
            self.count_deferred(grace);
        }
        grace.is_over()
    }

    fn count_deferred(&self, grace: &mut Grace) {
        if !grace.is_over() && !grace.deferred {
            grace.deferred = true;
            self.deferred.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn assert_owns(&self, grace: &Grace) {
        assert_eq!(
            grace.pins, self.id,
            "a grace is observed where it was handed out"
        );
    }

    /// A counter came to zero while someone waits.
    #[cold]
    fn wake_waiting(&self) {
        let mut wakers = Wakers::new();
        let mut phases = self.phases.lock();
        self.advance(&mut phases, None, &mut wakers);
        drop(phases);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Enters a grace among those that wait; `None` if it turns out to be over.
    fn register(&self, mut grace: Grace, waker: Waker) -> Option<u64> {
        self.count_deferred(&mut grace);
        let mut wakers = Wakers::new();
        let mut phases = self.phases.lock();
        let id = phases.next_id;
        phases.next_id += 1;
        phases.waiting.push(Waiting { id, grace, waker });
        self.waited_for.store(true, Ordering::Relaxed);
        // The flag goes up before the counters are loaded; pairs with the fence in `Pin::drop`: either
        // this sees the counter at zero, or whoever took it there sees the flag.
        fence(Ordering::SeqCst);
        self.advance(&mut phases, None, &mut wakers);
        // The last one that was entered is the last one that stays.
        let stays = phases
            .waiting
            .last()
            .is_some_and(|waiting| waiting.id == id);
        drop(phases);
        wakers.into_iter().for_each(Waker::wake);
        stays.then_some(id)
    }

    /// Exchanges the waker of a grace that waits; `false` if it is over.
    fn update(&self, id: u64, waker: Waker) -> bool {
        let mut phases = self.phases.lock();
        let entry = phases.waiting.iter_mut().find(|waiting| waiting.id == id);
        let old = entry.map(|waiting| std::mem::replace(&mut waiting.waker, waker));
        drop(phases);
        old.is_some()
    }

    fn forget(&self, id: u64) {
        let mut phases = self.phases.lock();
        let at = phases.waiting.iter().position(|waiting| waiting.id == id);
        let forgotten = at.map(|at| phases.waiting.remove(at));
        if phases.waiting.is_empty() {
            self.waited_for.store(false, Ordering::Relaxed);
        }
        drop(phases);
        drop(forgotten);
    }
}

impl Drop for Pin {
    #[inline]
    fn drop(&mut self) {
        let shared = &self.home.shared;
        // Releases what was done under the pin to whoever sees the counter.
        let before =
            shared.shards[self.home.shard].pins[self.parity].fetch_sub(1, Ordering::SeqCst);
        if before == 1 {
            // The decrement comes before the load of the flag; pairs with the fence in `register`.
            fence_after_rmw();
            if shared.waited_for.load(Ordering::Relaxed) {
                shared.wake_waiting();
            }
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").finish_non_exhaustive()
    }
}

/// The future of [`Pins::wait`].
///
/// **Cancellation:** see there.
#[must_use = "a grace is waited for by polling"]
#[derive(Debug)]
pub struct GraceWait {
    home: Arc<CachePadded<Home>>,
    state: WaitState,
}

#[derive(Debug)]
enum WaitState {
    New(Grace),
    Registered(u64),
    Over,
}

impl Future for GraceWait {
    type Output = ();

    fn poll(mut self: TaskPin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let waits = match std::mem::replace(&mut self.state, WaitState::Over) {
            WaitState::New(mut grace) => {
                if self.home.shared.observe(&mut grace) {
                    None
                } else {
                    self.home.shared.register(grace, cx.waker().clone())
                }
            }
            WaitState::Registered(id) => self
                .home
                .shared
                .update(id, cx.waker().clone())
                .then_some(id),
            WaitState::Over => None,
        };
        match waits {
            Some(id) => {
                self.state = WaitState::Registered(id);
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

impl Drop for GraceWait {
    fn drop(&mut self) {
        if let WaitState::Registered(id) = self.state {
            self.home.shared.forget(id);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use futures::FutureExt;
    use futures::executor::block_on;
    use std::sync::atomic::AtomicBool as StdBool;

    fn on_thread<R: Send>(work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| scope.spawn(work).join().expect("the thread panicked"))
    }

    #[test]
    fn a_grace_without_pins_is_over_at_once_and_is_not_deferred() {
        let pins = Pins::new();
        let mut grace = pins.retire();
        assert!(grace.is_over());
        assert!(pins.observe(&mut grace));
        assert_eq!(pins.deferred(), 0);
    }

    #[test]
    fn a_grace_lasts_until_every_pin_from_before_it_is_dropped() {
        let pins = Pins::new();
        let one = pins.pin();
        let other = on_thread(|| pins.pin());
        let mut grace = pins.retire();
        assert!(!pins.observe(&mut grace));
        drop(one);
        assert!(!pins.observe(&mut grace));
        on_thread(move || drop(other));
        assert!(pins.observe(&mut grace));
        assert!(pins.observe(&mut grace), "once over, always over");
        assert_eq!(pins.deferred(), 1, "counted once");
    }

    #[test]
    fn a_pin_from_after_it_does_not_hold_a_grace_up() {
        let pins = Pins::new();
        let old = pins.pin();
        let mut grace = pins.retire();
        assert!(!pins.observe(&mut grace));
        let young = pins.pin();
        drop(old);
        assert!(pins.observe(&mut grace));
        drop(young);
    }

    #[test]
    fn a_grace_ends_under_a_stream_of_pins_that_never_pauses() {
        let pins = Pins::new();
        let mut held = pins.pin();
        for _ in 0..10 {
            let mut grace = pins.retire();
            let mut steps = 0;
            while !pins.observe(&mut grace) {
                // There is a pin at every moment.
                let next = pins.pin();
                held = next;
                steps += 1;
                assert!(steps < 5, "it never ends");
            }
        }
        drop(held);
        assert_eq!(pins.deferred(), 10);
    }

    #[test]
    fn many_graces_that_are_observed_in_turn_all_end_under_a_constant_stream() {
        let pins = Pins::new();
        let mut held = vec![pins.pin()];
        let mut graces: Vec<_> = Vec::new();
        for round in 0..1000 {
            held.push(pins.pin());
            if round < 900 {
                graces.push((round, pins.retire()));
            }
            graces.retain_mut(|(from, grace)| {
                let over = pins.observe(grace);
                assert!(over || round - *from < 10, "it never ends");
                !over
            });
            if held.len() > 2 {
                drop(held.remove(0));
            }
        }
        assert!(graces.is_empty());
    }

    #[test]
    fn a_wait_is_woken_by_the_last_unpin() {
        let pins = Pins::new();
        let pin = pins.pin();
        let mut wait = Box::pin(pins.wait(pins.retire()));
        assert!(wait.as_mut().now_or_never().is_none());
        assert_eq!(pins.deferred(), 1);
        let pin = on_thread(|| {
            let other = pins.pin();
            drop(pin);
            other
        });
        block_on(wait);
        drop(pin);
        assert!(!pins.shared().waited_for.load(Ordering::Relaxed));
    }

    #[test]
    fn a_wait_that_is_dropped_leaves_nothing_behind() {
        let pins = Pins::new();
        let pin = pins.pin();
        for _ in 0..100 {
            let mut wait = pins.wait(pins.retire());
            assert!((&mut wait).now_or_never().is_none());
            assert!((&mut wait).now_or_never().is_none());
        }
        assert!(pins.shared().phases.lock().waiting.is_empty());
        assert!(!pins.shared().waited_for.load(Ordering::Relaxed));
        drop(pin);
    }

    #[test]
    #[should_panic(expected = "where it was handed out")]
    fn a_grace_of_other_pins_is_refused() {
        let _ = Pins::new().observe(&mut Pins::new().retire());
    }

    #[test]
    fn disabled_pins_hold_nothing_back() {
        let pins = Pins::new_disabled_for_tests();
        let pin = pins.pin();
        assert!(pins.observe(&mut pins.retire()));
        assert_eq!(pins.active(), 1);
        drop(pin);
        assert_eq!(pins.active(), 0);
    }

    #[test]
    fn readers_never_see_what_was_recycled() {
        const CLUSTERS: usize = 4;
        let pins = Pins::new();
        // What each cluster holds, and which cluster is mapped.
        let contents: Vec<AtomicUsize> = (0..CLUSTERS).map(|_| AtomicUsize::new(0)).collect();
        let mapping = AtomicUsize::new(0);
        let stop = StdBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let pin = pins.pin();
                        let cluster = &contents[mapping.load(Ordering::Acquire)];
                        let first = cluster.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        assert_eq!(
                            cluster.load(Ordering::Relaxed),
                            first,
                            "recycled under a pin"
                        );
                        drop(pin);
                    }
                });
            }
            for round in 1..=if cfg!(miri) { 20 } else { 3000 } {
                // Linked after it was filled, unlinked, and filled with something else after its grace.
                let new = round % CLUSTERS;
                contents[new].store(round, Ordering::Relaxed);
                mapping.store(new, Ordering::Release);
                block_on(pins.wait(pins.retire()));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(pins.active(), 0);
    }
}
