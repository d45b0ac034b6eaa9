//! Tests of the filters: copy-on-read over VMDK chains on files, the others over null storage.

use std::{sync::Arc, time::Duration};

use block_core::{
    BlockHandle, Child, ErrorKind, Graph, Node, OpenOptions, Options, PermissionSet, Permissions,
    Registry, RequestFlags, chain, env::Environment, registry::ImplicitOpens,
};
use env_tokio::EnvTokio;
use format_vmdk::VmdkFactory;
use futures::executor::block_on;
use protocol_file::FileFactory;
use tempfile::TempDir;

use crate::{Populated, copy_on_read, register};

const GRAIN: u64 = 65536;
const SIZE: usize = 4 << 20;

struct World {
    dir: TempDir,
    registry: Arc<Registry>,
    graph: Arc<Graph>,
    env: Arc<EnvTokio>,
}

impl World {
    fn new() -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let mut registry = Registry::new().with(FileFactory::new()).with(VmdkFactory);
        register(&mut registry);
        Self {
            dir: tempfile::tempdir().unwrap(),
            registry: Arc::new(registry),
            graph: Graph::new(env.clone()),
            env,
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn create(&self, name: &str, options: &str) {
        let options = Options::from_dotted(options).unwrap();
        block_on(
            self.registry
                .create(&self.graph, "vmdk", &self.path(name), options),
        )
        .unwrap();
    }

    fn node(&self, options: &str) -> Arc<Node> {
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            ..OpenOptions::default()
        };
        let options = Options::from_dotted(options).unwrap();
        block_on(self.registry.open(&self.graph, options, how)).unwrap()
    }

    fn handle(&self, options: &str) -> BlockHandle {
        let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
        let node = self.node(options);
        self.graph
            .attach(&node, PermissionSet::new(used, Permissions::all()), "guest")
            .unwrap()
    }

    /// A base with data in its first 2 MiB, and an empty overlay under a copy-on-read node.
    fn chain(&self) -> (BlockHandle, Vec<u8>) {
        self.create("base.vmdk", "size=4M");
        let base = self.handle(&format!(
            "driver=vmdk,file.filename={}",
            self.path("base.vmdk")
        ));
        let mut model: Vec<u8> = (0..2 << 20).map(|at| (at / 1000) as u8 | 1).collect();
        model.resize(SIZE, 0);
        let data = model[..2 << 20].to_vec();
        block_on(base.write(0, data, RequestFlags::empty())).unwrap();
        block_on(base.close()).unwrap();
        self.create("top.vmdk", "size=4M,backing_file=base.vmdk,zeroed_grain=on");
        let handle = self.handle(&format!(
            "driver=copy-on-read,file.driver=vmdk,file.node-name=top,file.file.driver=file,file.file.filename={}",
            self.path("top.vmdk")
        ));
        (handle, model)
    }

    fn top(&self) -> Arc<Node> {
        self.graph.node("top").unwrap()
    }
}

fn counter(handle: &BlockHandle, name: &str) -> u64 {
    let counters = handle.node().driver().counters();
    counters
        .into_iter()
        .find(|counter| counter.0 == name)
        .unwrap()
        .1
}

fn allocated(node: &Arc<Node>, offset: u64) -> bool {
    block_on(chain::is_allocated_at(node, offset, 1)).unwrap().0
}

#[test]
fn what_is_read_from_below_is_in_the_node_afterwards() {
    let world = World::new();
    let (handle, model) = world.chain();
    let top = world.top();
    let data = block_on(handle.read(GRAIN + 100, 2 * GRAIN as usize)).unwrap();
    assert_eq!(
        data[..],
        model[GRAIN as usize + 100..3 * GRAIN as usize + 100]
    );
    // Whole grains, and no others.
    let grains = [0, 1, 2, 3, 4].map(|grain| allocated(&top, grain * GRAIN));
    assert_eq!(grains, [false, true, true, true, false]);
    assert_eq!(counter(&handle, "copy-on-read-bytes"), 3 * GRAIN);
    // The second read copies nothing.
    block_on(handle.read(GRAIN + 100, 2 * GRAIN as usize)).unwrap();
    assert_eq!(counter(&handle, "copy-on-read-bytes"), 3 * GRAIN);
    assert!(counter(&handle, "copy-on-read-passed") > 0);
    assert_eq!(block_on(handle.read(0, SIZE)).unwrap()[..], model[..]);
}

