//! Internal snapshots that this driver takes, applies and deletes, checked and read by the installed qemu-img, and the other way
//! round.

mod common;

use std::path::Path;

use block_core::{BlockHandle, ErrorKind, RequestFlags, SnapshotKey, image::Progress};
use common::{storage::Storage, *};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const SIZE: u64 = 4 << 20;

/// Options of creation, of opening, and whether there is a backing file.
const KINDS: [(&str, &str, bool); 10] = [
    ("cluster_size=65536", "", false),
    ("cluster_size=65536", "", true),
    ("cluster_size=65536,compat=0.10", "", true),
    ("cluster_size=4096,refcount_bits=8", "", false),
    ("cluster_size=16384,extended_l2=on", "", true),
    ("cluster_size=65536,extended_l2=on", "", false),
    (
        "cluster_size=512,refcount_bits=64",
        "l2-cache-size=1k,l2-cache-entry-size=512,refcount-cache-size=2k",
        false,
    ),
    (
        "cluster_size=4096,compat=0.10",
        "pass-discard-snapshot=off",
        false,
    ),
    ("cluster_size=2M,refcount_bits=4", "", true),
    ("cluster_size=16384,lazy_refcounts=on", "", false),
];

struct Taken {
    name: String,
    disk: Vec<u8>,
}

struct World {
    handle: BlockHandle,
    oracle: Oracle,
    taken: Vec<Taken>,
    next: usize,
}

impl World {
    async fn io(&mut self, steps: usize) {
        for _ in 0..steps {
            self.oracle.step(&self.handle).await.unwrap();
        }
    }

    /// Compressed clusters, where nothing is allocated.
    async fn compressed(&mut self) {
        let cluster = self.oracle.cluster.min(SIZE);
        let at = self.oracle.rng.random_range(0..SIZE / cluster) * cluster;
        let status = self.handle.block_status(at, cluster).await.unwrap();
        let value: u8 = self.oracle.rng.random_range(1..=255);
        let data = vec![value; cluster as usize];
        let written = self
            .handle
            .write(at, data.clone(), RequestFlags::WRITE_COMPRESSED)
            .await;
        match written {
            Ok(()) => self.oracle.disk[at as usize..][..cluster as usize].copy_from_slice(&data),
            // With subclusters it may be another part of the cluster that is.
            Err(error) => assert!(status.is_allocated() || status.len < cluster, "{error}"),
        }
    }

    async fn snapshot_step(&mut self) {
        match self.oracle.rng.random_range(0..10) {
            0..5 => {
                let name = format!("s{}", self.next);
                self.next += 1;
                let info = self
                    .handle
                    .snapshot_create(named(&name), Progress::new())
                    .await
                    .unwrap();
                assert_eq!((&info.name, info.disk_size), (&name, SIZE));
                let disk = self.oracle.disk.clone();
                self.taken.push(Taken { name, disk });
            }
            5..8 if !self.taken.is_empty() => {
                let n = self.oracle.rng.random_range(0..self.taken.len());
                let key = SnapshotKey::Name(self.taken[n].name.clone());
                self.handle
                    .snapshot_apply(key, Progress::new())
                    .await
                    .unwrap();
                self.oracle.disk.clone_from(&self.taken[n].disk);
            }
            _ if !self.taken.is_empty() => {
                let n = self.oracle.rng.random_range(0..self.taken.len());
                let key = SnapshotKey::NameOrId(self.taken[n].name.clone());
                self.handle
                    .snapshot_delete(key, Progress::new())
                    .await
                    .unwrap();
                self.taken.remove(n);
            }
            _ => {}
        }
    }
}

