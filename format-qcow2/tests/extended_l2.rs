//! Images with extended L2 entries: what the installed qemu tools write is read, what this driver writes they read and find
//! clean, and every kind of subcluster becomes what it becomes there.

mod common;

use std::path::{Path, PathBuf};

use block_core::{
    ErrorKind, Options, RequestFlags, Result,
    driver::{Preallocation, Truncate},
};
use common::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tempfile::TempDir;

struct Lab {
    rig: Rig,
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        Self {
            rig: Rig::new(),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image made by this driver; `options` end with the size.
    fn create(&self, name: &str, options: &str) -> PathBuf {
        let path = self.path(name);
        let options = Options::from_dotted(&format!("extended_l2=on,{options}")).unwrap();
        let (registry, graph) = (&self.rig.registry, &self.rig.graph);
        let create = registry.create(graph, "qcow2", path.to_str().unwrap(), options);
        self.rig.block_on(create).unwrap();
        path
    }

    fn create_by_qemu(&self, name: &str, options: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let options = format!("extended_l2=on,{options}");
        let options = options.trim_end_matches(',');
        let (text, size) = (path.to_str().unwrap(), size.to_string());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text, &size]);
        path
    }

    /// A backing file without zeroes, shorter than the disk by a part of a subcluster.
    fn backing(&self, size: u64) -> (String, Vec<u8>) {
        let (raw, path) = (self.path("base.raw"), self.path("base.qcow2"));
        let mut data = vec![0; size as usize];
        let len = size as usize - 5 * 512;
        for (n, byte) in data.iter_mut().take(len).enumerate() {
            *byte = (n / 512 % 255 + 1) as u8;
        }
        std::fs::write(&raw, &data[..len]).unwrap();
        let (raw, text) = (raw.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw, text]);
        (format!("backing_file={text},backing_fmt=qcow2,"), data)
    }

    fn read(&self, path: &Path) -> Vec<u8> {
        self.rig.block_on(async {
            let handle = self.rig.open(path, "read-only=on").await.unwrap();
            let data = handle.read(0, handle.length() as usize).await.unwrap();
            self.rig.close(handle).await.unwrap();
            data.to_vec()
        })
    }

    fn assert_reads(&self, path: &Path, expected: &[u8], what: &str) {
        assert_same(&self.read(path), expected, what);
        assert_same(&contents(path, self.dir.path()), expected, what);
    }
}

/// Runs qemu-io's commands on an image in one process.
fn qemu_io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    let text = tool("qemu-io", &args);
    assert!(!text.contains("failed"), "{commands:?}: {text}");
}

/// What qemu-img map says of each piece of `unit` bytes: depth, present, zero, data, offset.
fn map(path: &Path, unit: u64, size: u64) -> Vec<String> {
    let name = path.to_str().unwrap();
    let text = qemu_img(&["map", "-f", "qcow2", "--output=json", name]);
    let extents: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    (0..size / unit)
        .map(|n| {
            let at = n * unit;
            let extent = extents
                .iter()
                .rfind(|extent| extent["start"].as_u64().unwrap() <= at)
                .unwrap();
            let kind = |key: &str| extent[key] == true;
            // Where data of the backing file is doesn't matter.
            let own = extent["depth"] == 0;
            format!(
                "depth {} present {} zero {} data {} offset {}",
                extent["depth"],
                kind("present"),
                kind("zero"),
                kind("data"),
                own && extent.get("offset").is_some()
            )
        })
        .collect()
}

const CLUSTERS: [u64; 8] = [
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
];

