//! Requests that aren't aligned to what the driver takes: writes read, change and write whole blocks, reads cut out what was
//! asked, discards drop what they cover in part; and padded writes hold their blocks while they do it.

use std::sync::Arc;

use block_core::RequestFlags;

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must, wrong},
    case::{Case, Group, Scene},
};

/// Bytes of a block of the probe's.
const BLOCK: u64 = 4096;

/// Where in its blocks a request begins and ends.
#[derive(Debug, Clone, Copy)]
enum Shape {
    Head,
    Tail,
    Both,
    Inside,
    TwoBlocks,
}

impl Shape {
    const ALL: [(Self, &'static str, &'static str); 5] = [
        (Self::Head, "unaligned-head", "that begins inside a block"),
        (Self::Tail, "unaligned-tail", "that ends inside a block"),
        (
            Self::Both,
            "both-ends-unaligned",
            "that begins and ends inside blocks",
        ),
        (
            Self::Inside,
            "inside-one-block",
            "that covers a part of one block",
        ),
        (
            Self::TwoBlocks,
            "across-two-blocks",
            "that covers parts of two neighbouring blocks",
        ),
    ];

    /// Offset and length.
    const fn range(self) -> (u64, u64) {
        match self {
            Self::Head => (3 * BLOCK + 1, 4 * BLOCK - 1),
            Self::Tail => (3 * BLOCK, 4 * BLOCK - 1),
            Self::Both => (3 * BLOCK + 513, 6 * BLOCK + 7),
            Self::Inside => (3 * BLOCK + 511, 2),
            Self::TwoBlocks => (4 * BLOCK - 1, 2),
        }
    }

