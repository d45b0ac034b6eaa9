//! The hosted sparse extent on disk: its header, where its tables are, and what their entries mean (digest of VMDK,
//! sections 3 and 7). Everything read from an image is checked here before anybody computes with it. No I/O.

use block_core::{Error, ErrorKind, Result};

/// Bytes in a sector, the unit of most fields.
pub(crate) const SECTOR: u64 = 512;
/// Size of the header, in bytes.
pub(crate) const HEADER_SIZE: usize = 512;

const MAGIC: [u8; 4] = *b"KDMV";
const MAGIC_COWD: [u8; 4] = *b"COWD";

const FLAG_NEWLINE_CHECK: u32 = 1 << 0;
const FLAG_REDUNDANT: u32 = 1 << 1;
const FLAG_ZEROED_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;

const NEWLINE_CHECK: [u8; 4] = *b"\n \r\n";
const GD_AT_END: u64 = u64::MAX;
/// Largest grain: 1 GiB.
const MAX_GRAIN_SECTORS: u64 = 0x20_0000;
const MAX_GD_ENTRIES: u64 = 32 << 20;
const MAX_GT_ENTRIES: u32 = 512;
const DEFAULT_GRAIN_SECTORS: u64 = 128;
/// Where an embedded descriptor that we write lies, in sectors.
const DESCRIPTOR_SECTOR: u64 = 1;
/// Its size in sectors.
pub(crate) const DESCRIPTOR_SECTORS: u64 = 20;
/// The largest embedded descriptor that is read, in bytes.
const MAX_DESCRIPTOR: u64 = (1 << 20) - 1;

/// A grain of the virtual disk: its offset divided by the grain size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Grain(pub u64);

/// A place in the extent's file, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostSector(pub u32);

impl HostSector {
    /// In bytes.
    pub(crate) const fn bytes(self) -> u64 {
        self.0 as u64 * SECTOR
    }
}

/// What a grain table says about a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The parent decides, or it reads as zeroes.
    Unallocated,
    /// Reads as zeroes and hides the parent.
    Zero,
    /// Lies there.
    Data(HostSector),
}

impl Entry {
    /// The raw value of a zeroed grain.
    pub(crate) const ZERO: u32 = 1;

    /// Reads a table's entry; 1 means zeroes only in images that declare so.
    pub(crate) const fn decode(raw: u32, zeroed_grains: bool) -> Self {
        match raw {
            0 => Self::Unallocated,
            Self::ZERO if zeroed_grains => Self::Zero,
            sector => Self::Data(HostSector(sector)),
        }
    }

    /// Whether it tells where data is.
    pub(crate) const fn is_data(self) -> bool {
        matches!(self, Self::Data(_))
    }
}

/// What the first four bytes of a file say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Magic {
    /// A hosted sparse extent.
    HostedSparse,
    /// An ESX copy-on-write extent.
    Cowd,
    /// Something else, a text descriptor perhaps.
    Other,
}

/// Looks at the magic.
pub(crate) fn magic(head: &[u8]) -> Magic {
    match head.first_chunk::<4>() {
        Some(&MAGIC) => Magic::HostedSparse,
        Some(&MAGIC_COWD) => Magic::Cowd,
        _ => Magic::Other,
    }
}

/// The header, as it stands on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub version: u32,
    pub flags: u32,
    /// All offsets and sizes are in sectors.
    pub capacity: u64,
    pub grain: u64,
    pub descriptor_offset: u64,
    pub descriptor_size: u64,
    pub gt_entries: u32,
    pub rgd_offset: u64,
    pub gd_offset: u64,
    pub overhead: u64,
    pub newline_check: [u8; 4],
    pub compression: u16,
}

