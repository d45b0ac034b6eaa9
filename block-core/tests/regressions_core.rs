//! The core, where it once went wrong: each test is the smallest case of one bug.

mod common;

use std::{
    any::Any,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Poll, Waker},
    time::Duration,
};

use block_core::{
    ChildRole, IoBuf, IoBufMut, NodeSpec, Permissions, RequestFlags, async_trait,
    bitmap::DirtyBitmap,
    driver::{BlockDriver, Capabilities, DriverKind, MapIntent, Mapping, Reopen, Truncate},
    env::Environment,
    error::{ErrorKind, Result},
    flags::PermissionSet,
    graph::Graph,
    handle::BlockHandle,
    image::{CheckMode, CheckReport, Progress},
    limits::Limits,
    node::{Edges, Node},
    request::Request,
    status::{DriverStatus, StatusFlags},
};
use common::{ALL, Disk, Memory, disk, disk_in, env, poll_once};
use futures::{executor::block_on, future::BoxFuture};
use parking_lot::Mutex;

const NONE: RequestFlags = RequestFlags::empty();

/// An environment that never runs a task.
struct NoTasks;
impl Environment for NoTasks {
    fn now(&self) -> Duration {
        Duration::ZERO
    }
    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        // Kept for ever, never polled.
        std::mem::forget(task);
    }
    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        work();
    }
    fn random(&self) -> u64 {
        4
    }
}

/// Whether `work` ends within five seconds.
fn ends(work: impl FnOnce() + Send + 'static) -> bool {
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || {
        work();
        let _ = tx.send(());
    });
    rx.recv_timeout(Duration::from_secs(5)).is_ok()
}

type Hook = Mutex<Option<Box<dyn FnOnce() + Send>>>;

/// One layer that does what a test tells it to.
struct Layer {
    kind: DriverKind,
    capabilities: Mutex<Capabilities>,
    limits: Option<Limits>,
    map_at: Option<u64>,
    status: Mutex<Option<DriverStatus>>,
    in_length: Hook,
    in_map: Hook,
    polls: AtomicU64,
    closes: AtomicUsize,
    held: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
}

