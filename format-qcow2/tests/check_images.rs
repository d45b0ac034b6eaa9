//! Checks of good and of damaged images, compared with qemu-img, and repairs that qemu-img then calls clean.

mod offline;

use block_core::image::{CheckMode, CheckReport};
use offline::{Event, Image, Lab, assert_same_counts, exit_status};

const C: u64 = 65536;
const COPIED: u64 = 1 << 63;
/// Where things are in the image of [`sample`].
const REFTABLE: u64 = C;
const REFBLOCK: u64 = 2 * C;
const L1: u64 = 3 * C;
const L2: u64 = 4 * C;
const END: u64 = 21 * C;

/// An image with every kind of cluster: 16 normal (two of them zero with a reservation, one discarded), two
/// compressed ones in one host cluster.
fn sample(lab: &Lab) -> Image {
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
    assert_eq!(image.get64(L2), 5 * C | COPIED);
    image
}

fn set_refcount(image: &Image, cluster: u64, value: u16) {
    image.put(REFBLOCK + 2 * cluster, &value.to_be_bytes());
}

/// What is done to the sample.
struct Damage {
    name: &'static str,
    apply: fn(&Image),
    /// The report is the same as qemu-img's, count for count.
    same_counts: bool,
    /// Exit status of a check.
    status: i32,
    /// Exit status that a repair of leaks, and one of everything, leave.
    after: (i32, i32),
    /// A part of the text of the first finding.
    text: &'static str,
}

