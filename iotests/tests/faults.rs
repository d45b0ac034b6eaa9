//! `blkdebug`, rule by rule, on simulated storage: what its options promise is what happens to requests, and nothing else
//! happens to any.

mod fault_world;

use std::{sync::Arc, time::Duration};

use block_core::{BlockHandle, DebugEvent, Environment, ErrorKind, RequestFlags};
use fault_world::{PLAIN, close, debug, debug_or_error, disk, errno, open, raw_over_debug, world};
use iotests::{
    faults::{Debugger, debugger_below},
    lab::Lab,
    sim::yield_now,
    storage::OpKind,
};

const LEN: usize = 1 << 20;

fn debugger(handle: &BlockHandle) -> Arc<Debugger> {
    debugger_below(&handle.node()).unwrap()
}

/// One request of each kind, in the order read, write, write-zeroes, discard, flush, block-status: what it failed with.
async fn all_kinds(handle: &BlockHandle) -> [i32; 6] {
    let read = errno(&handle.read(0, 512).await);
    let write = errno(&handle.write(0, vec![1; 512], PLAIN).await);
    let zeroes = errno(&handle.write_zeroes(512, 512, PLAIN).await);
    let discard = errno(&handle.discard(1024, 512).await);
    let status = errno(&handle.block_status(0, 512).await);
    // Last: a flush that failed is never tried again.
    let flush = errno(&handle.flush().await);
    [read, write, zeroes, discard, flush, status]
}

fn each(options: &str) -> [i32; 6] {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env
        .run(async { all_kinds(&*debug(&lab, options).await).await })
}

#[test]
fn without_rules_nothing_fails_and_the_bytes_are_the_childs() {
    assert_eq!(each(""), [0; 6]);
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let handle = debug(&lab, "").await;
        assert_eq!(handle.length(), LEN as u64);
        assert_eq!(handle.read(100, 1000).await.unwrap()[..], [7; 1000]);
        handle.write(512, vec![9; 512], PLAIN).await.unwrap();
        assert_eq!(debugger(&handle).injected(), 0);
    });
    assert_eq!(
        lab.disk("a").unwrap().content().to_bytes()[511..514],
        [7, 9, 9]
    );
}

#[test]
fn a_rule_without_iotype_fails_all_but_block_status_and_with_one_it_fails_that_alone() {
    let rule = "inject-error.0.event=none";
    assert_eq!(each(rule), [5, 5, 5, 5, 5, 0]);
    let kinds = [
        "read",
        "write",
        "write-zeroes",
        "discard",
        "flush",
        "block-status",
    ];
    for (index, kind) in kinds.iter().enumerate() {
        let mut expected = [0; 6];
        expected[index] = 5;
        assert_eq!(
            each(&format!("{rule},inject-error.0.iotype={kind}")),
            expected,
            "{kind}"
        );
    }
}

#[test]
fn errno_is_what_the_request_fails_with_and_0_lets_it_pass() {
    let rule = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.errno";
    for number in [1, 28, 110] {
        assert_eq!(each(&format!("{rule}={number}"))[0], number);
    }
    assert_eq!(each(&format!("{rule}=0")), [0; 6]);
}

#[test]
fn once_fails_one_request_and_no_other() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let handle = debug(&lab, "inject-error.0.event=none,inject-error.0.once=on").await;
        assert_eq!(errno(&handle.read(0, 512).await), 5);
        assert_eq!(errno(&handle.read(0, 512).await), 0);
        assert_eq!(debugger(&handle).injected(), 1);
        // And it doesn't come back with its event.
        let rule = "file.inject-error.0.event=read_aio,file.inject-error.0.once=on";
        let handle = raw_over_debug(&lab, rule).await;
        assert_eq!(errno(&handle.read(0, 512).await), 5);
        assert_eq!(errno(&handle.read(0, 512).await), 0);
    });
}

