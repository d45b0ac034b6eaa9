//! Full storage and failing storage: requests end, freed space is used again, and what may be in use is not.

mod common;

use block_core::{
    ErrorKind, RequestFlags,
    driver::{Preallocation, Truncate},
};
use common::{
    storage::{Event, Fault, Storage},
    *,
};
use std::sync::Arc;

fn fresh(options: &str, size: u64) -> Arc<Storage> {
    Storage::new(image_bytes(options, size))
}

/// No more than there is now.
fn fill_up(storage: &Storage) {
    let full = storage.state.lock().data.len() as u64;
    storage.set_fault(Fault::Full(full));
}

/// Pieces of a request that wait for every pin must not wait for a pin of the same request that waits for them.
#[test]
fn a_fragmented_write_on_a_full_disk_ends() {
    for (dawdle, slow_flush) in [(0, 0), (0, 500), (3, 0), (12, 40), (40, 0)] {
        within(30, move || {
            const C: u64 = 4096;
            let rig = Rig::new();
            let storage = fresh("cluster_size=4096", 256 * C);
            rig.block_on(async {
                let handle = rig.open_storage(&storage, "").await.unwrap();
                for n in 0..128 {
                    write(&handle, 2 * n * C, C, 1).await.unwrap();
                }
                handle.flush().await.unwrap();
                fill_up(&storage);
                storage.set_dawdle(dawdle);
                storage.set_slow_flush(slow_flush);
                let error = write(&handle, 0, 256 * C, 2).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
            });
        });
    }
}

/// An image with freed clusters whose refcount blocks are no longer in memory.
async fn freed_and_forgotten(rig: &Rig, storage: &Arc<Storage>) -> block_core::BlockHandle {
    const C: u64 = 512;
    let handle = rig
        .open_storage(storage, "refcount-cache-size=2k")
        .await
        .unwrap();
    // 64 clusters to a refcount block.
    for n in 0..1024 {
        write(&handle, n * C, C, 1).await.unwrap();
    }
    handle.flush().await.unwrap();
    for n in 0..16 {
        handle.discard(n * 64 * C, C).await.unwrap();
    }
    handle
}

#[test]
fn a_read_error_while_clusters_are_released_fails_no_flush_and_loses_no_space() {
    within(30, || {
        let rig = Rig::new();
        let storage = fresh("cluster_size=512,refcount_bits=64", 2 << 20);
        rig.block_on(async {
            let handle = freed_and_forgotten(&rig, &storage).await;
            storage.set_fault(Fault::Reads);
            handle.flush().await.unwrap();
            assert!(counter(&handle, "clusters-freed") < 16);
            storage.set_fault(Fault::None);
            // A flush with nothing to flush wouldn't get here.
            write(&handle, 512, 512, 2).await.unwrap();
            handle.flush().await.unwrap();
            assert_eq!(counter(&handle, "clusters-freed"), 16);
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0));
    });
}

#[test]
fn a_close_that_can_not_release_clusters_ends_with_the_error() {
    within(30, || {
        let rig = Rig::new();
        let storage = fresh("cluster_size=512,refcount_bits=64", 2 << 20);
        rig.block_on(async {
            let handle = freed_and_forgotten(&rig, &storage).await;
            storage.set_fault(Fault::Reads);
            rig.close(handle).await.unwrap_err();
        });
        assert_eq!(check_bytes(&storage).0, 0);
    });
}

#[test]
fn flushes_work_after_the_storage_was_full_at_a_refcount_block_boundary() {
    const C: u64 = 512;
    let rig = Rig::new();
    let storage = fresh("cluster_size=512,refcount_bits=64", 2 << 20);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let mut n = 0;
        // Up to where the file ends with a block's range: 64 clusters.
        loop {
            write(&handle, n * C, C, 1).await.unwrap();
            n += 1;
            if n > 300 && storage.state.lock().data.len() as u64 % (64 * C) == 0 {
                break;
            }
            assert!(n < 2000);
        }
        fill_up(&storage);
        let error = write(&handle, n * C, C, 2).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        handle.flush().await.unwrap();
    });
}