const DAMAGES: &[Damage] = &[
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
            image.put64(L2 + 8, 5 * C | COPIED);
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
        apply: |image| image.put64(L2 + 8, 5 * C | COPIED),
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
        apply: |image| image.put64(L2 + 8, 6 * C | COPIED | 2),
        same_counts: true,
        status: 2,
        after: (2, 2),
        text: "ERROR found l2 entry with reserved bits set: 8000000000060002",
    },
    Damage {
        name: "reserved bits in an L1 entry",
        apply: |image| image.put64(L1, L2 | COPIED | 2),
        same_counts: true,
        status: 2,
        after: (2, 2),
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
        after: (2, 2),
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

fn damaged(lab: &Lab, damage: &Damage) -> Image {
    let image = sample(lab);
    (damage.apply)(&image);
    image
}

#[test]
fn every_damage_is_classified_as_qemu_img_does() {
    let Some(lab) = Lab::new() else { return };
    for damage in DAMAGES {
        let image = damaged(&lab, damage);
        let before = image.data();
        let report = image.check(CheckMode::ReadOnly).unwrap();
        assert_eq!(
            exit_status(&report),
            damage.status,
            "{}: {report:?}",
            damage.name
        );
        if damage.same_counts {
            image.save(&lab.path("damaged.qcow2"));
            let status = lab.status(&["check", "-f", "qcow2", "damaged.qcow2"]);
            assert_eq!(status, damage.status, "{}", damage.name);
            assert_same_counts(&report, &lab.check("damaged.qcow2"), damage.name);
        }
        let first = report
            .findings
            .first()
            .map_or("", |finding| &finding.message);
        assert!(first.starts_with(damage.text), "{}: {first}", damage.name);
        assert!(
            image.data() == before,
            "{}: a check changed the image",
            damage.name
        );
        assert!(image.log().is_empty());
    }
}

/// Repairs, and looks at the result with both checks.
fn repair(lab: &Lab, damage: &Damage, mode: CheckMode, status: i32) -> CheckReport {
    let image = damaged(lab, damage);
    let report = image.check(mode).unwrap();
    let what = format!("{} {mode:?}", damage.name);
    assert_eq!(exit_status(&report), status, "{what}: {report:?}");
    let again = image.check(CheckMode::ReadOnly).unwrap();
    if status != 1 {
        // The report is about what is there now.
        assert_eq!(
            (again.corruptions, again.leaks, again.check_errors),
            (report.corruptions, report.leaks, report.check_errors),
            "{what}"
        );
    }
    image.save(&lab.path("repaired.qcow2"));
    if status == 0 {
        let theirs = lab.check("repaired.qcow2");
        assert_same_counts(&again, &theirs, &what);
        assert_eq!(
            lab.status(&["check", "-f", "qcow2", "repaired.qcow2"]),
            0,
            "{what}"
        );
    }
    report
}

#[test]
fn repairs_leave_what_qemu_img_calls_clean() {
    let Some(lab) = Lab::new() else { return };
    for damage in DAMAGES {
        repair(&lab, damage, CheckMode::RepairLeaks, damage.after.0);
        let report = repair(&lab, damage, CheckMode::RepairAll, damage.after.1);
        if damage.after.1 == 0 && damage.status != 0 {
            let fixed = report.corruptions_fixed + report.leaks_fixed;
            assert!(fixed > 0, "{}", damage.name);
            assert!(
                report.findings.iter().any(|finding| finding.repaired),
                "{}: {:?}",
                damage.name,
                report.findings
            );
        }
    }
}

#[test]
fn a_repair_counts_what_it_fixed_as_qemu_img_does() {
    let Some(lab) = Lab::new() else { return };
    for name in [
        "doubly used cluster",
        "refcount of data zero",
        "refcount block missing",
    ] {
        let damage = DAMAGES.iter().find(|damage| damage.name == name).unwrap();
        let image = damaged(&lab, damage);
        image.save(&lab.path("damaged.qcow2"));
        let ours = image.check(CheckMode::RepairAll).unwrap();
        let text = lab.qemu_img(&["check", "-r", "all", "--output=json", "damaged.qcow2"]);
        let theirs: serde_json::Value = serde_json::from_str(&text).unwrap();
        let count = |key: &str| {
            theirs
                .get(key)
                .and_then(serde_json::Value::as_u64)
                .unwrap_or(0)
        };
        assert_eq!(ours.corruptions_fixed, count("corruptions-fixed"), "{name}");
        assert_eq!(ours.leaks_fixed, count("leaks-fixed"), "{name}");
    }
}

#[test]
fn a_repair_never_changes_what_the_guest_reads() {
    let Some(lab) = Lab::new() else { return };
    sample(&lab).save(&lab.path("sample.qcow2"));
    for name in [
        "refcount of an L2 table too high",
        "refcount of data zero",
        "refcount block missing",
        "reserved bits in the refcount table",
        "refcount table behind the end",
        "unaligned reservation of a zero cluster",
        "data without the copied flag",
    ] {
        let damage = DAMAGES.iter().find(|damage| damage.name == name).unwrap();
        let image = damaged(&lab, damage);
        image.check(CheckMode::RepairAll).unwrap();
        image.save(&lab.path("repaired.qcow2"));
        lab.qemu_img(&[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "sample.qcow2",
            "repaired.qcow2",
        ]);
    }
}

#[test]
fn clusters_under_an_unreadable_table_are_never_freed() {
    let Some(lab) = Lab::new() else { return };
    for name in [
        "unaligned L2 table",
        "L2 table behind the end",
        "L1 table behind the end",
    ] {
        let damage = DAMAGES.iter().find(|damage| damage.name == name).unwrap();
        for mode in [CheckMode::RepairLeaks, CheckMode::RepairAll] {
            let image = damaged(&lab, damage);
            let report = image.check(mode).unwrap();
            assert!(report.leaks > 0, "{name}");
            assert_eq!(report.leaks_fixed, 0, "{name}");
            // All data is there again once the entry is set right.
            (|image: &Image| {
                image.put64(L1, L2 | COPIED);
                image.put64(40, L1);
            })(&image);
            let again = image.check(CheckMode::ReadOnly).unwrap();
            assert_eq!(exit_status(&again), 0, "{name}: {again:?}");
        }
    }
    // The same, when the refcounts have to be rebuilt at once.
    let image = sample(&lab);
    image.put64(L1, (1 << 32) | COPIED);
    set_refcount(&image, 1, 0);
    let report = image.check(CheckMode::RepairAll).unwrap();
    assert!(report.leaks >= 17, "{report:?}");
    image.put64(L1, L2 | COPIED);
    set_refcount(&image, 13, 2);
    let again = image.check(CheckMode::RepairAll).unwrap();
    assert_eq!(exit_status(&again), 0, "{again:?}");
}

/// A power cut at any moment of a repair leaves an image that is no worse, and that a second repair makes good.
#[test]
fn a_repair_may_be_cut_off_at_any_write() {
    let Some(lab) = Lab::new() else { return };
    // One for each kind of repair.
    let names = [
        "refcount of an L2 table too high",
        "refcount of data zero",
        "L2 table without the copied flag",
        "copied flag on a shared cluster",
        "doubly used cluster",
        "L2 table used twice",
        "unaligned reservation of a zero cluster",
        "data in the refcount block",
    ];
    for damage in DAMAGES.iter().filter(|damage| names.contains(&damage.name)) {
        let image = damaged(&lab, damage);
        let start = image.data();
        image.check(CheckMode::RepairAll).unwrap();
        let log = image.log();
        assert!(
            log.iter().any(|event| matches!(event, Event::Write(..))),
            "{}",
            damage.name
        );
        let guest = |image: &Image| {
            image.save(&lab.path("cut.qcow2"));
            lab.qemu_img(&[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "cut.qcow2",
                "cut.raw",
            ]);
            std::fs::read(lab.path("cut.raw")).unwrap()
        };
        let content = guest(&image);
        // Between two flushes each write may be there or not: all of them in order, and each alone.
        let mut durable = start;
        let mut pending: Vec<&Event> = Vec::new();
        for event in &log {
            if !matches!(event, Event::Flush) {
                pending.push(event);
            }
            let mut states = Vec::new();
            let mut prefix = durable.clone();
            for event in &pending {
                event.apply(&mut prefix);
                let mut alone = durable.clone();
                event.apply(&mut alone);
                states.push(prefix.clone());
                if alone != prefix {
                    states.push(alone);
                }
            }
            // Only the latest write makes new states, and a flush adds none.
            let new = if matches!(event, Event::Flush) {
                0
            } else {
                2.min(states.len())
            };
            for state in states.split_off(states.len() - new) {
                let cut = Image::new(state);
                let report = cut.check(CheckMode::RepairAll).unwrap();
                assert_eq!(exit_status(&report), 0, "{}: {report:?}", damage.name);
                assert!(guest(&cut) == content, "{}", damage.name);
            }
            if matches!(event, Event::Flush) {
                for event in pending.drain(..) {
                    event.apply(&mut durable);
                }
            }
        }
    }
}

#[test]
fn the_counts_of_good_images_are_qemu_imgs() {
    let Some(lab) = Lab::new() else { return };
    for (options, size, commands) in [
        ("cluster_size=64k", "0", &[] as &[&str]),
        ("cluster_size=64k", "100000", &[]),
        (
            "cluster_size=512",
            "10M",
            &["write 0 300k", "write 5M 1M", "write -c 9M 64k"],
        ),
        (
            "cluster_size=512,refcount_bits=1",
            "10M",
            &[
                "write 1M 3M",
                "write 0 1M",
                "discard 512 1M",
                "write 100k 10k",
            ],
        ),
        (
            "cluster_size=4k,refcount_bits=64",
            "300M",
            &["write 0 5M", "write 290M 5M", "write -z 1M 1M"],
        ),
        (
            "cluster_size=4k,refcount_bits=2",
            "30M",
            &["write -c 0 32k", "write 28M 1M"],
        ),
        (
            "cluster_size=2M",
            "5G",
            &[
                "write 0 3M",
                "write 4G 1",
                "write -c 2G 2M",
                "write -c 2050M 2M",
            ],
        ),
        (
            "compat=0.10",
            "1G",
            &[
                "write 0 3M",
                "write 512M 64k",
                "write 700M 1M",
                "discard 0 1M",
            ],
        ),
        (
            "preallocation=metadata",
            "20M",
            &["write 0 3M", "write -z -u 1M 1M"],
        ),
        (
            "cluster_size=64k,lazy_refcounts=on",
            "1G",
            &["write 0 3M", "write 512M 64k"],
        ),
    ] {
        lab.qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "good.qcow2",
            size,
        ]);
        for command in commands {
            lab.qemu_io("good.qcow2", &[command]);
        }
        let image = Image::load(&lab.path("good.qcow2"));
        let report = image.check(CheckMode::ReadOnly).unwrap();
        assert!(report.is_clean(), "{options}: {report:?}");
        assert_same_counts(&report, &lab.check("good.qcow2"), options);
        for mode in [CheckMode::RepairLeaks, CheckMode::RepairAll] {
            assert!(image.check(mode).unwrap().is_clean());
        }
        assert!(
            !image
                .log()
                .iter()
                .any(|event| matches!(event, Event::Write(..))),
            "{options}: a repair wrote to a clean image"
        );
    }
}

