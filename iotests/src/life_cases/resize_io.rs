//! Resizing while requests are in flight: it waits for those that it touches and for no others, and those that come behind
//! it meet the new length.

use std::{
    sync::Arc,
    task::{Context, Waker},
};

use block_core::{Capabilities, ErrorKind, RequestFlags, driver::Truncate, flags::Permissions};

use futures::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, Stop, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
};

const NONE: RequestFlags = RequestFlags::empty();

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-shrink-waits-for-a-write-behind-the-cut",
            "a shrink waits for a write in flight behind its cut, not for one before it, and nothing of it comes back when \
             the disk grows again",
            shrink_waits,
        ),
        case(
            Group::Rw,
            "rw-write-that-waited-behind-a-shrink-is-refused",
            "writes, zero writes and discards that waited for a shrink and now lie behind the end fail with EIO and reach \
             no driver; one that still fits is done",
            waited_behind_shrink,
        ),
        case(
            Group::Rw,
            "rw-length-from-before-a-shrink-doesnt-count",
            "a request that looked at the length, and before it had its ticket a shrink came and went, looks again: it is \
             refused and reaches no driver",
            shrunk_after_the_look,
        ),
        case(
            Group::Rw,
            "rw-write-that-waited-behind-a-grow-is-done",
            "requests at the old end that wait for a disk to grow are done when it has",
            waited_behind_grow,
        ),
        case(
            Group::Rw,
            "rw-grow-doesnt-wait-for-requests-inside-the-disk",
            "growing waits for no request that ends before the old end",
            grow_doesnt_wait,
        ),
        case(
            Group::Rw,
            "rw-two-resizes-come-one-after-the-other",
            "of two resizes that are asked for at once the later one decides the length",
            two,
        ),
        case(
            Group::Rw,
            "rw-failed-resize-leaves-the-length",
            "when a resize fails, the length, the content and the bitmaps are what they were, and later requests work",
            failed,
        ),
    ]
}

/// An image that can be cut, full of data.
async fn cuttable(scene: &Arc<Scene>) -> Result<Bench, Stop> {
    let mut bench = Bench::new(scene, 12).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    // Not every driver that grows can also shrink.
    let length = bench.size() - bench.cluster;
    bench.truncate(length).await?;
    bench.truncate(length + bench.cluster).await?;
    bench.write(0, bench.size()).await?;
    Ok(bench)
}

async fn shrink_waits(scene: Arc<Scene>) -> Outcome {
    let mut bench = cuttable(&scene).await?;
    let cluster = bench.cluster;
    let behind = bench.park(8 * cluster + 512, 512).await?;
    let before = bench.park(cluster, 512).await?;
    let handle = bench.handle.clone();
    let cut = 6 * cluster;
    let shrink = bench.start(async move { handle.truncate(cut, Truncate::default()).await });
    scene.rest().await;
    must(
        !shrink.is_done() && bench.node.length() == 12 * cluster,
        || "the shrink didn't wait for a write behind its cut".into(),
    )?;
    behind.land().await?;
    scene.rest().await;
    must(shrink.is_done(), || {
        "the shrink waited for a write before its cut".into()
    })?;
    shrink.await?;
    bench.resized(cut);
    before.land().await?;
    bench.check_all("after the shrink").await?;
    bench.truncate(12 * cluster).await?;
    bench.check_all("grown again").await?;
    bench.finish().await
}

async fn waited_behind_shrink(scene: Arc<Scene>) -> Outcome {
    let mut bench = cuttable(&scene).await?;
    let cluster = bench.cluster;
    let topped = bench.top(Probe::new())?;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let set = block_core::PermissionSet::new(may, Permissions::all());
    let writer = Arc::new(scene.lab.graph.attach(&topped.node, set, "writer")?);
    topped.probe.block(CallKind::Truncate);
    let cut = 6 * cluster;
    let handle = topped.handle.clone();
    let shrink = bench.start(async move { handle.truncate(cut, Truncate::default()).await });
    scene.rest().await;
    topped.probe.take();
    let mut running = Vec::new();
    for kind in 0..4 {
        let writer = writer.clone();
        running.push(bench.start(async move {
            match kind {
                0 => writer.write(7 * cluster, vec![1; 512], NONE).await,
                1 => writer.write_zeroes(cut - 512, 1024, NONE).await,
                2 => writer.discard(8 * cluster, cluster).await,
                _ => writer.read(cut, 512).await.map(drop),
            }
        }));
    }
    scene.rest().await;
    must(running.iter().all(|request| !request.is_done()), || {
        "a request behind the cut didn't wait for the shrink".into()
    })?;
    bench.write(2 * cluster, 512).await?;
    topped.probe.unblock(CallKind::Truncate);
    shrink.await?;
    bench.resized(cut);
    for request in running {
        match request.await {
            Err(error) if error.kind() == ErrorKind::Io => {}
            other => return wrong(format!("a request behind the end: {other:?}")),
        }
    }
    let calls = topped.probe.take();
    must(calls.is_empty(), || format!("the driver got {calls:?}"))?;
    drop(writer);
    bench.take_off(topped).await?;
    bench.check_all("after the shrink").await?;
    bench.truncate(12 * cluster).await?;
    bench.check_all("grown again").await?;
    bench.finish().await
}

