//! The image that is damaged, and what is done with it then.

use std::{panic::AssertUnwindSafe, sync::Arc};

use block_core::{
    Capabilities, Error, Node, Options, RequestFlags,
    image::{CheckMode, Progress},
    registry::ImplicitOpens,
};
use futures::FutureExt;
use parking_lot::Mutex;

use crate::{
    case::{Failure, Scene, Verdict},
    pattern::{Seen, stamped},
    stack::{NONE, lacks, probe, writer},
    storage::{Content, Disk, OpKind},
};

/// The image's name.
pub(super) const IMAGE: &str = "victim";
/// The most polls that one damaged image may cost.
const MAX_POLLS: u64 = 400_000;
/// The most bytes that may be read from the storage for it.
const MAX_READ: u64 = 256 << 20;
/// The most bytes by which what it takes up may grow; holes don't count.
const MAX_GROWTH: u64 = 64 << 20;
/// The most bytes that are read from each end of its disk.
const READ_EACH: u64 = 256 << 10;

/// What is done with a damaged image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Opened read-only, looked at and read.
    Look,
    /// Opened for writing, read, written, discarded, flushed, checked.
    Write,
    /// Repaired, and looked at afterwards.
    Repair,
}

/// A whole image, and what was found out about it.
pub(super) struct Victim {
    pub scene: Arc<Scene>,
    pub whole: Content,
    pub capabilities: Capabilities,
    pub unit: u64,
    /// Offsets of the 512-byte sectors in the storage that hold something else than a guest's data or zeroes.
    pub metadata: Vec<u64>,
    /// What is being tried, for whoever wants to know why nothing goes on.
    trying: Arc<Mutex<String>>,
}

/// How one damaged image came off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fared {
    Refused,
    Used,
}

impl Victim {
    /// Makes the image: data, a part of a cluster, zeroes, something compressed.
    pub async fn new(
        scene: &Arc<Scene>,
        needs: Capabilities,
    ) -> Result<Result<Self, Verdict>, Failure> {
        let (lab, format) = (&scene.lab, &scene.format);
        let (capabilities, unit) = probe(scene).await?;
        if let Some(verdict) = lacks(capabilities, needs | Capabilities::WRITE) {
            return Ok(Err(verdict));
        }
        let size = 8 * unit;
        lab.create(&format.name, IMAGE, size, &format.create, None)
            .await?;
        let node = lab.open(&format.name, IMAGE, None, &Options::new()).await?;
        let handle = writer(&lab.graph, &node, "maker")?;
        for (k, len) in [(0, unit), (2, 1024), (3, unit), (5, 512)] {
            let data = stamped(1, k + 1, k * unit, len);
            handle.write(k * unit, data, NONE).await?;
        }
        handle.write_zeroes(3 * unit, unit, NONE).await?;
        if capabilities.contains(Capabilities::COMPRESSED) {
            let data = stamped(1, 9, 4 * unit, unit);
            let flags = RequestFlags::WRITE_COMPRESSED;
            handle.write(4 * unit, data, flags).await?;
        }
        handle.flush().await?;
        drop(handle);
        lab.graph.release(&node).await?;
        let whole = lab.disk(IMAGE)?.content();
        let metadata: Vec<u64> = whole
            .to_bytes()
            .chunks(512)
            .enumerate()
            .filter(|(_, sector)| matches!(Seen::of(sector), Seen::Garbage(_)))
            .map(|(n, _)| n as u64 * 512)
            .collect();
        let trying = Arc::new(Mutex::new(String::new()));
        let what = trying.clone();
        lab.env
            .add_witness(move || vec![format!("damage: {}", what.lock())]);
        if metadata.is_empty() {
            let why = "images of the format have no metadata";
            return Ok(Err(Verdict::NotCovered(why.into())));
        }
        Ok(Ok(Self {
            scene: scene.clone(),
            whole,
            capabilities,
            unit,
            metadata,
            trying,
        }))
    }

    /// Only its own data file may be opened besides the image.
    fn implicit(&self) -> ImplicitOpens {
        let files = self.scene.lab.files_of(IMAGE, &self.whole);
        let data: Vec<String> = files.into_iter().skip(1).map(|(name, _)| name).collect();
        ImplicitOpens::Ask(Arc::new(move |name| data.iter().any(|data| data == name)))
    }

