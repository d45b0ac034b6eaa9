//! Freed clusters: what is still on its way to one must have ended before it gets a new owner. The gate can't see this,
//! because the new owner is another guest range; it is the driver's duty (design, section 4). Most of these cases run
//! without the gate, because with it nothing that frees can overtake anything.

use std::sync::Arc;

use block_core::{RequestFlags, driver::Capabilities};

use super::image::{ClusterKind, Image, KEEPS_PLACES, Setup, owner};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    duties::Duty,
    pattern::Stamp,
    storage::{Choose, OpKind, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    let late = "a punch that is still on its way never wipes the data of the cluster's new owner";
    let write =
        "a write that is still on its way never lands in a cluster that was freed and recycled";
    let read = "a read that is still on its way never returns what the cluster's new owner wrote";
    vec![
        Case::new(
            Group::Race,
            "race-late-punch-spares-recycled-cluster",
            late,
            late_punch,
        ),
        Case::new(
            Group::Race,
            "race-late-punch-spares-recycled-cluster-without-gate",
            late,
            late_punch,
        )
        .without_gate(),
        Case::new(
            Group::Race,
            "race-old-write-spares-recycled-cluster-without-gate",
            write,
            old_write,
        )
        .without_gate()
        .duty(Duty::Pin),
        Case::new(
            Group::Race,
            "race-write-behind-claim-spares-recycled-cluster-without-gate",
            "a write that found its cluster allocated by the one that it had waited for never lands in a cluster that was \
             freed and recycled",
            write_behind_claim,
        )
        .without_gate()
        .duty(Duty::Pin),
        Case::new(
            Group::Race,
            "race-write-over-discarded-compressed-cluster-frees-it-once-without-gate",
            "a write over compressed data that is discarded meanwhile is linked, and what was discarded isn't freed again",
            freed_meanwhile,
        )
        .without_gate(),
        Case::new(
            Group::Race,
            "race-read-never-sees-recycled-cluster-without-gate",
            read,
            old_read,
        )
        .without_gate()
        .duty(Duty::Pin),
        Case::new(
            Group::Race,
            "race-discard-waits-for-read",
            "a discard waits for a read in flight, which returns what was there",
            discard_waits_for_read,
        ),
    ]
}

/// Why a case without the gate doesn't apply, if so.
fn without_safeguards(scene: &Scene) -> Option<Verdict> {
    if scene.gate || scene.format.safeguards {
        return None;
    }
    Some(Verdict::NotCovered(
        "the driver claims no safeguards of its own".into(),
    ))
}

/// An image that can be written and discarded, with a target cluster of some kind; or why not.
async fn with(scene: &Arc<Scene>, kind: ClusterKind) -> Result<Result<Image, Verdict>, Failure> {
    if let Some(verdict) = without_safeguards(scene) {
        return Ok(Err(verdict));
    }
    let Some(image) = Image::new(scene, Setup::default()).await? else {
        return Ok(Err(Verdict::NotCovered("the driver can't write".into())));
    };
    if let Err(verdict) = image.needs(Capabilities::DISCARD) {
        return Ok(Err(verdict));
    }
    if let Err(verdict) = image.prepare(kind, image.target()).await? {
        return Ok(Err(verdict));
    }
    Ok(Ok(image))
}

async fn late_punch(scene: Arc<Scene>) -> CaseResult {
    let image = match with(&scene, ClusterKind::Data).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (target, cluster) = (image.target(), image.cluster);
    let hold = image.disk.hold(Choose::punches(), Stage::Before);
    let guest = image.guest.clone();
    let discard = scene.start(async move { guest.discard(target, cluster).await });
    scene.rest().await;
    let handle = image.guest.handle().clone();
    let flush = scene.start(async move { handle.flush().await });
    scene.rest().await;
    let punches = hold.waiting();
    let position = image.disk.log_position();
    let mut writes = Vec::new();
    for _ in 0..4 {
        let (guest, at) = (image.guest.signing(owner::NEW), image.fresh());
        let write =
            scene.start(async move { guest.write(at, cluster, RequestFlags::empty()).await });
        writes.push((at, write));
        scene.rest().await;
    }
    for punch in &punches {
        for entry in image.disk.log_since(position) {
            let overlaps = entry.op.offset < punch.offset + punch.len
                && punch.offset < entry.op.offset + entry.op.len;
            if overlaps && entry.op.kind == OpKind::Write {
                return Err(Duty::Punch.forgotten(format_args!(
                    "{} while {punch} hasn't ended: it may wipe the new data",
                    entry.op
                )));
            }
        }
    }
    let punched = hold.arrivals();
    hold.release();
    ended(discard).await?;
    ended(flush).await?;
    for (at, write) in writes {
        if ended(write).await? {
            image.guest.oracle().protect(at, cluster);
        }
    }
    image.finish().await?;
    if punched == 0 && scene.strict() {
        return Ok(Verdict::NotCovered("the driver punched nothing".into()));
    }
    Ok(Verdict::Passed)
}

