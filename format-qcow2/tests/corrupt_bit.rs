//! The first overlap with metadata that a writable image meets marks it corrupt, and nothing is served from then on; the kind
//! of metadata is named as qemu names it, and `overlap-check` says which kinds are looked for.

mod common;

use block_core::{ErrorKind, driver::Reopen};
use common::*;

const CLUSTER: usize = 65536;

/// An image whose refcount of one cluster wrongly says that it is free: the next allocation takes it. Clusters: header,
/// refcount table, refcount block, L1 table, L2 table, data.
fn damaged(cluster: usize) -> Vec<u8> {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("cluster_size=64k", 64 << 20));
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, CLUSTER as u64, 7).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let mut data = std::mem::take(&mut storage.state.lock().data);
    data[2 * CLUSTER + 2 * cluster..][..2].fill(0);
    data
}

const KINDS: [(usize, &str, &str); 5] = [
    (0, "main-header", "qcow2_header"),
    (1, "refcount-table", "refcount table"),
    (2, "refcount-block", "refcount block"),
    (3, "active-l1", "active L1 table"),
    (4, "active-l2", "active L2 table"),
];

#[test]
fn the_first_overlap_marks_the_image_corrupt_and_ends_its_use() {
    for (cluster, _, name) in KINDS {
        let rig = Rig::new();
        let storage = storage::Storage::new(damaged(cluster));
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let error = write(&handle, 1 << 20, 4096, 1).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert_eq!(error.errno(), 5, "the guest sees EIO");
            let expected = format!("Preventing invalid write on metadata (overlaps with {name})");
            assert_eq!(error.reason(), expected);
            let error = handle.read(0, 512).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoMedium);
            let error = write(&handle, 0, 512, 1).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoMedium);
            // The image is gone for everybody; closing it has nothing left to do.
            let _ = rig.close(handle).await;
        });
        let data = storage.state.lock().data.clone();
        assert_eq!(be64(&data, 72), 2, "{name}: the corrupt bit is on disk");
        rig.block_on(async {
            let error = rig.open_storage(&storage, "").await.unwrap_err();
            assert!(error.to_string().contains("corrupt"), "{error}");
            let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
            let read = handle.read(0, CLUSTER).await.unwrap();
            assert!(read.iter().all(|byte| *byte == 7));
            rig.close(handle).await.unwrap();
        });
    }
}

#[test]
fn qemu_io_names_the_same_overlap_and_leaves_the_same_bit() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    for (cluster, _, name) in KINDS {
        std::fs::write(&path, damaged(cluster)).unwrap();
        let args = ["-f", "qcow2", "-c", "write 1M 4k", path.to_str().unwrap()];
        let output = run("qemu-io", &args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(&format!("(overlaps with {name})")), "{text}");
        assert_eq!(be64(&std::fs::read(&path).unwrap(), 72), 2);
    }
}

#[test]
fn a_kind_that_is_switched_off_is_not_looked_for() {
    let rig = Rig::new();
    for (cluster, option, name) in KINDS {
        // Cluster 0 is never given out, whatever the options say.
        if cluster == 0 {
            continue;
        }
        let off = format!("overlap-check.{option}=off");
        let only = format!("overlap-check.template=none,overlap-check.{option}=on");
        for (options, refused) in [
            ("overlap-check=none", false),
            (&off, false),
            (&only, true),
            ("overlap-check=all", true),
            ("overlap-check=constant", [1, 3].contains(&cluster)),
        ] {
            let storage = storage::Storage::new(damaged(cluster));
            rig.block_on(async {
                let handle = rig.open_storage(&storage, "").await.unwrap();
                let options = block_core::Options::from_dotted(options).unwrap().0;
                let changes = Reopen {
                    read_only: None,
                    options: options.clone(),
                };
                handle.reopen(changes).await.unwrap();
                let written = write(&handle, 0x20_0000, 4096, 1).await;
                assert_eq!(written.is_err(), refused, "{name}: {options:?}");
                // What was allowed is a corrupt image.
                let _ = rig.close(handle).await;
            });
        }
    }
}

/// A refcount table, L1 or L2 entry that points to the middle of a cluster; a zero cluster in version 2.
#[test]
fn impossible_references_are_named_as_qemu_io_names_them_and_mark_the_image() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    for (options, at, raw, command) in [
        (
            "cluster_size=64k",
            4 * CLUSTER,
            0x8000_0000_0005_0200u64,
            "read 0 4k",
        ),
        (
            "cluster_size=64k",
            4 * CLUSTER + 8,
            0x8000_0000_0006_0200,
            "read 64k 4k",
        ),
        (
            "cluster_size=64k",
            3 * CLUSTER,
            0x8000_0000_0004_0200,
            "read 0 4k",
        ),
        ("cluster_size=64k", CLUSTER, 0x2_0200, "write 1M 4k"),
        ("compat=0.10", 4 * CLUSTER, 1, "read 0 4k"),
    ] {
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "64M"]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 128k", name]);
        let mut data = std::fs::read(&path).unwrap();
        data[at..at + 8].copy_from_slice(&raw.to_be_bytes());
        std::fs::write(&path, &data).unwrap();
        let output = run("qemu-io", &["-f", "qcow2", "-c", command, name]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let reason = text
            .split_once("Marking image as corrupt: ")
            .and_then(|(_, rest)| rest.split_once("; further"))
            .map(|(reason, _)| reason.to_owned())
            .unwrap_or_else(|| panic!("{command}: {text}"));
        let storage = storage::Storage::new(data);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let words: Vec<&str> = command.split(' ').collect();
            let offset = block_core::options::parse_size(words[1]).unwrap();
            let error = if words[0] == "read" {
                handle.read(offset, 4096).await.unwrap_err()
            } else {
                write(&handle, offset, 4096, 1).await.unwrap_err()
            };
            assert_eq!(error.reason(), reason);
            let error = handle.read(1 << 20, 512).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoMedium);
            let _ = rig.close(handle).await;
        });
        let bits = be64(&storage.state.lock().data, 72);
        let marked = if options.contains("0.10") { 0 } else { 2 };
        if marked == 2 {
            assert_eq!(bits, 2, "{reason}");
        }
        // Somebody who only reads is told, and goes on.
        if command.starts_with("read") {
            let mut data = std::mem::take(&mut storage.state.lock().data);
            if marked == 2 {
                data[79] = 0;
            }
            let storage = storage::Storage::new(data);
            rig.block_on(async {
                let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
                for _ in 0..2 {
                    handle.read(0, 128 << 10).await.unwrap_err();
                }
                rig.close(handle).await.unwrap();
            });
        }
    }
}
