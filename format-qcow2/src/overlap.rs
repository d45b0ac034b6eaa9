//! Which host clusters hold metadata, so that no data and no new table is ever written over it, whatever damaged refcounts or
//! entries say. What is known here is kept in memory and costs a look for each allocation, each slice that is read, and each
//! write that the core doesn't map itself. The option `overlap-check` says which kinds are looked for.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use bitflags::bitflags;
use block_core::error::{Error, Result};
use parking_lot::RwLock;

use crate::{
    cache::{refcounts::RefcountStore, slice::NumberMap},
    image::L1Table,
    layout::{Geometry, Header, L1Entry},
};

bitflags! {
    /// Kinds of metadata.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct Kinds: u16 {
        const MAIN_HEADER = 1 << 0;
        const ACTIVE_L1 = 1 << 1;
        const ACTIVE_L2 = 1 << 2;
        const REFCOUNT_BLOCK = 1 << 3;
        const REFCOUNT_TABLE = 1 << 4;
        const SNAPSHOT_TABLE = 1 << 5;
        const INACTIVE_L1 = 1 << 6;
        const INACTIVE_L2 = 1 << 7;
        const BITMAP_DIRECTORY = 1 << 8;

        /// `overlap-check=constant`: what needs a look at the header only.
        const CONSTANT = Self::MAIN_HEADER.bits() | Self::ACTIVE_L1.bits() | Self::REFCOUNT_TABLE.bits()
            | Self::SNAPSHOT_TABLE.bits() | Self::BITMAP_DIRECTORY.bits();
        /// `overlap-check=cached`, the default: all but what would have to be read for it.
        const CACHED = Self::CONSTANT.bits() | Self::ACTIVE_L2.bits() | Self::REFCOUNT_BLOCK.bits()
            | Self::INACTIVE_L1.bits();
    }
}

impl Kinds {
    /// What a mode stands for.
    pub fn of_mode(mode: &str) -> Option<Self> {
        match mode {
            "none" => Some(Self::empty()),
            "constant" => Some(Self::CONSTANT),
            "cached" => Some(Self::CACHED),
            "all" => Some(Self::all()),
            _ => None,
        }
    }

    /// The kind that the option `overlap-check.NAME` switches.
    pub fn of_option(name: &str) -> Option<Self> {
        Some(match name {
            "main-header" => Self::MAIN_HEADER,
            "active-l1" => Self::ACTIVE_L1,
            "active-l2" => Self::ACTIVE_L2,
            "refcount-block" => Self::REFCOUNT_BLOCK,
            "refcount-table" => Self::REFCOUNT_TABLE,
            "snapshot-table" => Self::SNAPSHOT_TABLE,
            "inactive-l1" => Self::INACTIVE_L1,
            "inactive-l2" => Self::INACTIVE_L2,
            "bitmap-directory" => Self::BITMAP_DIRECTORY,
            _ => return None,
        })
    }

    /// The first kind among these, in messages.
    fn shown(self) -> &'static str {
        const NAMES: [(Kinds, &str); 9] = [
            (Kinds::MAIN_HEADER, "qcow2_header"),
            (Kinds::ACTIVE_L1, "active L1 table"),
            (Kinds::ACTIVE_L2, "active L2 table"),
            (Kinds::REFCOUNT_BLOCK, "refcount block"),
            (Kinds::REFCOUNT_TABLE, "refcount table"),
            (Kinds::SNAPSHOT_TABLE, "snapshot table"),
            (Kinds::INACTIVE_L1, "inactive L1 table"),
            (Kinds::INACTIVE_L2, "inactive L2 table"),
            (Kinds::BITMAP_DIRECTORY, "bitmap directory"),
        ];
        NAMES
            .iter()
            .find(|(kind, _)| self.contains(*kind))
            .map_or("metadata", |(_, name)| name)
    }
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct MetadataMap {
    clusters: RwLock<NumberMap<Kinds>>,
    /// Counts, from 1 on, the times that clusters were added or other kinds were looked for.
    generation: AtomicU64,
    /// Kinds of clusters that were found in two roles: nothing may be written to any table, as it may be another one, too.
    overlapping: AtomicU16,
    /// What is looked for.
    wanted: AtomicU16,
    /// Off in tests only.
    enabled: bool,
}

impl MetadataMap {
    pub fn new(enabled: bool, wanted: Kinds) -> Self {
        Self {
            clusters: RwLock::default(),
            generation: AtomicU64::new(1),
            overlapping: AtomicU16::new(0),
            wanted: AtomicU16::new(wanted.bits()),
            enabled,
        }
    }

    /// What is looked for.
    pub fn wanted(&self) -> Kinds {
        Kinds::from_bits_truncate(self.wanted.load(Ordering::Acquire))
    }

