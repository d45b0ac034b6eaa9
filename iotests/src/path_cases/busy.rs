//! The gate as flags see it: NO_WAIT is refused where it would wait and works where it wouldn't, SERIALISING waits for what
//! plain requests don't wait for, reads take part, and ranges are rounded to the granularity.

use std::sync::Arc;

use block_core::{ErrorKind, RequestFlags};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must, wrong},
    case::{Case, Group, Scene},
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-no-wait-is-busy-where-it-would-wait",
            "requests with NO_WAIT that conflict with one in flight fail with EBUSY and reach no driver",
            busy,
        ),
        case(
            Group::Rw,
            "rw-no-wait-works-where-nothing-conflicts",
            "requests with NO_WAIT work beside plain overlapping ones, and elsewhere beside serialising ones",
            not_busy,
        ),
        case(
            Group::Rw,
            "rw-serialising-write-waits-for-plain-ones",
            "a write with SERIALISING waits for an overlapping plain write, which a plain one doesn't, and holds back those \
             that come later",
            serialising,
        ),
        case(
            Group::Rw,
            "rw-serialising-range-is-rounded-to-the-granularity",
            "a serialising request waits for a plain one in the same unit of the serialising granularity, even if they don't \
             overlap, and not for one in the next",
            granularity,
        ),
        case(
            Group::Rw,
            "rw-read-waits-for-discard-in-flight",
            "a read of a range that is being discarded waits for that, a read of another range doesn't",
            read_waits,
        ),
        case(
            Group::Rw,
            "rw-discard-waits-for-read-in-flight",
            "a discard waits for a read of its range that is in flight, which returns what was there before",
            discard_waits,
        ),
        case(
            Group::Rw,
            "rw-plain-overlapping-writes-run-side-by-side",
            "plain writes and reads of one range don't wait for each other",
            side_by_side,
        ),
    ]
}

const NONE: RequestFlags = RequestFlags::empty();

fn is_busy(result: block_core::Result<()>, what: &str) -> Outcome {
    match result {
        Err(error) if error.kind() == ErrorKind::Busy => Ok(()),
        other => wrong(format!("{what}: {other:?}")),
    }
}

