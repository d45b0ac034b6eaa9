//! The mapping table and the allocator. No I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    task::Waker,
};

use block_core::{
    error::{Error, Result},
    image::{CheckReport, Severity},
    space::{Link, SpaceEvent, SpaceTap},
};

pub(super) const MAGIC: &[u8; 8] = b"IOTESTS3";
/// Where the table starts in the file.
pub(super) const TABLE_AT: u64 = 512;
/// The largest disk, in clusters.
pub(super) const MAX_CLUSTERS: u64 = 1 << 22;

/// What a guest cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Unallocated,
    Zero,
    /// Offset of its data in the file.
    Data(u64),
}

/// The image in memory.
pub(super) struct Table {
    pub cluster: u64,
    pub size: u64,
    pub entries: Vec<Entry>,
    /// Freed clusters; the last one freed is handed out first.
    free: Vec<u64>,
    /// Where the file's next new cluster goes.
    end: u64,
    /// Guest clusters that somebody is allocating, and who waits for that.
    pub allocating: BTreeMap<usize, Vec<Waker>>,
    pub changed: bool,
    /// The mapping that a snapshot keeps, and the clusters that it owns: a write to them copies. In memory only.
    pub snapshot: Vec<Entry>,
    pub shared: BTreeSet<u64>,
    /// The table's room in the file doesn't grow.
    pub max_clusters: u64,
    /// Tests that listen.
    pub tap: SpaceTap,
}

pub(super) fn table_bytes(clusters: u64, cluster: u64) -> u64 {
    (TABLE_AT + clusters * 8).next_multiple_of(cluster)
}

