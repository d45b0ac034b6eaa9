//! The jobs of a phase: each is started when the guest has come so far, interfered with, brought to an end, and its copy is
//! judged.

use std::sync::Arc;

use block_core::{
    BlockHandle, Error, Node, PermissionSet, Permissions, Result,
    driver::Capabilities,
    error::ErrorKind,
    image::{CheckMode, Progress as CheckProgress},
};
use futures::future::{Either, select};
use jobs::{
    BackupOptions, CommitOptions, CopyMode, Job, JobOptions, MirrorOptions, OnCbwError,
    StreamOptions, SyncMode, TargetBacking,
};

use super::{
    judge::findings,
    record::{Failure, FailureKind},
    scenario::{JobEnd, JobPlan, JobWork, Layer, Sync, Verb},
    world::World,
};
use crate::oracle::{Moment, Reading};

const READER: PermissionSet = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());

fn sync_mode(sync: Sync) -> SyncMode {
    match sync {
        Sync::Full => SyncMode::Full,
        Sync::Top => SyncMode::Top,
        Sync::None => SyncMode::None,
    }
}

/// How often a check is tried that the storage's faults get in the way of.
const MOST_CHECKS: u32 = 20;

/// A job that was started, and what is needed to judge it.
struct Started {
    job: Arc<Job>,
    target: Option<(Arc<Node>, String)>,
    /// For a backup: what the disk held when it began.
    moment: Option<Moment>,
    /// For a mirror that was asked to become consistent: what it may hold.
    since: Option<Reading>,
    cancelled: bool,
}

/// Runs one job from its start to the judgement on it.
pub(super) async fn run_job(world: Arc<World>, number: usize, plan: JobPlan) {
    world.progress.reached(plan.start).await;
    let recorder = world.setup.recorder.clone();
    let name = plan.kind.name();
    recorder.note([30, number as u64, 0], || {
        format!("job {number}: {name} is started")
    });
    let mut started = match start(&world, number, &plan).await {
        Ok(Some(started)) => started,
        Ok(None) => {
            recorder.count("jobs-that-make-no-sense", 1);
            return;
        }
        Err(error) => {
            recorder.count("jobs-refused", 1);
            let excused = world.may_fail()
                || matches!(
                    error.kind(),
                    ErrorKind::InvalidInput | ErrorKind::Busy | ErrorKind::NotPermitted
                );
            if !excused || error.kind() == ErrorKind::Corrupt {
                let text = format!("job {number} ({name}) can't be started: {error}");
                recorder.fail(Failure::new(FailureKind::Job, text));
            }
            return;
        }
    };
    recorder.count(&format!("jobs-{name}"), 1);
    let result = steer(&world, &plan, &mut started).await;
    recorder.note(
        [31, number as u64, u64::from(result.is_ok())],
        || match &result {
            Ok(()) => format!("job {number}: {name} has ended"),
            Err(error) => format!("job {number}: {name} has failed: {error}"),
        },
    );
    let counters = started.job.counters();
    recorder.count(
        &format!("bytes-while-guest-wrote-{name}"),
        counters.bytes_while_guest_wrote,
    );
    recorder.count(
        "bytes-copied-before-write",
        counters.bytes_copied_before_write,
    );
    recorder.count("bytes-written-through", counters.bytes_written_through);
    if let Err(failure) = judge(&world, number, &plan, started, result).await {
        recorder.fail(failure);
    }
}

/// The node that is the `n`-th layer of the guest's disk.
fn layer(world: &World, n: usize) -> Option<Arc<Node>> {
    let mut at = world.guest().ok()?.node().skip_filters();
    for _ in 0..n {
        at = at.backing()?.skip_filters();
    }
    Some(at)
}

