//! External data files: what the installed tools made and what is made here is the same to both; the metadata file holds
//! metadata alone; a raw data file is what the guest sees; nothing is opened without consent; power cuts.

mod common;

use std::{path::Path, sync::Arc};

use block_core::{
    BlockHandle, ErrorKind, OpenOptions, Options, PermissionSet, Permissions, RequestFlags, Result,
    copy_range,
    driver::{Preallocation, Truncate},
    registry::ImplicitOpens,
};
use common::{
    storage::{Event, JointLog, Storage},
    *,
};
use futures::future::join_all;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};

const KINDS: [&str; 6] = [
    "cluster_size=64k",
    "cluster_size=4k",
    "cluster_size=64k,data_file_raw=on",
    "cluster_size=512,data_file_raw=on",
    "cluster_size=64k,extended_l2=on",
    "cluster_size=16k,extended_l2=on,data_file_raw=on",
];

fn cluster_of(kind: &str) -> u64 {
    let (_, rest) = kind.split_once('=').unwrap();
    let text = rest.split(',').next().unwrap();
    block_core::options::parse_size(text).unwrap()
}

/// A raw data file, without what the tools put behind the end of the disk.
fn assert_raw(path: &Path, disk: &[u8], what: &str) {
    let mut raw = std::fs::read(path).unwrap();
    assert!(raw.len() >= disk.len(), "{what}");
    raw.truncate(disk.len());
    assert_same(&raw, disk, &format!("{what}: the raw file"));
}

#[test]
fn both_sides_read_and_write_each_others_images_with_a_data_file() {
    let scratch = tempfile::tempdir().unwrap();
    // The disk ends within a cluster.
    let size = (3 << 20) + 1536;
    for (seed, kind) in KINDS.iter().enumerate() {
        for theirs in [true, false] {
            let what = format!("{kind}, made by {}", if theirs { "qemu-img" } else { "us" });
            let path = scratch.path().join("a.qcow2");
            let data = scratch.path().join("data.raw");
            let raw = kind.contains("raw");
            let rig = Rig::new();
            if theirs {
                create_by_qemu(
                    &path,
                    &format!("{kind},data_file={}", data.display()),
                    size as u64,
                );
            } else {
                rig.block_on(async {
                    // (qemu-img takes relative names to be relative to where it runs.)
                    let options = format!("{kind},data_file={},size={size}", data.display());
                    let options = Options::from_dotted(&options).unwrap();
                    let name = path.to_str().unwrap();
                    rig.registry
                        .create(&rig.graph, "qcow2", name, options)
                        .await
                        .unwrap();
                });
                assert_clean(&path);
            }
            let mut oracle = Oracle::new(vec![0; size], seed as u64, cluster_of(kind));
            rig.block_on(async {
                let handle = rig.open(&path, "").await.unwrap();
                for _ in 0..150 {
                    oracle.step(&handle).await.unwrap();
                    if raw {
                        assert_raw(&data, &oracle.disk, &what);
                    }
                }
                oracle.verify(&handle).await.unwrap();
                let report = checked(&handle).await;
                assert!(report.is_clean(), "{what}: {report:?}");
                rig.close(handle).await.unwrap();
            });
            if !theirs {
                assert_eq!(
                    std::fs::metadata(&data).unwrap().len(),
                    size as u64,
                    "{what}"
                );
            }
            assert_clean(&path);
            assert_same(&contents(&path, scratch.path()), &oracle.disk, &what);
            tool(
                "qemu-io",
                &[
                    "-f",
                    "qcow2",
                    "-c",
                    "write -P 3 70k 3k",
                    "-c",
                    "write -z 1M 200k",
                    "-c",
                    "discard 2M 128k",
                    path.to_str().unwrap(),
                ],
            );
            oracle.disk[70 << 10..73 << 10].fill(3);
            oracle.disk[1 << 20..(1 << 20) + (200 << 10)].fill(0);
            oracle.disk[2 << 20..(2 << 20) + (128 << 10)].fill(0);
            let rig = Rig::new();
            rig.block_on(async {
                let handle = rig.open(&path, "").await.unwrap();
                oracle.verify(&handle).await.unwrap();
                rig.close(handle).await.unwrap();
            });
            if raw {
                assert_raw(&data, &oracle.disk, &what);
            }
            std::fs::remove_file(&path).unwrap();
            std::fs::remove_file(&data).unwrap();
        }
    }
}

