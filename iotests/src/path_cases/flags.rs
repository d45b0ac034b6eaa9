//! What each request flag, and each option of a node that changes requests, does.

use std::sync::Arc;

use block_core::{
    Buffer, ErrorKind, IoBuf, Options, RequestFlags, driver::Capabilities as Can,
    flags::Permissions,
};

use crate::{
    bench::{Bench, CallKind, Outcome, Probe, case, must, wrong},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-zero-write-by-flag-is-a-zero-write",
            "a write with ZERO_WRITE reaches the driver as a zero write of its length, whatever its buffer holds, and never \
             as data",
            zero_by_flag,
        ),
        case(
            Group::Rw,
            "rw-fua-goes-to-drivers-that-have-it",
            "FUA reaches a driver that has it, with writes and zero writes, and no flush follows",
            fua_with,
        ),
        case(
            Group::Rw,
            "rw-fua-stays-with-zeroes-that-are-written-as-data",
            "zeroes that have to be written as data keep their FUA, whether the driver has no zero writes or refuses them",
            fua_of_zeroes,
        ),
        case(
            Group::Rw,
            "rw-fua-is-a-flush-where-the-driver-has-none",
            "FUA is kept from a driver that doesn't have it, and a flush follows each write and zero write, also a padded one",
            fua_without,
        ),
        case(
            Group::Rw,
            "rw-fua-zero-write-survives-power-cut",
            "what was zeroed with FUA is zero after a power cut without a flush, and the image is clean",
            |scene| durable(scene, Durable::Zero),
        ),
        case(
            Group::Rw,
            "rw-zero-write-by-flag-with-fua-survives-power-cut",
            "what was zeroed through the write call with FUA is zero after a power cut without a flush",
            |scene| durable(scene, Durable::ZeroByFlag),
        ),
        case(
            Group::Rw,
            "rw-write-through-handle-survives-power-cut",
            "through a handle that writes through, every completed write and zero write is there after a power cut without a \
             flush",
            |scene| durable(scene, Durable::WriteThrough),
        ),
        case(
            Group::Rw,
            "rw-flags-that-drivers-see",
            "MAY_UNMAP, WRITE_UNCHANGED and REGISTERED_BUF reach the driver; SERIALISING, ZERO_WRITE and NO_WAIT are the \
             core's own and don't",
            passed_on,
        ),
        case(
            Group::Rw,
            "rw-write-unchanged-needs-the-weaker-permission-only",
            "a handle with 'write unchanged' alone may write with WRITE_UNCHANGED, and is refused every other change",
            unchanged,
        ),
        case(
            Group::Rw,
            "rw-discard-ignore-drops-discards-and-unmap",
            "a node with discard=ignore lets no discard and no MAY_UNMAP through; both succeed, and zeroes are written all \
             the same",
            discard_ignore,
        ),
        case(
            Group::Rw,
            "rw-detect-zeroes-off",
            "without zero detection, zeroes that are written stay a write",
            |scene| detect(scene, "off"),
        ),
        case(
            Group::Rw,
            "rw-detect-zeroes-on",
            "with zero detection, a write of nothing but zeroes becomes a zero write that keeps its space; one other byte \
             anywhere keeps it a write",
            |scene| detect(scene, "on"),
        ),
        case(
            Group::Rw,
            "rw-detect-zeroes-unmap",
            "with detect-zeroes=unmap, a write of nothing but zeroes becomes a zero write that may unmap",
            |scene| detect(scene, "unmap"),
        ),
        case(
            Group::Rw,
            "rw-detect-zeroes-unmap-needs-discard-unmap",
            "detect-zeroes=unmap together with discard=ignore is refused on opening, and the image can be opened without",
            detect_and_ignore,
        ),
    ]
}

