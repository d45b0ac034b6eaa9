//! The bytes on disk. Everything is little-endian. This file knows the layout and nothing else: no I/O, no memory of what
//! was written.
//!
//! ```text
//! offset 0                          the header, one sector of 512 bytes
//! map_at,    8 bytes per cluster    the map: one entry per guest cluster
//! ledger_at, 8 bytes per cluster    the ledger: one entry per host cluster
//! first_data * cluster size         data
//! ```
//!
//! | header | bytes | what it is |
//! | --- | --- | --- |
//! | 0 | 8 | the magic, `LEDGER\r\n` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | cluster size in bytes, a power of two from 512 to 2 MiB |
//! | 16 | 8 | size of the guest's disk in bytes |
//! | 24 | 8 | entries of the map: how many clusters the disk can grow to |
//! | 32 | 8 | entries of the ledger: how many clusters the file can grow to |
//! | 40 | 8 | flags; bit 0: found corrupt. An image with any other is refused: its meaning isn't known |
//! | 48 | 2 | length of the backing file's format |
//! | 50 | 2 | length of the backing file's name |
//! | 52 | 460 | the format and the name, one after the other |
//!
//! The header is one sector so that a power cut leaves the old one or the new one, and no mixture.

use std::fmt::Display;

use block_core::{Error, ErrorKind, Result};

/// What an image begins with. The line break is there to be damaged by a copy in text mode.
pub const MAGIC: &[u8; 8] = b"LEDGER\r\n";
/// Bytes of the header.
pub const HEADER_BYTES: usize = 512;
/// Bytes of an entry of either table.
pub const ENTRY_BYTES: u64 = 8;
/// Tables are read whole, so there is a limit: 4 Mi clusters are 256 GiB of the default size.
pub const MAX_CLUSTERS: u64 = 1 << 22;
const VERSION: u32 = 1;
const FLAG_CORRUPT: u64 = 1;
const NAMES_AT: usize = 52;

/// A cluster of the guest's disk. A type of its own, so that it can't be mistaken for one of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// A cluster of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// An entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The backing file decides; zeroes if there is none.
    Unallocated,
    /// Zeroes, whatever the backing file has.
    Zero,
    /// The data is there.
    Data(HostCluster),
}

impl Entry {
    /// Its eight bytes as a number. Host clusters 0 and 1 never hold data, which makes room for the other two.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero => 1,
            Self::Data(host) => host.0,
        }
    }

    /// The entry that a number stands for. [`Header::check_entry`] has been asked before.
    pub const fn decode(raw: u64) -> Self {
        match raw {
            0 => Self::Unallocated,
            1 => Self::Zero,
            host => Self::Data(HostCluster(host)),
        }
    }
}

/// An entry of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// It can be allocated.
    Nobody,
    /// It holds the data of a guest cluster, or did, or is going to.
    Guest(GuestCluster),
    /// The header and the tables.
    Format,
}

impl Owner {
    /// Its eight bytes as a number.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Nobody => 0,
            Self::Guest(guest) => guest.0 + 1,
            Self::Format => u64::MAX,
        }
    }

    /// The owner that a number stands for.
    pub const fn decode(raw: u64) -> Self {
        match raw {
            0 => Self::Nobody,
            u64::MAX => Self::Format,
            guest => Self::Guest(GuestCluster(guest - 1)),
        }
    }
}

/// The header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bytes of the guest's disk.
    pub size: u64,
    /// Entries of the map.
    pub map_entries: u64,
    /// Entries of the ledger.
    pub ledger_entries: u64,
    /// The image was found corrupt, and may be opened for reading or repair only.
    pub corrupt: bool,
    /// The backing file's name and format, as the user gave them.
    pub backing: Option<(String, String)>,
}

fn wrong(field: &str, value: impl Display, allowed: impl Display) -> Error {
    Error::invalid("Invalid ledger image").with_field(field, value, allowed.to_string())
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut raw = [0; N];
    raw.copy_from_slice(&bytes[at..at + N]);
    raw
}

