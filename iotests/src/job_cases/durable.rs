//! A job that has ended well leaves a copy that a cut of the power can't take back. What the guest had flushed before would be
//! gone otherwise: it uses the copy from then on.

use std::sync::Arc;

use block_core::{Options, RequestFlags};
use jobs::{CopyMode, JobManager, JobOptions, SyncMode};

use super::work::{COPY, Work, close_target};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    stack::{content, layer, same},
    storage::Disk,
};

/// What the copy is opened as after the cut.
const AFTER: &str = "after-the-cut";

pub(super) fn cases() -> Vec<Case> {
    [
        Work::CommitActive,
        Work::Mirror(SyncMode::Full, CopyMode::Background),
        Work::Mirror(SyncMode::Full, CopyMode::WriteBlocking),
        Work::Backup(SyncMode::Full),
    ]
    .into_iter()
    .map(|work| {
        let name = work.name();
        Case::new(
            Group::Crash,
            format!("crash-{name}-that-has-ended-is-durable"),
            format!(
                "when the power is cut right after a {name} has ended, and all is lost that can be, the copy has \
                 everything, also what the guest wrote and flushed at the last moment"
            ),
            move |scene| durable_at_the_end(scene, work),
        )
    })
    .collect()
}

async fn durable_at_the_end(scene: Arc<Scene>, work: Work) -> CaseResult {
    if !scene.format.crash_safe {
        let why = "the driver doesn't claim to survive power cuts";
        return Ok(Verdict::NotCovered(why.into()));
    }
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let mut expected = content(stack.graph(), stack.top()).await?;
    let slow = JobOptions {
        speed: 1,
        ..JobOptions::default()
    };
    let (job, target) = work.start(&stack, &manager, slow).await?;
    let disk = match work {
        Work::CommitActive => stack.disk(0)?,
        _ => scene.lab.disk(COPY)?,
    };
    disk.track_durability();
    job.set_speed(0)?;
    if work.gets_ready() {
        job.wait_ready().await?;
        let none = RequestFlags::empty();
        for at in [0, stack.size / 2 / 512 * 512] {
            stack.guest.write(at, 8192, none).await?;
        }
        stack.guest.handle().flush().await?;
        job.complete()?;
    }
    job.wait().await?;
    let could_be_lost = disk.unflushed();
    let kept = disk.power_cut_with(&mut || 0);
    if work.gets_ready() {
        expected = content(stack.graph(), &stack.guest.handle().node()).await?;
    }
    scene.lab.disks.insert(Disk::new(AFTER, kept));
    let node = scene
        .lab
        .open(&scene.format.name, AFTER, None, &Options::new())
        .await?;
    let found = content(stack.graph(), &node).await?;
    let what = format!("the copy after a cut ({could_be_lost} changes weren't flushed)");
    same(&found, &expected, &what)?;
    crate::stack::check(stack.graph(), &node, false).await?;
    scene.lab.graph.release(&node).await?;
    drop(node);

    let (top, _) = work.outcome(&stack);
    let keep = if work.gets_ready() {
        drop(target);
        None
    } else {
        target
    };
    close_target(&scene, keep).await?;
    let backing = (stack.nodes.len() == 2 && top == layer(1)).then(|| layer(0));
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}
