//! Refcounts in memory: the refcount table, and the blocks that were looked at. Only the holder of the metadata lock
//! touches them, so there is no lock in here.
//!
//! What is in memory is the truth; the write-back batch copies dirty blocks to disk. A block that is new is written
//! before the table's entry for it ("published"), so that a power cut never leaves an entry that points to garbage.
//! Which clusters may be given out is decided in `alloc`.

use std::{collections::BTreeSet, sync::Arc};

use block_core::{
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::Child,
    space::{SpaceEvent, SpaceTap},
};

use super::slice::NumberMap;
use crate::{
    layout::{Geometry, HostCluster, HostOffset, Refcounts, entry, units::hex},
    meta::Failure,
};

/// A refcount table may not be larger than this.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// A refcount block in memory.
#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    version: u64,
    written: u64,
    used: u64,
}

/// The copy of a dirty block that a batch writes.
#[derive(Debug)]
pub(crate) struct BlockCopy {
    pub table_index: u64,
    pub host: HostOffset,
    pub bytes: Vec<u8>,
    version: u64,
}

/// Where the table is that a header should point to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TablePlace {
    pub offset: HostOffset,
    pub clusters: u32,
}

/// All refcounts of an image.
#[derive(Debug)]
pub(crate) struct RefcountStore {
    geometry: Geometry,
    codec: Refcounts,
    /// Host offsets of blocks; 0: there is none, and its refcounts are 0.
    table: Vec<u64>,
    place: TablePlace,
    /// Entries of `table` that aren't on disk yet.
    unpublished: BTreeSet<u64>,
    blocks: NumberMap<Block>,
    clock: u64,
    /// The clock when unused blocks were last dropped.
    cleaned: u64,
    /// More clean blocks than this aren't kept.
    capacity: usize,
    /// Who is told when a refcount leaves 0 or comes back to it.
    pub tap: Arc<SpaceTap>,
}