fn backing_file(directory: &Path) -> std::path::PathBuf {
    let base = directory.join("base.raw");
    let mut data = Vec::new();
    for n in 0..SIZE / 512 {
        data.extend(std::iter::repeat_n((n % 255 + 1) as u8, 512));
    }
    std::fs::write(&base, data).unwrap();
    let image = directory.join("base.qcow2");
    let names = (base.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", names.0, names.1]);
    image
}

fn create(directory: &Path, options: &str, backing: bool) -> std::path::PathBuf {
    let path = directory.join("a.qcow2");
    let name = path.to_str().unwrap();
    let size = SIZE.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    let base;
    if backing {
        base = backing_file(directory);
        args.extend(["-F", "qcow2", "-b", base.to_str().unwrap()]);
    }
    args.extend([name, &size]);
    qemu_img(&args);
    path
}

fn verify(path: &Path, scratch: &Path, taken: &[Taken], disk: &[u8], what: &str) {
    assert_clean(path);
    assert_same(&contents(path, scratch), disk, &format!("{what}: the disk"));
    for Taken { name, disk } in taken {
        let theirs = snapshot_contents(path, scratch, name);
        assert_same(&theirs, disk, &format!("{what}: snapshot {name}"));
    }
}

fn random_life(options: &str, open: &str, backing: bool, seed: u64) {
    let scratch = tempfile::tempdir().unwrap();
    let path = create(scratch.path(), options, backing);
    let what = format!("{options}, {open}, backing {backing}, seed {seed}");
    let cluster = image_cluster(&path);
    let disk = if backing {
        std::fs::read(scratch.path().join("base.raw")).unwrap()
    } else {
        vec![0; SIZE as usize]
    };
    let mut oracle = Oracle::new(disk, seed, cluster);
    oracle.discards_zero = !(backing && options.contains("0.10"));
    let mut taken = Vec::new();
    let mut next = 0;
    for _round in 0..3 {
        let rig = Rig::new();
        let world = rig.block_on(async {
            let handle = rig.open(&path, open).await.unwrap();
            let mut world = World {
                handle,
                oracle,
                taken,
                next,
            };
            for _ in 0..6 {
                world.io(12).await;
                world.compressed().await;
                world.snapshot_step().await;
            }
            world.oracle.verify(&world.handle).await.unwrap();
            let listed = world.handle.snapshot_list().await.unwrap();
            assert_eq!(listed.len(), world.taken.len(), "{what}");
            world
        });
        let World {
            handle,
            oracle: o,
            taken: t,
            next: n,
        } = world;
        (oracle, taken, next) = (o, t, n);
        rig.block_on(rig.close(handle)).unwrap();
        verify(&path, scratch.path(), &taken, &oracle.disk, &what);
    }
    // And all of them go: nothing is left that isn't the active disk's.
    for Taken { name, .. } in taken.drain(..) {
        qemu_img(&["snapshot", "-d", &name, path.to_str().unwrap()]);
    }
    verify(&path, scratch.path(), &[], &oracle.disk, &what);
}

fn image_cluster(path: &Path) -> u64 {
    let data = std::fs::read(path).unwrap();
    1 << u32::from_be_bytes(data[20..24].try_into().unwrap())
}

#[test]
fn what_we_take_apply_and_delete_is_clean_and_reads_the_same_with_qemu_img() {
    for (n, (options, open, backing)) in KINDS.iter().enumerate() {
        random_life(options, open, *backing, n as u64);
    }
}

#[test]
fn what_qemu_img_took_we_apply_overwrite_and_delete() {
    for (options, open, backing) in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let path = create(scratch.path(), options, backing);
        let name = path.to_str().unwrap();
        let mut taken = Vec::new();
        for n in 0..3 {
            let first = format!("write -P {} {} 1M", 10 + n, n << 20);
            let second = format!("write -z -u {}k 300k", 500 * n);
            let third = format!("write -P {} {}k 70k", 20 + n, 100 + 900 * n);
            for command in [first, second, third] {
                tool("qemu-io", &["-f", "qcow2", "-c", &command, name]);
            }
            qemu_img(&["snapshot", "-c", &format!("q{n}"), name]);
            let disk = contents(&path, scratch.path());
            taken.push(Taken {
                name: format!("q{n}"),
                disk,
            });
        }
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 99 0 3M", name]);
        let mut disk = contents(&path, scratch.path());
        let order = [
            ("apply", 1),
            ("write", 0),
            ("delete", 0),
            ("apply", 2),
            ("delete", 2),
            ("delete", 1),
        ];
        for (action, n) in order {
            let rig = Rig::new();
            rig.block_on(async {
                let handle = rig.open(&path, open).await.unwrap();
                let key = SnapshotKey::Name(format!("q{n}"));
                match action {
                    "apply" => {
                        handle.snapshot_apply(key, Progress::new()).await.unwrap();
                        let found = taken.iter().find(|taken| taken.name == format!("q{n}"));
                        disk.clone_from(&found.unwrap().disk);
                    }
                    "delete" => {
                        handle.snapshot_delete(key, Progress::new()).await.unwrap();
                        taken.retain(|taken| taken.name != format!("q{n}"));
                    }
                    _ => {
                        let mut oracle = Oracle::new(disk.clone(), 7, image_cluster(&path));
                        oracle.discards_zero = !(backing && options.contains("0.10"));
                        for _ in 0..60 {
                            oracle.step(&handle).await.unwrap();
                        }
                        disk = oracle.disk;
                    }
                }
                rig.close(handle).await.unwrap();
            });
            verify(
                &path,
                scratch.path(),
                &taken,
                &disk,
                &format!("{options}: {action} {n}"),
            );
        }
    }
}

