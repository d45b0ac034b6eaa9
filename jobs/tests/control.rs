//! What users do to jobs: verbs, refusals, errors, transactions; and that nothing of a job is left behind.

mod common;

use std::sync::Arc;

use block_core::{Error, ErrorKind, Permissions, Result};
use common::{
    Bench, GUEST, LENGTH, Layer, assert_same,
    guest::Guest,
    mem::{CLUSTER, What},
    run,
};
use futures::StreamExt;
use jobs::{
    BackupOptions, CommitOptions, CompletionMode, CopyMode, IoStatus, Job, JobEvent, JobOptions,
    JobStatus, MirrorOptions, OnCbwError, OnError, StreamOptions, Transaction,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, message: &str) {
    let error: Error = result.expect_err("a refusal");
    assert_eq!(error.reason(), message);
}

async fn two_disks(bench: &Bench) -> (Vec<Layer>, Layer, Vec<u8>) {
    let (chain, content) = bench.chain(&["base", "top"]).await;
    let target = bench.layer("target", LENGTH, None);
    (chain, target, content)
}

fn options(id: &str) -> JobOptions {
    JobOptions {
        id: Some(id.to_owned()),
        ..JobOptions::default()
    }
}

/// A mirror that is slow enough to be caught at work.
async fn slow_mirror(bench: &Bench, chain: &[Layer], target: &Layer) -> Arc<Job> {
    let mut mirror = MirrorOptions::new(&chain[1].node, &target.node);
    mirror.job = options("slow");
    mirror.job.speed = 64 << 10;
    bench.manager.mirror(mirror).await.expect("a mirror")
}

#[test]
fn what_is_asked_for_wrongly_is_refused_in_qemus_words_and_changes_nothing() {
    run(|bench| async move {
        let (chain, target, _) = two_disks(&bench).await;
        let short = bench.layer("short", LENGTH / 2, None);
        let (top, base) = (&chain[1].node, &chain[0].node);
        let manager = &bench.manager;
        let before = format!("{:?}", bench.graph);
        refused(
            manager.mirror(MirrorOptions::new(top, top)).await,
            "Can't mirror node into itself",
        );
        refused(
            manager.mirror(MirrorOptions::new(top, &short.node)).await,
            "Source and target image have different sizes",
        );
        refused(
            manager.mirror(MirrorOptions::new(base, &target.node)).await,
            "Need a root block node",
        );
        let mut mirror = MirrorOptions::new(top, &target.node);
        mirror.granularity = Some(1000);
        refused(
            manager.mirror(mirror).await,
            "Parameter 'granularity' expects a power of 2",
        );
        refused(
            manager.backup(BackupOptions::new(top, top)).await,
            "Source and target cannot be the same",
        );
        refused(
            manager.backup(BackupOptions::new(top, &short.node)).await,
            "Source and target image have different sizes",
        );
        let mut backup = BackupOptions::new(top, &target.node);
        backup.compress = true;
        refused(
            manager.backup(backup).await,
            "Compression is not supported for this drive target",
        );
        refused(
            manager.commit(CommitOptions::new(top).base(top)).await,
            "cannot commit an image into itself",
        );
        refused(
            manager
                .commit(CommitOptions::new(top).base(&target.node))
                .await,
            "'target' is not in this backing file chain",
        );
        refused(
            manager.commit(CommitOptions::new(base)).await,
            "There is no backimg image",
        );
        let mut commit = CommitOptions::new(top);
        commit.backing_file = Some("x".into());
        refused(
            manager.commit(commit).await,
            "'backing-file' specified, but 'top' is the active layer",
        );
        refused(
            manager
                .stream(StreamOptions::new(top).base(&target.node))
                .await,
            "Node 'target' is not a backing image of 'top'",
        );
        let mut stream = StreamOptions::new(top);
        stream.backing_file = Some("x".into());
        refused(
            manager.stream(stream).await,
            "backing file specified, but streaming the entire chain",
        );
        let mut stream = StreamOptions::new(top);
        stream.job = options("0bad");
        refused(manager.stream(stream).await, "Invalid job ID '0bad'");
        refused(manager.job("nobody"), "Job not found");
        assert_eq!(format!("{:?}", bench.graph), before);
        assert!(manager.jobs().is_empty());
    });
}

