//! What the entries of one L2 table say: pure functions over its bytes, which run on the environment's CPU workers.
//! No I/O, and no knowledge of the rest of the image beyond its [`Shape`].

use block_core::image::{CheckReport, Severity};

use super::counts::Bits;
use crate::layout::{
    Header, Incompatible,
    entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO, be64s},
};

/// How this image's tables are laid out, and what its entries are held against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub cluster_bits: u32,
    /// Entries of 16 bytes with subclusters.
    pub extended: bool,
    /// Version 3: standard entries have a zero flag (without extended L2).
    pub zero_flag: bool,
    /// Guest data is in another file, at the guest's own offsets.
    pub data_file: bool,
    pub file_len: u64,
    /// What can be repaired in an entry is.
    pub repair: bool,
}

impl Shape {
    pub fn new(header: &Header, file_len: u64, repair: bool) -> Self {
        let extended = header.incompatible.contains(Incompatible::EXTENDED_L2);
        Self {
            cluster_bits: header.cluster_bits,
            extended,
            zero_flag: header.version >= 3 && !extended,
            data_file: header.incompatible.contains(Incompatible::DATA_FILE),
            file_len,
            repair,
        }
    }

    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    pub const fn entry_size(self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(self) -> u64 {
        self.cluster_size() / self.entry_size() as u64
    }

    /// Bytes of the disk under one L2 table.
    pub const fn coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    pub const fn is_aligned(self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }

    /// Whether a region ends a cluster or more beyond the end of the file: what can't be there.
    pub const fn is_outside(self, offset: u64, len: u64) -> bool {
        offset.saturating_add(len) >= self.file_len.saturating_add(self.cluster_size())
    }

    /// The guest offset of an entry.
    pub const fn guest(self, table: Table, index: u64) -> u64 {
        table
            .l1_index
            .saturating_mul(self.coverage())
            .saturating_add(index << self.cluster_bits)
    }

    /// Descriptor and bitmap of each entry; the bitmap is 0 where there is none.
    pub fn entries(self, table: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
        let extended = self.extended;
        table.chunks_exact(self.entry_size()).map(move |entry| {
            let mut words = be64s(entry);
            let descriptor = words.next().unwrap_or(0);
            let bitmap = if extended { words.next() } else { None };
            (descriptor, bitmap.unwrap_or(0))
        })
    }
}

/// An L2 table and the first L1 entry that leads to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    pub offset: u64,
    pub l1_index: u64,
}

/// Clusters in a row that are referenced equally often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub first: u64,
    pub clusters: u64,
    pub times: u64,
}

/// An entry to be replaced.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub index: usize,
    pub descriptor: u64,
    pub bitmap: u64,
}

/// What one table references, and what is wrong with it.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub runs: Vec<Run>,
    /// Clusters beyond the end of the file that are referenced.
    pub past_end: Vec<Run>,
    /// Findings and counts; the statistics are of one reference to the table.
    pub report: CheckReport,
    pub changes: Vec<Change>,
    /// A standard entry with data isn't flagged as the only one: the COPIED flags need a look.
    pub unflagged: bool,
}

fn push(runs: &mut Vec<Run>, first: u64, clusters: u64) {
    if let Some(last) = runs.last_mut() {
        if last.times == 1 && last.first + last.clusters == first {
            last.clusters += clusters;
            return;
        }
        if last.first == first && last.clusters == clusters {
            last.times += 1;
            return;
        }
    }
    runs.push(Run {
        first,
        clusters,
        times: 1,
    });
}

/// The text for a region that can't be there.
pub(super) fn outside(offset: u64, len: u64) -> String {
    format!(
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
         offset {offset:#x} size {len:#x}"
    )
}

impl Scan {
    fn corruption(&mut self, repaired: bool, message: impl Into<String>) {
        self.report.add(Severity::Corruption, repaired, message);
    }

    /// Counts a region that an entry refers to.
    fn count(&mut self, shape: Shape, offset: u64, len: u64) {
        let bits = shape.cluster_bits;
        let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
        if shape.is_outside(offset, len) {
            self.corruption(false, outside(offset, len));
            push(&mut self.past_end, first, last - first + 1);
        } else {
            push(&mut self.runs, first, last - first + 1);
        }
    }
}

const fn verb(repaired: bool) -> &'static str {
    if repaired { "Repairing" } else { "ERROR" }
}