#[test]
fn qemu_img_applies_and_deletes_what_we_took_and_shows_what_we_said() {
    let scratch = tempfile::tempdir().unwrap();
    let path = create(scratch.path(), "cluster_size=65536", false);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        write(&handle, 0, 1 << 20, 1).await.unwrap();
        handle
            .snapshot_create(named("first"), Progress::new())
            .await
            .unwrap();
        write(&handle, 0, 2 << 20, 2).await.unwrap();
        let second = handle
            .snapshot_create(named("second"), Progress::new())
            .await
            .unwrap();
        assert_eq!(second.id, "2");
        write(&handle, 0, 3 << 20, 3).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let name = path.to_str().unwrap();
    let list = qemu_img(&["snapshot", "-l", name]);
    assert!(list.contains("0001:02:03.004         --"), "{list}");
    for (action, which, byte) in [
        ("-a", "first", 1),
        ("-d", "first", 1),
        ("-a", "second", 2),
        ("-d", "second", 2),
    ] {
        qemu_img(&["snapshot", action, which, name]);
        assert_clean(&path);
        assert_eq!(contents(&path, scratch.path())[0], byte, "{action} {which}");
    }
}

#[test]
fn applying_a_snapshot_brings_back_its_size_in_both_directions() {
    for options in ["cluster_size=512", "cluster_size=65536"] {
        let scratch = tempfile::tempdir().unwrap();
        let path = create(scratch.path(), options, false);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open(&path, "").await.unwrap();
            write(&handle, SIZE - 4096, 4096, 1).await.unwrap();
            handle
                .snapshot_create(named("small"), Progress::new())
                .await
                .unwrap();
            rig.close(handle).await.unwrap();
        });
        qemu_img(&["resize", "-q", path.to_str().unwrap(), "16M"]);
        rig.block_on(async {
            let handle = rig.open(&path, "").await.unwrap();
            write(&handle, 8 << 20, 4 << 20, 2).await.unwrap();
            handle
                .snapshot_create(named("large"), Progress::new())
                .await
                .unwrap();
            let apply =
                |name: &str| handle.snapshot_apply(SnapshotKey::Name(name.into()), Progress::new());
            apply("small").await.unwrap();
            assert_eq!(handle.length(), SIZE);
            assert_eq!(handle.read(SIZE - 4096, 4096).await.unwrap()[..], [1; 4096]);
            apply("large").await.unwrap();
            assert_eq!(handle.length(), 16 << 20);
            assert_eq!(handle.read(8 << 20, 4096).await.unwrap()[..], [2; 4096]);
            apply("small").await.unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_eq!(contents(&path, scratch.path()).len() as u64, SIZE);
        qemu_img(&["snapshot", "-d", "large", path.to_str().unwrap()]);
        assert_clean(&path);
    }
}

