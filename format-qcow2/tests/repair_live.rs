//! Repairs of an image that is in use: what a guest, a job or a user asks for beside one waits for its end and finds the image whole,
//! however the repair ends.

mod common;

use std::{sync::Arc, time::Duration};

use block_core::{
    BlockHandle, RequestFlags,
    bitmap::NewBitmap,
    driver::Reopen,
    image::{CheckMode, CheckReport, Progress},
    status::StatusFlags,
};
use common::{
    storage::{Fault, Storage},
    *,
};
use format_qcow2::Qcow2Factory;
use futures::{FutureExt, future::BoxFuture, future::join_all};

const CLUSTER: u64 = 4096;
/// What an L2 table maps.
const TABLE: u64 = 2 << 20;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn put64(data: &mut [u8], at: usize, value: u64) {
    data[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn l1_entry(data: &[u8], table: u64) -> usize {
    be64(data, 40) as usize + 8 * table as usize
}

fn l2_entry(data: &[u8], guest: u64) -> usize {
    let table = be64(data, l1_entry(data, guest / TABLE)) & OFFSET;
    table as usize + 8 * (guest % TABLE / CLUSTER) as usize
}

fn host(data: &[u8], guest: u64) -> u64 {
    be64(data, l2_entry(data, guest)) & OFFSET
}

/// Four tables with four clusters each.
fn good() -> Vec<u8> {
    let storage = Storage::new(image_bytes("cluster_size=4096", 4 * TABLE));
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for table in 0..4 {
            let value = 1 + table as u8;
            write(&handle, table * TABLE, 4 * CLUSTER, value)
                .await
                .unwrap();
        }
        rig.close(handle).await.unwrap();
    });
    storage.state.lock().data.clone()
}

/// The second cluster is where the first is; the third is zeroes with a reservation that isn't aligned, which is an error
/// to whoever looks; the third table is the second one.
fn damaged() -> Vec<u8> {
    let mut data = good();
    let first = be64(&data, l2_entry(&data, 0));
    let second = l2_entry(&data, CLUSTER);
    put64(&mut data, second, first);
    let third = l2_entry(&data, 2 * CLUSTER);
    let unaligned = be64(&data, third) | 0x200 | 1;
    put64(&mut data, third, unaligned);
    let (table, other) = (be64(&data, l1_entry(&data, 1)), l1_entry(&data, 2));
    put64(&mut data, other, table);
    data
}

/// What the damaged image holds once it is repaired.
const REPAIRED: [(u64, u8); 7] = [
    (0, 1),
    (CLUSTER, 1),
    (2 * CLUSTER, 0),
    (3 * CLUSTER, 1),
    (TABLE, 2),
    (2 * TABLE, 2),
    (3 * TABLE, 4),
];

async fn byte(handle: &BlockHandle, at: u64) -> u8 {
    handle.read(at, 1).await.unwrap()[0]
}

fn repair(handle: &BlockHandle) -> BoxFuture<'_, block_core::Result<CheckReport>> {
    handle.check(CheckMode::RepairAll, Progress::new()).boxed()
}

/// Polls until something is held back by the storage.
fn until_parked(storage: &Storage, future: &mut BoxFuture<'_, impl Sized>) {
    for _ in 0..5000 {
        assert!(!poll(future), "it ended without being held back");
        if storage.parked() > 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("nothing is held back");
}

/// Polls some more, with time for what goes on in other threads; whether it ended.
fn polled(future: &mut BoxFuture<'_, impl Sized>) -> bool {
    (0..20).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        poll(future)
    })
}

fn incompatible(storage: &Storage) -> u64 {
    be64(&storage.state.lock().data, 72)
}

fn check(storage: &Storage) {
    assert_clean_bytes(&storage.state.lock().data);
}

