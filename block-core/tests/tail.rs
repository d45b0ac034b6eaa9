//! The last block of a node whose length isn't a multiple of what the layers above it read in.

mod common;

use std::{any::Any, sync::Arc};

use block_core::{
    ErrorKind, async_trait,
    buffer::IoBufMut,
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, MapIntent, Mapping},
    error::Result,
    flags::{PermissionSet, Permissions},
    graph::{Graph, NodeSpec},
    handle::BlockHandle,
    limits::Limits,
    node::{Edges, Node},
    request::Request,
};
use common::{Memory, env};
use futures::executor::block_on;

const LENGTH: u64 = 5000;

/// Wants whole blocks of its own size, and passes them on. What lies beyond the end has to be zero.
struct Blocks {
    size: u64,
    maps: bool,
}

#[async_trait]
impl BlockDriver for Blocks {
    fn name(&self) -> &'static str {
        "blocks"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        if self.maps {
            Capabilities::TRY_MAP
        } else {
            Capabilities::empty()
        }
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges.primary().map_or(0, |child| child.length())
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits {
            request_alignment: self.size,
            ..Limits::default()
        }
    }
    fn try_map(&self, _: &Edges, offset: u64, len: u64, _: MapIntent) -> Mapping {
        Mapping::Data {
            edge: 0,
            offset,
            len,
            pin: None,
        }
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        assert!(offset % self.size == 0 && buf.len() as u64 % self.size == 0);
        let data = request.file()?.read_buffer(offset, buf.len()).await?;
        let inside = LENGTH.saturating_sub(offset).min(data.len() as u64) as usize;
        assert!(data[inside..].iter().all(|byte| *byte == 0));
        buf.copy_from_slice(0, &data);
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn content() -> Vec<u8> {
    (0..LENGTH).map(|at| (at % 251) as u8 + 1).collect()
}

fn storage(graph: &Arc<Graph>) -> Arc<Node> {
    let memory = Memory::new(LENGTH as usize);
    memory.data.lock().copy_from_slice(&content());
    graph.add_node(NodeSpec::new(Arc::new(memory))).unwrap()
}

fn over(graph: &Arc<Graph>, below: &Arc<Node>, size: u64, maps: bool) -> Arc<Node> {
    let spec = NodeSpec::new(Arc::new(Blocks { size, maps }));
    graph
        .add_node(spec.with_child(ChildRole::File, "file", below))
        .unwrap()
}

fn attach(graph: &Arc<Graph>, node: &Arc<Node>) -> BlockHandle {
    let set = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    graph.attach(node, set, "guest").unwrap()
}

#[test]
fn the_tail_reads_whole_through_layers_that_read_in_larger_blocks() {
    for maps in [false, true] {
        for sizes in [
            vec![512],
            vec![16, 4096],
            vec![4096, 16],
            vec![512, 4096, 512],
        ] {
            let graph = Graph::new(env());
            let mut top = storage(&graph);
            for &size in &sizes {
                top = over(&graph, &top, size, maps);
            }
            let handle = attach(&graph, &top);
            for (offset, len) in [
                (4999, 1),
                (4990, 10),
                (4608, 392),
                (4096, 904),
                (1, 4999),
                (0, 5000),
            ] {
                let read = block_on(handle.read(offset, len))
                    .unwrap_or_else(|error| panic!("{offset}+{len} through {sizes:?}: {error}"));
                assert_eq!(read[..], content()[offset as usize..]);
            }
            let beyond = block_on(handle.read(4999, 2)).unwrap_err();
            assert_eq!(beyond.kind(), ErrorKind::Io, "the guest sees the real end");
        }
    }
}

/// Asks for a block more than there is.
struct Greedy;

#[async_trait]
impl BlockDriver for Greedy {
    fn name(&self) -> &'static str {
        "greedy"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::empty()
    }
    fn length(&self, _: &Edges) -> u64 {
        1 << 20
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits {
            request_alignment: 512,
            ..Limits::default()
        }
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        request.file()?.read(offset, buf).await
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn a_layer_that_reads_past_the_last_block_of_its_child_still_fails() {
    let graph = Graph::new(env());
    let file = storage(&graph);
    let spec = NodeSpec::new(Arc::new(Greedy)).with_child(ChildRole::File, "file", &file);
    let handle = attach(&graph, &graph.add_node(spec).unwrap());
    assert!(block_on(handle.read(4608, 512)).is_ok());
    let past = block_on(handle.read(5120, 512)).unwrap_err();
    assert_eq!(past.kind(), ErrorKind::Io);
    assert!(block_on(handle.read(4608, 1024)).is_err());
}
