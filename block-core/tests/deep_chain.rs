//! Chains of hundreds of layers: requests get down them on an ordinary thread's stack, and what is true of a request in a
//! short chain is true of one in a long chain.

mod common;

use std::{any::Any, pin::pin, sync::Arc};

use block_core::{
    Registry, async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind},
    error::Result,
    flags::RequestFlags,
    graph::NodeSpec,
    handle::BlockHandle,
    node::{Edges, Node},
    producer::ProducerId,
    request::Request,
};
use common::{ALL, Disk, Memory, disk, poll_once};
use futures::executor::block_on;
use parking_lot::Mutex;

/// Passes everything on, and remembers on whose behalf.
#[derive(Default)]
struct Layer {
    producers: Mutex<Vec<ProducerId>>,
}

#[async_trait]
impl BlockDriver for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::DISCARD
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges.primary().map_or(0, |child| child.length())
    }
    fn limits(&self, edges: &Edges) -> block_core::limits::Limits {
        edges
            .primary()
            .map_or_else(Default::default, |child| child.limits())
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        self.producers.lock().push(request.producer());
        request.file()?.read(offset, buf).await
    }
    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        request.file()?.write(offset, buf, flags).await
    }
    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        request.file()?.discard(offset, len).await
    }
    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// `count` layers over storage; the first is the lowest.
fn tower(disk: &Disk, count: usize) -> (Vec<Arc<Layer>>, Arc<Node>) {
    let mut top = disk.node.clone();
    let mut layers = Vec::new();
    for _ in 0..count {
        let layer = Arc::new(Layer::default());
        let spec = NodeSpec::new(layer.clone()).with_child(ChildRole::Filtered, "file", &top);
        top = disk.graph.add_node(spec).unwrap();
        layers.push(layer);
    }
    (layers, top)
}

fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(2 << 20);
    thread.spawn(work).unwrap().join().unwrap();
}

fn guest(disk: &Disk, top: &Arc<Node>) -> BlockHandle {
    disk.graph.attach(top, ALL, "tower").unwrap()
}

#[test]
fn every_kind_of_request_gets_down_the_deepest_chain_on_a_small_stack() {
    on_a_small_stack(|| {
        let disk = disk(Memory::new(4096));
        let (layers, top) = tower(&disk, Registry::MAX_DEPTH);
        let handle = guest(&disk, &top);
        block_on(async {
            handle
                .write(512, vec![7; 512], RequestFlags::empty())
                .await
                .unwrap();
            assert_eq!(handle.read(512, 512).await.unwrap().to_vec(), [7; 512]);
            handle.discard(512, 512).await.unwrap();
            handle.flush().await.unwrap();
            assert_eq!(handle.read(512, 512).await.unwrap().to_vec(), [0; 512]);
            handle.close().await.unwrap();
        });
        assert_eq!(
            disk.memory
                .flushes
                .load(std::sync::atomic::Ordering::SeqCst),
            1
        );
        let lowest = layers[0].producers.lock().clone();
        assert_eq!(lowest.len(), 2);
        assert_eq!(
            lowest,
            *layers[layers.len() - 1].producers.lock(),
            "another producer at the bottom than at the top"
        );
        assert!(lowest.iter().all(|producer| *producer != ProducerId::NONE));
    });
}

#[test]
fn a_write_that_was_dropped_in_a_deep_chain_holds_back_a_later_one_until_it_has_ended() {
    let disk = disk(Memory::new(4096));
    let (_, top) = tower(&disk, 100);
    let handle = guest(&disk, &top);
    disk.memory.hold();
    {
        let mut old = pin!(handle.write(0, vec![1; 512], RequestFlags::empty()));
        while disk.memory.parked.load(std::sync::atomic::Ordering::SeqCst) == 0 {
            assert!(poll_once(old.as_mut()).is_pending());
            std::thread::yield_now();
        }
    }
    {
        let mut new = pin!(handle.write(0, vec![2; 512], RequestFlags::empty()));
        assert!(poll_once(new.as_mut()).is_pending());
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(poll_once(new.as_mut()).is_pending());
        assert!(
            disk.memory.log.lock().is_empty(),
            "the new write overtook the dropped one"
        );
        disk.memory.let_go();
        block_on(new).unwrap();
    }
    assert_eq!(disk.memory.log.lock().len(), 2);
    assert_eq!(disk.memory.data.lock()[..512], [2; 512]);
}

#[test]
fn a_chain_that_is_longer_than_the_bound_is_refused_and_leaves_no_node() {
    let disk = disk(Memory::new(4096));
    let (_, mut top) = tower(&disk, Registry::MAX_DEPTH);
    let error = loop {
        let spec = NodeSpec::new(Arc::new(Layer::default()));
        match disk
            .graph
            .add_node(spec.with_child(ChildRole::Filtered, "file", &top))
        {
            Ok(node) => top = node,
            Err(error) => break error,
        }
        assert!(
            disk.graph.nodes().len() < Registry::MAX_DEPTH + 50,
            "no limit"
        );
    };
    assert!(error.reason().contains("deeper than"), "{error}");
    assert_eq!(disk.graph.nodes().len(), Registry::MAX_DEPTH + 9);
}

#[test]
fn the_deepest_chain_that_is_dropped_without_being_closed_needs_no_deep_stack() {
    let thread = std::thread::Builder::new().stack_size(1 << 20);
    let dropped = thread.spawn(|| {
        let disk = disk(Memory::new(4096));
        let (layers, top) = tower(&disk, Registry::MAX_DEPTH);
        let lowest = Arc::downgrade(&layers[0]);
        drop((layers, top, disk));
        assert!(lowest.upgrade().is_none(), "a node is left");
    });
    dropped.unwrap().join().unwrap();
}