#[test]
fn a_node_that_a_job_works_on_is_busy_for_other_jobs_and_its_chain_is_frozen() {
    run(|bench| async move {
        let (chain, _) = bench.chain(&["A", "B", "C", "D"]).await;
        let _guest = bench.guest_handle(&chain[3].node);
        let mut commit = CommitOptions::new(&chain[3].node)
            .top(&chain[2].node)
            .base(&chain[0].node);
        commit.job = options("j0");
        commit.job.speed = 1;
        let job = bench.manager.commit(commit).await.expect("a commit");
        refused(
            bench
                .manager
                .stream(StreamOptions::new(&chain[3].node))
                .await,
            "Node 'C' is busy: block device is in use by block job: commit",
        );
        refused(
            bench.graph.set_backing(&chain[1].node, None).await,
            "Cannot change frozen 'backing' link from 'B' to 'A': in use by block job: commit",
        );
        let mut same = StreamOptions::new(&chain[3].node);
        same.job = options("j0");
        refused(
            bench.manager.stream(same).await,
            "Job ID 'j0' already in use",
        );
        let reader = bench.graph.attach(
            &chain[1].node,
            block_core::PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all()),
            "",
        );
        let error = reader.expect_err("an intermediate layer is no disk now");
        assert!(
            error
                .reason()
                .starts_with("Permission conflict on node 'B': permissions 'consistent read'"),
            "{error}"
        );
        job.cancel(true).expect("it runs");
        job.wait().await.expect_err("cancelled");
        assert_eq!(bench.names(), ["A", "B", "C", "D"]);
        bench
            .graph
            .set_backing(&chain[1].node, Some(&chain[0].node))
            .await
            .expect("it is frozen no more");
    });
}

#[test]
fn the_filter_of_a_job_is_no_disk_for_another_one_until_it_is_gone() {
    run(|bench| async move {
        let (chain, target, _) = two_disks(&bench).await;
        let job = slow_mirror(&bench, &chain, &target).await;
        assert!(job.wait_status(JobStatus::Running).await);
        let top = chain.last().expect("a chain");
        let filter = bench.graph.parents(&top.node).pop().expect("a filter");
        let second = bench.layer("second", target.node.length(), None);
        bench.graph.keep(&second.node);
        let busy = format!(
            "Node '{}' is busy: block device is in use by block job: mirror",
            filter.name()
        );
        let mirror = MirrorOptions::new(&filter, &second.node);
        refused(bench.manager.mirror(mirror).await, &busy);
        let backup = BackupOptions::new(&filter, &second.node);
        refused(bench.manager.backup(backup).await, &busy);
        job.cancel(true).expect("it runs");
        job.wait().await.expect_err("cancelled");
        let mut backup = BackupOptions::new(&top.node, &second.node);
        backup.job = options("slow-backup");
        backup.job.speed = 64 << 10;
        let job = bench.manager.backup(backup).await.expect("a backup");
        let filter = bench.graph.parents(&top.node).pop().expect("a filter");
        let busy = format!(
            "Node '{}' is busy: block device is in use by block job: backup",
            filter.name()
        );
        let mirror = MirrorOptions::new(&filter, &target.node);
        refused(bench.manager.mirror(mirror).await, &busy);
        job.cancel(true).expect("it runs");
        job.wait().await.expect_err("cancelled");
    });
}

#[test]
fn a_layer_with_a_writer_of_its_own_is_not_committed_together_with_what_is_above_it() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["A", "B", "C", "D"]).await;
        let writer = bench
            .graph
            .attach(
                &chain[2].node,
                block_core::PermissionSet::new(Permissions::WRITE, Permissions::all()),
                "writer",
            )
            .expect("a handle");
        let commit = CommitOptions::new(&chain[3].node)
            .top(&chain[2].node)
            .base(&chain[0].node);
        refused(bench.manager.commit(commit).await, "Need a root block node");
        drop(writer);
        assert_eq!(bench.names(), ["A", "B", "C", "D"]);
        let found = bench.content(&chain[3].node).await;
        assert_same(&found, &content, "the topmost layer");
    });
}

