//! Headers: what is refused is refused with qemu-img's words, what is read is shown with its keys, and what is
//! rewritten keeps what isn't known.

mod offline;

use std::process::Command;

use block_core::image::CheckMode;
use format_qcow2::{
    compress::Codec,
    header_update::{change_backing, drop_unknown_autoclear, rewrite, write_size},
    info::image_info,
    layout::{CompressedRun, HostOffset, L1Entry, L2Entry, RawEntry, header::field},
};
use futures::executor::block_on;
use offline::{Image, Lab};
use serde_json::Value;

/// The reason that `qemu-img info` gives for not opening a file.
fn refusal(lab: &Lab, file: &str) -> Option<String> {
    let output = Command::new("qemu-img")
        .args(["info", "-f", "qcow2"])
        .arg(lab.path(file))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let (_, reason) = text.trim_end().split_once("': ")?;
    (!output.status.success()).then(|| reason.to_owned())
}

#[test]
fn a_header_is_refused_with_the_words_of_qemu_img() {
    let Some(lab) = Lab::new() else { return };
    type Damage = (&'static str, fn(&Image));
    let damages: &[Damage] = &[
        ("magic", |image| image.put(3, b"\xfc")),
        ("version 4", |image| image.put(7, &[4])),
        ("version 1", |image| image.put(7, &[1])),
        ("cluster_bits 8", |image| image.put(23, &[8])),
        ("cluster_bits 22", |image| image.put(23, &[22])),
        ("cluster_bits 63", |image| image.put(23, &[63])),
        ("header_length 103", |image| image.put(103, &[103])),
        ("header_length 65537", |image| {
            image.put(100, &65537u32.to_be_bytes());
        }),
        ("backing_file_offset", |image| image.put64(8, 65537)),
        ("backing name too long", |image| {
            image.put64(8, 1024);
            image.put(16, &1024u32.to_be_bytes());
        }),
        ("backing name leaves the cluster", |image| {
            image.put64(8, 65535);
            image.put(16, &2u32.to_be_bytes());
        }),
        ("extension too large", |image| {
            image.put(116, &u32::MAX.to_be_bytes());
        }),
        ("extension a little too large", |image| {
            image.put(116, &65417u32.to_be_bytes());
        }),
        ("unknown feature", |image| image.put64(72, 1 << 40)),
        ("two unknown features", |image| {
            image.put64(72, 1 << 40 | 1 << 63);
        }),
        ("compression type without its bit", |image| {
            image.put(104, &[1]);
        }),
        ("compression bit without a type", |image| image.put64(72, 8)),
        ("refcount_order 7", |image| image.put(99, &[7])),
        ("no refcount table", |image| {
            image.put(56, &0u32.to_be_bytes());
        }),
        ("refcount table too large", |image| {
            image.put(56, &129u32.to_be_bytes());
        }),
        ("refcount table unaligned", |image| {
            image.put64(48, 65536 + 512);
        }),
        ("refcount table overflows", |image| {
            image.put64(48, 0x7fff_ffff_ffff_0000);
        }),
        ("too many snapshots", |image| {
            image.put(60, &65537u32.to_be_bytes());
        }),
        ("snapshots unaligned", |image| {
            image.put(60, &1u32.to_be_bytes());
            image.put64(64, 512);
        }),
        ("absurd L1 size", |image| {
            image.put(36, &u32::MAX.to_be_bytes());
        }),
        ("L1 unaligned", |image| image.put64(40, 3 * 65536 + 8)),
        ("L1 too small", |image| image.put64(24, 1 << 40)),
        ("absurd size", |image| image.put64(24, 1 << 63)),
        ("encryption method 3", |image| image.put(35, &[3])),
        ("LUKS without a header", |image| image.put(35, &[2])),
    ];
    for (name, damage) in damages {
        let image = Image::create("size=64M").unwrap();
        damage(&image);
        image.save(&lab.path("bad.qcow2"));
        let theirs = refusal(&lab, "bad.qcow2");
        let header = image.header().and_then(|header| {
            header.check_open(true, false)?;
            Ok(header)
        });
        let error = header.expect_err(name);
        assert_eq!(Some(error.reason()), theirs, "{name}");
        assert!(error.field().is_some(), "{name}: {error}");
    }
    for len in [0, 3, 20, 50, 72, 90, 103] {
        let image = Image::new(Image::create("size=64M").unwrap().data()[..len].to_vec());
        image.save(&lab.path("bad.qcow2"));
        let error = image.header().unwrap_err();
        let theirs = refusal(&lab, "bad.qcow2").unwrap();
        if len >= 24 || len == 0 {
            assert_eq!(error.reason(), theirs, "{len} bytes");
        }
    }
}

#[test]
fn info_has_the_keys_and_values_of_qemu_img() {
    let Some(lab) = Lab::new() else { return };
    lab.qemu_img(&["create", "-q", "-f", "raw", "base.raw", "64M"]);
    for options in [
        "compat=1.1",
        "compat=0.10",
        "lazy_refcounts=on,refcount_bits=1",
        "cluster_size=2M,refcount_bits=64",
        "cluster_size=512",
        "backing_file=base.raw,backing_fmt=raw",
    ] {
        lab.create(options, "info.qcow2", "64M");
        let header = Image::load(&lab.path("info.qcow2")).header().unwrap();
        let ours = image_info(&header);
        let text = lab.qemu_img(&["info", "--output=json", "info.qcow2"]);
        let theirs: Value = serde_json::from_str(&text).unwrap();
        let (kind, data) = ours.format_specific.unwrap();
        assert_eq!(theirs["format-specific"]["type"], kind, "{options}");
        assert_eq!(
            theirs["format-specific"]["data"].to_string(),
            data.to_string(),
            "{options}"
        );
        assert_eq!(theirs["cluster-size"].as_u64(), ours.cluster_size);
        assert_eq!(theirs["dirty-flag"].as_bool(), Some(ours.dirty));
        assert_eq!(theirs["virtual-size"].as_u64(), Some(header.disk_size()));
        let name = theirs.get("backing-filename").and_then(Value::as_str);
        assert_eq!(ours.backing_filename.as_deref(), name);
        let format = theirs
            .get("backing-filename-format")
            .and_then(Value::as_str);
        assert_eq!(ours.backing_format.as_deref(), format);
    }
}

#[test]
fn a_changed_backing_file_is_what_qemu_img_sees() {
    let Some(lab) = Lab::new() else { return };
    for options in ["size=1M", "size=1M,compat=0.10", "size=1M,cluster_size=512"] {
        let image = Image::create(options).unwrap();
        let plain = image.data();
        let mut header = image.header().unwrap();
        block_on(change_backing(
            &image.child,
            &mut header,
            Some("base.img"),
            Some("raw"),
        ))
        .unwrap();
        assert_eq!(image.header().unwrap(), header);
        image.save(&lab.path("changed.qcow2"));
        let text = lab.qemu_img(&["info", "--output=json", "changed.qcow2"]);
        let info: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(info["backing-filename"], "base.img");
        assert_eq!(info["backing-filename-format"], "raw");
        // Without it, the image is what it was.
        block_on(change_backing(&image.child, &mut header, None, None)).unwrap();
        assert!(image.data() == plain, "{options}");
    }
}

#[test]
fn a_backing_file_name_that_does_not_fit_changes_nothing() {
    let image = Image::create("size=1M,cluster_size=512").unwrap();
    let before = image.data();
    let mut header = image.header().unwrap();
    let old = header.clone();
    for (len, errno) in [(1024, 22), (1023, 28), (400, 28)] {
        let name = "n".repeat(len);
        let change = change_backing(&image.child, &mut header, Some(&name), Some("raw"));
        assert_eq!(block_on(change).unwrap_err().errno(), errno, "{len}");
        assert_eq!(header, old);
        assert!(image.data() == before);
    }
    let long = change_backing(
        &image.child,
        &mut header,
        Some("a"),
        Some("sixteen letters!"),
    );
    assert_eq!(block_on(long).unwrap_err().errno(), 22);
    let lone = change_backing(&image.child, &mut header, None, Some("raw"));
    assert_eq!(block_on(lone).unwrap_err().errno(), 22);
    let name = "n".repeat(375);
    block_on(change_backing(
        &image.child,
        &mut header,
        Some(&name),
        Some("raw"),
    ))
    .unwrap();
    assert_eq!(image.header().unwrap().backing_file_name(), Some(name));
}

#[test]
fn unknown_parts_of_a_header_survive_a_rewrite() {
    let image = Image::create("size=1M").unwrap();
    // A longer header, an unknown extension behind it, unknown compatible and autoclear bits.
    let mut tail = b"sixteen new byte".to_vec();
    tail.extend_from_slice(&0x1234_5678u32.to_be_bytes());
    tail.extend_from_slice(&5u32.to_be_bytes());
    tail.extend_from_slice(b"extra\0\0\0");
    tail.extend_from_slice(&[0; 8]);
    image.put(112, &tail);
    image.put(100, &128u32.to_be_bytes());
    image.put64(field::COMPATIBLE, 1 << 33);
    image.put64(field::AUTOCLEAR, 1 << 34);
    let mut header = image.header().unwrap();
    block_on(rewrite(&image.child, &header)).unwrap();
    let again = image.header().unwrap();
    assert_eq!(again.unknown_tail, b"sixteen new byte");
    assert_eq!(again.extensions.unknown, header.extensions.unknown);
    assert_eq!(again.extensions.unknown[0].data, b"extra");
    assert_eq!(again.compatible, header.compatible);
    assert_eq!(again.autoclear, header.autoclear);
    assert_eq!(again.encoded_length(), 128);
    // A writer that doesn't know an autoclear bit drops it, once.
    assert!(block_on(drop_unknown_autoclear(&image.child, &mut header)).unwrap());
    assert_eq!(image.get64(field::AUTOCLEAR), 0);
    assert!(!block_on(drop_unknown_autoclear(&image.child, &mut header)).unwrap());
    assert_eq!(image.header().unwrap().compatible, again.compatible);
}

#[test]
fn a_size_beyond_the_l1_table_is_refused() {
    let image = Image::create("size=1M").unwrap();
    let mut header = image.header().unwrap();
    block_on(write_size(&image.child, &mut header, 512 << 20)).unwrap();
    assert_eq!(image.header().unwrap().size, 512 << 20);
    assert!(block_on(write_size(&image.child, &mut header, (512 << 20) + 512)).is_err());
    assert_eq!(image.header().unwrap().size, 512 << 20);
}

/// Bytes of a guest cluster that compress to about a third.
fn content(cluster: u64, size: usize) -> Vec<u8> {
    let mut state = cluster * 2 + 1;
    (0..size)
        .map(|at| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            if at % 4 == 0 {
                (state >> 56) as u8
            } else {
                (at >> 8) as u8
            }
        })
        .collect()
}