/// Discards the target and has others allocate clusters, while something for the target is parked. Without the gate
/// nothing holds the discard up.
async fn free_and_recycle(scene: &Arc<Scene>, image: &Image) -> Result<Vec<u64>, Failure> {
    let (target, cluster) = (image.target(), image.cluster);
    let job = image.job.clone();
    let discard = scene.start(async move { job.discard(target, cluster).await });
    scene.rest().await;
    let handle = image.job.handle().clone();
    let flush = scene.start(async move { handle.flush().await });
    scene.rest().await;
    let mut fresh = Vec::new();
    let mut writes = Vec::new();
    for _ in 0..4 {
        let (guest, at) = (image.guest.signing(owner::NEW), image.fresh());
        writes.push(
            scene.start(async move { guest.write(at, cluster, RequestFlags::empty()).await }),
        );
        fresh.push(at);
        scene.rest().await;
    }
    image.disk.clear_rules();
    ended(discard).await?;
    ended(flush).await?;
    for write in writes {
        ended(write).await?;
    }
    Ok(fresh)
}

async fn old_write(scene: Arc<Scene>) -> CaseResult {
    let image = match with(&scene, ClusterKind::Data).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (target, cluster) = (image.target(), image.cluster);
    let before = image.counter("frees-deferred-by-pins");
    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let write =
        scene.start(async move { guest.write(target, cluster, RequestFlags::empty()).await });
    scene.rest().await;
    let parked = hold.arrivals();
    let fresh = free_and_recycle(&scene, &image).await?;
    drop(hold);
    // Without a gate the write's own fate is open; it may be refused, never land elsewhere.
    let _ = write.await;
    for at in fresh {
        image.guest.oracle().protect(at, cluster);
    }
    let after = image.counter("frees-deferred-by-pins");
    let keeps_places = image.keeps_places();
    image.finish().await?;
    let (Some(before), Some(after)) = (before, after) else {
        return Ok(Verdict::NotCovered("the driver defers no frees".into()));
    };
    if keeps_places {
        return Ok(Verdict::NotCovered(KEEPS_PLACES.into()));
    }
    let deferred = after - before;
    if scene.strict() && (parked == 0 || deferred == 0) {
        return Ok(Verdict::Inconclusive(format!(
            "{parked} writes were parked, {deferred} frees deferred by pins"
        )));
    }
    Ok(Verdict::Passed)
}

