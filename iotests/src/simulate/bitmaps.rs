//! Persistent bitmaps amid the workload: what the guest's queues ask for, and what must be in each of them when the image is opened
//! again. A bitmap that was closed properly covers every range that was written while it was there; one that wasn't says
//! itself that it can't be trusted. (It may cover more.)

use std::sync::Arc;

use block_core::{Error, Node, Result, bitmap::NewBitmap};
use parking_lot::Mutex;

use super::{
    record::{Failure, FailureKind},
    snapshots::is_refusal,
    world::World,
};

/// A bitmap and what it has to cover.
pub(super) struct Bitmap {
    name: String,
    /// When it was there, on the books' clock. A request that began later is recorded.
    since: u64,
    written: Vec<(u64, u64)>,
    /// It may be there or not.
    uncertain: bool,
}

#[derive(Default)]
struct State {
    clock: u64,
    bitmaps: Vec<Bitmap>,
}

/// The persistent bitmaps of the guest's disk.
#[derive(Default)]
pub(super) struct Bitmaps(Mutex<State>);

impl Bitmaps {
    /// Those that a phase begins with.
    pub fn new(bitmaps: Vec<Bitmap>) -> Self {
        Self(Mutex::new(State { clock: 1, bitmaps }))
    }

    /// What is left of them at the end of a phase.
    pub fn take(&self) -> Vec<Bitmap> {
        std::mem::take(&mut self.0.lock().bitmaps)
    }

    /// A request that changes something begins.
    pub fn now(&self) -> u64 {
        self.0.lock().clock
    }

    /// The request that began then has changed a range.
    pub fn wrote(&self, began: u64, offset: u64, len: u64) {
        let mut state = self.0.lock();
        for bitmap in &mut state.bitmaps {
            if bitmap.since <= began {
                bitmap.written.push((offset, len));
            }
        }
    }

    fn choose(&self, which: u64) -> Option<String> {
        let state = self.0.lock();
        let there: Vec<&Bitmap> = state.bitmaps.iter().filter(|b| !b.uncertain).collect();
        let bitmap = there.get(which as usize % there.len().max(1))?;
        Some(bitmap.name.clone())
    }
}

/// Adds a bitmap with a name that no other has.
pub(super) async fn add(world: &World, name: String, granularity: u64) -> Result<()> {
    let handle = world.guest()?;
    let books = &world.bitmaps;
    books.0.lock().bitmaps.push(Bitmap {
        name: name.clone(),
        since: u64::MAX,
        written: Vec::new(),
        uncertain: true,
    });
    let new = NewBitmap::named(name.clone())
        .persistent()
        .with_granularity(granularity);
    let result = handle.named_bitmaps().add(new).await;
    let mut state = books.0.lock();
    match &result {
        Ok(_) => {
            state.clock += 1;
            let clock = state.clock;
            if let Some(bitmap) = state.bitmaps.iter_mut().find(|b| b.name == name) {
                (bitmap.since, bitmap.uncertain) = (clock, false);
            }
            world.setup.recorder.count("bitmaps-added", 1);
        }
        Err(error) if is_refusal(error) => state.bitmaps.retain(|b| b.name != name),
        Err(_) => {}
    }
    drop(state);
    result.map(|_| ())
}

/// Removes one of the bitmaps. Nothing, when there is none.
pub(super) async fn remove(world: &World, which: u64) -> Result<()> {
    let handle = world.guest()?;
    let books = &world.bitmaps;
    let Some(name) = books.choose(which) else {
        return Ok(());
    };
    let mark = |uncertain| {
        let mut state = books.0.lock();
        if let Some(bitmap) = state.bitmaps.iter_mut().find(|b| b.name == name) {
            bitmap.uncertain = uncertain;
        }
    };
    mark(true);
    let result = handle.named_bitmaps().remove(&name).await;
    match &result {
        Ok(()) => books.0.lock().bitmaps.retain(|b| b.name != name),
        Err(error) if is_refusal(error) => mark(false),
        Err(_) => {}
    }
    result
}

/// Stores all of them in the image, as a close does.
pub(super) async fn store(world: &World) -> Result<()> {
    world.guest()?.named_bitmaps().store().await
}

/// The image is open again: its bitmaps cover what they must. `closed` says that it was closed properly. Gives those that the next
/// phase begins with.
pub(super) fn look_again(
    node: &Arc<Node>,
    bitmaps: Vec<Bitmap>,
    closed: bool,
    when: &str,
    compared: impl Fn(),
) -> std::result::Result<Vec<Bitmap>, Failure> {
    let wrong = |text: String| Failure::new(FailureKind::Content, format!("{when}: {text}"));
    let length = node.length();
    let mut next = Vec::new();
    for bitmap in bitmaps {
        let found: std::result::Result<_, Error> = node.named_bitmaps().find(&bitmap.name);
        let found = match found {
            Ok(found) => found,
            Err(_) if bitmap.uncertain || !closed => continue,
            Err(_) => return Err(wrong(format!("bitmap {} is gone", bitmap.name))),
        };
        if found.is_inconsistent() {
            if closed && !bitmap.uncertain {
                let text = format!("bitmap {} isn't to be trusted", bitmap.name);
                return Err(wrong(text));
            }
            continue;
        }
        let bits = found.bits();
        let granularity = bits.granularity();
        for (offset, len) in &bitmap.written {
            let end = (offset + len).min(length);
            let missing = (offset / granularity..end.div_ceil(granularity))
                .map(|granule| granule * granularity)
                .find(|at| !bits.is_dirty(*at));
            if let Some(at) = missing {
                return Err(wrong(format!(
                    "bitmap {} hasn't recorded the write at {offset:#x}+{len:#x}: {at:#x} is clean",
                    bitmap.name
                )));
            }
        }
        compared();
        next.push(Bitmap {
            since: 0,
            uncertain: false,
            ..bitmap
        });
    }
    Ok(next)
}