#[test]
fn a_sector_rule_fails_requests_that_touch_the_sector() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let handle = debug(&lab, "inject-error.0.event=none,inject-error.0.sector=4").await;
        assert_eq!(errno(&handle.read(0, 2048).await), 0);
        assert_eq!(errno(&handle.read(1024, 2048).await), 5);
        assert_eq!(errno(&handle.write(2048, vec![1; 512], PLAIN).await), 5);
        assert_eq!(errno(&handle.write(2560, vec![1; 512], PLAIN).await), 0);
        assert_eq!(errno(&handle.flush().await), 0);
    });
}

#[test]
fn an_event_makes_its_rules_active_in_place_of_those_that_were() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        // Reads make writes fail, until a write makes reads fail: so neither does, since each raises its event first.
        let rules = "file.inject-error.0.event=read_aio,file.inject-error.0.iotype=write,\
                     file.inject-error.1.event=write_aio,file.inject-error.1.iotype=read,\
                     file.inject-error.2.event=none,file.inject-error.2.errno=28";
        let handle = raw_over_debug(&lab, rules).await;
        assert_eq!(
            errno(&handle.discard(0, 512).await),
            28,
            "active from the beginning"
        );
        assert_eq!(errno(&handle.read(0, 512).await), 0);
        assert_eq!(errno(&handle.write(0, vec![1; 512], PLAIN).await), 0);
        assert_eq!(errno(&handle.read(0, 512).await), 0);
        assert_eq!(errno(&handle.discard(0, 512).await), 0, "no longer active");
    });
}

#[test]
fn a_rule_stays_active_after_its_event() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let handle = raw_over_debug(&lab, "file.inject-error.0.event=read_aio").await;
        assert_eq!(errno(&handle.write(0, vec![1; 512], PLAIN).await), 0);
        assert_eq!(errno(&handle.read(0, 512).await), 5);
        assert_eq!(errno(&handle.write(0, vec![1; 512], PLAIN).await), 5);
    });
}

#[test]
fn states_follow_each_other_and_rules_see_the_state_from_before_their_event() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let rules = "file.set-state.0.event=read_aio,file.set-state.0.state=1,file.set-state.0.new_state=2,\
                     file.set-state.1.event=read_aio,file.set-state.1.state=2,file.set-state.1.new_state=3,\
                     file.inject-error.0.event=read_aio,file.inject-error.0.state=3,\
                     file.inject-error.0.errno=28";
        let handle = raw_over_debug(&lab, rules).await;
        let debugger = debugger(&handle);
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push((debugger.state(), errno(&handle.read(0, 512).await)));
        }
        assert_eq!(seen, [(1, 0), (2, 0), (3, 28), (3, 28)]);
    });
}

#[test]
fn immediately_fails_before_anything_else_gets_a_turn() {
    for (immediately, polls) in [("off", 2), ("on", 1)] {
        let lab = world();
        disk(&lab, "a", &vec![7; LEN]);
        lab.env.run(async {
            let rule = "inject-error.0.event=none,inject-error.0.immediately";
            let handle = debug(&lab, &format!("{rule}={immediately}")).await;
            let mut read = std::pin::pin!(handle.read(0, 512));
            let mut count = 0;
            let result = futures::future::poll_fn(|cx| {
                count += 1;
                read.as_mut().poll(cx)
            })
            .await;
            assert_eq!((errno(&result), count), (5, polls));
        });
        assert_eq!(lab.disk("a").unwrap().count(OpKind::Read), 0);
    }
}

#[test]
fn a_rules_file_does_what_the_same_options_do() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    let text = "[set-state]\nevent = \"write_aio\"\nnew_state = \"2\"\n\n[inject-error]\nevent = \"read_aio\"\n\
                state = \"2\"\nerrno = \"28\"\nonce = \"on\"\n";
    disk(&lab, "rules.conf", text.as_bytes());
    lab.env.run(async {
        let node = lab
            .registry
            .open_file(
                &lab.graph,
                "blkdebug:rules.conf:a",
                Some("raw"),
                block_core::Options::new(),
                fault_world::how(),
            )
            .await
            .unwrap();
        let handle = lab.attach(&node, "").unwrap();
        assert_eq!(errno(&handle.read(0, 512).await), 0);
        assert_eq!(errno(&handle.write(0, vec![1; 512], PLAIN).await), 0);
        assert_eq!(errno(&handle.read(0, 512).await), 28);
        assert_eq!(errno(&handle.read(0, 512).await), 0);
    });
}

