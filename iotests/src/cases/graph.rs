//! Drain, changes of the graph and copy-on-read while requests wait at the gate: everything ends, nothing is lost.

use std::sync::Arc;

use block_core::{
    Node, NodeSpec, Options, RequestFlags,
    driver::{Capabilities, ChildRole},
};

use super::image::{BASE, ClusterKind, Image, Setup, owner};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    pattern::Stamp,
    relay::Relay,
    storage::{Choose, Disk, Stage},
};

/// What happens while a discard waits at the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Happening {
    Drain,
    InsertFilter,
    ReplaceNode,
    ChangeBacking,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (happening, name, proves) in [
        (
            Happening::Drain,
            "race-drain-while-discard-waits",
            "a drain waits for a discard that waits at the gate, and lets everybody go on afterwards",
        ),
        (
            Happening::InsertFilter,
            "race-filter-comes-and-goes-while-discard-waits",
            "a filter is inserted and removed while discards wait at the gate, with I/O going on",
        ),
        (
            Happening::ReplaceNode,
            "race-node-is-replaced-while-discard-waits",
            "a node is replaced while discards wait at the gate, with I/O going on",
        ),
        (
            Happening::ChangeBacking,
            "race-backing-changes-while-discard-waits",
            "the backing file is changed while discards wait at the gate, with I/O going on",
        ),
    ] {
        cases.push(Case::new(Group::Race, name, proves, move |scene| {
            change(scene, happening)
        }));
    }
    cases.push(Case::new(
        Group::Race,
        "race-copy-on-read-holds-back-discard",
        "a discard waits for a read that copies, the copy never lands over what the discard left, and \
         nested requests wait for nothing",
        copy_on_read,
    ));
    cases.push(Case::new(
        Group::Race,
        "race-copy-on-read-waits-behind-discard",
        "a read that copies waits behind a discard which itself waits for a write, and nothing hangs",
        copy_on_read_behind,
    ));
    cases
}

/// A write that is parked, and a discard that waits for it.
macro_rules! park {
    ($scene:expr, $image:expr) => {{
        let needle = Stamp::needle(owner::PARKED);
        let hold = $image
            .disk
            .hold(Choose::writes().containing(&needle), Stage::Before);
        let (target, cluster) = ($image.target(), $image.cluster);
        let guest = $image.guest.signing(owner::PARKED);
        let write = $scene
            .start(async move { guest.write(target + 512, 1024, RequestFlags::empty()).await });
        $scene.rest().await;
        let job = $image.job.clone();
        let discard = $scene.start(async move { job.discard(target, cluster).await });
        $scene.rest().await;
        if $scene.strict() {
            if hold.waiting().len() != 1 {
                return Err("the write never reached the storage".into());
            }
            if discard.is_done() {
                return Err("the discard didn't wait".into());
            }
        }
        (hold, write, discard)
    }};
}

/// Does the happening, as whoever changes the graph.
async fn happen(scene: Arc<Scene>, image: HappeningAt, what: Happening) -> Result<(), Failure> {
    let graph = &scene.lab.graph;
    let HappeningAt {
        node,
        first,
        second,
    } = image;
    match what {
        Happening::Drain => {
            let outer = graph.drain(&node).await;
            let inner = graph.drain_all().await;
            if node.tracker().in_flight() != 0 {
                return Err("something is in flight in a drained section".into());
            }
            drop(outer);
            drop(inner);
        }
        Happening::InsertFilter => graph.insert_filter(&need(first)?).await?,
        Happening::ReplaceNode => {
            graph.insert_filter(&need(first.clone())?).await?;
            graph.replace_node(&need(first)?, &need(second)?).await?;
        }
        Happening::ChangeBacking => graph.set_backing(&node, Some(&need(first)?)).await?,
    }
    Ok(())
}

fn need<T>(thing: Option<T>) -> Result<T, Failure> {
    thing.ok_or_else(|| Failure("the case lacks a node".into()))
}

#[derive(Clone)]
struct HappeningAt {
    node: Arc<Node>,
    first: Option<Arc<Node>>,
    second: Option<Arc<Node>>,
}

