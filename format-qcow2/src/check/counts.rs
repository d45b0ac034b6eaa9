//! References counted per host cluster: two bytes for each cluster near one that is referenced, nothing for the rest
//! of a sparse file. No I/O.

use std::collections::{BTreeMap, btree_map::Entry};

use block_core::error::{Error, ErrorKind, Result};

/// Clusters in one chunk.
const CHUNK: u64 = 4096;
/// Stands for a count that is kept in `large`.
const LARGE: u16 = u16::MAX;

/// How often each host cluster is referenced. Counts saturate at `u64::MAX`.
#[derive(Debug, Default)]
pub(super) struct Counts {
    chunks: BTreeMap<u64, Box<[u16]>>,
    /// The counts that don't fit; their slot holds [`LARGE`].
    large: BTreeMap<u64, u64>,
}

impl Counts {
    /// Adds `by` references to `cluster` and gives back the new count.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn add(&mut self, cluster: u64, by: u64) -> Result<u64> {
        let (key, at) = (cluster / CHUNK, (cluster % CHUNK) as usize);
        let chunk = match self.chunks.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut chunk = Vec::new();
                chunk.try_reserve_exact(CHUNK as usize).map_err(|error| {
                    Error::new(
                        ErrorKind::OutOfMemory,
                        "no memory for the references of the image",
                    )
                    .with_source(error)
                })?;
                chunk.resize(CHUNK as usize, 0);
                entry.insert(chunk.into_boxed_slice())
            }
        };
        let slot = &mut chunk[at];
        let old = if *slot == LARGE {
            self.large.get(&cluster).copied().unwrap_or(LARGE.into())
        } else {
            u64::from(*slot)
        };
        let new = old.saturating_add(by);
        if new >= LARGE.into() {
            *slot = LARGE;
            self.large.insert(cluster, new);
        } else {
            *slot = new as u16;
        }
        Ok(new)
    }

    /// The references to `cluster`.
    pub fn get(&self, cluster: u64) -> u64 {
        match self
            .chunks
            .get(&(cluster / CHUNK))
            .map(|chunk| chunk[(cluster % CHUNK) as usize])
        {
            None => 0,
            Some(LARGE) => self.large.get(&cluster).copied().unwrap_or(LARGE.into()),
            Some(count) => count.into(),
        }
    }

    /// The first cluster from `from` on, below `end`, that is referenced.
    pub fn next_used(&self, from: u64, end: u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        self.chunks
            .range(from / CHUNK..=(end - 1) / CHUNK)
            .find_map(|(key, chunk)| {
                let base = key * CHUNK;
                let first = from.saturating_sub(base).min(CHUNK) as usize;
                chunk[first..]
                    .iter()
                    .position(|count| *count != 0)
                    .map(|at| base + (first + at) as u64)
                    .filter(|cluster| *cluster < end)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size_are_kept() {
        let mut counts = Counts::default();
        assert_eq!(counts.add(7, 65534).unwrap(), 65534);
        assert_eq!(counts.add(7, 1).unwrap(), 65535);
        assert_eq!(counts.get(7), 65535);
        assert_eq!(counts.add(7, 1).unwrap(), 65536);
        assert_eq!(counts.add(7, u64::MAX).unwrap(), u64::MAX);
        assert_eq!(counts.get(7), u64::MAX);
        assert_eq!(
            (counts.get(6), counts.get(8), counts.get(1 << 50)),
            (0, 0, 0)
        );
    }

    #[test]
    fn used_clusters_are_found_across_gaps() {
        let mut counts = Counts::default();
        for cluster in [3, 4095, 4096, 1 << 40] {
            counts.add(cluster, 1).unwrap();
        }
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(cluster) = counts.next_used(from, u64::MAX) {
            found.push(cluster);
            from = cluster + 1;
        }
        assert_eq!(found, [3, 4095, 4096, 1 << 40]);
        assert_eq!(counts.next_used(4, 4095), None);
        assert_eq!(counts.next_used(4, 4096), Some(4095));
        assert_eq!(counts.next_used(5, 5), None);
    }
}
