//! Backing files that change while they are read: requests keep the one that they began with.

use std::sync::Arc;

use block_core::{Node, NodeSpec, Options, RequestFlags, driver::ChildRole};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, Stop, case, must, not_covered, same, wrong},
    case::{Case, Group, Scene},
    storage::{Choose, Disk, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Graph,
            "graph-backing-file-is-taken-away-under-io",
            "taking the backing file away waits for a read of it in flight, which returns its data; afterwards zeroes are \
             read, and copied up",
            taken_away,
        ),
        case(
            Group::Graph,
            "graph-backing-file-is-exchanged-under-io",
            "exchanging the backing file waits for a read in flight, and later reads see the new one",
            exchanged,
        ),
        case(
            Group::Graph,
            "graph-filter-above-a-backing-file",
            "a filter between an overlay and its backing file is on the way of every read from below, and changes nothing \
             of content and status",
            filtered,
        ),
        case(
            Group::Graph,
            "graph-backing-file-in-use-stays-when-its-overlay-goes",
            "a backing file that somebody else reads as well outlives the overlay, and is closed when the last one goes",
            outlives,
        ),
        case(
            Group::Graph,
            "graph-two-overlays-of-one-backing-file",
            "two overlays of one open backing file each see their own writes and nothing of the other's",
            two_overlays,
        ),
    ]
}

const NONE: RequestFlags = RequestFlags::empty();

