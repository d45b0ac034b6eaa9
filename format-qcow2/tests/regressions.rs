//! Hostile images, resizes over backing files, and what a cache that is large enough must not do.

mod common;

use block_core::{
    ErrorKind, RequestFlags,
    driver::{Preallocation, Truncate},
};
use common::{storage::Storage, *};
use std::{path::Path, sync::Arc};

const C: u64 = 65536;

fn fresh(options: &str, size: u64) -> Arc<Storage> {
    Storage::new(image_bytes(options, size))
}

/// An image over a raw file, opened with it.
async fn overlay(rig: &Rig, scratch: &Path, base: &[u8], size: &str) -> block_core::BlockHandle {
    let (base_path, path) = (scratch.join("base.raw"), scratch.join("a.qcow2"));
    std::fs::write(&base_path, base).unwrap();
    let (base_name, name) = (base_path.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_name, name, size,
    ]);
    let options = format!("backing.driver=file,backing.filename={base_name}");
    rig.open(&path, &options).await.unwrap()
}

#[test]
fn growing_with_preallocation_keeps_the_backing_files_content_before_the_old_end() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let size = 65536 + 512 * 8;
    rig.block_on(async {
        let base = vec![0x5a; size];
        let handle = overlay(&rig, scratch.path(), &base, &size.to_string()).await;
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

#[test]
fn growing_with_preallocation_over_a_longer_backing_file_allocates_zeroes() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    rig.block_on(async {
        let base = vec![0x5a; 16 * C as usize];
        let handle = overlay(&rig, scratch.path(), &base, &(4 * C).to_string()).await;
        let how = Truncate {
            exact: true,
            preallocation: Preallocation::Metadata,
            zero: true,
        };
        handle.truncate(12 * C, how).await.unwrap();
        assert!(counter(&handle, "clusters-allocated") >= 8);
        let read = handle.read(0, 12 * C as usize).await.unwrap();
        assert!(read[..4 * C as usize].iter().all(|byte| *byte == 0x5a));
        assert!(read[4 * C as usize..].iter().all(|byte| *byte == 0));
        // They are there: writing to them allocates nothing.
        let allocated = counter(&handle, "clusters-allocated");
        write(&handle, 4 * C, 8 * C, 3).await.unwrap();
        assert_eq!(counter(&handle, "clusters-allocated"), allocated);
        rig.close(handle).await.unwrap();
    });
    assert_clean(&scratch.path().join("a.qcow2"));
}

#[test]
fn a_cache_that_covers_the_disk_evicts_nothing_and_writes_nothing_back() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 512 << 20);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for round in 0..4u64 {
            // 16 slices of 32 MiB each.
            for slice in 0..16u64 {
                write(&handle, slice * (32 << 20) + round * C, 512, 1)
                    .await
                    .unwrap();
            }
        }
        let (evictions, barriers) = (counter(&handle, "evictions"), counter(&handle, "barriers"));
        rig.close(handle).await.unwrap();
        assert_eq!((evictions, barriers), (0, 0));
    });
}

