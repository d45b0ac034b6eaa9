//! Reopening: read-only and back, with requests in flight, and with options that can and can't be changed.

use std::sync::Arc;

use block_core::{
    BlockHandle, ErrorKind, IoBuf, RequestFlags,
    driver::Reopen,
    flags::{PermissionSet, Permissions},
};
use serde_json::{Map, Value};

use crate::{
    bench::{Bench, Outcome, Stop, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
    storage::OpKind,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-reopen-read-only-and-back",
            "an image that is made read-only refuses changes and leaves its storage alone; made writable again it takes them",
            there_and_back,
        ),
        case(
            Group::Rw,
            "rw-reopen-read-only-makes-everything-durable",
            "what was written before an image is made read-only is there after a power cut, without a flush",
            durable,
        ),
        case(
            Group::Rw,
            "rw-reopen-waits-for-requests-in-flight",
            "making an image read-only waits for a write in flight, and a write that comes meanwhile is refused afterwards \
             or done before",
            waits,
        ),
        case(
            Group::Rw,
            "rw-reopen-changes-how-discards-are-treated",
            "discard=ignore and discard=unmap can be switched on an open image, and so can zero detection",
            own_options,
        ),
        case(
            Group::Rw,
            "rw-reopen-with-an-unknown-option-changes-nothing",
            "an option that nobody knows, or a value that is none, is refused, and the image goes on as it was, also when it \
             was to change its mode",
            unknown,
        ),
        case(
            Group::Rw,
            "rw-reopen-of-an-overlay-leaves-the-backing-file-read-only",
            "an overlay can be made read-only and writable again, and its backing file stays read-only",
            overlay,
        ),
    ]
}

fn mode(read_only: bool) -> Reopen {
    Reopen {
        read_only: Some(read_only),
        ..Reopen::default()
    }
}

fn option(key: &str, value: &str) -> Reopen {
    let mut options = Map::new();
    options.insert(key.to_owned(), Value::String(value.to_owned()));
    Reopen {
        options,
        ..Reopen::default()
    }
}

/// What a handle needs of an image that is about to become read-only.
fn only_read(handle: &BlockHandle) -> Outcome {
    let set = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    Ok(handle.set_permissions(set)?)
}

fn everything(handle: &BlockHandle) -> Outcome {
    Ok(handle.set_permissions(crate::lab::all_permissions())?)
}

async fn reopen(bench: &Bench, changes: Reopen) -> Outcome {
    match bench.handle.reopen(changes).await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            not_covered("the driver has no reopen")
        }
        other => Ok(other?),
    }
}

async fn there_and_back(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.write(0, 4 * bench.cluster).await?;
    for _ in 0..2 {
        only_read(&bench.handle)?;
        reopen(&bench, mode(true)).await?;
        must(bench.node.driver().is_read_only(), || {
            "it isn't read-only".into()
        })?;
        let position = bench.disk.log_position();
        bench.check_all("read-only").await?;
        everything(&bench.handle)?;
        let none = RequestFlags::empty();
        for result in [
            bench.handle.write(0, vec![1; 512], none).await,
            bench.handle.write_zeroes(0, 512, none).await,
            bench.handle.discard(0, 512).await,
        ] {
            match result {
                Err(error) if error.kind() == ErrorKind::NotPermitted => {}
                other => return wrong(format!("a change of a read-only image: {other:?}")),
            }
        }
        bench.handle.flush().await?;
        let log = bench.disk.log_since(position);
        let quiet = |kind| matches!(kind, OpKind::Read | OpKind::Flush);
        must(log.iter().all(|entry| quiet(entry.op.kind)), || {
            "its storage was written to".into()
        })?;
        reopen(&bench, mode(false)).await?;
        bench
            .write(3 * bench.cluster + 100, 2 * bench.cluster)
            .await?;
        bench.check_all("writable again").await?;
    }
    bench.finish().await
}

async fn durable(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.handle.flush().await?;
    bench.disk.track_durability();
    bench.write(bench.cluster, 5 * bench.cluster).await?;
    bench
        .zero(2 * bench.cluster, bench.cluster, RequestFlags::MAY_UNMAP)
        .await?;
    only_read(&bench.handle)?;
    reopen(&bench, mode(true)).await?;
    let env = scene.lab.env.clone();
    let cuts: Vec<_> = (0..3).map(|_| bench.disk.power_cut(&*env)).collect();
    reopen(&bench, mode(false)).await?;
    everything(&bench.handle)?;
    let mut bench = bench.reopen().await?;
    let clean = bench.disk.content();
    if scene.format.name == "raw" || bench.handle.info().await?.cluster_size.is_none() {
        // It caches nothing: what isn't flushed is the storage's business.
        return not_covered("the driver has no metadata of its own");
    }
    for content in cuts {
        bench = bench.restored(content).await?;
        bench.check_all("after the power cut").await?;
        bench.only_leaks().await?;
    }
    bench.restored(clean).await?.finish().await
}

