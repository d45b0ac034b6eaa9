//! Copy-range: both ends of a copy that the storage does by itself. Both tickets are taken at once, before either is
//! waited for.

use std::sync::Arc;

use super::{Completion, Driven, Held, Ticket, wait_at_gate};
use crate::{
    buffer::Buffer,
    driver::{Capabilities, MapIntent, Mapping},
    error::{Error, ErrorKind, Operation, Result},
    flags::{Permissions, RequestFlags},
    handle::BlockHandle,
    node::Node,
    request::Request,
    stats::Counted,
    tracked::{PairEnd, Pending, RequestKind, Tracked, TrackedRange, Tracker},
};

/// The most that the fallback copies through memory at a time.
const CHUNK: u64 = 1 << 20;

/// Copies `len` bytes from `source_offset` of `source` to `offset` of `target`.
///
/// Where the bytes of both ends lie in storage of one kind and the target's place is already mapped, the storage copies
/// by itself; otherwise the data goes through memory, unless `flags` has NO_FALLBACK.
///
/// Cancellation: as with any write; the target's range may hold any mixture of old and new.
///
/// # Errors
/// ENOTSUP with NO_FALLBACK when the storage can't, with nothing changed.
pub async fn copy_range(
    source: &BlockHandle,
    source_offset: u64,
    target: &BlockHandle,
    offset: u64,
    len: u64,
    flags: RequestFlags,
) -> Result<()> {
    if !target.permissions().used.contains(Permissions::WRITE) {
        return Err(Error::new(ErrorKind::NotPermitted, "")
            .with_operation(Operation::CopyRange, offset, len)
            .with_node(target.node().name()));
    }
    match offload(source, source_offset, target, offset, len, flags).await {
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

/// Where the bytes are at the bottom. `held` collects tickets and pins of the layers below the top.
async fn bottom(
    top: &Arc<Node>,
    offset: u64,
    len: u64,
    intent: MapIntent,
    held: &mut Held,
) -> Result<(Arc<Node>, u64)> {
    let unsupported = || Error::from_kind(ErrorKind::NotSupported);
    let mut node = top.clone();
    let mut offset = offset;
    loop {
        let capabilities = node.driver().capabilities();
        if !capabilities.contains(Capabilities::TRY_MAP) {
            return Ok((node, offset));
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
            Mapping::Backing { len: covered } if covered >= len => edges
                .child(crate::driver::ChildRole::Backing)
                .filter(|child| offset + len <= child.length())
                .map(|child| child.node().clone())
                .ok_or_else(unsupported)?,
            _ => return Err(unsupported()),
        };
        let kind = RequestKind::CopyRange;
        let range = TrackedRange::from_len(offset, len);
        let tracked = ready(&next, next.tracker().begin(range, false, kind)).await;
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
    if flags.contains(RequestFlags::FUA) {
        // Durable also means that the way to the data is: the plain way sees to that.
        return Err(Error::from_kind(ErrorKind::NotSupported));
    }
    let source_guard = source.enter().await;
    let target_guard = target.enter().await;
    let (from, to) = (source.node(), target.node());
    in_bounds(&from, source_offset, len)?;
    in_bounds(&to, offset, len)?;
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
    let mut held = Held::default();
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
    let (from, at) = bottom(&from, source_offset, len, MapIntent::Read, &mut held).await?;
    let (to, offset) = bottom(&to, offset, len, MapIntent::Overwrite, &mut held).await?;
    let driver = to.driver().clone();
    if !driver.capabilities().contains(Capabilities::COPY_RANGE)
        || driver.name() != from.driver().name()
    {
        return Err(Error::from_kind(ErrorKind::NotSupported));
    }
    let request = Request::new(to.clone(), to.edges());
    let source = from.driver().clone();
    Driven::new(
        driver.copy_range_from(request, source, at, offset, len),
        held,
    )
    .await
}
