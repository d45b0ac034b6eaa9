//! Zero writes and discards where the driver can't, or can't all of it: what falls back to data, what must not, and what
//! counts as done.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, RequestFlags, driver::Capabilities as Can};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, Stop, Topped, case, must, wrong},
    case::{Case, Group, Scene},
};

const BLOCK: u64 = 512;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-zero-write-without-driver-support-becomes-data",
            "where the driver has no zero writes, zeroes are written as data, never longer than max_transfer, and the driver \
             isn't asked",
            without_support,
        ),
        case(
            Group::Rw,
            "rw-zero-write-that-the-driver-refuses-becomes-data",
            "when the driver refuses a bulk zero write as not supported, the whole request is written as data and the driver \
             isn't asked again",
            refused_at_run_time,
        ),
        case(
            Group::Rw,
            "rw-only-the-ends-of-a-zero-write-become-data",
            "when the driver takes whole units only, the ends of a zero write are written as data and the middle stays a \
             zero write",
            ends_become_data,
        ),
        case(
            Group::Rw,
            "rw-no-fallback-without-driver-support-fails",
            "a zero write with NO_FALLBACK fails with ENOTSUP where the driver has none, and nothing is written",
            no_fallback_without_support,
        ),
        case(
            Group::Rw,
            "rw-no-fallback-that-the-driver-refuses-fails",
            "a zero write with NO_FALLBACK that the driver refuses fails with ENOTSUP, and nothing is written as data",
            no_fallback_refused,
        ),
        case(
            Group::Rw,
            "rw-no-fallback-that-the-driver-takes-works",
            "a zero write with NO_FALLBACK that the driver can do is done",
            no_fallback_works,
        ),
        case(
            Group::Rw,
            "rw-zero-write-error-isnt-a-reason-for-data",
            "when a zero write fails for another reason than that it isn't supported, the error is reported and no data is \
             written",
            error_is_no_fallback,
        ),
        case(
            Group::Rw,
            "rw-discard-without-driver-support-does-nothing",
            "a discard succeeds without a driver call where the driver has none, and changes nothing",
            discard_without_support,
        ),
        case(
            Group::Rw,
            "rw-discard-that-the-driver-refuses-counts-as-done",
            "a discard that the driver refuses as not supported succeeds, any other error is reported",
            discard_refused,
        ),
        case(
            Group::Rw,
            "rw-zero-writes-of-the-format-itself-never-fake-success",
            "zero writes of every alignment around clusters of data leave zeroes where they were asked for and the old bytes \
             everywhere else, with and without MAY_UNMAP",
            of_the_format,
        ),
    ]
}

