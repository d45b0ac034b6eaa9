//! A second set of refcounts beside the one that the image has: what the refcounts will be after a change of the snapshots.
//!
//! The image's own refcount table and blocks are never touched. Blocks that change get a new place, and so does the table; all
//! new places are clusters that are free both before and after the change. So until the header points to the new table, the
//! image is what it was, and whatever was written belongs to nobody; from then on the old table and blocks belong to nobody.
//! There is no state in between that a power cut could leave. Memory is bounded: blocks that weren't used for long are written
//! to their new place and read again when they are needed.

use std::collections::BTreeSet;

use block_core::{
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    request::Child,
    space::{SpaceEvent, SpaceTap},
};

use crate::{
    cache::{refcounts::TablePlace, slice::NumberMap},
    layout::{Geometry, HostOffset, Refcounts, entry, header::MAX_REFCOUNT_TABLE_BYTES},
    overlap::MetadataMap,
};

/// Bytes of refcount blocks in memory, before and after the change together.
const MAX_CACHED: u64 = 64 << 20;

/// A refcount block.
struct Block {
    old: Vec<u8>,
    new: Vec<u8>,
    /// `new` isn't what is at its new place.
    dirty: bool,
    used: u64,
}

/// See the file's header.
pub(super) struct Shadow<'a> {
    file: &'a Child,
    metadata: &'a MetadataMap,
    geometry: Geometry,
    codec: Refcounts,
    old_place: TablePlace,
    /// Places of the image's blocks, 0 for none.
    old_table: Vec<u64>,
    /// Places of the blocks after the change. Where it differs from `old_table` the block has got its place.
    table: Vec<u64>,
    blocks: NumberMap<Block>,
    capacity: usize,
    clock: u64,
    /// Blocks that changed.
    changed: BTreeSet<u64>,
    /// Those among them that have no new place yet.
    unplaced: BTreeSet<u64>,
    /// No cluster below is free.
    hint: u64,
    tap: &'a SpaceTap,
    /// Clusters that were taken, as far as anybody listens. They are free again if the change comes to nothing.
    told: BTreeSet<u64>,
}

impl Drop for Shadow<'_> {
    fn drop(&mut self) {
        let len = self.geometry.cluster_size();
        for cluster in std::mem::take(&mut self.told) {
            let host = cluster << self.geometry.cluster_bits();
            self.tap.tell(|| SpaceEvent::Free { host, len });
        }
    }
}

impl<'a> Shadow<'a> {
    /// Begins with what the image has: its table is at `place`, with its blocks at `table`.
    pub fn new(
        file: &'a Child,
        metadata: &'a MetadataMap,
        geometry: Geometry,
        place: TablePlace,
        table: Vec<u64>,
        tap: &'a SpaceTap,
    ) -> Self {
        let blocks = (MAX_CACHED / 2) >> geometry.cluster_bits();
        Self {
            file,
            metadata,
            geometry,
            codec: Refcounts::new(geometry.refcount_order()),
            old_place: place,
            old_table: table.clone(),
            table,
            blocks: NumberMap::default(),
            capacity: blocks.max(16) as usize,
            clock: 0,
            changed: BTreeSet::new(),
            unplaced: BTreeSet::new(),
            hint: 1,
            tap,
            told: BTreeSet::new(),
        }
    }

    fn entry(table: &[u64], index: u64) -> u64 {
        usize::try_from(index)
            .ok()
            .and_then(|index| table.get(index))
            .copied()
            .unwrap_or(0)
    }

    fn is_placed(&self, index: u64) -> bool {
        Self::entry(&self.table, index) != Self::entry(&self.old_table, index)
    }

    async fn read_block(&self, raw: u64, index: u64) -> Result<Vec<u8>> {
        let len = self.geometry.cluster_size() as usize;
        if raw == 0 {
            return Ok(vec![0; len]);
        }
        if !self.geometry.is_aligned(HostOffset(raw)) {
            return Err(Error::corrupt(format!(
                "Refblock offset {raw:#x} unaligned (reftable index: {index:#x})"
            )));
        }
        self.file.debug_event(DebugEvent::RefblockLoad).await;
        Ok(self.file.read_padded(raw, len).await?.to_vec())
    }