impl Header {
    /// A new image's header: the tables have room for four times the size, and the file for a little more than the
    /// disk, because a cluster that is being freed has its place until that is durable.
    pub fn new(size: u64, cluster_size: u64, backing: Option<(String, String)>) -> Result<Self> {
        let clusters = size.div_ceil(cluster_size.max(1));
        let map_entries = clusters
            .saturating_mul(4)
            .clamp(256, MAX_CLUSTERS.max(clusters));
        let mut header = Self {
            cluster_size,
            size,
            map_entries,
            ledger_entries: 0,
            corrupt: false,
            backing,
        };
        header.validate_sizes()?;
        let spare = map_entries / 8;
        // The ledger has entries for the clusters that it is in itself: a larger one may need one more.
        let mut entries = map_entries + spare;
        while header.ledger_entries < entries {
            header.ledger_entries = entries;
            entries = header.first_data().0 + map_entries + spare;
        }
        header.names()?;
        Ok(header)
    }

    fn validate_sizes(&self) -> Result<()> {
        let cluster = self.cluster_size;
        if !(512..=2 << 20).contains(&cluster) || !cluster.is_power_of_two() {
            let allowed = "a power of two, 512 to 2097152";
            return Err(wrong("cluster_size", cluster, allowed));
        }
        if self.map_entries > MAX_CLUSTERS {
            let allowed = format!("at most {MAX_CLUSTERS} clusters");
            return Err(wrong("map_entries", self.map_entries, allowed));
        }
        if self.size.div_ceil(cluster) > self.map_entries {
            let allowed = format!("at most {} clusters", self.map_entries);
            return Err(wrong("size", self.size, allowed));
        }
        Ok(())
    }

    /// Reads a header. Whatever is in the bytes, the answer is a header that makes sense, or an error that names the field.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER_BYTES || bytes[..8] != *MAGIC {
            let text = "Image is not in ledger format";
            return Err(Error::new(ErrorKind::WrongFormat, text));
        }
        let u64_at = |at| u64::from_le_bytes(number(bytes, at));
        let version = u32::from_le_bytes(number(bytes, 8));
        if version != VERSION {
            return Err(wrong("version", version, VERSION));
        }
        let flags = u64_at(40);
        if flags & !FLAG_CORRUPT != 0 {
            return Err(wrong("flags", format!("{flags:#x}"), "0 or 1"));
        }
        let lens = [48, 50].map(|at| u16::from_le_bytes(number(bytes, at)) as usize);
        let backing = if lens[1] == 0 {
            None
        } else {
            let end = NAMES_AT + lens[0] + lens[1];
            let names = bytes[..HEADER_BYTES]
                .get(NAMES_AT..end)
                .ok_or_else(|| wrong("backing_file", lens[1], "a name that fits the header"))?;
            let text = |part: &[u8]| {
                String::from_utf8(part.to_vec())
                    .map_err(|_| wrong("backing_file", "(bytes)", "UTF-8"))
            };
            Some((text(&names[lens[0]..])?, text(&names[..lens[0]])?))
        };
        let header = Self {
            cluster_size: u32::from_le_bytes(number(bytes, 12)) as u64,
            size: u64_at(16),
            map_entries: u64_at(24),
            ledger_entries: u64_at(32),
            corrupt: flags & FLAG_CORRUPT != 0,
            backing,
        };
        header.validate_sizes()?;
        // Twice the map is more than `new` ever asks for. The upper limit comes first: it keeps the sums below small.
        let most = 2 * MAX_CLUSTERS;
        if header.ledger_entries > most || header.ledger_entries < header.first_data().0 {
            let allowed = format!("room for the tables, and at most {most}");
            return Err(wrong("ledger_entries", header.ledger_entries, allowed));
        }
        Ok(header)
    }

    fn names(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some((name, format)) = &self.backing {
            bytes.extend_from_slice(format.as_bytes());
            bytes.extend_from_slice(name.as_bytes());
            let most = HEADER_BYTES - NAMES_AT;
            if name.is_empty() || bytes.len() > most {
                let allowed = format!("1 to {most} bytes together with its format");
                return Err(wrong("backing_file", name, allowed));
            }
        }
        Ok(bytes)
    }

    /// The header's sector.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; HEADER_BYTES];
        let mut put = |at: usize, raw: &[u8]| bytes[at..at + raw.len()].copy_from_slice(raw);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &(self.cluster_size as u32).to_le_bytes());
        put(16, &self.size.to_le_bytes());
        put(24, &self.map_entries.to_le_bytes());
        put(32, &self.ledger_entries.to_le_bytes());
        put(
            40,
            &(if self.corrupt { FLAG_CORRUPT } else { 0 }).to_le_bytes(),
        );
        let names = self.names()?;
        let format_len = self.backing.as_ref().map_or(0, |(_, format)| format.len());
        put(48, &(format_len as u16).to_le_bytes());
        put(50, &((names.len() - format_len) as u16).to_le_bytes());
        put(NAMES_AT, &names);
        Ok(bytes)
    }

    fn table_bytes(&self, entries: u64) -> u64 {
        (entries * ENTRY_BYTES).next_multiple_of(self.table_alignment())
    }

    /// Tables are written in blocks of 4096 bytes, which must not reach into what comes next.
    fn table_alignment(&self) -> u64 {
        self.cluster_size.max(4096)
    }

    /// Where the map begins, in bytes.
    pub fn map_at(&self) -> u64 {
        self.table_alignment()
    }

    /// Where the ledger begins, in bytes.
    pub fn ledger_at(&self) -> u64 {
        self.map_at() + self.table_bytes(self.map_entries)
    }

    /// The first cluster after the tables.
    pub fn first_data(&self) -> HostCluster {
        let end = self.ledger_at() + self.table_bytes(self.ledger_entries);
        HostCluster(end / self.cluster_size)
    }

    /// Whether an entry of the map is one that can be.
    pub fn check_entry(&self, at: GuestCluster, raw: u64) -> Result<()> {
        let hosts = self.first_data().0..self.ledger_entries;
        if raw <= 1 || hosts.contains(&raw) {
            return Ok(());
        }
        let allowed = format!("0, 1 or {} to {}", hosts.start, hosts.end);
        Err(
            Error::corrupt("The map refers to a cluster that can't hold data").with_field(
                format!("map[{}]", at.0),
                raw,
                allowed,
            ),
        )
    }
}