#[test]
fn what_is_asked_for_beside_a_repair_waits_and_finds_the_image_whole() {
    let storage = Storage::new(damaged());
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let bitmaps = handle.named_bitmaps();
        storage.hold(0..u64::MAX);
        let mut repairing = repair(&handle);
        until_parked(&storage, &mut repairing);
        let bitmap = NewBitmap {
            name: "b".to_owned(),
            persistent: true,
            ..NewBitmap::default()
        };
        let whole = [CLUSTER, 2 * CLUSTER, 2 * TABLE].map(|at| {
            let status = handle.block_status(at, CLUSTER);
            status.map(|status| status.map(drop)).boxed()
        });
        let allocated = handle.is_allocated_above(None, false, 2 * CLUSTER, CLUSTER);
        let mut others: Vec<(&str, BoxFuture<'_, block_core::Result<()>>)> = vec![
            ("allocated", allocated.map(|done| done.map(drop)).boxed()),
            (
                "read",
                handle.read(TABLE, 512).map(|done| done.map(drop)).boxed(),
            ),
            ("write", write(&handle, 3 * CLUSTER, 512, 9).boxed()),
            (
                "allocating write",
                write(&handle, 8 * CLUSTER, CLUSTER, 8).boxed(),
            ),
            (
                "zeroes",
                handle
                    .write_zeroes(TABLE + CLUSTER, CLUSTER, RequestFlags::MAY_UNMAP)
                    .boxed(),
            ),
            (
                "discard",
                handle.discard(2 * TABLE + CLUSTER, CLUSTER).boxed(),
            ),
            ("info", handle.info().map(|done| done.map(drop)).boxed()),
            (
                "list",
                handle.snapshot_list().map(|done| done.map(drop)).boxed(),
            ),
            (
                "bitmap",
                bitmaps.add(bitmap).map(|done| done.map(drop)).boxed(),
            ),
        ];
        others.extend(whole.map(|status| ("status", status)));
        for (what, future) in &mut others {
            assert!(!polled(future), "{what} doesn't wait");
        }
        assert!(!polled(&mut repairing));
        storage.release();
        let all = join_all(others.into_iter().map(|(what, future)| async move {
            future
                .await
                .unwrap_or_else(|error| panic!("{what}: {error}"));
        }));
        let (report, _) = futures::join!(repairing, all);
        let report = report.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
        let zero = handle.block_status(2 * CLUSTER, CLUSTER).await.unwrap();
        assert!(zero.is_zero(), "{zero:?}");
        let data = handle.block_status(2 * TABLE, CLUSTER).await.unwrap();
        assert!(data.flags.contains(StatusFlags::DATA) && !data.is_zero());
        assert_eq!(byte(&handle, 8 * CLUSTER).await, 8);
        assert_eq!(byte(&handle, TABLE + CLUSTER).await, 0);
        assert_eq!(byte(&handle, TABLE + 2 * CLUSTER).await, 2);
        assert_eq!(byte(&handle, 2 * TABLE + CLUSTER).await, 0);
        write(&handle, 0, 512, 7).await.unwrap();
        for (at, value) in REPAIRED {
            let value = match at {
                0 => 7,
                _ if at == 3 * CLUSTER => 9,
                _ => value,
            };
            assert_eq!(byte(&handle, at).await, value, "at {at:#x}");
        }
        assert!(bitmaps.find("b").unwrap().bits().is_dirty(0));
        rig.close(handle).await.unwrap();
    });
    assert_eq!(incompatible(&storage), 0);
    check(&storage);
}

/// The answer would be of tables that the repair moves.
#[test]
fn a_repair_waits_for_whoever_is_asking_where_data_is_dropped_or_not() {
    for dropped in [false, true] {
        let data = damaged();
        let table = l2_entry(&data, 0) as u64;
        let storage = Storage::new(data);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            storage.state.lock().keep_log = true;
            storage.hold_reads(table..table + CLUSTER);
            let mut status = Some(handle.block_status(CLUSTER, CLUSTER).boxed());
            if let Some(status) = &mut status {
                until_parked(&storage, status);
            }
            let mut repairing = repair(&handle);
            assert!(!polled(&mut repairing), "dropped: {dropped}");
            if dropped {
                status = None;
            }
            assert!(!polled(&mut repairing), "dropped: {dropped}");
            assert_eq!(storage.position(), 0, "nothing was written yet");
            storage.release();
            let asking = async {
                if let Some(status) = status {
                    assert!(status.await.unwrap().flags.contains(StatusFlags::DATA));
                }
            };
            let (report, ()) = futures::join!(repairing, asking);
            assert_eq!(report.unwrap().corruptions, 0);
            for (at, value) in REPAIRED {
                assert_eq!(byte(&handle, at).await, value, "at {at:#x}");
            }
            rig.close(handle).await.unwrap();
        });
        check(&storage);
    }
}