impl Layer {
    fn new(kind: DriverKind) -> Self {
        Self {
            kind,
            capabilities: Mutex::new(
                Capabilities::WRITE
                    | Capabilities::WRITE_ZEROES
                    | Capabilities::DISCARD
                    | Capabilities::BACKING,
            ),
            limits: None,
            map_at: None,
            status: Mutex::new(None),
            in_length: Mutex::new(None),
            in_map: Mutex::new(None),
            polls: AtomicU64::new(0),
            closes: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            waiting: Mutex::default(),
        }
    }
    fn mapped(mut self, at: u64) -> Self {
        self.map_at = Some(at);
        *self.capabilities.get_mut() |= Capabilities::TRY_MAP;
        self
    }
    fn hold(&self) {
        self.held.store(1, Ordering::SeqCst);
    }
    fn let_go(&self) {
        self.held.store(0, Ordering::SeqCst);
        for waker in std::mem::take(&mut *self.waiting.lock()) {
            waker.wake();
        }
    }
    async fn park(&self) {
        futures::future::poll_fn(|cx| {
            self.waiting.lock().push(cx.waker().clone());
            if self.held.load(Ordering::SeqCst) == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

#[async_trait]
impl BlockDriver for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }
    fn kind(&self) -> DriverKind {
        self.kind
    }
    fn capabilities(&self) -> Capabilities {
        *self.capabilities.lock()
    }
    fn length(&self, edges: &Edges) -> u64 {
        let length = edges.primary().map_or(0, |child| child.length());
        let hook = self.in_length.lock().take();
        if let Some(hook) = hook {
            hook();
        }
        length
    }
    fn limits(&self, edges: &Edges) -> Limits {
        self.limits.unwrap_or_else(|| {
            edges
                .primary()
                .map_or_else(Limits::default, |child| child.limits())
        })
    }
    fn try_map(&self, _: &Edges, offset: u64, len: u64, _: MapIntent) -> Mapping {
        let hook = self.in_map.lock().take();
        if let Some(hook) = hook {
            hook();
        }
        match self.map_at {
            Some(at) => Mapping::Data {
                edge: 0,
                offset: at + offset,
                len,
                pin: None,
            },
            None => Mapping::NotCached,
        }
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        // As a format does: what lies beyond the end of the file reads as zeroes.
        let file = request.file()?;
        let there = file.length().saturating_sub(offset).min(buf.len() as u64);
        let mut tail = buf.split_off(there as usize);
        tail.fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        file.read(offset, buf).await
    }
    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let file = request.file()?.clone();
        let mut inner = Box::pin(async move { file.write(offset, buf, flags).await });
        futures::future::poll_fn(|cx| {
            self.polls.fetch_add(1, Ordering::SeqCst);
            inner.as_mut().poll(cx)
        })
        .await
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
    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await
    }
    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        request.file()?.truncate(length, how).await
    }
    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        self.park().await;
        Ok(match *self.status.lock() {
            Some(status) => DriverStatus { len, ..status },
            None => DriverStatus {
                flags: StatusFlags::RAW | StatusFlags::OFFSET_VALID,
                len,
                file_offset: offset,
            },
        })
    }
    async fn check(
        self: Arc<Self>,
        request: Request,
        _: CheckMode,
        _: Progress,
    ) -> Result<CheckReport> {
        self.park().await;
        request.file()?.write(0, vec![9u8; 512], NONE).await?;
        Ok(CheckReport::default())
    }
    async fn change_backing(
        self: Arc<Self>,
        _: Request,
        _: Option<String>,
        _: Option<String>,
    ) -> Result<()> {
        Ok(())
    }
    async fn reopen(self: Arc<Self>, _: Request, changes: Reopen) -> Result<()> {
        match changes.read_only {
            Some(true) => *self.capabilities.lock() -= Capabilities::WRITE,
            Some(false) => *self.capabilities.lock() |= Capabilities::WRITE,
            None => {}
        }
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        self.closes.fetch_add(1, Ordering::SeqCst);
        self.park().await;
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn over(
    graph: &Arc<Graph>,
    layer: Layer,
    node: &Arc<Node>,
) -> (Arc<Layer>, Arc<Node>, Arc<BlockHandle>) {
    let role = match layer.kind {
        DriverKind::Filter => ChildRole::Filtered,
        _ => ChildRole::DataFile,
    };
    let driver = Arc::new(layer);
    let spec = NodeSpec::new(driver.clone()).with_child(role, "file", node);
    let node = graph.add_node(spec).unwrap();
    let handle = Arc::new(graph.attach(&node, ALL, "top").unwrap());
    (driver, node, handle)
}

fn share(disk: &Disk) {
    disk.handle.set_permissions(ALL).unwrap();
}

#[test]
fn dropped_requests_that_wait_at_a_childs_gate_are_polled_a_few_times_each() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph.clone(), Memory::new(1 << 16));
    share(&disk);
    let (layer, _, handle) = over(&graph, Layer::new(DriverKind::Filter), &disk.node);
    disk.memory.hold();
    let mut discard = pin!(disk.handle.discard(0, 4096));
    assert!(poll_once(discard.as_mut()).is_pending());
    let count: u64 = 6;
    for at in 0..count {
        let mut write = Box::pin(handle.write(at * 512, vec![1u8; 512], NONE));
        assert!(poll_once(write.as_mut()).is_pending());
    }
    layer.polls.store(0, Ordering::SeqCst);
    let mut flush = pin!(handle.flush());
    assert!(poll_once(flush.as_mut()).is_pending());
    let polls = layer.polls.load(Ordering::SeqCst);
    disk.memory.let_go();
    assert!(
        polls <= 8 * count,
        "one look at {count} dropped requests polled them {polls} times"
    );
}

#[test]
fn a_waiter_that_slept_before_the_request_was_dropped_still_finishes_it() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph, Memory::new(1 << 16));
    disk.memory.hold();
    let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
    assert!(poll_once(old.as_mut()).is_pending());
    let (handle, memory, node) = (disk.handle.clone(), disk.memory.clone(), disk.node.clone());
    let waiter = std::thread::spawn(move || block_on(handle.discard(0, 4096)));
    while node.stats().snapshot().gate_waits == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    drop(old);
    memory.let_go();
    assert!(
        ends(move || waiter.join().unwrap().unwrap()),
        "the discard waits for a dropped write that nobody polls"
    );
}

