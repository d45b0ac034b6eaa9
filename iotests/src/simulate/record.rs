//! What a run leaves behind: a hash of everything that happened, counters, the first failure, and, if it was asked for, the
//! last events in words, of which the timeline is made. It decides nothing.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use block_core::error::ErrorKind;
use jobs::{JobEvent, JobEvents};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    sim::SimEnv,
    storage::{Disk, DiskWatch, OpInfo, OpKind},
};

/// The most events that are kept.
const MAX_EVENTS: usize = 50_000;

/// What kind of thing went wrong. A smaller scenario counts as the same failure when its kind is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// A sector holds what it may not.
    Content,
    /// The image's check found a corruption.
    Check,
    /// The image's check found a leak where nothing explains one.
    Leak,
    /// Host space has two owners, or a link leads to a free cluster, or a free cluster has I/O in flight.
    Invariant,
    /// A request or job failed without reason.
    Error,
    /// A job's result isn't what it has to be.
    Job,
    /// The images can't be made: a scenario that makes no sense.
    Unmade,
    /// No progress, or no end.
    Stuck,
    /// A panic.
    Panic,
    /// Something of the world is still in memory when the world is gone.
    Memory,
}

/// The first thing that went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind.
    pub kind: FailureKind,
    /// What exactly.
    pub text: String,
}

impl Failure {
    /// A failure.
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.text)
    }
}

/// One line of a timeline.
#[derive(Debug, Clone)]
pub struct Event {
    /// The poll in which it happened.
    pub poll: u64,
    /// The task that was polled.
    pub task: Arc<str>,
    /// What happened.
    pub text: String,
}

/// See the file's header.
pub struct Recorder {
    env: Arc<SimEnv>,
    hash: AtomicU64,
    events: Option<Mutex<VecDeque<Event>>>,
    failure: Mutex<Option<Failure>>,
    counters: Mutex<BTreeMap<String, u64>>,
    /// Requests to disks since the phase began, and at which of them the power is cut.
    disk_ops: AtomicU64,
    cut_at: AtomicU64,
    cut: AtomicBool,
    errors: AtomicU64,
    write_back: Mutex<BTreeMap<String, &'static str>>,
    job_events: Mutex<Option<JobEvents>>,
}

impl Recorder {
    /// A recorder; with `timeline` it keeps events in words.
    pub fn new(env: &Arc<SimEnv>, timeline: bool) -> Arc<Self> {
        Arc::new(Self {
            env: env.clone(),
            hash: AtomicU64::new(0),
            events: timeline.then(Mutex::default),
            failure: Mutex::default(),
            counters: Mutex::default(),
            disk_ops: AtomicU64::new(0),
            cut_at: AtomicU64::new(u64::MAX),
            cut: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            write_back: Mutex::default(),
            job_events: Mutex::default(),
        })
    }

    /// Events of jobs belong into the timeline. They are taken out after each poll by whoever is at work then: a task of
    /// its own would change the schedule.
    pub(super) fn listen_to(&self, events: JobEvents) {
        *self.job_events.lock() = Some(events);
    }

    /// What jobs have told since the last time.
    pub(super) fn job_events(&self) -> Vec<JobEvent> {
        let mut events = self.job_events.lock();
        let mut all = Vec::new();
        if let Some(events) = events.as_mut() {
            while let Ok(event) = events.try_recv() {
                all.push(event);
            }
        }
        all
    }

    /// The world.
    pub fn env(&self) -> &Arc<SimEnv> {
        &self.env
    }

    /// Whether events are kept in words.
    pub fn keeps_events(&self) -> bool {
        self.events.is_some()
    }

