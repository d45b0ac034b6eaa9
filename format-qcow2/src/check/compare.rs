//! Compares the refcounts that are stored with the references that were counted, and corrects them where a refcount
//! block is there to be corrected.

use block_core::{
    error::{ErrorKind, Result},
    image::{CheckMode, CheckReport, Progress, Severity},
};

use super::{
    counts::Bits,
    stored::{BlockPlace, Stored},
    walk::{Walk, stop_if_cancelled},
};
use crate::layout::{Header, Refcounts};

/// Findings about one block that can't be read are given with their text up to this many; all are counted.
const MAX_UNREADABLE_TEXTS: u64 = 1000;
/// Clusters that are compared at once.
const STEP: u64 = 4096;

/// What [`compare`] does about differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fix {
    /// Lower refcounts that are too high.
    pub leaks: bool,
    /// Raise refcounts that are too low.
    pub errors: bool,
}

impl Fix {
    pub const NOTHING: Self = Self {
        leaks: false,
        errors: false,
    };

    /// What `mode` allows. Leaks are left alone while a part of the mapping can't be followed: what looks like a leak
    /// may be the user's data.
    pub fn allowed(mode: CheckMode, walk: &Walk<'_>, keep_leaks: bool) -> Self {
        Self {
            leaks: mode != CheckMode::ReadOnly && !walk.incomplete && !keep_leaks,
            errors: mode == CheckMode::RepairAll,
        }
    }
}

/// What the comparison found, besides what is in the report.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// A cluster in use has the stored refcount 0, or none that can be read.
    pub rebuild: bool,
    /// Clusters whose refcount is exactly 1, after the corrections.
    pub unique: Bits,
    /// Clusters with several references that may be more than the format allows: metadata with something else, or
    /// more than the refcount says.
    pub suspicious: Bits,
    /// Why reading refcounts failed, although it may succeed another time.
    pub unread: Option<String>,
    /// A refcount other than 0 and 1, or another number of references: COPIED flags can't all be set.
    pub shared: bool,
}

struct Comparison<'w, 'a> {
    walk: &'w Walk<'a>,
    fix: Fix,
    max: u64,
    /// The first cluster behind the last one in use.
    end: u64,
    outcome: Outcome,
}

