//! The gate's rules, one test each, and the gate against a naive model of them.

use std::future::Future;
use std::sync::Arc as StdArc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::task::{Context, Wake, Waker};

use futures::executor::block_on;
use proptest::prelude::*;

use super::*;
use crate::sync::set_thread_index;

const R: RequestKind = RequestKind::Read;
const W: RequestKind = RequestKind::Write;

fn range(start: u64, end: u64) -> TrackedRange {
    TrackedRange::new(start, end)
}

fn plain(tracker: &Tracker, start: u64, end: u64) -> Pending {
    tracker.begin(range(start, end), false, W)
}

fn serialising(tracker: &Tracker, start: u64, end: u64) -> Pending {
    tracker.begin(range(start, end), true, W)
}

fn ready(pending: Pending) -> Tracked {
    pending.into_ready().expect("it has nothing to wait for")
}

/// Counts how often it is woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: StdArc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll_once(pending: &mut Pending, woken: &StdArc<Woken>) -> bool {
    let waker = Waker::from(StdArc::clone(woken));
    Pin::new(pending)
        .poll(&mut Context::from_waker(&waker))
        .is_ready()
}

fn assert_quiet(tracker: &Tracker) {
    assert_eq!(tracker.in_flight(), 0);
    assert_eq!(tracker.watchers(), 0);
    assert!(!tracker.overlapping(TrackedRange::EVERYTHING));
}

#[test]
fn plain_requests_run_side_by_side_whatever_they_overlap() {
    let tracker = Tracker::new();
    let all: Vec<_> = (0..10).map(|_| ready(plain(&tracker, 0, 4096))).collect();
    assert_eq!(tracker.in_flight(), 10);
    assert_eq!(tracker.waits(), 0);
    drop(all);
    assert_quiet(&tracker);
}

#[test]
fn a_serialising_request_waits_for_every_overlapping_one_before_it() {
    let tracker = Tracker::new();
    let a = ready(plain(&tracker, 0, 100));
    set_thread_index(1);
    let b = ready(plain(&tracker, 99, 200));
    let c = ready(serialising(&tracker, 200, 300));
    let next_door = ready(plain(&tracker, 300, 400));
    let pending = serialising(&tracker, 50, 300);
    drop(b);
    assert!(!pending.is_ready());
    drop(c);
    assert!(!pending.is_ready());
    drop(a);
    assert!(pending.is_ready());
    drop((pending, next_door));
    assert_eq!(tracker.waits_of(W), 1);
    assert_quiet(&tracker);
}

#[test]
fn a_plain_request_waits_for_overlapping_serialising_ones_only() {
    let tracker = Tracker::new();
    let s = ready(serialising(&tracker, 100, 200));
    assert!(
        plain(&tracker, 0, 100).is_ready(),
        "it ends where the other begins"
    );
    assert!(plain(&tracker, 200, 300).is_ready());
    let inside = plain(&tracker, 199, 200);
    assert!(!inside.is_ready());
    drop(s);
    assert!(inside.is_ready());
}

#[test]
fn a_request_never_waits_for_one_that_began_after_it() {
    let tracker = Tracker::new();
    let first = ready(plain(&tracker, 0, 10));
    let second = serialising(&tracker, 0, 10);
    let third = plain(&tracker, 0, 10);
    let fourth = serialising(&tracker, 0, 10);
    assert!(!second.is_ready() && !third.is_ready() && !fourth.is_ready());
    drop(first);
    let second = ready(second);
    assert!(!third.is_ready() && !fourth.is_ready());
    drop(second);
    let third = ready(third);
    assert!(!fourth.is_ready());
    drop(third);
    drop(ready(fourth));
    assert_quiet(&tracker);
}

#[test]
fn a_shard_that_comes_to_life_late_sees_what_is_in_flight_already() {
    let tracker = Tracker::new();
    set_thread_index(0);
    let s = ready(serialising(&tracker, 0, 10));
    let waiting = serialising(&tracker, 5, 20);
    set_thread_index(7);
    let p = plain(&tracker, 15, 16);
    assert!(!p.is_ready());
    assert!(plain(&tracker, 20, 21).is_ready());
    drop(s);
    assert!(waiting.is_ready() && !p.is_ready());
    drop(waiting);
    assert!(p.is_ready());
}

