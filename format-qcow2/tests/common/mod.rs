//! What the tests share: a graph with the drivers that they need, the installed qemu tools, and an oracle of bytes.
#![allow(dead_code)]

use std::{
    path::Path,
    process::{Command, Output},
    sync::Arc,
};

use block_core::{
    BlockHandle, Graph, OpenOptions, Options, PermissionSet, Permissions, Registry, RequestFlags,
    Result, registry::ImplicitOpens,
};
use env_tokio::EnvTokio;
use format_qcow2::Qcow2Factory;
use protocol_file::FileFactory;
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// An environment, a graph and a registry.
pub struct Rig {
    pub env: Arc<EnvTokio>,
    pub graph: Arc<Graph>,
    pub registry: Arc<Registry>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(Qcow2Factory::new())
    }

    pub fn with(factory: Qcow2Factory) -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let graph = Graph::new(env.clone());
        let registry = Arc::new(Registry::new().with(FileFactory::new()).with(factory));
        Self { env, graph, registry }
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.env.block_on(future)
    }

    pub async fn open(&self, path: &Path, options: &str) -> Result<BlockHandle> {
        let how = OpenOptions { implicit: ImplicitOpens::Permit, ..OpenOptions::default() };
        let options = Options::from_dotted(options)?;
        let read_only = options.get_str("read-only") == Some("on");
        let name = path.to_str().unwrap();
        let node = self.registry.open_file(&self.graph, name, Some("qcow2"), options, how).await?;
        let mut used = Permissions::CONSISTENT_READ;
        if !read_only {
            used |= Permissions::WRITE | Permissions::RESIZE;
        }
        self.graph.attach(&node, PermissionSet::new(used, Permissions::all()), "test")
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
    Command::new(name).args(args).output().unwrap_or_else(|error| panic!("{name}: {error}"))
}

pub fn qemu_img(args: &[&str]) -> String {
    tool("qemu-img", args)
}

/// `qemu-img check` finds nothing at all.
pub fn assert_clean(path: &Path) {
    let output = run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}", path.display());
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
    if let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) {
        panic!("{what}: byte {at:#x} is {:#x}, expected {:#x}", ours[at], theirs[at]);
    }
}

/// A byte that tells who wrote it.
pub fn pattern(rng: &mut SmallRng, len: usize) -> Vec<u8> {
    let seed: u8 = rng.random_range(1..=255);
    (0..len).map(|at| seed.wrapping_add((at / 512) as u8).max(1)).collect()
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
        Self { disk, rng: SmallRng::seed_from_u64(seed), discards_zero: true, cluster }
    }

    fn range(&mut self, align: u64, most: u64) -> (u64, u64) {
        let size = self.disk.len() as u64 / align;
        let start = self.rng.random_range(0..size);
        let len = self.rng.random_range(1..=most.div_ceil(align).min(size - start));
        (start * align, len * align)
    }

    pub async fn step(&mut self, handle: &BlockHandle) -> Result<()> {
        let most = 4 * self.cluster;
        match self.rng.random_range(0..100) {
            0..45 => {
                let align = if self.rng.random() { 512 } else { 1 };
                let (at, len) = self.range(align, most);
                let data = pattern(&mut self.rng, len as usize);
                handle.write(at, data.clone(), RequestFlags::empty()).await?;
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
                let (at, len) = self.range(1, most);
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
            assert_same(&data, &self.disk[at..at + len], &format!("read back from {at:#x}"));
        }
        Ok(())
    }
}