#[test]
fn verbs_are_refused_where_the_state_forbids_them() {
    run(|bench| async move {
        let (chain, target, _) = two_disks(&bench).await;
        let job = slow_mirror(&bench, &chain, &target).await;
        assert!(job.wait_status(JobStatus::Running).await);
        refused(
            job.complete(),
            "Job 'slow' in state 'running' cannot accept command verb 'complete'",
        );
        refused(
            job.finalize(),
            "Job 'slow' in state 'running' cannot accept command verb 'finalize'",
        );
        refused(
            job.dismiss(),
            "Job 'slow' in state 'running' cannot accept command verb 'dismiss'",
        );
        refused(job.resume(), "Can't resume a job that was not paused");
        job.pause().expect("it runs");
        assert!(job.wait_status(JobStatus::Paused).await);
        refused(job.pause(), "Job is already paused");
        assert!(job.info().paused);
        job.cancel(true).expect("a paused job can be cancelled");
        let error = job.wait().await.expect_err("cancelled");
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(bench.names(), ["base", "top", "target"]);
    });
}

#[test]
fn a_paused_job_has_nothing_in_flight_and_a_resumed_one_completes() {
    run(|bench| async move {
        let (chain, target, content) = two_disks(&bench).await;
        let handle = bench.guest_handle(&chain[1].node);
        let mut mirror = MirrorOptions::new(&chain[1].node, &target.node);
        mirror.granularity = Some(4096);
        let job = bench.manager.mirror(mirror).await.expect("a mirror");
        let guest = Guest::start(&bench.graph, &handle, content, 4);
        let mut random = SmallRng::seed_from_u64(7);
        for _ in 0..8 {
            bench.sleep(random.random_range(0..4)).await;
            job.pause().expect("it is at work");
            while !matches!(job.status(), JobStatus::Paused | JobStatus::Standby) {
                bench.sleep(1).await;
            }
            let idle = target.node.stats().snapshot();
            assert_eq!(target.node.tracker().in_flight(), 0);
            guest.work(&bench.graph, 10).await;
            assert_eq!(target.node.stats().snapshot(), idle, "nothing is copied");
            job.resume().expect("it is paused");
        }
        job.wait_ready().await.expect("ready");
        job.complete().expect("it is ready");
        job.wait().await.expect("success");
        let expected = guest.stop().await;
        assert_same(&bench.content(&target.node).await, &expected, "the disk");
    });
}

#[test]
fn a_job_that_is_cancelled_at_a_random_moment_leaves_the_guest_and_the_graph_as_they_were() {
    for seed in 0..12 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["A", "B", "C", "D"]).await;
            let target = bench.layer("target", LENGTH, None);
            let handle = bench.guest_handle(&chain[3].node);
            let guest = Guest::start(&bench.graph, &handle, content, seed);
            let mut random = SmallRng::seed_from_u64(seed);
            let top = &chain[3].node;
            let manager = &bench.manager;
            let mut mirror = MirrorOptions::new(top, &target.node);
            if seed & 8 != 0 {
                mirror.copy_mode = CopyMode::WriteBlocking;
            }
            let commit = CommitOptions::new(top)
                .top(&chain[2].node)
                .base(&chain[0].node);
            let job = match seed % 5 {
                0 => manager.mirror(mirror).await,
                1 => manager.commit(CommitOptions::new(top)).await,
                2 => manager.commit(commit).await,
                3 => manager.stream(StreamOptions::new(top)).await,
                _ => manager.backup(BackupOptions::new(top, &target.node)).await,
            };
            let job = job.expect("a job");
            bench.sleep(random.random_range(0..3)).await;
            let cancelled = job.cancel(true).is_ok();
            let result = job.wait().await;
            guest.work(&bench.graph, 30).await;
            let expected = guest.stop().await;
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &expected, "the guest's disk");
            assert_eq!(handle.node().name(), "D");
            if cancelled && result.is_err() {
                assert_eq!(bench.names(), ["A", "B", "C", "D", "target"]);
            }
            for layer in &chain {
                assert!(layer.node.bitmaps().is_empty(), "no bitmap is left");
            }
        });
    }
}

