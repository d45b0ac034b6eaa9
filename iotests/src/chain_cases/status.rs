//! Block status through chains: which layer decides, for how many bytes, and what is said beyond the end of a layer.

use std::sync::Arc;

use block_core::{Node, RequestFlags, status::StatusFlags};

use crate::{
    bench::{Bench, Outcome, Probe, Stop, case, must},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Status,
            "status-chain-of-three-tells-who-decides",
            "through three layers block status names the layer that decides each cluster, and calls unallocated what none \
             decides",
            three_layers,
        ),
        case(
            Group::Status,
            "status-above-a-base-asks-only-the-layers-above-it",
            "with a base, only layers above it are asked: what they don't decide is unallocated, and with the node itself \
             as the base nothing is",
            above_base,
        ),
        case(
            Group::Status,
            "status-is-allocated-above-counts-layers-right",
            "whether layers above a base, or up to and including it, decide a cluster is told right for every layer and \
             cluster",
            allocated_above,
        ),
        case(
            Group::Status,
            "status-short-layer-hides-what-is-below-its-end",
            "beyond the end of a shorter layer in the middle everything reads as zeroes, whatever lies below, and the short \
             layer counts as deciding it",
            short_layer,
        ),
        case(
            Group::Status,
            "status-stops-at-the-end-of-a-shorter-backing-file",
            "a run of backing data ends where the backing file ends, also inside of a cluster, and zeroes follow",
            end_of_backing,
        ),
        case(
            Group::Status,
            "status-of-a-shorter-overlay-ends-with-it",
            "over a longer backing file block status ends at the overlay's own end",
            shorter_overlay,
        ),
        case(
            Group::Status,
            "status-begins-and-ends-inside-clusters",
            "asked from inside a cluster, or for less than one, block status answers for that, with the offset of that byte",
            inside_clusters,
        ),
        case(
            Group::Status,
            "status-through-a-filter-is-the-same-one-deeper",
            "a filter above a chain changes nothing of what block status says but the depth",
            through_filter,
        ),
        case(
            Group::Status,
            "status-of-nothing-and-of-all-there-is",
            "asked for no bytes, beyond the end, or for more than there is, block status neither fails nor promises more than \
             the disk has",
            extremes,
        ),
        case(
            Group::Status,
            "status-follows-every-change",
            "block status is right after each of a write, a zero write and a discard, before and after a flush",
            follows,
        ),
        case(
            Group::Status,
            "status-of-storage-with-holes",
            "a cluster with data whose place in the storage is a hole is still allocated, and never called data that isn't \
             there",
            holes,
        ),
    ]
}

const NONE: RequestFlags = RequestFlags::empty();

/// Eight clusters in three layers. Base: data in 0 to 3. Middle: data in 1, zeroes in 2. Top: zeroes in 3, data in 5.
async fn chain(scene: &Arc<Scene>) -> Result<Bench, Stop> {
    let mut bench = Bench::new(scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, 4 * cluster).await?;
    let mut bench = bench.overlay(8).await?;
    bench.write(cluster, cluster).await?;
    bench.zero(2 * cluster, cluster, NONE).await?;
    let mut bench = bench.overlay(8).await?;
    bench.zero(3 * cluster, cluster, NONE).await?;
    bench.write(5 * cluster, cluster).await?;
    Ok(bench)
}

/// The depth of the layer that decides each cluster of [`chain`].
const DECIDED: [Option<u32>; 8] = [
    Some(2),
    Some(1),
    Some(1),
    Some(0),
    None,
    Some(0),
    None,
    None,
];

async fn three_layers(scene: Arc<Scene>) -> Outcome {
    let bench = chain(&scene).await?;
    for bench in [bench] {
        for (at, decided) in DECIDED.into_iter().enumerate() {
            let status = bench
                .handle
                .block_status(at as u64 * bench.cluster, bench.cluster)
                .await?;
            let what = || format!("cluster {at}: {:?} at depth {}", status.flags, status.depth);
            must(status.is_allocated() == decided.is_some(), what)?;
            match decided {
                Some(depth) => must(status.depth == depth, what)?,
                None => must(
                    status.is_zero() && !status.flags.contains(StatusFlags::DATA),
                    what,
                )?,
            }
        }
        bench.truthful().await?;
        let bench = bench.reopen().await?;
        bench.truthful().await?;
        bench.finish().await?;
    }
    Ok(())
}

/// The nodes of the chain, topmost first.
fn nodes(bench: &Bench) -> Vec<Arc<Node>> {
    let mut nodes = vec![bench.node.clone()];
    nodes.extend(bench.node.chain());
    nodes
}

