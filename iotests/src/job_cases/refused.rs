//! What is refused: that it is, in words that name what is wrong, and that neither graph nor storage has changed a bit.

use std::sync::Arc;

use block_core::{Capabilities, Options, Result, driver::Truncate};
use jobs::{
    BackupOptions, CommitOptions, CopyMode, Job, JobManager, JobStatus, MirrorOptions,
    StreamOptions, SyncMode,
};

use super::work::{COPY, Work, close_target, expect_chain, named};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::{Stack, layer, shape},
};

pub(super) fn cases() -> Vec<Case> {
    let jobs = Group::Jobs;
    vec![
        Case::new(
            jobs,
            "jobs-target-that-source-reaches-is-refused",
            "a mirror or backup into its own source, or into a layer below it, is refused before anything is changed",
            into_itself,
        ),
        Case::new(
            jobs,
            "jobs-target-of-other-size-is-refused",
            "a mirror or backup into an image of another size is refused before anything is changed",
            other_size,
        ),
        Case::new(
            jobs,
            "jobs-second-job-on-busy-node-is-refused",
            "while a job of any kind is at work, a second one on any of its nodes is refused, and the first succeeds",
            busy,
        ),
        Case::new(
            jobs,
            "jobs-layers-that-are-not-there-are-refused",
            "a commit or stream to a layer that isn't in the chain, or the wrong way round, is refused before anything is \
             changed",
            foreign_layers,
        ),
        Case::new(
            jobs,
            "jobs-verbs-are-refused-by-state",
            "a running mirror refuses complete, finalize, dismiss and resume; a paused one a second pause; a ready one \
             finalize and dismiss",
            verbs,
        ),
        Case::new(
            jobs,
            "jobs-resize-during-mirror-is-refused",
            "while a mirror is at work neither source nor target can be resized; afterwards they can",
            resize,
        ),
        Case::new(
            jobs,
            "jobs-compressed-backup-needs-the-capability",
            "a compressed backup is whole where the driver declares compressed writes, and refused where it doesn't",
            compressed,
        ),
    ]
}

/// The words of a refusal.
fn refused(result: Result<Arc<Job>>, what: &str) -> Result<String, Failure> {
    match result {
        Ok(_) => Err(format!("{what} wasn't refused").into()),
        Err(error) => Ok(error.reason()),
    }
}