fn u16_at(bytes: &[u8; HEADER_SIZE], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER_SIZE], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_SIZE], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Header {
    /// Reads the fields; nothing but the magic is checked.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes
            .first_chunk::<HEADER_SIZE>()
            .filter(|bytes| bytes[..4] == MAGIC)
            .ok_or_else(|| Error::new(ErrorKind::WrongFormat, "Image not in VMDK format"))?;
        Ok(Self {
            version: u32_at(bytes, 4),
            flags: u32_at(bytes, 8),
            capacity: u64_at(bytes, 12),
            grain: u64_at(bytes, 20),
            descriptor_offset: u64_at(bytes, 28),
            descriptor_size: u64_at(bytes, 36),
            gt_entries: u32_at(bytes, 44),
            rgd_offset: u64_at(bytes, 48),
            gd_offset: u64_at(bytes, 56),
            overhead: u64_at(bytes, 64),
            newline_check: [bytes[73], bytes[74], bytes[75], bytes[76]],
            compression: u16_at(bytes, 77),
        })
    }

    /// The header's sector.
    pub(crate) fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.capacity.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.grain.to_le_bytes());
        bytes[28..36].copy_from_slice(&self.descriptor_offset.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.descriptor_size.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.gt_entries.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.rgd_offset.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.gd_offset.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.overhead.to_le_bytes());
        bytes[73..77].copy_from_slice(&self.newline_check);
        bytes[77..79].copy_from_slice(&self.compression.to_le_bytes());
        bytes
    }

    /// Whether this is only the envelope of a descriptor.
    pub(crate) const fn is_envelope(&self) -> bool {
        self.capacity == 0 && self.descriptor_offset != 0
    }

    /// Whether the newlines in the header are as they were written: no transfer in text mode damaged the file.
    pub(crate) fn newlines_intact(&self) -> bool {
        self.flags & FLAG_NEWLINE_CHECK == 0 || self.newline_check == NEWLINE_CHECK
    }

    /// Where the embedded descriptor is and how long it may be, in bytes.
    pub(crate) fn descriptor_range(&self) -> Result<(u64, u64)> {
        let offset = self
            .descriptor_offset
            .checked_mul(SECTOR)
            .filter(|offset| *offset > 0);
        let size = self
            .descriptor_size
            .checked_mul(SECTOR)
            .filter(|size| *size > 0);
        match (offset, size) {
            (Some(offset), Some(size)) if offset.checked_add(size).is_some() => {
                Ok((offset, size.min(MAX_DESCRIPTOR - MAX_DESCRIPTOR % SECTOR)))
            }
            _ => Err(Error::invalid("invalid VMDK image descriptor").with_field(
                "descriptorOffset",
                self.descriptor_offset,
                "the sector of the embedded descriptor",
            )),
        }
    }
}

/// Where everything is in a sparse extent: a header whose fields were found possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Virtual size in bytes.
    pub length: u64,
    /// Version of the format.
    pub version: u32,
    /// Bytes in a grain, a power of two.
    pub grain_bytes: u64,
    /// Sectors in a grain.
    pub grain_sectors: u32,
    /// Entries in a grain table.
    pub gt_entries: u32,
    /// Entries in the grain directory.
    pub gd_entries: usize,
    /// Where the grain directory is, in bytes.
    pub gd_offset: u64,
    /// Where the redundant one is, in bytes.
    pub rgd_offset: Option<u64>,
    /// Where grains begin, in sectors.
    pub overhead: u64,
    /// Whether 1 in a grain table means zeroes.
    pub zeroed_grains: bool,
}