    /// The reads that a padded write takes: only the blocks that it covers in part, both at once if there is nothing between.
    fn reads(self) -> Vec<(CallKind, u64, u64)> {
        let read = |block: u64, blocks: u64| (CallKind::Read, block * BLOCK, blocks * BLOCK);
        match self {
            Self::Head => vec![read(3, 1)],
            Self::Tail => vec![read(6, 1)],
            Self::Both => vec![read(3, 1), read(9, 1)],
            Self::Inside => vec![read(3, 1)],
            Self::TwoBlocks => vec![read(3, 2)],
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (shape, name, what) in Shape::ALL {
        cases.push(case(
            Group::Rw,
            format!("rw-padded-write-{name}"),
            format!(
                "a write {what} reads the blocks that it covers in part and no others, writes whole blocks in one call, and \
                 changes nothing around it"
            ),
            move |scene| padded_write(scene, shape),
        ));
        cases.push(case(
            Group::Rw,
            format!("rw-padded-read-{name}"),
            format!(
                "a read {what} calls the driver for whole blocks only and returns the right bytes"
            ),
            move |scene| padded_read(scene, shape),
        ));
        cases.push(case(
            Group::Rw,
            format!("rw-padded-zero-write-{name}"),
            format!(
                "a zero write {what} writes the partly covered blocks as data and keeps whole blocks between as one zero write"
            ),
            move |scene| padded_zero(scene, shape),
        ));
        cases.push(case(
            Group::Rw,
            format!("rw-shrunk-discard-{name}"),
            format!("a discard {what} reaches the driver for the whole blocks inside it alone, or not at all"),
            move |scene| shrunk_discard(scene, shape),
        ));
    }
    cases.push(case(
        Group::Rw,
        "rw-aligned-requests-are-passed-on-as-they-are",
        "an aligned request of any kind is one call of the driver, without a read before it",
        aligned,
    ));
    cases.push(case(
        Group::Rw,
        "rw-padded-write-holds-back-a-write-to-the-same-block",
        "between a padded write's read and its write no other write gets into its blocks: both writes are there afterwards",
        holds_back,
    ));
    cases.push(case(
        Group::Rw,
        "rw-padded-write-waits-for-a-write-to-the-same-block",
        "a padded write that arrives while a write to its block is in flight reads the block only after that",
        waits,
    ));
    cases.push(case(
        Group::Rw,
        "rw-two-padded-writes-into-one-block-are-both-there",
        "padded writes to different bytes of one block, sent at once, all end up in it",
        many_in_one_block,
    ));
    cases.push(case(
        Group::Rw,
        "rw-last-short-block-of-the-disk",
        "the last block of a disk whose size isn't a multiple of the alignment can be read, written, zeroed and discarded \
         to its end",
        short_tail,
    ));
    cases
}

async fn prepared(
    scene: &Arc<Scene>,
    probe: Probe,
) -> Result<(Bench, crate::bench::Topped), crate::bench::Stop> {
    let mut bench = Bench::with_size(scene, |cluster| (4 * cluster).max(12 * BLOCK)).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(probe)?;
    Ok((bench, topped))
}

async fn padded_write(scene: Arc<Scene>, shape: Shape) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    let (offset, len) = shape.range();
    bench.write(offset, len).await?;
    let start = offset - offset % BLOCK;
    let stop = (offset + len).next_multiple_of(BLOCK);
    let mut expected = shape.reads();
    expected.push((CallKind::Write, start, stop - start));
    let calls = topped.probe.take_ranges();
    must(calls == expected, || {
        format!("the driver got {calls:?}, not {expected:?}")
    })?;
    bench.check_all("after the padded write").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn padded_read(scene: Arc<Scene>, shape: Shape) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    let (offset, len) = shape.range();
    bench.check_range(offset, len, "the padded read").await?;
    let start = offset - offset % BLOCK;
    let stop = (offset + len).next_multiple_of(BLOCK);
    let mut at = start;
    // However many calls, they cover its blocks once, in order.
    for (kind, from, len) in topped.probe.take_ranges() {
        let follows = kind == CallKind::Read && from == at && len % BLOCK == 0;
        must(follows, || {
            format!("the driver got {kind:?} at {from:#x}+{len:#x}")
        })?;
        at += len;
    }
    must(at == stop, || {
        format!("the driver was asked up to {at:#x}, not {stop:#x}")
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn padded_zero(scene: Arc<Scene>, shape: Shape) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    let (offset, len) = shape.range();
    bench.zero(offset, len, RequestFlags::MAY_UNMAP).await?;
    let calls = topped.probe.take();
    let body = (
        offset.next_multiple_of(BLOCK),
        (offset + len) - (offset + len) % BLOCK,
    );
    let zeroes: Vec<(u64, u64)> = calls
        .iter()
        .filter(|call| call.kind == CallKind::Zero)
        .map(|call| (call.offset, call.offset + call.len))
        .collect();
    let expected = if body.0 < body.1 {
        vec![body]
    } else {
        Vec::new()
    };
    must(zeroes == expected, || {
        format!("the driver zeroed {zeroes:x?}, not {expected:x?}")
    })?;
    for call in &calls {
        let aligned = call.offset % BLOCK == 0 && call.len % BLOCK == 0;
        let unmaps = call.flags.contains(RequestFlags::MAY_UNMAP);
        must(aligned && unmaps == (call.kind == CallKind::Zero), || {
            format!("the driver got {call:?}")
        })?;
    }
    bench.check_all("after the padded zero write").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn shrunk_discard(scene: Arc<Scene>, shape: Shape) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    let (offset, len) = shape.range();
    bench.handle.discard(offset, len).await?;
    let calls = topped.probe.take_ranges();
    let (from, to) = (
        offset.next_multiple_of(BLOCK),
        (offset + len) - (offset + len) % BLOCK,
    );
    let expected = if from < to {
        vec![(CallKind::Discard, from, to - from)]
    } else {
        Vec::new()
    };
    must(calls == expected, || {
        format!("the driver got {calls:?}, not {expected:?}")
    })?;
    bench
        .check_range(0, from.min(offset + len), "before what was discarded")
        .await?;
    if from < to {
        bench.adopt_discard(from, to - from).await?;
    }
    bench.check_all("around what was discarded").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn aligned(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    bench.write(BLOCK, 2 * BLOCK).await?;
    bench.zero(4 * BLOCK, BLOCK, RequestFlags::empty()).await?;
    bench.handle.discard(6 * BLOCK, BLOCK).await?;
    bench.check_range(0, 4 * BLOCK, "aligned").await?;
    let calls = topped.probe.take_ranges();
    let expected = [
        (CallKind::Write, BLOCK, 2 * BLOCK),
        (CallKind::Zero, 4 * BLOCK, BLOCK),
        (CallKind::Discard, 6 * BLOCK, BLOCK),
        (CallKind::Read, 0, 4 * BLOCK),
    ];
    must(calls == expected, || format!("the driver got {calls:?}"))?;
    bench.adopt_discard(6 * BLOCK, BLOCK).await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn holds_back(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    // It has read its block, and its write waits at the storage.
    let parked = bench.park(BLOCK + 512, 512).await?;
    let data = bench.data(BLOCK, BLOCK);
    let (handle, bytes) = (bench.handle.clone(), data.clone());
    let whole = bench.start(async move { handle.write(BLOCK, bytes, RequestFlags::empty()).await });
    let other = bench.data(3 * BLOCK, BLOCK);
    let (handle, bytes) = (bench.handle.clone(), other.clone());
    let elsewhere =
        bench.start(async move { handle.write(3 * BLOCK, bytes, RequestFlags::empty()).await });
    scene.rest().await;
    must(parked.is_waiting() && !whole.is_done(), || {
        "a write got into the block of a padded write".into()
    })?;
    must(elsewhere.is_done(), || {
        "a write to another block was held up".into()
    })?;
    parked.land().await?;
    whole.await?;
    elsewhere.await?;
    bench.expect(BLOCK, &data);
    bench.expect(3 * BLOCK, &other);
    bench.check_all("after both").await?;
    must(topped.node.tracker().waits() == 1, || {
        "it didn't wait at the gate".into()
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn waits(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    let parked = bench.park(BLOCK, BLOCK).await?;
    topped.probe.take();
    let data = bench.data(BLOCK + 100, 50);
    let (handle, bytes) = (bench.handle.clone(), data.clone());
    let padded = bench.start(async move {
        handle
            .write(BLOCK + 100, bytes, RequestFlags::empty())
            .await
    });
    scene.rest().await;
    let calls = topped.probe.take();
    must(calls.is_empty() && !padded.is_done(), || {
        format!("it didn't wait: {calls:?}")
    })?;
    parked.land().await?;
    padded.await?;
    bench.expect(BLOCK + 100, &data);
    bench.check_all("after both").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn many_in_one_block(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = prepared(&scene, Probe::new().aligned(BLOCK)).await?;
    let mut running = Vec::new();
    for at in 0..16 {
        let offset = 2 * BLOCK + at * 250;
        let data = bench.data(offset, 200);
        bench.expect(offset, &data);
        let handle = bench.handle.clone();
        running.push(
            bench.start(async move { handle.write(offset, data, RequestFlags::empty()).await }),
        );
    }
    for write in running {
        write.await?;
    }
    bench.check_all("after all of them").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn short_tail(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 4 * cluster + 1536).await?;
    bench.write(0, bench.size()).await?;
    let size = bench.size();
    let topped = bench.through(Probe::new().aligned(BLOCK))?;
    bench.check_all("through the probe").await?;
    bench.check_range(size - 700, 700, "the tail").await?;
    for (offset, len) in [(size - 1, 1), (size - 1000, 1000), (size - 5000, 5000)] {
        bench.write(offset, len).await?;
        bench.check_all("after a write to the end").await?;
        bench.zero(offset, len, RequestFlags::empty()).await?;
        bench.check_all("after a zero write to the end").await?;
        bench.write(offset, len).await?;
    }
    topped.probe.take();
    // The short block counts as whole.
    bench
        .handle
        .discard(size - size % BLOCK, size % BLOCK)
        .await?;
    let calls = topped.probe.take_ranges();
    let expected = [(CallKind::Discard, size - size % BLOCK, size % BLOCK)];
    if size % BLOCK != 0 && calls != expected {
        return wrong(format!("the driver got {calls:?}, not {expected:?}"));
    }
    if size % BLOCK != 0 {
        bench
            .adopt_discard(size - size % BLOCK, size % BLOCK)
            .await?;
    }
    bench.check_all("after the discard").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}