/// Offset and length of a compressed run, whatever the bits say.
pub(super) const fn compressed_run(raw: u64, cluster_bits: u32) -> (u64, u64) {
    let offset_bits = 70 - cluster_bits;
    let offset = raw & ((1 << offset_bits) - 1);
    let sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
    (offset, (sectors + 1) * 512 - offset % 512)
}

/// Looks at all entries of a table.
pub(super) fn scan(bytes: &[u8], table: Table, shape: Shape) -> Scan {
    let mut scan = Scan::default();
    let mut expected_next = 0;
    for (index, (raw, bitmap)) in shape.entries(bytes).enumerate() {
        if raw == 0 && bitmap == 0 {
            continue;
        }
        if raw & COMPRESSED != 0 {
            compressed(&mut scan, shape, index, raw, bitmap);
        } else {
            standard(
                &mut scan,
                shape,
                table,
                index,
                raw,
                bitmap,
                &mut expected_next,
            );
        }
    }
    scan
}

fn compressed(scan: &mut Scan, shape: Shape, index: usize, raw: u64, bitmap: u64) {
    if shape.data_file {
        scan.corruption(
            false,
            format!("ERROR compressed cluster {index} with data file, entry={raw:#x}"),
        );
        return;
    }
    let (offset, len) = compressed_run(raw, shape.cluster_bits);
    let mut entry = Change {
        index,
        descriptor: raw,
        bitmap,
    };
    if raw & COPIED != 0 {
        // Readers don't look at the flag, so nothing that the guest sees changes with it.
        let fix = shape.repair && bitmap == 0;
        scan.corruption(
            fix,
            format!(
                "{}: coffset={offset:#x}: copied flag must never be set for compressed clusters",
                verb(fix)
            ),
        );
        entry.descriptor &= !COPIED;
    }
    if bitmap != 0 {
        // With the copied flag it may as well be an ordinary cluster with one wrong bit.
        let fix = shape.repair && raw & COPIED == 0;
        scan.corruption(
            fix,
            format!(
                "{} compressed cluster {index} with non-zero subcluster allocation bitmap, entry={raw:#x}",
                verb(fix)
            ),
        );
        entry.bitmap = 0;
    }
    if shape.repair
        && (entry.descriptor, entry.bitmap) != (raw, bitmap)
        && (bitmap == 0 || raw & COPIED == 0)
    {
        scan.changes.push(entry);
    }
    scan.report.allocated_clusters += 1;
    scan.report.compressed_clusters += 1;
    // Compressed clusters are fragmented by nature.
    scan.report.fragmented_clusters += 1;
    scan.count(shape, offset, len);
}

fn standard(
    scan: &mut Scan,
    shape: Shape,
    table: Table,
    index: usize,
    raw: u64,
    bitmap: u64,
    expected_next: &mut u64,
) {
    let cluster_size = shape.cluster_size();
    let mut entry = Change {
        index,
        descriptor: raw,
        bitmap,
    };
    let known = OFFSET_MASK | COPIED | if shape.zero_flag { ZERO } else { 0 };
    if raw & !known != 0 {
        // What is reserved has no meaning to readers; but a zero flag in version 2 is an error to them.
        let fix = shape.repair && (shape.zero_flag || shape.extended || raw & ZERO == 0);
        scan.corruption(
            fix,
            format!(
                "{} found l2 entry with reserved bits set: {raw:x}",
                verb(fix)
            ),
        );
        if fix {
            entry.descriptor &= known;
        }
    }
    let offset = raw & OFFSET_MASK;
    let (allocated, zeroes) = (bitmap as u32, (bitmap >> 32) as u32);
    if offset == 0 && !(shape.data_file && raw & COPIED != 0) {
        if allocated != 0 {
            scan.corruption(
                false,
                "ERROR: Unallocated cluster has non-zero subcluster allocation map",
            );
        }
        if entry.descriptor != raw {
            scan.changes.push(entry);
        }
        return;
    }
    if allocated & zeroes != 0 {
        scan.corruption(
            false,
            format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ),
        );
    }
    if !shape.is_aligned(offset) {
        let holds_data = if shape.extended {
            allocated != 0
        } else {
            raw & ZERO == 0 || !shape.zero_flag
        };
        let guest = shape.guest(table, index as u64);
        let known_place = shape.data_file && shape.repair;
        if !holds_data {
            scan.corruption(
                shape.repair,
                format!(
                    "{} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
                    verb(shape.repair)
                ),
            );
            if shape.repair {
                // It holds no data: the reservation is given up.
                entry.descriptor &= !(OFFSET_MASK | COPIED);
                scan.changes.push(entry);
                return;
            }
        } else {
            scan.corruption(
                known_place,
                format!(
                    "{} offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.",
                    verb(known_place)
                ),
            );
            if known_place {
                entry.descriptor = entry.descriptor & !OFFSET_MASK | guest | COPIED;
            }
        }
    } else if shape.data_file && offset != shape.guest(table, index as u64) {
        // There is only one place where its data can be.
        let guest = shape.guest(table, index as u64);
        scan.corruption(
            shape.repair,
            format!(
                "{} offset={offset:x}: External data file host cluster offset does not match guest cluster \
                 offset: {guest:#x}",
                verb(shape.repair)
            ),
        );
        if shape.repair {
            entry.descriptor = entry.descriptor & !OFFSET_MASK | guest | COPIED;
        }
    }
    if (entry.descriptor, entry.bitmap) != (raw, bitmap) {
        scan.changes.push(entry);
    }
    scan.unflagged |= raw & COPIED == 0;
    scan.report.allocated_clusters += 1;
    if *expected_next != 0 && offset != *expected_next {
        scan.report.fragmented_clusters += 1;
    }
    *expected_next = offset + cluster_size;
    if !shape.data_file {
        scan.count(shape, offset, cluster_size);
    }
}

