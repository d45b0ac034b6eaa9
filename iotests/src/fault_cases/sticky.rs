//! After a failed flush nothing counts as durable until the image is opened again: not by another flush, not by FUA, not by a
//! close.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, Options, RequestFlags, driver::Reopen};

use super::model::{IMAGE, Runner, Start};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    stack::NONE,
    storage::{Choose, OpKind, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    let fault = Group::Fault;
    vec![
        Case::new(
            fault,
            "fault-failed-flush-fails-later-flushes",
            "after one failed flush of the storage every later flush and FUA write fails, though the storage works \
             again; reading works; after closing and opening again flushes succeed",
            sticks,
        ),
        Case::new(
            fault,
            "fault-failed-flush-fails-those-who-waited-with-it",
            "when a flush fails that several callers wait for, all of them are told",
            shared,
        ),
        Case::new(
            fault,
            "fault-reopen-forgets-failed-flush",
            "a reopen of image and storage begins anew: the next flush succeeds, and what is written then survives a cut",
            reopened,
        ),
        Case::new(
            fault,
            "fault-failed-write-is-not-made-durable-by-flush",
            "a write that failed doesn't fail the flush after it, and what was acknowledged before it survives a cut",
            write_fails,
        ),
        Case::new(
            fault,
            "fault-full-storage-takes-overwrites-and-gives-back-freed-space",
            "on storage that is full overwrites succeed, new clusters fail with ENOSPC and change nothing, and what a \
             discard frees can be written again",
            full,
        ),
    ]
}

fn fail_flush(start: &Start, times: u64) -> Result<(), crate::case::Failure> {
    let choose = Choose::any().kind(OpKind::Flush).times(times);
    start.disk()?.fail(choose, ErrorKind::Io, Stage::Before);
    Ok(())
}

async fn sticks(scene: Arc<Scene>) -> CaseResult {
    let start = match Start::new(&scene, Capabilities::empty()).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    start.reset()?;
    let node = start.open().await?;
    let mut runner = Runner::new(&start, &node)?;
    runner.write(0, 512, NONE).await;
    runner.flush().await;
    runner.write(6 * start.unit + 512, 512, NONE).await;
    fail_flush(&start, 1)?;
    runner.flush().await;
    if runner.errors.len() != 1 {
        return Err("the failed flush wasn't told".into());
    }
    for _ in 0..3 {
        if runner.handle.flush().await.is_ok() {
            return Err("a flush succeeded after one had failed".into());
        }
    }
    let fua = runner.handle.write(
        start.unit,
        crate::pattern::stamped(3, 1, start.unit, 512),
        RequestFlags::FUA,
    );
    if fua.await.is_ok() {
        return Err("a FUA write succeeded after a flush had failed".into());
    }
    let seen = [crate::pattern::Seen::of(&crate::pattern::stamped(
        3, 1, start.unit, 512,
    ))];
    runner.model.change(start.unit, &seen, false);
    runner.errors.clear();
    runner.read_back().await?;
    if let Some(error) = runner.errors.first() {
        return Err(format!("it can't be read after a failed flush: {error}").into());
    }
    let model = runner.model.clone();
    drop(runner);
    let _ = start.graph().release(&node).await;
    start.nothing_left("after the close")?;
    let (disk, env) = (start.disk()?, scene.lab.env.clone());
    let (cut, closed) = (disk.power_cut(&*env), disk.content());
    start.reopened(cut, &model, true, "after a cut").await?;
    start.reopened(closed, &model, true, "opened again").await?;
    let node = start.open().await?;
    let mut runner = Runner::new(&start, &node)?;
    runner.write(7 * start.unit, 512, NONE).await;
    runner.flush().await;
    if let Some(error) = runner.errors.first() {
        return Err(format!("opened again: {error}").into());
    }
    drop(runner);
    start.graph().release(&node).await?;
    Ok(Verdict::Passed)
}

async fn shared(scene: Arc<Scene>) -> CaseResult {
    let start = match Start::new(&scene, Capabilities::empty()).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    start.reset()?;
    let node = start.open().await?;
    let mut runner = Runner::new(&start, &node)?;
    runner.write(6 * start.unit, 1024, NONE).await;
    let disk = start.disk()?;
    let hold = disk.hold(Choose::any().kind(OpKind::Flush), Stage::Before);
    disk.fail(
        Choose::any().kind(OpKind::Flush),
        ErrorKind::Io,
        Stage::Before,
    );
    let flushes: Vec<_> = (0..4)
        .map(|_| {
            let handle = runner.handle.clone();
            scene.lab.env.start(async move { handle.flush().await })
        })
        .collect();
    scene.rest().await;
    if hold.waiting().is_empty() {
        return Err("no flush was parked".into());
    }
    hold.release();
    for flush in flushes {
        if flush.await.is_ok() {
            return Err("one of those who waited was told that all is well".into());
        }
    }
    let model = runner.model.clone();
    drop(runner);
    let _ = start.graph().release(&node).await;
    let closed = disk.content();
    start.reopened(closed, &model, true, "opened again").await?;
    Ok(Verdict::Passed)
}