#[test]
fn empty_ranges_are_tracked_and_in_nobodys_way() {
    let tracker = Tracker::new();
    let mut empty = ready(serialising(&tracker, 50, 50));
    assert!(empty.is_serialising());
    assert_eq!(tracker.in_flight(), 1);
    let around = ready(serialising(&tracker, 0, 100));
    assert!(plain(&tracker, 70, 70).is_ready());
    assert!(serialising(&tracker, 0, 0).is_ready());
    let mut plain_empty = ready(plain(&tracker, 60, 60));
    plain_empty.upgrade_to_serialising();
    empty.upgrade_to_serialising();
    drop((empty, plain_empty, around));
    assert_quiet(&tracker);
}

#[test]
fn a_truncation_reaches_to_infinity() {
    let tracker = Tracker::new();
    let write = ready(plain(&tracker, u64::MAX - 1, u64::MAX));
    let truncate = tracker.begin(
        TrackedRange::from_start(1 << 40),
        true,
        RequestKind::Truncate,
    );
    assert!(!truncate.is_ready());
    assert!(plain(&tracker, 0, 1 << 40).is_ready());
    assert!(!plain(&tracker, (1 << 40) - 1, (1 << 40) + 1).is_ready());
    drop(write);
    let truncate = ready(truncate);
    assert_eq!(truncate.range().to_string(), "[0x10000000000, end)");
    assert!(
        !tracker
            .begin(TrackedRange::from_len(u64::MAX - 5, 100), false, W)
            .is_ready()
    );
}

#[test]
fn a_waiter_is_woken_once_it_has_nothing_left_to_wait_for_and_not_before() {
    let tracker = Tracker::new();
    let blockers: Vec<_> = (0..5)
        .map(|n| {
            set_thread_index(n % 3);
            ready(plain(&tracker, 0, 10))
        })
        .collect();
    let woken = StdArc::new(Woken::default());
    let mut pending = serialising(&tracker, 0, 10);
    assert!(!poll_once(&mut pending, &woken));
    for blocker in blockers {
        assert_eq!(woken.0.load(Ordering::SeqCst), 0);
        drop(blocker);
    }
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    assert!(poll_once(&mut pending, &woken));
    assert_quiet(&tracker);
}

#[test]
fn a_waiter_wakes_the_task_that_polled_it_last() {
    let tracker = Tracker::new();
    let blocker = ready(serialising(&tracker, 0, 10));
    let (old, new) = (StdArc::new(Woken::default()), StdArc::new(Woken::default()));
    let mut pending = plain(&tracker, 0, 10);
    assert!(!poll_once(&mut pending, &old));
    assert!(!poll_once(&mut pending, &new));
    drop(blocker);
    assert_eq!(old.0.load(Ordering::SeqCst), 0);
    assert_eq!(new.0.load(Ordering::SeqCst), 1);
}

#[test]
fn a_dropped_waiter_leaves_no_trace_and_lets_those_behind_it_go_on() {
    let tracker = Tracker::new();
    let first = ready(plain(&tracker, 0, 10));
    let second = serialising(&tracker, 0, 100);
    let third = plain(&tracker, 50, 60);
    let fourth = serialising(&tracker, 5, 6);
    assert!(!third.is_ready());
    drop(second);
    assert!(third.is_ready(), "it waited for the one that has gone only");
    assert!(!fourth.is_ready(), "it still has to wait for the first");
    drop(first);
    assert!(fourth.is_ready());
    drop((third, fourth));
    assert_quiet(&tracker);
}

#[test]
fn waiters_dropped_again_and_again_behind_one_request_do_not_pile_up() {
    let tracker = Tracker::new();
    let p = ready(plain(&tracker, 0, 10));
    let s = ready(serialising(&tracker, 20, 30));
    for _ in 0..1000 {
        let behind_plain = serialising(&tracker, 0, 10);
        let behind_both = serialising(&tracker, 0, 30);
        let behind_all = plain(&tracker, 0, 30);
        assert!(!behind_plain.is_ready() && !behind_both.is_ready() && !behind_all.is_ready());
        assert_eq!(tracker.watchers(), 3, "each waiter is in one list");
    }
    assert_eq!(tracker.watchers(), 0);
    assert_eq!(tracker.in_flight(), 2);
    drop((p, s));
    assert_quiet(&tracker);
}

