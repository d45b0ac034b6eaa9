//! Images that are made here, as the installed tools see them.

use std::sync::Arc;

use block_core::{
    Capabilities, RequestFlags,
    driver::Truncate,
    image::{CheckMode, Progress},
};
use jobs::{CommitOptions, JobManager, StreamOptions};

use super::bench::Bench;
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    pattern::stamped,
    stack::{Load, NONE, Stack, content, layer, same},
};

pub(super) fn cases() -> Vec<Case> {
    let interop = Group::Interop;
    vec![
        Case::new(
            interop,
            "interop-crowded-image-for-qemu",
            "an image after a crowd of guests is clean and the same for qemu-img, and is so again after each turn of \
             qemu-io and of guests here",
            back_and_forth,
        ),
        Case::new(
            interop,
            "interop-patterns-for-qemu-io",
            "what is written here in every way there is qemu-io reads with its patterns",
            patterns,
        ),
        Case::new(
            interop,
            "interop-power-cut-image-for-qemu",
            "an image whose power was cut under load has no corruption for qemu-img either, counts the same leaks, and \
             keeps its content when qemu-img repairs it",
            cut,
        ),
        Case::new(
            interop,
            "interop-chain-after-jobs-for-qemu",
            "after a stream to a base and a commit, qemu-img follows the headers to the same content",
            jobs_done,
        ),
        Case::new(
            interop,
            "interop-resized-image-for-qemu",
            "an image that was grown, written and shrunk here has its length and content for qemu-img",
            resized,
        ),
        Case::new(
            interop,
            "interop-info-for-qemu",
            "size, cluster size and backing file of an image that is made here are the same in qemu-img info",
            info,
        ),
    ]
}

async fn back_and_forth(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let stack = match Stack::new(&scene, 1, Capabilities::empty()).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let load = Load::start(&stack, 4);
    load.more(200).await?;
    load.stop().await?;
    let (unit, size) = (stack.unit, stack.size);
    stack.finish(&layer(0), None).await?;
    let name = layer(0);
    for turn in 0..3_u64 {
        bench.export(&name)?;
        bench.check(&name)?;
        bench.agree(&name, "after a turn here").await?;
        let at = (turn * 3 + 1) * unit + 512;
        let write = format!("write -P {} {at} {}", turn + 1, 2 * unit);
        let zero = format!("write -z {} {unit}", (turn + 8) * unit);
        let discard = format!("discard {} {unit}", (turn + 12) * unit);
        bench.io(&name, &[&write, &zero, &discard])?;
        bench.check(&name)?;
        bench.import(&name)?;
        bench.agree(&name, "after a turn of qemu-io").await?;
        let (node, handle) = bench.open(&name).await?;
        for k in 0..6 {
            let at = (turn + 3 * k) * unit + 1024;
            if at + unit <= size {
                handle.write(at, stamped(1, turn, at, unit), NONE).await?;
            }
            handle
                .discard((turn + 3 * k) * unit, unit.min(size))
                .await?;
        }
        bench.close(node, handle).await?;
    }
    bench.export(&name)?;
    bench.check(&name)?;
    bench.agree(&name, "at the end").await?;
    Ok(Verdict::Passed)
}

