//! What has to be right after an execution: nothing is in flight any more, the disk holds what the oracle allows, so does a
//! job's copy, and whoever opens the image again finds it clean and reads the same. After a cut of the power that is looked
//! at for every set of unflushed changes that may have been lost, as long as there are few.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use block_core::{
    Error, Node, Options, PermissionSet, Permissions,
    driver::Capabilities,
    env::Environment,
    image::{CheckMode, Progress},
};
use futures::future::BoxFuture;

use super::{
    guest::Copy,
    world::{DISK, GUEST, World},
};
use crate::{
    lab::{Lab, LabOptions},
    oracle::Mismatch,
    sim::SimEnv,
    simulate::record::{Failure, FailureKind},
    storage::{Disk, Disks},
};

/// Up to so many unflushed changes, every subset of them is lost once; beyond, none, all, each alone, and all but each.
const ALL_SUBSETS: usize = 3;

fn error(what: &'static str) -> impl Fn(Error) -> Failure {
    move |error| Failure::new(FailureKind::Error, format!("{what}: {error}"))
}

fn content(when: &str, wrong: &[Mismatch]) -> Result<(), Failure> {
    match wrong.first() {
        None => Ok(()),
        Some(first) => {
            let text = format!("{when}: {first} ({} places)", wrong.len());
            Err(Failure::new(FailureKind::Content, text))
        }
    }
}

/// The guests and the job have ended.
pub(super) async fn at_rest(
    world: &Arc<World>,
    copy: Option<(Arc<Node>, Copy)>,
) -> Result<(), Failure> {
    let (lab, gate) = (&world.lab, world.prepared.gate);
    // What was dropped has to come to its end.
    drop(lab.graph.drain_all().await);
    for node in lab.graph.nodes() {
        let tracked = node.tracker().in_flight();
        if tracked > 0 {
            let text = format!("node '{}': {tracked} requests are left", node.name());
            return Err(Failure::new(FailureKind::Stuck, text));
        }
    }
    world.watch.check_books();
    let node = lab
        .graph
        .nodes()
        .into_iter()
        .find(|node| {
            node.driver().name() == world.prepared.format.name
                && node.filename().as_deref() == Some(DISK)
        })
        .ok_or_else(|| Failure::new(FailureKind::Error, "the image's node has gone"))?;
    let handle = lab
        .graph
        .attach(&node, GUEST, "judge")
        .map_err(error("the image can't be used at the end"))?;
    let bytes = handle
        .read(0, handle.length() as usize)
        .await
        .map_err(error("the image can't be read at the end"))?;
    content("at the end", &judged(world, &bytes))?;
    if let Some((target, copy)) = copy {
        judge_copy(world, &target, copy).await?;
    }
    drop((handle, node));
    world.watch.clear();
    lab.graph
        .close_all()
        .await
        .map_err(error("the image can't be closed"))?;
    let again = look_again(world, lab, false).await?;
    if gate && again.as_slice() != bytes.to_vec().as_slice() {
        let text = "opened again, the disk holds something else than before";
        return Err(Failure::new(FailureKind::Content, text));
    }
    content("opened again", &judged(world, &again))
}

fn judged(world: &World, bytes: &[u8]) -> Vec<Mismatch> {
    if world.prepared.gate {
        world.oracle.check(0, bytes)
    } else {
        world.oracle.check_lenient(0, bytes)
    }
}

async fn judge_copy(world: &World, target: &Arc<Node>, copy: Copy) -> Result<(), Failure> {
    let reads = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let unreadable = error("the job's target can't be read");
    let graph = &world.lab.graph;
    let handle = graph
        .attach(target, reads, "judge of the copy")
        .map_err(&unreadable)?;
    let bytes = handle
        .read(0, handle.length() as usize)
        .await
        .map_err(&unreadable)?;
    if !world.prepared.gate {
        return Ok(());
    }
    match copy {
        Copy::Disk => content("the job's copy", &world.oracle.check(0, &bytes)),
        Copy::Moment(moment) => match moment.check(&bytes, false).first() {
            None => Ok(()),
            Some(wrong) => {
                let text = format!("the job's copy, {wrong}");
                Err(Failure::new(FailureKind::Content, text))
            }
        },
    }
}

