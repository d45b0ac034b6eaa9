//! What the path records: dirty bitmaps and counters, for every kind of request, whether it succeeded or not.

use std::sync::Arc;

use block_core::{ErrorKind, RequestFlags, bitmap::DirtyBitmap};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must, wrong},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (change, name) in [
        (Change::Write, "write"),
        (Change::Zero, "zero-write"),
        (Change::ZeroByFlag, "zero-write-by-flag"),
        (Change::Discard, "discard"),
        (Change::Detected, "detected-zeroes"),
        (Change::FailedWrite, "failed-write"),
        (Change::FailedZero, "failed-zero-write"),
        (Change::Compressed, "compressed-write"),
    ] {
        cases.push(case(
            Group::Rw,
            format!("rw-bitmap-records-{name}"),
            format!(
                "a dirty bitmap has exactly the granules that a {} touched, whatever came of it",
                name.replace('-', " ")
            ),
            move |scene| recorded(scene, change),
        ));
    }
    cases.push(case(
        Group::Rw,
        "rw-bitmaps-are-independent",
        "bitmaps of different granularity record each for themselves, one that is switched off or taken away records \
         nothing, and reads and refused requests are never recorded",
        independent,
    ));
    cases.push(case(
        Group::Rw,
        "rw-bitmap-records-at-the-end-not-at-the-beginning",
        "a write is recorded by the time it has ended: a bitmap that was cleared while it was in flight has it",
        at_the_end,
    ));
    cases.push(case(
        Group::Rw,
        "rw-counters-count-operations-and-bytes",
        "each kind of request is counted once with its own length, failed ones without bytes, refused ones not at all",
        counters,
    ));
    cases
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Change {
    Write,
    Zero,
    ZeroByFlag,
    Discard,
    Detected,
    FailedWrite,
    FailedZero,
    Compressed,
}

async fn recorded(scene: Arc<Scene>, change: Change) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    if change == Change::Compressed {
        bench.needs(block_core::Capabilities::COMPRESSED)?;
    } else {
        bench.write(0, bench.size()).await?;
    }
    let mut probe = Probe::new().aligned(512);
    if change == Change::Compressed {
        probe = probe.with(block_core::Capabilities::COMPRESSED);
    }
    let topped = bench.through_with(
        probe,
        match change {
            Change::Detected => &[("detect-zeroes", "on")],
            _ => &[],
        },
    )?;
    let bitmap = Arc::new(DirtyBitmap::new(bench.size(), 1024)?);
    topped.node.add_bitmap(bitmap.clone());
    // Across a granule's border, so that one too many or too few shows.
    let (offset, len) = match change {
        Change::Compressed => (cluster, cluster),
        _ => (2 * cluster - 512, 1024),
    };
    let none = RequestFlags::empty();
    let failed = |result: block_core::Result<()>| match result {
        Err(error) if error.kind() == ErrorKind::NoSpace => Ok(()),
        other => wrong(format!("it was to fail: {other:?}")),
    };
    match change {
        Change::Write => bench.write(offset, len).await?,
        Change::Zero => bench.zero(offset, len, none).await?,
        Change::ZeroByFlag | Change::Detected => {
            let flags = if change == Change::Detected {
                none
            } else {
                RequestFlags::ZERO_WRITE
            };
            bench
                .handle
                .write(offset, vec![0; len as usize], flags)
                .await?;
            bench.model[offset as usize..(offset + len) as usize].fill(0);
        }
        Change::Discard => bench.discard(offset, len).await?,
        Change::FailedWrite => {
            topped.probe.fail(CallKind::Write, 1, ErrorKind::NoSpace);
            failed(
                bench
                    .handle
                    .write(offset, vec![1; len as usize], none)
                    .await,
            )?;
        }
        Change::FailedZero => {
            topped.probe.fail(CallKind::Zero, 1, ErrorKind::NoSpace);
            failed(bench.handle.write_zeroes(offset, len, none).await)?;
        }
        Change::Compressed => {
            bench
                .write_with(offset, len, RequestFlags::WRITE_COMPRESSED)
                .await?;
        }
    }
    let first = offset / 1024 * 1024;
    let bytes = (offset + len).next_multiple_of(1024) - first;
    let run = bitmap.next_dirty(0, u64::MAX);
    must(run == Some((first, bytes)), || {
        format!("dirty is {run:x?}, not {first:#x}+{bytes:#x}")
    })?;
    must(bitmap.dirty_bytes() == bytes, || {
        format!("{} bytes are dirty", bitmap.dirty_bytes())
    })?;
    topped.node.remove_bitmap(&bitmap);
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn independent(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let (cluster, size) = (bench.cluster, bench.size());
    let bitmap =
        |granularity| Ok::<_, block_core::Error>(Arc::new(DirtyBitmap::new(size, granularity)?));
    let [fine, coarse, off, gone] = [bitmap(512)?, bitmap(65536)?, bitmap(512)?, bitmap(512)?];
    for bitmap in [&fine, &coarse, &off, &gone] {
        bench.node.add_bitmap(bitmap.clone());
    }
    off.set_enabled(false);
    bench.node.remove_bitmap(&gone);
    bench.check_range(0, size, "a read").await?;
    for refused in [
        bench
            .handle
            .write_zeroes(u64::MAX - 511, 512, RequestFlags::empty())
            .await,
        bench.handle.discard(size, 512).await,
    ] {
        must(refused.is_err(), || "it was to be refused".into())?;
    }
    must(fine.dirty_granules() == 0, || {
        "a read or refused request was recorded".into()
    })?;
    bench.write(cluster, 512).await?;
    off.set_enabled(true);
    bench.write(3 * cluster, 1).await?;
    let counts = [&fine, &coarse, &off, &gone].map(|bitmap| bitmap.dirty_granules());
    let coarse_granules = if 3 * cluster / 65536 == cluster / 65536 {
        1
    } else {
        2
    };
    must(counts == [2, coarse_granules, 1, 0], || {
        format!("dirty granules: {counts:?}")
    })?;
    for bitmap in [&fine, &coarse, &off] {
        bench.node.remove_bitmap(bitmap);
    }
    bench.finish().await
}