    /// Uses an image with this damage.
    pub async fn try_out(&self, damaged: Content, how: Use, what: &str) -> Result<Fared, Failure> {
        what.clone_into(&mut self.trying.lock());
        let lab = &self.scene.lab;
        let disk = Disk::new(IMAGE, damaged);
        lab.disks.insert(disk.clone());
        let (polls, taken) = (lab.env.polls(), disk.content().allocated());
        let outcome = AssertUnwindSafe(self.use_it(&disk, how))
            .catch_unwind()
            .await;
        let complain = |text: String| Failure(format!("{what}, {how:?}: {text}"));
        let fared = match outcome {
            Ok(Ok(fared)) => fared,
            Ok(Err(failure)) => return Err(complain(failure.0)),
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                    .unwrap_or_default();
                return Err(complain(format!("panic: {text}")));
            }
        };
        let polls = lab.env.polls() - polls;
        if polls > MAX_POLLS {
            return Err(complain(format!("it took {polls} polls")));
        }
        let read: u64 = disk
            .log()
            .iter()
            .filter(|entry| entry.op.kind == OpKind::Read)
            .map(|entry| entry.op.len)
            .sum();
        if read > MAX_READ {
            return Err(complain(format!("{read} bytes were read from the storage")));
        }
        let now = disk.content().allocated();
        if now > taken + MAX_GROWTH {
            return Err(complain(format!("it takes up {now} bytes")));
        }
        if let Some(node) = lab.graph.nodes().first() {
            return Err(complain(format!("'{}' is left", node.name())));
        }
        Ok(fared)
    }

    async fn use_it(&self, disk: &Arc<Disk>, how: Use) -> Result<Fared, Failure> {
        let lab = &self.scene.lab;
        let mut options = Options::new();
        if how == Use::Look {
            options.set("read-only", true);
        }
        let format = self.scene.format.name.as_str();
        let options = lab.options_for(format, IMAGE, None, &options);
        let open = block_core::registry::OpenOptions {
            for_check: how == Use::Repair,
            implicit: self.implicit(),
            ..block_core::registry::OpenOptions::default()
        };
        let opened = lab
            .registry
            .open_file(&lab.graph, IMAGE, Some(format), options, open)
            .await;
        let node = match opened {
            Ok(node) => node,
            Err(error) => {
                named(&error)?;
                let changed: u64 = [
                    OpKind::Write,
                    OpKind::WriteZeroes,
                    OpKind::Discard,
                    OpKind::Truncate,
                ]
                .into_iter()
                .map(|kind| disk.count(kind))
                .sum();
                if changed > 0 {
                    return Err(format!("it was refused ({error}), and changed").into());
                }
                return Ok(Fared::Refused);
            }
        };
        let used = self.use_open(&node, how).await;
        let closed = lab.graph.release(&node).await;
        used?;
        if let Err(error) = closed {
            named(&error)?;
        }
        Ok(Fared::Used)
    }

    /// Every request may fail, but only with an error that says where.
    async fn use_open(&self, node: &Arc<Node>, how: Use) -> Result<(), Failure> {
        let graph = &self.scene.lab.graph;
        let writes = how != Use::Look && node.driver().capabilities().contains(Capabilities::WRITE);
        let handle = if writes {
            writer(graph, node, "user")?
        } else {
            crate::stack::reader(graph, node)?
        };
        let judge = |result: Result<(), Error>| result.err().map_or(Ok(()), |error| named(&error));
        judge(handle.info().await.map(drop))?;
        if how == Use::Repair {
            let report = handle.check(CheckMode::RepairAll, Progress::new()).await;
            if let Ok(report) = &report
                && report.corruptions + report.leaks + report.check_errors == 0
            {
                // What is called repaired is clean when it is looked at again.
                let again = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
                if !again.is_clean() {
                    let what = crate::stack::findings(&again);
                    return Err(format!("after a repair that was content: {what}").into());
                }
            }
            judge(report.map(drop))?;
        }
        let length = node.length();
        let each = READ_EACH.min(length);
        for at in [0, length - each] {
            judge(handle.read(at, each as usize).await.map(drop))?;
            let mut from = at;
            // The answers may be short, but not empty.
            for _ in 0..64 {
                if from >= length {
                    break;
                }
                match handle.block_status(from, length - from).await {
                    Ok(status) if status.len == 0 => {
                        return Err(format!("a status of no bytes at {from:#x}").into());
                    }
                    Ok(status) => from += status.len,
                    Err(error) => {
                        named(&error)?;
                        break;
                    }
                }
            }
        }
        if how == Use::Write && writes {
            for (at, len) in [(512, 1024), (self.unit, self.unit), (6 * self.unit, 512)] {
                if at + len <= length {
                    let data = stamped(2, 1, at, len);
                    judge(handle.write(at, data, NONE).await)?;
                }
            }
            if 3 * self.unit <= length {
                judge(handle.discard(2 * self.unit, self.unit).await)?;
                let unmap = RequestFlags::MAY_UNMAP;
                judge(handle.write_zeroes(0, self.unit, unmap).await)?;
            }
            judge(handle.flush().await)?;
        }
        if self.capabilities.contains(Capabilities::CHECK) && how != Use::Repair {
            let report = handle.check(CheckMode::ReadOnly, Progress::new()).await;
            judge(report.map(drop))?;
        }
        Ok(())
    }
}

/// The error says which file it is about.
pub(super) fn named(error: &Error) -> Result<(), Failure> {
    let text = error.to_string();
    if text.contains(IMAGE) {
        Ok(())
    } else {
        Err(format!("the error doesn't name the file: {text}").into())
    }
}
