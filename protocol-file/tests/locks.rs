//! Image locks (digest of locking), among ourselves and with the installed qemu tools in both directions.

mod common;

use std::{
    fs::File,
    io::Read,
    os::{
        fd::OwnedFd,
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use block_core::{
    driver::Reopen,
    error::ErrorKind,
    flags::{PermissionSet, Permissions, RequestFlags},
    handle::BlockHandle,
};
use common::{Bed, Place, note, pattern, qemu, stderr};
use futures::executor::block_on;
use protocol_file::{FdSets, FileFactory};
use serde_json::json;

const ALL: Permissions = Permissions::all();
const READ: Permissions = Permissions::CONSISTENT_READ;

/// What a writable format node uses and shares of its file, and a read-only one.
fn format_rw() -> PermissionSet {
    PermissionSet::new(
        READ | Permissions::WRITE | Permissions::RESIZE,
        READ | Permissions::WRITE_UNCHANGED,
    )
}

fn format_ro() -> PermissionSet {
    PermissionSet::new(READ, READ | Permissions::WRITE_UNCHANGED)
}

/// What a raw image's user does.
fn raw_rw() -> PermissionSet {
    PermissionSet::new(READ | Permissions::WRITE, ALL - Permissions::RESIZE)
}

/// The bytes on which OFD locks of a file exist, from /proc/locks. The kernel gives that list a page at a time: while other tests take
/// and give back locks, lines go missing or come twice, so what counts is what several looks agree on.
fn locked_bytes(path: &str) -> Vec<u64> {
    let (mut last, mut agreed) = (locked_bytes_at_a_look(path), 0);
    for _ in 0..10_000 {
        let now = locked_bytes_at_a_look(path);
        agreed = if now == last { agreed + 1 } else { 0 };
        if agreed == 4 {
            return now;
        }
        last = now;
    }
    panic!("no two looks at the locks of {path} agree: {last:?}");
}

fn locked_bytes_at_a_look(path: &str) -> Vec<u64> {
    let inode = std::fs::metadata(path).unwrap().ino().to_string();
    let mut bytes = Vec::new();
    for line in std::fs::read_to_string("/proc/locks").unwrap().lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let Some(at) = fields.iter().position(|field| *field == "OFDLCK") else {
            continue;
        };
        if fields[at + 4].rsplit(':').next() != Some(&inode) {
            continue;
        }
        assert_eq!(fields[at + 2], "READ", "only read locks are ever taken");
        let range: Vec<u64> = fields[at + 5..at + 7]
            .iter()
            .map(|number| number.parse().unwrap())
            .collect();
        bytes.extend(range[0]..=range[1]);
    }
    bytes.sort_unstable();
    bytes
}

fn lock_error(result: Result<BlockHandle, block_core::Error>) -> String {
    let Err(error) = result else {
        panic!("there is a conflict")
    };
    assert_eq!(error.kind(), ErrorKind::Locked);
    error.reason()
}

fn expected(text: &str, name: &str) -> String {
    format!("Failed to get {text} lock\nIs another process using the image [{name}]?")
}

/// A qemu-nbd that has an image open.
struct Holder(Child);

impl Holder {
    fn nbd(dir: &Path, args: &[&str]) -> Option<Self> {
        let socket = dir.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        let child = Command::new("qemu-nbd")
            .args(["-t", "-k", socket.to_str().unwrap()])
            .args(args)
            .stderr(Stdio::inherit())
            .spawn();
        let child = match child {
            Ok(child) => Self(child),
            Err(error) => {
                note(&format!(
                    "qemu-nbd can't be run ({error}), the test is skipped"
                ));
                return None;
            }
        };
        let end = Instant::now() + Duration::from_secs(10);
        let mut stream = loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                break stream;
            }
            assert!(Instant::now() < end, "qemu-nbd doesn't start");
            thread::sleep(Duration::from_millis(5));
        };
        // It listens before it opens the image, and greets when all is ready.
        let mut greeting = [0; 8];
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
            .read_exact(&mut greeting)
            .expect("qemu-nbd says nothing");
        assert_eq!(&greeting, b"NBDMAGIC");
        Some(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn permissions_stand_in_the_bytes_that_qemu_uses() {
    for place in common::PLACES {
        let bed = Bed::new(place);
        let name = bed.file("a", 4096);
        for (set, bytes) in [
            (format_rw(), vec![100, 101, 103, 201, 203]),
            (format_ro(), vec![100, 201, 203]),
            (raw_rw(), vec![100, 101, 203]),
            (
                PermissionSet::new(READ, ALL - Permissions::RESIZE),
                vec![100, 203],
            ),
            (
                PermissionSet::new(ALL, Permissions::empty()),
                vec![100, 101, 102, 103, 200, 201, 202, 203],
            ),
        ] {
            let node = bed.node(json!({"filename": name}));
            assert_eq!(locked_bytes(&name), [0; 0]);
            let handle = bed.attach(&node, set).unwrap();
            assert_eq!(locked_bytes(&name), bytes);
            drop(handle);
            assert_eq!(locked_bytes(&name), [0; 0]);
        }
    }
}

#[test]
fn a_change_of_permissions_takes_and_gives_back_exactly_the_difference() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    let handle = bed
        .attach(&bed.node(json!({"filename": name})), format_rw())
        .unwrap();
    handle.set_permissions(format_ro()).unwrap();
    assert_eq!(locked_bytes(&name), [100, 201, 203]);
    handle.set_permissions(format_rw()).unwrap();
    assert_eq!(locked_bytes(&name), [100, 101, 103, 201, 203]);
    handle.set_permissions(PermissionSet::NONE).unwrap();
    assert_eq!(locked_bytes(&name), [0; 0]);
}

#[test]
fn a_refused_change_leaves_the_locks_as_they_were() {
    let (bed, other) = (Bed::new(Place::Disk), Bed::new(Place::Disk));
    let name = bed.file("a", 4096);
    let ours = bed
        .attach(&bed.node(json!({"filename": name})), format_ro())
        .unwrap();
    let theirs = other
        .attach(&other.node(json!({"filename": name})), format_ro())
        .unwrap();
    let error = ours.set_permissions(format_rw()).unwrap_err();
    assert_eq!(error.reason(), expected("\"write\"", &name));
    assert_eq!(locked_bytes(&name), [100, 100, 201, 201, 203, 203]);
    drop(theirs);
    ours.set_permissions(format_rw()).unwrap();
}

#[test]
fn two_openers_in_one_process_see_each_other() {
    let (bed, other) = (Bed::new(Place::Disk), Bed::new(Place::Disk));
    let name = bed.file("a", 4096);
    let open = |bed: &Bed, options, set| bed.attach(&bed.node(options), set);
    let first = open(&bed, json!({"filename": name}), format_rw()).unwrap();
    assert_eq!(
        lock_error(open(&other, json!({"filename": name}), format_rw())),
        expected("\"write\"", &name)
    );
    let ro = json!({"filename": name, "read-only": true});
    assert_eq!(
        lock_error(open(&other, ro.clone(), format_ro())),
        expected("shared \"write\"", &name)
    );
    // Sharing everything, or not locking at all, gets past it.
    let shared = json!({"filename": name, "read-only": true, "force-share": true});
    drop(open(&other, shared, format_ro()).unwrap());
    drop(
        open(
            &other,
            json!({"filename": name, "locking": "off"}),
            format_rw(),
        )
        .unwrap(),
    );
    drop(first);
    drop(open(&other, ro, format_ro()).unwrap());
}

#[test]
fn force_share_uses_reading_and_refuses_nothing() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    let node = bed.node(json!({"filename": name, "read-only": true, "force-share": true}));
    let _handle = bed.attach(&node, format_ro()).unwrap();
    assert_eq!(locked_bytes(&name), [100]);
}

