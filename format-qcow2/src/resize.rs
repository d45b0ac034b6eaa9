//! Changing the size of the virtual disk, and emptying it.
//!
//! Growing moves the L1 table if it is too small: the copy and its refcounts are durable before the header points to it, and
//! the size comes last. Shrinking drops the clusters that are cut off, durably, before the size changes; `trim` gives back
//! what that leaves.

use std::sync::{Arc, atomic::Ordering};

use block_core::{
    buffer::IoBuf,
    debug::DebugEvent,
    driver::{Preallocation, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::{Child, Request},
    space::SpaceEvent,
};

use crate::{
    cache::slices,
    header_update,
    image::{L1Table, Qcow2},
    io::{map::Run, zero::Change},
    layout::{ClusterIndex, HostCluster, HostOffset, entry, header::MAX_L1_BYTES},
    meta::Meta,
    overlap::Kinds,
    snapshots,
};

/// Zeroes written at once where there is no better way.
const ZERO_STEP: u64 = 4 << 20;

impl Qcow2 {
    /// Changes the size of the disk.
    pub async fn resize(
        self: &Arc<Self>,
        request: &Request,
        length: u64,
        how: Truncate,
    ) -> Result<()> {
        self.check_writable()?;
        if length % 512 != 0 {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        self.check_resizable(request).await?;
        self.check_bitmaps_follow(request, length)?;
        let old = self.length();
        match length.cmp(&old) {
            std::cmp::Ordering::Less if how.preallocation != Preallocation::Off => Err(
                Error::invalid("Preallocation can't be used for shrinking an image"),
            ),
            std::cmp::Ordering::Less => self.shrink(request, old, length).await,
            // A change that failed may be on disk all the same.
            std::cmp::Ordering::Equal if self.size_in_doubt.load(Ordering::Acquire) => {
                self.set_size(request, length).await
            }
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(request, old, length, how).await,
        }
    }

    /// Refuses what depends on the size staying as it is.
    async fn check_resizable(&self, request: &Request) -> Result<()> {
        let meta = self.lock_meta(request.file()?).await?;
        // Entries of version 2's snapshot table don't say how large the disk was.
        if meta.header.version < 3 && meta.header.nb_snapshots > 0 {
            return Err(Error::unsupported(
                "Can't resize a v2 image which has snapshots",
            ));
        }
        Ok(())
    }

    async fn grow(
        self: &Arc<Self>,
        request: &Request,
        old: u64,
        new: u64,
        how: Truncate,
    ) -> Result<()> {
        self.make_room(request).await?;
        let entries = self.geometry.l1_entries_for(new);
        self.reclaiming(request, || self.grow_l1(request, entries))
            .await?;
        // What the disk is about to reach mustn't show there, not even after a power cut.
        let mut flush_first = self.drop_vm_state(request, old).await?;
        let edge = old.next_multiple_of(self.geometry.cluster_size()).min(new);
        let mut preallocation = how.preallocation;
        if self.geometry.has_data_file() {
            self.grow_data(request, old, new, preallocation).await?;
            if self.encryption.is_some() {
                // What the file was extended with are zeroes until somebody decrypts them.
                self.zero_mapped(request, old, edge).await?;
            }
            if self.has_raw_data() && preallocation == Preallocation::Off {
                preallocation = Preallocation::Metadata;
            }
        }
        let shows_tail = mutant::is_active("qcow2-shrink-leaves-tail");
        if !self.geometry.has_data_file() && old < edge && !shows_tail {
            // Other programs leave what was there before a shrink, or what a backing file had.
            self.zero_mapped(request, old, edge).await?;
            flush_first = true;
            self.writeback.failure.flush(request.file()?).await?;
        }
        if how.zero
            && self.has_backing(request)
            && !mutant::is_active("qcow2-grown-range-shows-backing")
        {
            self.zero_new(request, old, new).await?;
        }
        if preallocation != Preallocation::Off {
            self.preallocate(request, old, new, preallocation).await?;
        }
        if flush_first || how.zero || preallocation != Preallocation::Off {
            self.write_back(request).await?;
        }
        if self.geometry.has_data_file() {
            // Else something else than zeroes shows behind the old end after a power cut.
            let data = self.data(request)?;
            self.writeback.failure.flush(data).await?;
        }
        self.set_size(request, new).await
    }

    async fn set_size(&self, request: &Request, size: u64) -> Result<()> {
        let file = request.file()?;
        let mut meta = self.lock_meta(file).await?;
        self.writeback.failure.check()?;
        self.size_in_doubt.store(true, Ordering::Release);
        header_update::write_size(file, &mut meta.header, size).await?;
        self.writeback.failure.flush(file).await?;
        self.size.store(size, Ordering::Release);
        self.size_in_doubt.store(false, Ordering::Release);
        Ok(())
    }

    /// A change of the size that failed may be on disk all the same: writes the size that counts again, durably. Nothing may be
    /// linked before, as it might lie behind the end of the disk that the header tells of, be lost with the next opening,
    /// and come back when the disk grows.
    pub async fn settle_size(&self, file: &Child) -> Result<()> {
        if !self.size_in_doubt.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut meta = self.lock_meta(file).await?;
        self.writeback.failure.check()?;
        if self.size_in_doubt.load(Ordering::Acquire) {
            header_update::write_size(file, &mut meta.header, self.length()).await?;
            self.writeback.failure.flush(file).await?;
            self.size_in_doubt.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Moves the L1 table to where it has room for `needed` entries, if it has too few.
    pub(crate) async fn grow_l1(self: &Arc<Self>, request: &Request, needed: u64) -> Result<()> {
        let file = request.file()?;
        // No batch may be writing entries to the old place.
        let _turn = self.hold_batches().await;
        let mut meta = self.lock_meta(file).await?;
        self.writeback.failure.check()?;
        let old = self.l1.load_full();
        let old_bytes = old.entries.len() as u64 * 8;
        if needed <= old.entries.len() as u64 {
            return Ok(());
        }
        let entries = u32::try_from(needed)
            .ok()
            .filter(|entries| u64::from(*entries) * 8 <= MAX_L1_BYTES)
            .ok_or_else(|| Error::new(ErrorKind::TooBig, "Active L1 table too large"))?;
        let clusters = self.geometry.clusters_for(needed * 8);
        file.debug_event(DebugEvent::L1GrowAllocTable).await;
        let allocation = meta.allocate_contiguous(file, clusters).await?;
        let place = self.geometry.host_start(allocation.first());
        // The copy is made from the disk: what is linked in memory only follows with the next batch.
        let mut bytes = file
            .read_padded(old.offset.0, old_bytes as usize)
            .await?
            .to_vec();
        bytes.resize((clusters * self.geometry.cluster_size()) as usize, 0);
        file.debug_event(DebugEvent::L1GrowWriteTable).await;
        file.write(place.0, bytes, RequestFlags::empty()).await?;
        if !mutant::is_active("qcow2-new-l1-table-not-counted-durably") {
            self.write_refcounts(&mut meta, request).await?;
        }
        // From here on the header may point to the new table: its clusters aren't given out again whatever happens. When
        // it is unknown which table counts, both stay allocated.
        for cluster in allocation.clusters() {
            meta.unlinked.remove(&cluster.0);
            self.metadata.add(Kinds::ACTIVE_L1, [cluster.0]);
        }
        allocation.linked();
        let failure = &self.writeback.failure;
        file.debug_event(DebugEvent::L1GrowActivateTable).await;
        let switched =
            header_update::write_l1_pointer(file, &mut meta.header, place, entries).await;
        failure.note(switched)?;
        failure.flush(file).await?;
        let kept = old.entries.iter().map(|raw| raw.load(Ordering::SeqCst));
        let new = kept.chain(std::iter::repeat(0)).take(needed as usize);
        self.slices
            .change_tables(|_| self.l1.store(Arc::new(L1Table::new(place, new))));
        // The header no longer points to the old table, durably. The disk has grown: space that can't be given back now
        // leaks.
        let first = self.geometry.host_cluster_of(old.offset).0;
        for cluster in first..first + self.geometry.clusters_for(old_bytes) {
            self.metadata.remove(Kinds::ACTIVE_L1, [cluster]);
            if let Err(error) = meta.drop_reference(file, HostCluster(cluster)).await {
                tracing::warn!("qcow2: a cluster of the old L1 table leaks: {error}");
            }
        }
        Ok(())
    }

    /// Makes all refcounts durable. With the metadata lock and the write-back's turn held.
    pub(crate) async fn write_refcounts(&self, meta: &mut Meta, request: &Request) -> Result<()> {
        let file = request.file()?;
        let copies = meta.refcounts.dirty_copies();
        file.debug_event(DebugEvent::RefblockUpdate).await;
        for copy in &copies {
            file.write(copy.host.0, copy.bytes.clone(), RequestFlags::empty())
                .await?;
        }
        self.writeback.failure.flush(file).await?;
        if meta.refcounts.publish(file, &copies).await? {
            self.writeback.failure.flush(file).await?;
        }
        for copy in &copies {
            meta.refcounts.wrote(copy);
        }
        Ok(())
    }

    /// Makes the range from `old` to `new`, beyond the end of the disk, read as zeroes whatever the backing file holds.
    async fn zero_new(self: &Arc<Self>, request: &Request, old: u64, new: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        let aligned = old.next_multiple_of(size).min(new);
        self.write_zero_data(request, old, aligned).await?;
        if self.geometry.has_zero_flag() {
            let first = ClusterIndex(aligned.div_ceil(size));
            let end = ClusterIndex(new.div_ceil(size));
            return self
                .change_clusters(request, first, end, Change::Unmap)
                .await;
        }
        self.write_zero_data(request, aligned, new).await
    }

    async fn write_zero_data(
        self: &Arc<Self>,
        request: &Request,
        mut at: u64,
        end: u64,
    ) -> Result<()> {
        while at < end {
            let len = (end - at).min(ZERO_STEP);
            self.write_guest(request, at, IoBuf::zeroes(len as usize))
                .await?;
            at += len;
        }
        Ok(())
    }

    /// Writes zeroes over what is mapped to data in a range.
    async fn zero_mapped(self: &Arc<Self>, request: &Request, mut at: u64, end: u64) -> Result<()> {
        while at < end {
            let (run, pin) = self.locate(request.file()?, at, end - at).await?;
            drop(pin);
            let next = at + run.len();
            if matches!(run, Run::Data { .. } | Run::Compressed { .. }) {
                self.write_zero_data(request, at, next).await?;
            }
            at = next;
        }
        Ok(())
    }

    async fn shrink(self: &Arc<Self>, request: &Request, old: u64, new: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        if self.geometry.has_data_file() {
            self.reach_data(request, new).await?;
        }
        // What is left of the last cluster must not come back when the disk grows again.
        let edge = new.next_multiple_of(size).min(old);
        // (A data file is cut off there.)
        if !self.geometry.has_data_file() && !mutant::is_active("qcow2-shrink-leaves-tail") {
            self.zero_mapped(request, new, edge).await?;
        }
        if self.has_raw_data() {
            // Links that are gone read as zeroes; a power cut before the new size is there must not find anything else in the file. (It
            // is flushed before the links are.)
            // A file that ends before the disk did reads as zeroes there already, and may not be able to grow.
            let len = self.data(request)?.length().min(old).saturating_sub(new);
            if len > 0 {
                self.zero_raw_data(request, new, len, RequestFlags::MAY_UNMAP)
                    .await?;
            }
        }
        let first = ClusterIndex(new.div_ceil(size));
        let end = ClusterIndex(old.div_ceil(size));
        self.change_clusters(request, first, end, Change::Full)
            .await?;
        self.drop_vm_state(request, old).await?;
        self.write_back(request).await?;
        self.set_size(request, new).await?;
        if self.geometry.has_data_file() {
            self.shrink_data(request, new).await?;
        }
        self.trim(request, new).await
    }

    /// Drops all data of this layer.
    pub async fn empty(self: &Arc<Self>, request: &Request) -> Result<()> {
        self.check_writable()?;
        request.debug_event(DebugEvent::EmptyImagePrepare).await;
        if self.has_raw_data() {
            let all = self.length();
            self.discard_raw_data(request, 0, all).await?;
            return self.write_back(request).await;
        }
        let end = ClusterIndex(self.length().div_ceil(self.geometry.cluster_size()));
        self.change_clusters(request, ClusterIndex(0), end, Change::Full)
            .await?;
        self.write_back(request).await?;
        // Not before a cut of the power can't bring back the links: what is below would be hidden by zeroes.
        if self.geometry.has_data_file() && self.settings.pass_discard_snapshot() {
            self.punch(self.data(request)?, &[(0, end.0)]).await;
        }
        Ok(())
    }

    /// Reads the L1 table that a header points to.
    pub async fn read_l1(file: &Child, header: &crate::layout::Header) -> Result<L1Table> {
        Self::read_l1_at(file, header.l1_table_offset, header.l1_bytes()).await
    }

    /// Reads an L1 table of `len` bytes, whose size and place were checked.
    pub async fn read_l1_at(file: &Child, offset: HostOffset, len: u64) -> Result<L1Table> {
        let bytes = file.read_padded(offset.0, len as usize).await?;
        Ok(L1Table::new(offset, entry::be64s(&bytes)))
    }

    /// Forgets everything in memory and reads it again from disk: after a repair, or when a failed flush left it unknown what
    /// is there. With the write-back's turn held.
    pub async fn reload(&self, meta: &mut Meta, request: &Request) -> Result<()> {
        let file = request.file()?;
        let header = header_update::read_header(file).await?;
        let refcounts =
            slices::load_refcounts(file, &header, self.settings.refcount_blocks()).await?;
        let l1 = Self::read_l1(file, &header).await?;
        // Without it there are no operations on snapshots, but all others.
        let snapshots = snapshots::load(file, &header)
            .await
            .unwrap_or_else(|error| {
                tracing::warn!("qcow2: the snapshot table can't be read: {error}");
                Vec::new()
            });
        let durable = meta.durable;
        let batch = meta.batch;
        meta.orphans.lock().clear();
        let orphans = meta.orphans.clone();
        let others = snapshots::others(file, &header, &snapshots, self.metadata.wanted()).await?;
        self.metadata.forget_bitmaps();
        self.metadata.rebuild(&header, &l1, &refcounts, &others);
        self.reload_directory(file, &header).await;
        let metadata = self.metadata.clone();
        *meta = Meta::new(
            header,
            refcounts,
            orphans,
            metadata,
            self.writeback.failure.clone(),
            self.settings.safeguards,
            self.tap.clone(),
        );
        meta.snapshots = snapshots;
        self.tap.tell(|| SpaceEvent::Forgotten);
        (meta.batch, meta.durable) = (batch, durable);
        self.slices.change_tables(|table| {
            table.clear();
            self.l1.store(Arc::new(l1));
        });
        self.size.store(meta.header.disk_size(), Ordering::Release);
        self.names_backing
            .store(meta.header.backing_file.is_some(), Ordering::Release);
        self.raw_data
            .store(meta.header.has_raw_data_file(), Ordering::Release);
        self.writeback.failure.forget();
        self.uncertain.store(false, Ordering::Release);
        self.size_in_doubt.store(false, Ordering::Release);
        self.note_sizes(meta);
        Ok(())
    }
}