#[test]
fn what_is_wrong_with_the_options_is_said() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    disk(&lab, "bad.conf", b"[inject-error]\nevent = \"nope\"\n");
    let cases = [
        ("inject-error.0.errno=5", "Missing event name for rule"),
        ("inject-error.0.event=nope", "invalid parameter value: nope"),
        (
            "inject-error.0.event=none,inject-error.0.iotype=foo",
            "invalid parameter value: foo",
        ),
        ("bogus=1", "Invalid parameter 'bogus'"),
        ("align=3", "Cannot meet constraints with align 3"),
        (
            "align=4096,max-transfer=5000",
            "Cannot meet constraints with max-transfer 5000",
        ),
        (
            "align=512,opt-discard=1000",
            "Cannot meet constraints with opt-discard 1000",
        ),
        (
            "opt-write-zero=4096,max-write-zero=6144",
            "Cannot meet constraints with max-write-zero 6144",
        ),
        (
            "take-child-perms.0=foo",
            "Parameter 'take-child-perms' does not accept value 'foo'",
        ),
        (
            "inject-fault.0.kind=bit-flip,inject-fault.0.iotype=flush",
            "A fault of this kind can't happen to 'flush' requests",
        ),
        (
            "config=missing",
            "Could not read blkdebug config file: No such file or directory",
        ),
        ("config=bad.conf", "invalid parameter value: nope"),
    ];
    lab.env.run(async {
        for (options, reason) in cases {
            let error = debug_or_error(&lab, options).await.err().unwrap();
            assert_eq!(error.reason(), reason, "{options}");
        }
        let error = open(&lab, "driver=blkdebug").await.err().unwrap();
        assert_eq!(
            error.reason(),
            "A block device must be specified for \"image\""
        );
        assert_eq!(lab.graph.nodes().len(), 0, "nothing is left open");
    });
}

/// What reached the disk since `position`, as kind, offset and length.
fn arrived(lab: &Lab, position: usize) -> Vec<(OpKind, u64, u64)> {
    let disk = lab.disk("a").unwrap();
    let log = disk.log_since(position);
    log.iter()
        .map(|entry| (entry.op.kind, entry.op.offset, entry.op.len))
        .collect()
}

#[test]
fn limits_that_are_overridden_pad_and_split_requests() {
    use OpKind::{Discard, Read, Write, WriteZeroes};
    let lab = world();
    let storage = disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let limits = "align=4096,max-transfer=8192,opt-write-zero=16384,max-write-zero=32768,\
                      opt-discard=16384,max-discard=16384";
        let handle = debug(&lab, limits).await;
        assert_eq!(handle.limits().request_alignment, 4096);

        let at = storage.log_position();
        assert_eq!(handle.read(100, 10).await.unwrap()[..], [7; 10]);
        assert_eq!(arrived(&lab, at), [(Read, 0, 4096)]);

        let at = storage.log_position();
        handle.write(4096, vec![1; 20480], PLAIN).await.unwrap();
        assert_eq!(
            arrived(&lab, at),
            [
                (Write, 4096, 8192),
                (Write, 12288, 8192),
                (Write, 20480, 4096)
            ]
        );

        let at = storage.log_position();
        handle.write(5000, vec![2; 10], PLAIN).await.unwrap();
        assert_eq!(arrived(&lab, at), [(Read, 4096, 4096), (Write, 4096, 4096)]);

        let at = storage.log_position();
        handle.write_zeroes(8192, 65536, PLAIN).await.unwrap();
        assert_eq!(
            arrived(&lab, at),
            [
                (WriteZeroes, 8192, 8192),
                (WriteZeroes, 16384, 32768),
                (WriteZeroes, 49152, 16384),
                (WriteZeroes, 65536, 8192)
            ]
        );

        let at = storage.log_position();
        handle.discard(16384, 32768).await.unwrap();
        assert_eq!(
            arrived(&lab, at),
            [(Discard, 16384, 16384), (Discard, 32768, 16384)]
        );
    });
    let bytes = storage.content().to_bytes();
    assert_eq!(bytes[4999..5011], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]);
}

