//! The L2 slice cache: loading slices, changing where they belong, making room.
//!
//! Loads need no metadata lock and are shared by all who wait for the same slice. A change of an L1 entry that was not
//! zero (a table becoming private, or dropped) goes through [`SliceCache::change_tables`], so that no load that began
//! before puts an outdated slice into the cache.

use std::sync::Arc;

use block_core::{
    debug::DebugEvent,
    error::{Error, Result},
    request::{Child, Request},
    space::SpaceEvent,
};
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use parking_lot::{Mutex, RwLock};

use super::slice::{NumberMap, Slice, SliceIndex, SliceTable};
use crate::{
    counters::Counters,
    image::Qcow2,
    layout::{ClusterIndex, L1Entry, L2Entry, RawEntry},
    meta::link_of,
    overlap::Kinds,
};

const SHARDS: usize = 64;

type Loaded = Result<Option<Arc<Slice>>, Arc<Error>>;
type Load = Shared<BoxFuture<'static, Loaded>>;

/// The slices of one image.
pub(crate) struct SliceCache {
    pub table: SliceTable,
    loading: Mutex<NumberMap<Load>>,
    /// Counts changes of L1 entries that were not zero.
    tables_changed: RwLock<u64>,
}

impl SliceCache {
    pub fn new() -> Self {
        Self {
            table: SliceTable::new(SHARDS),
            loading: Mutex::new(NumberMap::default()),
            tables_changed: RwLock::new(0),
        }
    }

    /// Runs `change`, which changes L1 entries and forgets slices, so that loads that are under way start again.
    pub fn change_tables<T>(&self, change: impl FnOnce(&SliceTable) -> T) -> T {
        let mut changed = self.tables_changed.write();
        *changed += 1;
        change(&self.table)
    }
}

impl Qcow2 {
    /// The slice that maps a guest cluster, `None` when there is no L2 table. Reads it if it isn't in memory.
    ///
    /// Cancellation: others who wait for the same slice go on with the read.
    pub async fn slice(
        self: &Arc<Self>,
        file: &Child,
        index: SliceIndex,
    ) -> Result<Option<Arc<Slice>>> {
        if let Some(slice) = self.slices.table.get(index) {
            return Ok(Some(slice));
        }
        if self.table_of(index)?.l2.is_none() {
            return Ok(None);
        }
        let load = {
            let mut loading = self.slices.loading.lock();
            loading
                .entry(index.0)
                .or_insert_with(|| {
                    let (image, file) = (self.clone(), file.clone());
                    async move {
                        let loaded = image.load_slice(&file, index).await.map_err(Arc::new);
                        image.slices.loading.lock().remove(&index.0);
                        loaded
                    }
                    .boxed()
                    .shared()
                })
                .clone()
        };
        load.await.map_err(|error| error.duplicate())
    }

    async fn load_slice(&self, file: &Child, index: SliceIndex) -> Result<Option<Arc<Slice>>> {
        loop {
            if let Some(slice) = self.slices.table.get(index) {
                return Ok(Some(slice));
            }
            let began = *self.slices.tables_changed.read();
            let Some(table) = self.table_of(index)?.l2 else {
                return Ok(None);
            };
            let len = self.slice_bytes() as usize;
            file.debug_event(DebugEvent::L2Load).await;
            let bytes = file
                .read_padded(self.slice_host(index, table).0, len)
                .await?;
            Counters::add(&self.counters.slice_loads, 1);
            let slice = Slice::new(RawEntry::parse(&bytes, self.geometry), self.geometry);
            let changed = self.slices.tables_changed.read();
            if *changed == began {
                if self.tap.is_set() && self.slices.table.get(index).is_none() {
                    for at in 0..slice.len() {
                        let cluster = ClusterIndex(self.slice_start(index).0 + at as u64);
                        if let Some(link) = link_of(slice.load(at), cluster, self.geometry) {
                            self.tap.tell(|| SpaceEvent::Found(link));
                        }
                    }
                }
                return Ok(Some(self.slices.table.insert(index, slice)));
            }
        }
    }

    /// Whether any entry of a slice says, or has said, that data is where metadata is known to be. A look at all
    /// entries is only taken again after metadata was added somewhere.
    pub fn is_suspect(&self, slice: &Slice) -> bool {
        if self.geometry.has_data_file() {
            return false;
        }
        slice.is_suspect(self.metadata.generation(), || {
            let hosts = (0..slice.len()).filter_map(|at| {
                let space = L2Entry::decode(slice.load(at), self.geometry)
                    .ok()?
                    .space()?;
                Some(self.geometry.host_cluster_of(space.host).0)
            });
            self.metadata.overlaps(hosts)
        })
    }

    /// The slice of a guest cluster that is going to be changed, in an L2 table that may be changed in place: a shared one is
    /// copied, a missing one is made. With the metadata lock held.
    pub async fn slice_for_update(
        self: &Arc<Self>,
        meta: &mut crate::meta::Meta,
        file: &Child,
        index: SliceIndex,
    ) -> Result<Arc<Slice>> {
        self.metadata.check_sound()?;
        let table = self.table_of(index)?;
        match table.l2 {
            None => self.make_table(meta, file, index).await?,
            Some(_) if !table.copied => self.copy_table(meta, file, index, table).await?,
            Some(_) => {}
        }
        self.slice(file, index)
            .await?
            .ok_or_else(|| Error::corrupt("an L2 table vanished under the metadata lock"))
    }