impl Geometry {
    /// Checks a header against the limits (section 7) and the length of its file in bytes.
    pub(crate) fn new(header: &Header, file_length: u64, writable: bool) -> Result<Self> {
        if header.version > 3 {
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("Unsupported VMDK version {}", header.version),
            )
            .with_field("version", header.version, "0..=3"));
        }
        if header.flags & (FLAG_COMPRESSED | FLAG_MARKERS) != 0
            || header.compression != 0
            || header.gd_offset == GD_AT_END
        {
            return Err(unsupported_type("streamOptimized"));
        }
        if header.gt_entries > MAX_GT_ENTRIES {
            return Err(Error::invalid("L2 table size too big").with_field(
                "numGTEsPerGT",
                header.gt_entries,
                format!("1..={MAX_GT_ENTRIES}"),
            ));
        }
        if header.gt_entries == 0 || header.grain == 0 {
            return Err(Error::invalid("L1 entry size is invalid").with_field(
                "grainSize",
                header.grain,
                format!("1..={MAX_GRAIN_SECTORS}"),
            ));
        }
        if header.grain > MAX_GRAIN_SECTORS {
            return Err(Error::new(
                ErrorKind::TooBig,
                "Invalid granularity, image may be corrupt",
            )
            .with_field(
                "grainSize",
                header.grain,
                format!("1..={MAX_GRAIN_SECTORS}"),
            ));
        }
        if !header.grain.is_power_of_two() {
            return Err(
                Error::invalid("Invalid granularity, image may be corrupt").with_field(
                    "grainSize",
                    header.grain,
                    "a power of two",
                ),
            );
        }
        let length = header
            .capacity
            .checked_mul(SECTOR)
            .filter(|length| *length <= 1 << 62)
            .ok_or_else(|| {
                Error::new(ErrorKind::TooBig, "Disk size too large").with_field(
                    "capacity",
                    header.capacity,
                    "at most 2^53",
                )
            })?;
        let cover = u64::from(header.gt_entries) * header.grain;
        let gd_entries = header.capacity.div_ceil(cover);
        if gd_entries > MAX_GD_ENTRIES {
            return Err(Error::new(ErrorKind::TooBig, "L1 size too big").with_field(
                "capacity",
                header.capacity,
                format!("{MAX_GD_ENTRIES} grain tables"),
            ));
        }
        let overhead = header.overhead.checked_mul(SECTOR);
        if overhead.is_none_or(|overhead| overhead > file_length) {
            return Err(Error::invalid(format!(
                "File truncated, expecting at least {} bytes",
                u128::from(header.overhead) * u128::from(SECTOR)
            ))
            .with_field(
                "overHead",
                header.overhead,
                format!("0..={}", file_length / SECTOR),
            ));
        }
        let directory = |name: &str, what: &str, sector: u64| {
            sector
                .checked_mul(SECTOR)
                .filter(|at| *at > 0)
                .filter(|at| {
                    at.checked_add(gd_entries * 4)
                        .is_some_and(|end| end <= file_length)
                })
                .ok_or_else(|| {
                    Error::invalid(format!("Could not read l1 {what} from extent")).with_field(
                        name,
                        sector,
                        "a place inside of the file",
                    )
                })
        };
        let redundant = header.flags & FLAG_REDUNDANT != 0 && header.rgd_offset != 0;
        let geometry = Self {
            length,
            version: header.version,
            grain_bytes: header.grain * SECTOR,
            grain_sectors: header.grain as u32,
            gt_entries: header.gt_entries,
            gd_entries: gd_entries as usize,
            gd_offset: directory("gdOffset", "table", header.gd_offset)?,
            rgd_offset: if redundant {
                Some(directory("rgdOffset", "backup table", header.rgd_offset)?)
            } else {
                None
            },
            overhead: header.overhead,
            zeroed_grains: header.flags & FLAG_ZEROED_GRAINS != 0,
        };
        if writable {
            geometry.check_writable()?;
        }
        Ok(geometry)
    }

    /// Whether images of this version may be written.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.version == 3 {
            return Err(Error::invalid("VMDK version 3 must be read only"));
        }
        Ok(())
    }

    /// The grain that holds the guest's `offset`.
    pub(crate) const fn grain(&self, offset: u64) -> Grain {
        Grain(offset / self.grain_bytes)
    }

    /// Where a grain begins on the virtual disk, in bytes.
    pub(crate) const fn guest_offset(&self, grain: Grain) -> u64 {
        grain.0 * self.grain_bytes
    }

    /// Index of the grain table, and of the entry in it.
    pub(crate) const fn table_and_slot(&self, grain: Grain) -> (usize, usize) {
        let entries = self.gt_entries as u64;
        ((grain.0 / entries) as usize, (grain.0 % entries) as usize)
    }

    /// The first grain of a table.
    pub(crate) const fn first_grain(&self, table: usize) -> Grain {
        Grain(table as u64 * self.gt_entries as u64)
    }

    /// How many of a table's entries belong to the disk.
    pub(crate) fn used_entries(&self, table: usize) -> usize {
        let total = self.length.div_ceil(self.grain_bytes);
        total
            .saturating_sub(self.first_grain(table).0)
            .min(u64::from(self.gt_entries)) as usize
    }

    /// Bytes in a grain table.
    pub(crate) const fn table_bytes(&self) -> usize {
        self.gt_entries as usize * 4
    }
}

