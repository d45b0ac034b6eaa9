//! Step 4 of the request path: the driver calls that one request takes. Padding by read-modify-write, splitting at
//! limits, FUA and zero-write fallbacks, copy-on-read. All inside the range that is already tracked.

use std::sync::Arc;

use futures::future::BoxFuture;

use super::{Action, Held, Op, Origin, Ticket};
use crate::{
    buffer::{Buffer, IoBuf, IoBufMut},
    chain,
    debug::DebugEvent,
    driver::{Attempt, BlockDriver, Capabilities, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    limits::{Limits, fit_max},
    request::Request,
    tracked::Tracked,
};

/// The most that is written at once when a driver has no zero writes.
const MAX_ZERO_BUFFER: u64 = 16 << 20;
/// The most that copy-on-read holds in memory and copies at once, unless one cluster is larger.
const MAX_COPY_ON_READ: u64 = 1 << 20;

/// What the driver-facing flags of a request are.
pub(super) fn driver_flags(flags: RequestFlags, capabilities: Capabilities) -> RequestFlags {
    let mut passed = flags
        & (RequestFlags::MAY_UNMAP
            | RequestFlags::FUA
            | RequestFlags::WRITE_COMPRESSED
            | RequestFlags::WRITE_UNCHANGED
            | RequestFlags::NO_FALLBACK
            | RequestFlags::REGISTERED_BUF);
    if !capabilities.contains(Capabilities::FUA) {
        passed -= RequestFlags::FUA;
    }
    passed
}

/// The future that does it all. Nothing happens before it is polled.
pub(super) fn drive(
    request: Request,
    held: &mut Held,
    op: Op,
    limits: &Limits,
    capabilities: Capabilities,
    padded: bool,
) -> BoxFuture<'static, Result<()>> {
    let driver = request.node().driver().clone();
    let limits = *limits;
    let Op {
        action,
        offset,
        len,
        flags,
        ..
    } = op;
    let too_long = limits.max_transfer != 0 && len > limits.max_transfer;
    let flush_after =
        flags.contains(RequestFlags::FUA) && !capabilities.contains(Capabilities::FUA);
    match action {
        Action::Read(buf) => {
            if flags.contains(RequestFlags::COPY_ON_READ)
                && !capabilities.contains(Capabilities::COPY_ON_READ)
            {
                let ticket = share_ticket(held);
                return Box::pin(copy_on_read(request, ticket, offset, buf, flags));
            }
            if padded {
                Box::pin(padded_read(driver, request, offset, buf, limits))
            } else if too_long {
                Box::pin(split_read(driver, request, offset, buf, limits))
            } else {
                driver.read(request, offset, buf)
            }
        }
        Action::Write(buf) => {
            let passed = driver_flags(flags, capabilities);
            if !padded && !too_long && !flush_after && !request.node().is_debugged() {
                return driver.write(request, offset, buf, passed);
            }
            Box::pin(async move {
                if padded {
                    padded_write(&driver, &request, offset, buf, passed, &limits).await?;
                } else {
                    split_write(&driver, &request, offset, buf, passed, &limits).await?;
                }
                if flush_after {
                    super::ranged::flush_now(request).await
                } else {
                    Ok(())
                }
            })
        }
        Action::Zero => Box::pin(async move {
            let passed = driver_flags(flags, capabilities);
            request.debug_event(DebugEvent::PwritevZero).await;
            write_zeroes(
                &driver,
                &request,
                offset,
                len,
                passed,
                &limits,
                capabilities,
            )
            .await?;
            request.debug_event(DebugEvent::PwritevDone).await;
            if flush_after {
                super::ranged::flush_now(request).await
            } else {
                Ok(())
            }
        }),
        Action::Discard => {
            if capabilities.contains(Capabilities::DISCARD) {
                Box::pin(discard(driver, request, offset, len, limits))
            } else {
                Box::pin(async { Ok(()) })
            }
        }
        Action::Truncate(how) => Box::pin(truncate(driver, request, offset, how)),
    }
}

/// The ticket of the innermost level, for nested requests under it.
fn share_ticket(held: &mut Held) -> Option<Arc<Tracked>> {
    let completion = held.completions.last_mut()?;
    let shared = match completion.ticket.take()? {
        Ticket::Own(tracked) => Arc::new(tracked),
        Ticket::Shared(shared) => shared,
    };
    completion.ticket = Some(Ticket::Shared(shared.clone()));
    Some(shared)
}

/// The first piece of `len` bytes that fits `max` (0: no limit), which is made a multiple of `align`.
const fn piece(len: u64, max: u64, align: u64) -> u64 {
    let max = fit_max(max, align);
    if max != 0 && len > max { max } else { len }
}

