//! Damages with which an image isn't opened: the refusal names the field.

use super::*;

pub const REFUSED: &[Refused] = &[
    ("magic", SAMPLE, |i| i.put(0, b"QFI\xfa"), "magic"),
    ("version 1", SAMPLE, |i| put32(i, 4, 1), "version"),
    ("version 4", SAMPLE, |i| put32(i, 4, 4), "version"),
    (
        "backing file offset in the second cluster",
        SAMPLE,
        |i| i.put64(8, C + 8),
        "backing_file_offset",
    ),
    (
        "backing file name of 1024 bytes",
        SAMPLE,
        |i| {
            i.put64(8, 1024);
            put32(i, 16, 1024);
        },
        "backing_file_size",
    ),
    (
        "clusters of 256 bytes",
        SAMPLE,
        |i| put32(i, 20, 8),
        "cluster_bits",
    ),
    (
        "clusters of 4 MiB",
        SAMPLE,
        |i| put32(i, 20, 22),
        "cluster_bits",
    ),
    (
        "extended L2 with clusters of 4 KiB",
        EXTENDED,
        |i| put32(i, 20, 12),
        "cluster_bits",
    ),
    (
        "disk larger than its L1 table",
        SAMPLE,
        |i| i.put64(24, 1 << 40),
        "l1_size",
    ),
    (
        "disk larger than any L1 table",
        SAMPLE,
        |i| i.put64(24, 1 << 62),
        "size",
    ),
    (
        "unknown encryption",
        SAMPLE,
        |i| put32(i, 32, 3),
        "crypt_method",
    ),
    (
        "L1 table of more than 32 MiB",
        SAMPLE,
        |i| put32(i, 36, 4_194_305),
        "l1_size",
    ),
    (
        "unaligned L1 table",
        SAMPLE,
        |i| i.put64(40, 3 * C + 512),
        "l1_table_offset",
    ),
    (
        "L1 table behind 2^63",
        SAMPLE,
        |i| i.put64(40, 1 << 63),
        "l1_table_offset",
    ),
    (
        "unaligned refcount table",
        SAMPLE,
        |i| i.put64(48, C + 512),
        "refcount_table_offset",
    ),
    (
        "refcount table of more than 8 MiB",
        SAMPLE,
        |i| put32(i, 56, 129),
        "refcount_table_clusters",
    ),
    (
        "more than 65536 snapshots",
        SNAPSHOTS,
        |i| put32(i, 60, 65537),
        "nb_snapshots",
    ),
    (
        "unaligned snapshot table",
        SNAPSHOTS,
        |i| flip(i, 64, 8),
        "snapshots_offset",
    ),
    (
        "unknown incompatible feature",
        SAMPLE,
        |i| i.put64(72, 1 << 40),
        "incompatible_features",
    ),
    (
        "refcounts of 128 bits",
        SAMPLE,
        |i| put32(i, 96, 7),
        "refcount_order",
    ),
    (
        "header of 96 bytes",
        SAMPLE,
        |i| put32(i, 100, 96),
        "header_length",
    ),
    (
        "header longer than a cluster",
        SAMPLE,
        |i| put32(i, 100, C as u32 + 8),
        "header_length",
    ),
    (
        "compression type without its feature bit",
        SAMPLE,
        |i| i.put(104, &[1]),
        "compression_type",
    ),
    (
        "compression feature bit without a type",
        ZSTD,
        |i| i.put(104, &[0]),
        "compression_type",
    ),
    (
        "unknown compression type",
        ZSTD,
        |i| i.put(104, &[2]),
        "compression_type",
    ),
    (
        "raw data file without a data file",
        SAMPLE,
        |i| i.put64(88, 2),
        "autoclear_features",
    ),
    (
        "header extension behind the cluster",
        SAMPLE,
        |i| put32(i, extension(i, FEATURES_EXT) + 4, 0x10000),
        "header extension 0x6803f857 length",
    ),
    (
        "backing format of 16 bytes",
        SAMPLE,
        |i| {
            let at = extension(i, FEATURES_EXT);
            put32(i, at, 0xe279_2aca);
            put32(i, at + 4, 16);
        },
        "backing format length",
    ),
    (
        "bitmaps extension of 16 bytes",
        BITMAPS,
        |i| put32(i, extension(i, BITMAPS_EXT) + 4, 16),
        "bitmaps extension length",
    ),
    (
        "reserved field of the bitmaps extension",
        BITMAPS,
        |i| put32(i, extension(i, BITMAPS_EXT) + 12, 1),
        "bitmaps extension reserved field",
    ),
    (
        "bitmaps extension without bitmaps",
        BITMAPS,
        |i| put32(i, extension(i, BITMAPS_EXT) + 8, 0),
        "nb_bitmaps",
    ),
    (
        "more than 65535 bitmaps",
        BITMAPS,
        |i| put32(i, extension(i, BITMAPS_EXT) + 8, 65536),
        "nb_bitmaps",
    ),
    (
        "unaligned bitmap directory",
        BITMAPS,
        |i| flip(i, extension(i, BITMAPS_EXT) + 24, 512),
        "bitmap_directory_offset",
    ),
    (
        "bitmap directory too large",
        BITMAPS,
        |i| i.put64(extension(i, BITMAPS_EXT) + 16, 1 << 30),
        "bitmap_directory_size",
    ),
    (
        "LUKS without its header",
        SAMPLE,
        |i| put32(i, 32, 2),
        "crypt_method",
    ),
    (
        "LUKS header without LUKS",
        LUKS,
        |i| put32(i, 32, 0),
        "crypt_method",
    ),
    (
        "LUKS extension of 8 bytes",
        LUKS,
        |i| put32(i, extension(i, LUKS_EXT) + 4, 8),
        "LUKS extension length",
    ),
    (
        "unaligned LUKS header",
        LUKS,
        |i| flip(i, extension(i, LUKS_EXT) + 8, 512),
        "LUKS header offset",
    ),
];