#[test]
fn guest_data_goes_to_the_data_file_and_metadata_to_the_image() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let data = scratch.path().join("data.raw");
    create_by_qemu(&path, &format!("data_file={}", data.display()), 16 << 20);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        write(&handle, 0, 8 << 20, 7).await.unwrap();
        let status = handle.block_status(1 << 20, 1 << 20).await.unwrap();
        let (node, at) = status.mapped.unwrap();
        assert_eq!(node.filename().unwrap(), data.to_str().unwrap());
        assert_eq!(at, 1 << 20, "a place is the guest's offset");
        let packed = handle
            .write(8 << 20, vec![1; 1 << 16], RequestFlags::WRITE_COMPRESSED)
            .await;
        assert_eq!(packed.unwrap_err().errno(), 95);
        // Without unmapping the space is kept; a discard punches it.
        let used = || {
            use std::os::unix::fs::MetadataExt;
            std::fs::metadata(&data).unwrap().blocks() * 512
        };
        let before = used();
        assert!(before >= 8 << 20);
        handle
            .write_zeroes(0, 2 << 20, RequestFlags::empty())
            .await
            .unwrap();
        assert_eq!(used(), before);
        handle.discard(0, 4 << 20).await.unwrap();
        assert!(used() <= before - (4 << 20), "{} of {before}", used());
        assert_same(
            &handle.read(0, 4 << 20).await.unwrap(),
            &vec![0; 4 << 20],
            "discarded",
        );
        rig.close(handle).await.unwrap();
    });
    assert!(std::fs::metadata(&path).unwrap().len() <= 6 << 16);
    assert_clean(&path);
}

async fn open_with(
    rig: &Rig,
    path: &Path,
    options: &str,
    implicit: ImplicitOpens,
) -> Result<BlockHandle> {
    let how = OpenOptions {
        implicit,
        ..OpenOptions::default()
    };
    let options = Options::from_dotted(options)?;
    let name = path.to_str().unwrap();
    let node = rig
        .registry
        .open_file(&rig.graph, name, Some("qcow2"), options, how)
        .await?;
    let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
    rig.graph
        .attach(&node, PermissionSet::new(used, Permissions::all()), "test")
}

#[test]
fn a_data_file_is_opened_with_consent_only_and_the_openers_choice_wins() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let (data, other) = (
        scratch.path().join("data.raw"),
        scratch.path().join("other.raw"),
    );
    let rig = Rig::new();
    rig.block_on(async {
        let options = Options::from_dotted("size=1M,data_file=data.raw").unwrap();
        rig.registry
            .create(&rig.graph, "qcow2", path.to_str().unwrap(), options)
            .await
            .unwrap();
        let before = std::fs::read(&path).unwrap();
        let denied = open_with(&rig, &path, "", ImplicitOpens::Deny)
            .await
            .unwrap_err();
        assert!(denied.to_string().contains("data.raw"), "{denied}");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        let ask = ImplicitOpens::Ask(Arc::new(move |name: &str| {
            seen.lock().push(name.to_owned());
            false
        }));
        assert!(open_with(&rig, &path, "", ask).await.is_err());
        assert_eq!(*asked.lock(), [data.to_str().unwrap()]);
        assert_eq!(std::fs::read(&path).unwrap(), before, "nothing was written");

        // Named by the opener no consent is needed, and the header's name doesn't matter.
        std::fs::copy(&data, &other).unwrap();
        let explicit = format!(
            "data-file.driver=file,data-file.filename={}",
            other.display()
        );
        let handle = open_with(&rig, &path, &explicit, ImplicitOpens::Deny)
            .await
            .unwrap();
        write(&handle, 0, 1 << 16, 9).await.unwrap();
        rig.close(handle).await.unwrap();
        assert_eq!(std::fs::read(&other).unwrap()[0], 9);
        assert_eq!(std::fs::read(&data).unwrap()[0], 0);

        std::fs::remove_file(&data).unwrap();
        let missing = open_with(&rig, &path, "", ImplicitOpens::Permit)
            .await
            .unwrap_err();
        assert!(missing.to_string().contains("data.raw"), "{missing}");
        assert_eq!(missing.errno(), 2);
        // `info` has no need for it.
        let how = OpenOptions {
            no_data_file: true,
            ..OpenOptions::default()
        };
        let name = path.to_str().unwrap();
        let node = rig
            .registry
            .open_file(
                &rig.graph,
                name,
                Some("qcow2"),
                Options::from_dotted("read-only=on").unwrap(),
                how,
            )
            .await
            .unwrap();
        let reads = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
        let handle = rig.graph.attach(&node, reads, "info").unwrap();
        let info = handle.info().await.unwrap().format_specific.unwrap().1;
        assert_eq!(
            (&info["data-file"], &info["data-file-raw"]),
            (&"data.raw".into(), &false.into())
        );
        assert_eq!(handle.read(0, 512).await.unwrap_err().errno(), 123);
        rig.close(handle).await.unwrap();
    });
    let rig = Rig::new();
    let plain = scratch.path().join("b.qcow2");
    create_by_qemu(&plain, "cluster_size=64k", 1 << 20);
    let explicit = format!(
        "data-file.driver=file,data-file.filename={}",
        other.display()
    );
    let error = rig.block_on(rig.open(&plain, &explicit)).unwrap_err();
    let text = "'data-file' can only be set for images with an external data file";
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn options_that_do_not_go_together_have_qemus_errors_and_touch_no_file() {
    let scratch = tempfile::tempdir().unwrap();
    let data = scratch.path().join("data.raw");
    let path = scratch.path().join("a.qcow2");
    let rig = Rig::new();
    for (options, message) in [
        (
            "data_file=data.raw,compat=0.10",
            "External data files are only supported with compatibility level",
        ),
        ("data_file_raw=on", "data-file-raw requires data-file"),
        (
            "data_file=data.raw,data_file_raw=on,backing_file=x,backing_fmt=raw",
            "Backing file and data-file-raw cannot be used at the same time",
        ),
    ] {
        std::fs::write(&data, b"precious").unwrap();
        let options = Options::from_dotted(&format!("size=1M,{options}")).unwrap();
        let created =
            rig.block_on(
                rig.registry
                    .create(&rig.graph, "qcow2", path.to_str().unwrap(), options),
            );
        assert!(
            created.unwrap_err().to_string().contains(message),
            "{message}"
        );
        assert_eq!(std::fs::read(&data).unwrap(), b"precious");
    }
}

