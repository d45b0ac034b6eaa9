//! What a shrink gives back, and that a power cut between any two writes of a resize leaves the disk with its old or its new
//! size and nothing worse than leaks.

mod common;

use block_core::{
    RequestFlags,
    driver::{Preallocation, Truncate},
};
use common::{
    cuts::{Look, prepared, record},
    *,
};

const KINDS: [&str; 4] = [
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4096",
    "cluster_size=4096,compat=0.10",
    "cluster_size=512,refcount_bits=1",
];
const OLD: u64 = 1 << 20;
const NEW: u64 = (300 << 10) + 512;

fn content(at: usize) -> u8 {
    (at / 512 % 251) as u8 + 1
}

fn filled(options: &str) -> Vec<u8> {
    prepared(options, OLD, async |handle| {
        let data: Vec<u8> = (0..OLD as usize).map(content).collect();
        handle.write(0, data, RequestFlags::empty()).await
    })
}

fn how(preallocation: Preallocation) -> Truncate {
    Truncate {
        exact: true,
        preallocation,
        zero: false,
    }
}

#[test]
fn a_power_cut_during_a_shrink_leaves_the_old_or_the_new_size_and_only_leaks() {
    for options in KINDS {
        let shrunk = record(filled(options), "", async |handle| {
            handle.truncate(NEW, Truncate::default()).await
        });
        let mut seen = [0, 0];
        shrunk.cut(options, Look::AsItIs, 80, |disk, what| {
            seen[usize::from(disk.len() as u64 == NEW)] += 1;
            assert!([OLD, NEW].contains(&(disk.len() as u64)), "{what}");
            for (block, bytes) in disk.chunks(512).enumerate() {
                let at = block * 512;
                let cut_off = at as u64 >= NEW && bytes.iter().all(|byte| *byte == 0);
                assert!(
                    cut_off || bytes.iter().all(|byte| *byte == content(at)),
                    "{what}: {at:#x}"
                );
            }
        });
        assert!(seen[0] > 0 && seen[1] > 0, "{options}: {seen:?}");
        assert!(
            shrunk.end.len() * 2 < shrunk.start.len(),
            "{options}: {} of {} bytes are left",
            shrunk.end.len(),
            shrunk.start.len()
        );
    }
}

#[test]
fn a_power_cut_while_a_disk_grows_leaves_the_old_or_the_new_size_and_only_leaks() {
    for options in KINDS {
        for preallocation in [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            let small = prepared(options, NEW, async |handle| {
                let data: Vec<u8> = (0..NEW as usize).map(content).collect();
                handle.write(0, data, RequestFlags::empty()).await
            });
            let grown = record(small, "", async |handle| {
                handle.truncate(OLD, how(preallocation)).await
            });
            let what = format!("{options}, {preallocation:?}");
            grown.cut(&what, Look::AsItIs, 20, |disk, what| {
                assert!([OLD, NEW].contains(&(disk.len() as u64)), "{what}");
                for (at, byte) in disk.iter().enumerate() {
                    let expected = if at as u64 >= NEW { 0 } else { content(at) };
                    assert_eq!(*byte, expected, "{what}: {at:#x}");
                }
            });
        }
    }
}

