//! Handles: how a producer (guest device, export, job, tool) reaches a node. A handle holds permissions, can be
//! quiesced by a drain, and is where a request is admitted. It does nothing to the graph.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::{
    bitmap::Bitmaps,
    buffer::{Buffer, IoBuf, IoBufMut},
    chain,
    driver::{Capabilities, DriverKind, Reopen, Truncate},
    error::{Error, ErrorKind, Operation, Result},
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::Graph,
    image::{CheckMode, CheckReport, ImageInfo, Progress},
    limits::Limits,
    mutant,
    node::{Edges, Node},
    options::Options,
    path::{self, Op, Origin},
    producer::{ProducerId, on_behalf_of},
    snapshot::{NewSnapshot, SnapshotInfo, SnapshotKey},
    status::BlockStatus,
    tracked::{RequestKind, Tracked, TrackedRange},
};

/// The part of a handle that the graph and requests in flight share.
pub(crate) struct RootState {
    pub id: u64,
    pub name: String,
    pub node: ArcSwap<Node>,
    /// See [`Self::permissions`]: used in the low byte, shared in the high one.
    permissions: AtomicU16,
    in_flight: AtomicUsize,
    quiesced: AtomicUsize,
    /// Those who wait to be let in, and drains that wait for quiet.
    wakers: Mutex<Vec<Waker>>,
    write_through: AtomicBool,
}

impl RootState {
    pub(crate) fn new(id: u64, name: String, node: Arc<Node>, permissions: PermissionSet) -> Self {
        Self {
            id,
            name,
            node: ArcSwap::new(node),
            permissions: AtomicU16::new(pack(permissions)),
            in_flight: AtomicUsize::new(0),
            quiesced: AtomicUsize::new(0),
            wakers: Mutex::default(),
            write_through: AtomicBool::new(false),
        }
    }

    /// What the handle uses and shares, as last committed.
    #[inline]
    pub(crate) fn permissions(&self) -> PermissionSet {
        let [used, shared] = self.permissions.load(Ordering::SeqCst).to_le_bytes();
        PermissionSet {
            used: Permissions::from_bits_retain(used),
            shared: Permissions::from_bits_retain(shared),
        }
    }

    pub(crate) fn set_permissions(&self, set: PermissionSet) {
        self.permissions.store(pack(set), Ordering::SeqCst);
    }

