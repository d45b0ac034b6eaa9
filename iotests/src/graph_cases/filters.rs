//! Filters that come and go above an image and below it, with requests in flight: those that were let in before go the old
//! way, those that come later go the new one, and nothing is lost between.

use std::sync::Arc;

use block_core::{
    ChildRole, ErrorKind, NodeSpec, RequestFlags,
    bitmap::DirtyBitmap,
    flags::{PermissionSet, Permissions},
};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, Stop, Topped, case, must, wrong},
    case::{Case, Group, Scene},
    storage::{BESIDE, OpInfo, OpKind},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Graph,
            "graph-filter-is-inserted-under-io",
            "inserting a filter waits for a write in flight, which doesn't go through it; requests that come meanwhile and \
             later do",
            inserted,
        ),
        case(
            Group::Graph,
            "graph-filter-is-removed-under-io",
            "removing a filter waits for a write in flight through it; later requests go past it",
            removed,
        ),
        case(
            Group::Graph,
            "graph-filter-in-the-middle-is-removed",
            "of two filters above each other the lower one can be taken out, and the upper one stays",
            middle,
        ),
        case(
            Group::Graph,
            "graph-filter-between-image-and-storage",
            "a filter can be put between an image and its storage and taken out again while the image is written to, and \
             everything that the image asks of its storage goes through it meanwhile",
            below,
        ),
        case(
            Group::Graph,
            "graph-limits-follow-a-change-below",
            "when a filter with an alignment comes below an image, the image's requests are aligned from then on, and when \
             it goes they needn't be",
            limits_follow,
        ),
        case(
            Group::Graph,
            "graph-flush-through-a-new-filter-covers-earlier-writes",
            "a flush through a filter that has just been inserted, or past one that was removed, makes durable what was \
             written before",
            flush_covers,
        ),
        case(
            Group::Graph,
            "graph-bitmap-below-a-filter-goes-on-recording",
            "a bitmap of an image records what is written through a filter that came above it, also by other handles",
            bitmap_below,
        ),
        case(
            Group::Graph,
            "graph-filter-that-is-in-somebodys-way-isnt-inserted",
            "inserting a filter whose user doesn't share what the image's producers need is refused, with everything as it \
             was",
            refused,
        ),
        case(
            Group::Graph,
            "graph-not-a-filter-cant-be-inserted",
            "a node that filters nothing can't be inserted or removed as a filter",
            no_filter,
        ),
    ]
}

const NONE: RequestFlags = RequestFlags::empty();

/// A probe above the image without a handle of its own: kept until it is released.
fn filter(bench: &Bench, probe: Probe) -> Result<Topped, Stop> {
    let topped = bench.top(probe)?;
    bench.scene.lab.graph.keep(&topped.node);
    Ok(topped)
}

async fn inserted(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let graph = scene.lab.graph.clone();
    let Topped {
        probe,
        node,
        handle,
    } = filter(&bench, Probe::new())?;
    drop(handle);
    let parked = bench.park(512, 1024).await?;
    let (changing, filter) = (graph.clone(), node.clone());
    let change = bench.start(async move { changing.insert_filter(&filter).await });
    scene.rest().await;
    must(
        !change.is_done() && bench.handle.node().id() == bench.node.id(),
        || "the filter came while a write was in flight".into(),
    )?;
    let data = bench.data(4096, 512);
    let (handle, bytes) = (bench.handle.clone(), data.clone());
    let meanwhile = bench.start(async move { handle.write(4096, bytes, NONE).await });
    scene.rest().await;
    must(!meanwhile.is_done(), || {
        "a write was let in meanwhile".into()
    })?;
    parked.land().await?;
    change.await?;
    meanwhile.await?;
    bench.expect(4096, &data);
    bench.write(8192, 512).await?;
    let calls = probe.take_ranges();
    let expected = [(CallKind::Write, 4096, 512), (CallKind::Write, 8192, 512)];
    must(calls == expected, || format!("the filter got {calls:?}"))?;
    must(bench.handle.node().id() == node.id(), || {
        "the handle isn't on the filter".into()
    })?;
    graph.remove_filter(&node).await?;
    graph.release(&node).await?;
    must(bench.handle.node().id() == bench.node.id(), || {
        "the handle isn't back".into()
    })?;
    bench.finish().await
}

async fn removed(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let graph = scene.lab.graph.clone();
    let Topped {
        probe,
        node,
        handle,
    } = filter(&bench, Probe::new())?;
    drop(handle);
    graph.insert_filter(&node).await?;
    let parked = bench.park(512, 512).await?;
    must(probe.take().len() == 1, || {
        "the write didn't go through the filter".into()
    })?;
    let (changing, filter) = (graph.clone(), node.clone());
    let change = bench.start(async move { changing.remove_filter(&filter).await });
    scene.rest().await;
    must(!change.is_done(), || {
        "the filter went while a write was in flight".into()
    })?;
    parked.land().await?;
    change.await?;
    bench.write(2048, 512).await?;
    bench.handle.flush().await?;
    let calls = probe.take();
    must(calls.is_empty(), || {
        format!("the filter still got {calls:?}")
    })?;
    graph.release(&node).await?;
    must(graph.node(node.name()).is_none(), || {
        "the filter's node is still there".into()
    })?;
    bench.finish().await
}