#[test]
fn the_last_block_of_a_short_file_reads_as_zeroes_beyond_the_end_when_the_alignment_is_larger() {
    let lab = world();
    disk(&lab, "a", &[7; 5000]);
    lab.env.run(async {
        let handle = open(
            &lab,
            "driver=raw,file.driver=blkdebug,file.align=4096,file.image.driver=file,file.image.filename=a",
        )
        .await
        .unwrap();
        assert_eq!(handle.read(4990, 10).await.unwrap()[..], [7; 10]);
    });
}

#[test]
fn a_delay_holds_a_request_back_for_its_time() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let rule =
            "inject-fault.0.kind=delay,inject-fault.0.delay-ms=250,inject-fault.0.iotype=write";
        let handle = debug(&lab, rule).await;
        let begun = lab.env.now();
        handle.read(0, 512).await.unwrap();
        assert_eq!(lab.env.now() - begun, Duration::ZERO);
        handle.write(0, vec![1; 512], PLAIN).await.unwrap();
        assert_eq!(lab.env.now() - begun, Duration::from_millis(250));
    });
}

#[test]
fn a_torn_write_leaves_its_first_sectors_and_tells_or_not() {
    for (more, expected) in [
        ("", 5),
        (",inject-fault.0.errno=0", 0),
        (",inject-fault.0.errno=28", 28),
    ] {
        let lab = world();
        let storage = disk(&lab, "a", &vec![7; LEN]);
        lab.env.run(async {
            let rule =
                "inject-fault.0.kind=torn-write,inject-fault.0.sectors=3,inject-fault.0.once=on";
            let handle = debug(&lab, &format!("{rule}{more}")).await;
            assert_eq!(
                errno(&handle.write(0, vec![1; 4096], PLAIN).await),
                expected
            );
            handle.write(8192, vec![2; 4096], PLAIN).await.unwrap();
        });
        let bytes = storage.content().to_bytes();
        assert_eq!((bytes[1535], bytes[1536], bytes[4095]), (1, 7, 7));
        assert_eq!((bytes[8192], bytes[12287]), (2, 2), "only once");
    }
}

#[test]
fn a_torn_zero_write_zeroes_its_first_sectors() {
    let lab = world();
    let storage = disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let rule = "inject-fault.0.kind=torn-write,inject-fault.0.sectors=1";
        let handle = debug(&lab, rule).await;
        assert_eq!(errno(&handle.write_zeroes(0, 4096, PLAIN).await), 5);
    });
    assert_eq!(storage.content().to_bytes()[511..513], [0, 7]);
}

#[test]
fn a_flipped_bit_is_the_one_that_was_named_and_the_disk_keeps_its_own_on_reads() {
    let lab = world();
    let storage = disk(&lab, "a", &vec![0; LEN]);
    lab.env.run(async {
        let rule = "inject-fault.0.kind=bit-flip,inject-fault.0.sector=2,inject-fault.0.bit=11";
        let handle = debug(&lab, &format!("{rule},inject-fault.0.iotype=read")).await;
        let bytes = handle.read(512, 2048).await.unwrap();
        let changed: Vec<usize> = (0..2048).filter(|at| bytes[*at] != 0).collect();
        assert_eq!((changed, bytes[513]), (vec![513], 8));
        assert_eq!(handle.read(0, 512).await.unwrap()[..], [0; 512]);
        assert!(storage.content().to_bytes().iter().all(|byte| *byte == 0));
        let handle = debug(&lab, &format!("{rule},inject-fault.0.iotype=write")).await;
        handle.write(0, vec![0xff; 4096], PLAIN).await.unwrap();
    });
    let bytes = storage.content().to_bytes();
    assert_eq!((bytes[1024], bytes[1025], bytes[1026]), (0xff, 0xf7, 0xff));
    assert_eq!(
        bytes[..4096].iter().filter(|byte| **byte != 0xff).count(),
        1
    );
}

