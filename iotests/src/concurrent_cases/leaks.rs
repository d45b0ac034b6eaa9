//! What is left when all is over: nodes, drivers, tickets, handles, storage. Each thing is done many times, and then counted.

use std::sync::{Arc, Weak};

use block_core::{Capabilities, Node, Options, RequestFlags};
use futures::FutureExt;

use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::{GUEST, NONE, Stack, at_rest, layer, probe, writer},
    storage::{Choose, OpKind, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            Group::Rw,
            "rw-nothing-is-left-of-images-that-were-closed",
            "after an image was opened, written and closed thirty times no node, driver or user of its storage is left",
            closed,
        ),
        Case::new(
            Group::Fault,
            "fault-nothing-is-left-of-opens-that-failed",
            "opens that fail at any read leave no node and no user of the storage",
            failed,
        ),
        Case::new(
            Group::Race,
            "race-nothing-is-left-of-many-dropped-requests",
            "after hundreds of dropped requests no ticket, pin or count is left, the node closes, and no cluster leaked",
            dropped,
        ),
        Case::new(
            Group::Rw,
            "rw-space-that-is-given-back-is-used-again",
            "an image that is written and discarded or made zero a hundred times over doesn't grow with each turn",
            recycled,
        ),
        Case::new(
            Group::Jobs,
            "jobs-nothing-is-left-of-many-jobs",
            "mirrors that are begun and cancelled again and again leave no node, bitmap or claim",
            jobs,
        ),
    ]
}

fn all_gone(nodes: &[Weak<Node>], what: &str) -> Result<(), Failure> {
    let left = nodes.iter().filter(|node| node.strong_count() > 0).count();
    if left > 0 {
        return Err(format!("{left} of {} nodes are left {what}", nodes.len()).into());
    }
    Ok(())
}

async fn closed(scene: Arc<Scene>) -> CaseResult {
    probe(&scene).await?;
    let lab = &scene.lab;
    let disk = lab.disk("probe")?;
    scene.rest().await;
    let users = Arc::strong_count(&disk);
    let mut nodes = Vec::new();
    let mut drivers: Vec<Weak<dyn block_core::BlockDriver>> = Vec::new();
    for n in 0..30_u64 {
        let node = lab
            .open(&scene.format.name, "probe", None, &Options::new())
            .await?;
        let handle = writer(&lab.graph, &node, "guest")?;
        if node.driver().capabilities().contains(Capabilities::WRITE) {
            handle
                .write(n * 4096 + 512, vec![n as u8 + 1; 512], NONE)
                .await?;
        }
        handle.read(0, 4096).await?;
        for node in lab.graph.nodes() {
            nodes.push(Arc::downgrade(&node));
            drivers.push(Arc::downgrade(node.driver()));
        }
        drop(handle);
        lab.graph.release(&node).await?;
    }
    scene.rest().await;
    all_gone(&nodes, "after closing")?;
    let left = drivers.iter().filter(|one| one.strong_count() > 0).count();
    if left > 0 {
        return Err(format!("{left} of {} drivers are left", drivers.len()).into());
    }
    if Arc::strong_count(&disk) != users {
        return Err("somebody still uses the storage".into());
    }
    Ok(Verdict::Passed)
}

async fn failed(scene: Arc<Scene>) -> CaseResult {
    probe(&scene).await?;
    let lab = &scene.lab;
    let disk = lab.disk("probe")?;
    scene.rest().await;
    let users = Arc::strong_count(&disk);
    let mut failures = 0;
    for n in 0..40 {
        let choose = Choose::any().kind(OpKind::Read).after(n % 8).times(1);
        disk.fail(choose, block_core::ErrorKind::Io, Stage::Before);
        let opened = lab
            .open(&scene.format.name, "probe", None, &Options::new())
            .await;
        disk.clear_rules();
        match opened {
            Ok(node) => lab.graph.release(&node).await?,
            Err(error) => {
                failures += 1;
                drop(error);
            }
        }
        // A format that isn't there, and one that the file isn't.
        let wrong = Options::new().with("no-such-option", 1);
        let refused = lab.open(&scene.format.name, "probe", None, &wrong).await;
        if refused.is_ok() {
            return Err("an option that doesn't exist was accepted".into());
        }
    }
    scene.rest().await;
    lab.graph.close_all().await?;
    if let Some(node) = lab.graph.nodes().first() {
        return Err(format!("'{}' is left of an open that failed", node.name()).into());
    }
    if Arc::strong_count(&disk) != users {
        let now = Arc::strong_count(&disk);
        return Err(format!("the storage has {now} users, not {users}").into());
    }
    if failures == 0 {
        return Ok(Verdict::NotCovered(
            "the driver reads nothing to open an image".into(),
        ));
    }
    Ok(Verdict::Passed)
}

