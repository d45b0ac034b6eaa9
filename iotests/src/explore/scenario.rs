//! A small scenario: an image of a few clusters, what is in them, and what two or three tasks do. Plain data, in units of
//! clusters, so that it fits any format.

use std::fmt;

use crate::pattern::SECTOR;

/// What a cluster is before anything happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing was ever written.
    Unallocated,
    /// Data.
    Data,
    /// Data that was overwritten with zeroes: where the format can, a zero cluster that keeps its place.
    Zero,
    /// Compressed data.
    Compressed,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Unallocated, Self::Data, Self::Zero, Self::Compressed];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unallocated => "unallocated",
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Compressed => "compressed",
        }
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum What {
    Read,
    Write,
    Zero,
    ZeroUnmap,
    Discard,
    Flush,
    /// The disk ends at the beginning of the cluster.
    Resize,
}

impl What {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Zero => "zero",
            Self::ZeroUnmap => "unmap",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Resize => "resize",
        }
    }
}

/// Which part of a cluster; where a cluster is one sector, all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Part {
    Whole,
    Front,
    Back,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub what: What,
    /// Which guest cluster.
    pub cluster: u64,
    /// Which part of it.
    pub part: Part,
}

impl Request {
    /// A request for a whole cluster.
    pub const fn whole(what: What, cluster: u64) -> Self {
        Self {
            what,
            cluster,
            part: Part::Whole,
        }
    }

    /// A request for a part of a cluster.
    pub const fn part(what: What, cluster: u64, part: Part) -> Self {
        Self {
            what,
            cluster,
            part,
        }
    }

    /// Offset and length in bytes.
    pub fn range(&self, cluster: u64) -> (u64, u64) {
        let start = self.cluster * cluster;
        let half = (cluster / 2).max(SECTOR);
        match self.part {
            Part::Whole => (start, cluster),
            Part::Front => (start, half),
            Part::Back => (start + cluster - half, half),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what.name())?;
        match self.what {
            What::Flush => return Ok(()),
            What::Resize => write!(f, " to the beginning of cluster {}", self.cluster)?,
            _ => write!(f, " of cluster {}", self.cluster)?,
        }
        match self.part {
            Part::Whole => Ok(()),
            Part::Front => f.write_str(" (first half)"),
            Part::Back => f.write_str(" (second half)"),
        }
    }
}

/// A job beside the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum JobKind {
    Mirror,
    MirrorBlocking,
    Backup,
}

/// See the file's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Small {
    /// Its name.
    pub name: String,
    /// Length of the disk. The last cluster holds data that must never change.
    pub clusters: u64,
    /// What is in the others, as far as it isn't unallocated.
    pub fill: Vec<(u64, Kind)>,
    /// One task each.
    pub guests: Vec<Vec<Request>>,
    /// A job that has just begun, and ends at any time.
    pub job: Option<JobKind>,
    /// The power is cut at any time, at the latest when the guests have ended.
    pub cut: bool,
    /// The first guest's first request is dropped at any time, or not at all.
    pub dropped: bool,
    /// In some schedule a request waits for another at the gate.
    pub waits: bool,
    /// Where the driver tells of its space: in some schedule a cluster is handed out that was freed before.
    pub reuses: bool,
}

impl Small {
    /// Guests, and nothing beside them.
    pub fn new(name: impl Into<String>, guests: Vec<Vec<Request>>) -> Self {
        Self {
            name: name.into(),
            clusters: 4,
            fill: Vec::new(),
            guests,
            job: None,
            cut: false,
            dropped: false,
            waits: true,
            reuses: false,
        }
    }

    /// Whether a guest does that.
    pub fn does(&self, what: What) -> bool {
        self.guests
            .iter()
            .flatten()
            .any(|request| request.what == what)
    }
}
