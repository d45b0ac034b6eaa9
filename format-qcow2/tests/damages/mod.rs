//! A good image and what can be wrong with it: one entry for each kind of damage, with what a check says of it and
//! what a repair leaves.
#![allow(dead_code, clippy::unwrap_used)]

use crate::offline::{Image, Lab};

pub const C: u64 = 65536;
pub const COPIED: u64 = 1 << 63;
/// Where things are in the image of [`sample`].
pub const REFTABLE: u64 = C;
pub const REFBLOCK: u64 = 2 * C;
pub const L1: u64 = 3 * C;
pub const L2: u64 = 4 * C;
pub const END: u64 = 21 * C;

/// An image with every kind of cluster: 16 normal (two of them zero with a reservation, one discarded), two
/// compressed ones in one host cluster.
pub fn sample(lab: &Lab) -> Image {
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "sample.qcow2", "4M"]);
    lab.qemu_io(
        "sample.qcow2",
        &[
            "write -P 0x5a 0 1M",
            "write -z 256k 128k",
            "discard 512k 64k",
            "write -P 1 -c 2M 64k",
            "write -P 2 -c 2112k 64k",
        ],
    );
    let image = Image::load(&lab.path("sample.qcow2"));
    assert_eq!(image.data().len() as u64, END);
    assert_eq!(image.get64(L1), L2 | COPIED);
    assert_eq!(image.get64(L2), (5 * C) | COPIED);
    image
}

pub fn set_refcount(image: &Image, cluster: u64, value: u16) {
    image.put(REFBLOCK + 2 * cluster, &value.to_be_bytes());
}

/// What is done to the sample.
pub struct Damage {
    pub name: &'static str,
    pub apply: fn(&Image),
    /// The report is the same as qemu-img's, count for count.
    pub same_counts: bool,
    /// Exit status of a check.
    pub status: i32,
    /// Exit status that a repair of leaks, and one of everything, leave.
    pub after: (i32, i32),
    /// A part of the text of the first finding.
    pub text: &'static str,
}