/// Compares all clusters up to the end of the file and reports the differences. Corrections are written to the blocks
/// in memory; the caller writes them back.
pub(super) async fn compare(
    walk: &Walk<'_>,
    header: &Header,
    stored: &mut Stored<'_>,
    fix: Fix,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<Outcome> {
    let geometry = walk.geometry;
    let clusters = walk.clusters();
    let per_block = geometry.refcounts_per_block();
    let refcounts = Refcounts::from(geometry);
    let mut state = Comparison {
        walk,
        fix,
        max: geometry.refcount_max(),
        end: 0,
        outcome: Outcome::default(),
    };
    let blocks = header
        .refcount_table_entries()
        .min(clusters.div_ceil(per_block));
    progress.add_total(blocks);
    if let Some(reason) = stored.unreadable() {
        // The walk has told of it. Whether the refcounts are wrong nobody knows.
        state.outcome.unread = Some(reason.to_owned());
        state.unknown(0, clusters)?;
        report.image_end_offset = Some(state.end << geometry.cluster_bits());
        return Ok(state.outcome);
    }
    let mut references = vec![0; STEP as usize];
    for index in 0..blocks {
        stop_if_cancelled(progress)?;
        progress.advance(1);
        let first = index * per_block;
        let last = clusters.min(first + per_block);
        if stored.place(index) == BlockPlace::Absent {
            state.without_block(first, last, stored, report).await?;
            continue;
        }
        let reason = match stored.block_bytes(index).await {
            Ok(Some(block)) => {
                // A copy, so that corrections can go to the block meanwhile. It is one cluster.
                let block = block.to_vec();
                let mut base = first;
                while base < last {
                    let references = &mut references[..STEP.min(last - base) as usize];
                    walk.counts.read(base, references);
                    let at = (base - first) as usize;
                    for (index, references) in references.iter().enumerate() {
                        let value = refcounts.get(&block, at + index);
                        let cluster = base + index as u64;
                        if value == *references && value <= 1 {
                            // The common case, without a future.
                            if value > 0 {
                                state.end = cluster + 1;
                                state.outcome.unique.insert(cluster)?;
                            }
                            continue;
                        }
                        state
                            .cluster(cluster, value, *references, stored, report)
                            .await?;
                    }
                    base += STEP;
                }
                continue;
            }
            Ok(None) => "no refcount block".into(),
            Err(error) => {
                // A place where no block can be is damage, and no other attempt finds it mended.
                if error.kind() != ErrorKind::Corrupt {
                    state.outcome.unread = Some(error.reason());
                }
                error.reason()
            }
        };
        for cluster in first..last.min(first + MAX_UNREADABLE_TEXTS) {
            report.add(
                Severity::CheckError,
                false,
                format!("Can't get refcount for cluster {cluster}: {reason}"),
            );
        }
        report.check_errors += (last - first).saturating_sub(MAX_UNREADABLE_TEXTS);
        state.unknown(first, last)?;
    }
    state
        .without_block(blocks * per_block, clusters, stored, report)
        .await?;
    report.image_end_offset = Some(state.end << geometry.cluster_bits());
    Ok(state.outcome)
}

impl Comparison<'_, '_> {
    /// Clusters of which nobody knows the refcounts.
    fn unknown(&mut self, first: u64, last: u64) -> Result<()> {
        self.outcome.rebuild = true;
        let mut from = first;
        while let Some(cluster) = self.walk.counts.next_used(from, last) {
            self.end = cluster + 1;
            self.suspect(cluster, 0, self.walk.counts.get(cluster))?;
            from = cluster + 1;
        }
        Ok(())
    }

    /// Clusters whose refcounts are 0 because there is no block.
    async fn without_block(
        &mut self,
        first: u64,
        last: u64,
        stored: &mut Stored<'_>,
        report: &mut CheckReport,
    ) -> Result<()> {
        let mut from = first;
        while let Some(cluster) = self.walk.counts.next_used(from, last) {
            let references = self.walk.counts.get(cluster);
            self.cluster(cluster, 0, references, stored, report).await?;
            from = cluster + 1;
        }
        Ok(())
    }

    /// Notes a cluster with several references unless they are what the format allows.
    fn suspect(&mut self, cluster: u64, refcount: u64, references: u64) -> Result<()> {
        if references < 2 {
            return Ok(());
        }
        let tables = self.walk.l2_references.get(cluster);
        if refcount < references
            || self.walk.metadata.contains(cluster)
            || (tables > 0 && tables != references)
        {
            self.outcome.suspicious.insert(cluster)?;
        }
        Ok(())
    }

    async fn cluster(
        &mut self,
        cluster: u64,
        refcount: u64,
        references: u64,
        stored: &mut Stored<'_>,
        report: &mut CheckReport,
    ) -> Result<()> {
        if refcount > 0 || references > 0 {
            self.end = cluster + 1;
        }
        self.outcome.shared = true;
        self.suspect(cluster, refcount, references)?;
        let after = self
            .correct(cluster, refcount, references, stored, report)
            .await?;
        if after == 1 {
            self.outcome.unique.insert(cluster)?;
        }
        Ok(())
    }

    /// Reports a difference and corrects it if it may. Gives back the refcount afterwards.
    async fn correct(
        &mut self,
        cluster: u64,
        refcount: u64,
        references: u64,
        stored: &mut Stored<'_>,
        report: &mut CheckReport,
    ) -> Result<u64> {
        if refcount == references {
            return Ok(refcount);
        }
        let difference = format!("cluster {cluster} refcount={refcount} reference={references}");
        if refcount > references {
            if self.fix.leaks {
                stored.set(cluster, references).await?;
                report.add(Severity::Leak, true, format!("Repairing {difference}"));
                return Ok(references);
            }
            if self.walk.unread {
                // It may as well belong to what couldn't be read.
                report.uncertain += 1;
                return Ok(refcount);
            }
            report.add(Severity::Leak, false, format!("Leaked {difference}"));
            return Ok(refcount);
        }
        if refcount == 0 {
            // Nothing tells how much else is missing: new structures are safer than patched ones.
            self.outcome.rebuild = true;
        }
        if references > self.max {
            report.add(
                Severity::Corruption,
                false,
                format!(
                    "ERROR: overflow cluster offset={:#x}: {difference}; the refcount width is too small",
                    cluster << self.walk.geometry.cluster_bits()
                ),
            );
        } else if self.fix.errors && refcount > 0 {
            stored.set(cluster, references).await?;
            report.add(
                Severity::Corruption,
                true,
                format!("Repairing {difference}"),
            );
            return Ok(references);
        } else {
            report.add(Severity::Corruption, false, format!("ERROR {difference}"));
        }
        Ok(refcount)
    }
}
