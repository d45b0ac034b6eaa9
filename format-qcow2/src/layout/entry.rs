//! L1, L2 and refcount table entries: their bits as the specification has them (sections 2 and 3 of the digest), and
//! what they mean. Pure codecs: no I/O, and no judgement about what may be written when.

use std::fmt;

use super::units::{Geometry, HostOffset};

/// Bit 63 of L1 and standard L2 entries: the refcount of what the entry points to is exactly 1.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: the cluster is stored compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of standard L2 entries, version 3: the cluster reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset in L1 and standard L2 entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9 to 63: a block's offset in a refcount table entry.
pub const REFCOUNT_TABLE_MASK: u64 = !0x1ff;
/// Host offsets in entries end here.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;

const SECTOR: u64 = 512;

/// An entry of an L2 table as its table holds it: one word in ordinary images, two in those with extended L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawEntry {
    /// The first word: host offset and flags.
    pub descriptor: u64,
    /// The second word of an extended entry: what each subcluster is. 0 in ordinary images.
    pub bitmap: u64,
}

impl RawEntry {
    /// An entry of an ordinary image.
    pub const fn ordinary(descriptor: u64) -> Self {
        Self {
            descriptor,
            bitmap: 0,
        }
    }

    /// The words that tables hold of the entry, one after the other.
    pub fn words(self, geometry: Geometry) -> impl Iterator<Item = u64> {
        let second = geometry.has_extended_l2().then_some(self.bitmap);
        std::iter::once(self.descriptor).chain(second)
    }

    /// The entries of a table or a part of it. A tail that holds no whole entry is ignored.
    pub fn parse(bytes: &[u8], geometry: Geometry) -> impl ExactSizeIterator<Item = Self> + '_ {
        bytes
            .chunks_exact(geometry.l2_entry_size() as usize)
            .map(|entry| {
                let mut words = be64s(entry);
                Self {
                    descriptor: words.next().unwrap_or(0),
                    bitmap: words.next().unwrap_or(0),
                }
            })
    }
}

/// Why an entry makes no sense. The numbers are what the entry holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryProblem {
    /// The offset isn't where a cluster begins.
    Unaligned(HostOffset),
    /// A zero flag in an image of version 2.
    ZeroInVersion2,
    /// A compressed cluster at an offset that no host offset can be.
    CompressedOffset(HostOffset),
    /// Subclusters that hold data and read as zeroes, or that hold data without a place for it.
    Subclusters(u64),
}

impl fmt::Display for EntryProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unaligned(offset) => write!(f, "offset {offset} unaligned"),
            Self::ZeroInVersion2 => f.write_str("Zero cluster entry found in pre-v3 image"),
            Self::CompressedOffset(offset) => {
                write!(
                    f,
                    "compressed cluster offset {offset} beyond the format's limit"
                )
            }
            Self::Subclusters(bitmap) => {
                write!(f, "Invalid cluster entry found, subclusters {bitmap:#018x}")
            }
        }
    }
}

/// An entry of an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L1Entry {
    /// Where the L2 table is; `None`: everything under this entry is unallocated.
    pub l2: Option<HostOffset>,
    /// The table's refcount is exactly 1: it may be changed in place.
    pub copied: bool,
}

impl L1Entry {
    /// Nothing under this entry.
    pub const UNALLOCATED: Self = Self {
        l2: None,
        copied: false,
    };

    /// Reads an entry. Reserved bits are left to `check`.
    pub fn decode(raw: u64, geometry: Geometry) -> Result<Self, EntryProblem> {
        let offset = HostOffset(raw & OFFSET_MASK);
        if offset.0 == 0 {
            return Ok(Self::UNALLOCATED);
        }
        if !geometry.is_aligned(offset) {
            return Err(EntryProblem::Unaligned(offset));
        }
        Ok(Self {
            l2: Some(offset),
            copied: raw & COPIED != 0,
        })
    }

    /// The entry's bits.
    pub const fn encode(self) -> u64 {
        match self.l2 {
            Some(HostOffset(offset)) => offset | if self.copied { COPIED } else { 0 },
            None => 0,
        }
    }

    /// The reserved bits that are set in `raw`.
    pub const fn reserved_bits(raw: u64) -> u64 {
        raw & !(OFFSET_MASK | COPIED)
    }
}

