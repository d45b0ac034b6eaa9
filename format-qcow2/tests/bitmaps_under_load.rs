//! Bitmaps while guests write: every byte that was written is recorded, and nothing gets lost between clears, merges,
//! switches and stores that go on meanwhile.

mod bitmap_files;
mod common;

use block_core::{
    BlockHandle, RequestFlags,
    bitmap::{DirtyBitmap, NewBitmap},
};
use common::{storage::Storage, *};
use futures::{FutureExt, future::join_all};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::sync::atomic::{AtomicBool, Ordering};

const DISK: u64 = 32 << 20;
const TASKS: u64 = 6;

/// One guest: random requests of all kinds all over the disk; notes every range when its request has ended.
async fn guest(handle: &BlockHandle, seed: u64, steps: u32, done: &Mutex<Vec<(u64, u64)>>) {
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..steps {
        let at = rng.random_range(0..DISK / 512) * 512;
        let len = (rng.random_range(1..=128u64) * 512).min(DISK - at);
        let result = match rng.random_range(0..8) {
            0 => handle.write_zeroes(at, len, RequestFlags::MAY_UNMAP).await,
            1 => handle.write_zeroes(at, len, RequestFlags::empty()).await,
            2 => handle.discard(at, len).await,
            3 => {
                // A request that is dropped is recorded if it was carried out: its data tells.
                let request = handle.write(at, vec![3; len as usize], RequestFlags::empty());
                drop(Box::pin(request).now_or_never());
                continue;
            }
            _ => {
                handle
                    .write(at, vec![4; len as usize], RequestFlags::empty())
                    .await
            }
        };
        result.unwrap();
        done.lock().push((at, len));
        if rng.random_bool(0.05) {
            handle.flush().await.unwrap();
        }
    }
}

fn lacks(bitmap: &DirtyBitmap, ranges: &[(u64, u64)]) -> Option<(u64, u64)> {
    let granularity = bitmap.granularity();
    ranges.iter().copied().find(|(at, len)| {
        (at / granularity..(at + len).div_ceil(granularity))
            .any(|granule| !bitmap.is_dirty(granule * granularity))
    })
}

#[test]
fn nothing_that_was_written_is_lost_between_clears_merges_and_stores() {
    for seed in 0..3 {
        let storage = Storage::new(image_bytes("cluster_size=64k", DISK));
        storage.set_dawdle(6);
        let rig = Rig::new();
        let done = Mutex::new(Vec::new());
        let ended = AtomicBool::new(false);
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let bitmaps = handle.named_bitmaps();
            let new = |name: &str, granularity| {
                NewBitmap::named(name)
                    .persistent()
                    .with_granularity(granularity)
            };
            for (name, granularity) in [("all", 4096), ("fine", 512), ("coarse", 1 << 20)] {
                bitmaps.add(new(name, granularity)).await.unwrap();
            }
            let guests = join_all((0..TASKS).map(|task| {
                let (handle, done) = (&handle, &done);
                guest(handle, seed * 100 + task, 150, done)
            }));
            let guests = async {
                guests.await;
                ended.store(true, Ordering::SeqCst);
            };
            // What a backup does: takes what is dirty into another bitmap, again and again.
            let taker = async {
                let taken = new("taken", 512);
                bitmaps.add(taken).await.unwrap();
                bitmaps.disable("taken").unwrap();
                let mut rounds = 0u32;
                while !ended.load(Ordering::SeqCst) {
                    let source = bitmaps.find("fine").unwrap();
                    while let Some((at, len)) = source.bits().next_dirty(0, 1 << 20) {
                        source.bits().clear(at, len);
                        bitmaps.find("taken").unwrap().bits().set(at, len);
                    }
                    rounds += 1;
                    match rounds % 5 {
                        0 => bitmaps.store().await.unwrap(),
                        1 => bitmaps
                            .merge("coarse", &[(handle.node(), "fine".into())])
                            .unwrap(),
                        2 => {
                            bitmaps.add(new("passing", 65536)).await.unwrap();
                            bitmaps.remove("passing").await.unwrap();
                        }
                        _ => handle.flush().await.unwrap(),
                    }
                }
                rounds
            };
            let ((), rounds) = futures::join!(guests, taker);
            assert!(rounds > 5, "{rounds} rounds while guests wrote");
            let node = handle.node();
            // It waits for what was dropped and goes on: that is recorded when it ends.
            handle.flush().await.unwrap();
            bitmaps.merge("taken", &[(node, "fine".into())]).unwrap();
            let disk = handle.read(0, DISK as usize).await.unwrap();
            let mut done = done.lock().clone();
            // The disk was empty.
            done.extend(
                (0..DISK / 512)
                    .map(|sector| (sector * 512, 512))
                    .filter(|(at, len)| {
                        let (at, end) = (*at as usize, (*at + *len) as usize);
                        disk[at..end].iter().any(|byte| *byte != 0)
                    }),
            );
            assert!(done.len() > 400, "{}", done.len());
            for name in ["all", "taken"] {
                let bitmap = bitmaps.find(name).unwrap();
                assert_eq!(lacks(bitmap.bits(), &done), None, "{name}, seed {seed}");
            }
            rig.close(handle).await.unwrap();
        });
        let data = storage.state.lock().data.clone();
        let found = bitmap_files::stored(&data);
        let names: Vec<&str> = found.iter().map(|bitmap| bitmap.name.as_str()).collect();
        assert_eq!(names, ["all", "fine", "coarse", "taken"]);
        for (at, len) in done.lock().iter() {
            for granule in at / 4096..(at + len).div_ceil(4096) {
                assert!(
                    found[0].bits[granule as usize],
                    "seed {seed}: {granule} isn't stored"
                );
            }
        }
        assert_clean_bytes(&data);
    }
}

#[test]
fn a_bitmap_that_is_enabled_under_load_records_all_that_begins_later_and_one_that_is_disabled_nothing()
 {
    let storage = Storage::new(image_bytes("cluster_size=4k", DISK));
    storage.set_dawdle(6);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let bitmaps = handle.named_bitmaps();
        let mut new = NewBitmap::named("b").with_granularity(512);
        new.disabled = true;
        bitmaps.add(new).await.unwrap();
        let (before, after) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
        join_all((0..4).map(|task| guest(&handle, task, 60, &before))).await;
        let bitmap = bitmaps.find("b").unwrap();
        assert_eq!(bitmap.info().count, 0);
        let early = join_all((0..3).map(|task| guest(&handle, 10 + task, 60, &before)));
        let late = async {
            handle.flush().await.unwrap();
            bitmaps.enable("b").unwrap();
            join_all((0..3).map(|task| guest(&handle, 20 + task, 60, &after))).await;
        };
        futures::join!(early, late);
        assert_eq!(lacks(bitmap.bits(), &after.lock()), None);
        handle.flush().await.unwrap();
        bitmaps.disable("b").unwrap();
        let count = bitmap.info().count;
        join_all((0..3).map(|task| guest(&handle, 30 + task, 30, &before))).await;
        assert_eq!(bitmap.info().count, count);
        rig.close(handle).await.unwrap();
    });
}
