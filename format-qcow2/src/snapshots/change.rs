//! Taking, applying and deleting snapshots.
//!
//! Each of them changes many refcounts and, with them, many COPIED flags, which say that a refcount is exactly 1. No order of
//! writes in place keeps the two in step: a power cut in between leaves flags that contradict the refcounts, which is what
//! `check` calls a corruption. So nothing is changed in place. New refcounts (`shadow`), new copies of the active L2 tables whose
//! flags change, a new active L1 table and a new snapshot table are written to free space and made durable; one write of the
//! header's fields from `size` to `snapshots_offset`, which lie in one sector, switches to all of them; when that is durable,
//! what they replace is free. A power cut leaves the image as it was or as it is to be, with no leak in either case,
//! and an error or a cancellation before the switch leaves no trace at all.
//!
//! A snapshot that is taken inherits the old active L1 table and the old L2 tables; what goes on being written has the copies.
//! All of this runs under a serialising request over the whole node, with the write-back's turn and the metadata lock held:
//! nothing else writes metadata meanwhile, no data I/O is under way, and nothing that was cached survives.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
};

use block_core::{
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::Progress,
    request::{Child, Request},
    snapshot::{NewSnapshot, SnapshotInfo, SnapshotKey},
    space::SpaceEvent,
};
use futures::StreamExt;

use super::{expand::Expansion, find, reach, shadow::Shadow, table, tree, unsupported};
use crate::{
    cache::{
        refcounts::{RefcountStore, TablePlace},
        slice::NumberMap,
    },
    header_update,
    image::{L1Table, Qcow2},
    layout::{
        Header, HostCluster, HostOffset, L1Entry, SnapshotEntry, entry::be64s, header::MAX_L1_BYTES,
    },
    meta::Meta,
    overlap::Others,
};

/// The state that an image is to have.
pub(super) struct Draft<'a> {
    pub image: &'a Qcow2,
    pub file: &'a Child,
    pub progress: &'a Progress,
    pub shadow: Shadow<'a>,
    header: Header,
    pub snapshots: Vec<SnapshotEntry>,
    /// The active L1 table.
    pub l1: Vec<u64>,
    /// Where it is; `None`: in a place that is still to be found.
    pub l1_offset: Option<HostOffset>,
}

/// What becomes of a tree's references to its L2 tables and their clusters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Count {
    Add,
    Drop,
}

impl<'a> Draft<'a> {
    fn new(image: &'a Qcow2, file: &'a Child, meta: &Meta, progress: &'a Progress) -> Self {
        let l1 = image.l1.load();
        Self {
            image,
            file,
            progress,
            shadow: Shadow::new(
                file,
                &image.metadata,
                // The width of refcounts may have been amended since the image was opened.
                meta.geometry,
                meta.refcounts.place(),
                meta.refcounts.table().to_vec(),
                &image.tap,
            ),
            header: meta.header.clone(),
            snapshots: meta.snapshots.clone(),
            l1: l1
                .entries
                .iter()
                .map(|raw| raw.load(Ordering::SeqCst))
                .collect(),
            l1_offset: Some(l1.offset),
        }
    }

    pub(super) fn check_cancelled(&self) -> Result<()> {
        if self.progress.is_cancelled() {
            return Err(Error::new(
                ErrorKind::Cancelled,
                "The operation was cancelled",
            ));
        }
        Ok(())
    }

    /// The clusters that `len` bytes at `offset` take: the first, and how many.
    fn clusters(&self, offset: HostOffset, len: u64) -> (u64, u64) {
        let geometry = self.image.geometry;
        (
            geometry.host_cluster_of(offset).0,
            geometry.clusters_for(len),
        )
    }

    pub(super) async fn drop_clusters(&mut self, offset: HostOffset, len: u64) -> Result<()> {
        let (first, count) = self.clusters(offset, len);
        self.shadow.sub(first, count, 1).await
    }

