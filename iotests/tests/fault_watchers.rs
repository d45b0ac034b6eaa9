//! `blkverify`, `blklogwrites` and `blkreplay` on simulated storage.

mod fault_world;

use std::sync::Arc;

use block_core::{
    BlockHandle, Environment, ErrorKind, RequestFlags,
    image::{CheckMode, Progress},
};
use fault_world::{PLAIN, close, disk, errno, open, seeded, world};
use iotests::{
    faults::{EntryFlags, WriteLog},
    lab::Lab,
    sim::Order,
    storage::{Choose, Stage},
};

const LEN: usize = 1 << 20;

fn counter(handle: &BlockHandle, name: &str) -> u64 {
    let counters = handle.node().driver().counters();
    let found = counters.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no counter '{name}'")).1
}

const VERIFY: &str = "driver=blkverify,raw.driver=file,raw.filename=raw,\
                      test.driver=qcow2,test.file.driver=file,test.file.filename=test";

async fn two_images(lab: &Lab) {
    let options = block_core::Options::new();
    lab.create("raw", "raw", LEN as u64, &options, None)
        .await
        .unwrap();
    lab.create("qcow2", "test", LEN as u64, &options, None)
        .await
        .unwrap();
}

#[test]
fn blkverify_writes_both_and_finds_nothing_where_nothing_is() {
    let lab = world();
    lab.env.run(async {
        two_images(&lab).await;
        let handle = open(&lab, VERIFY).await.unwrap();
        assert_eq!(handle.length(), LEN as u64);
        handle.write(1000, vec![5; 70000], PLAIN).await.unwrap();
        handle
            .write_zeroes(4096, 8192, RequestFlags::MAY_UNMAP)
            .await
            .unwrap();
        handle.discard(65536, 65536).await.unwrap();
        for at in (0..LEN as u64).step_by(65536) {
            handle.read(at, 65536).await.unwrap();
        }
        handle.flush().await.unwrap();
        assert_eq!(counter(&handle, "blkverify-compared"), 16);
        assert_eq!(counter(&handle, "blkverify-mismatches"), 0);
        close(handle).await.unwrap();
    });
    let raw = lab.disk("raw").unwrap().content().to_bytes();
    assert_eq!(
        (raw[999], raw[1000], raw[4096], raw[12288], raw[71000]),
        (0, 5, 0, 5, 0)
    );
}