#[test]
fn a_resize_takes_the_data_file_along_and_reveals_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = scratch.path().join("a.qcow2");
        let data = scratch.path().join("data.raw");
        let raw = kind.contains("raw");
        create_by_qemu(
            &path,
            &format!("{kind},data_file={}", data.display()),
            1 << 20,
        );
        let rig = Rig::new();
        let mut disk = vec![5; 1 << 20];
        rig.block_on(async {
            let mut handle = rig.open(&path, "").await.unwrap();
            write(&handle, 0, 1 << 20, 5).await.unwrap();
            let mut random = SmallRng::seed_from_u64(1);
            for n in 0..12 {
                let size = random.random_range(1..8000) * 512;
                let preallocation = match (n % 4, size > disk.len()) {
                    (1, true) => Preallocation::Metadata,
                    (2, true) => Preallocation::Full,
                    _ => Preallocation::Off,
                };
                let how = Truncate {
                    preallocation,
                    ..Truncate::default()
                };
                handle.truncate(size as u64, how).await.unwrap();
                disk.resize(size, 0);
                assert_eq!(
                    std::fs::metadata(&data).unwrap().len(),
                    size as u64,
                    "{kind}"
                );
                // Somebody put something behind the end.
                if n % 3 == 0 {
                    rig.close(handle).await.unwrap();
                    let mut bytes = std::fs::read(&data).unwrap();
                    bytes.resize(size + 70_000, 0xee);
                    std::fs::write(&data, bytes).unwrap();
                    handle = rig.open(&path, "").await.unwrap();
                }
                let read = handle.read(0, size).await.unwrap();
                assert_same(&read, &disk, &format!("{kind}, resize {n}"));
                if raw {
                    assert_raw(&data, &disk, kind);
                }
                let at = random.random_range(0..size / 512) * 512;
                let len = (size - at).min(2048);
                let fill = n as u8 + 10;
                write(&handle, at as u64, len as u64, fill).await.unwrap();
                disk[at..at + len].fill(fill);
            }
            let report = checked(&handle).await;
            assert!(report.is_clean(), "{kind}: {report:?}");
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, scratch.path()), &disk, kind);
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&data).unwrap();
    }
}

