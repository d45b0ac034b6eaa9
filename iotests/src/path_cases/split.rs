//! What the driver's limits do to long requests: how they are split, and what is done when a limit isn't a multiple of the
//! alignment or smaller than it.

use std::sync::Arc;

use block_core::{ErrorKind, RequestFlags, limits::Limits};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must, wrong},
    case::{Case, Group, Scene},
};

const BLOCK: u64 = 512;

/// Limits of a driver, and the sizes of the calls that a request of `len` bytes at `offset` has to become.
struct Split {
    name: &'static str,
    proves: &'static str,
    limits: fn(&mut Limits),
    offset: u64,
    len: u64,
    calls: &'static [u64],
}

const TRANSFERS: [Split; 4] = [
    Split {
        name: "odd-multiple-of-the-alignment",
        proves: "is split into calls of max_transfer and a shorter last one",
        limits: |limits| limits.max_transfer = 3 * BLOCK,
        offset: 5 * BLOCK,
        len: 10 * BLOCK,
        calls: &[3 * BLOCK, 3 * BLOCK, 3 * BLOCK, BLOCK],
    },
    Split {
        name: "no-multiple-of-the-alignment",
        proves: "is split below a max_transfer that is no multiple of the alignment",
        limits: |limits| limits.max_transfer = 2 * BLOCK + 100,
        offset: 0,
        len: 5 * BLOCK,
        calls: &[2 * BLOCK, 2 * BLOCK, BLOCK],
    },
    Split {
        name: "smaller-than-the-alignment",
        proves: "is split into single blocks where max_transfer is smaller than one",
        limits: |limits| limits.max_transfer = 100,
        offset: BLOCK,
        len: 3 * BLOCK,
        calls: &[BLOCK, BLOCK, BLOCK],
    },
    Split {
        name: "exactly-as-long",
        proves: "isn't split when it is exactly as long as max_transfer",
        limits: |limits| limits.max_transfer = 8 * BLOCK,
        offset: BLOCK,
        len: 8 * BLOCK,
        calls: &[8 * BLOCK],
    },
];

const ZEROES: [Split; 4] = [
    Split {
        name: "max-zeroes",
        proves: "is split at max_zeroes",
        limits: |limits| limits.max_zeroes = 3 * BLOCK,
        offset: BLOCK,
        len: 7 * BLOCK,
        calls: &[3 * BLOCK, 3 * BLOCK, BLOCK],
    },
    Split {
        name: "bulk-units",
        proves: "has its head and tail outside of whole bulk units in calls of their own",
        limits: |limits| limits.zeroes_alignment = 4 * BLOCK,
        offset: 3 * BLOCK,
        len: 10 * BLOCK,
        calls: &[BLOCK, 8 * BLOCK, BLOCK],
    },
    Split {
        name: "bulk-units-and-maximum",
        proves: "has bulk calls of whole units below max_zeroes",
        limits: |limits| {
            limits.zeroes_alignment = 4 * BLOCK;
            limits.max_zeroes = 9 * BLOCK;
        },
        offset: 2 * BLOCK,
        len: 20 * BLOCK,
        calls: &[2 * BLOCK, 8 * BLOCK, 8 * BLOCK, 2 * BLOCK],
    },
    Split {
        name: "unit-above-maximum",
        proves: "has no bulk calls where a unit is longer than max_zeroes",
        limits: |limits| {
            limits.zeroes_alignment = 8 * BLOCK;
            limits.max_zeroes = 2 * BLOCK;
        },
        offset: 7 * BLOCK,
        len: 5 * BLOCK,
        calls: &[2 * BLOCK, 2 * BLOCK, BLOCK],
    },
];

const DISCARDS: [Split; 3] = [
    Split {
        name: "max-discard",
        proves: "is split at max_discard, rounded down to blocks",
        limits: |limits| limits.max_discard = 3 * BLOCK + 1,
        offset: BLOCK,
        len: 7 * BLOCK,
        calls: &[3 * BLOCK, 3 * BLOCK, BLOCK],
    },
    Split {
        name: "bulk-units",
        proves: "has its head and tail outside of whole units in calls of their own",
        limits: |limits| limits.discard_alignment = 4 * BLOCK,
        offset: 3 * BLOCK,
        len: 6 * BLOCK,
        calls: &[BLOCK, 4 * BLOCK, BLOCK],
    },
    Split {
        name: "inside-one-unit",
        proves: "inside one unit is one call",
        limits: |limits| limits.discard_alignment = 8 * BLOCK,
        offset: 2 * BLOCK,
        len: 3 * BLOCK,
        calls: &[3 * BLOCK],
    },
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for split in TRANSFERS {
        for kind in [CallKind::Read, CallKind::Write] {
            cases.push(one(split_case(&split, kind), &split, kind));
        }
    }
    for split in ZEROES {
        cases.push(one(
            split_case(&split, CallKind::Zero),
            &split,
            CallKind::Zero,
        ));
    }
    for split in DISCARDS {
        cases.push(one(
            split_case(&split, CallKind::Discard),
            &split,
            CallKind::Discard,
        ));
    }
    cases.push(case(
        Group::Rw,
        "rw-padded-write-is-split-as-well",
        "the whole blocks that a padded write becomes are split at max_transfer, and so are the reads before it",
        padded_and_split,
    ));
    cases.push(case(
        Group::Rw,
        "rw-split-write-that-fails-in-the-middle",
        "when a piece of a split write fails, the later pieces aren't sent, the error is reported, and what was written \
         before it is there",
        fails_in_the_middle,
    ));
    cases.push(case(
        Group::Rw,
        "rw-split-request-holds-its-whole-range",
        "a discard of the end of a range waits while the first piece of a split write to it is in flight",
        holds_its_range,
    ));
    cases
}