/// Of two writes to a new cluster the second waits until the first has its place. Its own data is on the way to that place
/// when the cluster is discarded and others allocate.
async fn write_behind_claim(scene: Arc<Scene>) -> CaseResult {
    let image = match with(&scene, ClusterKind::Unallocated).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (target, cluster) = (image.target(), image.cluster);
    let before = image.counter("frees-deferred-by-pins");
    let hold_of = |owner| {
        let writes = Choose::writes().containing(&Stamp::needle(owner));
        image.disk.hold(writes, Stage::Before)
    };
    let first = hold_of(owner::PARKED);
    let guest = image.guest.signing(owner::PARKED);
    let allocating =
        scene.start(async move { guest.write(target, 512, RequestFlags::empty()).await });
    scene.rest().await;
    // Not before, as encryption hides which write is whose.
    let second = hold_of(owner::LATER);
    let guest = image.job.signing(owner::LATER);
    let behind = scene.start(async move { guest.write(target, 512, RequestFlags::empty()).await });
    scene.rest().await;
    let waited = second.arrivals() == 0;
    first.release();
    scene.rest().await;
    let parked = second.waiting().len();
    let fresh = free_and_recycle(&scene, &image).await?;
    drop((first, second));
    // Without a gate the fate of both is open.
    let _ = (allocating.await, behind.await);
    for at in fresh {
        image.guest.oracle().protect(at, cluster);
    }
    let after = image.counter("frees-deferred-by-pins");
    let keeps_places = image.keeps_places();
    image.finish().await?;
    let (Some(before), Some(after)) = (before, after) else {
        return Ok(Verdict::NotCovered("the driver defers no frees".into()));
    };
    if keeps_places {
        return Ok(Verdict::NotCovered(KEEPS_PLACES.into()));
    }
    if scene.strict() && (!waited || parked == 0 || after == before) {
        return Ok(Verdict::Inconclusive(format!(
            "the second write waited: {waited}; {parked} were parked, {} frees deferred by pins",
            after - before
        )));
    }
    Ok(Verdict::Passed)
}

async fn freed_meanwhile(scene: Arc<Scene>) -> CaseResult {
    let image = match with(&scene, ClusterKind::Compressed).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (target, cluster) = (image.target(), image.cluster);
    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let write =
        scene.start(async move { guest.write(target, cluster, RequestFlags::empty()).await });
    scene.rest().await;
    let parked = hold.waiting().len();
    free_and_recycle(&scene, &image).await?;
    drop(hold);
    let wrote = ended(write).await?;
    if wrote && !image.holds(target, owner::PARKED).await? {
        return Err("the write succeeded, and isn't there".into());
    }
    image.finish().await?;
    if scene.strict() && parked == 0 {
        return Ok(Verdict::Inconclusive("no write was parked".into()));
    }
    Ok(Verdict::Passed)
}

async fn old_read(scene: Arc<Scene>) -> CaseResult {
    let image = match with(&scene, ClusterKind::Data).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (target, cluster) = (image.target(), image.cluster);
    let host = image.host_of_target().await?;
    let hold = image
        .disk
        .hold(Choose::reads().within(host..host + cluster), Stage::Before);
    let (handle, oracle) = (image.guest.handle().clone(), image.guest.oracle().clone());
    let read = scene.start(async move {
        let reading = oracle.read();
        let bytes = handle.read(target, cluster as usize).await?;
        Ok::<_, block_core::Error>(reading.check_lenient(target, &bytes))
    });
    scene.rest().await;
    let parked = hold.arrivals();
    free_and_recycle(&scene, &image).await?;
    drop(hold);
    if let Ok(wrong) = read.await
        && let Some(wrong) = wrong?.first()
    {
        return Err(format!("the read returned {wrong}").into());
    }
    image.finish().await?;
    if scene.strict() && parked == 0 {
        return Ok(Verdict::Inconclusive("no read reached the storage".into()));
    }
    Ok(Verdict::Passed)
}

async fn discard_waits_for_read(scene: Arc<Scene>) -> CaseResult {
    let image = match with(&scene, ClusterKind::Data).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (target, cluster) = (image.target(), image.cluster);
    let host = image.host_of_target().await?;
    let hold = image
        .disk
        .hold(Choose::reads().within(host..host + cluster), Stage::Before);
    let waits = image.gate_waits();
    let guest = image.guest.clone();
    let read = scene.start(async move { guest.read(target, cluster, RequestFlags::empty()).await });
    scene.rest().await;
    let job = image.job.clone();
    let discard = scene.start(async move { job.discard(target, cluster).await });
    scene.rest().await;
    if scene.strict() {
        if hold.arrivals() == 0 {
            return Err("the read never reached the storage".into());
        }
        if discard.is_done() || image.gate_waits() != waits + 1 {
            return Err("the discard didn't wait at the gate".into());
        }
    }
    hold.release();
    if let Ok(wrong) = read.await
        && let Some(wrong) = wrong?.first()
    {
        return Err(format!("the read returned {wrong}").into());
    }
    ended(discard).await?;
    image.finish().await?;
    Ok(Verdict::Passed)
}
