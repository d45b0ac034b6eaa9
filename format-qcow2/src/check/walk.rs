//! Counts the references that an image's metadata make: header, L1, L2, compressed runs, refcount table and blocks.
//!
//! It reads each L2 table once, however many L1 entries point to it, and never follows a table that isn't where a
//! cluster begins. The one thing that it repairs itself is a misaligned reservation of a zero cluster, which holds no
//! data. Refcounts are compared elsewhere.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use block_core::{
    buffer::Buffer,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::{CheckMode, CheckReport, Progress, Severity},
    request::Child,
};

use super::{
    counts::Counts,
    stored::{BlockPlace, Stored},
};
use crate::layout::{
    Geometry, Header, HostOffset, L1Entry, L2Entry,
    entry::{self, COMPRESSED, COPIED, OFFSET_MASK, ZERO, be64s},
};

/// Places beyond the end of the file that are referenced; beyond this many, the image can't be rebuilt.
const MAX_PAST_END: usize = 65536;

/// What is known of the image after the walk.
pub(super) struct Walk<'a> {
    pub file: &'a Child,
    pub geometry: Geometry,
    pub file_len: u64,
    /// The references that were found.
    pub counts: Counts,
    /// Those among them that the refcount table and its blocks make, by cluster.
    pub structures: BTreeMap<u64, u64>,
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// The refcount structures themselves are broken.
    pub rebuild: bool,
    /// A part of the mapping couldn't be followed: a cluster without references may still hold data.
    pub incomplete: bool,
    /// Offsets of L2 tables that couldn't be read, which is counted already.
    pub unreadable: std::collections::HashSet<u64>,
    /// Clusters beyond the end of the file that are referenced; `None` when they are too many.
    pub past_end: Option<BTreeSet<u64>>,
    /// Entries were repaired.
    pub repaired: bool,
}

/// Fails when the user asked to stop.
pub(super) fn stop_if_cancelled(progress: &Progress) -> Result<()> {
    if progress.is_cancelled() {
        return Err(Error::new(ErrorKind::Cancelled, "The check was cancelled"));
    }
    Ok(())
}

/// Clusters of one L2 table, as `check` counts them.
#[derive(Default, Clone, Copy)]
struct TableStatistics {
    allocated: u64,
    compressed: u64,
    fragmented: u64,
}