async fn zero_by_flag(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let cluster = bench.cluster;
    let flags = RequestFlags::ZERO_WRITE | RequestFlags::MAY_UNMAP;
    let ones = vec![1; cluster as usize];
    bench.handle.write(cluster, ones, flags).await?;
    bench.model[cluster as usize..2 * cluster as usize].fill(0);
    let calls = topped.probe.take();
    let [call] = calls[..] else {
        return wrong(format!("the driver got {calls:?}"));
    };
    let right = call.kind == CallKind::Zero
        && (call.offset, call.len) == (cluster, cluster)
        && call.flags == RequestFlags::MAY_UNMAP;
    must(right, || format!("the driver got {call:?}"))?;
    let snapshot = topped.node.stats().snapshot();
    must(snapshot.zero_ops == 1 && snapshot.write_ops == 0, || {
        format!("it was counted as {snapshot:?}")
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn fua_with(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let topped = bench.through(Probe::new().aligned(512).with(Can::FUA))?;
    let cluster = bench.cluster;
    bench.write_with(0, cluster, RequestFlags::FUA).await?;
    bench.write_with(100, 100, RequestFlags::FUA).await?;
    bench.zero(cluster, cluster, RequestFlags::FUA).await?;
    let calls = topped.probe.take();
    for call in calls.iter().filter(|call| call.kind != CallKind::Read) {
        must(call.flags.contains(RequestFlags::FUA), || {
            format!("the driver got {call:?}")
        })?;
    }
    must(
        calls.iter().all(|call| call.kind != CallKind::Flush),
        || format!("a flush followed: {calls:?}"),
    )?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn fua_of_zeroes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let cluster = bench.cluster;
    bench.write(0, bench.size()).await?;
    let probe = || Probe::new().aligned(512).with(Can::FUA);
    for probe in [
        probe().without(Can::WRITE_ZEROES),
        probe().least_zeroes(u64::MAX),
    ] {
        let topped = bench.through(probe)?;
        bench.zero(cluster, cluster, RequestFlags::FUA).await?;
        let calls = topped.probe.take();
        let mut written = calls.iter().filter(|call| call.kind == CallKind::Write);
        must(
            written
                .next_back()
                .is_some_and(|last| last.flags.contains(RequestFlags::FUA))
                && calls.iter().all(|call| call.kind != CallKind::Flush),
            || format!("the driver got {calls:?}"),
        )?;
        bench.take_off(topped).await?;
    }
    bench.finish().await
}

async fn fua_without(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let probe = Probe::new()
        .aligned(512)
        .limits(|limits| limits.max_transfer = 1024);
    let topped = bench.through(probe)?;
    use CallKind::{Flush, Read, Write, Zero};
    bench.write_with(0, 512, RequestFlags::FUA).await?;
    bench.write_with(512, 2048, RequestFlags::FUA).await?;
    bench.write_with(100, 100, RequestFlags::FUA).await?;
    bench.zero(1024, 512, RequestFlags::FUA).await?;
    let calls = topped.probe.take();
    let kinds: Vec<CallKind> = calls.iter().map(|call| call.kind).collect();
    let expected = [
        Write, Flush, Write, Write, Flush, Read, Write, Flush, Zero, Flush,
    ];
    must(kinds == expected, || format!("the driver got {kinds:?}"))?;
    must(
        calls
            .iter()
            .all(|call| !call.flags.contains(RequestFlags::FUA)),
        || format!("FUA reached a driver without it: {calls:?}"),
    )?;
    bench.take_off(topped).await?;
    bench.finish().await
}

#[derive(Clone, Copy)]
enum Durable {
    Zero,
    ZeroByFlag,
    WriteThrough,
}

async fn durable(scene: Arc<Scene>, how: Durable) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, 6 * cluster).await?;
    bench.handle.flush().await?;
    bench.disk.track_durability();
    match how {
        Durable::Zero => {
            bench
                .zero(
                    cluster,
                    2 * cluster,
                    RequestFlags::FUA | RequestFlags::MAY_UNMAP,
                )
                .await?;
            bench
                .zero(4 * cluster + 512, 1024, RequestFlags::FUA)
                .await?;
        }
        Durable::ZeroByFlag => {
            let flags = RequestFlags::FUA | RequestFlags::ZERO_WRITE;
            let ones = vec![1; cluster as usize];
            bench.handle.write(2 * cluster, ones, flags).await?;
            bench.model[2 * cluster as usize..3 * cluster as usize].fill(0);
        }
        Durable::WriteThrough => {
            bench.handle.set_write_through(true);
            bench.write(5 * cluster, 2 * cluster).await?;
            bench.zero(cluster, cluster, RequestFlags::empty()).await?;
            bench.write(512, 100).await?;
        }
    }
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

async fn passed_on(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new())?;
    let own = RequestFlags::SERIALISING | RequestFlags::NO_WAIT;
    let passed = RequestFlags::WRITE_UNCHANGED | RequestFlags::REGISTERED_BUF;
    let cluster = bench.cluster;
    bench.write_with(0, cluster, own | passed).await?;
    bench
        .zero(cluster, cluster, own | passed | RequestFlags::MAY_UNMAP)
        .await?;
    let calls = topped.probe.take();
    let flags: Vec<RequestFlags> = calls.iter().map(|call| call.flags).collect();
    must(flags == [passed, passed | RequestFlags::MAY_UNMAP], || {
        format!("the driver saw {flags:?}")
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn unchanged(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let cluster = bench.cluster as usize;
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
    let handle = bench.attach(may, Permissions::all(), "copier")?;
    let same = bench.model[..cluster].to_vec();
    handle
        .write(0, same.clone(), RequestFlags::WRITE_UNCHANGED)
        .await?;
    let none = RequestFlags::empty();
    for (what, result) in [
        ("write", handle.write(0, same, none).await),
        ("zero write", handle.write_zeroes(0, 512, none).await),
        ("discard", handle.discard(0, 512).await),
    ] {
        match result {
            Err(error) if error.kind() == ErrorKind::NotPermitted => {}
            other => return wrong(format!("a {what} without permission: {other:?}")),
        }
    }
    drop(handle);
    bench.check_all("after writing what was there").await?;
    bench.finish().await
}

async fn discard_ignore(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.write(0, bench.size()).await?;
    let mut bench = bench
        .reopen_with(Options::new().with("discard", "ignore"))
        .await?;
    let cluster = bench.cluster;
    let before = bench.handle.block_status(0, cluster).await?;
    bench.handle.flush().await?;
    let position = bench.disk.log_position();
    bench.handle.discard(0, bench.size()).await?;
    let reached = bench.disk.log_since(position);
    must(reached.is_empty(), || {
        format!("a discard reached the storage: {}", reached[0].op)
    })?;
    bench.check_all("after the discard").await?;
    let after = bench.handle.block_status(0, cluster).await?;
    must(after.flags == before.flags, || {
        format!("{:?} became {:?}", before.flags, after.flags)
    })?;
    // Where a plain zero write keeps the place, one that may unmap keeps it too.
    bench
        .zero(2 * cluster, cluster, RequestFlags::empty())
        .await?;
    bench
        .zero(5 * cluster, cluster, RequestFlags::MAY_UNMAP)
        .await?;
    let kept = bench.handle.block_status(2 * cluster, cluster).await?;
    let unmapped = bench.handle.block_status(5 * cluster, cluster).await?;
    must(kept.flags == unmapped.flags, || {
        format!("zeroed: {:?}, with unmap: {:?}", kept.flags, unmapped.flags)
    })?;
    bench.finish().await
}

async fn detect(scene: Arc<Scene>, mode: &'static str) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let options = [("detect-zeroes", mode)];
    let topped = bench.through_with(Probe::new().aligned(512), &options)?;
    let cluster = bench.cluster;
    let none = RequestFlags::empty();
    let zeroes = || IoBuf::zeroes(cluster as usize);
    bench.handle.write(cluster, zeroes(), none).await?;
    bench.model[cluster as usize..2 * cluster as usize].fill(0);
    // Of several pieces, and with one other byte at its very end.
    let mut pieces = IoBuf::zeroes(700);
    pieces.append(IoBuf::from(Buffer::new(cluster as usize - 701)));
    let mut almost = pieces.clone();
    pieces.append(IoBuf::from(vec![0]));
    almost.append(IoBuf::from(vec![9]));
    bench.handle.write(2 * cluster, pieces, none).await?;
    bench.handle.write(3 * cluster, almost, none).await?;
    bench.model[2 * cluster as usize..4 * cluster as usize - 1].fill(0);
    let last = bench.size() as usize - 1;
    bench.model[last] = 9;
    let calls = topped.probe.take();
    let (kind, flags) = match mode {
        "off" => (CallKind::Write, none),
        "on" => (CallKind::Zero, none),
        _ => (CallKind::Zero, RequestFlags::MAY_UNMAP),
    };
    let seen: Vec<_> = calls.iter().map(|call| (call.kind, call.flags)).collect();
    let expected = [(kind, flags), (kind, flags), (CallKind::Write, none)];
    must(seen == expected, || {
        format!("with detect-zeroes={mode} the driver got {seen:?}")
    })?;
    bench.take_off(topped).await?;
    // And as an option of the format's own node.
    let mut bench = bench
        .reopen_with(Options::new().with("detect-zeroes", mode))
        .await?;
    bench.write(0, bench.size()).await?;
    bench.handle.write(cluster, zeroes(), none).await?;
    bench.model[cluster as usize..2 * cluster as usize].fill(0);
    let stats = bench.node.stats().snapshot();
    must((stats.zero_ops == 1) == (mode != "off"), || {
        format!("{stats:?}")
    })?;
    bench.finish().await
}

async fn detect_and_ignore(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let options = [("detect-zeroes", "unmap"), ("discard", "ignore")];
    must(bench.top_with(Probe::new(), &options).is_err(), || {
        "a node has detect-zeroes=unmap and discard=ignore".into()
    })?;
    let both = Options::new()
        .with("detect-zeroes", "unmap")
        .with("discard", "ignore");
    let (lab, format) = (&scene.lab, scene.format.name.as_str());
    let nodes = lab.graph.nodes().len();
    match lab.open(format, bench.disk.name(), None, &both).await {
        Err(error) if error.kind() == ErrorKind::InvalidInput => {}
        other => return wrong(format!("opening with both: {other:?}")),
    }
    must(lab.graph.nodes().len() == nodes, || {
        "the refused opening left a node behind".into()
    })?;
    for mode in ["bogus", ""] {
        let options = Options::new().with("discard", mode);
        let opened = lab.open(format, bench.disk.name(), None, &options).await;
        must(opened.is_err(), || format!("discard='{mode}' was taken"))?;
    }
    bench.reopen().await?.finish().await
}
