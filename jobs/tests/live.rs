//! Every job, in every mode, beside a guest that goes on writing, zeroing and discarding; then every byte is compared.

mod common;

use block_core::Permissions;
use common::{Bench, LENGTH, assert_same, guest::Guest, run};
use jobs::{
    BackupOptions, CommitOptions, CopyMode, JobStatus, MirrorOptions, StreamOptions, SyncMode,
    TargetBacking,
};

async fn mirror(bench: &Bench, sync: SyncMode, copy_mode: CopyMode, seed: u64) {
    let (chain, content) = bench.chain(&["base", "top"]).await;
    let below = match sync {
        SyncMode::Full => None,
        SyncMode::Top | SyncMode::None => Some(&chain[0]),
    };
    let target = bench.layer("target", LENGTH, below);
    let top = &chain[1];
    let handle = bench.guest_handle(&top.node);
    let guest = Guest::start(&bench.graph, &handle, content, seed);
    guest.work(&bench.graph, 20).await;
    let mut options = MirrorOptions::new(&top.node, &target.node);
    options.sync = sync;
    options.copy_mode = copy_mode;
    if sync == SyncMode::None {
        options.target_backing = TargetBacking::FromSource;
    }
    let job = bench.manager.mirror(options).await.expect("a mirror");
    job.wait_ready().await.expect("ready");
    guest.work(&bench.graph, 100).await;
    job.complete().expect("it is ready");
    job.wait().await.expect("success");
    guest.work(&bench.graph, 50).await;
    assert_eq!(
        handle.node().name(),
        "target",
        "the guest was switched over"
    );
    let expected = guest.stop().await;
    let found = handle.read(0, LENGTH as usize).await.expect("readable");
    assert_same(&found, &expected, "the guest's disk");
    let is_used = sync == SyncMode::None;
    assert_eq!(bench.graph.node("top").is_some(), is_used, "the old source");
    assert_eq!(
        bench.names().iter().filter(|n| n.starts_with('#')).count(),
        0,
        "filters are gone"
    );
    let counters = job.counters();
    let moved = counters.bytes_copied + counters.bytes_written_through;
    assert!(
        moved > 0 && counters.bytes_while_guest_wrote > 0,
        "{counters:?}"
    );
    if copy_mode == CopyMode::WriteBlocking {
        assert!(counters.bytes_written_through > 0, "{counters:?}");
    }
    assert!(
        bench.manager.jobs().is_empty(),
        "it was dismissed by itself"
    );
}

#[test]
fn a_full_mirror_in_the_background_follows_a_live_guest_and_takes_over() {
    for seed in 0..4 {
        run(|b| async move { mirror(&b, SyncMode::Full, CopyMode::Background, seed).await });
    }
}

#[test]
fn a_top_mirror_in_the_background_follows_a_live_guest_and_takes_over() {
    for seed in 0..4 {
        run(|b| async move { mirror(&b, SyncMode::Top, CopyMode::Background, seed).await });
    }
}

#[test]
fn a_mirror_of_new_writes_only_takes_over_with_the_source_as_backing_file() {
    for seed in 0..4 {
        run(|b| async move { mirror(&b, SyncMode::None, CopyMode::Background, seed).await });
    }
}

#[test]
fn a_write_blocking_mirror_follows_a_live_guest_and_takes_over() {
    for seed in 0..4 {
        run(|b| async move { mirror(&b, SyncMode::Full, CopyMode::WriteBlocking, seed).await });
        run(|b| async move { mirror(&b, SyncMode::Top, CopyMode::WriteBlocking, seed).await });
        run(|b| async move { mirror(&b, SyncMode::None, CopyMode::WriteBlocking, seed).await });
    }
}

#[test]
fn a_ready_mirror_that_is_cancelled_softly_leaves_a_consistent_copy_and_the_guest_where_it_is() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["base", "top"]).await;
        let target = bench.layer("target", LENGTH, None);
        let handle = bench.guest_handle(&chain[1].node);
        let guest = Guest::start(&bench.graph, &handle, content, 5);
        let options = MirrorOptions::new(&chain[1].node, &target.node);
        let job = bench.manager.mirror(options).await.expect("a mirror");
        job.wait_ready().await.expect("ready");
        guest.work(&bench.graph, 50).await;
        let expected = guest.stop().await;
        job.cancel(false).expect("it is ready");
        job.wait().await.expect("a soft cancel is a success");
        assert_eq!(handle.node().name(), "top");
        assert_same(&bench.content(&target.node).await, &expected, "the copy");
    });
}

