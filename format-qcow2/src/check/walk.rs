//! Counts the references that an image's metadata make: header, L1 and L2 tables of the disk and of every snapshot, the
//! snapshot table, the LUKS header, bitmaps, refcount table and blocks.
//!
//! This file holds what is known after the walk, and its parts that concern all kinds of metadata; the parts that follow
//! one kind are in `mapping`, `snapshots` and `bitmaps`. Refcounts are compared elsewhere.

use std::{collections::BTreeSet, fmt};

use block_core::{
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::{CheckMode, CheckReport, Progress, Severity},
    request::Child,
};

use super::{
    bitmaps::NewDirectory,
    counts::{Bits, Counts},
    mapping::Tree,
    snapshots::NewTable,
    stored::{BlockPlace, Stored},
    table::{Shape, outside},
};
use crate::layout::{Geometry, Header, entry};

/// Places beyond the end of the file that are referenced; beyond this many, the image can't be rebuilt.
const MAX_PAST_END: usize = 65536;

/// Metadata other than L2 tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Header,
    L1Table,
    SnapshotL1Table,
    SnapshotTable,
    LuksHeader,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
    RefcountTable,
    RefcountBlock,
}

impl Kind {
    /// Can be given another place, or be done without.
    const fn can_move(self) -> bool {
        !matches!(self, Self::Header | Self::LuksHeader)
    }

    /// Made anew, at another place, when the refcounts are rebuilt.
    pub const fn is_refcounts(self) -> bool {
        matches!(self, Self::RefcountTable | Self::RefcountBlock)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "image header",
            Self::L1Table => "active L1 table",
            Self::SnapshotL1Table => "inactive L1 table",
            Self::SnapshotTable => "snapshot table",
            Self::LuksHeader => "LUKS header",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap data",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
        })
    }
}

/// What was found where metadata is said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claimed {
    Outside,
    Alone,
    /// Other metadata.
    Shared,
}

/// Where metadata is: first and last cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub kind: Kind,
    pub first: u64,
    pub last: u64,
}

/// What is known of the image after the walk.
pub(super) struct Walk<'a> {
    pub file: &'a Child,
    pub geometry: Geometry,
    pub shape: Shape,
    /// The references that were found.
    pub counts: Counts,
    /// Those among them that L1 entries make to L2 tables.
    pub l2_references: Counts,
    /// Those that the active L1 table makes, if there are snapshots.
    pub active_references: Option<Counts>,
    /// Those that the refcount table and its blocks make.
    pub structures: Counts,
    /// Clusters with metadata other than L2 tables, and where the less numerous kinds of it are.
    pub metadata: Bits,
    pub places: Vec<Place>,
    /// The active L1 table first, then those of the snapshots.
    pub trees: Vec<Tree>,
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// The refcount structures themselves are broken.
    pub rebuild: bool,
    /// Something else is in the refcount table's clusters: it is to be moved.
    pub overlaid: bool,
    /// A part of the mapping couldn't be followed: a cluster without references may still hold data.
    pub incomplete: bool,
    /// A part of it is so because reading failed: it may be there to be read another time, with all that it references.
    pub unread: bool,
    /// A standard entry isn't flagged as the only one: COPIED flags need a look.
    pub unflagged: bool,
    /// Clusters of L2 tables that couldn't be read, which is counted already.
    pub unreadable: Bits,
    /// Clusters beyond the end of the file that are referenced; `None` when they are too many.
    pub past_end: Option<BTreeSet<u64>>,
    /// Entries were repaired.
    pub repaired: bool,
    /// What has to take the snapshot table's place.
    pub new_snapshots: Option<NewTable>,
    /// What has to take the bitmap directory's place.
    pub new_bitmaps: Option<NewDirectory>,
    /// The snapshot table as it could be written anew, with every entry that could be read.
    pub snapshot_table: NewTable,
    /// L1 tables that have to leave their place.
    pub crowded: Vec<Crowded>,
    /// Bitmaps share their place with each other or with other metadata.
    pub bitmaps_overlap: bool,
    /// There are compressed clusters.
    pub compressed: bool,
}