#[test]
fn of_racing_openers_at_most_one_succeeds() {
    let name = {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.keep().join("a");
        std::fs::write(&path, [0; 4096]).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let mut won = 0;
    for _ in 0..50 {
        let barrier = Arc::new(Barrier::new(3));
        let openers: Vec<_> = (0..3)
            .map(|_| {
                let (barrier, name) = (barrier.clone(), name.clone());
                thread::spawn(move || {
                    let bed = Bed::new(Place::Disk);
                    let node = bed.node(json!({"filename": name}));
                    barrier.wait();
                    let handle = bed.attach(&node, format_rw());
                    // Nobody lets go before all have tried.
                    barrier.wait();
                    handle.is_ok()
                })
            })
            .collect();
        let winners = openers
            .into_iter()
            .map(|opener| opener.join().unwrap())
            .filter(|won| *won)
            .count();
        assert!(winners <= 1);
        won += winners;
    }
    assert!(won > 0, "nobody ever got the lock");
    std::fs::remove_dir_all(Path::new(&name).parent().unwrap()).unwrap();
}

#[test]
fn reopening_takes_the_locks_along() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    let node = bed.node(json!({"filename": name}));
    let handle = bed.attach(&node, format_rw()).unwrap();
    block_on(handle.reopen(Reopen::default())).unwrap();
    assert_eq!(locked_bytes(&name), [100, 101, 103, 201, 203]);
    handle.set_permissions(format_ro()).unwrap();
    let read_only = Reopen {
        read_only: Some(true),
        ..Reopen::default()
    };
    block_on(handle.reopen(read_only)).unwrap();
    assert_eq!(locked_bytes(&name), [100, 201, 203]);
    bed.close(handle);
    assert_eq!(locked_bytes(&name), [0; 0]);
}

