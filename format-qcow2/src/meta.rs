//! What the metadata lock protects: the header, the refcounts, what is allocated but not linked, what is unlinked but not
//! free, and which parts of the tables in memory are newer than those on disk.
//!
//! Whoever holds the lock may do metadata I/O, never data I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use block_core::{
    error::{Error, Result},
    flags::RequestFlags,
    request::Child,
    space::{Link, SpaceEvent, SpaceTap},
};
use parking_lot::Mutex;

use crate::{
    alloc::{allocator::Orphans, quarantine::Quarantine},
    cache::{
        refcounts::RefcountStore,
        slice::{NumberSet, Slice, SliceIndex},
    },
    layout::{ClusterIndex, Geometry, Header, HostOffset, L2Entry, RawEntry, SnapshotEntry, Space},
    overlap::MetadataMap,
};

/// See the file's header.
pub(crate) struct Meta {
    pub geometry: Geometry,
    pub header: Header,
    pub refcounts: RefcountStore,
    /// The snapshot table.
    pub snapshots: Vec<SnapshotEntry>,
    /// No cluster below this one is free.
    pub hint: u64,
    /// Clusters that were handed out and aren't linked yet, by number.
    pub unlinked: NumberSet,
    /// Where the next compressed cluster is packed to.
    pub packing: Option<HostOffset>,
    pub quarantine: Quarantine,
    /// Slices that are newer than on disk; being in here keeps them in memory.
    pub dirty_slices: BTreeMap<u64, Arc<Slice>>,
    /// L1 entries that are newer than on disk.
    pub dirty_l1: BTreeSet<u64>,
    /// Something was linked since the last snapshot: data has to be durable before the tables.
    pub linked: bool,
    /// The number of the next snapshot.
    pub batch: u64,
    /// The last batch that succeeded.
    pub durable: u64,
    pub orphans: Orphans,
    pub metadata: Arc<MetadataMap>,
    pub failure: Arc<Failure>,
    /// Off in tests only.
    pub safeguards: bool,
    /// Who is told what happens to clusters.
    pub tap: Arc<SpaceTap>,
}

/// What a raw entry of a guest cluster links to, as those who watch the driver are told.
pub(crate) fn link_of(raw: RawEntry, cluster: ClusterIndex, geometry: Geometry) -> Option<Link> {
    if geometry.has_data_file() {
        // What is in the data file takes no space in the image.
        return None;
    }
    let guest = geometry.cluster_start(cluster).0;
    match L2Entry::decode(raw, geometry).ok()? {
        L2Entry::Compressed(run) => {
            let (first, last) = run.clusters(geometry);
            Some(Link {
                guest,
                host: first << geometry.cluster_bits(),
                len: (last - first + 1) << geometry.cluster_bits(),
                shared: true,
            })
        }
        entry => entry.space().map(|Space { host, copied }| Link {
            guest,
            host: host.0,
            len: geometry.cluster_size(),
            shared: !copied,
        }),
    }
}

impl Meta {
    pub fn new(
        header: Header,
        mut refcounts: RefcountStore,
        orphans: Orphans,
        metadata: Arc<MetadataMap>,
        failure: Arc<Failure>,
        safeguards: bool,
        tap: Arc<SpaceTap>,
    ) -> Self {
        refcounts.tap = tap.clone();
        Self {
            geometry: header.geometry(),
            header,
            refcounts,
            snapshots: Vec::new(),
            hint: 0,
            unlinked: NumberSet::default(),
            packing: None,
            quarantine: Quarantine::default(),
            dirty_slices: BTreeMap::new(),
            dirty_l1: BTreeSet::new(),
            linked: false,
            batch: 1,
            durable: 0,
            orphans,
            metadata,
            failure,
            safeguards,
            tap,
        }
    }

    /// Changes an entry of a slice and notes it as dirty.
    pub fn set_entry(&mut self, index: SliceIndex, slice: &Arc<Slice>, at: usize, raw: RawEntry) {
        if self.tap.is_set() {
            self.tell_change(index, slice, at, raw);
        }
        slice.store(at, raw);
        self.dirty_slices
            .entry(index.0)
            .or_insert_with(|| slice.clone());
    }

    #[cold]
    fn tell_change(&self, index: SliceIndex, slice: &Slice, at: usize, raw: RawEntry) {
        let cluster = ClusterIndex(index.0 * slice.len() as u64 + at as u64);
        let old = link_of(slice.load(at), cluster, self.geometry);
        let new = link_of(raw, cluster, self.geometry);
        if old == new {
            return;
        }
        if let Some(old) = old {
            self.tap.tell(|| SpaceEvent::Unlinked(old));
        }
        if let Some(new) = new {
            self.tap.tell(|| SpaceEvent::Linked(new));
        }
    }

    /// Whether anything in memory is newer than on disk.
    pub fn is_dirty(&self) -> bool {
        !self.dirty_slices.is_empty() || !self.dirty_l1.is_empty() || self.refcounts.is_dirty()
    }
}

/// What went wrong for good: after a flush that failed it is unknown what is durable, so no metadata is written any more
/// until the image is reopened, which reads it again.
#[derive(Debug, Default)]
pub(crate) struct Failure(Mutex<Option<Error>>);

impl Failure {
    /// The error that was met, if one was.
    pub fn check(&self) -> Result<()> {
        match &*self.0.lock() {
            Some(error) => Err(error.duplicate()),
            None => Ok(()),
        }
    }

    /// The image was reopened: its metadata in memory is to be trusted again.
    pub fn forget(&self) {
        *self.0.lock() = None;
    }

    /// Remembers an error after which it is unknown what is on disk.
    pub fn note<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            *self.0.lock() = Some(error.duplicate());
        }
        result
    }

    /// Makes what was written durable, and remembers if that fails.
    pub async fn flush(&self, file: &Child) -> Result<()> {
        self.note(file.flush().await)
    }
}

/// Writes some bytes of the header in place, and makes that durable.
pub(crate) async fn write_header_field(
    file: &Child,
    failure: &Failure,
    offset: u64,
    bytes: Vec<u8>,
) -> Result<()> {
    // A write that failed may have changed the header all the same.
    failure.note(file.write(offset, bytes, RequestFlags::empty()).await)?;
    failure.flush(file).await
}