#[test]
fn a_short_read_fails_or_ends_in_zeroes() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let rule = "inject-fault.0.kind=short-read,inject-fault.0.sectors=2";
        let handle = debug(&lab, rule).await;
        assert_eq!(errno(&handle.read(0, 4096).await), 5);
        let handle = debug(&lab, &format!("{rule},inject-fault.0.errno=0")).await;
        let bytes = handle.read(0, 4096).await.unwrap();
        assert_eq!((bytes[1023], bytes[1024], bytes[4095]), (7, 0, 0));
        assert_eq!(errno(&handle.write(0, vec![1; 512], PLAIN).await), 0);
    });
}

async fn qcow2(lab: &Lab) -> Arc<BlockHandle> {
    let options = block_core::Options::new().with("cluster_size", 65536);
    lab.create("qcow2", "a", 4 << 20, &options, None)
        .await
        .unwrap();
    open(
        lab,
        "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=a",
    )
    .await
    .unwrap()
}

#[test]
fn a_request_stops_at_a_breakpoint_and_goes_on_when_it_is_resumed() {
    let lab = world();
    lab.env.run(async {
        let handle = qcow2(&lab).await;
        let debugger = debugger(&handle);
        assert_eq!(
            debugger.set_breakpoint("bogus", "A").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        debugger.set_breakpoint("write_aio", "A").unwrap();
        let writer = handle.clone();
        let write = lab
            .env
            .start(async move { writer.write(0, vec![1; 65536], PLAIN).await });
        debugger.wait_suspended("A").await;
        assert!(debugger.is_suspended("A") && !write.is_done());
        // A breakpoint stops one request: the next passes.
        handle.write(65536, vec![2; 65536], PLAIN).await.unwrap();
        assert!(debugger.is_suspended("A") && !write.is_done());
        assert_eq!(
            debugger.resume("B").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        debugger.resume("A").unwrap();
        write.await.unwrap();
        assert!(debugger.resume("A").is_err());
        assert_eq!(handle.read(0, 512).await.unwrap()[..], [1; 512]);
    });
}

#[test]
fn two_breakpoints_on_an_event_stop_one_request_twice() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let handle = raw_over_debug(&lab, "node-name=top").await;
        let debugger = debugger(&handle);
        debugger.set_breakpoint("read_aio", "A").unwrap();
        debugger.set_breakpoint("read_aio", "B").unwrap();
        let reader = handle.clone();
        let read = lab
            .env
            .start(async move { reader.read(0, 512).await.map(drop) });
        lab.env.idle().await;
        debugger.resume("A").unwrap();
        lab.env.idle().await;
        assert!(!read.is_done() && debugger.is_suspended("B"));
        debugger.resume("B").unwrap();
        read.await.unwrap();
    });
}

#[test]
fn removing_a_breakpoint_resumes_who_stands_there() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let handle = raw_over_debug(&lab, "node-name=top").await;
        let debugger = debugger(&handle);
        debugger.set_breakpoint("read_aio", "A").unwrap();
        debugger.remove_breakpoint("A").unwrap();
        handle.read(0, 512).await.unwrap();
        debugger.set_breakpoint("read_aio", "A").unwrap();
        let reader = handle.clone();
        let read = lab
            .env
            .start(async move { reader.read(0, 512).await.map(drop) });
        debugger.wait_suspended("A").await;
        assert!(
            debugger.remove_breakpoint("A").is_err(),
            "it was spent already"
        );
        read.await.unwrap();
    });
}

