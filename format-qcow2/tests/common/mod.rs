//! What the tests share: a graph with the drivers that they need, the installed qemu tools, and an oracle of bytes.
#![allow(dead_code)]

pub mod cuts;
pub mod storage;

use std::{
    path::Path,
    process::{Command, Output},
    sync::Arc,
    task::{Context, Poll},
};

use block_core::{
    BlockHandle, Graph, OpenOptions, Options, PermissionSet, Permissions, Registry, RequestFlags,
    Result,
    image::{CheckMode, CheckReport, Progress},
    registry::ImplicitOpens,
};
use env_tokio::EnvTokio;
use format_qcow2::Qcow2Factory;
use futures::{FutureExt, future::BoxFuture};
use protocol_file::FileFactory;
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// An environment, a graph and a registry.
pub struct Rig {
    pub env: Arc<EnvTokio>,
    pub graph: Arc<Graph>,
    pub registry: Arc<Registry>,
    pub storages: storage::StorageFactory,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(Qcow2Factory::new())
    }

    pub fn with(factory: Qcow2Factory) -> Self {
        Self::build(factory, true)
    }

    pub fn build(factory: Qcow2Factory, gate: bool) -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let graph = if gate {
            Graph::new(env.clone())
        } else {
            Graph::new_without_gate_for_tests(env.clone())
        };
        let storages = storage::StorageFactory::default();
        let registry = Registry::new()
            .with(FileFactory::new())
            .with(storages.clone())
            .with(factory);
        Self {
            env,
            graph,
            registry: Arc::new(registry),
            storages,
        }
    }

    /// Opens the image in a storage in memory.
    pub async fn open_storage(
        &self,
        storage: &Arc<storage::Storage>,
        options: &str,
    ) -> Result<BlockHandle> {
        self.open_storage_how(storage, options, OpenOptions::default())
            .await
    }

    pub async fn open_storage_how(
        &self,
        storage: &Arc<storage::Storage>,
        options: &str,
        how: OpenOptions,
    ) -> Result<BlockHandle> {
        self.storages.add("a", storage);
        let text = format!("driver=qcow2,file.driver=memory,file.name=a,{options}");
        let node = self
            .registry
            .open(&self.graph, Options::from_dotted(&text)?, how)
            .await?;
        let mut used = Permissions::CONSISTENT_READ;
        if !node.driver().is_read_only() {
            used |= Permissions::WRITE | Permissions::RESIZE;
        }
        self.graph
            .attach(&node, PermissionSet::new(used, Permissions::all()), "test")
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.env.block_on(future)
    }

    pub async fn open(&self, path: &Path, options: &str) -> Result<BlockHandle> {
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            ..OpenOptions::default()
        };
        let options = Options::from_dotted(options)?;
        let read_only = options.get_str("read-only") == Some("on");
        let name = path.to_str().unwrap();
        let node = self
            .registry
            .open_file(&self.graph, name, Some("qcow2"), options, how)
            .await?;
        let mut used = Permissions::CONSISTENT_READ;
        if !read_only {
            used |= Permissions::WRITE | Permissions::RESIZE;
        }
        self.graph
            .attach(&node, PermissionSet::new(used, Permissions::all()), "test")
    }

    pub async fn close(&self, handle: BlockHandle) -> Result<()> {
        handle.close().await?;
        self.graph.close_all().await
    }
}

/// Runs an installed tool, which must succeed.
pub fn tool(name: &str, args: &[&str]) -> String {
    let output = run(name, args);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{name} {args:?}: {text}");
    text
}

pub fn run(name: &str, args: &[&str]) -> Output {
    Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

pub fn qemu_img(args: &[&str]) -> String {
    tool("qemu-img", args)
}

/// `qemu-img check` finds nothing at all.
pub fn assert_clean(path: &Path) {
    let output = run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {text}{errors}",
        path.display()
    );
}

/// The same for the bytes of an image that needs no other file.
pub fn assert_clean_bytes(data: &[u8]) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    std::fs::write(&path, data).unwrap();
    assert_clean(&path);
}

/// What the installed qemu-img reads.
pub fn contents(path: &Path, scratch: &Path) -> Vec<u8> {
    let raw = scratch.join("contents.raw");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    std::fs::read(raw).unwrap()
}

/// The first difference, for messages that fit a screen.
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    if ours == theirs {
        return;
    }
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, expected {:#x}",
            ours[at], theirs[at]
        );
    }
}

/// A byte that tells who wrote it.
pub fn pattern(rng: &mut SmallRng, len: usize) -> Vec<u8> {
    let seed: u8 = rng.random_range(1..=255);
    let mut data = vec![0; len];
    for (n, sector) in data.chunks_mut(512).enumerate() {
        sector.fill(seed.wrapping_add(n as u8).max(1));
    }
    data
}

/// Random writes, zero writes, discards, flushes and reads against a disk in memory.
pub struct Oracle {
    pub disk: Vec<u8>,
    pub rng: SmallRng,
    /// Discards may leave what is there (version 2 with a backing file).
    pub discards_zero: bool,
    pub cluster: u64,
}

impl Oracle {
    pub fn new(disk: Vec<u8>, seed: u64, cluster: u64) -> Self {
        Self {
            disk,
            rng: SmallRng::seed_from_u64(seed),
            discards_zero: true,
            cluster,
        }
    }