async fn dropped(scene: Arc<Scene>) -> CaseResult {
    let stack = match Stack::new(&scene, 1, Capabilities::empty()).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let env = scene.lab.env.clone();
    let disk = stack.disk(0)?;
    disk.set_jitter(4);
    for n in 0..300_u64 {
        let at = env.below(stack.size / 512 - 8) * 512;
        let (guest, unit) = (stack.guest.signing(GUEST + 1), stack.unit);
        let mut request = match n % 5 {
            0 => async move { guest.zero(at, 4096, RequestFlags::MAY_UNMAP).await }.boxed(),
            1 if stack.discards() => async move {
                guest
                    .discard(
                        at / unit * unit,
                        unit.min(guest.handle().length() - at / unit * unit),
                    )
                    .await
            }
            .boxed(),
            2 => async move { guest.handle().flush().await }.boxed(),
            3 => async move { guest.handle().read(at, 512).await.map(drop) }.boxed(),
            _ => async move { guest.write(at, 4096, NONE).await }.boxed(),
        };
        for _ in 0..env.below(6) {
            if futures::poll!(&mut request).is_ready() {
                break;
            }
            crate::sim::yield_now().await;
        }
        drop(request);
    }
    drop(stack.graph().drain_all().await);
    scene.rest().await;
    at_rest(stack.graph())?;
    let handle = stack.guest.handle();
    if handle.in_flight() > 0 {
        return Err(format!("{} requests count at the handle", handle.in_flight()).into());
    }
    if !disk.describe().is_empty() {
        return Err(format!("in flight: {:?}", disk.describe()).into());
    }
    let nodes: Vec<Weak<Node>> = stack.graph().nodes().iter().map(Arc::downgrade).collect();
    stack.finish(&layer(0), None).await?;
    all_gone(&nodes, "after closing")?;
    Ok(Verdict::Passed)
}

async fn recycled(scene: Arc<Scene>) -> CaseResult {
    let needs = Capabilities::DISCARD | Capabilities::WRITE_ZEROES;
    let stack = match Stack::new(&scene, 1, needs).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let (disk, unit) = (stack.disk(0)?, stack.unit);
    let turn = async |n: u64| -> Result<(), Failure> {
        let guest = &stack.guest;
        for k in 0..4 {
            let at = (k * 4 + n % 3) * unit;
            guest.write(at, unit, NONE).await?;
            if n % 2 == 0 {
                guest.discard(at, unit).await?;
            } else {
                guest.zero(at, unit, RequestFlags::MAY_UNMAP).await?;
            }
        }
        guest.handle().flush().await?;
        Ok(())
    };
    for n in 0..10 {
        turn(n).await?;
    }
    let before = disk.len();
    for n in 10..110 {
        turn(n).await?;
    }
    // A hundred turns with four clusters each: what is allowed is a tenth of that.
    let grown = disk.len() - before;
    if grown > 40 * unit {
        return Err(format!("the image has grown by {grown} bytes").into());
    }
    stack.finish(&layer(0), None).await?;
    Ok(Verdict::Passed)
}

async fn jobs(scene: Arc<Scene>) -> CaseResult {
    use jobs::{JobManager, MirrorOptions};
    let stack = match Stack::new(&scene, 1, Capabilities::empty()).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let target = stack.target("copy", &scene.format.create).await?;
    let manager = JobManager::new(stack.graph());
    let before = crate::stack::shape(stack.graph());
    let mut nodes = Vec::new();
    let mut begun = Vec::new();
    for n in 0..20 {
        let job = manager
            .mirror(MirrorOptions::new(stack.top(), &target))
            .await?;
        nodes.push(Arc::downgrade(&stack.guest.handle().node()));
        begun.push(Arc::downgrade(&job));
        for _ in 0..n {
            crate::sim::yield_now().await;
        }
        let _ = job.cancel(true);
        let _ = job.wait().await;
    }
    scene.rest().await;
    if crate::stack::shape(stack.graph()) != before {
        return Err("the graph isn't what it was".into());
    }
    all_gone(&nodes, "after the jobs")?;
    let left = begun.iter().filter(|job| job.strong_count() > 0).count();
    if left > 0 {
        return Err(format!("{left} jobs are left").into());
    }
    stack.graph().release(&target).await?;
    drop(target);
    stack.finish(&layer(0), None).await?;
    Ok(Verdict::Passed)
}
