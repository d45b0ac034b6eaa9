//! Follows the L1 tables of the disk and of its snapshots to the L2 tables, and counts what they reference.
//!
//! Every L2 table is read once, however many L1 entries of however many snapshots lead to it; its references count as often
//! as it is referenced. A table that isn't where a cluster begins is never followed. Entries that can be set right
//! without a change of what the guest reads are (see `table`); nothing else is written here.

use std::collections::HashMap;

use block_core::{
    error::Result,
    image::{CheckReport, Progress, Severity},
};
use futures::StreamExt;

use super::{
    counts::{Bits, Counts},
    snapshots::Snapshot,
    table::{Scan, Table, scan},
    tables::scan_tables,
    walk::{Claimed, Crowded, Kind, Walk, stop_if_cancelled},
};
use crate::layout::{
    Header, L1Entry,
    entry::{COPIED, OFFSET_MASK, be64s},
};

/// L1 tables of snapshots are followed up to this many bytes, and twice the file's length. More can't be without overlaps.
const MAX_L1_TABLES: u64 = 64 << 20;

/// An L1 table and whose it is.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub offset: u64,
    /// Entries, as the header or the snapshot table has it.
    pub size: u64,
    /// The snapshots that it belongs to; none for the active table.
    pub snapshots: Vec<String>,
    /// Where their entries are in the snapshot table.
    fields: Vec<usize>,
}

impl Tree {
    /// References that one of its entries makes.
    pub fn times(&self) -> u64 {
        self.snapshots.len().max(1) as u64
    }

    pub fn is_active(&self) -> bool {
        self.snapshots.is_empty()
    }

    fn kind(&self) -> Kind {
        if self.is_active() {
            Kind::L1Table
        } else {
            Kind::SnapshotL1Table
        }
    }
}

