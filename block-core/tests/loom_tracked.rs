//! The interleavings of small scenarios of the *shipped* overlap gate, by model checker.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p block-core --release --test loom_tracked`
#![cfg(loom)]

mod model;

use block_core::sync::set_thread_index;
use block_core::tracked::{PairEnd, Pending, RequestKind, Tracked, TrackedRange, Tracker};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use model::{block_on, model};
use std::future::Future;
use std::task::{Context, Waker};

const ALL: TrackedRange = TrackedRange::new(0, 10);
const LEFT: TrackedRange = TrackedRange::new(0, 4);
const RIGHT: TrackedRange = TrackedRange::new(6, 10);

fn plain(tracker: &Tracker, range: TrackedRange) -> Pending {
    tracker.begin(range, false, RequestKind::Write)
}

fn serialising(tracker: &Tracker, range: TrackedRange) -> Pending {
    tracker.begin(range, true, RequestKind::ZeroWrite)
}

/// A node, and what its data is. All accesses to the data are relaxed: the only order
/// there is comes from the gate, and loom hands out stale values where there is none.
struct Node {
    tracker: Tracker,
    serialising: AtomicUsize,
    plain: AtomicUsize,
    /// How often anything was written, by non-atomic increments.
    written: AtomicUsize,
}

impl Node {
    fn new() -> Arc<Self> {
        Self::with(Tracker::new())
    }

    fn with(tracker: Tracker) -> Arc<Self> {
        Arc::new(Self {
            tracker,
            serialising: AtomicUsize::new(0),
            plain: AtomicUsize::new(0),
            written: AtomicUsize::new(0),
        })
    }

    /// The I/O of a serialising request: nobody else is at it.
    fn alone(&self) {
        assert_eq!(
            self.plain.load(Ordering::Relaxed),
            0,
            "beside a plain request"
        );
        assert_eq!(
            self.serialising.swap(1, Ordering::Relaxed),
            0,
            "two at a time"
        );
        let written = self.written.load(Ordering::Relaxed);
        self.written.store(written + 1, Ordering::Relaxed);
        assert_eq!(
            self.plain.load(Ordering::Relaxed),
            0,
            "beside a plain request"
        );
        self.serialising.store(0, Ordering::Relaxed);
    }

    /// The I/O of a plain request: nobody serialising is at it.
    fn shared(&self) {
        self.plain.fetch_add(1, Ordering::Relaxed);
        assert_eq!(
            self.serialising.load(Ordering::Relaxed),
            0,
            "beside a serialising one"
        );
        self.plain.fetch_sub(1, Ordering::Relaxed);
    }

    fn assert_quiet(&self) {
        assert_eq!(self.tracker.in_flight(), 0);
        assert_eq!(self.tracker.watchers(), 0);
        assert!(!self.tracker.overlapping(TrackedRange::EVERYTHING));
    }
}

fn on_shard(shard: usize, work: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        set_thread_index(shard);
        work();
    })
}

fn plain_against_serialising(tracker: fn() -> Tracker, plain_shard: usize) {
    model(4, move || {
        let node = Node::with(tracker());
        // Both shards are alive, so that all of the visit is walked through.
        for shard in 0..2 {
            set_thread_index(shard);
            drop(block_on(plain(&node.tracker, ALL)));
        }
        let other = {
            let node = Arc::clone(&node);
            on_shard(plain_shard, move || {
                let tracked = block_on(plain(&node.tracker, ALL));
                node.shared();
                drop(tracked);
            })
        };
        set_thread_index(0);
        let tracked = block_on(serialising(&node.tracker, ALL));
        node.alone();
        drop(tracked);
        other.join().unwrap();
        node.assert_quiet();
    });
}

#[test]
fn a_plain_and_a_serialising_request_are_never_in_flight_together() {
    plain_against_serialising(Tracker::new, 1);
}

#[test]
fn nor_are_they_when_they_share_a_shard() {
    plain_against_serialising(Tracker::new, 0);
}

#[test]
fn without_the_gate_the_same_scenario_goes_wrong() {
    let wrong = std::panic::catch_unwind(|| {
        plain_against_serialising(Tracker::new_without_gate_for_tests, 1);
    });
    assert!(wrong.is_err(), "the scenario proves nothing");
}

#[test]
fn a_shard_that_comes_to_life_beside_a_serialising_request_sees_it() {
    model(4, || {
        let node = Node::new();
        let other = {
            let node = Arc::clone(&node);
            on_shard(1, move || {
                let tracked = block_on(plain(&node.tracker, ALL));
                node.shared();
                drop(tracked);
            })
        };
        let tracked = block_on(serialising(&node.tracker, ALL));
        node.alone();
        drop(tracked);
        other.join().unwrap();
        node.assert_quiet();
    });
}