/// A new image for a job.
///
/// One that is going to get a backing file names it from the beginning, as `qemu-img create -b` has it: a format without
/// zero clusters has to know.
async fn new_target(
    world: &World,
    number: usize,
    length: u64,
    backing: Option<&str>,
) -> Result<(Arc<Node>, String)> {
    let name = format!("target-{}-{number}", world.number);
    let mut layer = world
        .setup
        .scenario
        .layers
        .last()
        .cloned()
        .unwrap_or(Layer {
            size: 0,
            options: Vec::new(),
            fill: Vec::new(),
        });
    layer.size = length;
    let (setup, lab) = (&world.setup, &world.lab);
    setup.create(lab, &name, &layer, backing).await?;
    super::run::apply_faults(world, super::scenario::Where::Target, &name);
    world.targets.lock().push(name.clone());
    let node = setup.open_alone(lab, &name).await?;
    lab.graph.keep(&node);
    Ok((node, name))
}

/// Whether the guest has been moved to another image while a target was made for `device`. Then `device` may be closed by
/// now, and a copy of it is a copy of nobody's disk: whoever asked for it has to look again. The target is given up.
async fn has_moved(world: &World, device: &Node, target: &Arc<Node>) -> Result<bool> {
    if world.guest()?.node().id() == device.id() {
        return Ok(false);
    }
    world
        .setup
        .recorder
        .count("jobs-whose-disk-was-replaced", 1);
    let _ = world.lab.graph.release(target).await;
    Ok(true)
}

/// `None` when the chain isn't long enough any more, or the disk isn't the guest's any more.
async fn start(world: &Arc<World>, number: usize, plan: &JobPlan) -> Result<Option<Started>> {
    let manager = &world.manager;
    let device = world.guest()?.node();
    let job = JobOptions {
        id: Some(format!("job{number}")),
        speed: plan.speed,
        ..JobOptions::default()
    };
    let started = |job| Started {
        job,
        target: None,
        moment: None,
        since: None,
        cancelled: false,
    };
    Ok(match plan.kind {
        JobWork::Stream { keep } => {
            let Some(top) = layer(world, 0).filter(|top| top.backing().is_some()) else {
                return Ok(None);
            };
            let options = StreamOptions {
                job,
                base: keep.and_then(|keep| layer(world, keep)),
                ..StreamOptions::new(&top)
            };
            Some(started(manager.stream(options).await?))
        }
        JobWork::Commit { top, base } => {
            let (Some(top_node), Some(base)) = (layer(world, top), layer(world, base)) else {
                return Ok(None);
            };
            let mut options = CommitOptions {
                job,
                ..CommitOptions::new(&device).base(&base)
            };
            if top > 0 {
                options = options.top(&top_node);
            }
            Some(started(manager.commit(options).await?))
        }
        JobWork::Mirror { sync, blocking } => {
            let top = device.skip_filters();
            let rewrites = world.setup.records_backing
                && top
                    .driver()
                    .capabilities()
                    .contains(Capabilities::CHANGE_BACKING);
            let sync = if rewrites { sync } else { Sync::Full };
            let backing = match sync {
                Sync::Full => None,
                Sync::Top => top.backing().and_then(|node| node.filename()),
                Sync::None => top.filename(),
            };
            let target = new_target(world, number, device.length(), backing.as_deref()).await?;
            if has_moved(world, &device, &target.0).await? {
                return Ok(None);
            }
            let options = MirrorOptions {
                job,
                sync: sync_mode(sync),
                copy_mode: if blocking {
                    CopyMode::WriteBlocking
                } else {
                    CopyMode::Background
                },
                target_backing: if sync == Sync::Full {
                    TargetBacking::Keep
                } else {
                    TargetBacking::FromSource
                },
                ..MirrorOptions::new(&device, &target.0)
            };
            match manager.mirror(options).await {
                Ok(job) => Some(Started {
                    target: Some(target),
                    ..started(job)
                }),
                Err(error) => {
                    let _ = world.lab.graph.release(&target.0).await;
                    return Err(error);
                }
            }
        }
        JobWork::Backup {
            sync,
            break_snapshot,
        } => {
            let length = device.length();
            let target = new_target(world, number, length, None).await?;
            if has_moved(world, &device, &target.0).await? {
                return Ok(None);
            }
            let options = BackupOptions {
                job,
                sync: sync_mode(sync),
                on_cbw_error: if break_snapshot {
                    OnCbwError::BreakSnapshot
                } else {
                    OnCbwError::BreakGuestWrite
                },
                ..BackupOptions::new(&device, &target.0)
            };
            let reading = world.oracle.read();
            match manager.backup(options).await {
                Ok(job) => Some(Started {
                    target: Some(target),
                    moment: Some(reading.moment(length)),
                    ..started(job)
                }),
                Err(error) => {
                    let _ = world.lab.graph.release(&target.0).await;
                    return Err(error);
                }
            }
        }
    })
}

