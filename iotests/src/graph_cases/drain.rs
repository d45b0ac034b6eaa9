//! Drained sections: they wait for everything that was let in, let nothing in, nest, and stop nobody who has nothing to do
//! with the node.

use std::sync::Arc;

use block_core::{
    BlockHandle, Options, RequestFlags,
    driver::Truncate,
    flags::{PermissionSet, Permissions},
    image::{CheckMode, Progress},
};
use futures::{FutureExt, future::abortable};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must, not_covered},
    case::{Case, Group, Scene},
    sim::Running,
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Graph,
            "graph-drain-waits-for-every-kind-of-request",
            "a drain waits for a read, write, zero write, discard, resize and flush in flight, and for nothing else",
            waits_for_every_kind,
        ),
        case(
            Group::Graph,
            "graph-drain-waits-for-what-a-gone-handle-dropped",
            "a drain waits for a write whose future and whose handle were dropped while the driver had it",
            gone_handle,
        ),
        case(
            Group::Graph,
            "graph-drain-holds-back-every-kind-of-request",
            "in a drained section no request of any kind gets as far as a driver, and all of them go on when it ends",
            holds_back,
        ),
        case(
            Group::Graph,
            "graph-drained-sections-nest-and-overlap",
            "producers go on only when the last of several sections over their node has ended, whichever that is",
            nest,
        ),
        case(
            Group::Graph,
            "graph-drain-of-a-backing-file-stops-those-above",
            "draining a backing file stops the overlay's producers; draining the overlay doesn't stop the backing file's own",
            above_and_below,
        ),
        case(
            Group::Graph,
            "graph-drain-of-one-image-stops-no-other",
            "producers of another image go on while one is drained, and a drain of everything stops them too",
            others,
        ),
        case(
            Group::Graph,
            "graph-drain-with-an-exception-lets-that-one-go-on",
            "a drain that leaves one handle out stops all others, and that one does its I/O inside the section",
            exception,
        ),
        case(
            Group::Graph,
            "graph-drain-that-is-given-up-lets-everybody-go-on",
            "a drain that is dropped before it was quiet leaves no trace",
            given_up,
        ),
        case(
            Group::Graph,
            "graph-handle-that-is-made-in-a-drained-section-waits",
            "a handle that comes to a drained node is stopped like the others, and let go with them",
            made_inside,
        ),
        case(
            Group::Graph,
            "graph-drain-lets-a-request-finish-what-it-began",
            "what a request that was let in still asks of the layers below is let through, also when those are drained",
            sub_requests,
        ),
    ]
}

const NONE: RequestFlags = RequestFlags::empty();

/// Starts a drain of the bench's node, held for no longer than it takes to get it.
fn drain(bench: &Bench) -> Running<()> {
    let (graph, node) = (bench.scene.lab.graph.clone(), bench.node.clone());
    bench.start(async move { drop(graph.drain(&node).await) })
}

async fn gone_handle(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let set = PermissionSet::new(may, Permissions::all());
    let writer = scene.lab.graph.attach(&topped.node, set, "writer")?;
    // What is written is what is there: whether it arrives makes no difference to the content.
    let same = bench.handle.read(0, 512).await?;
    topped.probe.block(CallKind::Write);
    topped.probe.take();
    let (write, abort) = abortable(async move {
        let done = writer.write(0, same.to_vec(), NONE).await;
        drop(writer);
        done
    });
    let write = bench.start(write);
    scene.rest().await;
    must(topped.probe.take().len() == 1, || {
        "the write never reached the driver".into()
    })?;
    abort.abort();
    scene.rest().await;
    let _ = write.await;
    let draining = drain(&bench);
    scene.rest().await;
    must(!draining.is_done(), || {
        "the drain didn't wait for a dropped write".into()
    })?;
    topped.probe.unblock(CallKind::Write);
    draining.await;
    bench.take_off(topped).await?;
    bench.check_all("after the drain").await?;
    bench.finish().await
}

