//! Compressed images beside the installed `qemu-img`: readable by both, in guest order, and not larger than its own.

mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use support::{Alone, qemu_is_installed};

/// Bytes of all sorts: text with repetitions far and near, tables, program code, noise and holes.
fn corpus(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let program = fs::read(env!("CARGO_BIN_EXE_blk")).unwrap();
    let words: Vec<String> = (0..3000)
        .map(|_| format!("{:x}", next() >> (next() % 60)))
        .collect();
    let mut bytes = Vec::with_capacity(len + (1 << 20));
    while bytes.len() < len {
        match next() % 8 {
            0..3 => {
                while bytes.len() % 300_000 > 300 {
                    let word = &words[(next() % 3000) as usize];
                    bytes.extend_from_slice(word.as_bytes());
                    bytes.push(if next() % 9 == 0 { b'\n' } else { b' ' });
                }
                bytes.push(b'.');
            }
            3 => bytes.extend((0..40_000u32).flat_map(|n| (n * n).to_le_bytes())),
            4..6 => {
                let at = next() as usize % (program.len() - 400_000);
                bytes.extend_from_slice(&program[at..at + 400_000]);
            }
            6 => bytes.extend((0..10_000).flat_map(|_| next().to_le_bytes())),
            _ => bytes.resize(bytes.len() + 150_000, 0),
        }
    }
    bytes.truncate(len);
    bytes
}

fn qemu_img(dir: &Path, args: &[&str]) {
    let status = Command::new("qemu-img")
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "qemu-img {args:?}");
}

#[test]
fn compressed_images_are_as_small_as_those_of_qemu_img() {
    if !qemu_is_installed() {
        return;
    }
    let here = Alone::new();
    here.write("a.raw", &corpus(12 << 20));
    let dir = here.path("");
    let mut wrong = Vec::new();
    for codec in ["zlib", "zstd"] {
        for cluster in ["4k", "64k", "2M"] {
            let options = format!("compression_type={codec},cluster_size={cluster}");
            let convert = [
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, "a.raw",
            ];
            qemu_img(&dir, &[&convert[..], &["theirs.qcow2"]].concat());
            for order in [&[][..], &["-W"][..], &["-m", "1"][..]] {
                let args = [&convert[..], order, &["ours.qcow2"]].concat();
                let (status, _, err) = here.blk(&args);
                assert_eq!(status, 0, "{err}");
                qemu_img(&dir, &["check", "-q", "-f", "qcow2", "ours.qcow2"]);
                qemu_img(
                    &dir,
                    &[
                        "compare",
                        "-q",
                        "-f",
                        "qcow2",
                        "-F",
                        "raw",
                        "ours.qcow2",
                        "a.raw",
                    ],
                );
                let len = |name: &str| fs::metadata(here.path(name)).unwrap().len();
                let (ours, theirs) = (len("ours.qcow2"), len("theirs.qcow2"));
                let line = format!("{options} {order:?}: {ours} bytes, {theirs} of qemu-img's");
                eprintln!("{line}");
                // In any order the tails of a few more clusters stay empty, and how many is luck.
                let more = if order.contains(&"-W") { 25 } else { 100 };
                if ours > theirs + theirs / more {
                    wrong.push(line);
                }
            }
            let (status, _, err) = here.blk(&[
                "compare",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "theirs.qcow2",
                "a.raw",
            ]);
            assert_eq!(status, 0, "{err}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