#[test]
fn a_compressed_write_of_noise_to_an_allocated_cluster_is_refused_like_any_other() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64 * C);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, C, 1).await.unwrap();
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(C as usize)
        .collect();
        let flags = RequestFlags::WRITE_COMPRESSED;
        let refused = handle.write(0, noise.clone(), flags).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Io);
        let read = handle.read(0, C as usize).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 1));
        handle.write(C, noise.clone(), flags).await.unwrap();
        assert!(handle.read(C, C as usize).await.unwrap()[..] == noise[..]);
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// A table or refcount block that lies on other metadata is not written by, whatever a guest writes.
#[test]
fn metadata_that_overlaps_itself_is_never_changed() {
    for case in [
        "L2 table on the refcount block",
        "L2 table on the refcount table",
        "L2 table on the L1 table",
        "one L2 table for two entries",
        "one refcount block for two entries",
    ] {
        let mut data = image_bytes("cluster_size=65536", 2 << 30);
        let (l1, table) = (be64(&data, 40), be64(&data, 48));
        let block = be64(&data, table as usize);
        data.resize(8 * C as usize, 0);
        let mut put = |at: u64, value: u64| {
            data[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
        };
        match case {
            "L2 table on the refcount block" => put(l1, block | (1 << 63)),
            "L2 table on the refcount table" => put(l1, table | (1 << 63)),
            "L2 table on the L1 table" => put(l1, l1 | (1 << 63)),
            "one L2 table for two entries" => {
                put(l1, (4 * C) | (1 << 63));
                put(l1 + 8, (4 * C) | (1 << 63));
            }
            _ => put(table + 8, block),
        }
        let before = data.clone();
        let storage = Storage::new(data);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let error = write(&handle, 500 * C, C, 0xee).await.unwrap_err();
            assert!(
                error
                    .reason()
                    .contains("Preventing invalid write on metadata"),
                "{case}: {error}"
            );
            let _ = handle.flush().await;
            let _ = rig.close(handle).await;
        });
        let after = storage.state.lock().data.clone();
        // All that changed is the mark in the header.
        assert_eq!(be64(&after, 72), 2, "{case}");
        assert!(after[80..] == before[80..], "{case}");
    }
}

/// Tables that are shared are copied before they change: that two entries name one is legal then.
#[test]
fn a_table_that_is_shared_without_the_copied_flag_can_be_written() {
    let mut data = image_bytes("cluster_size=65536", 2 << 30);
    let (l1, table) = (be64(&data, 40) as usize, be64(&data, 48) as usize);
    let block = be64(&data, table) as usize;
    data.resize(5 * C as usize, 0);
    for at in [l1, l1 + 8] {
        data[at..at + 8].copy_from_slice(&(4 * C).to_be_bytes());
    }
    data[block + 8..block + 10].copy_from_slice(&2u16.to_be_bytes());
    let storage = Storage::new(data);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for half in 0..2u64 {
            write(&handle, half << 29, C, half as u8 + 1).await.unwrap();
            handle.flush().await.unwrap();
        }
        for half in 0..2u64 {
            let read = handle.read(half << 29, C as usize).await.unwrap();
            assert!(read.iter().all(|byte| *byte == half as u8 + 1));
        }
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// A data entry that refers to a cluster whose refcount is 0 must not become a way to write over the table that is
/// allocated there later.
#[test]
fn an_overwrite_in_place_never_hits_a_table_that_was_allocated_since() {
    let mut data = image_bytes("cluster_size=65536", 2 << 30);
    let (l1, table) = (be64(&data, 40) as usize, be64(&data, 48) as usize);
    let block = be64(&data, table) as usize;
    // L2 table at cluster 4 with refcount 1, one entry: guest cluster 0 -> host cluster 5, COPIED, refcount 0.
    data.resize(6 * C as usize, 0);
    data[l1..l1 + 8].copy_from_slice(&((4 * C) | (1 << 63)).to_be_bytes());
    data[block + 8..block + 10].copy_from_slice(&1u16.to_be_bytes());
    data[4 * C as usize..4 * C as usize + 8].copy_from_slice(&((5 * C) | (1 << 63)).to_be_bytes());
    let storage = Storage::new(data);
    let rig = Rig::new();
    let place = || storage.state.lock().data[5 * C as usize..6 * C as usize].to_vec();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        // Loads the slice.
        handle.read(0, 512).await.unwrap();
        // Makes a new table, which takes host cluster 5.
        write(&handle, 1 << 30, C, 1).await.unwrap();
        handle.flush().await.unwrap();
        let before = place();
        assert!(before.iter().any(|byte| *byte != 0), "it is in use");
        let error = write(&handle, 0, C, 0xee).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(before == place(), "another table was overwritten");
    });
}
