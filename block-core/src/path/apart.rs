//! How a request gets down a long backing chain without a deep stack.
//!
//! A driver's future is polled inside its parent's, so every layer that a read passes costs stack. From a certain number
//! of layers on (counted while they are being polled, per thread) the next one's future is handed to the environment as
//! a task of its own, and what the parent polls is a note of its end. Tickets, pins and counts stay with the parent's
//! [`super::Driven`]; this is about where a future is polled, and about nothing else.

use std::{cell::Cell, sync::Arc};

use futures::{FutureExt, channel::oneshot, future::BoxFuture};

use super::Held;
use crate::{
    env::Environment,
    error::{Error, ErrorKind, Result},
    producer::{self, ProducerId},
};

/// Drivers that are polled inside one another on one stack. A thread has 2 MiB, and in a debug build a layer takes up to
/// 40 KiB of it; requests that were dropped may be helped along on top of that.
const MOST_LEVELS: usize = 16;

thread_local! {
    static LEVELS: Cell<usize> = const { Cell::new(0) };
}

/// Counts a level until it is dropped, also by a panic.
pub(super) struct Level(usize);

impl Level {
    #[inline]
    pub(super) fn down() -> Self {
        let before = LEVELS.get();
        LEVELS.set(before + 1);
        Self(before)
    }
}

impl Drop for Level {
    #[inline]
    fn drop(&mut self) {
        LEVELS.set(self.0);
    }
}

/// Gives `future` back, or, when the stack is deep already, a future that ends when it does. It is begun no earlier than it
/// would have been: when what is given back is polled first.
#[inline]
pub(super) fn apart_when_deep(
    held: &Held,
    future: BoxFuture<'static, Result<()>>,
) -> BoxFuture<'static, Result<()>> {
    if LEVELS.get() < MOST_LEVELS {
        return future;
    }
    match held.completions.last() {
        Some(level) => apart(level.node.env().clone(), held.producer, future),
        None => future,
    }
}

#[cold]
fn apart(
    env: Arc<dyn Environment>,
    producer: ProducerId,
    future: BoxFuture<'static, Result<()>>,
) -> BoxFuture<'static, Result<()>> {
    async move {
        let (tx, rx) = oneshot::channel();
        env.spawn(Box::pin(async move {
            let result = producer::on_behalf_of(producer, future).await;
            // Nobody listens any more when the environment is being taken down.
            let _ = tx.send(result);
        }));
        rx.await.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Cancelled,
                "the environment is shutting down",
            ))
        })
    }
    .boxed()
}
