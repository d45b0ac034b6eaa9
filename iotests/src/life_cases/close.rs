//! Closing: everything is written back and durable, the storage is given up, and what was opened only to be read isn't
//! touched.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, Options, RequestFlags};

use crate::{
    bench::{Bench, Outcome, case, must, wrong},
    case::{Case, Group, Scene},
    lab::all_permissions,
    storage::{Choose, OpKind, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-close-makes-everything-durable",
            "what was written before a handle was closed is there after a power cut, without a flush, and the image is clean",
            durable,
        ),
        case(
            Group::Rw,
            "rw-close-that-cant-flush-says-so",
            "closing an image whose storage can't be flushed reports the error, and the image is closed all the same",
            failing,
        ),
        case(
            Group::Rw,
            "rw-opened-and-closed-without-a-write-is-untouched",
            "an image that is opened, read and closed, writable or not, has the same bytes in its storage as before",
            untouched,
        ),
        case(
            Group::Rw,
            "rw-open-and-close-many-times",
            "opening, changing and closing an image many times leaves no nodes behind and loses nothing",
            many_times,
        ),
        case(
            Group::Rw,
            "rw-dropped-handle-finishes-what-it-began",
            "a handle that is dropped while its write is in flight doesn't take the write with it, and the image can't be \
             closed before it has ended",
            dropped_handle,
        ),
    ]
}

async fn durable(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 10).await?;
    bench.handle.flush().await?;
    bench.disk.track_durability();
    bench.write(bench.cluster / 2, 4 * bench.cluster).await?;
    bench
        .zero(2 * bench.cluster, bench.cluster, RequestFlags::MAY_UNMAP)
        .await?;
    if bench.capabilities().contains(Capabilities::DISCARD) {
        bench.discard(3 * bench.cluster, bench.cluster).await?;
    }
    // Its own handle, because closing takes it.
    let handle = scene
        .lab
        .graph
        .attach(&bench.node, all_permissions(), "closer")?;
    let (disk, env) = (bench.disk.clone(), scene.lab.env.clone());
    let bench = bench.closed_by(handle).await?;
    let clean = disk.content();
    let cuts: Vec<_> = (0..3).map(|_| disk.power_cut(&*env)).collect();
    let mut bench = bench;
    for content in cuts {
        bench = bench.restored(content).await?;
        bench.check_all("after the power cut").await?;
        // It was closed: there isn't even a leak.
        bench.own_check().await?;
    }
    bench.restored(clean).await?.finish().await
}

async fn failing(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    bench.handle.flush().await?;
    let lab = &scene.lab;
    let format = scene.format.name.clone();
    let (disk, name) = (bench.disk.clone(), bench.disk.name().to_owned());
    let content = {
        let bench = bench.reopen().await?;
        let content = disk.content();
        bench.close_only().await?;
        content
    };
    let node = lab.open(&format, &name, None, &Options::new()).await?;
    let handle = lab.graph.attach(&node, all_permissions(), "closer")?;
    handle
        .write(100, vec![5; 5000], RequestFlags::empty())
        .await?;
    disk.fail(
        Choose::any().kind(OpKind::Flush),
        ErrorKind::Io,
        Stage::Before,
    );
    match handle.close().await {
        Err(error) if error.kind() == ErrorKind::Io => {}
        other => return wrong(format!("closing it: {other:?}")),
    }
    drop(node);
    must(lab.graph.nodes().is_empty(), || {
        format!("left open: {:?}", lab.graph.nodes())
    })?;
    disk.clear_rules();
    disk.restore(content);
    let node = lab.open(&format, &name, None, &Options::new()).await?;
    lab.graph.release(&node).await?;
    Ok(())
}

async fn untouched(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(100, 3 * bench.cluster).await?;
    let mut bench = bench.reopen().await?;
    for read_only in [false, true] {
        let options = Options::new().with("read-only", read_only);
        bench = bench.reopen_with(options).await?;
        let before = bench.disk.content().all_bytes();
        let position = bench.disk.log_position();
        bench.check_all("opened").await?;
        bench.handle.block_status(0, bench.size()).await?;
        bench.handle.flush().await?;
        bench.own_check().await?;
        bench = bench.reopen().await?;
        let log = bench.disk.log_since(position);
        let wrote = |kind| !matches!(kind, OpKind::Read | OpKind::Flush);
        must(!log.iter().any(|entry| wrote(entry.op.kind)), || {
            format!("with read-only={read_only} the storage was written to")
        })?;
        must(bench.disk.content().all_bytes() == before, || {
            "its bytes have changed".into()
        })?;
    }
    let options = Options::new();
    bench.reopen_with(options).await?.finish().await
}

async fn many_times(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    for round in 0..12 {
        bench.write(round * 700, 1000).await?;
        bench
            .zero((round % 7) * bench.cluster, 512, RequestFlags::MAY_UNMAP)
            .await?;
        bench = bench.reopen().await?;
        let nodes = scene.lab.graph.nodes().len();
        must(nodes == bench.own_nodes(), || {
            format!("{nodes} nodes for an image and its storage")
        })?;
        bench.check_all("opened again").await?;
    }
    bench.finish().await
}

async fn dropped_handle(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let other = scene.lab.attach(&bench.node, "other")?;
    let parked = bench.park_at(&other, 512, 1024).await?;
    drop(other);
    let graph = scene.lab.graph.clone();
    let node = bench.node.clone();
    let drain = bench.start(async move {
        drop(graph.drain(&node).await);
    });
    scene.rest().await;
    must(!drain.is_done(), || {
        "a drain didn't wait for the write".into()
    })?;
    parked.land().await?;
    drain.await;
    bench.check_all("afterwards").await?;
    bench.finish().await
}
