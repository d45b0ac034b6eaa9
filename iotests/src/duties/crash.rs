//! The power is cut before each request that reaches the storage, while clusters are given up, recycled and written. What
//! is found afterwards is told apart: new data that isn't there, somebody else's data, or metadata that contradicts itself.

use std::{collections::BTreeSet, fmt, sync::Arc};

use block_core::{
    Capabilities, Error, OpenOptions, Options, PermissionSet, Permissions, RequestFlags,
    image::{CheckMode, Progress},
    registry::ImplicitOpens,
};

use super::{Duty, is_of};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    cases::{ClusterKind, Image, Setup, owner},
    lab::after_discard,
    oracle::AfterDiscard,
    pattern::{Seen, Stamp},
    storage::{Choose, Content, Disk, Hold, Stage},
};

/// Images kept per place at which the power is cut.
const CUTS: usize = 3;
/// Clusters that are written for the first time, in each of two rounds.
const FRESH: usize = 4;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for backing in [false, true] {
        let (name, over) = if backing {
            (
                "crash-power-cut-at-every-request-over-backing",
                " over a backing file",
            )
        } else {
            ("crash-power-cut-at-every-request", "")
        };
        cases.push(Case::new(
            Group::Crash,
            name,
            format!(
                "wherever the power is cut while clusters are discarded, recycled and written{over}: every \
                 sector is old or new, none is another cluster's, and the metadata doesn't contradict itself"
            ),
            move |scene| cut_everywhere(scene, backing),
        ));
    }
    cases
}

/// What may be left of the image, and what was going on.
struct Cut {
    content: Content,
    before: String,
}

/// Cuts the power before each request to the storage.
struct Knife<'a> {
    scene: &'a Scene,
    image: &'a Image,
    everything: Hold,
    /// New data comes last: metadata that doesn't wait for it gets ahead.
    data: Hold,
    cuts: Vec<Cut>,
}

impl<'a> Knife<'a> {
    fn new(scene: &'a Scene, image: &'a Image) -> Self {
        let needle = Stamp::needle(owner::NEW);
        let writes = Choose::writes().containing(&needle);
        Self {
            scene,
            image,
            everything: image.disk.hold(Choose::any(), Stage::Before),
            data: image.disk.hold(writes, Stage::Before),
            cuts: Vec::new(),
        }
    }

    fn cut(&mut self, before: impl fmt::Display) {
        for _ in 0..CUTS {
            self.cuts.push(Cut {
                content: self.image.disk.power_cut(&*self.scene.lab.env),
                before: format!("before {before}"),
            });
        }
    }

    /// Lets requests go one by one until all that was started has ended.
    async fn pump(&mut self) {
        loop {
            self.scene.rest().await;
            let next = self.everything.waiting().first().copied();
            if let Some(op) = next {
                self.cut(op);
                self.everything.let_go(op);
                continue;
            }
            let Some(op) = self.data.waiting().first().copied() else {
                return;
            };
            self.cut(format_args!("{op} (data)"));
            self.data.let_go(op);
        }
    }
}

async fn cut_everywhere(scene: Arc<Scene>, backing: bool) -> CaseResult {
    if !scene.format.safeguards {
        let text = "the driver claims no safeguards of its own";
        return Ok(Verdict::NotCovered(text.into()));
    }
    let Some(image) = Image::new(&scene, Setup { backing }).await? else {
        let text = "the driver can't write, or has no backing files";
        return Ok(Verdict::NotCovered(text.into()));
    };
    let (target, cluster) = (image.target(), image.cluster);
    let given_up = [target, image.fresh(), image.fresh()];
    for at in given_up {
        if let Err(verdict) = image.prepare(ClusterKind::Data, at).await? {
            return Ok(verdict);
        }
    }
    let frees = image.needs(Capabilities::DISCARD).is_ok();
    image.disk.track_durability();

    let mut knife = Knife::new(&scene, &image);
    knife.cut("anything is changed");
    let mut fresh = Vec::new();
    for round in 0..2 {
        if frees && round == 0 {
            let mut discards = Vec::new();
            for at in given_up {
                let guest = image.guest.clone();
                discards.push(scene.start(async move { guest.discard(at, cluster).await }));
            }
            knife.pump().await;
            for discard in discards {
                ended(discard).await?;
            }
        }
        let mut writes = Vec::new();
        for number in 0..FRESH {
            let at = image.fresh();
            fresh.push(at);
            let guest = image.guest.signing(owner::NEW);
            // Whole clusters, and parts that have something around them.
            let (at, len) = if number % 2 == 0 {
                (at, cluster)
            } else {
                (at + 512, 1024)
            };
            writes.push(
                scene.start(async move { guest.write(at, len, RequestFlags::empty()).await }),
            );
        }
        // Another producer flushes while the data is on its way.
        for _ in 0..2 {
            let handle = image.job.handle().clone();
            let flush = scene.start(async move { handle.flush().await });
            knife.pump().await;
            ended(flush).await?;
            for write in writes.drain(..) {
                ended(write).await?;
            }
        }
    }
    let Knife {
        cuts,
        everything,
        data,
        ..
    } = knife;
    drop((everything, data));

    let old = if backing { Some(owner::BASE) } else { None };
    let zeroes = after_discard(&image.node) == AfterDiscard::Zeroes;
    let expect = Expect {
        given_up: given_up.into(),
        after_discard: if zeroes { None } else { old },
        fresh: fresh.into_iter().collect(),
        old,
        cluster,
    };
    let points = cuts.len() / CUTS;
    // What is wrong without any cut is no question of order, and other cases know more about it.
    image.judge("without a power cut", false).await?;
    let mut worst: Option<(Duty, String)> = None;
    for (number, cut) in cuts.into_iter().enumerate() {
        let Err((duty, seen)) = judge(&scene, &expect, cut.content, backing).await else {
            continue;
        };
        if number < CUTS {
            // Nothing had been changed yet since the flush.
            let text = format!("what was flushed is gone after a power cut: {seen}");
            return Err(Duty::Flush.forgotten(text));
        }
        // Contradicting metadata is what the others lead to as well: they say more.
        let rank = |duty: Duty| match duty {
            Duty::UnlinkBeforeReuse => 2,
            Duty::DataBeforeLink => 1,
            _ => 0,
        };
        if worst
            .as_ref()
            .is_none_or(|(old, _)| rank(duty) > rank(*old))
        {
            worst = Some((duty, format!("power cut {}: {seen}", cut.before)));
        }
    }
    if let Some((duty, seen)) = worst {
        return Err(duty.forgotten(seen));
    }
    image.finish().await?;
    if points < 8 {
        return Ok(Verdict::Inconclusive(format!(
            "the power was cut at {points} places only"
        )));
    }
    Ok(Verdict::Passed)
}