#[test]
fn a_long_queue_on_one_range_is_served_in_order() {
    let tracker = Tracker::new();
    let mut queue: std::collections::VecDeque<_> = (0..300)
        .map(|n| {
            set_thread_index(n);
            serialising(&tracker, 0, 10)
        })
        .collect();
    assert_eq!(tracker.watchers(), 299);
    while let Some(head) = queue.pop_front() {
        let head = ready(head);
        assert!(queue.iter().all(|behind| !behind.is_ready()));
        drop(head);
    }
    assert_eq!(tracker.waits(), 299);
    assert_quiet(&tracker);
}

#[test]
fn an_owner_may_be_dropped_on_another_thread_and_after_its_tracker() {
    let tracker = Tracker::new();
    let p = ready(plain(&tracker, 0, 10));
    let pending = serialising(&tracker, 0, 10);
    drop(tracker);
    std::thread::spawn(move || drop(p))
        .join()
        .expect("the thread panicked");
    let s = block_on(pending);
    std::thread::spawn(move || drop(s))
        .join()
        .expect("the thread panicked");
}

#[test]
fn an_upgraded_request_stands_in_the_way_of_all_that_begin_later() {
    let tracker = Tracker::new();
    let mut old = ready(plain(&tracker, 0, 100));
    let beside = ready(plain(&tracker, 0, 100));
    let waiting = serialising(&tracker, 0, 10);
    old.upgrade_to_serialising();
    old.upgrade_to_serialising();
    assert!(old.is_serialising());
    assert_eq!(tracker.in_flight(), 3, "it counts once");
    assert!(!plain(&tracker, 99, 100).is_ready());
    assert!(!serialising(&tracker, 50, 60).is_ready());
    assert!(plain(&tracker, 100, 110).is_ready());
    drop(beside);
    assert!(
        !waiting.is_ready(),
        "it began before the upgrade, and still waits"
    );
    let later = plain(&tracker, 50, 60);
    drop(old);
    assert!(later.is_ready());
    assert!(waiting.is_ready());
    drop((later, waiting));
    assert_quiet(&tracker);
}

#[test]
fn an_upgrade_waits_for_nothing_even_inside_what_others_hold() {
    let tracker = Tracker::new();
    let mut one = ready(plain(&tracker, 0, 10));
    let mut other = ready(plain(&tracker, 0, 10));
    one.upgrade_to_serialising();
    other.upgrade_to_serialising();
    let after = serialising(&tracker, 0, 10);
    drop(one);
    assert!(!after.is_ready());
    drop(other);
    assert!(after.is_ready());
}

#[test]
fn releasing_the_front_lets_go_who_waited_for_that_only() {
    let tracker = Tracker::new();
    for serial in [false, true] {
        for upgraded in [false, true] {
            let mut long = ready(tracker.begin(range(0, 100), serial, W));
            if upgraded {
                long.upgrade_to_serialising();
            }
            let front = serialising(&tracker, 0, 40);
            let back = serialising(&tracker, 60, 70);
            long.release_front(0);
            assert!(!front.is_ready());
            long.release_front(39);
            assert!(!front.is_ready());
            long.release_front(40);
            assert!(front.is_ready() && !back.is_ready());
            assert_eq!(long.range(), range(40, 100));
            assert!(serialising(&tracker, 40, 41).into_ready().is_err());
            long.release_front(1000);
            assert!(back.is_ready());
            assert!(long.range().is_empty());
            drop((long, front, back));
            assert_quiet(&tracker);
        }
    }
}

#[test]
fn a_request_that_may_not_wait_is_refused_and_leaves_no_trace() {
    let tracker = Tracker::new();
    set_thread_index(0);
    let p = ready(plain(&tracker, 0, 10));
    set_thread_index(3);
    let elsewhere = ready(plain(&tracker, 1000, 1010));
    assert!(tracker.try_begin(range(5, 6), true, W).is_none());
    assert!(
        plain(&tracker, 5, 6).is_ready(),
        "nothing serialising is left behind"
    );
    assert_eq!(tracker.in_flight(), 2);
    let s = tracker
        .try_begin(range(20, 30), true, W)
        .expect("nothing is there");
    assert!(tracker.try_begin(range(25, 26), false, R).is_none());
    assert!(tracker.try_begin(range(25, 26), true, R).is_none());
    assert!(tracker.try_begin(range(30, 31), false, R).is_some());
    assert_eq!(tracker.waits(), 0);
    drop((p, s, elsewhere));
    assert_quiet(&tracker);
}

fn end(tracker: &Tracker, range: TrackedRange, serialising: bool) -> PairEnd<'_> {
    PairEnd {
        tracker,
        range,
        serialising,
        kind: RequestKind::CopyRange,
    }
}

