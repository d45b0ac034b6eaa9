//! Clusters with two owners that must not share: each gets its own.

use super::*;

/// Points the entry of a guest cluster to a place in the file.
fn alias(image: &Image, cluster: u64, host: u64) {
    image.put64(l2(image) + 8 * cluster, host | COPIED);
}

pub const ALIASES: &[Broken] = &[
    (
        "one compressed piece for two guest clusters",
        SAMPLE,
        |i| i.put64(l2(i) + 8 * 33, i.get64(l2(i) + 8 * 32)),
        "compressed clusters overlap in cluster 13: compressed data at guest offset 0x200000, compressed data \
         at guest offset 0x210000",
        true,
    ),
    (
        "compressed cluster that reaches over its neighbour",
        SAMPLE,
        |i| i.put64(l2(i) + 8 * 32, i.get64(l2(i) + 8 * 32) + (2 << 54)),
        "compressed clusters overlap in cluster 13",
        true,
    ),
    (
        "a snapshot's compressed piece for another guest cluster",
        SNAPSHOTS,
        |i| {
            // Of the active table alone: the snapshots have one of their own.
            let piece = i.get64(l2(i) + 8 * 32);
            i.put64(l2(i) + 8 * 40, piece);
            let (at, block) = (piece & 0xffff_ffff_ffff, i.get64(i.get64(48)));
            let slot = block + at / C * 2;
            let count = (i.get64(slot) >> 48) as u16;
            i.put(slot, &(count + 1).to_be_bytes());
        },
        "compressed data at guest offset 0x200000, compressed data at guest offset 0x280000",
        true,
    ),
    (
        "two guest clusters in one place",
        SAMPLE,
        |i| alias(i, 1, 5 * C),
        "doubly used by data at guest offset 0x0, data at guest offset 0x10000",
        true,
    ),
    (
        "three guest clusters in one place",
        SAMPLE,
        |i| {
            alias(i, 1, 5 * C);
            alias(i, 40, 5 * C);
        },
        "data at guest offset 0x280000",
        true,
    ),
    (
        "guest cluster in its L2 table",
        SAMPLE,
        |i| alias(i, 1, l2(i)),
        "doubly used by the L2 table of L1 entry 0, data at guest offset 0x10000",
        true,
    ),
    (
        "guest cluster in the L1 table",
        SAMPLE,
        |i| alias(i, 1, l1(i)),
        "doubly used by the active L1 table, data at guest offset 0x10000",
        true,
    ),
    (
        "guest cluster in the refcount table",
        SAMPLE,
        |i| alias(i, 1, C),
        "doubly used by the refcount table, data at guest offset 0x10000",
        true,
    ),
    (
        "guest cluster in a refcount block",
        SAMPLE,
        |i| alias(i, 1, 2 * C),
        "doubly used by the refcount block, data at guest offset 0x10000",
        true,
    ),
    (
        "guest cluster among compressed ones",
        SAMPLE,
        |i| alias(i, 1, 13 * C),
        "compressed data at guest offset 0x200000",
        true,
    ),
    (
        "compressed cluster in an L2 table",
        SAMPLE,
        |i| i.put64(l2(i) + 8 * 50, COMPRESSED | (l2(i) + 1000)),
        "doubly used by the L2 table of L1 entry 0, compressed data at guest offset 0x320000",
        true,
    ),
    (
        "two L2 tables in one place",
        SAMPLE,
        |i| {
            i.put64(24, 1 << 30);
            put32(i, 36, 2);
            i.put64(l1(i) + 8, l2(i) | COPIED);
        },
        "doubly used by the L2 table of L1 entry 0, the L2 table of L1 entry 1",
        true,
    ),
    (
        "guest cluster in a snapshot's data elsewhere",
        SNAPSHOTS,
        |i| alias(i, 16, i.get64(l2_of(i, i.get64(table(i)))) & MASK),
        "doubly used by data at guest offset 0x0, data at guest offset 0x100000",
        true,
    ),
    (
        "guest cluster in the snapshot table",
        SNAPSHOTS,
        |i| alias(i, 16, table(i)),
        "doubly used by the snapshot table, data at guest offset 0x100000",
        true,
    ),
    (
        "guest cluster in a snapshot's L1 table",
        SNAPSHOTS,
        |i| alias(i, 16, i.get64(table(i))),
        "doubly used by the inactive L1 table, data at guest offset 0x100000",
        true,
    ),
    (
        "guest cluster in a snapshot's L2 table",
        SNAPSHOTS,
        |i| alias(i, 16, l2_of(i, i.get64(table(i)))),
        "doubly used by the L2 table of L1 entry 0, data at guest offset 0x100000",
        true,
    ),
    (
        "guest cluster in the bitmap directory",
        BITMAPS,
        |i| alias(i, 0, directory(i)),
        "doubly used by the bitmap directory, data at guest offset 0x0",
        true,
    ),
    (
        "guest cluster in a bitmap table",
        BITMAPS,
        |i| alias(i, 0, bitmap_table(i)),
        "doubly used by the bitmap table, data at guest offset 0x0",
        true,
    ),
    (
        "guest cluster in a bitmap's data",
        BITMAPS,
        |i| alias(i, 0, i.get64(bitmap_table(i))),
        "doubly used by the bitmap data, data at guest offset 0x0",
        true,
    ),
    (
        "two guest clusters with subclusters in one place",
        EXTENDED,
        |i| i.put64(l2(i) + 16, i.get64(l2(i))),
        "doubly used by data at guest offset 0x0, data at guest offset 0x10000",
        true,
    ),
];
