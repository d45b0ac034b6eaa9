//! The format of a write log, as Linux's `dm-log-writes` has it (Documentation/admin-guide/device-mapper/log-writes.rst):
//! a superblock in the first sector; then, for each entry, a sector that describes it and the sectors that were written.
//! All numbers are little-endian, all places and lengths in sectors of the size that the superblock names.
//!
//! Parsing and replaying happens in memory, from bytes that are not trusted; no I/O.

use bitflags::bitflags;
use block_core::{Error, Result};

/// `jsfwhsfg`, as the kernel has it.
pub(super) const MAGIC: u64 = 0x006a_7366_7773_6872;
pub(super) const VERSION: u64 = 1;
/// Bytes of a superblock that mean something.
const SUPER_BYTES: usize = 28;
/// Bytes of an entry's description that mean something.
const ENTRY_BYTES: usize = 32;

bitflags! {
    /// What an entry was.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct EntryFlags: u64 {
        /// A flush: everything before it is durable.
        const FLUSH = 1 << 0;
        /// Written through.
        const FUA = 1 << 1;
        /// Discarded; no data follows.
        const DISCARD = 1 << 2;
        /// A mark of the user's; its text follows.
        const MARK = 1 << 3;
        /// Metadata, where the writer said so.
        const METADATA = 1 << 4;
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Where, in sectors of the log's size.
    pub sector: u64,
    /// How much, in such sectors.
    pub sectors: u64,
    /// What.
    pub flags: EntryFlags,
    /// What was written; empty for flushes and discards.
    pub data: Vec<u8>,
}

/// A log that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteLog {
    /// Bytes in a sector.
    pub sector_size: u64,
    /// The entries, in the order in which they completed.
    pub entries: Vec<LogEntry>,
    /// Where the next entry goes, in bytes.
    pub end: u64,
}

/// Whether a log can have sectors of this size.
pub(super) fn is_sector_size(size: u64) -> bool {
    size.is_power_of_two() && (512..1 << 23).contains(&size)
}

/// The superblock, one sector long.
pub(super) fn superblock(entries: u64, sector_size: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(sector_size as usize);
    for word in [MAGIC, VERSION, entries] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(&(sector_size as u32).to_le_bytes());
    bytes.resize(sector_size as usize, 0);
    bytes
}

/// The description of an entry, one sector long.
pub(super) fn description(sector: u64, sectors: u64, flags: EntryFlags, size: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size as usize);
    // The last word is the length of a mark's text, of which there are none here.
    for word in [sector, sectors, flags.bits(), 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize(size as usize, 0);
    bytes
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// Entries and sector size of a superblock.
pub(super) fn parse_superblock(bytes: &[u8]) -> Result<(u64, u64)> {
    let short = || Error::invalid("The write log is shorter than its superblock");
    let field = |name: &str, value: u64, allowed: &str| {
        Error::invalid("Not a write log, or not one that can be read").with_field(
            name,
            format!("{value:#x}"),
            allowed,
        )
    };
    if bytes.len() < SUPER_BYTES {
        return Err(short());
    }
    let magic = word(bytes, 0).ok_or_else(short)?;
    if magic != MAGIC {
        return Err(field("magic", magic, "0x6a736677736872"));
    }
    let version = word(bytes, 8).ok_or_else(short)?;
    if version != VERSION {
        return Err(field("version", version, "1"));
    }
    let entries = word(bytes, 16).ok_or_else(short)?;
    let size = word(bytes, 24).map_or_else(
        || {
            let bytes = bytes.get(24..28).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, |bytes| u64::from(u32::from_le_bytes(bytes)))
        },
        |word| word & 0xffff_ffff,
    );
    if !is_sector_size(size) {
        return Err(field("sectorsize", size, "a power of two from 512 on"));
    }
    Ok((entries, size))
}

