//! Flushes: when one reaches the driver and when not, who shares one, and what happens after one has failed.

use std::sync::Arc;

use block_core::{ErrorKind, RequestFlags, driver::Reopen};

use crate::{
    bench::{Bench, Call, CallKind, Outcome, Probe, Topped, case, must, wrong},
    case::{Case, Group, Scene},
    storage::{Choose, OpKind, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-flush-with-nothing-written-reaches-no-driver",
            "a flush is passed on after each kind of change, also a failed one, and not again without one; reads and status \
             are no changes",
            only_after_changes,
        ),
        case(
            Group::Rw,
            "rw-flushes-at-once-share-one",
            "flushes that come while one is under way share the next one, and none of them returns before what it covers is \
             flushed",
            shared,
        ),
        case(
            Group::Rw,
            "rw-write-that-ends-during-a-flush-wants-another",
            "what ended after a flush began isn't covered by it: the next flush reaches the driver",
            not_covered_by_it,
        ),
        case(
            Group::Rw,
            "rw-failed-flush-fails-later-ones",
            "after a failed flush all later ones fail alike without reaching the driver, also when the storage has recovered",
            sticks,
        ),
        case(
            Group::Rw,
            "rw-failed-flush-of-a-fua-write-fails-later-ones",
            "when the flush behind a FUA write fails, the write fails and so do later flushes",
            fua_sticks,
        ),
        case(
            Group::Rw,
            "rw-storage-that-cant-flush-fails-the-images-flush",
            "when the storage's flush fails, the image's flush fails, and again until the image is reopened, even if the \
             storage could flush by then",
            of_the_storage,
        ),
        case(
            Group::Rw,
            "rw-flush-reaches-the-storage-last",
            "when a flush has ended, nothing was written to the storage after its last flush (places may be given back)",
            storage_last,
        ),
    ]
}

fn flushes(calls: &[Call]) -> usize {
    calls
        .iter()
        .filter(|call| call.kind == CallKind::Flush)
        .count()
}

fn take_flushes(topped: &Topped) -> usize {
    flushes(&topped.probe.take())
}