impl<'a> Walk<'a> {
    /// Walks the whole image. `mode` decides whether misaligned reservations are repaired. Findings about the refcount
    /// structures themselves go to `structures`, all others to `report`.
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
            file_len: file.length(),
            counts: Counts::default(),
            structures: BTreeMap::new(),
            l1: Vec::new(),
            rebuild: false,
            incomplete: false,
            unreadable: std::collections::HashSet::new(),
            past_end: Some(BTreeSet::new()),
            repaired: false,
        };
        report.total_clusters = walk.geometry.clusters_for(header.size);
        let cluster_size = walk.geometry.cluster_size();
        walk.count(0, cluster_size, 1, report)?;
        walk.mapping(header, mode, report, progress).await?;
        let (table, len) = (
            header.refcount_table_offset.0,
            header.refcount_table_bytes(),
        );
        if walk.count(table, len, 1, structures)? && len > 0 {
            let bits = walk.geometry.cluster_bits();
            for cluster in table >> bits..=(table + len - 1) >> bits {
                *walk.structures.entry(cluster).or_default() += 1;
            }
        }
        walk.refcount_blocks(stored, structures, progress)?;
        Ok(walk)
    }

    /// The clusters of the file, the last one perhaps incomplete.
    pub fn clusters(&self) -> u64 {
        self.geometry.clusters_for(self.file_len)
    }

    /// Counts `times` references to each cluster that `offset..offset + len` touches. `false` when that lies beyond
    /// the end of the file.
    fn count(
        &mut self,
        offset: u64,
        len: u64,
        times: u64,
        report: &mut CheckReport,
    ) -> Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let cluster_size = self.geometry.cluster_size();
        let bits = self.geometry.cluster_bits();
        let end = offset.saturating_add(len);
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        if end >= self.file_len.saturating_add(cluster_size) {
            report.add(
                Severity::Corruption,
                false,
                format!(
                    "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                     offset {offset:#x} size {len:#x}"
                ),
            );
            for cluster in first..=last {
                match &mut self.past_end {
                    Some(past) if past.len() < MAX_PAST_END => past.insert(cluster),
                    _ => {
                        self.past_end = None;
                        break;
                    }
                };
            }
            return Ok(false);
        }
        for cluster in first..=last {
            self.counts.add(cluster, times)?;
        }
        Ok(true)
    }

    async fn mapping(
        &mut self,
        header: &Header,
        mode: CheckMode,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<()> {
        if header.l1_size == 0 {
            return Ok(());
        }
        // At most 32 MiB: the header was checked.
        let len = header.l1_bytes() as usize;
        if !self.count(header.l1_table_offset.0, header.l1_bytes(), 1, report)? {
            self.incomplete = true;
        }
        match self.file.read_padded(header.l1_table_offset.0, len).await {
            Ok(bytes) => self.l1 = be64s(&bytes).collect(),
            Err(error) => {
                report.add(
                    Severity::CheckError,
                    false,
                    format!("ERROR: I/O error in check_refcounts_l1: {}", error.reason()),
                );
                self.incomplete = true;
                return Ok(());
            }
        }
        // An L2 table that several entries share is read once: a hostile L1 table costs no more time than the file
        // has bytes.
        let mut sharers: HashMap<u64, u64> = HashMap::new();
        for raw in &self.l1 {
            if raw & OFFSET_MASK != 0 {
                *sharers.entry(raw & OFFSET_MASK).or_default() += 1;
            }
        }
        progress.add_total(2 * sharers.len() as u64);
        for index in 0..self.l1.len() {
            let raw = self.l1[index];
            if raw == 0 {
                continue;
            }
            if L1Entry::reserved_bits(raw) != 0 {
                report.add(
                    Severity::Corruption,
                    false,
                    format!("ERROR found L1 entry with reserved bits set: {raw:x}"),
                );
            }
            let offset = raw & OFFSET_MASK;
            if offset == 0 {
                if raw & COPIED != 0 {
                    report.add(
                        Severity::Corruption,
                        false,
                        format!(
                            "ERROR l2_offset=0: L1 entry without a table has the copied flag; L1 entry corrupted \
                             (l1_index={index} l1_entry={raw:x})"
                        ),
                    );
                    self.incomplete = true;
                }
                continue;
            }
            // Only the first entry of those that share a table takes it out of the map.
            let Some(times) = sharers.remove(&offset) else {
                continue;
            };
            stop_if_cancelled(progress)?;
            let inside = self.count(offset, self.geometry.cluster_size(), times, report)?;
            if !self.geometry.is_aligned(HostOffset(offset)) {
                report.add(
                    Severity::Corruption,
                    false,
                    format!(
                        "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                    ),
                );
                self.incomplete = true;
            } else if inside {
                self.l2_table(offset, times, mode, report).await?;
            } else {
                self.incomplete = true;
            }
            progress.advance(1);
        }
        Ok(())
    }

    async fn l2_table(
        &mut self,
        offset: u64,
        times: u64,
        mode: CheckMode,
        report: &mut CheckReport,
    ) -> Result<()> {
        let len = self.geometry.cluster_size() as usize;
        let mut table = match self.file.read_padded(offset, len).await {
            Ok(table) => table,
            Err(error) => {
                report.add(
                    Severity::CheckError,
                    false,
                    format!("ERROR: I/O error in check_refcounts_l2: {}", error.reason()),
                );
                self.unreadable.insert(offset);
                self.incomplete = true;
                return Ok(());
            }
        };
        let mut statistics = TableStatistics::default();
        let mut expected_next = 0;
        let mut changed = false;
        for at in (0..len).step_by(8) {
            let Some(raw) = be64s(&table[at..at + 8]).next() else {
                continue;
            };
            if raw == 0 {
                continue;
            }
            let replacement = self.l2_entry(
                raw,
                times,
                mode,
                &mut expected_next,
                &mut statistics,
                report,
            )?;
            if let Some(replacement) = replacement {
                table[at..at + 8].copy_from_slice(&replacement.to_be_bytes());
                changed = true;
            }
        }
        if changed {
            let bytes = Buffer::from(&table[..]);
            self.file
                .write(offset, bytes, RequestFlags::empty())
                .await?;
            self.repaired = true;
        }
        report.allocated_clusters += statistics.allocated * times;
        report.compressed_clusters += statistics.compressed * times;
        report.fragmented_clusters += statistics.fragmented * times;
        Ok(())
    }

    /// Counts what one entry references. Gives back what to write in its place.
    fn l2_entry(
        &mut self,
        raw: u64,
        times: u64,
        mode: CheckMode,
        expected_next: &mut u64,
        statistics: &mut TableStatistics,
        report: &mut CheckReport,
    ) -> Result<Option<u64>> {
        let geometry = self.geometry;
        if raw & COMPRESSED != 0 {
            let (offset, len) = compressed_run(raw, geometry);
            if raw & COPIED != 0 {
                report.add(
                    Severity::Corruption,
                    false,
                    format!(
                        "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
                    ),
                );
            }
            statistics.allocated += 1;
            statistics.compressed += 1;
            // Compressed clusters are fragmented by nature.
            statistics.fragmented += 1;
            self.count(offset, len, times, report)?;
            return Ok(None);
        }
        if L2Entry::reserved_bits(raw, geometry) != 0 {
            report.add(
                Severity::Corruption,
                false,
                format!("ERROR found l2 entry with reserved bits set: {raw:x}"),
            );
        }
        let offset = raw & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        if !geometry.is_aligned(HostOffset(offset)) {
            if raw & ZERO != 0 && geometry.has_zero_flag() {
                let fix = mode == CheckMode::RepairAll;
                report.add(
                    Severity::Corruption,
                    fix,
                    format!(
                        "{} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
                        if fix { "Repairing" } else { "ERROR" }
                    ),
                );
                if fix {
                    return Ok(Some(L2Entry::ZeroPlain.encode(geometry).descriptor));
                }
            } else {
                report.add(
                    Severity::Corruption,
                    false,
                    format!(
                        "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
                    ),
                );
            }
        }
        statistics.allocated += 1;
        if *expected_next != 0 && offset != *expected_next {
            statistics.fragmented += 1;
        }
        *expected_next = offset + geometry.cluster_size();
        self.count(offset, geometry.cluster_size(), times, report)?;
        Ok(None)
    }

    fn refcount_blocks(
        &mut self,
        stored: &Stored<'_>,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<()> {
        let bits = self.geometry.cluster_bits();
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
                BlockPlace::At(offset) if offset.0 >= self.file_len => {
                    self.broken(report, format!("ERROR refcount block {index} is outside image"));
                }
                BlockPlace::At(offset) => {
                    let references = self.counts.add(offset.0 >> bits, 1)?;
                    *self.structures.entry(offset.0 >> bits).or_default() += 1;
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

/// Offset and length of a compressed run, whatever the bits say.
fn compressed_run(raw: u64, geometry: Geometry) -> (u64, u64) {
    let offset_bits = 70 - geometry.cluster_bits();
    let offset = raw & ((1 << offset_bits) - 1);
    let sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
    (offset, (sectors + 1) * 512 - offset % 512)
}