/// The entries whose COPIED flag isn't what `unique`, the clusters with a refcount of exactly 1, asks for. Entries that
/// point beyond the `known` clusters are among them: the caller looks.
pub(super) fn doubtful_flags(
    bytes: &[u8],
    shape: Shape,
    unique: &Bits,
    known: u64,
) -> Vec<(usize, u64)> {
    let mut doubtful = Vec::new();
    for (index, (raw, _)) in shape.entries(bytes).enumerate() {
        let offset = raw & OFFSET_MASK;
        if offset == 0 || raw & COMPRESSED != 0 {
            continue;
        }
        let cluster = offset >> shape.cluster_bits;
        let single = shape.data_file || unique.contains(cluster);
        if (!shape.data_file && cluster >= known) || single != (raw & COPIED != 0) {
            doubtful.push((index, raw));
        }
    }
    doubtful
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        cluster_bits: 16,
        extended: true,
        zero_flag: false,
        data_file: false,
        file_len: 1 << 30,
        repair: false,
    };
    const TABLE: Table = Table {
        offset: 0,
        l1_index: 0,
    };

    fn bytes(entries: &[(u64, u64)]) -> Vec<u8> {
        entries
            .iter()
            .flat_map(|(raw, bitmap)| [raw.to_be_bytes(), bitmap.to_be_bytes()].concat())
            .collect()
    }

    #[test]
    fn neighbours_become_one_run() {
        let c = 1 << 16;
        let table = bytes(&[
            (COPIED | (4 * c), 0xffff_ffff),
            (COPIED | (5 * c), 0xffff_ffff),
            (0, 0xffff_ffff_0000_0000),
            (COMPRESSED | (9 * c), 0),
            (COMPRESSED | (9 * c + 700), 0),
        ]);
        let scan = scan(&table, TABLE, SHAPE);
        let run = |first, clusters, times| Run {
            first,
            clusters,
            times,
        };
        assert_eq!(scan.runs, [run(4, 2, 1), run(9, 1, 2)]);
        assert_eq!(scan.report.corruptions, 0);
        assert_eq!(scan.report.allocated_clusters, 4);
    }

    #[test]
    fn every_impossible_bitmap_is_found() {
        let c = 1 << 16;
        for (raw, bitmap) in [
            (COPIED | (4 * c), 0x1_0000_0001),
            (0, 1),
            (COMPRESSED | (9 * c), 1 << 32),
        ] {
            assert_eq!(
                scan(&bytes(&[(raw, bitmap)]), TABLE, SHAPE)
                    .report
                    .corruptions,
                1
            );
        }
    }

    #[test]
    fn a_data_file_asks_for_the_guests_offset() {
        let shape = Shape {
            data_file: true,
            repair: true,
            ..SHAPE
        };
        let table = Table {
            offset: 0,
            l1_index: 1,
        };
        let right = shape.coverage();
        let found = scan(&bytes(&[(COPIED | (4 << 16), 1)]), table, shape);
        assert_eq!(found.report.corruptions_fixed, 1);
        assert_eq!(found.changes[0].descriptor, COPIED | right);
        assert!(found.runs.is_empty());
        let found = scan(&bytes(&[(COPIED | right, 1)]), table, shape);
        assert!(found.changes.is_empty() && found.report.is_clean());
    }
}