impl Table {
    pub fn new(cluster: u64, size: u64, max_clusters: u64) -> Self {
        let clusters = size.div_ceil(cluster) as usize;
        Self {
            cluster,
            size,
            entries: vec![Entry::Unallocated; clusters],
            free: Vec::new(),
            end: table_bytes(max_clusters, cluster),
            allocating: BTreeMap::new(),
            changed: true,
            snapshot: Vec::new(),
            shared: BTreeSet::new(),
            max_clusters,
            tap: SpaceTap::default(),
        }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; (TABLE_AT + self.max_clusters * 8) as usize];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&(self.cluster as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.max_clusters.to_le_bytes());
        for (at, entry) in self.entries.iter().enumerate() {
            let raw = match entry {
                Entry::Unallocated => 0,
                Entry::Zero => 1,
                Entry::Data(host) => *host,
            };
            let at = TABLE_AT as usize + at * 8;
            bytes[at..at + 8].copy_from_slice(&raw.to_le_bytes());
        }
        bytes
    }

    /// Cluster size, size and room of the table, from the first 32 bytes.
    pub fn parse_header(head: &[u8]) -> Result<(u64, u64, u64)> {
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&head[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if head.len() < 32 || head[..8] != *MAGIC {
            return Err(Error::new(
                block_core::ErrorKind::WrongFormat,
                "Image is not in thirdparty format",
            ));
        }
        let cluster = number(8) & 0xffff_ffff;
        if !(512..=2 << 20).contains(&cluster) || !cluster.is_power_of_two() {
            return Err(Error::invalid("Unsupported cluster size").with_field(
                "cluster_size",
                cluster,
                "a power of two, 512 to 2 MiB",
            ));
        }
        let (size, room) = (number(16), number(24));
        if room > MAX_CLUSTERS || size.div_ceil(cluster) > room {
            return Err(Error::invalid("Unsupported size").with_field(
                "size",
                size,
                format!("at most {MAX_CLUSTERS} clusters"),
            ));
        }
        Ok((cluster, size, room))
    }

    /// Takes the entries from the bytes at [`TABLE_AT`], and finds out what is free. A cluster behind the end of the file,
    /// which has `len` bytes, is a lie: whoever believed it would list all that is free before it.
    pub fn load(&mut self, bytes: &[u8], len: u64) -> Result<()> {
        let first = table_bytes(self.max_clusters, self.cluster);
        let mut used = BTreeSet::new();
        for (at, entry) in self.entries.iter_mut().enumerate() {
            let Some(raw) = bytes.get(at * 8..at * 8 + 8) else {
                return Err(Error::corrupt("the mapping table is cut off"));
            };
            let mut number = [0; 8];
            number.copy_from_slice(raw);
            let raw = u64::from_le_bytes(number);
            *entry = match raw {
                0 => Entry::Unallocated,
                1 => Entry::Zero,
                host if host >= first && host % self.cluster == 0 && host < len => {
                    used.insert(host);
                    Entry::Data(host)
                }
                host => {
                    return Err(Error::corrupt("bad mapping").with_field(
                        "entry",
                        host,
                        format!("a multiple of the cluster size from {first} to below {len}"),
                    ));
                }
            };
        }
        self.end = used.last().map_or(first, |last| last + self.cluster);
        let all = (first..self.end).step_by(self.cluster as usize);
        self.free = all.filter(|host| !used.contains(host)).collect();
        self.changed = false;
        Ok(())
    }

    pub fn allocate(&mut self) -> u64 {
        let host = self.free.pop().unwrap_or_else(|| {
            let host = self.end;
            self.end += self.cluster;
            host
        });
        let len = self.cluster;
        self.tap.tell(|| SpaceEvent::Taken { host, len });
        host
    }

    /// What an entry links to.
    fn link(&self, at: usize, entry: Entry) -> Option<Link> {
        match entry {
            Entry::Data(host) => Some(Link {
                guest: at as u64 * self.cluster,
                host,
                len: self.cluster,
                shared: false,
            }),
            Entry::Unallocated | Entry::Zero => None,
        }
    }

    /// Tells whoever listens from now on what there is already.
    pub fn tell_all(&self) {
        for (at, entry) in self.entries.iter().enumerate() {
            if let Some(link) = self.link(at, *entry) {
                self.tap.tell(|| SpaceEvent::Found(link));
            }
        }
        let len = self.cluster;
        for host in &self.free {
            self.tap.tell(|| SpaceEvent::Free { host: *host, len });
        }
    }

    fn tell_unlinked(&self, at: usize, old: Entry) {
        if let Some(link) = self.link(at, old) {
            self.tap.tell(|| SpaceEvent::Unlinked(link));
        }
    }

    /// A cluster that a snapshot owns stays that.
    pub fn free(&mut self, host: u64) {
        if !self.shared.contains(&host) {
            let len = self.cluster;
            self.tap.tell(|| SpaceEvent::Free { host, len });
            self.free.push(host);
        }
    }

    /// From now on every cluster that has data belongs to a snapshot too. One snapshot is all there is.
    pub fn take_snapshot(&mut self) {
        self.snapshot = self.entries.clone();
        self.shared = self
            .entries
            .iter()
            .filter_map(|entry| match entry {
                Entry::Data(host) => Some(*host),
                _ => None,
            })
            .collect();
    }

    pub fn set(&mut self, at: usize, entry: Entry) -> Option<u64> {
        self.changed = true;
        let old = std::mem::replace(&mut self.entries[at], entry);
        self.tell_unlinked(at, old);
        if let Some(link) = self.link(at, entry) {
            self.tap.tell(|| SpaceEvent::Linked(link));
        }
        match old {
            Entry::Data(host) => Some(host),
            _ => None,
        }
    }

    pub fn resize(&mut self, size: u64) {
        let clusters = size.div_ceil(self.cluster) as usize;
        while self.entries.len() > clusters {
            if let Some(Entry::Data(host)) = self.entries.pop() {
                self.tell_unlinked(self.entries.len(), Entry::Data(host));
                self.free(host);
            }
        }
        self.entries.resize(clusters, Entry::Unallocated);
        self.size = size;
        self.changed = true;
    }

    /// Every cluster of the file has one owner: a guest cluster, or the free list.
    pub fn check(&self) -> CheckReport {
        let mut report = CheckReport {
            total_clusters: self.entries.len() as u64,
            image_end_offset: Some(self.end),
            ..CheckReport::default()
        };
        let mut owners: BTreeMap<u64, usize> = BTreeMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let Entry::Data(host) = entry else { continue };
            report.allocated_clusters += 1;
            if let Some(other) = owners.insert(*host, at) {
                let text = format!("ERROR cluster at {host:#x} belongs to {other} and {at}");
                report.add(Severity::Corruption, false, text);
            }
        }
        let mut free = BTreeSet::new();
        for host in &self.free {
            if !free.insert(*host) {
                let text = format!("ERROR cluster at {host:#x} is free twice");
                report.add(Severity::Corruption, false, text);
            }
            if self.shared.contains(host) {
                let text = format!("ERROR cluster at {host:#x} is free but a snapshot has it");
                report.add(Severity::Corruption, false, text);
            }
            if let Some(owner) = owners.get(host) {
                let text = format!("ERROR cluster at {host:#x} is free but belongs to {owner}");
                report.add(Severity::Corruption, false, text);
            }
        }
        let first = table_bytes(self.max_clusters, self.cluster);
        for host in (first..self.end).step_by(self.cluster as usize) {
            let owned = owners.contains_key(&host) || self.shared.contains(&host);
            if !free.contains(&host) && !owned {
                let text = format!("Leaked cluster at {host:#x}");
                report.add(Severity::Leak, false, text);
            }
        }
        report
    }
}
