//! Every kind of cluster meets every operation, with data before and after it. What the operation leaves is judged byte for
//! byte, block status has to agree with it, what was freed is used again, and then the cluster is written in part: whatever
//! it has become, the rest of it must still be what it was.

use std::sync::Arc;

use block_core::{Capabilities, RequestFlags};

use crate::{
    bench::{Bench, Outcome, Stop, case, must},
    case::{Case, Group, Scene},
};

/// Clusters of the image; the first and the last are never touched.
const CLUSTERS: u64 = 12;
/// The cluster that it is about; its neighbours have data.
const TARGET: u64 = 4;

/// What a cluster is before the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Unallocated,
    Data,
    Zeroed,
    ZeroedData,
    Discarded,
    Compressed,
    FromBacking,
    DataOverBacking,
    ZeroedOverBacking,
    ZeroedDataOverBacking,
    CompressedOverBacking,
}

impl Kind {
    pub const ALL: [Self; 11] = [
        Self::Unallocated,
        Self::Data,
        Self::Zeroed,
        Self::ZeroedData,
        Self::Discarded,
        Self::Compressed,
        Self::FromBacking,
        Self::DataOverBacking,
        Self::ZeroedOverBacking,
        Self::ZeroedDataOverBacking,
        Self::CompressedOverBacking,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Unallocated => "unallocated",
            Self::Data => "data",
            Self::Zeroed => "zeroed",
            Self::ZeroedData => "zeroed-data",
            Self::Discarded => "discarded",
            Self::Compressed => "compressed",
            Self::FromBacking => "backing-data",
            Self::DataOverBacking => "data-over-backing",
            Self::ZeroedOverBacking => "zeroed-over-backing",
            Self::ZeroedDataOverBacking => "zeroed-data-over-backing",
            Self::CompressedOverBacking => "compressed-over-backing",
        }
    }

    const fn says(self) -> &'static str {
        match self {
            Self::Unallocated => "that was never written",
            Self::Data => "with data",
            Self::Zeroed => "that was zeroed before it had data",
            Self::ZeroedData => "whose data was zeroed in place",
            Self::Discarded => "whose data was discarded",
            Self::Compressed => "that is compressed",
            Self::FromBacking => "that only the backing file has",
            Self::DataOverBacking => "with data that hides the backing file's",
            Self::ZeroedOverBacking => "that hides the backing file's data with zeroes",
            Self::ZeroedDataOverBacking => "whose data over the backing file's was zeroed in place",
            Self::CompressedOverBacking => "that is compressed and hides the backing file's data",
        }
    }

    const fn has_backing(self) -> bool {
        matches!(
            self,
            Self::FromBacking
                | Self::DataOverBacking
                | Self::ZeroedOverBacking
                | Self::ZeroedDataOverBacking
                | Self::CompressedOverBacking
        )
    }

    /// Makes the `count` clusters at `offset` of that kind.
    pub async fn prepare(self, bench: &mut Bench, offset: u64, count: u64) -> Outcome {
        let len = count * bench.cluster;
        let none = RequestFlags::empty();
        match self {
            Self::Unallocated | Self::FromBacking => {}
            Self::Data | Self::DataOverBacking => bench.write(offset, len).await?,
            Self::Zeroed | Self::ZeroedOverBacking => {
                bench.needs(Capabilities::WRITE_ZEROES)?;
                bench.zero(offset, len, RequestFlags::MAY_UNMAP).await?;
            }
            Self::ZeroedData | Self::ZeroedDataOverBacking => {
                bench.needs(Capabilities::WRITE_ZEROES)?;
                bench.write(offset, len).await?;
                bench.zero(offset, len, none).await?;
            }
            Self::Discarded => {
                bench.needs(Capabilities::DISCARD)?;
                bench.write(offset, len).await?;
                bench.discard(offset, len).await?;
            }
            Self::Compressed | Self::CompressedOverBacking => {
                bench.needs(Capabilities::COMPRESSED)?;
                // Something that shrinks.
                for at in 0..count {
                    let mut data = vec![at as u8 | 1; bench.cluster as usize];
                    data[3] = 0x77;
                    let place = offset + at * bench.cluster;
                    let flags = RequestFlags::WRITE_COMPRESSED;
                    bench.handle.write(place, data.clone(), flags).await?;
                    bench.expect(place, &data);
                }
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Zero,
    ZeroUnmap,
    ZeroPart,
    Discard,
    DiscardPart,
    Write,
    WritePart,
    CopyOnRead,
}

impl Operation {
    const ALL: [Self; 8] = [
        Self::Zero,
        Self::ZeroUnmap,
        Self::ZeroPart,
        Self::Discard,
        Self::DiscardPart,
        Self::Write,
        Self::WritePart,
        Self::CopyOnRead,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::ZeroUnmap => "zero-unmap",
            Self::ZeroPart => "zero-a-part",
            Self::Discard => "discard",
            Self::DiscardPart => "discard-a-part",
            Self::Write => "write",
            Self::WritePart => "write-a-part",
            Self::CopyOnRead => "copy-on-read",
        }
    }

    const fn says(self) -> &'static str {
        match self {
            Self::Zero => "a zero write that keeps the space of a cluster",
            Self::ZeroUnmap => "a zero write that may unmap a cluster",
            Self::ZeroPart => "a zero write into the middle of a cluster",
            Self::Discard => "a discard of a cluster",
            Self::DiscardPart => "a discard of the second half of a cluster",
            Self::Write => "a write of a whole cluster",
            Self::WritePart => "a write into the middle of a cluster",
            Self::CopyOnRead => "a copying read into a cluster",
        }
    }

    async fn carry_out(self, bench: &mut Bench, offset: u64) -> Outcome {
        let (none, cluster) = (RequestFlags::empty(), bench.cluster);
        match self {
            Self::Zero => bench.zero(offset, cluster, none).await,
            Self::ZeroUnmap => bench.zero(offset, cluster, RequestFlags::MAY_UNMAP).await,
            Self::ZeroPart => {
                bench
                    .zero(offset + 700, 1111, RequestFlags::MAY_UNMAP)
                    .await
            }
            Self::Discard => {
                bench.needs(Capabilities::DISCARD)?;
                bench.discard(offset, cluster).await
            }
            Self::DiscardPart => {
                bench.needs(Capabilities::DISCARD)?;
                let half = cluster / 2;
                bench.discard(offset + half, half).await
            }
            Self::Write => bench.write(offset, cluster).await,
            Self::WritePart => bench.write(offset + 513, 1022).await,
            Self::CopyOnRead => {
                let (lent, buf) = block_core::Buffer::try_new(512)?.lend();
                let flags = RequestFlags::COPY_ON_READ;
                bench.handle.readv(offset + 512, buf, flags).await?;
                let Ok(found) = lent.reclaim() else {
                    return Err("a driver kept a part of a read buffer".into());
                };
                let from = offset as usize + 512;
                let expected = &bench.model[from..from + 512];
                crate::bench::same(
                    &found,
                    expected,
                    offset + 512,
                    "what the copying read returned",
                )
            }
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in Kind::ALL {
        for operation in Operation::ALL {
            let name = format!("cluster-{}-of-{}", operation.name(), kind.name());
            let proves = format!(
                "{} {} leaves exactly what it should, there and around it, and the cluster can be written in part afterwards",
                operation.says(),
                kind.says()
            );
            let group = if kind.has_backing() {
                Group::Backing
            } else {
                Group::Rw
            };
            cases.push(case(group, name, proves, move |scene| {
                meets(scene, kind, operation)
            }));
        }
    }
    cases
}

/// An image with backing data everywhere, if the kind is about that.
pub(super) async fn image_for(
    scene: &Arc<Scene>,
    backing: bool,
    clusters: u64,
) -> Result<Bench, Stop> {
    let mut bench = Bench::new(scene, clusters).await?;
    if backing {
        bench.needs(Capabilities::BACKING)?;
        bench.write(0, bench.size()).await?;
        bench = bench.overlay(clusters).await?;
    }
    Ok(bench)
}

async fn meets(scene: Arc<Scene>, kind: Kind, operation: Operation) -> Outcome {
    let mut bench = image_for(&scene, kind.has_backing(), CLUSTERS).await?;
    let cluster = bench.cluster;
    let target = TARGET * cluster;
    bench.write(target - cluster, cluster).await?;
    bench.write(target + cluster, cluster).await?;
    kind.prepare(&mut bench, target, 1).await?;
    bench.handle.flush().await?;
    bench.check_all("before the operation").await?;

    operation.carry_out(&mut bench, target).await?;
    bench.check_all("after the operation").await?;
    let status = bench.handle.block_status(target, cluster).await?;
    let whole = matches!(operation, Operation::Zero | Operation::ZeroUnmap);
    if whole && !kind.has_backing() && bench.capabilities().contains(Capabilities::WRITE_ZEROES) {
        must(status.is_zero(), || {
            format!("block status says {:?}", status.flags)
        })?;
    }
    if operation == Operation::CopyOnRead && kind.has_backing() {
        let status = bench.handle.block_status(target + 512, 512).await?;
        must(status.depth == 0, || {
            format!("it is still at depth {}", status.depth)
        })?;
    }
    bench.truthful().await?;

    // What was freed is used again, before and after it is known to be free on disk.
    bench.write((TARGET + 2) * cluster, cluster).await?;
    bench.handle.flush().await?;
    bench.write((TARGET + 3) * cluster, 2 * cluster).await?;
    bench.check_all("after new clusters").await?;
    let mut bench = bench.reopen().await?;
    bench.check_all("opened again").await?;
    bench.write(target + 1000, 100).await?;
    bench.truthful().await?;
    bench.finish().await
}
