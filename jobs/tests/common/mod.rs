//! What the tests of jobs share: a format in memory, a guest with an oracle, a chain to work on.

#![allow(dead_code, missing_docs)]

pub mod guest;
pub mod mem;

use std::{sync::Arc, time::Duration};

use block_core::{
    BlockHandle, ChildRole, Graph, IoBuf, Node, NodeSpec, PermissionSet, Permissions, RequestFlags,
};
use env_tokio::EnvTokio;
use jobs::JobManager;

use self::mem::{CLUSTER, Mem};

/// The length of the disks.
pub const LENGTH: u64 = 160 * CLUSTER;

/// What a guest's device holds: it doesn't share writing.
pub const GUEST: PermissionSet = PermissionSet::new(
    Permissions::CONSISTENT_READ.union(Permissions::WRITE),
    Permissions::all().difference(Permissions::WRITE),
);

pub struct Bench {
    pub env: Arc<EnvTokio>,
    pub graph: Arc<Graph>,
    pub manager: Arc<JobManager>,
}

pub struct Layer {
    pub node: Arc<Node>,
    pub mem: Arc<Mem>,
}

/// Runs `test` with a fresh graph, at most a minute long.
pub fn run<F: Future<Output = ()>>(test: impl FnOnce(Arc<Bench>) -> F) {
    let env = Arc::new(EnvTokio::new(3).expect("threads"));
    let graph = Graph::new(env.clone());
    let bench = Arc::new(Bench {
        manager: JobManager::new(&graph),
        env: env.clone(),
        graph,
    });
    env.block_on(async {
        let timer = block_core::Environment::sleep(&*env, Duration::from_secs(60));
        match futures::future::select(Box::pin(test(bench)), timer).await {
            futures::future::Either::Left(_) => {}
            futures::future::Either::Right(_) => panic!("the test hangs"),
        }
    });
}

impl Bench {
    pub fn layer(&self, name: &str, length: u64, backing: Option<&Layer>) -> Layer {
        let mem = Mem::new(&format!("{name}.img"), length);
        let mut spec = NodeSpec::new(mem.clone()).named(name);
        if let Some(backing) = backing {
            spec = spec.with_child(ChildRole::Backing, "backing", &backing.node);
        }
        Layer {
            node: self.graph.add_node(spec).expect("a node"),
            mem,
        }
    }

    /// A chain of `names`, the lowest first, each with some content of its own. Gives the layers, and the content of the
    /// topmost.
    pub async fn chain(&self, names: &[&str]) -> (Vec<Layer>, Vec<u8>) {
        let mut layers: Vec<Layer> = Vec::new();
        let mut content = vec![0; LENGTH as usize];
        for (depth, name) in names.iter().enumerate() {
            let layer = self.layer(name, LENGTH, layers.last());
            let handle = self
                .graph
                .attach(&layer.node, GUEST, "filler")
                .expect("a handle");
            for cluster in 0..LENGTH / CLUSTER {
                let at = cluster * CLUSTER;
                let range = at as usize..(at + CLUSTER) as usize;
                match (cluster * 7 + depth as u64 * 3) % 5 {
                    0 => {
                        let byte = (cluster % 200) as u8 + depth as u8 + 1;
                        content[range].fill(byte);
                        let data = IoBuf::from(vec![byte; CLUSTER as usize]);
                        handle
                            .write(at, data, RequestFlags::empty())
                            .await
                            .expect("a write");
                    }
                    1 if depth > 0 => {
                        content[range].fill(0);
                        handle
                            .write_zeroes(at, CLUSTER, RequestFlags::MAY_UNMAP)
                            .await
                            .expect("a zero write");
                    }
                    _ => {}
                }
            }
            drop(handle);
            layers.push(layer);
        }
        (layers, content)
    }

    pub fn guest_handle(&self, node: &Arc<Node>) -> Arc<BlockHandle> {
        Arc::new(self.graph.attach(node, GUEST, "guest").expect("a handle"))
    }

    pub async fn content(&self, node: &Arc<Node>) -> Vec<u8> {
        let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
        let handle = self.graph.attach(node, reader, "reader").expect("a handle");
        let data = handle
            .read(0, node.length() as usize)
            .await
            .expect("readable");
        data.to_vec()
    }

    /// The names of all nodes, without those that were made up.
    pub fn names(&self) -> Vec<String> {
        self.graph
            .nodes()
            .iter()
            .map(|node| node.name().to_owned())
            .collect()
    }

    pub async fn sleep(&self, millis: u64) {
        block_core::Environment::sleep(&*self.env, Duration::from_millis(millis)).await;
    }
}

/// Says where two disks differ, rather than printing them.
#[track_caller]
pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        let bad = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        panic!(
            "{what}: {bad} bytes differ, the first at {at:#x}: {:#x} should be {:#x}",
            found[at], expected[at]
        );
    }
}
