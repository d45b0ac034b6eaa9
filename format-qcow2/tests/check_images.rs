//! Checks of good, damaged and hostile images, compared with qemu-img.

mod damages;
mod offline;

use block_core::image::{CheckMode, CheckReport};
use damages::{C, COPIED, DAMAGES, L1, L2, REFBLOCK, REFTABLE, damaged, sample, set_refcount};
use offline::{Event, Image, Lab, assert_same_counts, exit_status};

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
        lab.create(options, "good.qcow2", size);
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

/// One bit can't say that a cluster is used twice: only copies can repair it.
#[test]
fn a_doubly_used_cluster_whose_refcount_does_not_fit_gets_copies() {
    let Some(lab) = Lab::new() else { return };
    let options = "refcount_bits=1";
    lab.create(options, "bit.qcow2", "1M");
    lab.qemu_io("bit.qcow2", &["write 0 128k"]);
    let image = Image::load(&lab.path("bit.qcow2"));
    image.put64(L2 + 8, (5 * C) | COPIED);
    let report = image.check(CheckMode::ReadOnly).unwrap();
    assert_eq!(exit_status(&report), 2, "{report:?}");
    let overflow = |report: &CheckReport| {
        let mut findings = report.findings.iter();
        findings.any(|finding| finding.message.contains("overflow"))
    };
    assert!(overflow(&report));
    let report = image.check(CheckMode::RepairAll).unwrap();
    assert_eq!(exit_status(&report), 0, "{report:?}");
    image.save(&lab.path("bit.qcow2"));
    assert_eq!(lab.status(&["check", "-f", "qcow2", "bit.qcow2"]), 0);
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
            // Nothing is said of what nobody could look at.
            assert_eq!((report.leaks, report.corruptions), (0, 0), "{bad:?}");
            assert_eq!(
                report.uncertain > 0,
                bad.start < REFBLOCK || bad.start >= L1
            );
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