#[test]
fn a_drain_that_slept_before_the_request_was_dropped_still_finishes_it() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph.clone(), Memory::new(1 << 16));
    disk.memory.hold();
    let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
    assert!(poll_once(old.as_mut()).is_pending());
    let node = disk.node.clone();
    let drain = std::thread::spawn(move || drop(block_on(graph.drain(&node))));
    std::thread::sleep(Duration::from_millis(50));
    drop(old);
    disk.memory.let_go();
    assert!(ends(move || drain.join().unwrap()), "the drain hangs");
}

#[test]
fn a_drain_waits_for_a_dropped_write_of_a_handle_that_is_gone() {
    let graph = Graph::new(Arc::new(NoTasks));
    let mut disk = disk_in(graph.clone(), Memory::new(1 << 16));
    let second = graph.attach(&disk.node, ALL, "second").unwrap();
    disk.memory.hold();
    {
        let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
        assert!(poll_once(old.as_mut()).is_pending());
    }
    disk.handle = Arc::new(second); // drops the first handle
    let mut drain = Box::pin(graph.drain(&disk.node));
    assert!(
        poll_once(drain.as_mut()).is_pending(),
        "drained with a write in the driver"
    );
}

#[test]
fn a_drain_waits_for_a_status_request_whose_future_was_dropped() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph.clone(), Memory::new(1 << 16));
    disk.handle.set_permissions(PermissionSet::NONE).unwrap();
    let (layer, node, handle) = over(&graph, Layer::new(DriverKind::Format), &disk.node);
    layer.hold();
    {
        let mut status = Box::pin(handle.block_status(0, 512));
        assert!(poll_once(status.as_mut()).is_pending());
    }
    let mut drain = Box::pin(graph.drain(&node));
    assert!(
        poll_once(drain.as_mut()).is_pending(),
        "drained with a status request in the driver"
    );
}

#[test]
fn a_flush_through_a_filter_that_was_just_inserted_covers_earlier_writes() {
    let disk = disk(Memory::new(1 << 16));
    block_on(async {
        disk.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        let driver = Arc::new(Layer::new(DriverKind::Filter));
        let spec = NodeSpec::new(driver).with_child(ChildRole::Filtered, "file", &disk.node);
        let filter = disk.graph.add_node(spec).unwrap();
        disk.graph.insert_filter(&filter).await.unwrap();
        disk.handle.flush().await.unwrap();
    });
    assert_eq!(
        disk.memory.flushes.load(Ordering::SeqCst),
        1,
        "flush reported success, nothing was flushed"
    );
}

