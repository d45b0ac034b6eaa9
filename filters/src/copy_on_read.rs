//! Copy-on-read: what a read finds below the filtered child is written into the child before the read returns.
//!
//! A read that has something to copy reserves its range at the child, rounded out to the child's clusters: it waits
//! for every request on that range which began before and holds back those that come later, so that the copy can never
//! land on top of a newer write. Reads and the copying write itself run nested under that reservation. What the child
//! holds already is just read, without a reservation.
//!
//! Nothing here touches the layers below the child other than by reading through it. Content as seen at the filter
//! never changes; the copies are `WRITE_UNCHANGED`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    buffer::{Buffer, IoBuf, IoBufMut},
    chain,
    driver::{
        BlockDriver, Capabilities, ChildRole, DriverKind, MapIntent, Mapping,
        default_child_permissions,
    },
    flags::{PermissionSet, Permissions, RequestFlags},
    limits::Limits,
    node::Edges,
    options::Options,
    registry::{DriverFactory, OpenContext, Opened},
    request::{Child, Request, Reservation},
};

use crate::passthrough::{self, Base};

/// The most that is copied in one go, and held in memory for it.
const CHUNK: u64 = 1 << 20;

/// The longest range that is reserved at once.
const MAX_TRANSFER: u64 = 16 << 20;

/// What [`populate`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Populated {
    /// Bytes copied into the node as data.
    pub copied: u64,
    /// Bytes copied into the node as zeroes.
    pub zeroed: u64,
}

/// A node that copies on read.
///
/// As a filter it needs consistent reads and unchanged writes of its child, and shares what its parents share.
pub struct CopyOnRead {
    base: Base,
    copied: AtomicU64,
    zeroed: AtomicU64,
    passed: AtomicU64,
}

impl CopyOnRead {
    /// A filter to be put over `child`. `read_only` is about what comes from above: copies are written regardless.
    pub fn new(child: &Child, read_only: bool) -> Self {
        Self {
            base: Base::new(child, read_only),
            copied: AtomicU64::new(0),
            zeroed: AtomicU64::new(0),
            passed: AtomicU64::new(0),
        }
    }

    /// Does for a range what a read of it would, without returning data, and tells how much had to be copied. For jobs
    /// that walk over a node (stream).
    ///
    /// Errors and cancellation are those of [`populate`].
    pub async fn prefetch(&self, child: &Child, offset: u64, len: u64) -> Result<Populated> {
        let done = populate(child, offset, len, None).await?;
        self.count(done);
        Ok(done)
    }

    fn count(&self, done: Populated) {
        self.copied.fetch_add(done.copied, Ordering::Relaxed);
        self.zeroed.fetch_add(done.zeroed, Ordering::Relaxed);
    }
}

/// Makes sure that `node` itself holds what it shows in `len` bytes from `offset`, and fills `buf` (which is as long as
/// the range) with it if there is one. The range must lie inside of the node.
///
/// # Errors
/// Those of reading the chain and of writing into the node: a copy that fails fails the read. What was copied
/// before the error stays copied, which changes nothing that anybody sees.
///
/// # Cancellation
/// Dropping the future ends it at a copy's boundary; a copy that has reached the driver is carried through.
pub async fn populate(
    node: &Child,
    offset: u64,
    len: u64,
    mut buf: Option<IoBufMut>,
) -> Result<Populated> {
    let mut done = Populated::default();
    let end = offset
        .checked_add(len)
        .ok_or_else(|| Error::invalid("offset overflow"))?;
    let mut at = offset;
    while at < end {
        // Reservations are bounded, however long the range.
        let step = (end - at).min(MAX_TRANSFER);
        let piece = buf.as_mut().map(|buf| buf.split_to(step as usize));
        let now = populate_step(node, at, step, piece).await?;
        done.copied += now.copied;
        done.zeroed += now.zeroed;
        at += step;
    }
    Ok(done)
}

async fn populate_step(
    node: &Child,
    offset: u64,
    len: u64,
    buf: Option<IoBufMut>,
) -> Result<Populated> {
    let done = Populated::default();
    if all_allocated(node, offset, len).await? {
        if let Some(buf) = buf {
            node.read(offset, buf).await?;
        }
        return Ok(done);
    }
    let reservation = node.reserve(offset, len).await?;
    Copier {
        node,
        reservation,
        offset,
        buf,
        done,
    }
    .run()
    .await
}

/// Whether the node itself holds all of the range, or there is nothing below that it could be copied from.
async fn all_allocated(node: &Child, offset: u64, len: u64) -> Result<bool> {
    if node.node().backing().is_none() {
        return Ok(true);
    }
    let mut at = offset;
    let end = offset + len;
    while at < end {
        let (allocated, known) = chain::is_allocated_at(node.node(), at, end - at).await?;
        if !allocated {
            return Ok(false);
        }
        at = advance(at, known)?;
    }
    Ok(true)
}

fn advance(at: u64, known: u64) -> Result<u64> {
    at.checked_add(known)
        .filter(|_| known > 0)
        .ok_or_else(|| Error::io("block status of no bytes"))
}

/// One reserved range on its way into the node.
struct Copier<'a> {
    node: &'a Child,
    reservation: Reservation,
    /// What was asked for begins here…
    offset: u64,
    /// … and this is what remains to be filled of it, if data was asked for.
    buf: Option<IoBufMut>,
    done: Populated,
}