    /// Something happened: `what` numbers identify it, `text` describes it.
    pub fn note(&self, what: [u64; 3], text: impl FnOnce() -> String) {
        let mut hash = self.hash.load(Ordering::Relaxed);
        for n in what {
            hash = (hash.rotate_left(7) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        self.hash.store(hash, Ordering::Relaxed);
        if self.events.is_some() {
            let task = self.env.current_task().unwrap_or_else(|| Arc::from("-"));
            self.say(task, text());
        }
    }

    /// Only for the timeline: no part of the hash.
    pub fn say(&self, task: Arc<str>, text: String) {
        let Some(events) = &self.events else { return };
        let poll = self.env.polls();
        let mut events = events.lock();
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(Event { poll, task, text });
    }

    /// The events that were kept, oldest first.
    pub fn events(&self) -> Vec<Event> {
        self.events
            .as_ref()
            .map(|events| events.lock().iter().cloned().collect())
            .unwrap_or_default()
    }

    /// A hash of all that happened.
    pub fn hash(&self) -> u64 {
        self.hash.load(Ordering::Relaxed) ^ self.env.schedule_hash()
    }

    /// Something went wrong: the run ends with the poll that is under way. Only the first failure counts.
    pub fn fail(&self, failure: Failure) {
        self.note([99, failure.kind as u64, 0], || {
            format!("FAILURE {failure}")
        });
        self.failure.lock().get_or_insert(failure);
        self.env.interrupt();
    }

    /// What went wrong.
    pub fn failure(&self) -> Option<Failure> {
        self.failure.lock().clone()
    }

    /// Counts.
    pub fn count(&self, name: &str, n: u64) {
        if n == 0 {
            return;
        }
        let mut counters = self.counters.lock();
        match counters.get_mut(name) {
            Some(counter) => *counter += n,
            None => {
                counters.insert(name.to_owned(), n);
            }
        }
    }

    /// All counters.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        self.counters.lock().clone()
    }

    /// A phase begins; the power is cut at that request to a disk.
    pub fn arm(&self, cut: Option<u64>) {
        self.disk_ops.store(0, Ordering::Relaxed);
        self.cut.store(false, Ordering::Relaxed);
        self.cut_at
            .store(cut.unwrap_or(u64::MAX), Ordering::Relaxed);
        self.errors.store(0, Ordering::Relaxed);
        self.write_back.lock().clear();
    }

    /// No cut any more.
    pub fn disarm(&self) {
        self.cut_at.store(u64::MAX, Ordering::Relaxed);
    }

    /// What the cut has interrupted is gone.
    pub fn power_is_back(&self) {
        self.cut.store(false, Ordering::Relaxed);
    }

    /// Whether the power was cut.
    pub fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// Requests to disks that failed in this phase.
    pub fn disk_errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }

    /// A driver has come to this part of its write-back.
    pub fn write_back_at(&self, image: &str, step: &'static str) {
        let mut steps = self.write_back.lock();
        match steps.get_mut(image) {
            Some(at) => *at = step,
            None => {
                steps.insert(image.to_owned(), step);
            }
        }
    }

    /// Between which barriers an image is.
    pub fn write_back_of(&self, image: &str) -> &'static str {
        self.write_back.lock().get(image).copied().unwrap_or("data")
    }
}

impl DiskWatch for Recorder {
    fn begins(&self, disk: &Disk, op: &OpInfo) {
        self.note([1, op.kind as u64, op.offset ^ op.len << 40], || {
            format!("{}: {op} begins", disk.name())
        });
        let n = self.disk_ops.fetch_add(1, Ordering::Relaxed) + 1;
        if n == self.cut_at.load(Ordering::Relaxed) {
            self.note([2, n, 0], || "THE POWER IS CUT".to_owned());
            self.cut.store(true, Ordering::Relaxed);
            self.env.interrupt();
        }
    }

    fn takes_effect(&self, disk: &Disk, op: &OpInfo) {
        self.note([3, op.kind as u64, op.offset], || {
            let what = match op.kind {
                OpKind::Read => "sees what is there",
                _ => "takes effect",
            };
            format!("{}: {op} {what}", disk.name())
        });
    }

    fn ended(&self, disk: &Disk, op: &OpInfo, result: Result<(), ErrorKind>) {
        if result.is_err_and(|kind| kind != ErrorKind::Cancelled && kind != ErrorKind::NotSupported)
        {
            self.errors.fetch_add(1, Ordering::Relaxed);
            self.count("storage-errors", 1);
        }
        self.note([4, op.offset, u64::from(result.is_ok())], || match result {
            Ok(()) => format!("{}: {op} ends", disk.name()),
            Err(kind) => format!("{}: {op} fails: {kind:?}", disk.name()),
        });
    }
}
