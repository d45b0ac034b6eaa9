//! Power cuts, slow and failing storage, and a table cache that is too small.

use std::{future::Future, sync::Arc};

use block_core::{
    BlockHandle, Graph, NodeSpec, OpenOptions, Options, PermissionSet, Permissions, Registry,
    RequestFlags,
    image::{CheckMode, Progress},
};
use env_tokio::EnvTokio;
use futures::executor::block_on;
use parking_lot::Mutex;

use super::{
    Numbers, World, counter, read,
    storage::{Disk, Storage},
    write,
};
use crate::{VmdkDriver, VmdkFactory, driver::Layout, layout::NewExtent};

const GRAIN: u64 = 65536;

fn fresh(options: &str) -> Vec<u8> {
    let world = World::new();
    world.create("a.vmdk", options);
    world.bytes("a.vmdk")
}

fn open(disk: &Arc<Mutex<Disk>>) -> BlockHandle {
    let graph = Graph::new(Arc::new(EnvTokio::new(1).unwrap()));
    // The handle needs the graph as long as it lives.
    std::mem::forget(Arc::clone(&graph));
    let storage = NodeSpec::new(Arc::new(Storage(Arc::clone(disk)))).named("storage");
    graph.add_node(storage).unwrap();
    let registry = Arc::new(Registry::new().with(VmdkFactory));
    let options = Options::new()
        .with("driver", "vmdk")
        .with("file", "storage");
    let node = block_on(registry.open(&graph, options, OpenOptions::default())).unwrap();
    let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
    graph
        .attach(&node, PermissionSet::new(used, Permissions::all()), "guest")
        .unwrap()
}

const SIZE: usize = 2 << 20;

/// Fails unless each sector of the image holds one of the bytes that it may hold.
fn examine(image: Vec<u8>, allowed: &[Vec<u8>], context: &str) {
    let handle = open(&Disk::new(image));
    let content = read(&handle, 0, SIZE);
    for (index, sector) in content.chunks(512).enumerate() {
        assert!(
            *sector == [sector[0]; 512] && allowed[index].contains(&sector[0]),
            "{context}, sector {index}: {} not in {:?}",
            sector[0],
            allowed[index],
        );
    }
    let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.findings);
}

#[test]
fn after_a_power_cut_every_sector_is_old_or_new_and_what_was_flushed_is_there() {
    let fresh = fresh("size=2M,zeroed_grain=on");
    let sectors = SIZE / 512;
    let (mut cuts, mut during_flush) = (0, 0);
    for seed in 1..=12 {
        let mut numbers = Numbers(seed * 77);
        let disk = Disk::new(fresh.clone());
        let handle = open(&disk);
        disk.lock().cutting = Some(Numbers(seed));
        // What each sector may hold: everything written to it since the last flush, and what it held then.
        let mut allowed: Vec<Vec<u8>> = vec![vec![0]; sectors];
        for round in 1..=40_u64 {
            let sector = numbers.below(sectors as u64 - 200);
            let count = 1 + numbers.below(200);
            let range = sector as usize..(sector + count) as usize;
            let kind = numbers.below(8);
            match kind {
                0 | 1 => block_on(handle.flush()).unwrap(),
                2 => {
                    allowed[range].iter_mut().for_each(|sector| sector.push(0));
                    let flags = RequestFlags::empty();
                    block_on(handle.write_zeroes(sector * 512, count * 512, flags)).unwrap();
                }
                _ => {
                    let byte = round as u8;
                    allowed[range]
                        .iter_mut()
                        .for_each(|sector| sector.push(byte));
                    write(&handle, sector * 512, vec![byte; count as usize * 512]);
                }
            }
            let images = std::mem::take(&mut disk.lock().cuts);
            for image in images {
                examine(image, &allowed, &format!("seed {seed}, in round {round}"));
                cuts += 1;
                during_flush += u64::from(kind < 2);
            }
            if kind < 2 {
                for sector in &mut allowed {
                    let last = sector.last().copied().unwrap();
                    *sector = vec![last];
                }
            }
        }
        let after = disk.lock().cut(&mut numbers);
        examine(after, &allowed, &format!("seed {seed}, at the end"));
        assert!(counter(&handle, "tables-written") > 0);
    }
    assert!(
        cuts > 50 && during_flush > 10,
        "only {cuts} power cuts, {during_flush} in a flush"
    );
}

#[test]
fn concurrent_writes_to_one_grain_allocate_it_once() {
    let disk = Disk::new(fresh("size=64M"));
    disk.lock().yielding = true;
    let handle = open(&disk);
    const PARTS: u64 = 64;
    for grain in 0..8_u64 {
        // Every writer has a part of the grain to itself, and all arrive at once.
        let writes = (0..PARTS).map(|part| {
            let len = GRAIN / PARTS;
            let offset = grain * GRAIN + part * len;
            handle.write(
                offset,
                vec![part as u8 + 1; len as usize],
                RequestFlags::empty(),
            )
        });
        for result in block_on(futures::future::join_all(writes)) {
            result.unwrap();
        }
        let content = read(&handle, grain * GRAIN, GRAIN as usize);
        for (index, byte) in content.iter().enumerate() {
            assert_eq!(
                u64::from(*byte),
                index as u64 / (GRAIN / PARTS) + 1,
                "byte {index}"
            );
        }
    }
    assert_eq!(counter(&handle, "grains-allocated"), 8);
    assert!(counter(&handle, "claim-waits") > 0, "nothing was contended");
}