#[test]
fn zeroes_below_are_copied_as_zero_writes() {
    let world = World::new();
    let (handle, _) = world.chain();
    block_on(handle.read(3 << 20, 2 * GRAIN as usize)).unwrap();
    assert_eq!(counter(&handle, "copy-on-read-zeroes"), 2 * GRAIN);
    assert_eq!(counter(&handle, "copy-on-read-bytes"), 0);
    assert!(allocated(&world.top(), 3 << 20));
    let length = world.top().edges().iter().next().unwrap().child.length();
    assert_eq!(length, GRAIN, "a zeroed grain takes no place");
}

#[test]
fn populating_without_a_buffer_copies_everything_and_returns_nothing() {
    let world = World::new();
    let (handle, model) = world.chain();
    let child = Child::unattached(world.top());
    let done = block_on(copy_on_read::populate(&child, 0, SIZE as u64, None)).unwrap();
    assert_eq!(
        done,
        Populated {
            copied: 2 << 20,
            zeroed: 2 << 20
        }
    );
    let done = block_on(copy_on_read::populate(&child, 0, SIZE as u64, None)).unwrap();
    assert_eq!(done, Populated::default());
    // The base isn't needed any more.
    block_on(world.graph.set_backing(&world.top(), None)).unwrap();
    assert_eq!(block_on(handle.read(0, SIZE)).unwrap()[..], model[..]);
}

#[test]
fn a_copy_never_lands_on_top_of_a_newer_write() {
    let world = World::new();
    let (handle, mut model) = world.chain();
    std::thread::scope(|scope| {
        let handle = &handle;
        let readers: Vec<_> = (0..2)
            .map(|start| {
                scope.spawn(move || {
                    for at in (start * 3000..2 << 20).step_by(9000) {
                        block_on(handle.read(at, 5000)).unwrap();
                    }
                })
            })
            .collect();
        for (index, at) in (0..2 << 20).step_by(10_000).enumerate() {
            let byte = index as u8;
            model[at..at + 700].fill(byte);
            block_on(handle.write(at as u64, vec![byte; 700], RequestFlags::empty())).unwrap();
            if index % 5 == 0 {
                model[at + 1000..at + 1500].fill(0);
                let zeroes = handle.write_zeroes(at as u64 + 1000, 500, RequestFlags::empty());
                block_on(zeroes).unwrap();
            }
        }
        for reader in readers {
            reader.join().unwrap();
        }
    });
    assert!(
        counter(&handle, "copy-on-read-bytes") > 0,
        "nothing was copied meanwhile"
    );
    assert_eq!(block_on(handle.read(0, SIZE)).unwrap()[..], model[..]);
    assert_eq!(world.env.panics(), 0);
}

#[test]
fn a_node_without_anything_below_is_just_read() {
    let world = World::new();
    world.create("a.vmdk", "size=4M");
    let handle = world.handle(&format!(
        "driver=copy-on-read,file.driver=vmdk,file.node-name=top,file.file.driver=file,file.file.filename={}",
        world.path("a.vmdk")
    ));
    block_on(handle.read(0, SIZE)).unwrap();
    assert!(!allocated(&world.top(), 0));
}

#[test]
fn null_storage_reads_as_zeroes_when_asked_to() {
    let world = World::new();
    let handle = world.handle("driver=null-co,size=1M,read-zeroes=on,latency-ns=1000");
    assert_eq!(handle.length(), 1 << 20);
    block_on(handle.write(0, vec![1; 512], RequestFlags::empty())).unwrap();
    assert!(
        block_on(handle.read(0, 512))
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(block_on(handle.block_status(0, 512)).unwrap().is_zero());
    let error = block_on(handle.read(1 << 20, 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn a_throttle_keeps_its_rate() {
    let world = World::new();
    let handle = world.handle("driver=throttle,limits.bps-write=10M,file.driver=null-co");
    let before = world.env.now();
    for _ in 0..5 {
        block_on(handle.write(0, vec![0; 1 << 20], RequestFlags::empty())).unwrap();
    }
    let took = world.env.now().checked_sub(before).unwrap();
    // Five tenths of a second's worth, of which one passes at once and the last need not drain.
    assert!(took >= Duration::from_millis(290), "{took:?}");
    block_on(handle.read(0, 16 << 20)).unwrap();
    assert!(counter(&handle, "throttle-waits") >= 3);
}