/// What the 32 subclusters of a cluster are, bit by bit: the second word of an extended L2 entry (digest, section 3.1).
/// Bit 0 is the first subcluster. Those with neither bit set are unallocated; none has both set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subclusters {
    /// They hold data.
    pub allocated: u32,
    /// They read as zeroes.
    pub zero: u32,
}

/// What one subcluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubclusterKind {
    /// The backing file decides; zeroes if there is none.
    Unallocated,
    /// It reads as zeroes.
    Zero,
    /// It holds data.
    Allocated,
}

impl Subclusters {
    /// The backing file decides for all of them.
    pub const UNALLOCATED: Self = Self {
        allocated: 0,
        zero: 0,
    };
    /// All hold data.
    pub const ALLOCATED: Self = Self {
        allocated: u32::MAX,
        zero: 0,
    };
    /// All read as zeroes.
    pub const ZERO: Self = Self {
        allocated: 0,
        zero: u32::MAX,
    };

    /// What the subcluster `index` is, and how many from it on are of that kind.
    pub const fn run(self, index: u32) -> (SubclusterKind, u32) {
        let (allocated, zero) = (self.allocated >> index, self.zero >> index);
        let (kind, others) = if allocated & 1 != 0 {
            (SubclusterKind::Allocated, !allocated)
        } else if zero & 1 != 0 {
            (SubclusterKind::Zero, !zero)
        } else {
            (SubclusterKind::Unallocated, allocated | zero)
        };
        let same = others.trailing_zeros();
        let left = u32::BITS - index;
        (kind, if same < left { same } else { left })
    }

    /// With data in the subclusters of `mask`.
    #[must_use]
    pub const fn with_data(self, mask: u32) -> Self {
        Self {
            allocated: self.allocated | mask,
            zero: self.zero & !mask,
        }
    }

    /// With zeroes in the subclusters of `mask`.
    #[must_use]
    pub const fn with_zeroes(self, mask: u32) -> Self {
        Self {
            allocated: self.allocated & !mask,
            zero: self.zero | mask,
        }
    }
}

/// Where the space of a cluster is, and whether its refcount is exactly 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Where the cluster is.
    pub host: HostOffset,
    /// Its refcount is exactly 1: what is in it may be overwritten.
    pub copied: bool,
}

/// An entry of an L2 table: how a guest cluster is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// The backing file decides; zeroes if there is none.
    Unallocated,
    /// Data at `host`.
    Normal {
        /// Where the cluster is.
        host: HostOffset,
        /// Its refcount is exactly 1: it may be overwritten in place.
        copied: bool,
    },
    /// Reads as zeroes, takes no space.
    ZeroPlain,
    /// Reads as zeroes; `host` is a reservation.
    ZeroAllocated {
        /// Where the reserved cluster is.
        host: HostOffset,
        /// Its refcount is exactly 1: the reservation may be used.
        copied: bool,
    },
    /// Subclusters of several kinds, or space in which none of them holds or hides anything; only with extended entries. What
    /// is the same for all subclusters is one of the other kinds.
    Mixed {
        /// The cluster's space; `None` when no subcluster holds data and none is reserved.
        space: Option<Space>,
        /// What each subcluster is.
        subclusters: Subclusters,
    },
    /// Stored compressed.
    Compressed(CompressedRun),
}

/// Where a compressed cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedRun {
    /// Its first byte, with any alignment.
    pub offset: HostOffset,
    /// An upper bound of its length in bytes; the last of them may belong to the next compressed cluster.
    pub len: u64,
}

impl CompressedRun {
    /// The bits of the entry that the host offset takes: `x` of the digest.
    const fn offset_bits(geometry: Geometry) -> u32 {
        70 - geometry.cluster_bits()
    }

    /// The first host offset at which no compressed cluster may begin.
    pub const fn offset_limit(geometry: Geometry) -> u64 {
        let limit = 1 << Self::offset_bits(geometry);
        if limit < MAX_HOST_OFFSET {
            limit
        } else {
            MAX_HOST_OFFSET
        }
    }

    /// A run of `len` bytes at `offset`; `len` is rounded up as far as the entry's unit asks. `None` when the format
    /// can't express it.
    pub fn new(offset: HostOffset, len: u64, geometry: Geometry) -> Option<Self> {
        if len == 0 || offset.0 >= Self::offset_limit(geometry) {
            return None;
        }
        let sectors = (offset.0 + len - 1) / SECTOR - offset.0 / SECTOR;
        if sectors >= 1 << (geometry.cluster_bits() - 8) {
            return None;
        }
        Some(Self {
            offset,
            len: (sectors + 1) * SECTOR - offset.0 % SECTOR,
        })
    }