async fn unchanged(
    scene: &Arc<Scene>,
    stack: Stack,
    target: Option<Arc<block_core::Node>>,
    before: &[String],
) -> CaseResult {
    let after = shape(stack.graph());
    if after != before {
        return Err(format!("the graph was {before:?}, and is {after:?}").into());
    }
    close_target(scene, target).await?;
    let backing = (stack.nodes.len() == 2).then(|| layer(0));
    let top = layer(stack.nodes.len() - 1);
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn into_itself(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::Backup(SyncMode::Full).stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = shape(stack.graph());
    let counts: Vec<_> = bytes(&scene);
    let top = stack.top();
    for target in &stack.nodes {
        refused(
            manager.mirror(MirrorOptions::new(top, target)).await,
            "a mirror into its own chain",
        )?;
        refused(
            manager.backup(BackupOptions::new(top, target)).await,
            "a backup into its own chain",
        )?;
    }
    if bytes(&scene) != counts {
        return Err("a refused job changed the storage".into());
    }
    unchanged(&scene, stack, None, &before).await
}

type Bytes = (Vec<u8>, Option<Vec<u8>>);

fn bytes(scene: &Scene) -> Vec<(String, Bytes)> {
    let disks = scene.lab.disks.all();
    disks
        .iter()
        .map(|disk| (disk.name().to_owned(), disk.content().all_bytes()))
        .collect()
}

async fn other_size(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::Backup(SyncMode::Full).stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let lab = &scene.lab;
    let format = scene.format.name.as_str();
    let manager = JobManager::new(stack.graph());
    for size in [stack.size - 512, stack.size + 512] {
        lab.create(format, COPY, size, &scene.format.create, None)
            .await?;
        let target = lab.open(format, COPY, None, &Options::new()).await?;
        lab.graph.keep(&target);
        let before = shape(stack.graph());
        for why in [
            refused(
                manager
                    .mirror(MirrorOptions::new(stack.top(), &target))
                    .await,
                "a mirror into another size",
            )?,
            refused(
                manager
                    .backup(BackupOptions::new(stack.top(), &target))
                    .await,
                "a backup into another size",
            )?,
        ] {
            if !why.contains("different sizes") {
                return Err(format!("the refusal says: {why}").into());
            }
        }
        if shape(stack.graph()) != before {
            return Err("a refused job changed the graph".into());
        }
        close_target(&scene, Some(target)).await?;
    }
    let before = shape(stack.graph());
    unchanged(&scene, stack, None, &before).await
}

async fn busy(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::CommitMiddle.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let (top, other) = (stack.top(), stack.target(COPY, &scene.format.create).await?);
    let mut options = named("first");
    options.speed = 1;
    let (job, _) = Work::CommitMiddle.start(&stack, &manager, options).await?;
    let middle = shape(stack.graph());
    for why in [
        refused(
            manager.stream(StreamOptions::new(top)).await,
            "a stream through a commit",
        )?,
        refused(
            manager.commit(CommitOptions::new(top)).await,
            "a commit of all through a commit",
        )?,
        refused(
            manager
                .backup(BackupOptions::new(&stack.nodes[0], &other))
                .await,
            "a backup of a commit's base",
        )?,
    ] {
        if !why.contains("busy") {
            return Err(format!("the refusal says: {why}").into());
        }
    }
    let mut twin = StreamOptions::new(top).base(&stack.nodes[2]);
    twin.job = named("first");
    let why = refused(manager.stream(twin).await, "a second job of the same id")?;
    if !why.contains("already in use") {
        return Err(format!("the refusal says: {why}").into());
    }
    let frozen = stack.graph().set_backing(&stack.nodes[1], None).await;
    if frozen.is_ok() {
        return Err("a chain was cut under a commit".into());
    }
    if shape(stack.graph()) != middle {
        return Err("a refused job changed the graph".into());
    }
    job.set_speed(0)?;
    job.wait().await?;
    expect_chain(&stack, &layer(3), &[layer(0)]).await?;
    close_target(&scene, Some(other)).await?;
    stack.finish(&layer(3), None).await?;
    Ok(Verdict::Passed)
}

async fn foreign_layers(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::CommitMiddle.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let other = stack.target(COPY, &scene.format.create).await?;
    let before = shape(stack.graph());
    let counts = bytes(&scene);
    let (top, nodes) = (stack.top(), &stack.nodes);
    refused(
        manager.commit(CommitOptions::new(top).base(&other)).await,
        "a commit into a foreign base",
    )?;
    refused(
        manager
            .commit(CommitOptions::new(top).top(&nodes[0]).base(&nodes[2]))
            .await,
        "a commit upwards",
    )?;
    refused(
        manager
            .commit(CommitOptions::new(top).top(&nodes[1]).base(&nodes[1]))
            .await,
        "a commit of a layer into itself",
    )?;
    refused(
        manager.commit(CommitOptions::new(&nodes[0])).await,
        "a commit of the lowest layer",
    )?;
    refused(
        manager.stream(StreamOptions::new(top).base(&other)).await,
        "a stream to a foreign base",
    )?;
    refused(
        manager
            .stream(StreamOptions::new(&nodes[1]).base(&nodes[2]))
            .await,
        "a stream upwards",
    )?;
    if bytes(&scene) != counts {
        return Err("a refused job changed the storage".into());
    }
    unchanged(&scene, stack, Some(other), &before).await
}

async fn verbs(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Mirror(SyncMode::Full, CopyMode::Background);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = shape(stack.graph());
    let mut options = named("verbs");
    options.speed = 1;
    let (job, target) = work.start(&stack, &manager, options).await?;
    job.wait_status(JobStatus::Running).await;
    let bad = |taken: bool, what: &str| {
        if taken {
            Err(Failure(format!(
                "a job in state {} took {what}",
                job.status()
            )))
        } else {
            Ok(())
        }
    };
    bad(job.complete().is_ok(), "complete")?;
    bad(job.finalize().is_ok(), "finalize")?;
    bad(job.dismiss().is_ok(), "dismiss")?;
    bad(job.resume().is_ok(), "resume")?;
    job.pause()?;
    job.wait_status(JobStatus::Paused).await;
    bad(job.pause().is_ok(), "a second pause")?;
    bad(job.complete().is_ok(), "complete")?;
    job.set_speed(0)?;
    job.resume()?;
    job.wait_ready().await?;
    bad(job.finalize().is_ok(), "finalize")?;
    bad(job.dismiss().is_ok(), "dismiss")?;
    job.cancel(false)?;
    job.wait().await?;
    bad(job.cancel(true).is_ok(), "cancel")?;
    close_target(&scene, target).await?;
    unchanged(&scene, stack, None, &before).await
}

async fn resize(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Mirror(SyncMode::Full, CopyMode::Background);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    if !stack.capabilities.contains(Capabilities::TRUNCATE) {
        return Ok(Verdict::NotCovered("the driver has no truncate".into()));
    }
    let manager = JobManager::new(stack.graph());
    let (job, target) = work.start(&stack, &manager, named("sized")).await?;
    job.wait_ready().await?;
    let (old, how) = (stack.size, Truncate::default());
    // The handle may not even ask for it.
    for node in stack.nodes.last().into_iter().chain(&target) {
        let all = crate::lab::all_permissions();
        if let Ok(handle) = stack.graph().attach(node, all, "resizer")
            && handle.truncate(old + 4096, how).await.is_ok()
        {
            return Err(format!("'{}' was resized under a mirror", node.name()).into());
        }
    }
    if stack.top().length() != old {
        return Err("the source's length has changed".into());
    }
    job.cancel(false)?;
    job.wait().await?;
    let handle = scene.lab.attach(stack.top(), "resizer")?;
    handle.truncate(old + 4096, how).await?;
    handle.write(old, vec![1; 512], crate::stack::NONE).await?;
    let shrink = handle.truncate(old, how).await;
    drop(handle);
    close_target(&scene, target).await?;
    if shrink.is_err() {
        return Ok(Verdict::NotCovered("the driver doesn't shrink".into()));
    }
    let backing = (stack.nodes.len() == 2).then(|| layer(0));
    let top = layer(stack.nodes.len() - 1);
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn compressed(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::Backup(SyncMode::Full).stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = crate::stack::content(stack.graph(), stack.top()).await?;
    let target = stack.target(COPY, &scene.format.create).await?;
    let shape_before = shape(stack.graph());
    let options = BackupOptions {
        compress: true,
        ..BackupOptions::new(stack.top(), &target)
    };
    if !stack.capabilities.contains(Capabilities::COMPRESSED) {
        refused(manager.backup(options).await, "a compressed backup")?;
        return unchanged(&scene, stack, Some(target), &shape_before).await;
    }
    let job = manager.backup(options).await?;
    // Guest writes make it compress partial ranges as well.
    stack
        .guest
        .write(stack.size - 512, 512, crate::stack::NONE)
        .await?;
    stack
        .guest
        .write(stack.unit / 2, stack.unit, crate::stack::NONE)
        .await?;
    job.wait().await?;
    let saved = crate::stack::content(stack.graph(), &target).await?;
    crate::stack::same(&saved, &before, "the compressed backup")?;
    unchanged(&scene, stack, Some(target), &shape_before).await
}
