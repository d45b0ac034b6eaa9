//! A power cut at any moment leaves an image without corruptions, in which everything that was flushed is there, and
//! everything else is old or new.

mod common;

use block_core::{BlockHandle, RequestFlags};
use common::{cuts::after_cut, storage::Storage, *};
use futures::future::join_all;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// One version of a block's content.
#[derive(Debug, Clone, Copy)]
struct Version {
    value: u8,
    /// Position in the storage's log when it was submitted.
    submitted: usize,
    /// The clock's time when it had completed.
    completed: u64,
}

#[derive(Default)]
struct History {
    /// For each block of 512 bytes.
    blocks: Vec<Vec<Version>>,
    /// Guest flushes: the clock's time when it began, the position in the log when it had completed.
    flushes: Vec<(u64, usize)>,
    clock: u64,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// What a block may hold after a cut at `cut`.
    fn allowed(&self, block: usize, cut: usize) -> Vec<u8> {
        let durable = self
            .flushes
            .iter()
            .filter(|(_, completed)| *completed <= cut)
            .map(|(begun, _)| *begun)
            .max()
            .unwrap_or(0);
        let mut allowed = vec![0];
        for version in &self.blocks[block] {
            if version.submitted > cut {
                break;
            }
            if version.completed <= durable {
                allowed.clear();
            }
            allowed.push(version.value);
        }
        allowed
    }
}

/// The cluster size, unless a test says otherwise.
const CLUSTER: usize = 4096;
const REGION: usize = 24 * CLUSTER;
const TASKS: usize = 4;

async fn guest(
    handle: &BlockHandle,
    storage: &Storage,
    history: &Mutex<History>,
    cluster: usize,
    task: usize,
    seed: u64,
) {
    let mut rng = SmallRng::seed_from_u64(seed * 100 + task as u64);
    for _ in 0..60 {
        let whole = rng.random_bool(0.6);
        let unit = if whole { cluster } else { 512 };
        let start = rng.random_range(0..REGION / unit);
        let count = rng.random_range(1..=6).min(REGION / unit - start);
        let (at, len) = (task * REGION + start * unit, count * unit);
        let kind = rng.random_range(0..10);
        let value = if kind < 6 {
            rng.random_range(1..=255)
        } else {
            0
        };
        let submitted = storage.position();
        let done = match kind {
            0..6 => {
                handle
                    .write(at as u64, vec![value; len], RequestFlags::empty())
                    .await
            }
            6 => {
                handle
                    .write_zeroes(at as u64, len as u64, RequestFlags::empty())
                    .await
            }
            7 => {
                handle
                    .write_zeroes(at as u64, len as u64, RequestFlags::MAY_UNMAP)
                    .await
            }
            _ if whole => handle.discard(at as u64, len as u64).await,
            _ => continue,
        };
        done.unwrap();
        {
            let mut history = history.lock();
            let completed = history.tick();
            for block in at / 512..(at + len) / 512 {
                history.blocks[block].push(Version {
                    value,
                    submitted,
                    completed,
                });
            }
        }
        if rng.random_bool(0.05) {
            let begun = history.lock().tick();
            handle.flush().await.unwrap();
            history.lock().flushes.push((begun, storage.position()));
        }
    }
}

/// `more`: bytes behind the regions that are written beforehand, so that tables have to grow early.
fn filled(image: Vec<u8>, at: usize, len: usize) -> Vec<u8> {
    let rig = Rig::new();
    let storage = Storage::new(image);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle
            .write(at as u64, vec![1; len], RequestFlags::empty())
            .await
            .unwrap();
        rig.close(handle).await.unwrap();
    });
    let mut state = storage.state.lock();
    std::mem::take(&mut state.data)
}

fn storm_and_cut(options: &str, open: &str, more: usize, seed: u64, cuts: usize) -> u64 {
    storm_and_cut_clusters(CLUSTER, options, open, more, seed, cuts)
}

