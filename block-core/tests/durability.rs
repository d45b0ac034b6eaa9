//! The core, where it once went wrong. What a flush promises: each test is the smallest case of a write that it once forgot.

mod common;

use std::{
    any::Any,
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use block_core::{
    ChildRole, IoBuf, IoBufMut, NodeSpec, RequestFlags, async_trait,
    driver::{BlockDriver, Capabilities, DriverKind},
    error::Result,
    graph::Graph,
    image::{CheckMode, Progress},
    limits::Limits,
    node::Edges,
    request::Request,
};
use common::{
    ALL, Memory, disk, env,
    layer::{Layer, NONE, over, share},
    poll_once,
};
use futures::executor::block_on;

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
fn a_node_that_nobody_has_anymore_is_flushed_before_it_is_closed() {
    let written = disk(Memory::new(1 << 16));
    block_on(async {
        written.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        // Dropped rather than closed.
        drop(written.handle);
        written.graph.close_all().await.unwrap();
    });
    let flushes = written.memory.flushes.load(Ordering::SeqCst);
    assert_eq!(
        flushes, 1,
        "the image was closed, and what was written may be lost"
    );

    let untouched = disk(Memory::new(1 << 16));
    share(&untouched);
    let (_, _, above) = over(
        &untouched.graph,
        Layer::new(DriverKind::Filter),
        &untouched.node,
    );
    block_on(above.read(0, 512)).unwrap();
    block_on(above.info()).unwrap();
    drop((untouched.handle, above));
    block_on(untouched.graph.close_all()).unwrap();
    let flushes = untouched.memory.flushes.load(Ordering::SeqCst);
    assert_eq!(flushes, 0, "there was nothing to flush");

    let broken = disk(Memory::new(1 << 16));
    block_on(async {
        broken.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        broken.memory.fail_flush.store(1, Ordering::SeqCst);
        drop(broken.handle);
        assert!(
            broken.graph.close_all().await.is_err(),
            "nobody is told that the last flush failed"
        );
        assert!(broken.graph.nodes().is_empty());
    });
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