#[test]
fn what_qemu_writes_at_random_is_read_the_same_in_every_cluster_size() {
    for (seed, cluster) in CLUSTERS.into_iter().enumerate() {
        let lab = Lab::new();
        let size = cluster * 9 + 512;
        let mut rng = SmallRng::seed_from_u64(seed as u64);
        let (backing, mut disk) = if seed % 2 == 0 {
            lab.backing(size)
        } else {
            (String::new(), vec![0; size as usize])
        };
        let path = lab.create_by_qemu("a.qcow2", &format!("{backing}cluster_size={cluster}"), size);
        let mut commands = Vec::new();
        for at in [2 * cluster, 7 * cluster] {
            commands.push(format!("write -c -P 200 {at} {cluster}"));
            disk[at as usize..][..cluster as usize].fill(200);
        }
        for n in 0..60u8 {
            let at = rng.random_range(0..size / 512) * 512;
            let most = (size - at).min(cluster * 3 / 2);
            let mut len = rng.random_range(1..=most / 512) * 512;
            let mut at = at;
            let value = match rng.random_range(0..6) {
                0..3 => {
                    commands.push(format!("write -P {} {at} {len}", n + 1));
                    n + 1
                }
                3 => {
                    commands.push(format!("write -z {at} {len}"));
                    0
                }
                4 => {
                    commands.push(format!("write -z -u {at} {len}"));
                    0
                }
                _ => {
                    at -= at % cluster;
                    len = cluster.min(size - at);
                    commands.push(format!("discard {at} {len}"));
                    0
                }
            };
            disk[at as usize..][..len as usize].fill(value);
        }
        qemu_io(&path, &commands);
        lab.assert_reads(&path, &disk, &format!("cluster size {cluster}"));
    }
}

#[test]
fn what_this_driver_writes_at_random_qemu_reads_and_finds_clean_in_every_cluster_size() {
    for (seed, cluster) in CLUSTERS.into_iter().enumerate() {
        let lab = Lab::new();
        let size = (cluster * 20).min(12 << 20) + 512;
        let (backing, disk) = if seed % 2 == 0 {
            lab.backing(size)
        } else {
            (String::new(), vec![0; size as usize])
        };
        let bits = [1, 16, 64][seed % 3];
        let options = format!("{backing}cluster_size={cluster},refcount_bits={bits},size={size}");
        let path = lab.create("a.qcow2", &options);
        let mut oracle = Oracle::new(disk, seed as u64, cluster);
        for open in [
            "cache.no-flush=on",
            "cache.no-flush=on,l2-cache-size=1k,l2-cache-entry-size=512",
        ] {
            lab.rig.block_on(async {
                let handle = lab.rig.open(&path, open).await.unwrap();
                for _ in 0..150 {
                    oracle.step(&handle).await.unwrap();
                }
                oracle.verify(&handle).await.unwrap();
                lab.rig.close(handle).await.unwrap();
            });
            assert_clean(&path);
            lab.assert_reads(&path, &oracle.disk, &options);
        }
    }
}

const C: u64 = 64 << 10;
const S: u64 = C / 32;
/// Clusters of [`kinds`].
const KINDS: u64 = 9;

