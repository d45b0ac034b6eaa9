//! What has to be right at the end of a phase, and when its images are opened again: content, metadata, length.

use std::sync::Arc;

use block_core::{
    BlockHandle, Error, Result,
    driver::{Capabilities, ChildRole},
    image::{CheckMode, CheckReport, Progress},
};

use super::{
    bitmaps,
    record::{Failure, FailureKind},
    run::Carried,
    snapshots,
    world::{GUEST, Setup, World, data_file},
};
use crate::{
    lab::Lab,
    oracle::{Mismatch, Oracle},
    storage::SECTOR,
};

fn content(when: &str, wrong: &[Mismatch]) -> Result<(), Failure> {
    match wrong.first() {
        None => Ok(()),
        Some(first) => {
            let text = format!("{when}: {first} ({} places)", wrong.len());
            Err(Failure::new(FailureKind::Content, text))
        }
    }
}

/// Looks at the disk as the guest sees it, closes everything, and gives the names of its images and whether everything
/// could be written.
pub(super) async fn end_of_phase(world: &Arc<World>) -> Result<(Vec<String>, bool), Failure> {
    let setup = &world.setup;
    let recorder = &setup.recorder;
    let error =
        |what: &str, error: Error| Failure::new(FailureKind::Error, format!("{what}: {error}"));
    for disk in setup.disks.all() {
        disk.clear_rules();
    }
    // What was dropped has to come to its end.
    drop(world.lab.graph.drain_all().await);
    setup.watch.check_books();
    let handle = world.guest().map_err(|e| error("the guest", e))?;
    let bytes = match handle.read(0, handle.length() as usize).await {
        Ok(bytes) => bytes,
        Err(_) if !setup.gate => return Ok((world.names(), false)),
        Err(e) => return Err(error("the disk can't be read at the end", e)),
    };
    let wrong = if setup.gate {
        world.oracle.check(0, &bytes)
    } else {
        world.oracle.check_lenient(0, &bytes)
    };
    content("at the end of the phase", &wrong)?;
    recorder.note([41, 0, 0], || "the content is right".to_owned());
    world.collect_counters();
    let names = world.names();
    let (length, allowed) = (handle.length(), world.lengths.now());
    if setup.gate && !allowed.contains(&length) {
        let text = format!("at the end of the phase: it has {length} bytes, may have {allowed:?}");
        return Err(Failure::new(FailureKind::Content, text));
    }
    drop(handle);
    world.handle.lock().take();
    let closed = world.lab.graph.close_all().await;
    let clean = closed.is_ok();
    if let Err(e) = closed
        && !world.may_fail()
    {
        return Err(error("the disk can't be closed", e));
    }
    // A flush that failed on the way leaves it open what of the metadata is there.
    let clean = clean && recorder.disk_errors() == 0;
    if clean {
        world.lengths.settle(length);
    }
    Ok((names, clean))
}

/// The first findings of a report, in words.
pub(super) fn findings(report: &CheckReport) -> String {
    let lines: Vec<&str> = report.findings.iter().map(|f| f.message.as_str()).collect();
    let more = lines.len().saturating_sub(4);
    let first: Vec<&str> = lines.into_iter().take(4).collect();
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    format!("{}{more}", first.join("; "))
}

/// The image's own check: no corruptions, and no leaks unless there is an excuse; leaks are repaired then.
async fn check(
    setup: &Setup,
    handle: &BlockHandle,
    name: &str,
    excused: bool,
) -> Result<(), Failure> {
    let capabilities = handle.node().driver().capabilities();
    if !capabilities.contains(Capabilities::CHECK) {
        return Ok(());
    }
    let broken = |text: String| Failure::new(FailureKind::Check, format!("{name}: {text}"));
    let report = handle
        .check(CheckMode::ReadOnly, Progress::new())
        .await
        .map_err(|error| broken(error.to_string()))?;
    setup.recorder.count("checks", 1);
    if report.corruptions + report.check_errors > 0 {
        return Err(broken(findings(&report)));
    }
    if report.leaks == 0 {
        return Ok(());
    }
    if !excused {
        let text = format!("{name}: {}", findings(&report));
        return Err(Failure::new(FailureKind::Leak, text));
    }
    setup.recorder.count("leaks-repaired", report.leaks);
    if capabilities.contains(Capabilities::REPAIR) {
        let report = handle
            .check(CheckMode::RepairLeaks, Progress::new())
            .await
            .map_err(|error| broken(format!("repair: {error}")))?;
        if !report.is_clean() {
            return Err(broken(format!("after the repair: {}", findings(&report))));
        }
    }
    Ok(())
}

