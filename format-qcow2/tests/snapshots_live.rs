//! Snapshots taken while a guest writes: each is the disk at one moment, with all that had completed, whatever was in flight.

mod common;

use std::sync::Arc;

use block_core::{BlockHandle, RequestFlags, SnapshotKey, image::Progress, status::StatusFlags};
use common::{storage::Storage, *};
use format_qcow2::Qcow2Factory;
use futures::{FutureExt, future::BoxFuture, future::join_all};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};

const CLUSTER: u64 = 65536;

async fn byte(handle: &BlockHandle, at: u64) -> u8 {
    handle.read(at, 1).await.unwrap()[0]
}

fn snapshot_byte(storage: &Arc<Storage>, name: &str, at: u64) -> u8 {
    let data = storage.state.lock().data.clone();
    let rig = Rig::new();
    rig.block_on(async {
        let options = format!("read-only=on,snapshot-name={name}");
        let handle = rig
            .open_storage(&Storage::new(data), &options)
            .await
            .unwrap();
        let found = byte(&handle, at).await;
        rig.close(handle).await.unwrap();
        found
    })
}

fn check(storage: &Storage) {
    assert_clean_bytes(&storage.state.lock().data);
}

/// A write in place stands at the storage while a snapshot is taken and another write to the cluster arrives.
/// `polls`: the first write's future is dropped after so many polls, `None` for never.
fn parked_write(polls: Option<usize>, snapshot_dropped: bool) {
    let storage = Storage::new(image_bytes("cluster_size=65536", 1 << 20));
    let rig = Rig::new();
    let what = format!("dropped after {polls:?} polls, snapshot dropped: {snapshot_dropped}");
    let (expected, taken) = rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, CLUSTER, 1).await.unwrap();
        handle.flush().await.unwrap();
        let host = {
            let state = storage.state.lock();
            let at = state.data.chunks(512).position(|block| block == [1; 512]);
            at.unwrap() as u64 * 512
        };
        storage.hold(host..host + CLUSTER);
        // In place, in the second half of the cluster.
        let mut first: Option<BoxFuture<'_, _>> =
            Some(write(&handle, CLUSTER / 2, 4096, 2).boxed());
        for _ in 0..polls.unwrap_or(8) {
            if let Some(future) = &mut first {
                assert!(!poll(future), "{what}: held back");
            }
        }
        if polls.is_some() {
            first = None;
        }
        let begun = storage.parked() > 0;
        let mut taking = Some(handle.snapshot_create(named("s"), Progress::new()).boxed());
        let mut second = Some(write(&handle, 0, 4096, 3).boxed());
        for _ in 0..50 {
            let taken = taking.as_mut().is_some_and(poll);
            let written = second.as_mut().is_some_and(poll);
            assert!(
                !begun || !(taken || written),
                "{what}: both wait for the first"
            );
            if taken {
                taking = None;
            }
            if written {
                second = None;
            }
        }
        storage.release();
        if snapshot_dropped {
            taking = None;
        }
        // All at once: an unpolled future may hold what another waits for.
        let first = async move {
            match first {
                Some(first) => first.await,
                None => Ok(()),
            }
        };
        let taking = async move {
            match taking {
                Some(taking) => taking.await.map(drop),
                None => Ok(()),
            }
        };
        let second = async move {
            match second {
                Some(second) => second.await,
                None => Ok(()),
            }
        };
        let (first, taking, second) = futures::join!(first, taking, second);
        first.unwrap();
        taking.unwrap();
        second.unwrap();
        handle.flush().await.unwrap();
        let expected = if begun { 2 } else { 1 };
        assert_eq!(
            byte(&handle, CLUSTER / 2).await,
            expected,
            "{what}: the first write is there"
        );
        assert_eq!(byte(&handle, 0).await, 3, "{what}: and the second");
        let taken = !handle.snapshot_list().await.unwrap().is_empty();
        rig.close(handle).await.unwrap();
        (expected, taken)
    });
    assert!(taken || snapshot_dropped, "{what}");
    if taken {
        assert_eq!(
            snapshot_byte(&storage, "s", CLUSTER / 2),
            expected,
            "{what}"
        );
        // Dropped requests are waited for before the snapshot's turn is taken: the second write may come first.
        let front = snapshot_byte(&storage, "s", 0);
        assert!(
            front == 1 || front == 3 && polls.is_some(),
            "{what}: {front}"
        );
    }
    check(&storage);
}

#[test]
fn a_write_in_place_that_is_in_flight_is_in_the_snapshot_and_on_the_disk() {
    parked_write(None, false);
    for polls in 0..6 {
        parked_write(Some(polls), false);
    }
    parked_write(None, true);
}

