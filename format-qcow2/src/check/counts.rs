//! Numbers and marks per host cluster, in as few bits as they need: half a byte for each cluster near one that is
//! referenced, more only where a count asks for it, nothing for the rest of a sparse file. No I/O.
//!
//! A count never takes more bytes than the image's own refcounts have, and two where they have less: with refcounts of up to 16 bits
//! two bytes per cluster at the very most. Counts beyond that can't be right; a few of them are kept exactly, of the rest it is
//! known that they are too large.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use block_core::error::{Error, ErrorKind, Result};

use crate::cache::slice::NumberMap;

/// Clusters in one chunk.
pub(super) const CHUNK: u64 = 4096;
/// Counts beyond the limit that are kept exactly.
const MAX_EXACT: usize = 4096;

/// The counts of one chunk.
#[derive(Debug)]
enum Chunk {
    /// Up to 15 each; the even cluster's count is in the low half.
    Nibbles(Box<[u8]>),
    /// Up to 255.
    Bytes(Box<[u8]>),
    /// Up to 65535.
    Words(Box<[u16]>),
    /// Up to 4294967295.
    Longs(Box<[u32]>),
    /// Any.
    Full(Box<[u64]>),
}

fn allocate<T: Clone>(len: usize, value: T) -> Result<Box<[T]>> {
    let mut all = Vec::new();
    all.try_reserve_exact(len).map_err(|error| {
        Error::new(
            ErrorKind::OutOfMemory,
            "no memory for the references of the image",
        )
        .with_source(error)
    })?;
    all.resize(len, value);
    Ok(all.into_boxed_slice())
}

impl Chunk {
    fn new() -> Result<Self> {
        Ok(Self::Nibbles(allocate(CHUNK as usize / 2, 0)?))
    }

    const fn max(&self) -> u64 {
        match self {
            Self::Nibbles(_) => 15,
            Self::Bytes(_) => u8::MAX as u64,
            Self::Words(_) => u16::MAX as u64,
            Self::Longs(_) => u32::MAX as u64,
            Self::Full(_) => u64::MAX,
        }
    }

    fn get(&self, at: usize) -> u64 {
        match self {
            Self::Nibbles(all) => (all[at / 2] >> (at % 2 * 4) & 15).into(),
            Self::Bytes(all) => all[at].into(),
            Self::Words(all) => all[at].into(),
            Self::Longs(all) => all[at].into(),
            Self::Full(all) => all[at],
        }
    }

    fn put(&mut self, at: usize, value: u64) {
        match self {
            Self::Nibbles(all) => {
                let shift = at % 2 * 4;
                let byte = &mut all[at / 2];
                *byte = *byte & !(15 << shift) | (value as u8) << shift;
            }
            Self::Bytes(all) => all[at] = value as u8,
            Self::Words(all) => all[at] = value as u16,
            Self::Longs(all) => all[at] = value as u32,
            Self::Full(all) => all[at] = value,
        }
    }

    /// The same counts with room for `value`.
    fn widened(&self, value: u64) -> Result<Self> {
        let len = CHUNK as usize;
        let mut wide = match value {
            0..=0xff => Self::Bytes(allocate(len, 0)?),
            0x100..=0xffff => Self::Words(allocate(len, 0)?),
            0x1_0000..=0xffff_ffff => Self::Longs(allocate(len, 0)?),
            _ => Self::Full(allocate(len, 0)?),
        };
        for at in 0..len {
            wide.put(at, self.get(at));
        }
        Ok(wide)
    }

    fn set(&mut self, at: usize, value: u64) -> Result<()> {
        if value > self.max() {
            *self = self.widened(value)?;
        }
        self.put(at, value);
        Ok(())
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        match self {
            Self::Nibbles(all) | Self::Bytes(all) => all.len(),
            Self::Words(all) => all.len() * 2,
            Self::Longs(all) => all.len() * 4,
            Self::Full(all) => all.len() * 8,
        }
    }
}

/// How often each host cluster is referenced. Counts saturate at `u64::MAX`.
#[derive(Debug)]
pub(super) struct Counts {
    chunks: BTreeMap<u64, Chunk>,
    /// The largest count that a chunk keeps; it stands for itself and for more.
    limit: u64,
    /// Counts beyond the limit.
    exact: NumberMap<u64>,
    /// Chunks with counts beyond the limit that aren't kept.
    vague: BTreeSet<u64>,
}