/// One call, at once if the driver can.
async fn read_piece(
    driver: Arc<dyn BlockDriver>,
    request: Request,
    offset: u64,
    mut buf: IoBufMut,
) -> Result<()> {
    match driver.try_read(offset, &mut buf) {
        Attempt::Done(result) => result,
        Attempt::Left(done) => {
            drop(buf.split_to(done));
            driver.read(request, offset + done as u64, buf).await
        }
    }
}

/// One call, at once if the driver can.
async fn write_piece(
    driver: Arc<dyn BlockDriver>,
    request: Request,
    offset: u64,
    mut buf: IoBuf,
    flags: RequestFlags,
) -> Result<()> {
    match driver.try_write(offset, &buf, flags) {
        Attempt::Done(result) => result,
        Attempt::Left(done) => {
            drop(buf.split_to(done));
            driver
                .write(request, offset + done as u64, buf, flags)
                .await
        }
    }
}

async fn split_read(
    driver: Arc<dyn BlockDriver>,
    request: Request,
    mut offset: u64,
    mut buf: IoBufMut,
    limits: Limits,
) -> Result<()> {
    while !buf.is_empty() {
        let step = piece(
            buf.len() as u64,
            limits.max_transfer,
            limits.request_alignment,
        );
        let head = buf.split_to(step as usize);
        read_piece(driver.clone(), request.clone(), offset, head).await?;
        offset += step;
    }
    Ok(())
}

/// Reads the enlarged range and copies what was asked out of it.
async fn padded_read(
    driver: Arc<dyn BlockDriver>,
    request: Request,
    offset: u64,
    mut buf: IoBufMut,
    limits: Limits,
) -> Result<()> {
    let align = limits.request_alignment;
    let len = buf.len() as u64;
    let end = offset + len;
    let head = offset % align;
    let body_start = offset.next_multiple_of(align);
    let body_end = end - end % align;
    // Small, or nothing aligned inside: one bounce.
    if body_end <= body_start || len <= 4 * align {
        let start = offset - head;
        let block = read_block(
            &driver,
            &request,
            start,
            end.next_multiple_of(align) - start,
            &limits,
        )
        .await?;
        buf.copy_from_slice(0, &block[head as usize..(head + len) as usize]);
        return Ok(());
    }
    if head != 0 {
        let mut first = buf.split_to((body_start - offset) as usize);
        let block = read_block(&driver, &request, offset - head, align, &limits).await?;
        first.copy_from_slice(0, &block[head as usize..]);
    }
    let tail = buf.split_off((body_end - body_start) as usize);
    split_read(driver.clone(), request.clone(), body_start, buf, limits).await?;
    if !tail.is_empty() {
        let mut tail = tail;
        let block = read_block(&driver, &request, body_end, align, &limits).await?;
        let wanted = tail.len();
        tail.copy_from_slice(0, &block[..wanted]);
    }
    Ok(())
}

async fn read_block(
    driver: &Arc<dyn BlockDriver>,
    request: &Request,
    offset: u64,
    len: u64,
    limits: &Limits,
) -> Result<Buffer> {
    let align = limits.memory_alignment.max(4096);
    let (lent, buf) = Buffer::try_with_alignment(len as usize, align)?.lend();
    split_read(driver.clone(), request.clone(), offset, buf, *limits).await?;
    lent.reclaim()
        .map_err(|_| Error::io("a driver kept a part of a read buffer"))
}

async fn split_write(
    driver: &Arc<dyn BlockDriver>,
    request: &Request,
    mut offset: u64,
    mut buf: IoBuf,
    flags: RequestFlags,
    limits: &Limits,
) -> Result<()> {
    request.debug_event(DebugEvent::Pwritev).await;
    while !buf.is_empty() {
        let step = piece(
            buf.len() as u64,
            limits.max_transfer,
            limits.request_alignment,
        );
        let head = buf.split_to(step as usize);
        write_piece(driver.clone(), request.clone(), offset, head, flags).await?;
        offset += step;
    }
    request.debug_event(DebugEvent::PwritevDone).await;
    Ok(())
}

