//! Points in time: what a backup saves is what was there when it began, however the guest overwrites it; what a
//! write-blocking mirror has acknowledged is in its target at once; jobs that start together fail together.

use std::sync::Arc;

use block_core::{ErrorKind, Options, RequestFlags};
use jobs::{
    BackupOptions, CommitOptions, CompletionMode, CopyMode, JobManager, JobOptions, JobStatus,
    MirrorOptions, StreamOptions, SyncMode, Transaction,
};

use super::work::{COPY, Work, close_target, expect_chain, named};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    stack::{Load, NONE, content, layer, same, shape},
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    let jobs = Group::Jobs;
    vec![
        Case::new(
            jobs,
            "jobs-backup-slower-than-guest-saves-everything-once",
            "a backup that has hardly begun holds the old disk after the guest has overwritten all of it, and saved \
             each cluster once",
            overwritten,
        ),
        Case::new(
            jobs,
            "jobs-backup-saves-both-clusters-that-a-request-touches",
            "a small write, zero write or discard across the edge of what a backup copies at once saves both sides",
            across_edges,
        ),
        Case::new(
            jobs,
            "jobs-backup-reads-no-cluster-twice",
            "what was saved before a guest's write isn't read again by the job: the target keeps the old content",
            not_twice,
        ),
        Case::new(
            jobs,
            "jobs-write-blocking-mirror-has-every-acknowledged-write",
            "while a write-blocking mirror that was ready is paused, its target shows every write and zero write that \
             has ended",
            in_step,
        ),
        Case::new(
            jobs,
            "jobs-mirror-copies-what-changed-while-it-was-paused",
            "writes, zero writes and discards to a disk whose mirror is paused after it was ready are in the copy that \
             takes over",
            changed_in_standby,
        ),
        Case::new(
            jobs,
            "jobs-mirror-top-keeps-rest-of-partly-written-clusters",
            "when a part of a cluster that only the base holds is written or made zero beside a mirror of the top layer, \
             the rest of it is the base's after the switch-over, however large the clusters are",
            partly_written,
        ),
        Case::new(
            jobs,
            "jobs-grouped-backups-fail-together",
            "of two backups in one grouped transaction none succeeds when the target of one fails, and both targets are \
             let go",
            grouped,
        ),
        Case::new(
            jobs,
            "jobs-commit-below-and-mirror-above-run-side-by-side",
            "an intermediate commit and a mirror of the guest's disk above it run at once beside a guest, and both are \
             right",
            side_by_side,
        ),
        Case::new(
            jobs,
            "jobs-stream-and-commit-on-disjoint-layers",
            "a stream into a middle layer and the guest's own backup run side by side, each on its own part of the chain",
            disjoint,
        ),
    ]
}

async fn overwritten(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Backup(SyncMode::Full);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = content(stack.graph(), stack.top()).await?;
    let (job, target) = work.start(&stack, &manager, named("slow")).await?;
    // Before it has copied anything.
    job.pause()?;
    job.wait_status(JobStatus::Paused).await;
    let mut at = 0;
    while at < stack.size {
        let len = (3 * stack.unit + 512).min(stack.size - at);
        stack.guest.write(at, len, NONE).await?;
        at += len;
    }
    // A second time over: nothing may be saved again.
    stack
        .guest
        .zero(0, stack.size / 2 / 512 * 512, NONE)
        .await?;
    job.resume()?;
    job.wait().await?;
    let counters = job.counters();
    if counters.bytes_copied_before_write == 0 {
        return Ok(Verdict::Inconclusive(
            "nothing was copied before a write".into(),
        ));
    }
    let total = counters.bytes_copied_before_write + counters.bytes_copied + counters.bytes_zeroed;
    if total > stack.size {
        return Err(format!("{total} bytes were saved of a disk of {}", stack.size).into());
    }
    if let Some(target) = &target {
        same(
            &content(stack.graph(), target).await?,
            &before,
            "the backup",
        )?;
    }
    end(&scene, stack, target).await
}

async fn across_edges(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Backup(SyncMode::None);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = content(stack.graph(), stack.top()).await?;
    let (job, target) = work.start(&stack, &manager, named("edges")).await?;
    let step = stack.unit.max(64 << 10);
    let (guest, edges) = (&stack.guest, [step, 2 * step, 3 * step]);
    guest.write(edges[0] - 512, 1024, NONE).await?;
    guest
        .zero(edges[1] - 512, 1024, RequestFlags::MAY_UNMAP)
        .await?;
    if stack.discards() {
        guest.discard(edges[2] - stack.unit, 2 * stack.unit).await?;
    } else {
        guest.write(edges[2] - 512, 1024, NONE).await?;
    }
    guest.write(stack.size - 512, 512, NONE).await?;
    job.cancel(true)?;
    let _ = job.wait().await;
    if let Some(target) = &target {
        let saved = content(stack.graph(), target).await?;
        let touched = |edge: u64| (edge - step) as usize..(edge + step) as usize;
        for range in edges.map(touched) {
            same(&saved[range.clone()], &before[range], "the saved clusters")?;
        }
        let last = (stack.size - 512) as usize..stack.size as usize;
        same(&saved[last.clone()], &before[last], "the saved end")?;
    }
    end(&scene, stack, target).await
}

