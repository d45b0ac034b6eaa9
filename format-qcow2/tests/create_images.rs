//! New images, compared with those that qemu-img makes, byte for byte where the layout is the same.

mod offline;

use block_core::options::Options;
use format_qcow2::measure::measure;
use offline::{Event, Image, Lab};
use serde_json::Value;

#[test]
fn an_image_is_byte_for_byte_the_one_that_qemu_img_makes() {
    let Some(lab) = Lab::new() else { return };
    lab.qemu_img(&["create", "-f", "raw", "base.raw", "4M"]);
    for options in [
        "cluster_size=64k",
        "compat=0.10",
        "compat=v3,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=8k",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=4",
        "refcount_bits=8",
        "refcount_bits=32",
        "refcount_bits=64",
        "backing_file=base.raw,backing_fmt=raw",
        "compat=0.10,backing_file=base.raw,backing_fmt=raw",
        "cluster_size=512,backing_file=base.raw,backing_fmt=raw",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,refcount_bits=1",
        "extended_l2=on,cluster_size=2M,backing_file=base.raw,backing_fmt=raw",
    ] {
        for size in ["0", "512", "1000", "3M", "64M", "1G"] {
            if size == "1G" && options.contains("cluster_size=512") {
                // More than one refcount block: QEMU arrives at another order of clusters.
                continue;
            }
            lab.create(options, "theirs.qcow2", size);
            let ours = Image::create(&format!("{options},size={size}")).unwrap();
            let theirs = std::fs::read(lab.path("theirs.qcow2")).unwrap();
            assert_eq!(ours.data().len(), theirs.len(), "{options} {size}");
            assert!(ours.data() == theirs, "{options} {size}");
        }
    }
}

#[test]
fn every_new_image_is_clean_and_reads_as_zeroes_for_qemu_img() {
    let Some(lab) = Lab::new() else { return };
    for options in [
        "cluster_size=512,size=300M",
        "cluster_size=512,size=2G",
        "cluster_size=512,refcount_bits=64,size=2G",
        "cluster_size=1k,refcount_bits=1,size=64M",
        "preallocation=metadata,size=0",
        "preallocation=metadata,size=512",
        "preallocation=metadata,size=3M",
        "preallocation=metadata,compat=0.10,size=70M",
        "preallocation=metadata,cluster_size=512,size=20M",
        "preallocation=metadata,cluster_size=512,refcount_bits=64,size=20M",
        "preallocation=metadata,cluster_size=4k,refcount_bits=1,size=33M",
        "preallocation=metadata,cluster_size=2M,size=5M",
        "preallocation=falloc,size=5M",
        "preallocation=full,size=5M,refcount_bits=32",
        "preallocation=full,cluster_size=1k,size=1025k",
        "extended_l2=on,preallocation=metadata,cluster_size=16k,size=20M",
        "extended_l2=on,preallocation=metadata,size=300M",
        "extended_l2=on,preallocation=full,size=5M",
    ] {
        let image = Image::create(options).unwrap();
        image.save(&lab.path("ours.qcow2"));
        let check = lab.check("ours.qcow2");
        for bad in ["corruptions", "leaks"] {
            assert_eq!(check.get(bad), None, "{options}: {check}");
        }
        assert_eq!(check["check-errors"], 0, "{options}");
        if options.contains("preallocation") {
            let (all, total) = (check.get("allocated-clusters"), check.get("total-clusters"));
            assert_eq!(all, total, "{options}");
            let end = check["image-end-offset"].as_u64().unwrap();
            assert_eq!(image.data().len() as u64, end, "{options}");
        }
        let info: Value =
            serde_json::from_str(&lab.qemu_img(&["info", "--output=json", "ours.qcow2"])).unwrap();
        let size = info["virtual-size"].as_u64().unwrap().to_string();
        lab.qemu_img(&["create", "-q", "-f", "raw", "zero.raw", &size]);
        lab.qemu_img(&[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "ours.qcow2",
            "zero.raw",
        ]);
    }
}

#[test]
fn a_preallocated_image_has_the_length_that_qemu_img_gives_it() {
    let Some(lab) = Lab::new() else { return };
    for options in [
        "preallocation=metadata,size=3M",
        "preallocation=full,size=3M",
        "preallocation=metadata,cluster_size=4k,size=3M",
    ] {
        lab.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "theirs.qcow2"]);
        let theirs = std::fs::metadata(lab.path("theirs.qcow2")).unwrap().len();
        assert_eq!(
            Image::create(options).unwrap().data().len() as u64,
            theirs,
            "{options}"
        );
    }
}