async fn above_base(scene: Arc<Scene>) -> Outcome {
    let bench = chain(&scene).await?;
    let nodes = nodes(&bench);
    must(nodes.len() == 3, || format!("{} layers", nodes.len()))?;
    for (depth, base) in nodes.iter().enumerate() {
        for (at, decided) in DECIDED.into_iter().enumerate() {
            let offset = at as u64 * bench.cluster;
            let status = bench
                .handle
                .block_status_above(Some(base), offset, bench.cluster)
                .await?;
            let expected = decided.is_some_and(|decided| (decided as usize) < depth);
            must(status.is_allocated() == expected, || {
                format!("cluster {at} above layer {depth}: {:?}", status.flags)
            })?;
            must(status.len > 0, || {
                format!("cluster {at} above layer {depth}: no bytes")
            })?;
        }
    }
    drop(nodes);
    bench.finish().await
}

async fn allocated_above(scene: Arc<Scene>) -> Outcome {
    let bench = chain(&scene).await?;
    let nodes = nodes(&bench);
    for (at, decided) in DECIDED.into_iter().enumerate() {
        let offset = at as u64 * bench.cluster;
        let mut asked = vec![(None, false, 3)];
        for (depth, base) in nodes.iter().enumerate() {
            asked.push((Some(base), false, depth));
            asked.push((Some(base), true, depth + 1));
        }
        for (base, include, layers) in asked {
            let (found, len) = bench
                .handle
                .is_allocated_above(base, include, offset, bench.cluster)
                .await?;
            let expected = decided.is_some_and(|decided| (decided as usize) < layers);
            must(found == expected && len > 0 && len <= bench.cluster, || {
                format!("cluster {at} in the upper {layers} layers: {found} for {len} bytes")
            })?;
        }
    }
    // Through all there is, in one go: the answers cover the disk.
    let mut at = 0;
    while at < bench.size() {
        let left = bench.size() - at;
        let (_, len) = bench
            .handle
            .is_allocated_above(None, false, at, left)
            .await?;
        must(len > 0 && len <= left, || format!("{len} bytes at {at:#x}"))?;
        at += len;
    }
    drop(nodes);
    bench.finish().await
}

async fn short_layer(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, bench.size()).await?;
    let bench = bench.overlay(2).await?;
    let mut bench = bench.overlay(8).await?;
    bench.check_all("through a short layer").await?;
    bench.truthful().await?;
    let base = bench.node.chain().pop();
    let (decided, _) = bench
        .handle
        .is_allocated_above(base.as_ref(), false, 5 * cluster, cluster)
        .await?;
    must(decided, || {
        "the short layer doesn't count as deciding what it ends before".into()
    })?;
    let (decided, len) = bench
        .handle
        .is_allocated_above(base.as_ref(), false, cluster, 4 * cluster)
        .await?;
    must(!decided && len == cluster, || {
        format!("up to its end: {decided} for {len} bytes")
    })?;
    let status = bench.handle.block_status(cluster, 7 * cluster).await?;
    must(
        status.is_data() && status.depth == 2 && status.len == cluster,
        || {
            format!(
                "{:?} at depth {} for {}",
                status.flags, status.depth, status.len
            )
        },
    )?;
    drop(base);
    // A copy of a part brings zeroes from beyond the short layer's end, not the base's data.
    bench.write(2 * cluster + 100, 100).await?;
    bench.write(2 * cluster - 50, 20).await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn end_of_backing(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 2 * cluster + 1536).await?;
    let cluster = bench.cluster;
    bench.write(0, bench.size()).await?;
    let end = bench.size();
    let bench = bench.overlay(6).await?;
    let status = bench.handle.block_status(2 * cluster, 3 * cluster).await?;
    must(
        status.is_data() && status.depth == 1 && status.len == end - 2 * cluster,
        || {
            format!(
                "{:?} at depth {} for {}",
                status.flags, status.depth, status.len
            )
        },
    )?;
    let status = bench.handle.block_status(end, cluster).await?;
    must(
        status.is_zero() && !status.flags.contains(StatusFlags::DATA),
        || format!("beyond its end: {:?}", status.flags),
    )?;
    // The overlay alone knows that as well.
    let base = bench.node.chain().pop();
    let status = bench
        .handle
        .block_status_above(base.as_ref(), end, cluster)
        .await?;
    drop(base);
    must(status.is_zero(), || {
        format!("beyond its end, of the overlay alone: {:?}", status.flags)
    })?;
    bench.check_all("across the end").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn shorter_overlay(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, bench.size()).await?;
    let mut bench = bench.overlay_of(3 * cluster + 512).await?;
    let status = bench.handle.block_status(cluster, 100 * cluster).await?;
    let end = cluster + status.len == bench.size();
    must(
        status.is_data() && (end == status.flags.contains(StatusFlags::EOF)),
        || format!("{:?} for {}", status.flags, status.len),
    )?;
    bench.truthful().await?;
    bench.write(bench.size() - 5, 5).await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn inside_clusters(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(2 * cluster, 3 * cluster).await?;
    for (offset, len) in [
        (2 * cluster + 512, 512),
        (2 * cluster + 1, 1),
        (3 * cluster - 512, 1024),
        (4 * cluster + 700, cluster - 700),
    ] {
        let status = bench.handle.block_status(offset, len).await?;
        must(
            status.is_data() && status.len > 0 && status.len <= len,
            || {
                format!(
                    "at {offset:#x}+{len:#x}: {:?} for {}",
                    status.flags, status.len
                )
            },
        )?;
        let Some((node, at)) = &status.mapped else {
            continue;
        };
        let name = node.filename().unwrap_or_default();
        let mut there = vec![0; status.len as usize];
        scene.lab.file(&name)?.read(*at, &mut there);
        let expected = &bench.model[offset as usize..(offset + status.len) as usize];
        crate::bench::same(
            &there,
            expected,
            offset,
            "the bytes at the offset that status gives",
        )?;
    }
    for offset in [cluster + 100, 6 * cluster + 1] {
        let status = bench.handle.block_status(offset, 300).await?;
        must(status.is_zero() && status.len == 300, || {
            format!("at {offset:#x}: {:?} for {}", status.flags, status.len)
        })?;
    }
    bench.finish().await
}

