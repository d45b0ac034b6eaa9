//! Tests of the whole driver, on files and on simulated storage. This file has what they share.

mod hostile;
mod interop;
mod io;
mod power_cut;
mod storage;

use std::{path::Path, process::Command, sync::Arc};

use block_core::{
    BlockHandle, Graph, OpenOptions, Options, PermissionSet, Permissions, Registry, RequestFlags,
    Result, registry::ImplicitOpens,
};
use env_tokio::EnvTokio;
use futures::executor::block_on;
use protocol_file::FileFactory;
use tempfile::TempDir;

use crate::{VmdkDriver, VmdkFactory};

/// A directory, and a graph with the drivers file, raw and vmdk.
struct World {
    dir: TempDir,
    registry: Arc<Registry>,
    graph: Arc<Graph>,
    env: Arc<EnvTokio>,
}

fn permit() -> OpenOptions {
    OpenOptions {
        implicit: ImplicitOpens::Permit,
        ..OpenOptions::default()
    }
}

impl World {
    fn new() -> Self {
        Self::with_graph(|env| Graph::new(env))
    }

    fn with_graph(graph: impl FnOnce(Arc<EnvTokio>) -> Arc<Graph>) -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let registry = Registry::new()
            .with(FileFactory::new())
            .with(format_raw::RawFactory)
            .with(VmdkFactory);
        Self {
            dir: tempfile::tempdir().unwrap(),
            registry: Arc::new(registry),
            graph: graph(env.clone()),
            env,
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn try_create(&self, name: &str, options: &str) -> Result<()> {
        let options = Options::from_dotted(options)?;
        block_on(
            self.registry
                .create(&self.graph, "vmdk", &self.path(name), options),
        )
    }

    fn create(&self, name: &str, options: &str) {
        self.try_create(name, options).unwrap();
    }

    fn try_open(&self, name: &str, options: &str, how: OpenOptions) -> Result<BlockHandle> {
        let options = Options::from_dotted(options)?;
        let read_only = options.get_str("read-only") == Some("on");
        let path = self.path(name);
        let node =
            block_on(
                self.registry
                    .open_file(&self.graph, &path, Some("vmdk"), options, how),
            )?;
        let mut used = Permissions::CONSISTENT_READ;
        if !read_only {
            used |= Permissions::WRITE;
        }
        self.graph
            .attach(&node, PermissionSet::new(used, Permissions::all()), "guest")
    }

    fn open(&self, name: &str) -> BlockHandle {
        self.try_open(name, "", permit()).unwrap()
    }

    fn qemu_img(&self, args: &[&str]) -> (i32, String) {
        run(self.dir.path(), "qemu-img", args)
    }

    fn qemu_io(&self, name: &str, commands: &[&str]) {
        let mut args = vec!["-f", "vmdk", name];
        for command in commands {
            args.extend(["-c", command]);
        }
        let (status, output) = run(self.dir.path(), "qemu-io", &args);
        assert!(status == 0 && !output.contains("failed"), "{output}");
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }
}

fn run(dir: &Path, program: &str, args: &[&str]) -> (i32, String) {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), text)
}

/// Whether the program to compare with is there.
fn has_qemu() -> bool {
    Command::new("qemu-img").arg("--version").output().is_ok()
}

fn write(handle: &BlockHandle, offset: u64, bytes: Vec<u8>) {
    block_on(handle.write(offset, bytes, RequestFlags::empty())).unwrap();
}

fn read(handle: &BlockHandle, offset: u64, len: usize) -> Vec<u8> {
    block_on(handle.read(offset, len)).unwrap().to_vec()
}

fn counter(handle: &BlockHandle, name: &str) -> u64 {
    let counters = handle.node().driver().counters();
    counters
        .into_iter()
        .find(|counter| counter.0 == name)
        .unwrap()
        .1
}

fn cid(handle: &BlockHandle) -> u32 {
    let node = handle.node();
    let driver = node.driver().clone();
    driver.as_any().downcast_ref::<VmdkDriver>().unwrap().cid()
}

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
