//! A write in place is in flight while its cluster becomes shared and another request copies it. Making clusters shared is
//! a request over the whole node: it has to wait for the write, and later writes for it. Only the third party's driver
//! has a snapshot that a test can take; for others these cases aren't covered.

use std::sync::Arc;

use block_core::{
    RequestFlags,
    image::{CheckMode, Progress},
};

use super::image::{ClusterKind, Image, Setup, owner};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    memdriver::ThirdParty,
    pattern::{Seen, Stamp},
    storage::{Choose, Stage},
};

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        Group::Race,
        "race-snapshot-behind-write-in-place",
        "a request that makes every cluster shared waits for a write in place, the next write copies the \
         cluster with what that has written, and the snapshot doesn't change any more",
        snapshot,
    )]
}

fn third_party(image: &Image) -> Option<&ThirdParty> {
    image.node.driver().as_any().downcast_ref()
}

/// Who wrote a sector of the storage.
fn owner_at(image: &Image, offset: u64) -> Option<u32> {
    let mut bytes = vec![0; 512];
    image.disk.content().read(offset, &mut bytes);
    match Seen::of(&bytes) {
        Seen::Stamp(stamp) => Some(stamp.owner),
        _ => None,
    }
}

async fn snapshot(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup::default()).await? else {
        return Ok(Verdict::NotCovered("the driver can't write".into()));
    };
    if third_party(&image).is_none() {
        return Ok(Verdict::NotCovered("the driver takes no snapshots".into()));
    }
    let target = image.target();
    if let Err(verdict) = image.prepare(ClusterKind::Data, target).await? {
        return Ok(verdict);
    }
    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let write =
        scene.start(async move { guest.write(target + 512, 1024, RequestFlags::empty()).await });
    scene.rest().await;
    if scene.strict() && hold.waiting().len() != 1 {
        return Err("the write never reached the storage".into());
    }

    let waits = image.gate_waits();
    if let Some(driver) = third_party(&image) {
        driver.snapshot_at_next_check();
    }
    let handle = image.job.handle().clone();
    let whole = scene.start(async move {
        let report = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
        if report.is_clean() {
            Ok(())
        } else {
            Err(Failure::from("the check isn't clean"))
        }
    });
    scene.rest().await;
    if scene.strict() && scene.gate {
        if whole.is_done() {
            return Err("the snapshot overtook the write".into());
        }
        if image.gate_waits() != waits + 1 {
            return Err("it waits, but not at the gate".into());
        }
    }
    let guest = image.job.signing(owner::LATER);
    let later =
        scene.start(async move { guest.write(target + 2048, 512, RequestFlags::empty()).await });
    scene.rest().await;
    if scene.strict() && scene.gate && later.is_done() {
        return Err("a later write overtook the snapshot".into());
    }
    let hosts_before = image.host_of(owner::LATER).len();
    hold.release();
    let written = ended(write).await?;
    let taken = ended(whole).await?;
    let copied = ended(later).await?;
    if scene.strict() && scene.gate && hosts_before != 0 {
        return Err("the later write didn't wait".into());
    }
    if written && !image.holds(target + 512, owner::PARKED).await? {
        return Err("the write in place was lost: the cluster was copied without it".into());
    }
    if copied && !image.holds(target + 2048, owner::LATER).await? {
        return Err("the later write was lost".into());
    }
    if scene.strict() {
        // The snapshot has the write before it, and not the one after it, which went to a copy.
        let host = third_party(&image).and_then(|driver| driver.snapshot_host(target));
        let Some(host) = host else {
            return Err("the snapshot has no data at the target".into());
        };
        if !taken || !written || !copied {
            return Err("something was dropped".into());
        }
        if owner_at(&image, host + 512) != Some(owner::PARKED) {
            return Err("the snapshot lacks the write that was acknowledged before it".into());
        }
        if owner_at(&image, host + 2048) != Some(owner::OLD) {
            return Err("the later write didn't copy the cluster, but changed the snapshot".into());
        }
        let place = image.host_of(owner::LATER);
        if place.is_empty() || place.contains(&(host + 2048)) {
            return Err("the later write is nowhere, or in the snapshot".into());
        }
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}