impl RefcountStore {
    /// Reads the refcount table, whose place was found valid.
    pub async fn load(
        file: &Child,
        geometry: Geometry,
        place: TablePlace,
        capacity: usize,
    ) -> Result<Self> {
        let len = u64::from(place.clusters) << geometry.cluster_bits();
        if len > MAX_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::TooBig,
                "Reference count table too large",
            ));
        }
        file.debug_event(DebugEvent::ReftableLoad).await;
        let bytes = file.read_padded(place.offset.0, len as usize).await?;
        let table = entry::be64s(&bytes)
            .map(|raw| raw & entry::REFCOUNT_TABLE_MASK)
            .collect();
        Ok(Self::with_table(geometry, place, table, capacity))
    }

    /// The same for a table whose entries are known, and on disk.
    pub fn with_table(
        geometry: Geometry,
        place: TablePlace,
        table: Vec<u64>,
        capacity: usize,
    ) -> Self {
        Self {
            geometry,
            codec: Refcounts::new(geometry.refcount_order()),
            table,
            place,
            unpublished: BTreeSet::new(),
            blocks: NumberMap::default(),
            clock: 0,
            cleaned: 0,
            capacity,
            tap: Arc::default(),
        }
    }

    /// For an image whose table isn't known, and isn't written to.
    pub fn unread(geometry: Geometry, capacity: usize) -> Self {
        let nowhere = TablePlace {
            offset: HostOffset(0),
            clusters: 0,
        };
        Self::with_table(geometry, nowhere, Vec::new(), capacity)
    }

    /// Where the blocks are, by table index; 0: there is none.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    pub fn place(&self) -> TablePlace {
        self.place
    }

    pub fn max(&self) -> u64 {
        self.codec.max()
    }

    /// Whether the table on disk lacks entries for blocks that exist.
    pub fn has_unpublished(&self) -> bool {
        !self.unpublished.is_empty()
    }

    /// Blocks in memory.
    pub fn cached(&self) -> usize {
        self.blocks.len()
    }

    pub fn is_dirty(&self) -> bool {
        !self.unpublished.is_empty()
            || self
                .blocks
                .values()
                .any(|block| block.version != block.written)
    }

    /// Where the block of a table index is, if there is one.
    pub fn block_offset(&self, table_index: u64) -> Option<HostOffset> {
        let raw = self
            .table
            .get(usize::try_from(table_index).ok()?)
            .copied()?;
        (raw != 0).then_some(HostOffset(raw))
    }

    /// Host clusters that the table can describe without growing.
    pub fn table_covers(&self) -> u64 {
        (self.table.len() as u64) << self.geometry.refcount_block_bits()
    }

    async fn block(&mut self, file: &Child, table_index: u64) -> Result<Option<&mut Block>> {
        let Some(host) = self.block_offset(table_index) else {
            return Ok(None);
        };
        if !self.geometry.is_aligned(host) {
            return Err(Error::corrupt(format!(
                "Refblock offset {host} unaligned (reftable index: {})",
                hex(table_index)
            )));
        }
        self.clock += 1;
        let clock = self.clock;
        if !self.blocks.contains_key(&table_index) {
            if self.blocks.len() > self.capacity {
                self.evict(self.capacity - self.capacity / 4);
            }
            let len = self.geometry.cluster_size() as usize;
            file.debug_event(DebugEvent::RefblockLoad).await;
            let bytes = file.read_padded(host.0, len).await?.to_vec();
            let block = Block {
                bytes,
                version: 0,
                written: 0,
                used: clock,
            };
            self.blocks.insert(table_index, block);
        }
        let Some(block) = self.blocks.get_mut(&table_index) else {
            return Ok(None);
        };
        block.used = clock;
        Ok(Some(block))
    }

    /// A cluster's refcount.
    pub async fn get(&mut self, file: &Child, cluster: HostCluster) -> Result<u64> {
        let codec = self.codec;
        let index = self.geometry.refcount_block_index(cluster) as usize;
        let table_index = self.geometry.refcount_table_index(cluster);
        let block = self.block(file, table_index).await?;
        Ok(block.map_or(0, |block| codec.get(&block.bytes, index)))
    }

    /// Adds one reference. The block must exist.
    pub async fn increment(&mut self, file: &Child, cluster: HostCluster) -> Result<u64> {
        let codec = self.codec;
        let index = self.geometry.refcount_block_index(cluster) as usize;
        let table_index = self.geometry.refcount_table_index(cluster);
        let block = self.block(file, table_index).await?.ok_or_else(|| {
            Error::corrupt(format!(
                "No refcount block for host cluster {:#x}",
                cluster.0
            ))
        })?;
        let by = 1 + u64::from(mutant::is_active("qcow2-refcount-increment-by-two"));
        let new = codec.increment(&mut block.bytes, index, by)?;
        block.version += 1;
        if new == 1 {
            self.tap.tell(|| self.taken(cluster));
        }
        Ok(new)
    }

    /// Drops one reference; an error when there is none.
    pub async fn decrement(&mut self, file: &Child, cluster: HostCluster) -> Result<u64> {
        let codec = self.codec;
        let index = self.geometry.refcount_block_index(cluster) as usize;
        let table_index = self.geometry.refcount_table_index(cluster);
        let none = || {
            Error::corrupt(format!(
                "Freeing host cluster {:#x}, whose refcount is 0",
                cluster.0
            ))
        };
        let block = self.block(file, table_index).await?.ok_or_else(none)?;
        let by = u64::from(!mutant::is_active("qcow2-refcount-decrement-by-none"));
        let new = codec
            .decrement(&mut block.bytes, index, by)
            .map_err(|_| none())?;
        block.version += u64::from(!mutant::is_active("qcow2-refcount-decrement-not-dirty"));
        if new == 0 {
            self.tap.tell(|| self.freed(cluster));
        }
        Ok(new)
    }

    /// What those who watch are told of a cluster that has an owner now.
    pub fn taken(&self, cluster: HostCluster) -> SpaceEvent {
        SpaceEvent::Taken {
            host: self.geometry.host_start(cluster).0,
            len: self.geometry.cluster_size(),
        }
    }

    /// What those who watch are told of a cluster that has no owner any more.
    pub fn freed(&self, cluster: HostCluster) -> SpaceEvent {
        SpaceEvent::Free {
            host: self.geometry.host_start(cluster).0,
            len: self.geometry.cluster_size(),
        }
    }

    /// The first run of free clusters at or after `from`, no longer than `want`, within one block's range. Where there
    /// is no block, all is free. `None` in the end means: beyond what the table covers.
    pub async fn find_free(
        &mut self,
        file: &Child,
        from: HostCluster,
        want: u64,
    ) -> Result<Option<(HostCluster, u64)>> {
        let per_block = self.geometry.refcounts_per_block();
        let block_bits = self.geometry.refcount_block_bits();
        let codec = self.codec;
        let mut at = from.0;
        while at < self.table_covers() {
            let table_index = at >> block_bits;
            let start = at & (per_block - 1);
            let Some(block) = self.block(file, table_index).await? else {
                return Ok(Some((HostCluster(at), want.min(per_block - start))));
            };
            let most = u64::from(mutant::is_active("qcow2-refcount-one-taken-for-free"));
            let free = |index: &u64| codec.get(&block.bytes, *index as usize) <= most;
            if let Some(first) = (start..per_block).find(free) {
                let end = (first + want).min(per_block);
                let count = (first..end).take_while(free).count() as u64;
                return Ok(Some((
                    HostCluster((table_index << block_bits) + first),
                    count,
                )));
            }
            at = (table_index + 1) << block_bits;
        }
        Ok(None)
    }

    /// Makes a new block at `table_index`, which the table covers and has none, in the first cluster of its own range, so
    /// that it describes itself.
    pub fn add_block(&mut self, table_index: u64) -> Result<HostCluster> {
        let cluster = HostCluster(table_index << self.geometry.refcount_block_bits());
        if cluster.0 == 0 {
            return Err(Error::corrupt(
                "Preventing invalid allocation of refcount block at offset 0",
            ));
        }
        self.place_block(table_index, cluster)?;
        self.unpublished.insert(table_index);
        let block = self.blocks.get_mut(&table_index);
        if let Some(block) = block {
            if !mutant::is_active("qcow2-refcount-block-does-not-count-itself") {
                self.codec.set(&mut block.bytes, 0, 1)?;
            }
            block.version += 1;
        }
        Ok(cluster)
    }

    fn place_block(&mut self, table_index: u64, cluster: HostCluster) -> Result<()> {
        let host = self.geometry.host_start(cluster);
        let slot = usize::try_from(table_index)
            .ok()
            .and_then(|index| self.table.get_mut(index));
        match slot {
            Some(slot) if *slot == 0 => *slot = host.0,
            _ => return Err(Error::corrupt("refcount block is there already")),
        }
        self.clock += 1;
        let bytes = vec![0; self.geometry.cluster_size() as usize];
        let block = Block {
            bytes,
            version: 1,
            written: 0,
            used: self.clock,
        };
        self.blocks.insert(table_index, block);
        Ok(())
    }

    /// Entries in the table.
    pub fn table_len(&self) -> u64 {
        self.table.len() as u64
    }

    /// The first table index from which on there are no blocks.
    pub fn blocks_end(&self) -> u64 {
        self.table
            .iter()
            .rposition(|raw| *raw != 0)
            .map_or(0, |last| last as u64 + 1)
    }

    /// Whether the block of a table index exists and all its refcounts are 0, but for one of its own cluster if it
    /// describes that.
    pub async fn counts_nothing_else(&mut self, file: &Child, table_index: u64) -> Result<bool> {
        let Some(host) = self.block_offset(table_index) else {
            return Ok(false);
        };
        let (codec, geometry) = (self.codec, self.geometry);
        let cluster = geometry.host_cluster_of(host);
        let own = (geometry.refcount_table_index(cluster) == table_index)
            .then(|| geometry.refcount_block_index(cluster));
        let Some(block) = self.block(file, table_index).await? else {
            return Ok(false);
        };
        Ok((0..geometry.refcounts_per_block()).all(|at| {
            let count = codec.get(&block.bytes, at as usize);
            count == 0 || (count == 1 && own == Some(at))
        }))
    }

    /// Forgets a block that the table on disk has no entry for any more.
    pub fn remove_block(&mut self, table_index: u64) {
        if let Some(slot) = usize::try_from(table_index)
            .ok()
            .and_then(|index| self.table.get_mut(index))
        {
            let cluster = self.geometry.host_cluster_of(HostOffset(*slot));
            *slot = 0;
            // (If another block counts its cluster, whoever drops that reference tells.)
            if self.geometry.refcount_table_index(cluster) == table_index {
                self.tap.tell(|| self.freed(cluster));
            }
        }
        self.blocks.remove(&table_index);
        self.unpublished.remove(&table_index);
    }

    /// Calls `look` with every cluster from `start` up to `end` that is in use, and its refcount, in ascending order.
    pub async fn for_each_used(
        &mut self,
        file: &Child,
        start: u64,
        end: u64,
        look: &mut impl FnMut(u64, u64),
    ) -> Result<()> {
        let (codec, block_bits) = (self.codec, self.geometry.refcount_block_bits());
        let end = end.min(self.table_covers());
        let mut at = start;
        while at < end {
            let table_index = at >> block_bits;
            let first = table_index << block_bits;
            let stop = (first + (1 << block_bits)).min(end);
            if let Some(block) = self.block(file, table_index).await? {
                for cluster in at..stop {
                    let count = codec.get(&block.bytes, (cluster - first) as usize);
                    if count != 0 {
                        look(cluster, count);
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// The last cluster that is in use; the header's if nothing else is.
    pub async fn last_used(&mut self, file: &Child) -> Result<u64> {
        let (codec, per_block) = (self.codec, self.geometry.refcounts_per_block());
        for table_index in (0..self.blocks_end()).rev() {
            let Some(block) = self.block(file, table_index).await? else {
                continue;
            };
            let used = |at: &u64| codec.get(&block.bytes, *at as usize) != 0;
            if let Some(at) = (0..per_block).rev().find(used) {
                return Ok(table_index * per_block + at);
            }
        }
        Ok(0)
    }

    /// Makes `count` new blocks from `table_index` on, packed at the start of the first one's range. The caller counts
    /// the references to them.
    pub fn add_blocks(&mut self, table_index: u64, count: u64) -> Result<()> {
        let start = table_index << self.geometry.refcount_block_bits();
        for n in 0..count {
            self.place_block(table_index + n, HostCluster(start + n))?;
            self.unpublished.insert(table_index + n);
        }
        Ok(())
    }

    /// Replaces the full table by a larger one, which lies with the blocks that describe it in the first range that the
    /// old one didn't cover, below cluster `limit`. It is durable then, and the caller makes the header point to it and
    /// says so with [`Self::moved`].
    ///
    /// # Errors
    /// ENOSPC at the limits of the format; whatever the storage reports. The old table is in use as before then.
    pub async fn grow_table(
        &mut self,
        file: &Child,
        failure: &Failure,
        limit: u64,
    ) -> Result<TablePlace> {
        file.debug_event(DebugEvent::ReftableGrow).await;
        let cluster_size = self.geometry.cluster_size();
        let per_cluster = cluster_size / 8;
        let per_block = self.geometry.refcounts_per_block();
        let old_len = self.table.len() as u64;
        let (mut table_clusters, mut blocks) = (0, 1);
        loop {
            let entries = (old_len + blocks).max(old_len * 3 / 2);
            let clusters = entries.div_ceil(per_cluster);
            let needed = (clusters + blocks).div_ceil(per_block);
            if clusters == table_clusters && needed == blocks {
                break;
            }
            (table_clusters, blocks) = (clusters, needed.max(blocks));
        }
        if table_clusters * cluster_size > MAX_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "Reference count table too large",
            ));
        }
        let start = old_len << self.geometry.refcount_block_bits();
        if start + blocks + table_clusters > limit {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "No more host clusters in this format",
            ));
        }
        let mut new_table = self.table.clone();
        new_table.resize((table_clusters * per_cluster) as usize, 0);
        let old_table = std::mem::replace(&mut self.table, new_table);
        let result = self
            .write_grown_table(file, failure, start, blocks, table_clusters)
            .await;
        if result.is_err() {
            self.tap.tell(|| SpaceEvent::Forgotten);
            for index in old_len..old_len + blocks {
                self.blocks.remove(&index);
            }
            self.table = old_table;
        }
        result
    }

    /// The header points to the table that was grown, durably.
    pub fn moved(&mut self, place: TablePlace) {
        self.place = place;
    }

    async fn write_grown_table(
        &mut self,
        file: &Child,
        failure: &Failure,
        start: u64,
        blocks: u64,
        table_clusters: u64,
    ) -> Result<TablePlace> {
        let first_index = start >> self.geometry.refcount_block_bits();
        for n in 0..blocks {
            self.place_block(first_index + n, HostCluster(start + n))?;
        }
        for cluster in start..start + blocks + table_clusters {
            self.increment(file, HostCluster(cluster)).await?;
        }
        file.debug_event(DebugEvent::RefblockAllocWriteBlocks).await;
        for n in 0..blocks {
            let host = self.geometry.host_start(HostCluster(start + n));
            if let Some(block) = self.blocks.get_mut(&(first_index + n)) {
                let version = block.version;
                file.write(host.0, block.bytes.clone(), RequestFlags::empty())
                    .await?;
                block.written = version;
            }
        }
        let mut bytes = Vec::with_capacity(self.table.len() * 8);
        for (index, raw) in self.table.iter().enumerate() {
            // Blocks that were never written stay out of the table on disk until they are.
            let raw = if self.unpublished.contains(&(index as u64)) {
                0
            } else {
                *raw
            };
            bytes.extend_from_slice(&raw.to_be_bytes());
        }
        let offset = self.geometry.host_start(HostCluster(start + blocks));
        let clusters = u32::try_from(table_clusters)
            .map_err(|_| Error::new(ErrorKind::TooBig, "Reference count table too large"))?;
        file.debug_event(DebugEvent::RefblockAllocWriteTable).await;
        file.write(offset.0, bytes, RequestFlags::empty()).await?;
        failure.flush(file).await?;
        Ok(TablePlace { offset, clusters })
    }

    /// Copies of all dirty blocks.
    pub fn dirty_copies(&self) -> Vec<BlockCopy> {
        let mut copies: Vec<BlockCopy> = self
            .blocks
            .iter()
            .filter(|(_, block)| block.version != block.written)
            .filter_map(|(index, block)| {
                let host = self.block_offset(*index)?;
                Some(BlockCopy {
                    table_index: *index,
                    host,
                    bytes: block.bytes.clone(),
                    version: block.version,
                })
            })
            .collect();
        copies.sort_by_key(|copy| copy.host);
        copies
    }

    /// A copy is on disk; the block is clean unless it changed meanwhile.
    pub fn wrote(&mut self, copy: &BlockCopy) {
        if let Some(block) = self.blocks.get_mut(&copy.table_index) {
            block.written = if mutant::is_active("qcow2-refcount-block-clean-although-changed") {
                block.version
            } else {
                block.written.max(copy.version)
            };
        }
    }

    /// Writes the table's entries for the new blocks among `durable`. Their content must be durable.
    pub async fn publish(&mut self, file: &Child, durable: &[BlockCopy]) -> Result<bool> {
        let ready: Vec<u64> = durable
            .iter()
            .map(|copy| copy.table_index)
            .filter(|index| self.unpublished.contains(index))
            .collect();
        for index in &ready {
            let raw = self.table.get(*index as usize).copied().unwrap_or(0);
            let at = self.place.offset.0 + index * 8;
            file.debug_event(DebugEvent::RefblockAllocHookup).await;
            file.debug_event(DebugEvent::ReftableUpdate).await;
            file.write(at, raw.to_be_bytes().to_vec(), RequestFlags::empty())
                .await?;
            self.unpublished.remove(index);
        }
        Ok(!ready.is_empty())
    }

    /// Drops clean blocks that weren't used since the last call. Gives back how many went.
    pub fn evict_unused(&mut self) -> usize {
        let (before, since) = (self.blocks.len(), self.cleaned);
        self.blocks
            .retain(|_, block| block.version != block.written || block.used > since);
        self.cleaned = self.clock;
        before - self.blocks.len()
    }

    /// Drops clean blocks, the longest unused first, until `target` are left.
    pub fn evict(&mut self, target: usize) {
        if self.blocks.len() <= target {
            return;
        }
        let mut clean: Vec<(u64, u64)> = self
            .blocks
            .iter()
            .filter(|(_, block)| block.version == block.written)
            .map(|(index, block)| (block.used, *index))
            .collect();
        clean.sort_unstable();
        let excess = self.blocks.len() - target;
        for (_, index) in clean.into_iter().take(excess) {
            self.blocks.remove(&index);
        }
    }
}
