//! Repairs of damaged images: what they leave is what qemu-img calls clean, whenever they are cut off.

mod damages;
mod offline;

use std::collections::HashSet;

use block_core::image::{CheckMode, CheckReport};
use damages::{C, COPIED, DAMAGES, Damage, L1, L2, damaged, sample, set_refcount};
use offline::{Event, Image, Lab, assert_same_counts, exit_status};

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
    for name in ["refcount of data zero", "refcount block missing"] {
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
            image.put64(L1, L2 | COPIED);
            image.put64(40, L1);
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
        // What was tried already, and the repaired images that were compared already: many states end alike.
        let mut tried: HashSet<Vec<u8>> = HashSet::new();
        let mut compared: HashSet<Vec<u8>> = HashSet::from([image.data()]);
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
                if !tried.insert(state.clone()) {
                    continue;
                }
                let cut = Image::new(state);
                let report = cut.check(CheckMode::RepairAll).unwrap();
                assert_eq!(exit_status(&report), 0, "{}: {report:?}", damage.name);
                if compared.insert(cut.data()) {
                    assert!(guest(&cut) == content, "{}", damage.name);
                }
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
    image.put64(L2 + 8, ((1 << 32) + 6 * C) | COPIED);
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
        lab.create(&options, "wide.qcow2", "40M");
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