/// The refusal of a kind of image that QEMU or VMware know and this driver doesn't.
pub(crate) fn unsupported_type(name: &str) -> Error {
    Error::new(
        ErrorKind::NotSupported,
        format!("Unsupported image type '{name}'"),
    )
    .with_field("createType", name, "monolithicSparse, monolithicFlat")
}

/// The layout of a new sparse extent: header, descriptor, redundant directory and tables, primary ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewExtent {
    pub header: Header,
    /// The redundant and the primary directory: their first sector and their content.
    pub directories: [(u64, Vec<u32>); 2],
}

impl NewExtent {
    /// Lays out an extent for a disk of `size` bytes, a multiple of 512.
    pub(crate) fn plan(size: u64, zeroed_grains: bool) -> Result<Self> {
        let too_big = || Error::new(ErrorKind::TooBig, "The image size is too large for VMDK");
        let capacity = size / SECTOR;
        let gt_entries = MAX_GT_ENTRIES;
        let gt_sectors = u64::from(gt_entries) * 4 / SECTOR;
        let tables = capacity.div_ceil(u64::from(gt_entries) * DEFAULT_GRAIN_SECTORS);
        if tables > MAX_GD_ENTRIES {
            return Err(too_big());
        }
        let gd_sectors = (tables * 4).div_ceil(SECTOR);
        let rgd_offset = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS;
        let gd_offset = rgd_offset + gd_sectors + gt_sectors * tables;
        let end = gd_offset + gd_sectors + gt_sectors * tables;
        let overhead = end.next_multiple_of(DEFAULT_GRAIN_SECTORS);
        // Every sector number must fit its entry.
        u32::try_from(overhead).map_err(|_| too_big())?;
        let directory = |at: u64| {
            let first = at + gd_sectors;
            (
                at,
                (0..tables)
                    .map(|table| (first + table * gt_sectors) as u32)
                    .collect(),
            )
        };
        let mut flags = FLAG_NEWLINE_CHECK | FLAG_REDUNDANT;
        if zeroed_grains {
            flags |= FLAG_ZEROED_GRAINS;
        }
        Ok(Self {
            header: Header {
                version: if zeroed_grains { 2 } else { 1 },
                flags,
                capacity,
                grain: DEFAULT_GRAIN_SECTORS,
                descriptor_offset: DESCRIPTOR_SECTOR,
                descriptor_size: DESCRIPTOR_SECTORS,
                gt_entries,
                rgd_offset,
                gd_offset,
                overhead,
                newline_check: NEWLINE_CHECK,
                compression: 0,
            },
            directories: [directory(rgd_offset), directory(gd_offset)],
        })
    }
}

/// The parts of an extent's file that hold metadata, as merged ranges of sectors. A grain that an image claims to have
/// there would let a guest write into the tables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reserved(Vec<(u64, u64)>);

