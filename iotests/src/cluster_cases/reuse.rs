//! What becomes of the places that clusters had: reused when they were given up, kept when they were to be kept, never shown
//! to anybody else, and never leaked however often it is repeated.

use std::sync::Arc;

use block_core::{Capabilities, RequestFlags, status::StatusFlags};

use crate::{
    bench::{Bench, Outcome, case, must, not_covered},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "cluster-place-of-a-discarded-one-is-used-again",
            "new clusters go where discarded ones were: the storage doesn't grow, and nothing of the old data shows",
            reused,
        ),
        case(
            Group::Rw,
            "cluster-place-of-a-zeroed-one-is-kept",
            "a cluster that was zeroed with its place kept is written there again, and nobody else gets the place",
            kept,
        ),
        case(
            Group::Rw,
            "cluster-packed-over-two-places-gives-up-both",
            "a compressed cluster whose bytes lie in two places leaves nothing behind in either when it is overwritten, zeroed or \
             discarded, and its neighbours keep theirs",
            packed_over_two,
        ),
        case(
            Group::Rw,
            "cluster-discard-write-read-many-times",
            "discarding and writing the same clusters over and over gives the right bytes every time and doesn't use up \
             storage",
            over_and_over,
        ),
        case(
            Group::Rw,
            "cluster-new-one-never-shows-old-data",
            "a write into a part of a new cluster never shows what was in its place before, whoever had it",
            no_old_data,
        ),
        case(
            Group::Rw,
            "cluster-unmapped-again-and-again-isnt-freed-twice",
            "zeroing and discarding the same clusters several times before and after a flush frees their places once",
            freed_once,
        ),
        case(
            Group::Rw,
            "cluster-order-of-places-isnt-order-of-guests",
            "clusters that were written in any order read back in one request, and can be zeroed and discarded in one",
            scattered,
        ),
        case(
            Group::Rw,
            "cluster-empty-image-drops-all-data",
            "emptying an image makes it read as what is below it, and it can be written afterwards",
            emptied,
        ),
        case(
            Group::Backing,
            "cluster-empty-overlay-shows-the-backing-file",
            "emptying an overlay shows the backing file everywhere, also where there were zeroes or discarded clusters",
            emptied_overlay,
        ),
    ]
}

/// Whether a discarded cluster gives up its place, as far as block status tells.
async fn gives_up(bench: &mut Bench, offset: u64) -> Result<bool, crate::bench::Stop> {
    let status = bench.handle.block_status(offset, bench.cluster).await?;
    Ok(!status.flags.contains(StatusFlags::OFFSET_VALID))
}

async fn reused(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 40).await?;
    bench.needs(Capabilities::DISCARD | Capabilities::DISCARD_ZEROES)?;
    let cluster = bench.cluster;
    bench.write(0, 12 * cluster).await?;
    bench.discard(0, 12 * cluster).await?;
    if !gives_up(&mut bench, 0).await? {
        return not_covered("discarded clusters keep their place");
    }
    bench.handle.flush().await?;
    bench.handle.flush().await?;
    let before = bench.disk.len();
    bench.write(20 * cluster, 12 * cluster).await?;
    bench.handle.flush().await?;
    let after = bench.disk.len();
    must(after <= before + cluster, || {
        format!("the storage grew from {before} to {after} bytes")
    })?;
    bench.finish().await
}

async fn kept(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 20).await?;
    bench.needs(Capabilities::WRITE_ZEROES)?;
    let cluster = bench.cluster;
    let place = |status: block_core::status::BlockStatus| status.mapped.map(|(_, offset)| offset);
    bench.write(2 * cluster, 4 * cluster).await?;
    let before = place(bench.handle.block_status(2 * cluster, cluster).await?);
    if before.is_none() {
        return not_covered("block status doesn't say where clusters are");
    }
    bench
        .zero(2 * cluster, 4 * cluster, RequestFlags::empty())
        .await?;
    let zeroed = place(bench.handle.block_status(2 * cluster, cluster).await?);
    let known = scene.lab.registry.get(&scene.format.name)?;
    let promises = known
        .create_options()
        .iter()
        .any(|option| option.name == "preallocation");
    // An image without a mark for zeroes, as qcow2's version 2, has nothing else to say so with.
    let info = bench.handle.info().await?;
    let is_old = info
        .format_specific
        .is_some_and(|(_, data)| data["compat"] == "0.10");
    if zeroed.is_none() && (is_old || !promises) {
        return not_covered("zeroed clusters give up their place");
    }
    // Where space can be had in advance, only MAY_UNMAP gives it away.
    must(before == zeroed, || {
        format!("zeroed without MAY_UNMAP, a cluster at {before:x?} is at {zeroed:x?}")
    })?;
    bench.handle.flush().await?;
    bench.write(10 * cluster, 6 * cluster).await?;
    bench.check_all("after new clusters").await?;
    bench.write(2 * cluster + 700, cluster).await?;
    let after = place(bench.handle.block_status(2 * cluster, cluster).await?);
    must(before == after, || {
        format!("it was at {before:x?} and is at {after:x?}")
    })?;
    bench.finish().await
}

