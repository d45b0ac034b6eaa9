//! An open image: everything that its requests share. What each kind of request does with it is in `io`.
//!
//! Lock order: the write-back's turn, then the metadata lock, then (never across an await) a shard of the slice table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use block_core::{
    driver::ChildRole,
    error::{Error, ErrorKind, Result},
    pins::Pins,
    request::{Child, Request},
    space::SpaceTap,
};
use futures::lock::{Mutex, MutexGuard};

use crate::{
    bitmaps::Stored,
    cache::{slice::SliceIndex, slices::SliceCache},
    claims::Claims,
    compress::Codec,
    counters::Counters,
    encryption::Encryption,
    header_update,
    io::compressed::PackingOrder,
    layout::{ClusterIndex, Geometry, GuestOffset, HostOffset, Incompatible, L1Entry, units::hex},
    meta::Meta,
    overlap::MetadataMap,
    settings::Settings,
    writeback::Writeback,
};

/// The active L1 table. Entries are changed by the holder of the metadata lock; anyone loads them.
#[derive(Debug)]
pub(crate) struct L1Table {
    pub offset: HostOffset,
    pub entries: Box<[AtomicU64]>,
}

impl L1Table {
    pub fn new(offset: HostOffset, entries: impl IntoIterator<Item = u64>) -> Self {
        Self {
            offset,
            entries: entries.into_iter().map(AtomicU64::new).collect(),
        }
    }

    /// An entry's raw bits; beyond the table everything is unallocated.
    pub fn load(&self, index: u64) -> u64 {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.entries.get(index))
            .map_or(0, |entry| entry.load(Ordering::SeqCst))
    }
}

/// An open image.
pub(crate) struct Qcow2 {
    pub geometry: Geometry,
    pub settings: Settings,
    pub filename: String,
    /// Bytes of the virtual disk.
    pub size: AtomicU64,
    /// The external data file, taken for a raw image, holds what the guest sees.
    pub raw_data: AtomicBool,
    /// How compressed clusters are compressed.
    pub codec: Codec,
    /// In which order compressed clusters are placed.
    pub packing_order: PackingOrder,
    pub read_only: AtomicBool,
    /// The header names a backing file, whether or not one is open.
    pub names_backing: AtomicBool,
    /// The identifier of the internal snapshot that it shows: read-only for good.
    pub view: Option<String>,
    /// A write of the header that switches to other tables failed: it is unknown which of them count, so nothing is
    /// written any more until the image is reopened.
    pub uncertain: AtomicBool,
    /// A change of the size failed on its last steps: the header on disk may say another one than memory does.
    pub size_in_doubt: AtomicBool,
    /// Found corrupt while it was writable: no request is served any more.
    pub shut: AtomicBool,
    /// Opened for a check with the dirty bit set, and not repaired since: the bit stays.
    pub stale: AtomicBool,
    /// Amended to something that this can't go on with: it has to be opened again.
    pub retired: AtomicBool,
    /// Found corrupt while it was read-only, and said so.
    pub warned_corrupt: AtomicBool,
    pub l1: ArcSwap<L1Table>,
    /// Shared with [`Meta`].
    pub metadata: Arc<MetadataMap>,
    pub slices: SliceCache,
    pub claims: Claims,
    pub pins: Pins,
    pub meta: Mutex<Meta>,
    /// The directory of persistent bitmaps as it is on disk; the bitmaps themselves are in the node.
    pub bitmaps: Stored,
    pub writeback: Writeback,
    pub counters: Counters,
    /// The key of an encrypted image.
    pub encryption: Option<Encryption>,
    /// Shared with [`Meta`].
    pub tap: Arc<SpaceTap>,
    /// What [`Meta`] last said about its sizes, for decisions made without the lock.
    pub quarantined: AtomicU64,
    pub cached_refcount_blocks: AtomicUsize,
    /// Counts the tasks that clean the caches: only the last one goes on.
    pub cleaner: AtomicU64,
}

impl Qcow2 {
    /// Entries in a slice.
    pub fn slice_entries(&self) -> u64 {
        1 << self.settings.slice_bits()
    }

    /// Bytes of a slice.
    pub fn slice_bytes(&self) -> u64 {
        self.slice_entries() << self.geometry.l2_entry_bits()
    }

    /// The slice that maps a guest cluster.
    pub fn slice_of(&self, cluster: ClusterIndex) -> SliceIndex {
        SliceIndex(cluster.0 >> self.settings.slice_bits())
    }

    /// A guest cluster's entry in its slice.
    pub fn slice_entry(&self, cluster: ClusterIndex) -> usize {
        (cluster.0 & (self.slice_entries() - 1)) as usize
    }

    /// The first guest cluster of a slice.
    pub fn slice_start(&self, index: SliceIndex) -> ClusterIndex {
        ClusterIndex(index.0 << self.settings.slice_bits())
    }

    /// Bytes of the disk up to the end of the slice that maps `offset`.
    pub fn left_in_slice(&self, offset: u64) -> u64 {
        let coverage = self.slice_entries() << self.geometry.cluster_bits();
        coverage - offset % coverage
    }

    /// Bytes of the disk up to the end of the L2 table that maps `offset`.
    pub const fn left_in_table(&self, offset: u64) -> u64 {
        let coverage = self.geometry.l2_coverage();
        coverage - offset % coverage
    }

    /// The L1 entry above a slice.
    pub fn l1_of(&self, index: SliceIndex) -> u64 {
        self.geometry.l1_index(self.slice_start(index))
    }

