//! One request at a time: what a partial write leaves around it, and what a discard leaves behind.

use std::sync::Arc;

use block_core::{Capabilities, RequestFlags};

use super::{Duty, is_of};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    cases::{ClusterKind, Image, Setup, owner},
    lab::after_discard,
    oracle::AfterDiscard,
    pattern::Seen,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            Group::Backing,
            "backing-partial-write-keeps-what-surrounds-it",
            "a write to a part of a cluster that only the backing file has leaves the rest of the cluster as \
             it was, at its head, in its middle and at its tail",
            partial_write,
        ),
        Case::new(
            Group::Backing,
            "backing-discard-reads-as-declared",
            "a discarded cluster over a backing file reads as zeroes, also after opening the image again, if \
             the driver declares that; nothing of the backing file comes back",
            discard,
        ),
    ]
}

async fn over_backing(
    scene: &Arc<Scene>,
    needs: Capabilities,
) -> Result<Result<Image, Verdict>, Failure> {
    let Some(image) = Image::new(scene, Setup { backing: true }).await? else {
        let text = "the driver has no backing files";
        return Ok(Err(Verdict::NotCovered(text.into())));
    };
    Ok(match image.needs(needs) {
        Ok(()) => Ok(image),
        Err(verdict) => Err(verdict),
    })
}

async fn partial_write(scene: Arc<Scene>) -> CaseResult {
    let image = match over_backing(&scene, Capabilities::WRITE).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let cluster = image.cluster;
    // Where in the cluster, and how much.
    for (within, len) in [
        (0, 512),
        (cluster / 2, 512),
        (cluster - 512, 512),
        (512, cluster - 1024),
    ] {
        let start = image.fresh();
        let (from, to) = (start + within, start + within + len);
        let guest = image.guest.signing(owner::NEW);
        guest.write(from, len, RequestFlags::empty()).await?;
        for at in (start..start + cluster).step_by(512) {
            let written = (from..to).contains(&at);
            let owner = if written { owner::NEW } else { owner::BASE };
            let seen = image.sector(at).await?;
            let right = is_of(seen, owner, at);
            if !right && written {
                return Err(format!("the write at {from:#x} isn't there: {seen}").into());
            }
            if !right {
                return Err(Duty::Fill.forgotten(format_args!(
                    "after a write of {len} bytes at {within} of a cluster that only the backing file had, the \
                     sector at {} of it holds {seen}, and no longer what the backing file has",
                    at - start
                )));
            }
        }
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn discard(scene: Arc<Scene>) -> CaseResult {
    let image = match over_backing(&scene, Capabilities::DISCARD).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    if after_discard(&image.node) != AfterDiscard::Zeroes {
        let text = "the driver doesn't declare what a discarded range reads as";
        return Ok(Verdict::NotCovered(text.into()));
    }
    let (target, cluster) = (image.target(), image.cluster);
    let untouched = image.fresh();
    if let Err(verdict) = image.prepare(ClusterKind::Data, target).await? {
        return Ok(verdict);
    }
    // One cluster with data of its own, and one that only the backing file has.
    for start in [target, untouched] {
        image.guest.discard(start, cluster).await?;
        for at in (start..start + cluster).step_by(512) {
            let seen = image.sector(at).await?;
            if seen != Seen::Zero {
                return Err(Duty::Discard.forgotten(format_args!(
                    "the driver declares that discarded ranges read as zeroes; at {at:#x} there is {seen}"
                )));
            }
        }
        let status = image.guest.handle().block_status(start, cluster).await?;
        if !status.is_zero() || status.len < cluster {
            return Err(Duty::Discard.forgotten(format_args!(
                "a discarded cluster reads as zeroes, but block status says {:?} for {} bytes",
                status.flags, status.len
            )));
        }
    }
    // Closed, opened and judged again there: what was discarded must not come back.
    image.finish().await?;
    Ok(Verdict::Passed)
}
