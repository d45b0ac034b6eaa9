//! What a format asks of its storage: requests as the storage wants them, whatever it can't do itself is done in its place,
//! and nothing that it didn't declare is ever asked of it.

use std::sync::Arc;

use block_core::{RequestFlags, driver::Capabilities as Can, limits::Limits};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    let aligned = |bytes: u64| move || Probe::new().aligned(bytes);
    vec![
        case(
            Group::Rw,
            "rw-storage-of-512-byte-sectors",
            "over storage of 512-byte sectors every request to it is made of whole ones, whatever the guest asks for",
            move |scene| workload(scene, aligned(512)()),
        ),
        case(
            Group::Rw,
            "rw-storage-of-4096-byte-sectors",
            "over storage of 4096-byte sectors every request to it is made of whole ones, whatever the guest asks for",
            move |scene| workload(scene, aligned(4096)()),
        ),
        case(
            Group::Rw,
            "rw-storage-of-short-transfers",
            "over storage that takes three sectors at a time no request to it is longer, and the data arrives",
            |scene| {
                let short = |limits: &mut Limits| {
                    limits.max_transfer = 1536;
                    limits.max_zeroes = 2048;
                    limits.max_discard = 1024;
                };
                workload(scene, Probe::new().aligned(512).limits(short))
            },
        ),
        case(
            Group::Rw,
            "rw-storage-without-zero-writes-and-discards",
            "over storage that has no zero writes and no discards neither is asked of it, and zeroes are zeroes all the same",
            |scene| {
                workload(
                    scene,
                    Probe::new().without(Can::WRITE_ZEROES | Can::DISCARD),
                )
            },
        ),
        case(
            Group::Rw,
            "rw-storage-that-refuses-zero-writes",
            "over storage that says it has zero writes and then refuses each of them, zeroes are zeroes all the same",
            |scene| workload(scene, Probe::new().least_zeroes(u64::MAX)),
        ),
        case(
            Group::Rw,
            "rw-storage-with-fua",
            "over storage that takes FUA, a FUA write is with it when it has completed",
            fua,
        ),
    ]
}

/// Random requests of every kind over the probe, then: content, limits and capabilities.
async fn workload(scene: Arc<Scene>, probe: Probe) -> Outcome {
    let mut bench = Bench::new(&scene, 10).await?;
    bench.write(0, 3 * bench.cluster).await?;
    let probe = Arc::new(probe.with(Can::GROW));
    let mut bench = bench.over(&probe).await?;
    let env = scene.lab.env.clone();
    let (size, cluster) = (bench.size(), bench.cluster);
    for _ in 0..60 {
        let unit = [1, 512, cluster][env.below(3) as usize];
        let offset = env.below(size) / unit * unit;
        let most = (size - offset).min(2 * cluster + 600);
        let len = ((env.below(most) + 1).next_multiple_of(unit)).min(size - offset);
        match env.below(6) {
            0..3 => bench.write(offset, len).await?,
            3 => bench.zero(offset, len, RequestFlags::empty()).await?,
            4 => {
                bench
                    .zero(offset, len, RequestFlags::MAY_UNMAP | RequestFlags::FUA)
                    .await?;
            }
            _ => bench.discard(offset, len).await?,
        }
    }
    bench.check_all("at rest").await?;
    bench.handle.flush().await?;
    let (limits, can) = (probe.own_limits(), probe.own_capabilities());
    let fits = |len: u64, max: u64| max == 0 || len <= max;
    let calls = probe.take();
    must(calls.len() > 20, || {
        "hardly anything reached the storage".into()
    })?;
    for call in calls {
        let (allowed, max) = match call.kind {
            CallKind::Read | CallKind::Write => (true, limits.max_transfer),
            CallKind::Zero => (can.contains(Can::WRITE_ZEROES), limits.max_zeroes),
            CallKind::Discard => (can.contains(Can::DISCARD), limits.max_discard),
            CallKind::Flush | CallKind::Truncate => continue,
        };
        let aligned = |number: u64| number.is_multiple_of(limits.request_alignment);
        let good = allowed
            && fits(call.len, max)
            && aligned(call.offset)
            && aligned(call.len)
            && (can.contains(Can::FUA) || !call.flags.contains(RequestFlags::FUA));
        must(good, || format!("the storage got {call:?}"))?;
    }
    bench.finish().await
}

async fn fua(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 4).await?;
    let probe = Arc::new(Probe::new().with(Can::GROW | Can::FUA));
    let mut bench = bench.over(&probe).await?;
    bench.write(0, bench.cluster).await?;
    bench.handle.flush().await?;
    for round in 0..2 {
        // In place the first time, into a new cluster the second.
        probe.take();
        let offset = round * bench.cluster;
        bench.write_with(offset, 512, RequestFlags::FUA).await?;
        let calls = probe.take();
        let last = calls.iter().rposition(|call| call.kind == CallKind::Write);
        let flushed = calls.iter().rposition(|call| call.kind == CallKind::Flush);
        let durable = calls.iter().enumerate().all(|(at, call)| {
            call.kind != CallKind::Write
                || call.flags.contains(RequestFlags::FUA)
                || flushed.is_some_and(|flush| flush > at)
        });
        must(last.is_some() && durable, || {
            format!("the storage got {calls:?}")
        })?;
    }
    bench.finish().await
}