#[test]
fn a_shrink_brings_a_data_file_that_is_too_short_to_the_new_size_as_qemu_img_does() {
    let scratch = tempfile::tempdir().unwrap();
    let (old, new) = (2 << 20, 700 << 10);
    for kind in KINDS {
        for len in [0, 100_000] {
            let what = format!("{kind}, data file of {len} bytes");
            let path = scratch.path().join("a.qcow2");
            let data = scratch.path().join("data.raw");
            let shrunk = |by_qemu: bool| {
                create_by_qemu(&path, &format!("{kind},data_file={}", data.display()), old);
                let rig = Rig::new();
                rig.block_on(async {
                    let handle = rig.open(&path, "").await.unwrap();
                    write(&handle, 0, old, 5).await.unwrap();
                    rig.close(handle).await.unwrap();
                });
                let file = std::fs::OpenOptions::new().write(true).open(&data).unwrap();
                file.set_len(len).unwrap();
                if by_qemu {
                    qemu_img(&["resize", "--shrink", path.to_str().unwrap(), "700K"]);
                } else {
                    rig.block_on(async {
                        let handle = rig.open(&path, "").await.unwrap();
                        handle.truncate(new, Truncate::default()).await.unwrap();
                        rig.close(handle).await.unwrap();
                    });
                }
                assert_clean(&path);
                let shown = contents(&path, scratch.path());
                let held = std::fs::read(&data).unwrap();
                std::fs::remove_file(&path).unwrap();
                std::fs::remove_file(&data).unwrap();
                (shown, held)
            };
            let (shown, held) = shrunk(false);
            assert_eq!(held.len() as u64, new, "{what}");
            assert_same(&shown, &held, &what);
            let (theirs, their_file) = shrunk(true);
            assert_same(&shown, &theirs, &format!("{what}, beside qemu-img"));
            assert_same(&held, &their_file, &format!("{what}, the data files"));
        }
    }
}

#[test]
fn a_discard_leaves_clusters_that_it_covers_in_part_as_they_are_whatever_the_data_file() {
    let scratch = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = scratch.path().join("a.qcow2");
        let data = scratch.path().join("data.raw");
        let cluster = cluster_of(kind);
        // The last cluster is half a one, where it can be.
        let size = (4 * cluster - cluster / 2).next_multiple_of(512);
        create_by_qemu(&path, &format!("{kind},data_file={}", data.display()), size);
        let rig = Rig::new();
        let mut disk = vec![5; size as usize];
        rig.block_on(async {
            let handle = rig.open(&path, "discard=unmap").await.unwrap();
            write(&handle, 0, size, 5).await.unwrap();
            for (offset, end, whole) in [
                (cluster / 4, cluster / 2, 0..0),
                (cluster / 4, cluster + 100, 0..0),
                (cluster - 1, 2 * cluster + 1, cluster..2 * cluster),
                (3 * cluster - 1, size, 3 * cluster..size),
            ] {
                handle.discard(offset, end - offset).await.unwrap();
                disk[whole.start as usize..whole.end as usize].fill(0);
                let read = handle.read(0, size as usize).await.unwrap();
                assert_same(&read, &disk, &format!("{kind}: {offset}..{end}"));
            }
            rig.close(handle).await.unwrap();
        });
        if kind.contains("raw") {
            assert_raw(&data, &disk, kind);
        }
        assert_same(&contents(&path, scratch.path()), &disk, kind);
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&data).unwrap();
    }
}