#[test]
fn the_speed_limit_can_be_changed_while_a_job_is_at_work() {
    run(|bench| async move {
        let (chain, target, _) = two_disks(&bench).await;
        let job = slow_mirror(&bench, &chain, &target).await;
        bench.sleep(150).await;
        let info = job.info();
        assert_eq!(info.speed, 64 << 10);
        assert_eq!(info.status, JobStatus::Running);
        assert!(job.counters().bytes_copied < LENGTH / 2, "{info:?}");
        job.set_speed(0).expect("it runs");
        job.wait_ready().await.expect("ready");
        job.cancel(false).expect("it is ready");
        job.wait().await.expect("a soft cancel is a success");
    });
}

#[test]
fn a_failing_target_ends_a_job_under_report() {
    run(|bench| async move {
        let (chain, target, content) = two_disks(&bench).await;
        let handle = bench.guest_handle(&chain[1].node);
        let guest = Guest::start(&bench.graph, &handle, content, 4);
        let mut events = bench.manager.subscribe();
        target
            .mem
            .fail(What::Write, 0, LENGTH, ErrorKind::Io, u64::MAX);
        let mirror = MirrorOptions::new(&chain[1].node, &target.node);
        let job = bench.manager.mirror(mirror).await.expect("a mirror");
        let error = job.wait().await.expect_err("it failed");
        assert_eq!(error.reason(), "Input/output error");
        assert_eq!(error.node(), Some("target"));
        guest.work(&bench.graph, 10).await;
        guest.stop().await;
        assert_eq!(bench.names(), ["base", "top", "target"]);
        let mut seen = Vec::new();
        while let Some(event) = events.next().await {
            let last = matches!(&event, JobEvent::StatusChange { status, .. } if *status == JobStatus::Null);
            seen.push(serde_json::to_value(&event).expect("JSON"));
            if last {
                break;
            }
        }
        let text = serde_json::to_string(&seen).expect("JSON");
        assert!(
            text.contains(r#"{"event":"BLOCK_JOB_ERROR","data":{"device":"top","operation":"write","action":"report"}}"#),
            "{text}"
        );
        assert!(text.contains(r#""error":"Input/output error""#), "{text}");
    });
}

#[test]
fn a_full_target_stops_a_job_until_it_is_resumed() {
    run(|bench| async move {
        let (chain, target, content) = two_disks(&bench).await;
        let handle = bench.guest_handle(&chain[1].node);
        let guest = Guest::start(&bench.graph, &handle, content, 4);
        let far = LENGTH / 2;
        target
            .mem
            .fail(What::Write, far, LENGTH, ErrorKind::NoSpace, u64::MAX);
        let mut mirror = MirrorOptions::new(&chain[1].node, &target.node);
        mirror.on_target_error = OnError::Enospc;
        let job = bench.manager.mirror(mirror).await.expect("a mirror");
        assert!(job.wait_status(JobStatus::Paused).await);
        assert_eq!(job.info().io_status, IoStatus::Nospace);
        guest.work(&bench.graph, 10).await;
        target.mem.heal();
        job.resume().expect("it is paused");
        assert_eq!(job.info().io_status, IoStatus::Ok);
        job.wait_ready().await.expect("ready");
        job.complete().expect("it is ready");
        job.wait().await.expect("success");
        let expected = guest.stop().await;
        assert_same(&bench.content(&target.node).await, &expected, "the disk");
    });
}

#[test]
fn errors_that_are_ignored_are_tried_again_until_all_is_copied() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        run(|bench| async move {
            let (chain, target, content) = two_disks(&bench).await;
            let handle = bench.guest_handle(&chain[1].node);
            let guest = Guest::start(&bench.graph, &handle, content, 4);
            target.mem.fail(What::Write, 0, LENGTH, ErrorKind::Io, 5);
            let mut mirror = MirrorOptions::new(&chain[1].node, &target.node);
            mirror.on_target_error = OnError::Ignore;
            mirror.copy_mode = copy_mode;
            let job = bench.manager.mirror(mirror).await.expect("a mirror");
            job.wait_ready().await.expect("ready");
            job.complete().expect("it is ready");
            job.wait().await.expect("success");
            let expected = guest.stop().await;
            assert_same(&bench.content(&target.node).await, &expected, "the disk");
            assert!(job.counters().write_errors > 0);
        });
    }
}

#[test]
fn a_failing_source_ends_a_commit_and_leaves_the_chain() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["A", "B", "C"]).await;
        let handle = bench.guest_handle(&chain[2].node);
        let at = (LENGTH / CLUSTER - 1) * CLUSTER;
        let options = CommitOptions::new(&chain[2].node)
            .top(&chain[1].node)
            .base(&chain[0].node);
        chain[1]
            .mem
            .fail(What::Read, 0, at, ErrorKind::Io, u64::MAX);
        let job = bench.manager.commit(options).await.expect("a commit");
        let error = job.wait().await.expect_err("it failed");
        assert_eq!(error.kind(), ErrorKind::Io);
        chain[1].mem.heal();
        assert_eq!(bench.names(), ["A", "B", "C"]);
        let found = handle.read(0, LENGTH as usize).await.expect("readable");
        assert_same(&found, &content, "the guest's disk");
    });
}

