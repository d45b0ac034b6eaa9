//! What images say of themselves: info, check reports, progress. Plain data; the tools turn it into text and JSON.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use serde_json::Value;

use crate::{error::ErrorKind, snapshot::SnapshotInfo};

/// What `info` shows beyond the node's name and length.
#[derive(Debug, Clone, Default)]
pub struct ImageInfo {
    /// Cluster or grain size in bytes, if there is one.
    pub cluster_size: Option<u64>,
    /// Whether the image wasn't closed properly.
    pub dirty: bool,
    /// Whether the content is encrypted.
    pub encrypted: bool,
    /// Compressed data is taken although the content is encrypted, and stored unencrypted: an option of the node allows it.
    pub compressed_plaintext: bool,
    /// Whether all data is stored compressed (`compressed` of qemu-img).
    pub compressed: bool,
    /// The backing file's name as the header has it.
    pub backing_filename: Option<String>,
    /// The backing file's format as the header has it.
    pub backing_format: Option<String>,
    /// Internal snapshots, oldest first.
    pub snapshots: Vec<SnapshotInfo>,
    /// Bytes that the storage has allocated for it (protocol nodes).
    pub actual_size: Option<u64>,
    /// The `format-specific` section of qemu-img's JSON: its `type` and `data`.
    pub format_specific: Option<(String, Value)>,
}

/// What a check may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CheckMode {
    /// Nothing.
    #[default]
    ReadOnly,
    /// Lowers refcounts that are too high.
    RepairLeaks,
    /// Repairs all that can be repaired.
    RepairAll,
}

/// One finding of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The line that qemu-img check prints for it.
    pub message: String,
    /// Whether it was repaired.
    pub repaired: bool,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Space is wasted.
    Leak,
    /// Data is or may become wrong.
    Corruption,
    /// The check itself couldn't look.
    CheckError,
    /// Worth telling, harmless.
    Note,
}

/// The result of a check. Counts are of clusters (or grains).
#[derive(Debug, Clone, Default)]
pub struct CheckReport {
    /// Places that couldn't be checked.
    pub check_errors: u64,
    /// Corruptions left.
    pub corruptions: u64,
    /// Leaks left.
    pub leaks: u64,
    /// What is in use by the image's own account although nothing that could be read refers to it: leaked, or referenced by what
    /// couldn't be read. Counted instead of leaks while there is such a place.
    pub uncertain: u64,
    /// Corruptions repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Where the image ends in its file, in bytes.
    pub image_end_offset: Option<u64>,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a place in the file.
    pub allocated_clusters: u64,
    /// Those that don't follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Those stored compressed.
    pub compressed_clusters: u64,
    /// What was found and what was done about it, in order; bounded (further findings are only counted). What a
    /// repair left is in the counts; a check after it names it.
    pub findings: Vec<Finding>,
    /// Why the repair that was asked for was not begun; the image is as it was.
    pub refused: Option<ErrorKind>,
    /// Ranges of the disk whose bytes may not be what was written there, because their place in the file was used for
    /// something else as well; bounded like `findings`. A repair gives each its own place and leaves the bytes alone.
    pub affected: Vec<Affected>,
}

/// A range of the virtual disk that shared its place in the image file with something else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affected {
    /// First byte of the range on the virtual disk.
    pub start: u64,
    /// Its bytes.
    pub length: u64,
    /// The internal snapshot that the range belongs to; `None` for the disk as it is.
    pub snapshot: Option<String>,
    /// What else was there: "data", "compressed data", or the name of a kind of metadata.
    pub with: String,
    /// For data, where on the virtual disk that is.
    pub with_start: Option<u64>,
    /// For data of an internal snapshot, its name.
    pub with_snapshot: Option<String>,
    /// Whether a repair has given the range a place of its own.
    pub separated: bool,
}