    /// Counts, or drops, a reference to all that an L1 table reaches.
    async fn count_tree(&mut self, l1: &[u64], how: Count) -> Result<()> {
        let geometry = self.image.geometry;
        let uses = tree::tables(l1, geometry)?;
        self.progress.add_total(uses.len() as u64);
        let file = self.file;
        let mut reading = std::pin::pin!(tree::read(file, &uses, geometry));
        while let Some(read) = reading.next().await {
            self.check_cancelled()?;
            let (table, bytes) = read?;
            let cluster = geometry.host_cluster_of(table.offset).0;
            let references = tree::references(table, &bytes, geometry)?;
            match how {
                Count::Add => {
                    self.shadow.add(cluster, 1, table.times).await?;
                    for run in references {
                        self.shadow.add(run.first, run.count, run.times).await?;
                    }
                }
                Count::Drop => {
                    self.shadow.sub(cluster, 1, table.times).await?;
                    for run in references {
                        self.shadow.sub(run.first, run.count, run.times).await?;
                    }
                }
            }
            self.progress.advance(1);
        }
        Ok(())
    }

    /// Brings the COPIED flags of the active tree in line with the refcounts. A table in which one changes is copied; the
    /// original loses the references of the active L1 table.
    pub(super) async fn flag_active(&mut self) -> Result<()> {
        let geometry = self.image.geometry;
        let uses = tree::tables(&self.l1, geometry)?;
        self.progress.add_total(uses.len() as u64);
        // What becomes of each table: where it is, and whether it is the active L1 table's alone.
        let mut fates: NumberMap<L1Entry> = NumberMap::default();
        let file = self.file;
        let mut reading = std::pin::pin!(tree::read(file, &uses, geometry));
        while let Some(read) = reading.next().await {
            self.check_cancelled()?;
            let (table, mut bytes) = read?;
            let mut changed = false;
            let flagged = tree::flagged(&bytes, geometry);
            let clusters: Vec<u64> = flagged.iter().map(|(_, cluster)| *cluster).collect();
            let references = self.shadow.get_all(&clusters).await?;
            for ((at, _), references) in flagged.iter().zip(references) {
                changed |= tree::set_flag(&mut bytes, *at, references == 1);
            }
            let cluster = geometry.host_cluster_of(table.offset).0;
            let (offset, references) = if changed {
                let copy = self.shadow.allocate(1).await?;
                if table.times > 1 {
                    self.shadow.add(copy, 1, table.times - 1).await?;
                }
                let host = geometry.host_start(HostCluster(copy));
                self.file
                    .write(host.0, bytes, RequestFlags::empty())
                    .await?;
                self.shadow.sub(cluster, 1, table.times).await?;
                (host, table.times)
            } else {
                (table.offset, self.shadow.get(cluster).await?)
            };
            let fate = L1Entry {
                l2: Some(offset),
                copied: references == 1,
            };
            fates.insert(table.offset.0, fate);
            self.progress.advance(1);
        }
        let mut moved = false;
        for raw in &mut self.l1 {
            let old = L1Entry::decode(*raw, geometry)
                .ok()
                .and_then(|entry| entry.l2);
            if let Some(fate) = old.and_then(|offset| fates.get(&offset.0)) {
                let new = fate.encode();
                moved |= new != *raw;
                *raw = new;
            }
        }
        if moved && let Some(offset) = self.l1_offset.take() {
            self.drop_clusters(offset, self.l1.len() as u64 * 8).await?;
        }
        Ok(())
    }

    /// Finds a place for the active L1 table, if it needs another, and writes it there.
    async fn write_l1(&mut self) -> Result<()> {
        let len = self.l1.len() as u64 * 8;
        if self.l1_offset.is_some() || len == 0 {
            return Ok(());
        }
        if len > MAX_L1_BYTES {
            return Err(Error::new(ErrorKind::TooBig, "Active L1 table too large"));
        }
        let bytes = self.l1.iter().flat_map(|raw| raw.to_be_bytes()).collect();
        let offset = self.write_table(bytes).await?;
        self.l1_offset = Some(offset);
        self.header.l1_table_offset = offset;
        self.header.l1_size = self.l1.len() as u32;
        Ok(())
    }

    /// Writes the snapshot table to a new place; the old one, of `old_len` bytes, goes.
    async fn write_snapshot_table(&mut self, old_len: u64) -> Result<()> {
        if old_len > 0 {
            self.drop_clusters(self.header.snapshots_offset, old_len)
                .await?;
        }
        for entry in &mut self.snapshots {
            entry.complete(self.header.size);
        }
        let bytes = table::encode(&self.snapshots)?;
        self.header.nb_snapshots = self.snapshots.len() as u32;
        self.header.snapshots_offset = if bytes.is_empty() {
            HostOffset(0)
        } else {
            self.write_table(bytes).await?
        };
        Ok(())
    }

