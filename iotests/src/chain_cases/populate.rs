//! Reads with COPY_ON_READ: what they bring up, what they leave alone, and that nobody sees a difference.

use std::sync::Arc;

use block_core::{Buffer, ErrorKind, Options, RequestFlags, flags::Permissions};

use crate::{
    bench::{Bench, CallKind, Outcome, Stop, case, must, same, wrong},
    case::{Case, Group, Scene},
    storage::OpKind,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Backing,
            "backing-copying-read-makes-independent",
            "what was read with COPY_ON_READ, rounded out to clusters, is in the overlay: it stays without the backing file",
            independent,
        ),
        case(
            Group::Backing,
            "backing-prefetch-copies-and-returns-nothing",
            "a read with PREFETCH copies what a copying read would, and leaves its buffer as it was",
            prefetch,
        ),
        case(
            Group::Backing,
            "backing-copying-read-copies-only-what-is-missing",
            "a copying read over clusters that the overlay has and hasn't writes only those that it hasn't",
            only_missing,
        ),
        case(
            Group::Backing,
            "backing-copying-read-of-zeroes-stays-zero",
            "zeroes from below are copied as zeroes: they take no space as data",
            zeroes,
        ),
        case(
            Group::Backing,
            "backing-copying-read-over-the-end-of-a-shorter-one",
            "a copying read across the end of a shorter backing file brings its data and zeroes behind it",
            over_the_end,
        ),
        case(
            Group::Backing,
            "backing-copying-read-needs-write-unchanged-only",
            "a handle with 'write unchanged' may read with COPY_ON_READ, and a read-only image refuses it",
            permission,
        ),
        case(
            Group::Backing,
            "backing-copying-read-that-cant-write-fails",
            "a copying read whose copy can't be written fails with that error, and the content is what it was",
            fails,
        ),
    ]
}

/// An overlay over a full backing file.
async fn overlay(scene: &Arc<Scene>, clusters: u64) -> Result<Bench, Stop> {
    let mut bench = Bench::new(scene, clusters).await?;
    bench.write(0, bench.size()).await?;
    bench.overlay(clusters).await
}

/// A read with flags, checked against the model unless it is a prefetch. Gives what is in the buffer.
async fn read(bench: &Bench, offset: u64, len: u64, flags: RequestFlags) -> Result<Vec<u8>, Stop> {
    let mut buffer = Buffer::try_new(len as usize)?;
    buffer.fill(0xee);
    let (lent, buf) = buffer.lend();
    bench
        .handle
        .readv(offset, buf, flags | RequestFlags::COPY_ON_READ)
        .await?;
    let Ok(buffer) = lent.reclaim() else {
        return wrong("a driver kept a part of a read buffer");
    };
    if !flags.contains(RequestFlags::PREFETCH) {
        let expected = &bench.model[offset as usize..(offset + len) as usize];
        same(&buffer, expected, offset, "the copying read")?;
    }
    Ok(buffer.to_vec())
}

/// What a copying read of a range brings up: the range in whole units of the driver's.
fn rounded(bench: &Bench, offset: u64, len: u64) -> std::ops::Range<u64> {
    let unit = bench.node.limits().serialising_granularity.max(1);
    let end = (offset + len).next_multiple_of(unit).min(bench.size());
    offset - offset % unit..end
}

/// Every byte of the range, in whole units, is decided by the image itself.
async fn is_own(bench: &Bench, offset: u64, len: u64) -> Outcome {
    let std::ops::Range { start, end } = rounded(bench, offset, len);
    let mut at = start;
    while at < end {
        let status = bench.handle.block_status(at, end - at).await?;
        must(status.depth == 0 && status.len > 0, || {
            format!("{at:#x} is decided at depth {}", status.depth)
        })?;
        at += status.len;
    }
    Ok(())
}

async fn independent(scene: Arc<Scene>) -> Outcome {
    let mut bench = overlay(&scene, 10).await?;
    let cluster = bench.cluster;
    let none = RequestFlags::empty();
    let ranges = [
        (2 * cluster + 700, cluster),
        (6 * cluster - 1, 2),
        (9 * cluster + 512, 10),
    ];
    for (offset, len) in ranges {
        read(&bench, offset, len, none).await?;
        is_own(&bench, offset, len).await?;
    }
    bench.check_all("with the backing file").await?;
    // Without it, what wasn't read is gone.
    let graph = &scene.lab.graph;
    let base = bench.node.backing();
    if let Some(base) = &base {
        graph.keep(base);
    }
    graph.set_backing(&bench.node, None).await?;
    let full = bench.model.clone();
    bench.model.fill(0);
    for (offset, len) in ranges {
        let range = rounded(&bench, offset, len);
        let range = range.start as usize..range.end as usize;
        bench.model[range.clone()].copy_from_slice(&full[range]);
    }
    bench.check_all("without the backing file").await?;
    graph.set_backing(&bench.node, base.as_ref()).await?;
    if let Some(base) = base {
        graph.release(&base).await?;
    }
    bench.model = full;
    bench.finish().await
}