    async fn make_table(
        self: &Arc<Self>,
        meta: &mut crate::meta::Meta,
        file: &Child,
        index: SliceIndex,
    ) -> Result<()> {
        let at = self.l1_of(index);
        let l1 = self.l1.load_full();
        let Some(slot) = l1.entries.get(at as usize) else {
            return Err(Error::corrupt(format!(
                "no L1 entry {at:#x} for a cluster of the disk"
            )));
        };
        let allocation = meta.allocate(file, 1).await?;
        let host = self.geometry.host_start(allocation.first());
        let zeroes = block_core::buffer::IoBuf::zeroes(self.geometry.cluster_size() as usize);
        file.debug_event(DebugEvent::L2AllocWrite).await;
        file.write(host.0, zeroes, block_core::flags::RequestFlags::empty())
            .await?;
        let new = L1Entry {
            l2: Some(host),
            copied: true,
        };
        slot.store(new.encode(), std::sync::atomic::Ordering::SeqCst);
        self.link_table(meta, at, allocation);
        Ok(())
    }

    fn link_table(
        &self,
        meta: &mut crate::meta::Meta,
        l1_index: u64,
        allocation: crate::alloc::allocator::Allocation,
    ) {
        for cluster in allocation.clusters() {
            meta.unlinked.remove(&cluster.0);
            self.metadata.add(Kinds::ACTIVE_L2, [cluster.0]);
        }
        Counters::add(&self.counters.allocated, allocation.count());
        allocation.linked();
        meta.dirty_l1.insert(l1_index);
        meta.linked = true;
    }

    /// Copies a table that isn't this image's alone, and goes on with the copy.
    async fn copy_table(
        self: &Arc<Self>,
        meta: &mut crate::meta::Meta,
        file: &Child,
        index: SliceIndex,
        old: L1Entry,
    ) -> Result<()> {
        let Some(old) = old.l2 else { return Ok(()) };
        let at = self.l1_of(index);
        let per_table = self.geometry.l2_entries() >> self.settings.slice_bits();
        let first = index.0 - index.0 % per_table;
        let len = self.geometry.cluster_size() as usize;
        file.debug_event(DebugEvent::L2AllocCowRead).await;
        let mut bytes = file.read_padded(old.0, len).await?.to_vec();
        let slice_len = self.slice_bytes() as usize;
        for n in 0..per_table {
            // What is in memory may be newer than the file.
            if let Some(slice) = self.slices.table.get(SliceIndex(first + n)) {
                let start = n as usize * slice_len;
                bytes[start..start + slice_len].copy_from_slice(&slice.to_bytes(self.geometry));
            }
        }
        let allocation = meta.allocate(file, 1).await?;
        let host = self.geometry.host_start(allocation.first());
        file.debug_event(DebugEvent::L2AllocWrite).await;
        file.write(host.0, bytes, block_core::flags::RequestFlags::empty())
            .await?;
        let mut freed = crate::alloc::quarantine::Freed::default();
        let old = self.geometry.host_cluster_of(old);
        meta.unreference(file, old.0, old.0, false, &mut freed)
            .await?;
        let still_used = meta.refcounts.get(file, old).await? > meta.quarantine.pending(old.0);
        let l1 = self.l1.load_full();
        let new = L1Entry {
            l2: Some(host),
            copied: true,
        };
        self.slices.change_tables(|table| {
            if let Some(slot) = l1.entries.get(at as usize) {
                slot.store(new.encode(), std::sync::atomic::Ordering::SeqCst);
            }
            for n in 0..per_table {
                // A batch under way may be writing a slice to the old place: it counts as changed.
                if let Some(slice) = table.get(SliceIndex(first + n))
                    && meta.dirty_slices.contains_key(&(first + n))
                {
                    slice.touch();
                }
            }
        });
        self.metadata.remove(Kinds::ACTIVE_L2, [old.0]);
        if still_used {
            // It is a snapshot's.
            self.metadata.add(Kinds::INACTIVE_L2, [old.0]);
        }
        self.link_table(meta, at, allocation);
        let batch = meta.batch;
        meta.quarantine.close(freed, batch, &self.pins);
        Ok(())
    }

    /// Sees to it that caches and quarantine are within their bounds, by running a write-back batch if need be. To be
    /// called before the metadata lock is taken.
    pub async fn make_room(self: &Arc<Self>, request: &Request) -> Result<()> {
        self.evict_slices(request).await?;
        if !self.is_read_only() {
            self.bound_metadata(request).await?;
        }
        Ok(())
    }

    async fn evict_slices(self: &Arc<Self>, request: &Request) -> Result<()> {
        let limit = self.settings.l2_slices();
        if self.slices.table.count() <= limit {
            return Ok(());
        }
        let target = limit - limit.div_ceil(8).min(limit);
        let mut gone = self.slices.table.evict(target);
        if gone == 0 && !self.is_read_only() {
            self.write_back(request).await?;
            gone = self.slices.table.evict(target);
        }
        Counters::add(&self.counters.evictions, gone as u64);
        Ok(())
    }
}

/// Reads the refcount table that a header points to.
pub(crate) async fn load_refcounts(
    file: &Child,
    header: &crate::layout::Header,
    capacity: usize,
) -> Result<super::refcounts::RefcountStore> {
    let place = super::refcounts::TablePlace {
        offset: header.refcount_table_offset,
        clusters: header.refcount_table_clusters,
    };
    super::refcounts::RefcountStore::load(file, header.geometry(), place, capacity).await
}
