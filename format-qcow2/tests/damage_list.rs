//! Every rule of the format, broken once: each damage is found by a check, or the image is refused with the field's name;
//! what can be repaired is, qemu-img then calls it clean, and the guest reads what it read before. The test prints the list.

mod damages;
mod damages_of_features;
mod offline;

use block_core::image::CheckMode;
use damages::DAMAGES;
use damages_of_features::{ALIASES, BASES, BROKEN, REFUSED};
use offline::{Image, Lab, exit_status};

/// What a guest reads: of the disk, and of each snapshot that there is. `None` for what can't be read.
fn contents(lab: &Lab, image: &Image) -> Vec<(String, Option<Vec<u8>>)> {
    image.save(&lab.path("read.qcow2"));
    let args = vec![
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "read.qcow2",
        "read.raw",
    ];
    let mut all = Vec::new();
    for name in ["", "one", "two"] {
        let snapshot = format!("snapshot.name={name}");
        let mut args = args.clone();
        if !name.is_empty() {
            args.splice(1..1, ["-l", &snapshot]);
        }
        let _ = std::fs::remove_file(lab.path("read.raw"));
        let read = (lab.status(&args) == 0).then(|| std::fs::read(lab.path("read.raw")).unwrap());
        all.push((name.to_owned(), read));
    }
    all
}

/// Repairs until nothing is left to do: what only a discarded snapshot could have held is freed the second time.
fn repair(image: &Image) -> i32 {
    let mut status = 1;
    for _ in 0..2 {
        status = exit_status(&image.check(CheckMode::RepairAll).unwrap());
        if status != 3 {
            break;
        }
    }
    status
}

#[test]
fn every_rule_that_is_broken_is_found_and_repaired_where_that_can_be() {
    let Some(lab) = Lab::new() else { return };
    let bases: Vec<Image> = BASES.iter().map(|make| make(&lab)).collect();
    let fresh = |base: usize| Image::new(bases[base].data());
    let mut list = Vec::new();
    for (name, base, apply, field) in REFUSED {
        let image = fresh(*base);
        apply(&image);
        let error = image.check(CheckMode::ReadOnly).unwrap_err();
        let named = error
            .field()
            .unwrap_or_else(|| panic!("{name}: no field in {error}"));
        assert_eq!(named.name, *field, "{name}: {error}");
        list.push(format!("{name}: refused, field {field}"));
    }
    let plain = DAMAGES
        .iter()
        .filter(|damage| damage.status != 0)
        .map(|damage| {
            (
                damage.name,
                0,
                damage.apply,
                damage.text,
                damage.after.1 == 0,
            )
        });
    let others = BROKEN.iter().chain(ALIASES).copied();
    for (name, base, apply, text, repairable) in plain.chain(others) {
        let image = fresh(base);
        let whole = contents(&lab, &image);
        apply(&image);
        let before = contents(&lab, &image);
        let report = image.check(CheckMode::ReadOnly).unwrap();
        assert_ne!(exit_status(&report), 0, "{name}");
        assert!(
            report
                .findings
                .iter()
                .any(|finding| finding.message.contains(text)),
            "{name}: {:?}",
            report.findings
        );
        assert!(image.log().is_empty(), "{name}: a check wrote");
        let status = repair(&image);
        assert_eq!(
            status == 0,
            repairable,
            "{name}: {:?}",
            image.check(CheckMode::ReadOnly).unwrap().findings
        );
        if repairable {
            image.save(&lab.path("repaired.qcow2"));
            let theirs = if image.header().unwrap().crypt_method == 2 {
                let name = "json:{\"driver\":\"qcow2\",\"file.filename\":\"repaired.qcow2\",\
                            \"encrypt.key-secret\":\"s\"}";
                lab.status(&["check", "--object", "secret,id=s,data=letmein", name])
            } else {
                lab.status(&["check", "-f", "qcow2", "repaired.qcow2"])
            };
            assert_eq!(theirs, 0, "{name}");
        }
        // What could be read still reads the same; what is readable again is what it was.
        for (((of, after), (_, before)), (_, whole)) in
            contents(&lab, &image).into_iter().zip(before).zip(whole)
        {
            if before.is_some() {
                assert!(after == before, "{name}: content of '{of}' changed");
            } else if after.is_some() {
                assert!(
                    after == whole,
                    "{name}: content of '{of}' isn't what it was"
                );
            }
        }
        let end = if repairable { "repaired" } else { "found" };
        list.push(format!("{name}: {end}"));
    }
    for (number, line) in list.iter().enumerate() {
        println!("{:3}. {line}", number + 1);
    }
    assert!(list.len() >= 100, "{}", list.len());
}

#[test]
fn ranges_that_shared_their_place_are_named_with_what_they_shared_it() {
    let Some(lab) = Lab::new() else { return };
    let bases: Vec<Image> = BASES.iter().map(|make| make(&lab)).collect();
    for (name, base, apply, ..) in ALIASES {
        let image = Image::new(bases[*base].data());
        apply(&image);
        let found = image.check(CheckMode::ReadOnly).unwrap();
        assert!(!found.affected.is_empty(), "{name}: {:?}", found.findings);
        assert!(found.affected.iter().all(|affected| !affected.separated));
        for affected in &found.affected {
            assert!(
                affected.length > 0 && !affected.with.is_empty(),
                "{name}: {affected:?}"
            );
            println!("{name}: {affected}");
        }
        let repaired = image.check(CheckMode::RepairAll).unwrap();
        let ranges = |report: &block_core::image::CheckReport| {
            let all = report.affected.iter();
            all.map(|range| (range.start, range.snapshot.clone()))
                .collect::<Vec<_>>()
        };
        for range in ranges(&found) {
            assert!(
                ranges(&repaired).contains(&range),
                "{name}: {:?}",
                repaired.affected
            );
        }
        let again = image.check(CheckMode::ReadOnly).unwrap();
        assert!(again.affected.is_empty(), "{name}: {:?}", again.affected);
    }
}

/// Snapshots share clusters and tables, compressed clusters share what their pieces lie in: none of that is aliasing, even
/// when no refcount says so.
#[test]
fn legitimate_sharing_is_not_called_aliasing() {
    let Some(lab) = Lab::new() else { return };
    for (base, make) in BASES.iter().enumerate().take(3) {
        let image = make(&lab);
        let header = image.header().unwrap();
        let table = header.refcount_table_offset.0;
        image.put(table, &vec![0; header.refcount_table_bytes() as usize]);
        for mode in [CheckMode::ReadOnly, CheckMode::RepairAll] {
            let report = image.check(mode).unwrap();
            assert!(report.affected.is_empty(), "{base}: {:?}", report.affected);
        }
        let report = image.check(CheckMode::ReadOnly).unwrap();
        assert_eq!(exit_status(&report), 0, "{base}: {report:?}");
    }
}
