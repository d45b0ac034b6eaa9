//! What a storm does, as data, and as commands for `blk io` and qemu-io.

use std::fmt::Write as _;

use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Where a storm happens, in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a cluster.
    pub cluster: u64,
    /// Clusters of the region that everybody fights for.
    pub region: u64,
    /// Victims before the region, and as many after it.
    pub victims: u64,
    /// Clusters that are written for the first time during the storm, after the victims.
    pub fresh: u64,
}

impl Layout {
    /// The region's first byte.
    pub const fn region_start(&self) -> u64 {
        self.victims * self.cluster
    }

    /// The first cluster that is written during the storm.
    pub const fn fresh_start(&self) -> u64 {
        (2 * self.victims + self.region) * self.cluster
    }

    /// Bytes of the disk.
    pub const fn size(&self) -> u64 {
        self.fresh_start() + self.fresh * self.cluster
    }

    /// The victims that are there from the beginning: offsets of clusters.
    pub fn victim_clusters(&self) -> impl Iterator<Item = u64> + use<> {
        let layout = *self;
        let after = layout.victims + layout.region;
        (0..layout.victims)
            .chain(after..after + layout.victims)
            .map(move |at| at * layout.cluster)
    }
}

/// One command of a storm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Command {
    Write {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    /// A cluster that was never written gets its data, and is a victim from then on.
    Fresh {
        offset: u64,
        len: u64,
    },
}

/// The commands of a storm: `count` in the region, and fresh clusters spread between them.
pub fn generate(seed: u64, count: usize, layout: Layout) -> Vec<Command> {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x5705_1234);
    let every = match layout.fresh {
        0 => usize::MAX,
        fresh => (count / fresh as usize).max(1),
    };
    let mut commands = Vec::with_capacity(count + layout.fresh as usize);
    let mut fresh = 0;
    for number in 0..count {
        if number % every == every - 1 && fresh < layout.fresh {
            let offset = layout.fresh_start() + fresh * layout.cluster;
            commands.push(Command::Fresh {
                offset,
                len: layout.cluster,
            });
            fresh += 1;
        }
        let offset = layout.region_start() + rng.random_range(0..layout.region) * layout.cluster;
        let len = layout.cluster;
        commands.push(match rng.random_range(0..8u32) {
            0..3 => Command::Write { offset, len },
            // The front part of a cluster: the rest has to be kept or copied.
            3 => Command::Write {
                offset,
                len: rng.random_range(1..=(layout.cluster / 512)) * 512,
            },
            4 => Command::Zero {
                offset,
                len,
                unmap: false,
            },
            5 => Command::Zero {
                offset,
                len,
                unmap: true,
            },
            _ => Command::Discard { offset, len },
        });
    }
    commands
}

/// The pattern byte of a victim in a command file.
pub const VICTIM_PATTERN: u8 = 0xee;
/// The pattern byte of a fresh cluster.
pub const FRESH_PATTERN: u8 = 0xf5;

/// The storm as commands for `blk io` and qemu-io: victims are written, the storm comes without a pause, and then every
/// victim and every fresh cluster is read back with its pattern.
pub fn script(seed: u64, count: usize, layout: Layout) -> String {
    let mut text = String::new();
    let cluster = layout.cluster;
    for at in layout.victim_clusters() {
        let _ = writeln!(text, "aio_write -q -P {VICTIM_PATTERN:#x} {at} {cluster}");
    }
    text.push_str("aio_flush\n");
    let commands = generate(seed, count, layout);
    for (number, command) in commands.iter().enumerate() {
        let _ = match command {
            Command::Write { offset, len } => {
                writeln!(text, "aio_write -q -P {} {offset} {len}", number % 200 + 1)
            }
            Command::Zero { offset, len, unmap } => {
                let unmap = if *unmap { " -u" } else { "" };
                writeln!(text, "aio_write -q -z{unmap} {offset} {len}")
            }
            Command::Discard { offset, len } => writeln!(text, "discard -q {offset} {len}"),
            Command::Fresh { offset, len } => {
                writeln!(text, "aio_write -q -P {FRESH_PATTERN:#x} {offset} {len}")
            }
        };
    }
    text.push_str("aio_flush\nflush\n");
    for at in layout.victim_clusters() {
        let _ = writeln!(text, "read -q -P {VICTIM_PATTERN:#x} {at} {cluster}");
    }
    for command in &commands {
        if let Command::Fresh { offset, len } = command {
            let _ = writeln!(text, "read -q -P {FRESH_PATTERN:#x} {offset} {len}");
        }
    }
    text.push_str("quit\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_storm_and_it_stays_in_its_region() {
        let layout = Layout {
            cluster: 4096,
            region: 8,
            victims: 8,
            fresh: 10,
        };
        let commands = generate(1, 1000, layout);
        assert_eq!(commands, generate(1, 1000, layout));
        assert_ne!(commands, generate(2, 1000, layout));
        let end = layout.region_start() + layout.region * layout.cluster;
        let mut fresh = 0;
        for command in &commands {
            match *command {
                Command::Fresh { offset, .. } => {
                    assert!(offset >= layout.fresh_start() && offset < layout.size());
                    fresh += 1;
                }
                Command::Write { offset, len }
                | Command::Zero { offset, len, .. }
                | Command::Discard { offset, len } => {
                    assert!(offset >= layout.region_start() && offset + len <= end);
                }
            }
        }
        assert_eq!((commands.len(), fresh), (1010, 10));
    }
}
