//! VM state beside the disk: read and written both ways with the installed qemu-io, kept by snapshots, hidden from the disk, and dropped
//! when the disk's size changes, also when the power goes meanwhile.

mod common;

use block_core::{
    BlockHandle, ErrorKind, NewSnapshot, RequestFlags, SnapshotKey, driver::Truncate,
    image::Progress,
};
use common::{
    cuts::{Look, prepared, record},
    *,
};

const KINDS: [&str; 7] = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=2M",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,compression_type=zstd,lazy_refcounts=on",
];

fn pattern_at(at: u64) -> u8 {
    (at / 512 % 251) as u8 + 1
}

fn bytes(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(pattern_at).collect()
}

async fn expect(handle: &BlockHandle, at: u64, len: u64, what: impl Fn(u64) -> u8) {
    let read = handle.read_vm_state(at, len as usize).await.unwrap();
    for (offset, byte) in (at..).zip(read.iter()) {
        assert_eq!(*byte, what(offset), "byte {offset:#x} of the VM state");
    }
}

#[test]
fn vm_state_is_read_and_written_as_qemu_io_does_and_the_disk_stays_as_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let rig = Rig::new();
        let image = scratch.path().join("a.qcow2");
        let name = image.to_str().unwrap();
        create_by_qemu(&image, kind, 3 << 20);
        tool(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "write -P 1 0 3M",
                "-c",
                "write -b -P 2 64k 64k",
                name,
            ],
        );
        let disk = contents(&image, scratch.path());
        rig.block_on(async {
            let handle = rig.open(&image, "").await.unwrap();
            // Theirs, and what nobody wrote.
            expect(&handle, 0, 256 << 10, |at| {
                if (65_536..131_072).contains(&at) {
                    2
                } else {
                    0
                }
            })
            .await;
            expect(&handle, 1 << 40, 70_000, |_| 0).await;
            // Ours: over a part of theirs, and far off.
            handle
                .write_vm_state(100_000, bytes(100_000, 50_000))
                .await
                .unwrap();
            handle
                .write_vm_state(4_000_000, bytes(4_000_000, 1))
                .await
                .unwrap();
            expect(&handle, 0, 256 << 10, |at| match at {
                100_000..150_000 => pattern_at(at),
                65_536..100_000 => 2,
                _ => 0,
            })
            .await;
            assert_eq!(handle.length(), 3 << 20);
            assert!(handle.read(0, 3 << 20).await.unwrap()[..] == disk[..]);
            rig.close(handle).await.unwrap();
            let handle = rig.open(&image, "read-only=on").await.unwrap();
            expect(&handle, 3_999_000, 2000, |at| {
                if at == 4_000_000 { pattern_at(at) } else { 0 }
            })
            .await;
            let error = handle.write_vm_state(0, vec![1; 512]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
            rig.close(handle).await.unwrap();
        });
        assert_clean(&image);
        for (at, len) in [
            (0, 64 << 10),
            (65_536, 34_304),
            (99_840, 51_200),
            (3_999_744, 1024),
        ] {
            let read = tool(
                "qemu-io",
                &[
                    "-r",
                    "-f",
                    "qcow2",
                    "-c",
                    &format!("read -bv {at} {len}"),
                    name,
                ],
            );
            let theirs: Vec<u8> = dump(&read);
            for (offset, byte) in (at..).zip(theirs) {
                let expected = match offset {
                    100_000..150_000 => pattern_at(offset),
                    65_536..100_000 => 2,
                    4_000_000 => pattern_at(offset),
                    _ => 0,
                };
                assert_eq!(byte, expected, "{kind}: byte {offset:#x}");
            }
        }
        assert!(contents(&image, scratch.path()) == disk, "{kind}");
    }
}

/// The bytes that `read -v` prints.
fn dump(text: &str) -> Vec<u8> {
    let lines = text.lines().filter_map(|line| line.split_once(":  "));
    lines
        .flat_map(|(_, rest)| {
            let words = rest.split("  ").next().unwrap_or("").split_whitespace();
            words
                .map(|word| u8::from_str_radix(word, 16).unwrap())
                .collect::<Vec<u8>>()
        })
        .collect()
}

#[test]
fn a_longer_backing_file_shows_nowhere_in_vm_state() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let (base, image) = (
        scratch.path().join("base.qcow2"),
        scratch.path().join("a.qcow2"),
    );
    let (base_name, name) = (base.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", base_name, "8M"]);
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 0 8M", base_name],
    );
    let over = ["-b", base_name, "-F", "qcow2", name, "1M"];
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    qemu_img(&[&create[..], &over[..]].concat());
    rig.block_on(async {
        let handle = rig.open(&image, "").await.unwrap();
        expect(&handle, 0, 8192, |_| 0).await;
        handle.write_vm_state(100, vec![7; 50]).await.unwrap();
        expect(&handle, 0, 8192, |at| {
            if (100..150).contains(&at) { 7 } else { 0 }
        })
        .await;
        rig.close(handle).await.unwrap();
    });
    assert_clean(&image);
}