#[test]
fn closing_gives_locks_back_even_if_the_descriptor_lives_on_elsewhere() {
    let sets = FdSets::new();
    let bed = Bed::with(Place::Disk, FileFactory::new().with_fd_sets(sets.clone()));
    let name = bed.file("a", 4096);
    let fd = OwnedFd::from(File::options().read(true).write(true).open(&name).unwrap());
    let set = sets.add(None, fd);
    let node = bed.node(json!({"filename": FdSets::name(set)}));
    let handle = bed.attach(&node, format_rw()).unwrap();
    assert_eq!(locked_bytes(&name), [100, 101, 103, 201, 203]);
    drop(node);
    bed.close(handle);
    assert_eq!(locked_bytes(&name), [0; 0]);
}

#[test]
fn a_driver_that_is_dropped_without_being_closed_gives_its_locks_back() {
    let sets = FdSets::new();
    let bed = Bed::with(Place::Disk, FileFactory::new().with_fd_sets(sets.clone()));
    let name = bed.file("a", 4096);
    let fd = OwnedFd::from(File::options().read(true).write(true).open(&name).unwrap());
    let set = sets.add(None, fd);
    let node = bed.node(json!({"filename": FdSets::name(set)}));
    let handle = bed.attach(&node, format_rw()).unwrap();
    drop(node);
    // The program goes away without tidying up; the descriptor that it was given stays open.
    let Bed {
        dir: _dir,
        graph,
        registry,
        files,
    } = bed;
    drop((graph, registry, files));
    assert_eq!(locked_bytes(&name), [100, 101, 103, 201, 203]);
    drop(handle);
    assert_eq!(locked_bytes(&name), [0; 0]);
}

#[test]
fn creating_over_an_image_in_use_is_refused_and_harms_nothing() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    for (set, text) in [(format_ro(), "\"write\""), (raw_rw(), "\"resize\"")] {
        let holder = bed
            .attach(&bed.node(json!({"filename": name})), set)
            .unwrap();
        let error = bed.create(&name, json!({"size": 1 << 20})).unwrap_err();
        assert_eq!(error.reason(), expected(text, &name));
        assert!(std::fs::read(&name).unwrap() == pattern(0, 4096));
        drop(holder);
    }
    bed.create(&name, json!({"size": 1 << 20})).unwrap();
    assert_eq!(locked_bytes(&name), [0; 0]);
}