impl WriteLog {
    /// Reads a log.
    ///
    /// # Errors
    /// EINVAL that names the field, when it isn't a log or is shorter than it says.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (count, size) = parse_superblock(bytes)?;
        let mut entries = Vec::new();
        let mut at = size;
        for index in 0..count {
            let cut = || {
                Error::invalid("The write log ends within an entry").with_field(
                    "nr_entries",
                    count,
                    format!("at most {index}, from what is there"),
                )
            };
            let start = usize::try_from(at).map_err(|_| cut())?;
            let head = start
                .checked_add(ENTRY_BYTES)
                .and_then(|end| bytes.get(start..end))
                .ok_or_else(cut)?;
            let number = |at| word(head, at).unwrap_or_default();
            let (sector, sectors, flags) = (number(0), number(8), number(16));
            let flags = EntryFlags::from_bits(flags).ok_or_else(|| {
                Error::invalid("Unknown flags in the write log").with_field(
                    format!("flags of entry {index}"),
                    format!("{flags:#x}"),
                    "0 to 0x1f",
                )
            })?;
            at = at.checked_add(size).ok_or_else(cut)?;
            let len = if flags.contains(EntryFlags::DISCARD) {
                0
            } else {
                sectors.checked_mul(size).ok_or_else(cut)?
            };
            let stop = at.checked_add(len).ok_or_else(cut)?;
            let data = usize::try_from(at)
                .ok()
                .zip(usize::try_from(stop).ok())
                .and_then(|(from, to)| bytes.get(from..to))
                .ok_or_else(cut)?;
            entries.push(LogEntry {
                sector,
                sectors,
                flags,
                data: data.to_vec(),
            });
            at = stop;
        }
        Ok(Self {
            sector_size: size,
            entries,
            end: at,
        })
    }

    /// What an empty file is after the first `count` entries. Discarded sectors are zeroes.
    ///
    /// # Errors
    /// EFBIG when an entry lies beyond `limit` bytes.
    pub fn replay(&self, count: usize, limit: u64) -> Result<Vec<u8>> {
        let mut image = Vec::new();
        for entry in self.entries.iter().take(count) {
            if entry.flags.contains(EntryFlags::MARK) {
                continue;
            }
            let start = entry.sector.saturating_mul(self.sector_size);
            let end = start.saturating_add(entry.sectors.saturating_mul(self.sector_size));
            if end > limit {
                return Err(Error::new(
                    block_core::ErrorKind::TooBig,
                    format!("an entry of the write log ends at {end}, beyond {limit}"),
                ));
            }
            let (start, end) = (start as usize, end as usize);
            if image.len() < end {
                image.resize(end, 0);
            }
            if entry.flags.contains(EntryFlags::DISCARD) {
                image[start..end].fill(0);
            } else {
                image[start..end].copy_from_slice(&entry.data);
            }
        }
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(entries: &[(u64, u64, EntryFlags)]) -> Vec<u8> {
        let mut bytes = superblock(entries.len() as u64, 512);
        for (n, (sector, sectors, flags)) in entries.iter().enumerate() {
            bytes.extend(description(*sector, *sectors, *flags, 512));
            if !flags.contains(EntryFlags::DISCARD) {
                bytes.extend(vec![n as u8 + 1; *sectors as usize * 512]);
            }
        }
        bytes
    }

    #[test]
    fn what_was_logged_is_read_back_and_replayed_up_to_any_entry() {
        let bytes = log(&[
            (0, 2, EntryFlags::empty()),
            (0, 0, EntryFlags::FLUSH),
            (1, 1, EntryFlags::DISCARD),
            (3, 1, EntryFlags::FUA),
        ]);
        let parsed = WriteLog::parse(&bytes).unwrap();
        assert_eq!(parsed.end, bytes.len() as u64);
        assert_eq!(parsed.entries[1].flags, EntryFlags::FLUSH);
        assert_eq!(parsed.replay(0, 4096).unwrap(), Vec::<u8>::new());
        assert_eq!(parsed.replay(2, 4096).unwrap(), vec![1; 1024]);
        let all = parsed.replay(4, 4096).unwrap();
        assert_eq!(all.len(), 2048);
        assert_eq!((all[0], all[512], all[1536]), (1, 0, 4));
        assert!(parsed.replay(4, 2047).is_err());
    }

    #[test]
    fn a_log_that_lies_is_refused_by_field() {
        let good = log(&[(0, 2, EntryFlags::empty())]);
        for (at, byte, field) in [
            (0, 0, "magic"),
            (8, 2, "version"),
            (16, 2, "nr_entries"),
            (25, 3, "sectorsize"),
            (512 + 8, 3, "nr_entries"),
            (512 + 15, 255, "nr_entries"),
            (512 + 16, 0x20, "flags of entry 0"),
        ] {
            let mut bad = good.clone();
            bad[at] = byte;
            let error = WriteLog::parse(&bad).unwrap_err();
            assert_eq!(error.field().unwrap().name, field, "{at}");
        }
        assert!(WriteLog::parse(&good[..20]).is_err());
    }
}
