//! Growing, shrinking and emptying, and tables that have to grow on the way.

mod common;

use block_core::{
    RequestFlags,
    driver::{Preallocation, Truncate},
};
use common::{
    storage::{Fault, Storage},
    *,
};

#[test]
fn a_grown_disk_reads_zeroes_behind_its_old_end_and_can_be_written_there() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    for (cluster, options) in [
        (512u64, "cluster_size=512,refcount_bits=64"),
        (4096, "cluster_size=4096"),
        (65536, "compat=0.10"),
    ] {
        let path = scratch.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "512k"]);
        let mut disk = vec![0; 512 << 10];
        rig.block_on(async {
            let handle = rig.open(&path, "cache.no-flush=on").await.unwrap();
            for (step, preallocation) in [
                (0u64, Preallocation::Off),
                (1, Preallocation::Metadata),
                (2, Preallocation::Falloc),
                (3, Preallocation::Full),
            ] {
                let old = disk.len();
                let at = old - 5000;
                handle
                    .write(at as u64, vec![7; 5000], RequestFlags::empty())
                    .await
                    .unwrap();
                disk[at..].fill(7);
                let new = old + (3 << 20) + 1024 * step as usize;
                let how = Truncate {
                    exact: true,
                    preallocation,
                    zero: false,
                };
                handle.truncate(new as u64, how).await.unwrap();
                disk.resize(new, 0);
                let ours = handle.read(0, disk.len()).await.unwrap();
                assert_same(&ours, &disk, &format!("{options}, {preallocation:?}"));
                handle
                    .write(old as u64 + 100, vec![9; 70_000], RequestFlags::empty())
                    .await
                    .unwrap();
                disk[old + 100..][..70_000].fill(9);
            }
            let error = handle
                .truncate(1000, Truncate::default())
                .await
                .unwrap_err();
            assert!(error.to_string().contains("multiple of 512"), "{error}");
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, scratch.path()), &disk, options);

        // Shrink into the middle of a cluster; what was cut off doesn't come back.
        rig.block_on(async {
            let handle = rig.open(&path, "cache.no-flush=on").await.unwrap();
            let cut = 512 * 700 + 512;
            handle
                .write(cut - 512, vec![5; 4096], RequestFlags::empty())
                .await
                .unwrap();
            disk[cut as usize - 512..][..4096].fill(5);
            handle.truncate(cut, Truncate::default()).await.unwrap();
            disk.truncate(cut as usize);
            handle.truncate(2 << 20, Truncate::default()).await.unwrap();
            disk.resize(2 << 20, 0);
            let ours = handle.read(0, disk.len()).await.unwrap();
            assert_same(
                &ours,
                &disk,
                &format!("{options}, shrunk and grown ({cluster})"),
            );
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, scratch.path()), &disk, options);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn refcount_and_l2_tables_grow_as_the_image_does() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    for bits in [1, 16, 64] {
        let options = format!("cluster_size=512,refcount_bits={bits}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, name, "9M"]);
        let disk: Vec<u8> = (0..9usize << 20).map(|at| (at / 512) as u8 | 1).collect();
        rig.block_on(async {
            let small = "cache.no-flush=on,l2-cache-size=2k,refcount-cache-size=2k";
            let handle = rig.open(&path, small).await.unwrap();
            for at in (0..disk.len()).step_by(1 << 20) {
                let data = disk[at..at + (1 << 20)].to_vec();
                handle
                    .write(at as u64, data, RequestFlags::empty())
                    .await
                    .unwrap();
            }
            assert!(counter(&handle, "evictions") > 0);
            let ours = handle.read(0, disk.len()).await.unwrap();
            assert_same(&ours, &disk, &options);
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, scratch.path()), &disk, &options);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn an_emptied_overlay_shows_its_backing_file_again() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let (base, top) = (
        scratch.path().join("base.qcow2"),
        scratch.path().join("top.qcow2"),
    );
    let (base_name, top_name) = (base.to_str().unwrap(), top.to_str().unwrap());
    for compat in ["0.10", "1.1"] {
        qemu_img(&["create", "-q", "-f", "qcow2", base_name, "4M"]);
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 3 0 4M", base_name],
        );
        let options = format!("compat={compat}");
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-o", &options, "-b", base_name, "-F", "qcow2", top_name,
        ]);
        rig.block_on(async {
            let handle = rig.open(&top, "").await.unwrap();
            handle
                .write(1000, vec![1; 1 << 20], RequestFlags::empty())
                .await
                .unwrap();
            handle
                .write_zeroes(2 << 20, 1 << 20, RequestFlags::empty())
                .await
                .unwrap();
            handle.make_empty().await.unwrap();
            let disk = handle.read(0, 4 << 20).await.unwrap();
            assert!(disk.iter().all(|byte| *byte == 3));
            rig.close(handle).await.unwrap();
        });
        assert_clean(&top);
        std::fs::remove_file(&top).unwrap();
    }
}

