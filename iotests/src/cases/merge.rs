//! Plain writes that meet in one cluster. The gate lets them run side by side; it is the driver that orders allocations
//! of the same cluster, and that moves a cluster only while no other write to it is in flight.

use std::sync::Arc;

use block_core::{ErrorKind, RequestFlags, driver::Capabilities};

use super::image::{BASE, ClusterKind, Image, Setup, owner};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict, ended},
    pattern::Stamp,
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in ClusterKind::ALL {
        let name = format!(
            "race-two-partial-writes-to-{}-cluster-both-survive",
            kind.name()
        );
        let proves = format!(
            "two writes to different sectors of one {} cluster both survive, and so does what \
             surrounds them",
            kind.name()
        );
        cases.push(Case::new(Group::Race, name, proves, move |scene| {
            two_writes(scene, kind)
        }));
    }
    cases.push(Case::new(
        Group::Race,
        "race-copy-on-write-reads-held-both-writes-survive",
        "two writes that both have to copy the rest of one cluster from the backing file both survive \
         when the copying is slow",
        slow_copy,
    ));
    cases.push(Case::new(
        Group::Race,
        "race-write-in-place-while-cluster-moves",
        "a write in place that is in flight while another request moves its cluster is neither lost \
         nor lands in the cluster's next owner",
        |scene| moved(scene, ClusterKind::Data),
    ));
    cases.push(Case::new(
        Group::Race,
        "race-allocating-write-meets-compressed-write",
        "a plain write that is allocating a cluster and a compressed write of the same cluster don't \
         leave a mixture of both mappings",
        |scene| moved(scene, ClusterKind::Unallocated),
    ));
    cases
}

async fn two_writes(scene: Arc<Scene>, kind: ClusterKind) -> CaseResult {
    let Some(image) = Image::new(&scene, Image::setup_for(kind)).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    let target = image.target();
    if let Err(verdict) = image.prepare(kind, target).await? {
        return Ok(verdict);
    }
    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let first =
        scene.start(async move { guest.write(target + 512, 1024, RequestFlags::empty()).await });
    scene.rest().await;
    if scene.strict() && hold.arrivals() == 0 {
        return Err("the first write never reached the storage".into());
    }
    let guest = image.job.signing(owner::LATER);
    let second = scene.start(async move {
        guest
            .write(target + 2048, 1024, RequestFlags::empty())
            .await
    });
    scene.rest().await;
    hold.release();
    let first = ended(first).await?;
    let second = ended(second).await?;
    if first && !image.holds(target + 512, owner::PARKED).await? {
        return Err("the first write was lost".into());
    }
    if second && !image.holds(target + 2048, owner::LATER).await? {
        return Err("the second write was lost".into());
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn slow_copy(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup { backing: true }).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    let info = image.guest.handle().info().await?;
    if info.cluster_size == Some(512) {
        let why = "clusters are sectors: a write of one leaves nothing to be copied";
        return Ok(Verdict::NotCovered(why.into()));
    }
    let target = image.target();
    let hold = scene.lab.disk(BASE)?.hold(Choose::reads(), Stage::After);
    let mut writes = Vec::new();
    for (owner, at) in [(owner::PARKED, 512), (owner::LATER, 2048)] {
        let guest = image.guest.signing(owner);
        let write =
            scene.start(async move { guest.write(target + at, 512, RequestFlags::empty()).await });
        writes.push((owner, at, write));
        scene.rest().await;
    }
    let copied = hold.arrivals();
    hold.release();
    for (owner, at, write) in writes {
        if ended(write).await? && !image.holds(target + at, owner).await? {
            return Err(format!("the write to sector {} was lost", at / 512).into());
        }
    }
    image.finish().await?;
    if scene.strict() && copied == 0 {
        return Ok(Verdict::Inconclusive(
            "nothing was read from the backing file".into(),
        ));
    }
    Ok(Verdict::Passed)
}

/// A whole compressed write moves a cluster that has its place already, or is about to get one.
async fn moved(scene: Arc<Scene>, kind: ClusterKind) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup::default()).await? else {
        return Ok(Verdict::NotCovered("the driver can't write".into()));
    };
    if let Err(verdict) = image.needs(Capabilities::COMPRESSED) {
        return Ok(verdict);
    }
    let (target, cluster) = (image.target(), image.cluster);
    if let Err(verdict) = image.prepare(kind, target).await? {
        return Ok(verdict);
    }
    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let plain =
        scene.start(async move { guest.write(target + 512, 1024, RequestFlags::empty()).await });
    scene.rest().await;
    let guest = image.job.signing(owner::LATER);
    let mover = scene.start(async move {
        guest
            .write(target, cluster, RequestFlags::WRITE_COMPRESSED)
            .await
    });
    scene.rest().await;
    let handle = image.guest.handle().clone();
    let flush = scene.start(async move { handle.flush().await });
    scene.rest().await;
    let (guest, fresh) = (image.guest.signing(owner::NEW), image.fresh());
    let recycler =
        scene.start(async move { guest.write(fresh, cluster, RequestFlags::empty()).await });
    scene.rest().await;
    let parked = hold.arrivals();
    hold.release();
    ended(plain).await?;
    let mut refused = false;
    match mover.await {
        // A driver may refuse to store a cluster compressed that is allocated already, as qemu's does.
        Ok(Err(error)) if REFUSALS.contains(&error.kind()) => refused = true,
        Ok(result) => result?,
        Err(_) => {}
    }
    ended(flush).await?;
    if ended(recycler).await? {
        image.guest.oracle().protect(fresh, cluster);
    }
    if refused && scene.strict() && !image.holds(target + 512, owner::PARKED).await? {
        return Err("the write was lost to a compressed one that was refused".into());
    }
    image.finish().await?;
    if scene.strict() && parked == 0 {
        return Ok(Verdict::Inconclusive("no plain write was in flight".into()));
    }
    if refused && scene.strict() && kind == ClusterKind::Data {
        return Ok(Verdict::NotCovered(
            "the driver never moves an allocated cluster".into(),
        ));
    }
    Ok(Verdict::Passed)
}

/// How a driver says that it doesn't store an allocated cluster compressed.
const REFUSALS: [ErrorKind; 3] = [
    ErrorKind::NotSupported,
    ErrorKind::InvalidInput,
    ErrorKind::Io,
];
