//! Runs a trace again in the deterministic world: the same requests in the same order, each producer with a handle of its
//! own, under as many schedules as are asked for, and the content oracle looks on. So a corruption that was seen in
//! production becomes a test.
//!
//! What ended before another request arrived has ended before it in a replay, too; what overlapped in time may run in any
//! order, as the seed says. Data isn't in a trace: writes are stamped, so that every sector tells whose it is. Sectors that
//! a write or zero write covers only in part are left out of the oracle's judgement (check looks at the image as a
//! whole). Jobs aren't run again: what they asked of the node is in the trace like everybody else's requests.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    panic::AssertUnwindSafe,
    sync::Arc,
};

use block_core::{
    BlockHandle, Buffer, Capabilities, ErrorKind, IoBuf, Node, Options, Registry, RequestFlags,
    driver::Truncate,
    image::{CheckMode, Progress},
    tracked::RequestKind,
};
use parking_lot::Mutex;

use super::format::{Event, NodeInfo, Trace};
use crate::{
    case::Failure,
    lab::{Lab, LabOptions, after_discard},
    laid,
    oracle::{Ended, Mismatch, Oracle},
    pattern::{SECTOR, stamped},
    sim::{Order, Running},
    storage::{Content, Disk},
};

const FILE: &str = "trace";
/// The most that is read at once, in bytes.
const CHUNK: u64 = 256 << 10;
/// A request to the storage takes up to so many turns longer, under schedules other than the trace's own.
const JITTER: u64 = 12;

/// How a trace is replayed.
#[derive(Debug, Clone)]
pub struct Replay {
    /// Which of the trace's nodes; the one with most requests if there is none.
    pub node: Option<String>,
    /// The format, if not the node's own driver.
    pub format: Option<String>,
    /// Options of the image's creation, on top of size and cluster size.
    pub create: Options,
    /// What the image's file held when the trace began, if that is known.
    pub image: Option<Vec<u8>>,
    /// The schedule; 0 keeps to the trace's own order as far as possible.
    pub seed: u64,
    /// Whether requests wait at the gate.
    pub gate: bool,
    /// Let the installed qemu-img look at the image afterwards.
    pub ask_qemu: bool,
}

/// What a replay gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Requests that were made.
    pub requests: u64,
    /// Producers that made them.
    pub producers: u64,
    /// Waits at the gate.
    pub gate_waits: u64,
    /// Requests that failed now and succeeded in the trace, and how the first did.
    pub failed: u64,
    /// See `failed`.
    pub first_failure: Option<String>,
    /// Everything that is wrong.
    pub wrong: Vec<String>,
    /// Polls: equal for equal runs.
    pub polls: u64,
}

/// A request of the trace.
#[derive(Debug, Clone, Copy)]
struct Asked {
    kind: RequestKind,
    flags: RequestFlags,
    offset: u64,
    len: u64,
    producer: u64,
    succeeded: bool,
}

/// Chooses the node that is replayed.
fn choose(trace: &Trace, name: Option<&str>) -> Result<(u16, NodeInfo), String> {
    let nodes = trace.nodes();
    let known = || {
        let names: Vec<String> = nodes
            .iter()
            .map(|(_, info, requests)| {
                format!("'{}' ({}, {requests} requests)", info.name, info.driver)
            })
            .collect();
        names.join(", ")
    };
    let found = match name {
        Some(name) => nodes.iter().find(|(_, info, _)| info.name == name),
        None => nodes.iter().max_by_key(|(_, _, requests)| *requests),
    };
    match (found, name) {
        (Some((number, info, _)), _) => Ok((*number, info.clone())),
        (None, Some(name)) => Err(format!(
            "the trace has no node '{name}' (it has: {})",
            known()
        )),
        (None, None) => Err("the trace has no nodes".into()),
    }
}

