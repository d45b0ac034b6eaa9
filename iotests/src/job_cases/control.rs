//! Verbs: pause, resume, speed, cancel in each state, finalize and dismiss, each seen in what happens to the storage, the
//! graph and the other users of the disk, not in what the job says of itself.

use std::{sync::Arc, time::Duration};

use block_core::{ErrorKind, env::Environment};
use jobs::{CommitOptions, Job, JobManager, JobOptions, JobStatus, OnError, StreamOptions};

use super::work::{Work, close_target, expect_chain, named};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::{Load, Stack, layer, shape},
    storage::{Choose, Disk, OpKind, Stage},
};

/// Where a job is when it is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its first write hangs in the storage.
    Parked,
    /// Paused by the user.
    Paused,
    /// Stopped by an error of its target or base.
    Stopped,
    /// Ready (by force).
    Ready,
    /// Paused when it was ready (by force).
    Standby,
    /// Done, and not finalized.
    Pending,
}

impl State {
    const ALL: [Self; 6] = [
        Self::Parked,
        Self::Paused,
        Self::Stopped,
        Self::Ready,
        Self::Standby,
        Self::Pending,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Parked => "with-io-in-flight",
            Self::Paused => "paused",
            Self::Stopped => "stopped-by-error",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Pending => "pending",
        }
    }

    const fn applies(self, work: Work) -> bool {
        match self {
            Self::Ready | Self::Standby => work.gets_ready(),
            // One that gets ready is pending only after a soft cancel or complete: the other states cover it.
            Self::Pending => !work.gets_ready(),
            _ => true,
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for work in Work::KINDS {
        let name = work.name();
        cases.push(Case::new(
            Group::Jobs,
            format!("jobs-{name}-paused-does-no-io"),
            format!(
                "while a {name} is paused nothing of it reaches the storage whatever the guest does, and when it \
                 is resumed it succeeds with what the guest wrote meanwhile"
            ),
            move |scene| paused(scene, work),
        ));
        for state in State::ALL.into_iter().filter(|state| state.applies(work)) {
            cases.push(Case::new(
                Group::Jobs,
                format!("jobs-{name}-cancelled-{}", state.name()),
                format!(
                    "a {name} that is cancelled by force {} leaves the graph, the disk and its claims as they were",
                    state.name().replace('-', " ")
                ),
                move |scene| cancelled(scene, work, state),
            ));
        }
        cases.push(Case::new(
            Group::Jobs,
            format!("jobs-{name}-waits-for-finalize-and-dismiss"),
            format!(
                "a {name} without automatic finalize changes the graph only when it is told to, and is listed until it \
                 is dismissed"
            ),
            move |scene| finalize(scene, work),
        ));
    }
    for work in [
        Work::KINDS[1],
        Work::KINDS[2],
        Work::KINDS[3],
        Work::KINDS[5],
    ] {
        let name = work.name();
        cases.push(Case::new(
            Group::Jobs,
            format!("jobs-{name}-keeps-its-speed-limit"),
            format!("a {name} takes as long as its speed limit says, and no longer when the limit is lifted"),
            move |scene| speed(scene, work),
        ));
        cases.push(Case::new(
            Group::Jobs,
            format!("jobs-{name}-waits-in-drained-section"),
            format!("a {name} does no I/O while the graph is drained, and goes on afterwards"),
            move |scene| drained(scene, work),
        ));
    }
    cases.push(Case::new(
        Group::Jobs,
        "jobs-base-of-stream-is-not-merged-away",
        "a commit of a stream's base into the layer below is refused until the stream has ended, also while its last \
         change of header and graph is under way, and succeeds afterwards",
        stream_onto_commit,
    ));
    cases
}

/// The storage that the job writes to.
fn written_disk(stack: &Stack, work: Work) -> Result<Arc<Disk>, Failure> {
    match work {
        Work::CommitActive | Work::CommitMiddle => stack.disk(0),
        Work::StreamAll | Work::StreamTo => stack.disk(stack.nodes.len() - 1),
        _ => Ok(stack.scene.lab.disk(super::work::COPY)?),
    }
}

/// How many requests that change it the storage has seen.
fn changes(disk: &Disk) -> u64 {
    [OpKind::Write, OpKind::WriteZeroes, OpKind::Discard]
        .into_iter()
        .map(|kind| disk.count(kind))
        .sum()
}

async fn end_well(job: &Job, work: Work) -> Result<(), Failure> {
    if work.gets_ready() {
        job.wait_ready().await?;
        job.complete()?;
    }
    job.wait().await?;
    Ok(())
}

async fn finish(
    scene: &Arc<Scene>,
    stack: Stack,
    work: Work,
    target: Option<Arc<block_core::Node>>,
) -> CaseResult {
    let (top, below) = work.outcome(&stack);
    expect_chain(&stack, &top, &below).await?;
    if !work.gets_ready() {
        close_target(scene, target).await?;
    }
    let backing = (stack.nodes.len() == 2 && top == layer(1)).then(|| layer(0));
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn paused(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let mut options = named("j");
    options.speed = 1 << 20;
    let load = Load::start(&stack, 2);
    let (job, target) = work.start(&stack, &manager, options).await?;
    load.more(30).await?;
    job.pause()?;
    if !job.wait_status(JobStatus::Paused).await {
        return Err(format!("the job is {}, not paused", job.status()).into());
    }
    let disk = written_disk(&stack, work)?;
    let streams = matches!(work, Work::StreamAll);
    let (seen, counters) = (changes(&disk), job.counters());
    load.more(40).await?;
    // What the guest writes through, or what is copied before its writes, isn't the job's.
    let beside = matches!(work, Work::Backup(_)) || work.name().starts_with("write-blocking");
    if !streams && !beside && changes(&disk) != seen {
        return Err("a paused job wrote".into());
    }
    if job.counters().bytes_copied != counters.bytes_copied {
        return Err("a paused job copied".into());
    }
    job.resume()?;
    job.set_speed(0)?;
    end_well(&job, work).await?;
    load.stop().await?;
    finish(&scene, stack, work, target).await
}

/// Brings a job into the state.
async fn bring(
    stack: &Stack,
    work: Work,
    state: State,
    manager: &Arc<JobManager>,
) -> Result<Result<(Arc<Job>, Option<Arc<block_core::Node>>), Verdict>, Failure> {
    let mut options = JobOptions {
        auto_finalize: state != State::Pending,
        ..JobOptions::default()
    };
    if matches!(state, State::Paused) {
        options.speed = 64 << 10;
    }
    let policy = if state == State::Stopped {
        OnError::Stop
    } else {
        OnError::Report
    };
    let own = written_disk(stack, work);
    let storage = match own {
        Ok(disk) => disk,
        Err(_) => {
            // The job's own target: the rules have to be there before the job begins.
            let lab = &stack.scene.lab;
            let disk = Disk::new(super::work::COPY, crate::storage::Content::default());
            lab.disks.insert(disk.clone());
            disk
        }
    };
    let (job, target) = match state {
        State::Parked => {
            let needle = b"IOTS";
            let hold = storage.hold(Choose::writes().containing(needle), Stage::Before);
            let started = work.start_with(stack, manager, options, policy).await?;
            stack.scene.rest().await;
            if hold.waiting().is_empty() {
                return Ok(Err(Verdict::Inconclusive("nothing was parked".into())));
            }
            started.0.cancel(true)?;
            stack.scene.rest().await;
            if started.0.status().is_over() {
                return Err("the job ended with I/O in flight".into());
            }
            hold.release();
            started
        }
        State::Stopped => {
            let rule = storage.fail(
                Choose::writes().containing(b"IOTS"),
                ErrorKind::Io,
                Stage::Before,
            );
            let started = work.start_with(stack, manager, options, policy).await?;
            started.0.wait_status(JobStatus::Paused).await;
            storage.remove_rule(rule);
            started
        }
        _ => work.start_with(stack, manager, options, policy).await?,
    };
    let wanted = match state {
        State::Parked => return Ok(Ok((job, target))),
        State::Paused => {
            job.pause()?;
            JobStatus::Paused
        }
        State::Stopped => JobStatus::Paused,
        State::Ready => JobStatus::Ready,
        State::Standby => {
            job.wait_ready().await?;
            job.pause()?;
            JobStatus::Standby
        }
        State::Pending => JobStatus::Pending,
    };
    if !job.wait_status(wanted).await {
        return Err(format!("the job is {}, not {wanted}", job.status()).into());
    }
    Ok(Ok((job, target)))
}

async fn cancelled(scene: Arc<Scene>, work: Work, state: State) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let before = shape(stack.graph());
    let (job, target) = match bring(&stack, work, state, &manager).await? {
        Ok(brought) => brought,
        Err(verdict) => return Ok(verdict),
    };
    stack.guest.write(0, 4096, crate::stack::NONE).await?;
    if state != State::Parked {
        job.cancel(true)?;
    }
    match job.wait().await {
        Err(error) if error.kind() == ErrorKind::Cancelled => {}
        other => return Err(format!("the cancelled job ended with {other:?}").into()),
    }
    close_target(&scene, target).await?;
    let after = shape(stack.graph());
    if after != before {
        return Err(format!("the graph was {before:?}, and is {after:?}").into());
    }
    for node in &stack.nodes {
        if !node.bitmaps().is_empty() {
            return Err(format!("a dirty bitmap is left at '{}'", node.name()).into());
        }
    }
    if !manager.jobs().is_empty() {
        return Err("a cancelled job is still listed".into());
    }
    // Nothing is claimed or frozen any more: the same job succeeds now.
    let (job, target) = work.start(&stack, &manager, JobOptions::default()).await?;
    end_well(&job, work).await?;
    finish(&scene, stack, work, target).await
}

async fn finalize(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let mut options = named("manual");
    (options.auto_finalize, options.auto_dismiss) = (false, false);
    let load = Load::start(&stack, 2);
    let (job, target) = work.start(&stack, &manager, options).await?;
    if work.gets_ready() {
        job.wait_ready().await?;
        job.complete()?;
    }
    if !job.wait_status(JobStatus::Pending).await {
        job.wait().await?;
        return Err("it ended without being finalized".into());
    }
    let chain = stack.guest.handle().node().chain().len();
    load.more(30).await?;
    if job.status() != JobStatus::Pending || stack.guest.handle().node().chain().len() != chain {
        return Err("a pending job changed the graph".into());
    }
    if job.dismiss().is_ok() || job.pause().is_ok() {
        return Err("a pending job was dismissed or paused".into());
    }
    job.finalize()?;
    job.wait().await?;
    if job.status() != JobStatus::Concluded || manager.job("manual").is_err() {
        return Err("a job that concluded isn't listed".into());
    }
    if job.cancel(true).is_ok() || job.finalize().is_ok() {
        return Err("a concluded job was cancelled or finalized".into());
    }
    job.dismiss()?;
    if manager.job("manual").is_ok() {
        return Err("a dismissed job is listed".into());
    }
    load.stop().await?;
    finish(&scene, stack, work, target).await
}

/// What the image will be put on has to be there when the stream ends.
async fn stream_onto_commit(scene: Arc<Scene>) -> CaseResult {
    let stack = match Work::StreamTo.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let env = scene.lab.env.clone();
    let (base, merged) = (&stack.nodes[0], &stack.nodes[1]);
    let load = Load::start(&stack, 2);
    let mut options = StreamOptions::new(stack.top()).base(merged);
    options.job = JobOptions {
        auto_finalize: false,
        ..named("stream")
    };
    let stream = manager.stream(options).await?;
    let commit = async || {
        let options = CommitOptions::new(stack.top()).top(merged).base(base);
        manager.commit(options).await
    };
    if !stream.wait_status(JobStatus::Pending).await {
        stream.wait().await?;
        return Err("the stream ended without being finalized".into());
    }
    load.stop().await?;
    if commit().await.is_ok() {
        return Err("the base of a pending stream was merged away".into());
    }
    let disk = stack.disk(3)?;
    let slow = disk.delay(Choose::any(), Duration::from_millis(10));
    stream.finalize()?;
    let mut tried = 0;
    while !matches!(stream.status(), JobStatus::Concluded | JobStatus::Null) {
        env.sleep(Duration::from_millis(3)).await;
        match commit().await {
            Ok(job) => {
                stream.wait().await?;
                job.wait().await?;
                break;
            }
            Err(_) => tried += 1,
        }
        if tried > 10_000 {
            return Err("the stream doesn't end".into());
        }
    }
    stream.wait().await?;
    disk.remove_rule(slow);
    if stack.guest.handle().node().chain().len() > 1 {
        commit().await?.wait().await?;
    }
    finish(&scene, stack, Work::StreamTo, None).await
}

async fn speed(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let env = scene.lab.env.clone();
    let mut options = named("slow");
    options.speed = 64 << 10;
    let began = env.now();
    let (job, target) = work.start(&stack, &manager, options).await?;
    env.sleep(Duration::from_secs(1)).await;
    let first = job.counters();
    if job.status() != JobStatus::Running {
        return Err(format!("with 64 KiB/s the job is {} after a second", job.status()).into());
    }
    // One chunk may be ahead of the limit.
    let most = (1 << 20) + 2 * (64 << 10);
    if first.bytes_copied > most {
        return Err(format!("{} bytes in a second", first.bytes_copied).into());
    }
    job.set_speed(0)?;
    let lifted = env.now();
    end_well(&job, work).await?;
    let rest = env.now().saturating_sub(lifted);
    if rest > Duration::from_secs(1) || env.now().saturating_sub(began) < Duration::from_secs(1) {
        return Err(format!("without a limit it took {rest:?}").into());
    }
    finish(&scene, stack, work, target).await
}

async fn drained(scene: Arc<Scene>, work: Work) -> CaseResult {
    let stack = match work.stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let env = scene.lab.env.clone();
    let mut options = named("drained");
    options.speed = 256 << 10;
    let (job, target) = work.start(&stack, &manager, options).await?;
    env.sleep(Duration::from_millis(200)).await;
    let guard = stack.graph().drain_all().await;
    let all = |scene: &Scene| -> Vec<u64> {
        let disks = scene.lab.disks.all();
        disks
            .iter()
            .flat_map(|disk| OpKind::ALL.map(|kind| disk.count(kind)))
            .collect()
    };
    let seen = all(&scene);
    job.set_speed(0)?;
    env.sleep(Duration::from_secs(2)).await;
    if all(&scene) != seen {
        return Err("the job did I/O inside of a drained section".into());
    }
    drop(guard);
    end_well(&job, work).await?;
    finish(&scene, stack, work, target).await
}