#[test]
fn a_disk_that_grows_over_a_longer_backing_file_reads_zeroes_there_when_asked_to() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let (base, top) = (
        scratch.path().join("base.qcow2"),
        scratch.path().join("top.qcow2"),
    );
    let (base_name, top_name) = (base.to_str().unwrap(), top.to_str().unwrap());
    for compat in ["0.10", "1.1"] {
        qemu_img(&["create", "-q", "-f", "qcow2", base_name, "4M"]);
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 3 0 4M", base_name],
        );
        let options = format!("compat={compat}");
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-o", &options, "-b", base_name, "-F", "qcow2",
            top_name, "1000k",
        ]);
        rig.block_on(async {
            let handle = rig.open(&top, "").await.unwrap();
            let how = Truncate {
                exact: true,
                preallocation: Preallocation::Off,
                zero: true,
            };
            handle.truncate(3 << 20, how).await.unwrap();
            let disk = handle.read(0, 3 << 20).await.unwrap();
            let end = 1000 << 10;
            assert!(disk[..end].iter().all(|byte| *byte == 3));
            assert!(disk[end..].iter().all(|byte| *byte == 0), "{compat}");
            rig.close(handle).await.unwrap();
        });
        assert_clean(&top);
        std::fs::remove_file(&top).unwrap();
    }
}

/// Where the header has the size of the disk.
const SIZE_FIELD: usize = 24;

#[test]
fn after_a_resize_that_failed_the_size_is_only_said_to_be_the_old_one_when_it_is_again() {
    let rig = Rig::new();
    let (old, new) = (1u64 << 20, 1u64 << 19);
    rig.block_on(async {
        let storage = Storage::new(image_bytes("cluster_size=65536", old));
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let stored = || be64(&storage.state.lock().data, SIZE_FIELD);
        // The write of the new size fails, and yet takes effect.
        storage.set_fault(Fault::At(SIZE_FIELD as u64));
        handle.truncate(new, Truncate::default()).await.unwrap_err();
        storage.state.lock().data[SIZE_FIELD..SIZE_FIELD + 8].copy_from_slice(&new.to_be_bytes());
        handle.truncate(old, Truncate::default()).await.unwrap_err();
        storage.set_fault(Fault::None);
        assert_eq!(handle.length(), old);
        handle.truncate(old, Truncate::default()).await.unwrap();
        assert_eq!(stored(), old);
        // The flush behind it fails: what is on disk can't be known any more.
        storage.fail_flush_after_write_at(SIZE_FIELD as u64);
        handle.truncate(new, Truncate::default()).await.unwrap_err();
        assert_eq!(stored(), new);
        handle.truncate(old, Truncate::default()).await.unwrap_err();
    });
}

#[test]
fn what_is_written_after_a_resize_that_failed_is_never_behind_the_end_on_disk() {
    let rig = Rig::new();
    let (old, new) = (1u64 << 20, 1u64 << 19);
    for goes_on_failing in [false, true] {
        rig.block_on(async {
            let storage = Storage::new(image_bytes("cluster_size=65536", old));
            let handle = rig.open_storage(&storage, "").await.unwrap();
            storage.set_fault(Fault::At(SIZE_FIELD as u64));
            handle.truncate(new, Truncate::default()).await.unwrap_err();
            // It took effect all the same.
            storage.state.lock().data[SIZE_FIELD..SIZE_FIELD + 8]
                .copy_from_slice(&new.to_be_bytes());
            if !goes_on_failing {
                storage.set_fault(Fault::None);
            }
            write(&handle, old - 4096, 4096, 7).await.unwrap();
            // While the size can't be written nothing is linked that might lie behind it.
            let flushed = handle.flush().await;
            assert_eq!(flushed.is_err(), goes_on_failing);
            let data = storage.state.lock().data.clone();
            assert_eq!(
                be64(&data, SIZE_FIELD),
                if goes_on_failing { new } else { old }
            );
            // The power is cut, and then the disk is made as long as it was.
            let after = rig.open_storage(&Storage::new(data), "").await.unwrap();
            after.truncate(old, Truncate::default()).await.unwrap();
            let disk = after.read(0, old as usize).await.unwrap();
            let (front, end) = disk.split_at(old as usize - 4096);
            let written = if goes_on_failing { 0 } else { 7 };
            assert!(front.iter().all(|byte| *byte == 0));
            assert!(end.iter().all(|byte| *byte == written));
            rig.close(after).await.unwrap();
        });
    }
}