/// Runs a trace again.
///
/// # Errors
/// When it can't be replayed: no such node, a format that isn't registered, an image that can't be made.
pub fn replay(registry: &Registry, trace: &Trace, how: &Replay) -> Result<Replayed, String> {
    let (number, info) = choose(trace, how.node.as_deref())?;
    let lab = Lab::new(
        registry,
        LabOptions {
            seed: how.seed,
            order: if how.seed == 0 {
                Order::Fifo
            } else {
                Order::Random
            },
            gate: how.gate,
            alignment: 1,
        },
    );
    let env = lab.env.clone();
    let report = Arc::new(Mutex::new(Replayed::default()));
    let run = run(&lab, trace, number, &info, how, report.clone());
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| env.try_run(run)));
    let mut replayed = report.lock().clone();
    match result {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(Stop::Impossible(text)))) => return Err(text),
        Ok(Ok(Err(Stop::Wrong(text)))) => replayed.wrong.push(text),
        Ok(Err(stuck)) => replayed.wrong.push(stuck.to_string()),
        Err(panic) => replayed.wrong.push(format!(
            "panic: {}",
            panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_default()
        )),
    }
    if how.ask_qemu
        && replayed.wrong.is_empty()
        && let Some(disk) = lab.disks.get(FILE)
    {
        let format = how.format.as_deref().unwrap_or(&info.driver);
        if let Err(text) = laid::check(&lab, format, FILE, &disk.content(), false) {
            replayed.wrong.push(text.0);
        }
    }
    replayed.polls = env.polls();
    Ok(replayed)
}

enum Stop {
    Impossible(String),
    Wrong(String),
}

impl From<block_core::Error> for Stop {
    fn from(error: block_core::Error) -> Self {
        Self::Wrong(error.to_string())
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Wrong(failure.0)
    }
}

/// The disk that is replayed on.
struct World {
    node: Arc<Node>,
    oracle: Oracle,
    handles: Mutex<HashMap<u64, Arc<BlockHandle>>>,
    /// Sectors that the oracle can't judge.
    unjudged: Mutex<Vec<Range<u64>>>,
    report: Arc<Mutex<Replayed>>,
}

async fn open(
    lab: &Lab,
    info: &NodeInfo,
    how: &Replay,
) -> Result<(Arc<Node>, Arc<BlockHandle>), Stop> {
    let format = how.format.as_deref().unwrap_or(&info.driver);
    let impossible = |error: block_core::Error| Stop::Impossible(error.to_string());
    if let Some(bytes) = &how.image {
        lab.disks
            .insert(Disk::new(FILE, Content::from_bytes(bytes)));
    } else {
        let mut options = how.create.clone();
        let takes = |name: &str| {
            lab.registry.get(format).is_ok_and(|factory| {
                factory
                    .create_options()
                    .iter()
                    .any(|option| option.name == name)
            })
        };
        if takes("cluster_size") && info.cluster_size > 1 {
            options.set_default("cluster_size", info.cluster_size);
        }
        let size = info.length.next_multiple_of(SECTOR);
        lab.create(format, FILE, size, &options, None)
            .await
            .map_err(impossible)?;
    }
    let node = lab
        .open(format, FILE, None, &Options::new())
        .await
        .map_err(impossible)?;
    if how.seed != 0 {
        // Storage that takes its time, and answers in any order.
        lab.disk(FILE).map_err(impossible)?.set_jitter(JITTER);
    }
    let handle = lab.attach(&node, "oracle").map_err(impossible)?;
    Ok((node, handle))
}