impl Counts {
    /// For an image whose refcounts have `1 << order` bits.
    pub fn new(order: u32) -> Self {
        Self {
            chunks: BTreeMap::new(),
            limit: match order {
                0..=4 => u16::MAX.into(),
                5 => u32::MAX.into(),
                _ => u64::MAX,
            },
            exact: NumberMap::default(),
            vague: BTreeSet::new(),
        }
    }

    /// What a chunk's `value` stands for.
    fn meaning(&self, cluster: u64, value: u64) -> u64 {
        if value < self.limit {
            return value;
        }
        match self.exact.get(&cluster) {
            Some(count) => *count,
            None if self.vague.contains(&(cluster / CHUNK)) => self.limit.saturating_add(1),
            None => value,
        }
    }

    fn chunk(&mut self, key: u64) -> Result<&mut Chunk> {
        Ok(match self.chunks.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Chunk::new()?),
        })
    }

    /// Adds `by` references to `cluster` and gives back the new count.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn add(&mut self, cluster: u64, by: u64) -> Result<u64> {
        let (limit, key, at) = (self.limit, cluster / CHUNK, (cluster % CHUNK) as usize);
        let chunk = self.chunk(key)?;
        let old = chunk.get(at);
        let sum = old.saturating_add(by);
        if sum <= limit && old < limit {
            chunk.set(at, sum)?;
            return Ok(sum);
        }
        let new = self.meaning(cluster, old).saturating_add(by);
        if new > limit {
            let known = self.exact.len();
            match self.exact.get_mut(&cluster) {
                Some(count) => *count = new,
                None if known < MAX_EXACT => {
                    self.exact.insert(cluster, new);
                }
                None => {
                    self.vague.insert(key);
                }
            }
        }
        self.chunk(key)?.set(at, new.min(limit))?;
        Ok(new)
    }

    /// Bytes that the counts take.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.chunks.values().map(Chunk::bytes).sum::<usize>()
            + self.exact.capacity() * 24
            + self.vague.len() * 24
    }

    /// Adds `by` references to each of `len` clusters from `first` on.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn add_run(&mut self, first: u64, len: u64, by: u64) -> Result<()> {
        let (mut at, end) = (first, first.saturating_add(len));
        while at < end {
            let base = at / CHUNK * CHUNK;
            let until = end.min(base + CHUNK);
            let limit = self.limit;
            let chunk = self.chunk(base / CHUNK)?;
            let mut beyond = until;
            for cluster in at..until {
                let slot = (cluster - base) as usize;
                let old = chunk.get(slot);
                let sum = old.saturating_add(by);
                if old >= limit || sum > limit {
                    beyond = cluster;
                    break;
                }
                chunk.set(slot, sum)?;
            }
            for cluster in beyond..until {
                self.add(cluster, by)?;
            }
            at = until;
        }
        Ok(())
    }

    /// The references to `cluster`.
    pub fn get(&self, cluster: u64) -> u64 {
        self.chunks.get(&(cluster / CHUNK)).map_or(0, |chunk| {
            self.meaning(cluster, chunk.get((cluster % CHUNK) as usize))
        })
    }

    /// The references to the clusters from `first` on, into `out`.
    pub fn read(&self, first: u64, out: &mut [u64]) {
        let mut done = 0;
        while done < out.len() {
            let at = first + done as u64;
            let start = (at % CHUNK) as usize;
            let len = (CHUNK as usize - start).min(out.len() - done);
            let part = &mut out[done..done + len];
            match self.chunks.get(&(at / CHUNK)) {
                None => part.fill(0),
                Some(chunk) => {
                    for (index, value) in part.iter_mut().enumerate() {
                        *value = self.meaning(at + index as u64, chunk.get(start + index));
                    }
                }
            }
            done += len;
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
                (first..CHUNK as usize)
                    .find(|at| chunk.get(*at) != 0)
                    .map(|at| base + at as u64)
                    .filter(|cluster| *cluster < end)
            })
    }
}

const WORDS: usize = CHUNK as usize / 64;

/// A set of host clusters, one bit for each cluster near a member.
#[derive(Debug, Default)]
pub(super) struct Bits {
    chunks: BTreeMap<u64, Box<[u64]>>,
}

