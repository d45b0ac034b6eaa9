//! CPU workers: at most as many threads at once as there are cores, out of tokio's pool of blocking threads.
//!
//! Tokio's own bound on that pool is meant for threads that sleep in system calls (512); work that keeps a core busy
//! must queue here instead. Nothing here waits for anything but the next piece of work.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::runtime::Handle;

use crate::panics::Panics;

type Work = Box<dyn FnOnce() + Send>;

/// A queue of work and the number of threads that empty it.
pub(crate) struct Workers {
    handle: Handle,
    max: usize,
    panics: Arc<Panics>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    /// Workers that exist, each of which looks at the queue again before it ends.
    running: usize,
}

impl Workers {
    pub(crate) fn new(handle: Handle, max: usize, panics: Arc<Panics>) -> Self {
        Self {
            handle,
            max: max.max(1),
            panics,
            state: Mutex::default(),
        }
    }

    /// Queues `work`. It is dropped without having run when the runtime is shutting down.
    pub(crate) fn run(self: &Arc<Self>, work: Work) {
        let worker = {
            let mut state = self.lock();
            state.queue.push_back(work);
            if state.running == self.max {
                return;
            }
            state.running += 1;
            Worker {
                workers: Arc::clone(self),
                ended: false,
            }
        };
        // A runtime that is shutting down drops the closure, and with it the worker, which then gives up the queue.
        drop(self.handle.spawn_blocking(move || worker.work()));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of others runs under the lock, so a poisoned one is as consistent as any.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the `running` workers of a queue.
struct Worker {
    workers: Arc<Workers>,
    /// Already left `running`.
    ended: bool,
}

impl Worker {
    fn work(mut self) {
        loop {
            // The end is told under the lock under which the queue was found empty: work that comes later sees it. The
            // lock is let go before the work runs.
            let work = {
                let mut state = self.workers.lock();
                let Some(work) = state.queue.pop_front() else {
                    state.running -= 1;
                    self.ended = true;
                    return;
                };
                work
            };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
                self.workers.panics.report("offloaded work", &*payload);
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // The runtime is shutting down and dropped this worker before it began. When it was the last, nobody will run
        // what is queued; dropping that tells those who wait for it.
        let abandoned = {
            let mut state = self.workers.lock();
            state.running -= 1;
            if state.running == 0 {
                std::mem::take(&mut state.queue)
            } else {
                VecDeque::new()
            }
        };
        drop(abandoned);
    }
}
