//! Every kind of cluster, and what zero writes, discards and writes make of it, as the installed qemu tools see it.

mod common;

use std::path::Path;

use block_core::RequestFlags;
use common::*;
use tempfile::TempDir;

const C: u64 = 65536;

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

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Cluster 0 unallocated, 1 normal, 2 zero allocated, 3 zero plain, 4 compressed; twice.
    fn image(&self, name: &str, compat: &str, backing: bool) -> std::path::PathBuf {
        let path = self.path(name);
        let text = path.to_str().unwrap();
        let base = self.path("base.qcow2");
        let options = format!("compat={compat}");
        let size = (10 * C).to_string();
        if backing {
            let base = base.to_str().unwrap();
            qemu_img(&["create", "-q", "-f", "qcow2", base, &size]);
            tool("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 640k", base]);
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-o", &options, "-b", base, "-F", "qcow2", text,
            ]);
        } else {
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text, &size]);
        }
        for half in [0, 5] {
            let at = |n: u64| ((half + n) * C).to_string();
            let mut commands = vec![
                format!("write -P 1 {} 64k", at(1)),
                format!("write -c -P 4 {} 64k", at(4)),
            ];
            if compat == "1.1" {
                commands.push(format!("write -P 2 {} 64k", at(2)));
                commands.push(format!("write -z {} 64k", at(2)));
                commands.push(format!("write -z -u {} 64k", at(3)));
            }
            for command in commands {
                tool(
                    "qemu-io",
                    &["-f", "qcow2", "-d", "unmap", "-c", &command, text],
                );
            }
        }
        path
    }

    /// What qemu-img map says of the clusters of the first half: present, zero, data, has an offset.
    fn map(path: &Path) -> Vec<(bool, bool, bool, bool)> {
        let text = qemu_img(&[
            "map",
            "-f",
            "qcow2",
            "--output=json",
            path.to_str().unwrap(),
        ]);
        let extents: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        (0..10u64)
            .map(|cluster| {
                let extent = extents
                    .iter()
                    .rfind(|extent| extent["start"].as_u64().unwrap() <= cluster * C)
                    .unwrap();
                let own = extent["depth"] == 0;
                (
                    own && extent["present"] == true,
                    extent["zero"] == true,
                    extent["data"] == true,
                    extent.get("offset").is_some(),
                )
            })
            .collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Act {
    Zero,
    Unmap,
    Discard,
}

/// Does the same to one image with this driver and to a copy with qemu-io.
fn compare(lab: &Lab, compat: &str, backing: bool, act: Act) {
    let ours = lab.image("ours.qcow2", compat, backing);
    let theirs = lab.path("theirs.qcow2");
    std::fs::copy(&ours, &theirs).unwrap();
    for cluster in 0..5 {
        let at = cluster * C;
        lab.rig.block_on(async {
            let handle = lab.rig.open(&ours, "").await.unwrap();
            match act {
                Act::Zero => handle
                    .write_zeroes(at, C, RequestFlags::empty())
                    .await
                    .unwrap(),
                Act::Unmap => handle
                    .write_zeroes(at, C, RequestFlags::MAY_UNMAP)
                    .await
                    .unwrap(),
                Act::Discard => handle.discard(at, C).await.unwrap(),
            }
            lab.rig.close(handle).await.unwrap();
        });
        let command = match act {
            Act::Zero => format!("write -z {at} 64k"),
            Act::Unmap => format!("write -z -u {at} 64k"),
            Act::Discard => format!("discard {at} 64k"),
        };
        let args = [
            "-f",
            "qcow2",
            "-d",
            "unmap",
            "-c",
            &command,
            theirs.to_str().unwrap(),
        ];
        tool("qemu-io", &args);
    }
    let what = format!("compat {compat}, backing {backing}, {act:?}");
    assert_clean(&ours);
    let expected = contents(&theirs, lab.dir.path());
    assert_same(&contents(&ours, lab.dir.path()), &expected, &what);
    assert_eq!(Lab::map(&ours), Lab::map(&theirs), "{what}");
}

#[test]
fn zero_writes_and_discards_change_every_kind_of_cluster_as_qemu_does() {
    let lab = Lab::new();
    for compat in ["1.1", "0.10"] {
        for backing in [false, true] {
            for act in [Act::Zero, Act::Unmap, Act::Discard] {
                compare(&lab, compat, backing, act);
            }
        }
    }
}

#[test]
fn writes_in_part_keep_the_rest_of_every_kind_of_cluster() {
    let lab = Lab::new();
    for compat in ["1.1", "0.10"] {
        for backing in [false, true] {
            let path = lab.image("part.qcow2", compat, backing);
            let mut expected = contents(&path, lab.dir.path());
            lab.rig.block_on(async {
                let handle = lab.rig.open(&path, "").await.unwrap();
                for cluster in 0..5u64 {
                    for (at, len) in [(cluster * C + 1000, 3000), ((cluster + 5) * C, 512)] {
                        handle
                            .write(at, vec![77; len], RequestFlags::empty())
                            .await
                            .unwrap();
                        expected[at as usize..][..len].fill(77);
                    }
                }
                // Across all kinds at once.
                let (at, len) = (5 * C + 60_000, 4 * C as usize);
                handle
                    .write(at, vec![78; len], RequestFlags::empty())
                    .await
                    .unwrap();
                expected[at as usize..][..len].fill(78);
                let ours = handle.read(0, expected.len()).await.unwrap();
                assert_same(&ours, &expected, "read back");
                assert!(counter(&handle, "copies-on-write") > 0);
                lab.rig.close(handle).await.unwrap();
            });
            assert_clean(&path);
            assert_same(&contents(&path, lab.dir.path()), &expected, compat);
        }
    }
}

#[test]
fn compressed_writes_are_packed_and_read_by_qemu() {
    let lab = Lab::new();
    for (cluster, bits, compat) in [
        (65536u64, 16, "1.1"),
        (512, 16, "0.10"),
        (4096, 1, "1.1"),
        (2 << 20, 64, "1.1"),
    ] {
        let path = lab.path("packed.qcow2");
        let size = cluster * 20 + 512;
        let options = format!("cluster_size={cluster},refcount_bits={bits},compat={compat}");
        create_by_qemu(&path, &options, size);
        let mut disk: Vec<u8> = (0..size).map(|at| (at / 100) as u8).collect();
        // One that doesn't compress.
        let mut state = 1u64;
        for byte in &mut disk[cluster as usize * 3..cluster as usize * 4] {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = (state >> 40) as u8;
        }
        lab.rig.block_on(async {
            let handle = lab.rig.open(&path, "").await.unwrap();
            let step = cluster as usize * 3;
            for at in (0..size as usize).step_by(step) {
                let data = disk[at..(at + step).min(size as usize)].to_vec();
                handle
                    .write(at as u64, data, RequestFlags::WRITE_COMPRESSED)
                    .await
                    .unwrap();
            }
            let again = disk[..cluster as usize].to_vec();
            let error = handle
                .write(0, again, RequestFlags::WRITE_COMPRESSED)
                .await
                .unwrap_err();
            assert_eq!(
                error.errno(),
                5,
                "a cluster is compressed-written only once"
            );
            let ours = handle.read(0, size as usize).await.unwrap();
            assert_same(&ours, &disk, "read back");
            lab.rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, lab.dir.path()), &disk, &options);
        let stored = std::fs::metadata(&path).unwrap().len();
        if cluster >= 4096 && bits > 1 {
            assert!(stored < size / 2, "{options}: {stored} bytes");
        }
        // Overwriting, discarding and zeroing drop the references.
        lab.rig.block_on(async {
            let handle = lab.rig.open(&path, "").await.unwrap();
            handle
                .write(cluster + 5, vec![1; 10], RequestFlags::empty())
                .await
                .unwrap();
            handle.discard(4 * cluster, 2 * cluster).await.unwrap();
            handle
                .write_zeroes(7 * cluster, cluster, RequestFlags::empty())
                .await
                .unwrap();
            lab.rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_chain_of_three_made_by_qemu_is_read_alike_and_can_be_written() {
    let lab = Lab::new();
    let names: Vec<_> = (0..3).map(|n| lab.path(&format!("{n}.qcow2"))).collect();
    for (n, path) in names.iter().enumerate() {
        let name = path.to_str().unwrap();
        // Layers of different sizes.
        let size = ["2M", "1M", "3M"][n];
        if n == 0 {
            qemu_img(&["create", "-q", "-f", "qcow2", name, size]);
        } else {
            let base = names[n - 1].to_str().unwrap();
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", name, size,
            ]);
        }
        let command = format!("write -P {} {}k 300k", n + 1, n * 200 + 30);
        tool("qemu-io", &["-f", "qcow2", "-c", &command, name]);
    }
    let top = &names[2];
    let mut expected = contents(top, lab.dir.path());
    lab.rig.block_on(async {
        let handle = lab.rig.open(top, "").await.unwrap();
        let ours = handle.read(0, expected.len()).await.unwrap();
        assert_same(&ours, &expected, "as qemu-img reads it");
        handle
            .write(1 << 20, vec![8; 5000], RequestFlags::empty())
            .await
            .unwrap();
        expected[1 << 20..][..5000].fill(8);
        lab.rig.close(handle).await.unwrap();
    });
    assert_clean(top);
    assert_same(&contents(top, lab.dir.path()), &expected, "after a write");
}
