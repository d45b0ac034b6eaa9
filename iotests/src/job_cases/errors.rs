//! Errors of the storage on either side of a copy, under each policy: what the job does, that the guest keeps its disk, and
//! that nothing is switched over to a copy that isn't there.

use std::sync::Arc;

use block_core::{ErrorKind, Node};
use futures::StreamExt;
use jobs::{
    BackupOptions, CopyMode, ErrorAction, IoStatus, Job, JobEvent, JobManager, JobOptions,
    JobStatus, MirrorOptions, OnCbwError, OnError, SyncMode,
};

use super::work::{COPY, Work, close_target, expect_chain};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    lab::Guest,
    stack::{GUEST, NONE, Stack, content, layer, reader, same, shape},
    storage::{Choose, Content, Disk, OpKind, Stage},
};

/// Which storage fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

/// A policy, an error, and what comes of the two.
#[derive(Debug, Clone, Copy)]
struct Trial {
    side: Side,
    policy: OnError,
    kind: ErrorKind,
    action: ErrorAction,
    name: &'static str,
}

const TRIALS: [Trial; 8] = [
    Trial {
        side: Side::Source,
        policy: OnError::Report,
        kind: ErrorKind::Io,
        action: ErrorAction::Report,
        name: "source-error-reported",
    },
    Trial {
        side: Side::Source,
        policy: OnError::Ignore,
        kind: ErrorKind::Io,
        action: ErrorAction::Ignore,
        name: "source-error-ignored",
    },
    Trial {
        side: Side::Source,
        policy: OnError::Stop,
        kind: ErrorKind::Io,
        action: ErrorAction::Stop,
        name: "source-error-stops",
    },
    Trial {
        side: Side::Target,
        policy: OnError::Report,
        kind: ErrorKind::NoSpace,
        action: ErrorAction::Report,
        name: "full-target-reported",
    },
    Trial {
        side: Side::Target,
        policy: OnError::Ignore,
        kind: ErrorKind::Io,
        action: ErrorAction::Ignore,
        name: "target-error-ignored",
    },
    Trial {
        side: Side::Target,
        policy: OnError::Stop,
        kind: ErrorKind::Io,
        action: ErrorAction::Stop,
        name: "target-error-stops",
    },
    Trial {
        side: Side::Target,
        policy: OnError::Enospc,
        kind: ErrorKind::NoSpace,
        action: ErrorAction::Stop,
        name: "full-target-stops-under-enospc",
    },
    Trial {
        side: Side::Target,
        policy: OnError::Enospc,
        kind: ErrorKind::Io,
        action: ErrorAction::Report,
        name: "broken-target-reported-under-enospc",
    },
];

/// What a guest sends while its old content can't be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Write,
    Zero,
    Discard,
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for work in [
        Work::CommitMiddle,
        Work::StreamAll,
        Work::Mirror(SyncMode::Full, CopyMode::Background),
        Work::Backup(SyncMode::Full),
    ] {
        let name = work.name();
        for trial in TRIALS {
            cases.push(Case::new(
                Group::Fault,
                format!("fault-{name}-{}", trial.name),
                format!(
                    "a {name} that meets {:?} at its {:?} under policy {:?}: the event says {:?}, the job does it, and \
                     the guest's disk is whole",
                    trial.kind, trial.side, trial.policy, trial.action
                ),
                move |scene| with_policy(scene, work, trial),
            ));
        }
    }
    for work in Work::KINDS {
        let name = work.name();
        cases.push(Case::new(
            Group::Fault,
            format!("fault-{name}-failed-flush-of-copy"),
            format!("a {name} whose copy can't be flushed fails, and neither graph nor headers refer to the copy"),
            move |scene| flush_fails(scene, work),
        ));
    }
    for (policy, name) in [(OnError::Report, "report"), (OnError::Ignore, "ignore")] {
        cases.push(Case::new(
            Group::Fault,
            format!("fault-write-blocking-mirror-{name}s-failed-guest-copy"),
            format!(
                "a guest's write that reaches the disk but not a write-blocking mirror's target succeeds; the job does \
                 what '{name}' says, and never completes without that data"
            ),
            move |scene| through_fails(scene, policy),
        ));
    }
    for sent in [Sent::Write, Sent::Zero, Sent::Discard] {
        let name = format!("{sent:?}").to_lowercase();
        cases.push(Case::new(
            Group::Fault,
            format!("fault-backup-breaks-{name}-whose-old-content-is-not-saved"),
            format!(
                "with break-guest-write a {name} fails when what it covers can't be saved, changes nothing, and the \
                 backup is whole"
            ),
            move |scene| not_saved(scene, sent, OnCbwError::BreakGuestWrite),
        ));
        cases.push(Case::new(
            Group::Fault,
            format!("fault-backup-broken-by-{name}-whose-old-content-is-not-saved"),
            format!(
                "with break-snapshot a {name} succeeds when what it covers can't be saved, and the backup fails"
            ),
            move |scene| not_saved(scene, sent, OnCbwError::BreakSnapshot),
        ));
    }
    cases
}

