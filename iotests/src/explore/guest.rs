//! Who does what in an execution: guests that take their requests in order and tell the oracle, one whose first request can
//! be dropped, and a job. What is right afterwards is decided in `judge`.

use std::{
    sync::Arc,
    task::{Poll, Waker},
};

use block_core::{
    BlockHandle, Buffer, Error, Node, PermissionSet, Permissions, RequestFlags, Result,
    driver::Truncate, error::ErrorKind,
};
use futures::{channel::oneshot, future::BoxFuture};
use jobs::{BackupOptions, CopyMode, Job, JobManager, JobOptions, MirrorOptions};
use parking_lot::Mutex;

use super::{
    scenario::{JobKind, Request, What},
    world::World,
};
use crate::{
    oracle::{Ended, Moment},
    pattern::stamped,
    simulate::record::{Failure, FailureKind},
};

/// Counts guests down, and tells when the last has ended.
pub(super) struct Latch(Mutex<(usize, Vec<oneshot::Sender<()>>)>);

impl Latch {
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new((count, Vec::new()))))
    }

    pub(super) fn listen(&self) -> oneshot::Receiver<()> {
        let (tx, rx) = oneshot::channel();
        self.0.lock().1.push(tx);
        rx
    }

    pub(super) fn arrive(&self) {
        let listeners = {
            let mut state = self.0.lock();
            state.0 = state.0.saturating_sub(1);
            if state.0 > 0 {
                return;
            }
            std::mem::take(&mut state.1)
        };
        for listener in listeners {
            // Nobody has to wait for it.
            let _ = listener.send(());
        }
    }
}

/// A request that another task can drop between any two of its polls.
#[derive(Default)]
pub(super) struct Droppable(Mutex<Slot>);

#[derive(Default)]
struct Slot {
    request: Option<BoxFuture<'static, Result<()>>>,
    waker: Option<Waker>,
    dropped: bool,
    over: bool,
}