/// `cluster`: what is written, zeroed and discarded as a whole.
fn storm_and_cut_clusters(
    cluster: usize,
    options: &str,
    open: &str,
    more: usize,
    seed: u64,
    cuts: usize,
) -> u64 {
    let rig = Rig::new();
    let size = TASKS * REGION;
    let start = image_bytes(options, (size + more) as u64);
    let start = if more == 0 {
        start
    } else {
        filled(start, size, more)
    };
    let storage = Storage::new(start.clone());
    storage.state.lock().keep_log = true;
    storage.set_dawdle(12);
    let history = Mutex::new(History {
        blocks: vec![Vec::new(); size / 512],
        ..History::default()
    });
    let batches = rig.block_on(async {
        let handle = rig.open_storage(&storage, open).await.unwrap();
        join_all((0..TASKS).map(|task| guest(&handle, &storage, &history, cluster, task, seed)))
            .await;
        let batches = counter(&handle, "batches");
        rig.close(handle).await.unwrap();
        batches
    });
    let log = std::mem::take(&mut storage.state.lock().log);
    let moved = storage.state.lock().data[48..56] != start[48..56];
    assert_eq!(
        moved,
        more > 0,
        "{options}: the refcount table is replaced during the storm"
    );
    let history = history.into_inner();
    let mut rng = SmallRng::seed_from_u64(seed);
    for n in 0..cuts {
        let cut = if n == 0 {
            log.len()
        } else {
            rng.random_range(0..=log.len())
        };
        let data = after_cut(&start, &log, cut, &mut rng);
        let what = format!("{options}, seed {seed}, cut at {cut} of {}", log.len());
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig
                .open_storage(&Storage::new(data), "read-only=on")
                .await
                .unwrap();
            let report = checked(&handle).await;
            assert_eq!(
                report.corruptions + report.check_errors,
                0,
                "{what}: {:#?}",
                report.findings
            );
            if n == 0 {
                assert_eq!(report.leaks, 0, "{what}: closed cleanly");
            }
            let disk = handle.read(0, size).await.unwrap();
            for block in 0..size / 512 {
                let found = disk[block * 512];
                let uniform = disk[block * 512..][..512].iter().all(|byte| *byte == found);
                let allowed = history.allowed(block, cut);
                assert!(
                    uniform && allowed.contains(&found),
                    "{what}: block {block:#x} holds {found:#x}, may hold {allowed:x?}"
                );
            }
            rig.close(handle).await.unwrap();
        });
    }
    batches
}

#[test]
fn after_a_power_cut_flushed_data_is_there_and_nothing_is_corrupt() {
    let mut batches = 0;
    // Every class of image in every build; more seeds where they cost little.
    let seeds = if cfg!(debug_assertions) { 3 } else { 6 };
    for seed in 0..seeds {
        batches += storm_and_cut("cluster_size=4096", "", 0, seed, 60);
        batches += storm_and_cut("cluster_size=4096,compat=0.10", "", 0, 100 + seed, 40);
        let small = "l2-cache-size=1k,l2-cache-entry-size=512,refcount-cache-size=4k";
        batches += storm_and_cut(
            "cluster_size=512,refcount_bits=64",
            small,
            0,
            200 + seed,
            40,
        );
        // The refcount table is nearly full: it is replaced on the way.
        batches += storm_and_cut(
            "cluster_size=512,refcount_bits=64",
            small,
            1900 << 10,
            300 + seed,
            20,
        );
    }
    assert!(batches > 25, "{batches}");
}

#[test]
fn after_a_power_cut_subclusters_hold_what_was_flushed_and_nothing_is_corrupt() {
    let mut batches = 0;
    let seeds = if cfg!(debug_assertions) { 3 } else { 6 };
    for seed in 0..seeds {
        for (n, cluster) in [16 << 10, 32 << 10].into_iter().enumerate() {
            let options = format!("extended_l2=on,cluster_size={cluster}");
            for open in ["", "l2-cache-size=1k,l2-cache-entry-size=512"] {
                let seed = 1000 * (n as u64 + 1) + seed;
                batches += storm_and_cut_clusters(cluster, &options, open, 0, seed, 50);
            }
        }
    }
    assert!(batches > 25, "{batches}");
}