    /// Where a slice is in the file, given its L2 table.
    pub fn slice_host(&self, index: SliceIndex, table: HostOffset) -> HostOffset {
        let first = self.geometry.l2_index(self.slice_start(index));
        HostOffset(table.0 + (first << self.geometry.l2_entry_bits()))
    }

    /// The L2 table above a slice, now.
    pub fn table_of(&self, index: SliceIndex) -> Result<L1Entry> {
        let at = self.l1_of(index);
        L1Entry::decode(self.l1.load().load(at), self.geometry).map_err(|problem| {
            Error::corrupt(format!("L2 table {problem} (L1 index: {})", hex(at)))
        })
    }

    pub fn length(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub fn cluster_of(&self, offset: u64) -> ClusterIndex {
        self.geometry.cluster_of(GuestOffset(offset))
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Whether what isn't allocated may read as something other than zeroes.
    pub fn has_backing(&self, request: &Request) -> bool {
        request.backing().is_some() || self.names_backing.load(Ordering::Acquire)
    }

    /// The role of the child that holds guest data.
    pub const fn data_role(&self) -> ChildRole {
        if self.geometry.has_data_file() {
            ChildRole::DataFile
        } else {
            ChildRole::File
        }
    }

    /// The child that holds guest data: the external data file of an image that has one, else the image file. Host offsets
    /// of standard clusters are offsets in it. All else (tables, refcounts, compressed clusters) is in the image file.
    ///
    /// # Errors
    /// ENOMEDIUM when the data file isn't open.
    pub fn data<'a>(&self, request: &'a Request) -> Result<&'a Child> {
        if !self.geometry.has_data_file() {
            return request.file();
        }
        request.child(ChildRole::DataFile).ok_or_else(|| {
            Error::new(ErrorKind::NoMedium, "The external data file is not open")
                .with_file(self.filename.clone())
        })
    }

    /// ENOMEDIUM once the image was found corrupt, or was amended so that it has to be opened again.
    pub fn check_usable(&self) -> Result<()> {
        if self.retired.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::NoMedium,
                "The image was amended and has to be opened again",
            )
            .with_file(self.filename.clone()));
        }
        if self.shut.load(Ordering::Acquire) {
            return Err(
                Error::new(ErrorKind::NoMedium, "No medium found").with_file(self.filename.clone())
            );
        }
        Ok(())
    }

    /// EPERM for what would change a read-only image.
    pub fn check_writable(&self) -> Result<()> {
        self.check_usable()?;
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::NotPermitted, "Image is read-only")
                .with_file(self.filename.clone()));
        }
        if self.is_uncertain() {
            return Err(Error::io(
                "It is unknown which tables the header points to; the image has to be reopened",
            )
            .with_file(self.filename.clone()));
        }
        Ok(())
    }

    /// Whether nothing may be written until the image is reopened.
    pub fn is_uncertain(&self) -> bool {
        self.uncertain.load(Ordering::Acquire)
    }

    /// Takes the metadata lock, and sees to what dropped allocations left behind.
    pub async fn lock_meta(&self, file: &Child) -> Result<MutexGuard<'_, Meta>> {
        let mut meta = self.meta.lock().await;
        meta.adopt_orphans(file).await?;
        Ok(meta)
    }

    /// Notes sizes for decisions that are made without the lock; called before it is dropped.
    pub fn note_sizes(&self, meta: &Meta) {
        self.quarantined
            .store(meta.quarantine.len(), Ordering::Relaxed);
        Counters::max(&self.counters.quarantine_peak, meta.quarantine.len());
        self.cached_refcount_blocks
            .store(meta.refcounts.cached(), Ordering::Relaxed);
    }

    /// Before the first allocation: with lazy refcounts the dirty bit says, durably, that refcounts aren't to be trusted.
    pub async fn mark_in_use(&self, meta: &mut Meta, file: &Child) -> Result<()> {
        if !self.settings.lazy_refcounts() || meta.header.is_dirty() {
            return Ok(());
        }
        let before = meta.header.incompatible;
        let bits = before | Incompatible::DIRTY;
        header_update::write_incompatible(file, &mut meta.header, bits).await?;
        let durable = self.writeback.failure.flush(file).await;
        if durable.is_err() {
            // Whoever comes next must not take it for done.
            meta.header.incompatible = before;
        }
        durable
    }

    /// Sees what an error means: damaged metadata of a writable image shuts it, durably marked corrupt. Not to be called
    /// with the metadata lock held.
    pub async fn judge(&self, request: &Request, error: Error) -> Error {
        let error = error.with_file(self.filename.clone());
        if error.kind() == ErrorKind::Corrupt && error.node().is_none() {
            self.mark_corrupt(request, &error).await;
        }
        error
    }

    async fn mark_corrupt(&self, request: &Request, error: &Error) {
        if self.is_read_only() {
            if self.warned_corrupt.swap(true, Ordering::AcqRel) {
                return;
            }
            tracing::error!(
                "qcow2: Image is corrupt: {}; further non-fatal corruption events will be suppressed",
                error.reason()
            );
            return;
        }
        if self.shut.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!(
            "qcow2: Marking image as corrupt: {}; further corruption events will be suppressed",
            error.reason()
        );
        let mut meta = self.meta.lock().await;
        // A repair that held the lock may have made it good.
        if meta.header.version < 3 || !self.shut.load(Ordering::Acquire) {
            return;
        }
        let Ok(file) = request.file() else { return };
        let bits = meta.header.incompatible | Incompatible::CORRUPT;
        let written = match header_update::write_incompatible(file, &mut meta.header, bits).await {
            Ok(()) => file.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::error!("qcow2: could not mark the image as corrupt: {error}");
        }
    }
}