#[test]
fn what_is_compressed_here_is_read_by_qemu_img_and_the_other_way_round() {
    let Some(lab) = Lab::new() else { return };
    for bits in [9, 12, 16, 21] {
        let size = 1usize << bits;
        let clusters = if bits < 20 { 20u64 } else { 3 };
        let disk = clusters * size as u64;
        let raw: Vec<u8> = (0..clusters)
            .flat_map(|cluster| content(cluster, size))
            .collect();
        std::fs::write(lab.path("disk.raw"), &raw).unwrap();

        // Ours for them: an image made by hand, whose refcounts a repair makes.
        let image = Image::create(&format!("size={disk},cluster_size={size}")).unwrap();
        let geometry = image.header().unwrap().geometry();
        let mut data = image.data();
        data.resize(data.len().next_multiple_of(size), 0);
        let l1 = image.header().unwrap().l1_table_offset.0;
        let l2 = data.len() as u64;
        data.resize(data.len() + size, 0);
        for cluster in 0..clusters {
            let packed = Codec::Zlib
                .compress(&raw[cluster as usize * size..][..size])
                .unwrap();
            let run =
                CompressedRun::new(HostOffset(data.len() as u64), packed.len() as u64, geometry);
            let entry = L2Entry::Compressed(run.unwrap()).encode(geometry);
            let at = l2 as usize + 8 * cluster as usize;
            data[at..at + 8].copy_from_slice(&entry.descriptor.to_be_bytes());
            data.extend(packed);
        }
        data.resize(data.len().next_multiple_of(size), 0);
        let image = Image::new(data);
        image.put64(
            l1,
            L1Entry {
                l2: Some(HostOffset(l2)),
                copied: true,
            }
            .encode(),
        );
        let report = image.check(CheckMode::RepairAll).unwrap();
        assert!(
            report.is_clean() && report.corruptions_fixed > 0,
            "{report:?}"
        );
        image.save(&lab.path("ours.qcow2"));
        assert_eq!(lab.status(&["check", "ours.qcow2"]), 0, "{bits}");
        lab.qemu_img(&["compare", "-F", "raw", "ours.qcow2", "disk.raw"]);

        // Theirs for us.
        let options = format!("cluster_size={size}");
        lab.qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &options,
            "disk.raw",
            "theirs.qcow2",
        ]);
        let image = Image::load(&lab.path("theirs.qcow2"));
        let l1 = image.header().unwrap().l1_table_offset.0;
        let table = L1Entry::decode(image.get64(l1), geometry)
            .unwrap()
            .l2
            .unwrap()
            .0;
        let data = image.data();
        for cluster in 0..clusters {
            let word = RawEntry::ordinary(image.get64(table + 8 * cluster));
            let entry = L2Entry::decode(word, geometry).unwrap();
            let L2Entry::Compressed(run) = entry else {
                panic!("{cluster}: {entry:?}")
            };
            let end = data.len().min((run.offset.0 + run.len) as usize);
            let cluster_data = Codec::Zlib
                .decompress(&data[run.offset.0 as usize..end], size)
                .unwrap();
            assert!(
                cluster_data[..] == raw[cluster as usize * size..][..size],
                "{bits} {cluster}"
            );
        }
    }
}