/// An overlay over a full backing file, and that.
async fn overlay(scene: &Arc<Scene>) -> Result<(Bench, Arc<Node>, Arc<Disk>), Stop> {
    let mut bench = Bench::new(scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let disk = bench.disk.clone();
    let bench = bench.overlay(6).await?;
    match bench.node.backing() {
        Some(base) => {
            scene.lab.graph.keep(&base);
            Ok((bench, base, disk))
        }
        None => not_covered("there is no backing file"),
    }
}

async fn taken_away(scene: Arc<Scene>) -> Outcome {
    let (mut bench, base, disk) = overlay(&scene).await?;
    let cluster = bench.cluster;
    bench.write(cluster, cluster).await?;
    let graph = scene.lab.graph.clone();
    let hold = disk.hold(Choose::reads(), Stage::Before);
    let handle = bench.handle.clone();
    let read = bench.start(async move { handle.read(0, 2 * cluster as usize).await });
    scene.rest().await;
    must(hold.arrivals() > 0, || "nothing was read from below".into())?;
    let (changing, node) = (graph.clone(), bench.node.clone());
    let change = bench.start(async move { changing.set_backing(&node, None).await });
    scene.rest().await;
    must(!change.is_done() && bench.node.backing().is_some(), || {
        "it didn't wait".into()
    })?;
    hold.release();
    let found = read.await?;
    same(
        &found,
        &bench.model[..2 * cluster as usize],
        0,
        "the read that was in flight",
    )?;
    change.await?;
    let full = bench.model.clone();
    bench.model[..cluster as usize].fill(0);
    bench.model[2 * cluster as usize..].fill(0);
    bench.check_all("without a backing file").await?;
    // What is copied up now is zeroes.
    bench.write(3 * cluster + 100, 100).await?;
    bench.check_all("after a small write").await?;
    let own = bench.model[3 * cluster as usize..4 * cluster as usize].to_vec();
    graph.set_backing(&bench.node, Some(&base)).await?;
    graph.release(&base).await?;
    bench.model = full;
    let now = bench.handle.read(3 * cluster, cluster as usize).await?;
    // As far as the driver's unit reaches, it is the overlay's.
    same(
        &now[100..200],
        &own[100..200],
        3 * cluster + 100,
        "what was written without it",
    )?;
    bench.expect(3 * cluster, &now);
    bench.check_all("with it again").await?;
    drop(base);
    bench.finish().await
}

async fn exchanged(scene: Arc<Scene>) -> Outcome {
    let (mut bench, base, disk) = overlay(&scene).await?;
    let cluster = bench.cluster;
    bench.write(cluster, cluster).await?;
    let (lab, format) = (&scene.lab, scene.format.name.as_str());
    // The same image with other data in it: its storage is a copy, changed in place.
    lab.disks.insert(Disk::new("other", disk.content()));
    let node = lab.open(format, "other", None, &Options::new()).await?;
    let writer = lab.attach(&node, "writer")?;
    let data = crate::bench::pattern(77, 3 * cluster, cluster);
    writer.write(3 * cluster, data.clone(), NONE).await?;
    writer.flush().await?;
    drop(writer);
    lab.graph.release(&node).await?;
    let read_only = Options::new().with("read-only", true);
    let other = lab.open(format, "other", None, &read_only).await?;
    let hold = disk.hold(Choose::reads(), Stage::Before);
    let handle = bench.handle.clone();
    let read = bench.start(async move { handle.read(3 * cluster, cluster as usize).await });
    scene.rest().await;
    let (changing, node, new) = (lab.graph.clone(), bench.node.clone(), other.clone());
    let change = bench.start(async move { changing.set_backing(&node, Some(&new)).await });
    scene.rest().await;
    must(!change.is_done(), || "it didn't wait".into())?;
    hold.release();
    let from = 3 * cluster as usize;
    let expected = bench.model[from..from + cluster as usize].to_vec();
    same(
        &read.await?,
        &expected,
        3 * cluster,
        "the read that was in flight",
    )?;
    change.await?;
    let now = bench.handle.read(3 * cluster, cluster as usize).await;
    match now {
        Ok(found) => {
            same(&found, &data, 3 * cluster, "a read from the new one")?;
            bench.check_range(0, 3 * cluster, "elsewhere").await?;
        }
        // Some formats see that a parent isn't the one that they were made for.
        Err(error) if error.kind() == block_core::ErrorKind::InvalidInput => {}
        Err(error) => return Err(error.into()),
    }
    lab.graph.set_backing(&bench.node, Some(&base)).await?;
    lab.graph.release(&other).await?;
    lab.graph.release(&base).await?;
    drop((base, other));
    bench.check_all("with the old one again").await?;
    bench.finish().await
}

async fn filtered(scene: Arc<Scene>) -> Outcome {
    let (mut bench, base, _) = overlay(&scene).await?;
    let cluster = bench.cluster;
    bench.write(cluster, cluster).await?;
    let graph = &scene.lab.graph;
    let probe = Arc::new(Probe::new());
    let spec = NodeSpec::new(probe.clone());
    let filter = graph.add_node(spec.with_child(ChildRole::Filtered, "file", &base))?;
    graph.keep(&filter);
    graph.insert_filter(&filter).await?;
    bench.check_all("through the filter").await?;
    bench.truthful().await?;
    let calls = probe.take();
    let read: u64 = calls
        .iter()
        .filter(|call| call.kind == CallKind::Read)
        .map(|call| call.len)
        .sum();
    must(read >= 5 * cluster, || {
        format!("{read} bytes were read through it")
    })?;
    bench.write(3 * cluster + 5, 5).await?;
    must(!probe.take().is_empty(), || {
        "what was copied up didn't go through it".into()
    })?;
    let (allocated, _) = bench
        .handle
        .is_allocated_above(Some(&base), false, 0, cluster)
        .await?;
    must(!allocated, || {
        "the filter counts as a layer that decides".into()
    })?;
    graph.remove_filter(&filter).await?;
    graph.release(&filter).await?;
    graph.release(&base).await?;
    drop((base, filter));
    bench.finish().await
}

async fn outlives(scene: Arc<Scene>) -> Outcome {
    let (bench, base, _) = overlay(&scene).await?;
    let graph = &scene.lab.graph;
    let name = base.name().to_owned();
    let set = block_core::PermissionSet::new(
        block_core::Permissions::CONSISTENT_READ,
        block_core::Permissions::all(),
    );
    let reader = graph.attach(&base, set, "reader")?;
    graph.release(&base).await?;
    let expected = bench.model[..512].to_vec();
    let bench = bench.reopen().await?;
    same(
        &reader.read(0, 512).await?,
        &expected,
        0,
        "the backing file on its own",
    )?;
    must(graph.node(&name).is_some(), || "its node is gone".into())?;
    drop(reader);
    graph.release(&base).await?;
    must(graph.node(&name).is_none(), || {
        "its node is still there".into()
    })?;
    drop(base);
    bench.finish().await
}

async fn two_overlays(scene: Arc<Scene>) -> Outcome {
    let (mut bench, base, _) = overlay(&scene).await?;
    let cluster = bench.cluster;
    let (lab, format) = (&scene.lab, &scene.format);
    let backing = Some(("disk0", format.name.as_str()));
    lab.create(
        &format.name,
        "second",
        bench.size(),
        &format.create,
        backing,
    )
    .await?;
    let options = Options::new().with("backing", base.name());
    let node = match lab.open(&format.name, "second", None, &options).await {
        Ok(node) => node,
        Err(error) => return wrong(format!("a second overlay: {error}")),
    };
    let second = lab.attach(&node, "second guest")?;
    let mut model = bench.model.clone();
    bench.write(cluster + 10, 2 * cluster).await?;
    let data = crate::bench::pattern(5, 2 * cluster, cluster);
    second.write(2 * cluster, data.clone(), NONE).await?;
    let at = 2 * cluster as usize;
    model[at..at + data.len()].copy_from_slice(&data);
    let found = second.read(0, model.len()).await?;
    same(&found, &model, 0, "the second overlay")?;
    bench.check_all("the first overlay").await?;
    second.flush().await?;
    drop(second);
    lab.graph.release(&node).await?;
    lab.graph.release(&base).await?;
    drop(base);
    bench.finish().await
}