async fn middle(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let graph = &scene.lab.graph;
    let lower = filter(&bench, Probe::new())?;
    graph.insert_filter(&lower.node).await?;
    let upper = Arc::new(Probe::new());
    let spec = NodeSpec::new(upper.clone());
    let upper_node = graph.add_node(spec.with_child(ChildRole::Filtered, "file", &lower.node))?;
    graph.keep(&upper_node);
    graph.insert_filter(&upper_node).await?;
    bench.write(0, 512).await?;
    let seen = (upper.take().len(), lower.probe.take().len());
    must(seen == (1, 1), || format!("the filters got {seen:?} calls"))?;
    graph.remove_filter(&lower.node).await?;
    bench.write(512, 512).await?;
    let seen = (upper.take().len(), lower.probe.take().len());
    must(seen == (1, 0), || {
        format!("without the lower one they got {seen:?} calls")
    })?;
    graph.remove_filter(&upper_node).await?;
    drop(lower.handle);
    graph.release(&upper_node).await?;
    graph.release(&lower.node).await?;
    bench.check_all("without filters").await?;
    bench.finish().await
}

/// A filter over the image's storage.
fn over_storage(bench: &Bench, probe: Probe) -> Result<(Arc<Probe>, Arc<block_core::Node>), Stop> {
    let graph = &bench.scene.lab.graph;
    let edges = bench.node.edges();
    let Some(child) = edges.primary() else {
        return crate::bench::not_covered("the image has no storage of its own");
    };
    let probe = Arc::new(probe.with(block_core::Capabilities::GROW));
    let spec = NodeSpec::new(probe.clone());
    let node = graph.add_node(spec.with_child(ChildRole::Filtered, "file", child.node()))?;
    graph.keep(&node);
    Ok((probe, node))
}

async fn below(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.write(0, 4 * bench.cluster).await?;
    let graph = scene.lab.graph.clone();
    let (probe, node) = over_storage(&bench, Probe::new())?;
    let parked = bench.park(512, 1024).await?;
    let (changing, filter) = (graph.clone(), node.clone());
    let change = bench.start(async move { changing.insert_filter(&filter).await });
    scene.rest().await;
    must(!change.is_done(), || {
        "it came while a write was in flight".into()
    })?;
    parked.land().await?;
    change.await?;
    must(probe.take().is_empty(), || {
        "an old request went through it".into()
    })?;
    let position = bench.disk.log_position();
    bench.write(3 * bench.cluster, 4 * bench.cluster).await?;
    bench
        .zero(bench.cluster, bench.cluster, RequestFlags::MAY_UNMAP)
        .await?;
    bench.handle.flush().await?;
    let through = probe.take();
    let reached = bench.disk.log_since(position);
    let writes = |kind| matches!(kind, OpKind::Write | OpKind::WriteZeroes | OpKind::Discard);
    // Of the file that the filter is above, where an image has two.
    let below = node.filename().unwrap_or_default();
    let base = scene.lab.disks.place(&below).map_or(0, |(_, base)| base);
    let here = |op: &OpInfo| writes(op.kind) && op.offset & BESIDE == base;
    let stored = reached.iter().filter(|entry| here(&entry.op)).count();
    let seen = through
        .iter()
        .filter(|call| {
            matches!(
                call.kind,
                CallKind::Write | CallKind::Zero | CallKind::Discard
            )
        })
        .count();
    must(stored > 0 && stored == seen, || {
        format!("the storage got {stored} changes, {seen} of them through the filter")
    })?;
    bench.check_all("through it").await?;
    graph.remove_filter(&node).await?;
    probe.take();
    bench.write(9 * bench.cluster, bench.cluster).await?;
    bench.handle.flush().await?;
    must(probe.take().is_empty(), || {
        "something still went through it".into()
    })?;
    graph.release(&node).await?;
    bench.finish().await
}

async fn limits_follow(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let graph = &scene.lab.graph;
    let before = bench.handle.limits();
    let (probe, node) = over_storage(&bench, Probe::new().aligned(512))?;
    // What a node says is what its driver says of the children that it has now.
    let image = bench.node.clone();
    let up_to_date = |when: &str| {
        let said = image.driver().limits(&image.edges());
        must(image.limits() == said, || {
            format!("{when} the limits are out of date")
        })
    };
    graph.insert_filter(&node).await?;
    up_to_date("with the filter")?;
    for (offset, len) in [(100, 50), (511, 2), (bench.cluster - 1, 1025)] {
        bench.write(offset, len).await?;
        bench.check_range(offset, len, "through the filter").await?;
    }
    bench.handle.flush().await?;
    for call in probe.take() {
        let moves = matches!(call.kind, CallKind::Read | CallKind::Write | CallKind::Zero);
        let aligned = call.offset % 512 == 0 && call.len % 512 == 0;
        must(!moves || aligned, || format!("it got {call:?}"))?;
    }
    graph.remove_filter(&node).await?;
    must(bench.handle.limits() == before, || {
        "the limits aren't what they were".into()
    })?;
    up_to_date("without the filter")?;
    graph.release(&node).await?;
    drop(image);
    bench.check_all("without it").await?;
    bench.finish().await
}

