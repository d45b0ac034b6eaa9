//! The request path: what is validated, padded, split, held back, recorded, and what survives being dropped.

mod common;

use std::{pin::pin, sync::Arc, sync::atomic::Ordering, time::Duration};

use block_core::{
    IoBuf, Permissions, RequestFlags,
    bitmap::DirtyBitmap,
    driver::{Capabilities, Truncate},
    error::ErrorKind,
    flags::PermissionSet,
    graph::Graph,
    limits::Limits,
};
use common::{ALL, Memory, disk, disk_in, env, poll_once};
use futures::executor::block_on;

const NONE: RequestFlags = RequestFlags::empty();

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{what} didn't happen");
}

#[test]
fn what_is_written_is_read_back() {
    let disk = disk(Memory::new(1 << 20));
    block_on(async {
        disk.handle
            .write(12345, vec![7u8; 1000], NONE)
            .await
            .unwrap();
        let back = disk.handle.read(12000, 2000).await.unwrap();
        assert!(back[..345].iter().all(|b| *b == 0));
        assert!(back[345..1345].iter().all(|b| *b == 7));
        assert!(back[1345..].iter().all(|b| *b == 0));
    });
    assert_eq!(disk.node.stats().snapshot().write_bytes, 1000);
    assert_eq!(disk.node.tracker().in_flight(), 0);
}

#[test]
fn a_request_beyond_the_end_touches_nothing() {
    let disk = disk(Memory::new(4096).without(Capabilities::GROW));
    block_on(async {
        let error = disk
            .handle
            .write(4000, vec![1u8; 200], NONE)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.range(), Some((4000, 200)));
        assert!(disk.handle.read(4096, 1).await.is_err());
        assert!(disk.handle.read(u64::MAX, 1).await.is_err());
        assert!(disk.handle.write_zeroes(0, u64::MAX, NONE).await.is_err());
    });
    assert!(disk.memory.log.lock().is_empty());
}

#[test]
fn a_handle_without_write_permission_can_only_read() {
    let disk = disk(Memory::new(4096));
    let read_only = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let reader = disk.graph.attach(&disk.node, read_only, "reader").unwrap();
    block_on(async {
        assert_eq!(
            reader.write(0, vec![1u8], NONE).await.unwrap_err().kind(),
            ErrorKind::NotPermitted
        );
        assert_eq!(
            reader.discard(0, 1).await.unwrap_err().kind(),
            ErrorKind::NotPermitted
        );
        assert_eq!(
            reader.write_zeroes(0, 1, NONE).await.unwrap_err().kind(),
            ErrorKind::NotPermitted
        );
        reader.read(0, 4096).await.unwrap();
    });
}

#[test]
fn an_unaligned_write_reads_modifies_and_writes_whole_blocks() {
    let limits = Limits {
        request_alignment: 512,
        max_transfer: 2048,
        ..Limits::default()
    };
    let disk = disk(Memory::new(16384).with_limits(limits));
    block_on(async {
        disk.handle.write(0, vec![9u8; 16384], NONE).await.unwrap();
        disk.memory.log.lock().clear();
        disk.handle.write(100, vec![1u8; 3000], NONE).await.unwrap();
        let back = disk.handle.read(0, 16384).await.unwrap();
        for (at, byte) in back.iter().enumerate() {
            assert_eq!(
                *byte,
                if (100..3100).contains(&at) { 1 } else { 9 },
                "at {at}"
            );
        }
        let odd = disk.handle.read(99, 2).await.unwrap();
        assert_eq!(&odd[..], [9, 1]);
    });
    let log = disk.memory.log.lock();
    assert_eq!(
        &log[..4],
        [
            "read 0+512",
            "read 3072+512",
            "write 0+2048",
            "write 2048+1536"
        ]
    );
    for entry in log.iter() {
        let (_, range) = entry.split_once(' ').unwrap();
        let (offset, len) = range.split_once('+').unwrap();
        let (offset, len): (u64, u64) = (offset.parse().unwrap(), len.parse().unwrap());
        assert!(
            offset % 512 == 0 && len % 512 == 0 && len <= 2048,
            "{entry}"
        );
    }
}

