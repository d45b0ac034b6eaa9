//! Host clusters: handing out free ones, and dropping references.
//!
//! A cluster is free when its refcount is 0, in memory. What was handed out belongs to an [`Allocation`] until the step
//! that links it consumes that; dropped before, it gives the clusters back. Everything here runs under the metadata lock,
//! except `Drop`, which only leaves a note for whoever takes the lock next.

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::Child,
};
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::quarantine::Freed;
use crate::{
    layout::{CompressedRun, HostCluster, HostOffset, entry, header::field},
    meta::Meta,
    overlap::Kinds,
};

/// Consecutive host clusters: the first, and how many.
pub(crate) type HostRun = (HostCluster, u64);
pub(crate) type HostRuns = SmallVec<[HostRun; 4]>;

/// Clusters that were given up without having been linked.
pub(crate) type Orphans = Arc<Mutex<Vec<HostRun>>>;

/// In how many pieces the clusters of one allocation may lie.
const MAX_RUNS: usize = 8;

/// Clusters (or, for compressed data, references to clusters) that nothing on disk or in a table refers to yet.
#[derive(Debug)]
#[must_use = "dropping it gives the clusters back"]
pub(crate) struct Allocation {
    runs: HostRuns,
    orphans: Orphans,
}

impl Allocation {
    pub fn new(orphans: &Orphans) -> Self {
        Self {
            runs: HostRuns::new(),
            orphans: orphans.clone(),
        }
    }

    fn push(&mut self, first: HostCluster, count: u64) {
        match self.runs.last_mut() {
            Some((start, len)) if start.0 + *len == first.0 => *len += count,
            _ => self.runs.push((first, count)),
        }
    }

    pub fn runs(&self) -> &[HostRun] {
        &self.runs
    }

    pub fn count(&self) -> u64 {
        self.runs.iter().map(|(_, count)| count).sum()
    }

    /// The first cluster; there always is one in what `allocate` gives.
    pub fn first(&self) -> HostCluster {
        self.runs
            .first()
            .map_or(HostCluster(0), |(first, _)| *first)
    }

    /// The clusters one by one.
    pub fn clusters(&self) -> impl Iterator<Item = HostCluster> + '_ {
        self.runs
            .iter()
            .flat_map(|(first, count)| (first.0..first.0 + count).map(HostCluster))
    }

    /// For a seeded bug: the same clusters once more.
    pub fn copy_for_mutant(&self) -> Self {
        Self {
            runs: self.runs.clone(),
            orphans: self.orphans.clone(),
        }
    }

    /// They are linked now.
    pub fn linked(mut self) {
        self.runs.clear();
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if !self.runs.is_empty() {
            self.orphans.lock().extend(self.runs.drain(..));
        }
    }
}

impl Meta {
    /// Takes back what dropped allocations held. Nothing ever referred to it, so it is free at once.
    pub async fn adopt_orphans(&mut self, file: &Child) -> Result<()> {
        loop {
            let Some((first, count)) = self.orphans.lock().pop() else {
                return Ok(());
            };
            if mutant::is_active("qcow2-failed-allocation-leaks") {
                continue;
            }
            for cluster in first.0..first.0 + count {
                self.unlinked.remove(&cluster);
                self.drop_reference(file, HostCluster(cluster)).await?;
            }
        }
    }

    /// Lowers a refcount in memory; at 0 the cluster is allocatable.
    pub async fn drop_reference(&mut self, file: &Child, cluster: HostCluster) -> Result<()> {
        if self.refcounts.decrement(file, cluster).await? == 0 {
            if !mutant::is_active("qcow2-freed-space-never-reused") {
                self.hint = self.hint.min(cluster.0);
            }
            let packing = self.packing.map(|at| self.geometry.host_cluster_of(at));
            if packing == Some(cluster) {
                self.packing = None;
            }
        }
        Ok(())
    }

    /// Notes that a reference to each of the clusters from `first` to `last` is being unlinked. The references themselves
    /// are dropped out of the quarantine (or, without safeguards, at once).
    ///
    /// # Errors
    /// `Corrupt` when there is no reference left that could be dropped to one of them; nothing was changed then.
    pub async fn unreference(
        &mut self,
        file: &Child,
        first: u64,
        last: u64,
        punch: bool,
        freed: &mut Freed,
    ) -> Result<()> {
        file.debug_event(DebugEvent::ClusterFree).await;
        for cluster in (first..=last).map(HostCluster) {
            let references = self.refcounts.get(file, cluster).await?;
            if self.safeguards && references <= self.quarantine.pending(cluster.0) {
                return Err(Error::corrupt(format!(
                    "Freeing host cluster at offset {}, whose refcount is {references}",
                    self.geometry.host_start(cluster)
                )));
            }
            // The refcount may be 0 here in a race; a driver without safeguards doesn't notice.
            if !self.safeguards && references > 0 {
                self.drop_reference(file, cluster).await?;
            }
        }
        for cluster in first..=last {
            if self.safeguards {
                self.quarantine.note(cluster);
            }
            freed.push(cluster, punch);
        }
        Ok(())
    }

