//! Damages of the header, its extensions, snapshots, bitmaps, extended L2 entries, data files, and clusters that are used
//! twice: what is done to which image, and what comes of it. Here are the images and the ways to reach into them; the damages are in
//! `refused`, `broken` and `aliases`.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

mod aliases;
mod broken;
mod refused;

use crate::{
    damages::{C, COPIED, sample},
    offline::{Image, Lab},
};

pub use self::{aliases::ALIASES, broken::BROKEN, refused::REFUSED};

const COMPRESSED: u64 = 1 << 62;
const MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The images, by number.
pub const BASES: &[fn(&Lab) -> Image] =
    &[sample, snapshots, bitmaps, extended, data_file, luks, zstd];
const SAMPLE: usize = 0;
const SNAPSHOTS: usize = 1;
const BITMAPS: usize = 2;
const EXTENDED: usize = 3;
const DATA_FILE: usize = 4;
const LUKS: usize = 5;
const ZSTD: usize = 6;

/// Name, image, damage, field that the refusal names.
pub type Refused = (&'static str, usize, fn(&Image), &'static str);
/// Name, image, damage, a part of what the check says, whether it can be repaired.
pub type Broken = (&'static str, usize, fn(&Image), &'static str, bool);

fn make(lab: &Lab, options: &[&str], steps: &[&str]) -> Image {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(options);
    args.extend(["base.qcow2", "4M"]);
    lab.qemu_img(&args);
    for step in steps {
        match step.strip_prefix("I ") {
            Some(step) => {
                lab.qemu_img(&step.split(' ').collect::<Vec<_>>());
            }
            None => lab.qemu_io("base.qcow2", &[step]),
        }
    }
    Image::load(&lab.path("base.qcow2"))
}

fn snapshots(lab: &Lab) -> Image {
    make(
        lab,
        &[],
        &[
            "write -P 1 0 1M",
            "write -P 9 -c 2M 64k",
            "I snapshot -c one base.qcow2",
            "write -P 2 0 256k",
            "I snapshot -c two base.qcow2",
            "write -P 3 1M 64k",
        ],
    )
}

fn bitmaps(lab: &Lab) -> Image {
    make(
        lab,
        &[],
        &[
            "write -P 1 0 1M",
            "I bitmap --add -g 64k base.qcow2 b0",
            "I bitmap --add -g 4k base.qcow2 b1",
            "write -P 2 1M 1M",
        ],
    )
}

fn extended(lab: &Lab) -> Image {
    make(
        lab,
        &["-o", "extended_l2=on"],
        &[
            "write -P 1 0 1M",
            "write -P 2 1M 2k",
            "write -z 1028k 4k",
            "write -z 2M 64k",
            "write -P 4 -c 3M 64k",
        ],
    )
}

fn data_file(lab: &Lab) -> Image {
    make(
        lab,
        &["-o", "data_file=data.raw"],
        &["write -P 1 0 1M", "write -z 512k 64k"],
    )
}

fn luks(lab: &Lab) -> Image {
    make(
        lab,
        &[
            "--object",
            "secret,id=s,data=letmein",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ],
        &[],
    )
}

fn zstd(lab: &Lab) -> Image {
    make(
        lab,
        &["-o", "compression_type=zstd"],
        &["write -P 3 -c 0 64k"],
    )
}

fn get32(image: &Image, at: u64) -> u32 {
    (image.get64(at) >> 32) as u32
}

fn put32(image: &Image, at: u64, value: u32) {
    image.put(at, &value.to_be_bytes());
}

/// Where the active L1 table is.
fn l1(image: &Image) -> u64 {
    image.get64(40)
}

/// Where the first L2 table of an L1 table is.
fn l2_of(image: &Image, l1: u64) -> u64 {
    image.get64(l1) & MASK
}

fn l2(image: &Image) -> u64 {
    l2_of(image, l1(image))
}

/// Where the snapshot table is.
fn table(image: &Image) -> u64 {
    image.get64(64)
}

/// Where the header extension of a type is.
fn extension(image: &Image, kind: u32) -> u64 {
    let mut at = u64::from(get32(image, 100));
    while get32(image, at) != kind {
        assert_ne!(get32(image, at), 0, "no extension {kind:#x}");
        at += 8 + u64::from(get32(image, at + 4)).next_multiple_of(8);
    }
    at
}

const BITMAPS_EXT: u32 = 0x2385_2875;
const LUKS_EXT: u32 = 0x0537_be77;
const FEATURES_EXT: u32 = 0x6803_f857;

/// Where the bitmap directory is.
fn directory(image: &Image) -> u64 {
    image.get64(extension(image, BITMAPS_EXT) + 24)
}

/// Where the table of the first bitmap is.
fn bitmap_table(image: &Image) -> u64 {
    image.get64(directory(image))
}

fn flip(image: &Image, at: u64, bits: u64) {
    image.put64(at, image.get64(at) ^ bits);
}

/// A snapshot table of one entry with `extra` bytes of extra data.
fn with_extra(image: &Image, extra: u32) {
    let at = table(image);
    let data = image.data();
    let old = &data[at as usize..at as usize + 72];
    let mut entry = old[..40].to_vec();
    entry[36..].copy_from_slice(&extra.to_be_bytes());
    let mut extras = old[40..64].to_vec();
    extras.resize(extra as usize, 0xee);
    entry.extend(extras);
    // "1", "one"
    entry.extend(&old[64..68]);
    entry.resize(entry.len().next_multiple_of(8), 0);
    // The second entry follows.
    let second = &data[at as usize + 72..at as usize + 144];
    entry.extend(second);
    image.put(at, &entry);
}
