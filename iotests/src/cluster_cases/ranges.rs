//! Zero writes and discards over ranges of many clusters: of all kinds, beginning and ending inside of them, across the
//! borders of mapping tables, of whole disks, and up to an end that is no cluster's.

use std::sync::Arc;

use block_core::{Capabilities, RequestFlags};

use super::kinds::{Kind, image_for};
use crate::{
    bench::{Bench, Outcome, Stop, case, must, pattern, same, wrong},
    case::{Case, Group, Scene},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Zero,
    Unmap,
    Discard,
}

impl Act {
    const ALL: [Self; 3] = [Self::Zero, Self::Unmap, Self::Discard];

    const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Unmap => "zero-unmap",
            Self::Discard => "discard",
        }
    }

    const fn says(self) -> &'static str {
        match self {
            Self::Zero => "a zero write",
            Self::Unmap => "a zero write that may unmap",
            Self::Discard => "a discard",
        }
    }

    const fn needs(self) -> Capabilities {
        match self {
            Self::Discard => Capabilities::DISCARD,
            Self::Zero | Self::Unmap => Capabilities::WRITE_ZEROES,
        }
    }

    async fn carry_out(self, bench: &mut Bench, offset: u64, len: u64) -> Outcome {
        match self {
            Self::Zero => bench.zero(offset, len, RequestFlags::empty()).await,
            Self::Unmap => bench.zero(offset, len, RequestFlags::MAY_UNMAP).await,
            Self::Discard => bench.discard(offset, len).await,
        }
    }

    async fn unmodelled(self, bench: &Bench, offset: u64, len: u64) -> block_core::Result<()> {
        match self {
            Self::Zero => {
                bench
                    .handle
                    .write_zeroes(offset, len, RequestFlags::empty())
                    .await
            }
            Self::Unmap => {
                bench
                    .handle
                    .write_zeroes(offset, len, RequestFlags::MAY_UNMAP)
                    .await
            }
            Self::Discard => bench.handle.discard(offset, len).await,
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for act in Act::ALL {
        let (name, says) = (act.name(), act.says());
        for backing in [false, true] {
            let over = if backing { "-over-backing" } else { "" };
            let group = if backing { Group::Backing } else { Group::Rw };
            cases.push(case(
                group,
                format!("cluster-{name}-over-all-kinds{over}"),
                format!(
                    "{says} from inside one cluster to inside another, over clusters of every kind between, leaves exactly \
                     what it should, also when it is repeated{}",
                    if backing { ", with data below" } else { "" }
                ),
                move |scene| mixed(scene, act, backing),
            ));
        }
        cases.push(case(
            Group::Rw,
            format!("cluster-{name}-of-the-whole-disk"),
            format!(
                "{says} of the whole disk leaves nothing of it, and the disk can be written again"
            ),
            move |scene| whole(scene, act),
        ));
        cases.push(case(
            Group::Rw,
            format!("cluster-{name}-of-the-last-short-cluster"),
            format!(
                "{says} of the last cluster of a disk that ends inside of it counts as one of a whole cluster, and spares \
                 the one before"
            ),
            move |scene| tail(scene, act),
        ));
        cases.push(case(
            Group::Rw,
            format!("cluster-{name}-across-mapping-tables"),
            format!(
                "{says} of thousands of clusters, over tables that are there and tables that aren't, takes everything in \
                 its range and spares what is right before and behind it"
            ),
            move |scene| tables(scene, act),
        ));
        cases.push(case(
            Group::Rw,
            format!("cluster-{name}-around-the-edges"),
            format!("{says} that begins or ends a byte or a sector beside a cluster's edge spares what it doesn't cover"),
            move |scene| edges(scene, act),
        ));
    }
    cases
}

async fn mixed(scene: Arc<Scene>, act: Act, backing: bool) -> Outcome {
    let kinds: Vec<Kind> = if backing {
        vec![
            Kind::DataOverBacking,
            Kind::FromBacking,
            Kind::ZeroedOverBacking,
            Kind::ZeroedDataOverBacking,
            Kind::CompressedOverBacking,
        ]
    } else {
        vec![
            Kind::Data,
            Kind::Unallocated,
            Kind::Zeroed,
            Kind::ZeroedData,
            Kind::Compressed,
        ]
    };
    let count = 2 * kinds.len() as u64 + 4;
    let mut bench = image_for(&scene, backing, count).await?;
    bench.needs(act.needs())?;
    let cluster = bench.cluster;
    bench.write(0, 2 * cluster).await?;
    bench.write((count - 2) * cluster, 2 * cluster).await?;
    for (at, kind) in kinds.into_iter().enumerate() {
        match kind
            .prepare(&mut bench, (2 + 2 * at as u64) * cluster, 2)
            .await
        {
            // What the driver can't have is missing in between.
            Ok(()) | Err(Stop::NotCovered(_)) => {}
            other => return other,
        }
    }
    bench.handle.flush().await?;
    for _ in 0..2 {
        act.carry_out(&mut bench, cluster + 512, (count - 2) * cluster - 1024)
            .await?;
        bench.check_all("after it").await?;
        bench.truthful().await?;
    }
    bench.write(3 * cluster + 77, 4 * cluster).await?;
    bench.check_all("after a write into it").await?;
    act.carry_out(&mut bench, 3 * cluster, 3 * cluster).await?;
    bench.check_all("once more").await?;
    bench.finish().await
}

async fn whole(scene: Arc<Scene>, act: Act) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.needs(act.needs())?;
    for round in 0..3 {
        bench.write(round * 100, bench.size() - round * 100).await?;
        let size = bench.size();
        act.carry_out(&mut bench, 0, size).await?;
        bench.check_all("after it").await?;
        bench.truthful().await?;
        bench = bench.reopen().await?;
    }
    bench.write(5000, 5000).await?;
    bench.finish().await
}