#[test]
fn the_two_ends_of_a_pair_never_wait_for_each_other() {
    for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
        let tracker = Tracker::new();
        let (a, b) = Tracker::begin_pair(
            end(&tracker, range(0, 10), first),
            end(&tracker, range(5, 15), second),
        );
        assert!(a.is_ready() && b.is_ready());
        let serial = serialising(&tracker, 0, 20);
        drop(a);
        assert!(!serial.is_ready());
        drop(b);
        assert!(serial.is_ready());
        drop(serial);
        assert_quiet(&tracker);
    }
}

#[test]
fn two_pairs_in_opposite_directions_do_not_wait_crosswise() {
    let (left, right) = (Tracker::new(), Tracker::new());
    let all = range(0, 10);
    let (a1, a2) = Tracker::begin_pair(end(&left, all, true), end(&right, all, true));
    let (b1, b2) = Tracker::begin_pair(end(&right, all, true), end(&left, all, true));
    assert!(a1.is_ready() && a2.is_ready());
    assert!(!b1.is_ready() && !b2.is_ready());
    drop((a1, a2));
    assert!(b1.is_ready() && b2.is_ready());
    drop((b1, b2));
    assert_quiet(&left);
    assert_quiet(&right);
}

#[test]
fn a_pair_on_one_node_waits_and_is_waited_for_like_any_request() {
    let tracker = Tracker::new();
    let before = ready(serialising(&tracker, 0, 10));
    let (from, to) = Tracker::begin_pair(
        end(&tracker, range(5, 15), false),
        end(&tracker, range(12, 22), true),
    );
    assert!(!from.is_ready() && to.is_ready());
    let after = plain(&tracker, 20, 30);
    assert!(!after.is_ready());
    drop(before);
    assert!(from.is_ready());
    drop(to);
    assert!(after.is_ready());
    drop((from, after));
    assert_quiet(&tracker);
}

#[test]
fn without_the_gate_everything_is_tracked_and_nothing_waits() {
    let tracker = Tracker::new_without_gate_for_tests();
    let a = ready(serialising(&tracker, 0, 10));
    let b = ready(serialising(&tracker, 0, 10));
    let c = ready(plain(&tracker, 0, 10));
    let d = tracker
        .try_begin(range(0, 10), true, W)
        .expect("nothing is refused");
    assert_eq!(tracker.in_flight(), 4);
    assert_eq!(tracker.waits(), 0);
    assert!(tracker.overlapping(range(9, 10)));
    drop((a, b, c, d));
    assert_quiet(&tracker);
}

#[test]
fn waits_are_counted_by_kind_and_ids_are_unique() {
    let tracker = Tracker::new();
    let s = ready(tracker.begin(range(0, 10), true, RequestKind::ZeroWrite));
    let read = tracker.begin(range(0, 10), false, R);
    let discard = tracker.begin(range(0, 10), true, RequestKind::Discard);
    assert_eq!(tracker.waits_of(R), 1);
    assert_eq!(tracker.waits_of(RequestKind::Discard), 1);
    assert_eq!(tracker.waits_of(RequestKind::ZeroWrite), 0);
    assert_eq!(tracker.waits(), 2);
    let ids = [Some(s.id()), read.id(), discard.id()];
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
    assert_eq!(s.kind(), RequestKind::ZeroWrite);
    drop((s, read));
    assert_eq!(block_on(discard).kind(), RequestKind::Discard);
}

#[test]
fn futures_and_tickets_can_be_sent_anywhere() {
    fn anywhere<T: Send + Sync + 'static>() {}
    anywhere::<Tracker>();
    anywhere::<Pending>();
    anywhere::<Tracked>();
}

/// What the gate ought to do, in the most literal way.
struct Naive {
    range: TrackedRange,
    serialising: bool,
    upgraded: Option<usize>,
    /// Two ends of a pair have the same.
    began: usize,
    request: Option<Either>,
}

enum Either {
    Pending(Pending),
    Tracked(Tracked),
}

impl Naive {
    fn waits_for(&self, other: &Self) -> bool {
        if !self.range.overlaps(other.range) || other.request.is_none() || self.began == other.began
        {
            return false;
        }
        other.began < self.began
            && (self.serialising
                || other.serialising
                || other.upgraded.is_some_and(|upgraded| upgraded < self.began))
    }
}

