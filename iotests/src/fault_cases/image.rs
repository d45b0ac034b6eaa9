//! Operations on the image as a whole in which the n-th request to the storage fails, for every kind and every n: opening,
//! creating, checking, repairing, resizing, rewriting the backing file's name, emptying. None may leave a node behind, hide
//! the error, or cost anything that was flushed.

use std::sync::Arc;

use block_core::{
    Capabilities, Error, ErrorKind, Options, RequestFlags,
    driver::Truncate,
    image::{CheckMode, Progress},
};

use super::model::{BELOW, IMAGE, Model, Runner, Start, UNITS};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::NONE,
    storage::{Choose, Content, OpKind, Stage},
};

/// What is done to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Open,
    /// An image whose writer was cut off.
    OpenAfterCut,
    Create,
    Check,
    Repair,
    Grow,
    Shrink,
    Rename,
    Empty,
    Close,
}

impl Act {
    const ALL: [Self; 10] = [
        Self::Open,
        Self::OpenAfterCut,
        Self::Create,
        Self::Check,
        Self::Repair,
        Self::Grow,
        Self::Shrink,
        Self::Rename,
        Self::Empty,
        Self::Close,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::OpenAfterCut => "open-after-power-cut",
            Self::Create => "create",
            Self::Check => "check",
            Self::Repair => "repair",
            Self::Grow => "grow",
            Self::Shrink => "shrink",
            Self::Rename => "change-of-backing-file",
            Self::Empty => "emptying",
            Self::Close => "close",
        }
    }

    const fn needs(self) -> Capabilities {
        match self {
            Self::Open | Self::OpenAfterCut | Self::Create | Self::Close => Capabilities::empty(),
            Self::Check => Capabilities::CHECK,
            Self::Repair => Capabilities::REPAIR,
            Self::Grow | Self::Shrink => Capabilities::TRUNCATE,
            Self::Rename => Capabilities::BACKING.union(Capabilities::CHANGE_BACKING),
            Self::Empty => Capabilities::MAKE_EMPTY,
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for act in Act::ALL {
        let name = act.name();
        cases.push(Case::new(
            Group::Fault,
            format!("fault-every-request-of-{name}"),
            format!(
                "whichever request to the storage fails in a {}: the error is told with the file's name, no node is left \
                 over, and the image is as it was or as it was to be",
                name.replace('-', " ")
            ),
            move |scene| sweep(scene, act),
        ));
    }
    cases
}

async fn sweep(scene: Arc<Scene>, act: Act) -> CaseResult {
    let start = match Start::new(&scene, act.needs()).await? {
        Ok(start) => start,
        Err(verdict) => return Ok(verdict),
    };
    let left_over = match act {
        Act::OpenAfterCut | Act::Repair => Some(cut_off(&start).await?),
        _ => None,
    };
    let mut fired = 0;
    for kind in OpKind::ALL {
        for stage in [Stage::Before, Stage::After] {
            for n in 0..1000 {
                let what = format!("{} {n}, {stage:?}", kind.name());
                let failed = one(&start, act, left_over.as_ref(), kind, stage, n).await;
                match failed.map_err(|failure| Failure(format!("{what}: {failure}")))? {
                    One::Failed => fired += 1,
                    One::NoMore => break,
                    One::Unsupported => {
                        let why = format!("the driver can't {}", act.name());
                        return Ok(Verdict::NotCovered(why));
                    }
                }
            }
        }
    }
    if fired == 0 {
        let why = format!("a {} sends nothing to the storage", act.name());
        return Ok(Verdict::NotCovered(why));
    }
    Ok(Verdict::Passed)
}

enum One {
    Failed,
    NoMore,
    Unsupported,
}

/// What is left of an image whose power was cut with everything in flight and nothing flushed, and what it may show.
async fn cut_off(start: &Start) -> Result<(Content, Model), Failure> {
    start.reset()?;
    let node = start.open().await?;
    let mut runner = Runner::new(start, &node)?;
    let unit = start.unit;
    runner.write(6 * unit, 2 * unit, NONE).await;
    runner.zero(unit, unit, RequestFlags::MAY_UNMAP).await;
    runner.discard(2 * unit, unit).await;
    runner.write(4 * unit + 512, 512, NONE).await;
    // What the cut leaves depends on what the driver writes by itself: all of it arrives.
    let content = start.disk()?.content();
    let model = runner.model.clone();
    drop(runner);
    start.graph().release(&node).await?;
    Ok((content, model))
}

/// What came of an operation.
struct Outcome {
    result: Result<(), Error>,
    /// What the image may show afterwards.
    model: Model,
}

async fn one(
    start: &Start,
    act: Act,
    left_over: Option<&(Content, Model)>,
    kind: OpKind,
    stage: Stage,
    n: u64,
) -> Result<One, Failure> {
    start.reset()?;
    let disk = start.disk()?;
    if let Some((content, _)) = left_over {
        disk.restore(content.clone());
        disk.track_durability();
    }
    let before = disk.content().all_bytes();
    let model = left_over.map_or_else(|| Model::of(&start.shown), |(_, model)| model.clone());
    let position = disk.log_position();
    let injected = ErrorKind::Io;
    let arm = || {
        let choose = Choose::any().kind(kind).after(n).times(1);
        disk.fail(choose, injected, stage);
    };
    let outcome = match act {
        Act::Open | Act::OpenAfterCut => {
            arm();
            let opened = start.open().await;
            disk.clear_rules();
            let result = match opened {
                Ok(node) => start.graph().release(&node).await,
                Err(error) => {
                    if act == Act::Open && disk.content().all_bytes() != before {
                        return Err("an open that failed changed the image".into());
                    }
                    Err(error)
                }
            };
            Outcome { result, model }
        }
        Act::Create => {
            arm();
            create(start).await?
        }
        _ => {
            let node = start.open().await?;
            let outcome = opened(start, act, &node, model, arm).await;
            let closed = start.graph().release(&node).await;
            disk.clear_rules();
            let Some(mut outcome) = outcome? else {
                return Ok(One::Unsupported);
            };
            // What a driver without metadata has was durable before only if somebody flushed it.
            if act == Act::Close
                && closed.is_ok()
                && start.capabilities.contains(Capabilities::CHECK)
            {
                outcome.model.flushed();
            }
            outcome.result = outcome.result.and(closed);
            outcome
        }
    };
    start.nothing_left("afterwards")?;
    let log = disk.log_since(position);
    let failure = log
        .iter()
        .position(|entry| entry.result == Some(Err(injected)));
    let failed = failure.is_some();
    // Once the new size is durable, what is read is about space that may be given back.
    let is_durable = log[..failure.unwrap_or(0)]
        .iter()
        .any(|entry| entry.op.kind == OpKind::Flush);
    let must_be_told = matches!(kind, OpKind::Read | OpKind::Write | OpKind::Flush)
        // The error of a punch, or of a shortening that gives space back, is nobody's loss.
        && !(act == Act::Repair && kind == OpKind::Read)
        && !(act == Act::Shrink && kind == OpKind::Read && is_durable);
    match &outcome.result {
        Ok(()) if failed && must_be_told => {
            return Err("nobody was told of the error".into());
        }
        Err(error) if !failed => return Err(format!("without a fault: {error}").into()),
        Err(error) if !error.to_string().contains(IMAGE) => {
            return Err(format!("the error doesn't name the file: {error}").into());
        }
        _ => {}
    }
    if act != Act::Create || outcome.result.is_ok() {
        let env = start.scene.lab.env.clone();
        let (closed, cut) = (disk.content(), disk.power_cut(&*env));
        start
            .reopened(cut, &outcome.model, true, "after a cut")
            .await?;
        start
            .reopened(closed, &outcome.model, true, "opened again")
            .await?;
    }
    Ok(if failed { One::Failed } else { One::NoMore })
}

/// Creates an image over whatever was there. What is left of one that failed is refused, or is an image.
async fn create(start: &Start) -> Result<Outcome, Failure> {
    let (lab, format) = (&start.scene.lab, &start.scene.format);
    let size = UNITS * start.unit;
    let result = lab
        .create(&format.name, IMAGE, size, &format.create, None)
        .await;
    let disk = start.disk()?;
    disk.clear_rules();
    start.nothing_left("after the creation")?;
    let empty = vec![0; size as usize];
    if result.is_err() {
        let left = lab.open(&format.name, IMAGE, None, &Options::new()).await;
        if let Ok(node) = left {
            let shown = crate::stack::content(&lab.graph, &node).await?;
            if shown.iter().any(|byte| *byte != 0) {
                return Err("an image that wasn't finished shows something".into());
            }
            lab.graph.release(&node).await?;
        }
        // Once more, without a fault.
        lab.create(&format.name, IMAGE, size, &format.create, None)
            .await?;
    }
    let node = lab.open(&format.name, IMAGE, None, &Options::new()).await?;
    let shown = crate::stack::content(&lab.graph, &node).await?;
    let zero_init = start.capabilities.contains(Capabilities::ZERO_INIT);
    lab.graph.release(&node).await?;
    if zero_init && shown != empty {
        return Err("a new image isn't empty".into());
    }
    Ok(Outcome {
        result,
        // It is opened over the backing file, which it doesn't name, or not at all.
        model: Model::of(&empty_view(start)),
    })
}

/// What an empty image shows when it is opened as the sweeps open it.
fn empty_view(start: &Start) -> Vec<u8> {
    if start.scene.lab.records_backing(&start.scene.format.name) {
        vec![0; (UNITS * start.unit) as usize]
    } else {
        start.shown_below.clone()
    }
}

/// What is done with an open image. `None` when the driver refuses to.
async fn opened(
    start: &Start,
    act: Act,
    node: &Arc<block_core::Node>,
    model: Model,
    arm: impl Fn(),
) -> Result<Option<Outcome>, Failure> {
    let mut runner = Runner::new(start, node)?;
    runner.model = model;
    let unit = start.unit;
    let handle = runner.handle.clone();
    let result = match act {
        Act::Check | Act::Repair => {
            let mode = if act == Act::Check {
                CheckMode::ReadOnly
            } else {
                CheckMode::RepairAll
            };
            arm();
            match handle.check(mode, Progress::new()).await {
                // What can't be read may be called damage; it may not be called clean.
                Ok(report) if report.check_errors > 0 => {
                    Err(Error::io("check errors were counted").with_file(IMAGE))
                }
                Ok(report) if act == Act::Check && report.corruptions > 0 => {
                    Err(Error::io("corruptions were counted").with_file(IMAGE))
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            }
        }
        Act::Grow | Act::Shrink => {
            runner.write(7 * unit + 512, 512, NONE).await;
            let length = if act == Act::Grow {
                (UNITS + 3) * unit + 512
            } else {
                (UNITS - 3) * unit + 512
            };
            arm();
            let how = Truncate {
                exact: true,
                zero: true,
                ..Truncate::default()
            };
            let result = handle.truncate(length, how).await;
            match &result {
                Err(error) if error.kind() == ErrorKind::NotSupported => return Ok(None),
                _ => runner.model.resize(length, result.is_ok()),
            }
            result
        }
        Act::Rename => {
            arm();
            // The same file by another name: what is shown stays the same.
            let name = format!("./{BELOW}");
            let disks = &start.scene.lab.disks;
            if let Some(below) = disks.get(BELOW) {
                disks.insert(crate::storage::Disk::new(&name, below.content()));
            }
            handle
                .change_backing(Some(&name), Some(&start.scene.format.name))
                .await
        }
        Act::Empty => {
            arm();
            let result = handle.make_empty().await;
            let below: Vec<_> = start
                .shown_below
                .chunks(512)
                .map(crate::pattern::Seen::of)
                .collect();
            runner.model.change(0, &below, result.is_ok());
            result
        }
        _ => {
            runner.write(512, 512, NONE).await;
            runner.write(7 * unit + 512, 2 * unit, NONE).await;
            runner.discard(unit, unit).await;
            arm();
            Ok(())
        }
    };
    if let Some(error) = runner.errors.first() {
        return Err(format!("before the fault: {error}").into());
    }
    Ok(Some(Outcome {
        result,
        model: runner.model.clone(),
    }))
}