/// What may be found after a cut.
struct Expect {
    given_up: BTreeSet<u64>,
    /// Who signs, besides nobody, what a discarded cluster reads as.
    after_discard: Option<u32>,
    fresh: BTreeSet<u64>,
    /// Who signs what was in the fresh clusters before; nobody: zeroes.
    old: Option<u32>,
    cluster: u64,
}

impl Expect {
    /// Whether a sector may be like that, and whose fault it is if not.
    fn allows(&self, cluster: u64, at: u64, seen: Seen) -> Result<(), (Duty, String)> {
        let of = |owner: u32| is_of(seen, owner, at);
        if self.given_up.contains(&cluster) {
            let discarded = seen == Seen::Zero || self.after_discard.is_some_and(of);
            if of(owner::OLD) || discarded {
                return Ok(());
            }
            let text = format!(
                "the sector at {at:#x}, which was discarded and not flushed, holds {seen}: its cluster has been \
                 given to somebody else although the image on disk still refers to it"
            );
            return Err((Duty::UnlinkBeforeReuse, text));
        }
        let untouched = self.old.map_or(seen == Seen::Zero, of);
        if of(owner::NEW) || untouched {
            return Ok(());
        }
        let text = format!(
            "the sector at {at:#x}, whose write was in flight, is neither old nor new: it holds {seen}"
        );
        Err((Duty::DataBeforeLink, text))
    }
}

async fn judge(
    scene: &Arc<Scene>,
    expect: &Expect,
    content: Content,
    backing: bool,
) -> Result<(), (Duty, String)> {
    const FILE: &str = "after-the-cut";
    let lab = &scene.lab;
    let format = scene.format.name.as_str();
    lab.disks.insert(Disk::new(FILE, content));
    let broken = |error: Error| (Duty::OwnerBeforeLink, error.to_string());
    let open = async |for_check| {
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            for_check,
            ..OpenOptions::default()
        };
        let backing = backing.then_some(("base", format));
        let options = lab.options_for(format, FILE, backing, &Options::new());
        let node = lab
            .registry
            .open_file(&lab.graph, FILE, Some(format), options, how)
            .await?;
        let everything = PermissionSet::new(
            Permissions::CONSISTENT_READ | Permissions::WRITE,
            Permissions::all(),
        );
        let handle = lab.graph.attach(&node, everything, "judge")?;
        Ok((node, handle))
    };
    let (mut node, mut handle) = open(true).await.map_err(broken)?;
    if handle.info().await.map_err(broken)?.dirty {
        // It says itself that it has to be repaired first, as every open does that may write.
        drop(handle);
        lab.graph.release(&node).await.map_err(broken)?;
        (node, handle) = open(false).await.map_err(broken)?;
    }
    let mut result = Ok(());
    for start in expect.given_up.iter().chain(&expect.fresh) {
        let fresh = expect.fresh.contains(start);
        let bytes = match handle.read(*start, expect.cluster as usize).await {
            Ok(bytes) => bytes,
            // The link is there, and the place that it leads to isn't.
            Err(error) if fresh => return Err((Duty::DataBeforeLink, error.to_string())),
            Err(error) => return Err(broken(error)),
        };
        for (at, sector) in (*start..).step_by(512).zip(bytes.chunks(512)) {
            result = result.and_then(|()| expect.allows(*start, at, Seen::of(sector)));
        }
    }
    if result.is_ok() && node.driver().capabilities().contains(Capabilities::CHECK) {
        let report = handle
            .check(CheckMode::ReadOnly, Progress::new())
            .await
            .map_err(broken)?;
        // Leaks are what a power cut may leave behind.
        if report.corruptions + report.check_errors > 0 {
            let found = report
                .findings
                .first()
                .map_or("", |finding| &finding.message);
            result = Err((Duty::OwnerBeforeLink, format!("check says: {found}")));
        }
    }
    drop(handle);
    lab.graph.release(&node).await.map_err(broken)?;
    result
}

impl From<(Duty, String)> for Failure {
    fn from((duty, seen): (Duty, String)) -> Self {
        duty.forgotten(seen)
    }
}