/// The storage that a job reads, or writes.
fn disk_of(stack: &Stack, work: Work, side: Side) -> Result<Arc<Disk>, Failure> {
    let top = stack.nodes.len() - 1;
    match (side, work) {
        (Side::Source, Work::CommitMiddle) => stack.disk(2),
        (Side::Source, Work::StreamAll | Work::StreamTo) => stack.disk(0),
        (Side::Source, _) => stack.disk(top),
        (Side::Target, Work::CommitActive | Work::CommitMiddle) => stack.disk(0),
        (Side::Target, Work::StreamAll | Work::StreamTo) => stack.disk(top),
        (Side::Target, _) => {
            let disks = &stack.scene.lab.disks;
            Ok(disks.get(COPY).unwrap_or_else(|| {
                let disk = Disk::new(COPY, Content::default());
                disks.insert(disk.clone());
                disk
            }))
        }
    }
}

/// Fails data, not the creation and opening of the target.
fn choose(side: Side) -> Choose {
    match side {
        Side::Source => Choose::reads(),
        Side::Target => Choose::writes().containing(b"IOTS"),
    }
}

async fn first_error(events: &mut jobs::JobEvents) -> Result<(jobs::IoSide, ErrorAction), Failure> {
    while let Some(event) = events.next().await {
        match event {
            JobEvent::Error {
                operation, action, ..
            } => return Ok((operation, action)),
            JobEvent::Completed { .. } | JobEvent::Cancelled(_) => break,
            _ => {}
        }
    }
    Err("no error was told".into())
}

async fn with_policy(scene: Arc<Scene>, work: Work, trial: Trial) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = shape(stack.graph());
    let mut events = manager.subscribe();
    let disk = disk_of(&stack, work, trial.side)?;
    let mut which = choose(trial.side);
    if trial.action == ErrorAction::Ignore {
        which = which.times(2);
    }
    let mut rule = None;
    if trial.side == Side::Target {
        rule = Some(disk.fail(which.clone(), trial.kind, Stage::Before));
    }
    let options = JobOptions {
        speed: u64::from(trial.side == Side::Source),
        ..JobOptions::default()
    };
    // For errors of the source the job is held back until its set-up, which reads headers, is over.
    let hold = (trial.side == Side::Source).then(|| disk.hold(Choose::reads(), Stage::Before));
    if let Some(hold) = &hold {
        hold.release();
    }
    let (job, target) = work
        .start_with(&stack, &manager, options, trial.policy)
        .await?;
    if trial.side == Side::Source {
        rule = Some(disk.fail(which, trial.kind, Stage::Before));
        job.set_speed(0)?;
    }
    let (_, action) = first_error(&mut events).await?;
    if action != trial.action {
        return Err(format!("the event says {action:?}").into());
    }
    let done = match trial.action {
        ErrorAction::Report => {
            expect_error(&job, trial, &disk).await?;
            false
        }
        ErrorAction::Stop => {
            if !job.wait_status(JobStatus::Paused).await {
                return Err(format!("the job is {}, not paused", job.status()).into());
            }
            let status = job.info().io_status;
            let full = trial.kind == ErrorKind::NoSpace;
            if (status == IoStatus::Nospace) != full || status == IoStatus::Ok {
                return Err(format!("its I/O status is {status:?}").into());
            }
            if let Some(rule) = rule.take() {
                disk.remove_rule(rule);
            }
            job.resume()?;
            finish_job(&job, work).await?;
            true
        }
        // A stream goes on without what it couldn't read, and must not drop the layers then.
        ErrorAction::Ignore if work == Work::StreamAll => {
            expect_error(&job, trial, &disk).await?;
            false
        }
        ErrorAction::Ignore => {
            finish_job(&job, work).await?;
            if job.counters().retries == 0 {
                return Ok(Verdict::Inconclusive("nothing was tried again".into()));
            }
            true
        }
    };
    disk.clear_rules();
    conclude(&scene, stack, work, target, done, &before).await
}

