//! A graph with the file drivers in it, an environment of plain threads, and directories on tmpfs and on disk.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use block_core::{
    env::Environment,
    error::Result,
    flags::{PermissionSet, Permissions},
    graph::Graph,
    handle::BlockHandle,
    node::Node,
    options::Options,
    registry::{OpenOptions, Registry},
};
use futures::{channel::oneshot, executor::block_on, future::BoxFuture};
use protocol_file::{EngineConfig, Engines, FileFactory};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Threads {
    start: Instant,
    state: AtomicU64,
}

impl Environment for Threads {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let (tx, rx) = oneshot::channel::<()>();
        thread::spawn(move || {
            thread::sleep(duration);
            let _ = tx.send(());
        });
        Box::pin(async {
            let _ = rx.await;
        })
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        thread::spawn(move || block_on(task));
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        thread::spawn(work);
    }

    fn random(&self) -> u64 {
        let mut x = self
            .state
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

pub fn graph() -> Arc<Graph> {
    Graph::new(Arc::new(Threads {
        start: Instant::now(),
        state: AtomicU64::new(1),
    }))
}

/// What a test happens in.
pub struct Bed {
    pub dir: TempDir,
    pub graph: Arc<Graph>,
    pub registry: Arc<Registry>,
    pub files: FileFactory,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Disk,
    Shm,
}

pub const PLACES: [Place; 2] = [Place::Disk, Place::Shm];

pub fn note(text: &str) {
    eprintln!("NOTE: {text}");
}

impl Bed {
    pub fn new(place: Place) -> Self {
        Self::with(place, FileFactory::new())
    }

    pub fn with_config(place: Place, config: EngineConfig) -> Self {
        Self::with(place, FileFactory::new().with_engines(Engines::new(config)))
    }

    pub fn with(place: Place, files: FileFactory) -> Self {
        let root = match place {
            Place::Disk => Path::new(env!("CARGO_TARGET_TMPDIR")),
            Place::Shm => Path::new("/dev/shm"),
        };
        let registry = Arc::new(
            Registry::new()
                .with(files.clone())
                .with(files.host_device()),
        );
        let dir = tempfile::tempdir_in(root).expect("a temporary directory");
        Self {
            dir,
            graph: graph(),
            registry,
            files,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A file of `len` bytes that count up.
    pub fn file(&self, name: &str, len: usize) -> String {
        std::fs::write(self.path(name), pattern(0, len)).unwrap();
        self.name(name)
    }

    pub fn try_node(&self, mut options: Value) -> Result<Arc<Node>> {
        let map = options.as_object_mut().unwrap();
        map.entry("driver").or_insert(json!("file"));
        let count = self.graph.nodes().len();
        map.entry("node-name")
            .or_insert(json!(format!("file{count}")));
        let options = Options::from_json(&options.to_string()).unwrap();
        block_on(
            self.registry
                .open(&self.graph, options, OpenOptions::default()),
        )
    }

    pub fn node(&self, options: Value) -> Arc<Node> {
        self.try_node(options).unwrap()
    }

    pub fn attach(&self, node: &Arc<Node>, permissions: PermissionSet) -> Result<BlockHandle> {
        self.graph.attach(node, permissions, "test")
    }

    /// A handle that may do everything.
    pub fn open(&self, options: Value) -> BlockHandle {
        self.attach(
            &self.node(options),
            PermissionSet::new(Permissions::all(), Permissions::all()),
        )
        .unwrap()
    }

    pub fn create(&self, name: &str, options: Value) -> Result<()> {
        let options = Options::from_json(&options.to_string()).unwrap();
        block_on(self.registry.create(&self.graph, "file", name, options))
    }

    pub fn close(&self, handle: BlockHandle) {
        let node = handle.node();
        drop(handle);
        block_on(self.graph.release(&node)).unwrap();
    }
}

pub fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at + seed) % 251) as u8 + 1).collect()
}

pub fn counter(handle: &BlockHandle, name: &str) -> u64 {
    node_counter(&handle.node(), name)
}

pub fn node_counter(node: &Node, name: &str) -> u64 {
    node.driver()
        .counters()
        .into_iter()
        .find(|(key, _)| *key == name)
        .unwrap()
        .1
}

/// Whether the kernel lets us use io_uring.
pub fn has_io_uring() -> bool {
    Engines::new(EngineConfig::default()).ring_handle().is_ok()
}

/// The values of `aio` that work here.
pub fn engines() -> Vec<&'static str> {
    if has_io_uring() {
        vec!["threads", "io_uring"]
    } else {
        note("no io_uring here, its half of the test is skipped");
        vec!["threads"]
    }
}

/// Runs a program of qemu's; `None`, with a note, when it isn't installed.
pub fn qemu(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(error) => {
            note(&format!(
                "{program} can't be run ({error}), this part of the test is skipped"
            ));
            None
        }
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A small generator, the same on every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}