async fn tail(scene: Arc<Scene>, act: Act) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 3 * cluster + 1024).await?;
    bench.needs(act.needs())?;
    let at = 3 * bench.cluster;
    bench.write(0, bench.size()).await?;
    let len = bench.size() - at;
    act.carry_out(&mut bench, at, len).await?;
    bench.check_all("after it").await?;
    bench.truthful().await?;
    bench.write(at + 1, 2).await?;
    act.carry_out(&mut bench, at - 512, len + 512).await?;
    bench.check_all("from the cluster before").await?;
    bench.write(at + 512, len - 512).await?;
    bench.check_all("after a write to the end").await?;
    bench.finish().await
}

async fn edges(scene: Arc<Scene>, act: Act) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.needs(act.needs())?;
    let cluster = bench.cluster;
    for (before, after) in [
        (1, 1),
        (512, 512),
        (0, 1),
        (1, 0),
        (cluster - 1, cluster - 1),
    ] {
        bench.write(0, bench.size()).await?;
        // From inside cluster 2 to inside cluster 4, and the other way round: less than clusters 3 to 4.
        act.carry_out(&mut bench, 3 * cluster - before, cluster + before + after)
            .await?;
        bench.check_all("beyond the edges").await?;
        bench.write(0, bench.size()).await?;
        act.carry_out(
            &mut bench,
            3 * cluster + before,
            2 * cluster - before - after,
        )
        .await?;
        bench.check_all("inside the edges").await?;
    }
    bench.finish().await
}

/// Clusters of the large disk: more than any mapping table of usual size covers.
const MANY: u64 = 9000;

async fn tables(scene: Arc<Scene>, act: Act) -> Outcome {
    let bench = Bench::new(&scene, 1).await?;
    bench.needs(act.needs())?;
    let cluster = bench.cluster;
    bench.close_only().await?;
    // Too large for a model of every byte: a few places are known.
    let lab = &scene.lab;
    let format = &scene.format;
    lab.create(&format.name, "large", MANY * cluster, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "large", None, &block_core::Options::new())
        .await?;
    let handle = lab.attach(&node, "guest")?;
    let bench = Bench::bare(&scene, node, handle, cluster)?;
    let mut places = vec![0, 1, 2, MANY - 3, MANY - 2, MANY - 1];
    places.extend(
        (1..14)
            .flat_map(|bit| [(1 << bit) - 1, 1 << bit])
            .filter(|at| *at < MANY),
    );
    places.sort_unstable();
    places.dedup();
    for at in &places {
        let offset = at * cluster;
        let data = pattern(*at, offset, 1024);
        bench
            .handle
            .write(offset + 512, data, RequestFlags::empty())
            .await?;
    }
    bench.handle.flush().await?;
    let (from, to) = (2 * cluster, (MANY - 2) * cluster);
    if let Err(error) = act.unmodelled(&bench, from, to - from).await {
        return wrong(format!("{} of {} clusters: {error}", act.name(), MANY - 4));
    }
    let zeroes = act != Act::Discard || bench.discard_zeroes();
    for round in 0..2 {
        for at in &places {
            let offset = at * cluster;
            let found = bench.handle.read(offset, 2048).await?;
            let inside = (from..to).contains(&offset);
            let mut old = vec![0; 2048];
            old[512..1536].copy_from_slice(&pattern(*at, offset, 1024));
            if inside && (zeroes || found.iter().all(|byte| *byte == 0)) {
                same(&found, &[0; 2048], offset, "inside the range")?;
            } else {
                same(&found, &old, offset, "a place that nobody touched")?;
            }
        }
        if round == 0 {
            bench.handle.flush().await?;
            bench.own_check().await?;
        }
    }
    let status = bench.handle.block_status(from, to - from).await?;
    if zeroes && bench.capabilities().contains(Capabilities::WRITE_ZEROES) {
        must(status.is_zero(), || {
            format!("block status says {:?}", status.flags)
        })?;
    }
    bench.close_only().await
}
