//! Opening, passed descriptors, read-only fallback, reopening, creating.

mod common;

use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use block_core::{
    driver::{Capabilities, Reopen, Truncate},
    error::{Error, ErrorKind},
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::NodeSpec,
    node::Node,
};
use common::{Bed, Place, counter, has_io_uring, note, pattern, qemu, stderr};
use futures::executor::block_on;
use protocol_file::{FdSets, FileDriver, FileFactory, FileMode, FileOptions};
use serde_json::json;

const NONE: RequestFlags = RequestFlags::empty();

fn reason(result: Result<Arc<Node>, Error>) -> String {
    result.unwrap_err().reason()
}

fn open_fds(path: &str) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_str() == Some(path))
        .count()
}

#[test]
fn what_cannot_be_opened_is_refused_in_qemus_words() {
    let bed = Bed::new(Place::Disk);
    let missing = bed.name("missing");
    let error = bed.try_node(json!({"filename": missing})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.file(), Some(&missing[..]));
    assert_eq!(
        error.reason(),
        format!("Could not open '{missing}': No such file or directory")
    );

    let directory = bed.name("");
    let regular = format!("'file' driver requires '{directory}' to be a regular file");
    assert_eq!(
        reason(bed.try_node(json!({"filename": directory}))),
        regular
    );

    let fifo = bed.name("fifo");
    if let Some(output) = qemu("mkfifo", &[&fifo]) {
        assert!(output.status.success());
        let text = format!("'file' driver requires '{fifo}' to be a regular file");
        assert_eq!(reason(bed.try_node(json!({"filename": fifo}))), text);
    }

    let name = bed.file("a", 100);
    assert_eq!(
        reason(bed.try_node(json!({"driver": "host_device", "filename": name}))),
        format!("'host_device' driver requires '{name}' to be either a character or block device")
    );
    assert_eq!(
        reason(bed.try_node(json!({"filename": ""}))),
        "The 'file' block driver requires a file name"
    );
    assert_eq!(
        reason(bed.try_node(json!({"filename": name, "bogus": 1}))),
        "Block protocol 'file' doesn't support the option 'bogus'"
    );
    assert!(
        reason(bed.try_node(json!({"filename": name, "aio": "native"})))
            .starts_with("aio=native was specified, but it requires cache.direct=on")
    );
}

#[test]
fn the_words_are_those_of_the_installed_qemu_img() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 100);
    for (driver, filename) in [
        ("file", bed.name("missing")),
        ("file", bed.name("")),
        ("host_device", name),
    ] {
        let json = format!("json:{{\"driver\":\"{driver}\",\"filename\":\"{filename}\"}}");
        let Some(output) = qemu("qemu-img", &["info", &json]) else {
            return;
        };
        let ours = reason(bed.try_node(json!({"driver": driver, "filename": filename})));
        assert_eq!(
            stderr(&output),
            format!("qemu-img: Could not open '{json}': {ours}\n")
        );
    }
}

#[test]
fn io_uring_is_used_where_it_is_to_be_had_and_info_shows_it() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 8192);
    let aio = |options| {
        let info = block_on(bed.open(options).info()).unwrap();
        assert_eq!(info.actual_size, Some(8192));
        let (kind, data) = info.format_specific.unwrap();
        assert_eq!(kind, "file");
        data["aio"].as_str().unwrap().to_owned()
    };
    assert_eq!(aio(json!({"filename": name, "aio": "threads"})), "threads");
    let best = if has_io_uring() {
        "io_uring"
    } else {
        "threads"
    };
    assert_eq!(aio(json!({"filename": name})), best);
}

#[test]
fn passed_descriptors_are_opened_by_their_sets_name() {
    let sets = FdSets::new();
    let bed = Bed::with(Place::Disk, FileFactory::new().with_fd_sets(sets.clone()));
    let name = bed.file("a", 4096);
    let rw = File::options().read(true).write(true).open(&name).unwrap();
    let ro = File::open(&name).unwrap();
    let set = sets.add(None, OwnedFd::from(ro));

    let path = FdSets::name(set);
    assert_eq!(path, format!("/dev/fdset/{set}"));
    let denied = bed.try_node(json!({"filename": path})).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::AccessDenied);
    // The read-only descriptor will do with auto-read-only, on whatever account the test runs.
    let node = bed.node(json!({"filename": path, "auto-read-only": true}));
    assert!(node.driver().is_read_only());

    assert_eq!(sets.add(Some(set), OwnedFd::from(rw)), set);
    let handle = bed.open(json!({"filename": path}));
    block_on(handle.write(0, pattern(5, 100), NONE)).unwrap();
    assert!(std::fs::read(&name).unwrap()[..100] == pattern(5, 100));

    assert!(sets.remove(set) && !sets.remove(set));
    block_on(handle.write(0, pattern(6, 100), NONE)).unwrap();
    let gone = bed.try_node(json!({"filename": path})).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    assert!(bed.try_node(json!({"filename": "/dev/fdset/x"})).is_err());
}

