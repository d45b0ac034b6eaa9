//! The driver's own options of a node: what they do, at open and changed by a reopen.

mod common;

use std::{sync::Arc, time::Duration};

use block_core::{BlockHandle, Environment, RequestFlags, driver::Reopen};
use common::{storage::Event, *};

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 65536;

async fn reopen(handle: &BlockHandle, text: &str) -> block_core::Result<()> {
    let options = block_core::Options::from_dotted(text)?.0;
    let changes = Reopen {
        read_only: None,
        options,
    };
    handle.reopen(changes).await
}

/// Ranges that were punched since the last call.
fn punched(storage: &storage::Storage) -> u64 {
    let mut state = storage.state.lock();
    std::mem::take(&mut state.log)
        .iter()
        .map(|event| match event {
            Event::Zero(_, len) => *len,
            _ => 0,
        })
        .sum()
}

#[test]
fn the_pass_discard_options_decide_what_is_punched() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("cluster_size=64k", SIZE));
    storage.state.lock().keep_log = true;
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for (options, expected) in [
            ("pass-discard-request=on", 4 * CLUSTER),
            ("pass-discard-request=off", 0),
            ("pass-discard-request=on,discard=ignore", 0),
            ("discard=unmap", 4 * CLUSTER),
        ] {
            reopen(&handle, options).await.unwrap();
            write(&handle, 0, 4 * CLUSTER, 1).await.unwrap();
            handle.flush().await.unwrap();
            punched(&storage);
            handle.discard(0, 4 * CLUSTER).await.unwrap();
            handle.flush().await.unwrap();
            assert_eq!(punched(&storage), expected, "{options}");
        }
        rig.close(handle).await.unwrap();
        // Where the node doesn't discard, the driver doesn't either.
        let handle = rig.open_storage(&storage, "discard=ignore").await.unwrap();
        reopen(&handle, "discard=unmap").await.unwrap();
        write(&handle, 0, 4 * CLUSTER, 1).await.unwrap();
        handle.flush().await.unwrap();
        handle.discard(0, 4 * CLUSTER).await.unwrap();
        punched(&storage);
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn with_discard_no_unref_a_discarded_cluster_keeps_its_place() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("cluster_size=64k", SIZE));
    storage.state.lock().keep_log = true;
    rig.block_on(async {
        let handle = rig
            .open_storage(&storage, "discard-no-unref=on")
            .await
            .unwrap();
        write(&handle, 0, 8 * CLUSTER, 1).await.unwrap();
        handle.flush().await.unwrap();
        let allocated = counter(&handle, "clusters-allocated");
        punched(&storage);
        handle.discard(0, 2 * CLUSTER).await.unwrap();
        let unmap = RequestFlags::MAY_UNMAP;
        handle
            .write_zeroes(2 * CLUSTER, 2 * CLUSTER, unmap)
            .await
            .unwrap();
        assert_eq!(punched(&storage), 4 * CLUSTER);
        let read = handle.read(0, 8 * CLUSTER as usize).await.unwrap();
        let (zeroes, ones) = read.split_at(4 * CLUSTER as usize);
        assert!(zeroes.iter().all(|byte| *byte == 0) && ones.iter().all(|byte| *byte == 1));
        // It is written to again where it was; what is around the write stays zero.
        write(&handle, 1000, 512, 5).await.unwrap();
        write(&handle, CLUSTER, CLUSTER, 6).await.unwrap();
        assert_eq!(counter(&handle, "clusters-allocated"), allocated);
        assert_eq!(counter(&handle, "clusters-freed"), 0);
        let read = handle.read(0, 2 * CLUSTER as usize).await.unwrap();
        assert!(read[1000..1512].iter().all(|byte| *byte == 5));
        assert!(read[..1000].iter().all(|byte| *byte == 0));
        assert!(read[CLUSTER as usize..].iter().all(|byte| *byte == 6));
        reopen(&handle, "discard-no-unref=off").await.unwrap();
        handle.discard(0, 8 * CLUSTER).await.unwrap();
        handle.flush().await.unwrap();
        assert_eq!(counter(&handle, "clusters-freed"), 8);
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn detected_zeroes_are_zero_writes_and_unmap_when_they_are_told_to() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("cluster_size=64k", SIZE));
    rig.block_on(async {
        let handle = rig
            .open_storage(&storage, "detect-zeroes=on")
            .await
            .unwrap();
        write(&handle, 0, 4 * CLUSTER, 1).await.unwrap();
        let allocated = counter(&handle, "clusters-allocated");
        write(&handle, 8 * CLUSTER, 4 * CLUSTER, 0).await.unwrap();
        write(&handle, 0, 2 * CLUSTER, 0).await.unwrap();
        handle.flush().await.unwrap();
        assert_eq!(counter(&handle, "clusters-allocated"), allocated);
        assert_eq!(counter(&handle, "clusters-freed"), 0, "space is kept");
        reopen(&handle, "detect-zeroes=unmap").await.unwrap();
        write(&handle, 0, 4 * CLUSTER, 0).await.unwrap();
        handle.flush().await.unwrap();
        assert_eq!(counter(&handle, "clusters-freed"), 4);
        let error = reopen(&handle, "discard=ignore").await.unwrap_err();
        assert!(error.to_string().contains("detect-zeroes"), "{error}");
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn a_wrong_option_changes_nothing_and_another_slice_size_keeps_what_is_there() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("cluster_size=4096", SIZE));
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let mut oracle = Oracle::new(vec![0; SIZE as usize], 7, 4096);
        for (round, options) in [
            "l2-cache-entry-size=512,l2-cache-size=2k",
            "l2-cache-entry-size=4096,refcount-cache-size=16k",
            "l2-cache-size=8k",
            "overlap-check=none",
            "overlap-check=all,l2-cache-entry-size=1024",
            "lazy-refcounts=on,l2-cache-entry-size=512",
        ]
        .into_iter()
        .enumerate()
        {
            for _ in 0..100 {
                oracle.step(&handle).await.unwrap();
            }
            let wrong = ["l2-cache-entry-size=1000", "overlap-check=x", "nonsense=1"][round % 3];
            let both = format!("pass-discard-other=on,{wrong}");
            reopen(&handle, &both).await.unwrap_err();
            reopen(&handle, options).await.unwrap();
            oracle.verify(&handle).await.unwrap();
        }
        for _ in 0..100 {
            oracle.step(&handle).await.unwrap();
        }
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn unused_cache_entries_are_dropped_but_never_dirty_ones() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("cluster_size=4096", SIZE));
    let wait = || std::thread::sleep(Duration::from_millis(2600));
    rig.block_on(async {
        let options = "cache-clean-interval=1,l2-cache-entry-size=512";
        let handle = rig.open_storage(&storage, options).await.unwrap();
        write(&handle, 0, SIZE / 2, 3).await.unwrap();
        wait();
        assert_eq!(
            counter(&handle, "cleaned-cache-entries"),
            0,
            "all are dirty"
        );
        handle.flush().await.unwrap();
        wait();
        let cleaned = counter(&handle, "cleaned-cache-entries");
        assert!(cleaned >= 8, "{cleaned}");
        let read = handle.read(0, SIZE as usize / 2).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 3));
        reopen(&handle, "cache-clean-interval=0").await.unwrap();
        let cleaned = counter(&handle, "cleaned-cache-entries");
        wait();
        assert_eq!(counter(&handle, "cleaned-cache-entries"), cleaned);
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// An environment whose seconds are short, and which remembers what was waited for.
struct Hasty {
    inner: env_tokio::EnvTokio,
    upkeep: bool,
    slept: parking_lot::Mutex<Vec<u64>>,
}

impl Environment for Hasty {
    fn now(&self) -> Duration {
        self.inner.now()
    }
    fn sleep(&self, duration: Duration) -> futures::future::BoxFuture<'static, ()> {
        self.slept.lock().push(duration.as_secs());
        self.inner.sleep(duration / 20_000)
    }
    fn allows_upkeep(&self) -> bool {
        self.upkeep
    }
    fn spawn(&self, task: futures::future::BoxFuture<'static, ()>) {
        self.inner.spawn(task);
    }
    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        self.inner.offload(work);
    }
    fn random(&self) -> u64 {
        self.inner.random()
    }
}

