//! The bitmap directory and bitmap tables (digest, sections 8.1 to 8.3): decoding, encoding and what is allowed. No I/O.

use bitflags::bitflags;
use block_core::{
    bitmap::MAX_NAME,
    error::{Error, Result},
};

use crate::layout::{Geometry, HostOffset};

/// Bytes of a directory entry before its name.
const FIXED: usize = 24;
/// The most entries that a bitmap table may have.
const MAX_TABLE: u32 = 0x800_0000;
/// The most bytes that a bitmap's data may take.
pub const MAX_DATA: u64 = 0x2000_0000;
/// The only type of bitmap: dirty tracking.
const DIRTY_TRACKING: u8 = 1;
/// The smallest and the largest granularity, as powers of two, of a bitmap that can be used.
pub const GRANULARITY: std::ops::RangeInclusive<u8> = 9..=31;
/// The largest granularity that there may be.
const MAX_GRANULARITY: u8 = 63;
/// The bits of a table entry that hold an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Selects all ones where a table entry has no offset.
const ALL_ONES: u64 = 1;

bitflags! {
    /// Flags of a directory entry.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct BitmapFlags: u32 {
        /// What is stored was not kept up to date.
        const IN_USE = 1 << 0;
        /// Writes are to be recorded.
        const AUTO = 1 << 1;
        /// It may be used although nobody knows what its extra data says.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
        const _ = !0;
    }
}

/// An entry of the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Where the bitmap table is.
    pub table: HostOffset,
    /// Its entries, one per cluster of bits.
    pub table_entries: u32,
    /// Flags.
    pub flags: BitmapFlags,
    /// log2 of the bytes per bit.
    pub granularity_bits: u8,
    /// The name's bytes, as the image has them.
    pub name: Vec<u8>,
    /// Extra data, which nobody here understands.
    pub extra: Vec<u8>,
}

/// An entry of a bitmap table: where a cluster of bits is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableEntry {
    /// All bits are clear.
    Clear,
    /// All bits are set.
    Set,
    /// The bits are in this cluster.
    Data(HostOffset),
}

/// Table entries that a bitmap needs whose bits cover `size` bytes of disk.
pub fn table_entries_for(geometry: Geometry, size: u64, granularity_bits: u8) -> u64 {
    let bits = size.div_ceil(1 << granularity_bits);
    geometry.clusters_for(bits.div_ceil(8))
}

/// Bytes that an entry with a name of `name` bytes, and no extra data, takes in the directory.
pub fn entry_len(name: usize) -> u64 {
    (FIXED + name).next_multiple_of(8) as u64
}

fn be<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    if let Some(found) = bytes.get(at..at + N) {
        field.copy_from_slice(found);
    }
    field
}

impl DirectoryEntry {
    /// The name for people, and to find the bitmap by; bytes that aren't UTF-8 are replaced.
    pub fn display_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Bytes of the table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// Whether what is stored is to be trusted.
    pub const fn is_consistent(&self) -> bool {
        !self.flags.contains(BitmapFlags::IN_USE)
    }

