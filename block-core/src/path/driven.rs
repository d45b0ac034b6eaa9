//! A request that is with a driver, and everything that must live until its last I/O has ended: tickets, pins, the
//! handle's in-flight count, and what is to be recorded. Dropping it hands it to the graph's list of dropped requests.

use std::{
    pin::Pin,
    sync::Arc,
    sync::atomic::Ordering,
    task::{Context, Poll},
};

use futures::future::BoxFuture;
use smallvec::SmallVec;

use super::{
    Completions,
    apart::{self, Level},
};
use crate::{
    error::{Error, Operation, Result},
    handle::RootGuard,
    mutant,
    node::Node,
    pins,
    producer::{self, ProducerId},
    stats::Counted,
    tracked::Tracked,
};

/// The ticket of a request at one node.
pub(crate) enum Ticket {
    /// Its own.
    Own(Tracked),
    /// An ancestor's, at the same node.
    Shared(Arc<Tracked>),
}

/// What one level of a request leaves to be done at its end.
pub(crate) struct Completion {
    pub node: Arc<Node>,
    pub ticket: Option<Ticket>,
    pub counted: Counted,
    pub offset: u64,
    pub len: u64,
    pub root: Option<RootGuard>,
}

impl Completion {
    /// Steps 5 and 6: record, whether it succeeded or not, and release.
    fn finish(&mut self, ok: bool) {
        let Self {
            node,
            counted,
            offset,
            len,
            ..
        } = self;
        let (counted, offset, len) = (*counted, *offset, *len);
        match counted {
            Counted::Write | Counted::Zero | Counted::Discard => {
                let unmarked = match counted {
                    Counted::Zero => mutant::is_active("bitmap-not-set-on-zero-write"),
                    Counted::Discard => mutant::is_active("bitmap-not-set-on-discard"),
                    _ => !ok && mutant::is_active("bitmap-not-set-on-failed-write"),
                };
                if !unmarked {
                    node.mark_dirty(offset, len);
                }
                if counted == Counted::Discard && mutant::is_active("flush-forgets-discard") {
                    node.stats().ended(counted, len, ok);
                    return;
                }
                node.flush.note_change();
            }
            // An amend may have changed the length, also one that failed later on.
            Counted::Truncate | Counted::Exclusive => {
                node.resize_bitmaps(node.length());
                if !mutant::is_active("path-length-change-unnoticed") {
                    // Before the ticket goes: who looked at the length before, and takes one after this, looks again.
                    node.refresh_limits();
                }
                if counted == Counted::Truncate {
                    node.flush.note_change();
                } else {
                    node.flush.written.fetch_add(1, Ordering::SeqCst);
                }
            }
            Counted::Read | Counted::Other => {}
        }
        node.stats().ended(counted, len, ok);
        if let Some(Ticket::Own(tracked)) = &self.ticket {
            node.tell(|to| to.ended(tracked.id(), ok));
        }
        drop(self.ticket.take());
        drop(self.root.take());
    }

    fn operation(&self) -> Option<Operation> {
        match self.counted {
            Counted::Read => Some(Operation::Read),
            Counted::Write => Some(Operation::Write),
            Counted::Zero => Some(Operation::WriteZeroes),
            Counted::Discard => Some(Operation::Discard),
            Counted::Truncate => Some(Operation::Truncate),
            Counted::Exclusive | Counted::Other => None,
        }
    }
}

/// What a request took on its way down, outermost level first.
#[derive(Default)]
pub(crate) struct Held {
    pub completions: Completions,
    pub pins: SmallVec<[pins::Pin; 3]>,
    /// On whose behalf the driver works.
    pub producer: ProducerId,
}

impl Held {
    pub(crate) fn new(producer: ProducerId) -> Self {
        Self {
            completions: Completions::new(),
            pins: SmallVec::new(),
            producer,
        }
    }

    /// Records and releases, innermost level first.
    pub(crate) fn finish(&mut self, result: &Result<()>) {
        self.pins.clear();
        for completion in self.completions.iter_mut().rev() {
            completion.finish(result.is_ok());
        }
        self.completions.clear();
    }

    #[cold]
    pub(crate) fn describe(&self, error: Error) -> Error {
        let Some(innermost) = self.completions.last() else {
            return error;
        };
        let error = error.with_node(innermost.node.name());
        let error = match innermost.operation() {
            Some(operation) => error.with_operation(operation, innermost.offset, innermost.len),
            None => error,
        };
        match innermost.node.filename() {
            Some(file) => error.with_file(file),
            None => error,
        }
    }
}

/// A request that is with a driver. Completes with the driver's answer, after it was recorded and released.
pub(crate) struct Driven {
    future: Option<BoxFuture<'static, Result<()>>>,
    held: Held,
    started: bool,
}

impl Driven {
    pub(crate) fn new(future: BoxFuture<'static, Result<()>>, held: Held) -> Self {
        Self {
            future: Some(apart::apart_when_deep(&held, future)),
            held,
            started: false,
        }
    }

    pub(crate) fn poll_driven(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.started = true;
        // Taken out, so that a driver that panics leaves nothing behind that would be polled again.
        let Some(mut future) = self.future.take() else {
            return Poll::Ready(Err(Error::io("a request was polled after its end")));
        };
        let polled = {
            let _acting = producer::act_for(self.held.producer);
            let _level = Level::down();
            future.as_mut().poll(cx)
        };
        match polled {
            Poll::Pending => {
                self.future = Some(future);
                Poll::Pending
            }
            Poll::Ready(result) => {
                drop(future);
                let result = result.map_err(|error| self.held.describe(error));
                self.held.finish(&result);
                Poll::Ready(result)
            }
        }
    }
}

impl Driven {
    /// Drops the request for good: nobody is left to end it.
    pub(crate) fn give_up(mut self) {
        drop(self.future.take());
    }
}

impl Future for Driven {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.get_mut().poll_driven(cx)
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        if !self.started || self.future.is_none() {
            return;
        }
        let Some(last) = self.held.completions.last() else {
            return;
        };
        let deferred = last.node.deferred.clone();
        let mut held = std::mem::take(&mut self.held);
        for completion in &mut held.completions {
            completion.node.stats().dropped();
            if mutant::is_active("ticket-released-on-drop") {
                completion.ticket = None;
            }
            if mutant::is_active("dropped-request-not-serialising") {
                continue;
            }
            if let Some(Ticket::Own(tracked)) = &mut completion.ticket {
                tracked.upgrade_to_serialising();
            }
        }
        deferred.push(Self {
            future: self.future.take(),
            held,
            started: true,
        });
    }
}
