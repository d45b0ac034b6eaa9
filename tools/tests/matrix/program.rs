//! The random program of an image: one step after the other, drawn from its seed and from what the disk is at the time. A
//! step knows its line for qemu-io, if it has one, and what it does to the oracle. It runs nothing.

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

use crate::{
    model::{Disk, PATTERNS, Patterns, World},
    options::{DataFile, Encryption, Maker, Options},
};

/// The longest write, in bytes, unless a cluster is longer.
const LONGEST: u64 = 1 << 20;
/// The most snapshots that an image has at a time.
const SNAPSHOTS: usize = 4;

/// What a program does next.
#[derive(Debug, Clone)]
pub enum Step {
    Write {
        pattern: usize,
        offset: u64,
        len: u64,
        fua: bool,
    },
    /// Into clusters that are free, whole ones.
    Compressed {
        pattern: usize,
        offset: u64,
        len: u64,
    },
    /// Writes side by side, of one byte each, that don't overlap.
    Together(Vec<(u8, u64, u64)>),
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Flush,
    /// While the image stays open.
    Truncate {
        size: u64,
    },
    /// By a command of its own.
    Resize {
        size: u64,
    },
    Reopen,
    SnapshotCreate {
        name: String,
    },
    SnapshotApply {
        name: String,
    },
    SnapshotDelete {
        name: String,
    },
    /// The image is checked and read before it goes on.
    Audit,
}

/// The kinds of steps, for counting.
pub const KINDS: [&str; 16] = [
    "write",
    "overwrite",
    "unaligned",
    "compressed",
    "together",
    "zero",
    "zero-unmap",
    "discard",
    "flush",
    "grow",
    "shrink",
    "reopen",
    "create",
    "apply",
    "delete",
    "audit",
];

impl Step {
    /// The lines for qemu-io, where the step is one of an open image.
    pub fn lines(&self) -> Option<Vec<String>> {
        let line = match self {
            Self::Write {
                pattern,
                offset,
                len,
                fua,
            } => {
                let flag = if *fua { " -f" } else { "" };
                format!("write -q{flag} -s p/{pattern:02} {offset} {len}")
            }
            Self::Compressed {
                pattern,
                offset,
                len,
            } => format!("write -q -c -s p/{pattern:02} {offset} {len}"),
            Self::Together(writes) => {
                let begin = writes
                    .iter()
                    .map(|(byte, offset, len)| format!("aio_write -q -P {byte} {offset} {len}"));
                return Some(begin.chain(["aio_flush".to_owned()]).collect());
            }
            Self::Zero { offset, len, unmap } => {
                let flag = if *unmap { " -u" } else { "" };
                format!("write -q -z{flag} {offset} {len}")
            }
            Self::Discard { offset, len } => format!("discard -q {offset} {len}"),
            Self::Flush => "flush".to_owned(),
            Self::Truncate { size } => format!("truncate {size}"),
            _ => return None,
        };
        Some(vec![line])
    }

    /// The kinds that the step counts as.
    pub fn kinds(&self, world: &World) -> Vec<&'static str> {
        let size = world.disk.size();
        match self {
            Self::Write { offset, len, .. } => {
                let range = *offset as usize..(offset + len) as usize;
                let mut kinds = vec!["write"];
                if world.disk.bytes[range].iter().any(|byte| *byte != 0) {
                    kinds.push("overwrite");
                }
                if offset % 512 != 0 || len % 512 != 0 {
                    kinds.push("unaligned");
                }
                kinds
            }
            Self::Compressed { .. } => vec!["compressed"],
            Self::Together(_) => vec!["together"],
            Self::Zero { unmap, .. } => vec![if *unmap { "zero-unmap" } else { "zero" }],
            Self::Discard { .. } => vec!["discard"],
            Self::Flush => vec!["flush"],
            Self::Truncate { size: new } | Self::Resize { size: new } => {
                vec![if *new > size { "grow" } else { "shrink" }]
            }
            Self::Reopen => vec!["reopen"],
            Self::SnapshotCreate { .. } => vec!["create"],
            Self::SnapshotApply { .. } => vec!["apply"],
            Self::SnapshotDelete { .. } => vec!["delete"],
            Self::Audit => vec!["audit"],
        }
    }

    /// What the step does to the disk.
    pub fn apply(&self, patterns: &Patterns, world: &mut World) {
        let disk = &mut world.disk;
        match self {
            Self::Write {
                pattern,
                offset,
                len,
                ..
            }
            | Self::Compressed {
                pattern,
                offset,
                len,
            } => disk.write(patterns, *pattern, *offset, *len),
            Self::Together(writes) => {
                for (byte, offset, len) in writes {
                    disk.fill(*byte, *offset, *len);
                }
            }
            Self::Zero { offset, len, unmap } => disk.zero(*offset, *len, *unmap),
            Self::Discard { offset, len } => disk.discard(*offset, *len),
            Self::Truncate { size } | Self::Resize { size } => disk.resize(*size),
            Self::SnapshotCreate { name } => world.snapshots.push((name.clone(), disk.clone())),
            Self::SnapshotApply { name } => {
                if let Some(snapshot) = world.snapshot(name) {
                    world.disk = snapshot.clone();
                }
            }
            Self::SnapshotDelete { name } => world.snapshots.retain(|(known, _)| known != name),
            Self::Flush | Self::Reopen | Self::Audit => {}
        }
    }
}

