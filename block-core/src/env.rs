//! What the block layer needs from outside: a clock, timers, tasks, CPU workers and randomness.
//!
//! The libraries name no runtime. Programs hand the graph an [`Environment`] of their own, deterministic tests hand
//! it a simulated one; there is no other clock, thread, timer or source of randomness above the storage.

use std::{fmt, sync::Arc, time::Duration};

use futures::{channel::oneshot, future::BoxFuture};

use crate::error::{Error, ErrorKind, Result};

/// The one door to the outside (design, section 6).
pub trait Environment: Send + Sync + 'static {
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// Completes after `duration`. Dropping the future cancels the timer.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Whether timers may be set that nobody waits for and that never end, such as for dropping from a cache what wasn't used lately.
    /// An environment that tells from its timers whether anything can still happen says no: such a timer would hide that all hangs.
    fn allows_upkeep(&self) -> bool {
        false
    }

    /// Polls `task` to its end in the background. An environment that is shutting down may drop it.
    fn spawn(&self, task: BoxFuture<'static, ()>);

    /// Runs CPU work (compression, checksums) away from the tasks. It must not block on anything else.
    fn offload(&self, work: Box<dyn FnOnce() + Send>);

    /// 64 random bits, which nobody else can guess: keys and salts are made of them. (A simulation repeats its own.)
    fn random(&self) -> u64;
}

impl fmt::Debug for dyn Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Environment")
    }
}

/// Runs `work` on the environment's CPU workers and gives back what it returns.
///
/// Cancellation: the work runs to its end, its result is dropped.
///
/// # Errors
/// ECANCELED when the environment shut down before the work ran.
pub async fn offload<T: Send + 'static>(
    env: &Arc<dyn Environment>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (tx, rx) = oneshot::channel();
    env.offload(Box::new(move || {
        let _ = tx.send(work());
    }));
    rx.await
        .map_err(|_| Error::new(ErrorKind::Cancelled, "the environment is shutting down"))
}
