//! Images go back and forth between this driver and the installed qemu tools.

mod common;

use common::*;

/// Every geometry: cluster size, version, refcount width.
fn geometries() -> Vec<(u64, &'static str, u32)> {
    let mut all = Vec::new();
    for cluster in [512, 4096, 65536, 2 << 20] {
        all.push((cluster, "0.10", 16));
        for bits in [1, 16, 64] {
            all.push((cluster, "1.1", bits));
        }
    }
    all
}

#[test]
fn what_this_driver_writes_qemu_reads_and_finds_clean_in_every_geometry() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    for (n, (cluster, compat, bits)) in geometries().into_iter().enumerate() {
        let size = (cluster * 40).clamp(300 * 512, 24 << 20) + 512;
        let path = scratch.path().join(format!("{n}.qcow2"));
        let options = format!("cluster_size={cluster},compat={compat},refcount_bits={bits}");
        create_by_qemu(&path, &options, size);
        let mut oracle = Oracle::new(vec![0; size as usize], n as u64, cluster);
        rig.block_on(async {
            let handle = rig.open(&path, "cache.no-flush=on").await.unwrap();
            for _ in 0..150 {
                oracle.step(&handle).await.unwrap();
            }
            oracle.verify(&handle).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, scratch.path()), &oracle.disk, &options);
        // And once more, on what was written before.
        rig.block_on(async {
            let handle = rig
                .open(
                    &path,
                    "l2-cache-size=4k,refcount-cache-size=1k,cache.no-flush=on",
                )
                .await
                .unwrap();
            oracle.verify(&handle).await.unwrap();
            for _ in 0..150 {
                oracle.step(&handle).await.unwrap();
            }
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        assert_same(&contents(&path, scratch.path()), &oracle.disk, &options);
        std::fs::remove_file(&path).unwrap();
    }
}
