//! Reviewer's suspicions, each as the sentence that ought to hold.

mod common;

use block_core::{
    BlockHandle, ErrorKind, RequestFlags,
    driver::{Preallocation, Truncate},
};
use common::{
    storage::{Fault, Storage},
    *,
};
use std::{sync::Arc, time::Duration};

fn fresh(options: &str, size: u64) -> Arc<Storage> {
    Storage::new(image_bytes(options, size))
}

/// Runs `work` on a thread of its own; a hang is a failure.
fn within(seconds: u64, work: impl FnOnce() + Send + 'static) {
    let (tx, rx) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        work();
        tx.send(()).unwrap();
    });
    match rx.recv_timeout(Duration::from_secs(seconds)) {
        Ok(()) => thread.join().unwrap(),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
    }
}

async fn write(handle: &BlockHandle, at: u64, len: u64, value: u8) -> block_core::Result<()> {
    handle
        .write(at, vec![value; len as usize], RequestFlags::empty())
        .await
}

/// A write of many pieces, half of them in place, on a full disk ends with ENOSPC: pieces that wait for every pin must not
/// wait for a pin that waits for them.
#[test]
fn r01_a_fragmented_write_on_a_full_disk_ends() {
    for dawdle in [0, 3, 12, 40] {
        within(20, move || {
            const C: u64 = 4096;
            let rig = Rig::new();
            let storage = fresh("cluster_size=4096", 256 * C);
            rig.block_on(async {
                let handle = rig.open_storage(&storage, "").await.unwrap();
                for n in 0..128 {
                    write(&handle, 2 * n * C, C, 1).await.unwrap();
                }
                handle.flush().await.unwrap();
                let full = storage.state.lock().data.len() as u64;
                storage.set_fault(Fault::Full(full));
                storage.set_dawdle(dawdle);
                let error = write(&handle, 0, 256 * C, 2).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
            });
        });
    }
}

/// A read error while freed clusters are released must not keep the image from being closed.
#[test]
fn r02_close_ends_after_a_read_error_while_clusters_were_released() {
    within(20, || {
        const C: u64 = 512;
        let rig = Rig::new();
        let storage = fresh("cluster_size=512,refcount_bits=64", 2 << 20);
        rig.block_on(async {
            let handle = rig
                .open_storage(&storage, "refcount-cache-size=2k")
                .await
                .unwrap();
            // 64 clusters to a refcount block.
            for n in 0..1024 {
                write(&handle, n * C, C, 1).await.unwrap();
            }
            handle.flush().await.unwrap();
            handle.discard(0, C).await.unwrap();
            // Push its refcount block out of the cache.
            for n in 1..16 {
                handle.discard(n * 64 * C, C).await.unwrap();
            }
            storage.set_fault(Fault::Reads);
            let failed = handle.flush().await;
            println!("flush: {failed:?}");
            storage.set_fault(Fault::None);
            println!("again: {:?}", handle.flush().await);
            let _ = rig.close(handle).await;
        });
    });
}

/// Growing with preallocation keeps what the backing file shows in the cluster that the old end lies in.
#[test]
fn r03_growing_with_preallocation_keeps_the_backing_files_content_before_the_old_end() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let base = scratch.path().join("base.raw");
    let size = 65536 + 512 * 8;
    std::fs::write(&base, vec![0x5a; size]).unwrap();
    let path = scratch.path().join("a.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        base.to_str().unwrap(),
        path.to_str().unwrap(),
    ]);
    rig.block_on(async {
        // Whatever opens the raw backing file.
        let handle = match rig
            .open(
                &path,
                &format!("backing.driver=file,backing.filename={}", base.display()),
            )
            .await
        {
            Ok(handle) => handle,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(handle.read(65536, 512).await.unwrap()[..], [0x5a; 512]);
        let how = Truncate {
            exact: true,
            preallocation: Preallocation::Metadata,
            zero: false,
        };
        handle.truncate(1 << 20, how).await.unwrap();
        assert_eq!(handle.read(65536, 512).await.unwrap()[..], [0x5a; 512]);
    });
}

/// A cache that covers the whole disk evicts nothing.
#[test]
fn r04_a_cache_that_covers_the_disk_evicts_nothing_and_writes_nothing_back() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 512 << 20);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for round in 0..4u64 {
            // 16 slices of 32 MiB each.
            for slice in 0..16u64 {
                write(&handle, slice * (32 << 20) + round * 65536, 512, 1)
                    .await
                    .unwrap();
            }
        }
        let barriers = counter(&handle, "barriers");
        let evictions = counter(&handle, "evictions");
        println!("evictions {evictions}, barriers {barriers}");
        rig.close(handle).await.unwrap();
        assert_eq!((evictions, barriers), (0, 0));
    });
}