/// Cuts the future of an operation off after each number of polls: it has happened as a whole or not at all, and the disk goes on.
#[test]
fn a_snapshot_operation_whose_future_is_dropped_at_any_point_is_whole() {
    for operation in 0..3 {
        let mut polls = 0;
        loop {
            let storage = Storage::new(image_bytes("cluster_size=4096", 256 << 10));
            let rig = Rig::new();
            let finished = rig.block_on(async {
                let handle = rig.open_storage(&storage, "").await.unwrap();
                write(&handle, 0, 128 << 10, 1).await.unwrap();
                handle
                    .snapshot_create(named("a"), Progress::new())
                    .await
                    .unwrap();
                write(&handle, 0, 64 << 10, 2).await.unwrap();
                storage.set_dawdle(1);
                let key = SnapshotKey::Name("a".into());
                let mut future: BoxFuture<'_, _> = match operation {
                    0 => handle
                        .snapshot_create(named("b"), Progress::new())
                        .map(drop)
                        .boxed(),
                    1 => handle
                        .snapshot_apply(key, Progress::new())
                        .map(drop)
                        .boxed(),
                    _ => handle
                        .snapshot_delete(key, Progress::new())
                        .map(drop)
                        .boxed(),
                };
                let finished = (0..polls).any(|_| poll(&mut future));
                drop(future);
                write(&handle, 0, 4096, 3).await.unwrap();
                let (names, middle) = {
                    let listed = handle.snapshot_list().await.unwrap();
                    (listed.len(), byte(&handle, 32 << 10).await)
                };
                let whole = match operation {
                    0 => matches!((names, middle), (1 | 2, 2)),
                    1 => matches!((names, middle), (1, 1 | 2)),
                    _ => matches!((names, middle), (0 | 1, 2)),
                };
                assert!(
                    whole,
                    "operation {operation}, {polls} polls: {names} snapshots, {middle}"
                );
                assert_eq!(byte(&handle, 0).await, 3);
                rig.close(handle).await.unwrap();
                finished
            });
            check(&storage);
            if finished {
                assert!(polls > 5, "it was cut off at several points");
                break;
            }
            polls = polls * 5 / 4 + 1;
        }
    }
}

/// The L2 tables that a snapshot operation replaces are given back while it goes on, and block status is asked for meanwhile:
/// it must not take what a freed table's place reads as for the table.
#[test]
fn block_status_beside_a_snapshot_operation_never_loses_data() {
    // Without the gate, which makes it wait, the driver's own order has to do.
    for (seed, gate) in (0..8).map(|n| (n / 2, n % 2 == 0)) {
        let storage = Storage::new(image_bytes("cluster_size=512", 256 << 10));
        let rig = Rig::build(Qcow2Factory::new(), gate);
        let asked = rig.block_on(async {
            // One slice of eight tables in memory: the others are read again and again.
            let handle = rig
                .open_storage(&storage, "l2-cache-size=512")
                .await
                .unwrap();
            write(&handle, 0, 256 << 10, 1).await.unwrap();
            storage.set_dawdle(2 + seed);
            let over = std::cell::Cell::new(false);
            let changes = async {
                for _ in 0..3 {
                    handle
                        .snapshot_create(named("a"), Progress::new())
                        .await
                        .unwrap();
                    for table in 0..8 {
                        write(&handle, table << 15, 512, 2).await.unwrap();
                    }
                    let key = SnapshotKey::Name("a".into());
                    handle.snapshot_delete(key, Progress::new()).await.unwrap();
                }
                over.set(true);
            };
            let asking = async {
                let mut asked = 0;
                while !over.get() {
                    for table in 0..8_u64 {
                        let status = handle.block_status((table << 15) + 4096, 4096).await;
                        let status = status.unwrap();
                        assert!(
                            status.flags.contains(StatusFlags::DATA) && !status.is_zero(),
                            "seed {seed}, table {table}: {status:?}"
                        );
                        asked += 1;
                    }
                }
                asked
            };
            let ((), asked) = futures::join!(changes, asking);
            storage.set_dawdle(0);
            rig.close(handle).await.unwrap();
            asked
        });
        check(&storage);
        let least = if gate { 16 } else { 100 };
        assert!(asked > least, "status was asked for all the time: {asked}");
    }
}

#[derive(Clone, Copy)]
struct Version {
    value: u8,
    begun: u64,
    ended: u64,
}

/// What happened to each block of 4 KiB, by a clock of events.
struct History {
    clock: u64,
    blocks: Vec<Vec<Version>>,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// What a snapshot may hold that was asked for at `begun` and was there at `ended`: what the last write before left, or any
    /// that ran beside it.
    fn allowed(&self, block: usize, begun: u64, ended: u64) -> Vec<u8> {
        let versions = &self.blocks[block];
        let settled = versions.iter().rposition(|version| version.ended < begun);
        let mut allowed = vec![settled.map_or(0, |n| versions[n].value)];
        for version in &versions[settled.map_or(0, |n| n + 1)..] {
            if version.begun < ended {
                allowed.push(version.value);
            }
        }
        allowed
    }
}