#[derive(Debug, Clone)]
enum Op {
    Begin {
        range: TrackedRange,
        serialising: bool,
        shard: usize,
        refuse: bool,
    },
    Pair {
        a: (TrackedRange, bool),
        b: (TrackedRange, bool),
        shard: usize,
    },
    End(usize),
    Upgrade(usize),
    ReleaseFront(usize, u64),
    Poll(usize),
}

fn any_range() -> impl Strategy<Value = TrackedRange> {
    prop_oneof![
        8 => (0u64..64, 0u64..12).prop_map(|(start, len)| range(start, start + len)),
        1 => (0u64..64).prop_map(TrackedRange::from_start),
    ]
}

fn any_op() -> impl Strategy<Value = Op> {
    let serialising = || proptest::bool::weighted(0.4);
    prop_oneof![
        10 => (any_range(), serialising(), 0usize..4, proptest::bool::weighted(0.2)).prop_map(
            |(range, serialising, shard, refuse)| Op::Begin { range, serialising, shard, refuse }
        ),
        1 => ((any_range(), serialising()), (any_range(), serialising()), 0usize..4)
            .prop_map(|(a, b, shard)| Op::Pair { a, b, shard }),
        8 => any::<usize>().prop_map(Op::End),
        1 => any::<usize>().prop_map(Op::Upgrade),
        1 => (any::<usize>(), 0u64..80).prop_map(|(which, to)| Op::ReleaseFront(which, to)),
        4 => any::<usize>().prop_map(Op::Poll),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_gate_does_what_a_naive_model_of_its_rules_says(
        ops in proptest::collection::vec(any_op(), 1..120)
    ) {
        let tracker = Tracker::new();
        let mut model: Vec<Naive> = Vec::new();
        for (now, op) in ops.into_iter().enumerate() {
            let alive: Vec<usize> =
                (0..model.len()).filter(|&i| model[i].request.is_some()).collect();
            let pick = |which: usize| (!alive.is_empty()).then(|| alive[which % alive.len()]);
            let enter = |range, serialising, request| Naive {
                range, serialising, upgraded: None, began: now, request,
            };
            match op {
                Op::Begin { range, serialising, shard, refuse } => {
                    set_thread_index(shard);
                    if refuse {
                        let tracked = tracker.try_begin(range, serialising, W);
                        let candidate = enter(range, serialising, None);
                        let expected = !model.iter().any(|other| candidate.waits_for(other));
                        prop_assert_eq!(tracked.is_some(), expected);
                        let request = tracked.map(Either::Tracked);
                        model.push(Naive { request, ..candidate });
                    } else {
                        let pending = tracker.begin(range, serialising, W);
                        model.push(enter(range, serialising, Some(Either::Pending(pending))));
                    }
                }
                Op::Pair { a, b, shard } => {
                    set_thread_index(shard);
                    let (first, second) =
                        Tracker::begin_pair(end(&tracker, a.0, a.1), end(&tracker, b.0, b.1));
                    model.push(enter(a.0, a.1, Some(Either::Pending(first))));
                    model.push(enter(b.0, b.1, Some(Either::Pending(second))));
                }
                Op::End(which) => {
                    if let Some(which) = pick(which) {
                        model[which].request = None;
                    }
                }
                Op::Upgrade(which) => {
                    if let Some(entry) = pick(which).map(|which| &mut model[which])
                        && let Some(Either::Tracked(tracked)) = &mut entry.request
                    {
                        tracked.upgrade_to_serialising();
                        entry.upgraded.get_or_insert(now);
                    }
                }
                Op::ReleaseFront(which, to) => {
                    if let Some(entry) = pick(which).map(|which| &mut model[which])
                        && let Some(Either::Tracked(tracked)) = &mut entry.request
                    {
                        tracked.release_front(to);
                        entry.range = tracked.range();
                    }
                }
                Op::Poll(which) => {
                    if let Some(which) = pick(which) {
                        let request = match model[which].request.take() {
                            Some(Either::Pending(pending)) => match pending.into_ready() {
                                Ok(tracked) => Some(Either::Tracked(tracked)),
                                Err(pending) => Some(Either::Pending(pending)),
                            },
                            other => other,
                        };
                        model[which].request = request;
                    }
                }
            }
            let mut in_flight = 0;
            for entry in &model {
                let blocked = model.iter().any(|other| entry.waits_for(other));
                match &entry.request {
                    Some(Either::Pending(pending)) => {
                        in_flight += 1;
                        prop_assert_eq!(pending.is_ready(), !blocked);
                    }
                    Some(Either::Tracked(_)) => {
                        in_flight += 1;
                        prop_assert!(!blocked);
                    }
                    None => {}
                }
            }
            prop_assert_eq!(tracker.in_flight(), in_flight);
            prop_assert!(tracker.watchers() <= in_flight);
        }
        drop(model);
        assert_quiet(&tracker);
    }
}

#[test]
fn many_threads_never_meet_inside_a_serialising_request() {
    const BLOCKS: u64 = 8;
    const THREADS: usize = 6;
    let rounds = if cfg!(miri) { 20 } else { 3000 };
    let trackers = [Tracker::new(), Tracker::new()];
    // By tracker and block: how many plain requests are inside, or -1 for a serialising one.
    let inside: [[AtomicI64; BLOCKS as usize]; 2] = Default::default();
    let enter = |node: usize, tracked: &Tracked| {
        for block in tracked.range().start()..tracked.range().end() {
            let cell = &inside[node][block as usize];
            if tracked.is_serialising() {
                assert_eq!(cell.swap(-1, Ordering::Relaxed), 0, "not alone");
            } else {
                assert!(
                    cell.fetch_add(1, Ordering::Relaxed) >= 0,
                    "beside a serialising one"
                );
            }
        }
    };
    let leave = |node: usize, tracked: Tracked| {
        for block in tracked.range().start()..tracked.range().end() {
            let cell = &inside[node][block as usize];
            if tracked.is_serialising() {
                assert_eq!(cell.swap(0, Ordering::Relaxed), -1, "not alone");
            } else {
                assert!(
                    cell.fetch_sub(1, Ordering::Relaxed) > 0,
                    "beside a serialising one"
                );
            }
        }
        drop(tracked);
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (trackers, enter, leave) = (&trackers, &enter, &leave);
            scope.spawn(move || {
                let mut seed = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(thread as u64 + 1);
                let mut random = |below: u64| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    (seed >> 11) % below
                };
                for _ in 0..rounds {
                    let mut any = || {
                        let start = random(BLOCKS);
                        (
                            range(start, start + 1 + random(BLOCKS - start)),
                            random(3) == 0,
                        )
                    };
                    let (one, other) = (any(), any());
                    let node = random(2) as usize;
                    match random(8) {
                        0 => {
                            // Copies in either direction.
                            let (a, b) = Tracker::begin_pair(
                                end(&trackers[node], one.0, one.1),
                                end(&trackers[1 - node], other.0, other.1),
                            );
                            let (a, b) = block_on(futures::future::join(a, b));
                            enter(node, &a);
                            enter(1 - node, &b);
                            leave(node, a);
                            leave(1 - node, b);
                        }
                        1 => {
                            // Gives up, perhaps while it is being served.
                            let mut pending = trackers[node].begin(one.0, one.1, W);
                            let _ = poll_once(&mut pending, &StdArc::default());
                            drop(pending);
                        }
                        2 => {
                            if let Some(tracked) = trackers[node].try_begin(one.0, one.1, W) {
                                enter(node, &tracked);
                                leave(node, tracked);
                            }
                        }
                        _ => {
                            let tracked = block_on(trackers[node].begin(one.0, one.1, W));
                            enter(node, &tracked);
                            if random(4) == 0 {
                                std::thread::yield_now();
                            }
                            leave(node, tracked);
                        }
                    }
                }
            });
        }
    });
    for tracker in &trackers {
        assert_quiet(tracker);
        assert!(
            cfg!(miri) || tracker.waits() > 0,
            "the threads did not meet at all"
        );
    }
}

#[test]
fn an_upgrade_races_with_nobody() {
    let tracker = Tracker::new();
    let old_is_in_flight = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rounds = if cfg!(miri) { 10 } else { 2000 };
        for _ in 0..rounds {
            let mut old = block_on(plain(&tracker, 0, 10));
            old_is_in_flight.store(true, Ordering::Relaxed);
            old.upgrade_to_serialising();
            let newer = scope.spawn(|| {
                let new = block_on(plain(&tracker, 0, 10));
                assert!(
                    !old_is_in_flight.load(Ordering::Relaxed),
                    "on top of a cancelled one"
                );
                drop(new);
            });
            std::thread::yield_now();
            old_is_in_flight.store(false, Ordering::Relaxed);
            drop(old);
            newer.join().expect("the thread panicked");
        }
    });
    assert_quiet(&tracker);
}
