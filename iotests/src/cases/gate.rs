//! A data write is parked on its way to the storage, and a discard or zero write of the same cluster arrives: it must
//! wait at the gate until the write has ended, whoever sends it and whatever the cluster is.

use std::sync::Arc;

use block_core::{RequestFlags, driver::Capabilities};

use super::image::{ClusterKind, Image, owner};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    lab::Guest,
    oracle::AfterDiscard,
    pattern::{Seen, Stamp},
    storage::{Choose, Stage},
};

/// What arrives while the write is parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    Discard,
    ZeroUnmap,
    Zero,
}

impl Arrival {
    pub const ALL: [Self; 3] = [Self::Discard, Self::ZeroUnmap, Self::Zero];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Discard => "discard",
            Self::ZeroUnmap => "zero-unmap",
            Self::Zero => "zero",
        }
    }

    pub async fn send(self, guest: &Guest, offset: u64, len: u64) -> Result<(), Failure> {
        let none = RequestFlags::empty();
        match self {
            Self::Discard => guest.discard(offset, len).await?,
            Self::ZeroUnmap => guest.zero(offset, len, RequestFlags::MAY_UNMAP).await?,
            Self::Zero => guest.zero(offset, len, none).await?,
        }
        Ok(())
    }

    /// What the driver must be able to do for this to mean anything.
    pub const fn needs(self) -> Capabilities {
        match self {
            Self::Discard => Capabilities::DISCARD,
            Self::ZeroUnmap | Self::Zero => Capabilities::empty(),
        }
    }

    fn leaves_zeroes(self, image: &Image) -> bool {
        self != Self::Discard || crate::lab::after_discard(&image.node) == AfterDiscard::Zeroes
    }
}

/// Which producer sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Producer {
    Guest,
    Job,
}

impl Producer {
    const ALL: [Self; 2] = [Self::Guest, Self::Job];

    const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Job => "job",
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in ClusterKind::ALL {
        for arrival in Arrival::ALL {
            for producer in Producer::ALL {
                let name = format!(
                    "race-{}-waits-for-write-to-{}-cluster-from-{}",
                    arrival.name(),
                    kind.name(),
                    producer.name()
                );
                let proves = format!(
                    "a {} from a {} waits for a write in flight to the same {} cluster, and a write that \
                     comes after it waits for it",
                    arrival.name(),
                    producer.name(),
                    kind.name()
                );
                cases.push(Case::new(Group::Race, name, proves, move |scene| {
                    parked_write(scene, kind, arrival, producer)
                }));
            }
        }
    }
    cases
}

async fn parked_write(
    scene: Arc<Scene>,
    kind: ClusterKind,
    arrival: Arrival,
    producer: Producer,
) -> CaseResult {
    let Some(image) = Image::new(&scene, Image::setup_for(kind)).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    if let Err(verdict) = image.needs(arrival.needs()) {
        return Ok(verdict);
    }
    let target = image.target();
    let cluster = image.cluster;
    if let Err(verdict) = image.prepare(kind, target).await? {
        return Ok(verdict);
    }
    let hold = image.disk.hold(
        Choose::writes().containing(&Stamp::needle(owner::PARKED)),
        Stage::Before,
    );
    let waits = image.gate_waits();

    // Sectors 1 and 2 of the cluster: what surrounds them has to be kept or copied.
    let guest = image.guest.signing(owner::PARKED);
    let write =
        scene.start(async move { guest.write(target + 512, 1024, RequestFlags::empty()).await });
    scene.rest().await;
    if scene.strict() && hold.waiting().len() != 1 {
        return Err(format!("{} data writes reached the storage", hold.waiting().len()).into());
    }

    let sender = match producer {
        Producer::Guest => image.guest.clone(),
        Producer::Job => image.job.clone(),
    };
    let before = image.disk.log_position();
    let arriving = scene.start(async move { arrival.send(&sender, target, cluster).await });
    scene.rest().await;
    if scene.strict() {
        if arriving.is_done() {
            return Err(format!("the {} overtook the write", arrival.name()).into());
        }
        if let Some(entry) = image.disk.log_since(before).first() {
            return Err(format!("it waits, but the storage has seen {}", entry.op).into());
        }
        if image.gate_waits() != waits + 1 {
            return Err("it waits, but not at the gate".into());
        }
    }

    // What comes later on the same cluster waits for what waits.
    let guest = image.job.signing(owner::LATER);
    let later =
        scene.start(async move { guest.write(target + 2048, 512, RequestFlags::empty()).await });
    // What has nothing to do with it doesn't wait.
    let (guest, fresh) = (image.guest.signing(owner::NEW), image.fresh());
    let elsewhere =
        scene.start(async move { guest.write(fresh, cluster, RequestFlags::empty()).await });
    scene.rest().await;
    if scene.strict() {
        if later.is_done() {
            return Err("a later write overtook the request that waits".into());
        }
        if !elsewhere.is_done() {
            return Err("a write to another cluster was held up".into());
        }
    }

    hold.release();
    ended(write).await?;
    ended(arriving).await?;
    ended(later).await?;
    ended(elsewhere).await?;
    if scene.strict() {
        if image.sector(target + 512).await? != Seen::Zero && arrival.leaves_zeroes(&image) {
            return Err("the write outlived what came after it".into());
        }
        if !image.holds(target + 2048, owner::LATER).await? {
            return Err("the later write was lost".into());
        }
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}