#[test]
fn snapshots_keep_vm_state_and_its_size() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let image = scratch.path().join("a.qcow2");
        let name = image.to_str().unwrap();
        create_by_qemu(&image, kind, 1 << 20);
        rig.block_on(async {
            let handle = rig.open(&image, "").await.unwrap();
            write(&handle, 0, 1 << 20, 3).await.unwrap();
            handle.write_vm_state(0, bytes(0, 200_000)).await.unwrap();
            let new = NewSnapshot {
                vm_state_size: 200_000,
                ..named("running")
            };
            handle.snapshot_create(new, Progress::new()).await.unwrap();
            handle.write_vm_state(0, vec![8; 100_000]).await.unwrap();
            write(&handle, 0, 1 << 20, 4).await.unwrap();
            expect(&handle, 0, 200_000, |at| {
                if at < 100_000 { 8 } else { pattern_at(at) }
            })
            .await;
            let which = SnapshotKey::Name("running".into());
            handle.snapshot_apply(which, Progress::new()).await.unwrap();
            expect(&handle, 0, 200_000, pattern_at).await;
            let disk = handle.read(0, 1 << 20).await.unwrap();
            assert!(disk.iter().all(|byte| *byte == 3), "{kind}");
            rig.close(handle).await.unwrap();
        });
        assert_clean(&image);
        let listed = qemu_img(&["snapshot", "-l", name]);
        assert!(
            listed.contains("running") && listed.contains("195 KiB"),
            "{listed}"
        );
        let read = tool(
            "qemu-io",
            &["-r", "-f", "qcow2", "-c", "read -bv 512 4096", name],
        );
        assert!(dump(&read) == bytes(512, 4096), "{kind}");
    }
}

#[test]
fn another_size_of_the_disk_drops_vm_state_and_the_new_range_reads_as_zeroes() {
    let scratch = tempfile::tempdir().unwrap();
    for kind in KINDS {
        for (new, zero) in [(40 << 20, false), (40 << 20, true), (1 << 20, false)] {
            let rig = Rig::new();
            let image = scratch.path().join("a.qcow2");
            create_by_qemu(&image, kind, 3 << 20);
            rig.block_on(async {
                let handle = rig.open(&image, "").await.unwrap();
                write(&handle, 0, 3 << 20, 3).await.unwrap();
                handle.write_vm_state(0, vec![8; 300_000]).await.unwrap();
                handle
                    .write_vm_state(30 << 20, vec![8; 5000])
                    .await
                    .unwrap();
                let how = Truncate {
                    zero,
                    exact: true,
                    ..Truncate::default()
                };
                handle.truncate(new, how).await.unwrap();
                let disk = handle.read(0, new as usize).await.unwrap();
                for (at, byte) in disk.iter().enumerate() {
                    assert_eq!(*byte, if at < 3 << 20 { 3 } else { 0 }, "{kind}: {at:#x}");
                }
                for at in [0, 1 << 20, 25 << 20, 30 << 20] {
                    expect(&handle, at, 300_000, |_| 0).await;
                }
                rig.close(handle).await.unwrap();
            });
            assert_clean(&image);
        }
    }
}

#[test]
fn a_power_cut_while_a_disk_with_vm_state_grows_shows_none_of_it() {
    const OLD: u64 = 300 << 10;
    const NEW: u64 = 3 << 20;
    for options in [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=4096,compat=0.10",
    ] {
        let start = prepared(options, OLD, async |handle| {
            handle
                .write(0, vec![3; OLD as usize], RequestFlags::empty())
                .await?;
            handle.write_vm_state(0, vec![8; 500_000]).await
        });
        let grown = record(start, "", async |handle| {
            handle.truncate(NEW, Truncate::default()).await
        });
        let mut seen = [0, 0];
        grown.cut(options, Look::AsItIs, 40, |disk, what| {
            assert!([OLD, NEW].contains(&(disk.len() as u64)), "{what}");
            seen[usize::from(disk.len() as u64 == NEW)] += 1;
            for (at, byte) in disk.iter().enumerate() {
                assert_eq!(
                    *byte,
                    if at < OLD as usize { 3 } else { 0 },
                    "{what}: {at:#x}"
                );
            }
        });
        assert!(seen[0] > 0 && seen[1] > 0, "{options}: {seen:?}");
    }
}