/// Copies within the storage go from data file to data file; compressed writes beside them are refused, each and every one, and
/// leave no trace.
#[test]
fn copies_go_to_the_data_file_and_compressed_writes_beside_them_are_refused_without_a_trace() {
    const PIECES: u64 = 16;
    let scratch = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let piece = cluster_of(kind).max(4096);
        let size = (PIECES * piece) as usize;
        let path = |name: &str| scratch.path().join(name);
        for name in ["from", "to"] {
            let data = path(&format!("{name}.raw"));
            let options = format!("{kind},data_file={}", data.display());
            create_by_qemu(&path(&format!("{name}.qcow2")), &options, size as u64);
        }
        let mut source = vec![0; size];
        SmallRng::seed_from_u64(5).fill(&mut source[..]);
        let mut disk = vec![7; size];
        let rig = Rig::new();
        rig.block_on(async {
            let from = rig.open(&path("from.qcow2"), "").await.unwrap();
            let to = rig.open(&path("to.qcow2"), "").await.unwrap();
            let plain = RequestFlags::empty();
            from.write(0, source.clone(), plain).await.unwrap();
            if !kind.contains("raw") {
                // Nothing is mapped there yet, so nothing can be copied to by the storage.
                let nowhere = copy_range(&from, 0, &to, 0, piece, RequestFlags::NO_FALLBACK).await;
                assert_eq!(
                    nowhere.unwrap_err().kind(),
                    ErrorKind::NotSupported,
                    "{kind}"
                );
            }
            write(&to, 0, size as u64, 7).await.unwrap();
            let metadata = std::fs::metadata(path("to.qcow2")).unwrap().len();
            let copies = (0..PIECES).filter(|n| n % 3 == 0).map(|n| {
                let (from, to, at) = (&from, &to, n * piece);
                async move {
                    // The storage does it, or it fails.
                    copy_range(from, at, to, at, piece, RequestFlags::NO_FALLBACK)
                        .await
                        .unwrap();
                }
            });
            let compressed = (0..PIECES).map(|n| {
                let (to, at) = (&to, n * piece);
                async move {
                    let data = vec![1; piece as usize];
                    to.write(at, data, RequestFlags::WRITE_COMPRESSED).await
                }
            });
            let writes = (0..PIECES).filter(|n| n % 3 == 1).map(|n| {
                let (to, at) = (&to, n * piece);
                async move { write(to, at, piece, 9).await.unwrap() }
            });
            let (_, refused, _) =
                futures::join!(join_all(copies), join_all(compressed), join_all(writes));
            for result in refused {
                assert_eq!(
                    result.unwrap_err().kind(),
                    ErrorKind::NotSupported,
                    "{kind}"
                );
            }
            for n in 0..PIECES {
                let range = (n * piece) as usize..((n + 1) * piece) as usize;
                match n % 3 {
                    0 => disk[range.clone()].copy_from_slice(&source[range]),
                    1 => disk[range].fill(9),
                    _ => {}
                }
            }
            let read = to.read(0, size).await.unwrap();
            assert_same(&read, &disk, kind);
            to.flush().await.unwrap();
            let now = std::fs::metadata(path("to.qcow2")).unwrap().len();
            assert_eq!(now, metadata, "{kind}: the image itself has grown");
            from.close().await.unwrap();
            rig.close(to).await.unwrap();
        });
        // Every cluster is mapped: the data file is the disk, whether it is called raw or not.
        assert_raw(&path("to.raw"), &disk, kind);
        assert_clean(&path("to.qcow2"));
        assert_same(&contents(&path("to.qcow2"), scratch.path()), &disk, kind);
        for name in ["from.qcow2", "from.raw", "to.qcow2", "to.raw"] {
            std::fs::remove_file(path(name)).unwrap();
        }
    }
}

#[test]
fn entries_that_an_image_with_a_data_file_can_not_have_are_refused() {
    const L2: usize = 0x40000;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let data = scratch.path().join("data.raw");
    for (raw, message) in [
        (
            (1u64 << 63) | 0x50000,
            "does not match guest cluster offset",
        ),
        (
            (1 << 62) | 0x50000,
            "Compressed cluster entry found in image with external data file",
        ),
    ] {
        create_by_qemu(&path, &format!("data_file={}", data.display()), 1 << 20);
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write 0 128k", path.to_str().unwrap()],
        );
        let mut image = std::fs::read(&path).unwrap();
        assert_eq!(be64(&image, L2), 1 << 63);
        image[L2 + 8..L2 + 16].copy_from_slice(&raw.to_be_bytes());
        std::fs::write(&path, &image).unwrap();
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open(&path, "read-only=on").await.unwrap();
            handle.read(0, 1 << 16).await.unwrap();
            let error = handle.read(1 << 16, 512).await.unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.errno(), 5);
            rig.close(handle).await.unwrap();
        });
    }
}

/// The bytes of both storages after a cut: all up to each one's last flush, and any of what came between.
fn after_cut(
    start: &[Vec<u8>; 2],
    log: &[(usize, Event)],
    cut: usize,
    rng: &mut SmallRng,
) -> [Vec<u8>; 2] {
    let mut after = start.clone();
    for (which, bytes) in after.iter_mut().enumerate() {
        let events: Vec<&Event> = log[..cut]
            .iter()
            .filter(|(of, _)| *of == which)
            .map(|(_, event)| event)
            .collect();
        let flushed = events
            .iter()
            .rposition(|event| matches!(event, Event::Flush))
            .unwrap_or(0);
        // One storage may lose all that the other one keeps.
        let keep = [0.0, 0.0, 0.5, 1.0, 1.0][rng.random_range(0..5)];
        for (n, event) in events.into_iter().enumerate() {
            if n < flushed || rng.random_bool(keep) {
                event.apply(bytes);
            }
        }
    }
    after
}