    pub(super) async fn write_table(&mut self, mut bytes: Vec<u8>) -> Result<HostOffset> {
        let geometry = self.image.geometry;
        let clusters = geometry.clusters_for(bytes.len() as u64);
        let first = self.shadow.allocate(clusters).await?;
        bytes.resize((clusters * geometry.cluster_size()) as usize, 0);
        let host = geometry.host_start(HostCluster(first));
        self.file
            .write(host.0, bytes, RequestFlags::empty())
            .await?;
        Ok(host)
    }

    pub(super) async fn read_l1(&self, entry: &SnapshotEntry) -> Result<Vec<u64>> {
        entry.check_l1(self.image.geometry)?;
        let len = entry.l1_bytes() as usize;
        let bytes = self.file.read_padded(entry.l1_table_offset.0, len).await?;
        Ok(be64s(&bytes).collect())
    }

    /// The present state becomes a snapshot.
    async fn create(&mut self, new: &NewSnapshot) -> Result<()> {
        let id = next_id(&self.snapshots);
        let l1_offset = self.header.l1_table_offset;
        self.snapshots.push(SnapshotEntry {
            l1_table_offset: l1_offset,
            l1_size: self.header.l1_size,
            id: id.into_bytes(),
            name: new.name.clone().into_bytes(),
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size: new.vm_state_size,
            disk_size: Some(self.header.size),
            icount: new.icount,
            extra_size: 24,
            unknown_extra: Vec::new(),
        });
        // The old tree is the snapshot's; the active one counts anew.
        let l1 = self.l1.clone();
        self.count_tree(&l1, Count::Add).await?;
        if !l1.is_empty() {
            // Taken over by the snapshot.
            self.l1_offset = None;
        }
        self.flag_active().await
    }

    /// The disk becomes what it was.
    async fn apply(&mut self, index: usize) -> Result<()> {
        let Some(entry) = self.snapshots.get(index).cloned() else {
            return Err(Error::io("a snapshot vanished"));
        };
        let mut l1 = self.read_l1(&entry).await?;
        let size = entry.disk_size.unwrap_or(self.header.size);
        if i64::try_from(size).is_err() {
            return Err(
                Error::new(ErrorKind::TooBig, "Snapshot disk size too large").with_field(
                    "snapshot disk_size",
                    size,
                    "less than 2^63",
                ),
            );
        }
        let needed = self.header.l1_entries_needed(size);
        let entries = needed.max(l1.len() as u64).max(self.l1.len() as u64);
        if entries * 8 > MAX_L1_BYTES {
            return Err(Error::new(ErrorKind::TooBig, "Active L1 table too large"));
        }
        // The old tree first: a refcount that is as high as it gets has room then. No cluster that becomes free by that
        // is used for anything new, as it isn't free before the switch.
        let old = std::mem::take(&mut self.l1);
        self.count_tree(&old, Count::Drop).await?;
        self.count_tree(&l1, Count::Add).await?;
        if let Some(offset) = self.l1_offset.take() {
            self.drop_clusters(offset, old.len() as u64 * 8).await?;
        }
        l1.resize(entries as usize, 0);
        self.l1 = l1;
        self.header.size = size;
        self.flag_active().await
    }

    /// A snapshot goes.
    async fn delete(&mut self, index: usize) -> Result<()> {
        let entry = self.snapshots.remove(index);
        let l1 = self.read_l1(&entry).await?;
        self.count_tree(&l1, Count::Drop).await?;
        self.drop_clusters(entry.l1_table_offset, entry.l1_bytes())
            .await?;
        self.flag_active().await
    }
}

/// The decimal number after the largest that is in use; when there is none, the smallest that isn't in use.
fn next_id(snapshots: &[SnapshotEntry]) -> String {
    let largest = snapshots
        .iter()
        .filter_map(|entry| std::str::from_utf8(&entry.id).ok()?.parse::<u64>().ok())
        .max();
    if let Some(next) = largest.unwrap_or(0).checked_add(1) {
        return next.to_string();
    }
    let taken: HashSet<&[u8]> = snapshots.iter().map(|entry| &*entry.id).collect();
    let mut ids = (1..=u64::MAX).map(|id| id.to_string());
    ids.find(|id| !taken.contains(id.as_bytes()))
        .unwrap_or_default()
}

