//! Checks of good images with every feature of the format: what qemu-img counts is what is counted here, and nothing is
//! written to them by a repair.

mod offline;

use block_core::image::CheckMode;
use offline::{Event, Image, Lab, assert_same_counts, exit_status};

/// Size, options of creation, and what is done to the image: arguments of qemu-img after `I ` (`%` is the file), else
/// commands of qemu-io.
const IMAGES: &[(&str, &str, &[&str])] = &[
    (
        "64M",
        "extended_l2=on",
        &[
            "write -P 1 0 3M",
            "write -P 2 10M 2k",
            "write -z 10M 70k",
            "write -c 20M 128k",
            "discard 1M 1M",
        ],
    ),
    (
        "300M",
        "extended_l2=on,cluster_size=16k,refcount_bits=8",
        &[
            "write 0 3M",
            "I snapshot -c one %",
            "write -z 1M 30k",
            "write 200M 5k",
        ],
    ),
    (
        "64M",
        "extended_l2=on,preallocation=metadata",
        &["write 0 3M", "write -z 1M 3k"],
    ),
    (
        "64M",
        "compression_type=zstd",
        &[
            "write -c 0 64k",
            "write -c 64k 64k",
            "write 1M 1M",
            "write -c 5M 64k",
        ],
    ),
    (
        "64M",
        "data_file=@.raw",
        &[
            "write 0 1M",
            "write -z 512k 64k",
            "discard 128k 64k",
            "write 60M 64k",
        ],
    ),
    (
        "64M",
        "data_file=@.raw,data_file_raw=on",
        &["write 0 1M", "write -z 512k 64k", "discard 128k 64k"],
    ),
    (
        "64M",
        "cluster_size=64k",
        &[
            "write 0 3M",
            "I snapshot -c one %",
            "write 1M 1M",
            "write -c 8M 64k",
            "I snapshot -c two %",
            "write 8M 64k",
            "write 2M 64k",
            "I snapshot -c three %",
            "I snapshot -a one %",
            "write 0 64k",
            "I snapshot -d two %",
        ],
    ),
    (
        "64M",
        "compat=0.10",
        &["write 0 3M", "I snapshot -c one %", "write 1M 1M"],
    ),
    (
        "200M",
        "cluster_size=512,refcount_bits=64",
        &[
            "write 0 3M",
            "I snapshot -c one %",
            "write 1M 1M",
            "write 150M 1M",
        ],
    ),
    (
        "64M",
        "cluster_size=64k",
        &[
            "write 0 1M",
            "I bitmap --add -g 64k % a",
            "I bitmap --add -g 512 % b",
            "write 8M 3M",
            "I bitmap --disable % a",
            "write 16M 3M",
            "I snapshot -c one %",
        ],
    ),
    (
        "1G",
        "cluster_size=4k",
        &["I bitmap --add -g 512 % b", "write 8M 3M", "write 900M 1M"],
    ),
    (
        "64M",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        &[],
    ),
    ("64M", "encrypt.format=aes,encrypt.key-secret=s", &[]),
];

#[test]
fn the_counts_of_images_with_any_feature_are_qemu_imgs() {
    let Some(lab) = Lab::new() else { return };
    for (number, (size, options, steps)) in IMAGES.iter().enumerate() {
        let file = format!("{number}.qcow2");
        let options = options.replace('@', &number.to_string());
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if options.contains("encrypt") {
            create.extend(["--object", "secret,id=s,data=letmein"]);
        }
        create.extend(["-o", &options, &file, size]);
        lab.qemu_img(&create);
        for step in *steps {
            match step.strip_prefix("I ") {
                Some(step) => {
                    let args: Vec<&str> = step
                        .split(' ')
                        .map(|arg| if arg == "%" { &file } else { arg })
                        .collect();
                    lab.qemu_img(&args);
                }
                None => lab.qemu_io(&file, &[step]),
            }
        }
        let image = Image::load(&lab.path(&file));
        let report = image.check(CheckMode::ReadOnly).unwrap();
        assert_eq!(exit_status(&report), 0, "{options}: {report:?}");
        assert!(
            report.findings.is_empty(),
            "{options}: {:?}",
            report.findings
        );
        let theirs = if options.contains("encrypt") {
            lab.check_json(&format!(
                "json:{{\"driver\":\"qcow2\",\"file.filename\":\"{file}\",\"encrypt.key-secret\":\"s\"}}"
            ))
        } else {
            lab.check(&file)
        };
        assert_same_counts(&report, &theirs, &options);
        for mode in [CheckMode::RepairLeaks, CheckMode::RepairAll] {
            assert_eq!(exit_status(&image.check(mode).unwrap()), 0);
        }
        let written = image
            .log()
            .iter()
            .any(|event| !matches!(event, Event::Flush));
        assert!(!written, "{options}: a repair wrote to a clean image");
    }
}

/// All refcounts are gone: table zeroed, table beyond the end of the file, table unreadable.
#[test]
fn refcounts_of_images_with_any_feature_are_rebuilt_from_nothing() {
    let Some(lab) = Lab::new() else { return };
    let (size, options, steps) = IMAGES[6];
    lab.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", size,
    ]);
    for step in steps {
        match step.strip_prefix("I ") {
            Some(step) => {
                let args: Vec<&str> = step
                    .split(' ')
                    .map(|arg| if arg == "%" { "a.qcow2" } else { arg })
                    .collect();
                lab.qemu_img(&args);
            }
            None => lab.qemu_io("a.qcow2", &[step]),
        }
    }
    lab.qemu_img(&["convert", "-O", "raw", "a.qcow2", "a.raw"]);
    let good = Image::load(&lab.path("a.qcow2")).data();
    for how in ["zeroed", "beyond the end", "none", "unreadable"] {
        let image = Image::new(good.clone());
        let header = image.header().unwrap();
        let (table, len) = (
            header.refcount_table_offset.0,
            header.refcount_table_bytes(),
        );
        match how {
            "zeroed" => image.put(table, &vec![0; len as usize]),
            "beyond the end" => image.put64(48, 1 << 40),
            "none" => image.put(56, &[0; 4]),
            _ => image.fail_reads(table..table + len),
        }
        let before = image.check(CheckMode::ReadOnly).unwrap();
        assert!(matches!(exit_status(&before), 1 | 2), "{how}: {before:?}");
        let report = image.check(CheckMode::RepairAll).unwrap();
        assert_eq!(exit_status(&report), 0, "{how}: {report:?}");
        image.save(&lab.path("b.qcow2"));
        assert_eq!(lab.status(&["check", "-f", "qcow2", "b.qcow2"]), 0, "{how}");
        lab.qemu_img(&["compare", "b.qcow2", "a.raw"]);
        for snapshot in ["one", "three"] {
            let name = format!("snapshot.name={snapshot}");
            for (file, raw) in [("a.qcow2", "theirs.raw"), ("b.qcow2", "ours.raw")] {
                lab.qemu_img(&["convert", "-l", &name, "-O", "raw", file, raw]);
            }
            lab.qemu_img(&["compare", "theirs.raw", "ours.raw"]);
        }
    }
}