    /// Whether it is a bitmap that can be used here. Others are valid, too, with a granularity or a name that nobody else has, or with
    /// extra data that changes what it means: they are left as they are.
    pub fn is_ours(&self) -> bool {
        GRANULARITY.contains(&self.granularity_bits)
            && (1..=MAX_NAME).contains(&self.name.len())
            && (self.extra.is_empty() || self.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE))
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.table.0.to_be_bytes());
        out.extend_from_slice(&self.table_entries.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.push(DIRTY_TRACKING);
        out.push(self.granularity_bits);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// Reads the entry at the front of `bytes`, and says how long it is.
    fn decode(bytes: &[u8], geometry: Geometry, disk: u64) -> Result<(Self, usize)> {
        if bytes.len() < FIXED {
            return Err(broken(bytes.len()));
        }
        let name_size = usize::from(u16::from_be_bytes(be(bytes, 18)));
        let extra = u32::from_be_bytes(be(bytes, 20));
        let len = (FIXED as u64 + u64::from(extra) + name_size as u64).next_multiple_of(8);
        let Some(whole) = usize::try_from(len).ok().and_then(|len| bytes.get(..len)) else {
            return Err(broken(bytes.len()));
        };
        let entry = Self {
            table: HostOffset(u64::from_be_bytes(be(whole, 0))),
            table_entries: u32::from_be_bytes(be(whole, 8)),
            flags: BitmapFlags::from_bits_retain(u32::from_be_bytes(be(whole, 12))),
            granularity_bits: whole[17],
            name: whole[FIXED + extra as usize..][..name_size].to_vec(),
            extra: whole[FIXED..FIXED + extra as usize].to_vec(),
        };
        let unfit = |field: &str, value: u64, allowed: String| {
            Err(Error::invalid(format!(
                "Bitmap '{}' doesn't satisfy the constraints",
                entry.display_name()
            ))
            .with_field(field, value, allowed))
        };
        let cluster = geometry.cluster_size();
        if entry.table.0 == 0 || !geometry.is_aligned(entry.table) || entry.table.0 >> 56 != 0 {
            return unfit(
                "bitmap_table_offset",
                entry.table.0,
                format!("a non-zero multiple of {cluster} below 2^56"),
            );
        }
        let most = (MAX_DATA / cluster).min(u64::from(MAX_TABLE));
        if !(1..=most).contains(&u64::from(entry.table_entries)) {
            return unfit(
                "bitmap_table_size",
                u64::from(entry.table_entries),
                format!("1..={most}"),
            );
        }
        let known = BitmapFlags::IN_USE | BitmapFlags::AUTO | BitmapFlags::EXTRA_DATA_COMPATIBLE;
        if !known.contains(entry.flags) {
            return unfit(
                "flags",
                u64::from(entry.flags.bits()),
                "in_use (bit 0), auto (bit 1) and extra_data_compatible (bit 2)".into(),
            );
        }
        if whole[16] != DIRTY_TRACKING {
            return unfit("type", u64::from(whole[16]), "1".into());
        }
        if entry.granularity_bits > MAX_GRANULARITY {
            return unfit(
                "granularity_bits",
                u64::from(entry.granularity_bits),
                format!("0..={MAX_GRANULARITY}"),
            );
        }
        let needed = table_entries_for(geometry, disk, entry.granularity_bits);
        // The stale table of an inconsistent bitmap may be of another disk size.
        if entry.is_consistent() && u64::from(entry.table_entries) != needed {
            let error = Error::invalid(format!(
                "Could not read bitmap '{}' from image: Invalid argument",
                entry.display_name()
            ));
            return Err(error.with_field(
                "bitmap_table_size",
                entry.table_entries,
                needed.to_string(),
            ));
        }
        Ok((entry, whole.len()))
    }
}

fn broken(left: usize) -> Error {
    Error::invalid("Broken bitmap directory").with_field(
        "bitmap_directory_size",
        format!("{left} bytes left"),
        "whole entries",
    )
}

/// Reads a directory of `count` bitmaps of a disk of `disk` bytes.
///
/// # Errors
/// EINVAL with the field: an entry that breaks a rule, names that aren't unique, fewer or more entries than `count`.
pub fn decode_directory(
    mut bytes: &[u8],
    count: u32,
    geometry: Geometry,
    disk: u64,
) -> Result<Vec<DirectoryEntry>> {
    if bytes.is_empty() {
        return Err(
            Error::invalid("Requested bitmap directory size is zero").with_field(
                "bitmap_directory_size",
                0,
                "at least 32",
            ),
        );
    }
    let mut entries = Vec::new();
    let mut names = std::collections::HashSet::new();
    while !bytes.is_empty() {
        if entries.len() as u64 >= u64::from(count) {
            return Err(
                Error::invalid("More bitmaps found than specified in header extension").with_field(
                    "nb_bitmaps",
                    count,
                    "as many as the directory has",
                ),
            );
        }
        let (entry, len) = DirectoryEntry::decode(bytes, geometry, disk)?;
        let name = entry.display_name();
        if !names.insert(name.clone()) {
            return Err(
                Error::invalid(format!("Bitmap already exists: {name}")).with_field(
                    "name",
                    name,
                    "unique in the directory",
                ),
            );
        }
        entries.push(entry);
        bytes = &bytes[len..];
    }
    if (entries.len() as u64) < u64::from(count) {
        return Err(
            Error::invalid("Less bitmaps found than specified in header extension").with_field(
                "nb_bitmaps",
                count,
                entries.len().to_string(),
            ),
        );
    }
    Ok(entries)
}