const BLOCK: usize = 4096;

/// What each block may hold after a cut: (position in the log when it was begun, when a flush had made it durable, value).
#[derive(Default, Clone)]
struct Versions(Vec<(usize, Option<usize>, u8)>);

#[test]
fn after_a_power_cut_the_data_file_holds_what_the_metadata_says() {
    for (seed, kind) in [
        (1, "cluster_size=4k"),
        (2, "cluster_size=4k,data_file_raw=on"),
        (3, "cluster_size=16k,extended_l2=on"),
    ] {
        let size = 48 * BLOCK;
        let scratch = tempfile::tempdir().unwrap();
        let (path, data) = (scratch.path().join("a"), scratch.path().join("d"));
        create_by_qemu(
            &path,
            &format!("{kind},data_file={}", data.display()),
            size as u64,
        );
        // What a data file held before isn't to be seen.
        let stale = if kind.contains("raw") { 0 } else { 0xee };
        let start = [std::fs::read(&path).unwrap(), vec![stale; size]];
        let storages = start.clone().map(Storage::new);
        let log = JointLog::default();
        for (which, storage) in storages.iter().enumerate() {
            storage.log_to(which, &log);
            storage.set_dawdle(6);
        }
        let rig = Rig::new();
        let open = "data-file.driver=memory,data-file.name=d";
        let mut blocks = vec![Versions(vec![(0, Some(0), 0)]); size / BLOCK];
        rig.block_on(async {
            rig.storages.add("d", &storages[1]);
            let handle = rig.open_storage(&storages[0], open).await.unwrap();
            let mut rng = SmallRng::seed_from_u64(seed);
            for n in 0..120u8 {
                let at = rng.random_range(0..size / BLOCK);
                let count = rng.random_range(1..4).min(size / BLOCK - at);
                let begun = log.lock().len();
                let (start, len) = ((at * BLOCK) as u64, (count * BLOCK) as u64);
                let value = match rng.random_range(0..6) {
                    0 => {
                        handle
                            .write_zeroes(start, len, RequestFlags::empty())
                            .await
                            .unwrap();
                        0
                    }
                    1 => {
                        handle
                            .write_zeroes(start, len, RequestFlags::MAY_UNMAP)
                            .await
                            .unwrap();
                        0
                    }
                    _ => {
                        write(&handle, start, len, n + 1).await.unwrap();
                        n + 1
                    }
                };
                for block in &mut blocks[at..at + count] {
                    block.0.push((begun, None, value));
                }
                if rng.random_bool(0.15) {
                    handle.flush().await.unwrap();
                    let now = log.lock().len();
                    for version in blocks.iter_mut().flat_map(|block| &mut block.0) {
                        version.1.get_or_insert(now);
                    }
                }
            }
            rig.close(handle).await.unwrap();
        });
        let log = std::mem::take(&mut *log.lock());
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..150 {
            let cut = rng.random_range(0..=log.len());
            let after = after_cut(&start, &log, cut, &mut rng);
            let what = format!("{kind}, cut at {cut} of {}", log.len());
            let [image, data] = after.map(Storage::new);
            let rig = Rig::new();
            rig.block_on(async {
                rig.storages.add("d", &data);
                let handle = rig
                    .open_storage(&image, &format!("{open},read-only=on"))
                    .await
                    .unwrap();
                let report = checked(&handle).await;
                assert_eq!(
                    report.corruptions + report.check_errors,
                    0,
                    "{what}: {report:?}"
                );
                let disk = handle.read(0, size).await.unwrap();
                for (n, versions) in blocks.iter().enumerate() {
                    let durable = versions
                        .0
                        .iter()
                        .rposition(|(_, durable, _)| durable.is_some_and(|at| at <= cut));
                    let allowed: Vec<u8> = versions.0[durable.unwrap_or(0)..]
                        .iter()
                        .filter(|(begun, _, _)| *begun <= cut)
                        .map(|(_, _, value)| *value)
                        .collect();
                    let found = &disk[n * BLOCK..(n + 1) * BLOCK];
                    assert!(
                        found.iter().all(|byte| allowed.contains(byte)),
                        "{what}: block {n} holds {:#x}, may hold {allowed:x?}",
                        found[0]
                    );
                }
                if kind.contains("raw") {
                    let data = data.state.lock().data.clone();
                    assert_same(&data, &disk, &format!("{what}: the raw file"));
                }
                rig.close(handle).await.unwrap();
            });
        }
    }
}

