//! Internal snapshots that the installed qemu-img made, read by this driver.

mod common;

use std::path::Path;

use common::*;

/// Images of all kinds, with what qemu-io does before, between and after three snapshots.
const KINDS: [&str; 7] = [
    "cluster_size=65536",
    "cluster_size=65536,compat=0.10",
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=32",
    "cluster_size=4096,refcount_bits=64",
    "cluster_size=2M,refcount_bits=32",
    "cluster_size=16384,lazy_refcounts=on",
];

fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    tool("qemu-io", &args);
}

fn snapshot(path: &Path, action: &str, name: &str) {
    qemu_img(&["snapshot", action, name, path.to_str().unwrap()]);
}

/// An image with three snapshots over a backing file: compressed, zeroed, discarded and shared clusters.
fn image_with_snapshots(directory: &Path, options: &str) -> std::path::PathBuf {
    let base = directory.join("base.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", base.to_str().unwrap(), "8M"]);
    io(&base, &["write -P 99 0 8M"]);
    let path = directory.join("a.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        "-F",
        "qcow2",
        "-b",
        base.to_str().unwrap(),
        name,
    ]);
    io(
        &path,
        &[
            "write -P 1 0 3M",
            "write -c -P 2 4M 2M",
            "write -P 3 6M 512k",
        ],
    );
    snapshot(&path, "-c", "one");
    io(
        &path,
        &[
            "write -P 4 512k 1M",
            "write -z 2M 512k",
            "write -P 5 4M 100k",
        ],
    );
    snapshot(&path, "-c", "two");
    io(
        &path,
        &["write -P 6 1M 1M", "discard 0 512k", "write -z -u 4M 1M"],
    );
    snapshot(&path, "-c", "three");
    io(&path, &["write -P 7 100k 5M", "discard 6M 1M"]);
    path
}

#[test]
fn every_snapshot_reads_as_qemu_img_reads_it() {
    for options in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let path = image_with_snapshots(scratch.path(), options);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open(&path, "read-only=on").await.unwrap();
            let listed = handle.snapshot_list().await.unwrap();
            let names: Vec<&str> = listed.iter().map(|info| info.name.as_str()).collect();
            assert_eq!(names, ["one", "two", "three"], "{options}");
            assert!(listed.iter().all(|info| info.disk_size == 8 << 20));
            rig.close(handle).await.unwrap();
        });
        for (option, name) in [
            ("snapshot=1", "one"),
            ("snapshot-name=two", "two"),
            ("snapshot-id=3,snapshot-name=three", "three"),
        ] {
            let raw = scratch.path().join("theirs.raw");
            qemu_img(&[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "-l",
                name,
                path.to_str().unwrap(),
                raw.to_str().unwrap(),
            ]);
            let theirs = std::fs::read(&raw).unwrap();
            let rig = Rig::new();
            rig.block_on(async {
                let handle = rig
                    .open(&path, &format!("read-only=on,{option}"))
                    .await
                    .unwrap();
                let ours = handle.read(0, 8 << 20).await.unwrap();
                assert_same(&ours, &theirs, &format!("{options}, snapshot {name}"));
                rig.close(handle).await.unwrap();
            });
        }
    }
}

#[test]
fn a_snapshot_has_the_size_that_the_disk_had() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "4M"]);
    io(&path, &["write -P 1 3M 1M"]);
    snapshot(&path, "-c", "small");
    qemu_img(&["resize", "-q", name, "8M"]);
    io(&path, &["write -P 2 3M 4M"]);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig
            .open(&path, "read-only=on,snapshot=small")
            .await
            .unwrap();
        assert_eq!(handle.length(), 4 << 20);
        let data = handle.read(3 << 20, 1 << 20).await.unwrap();
        assert!(data.iter().all(|byte| *byte == 1));
        rig.close(handle).await.unwrap();
    });
}

#[test]
fn a_snapshot_that_does_not_exist_or_is_to_be_written_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = image_with_snapshots(scratch.path(), KINDS[0]);
    let rig = Rig::new();
    rig.block_on(async {
        for (options, why) in [
            ("read-only=on,snapshot=nope", "Can't find snapshot"),
            ("read-only=on,snapshot-id=one", "Can't find snapshot"),
            ("read-only=on,snapshot-name=1", "Can't find snapshot"),
            (
                "read-only=on,snapshot-id=1,snapshot-name=two",
                "Can't find snapshot",
            ),
            ("read-only=on,snapshot=1,snapshot-id=1", "can't be combined"),
            ("snapshot=1", "read-only"),
        ] {
            let error = rig.open(&path, options).await.unwrap_err();
            assert!(error.reason().contains(why), "{options}: {error}");
        }
        let handle = rig.open(&path, "read-only=on,snapshot=1").await.unwrap();
        let changes = block_core::driver::Reopen {
            read_only: Some(false),
            ..block_core::driver::Reopen::default()
        };
        assert!(handle.reopen(changes).await.is_err());
        rig.close(handle).await.unwrap();
    });
}

#[test]
fn a_damaged_snapshot_table_is_refused_by_field_and_file() {
    let scratch = tempfile::tempdir().unwrap();
    let path = image_with_snapshots(scratch.path(), KINDS[0]);
    let sound = std::fs::read(&path).unwrap();
    let table = be64(&sound, 64) as usize;
    let rig = Rig::new();
    let open = |data: &[u8], options: &str| {
        std::fs::write(&path, data).unwrap();
        rig.block_on(async {
            let handle = rig.open(&path, options).await?;
            rig.close(handle).await
        })
    };
    let mut data = sound.clone();
    data[table + 36..][..4].copy_from_slice(&2000u32.to_be_bytes());
    let error = open(&data, "read-only=on").unwrap_err();
    assert!(
        error
            .reason()
            .contains("Too much extra metadata in snapshot table entry 0")
    );
    assert_eq!(error.field().unwrap().name, "snapshot[0].extra_data_size");
    let mut data = sound.clone();
    data[table + 8..][..4].copy_from_slice(&0x40_0001u32.to_be_bytes());
    open(&data, "read-only=on").unwrap();
    let error = open(&data, "read-only=on,snapshot=1").unwrap_err();
    assert!(
        error.reason().contains("Snapshot L1 table too large"),
        "{error}"
    );
    let mut data = sound.clone();
    data[table + 6..][..2].copy_from_slice(&0x1234u16.to_be_bytes());
    let error = open(&data, "read-only=on,snapshot=1").unwrap_err();
    assert!(
        error.reason().contains("Snapshot L1 table offset invalid"),
        "{error}"
    );
    // A table beyond the end of the file reads as zeroes.
    let mut data = sound;
    data[64..72].copy_from_slice(&(1u64 << 40).to_be_bytes());
    open(&data, "read-only=on").unwrap();
}