/// The bytes of a directory.
pub fn encode_directory(entries: &[DirectoryEntry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        entry.encode(&mut out);
    }
    out
}

impl TableEntry {
    /// Reads an entry.
    ///
    /// # Errors
    /// EINVAL for reserved bits, an offset that isn't aligned, or both an offset and bit 0.
    pub fn decode(raw: u64, geometry: Geometry) -> Result<Self> {
        let offset = HostOffset(raw & OFFSET_MASK);
        let low = raw & !OFFSET_MASK;
        match (offset.0, low) {
            (0, 0) => Ok(Self::Clear),
            (0, ALL_ONES) => Ok(Self::Set),
            (1.., 0) if geometry.is_aligned(offset) => Ok(Self::Data(offset)),
            _ => Err(Error::invalid("Invalid argument").with_field(
                "bitmap table entry",
                format!("{raw:#x}"),
                format!(
                    "0, 1, or a multiple of {:#x} below 2^56",
                    geometry.cluster_size()
                ),
            )),
        }
    }

    /// Its bits on disk.
    pub const fn encode(self) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => ALL_ONES,
            Self::Data(offset) => offset.0,
        }
    }
}

/// Bytes that the persistent bitmaps of a new image take: for each, its granularity in bytes and the length of its name.
/// Data is counted as if every bit were set, as `qemu-img measure` does.
pub fn bitmaps_size(
    cluster_size: u64,
    disk: u64,
    bitmaps: impl IntoIterator<Item = (u64, usize)>,
) -> u64 {
    let round = |bytes: u64| bytes.div_ceil(cluster_size).saturating_mul(cluster_size);
    let (mut total, mut directory) = (0u64, 0u64);
    for (granularity, name) in bitmaps {
        let bits = disk.div_ceil(granularity.max(1));
        let data = bits.div_ceil(8).div_ceil(cluster_size);
        total = total
            .saturating_add(data.saturating_mul(cluster_size))
            .saturating_add(round(data.saturating_mul(8)));
        directory += entry_len(name);
    }
    total.saturating_add(round(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(16, 4, 3).unwrap()
    }

    fn entry() -> DirectoryEntry {
        DirectoryEntry {
            table: HostOffset(0xa0000),
            table_entries: 1,
            flags: BitmapFlags::AUTO,
            granularity_bits: 16,
            name: b"b0".to_vec(),
            extra: Vec::new(),
        }
    }

    const DISK: u64 = 10 << 20;

    #[test]
    fn a_directory_is_what_qemu_img_writes() {
        // qemu-img bitmap --add a.qcow2 b0, of 10 MiB.
        let bytes = [
            0, 0, 0, 0, 0, 0x0a, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 1, 16, 0, 2, 0, 0, 0, 0, b'b', b'0',
            0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(encode_directory(&[entry()]), bytes);
        assert_eq!(
            decode_directory(&bytes, 1, geometry(), DISK).unwrap(),
            [entry()]
        );
    }

    #[test]
    fn every_field_of_an_entry_is_checked_and_named() {
        type Damage = fn(&mut Vec<u8>);
        let cases: [(Damage, &str, &str); 12] = [
            (|b| b[5] = 0, "constraints", "bitmap_table_offset"),
            (|b| b[6] = 2, "constraints", "bitmap_table_offset"),
            (|b| b[0] = 1, "constraints", "bitmap_table_offset"),
            (|b| b[11] = 0, "constraints", "bitmap_table_size"),
            (|b| b[8] = 8, "constraints", "bitmap_table_size"),
            (|b| b[10] = 0x21, "constraints", "bitmap_table_size"),
            (
                |b| b[11] = 2,
                "Could not read bitmap 'b0' from image",
                "bitmap_table_size",
            ),
            (|b| b[15] = 10, "constraints", "flags"),
            (|b| b[16] = 2, "constraints", "type"),
            (|b| b[17] = 64, "constraints", "granularity_bits"),
            (
                |b| b[18] = 4,
                "Broken bitmap directory",
                "bitmap_directory_size",
            ),
            (
                |b| b.truncate(24),
                "Broken bitmap directory",
                "bitmap_directory_size",
            ),
        ];
        for (n, (damage, reason, field)) in cases.into_iter().enumerate() {
            let mut bytes = encode_directory(&[entry()]);
            damage(&mut bytes);
            let error = decode_directory(&bytes, 1, geometry(), DISK).unwrap_err();
            assert!(error.reason().contains(reason), "case {n}: {error}");
            assert_eq!(error.field().unwrap().name, field, "case {n}: {error}");
        }
    }

    #[test]
    fn the_count_and_the_names_of_a_directory_are_checked() {
        let mut second = entry();
        second.name = b"b1".to_vec();
        let bytes = encode_directory(&[entry(), second]);
        let reason = |bytes: &[u8], count| {
            let error = decode_directory(bytes, count, geometry(), DISK).unwrap_err();
            error.reason()
        };
        assert!(reason(&bytes, 1).starts_with("More bitmaps"));
        assert!(reason(&bytes, 3).starts_with("Less bitmaps"));
        assert!(reason(&[], 1).contains("size is zero"));
        assert!(reason(&bytes[..40], 2).starts_with("Broken"));
        let twice = encode_directory(&[entry(), entry()]);
        assert_eq!(reason(&twice, 2), "Bitmap already exists: b0");
    }

    #[test]
    fn what_others_may_store_is_read_and_written_as_it_is() {
        let with = |change: fn(&mut DirectoryEntry)| {
            let mut entry = entry();
            change(&mut entry);
            entry
        };
        let ours = [
            with(|entry| entry.flags |= BitmapFlags::EXTRA_DATA_COMPATIBLE),
            with(|entry| {
                entry.flags |= BitmapFlags::EXTRA_DATA_COMPATIBLE;
                entry.extra = vec![7; 13];
            }),
        ];
        let foreign = [
            with(|entry| entry.extra = vec![7; 13]),
            with(|entry| {
                entry.granularity_bits = 8;
                entry.table_entries = table_entries_for(geometry(), DISK, 8) as u32;
            }),
            with(|entry| entry.granularity_bits = 32),
            with(|entry| entry.granularity_bits = 63),
            with(|entry| entry.name = vec![b'x'; 1024]),
            with(|entry| entry.name.clear()),
        ];
        for (expected, entries) in [(true, &ours[..]), (false, &foreign[..])] {
            for entry in entries {
                let bytes = encode_directory(std::slice::from_ref(entry));
                assert_eq!(bytes.len() % 8, 0);
                let read = decode_directory(&bytes, 1, geometry(), DISK).unwrap();
                assert_eq!(read, std::slice::from_ref(entry));
                assert_eq!(entry.is_ours(), expected, "{entry:?}");
            }
        }
    }

    #[test]
    fn the_table_of_an_inconsistent_bitmap_may_be_of_another_size() {
        let mut stale = entry();
        stale.table_entries = 7;
        stale.flags |= BitmapFlags::IN_USE;
        let bytes = encode_directory(&[stale.clone()]);
        assert_eq!(
            decode_directory(&bytes, 1, geometry(), DISK).unwrap(),
            [stale]
        );
    }

    #[test]
    fn table_entries_are_decoded_as_the_specification_says() {
        let decode = |raw| TableEntry::decode(raw, geometry());
        for (raw, entry) in [
            (0, TableEntry::Clear),
            (1, TableEntry::Set),
            (0x30000, TableEntry::Data(HostOffset(0x30000))),
        ] {
            assert_eq!(decode(raw).unwrap(), entry);
            assert_eq!(entry.encode(), raw);
        }
        for raw in [2, 0x200, 0x30001, 0x30100, 1 << 56, 1 << 63, u64::MAX] {
            assert!(decode(raw).is_err(), "{raw:#x}");
        }
    }

    #[test]
    fn garbage_never_panics() {
        for len in 0..300usize {
            let bytes: Vec<u8> = (0..len).map(|n| (n * 7 % 13) as u8).collect();
            let _ = decode_directory(&bytes, 3, geometry(), DISK);
        }
    }
}