/// What is to be done.
pub(super) enum Change<'a> {
    Create(&'a NewSnapshot),
    Apply(&'a SnapshotKey),
    Delete(&'a SnapshotKey),
    /// Zero clusters, of the disk and of snapshots, become something else.
    Expand {
        request: &'a Request,
        /// What is unallocated may read as something else than zeroes.
        backing: bool,
    },
    /// Entries that say less than version 3 asks for say it.
    Complete,
}

impl Qcow2 {
    /// Keeps the present state as a snapshot.
    pub async fn create_snapshot(
        self: &Arc<Self>,
        request: &Request,
        new: &NewSnapshot,
        progress: &Progress,
    ) -> Result<SnapshotInfo> {
        let meta = self
            .change_snapshots(request, &Change::Create(new), progress)
            .await?;
        let created = meta.last().map(|entry| entry.info(self.length()));
        created.ok_or_else(|| Error::io("a snapshot vanished"))
    }

    /// Goes back to a snapshot.
    pub async fn apply_snapshot(
        self: &Arc<Self>,
        request: &Request,
        which: &SnapshotKey,
        progress: &Progress,
    ) -> Result<()> {
        let change = Change::Apply(which);
        self.change_snapshots(request, &change, progress)
            .await
            .map(drop)
    }

    /// Removes a snapshot.
    pub async fn delete_snapshot(
        self: &Arc<Self>,
        request: &Request,
        which: &SnapshotKey,
        progress: &Progress,
    ) -> Result<()> {
        let change = Change::Delete(which);
        self.change_snapshots(request, &change, progress)
            .await
            .map(drop)
    }

    /// Rewrites the snapshot table of an image of version 2 if its entries say less than version 3 asks for.
    pub(crate) async fn complete_snapshots(
        self: &Arc<Self>,
        request: &Request,
        progress: &Progress,
    ) -> Result<()> {
        self.change_snapshots(request, &Change::Complete, progress)
            .await
            .map(drop)
    }

    pub(super) async fn change_snapshots(
        self: &Arc<Self>,
        request: &Request,
        change: &Change<'_>,
        progress: &Progress,
    ) -> Result<Vec<SnapshotEntry>> {
        self.check_writable()?;
        if self.geometry.has_data_file() {
            return Err(unsupported());
        }
        // What is on disk is what counts from here on: nothing dirty, nothing in quarantine.
        self.settle(request).await?;
        let file = request.file()?;
        let _turn = self.hold_batches().await;
        let mut meta = self.lock_meta(file).await?;
        self.check_writable()?;
        self.writeback.failure.check()?;
        self.metadata.check_sound()?;
        if meta.is_dirty() || !meta.quarantine.is_empty() {
            return Err(Error::io(
                "metadata changed while a snapshot was to be changed",
            ));
        }
        if meta.snapshots.len() != meta.header.nb_snapshots as usize {
            return Err(Error::corrupt("The snapshot table couldn't be read"));
        }
        if matches!(change, Change::Apply(_)) && meta.header.extensions.bitmaps.is_some() {
            // They know nothing of what changes.
            return Err(Error::new(
                ErrorKind::Busy,
                "Device has active dirty bitmaps",
            ));
        }
        let index = match change {
            Change::Create(_) | Change::Expand { .. } | Change::Complete => 0,
            Change::Apply(which) | Change::Delete(which) => find(&meta.snapshots, which)?,
        };
        let old_table: u64 = meta
            .snapshots
            .iter()
            .map(|entry| entry.stored_len() as u64)
            .sum();
        let mut draft = Draft::new(self, file, &meta, progress);
        match change {
            Change::Create(new) => draft.create(new).await?,
            Change::Apply(_) => draft.apply(index).await?,
            Change::Delete(_) => draft.delete(index).await?,
            Change::Expand { request, backing } => {
                if !draft.expand(&mut Expansion::new(request, *backing)).await? {
                    return Ok(meta.snapshots.clone());
                }
            }
            Change::Complete => {
                if draft.snapshots.iter().all(SnapshotEntry::suits_version_3) {
                    return Ok(meta.snapshots.clone());
                }
                let size = draft.header.size;
                for entry in &mut draft.snapshots {
                    entry.complete(size);
                }
            }
        }
        draft.write_l1().await?;
        let same_table = matches!(change, Change::Apply(_)) || draft.snapshots == meta.snapshots;
        if !same_table {
            draft.write_snapshot_table(old_table).await?;
        }
        let place = draft.shadow.finish().await?;
        draft.header.refcount_table_offset = place.offset;
        draft.header.refcount_table_clusters = place.clusters;
        // The new tables and refcounts are durable before the header points to them.
        self.writeback.failure.flush(file).await?;
        draft.check_cancelled()?;
        let wanted = self.metadata.wanted();
        let others = reach::others(file, &draft.header, &draft.snapshots, wanted).await?;
        draft.shadow.keep();
        self.switch(file, &draft.header).await?;
        let Draft {
            mut shadow,
            header,
            snapshots,
            l1,
            l1_offset,
            ..
        } = draft;
        let l1 = L1Table::new(l1_offset.unwrap_or(header.l1_table_offset), l1);
        let refcounts = (place, shadow.table());
        self.adopt(&mut meta, header, snapshots, l1, refcounts, &others);
        // Only now: block status is asked for while this goes on, and looks at the L2 tables that the image knows of.
        self.release_replaced(file, &mut shadow).await;
        Ok(meta.snapshots.clone())
    }

    /// One write of the header makes the new state the image's.
    async fn switch(&self, file: &Child, header: &Header) -> Result<()> {
        let switched = async {
            header_update::write_table_pointers(file, header).await?;
            file.flush().await
        };
        let switched = switched.await;
        if switched.is_err() {
            // Which of the two states is on disk is unknown, and what is right for one is wrong for the other.
            self.uncertain.store(true, Ordering::SeqCst);
        }
        self.writeback.failure.note(switched)
    }

    /// Gives the space that is free now back to the storage, if that is wanted, before anyone can allocate it.
    async fn release_replaced(&self, file: &Child, shadow: &mut Shadow<'_>) {
        // Nothing is under way that could hold a pin, or soon nothing: those who ask for block status hold one briefly.
        let grace = self.pins.retire();
        self.pins.wait(grace).await;
        if !self.settings.pass_discard_snapshot() {
            return;
        }
        for index in shadow.changed() {
            match shadow.freed_in(index).await {
                Ok(runs) => self.punch(file, &runs).await,
                Err(error) => {
                    tracing::debug!("qcow2: freed clusters are not punched: {error}");
                    return;
                }
            }
        }
    }

    /// Goes on with the new state, which is on disk.
    fn adopt(
        &self,
        meta: &mut Meta,
        header: Header,
        snapshots: Vec<SnapshotEntry>,
        l1: L1Table,
        (place, table): (TablePlace, &[u64]),
        others: &Others,
    ) {
        let mut refcounts = RefcountStore::with_table(
            header.geometry(),
            place,
            table.to_vec(),
            self.settings.refcount_blocks(),
        );
        refcounts.tap = self.tap.clone();
        self.metadata.rebuild(&header, &l1, &refcounts, others);
        meta.header = header;
        meta.refcounts = refcounts;
        meta.snapshots = snapshots;
        meta.hint = 0;
        meta.packing = None;
        self.tap.tell(|| SpaceEvent::Forgotten);
        self.slices.change_tables(|slices| {
            slices.clear();
            self.l1.store(Arc::new(l1));
        });
        self.size.store(meta.header.disk_size(), Ordering::Release);
        self.note_sizes(meta);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_after(ids: &[&str]) -> String {
        let entry = |id: &&str| SnapshotEntry {
            l1_table_offset: HostOffset(0),
            l1_size: 0,
            id: id.as_bytes().to_vec(),
            name: Vec::new(),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: None,
            icount: None,
            extra_size: 0,
            unknown_extra: Vec::new(),
        };
        next_id(&ids.iter().map(entry).collect::<Vec<_>>())
    }

    #[test]
    fn a_new_snapshot_has_an_identifier_that_no_other_has() {
        assert_eq!(id_after(&[]), "1");
        assert_eq!(id_after(&["7", "x", "3", ""]), "8");
        let most = u64::MAX.to_string();
        assert_eq!(id_after(&["2", "1", &most]), "3");
    }
}
