//! The core, where it once went wrong. Requests that were dropped, that wait, or that a drain has to wait for: each test is the smallest case of one bug.

mod common;

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use block_core::{
    Permissions, driver::DriverKind, error::Result, flags::PermissionSet, graph::Graph,
};
use common::{
    ALL, Memory, disk, disk_in, env,
    layer::{Layer, NONE, NoTasks, ends, over, share},
    poll_once,
};
use futures::{executor::block_on, future::BoxFuture};
use parking_lot::Mutex;

#[test]
fn dropped_requests_that_wait_at_a_childs_gate_are_polled_a_few_times_each() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph.clone(), Memory::new(1 << 16));
    share(&disk);
    let (layer, _, handle) = over(&graph, Layer::new(DriverKind::Filter), &disk.node);
    disk.memory.hold();
    let mut discard = pin!(disk.handle.discard(0, 4096));
    assert!(poll_once(discard.as_mut()).is_pending());
    let count: u64 = 6;
    for at in 0..count {
        let mut write = Box::pin(handle.write(at * 512, vec![1u8; 512], NONE));
        assert!(poll_once(write.as_mut()).is_pending());
    }
    layer.polls.store(0, Ordering::SeqCst);
    let mut flush = pin!(handle.flush());
    assert!(poll_once(flush.as_mut()).is_pending());
    let polls = layer.polls.load(Ordering::SeqCst);
    disk.memory.let_go();
    assert!(
        polls <= 8 * count,
        "one look at {count} dropped requests polled them {polls} times"
    );
}

#[test]
fn a_waiter_that_slept_before_the_request_was_dropped_still_finishes_it() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph, Memory::new(1 << 16));
    disk.memory.hold();
    let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
    assert!(poll_once(old.as_mut()).is_pending());
    let (handle, memory, node) = (disk.handle.clone(), disk.memory.clone(), disk.node.clone());
    let waiter = std::thread::spawn(move || block_on(handle.discard(0, 4096)));
    while node.stats().snapshot().gate_waits == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    drop(old);
    memory.let_go();
    assert!(
        ends(move || waiter.join().unwrap().unwrap()),
        "the discard waits for a dropped write that nobody polls"
    );
}

#[test]
fn a_drain_that_slept_before_the_request_was_dropped_still_finishes_it() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph.clone(), Memory::new(1 << 16));
    disk.memory.hold();
    let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
    assert!(poll_once(old.as_mut()).is_pending());
    let node = disk.node.clone();
    let drain = std::thread::spawn(move || drop(block_on(graph.drain(&node))));
    std::thread::sleep(Duration::from_millis(50));
    drop(old);
    disk.memory.let_go();
    assert!(ends(move || drain.join().unwrap()), "the drain hangs");
}

#[test]
fn a_drain_waits_for_a_dropped_write_of_a_handle_that_is_gone() {
    let graph = Graph::new(Arc::new(NoTasks));
    let mut disk = disk_in(graph.clone(), Memory::new(1 << 16));
    let second = graph.attach(&disk.node, ALL, "second").unwrap();
    disk.memory.hold();
    {
        let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
        assert!(poll_once(old.as_mut()).is_pending());
    }
    disk.handle = Arc::new(second); // drops the first handle
    let mut drain = Box::pin(graph.drain(&disk.node));
    assert!(
        poll_once(drain.as_mut()).is_pending(),
        "drained with a write in the driver"
    );
}

#[test]
fn a_drain_waits_for_a_status_request_whose_future_was_dropped() {
    let graph = Graph::new(Arc::new(NoTasks));
    let disk = disk_in(graph.clone(), Memory::new(1 << 16));
    disk.handle.set_permissions(PermissionSet::NONE).unwrap();
    let (layer, node, handle) = over(&graph, Layer::new(DriverKind::Format), &disk.node);
    layer.hold();
    {
        let mut status = Box::pin(handle.block_status(0, 512));
        assert!(poll_once(status.as_mut()).is_pending());
    }
    let mut drain = Box::pin(graph.drain(&node));
    assert!(
        poll_once(drain.as_mut()).is_pending(),
        "drained with a status request in the driver"
    );
}

#[test]
fn a_copy_that_waits_to_be_let_in_doesnt_hold_up_a_drain() {
    let graph = Graph::new(env());
    let a = disk_in(graph.clone(), Memory::new(1 << 16));
    let b = disk_in(graph.clone(), Memory::new(1 << 16));
    let target_drained = block_on(graph.drain(&b.node));
    let mut copy = pin!(block_core::copy_range(
        &a.handle, 0, &b.handle, 0, 4096, NONE
    ));
    assert!(poll_once(copy.as_mut()).is_pending());
    // As replace_node does: both nodes, one after the other.
    let mut second = Box::pin(graph.drain(&a.node));
    let quiet = poll_once(second.as_mut()).is_ready();
    drop(target_drained);
    assert!(
        quiet,
        "a copy that isn't admitted anywhere counts as in flight"
    );
}

#[test]
fn a_copy_inside_one_file_doesnt_deadlock_with_a_zero_write_of_both_ends() {
    let graph = Graph::new(env());
    let disk = disk_in(graph.clone(), Memory::new(1 << 20));
    share(&disk);
    let (_, _, source) = over(&graph, Layer::new(DriverKind::Filter).mapped(0), &disk.node);
    let (to, _, target) = over(
        &graph,
        Layer::new(DriverKind::Filter).mapped(1 << 19),
        &disk.node,
    );
    let zero: Arc<Mutex<Option<BoxFuture<'static, Result<()>>>>> = Arc::default();
    let (slot, handle) = (zero.clone(), disk.handle.clone());
    *to.in_map.lock() = Some(Box::new(move || {
        let mut future: BoxFuture<'static, Result<()>> =
            Box::pin(async move { handle.write_zeroes(0, 1 << 20, NONE).await });
        let _ = future.as_mut().poll(&mut std::task::Context::from_waker(
            futures::task::noop_waker_ref(),
        ));
        *slot.lock() = Some(future);
    }));
    let done = ends(move || {
        block_on(async {
            let copy = block_core::copy_range(&source, 0, &target, 0, 4096, NONE);
            let mut copy = pin!(copy);
            let _ = poll_once(copy.as_mut());
            let zero = zero.lock().take();
            match zero {
                Some(zero) => {
                    let _ = futures::join!(copy, zero);
                }
                None => copy.await.unwrap(),
            }
        });
    });
    assert!(done, "the copy and the zero write wait for each other");
}

#[test]
fn a_write_that_waited_behind_a_drain_is_refused_when_the_permission_is_gone() {
    let disk = disk(Memory::new(4096));
    let drained = block_on(disk.graph.drain(&disk.node));
    let mut write = pin!(disk.handle.write(0, vec![1u8; 512], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    disk.handle.set_permissions(read_only).unwrap();
    drop(drained);
    let result = block_on(write);
    assert!(result.is_err(), "written without the permission");
}