#[test]
fn the_header_is_written_last_and_behind_a_flush() {
    for options in [
        "size=1G",
        "size=10M,preallocation=full",
        "size=10M,cluster_size=512",
    ] {
        let log = Image::create(options).unwrap().log();
        let header = log
            .iter()
            .position(|event| matches!(event, Event::Write(0, _)))
            .expect("there is a header");
        assert!(matches!(log[header - 1], Event::Flush), "{options}");
        assert!(matches!(log[header + 1..], [Event::Flush]), "{options}");
        // A power cut before that leaves nothing that looks like an image.
        let mut data = Vec::new();
        for event in &log[..header] {
            event.apply(&mut data);
            let image = Image::new(data.clone());
            assert_eq!(
                image.header().unwrap_err().reason(),
                "Image is not in qcow2 format"
            );
        }
    }
}

#[test]
fn options_that_are_refused_leave_the_storage_untouched() {
    for options in [
        "size=129G,cluster_size=512",
        "size=1M,extended_l2=on,cluster_size=8k",
        "size=1M,x=y",
    ] {
        assert!(Image::create(options).is_err(), "{options}");
    }
    // The name alone would fit, but not with the rest of the header.
    let name = "x".repeat(400);
    let options = format!("size=1M,cluster_size=512,backing_file={name},backing_fmt=raw");
    let parameters =
        format_qcow2::create::Parameters::from_options(Options::from_dotted(&options).unwrap())
            .unwrap();
    let image = Image::new(Vec::new());
    let error =
        futures::executor::block_on(format_qcow2::create::create_in(&image.child, &parameters))
            .unwrap_err();
    assert_eq!(error.errno(), 28);
    assert!(image.log().is_empty());
}

#[test]
fn measuring_gives_qemu_imgs_numbers() {
    let Some(lab) = Lab::new() else { return };
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=2M",
        "cluster_size=512,refcount_bits=64",
        "refcount_bits=1",
        "compat=0.10",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ] {
        for size in [
            "0", "1", "511", "512", "65537", "1M", "777M", "1G", "100G", "1T", "63T",
        ] {
            let bytes = block_core::options::parse_size(size).unwrap();
            let ours = measure(bytes, &[], Options::from_dotted(options).unwrap());
            let args = [
                "measure",
                "-O",
                "qcow2",
                "--output=json",
                "-o",
                options,
                "--size",
                size,
            ];
            match ours {
                Ok(ours) => {
                    let theirs: Value = serde_json::from_str(&lab.qemu_img(&args)).unwrap();
                    let ours = serde_json::to_value(ours).unwrap();
                    assert_eq!(ours, theirs, "{options} {size}");
                }
                Err(_) => assert_ne!(lab.status(&args), 0, "{options} {size}"),
            }
        }
    }
}

#[test]
fn measuring_data_extents_gives_qemu_imgs_numbers() {
    let Some(lab) = Lab::new() else { return };
    // Extents as the file system may report them: multiples of 64 KiB.
    let extents: [(u64, u64); 4] = [
        (0, 65536),
        (196_608, 131_072),
        (1 << 20, 65536),
        (3 << 20, 1 << 20),
    ];
    lab.create("cluster_size=4k", "source.qcow2", "16M");
    for (offset, len) in extents {
        lab.qemu_io("source.qcow2", &[&format!("write -P 1 {offset} {len}")]);
    }
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=256k",
    ] {
        let text = lab.qemu_img(&[
            "measure",
            "-O",
            "qcow2",
            "--output=json",
            "-o",
            options,
            "source.qcow2",
        ]);
        let theirs: Value = serde_json::from_str(&text).unwrap();
        let ours = measure(16 << 20, &extents, Options::from_dotted(options).unwrap()).unwrap();
        assert_eq!(
            ours.required,
            theirs["required"].as_u64().unwrap(),
            "{options}"
        );
        let full = theirs["fully-allocated"].as_u64().unwrap();
        assert_eq!(ours.fully_allocated, full, "{options}");
    }
}