async fn topped(scene: &Arc<Scene>, probe: Probe) -> Result<(Bench, Topped), Stop> {
    let mut bench = Bench::new(scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(probe)?;
    Ok((bench, topped))
}

async fn without_support(scene: Arc<Scene>) -> Outcome {
    let probe = Probe::new().aligned(BLOCK).without(Can::WRITE_ZEROES);
    let probe = probe.limits(|limits| limits.max_transfer = 3 * BLOCK);
    let (mut bench, topped) = topped(&scene, probe).await?;
    bench
        .zero(BLOCK, 7 * BLOCK, RequestFlags::MAY_UNMAP)
        .await?;
    let calls = topped.probe.take();
    let lengths: Vec<u64> = calls.iter().map(|call| call.len).collect();
    must(lengths == [3 * BLOCK, 3 * BLOCK, BLOCK], || {
        format!("the driver got {calls:?}")
    })?;
    let data = |call: &crate::bench::Call| {
        call.kind == CallKind::Write && !call.flags.contains(RequestFlags::MAY_UNMAP)
    };
    must(calls.iter().all(data), || {
        format!("the driver got {calls:?}")
    })?;
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn refused_at_run_time(scene: Arc<Scene>) -> Outcome {
    let probe = Probe::new().aligned(BLOCK).least_zeroes(u64::MAX);
    let probe = probe.limits(|limits| limits.max_zeroes = 2 * BLOCK);
    let (mut bench, topped) = topped(&scene, probe).await?;
    bench.zero(BLOCK, 6 * BLOCK, RequestFlags::empty()).await?;
    let calls = topped.probe.take_ranges();
    let asked = calls.iter().filter(|call| call.0 == CallKind::Zero).count();
    must(asked == 1, || {
        format!("the driver was asked {asked} times: {calls:?}")
    })?;
    let written: u64 = calls
        .iter()
        .filter(|call| call.0 == CallKind::Write)
        .map(|call| call.2)
        .sum();
    must(written == 6 * BLOCK, || {
        format!("{written} bytes were written")
    })?;
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn ends_become_data(scene: Arc<Scene>) -> Outcome {
    let probe = Probe::new().aligned(BLOCK).least_zeroes(4 * BLOCK);
    let probe = probe.limits(|limits| limits.zeroes_alignment = 4 * BLOCK);
    let (mut bench, topped) = topped(&scene, probe).await?;
    bench
        .zero(3 * BLOCK, 6 * BLOCK, RequestFlags::empty())
        .await?;
    let calls = topped.probe.take_ranges();
    // Head and tail are asked for first: they might be what the driver takes.
    let expected = [
        (CallKind::Zero, 3 * BLOCK, BLOCK),
        (CallKind::Write, 3 * BLOCK, BLOCK),
        (CallKind::Zero, 4 * BLOCK, 4 * BLOCK),
        (CallKind::Zero, 8 * BLOCK, BLOCK),
        (CallKind::Write, 8 * BLOCK, BLOCK),
    ];
    must(calls == expected, || format!("the driver got {calls:?}"))?;
    bench.check_all("afterwards").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

/// A zero write that must fail with ENOTSUP without anything written.
async fn refused(bench: &Bench, topped: &Topped, flags: RequestFlags) -> Outcome {
    match bench.handle.write_zeroes(BLOCK, 4 * BLOCK, flags).await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {}
        other => return wrong(format!("a zero write with {flags:?}: {other:?}")),
    }
    let calls = topped.probe.take_ranges();
    must(calls.iter().all(|call| call.0 != CallKind::Write), || {
        format!("data was written: {calls:?}")
    })?;
    bench.check_all("after the refusal").await
}

async fn no_fallback_without_support(scene: Arc<Scene>) -> Outcome {
    let probe = Probe::new().aligned(BLOCK).without(Can::WRITE_ZEROES);
    let (mut bench, topped) = topped(&scene, probe).await?;
    refused(&bench, &topped, RequestFlags::NO_FALLBACK).await?;
    refused(
        &bench,
        &topped,
        RequestFlags::NO_FALLBACK | RequestFlags::MAY_UNMAP,
    )
    .await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn no_fallback_refused(scene: Arc<Scene>) -> Outcome {
    let probe = Probe::new().aligned(BLOCK).least_zeroes(u64::MAX);
    let (mut bench, topped) = topped(&scene, probe).await?;
    refused(&bench, &topped, RequestFlags::NO_FALLBACK).await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn no_fallback_works(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = topped(&scene, Probe::new()).await?;
    bench.needs(Capabilities::WRITE_ZEROES)?;
    let flags = RequestFlags::NO_FALLBACK | RequestFlags::MAY_UNMAP;
    bench.zero(bench.cluster, 2 * bench.cluster, flags).await?;
    let calls = topped.probe.take();
    let [call] = calls[..] else {
        return wrong(format!("the driver got {calls:?}"));
    };
    must(call.kind == CallKind::Zero && call.flags == flags, || {
        format!("the driver got {call:?}")
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn error_is_no_fallback(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = topped(&scene, Probe::new().aligned(BLOCK)).await?;
    topped.probe.fail(CallKind::Zero, 1, ErrorKind::NoSpace);
    let flags = RequestFlags::empty();
    match bench.handle.write_zeroes(BLOCK, 4 * BLOCK, flags).await {
        Err(error) if error.kind() == ErrorKind::NoSpace => {}
        other => return wrong(format!("a zero write without space: {other:?}")),
    }
    let calls = topped.probe.take_ranges();
    must(calls == [(CallKind::Zero, BLOCK, 4 * BLOCK)], || {
        format!("the driver got {calls:?}")
    })?;
    bench.check_all("after the failure").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn discard_without_support(scene: Arc<Scene>) -> Outcome {
    let (mut bench, topped) = topped(&scene, Probe::new().without(Can::DISCARD)).await?;
    bench.handle.discard(0, bench.size()).await?;
    let calls = topped.probe.take_ranges();
    must(calls.is_empty(), || format!("the driver got {calls:?}"))?;
    bench.check_all("after the discard").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn discard_refused(scene: Arc<Scene>) -> Outcome {
    let probe = Probe::new().limits(|limits| limits.max_discard = BLOCK);
    let (mut bench, topped) = topped(&scene, probe).await?;
    topped
        .probe
        .fail(CallKind::Discard, 3, ErrorKind::NotSupported);
    bench.handle.discard(0, 3 * BLOCK).await?;
    let calls = topped.probe.take_ranges();
    must(calls.len() == 3, || format!("the driver got {calls:?}"))?;
    bench.check_all("after the discard").await?;
    topped.probe.take();
    topped.probe.fail(CallKind::Discard, 1, ErrorKind::NoSpace);
    match bench.handle.discard(0, 3 * BLOCK).await {
        Err(error) if error.kind() == ErrorKind::NoSpace => {}
        other => return wrong(format!("a discard that fails: {other:?}")),
    }
    let calls = topped.probe.take_ranges();
    must(calls.len() == 1, || {
        format!("it went on after an error: {calls:?}")
    })?;
    bench.check_all("after the failure").await?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn of_the_format(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    for flags in [RequestFlags::empty(), RequestFlags::MAY_UNMAP] {
        bench.write(0, bench.size()).await?;
        for (offset, len) in [
            (0, 1),
            (cluster - 1, 2),
            (cluster + 512, cluster - 512),
            (3 * cluster, cluster + 512),
            (4 * cluster + 513, 2 * cluster + 1),
            (bench.size() - 1, 1),
        ] {
            bench.zero(offset, len, flags).await?;
            bench
                .check_all(&format!("after zeroes at {offset:#x}+{len:#x}"))
                .await?;
        }
    }
    bench.finish().await
}