#[test]
fn an_active_commit_beside_a_live_guest_makes_the_base_the_disk() {
    for seed in 0..4 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["base", "mid", "top"]).await;
            let handle = bench.guest_handle(&chain[2].node);
            let guest = Guest::start(&bench.graph, &handle, content, seed);
            guest.work(&bench.graph, 20).await;
            let options = CommitOptions::new(&chain[2].node);
            let job = bench.manager.commit(options).await.expect("a commit");
            job.wait_ready().await.expect("ready");
            guest.work(&bench.graph, 50).await;
            job.complete().expect("it is ready");
            job.wait().await.expect("success");
            guest.work(&bench.graph, 50).await;
            let expected = guest.stop().await;
            assert_eq!(bench.names(), ["base"], "the layers above are closed");
            assert_eq!(handle.node().name(), "base");
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &expected, "the base");
            assert!(job.counters().bytes_while_guest_wrote > 0);
        });
    }
}

#[test]
fn an_intermediate_commit_beside_a_live_guest_drops_the_layers_and_rewrites_the_header() {
    for seed in 0..4 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["base", "low", "mid", "top"]).await;
            let expected_base = {
                let low = bench.content(&chain[2].node).await;
                assert_eq!(low.len(), LENGTH as usize);
                low
            };
            let handle = bench.guest_handle(&chain[3].node);
            let guest = Guest::start(&bench.graph, &handle, content, seed);
            guest.work(&bench.graph, 20).await;
            let options = CommitOptions::new(&chain[3].node)
                .top(&chain[2].node)
                .base(&chain[0].node);
            let job = bench.manager.commit(options).await.expect("a commit");
            job.wait().await.expect("success");
            guest.work(&bench.graph, 50).await;
            let expected = guest.stop().await;
            assert_eq!(bench.names(), ["base", "top"]);
            let header = chain[3].mem.header.lock().clone();
            assert_eq!(header, (Some("base.img".into()), Some("mem".into())));
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &expected, "the guest's disk");
            assert_same(
                &bench.content(&chain[0].node).await,
                &expected_base,
                "the base",
            );
            assert!(job.counters().bytes_copied > 0);
            assert!(job.counters().bytes_while_guest_wrote > 0);
        });
    }
}

#[test]
fn a_commit_grows_a_base_that_is_too_short() {
    run(|bench| async move {
        let base = bench.layer("base", LENGTH / 2, None);
        let top = bench.layer("top", LENGTH, Some(&base));
        let handle = bench.guest_handle(&top.node);
        let guest = Guest::start(&bench.graph, &handle, vec![0; LENGTH as usize], 3);
        guest.work(&bench.graph, 50).await;
        let job = bench
            .manager
            .commit(CommitOptions::new(&top.node))
            .await
            .expect("a commit");
        job.wait_ready().await.expect("ready");
        job.complete().expect("it is ready");
        job.wait().await.expect("success");
        let expected = guest.stop().await;
        assert_eq!(base.node.length(), LENGTH);
        assert_same(&bench.content(&base.node).await, &expected, "the base");
    });
}

#[test]
fn a_stream_to_a_base_beside_a_live_guest_keeps_every_byte() {
    for seed in 0..4 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["base", "low", "mid", "top"]).await;
            let handle = bench.guest_handle(&chain[3].node);
            let guest = Guest::start(&bench.graph, &handle, content, seed);
            guest.work(&bench.graph, 20).await;
            let options = StreamOptions::new(&chain[3].node).base(&chain[0].node);
            let job = bench.manager.stream(options).await.expect("a stream");
            job.wait().await.expect("success");
            guest.work(&bench.graph, 50).await;
            let expected = guest.stop().await;
            assert_eq!(bench.names(), ["base", "top"]);
            let header = chain[3].mem.header.lock().clone();
            assert_eq!(header, (Some("base.img".into()), Some("mem".into())));
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &expected, "the guest's disk");
            assert!(job.counters().bytes_copied > 0);
            assert!(job.counters().bytes_while_guest_wrote > 0);
        });
    }
}

#[test]
fn a_stream_of_the_whole_chain_beside_a_live_guest_leaves_no_backing_file() {
    for seed in 0..4 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["base", "low", "top"]).await;
            let handle = bench.guest_handle(&chain[2].node);
            let guest = Guest::start(&bench.graph, &handle, content, seed);
            let options = StreamOptions::new(&chain[2].node);
            let job = bench.manager.stream(options).await.expect("a stream");
            job.wait().await.expect("success");
            guest.work(&bench.graph, 50).await;
            let expected = guest.stop().await;
            assert_eq!(bench.names(), ["top"]);
            assert_eq!(chain[2].mem.header.lock().clone(), (None, None));
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &expected, "the guest's disk");
        });
    }
}