async fn reopened(scene: Arc<Scene>) -> CaseResult {
    let start = match Start::new(&scene, Capabilities::empty()).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    start.reset()?;
    let node = start.open().await?;
    let mut runner = Runner::new(&start, &node)?;
    let durable = runner.model.clone();
    runner.write(6 * start.unit + 512, 1024, NONE).await;
    fail_flush(&start, 1)?;
    runner.flush().await;
    // From here on it is unknown whether that write happened.
    runner.model.merge(&durable);
    if runner.errors.len() != 1 {
        return Err("the failed flush wasn't told".into());
    }
    let graph = start.graph();
    let file = node.edges().primary().map(|child| child.node().clone());
    for node in file.iter().chain([&node]) {
        graph.reopen(node, Reopen::default()).await?;
    }
    runner.errors.clear();
    runner.write(8 * start.unit, start.unit, NONE).await;
    runner.flush().await;
    if let Some(error) = runner.errors.first() {
        return Err(format!("after the reopen: {error}").into());
    }
    let (disk, env) = (start.disk()?, scene.lab.env.clone());
    let cut = disk.power_cut(&*env);
    let mut model = runner.model.clone();
    drop((runner, file));
    graph.release(&node).await?;
    model.flushed();
    start.reopened(cut, &model, true, "after a cut").await?;
    Ok(Verdict::Passed)
}

async fn write_fails(scene: Arc<Scene>) -> CaseResult {
    let start = match Start::new(&scene, Capabilities::empty()).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    start.reset()?;
    let node = start.open().await?;
    let mut runner = Runner::new(&start, &node)?;
    let (disk, unit) = (start.disk()?, start.unit);
    runner.write(6 * unit, 2 * unit, NONE).await;
    let needle = crate::pattern::Stamp::needle(3);
    let data = Choose::writes().containing(&needle).times(1);
    disk.fail(data, ErrorKind::Io, Stage::Before);
    runner.write(8 * unit + 512, unit, NONE).await;
    if runner.errors.len() != 1 {
        return Err("the failed write wasn't told".into());
    }
    runner.errors.clear();
    runner.flush().await;
    if let Some(error) = runner.errors.first() {
        return Err(format!("the flush after a failed write: {error}").into());
    }
    let env = scene.lab.env.clone();
    let cut = disk.power_cut(&*env);
    let model = runner.model.clone();
    runner.read_back().await?;
    drop(runner);
    start.graph().release(&node).await?;
    let closed = disk.content();
    start.reopened(cut, &model, true, "after a cut").await?;
    start.reopened(closed, &model, true, "opened again").await?;
    Ok(Verdict::Passed)
}

async fn full(scene: Arc<Scene>) -> CaseResult {
    let start = match Start::new(&scene, Capabilities::DISCARD).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    let names = scene.lab.records_backing(&scene.format.name);
    if !names || !start.capabilities.contains(Capabilities::COMPRESSED) {
        return Ok(Verdict::NotCovered(
            "where the driver puts new clusters isn't known".into(),
        ));
    }
    start.reset()?;
    let node = start.open().await?;
    let mut runner = Runner::new(&start, &node)?;
    let (disk, unit) = (start.disk()?, start.unit);
    runner.write(6 * unit, unit, NONE).await;
    runner.flush().await;
    let end = disk.len();
    let fill = |errors: &mut Vec<block_core::Error>| errors.clear();
    disk.fail(
        Choose::writes().within(end..u64::MAX),
        ErrorKind::NoSpace,
        Stage::Before,
    );
    // In place.
    runner.write(6 * unit + 512, 512, NONE).await;
    if let Some(error) = runner.errors.first() {
        return Err(format!("an overwrite in place: {error}").into());
    }
    // Whatever is free inside of the file is used up, and then the storage is full.
    let mut refused = 0;
    for at in [7, 8, 9, 10, 11, 5] {
        runner.write(at * unit, unit, NONE).await;
        refused += runner.errors.len();
        if let Some(error) = runner.errors.first()
            && error.kind() != ErrorKind::NoSpace
        {
            return Err(format!("full storage is told as: {error}").into());
        }
        fill(&mut runner.errors);
    }
    if refused == 0 {
        return Ok(Verdict::Inconclusive("the storage was never full".into()));
    }
    runner.read_back().await?;
    runner.discard(6 * unit, unit).await;
    runner.write(11 * unit, unit, NONE).await;
    if let Some(error) = runner.errors.first() {
        return Err(format!("into what a discard freed: {error}").into());
    }
    runner.flush().await;
    if let Some(error) = runner.errors.first() {
        return Err(format!("the flush on full storage: {error}").into());
    }
    runner.read_back().await?;
    let model = runner.model.clone();
    drop(runner);
    start.graph().release(&node).await?;
    let closed = disk.content();
    disk.clear_rules();
    start.reopened(closed, &model, true, "opened again").await?;
    let node = scene
        .lab
        .open(&scene.format.name, IMAGE, None, &Options::new())
        .await?;
    start.graph().release(&node).await?;
    Ok(Verdict::Passed)
}
