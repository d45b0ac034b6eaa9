//! Overlapping writes, zero writes and discards on few clusters. Clusters of others never change, whatever happens, as long as
//! the driver has its safeguards; with the gate as well nothing goes wrong at all; with neither, images break.

mod common;

use block_core::RequestFlags;
use common::{storage::Storage, *};
use format_qcow2::Qcow2Factory;
use futures::{StreamExt, stream};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const CLUSTER: u64 = 65536;

#[derive(Debug, Default, Clone, Copy)]
struct Outcome {
    errors: u64,
    corruptions: u64,
    leaks: u64,
    victims: u64,
    deferred: u64,
    violations: u64,
}

impl Outcome {
    fn is_corrupt(self) -> bool {
        self.corruptions + self.victims > 0
    }
}

/// `commands` random commands on `clusters` clusters, 64 at a time; the clusters behind them are victims, some of which were
/// written before, and some are rewritten with the same bytes all along.
/// With extended L2 entries writes and zero writes are of some subclusters of one cluster.
fn storm(
    gate: bool,
    safeguards: bool,
    extended: bool,
    clusters: u64,
    seed: u64,
    commands: u64,
) -> Outcome {
    let factory = if safeguards {
        Qcow2Factory::new()
    } else {
        Qcow2Factory::without_safeguards_for_tests()
    };
    let rig = Rig::build(factory, gate);
    let size = 4 * clusters * CLUSTER;
    let options = if extended {
        "cluster_size=65536,extended_l2=on"
    } else {
        "cluster_size=65536"
    };
    let storage = Storage::new(image_bytes(options, size));
    storage.set_dawdle(20);
    let mut outcome = Outcome::default();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let victim = |n: u64| vec![(n % 200 + 50) as u8; CLUSTER as usize];
        let mut rng = SmallRng::seed_from_u64(seed);
        let commands: Vec<(u64, u64, u64, u64)> = (0..commands)
            .map(|_| {
                let (kind, cluster) = (rng.random_range(0..8), rng.random_range(0..clusters));
                if !extended {
                    return (kind, cluster, 0, CLUSTER);
                }
                // In quarters of a subcluster.
                let start = rng.random_range(0..128);
                let len = rng.random_range(1..=(128 - start).min(24));
                (kind, cluster, start * 512, len * 512)
            })
            .collect();
        let (handle, victim) = (&handle, &victim);
        let failures = stream::iter(commands.iter().enumerate())
            .map(|(n, &(kind, cluster, within, len))| async move {
                let start = cluster * CLUSTER;
                let at = start + within;
                let done = match kind {
                    0..3 => {
                        let data = vec![(n % 40 + 1) as u8; len as usize];
                        handle.write(at, data, RequestFlags::empty()).await
                    }
                    3 => handle.write_zeroes(at, len, RequestFlags::empty()).await,
                    4 => handle.write_zeroes(at, len, RequestFlags::MAY_UNMAP).await,
                    5 | 6 => handle.discard(start, CLUSTER).await,
                    _ => {
                        // A victim is written once and never again: its clusters are recycled ones.
                        let n = clusters + n as u64 % (3 * clusters);
                        let status = handle.block_status(n * CLUSTER, CLUSTER).await;
                        if status.is_ok_and(|status| !status.is_allocated()) {
                            handle
                                .write(n * CLUSTER, victim(n), RequestFlags::empty())
                                .await
                        } else {
                            Ok(())
                        }
                    }
                };
                if n % 500 == 0 {
                    let _ = handle.flush().await;
                }
                u64::from(done.is_err())
            })
            .buffer_unordered(64)
            .fold(0, |sum, failed| async move { sum + failed })
            .await;
        outcome.errors = failures;
        for n in clusters..4 * clusters {
            if let Ok(data) = handle.read(n * CLUSTER, CLUSTER as usize).await {
                let untouched = data.iter().all(|byte| *byte == 0);
                if !untouched && data[..] != victim(n)[..] {
                    outcome.victims += 1;
                }
            }
        }
        outcome.deferred = counter(handle, "frees-deferred-by-pins");
        outcome.violations = counter(handle, "ownership-violations-caught");
        drop(rig.graph.drain_all().await);
    });
    rig.block_on(async {
        // Whether or not closing succeeds, what is on disk counts.
        let _ = rig.graph.close_all().await;
    });
    let data = storage.state.lock().data.clone();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    std::fs::write(&path, &data).unwrap();
    let theirs = run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    let rig = Rig::new();
    let report = rig.block_on(async {
        let handle = rig
            .open_storage(&Storage::new(data), "read-only=on")
            .await
            .unwrap();
        let report = checked(&handle).await;
        rig.close(handle).await.unwrap();
        report
    });
    outcome.corruptions = report.corruptions;
    outcome.leaks = report.leaks;
    assert_eq!(
        theirs.status.code() == Some(2),
        report.corruptions > 0,
        "qemu-img check agrees"
    );
    println!(
        "gate {gate}, safeguards {safeguards}, extended {extended}, {clusters} clusters, seed {seed}: {outcome:?}"
    );
    outcome
}

fn runs(gate: bool, safeguards: bool) -> Vec<Outcome> {
    [false, true]
        .into_iter()
        .flat_map(|extended| (0..6).map(move |seed| (extended, seed)))
        .map(|(extended, seed)| {
            let clusters = [8, 16, 32][seed as usize % 3];
            storm(gate, safeguards, extended, clusters, seed, 2000)
        })
        .collect()
}

#[test]
fn with_gate_and_safeguards_nothing_goes_wrong() {
    for outcome in runs(true, true) {
        assert!(!outcome.is_corrupt(), "{outcome:?}");
        assert_eq!(
            (outcome.errors, outcome.leaks, outcome.violations),
            (0, 0, 0),
            "{outcome:?}"
        );
    }
}

#[test]
fn without_the_gate_the_safeguards_keep_every_other_cluster_as_it_was() {
    let outcomes = runs(false, true);
    for outcome in &outcomes {
        assert!(!outcome.is_corrupt(), "{outcome:?}");
    }
    let caught: u64 = outcomes
        .iter()
        .map(|outcome| outcome.violations + outcome.deferred)
        .sum();
    assert!(caught > 0, "{outcomes:?}");
}

#[test]
fn without_gate_and_safeguards_every_run_is_corrupt() {
    for outcome in runs(false, false) {
        assert!(outcome.is_corrupt(), "{outcome:?}");
    }
}
