//! Images that the installed tools make.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, Options};

use super::bench::Bench;
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    pattern::stamped,
    stack::{NONE, lacks, probe, same},
};

/// Options of `qemu-img create`, some of which a format may not know.
const VARIANTS: [&str; 10] = [
    "",
    "cluster_size=512",
    "cluster_size=2M",
    "compat=0.10",
    "refcount_bits=1",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc",
    "compression_type=zstd",
];

/// What qemu-io does to a new image of 4 MiB and some.
const WRITES: [&str; 7] = [
    "write -P 0x11 0 200k",
    "write -P 0x22 1M 64k",
    "write -P 0x33 1234432 1536",
    "write -z 65536 65536",
    "write -z -u 1M 4k",
    "discard 128k 64k",
    "write -P 0x44 4194304 1024",
];

pub(super) fn cases() -> Vec<Case> {
    let interop = Group::Interop;
    let mut cases: Vec<Case> = VARIANTS
        .into_iter()
        .map(|variant| {
            let name = match variant {
                "" => "defaults".to_owned(),
                other => other.replace(['=', '_', '.'], "-"),
            };
            Case::new(
                interop,
                format!("interop-image-from-qemu-with-{name}"),
                format!(
                    "an image that qemu-img made with '{variant}' and qemu-io wrote is read alike, can be written, and is \
                     clean and the same for both afterwards"
                ),
                move |scene| made(scene, variant),
            )
        })
        .collect();
    cases.push(Case::new(
        interop,
        "interop-compressed-image-from-qemu",
        "an image that qemu-img compressed is read alike; after writes into its clusters qemu-img finds it clean and the \
         same",
        compressed,
    ));
    cases.push(Case::new(
        interop,
        "interop-chain-from-qemu",
        "a chain of three that qemu-img made, the layers of different length, is read alike, and its top can be written",
        chain,
    ));
    cases.push(Case::new(
        interop,
        "interop-snapshots-from-qemu-are-not-written-beside",
        "an image with internal snapshots is read, and refuses to be written as long as that isn't supported",
        snapshots,
    ));
    cases.push(Case::new(
        interop,
        "interop-image-that-qemu-resized",
        "after qemu-img has grown an image that was written here, both read the same, and zeroes behind the old end",
        resized,
    ));
    cases
}

async fn made(scene: Arc<Scene>, variant: &'static str) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let size = "4195840";
    let said = bench.create("theirs", variant, &[], Some(size))?;
    if said.status != Some(0) {
        let why = format!("qemu-img knows no '{variant}' for the format");
        return Ok(Verdict::NotCovered(why));
    }
    bench.io("theirs", &WRITES)?;
    bench.import("theirs")?;
    let opened = bench.open("theirs").await;
    let (node, handle) = match opened {
        Ok(opened) => opened,
        Err(Failure(text)) if text.contains("not supported") || text.contains("upport") => {
            return Ok(Verdict::NotCovered(text));
        }
        Err(failure) => return Err(failure),
    };
    let theirs = bench.seen_by_qemu("theirs")?;
    let ours = crate::stack::content(&scene.lab.graph, &node).await?;
    same(&ours, &theirs, "qemu's image")?;
    let length = handle.length();
    if node.driver().capabilities().contains(Capabilities::WRITE) {
        for at in [512, 100 * 1024, (1 << 20) + 512, (2 << 20) + 1024] {
            handle.write(at, stamped(1, at, at, 3072), NONE).await?;
        }
        handle.write_zeroes(3 << 20, 100 << 10, NONE).await?;
        handle.discard(128 << 10, 64 << 10).await?;
        handle.write(length - 512, vec![9; 512], NONE).await?;
    }
    bench.close(node, handle).await?;
    bench.export("theirs")?;
    bench.check("theirs")?;
    bench.agree("theirs", "after writes on both sides").await?;
    Ok(Verdict::Passed)
}

async fn compressed(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    // Sectors that compress, and some that don't.
    let mut plain = stamped(1, 1, 0, 2 << 20).to_vec();
    let mut number = 1_u64;
    for byte in &mut plain[300 << 10..500 << 10] {
        number = number
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = (number >> 56) as u8;
    }
    plain[600 << 10..800 << 10].fill(0);
    std::fs::write(bench.path("plain.raw"), &plain).map_err(|error| Failure(error.to_string()))?;
    let said = bench.img(&[
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        bench.format(),
        &bench.path("plain.raw"),
        &bench.path("packed"),
    ])?;
    if said.status != Some(0) {
        return Ok(Verdict::NotCovered(
            "qemu-img doesn't compress the format".into(),
        ));
    }
    bench.import("packed")?;
    let (node, handle) = bench.open("packed").await?;
    let ours = crate::stack::content(&scene.lab.graph, &node).await?;
    same(&ours, &plain, "what qemu compressed")?;
    if !node.driver().capabilities().contains(Capabilities::WRITE) {
        return Ok(Verdict::Passed);
    }
    for at in [1024_u64, 65536 - 512, 310 << 10, 700 << 10] {
        let data = stamped(2, at, at / 512 * 512, 2048);
        let from = (at / 512 * 512) as usize;
        plain[from..from + 2048].copy_from_slice(&data);
        handle.write(from as u64, data, NONE).await?;
    }
    handle.write_zeroes(1 << 20, 128 << 10, NONE).await?;
    plain[1 << 20..(1 << 20) + (128 << 10)].fill(0);
    bench.close(node, handle).await?;
    bench.export("packed")?;
    bench.check("packed")?;
    let seen = bench
        .agree("packed", "after writes into compressed clusters")
        .await?;
    same(&seen, &plain, "the disk")?;
    Ok(Verdict::Passed)
}