#[test]
fn a_zero_write_keeps_its_aligned_middle_and_falls_back_for_the_ends() {
    let limits = Limits {
        request_alignment: 512,
        zeroes_alignment: 4096,
        ..Limits::default()
    };
    let disk = disk(Memory::new(65536).with_limits(limits));
    block_on(async {
        disk.handle.write(0, vec![3u8; 65536], NONE).await.unwrap();
        disk.memory.log.lock().clear();
        disk.handle
            .write_zeroes(1000, 20000, RequestFlags::MAY_UNMAP)
            .await
            .unwrap();
        let back = disk.handle.read(0, 65536).await.unwrap();
        for (at, byte) in back.iter().enumerate() {
            assert_eq!(
                *byte,
                if (1000..21000).contains(&at) { 0 } else { 3 },
                "at {at}"
            );
        }
    });
    assert!(
        disk.memory
            .log
            .lock()
            .contains(&"zero 4096+16384 unmap".to_owned())
    );
}

#[test]
fn a_zero_write_without_driver_support_becomes_zero_buffers_unless_forbidden() {
    let disk = disk(Memory::new(65536).without(Capabilities::WRITE_ZEROES));
    block_on(async {
        disk.handle.write(0, vec![3u8; 65536], NONE).await.unwrap();
        let error = disk
            .handle
            .write_zeroes(0, 4096, RequestFlags::NO_FALLBACK)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        disk.handle.write_zeroes(0, 65536, NONE).await.unwrap();
        assert!(
            disk.handle
                .read(0, 65536)
                .await
                .unwrap()
                .iter()
                .all(|b| *b == 0)
        );
    });
}

#[test]
fn a_zero_write_through_the_write_call_is_a_zero_write() {
    let disk = disk(Memory::new(65536));
    block_on(async {
        let flags = RequestFlags::ZERO_WRITE | RequestFlags::MAY_UNMAP;
        disk.handle
            .write(0, IoBuf::zeroes(4096), flags)
            .await
            .unwrap();
    });
    assert_eq!(*disk.memory.log.lock(), ["zero 0+4096 unmap"]);
    assert_eq!(disk.node.stats().snapshot().zero_ops, 1);
}

#[test]
fn fua_without_driver_support_is_a_flush_after_the_write() {
    let disk = disk(Memory::new(4096));
    block_on(disk.handle.write(0, vec![1u8; 512], RequestFlags::FUA)).unwrap();
    assert_eq!(disk.memory.flushes.load(Ordering::SeqCst), 1);
    block_on(async {
        disk.handle.set_write_through(true);
        disk.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
    });
    assert_eq!(disk.memory.flushes.load(Ordering::SeqCst), 2);
}

