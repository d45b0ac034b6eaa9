//! Guest I/O: content, allocation, parents, CIDs, concurrency.

use std::sync::Arc;

use block_core::{
    ErrorKind, OpenOptions, PermissionSet, Permissions, RequestFlags,
    image::{CheckMode, Progress},
};
use futures::executor::block_on;

use super::{Numbers, World, cid, counter, permit, read, write};

const GRAIN: u64 = 65536;

#[test]
fn what_was_written_is_read_after_reopening() {
    for options in [
        "size=10M",
        "size=10M,subformat=monolithicFlat",
        "size=10M,zeroed_grain=on",
    ] {
        let world = World::new();
        world.create("a.vmdk", options);
        let handle = world.open("a.vmdk");
        let mut model = vec![0; 10 << 20];
        let mut numbers = Numbers(7);
        for round in 0..200_u64 {
            let offset = numbers.below(10 << 20);
            let len = (1 + numbers.below(3 * GRAIN)).min((10 << 20) - offset);
            let range = offset as usize..(offset + len) as usize;
            match round % 8 {
                0 => {
                    model[range].fill(0);
                    let flags = RequestFlags::MAY_UNMAP;
                    block_on(handle.write_zeroes(offset, len, flags)).unwrap();
                }
                1 => assert_eq!(read(&handle, offset, len as usize), model[range]),
                2 if round % 3 == 0 => block_on(handle.flush()).unwrap(),
                _ => {
                    let byte = round as u8 | 1;
                    model[range].fill(byte);
                    write(&handle, offset, vec![byte; len as usize]);
                }
            }
        }
        assert_eq!(read(&handle, 0, 10 << 20), model, "{options}");
        block_on(handle.close()).unwrap();
        let handle = world.open("a.vmdk");
        assert_eq!(read(&handle, 0, 10 << 20), model, "{options}, reopened");
        let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
        assert!(
            report.is_clean() && report.findings.is_empty(),
            "{:?}",
            report.findings
        );
    }
}