impl Bits {
    /// Adds a cluster. Says whether it is new.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn insert(&mut self, cluster: u64) -> Result<bool> {
        let chunk = match self.chunks.entry(cluster / CHUNK) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(allocate(WORDS, 0)?),
        };
        let at = (cluster % CHUNK) as usize;
        let (word, bit) = (&mut chunk[at / 64], 1 << (at % 64));
        let new = *word & bit == 0;
        *word |= bit;
        Ok(new)
    }

    /// Whether a cluster is in the set.
    pub fn contains(&self, cluster: u64) -> bool {
        let at = (cluster % CHUNK) as usize;
        self.chunks
            .get(&(cluster / CHUNK))
            .is_some_and(|chunk| chunk[at / 64] >> (at % 64) & 1 != 0)
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The members from `from` on, ascending.
    pub fn from(&self, from: u64) -> impl Iterator<Item = u64> + '_ {
        self.chunks
            .range(from / CHUNK..)
            .flat_map(|(key, chunk)| {
                let base = key * CHUNK;
                (0..CHUNK)
                    .filter(|at| chunk[*at as usize / 64] >> (at % 64) & 1 != 0)
                    .map(move |at| base + at)
            })
            .filter(move |cluster| *cluster >= from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size_are_kept() {
        for order in [0, 4, 5, 6] {
            counts_are_kept(Counts::new(order));
        }
    }

    fn counts_are_kept(mut counts: Counts) {
        let mut expected = 0u64;
        counts.add(6, 3).unwrap();
        for by in [14, 1, 1, 238, 1, 1, 65000, 279, 1, 1, u64::MAX] {
            expected = expected.saturating_add(by);
            assert_eq!(counts.add(7, by).unwrap(), expected);
            assert_eq!(counts.get(7), expected);
            // The neighbour in the same byte isn't touched, however wide the chunk has become.
            assert_eq!(
                (counts.get(6), counts.get(8), counts.get(1 << 50)),
                (3, 0, 0)
            );
        }
        let mut out = [0; 4];
        counts.read(5, &mut out);
        assert_eq!(out, [0, 3, u64::MAX, 0]);
    }

    #[test]
    fn no_count_takes_more_bytes_than_the_images_own_refcounts_and_two() {
        const CLUSTERS: u64 = 40 * CHUNK;
        let fixed = (MAX_EXACT * 2 * 24 + 40 * 24) as u64;
        for (order, bytes) in [(0, 2), (4, 2), (5, 4), (6, 8)] {
            let mut counts = Counts::new(order);
            // What every cluster of an image with as many snapshots as there can be has.
            counts.add_run(0, CLUSTERS, 65535).unwrap();
            assert!(counts.bytes() as u64 <= 2 * CLUSTERS + fixed);
            assert_eq!(counts.get(77), 65535);
            // More than a refcount can say, in every chunk, then everywhere.
            for cluster in (0..CLUSTERS).step_by(CHUNK as usize) {
                assert_eq!(counts.add(cluster, 1 << 40).unwrap(), 65535 + (1 << 40));
            }
            counts.add_run(0, CLUSTERS, 7).unwrap();
            assert_eq!(counts.get(CHUNK), 65542 + (1 << 40));
            assert!(counts.get(CLUSTERS - 1) > 65535, "{order}");
            assert!(
                counts.bytes() as u64 <= bytes * CLUSTERS + fixed,
                "{order}: {} bytes",
                counts.bytes()
            );
        }
    }

    #[test]
    fn few_references_take_half_a_byte() {
        let mut counts = Counts::new(4);
        counts.add_run(0, 100 * CHUNK, 15).unwrap();
        assert_eq!(counts.bytes() as u64, 100 * CHUNK / 2);
    }

    #[test]
    fn runs_cross_chunks() {
        let mut counts = Counts::new(4);
        counts.add_run(CHUNK - 2, CHUNK + 4, 2).unwrap();
        counts.add_run(CHUNK, 1, 14).unwrap();
        let mut out = vec![9; CHUNK as usize + 8];
        counts.read(CHUNK - 4, &mut out);
        assert_eq!(out[..6], [0, 0, 2, 2, 16, 2]);
        assert_eq!(out[CHUNK as usize + 4..], [2, 2, 0, 0]);
    }

    #[test]
    fn used_clusters_are_found_across_gaps() {
        let mut counts = Counts::new(4);
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

    #[test]
    fn a_set_gives_back_its_members_in_order() {
        let mut bits = Bits::default();
        assert!(bits.is_empty());
        for cluster in [1 << 40, 63, 4096, 64, 4095] {
            assert!(bits.insert(cluster).unwrap());
        }
        assert!(!bits.insert(63).unwrap());
        assert!(bits.contains(64) && !bits.contains(65) && !bits.contains(1 << 41));
        assert_eq!(
            bits.from(0).collect::<Vec<_>>(),
            [63, 64, 4095, 4096, 1 << 40]
        );
        assert_eq!(bits.from(65).collect::<Vec<_>>(), [4095, 4096, 1 << 40]);
    }
}
