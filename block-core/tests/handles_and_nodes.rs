//! The core, where it once went wrong. What a handle may do, and the end and the reopening of a node: each test is the smallest case of one bug.

mod common;

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use block_core::{
    ChildRole, NodeSpec, Permissions, RequestFlags,
    driver::{Capabilities, DriverKind, Reopen},
    error::ErrorKind,
    flags::PermissionSet,
    graph::Graph,
    limits::Limits,
};
use common::{
    ALL, Memory, disk, env,
    layer::{Layer, over, overlay, share},
    poll_once,
};
use futures::executor::block_on;

#[test]
fn a_node_that_two_release_at_once_is_closed_once() {
    let graph = Graph::new(env());
    let layer = Arc::new(Layer::new(DriverKind::Filter));
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(512))))
        .unwrap();
    let node = graph
        .add_node(NodeSpec::new(layer.clone()).with_child(ChildRole::Filtered, "file", &file))
        .unwrap();
    layer.hold();
    let mut one = pin!(graph.release(&node));
    let mut two = pin!(graph.release(&node));
    assert!(poll_once(one.as_mut()).is_pending());
    let second = poll_once(two.as_mut());
    layer.let_go();
    block_on(async {
        one.await.unwrap();
        if second.is_pending() {
            two.await.unwrap();
        }
    });
    assert_eq!(layer.closes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_node_that_is_being_closed_takes_no_new_handle() {
    let graph = Graph::new(env());
    let layer = Arc::new(Layer::new(DriverKind::Filter));
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(512))))
        .unwrap();
    let node = graph
        .add_node(NodeSpec::new(layer.clone()).with_child(ChildRole::Filtered, "file", &file))
        .unwrap();
    layer.hold();
    let mut release = pin!(graph.release(&node));
    assert!(poll_once(release.as_mut()).is_pending());
    let attached = graph.attach(&node, ALL, "late");
    layer.let_go();
    block_on(release).unwrap();
    assert!(attached.is_err(), "a handle on a node that is closed");
}

#[test]
fn a_handle_without_write_permission_cant_change_the_header() {
    let disk = disk(Memory::new(4096));
    share(&disk);
    let (_, node, _) = over(&disk.graph, Layer::new(DriverKind::Filter), &disk.node);
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let reader = disk.graph.attach(&node, read_only, "reader").unwrap();
    let error = block_on(reader.change_backing(Some("evil"), None)).expect_err("header changed");
    assert_eq!(error.kind(), ErrorKind::NotPermitted);
}

#[test]
fn a_handle_without_write_permission_cant_copy_on_read() {
    let graph = Graph::new(env());
    let file = Arc::new(Memory::new(4096));
    let memory = graph.add_node(NodeSpec::new(file.clone())).unwrap();
    let base = graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(4096))))
        .unwrap();
    let node = overlay(&graph, &memory, &base);
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let reader = graph.attach(&node, read_only, "reader").unwrap();
    let buffer = block_core::buffer::Buffer::new(512);
    let (_lent, buf) = buffer.lend();
    let result = block_on(reader.readv(0, buf, RequestFlags::COPY_ON_READ));
    let log = file.log.lock().clone();
    assert!(
        result.is_err()
            || !log
                .iter()
                .any(|e| e.starts_with("write") || e.starts_with("zero")),
        "{log:?}"
    );
}

#[test]
fn a_refused_reopen_leaves_the_image_as_it_was() {
    let graph = Graph::new(env());
    let file = graph
        .add_node(NodeSpec::new(Arc::new(Layer::new(DriverKind::Protocol))))
        .unwrap();
    let mut layer = Layer::new(DriverKind::Format);
    layer.limits = Some(Limits::default());
    *layer.capabilities.lock() -= Capabilities::WRITE;
    let layer = Arc::new(layer);
    let node = graph
        .add_node(NodeSpec::new(layer.clone()).with_child(ChildRole::File, "file", &file))
        .unwrap();
    let unsharing = PermissionSet::new(
        Permissions::CONSISTENT_READ,
        Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
    );
    let _other = graph.attach(&file, unsharing, "other").unwrap();
    let changes = Reopen {
        read_only: Some(false),
        ..Reopen::default()
    };
    block_on(graph.reopen(&node, changes)).unwrap_err();
    assert!(
        !layer.capabilities.lock().contains(Capabilities::WRITE),
        "refused, but the image is writable now"
    );
}