const BLOCK: usize = 4096;
const BLOCKS: usize = 256;
const TASKS: usize = 4;

/// Each task owns a quarter of the blocks.
async fn guest(
    handle: &BlockHandle,
    history: &Mutex<History>,
    task: usize,
    seed: u64,
    cluster: usize,
) {
    let mut rng = SmallRng::seed_from_u64(seed * 10 + task as u64);
    let own = BLOCKS / TASKS;
    for _ in 0..150 {
        let first = rng.random_range(0..own);
        let count = rng.random_range(1..=8).min(own - first);
        let (at, len) = ((task * own + first) * BLOCK, count * BLOCK);
        let mut kind = rng.random_range(0..10);
        if kind > 7 && (at % cluster != 0 || len % cluster != 0) {
            // Discards change whole clusters only.
            kind = 0;
        }
        let value = if kind < 6 {
            rng.random_range(1..=255)
        } else {
            0
        };
        let begun = history.lock().tick();
        let (at64, len64) = (at as u64, len as u64);
        match kind {
            0..6 => write(handle, at64, len64, value).await,
            6 => {
                handle
                    .write_zeroes(at64, len64, RequestFlags::empty())
                    .await
            }
            7 => {
                handle
                    .write_zeroes(at64, len64, RequestFlags::MAY_UNMAP)
                    .await
            }
            _ => handle.discard(at64, len64).await,
        }
        .unwrap();
        {
            let mut history = history.lock();
            let ended = history.tick();
            for block in at / BLOCK..(at + len) / BLOCK {
                history.blocks[block].push(Version {
                    value,
                    begun,
                    ended,
                });
            }
        }
        if rng.random_bool(0.05) {
            handle.flush().await.unwrap();
        }
    }
}

struct Moment {
    name: String,
    begun: u64,
    ended: u64,
}

async fn taker(handle: &BlockHandle, history: &Mutex<History>, seed: u64) -> Vec<Moment> {
    let mut rng = SmallRng::seed_from_u64(seed + 77);
    let mut moments: Vec<Moment> = Vec::new();
    for n in 0..12 {
        // Some of the guest's requests go by.
        for _ in 0..rng.random_range(1..40) {
            handle.read(0, 512).await.unwrap();
        }
        let name = format!("s{n}");
        let begun = history.lock().tick();
        handle
            .snapshot_create(named(&name), Progress::new())
            .await
            .unwrap();
        let ended = history.lock().tick();
        moments.push(Moment { name, begun, ended });
        if moments.len() > 4 {
            let gone = moments.remove(rng.random_range(0..moments.len()));
            let key = SnapshotKey::Name(gone.name);
            handle.snapshot_delete(key, Progress::new()).await.unwrap();
        }
    }
    moments
}

#[test]
fn a_snapshot_under_guest_load_holds_what_had_completed_and_nothing_that_came_later() {
    for (seed, cluster) in [4096, 65536, 512].into_iter().enumerate() {
        let options = &format!("cluster_size={cluster}");
        let size = (BLOCK * BLOCKS) as u64;
        let storage = Storage::new(image_bytes(options, size));
        storage.set_dawdle(6);
        let history = Mutex::new(History {
            clock: 0,
            blocks: vec![Vec::new(); BLOCKS],
        });
        let rig = Rig::new();
        let moments = rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let guests = join_all(
                (0..TASKS).map(|task| guest(&handle, &history, task, seed as u64, cluster)),
            );
            let (_, moments) = futures::join!(guests, taker(&handle, &history, seed as u64));
            storage.set_dawdle(0);
            rig.close(handle).await.unwrap();
            moments
        });
        check(&storage);
        let history = history.into_inner();
        let data = storage.state.lock().data.clone();
        let mut beside = 0;
        for Moment { name, begun, ended } in moments {
            let rig = Rig::new();
            rig.block_on(async {
                let open = format!("read-only=on,snapshot-name={name}");
                let handle = rig
                    .open_storage(&Storage::new(data.clone()), &open)
                    .await
                    .unwrap();
                let disk = handle.read(0, size as usize).await.unwrap();
                for block in 0..BLOCKS {
                    let bytes = &disk[block * BLOCK..][..BLOCK];
                    let uniform = bytes.iter().all(|byte| *byte == bytes[0]);
                    let allowed = history.allowed(block, begun, ended);
                    beside += usize::from(allowed.len() > 1);
                    assert!(
                        uniform && allowed.contains(&bytes[0]),
                        "{options}, snapshot {name}, block {block}: {:x} is none of {allowed:x?}",
                        bytes[0]
                    );
                }
                rig.close(handle).await.unwrap();
            });
        }
        assert!(beside > 0, "{options}: nothing ran beside any snapshot");
    }
}
