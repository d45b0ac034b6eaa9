//! Growing and shrinking: what is kept, what reads as zeroes, what never comes back, and what is refused with nothing changed.

use std::sync::Arc;

use block_core::{
    Capabilities, ErrorKind, Operation, RequestFlags,
    bitmap::DirtyBitmap,
    driver::{Preallocation, Truncate},
    flags::Permissions,
};

use crate::{
    bench::{Bench, Outcome, case, must, not_covered, pattern, same, wrong},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case(
            Group::Rw,
            "rw-grow-by-a-sector-at-a-time",
            "a disk that grows sector by sector keeps its content and its length, also across a cluster's edge and when it \
             is opened again",
            by_sectors,
        ),
        case(
            Group::Rw,
            "rw-grow-to-a-thousand-times-the-size",
            "a disk that grows far beyond what its mapping tables had room for keeps its content, reads as zeroes behind it \
             and can be written at its end",
            a_thousand_times,
        ),
        case(
            Group::Rw,
            "rw-grow-in-steps-with-data-in-each",
            "growing again and again with writes between keeps everything that was written",
            in_steps,
        ),
        case(
            Group::Rw,
            "rw-shrink-keeps-what-is-left",
            "a disk that is cut at and inside clusters keeps what is before the cut, refuses requests behind it, and is \
             clean",
            shrink,
        ),
        case(
            Group::Rw,
            "rw-what-was-cut-off-never-comes-back",
            "a disk that is cut and grows again reads as zeroes from the cut on, also inside of the cluster where it was",
            cut_and_grown,
        ),
        case(
            Group::Rw,
            "rw-shrink-to-nothing-and-back",
            "a disk can be cut to nothing and grown again, and reads as zeroes",
            to_nothing,
        ),
        case(
            Group::Rw,
            "rw-resize-to-the-same-length",
            "resizing to the length that there is changes nothing",
            same_length,
        ),
        case(
            Group::Rw,
            "rw-resize-to-the-impossible-is-refused",
            "lengths beyond every limit are refused, with content and length as they were",
            impossible,
        ),
        case(
            Group::Rw,
            "rw-resize-without-the-capability",
            "a driver without resize refuses it with ENOTSUP and keeps its length",
            without,
        ),
        case(
            Group::Rw,
            "rw-resize-needs-its-permission",
            "a handle that may write but not resize is refused, by the permission's name",
            permission,
        ),
        case(
            Group::Rw,
            "rw-bitmaps-follow-a-resize",
            "bitmaps have the new length, keep what was dirty, and are clean where the disk is new",
            bitmaps,
        ),
        case(
            Group::Rw,
            "rw-resize-is-durable-when-flushed",
            "after a resize and a flush a power cut leaves the new length and the old content",
            durable,
        ),
    ];
    for (mode, name) in [
        (Preallocation::Metadata, "metadata"),
        (Preallocation::Falloc, "falloc"),
        (Preallocation::Full, "full"),
    ] {
        cases.push(case(
            Group::Rw,
            format!("rw-grow-with-preallocation-{name}"),
            format!(
                "a disk that grows with preallocation={name} reads as zeroes where it is new and can be written there, or it \
                 refuses and stays as it was"
            ),
            move |scene| preallocated(scene, mode),
        ));
    }
    cases
}

async fn by_sectors(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 3 * cluster - 1536).await?;
    bench.write(0, bench.size()).await?;
    for round in 0..6 {
        bench.truncate(bench.size() + 512).await?;
        let length = bench.node.length();
        must(length == bench.size(), || {
            format!("it is {length} bytes long")
        })?;
        bench.check_all("after a sector more").await?;
        if round % 2 == 0 {
            bench.write(bench.size() - 512, 512).await?;
        }
        if round == 3 {
            bench = bench.reopen().await?;
        }
    }
    bench.check_all("at the end").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn a_thousand_times(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    let (old, cluster) = (bench.model.clone(), bench.cluster);
    let mut length = 16 * cluster;
    // Some formats have room for so much and no more.
    let mut reached = 0;
    while length <= 4096 * cluster {
        match bench.handle.truncate(length, Truncate::default()).await {
            Ok(()) => reached = length,
            Err(error) if reached > 0 && error.kind() == ErrorKind::TooBig => break,
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                return not_covered("the driver can't grow");
            }
            Err(error) => return Err(error.into()),
        }
        length *= 16;
    }
    let data = pattern(9, reached - 700, 700);
    bench
        .handle
        .write(reached - 700, data.clone(), RequestFlags::empty())
        .await?;
    for middle in [reached / 2, reached - 2 * cluster, old.len() as u64] {
        let found = bench.handle.read(middle, 1024).await?;
        same(&found, &[0; 1024], middle, "what is new")?;
    }
    bench.handle.flush().await?;
    bench.own_check().await?;
    // Back to what a model can hold.
    match bench
        .handle
        .truncate(old.len() as u64, Truncate::default())
        .await
    {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            let found = bench.handle.read(0, old.len()).await?;
            same(&found, &old, 0, "what was there before")?;
            return bench.close_only().await;
        }
        Err(error) => return Err(error.into()),
    }
    bench.finish().await
}

