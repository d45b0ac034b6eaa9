//! The guest's queues: each takes its steps in order, several at once, tells the oracle what it does, and judges what it
//! reads.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use block_core::{
    Buffer, Error, PermissionSet, Permissions, RequestFlags, Result, driver::Truncate,
    env::Environment, error::ErrorKind,
};

use super::{
    bitmaps,
    record::{Failure, FailureKind},
    scenario::{Queue, Step, StepKind},
    snapshots,
    world::World,
};
use crate::{
    oracle::{Ended, Mismatch},
    pattern::stamped,
    sim::{CancelAt, DropWhen},
};

/// Runs one queue to its end.
pub(super) async fn run_queue(world: Arc<World>, number: usize, queue: Queue) {
    let env = world.lab.env.clone();
    let next = Arc::new(AtomicUsize::new(0));
    let steps: Arc<[Step]> = queue.steps.into();
    let workers: Vec<_> = (0..queue.depth.clamp(1, steps.len().max(1)))
        .map(|worker| {
            let (world, next, steps) = (world.clone(), next.clone(), steps.clone());
            let name = format!("queue {number}.{worker}");
            env.start_named(&name, async move {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(step) = steps.get(at) else { return };
                    take_step(&world, number, at, *step).await;
                }
            })
        })
        .collect();
    futures::future::join_all(workers).await;
}

async fn take_step(world: &Arc<World>, queue: usize, at: usize, step: Step) {
    let env = &world.lab.env;
    let recorder = &world.setup.recorder;
    if step.kind == StepKind::Pause {
        env.sleep(std::time::Duration::from_micros(step.offset))
            .await;
        return;
    }
    world.progress.begin();
    recorder.count("requests", 1);
    recorder.note([20, queue as u64, at as u64], || {
        format!("request {queue}/{at}: {step}")
    });
    let ended = match step.dropped {
        None => Some(carry_out(world, queue, at, step).await),
        Some(dropped) => {
            let when = if dropped.at_rest {
                DropWhen::AtRest
            } else {
                DropWhen::AtOnce
            };
            let reached = Arc::new(AtomicBool::new(false));
            let request = carry_out(world, queue, at, step);
            let request = CancelAt::new(env, request, dropped.polls, when, reached.clone());
            let ended = request.await.ok();
            recorder.count(
                "cancelled-await-points",
                u64::from(reached.load(Ordering::Relaxed)),
            );
            ended
        }
    };
    let result = match &ended {
        None => 2,
        Some(Ok(())) => 0,
        Some(Err(_)) => 1,
    };
    recorder.note(
        [21, (queue * 100_000 + at) as u64, result],
        || match &ended {
            None => format!("request {queue}/{at}: dropped"),
            Some(Ok(())) => format!("request {queue}/{at}: done"),
            Some(Err(error)) => format!("request {queue}/{at}: failed: {error}"),
        },
    );
    if let Some(Err(error)) = ended {
        recorder.count("failed-requests", 1);
        if !is_excused(world, step, &error) {
            let text = format!("request {queue}/{at} ({step}): {error}");
            recorder.fail(Failure::new(FailureKind::Error, text));
        }
    }
}

/// Whether a request may have failed like that.
fn is_excused(world: &World, step: Step, error: &Error) -> bool {
    if !world.setup.gate {
        return true;
    }
    match error.kind() {
        // The image was found damaged: that is never in order.
        ErrorKind::Corrupt | ErrorKind::NoMedium => false,
        _ if world.may_fail() => true,
        _ if is_refusal(error) && step.kind == StepKind::Resize => true,
        _ if !step.kind.has_range() && snapshots::is_refusal(error) => {
            !matches!(step.kind, StepKind::Flush | StepKind::Resize)
        }
        // Formats compress only what isn't there yet.
        ErrorKind::NotSupported | ErrorKind::InvalidInput => step.kind == StepKind::WriteCompressed,
        ErrorKind::Io if step.kind == StepKind::WriteCompressed => true,
        // Beyond the end of a disk that somebody else has made shorter.
        ErrorKind::Io => step.offset + step.len > world.lengths.shortest(),
        _ => false,
    }
}

fn judge_read(world: &World, what: &str, wrong: &[Mismatch]) {
    if let Some(first) = wrong.first() {
        let text = format!("{what}: {first} ({} places)", wrong.len());
        world
            .setup
            .recorder
            .fail(Failure::new(FailureKind::Content, text));
    }
}

async fn carry_out(world: &Arc<World>, queue: usize, at: usize, step: Step) -> Result<()> {
    let began = world.bitmaps.now();
    let result = ask(world, queue, at, step).await;
    let changes = matches!(
        step.kind,
        StepKind::Write
            | StepKind::WriteCompressed
            | StepKind::Zero
            | StepKind::ZeroUnmap
            | StepKind::Discard
    );
    if result.is_ok() && changes {
        world.bitmaps.wrote(began, step.offset, step.len);
    }
    result
}