async fn prefetch(scene: Arc<Scene>) -> Outcome {
    let bench = overlay(&scene, 8).await?;
    let cluster = bench.cluster;
    let flags = RequestFlags::PREFETCH;
    let buffer = read(&bench, cluster + 5, 3 * cluster, flags).await?;
    must(buffer.iter().all(|byte| *byte == 0xee), || {
        "its buffer was written to".into()
    })?;
    is_own(&bench, cluster + 5, 3 * cluster).await?;
    let status = bench.handle.block_status(5 * cluster, cluster).await?;
    must(status.depth == 1, || "it copied too much".into())?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn only_missing(scene: Arc<Scene>) -> Outcome {
    let mut bench = overlay(&scene, 10).await?;
    let cluster = bench.cluster;
    bench.write(2 * cluster, cluster).await?;
    bench.write(5 * cluster, 2 * cluster).await?;
    let topped = bench.through(crate::bench::Probe::new())?;
    let image = bench.scene.lab.attach(&bench.node, "image")?;
    let before = bench.node.stats().snapshot().write_bytes;
    let (lent, buf) = Buffer::try_new(8 * cluster as usize - 200)?.lend();
    image
        .readv(cluster + 100, buf, RequestFlags::COPY_ON_READ)
        .await?;
    let Ok(found) = lent.reclaim() else {
        return wrong("a driver kept a part of a read buffer");
    };
    let from = cluster as usize + 100;
    same(
        &found,
        &bench.model[from..from + found.len()],
        from as u64,
        "the copying read",
    )?;
    let copied = bench.node.stats().snapshot().write_bytes - before;
    must(copied == 5 * cluster, || {
        format!("{copied} bytes were copied for five clusters")
    })?;
    must(
        topped
            .probe
            .take()
            .iter()
            .all(|call| call.kind != CallKind::Write),
        || "the copy took another way".into(),
    )?;
    drop(image);
    bench.take_off(topped).await?;
    is_own(&bench, cluster, 8 * cluster).await?;
    bench.finish().await
}

async fn zeroes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, 2 * cluster).await?;
    let bench = bench.overlay(8).await?;
    read(&bench, 0, 2 * cluster, RequestFlags::empty()).await?;
    read(&bench, 2 * cluster, 4 * cluster, RequestFlags::empty()).await?;
    let stats = bench.node.stats().snapshot();
    must(
        stats.write_bytes == 2 * cluster && stats.zero_bytes == 4 * cluster,
        || format!("written {}, zeroed {}", stats.write_bytes, stats.zero_bytes),
    )?;
    bench.check_all("afterwards").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn over_the_end(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 2 * cluster + 1536).await?;
    let cluster = bench.cluster;
    bench.write(0, bench.size()).await?;
    let bench = bench.overlay_of(4 * cluster + 512).await?;
    read(&bench, 2 * cluster + 1000, 1000, RequestFlags::empty()).await?;
    is_own(&bench, 2 * cluster + 1000, 1000).await?;
    read(
        &bench,
        cluster,
        bench.size() - cluster,
        RequestFlags::empty(),
    )
    .await?;
    bench.check_all("afterwards").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn permission(scene: Arc<Scene>) -> Outcome {
    let bench = overlay(&scene, 4).await?;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
    let handle = bench.attach(may, Permissions::all(), "copier")?;
    let (lent, buf) = Buffer::try_new(512)?.lend();
    handle.readv(512, buf, RequestFlags::COPY_ON_READ).await?;
    drop((lent, handle));
    is_own(&bench, 512, 512).await?;
    let bench = bench
        .reopen_with(Options::new().with("read-only", true))
        .await?;
    let before = bench.disk.log_position();
    let (lent, buf) = Buffer::try_new(512)?.lend();
    let at = 2 * bench.cluster;
    match bench
        .handle
        .readv(at, buf, RequestFlags::COPY_ON_READ)
        .await
    {
        Err(error) if error.kind() == ErrorKind::NotPermitted => {}
        other => return wrong(format!("a copying read of a read-only image: {other:?}")),
    }
    drop(lent);
    let log = bench.disk.log_since(before);
    must(
        log.iter().all(|entry| entry.op.kind == OpKind::Read),
        || "it was written to".into(),
    )?;
    bench.finish().await
}

async fn fails(scene: Arc<Scene>) -> Outcome {
    let bench = overlay(&scene, 4).await?;
    let writes = crate::storage::Choose::writes();
    bench
        .disk
        .fail(writes, ErrorKind::NoSpace, crate::storage::Stage::Before);
    let (lent, buf) = Buffer::try_new(512)?.lend();
    match bench
        .handle
        .readv(512, buf, RequestFlags::COPY_ON_READ)
        .await
    {
        Err(error) if error.kind() == ErrorKind::NoSpace => {}
        other => return wrong(format!("a copying read without space: {other:?}")),
    }
    drop(lent);
    bench.disk.clear_rules();
    bench.check_all("after the failure").await?;
    read(&bench, 512, 512, RequestFlags::empty()).await?;
    is_own(&bench, 512, 512).await?;
    bench.finish().await
}