async fn in_steps(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 2).await?;
    for step in 1..8 {
        let old = bench.size();
        bench.write(old - 1000, 1000).await?;
        bench.truncate(old + step * bench.cluster + 512).await?;
        bench.write(old - 100, 200).await?;
        if step % 3 == 0 {
            bench.handle.flush().await?;
            bench.own_check().await?;
        }
    }
    bench.check_all("after all steps").await?;
    bench.finish().await
}

async fn shrink(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.write(0, bench.size()).await?;
    bench
        .zero(2 * bench.cluster, 2 * bench.cluster, RequestFlags::empty())
        .await?;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    for length in [
        9 * bench.cluster,
        7 * bench.cluster + 512,
        3 * bench.cluster,
    ] {
        bench.truncate(length).await?;
        bench.check_all("after the cut").await?;
        let handle = bench.attach(may, Permissions::all(), "beyond")?;
        for result in [
            handle
                .write(length - 1, vec![1; 2], RequestFlags::empty())
                .await,
            handle.read(length, 1).await.map(drop),
        ] {
            must(result.is_err(), || {
                "a request behind the cut succeeded".into()
            })?;
        }
        drop(handle);
        bench.handle.flush().await?;
        bench.own_check().await?;
        bench = bench.reopen().await?;
        bench.check_all("opened again").await?;
    }
    bench.finish().await
}

async fn cut_and_grown(scene: Arc<Scene>) -> Outcome {
    for (name, compressed) in [("plain", false), ("compressed", true)] {
        let mut bench = Bench::new(&scene, 8).await?;
        let cluster = bench.cluster;
        if compressed {
            if !bench.capabilities().contains(Capabilities::COMPRESSED) {
                return bench.finish().await;
            }
            let data = vec![7; 4 * cluster as usize];
            let flags = RequestFlags::WRITE_COMPRESSED;
            bench.handle.write(2 * cluster, data.clone(), flags).await?;
            bench.expect(2 * cluster, &data);
        } else {
            bench.write(0, bench.size()).await?;
        }
        bench.truncate(4 * cluster + 512).await?;
        bench.truncate(8 * cluster).await?;
        bench.check_all(&format!("{name}, cut and grown")).await?;
        bench.truthful().await?;
        bench.write(4 * cluster + 1024, 10).await?;
        bench
            .truncate(4 * cluster + 1030)
            .await
            .or_else(|stop| match stop {
                // Not every format has such lengths.
                crate::bench::Stop::Failed(_) => Ok(()),
                other => Err(other),
            })?;
        let length = bench.node.length();
        bench.truncate(8 * cluster).await?;
        must(
            length == 8 * cluster || length == 4 * cluster + 1030,
            || format!("an odd cut left {length} bytes"),
        )?;
        bench
            .check_all(&format!("{name}, cut and grown once more"))
            .await?;
        bench.finish().await?;
    }
    Ok(())
}

async fn to_nothing(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let size = bench.size();
    bench.truncate(0).await?;
    must(bench.handle.read(0, 1).await.is_err(), || {
        "there is still a byte".into()
    })?;
    bench.handle.flush().await?;
    let mut bench = bench.reopen().await?;
    bench.truncate(size).await?;
    bench.check_all("grown again").await?;
    bench.write(size / 2, 1000).await?;
    bench.finish().await
}