#[test]
fn a_stream_that_ignored_errors_fails_at_its_end_and_leaves_the_chain() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["A", "B"]).await;
        let handle = bench.guest_handle(&chain[1].node);
        chain[0].mem.fail(What::Read, 0, CLUSTER, ErrorKind::Io, 1);
        let mut options = StreamOptions::new(&chain[1].node);
        options.on_error = OnError::Ignore;
        // The first cluster is the top's own: make it the base's.
        let job = bench
            .manager
            .stream(options.clone())
            .await
            .expect("a stream");
        let first = job.wait().await;
        if first.is_ok() {
            // It was the top's own after all: then nothing failed, and all is copied.
            assert_eq!(bench.names(), ["B"]);
        } else {
            assert_eq!(bench.names(), ["A", "B"]);
            let again = bench.manager.stream(options).await.expect("a stream");
            again.wait().await.expect("nothing fails now");
            assert_eq!(bench.names(), ["B"]);
        }
        let found = handle.read(0, LENGTH as usize).await.expect("readable");
        assert_same(&found, &content, "the guest's disk");
    });
}

#[test]
fn a_failing_copy_before_write_breaks_the_write_or_the_backup_as_told() {
    for on_cbw_error in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
        run(|bench| async move {
            let (chain, target, _) = two_disks(&bench).await;
            let handle = bench.guest_handle(&chain[1].node);
            let mut options = BackupOptions::new(&chain[1].node, &target.node);
            options.job.speed = 1;
            options.on_cbw_error = on_cbw_error;
            // A broken point in time isn't a matter of policy.
            options.on_target_error = OnError::Ignore;
            let job = bench.manager.backup(options).await.expect("a backup");
            assert!(job.wait_status(JobStatus::Running).await);
            let last = LENGTH - 4 * CLUSTER;
            target
                .mem
                .fail(What::Write, last, LENGTH, ErrorKind::NoSpace, u64::MAX);
            let data = block_core::IoBuf::from(vec![7; CLUSTER as usize]);
            let written = handle
                .write(last, data, block_core::RequestFlags::empty())
                .await;
            if on_cbw_error == OnCbwError::BreakGuestWrite {
                let error = written.expect_err("the write is broken");
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                assert_eq!(job.status(), JobStatus::Running);
                job.cancel(true).expect("it runs");
                job.wait().await.expect_err("cancelled");
            } else {
                written.expect("the write goes on");
                job.set_speed(0).expect("it runs");
                let error = job.wait().await.expect_err("the backup is broken");
                assert_eq!(error.kind(), ErrorKind::NoSpace);
            }
            assert_eq!(bench.names(), ["base", "top", "target"]);
        });
    }
}

async fn disk(bench: &Bench, name: &str) -> Layer {
    let layer = bench.layer(name, LENGTH, None);
    let handle = bench
        .graph
        .attach(&layer.node, GUEST, "filler")
        .expect("a handle");
    let data = block_core::IoBuf::from(vec![9; CLUSTER as usize]);
    handle
        .write(0, data, block_core::RequestFlags::empty())
        .await
        .expect("a write");
    layer
}