    /// The first cluster that no entry can point to.
    fn cluster_limit(&self) -> u64 {
        entry::MAX_HOST_OFFSET >> self.geometry.cluster_bits()
    }

    /// Hands out up to `want` clusters, in few pieces, at least one.
    ///
    /// # Errors
    /// ENOSPC when the format's limits are reached, EIO when refcounts can't be read.
    pub async fn allocate(&mut self, file: &Child, want: u64) -> Result<Allocation> {
        file.debug_event(DebugEvent::ClusterAlloc).await;
        let mut allocation = Allocation::new(&self.orphans);
        let mut left = want;
        while left > 0 && allocation.runs.len() < MAX_RUNS {
            let (first, count) = self.take_free(file, left).await?;
            allocation.push(first, count);
            left -= count;
        }
        Ok(allocation)
    }

    /// Hands out `want` clusters in one piece.
    pub async fn allocate_contiguous(&mut self, file: &Child, want: u64) -> Result<Allocation> {
        let allocation = self.allocate(file, want).await?;
        if allocation.runs.len() == 1 && allocation.count() == want {
            return Ok(allocation);
        }
        // What was found goes back when the allocation is dropped.
        drop(allocation);
        self.allocate_at_end(file, want).await
    }

    /// The first free run at or after the hint.
    async fn take_free(&mut self, file: &Child, want: u64) -> Result<HostRun> {
        self.metadata.check_sound()?;
        loop {
            let Some((first, count)) = self
                .refcounts
                .find_free(file, HostCluster(self.hint), want)
                .await?
            else {
                self.grow_refcount_table(file).await?;
                continue;
            };
            if first.0 + count > self.cluster_limit() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "No more host clusters in this format",
                ));
            }
            let table_index = self.geometry.refcount_table_index(first);
            if self.refcounts.block_offset(table_index).is_none() {
                let place = table_index << self.geometry.refcount_block_bits();
                self.metadata.check(place, 1, self.geometry)?;
                // A block counts itself: nobody else can be given its place from here on.
                let place_of_block = HostCluster(place);
                self.tap.tell(|| self.refcounts.taken(place_of_block));
                let added = match self.reserve(file, place_of_block, 1).await {
                    Ok(()) => self.refcounts.add_block(table_index),
                    Err(error) => Err(error),
                };
                if let Err(error) = added {
                    self.tap.tell(|| self.refcounts.freed(place_of_block));
                    return Err(error);
                }
                self.metadata.add(Kinds::REFCOUNT_BLOCK, [place]);
                continue;
            }
            self.metadata.check(first.0, count, self.geometry)?;
            if first.0 == 0 {
                return Err(Error::corrupt(
                    "Preventing invalid allocation of cluster at offset 0",
                ));
            }
            for cluster in first.0..first.0 + count {
                self.refcounts.increment(file, HostCluster(cluster)).await?;
                self.unlinked.insert(cluster);
            }
            self.hint = first.0 + count;
            return Ok((first, count));
        }
    }

    /// Makes sure that there is space for new refcount blocks before anything depends on them: a block that can't be
    /// written would fail every batch from then on.
    async fn reserve(&self, file: &Child, first: HostCluster, count: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        file.debug_event(DebugEvent::RefblockAlloc).await;
        file.debug_event(DebugEvent::RefblockAllocWrite).await;
        for n in 0..count {
            let host = self.geometry.host_start(HostCluster(first.0 + n));
            file.write(host.0, IoBuf::zeroes(size as usize), RequestFlags::empty())
                .await?;
        }
        Ok(())
    }

    /// Clusters in one piece behind everything that any refcount block describes, with new blocks for them in front.
    async fn allocate_at_end(&mut self, file: &Child, want: u64) -> Result<Allocation> {
        let per_block = self.geometry.refcounts_per_block();
        let mut blocks = 1;
        while (blocks + want).div_ceil(per_block) > blocks {
            blocks = (blocks + want).div_ceil(per_block);
        }
        let mut first_index = self.refcounts.blocks_end();
        while first_index + blocks > self.refcounts.table_len() {
            self.grow_refcount_table(file).await?;
            first_index = self.refcounts.blocks_end();
        }
        let start = first_index << self.geometry.refcount_block_bits();
        if start + blocks + want > self.cluster_limit() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "No more host clusters in this format",
            ));
        }
        self.metadata.check(start, blocks + want, self.geometry)?;
        self.reserve(file, HostCluster(start), blocks).await?;
        self.refcounts.add_blocks(first_index, blocks)?;
        self.metadata
            .add(Kinds::REFCOUNT_BLOCK, start..start + blocks);
        for cluster in start..start + blocks {
            self.refcounts.increment(file, HostCluster(cluster)).await?;
        }
        let mut allocation = Allocation::new(&self.orphans);
        for cluster in start + blocks..start + blocks + want {
            self.refcounts.increment(file, HostCluster(cluster)).await?;
            self.unlinked.insert(cluster);
            allocation.push(HostCluster(cluster), 1);
        }
        Ok(allocation)
    }

    /// Room for `len` compressed bytes, packed right behind the last piece where that is possible. The allocation holds
    /// one reference for each host cluster that the run touches.
    pub async fn allocate_bytes(
        &mut self,
        file: &Child,
        len: u64,
    ) -> Result<(CompressedRun, Allocation)> {
        file.debug_event(DebugEvent::ClusterAllocBytes).await;
        let geometry = self.geometry;
        let size = geometry.cluster_size();
        let mut allocation = Allocation::new(&self.orphans);
        if let Some(at) = self.packing {
            let cluster = geometry.host_cluster_of(at);
            let room = size - geometry.within(at.0);
            let references = self.refcounts.get(file, cluster).await?;
            let may_share = references > self.quarantine.pending(cluster.0)
                && references < self.refcounts.max();
            if may_share && len <= room {
                if !mutant::is_active("qcow2-packed-neighbour-not-counted") {
                    self.refcounts.increment(file, cluster).await?;
                }
                allocation.push(cluster, 1);
                return self.packed(at, len, allocation);
            }
            if may_share {
                // The run may go on in the next host cluster if that happens to be free.
                let next = HostCluster(cluster.0 + 1);
                let described = geometry.refcount_table_index(next);
                if self.refcounts.block_offset(described).is_some()
                    && self.refcounts.get(file, next).await? == 0
                {
                    self.metadata.check(next.0, 1, self.geometry)?;
                    self.refcounts.increment(file, cluster).await?;
                    allocation.push(cluster, 1);
                    self.refcounts.increment(file, next).await?;
                    allocation.push(next, 1);
                    if self.hint == next.0 {
                        self.hint += 1;
                    }
                    return self.packed(at, len, allocation);
                }
            }
        }
        self.packing = None;
        let (first, _) = self.take_free(file, 1).await?;
        self.unlinked.remove(&first.0);
        allocation.push(first, 1);
        self.packed(geometry.host_start(first), len, allocation)
    }

    fn packed(
        &mut self,
        at: HostOffset,
        len: u64,
        allocation: Allocation,
    ) -> Result<(CompressedRun, Allocation)> {
        let run = CompressedRun::new(at, len, self.geometry).ok_or_else(|| {
            Error::new(
                ErrorKind::NoSpace,
                format!("Compressed data can't be stored at {at}"),
            )
        })?;
        let end = HostOffset(at.0 + len);
        self.packing = (self.geometry.within(end.0) != 0).then_some(end);
        Ok((run, allocation))
    }

    /// A larger refcount table; see [`crate::cache::refcounts::RefcountStore::grow_table`].
    async fn grow_refcount_table(&mut self, file: &Child) -> Result<()> {
        let start = self.refcounts.table_covers();
        self.metadata.check_from(start, self.geometry)?;
        let old = self.refcounts.place();
        let limit = self.cluster_limit();
        let failure = self.failure.clone();
        let place = self.refcounts.grow_table(file, &failure, limit).await?;
        // From here on the header may point to the new table, which stays allocated whatever happens. When it is
        // unknown which table counts, the old one does, too.
        let end = self.geometry.host_cluster_of(place.offset).0 + u64::from(place.clusters);
        let table = self.geometry.host_cluster_of(place.offset).0;
        self.metadata.add(Kinds::REFCOUNT_BLOCK, start..table);
        self.metadata.add(Kinds::REFCOUNT_TABLE, table..end);
        file.debug_event(DebugEvent::RefblockAllocSwitchTable).await;
        let mut bytes = place.offset.0.to_be_bytes().to_vec();
        bytes.extend_from_slice(&place.clusters.to_be_bytes());
        crate::meta::write_header_field(file, &failure, field::REFCOUNT_TABLE, bytes).await?;
        self.refcounts.moved(place);
        self.header.refcount_table_offset = place.offset;
        self.header.refcount_table_clusters = place.clusters;
        // The header on disk no longer refers to the old table.
        let first = self.geometry.host_cluster_of(old.offset).0;
        for cluster in first..first + u64::from(old.clusters) {
            self.metadata.remove(Kinds::REFCOUNT_TABLE, [cluster]);
            self.drop_reference(file, HostCluster(cluster)).await?;
        }
        Ok(())
    }
}