#[test]
fn a_request_that_is_dropped_at_a_breakpoint_goes_on_when_it_is_resumed_and_close_resumes_all() {
    let lab = world();
    lab.env.run(async {
        let handle = qcow2(&lab).await;
        let debugger = debugger(&handle);
        debugger.set_breakpoint("write_aio", "A").unwrap();
        {
            let mut write = std::pin::pin!(handle.write(0, vec![1; 65536], PLAIN));
            while !debugger.is_suspended("A") {
                assert!(futures::poll!(&mut write).is_pending());
                yield_now().await;
            }
        }
        let flusher = handle.clone();
        let flush = lab.env.start(async move { flusher.flush().await });
        lab.env.idle().await;
        assert!(!flush.is_done(), "a flush waits for what was dropped");
        debugger.resume_all();
        flush.await.unwrap();
        assert_eq!(handle.read(0, 512).await.unwrap()[..], [1; 512]);
        close(handle).await.unwrap();
    });
}

/// The classic: a write in place is parked, its cluster is freed, another write takes it, the first write lands.
fn race(
    discard: fn(Arc<BlockHandle>) -> futures::future::BoxFuture<'static, block_core::Result<()>>,
) {
    let lab = world();
    lab.env.run(async {
        let handle = qcow2(&lab).await;
        let debugger = debugger(&handle);
        handle.write(0, vec![1; 65536], PLAIN).await.unwrap();
        debugger.set_breakpoint("write_aio", "A").unwrap();
        let writer = handle.clone();
        let first = lab
            .env
            .start(async move { writer.write(0, vec![2; 65536], PLAIN).await });
        debugger.wait_suspended("A").await;
        let freed = lab.env.start(discard(handle.clone()));
        lab.env.idle().await;
        assert!(!freed.is_done(), "it waits at the gate");
        handle.write(65536, vec![3; 65536], PLAIN).await.unwrap();
        debugger.resume("A").unwrap();
        first.await.unwrap();
        freed.await.unwrap();
        assert_eq!(handle.read(65536, 65536).await.unwrap()[..], [3; 65536]);
        assert_eq!(handle.read(0, 512).await.unwrap()[..], [0; 512]);
        let report = handle
            .check(
                block_core::image::CheckMode::ReadOnly,
                block_core::image::Progress::new(),
            )
            .await
            .unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
    });
}

#[test]
fn a_discard_waits_for_a_write_that_stands_at_a_breakpoint() {
    race(|handle| Box::pin(async move { handle.discard(0, 65536).await }));
}

#[test]
fn an_unmapping_zero_write_waits_for_a_write_that_stands_at_a_breakpoint() {
    race(|handle| {
        Box::pin(async move { handle.write_zeroes(0, 65536, RequestFlags::MAY_UNMAP).await })
    });
}

/// The events that a script of requests raises in a format, found by stopping at each.
async fn raised(lab: &Lab, options: &str, create: &str) -> Vec<&'static str> {
    let mut found = Vec::new();
    for event in DebugEvent::ALL {
        lab.create("raw", "base", 4 << 20, &block_core::Options::new(), None)
            .await
            .unwrap();
        let create = block_core::Options::from_dotted(create).unwrap();
        lab.create("qcow2", "a", 4 << 20, &create, Some(("base", "raw")))
            .await
            .unwrap();
        let before = format!(
            "{options},file.inject-error.0.event={event},file.inject-error.0.sector=99999999"
        );
        let handle = match open(lab, &before).await {
            Ok(handle) => handle,
            Err(error) => panic!("{event}: {error}"),
        };
        let debugger = debugger(&handle);
        debugger.set_breakpoint(event.name(), "A").unwrap();
        let guest = handle.clone();
        // Far enough that the refcount table has to grow, which takes its time.
        let grows = ["_grow", "_write_blocks", "_write_table", "_switch_table"];
        let grows = grows.iter().any(|part| event.name().contains(part));
        let length = if grows { 12 << 30 } else { 8 << 20 };
        let script = lab.env.start(async move {
            guest.write(1000, vec![1; 100], PLAIN).await?;
            guest.read(1000, 100).await?;
            guest.read(1 << 20, 512).await?;
            guest
                .write(2 << 20, vec![1; 65536], RequestFlags::WRITE_COMPRESSED)
                .await?;
            guest.read(2 << 20, 512).await?;
            guest.write_zeroes(65536, 65536, PLAIN).await?;
            guest.flush().await?;
            guest.discard(0, 65536).await?;
            guest
                .readv(3 << 20, block_core::IoBufMut::new(), PLAIN)
                .await?;
            let (_lent, buf) = block_core::Buffer::new(512).lend();
            guest
                .readv(3 << 20, buf, RequestFlags::COPY_ON_READ)
                .await?;
            guest
                .truncate(length, block_core::driver::Truncate::default())
                .await?;
            guest.make_empty().await?;
            guest.flush().await
        });
        lab.env.idle().await;
        if debugger.is_suspended("A") {
            found.push(event.name());
            assert!(!script.is_done());
        }
        debugger.resume_all();
        script
            .await
            .unwrap_or_else(|error| panic!("{event}: {error}"));
        close(handle).await.unwrap();
    }
    found
}

