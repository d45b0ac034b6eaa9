//! Damages of the header, its extensions, snapshots, bitmaps, extended L2 entries, data files, and clusters that are used
//! twice: what is done to which image, and what comes of it.
#![allow(dead_code, clippy::unwrap_used)]

use crate::{
    damages::{C, COPIED, sample},
    offline::{Image, Lab},
};

const COMPRESSED: u64 = 1 << 62;
const MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The images, by number.
pub const BASES: &[fn(&Lab) -> Image] =
    &[sample, snapshots, bitmaps, extended, data_file, luks, zstd];
const SAMPLE: usize = 0;
const SNAPSHOTS: usize = 1;
const BITMAPS: usize = 2;
const EXTENDED: usize = 3;
const DATA_FILE: usize = 4;
const LUKS: usize = 5;
const ZSTD: usize = 6;

/// Name, image, damage, field that the refusal names.
pub type Refused = (&'static str, usize, fn(&Image), &'static str);
/// Name, image, damage, a part of what the check says, whether it can be repaired.
pub type Broken = (&'static str, usize, fn(&Image), &'static str, bool);

fn make(lab: &Lab, options: &[&str], steps: &[&str]) -> Image {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(options);
    args.extend(["base.qcow2", "4M"]);
    lab.qemu_img(&args);
    for step in steps {
        match step.strip_prefix("I ") {
            Some(step) => {
                lab.qemu_img(&step.split(' ').collect::<Vec<_>>());
            }
            None => lab.qemu_io("base.qcow2", &[step]),
        }
    }
    Image::load(&lab.path("base.qcow2"))
}

fn snapshots(lab: &Lab) -> Image {
    make(
        lab,
        &[],
        &[
            "write -P 1 0 1M",
            "write -P 9 -c 2M 64k",
            "I snapshot -c one base.qcow2",
            "write -P 2 0 256k",
            "I snapshot -c two base.qcow2",
            "write -P 3 1M 64k",
        ],
    )
}

fn bitmaps(lab: &Lab) -> Image {
    make(
        lab,
        &[],
        &[
            "write -P 1 0 1M",
            "I bitmap --add -g 64k base.qcow2 b0",
            "I bitmap --add -g 4k base.qcow2 b1",
            "write -P 2 1M 1M",
        ],
    )
}

fn extended(lab: &Lab) -> Image {
    make(
        lab,
        &["-o", "extended_l2=on"],
        &[
            "write -P 1 0 1M",
            "write -P 2 1M 2k",
            "write -z 1028k 4k",
            "write -z 2M 64k",
            "write -P 4 -c 3M 64k",
        ],
    )
}

fn data_file(lab: &Lab) -> Image {
    make(
        lab,
        &["-o", "data_file=data.raw"],
        &["write -P 1 0 1M", "write -z 512k 64k"],
    )
}

fn luks(lab: &Lab) -> Image {
    make(
        lab,
        &[
            "--object",
            "secret,id=s,data=letmein",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ],
        &[],
    )
}

fn zstd(lab: &Lab) -> Image {
    make(
        lab,
        &["-o", "compression_type=zstd"],
        &["write -P 3 -c 0 64k"],
    )
}

fn get32(image: &Image, at: u64) -> u32 {
    (image.get64(at) >> 32) as u32
}

fn put32(image: &Image, at: u64, value: u32) {
    image.put(at, &value.to_be_bytes());
}

/// Where the active L1 table is.
fn l1(image: &Image) -> u64 {
    image.get64(40)
}

/// Where the first L2 table of an L1 table is.
fn l2_of(image: &Image, l1: u64) -> u64 {
    image.get64(l1) & MASK
}

fn l2(image: &Image) -> u64 {
    l2_of(image, l1(image))
}

/// Where the snapshot table is.
fn table(image: &Image) -> u64 {
    image.get64(64)
}

