//! The oracle: what the guest has to see, as plain bytes, now and in each snapshot; and the bytes that are written. It knows
//! nothing of files.

use std::{fs, path::Path};

use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};

/// Files of bytes that writes take their data from, over and over. Their lengths are prime, so that what belongs to one
/// place is found at no other.
pub struct Patterns(Vec<Vec<u8>>);

/// How many there are.
pub const PATTERNS: usize = 48;

impl Patterns {
    /// The same ones every time: random, compressible, and nearly all zeroes.
    pub fn new() -> Self {
        const PRIMES: [usize; 8] = [509, 761, 1021, 1531, 2039, 3067, 4093, 8191];
        let mut rng = SmallRng::seed_from_u64(7);
        let patterns = (0..PATTERNS).map(|index| {
            let mut bytes = vec![0; PRIMES[index % PRIMES.len()]];
            rng.fill_bytes(&mut bytes);
            match index % 4 {
                0 | 1 => {}
                2 => bytes.iter_mut().for_each(|byte| *byte &= 0x11),
                _ => {
                    for byte in &mut bytes {
                        if rng.random_ratio(63, 64) {
                            *byte = 0;
                        }
                    }
                }
            }
            bytes
        });
        Self(patterns.collect())
    }

    /// Writes them to `dir`, as `00` to `47`.
    pub fn save(&self, dir: &Path) {
        for (index, bytes) in self.0.iter().enumerate() {
            fs::write(dir.join(format!("{index:02}")), bytes).unwrap();
        }
    }

    fn fill(&self, pattern: usize, target: &mut [u8]) {
        let bytes = &self.0[pattern];
        for chunk in target.chunks_mut(bytes.len()) {
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

/// A disk as the guest sees it.
#[derive(Debug, Clone)]
pub struct Disk {
    cluster: u64,
    pub bytes: Vec<u8>,
    /// Of each cluster: nothing was ever written there, or it was given back. Only there can compressed data be written.
    free: Vec<bool>,
    /// The disk was cut within a cluster. What lies behind the cut in that cluster may show up again when the disk grows.
    pub is_cut: bool,
}

impl Disk {
    pub fn new(size: u64, cluster: u64) -> Self {
        Self {
            cluster,
            bytes: vec![0; size as usize],
            free: vec![true; size.div_ceil(cluster) as usize],
            is_cut: false,
        }
    }

    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn clusters(&self) -> u64 {
        self.free.len() as u64
    }

    /// The end of the cluster in which the disk ends.
    pub fn cut_end(&self) -> u64 {
        self.size().next_multiple_of(self.cluster)
    }

    /// Whether compressed data can be written to this cluster.
    pub fn is_free(&self, cluster: u64) -> bool {
        self.free.get(cluster as usize).is_some_and(|free| *free)
    }

    fn touch(&mut self, offset: u64, len: u64) {
        let end = (offset + len).div_ceil(self.cluster);
        for cluster in offset / self.cluster..end {
            self.free[cluster as usize] = false;
        }
    }

    /// The clusters that lie wholly in a range; the last one of the disk may be shorter.
    fn whole_clusters(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let end = offset + len;
        let last = if end == self.size() {
            end.div_ceil(self.cluster)
        } else {
            end / self.cluster
        };
        offset.div_ceil(self.cluster)..last
    }

    pub fn write(&mut self, patterns: &Patterns, pattern: usize, offset: u64, len: u64) {
        self.touch(offset, len);
        patterns.fill(
            pattern,
            &mut self.bytes[offset as usize..(offset + len) as usize],
        );
    }

    pub fn fill(&mut self, byte: u8, offset: u64, len: u64) {
        self.touch(offset, len);
        self.bytes[offset as usize..(offset + len) as usize].fill(byte);
    }

    /// Zeroes, written. With `unmap`, whole clusters are given back; the last one of the disk may be reserved still, if it is
    /// shorter than the others.
    pub fn zero(&mut self, offset: u64, len: u64, unmap: bool) {
        let whole = offset.div_ceil(self.cluster)..(offset + len) / self.cluster;
        self.fill(0, offset, len);
        if unmap {
            for cluster in whole {
                self.free[cluster as usize] = true;
            }
        }
    }

    /// Whole clusters are given back and read as zeroes; the rest of the range stays as it is.
    pub fn discard(&mut self, offset: u64, len: u64) {
        for cluster in self.whole_clusters(offset, len) {
            let start = cluster * self.cluster;
            let end = (start + self.cluster).min(self.size());
            self.bytes[start as usize..end as usize].fill(0);
            self.free[cluster as usize] = true;
        }
    }

    pub fn resize(&mut self, size: u64) {
        if size < self.size() {
            self.is_cut = size % self.cluster != 0;
        } else if size >= self.cut_end() {
            self.is_cut = false;
        }
        self.bytes.resize(size as usize, 0);
        self.free.resize(size.div_ceil(self.cluster) as usize, true);
    }
}

/// A disk and its snapshots.
#[derive(Debug, Clone)]
pub struct World {
    pub disk: Disk,
    /// By name, in the order in which they were taken.
    pub snapshots: Vec<(String, Disk)>,
}

impl World {
    pub fn snapshot(&self, name: &str) -> Option<&Disk> {
        let found = self.snapshots.iter().find(|(known, _)| known == name);
        found.map(|(_, disk)| disk)
    }
}