impl Droppable {
    /// Runs the request. `None` when it was dropped.
    async fn run(&self, request: BoxFuture<'static, Result<()>>) -> Option<Result<()>> {
        self.0.lock().request = Some(request);
        futures::future::poll_fn(|cx| {
            let mut slot = self.0.lock();
            if slot.dropped {
                drop(slot.request.take());
                return Poll::Ready(None);
            }
            slot.waker = Some(cx.waker().clone());
            let Some(mut request) = slot.request.take() else {
                return Poll::Ready(None);
            };
            drop(slot);
            let polled = request.as_mut().poll(cx);
            let mut slot = self.0.lock();
            match polled {
                Poll::Ready(result) => {
                    slot.over = true;
                    Poll::Ready(Some(result))
                }
                Poll::Pending => {
                    slot.request = Some(request);
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Drops it where it stands. False when it had ended.
    pub(super) fn drop_it(&self) -> bool {
        let mut slot = self.0.lock();
        if slot.over {
            return false;
        }
        slot.dropped = true;
        let (request, waker) = (slot.request.take(), slot.waker.take());
        drop(slot);
        drop(request);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }
}

/// Takes the requests of guest `number` in order.
pub(super) async fn run(
    world: Arc<World>,
    number: usize,
    handle: Arc<BlockHandle>,
    first: Option<Arc<Droppable>>,
) {
    let requests = world.prepared.scenario.guests[number].clone();
    for (at, request) in requests.into_iter().enumerate() {
        let recorder = &world.recorder;
        recorder.note([20, number as u64, at as u64], || {
            format!("guest {number}: {request}")
        });
        let work = carry_out(world.clone(), number, handle.clone(), request);
        let result = match first.as_ref().filter(|_| at == 0) {
            Some(slot) => slot.run(Box::pin(work)).await,
            None => Some(work.await),
        };
        let word = match &result {
            None => 2,
            Some(Ok(())) => 0,
            Some(Err(_)) => 1,
        };
        recorder.note([21, (number * 100 + at) as u64, word], || match &result {
            None => format!("guest {number}: {request}: dropped"),
            Some(Ok(())) => format!("guest {number}: {request}: done"),
            Some(Err(error)) => format!("guest {number}: {request}: failed: {error}"),
        });
        if let Some(Err(error)) = result
            && !is_excused(&world, &error)
        {
            let text = format!("guest {number}, {request}: {error}");
            recorder.fail(Failure::new(FailureKind::Error, text));
        }
    }
    drop(handle);
    world.guests.arrive();
}

/// Without the gate anything may fail; beside a resize, what lies beyond the end.
fn is_excused(world: &World, error: &Error) -> bool {
    !world.prepared.gate
        || (error.kind() == ErrorKind::Io && world.prepared.scenario.does(What::Resize))
}

async fn carry_out(
    world: Arc<World>,
    number: usize,
    handle: Arc<BlockHandle>,
    request: Request,
) -> Result<()> {
    let oracle = &world.oracle;
    let (offset, len) = request.range(world.prepared.cluster);
    let none = RequestFlags::empty();
    let how = |result: &Result<()>| match result {
        Ok(()) => Ended::Done,
        Err(_) => Ended::Undone,
    };
    match request.what {
        What::Read => {
            let reading = oracle.read();
            let (lent, buf) = Buffer::try_new(len as usize)?.lend();
            handle.readv(offset, buf, none).await?;
            let bytes = lent
                .reclaim()
                .map_err(|_| Error::io("a driver kept a part of a read buffer"))?;
            let wrong = if world.prepared.gate {
                reading.check(offset, &bytes)
            } else {
                reading.check_lenient(offset, &bytes)
            };
            let seen = xxhash_rust::xxh3::xxh3_64(&bytes);
            world
                .recorder
                .note([22, seen, 0], || format!("guest {number}: has read"));
            if let Some(first) = wrong.first() {
                let text = format!("guest {number}, {request}: {first}");
                world
                    .recorder
                    .fail(Failure::new(FailureKind::Content, text));
            }
            Ok(())
        }
        What::Write => {
            let owner = number as u32 + 1;
            let change = oracle.write(owner, offset, len);
            let data = stamped(owner, change.seq(), offset, len);
            let result = handle.write(offset, data, none).await;
            change.end(how(&result));
            result
        }
        What::Zero | What::ZeroUnmap => {
            let flags = if request.what == What::Zero {
                none
            } else {
                RequestFlags::MAY_UNMAP
            };
            let change = oracle.zero(offset, len);
            let result = handle.write_zeroes(offset, len, flags).await;
            change.end(how(&result));
            result
        }
        What::Discard => {
            let change = oracle.discard(offset, len);
            let result = handle.discard(offset, len).await;
            change.end(how(&result));
            result
        }
        What::Flush => {
            let began = oracle.flush_begins();
            handle.flush().await?;
            oracle.flushed(began);
            Ok(())
        }
        What::Resize => {
            let set =
                PermissionSet::new(Permissions::RESIZE | Permissions::WRITE, Permissions::all());
            let resizer = world.lab.graph.attach(&handle.node(), set, "resizer")?;
            let end = world.prepared.scenario.clusters * world.prepared.cluster;
            let change = oracle.zero(offset, end - offset);
            let result = resizer.truncate(offset, Truncate::default()).await;
            change.end(how(&result));
            result
        }
    }
}

/// What a job's copy has to be.
pub(super) enum Copy {
    /// What the disk holds when all has ended.
    Disk,
    /// What it held when the job began.
    Moment(Moment),
}

/// A job that has begun.
pub(super) struct Begun {
    job: Arc<Job>,
    moment: Option<Moment>,
}

/// Begins the job.
pub(super) async fn begin_job(
    world: &World,
    kind: JobKind,
    device: &Arc<Node>,
    target: &Arc<Node>,
) -> Result<Begun> {
    let manager = JobManager::new(&world.lab.graph);
    let job = JobOptions {
        id: Some("job".to_owned()),
        ..JobOptions::default()
    };
    if kind == JobKind::Backup {
        let options = BackupOptions {
            job,
            ..BackupOptions::new(device, target)
        };
        let reading = world.oracle.read();
        let length = device.length();
        let job = manager.backup(options).await?;
        let moment = Some(reading.moment(length));
        return Ok(Begun { job, moment });
    }
    let options = MirrorOptions {
        job,
        copy_mode: if kind == JobKind::MirrorBlocking {
            CopyMode::WriteBlocking
        } else {
            CopyMode::Background
        },
        ..MirrorOptions::new(device, target)
    };
    let job = manager.mirror(options).await?;
    Ok(Begun { job, moment: None })
}

/// Brings the job to its end: a mirror when it is ready and the guests have ended.
pub(super) async fn end_job(begun: Begun, guests_ended: oneshot::Receiver<()>) -> Result<Copy> {
    let Begun { job, moment } = begun;
    if let Some(moment) = moment {
        job.wait().await?;
        return Ok(Copy::Moment(moment));
    }
    job.wait_ready().await?;
    // A sender that is gone means that the execution is over.
    let _ = guests_ended.await;
    job.cancel(false)?;
    match job.wait().await {
        Err(error) if error.kind() != ErrorKind::Cancelled => Err(error),
        _ => Ok(Copy::Disk),
    }
}