/// Everything that allocates drains the quarantine before it reports ENOSPC.
#[test]
fn whatever_allocates_on_a_full_disk_uses_what_a_discard_freed() {
    const C: u64 = 4096;
    let preallocated = Truncate {
        exact: true,
        preallocation: Preallocation::Metadata,
        zero: false,
    };
    for case in [
        "zero write",
        "compressed write",
        "preallocation",
        "L1 table",
    ] {
        let rig = Rig::new();
        // One L2 table covers 2 MiB, one cluster of the L1 table 1 GiB.
        let storage = fresh("cluster_size=4096", 16 << 20);
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            write(&handle, 0, 8 * C, 1).await.unwrap();
            handle.flush().await.unwrap();
            fill_up(&storage);
            handle.discard(0, 6 * C).await.unwrap();
            match case {
                "zero write" => handle.write_zeroes(8 << 20, C, RequestFlags::empty()).await,
                "compressed write" => {
                    let flags = RequestFlags::WRITE_COMPRESSED;
                    handle.write(8 << 20, vec![7; C as usize], flags).await
                }
                "preallocation" => handle.truncate((16 << 20) + 2 * C, preallocated).await,
                _ => handle.truncate(2 << 30, Truncate::default()).await,
            }
            .unwrap_or_else(|error| panic!("{case}: {error}"));
            assert!(counter(&handle, "reclaims") > 0, "{case}");
            storage.set_fault(Fault::None);
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "{case}");
    }
}

/// When the header was switched to another table but that isn't confirmed, neither table's clusters are given out again.
#[test]
fn a_failed_flush_while_a_table_moves_loses_nothing_that_was_flushed() {
    const C: u64 = 512;
    const KEPT: u64 = 64 * C;
    for case in ["L1 table", "refcount table"] {
        let options = "cluster_size=512,refcount_bits=64";
        let size = if case == "L1 table" {
            64 << 10
        } else {
            8 << 20
        };
        let storage = fresh(options, size);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            write(&handle, 0, KEPT, 1).await.unwrap();
            handle.flush().await.unwrap();
            if case == "L1 table" {
                storage.fail_flush_after_write_at(36);
                let grown = handle.truncate(16 << 20, Truncate::default()).await;
                grown.unwrap_err();
                for n in 64..128 {
                    write(&handle, n * C, C, 0xee).await.unwrap();
                }
            } else {
                storage.fail_flush_after_write_at(48);
                // The first table covers 2 MiB of the file.
                let mut failed = 0;
                for n in 64..(6 << 20) / C {
                    failed += u32::from(write(&handle, n * C, C, 0xee).await.is_err());
                }
                assert!(failed > 0);
            }
            handle.flush().await.unwrap_err();
        });
        // The process ends here; what reached the storage is there.
        assert_eq!(check_bytes(&storage).0, 0, "{case}");
        let data = storage.state.lock().data.clone();
        let rig = Rig::new();
        rig.block_on(async {
            let again = Storage::new(data);
            let handle = rig.open_storage(&again, "read-only=on").await.unwrap();
            let read = handle.read(0, KEPT as usize).await.unwrap();
            assert!(read.iter().all(|byte| *byte == 1), "{case}");
        });
    }
}

#[test]
fn a_dirty_bit_that_was_not_confirmed_is_written_again() {
    const C: u64 = 65536;
    let rig = Rig::new();
    let storage = fresh("lazy_refcounts=on", 64 * C);
    storage.state.lock().keep_log = true;
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        storage.fail_flush_after_write_at(72);
        write(&handle, 0, C, 1).await.unwrap_err();
        let _ = write(&handle, 0, C, 1).await;
    });
    let state = storage.state.lock();
    let marks = |event: &&Event| matches!(event, Event::Write(72, _));
    assert_eq!(state.log.iter().filter(marks).count(), 2);
    assert_eq!(be64(&state.data, 72) & 1, 1);
}