async fn through_filter(scene: Arc<Scene>) -> Outcome {
    let mut bench = chain(&scene).await?;
    let plain = bench.handle.clone();
    let topped = bench.through(Probe::new())?;
    for at in 0..16 {
        let (offset, len) = (at * bench.cluster / 2, bench.cluster);
        let below = plain.block_status(offset, len).await?;
        let above = bench.handle.block_status(offset, len).await?;
        let same = (above.flags, above.len) == (below.flags, below.len)
            && above.depth == below.depth + 1
            && above.mapped.as_ref().map(|(node, at)| (node.id(), *at))
                == below.mapped.as_ref().map(|(node, at)| (node.id(), *at));
        must(same, || {
            format!("above the filter {above:?}, below it {below:?}")
        })?;
        let below = plain.is_allocated_above(None, false, offset, len).await?;
        let above = bench
            .handle
            .is_allocated_above(None, false, offset, len)
            .await?;
        must(above == below, || {
            format!("allocated: {above:?}, {below:?}")
        })?;
    }
    drop(plain);
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn extremes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.cluster).await?;
    let size = bench.size();
    for (offset, len) in [
        (size, 512),
        (size + 1, 512),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
    ] {
        let status = bench.handle.block_status(offset, len).await?;
        must(
            status.len == 0 && status.flags.contains(StatusFlags::EOF),
            || format!("at {offset:#x}: {:?} for {}", status.flags, status.len),
        )?;
        let (allocated, len) = bench
            .handle
            .is_allocated_above(None, false, offset, len)
            .await?;
        must(!allocated && len == 0, || {
            format!("allocated at {offset:#x} for {len} bytes")
        })?;
    }
    let status = bench.handle.block_status(size - 1, u64::MAX).await?;
    must(
        status.len == 1 && status.flags.contains(StatusFlags::EOF),
        || format!("the last byte: {:?} for {}", status.flags, status.len),
    )?;
    let status = bench.handle.block_status(0, u64::MAX).await?;
    must(status.len > 0 && status.len <= size, || {
        format!("{} bytes of all", status.len)
    })?;
    bench.finish().await
}

async fn follows(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    let discards = bench
        .capabilities()
        .contains(block_core::Capabilities::DISCARD);
    for flush in [false, true] {
        for round in 0..3 {
            let offset = (round + 1) * cluster;
            bench.write(offset, cluster).await?;
            bench.truthful().await?;
            bench
                .zero(offset + cluster / 2, cluster, RequestFlags::MAY_UNMAP)
                .await?;
            bench.truthful().await?;
            if discards {
                bench.discard(cluster, 2 * cluster).await?;
                bench.truthful().await?;
            }
            if flush {
                bench.handle.flush().await?;
                bench.truthful().await?;
            }
        }
    }
    bench.finish().await
}

async fn holes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    let cluster = bench.cluster;
    bench.write(0, 4 * cluster).await?;
    bench.handle.flush().await?;
    let status = bench.handle.block_status(cluster, cluster).await?;
    let Some((file, at)) = status.mapped else {
        return crate::bench::not_covered("block status tells no places");
    };
    let place = scene.lab.disks.place(&file.filename().unwrap_or_default());
    let at = at + place.map_or(0, |(_, base)| base);
    // Somebody trims the storage behind the image's back: what was there reads as zeroes.
    let mut content = bench.disk.content();
    content.punch(at, cluster);
    bench.disk.restore(content);
    bench.model[cluster as usize..2 * cluster as usize].fill(0);
    let status = bench.handle.block_status(cluster, cluster).await?;
    // Holes are made of pages: a smaller cluster leaves none behind.
    let hole = at.is_multiple_of(crate::storage::PAGE);
    must(status.is_allocated() && (status.is_zero() || !hole), || {
        format!("a hole: {:?}", status.flags)
    })?;
    bench.truthful().await?;
    bench.finish().await
}