    async fn block(&mut self, index: u64) -> Result<&mut Block> {
        self.clock += 1;
        let clock = self.clock;
        if !self.blocks.contains_key(&index) {
            let old = self
                .read_block(Self::entry(&self.old_table, index), index)
                .await?;
            let new = if self.is_placed(index) {
                self.read_block(Self::entry(&self.table, index), index)
                    .await?
            } else {
                old.clone()
            };
            let block = Block {
                old,
                new,
                dirty: false,
                used: clock,
            };
            self.blocks.insert(index, block);
        }
        let block = self.blocks.get_mut(&index);
        let block = block.ok_or_else(|| Error::io("a refcount block vanished"))?;
        block.used = clock;
        Ok(block)
    }

    fn note_changed(&mut self, index: u64) {
        self.changed.insert(index);
        if !self.is_placed(index) {
            self.unplaced.insert(index);
        }
    }

    /// A cluster's refcount after the change.
    pub async fn get(&mut self, cluster: u64) -> Result<u64> {
        let (index, at) = self.split(cluster);
        if Self::entry(&self.table, index) == 0 && !self.blocks.contains_key(&index) {
            return Ok(0);
        }
        let codec = self.codec;
        Ok(codec.get(&self.block(index).await?.new, at))
    }

    /// The refcounts of many clusters. Neighbours cost one look at their block.
    pub async fn get_all(&mut self, clusters: &[u64]) -> Result<Vec<u64>> {
        let (codec, bits) = (self.codec, self.geometry.refcount_block_bits());
        let mut found = Vec::with_capacity(clusters.len());
        while let Some(cluster) = clusters.get(found.len()) {
            self.trim().await?;
            found.push(self.get(*cluster).await?);
            let index = cluster >> bits;
            let Some(block) = self.blocks.get(&index) else {
                continue;
            };
            let neighbours = clusters[found.len()..]
                .iter()
                .take_while(|next| *next >> bits == index)
                .map(|next| (next & ((1 << bits) - 1)) as usize);
            found.extend(neighbours.map(|at| codec.get(&block.new, at)));
        }
        Ok(found)
    }

    /// The block of a cluster, and its place there.
    fn split(&self, cluster: u64) -> (u64, usize) {
        let bits = self.geometry.refcount_block_bits();
        (cluster >> bits, (cluster & ((1 << bits) - 1)) as usize)
    }

    /// Adds `times` references to each of `count` clusters, which are in use.
    ///
    /// # Errors
    /// EINVAL when a refcount doesn't fit; `Corrupt` when one of them was 0.
    pub async fn add(&mut self, first: u64, count: u64, times: u64) -> Result<()> {
        self.change(first, count, times, true).await
    }

    /// Drops `times` references to each of `count` clusters.
    ///
    /// # Errors
    /// `Corrupt` when there aren't so many.
    pub async fn sub(&mut self, first: u64, count: u64, times: u64) -> Result<()> {
        self.change(first, count, times, false).await
    }