#[test]
fn a_failed_flush_is_never_retried_into_success() {
    let disk = disk(Memory::new(4096));
    block_on(async {
        disk.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        disk.memory.fail_flush.store(1, Ordering::SeqCst);
        assert!(disk.handle.flush().await.is_err());
        disk.memory.fail_flush.store(0, Ordering::SeqCst);
        disk.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        assert!(disk.handle.flush().await.is_err());
    });
    assert_eq!(disk.memory.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_flush_with_nothing_written_does_nothing() {
    let disk = disk(Memory::new(4096));
    block_on(async {
        disk.handle.flush().await.unwrap();
        disk.handle.write(0, vec![1u8; 512], NONE).await.unwrap();
        disk.handle.flush().await.unwrap();
        disk.handle.flush().await.unwrap();
    });
    assert_eq!(disk.memory.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_discard_waits_for_a_write_in_flight_and_holds_back_a_later_one() {
    let disk = disk(Memory::new(65536));
    disk.memory.hold();
    let mut write = pin!(disk.handle.write(0, vec![5u8; 4096], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    let mut discard = pin!(disk.handle.discard(0, 4096));
    assert!(poll_once(discard.as_mut()).is_pending());
    let mut later = pin!(disk.handle.write(4095, vec![6u8; 1], NONE));
    assert!(poll_once(later.as_mut()).is_pending());
    let mut elsewhere = pin!(disk.handle.write(8192, vec![6u8; 1], NONE));
    assert!(poll_once(elsewhere.as_mut()).is_pending());
    assert_eq!(
        disk.memory.parked.load(Ordering::SeqCst),
        2,
        "only what doesn't conflict is with the driver"
    );
    disk.memory.let_go();
    block_on(async {
        futures::join!(write, discard, later, elsewhere).2.unwrap();
        let back = disk.handle.read(0, 4096).await.unwrap();
        assert!(back[..4095].iter().all(|b| *b == 0));
        assert_eq!(back[4095], 6);
    });
    assert_eq!(disk.node.stats().snapshot().gate_waits, 2);
}

#[test]
fn without_the_gate_a_discard_overtakes_a_write() {
    let disk = disk_in(Graph::new_without_gate_for_tests(env()), Memory::new(65536));
    disk.memory.hold();
    let mut write = pin!(disk.handle.write(0, vec![5u8; 4096], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    let mut discard = pin!(disk.handle.discard(0, 4096));
    assert!(poll_once(discard.as_mut()).is_pending());
    assert_eq!(disk.memory.parked.load(Ordering::SeqCst), 2);
    disk.memory.let_go();
    block_on(async { futures::join!(write, discard).0.unwrap() });
}

#[test]
fn no_wait_is_refused_where_it_would_wait() {
    let disk = disk(Memory::new(65536));
    disk.memory.hold();
    let mut write = pin!(disk.handle.write(0, vec![5u8; 4096], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    let flags = RequestFlags::SERIALISING | RequestFlags::NO_WAIT;
    let error = block_on(disk.handle.write(0, vec![1u8; 512], flags)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    disk.memory.let_go();
    block_on(write).unwrap();
}

#[test]
fn a_dropped_write_runs_to_its_end_and_holds_back_newer_ones_until_then() {
    let disk = disk(Memory::new(65536));
    disk.memory.hold();
    {
        let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
        assert!(poll_once(old.as_mut()).is_pending());
    }
    assert_eq!(disk.node.stats().snapshot().dropped, 1);
    let mut newer = pin!(disk.handle.write(0, vec![2u8; 4096], NONE));
    assert!(poll_once(newer.as_mut()).is_pending());
    assert_eq!(
        disk.memory.parked.load(Ordering::SeqCst),
        1,
        "the newer one isn't with the driver"
    );
    disk.memory.let_go();
    block_on(newer).unwrap();
    let back = block_on(disk.handle.read(0, 4096)).unwrap();
    assert!(back.iter().all(|b| *b == 2));
    assert_eq!(
        disk.memory
            .log
            .lock()
            .iter()
            .filter(|e| e.starts_with("write"))
            .count(),
        2
    );
}

#[test]
fn flush_and_drain_wait_for_a_dropped_write() {
    let disk = disk(Memory::new(65536));
    disk.memory.hold();
    {
        let mut old = Box::pin(disk.handle.write(0, vec![1u8; 4096], NONE));
        assert!(poll_once(old.as_mut()).is_pending());
    }
    let mut flush = pin!(disk.handle.flush());
    assert!(poll_once(flush.as_mut()).is_pending());
    let mut drain = Box::pin(disk.graph.drain(&disk.node));
    assert!(poll_once(drain.as_mut()).is_pending());
    let memory = disk.memory.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        memory.let_go();
    });
    block_on(flush).unwrap();
    assert_eq!(disk.memory.flushes.load(Ordering::SeqCst), 1);
    drop(block_on(drain));
}

#[test]
fn a_waiter_that_is_dropped_leaves_no_trace() {
    let disk = disk(Memory::new(65536));
    disk.memory.hold();
    let mut write = pin!(disk.handle.write(0, vec![5u8; 4096], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    for _ in 0..100 {
        let mut discard = Box::pin(disk.handle.discard(0, 4096));
        assert!(poll_once(discard.as_mut()).is_pending());
    }
    assert_eq!(disk.node.tracker().in_flight(), 1);
    assert_eq!(disk.handle.in_flight(), 1);
    disk.memory.let_go();
    block_on(write).unwrap();
    assert_eq!(disk.node.tracker().in_flight(), 0);
}

#[test]
fn a_write_that_waited_behind_a_shrink_is_validated_again() {
    let disk = disk(Memory::new(65536).without(Capabilities::GROW));
    disk.memory.hold();
    let mut shrink = pin!(disk.handle.truncate(4096, Truncate::default()));
    assert!(poll_once(shrink.as_mut()).is_pending());
    let mut write = pin!(disk.handle.write(8192, vec![5u8; 4096], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    disk.memory.let_go();
    let (shrunk, written) = block_on(async { futures::join!(shrink, write) });
    shrunk.unwrap();
    assert_eq!(written.unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(disk.memory.data.lock().len(), 4096);
}

#[test]
fn a_drained_section_stops_producers_and_nests() {
    let disk = disk(Memory::new(65536));
    let outer = block_on(disk.graph.drain(&disk.node));
    let inner = block_on(disk.graph.drain_all());
    let mut write = pin!(disk.handle.write(0, vec![5u8; 512], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    drop(outer);
    assert!(poll_once(write.as_mut()).is_pending());
    assert!(disk.memory.log.lock().is_empty());
    drop(inner);
    block_on(write).unwrap();
}

#[test]
fn a_drain_that_is_dropped_lets_producers_go_on() {
    let disk = disk(Memory::new(65536));
    disk.memory.hold();
    let mut write = pin!(disk.handle.write(0, vec![5u8; 512], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    {
        let mut drain = Box::pin(disk.graph.drain(&disk.node));
        assert!(poll_once(drain.as_mut()).is_pending());
    }
    disk.memory.let_go();
    block_on(async {
        write.await.unwrap();
        disk.handle.write(0, vec![5u8; 512], NONE).await.unwrap();
    });
}

#[test]
fn bitmaps_record_every_kind_of_change() {
    let disk = disk(Memory::new(1 << 20));
    let bitmap = Arc::new(DirtyBitmap::new(1 << 20, 4096).unwrap());
    disk.node.add_bitmap(bitmap.clone());
    block_on(async {
        disk.handle.write(0, vec![5u8; 1], NONE).await.unwrap();
        disk.handle.write_zeroes(8192, 1, NONE).await.unwrap();
        disk.handle.discard(65536, 4096).await.unwrap();
        disk.handle.read(0, 1 << 20).await.unwrap();
    });
    assert!(bitmap.is_dirty(0) && bitmap.is_dirty(8192) && bitmap.is_dirty(65536));
    assert_eq!(bitmap.dirty_granules(), 3);
}

#[test]
fn a_stress_of_many_threads_ends_with_nothing_in_flight() {
    let disk = disk(Memory::new(1 << 16));
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let handle = disk.handle.clone();
            scope.spawn(move || {
                block_on(async {
                    for step in 0..400u64 {
                        let at = (step * 7919 + thread * 104729) % 60000;
                        match (step + thread) % 5 {
                            0 => handle.discard(at, 3000).await.unwrap(),
                            1 => handle.write_zeroes(at, 3000, NONE).await.unwrap(),
                            2 => drop(handle.read(at, 3000).await.unwrap()),
                            3 => handle.flush().await.unwrap(),
                            _ => handle
                                .write(at, vec![thread as u8; 3000], NONE)
                                .await
                                .unwrap(),
                        }
                    }
                });
            });
        }
        let graph = disk.graph.clone();
        let node = disk.node.clone();
        scope.spawn(move || {
            for _ in 0..50 {
                drop(block_on(graph.drain(&node)));
            }
        });
    });
    wait_until("quiet", || {
        disk.node.tracker().in_flight() == 0 && disk.handle.in_flight() == 0
    });
}

#[test]
fn permissions_conflict_by_name() {
    let disk = disk(Memory::new(4096));
    let exclusive = PermissionSet::new(Permissions::WRITE, Permissions::CONSISTENT_READ);
    let error = disk
        .graph
        .attach(&disk.node, exclusive, "second")
        .unwrap_err();
    assert!(
        error.reason().starts_with("Permission conflict on node '#block001': permissions 'write, write unchanged, resize' are both required by block device 'guest'"),
        "{error}"
    );
    disk.handle
        .set_permissions(PermissionSet::new(
            Permissions::CONSISTENT_READ,
            Permissions::all(),
        ))
        .unwrap();
    let second = disk.graph.attach(&disk.node, exclusive, "second").unwrap();
    assert!(disk.handle.set_permissions(ALL).is_err());
    drop(second);
    disk.handle.set_permissions(ALL).unwrap();
}