#[test]
fn a_refcount_that_would_overflow_is_refused_before_anything_changes() {
    for (bits, possible) in [(1, 0), (2, 2), (4, 14)] {
        let options = format!("cluster_size=512,refcount_bits={bits}");
        let storage = Storage::new(image_bytes(&options, 1 << 20));
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            write(&handle, 0, 64 << 10, 1).await.unwrap();
            for n in 0..possible {
                handle
                    .snapshot_create(named(&n.to_string()), Progress::new())
                    .await
                    .unwrap();
            }
            handle.flush().await.unwrap();
            let before = storage.state.lock().data.clone();
            let error = handle
                .snapshot_create(named("no"), Progress::new())
                .await
                .unwrap_err();
            assert_eq!(
                (error.kind(), error.errno()),
                (ErrorKind::InvalidInput, 22),
                "{error}"
            );
            {
                let state = storage.state.lock();
                assert!(state.data[..before.len()] == before, "{bits} bits");
            }
            // Going back takes no more references than there are.
            if possible > 0 {
                let key = SnapshotKey::Id("1".into());
                handle.snapshot_apply(key, Progress::new()).await.unwrap();
            }
            write(&handle, 0, 64 << 10, 2).await.unwrap();
            assert_eq!(handle.snapshot_list().await.unwrap().len(), possible);
            rig.close(handle).await.unwrap();
        });
        assert_clean_bytes(&storage.state.lock().data);
    }
}

#[test]
fn unknown_extra_data_of_other_snapshots_is_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let path = create(scratch.path(), "cluster_size=65536", false);
    qemu_img(&["snapshot", "-c", "q", path.to_str().unwrap()]);
    let mut data = std::fs::read(&path).unwrap();
    let table = be64(&data, 64) as usize;
    let mut entry = data[table..table + 64].to_vec();
    entry[36..40].copy_from_slice(&37u32.to_be_bytes());
    entry.extend_from_slice(b"what is thisq"); // 13 bytes, then id and name
    entry.truncate(64 + 13);
    entry.extend_from_slice(b"1q");
    entry[12..16].copy_from_slice(&[0, 1, 0, 1]);
    data.resize(data.len().max(table + entry.len()), 0);
    data[table..table + entry.len()].copy_from_slice(&entry);
    std::fs::write(&path, &data).unwrap();
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        let listed = handle.snapshot_list().await.unwrap();
        assert_eq!((listed[0].id.as_str(), listed[0].name.as_str()), ("1", "q"));
        handle
            .snapshot_create(named("r"), Progress::new())
            .await
            .unwrap();
        handle
            .snapshot_create(named("s"), Progress::new())
            .await
            .unwrap();
        let key = SnapshotKey::IdAndName("2".into(), "r".into());
        handle.snapshot_delete(key, Progress::new()).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    assert_clean(&path);
    let data = std::fs::read(&path).unwrap();
    assert_eq!(u32::from_be_bytes(data[60..64].try_into().unwrap()), 2);
    let table = be64(&data, 64) as usize;
    assert_eq!(&data[table + 64..][..15], b"what is thisq1q");
}

#[test]
fn space_that_only_a_deleted_snapshot_used_is_punched_if_that_is_wanted() {
    for (open, punched) in [("", true), ("pass-discard-snapshot=off", false)] {
        let storage = Storage::new(image_bytes("cluster_size=65536", SIZE));
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, open).await.unwrap();
            write(&handle, 0, 1 << 20, 0xab).await.unwrap();
            handle
                .snapshot_create(named("x"), Progress::new())
                .await
                .unwrap();
            write(&handle, 0, 1 << 20, 0xcd).await.unwrap();
            handle.flush().await.unwrap();
            let count = |byte: u8| {
                let state = storage.state.lock();
                state
                    .data
                    .chunks(512)
                    .filter(|block| block.iter().all(|found| *found == byte))
                    .count()
            };
            assert!(count(0xab) >= 2048);
            let key = SnapshotKey::Name("x".into());
            handle.snapshot_delete(key, Progress::new()).await.unwrap();
            assert_eq!(count(0xab) == 0, punched, "{open}");
            assert!(count(0xcd) >= 2048);
            rig.close(handle).await.unwrap();
        });
    }
}