#[test]
fn qcow2_and_the_core_raise_the_events_that_the_manual_lists() {
    let lab = world();
    let options = "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=a";
    let found = lab
        .env
        .run(raised(&lab, options, "cluster_size=512,refcount_bits=64"));
    let expected = [
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l2_load",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_write",
        "read_aio",
        "read_backing_aio",
        "read_compressed",
        "write_aio",
        "write_compressed",
        "cow_read",
        "cow_write",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_free",
        "flush_to_os",
        "flush_to_disk",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "empty_image_prepare",
        "cor_write",
    ];
    assert_eq!(found, expected);
}

#[test]
fn padding_raises_its_events_at_the_node_that_pads() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        for (offset, len, events) in [
            (
                100,
                1000,
                vec!["pwritev_rmw_head", "pwritev_rmw_after_head"],
            ),
            (100, 20000, vec!["pwritev_rmw_head", "pwritev_rmw_tail"]),
            (
                4096,
                100,
                vec!["pwritev_rmw_tail", "pwritev_rmw_after_tail"],
            ),
        ] {
            for event in events {
                let handle = raw_over_debug(&lab, "file.align=4096").await;
                let debugger = debugger(&handle);
                debugger.set_breakpoint(event, "A").unwrap();
                let guest = handle.clone();
                let write = lab
                    .env
                    .start(async move { guest.write(offset, vec![1; len], PLAIN).await });
                lab.env.idle().await;
                assert!(debugger.is_suspended("A"), "{event}");
                debugger.resume("A").unwrap();
                write.await.unwrap();
                close(handle).await.unwrap();
            }
        }
    });
}

#[test]
fn a_node_knows_at_once_when_a_listener_comes_below_it_and_when_it_goes() {
    let lab = world();
    disk(&lab, "a", &vec![7; LEN]);
    lab.env.run(async {
        let options = "driver=raw,file.driver=raw,file.file.driver=file,file.file.node-name=storage,file.file.filename=a";
        let handle = open(&lab, options).await.unwrap();
        let top = handle.node();
        assert!(!top.is_debugged());
        let options = block_core::Options::from_text("driver=blkdebug,image=storage").unwrap();
        let filter = lab
            .registry
            .open(&lab.graph, options, fault_world::how())
            .await
            .unwrap();
        lab.graph.keep(&filter);
        lab.graph.insert_filter(&filter).await.unwrap();
        assert!(top.is_debugged(), "two levels below");
        assert!(!filter.is_debugged(), "its own child doesn't listen");
        let debugger = debugger(&handle);
        debugger.set_breakpoint("read_aio", "A").unwrap();
        let guest = handle.clone();
        let read = lab.env.start(async move { guest.read(0, 512).await.map(drop) });
        debugger.wait_suspended("A").await;
        debugger.resume("A").unwrap();
        read.await.unwrap();
        lab.graph.remove_filter(&filter).await.unwrap();
        assert!(!top.is_debugged());
        debugger.set_breakpoint("read_aio", "A").unwrap();
        handle.read(0, 512).await.unwrap();
    });
}
