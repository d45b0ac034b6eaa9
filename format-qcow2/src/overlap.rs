//! Which host clusters hold metadata, so that no data and no new table is ever written over it, whatever damaged refcounts or
//! entries say. What is known here is kept in memory and costs a look for each allocation, each slice that is read, and each
//! write that the core doesn't map itself. The option `overlap-check` says which kinds are looked for.

use std::{
    ops::Range,
    sync::atomic::{AtomicU16, AtomicU64, Ordering},
};

use bitflags::bitflags;
use block_core::error::{Error, Result};
use parking_lot::RwLock;

use crate::{
    cache::{
        refcounts::RefcountStore,
        slice::{NumberMap, NumberSet},
    },
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
        const BITMAP_TABLE = 1 << 9;
        const BITMAP_DATA = 1 << 10;
        const LUKS_HEADER = 1 << 11;

        /// All that belongs to persistent bitmaps.
        const BITMAPS = Self::BITMAP_DIRECTORY.bits() | Self::BITMAP_TABLE.bits() | Self::BITMAP_DATA.bits();
        /// `overlap-check=constant`: what needs a look at the header only.
        const CONSTANT = Self::MAIN_HEADER.bits() | Self::ACTIVE_L1.bits() | Self::REFCOUNT_TABLE.bits()
            | Self::SNAPSHOT_TABLE.bits() | Self::BITMAP_DIRECTORY.bits() | Self::LUKS_HEADER.bits();
        /// `overlap-check=cached`, the default: all but what would have to be read for it.
        const CACHED = Self::CONSTANT.bits() | Self::ACTIVE_L2.bits() | Self::REFCOUNT_BLOCK.bits()
            | Self::INACTIVE_L1.bits() | Self::BITMAPS.bits();
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

    /// The first kind among these, in messages. Of two tables in one place it is the one that qemu names.
    fn shown(self) -> &'static str {
        const NAMES: [(Kinds, &str); 12] = [
            (Kinds::MAIN_HEADER, "qcow2_header"),
            (Kinds::ACTIVE_L1, "active L1 table"),
            (Kinds::REFCOUNT_TABLE, "refcount table"),
            (Kinds::SNAPSHOT_TABLE, "snapshot table"),
            (Kinds::INACTIVE_L1, "inactive L1 table"),
            (Kinds::LUKS_HEADER, "LUKS header"),
            (Kinds::ACTIVE_L2, "active L2 table"),
            (Kinds::INACTIVE_L2, "inactive L2 table"),
            (Kinds::REFCOUNT_BLOCK, "refcount block"),
            (Kinds::BITMAP_DIRECTORY, "bitmap directory"),
            (Kinds::BITMAP_TABLE, "bitmap table"),
            (Kinds::BITMAP_DATA, "bitmap data"),
        ];
        NAMES
            .iter()
            .find(|(kind, _)| self.contains(*kind))
            .map_or("metadata", |(_, name)| name)
    }
}

/// Metadata that isn't found by following the header's refcount table and active L1 table. What lies in rows stays where it is
/// until snapshots change.
#[derive(Debug, Default)]
pub(crate) struct Others {
    /// Rows of clusters and what they hold.
    pub rows: Vec<(Range<u64>, Kinds)>,
    /// L2 tables of snapshots, by cluster. Only looked for when they are wanted.
    pub inactive_l2: NumberSet,
}

/// Rows of clusters by kind: disjoint and ascending.
#[derive(Debug, Default)]
struct Rows(Vec<(Kinds, Vec<Range<u64>>)>);

impl Rows {
    fn new(rows: &[(Range<u64>, Kinds)]) -> Self {
        let mut by_kind: Vec<(Kinds, Vec<Range<u64>>)> = Vec::new();
        let mut sorted: Vec<_> = rows.iter().filter(|(row, _)| !row.is_empty()).collect();
        sorted.sort_unstable_by_key(|(row, kind)| (kind.bits(), row.start));
        for (row, kind) in sorted {
            match by_kind.last_mut() {
                Some((last, ranges)) if last == kind => match ranges.last_mut() {
                    Some(before) if before.end >= row.start => before.end = before.end.max(row.end),
                    _ => ranges.push(row.clone()),
                },
                _ => by_kind.push((*kind, vec![row.clone()])),
            }
        }
        Self(by_kind)
    }