#[test]
fn vm_state_is_refused_where_there_is_no_place_for_it() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    let data = scratch.path().join("a.data");
    let options = format!("data_file={},data_file_raw=on", data.display());
    create_by_qemu(&image, &options, 1 << 20);
    rig.block_on(async {
        let handle = rig.open(&image, "").await.unwrap();
        let error = handle.write_vm_state(0, vec![1; 512]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported, "{error}");
        assert!(error.to_string().contains("data_file_raw"), "{error}");
        expect(&handle, 0, 512, |_| 0).await;
        rig.close(handle).await.unwrap();
    });
    assert_eq!(std::fs::metadata(&data).unwrap().len(), 1 << 20);

    create_by_qemu(&image, "cluster_size=512", 1 << 20);
    rig.block_on(async {
        let handle = rig.open(&image, "").await.unwrap();
        for at in [1 << 50, i64::MAX as u64 - 511, u64::MAX - 511] {
            let error = handle.write_vm_state(at, vec![1; 512]).await.unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::TooBig | ErrorKind::Io),
                "{at}: {error}"
            );
        }
        assert!(handle.read_vm_state(u64::MAX - 511, 512).await.is_err());
        rig.close(handle).await.unwrap();
    });
    assert_clean(&image);
    assert!(std::fs::metadata(&image).unwrap().len() < 1 << 20);
}

#[test]
fn vm_state_goes_into_an_external_data_file_that_is_not_raw() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    let name = image.to_str().unwrap();
    let options = format!(
        "cluster_size=4k,data_file={}",
        scratch.path().join("a.data").display()
    );
    create_by_qemu(&image, &options, 1 << 20);
    rig.block_on(async {
        let handle = rig.open(&image, "").await.unwrap();
        write(&handle, 0, 1 << 20, 3).await.unwrap();
        handle
            .write_vm_state(512, bytes(512, 60_000))
            .await
            .unwrap();
        expect(&handle, 512, 60_000, pattern_at).await;
        rig.close(handle).await.unwrap();
    });
    assert_clean(&image);
    let read = tool(
        "qemu-io",
        &["-r", "-f", "qcow2", "-c", "read -bv 512 4096", name],
    );
    assert!(dump(&read) == bytes(512, 4096));
    rig.block_on(async {
        let handle = rig.open(&image, "").await.unwrap();
        handle.truncate(8 << 20, Truncate::default()).await.unwrap();
        let disk = handle.read(1 << 20, 7 << 20).await.unwrap();
        assert!(disk.iter().all(|byte| *byte == 0));
        rig.close(handle).await.unwrap();
    });
    assert_clean(&image);
}

#[test]
fn vm_state_of_an_encrypted_image_is_encrypted_as_qemu_io_encrypts_it() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    let name = image.to_str().unwrap();
    let secret = ["--object", "secret,id=s,data=open sesame"];
    let opened = format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}");
    for options in [
        "encrypt.format=luks,encrypt.iter-time=1,cluster_size=4k",
        "encrypt.format=aes",
    ] {
        let rig = Rig::new();
        let sesame = block_core::secret::Secret::new("open sesame");
        rig.graph.secrets().add("s", sesame).unwrap();
        let options = format!("{options},encrypt.key-secret=s");
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, name, "1M"];
        qemu_img(&[&create[..1], &secret[..], &create[1..]].concat());
        let theirs = ["--image-opts", "-c", "write -b -P 99 64k 64k", &opened];
        tool("qemu-io", &[&secret[..], &theirs[..]].concat());
        rig.block_on(async {
            let handle = rig.open(&image, "encrypt.key-secret=s").await.unwrap();
            expect(&handle, 0, 256 << 10, |at| {
                if (65_536..131_072).contains(&at) {
                    99
                } else {
                    0
                }
            })
            .await;
            handle.write_vm_state(512, vec![98; 10_240]).await.unwrap();
            expect(&handle, 0, 16 << 10, |at| {
                if (512..10_752).contains(&at) { 98 } else { 0 }
            })
            .await;
            rig.close(handle).await.unwrap();
        });
        let again = ["--image-opts", "-r", "-c", "read -b -P 98 512 10k", &opened];
        let read = tool("qemu-io", &[&secret[..], &again[..]].concat());
        assert!(!read.contains("failed"), "{read}");
        let file = std::fs::read(&image).unwrap();
        for byte in [98u8, 99] {
            assert!(
                !file.windows(64).any(|piece| piece == [byte; 64]),
                "{options}"
            );
        }
        let check = ["check", "--image-opts", &opened];
        qemu_img(&[&check[..1], &secret[..], &check[1..]].concat());
    }
}
