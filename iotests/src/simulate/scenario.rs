//! A scenario: everything that a simulated world is asked to do, as plain data that can be written to a file, read by a
//! person, and cut down. Nothing in here runs anything, and nothing depends on a seed any more.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{parts::ENCRYPTION, storage::OpKind};

/// Images, and what happens to them, in one phase after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Scenario {
    /// The format of all images.
    pub format: String,
    /// The chain, base first.
    pub layers: Vec<Layer>,
    /// The most further turns that a request to the storage takes.
    pub jitter: u64,
    /// Options with which the topmost image is opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub open: Vec<(String, String)>,
    /// The image is opened anew for each phase.
    pub phases: Vec<Phase>,
}

/// One image of the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Layer {
    /// Bytes.
    pub size: u64,
    /// Options of creation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<(String, String)>,
    /// What is written to it before anything else happens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fill: Vec<Fill>,
}

/// A range that is written when an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Zeroes instead of data.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub zero: bool,
}

/// From an opening to the next close or power cut.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Phase {
    /// The guest.
    pub queues: Vec<Queue>,
    /// What happens beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub jobs: Vec<JobPlan>,
    /// What goes wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
    /// The power is cut at this request to any disk, counted from the beginning of the phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<u64>,
}

/// One producer: its steps are taken in order, so many at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// How many requests it has in flight.
    pub depth: usize,
    /// What it does.
    pub steps: Vec<Step>,
}

/// One request of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Step {
    /// What.
    pub kind: StepKind,
    /// Bytes; the new length for a resize, microseconds for a pause, which of those that are there for a snapshot or bitmap.
    #[serde(default)]
    pub offset: u64,
    /// Bytes; a bitmap's granularity.
    #[serde(default)]
    pub len: u64,
    /// Durable when it completes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fua: bool,
    /// Its future is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropped: Option<Dropped>,
}

/// When a future is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Dropped {
    /// After so many polls that were answered "pending".
    pub polls: usize,
    /// Then at once, or when everything else has come to rest.
    pub at_rest: bool,
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum StepKind {
    Read,
    /// Copies what it reads from below into the image.
    CopyOnRead,
    Write,
    /// As one write of whole clusters, stored compressed.
    WriteCompressed,
    Zero,
    ZeroUnmap,
    Discard,
    Flush,
    Resize,
    Status,
    Pause,
    /// Takes an internal snapshot.
    SnapshotCreate,
    /// Makes the disk what it was when one of them was taken.
    SnapshotApply,
    SnapshotDelete,
    /// Adds a persistent bitmap.
    BitmapAdd,
    BitmapRemove,
    /// Has the image store all of them.
    BitmapStore,
}

impl StepKind {
    /// Whether it is about a range of the disk.
    pub const fn has_range(self) -> bool {
        !matches!(
            self,
            Self::Flush
                | Self::Resize
                | Self::Pause
                | Self::SnapshotCreate
                | Self::SnapshotApply
                | Self::SnapshotDelete
                | Self::BitmapAdd
                | Self::BitmapRemove
                | Self::BitmapStore
        )
    }

    /// Its name in timelines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::CopyOnRead => "copy-on-read",
            Self::Write => "write",
            Self::WriteCompressed => "compressed write",
            Self::Zero => "zero write",
            Self::ZeroUnmap => "zero write (may unmap)",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Resize => "resize",
            Self::Status => "block status",
            Self::Pause => "pause",
            Self::SnapshotCreate => "taking of a snapshot",
            Self::SnapshotApply => "application of a snapshot",
            Self::SnapshotDelete => "deletion of a snapshot",
            Self::BitmapAdd => "addition of a bitmap",
            Self::BitmapRemove => "removal of a bitmap",
            Self::BitmapStore => "storing of all bitmaps",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            StepKind::Flush => f.write_str("flush")?,
            StepKind::Resize => write!(f, "resize to {:#x}", self.offset)?,
            StepKind::Pause => write!(f, "pause of {} us", self.offset)?,
            kind if !kind.has_range() => f.write_str(kind.name())?,
            kind => write!(
                f,
                "{} of [{:#x}, {:#x})",
                kind.name(),
                self.offset,
                self.offset + self.len
            )?,
        }
        if self.fua {
            f.write_str(", FUA")?;
        }
        if let Some(dropped) = self.dropped {
            let when = if dropped.at_rest {
                "at rest"
            } else {
                "at once"
            };
            write!(f, ", to be dropped {when} after {} polls", dropped.polls)?;
        }
        Ok(())
    }
}