async fn flush_covers(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.cluster).await?;
    bench.handle.flush().await?;
    let graph = &scene.lab.graph;
    bench.disk.track_durability();
    let env = scene.lab.env.clone();
    let Topped { node, handle, .. } = filter(&bench, Probe::new())?;
    drop(handle);
    bench.write(bench.cluster, 2 * bench.cluster).await?;
    graph.insert_filter(&node).await?;
    bench.handle.flush().await?;
    let inserted = (bench.disk.power_cut(&*env), bench.model.clone());
    bench.write(3 * bench.cluster, bench.cluster).await?;
    graph.remove_filter(&node).await?;
    bench.handle.flush().await?;
    let removed = (bench.disk.power_cut(&*env), bench.model.clone());
    graph.release(&node).await?;
    let mut bench = bench.reopen().await?;
    let clean = (bench.disk.content(), bench.model.clone());
    for (content, model) in [inserted, removed] {
        bench.model = model;
        bench = bench.restored(content).await?;
        bench.check_all("after a power cut").await?;
        bench.only_leaks().await?;
    }
    bench.model = clean.1;
    bench.restored(clean.0).await?.finish().await
}

async fn bitmap_below(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let bitmap = Arc::new(DirtyBitmap::new(bench.size(), 512)?);
    bench.node.add_bitmap(bitmap.clone());
    let Topped { node, handle, .. } = filter(&bench, Probe::new())?;
    let graph = &scene.lab.graph;
    graph.insert_filter(&node).await?;
    bench.write(1024, 512).await?;
    let data = bench.data(4096, 512);
    handle.write(4096, data.clone(), NONE).await?;
    bench.expect(4096, &data);
    must(
        bitmap.dirty_granules() == 2 && bitmap.is_dirty(1024) && bitmap.is_dirty(4096),
        || format!("{bitmap:?}"),
    )?;
    graph.remove_filter(&node).await?;
    bench.zero(2048, 512, NONE).await?;
    must(bitmap.dirty_granules() == 3, || format!("{bitmap:?}"))?;
    bench.node.remove_bitmap(&bitmap);
    drop(handle);
    graph.release(&node).await?;
    bench.finish().await
}

async fn refused(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let graph = &scene.lab.graph;
    let Topped {
        probe,
        node,
        handle,
    } = filter(&bench, Probe::new())?;
    // Somebody at the filter who uses nothing, and shares no resizing.
    drop(handle);
    let set = PermissionSet::new(
        Permissions::empty(),
        Permissions::all() - Permissions::RESIZE,
    );
    let keeper = match graph.attach(&node, set, "keeper") {
        Ok(keeper) => keeper,
        // It doesn't even get there, for the filter passes it on.
        Err(error) if error.kind() == ErrorKind::NotPermitted => {
            must(error.to_string().contains("'guest'"), || error.to_string())?;
            let read = Permissions::CONSISTENT_READ | Permissions::WRITE;
            bench
                .handle
                .set_permissions(PermissionSet::new(read, Permissions::all()))?;
            let keeper = graph.attach(&node, set, "keeper")?;
            let all = bench.handle.set_permissions(crate::lab::all_permissions());
            must(all.is_err(), || "the conflict isn't seen any more".into())?;
            graph.insert_filter(&node).await?;
            bench.write(0, 512).await?;
            must(probe.take().len() == 1, || "the filter isn't there".into())?;
            drop(keeper);
            graph.remove_filter(&node).await?;
            graph.release(&node).await?;
            bench
                .handle
                .set_permissions(crate::lab::all_permissions())?;
            return bench.finish().await;
        }
        Err(error) => return Err(error.into()),
    };
    match graph.insert_filter(&node).await {
        Err(error) if error.kind() == ErrorKind::NotPermitted => {}
        other => return wrong(format!("inserting it: {other:?}")),
    }
    must(bench.handle.node().id() == bench.node.id(), || {
        "the handle has moved".into()
    })?;
    bench.write(0, 512).await?;
    must(probe.take().is_empty(), || "a write went through it".into())?;
    drop(keeper);
    graph.release(&node).await?;
    bench.finish().await
}

async fn no_filter(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 512).await?;
    let graph = &scene.lab.graph;
    for result in [
        graph.insert_filter(&bench.node).await,
        graph.remove_filter(&bench.node).await,
    ] {
        match result {
            Err(error) if error.kind() == ErrorKind::InvalidInput => {}
            other => return wrong(format!("a format as a filter: {other:?}")),
        }
    }
    bench.write(512, 512).await?;
    bench.finish().await
}