    /// From here on other kinds are looked for.
    pub fn want(&self, wanted: Kinds) {
        self.wanted.store(wanted.bits(), Ordering::Release);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Forgets everything, and notes what an image's tables point to.
    pub fn rebuild(&self, header: &Header, l1: &L1Table, refcounts: &RefcountStore) {
        if !self.enabled {
            return;
        }
        let geometry = header.geometry();
        let mut clusters: NumberMap<Kinds> = NumberMap::default();
        let mut overlapping = Kinds::empty();
        let mut put = |cluster: u64, kind: Kinds| {
            let there = clusters.entry(cluster).or_default();
            if !there.is_empty() {
                overlapping |= *there | kind;
            }
            *there |= kind;
        };
        let place = refcounts.place();
        let table_len = u64::from(place.clusters) << geometry.cluster_bits();
        put(0, Kinds::MAIN_HEADER);
        for cluster in range(geometry, l1.offset.0, l1.entries.len() as u64 * 8) {
            put(cluster, Kinds::ACTIVE_L1);
        }
        for cluster in range(geometry, place.offset.0, table_len) {
            put(cluster, Kinds::REFCOUNT_TABLE);
        }
        // Tables that may be changed in place, by cluster. Others may be shared: they are copied before a change.
        let mut tables: NumberMap<bool> = NumberMap::default();
        let mut twice = Kinds::empty();
        for index in 0..l1.entries.len() as u64 {
            if let Ok(L1Entry {
                l2: Some(host),
                copied,
            }) = L1Entry::decode(l1.load(index), geometry)
            {
                let cluster = geometry.host_cluster_of(host).0;
                match tables.insert(cluster, copied) {
                    None => put(cluster, Kinds::ACTIVE_L2),
                    Some(other) if other || copied => twice = Kinds::ACTIVE_L2,
                    Some(_) => {}
                }
            }
        }
        for index in 0..refcounts.table_len() {
            if let Some(host) = refcounts.block_offset(index) {
                put(geometry.host_cluster_of(host).0, Kinds::REFCOUNT_BLOCK);
            }
        }
        overlapping |= twice;
        *self.clusters.write() = clusters;
        self.overlapping
            .store(overlapping.bits(), Ordering::Release);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// How often clusters were added, counted from 1.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Refuses to change any table or refcount of an image whose metadata overlaps itself.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check_sound(&self) -> Result<()> {
        let bits = self.overlapping.load(Ordering::Acquire);
        if bits == 0 {
            return Ok(());
        }
        match Kinds::from_bits_truncate(bits) & self.wanted() {
            none if none.is_empty() => Ok(()),
            kinds => Err(refused(kinds)),
        }
    }

    /// Notes clusters that hold metadata of one kind from now on.
    pub fn add(&self, kind: Kinds, clusters: impl IntoIterator<Item = u64>) {
        if self.enabled {
            let mut map = self.clusters.write();
            for cluster in clusters {
                *map.entry(cluster).or_default() |= kind;
            }
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Clusters hold metadata of these kinds no more.
    pub fn remove(&self, kinds: Kinds, clusters: impl IntoIterator<Item = u64>) {
        let mut map = self.clusters.write();
        for cluster in clusters {
            if let Some(there) = map.get_mut(&cluster) {
                there.remove(kinds);
                if there.is_empty() {
                    map.remove(&cluster);
                }
            }
        }
    }

    /// Whether any of the clusters holds metadata.
    pub fn overlaps(&self, clusters: impl IntoIterator<Item = u64>) -> bool {
        !self.kinds_in(clusters).is_empty()
    }

    /// The kinds among those that are looked for that the first such cluster holds.
    fn kinds_in(&self, clusters: impl IntoIterator<Item = u64>) -> Kinds {
        let wanted = self.wanted();
        if wanted.is_empty() {
            return wanted;
        }
        let map = self.clusters.read();
        clusters
            .into_iter()
            .filter_map(|cluster| map.get(&cluster))
            .map(|kinds| *kinds & wanted)
            .find(|kinds| !kinds.is_empty())
            .unwrap_or_default()
    }

    /// Refuses to take the file from cluster `start` on for free if there is metadata in it.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check_from(&self, start: u64, geometry: Geometry) -> Result<()> {
        let found = self
            .clusters
            .read()
            .keys()
            .copied()
            .filter(|cluster| *cluster >= start)
            .min();
        found.map_or(Ok(()), |cluster| self.check(cluster, 1, geometry))
    }

    /// Refuses to write to clusters if any of them holds metadata.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check(&self, first: u64, count: u64, geometry: Geometry) -> Result<()> {
        match self.kinds_in(first..first + count) {
            none if none.is_empty() => Ok(()),
            kinds => {
                tracing::debug!(
                    "qcow2: {count} host clusters from {:#x} on hold metadata",
                    first << geometry.cluster_bits()
                );
                Err(refused(kinds))
            }
        }
    }
}

fn refused(kinds: Kinds) -> Error {
    Error::corrupt(format!(
        "Preventing invalid write on metadata (overlaps with {})",
        kinds.shown()
    ))
}

/// The clusters that a range of the file touches.
pub(crate) fn range(geometry: Geometry, offset: u64, len: u64) -> std::ops::Range<u64> {
    let bits = geometry.cluster_bits();
    offset >> bits..(offset + len).div_ceil(geometry.cluster_size())
}