/// An L1 table where there is other metadata as well.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crowded {
    pub offset: u64,
    pub len: u64,
    /// Where its entry is in the snapshot table; `None` for the active one.
    pub snapshot: Option<usize>,
}

/// Fails when the user asked to stop.
pub(super) fn stop_if_cancelled(progress: &Progress) -> Result<()> {
    if progress.is_cancelled() {
        return Err(Error::new(ErrorKind::Cancelled, "The check was cancelled"));
    }
    Ok(())
}

impl<'a> Walk<'a> {
    /// Walks the whole image. `mode` decides whether entries are repaired that can be set right where they are. Findings
    /// about the refcount structures themselves go to `structures`, all others to `report`.
    ///
    /// # Errors
    /// ENOMEM, ECANCELED, and an error of the storage while repairing. What can't be read is counted in `report`.
    pub async fn run(
        file: &'a Child,
        header: &Header,
        stored: &Stored<'_>,
        mode: CheckMode,
        report: &mut CheckReport,
        structures: &mut CheckReport,
        progress: &Progress,
    ) -> Result<Self> {
        let mut walk = Self {
            file,
            geometry: header.geometry(),
            shape: Shape::new(header, file.length(), mode == CheckMode::RepairAll),
            counts: Counts::new(header.refcount_order),
            l2_references: Counts::new(header.refcount_order),
            active_references: None,
            structures: Counts::new(header.refcount_order),
            metadata: Bits::default(),
            places: Vec::new(),
            trees: Vec::new(),
            l1: Vec::new(),
            rebuild: false,
            overlaid: false,
            incomplete: false,
            unread: false,
            unflagged: false,
            unreadable: Bits::default(),
            past_end: Some(BTreeSet::new()),
            repaired: false,
            new_snapshots: None,
            new_bitmaps: None,
            snapshot_table: NewTable::default(),
            crowded: Vec::new(),
            bitmaps_overlap: false,
            compressed: false,
        };
        let cluster_size = walk.shape.cluster_size();
        report.total_clusters = header.disk_size().div_ceil(cluster_size);
        walk.count_metadata(Kind::Header, 0, cluster_size, 1, report)?;
        // Before all that can make room for it.
        if let Some(luks) = header.extensions.luks {
            walk.count_metadata(Kind::LuksHeader, luks.offset, luks.len, 1, report)?;
        }
        let snapshots = walk.snapshot_table(header, report).await?;
        walk.mapping(header, &snapshots, report, progress).await?;
        walk.bitmaps(header, report, progress).await?;
        walk.refcount_table(header, structures)?;
        walk.refcount_blocks(stored, structures, progress)?;
        Ok(walk)
    }

    /// Notes that reading failed where references may be; the finding is the caller's.
    pub fn note_unread(&mut self) {
        self.incomplete = true;
        self.unread = true;
    }

    /// The clusters of the file, the last one perhaps incomplete.
    pub fn clusters(&self) -> u64 {
        self.shape.file_len.div_ceil(self.shape.cluster_size())
    }

    /// Notes clusters that are referenced although the file ends before them.
    pub fn note_past_end(&mut self, first: u64, clusters: u64) {
        for cluster in first..first.saturating_add(clusters) {
            match &mut self.past_end {
                Some(past) if past.len() < MAX_PAST_END => past.insert(cluster),
                _ => {
                    self.past_end = None;
                    return;
                }
            };
        }
    }