/// Asks of the job what the plan says, and waits for its end.
async fn steer(world: &Arc<World>, plan: &JobPlan, started: &mut Started) -> Result<()> {
    let job = started.job.clone();
    let begun = world.progress.begun();
    let mut verbs = plan.verbs.clone();
    verbs.sort_by_key(|verb| verb.0);
    for (after, verb) in verbs {
        let reached = Box::pin(world.progress.reached(begun + after));
        if let Either::Left((result, _)) = select(Box::pin(job.wait()), reached).await {
            return result;
        }
        ask(world, started, verb);
    }
    let finished = Box::pin(world.progress.finished());
    if let Either::Left((result, _)) = select(Box::pin(job.wait()), finished).await {
        return result;
    }
    // Whatever it was told on the way, it is to come to its end now. Most of these are refused, which is fine.
    let _ = job.resume();
    let _ = job.set_speed(0);
    let endless = match plan.kind {
        JobWork::Backup { sync, .. } => sync == Sync::None,
        JobWork::Mirror { .. } => true,
        JobWork::Commit { top, .. } => top == 0,
        JobWork::Stream { .. } => false,
    };
    match plan.end {
        JobEnd::ForceCancel => ask(world, started, Verb::ForceCancel),
        _ if !endless => {}
        JobEnd::Cancel | JobEnd::Complete if matches!(plan.kind, JobWork::Backup { .. }) => {
            ask(world, started, Verb::ForceCancel);
        }
        JobEnd::Cancel => {
            if job.wait_ready().await.is_ok() {
                ask(world, started, Verb::Cancel);
            }
        }
        JobEnd::Complete => {
            if job.wait_ready().await.is_ok() {
                ask(world, started, Verb::Complete);
            }
        }
    }
    job.wait().await
}

fn ask(world: &World, started: &mut Started, verb: Verb) {
    let job = &started.job;
    let result = match verb {
        Verb::Pause => job.pause(),
        Verb::Resume => job.resume(),
        Verb::Speed(speed) => job.set_speed(speed),
        Verb::Complete => job.complete(),
        Verb::Cancel => {
            // Refused or not: from here on the copy may be brought to its point in time.
            if started.since.is_none() {
                started.since = Some(world.oracle.read());
            }
            let done = job.cancel(false);
            started.cancelled |= done.is_ok();
            done
        }
        Verb::ForceCancel => {
            let done = job.cancel(true);
            started.cancelled |= done.is_ok();
            done
        }
    };
    let recorder = &world.setup.recorder;
    recorder.count("job-verbs", u64::from(result.is_ok()));
    recorder.note([32, u64::from(result.is_ok()), 0], || {
        let answer = if result.is_ok() {
            "accepted"
        } else {
            "refused"
        };
        format!("{} is asked: {verb:?}: {answer}", job.id())
    });
}

/// Whether the guest's disk is, or is made of, that image now.
fn is_in_use(world: &World, name: &str) -> bool {
    world.names().iter().any(|used| used == name)
}

