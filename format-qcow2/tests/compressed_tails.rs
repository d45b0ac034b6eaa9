//! Compressed clusters that overlap within the last sector of the earlier one: entries don't tell, the decoder does.
#![allow(clippy::unwrap_used)]

#[path = "offline/mod.rs"]
mod offline;

use block_core::image::{CheckMode, CheckReport, Progress};
use flate2::{Compress, Compression, FlushCompress};
use format_qcow2::check;
use offline::{Image, Lab, exit_status};

const C: usize = 65536;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = (1 << 54) - 1;
/// Bytes that the first cluster's stream holds as they are; their end is the second cluster's stream.
const LITERAL: usize = 300;

fn thoroughly(image: &Image, mode: CheckMode) -> CheckReport {
    let mut header = image.header().unwrap();
    let progress = Progress::new();
    let run = check::run_thoroughly(&image.child, &mut header, mode, &progress);
    futures::executor::block_on(run).unwrap()
}

fn deflate(bytes: &[u8], flush: FlushCompress) -> Vec<u8> {
    let mut out = Vec::with_capacity(C);
    let mut deflate = Compress::new_with_window_bits(Compression::best(), false, 12);
    deflate.compress_vec(bytes, &mut out, flush).unwrap();
    out
}

/// A stream for zeroes and then `literal`, which it ends with as it is.
fn around(literal: &[u8], zstd: bool) -> Vec<u8> {
    let zeroes = C - literal.len();
    let mut stream;
    if zstd {
        let head = |size: usize, kind: u32, last: u32| {
            let head = last | kind << 1 | (size as u32) << 3;
            head.to_le_bytes()[..3].to_vec()
        };
        // A single segment of 65536 bytes; the field holds 256 less.
        stream = vec![0x28, 0xb5, 0x2f, 0xfd, 0x60];
        stream.extend(((C - 256) as u16).to_le_bytes());
        stream.extend(head(zeroes, 1, 0));
        stream.push(0);
        stream.extend(head(literal.len(), 0, 1));
    } else {
        stream = deflate(&vec![0; zeroes], FlushCompress::Full);
        let len = literal.len() as u16;
        stream.push(1);
        stream.extend(len.to_le_bytes());
        stream.extend((!len).to_le_bytes());
    }
    stream.extend(literal);
    stream
}

/// An image with two compressed clusters, of which the second lies in the end of the first, and both of which can be read. Gives where it
/// begins as well.
fn overlapped(lab: &Lab, zstd: bool) -> (Image, u64, usize) {
    let kind = if zstd { "zstd" } else { "zlib" };
    let options = format!("compression_type={kind}");
    lab.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-o", &options, "a.qcow2", "4M",
    ]);
    lab.qemu_io(
        "a.qcow2",
        &[
            "write -c -P 3 0 64k",
            "write -c -P 4 64k 64k",
            "write -P 5 1M 64k",
        ],
    );
    let image = Image::load(&lab.path("a.qcow2"));
    let l2 = image.get64(image.get64(40)) & OFFSET;
    let place = image.get64(l2) & OFFSET;
    assert_eq!(place % 512, 0);
    let second = if zstd {
        zstd::bulk::compress(&vec![0x55; C], 1).unwrap()
    } else {
        deflate(&vec![0x55; C], FlushCompress::Finish)
    };
    let mut literal: Vec<u8> = (0..LITERAL - second.len()).map(|n| n as u8).collect();
    literal.extend(&second);
    let first = around(&literal, zstd);
    assert!(first.len() <= 512, "one sector");
    image.put(place, &first);
    let inside = first.len() - second.len();
    image.put64(l2, COMPRESSED | place);
    image.put64(l2 + 8, COMPRESSED | (place + inside as u64));
    (image, l2, first.len())
}

fn disk(lab: &Lab, image: &Image) -> Vec<u8> {
    image.save(&lab.path("b.qcow2"));
    lab.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "b.qcow2", "b.raw"]);
    std::fs::read(lab.path("b.raw")).unwrap()
}

#[test]
fn overlaps_in_a_last_sector_are_found_and_each_cluster_gets_its_own_bytes() {
    let Some(lab) = Lab::new() else { return };
    for zstd in [false, true] {
        let (image, l2, len) = overlapped(&lab, zstd);
        let before = disk(&lab, &image);
        assert!(before[C..2 * C].iter().all(|byte| *byte == 0x55));
        assert!(before[..C - LITERAL].iter().all(|byte| *byte == 0));
        // What entries say is all right: a plain check and qemu-img see nothing.
        assert_eq!(exit_status(&image.check(CheckMode::ReadOnly).unwrap()), 0);
        assert_eq!(lab.status(&["check", "-f", "qcow2", "b.qcow2"]), 0);

        let found = thoroughly(&image, CheckMode::ReadOnly);
        assert_eq!(exit_status(&found), 2, "{found:?}");
        assert_eq!(found.corruptions, 1, "{found:?}");
        let text = &found.findings[0].message;
        assert!(text.contains("compressed clusters overlap"), "{text}");
        assert!(text.contains("0x0") && text.contains("0x10000"), "{text}");
        let ranges: Vec<_> = found
            .affected
            .iter()
            .map(|at| (at.start, at.length))
            .collect();
        assert_eq!(ranges, [(0, C as u64), (C as u64, C as u64)]);

        // A repair of everything looks for it without being asked.
        let repaired = image.check(CheckMode::RepairAll).unwrap();
        assert_eq!(exit_status(&repaired), 0, "{repaired:?}");
        assert!(repaired.corruptions_fixed >= 1, "{repaired:?}");
        assert!(repaired.affected.iter().all(|at| at.separated));
        assert_eq!(exit_status(&thoroughly(&image, CheckMode::ReadOnly)), 0);
        assert!(
            disk(&lab, &image) == before,
            "a victim's bytes have changed"
        );
        assert_eq!(lab.status(&["check", "-f", "qcow2", "b.qcow2"]), 0);
        let at = |index: u64| (image.get64(l2 + 8 * index) & OFFSET) as usize;
        assert!(at(0).abs_diff(at(1)) >= len, "both still share bytes");
    }
}

#[test]
fn clusters_that_are_packed_tightly_are_no_finding() {
    let Some(lab) = Lab::new() else { return };
    let mut state = 1u32;
    let bytes: Vec<u8> = (0..3 << 20)
        .map(|index| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noisy = (index >> 16) % 3 != 0 && index % 5 == 0;
            if noisy {
                (state >> 24) as u8
            } else {
                (index >> 9) as u8
            }
        })
        .collect();
    std::fs::write(lab.path("a.raw"), &bytes).unwrap();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=4k",
    ] {
        lab.qemu_img(&[
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "a.raw", "a.qcow2",
        ]);
        let image = Image::load(&lab.path("a.qcow2"));
        for mode in [CheckMode::ReadOnly, CheckMode::RepairAll] {
            let report = thoroughly(&image, mode);
            assert_eq!(exit_status(&report), 0, "{options}: {report:?}");
            assert!(report.compressed_clusters > 0, "{options}");
        }
    }
}

#[test]
fn compressed_data_that_cant_be_read_is_a_check_error() {
    let Some(lab) = Lab::new() else { return };
    let (image, l2, _) = overlapped(&lab, false);
    let place = image.get64(l2) & OFFSET;
    image.fail_reads(place..place + 1);
    let report = thoroughly(&image, CheckMode::ReadOnly);
    assert_eq!(exit_status(&report), 1, "{report:?}");
    assert_eq!(report.corruptions, 0, "{report:?}");
}
