//! Which host clusters hold metadata, so that no data and no new table is ever written over it, whatever damaged refcounts or
//! entries say. Only what the header, the L1 table and the refcount table point to is known here; it is kept in memory
//! and costs a look for each allocation, each slice that is read, and each write that the core doesn't map itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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

/// See the file's header.
#[derive(Debug)]
pub(crate) struct MetadataMap {
    clusters: RwLock<NumberSet>,
    /// Counts, from 1 on, the times that clusters were added.
    generation: AtomicU64,
    /// Some cluster was found in two roles: nothing may be written to any table, as it may be another one, too.
    overlapping: AtomicBool,
    /// Off in tests only.
    enabled: bool,
}

impl MetadataMap {
    pub fn new(enabled: bool) -> Self {
        Self {
            clusters: RwLock::default(),
            generation: AtomicU64::new(1),
            overlapping: AtomicBool::new(false),
            enabled,
        }
    }

    /// Forgets everything, and notes what an image's tables point to.
    pub fn rebuild(&self, header: &Header, l1: &L1Table, refcounts: &RefcountStore) {
        if !self.enabled {
            return;
        }
        let geometry = header.geometry();
        let mut clusters = NumberSet::default();
        let mut overlapping = false;
        let place = refcounts.place();
        let table_len = u64::from(place.clusters) << geometry.cluster_bits();
        for cluster in std::iter::once(0)
            .chain(range(geometry, l1.offset.0, l1.entries.len() as u64 * 8))
            .chain(range(geometry, place.offset.0, table_len))
        {
            overlapping |= !clusters.insert(cluster);
        }
        // Tables that may be changed in place, by cluster. Others may be shared: they are copied before a change.
        let mut tables: NumberMap<bool> = NumberMap::default();
        for index in 0..l1.entries.len() as u64 {
            if let Ok(L1Entry {
                l2: Some(host),
                copied,
            }) = L1Entry::decode(l1.load(index), geometry)
            {
                let cluster = geometry.host_cluster_of(host).0;
                overlapping |= match tables.insert(cluster, copied) {
                    None => !clusters.insert(cluster),
                    Some(other) => other || copied,
                };
            }
        }
        for index in 0..refcounts.table_len() {
            if let Some(host) = refcounts.block_offset(index) {
                overlapping |= !clusters.insert(geometry.host_cluster_of(host).0);
            }
        }
        *self.clusters.write() = clusters;
        self.overlapping.store(overlapping, Ordering::Release);
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
        if self.overlapping.load(Ordering::Acquire) {
            return Err(Error::corrupt(
                "Preventing invalid write on metadata (tables or refcount blocks overlap)",
            ));
        }
        Ok(())
    }

    /// Notes clusters that hold metadata from now on.
    pub fn add(&self, clusters: impl IntoIterator<Item = u64>) {
        if self.enabled {
            self.clusters.write().extend(clusters);
            self.generation.fetch_add(1, Ordering::Release);
        }
    }

    /// Clusters hold metadata no more.
    pub fn remove(&self, clusters: impl IntoIterator<Item = u64>) {
        let mut map = self.clusters.write();
        for cluster in clusters {
            map.remove(&cluster);
        }
    }

    /// Whether any of the clusters holds metadata.
    pub fn overlaps(&self, clusters: impl IntoIterator<Item = u64>) -> bool {
        let map = self.clusters.read();
        clusters.into_iter().any(|cluster| map.contains(&cluster))
    }

    /// Refuses to take the file from cluster `start` on for free if there is metadata in it.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn check_from(&self, start: u64, geometry: Geometry) -> Result<()> {
        let found = self
            .clusters
            .read()
            .iter()
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
        if self.overlaps(first..first + count) {
            return Err(Error::corrupt(format!(
                "Preventing invalid write on metadata (host offset {:#x}, {count} clusters)",
                first << geometry.cluster_bits()
            )));
        }
        Ok(())
    }
}

/// The clusters that a range of the file touches.
fn range(geometry: Geometry, offset: u64, len: u64) -> std::ops::Range<u64> {
    let bits = geometry.cluster_bits();
    offset >> bits..(offset + len).div_ceil(geometry.cluster_size())
}