#[test]
fn an_embedding_program_hands_over_a_descriptor_of_its_own() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    let fd = OwnedFd::from(File::options().read(true).write(true).open(&name).unwrap());
    let driver = bed
        .files
        .open_fd(fd, "disk 0", &FileOptions::default(), FileMode::default())
        .unwrap();
    assert!(!driver.is_device());
    let node = bed.graph.add_node(NodeSpec::new(driver)).unwrap();
    let all = Permissions::all();
    let handle = bed.attach(&node, PermissionSet::new(all, all)).unwrap();
    assert_eq!(node.filename().as_deref(), Some("disk 0"));
    block_on(handle.write(10, pattern(1, 10), NONE)).unwrap();
    assert!(std::fs::read(&name).unwrap()[10..20] == pattern(1, 10));

    let fd = OwnedFd::from(File::open(&name).unwrap());
    let error = bed
        .files
        .open_fd(fd, "disk 1", &FileOptions::default(), FileMode::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AccessDenied);
}

#[test]
fn reopening_switches_the_mode_of_the_very_same_file() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    let node = bed.node(json!({"filename": name, "read-only": true}));
    let read = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let handle = bed.attach(&node, read).unwrap();
    assert!(node.driver().is_read_only());
    // Another file under the old name isn't what was opened.
    std::fs::rename(&name, bed.path("moved")).unwrap();
    std::fs::write(&name, b"an impostor").unwrap();

    let mode = |read_only| Reopen {
        read_only: Some(read_only),
        ..Reopen::default()
    };
    block_on(handle.reopen(mode(false))).unwrap();
    assert!(
        node.driver()
            .capabilities()
            .contains(Capabilities::WRITE | Capabilities::GROW)
    );
    handle
        .set_permissions(PermissionSet::new(Permissions::all(), Permissions::all()))
        .unwrap();
    block_on(handle.write(0, pattern(9, 4096), NONE)).unwrap();
    block_on(handle.flush()).unwrap();
    assert!(std::fs::read(bed.path("moved")).unwrap() == pattern(9, 4096));
    assert_eq!(std::fs::read(&name).unwrap(), b"an impostor");

    handle.set_permissions(read).unwrap();
    block_on(handle.reopen(mode(true))).unwrap();
    assert!(node.driver().is_read_only());
    let data = block_on(handle.read(0, 4096)).unwrap();
    assert!(data[..] == pattern(9, 4096)[..]);
    assert_eq!(
        open_fds(bed.path("moved").to_str().unwrap()),
        1,
        "old descriptors are closed"
    );

    let mut changes = Reopen::default();
    changes.options.insert("aio".into(), "threads".into());
    let error = block_on(handle.reopen(changes)).unwrap_err();
    assert_eq!(error.reason(), "Cannot change the option 'aio'");
}

#[test]
fn closing_a_node_closes_its_descriptor() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    for aio in common::engines() {
        let handle = bed.open(json!({"filename": name, "aio": aio, "inline": "never"}));
        block_on(handle.read(0, 4096)).unwrap();
        assert_eq!(open_fds(&name), 1);
        bed.close(handle);
        assert_eq!(open_fds(&name), 0);
    }
}

