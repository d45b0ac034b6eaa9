//! The core, where it once went wrong. What a chain of layers says about its content, and how limits cut requests.

mod common;

use std::sync::Arc;

use block_core::{NodeSpec, RequestFlags, driver::DriverKind, graph::Graph, limits::Limits};
use common::{
    ALL, Memory, disk, env,
    layer::{Layer, NONE, over, overlay, share},
};
use futures::executor::block_on;

#[test]
fn status_above_the_node_itself_asks_no_layer() {
    let disk = disk(Memory::new(65536));
    let node = disk.node.clone();
    let status = block_on(disk.handle.block_status_above(Some(&node), 0, 512)).unwrap();
    assert!(!status.is_allocated(), "{status:?}");
}

#[test]
fn raw_over_an_overlay_shows_what_the_backing_file_holds() {
    let disk = disk(Memory::new(65536));
    let graph = &disk.graph;
    share(&disk);
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(65536))))
        .unwrap();
    let overlay = overlay(graph, &file, &disk.node);
    let (_, _, raw) = over(graph, Layer::new(DriverKind::Format), &overlay);
    let status = block_on(raw.block_status(0, 4096)).unwrap();
    assert!(
        status.is_data(),
        "the backing file has data there: {status:?}"
    );
}

#[test]
fn copy_on_read_of_a_long_run_goes_in_pieces_of_a_mebibyte() {
    const LEN: usize = (4 << 20) + 512;
    let graph = Graph::new(env());
    let file = Arc::new(Memory::new(LEN));
    let memory = graph.add_node(NodeSpec::new(file.clone())).unwrap();
    let base = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(LEN))))
        .unwrap();
    let node = overlay(&graph, &memory, &base);
    let handle = graph.attach(&node, ALL, "guest").unwrap();
    let (_lent, buf) = block_core::buffer::Buffer::new(LEN).lend();
    block_on(handle.readv(0, buf, RequestFlags::COPY_ON_READ)).unwrap();
    let copied: Vec<u64> = file
        .log
        .lock()
        .iter()
        .filter(|entry| !entry.starts_with("read"))
        .map(|entry| entry.split_once('+').unwrap().1.parse().unwrap())
        .collect();
    assert_eq!(copied, [1 << 20, 1 << 20, 1 << 20, 1 << 20, 512]);
}

#[test]
fn merged_limits_never_split_below_the_alignment() {
    let a = Limits {
        max_transfer: 2048,
        ..Limits::default()
    };
    let b = Limits {
        request_alignment: 4096,
        ..Limits::default()
    };
    let disk = disk(Memory::new(65536).with_limits(a.merge(b)));
    block_on(disk.handle.write(0, vec![1u8; 16384], NONE)).unwrap();
    for entry in disk.memory.log.lock().iter() {
        let (_, range) = entry.split_once(' ').unwrap();
        let (offset, len) = range.split_once('+').unwrap();
        let (offset, len): (u64, u64) = (offset.parse().unwrap(), len.parse().unwrap());
        assert!(offset % 4096 == 0 && len % 4096 == 0, "{entry}");
    }
}

#[test]
fn a_zero_write_never_exceeds_max_zeroes() {
    let limits = Limits {
        zeroes_alignment: 65536,
        max_zeroes: 4096,
        ..Limits::default()
    };
    let disk = disk(Memory::new(1 << 18).with_limits(limits));
    block_on(disk.handle.write_zeroes(4096, (1 << 18) - 4096, NONE)).unwrap();
    for entry in disk.memory.log.lock().iter() {
        let len: u64 = entry.split_once('+').unwrap().1.parse().unwrap();
        assert!(len <= 4096, "{entry}");
    }
}
