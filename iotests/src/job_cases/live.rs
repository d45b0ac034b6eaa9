//! Jobs beside a guest that writes, zeroes, discards and reads all the time, from before they begin to after they end.

use std::sync::Arc;

use jobs::{JobManager, JobOptions, SyncMode};

use super::work::{Work, close_target, expect_backup, expect_chain, own_sectors};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    stack::{Load, content, layer, shape},
};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for work in Work::ALL {
        let name = work.name();
        cases.push(Case::new(
            Group::Jobs,
            format!("jobs-{name}-beside-busy-guest"),
            format!(
                "a {name} beside a guest that never rests succeeds, leaves the chain and the headers that it \
                 must, and every byte of the disk is right before and after it is opened again"
            ),
            move |scene| beside_guest(scene, work),
        ));
    }
    for work in Work::KINDS.into_iter().filter(|work| work.gets_ready()) {
        let name = work.name();
        cases.push(Case::new(
            Group::Jobs,
            format!("jobs-{name}-cancelled-when-ready-beside-busy-guest"),
            format!(
                "a {name} that is ready and softly cancelled under load leaves the guest where it was and a \
                 copy that is some moment's content of the disk"
            ),
            move |scene| softly_cancelled(scene, work),
        ));
    }
    cases
}

async fn beside_guest(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let mut load = Load::start(&stack, 3);
    load.more(20).await?;
    // A backup's point in time has to be known: the guest rests for this moment, and is back at once.
    let (mut before, mut own) = (Vec::new(), Vec::new());
    if matches!(work, Work::Backup(_)) {
        load.stop().await?;
        before = content(stack.graph(), stack.top()).await?;
        own = own_sectors(&stack).await?;
        load = Load::start(&stack, 0);
    }
    let (job, target) = work.start(&stack, &manager, JobOptions::default()).await?;
    if matches!(work, Work::Backup(_)) {
        load.stop().await?;
        load = Load::start(&stack, 3);
    }
    if work.gets_ready() {
        job.wait_ready().await?;
        load.more(60).await?;
        job.complete()?;
    } else if work == Work::Backup(SyncMode::None) {
        load.more(60).await?;
        // What is overwritten after the end isn't saved.
        load.stop().await?;
        job.cancel(true)?;
        load = Load::start(&stack, 0);
    }
    let ended = job.wait().await;
    if work == Work::Backup(SyncMode::None) {
        if ended.is_ok() {
            return Err("a cancelled backup succeeded".into());
        }
    } else {
        ended?;
    }
    if !matches!(work, Work::Backup(_)) {
        load.more(20).await?;
    }
    load.stop().await?;
    let counters = job.counters();
    let moved = counters.bytes_copied
        + counters.bytes_zeroed
        + counters.bytes_copied_before_write
        + counters.bytes_written_through;
    if moved == 0 {
        return Ok(Verdict::Inconclusive("the job moved nothing".into()));
    }
    let (top, below) = work.outcome(&stack);
    expect_chain(&stack, &top, &below).await?;
    if let (Work::Backup(sync), Some(target)) = (work, &target) {
        let changed = expect_backup(&stack, target, sync, &before, &own).await?;
        if changed == 0 {
            return Ok(Verdict::Inconclusive("the guest changed nothing".into()));
        }
    }
    for node in stack.graph().nodes() {
        if !node.bitmaps().is_empty() {
            return Err(format!("a dirty bitmap is left at '{}'", node.name()).into());
        }
    }
    let keep = if work.has_target() && !work.gets_ready() {
        target
    } else {
        drop(target);
        None
    };
    close_target(&scene, keep).await?;
    let backing = (stack.nodes.len() == 2 && top == layer(1)).then(|| layer(0));
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn softly_cancelled(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let load = Load::start(&stack, 3);
    let (job, target) = work.start(&stack, &manager, JobOptions::default()).await?;
    let kept = target.clone();
    job.wait_ready().await?;
    load.more(40).await?;
    job.cancel(false)?;
    if job.complete().is_ok() {
        return Err("a mirror on its way out was completed".into());
    }
    job.wait().await?;
    let names = shape(stack.graph());
    if let Some(line) = names.iter().find(|line| line.contains("mirror_top")) {
        return Err(format!("the filter is left: {line}").into());
    }
    // The guest had been stopped when the copy was made: what it shows is allowed by the oracle at that moment, and
    // therefore now, as far as nothing was written since. With the guest at rest it is the same as the disk.
    load.stop().await?;
    let copy = kept.unwrap_or_else(|| stack.nodes[0].clone());
    let found = content(stack.graph(), &copy).await?;
    let oracle = stack.guest.oracle();
    let known = oracle.check_known(0, &found);
    if let Some(wrong) = known.first() {
        return Err(format!("the copy: {wrong}").into());
    }
    drop(copy);
    close_target(&scene, target).await?;
    let top = layer(stack.nodes.len() - 1);
    let backing = (stack.nodes.len() == 2).then(|| layer(0));
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}
