//! Entries of the snapshot table (digest, section 7): what their bytes mean, and how they are written. Free of I/O, and no
//! judgement about where their L1 tables are: [`SnapshotEntry::check_l1`] is for who follows them.

use block_core::{
    error::{Error, ErrorKind, Result},
    snapshot::SnapshotInfo,
};

use super::{
    header::MAX_L1_BYTES,
    units::{Geometry, HostOffset},
};

/// The most bytes that a snapshot table may have.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;
/// The most bytes of extra data that an entry may have.
pub const MAX_EXTRA: usize = 1024;
/// The most bytes that one entry can take, with its padding.
pub const MAX_ENTRY: usize = FIXED + MAX_EXTRA + 2 * 65535 + 7;
/// Bytes of an entry before its extra data.
pub const FIXED: usize = 40;
/// Bytes of extra data that version 3 asks for.
pub const V3_EXTRA: usize = 16;
/// Bytes of extra data whose meaning is known, and which are always written.
const KNOWN_EXTRA: usize = 24;
/// No instruction count.
const NO_ICOUNT: u64 = u64::MAX;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where the snapshot's L1 table is.
    pub l1_table_offset: HostOffset,
    /// Its entries.
    pub l1_size: u32,
    /// The identifier.
    pub id: Vec<u8>,
    /// The name.
    pub name: Vec<u8>,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Bytes of the disk; `None` when the entry doesn't say: the image's size counts then.
    pub disk_size: Option<u64>,
    /// The guest's instruction count.
    pub icount: Option<u64>,
    /// Bytes of extra data that the entry on disk had.
    pub extra_size: u32,
    /// Extra data beyond what is known, kept as it is.
    pub unknown_extra: Vec<u8>,
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    bytes
        .get(at..at + 2)
        .map_or(0, |b| usize::from(u16::from_be_bytes([b[0], b[1]])))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl SnapshotEntry {
    /// Reads the entry at the start of `bytes`, number `index` of the table, and says how many bytes it takes, with the
    /// padding to the next. `None`: it is longer than `bytes`.
    ///
    /// # Errors
    /// EFBIG for more extra data than is allowed.
    pub fn decode(bytes: &[u8], index: u32) -> Result<Option<(Self, usize)>> {
        if bytes.len() < FIXED {
            return Ok(None);
        }
        let extra_size = u32_at(bytes, 36);
        let extra_len = extra_size as usize;
        if extra_len > MAX_EXTRA {
            return Err(Error::new(
                ErrorKind::TooBig,
                format!("Too much extra metadata in snapshot table entry {index}"),
            )
            .with_field(
                format!("snapshot[{index}].extra_data_size"),
                extra_len,
                format!("at most {MAX_EXTRA}"),
            ));
        }
        let (id_len, name_len) = (u16_at(bytes, 12), u16_at(bytes, 14));
        let end = FIXED + extra_len + id_len + name_len;
        if bytes.len() < end {
            return Ok(None);
        }
        let (extra, strings) = bytes[FIXED..end].split_at(extra_len);
        let (id, name) = strings.split_at(id_len);
        let known = |at: usize| (extra_len >= at + 8).then(|| u64_at(extra, at));
        let entry = Self {
            l1_table_offset: HostOffset(u64_at(bytes, 0)),
            l1_size: u32_at(bytes, 8),
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: u32_at(bytes, 16),
            date_nsec: u32_at(bytes, 20),
            vm_clock_nsec: u64_at(bytes, 24),
            vm_state_size: known(0).unwrap_or(u64::from(u32_at(bytes, 32))),
            disk_size: known(8),
            icount: known(16).filter(|count| *count != NO_ICOUNT),
            extra_size,
            unknown_extra: extra.get(KNOWN_EXTRA..).unwrap_or(&[]).to_vec(),
        };
        Ok(Some((entry, end.next_multiple_of(8))))
    }

    /// Bytes of the entry as it is written, with the padding to the next.
    pub fn encoded_len(&self) -> usize {
        let strings = self.id.len() + self.name.len();
        (FIXED + KNOWN_EXTRA + self.unknown_extra.len() + strings).next_multiple_of(8)
    }

    /// Bytes of the entry as it was read, with the padding to the next.
    pub fn stored_len(&self) -> usize {
        let strings = self.id.len() + self.name.len();
        (FIXED + self.extra_size as usize + strings).next_multiple_of(8)
    }

    /// Makes it say all that an entry says that is written now. `disk_size` is the image's, for one that doesn't know its
    /// own.
    pub fn complete(&mut self, disk_size: u64) {
        self.disk_size.get_or_insert(disk_size);
        self.extra_size = (KNOWN_EXTRA + self.unknown_extra.len()) as u32;
    }

    /// Whether it says all that version 3 asks for: 64 bits of VM state size, and the disk's size.
    pub const fn suits_version_3(&self) -> bool {
        self.extra_size >= 16
    }

    /// Appends the entry, which is [`Self::complete`], to a table.
    ///
    /// # Errors
    /// EINVAL for an identifier or name that doesn't fit.
    pub fn encode(&self, table: &mut Vec<u8>) -> Result<()> {
        let len = |what: &str, bytes: &[u8]| {
            u16::try_from(bytes.len()).map_err(|_| {
                Error::invalid(format!("Snapshot {what} too long")).with_field(
                    what,
                    bytes.len(),
                    "at most 65535 bytes",
                )
            })
        };
        let (id_len, name_len) = (len("id", &self.id)?, len("name", &self.name)?);
        let start = table.len();
        table.extend_from_slice(&self.l1_table_offset.0.to_be_bytes());
        table.extend_from_slice(&self.l1_size.to_be_bytes());
        table.extend_from_slice(&id_len.to_be_bytes());
        table.extend_from_slice(&name_len.to_be_bytes());
        table.extend_from_slice(&self.date_sec.to_be_bytes());
        table.extend_from_slice(&self.date_nsec.to_be_bytes());
        table.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        let short = u32::try_from(self.vm_state_size).unwrap_or(0);
        table.extend_from_slice(&short.to_be_bytes());
        let extra = (KNOWN_EXTRA + self.unknown_extra.len()) as u32;
        table.extend_from_slice(&extra.to_be_bytes());
        table.extend_from_slice(&self.vm_state_size.to_be_bytes());
        table.extend_from_slice(&self.disk_size.unwrap_or(0).to_be_bytes());
        table.extend_from_slice(&self.icount.unwrap_or(NO_ICOUNT).to_be_bytes());
        table.extend_from_slice(&self.unknown_extra);
        table.extend_from_slice(&self.id);
        table.extend_from_slice(&self.name);
        table.resize(start + self.encoded_len(), 0);
        Ok(())
    }

    /// Bytes of the L1 table.
    pub const fn l1_bytes(&self) -> u64 {
        self.l1_size as u64 * 8
    }

    /// Refuses an L1 table of impossible size or place.
    ///
    /// # Errors
    /// EFBIG, EINVAL.
    pub fn check_l1(&self, geometry: Geometry) -> Result<()> {
        if self.l1_bytes() > MAX_L1_BYTES {
            return Err(
                Error::new(ErrorKind::TooBig, "Snapshot L1 table too large").with_field(
                    "snapshot l1_size",
                    self.l1_size,
                    format!("at most {}", MAX_L1_BYTES / 8),
                ),
            );
        }
        let end = self.l1_table_offset.0.checked_add(self.l1_bytes());
        let placed = end.is_some_and(|end| i64::try_from(end).is_ok());
        if !placed || !geometry.is_aligned(self.l1_table_offset) {
            return Err(
                Error::invalid("Snapshot L1 table offset invalid").with_field(
                    "snapshot l1_table_offset",
                    self.l1_table_offset,
                    format!(
                        "a multiple of {}, ending below 2^63",
                        geometry.cluster_size()
                    ),
                ),
            );
        }
        Ok(())
    }

    /// What a list shows of it; `disk_size` is the image's.
    pub fn info(&self, disk_size: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: self.vm_state_size,
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: self.icount,
            disk_size: self.disk_size.unwrap_or(disk_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> SnapshotEntry {
        SnapshotEntry {
            l1_table_offset: HostOffset(0x15_0000),
            l1_size: 3,
            id: b"7".to_vec(),
            name: b"before the update".to_vec(),
            date_sec: 0x6b09_edcd,
            date_nsec: 5,
            vm_clock_nsec: 21_780_256_376,
            vm_state_size: 5 << 32,
            disk_size: Some(4 << 20),
            icount: None,
            extra_size: 24,
            unknown_extra: Vec::new(),
        }
    }

    #[test]
    fn an_entry_survives_encoding_with_extra_data_that_nobody_knows() {
        let mut entry = entry();
        entry.unknown_extra = vec![9; 13];
        entry.extra_size = 37;
        let mut table = vec![0xee; 8];
        entry.encode(&mut table).unwrap();
        assert_eq!(table.len() % 8, 0);
        let (read, len) = SnapshotEntry::decode(&table[8..], 0).unwrap().unwrap();
        assert_eq!((read, len), (entry.clone(), table.len() - 8));
        assert_eq!(table.len() - 8, entry.encoded_len());
        assert_eq!(
            &table[8 + 32..][..4],
            [0; 4],
            "VM state of more than 32 bits shows in the extra data only"
        );
    }

    #[test]
    fn an_entry_as_version_2_wrote_it_gets_the_sizes_from_elsewhere() {
        let mut table = Vec::new();
        entry().encode(&mut table).unwrap();
        let mut old = table[..FIXED].to_vec();
        old[32..36].copy_from_slice(&77u32.to_be_bytes());
        old[36..40].fill(0);
        old.extend_from_slice(&table[FIXED + KNOWN_EXTRA..]);
        let (read, _) = SnapshotEntry::decode(&old, 0).unwrap().unwrap();
        assert_eq!(
            (read.vm_state_size, read.disk_size, read.icount),
            (77, None, None)
        );
        assert_eq!(read.info(1 << 30).disk_size, 1 << 30);
        assert_eq!(read.name, b"before the update");
        assert_eq!(read.stored_len(), old.len().next_multiple_of(8));
        let (mut read, mut again) = (read, Vec::new());
        read.complete(1 << 30);
        read.encode(&mut again).unwrap();
        assert_eq!(read.stored_len(), again.len());
        let (read, _) = SnapshotEntry::decode(&again, 0).unwrap().unwrap();
        assert_eq!(read.disk_size, Some(1 << 30));
    }

    #[test]
    fn too_much_extra_data_is_refused_and_a_cut_entry_asks_for_more() {
        let mut table = Vec::new();
        entry().encode(&mut table).unwrap();
        for len in [0, FIXED - 1, FIXED, table.len() - 8] {
            assert_eq!(SnapshotEntry::decode(&table[..len], 0).unwrap(), None);
        }
        table[36..40].copy_from_slice(&1025u32.to_be_bytes());
        let error = SnapshotEntry::decode(&table, 4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooBig);
        assert!(error.reason().contains("entry 4"));
    }

    #[test]
    fn l1_tables_of_impossible_size_or_place_are_refused() {
        let geometry = Geometry::new(16, 4, 3).unwrap();
        assert!(entry().check_l1(geometry).is_ok());
        let mut large = entry();
        large.l1_size = 1 << 22;
        assert!(large.check_l1(geometry).is_ok());
        large.l1_size += 1;
        assert_eq!(
            large.check_l1(geometry).unwrap_err().kind(),
            ErrorKind::TooBig
        );
        let mut askew = entry();
        askew.l1_table_offset.0 += 512;
        assert!(askew.check_l1(geometry).is_err());
        askew.l1_table_offset.0 = 1 << 63;
        assert!(askew.check_l1(geometry).is_err());
    }
}