#[test]
fn plain_requests_in_two_shards_are_both_waited_for() {
    model(3, || {
        let node = Node::new();
        let others: Vec<_> = (0..2)
            .map(|shard| {
                let node = Arc::clone(&node);
                on_shard(shard, move || {
                    let tracked = block_on(plain(&node.tracker, ALL));
                    node.shared();
                    drop(tracked);
                })
            })
            .collect();
        let tracked = block_on(serialising(&node.tracker, ALL));
        node.alone();
        drop(tracked);
        for other in others {
            other.join().unwrap();
        }
        node.assert_quiet();
    });
}

#[test]
fn serialising_requests_come_one_after_another() {
    model(3, || {
        let node = Node::new();
        let others: Vec<_> = (0..2)
            .map(|shard| {
                let node = Arc::clone(&node);
                on_shard(shard, move || {
                    let tracked = block_on(serialising(&node.tracker, ALL));
                    node.alone();
                    drop(tracked);
                })
            })
            .collect();
        let tracked = block_on(serialising(&node.tracker, LEFT));
        node.alone();
        drop(tracked);
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(
            node.written.load(Ordering::Relaxed),
            3,
            "one of them was overwritten"
        );
        node.assert_quiet();
    });
}

#[test]
fn an_owner_dropped_on_another_thread_wakes_who_waits() {
    model(4, || {
        let node = Node::new();
        let first = block_on(plain(&node.tracker, LEFT));
        set_thread_index(1);
        let second = block_on(plain(&node.tracker, RIGHT));
        let others = [first, second].map(|tracked| {
            let node = Arc::clone(&node);
            on_shard(1, move || {
                node.shared();
                drop(tracked);
            })
        });
        let tracked = block_on(serialising(&node.tracker, ALL));
        node.alone();
        drop(tracked);
        for other in others {
            other.join().unwrap();
        }
        node.assert_quiet();
    });
}

#[test]
fn a_dropped_waiter_leaves_no_trace_whatever_happens_at_that_moment() {
    model(4, || {
        let node = Node::new();
        let owner = block_on(plain(&node.tracker, ALL));
        let mut quitter = serialising(&node.tracker, ALL);
        let behind = plain(&node.tracker, LEFT);
        let owner = {
            let node = Arc::clone(&node);
            on_shard(1, move || {
                node.shared();
                drop(owner);
            })
        };
        let quitter = on_shard(1, move || {
            let mut cx = Context::from_waker(Waker::noop());
            let _ = std::pin::Pin::new(&mut quitter).poll(&mut cx);
            drop(quitter);
        });
        let behind = block_on(behind);
        node.shared();
        drop(behind);
        owner.join().unwrap();
        quitter.join().unwrap();
        node.assert_quiet();
    });
}

/// Drops a waiter while the first of two requests that it waits for ends.
fn drop_a_waiter_in_transit(first: (TrackedRange, bool), second: (TrackedRange, bool)) {
    model(4, move || {
        let node = Node::new();
        let begin = |(range, serialising)| {
            block_on(node.tracker.begin(range, serialising, RequestKind::Write))
        };
        let (first, second) = (begin(first), begin(second));
        let quitter = serialising(&node.tracker, ALL);
        assert_eq!(node.tracker.watchers(), 1);
        let owner = on_shard(1, move || drop(first));
        let quitter = on_shard(0, move || drop(quitter));
        owner.join().unwrap();
        quitter.join().unwrap();
        assert_eq!(
            node.tracker.watchers(),
            0,
            "the second one still has it in its list"
        );
        drop(second);
        drop(block_on(serialising(&node.tracker, ALL)));
        node.assert_quiet();
    });
}

#[test]
fn a_waiter_dropped_while_it_moves_on_between_serialising_requests_stays_nowhere() {
    drop_a_waiter_in_transit((LEFT, true), (RIGHT, true));
    drop_a_waiter_in_transit((RIGHT, true), (LEFT, true));
}

#[test]
fn a_waiter_dropped_while_it_moves_on_between_plain_requests_stays_nowhere() {
    drop_a_waiter_in_transit((LEFT, false), (RIGHT, false));
    drop_a_waiter_in_transit((RIGHT, false), (LEFT, false));
}

#[test]
fn a_waiter_dropped_while_it_moves_on_to_another_place_stays_nowhere() {
    drop_a_waiter_in_transit((LEFT, true), (RIGHT, false));
}