/// The driver has told where a cluster is, and the storage is about to be asked what is there. If the cluster could be given a copy
/// and its old place be discarded by the other owner meanwhile, the storage would tell of zeroes.
#[test]
fn nothing_moves_between_the_two_halves_of_a_question() {
    let data = damaged();
    let place = host(&data, CLUSTER);
    let storage = Storage::new(data);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "discard=unmap").await.unwrap();
        storage.hold_status(place..place + CLUSTER);
        let mut status = handle.block_status(CLUSTER, CLUSTER).boxed();
        until_parked(&storage, &mut status);
        let after = async {
            let report = repair(&handle).await.unwrap();
            // The one that stayed where both were.
            handle.discard(0, CLUSTER).await.unwrap();
            handle.flush().await.unwrap();
            handle.flush().await.unwrap();
            report
        };
        let mut after = after.boxed();
        assert!(!polled(&mut after));
        storage.release();
        let (status, report) = futures::join!(status, after);
        let status = status.unwrap();
        assert!(status.flags.contains(StatusFlags::DATA) && !status.is_zero());
        assert_eq!(report.corruptions, 0);
        assert_eq!(byte(&handle, CLUSTER).await, 1);
        rig.close(handle).await.unwrap();
    });
    check(&storage);
}

/// Without the gate somebody meets the damage while it is being repaired. An image that was made good isn't marked as corrupt after
/// that.
#[test]
fn damage_that_was_met_beside_its_repair_leaves_no_corrupt_bit() {
    let storage = Storage::new(damaged());
    let rig = Rig::build(Qcow2Factory::new(), false);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        storage.hold(0..u64::MAX);
        let mut repairing = repair(&handle);
        until_parked(&storage, &mut repairing);
        let mut status = handle.block_status(2 * CLUSTER, CLUSTER).boxed();
        assert!(!polled(&mut status), "it waits to mark the image");
        storage.release();
        let (report, status) = futures::join!(repairing, status);
        assert_eq!(report.unwrap().corruptions, 0);
        assert!(status.is_err(), "it has met the damage");
        write(&handle, 2 * CLUSTER, CLUSTER, 5).await.unwrap();
        assert_eq!(byte(&handle, 2 * CLUSTER).await, 5);
        rig.close(handle).await.unwrap();
    });
    assert_eq!(incompatible(&storage), 0);
    check(&storage);
}

/// Damage that a repair leaves goes on to shut the image.
#[test]
fn damage_that_was_met_beside_a_repair_that_leaves_it_is_marked() {
    let storage = Storage::new({
        let mut data = damaged();
        // A leak for it to repair.
        let leaked = l2_entry(&data, 3 * TABLE);
        put64(&mut data, leaked, 0);
        data
    });
    let rig = Rig::build(Qcow2Factory::new(), false);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        storage.hold(0..u64::MAX);
        let mut repairing = handle
            .check(CheckMode::RepairLeaks, Progress::new())
            .boxed();
        until_parked(&storage, &mut repairing);
        let mut status = handle.block_status(2 * CLUSTER, CLUSTER).boxed();
        assert!(!polled(&mut status), "it waits to mark the image");
        storage.release();
        let (report, status) = futures::join!(repairing, status);
        assert!(report.unwrap().corruptions > 0);
        assert!(status.is_err());
        assert!(write(&handle, 0, CLUSTER, 5).await.is_err());
        assert!(rig.close(handle).await.is_err(), "it can't be flushed");
    });
    assert_eq!(incompatible(&storage), 2, "corrupt");
}

