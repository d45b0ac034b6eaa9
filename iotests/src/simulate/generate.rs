//! From a seed to a scenario. Everything that the world is asked to do is decided here; the order in which it happens is
//! decided by the schedule. Never looks at a driver: what a format can do comes in a [`Profile`].

use block_core::driver::Capabilities;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::parts::{DATA_FILE, ENCRYPTION};

use super::scenario::{
    Dropped, Fault, FaultKind, FaultOp, Fill, JobEnd, JobPlan, JobWork, Layer, Phase, Queue,
    Scenario, Step, StepKind, Sync, Verb, Where,
};

/// What scenarios for a format may contain.
#[derive(Debug, Clone)]
pub struct Profile {
    /// The driver's name.
    pub format: String,
    /// What a new image of its can do.
    pub capabilities: Capabilities,
    /// A backing file can be named in the image.
    pub records_backing: bool,
    /// Cluster sizes that images are made with, as an option; empty if there is no such option.
    pub cluster_sizes: Vec<u64>,
    /// The cluster size without that option.
    pub default_cluster: u64,
    /// A cut of the power may leave leaks, but nothing worse.
    pub crash_safe: bool,
    /// Options of creation that everybody gets.
    pub create: Vec<(String, String)>,
    /// Metadata caches can be made small, and refcounts and versions chosen: the options of qcow2.
    pub is_qcow2: bool,
}

impl Profile {
    fn can(&self, capability: Capabilities) -> bool {
        self.capabilities.contains(capability)
    }

    /// Whether scenarios choose among the features of qcow2: nobody has chosen for all of them.
    pub fn has_features(&self) -> bool {
        self.is_qcow2 && self.create.is_empty()
    }
}

struct Generator<'a> {
    rng: SmallRng,
    profile: &'a Profile,
    cluster: u64,
    size: u64,
    layers: usize,
    compressible: bool,
    resizable: bool,
    encrypted: bool,
    /// Internal snapshots are taken, applied and deleted; the topmost image stays the topmost.
    snapshots: bool,
    /// Persistent bitmaps come and go; the same.
    bitmaps: bool,
    /// Some image is of version 2.
    old: bool,
    /// Where requests meet: offset and length in bytes.
    hot: (u64, u64),
}

/// The scenario of a seed.
pub fn generate(profile: &Profile, seed: u64) -> Scenario {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x5ce4_a210_0000_0000);
    let cluster = match profile.cluster_sizes.as_slice() {
        [] => profile.default_cluster,
        sizes => sizes[rng.random_range(0..sizes.len())],
    };
    let layers = match rng.random_range(0..10) {
        _ if !profile.can(Capabilities::BACKING) => 1,
        0..5 => 1,
        5..8 => 2,
        _ => 3,
    };
    let clusters = (rng.random_range(256 << 10..=1 << 20) / cluster).clamp(12, 512);
    let size = clusters * cluster;
    let resizable = layers == 1 && profile.can(Capabilities::TRUNCATE) && rng.random_ratio(1, 5);
    let hot_clusters = rng.random_range(3..=12.min(clusters));
    let hot_start = rng.random_range(0..=clusters - hot_clusters);
    let mut this = Generator {
        rng,
        profile,
        cluster,
        size,
        layers,
        compressible: false,
        resizable,
        encrypted: false,
        snapshots: false,
        bitmaps: false,
        old: false,
        hot: (hot_start * cluster, hot_clusters * cluster),
    };
    this.scenario()
}