impl Copier<'_> {
    async fn run(mut self) -> Result<Populated> {
        // Whole clusters are copied: a partial one would be filled up by the driver from the same place anyway.
        let range = self.reservation.range();
        let end = range.end().min(self.node.length());
        let mut at = range.start();
        // Whole clusters fit a chunk.
        let chunk = CHUNK.max(self.node.limits().serialising_granularity);
        while at < end {
            let wanted = end - at;
            let (allocated, known) = chain::is_allocated_at(self.node.node(), at, wanted).await?;
            let known = known.min(wanted);
            advance(at, known)?;
            if allocated {
                self.read_through(at, known).await?;
                at += known;
            } else {
                at += self.copy(at, known.min(chunk)).await?;
            }
        }
        // Whatever lies beyond the end of the node.
        if let Some(mut rest) = self.buf.take() {
            rest.fill(0);
        }
        Ok(self.done)
    }

    /// Cuts the piece of the destination off that the `len` bytes at `at` belong to. Pieces are asked for in ascending
    /// order and without gaps.
    fn destination(&mut self, at: u64, len: u64) -> Option<(u64, IoBufMut)> {
        let buf = self.buf.as_mut().filter(|buf| !buf.is_empty())?;
        let skip = self.offset.saturating_sub(at);
        let len = len
            .checked_sub(skip)
            .filter(|len| *len > 0)?
            .min(buf.len() as u64);
        let piece = buf.split_to(len as usize);
        let at = self.offset;
        self.offset += len;
        Some((at, piece))
    }

    async fn read_through(&mut self, at: u64, len: u64) -> Result<()> {
        match self.destination(at, len) {
            Some((at, piece)) => self.reservation.read(at, piece).await,
            None => Ok(()),
        }
    }

    /// Copies the start of `len` unallocated bytes at `at`, which begins a cluster, and tells how much: whole clusters,
    /// or all of it.
    async fn copy(&mut self, at: u64, len: u64) -> Result<u64> {
        let flags = RequestFlags::WRITE_UNCHANGED;
        let cluster = self.node.limits().serialising_granularity.max(1);
        let status = self.reservation.block_status(at, len).await?;
        let known = status.len.min(len);
        advance(at, known)?;
        let zeroes = if known == len {
            len
        } else {
            known - known % cluster
        };
        if status.is_zero() && zeroes > 0 {
            self.reservation.write_zeroes(at, zeroes, flags).await?;
            self.done.zeroed += zeroes;
            if let Some((_, mut piece)) = self.destination(at, zeroes) {
                piece.fill(0);
            }
            return Ok(zeroes);
        }
        // Holes in the storage below may be smaller than clusters: those are copied as data.
        let len = known.next_multiple_of(cluster).min(len);
        let (lent, whole) = Buffer::try_new(len as usize)?.lend();
        self.reservation.read(at, whole).await?;
        let data = lent
            .reclaim()
            .map(IoBuf::from)
            .map_err(|_| Error::io("a driver kept a part of a read buffer"))?;
        if let Some((from, mut piece)) = self.destination(at, len) {
            let skip = (from - at) as usize;
            let part = data.slice(skip..skip + piece.len());
            piece.copy_from(0, &part);
        }
        if data.is_zero() {
            self.reservation.write_zeroes(at, len, flags).await?;
            self.done.zeroed += len;
        } else {
            self.reservation.write(at, data, flags).await?;
            self.done.copied += len;
        }
        Ok(len)
    }
}

#[async_trait]
impl BlockDriver for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn capabilities(&self) -> Capabilities {
        self.base.capabilities() | Capabilities::COPY_ON_READ
    }

    fn limits(&self, edges: &Edges) -> Limits {
        Limits {
            max_transfer: MAX_TRANSFER,
            ..Limits::default()
        }
        .merge(passthrough::limits(edges))
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        let mut set = default_child_permissions(role, parents, self.base.is_read_only());
        set.used |= Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
        set
    }

    fn try_map(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        match (intent, passthrough::edge(edges)) {
            // Nothing is copied for a write.
            (MapIntent::Overwrite, Some(edge)) => Mapping::Data {
                edge,
                offset,
                len,
                pin: None,
            },
            _ => Mapping::NotCached,
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        let len = buf.len() as u64;
        let done = populate(request.file()?, offset, len, Some(buf)).await?;
        self.count(done);
        if done == Populated::default() {
            self.passed.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        request.file()?.write(offset, buf, flags).await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        request.file()?.write_zeroes(offset, len, flags).await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        request.file()?.discard(offset, len).await
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("copy-on-read-bytes", get(&self.copied)),
            ("copy-on-read-zeroes", get(&self.zeroed)),
            ("copy-on-read-passed", get(&self.passed)),
        ]
    }

    passthrough::pass_through!();
}

/// Makes `copy-on-read` nodes. Its one option is the child, `file`.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOnReadFactory;

#[async_trait]
impl DriverFactory for CopyOnReadFactory {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        if file.options().read_only {
            // What was read is written to it, whatever comes from above.
            return Err(Error::new(
                ErrorKind::AccessDenied,
                "Block node is read-only",
            ));
        }
        let child = Child::unattached(Arc::clone(&file));
        let driver = CopyOnRead::new(&child, context.node.read_only);
        Ok(passthrough::opened(Arc::new(driver), file))
    }
}