#[test]
fn a_flush_after_a_check_covers_what_the_check_wrote() {
    let disk = disk(Memory::new(1 << 16));
    share(&disk);
    let (layer, _, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    layer.hold();
    let mut check = pin!(handle.check(CheckMode::RepairAll, Progress::new()));
    assert!(poll_once(check.as_mut()).is_pending());
    block_on(handle.flush()).unwrap();
    let before = disk.memory.flushes.load(Ordering::SeqCst);
    layer.let_go();
    block_on(check).unwrap();
    block_on(handle.flush()).unwrap();
    assert!(
        disk.memory.flushes.load(Ordering::SeqCst) > before,
        "what the repair wrote wasn't flushed"
    );
}

#[test]
fn a_failed_flush_of_a_fua_write_fails_later_flushes() {
    let disk = disk(Memory::new(4096));
    block_on(async {
        disk.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        disk.memory.fail_flush.store(1, Ordering::SeqCst);
        assert!(
            disk.handle
                .write(512, vec![1u8; 512], RequestFlags::FUA)
                .await
                .is_err()
        );
        disk.memory.fail_flush.store(0, Ordering::SeqCst);
        assert!(
            disk.handle.flush().await.is_err(),
            "the first write may be lost, and flush says that it is durable"
        );
    });
}

#[test]
fn a_write_that_grows_the_node_is_recorded_in_its_bitmaps() {
    let disk = disk(Memory::new(4096));
    let bitmap = Arc::new(DirtyBitmap::new(4096, 512).unwrap());
    disk.node.add_bitmap(bitmap.clone());
    block_on(disk.handle.write(8192, vec![1u8; 512], NONE)).unwrap();
    assert_eq!(disk.node.length(), 8704);
    assert!(
        bitmap.is_dirty(8192),
        "the write past the old end isn't recorded"
    );
}

#[test]
fn a_write_that_looked_at_the_length_before_a_shrink_ended_is_refused() {
    let disk = disk(Memory::new(65536).without(Capabilities::GROW));
    share(&disk);
    let (layer, node, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    assert_eq!(node.length(), 65536);
    let shrinker = handle.clone();
    // Another thread gets in between the look at the length and the ticket.
    *layer.in_length.lock() = Some(Box::new(move || {
        std::thread::spawn(move || block_on(shrinker.truncate(4096, Truncate::default())))
            .join()
            .unwrap()
            .unwrap();
    }));
    let error = block_on(handle.write(8192, vec![5u8; 4096], NONE)).unwrap_err();
    assert_eq!(
        error.node().map(str::to_owned),
        Some(node.name().to_owned()),
        "the driver was given a request beyond the end: {error}"
    );
    assert_eq!(
        layer.polls.load(Ordering::SeqCst),
        0,
        "the driver was called"
    );
}

#[test]
fn a_copy_that_waits_to_be_let_in_doesnt_hold_up_a_drain() {
    let graph = Graph::new(env());
    let a = disk_in(graph.clone(), Memory::new(1 << 16));
    let b = disk_in(graph.clone(), Memory::new(1 << 16));
    let target_drained = block_on(graph.drain(&b.node));
    let mut copy = pin!(block_core::copy_range(
        &a.handle, 0, &b.handle, 0, 4096, NONE
    ));
    assert!(poll_once(copy.as_mut()).is_pending());
    // As replace_node does: both nodes, one after the other.
    let mut second = Box::pin(graph.drain(&a.node));
    let quiet = poll_once(second.as_mut()).is_ready();
    drop(target_drained);
    assert!(
        quiet,
        "a copy that isn't admitted anywhere counts as in flight"
    );
}

#[test]
fn a_copy_inside_one_file_doesnt_deadlock_with_a_zero_write_of_both_ends() {
    let graph = Graph::new(env());
    let disk = disk_in(graph.clone(), Memory::new(1 << 20));
    share(&disk);
    let (_, _, source) = over(&graph, Layer::new(DriverKind::Filter).mapped(0), &disk.node);
    let (to, _, target) = over(
        &graph,
        Layer::new(DriverKind::Filter).mapped(1 << 19),
        &disk.node,
    );
    let zero: Arc<Mutex<Option<BoxFuture<'static, Result<()>>>>> = Arc::default();
    let (slot, handle) = (zero.clone(), disk.handle.clone());
    *to.in_map.lock() = Some(Box::new(move || {
        let mut future: BoxFuture<'static, Result<()>> =
            Box::pin(async move { handle.write_zeroes(0, 1 << 20, NONE).await });
        let _ = future.as_mut().poll(&mut std::task::Context::from_waker(
            futures::task::noop_waker_ref(),
        ));
        *slot.lock() = Some(future);
    }));
    let done = ends(move || {
        block_on(async {
            let copy = block_core::copy_range(&source, 0, &target, 0, 4096, NONE);
            let mut copy = pin!(copy);
            let _ = poll_once(copy.as_mut());
            let zero = zero.lock().take();
            match zero {
                Some(zero) => {
                    let _ = futures::join!(copy, zero);
                }
                None => copy.await.unwrap(),
            }
        });
    });
    assert!(done, "the copy and the zero write wait for each other");
}

#[test]
fn a_read_that_maps_past_the_end_of_a_short_file_reads_as_on_the_long_way() {
    let disk = disk(Memory::new(4096));
    share(&disk);
    let driver = Arc::new(LongLayer(Layer::new(DriverKind::Filter).mapped(0)));
    let spec = NodeSpec::new(driver).with_child(ChildRole::Filtered, "file", &disk.node);
    let node = disk.graph.add_node(spec).unwrap();
    let handle = disk.graph.attach(&node, ALL, "top").unwrap();
    block_on(handle.read(4096 - 512, 1024)).expect("the driver would have padded it with zeroes");
}

/// A layer that is 64 KiB long whatever its file is.
struct LongLayer(Layer);
#[async_trait]
impl BlockDriver for LongLayer {
    fn name(&self) -> &'static str {
        "long"
    }
    fn kind(&self) -> DriverKind {
        self.0.kind
    }
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn length(&self, _: &Edges) -> u64 {
        65536
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    fn try_map(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        self.0.try_map(edges, offset, len, intent)
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let file = request.file()?;
        let there = file.length().saturating_sub(offset).min(buf.len() as u64);
        buf.split_off(there as usize).fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        file.read(offset, buf).await
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A raw format whose driver passes requests on as they are, over storage whose length isn't a multiple of its alignment.
struct Plain;
#[async_trait]
impl BlockDriver for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges.primary().map_or(0, |child| child.length())
    }
    fn limits(&self, edges: &Edges) -> Limits {
        edges
            .primary()
            .map_or_else(Limits::default, |child| child.limits())
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        request.file()?.read(offset, buf).await
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn the_last_bytes_of_a_raw_image_over_aligned_storage_can_be_read() {
    let limits = Limits {
        request_alignment: 512,
        ..Limits::default()
    };
    // The storage zero-fills the last block by itself: it is 1024 bytes in memory, 1000 bytes long.
    let graph = Graph::new(env());
    let storage = Arc::new(Clipped(Memory::new(1024).with_limits(limits)));
    let file = graph.add_node(NodeSpec::new(storage)).unwrap();
    let spec = NodeSpec::new(Arc::new(Plain)).with_child(ChildRole::DataFile, "file", &file);
    let node = graph.add_node(spec).unwrap();
    let set = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let handle = graph.attach(&node, set, "top").unwrap();
    block_on(handle.read(900, 100)).expect("inside the image");
}

struct Clipped(Memory);
#[async_trait]
impl BlockDriver for Clipped {
    fn name(&self) -> &'static str {
        "clipped"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn length(&self, _: &Edges) -> u64 {
        1000
    }
    fn limits(&self, _: &Edges) -> Limits {
        self.0.limits
    }
    async fn read(self: Arc<Self>, _: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let data = self.0.data.lock();
        let at = offset as usize;
        buf.copy_from_slice(0, &data[at..at + buf.len()]);
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn status_through_a_filter_ends_at_the_end() {
    let disk = disk(Memory::new(65536));
    share(&disk);
    let (_, _, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    let beyond = block_on(handle.block_status(65536, 512)).unwrap();
    assert_eq!(beyond.len, 0, "beyond the end there is nothing: {beyond:?}");
    let across = block_on(handle.block_status(0, 1 << 20)).unwrap();
    assert_eq!(across.len, 65536);
    assert!(across.flags.contains(StatusFlags::EOF), "{across:?}");
}

#[test]
fn status_of_an_enormous_range_through_a_filter_doesnt_panic() {
    let disk = disk(Memory::new(65536));
    share(&disk);
    let (_, _, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    block_on(async {
        handle.block_status(1, u64::MAX).await.unwrap();
        handle
            .is_allocated_above(None, false, 1, u64::MAX)
            .await
            .unwrap();
    });
}

#[test]
fn status_above_the_node_itself_asks_no_layer() {
    let disk = disk(Memory::new(65536));
    let node = disk.node.clone();
    let status = block_on(disk.handle.block_status_above(Some(&node), 0, 512)).unwrap();
    assert!(!status.is_allocated(), "{status:?}");
}

#[test]
fn raw_over_an_overlay_shows_what_the_backing_file_holds() {
    let disk = disk(Memory::new(65536));
    let graph = &disk.graph;
    share(&disk);
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(65536))))
        .unwrap();
    let overlay = Layer::new(DriverKind::Format);
    *overlay.status.lock() = Some(DriverStatus::unallocated(1));
    let overlay = graph
        .add_node(
            NodeSpec::new(Arc::new(overlay))
                .with_child(ChildRole::DataFile, "file", &file)
                .with_child(ChildRole::Backing, "backing", &disk.node),
        )
        .unwrap();
    let (_, _, raw) = over(graph, Layer::new(DriverKind::Format), &overlay);
    let status = block_on(raw.block_status(0, 4096)).unwrap();
    assert!(
        status.is_data(),
        "the backing file has data there: {status:?}"
    );
}

#[test]
fn a_node_that_two_release_at_once_is_closed_once() {
    let graph = Graph::new(env());
    let layer = Arc::new(Layer::new(DriverKind::Filter));
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(512))))
        .unwrap();
    let node = graph
        .add_node(NodeSpec::new(layer.clone()).with_child(ChildRole::Filtered, "file", &file))
        .unwrap();
    layer.hold();
    let mut one = pin!(graph.release(&node));
    let mut two = pin!(graph.release(&node));
    assert!(poll_once(one.as_mut()).is_pending());
    let second = poll_once(two.as_mut());
    layer.let_go();
    block_on(async {
        one.await.unwrap();
        if second.is_pending() {
            two.await.unwrap();
        }
    });
    assert_eq!(layer.closes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_node_that_is_being_closed_takes_no_new_handle() {
    let graph = Graph::new(env());
    let layer = Arc::new(Layer::new(DriverKind::Filter));
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(512))))
        .unwrap();
    let node = graph
        .add_node(NodeSpec::new(layer.clone()).with_child(ChildRole::Filtered, "file", &file))
        .unwrap();
    layer.hold();
    let mut release = pin!(graph.release(&node));
    assert!(poll_once(release.as_mut()).is_pending());
    let attached = graph.attach(&node, ALL, "late");
    layer.let_go();
    block_on(release).unwrap();
    assert!(attached.is_err(), "a handle on a node that is closed");
}

#[test]
fn a_write_that_waited_behind_a_drain_is_refused_when_the_permission_is_gone() {
    let disk = disk(Memory::new(4096));
    let drained = block_on(disk.graph.drain(&disk.node));
    let mut write = pin!(disk.handle.write(0, vec![1u8; 512], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    disk.handle.set_permissions(read_only).unwrap();
    drop(drained);
    let result = block_on(write);
    assert!(result.is_err(), "written without the permission");
}

#[test]
fn a_handle_without_write_permission_cant_change_the_header() {
    let disk = disk(Memory::new(4096));
    share(&disk);
    let (_, node, _) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let reader = disk.graph.attach(&node, read_only, "reader").unwrap();
    let error = block_on(reader.change_backing(Some("evil"), None)).expect_err("header changed");
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
}

#[test]
fn a_handle_without_write_permission_cant_copy_on_read() {
    let graph = Graph::new(env());
    let file = Arc::new(Memory::new(4096));
    let memory = graph.add_node(NodeSpec::new(file.clone())).unwrap();
    let base = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(4096))))
        .unwrap();
    let overlay = Layer::new(DriverKind::Format);
    *overlay.status.lock() = Some(DriverStatus::unallocated(1));
    let node = graph
        .add_node(
            NodeSpec::new(Arc::new(overlay))
                .with_child(ChildRole::DataFile, "file", &memory)
                .with_child(ChildRole::Backing, "backing", &base),
        )
        .unwrap();
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let reader = graph.attach(&node, read_only, "reader").unwrap();
    let buffer = block_core::buffer::Buffer::new(512);
    let (_lent, buf) = buffer.lend();
    let result = block_on(reader.readv(0, buf, RequestFlags::COPY_ON_READ));
    let log = file.log.lock().clone();
    assert!(
        result.is_err()
            || !log
                .iter()
                .any(|e| e.starts_with("write") || e.starts_with("zero")),
        "{log:?}"
    );
}