#[test]
fn an_image_whose_writer_died_with_lazy_refcounts_is_repaired() {
    let Some(lab) = Lab::new() else { return };
    let options = "lazy_refcounts=on,cluster_size=4k";
    lab.create(options, "lazy.qcow2", "40M");
    let status = Command::new("qemu-io")
        .args(["-c", "write -P 7 1M 5M", "-c", "flush", "-c", "abort"])
        .arg(lab.path("lazy.qcow2"))
        .output()
        .unwrap()
        .status;
    assert!(!status.success(), "qemu-io was meant to die");
    let image = Image::load(&lab.path("lazy.qcow2"));
    assert!(image.header().unwrap().is_dirty());
    let report = image.check(CheckMode::RepairAll).unwrap();
    assert!(
        report.is_clean() && report.corruptions_fixed > 0,
        "{report:?}"
    );
    assert!(!image.header().unwrap().is_dirty());
    image.save(&lab.path("lazy.qcow2"));
    assert_eq!(lab.status(&["check", "lazy.qcow2"]), 0);
    lab.qemu_io(
        "lazy.qcow2",
        &["read -P 7 1M 5M", "read -P 0 0 1M", "write -P 8 8M 4M"],
    );
    assert_eq!(lab.status(&["check", "lazy.qcow2"]), 0);
}