#[test]
fn creating_makes_a_file_of_the_size_and_allocation_asked_for() {
    for place in common::PLACES {
        let bed = Bed::new(place);
        let create = |name: &str, options| bed.create(&bed.name(name), options);
        create("a", json!({"size": "1M"})).unwrap();
        create("b", json!({"size": 1 << 20, "preallocation": "falloc"})).unwrap();
        create(
            "c",
            json!({"size": "1M", "preallocation": "full", "nocow": "on"}),
        )
        .unwrap();
        for (name, least, most) in [
            ("a", 0, 65_536),
            ("b", 1 << 20, 2 << 20),
            ("c", 1 << 20, 2 << 20),
        ] {
            let handle = bed.open(json!({"filename": bed.name(name)}));
            let allocated = block_on(handle.info()).unwrap().actual_size.unwrap();
            assert!((least..=most).contains(&allocated), "{name}: {allocated}");
            assert!(
                block_on(handle.read(0, 1 << 20))
                    .unwrap()
                    .iter()
                    .all(|byte| *byte == 0)
            );
        }
        // Over an old file: nothing of it is left.
        std::fs::write(bed.path("d"), pattern(0, 100_000)).unwrap();
        create("d", json!({"size": 50_000})).unwrap();
        assert!(std::fs::read(bed.path("d")).unwrap() == vec![0; 50_000]);

        let reason = |name, options| create(name, options).unwrap_err().reason();
        assert_eq!(
            reason("e", json!({"size": 1, "preallocation": "metadata"})),
            "Unsupported preallocation mode: metadata"
        );
        assert!(!bed.path("e").exists());
        let inside = bed.name("no/e");
        assert_eq!(
            reason("no/e", json!({"size": 1})),
            format!("Could not create '{inside}': No such file or directory")
        );
        let directory = bed.name("");
        assert_eq!(
            reason("", json!({"size": 1})),
            format!("Could not create '{directory}': Is a directory")
        );
    }
}

#[test]
fn a_driver_is_found_again_behind_its_trait_object() {
    let bed = Bed::new(Place::Disk);
    let handle = bed.open(json!({"filename": bed.file("a", 4096)}));
    let node = handle.node();
    let driver = node.driver().as_any().downcast_ref::<FileDriver>().unwrap();
    assert_eq!(driver.allocated_bytes().unwrap(), 4096);
    assert!(
        counter(&handle, "inline-reads") == 0 && ["threads", "io_uring"].contains(&driver.aio())
    );
}

/// A small file system of its own. `None`, with a note, where that isn't allowed.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn tmpfs(bytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let size = format!("size={bytes}");
        let output = qemu("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &path])?;
        if !output.status.success() {
            note(&format!(
                "tmpfs can't be mounted ({}), the test is skipped",
                stderr(&output)
            ));
            return None;
        }
        Some(Self(dir))
    }

    fn name(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = qemu("umount", &["-l", self.0.path().to_str().unwrap()]);
    }
}

/// A loop device. `None`, with a note, where there are none.
struct Loop(String);