/// What the data file has behind the old end, and what it is extended with where it is encrypted, is made zeroes durably before
/// the size is.
#[test]
fn a_power_cut_while_a_disk_with_a_data_file_grows_reveals_nothing_behind_its_old_end() {
    const OLD: usize = 100 << 10;
    for kind in [
        "",
        "data_file_raw=on",
        "encrypt.format=aes,encrypt.key-secret=s",
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let (path, data) = (scratch.path().join("a"), scratch.path().join("d"));
        let make_rig = || {
            let rig = Rig::new();
            let key = block_core::secret::Secret::new("open sesame");
            rig.graph.secrets().add("s", key).unwrap();
            rig
        };
        let rig = make_rig();
        let options = format!("size={OLD},data_file={},{kind}", data.display());
        let options = Options::from_dotted(options.trim_end_matches(',')).unwrap();
        let name = path.to_str().unwrap();
        rig.block_on(rig.registry.create(&rig.graph, "qcow2", name, options))
            .unwrap();
        let key = if kind.contains("encrypt") {
            ",encrypt.key-secret=s"
        } else {
            ""
        };
        let open = format!("data-file.driver=memory,data-file.name=d{key}");
        let storages = [&path, &data].map(|path| Storage::new(std::fs::read(path).unwrap()));
        let log = JointLog::default();
        let start = rig.block_on(async {
            rig.storages.add("d", &storages[1]);
            let handle = rig.open_storage(&storages[0], &open).await.unwrap();
            write(&handle, 0, OLD as u64, 5).await.unwrap();
            rig.close(handle).await.unwrap();
            // Somebody put something behind the end.
            storages[1].state.lock().data.resize(300 << 10, 0xee);
            let start = [0, 1].map(|which: usize| storages[which].state.lock().data.clone());
            for (which, storage) in storages.iter().enumerate() {
                storage.log_to(which, &log);
            }
            let handle = rig.open_storage(&storages[0], &open).await.unwrap();
            for size in [110 << 10, 150 << 10, 260 << 10] {
                handle.truncate(size, Truncate::default()).await.unwrap();
            }
            rig.close(handle).await.unwrap();
            start
        });
        let log = std::mem::take(&mut *log.lock());
        let mut rng = SmallRng::seed_from_u64(1);
        let mut grown = 0;
        for cut in (0..=log.len()).flat_map(|cut| [cut; 12]) {
            let [image, data] = after_cut(&start, &log, cut, &mut rng).map(Storage::new);
            let what = format!("{kind}, cut at {cut} of {}", log.len());
            let rig = make_rig();
            rig.block_on(async {
                rig.storages.add("d", &data);
                let handle = rig
                    .open_storage(&image, &format!("{open},read-only=on"))
                    .await
                    .unwrap();
                let size = handle.length() as usize;
                grown += usize::from(size > OLD);
                let mut expected = vec![5; OLD];
                expected.resize(size, 0);
                assert_same(&handle.read(0, size).await.unwrap(), &expected, &what);
                rig.close(handle).await.unwrap();
            });
        }
        assert!(grown > 0 && grown < 12 * log.len(), "{grown}");
    }
}