async fn run(
    lab: &Lab,
    trace: &Trace,
    number: u16,
    info: &NodeInfo,
    how: &Replay,
    report: Arc<Mutex<Replayed>>,
) -> Result<(), Stop> {
    let (node, reader) = open(lab, info, how).await?;
    let oracle = Oracle::new(after_discard(&node));
    if how.image.is_some() {
        let mut at = 0;
        while at < reader.length() {
            let len = (reader.length() - at).min(CHUNK);
            oracle.set_initial(at, &reader.read(at, len as usize).await?);
            at += len;
        }
    }
    let world = Arc::new(World {
        node: node.clone(),
        oracle,
        handles: Mutex::default(),
        unjudged: Mutex::default(),
        report: report.clone(),
    });
    let ended_well: BTreeMap<u64, bool> = trace
        .records
        .iter()
        .filter(|record| record.node == number)
        .filter_map(|record| match record.event {
            Event::Ended { ok } => Some((record.ticket, ok)),
            _ => None,
        })
        .collect();
    let mut running: BTreeMap<u64, Running<()>> = BTreeMap::new();
    for record in trace.records.iter().filter(|record| record.node == number) {
        match &record.event {
            Event::Arrived {
                kind,
                flags,
                offset,
                len,
                producer,
                ..
            } => {
                let asked = Asked {
                    kind: *kind,
                    flags: *flags,
                    offset: *offset,
                    len: *len,
                    producer: *producer,
                    succeeded: ended_well.get(&record.ticket).copied().unwrap_or(false),
                };
                let handle = world.handle(lab, *producer)?;
                let task = world.clone().ask(handle, asked);
                running.insert(record.ticket, lab.env.start(task));
                report.lock().requests += 1;
            }
            Event::Ended { .. } => {
                if let Some(task) = running.remove(&record.ticket) {
                    task.await;
                }
            }
            Event::Node(_) | Event::Admitted => {}
        }
    }
    // What had not ended when the trace did.
    for (_, task) in running {
        task.await;
    }
    report.lock().gate_waits = node.tracker().waits();
    report.lock().producers = world.handles.lock().len() as u64;
    world.verify(&reader).await?;
    world.handles.lock().clear();
    drop((reader, world));
    lab.graph.release(&node).await?;
    Ok(())
}

impl World {
    fn handle(&self, lab: &Lab, producer: u64) -> Result<Arc<BlockHandle>, Stop> {
        let mut handles = self.handles.lock();
        if let Some(handle) = handles.get(&producer) {
            return Ok(handle.clone());
        }
        let handle = lab.attach(&self.node, &format!("producer {producer}"))?;
        handles.insert(producer, handle.clone());
        Ok(handle)
    }