async fn pair_of_backups(
    bench: &Bench,
    transaction: &Arc<Transaction>,
    speed: u64,
) -> Vec<Arc<Job>> {
    let mut jobs = Vec::new();
    for number in 0..2 {
        let source = disk(bench, &format!("s{number}")).await;
        let target = bench.layer(&format!("t{number}"), LENGTH, None);
        let mut options = BackupOptions::new(&source.node, &target.node);
        options.job = JobOptions {
            transaction: Some(transaction.clone()),
            auto_dismiss: false,
            speed: if number == 0 { speed } else { 0 },
            ..options_of(&format!("b{number}"))
        };
        jobs.push(bench.manager.backup(options).await.expect("a backup"));
    }
    jobs
}

fn options_of(id: &str) -> JobOptions {
    options(id)
}

#[test]
fn in_a_grouped_transaction_all_wait_for_the_last_and_end_together() {
    run(|bench| async move {
        let transaction = Transaction::new(CompletionMode::Grouped);
        let jobs = pair_of_backups(&bench, &transaction, 1).await;
        bench.sleep(20).await;
        for job in &jobs {
            assert_eq!(job.status(), JobStatus::Created, "it isn't started yet");
        }
        transaction.start();
        assert!(jobs[1].wait_status(JobStatus::Waiting).await);
        bench.sleep(20).await;
        assert_eq!(jobs[1].status(), JobStatus::Waiting);
        jobs[0].set_speed(0).expect("it runs");
        for job in &jobs {
            job.wait().await.expect("success");
            assert_eq!(job.status(), JobStatus::Concluded);
            job.dismiss().expect("it is concluded");
            assert_eq!(job.status(), JobStatus::Null);
        }
        assert!(bench.manager.jobs().is_empty());
    });
}

#[test]
fn in_a_grouped_transaction_the_cancellation_of_one_cancels_the_one_that_waits() {
    run(|bench| async move {
        let transaction = Transaction::new(CompletionMode::Grouped);
        let jobs = pair_of_backups(&bench, &transaction, 1).await;
        transaction.start();
        assert!(jobs[1].wait_status(JobStatus::Waiting).await);
        jobs[0].cancel(true).expect("it runs");
        for job in &jobs {
            let error = job.wait().await.expect_err("cancelled");
            assert_eq!(error.kind(), ErrorKind::Cancelled);
        }
    });
}

#[test]
fn in_an_individual_transaction_the_cancellation_of_one_leaves_the_other() {
    run(|bench| async move {
        let transaction = Transaction::new(CompletionMode::Individual);
        let jobs = pair_of_backups(&bench, &transaction, 1).await;
        transaction.start();
        jobs[0].cancel(true).expect("it runs");
        jobs[0].wait().await.expect_err("cancelled");
        jobs[1].wait().await.expect("success");
    });
}

#[test]
fn a_job_that_isnt_finalized_by_itself_waits_pending_and_can_still_be_cancelled() {
    for finalize in [true, false] {
        run(|bench| async move {
            let (chain, _) = bench.chain(&["A", "B"]).await;
            let mut options = StreamOptions::new(&chain[1].node);
            options.job.auto_finalize = false;
            options.job.auto_dismiss = false;
            let mut events = bench.manager.subscribe();
            let job = bench.manager.stream(options).await.expect("a stream");
            assert!(job.wait_status(JobStatus::Pending).await);
            bench.sleep(10).await;
            assert_eq!(bench.names(), ["A", "B"], "nothing has changed yet");
            if finalize {
                job.finalize().expect("it is pending");
                job.wait().await.expect("success");
                assert_eq!(bench.names(), ["B"]);
            } else {
                job.cancel(true).expect("it is pending");
                job.wait().await.expect_err("cancelled");
                assert_eq!(bench.names(), ["A", "B"]);
            }
            refused(
                job.cancel(true),
                "Job 'B' in state 'concluded' cannot accept command verb 'cancel'",
            );
            job.dismiss().expect("it is concluded");
            let mut statuses = Vec::new();
            let mut others = Vec::new();
            while let Some(event) = events.next().await {
                match event {
                    JobEvent::StatusChange { status, .. } => {
                        statuses.push(status);
                        if status == JobStatus::Null {
                            break;
                        }
                    }
                    other => others.push(other),
                }
            }
            use JobStatus as S;
            let mut expected = vec![S::Created, S::Running, S::Waiting, S::Pending];
            if !finalize {
                expected.push(S::Aborting);
            }
            expected.extend([S::Concluded, S::Null]);
            assert_eq!(statuses, expected);
            assert!(matches!(others[0], JobEvent::Pending { .. }));
            let completed = matches!(&others[1], JobEvent::Completed { error: None, .. });
            let was_cancelled = matches!(&others[1], JobEvent::Cancelled(_));
            assert_eq!((completed, was_cancelled), (finalize, !finalize));
        });
    }
}

