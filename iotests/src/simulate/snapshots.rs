//! Internal snapshots amid the workload: what the guest's queues ask for, which snapshots the image must have or may have, and what
//! each of them must hold. A snapshot that was taken holds what the disk held at some moment between the beginning and the
//! end of its taking, and goes on to, through cuts of the power as well.
//!
//! Only snapshots of the topmost image are kept track of; scenarios with snapshots have no job that changes which image that is.

use std::sync::Arc;

use block_core::{
    Error, NewSnapshot, PermissionSet, Permissions, Result, SnapshotKey, error::ErrorKind,
    image::Progress,
};
use parking_lot::Mutex;

use super::{
    record::{Failure, FailureKind},
    world::{Setup, World},
};
use crate::{
    lab::Lab,
    oracle::{Ended, Moment, Reading},
};

const READER: PermissionSet = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());

/// What a snapshot holds.
enum Held {
    /// It was being taken when somebody last looked: what the disk held since then.
    Since(Reading),
    /// One of these for each sector.
    Known(Arc<Moment>),
}

/// Whether the image has it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum There {
    Yes,
    /// Taking or deleting it goes on, or didn't come to its end, or failed.
    Perhaps,
}

/// A snapshot.
pub(super) struct Kept {
    name: String,
    there: There,
    held: Held,
    /// Lengths that the disk may have had; one when it is known.
    lengths: Vec<u64>,
}

/// The snapshots of the guest's disk.
#[derive(Default)]
pub(super) struct Snapshots(Mutex<State>);

#[derive(Default)]
struct State {
    kept: Vec<Kept>,
    /// Operations that have begun and have not ended.
    under_way: u64,
}

/// An operation that is under way, until its future has ended or was dropped.
struct UnderWay<'a>(&'a Snapshots);

impl<'a> UnderWay<'a> {
    fn new(snapshots: &'a Snapshots) -> Self {
        snapshots.0.lock().under_way += 1;
        Self(snapshots)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.0.lock().under_way -= 1;
    }
}

/// Whether an operation that failed like that has changed nothing.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotPermitted
            | ErrorKind::NotSupported
            | ErrorKind::InvalidInput
            | ErrorKind::NotFound
            | ErrorKind::Busy
    )
}

impl Snapshots {
    /// Those that a phase begins with.
    pub fn new(kept: Vec<Kept>) -> Self {
        Self(Mutex::new(State { kept, under_way: 0 }))
    }

    /// What is left of them at the end of a phase.
    pub fn take(&self) -> Vec<Kept> {
        std::mem::take(&mut self.0.lock().kept)
    }

    /// Whether anything is being done to them.
    pub fn are_changing(&self) -> bool {
        self.0.lock().under_way > 0
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Kept)) {
        let mut state = self.0.lock();
        if let Some(kept) = state.kept.iter_mut().find(|kept| kept.name == name) {
            change(kept);
        }
    }

    fn forget(&self, name: &str) {
        self.0.lock().kept.retain(|kept| kept.name != name);
    }

    /// One of those that are there: its name, what it holds, and its length.
    fn choose(&self, which: u64) -> Option<(String, Arc<Moment>, u64)> {
        let state = self.0.lock();
        let there: Vec<&Kept> = state
            .kept
            .iter()
            .filter(|kept| kept.there == There::Yes)
            .collect();
        let kept = there.get(which as usize % there.len().max(1))?;
        match &kept.held {
            Held::Known(moment) => {
                let length = kept.lengths.first().copied().unwrap_or(0);
                Some((kept.name.clone(), moment.clone(), length))
            }
            Held::Since(_) => None,
        }
    }
}

/// Takes a snapshot with a name that no other has.
pub(super) async fn create(world: &World, name: String) -> Result<()> {
    let handle = world.guest()?;
    let snapshots = &world.snapshots;
    let _under_way = UnderWay::new(snapshots);
    let resizing = world.lengths.read();
    snapshots.0.lock().kept.push(Kept {
        name: name.clone(),
        there: There::Perhaps,
        held: Held::Since(world.oracle.read()),
        lengths: Vec::new(),
    });
    let new = NewSnapshot {
        name: name.clone(),
        ..NewSnapshot::default()
    };
    let result = handle.snapshot_create(new, Progress::new()).await;
    let lengths = world.lengths.since(resizing);
    let longest = lengths.iter().copied().max().unwrap_or(0);
    match &result {
        Err(error) if is_refusal(error) => snapshots.forget(&name),
        other => {
            let info = other.as_ref().ok();
            if let Some(info) = info
                && !lengths.contains(&info.disk_size)
            {
                let text = format!(
                    "snapshot {name} has {} bytes, may have {lengths:?}",
                    info.disk_size
                );
                let failure = Failure::new(FailureKind::Content, text);
                world.setup.recorder.fail(failure);
            }
            snapshots.change(&name, |kept| {
                if info.is_some() {
                    kept.there = There::Yes;
                }
                kept.lengths = info.map_or(lengths, |info| vec![info.disk_size]);
                kept.settle(longest);
            });
            let made = u64::from(info.is_some());
            world.setup.recorder.count("snapshots-created", made);
        }
    }
    result.map(|_| ())
}