#[test]
fn blkverify_fails_and_counts_a_read_that_differs_and_shows_both_sides() {
    let lab = world();
    lab.env.run(async {
        two_images(&lab).await;
        let handle = open(&lab, VERIFY).await.unwrap();
        handle.write(0, vec![5; 4096], PLAIN).await.unwrap();
        let raw = lab.disk("raw").unwrap();
        let mut content = raw.content();
        content.write(1234, &[0xab, 0xcd]);
        raw.restore(content);
        handle.read(0, 1024).await.unwrap();
        let error = handle.read(1024, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(
            error.reason(),
            "blkverify: contents mismatch at offset 1234: \
             raw has ab cd 05 05 05 05 05 05 05 05 05 05 05 05 05 05, \
             test has 05 05 05 05 05 05 05 05 05 05 05 05 05 05 05 05"
        );
        assert_eq!(counter(&handle, "blkverify-mismatches"), 1);
    });
}

#[test]
fn blkverify_takes_a_file_name_and_probes_the_image_to_be_tested() {
    let lab = world();
    lab.env.run(async {
        two_images(&lab).await;
        let node = lab
            .registry
            .open_file(
                &lab.graph,
                "blkverify:raw:test",
                Some("raw"),
                block_core::Options::new(),
                fault_world::how(),
            )
            .await
            .unwrap();
        let verify = node.edges().primary().unwrap().node().clone();
        assert_eq!(verify.driver().name(), "blkverify");
        assert_eq!(verify.edges().primary().unwrap().driver().name(), "qcow2");
        lab.create("raw", "raw", 512, &block_core::Options::new(), None)
            .await
            .unwrap();
        let error = open(
            &lab,
            "driver=blkverify,raw.driver=file,raw.filename=raw,test.driver=file,test.filename=test",
        )
        .await
        .err()
        .unwrap();
        assert!(
            error
                .reason()
                .starts_with("blkverify: the raw image has 512 bytes"),
            "{error}"
        );
    });
}

const LOGGED: &str = "driver=qcow2,file.driver=blklogwrites,file.file.driver=file,file.file.filename=a,\
                      file.log.driver=file,file.log.filename=log";

async fn work(handle: &Arc<BlockHandle>, lab: &Lab) {
    let mut running = Vec::new();
    for n in 0..24u64 {
        let guest = handle.clone();
        running.push(lab.env.start(async move {
            let at = n % 8 * 40000;
            match n % 6 {
                4 => guest.discard(at / 65536 * 65536, 65536).await,
                5 => guest.write_zeroes(at, 70000, RequestFlags::MAY_UNMAP).await,
                3 => guest.flush().await,
                _ => guest.write(at, vec![n as u8 + 1; 50000], PLAIN).await,
            }
        }));
        if n % 8 == 7 {
            for request in running.drain(..) {
                request.await.unwrap();
            }
        }
    }
    handle.flush().await.unwrap();
}

/// Puts the first `count` entries onto an empty disk and checks the image that results.
async fn check_prefix(lab: &Lab, log: &WriteLog, count: usize) -> (u64, u64) {
    let image = log.replay(count, 1 << 30).unwrap();
    disk(lab, "replayed", &image);
    let options = "driver=qcow2,file.driver=file,file.filename=replayed,read-only=on";
    let handle = {
        let options = block_core::Options::from_text(options).unwrap();
        let node = lab
            .registry
            .open(&lab.graph, options, fault_world::how())
            .await
            .unwrap();
        let used = block_core::Permissions::CONSISTENT_READ;
        let set = block_core::PermissionSet::new(used, block_core::Permissions::all());
        lab.graph.attach(&node, set, "check").unwrap()
    };
    let report = handle
        .check(CheckMode::ReadOnly, Progress::new())
        .await
        .unwrap();
    handle.close().await.unwrap();
    (report.corruptions, report.check_errors)
}

#[test]
fn any_prefix_of_a_write_log_replays_to_an_image_that_passes_check() {
    for seed in 0..3 {
        let lab = seeded(seed, Order::Random);
        lab.env.run(async {
            // The log has to begin with an empty file: the image is made through it, too.
            lab.create("raw", "log", 0, &block_core::Options::new(), None)
                .await
                .unwrap();
            let options = block_core::Options::new();
            lab.create("qcow2", "a", LEN as u64, &options, None)
                .await
                .unwrap();
            let made = lab.disk("a").unwrap().content().to_bytes();
            let handle = open(&lab, LOGGED).await.unwrap();
            work(&handle, &lab).await;
            close(handle).await.unwrap();
            let bytes = lab.disk("log").unwrap().content().to_bytes();
            let log = WriteLog::parse(&bytes).unwrap();
            let flushes = log
                .entries
                .iter()
                .filter(|entry| entry.flags == EntryFlags::FLUSH);
            assert!(
                flushes.count() > 2 && log.entries.len() > 30,
                "{}",
                log.entries.len()
            );
            // What was there before goes in front.
            let mut whole = log.clone();
            whole.entries.insert(
                0,
                iotests::faults::LogEntry {
                    sector: 0,
                    sectors: made.len().div_ceil(512) as u64,
                    flags: EntryFlags::empty(),
                    data: {
                        let mut data = made.clone();
                        data.resize(made.len().next_multiple_of(512), 0);
                        data
                    },
                },
            );
            for count in 1..=whole.entries.len() {
                assert_eq!(
                    check_prefix(&lab, &whole, count).await,
                    (0, 0),
                    "{count} entries"
                );
            }
            let end = whole.replay(whole.entries.len(), 1 << 30).unwrap();
            let now = lab.disk("a").unwrap().content().to_bytes();
            let same = end.len().min(now.len());
            assert_eq!(end[..same], now[..same]);
            assert!(
                end[same..]
                    .iter()
                    .chain(&now[same..])
                    .all(|byte| *byte == 0)
            );
        });
    }
}

#[test]
fn a_log_is_appended_to_and_an_older_one_keeps_its_sector_size() {
    let lab = world();
    disk(&lab, "a", &vec![0; LEN]);
    disk(&lab, "log", &[]);
    let base =
        "driver=blklogwrites,file.driver=file,file.filename=a,log.driver=file,log.filename=log";
    lab.env.run(async {
        let handle = open(&lab, &format!("{base},log-sector-size=4096"))
            .await
            .unwrap();
        assert_eq!(handle.limits().request_alignment, 4096);
        handle.write(4096, vec![1; 4096], PLAIN).await.unwrap();
        handle.discard(8192, 4096).await.unwrap();
        close(handle).await.unwrap();
        let handle = open(&lab, &format!("{base},log-append=on")).await.unwrap();
        assert_eq!(handle.limits().request_alignment, 4096);
        handle
            .write(0, vec![2; 8192], RequestFlags::FUA)
            .await
            .unwrap();
        handle.write_zeroes(0, 4096, PLAIN).await.unwrap();
        close(handle).await.unwrap();
        let log = WriteLog::parse(&lab.disk("log").unwrap().content().to_bytes()).unwrap();
        let seen: Vec<_> = log
            .entries
            .iter()
            .filter(|entry| entry.flags != EntryFlags::FLUSH)
            .map(|entry| {
                (
                    entry.sector,
                    entry.sectors,
                    entry.flags,
                    entry.data.first().copied(),
                )
            })
            .collect();
        let fua = EntryFlags::FUA;
        assert_eq!(
            seen,
            [
                (1, 1, EntryFlags::empty(), Some(1)),
                (2, 1, EntryFlags::DISCARD, None),
                (0, 2, fua, Some(2)),
                (0, 1, EntryFlags::empty(), Some(0)),
            ]
        );
        for (options, reason) in [
            ("log-sector-size=1000", "Invalid log sector size 1000"),
            (
                "log-super-update-interval=0",
                "Invalid log superblock update interval 0",
            ),
            (
                "log-append=on,log-sector-size=512",
                "log-append and log-sector-size are mutually exclusive",
            ),
        ] {
            let error = open(&lab, &format!("{base},{options}"))
                .await
                .err()
                .unwrap();
            assert_eq!(error.reason(), reason);
        }
    });
    disk(&lab, "log", &[0; 4096]);
    lab.env.run(async {
        let error = open(&lab, &format!("{base},log-append=on"))
            .await
            .err()
            .unwrap();
        assert_eq!(error.field().unwrap().name, "magic");
    });
}

#[test]
fn the_superblock_counts_entries_that_are_wholly_in_the_log_only() {
    let lab = world();
    disk(&lab, "a", &vec![0; LEN]);
    let storage = disk(&lab, "log", &[]);
    let base =
        "driver=blklogwrites,file.driver=file,file.filename=a,log.driver=file,log.filename=log";
    lab.env.run(async {
        let handle = open(&lab, &format!("{base},log-super-update-interval=1"))
            .await
            .unwrap();
        // The first entry's own write is held back; the second's overtakes it.
        let hold = storage.hold(Choose::writes().within(512..1024), Stage::Before);
        let guest = handle.clone();
        let first = lab
            .env
            .start(async move { guest.write(0, vec![1; 512], PLAIN).await });
        lab.env.idle().await;
        handle.write(512, vec![2; 512], PLAIN).await.unwrap();
        let count = |disk: &iotests::storage::Disk| {
            WriteLog::parse(&disk.content().to_bytes())
                .unwrap()
                .entries
                .len()
        };
        assert_eq!(count(&storage), 0);
        hold.release();
        first.await.unwrap();
        assert_eq!(count(&storage), 2);
    });
}

fn replay_options(mode: &str) -> String {
    format!("driver=blkreplay,image.driver=file,image.filename=a,log=order,mode={mode}")
}

/// Eight reads at once; in which order they complete.
async fn eight_reads(lab: &Lab, handle: &Arc<BlockHandle>) -> Vec<u64> {
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let running: Vec<_> = (0..8u64)
        .map(|n| {
            let (guest, order) = (handle.clone(), order.clone());
            lab.env.start(async move {
                guest
                    .read(n * 4096, 4096)
                    .await
                    .map(|_| order.lock().push(n))
            })
        })
        .collect();
    for request in running {
        request.await.unwrap();
    }
    let order = order.lock().clone();
    order
}

#[test]
fn blkreplay_forces_the_recorded_order_however_long_requests_take() {
    let recorded = |seed| {
        let lab = seeded(seed, Order::Fifo);
        disk(&lab, "a", &vec![7; LEN]).set_jitter(16);
        lab.env.run(async {
            let handle = open(&lab, &replay_options("record")).await.unwrap();
            eight_reads(&lab, &handle).await;
            close(handle).await.unwrap();
            lab.disk("order").unwrap().content().to_bytes()
        })
    };
    let order = recorded(1);
    assert_ne!(
        order,
        recorded(2),
        "requests take equally long, and the test shows nothing"
    );
    let mut held_back = 0;
    for seed in 10..20 {
        let lab = seeded(seed, Order::Fifo);
        disk(&lab, "a", &vec![7; LEN]).set_jitter(16);
        disk(&lab, "order", &order);
        lab.env.run(async {
            // What passes is recorded again, above the node that forces the order.
            let options = "driver=blkreplay,mode=record,log=again,image.driver=blkreplay,image.mode=replay,\
                           image.log=order,image.image.driver=file,image.image.filename=a";
            let handle = open(&lab, options).await.unwrap();
            let inner = handle.node().edges().primary().unwrap().node().clone();
            eight_reads(&lab, &handle).await;
            close(handle).await.unwrap();
            let counters = inner.driver().counters();
            held_back += counters[0].1;
            assert_eq!(counters[1], ("blkreplay-left", 0));
        });
        let again = lab.disk("again").unwrap().content().to_bytes();
        assert_eq!(
            String::from_utf8_lossy(&again),
            String::from_utf8_lossy(&order),
            "seed {seed}"
        );
    }
    assert!(held_back > 10, "nobody was held back: {held_back}");
}

#[test]
fn blkreplay_completes_one_request_at_a_time_in_the_recorded_order() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    disk(
        &lab,
        "order",
        b"read 8192 4096\nread 0 4096\nread 4096 4096\n",
    );
    lab.env.run(async {
        let handle = open(&lab, &replay_options("replay")).await.unwrap();
        let start = |at: u64| {
            let guest = handle.clone();
            lab.env
                .start(async move { guest.read(at, 4096).await.map(drop) })
        };
        let (first, second) = (start(0), start(4096));
        lab.env.idle().await;
        assert!(!first.is_done() && !second.is_done());
        start(8192).await.unwrap();
        first.await.unwrap();
        second.await.unwrap();
        let error = handle.read(0, 4096).await.unwrap_err();
        assert_eq!(
            error.reason(),
            "blkreplay: 'read 0 4096' isn't in the rest of the recorded order"
        );
    });
}