#[test]
fn copy_on_read_of_a_long_run_goes_in_pieces_of_a_mebibyte() {
    const LEN: usize = (4 << 20) + 512;
    let graph = Graph::new(env());
    let file = Arc::new(Memory::new(LEN));
    let memory = graph.add_node(NodeSpec::new(file.clone())).unwrap();
    let base = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(LEN))))
        .unwrap();
    let overlay = Layer::new(DriverKind::Format);
    *overlay.status.lock() = Some(DriverStatus::unallocated(1));
    let node = graph
        .add_node(
            NodeSpec::new(Arc::new(overlay))
                .with_child(ChildRole::DataFile, "file", &memory)
                .with_child(ChildRole::Backing, "backing", &base),
        )
        .unwrap();
    let handle = graph.attach(&node, ALL, "guest").unwrap();
    let (_lent, buf) = block_core::buffer::Buffer::new(LEN).lend();
    block_on(handle.readv(0, buf, RequestFlags::COPY_ON_READ)).unwrap();
    let copied: Vec<u64> = file
        .log
        .lock()
        .iter()
        .filter(|entry| !entry.starts_with("read"))
        .map(|entry| entry.split_once('+').unwrap().1.parse().unwrap())
        .collect();
    assert_eq!(copied, [1 << 20, 1 << 20, 1 << 20, 1 << 20, 512]);
}

