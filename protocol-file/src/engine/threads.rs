//! The bounded thread pool: threads start when there is work for them, and go when there was none for a while. It runs
//! transfers where io_uring isn't to be had, and every call for which there is no asynchronous form.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::Duration,
};

use block_core::producer::ProducerId;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::fair::FairQueue;
use crate::transfer::Transfer;

/// How long a thread waits for work before it goes.
const IDLE_EXIT: Duration = Duration::from_secs(10);

/// Something for a thread to do.
pub(super) enum Task {
    Transfer(Box<Transfer>),
    Call(Box<dyn FnOnce() + Send>),
}

impl Task {
    fn run(self) {
        match self {
            Self::Transfer(transfer) => transfer.run(),
            Self::Call(call) => call(),
        }
    }
}

/// The pool. When it is dropped, what is queued still runs, and the threads end after it.
pub(super) struct ThreadPool {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    max_threads: usize,
}

struct State {
    queue: FairQueue<Task>,
    threads: usize,
    idle: usize,
    stopping: bool,
}

impl ThreadPool {
    /// A pool of at most `max_threads` threads, none of which runs yet.
    pub(super) fn new(max_threads: usize) -> Self {
        let max_threads = max_threads.max(1);
        // A lane never takes all threads, so that another node's request finds one soon.
        let lane_limit = (max_threads * 3 / 4).max(1);
        let state = State {
            queue: FairQueue::new(lane_limit),
            threads: 0,
            idle: 0,
            stopping: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            max_threads,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    pub(super) fn open_lane(&self) -> usize {
        self.shared.state.lock().queue.open_lane()
    }

    pub(super) fn close_lane(&self, lane: usize) {
        self.shared.state.lock().queue.close_lane(lane);
    }

    /// Threads that exist now.
    pub(super) fn threads(&self) -> usize {
        self.shared.state.lock().threads
    }

    /// Queues a task. Fails, with the task, only when there is no thread and none can be started.
    pub(super) fn submit(&self, lane: usize, producer: ProducerId, task: Task) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        state.queue.push(lane, producer, task);
        if state.queue.queued() > state.idle && state.threads < self.shared.max_threads {
            state.threads += 1;
            let shared = self.shared.clone();
            let spawned = thread::Builder::new()
                .name("block-file-io".into())
                .spawn(move || work(&shared));
            if let Err(error) = spawned {
                state.threads -= 1;
                if state.threads == 0 {
                    // Nobody will ever come for it: take it back out, which ends its future with an error.
                    while let Some((lane, task)) = state.queue.pop() {
                        drop(task);
                        state.queue.done(lane);
                    }
                    return Err(error);
                }
            }
        }
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.state.lock().stopping = true;
        self.shared.work.notify_all();
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        if let Some((lane, task)) = state.queue.pop() {
            MutexGuard::unlocked(&mut state, || {
                // A panic is a bug of ours; it must not cost the pool a thread and the lane a place. Whoever waits
                // for the task is told by its reply channel.
                if catch_unwind(AssertUnwindSafe(|| task.run())).is_err() {
                    tracing::error!("a file I/O task panicked");
                }
            });
            state.queue.done(lane);
            if state.idle > 0 && state.queue.is_ready() {
                shared.work.notify_one();
            }
            continue;
        }
        if state.stopping {
            break;
        }
        state.idle += 1;
        let timed_out = shared.work.wait_for(&mut state, IDLE_EXIT).timed_out();
        state.idle -= 1;
        if timed_out && !state.queue.is_ready() {
            break;
        }
    }
    state.threads -= 1;
}