impl Affected {
    /// Whether `next` goes on where this range ends, in every respect.
    fn continues(&self, next: &Self) -> bool {
        let end = self.start.saturating_add(self.length);
        let with = self
            .with_start
            .map(|start| start.saturating_add(self.length));
        end == next.start
            && with == next.with_start
            && self.with == next.with
            && self.snapshot == next.snapshot
            && self.with_snapshot == next.with_snapshot
            && self.separated == next.separated
    }
}

impl fmt::Display for Affected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let snapshot = |f: &mut fmt::Formatter<'_>, name: &Option<String>| match name {
            Some(name) => write!(f, " of snapshot '{name}'"),
            None => Ok(()),
        };
        write!(
            f,
            "Affected: guest range offset={:#x} length={:#x}",
            self.start, self.length
        )?;
        snapshot(f, &self.snapshot)?;
        let verb = if self.separated { "shared" } else { "shares" };
        write!(f, " {verb} its place in the file with {}", self.with)?;
        if let Some(start) = self.with_start {
            write!(f, " at guest offset={start:#x}")?;
        }
        snapshot(f, &self.with_snapshot)
    }
}

impl CheckReport {
    /// The most findings that are kept with their text.
    pub const MAX_FINDINGS: usize = 10_000;

    /// Adds a finding, and counts it.
    pub fn add(&mut self, severity: Severity, repaired: bool, message: impl Into<String>) {
        let counter = match (severity, repaired) {
            (Severity::Leak, false) => Some(&mut self.leaks),
            (Severity::Leak, true) => Some(&mut self.leaks_fixed),
            (Severity::Corruption, false) => Some(&mut self.corruptions),
            (Severity::Corruption, true) => Some(&mut self.corruptions_fixed),
            (Severity::CheckError, _) => Some(&mut self.check_errors),
            (Severity::Note, _) => None,
        };
        if let Some(counter) = counter {
            *counter += 1;
        }
        self.note(Finding {
            severity,
            message: message.into(),
            repaired,
        });
    }

    /// Adds the counts of problems and the findings of `other`; its statistics are left out.
    pub fn absorb(&mut self, other: Self) {
        self.check_errors += other.check_errors;
        self.corruptions += other.corruptions;
        self.leaks += other.leaks;
        self.uncertain += other.uncertain;
        self.corruptions_fixed += other.corruptions_fixed;
        self.leaks_fixed += other.leaks_fixed;
        for finding in other.findings {
            self.note(finding);
        }
        for affected in other.affected {
            self.affect(affected);
        }
    }

    /// Adds a range that was affected; one that goes on where the last one ended becomes a part of it.
    pub fn affect(&mut self, affected: Affected) {
        if let Some(last) = self.affected.last_mut()
            && last.continues(&affected)
        {
            last.length += affected.length;
        } else if self.affected.len() < Self::MAX_FINDINGS {
            self.affected.push(affected);
        }
    }

    /// Adds a finding that is counted elsewhere.
    pub fn note(&mut self, finding: Finding) {
        if self.findings.len() < Self::MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    /// Nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.check_errors == 0 && self.corruptions == 0 && self.leaks == 0
    }
}

/// How far a long operation is, shared between it and those who watch; also asks it to stop.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<ProgressState>);

#[derive(Debug, Default)]
struct ProgressState {
    current: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// A new one at 0 of 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Work done so far, in the operation's own unit.
    pub fn current(&self) -> u64 {
        self.0.current.load(Ordering::Relaxed)
    }

    /// All the work, as far as is known.
    pub fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }

    /// Says how much work there is.
    pub fn set_total(&self, total: u64) {
        self.0.total.store(total, Ordering::Relaxed);
    }

    /// More work turned up.
    pub fn add_total(&self, more: u64) {
        self.0.total.fetch_add(more, Ordering::Relaxed);
    }

    /// Some of it is done.
    pub fn advance(&self, done: u64) {
        self.0.current.fetch_add(done, Ordering::Relaxed);
    }

    /// Asks the operation to stop at its next safe place, with ECANCELED.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }
}
