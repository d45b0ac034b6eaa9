//! Requests that aren't ranges of data: flush, status and metadata. They are counted and survive being dropped like the
//! others.

use std::sync::{Arc, atomic::Ordering};

use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::{Completion, Driven, Held, Ticket, wait_at_gate};
use crate::{
    debug::DebugEvent,
    error::{Error, Operation, Result},
    handle::RootGuard,
    mutant,
    node::Node,
    producer,
    request::Request,
    stats::Counted,
    tracked::{RequestKind, Tracked, TrackedRange},
};

/// Makes everything durable that completed at this node before.
///
/// After a failed flush every later one fails: what was lost is not retried into success.
pub(crate) async fn flush(node: &Arc<Node>, root: Option<RootGuard>) -> Result<()> {
    let state = &node.flush;
    if let Some(error) = &*state.failed.lock() {
        return Err(error.duplicate());
    }
    let wanted = state.written.load(Ordering::SeqCst);
    if state.flushed.load(Ordering::SeqCst) >= wanted {
        return Ok(());
    }
    let turn = node
        .deferred
        .help_until(state.turn.clone().lock_owned())
        .await;
    if let Some(error) = &*state.failed.lock() {
        return Err(error.duplicate());
    }
    if state.flushed.load(Ordering::SeqCst) >= wanted {
        return Ok(());
    }
    let held = held(node, None, root);
    let request = Request::new(node.clone(), node.edges(), held.producer);
    let future = Box::pin(async move {
        let _turn = turn;
        flush_driver(request).await
    });
    Driven::new(future, held).await
}

/// The flush of a request that asked for FUA where the driver has none: always reaches the driver.
pub(crate) async fn flush_now(request: Request) -> Result<()> {
    let state = &request.node().flush;
    let _turn = state.turn.clone().lock_owned().await;
    if let Some(error) = &*state.failed.lock() {
        return Err(error.duplicate());
    }
    flush_driver(request).await
}

/// Flushes, and remembers how it went. The caller has the turn.
async fn flush_driver(request: Request) -> Result<()> {
    let node = request.node().clone();
    let covers = if mutant::is_active("flush-covers-later-writes") {
        u64::MAX
    } else {
        node.flush.written.load(Ordering::SeqCst)
    };
    node.stats().flushed();
    request.debug_event(DebugEvent::FlushToOs).await;
    request.debug_event(DebugEvent::FlushToDisk).await;
    match node.driver().clone().flush(request).await {
        Ok(()) => {
            node.flush.flushed.fetch_max(covers, Ordering::SeqCst);
            Ok(())
        }
        Err(error) => {
            let error = error
                .with_operation(Operation::Flush, 0, 0)
                .with_node(node.name());
            if !mutant::is_active("flush-failure-forgotten") {
                *node.flush.failed.lock() = Some(error.duplicate());
            }
            Err(error)
        }
    }
}

fn held(node: &Arc<Node>, ticket: Option<Ticket>, root: Option<RootGuard>) -> Held {
    let counted = if ticket.is_some() {
        Counted::Exclusive
    } else {
        Counted::Other
    };
    let mut held = Held::new(
        root.as_ref()
            .map_or_else(producer::current, RootGuard::producer),
    );
    held.completions.push(Completion {
        node: node.clone(),
        ticket,
        counted,
        offset: 0,
        len: 0,
        root,
    });
    held
}

/// Runs something that needs no range: status (whose asker holds [`ask`]), info.
pub(crate) async fn unranged<T: Send + 'static>(
    node: &Arc<Node>,
    root: Option<RootGuard>,
    work: impl FnOnce(Request) -> BoxFuture<'static, Result<T>>,
) -> Result<T> {
    let held = held(node, None, root);
    let request = Request::new(node.clone(), node.edges(), held.producer);
    run(held, work(request)).await
}

/// Holds off everything that moves what a node is made of (see [`exclusive`]) while somebody asks about it. Waits for what began
/// before.
///
/// Cancellation: a wait that is dropped leaves no trace.
pub(crate) async fn ask(node: &Node) -> Arc<Tracked> {
    Arc::new(hold_questions(node, false).await)
}

/// One who asks, or one who changes the answers: that one waits for all who asked before, and holds off who comes later.
///
/// Whoever asks may hold a range of the node, so a change comes here once it has the whole node: it waits for nobody then who waits
/// for a range.
async fn hold_questions(node: &Node, change: bool) -> Tracked {
    let kind = if change {
        RequestKind::Reserve
    } else {
        RequestKind::Read
    };
    let pending = node
        .questions()
        .begin(TrackedRange::EVERYTHING, change, kind);
    match pending.into_ready() {
        Ok(tracked) => tracked,
        Err(pending) => wait_at_gate(node, pending).await,
    }
}

/// Runs something under a serialising ticket over the whole node: check, repair, a change of the header. Nobody is told meanwhile
/// where its data is.
pub(crate) async fn exclusive<T: Send + 'static>(
    node: &Arc<Node>,
    root: Option<RootGuard>,
    work: impl FnOnce(Request) -> BoxFuture<'static, Result<T>>,
) -> Result<T> {
    let pending = node
        .tracker()
        .begin(TrackedRange::EVERYTHING, true, RequestKind::Reserve);
    let tracked = match pending.into_ready() {
        Ok(tracked) => tracked,
        Err(pending) => wait_at_gate(node, pending).await,
    };
    let unasked = hold_questions(node, true).await;
    let held = held(node, Some(Ticket::Own(tracked)), root);
    let request = Request::new(node.clone(), node.edges(), held.producer);
    let work = work(request);
    let work = Box::pin(async move {
        let _unasked = unasked;
        work.await
    });
    run(held, work).await
}

async fn run<T: Send + 'static>(held: Held, work: BoxFuture<'static, Result<T>>) -> Result<T> {
    let slot = Arc::new(Mutex::new(None));
    let out = slot.clone();
    let future = Box::pin(async move {
        let value = work.await?;
        *out.lock() = Some(value);
        Ok(())
    });
    Driven::new(future, held).await?;
    let value = slot.lock().take();
    value.ok_or_else(|| Error::io("a request ended without an answer"))
}