#[test]
fn caches_are_cleaned_every_ten_minutes_unless_the_environment_has_no_timers_for_that() {
    for upkeep in [true, false] {
        let env = Arc::new(Hasty {
            inner: env_tokio::EnvTokio::new(2).unwrap(),
            upkeep,
            slept: parking_lot::Mutex::default(),
        });
        let mut rig = Rig::new();
        rig.graph = block_core::Graph::new(env.clone());
        let storage = storage::Storage::new(image_bytes("cluster_size=4k", 64 << 20));
        rig.block_on(async {
            let handle = rig
                .open_storage(&storage, "l2-cache-entry-size=512")
                .await
                .unwrap();
            for n in 0..16u64 {
                write(&handle, n << 20, 4096, 1).await.unwrap();
            }
            handle.flush().await.unwrap();
            let mut cleaned = 0;
            for _ in 0..100 {
                env.inner.sleep(Duration::from_millis(10)).await;
                cleaned = counter(&handle, "cleaned-cache-entries");
                if cleaned >= 16 {
                    break;
                }
            }
            assert_eq!(cleaned >= 16, upkeep, "{cleaned}");
            rig.close(handle).await.unwrap();
        });
        let slept = env.slept.lock();
        assert_eq!(slept.first(), upkeep.then_some(&600));
        assert!(slept.iter().all(|seconds| *seconds == 600), "{slept:?}");
    }
}