#[test]
fn a_shrunk_image_takes_no_more_space_than_one_that_qemu_img_shrank() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    for options in KINDS.into_iter().chain(["cluster_size=64k"]) {
        let [ours, theirs] = ["ours.qcow2", "theirs.qcow2"].map(|name| scratch.path().join(name));
        let (ours_name, theirs_name) = (ours.to_str().unwrap(), theirs.to_str().unwrap());
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-o", options, ours_name, "8M",
        ]);
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 7 0 8M", ours_name],
        );
        std::fs::copy(&ours, &theirs).unwrap();
        qemu_img(&[
            "resize",
            "-q",
            "-f",
            "qcow2",
            "--shrink",
            theirs_name,
            "1000k",
        ]);
        let (tables, blocks) = rig.block_on(async {
            let handle = rig.open(&ours, "").await.unwrap();
            handle
                .truncate(1000 << 10, Truncate::default())
                .await
                .unwrap();
            let counts = (
                counter(&handle, "tables-dropped"),
                counter(&handle, "refcount-blocks-dropped"),
            );
            // The space is there to be used again.
            handle.truncate(8 << 20, Truncate::default()).await.unwrap();
            write(&handle, 0, 8 << 20, 9).await.unwrap();
            handle
                .truncate(1000 << 10, Truncate::default())
                .await
                .unwrap();
            rig.close(handle).await.unwrap();
            counts
        });
        if options.contains("512") {
            assert!(tables > 0 && blocks > 0, "{options}: {tables}, {blocks}");
        }
        assert_clean(&ours);
        let len = |path: &std::path::Path| std::fs::metadata(path).unwrap().len();
        let slack = len(&theirs) / 20 + (1 << 16);
        assert!(
            len(&ours) <= len(&theirs) + slack,
            "{options}: {} bytes, qemu-img's has {}",
            len(&ours),
            len(&theirs)
        );
        let disk = contents(&ours, scratch.path());
        assert_eq!(disk.len(), 1000 << 10);
        assert!(disk.iter().all(|byte| *byte == 9), "{options}");
    }
}

#[test]
fn reads_and_writes_go_on_below_the_new_end_while_a_disk_shrinks() {
    let rig = Rig::new();
    let storage = storage::Storage::new(filled("cluster_size=512"));
    storage.set_dawdle(8);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let guest = async {
            for round in 0..40u64 {
                let at = round * 7 % 500 * 512;
                write(&handle, at, 1536, round as u8 + 1).await.unwrap();
                let read = handle.read(at, 1536).await.unwrap();
                assert!(read.iter().all(|byte| *byte == round as u8 + 1));
                handle.discard(at, 512).await.unwrap();
            }
        };
        let resizer = async {
            for _ in 0..3 {
                handle.truncate(NEW, Truncate::default()).await.unwrap();
                handle.truncate(OLD, Truncate::default()).await.unwrap();
                write(&handle, NEW, OLD - NEW, 5).await.unwrap();
            }
            handle.truncate(NEW, Truncate::default()).await.unwrap();
        };
        futures::join!(guest, resizer);
        // What waited behind the shrink is told that its end is gone.
        let error = write(&handle, NEW - 512, 1024, 1).await.unwrap_err();
        assert_eq!(error.kind(), block_core::ErrorKind::Io, "{error}");
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// An image that qemu-img shrank, which leaves what was there in the last cluster.
fn shrunk_by_qemu(options: &str) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    let name = image.to_str().unwrap();
    std::fs::write(&image, filled(options)).unwrap();
    let size = NEW.to_string();
    qemu_img(&["resize", "-q", "-f", "qcow2", "--shrink", name, &size]);
    std::fs::read(&image).unwrap()
}

#[test]
fn what_another_program_left_behind_the_end_does_not_show_when_the_disk_grows() {
    for options in [
        "cluster_size=64k",
        "cluster_size=4096",
        "cluster_size=16k,extended_l2=on",
    ] {
        for preallocation in [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            for length in [OLD, NEW + 512] {
                let grown = record(shrunk_by_qemu(options), "", async |handle| {
                    handle.truncate(length, how(preallocation)).await
                });
                let what = format!("{options}, {preallocation:?}");
                let mut seen = [0, 0];
                grown.cut(&what, Look::AsItIs, 30, |disk, what| {
                    assert!([NEW, length].contains(&(disk.len() as u64)), "{what}");
                    seen[usize::from(disk.len() as u64 == length)] += 1;
                    for (at, byte) in disk.iter().enumerate() {
                        let expected = if at as u64 >= NEW { 0 } else { content(at) };
                        assert_eq!(*byte, expected, "{what}: {at:#x}");
                    }
                });
                assert!(seen[0] > 0 && seen[1] > 0, "{what}: {seen:?}");
            }
        }
    }
}
