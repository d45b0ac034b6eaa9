//! Power cuts between any two writes of an operation.

use std::sync::Arc;

use block_core::{BlockHandle, Result};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    Rig, checked, image_bytes,
    storage::{Event, Storage},
};

/// The storage's bytes after a cut: all up to the last flush before `cut`, and any of what came between.
pub fn after_cut(start: &[u8], log: &[Event], cut: usize, rng: &mut SmallRng) -> Vec<u8> {
    let flushed = log[..cut]
        .iter()
        .rposition(|event| matches!(event, Event::Flush))
        .unwrap_or(0);
    let mut data = start.to_vec();
    log[..flushed]
        .iter()
        .for_each(|event| event.apply(&mut data));
    let keep = *[0.0, 0.2, 0.5, 0.8, 1.0]
        .get(rng.random_range(0..5))
        .unwrap();
    for event in &log[flushed..cut] {
        match event {
            // Sectors are written whole, requests aren't.
            Event::Write(at, bytes) if bytes.len() > 512 => {
                let mut done = 0;
                while done < bytes.len() {
                    let next = (512 - (*at as usize + done) % 512).min(bytes.len() - done);
                    if rng.random_bool(keep) {
                        let part = bytes[done..done + next].to_vec();
                        Event::Write(at + done as u64, part).apply(&mut data);
                    }
                    done += next;
                }
            }
            other if rng.random_bool(keep) => other.apply(&mut data),
            _ => {}
        }
    }
    data
}

/// How the image is looked at after a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// As it is: nothing but leaks is allowed.
    AsItIs,
    /// Opened for writing, which repairs what a dirty bit announces.
    Reopened,
}

/// The image that `work` makes of `start`, closed properly, and what reached the storage from then on until `operation` had
/// ended and the image was closed again.
pub struct Recording {
    pub start: Vec<u8>,
    pub log: Vec<Event>,
    pub end: Vec<u8>,
}

/// Runs `operation` on an image and records what it writes.
pub fn record(
    start: Vec<u8>,
    open: &str,
    operation: impl AsyncFnOnce(&BlockHandle) -> Result<()>,
) -> Recording {
    let rig = Rig::new();
    let storage = Storage::new(start.clone());
    storage.state.lock().keep_log = true;
    rig.block_on(async {
        let handle = rig.open_storage(&storage, open).await.unwrap();
        operation(&handle).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let mut state = storage.state.lock();
    Recording {
        start,
        log: std::mem::take(&mut state.log),
        end: state.data.clone(),
    }
}

/// An image made by the installed qemu-img, with `work` done to it.
pub fn prepared(
    options: &str,
    size: u64,
    work: impl AsyncFnOnce(&BlockHandle) -> Result<()>,
) -> Vec<u8> {
    record(image_bytes(options, size), "", work).end
}

impl Recording {
    /// Cuts the power before each write (at most `most` of them, evenly spread), loses some of what wasn't flushed, and
    /// gives what is left of the disk to `judge`, with the number of the cut.
    pub fn cut(&self, what: &str, look: Look, most: usize, mut judge: impl FnMut(&[u8], &str)) {
        let mut rng = SmallRng::seed_from_u64(self.log.len() as u64);
        let step = self.log.len().div_ceil(most).max(1);
        let cuts = (0..self.log.len()).step_by(step).chain([self.log.len()]);
        for cut in cuts {
            let data = after_cut(&self.start, &self.log, cut, &mut rng);
            let what = format!("{what}, cut at {cut} of {}", self.log.len());
            let disk = look_at(&Storage::new(data), look, &what);
            judge(&disk, &what);
        }
    }
}

/// Checks an image that lost its power and gives the bytes of its disk.
pub fn look_at(storage: &Arc<Storage>, look: Look, what: &str) -> Vec<u8> {
    let rig = Rig::new();
    rig.block_on(async {
        if look == Look::Reopened {
            let handle = rig.open_storage(storage, "").await;
            let handle = handle.unwrap_or_else(|error| panic!("{what}: {error}"));
            rig.close(handle).await.unwrap();
        }
        let handle = rig.open_storage(storage, "read-only=on").await;
        let handle = handle.unwrap_or_else(|error| panic!("{what}: {error}"));
        let report = checked(&handle).await;
        assert_eq!(
            report.corruptions + report.check_errors,
            0,
            "{what}: {:#?}",
            report.findings
        );
        let len = handle.length() as usize;
        let disk = handle.read(0, len).await.unwrap().to_vec();
        rig.close(handle).await.unwrap();
        disk
    })
}