async fn only_after_changes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    bench.handle.flush().await?;
    // A node that is new over written ones passes its first flush on.
    topped.probe.take();
    bench.handle.flush().await?;
    bench.handle.read(0, 4096).await?;
    bench.handle.block_status(0, 4096).await?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 0, || {
        "a flush without a change reached the driver".into()
    })?;
    let none = RequestFlags::empty();
    bench.write(0, 1).await?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 1, || {
        "a write wasn't flushed".into()
    })?;
    bench.zero(0, 512, none).await?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 1, || {
        "a zero write wasn't flushed".into()
    })?;
    bench.discard(0, 512).await?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 1, || {
        "a discard wasn't flushed".into()
    })?;
    topped.probe.fail(CallKind::Write, 1, ErrorKind::Io);
    must(
        bench.handle.write(0, vec![1; 512], none).await.is_err(),
        || "no failure".into(),
    )?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 1, || {
        "after a failed write nothing was flushed".into()
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn shared(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let topped = bench.through(Probe::new())?;
    bench.write(0, 512).await?;
    topped.probe.block(CallKind::Flush);
    let start = |bench: &Bench| {
        let handle = bench.handle.clone();
        bench.start(async move { handle.flush().await })
    };
    let first = start(&bench);
    scene.rest().await;
    bench.write(512, 512).await?;
    let later: Vec<_> = (0..5).map(|_| start(&bench)).collect();
    scene.rest().await;
    must(
        !first.is_done() && later.iter().all(|flush| !flush.is_done()),
        || "a flush returned before the driver had flushed".into(),
    )?;
    must(take_flushes(&topped) == 1, || {
        "two flushes were with the driver at once".into()
    })?;
    topped.probe.unblock(CallKind::Flush);
    first.await?;
    for flush in later {
        flush.await?;
    }
    let more = take_flushes(&topped);
    must(more == 1, || format!("five flushes became {more}"))?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn not_covered_by_it(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let topped = bench.through(Probe::new())?;
    bench.write(0, 512).await?;
    topped.probe.block(CallKind::Flush);
    let handle = bench.handle.clone();
    let flush = bench.start(async move { handle.flush().await });
    scene.rest().await;
    bench.write(1024, 512).await?;
    topped.probe.unblock(CallKind::Flush);
    flush.await?;
    topped.probe.take();
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 1, || {
        "the write during the flush wasn't flushed".into()
    })?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 0, || {
        "everything was flushed already".into()
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

fn fails(result: block_core::Result<()>, kind: ErrorKind, what: &str) -> Outcome {
    match result {
        Err(error) if error.kind() == kind => Ok(()),
        other => wrong(format!("{what}: {other:?}")),
    }
}

async fn sticks(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let topped = bench.through(Probe::new())?;
    bench.write(0, 4096).await?;
    topped.probe.fail(CallKind::Flush, 1, ErrorKind::NoSpace);
    fails(
        bench.handle.flush().await,
        ErrorKind::NoSpace,
        "the first flush",
    )?;
    topped.probe.take();
    for _ in 0..2 {
        fails(
            bench.handle.flush().await,
            ErrorKind::NoSpace,
            "a later flush",
        )?;
        bench.write(512, 512).await?;
    }
    fails(
        bench.handle.write(0, vec![1; 512], RequestFlags::FUA).await,
        ErrorKind::NoSpace,
        "a later FUA write",
    )?;
    bench.model[..512].fill(1);
    must(take_flushes(&topped) == 0, || {
        "a failed flush was tried again".into()
    })?;
    bench.handle.reopen(Reopen::default()).await?;
    bench.handle.flush().await?;
    must(take_flushes(&topped) == 1, || {
        "after reopening it wasn't flushed".into()
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn fua_sticks(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let topped = bench.through(Probe::new())?;
    topped.probe.fail(CallKind::Flush, 1, ErrorKind::Io);
    let data = bench.data(0, 512);
    let write = bench.handle.write(0, data.clone(), RequestFlags::FUA).await;
    fails(write, ErrorKind::Io, "the FUA write")?;
    bench.expect(0, &data);
    topped.probe.take();
    fails(
        bench.handle.flush().await,
        ErrorKind::Io,
        "the flush after it",
    )?;
    must(take_flushes(&topped) == 0, || {
        "a failed flush was tried again".into()
    })?;
    bench.handle.reopen(Reopen::default()).await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn of_the_storage(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    bench.handle.flush().await?;
    bench.write(0, 512).await?;
    let flush = Choose::any().kind(OpKind::Flush).times(1);
    bench.disk.fail(flush, ErrorKind::Io, Stage::Before);
    fails(bench.handle.flush().await, ErrorKind::Io, "the first flush")?;
    fails(
        bench.handle.flush().await,
        ErrorKind::Io,
        "the second flush",
    )?;
    match bench.handle.reopen(Reopen::default()).await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            return crate::bench::not_covered("the driver has no reopen");
        }
        other => other?,
    }
    // What was written since is there or not: it is written again.
    bench.write(0, bench.size()).await?;
    bench.handle.flush().await?;
    bench.check_all("after reopening").await?;
    bench.finish().await
}

async fn storage_last(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    for round in 0..4 {
        bench.write(round * bench.cluster, bench.cluster).await?;
        bench
            .zero(round * bench.cluster + 512, 512, RequestFlags::MAY_UNMAP)
            .await?;
        bench.handle.flush().await?;
        let log = bench.disk.log();
        let changes = |kind| !matches!(kind, OpKind::Read | OpKind::Discard);
        let last = log.iter().rev().find(|entry| changes(entry.op.kind));
        must(
            last.is_some_and(|entry| entry.op.kind == OpKind::Flush),
            || {
                format!(
                    "the last thing that the storage got is {:?}",
                    last.map(|entry| entry.op)
                )
            },
        )?;
    }
    bench.finish().await
}