/// A commit empties the image whose data it has put into the backing file. What is there of either may be seen afterwards, and
/// nothing else: zeroes in the place of both would be the loss of it.
#[test]
fn a_power_cut_while_an_overlay_with_a_data_file_is_emptied_shows_its_data_or_what_is_below() {
    const SIZE: usize = 24 * BLOCK;
    for kind in ["cluster_size=4k", "cluster_size=16k,extended_l2=on"] {
        let scratch = tempfile::tempdir().unwrap();
        let (path, data) = (scratch.path().join("a"), scratch.path().join("d"));
        let below = scratch.path().join("b");
        std::fs::write(&below, vec![7; SIZE]).unwrap();
        let backing = format!("backing_file={},backing_fmt=raw", below.display());
        let options = format!("{kind},data_file={},{backing}", data.display());
        create_by_qemu(&path, &options, SIZE as u64);
        let storages = [&path, &data].map(|path| Storage::new(std::fs::read(path).unwrap()));
        let below = Storage::new(vec![7; SIZE]);
        let open = "data-file.driver=memory,data-file.name=d,backing.driver=memory,backing.name=b";
        let log = JointLog::default();
        let rig = Rig::new();
        let start = rig.block_on(async {
            rig.storages.add("d", &storages[1]);
            rig.storages.add("b", &below);
            let handle = rig.open_storage(&storages[0], open).await.unwrap();
            write(&handle, 0, SIZE as u64, 5).await.unwrap();
            handle.flush().await.unwrap();
            let start = [0, 1].map(|which: usize| storages[which].state.lock().data.clone());
            for (which, storage) in storages.iter().enumerate() {
                storage.log_to(which, &log);
            }
            handle.make_empty().await.unwrap();
            let disk = handle.read(0, SIZE).await.unwrap();
            assert_same(&disk, &vec![7; SIZE], kind);
            rig.close(handle).await.unwrap();
            start
        });
        let held = storages[1].state.lock().data.clone();
        assert!(
            held.iter().all(|byte| *byte == 0),
            "its space is given back"
        );
        let log = std::mem::take(&mut *log.lock());
        let mut rng = SmallRng::seed_from_u64(1);
        let mut seen = [0, 0];
        for cut in (0..=log.len()).flat_map(|cut| [cut; 12]) {
            let [image, data] = after_cut(&start, &log, cut, &mut rng).map(Storage::new);
            let what = format!("{kind}, cut at {cut} of {}", log.len());
            let rig = Rig::new();
            rig.block_on(async {
                rig.storages.add("d", &data);
                rig.storages.add("b", &below);
                let handle = rig
                    .open_storage(&image, &format!("{open},read-only=on"))
                    .await
                    .unwrap();
                let disk = handle.read(0, SIZE).await.unwrap();
                for (n, byte) in disk.iter().enumerate() {
                    assert!(matches!(byte, 5 | 7), "{what}: {byte} at {n:#x}");
                    seen[usize::from(*byte == 7)] += 1;
                }
                rig.close(handle).await.unwrap();
            });
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    }
}

/// A shrink takes its links away before it writes the new size; at no moment may a raw data file hold anything else than the disk.
#[test]
fn a_power_cut_during_a_shrink_leaves_a_raw_data_file_that_is_the_disk() {
    const SIZE: usize = 24 * BLOCK;
    const NEW: usize = 9 * BLOCK + 512;
    for kind in ["cluster_size=4k", "cluster_size=16k,extended_l2=on"] {
        let scratch = tempfile::tempdir().unwrap();
        let (path, data) = (scratch.path().join("a"), scratch.path().join("d"));
        let options = format!("{kind},data_file={},data_file_raw=on", data.display());
        create_by_qemu(&path, &options, SIZE as u64);
        let storages = [&path, &data].map(|path| Storage::new(std::fs::read(path).unwrap()));
        let open = "data-file.driver=memory,data-file.name=d";
        let log = JointLog::default();
        let rig = Rig::new();
        let start = rig.block_on(async {
            rig.storages.add("d", &storages[1]);
            let handle = rig.open_storage(&storages[0], open).await.unwrap();
            write(&handle, 0, SIZE as u64, 5).await.unwrap();
            handle.flush().await.unwrap();
            let start = [0, 1].map(|which: usize| storages[which].state.lock().data.clone());
            for (which, storage) in storages.iter().enumerate() {
                storage.log_to(which, &log);
            }
            let how = Truncate::default();
            handle.truncate(NEW as u64, how).await.unwrap();
            rig.close(handle).await.unwrap();
            start
        });
        let log = std::mem::take(&mut *log.lock());
        let mut rng = SmallRng::seed_from_u64(1);
        let mut seen = [0, 0];
        for cut in (0..=log.len()).flat_map(|cut| [cut; 12]) {
            let [image, data] = after_cut(&start, &log, cut, &mut rng).map(Storage::new);
            let what = format!("{kind}, cut at {cut} of {}", log.len());
            let mut raw = data.state.lock().data.clone();
            let rig = Rig::new();
            rig.block_on(async {
                rig.storages.add("d", &data);
                let handle = rig
                    .open_storage(&image, &format!("{open},read-only=on"))
                    .await
                    .unwrap();
                let disk = handle.read(0, handle.length() as usize).await.unwrap();
                assert!(disk[..NEW].iter().all(|byte| *byte == 5), "{what}");
                raw.resize(disk.len(), 0);
                assert_same(&disk, &raw, &what);
                seen[usize::from(disk.len() == NEW)] += 1;
                rig.close(handle).await.unwrap();
            });
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    }
}