#[test]
fn a_dropped_write_leaves_no_claim_and_never_lands_on_a_newer_one() {
    let disk = Disk::new(fresh("size=16M"));
    disk.lock().yielding = true;
    let handle = open(&disk);
    let mut dropped = 0;
    for grain in 0..60_u64 {
        let offset = grain * GRAIN;
        let mut old =
            Box::pin(handle.write(offset + 100, vec![1; GRAIN as usize], RequestFlags::empty()));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        let mut ended = false;
        for _ in 0..grain % 6 {
            ended = ended || old.as_mut().poll(&mut cx).is_ready();
        }
        dropped += u64::from(!ended && grain % 6 > 0);
        drop(old);
        write(&handle, offset, vec![2; GRAIN as usize]);
        assert_eq!(
            read(&handle, offset, GRAIN as usize),
            vec![2; GRAIN as usize]
        );
    }
    assert!(dropped > 0, "every write had ended before it was dropped");
    block_on(handle.flush()).unwrap();
    let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

#[test]
fn a_flush_without_new_grains_is_one_flush_of_the_file() {
    let disk = Disk::new(fresh("size=4M"));
    let handle = open(&disk);
    write(&handle, 0, vec![1; 512]);
    block_on(handle.flush()).unwrap();
    let before = disk.lock().flushes;
    write(&handle, 0, vec![2; 512]);
    block_on(handle.flush()).unwrap();
    assert_eq!(disk.lock().flushes, before + 1);
    write(&handle, GRAIN, vec![3; 512]);
    block_on(handle.flush()).unwrap();
    // Grain, barrier, tables, flush.
    assert_eq!(disk.lock().flushes, before + 3);
}

#[test]
fn a_write_that_fails_links_nothing_and_its_place_is_used_again() {
    let disk = Disk::new(fresh("size=4M"));
    let handle = open(&disk);
    write(&handle, 0, vec![1; 512]);
    let length = disk.lock().cut(&mut Numbers(1)).len();
    disk.lock().broken = true;
    for _ in 0..3 {
        assert!(block_on(handle.write(GRAIN, vec![2; 512], RequestFlags::empty())).is_err());
    }
    assert_eq!(read(&handle, GRAIN, 512), [0; 512]);
    disk.lock().broken = false;
    write(&handle, GRAIN, vec![2; 512]);
    assert_eq!(read(&handle, GRAIN, 512), [2; 512]);
    assert_eq!(
        handle.node().edges().iter().next().unwrap().child.length(),
        3 * GRAIN
    );
    assert!(length as u64 <= 2 * GRAIN);
}

#[test]
fn a_failed_flush_keeps_the_tables_dirty_and_fails_the_next_one_too() {
    let disk = Disk::new(fresh("size=4M"));
    let handle = open(&disk);
    write(&handle, 0, vec![1; 512]);
    disk.lock().broken = true;
    assert!(block_on(handle.flush()).is_err());
    disk.lock().broken = false;
    assert!(
        block_on(handle.flush()).is_err(),
        "a lost write must not be retried into success"
    );
    assert_eq!(read(&handle, 0, 512), [1; 512]);
}

#[test]
fn a_cache_of_two_tables_serves_a_disk_with_many() {
    let plan = NewExtent::plan(1 << 30, false).unwrap();
    assert_eq!(plan.directories[1].1.len(), 32);
    let disk = Disk::new(fresh("size=1G"));
    let graph = Graph::new(Arc::new(EnvTokio::new(1).unwrap()));
    let storage = graph
        .add_node(NodeSpec::new(Arc::new(Storage(Arc::clone(&disk)))))
        .unwrap();
    let found = open(&disk);
    let node = found.node();
    let driver = node.driver().clone();
    let Layout::Sparse(whole) = &driver.as_any().downcast_ref::<VmdkDriver>().unwrap().layout
    else {
        panic!("it is sparse")
    };
    let file = block_core::Child::unattached(storage);
    let mut sparse = block_on(crate::sparse::Sparse::open(
        whole.geometry,
        (512, 10240),
        false,
        &file,
    ))
    .unwrap();
    sparse.tables.limit_for_tests(2);
    for index in (0..32).chain([5, 0, 31]) {
        let table = block_on(sparse.tables.load(&file, index)).unwrap();
        let old = table.raw(3);
        sparse
            .tables
            .link(&table, 3, old, index as u32 + 1000)
            .unwrap();
    }
    assert!(sparse.tables.counters().1 > 25, "nothing was evicted");
    for index in 0..32 {
        let table = block_on(sparse.tables.load(&file, index)).unwrap();
        assert_eq!(table.raw(3), index as u32 + 1000);
        assert!(sparse.tables.link(&table, 3, 7, 8).is_err(), "it isn't 7");
    }
}