    /// The host clusters that the run touches, first and last: each holds one reference for it.
    pub const fn clusters(self, geometry: Geometry) -> (u64, u64) {
        let bits = geometry.cluster_bits();
        (
            self.offset.0 >> bits,
            (self.offset.0 + self.len - 1) >> bits,
        )
    }

    fn decode(raw: u64, geometry: Geometry) -> Result<Self, EntryProblem> {
        let x = Self::offset_bits(geometry);
        let offset = HostOffset(raw & ((1 << x) - 1));
        if offset.0 >= MAX_HOST_OFFSET {
            return Err(EntryProblem::CompressedOffset(offset));
        }
        let sectors = (raw & (COMPRESSED - 1)) >> x;
        Ok(Self {
            offset,
            len: (sectors + 1) * SECTOR - offset.0 % SECTOR,
        })
    }

    const fn encode(self, geometry: Geometry) -> u64 {
        let sectors = (self.offset.0 + self.len - 1) / SECTOR - self.offset.0 / SECTOR;
        COMPRESSED | (sectors << Self::offset_bits(geometry)) | self.offset.0
    }
}

impl L2Entry {
    /// Reads an entry. Reserved bits are left to `check`.
    #[inline]
    pub fn decode(raw: RawEntry, geometry: Geometry) -> Result<Self, EntryProblem> {
        let RawEntry { descriptor, bitmap } = raw;
        if descriptor & COMPRESSED != 0 {
            return CompressedRun::decode(descriptor, geometry).map(Self::Compressed);
        }
        let host = HostOffset(descriptor & OFFSET_MASK);
        if !geometry.is_aligned(host) {
            return Err(EntryProblem::Unaligned(host));
        }
        let copied = descriptor & COPIED != 0;
        // A data file's first cluster is at offset 0.
        let placed = host.0 != 0 || geometry.has_data_file() && copied;
        if geometry.has_extended_l2() {
            return Self::decode_extended(placed.then_some(Space { host, copied }), bitmap);
        }
        if descriptor & ZERO != 0 && !geometry.has_zero_flag() {
            return Err(EntryProblem::ZeroInVersion2);
        }
        Ok(match (placed, descriptor & ZERO != 0) {
            (false, false) => Self::Unallocated,
            (false, true) => Self::ZeroPlain,
            (true, false) => Self::Normal { host, copied },
            (true, true) => Self::ZeroAllocated { host, copied },
        })
    }

    fn decode_extended(space: Option<Space>, bitmap: u64) -> Result<Self, EntryProblem> {
        let subclusters = Subclusters {
            allocated: bitmap as u32,
            zero: (bitmap >> 32) as u32,
        };
        let impossible = if space.is_some() {
            subclusters.allocated & subclusters.zero
        } else {
            subclusters.allocated
        };
        if impossible != 0 {
            return Err(EntryProblem::Subclusters(bitmap));
        }
        Ok(Self::from_parts(space, subclusters))
    }

    /// The entry of a cluster with this space and these subclusters, of which none may hold data without space.
    pub fn from_parts(space: Option<Space>, subclusters: Subclusters) -> Self {
        match (space, subclusters) {
            (None, Subclusters::UNALLOCATED) => Self::Unallocated,
            (None, Subclusters::ZERO) => Self::ZeroPlain,
            (Some(Space { host, copied }), Subclusters::ALLOCATED) => Self::Normal { host, copied },
            (Some(Space { host, copied }), Subclusters::ZERO) => {
                Self::ZeroAllocated { host, copied }
            }
            (space, subclusters) => Self::Mixed { space, subclusters },
        }
    }

    /// The space of a cluster that isn't compressed, if it has any.
    pub const fn space(self) -> Option<Space> {
        match self {
            Self::Normal { host, copied } | Self::ZeroAllocated { host, copied } => {
                Some(Space { host, copied })
            }
            Self::Mixed { space, .. } => space,
            Self::Unallocated | Self::ZeroPlain | Self::Compressed(_) => None,
        }
    }