async fn waits_for_every_kind(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let size = bench.size();
    let topped = bench.through(Probe::new())?;
    for kind in [
        CallKind::Read,
        CallKind::Write,
        CallKind::Zero,
        CallKind::Discard,
        CallKind::Truncate,
        CallKind::Flush,
    ] {
        topped.probe.block(kind);
        let handle = bench.handle.clone();
        let request = bench.start(async move {
            match kind {
                CallKind::Read => handle.read(0, 512).await.map(drop),
                CallKind::Write => handle.write(0, vec![1; 512], NONE).await,
                CallKind::Zero => handle.write_zeroes(512, 512, NONE).await,
                CallKind::Discard => handle.discard(1024, 512).await,
                CallKind::Truncate => handle.truncate(size, Truncate::default()).await,
                CallKind::Flush => handle.flush().await,
            }
        });
        scene.rest().await;
        let draining = drain(&bench);
        scene.rest().await;
        must(!draining.is_done() && bench.handle.in_flight() == 1, || {
            format!("a drain didn't wait for a {kind:?}")
        })?;
        topped.probe.unblock(kind);
        draining.await;
        must(request.is_done(), || format!("the {kind:?} hasn't ended"))?;
        // A driver that can't resize has said so.
        let result = request.await;
        must(result.is_ok() || kind == CallKind::Truncate, || {
            format!("{kind:?}: {result:?}")
        })?;
    }
    bench.model[..512].fill(1);
    bench.model[512..1024].fill(0);
    bench.adopt_discard(1024, 512).await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

/// One request of each kind, of those that leave the content alone or write what is there.
fn all_kinds(bench: &Bench) -> Vec<Running<block_core::Result<()>>> {
    let data = bench.model[..512].to_vec();
    let size = bench.size();
    (0..8)
        .map(|kind| {
            let (handle, data) = (bench.handle.clone(), data.clone());
            bench.start(async move {
                match kind {
                    0 => handle.read(0, 512).await.map(drop),
                    1 => handle.write(0, data, NONE).await,
                    2 => handle.write_zeroes(512, 512, NONE).await,
                    3 => handle.flush().await,
                    4 => handle.block_status(0, size).await.map(drop),
                    5 => handle.info().await.map(drop),
                    6 => handle
                        .is_allocated_above(None, false, 0, size)
                        .await
                        .map(drop),
                    // Not every driver has it; it has to wait all the same.
                    _ => {
                        handle
                            .check(CheckMode::ReadOnly, Progress::new())
                            .map(|_| Ok(()))
                            .await
                    }
                }
            })
        })
        .collect()
}

async fn holds_back(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let drained = scene.lab.graph.drain(&bench.node).await;
    let position = bench.disk.log_position();
    let running = all_kinds(&bench);
    scene.rest().await;
    for (at, request) in running.iter().enumerate() {
        must(!request.is_done(), || format!("request {at} was let in"))?;
    }
    let reached = bench.disk.log_since(position);
    must(reached.is_empty() && bench.handle.in_flight() == 0, || {
        format!("in a drained section the storage got {}", reached.len())
    })?;
    drop(drained);
    for request in running {
        request.await?;
    }
    bench.model[512..1024].fill(0);
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn nest(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 4096).await?;
    let graph = &scene.lab.graph;
    let storage = bench
        .node
        .edges()
        .primary()
        .map(|child| child.node().clone());
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let mut guards = [
            Some(graph.drain(&bench.node).await),
            Some(graph.drain_all().await),
            match &storage {
                Some(storage) => Some(graph.drain(storage).await),
                None => None,
            },
        ];
        let data = bench.data(0, 512);
        let (handle, bytes) = (bench.handle.clone(), data.clone());
        let write = bench.start(async move { handle.write(0, bytes, NONE).await });
        for (done, at) in order.into_iter().enumerate() {
            scene.rest().await;
            must(!write.is_done(), || {
                format!("it went on after {done} of three sections")
            })?;
            guards[at] = None;
        }
        write.await?;
        bench.expect(0, &data);
    }
    drop(storage);
    bench.finish().await
}

async fn above_and_below(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let bench = bench.overlay(4).await?;
    let graph = &scene.lab.graph;
    let Some(base) = bench.node.backing() else {
        return not_covered("there is no backing file");
    };
    let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let reader = Arc::new(graph.attach(&base, reader, "reader of the base")?);
    let read = |handle: &Arc<BlockHandle>| {
        let handle = handle.clone();
        bench.start(async move { handle.read(0, 512).await.map(drop) })
    };
    let drained = graph.drain(&base).await;
    let (above, below) = (read(&bench.handle), read(&reader));
    scene.rest().await;
    must(!above.is_done() && !below.is_done(), || {
        "the backing file was drained, and somebody went on".into()
    })?;
    drop(drained);
    above.await?;
    below.await?;
    let drained = graph.drain(&bench.node).await;
    let (above, below) = (read(&bench.handle), read(&reader));
    scene.rest().await;
    must(!above.is_done() && below.is_done(), || {
        "the overlay was drained, and that stopped the wrong one".into()
    })?;
    drop(drained);
    above.await?;
    below.await?;
    drop((reader, base));
    bench.finish().await
}