async fn not_twice(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Backup(SyncMode::Full);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = content(stack.graph(), stack.top()).await?;
    let (job, target) = work.start(&stack, &manager, named("twice")).await?;
    job.pause()?;
    job.wait_status(JobStatus::Paused).await;
    let copy = scene.lab.disk(COPY)?;
    // The guest's own save of a cluster is parked, while the job gets to it as well.
    let hold = copy.hold(Choose::writes().containing(b"IOTS"), Stage::Before);
    let guest = stack.guest.clone();
    let at = 16 * stack.unit;
    let write = scene.start(async move { guest.write(at, 512, NONE).await });
    scene.rest().await;
    if scene.strict() && hold.waiting().is_empty() {
        return Err("the guest's save wasn't parked".into());
    }
    job.resume()?;
    scene.rest().await;
    hold.release();
    crate::case::ended(write).await?;
    job.wait().await?;
    if let Some(target) = &target {
        same(
            &content(stack.graph(), target).await?,
            &before,
            "the backup",
        )?;
    }
    end(&scene, stack, target).await
}

async fn in_step(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Mirror(SyncMode::Full, CopyMode::WriteBlocking);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let (job, target) = work.start(&stack, &manager, named("step")).await?;
    job.wait_ready().await?;
    job.pause()?;
    job.wait_status(JobStatus::Standby).await;
    let copied = job.counters().bytes_copied;
    let guest = &stack.guest;
    guest.write(512, 512, NONE).await?;
    guest.write(stack.unit - 512, 2 * stack.unit, NONE).await?;
    guest
        .zero(5 * stack.unit + 512, 2 * stack.unit, NONE)
        .await?;
    guest.write(6 * stack.unit, 1024, RequestFlags::FUA).await?;
    guest
        .zero(8 * stack.unit, stack.unit, RequestFlags::MAY_UNMAP)
        .await?;
    guest.write(stack.size - 1024, 1024, NONE).await?;
    let source = content(stack.graph(), stack.top()).await?;
    job.resume()?;
    job.cancel(false)?;
    job.wait().await?;
    let counters = job.counters();
    if counters.bytes_copied != copied {
        return Err("what was acknowledged had to be copied afterwards".into());
    }
    if counters.bytes_written_through == 0 {
        return Ok(Verdict::Inconclusive("nothing was written through".into()));
    }
    if let Some(target) = &target {
        same(
            &content(stack.graph(), target).await?,
            &source,
            "the mirror",
        )?;
    }
    end(&scene, stack, target).await
}

/// The end of a case that leaves the guest where it was.
async fn end(
    scene: &Arc<Scene>,
    stack: crate::stack::Stack,
    target: Option<Arc<block_core::Node>>,
) -> CaseResult {
    close_target(scene, target).await?;
    let backing = (stack.nodes.len() == 2).then(|| layer(0));
    let top = layer(stack.nodes.len() - 1);
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn changed_in_standby(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Mirror(SyncMode::Full, CopyMode::Background);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let (job, target) = work.start(&stack, &manager, named("standby")).await?;
    job.wait_ready().await?;
    job.pause()?;
    job.wait_status(JobStatus::Standby).await;
    let guest = &stack.guest;
    guest.write(512, 512, NONE).await?;
    guest.zero(3 * stack.unit + 512, stack.unit, NONE).await?;
    guest
        .zero(6 * stack.unit, stack.unit, RequestFlags::MAY_UNMAP)
        .await?;
    if stack.discards() {
        guest.discard(8 * stack.unit, stack.unit).await?;
    }
    // The completion comes while it is paused; the resume lets it happen.
    job.complete()?;
    scene.rest().await;
    if job.status().is_over() {
        return Err("it completed while it was paused".into());
    }
    job.resume()?;
    job.wait().await?;
    drop(target);
    expect_chain(&stack, COPY, &[]).await?;
    stack.finish(COPY, None).await?;
    Ok(Verdict::Passed)
}

async fn partly_written(scene: Arc<Scene>) -> CaseResult {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let work = Work::Mirror(SyncMode::Top, copy_mode);
        let stack = match work.stack(&scene).await? {
            Ok(stack) => stack,
            Err(verdict) => return Ok(verdict),
        };
        let manager = JobManager::new(stack.graph());
        let (job, target) = work.start(&stack, &manager, named("top")).await?;
        job.wait_ready().await?;
        // Units that the top layer doesn't hold and the base does: see how a stack is filled.
        let base = |n: u64| (6 * n + 3) * stack.unit;
        let guest = &stack.guest;
        guest.write(base(0), 512, NONE).await?;
        guest.write(base(1) + stack.unit - 512, 512, NONE).await?;
        guest.zero(base(2) + 1024, 512, NONE).await?;
        job.complete()?;
        job.wait().await?;
        drop(target);
        let (top, below) = work.outcome(&stack);
        expect_chain(&stack, &top, &below).await?;
        stack.finish(&top, None).await?;
    }
    Ok(Verdict::Passed)
}