/// Reads the blocks at the ends that the write covers only in part, and writes the whole enlarged range.
async fn padded_write(
    driver: &Arc<dyn BlockDriver>,
    request: &Request,
    offset: u64,
    buf: IoBuf,
    flags: RequestFlags,
    limits: &Limits,
) -> Result<()> {
    let align = limits.request_alignment;
    let end = offset + buf.len() as u64;
    let start = offset - offset % align;
    let stop = end.next_multiple_of(align);
    let head_len = (offset - start) as usize;
    let tail_len = (stop - end) as usize;
    let last = stop - align;
    let mut head = IoBuf::new();
    let mut tail = IoBuf::new();
    if stop - start <= 2 * align {
        if head_len != 0 {
            request.debug_event(DebugEvent::PwritevRmwHead).await;
        }
        if tail_len != 0 {
            request.debug_event(DebugEvent::PwritevRmwTail).await;
        }
        let block = IoBuf::from(read_block(driver, request, start, stop - start, limits).await?);
        head = block.slice(..head_len);
        tail = block.slice(block.len() - tail_len..);
    } else {
        if head_len != 0 {
            request.debug_event(DebugEvent::PwritevRmwHead).await;
            let block = IoBuf::from(read_block(driver, request, start, align, limits).await?);
            head = block.slice(..head_len);
        }
        if tail_len != 0 {
            request.debug_event(DebugEvent::PwritevRmwTail).await;
            let block = IoBuf::from(read_block(driver, request, last, align, limits).await?);
            tail = block.slice(block.len() - tail_len..);
        }
    }
    if head_len != 0 {
        request.debug_event(DebugEvent::PwritevRmwAfterHead).await;
    }
    if tail_len != 0 {
        request.debug_event(DebugEvent::PwritevRmwAfterTail).await;
    }
    head.append(buf);
    head.append(tail);
    split_write(driver, request, start, head, flags, limits).await
}

/// Zero write: blocks that are covered in part are read, changed and written; the aligned middle stays a zero write as
/// long as the driver takes it.
async fn write_zeroes(
    driver: &Arc<dyn BlockDriver>,
    request: &Request,
    offset: u64,
    len: u64,
    flags: RequestFlags,
    limits: &Limits,
    capabilities: Capabilities,
) -> Result<()> {
    let align = limits.request_alignment.max(1);
    let (bulk, max) = bulk(align, limits.zeroes_alignment, limits.max_zeroes);
    let end = offset + len;
    let mut at = offset;
    // Once the driver has said that it can't do bulk zeroes, it isn't asked again in this request.
    let mut can = capabilities.contains(Capabilities::WRITE_ZEROES);
    while at < end {
        if at % align != 0 || end - at < align {
            let stop = (at - at % align + align).min(end);
            let zeroes = IoBuf::zeroes((stop - at) as usize);
            let data_flags = flags - RequestFlags::MAY_UNMAP - RequestFlags::NO_FALLBACK;
            padded_write(driver, request, at, zeroes, data_flags, limits).await?;
            at = stop;
            continue;
        }
        let aligned_end = end - end % align;
        let is_bulk = at % bulk == 0 && aligned_end - at >= bulk;
        let stop = bulk_stop(at, aligned_end, bulk, max);
        let step = stop - at;
        let mut done = false;
        if can {
            match driver
                .clone()
                .write_zeroes(request.clone(), at, step, flags)
                .await
            {
                Ok(()) => done = true,
                Err(error) if error.kind() == ErrorKind::NotSupported => {
                    if flags.contains(RequestFlags::NO_FALLBACK) {
                        return Err(error);
                    }
                    if is_bulk {
                        can = false;
                    }
                }
                Err(error) => return Err(error),
            }
        } else if flags.contains(RequestFlags::NO_FALLBACK) {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        if !done {
            let max = piece(MAX_ZERO_BUFFER, limits.max_transfer, align);
            let data_flags = flags - RequestFlags::MAY_UNMAP;
            let mut from = at;
            while from < stop {
                let len = (stop - from).min(max);
                let zeroes = IoBuf::zeroes(len as usize);
                driver
                    .clone()
                    .write(request.clone(), from, zeroes, data_flags)
                    .await?;
                from += len;
            }
        }
        at = stop;
    }
    Ok(())
}

/// The alignment of bulk calls and the largest call, both multiples of `align`. Where a whole bulk unit is more than a
/// call may have, there are none.
const fn bulk(align: u64, preferred: u64, max: u64) -> (u64, u64) {
    let bulk = if preferred > align { preferred } else { align };
    let max = match fit_max(max, align) {
        0 => u64::MAX,
        max => max,
    };
    if bulk > max {
        (align, max)
    } else {
        (bulk, max - max % bulk)
    }
}

/// Where a call that begins at `at` ends: head and tail that aren't whole bulk units go in calls of their own, and no
/// call is longer than `max`.
const fn bulk_stop(at: u64, end: u64, bulk: u64, max: u64) -> u64 {
    let rest = end - at;
    let head = (bulk - at % bulk) % bulk;
    let len = if head != 0 {
        if head < rest { head } else { rest }
    } else if rest >= bulk {
        rest - rest % bulk
    } else {
        rest
    };
    at + if len < max { len } else { max }
}

/// Discard: what isn't aligned is dropped, head and tail go in calls of their own, "can't" counts as done.
async fn discard(
    driver: Arc<dyn BlockDriver>,
    request: Request,
    offset: u64,
    len: u64,
    limits: Limits,
) -> Result<()> {
    let align = limits.request_alignment.max(1);
    let (bulk, max) = bulk(align, limits.discard_alignment, limits.max_discard);
    let node_end = request.node().length();
    let mut end = offset + len;
    // The short block at the node's end counts as whole.
    if end != node_end {
        end -= end % align;
    }
    let mut at = offset.next_multiple_of(align);
    while at < end {
        let stop = bulk_stop(at, end, bulk, max);
        match driver.clone().discard(request.clone(), at, stop - at).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotSupported => {}
            Err(error) => return Err(error),
        }
        at = stop;
    }
    Ok(())
}