    /// Counts `times` references to each cluster that `offset..offset + len` touches. `false` when that lies beyond
    /// the end of the file.
    pub fn count(
        &mut self,
        offset: u64,
        len: u64,
        times: u64,
        report: &mut CheckReport,
    ) -> Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let bits = self.shape.cluster_bits;
        let end = offset.saturating_add(len);
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        if self.shape.is_outside(offset, len) {
            report.add(Severity::Corruption, false, outside(offset, len));
            self.note_past_end(first, last - first + 1);
            return Ok(false);
        }
        self.counts.add_run(first, last - first + 1, times)?;
        Ok(true)
    }

    /// Writes an entry that is set right where it is.
    pub async fn patch(&mut self, at: u64, bytes: Vec<u8>) -> Result<()> {
        self.repaired = true;
        self.file.write(at, bytes, RequestFlags::empty()).await
    }

    /// As [`Self::count`], for metadata other than L2 tables, which shares its clusters with nothing.
    pub fn count_metadata(
        &mut self,
        kind: Kind,
        offset: u64,
        len: u64,
        times: u64,
        report: &mut CheckReport,
    ) -> Result<bool> {
        let claimed = self.claim_metadata(kind, offset, len, times, report)?;
        Ok(claimed != Claimed::Outside)
    }

    /// As [`Self::count_metadata`]; says whether there is other metadata.
    pub fn claim_metadata(
        &mut self,
        kind: Kind,
        offset: u64,
        len: u64,
        times: u64,
        report: &mut CheckReport,
    ) -> Result<Claimed> {
        if !self.count(offset, len, times, report)? {
            return Ok(Claimed::Outside);
        }
        if len == 0 {
            return Ok(Claimed::Alone);
        }
        let bits = self.shape.cluster_bits;
        let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
        let mut overlaps = false;
        for cluster in first..=last {
            overlaps |= !self.metadata.insert(cluster)?;
        }
        if overlaps && !kind.is_refcounts() {
            let fix = self.shape.repair && kind.can_move();
            let verb = if fix { "Repairing" } else { "ERROR" };
            report.add(
                Severity::Corruption,
                fix,
                format!("{verb} {kind} at offset {offset:#x} overlaps other metadata"),
            );
        }
        if !matches!(kind, Kind::BitmapData | Kind::RefcountBlock) {
            self.places.push(Place { kind, first, last });
        }
        Ok(if overlaps {
            Claimed::Shared
        } else {
            Claimed::Alone
        })
    }

    fn refcount_table(&mut self, header: &Header, report: &mut CheckReport) -> Result<()> {
        let (table, len) = (
            header.refcount_table_offset.0,
            header.refcount_table_bytes(),
        );
        if self.count_metadata(Kind::RefcountTable, table, len, 1, report)? && len > 0 {
            let bits = self.shape.cluster_bits;
            for cluster in table >> bits..=(table + len - 1) >> bits {
                self.structures.add(cluster, 1)?;
                self.overlaid |= self.counts.get(cluster) > 1;
            }
        }
        Ok(())
    }

    fn refcount_blocks(
        &mut self,
        stored: &Stored<'_>,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<()> {
        if let Some(reason) = stored.unreadable() {
            report.add(
                Severity::CheckError,
                false,
                format!("ERROR refcount table can't be read: {reason}"),
            );
            self.rebuild = true;
        }
        let bits = self.shape.cluster_bits;
        for (index, raw) in stored.table().iter().enumerate() {
            if *raw == 0 {
                continue;
            }
            if raw & !entry::REFCOUNT_TABLE_MASK != 0 {
                self.broken(
                    report,
                    format!("ERROR refcount table entry {index} has reserved bits set"),
                );
                continue;
            }
            match stored.place(index as u64) {
                BlockPlace::Absent => {}
                BlockPlace::Unaligned(_) => self.broken(
                    report,
                    format!(
                        "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                    ),
                ),
                BlockPlace::At(offset) if offset.0 >= self.shape.file_len => {
                    self.broken(report, format!("ERROR refcount block {index} is outside image"));
                }
                BlockPlace::At(offset) => {
                    let cluster = offset.0 >> bits;
                    let references = self.counts.add(cluster, 1)?;
                    self.structures.add(cluster, 1)?;
                    self.metadata.insert(cluster)?;
                    if references != 1 {
                        self.broken(
                            report,
                            format!("ERROR refcount block {index} refcount={references}"),
                        );
                    }
                }
            }
        }
        stop_if_cancelled(progress)
    }

    /// The refcount structures are damaged: repair has to make new ones.
    fn broken(&mut self, report: &mut CheckReport, message: String) {
        report.add(Severity::Corruption, false, message);
        self.rebuild = true;
    }
}