async fn patterns(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let lab = &scene.lab;
    let options = &scene.format.create;
    lab.create(bench.format(), "ours", 4 << 20, options, None)
        .await?;
    let (node, handle) = bench.open("ours").await?;
    let capabilities = node.driver().capabilities();
    let mut reads = Vec::new();
    let ways = [
        (0_u64, NONE),
        (1, RequestFlags::FUA),
        (2, RequestFlags::WRITE_COMPRESSED),
    ];
    for (n, flags) in ways {
        if flags == RequestFlags::WRITE_COMPRESSED
            && !capabilities.contains(Capabilities::COMPRESSED)
        {
            continue;
        }
        let at = n << 20;
        let byte = 0x61 + n as u8;
        handle.write(at, vec![byte; 128 << 10], flags).await?;
        reads.push(format!("read -P {byte} {at} 64k"));
        reads.push(format!("read -P 0 {} 64k", at + (512 << 10)));
    }
    handle
        .write((3 << 20) + 512, vec![0x77; 1536], NONE)
        .await?;
    reads.push(format!("read -P 0x77 {} 1536", (3 << 20) + 512));
    reads.push(format!("read -P 0 {} 512", 3 << 20));
    let unmap = RequestFlags::MAY_UNMAP;
    handle.write_zeroes(64 << 10, 32 << 10, unmap).await?;
    reads.push("read -P 0 64k 32k".into());
    reads.push("read -P 0x61 96k 32k".into());
    bench.close(node, handle).await?;
    bench.export("ours")?;
    bench.check("ours")?;
    let commands: Vec<&str> = reads.iter().map(String::as_str).collect();
    let said = bench.io("ours", &commands)?;
    if said.contains("Pattern verification") {
        return Err(format!("qemu-io: {said}").into());
    }
    Ok(Verdict::Passed)
}

async fn cut(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let needs = Capabilities::CHECK | Capabilities::REPAIR;
    let stack = match Stack::new(&scene, 1, needs).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let disk = stack.disk(0)?;
    disk.track_durability();
    let load = Load::start(&stack, 4);
    let mut cuts = Vec::new();
    for _ in 0..3 {
        load.more(40).await?;
        cuts.push(disk.power_cut(&*scene.lab.env));
    }
    load.stop().await?;
    let oracle = stack.guest.oracle().clone();
    stack.finish(&layer(0), None).await?;
    for content in cuts {
        scene
            .lab
            .disks
            .insert(crate::storage::Disk::new("cut", content));
        bench.export("cut")?;
        let said = bench.img_on("cut", &["check", "--output=json"])?;
        let number = |key: &str| -> u64 {
            // What it found stands behind the JSON, on the other output.
            let end = said.text.rfind('}').map_or(0, |at| at + 1);
            let json: Option<serde_json::Value> = serde_json::from_str(&said.text[..end]).ok();
            json.and_then(|json| json[key].as_u64()).unwrap_or(0)
        };
        // An image that says that its refcounts are stale is only whole after its repair. Both count the same leaks before.
        let dirty = bench.is_dirty("cut")?;
        if number("corruptions") > 0 && !dirty || number("check-errors") > 0 {
            return Err(format!("qemu-img check: {}", said.text).into());
        }
        let lab = &scene.lab;
        let how = block_core::registry::OpenOptions {
            for_check: true,
            implicit: block_core::registry::ImplicitOpens::Permit,
            ..block_core::registry::OpenOptions::default()
        };
        let options = block_core::Options::new().with("read-only", true);
        let options = lab.options_for(bench.format(), "cut", None, &options);
        let node = lab
            .registry
            .open_file(&lab.graph, "cut", Some(bench.format()), options, how)
            .await?;
        let handle = crate::stack::reader(&lab.graph, &node)?;
        let report = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
        drop(handle);
        lab.graph.release(&node).await?;
        if report.leaks != number("leaks") || report.corruptions > 0 && !dirty {
            let theirs = number("leaks");
            return Err(format!("{} leaks here, {theirs} for qemu-img", report.leaks).into());
        }
        let before = bench.seen_by_qemu("cut")?;
        let known = oracle.check_known(0, &before);
        if let Some(wrong) = known.first() {
            return Err(format!("after the cut: {wrong}").into());
        }
        // Exit status 0 when all is well, 2 and 3 would say that it isn't.
        bench.img_on_ok("cut", &["check", "-r", "all"])?;
        bench.import("cut")?;
        let after = bench.agree("cut", "after qemu's repair").await?;
        same(&after, &before, "after qemu's repair")?;
    }
    Ok(Verdict::Passed)
}