/// One job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobPlan {
    /// What it does.
    pub kind: JobWork,
    /// It is started when the guest has begun so many requests of the phase.
    pub start: u64,
    /// Bytes per second; 0 is no limit.
    #[serde(default)]
    pub speed: u64,
    /// What is asked of it on the way: when the guest has begun so many further requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verbs: Vec<(u64, Verb)>,
    /// What it is told when the guest has come to its end, if it hasn't ended by itself.
    pub end: JobEnd,
}

/// Kinds of jobs. Layers are counted from the top, which is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobWork {
    /// Copies all layers above `keep` (counted from the top; none stays if there are fewer) into the topmost.
    Stream {
        /// The first layer that stays.
        keep: Option<usize>,
    },
    /// Merges the layers from `top` down to above `base` into `base`.
    Commit {
        /// 0 is an active commit.
        top: usize,
        /// The layer merged into.
        base: usize,
    },
    /// Copies the disk to a new image.
    Mirror {
        /// Only what the topmost layer holds, or nothing of what is there.
        sync: Sync,
        /// Writes reach both before they complete.
        blocking: bool,
    },
    /// Copies the disk as it is at the start to a new image.
    Backup {
        /// What is copied.
        sync: Sync,
        /// When the copy before a write fails, the backup fails and not the write.
        break_snapshot: bool,
    },
}

impl JobWork {
    /// The kind's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stream { .. } => "stream",
            Self::Commit { .. } => "commit",
            Self::Mirror { .. } => "mirror",
            Self::Backup { .. } => "backup",
        }
    }
}

/// Which part of a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Sync {
    Full,
    Top,
    None,
}

/// What is asked of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Verb {
    Pause,
    Resume,
    Speed(u64),
    Cancel,
    ForceCancel,
    Complete,
}

/// How a job is brought to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobEnd {
    /// Completed when it is ready; waited for.
    Complete,
    /// Cancelled when it is ready: its copy becomes consistent.
    Cancel,
    /// Cancelled outright.
    ForceCancel,
}

/// Whose storage something goes wrong at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Where {
    /// The topmost image.
    Top,
    /// The image below it.
    Below,
    /// A job's target.
    Target,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Fault {
    /// At which storage.
    pub at: Where,
    /// Which kind of request.
    pub op: FaultOp,
    /// After so many that go well.
    pub skip: u64,
    /// So often.
    pub times: u64,
    /// How.
    pub what: FaultKind,
}

/// Which requests to the storage a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum FaultOp {
    Read,
    Write,
    Punch,
    Flush,
}

impl FaultOp {
    /// The storage's own kinds.
    pub const fn kinds(self) -> &'static [OpKind] {
        match self {
            Self::Read => &[OpKind::Read],
            Self::Write => &[OpKind::Write],
            Self::Punch => &[OpKind::Discard, OpKind::WriteZeroes],
            Self::Flush => &[OpKind::Flush],
        }
    }
}

/// What happens to a request to the storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// EIO, without effect.
    Io,
    /// ENOSPC, without effect.
    NoSpace,
    /// EIO, but it took effect.
    IoAfter,
    /// It takes so many microseconds longer.
    Delay(u64),
}

impl FaultKind {
    /// Whether somebody sees an error.
    pub const fn is_error(self) -> bool {
        !matches!(self, Self::Delay(_))
    }
}

impl Layer {
    /// Whether an option of creation is given.
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|(key, _)| key == option)
    }
}

impl Scenario {
    /// Whether any image is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.layers.iter().any(|layer| layer.has(ENCRYPTION))
    }

    /// Requests of guests in it.
    pub fn requests(&self) -> usize {
        let queues = self.phases.iter().flat_map(|phase| &phase.queues);
        queues
            .flat_map(|queue| &queue.steps)
            .filter(|step| step.kind != StepKind::Pause)
            .count()
    }

    /// How many parts it has that could be taken away: what [`super::minimise()`] makes smaller.
    pub fn weight(&self) -> usize {
        let phases: usize = self
            .phases
            .iter()
            .map(|phase| {
                let steps: usize = phase.queues.iter().map(|queue| queue.steps.len()).sum();
                let verbs: usize = phase.jobs.iter().map(|job| 1 + job.verbs.len()).sum();
                steps + verbs + phase.faults.len() + usize::from(phase.cut.is_some())
            })
            .sum();
        let fills: usize = self.layers.iter().map(|layer| layer.fill.len()).sum();
        phases + fills + self.layers.len()
    }
}