    fn wake_all(&self) {
        let wakers = std::mem::take(&mut *self.wakers.lock());
        for waker in wakers {
            waker.wake();
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<RootGuard> {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        let guard = RootGuard(self.clone());
        if self.quiesced.load(Ordering::SeqCst) == 0 {
            Some(guard)
        } else {
            None
        }
    }

    /// Admits a request, or waits while the handle is quiesced. Dropping the future leaves no trace.
    pub(crate) async fn enter(self: &Arc<Self>) -> RootGuard {
        if let Some(guard) = self.try_enter() {
            return guard;
        }
        futures::future::poll_fn(|cx| {
            // Registered first, so that a resume between the two is not missed.
            self.wake_when_idle(cx.waker());
            if self.quiesced.load(Ordering::SeqCst) != 0 {
                return Poll::Pending;
            }
            match self.try_enter() {
                Some(guard) => Poll::Ready(guard),
                None => Poll::Pending,
            }
        })
        .await
    }

    pub(crate) fn quiesce(&self) {
        self.quiesced.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn resume(&self) {
        if self.quiesced.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.wake_all();
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::SeqCst) == 0
    }

    /// Has `waker` woken when the handle may have become idle, or been let go.
    pub(crate) fn wake_when_idle(&self, waker: &Waker) {
        let mut wakers = self.wakers.lock();
        if !wakers.iter().any(|other| other.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }
}

const fn pack(set: PermissionSet) -> u16 {
    u16::from_le_bytes([set.used.bits(), set.shared.bits()])
}

/// One admitted request. It counts until it is dropped, which is when the request's last I/O has ended.
pub(crate) struct RootGuard(Arc<RootState>);

impl RootGuard {
    pub(crate) fn producer(&self) -> ProducerId {
        ProducerId::new(self.0.id)
    }
}

impl Drop for RootGuard {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1
            && self.0.quiesced.load(Ordering::SeqCst) != 0
        {
            self.0.wake_all();
        }
    }
}

/// A producer's way to a node.
///
/// Handles aren't `Clone`; share one in an `Arc`. Dropping a handle gives its permissions back; what it began runs to
/// its end.
///
/// Cancellation, for all requests: one that still waits (for a drain to end, at the gate) leaves no trace when its
/// future is dropped. One that has reached a driver runs to its end in the background, and holds back overlapping
/// requests until then; its outcome is lost. Flush and drain wait for it.
///
/// Errors name the node and file where they happened, the operation, offset and length.
pub struct BlockHandle {
    root: Arc<RootState>,
    graph: Weak<Graph>,
}

impl BlockHandle {
    pub(crate) fn new(root: Arc<RootState>, graph: &Arc<Graph>) -> Self {
        Self {
            root,
            graph: Arc::downgrade(graph),
        }
    }

    /// The name given when it was made, for messages.
    pub fn name(&self) -> &str {
        &self.root.name
    }

    /// Who its requests say that they come from.
    pub fn producer(&self) -> ProducerId {
        ProducerId::new(self.root.id)
    }

    /// The node that it is attached to, now.
    pub fn node(&self) -> Arc<Node> {
        self.root.node.load_full()
    }

    pub(crate) fn root(&self) -> &Arc<RootState> {
        &self.root
    }

    /// The graph that the node is in.
    pub fn graph(&self) -> Result<Arc<Graph>> {
        self.graph
            .upgrade()
            .ok_or_else(|| Error::new(ErrorKind::NoMedium, "the graph is gone"))
    }

    /// What it uses and shares.
    pub fn permissions(&self) -> PermissionSet {
        self.root.permissions()
    }

    /// Requests of this handle that have been admitted and have not ended.
    pub fn in_flight(&self) -> usize {
        self.root.in_flight()
    }

    /// With `true`, every write is durable when it completes (cache mode writethrough).
    pub fn set_write_through(&self, on: bool) {
        self.root.write_through.store(on, Ordering::SeqCst);
    }

    /// The node's length in bytes.
    pub fn length(&self) -> u64 {
        self.root.node.load().length()
    }

    /// The node's limits.
    pub fn limits(&self) -> Limits {
        self.root.node.load().limits()
    }

    fn need(&self, wanted: Permissions, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let used = self.root.permissions().used;
        if used.contains(wanted)
            || wanted == Permissions::WRITE && mutant::is_active("path-write-permission-unchecked")
        {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotPermitted,
            format!(
                "handle '{}' has no '{}' permission",
                self.root.name,
                (wanted - used).name()
            ),
        )
        .with_operation(operation, offset, len)
        .with_node(self.node().name()))
    }

    fn need_write(
        &self,
        flags: RequestFlags,
        operation: Operation,
        at: u64,
        len: u64,
    ) -> Result<()> {
        let used = self.root.permissions().used;
        if flags.contains(RequestFlags::WRITE_UNCHANGED)
            && used.intersects(Permissions::WRITE_UNCHANGED | Permissions::WRITE)
        {
            return Ok(());
        }
        self.need(Permissions::WRITE, operation, at, len)
    }

    pub(crate) async fn enter(&self) -> RootGuard {
        self.root.enter().await
    }

    pub(crate) fn try_enter(&self) -> Option<RootGuard> {
        self.root.try_enter()
    }

    pub(crate) fn is_write_through(&self) -> bool {
        self.root.write_through.load(Ordering::Relaxed)
    }

    /// Whether the handle may do this: before it waits, so that it is told at once, and again when it was let in.
    fn may(&self, op: &Op) -> Result<()> {
        let (operation, at, len) = (op.operation(), op.offset, op.len);
        match op.action {
            path::Action::Read(_) if op.flags.contains(RequestFlags::COPY_ON_READ) => {
                self.need_write(RequestFlags::WRITE_UNCHANGED, operation, at, len)
            }
            path::Action::Read(_) => Ok(()),
            path::Action::Write(_) | path::Action::Zero => {
                self.need_write(op.flags, operation, at, len)
            }
            path::Action::Discard => self.need(Permissions::WRITE, operation, at, len),
            path::Action::Truncate(_) => self.need(Permissions::RESIZE, operation, at, len),
        }
    }

    async fn submit(&self, mut op: Op) -> Result<()> {
        self.may(&op)?;
        let guard = self.root.enter().await;
        self.may(&op)?;
        op.may_grow = op.may_grow && self.root.permissions().used.contains(Permissions::RESIZE);
        if self.is_write_through() && !matches!(op.action, path::Action::Read(_)) {
            op.flags |= RequestFlags::FUA;
        }
        let node = self.root.node.load_full();
        path::submit(node, Origin::Root(guard), op).await
    }

    /// Admits an operation that is made of several requests to children of the handle's node.
    ///
    /// Cancellation: a wait (for a drain to end) that is dropped leaves no trace.
    pub async fn admit(&self) -> Admission {
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        Admission {
            edges: node.edges(),
            ticket: None,
            node,
            _guard: guard,
        }
    }

    /// The same, with a serialising ticket over a range of the handle's node, rounded out to its serialising
    /// granularity: waits for every overlapping request that began before, holds back those that come later.
    ///
    /// Cancellation: a wait (for a drain to end, at the gate) that is dropped leaves no trace.
    pub async fn admit_serialising(&self, offset: u64, len: u64) -> Admission {
        let mut admission = self.admit().await;
        let range = path::round_out(&admission.node, offset, len);
        let pending = admission
            .node
            .tracker()
            .begin(range, true, RequestKind::Reserve);
        admission.ticket = Some(match pending.into_ready() {
            Ok(tracked) => tracked,
            Err(pending) => path::wait_at_gate(&admission.node, pending).await,
        });
        admission.edges = admission.node.edges();
        admission
    }

    /// Reads `len` bytes at `offset` into a new buffer.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Buffer> {
        self.read_into(offset, Buffer::try_new(len)?).await
    }