/// Repairs what an interrupted repair left, and looks at all that is there; the guest has written to the last table meanwhile.
fn finish(storage: &Arc<Storage>, what: &str) {
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(storage, "").await.unwrap();
        let report = repair(&handle).await.unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
        for (at, value) in REPAIRED {
            let value = if at == 3 * TABLE { 9 } else { value };
            assert_eq!(byte(&handle, at).await, value, "{what}, at {at:#x}");
        }
        rig.close(handle).await.unwrap();
    });
    check(storage);
}

/// Cut off after each number of polls, with a guest's write waiting behind it: the write goes on, and nothing is lost.
#[test]
fn a_repair_whose_future_is_dropped_at_any_point_holds_nobody_up() {
    within(300, || {
        let data = damaged();
        let (mut polls, mut cut) = (0, 0);
        loop {
            let storage = Storage::new(data.clone());
            let rig = Rig::new();
            let finished = rig.block_on(async {
                let handle = rig.open_storage(&storage, "").await.unwrap();
                storage.set_dawdle(1);
                let mut repairing = repair(&handle);
                let mut finished = polls > 0 && poll(&mut repairing);
                let mut waiting = write(&handle, 3 * TABLE, 512, 9).boxed();
                let mut asking = handle.block_status(TABLE, CLUSTER).boxed();
                let (mut written, mut asked) = (false, false);
                for _ in 1..polls {
                    std::thread::sleep(Duration::from_micros(100));
                    if finished {
                        break;
                    }
                    finished = poll(&mut repairing);
                    written = written || poll(&mut waiting);
                    asked = asked || poll(&mut asking);
                    assert!(finished || polls == 0 || !written, "{polls} polls");
                }
                drop(repairing);
                let write = async {
                    if !written {
                        waiting.await.unwrap();
                    }
                };
                let ask = async {
                    if !asked {
                        assert!(!asking.await.unwrap().is_zero());
                    }
                };
                futures::join!(write, ask);
                assert_eq!(byte(&handle, 3 * TABLE).await, 9);
                storage.set_dawdle(0);
                rig.close(handle).await.unwrap();
                finished
            });
            finish(&storage, &format!("{polls} polls"));
            if finished {
                break;
            }
            cut += 1;
            polls = polls * 6 / 5 + 1;
        }
        assert!(cut > 5, "it was cut off at several points: {cut}");
    });
}

/// Whichever read fails, also one of those after the repair that look at what it has made: nothing is written then that is of the
/// state before.
#[test]
fn a_repair_during_which_a_read_fails_leaves_what_there_was() {
    let data = damaged();
    let (mut failed, mut refused) = (0, 0);
    for read in 0.. {
        let storage = Storage::new(data.clone());
        let rig = Rig::new();
        let over = rig.block_on(async {
            // Otherwise nothing is allocated as long as two tables are one.
            let options = "overlap-check=none";
            let handle = rig.open_storage(&storage, options).await.unwrap();
            // In memory as it was before.
            for at in [0, TABLE, 3 * TABLE] {
                byte(&handle, at).await;
            }
            storage.set_fault(Fault::NthRead(read));
            let report = repair(&handle).await;
            let over = storage.state.lock().fault != Fault::None;
            storage.set_fault(Fault::None);
            failed += u64::from(report.is_err());
            let written = write(&handle, 3 * TABLE, CLUSTER, 9).await;
            refused += u64::from(written.is_err());
            if written.is_err() {
                assert_eq!(byte(&handle, 3 * TABLE).await, 4, "it can be read");
                // What is on disk counts from here on.
                handle.reopen(Reopen::default()).await.unwrap();
                write(&handle, 3 * TABLE, CLUSTER, 9).await.unwrap();
            }
            write(&handle, 3 * TABLE + (64 * CLUSTER), CLUSTER, 6)
                .await
                .unwrap();
            let left = REPAIRED.into_iter().filter(|(at, _)| *at != 2 * CLUSTER);
            for (at, value) in left {
                let value = if at == 3 * TABLE { 9 } else { value };
                assert_eq!(byte(&handle, at).await, value, "read {read}, at {at:#x}");
            }
            rig.close(handle).await.unwrap();
            over
        });
        finish(&storage, &format!("read {read}"));
        if over {
            break;
        }
    }
    assert!(
        failed > 3 && refused > 1,
        "{failed} failed, {refused} refused"
    );
}
