//! A workload of every kind of change in which the n-th request of one kind to the storage fails, for every n until none is
//! left to fail: once before it takes effect, once after, and all from there on.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, RequestFlags};

use super::model::{IMAGE, Model, Runner, Start, UNITS};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::{NONE, at_rest},
    storage::{Choose, OpKind, Stage},
};

/// How much fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// Only that request, and it has no effect.
    Before,
    /// Only that request, after it took effect.
    After,
    /// That one and all later ones.
    AllFrom,
}

impl Extent {
    const ALL: [Self; 3] = [Self::Before, Self::After, Self::AllFrom];

    const fn name(self) -> &'static str {
        match self {
            Self::Before => "fails-before-its-effect",
            Self::After => "fails-after-its-effect",
            Self::AllFrom => "and-all-later-ones-fail",
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for kind in OpKind::ALL {
        for extent in Extent::ALL {
            // A read has no effect.
            if kind == OpKind::Read && extent == Extent::After {
                continue;
            }
            let name = kind.name().replace(' ', "-");
            cases.push(Case::new(
                Group::Fault,
                format!("fault-every-{name}-{}", extent.name()),
                format!(
                    "whichever {} to the storage {} the error reaches the guest by kind and file, what was flushed \
                     is there after closing and after power cuts, and no metadata is corrupt",
                    kind.name(),
                    extent.name().replace('-', " ")
                ),
                move |scene| sweep(scene, kind, extent),
            ));
        }
    }
    cases
}

/// The error that is injected. One ENOSPC alone may be healed by space that is freed.
const fn injected(kind: OpKind, extent: Extent) -> ErrorKind {
    match (kind, extent) {
        (OpKind::Write | OpKind::WriteZeroes | OpKind::Truncate, Extent::AllFrom) => {
            ErrorKind::NoSpace
        }
        _ => ErrorKind::Io,
    }
}

async fn sweep(scene: Arc<Scene>, kind: OpKind, extent: Extent) -> CaseResult {
    let start = match Start::new(&scene, Capabilities::empty()).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    let mut fired = 0;
    for n in 0..2000 {
        let what = format!("{} {n}", kind.name());
        match one(&start, kind, extent, n)
            .await
            .map_err(|failure| Failure(format!("{what}: {failure}")))?
        {
            true => fired += 1,
            false => break,
        }
    }
    if fired == 0 {
        let why = format!("the workload sends no {} to the storage", kind.name());
        return Ok(Verdict::NotCovered(why));
    }
    Ok(Verdict::Passed)
}

/// The workload.
async fn work(runner: &mut Runner<'_>) -> Result<(), Failure> {
    let unit = runner.start.unit;
    let can = |what| runner.start.capabilities.contains(what);
    let (compresses, resizes) = (can(Capabilities::COMPRESSED), can(Capabilities::TRUNCATE));
    // In place; a copy on write at its head and its tail; a zero write of data.
    runner.write(512, 512, NONE).await;
    runner.write(5 * unit + 512, 1024, NONE).await;
    runner.flush().await;
    runner.zero(unit, unit, NONE).await;
    runner.zero(2 * unit, unit, RequestFlags::MAY_UNMAP).await;
    runner.write(6 * unit + 1024, unit, NONE).await;
    runner.discard(0, unit).await;
    runner.flush().await;
    // Over zeroes that have their place, over something compressed, recycling what was freed.
    runner.write(3 * unit + 512, 512, NONE).await;
    runner.write(4 * unit + 512, 512, NONE).await;
    if compresses {
        let flags = RequestFlags::WRITE_COMPRESSED;
        runner.write(8 * unit, unit, flags).await;
    }
    runner.write(10 * unit, 2 * unit, RequestFlags::FUA).await;
    runner.flush().await;
    if resizes && runner.truncate((UNITS + 1) * unit).await {
        runner.write(UNITS * unit + 512, 512, NONE).await;
    }
    runner.zero(9 * unit + 512, 1024, NONE).await;
    runner.read_back().await?;
    runner.flush().await;
    Ok(())
}

/// One run. False when nothing was there to fail any more.
async fn one(start: &Start, kind: OpKind, extent: Extent, n: u64) -> Result<bool, Failure> {
    start.reset()?;
    let disk = start.disk()?;
    let node = start.open().await?;
    let mut runner = Runner::new(start, &node)?;
    let position = disk.log_position();
    let mut choose = Choose::any().kind(kind).after(n);
    if extent != Extent::AllFrom {
        choose = choose.times(1);
    }
    let stage = match extent {
        Extent::After => Stage::After,
        _ => Stage::Before,
    };
    disk.fail(choose, injected(kind, extent), stage);
    work(&mut runner).await?;
    let env = start.scene.lab.env.clone();
    let cut_open = disk.power_cut(&*env);
    drop(start.graph().drain_all().await);
    at_rest(start.graph())?;
    let Runner {
        handle,
        mut model,
        mut errors,
        ..
    } = runner;
    let model_open = model.clone();
    drop(handle);
    match start.graph().release(&node).await {
        // A close that succeeds has made everything durable.
        Ok(()) if start.capabilities.contains(Capabilities::CHECK) => model.flushed(),
        Ok(()) => {}
        Err(error) => errors.push(error),
    }
    drop(node);
    start.nothing_left("after the close")?;
    let failed = disk
        .log_since(position)
        .iter()
        .any(|entry| entry.op.kind == kind && entry.result == Some(Err(injected(kind, extent))));
    if !failed {
        if let Some(error) = errors.first() {
            return Err(format!("without a fault: {error}").into());
        }
        return Ok(false);
    }
    told(kind, extent, &errors).map_err(|failure| {
        let log = disk.log_since(position);
        let hit = log
            .iter()
            .find(|entry| matches!(entry.result, Some(Err(_))));
        let hit = hit.map(|entry| entry.op.to_string()).unwrap_or_default();
        Failure(format!("{failure} ({hit})"))
    })?;
    judge(start, cut_open, &model_open, &model).await?;
    Ok(true)
}

/// The error was told to somebody, as what it is.
fn told(kind: OpKind, extent: Extent, errors: &[block_core::Error]) -> Result<(), Failure> {
    // Punches are advice; that one fails changes nothing for anybody.
    let must_be_told = matches!(kind, OpKind::Read | OpKind::Write | OpKind::Flush);
    let Some(first) = errors.first() else {
        if must_be_told {
            return Err("nobody was told of the error".into());
        }
        return Ok(());
    };
    if first.kind() != injected(kind, extent) {
        return Err(format!("the first error has become another: {first}").into());
    }
    if !first.to_string().contains(IMAGE) {
        return Err(format!("the error doesn't name the file: {first}").into());
    }
    Ok(())
}

/// What was left in the storage, judged as it is and after a cut of the power while the image was open.
async fn judge(
    start: &Start,
    cut_open: crate::storage::Content,
    model_open: &Model,
    model: &Model,
) -> Result<(), Failure> {
    let disk = start.disk()?;
    let env = start.scene.lab.env.clone();
    disk.clear_rules();
    let (closed, cut) = (disk.content(), disk.power_cut(&*env));
    start
        .reopened(cut_open, model_open, true, "after a cut while open")
        .await?;
    start.reopened(cut, model, true, "after a cut").await?;
    start.reopened(closed, model, true, "opened again").await
}
