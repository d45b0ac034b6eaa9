//! A bounded number of pieces of one request in flight. Whoever waits for anything else meanwhile keeps polling them: an
//! unpolled piece would hold its pins and claims.

use std::{future::poll_fn, task::Poll};

use block_core::error::Result;
use futures::{FutureExt, StreamExt, future::BoxFuture, pin_mut, stream::FuturesUnordered};

/// Pieces in flight.
pub(crate) struct Window<'a> {
    pieces: FuturesUnordered<BoxFuture<'a, Result<()>>>,
    limit: usize,
    result: Result<()>,
}

impl<'a> Window<'a> {
    pub fn new(limit: usize) -> Self {
        Self {
            pieces: FuturesUnordered::new(),
            limit,
            result: Ok(()),
        }
    }

    /// Nothing was begun yet, or all of it has ended well: the last piece may be awaited by itself, and its result is the whole's.
    pub fn is_idle(&self) -> bool {
        self.pieces.is_empty() && self.result.is_ok()
    }

    /// A piece failed: there is no point in beginning more.
    pub fn has_failed(&self) -> bool {
        self.result.is_err()
    }

    fn note(&mut self, result: Result<()>) {
        if self.result.is_ok() {
            self.result = result;
        }
    }

    /// Awaits `other` and goes on with the pieces meanwhile.
    pub async fn alongside<T>(&mut self, other: impl Future<Output = T>) -> T {
        pin_mut!(other);
        poll_fn(|context| {
            while !self.pieces.is_empty() {
                match self.pieces.poll_next_unpin(context) {
                    Poll::Ready(Some(result)) => self.note(result),
                    _ => break,
                }
            }
            other.poll_unpin(context)
        })
        .await
    }

    /// Waits while the window is full. To be called before a pin is taken for the next piece: the pieces that it waits
    /// for may themselves be waiting for all pins to end.
    pub async fn room(&mut self) {
        while self.pieces.len() >= self.limit {
            if let Some(result) = self.pieces.next().await {
                self.note(result);
            }
        }
    }

    /// Begins a piece; there is [`Self::room`] for it.
    pub fn push(&mut self, piece: BoxFuture<'a, Result<()>>) {
        debug_assert!(self.pieces.len() < self.limit);
        self.pieces.push(piece);
    }

    /// Waits for all pieces; the first error that was met.
    pub async fn finish(mut self) -> Result<()> {
        while let Some(result) = self.pieces.next().await {
            self.note(result);
        }
        self.result
    }
}