#[test]
fn a_read_only_base_is_writable_during_a_commit_only() {
    for cancel in [false, true] {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["A", "B", "C"]).await;
            let base = chain[0].mem.clone().read_only();
            let handle = bench.guest_handle(&chain[2].node);
            let mut options = CommitOptions::new(&chain[2].node)
                .top(&chain[1].node)
                .base(&chain[0].node);
            if cancel {
                options.job.speed = 1;
            }
            let job = bench.manager.commit(options).await.expect("a commit");
            if cancel {
                use block_core::BlockDriver;
                assert!(!base.is_read_only());
                job.cancel(true).expect("it runs");
            }
            assert_eq!(job.wait().await.is_err(), cancel);
            use block_core::BlockDriver;
            assert!(base.is_read_only());
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &content, "the guest's disk");
        });
    }
}

#[test]
fn an_empty_disk_is_in_sync_at_once() {
    run(|bench| async move {
        let source = bench.layer("source", 0, None);
        let target = bench.layer("target", 0, None);
        let handle = bench.guest_handle(&source.node);
        let options = MirrorOptions::new(&source.node, &target.node);
        let job = bench.manager.mirror(options).await.expect("a mirror");
        job.wait_ready().await.expect("ready");
        job.complete().expect("it is ready");
        job.wait().await.expect("success");
        assert_eq!(handle.node().name(), "target");
    });
}

#[test]
fn a_commit_below_and_a_stream_above_work_on_one_chain_at_a_time() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["A", "B", "C", "D", "E"]).await;
        let handle = bench.guest_handle(&chain[4].node);
        let guest = Guest::start(&bench.graph, &handle, content, 8);
        let mut stream = StreamOptions::new(&chain[4].node).base(&chain[2].node);
        stream.job = options("up");
        let mut commit = CommitOptions::new(&chain[2].node)
            .top(&chain[1].node)
            .base(&chain[0].node);
        commit.job = options("down");
        let stream = bench.manager.stream(stream).await.expect("a stream");
        let commit = bench.manager.commit(commit).await.expect("a commit");
        stream.wait().await.expect("success");
        commit.wait().await.expect("success");
        let expected = guest.stop().await;
        assert_eq!(bench.names(), ["A", "C", "E"]);
        let found = handle.read(0, LENGTH as usize).await.expect("readable");
        assert_same(&found, &expected, "the guest's disk");
    });
}

#[test]
fn jobs_on_several_disks_end_side_by_side_and_cancel_all_leaves_none() {
    run(|bench| async move {
        let mut jobs = Vec::new();
        for number in 0..3 {
            let source = disk(&bench, &format!("s{number}")).await;
            let target = bench.layer(&format!("t{number}"), LENGTH, None);
            let options = MirrorOptions::new(&source.node, &target.node);
            jobs.push(bench.manager.mirror(options).await.expect("a mirror"));
        }
        for job in &jobs {
            job.wait_ready().await.expect("ready");
        }
        jobs[0].complete().expect("it is ready");
        jobs[1].complete().expect("it is ready");
        jobs[0].wait().await.expect("success");
        jobs[1].wait().await.expect("success");
        bench.manager.cancel_all().await;
        assert!(bench.manager.jobs().is_empty());
        jobs[2].wait().await.expect_err("cancelled");
    });
}
