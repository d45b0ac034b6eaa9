//! The block layer's environment on top of tokio: what the programs hand to their graphs.
//!
//! [`EnvTokio`] gives the clock, timers, background tasks, CPU workers and random numbers that the libraries ask for
//! (`block_core::env`). It owns a runtime or borrows somebody else's; the libraries never learn which. It never does
//! storage I/O: that is the business of `protocol-file` and its own reactor and pool.
//!
//! ```
//! use std::time::Duration;
//!
//! use block_core::env::Environment;
//! use env_tokio::EnvTokio;
//!
//! let env = EnvTokio::new(2)?;
//! let answer = env.block_on(async {
//!     env.sleep(Duration::from_millis(1)).await;
//!     42
//! });
//! assert_eq!(answer, 42);
//! # Ok::<(), std::io::Error>(())
//! ```

#![forbid(unsafe_code)]

mod panics;
mod workers;

#[cfg(test)]
mod tests;

use std::{
    future::Future,
    io,
    panic::AssertUnwindSafe,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use block_core::env::Environment;
use futures::{FutureExt, future::BoxFuture};
use tokio::runtime::{Builder, Handle, Runtime};

use self::{panics::Panics, workers::Workers};

/// An [`Environment`] on a tokio runtime.
///
/// A task or a piece of offloaded work that panics is never passed over: the panic is logged, counted
/// ([`panics`](Self::panics)), and ends every [`block_on`](Self::block_on) that is running or is called later with a
/// panic of its own, so that a program can't hang waiting for a task that is gone.
///
/// Dropping an environment that owns its runtime stops that runtime without waiting: tasks are dropped where they are,
/// offloaded work that has begun runs to its end. It may be dropped anywhere, inside a task too.
pub struct EnvTokio {
    handle: Handle,
    /// `None` when the runtime belongs to somebody else, and while dropping.
    runtime: Option<Runtime>,
    start: Instant,
    workers: Arc<Workers>,
    panics: Arc<Panics>,
}

impl EnvTokio {
    /// An environment with a multi-threaded runtime of its own, of `threads` threads (0 means one per core).
    ///
    /// # Errors
    /// When the operating system gives no threads.
    pub fn new(threads: usize) -> io::Result<Self> {
        let threads = if threads == 0 { cores() } else { threads };
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("blk-task")
            .enable_time()
            .build()?;
        let mut env = Self::from_handle(runtime.handle().clone());
        env.runtime = Some(runtime);
        Ok(env)
    }

    /// An environment on a runtime that belongs to somebody else, who keeps it running. Its timers must be enabled
    /// (`enable_time`), otherwise [`sleep`](Environment::sleep) panics.
    pub fn from_handle(handle: Handle) -> Self {
        let panics = Arc::new(Panics::new());
        Self {
            workers: Arc::new(Workers::new(handle.clone(), cores(), Arc::clone(&panics))),
            handle,
            runtime: None,
            start: Instant::now(),
            panics,
        }
    }

    /// An environment on the runtime that the caller runs in.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn current() -> Self {
        Self::from_handle(Handle::current())
    }

    /// The runtime.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// How many tasks and pieces of offloaded work have panicked.
    pub fn panics(&self) -> u64 {
        self.panics.count()
    }

    /// Runs `future` on the calling thread until it has ended, while the runtime's threads run everything else.
    ///
    /// # Panics
    /// When called from inside a runtime, and when a background task of this environment panics or has panicked: what
    /// `future` waits for might never come.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let panics = Arc::clone(&self.panics);
        self.handle.block_on(async move {
            tokio::select! {
                biased;
                message = panics.first() => panic!("a background task panicked: {message}"),
                output = future => output,
            }
        })
    }
}

impl Environment for EnvTokio {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        // The timer belongs to our runtime from its making on; whoever polls it need not.
        let _context = self.handle.enter();
        tokio::time::sleep(duration).boxed()
    }

    fn allows_upkeep(&self) -> bool {
        true
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let panics = Arc::clone(&self.panics);
        drop(self.handle.spawn(async move {
            if let Err(payload) = AssertUnwindSafe(task).catch_unwind().await {
                panics.report("task", &*payload);
            }
        }));
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        self.workers.run(work);
    }

    fn random(&self) -> u64 {
        rand::random()
    }
}

impl Drop for EnvTokio {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Unlike a plain drop this doesn't block, and so is fine inside of a task.
            runtime.shutdown_background();
        }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