async fn grouped(scene: Arc<Scene>) -> CaseResult {
    let work = Work::Backup(SyncMode::Full);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let lab = &scene.lab;
    let format = scene.format.name.as_str();
    let size = stack.size;
    lab.create(format, "other", size, &scene.format.create, None)
        .await?;
    let other = lab.open(format, "other", None, &Options::new()).await?;
    stack.graph().keep(&other);
    let targets = [
        stack.target(COPY, &scene.format.create).await?,
        stack.target("copy2", &scene.format.create).await?,
    ];
    let before = shape(stack.graph());
    let disk = lab.disk(COPY)?;
    disk.fail(
        Choose::writes().containing(b"IOTS"),
        ErrorKind::Io,
        Stage::Before,
    );
    let manager = JobManager::new(stack.graph());
    let transaction = Transaction::new(CompletionMode::Grouped);
    let mut jobs = Vec::new();
    for (id, source, target) in [("a", stack.top(), &targets[0]), ("b", &other, &targets[1])] {
        let job = JobOptions {
            transaction: Some(transaction.clone()),
            ..named(id)
        };
        let options = BackupOptions {
            job,
            ..BackupOptions::new(source, target)
        };
        jobs.push(manager.backup(options).await?);
    }
    transaction.start();
    let (first, second) = (jobs[0].wait().await, jobs[1].wait().await);
    disk.clear_rules();
    match (first, second) {
        (Err(broken), Err(cancelled))
            if broken.kind() == ErrorKind::Io && cancelled.kind() == ErrorKind::Cancelled => {}
        other => return Err(format!("they ended with {other:?}").into()),
    }
    let after = shape(stack.graph());
    if after != before {
        return Err(format!("the graph was {before:?}, and is {after:?}").into());
    }
    let [first, second] = targets;
    close_target(&scene, Some(first)).await?;
    close_target(&scene, Some(second)).await?;
    close_target(&scene, Some(other)).await?;
    end(&scene, stack, None).await
}

async fn side_by_side(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::CommitMiddle.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let target = stack.target(COPY, &scene.format.create).await?;
    let load = Load::start(&stack, 3);
    let mut commit = CommitOptions::new(stack.top())
        .top(&stack.nodes[2])
        .base(&stack.nodes[0]);
    commit.job = JobOptions {
        speed: 4 << 20,
        ..named("below")
    };
    let commit = manager.commit(commit).await?;
    let mirror = MirrorOptions {
        job: named("above"),
        ..MirrorOptions::new(stack.top(), &target)
    };
    let mirror = manager.mirror(mirror).await?;
    mirror.wait_ready().await?;
    commit.wait().await?;
    load.more(20).await?;
    mirror.complete()?;
    mirror.wait().await?;
    load.more(20).await?;
    load.stop().await?;
    drop(target);
    expect_chain(&stack, COPY, &[]).await?;
    stack.finish(COPY, None).await?;
    Ok(Verdict::Passed)
}

async fn disjoint(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::CommitMiddle.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = content(stack.graph(), stack.top()).await?;
    let target = stack.target(COPY, &scene.format.create).await?;
    let backup = BackupOptions {
        job: JobOptions {
            speed: 1 << 20,
            ..named("above")
        },
        ..BackupOptions::new(stack.top(), &target)
    };
    let backup = manager.backup(backup).await?;
    let load = Load::start(&stack, 2);
    let mut stream = StreamOptions::new(&stack.nodes[2]);
    stream.job = named("below");
    let stream = manager.stream(stream).await?;
    stream.wait().await?;
    load.more(20).await?;
    backup.wait().await?;
    load.stop().await?;
    same(
        &content(stack.graph(), &target).await?,
        &before,
        "the backup",
    )?;
    expect_chain(&stack, &layer(3), &[layer(2)]).await?;
    end(&scene, stack, Some(target)).await
}