async fn change(scene: Arc<Scene>, what: Happening) -> CaseResult {
    let setup = Setup {
        backing: what == Happening::ChangeBacking,
    };
    let Some(image) = Image::new(&scene, setup).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    if let Err(verdict) = image.needs(Capabilities::DISCARD) {
        return Ok(verdict);
    }
    let (target, cluster) = (image.target(), image.cluster);
    if let Err(verdict) = image.prepare(ClusterKind::Data, target).await? {
        return Ok(verdict);
    }
    let graph = scene.lab.graph.clone();
    let relay = |name: &str| {
        let spec = NodeSpec::new(Arc::new(Relay)).named(name);
        let node = graph.add_node(spec.with_child(ChildRole::Filtered, "file", &image.node))?;
        graph.keep(&node);
        Ok::<_, block_core::Error>(node)
    };
    let mut at = HappeningAt {
        node: image.node.clone(),
        first: None,
        second: None,
    };
    match what {
        Happening::Drain => {}
        Happening::InsertFilter => at.first = Some(relay("first")?),
        Happening::ReplaceNode => {
            at.first = Some(relay("first")?);
            at.second = Some(relay("second")?);
        }
        Happening::ChangeBacking => at.first = Some(second_base(&scene).await?),
    }

    let (hold, write, discard) = park!(scene, image);
    let happening = scene.start(happen(scene.clone(), at.clone(), what));
    scene.rest().await;
    // A new request of a producer while the graph changes.
    let guest = image.guest.signing(owner::LATER);
    let meanwhile = scene.start(async move {
        guest
            .write(target + 1024, 1024, RequestFlags::empty())
            .await
    });
    scene.rest().await;
    if scene.strict() && (happening.is_done() || meanwhile.is_done()) {
        return Err("the graph changed, or a request was admitted, while requests waited".into());
    }
    hold.release();
    ended(write).await?;
    ended(discard).await?;
    ended(happening).await?;
    let written = ended(meanwhile).await?;
    if written && scene.strict() && !image.holds(target + 1024, owner::LATER).await? {
        return Err("the write that came meanwhile was lost".into());
    }
    if let (true, Some(top)) = (scene.strict(), at.second.as_ref().or(at.first.as_ref()))
        && what != Happening::ChangeBacking
        && image.guest.handle().node().id() != top.id()
    {
        return Err("the handle isn't on the new node".into());
    }
    image.judge("after the change", false).await?;

    // And back, with the same thing going on.
    if what == Happening::InsertFilter || what == Happening::ReplaceNode {
        let guest = image.guest.clone();
        let busy = scene.start(async move { guest.discard(target, cluster).await });
        for filter in [at.second, at.first].into_iter().flatten() {
            if image.guest.handle().node().id() == filter.id() {
                graph.remove_filter(&filter).await?;
            }
            graph.release(&filter).await?;
        }
        ended(busy).await?;
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}

/// A copy of the backing file. (A copy of its storage: formats check that a parent is what it was.)
async fn second_base(scene: &Arc<Scene>) -> Result<Arc<Node>, Failure> {
    let lab = &scene.lab;
    let content = lab.disk(BASE)?.content();
    lab.disks.insert(Disk::new("base2", content));
    let read_only = Options::new().with("read-only", true);
    Ok(lab
        .open(&scene.format.name, "base2", None, &read_only)
        .await?)
}

async fn copy_on_read(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup { backing: true }).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    if let Err(verdict) = image.needs(Capabilities::DISCARD) {
        return Ok(verdict);
    }
    let (target, cluster) = (image.target(), image.cluster);
    let waits = image.gate_waits();
    let hold = scene.lab.disk(BASE)?.hold(Choose::reads(), Stage::Before);
    let mut reads = Vec::new();
    let guest = image.guest.clone();
    reads.push(scene.start(async move {
        guest
            .read(target + 512, 512, RequestFlags::COPY_ON_READ)
            .await
    }));
    scene.rest().await;
    let job = image.job.clone();
    let discard = scene.start(async move { job.discard(target, cluster).await });
    scene.rest().await;
    let guest = image.guest.clone();
    reads.push(scene.start(async move {
        guest
            .read(target + 1024, 512, RequestFlags::COPY_ON_READ)
            .await
    }));
    scene.rest().await;
    if scene.strict() {
        if hold.arrivals() == 0 {
            return Err("the read never reached the backing file".into());
        }
        if discard.is_done() || image.gate_waits() < waits + 2 {
            return Err("the discard or the second read didn't wait".into());
        }
    }
    hold.release();
    for read in reads {
        if let Ok(wrong) = read.await
            && let Some(wrong) = wrong?.first()
        {
            return Err(format!("a read returned {wrong}").into());
        }
    }
    ended(discard).await?;
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn copy_on_read_behind(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup { backing: true }).await? else {
        return Ok(Verdict::NotCovered(
            "the driver has no backing files".into(),
        ));
    };
    if let Err(verdict) = image.needs(Capabilities::DISCARD) {
        return Ok(verdict);
    }
    let (target, cluster) = (image.target(), image.cluster);
    let (hold, write, discard) = park!(scene, image);
    let guest = image.guest.clone();
    let read = scene.start(async move {
        // From the cluster before it, which is there, into the target.
        guest
            .read(target - 512, cluster, RequestFlags::COPY_ON_READ)
            .await
    });
    scene.rest().await;
    if scene.strict() && read.is_done() {
        return Err("the read overtook the discard".into());
    }
    hold.release();
    ended(write).await?;
    ended(discard).await?;
    if let Ok(wrong) = read.await
        && let Some(wrong) = wrong?.first()
    {
        return Err(format!("the read returned {wrong}").into());
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}