#[test]
fn the_dirty_and_corrupt_bits_are_cleared_when_all_is_well() {
    let Some(lab) = Lab::new() else { return };
    let image = sample(&lab);
    image.put64(72, 3);
    set_refcount(&image, 5, 0);
    let report = image.check(CheckMode::RepairLeaks).unwrap();
    assert_eq!((exit_status(&report), image.get64(72)), (1, 3));
    let report = image.check(CheckMode::RepairAll).unwrap();
    assert_eq!((exit_status(&report), image.get64(72)), (0, 0));
    // A clean image that is only marked.
    image.put64(72, 2);
    image.check(CheckMode::ReadOnly).unwrap();
    assert_eq!(image.get64(72), 2);
    image.check(CheckMode::RepairLeaks).unwrap();
    assert_eq!(image.get64(72), 0);
    // Not while there is corruption left.
    image.put64(72, 2);
    image.put64(L2 + 8, 6 * C | COPIED | 2);
    image.check(CheckMode::RepairAll).unwrap();
    assert_eq!(image.get64(72), 2);
}

#[test]
fn refcounts_are_rebuilt_for_every_width_and_cluster_size() {
    let Some(lab) = Lab::new() else { return };
    for (cluster_size, bits) in [
        ("512", 1),
        ("512", 64),
        ("4k", 2),
        ("4k", 16),
        ("64k", 4),
        ("64k", 32),
        ("64k", 8),
        ("2M", 16),
    ] {
        let options = format!("cluster_size={cluster_size},refcount_bits={bits}");
        lab.qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            "wide.qcow2",
            "40M",
        ]);
        lab.qemu_io("wide.qcow2", &["write -P 3 0 4M", "write -P 4 30M 2M"]);
        lab.qemu_img(&["convert", "-O", "raw", "wide.qcow2", "wide.raw"]);
        let image = Image::load(&lab.path("wide.qcow2"));
        let header = image.header().unwrap();
        // All refcounts are gone.
        let table = header.refcount_table_offset.0;
        image.put(table, &vec![0; header.refcount_table_bytes() as usize]);
        let report = image.check(CheckMode::RepairAll).unwrap();
        assert_eq!(exit_status(&report), 0, "{options}: {report:?}");
        image.save(&lab.path("wide.qcow2"));
        assert_eq!(lab.status(&["check", "wide.qcow2"]), 0, "{options}");
        lab.qemu_img(&["compare", "wide.qcow2", "wide.raw"]);
        // The image can be written again.
        lab.qemu_io("wide.qcow2", &["write -P 5 20M 2M"]);
        assert_eq!(lab.status(&["check", "wide.qcow2"]), 0, "{options}");
    }
}