/// Cluster 0 unallocated, 1 data, 2 zeroes with space, 3 zeroes without, 4 compressed, 5 data in some subclusters, 6 data and zeroes
/// in some, 7 zeroes in some without space, 8 zeroes in some with space.
fn kinds(lab: &Lab, name: &str, backing: bool) -> PathBuf {
    let size = KINDS * C;
    let (backing, _) = if backing {
        lab.backing(size)
    } else {
        (String::new(), Vec::new())
    };
    let path = lab.create_by_qemu(name, &backing, size);
    let at = |cluster: u64, subcluster: u64| cluster * C + subcluster * S;
    let commands = [
        format!("write -P 1 {} 64k", at(1, 0)),
        format!("write -P 2 {} 64k", at(2, 0)),
        format!("write -z {} 64k", at(2, 0)),
        format!("write -z -u {} 64k", at(3, 0)),
        format!("write -c -P 4 {} 64k", at(4, 0)),
        format!("write -P 5 {} 4k", at(5, 2)),
        format!("write -P 5 {} 4k", at(5, 20)),
        format!("write -P 6 {} 6k", at(6, 2)),
        format!("write -z {} 10k", at(6, 4)),
        format!("write -z {} 4k", at(6, 30)),
        format!("write -z {} 8k", at(7, 3)),
        format!("write -P 8 {} 2k", at(8, 3)),
        format!("write -z {} 2k", at(8, 3)),
    ];
    qemu_io(&path, &commands);
    path
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Act {
    Write,
    Zero,
    Unmap,
    Discard,
}

#[test]
fn every_kind_of_subcluster_becomes_what_qemu_makes_of_it() {
    let lab = Lab::new();
    // Whole cluster; whole subclusters, first, inner and last ones; parts of subclusters.
    let ranges = [
        (0, C),
        (0, S),
        (3 * S, 2 * S),
        (20 * S, 12 * S),
        (S + 512, 1024),
        (3 * S + 512, 2 * S),
    ];
    for backing in [false, true] {
        for act in [Act::Write, Act::Zero, Act::Unmap, Act::Discard] {
            for (within, len) in ranges {
                let ours = kinds(&lab, "ours.qcow2", backing);
                let theirs = lab.path("theirs.qcow2");
                std::fs::copy(&ours, &theirs).unwrap();
                let what = format!("backing {backing}, {act:?} {within:#x}+{len:#x}");
                let offsets = (0..KINDS).map(|cluster| cluster * C + within);
                lab.rig.block_on(async {
                    let handle = lab.rig.open(&ours, "").await.unwrap();
                    for at in offsets.clone() {
                        match act {
                            Act::Write => {
                                handle
                                    .write(at, vec![99; len as usize], RequestFlags::empty())
                                    .await
                            }
                            Act::Zero => handle.write_zeroes(at, len, RequestFlags::empty()).await,
                            Act::Unmap => {
                                handle.write_zeroes(at, len, RequestFlags::MAY_UNMAP).await
                            }
                            Act::Discard => handle.discard(at, len).await,
                        }
                        .unwrap();
                    }
                    lab.rig.close(handle).await.unwrap();
                });
                let commands: Vec<String> = offsets
                    .map(|at| match act {
                        Act::Write => format!("write -P 99 {at} {len}"),
                        Act::Zero => format!("write -z {at} {len}"),
                        Act::Unmap => format!("write -z -u {at} {len}"),
                        Act::Discard => format!("discard {at} {len}"),
                    })
                    .collect();
                qemu_io(&theirs, &commands);
                assert_clean(&ours);
                let expected = contents(&theirs, lab.dir.path());
                lab.assert_reads(&ours, &expected, &what);
                let (ours, theirs) = (map(&ours, 512, KINDS * C), map(&theirs, 512, KINDS * C));
                for (n, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                    assert_eq!(ours, theirs, "{what}, at {:#x}", n * 512);
                }
            }
        }
    }
}

#[test]
fn block_status_tells_subclusters_apart_as_qemu_does() {
    let lab = Lab::new();
    for backing in [false, true] {
        let path = kinds(&lab, "a.qcow2", backing);
        let theirs = map(&path, S, KINDS * C);
        lab.rig.block_on(async {
            let handle = lab.rig.open(&path, "read-only=on").await.unwrap();
            for (n, theirs) in theirs.iter().enumerate() {
                let status = handle.block_status(n as u64 * S, S).await.unwrap();
                // Only the end of the backing file is within a subcluster.
                assert!(status.len == S || !theirs.contains("depth 0"), "{n:#x}");
                let zero = format!("zero {}", status.is_zero());
                assert!(theirs.contains(&zero), "{n:#x}: {theirs}, {status:?}");
                let data = format!("data {}", status.is_data());
                assert!(theirs.contains(&data), "{n:#x}: {theirs}, {status:?}");
            }
            lab.rig.close(handle).await.unwrap();
        });
    }
}

#[test]
fn a_write_into_a_subcluster_copies_no_more_than_that_subcluster() {
    let lab = Lab::new();
    let (backing, mut disk) = lab.backing(4 * C);
    let path = lab.create("a.qcow2", &format!("{backing}size={}", 4 * C));
    lab.rig.block_on(async {
        let handle = lab.rig.open(&path, "").await.unwrap();
        for (at, len, copies) in [
            // The head and the tail of one subcluster.
            (C + 5 * S + 100, 50, 1),
            // It is allocated now.
            (C + 5 * S, S, 0),
            (C + 5 * S + 7, 9, 0),
            // Its neighbour isn't: whole, then in part at the end.
            (C + 6 * S, S, 0),
            (C + 4 * S + 1, 4 * S, 1),
        ] {
            let before = counter(&handle, "copies-on-write");
            write(&handle, at, len, 77).await.unwrap();
            disk[at as usize..][..len as usize].fill(77);
            assert_eq!(
                counter(&handle, "copies-on-write") - before,
                copies,
                "{at:#x}"
            );
        }
        lab.rig.close(handle).await.unwrap();
    });
    let shown = map(&path, S, 4 * C);
    let own: Vec<usize> = (0..shown.len())
        .filter(|n| shown[*n].contains("depth 0 present true"))
        .collect();
    assert_eq!(own, [36, 37, 38, 39, 40]);
    assert_clean(&path);
    lab.assert_reads(&path, &disk, "with its backing file");
}

#[test]
fn a_zero_write_across_parts_of_compressed_clusters_zeroes_the_rest_without_data() {
    let lab = Lab::new();
    let path = lab.create_by_qemu("a.qcow2", "cluster_size=64k", 8 * C);
    qemu_io(
        &path,
        &[
            "write -c -P 1 0 64k".into(),
            "write -P 2 64k 320k".into(),
            "write -c -P 3 384k 64k".into(),
        ],
    );
    lab.rig.block_on(async {
        let handle = lab.rig.open(&path, "").await.unwrap();
        let no_data = RequestFlags::MAY_UNMAP | RequestFlags::NO_FALLBACK;
        let error = handle.write_zeroes(S, S, no_data).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        let allocated = counter(&handle, "clusters-allocated");
        handle
            .write_zeroes(S, 6 * C, RequestFlags::MAY_UNMAP)
            .await
            .unwrap();
        // Both ends were unpacked; all between them is gone.
        assert_eq!(counter(&handle, "clusters-allocated") - allocated, 2);
        handle.flush().await.unwrap();
        lab.rig.close(handle).await.unwrap();
    });
    let mut expected = vec![0; 8 * C as usize];
    expected[..S as usize].fill(1);
    expected[6 * C as usize + S as usize..7 * C as usize].fill(3);
    assert_clean(&path);
    lab.assert_reads(&path, &expected, "compressed edges");
    assert!(map(&path, C, 8 * C)[3].contains("zero true data false offset false"));
}

#[test]
fn compressed_clusters_are_written_beside_subclusters_and_read_by_qemu() {
    let lab = Lab::new();
    let path = lab.create("a.qcow2", &format!("size={}", 8 * C));
    let mut disk = vec![0; 8 * C as usize];
    lab.rig.block_on(async {
        let handle = lab.rig.open(&path, "").await.unwrap();
        let packed = RequestFlags::WRITE_COMPRESSED;
        for (cluster, value) in [(0u64, 1u8), (1, 2), (4, 3)] {
            let data = vec![value; C as usize];
            handle.write(cluster * C, data, packed).await.unwrap();
            disk[(cluster * C) as usize..][..C as usize].fill(value);
        }
        // Zeroes without space don't stand in the way, space does.
        handle
            .write_zeroes(2 * C + S, S, RequestFlags::empty())
            .await
            .unwrap();
        handle
            .write(2 * C, vec![4; C as usize], packed)
            .await
            .unwrap();
        disk[2 * C as usize..][..C as usize].fill(4);
        write(&handle, 5 * C + S, S, 5).await.unwrap();
        disk[(5 * C + S) as usize..][..S as usize].fill(5);
        let refused = handle.write(5 * C, vec![6; C as usize], packed).await;
        assert_eq!(refused.unwrap_err().errno(), 5);
        // A part of a compressed cluster makes all of it ordinary.
        write(&handle, C + 3 * S + 10, 20, 7).await.unwrap();
        disk[(C + 3 * S) as usize + 10..][..20].fill(7);
        lab.rig.close(handle).await.unwrap();
    });
    assert_clean(&path);
    lab.assert_reads(&path, &disk, "compressed");
}

#[test]
fn a_new_overlay_may_be_preallocated_and_shows_its_backing_file() {
    let lab = Lab::new();
    for (cluster, how) in [
        (16 << 10, "metadata"),
        (64 << 10, "falloc"),
        (64 << 10, "full"),
    ] {
        let size = 20 * cluster;
        let (backing, mut disk) = lab.backing(size);
        let options = format!("{backing}cluster_size={cluster},preallocation={how}");
        let path = lab.create("a.qcow2", &format!("{options},size={size}"));
        assert_clean(&path);
        lab.assert_reads(&path, &disk, &options);
        let file = std::fs::metadata(&path).unwrap().len();
        assert!(file >= size, "{options}: {file}");
        lab.rig.block_on(async {
            let handle = lab.rig.open(&path, "").await.unwrap();
            write(&handle, 3 * cluster + 700, 3 * cluster, 9)
                .await
                .unwrap();
            disk[(3 * cluster) as usize + 700..][..3 * cluster as usize].fill(9);
            assert_eq!(counter(&handle, "clusters-allocated"), 0);
            lab.rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        lab.assert_reads(&path, &disk, &options);
        let theirs = lab.create_by_qemu("theirs.qcow2", &options, size);
        let ours = lab.create("ours.qcow2", &format!("{options},size={size}"));
        assert_eq!(map(&ours, 512, size), map(&theirs, 512, size), "{options}");
    }
}

#[test]
fn disks_grow_shrink_and_are_emptied() -> Result<()> {
    let lab = Lab::new();
    for preallocation in [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Full,
    ] {
        for backed in [false, true] {
            let size = 6 * C + 3 * S + 512;
            let (backing, mut disk) = if backed {
                lab.backing(size)
            } else {
                (String::new(), vec![0; size as usize])
            };
            let path = lab.create("a.qcow2", &format!("{backing}size={size}"));
            let what = format!("{preallocation:?}, backing {backed}");
            lab.rig.block_on(async {
                let handle = lab.rig.open(&path, "").await?;
                // The disk ends in a subcluster that holds data, with zeroes and backing data before it.
                write(&handle, 6 * C + 2 * S, S + 512, 1).await?;
                disk[(6 * C + 2 * S) as usize..].fill(1);
                write(&handle, 2 * C, 3 * C, 2).await?;
                disk[2 * C as usize..][..3 * C as usize].fill(2);
                let shrunk = 6 * C + 2 * S + 512;
                handle.truncate(shrunk, Truncate::default()).await?;
                disk.truncate(shrunk as usize);
                let how = Truncate {
                    exact: true,
                    preallocation,
                    zero: backed,
                };
                handle.truncate(shrunk + 300 * C, how).await?;
                disk.resize((shrunk + 300 * C) as usize, 0);
                assert_same(&handle.read(0, disk.len()).await?, &disk, &what);
                write(&handle, shrunk + 100, 5 * C, 3).await?;
                disk[shrunk as usize + 100..][..5 * C as usize].fill(3);
                lab.rig.close(handle).await
            })?;
            assert_clean(&path);
            lab.assert_reads(&path, &disk, &what);
            lab.rig.block_on(async {
                let handle = lab.rig.open(&path, "").await?;
                handle.truncate(3 * C + 5 * S, Truncate::default()).await?;
                handle.make_empty().await?;
                lab.rig.close(handle).await
            })?;
            let mut expected = vec![0; (3 * C + 5 * S) as usize];
            if backed {
                let base = std::fs::read(lab.path("base.raw")).unwrap();
                let len = expected.len();
                expected.copy_from_slice(&base[..len]);
            }
            assert_clean(&path);
            lab.assert_reads(&path, &expected, &what);
        }
    }
    Ok(())
}

#[test]
fn an_impossible_bitmap_is_corruption_and_shuts_a_writable_image() {
    let lab = Lab::new();
    let path = lab.create_by_qemu("a.qcow2", "cluster_size=64k", 4 * C);
    qemu_io(
        &path,
        &["write -P 1 0 64k".into(), "write -P 2 64k 64k".into()],
    );
    let mut data = std::fs::read(&path).unwrap();
    let l1 = be64(&data, 40) as usize;
    let l2 = (be64(&data, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    // Subcluster 0 of cluster 0 holds data and reads as zeroes.
    data[l2 + 11] |= 1;
    std::fs::write(&path, &data).unwrap();
    lab.rig.block_on(async {
        let handle = lab.rig.open(&path, "read-only=on").await.unwrap();
        let error = handle.read(2 * S, 512).await.unwrap_err();
        assert!(
            error.to_string().contains("Invalid cluster entry found"),
            "{error}"
        );
        assert_eq!(error.errno(), 5);
        let intact = handle.read(C, 512).await.unwrap();
        assert!(intact.iter().all(|byte| *byte == 2));
        lab.rig.close(handle).await.unwrap();

        let handle = lab.rig.open(&path, "").await.unwrap();
        let error = write(&handle, 2 * S, 512, 3).await.unwrap_err();
        assert_eq!(error.errno(), 5, "{error}");
        let error = handle.read(C, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMedium);
        let _ = lab.rig.close(handle).await;
    });
    let marked = std::fs::read(&path).unwrap();
    assert_eq!(be64(&marked, 72) & 2, 2, "marked as corrupt");
    assert_eq!(
        marked[1 << 16..],
        data[1 << 16..],
        "nothing else was written"
    );
}

#[test]
fn writes_to_different_subclusters_of_one_cluster_at_once_keep_each_other() {
    let lab = Lab::new();
    let (backing, base) = lab.backing(4 * C);
    for round in 0..20u8 {
        let path = lab.create("a.qcow2", &format!("{backing}size={}", 4 * C));
        let mut disk = base.clone();
        lab.rig.block_on(async {
            let handle = lab.rig.open(&path, "cache.no-flush=on").await.unwrap();
            let mut writes = Vec::new();
            for n in 0..128u64 {
                // Each within a subcluster, so that the rest of it is copied.
                let (at, len) = (n * S + 100, 300 + u64::from(round));
                if n % 5 == 4 {
                    continue;
                }
                writes.push(write(&handle, at, len, n as u8 + 1));
                disk[at as usize..][..len as usize].fill(n as u8 + 1);
            }
            for written in futures::future::join_all(writes).await {
                written.unwrap();
            }
            assert_same(&handle.read(0, disk.len()).await.unwrap(), &disk, "at once");
            lab.rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        lab.assert_reads(&path, &disk, "at once");
    }
}

#[test]
fn writes_that_meet_in_one_subcluster_while_the_storage_is_slow_keep_each_other() {
    let lab = Lab::new();
    for seed in 0..6 {
        let storage = storage::Storage::new(image_bytes("extended_l2=on", 4 * C));
        storage.set_dawdle(20);
        let mut disk = vec![0; 4 * C as usize];
        lab.rig.block_on(async {
            let handle = lab.rig.open_storage(&storage, "").await.unwrap();
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut pieces: Vec<u64> = (0..4 * C / 512).collect();
            for _ in 0..pieces.len() {
                let (a, b) = (rng.random_range(0..512), rng.random_range(0..512));
                pieces.swap(a, b);
            }
            // All but some sectors, in any order, in part while their cluster is being allocated.
            let mut writes = Vec::new();
            for n in pieces.into_iter().filter(|n| n % 7 != 3) {
                let (at, value) = (n * 512, (n % 250) as u8 + 1);
                writes.push(write(&handle, at, 512, value));
                disk[at as usize..][..512].fill(value);
            }
            for written in futures::future::join_all(writes).await {
                written.unwrap();
            }
            assert!(counter(&handle, "claim-waits") > 0);
            assert_same(&handle.read(0, disk.len()).await.unwrap(), &disk, "at once");
            assert_eq!(counter(&handle, "ownership-violations-caught"), 0);
            lab.rig.close(handle).await.unwrap();
        });
        let path = lab.path("a.qcow2");
        std::fs::write(&path, &storage.state.lock().data).unwrap();
        assert_clean(&path);
        lab.assert_reads(&path, &disk, "at once");
    }
}
