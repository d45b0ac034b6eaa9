//! Copy-range: both ends of a copy that the storage does by itself.
//!
//! A copy goes down two chains, and so it never waits while it holds something that another may wait for: the tickets of
//! both ends are taken at once, before either is waited for; further down nothing is waited for. Where a ticket isn't
//! free, all are given back, the busy place is waited for with empty hands, and it begins anew.

use std::sync::Arc;

use super::{Completion, Driven, Held, Ticket, wait_at_gate};
use crate::{
    buffer::Buffer,
    driver::{Capabilities, MapIntent, Mapping},
    error::{Error, ErrorKind, Operation, Result},
    flags::{Permissions, RequestFlags},
    handle::{BlockHandle, RootGuard},
    node::Node,
    request::Request,
    stats::Counted,
    tracked::{PairEnd, Pending, RequestKind, Tracked, TrackedRange, Tracker},
};

/// The most that the fallback copies through memory at a time.
const CHUNK: u64 = 1 << 20;
/// How often it begins anew before it takes the other way.
const ATTEMPTS: u32 = 32;

/// Copies `len` bytes from `source_offset` of `source` to `offset` of `target`.
///
/// Where the bytes of both ends lie in storage of one kind and the target's place is already mapped, the storage copies
/// by itself; otherwise the data goes through memory, unless `flags` has NO_FALLBACK.
///
/// With FUA, or through a handle that writes through, it is durable when it has succeeded.
///
/// Cancellation: as with any write; the target's range may hold any mixture of old and new.
///
/// # Errors
/// ENOTSUP with NO_FALLBACK when the storage can't (or others never leave its place free), with nothing changed.
pub async fn copy_range(
    source: &BlockHandle,
    source_offset: u64,
    target: &BlockHandle,
    offset: u64,
    len: u64,
    flags: RequestFlags,
) -> Result<()> {
    permitted(target, offset, len)?;
    let flags = if target.is_write_through() {
        flags | RequestFlags::FUA
    } else {
        flags
    };
    match offload(source, source_offset, target, offset, len, flags).await {
        Ok(()) if flags.contains(RequestFlags::FUA) => return target.flush().await,
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            if flags.contains(RequestFlags::NO_FALLBACK) {
                return Err(error);
            }
        }
        other => return other,
    }
    let flags =
        flags & (RequestFlags::FUA | RequestFlags::WRITE_UNCHANGED | RequestFlags::SERIALISING);
    let mut done = 0;
    while done < len {
        let step = (len - done).min(CHUNK);
        let data = source
            .read_into(source_offset + done, Buffer::try_new(step as usize)?)
            .await?;
        target.write(offset + done, data, flags).await?;
        done += step;
    }
    Ok(())
}

async fn ready(node: &Node, pending: Pending) -> Tracked {
    match pending.into_ready() {
        Ok(tracked) => tracked,
        Err(pending) => wait_at_gate(node, pending).await,
    }
}

fn in_bounds(node: &Node, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= node.length() && end <= super::MAX_END => Ok(()),
        _ => Err(Error::io("range ends beyond the end of the node")
            .with_operation(Operation::CopyRange, offset, len)
            .with_node(node.name())),
    }
}

fn permitted(target: &BlockHandle, offset: u64, len: u64) -> Result<()> {
    if target.permissions().used.contains(Permissions::WRITE) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::NotPermitted, "")
        .with_operation(Operation::CopyRange, offset, len)
        .with_node(target.node().name()))
}

/// Admits a request at both handles. Whoever waits for one doesn't count as in flight at the other.
async fn enter_both(source: &BlockHandle, target: &BlockHandle) -> (RootGuard, RootGuard) {
    loop {
        let from = source.enter().await;
        if let Some(to) = target.try_enter() {
            return (from, to);
        }
        drop(from);
        let to = target.enter().await;
        if let Some(from) = source.try_enter() {
            return (from, to);
        }
    }
}

/// What came of the walk to the bottom.
enum Bottom {
    /// The node that holds the bytes, and where.
    At(Arc<Node>, u64),
    /// This range of this node is in use.
    Busy(Arc<Node>, TrackedRange),
}

/// Where the bytes are at the bottom. `held` collects tickets and pins of the layers below the top. Waits for nothing.
fn bottom(
    top: &Arc<Node>,
    offset: u64,
    len: u64,
    intent: MapIntent,
    held: &mut Held,
) -> Result<Bottom> {
    let unsupported = || Error::from_kind(ErrorKind::NotSupported);
    let mut node = top.clone();
    let mut offset = offset;
    loop {
        let capabilities = node.driver().capabilities();
        if !capabilities.contains(Capabilities::TRY_MAP) {
            return Ok(Bottom::At(node, offset));
        }
        let edges = node.edges();
        let next = match node.driver().try_map(&edges, offset, len, intent) {
            Mapping::Data {
                edge,
                offset: at,
                len: covered,
                pin,
            } if covered >= len => {
                held.pins.extend(pin);
                offset = at;
                edges
                    .get(edge)
                    .map(|edge| edge.child.node().clone())
                    .ok_or_else(unsupported)?
            }
            Mapping::Backing { len: covered } if covered >= len && intent == MapIntent::Read => {
                edges
                    .child(crate::driver::ChildRole::Backing)
                    .map(|child| child.node().clone())
                    .ok_or_else(unsupported)?
            }
            _ => return Err(unsupported()),
        };
        let align = next.limits().request_alignment.max(1);
        let end = offset.checked_add(len).ok_or_else(unsupported)?;
        let grows = intent == MapIntent::Overwrite
            && next.driver().capabilities().contains(Capabilities::GROW);
        let inside = end <= super::MAX_END && (grows || end <= next.length());
        if !inside || offset % align != 0 || len % align != 0 {
            // What the storage doesn't have, or can't do in one call, is the business of the plain way.
            return Err(unsupported());
        }
        let range = TrackedRange::from_len(offset, len);
        let Some(tracked) = next
            .tracker()
            .try_begin(range, false, RequestKind::CopyRange)
        else {
            return Ok(Bottom::Busy(next, range));
        };
        let counted = if intent == MapIntent::Overwrite {
            Counted::Write
        } else {
            Counted::Read
        };
        held.completions.push(Completion {
            node: next.clone(),
            ticket: Some(Ticket::Own(tracked)),
            counted,
            offset,
            len,
            root: None,
        });
        node = next;
    }
}