#[test]
fn a_refcount_that_does_not_fit_stays_a_corruption() {
    let Some(lab) = Lab::new() else { return };
    let options = "refcount_bits=1";
    lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        "bit.qcow2",
        "1M",
    ]);
    lab.qemu_io("bit.qcow2", &["write 0 128k"]);
    let image = Image::load(&lab.path("bit.qcow2"));
    image.put64(L2 + 8, 5 * C | COPIED);
    for mode in [CheckMode::ReadOnly, CheckMode::RepairAll] {
        let report = image.check(mode).unwrap();
        assert_eq!(exit_status(&report), 2, "{report:?}");
        assert!(
            report
                .findings
                .iter()
                .any(|finding| finding.message.contains("overflow"))
        );
    }
}

#[test]
fn a_read_error_is_a_check_error_and_frees_nothing() {
    let Some(lab) = Lab::new() else { return };
    for bad in [L1..L1 + 8, L2 + 512..L2 + 1024, REFBLOCK..REFBLOCK + 1] {
        let image = sample(&lab);
        image.fail_reads(bad.clone());
        for mode in [CheckMode::ReadOnly, CheckMode::RepairLeaks] {
            let report = image.check(mode).unwrap();
            assert_eq!(exit_status(&report), 1, "{bad:?}: {report:?}");
            assert_eq!(report.leaks_fixed, 0);
        }
        assert!(
            !image
                .log()
                .iter()
                .any(|event| matches!(event, Event::Write(..)))
        );
    }
}

