//! A request whose future was dropped while its I/O is in flight goes on, and holds back what overlaps it: it never lands
//! on top of something newer that was acknowledged.

use std::sync::Arc;

use block_core::RequestFlags;
use futures::future::{Aborted, abortable};

use super::image::{ClusterKind, Image, owner};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict, ended},
    pattern::Stamp,
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in ClusterKind::ALL {
        let name = format!(
            "race-dropped-write-to-{}-cluster-never-covers-newer-write",
            kind.name()
        );
        let proves = format!(
            "a write to a {} cluster whose future was dropped never lands over a newer write that was \
             acknowledged",
            kind.name()
        );
        cases.push(Case::new(Group::Race, name, proves, move |scene| {
            dropped(scene, kind)
        }));
    }
    cases.push(Case::new(
        Group::Race,
        "race-flush-and-drain-wait-for-dropped-write",
        "flush and drain wait for a write whose future was dropped",
        waited_for,
    ));
    cases
}

async fn dropped(scene: Arc<Scene>, kind: ClusterKind) -> CaseResult {
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
    let (old, abort) =
        abortable(async move { guest.write(target + 512, 1024, RequestFlags::empty()).await });
    let old = scene.start(old);
    scene.rest().await;
    abort.abort();
    scene.rest().await;
    if scene.strict() {
        if !matches!(old.await, Ok(Err(Aborted))) {
            return Err("the write ended although it was held".into());
        }
        if hold.waiting().len() != 1 {
            return Err("dropping the future took the write away from the storage".into());
        }
    }
    let waits = image.gate_waits();
    let guest = image.job.signing(owner::LATER);
    let newer =
        scene.start(async move { guest.write(target + 512, 512, RequestFlags::empty()).await });
    scene.rest().await;
    if scene.strict() && (newer.is_done() || image.gate_waits() != waits + 1) {
        return Err("the newer write didn't wait for the dropped one".into());
    }
    hold.release();
    if ended(newer).await? && !image.holds(target + 512, owner::LATER).await? {
        return Err("the dropped write landed over the newer one".into());
    }
    let dropped = image.node.stats().snapshot().dropped;
    image.finish().await?;
    if scene.strict() && dropped == 0 {
        return Ok(Verdict::Inconclusive(
            "no request was dropped at the driver".into(),
        ));
    }
    Ok(Verdict::Passed)
}

async fn waited_for(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Image::setup_for(ClusterKind::Data)).await? else {
        return Ok(Verdict::NotCovered("the driver can't write".into()));
    };
    let target = image.target();
    if let Err(verdict) = image.prepare(ClusterKind::Data, target).await? {
        return Ok(verdict);
    }
    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let (old, abort) =
        abortable(async move { guest.write(target, 512, RequestFlags::empty()).await });
    let old = scene.start(old);
    scene.rest().await;
    abort.abort();
    scene.rest().await;
    let _ = old.await;
    let handle = image.job.handle().clone();
    let flush = scene.start(async move { handle.flush().await });
    scene.rest().await;
    let (graph, node) = (scene.lab.graph.clone(), image.node.clone());
    let drain = scene.start(async move {
        drop(graph.drain(&node).await);
        Ok::<_, block_core::Error>(())
    });
    scene.rest().await;
    if scene.strict() {
        if hold.waiting().len() != 1 {
            return Err("dropping the future took the write away from the storage".into());
        }
        if flush.is_done() {
            return Err("flush didn't wait for the dropped write".into());
        }
        if drain.is_done() {
            return Err("drain didn't wait for the dropped write".into());
        }
    }
    hold.release();
    ended(flush).await?;
    ended(drain).await?;
    image.finish().await?;
    Ok(Verdict::Passed)
}