    fn range(&mut self, align: u64, most: u64) -> (u64, u64) {
        let size = self.disk.len() as u64 / align;
        let start = self.rng.random_range(0..size);
        let len = self
            .rng
            .random_range(1..=most.div_ceil(align).min(size - start));
        (start * align, len * align)
    }

    pub async fn step(&mut self, handle: &BlockHandle) -> Result<()> {
        let most = 4 * self.cluster;
        let most_data = most.min(1 << 20);
        match self.rng.random_range(0..100) {
            0..45 => {
                let align = if self.rng.random() { 512 } else { 1 };
                let (at, len) = self.range(align, most_data);
                let data = pattern(&mut self.rng, len as usize);
                handle
                    .write(at, data.clone(), RequestFlags::empty())
                    .await?;
                self.disk[at as usize..][..len as usize].copy_from_slice(&data);
            }
            45..60 => {
                let align = if self.rng.random() { self.cluster } else { 512 };
                let (at, len) = self.range(align.min(self.disk.len() as u64), most);
                let flags = if self.rng.random() {
                    RequestFlags::MAY_UNMAP
                } else {
                    RequestFlags::empty()
                };
                handle.write_zeroes(at, len, flags).await?;
                self.disk[at as usize..][..len as usize].fill(0);
            }
            60..70 => {
                let cluster = self.cluster.min(self.disk.len() as u64);
                let (at, len) = self.range(cluster, most);
                handle.discard(at, len).await?;
                if self.discards_zero {
                    self.disk[at as usize..][..len as usize].fill(0);
                }
            }
            70..73 => handle.flush().await?,
            _ => {
                let (at, len) = self.range(1, most_data);
                let data = handle.read(at, len as usize).await?;
                let expected = &self.disk[at as usize..][..len as usize];
                assert_same(&data, expected, &format!("read at {at:#x}+{len:#x}"));
            }
        }
        Ok(())
    }

    pub async fn verify(&self, handle: &BlockHandle) -> Result<()> {
        assert_eq!(handle.length(), self.disk.len() as u64);
        let step = 1 << 20;
        for at in (0..self.disk.len()).step_by(step) {
            let len = step.min(self.disk.len() - at);
            let data = handle.read(at as u64, len).await?;
            assert_same(
                &data,
                &self.disk[at..at + len],
                &format!("read back from {at:#x}"),
            );
        }
        Ok(())
    }
}

/// An image made by the installed qemu-img, as bytes.
pub fn image_bytes(options: &str, size: u64) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    create_by_qemu(&path, options, size);
    std::fs::read(path).unwrap()
}

/// Makes an image with the installed qemu-img.
pub fn create_by_qemu(path: &Path, options: &str, size: u64) {
    let (name, size) = (path.to_str().unwrap(), size.to_string());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, &size]);
}

/// What a check of the open image finds.
pub async fn checked(handle: &BlockHandle) -> CheckReport {
    let report = handle.check(CheckMode::ReadOnly, Progress::new()).await;
    report.unwrap()
}

/// Runs `work` on a thread of its own; a hang is a failure.
pub fn within(seconds: u64, work: impl FnOnce() + Send + 'static) {
    let (done, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        work();
        done.send(()).unwrap();
    });
    match wait.recv_timeout(std::time::Duration::from_secs(seconds)) {
        Ok(()) => thread.join().unwrap(),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
    }
}

/// Polls a future once; whether it has ended.
pub fn poll(future: &mut BoxFuture<'_, impl Sized>) -> bool {
    let mut context = Context::from_waker(futures::task::noop_waker_ref());
    matches!(future.poll_unpin(&mut context), Poll::Ready(_))
}

/// Writes `len` bytes of one value.
pub async fn write(handle: &BlockHandle, at: u64, len: u64, value: u8) -> Result<()> {
    handle
        .write(at, vec![value; len as usize], RequestFlags::empty())
        .await
}

/// A big-endian number in an image's bytes.
pub fn be64(data: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(data[at..at + 8].try_into().unwrap())
}

/// Corruptions (with check errors) and leaks in the bytes of a storage whose image was closed, or not.
pub fn check_bytes(storage: &storage::Storage) -> (u64, u64) {
    let data = storage.state.lock().data.clone();
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig
            .open_storage(&storage::Storage::new(data), "read-only=on")
            .await
            .unwrap();
        let report = checked(&handle).await;
        rig.close(handle).await.unwrap();
        (report.corruptions + report.check_errors, report.leaks)
    })
}

/// A snapshot to be taken, of that name.
pub fn named(name: &str) -> block_core::NewSnapshot {
    block_core::NewSnapshot {
        name: name.to_owned(),
        date_sec: 1_700_000_000,
        date_nsec: 5000,
        vm_clock_nsec: 3_723_004_000_000,
        icount: None,
        vm_state_size: 0,
    }
}

/// What the installed qemu-img reads from a snapshot.
pub fn snapshot_contents(path: &Path, scratch: &Path, name: &str) -> Vec<u8> {
    let raw = scratch.join("snapshot.raw");
    let by_name = format!("snapshot.name={name}");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "-l",
        &by_name,
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    std::fs::read(raw).unwrap()
}

/// A counter of a node's driver.
pub fn counter(handle: &BlockHandle, name: &str) -> u64 {
    let counters = handle.node().driver().counters();
    counters
        .iter()
        .find(|(key, _)| *key == name)
        .unwrap_or_else(|| panic!("{name}"))
        .1
}
