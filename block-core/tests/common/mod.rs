//! A small environment, and storage in memory that can hold requests back, for tests of the core alone.
#![allow(dead_code)]

pub mod layer;

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use block_core::{
    async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Truncate},
    env::Environment,
    error::{Error, ErrorKind, Result},
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::{Graph, NodeSpec},
    handle::BlockHandle,
    limits::Limits,
    node::{Edges, Node},
    request::Request,
};
use futures::future::BoxFuture;
use parking_lot::Mutex;

/// Threads for tasks; no timers worth the name.
pub struct TestEnv(Instant);

impl Environment for TestEnv {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(async move { std::thread::sleep(duration) })
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        std::thread::spawn(move || futures::executor::block_on(task));
    }
    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        std::thread::spawn(work);
    }
    fn random(&self) -> u64 {
        4
    }
}

pub fn env() -> Arc<dyn Environment> {
    Arc::new(TestEnv(Instant::now()))
}

/// Memory that remembers what reached it.
pub struct Memory {
    pub data: Mutex<Vec<u8>>,
    pub limits: Limits,
    pub capabilities: Capabilities,
    pub log: Mutex<Vec<String>>,
    pub flushes: AtomicU64,
    pub fail_flush: AtomicUsize,
    held: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
    pub parked: AtomicUsize,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        Self {
            data: Mutex::new(vec![0; len]),
            limits: Limits::default(),
            capabilities: Capabilities::WRITE
                | Capabilities::WRITE_ZEROES
                | Capabilities::DISCARD
                | Capabilities::TRUNCATE
                | Capabilities::GROW,
            log: Mutex::default(),
            flushes: AtomicU64::new(0),
            fail_flush: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            waiting: Mutex::default(),
            parked: AtomicUsize::new(0),
        }
    }

    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    pub fn without(mut self, capabilities: Capabilities) -> Self {
        self.capabilities -= capabilities;
        self
    }

    /// From here on every data request parks before it takes effect.
    pub fn hold(&self) {
        self.held.store(1, Ordering::SeqCst);
    }

    pub fn let_go(&self) {
        self.held.store(0, Ordering::SeqCst);
        for waker in std::mem::take(&mut *self.waiting.lock()) {
            waker.wake();
        }
    }

    async fn park(&self) {
        let mut counted = false;
        futures::future::poll_fn(|cx| {
            self.waiting.lock().push(cx.waker().clone());
            if self.held.load(Ordering::SeqCst) == 0 {
                if counted {
                    self.parked.fetch_sub(1, Ordering::SeqCst);
                }
                return Poll::Ready(());
            }
            if !counted {
                counted = true;
                self.parked.fetch_add(1, Ordering::SeqCst);
            }
            Poll::Pending
        })
        .await;
    }

    fn note(&self, text: String) {
        self.log.lock().push(text);
    }
}

#[async_trait]
impl BlockDriver for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
    fn length(&self, _: &Edges) -> u64 {
        self.data.lock().len() as u64
    }
    fn limits(&self, _: &Edges) -> Limits {
        self.limits
    }
    async fn read(self: Arc<Self>, _: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        self.park().await;
        self.note(format!("read {offset}+{}", buf.len()));
        let data = self.data.lock();
        let at = offset as usize;
        buf.copy_from_slice(0, &data[at..at + buf.len()]);
        Ok(())
    }
    async fn write(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        buf: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        self.park().await;
        self.note(format!("write {offset}+{}", buf.len()));
        let mut data = self.data.lock();
        let at = offset as usize;
        if data.len() < at + buf.len() {
            data.resize(at + buf.len(), 0);
        }
        buf.copy_to_slice(0, &mut data[at..at + buf.len()]);
        Ok(())
    }
    async fn write_zeroes(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.park().await;
        let unmap = if flags.contains(RequestFlags::MAY_UNMAP) {
            " unmap"
        } else {
            ""
        };
        self.note(format!("zero {offset}+{len}{unmap}"));
        self.data.lock()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
    async fn discard(self: Arc<Self>, _: Request, offset: u64, len: u64) -> Result<()> {
        self.park().await;
        self.note(format!("discard {offset}+{len}"));
        self.data.lock()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        if self.fail_flush.load(Ordering::SeqCst) != 0 {
            return Err(Error::from_kind(ErrorKind::Io));
        }
        Ok(())
    }
    async fn truncate(self: Arc<Self>, _: Request, length: u64, _: Truncate) -> Result<()> {
        self.park().await;
        self.note(format!("truncate {length}"));
        self.data.lock().resize(length as usize, 0);
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        self.note("close".into());
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub const ALL: PermissionSet = PermissionSet::new(Permissions::all(), Permissions::all());

pub struct Disk {
    pub graph: Arc<Graph>,
    pub memory: Arc<Memory>,
    pub node: Arc<Node>,
    pub handle: Arc<BlockHandle>,
}

pub fn disk(memory: Memory) -> Disk {
    disk_in(Graph::new(env()), memory)
}

pub fn disk_in(graph: Arc<Graph>, memory: Memory) -> Disk {
    let memory = Arc::new(memory);
    let node = graph.add_node(NodeSpec::new(memory.clone())).unwrap();
    let handle = Arc::new(graph.attach(&node, ALL, "guest").unwrap());
    Disk {
        graph,
        memory,
        node,
        handle,
    }
}

/// Polls once.
pub fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut std::task::Context::from_waker(
        futures::task::noop_waker_ref(),
    ))
}