async fn at_the_end(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let bitmap = Arc::new(DirtyBitmap::new(bench.size(), 512)?);
    bench.node.add_bitmap(bitmap.clone());
    let parked = bench.park(1024, 512).await?;
    bitmap.clear_all();
    parked.land().await?;
    must(bitmap.next_dirty(0, u64::MAX) == Some((1024, 512)), || {
        "the write is missing in the bitmap".into()
    })?;
    bench.node.remove_bitmap(&bitmap);
    bench.finish().await
}

async fn counters(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new().aligned(512))?;
    let none = RequestFlags::empty();
    bench.write(100, 1000).await?;
    bench.write(0, 1).await?;
    bench.zero(512, 1024, none).await?;
    bench.handle.discard(2048, 512).await?;
    bench.handle.read(0, 3).await?;
    topped.probe.fail(CallKind::Write, 1, ErrorKind::Io);
    must(
        bench.handle.write(0, vec![1; 512], none).await.is_err(),
        || "no failure".into(),
    )?;
    must(bench.handle.read(u64::MAX, 1).await.is_err(), || {
        "no refusal".into()
    })?;
    bench.handle.flush().await?;
    bench.handle.flush().await?;
    let stats = topped.node.stats().snapshot();
    let found = [
        (stats.read_ops, stats.read_bytes),
        (stats.write_ops, stats.write_bytes),
        (stats.zero_ops, stats.zero_bytes),
        (stats.discard_ops, stats.discard_bytes),
        (stats.flush_ops, stats.failed_ops),
    ];
    let expected = [(1, 3), (3, 1001), (1, 1024), (1, 512), (1, 1)];
    must(found == expected, || {
        format!("counted {found:?}, not {expected:?}")
    })?;
    bench.adopt_discard(2048, 512).await?;
    bench.take_off(topped).await?;
    bench.finish().await
}