impl Loop {
    fn over(file: &str) -> Option<Self> {
        let output = qemu("losetup", &["-f", "--show", file])?;
        if !output.status.success() {
            note(&format!(
                "no loop device ({}), the test is skipped",
                stderr(&output)
            ));
            return None;
        }
        Some(Self(
            String::from_utf8(output.stdout).unwrap().trim().to_owned(),
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = qemu("losetup", &["-d", &self.0]);
    }
}

#[test]
fn a_full_disk_is_an_error_that_loses_nothing_written_before() {
    let Some(mount) = Mounted::tmpfs(1 << 20) else {
        return;
    };
    let bed = Bed::new(Place::Shm);
    for (at, aio) in common::engines().into_iter().enumerate() {
        for inline in ["never", "always"] {
            let name = mount.name(&format!("a{at}{inline}"));
            bed.create(&name, json!({"size": 0})).unwrap();
            let handle = bed.open(json!({"filename": name, "aio": aio, "inline": inline}));
            block_on(handle.write(0, pattern(1, 256 << 10), NONE)).unwrap();
            let error = block_on(handle.write(256 << 10, pattern(2, 1 << 20), NONE)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            assert_eq!(error.file(), Some(&name[..]));
            assert_eq!(error.range(), Some((256 << 10, 1 << 20)));
            // The length is the file's, however far the write came.
            assert_eq!(handle.length(), std::fs::metadata(&name).unwrap().len());
            let data = block_on(handle.read(0, 256 << 10)).unwrap();
            assert!(data[..] == pattern(1, 256 << 10)[..]);
            let how = Truncate {
                preallocation: block_core::driver::Preallocation::Falloc,
                ..Truncate::default()
            };
            let error = block_on(handle.truncate(4 << 20, how)).unwrap_err();
            assert_eq!(
                error.reason(),
                "Could not preallocate new data: No space left on device"
            );
            assert!(handle.length() < 2 << 20);
            bed.close(handle);
            std::fs::remove_file(&name).unwrap();
        }
    }
}

#[test]
fn a_block_device_is_read_written_zeroed_and_discarded() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("disk", 1 << 20);
    let Some(device) = Loop::over(&name) else {
        return;
    };
    for aio in common::engines() {
        for direct in [false, true] {
            let options = json!({"driver": "host_device", "filename": device.0, "aio": aio, "cache": {"direct": direct}});
            let handle = bed.open(options);
            assert_eq!(handle.node().driver().name(), "host_device");
            assert_eq!(handle.length(), 1 << 20);
            assert!(handle.limits().request_alignment >= 512);
            block_on(handle.write(1000, pattern(4, 5000), NONE)).unwrap();
            let data = block_on(handle.read(1000, 5000)).unwrap();
            assert!(data[..] == pattern(4, 5000)[..]);
            for flags in [NONE, RequestFlags::MAY_UNMAP] {
                block_on(handle.write(65_536, pattern(4, 65_536), NONE)).unwrap();
                block_on(handle.write_zeroes(65_536, 65_536, flags)).unwrap();
                let data = block_on(handle.read(65_536, 65_536)).unwrap();
                assert!(data.iter().all(|byte| *byte == 0));
            }
            block_on(handle.discard(131_072, 65_536)).unwrap();
            block_on(handle.flush()).unwrap();
            let status = block_on(handle.block_status(0, 1 << 20)).unwrap();
            assert!(status.is_data() && status.len == 1 << 20);
            assert!(!handle.node().driver().capabilities().intersects(
                Capabilities::GROW | Capabilities::DISCARD_ZEROES | Capabilities::ZERO_INIT
            ));
            let exact = Truncate {
                exact: true,
                ..Truncate::default()
            };
            let reason = |length, how| block_on(handle.truncate(length, how)).unwrap_err().reason();
            assert_eq!(reason(4096, exact), "Cannot resize device files");
            assert_eq!(
                reason(2 << 20, Truncate::default()),
                "Cannot grow device files"
            );
            block_on(handle.truncate(4096, Truncate::default())).unwrap();
            assert_eq!(handle.length(), 1 << 20);
            bed.close(handle);
        }
    }
    // A plain file name that is a device's.
    let node = bed.node(json!({"filename": device.0}));
    assert_eq!(node.driver().name(), "host_device");
    drop(node);
    assert_eq!(
        bed.create(&device.0, json!({"size": 2 << 20}))
            .unwrap_err()
            .reason(),
        "Cannot grow device files"
    );
    bed.create(&device.0, json!({"size": 1 << 19})).unwrap();
    let handle = bed.open(json!({"filename": device.0}));
    let head = block_on(handle.read(0, 1000)).unwrap();
    assert!(head[..512].iter().all(|byte| *byte == 0) && head[600] != 0);
    bed.close(handle);
}

#[test]
fn after_a_failed_flush_every_flush_fails_until_the_file_is_reopened() {
    // A device that has promised more than the file system below it has.
    let Some(mount) = Mounted::tmpfs(1 << 20) else {
        return;
    };
    let name = mount.name("disk");
    File::create(&name).unwrap().set_len(16 << 20).unwrap();
    let Some(device) = Loop::over(&name) else {
        return;
    };
    let bed = Bed::new(Place::Shm);
    let handle = bed.open(json!({"driver": "host_device", "filename": device.0}));
    block_on(handle.write(0, pattern(1, 4 << 20), NONE)).unwrap();
    assert_eq!(block_on(handle.flush()).unwrap_err().kind(), ErrorKind::Io);
    let flushes = counter(&handle, "flushes");
    for _ in 0..3 {
        block_on(handle.write(0, pattern(2, 512), NONE)).unwrap();
        assert_eq!(block_on(handle.flush()).unwrap_err().kind(), ErrorKind::Io);
    }
    assert_eq!(
        counter(&handle, "flushes"),
        flushes,
        "the disk isn't asked to forget"
    );
    let error = block_on(handle.write(0, pattern(2, 512), RequestFlags::FUA)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    block_on(handle.reopen(Reopen::default())).unwrap();
    block_on(handle.write(0, pattern(2, 512), NONE)).unwrap();
    block_on(handle.flush()).unwrap();
}