#[test]
fn a_refused_reopen_leaves_the_image_as_it_was() {
    let graph = Graph::new(env());
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Layer::new(DriverKind::Protocol))))
        .unwrap();
    let layer = Arc::new(ReadOnlyFormat(Layer::new(DriverKind::Format)));
    *layer.0.capabilities.lock() -= Capabilities::WRITE;
    let node = graph
        .add_node(NodeSpec::new(layer.clone()).with_child(ChildRole::File, "file", &file))
        .unwrap();
    let unsharing = PermissionSet::new(
        Permissions::CONSISTENT_READ,
        Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
    );
    let _other = graph.attach(&file, unsharing, "other").unwrap();
    let changes = Reopen {
        read_only: Some(false),
        ..Reopen::default()
    };
    block_on(graph.reopen(&node, changes)).unwrap_err();
    assert!(
        !layer.capabilities().contains(Capabilities::WRITE),
        "refused, but the image is writable now"
    );
}

struct ReadOnlyFormat(Layer);
#[async_trait]
impl BlockDriver for ReadOnlyFormat {
    fn name(&self) -> &'static str {
        "format"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn length(&self, edges: &Edges) -> u64 {
        self.0.length(edges)
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        request.file()?.read(offset, buf).await
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn reopen(self: Arc<Self>, _: Request, changes: Reopen) -> Result<()> {
        match changes.read_only {
            Some(true) => *self.0.capabilities.lock() -= Capabilities::WRITE,
            _ => *self.0.capabilities.lock() |= Capabilities::WRITE,
        }
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn merged_limits_never_split_below_the_alignment() {
    let a = Limits {
        max_transfer: 2048,
        ..Limits::default()
    };
    let b = Limits {
        request_alignment: 4096,
        ..Limits::default()
    };
    let disk = disk(Memory::new(65536).with_limits(a.merge(b)));
    block_on(disk.handle.write(0, vec![1u8; 16384], NONE)).unwrap();
    for entry in disk.memory.log.lock().iter() {
        let (_, range) = entry.split_once(' ').unwrap();
        let (offset, len) = range.split_once('+').unwrap();
        let (offset, len): (u64, u64) = (offset.parse().unwrap(), len.parse().unwrap());
        assert!(offset % 4096 == 0 && len % 4096 == 0, "{entry}");
    }
}

#[test]
fn a_zero_write_never_exceeds_max_zeroes() {
    let limits = Limits {
        zeroes_alignment: 65536,
        max_zeroes: 4096,
        ..Limits::default()
    };
    let disk = disk(Memory::new(1 << 18).with_limits(limits));
    block_on(disk.handle.write_zeroes(4096, (1 << 18) - 4096, NONE)).unwrap();
    for entry in disk.memory.log.lock().iter() {
        let len: u64 = entry.split_once('+').unwrap().1.parse().unwrap();
        assert!(len <= 4096, "{entry}");
    }
}

#[test]
fn clearing_a_bitmap_at_the_end_of_the_number_space_doesnt_panic() {
    let bitmap = DirtyBitmap::new(4096, 512).unwrap();
    bitmap.clear(u64::MAX, 1);
}

#[test]
fn a_copy_through_a_write_through_handle_is_durable() {
    let graph = Graph::new(env());
    let storage = Arc::new(Copier(Memory::new(65536)));
    let node = graph.add_node(NodeSpec::new(storage.clone())).unwrap();
    let handle = graph.attach(&node, ALL, "guest").unwrap();
    handle.set_write_through(true);
    block_on(block_core::copy_range(
        &handle, 0, &handle, 32768, 4096, NONE,
    ))
    .unwrap();
    assert!(
        storage.0.flushes.load(Ordering::SeqCst) > 0,
        "nothing was flushed"
    );
}

struct Copier(Memory);
#[async_trait]
impl BlockDriver for Copier {
    fn name(&self) -> &'static str {
        "copier"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::COPY_RANGE
    }
    fn length(&self, _: &Edges) -> u64 {
        65536
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, _: Request, _: u64, mut buf: IoBufMut) -> Result<()> {
        buf.fill(0);
        Ok(())
    }
    async fn write(self: Arc<Self>, _: Request, _: u64, _: IoBuf, _: RequestFlags) -> Result<()> {
        Ok(())
    }
    async fn copy_range_from(
        self: Arc<Self>,
        _: Request,
        _: Arc<dyn BlockDriver>,
        _: u64,
        _: u64,
        _: u64,
    ) -> Result<()> {
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