/// Opens the image as somebody who knows only what is on the disk; gives its content.
async fn look_again(world: &World, lab: &Lab, leaks: bool) -> Result<Vec<u8>, Failure> {
    let format = &world.prepared.format.name;
    let node = lab
        .open(format, DISK, None, &Options::new())
        .await
        .map_err(error("the image can't be opened again"))?;
    let handle = lab
        .graph
        .attach(&node, GUEST, "judge")
        .map_err(error("the image can't be used again"))?;
    if node.driver().capabilities().contains(Capabilities::CHECK) {
        let report = handle
            .check(CheckMode::ReadOnly, Progress::new())
            .await
            .map_err(error("the image can't be checked"))?;
        let found = || {
            let lines: Vec<&str> = report.findings.iter().map(|f| f.message.as_str()).collect();
            lines.join("; ")
        };
        if report.corruptions + report.check_errors > 0 {
            return Err(Failure::new(FailureKind::Check, found()));
        }
        // Without the gate, space may get lost.
        if report.leaks > 0 && !leaks && world.prepared.gate {
            return Err(Failure::new(FailureKind::Leak, found()));
        }
    }
    let bytes = handle
        .read(0, handle.length() as usize)
        .await
        .map_err(error("the image can't be read again"))?;
    drop(node);
    handle
        .close()
        .await
        .map_err(error("the image can't be closed again"))?;
    Ok(bytes.to_vec())
}

/// The power has gone: every image that may be left is looked at in a world of its own.
pub(super) fn after_cut(world: &Arc<World>) -> Result<(), Failure> {
    world.watch.clear();
    let disk = world
        .lab
        .disk(DISK)
        .map_err(error("the image's file has gone"))?;
    for luck in all_lucks(disk.unflushed()) {
        let disks = Disks::new();
        disks.insert(Disk::new(DISK, disk.power_cut(&luck)));
        let env = SimEnv::fifo(1);
        let options = LabOptions {
            gate: world.prepared.gate,
            ..LabOptions::default()
        };
        let lab = Lab::with_world(&world.prepared.registry, options, env, disks);
        let bytes = match lab.env.try_run(look_again(world, &lab, true)) {
            Ok(bytes) => bytes.map_err(|failure| luck.explain(failure))?,
            Err(stuck) => return Err(Failure::new(FailureKind::Stuck, stuck.to_string())),
        };
        let wrong = if world.prepared.gate {
            world.oracle.check_after_cut(0, &bytes)
        } else {
            world.oracle.check_known(0, &bytes)
        };
        content("after the power cut", &wrong).map_err(|failure| luck.explain(failure))?;
    }
    Ok(())
}

/// What becomes of unflushed changes at a power cut, decided in advance. [`Disk::power_cut`] asks for it as for
/// random numbers.
struct Luck {
    /// The n-th change arrives if the n-th bit is set; `None`: each is torn.
    arrive: Option<u64>,
    asked: AtomicU64,
}

fn all_lucks(changes: usize) -> Vec<Luck> {
    let n = changes.min(63);
    let all = (1_u64 << n) - 1;
    let mut sets: Vec<u64> = if n <= ALL_SUBSETS {
        (0..=all).collect()
    } else {
        let each = (0..n).flat_map(|bit| [1 << bit, all & !(1 << bit)]);
        [0, all].into_iter().chain(each).collect()
    };
    sets.dedup();
    let torn = (n > 0).then(|| Luck {
        arrive: None,
        asked: AtomicU64::new(0),
    });
    let whole = sets.into_iter().map(|set| Luck {
        arrive: Some(set),
        asked: AtomicU64::new(0),
    });
    whole.chain(torn).collect()
}

impl Luck {
    fn explain(&self, failure: Failure) -> Failure {
        let what = match self.arrive {
            Some(set) => format!("of the unflushed changes, those in {set:#b} arrived"),
            None => "every other sector of the unflushed changes arrived".to_owned(),
        };
        Failure::new(failure.kind, format!("{} ({what})", failure.text))
    }
}

impl Environment for Luck {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }

    fn spawn(&self, _: BoxFuture<'static, ()>) {}

    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        work();
    }

    /// The disk asks once for each change, where 0 loses it and 1 keeps it, and 2 and 3 tear it; then once for each sector of
    /// a torn one, where even numbers keep it.
    fn random(&self) -> u64 {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        match self.arrive {
            Some(set) => set >> asked.min(63) & 1,
            None => 2 + asked % 2,
        }
    }
}