async fn truncate(
    driver: Arc<dyn BlockDriver>,
    request: Request,
    length: u64,
    mut how: Truncate,
) -> Result<()> {
    if length > super::MAX_END {
        return Err(Error::new(ErrorKind::TooBig, "").with_field(
            "length",
            length,
            format!("at most {}", super::MAX_END),
        ));
    }
    let old = request.node().length();
    // What a longer backing file has beyond the old end must not show through.
    if length > old
        && request
            .backing()
            .is_some_and(|backing| backing.length() > old)
    {
        how.zero = true;
    }
    driver.truncate(request, length, how).await
}

/// Reads, and writes what came from below this layer into it, under the one ticket of the read.
async fn copy_on_read(
    request: Request,
    ticket: Option<Arc<Tracked>>,
    offset: u64,
    mut buf: IoBufMut,
    flags: RequestFlags,
) -> Result<()> {
    let Some(ticket) = ticket else {
        return Err(Error::io("copy-on-read without a ticket"));
    };
    let node = request.node().clone();
    let limits = node.limits();
    let granularity = limits
        .serialising_granularity
        .max(limits.request_alignment)
        .max(1);
    let most = fit_max(MAX_COPY_ON_READ, granularity);
    let prefetch = flags.contains(RequestFlags::PREFETCH);
    let end = offset + buf.len() as u64;
    let length = node.length();
    let mut at = offset;
    while at < end {
        let (allocated, run) = chain::is_allocated_at(&node, at, end - at).await?;
        let mut run = run.max(1).min(end - at);
        if !allocated {
            // Up to a whole number of clusters.
            run = run.min(most - at % granularity);
        }
        let out = buf.split_to(run as usize);
        if allocated {
            if !prefetch {
                node_read(&request, at, out).await?;
            }
        } else {
            // Whole clusters: the ticket holds them all.
            let start = at - at % granularity;
            let stop = (at + run).next_multiple_of(granularity).min(length);
            let data = read_own(&request, start, (stop - start) as usize).await?;
            let data = IoBuf::from(data);
            let mut out = out;
            if !prefetch {
                out.copy_from(
                    0,
                    &data.slice((at - start) as usize..(at - start + run) as usize),
                );
            }
            request.debug_event(DebugEvent::CorWrite).await;
            let op = if data.is_zero() {
                Op::zero(start, stop - start, RequestFlags::WRITE_UNCHANGED)
            } else {
                Op::write(start, data, RequestFlags::WRITE_UNCHANGED)
            };
            Box::pin(super::submit(
                node.clone(),
                Origin::Nested(ticket.clone()),
                op,
            ))
            .await?;
        }
        at += run;
    }
    Ok(())
}

async fn node_read(request: &Request, offset: u64, buf: IoBufMut) -> Result<()> {
    let node = request.node();
    let limits = node.limits();
    let align = limits.request_alignment;
    let driver = node.driver().clone();
    if align > 1 && (offset % align != 0 || buf.len() as u64 % align != 0) {
        padded_read(driver, request.clone(), offset, buf, limits).await
    } else {
        split_read(driver, request.clone(), offset, buf, limits).await
    }
}

async fn read_own(request: &Request, offset: u64, len: usize) -> Result<Buffer> {
    let (lent, buf) = Buffer::try_new(len)?.lend();
    node_read(request, offset, buf).await?;
    lent.reclaim()
        .map_err(|_| Error::io("a driver kept a part of a read buffer"))
}