async fn same_length(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 4 * cluster + 512).await?;
    bench.write(0, bench.size()).await?;
    bench.truncate(bench.size()).await?;
    bench.check_all("afterwards").await?;
    bench.write(bench.size() - 1, 1).await?;
    bench.finish().await
}

async fn impossible(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    bench.write(0, bench.size()).await?;
    for length in [u64::MAX, 1 << 63, (1 << 63) - (1 << 30) + 512] {
        match bench.handle.truncate(length, Truncate::default()).await {
            Err(error) if error.operation() == Some(Operation::Truncate) => {}
            other => return wrong(format!("a length of {length:#x}: {other:?}")),
        }
        must(bench.node.length() == bench.size(), || {
            "the length has changed".into()
        })?;
    }
    bench.check_all("afterwards").await?;
    bench.write(bench.size() - 512, 512).await?;
    bench.finish().await
}

async fn without(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    if bench.capabilities().contains(Capabilities::TRUNCATE) {
        return not_covered("the driver has truncate");
    }
    bench.write(0, bench.size()).await?;
    for length in [2 * bench.size(), bench.size() / 2, 0] {
        match bench.handle.truncate(length, Truncate::default()).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {}
            other => return wrong(format!("a resize: {other:?}")),
        }
    }
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn permission(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let handle = bench.attach(may, Permissions::all(), "writer")?;
    match handle.truncate(2 * bench.size(), Truncate::default()).await {
        Err(error)
            if error.kind() == ErrorKind::NotPermitted
                && error.to_string().contains("'resize'") => {}
        other => return wrong(format!("a resize without permission: {other:?}")),
    }
    drop(handle);
    bench.finish().await
}

async fn bitmaps(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let bitmap = Arc::new(DirtyBitmap::new(bench.size(), 1024)?);
    bench.node.add_bitmap(bitmap.clone());
    let cluster = bench.cluster;
    bench.write(cluster, 1024).await?;
    bench.write(6 * cluster, 1024).await?;
    bench.truncate(20 * cluster).await?;
    must(
        bitmap.length() == bench.size() && bitmap.dirty_granules() == 2,
        || format!("{bitmap:?} over {} bytes", bitmap.length()),
    )?;
    bench.write(19 * cluster, 1).await?;
    must(bitmap.is_dirty(19 * cluster), || {
        "a write in the new part isn't recorded".into()
    })?;
    if bench.truncate(4 * cluster).await.is_ok() {
        must(
            bitmap.length() == bench.size() && bitmap.dirty_granules() == 1,
            || format!("after a cut: {bitmap:?} over {} bytes", bitmap.length()),
        )?;
    }
    bench.node.remove_bitmap(&bitmap);
    bench.finish().await
}

async fn durable(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    bench.handle.flush().await?;
    bench.disk.track_durability();
    bench.truncate(50 * bench.cluster).await?;
    bench.write(40 * bench.cluster, 512).await?;
    bench.handle.flush().await?;
    let env = scene.lab.env.clone();
    let cuts: Vec<_> = (0..3).map(|_| bench.disk.power_cut(&*env)).collect();
    let mut bench = bench.reopen().await?;
    let clean = bench.disk.content();
    for content in cuts {
        bench = bench.restored(content).await?;
        bench.check_all("after the power cut").await?;
        bench.only_leaks().await?;
    }
    bench.restored(clean).await?.finish().await
}

async fn preallocated(scene: Arc<Scene>, mode: Preallocation) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    bench.write(0, bench.size()).await?;
    let length = 12 * bench.cluster + 512;
    let how = Truncate {
        preallocation: mode,
        ..Truncate::default()
    };
    match bench.handle.truncate(length, how).await {
        Ok(()) => bench.resized(length),
        Err(error) => {
            let kind = error.kind();
            must(
                matches!(kind, ErrorKind::NotSupported | ErrorKind::InvalidInput),
                || format!("preallocation: {error}"),
            )?;
            bench.finish().await?;
            return not_covered("the driver has no such preallocation");
        }
    }
    bench.check_all("after growing").await?;
    bench.truthful().await?;
    bench.write(7 * bench.cluster + 100, 100).await?;
    bench
        .zero(9 * bench.cluster, bench.cluster, RequestFlags::MAY_UNMAP)
        .await?;
    bench.check_all("after writes into it").await?;
    bench.finish().await
}