    /// Fills `buffer` from `offset` and gives it back.
    pub async fn read_into(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        let (lent, buf) = buffer.lend();
        self.readv(offset, buf, RequestFlags::empty()).await?;
        lent.reclaim()
            .map_err(|_| Error::io("a driver kept a part of a read buffer"))
    }

    /// Fills the segments of `buf` from `offset`.
    pub async fn readv(&self, offset: u64, buf: IoBufMut, flags: RequestFlags) -> Result<()> {
        self.submit(Op::read(offset, buf, flags)).await
    }

    /// Writes `buf` at `offset`. With ZERO_WRITE among the flags only its length counts.
    pub async fn write(
        &self,
        offset: u64,
        buf: impl Into<IoBuf>,
        flags: RequestFlags,
    ) -> Result<()> {
        self.submit(Op::write(offset, buf.into(), flags)).await
    }

    /// Makes a range read as zeroes; with MAY_UNMAP it may be deallocated.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        self.submit(Op::zero(offset, len, flags)).await
    }

    /// Tells that the content of a range isn't needed any more.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.submit(Op::discard(offset, len)).await
    }

    /// Makes everything durable that completed before, waiting for dropped requests as well.
    pub async fn flush(&self) -> Result<()> {
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        if !mutant::is_active("flush-ignores-dropped-requests") {
            path::settle(&node).await;
        }
        path::flush(&node, Some(guard)).await
    }

    /// Changes the length to `length` bytes.
    pub async fn truncate(&self, length: u64, how: Truncate) -> Result<()> {
        self.submit(Op::truncate(length, how)).await
    }

    /// What the start of the range is made of, through the whole chain; zero detection asks the storage for holes.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.block_status_above(None, offset, len).await
    }

    /// The same, as far as the layers above `base` decide.
    pub async fn block_status_above(
        &self,
        base: Option<&Arc<Node>>,
        offset: u64,
        len: u64,
    ) -> Result<BlockStatus> {
        let _guard = self.root.enter().await;
        let node = self.root.node.load_full();
        let status = chain::block_status(&node, base, offset, len, true);
        on_behalf_of(self.producer(), status).await
    }

    /// Whether a layer from the handle's node down to above `base` (or including it) decides the content at
    /// `offset`, and for how many bytes the answer holds.
    pub async fn is_allocated_above(
        &self,
        base: Option<&Arc<Node>>,
        include_base: bool,
        offset: u64,
        len: u64,
    ) -> Result<(bool, u64)> {
        let _guard = self.root.enter().await;
        let node = self.root.node.load_full();
        let allocated = chain::is_allocated_above(&node, base, include_base, offset, len);
        on_behalf_of(self.producer(), allocated).await
    }

    /// What the image says of itself.
    pub async fn info(&self) -> Result<ImageInfo> {
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        let driver = node.driver().clone();
        path::unranged(&node, Some(guard), move |request| driver.info(request)).await
    }

    /// Checks and repairs the image. Other requests wait meanwhile.
    pub async fn check(&self, mode: CheckMode, progress: Progress) -> Result<CheckReport> {
        if mode != CheckMode::ReadOnly {
            self.need(Permissions::WRITE, Operation::Check, 0, 0)?;
        }
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        path::settle(&node).await;
        let driver = node.driver().clone();
        path::exclusive(&node, Some(guard), move |request| {
            driver.check(request, mode, progress)
        })
        .await
    }

    /// Records another backing file in the header. The graph isn't changed.
    pub async fn change_backing(&self, file: Option<&str>, format: Option<&str>) -> Result<()> {
        self.need(Permissions::WRITE, Operation::Write, 0, 0)?;
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        change_backing(&node, Some(guard), file, format).await
    }

    /// Changes what the image was made with; see [`crate::driver::BlockDriver::amend`]. Other requests wait meanwhile.
    ///
    /// Cancellation: goes on in the background. [`Progress::cancel`] ends it at its next safe place.
    ///
    /// # Errors
    /// EPERM without the permission to write (and, for another size, to resize); ENOTSUP when the format can't; EINVAL for
    /// options that it doesn't take or that don't go together, with nothing changed.
    pub async fn amend(&self, options: Options, force: bool, progress: Progress) -> Result<()> {
        let mut need = Permissions::WRITE;
        if options.get("size").is_some() {
            need |= Permissions::RESIZE;
        }
        self.need(need, Operation::Write, 0, 0)?;
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        path::settle(&node).await;
        let driver = node.driver().clone();
        path::exclusive(&node, Some(guard), move |request| {
            driver.amend(request, options, force, progress)
        })
        .await
    }

    /// Drops all data of this layer.
    pub async fn make_empty(&self) -> Result<()> {
        self.need(Permissions::WRITE, Operation::Discard, 0, 0)?;
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        let driver = node.driver().clone();
        path::exclusive(&node, Some(guard), move |request| {
            driver.make_empty(request)
        })
        .await
    }

    /// The internal snapshots of the image, oldest first. Filters are looked through.
    ///
    /// # Errors
    /// ENOTSUP when the format has none.
    pub async fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>> {
        let guard = self.root.enter().await;
        let node = below_filters(self.root.node.load_full());
        let driver = node.driver().clone();
        path::unranged(&node, Some(guard), move |request| {
            driver.snapshot_list(request)
        })
        .await
    }

    /// Keeps the present state of the disk, with all that has completed, as an internal snapshot. Other requests wait
    /// meanwhile. Filters are looked through: the disk's content doesn't change.
    ///
    /// Cancellation: `progress` stops it at the next safe place, without a trace. When the future is dropped, it runs to
    /// its end like any request that has reached a driver.
    ///
    /// # Errors
    /// ENOTSUP when the image can't have snapshots; EINVAL when a refcount would overflow; whatever the storage reports.
    /// Nothing was changed then.
    pub async fn snapshot_create(
        &self,
        new: NewSnapshot,
        progress: Progress,
    ) -> Result<SnapshotInfo> {
        self.need(Permissions::WRITE, Operation::Snapshot, 0, 0)?;
        let guard = self.root.enter().await;
        let node = below_filters(self.root.node.load_full());
        path::settle(&node).await;
        let driver = node.driver().clone();
        path::exclusive(&node, Some(guard), move |request| {
            driver.snapshot_create(request, new, progress)
        })
        .await
    }

    /// Makes the disk what it was when a snapshot was taken, its size included. Other requests wait meanwhile.
    ///
    /// Cancellation: as [`Self::snapshot_create`].
    ///
    /// # Errors
    /// EBUSY while the node has dirty bitmaps, which know nothing of what changes; ENOENT; ENOTSUP, also when the handle's
    /// node is a filter, which would not see the content change.
    pub async fn snapshot_apply(&self, which: SnapshotKey, progress: Progress) -> Result<()> {
        let wanted = Permissions::WRITE | Permissions::RESIZE;
        self.need(wanted, Operation::Snapshot, 0, 0)?;
        let guard = self.root.enter().await;
        let node = self.root.node.load_full();
        path::settle(&node).await;
        let driver = node.driver().clone();
        let changed = node.clone();
        path::exclusive(&node, Some(guard), move |request| {
            Box::pin(async move {
                if !changed.bitmaps().is_empty() {
                    let message = "Device has active dirty bitmaps";
                    return Err(Error::new(ErrorKind::Busy, message));
                }
                let applied = driver.snapshot_apply(request, which, progress).await;
                // One may have been added meanwhile.
                changed.resize_bitmaps(changed.length());
                changed.mark_dirty(0, changed.length());
                changed.refresh_limits();
                applied
            })
        })
        .await
    }

    /// Removes an internal snapshot. Other requests wait meanwhile. Filters are looked through.
    ///
    /// Cancellation and errors: as [`Self::snapshot_create`]; ENOENT when there is no such snapshot.
    pub async fn snapshot_delete(&self, which: SnapshotKey, progress: Progress) -> Result<()> {
        self.need(Permissions::WRITE, Operation::Snapshot, 0, 0)?;
        let guard = self.root.enter().await;
        let node = below_filters(self.root.node.load_full());
        path::settle(&node).await;
        let driver = node.driver().clone();
        path::exclusive(&node, Some(guard), move |request| {
            driver.snapshot_delete(request, which, progress)
        })
        .await
    }

    /// Reads `len` bytes at byte `position` of the VM state: what is kept beside the disk, and goes into the next snapshot. What was
    /// never written reads as zeroes. Other requests wait meanwhile. Filters are looked through.
    ///
    /// # Errors
    /// ENOTSUP when the format has none; EIO for what lies beyond all that it can hold.
    pub async fn read_vm_state(&self, position: u64, len: usize) -> Result<Buffer> {
        let operation = Operation::Read;
        check_vm_state(operation, position, len as u64)?;
        let guard = self.root.enter().await;
        let node = below_filters(self.root.node.load_full());
        let driver = node.driver().clone();
        let (lent, buf) = Buffer::try_new(len)?.lend();
        path::exclusive(&node, Some(guard), move |request| {
            driver.read_vm_state(request, position, buf)
        })
        .await
        .map_err(|error| error.with_operation(operation, position, len as u64))?;
        lent.reclaim()
            .map_err(|_| Error::io("a driver kept a part of a read buffer"))
    }

    /// Writes `buf` at byte `position` of the VM state. The disk's content and size stay as they are; a change of its size drops all VM
    /// state that is in no snapshot. Other requests wait meanwhile. Filters are looked through.
    ///
    /// Cancellation: runs to its end, once it has reached the driver.
    ///
    /// # Errors
    /// EPERM without the permission to write; ENOTSUP when the image has no place for it; EFBIG beyond all that it can
    /// hold; whatever the storage reports.
    pub async fn write_vm_state(&self, position: u64, buf: impl Into<IoBuf>) -> Result<()> {
        let buf: IoBuf = buf.into();
        let (operation, len) = (Operation::Write, buf.len() as u64);
        self.need(Permissions::WRITE, operation, position, len)?;
        check_vm_state(operation, position, len)?;
        let guard = self.root.enter().await;
        let node = below_filters(self.root.node.load_full());
        path::settle(&node).await;
        let driver = node.driver().clone();
        path::exclusive(&node, Some(guard), move |request| {
            driver.write_vm_state(request, position, buf)
        })
        .await
        .map_err(|error| error.with_operation(operation, position, len))
    }

    /// The bitmaps of the handle's node that users know by name.
    pub fn named_bitmaps(&self) -> Bitmaps {
        Bitmaps::of_handle(self.root.clone())
    }

    /// Changes options of the open image, drained. A failed flush is forgotten: from here on the image starts anew.
    pub async fn reopen(&self, changes: Reopen) -> Result<()> {
        let node = self.node();
        self.graph()?.reopen(&node, changes).await
    }

    /// Changes what the handle uses and shares.
    ///
    /// # Errors
    /// EPERM-like conflict errors, with nothing changed.
    pub fn set_permissions(&self, set: PermissionSet) -> Result<()> {
        self.graph()?.set_root_permissions(&self.root, set)
    }

    /// Flushes, detaches, and closes the node if nobody else uses it and the program doesn't keep it
    /// ([`Graph::keep`]). The first error is returned; the handle is gone in any case.
    pub async fn close(self) -> Result<()> {
        let node = self.node();
        let graph = self.graph()?;
        let flushed = if self
            .permissions()
            .used
            .intersects(Permissions::WRITE | Permissions::WRITE_UNCHANGED)
        {
            self.flush().await
        } else {
            Ok(())
        };
        drop(self);
        graph.collect_orphans().await;
        let closed = graph.collect(&node).await;
        flushed.and(closed)
    }
}