/// Opens the images again, as somebody would who knows only what is on the disks.
pub(super) async fn look_again(
    setup: &Arc<Setup>,
    lab: &Lab,
    mut carried: Carried,
) -> Result<Carried, Failure> {
    let when = if carried.cut {
        "after the power cut"
    } else {
        "opened again"
    };
    let error = |what: &str, error: Error| {
        Failure::new(FailureKind::Error, format!("{when}: {what}: {error}"))
    };
    let lenient = !setup.gate;
    let node = setup.open(lab, &carried.names).await;
    let node = match node {
        Ok(node) => node,
        Err(e) => return Err(error("it can't be opened", e)),
    };
    let handle = lab
        .graph
        .attach(&node, GUEST, "judge")
        .map_err(|e| error("it can't be used", e))?;
    check(
        setup,
        &handle,
        &carried.names[0],
        carried.excused || carried.may_leak || lenient,
    )
    .await?;
    let length = handle.length();
    // Without a length of its own an image is as long as its file, which has nothing but data: a cut may keep sectors of a
    // write and lose the growth before it.
    let edges = node.edges();
    let is_files = edges.child(ChildRole::File).is_none()
        && length % SECTOR == 0
        && edges
            .child(ChildRole::DataFile)
            .is_some_and(|file| file.length() == length);
    let (least, most) = (carried.lengths.iter().min(), carried.lengths.iter().max());
    let between =
        least.is_some_and(|least| *least <= length) && most.is_some_and(|most| length <= *most);
    let fits = carried.lengths.contains(&length) || (carried.cut && is_files && between);
    if !lenient && !fits {
        let text = format!(
            "{when}: it has {length} bytes, may have {:?}",
            carried.lengths
        );
        return Err(Failure::new(FailureKind::Content, text));
    }
    let bytes = handle
        .read(0, length as usize)
        .await
        .map_err(|e| error("it can't be read", e))?;
    let oracle = &carried.oracle;
    let wrong = match (lenient, carried.cut, carried.excused) {
        (true, true, _) => oracle.check_known(0, &bytes),
        (true, false, _) => oracle.check_lenient(0, &bytes),
        (false, false, false) => oracle.check(0, &bytes),
        (false, ..) => oracle.check_after_cut(0, &bytes),
    };
    content(when, &wrong)?;
    compare_data_file(setup, &handle, &carried.names[0], &bytes, when).await?;
    let kept = std::mem::take(&mut carried.bitmaps);
    let closed = !carried.cut && !carried.excused;
    carried.bitmaps = bitmaps::look_again(&node, kept, closed && !lenient, when, || {
        setup.recorder.count("bitmaps-compared", 1);
    })?;
    let capable = node.driver().capabilities();
    let listed = if capable.contains(Capabilities::SNAPSHOTS) {
        handle
            .snapshot_list()
            .await
            .map_err(|e| error("its snapshots can't be listed", e))?
    } else {
        Vec::new()
    };
    setup.recorder.note([42, 0, 0], || {
        format!("{when}: metadata and content are right")
    });
    let below: Vec<_> = node.chain();
    handle
        .close()
        .await
        .map_err(|e| error("it can't be closed", e))?;
    drop((node, below));
    let kept = std::mem::take(&mut carried.snapshots);
    let listed = listed.into_iter().map(|info| (info.name, info.disk_size));
    let listed: Vec<_> = listed.collect();
    carried.snapshots =
        snapshots::look_again(setup, lab, &carried.names, &listed, kept, when).await?;
    for n in 1..carried.names.len() {
        let name = carried.names[n].clone();
        look_at(setup, lab, &carried.names[n..], &name, true).await?;
    }
    for name in std::mem::take(&mut carried.left) {
        // One that was only being made when the power went isn't an image yet.
        let alone = std::slice::from_ref(&name);
        let made = setup.open(lab, alone).await;
        if let Ok(node) = made {
            let handle = lab
                .graph
                .attach(&node, GUEST, "judge")
                .map_err(|e| error(&name, e))?;
            check(setup, &handle, &name, true).await?;
            drop(handle);
            lab.graph
                .release(&node)
                .await
                .map_err(|e| error(&name, e))?;
        }
    }
    if carried.cut || carried.excused {
        // What a failed flush left unwritten could still be lost; but what was found is what the next phase goes on with.
        for disk in setup.disks.all() {
            disk.track_durability();
        }
        // What happens to be there is what counts from here on.
        let oracle = Oracle::new(carried.after_discard);
        oracle.set_initial(0, &bytes);
        carried.oracle = oracle;
    }
    Ok(Carried {
        lengths: vec![length],
        may_leak: carried.may_leak || carried.cut || carried.excused,
        cut: false,
        excused: false,
        ..carried
    })
}

/// A raw data file holds, by itself, what the guest sees.
async fn compare_data_file(
    setup: &Setup,
    handle: &BlockHandle,
    name: &str,
    bytes: &[u8],
    when: &str,
) -> Result<(), Failure> {
    let Some(disk) = setup.disks.get(&data_file(name)) else {
        return Ok(());
    };
    let info = handle
        .info()
        .await
        .map_err(|error| Failure::new(FailureKind::Error, format!("{when}: {name}: {error}")))?;
    let is_raw = info
        .format_specific
        .and_then(|(_, data)| data.get("data-file-raw").and_then(|raw| raw.as_bool()));
    if is_raw != Some(true) || info.encrypted {
        return Ok(());
    }
    let mut held = vec![0; bytes.len()];
    disk.content().read(0, &mut held);
    setup.recorder.count("raw-data-files-compared", 1);
    match bytes.iter().zip(&held).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => {
            let text = format!("{when}: the raw data file isn't what the guest sees at {at:#x}");
            Err(Failure::new(FailureKind::Content, text))
        }
    }
}

/// An image below the topmost: only its metadata is looked at.
async fn look_at(
    setup: &Arc<Setup>,
    lab: &Lab,
    names: &[String],
    name: &str,
    excused: bool,
) -> Result<(), Failure> {
    let error = |error: Error| Failure::new(FailureKind::Error, format!("{name}: {error}"));
    setup.watch.clear();
    let node = setup.open(lab, names).await.map_err(error)?;
    let handle = lab.graph.attach(&node, GUEST, "judge").map_err(error)?;
    check(setup, &handle, name, excused).await?;
    handle.close().await.map_err(error)
}