/// Cuts a range of the disk at the edges of clusters.
pub fn pieces(cluster_size: u64, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let within = at % cluster_size;
        let len = (cluster_size - within).min(end - at);
        let piece = Piece {
            cluster: GuestCluster(at / cluster_size),
            within,
            len,
        };
        at += len;
        (len > 0).then_some(piece)
    })
}

/// The part of a request that lies in one cluster.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// The cluster.
    pub cluster: GuestCluster,
    /// Where in it the piece begins, in bytes.
    pub within: u64,
    /// Bytes of the piece, at most a cluster.
    pub len: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_was_written_is_read_back() {
        let backing = Some(("base image".to_owned(), "raw".to_owned()));
        let mut header = Header::new(10 << 20, 65536, backing).expect("it is valid");
        header.corrupt = true;
        let bytes = header.to_bytes().expect("the names fit");
        assert_eq!(Header::parse(&bytes).expect("it is ours"), header);
    }

    #[test]
    fn a_header_with_any_byte_changed_is_refused_or_makes_sense() {
        let header = Header::new(1 << 20, 4096, None).expect("it is valid");
        let bytes = header.to_bytes().expect("no names");
        for at in 0..64 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                if let Ok(header) = Header::parse(&bytes) {
                    assert!(header.map_entries <= MAX_CLUSTERS);
                    assert!(header.size.div_ceil(header.cluster_size) <= header.map_entries);
                    assert!(header.first_data().0 <= header.ledger_entries);
                }
            }
        }
    }

    #[test]
    fn pieces_cover_a_range_once_and_end_at_its_end() {
        let all = pieces(4096, 4000, 5000);
        let found: Vec<_> = all.map(|p| (p.cluster.0, p.within, p.len)).collect();
        assert_eq!(found, [(0, 4000, 96), (1, 0, 4096), (2, 0, 808)]);
        assert_eq!(pieces(4096, 4096, 0).count(), 0);
    }
}