/// An ENOSPC where a new refcount block would have been needed doesn't make flushes fail.
#[test]
fn r05_flush_works_after_enospc_at_a_refcount_block_boundary() {
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
        let full = storage.state.lock().data.len() as u64;
        storage.set_fault(Fault::Full(full));
        let error = write(&handle, n * C, C, 2).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        handle.flush().await.unwrap();
    });
}

/// Zero writes that need a table drain the quarantine before they report ENOSPC, as writes do.
#[test]
fn r06_a_zero_write_on_a_full_disk_uses_what_a_discard_freed() {
    const C: u64 = 4096;
    let rig = Rig::new();
    // One table covers 2 MiB.
    let storage = fresh("cluster_size=4096", 16 << 20);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, 8 * C, 1).await.unwrap();
        handle.flush().await.unwrap();
        let full = storage.state.lock().data.len() as u64;
        storage.set_fault(Fault::Full(full));
        handle.discard(0, 4 * C).await.unwrap();
        handle
            .write_zeroes(8 << 20, C, RequestFlags::empty())
            .await
            .unwrap();
    });
}

fn be(data: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(data[at..at + 8].try_into().unwrap())
}

/// An L1 entry that points to other metadata must not make a guest write change that metadata.
#[test]
fn r07_a_table_at_the_place_of_other_metadata_is_not_written() {
    for target in ["refcount block", "refcount table", "l1"] {
        let mut data = image_bytes("cluster_size=65536", 64 << 20);
        let (l1, table) = (be(&data, 40) as usize, be(&data, 48) as usize);
        let block = be(&data, table) as usize;
        data.resize(8 << 16, 0);
        let place = match target {
            "refcount block" => block,
            "refcount table" => table,
            _ => l1,
        };
        data[l1..l1 + 8].copy_from_slice(&(place as u64 | 1 << 63).to_be_bytes());
        let before = data[place..place + 65536].to_vec();
        let storage = Storage::new(data);
        let rig = Rig::new();
        rig.block_on(async {
            let Ok(handle) = rig.open_storage(&storage, "").await else {
                return;
            };
            // A cluster whose entry lies far behind what is in use there.
            let wrote = write(&handle, 1000 * 65536 / 2, 65536, 0xee).await;
            let flushed = handle.flush().await;
            println!("{target}: write {wrote:?}, flush {flushed:?}");
            let _ = rig.close(handle).await;
        });
        let after = storage.state.lock().data[place..place + 65536].to_vec();
        let changed: Vec<usize> = (0..65536).filter(|n| before[*n] != after[*n]).collect();
        println!("{target}: changed {:?}", &changed[..changed.len().min(20)]);
        // Refcounts of new clusters (2 bytes each, low indexes) may change in the block; entries of a table may not.
        let entry = 1000 / 2 * 8;
        assert!(
            !changed.iter().any(|n| *n >= entry && *n < entry + 8),
            "{target}: an L2 entry was written into it"
        );
    }
}

/// A data entry that refers to a cluster whose refcount is 0 must not become a way to write over the table that is
/// allocated there later.
#[test]
fn r08_an_overwrite_in_place_never_hits_a_table_that_was_allocated_since() {
    const C: u64 = 65536;
    let mut data = image_bytes("cluster_size=65536", 2 << 30);
    let l1 = be(&data, 40) as usize;
    let table = be(&data, 48) as usize;
    let block = be(&data, table) as usize;
    // L2 table at cluster 4 with refcount 1, one entry: guest cluster 0 -> host cluster 5, COPIED, refcount 0.
    data.resize(6 * C as usize, 0);
    data[l1..l1 + 8].copy_from_slice(&(4 * C | 1 << 63).to_be_bytes());
    data[block + 8..block + 10].copy_from_slice(&1u16.to_be_bytes());
    data[4 * C as usize..4 * C as usize + 8].copy_from_slice(&(5 * C | 1 << 63).to_be_bytes());
    let storage = Storage::new(data);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        // Loads the slice.
        handle.read(0, 512).await.unwrap();
        // Makes a new table, which takes host cluster 5.
        write(&handle, 1 << 30, C, 1).await.unwrap();
        handle.flush().await.unwrap();
        let before = storage.state.lock().data[5 * C as usize..6 * C as usize].to_vec();
        let wrote = write(&handle, 0, C, 0xee).await;
        let after = storage.state.lock().data[5 * C as usize..6 * C as usize].to_vec();
        println!("{wrote:?}");
        assert!(
            before == after,
            "the table of another part of the disk was overwritten"
        );
    });
}