#[test]
fn images_with_features_that_are_not_understood_are_not_miscounted() {
    let Some(lab) = Lab::new() else { return };
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    lab.qemu_img(&["snapshot", "-c", "s", "a.qcow2"]);
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "b.qcow2", "1M"]);
    lab.qemu_img(&["bitmap", "--add", "b.qcow2", "b"]);
    lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "extended_l2=on",
        "c.qcow2",
        "1M",
    ]);
    lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compression_type=zstd",
        "d.qcow2",
        "1M",
    ]);
    lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "data_file=e.raw",
        "e.qcow2",
        "1M",
    ]);
    for (file, name) in [
        ("a.qcow2", "internal snapshots"),
        ("b.qcow2", "persistent bitmaps"),
        ("c.qcow2", "extended L2 entries"),
        ("d.qcow2", "compression type"),
        ("e.qcow2", "external data file"),
    ] {
        for mode in [CheckMode::ReadOnly, CheckMode::RepairAll] {
            let error = Image::load(&lab.path(file)).check(mode).unwrap_err();
            assert_eq!(error.errno(), 95, "{file}: {error}");
            assert!(error.reason().contains(name), "{file}: {error}");
        }
    }
}

#[test]
fn a_cancelled_check_stops_and_a_cancelled_repair_leaves_an_image() {
    let Some(lab) = Lab::new() else { return };
    let image = sample(&lab);
    set_refcount(&image, 5, 0);
    let progress = block_core::image::Progress::new();
    progress.cancel();
    for mode in [CheckMode::ReadOnly, CheckMode::RepairAll] {
        let mut header = image.header().unwrap();
        let run = format_qcow2::check::run(&image.child, &mut header, mode, &progress);
        assert_eq!(futures::executor::block_on(run).unwrap_err().errno(), 125);
    }
    assert_eq!(exit_status(&image.check(CheckMode::RepairAll).unwrap()), 0);
}

/// Tables that refer to each other or themselves, and thousands of entries for one table, end in a report.
#[test]
fn hostile_tables_end_in_a_report() {
    let Some(lab) = Lab::new() else { return };
    for target in [0, REFTABLE, REFBLOCK, L1, L2] {
        let image = sample(&lab);
        image.put64(L1, target | COPIED);
        image.put64(L2, L2 | COPIED);
        image.put64(L2 + 8, L1 | COPIED);
        let report = image.check(CheckMode::ReadOnly).unwrap();
        assert!(report.corruptions > 0, "{target:#x}");
        image.check(CheckMode::RepairAll).unwrap();
    }
    // An L1 table of 524,288 entries, all for the same table of compressed clusters.
    let mut data = sample(&lab).data();
    let l1 = data.len() as u64;
    data.resize(data.len() + (4 << 20), 0);
    for entry in data[l1 as usize..].chunks_exact_mut(8) {
        entry.copy_from_slice(&(L2 | COPIED).to_be_bytes());
    }
    let image = Image::new(data);
    image.put(36, &524_288u32.to_be_bytes());
    image.put64(40, l1);
    let report = image.check(CheckMode::ReadOnly).unwrap();
    assert!(report.corruptions > 0);
    assert_eq!(report.compressed_clusters, 2 * 524_288);
    assert!(report.findings.len() <= CheckReport::MAX_FINDINGS);
}

/// Random damage of the metadata: a check and a repair end without a panic, and a repair that says "clean" is believed
/// by qemu-img.
#[test]
fn random_damage_is_survived() {
    let Some(lab) = Lab::new() else { return };
    let clean = sample(&lab).data();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut repaired = 0;
    for round in 0..150 {
        let image = Image::new(clean.clone());
        for _ in 0..=random() % 4 {
            let places = [
                24..112,
                L1..L1 + 8,
                L2..L2 + 300,
                REFTABLE..REFTABLE + 24,
                REFBLOCK..REFBLOCK + 44,
            ];
            let place = &places[(random() % places.len() as u64) as usize];
            let at = place.start + random() % (place.end - place.start);
            image.put(at, &[random() as u8]);
        }
        let Ok(before) = image.check(CheckMode::ReadOnly) else {
            continue;
        };
        let Ok(report) = image.check(CheckMode::RepairAll) else {
            continue;
        };
        let again = image.check(CheckMode::ReadOnly).unwrap();
        assert_eq!(
            exit_status(&again),
            exit_status(&report),
            "round {round}: {before:?}"
        );
        if report.is_clean() {
            image.save(&lab.path("random.qcow2"));
            assert_eq!(
                lab.status(&["check", "-f", "qcow2", "random.qcow2"]),
                0,
                "round {round}"
            );
            repaired += u32::from(!before.is_clean());
        }
    }
    assert!(repaired > 20, "only {repaired} rounds repaired anything");
}
