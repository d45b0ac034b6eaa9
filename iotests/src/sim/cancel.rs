//! Dropping a future at a chosen await point.
//!
//! [`CancelAt`] polls its future until the k-th time that it answers "pending", and drops it then: at that very moment,
//! or later, after everything else has come to rest (which is when a request that nobody polls any more has done all the
//! harm that it can). It knows nothing of what the future is.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use super::{Idle, SimEnv};

/// When the future is dropped, once its time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropWhen {
    /// At once, from within the poll.
    AtOnce,
    /// When nothing else is ready any more; until then it is neither polled nor dropped.
    AtRest,
}

/// The future was dropped before it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cancelled;

enum Stage<F> {
    Running(F),
    /// Not polled any more, not dropped yet.
    Abandoned(#[allow(dead_code)] F, Idle),
    Gone,
}

/// A future that is dropped after `polls` polls that were answered "pending".
pub struct CancelAt<F> {
    env: Arc<SimEnv>,
    stage: Stage<Pin<Box<F>>>,
    polls: usize,
    when: DropWhen,
    reached: Arc<AtomicBool>,
}

impl<F: Future> CancelAt<F> {
    /// `polls` = 0 drops it without ever polling it. `reached` becomes true when it was dropped unfinished.
    pub fn new(
        env: &Arc<SimEnv>,
        future: F,
        polls: usize,
        when: DropWhen,
        reached: Arc<AtomicBool>,
    ) -> Self {
        Self {
            env: env.clone(),
            stage: Stage::Running(Box::pin(future)),
            polls,
            when,
            reached,
        }
    }
}

impl<F: Future> Future for CancelAt<F> {
    type Output = Result<F::Output, Cancelled>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            match std::mem::replace(&mut this.stage, Stage::Gone) {
                Stage::Running(mut future) => {
                    if this.polls > 0 {
                        if let Poll::Ready(output) = future.as_mut().poll(cx) {
                            return Poll::Ready(Ok(output));
                        }
                        this.polls -= 1;
                    }
                    if this.polls > 0 {
                        this.stage = Stage::Running(future);
                        return Poll::Pending;
                    }
                    this.reached.store(true, Ordering::SeqCst);
                    match this.when {
                        DropWhen::AtOnce => {
                            drop(future);
                            return Poll::Ready(Err(Cancelled));
                        }
                        DropWhen::AtRest => {
                            this.stage = Stage::Abandoned(future, this.env.idle());
                        }
                    }
                }
                Stage::Abandoned(future, mut idle) => {
                    if Pin::new(&mut idle).poll(cx).is_pending() {
                        this.stage = Stage::Abandoned(future, idle);
                        return Poll::Pending;
                    }
                    drop(future);
                    return Poll::Ready(Err(Cancelled));
                }
                Stage::Gone => return Poll::Ready(Err(Cancelled)),
            }
        }
    }
}