async fn busy(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let parked = bench.park(512, 1024).await?;
    topped.probe.take();
    let no_wait = RequestFlags::NO_WAIT;
    let (handle, len) = (bench.handle.clone(), 1024);
    is_busy(handle.write_zeroes(0, len, no_wait).await, "a zero write")?;
    let flags = no_wait | RequestFlags::SERIALISING;
    is_busy(
        handle.write(1024, vec![1; 1], flags).await,
        "a serialising write",
    )?;
    let flags = no_wait | RequestFlags::ZERO_WRITE;
    is_busy(
        handle.write(1024, vec![1; 512], flags).await,
        "a zero write by flag",
    )?;
    parked.land().await?;
    // And plain requests beside a serialising one.
    topped.probe.block(CallKind::Zero);
    let cluster = bench.cluster;
    let other = handle.clone();
    let zero = bench.start(async move { other.write_zeroes(cluster, cluster, NONE).await });
    scene.rest().await;
    topped.probe.take();
    is_busy(
        handle.write(cluster, vec![1; 512], no_wait).await,
        "a write",
    )?;
    let (lent, buf) = block_core::Buffer::try_new(512)?.lend();
    is_busy(
        handle.readv(2 * cluster - 512, buf, no_wait).await,
        "a read",
    )?;
    drop(lent);
    let calls = topped.probe.take();
    must(calls.is_empty(), || format!("the driver got {calls:?}"))?;
    topped.probe.unblock(CallKind::Zero);
    zero.await?;
    bench.model[cluster as usize..2 * cluster as usize].fill(0);
    bench.check_all("afterwards").await?;
    drop(handle);
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn not_busy(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let cluster = bench.cluster;
    let parked = bench.park(512, 512).await?;
    // Beside its bytes, but in the same place as far as anybody can tell.
    bench.write_with(1024, 512, RequestFlags::NO_WAIT).await?;
    let (lent, buf) = block_core::Buffer::try_new(1024)?.lend();
    bench.handle.readv(512, buf, RequestFlags::NO_WAIT).await?;
    drop(lent);
    bench.zero(cluster, 512, RequestFlags::NO_WAIT).await?;
    must(parked.is_waiting(), || "the parked write went on".into())?;
    parked.land().await?;
    topped.probe.block(CallKind::Zero);
    let handle = bench.handle.clone();
    let zero = bench.start(async move { handle.write_zeroes(cluster, cluster, NONE).await });
    scene.rest().await;
    bench
        .write_with(2 * cluster, cluster, RequestFlags::NO_WAIT)
        .await?;
    must(!zero.is_done(), || "the zero write went on".into())?;
    topped.probe.unblock(CallKind::Zero);
    zero.await?;
    bench.model[cluster as usize..2 * cluster as usize].fill(0);
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn serialising(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let parked = bench.park(0, 1024).await?;
    let mut running = Vec::new();
    for (offset, flags) in [(512, RequestFlags::SERIALISING), (1024, NONE)] {
        let data = bench.data(offset, 1024);
        bench.expect(offset, &data);
        let handle = bench.handle.clone();
        running.push(bench.start(async move { handle.write(offset, data, flags).await }));
        scene.rest().await;
    }
    must(running.iter().all(|write| !write.is_done()), || {
        "a serialising write, or one behind it, overtook a plain one".into()
    })?;
    // In the model the first one came first.
    parked.land().await?;
    for write in running {
        write.await?;
    }
    bench.check_all("in the order in which they came").await?;
    must(topped.node.tracker().waits() == 2, || {
        "they didn't wait at the gate".into()
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn granularity(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let probe = Probe::new().limits(|limits| limits.serialising_granularity = 2048);
    let topped = bench.through(probe)?;
    // It waits at the probe: below it, the image has a granularity of its own.
    topped.probe.block(CallKind::Write);
    let data = bench.data(0, 512);
    bench.expect(0, &data);
    let handle = bench.handle.clone();
    let write = bench.start(async move { handle.write(0, data, NONE).await });
    scene.rest().await;
    let handle = bench.handle.clone();
    let same = bench.start(async move { handle.write_zeroes(1536, 512, NONE).await });
    let handle = bench.handle.clone();
    let next = bench.start(async move { handle.discard(2048, 512).await });
    scene.rest().await;
    must(next.is_done(), || {
        "a request in the next unit was held up".into()
    })?;
    must(!same.is_done(), || {
        "a request in the same unit didn't wait".into()
    })?;
    topped.probe.unblock(CallKind::Write);
    write.await?;
    same.await?;
    next.await?;
    bench.adopt_discard(2048, 512).await?;
    bench.model[1536..2048].fill(0);
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn read_waits(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let cluster = bench.cluster;
    topped.probe.block(CallKind::Discard);
    let handle = bench.handle.clone();
    let discard = bench.start(async move { handle.discard(0, cluster).await });
    scene.rest().await;
    let handle = bench.handle.clone();
    let read = bench.start(async move { handle.read(cluster - 512, 1024).await });
    scene.rest().await;
    must(!read.is_done() && !discard.is_done(), || {
        "the read didn't wait".into()
    })?;
    bench.check_range(cluster, cluster, "elsewhere").await?;
    topped.probe.unblock(CallKind::Discard);
    discard.await?;
    bench.adopt_discard(0, cluster).await?;
    let found = read.await?;
    let expected = &bench.model[cluster as usize - 512..cluster as usize + 512];
    crate::bench::same(&found, expected, cluster - 512, "what the read returned")?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn discard_waits(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let cluster = bench.cluster;
    let old = bench.model[..cluster as usize].to_vec();
    // On the image itself: its own way of reading is what has to be held.
    let hold = bench.disk.hold(Choose::reads(), Stage::Before);
    let handle = bench.handle.clone();
    let read = bench.start(async move { handle.read(0, cluster as usize).await });
    scene.rest().await;
    let handle = bench.handle.clone();
    let discard = bench.start(async move { handle.discard(0, cluster).await });
    let handle = bench.handle.clone();
    let zero = bench.start(async move { handle.write_zeroes(512, 512, NONE).await });
    scene.rest().await;
    if hold.arrivals() == 0 {
        return wrong("the read never reached the storage");
    }
    must(!discard.is_done() && !zero.is_done(), || {
        "a discard or zero write overtook a read".into()
    })?;
    hold.release();
    let found = read.await?;
    crate::bench::same(&found, &old, 0, "what the read returned")?;
    discard.await?;
    zero.await?;
    bench.adopt_discard(0, cluster).await?;
    let zeroed = bench.model[512..1024].iter().all(|byte| *byte == 0);
    must(zeroed, || "the zero write isn't there".into())?;
    bench.finish().await
}

async fn side_by_side(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let waits = bench.node.tracker().waits();
    let parked = bench.park(0, 2048).await?;
    bench.check_range(2048, 1024, "beside it").await?;
    // Over its second half. Which of the two wins there nobody knows, so it isn't looked at.
    let data = bench.data(2048, 512);
    bench.handle.write(2048, data.clone(), NONE).await?;
    bench.expect(2048, &data);
    bench.handle.read(0, 4096).await?;
    must(parked.is_waiting(), || "the parked write went on".into())?;
    parked.land().await?;
    must(bench.node.tracker().waits() == waits, || {
        "somebody waited".into()
    })?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}