#[test]
fn a_cancelled_operation_leaves_the_image_as_it_was() {
    let storage = Storage::new(image_bytes("cluster_size=512", 1 << 20));
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, 1 << 20, 1).await.unwrap();
        handle
            .snapshot_create(named("x"), Progress::new())
            .await
            .unwrap();
        write(&handle, 0, 1 << 19, 2).await.unwrap();
        handle.flush().await.unwrap();
        let mut before: Option<Vec<u8>> = None;
        let key = || SnapshotKey::Name("x".into());
        for operation in [0, 0, 1, 2] {
            let progress = Progress::new();
            progress.cancel();
            let cancelled = match operation {
                0 => handle.snapshot_create(named("y"), progress).await.map(drop),
                1 => handle.snapshot_apply(key(), progress).await,
                _ => handle.snapshot_delete(key(), progress).await,
            };
            assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
            if let Some(before) = &before {
                let state = storage.state.lock();
                assert!(
                    state.data[..before.len()] == before[..],
                    "operation {operation}"
                );
            } else {
                // What was written before had to be settled first.
                before = Some(storage.state.lock().data.clone());
            }
        }
        assert_eq!(handle.snapshot_list().await.unwrap().len(), 1);
        write(&handle, 0, 4096, 3).await.unwrap();
        handle
            .snapshot_delete(key(), Progress::new())
            .await
            .unwrap();
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn ids_go_on_after_the_largest_and_missing_snapshots_are_not_found() {
    let storage = Storage::new(image_bytes("cluster_size=65536", 1 << 20));
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for expected in ["1", "2", "3"] {
            let info = handle
                .snapshot_create(named("same"), Progress::new())
                .await
                .unwrap();
            assert_eq!(info.id, expected);
        }
        handle
            .snapshot_delete(SnapshotKey::Id("2".into()), Progress::new())
            .await
            .unwrap();
        let info = handle
            .snapshot_create(named("same"), Progress::new())
            .await
            .unwrap();
        assert_eq!(info.id, "4");
        for key in [SnapshotKey::Id("2".into()), SnapshotKey::Name("4".into())] {
            let missing = handle.snapshot_apply(key.clone(), Progress::new()).await;
            assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
            let missing = handle.snapshot_delete(key, Progress::new()).await;
            assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
        }
        for id in ["4", "1", "3"] {
            handle
                .snapshot_delete(SnapshotKey::Id(id.into()), Progress::new())
                .await
                .unwrap();
        }
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
    assert_eq!(storage.state.lock().data[60..72], [0; 12]);
}

#[test]
fn a_random_snapshot_life_in_memory_never_changes_what_was_taken() {
    for seed in 0..3u64 {
        let storage = Storage::new(image_bytes("cluster_size=512,refcount_bits=16", 256 << 10));
        let rig = Rig::new();
        let mut rng = SmallRng::seed_from_u64(seed);
        rig.block_on(async {
            let handle = rig
                .open_storage(&storage, "refcount-cache-size=2k")
                .await
                .unwrap();
            let mut oracle = Oracle::new(vec![0; 256 << 10], seed, 512);
            let mut taken: Vec<(String, Vec<u8>)> = Vec::new();
            for n in 0..40 {
                for _ in 0..10 {
                    oracle.step(&handle).await.unwrap();
                }
                if taken.len() < 8 && rng.random_bool(0.6) {
                    let info = handle
                        .snapshot_create(named(&n.to_string()), Progress::new())
                        .await
                        .unwrap();
                    taken.push((info.id, oracle.disk.clone()));
                } else if !taken.is_empty() {
                    let (id, disk) = taken.remove(rng.random_range(0..taken.len()));
                    let key = SnapshotKey::Id(id);
                    handle
                        .snapshot_apply(key.clone(), Progress::new())
                        .await
                        .unwrap();
                    oracle.disk = disk;
                    oracle.verify(&handle).await.unwrap();
                    handle.snapshot_delete(key, Progress::new()).await.unwrap();
                    oracle.verify(&handle).await.unwrap();
                }
            }
            for (id, disk) in taken {
                let key = SnapshotKey::Id(id);
                handle
                    .snapshot_apply(key.clone(), Progress::new())
                    .await
                    .unwrap();
                oracle.disk = disk;
                oracle.verify(&handle).await.unwrap();
                handle.snapshot_delete(key, Progress::new()).await.unwrap();
            }
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "seed {seed}");
    }
}