impl Kept {
    /// What the disk held since the taking began is what the snapshot may hold.
    fn settle(&mut self, longest: u64) {
        let none = Held::Known(Arc::new(Moment::default()));
        self.held = match std::mem::replace(&mut self.held, none) {
            Held::Since(reading) => Held::Known(Arc::new(reading.moment(longest))),
            known @ Held::Known(_) => known,
        };
    }
}

/// Makes the disk what it was when one of the snapshots was taken. Nothing, when there is none.
pub(super) async fn apply(world: &World, which: u64) -> Result<()> {
    let snapshots = &world.snapshots;
    let Some((name, moment, length)) = snapshots.choose(which) else {
        return Ok(());
    };
    let _under_way = UnderWay::new(snapshots);
    // Through a handle of its own: jobs, which share no resizing, can begin in between.
    let node = world.guest()?.node();
    let set = PermissionSet::new(Permissions::RESIZE | Permissions::WRITE, Permissions::all());
    let handle = world.lab.graph.attach(&node, set, "applier")?;
    let resizing = world.lengths.begin(length);
    let change = world.oracle.restore(&moment, super::guest::MAX_LENGTH);
    let result = handle
        .snapshot_apply(SnapshotKey::Name(name), Progress::new())
        .await;
    match &result {
        Ok(()) => {
            world.lengths.end(resizing, true);
            change.end(Ended::Done);
            world.setup.recorder.count("snapshots-applied", 1);
        }
        Err(error) if is_refusal(error) => {
            world.lengths.refused(resizing);
            change.end(Ended::Refused);
        }
        Err(_) => {
            world.lengths.end(resizing, false);
            change.end(Ended::Undone);
        }
    }
    result
}

/// Deletes one of the snapshots. Nothing, when there is none.
pub(super) async fn delete(world: &World, which: u64) -> Result<()> {
    let handle = world.guest()?;
    let snapshots = &world.snapshots;
    let Some((name, ..)) = snapshots.choose(which) else {
        return Ok(());
    };
    let _under_way = UnderWay::new(snapshots);
    snapshots.change(&name, |kept| kept.there = There::Perhaps);
    let key = SnapshotKey::Name(name.clone());
    let result = handle.snapshot_delete(key, Progress::new()).await;
    match &result {
        Ok(()) => {
            snapshots.forget(&name);
            world.setup.recorder.count("snapshots-deleted", 1);
        }
        Err(error) if is_refusal(error) => {
            snapshots.change(&name, |kept| kept.there = There::Yes);
        }
        Err(_) => {}
    }
    result
}

/// What the disk was when a snapshot was taken.
async fn read(
    setup: &Setup,
    lab: &Lab,
    names: &[String],
    name: &str,
    length: u64,
) -> Result<Vec<u8>> {
    setup.watch.clear();
    let node = setup.open_snapshot(lab, names, name).await?;
    let handle = lab.graph.attach(&node, READER, "judge")?;
    let bytes = handle.read(0, length as usize).await?.to_vec();
    drop(node);
    handle.close().await?;
    Ok(bytes)
}

/// The image is opened again: it has the snapshots that it must have, no others, and they hold what they must. Gives those that
/// the next phase begins with.
pub(super) async fn look_again(
    setup: &Setup,
    lab: &Lab,
    names: &[String],
    listed: &[(String, u64)],
    kept: Vec<Kept>,
    when: &str,
) -> Result<Vec<Kept>, Failure> {
    let wrong = |text: String| Failure::new(FailureKind::Content, format!("{when}: {text}"));
    let mut next = Vec::new();
    for (name, _) in listed {
        if !kept.iter().any(|kept| kept.name == *name) {
            return Err(wrong(format!(
                "snapshot {name} was deleted, or never taken"
            )));
        }
    }
    for mut kept in kept {
        let Some((_, length)) = listed.iter().find(|(name, _)| *name == kept.name) else {
            if kept.there == There::Yes {
                return Err(wrong(format!("snapshot {} is gone", kept.name)));
            }
            continue;
        };
        // (One whose taking was cut off may have any length that the disk had.)
        if !kept.lengths.is_empty() && !kept.lengths.contains(length) {
            return Err(wrong(format!(
                "snapshot {} has {length} bytes, may have {:?}",
                kept.name, kept.lengths
            )));
        }
        kept.settle(*length);
        let Held::Known(moment) = &kept.held else {
            continue;
        };
        let bytes = read(setup, lab, names, &kept.name, *length)
            .await
            .map_err(|error| {
                let text = format!("{when}: snapshot {}: {error}", kept.name);
                Failure::new(FailureKind::Error, text)
            })?;
        let mismatches = moment.check(&bytes, false);
        if let Some(first) = mismatches.first() {
            let places = mismatches.len();
            return Err(wrong(format!(
                "snapshot {}: {first} ({places} places)",
                kept.name
            )));
        }
        setup.recorder.count("snapshots-compared", 1);
        next.push(Kept {
            name: kept.name,
            there: There::Yes,
            held: Held::Known(Arc::new(Moment::exactly(&bytes))),
            lengths: vec![*length],
        });
    }
    Ok(next)
}