async fn jobs_done(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let needs = Capabilities::BACKING | Capabilities::CHANGE_BACKING;
    let stack = match Stack::new(&scene, 4, needs).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(stack.graph());
    let top = layer(3);
    let before = content(stack.graph(), stack.top()).await?;
    let commit = CommitOptions::new(stack.top())
        .top(&stack.nodes[1])
        .base(&stack.nodes[0]);
    manager.commit(commit).await?.wait().await?;
    stack.guest.handle().flush().await?;
    for n in [0, 2, 3] {
        bench.export(&layer(n))?;
    }
    let seen = bench.seen_by_qemu(&top)?;
    same(&seen, &before, "after a commit")?;
    let stream = StreamOptions::new(stack.top()).base(&stack.nodes[0]);
    manager.stream(stream).await?.wait().await?;
    stack.finish(&top, None).await?;
    std::fs::remove_file(bench.path(&layer(2)))
        .map_err(|error| crate::case::Failure(error.to_string()))?;
    for n in [0, 3] {
        bench.export(&layer(n))?;
        bench.check(&layer(n))?;
    }
    let seen = bench.seen_by_qemu(&top)?;
    same(&seen, &before, "after a stream")?;
    let text = bench.info(&top)?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| crate::case::Failure(error.to_string()))?;
    let named = json["backing-filename"].as_str().unwrap_or_default();
    if named != layer(0) || json["backing-filename-format"].as_str() != Some(bench.format()) {
        return Err(format!("qemu-img info: {text}").into());
    }
    Ok(Verdict::Passed)
}

async fn resized(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let stack = match Stack::new(&scene, 1, Capabilities::TRUNCATE).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let name = layer(0);
    let handle = scene.lab.attach(stack.top(), "resizer")?;
    let how = Truncate::default();
    let mut expected = content(stack.graph(), stack.top()).await?;
    for length in [stack.size + 20 * stack.unit, stack.size / 2 / 512 * 512] {
        handle.truncate(length, how).await?;
        expected.resize(length as usize, 0);
        let at = length - 1024;
        let data = stamped(5, length, at, 1024);
        expected[at as usize..].copy_from_slice(&data);
        handle.write(at, data, NONE).await?;
        handle.flush().await?;
        bench.export(&name)?;
        bench.check_unclosed(&name)?;
        let seen = bench.seen_by_qemu(&name)?;
        // raw's tools round up to whole sectors, which these lengths are.
        same(&seen, &expected, &format!("resized to {length}"))?;
    }
    drop(handle);
    let graph = stack.graph().clone();
    drop(stack);
    graph.close_all().await?;
    Ok(Verdict::Passed)
}

async fn info(scene: Arc<Scene>) -> CaseResult {
    let bench = match Bench::new(&scene)? {
        Ok(bench) => bench,
        Err(verdict) => return Ok(verdict),
    };
    let (capabilities, _) = crate::stack::probe(&scene).await?;
    let names = scene.lab.records_backing(bench.format());
    let layers = if names && capabilities.contains(Capabilities::BACKING) {
        2
    } else {
        1
    };
    let stack = match Stack::new(&scene, layers, Capabilities::empty()).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    for n in 0..layers {
        bench.export(&layer(n))?;
    }
    let top = layer(layers - 1);
    let options = bench.create_options();
    let text = bench.info(&top)?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| crate::case::Failure(error.to_string()))?;
    let ours = stack.guest.handle().info().await?;
    let checks = [
        (
            "virtual-size",
            json["virtual-size"].as_u64() == Some(stack.size),
        ),
        (
            "cluster-size",
            json["cluster-size"].is_null() || json["cluster-size"].as_u64() == ours.cluster_size,
        ),
        (
            "backing-filename",
            json["backing-filename"].as_str() == ours.backing_filename.as_deref(),
        ),
    ];
    for (key, right) in checks {
        if !right {
            return Err(format!("'{key}' with -o '{options}': {text}, here {ours:?}").into());
        }
    }
    let graph = stack.graph().clone();
    drop(stack);
    graph.close_all().await?;
    Ok(Verdict::Passed)
}