#[test]
fn two_streams_in_disjoint_parts_of_a_chain_run_side_by_side() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["a", "b", "c", "d", "e"]).await;
        let handle = bench.guest_handle(&chain[4].node);
        let guest = Guest::start(&bench.graph, &handle, content, 1);
        let upper = StreamOptions::new(&chain[4].node).base(&chain[2].node);
        let lower = StreamOptions::new(&chain[2].node).base(&chain[0].node);
        let upper = bench.manager.stream(upper).await.expect("the upper one");
        let lower = bench.manager.stream(lower).await.expect("the lower one");
        upper.wait().await.expect("success");
        lower.wait().await.expect("success");
        let expected = guest.stop().await;
        assert_eq!(bench.names(), ["a", "c", "e"]);
        let found = handle.read(0, LENGTH as usize).await.expect("readable");
        assert_same(&found, &expected, "the guest's disk");
    });
}

async fn backup(bench: &Bench, sync: SyncMode, seed: u64) {
    let (chain, content) = bench.chain(&["base", "top"]).await;
    let below = (sync == SyncMode::Top).then_some(&chain[0]);
    let target = bench.layer("target", LENGTH, below);
    let handle = bench.guest_handle(&chain[1].node);
    let mut options = BackupOptions::new(&chain[1].node, &target.node);
    options.sync = sync;
    // Slow at first, so that the guest is there before the job.
    options.job.speed = 64 << 10;
    let job = bench.manager.backup(options).await.expect("a backup");
    let before = content.clone();
    let guest = Guest::start(&bench.graph, &handle, content, seed);
    guest.work(&bench.graph, 50).await;
    job.set_speed(0).expect("it runs");
    job.wait().await.expect("success");
    guest.work(&bench.graph, 20).await;
    let expected = guest.stop().await;
    assert_eq!(handle.node().name(), "top");
    let found = handle.read(0, LENGTH as usize).await.expect("readable");
    assert_same(&found, &expected, "the guest's disk");
    assert_same(&bench.content(&target.node).await, &before, "the backup");
    assert_eq!(bench.names(), ["base", "top", "target"]);
    let counters = job.counters();
    assert!(counters.bytes_while_guest_wrote > 0, "{counters:?}");
}

#[test]
fn a_disk_whose_length_is_no_multiple_of_anything_is_copied_to_its_last_byte() {
    const ODD: u64 = LENGTH + 3 * 512;
    run(|bench| async move {
        let base = bench.layer("base", ODD, None);
        let mid = bench.layer("mid", ODD, Some(&base));
        let top = bench.layer("top", ODD, Some(&mid));
        let mut expected = vec![0; ODD as usize];
        for (layer, byte) in [(&base, 1), (&mid, 2), (&top, 3)] {
            let handle = bench.guest_handle(&layer.node);
            let start = ODD - 4096 * (4 - byte);
            let data = vec![byte as u8; (ODD - start) as usize];
            expected[start as usize..].copy_from_slice(&data);
            let flags = block_core::RequestFlags::empty();
            handle
                .write(start, block_core::IoBuf::from(data), flags)
                .await
                .expect("a write");
        }
        let manager = &bench.manager;
        for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
            let target = bench.layer("mirror", ODD, None);
            let mut options = MirrorOptions::new(&top.node, &target.node);
            options.copy_mode = copy_mode;
            let job = manager.mirror(options).await.expect("a mirror");
            job.wait_ready().await.expect("ready");
            job.cancel(false).expect("it is ready");
            job.wait().await.expect("success");
            assert_same(&bench.content(&target.node).await, &expected, "the mirror");
            bench.graph.release(&target.node).await.expect("it closes");
        }
        let target = bench.layer("backup", ODD, None);
        let options = BackupOptions::new(&top.node, &target.node);
        let job = manager.backup(options).await.expect("a backup");
        job.wait().await.expect("success");
        assert_same(&bench.content(&target.node).await, &expected, "the backup");
        let options = StreamOptions::new(&top.node).base(&base.node);
        let job = manager.stream(options).await.expect("a stream");
        job.wait().await.expect("success");
        assert_same(&bench.content(&top.node).await, &expected, "the stream");
        let job = manager
            .commit(CommitOptions::new(&top.node))
            .await
            .expect("a commit");
        job.wait_ready().await.expect("ready");
        job.complete().expect("it is ready");
        job.wait().await.expect("success");
        assert_same(&bench.content(&base.node).await, &expected, "the base");
    });
}