#[test]
fn blkreplay_gives_up_on_a_request_that_never_comes() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    disk(&lab, "order", b"read 8192 4096\nread 0 4096\n");
    lab.env.run(async {
        let handle = open(&lab, &format!("{},timeout-ms=300", replay_options("replay")))
            .await
            .unwrap();
        let begun = lab.env.now();
        let error = handle.read(0, 4096).await.unwrap_err();
        assert_eq!((lab.env.now() - begun).as_millis(), 300);
        assert_eq!(
            error.reason(),
            "blkreplay: 'read 0 4096' waited in vain for 'read 8192 4096', which was recorded before it"
        );
        // Nothing was lost by that.
        handle.read(8192, 4096).await.unwrap();
        handle.read(0, 4096).await.unwrap();
    });
}

#[test]
fn an_order_that_cant_be_read_is_refused_by_line() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    disk(&lab, "order", b"read 0 512\nbogus\n");
    lab.env.run(async {
        let error = open(&lab, &replay_options("replay")).await.err().unwrap();
        assert_eq!(error.field().unwrap().name, "line 2");
        assert_eq!(error.file(), Some("order"));
        let error = open(&lab, &replay_options("bogus")).await.err().unwrap();
        assert_eq!(errno::<()>(&Err(error)), 22);
    });
}
