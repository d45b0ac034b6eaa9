//! The io_uring engine: a ring that all nodes share. Whoever submits enters the kernel itself and collects what is
//! complete by then; for the rest there is one reactor thread, or an executor that calls [`RingEngine::turn`].
//!
//! No lost wake-ups: an item is queued before its submitter tries for the right to push, and whoever has that right
//! looks at the queue once more after giving it up. A completion is either seen by the thread that collects, or is
//! there when the reactor asks the kernel to wait, which then doesn't.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;

use super::fair::FairQueue;
use crate::{
    sys::{Completion, Ring, Submitter},
    transfer::Transfer,
};

/// Who collects completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reactor {
    /// A thread of this crate.
    #[default]
    Thread,
    /// An executor of the embedding program: it watches the ring's descriptor and calls `turn` when that is readable.
    External,
}

/// The engine.
pub(super) struct RingEngine {
    ring: Ring,
    queue: Mutex<FairQueue<Box<Transfer>>>,
    /// The kernel didn't take all that was pushed (it was out of memory); to be submitted again.
    unsubmitted: AtomicBool,
    stopping: AtomicBool,
}

impl RingEngine {
    /// Makes the ring, and starts its reactor thread if there is to be one.
    pub(super) fn start(entries: u32, reactor: Reactor) -> io::Result<Arc<Self>> {
        let ring = Ring::new(entries)?;
        let lane_limit = ring.capacity() / 2;
        let engine = Arc::new(Self {
            ring,
            queue: Mutex::new(FairQueue::new(lane_limit)),
            unsubmitted: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        });
        if reactor == Reactor::Thread {
            let engine = engine.clone();
            thread::Builder::new()
                .name("block-file-ring".into())
                .spawn(move || engine.react())?;
        }
        Ok(engine)
    }

    pub(super) fn open_lane(&self) -> usize {
        self.queue.lock().open_lane()
    }

    pub(super) fn close_lane(&self, lane: usize) {
        self.queue.lock().close_lane(lane);
    }

    /// The ring's descriptor: readable when there is something for [`Self::turn`] to do.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Queues a transfer (in the lane that it names), and does what can be done without waiting.
    pub(super) fn submit(&self, transfer: Box<Transfer>) {
        let (lane, producer) = (transfer.lane, transfer.producer);
        self.queue.lock().push(lane, producer, transfer);
        self.turn();
    }

    /// Submits what is queued and completes what the kernel has done, without waiting. Returns how many steps it
    /// completed.
    pub(super) fn turn(&self) -> usize {
        let mut completions = Vec::new();
        let mut completed = 0;
        loop {
            self.push_queued();
            self.ring.collect(&mut completions);
            if completions.is_empty() {
                return completed;
            }
            completed += completions.len();
            for completion in completions.drain(..) {
                self.complete(completion);
            }
        }
    }

    fn complete(&self, (transfer, result): Completion) {
        let (lane, producer) = (transfer.lane, transfer.producer);
        match transfer.advance(result) {
            Some(again) => self.queue.lock().push_back_running(lane, producer, again),
            None => self.queue.lock().done(lane),
        }
    }

    /// Moves what is queued into the ring, as much as there is room for.
    fn push_queued(&self) {
        loop {
            let Some(mut submitter) = self.ring.try_submitter() else {
                return;
            };
            let mut pushed = false;
            while submitter.has_room() {
                let Some((lane, transfer)) = self.queue.lock().pop() else {
                    break;
                };
                let producer = transfer.producer;
                if let Err(back) = submitter.push(transfer) {
                    self.queue.lock().push_back_running(lane, producer, back);
                    break;
                }
                pushed = true;
            }
            if pushed || self.unsubmitted.swap(false, Ordering::AcqRel) {
                self.unsubmitted
                    .store(!submit_all(&mut submitter), Ordering::Release);
            }
            let full = !submitter.has_room();
            drop(submitter);
            if full || !self.queue.lock().is_ready() {
                return;
            }
        }
    }

    fn react(&self) {
        loop {
            self.turn();
            if self.stopping.load(Ordering::Acquire)
                && self.ring.in_flight() == 0
                && self.queue.lock().queued() == 0
            {
                return;
            }
            if self.unsubmitted.load(Ordering::Acquire) {
                // The kernel is short of memory: once more in a moment.
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            match self.ring.wait() {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "waiting for io_uring completions failed");
                    thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// The last user is gone: the reactor ends when nothing is in flight any more.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        loop {
            // Blocking on the lock would do as well; it is held for short only.
            if let Some(mut submitter) = self.ring.try_submitter() {
                submitter.nudge();
                let _ = submitter.submit();
                return;
            }
            thread::yield_now();
        }
    }
}

/// Hands everything to the kernel. When that is short of memory, trying again in a moment is all that can be done; after
/// a second of it the rest is left to whoever comes next, and `false` returned.
fn submit_all(submitter: &mut Submitter<'_>) -> bool {
    let mut patience = 1000;
    loop {
        match submitter.submit() {
            Ok(true) => return true,
            // It stopped at an entry that it refused, which completes with an error.
            Ok(false) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) => {
                patience -= 1;
                if patience == 0 {
                    tracing::warn!(%error, "io_uring takes no submissions");
                    return false;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
