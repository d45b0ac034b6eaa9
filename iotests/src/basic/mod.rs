//! What every driver must do, alone and without faults: give back what was written, take any alignment, keep what was
//! flushed, and tell what its clusters are made of.

mod durable;
mod rw;
mod status;

use std::sync::Arc;

use block_core::{BlockHandle, Capabilities, Node, Options};

use crate::{
    case::{Case, Failure, Scene},
    cases::cluster_size,
    oracle::AfterDiscard,
};

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = rw::cases();
    cases.extend(durable::cases());
    cases.extend(status::cases());
    cases
}

const FILE: &str = "image";

/// An image of `clusters` clusters with one handle.
struct Fixture {
    node: Arc<Node>,
    handle: Arc<BlockHandle>,
    cluster: u64,
    size: u64,
}

impl Fixture {
    /// For a driver that can write; the case isn't covered by others.
    async fn new(scene: &Scene, clusters: u64) -> Result<Self, Failure> {
        let fixture = Self::any(scene, clusters).await?;
        let capabilities = fixture.node.driver().capabilities();
        if capabilities.contains(Capabilities::WRITE) {
            return Ok(fixture);
        }
        fixture.close(scene).await?;
        Err(Failure::not_covered("the driver can't write"))
    }

    /// For any driver, also one that can only be read.
    async fn any(scene: &Scene, clusters: u64) -> Result<Self, Failure> {
        let lab = &scene.lab;
        let format = &scene.format;
        lab.create(&format.name, "probe", 1 << 20, &format.create, None)
            .await?;
        let node = lab
            .open(&format.name, "probe", None, &Options::new())
            .await?;
        let cluster = cluster_size(&lab.attach(&node, "probe")?).await?;
        lab.graph.release(&node).await?;
        let size = clusters * cluster;
        lab.create(&format.name, FILE, size, &format.create, None)
            .await?;
        Self::open(scene, cluster, size).await
    }

    async fn open(scene: &Scene, cluster: u64, size: u64) -> Result<Self, Failure> {
        let node = scene
            .lab
            .open(&scene.format.name, FILE, None, &Options::new())
            .await?;
        let handle = scene.lab.attach(&node, "guest")?;
        Ok(Self {
            node,
            handle,
            cluster,
            size,
        })
    }

    async fn close(self, scene: &Scene) -> Result<(), Failure> {
        drop(self.handle);
        scene.lab.graph.release(&self.node).await?;
        Ok(())
    }

    async fn reopen(self, scene: &Scene) -> Result<Self, Failure> {
        let (cluster, size) = (self.cluster, self.size);
        self.close(scene).await?;
        Self::open(scene, cluster, size).await
    }

    fn discard_zeroes(&self) -> bool {
        crate::lab::after_discard(&self.node) == AfterDiscard::Zeroes
    }

    /// The driver's own check, and the installed qemu-img's on what is in the storage.
    async fn check(&self, scene: &Scene) -> Result<(), Failure> {
        use block_core::image::{CheckMode, Progress};
        if self
            .node
            .driver()
            .capabilities()
            .contains(Capabilities::CHECK)
        {
            self.handle.flush().await?;
            let report = self
                .handle
                .check(CheckMode::ReadOnly, Progress::new())
                .await?;
            if !report.is_clean() {
                let found: Vec<String> = report
                    .findings
                    .iter()
                    .map(|finding| finding.message.clone())
                    .collect();
                return Err(Failure(format!("check isn't clean: {}", found.join("; "))));
            }
        }
        let content = scene.lab.disk(FILE)?.content();
        crate::laid::check(&scene.lab, &scene.format.name, FILE, &content, false)
    }
}

/// Fails when two buffers differ, with the first place.
fn same(found: &[u8], expected: &[u8], from: u64, what: &str) -> Result<(), Failure> {
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    match differs {
        None if found.len() == expected.len() => Ok(()),
        None => Err(Failure(format!(
            "{what}: {} bytes, not {}",
            found.len(),
            expected.len()
        ))),
        Some(at) => Err(Failure(format!(
            "{what}: at {:#x} there is {:#04x}, not {:#04x}",
            from + at as u64,
            found[at],
            expected[at]
        ))),
    }
}