    /// Leaves the sectors at the ends of a range that it covers only in part to themselves, and gives the rest.
    fn whole_sectors(&self, offset: u64, len: u64) -> (u64, u64) {
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(SECTOR), end - end % SECTOR);
        let mut unjudged = self.unjudged.lock();
        if first != offset {
            unjudged.push(offset / SECTOR..offset / SECTOR + 1);
        }
        if last != end {
            unjudged.push(end / SECTOR..end / SECTOR + 1);
        }
        if first < last {
            (first, last - first)
        } else {
            (first, 0)
        }
    }

    fn wrong(&self, mismatches: &[Mismatch]) {
        let unjudged = self.unjudged.lock();
        let mut report = self.report.lock();
        for mismatch in mismatches {
            let first = mismatch.offset / SECTOR;
            let judged = (first..first + mismatch.sectors)
                .any(|sector| !unjudged.iter().any(|range| range.contains(&sector)));
            if judged {
                report.wrong.push(mismatch.to_string());
            }
        }
    }

    async fn ask(self: Arc<Self>, handle: Arc<BlockHandle>, asked: Asked) {
        // What belongs to the core's own way of doing things isn't asked for again.
        let flags = asked.flags & !(RequestFlags::SERIALISING | RequestFlags::REGISTERED_BUF);
        let owner = asked.producer as u32;
        let (offset, len) = (asked.offset, asked.len);
        let how = |result: &block_core::Result<()>| match result {
            Ok(()) => Ended::Done,
            Err(_) => Ended::Undone,
        };
        let result = match asked.kind {
            RequestKind::Read | RequestKind::CopyRange => {
                self.read(&handle, offset, len, flags).await
            }
            RequestKind::Write => {
                let (first, whole) = self.whole_sectors(offset, len);
                let change = self.oracle.write(owner, first, whole);
                let start = offset - offset % SECTOR;
                let end = (offset + len).next_multiple_of(SECTOR);
                let data = IoBuf::from(stamped(owner, change.seq(), start, end - start))
                    .slice((offset - start) as usize..(offset - start + len) as usize);
                let mut result = handle.write(offset, data.clone(), flags).await;
                if let Err(error) = &result
                    && error.kind() == ErrorKind::NotSupported
                    && flags.contains(RequestFlags::WRITE_COMPRESSED)
                {
                    let plain = flags - RequestFlags::WRITE_COMPRESSED;
                    result = handle.write(offset, data, plain).await;
                }
                change.end(how(&result));
                result
            }
            RequestKind::ZeroWrite => {
                let (first, whole) = self.whole_sectors(offset, len);
                let change = self.oracle.zero(first, whole);
                let result = handle
                    .write_zeroes(offset, len, flags - RequestFlags::NO_FALLBACK)
                    .await;
                change.end(how(&result));
                result
            }
            RequestKind::Discard => {
                let (first, whole) = self.whole_sectors(offset, len);
                let change = self.oracle.discard(first, whole);
                let result = handle.discard(offset, len).await;
                change.end(how(&result));
                result
            }
            RequestKind::Truncate => {
                let old = handle.length();
                let result = handle.truncate(offset, Truncate::default()).await;
                if result.is_ok() && offset < old {
                    let from = offset.next_multiple_of(SECTOR).min(old);
                    self.oracle.forget(from, old - from);
                }
                result
            }
            _ => Ok(()),
        };
        if let Err(error) = result
            && asked.succeeded
        {
            let mut report = self.report.lock();
            report.failed += 1;
            report.first_failure.get_or_insert_with(|| {
                format!("{:?} at {offset:#x}+{len:#x}: {error}", asked.kind)
            });
        }
    }

    async fn read(
        &self,
        handle: &BlockHandle,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> block_core::Result<()> {
        let reading = self.oracle.read();
        let (lent, buf) = Buffer::try_new(len as usize)?.lend();
        handle
            .readv(offset, buf, flags - RequestFlags::PREFETCH)
            .await?;
        let bytes = lent
            .reclaim()
            .map_err(|_| block_core::Error::io("a driver kept a part of a read buffer"))?;
        let first = offset.next_multiple_of(SECTOR);
        let last = (offset + len) - (offset + len) % SECTOR;
        if first < last {
            let whole = &bytes[(first - offset) as usize..(last - offset) as usize];
            self.wrong(&reading.check(first, whole));
        }
        Ok(())
    }

    /// The whole disk against the oracle, and the driver's check.
    async fn verify(&self, reader: &BlockHandle) -> Result<(), Stop> {
        let mut at = 0;
        let length = reader.length() - reader.length() % SECTOR;
        while at < length {
            let status = reader.block_status(at, length - at).await?;
            if status.is_zero() {
                // Nothing but zeroes: only what the oracle knows of has to be looked at.
                let end = at + status.len.min(length - at);
                match self.oracle.next_known(at).filter(|next| *next < end) {
                    Some(next) => {
                        self.wrong(&self.oracle.check(next, &[0; SECTOR as usize]));
                        at = next + SECTOR;
                    }
                    None => at = end.max(at + SECTOR),
                }
                continue;
            }
            let len = status.len.next_multiple_of(SECTOR);
            let len = len.clamp(SECTOR, CHUNK).min(length - at);
            let bytes = reader.read(at, len as usize).await?;
            self.wrong(&self.oracle.check(at, &bytes));
            at += len;
        }
        let capabilities = self.node.driver().capabilities();
        if capabilities.contains(Capabilities::CHECK) {
            reader.flush().await?;
            let check = reader.check(CheckMode::ReadOnly, Progress::new()).await?;
            let mut report = self.report.lock();
            for finding in &check.findings {
                report.wrong.push(format!("check: {}", finding.message));
            }
        }
        Ok(())
    }
}