#[test]
fn a_queue_is_served_in_order() {
    model(3, || {
        let node = Node::new();
        let first = block_on(plain(&node.tracker, ALL));
        let second = serialising(&node.tracker, ALL);
        let third = plain(&node.tracker, ALL);
        let step = |node: &Arc<Node>, pending: Pending, turn: usize| {
            let node = Arc::clone(node);
            on_shard(turn % 2, move || {
                let tracked = block_on(pending);
                assert_eq!(node.written.load(Ordering::Relaxed), turn, "not its turn");
                node.written.store(turn + 1, Ordering::Relaxed);
                drop(tracked);
            })
        };
        let others = [step(&node, third, 2), step(&node, second, 1)];
        node.written.store(1, Ordering::Relaxed);
        drop(first);
        for other in others {
            other.join().unwrap();
        }
        node.assert_quiet();
    });
}

#[test]
fn a_request_that_begins_after_an_upgrade_waits_for_the_upgraded_one() {
    model(4, || {
        let node = Node::new();
        let mut old: Tracked = block_on(plain(&node.tracker, ALL));
        // Both shards are alive.
        set_thread_index(1);
        drop(block_on(plain(&node.tracker, ALL)));
        old.upgrade_to_serialising();
        let newer = {
            let node = Arc::clone(&node);
            on_shard(1, move || {
                let tracked = block_on(plain(&node.tracker, ALL));
                assert_eq!(
                    node.written.load(Ordering::Relaxed),
                    1,
                    "before the old one ended"
                );
                drop(tracked);
            })
        };
        // The old I/O is still going on.
        node.written.store(1, Ordering::Relaxed);
        drop(old);
        newer.join().unwrap();
        node.assert_quiet();
    });
}

#[test]
fn an_upgrade_beside_waiting_requests_strands_nobody() {
    model(4, || {
        let node = Node::new();
        let mut old = block_on(plain(&node.tracker, ALL));
        let waiting = {
            let node = Arc::clone(&node);
            on_shard(1, move || {
                let tracked = block_on(serialising(&node.tracker, ALL));
                node.alone();
                drop(tracked);
            })
        };
        node.plain.fetch_add(1, Ordering::Relaxed);
        old.upgrade_to_serialising();
        node.plain.fetch_sub(1, Ordering::Relaxed);
        drop(old);
        waiting.join().unwrap();
        node.assert_quiet();
    });
}

#[test]
fn a_refused_request_strands_nobody() {
    model(4, || {
        let node = Node::new();
        let owner = block_on(plain(&node.tracker, LEFT));
        let refused = {
            let node = Arc::clone(&node);
            on_shard(0, move || {
                if let Some(tracked) = node.tracker.try_begin(ALL, true, RequestKind::Write) {
                    node.alone();
                    drop(tracked);
                }
            })
        };
        let other = {
            let node = Arc::clone(&node);
            on_shard(1, move || {
                let tracked = block_on(plain(&node.tracker, RIGHT));
                node.shared();
                drop(tracked);
            })
        };
        drop(owner);
        refused.join().unwrap();
        other.join().unwrap();
        node.assert_quiet();
    });
}

fn copy(tracker: &Tracker, serialising: bool) -> PairEnd<'_> {
    PairEnd {
        tracker,
        range: ALL,
        serialising,
        kind: RequestKind::CopyRange,
    }
}

#[test]
fn copies_in_opposite_directions_do_not_lock_each_other_out() {
    model(4, || {
        let (one, two) = (Node::new(), Node::new());
        let other = {
            let (one, two) = (Arc::clone(&one), Arc::clone(&two));
            on_shard(1, move || {
                let (from, to) =
                    Tracker::begin_pair(copy(&two.tracker, false), copy(&one.tracker, true));
                let (from, to) = (block_on(from), block_on(to));
                two.shared();
                one.alone();
                drop((from, to));
            })
        };
        let (from, to) = Tracker::begin_pair(copy(&one.tracker, false), copy(&two.tracker, true));
        let (to, from) = (block_on(to), block_on(from));
        one.shared();
        two.alone();
        drop((from, to));
        other.join().unwrap();
        one.assert_quiet();
        two.assert_quiet();
    });
}

#[test]
fn copies_within_one_node_come_one_after_another() {
    model(4, || {
        let node = Node::new();
        let copy_once = |node: &Node| {
            let ends = (copy(&node.tracker, false), copy(&node.tracker, true));
            let (from, to) = Tracker::begin_pair(ends.0, ends.1);
            let (from, to) = (block_on(from), block_on(to));
            node.alone();
            drop((from, to));
        };
        let other = {
            let node = Arc::clone(&node);
            on_shard(1, move || copy_once(&node))
        };
        copy_once(&node);
        other.join().unwrap();
        assert_eq!(node.written.load(Ordering::Relaxed), 2);
        node.assert_quiet();
    });
}