    async fn change(&mut self, first: u64, count: u64, times: u64, up: bool) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let (mut at, mut left) = (first, count);
        while left > 0 {
            let here = (per_block - at % per_block).min(left);
            self.trim().await?;
            self.change_here(at, here, times, up).await?;
            at += here;
            left -= here;
        }
        Ok(())
    }

    /// Changes refcounts that lie in one block.
    async fn change_here(&mut self, first: u64, count: u64, times: u64, up: bool) -> Result<()> {
        let (index, at) = self.split(first);
        let (codec, bits) = (self.codec, self.geometry.cluster_bits());
        let unknown = |cluster: u64, what: &str| {
            Error::corrupt(format!(
                "{what} host cluster at offset {:#x}, whose refcount is too low",
                cluster << bits
            ))
        };
        let exists = Self::entry(&self.table, index) != 0 || self.blocks.contains_key(&index);
        if !exists {
            return Err(unknown(first, "Reference to"));
        }
        let block = self.block(index).await?;
        for n in 0..count {
            let slot = at + n as usize;
            if up {
                if codec.get(&block.new, slot) == 0 {
                    return Err(unknown(first + n, "Reference to"));
                }
                codec.increment(&mut block.new, slot, times)?;
            } else {
                codec
                    .decrement(&mut block.new, slot, times)
                    .map_err(|_| unknown(first + n, "Freeing"))?;
            }
        }
        block.dirty = true;
        self.note_changed(index);
        Ok(())
    }

    /// Takes `count` clusters in one piece that are free before and after the change, and gives back the first.
    ///
    /// # Errors
    /// ENOSPC at the limits of the format.
    pub async fn allocate(&mut self, count: u64) -> Result<u64> {
        self.trim().await?;
        self.allocate_here(count).await
    }

    async fn allocate_here(&mut self, count: u64) -> Result<u64> {
        let first = self.find_free(count).await?;
        self.metadata.check(first, count, self.geometry)?;
        if first == self.hint {
            self.hint = first + count;
        }
        let codec = self.codec;
        for cluster in first..first + count {
            self.tell_taken(cluster);
            let (index, at) = self.split(cluster);
            let block = self.block(index).await?;
            codec.set(&mut block.new, at, 1)?;
            block.dirty = true;
            self.note_changed(index);
        }
        Ok(first)
    }

    fn tell_taken(&mut self, cluster: u64) {
        // (What was given back and taken again within this change was told before.)
        if self.tap.is_set() && self.told.insert(cluster) {
            let (host, len) = (
                cluster << self.geometry.cluster_bits(),
                self.geometry.cluster_size(),
            );
            self.tap.tell(|| SpaceEvent::Taken { host, len });
        }
    }

    /// The change may be the image's from here on, whatever happens: what was taken isn't free again.
    pub fn keep(&mut self) {
        self.told.clear();
    }

    async fn find_free(&mut self, count: u64) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let limit = entry::MAX_HOST_OFFSET >> self.geometry.cluster_bits();
        let codec = self.codec;
        let (mut start, mut at) = (self.hint, self.hint);
        loop {
            if at - start >= count {
                return Ok(start);
            }
            if start + count > limit {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "No more host clusters in this format",
                ));
            }
            let (index, within) = self.split(at);
            if index >= self.table.len() as u64 {
                self.enlarge(index + 1)?;
            }
            if Self::entry(&self.table, index) == 0 && !self.blocks.contains_key(&index) {
                at = (index + 1) * per_block;
                continue;
            }
            let wanted = (count - (at - start)).min(per_block - within as u64) as usize;
            let block = self.block(index).await?;
            let taken = (within..within + wanted)
                .rev()
                .find(|n| codec.get(&block.old, *n) != 0 || codec.get(&block.new, *n) != 0);
            match taken {
                None => at += wanted as u64,
                Some(last) => {
                    // Behind what is in the way; over all that is taken at once.
                    let next = (last + 1..per_block as usize)
                        .find(|n| codec.get(&block.old, *n) == 0 && codec.get(&block.new, *n) == 0)
                        .unwrap_or(per_block as usize);
                    at = index * per_block + next as u64;
                    start = at;
                    if count == 1 {
                        self.hint = at;
                    }
                }
            }
        }
    }

    /// Makes the table large enough for `entries` entries.
    fn enlarge(&mut self, entries: u64) -> Result<()> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let len = self.table.len() as u64;
        let most = MAX_REFCOUNT_TABLE_BYTES / 8;
        if entries > most {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "Reference count table too large",
            ));
        }
        let wanted = entries.max(len * 3 / 2).next_multiple_of(per_cluster);
        self.table.resize(wanted.min(most) as usize, 0);
        Ok(())
    }

    /// Gives a block that changed its new place; the old one is dropped.
    async fn place(&mut self, index: u64) -> Result<()> {
        self.unplaced.remove(&index);
        if self.is_placed(index) {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits();
        let cluster = self.allocate_here(1).await?;
        let old = Self::entry(&self.old_table, index);
        if let Some(slot) = self.table.get_mut(index as usize) {
            *slot = cluster << bits;
        }
        self.unplaced.remove(&index);
        if old != 0 {
            self.change_here(old >> bits, 1, 1, false).await?;
        }
        Ok(())
    }

    async fn write_block(&mut self, index: u64) -> Result<()> {
        let at = Self::entry(&self.table, index);
        let Some(block) = self.blocks.get_mut(&index) else {
            return Ok(());
        };
        if block.dirty {
            let bytes = block.new.clone();
            block.dirty = false;
            self.file.write(at, bytes, RequestFlags::empty()).await?;
        }
        Ok(())
    }

    /// Keeps the blocks in memory within their bound.
    async fn trim(&mut self) -> Result<()> {
        if self.blocks.len() <= self.capacity {
            return Ok(());
        }
        let mut order: Vec<(u64, u64)> = self
            .blocks
            .iter()
            .map(|(index, block)| (block.used, *index))
            .collect();
        order.sort_unstable();
        let excess = self.blocks.len() - self.capacity * 3 / 4;
        for (_, index) in order.into_iter().take(excess) {
            if self.blocks.get(&index).is_some_and(|block| block.dirty) {
                self.place(index).await?;
                self.write_block(index).await?;
            }
            if self.blocks.get(&index).is_some_and(|block| !block.dirty) {
                self.blocks.remove(&index);
            }
        }
        Ok(())
    }

    /// Gives every block that changed and the table their places, and writes all of it. Not durable yet.
    pub async fn finish(&mut self) -> Result<TablePlace> {
        let bits = self.geometry.cluster_bits();
        let old = self.old_place;
        if old.clusters > 0 {
            self.sub(old.offset.0 >> bits, u64::from(old.clusters), 1)
                .await?;
        }
        let mut table: Option<(u64, u64)> = None;
        loop {
            while let Some(index) = self.unplaced.first().copied() {
                self.place(index).await?;
                self.trim().await?;
            }
            let needed = self.geometry.clusters_for(self.table.len() as u64 * 8);
            match table {
                Some((_, clusters)) if clusters == needed => break,
                Some((first, clusters)) => self.sub(first, clusters, 1).await?,
                None => {}
            }
            table = Some((self.allocate(needed).await?, needed));
        }
        let (first, clusters) = table.unwrap_or_default();
        let dirty: Vec<u64> = self
            .blocks
            .iter()
            .filter_map(|(index, block)| block.dirty.then_some(*index))
            .collect();
        for index in dirty {
            self.write_block(index).await?;
        }
        let mut bytes: Vec<u8> = self
            .table
            .iter()
            .flat_map(|raw| raw.to_be_bytes())
            .collect();
        bytes.resize((clusters << bits) as usize, 0);
        self.file
            .write(first << bits, bytes, RequestFlags::empty())
            .await?;
        let clusters = u32::try_from(clusters)
            .map_err(|_| Error::new(ErrorKind::TooBig, "Reference count table too large"))?;
        Ok(TablePlace {
            offset: HostOffset(first << bits),
            clusters,
        })
    }

    /// The places of all blocks after the change.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Blocks that changed, ascending.
    pub fn changed(&self) -> Vec<u64> {
        self.changed.iter().copied().collect()
    }

    /// Clusters that were in use before and aren't after, within one block: the first of each run, and how many.
    pub async fn freed_in(&mut self, index: u64) -> Result<Vec<(u64, u64)>> {
        self.trim().await?;
        let codec = self.codec;
        let per_block = self.geometry.refcounts_per_block();
        let block = self.block(index).await?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for n in 0..per_block {
            let at = n as usize;
            if codec.get(&block.old, at) == 0 || codec.get(&block.new, at) != 0 {
                continue;
            }
            let cluster = index * per_block + n;
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => runs.push((cluster, 1)),
            }
        }
        Ok(runs)
    }
}