/// Draws the steps of one image.
pub struct Generator {
    options: Options,
    rng: SmallRng,
    initial: u64,
    left: u32,
    taken: u32,
    /// What has to come next.
    owed: Option<Step>,
    /// Where something was done lately.
    recent: Vec<(u64, u64)>,
}

impl Generator {
    pub fn new(options: Options, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let cluster = options.cluster_size();
        let mut initial = if cluster >= 131_072 {
            cluster * rng.random_range(3..=6.max((4 << 20) / cluster))
        } else {
            // Several L2 tables where clusters are small.
            let least: u64 = if cluster < 4096 { 128 << 10 } else { 1 << 20 };
            rng.random_range(least..=4 * least)
                .next_multiple_of(cluster)
        };
        if rng.random() {
            initial -= 512 * rng.random_range(0..cluster / 512);
        }
        let mut generator = Self {
            options,
            initial,
            left: rng.random_range(12..=30),
            taken: 0,
            owed: None,
            recent: Vec::new(),
            rng,
        };
        if generator.has_random_content() {
            generator.owed = Some(generator.write(0, initial));
        }
        generator
    }

    /// In a raw data file everything is mapped from the beginning: what is encrypted there and was never written reads as
    /// whatever zeroes are decrypted to.
    fn has_random_content(&self) -> bool {
        self.options.data_file() == DataFile::Raw && self.options.encryption() != Encryption::None
    }

    /// The size of the disk at first, in bytes.
    pub const fn initial_size(&self) -> u64 {
        self.initial
    }

    /// One of two, for whoever has to choose something for this image.
    pub fn coin(&mut self, of: u32) -> bool {
        self.rng.random_ratio(1, of)
    }

    /// The next step, if there is one. `compress` says whether compressed data can be written.
    pub fn next(&mut self, world: &World, compress: bool) -> Option<Step> {
        if let Some(step) = self.owed.take() {
            return Some(step);
        }
        self.left = self.left.checked_sub(1)?;
        loop {
            if let Some(step) = self.draw(world, compress) {
                return Some(step);
            }
        }
    }