pub const DAMAGES: &[Damage] = &[
    Damage {
        name: "nothing",
        apply: |_| {},
        same_counts: true,
        status: 0,
        after: (0, 0),
        text: "",
    },
    Damage {
        name: "refcount of an L2 table too high",
        apply: |image| set_refcount(image, 4, 5),
        same_counts: true,
        status: 2,
        after: (0, 0),
        text: "Leaked cluster 4 refcount=5 reference=1",
    },
    Damage {
        name: "refcount of data too high",
        apply: |image| set_refcount(image, 7, 2),
        same_counts: true,
        status: 2,
        after: (0, 0),
        text: "Leaked cluster 7 refcount=2 reference=1",
    },
    Damage {
        name: "leaked cluster",
        apply: |image| image.put64(L2 + 8, 0),
        same_counts: true,
        status: 3,
        after: (0, 0),
        text: "Leaked cluster 6 refcount=1 reference=0",
    },
    Damage {
        name: "refcount of data zero",
        apply: |image| set_refcount(image, 5, 0),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR cluster 5 refcount=0 reference=1",
    },
    Damage {
        name: "refcount of a compressed cluster too low",
        apply: |image| set_refcount(image, 13, 1),
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR cluster 13 refcount=1 reference=2",
    },
    Damage {
        name: "refcount of the refcount block zero",
        apply: |image| set_refcount(image, 2, 0),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR cluster 2 refcount=0 reference=1",
    },
    Damage {
        name: "refcount of the refcount block too high",
        apply: |image| set_refcount(image, 2, 2),
        same_counts: true,
        status: 3,
        after: (0, 0),
        text: "Leaked cluster 2 refcount=2 reference=1",
    },
    Damage {
        name: "refcount of a cluster behind the end",
        apply: |image| set_refcount(image, 48, 1),
        same_counts: true,
        status: 0,
        after: (0, 0),
        text: "",
    },
    Damage {
        name: "data without the copied flag",
        apply: |image| image.put64(L2, 5 * C),
        same_counts: true,
        status: 2,
        after: (0, 0),
        text: "ERROR OFLAG_COPIED data cluster: l2_entry=50000 refcount=1",
    },
    Damage {
        name: "L2 table without the copied flag",
        apply: |image| image.put64(L1, L2),
        same_counts: true,
        status: 2,
        after: (0, 0),
        text: "ERROR OFLAG_COPIED L2 cluster: l1_index=0 l1_entry=40000 refcount=1",
    },
    Damage {
        name: "copied flag on a shared cluster",
        apply: |image| {
            image.put64(L2 + 8, (5 * C) | COPIED);
            set_refcount(image, 5, 2);
            set_refcount(image, 6, 0);
        },
        same_counts: true,
        status: 2,
        after: (0, 0),
        text: "ERROR OFLAG_COPIED data cluster: l2_entry=8000000000050000 refcount=2",
    },
    Damage {
        name: "doubly used cluster",
        apply: |image| image.put64(L2 + 8, (5 * C) | COPIED),
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR cluster 5 refcount=1 reference=2",
    },
    Damage {
        name: "L2 table used twice",
        apply: |image| {
            image.put64(24, 1 << 30);
            image.put(36, &2u32.to_be_bytes());
            image.put64(L1 + 8, L2);
        },
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR cluster 4 refcount=1 reference=2",
    },
    Damage {
        name: "unaligned L2 table",
        apply: |image| image.put64(L1, (L2 + 512) | COPIED),
        // QEMU reads the table from where it can't be, and frees what it doesn't find.
        same_counts: false,
        status: 2,
        after: (2, 2),
        text: "ERROR l2_offset=40200: Table is not cluster aligned; L1 entry corrupted",
    },
    Damage {
        name: "L2 table behind the end",
        apply: |image| image.put64(L1, (1 << 32) | COPIED),
        same_counts: true,
        status: 2,
        after: (2, 2),
        text: "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
               offset 0x100000000 size 0x10000",
    },
    Damage {
        name: "data behind the end",
        apply: |image| image.put64(L2 + 8, ((1 << 32) + 5 * C) | COPIED),
        same_counts: true,
        status: 2,
        after: (2, 2),
        text: "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
               offset 0x100050000 size 0x10000",
    },
    Damage {
        name: "data right behind the end",
        apply: |image| image.put64(L2 + 8, END | COPIED),
        same_counts: true,
        status: 2,
        after: (2, 2),
        text: "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
               offset 0x150000 size 0x10000",
    },
    Damage {
        name: "reserved bits in an L2 entry",
        apply: |image| image.put64(L2 + 8, (6 * C) | COPIED | 2),
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR found l2 entry with reserved bits set: 8000000000060002",
    },
    Damage {
        name: "reserved bits in an L1 entry",
        apply: |image| image.put64(L1, L2 | COPIED | 2),
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR found L1 entry with reserved bits set: 8000000000040002",
    },
    Damage {
        name: "unaligned data",
        apply: |image| image.put64(L2 + 8, (6 * C + 512) | COPIED),
        same_counts: true,
        status: 2,
        after: (2, 2),
        text: "ERROR offset=60200: Data cluster is not properly aligned; L2 entry corrupted.",
    },
    Damage {
        name: "unaligned reservation of a zero cluster",
        apply: |image| image.put64(L2 + 32, (9 * C + 512) | COPIED | 1),
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR offset=90200: Preallocated cluster is not properly aligned; L2 entry corrupted.",
    },
    Damage {
        name: "compressed cluster with the copied flag",
        apply: |image| image.put64(L2 + 256, image.get64(L2 + 256) | COPIED),
        same_counts: true,
        status: 2,
        after: (2, 0),
        text: "ERROR: coffset=0xd0000: copied flag must never be set for compressed clusters",
    },
    Damage {
        name: "unaligned refcount block",
        apply: |image| image.put64(REFTABLE, REFBLOCK + 512),
        // QEMU doesn't look for the image's end without refcounts, and can't repair this.
        same_counts: false,
        status: 1,
        after: (1, 0),
        text: "ERROR refcount block 0 is not cluster aligned; refcount table entry corrupted",
    },
    Damage {
        name: "refcount block outside the image",
        apply: |image| image.put64(REFTABLE, (1 << 32) + REFBLOCK),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR refcount block 0 is outside image",
    },
    Damage {
        name: "refcount block missing",
        apply: |image| image.put64(REFTABLE, 0),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR cluster 0 refcount=0 reference=1",
    },
    Damage {
        name: "reserved bits in the refcount table",
        apply: |image| image.put64(REFTABLE, REFBLOCK + 2),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR refcount table entry 0 has reserved bits set",
    },
    Damage {
        name: "refcount block that is an L2 table",
        apply: |image| image.put64(REFTABLE, L2),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR refcount block 0 refcount=2",
    },
    Damage {
        name: "one refcount block in two entries",
        apply: |image| image.put64(REFTABLE + 8, REFBLOCK),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR refcount block 1 refcount=2",
    },
    Damage {
        name: "data in the refcount block",
        apply: |image| image.put64(L2 + 8, REFBLOCK | COPIED),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR refcount block 0 refcount=2",
    },
    Damage {
        name: "L1 table behind the end",
        apply: |image| image.put64(40, (1 << 32) + L1),
        same_counts: true,
        status: 2,
        after: (2, 2),
        text: "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
               offset 0x100030000 size 0x8",
    },
    Damage {
        name: "refcount table behind the end",
        apply: |image| image.put64(48, (1 << 32) + REFTABLE),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
               offset 0x100010000 size 0x10000",
    },
    Damage {
        name: "no refcount table",
        apply: |image| image.put(56, &0u32.to_be_bytes()),
        same_counts: true,
        status: 2,
        after: (1, 0),
        text: "ERROR cluster 0 refcount=0 reference=1",
    },
    Damage {
        name: "copied flag without an L2 table",
        apply: |image| image.put64(L1, COPIED),
        // QEMU takes the header for the table.
        same_counts: false,
        status: 2,
        after: (2, 2),
        text: "ERROR l2_offset=0: L1 entry without a table has the copied flag; L1 entry corrupted",
    },
    Damage {
        name: "zero flag in an image of version 2",
        apply: |image| image.put(4, &2u32.to_be_bytes()),
        // QEMU calls it clean, and fails to read these clusters.
        same_counts: false,
        status: 2,
        after: (2, 2),
        text: "ERROR found l2 entry with reserved bits set: 8000000000090001",
    },
];

pub fn damaged(lab: &Lab, damage: &Damage) -> Image {
    let image = sample(lab);
    (damage.apply)(&image);
    image
}
