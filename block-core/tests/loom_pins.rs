//! The interleavings of small scenarios of the *shipped* pins, by model checker.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p block-core --release --test loom_pins`
#![cfg(loom)]

mod model;

use block_core::pins::{Grace, Pins};
use block_core::sync::set_thread_index;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use model::{block_on, model};
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

const FRESH: usize = 7;
const RECYCLED: usize = 99;
const NONE: usize = usize::MAX;

/// An image with two clusters, of which one is mapped.
struct Image {
    pins: Pins,
    mapping: AtomicUsize,
    contents: [AtomicUsize; 2],
    /// Counts what readers did; written and read without any ordering of its own.
    marks: [AtomicUsize; 2],
}

impl Image {
    fn new(pins: Pins) -> Arc<Self> {
        Arc::new(Self {
            pins,
            mapping: AtomicUsize::new(0),
            contents: [AtomicUsize::new(FRESH), AtomicUsize::new(FRESH)],
            marks: [AtomicUsize::new(0), AtomicUsize::new(0)],
        })
    }

    /// Pins, loads the mapping, uses the cluster.
    fn read(&self) {
        let pin = self.pins.pin();
        let cluster = self.mapping.load(Ordering::Relaxed);
        if cluster != NONE {
            assert_eq!(
                self.contents[cluster].load(Ordering::Relaxed),
                FRESH,
                "recycled"
            );
            self.marks[cluster].store(1, Ordering::Relaxed);
            // Still the same: the cluster was not recycled while it was in use.
            assert_eq!(
                self.contents[cluster].load(Ordering::Relaxed),
                FRESH,
                "recycled"
            );
        }
        drop(pin);
    }

    fn unlink(&self, to: usize) -> (usize, Grace) {
        let old = self.mapping.swap(to, Ordering::Relaxed);
        (old, self.pins.retire())
    }

    fn recycle(&self, cluster: usize) {
        if cluster != NONE {
            // The marks of readers are seen at once and do not turn up later.
            let mark = self.marks[cluster].load(Ordering::Relaxed);
            self.contents[cluster].store(RECYCLED, Ordering::Relaxed);
            assert_eq!(
                self.marks[cluster].load(Ordering::Relaxed),
                mark,
                "still in use"
            );
        }
    }
}

#[test]
fn a_reader_never_sees_a_recycled_cluster() {
    model(4, || {
        let image = Image::new(Pins::new());
        let reader = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                set_thread_index(1);
                image.read();
            })
        };
        let (old, grace) = image.unlink(NONE);
        block_on(image.pins.wait(grace));
        image.recycle(old);
        reader.join().unwrap();
        assert_eq!(image.pins.active(), 0);
    });
}

#[test]
fn without_pins_the_same_scenario_goes_wrong() {
    let wrong = std::panic::catch_unwind(|| {
        model(4, || {
            let image = Image::new(Pins::new_disabled_for_tests());
            let reader = {
                let image = Arc::clone(&image);
                thread::spawn(move || image.read())
            };
            let (old, grace) = image.unlink(NONE);
            block_on(image.pins.wait(grace));
            image.recycle(old);
            reader.join().unwrap();
        });
    });
    assert!(wrong.is_err(), "the scenario proves nothing");
}

#[test]
fn readers_in_two_shards_are_both_waited_for() {
    model(3, || {
        let image = Image::new(Pins::new());
        let readers: Vec<_> = (0..2)
            .map(|shard| {
                let image = Arc::clone(&image);
                thread::spawn(move || {
                    set_thread_index(shard);
                    image.read();
                })
            })
            .collect();
        let (old, grace) = image.unlink(NONE);
        block_on(image.pins.wait(grace));
        image.recycle(old);
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn a_reader_that_reads_again_and_again_neither_sees_nor_delays_anything() {
    model(3, || {
        let image = Image::new(Pins::new());
        let reader = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                set_thread_index(1);
                // Overlapping, so that there is no moment without a pin.
                let first = image.pins.pin();
                let second = image.pins.pin();
                drop(first);
                image.read();
                drop(second);
            })
        };
        let (old, grace) = image.unlink(1);
        block_on(image.pins.wait(grace));
        image.recycle(old);
        reader.join().unwrap();
    });
}

#[test]
fn a_reader_that_was_slow_to_pin_is_waited_for_too() {
    model(3, || {
        let image = Image::new(Pins::new());
        let reader = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                set_thread_index(1);
                image.read();
            })
        };
        // An earlier grace sends new pins elsewhere; the reader may have chosen its counter before that.
        let pin = image.pins.pin();
        let mut earlier = image.pins.retire();
        image.pins.observe(&mut earlier);
        drop(pin);
        image.pins.observe(&mut earlier);
        let (old, grace) = image.unlink(NONE);
        block_on(image.pins.wait(grace));
        image.recycle(old);
        reader.join().unwrap();
    });
}

#[test]
fn two_freers_do_not_stand_in_each_others_way() {
    model(3, || {
        let image = Image::new(Pins::new());
        let reader = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                set_thread_index(1);
                image.read();
            })
        };
        let freer = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                let (old, grace) = image.unlink(NONE);
                block_on(image.pins.wait(grace));
                image.recycle(old);
            })
        };
        // Whichever comes first finds cluster 0, the other one 1 or nothing.
        let (old, grace) = image.unlink(1);
        block_on(image.pins.wait(grace));
        image.recycle(old);
        freer.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn a_wait_that_is_given_up_does_not_strand_another_one() {
    model(3, || {
        let image = Image::new(Pins::new());
        let pin = image.pins.pin();
        let holder = thread::spawn(move || drop(pin));
        let (_, grace) = image.unlink(1);
        let quitter = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                let mut wait = pin!(image.pins.wait(image.pins.retire()));
                let _ = wait.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            })
        };
        block_on(image.pins.wait(grace));
        holder.join().unwrap();
        quitter.join().unwrap();
    });
}

#[test]
fn observing_finds_the_end_without_waiting() {
    model(4, || {
        let image = Image::new(Pins::new());
        let reader = {
            let image = Arc::clone(&image);
            thread::spawn(move || {
                set_thread_index(1);
                image.read();
                image.read();
            })
        };
        let (old, mut grace) = image.unlink(NONE);
        let early = image.pins.observe(&mut grace);
        if early {
            image.recycle(old);
        }
        reader.join().unwrap();
        assert!(image.pins.observe(&mut grace));
        if !early {
            image.recycle(old);
        }
    });
}
