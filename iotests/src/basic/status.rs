//! What block status says of each kind of cluster.

use std::sync::Arc;

use block_core::{Capabilities, RequestFlags, status::StatusFlags};

use super::Fixture;
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    cases::{ClusterKind, Image},
    oracle::AfterDiscard,
    pattern::stamped,
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = ClusterKind::ALL
        .into_iter()
        .map(|kind| {
            Case::new(
                Group::Status,
                format!("status-of-{}-cluster", kind.name()),
                format!(
                    "block status tells a {} cluster, and its neighbours, for what they are",
                    kind.name()
                ),
                move |scene| status(scene, kind),
            )
        })
        .collect();
    cases.push(Case::new(
        Group::Status,
        "status-after-zero-write-and-discard",
        "clusters that were zeroed or discarded read as zeroes by block status too",
        zeroed,
    ));
    cases.push(Case::new(
        Group::Status,
        "status-covers-everything-once",
        "walking over a disk by block status covers every byte, ends at its end, and never calls data zero",
        walk,
    ));
    cases
}

async fn status(scene: Arc<Scene>, kind: ClusterKind) -> CaseResult {
    let Some(image) = Image::new(&scene, Image::setup_for(kind)).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    let (target, cluster) = (image.target(), image.cluster);
    let handle = image.guest.handle();
    if kind == ClusterKind::Unallocated
        && crate::parts::ending(&scene.format.create).is_some()
        && handle
            .block_status(target, cluster)
            .await?
            .flags
            .contains(StatusFlags::DATA)
    {
        let why = "in a raw data file every cluster of a new image has its place";
        return Ok(Verdict::NotCovered(why.into()));
    }
    if let Err(verdict) = image.prepare(kind, target).await? {
        return Ok(verdict);
    }
    let status = handle.block_status(target, cluster).await?;
    let format = image
        .node
        .driver()
        .capabilities()
        .contains(Capabilities::BACKING)
        || handle.info().await?.cluster_size.is_some();
    if status.len == 0 || status.len > cluster {
        return Err(format!("{} bytes of status for one cluster", status.len).into());
    }
    let wrong = match kind {
        ClusterKind::Data => !status.is_data() || status.depth != 0,
        ClusterKind::ZeroAllocated => !status.is_zero(),
        ClusterKind::Unallocated => !status.is_zero() || (format && status.is_allocated()),
        ClusterKind::Compressed => {
            !status.is_data() || !status.flags.contains(StatusFlags::COMPRESSED)
        }
        ClusterKind::Shared => !status.is_data() || status.depth != 1,
    };
    if wrong {
        return Err(format!("{:?} at depth {}", status.flags, status.depth).into());
    }
    for neighbour in [target - cluster, target + cluster] {
        let status = handle.block_status(neighbour, cluster).await?;
        if !status.is_data() || status.len != cluster {
            return Err(
                format!("its neighbour: {:?} for {} bytes", status.flags, status.len).into(),
            );
        }
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn zeroed(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::new(&scene, 8).await?;
    let (cluster, handle) = (fixture.cluster, &fixture.handle);
    let none = RequestFlags::empty();
    for at in 0..4 {
        let offset = at * cluster;
        handle
            .write(offset, stamped(1, at, offset, cluster), none)
            .await?;
    }
    handle.write_zeroes(0, cluster, none).await?;
    handle
        .write_zeroes(cluster, cluster, RequestFlags::MAY_UNMAP)
        .await?;
    handle.discard(2 * cluster, cluster).await?;
    let capabilities = fixture.node.driver().capabilities();
    let mut zero = Vec::new();
    // Without zero writes of its own, a driver has zeroes as data, and may not know.
    if capabilities.contains(Capabilities::WRITE_ZEROES) {
        zero.extend([0, 1]);
    }
    if capabilities.contains(Capabilities::DISCARD)
        && crate::lab::after_discard(&fixture.node) == AfterDiscard::Zeroes
    {
        zero.push(2);
    }
    for at in &zero {
        let status = handle.block_status(at * cluster, cluster).await?;
        if !status.is_zero() {
            return Err(format!("cluster {at}: {:?}", status.flags).into());
        }
    }
    let status = handle.block_status(3 * cluster, cluster).await?;
    if !status.is_data() {
        return Err(format!("data: {:?}", status.flags).into());
    }
    fixture.check(&scene).await?;
    if zero.is_empty() {
        return Ok(Verdict::NotCovered(
            "the driver zeroes nothing itself".into(),
        ));
    }
    Ok(Verdict::Passed)
}

async fn walk(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::new(&scene, 16).await?;
    let (cluster, handle) = (fixture.cluster, &fixture.handle);
    for at in [1, 2, 5, 9, 15] {
        let offset = at * cluster + 512;
        handle
            .write(offset, stamped(1, at, offset, 1024), RequestFlags::empty())
            .await?;
    }
    let mut at = 0;
    let mut steps = 0;
    while at < fixture.size {
        let status = handle.block_status(at, fixture.size - at).await?;
        if status.len == 0 || status.len > fixture.size - at {
            return Err(format!("{} bytes of status at {at:#x}", status.len).into());
        }
        let reaches_end = at + status.len == fixture.size;
        if status.flags.contains(StatusFlags::EOF) != reaches_end {
            return Err(format!("{:?} for {} bytes at {at:#x}", status.flags, status.len).into());
        }
        if status.is_zero() {
            let bytes = handle.read(at, status.len as usize).await?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Err(format!("data at {at:#x} is called zero").into());
            }
        }
        at += status.len;
        steps += 1;
        if steps > fixture.size / 512 {
            return Err("block status takes too many steps".into());
        }
    }
    let past = handle.block_status(fixture.size, 512).await?;
    if past.len != 0 || !past.flags.contains(StatusFlags::EOF) {
        return Err(format!("past the end: {:?} for {} bytes", past.flags, past.len).into());
    }
    Ok(Verdict::Passed)
}