async fn offload(
    source: &BlockHandle,
    source_offset: u64,
    target: &BlockHandle,
    offset: u64,
    len: u64,
    flags: RequestFlags,
) -> Result<()> {
    for _ in 0..ATTEMPTS {
        match attempt(source, source_offset, target, offset, len, flags).await? {
            Attempt::Done => return Ok(()),
            Attempt::Busy(node, range) => {
                let pending = node.tracker().begin(range, false, RequestKind::CopyRange);
                drop(ready(&node, pending).await);
            }
        }
    }
    Err(Error::from_kind(ErrorKind::NotSupported))
}

enum Attempt {
    Done,
    /// Nothing was changed and nothing is held; this has to become free first.
    Busy(Arc<Node>, TrackedRange),
}

async fn attempt(
    source: &BlockHandle,
    source_offset: u64,
    target: &BlockHandle,
    offset: u64,
    len: u64,
    flags: RequestFlags,
) -> Result<Attempt> {
    let (source_guard, target_guard) = enter_both(source, target).await;
    permitted(target, offset, len)?;
    let (from, to) = (source.node(), target.node());
    in_bounds(&from, source_offset, len)?;
    in_bounds(&to, offset, len)?;
    if len == 0 {
        return Ok(Attempt::Done);
    }
    let align = from
        .limits()
        .request_alignment
        .max(to.limits().request_alignment);
    if !to.driver().capabilities().contains(Capabilities::WRITE) {
        return Err(Error::new(ErrorKind::NotPermitted, "").with_node(to.name()));
    }
    if source_offset % align != 0 || offset % align != 0 || len % align != 0 {
        return Err(Error::from_kind(ErrorKind::NotSupported));
    }
    let end =
        |node: &'_ Node, range| -> (TrackedRange, Arc<Tracker>) { (range, node.tracker().clone()) };
    let (read_range, read_tracker) = end(&from, TrackedRange::from_len(source_offset, len));
    let serialising = flags.contains(RequestFlags::SERIALISING)
        || to
            .driver()
            .capabilities()
            .contains(Capabilities::SERIALISE_WRITES);
    let write_range = if serialising {
        super::round_out(&to, offset, len)
    } else {
        TrackedRange::from_len(offset, len)
    };
    let (write_range, write_tracker) = end(&to, write_range);
    let kind = RequestKind::CopyRange;
    let (read, write) = Tracker::begin_pair(
        PairEnd {
            tracker: &read_tracker,
            range: read_range,
            serialising: false,
            kind,
        },
        PairEnd {
            tracker: &write_tracker,
            range: write_range,
            serialising,
            kind,
        },
    );
    // Both are polled, so that neither holds up others while it is itself ready.
    let (read, write) = futures::join!(ready(&from, read), ready(&to, write));
    in_bounds(&from, source_offset, len)?;
    in_bounds(&to, offset, len)?;
    let mut held = Held::new(target_guard.producer());
    for (node, tracked, counted, at, guard) in [
        (&from, read, Counted::Read, source_offset, source_guard),
        (&to, write, Counted::Write, offset, target_guard),
    ] {
        held.completions.push(Completion {
            node: node.clone(),
            ticket: Some(Ticket::Own(tracked)),
            counted,
            offset: at,
            len,
            root: Some(guard),
        });
    }
    // Walked with the tickets of both ends in hand: nobody can move what is looked at.
    let (from, at) = match bottom(&from, source_offset, len, MapIntent::Read, &mut held)? {
        Bottom::At(node, at) => (node, at),
        Bottom::Busy(node, range) => return Ok(Attempt::Busy(node, range)),
    };
    let (to, offset) = match bottom(&to, offset, len, MapIntent::Overwrite, &mut held)? {
        Bottom::At(node, at) => (node, at),
        Bottom::Busy(node, range) => return Ok(Attempt::Busy(node, range)),
    };
    let driver = to.driver().clone();
    if !driver.capabilities().contains(Capabilities::COPY_RANGE)
        || driver.name() != from.driver().name()
    {
        return Err(Error::from_kind(ErrorKind::NotSupported));
    }
    let request = Request::new(to.clone(), to.edges(), held.producer);
    let source = from.driver().clone();
    let copy = driver.copy_range_from(request, source, at, offset, len);
    Driven::new(copy, held).await?;
    Ok(Attempt::Done)
}