fn split_case(split: &Split, kind: CallKind) -> (String, String) {
    let what = match kind {
        CallKind::Read => "read",
        CallKind::Write => "write",
        CallKind::Zero => "zero write",
        _ => "discard",
    };
    let name = format!("rw-split-{}-{}", what.replace(' ', "-"), split.name);
    (
        name,
        format!("a {what} {}, in ascending order", split.proves),
    )
}

fn one((name, proves): (String, String), split: &Split, kind: CallKind) -> Case {
    let (limits, offset, len, calls) = (split.limits, split.offset, split.len, split.calls);
    case(Group::Rw, name, proves, move |scene| {
        splits(scene, kind, limits, (offset, len), calls)
    })
}

async fn splits(
    scene: Arc<Scene>,
    kind: CallKind,
    limits: fn(&mut Limits),
    (offset, len): (u64, u64),
    calls: &'static [u64],
) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new().aligned(BLOCK).limits(limits))?;
    match kind {
        CallKind::Read => bench.check_range(offset, len, "split").await?,
        CallKind::Write => bench.write(offset, len).await?,
        CallKind::Zero => bench.zero(offset, len, RequestFlags::empty()).await?,
        _ => bench.discard(offset, len).await?,
    }
    let got: Vec<_> = topped
        .probe
        .take_ranges()
        .into_iter()
        .filter(|call| call.0 == kind)
        .collect();
    let mut at = offset;
    let mut expected = Vec::new();
    for len in calls {
        expected.push((kind, at, *len));
        at += len;
    }
    // What discard looks at afterwards is a read: it was left out above.
    must(got == expected, || {
        format!("the driver got {got:?}, not {expected:?}")
    })?;
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn padded_and_split(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let probe = Probe::new().aligned(BLOCK);
    let topped = bench.through(probe.limits(|limits| limits.max_transfer = 2 * BLOCK))?;
    bench.write(BLOCK + 1, 4 * BLOCK).await?;
    let calls = topped.probe.take_ranges();
    let expected = [
        (CallKind::Read, BLOCK, BLOCK),
        (CallKind::Read, 5 * BLOCK, BLOCK),
        (CallKind::Write, BLOCK, 2 * BLOCK),
        (CallKind::Write, 3 * BLOCK, 2 * BLOCK),
        (CallKind::Write, 5 * BLOCK, BLOCK),
    ];
    must(calls == expected, || format!("the driver got {calls:?}"))?;
    // Both blocks are read at once, which is longer than a transfer may be when it is one block.
    bench.take_off(topped).await?;
    let probe = Probe::new().aligned(BLOCK);
    let topped = bench.through(probe.limits(|limits| limits.max_transfer = BLOCK))?;
    bench.write(2 * BLOCK - 1, 2).await?;
    let longest = topped.probe.take().iter().map(|call| call.len).max();
    must(longest == Some(BLOCK), || {
        format!("the longest call had {longest:?} bytes")
    })?;
    bench
        .check_range(0, 3 * BLOCK + 1, "an unaligned read")
        .await?;
    let longest = topped.probe.take().iter().map(|call| call.len).max();
    must(longest == Some(BLOCK), || {
        format!("the longest call had {longest:?} bytes")
    })?;
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn fails_in_the_middle(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let probe = Probe::new().aligned(BLOCK);
    let topped = bench.through(probe.limits(|limits| limits.max_transfer = 2 * BLOCK))?;
    let data = bench.data(0, 8 * BLOCK);
    // The first piece gets through: the second is refused.
    topped.probe.block(CallKind::Write);
    let (handle, bytes) = (bench.handle.clone(), data.clone());
    let write = bench.start(async move { handle.write(0, bytes, RequestFlags::empty()).await });
    scene.rest().await;
    topped.probe.unblock(CallKind::Write);
    topped
        .probe
        .fail_after(CallKind::Write, 1, ErrorKind::NoSpace);
    match write.await {
        Err(error) if error.kind() == ErrorKind::NoSpace => {}
        other => return wrong(format!("the split write: {other:?}")),
    }
    let calls = topped.probe.take_ranges();
    let expected = [
        (CallKind::Write, 0, 2 * BLOCK),
        (CallKind::Write, 2 * BLOCK, 2 * BLOCK),
    ];
    must(calls == expected, || format!("the driver got {calls:?}"))?;
    bench.expect(0, &data[..2 * BLOCK as usize]);
    bench.check_all("after the failure").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn holds_its_range(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let probe = Probe::new().aligned(BLOCK);
    let topped = bench.through(probe.limits(|limits| limits.max_transfer = BLOCK))?;
    topped.probe.block(CallKind::Write);
    let data = bench.data(0, 6 * BLOCK);
    let (handle, bytes) = (bench.handle.clone(), data.clone());
    let write = bench.start(async move { handle.write(0, bytes, RequestFlags::empty()).await });
    scene.rest().await;
    let handle = bench.handle.clone();
    let zero = bench.start(async move {
        handle
            .write_zeroes(5 * BLOCK, BLOCK, RequestFlags::empty())
            .await
    });
    scene.rest().await;
    let calls = topped.probe.take_ranges();
    must(
        calls == [(CallKind::Write, 0, BLOCK)] && !zero.is_done(),
        || format!("a zero write got into a split write: {calls:?}"),
    )?;
    topped.probe.unblock(CallKind::Write);
    write.await?;
    zero.await?;
    bench.expect(0, &data);
    bench.expect(5 * BLOCK, &[0; BLOCK as usize]);
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}