    /// What the subclusters are, all alike where entries aren't extended; `None` for a compressed cluster.
    pub const fn subclusters(self) -> Option<Subclusters> {
        Some(match self {
            Self::Unallocated => Subclusters::UNALLOCATED,
            Self::Normal { .. } => Subclusters::ALLOCATED,
            Self::ZeroPlain | Self::ZeroAllocated { .. } => Subclusters::ZERO,
            Self::Mixed { subclusters, .. } => subclusters,
            Self::Compressed(_) => return None,
        })
    }

    /// The entry's bits. What only an extended entry can say needs a geometry that has them.
    pub fn encode(self, geometry: Geometry) -> RawEntry {
        if let Self::Compressed(run) = self {
            return RawEntry::ordinary(run.encode(geometry));
        }
        let subclusters = self.subclusters().unwrap_or(Subclusters::UNALLOCATED);
        let place = self.space().map_or(0, |Space { host, copied }| {
            host.0 | if copied { COPIED } else { 0 }
        });
        if geometry.has_extended_l2() {
            let Subclusters { allocated, zero } = subclusters;
            return RawEntry {
                descriptor: place,
                bitmap: u64::from(zero) << 32 | u64::from(allocated),
            };
        }
        debug_assert!(!matches!(self, Self::Mixed { .. }));
        let zero = if subclusters == Subclusters::ZERO {
            ZERO
        } else {
            0
        };
        RawEntry::ordinary(place | zero)
    }

    /// The reserved bits that are set in the descriptor of a standard (not compressed) entry.
    pub const fn reserved_bits(raw: u64, geometry: Geometry) -> u64 {
        if raw & COMPRESSED != 0 {
            return 0;
        }
        let zero = if geometry.has_zero_flag() && !geometry.has_extended_l2() {
            ZERO
        } else {
            0
        };
        raw & !(OFFSET_MASK | COPIED | zero)
    }
}

/// Reads a refcount table entry: where the block is, `None` when all its refcounts are 0.
pub fn decode_refcount_table_entry(
    raw: u64,
    geometry: Geometry,
) -> Result<Option<HostOffset>, EntryProblem> {
    let offset = HostOffset(raw & REFCOUNT_TABLE_MASK);
    if offset.0 == 0 {
        return Ok(None);
    }
    if !geometry.is_aligned(offset) {
        return Err(EntryProblem::Unaligned(offset));
    }
    Ok(Some(offset))
}

