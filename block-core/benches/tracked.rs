//! What it costs to begin and end an uncontended request.
//!
//! `cargo bench -p block-core --bench tracked`
//!
//! The time of one request is *processor time per request*: with `t` threads that each do `n` requests, and
//! `c` processors, it is `elapsed × min(t, c) / (t × n)`. Threads that shared nothing would show the same
//! number whatever `t` is; what is above that is the price of sharing.
//!
//! Three shapes:
//! * `on top`: so many requests are in flight and stay so, one more begins and ends;
//! * `churn`: so many are in flight in a ring, the oldest ends and a new one elsewhere begins;
//! * `serialising`: like `on top`, but the one more is serialising.

#![allow(missing_docs)]

use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use block_core::tracked::{RequestKind, Tracked, TrackedRange, Tracker};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

const BLOCK: u64 = 4096;

/// A cheap source of scattered block numbers.
struct Scatter(u64);

impl Scatter {
    /// A 4 KiB block in this thread's own terabyte, aligned as guests align them.
    fn next(&mut self, thread: usize) -> TrackedRange {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let block = (self.0 >> 20) % (1 << 28);
        TrackedRange::from_len(((thread as u64) << 40) + block * BLOCK, BLOCK)
    }
}

fn begin(tracker: &Tracker, range: TrackedRange, serialising: bool) -> Tracked {
    let pending = tracker.begin(range, serialising, RequestKind::Write);
    pending
        .into_ready()
        .expect("the benchmark's requests are not in each other's way")
}

/// Runs `work(thread, count, start)`, which prepares itself, calls `start`, and does `count` requests, on all
/// threads at once, and returns what criterion is to divide by `total`.
fn measure(
    threads: usize,
    total: u64,
    work: impl Fn(usize, u64, &dyn Fn()) -> Instant + Sync,
) -> Duration {
    let per_thread = total.div_ceil(threads as u64).max(1);
    let barrier = Barrier::new(threads);
    // The threads read the clock themselves: with fewer processors than threads, whoever waits for them
    // may be the last to run.
    let started = Mutex::new(None::<Instant>);
    let start = || {
        barrier.wait();
        let now = Instant::now();
        let mut started = started.lock().expect("a benchmark thread panicked");
        *started = Some(started.map_or(now, |earlier| earlier.min(now)));
    };
    let ended = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let (work, start) = (&work, &start);
                scope.spawn(move || work(thread, per_thread, start))
            })
            .collect();
        let ends = handles
            .into_iter()
            .map(|h| h.join().expect("a benchmark thread panicked"));
        ends.max().expect("there is a thread")
    });
    let started = started.into_inner().expect("a benchmark thread panicked");
    let elapsed = ended - started.expect("every thread starts");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let processors = threads.min(cores) as f64;
    elapsed.mul_f64(processors * total as f64 / (per_thread * threads as u64) as f64)
}

fn on_top(threads: usize, in_flight: usize, serialising: bool, total: u64) -> Duration {
    let tracker = Tracker::new();
    measure(threads, total, |thread, count, start| {
        let mut scatter = Scatter(0x9E37_79B9_7F4A_7C15 + thread as u64);
        // Those that stay are in the threads' second halves, out of the way of the serialising ones.
        let stay: Vec<_> = (1..in_flight / threads)
            .map(|n| begin(&tracker, scatter.next(thread + threads + n % 2), false))
            .collect();
        start();
        for _ in 0..count {
            drop(begin(&tracker, scatter.next(thread), serialising));
        }
        let ended = Instant::now();
        drop(stay);
        ended
    })
}

fn churn(threads: usize, in_flight: usize, total: u64) -> Duration {
    let tracker = Tracker::new();
    measure(threads, total, |thread, count, start| {
        let mut scatter = Scatter(0x9E37_79B9_7F4A_7C15 + thread as u64);
        let mut ring: Vec<_> = (0..(in_flight / threads).max(1))
            .map(|_| Some(begin(&tracker, scatter.next(thread), false)))
            .collect();
        start();
        let mut at = 0;
        for _ in 0..count {
            ring[at] = None;
            ring[at] = Some(begin(&tracker, scatter.next(thread), false));
            at += 1;
            if at == ring.len() {
                at = 0;
            }
        }
        Instant::now()
    })
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("begin and end");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    for threads in [1, 2, 16] {
        for in_flight in [1, 4096] {
            let id = |shape| {
                BenchmarkId::new(shape, format!("{in_flight} in flight, {threads} threads"))
            };
            group.bench_function(id("on top"), |b| {
                b.iter_custom(|n| on_top(threads, in_flight, false, n));
            });
            group.bench_function(id("churn"), |b| {
                b.iter_custom(|n| churn(threads, in_flight, n));
            });
            group.bench_function(id("serialising"), |b| {
                b.iter_custom(|n| on_top(threads, in_flight, true, n));
            });
        }
    }
    group.finish();
}

criterion_group!(tracked, benches);
criterion_main!(tracked);