    /// What a cluster holds.
    fn at(&self, cluster: u64) -> Kinds {
        let mut found = Kinds::empty();
        for (kind, ranges) in &self.0 {
            let behind = ranges.partition_point(|row| row.end <= cluster);
            if ranges.get(behind).is_some_and(|row| row.start <= cluster) {
                found |= *kind;
            }
        }
        found
    }

    /// The first cluster from `start` on that holds anything.
    fn first_from(&self, start: u64) -> Option<u64> {
        let all = self.0.iter().flat_map(|(_, ranges)| ranges);
        all.filter(|row| row.end > start)
            .map(|row| row.start.max(start))
            .min()
    }
}

#[derive(Debug, Default)]
struct Known {
    clusters: NumberMap<Kinds>,
    rows: Rows,
}

impl Known {
    fn at(&self, cluster: u64) -> Kinds {
        let single = self.clusters.get(&cluster).copied().unwrap_or_default();
        if self.rows.0.is_empty() {
            return single;
        }
        single | self.rows.at(cluster)
    }
}

/// See the file's header.
#[derive(Debug)]
pub(crate) struct MetadataMap {
    known: RwLock<Known>,
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
            known: RwLock::default(),
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

    /// Forgets everything but bitmaps, and notes what an image's tables point to, and `others`.
    pub fn rebuild(
        &self,
        header: &Header,
        l1: &L1Table,
        refcounts: &RefcountStore,
        others: &Others,
    ) {
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
        let rows = Rows::new(&others.rows);
        for cluster in clusters.keys() {
            overlapping |= rows.at(*cluster);
        }
        for (row, kind) in &others.rows {
            // Nobody writes to the other kinds of rows where they are.
            if *kind == Kinds::LUKS_HEADER {
                let mut shared = others.rows.iter().filter(|(other, kind)| {
                    *kind != Kinds::LUKS_HEADER && other.start < row.end && row.start < other.end
                });
                if shared.next().is_some() {
                    overlapping |= Kinds::LUKS_HEADER;
                }
            }
        }
        for cluster in &others.inactive_l2 {
            let there = clusters.entry(*cluster).or_default();
            let shared = *there == Kinds::ACTIVE_L2 && tables.get(cluster) == Some(&false);
            if !there.is_empty() && !shared || rows.at(*cluster).contains(Kinds::LUKS_HEADER) {
                overlapping |= Kinds::INACTIVE_L2;
            }
            *there |= Kinds::INACTIVE_L2;
        }
        let mut known = self.known.write();
        for (cluster, kinds) in &known.clusters {
            let bitmaps = *kinds & Kinds::BITMAPS;
            if !bitmaps.is_empty() {
                *clusters.entry(*cluster).or_default() |= bitmaps;
            }
        }
        *known = Known { clusters, rows };
        drop(known);
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
            let map = &mut self.known.write().clusters;
            for cluster in clusters {
                *map.entry(cluster).or_default() |= kind;
            }
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Clusters hold metadata of these kinds no more.
    pub fn remove(&self, kinds: Kinds, clusters: impl IntoIterator<Item = u64>) {
        let map = &mut self.known.write().clusters;
        for cluster in clusters {
            if let Some(there) = map.get_mut(&cluster) {
                there.remove(kinds);
                if there.is_empty() {
                    map.remove(&cluster);
                }
            }
        }
    }

    /// Forgets where bitmaps are.
    pub fn forget_bitmaps(&self) {
        self.known.write().clusters.retain(|_, kinds| {
            kinds.remove(Kinds::BITMAPS);
            !kinds.is_empty()
        });
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
        let known = self.known.read();
        clusters
            .into_iter()
            .map(|cluster| known.at(cluster) & wanted)
            .find(|kinds| !kinds.is_empty())
            .unwrap_or_default()
    }

    /// Refuses to take the file from cluster `start` on for free if there is metadata in it.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check_from(&self, start: u64, geometry: Geometry) -> Result<()> {
        let found = {
            let known = self.known.read();
            let single = known.clusters.keys().copied();
            let single = single.filter(|cluster| *cluster >= start);
            single.chain(known.rows.first_from(start)).min()
        };
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
pub(crate) fn range(geometry: Geometry, offset: u64, len: u64) -> Range<u64> {
    let bits = geometry.cluster_bits();
    offset >> bits..(offset + len).div_ceil(geometry.cluster_size())
}
