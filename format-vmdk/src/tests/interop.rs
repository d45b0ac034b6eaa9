//! Side by side with the installed qemu tools. Without them these tests have nothing to compare with and say so.

use block_core::image::{CheckMode, Progress};
use futures::executor::block_on;
use serde_json::Value;

use super::{Numbers, World, has_qemu, permit, read, run, write};

const GRAIN: u64 = 65536;

macro_rules! need_qemu {
    () => {
        if !has_qemu() {
            eprintln!("qemu-img isn't installed: nothing to compare with");
            return;
        }
    };
}

/// Bytes with runs of data and holes.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(10_000) {
        if numbers.below(3) != 0 {
            let byte = numbers.next() as u8;
            chunk.fill(byte);
        }
    }
    bytes
}

/// The same file with the digits of its CID (and their number) out of the way.
fn without_cid(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    text.lines()
        .filter(|line| !line.starts_with("CID="))
        .map(|line| line.trim_end_matches('\0').to_owned() + "\n")
        .collect()
}

#[test]
fn new_images_are_byte_for_byte_as_qemus() {
    need_qemu!();
    for (index, options) in [
        "size=64M",
        "size=3G,zeroed_grain=on,adapter_type=lsilogic,hwversion=8,toolsversion=77",
        "size=1000000,compat6=on",
        "size=1M,subformat=monolithicFlat,adapter_type=buslogic",
        "size=0",
        "size=300G,adapter_type=legacyESX",
    ]
    .into_iter()
    .enumerate()
    {
        let (ours, theirs) = (World::new(), World::new());
        let name = ["disk.vmdk", "disk"][index % 2];
        ours.create(name, options);
        let (status, text) = theirs.qemu_img(&["create", "-q", "-f", "vmdk", "-o", options, name]);
        assert_eq!(status, 0, "{text}");
        let (mut a, mut b) = (ours.bytes(name), theirs.bytes(name));
        if a.starts_with(b"KDMV") {
            let descriptor = 512..512 + 20 * 512;
            let texts = [&a, &b].map(|bytes| without_cid(&bytes[descriptor.clone()]));
            assert_eq!(texts[0], texts[1], "{options}");
            a.drain(descriptor.clone());
            b.drain(descriptor);
            assert!(a == b, "{options}: tables differ");
        } else {
            assert_eq!(without_cid(&a), without_cid(&b), "{options}");
            for flat in ["disk-flat", "disk-flat.vmdk"] {
                let lens = [&ours, &theirs].map(|world| {
                    std::fs::metadata(world.path(flat))
                        .map(|data| data.len())
                        .ok()
                });
                assert_eq!(lens[0], lens[1], "{options}");
            }
        }
    }
}

#[test]
fn what_qemu_wrote_is_read_and_what_we_write_qemu_reads() {
    need_qemu!();
    for options in [
        "subformat=monolithicSparse",
        "subformat=monolithicFlat",
        "subformat=monolithicSparse,zeroed_grain=on",
    ] {
        let world = World::new();
        let mut model = content(5 << 20, 3);
        world.put("in.raw", &model);
        let args = [
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            options,
            "in.raw",
            "disk.vmdk",
        ];
        assert_eq!(world.qemu_img(&args).0, 0);
        let handle = world.open("disk.vmdk");
        assert_eq!(read(&handle, 0, 5 << 20), model, "{options}");
        let mut numbers = Numbers(11);
        for round in 0..50_u64 {
            let offset = numbers.below(4 << 20);
            let len = 1 + numbers.below(150_000);
            model[offset as usize..(offset + len) as usize].fill(round as u8);
            write(&handle, offset, vec![round as u8; len as usize]);
        }
        block_on(handle.close()).unwrap();
        world.put("model.raw", &model);
        let (status, text) = world.qemu_img(&["check", "-f", "vmdk", "disk.vmdk"]);
        assert_eq!(
            (status, text.trim()),
            (0, "No errors were found on the image.")
        );
        let args = [
            "compare",
            "-f",
            "raw",
            "-F",
            "vmdk",
            "model.raw",
            "disk.vmdk",
        ];
        assert_eq!(
            world.qemu_img(&args).1.trim(),
            "Images are identical.",
            "{options}"
        );
        // And once more the other way round.
        world.qemu_io(
            "disk.vmdk",
            &["write -P 9 1000000 300000", "write -z 2M 192k"],
        );
        model[1_000_000..1_300_000].fill(9);
        model[2 << 20..(2 << 20) + 196_608].fill(0);
        let handle = world.open("disk.vmdk");
        assert_eq!(read(&handle, 0, 5 << 20), model, "{options}");
        let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    }
}

