//! How long a check of a large image takes, as a ratio to the installed qemu-img in the same run:
//! `cargo bench -p format-qcow2 --bench check`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use block_core::image::{CheckMode, Progress};
use common::{Rig, qemu_img};

fn main() {
    let scratch = tempfile::tempdir().unwrap();
    for (cluster_size, size) in [("64k", "400G"), ("16k", "100G"), ("4k", "16G")] {
        let path = scratch.path().join("large.qcow2");
        let name = path.to_str().unwrap();
        let options = format!("preallocation=metadata,cluster_size={cluster_size}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, name, size]);
        let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
        for _ in 0..3 {
            let started = Instant::now();
            qemu_img(&["check", "-q", "-f", "qcow2", name]);
            theirs = theirs.min(started.elapsed());
            let rig = Rig::new();
            let started = Instant::now();
            rig.block_on(async {
                let handle = rig.open(&path, "read-only=on").await.unwrap();
                let report = handle
                    .check(CheckMode::ReadOnly, Progress::new())
                    .await
                    .unwrap();
                assert!(report.is_clean());
                rig.close(handle).await.unwrap();
            });
            ours = ours.min(started.elapsed());
        }
        let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
        println!(
            "{size} in clusters of {cluster_size}: qemu-img {theirs:?}, ours {ours:?}, ratio {ratio:.2}"
        );
        std::fs::remove_file(&path).unwrap();
    }
}