/// An operation of a producer that was admitted as a whole. While it lasts it counts as in flight at its handle: a drain
/// waits for it, and doesn't stop what it asks of the node's children. Whoever holds one has to get on with it, and must
/// not ask for another admission or for a change of the graph meanwhile.
pub struct Admission {
    node: Arc<Node>,
    edges: Arc<Edges>,
    ticket: Option<Tracked>,
    _guard: RootGuard,
}

impl Admission {
    /// The node that the operation is at.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The node's children, which stay as they are while the admission lasts.
    pub fn edges(&self) -> &Arc<Edges> {
        &self.edges
    }

    /// The range that it holds, if it is serialising.
    pub fn range(&self) -> Option<TrackedRange> {
        self.ticket.as_ref().map(Tracked::range)
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Admission at '{}'", self.node.name())
    }
}

/// The first node on the way down that is no filter, or that has snapshots itself.
fn below_filters(mut node: Arc<Node>) -> Arc<Node> {
    while node.driver().kind() == DriverKind::Filter
        && !node
            .driver()
            .capabilities()
            .contains(Capabilities::SNAPSHOTS)
    {
        let edges = node.edges();
        let Some(child) = edges.primary() else { break };
        node = child.node().clone();
    }
    node
}

/// The bounds of every request, for VM state.
fn check_vm_state(operation: Operation, position: u64, len: u64) -> Result<()> {
    let inside = position
        .checked_add(len)
        .is_some_and(|end| end <= path::MAX_END && len <= path::MAX_DATA);
    if inside {
        return Ok(());
    }
    let error =
        Error::io("VM state ends beyond the largest offset possible, or is longer than 2 GiB");
    Err(error.with_operation(operation, position, len))
}

/// Rewrites the backing file's name in the header of `node`.
pub(crate) async fn change_backing(
    node: &Arc<Node>,
    guard: Option<RootGuard>,
    file: Option<&str>,
    format: Option<&str>,
) -> Result<()> {
    let driver = node.driver().clone();
    let (file, format) = (file.map(str::to_owned), format.map(str::to_owned));
    path::exclusive(node, guard, move |request| {
        driver.change_backing(request, file, format)
    })
    .await
}

impl Drop for BlockHandle {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.upgrade() {
            graph.detach(&self.root);
        }
    }
}

impl fmt::Debug for BlockHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "BlockHandle '{}' on '{}'",
            self.root.name,
            self.node().name()
        )
    }
}