async fn ask(world: &Arc<World>, queue: usize, at: usize, step: Step) -> Result<()> {
    let handle = world.guest()?;
    let oracle = &world.oracle;
    let gate = world.setup.gate;
    let (offset, len) = (step.offset, step.len);
    let mut flags = RequestFlags::empty();
    if step.fua {
        flags |= RequestFlags::FUA;
    }
    let how = |result: &Result<()>| match result {
        Ok(()) if step.fua => Ended::Durable,
        Ok(()) => Ended::Done,
        Err(_) => Ended::Undone,
    };
    match step.kind {
        StepKind::Read | StepKind::CopyOnRead => {
            if step.kind == StepKind::CopyOnRead {
                flags |= RequestFlags::COPY_ON_READ;
            }
            let reading = oracle.read();
            let (lent, buf) = Buffer::try_new(len as usize)?.lend();
            handle.readv(offset, buf, flags).await?;
            let bytes = lent
                .reclaim()
                .map_err(|_| Error::io("a driver kept a part of a read buffer"))?;
            let wrong = if gate {
                reading.check(offset, &bytes)
            } else {
                reading.check_lenient(offset, &bytes)
            };
            judge_read(world, "a read", &wrong);
            Ok(())
        }
        StepKind::Write | StepKind::WriteCompressed => {
            if step.kind == StepKind::WriteCompressed {
                flags |= RequestFlags::WRITE_COMPRESSED;
            }
            let owner = world.number * 16 + queue as u32 + 1;
            let change = oracle.write(owner, offset, len);
            let data = stamped(owner, change.seq(), offset, len);
            let result = handle.write(offset, data, flags).await;
            change.end(how(&result));
            result
        }
        StepKind::Zero | StepKind::ZeroUnmap => {
            if step.kind == StepKind::ZeroUnmap {
                flags |= RequestFlags::MAY_UNMAP;
            }
            let change = oracle.zero(offset, len);
            let result = handle.write_zeroes(offset, len, flags).await;
            change.end(how(&result));
            result
        }
        StepKind::Discard => {
            // Whole clusters are discarded, the rest may be.
            let node = handle.node().skip_filters();
            let unit = node.limits().discard_alignment.max(512);
            let end = offset + len;
            let (first, last) = (offset.next_multiple_of(unit).min(end), end - end % unit);
            let last = last.max(first);
            let whole = oracle.discard(first, last - first);
            let head = oracle.discard_perhaps(offset, first - offset);
            let tail = oracle.discard_perhaps(last, end - last);
            let result = handle.discard(offset, len).await;
            for change in [whole, head, tail] {
                change.end(how(&result));
            }
            result
        }
        StepKind::Flush => {
            let (began, length_then) = (oracle.flush_begins(), world.lengths.flush_begins());
            handle.flush().await?;
            oracle.flushed(began);
            world.lengths.flushed(length_then);
            Ok(())
        }
        StepKind::Status => {
            // Far beyond the step: over many tables, and what other requests are at.
            let reading = oracle.read();
            let status = handle.block_status(offset, MAX_LENGTH - offset).await?;
            if gate && status.is_zero() {
                world
                    .setup
                    .recorder
                    .count("zeroes-told-by-status", status.len);
                let zeroes = vec![0; status.len as usize];
                judge_read(world, "block status", &reading.check(offset, &zeroes));
            }
            Ok(())
        }
        StepKind::Resize => resize(world, offset).await,
        // Nothing but the gate keeps writes that are in flight out of what a snapshot shares.
        StepKind::SnapshotCreate | StepKind::SnapshotApply | StepKind::SnapshotDelete if !gate => {
            Ok(())
        }
        StepKind::SnapshotCreate => snapshots::create(world, unique(world, queue, at)).await,
        StepKind::SnapshotApply => snapshots::apply(world, offset).await,
        StepKind::SnapshotDelete => snapshots::delete(world, offset).await,
        StepKind::BitmapAdd => bitmaps::add(world, unique(world, queue, at), len).await,
        StepKind::BitmapRemove => bitmaps::remove(world, offset).await,
        StepKind::BitmapStore => bitmaps::store(world).await,
        StepKind::Pause => Ok(()),
    }
}

/// A name that nothing else in the scenario has.
fn unique(world: &World, queue: usize, at: usize) -> String {
    format!("{}-{queue}-{at}", world.number)
}

/// Whether a resize that failed like that has touched nothing.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotPermitted
            | ErrorKind::TooBig
            | ErrorKind::NotSupported
            | ErrorKind::InvalidInput
    )
}

/// Through a handle of its own, so that jobs, which share no resizing, can begin in between.
async fn resize(world: &Arc<World>, length: u64) -> Result<()> {
    let node = world.guest()?.node();
    let set = PermissionSet::new(Permissions::RESIZE | Permissions::WRITE, Permissions::all());
    let handle = world.lab.graph.attach(&node, set, "resizer")?;
    let resizing = world.lengths.begin(length);
    // What is cut off reads as zeroes if it comes back; what is added, as well.
    let change = world.oracle.zero(length, MAX_LENGTH.saturating_sub(length));
    let result = handle.truncate(length, Truncate::default()).await;
    match &result {
        Err(error) if is_refusal(error) => world.lengths.refused(resizing),
        _ => world.lengths.end(resizing, result.is_ok()),
    }
    change.end(if result.is_ok() {
        Ended::Done
    } else {
        Ended::Undone
    });
    result
}

/// No disk of a scenario is longer.
pub(super) const MAX_LENGTH: u64 = 4 << 20;
