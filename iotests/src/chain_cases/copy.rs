//! Copy-range: from image to image and inside of one, through memory where the storage can't, and refused where that is
//! forbidden.

use std::sync::Arc;

use block_core::{ErrorKind, Options, RequestFlags, copy_range, flags::Permissions};

use crate::{
    bench::{Bench, Outcome, case, must, same, wrong},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-copy-range-from-image-to-image",
            "copied ranges of any alignment arrive where they should and nowhere else, and the source stays as it is",
            between,
        ),
        case(
            Group::Rw,
            "rw-copy-range-inside-one-image",
            "a range of an image is copied to another place of the same image",
            inside,
        ),
        case(
            Group::Rw,
            "rw-copy-range-without-fallback-or-permission",
            "a copy that the storage can't do by itself fails with ENOTSUP under NO_FALLBACK, without the permission with \
             EPERM, and past the end with EIO; nothing is changed",
            refused,
        ),
    ]
}

async fn between(scene: Arc<Scene>) -> Outcome {
    let mut source = Bench::new(&scene, 8).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    let cluster = source.cluster;
    source.write(cluster / 2, 5 * cluster).await?;
    let size = 6 * cluster;
    lab.create(&format.name, "target", size, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "target", None, &Options::new())
        .await?;
    let target = lab.attach(&node, "target")?;
    let mut model = vec![0; size as usize];
    for (from, to, len) in [
        (0, cluster, 2 * cluster),
        (cluster + 1, 512, 1000),
        (7 * cluster, 4 * cluster, cluster),
        (3 * cluster, 3 * cluster + 77, 2 * cluster),
        (100, 100, 0),
    ] {
        copy_range(
            &source.handle,
            from,
            &target,
            to,
            len,
            RequestFlags::empty(),
        )
        .await?;
        let data = source.model[from as usize..(from + len) as usize].to_vec();
        model[to as usize..(to + len) as usize].copy_from_slice(&data);
        let found = target.read(0, size as usize).await?;
        same(&found, &model, 0, "after a copy")?;
    }
    drop(target);
    lab.graph.release(&node).await?;
    source.finish().await
}

async fn inside(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, 3 * cluster).await?;
    let handle = bench.handle.clone();
    copy_range(
        &handle,
        512,
        &handle,
        4 * cluster,
        2 * cluster,
        RequestFlags::FUA,
    )
    .await?;
    drop(handle);
    let data = bench.model[512..512 + 2 * cluster as usize].to_vec();
    bench.expect(4 * cluster, &data);
    bench.finish().await
}

async fn refused(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 2 * bench.cluster).await?;
    let cluster = bench.cluster;
    let handle = bench.handle.clone();
    let flags = RequestFlags::NO_FALLBACK;
    let reader = bench.attach(Permissions::CONSISTENT_READ, Permissions::all(), "reader")?;
    let none = RequestFlags::empty();
    for (what, kind, result) in [
        (
            "without fallback",
            ErrorKind::NotSupported,
            copy_range(&handle, 0, &handle, 2 * cluster, cluster, flags).await,
        ),
        (
            "without permission",
            ErrorKind::NotPermitted,
            copy_range(&handle, 0, &reader, 2 * cluster, cluster, none).await,
        ),
        (
            "from past the end",
            ErrorKind::Io,
            copy_range(&handle, 4 * cluster - 512, &handle, 0, 1024, none).await,
        ),
    ] {
        match result {
            Err(error) if error.kind() == kind => {}
            other => return wrong(format!("a copy {what}: {other:?}")),
        }
    }
    must(reader.in_flight() == 0 && handle.in_flight() == 0, || {
        "something is in flight".into()
    })?;
    drop((reader, handle));
    bench.finish().await
}