async fn judge(
    world: &Arc<World>,
    number: usize,
    plan: &JobPlan,
    started: Started,
    result: Result<()>,
) -> Result<(), Failure> {
    let what = format!("job {number} ({})", plan.kind.name());
    let fail = |kind, text: String| Failure::new(kind, format!("{what}: {text}"));
    if let Err(error) = &result {
        let excused = match error.kind() {
            ErrorKind::Cancelled => started.cancelled,
            ErrorKind::Corrupt => !world.setup.gate,
            _ => world.may_fail(),
        };
        if !excused {
            return Err(fail(FailureKind::Job, error.to_string()));
        }
    }
    let Some((target, name)) = started.target else {
        return Ok(());
    };
    if is_in_use(world, &name) {
        // The guest goes on with it, and the end of the phase judges it.
        return Ok(());
    }
    let unreadable = |error: Error| fail(FailureKind::Job, format!("the target: {error}"));
    let handle = world
        .lab
        .graph
        .attach(&target, READER, "judge")
        .map_err(unreadable)?;
    if result.is_ok() && world.setup.gate {
        compare(world, plan, &handle, started.moment, started.since, &fail).await?;
    }
    check_target(world, &handle, &fail).await?;
    drop(handle);
    if let Err(error) = world.lab.graph.release(&target).await
        && !world.may_fail()
    {
        return Err(unreadable(error));
    }
    Ok(())
}

async fn compare(
    world: &Arc<World>,
    plan: &JobPlan,
    handle: &BlockHandle,
    moment: Option<Moment>,
    since: Option<Reading>,
    fail: &impl Fn(FailureKind, String) -> Failure,
) -> Result<(), Failure> {
    let length = handle.length() as usize;
    let bytes = match handle.read(0, length).await {
        Ok(bytes) => bytes,
        Err(_) if world.may_fail() => return Ok(()),
        Err(error) => return Err(fail(FailureKind::Job, error.to_string())),
    };
    let wrong = match (plan.kind, moment, since) {
        (JobWork::Backup { sync, .. }, Some(moment), _) => moment.check(&bytes, sync != Sync::Full),
        (
            JobWork::Mirror {
                sync: Sync::Full, ..
            },
            _,
            Some(since),
        ) => {
            let wrong = since.check(0, &bytes);
            wrong.iter().map(ToString::to_string).collect()
        }
        _ => return Ok(()),
    };
    world.setup.recorder.count("copies-compared", 1);
    match wrong.first() {
        None => Ok(()),
        Some(first) => {
            let text = format!("its copy has {} wrong places: {first}", wrong.len());
            Err(fail(FailureKind::Content, text))
        }
    }
}

async fn check_target(
    world: &World,
    handle: &BlockHandle,
    fail: &impl Fn(FailureKind, String) -> Failure,
) -> Result<(), Failure> {
    let capabilities = handle.node().driver().capabilities();
    if !capabilities.contains(Capabilities::CHECK) {
        return Ok(());
    }
    let recorder = &world.setup.recorder;
    let mut tries = 0;
    let report = loop {
        let errors = recorder.disk_errors();
        let report = handle
            .check(CheckMode::ReadOnly, CheckProgress::new())
            .await;
        // What the check couldn't read says nothing about the image. Faults come to an end.
        if recorder.disk_errors() == errors {
            break report;
        }
        tries += 1;
        if tries > MOST_CHECKS {
            return Ok(());
        }
    };
    let report = match report {
        Ok(report) => report,
        Err(_) if world.may_fail() => return Ok(()),
        Err(error) => return Err(fail(FailureKind::Check, error.to_string())),
    };
    let text = || format!("its target: {}", findings(&report));
    if report.corruptions + report.check_errors > 0 {
        return Err(fail(FailureKind::Check, text()));
    }
    if report.leaks > 0 && !world.may_fail() {
        return Err(fail(FailureKind::Leak, text()));
    }
    Ok(())
}
