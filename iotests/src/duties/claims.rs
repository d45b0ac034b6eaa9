//! Two plain writes that meet in a cluster that has no place yet: the gate lets both through, and only the driver can see
//! that they are about to allocate it twice.

use std::sync::Arc;

use block_core::RequestFlags;

use super::Duty;
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    cases::{ClusterKind, Image, owner},
    pattern::Stamp,
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in [ClusterKind::Unallocated, ClusterKind::Shared] {
        cases.push(Case::new(
            Group::Race,
            format!("race-one-place-for-two-writes-to-{}-cluster", kind.name()),
            format!(
                "two writes to one {} cluster never put it in two places, whichever of them ends first",
                kind.name()
            ),
            move |scene| one_place(scene, kind),
        ));
    }
    cases
}

async fn one_place(scene: Arc<Scene>, kind: ClusterKind) -> CaseResult {
    let Some(image) = Image::new(&scene, Image::setup_for(kind)).await? else {
        let text = "the driver can't write, or has no backing files";
        return Ok(Verdict::NotCovered(text.into()));
    };
    if image.node.limits().serialising_granularity < 4096 {
        let text = "what is written isn't in one cluster of this size";
        return Ok(Verdict::NotCovered(text.into()));
    }
    let target = image.target();
    let none = RequestFlags::empty();
    // Both data writes take effect, and are not reported as complete: neither is linked yet.
    let hold = |owner| {
        let needle = Stamp::needle(owner);
        image
            .disk
            .hold(Choose::writes().containing(&needle), Stage::After)
    };
    let holds = [hold(owner::PARKED), hold(owner::LATER)];
    let (one, other) = (
        image.guest.signing(owner::PARKED),
        image.guest.signing(owner::LATER),
    );
    let first = scene.start(async move { one.write(target + 512, 512, none).await });
    scene.rest().await;
    let second = scene.start(async move { other.write(target + 2048, 512, none).await });
    scene.rest().await;
    // Where the cluster would be for each of them.
    let place = |owner, within| {
        let found = image.host_of(owner);
        found.first().and_then(|at| at.checked_sub(within))
    };
    let places = (place(owner::PARKED, 512), place(owner::LATER, 2048));
    drop(holds);
    let results = [first.await, second.await];
    if let (Some(one), Some(other)) = places
        && one != other
    {
        return Err(Duty::Claim.forgotten(format_args!(
            "two writes in flight put the cluster at {target:#x} in two places, {one:#x} and {other:#x} of the \
             file: one of them is going to be lost"
        )));
    }
    if places.0.is_none() {
        return Ok(Verdict::NotCovered(
            "the format doesn't store data as it is".into(),
        ));
    }
    for result in results.into_iter().flatten() {
        result?;
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}