#[test]
fn a_guest_that_drops_its_requests_leaves_mirror_and_source_the_same() {
    use futures::FutureExt;
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        run(|bench| async move {
            let (chain, _) = bench.chain(&["base", "top"]).await;
            let target = bench.layer("target", LENGTH, None);
            let handle = bench.guest_handle(&chain[1].node);
            let mut options = MirrorOptions::new(&chain[1].node, &target.node);
            options.copy_mode = copy_mode;
            let job = bench.manager.mirror(options).await.expect("a mirror");
            for round in 0..400_u64 {
                let offset = (round * 7919 % (LENGTH / 4096 - 8)) * 4096;
                let data = block_core::IoBuf::from(vec![round as u8; 20_000]);
                let flags = block_core::RequestFlags::empty();
                let mut write = handle.write(offset, data, flags).boxed();
                let mut discard = handle.discard(offset, 65_536.min(LENGTH - offset)).boxed();
                for _ in 0..round % 5 {
                    // Polled a little, then dropped in the middle.
                    let _ = futures::poll!(&mut write);
                    let _ = futures::poll!(&mut discard);
                    bench.sleep(0).await;
                }
            }
            let dropped = handle.node().stats().snapshot().dropped;
            assert!(dropped > 0, "no request was dropped while it was in flight");
            job.wait_ready().await.expect("ready");
            job.cancel(false).expect("it is ready");
            job.wait().await.expect("success");
            handle.flush().await.expect("all has ended");
            let source = bench.content(&chain[1].node).await;
            assert_same(&bench.content(&target.node).await, &source, "the mirror");
        });
    }
}

#[test]
fn a_full_backup_holds_what_was_there_at_its_start() {
    for seed in 0..6 {
        run(|bench| async move { backup(&bench, SyncMode::Full, seed).await });
    }
}

#[test]
fn a_backup_of_the_top_layer_holds_what_was_there_at_its_start() {
    for seed in 0..6 {
        run(|bench| async move { backup(&bench, SyncMode::Top, seed).await });
    }
}

#[test]
fn a_backup_slower_than_the_guest_saves_what_the_guest_overwrites() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["base", "top"]).await;
        let target = bench.layer("target", LENGTH, None);
        let handle = bench.guest_handle(&chain[1].node);
        let mut options = BackupOptions::new(&chain[1].node, &target.node);
        options.job.speed = 64 << 10;
        let job = bench.manager.backup(options).await.expect("a backup");
        let before = content.clone();
        let guest = Guest::start(&bench.graph, &handle, content, 9);
        guest.work(&bench.graph, 300).await;
        job.set_speed(0).expect("it runs");
        job.wait().await.expect("success");
        guest.stop().await;
        assert_same(&bench.content(&target.node).await, &before, "the backup");
        assert!(job.counters().bytes_copied_before_write > 0);
    });
}

#[test]
fn writes_to_one_cluster_that_come_together_save_its_old_content_once() {
    // One copy unit of the backup, half of it shared by the guest's workers.
    const HOT: u64 = 8 * common::mem::CLUSTER;
    for seed in 0..40 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&["base", "top"]).await;
            let target = bench.layer("target", LENGTH, None);
            let handle = bench.guest_handle(&chain[1].node);
            let mut options = BackupOptions::new(&chain[1].node, &target.node);
            options.sync = SyncMode::None;
            let job = bench.manager.backup(options).await.expect("a backup");
            let before = content.clone();
            let guest = Guest::start_in(&bench.graph, &handle, content, seed, HOT);
            guest.work(&bench.graph, 60).await;
            guest.stop().await;
            job.cancel(true).expect("it runs");
            job.wait().await.expect_err("cancelled");
            let found = bench.content(&target.node).await;
            let hot = HOT as usize;
            assert_same(&found[..hot], &before[..hot], "what was overwritten");
            let saved = job.counters().bytes_copied_before_write;
            assert!(saved > 0 && saved <= HOT, "{saved}");
        });
    }
}

#[test]
fn a_backup_of_overwritten_content_ends_by_cancel_and_shows_the_old_disk_over_the_new() {
    run(|bench| async move {
        let (chain, content) = bench.chain(&["base", "top"]).await;
        let target = bench.layer("target", LENGTH, Some(&chain[1]));
        let handle = bench.guest_handle(&chain[1].node);
        // The target reads from the live disk below it: it has to be allowed to.
        handle
            .set_permissions(block_core::PermissionSet::new(
                Permissions::CONSISTENT_READ | Permissions::WRITE,
                Permissions::all(),
            ))
            .expect("sharing more is no conflict");
        let mut options = BackupOptions::new(&chain[1].node, &target.node);
        options.sync = SyncMode::None;
        let job = bench.manager.backup(options).await.expect("a backup");
        let before = content.clone();
        let guest = Guest::start(&bench.graph, &handle, content, 2);
        guest.work(&bench.graph, 100).await;
        guest.stop().await;
        assert_same(&bench.content(&target.node).await, &before, "the old disk");
        assert_eq!(job.status(), JobStatus::Running);
        job.cancel(true).expect("it runs");
        let error = job.wait().await.expect_err("it was cancelled");
        assert_eq!(error.kind(), block_core::ErrorKind::Cancelled);
        assert_eq!(handle.node().name(), "top");
    });
}
