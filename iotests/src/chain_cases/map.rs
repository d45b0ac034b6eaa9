//! Block status beside `qemu-img map` of the installed tools, extent by extent.

use std::sync::Arc;

use block_core::{RequestFlags, status::StatusFlags};
use serde::Deserialize;

use crate::{
    bench::{Bench, Outcome, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Interop,
            "interop-status-equals-qemu-img-map",
            "for clusters of every kind, block status tells the same data, zeroes, layers and places as qemu-img map does",
            |scene| map(scene, false),
        ),
        case(
            Group::Interop,
            "interop-status-of-chain-equals-qemu-img-map",
            "for a chain of layers of different lengths, block status tells the same as qemu-img map does",
            |scene| map(scene, true),
        ),
    ]
}

/// An extent as `qemu-img map --output=json` prints it.
#[derive(Debug, Deserialize)]
struct Extent {
    start: u64,
    length: u64,
    depth: u32,
    zero: bool,
    data: bool,
    offset: Option<u64>,
    #[serde(default)]
    compressed: bool,
}

async fn map(scene: Arc<Scene>, chain: bool) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 11 * cluster + 512).await?;
    if chain {
        let cluster = bench.cluster;
        bench.write(0, 5 * cluster).await?;
        bench.write(8 * cluster, cluster).await?;
        bench = bench.overlay(7).await?;
        bench.write(cluster, cluster).await?;
        bench = bench.overlay(10).await?;
    }
    let cluster = bench.cluster;
    bench.write(2 * cluster, 2 * cluster).await?;
    bench.write(6 * cluster + 512, 512).await?;
    bench
        .zero(3 * cluster, 2 * cluster, RequestFlags::empty())
        .await?;
    bench
        .zero(8 * cluster, cluster, RequestFlags::MAY_UNMAP)
        .await?;
    if bench
        .capabilities()
        .contains(block_core::Capabilities::COMPRESSED)
    {
        let data = vec![3; cluster as usize];
        let flags = RequestFlags::WRITE_COMPRESSED;
        bench.handle.write(9 * cluster, data.clone(), flags).await?;
        bench.expect(9 * cluster, &data);
    }
    bench.handle.flush().await?;
    let Some(text) = bench.ask_qemu(&["map", "--output=json"])? else {
        return not_covered("the installed qemu-img can't be asked about it");
    };
    let extents: Vec<Extent> = match serde_json::from_str(&text) {
        Ok(extents) => extents,
        Err(error) => return wrong(format!("qemu-img map: {error}: {text}")),
    };
    let end = extents.last().map(|extent| extent.start + extent.length);
    must(end == Some(bench.size()), || {
        format!("qemu-img map ends at {end:?}")
    })?;
    for extent in extents {
        let mut at = extent.start;
        let stop = extent.start + extent.length;
        while at < stop {
            let status = bench.handle.block_status(at, stop - at).await?;
            // Holes in the storage may be known to one of them only; a zero that isn't one is found at the end.
            let known_here = status.is_zero() && status.flags.contains(StatusFlags::DATA);
            let same = (status.is_zero() == extent.zero || known_here)
                && status.flags.contains(StatusFlags::DATA) == extent.data
                && status.flags.contains(StatusFlags::COMPRESSED) == extent.compressed
                && (!extent.data || status.depth == extent.depth);
            let place = status.mapped.as_ref().map(|(_, offset)| *offset);
            let expected = extent.offset.map(|offset| offset + at - extent.start);
            must(same && (!extent.data || place == expected), || {
                format!(
                    "at {at:#x} {:?} at depth {}, place {place:x?}; qemu-img map says {extent:x?}",
                    status.flags, status.depth
                )
            })?;
            must(status.len > 0, || format!("no bytes at {at:#x}"))?;
            at += status.len;
        }
    }
    bench.truthful().await?;
    bench.finish().await
}