impl Reserved {
    /// From ranges of sectors (start, length) in any order.
    pub(crate) fn new(mut ranges: Vec<(u64, u64)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (start, len) in ranges {
            let end = start.saturating_add(len);
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        merged.shrink_to_fit();
        Self(merged)
    }

    /// Whether any of `len` sectors from `start` holds metadata.
    pub(crate) fn overlaps(&self, start: u64, len: u64) -> bool {
        let after = self.0.partition_point(|range| range.1 <= start);
        self.0
            .get(after)
            .is_some_and(|range| range.0 < start.saturating_add(len))
    }

    /// The end of the last range, in sectors.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |range| range.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_64_mib_image_is_laid_out_as_qemu_does_it() {
        let plan = NewExtent::plan(64 << 20, false).unwrap();
        assert_eq!((plan.header.rgd_offset, plan.header.gd_offset), (21, 30));
        assert_eq!(plan.header.overhead, 128);
        assert_eq!(plan.directories[0].1, [22, 26]);
        assert_eq!(plan.directories[1].1, [31, 35]);
        assert_eq!((plan.header.version, plan.header.flags), (1, 3));
    }

    #[test]
    fn a_header_survives_encoding() {
        let header = NewExtent::plan(3 << 30, true).unwrap().header;
        assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        assert_eq!((header.version, header.flags), (2, 7));
    }

    #[test]
    fn impossible_headers_are_refused_by_field() {
        let good = NewExtent::plan(64 << 20, false).unwrap().header;
        let file = good.overhead * SECTOR;
        assert!(Geometry::new(&good, file, true).is_ok());
        let refused = |change: &dyn Fn(&mut Header)| {
            let mut bad = good;
            change(&mut bad);
            Geometry::new(&bad, file, true).unwrap_err().reason()
        };
        assert_eq!(refused(&|h| h.version = 4), "Unsupported VMDK version 4");
        assert_eq!(
            refused(&|h| h.version = 3),
            "VMDK version 3 must be read only"
        );
        assert_eq!(refused(&|h| h.gt_entries = 513), "L2 table size too big");
        assert_eq!(refused(&|h| h.gt_entries = 0), "L1 entry size is invalid");
        assert_eq!(refused(&|h| h.grain = 0), "L1 entry size is invalid");
        for grain in [3, 0x20_0001, u64::MAX] {
            let text = refused(&|h| h.grain = grain);
            assert_eq!(text, "Invalid granularity, image may be corrupt");
        }
        assert_eq!(refused(&|h| h.capacity = u64::MAX), "Disk size too large");
        assert_eq!(refused(&|h| h.capacity = 1 << 50), "L1 size too big");
        assert_eq!(
            refused(&|h| h.overhead = 129),
            "File truncated, expecting at least 66048 bytes"
        );
        assert!(refused(&|h| h.overhead = u64::MAX).starts_with("File truncated"));
        for offset in [0, 128, u64::MAX - 1] {
            assert_eq!(
                refused(&|h| h.gd_offset = offset),
                "Could not read l1 table from extent"
            );
        }
        assert_eq!(
            refused(&|h| h.rgd_offset = 1 << 40),
            "Could not read l1 backup table from extent"
        );
        assert_eq!(
            refused(&|h| h.flags |= 1 << 16),
            "Unsupported image type 'streamOptimized'"
        );
        assert_eq!(
            refused(&|h| h.gd_offset = u64::MAX),
            "Unsupported image type 'streamOptimized'"
        );
    }

    #[test]
    fn reserved_ranges_are_merged_and_found() {
        let reserved = Reserved::new(vec![(30, 9), (0, 1), (1, 20), (50, 1)]);
        assert_eq!(reserved, Reserved(vec![(0, 21), (30, 39), (50, 51)]));
        assert!(reserved.overlaps(20, 1) && reserved.overlaps(0, 1 << 40));
        assert!(!reserved.overlaps(21, 9) && reserved.overlaps(21, 10));
        assert!(!reserved.overlaps(51, u64::MAX) && reserved.end() == 51);
    }
}