    fn draw(&mut self, world: &World, compress: bool) -> Option<Step> {
        let disk = &world.disk;
        let has_data_file = self.options.data_file() != DataFile::None;
        match self.rng.random_range(0..100) {
            0..26 => {
                let (offset, len) = self.range(disk);
                Some(self.write(offset, len))
            }
            26..39 if compress => self.compressed(disk),
            39..44 => Some(self.together(disk)),
            44..53 => {
                let (offset, len) = self.range(disk);
                Some(Step::Zero {
                    offset,
                    len,
                    unmap: false,
                })
            }
            53..60 => {
                let (offset, len) = self.range(disk);
                Some(Step::Zero {
                    offset,
                    len,
                    unmap: true,
                })
            }
            60..70 => {
                let (offset, len) = self.range(disk);
                Some(Step::Discard { offset, len })
            }
            70..72 => Some(Step::Flush),
            72..75 => Some(Step::Reopen),
            75..83 if !has_data_file && world.snapshots.len() < SNAPSHOTS => {
                self.taken += 1;
                let name = format!("s{}", self.taken);
                Some(Step::SnapshotCreate { name })
            }
            83..88 => {
                let (name, snapshot) = world.snapshots.choose(&mut self.rng)?;
                let step = Step::SnapshotApply { name: name.clone() };
                // qemu-img has changed the disk's size before it finds that it can't do the rest.
                let may_cut = self.options.maker() != Maker::Blk && self.may_be_refused(&step);
                (!may_cut || snapshot.size() == disk.size()).then_some(step)
            }
            88..91 => {
                let (name, _) = world.snapshots.choose(&mut self.rng)?;
                Some(Step::SnapshotDelete { name: name.clone() })
            }
            91..97 if !self.options.is_version_2() || world.snapshots.is_empty() => {
                self.resize(disk)
            }
            97.. => Some(Step::Audit),
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, len: u64) -> Step {
        Step::Write {
            pattern: self.rng.random_range(0..PATTERNS),
            offset,
            len,
            fua: self.rng.random_ratio(1, 8),
        }
    }

    /// A range of the disk that isn't empty.
    fn range(&mut self, disk: &Disk) -> (u64, u64) {
        let (size, cluster) = (disk.size(), self.options.cluster_size());
        let longest = LONGEST.max(2 * cluster).min(size);
        let unit = if self.options.extended_l2() && self.rng.random() {
            cluster / 32
        } else {
            cluster
        };
        let rng = &mut self.rng;
        let (offset, len) = match rng.random_range(0..7) {
            // A few bytes anywhere.
            0 => (rng.random_range(0..size), rng.random_range(1..=3000)),
            // Sectors.
            1 => (
                rng.random_range(0..size / 512) * 512,
                rng.random_range(1..=32) * 512,
            ),
            // Whole clusters, or subclusters.
            2 | 3 => (
                rng.random_range(0..size.div_ceil(unit)) * unit,
                rng.random_range(1..=8) * unit,
            ),
            // Over the edges of clusters.
            4 => {
                let edge = rng.random_range(0..size.div_ceil(unit)) * unit;
                let before = rng.random_range(0..=cluster.min(edge));
                (edge - before, before + rng.random_range(1..=2 * cluster))
            }
            // Much.
            5 => (
                rng.random_range(0..size),
                rng.random_range(1..=size / 3 + 1),
            ),
            // Where something is.
            _ => match self.recent.choose(rng) {
                Some((offset, len)) if *offset < size => {
                    let shift = rng.random_range(0..=*len / 2);
                    (offset + shift, len.saturating_sub(shift).max(1))
                }
                _ => (0, size),
            },
        };
        let offset = offset.min(size - 1);
        let len = len.min(longest).min(size - offset);
        self.recent.push((offset, len));
        (offset, len)
    }

    fn compressed(&mut self, disk: &Disk) -> Option<Step> {
        let cluster = self.options.cluster_size();
        let free: Vec<u64> = (0..disk.clusters())
            .filter(|cluster| disk.is_free(*cluster))
            .collect();
        let first = *free.choose(&mut self.rng)?;
        let most = self.rng.random_range(1..=(LONGEST / cluster).clamp(1, 12));
        let count = (0..most)
            .take_while(|more| disk.is_free(first + more))
            .count() as u64;
        let offset = first * cluster;
        let len = (count * cluster).min(disk.size() - offset);
        self.recent.push((offset, len));
        Some(Step::Compressed {
            pattern: self.rng.random_range(0..PATTERNS),
            offset,
            len,
        })
    }

    fn together(&mut self, disk: &Disk) -> Step {
        let count = self.rng.random_range(2..=6);
        let part = disk.size() / count;
        let writes = (0..count).map(|index| {
            let begin = self.rng.random_range(0..part);
            let len = self.rng.random_range(1..=(part - begin).min(256 << 10));
            let byte = self.rng.random_range(1..=255);
            (byte, index * part + begin, len)
        });
        Step::Together(writes.collect())
    }

    fn resize(&mut self, disk: &Disk) -> Option<Step> {
        let cluster = self.options.cluster_size();
        let mut size = self.rng.random_range(self.initial / 4..=self.initial * 2);
        size = size.next_multiple_of(if self.rng.random() { cluster } else { 512 });
        if size == disk.size() {
            return None;
        }
        if size > disk.size() && self.has_random_content() {
            self.owed = Some(self.write(disk.size(), size - disk.size()));
        } else if size > disk.size() && self.is_unsure(disk) {
            let len = disk.cut_end().min(size) - disk.size();
            self.owed = Some(self.write(disk.size(), len));
        }
        if self.rng.random() {
            Some(Step::Truncate { size })
        } else {
            Some(Step::Resize { size })
        }
    }

    /// Whether something else than zeroes may show behind the end of the disk when it grows, in the cluster that the end is in.
    /// It never does when we have cut it. qemu's tools leave there what was there; and what they extend an encrypted data
    /// file with, plain zeroes, isn't zeroes to the guest.
    fn is_unsure(&self, disk: &Disk) -> bool {
        let is_sealed = self.options.data_file() != DataFile::None
            && self.options.encryption() != Encryption::None;
        self.options.maker() != Maker::Blk
            && (disk.is_cut || is_sealed && disk.size() < disk.cut_end())
    }

    /// Whether an operation on snapshots may be refused: one more reference than narrow refcounts can count.
    pub fn may_be_refused(&self, step: &Step) -> bool {
        let narrow = self.options.refcount_bits() <= 4;
        let counts = matches!(
            step,
            Step::SnapshotCreate { .. } | Step::SnapshotApply { .. }
        );
        narrow && counts
    }

    /// Whether compressed data can be written at all.
    pub fn can_compress(options: Options) -> bool {
        options.data_file() == DataFile::None
    }
}