/// Where the header extension of a type is.
fn extension(image: &Image, kind: u32) -> u64 {
    let mut at = u64::from(get32(image, 100));
    while get32(image, at) != kind {
        assert_ne!(get32(image, at), 0, "no extension {kind:#x}");
        at += 8 + u64::from(get32(image, at + 4)).next_multiple_of(8);
    }
    at
}

const BITMAPS_EXT: u32 = 0x2385_2875;
const LUKS_EXT: u32 = 0x0537_be77;
const FEATURES_EXT: u32 = 0x6803_f857;

/// Where the bitmap directory is.
fn directory(image: &Image) -> u64 {
    image.get64(extension(image, BITMAPS_EXT) + 24)
}

/// Where the table of the first bitmap is.
fn bitmap_table(image: &Image) -> u64 {
    image.get64(directory(image))
}

fn flip(image: &Image, at: u64, bits: u64) {
    image.put64(at, image.get64(at) ^ bits);
}

/// A snapshot table of one entry with `extra` bytes of extra data.
fn with_extra(image: &Image, extra: u32) {
    let at = table(image);
    let data = image.data();
    let old = &data[at as usize..at as usize + 72];
    let mut entry = old[..40].to_vec();
    entry[36..].copy_from_slice(&extra.to_be_bytes());
    let mut extras = old[40..64].to_vec();
    extras.resize(extra as usize, 0xee);
    entry.extend(extras);
    // "1", "one"
    entry.extend(&old[64..68]);
    entry.resize(entry.len().next_multiple_of(8), 0);
    // The second entry follows.
    let second = &data[at as usize + 72..at as usize + 144];
    entry.extend(second);
    image.put(at, &entry);
}

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

