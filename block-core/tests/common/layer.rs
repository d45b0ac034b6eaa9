//! A layer that does what a test tells it to: holds requests back, maps, counts, calls the test in the middle.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Poll, Waker},
    time::Duration,
};

use super::{ALL, Disk};
use block_core::{
    ChildRole, IoBuf, IoBufMut, NodeSpec, RequestFlags, async_trait,
    driver::{BlockDriver, Capabilities, DriverKind, MapIntent, Mapping, Reopen, Truncate},
    env::Environment,
    error::Result,
    graph::Graph,
    handle::BlockHandle,
    image::{CheckMode, CheckReport, Progress},
    limits::Limits,
    node::{Edges, Node},
    request::Request,
    status::{DriverStatus, StatusFlags},
};
use futures::future::BoxFuture;
use parking_lot::Mutex;

pub const NONE: RequestFlags = RequestFlags::empty();

/// An environment that never runs a task.
pub struct NoTasks;
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
pub fn ends(work: impl FnOnce() + Send + 'static) -> bool {
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || {
        work();
        let _ = tx.send(());
    });
    rx.recv_timeout(Duration::from_secs(5)).is_ok()
}

pub type Hook = Mutex<Option<Box<dyn FnOnce() + Send>>>;

/// One layer that does what a test tells it to.
pub struct Layer {
    pub kind: DriverKind,
    pub capabilities: Mutex<Capabilities>,
    pub limits: Option<Limits>,
    /// As long as its file if there is none.
    pub length: Option<u64>,
    /// `try_map` says that bytes are in the file, from here on.
    pub map_at: Option<u64>,
    pub status: Mutex<Option<DriverStatus>>,
    pub in_length: Hook,
    pub in_map: Hook,
    pub polls: AtomicU64,
    pub closes: AtomicUsize,
    pub held: AtomicUsize,
    pub waiting: Mutex<Vec<Waker>>,
}

impl Layer {
    pub fn new(kind: DriverKind) -> Self {
        Self {
            kind,
            capabilities: Mutex::new(
                Capabilities::WRITE
                    | Capabilities::WRITE_ZEROES
                    | Capabilities::DISCARD
                    | Capabilities::BACKING,
            ),
            limits: None,
            length: None,
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
    pub fn mapped(mut self, at: u64) -> Self {
        self.map_at = Some(at);
        *self.capabilities.get_mut() |= Capabilities::TRY_MAP;
        self
    }
    pub fn hold(&self) {
        self.held.store(1, Ordering::SeqCst);
    }
    pub fn let_go(&self) {
        self.held.store(0, Ordering::SeqCst);
        for waker in std::mem::take(&mut *self.waiting.lock()) {
            waker.wake();
        }
    }
    pub async fn park(&self) {
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
        let length = self
            .length
            .unwrap_or_else(|| edges.primary().map_or(0, |child| child.length()));
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

/// A node with this layer over `node`, and a handle on it.
pub fn over(
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

/// An overlay that holds nothing: all its content comes from `base`.
pub fn overlay(graph: &Arc<Graph>, file: &Arc<Node>, base: &Arc<Node>) -> Arc<Node> {
    let layer = Layer::new(DriverKind::Format);
    *layer.status.lock() = Some(DriverStatus::unallocated(1));
    let spec = NodeSpec::new(Arc::new(layer))
        .with_child(ChildRole::DataFile, "file", file)
        .with_child(ChildRole::Backing, "backing", base);
    graph.add_node(spec).unwrap()
}

/// Lets others do at the disk what they like.
pub fn share(disk: &Disk) {
    disk.handle.set_permissions(ALL).unwrap();
}