/// Threads may do this to each other; here the look at the length itself lets the shrink in.
async fn shrunk_after_the_look(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.write(0, bench.size()).await?;
    let (size, cluster) = (bench.size(), bench.cluster);
    let topped = bench.top(Probe::new())?;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let set = block_core::PermissionSet::new(may, Permissions::all());
    let reader = scene.lab.graph.attach(&topped.node, set, "reader")?;
    let mut refused = 0;
    // Which of its looks comes right before the ticket is the core's business.
    for look in 0..8 {
        topped.probe.own_length(Some(size));
        topped.probe.take();
        let running: Arc<Mutex<Option<BoxFuture<'static, block_core::Result<()>>>>> =
            Arc::default();
        let (left, handle) = (running.clone(), topped.handle.clone());
        topped.probe.after_look(look, move || {
            let mut shrink =
                async move { handle.truncate(6 * cluster, Truncate::default()).await }.boxed();
            let mut context = Context::from_waker(Waker::noop());
            if shrink.as_mut().poll(&mut context).is_pending() {
                *left.lock() = Some(shrink);
            }
        });
        let read = reader.read(8 * cluster, 512).await;
        topped.probe.forget_look();
        let waited = running.lock().take();
        if let Some(shrink) = waited {
            shrink.await?;
        }
        let calls: Vec<CallKind> = topped.probe.take().iter().map(|call| call.kind).collect();
        match calls[..] {
            [CallKind::Truncate] => {
                must(
                    read.is_err_and(|error| error.kind() == ErrorKind::Io),
                    || "a read behind the end went well".into(),
                )?;
                refused += 1;
            }
            [CallKind::Read] | [CallKind::Read, CallKind::Truncate] => drop(read?),
            _ => return wrong(format!("look {look}: the driver got {calls:?}")),
        }
    }
    must(refused > 0, || {
        "no look at the length came before the ticket".into()
    })?;
    topped.probe.own_length(None);
    drop(reader);
    bench.take_off(topped).await?;
    bench.check_all("at the end").await?;
    bench.finish().await
}

async fn waited_behind_grow(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    bench.write(0, bench.size()).await?;
    let topped = bench.top(Probe::new())?;
    let old = bench.size();
    let new = old + 4 * bench.cluster;
    topped.probe.block(CallKind::Truncate);
    let handle = topped.handle.clone();
    let grow = bench.start(async move { handle.truncate(new, Truncate::default()).await });
    scene.rest().await;
    // A second one waits behind the first, and only then is there a length for a write.
    let handle = topped.handle.clone();
    let grow_more =
        bench.start(async move { handle.truncate(new + 512, Truncate::default()).await });
    scene.rest().await;
    let early = topped.handle.write(old, vec![1; 512], NONE).await;
    must(early.is_err(), || {
        "a write was let in behind the old end".into()
    })?;
    topped.probe.unblock(CallKind::Truncate);
    match grow.await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            return not_covered("the driver can't grow");
        }
        other => other?,
    }
    grow_more.await?;
    bench.resized(new + 512);
    let handle = bench.handle.clone();
    bench.handle = topped.handle.clone();
    bench.write(old - 512, 1024).await?;
    bench.write(new, 512).await?;
    bench.handle = handle;
    bench.take_off(topped).await?;
    bench.check_all("after growing").await?;
    bench.finish().await
}

async fn grow_doesnt_wait(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    bench.write(0, bench.size()).await?;
    let parked = bench.park(bench.size() - 512, 512).await?;
    let (handle, new) = (bench.handle.clone(), bench.size() + 3 * bench.cluster);
    let grow = bench.start(async move { handle.truncate(new, Truncate::default()).await });
    scene.rest().await;
    must(grow.is_done() && parked.is_waiting(), || "it waited".into())?;
    match grow.await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            return not_covered("the driver can't grow");
        }
        other => other?,
    }
    bench.resized(new);
    bench.write(new - 512, 512).await?;
    parked.land().await?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn two(scene: Arc<Scene>) -> Outcome {
    let mut bench = cuttable(&scene).await?;
    let cluster = bench.cluster;
    let mut running = Vec::new();
    for clusters in [5, 20, 8] {
        let handle = bench.handle.clone();
        running.push(bench.start(async move {
            handle
                .truncate(clusters * cluster, Truncate::default())
                .await
        }));
        // In this order.
        scene.lab.env.idle().await;
    }
    for resize in running {
        resize.await?;
    }
    bench.resized(5 * cluster);
    bench.resized(8 * cluster);
    bench.check_all("after all of them").await?;
    bench.finish().await
}

async fn failed(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let bitmap = Arc::new(block_core::bitmap::DirtyBitmap::new(bench.size(), 4096)?);
    topped.node.add_bitmap(bitmap.clone());
    topped.probe.fail(CallKind::Truncate, 1, ErrorKind::NoSpace);
    match bench
        .handle
        .truncate(3 * bench.size(), Truncate::default())
        .await
    {
        Err(error) if error.kind() == ErrorKind::NoSpace => {}
        other => return wrong(format!("a resize that fails: {other:?}")),
    }
    must(bitmap.length() == bench.size(), || {
        "the bitmap has grown".into()
    })?;
    bench.check_all("after the failure").await?;
    bench.write(bench.size() - 512, 512).await?;
    topped.node.remove_bitmap(&bitmap);
    bench.take_off(topped).await?;
    bench.finish().await
}