/// Big-endian 64-bit numbers, as all tables hold them. A tail of fewer than 8 bytes is ignored.
pub fn be64s(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_be_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(16, 4, 3).unwrap()
    }

    #[test]
    fn the_compressed_entry_of_the_specification_decodes() {
        let entry = L2Entry::decode(RawEntry::ordinary(0x4040_0000_0005_01da), geometry()).unwrap();
        let run = CompressedRun {
            offset: HostOffset(0x501da),
            len: 550,
        };
        assert_eq!(entry, L2Entry::Compressed(run));
        assert_eq!(entry.encode(geometry()).descriptor, 0x4040_0000_0005_01da);
        assert_eq!(
            CompressedRun::new(HostOffset(0x501da), 500, geometry()),
            Some(run)
        );
    }

    #[test]
    fn every_kind_of_entry_survives_encoding() {
        for copied in [false, true] {
            let host = HostOffset(0x50000);
            for entry in [
                L2Entry::Unallocated,
                L2Entry::ZeroPlain,
                L2Entry::Normal { host, copied },
                L2Entry::ZeroAllocated { host, copied },
            ] {
                let raw = entry.encode(geometry());
                assert_eq!(L2Entry::decode(raw, geometry()), Ok(entry));
                assert_eq!(L2Entry::reserved_bits(raw.descriptor, geometry()), 0);
            }
        }
    }

    fn extended() -> Geometry {
        geometry().with_extended_l2().unwrap()
    }

    #[test]
    fn the_extended_entries_of_the_specification_decode() {
        let raw = RawEntry {
            descriptor: 0x8000_0000_0005_0000,
            bitmap: 0x0000_0061_0000_0004,
        };
        let entry = L2Entry::decode(raw, extended()).unwrap();
        let space = Some(Space {
            host: HostOffset(0x50000),
            copied: true,
        });
        let subclusters = Subclusters {
            allocated: 0b100,
            zero: 0b110_0001,
        };
        assert_eq!(entry, L2Entry::Mixed { space, subclusters });
        assert_eq!(entry.encode(extended()), raw);
        assert_eq!(
            L2Entry::ZeroPlain.encode(extended()),
            RawEntry {
                descriptor: 0,
                bitmap: 0xffff_ffff_0000_0000
            }
        );
        let kinds = [
            (0, SubclusterKind::Zero, 1),
            (1, SubclusterKind::Unallocated, 1),
            (2, SubclusterKind::Allocated, 1),
            (3, SubclusterKind::Unallocated, 2),
            (5, SubclusterKind::Zero, 2),
            (6, SubclusterKind::Zero, 1),
            (7, SubclusterKind::Unallocated, 25),
            (31, SubclusterKind::Unallocated, 1),
        ];
        for (index, kind, run) in kinds {
            assert_eq!(subclusters.run(index), (kind, run), "{index}");
        }
        for (all, kind) in [
            (Subclusters::ALLOCATED, SubclusterKind::Allocated),
            (Subclusters::ZERO, SubclusterKind::Zero),
            (Subclusters::UNALLOCATED, SubclusterKind::Unallocated),
        ] {
            assert_eq!((all.run(0), all.run(31)), ((kind, 32), (kind, 1)));
        }
    }

    #[test]
    fn what_all_subclusters_have_in_common_is_an_ordinary_kind() {
        let host = HostOffset(0x50000);
        for (place, bitmap, entry) in [
            (0, 0, L2Entry::Unallocated),
            (0, 0xffff_ffff_0000_0000, L2Entry::ZeroPlain),
            (
                host.0,
                0xffff_ffff,
                L2Entry::Normal {
                    host,
                    copied: false,
                },
            ),
            (
                host.0 | COPIED,
                0xffff_ffff_0000_0000,
                L2Entry::ZeroAllocated { host, copied: true },
            ),
        ] {
            let raw = RawEntry {
                descriptor: place,
                bitmap,
            };
            assert_eq!(L2Entry::decode(raw, extended()), Ok(entry));
            assert_eq!(entry.encode(extended()), raw);
        }
        // The zero flag of ordinary entries is a reserved bit.
        assert_eq!(L2Entry::reserved_bits(ZERO, extended()), ZERO);
    }

    #[test]
    fn impossible_bitmaps_are_problems_unless_the_cluster_is_compressed() {
        for (descriptor, bitmap) in [
            (0x50000, 1 << 32 | 1),
            (0, 1),
            (0, 0xffff_ffff),
            (0x8000_0000_0005_0000, u64::MAX),
        ] {
            assert_eq!(
                L2Entry::decode(RawEntry { descriptor, bitmap }, extended()),
                Err(EntryProblem::Subclusters(bitmap))
            );
        }
        let compressed = RawEntry {
            descriptor: 0x4040_0000_0005_01da,
            bitmap: 1,
        };
        let entry = L2Entry::decode(compressed, extended()).unwrap();
        assert!(matches!(entry, L2Entry::Compressed(_)));
    }

    #[test]
    fn impossible_entries_are_problems() {
        let v2 = Geometry::new(16, 4, 2).unwrap();
        assert_eq!(
            L2Entry::decode(RawEntry::ordinary(1), v2),
            Err(EntryProblem::ZeroInVersion2)
        );
        assert_eq!(
            L2Entry::decode(RawEntry::ordinary(0x50200), geometry()),
            Err(EntryProblem::Unaligned(HostOffset(0x50200)))
        );
        assert!(L1Entry::decode(0x200, geometry()).is_err());
        assert_eq!(L2Entry::reserved_bits(0x50002, geometry()), 2);
    }

    #[test]
    fn compressed_runs_fit_every_cluster_size() {
        for bits in 9..=21 {
            let geometry = Geometry::new(bits, 4, 3).unwrap();
            let size = geometry.cluster_size();
            for offset in [size, size + 511, size * 7 - 1] {
                for len in [1, 2, 511, 512, size - 1] {
                    let run = CompressedRun::new(HostOffset(offset), len, geometry).unwrap();
                    assert!(
                        run.len >= len && run.len < len + 512,
                        "{bits} {offset} {len}"
                    );
                    let entry = L2Entry::Compressed(run);
                    assert_eq!(L2Entry::decode(entry.encode(geometry), geometry), Ok(entry));
                }
            }
            let limit = HostOffset(CompressedRun::offset_limit(geometry));
            assert_eq!(CompressedRun::new(limit, 1, geometry), None);
        }
    }
}