impl Generator<'_> {
    fn chance(&mut self, of: u32) -> bool {
        self.rng.random_ratio(1, of)
    }

    fn scenario(&mut self) -> Scenario {
        self.compressible = self.profile.can(Capabilities::COMPRESSED) && self.chance(3);
        if self.profile.has_features() {
            self.encrypted = self.chance(12);
            match self.rng.random_range(0..20) {
                0..4 => self.snapshots = true,
                4..6 => self.bitmaps = !self.resizable,
                6 => (self.snapshots, self.bitmaps) = (true, !self.resizable),
                _ => {}
            }
        }
        let layers = self.layers();
        let (jitter, open) = (self.rng.random_range(0..=3), self.open_options());
        let several = self.chance(2);
        let budget: u64 = self.rng.random_range(150..=350);
        let cut_first = self.profile.crash_safe && self.chance(3);
        let mut phases = vec![self.phase(if several { budget * 2 / 3 } else { budget }, cut_first)];
        if several {
            phases.push(self.phase(budget / 3, false));
        }
        if self.profile.crash_safe && self.chance(4) {
            // The last phase ends with a cut, too: what is left is looked at, and that is all.
            let at = self.cut();
            if let Some(last) = phases.last_mut() {
                last.cut = Some(at);
            }
        }
        Scenario {
            format: self.profile.format.clone(),
            layers,
            jitter,
            open,
            phases,
        }
    }

    fn layers(&mut self) -> Vec<Layer> {
        (0..self.layers)
            .map(|n| {
                let top = n + 1 == self.layers;
                let clusters = self.size / self.cluster;
                let shorter = !top && self.chance(4);
                let size = if shorter {
                    self.rng.random_range(clusters / 2..=clusters) * self.cluster
                } else {
                    self.size
                };
                let fills = self.rng.random_range(0..6);
                let mut fill: Vec<Fill> = (0..fills)
                    .map(|_| {
                        let len = self.rng.random_range(1..=(size / self.cluster / 3).max(1));
                        let at = self.rng.random_range(0..=size / self.cluster - len);
                        Fill {
                            offset: at * self.cluster,
                            len: len * self.cluster,
                            zero: self.chance(6),
                        }
                    })
                    .collect();
                if !self.chance(4) {
                    let (offset, len) = self.hot;
                    let end = (offset + len).min(size);
                    if offset < end {
                        fill.push(Fill {
                            offset,
                            len: end - offset,
                            zero: false,
                        });
                    }
                }
                Layer {
                    size,
                    options: self.create_options(top),
                    fill,
                }
            })
            .collect()
    }

    fn create_options(&mut self, top: bool) -> Vec<(String, String)> {
        let mut options = self.profile.create.clone();
        if !self.profile.cluster_sizes.is_empty() {
            options.push(("cluster_size".into(), self.cluster.to_string()));
        }
        if self.profile.is_qcow2 {
            if !self.profile.has_features() {
                // All scenarios were told to use something: what goes with it isn't known here.
                let given = ["compat", "extended_l2", "lazy_refcounts", "refcount_bits"];
                if !options.iter().any(|(key, _)| given.contains(&key.as_str())) {
                    let bits = [8, 16, 16, 16, 32, 64][self.rng.random_range(0..6)];
                    options.push(("refcount_bits".into(), bits.to_string()));
                }
            } else if self.chance(8) && !(top && self.bitmaps) {
                options.push(("compat".into(), "0.10".into()));
                self.old = true;
            } else {
                self.newer_options(&mut options, top);
            }
            if self.encrypted && (top || self.chance(2)) {
                options.push((ENCRYPTION.into(), "luks".into()));
                options.push(("encrypt.iter-time".into(), "1".into()));
            }
        }
        options
    }

    /// Options of creation that need version 3.
    fn newer_options(&mut self, options: &mut Vec<(String, String)>, top: bool) {
        let mut push = |key: &str, value: &str| options.push((key.into(), value.into()));
        // With one bit there is no sharing, so no snapshot and no compressed neighbour.
        let bits = ["16", "16", "16", "8", "32", "64", "4", "2", "1"];
        let wide = if top && self.snapshots { 6 } else { bits.len() };
        push("refcount_bits", bits[self.rng.random_range(0..wide)]);
        if self.chance(6) {
            push("lazy_refcounts", "on");
        }
        if self.cluster >= 16384 && self.chance(2) {
            push("extended_l2", "on");
        }
        if self.compressible && self.chance(2) {
            push("compression_type", "zstd");
        }
        let data_file = self.chance(9) && !(top && self.snapshots);
        if data_file {
            push(DATA_FILE, "on");
            if self.layers == 1 && !self.encrypted && self.chance(2) {
                push("data_file_raw", "on");
            }
            self.compressible &= !top;
        }
        if self.layers == 1 && !self.compressible && self.chance(12) {
            push("preallocation", "metadata");
        }
    }

    fn open_options(&mut self) -> Vec<(String, String)> {
        let mut options = Vec::new();
        if self.profile.is_qcow2 {
            if self.chance(2) {
                options.push(("l2-cache-entry-size".into(), "512".into()));
                options.push(("l2-cache-size".into(), "2048".into()));
            }
            if self.chance(3) {
                let blocks = 4 * self.cluster;
                options.push(("refcount-cache-size".into(), blocks.to_string()));
            }
            if self.chance(3) {
                options.push(("pass-discard-other".into(), "on".into()));
            }
            if self.profile.has_features() && !self.old {
                if self.chance(10) {
                    options.push(("discard-no-unref".into(), "on".into()));
                }
                if self.chance(10) {
                    options.push(("lazy-refcounts".into(), "on".into()));
                }
            }
            if self.chance(10) {
                options.push(("overlap-check".into(), "all".into()));
            }
        }
        options
    }

    fn cut(&mut self) -> u64 {
        self.rng.random_range(1..=700)
    }

    fn phase(&mut self, budget: u64, cut: bool) -> Phase {
        let queues = self.rng.random_range(2..=4);
        let each = (budget / queues).max(1) as usize;
        // Some phases are mostly about freeing and taking, others about plain I/O.
        let flavour = self.rng.random_range(0..4);
        let drops = self.chance(2);
        let queues = (0..queues)
            .map(|_| Queue {
                depth: self.rng.random_range(1..=8),
                steps: (0..each).map(|_| self.step(flavour, drops)).collect(),
            })
            .collect();
        let jobs = if self.resizable {
            0
        } else {
            [0, 0, 1, 1, 2][self.rng.random_range(0..5)]
        };
        let jobs = (0..jobs).filter_map(|_| self.job(budget)).collect();
        let faults = if self.chance(5) {
            let many = self.rng.random_range(1..=2);
            (0..many).map(|_| self.fault()).collect()
        } else {
            Vec::new()
        };
        Phase {
            queues,
            jobs,
            faults,
            cut: cut.then(|| self.cut()),
        }
    }

    /// A range: mostly where others are, mostly whole sectors, often whole clusters.
    fn range(&mut self) -> (u64, u64) {
        let (base, room) = if self.rng.random_ratio(3, 4) {
            self.hot
        } else {
            (0, self.size)
        };
        let unit = if self.rng.random_ratio(1, 2) {
            self.cluster
        } else {
            512.min(self.cluster)
        };
        let units = room / unit;
        let most = match self.rng.random_range(0..10) {
            0..6 => 2,
            6..9 => 6,
            _ => 24,
        };
        let most = (most * self.cluster / unit)
            .min(128 << 10 >> unit.trailing_zeros())
            .max(1);
        let len = self.rng.random_range(1..=most.min(units));
        let at = self.rng.random_range(0..=units - len);
        (base + at * unit, len * unit)
    }

    /// A step about snapshots or bitmaps, now and then.
    fn special(&mut self, drops: bool) -> Option<Step> {
        let kind = if self.snapshots && self.chance(24) {
            match self.rng.random_range(0..8) {
                0..4 => StepKind::SnapshotCreate,
                4..6 => StepKind::SnapshotApply,
                _ => StepKind::SnapshotDelete,
            }
        } else if self.bitmaps && self.chance(40) {
            match self.rng.random_range(0..8) {
                0..5 => StepKind::BitmapAdd,
                5 => StepKind::BitmapRemove,
                _ => StepKind::BitmapStore,
            }
        } else {
            return None;
        };
        let granularity = 512 << self.rng.random_range(0..8);
        Some(Step {
            kind,
            offset: self.rng.random_range(0..1000),
            len: u64::from(kind == StepKind::BitmapAdd) * granularity,
            fua: false,
            dropped: self.dropped(drops, 6),
        })
    }

    /// One of so many requests is dropped, where any are.
    fn dropped(&mut self, drops: bool, of: u32) -> Option<Dropped> {
        (drops && self.chance(of)).then(|| Dropped {
            polls: self.rng.random_range(0..8),
            at_rest: self.chance(4),
        })
    }

    fn step(&mut self, flavour: u32, drops: bool) -> Step {
        if let Some(step) = self.special(drops) {
            return step;
        }
        let (offset, len) = self.range();
        let roll = self.rng.random_range(0..100);
        let frees = if flavour == 0 { 20 } else { 0 };
        let mut kind = match roll {
            0..20 => StepKind::Read,
            _ if roll < 60 - frees => StepKind::Write,
            _ if roll < 70 - frees / 2 => StepKind::Discard,
            _ if roll < 78 => StepKind::ZeroUnmap,
            78..84 => StepKind::Zero,
            84..92 => StepKind::Flush,
            92..94 => StepKind::Status,
            94..96 if self.layers > 1 => StepKind::CopyOnRead,
            96..98 if self.compressible => StepKind::WriteCompressed,
            98 if self.resizable => StepKind::Resize,
            99 => StepKind::Pause,
            _ => StepKind::Write,
        };
        if kind == StepKind::Discard && !self.profile.can(Capabilities::DISCARD) {
            kind = StepKind::Write;
        }
        let (mut offset, mut len) = match kind {
            StepKind::Pause => (self.rng.random_range(1..=2000), 0),
            StepKind::Flush => (0, 0),
            _ => (offset, len),
        };
        match kind {
            StepKind::Resize => {
                let clusters = self.size / self.cluster;
                let to = self.rng.random_range(clusters / 2..=clusters * 5 / 4);
                let odd = if self.chance(4) { 512 } else { 0 };
                (offset, len) = (to * self.cluster + odd, 0);
            }
            StepKind::WriteCompressed => {
                offset -= offset % self.cluster;
                len = self.cluster;
            }
            _ => {}
        }
        let droppable = !matches!(kind, StepKind::Pause | StepKind::Resize);
        let dropped = self.dropped(drops && droppable, 12);
        let writes = matches!(kind, StepKind::Write | StepKind::Zero | StepKind::ZeroUnmap);
        Step {
            kind,
            offset,
            len,
            fua: writes && self.rng.random_ratio(1, 16),
            dropped,
        }
    }

    fn job(&mut self, budget: u64) -> Option<JobPlan> {
        // What is kept in the topmost image stays where it is, and goes on having the same images below it.
        let stays = self.snapshots || self.bitmaps;
        let rewrites = self.profile.can(Capabilities::CHANGE_BACKING) && !stays;
        let sync = [Sync::Full, Sync::Full, Sync::Full, Sync::Top, Sync::None]
            [self.rng.random_range(0..5)];
        let layers = self.layers;
        let kind = match self.rng.random_range(0..4) {
            0 if layers > 1 && rewrites => JobWork::Stream {
                keep: self
                    .rng
                    .random_ratio(1, 2)
                    .then(|| self.rng.random_range(1..layers)),
            },
            1 if layers > 2 && rewrites && self.rng.random_ratio(1, 2) => {
                JobWork::Commit { top: 1, base: 2 }
            }
            1 if layers > 1 && rewrites => JobWork::Commit {
                top: 0,
                base: self.rng.random_range(1..layers),
            },
            2 => JobWork::Mirror {
                sync,
                blocking: self.rng.random_ratio(1, 2),
            },
            3 => JobWork::Backup {
                sync,
                break_snapshot: self.rng.random_ratio(1, 4),
            },
            // Chains that have nothing to be merged get a copy.
            _ => JobWork::Mirror {
                sync: Sync::Full,
                blocking: self.rng.random_ratio(1, 2),
            },
        };
        let count = [0, 0, 1, 2, 3][self.rng.random_range(0..5)];
        let verbs = (0..count)
            .map(|_| {
                let verb = match self.rng.random_range(0..12) {
                    0..4 => Verb::Pause,
                    4..8 => Verb::Resume,
                    8 => Verb::Speed(self.rng.random_range(1..=64) << 20),
                    9 if !stays => Verb::Complete,
                    10 => Verb::Cancel,
                    _ => Verb::ForceCancel,
                };
                (self.rng.random_range(0..=budget / 4), verb)
            })
            .collect();
        Some(JobPlan {
            kind,
            start: self.rng.random_range(0..=budget * 2 / 3),
            speed: if self.chance(4) { 32 << 20 } else { 0 },
            verbs,
            end: match self.rng.random_range(0..5) {
                0 => JobEnd::ForceCancel,
                1 | 2 => JobEnd::Cancel,
                _ if stays => JobEnd::Cancel,
                _ => JobEnd::Complete,
            },
        })
    }

    fn fault(&mut self) -> Fault {
        let op = match self.rng.random_range(0..10) {
            0..3 => FaultOp::Read,
            3..7 => FaultOp::Write,
            7 => FaultOp::Punch,
            _ => FaultOp::Flush,
        };
        let what = match self.rng.random_range(0..10) {
            0..4 => FaultKind::Io,
            4..6 => FaultKind::NoSpace,
            6 => FaultKind::IoAfter,
            _ => FaultKind::Delay(self.rng.random_range(10..=5000)),
        };
        let at = match self.rng.random_range(0..6) {
            0 if self.layers > 1 => Where::Below,
            1 => Where::Target,
            _ => Where::Top,
        };
        let most = if op == FaultOp::Flush { 12 } else { 200 };
        Fault {
            at,
            op,
            skip: self.rng.random_range(0..most),
            times: self.rng.random_range(1..=3),
            what,
        }
    }
}