impl Walk<'_> {
    /// The entries of an L1 table that lie within the file; those beyond its end are zeroes.
    pub async fn read_l1(&self, tree: &Tree) -> Result<Vec<u64>> {
        // At most 32 MiB: headers and snapshots with more were refused.
        let inside = self.shape.file_len.saturating_sub(tree.offset).div_ceil(8);
        let len = tree.size.min(inside) as usize * 8;
        if len == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.file.read_padded(tree.offset, len).await?;
        Ok(be64s(&bytes).collect())
    }

    /// Whether an L1 entry leads to a table that can be read.
    pub fn leads_to_table(&self, raw: u64) -> Option<u64> {
        let offset = raw & OFFSET_MASK;
        let there = offset != 0
            && self.shape.is_aligned(offset)
            && !self.shape.is_outside(offset, self.shape.cluster_size());
        there.then_some(offset)
    }

    /// The L1 tables to follow. Snapshots that share one, as only damage makes them, are one tree.
    fn plant(&mut self, header: &Header, snapshots: &[Snapshot], report: &mut CheckReport) {
        if header.l1_size > 0 {
            self.trees.push(Tree {
                offset: header.l1_table_offset.0,
                size: header.l1_size.into(),
                snapshots: Vec::new(),
                fields: Vec::new(),
            });
        }
        let mut known: HashMap<(u64, u64), usize> = HashMap::new();
        let most = self.shape.file_len.saturating_mul(2).max(MAX_L1_TABLES);
        let mut bytes = 0u64;
        for snapshot in snapshots.iter().filter(|snapshot| snapshot.l1_size > 0) {
            let key = (snapshot.l1_offset, u64::from(snapshot.l1_size));
            if let Some(at) = known.get(&key) {
                let tree = &mut self.trees[*at];
                let fix = self.shape.repair;
                report.add(
                    Severity::Corruption,
                    fix,
                    format!(
                        "{} snapshot '{}' has the L1 table of snapshot '{}'",
                        if fix { "Repairing" } else { "ERROR" },
                        snapshot.label(),
                        tree.snapshots[0]
                    ),
                );
                tree.snapshots.push(snapshot.label());
                tree.fields.push(snapshot.field);
                continue;
            }
            bytes = bytes.saturating_add(key.1 * 8);
            if bytes > most {
                report.add(
                    Severity::Corruption,
                    false,
                    "ERROR the L1 tables of the snapshots overlap; some were not followed",
                );
                self.incomplete = true;
                return;
            }
            known.insert(key, self.trees.len());
            self.trees.push(Tree {
                offset: key.0,
                size: key.1,
                snapshots: vec![snapshot.label()],
                fields: vec![snapshot.field],
            });
        }
    }

    /// Counts what the disk and all snapshots reference.
    pub(super) async fn mapping(
        &mut self,
        header: &Header,
        snapshots: &[Snapshot],
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<()> {
        self.plant(header, snapshots, report);
        let trees = std::mem::take(&mut self.trees);
        if trees.iter().any(|tree| !tree.is_active()) {
            self.active_references = Some(Counts::new(header.refcount_order));
        }
        // First how often each table is referenced, then what is in it.
        let mut readable = vec![false; trees.len()];
        for (tree, readable) in trees.iter().zip(&mut readable) {
            stop_if_cancelled(progress)?;
            let (offset, len) = (tree.offset, tree.size * 8);
            let claimed = self.claim_metadata(tree.kind(), offset, len, tree.times(), report)?;
            self.incomplete |= claimed == Claimed::Outside;
            let crowded = |snapshot| Crowded {
                offset,
                len,
                snapshot,
            };
            match claimed {
                Claimed::Outside => {}
                Claimed::Shared if tree.is_active() => self.crowded.push(crowded(None)),
                _ => {
                    // Who has a place for itself stays, if anybody has.
                    let first = usize::from(claimed == Claimed::Alone);
                    let leaving = tree.fields.iter().skip(first);
                    self.crowded
                        .extend(leaving.map(|field| crowded(Some(*field))));
                }
            }
            let l1 = match self.read_l1(tree).await {
                Ok(l1) => l1,
                Err(error) => {
                    report.add(
                        Severity::CheckError,
                        false,
                        format!("ERROR: I/O error in check_refcounts_l1: {}", error.reason()),
                    );
                    self.note_unread();
                    continue;
                }
            };
            *readable = true;
            let mut entries = 0;
            for raw in &l1 {
                let Some(offset) = self.leads_to_table(*raw) else {
                    continue;
                };
                let cluster = offset >> self.shape.cluster_bits;
                if self.l2_references.add(cluster, tree.times())? == tree.times() {
                    entries += 1;
                }
                if tree.is_active()
                    && let Some(active) = &mut self.active_references
                {
                    active.add(cluster, 1)?;
                }
            }
            progress.add_total(2 * entries);
            if tree.is_active() {
                self.l1 = l1;
            }
        }
        let mut visited = Bits::default();
        for (tree, _) in trees.iter().zip(readable).filter(|(_, readable)| *readable) {
            let tables = self.l1_entries(tree, &mut visited, report).await?;
            self.l2_tables(&tables, report, progress).await?;
        }
        self.trees = trees;
        Ok(())
    }

    /// Looks at the entries of one L1 table. Gives back the L2 tables that weren't visited yet.
    async fn l1_entries(
        &mut self,
        tree: &Tree,
        visited: &mut Bits,
        report: &mut CheckReport,
    ) -> Result<Vec<Table>> {
        let mut l1 = if tree.is_active() {
            std::mem::take(&mut self.l1)
        } else {
            self.read_l1(tree).await?
        };
        let mut tables = Vec::new();
        for (index, raw) in l1.iter_mut().enumerate().filter(|(_, raw)| **raw != 0) {
            if L1Entry::reserved_bits(*raw) != 0 {
                // Readers don't look at them.
                let fix = self.shape.repair;
                report.add(
                    Severity::Corruption,
                    fix,
                    format!(
                        "{} found L1 entry with reserved bits set: {raw:x}",
                        if fix { "Repairing" } else { "ERROR" }
                    ),
                );
                if fix {
                    *raw &= OFFSET_MASK | COPIED;
                    let at = tree.offset + index as u64 * 8;
                    self.patch(at, raw.to_be_bytes().to_vec()).await?;
                }
            }
            let offset = *raw & OFFSET_MASK;
            if offset == 0 {
                if *raw & COPIED != 0 {
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
            } else if self.leads_to_table(*raw).is_some() {
                let cluster = offset >> self.shape.cluster_bits;
                if visited.insert(cluster)? {
                    self.counts.add(cluster, self.l2_references.get(cluster))?;
                    tables.push(Table {
                        offset,
                        l1_index: index as u64,
                    });
                }
                self.unflagged |= *raw & COPIED == 0;
            } else {
                self.count(offset, self.shape.cluster_size(), tree.times(), report)?;
                if !self.shape.is_aligned(offset) {
                    report.add(
                        Severity::Corruption,
                        false,
                        format!(
                            "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                        ),
                    );
                }
                self.incomplete = true;
            }
        }
        if tree.is_active() {
            self.l1 = l1;
        }
        Ok(tables)
    }

    async fn l2_tables(
        &mut self,
        tables: &[Table],
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<()> {
        let shape = self.shape;
        let file = self.file;
        let look = move |bytes: &[u8], table| scan(bytes, table, shape);
        let mut found = scan_tables(file, tables, shape.cluster_size(), look);
        while let Some(batch) = found.next().await {
            stop_if_cancelled(progress)?;
            for (table, found) in batch? {
                progress.advance(1);
                match found {
                    Ok(found) => self.l2_table(table, found, report).await?,
                    Err(error) => {
                        report.add(
                            Severity::CheckError,
                            false,
                            format!("ERROR: I/O error in check_refcounts_l2: {}", error.reason()),
                        );
                        self.unreadable.insert(table.offset >> shape.cluster_bits)?;
                        self.note_unread();
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes over what was found in one table.
    async fn l2_table(
        &mut self,
        table: Table,
        found: Scan,
        report: &mut CheckReport,
    ) -> Result<()> {
        let cluster = table.offset >> self.shape.cluster_bits;
        let times = self.l2_references.get(cluster);
        let active = self
            .active_references
            .as_ref()
            .map_or(times, |active| active.get(cluster));
        for run in found.runs {
            let times = run.times.saturating_mul(times);
            self.counts.add_run(run.first, run.clusters, times)?;
        }
        for run in found.past_end {
            self.note_past_end(run.first, run.clusters);
        }
        self.unflagged |= found.unflagged;
        for change in &found.changes {
            let mut bytes = change.descriptor.to_be_bytes().to_vec();
            if self.shape.extended {
                bytes.extend_from_slice(&change.bitmap.to_be_bytes());
            }
            let at = table.offset + (change.index * self.shape.entry_size()) as u64;
            self.patch(at, bytes).await?;
        }
        let found = found.report;
        self.compressed |= found.compressed_clusters > 0;
        let shown = |count: u64| count.saturating_mul(active);
        report.allocated_clusters += shown(found.allocated_clusters);
        report.compressed_clusters += shown(found.compressed_clusters);
        report.fragmented_clusters += shown(found.fragmented_clusters);
        report.absorb(found);
        Ok(())
    }
}
