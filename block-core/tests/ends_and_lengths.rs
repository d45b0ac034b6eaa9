//! The core, where it once went wrong. Where a node ends: growing, shrinking, storage that is shorter or ends in the middle of a block.

mod common;

use std::{
    any::Any,
    sync::{Arc, atomic::Ordering},
};

use block_core::{
    ChildRole, IoBufMut, NodeSpec, Permissions, async_trait,
    bitmap::DirtyBitmap,
    driver::{BlockDriver, Capabilities, DriverKind, Truncate},
    error::Result,
    flags::PermissionSet,
    graph::Graph,
    limits::Limits,
    node::Edges,
    request::Request,
    status::StatusFlags,
};
use common::{
    Memory, disk, env,
    layer::{Layer, NONE, over, share},
};
use futures::executor::block_on;

#[test]
fn a_write_that_grows_the_node_is_recorded_in_its_bitmaps() {
    let disk = disk(Memory::new(4096));
    let bitmap = Arc::new(DirtyBitmap::new(4096, 512).unwrap());
    disk.node.add_bitmap(bitmap.clone());
    block_on(disk.handle.write(8192, vec![1u8; 512], NONE)).unwrap();
    assert_eq!(disk.node.length(), 8704);
    assert!(
        bitmap.is_dirty(8192),
        "the write past the old end isn't recorded"
    );
}

#[test]
fn a_write_that_looked_at_the_length_before_a_shrink_ended_is_refused() {
    let disk = disk(Memory::new(65536).without(Capabilities::GROW));
    share(&disk);
    let (layer, node, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    assert_eq!(node.length(), 65536);
    let shrinker = handle.clone();
    // Another thread gets in between the look at the length and the ticket.
    *layer.in_length.lock() = Some(Box::new(move || {
        std::thread::spawn(move || block_on(shrinker.truncate(4096, Truncate::default())))
            .join()
            .unwrap()
            .unwrap();
    }));
    let error = block_on(handle.write(8192, vec![5u8; 4096], NONE)).unwrap_err();
    assert_eq!(
        error.node().map(str::to_owned),
        Some(node.name().to_owned()),
        "the driver was given a request beyond the end: {error}"
    );
    assert_eq!(
        layer.polls.load(Ordering::SeqCst),
        0,
        "the driver was called"
    );
}

#[test]
fn a_read_that_maps_past_the_end_of_a_short_file_reads_as_on_the_long_way() {
    let disk = disk(Memory::new(4096));
    share(&disk);
    let mut long = Layer::new(DriverKind::Filter).mapped(0);
    long.length = Some(65536);
    let (_, _, handle) = over(&disk.graph, long, &disk.node);
    block_on(handle.read(4096 - 512, 1024)).expect("the driver would have padded it with zeroes");
}

/// A raw format whose driver passes requests on as they are, over storage whose length isn't a multiple of its alignment.
struct Plain;
#[async_trait]
impl BlockDriver for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges.primary().map_or(0, |child| child.length())
    }
    fn limits(&self, edges: &Edges) -> Limits {
        edges
            .primary()
            .map_or_else(Limits::default, |child| child.limits())
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
fn the_last_bytes_of_a_raw_image_over_aligned_storage_can_be_read() {
    let limits = Limits {
        request_alignment: 512,
        ..Limits::default()
    };
    // The storage zero-fills the last block by itself: it is 1024 bytes in memory, 1000 bytes long.
    let graph = Graph::new(env());
    let storage = Arc::new(Clipped(Memory::new(1024).with_limits(limits)));
    let file = graph.add_node(NodeSpec::new(storage)).unwrap();
    let spec = NodeSpec::new(Arc::new(Plain)).with_child(ChildRole::DataFile, "file", &file);
    let node = graph.add_node(spec).unwrap();
    let set = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let handle = graph.attach(&node, set, "top").unwrap();
    block_on(handle.read(900, 100)).expect("inside the image");
}

struct Clipped(Memory);
#[async_trait]
impl BlockDriver for Clipped {
    fn name(&self) -> &'static str {
        "clipped"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn length(&self, _: &Edges) -> u64 {
        1000
    }
    fn limits(&self, _: &Edges) -> Limits {
        self.0.limits
    }
    async fn read(self: Arc<Self>, _: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let data = self.0.data.lock();
        let at = offset as usize;
        buf.copy_from_slice(0, &data[at..at + buf.len()]);
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

#[test]
fn status_through_a_filter_ends_at_the_end() {
    let disk = disk(Memory::new(65536));
    share(&disk);
    let (_, _, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    let beyond = block_on(handle.block_status(65536, 512)).unwrap();
    assert_eq!(beyond.len, 0, "beyond the end there is nothing: {beyond:?}");
    let across = block_on(handle.block_status(0, 1 << 20)).unwrap();
    assert_eq!(across.len, 65536);
    assert!(across.flags.contains(StatusFlags::EOF), "{across:?}");
}

#[test]
fn status_of_an_enormous_range_through_a_filter_doesnt_panic() {
    let disk = disk(Memory::new(65536));
    share(&disk);
    let (_, _, handle) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    block_on(async {
        handle.block_status(1, u64::MAX).await.unwrap();
        handle
            .is_allocated_above(None, false, 1, u64::MAX)
            .await
            .unwrap();
    });
}

#[test]
fn clearing_a_bitmap_at_the_end_of_the_number_space_doesnt_panic() {
    let bitmap = DirtyBitmap::new(4096, 512).unwrap();
    bitmap.clear(u64::MAX, 1);
}