pub const BROKEN: &[Broken] = &[
    // Snapshots.
    (
        "snapshot entry without extra data",
        SNAPSHOTS,
        |i| with_extra(i, 0),
        "snapshot table entry 0 is incomplete",
        true,
    ),
    (
        "snapshot entry with 15 bytes of extra data",
        SNAPSHOTS,
        |i| with_extra(i, 15),
        "snapshot table entry 0 is incomplete",
        true,
    ),
    (
        "snapshot entry with too much extra data",
        SNAPSHOTS,
        |i| with_extra(i, 1025),
        "too much extra metadata in snapshot table entry 0 (1025 > 1024)",
        true,
    ),
    (
        "one snapshot too many",
        SNAPSHOTS,
        |i| put32(i, 60, 3),
        "snapshot table entry 2 is empty",
        true,
    ),
    (
        "snapshot table behind the end",
        SNAPSHOTS,
        |i| i.put64(64, 1 << 40),
        "snapshot table entry 0 lies beyond the end",
        true,
    ),
    (
        "snapshot's L1 table unaligned",
        SNAPSHOTS,
        |i| flip(i, table(i), 512),
        "snapshot 1 (one) l1_offset=",
        false,
    ),
    (
        "snapshot's L1 table behind the end",
        SNAPSHOTS,
        |i| i.put64(table(i), 1 << 40),
        "counting reference for region exceeding the end",
        false,
    ),
    (
        "snapshot's L1 table too large",
        SNAPSHOTS,
        |i| put32(i, table(i) + 8, 5_000_000),
        "snapshot 1 (one) l1_size=0x4c4b40",
        false,
    ),
    (
        "reserved bits in a snapshot's L1 entry",
        SNAPSHOTS,
        |i| flip(i, i.get64(table(i)), 2),
        "found L1 entry with reserved bits set",
        true,
    ),
    (
        "snapshot's L2 table unaligned",
        SNAPSHOTS,
        |i| flip(i, i.get64(table(i)), 512),
        "Table is not cluster aligned",
        false,
    ),
    (
        "snapshot's L2 table behind the end",
        SNAPSHOTS,
        |i| i.put64(i.get64(table(i)), 1 << 40),
        "counting reference for region exceeding the end",
        false,
    ),
    (
        "reserved bits in a snapshot's L2 entry",
        SNAPSHOTS,
        |i| flip(i, l2_of(i, i.get64(table(i))), 4),
        "found l2 entry with reserved bits set",
        true,
    ),
    (
        "refcount of a shared cluster too low",
        SNAPSHOTS,
        |i| {
            let cluster = (i.get64(l2(i) + 8 * 8) & MASK) / C;
            i.put(2 * C + 2 * cluster, &1u16.to_be_bytes());
        },
        "refcount=1 reference=3",
        true,
    ),
    (
        "copied flag on a cluster that a snapshot shares",
        SNAPSHOTS,
        |i| flip(i, l2(i) + 8 * 8, COPIED),
        "OFLAG_COPIED data cluster",
        true,
    ),
    // Bitmaps.
    (
        "two snapshots with one L1 table",
        SNAPSHOTS,
        |i| i.put64(table(i) + 72, i.get64(table(i))),
        "snapshot 'two' has the L1 table of snapshot 'one'",
        true,
    ),
    (
        "snapshot with the active L1 table",
        SNAPSHOTS,
        |i| i.put64(table(i) + 72, l1(i)),
        "inactive L1 table at offset",
        true,
    ),
    (
        "snapshot's L1 table in the cluster of another's",
        SNAPSHOTS,
        |i| {
            i.put64(table(i) + 72, i.get64(table(i)));
            put32(i, table(i) + 80, 2);
        },
        "inactive L1 table at offset",
        true,
    ),
    (
        "active L1 table that is a snapshot's",
        SNAPSHOTS,
        |i| i.put64(40, i.get64(table(i))),
        "inactive L1 table at offset",
        true,
    ),
    (
        "refcount table that is the L2 table",
        SAMPLE,
        |i| i.put64(48, l2(i)),
        "refcount",
        true,
    ),
    (
        "refcount block that is the active L1 table",
        SAMPLE,
        |i| i.put64(C, l1(i)),
        "refcount block 0 refcount=2",
        true,
    ),
    (
        "refcount block that is a snapshot's L1 table",
        SNAPSHOTS,
        |i| i.put64(i.get64(48), i.get64(table(i))),
        "refcount block 0 refcount=2",
        true,
    ),
    (
        "refcount table that is the snapshot table",
        SNAPSHOTS,
        |i| i.put64(48, table(i)),
        "refcount",
        true,
    ),
    (
        "two bitmaps with one table",
        BITMAPS,
        |i| i.put64(directory(i) + 32, bitmap_table(i)),
        "bitmap table at offset",
        true,
    ),
    (
        "two bitmaps with one cluster of data",
        BITMAPS,
        |i| {
            let second = i.get64(directory(i) + 32);
            i.put64(second, i.get64(bitmap_table(i)));
        },
        "bitmap data at offset",
        true,
    ),
    (
        "bitmap table that is the L1 table",
        BITMAPS,
        |i| i.put64(directory(i), l1(i)),
        "bitmap table at offset",
        true,
    ),
    (
        "bits of a bitmap behind the end of the disk",
        BITMAPS,
        |i| {
            let data = i.get64(i.get64(directory(i) + 32)) & MASK;
            i.put(data + 128, &[1]);
        },
        "bits behind the end of the disk are set",
        true,
    ),
    (
        "last bit of a bitmap's data",
        BITMAPS,
        |i| {
            let data = i.get64(bitmap_table(i)) & MASK;
            i.put(data + C - 1, &[0x80]);
        },
        "bitmap 'b0': bits behind the end of the disk are set",
        true,
    ),
    (
        "bitmaps left behind by another program",
        BITMAPS,
        |i| i.put64(88, 0),
        "a program lacking bitmap support",
        true,
    ),
    (
        "bitmap table unaligned",
        BITMAPS,
        |i| flip(i, directory(i), 512),
        "bitmap_table_offset",
        true,
    ),
    (
        "bitmap table nowhere",
        BITMAPS,
        |i| i.put64(directory(i), 0),
        "bitmap_table_offset",
        true,
    ),
    (
        "bitmap table behind the end",
        BITMAPS,
        |i| i.put64(directory(i), 1 << 40),
        "counting reference for region exceeding the end",
        true,
    ),
    (
        "bitmap table of no entries",
        BITMAPS,
        |i| put32(i, directory(i) + 8, 0),
        "bitmap_table_size",
        true,
    ),
    (
        "bitmap table too long",
        BITMAPS,
        |i| put32(i, directory(i) + 8, 2),
        "bitmap_table_size",
        true,
    ),
    (
        "bitmap table longer than any",
        BITMAPS,
        |i| put32(i, directory(i) + 8, 0x0800_0001),
        "bitmap_table_size",
        true,
    ),
    (
        "unknown bitmap flag",
        BITMAPS,
        |i| put32(i, directory(i) + 12, 8),
        "flags 0x8",
        true,
    ),
    (
        "bitmap flag of extra data",
        BITMAPS,
        |i| put32(i, directory(i) + 12, 4),
        "flags 0x4",
        true,
    ),
    (
        "unknown bitmap type",
        BITMAPS,
        |i| i.put(directory(i) + 16, &[2]),
        "type 0x2",
        true,
    ),
    (
        "bitmap granularity of 256",
        BITMAPS,
        |i| i.put(directory(i) + 17, &[8]),
        "granularity_bits",
        true,
    ),
    (
        "bitmap granularity of 4 GiB",
        BITMAPS,
        |i| i.put(directory(i) + 17, &[32]),
        "granularity_bits",
        true,
    ),
    (
        "bitmap without a name",
        BITMAPS,
        |i| i.put(directory(i) + 18, &[0, 0]),
        "bitmap",
        true,
    ),
    (
        "bitmap name behind the directory",
        BITMAPS,
        |i| i.put(directory(i) + 18, &[4, 1]),
        "bitmap",
        true,
    ),
    (
        "bitmap with extra data",
        BITMAPS,
        |i| put32(i, directory(i) + 20, 8),
        "bitmap",
        true,
    ),
    (
        "two bitmaps of one name",
        BITMAPS,
        |i| i.put(directory(i) + 32 + 24, b"b0"),
        "name, must be unique",
        true,
    ),
    (
        "unaligned bitmap data",
        BITMAPS,
        |i| flip(i, bitmap_table(i), 512),
        "isn't where a cluster begins",
        true,
    ),
    (
        "bitmap table entry with offset and bit 0",
        BITMAPS,
        |i| flip(i, bitmap_table(i), 1),
        "bit 0 is set beside an offset",
        true,
    ),
    (
        "reserved bits in a bitmap table entry",
        BITMAPS,
        |i| flip(i, bitmap_table(i), 1 << 60),
        "reserved bits are set",
        true,
    ),
    (
        "bitmap data behind the end",
        BITMAPS,
        |i| i.put64(bitmap_table(i), 1 << 40),
        "counting reference for region exceeding the end",
        true,
    ),
    (
        "bitmap directory of no bytes",
        BITMAPS,
        |i| i.put64(extension(i, BITMAPS_EXT) + 16, 0),
        "bitmap_directory_size is 0",
        true,
    ),
    (
        "bitmap directory cut short",
        BITMAPS,
        |i| i.put64(extension(i, BITMAPS_EXT) + 16, 56),
        "bitmap directory: 1 bitmaps",
        true,
    ),
    (
        "bitmap directory behind the end",
        BITMAPS,
        |i| i.put64(extension(i, BITMAPS_EXT) + 24, 1 << 40),
        "counting reference for region exceeding the end",
        true,
    ),
    (
        "fewer bitmaps than the header says",
        BITMAPS,
        |i| put32(i, extension(i, BITMAPS_EXT) + 8, 3),
        "the header extension says 3",
        true,
    ),
    (
        "more bitmaps than the header says",
        BITMAPS,
        |i| put32(i, extension(i, BITMAPS_EXT) + 8, 1),
        "the header extension says 1",
        true,
    ),
    // Extended L2 entries.
    (
        "subcluster with data and zeroes at once",
        EXTENDED,
        |i| i.put64(l2(i) + 16 * 16 + 8, u64::MAX),
        "Allocated cluster has corrupted subcluster allocation bitmap",
        false,
    ),
    (
        "subcluster without a cluster",
        EXTENDED,
        |i| i.put64(l2(i) + 20 * 16 + 8, 1),
        "Unallocated cluster has non-zero subcluster allocation map",
        false,
    ),
    (
        "compressed cluster with subclusters",
        EXTENDED,
        |i| i.put64(l2(i) + 48 * 16 + 8, 1),
        "compressed cluster 48 with non-zero subcluster allocation bitmap",
        true,
    ),
    (
        "zero flag of an ordinary entry",
        EXTENDED,
        |i| flip(i, l2(i) + 16, 1),
        "found l2 entry with reserved bits set",
        true,
    ),
    (
        "unaligned data with subclusters",
        EXTENDED,
        |i| flip(i, l2(i) + 16, 512),
        "Data cluster is not properly aligned",
        false,
    ),
    (
        "unaligned reservation with subclusters",
        EXTENDED,
        |i| i.put64(l2(i) + 32 * 16, (i.get64(l2(i) + 16) & MASK) + 512),
        "Preallocated cluster is not properly aligned",
        true,
    ),
    // Data file.
    (
        "entry that isn't at the guest's offset in the data file",
        DATA_FILE,
        |i| i.put64(l2(i) + 8, i.get64(l2(i) + 16)),
        "does not match guest cluster offset",
        true,
    ),
    (
        "entry behind the end of the data file",
        DATA_FILE,
        |i| flip(i, l2(i) + 8, 1 << 40),
        "does not match guest cluster offset",
        true,
    ),
    (
        "unaligned entry with a data file",
        DATA_FILE,
        |i| flip(i, l2(i) + 8, 512),
        "Data cluster is not properly aligned",
        true,
    ),
    (
        "entry without the copied flag with a data file",
        DATA_FILE,
        |i| flip(i, l2(i) + 8, COPIED),
        "OFLAG_COPIED data cluster",
        true,
    ),
    (
        "compressed cluster with a data file",
        DATA_FILE,
        |i| i.put64(l2(i) + 8, COMPRESSED | (5 * C)),
        "compressed cluster 1 with data file",
        false,
    ),
    (
        "reserved bits with a data file",
        DATA_FILE,
        |i| flip(i, l2(i) + 8, 2),
        "found l2 entry with reserved bits set",
        true,
    ),
    (
        "unaligned reservation with a data file",
        DATA_FILE,
        |i| flip(i, l2(i) + 8 * 8, 512),
        "Preallocated cluster is not properly aligned",
        true,
    ),
    // LUKS and zstd.
    (
        "LUKS header behind the end",
        LUKS,
        |i| i.put64(extension(i, LUKS_EXT) + 8, 1 << 40),
        "counting reference for region exceeding the end",
        false,
    ),
    (
        "refcount of the LUKS header too low",
        LUKS,
        |i| {
            let cluster = i.get64(extension(i, LUKS_EXT) + 8) / C;
            i.put(2 * C + 2 * cluster, &0u16.to_be_bytes());
        },
        "refcount=0 reference=1",
        true,
    ),
    (
        "compressed cluster behind the end",
        ZSTD,
        |i| i.put64(l2(i), COMPRESSED | (1 << 40)),
        "counting reference for region exceeding the end",
        false,
    ),
];

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