#[test]
fn a_disk_may_end_inside_of_a_grain() {
    let world = World::new();
    world.create("a.vmdk", "size=100k,zeroed_grain=on");
    let handle = world.open("a.vmdk");
    write(&handle, 99 << 10, vec![5; 1024]);
    assert_eq!(read(&handle, GRAIN, 36864)[35840..], [5; 1024]);
    block_on(handle.write_zeroes(GRAIN, 36864, RequestFlags::empty())).unwrap();
    assert_eq!(read(&handle, GRAIN, 36864), vec![0; 36864]);
    let error = block_on(handle.read(100 << 10, 1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
}

#[test]
fn an_overlay_shows_its_parent_and_copies_on_write() {
    let world = World::new();
    world.create("base.vmdk", "size=1M");
    let base = world.open("base.vmdk");
    write(&base, 0, vec![1; 3 * GRAIN as usize]);
    block_on(base.close()).unwrap();
    world.create(
        "top.vmdk",
        "size=1M,backing_file=base.vmdk,backing_fmt=vmdk,zeroed_grain=on",
    );
    let top = world.open("top.vmdk");
    assert_eq!(
        read(&top, 0, 1 << 20)[..3 * GRAIN as usize],
        vec![1; 3 * GRAIN as usize]
    );
    write(&top, 100, vec![2; 10]);
    write(&top, GRAIN - 5, vec![3; 10]);
    block_on(top.write_zeroes(2 * GRAIN, GRAIN, RequestFlags::empty())).unwrap();
    let mut model = vec![0; 1 << 20];
    model[..2 * GRAIN as usize].fill(1);
    model[100..110].fill(2);
    model[GRAIN as usize - 5..GRAIN as usize + 5].fill(3);
    assert_eq!(read(&top, 0, 1 << 20), model);
    assert_eq!(counter(&top, "grains-allocated"), 2);
    assert_eq!(counter(&top, "copies-on-write"), 2);
    // The zeroed grain takes no place, and can be written again.
    write(&top, 2 * GRAIN + 1, vec![4; 1]);
    model[2 * GRAIN as usize + 1] = 4;
    assert_eq!(read(&top, 0, 1 << 20), model);
    assert_eq!(counter(&top, "copies-on-write"), 2);
    block_on(top.close()).unwrap();
    assert_eq!(read(&world.open("top.vmdk"), 0, 1 << 20), model);
}

#[test]
fn zeroes_over_a_parent_are_written_when_there_are_no_zeroed_grains() {
    let world = World::new();
    world.create("base.vmdk", "size=1M");
    let base = world.open("base.vmdk");
    write(&base, 0, vec![1; 1 << 20]);
    block_on(base.close()).unwrap();
    world.create("top.vmdk", "size=1M,backing_file=base.vmdk");
    let top = world.open("top.vmdk");
    let flags = RequestFlags::NO_FALLBACK;
    let error = block_on(top.write_zeroes(0, GRAIN, flags)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    assert_eq!(counter(&top, "grains-allocated"), 0);
    block_on(top.write_zeroes(100, 3 * GRAIN, RequestFlags::MAY_UNMAP)).unwrap();
    let content = read(&top, 0, 4 * GRAIN as usize);
    assert!(
        content[100..100 + 3 * GRAIN as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(
        content[..100]
            .iter()
            .chain(&content[100 + 3 * GRAIN as usize..])
            .all(|b| *b == 1)
    );
}

#[test]
fn zeroes_without_a_parent_allocate_nothing() {
    let world = World::new();
    world.create("a.vmdk", "size=1M");
    let handle = world.open("a.vmdk");
    write(&handle, 10, vec![1; 10]);
    block_on(handle.write_zeroes(0, 1 << 20, RequestFlags::empty())).unwrap();
    assert_eq!(counter(&handle, "grains-allocated"), 1);
    assert_eq!(read(&handle, 0, 1 << 20), vec![0; 1 << 20]);
}

#[test]
fn a_discarded_grain_keeps_its_place() {
    let world = World::new();
    world.create("a.vmdk", "size=1M");
    let handle = world.open("a.vmdk");
    write(&handle, 0, vec![1; 2 * GRAIN as usize]);
    block_on(handle.discard(0, GRAIN)).unwrap();
    assert_eq!(read(&handle, GRAIN, 10), [1; 10]);
    write(&handle, 0, vec![2; 10]);
    assert_eq!(read(&handle, 0, 10), [2; 10]);
    assert_eq!(counter(&handle, "grains-allocated"), 2);
}

#[test]
fn the_cid_changes_with_the_first_write_after_each_open_only() {
    for options in ["size=1M", "size=1M,subformat=monolithicFlat"] {
        let world = World::new();
        world.create("a.vmdk", options);
        let handle = world.open("a.vmdk");
        let first = cid(&handle);
        read(&handle, 0, 10);
        assert_eq!(cid(&handle), first);
        write(&handle, 0, vec![1]);
        let second = cid(&handle);
        assert_ne!(first, second);
        write(&handle, 1, vec![1]);
        assert_eq!(cid(&handle), second);
        block_on(handle.close()).unwrap();
        let handle = world.open("a.vmdk");
        assert_eq!(cid(&handle), second, "{options}");
        block_on(handle.write(0, vec![1], RequestFlags::WRITE_UNCHANGED)).unwrap();
        assert_eq!(cid(&handle), second, "{options}");
    }
}

#[test]
fn a_parent_that_changed_is_not_read_through_to() {
    let world = World::new();
    world.create("base.vmdk", "size=1M");
    world.create("top.vmdk", "size=1M,backing_file=base.vmdk");
    let base = world.open("base.vmdk");
    write(&base, 0, vec![1]);
    block_on(base.close()).unwrap();
    let top = world.open("top.vmdk");
    let error = block_on(top.read(0, 10)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(error.field().unwrap().name, "parentCID");
    // What needs nothing from below goes on working.
    write(&top, 0, vec![7; GRAIN as usize]);
    assert_eq!(read(&top, 0, 10), [7; 10]);
    assert!(block_on(top.write(GRAIN, vec![1], RequestFlags::empty())).is_err());
}

#[test]
fn files_that_an_image_names_are_opened_only_with_permission() {
    let world = World::new();
    world.create("flat.vmdk", "size=1M,subformat=monolithicFlat");
    let error = world
        .try_open("flat.vmdk", "", OpenOptions::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AccessDenied);
    world.create("base.vmdk", "size=1M");
    world.create("top.vmdk", "size=1M,backing_file=base.vmdk");
    let error = world
        .try_open("top.vmdk", "", OpenOptions::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AccessDenied);
}

#[test]
fn a_read_only_image_takes_no_writes_and_keeps_its_bytes() {
    let world = World::new();
    world.create("a.vmdk", "size=1M");
    let before = world.bytes("a.vmdk");
    let handle = world.try_open("a.vmdk", "read-only=on", permit()).unwrap();
    assert_eq!(read(&handle, 0, 10), [0; 10]);
    assert!(block_on(handle.write(0, vec![1], RequestFlags::empty())).is_err());
    block_on(handle.close()).unwrap();
    assert_eq!(world.bytes("a.vmdk"), before);
}

#[test]
fn threads_that_write_side_by_side_disturb_nobody() {
    let world = World::new();
    world.create("base.vmdk", "size=64M");
    let base = world.open("base.vmdk");
    write(&base, 0, vec![0xbb; 64 * GRAIN as usize]);
    block_on(base.close()).unwrap();
    world.create(
        "top.vmdk",
        "size=64M,backing_file=base.vmdk,zeroed_grain=on",
    );
    let handle = world.open("top.vmdk");
    // Each thread owns every fourth 4 KiB block; all share all grains.
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let handle = &handle;
            scope.spawn(move || {
                let mut numbers = Numbers(thread + 1);
                let mut model = vec![0xbb_u8; 64 * GRAIN as usize];
                for round in 0..300_u64 {
                    let block = numbers.below(64 * 16 / 4) * 4 + thread;
                    let range = (block * 4096) as usize..(block * 4096 + 4096) as usize;
                    if round % 5 == 0 {
                        assert_eq!(read(handle, block * 4096, 4096), model[range]);
                    } else if round % 7 == 0 {
                        model[range].fill(0);
                        let flags = RequestFlags::MAY_UNMAP;
                        block_on(handle.write_zeroes(block * 4096, 4096, flags)).unwrap();
                    } else {
                        let byte = (round * 4 + thread) as u8;
                        model[range].fill(byte);
                        write(handle, block * 4096, vec![byte; 4096]);
                    }
                    if round % 50 == 0 {
                        block_on(handle.flush()).unwrap();
                    }
                }
                for block in (thread..64 * 16).step_by(4) {
                    let range = (block * 4096) as usize..(block * 4096 + 4096) as usize;
                    assert_eq!(
                        read(handle, block * 4096, 4096),
                        model[range],
                        "block {block}"
                    );
                }
            });
        }
    });
    assert!(counter(&handle, "copies-on-write") > 0);
    let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

/// Writes, zero writes and discards on the grains of a small region, by several threads at once, and grains around it
/// that nobody touches. Tells how often somebody waited for a claim, and at the gate.
fn storm(world: &World) -> (u64, u64) {
    const GRAINS: u64 = 24;
    const REGION: std::ops::Range<u64> = 8..16;
    world.create("base.vmdk", "size=2M");
    let base = world.open("base.vmdk");
    write(&base, 0, vec![0xbb; (GRAINS * GRAIN) as usize]);
    block_on(base.close()).unwrap();
    world.create("a.vmdk", "size=2M,backing_file=base.vmdk,zeroed_grain=on");
    let handle = world.open("a.vmdk");
    for grain in (0..GRAINS).filter(|grain| grain % 3 == 0 && !REGION.contains(grain)) {
        write(&handle, grain * GRAIN, vec![grain as u8; GRAIN as usize]);
    }
    let before = read(&handle, 0, (GRAINS * GRAIN) as usize);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let handle = &handle;
            scope.spawn(move || {
                let mut numbers = Numbers(thread * 13 + 5);
                for _ in 0..60 {
                    let batch = (0..8).map(|_| {
                        let first = REGION.start + numbers.below(REGION.end - REGION.start);
                        let count = 1 + numbers.below(3).min(REGION.end - first - 1);
                        let (offset, len) = (first * GRAIN, count * GRAIN);
                        let (kind, byte) = (numbers.below(4), numbers.next() as u8);
                        async move {
                            match kind {
                                0 => handle.discard(offset, len).await,
                                1 => {
                                    let flags = RequestFlags::MAY_UNMAP;
                                    handle.write_zeroes(offset, len, flags).await
                                }
                                _ => {
                                    let data = vec![byte; len as usize / 2];
                                    let flags = RequestFlags::empty();
                                    handle.write(offset + 512, data, flags).await
                                }
                            }
                        }
                    });
                    for result in block_on(futures::future::join_all(batch)) {
                        result.unwrap();
                    }
                }
                block_on(handle.flush()).unwrap();
            });
        }
    });
    let waits = (
        counter(&handle, "claim-waits"),
        handle.node().stats().snapshot().gate_waits,
    );
    block_on(handle.close()).unwrap();
    let handle = world.open("a.vmdk");
    let after = read(&handle, 0, (GRAINS * GRAIN) as usize);
    for grain in (0..GRAINS).filter(|grain| !REGION.contains(grain)) {
        let range = (grain * GRAIN) as usize..((grain + 1) * GRAIN) as usize;
        assert!(
            before[range.clone()] == after[range],
            "grain {grain} changed"
        );
    }
    let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    waits
}

#[test]
fn a_storm_on_some_grains_leaves_the_others_alone() {
    assert!(storm(&World::new()).1 > 0, "nobody waited at the gate");
}

#[test]
fn a_storm_leaves_other_grains_alone_even_without_the_gate() {
    let mut contended = 0;
    for _ in 0..5 {
        let graph =
            |env: Arc<env_tokio::EnvTokio>| block_core::Graph::new_without_gate_for_tests(env);
        contended += storm(&World::with_graph(graph)).0;
    }
    assert!(contended > 0, "no grain was contended");
}

#[test]
fn an_extent_can_not_be_resized() {
    let world = World::new();
    world.create("a.vmdk", "size=1M");
    let node = world.open("a.vmdk").node();
    let all = PermissionSet::new(Permissions::all(), Permissions::all());
    let handle = world.graph.attach(&node, all, "tool").unwrap();
    let error = block_on(handle.truncate(2 << 20, block_core::driver::Truncate::default()));
    assert_eq!(
        error.unwrap_err().reason(),
        "Image format driver does not support resize"
    );
    assert_eq!(world.env.panics(), 0);
}