async fn others(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 4096).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, "other", bench.size(), &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "other", None, &Options::new())
        .await?;
    let other = lab.attach(&node, "other")?;
    let drained = lab.graph.drain(&bench.node).await;
    other.write(0, vec![1; 512], NONE).await?;
    let all = lab.graph.drain_all().await;
    drop(drained);
    let (mine, theirs) = (bench.handle.clone(), other.clone());
    let mine = bench.start(async move { mine.read(0, 512).await.map(drop) });
    let theirs = bench.start(async move { theirs.read(0, 512).await.map(drop) });
    scene.rest().await;
    must(!mine.is_done() && !theirs.is_done(), || {
        "somebody went on".into()
    })?;
    drop(all);
    mine.await?;
    theirs.await?;
    drop(other);
    lab.graph.release(&node).await?;
    bench.finish().await
}

async fn exception(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let last = scene.lab.attach(&bench.node, "the last one")?;
    let drained = scene.lab.graph.drain_except(&bench.node, &last).await;
    let handle = bench.handle.clone();
    let read = bench.start(async move { handle.read(0, 512).await.map(drop) });
    let data = bench.data(100, 1000);
    last.write(100, data.clone(), NONE).await?;
    last.flush().await?;
    scene.rest().await;
    must(!read.is_done(), || "another one went on".into())?;
    bench.expect(100, &data);
    drop(drained);
    read.await?;
    drop(last);
    bench.finish().await
}

async fn given_up(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let parked = bench.park(512, 512).await?;
    let graph = scene.lab.graph.clone();
    let node = bench.node.clone();
    {
        let mut drain = Box::pin(graph.drain(&node));
        must((&mut drain).now_or_never().is_none(), || {
            "it didn't wait".into()
        })?;
        let handle = bench.handle.clone();
        let read = bench.start(async move { handle.read(4096, 512).await.map(drop) });
        scene.rest().await;
        must(!read.is_done(), || "a request was let in".into())?;
        drop(drain);
        scene.rest().await;
        must(read.is_done(), || {
            "a drain that was given up still holds requests back".into()
        })?;
    }
    bench.write(8192, 512).await?;
    parked.land().await?;
    // And the next one isn't confused.
    drop(graph.drain(&node).await);
    drop(node);
    bench.finish().await
}

async fn made_inside(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let drained = scene.lab.graph.drain(&bench.node).await;
    let newcomer = scene.lab.attach(&bench.node, "newcomer")?;
    let data = bench.data(0, 512);
    let (handle, bytes) = (newcomer.clone(), data.clone());
    let write = bench.start(async move { handle.write(0, bytes, NONE).await });
    scene.rest().await;
    must(!write.is_done(), || "a newcomer was let in".into())?;
    drop(drained);
    write.await?;
    bench.expect(0, &data);
    drop(newcomer);
    bench.finish().await
}

async fn sub_requests(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let base_disk = bench.disk.clone();
    let mut bench = bench.overlay(4).await?;
    let Some(base) = bench.node.backing() else {
        return not_covered("there is no backing file");
    };
    // The write has to read below what it doesn't cover, and that read is held.
    let hold = base_disk.hold(Choose::reads(), Stage::Before);
    let data = bench.data(700, 100);
    let (handle, bytes) = (bench.handle.clone(), data.clone());
    let write = bench.start(async move { handle.write(700, bytes, NONE).await });
    scene.rest().await;
    must(hold.arrivals() > 0, || {
        "nothing was read from the backing file".into()
    })?;
    let graph = scene.lab.graph.clone();
    let node = base.clone();
    let drain = bench.start(async move { drop(graph.drain(&node).await) });
    scene.rest().await;
    must(!drain.is_done(), || "the drain didn't wait".into())?;
    hold.release();
    drain.await;
    write.await?;
    bench.expect(700, &data);
    drop(base);
    bench.finish().await
}