#[test]
fn qemus_tools_respect_what_we_hold() {
    let bed = Bed::new(Place::Disk);
    let name = bed.name("a.qcow2");
    let Some(output) = qemu("qemu-img", &["create", "-q", "-f", "qcow2", &name, "1M"]) else {
        return;
    };
    assert!(output.status.success());
    let before = std::fs::read(&name).unwrap();
    let run = |program, args: &[&str]| {
        let output = qemu(program, args).expect("the tools are there");
        (output.status.success(), stderr(&output))
    };
    let handle = bed
        .attach(&bed.node(json!({"filename": name})), format_rw())
        .unwrap();
    assert_eq!(
        run("qemu-img", &["info", &name]).1,
        format!(
            "qemu-img: Could not open '{name}': {}\n",
            expected("shared \"write\"", &name)
        )
    );
    assert!(run("qemu-img", &["info", "-U", &name]).0);
    assert_eq!(
        run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", &name]).1,
        format!(
            "qemu-io: can't open device {name}: {}\n",
            expected("\"write\"", &name)
        )
    );
    assert_eq!(
        run("qemu-img", &["create", "-q", "-f", "raw", &name, "2M"]).1,
        format!("qemu-img: {name}: {}\n", expected("\"write\"", &name))
    );
    assert!(std::fs::read(&name).unwrap() == before);

    // The user of a raw image lets others write, but not resize.
    handle.set_permissions(raw_rw()).unwrap();
    assert!(
        run("qemu-img", &["resize", "-f", "raw", &name, "2M"])
            .1
            .contains(&expected("\"resize\"", &name))
    );
    assert!(run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 512", &name]).0);
    assert!(
        block_on(handle.read(0, 512))
            .unwrap()
            .iter()
            .all(|byte| *byte == 9)
    );

    drop(handle);
    assert!(run("qemu-img", &["resize", "-q", "-f", "raw", &name, "2M"]).0);
}

#[test]
fn we_respect_what_qemus_tools_hold() {
    let bed = Bed::new(Place::Disk);
    let name = bed.name("a.qcow2");
    let Some(output) = qemu("qemu-img", &["create", "-q", "-f", "qcow2", &name, "1M"]) else {
        return;
    };
    assert!(output.status.success());
    let before = std::fs::read(&name).unwrap();
    let ro = json!({"filename": name, "read-only": true});
    {
        let Some(_holder) = Holder::nbd(bed.dir.path(), &["-f", "qcow2", &name]) else {
            return;
        };
        assert_eq!(locked_bytes(&name), [100, 101, 103, 201, 203]);
        let open = |options, set| bed.attach(&bed.node(options), set);
        assert_eq!(
            lock_error(open(json!({"filename": name}), format_rw())),
            expected("\"write\"", &name)
        );
        assert_eq!(
            lock_error(open(ro.clone(), format_ro())),
            expected("shared \"write\"", &name)
        );
        let shared = json!({"filename": name, "read-only": true, "force-share": true});
        drop(open(shared, format_ro()).unwrap());
        let error = bed.create(&name, json!({"size": 0})).unwrap_err();
        assert_eq!(error.reason(), expected("\"write\"", &name));
        assert!(
            std::fs::read(&name).unwrap() == before,
            "a busy image isn't touched"
        );
        assert_eq!(locked_bytes(&name), [100, 101, 103, 201, 203]);
    }
    {
        let Some(_holder) = Holder::nbd(bed.dir.path(), &["-r", "-f", "qcow2", &name]) else {
            return;
        };
        drop(bed.attach(&bed.node(ro.clone()), format_ro()).unwrap());
        assert_eq!(
            lock_error(bed.attach(&bed.node(json!({"filename": name})), format_rw())),
            expected("\"write\"", &name)
        );
    }
    {
        let Some(_holder) = Holder::nbd(bed.dir.path(), &["-f", "raw", &name]) else {
            return;
        };
        drop(
            bed.attach(&bed.node(json!({"filename": name})), raw_rw())
                .unwrap(),
        );
        // Of two reasons the one is told that qemu tells.
        let theirs = qemu("qemu-io", &["-f", "qcow2", "-c", "read 0 0", &name]).unwrap();
        let ours = lock_error(bed.attach(&bed.node(json!({"filename": name})), format_rw()));
        assert_eq!(
            stderr(&theirs),
            format!("qemu-io: can't open device {name}: {ours}\n")
        );
        let error = bed.create(&name, json!({"size": 0})).unwrap_err();
        assert_eq!(error.reason(), expected("\"resize\"", &name));
    }
    let handle = bed
        .attach(&bed.node(json!({"filename": name})), format_rw())
        .unwrap();
    block_on(handle.write(0, vec![1; 512], RequestFlags::empty())).unwrap();
}