async fn waits(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.write(0, 4 * bench.cluster).await?;
    let parked = bench.park(bench.cluster, 1024).await?;
    let handle = bench.handle.clone();
    let changing = bench.start(async move { handle.reopen(mode(true)).await });
    scene.rest().await;
    must(
        !changing.is_done() && !bench.node.driver().is_read_only(),
        || "it didn't wait for a write in flight".into(),
    )?;
    let data = bench.data(3 * bench.cluster, 512);
    let (handle, bytes, at) = (bench.handle.clone(), data.clone(), 3 * bench.cluster);
    let later = bench.start(async move { handle.write(at, bytes, RequestFlags::empty()).await });
    scene.rest().await;
    must(!later.is_done(), || {
        "a write was let in while it reopened".into()
    })?;
    parked.land().await?;
    match changing.await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            later.await?;
            return not_covered("the driver has no reopen");
        }
        other => other?,
    }
    match later.await {
        Err(error) if error.kind() == ErrorKind::NotPermitted => {}
        other => return wrong(format!("a write that came meanwhile: {other:?}")),
    }
    bench.check_all("read-only").await?;
    reopen(&bench, mode(false)).await?;
    bench.write(0, 100).await?;
    bench.finish().await
}

async fn own_options(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.write(0, bench.size()).await?;
    let cluster = bench.cluster;
    bench.handle.reopen(option("discard", "ignore")).await?;
    bench.handle.flush().await?;
    let position = bench.disk.log_position();
    bench.handle.discard(0, bench.size()).await?;
    must(bench.disk.log_since(position).is_empty(), || {
        "a discard got through".into()
    })?;
    bench.check_all("with discard=ignore").await?;
    bench.handle.reopen(option("discard", "unmap")).await?;
    bench.discard(0, cluster).await?;
    bench.check_all("with discard=unmap").await?;
    let zeroes = || IoBuf::zeroes(cluster as usize);
    let zeroed = |bench: &Bench| bench.node.stats().snapshot().zero_ops;
    let before = zeroed(&bench);
    bench.handle.reopen(option("detect-zeroes", "on")).await?;
    bench
        .handle
        .write(cluster, zeroes(), RequestFlags::empty())
        .await?;
    must(zeroed(&bench) == before + 1, || {
        "zeroes weren't detected".into()
    })?;
    bench.handle.reopen(option("detect-zeroes", "off")).await?;
    bench
        .handle
        .write(2 * cluster, zeroes(), RequestFlags::empty())
        .await?;
    must(zeroed(&bench) == before + 1, || {
        "zeroes were still detected".into()
    })?;
    bench.model[cluster as usize..3 * cluster as usize].fill(0);
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn unknown(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let ignore_and_detect = {
        let mut both = option("discard", "ignore");
        both.options.insert("detect-zeroes".into(), "unmap".into());
        both
    };
    let mut to_read_only = option("no-such-option", "1");
    to_read_only.read_only = Some(true);
    for changes in [
        option("no-such-option", "1"),
        option("discard", "bogus"),
        option("detect-zeroes", "bogus"),
        ignore_and_detect,
        to_read_only,
    ] {
        let text = format!("{:?}", changes.options);
        must(bench.handle.reopen(changes).await.is_err(), || {
            format!("{text} was taken")
        })?;
        must(!bench.node.driver().is_read_only(), || {
            format!("{text} made it read-only")
        })?;
        bench.write(512, 1024).await?;
        bench.discard(bench.cluster, bench.cluster).await?;
    }
    // None of it has stuck.
    let stats = bench.node.stats().snapshot();
    bench
        .handle
        .write(0, IoBuf::zeroes(512), RequestFlags::empty())
        .await?;
    bench.model[..512].fill(0);
    must(
        bench.node.stats().snapshot().zero_ops == stats.zero_ops,
        || "zero detection is on".into(),
    )?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn overlay(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let mut bench = bench.overlay(6).await?;
    bench.write(100, 100).await?;
    let read_only = |bench: &Bench| -> Result<(), Stop> {
        let base = bench.node.backing();
        must(
            base.is_some_and(|base| base.driver().is_read_only()),
            || "the backing file is writable".into(),
        )
    };
    only_read(&bench.handle)?;
    reopen(&bench, mode(true)).await?;
    read_only(&bench)?;
    bench.check_all("read-only").await?;
    reopen(&bench, mode(false)).await?;
    everything(&bench.handle)?;
    read_only(&bench)?;
    bench.write(3 * bench.cluster + 7, 7).await?;
    bench.finish().await
}