async fn chain(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let (capabilities, _) = probe(&scene).await?;
    if let Some(verdict) = lacks(capabilities, Capabilities::BACKING) {
        return Ok(verdict);
    }
    if !scene.lab.records_backing(bench.format()) {
        let why = "images of the format don't name their backing files";
        return Ok(Verdict::NotCovered(why.into()));
    }
    let format = bench.format();
    let names = ["chain0", "chain1", "chain2"];
    for (n, size) in [(0, "1M"), (1, "2M"), (2, "3M")] {
        let made = if n == 0 {
            bench.create(names[n], "", &[], Some(size))?
        } else {
            let over = ["-b", names[n - 1], "-F", format];
            let with_size = bench.create(names[n], "", &over, Some(size))?;
            if with_size.status == Some(0) {
                with_size
            } else {
                bench.create(names[n], "", &over, None)?
            }
        };
        if made.status != Some(0) {
            return Err(format!("qemu-img create: {}", made.text).into());
        }
        // Before the next one is made: some formats take note of what is below.
        let pattern = format!("write -P {} {} 192k", 0x51 + n, n * 100 * 1024);
        let hole = format!("write -z {} 64k", n * 65536 + 256 * 1024);
        bench.io(names[n], &[&pattern, &hole])?;
    }
    for name in names {
        bench.import(name)?;
    }
    let before = bench.agree("chain2", "qemu's chain").await?;
    let (node, handle) = bench.open("chain2").await?;
    let mut expected = before;
    for at in [512_u64, 300 << 10, (1 << 20) - 512] {
        let len = 1024.min(handle.length() - at);
        let data = stamped(3, at, at, len);
        expected[at as usize..(at + len) as usize].copy_from_slice(&data);
        handle.write(at, data, NONE).await?;
    }
    bench.close(node, handle).await?;
    bench.export("chain2")?;
    bench.check("chain2")?;
    let seen = bench.agree("chain2", "after writes into the top").await?;
    same(&seen, &expected, "the chain")?;
    Ok(Verdict::Passed)
}

async fn snapshots(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let made = bench.create("snapped", "", &[], Some("1M"))?;
    if made.status != Some(0) {
        return Err(format!("qemu-img create: {}", made.text).into());
    }
    bench.io("snapped", &["write -P 5 0 128k"])?;
    let said = bench.snapshot("snapped", "-c", "first")?;
    if said.status != Some(0) {
        return Ok(Verdict::NotCovered(
            "the format has no internal snapshots".into(),
        ));
    }
    bench.io("snapped", &["write -P 6 64k 128k"])?;
    let disk = bench.import("snapped")?;
    // Who can't write beside a snapshot can't check such an image either.
    scene.leaves_damage();
    let theirs = bench.seen_by_qemu("snapped")?;
    let before = disk.content().to_bytes();
    let lab = &scene.lab;
    let options = Options::new().with("read-only", true);
    let node = lab.open(bench.format(), "snapped", None, &options).await?;
    let ours = crate::stack::content(&lab.graph, &node).await?;
    lab.graph.release(&node).await?;
    same(&ours, &theirs, "an image with snapshots")?;
    // Written beside a snapshot, shared clusters have to be copied; whoever can't do that has to refuse.
    match lab
        .open(bench.format(), "snapped", None, &Options::new())
        .await
    {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            if disk.content().to_bytes() != before {
                return Err("it was refused, and changed".into());
            }
        }
        Err(error) => return Err(error.into()),
        Ok(node) => {
            let handle = crate::stack::writer(&lab.graph, &node, "guest")?;
            let written = handle.write(96 << 10, vec![7; 1024], NONE).await;
            drop(handle);
            lab.graph.release(&node).await?;
            if written.is_ok() {
                bench.export("snapped")?;
                bench.check("snapped")?;
                let said = bench.snapshot("snapped", "-a", "first")?;
                if said.status != Some(0) {
                    return Err(format!("qemu-img snapshot: {}", said.text).into());
                }
                let back = bench.seen_by_qemu("snapped")?;
                if back[..128 << 10].iter().any(|byte| *byte != 5) {
                    return Err("a write changed what a snapshot holds".into());
                }
            }
        }
    }
    Ok(Verdict::Passed)
}

async fn resized(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let lab = &scene.lab;
    lab.create(bench.format(), "grown", 1 << 20, &scene.format.create, None)
        .await?;
    let (node, handle) = bench.open("grown").await?;
    handle
        .write(
            (1 << 20) - 4096,
            stamped(1, 1, (1 << 20) - 4096, 4096),
            NONE,
        )
        .await?;
    bench.close(node, handle).await?;
    bench.export("grown")?;
    let said = bench.resize("grown", "40M")?;
    if said.status != Some(0) {
        return Ok(Verdict::NotCovered(
            "qemu-img doesn't resize the format".into(),
        ));
    }
    bench.io("grown", &["write -P 3 30M 64k"])?;
    bench.import("grown")?;
    let seen = bench.agree("grown", "what qemu grew").await?;
    if seen.len() != 40 << 20 || seen[1 << 20..30 << 20].iter().any(|byte| *byte != 0) {
        return Err("the new part isn't zero".into());
    }
    let (node, handle) = bench.open("grown").await?;
    handle.write((40 << 20) - 512, vec![8; 512], NONE).await?;
    handle.write(1 << 20, vec![9; 512], NONE).await?;
    bench.close(node, handle).await?;
    bench.export("grown")?;
    bench.check("grown")?;
    bench
        .agree("grown", "after a write into what qemu grew")
        .await?;
    Ok(Verdict::Passed)
}
