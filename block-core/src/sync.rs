//! The one place where this crate's lock-free and waiting code takes its synchronisation types from.
//!
//! What is built on this module ([`crate::tracked`], [`crate::pins`]) runs on `parking_lot` and
//! `std` in a normal build, and on loom's models of the same types when the crate is compiled with
//! `RUSTFLAGS="--cfg loom"`. The model checker then walks through the interleavings of the *shipped*
//! code; a copy that is model-checked proves nothing.
//!
//! It never holds an algorithm of its own, and code that blocks on the operating system (condition
//! variables, channels, sleeping) has no place here: whoever waits in this crate waits in a future.

#[cfg(not(loom))]
mod imp {
    pub use parking_lot::{Mutex, MutexGuard};
    pub use std::sync::Arc;
    pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

    use std::cell::Cell;

    /// How often the processor is asked to wait a moment before the thread gives way.
    const SPINS: u32 = 64;

    #[inline]
    pub(super) fn spin(tries: u32) {
        if tries < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }

    /// The next index to hand out. Process-wide on purpose: threads are, too.
    static NEXT: AtomicUsize = AtomicUsize::new(0);

    thread_local! {
        static INDEX: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    #[inline]
    pub(super) fn thread_index() -> usize {
        INDEX.with(|index| {
            let known = index.get();
            if known == usize::MAX {
                assign(index)
            } else {
                known
            }
        })
    }

    #[cold]
    fn assign(index: &Cell<usize>) -> usize {
        let new = NEXT.fetch_add(1, Ordering::Relaxed) & (usize::MAX >> 1);
        index.set(new);
        new
    }

    pub(super) fn set_thread_index(new: usize) {
        INDEX.with(|index| index.set(new));
    }
}

#[cfg(loom)]
mod imp {
    pub use loom::sync::Arc;
    pub use loom::sync::MutexGuard;
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

    use std::cell::Cell;

    /// loom's mutex behind `parking_lot`'s interface: `lock` hands out the guard itself.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// A new, unlocked mutex.
        pub fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        /// Takes the lock.
        #[track_caller]
        pub fn lock(&self) -> MutexGuard<'_, T> {
            // loom's mutex is poisoned only while a failed model is being torn down.
            self.0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }

    pub(super) fn spin(_tries: u32) {
        loom::thread::yield_now();
    }

    loom::thread_local! {
        // Not handed out by a counter: loom's runs must be repeatable, and which threads share a
        // shard is something a model wants to choose.
        static INDEX: Cell<usize> = Cell::new(0);
    }

    pub(super) fn thread_index() -> usize {
        INDEX.with(Cell::get)
    }

    pub(super) fn set_thread_index(new: usize) {
        INDEX.with(|index| index.set(new));
    }
}

pub use imp::{Arc, AtomicBool, AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, fence};

/// A small number that belongs to the calling thread, for choosing a shard.
///
/// Threads are numbered in the order in which they first ask, so that up to `n` long-lived threads
/// spread evenly over `n` shards. The number says nothing about identity: it wraps, and tests set it.
#[inline]
pub fn thread_index() -> usize {
    imp::thread_index()
}

/// Makes [`thread_index`] return `index` on this thread. For tests that want two threads on one shard, or on two.
#[doc(hidden)]
pub fn set_thread_index(index: usize) {
    imp::set_thread_index(index);
}

/// Lets another thread end what takes it a few instructions; `tries` counts from 0 how often that was asked before.
#[inline]
pub fn spin(tries: u32) {
    imp::spin(tries);
}

/// Orders the read-modify-write that was just made with [`Ordering::SeqCst`] before every later load.
///
/// The language asks for a full fence: a sequentially consistent read-modify-write is not ordered
/// before later loads of a weaker order, and on some machines (`AArch64`) it indeed is not. On x86-64
/// the instruction behind it is a full barrier already, and a second one would double its price.
#[inline]
pub fn fence_after_rmw() {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    fence(Ordering::SeqCst);
}