#[test]
fn chains_of_three_are_read_alike() {
    need_qemu!();
    let world = World::new();
    let mut model = vec![0; 4 << 20];
    for (index, name) in ["a.vmdk", "b.vmdk", "c.vmdk"].into_iter().enumerate() {
        // Made by turns.
        let parent = index
            .checked_sub(1)
            .map(|below| ["a.vmdk", "b.vmdk"][below]);
        let options = parent.map_or_else(
            || "size=4M".to_owned(),
            |parent| format!("size=4M,backing_file={parent},backing_fmt=vmdk"),
        );
        if index == 1 {
            let args = ["create", "-q", "-f", "vmdk", "-o", &options, name];
            assert_eq!(world.qemu_img(&args).0, 0);
        } else {
            world.create(name, &options);
        }
        let (offset, byte) = (index as u64 * 500_000 + 77, index as u8 + 1);
        model[offset as usize..offset as usize + 700_000].fill(byte);
        if index == 1 {
            let command = format!("write -P {byte} {offset} 700000");
            world.qemu_io(name, &[&command]);
        } else {
            let handle = world.open(name);
            write(&handle, offset, vec![byte; 700_000]);
            block_on(handle.close()).unwrap();
        }
    }
    world.put("model.raw", &model);
    let args = ["compare", "-f", "raw", "-F", "vmdk", "model.raw", "c.vmdk"];
    assert_eq!(world.qemu_img(&args).1.trim(), "Images are identical.");
    let handle = world.open("c.vmdk");
    assert_eq!(read(&handle, 0, 4 << 20), model);
}

#[test]
fn the_format_specific_information_is_qemus() {
    need_qemu!();
    let world = World::new();
    world.create("base.vmdk", "size=64M");
    world.create("top.vmdk", "size=64M,backing_file=base.vmdk");
    world.create("flat.vmdk", "size=1M,subformat=monolithicFlat");
    for name in ["base.vmdk", "top.vmdk", "flat.vmdk"] {
        let path = world.path(name);
        let (status, text) = world.qemu_img(&["info", "--output=json", &path]);
        assert_eq!(status, 0, "{text}");
        let theirs: Value = serde_json::from_str(&text).unwrap();
        let handle = world.try_open(name, "read-only=on", permit()).unwrap();
        let ours = block_on(handle.info()).unwrap();
        let (kind, data) = ours.format_specific.unwrap();
        assert_eq!(theirs["format-specific"]["type"], kind);
        let as_text = |value: &Value| serde_json::to_string_pretty(value).unwrap();
        assert_eq!(
            as_text(&theirs["format-specific"]["data"]),
            as_text(&data),
            "{name}"
        );
        assert_eq!(theirs["cluster-size"].as_u64(), ours.cluster_size);
        assert_eq!(
            theirs["backing-filename"].as_str(),
            ours.backing_filename.as_deref()
        );
        assert_eq!(
            theirs["backing-filename-format"].as_str(),
            ours.backing_format.as_deref()
        );
    }
}

#[test]
fn block_status_is_as_qemu_map_has_it() {
    need_qemu!();
    let world = World::new();
    world.create("base.vmdk", "size=4M");
    world.qemu_io("base.vmdk", &["write -P 1 0 200k"]);
    world.create("top.vmdk", "size=4M,backing_file=base.vmdk,zeroed_grain=on");
    world.qemu_io("top.vmdk", &["write -P 2 1M 64k", "write -z 64k 64k"]);
    let (status, text) = run(
        world.dir.path(),
        "qemu-img",
        &["map", "--output=json", "-f", "vmdk", "top.vmdk"],
    );
    assert_eq!(status, 0, "{text}");
    let handle = world.open("top.vmdk");
    let theirs: Vec<Value> = serde_json::from_str(&text).unwrap();
    for extent in theirs {
        let (start, len) = (
            extent["start"].as_u64().unwrap(),
            extent["length"].as_u64().unwrap(),
        );
        let mut at = start;
        while at < start + len {
            let ours = block_on(handle.block_status(at, start + len - at)).unwrap();
            assert_eq!(
                extent["zero"].as_bool(),
                Some(ours.is_zero()),
                "at {at}: {extent}"
            );
            if let Some(offset) = extent["offset"].as_u64() {
                assert_eq!(ours.mapped.unwrap().1, offset + (at - start), "at {at}");
            }
            at += ours.len;
        }
    }
    assert_eq!(GRAIN, 65536);
}