async fn expect_error(job: &Job, trial: Trial, disk: &Disk) -> Result<(), Failure> {
    match job.wait().await {
        Err(error) if error.kind() == trial.kind => {
            let text = error.to_string();
            if !text.contains(disk.name()) {
                return Err(format!("the error doesn't name '{}': {text}", disk.name()).into());
            }
            Ok(())
        }
        other => Err(format!("it ended with {other:?}").into()),
    }
}

async fn finish_job(job: &Job, work: Work) -> Result<(), Failure> {
    if work.gets_ready() {
        job.wait_ready().await?;
        job.complete()?;
    }
    Ok(job.wait().await?)
}

/// The end of a case: `done` says whether the job took effect.
async fn conclude(
    scene: &Arc<Scene>,
    stack: Stack,
    work: Work,
    target: Option<Arc<Node>>,
    done: bool,
    before: &[String],
) -> CaseResult {
    let name = layer(stack.nodes.len() - 1);
    let (top, below) = if done {
        work.outcome(&stack)
    } else {
        let below = (0..stack.nodes.len() - 1).rev().map(layer).collect();
        (name.clone(), below)
    };
    expect_chain(&stack, &top, &below).await?;
    if !done || !work.gets_ready() {
        if !done {
            // What a failed job leaves in its target is nobody's business, but the image isn't broken.
            drop(stack.graph().drain_all().await);
        }
        close_target(scene, target).await?;
    }
    if !done {
        let after = shape(stack.graph());
        if after != before {
            return Err(format!("the graph was {before:?}, and is {after:?}").into());
        }
    }
    let backing = (stack.nodes.len() == 2 && top == layer(1)).then(|| layer(0));
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn flush_fails(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    if let Some(verdict) = work.leaves_base_changed(&stack) {
        return Ok(verdict);
    }
    let manager = JobManager::new(stack.graph());
    let disk = disk_of(&stack, work, Side::Target)?;
    let options = JobOptions {
        speed: 1,
        ..JobOptions::default()
    };
    let (job, target) = work.start(&stack, &manager, options).await?;
    disk.fail(
        Choose::any().kind(OpKind::Flush),
        ErrorKind::Io,
        Stage::Before,
    );
    job.set_speed(0)?;
    match job.wait().await {
        Err(error) if error.kind() == ErrorKind::Io => {}
        other => return Err(format!("it ended with {other:?}").into()),
    }
    if job.is_ready() {
        return Err("it got ready without a flush".into());
    }
    disk.clear_rules();
    let below: Vec<String> = (0..stack.nodes.len() - 1).rev().map(layer).collect();
    let top = layer(stack.nodes.len() - 1);
    expect_chain(&stack, &top, &below).await?;
    stack.judge("after the failed flush").await?;
    // The failed flush sticks: nobody may believe in it later. All is closed without asking whether that worked.
    if let Some(target) = target {
        let _ = scene.lab.graph.release(&target).await;
    }
    let graph = stack.graph().clone();
    let (oracle, backing) = (stack.guest.oracle().clone(), stack.nodes.len() == 2);
    drop(stack);
    let _ = graph.close_all().await;
    let backing = backing.then(|| layer(0));
    let backing = backing
        .as_deref()
        .map(|name| (name, scene.format.name.as_str()));
    let node = scene
        .lab
        .open(
            &scene.format.name,
            &top,
            backing,
            &block_core::Options::default(),
        )
        .await?;
    let guest = Guest::new(&reader(&graph, &node)?, &oracle, GUEST);
    if let Some(wrong) = guest.verify(false).await?.first() {
        return Err(format!("opened again: {wrong}").into());
    }
    crate::stack::check(&graph, &node, false).await?;
    drop(guest);
    graph.release(&node).await?;
    Ok(Verdict::Passed)
}

async fn through_fails(scene: Arc<Scene>, policy: OnError) -> CaseResult {
    let work = Work::Mirror(SyncMode::Full, CopyMode::WriteBlocking);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let before = shape(stack.graph());
    let manager = JobManager::new(stack.graph());
    let target = stack.target(COPY, &scene.format.create).await?;
    let options = MirrorOptions {
        copy_mode: CopyMode::WriteBlocking,
        on_target_error: policy,
        granularity: Some(4096),
        ..MirrorOptions::new(stack.top(), &target)
    };
    let job = manager.mirror(options).await?;
    job.wait_ready().await?;
    let disk = scene.lab.disk(COPY)?;
    let rule = disk.fail(
        Choose::writes().containing(b"IOTS"),
        ErrorKind::Io,
        Stage::Before,
    );
    stack.guest.write(3 * 4096 + 512, 8192, NONE).await?;
    if policy == OnError::Report {
        match job.wait().await {
            Err(error) if error.kind() == ErrorKind::Io => {}
            other => return Err(format!("it ended with {other:?}").into()),
        }
        disk.remove_rule(rule);
        return conclude(&scene, stack, work, Some(target), false, &before).await;
    }
    let _ = job.complete();
    scene.rest().await;
    if job.status().is_over() {
        return Err("it completed without the guest's data".into());
    }
    disk.remove_rule(rule);
    job.wait().await?;
    drop(target);
    conclude(&scene, stack, work, None, true, &before).await
}

async fn not_saved(scene: Arc<Scene>, sent: Sent, on_error: OnCbwError) -> CaseResult {
    let work = Work::Backup(SyncMode::Full);
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    if sent == Sent::Discard && !stack.discards() {
        return Ok(Verdict::NotCovered("the driver has no discard".into()));
    }
    let before = shape(stack.graph());
    let manager = JobManager::new(stack.graph());
    let target = stack.target(COPY, &scene.format.create).await?;
    let old = content(stack.graph(), stack.top()).await?;
    // Somewhere where there is data, so that there is something to save. The job itself doesn't get that far.
    let at = (stack.size / stack.unit - 2) * stack.unit;
    stack.guest.write(at, stack.unit, NONE).await?;
    let old = {
        let mut old = old;
        let now = stack.guest.handle().read(at, stack.unit as usize).await?;
        old[at as usize..(at + stack.unit) as usize].copy_from_slice(&now);
        old
    };
    let options = BackupOptions {
        on_cbw_error: on_error,
        ..BackupOptions::new(stack.top(), &target)
    };
    let job = manager.backup(options).await?;
    // Before it has copied anything.
    job.pause()?;
    job.wait_status(JobStatus::Paused).await;
    let disk = scene.lab.disk(COPY)?;
    let rule = disk.fail(
        Choose::writes().kind(OpKind::WriteZeroes),
        ErrorKind::Io,
        Stage::Before,
    );
    let guest = &stack.guest;
    let result = match sent {
        Sent::Write => guest.write(at + 512, 1024, NONE).await,
        Sent::Zero => guest.zero(at, stack.unit, NONE).await,
        Sent::Discard => guest.discard(at, stack.unit).await,
    };
    disk.remove_rule(rule);
    if on_error == OnCbwError::BreakSnapshot {
        result?;
        let _ = job.resume();
        match job.wait().await {
            Err(error) if error.kind() == ErrorKind::Io => {}
            other => return Err(format!("the backup ended with {other:?}").into()),
        }
        return conclude(&scene, stack, work, Some(target), false, &before).await;
    }
    if result.is_ok() {
        return Err("the request succeeded, and its old content is lost".into());
    }
    let now = content(stack.graph(), &guest.handle().node()).await?;
    same(&now, &old, "the disk after the failed request")?;
    job.resume()?;
    job.wait().await?;
    same(&content(stack.graph(), &target).await?, &old, "the backup")?;
    conclude(&scene, stack, work, Some(target), true, &before).await
}