async fn packed_over_two(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.needs(Capabilities::COMPRESSED)?;
    let cluster = bench.cluster;
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for n in 0..8 {
        // Five eighths don't compress: of two neighbours one goes over the end of a place.
        let mut data = vec![0; cluster as usize];
        for byte in &mut data[..cluster as usize / 8 * 5] {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            *byte = noise as u8;
        }
        let flags = RequestFlags::WRITE_COMPRESSED;
        bench.handle.write(n * cluster, data.clone(), flags).await?;
        bench.expect(n * cluster, &data);
    }
    bench.check_all("compressed").await?;
    bench.write(0, 2 * cluster).await?;
    bench.write(2 * cluster + 512 % cluster, 100).await?;
    bench
        .zero(3 * cluster, 2 * cluster, RequestFlags::MAY_UNMAP)
        .await?;
    if bench.capabilities().contains(Capabilities::DISCARD) {
        bench.discard(5 * cluster, cluster).await?;
    }
    bench.check_all("given up").await?;
    bench.handle.flush().await?;
    bench.own_check().await?;
    bench.finish().await
}

async fn over_and_over(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.needs(Capabilities::DISCARD)?;
    let cluster = bench.cluster;
    let mut sizes = Vec::new();
    for round in 0..30 {
        bench.write(cluster, 3 * cluster).await?;
        bench
            .check_range(cluster, 3 * cluster, "what was written")
            .await?;
        bench.discard(cluster, 3 * cluster).await?;
        if round % 3 == 0 {
            bench.write(2 * cluster + 5, 50).await?;
            bench
                .check_range(0, 6 * cluster, "after a small write")
                .await?;
        }
        bench.handle.flush().await?;
        sizes.push(bench.disk.len());
    }
    // However a driver delays reuse, it doesn't do so for ever.
    must(sizes[29] <= sizes[9] + 3 * cluster, || {
        format!(
            "the storage grows: {} after 10 rounds, {} after 30",
            sizes[9], sizes[29]
        )
    })?;
    bench.finish().await
}

async fn no_old_data(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 40).await?;
    let cluster = bench.cluster;
    for round in 0..4 {
        bench.write(0, 8 * cluster).await?;
        if bench.capabilities().contains(Capabilities::DISCARD) {
            bench.discard(0, 4 * cluster).await?;
        }
        bench
            .zero(4 * cluster, 4 * cluster, RequestFlags::MAY_UNMAP)
            .await?;
        bench.handle.flush().await?;
        for at in 0..8 {
            let offset = (8 + round * 8 + at) * cluster;
            bench.write(offset + 100 * at + 1, 10).await?;
        }
        bench
            .check_all("after small writes into new clusters")
            .await?;
    }
    bench.finish().await
}

async fn freed_once(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 16).await?;
    let (cluster, unmap) = (bench.cluster, RequestFlags::MAY_UNMAP);
    let discards = bench.capabilities().contains(Capabilities::DISCARD);
    for flush in [false, true] {
        bench.write(0, 6 * cluster).await?;
        for _ in 0..3 {
            if discards {
                bench.discard(0, 3 * cluster).await?;
            }
            bench.zero(cluster, 4 * cluster, unmap).await?;
            bench.zero(0, 6 * cluster, RequestFlags::empty()).await?;
            bench.zero(0, 6 * cluster, unmap).await?;
            if flush {
                bench.handle.flush().await?;
                bench.own_check().await?;
            }
        }
        bench.write(8 * cluster, 8 * cluster).await?;
        bench.write(0, cluster).await?;
        bench.check_all("after new clusters").await?;
    }
    bench.finish().await
}

async fn scattered(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 24).await?;
    let cluster = bench.cluster;
    // 7 and 24 have no common divisor: each once, none behind its neighbour.
    for at in 0..24 {
        bench.write((at * 7 + 5) % 24 * cluster, cluster).await?;
    }
    bench.check_all("scattered").await?;
    bench
        .check_range(cluster + 1, 20 * cluster, "from inside to inside")
        .await?;
    bench.write(3 * cluster - 100, 5 * cluster).await?;
    bench
        .zero(9 * cluster - 1, 4 * cluster, RequestFlags::MAY_UNMAP)
        .await?;
    if bench.capabilities().contains(Capabilities::DISCARD) {
        bench.discard(15 * cluster, 3 * cluster).await?;
    }
    bench.check_all("after requests over many").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn emptied(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.needs(Capabilities::MAKE_EMPTY)?;
    let all = bench.size();
    // With a raw data file a new image has all of its clusters.
    let before = crate::parts::ending(&scene.format.create).is_some()
        && bench
            .handle
            .is_allocated_above(None, false, 0, all)
            .await?
            .0;
    bench.write(100, bench.size() - 200).await?;
    bench
        .zero(bench.cluster, bench.cluster, RequestFlags::empty())
        .await?;
    bench.handle.make_empty().await?;
    bench.model.fill(0);
    bench.check_all("empty").await?;
    let (allocated, len) = bench
        .handle
        .is_allocated_above(None, false, 0, bench.size())
        .await?;
    must(allocated == before && len == bench.size(), || {
        format!("allocated: {allocated} for {len} bytes")
    })?;
    bench.own_check().await?;
    bench.write(3 * bench.cluster - 5, 10).await?;
    bench.finish().await
}

async fn emptied_overlay(scene: Arc<Scene>) -> Outcome {
    let mut bench = super::kinds::image_for(&scene, true, 8).await?;
    bench.needs(Capabilities::MAKE_EMPTY)?;
    let cluster = bench.cluster;
    let below = bench.model.clone();
    bench.write(0, 3 * cluster).await?;
    bench
        .zero(3 * cluster, cluster, RequestFlags::MAY_UNMAP)
        .await?;
    bench.discard(0, cluster).await?;
    bench.handle.make_empty().await?;
    bench.model = below;
    bench.check_all("empty").await?;
    bench.write(cluster + 7, 7).await?;
    bench.finish().await
}
