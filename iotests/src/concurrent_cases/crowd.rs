//! Crowds: several queues of random requests, and beside them what else a disk has to put up with.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use block_core::{
    Capabilities, Options, RequestFlags,
    driver::{Reopen, Truncate},
    env::Environment,
    image::{CheckMode, Progress},
};

use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::{GUEST, Load, NONE, Stack, findings, layer, one_request},
};

/// What else happens to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Status,
    Checks,
    Reopens,
    Drains,
    Growth,
    Infos,
}

impl Beside {
    const ALL: [Self; 7] = [
        Self::Nothing,
        Self::Status,
        Self::Checks,
        Self::Reopens,
        Self::Drains,
        Self::Growth,
        Self::Infos,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "alone",
            Self::Status => "with-status-queries",
            Self::Checks => "with-checks",
            Self::Reopens => "with-reopens",
            Self::Drains => "with-drained-sections",
            Self::Growth => "with-a-growing-disk",
            Self::Infos => "with-graph-changes",
        }
    }

    const fn needs(self) -> Capabilities {
        match self {
            Self::Checks => Capabilities::CHECK,
            Self::Growth => Capabilities::TRUNCATE,
            _ => Capabilities::empty(),
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let race = Group::Race;
    let mut cases = Vec::new();
    for beside in Beside::ALL {
        let name = beside.name();
        cases.push(Case::new(
            race,
            format!("race-crowd-{name}"),
            format!(
                "four queues of every kind of request {} come to what their order allows, and leave clean images",
                name.replace('-', " ")
            ),
            move |scene| crowd(scene, beside),
        ));
    }
    for (option, value) in [("l2-cache-size", 2048_u64), ("refcount-cache-size", 512)] {
        cases.push(Case::new(
            race,
            format!("race-crowd-with-small-{option}"),
            format!(
                "a crowd on a large disk whose {option} is {value} bytes waits for room and loses nothing"
            ),
            move |scene| far_apart(scene, Some((option, value))),
        ));
    }
    cases.push(Case::new(
        race,
        "race-crowd-in-one-cluster",
        "sixteen writers that each write their own sector of the same clusters, again and again, all find their last \
         write there",
        one_cluster,
    ));
    cases.push(Case::new(
        race,
        "race-crowd-on-sparse-large-disk",
        "writers far apart on a large disk make tables grow under each other, and all of their data is there",
        |scene| far_apart(scene, None),
    ));
    cases.push(Case::new(
        race,
        "race-crowd-on-nearly-full-storage",
        "on storage that has hardly any room writers fail with ENOSPC or succeed, discards make room, and no byte that was \
         acknowledged is lost",
        nearly_full,
    ));
    cases
}

/// A load that goes on in the background until so many requests have ended.
async fn crowd(scene: Arc<Scene>, beside: Beside) -> CaseResult {
    if beside == Beside::Reopens
        && let Some(verdict) = crate::stack::cannot_reopen(&scene).await?
    {
        return Ok(verdict);
    }
    let layers = if crate::stack::probe(&scene)
        .await?
        .0
        .contains(Capabilities::BACKING)
    {
        2
    } else {
        1
    };
    let stack = match Stack::new(&scene, layers, beside.needs()).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    for disk in scene.lab.disks.all() {
        disk.set_jitter(3);
    }
    let load = Load::start(&stack, 4);
    for round in 0..8 {
        load.more(25).await?;
        act(&stack, beside, round).await?;
    }
    let done = load.stop().await?;
    if done < 200 {
        return Ok(Verdict::Inconclusive(format!("only {done} requests")));
    }
    let (top, backing) = (layer(layers - 1), (layers == 2).then(|| layer(0)));
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn act(stack: &Stack, beside: Beside, round: u64) -> Result<(), Failure> {
    let (graph, guest) = (stack.graph(), &stack.guest);
    match beside {
        Beside::Nothing => {}
        Beside::Status => {
            // The answers cover the disk without gaps, whatever happens meanwhile.
            let mut at = 0;
            while at < stack.size {
                let status = guest.handle().block_status(at, stack.size - at).await?;
                if status.len == 0 || at + status.len > stack.size {
                    return Err(format!("status of {} bytes at {at:#x}", status.len).into());
                }
                let (_, run) = guest
                    .handle()
                    .is_allocated_above(None, false, at, stack.size - at)
                    .await?;
                if run == 0 {
                    return Err(format!("allocation of 0 bytes at {at:#x}").into());
                }
                at += status.len;
            }
        }
        Beside::Checks => {
            let report = guest
                .handle()
                .check(CheckMode::ReadOnly, Progress::new())
                .await?;
            if !report.is_clean() {
                return Err(format!("a check under load: {}", findings(&report)).into());
            }
        }
        Beside::Reopens => graph.reopen(stack.top(), Reopen::default()).await?,
        Beside::Drains => {
            let one = graph.drain(stack.top()).await;
            let two = graph.drain_all().await;
            for node in graph.nodes() {
                let left = node.tracker().in_flight();
                if left > 0 {
                    return Err(format!("{left} requests in a drained section").into());
                }
            }
            drop(one);
            drop(two);
        }
        Beside::Growth => {
            let handle = stack.scene.lab.attach(stack.top(), "resizer")?;
            let length = stack.size + (round + 1) * (stack.unit + 512);
            handle.truncate(length, Truncate::default()).await?;
            if handle.length() != length {
                return Err(format!("{} bytes, not {length}", handle.length()).into());
            }
            // The new part is written while the next one is made.
            guest.write(length - 512, 512, NONE).await?;
        }
        Beside::Infos => {
            use block_core::{driver::ChildRole, graph::NodeSpec};
            let relay = Arc::new(crate::relay::Relay);
            let spec = NodeSpec::new(relay).with_child(ChildRole::Filtered, "file", stack.top());
            let filter = graph.add_node(spec)?;
            graph.insert_filter(&filter).await?;
            guest.write(round * stack.unit, 512, NONE).await?;
            graph.remove_filter(&filter).await?;
            graph.release(&filter).await?;
            guest.handle().info().await?;
        }
    }
    Ok(())
}

async fn one_cluster(scene: Arc<Scene>) -> CaseResult {
    let stack = match Stack::new(&scene, 1, Capabilities::empty()).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    for disk in scene.lab.disks.all() {
        disk.set_jitter(4);
    }
    let sectors = (stack.unit / 512).min(16);
    for round in 0..6 {
        // Twice a cluster that is made zero or given up first, so that each round allocates.
        let at = (5 + round) * stack.unit;
        match round % 3 {
            0 => {
                stack
                    .guest
                    .zero(at, stack.unit, RequestFlags::MAY_UNMAP)
                    .await?;
            }
            1 if stack.discards() => stack.guest.discard(at, stack.unit).await?,
            _ => {}
        }
        let writers: Vec<_> = (0..sectors)
            .map(|n| {
                let guest = stack.guest.signing(GUEST + 1 + n as u32);
                scene.lab.env.start(async move {
                    for _ in 0..3 {
                        guest.write(at + n * 512, 512, NONE).await?;
                    }
                    let wrong = guest.read(at + n * 512, 512, NONE).await?;
                    match wrong.first() {
                        Some(wrong) => Err(Failure(wrong.to_string())),
                        None => Ok(()),
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await?;
        }
        stack.judge("after a round").await?;
    }
    stack.finish(&layer(0), None).await?;
    Ok(Verdict::Passed)
}

/// With an option of the driver's that makes one of its caches small.
async fn far_apart(scene: Arc<Scene>, cache: Option<(&'static str, u64)>) -> CaseResult {
    let (capabilities, unit) = crate::stack::probe(&scene).await?;
    if let Some(verdict) = crate::stack::lacks(capabilities, Capabilities::WRITE) {
        return Ok(verdict);
    }
    let (lab, format) = (&scene.lab, &scene.format);
    let size = 256 << 20;
    let file = "large";
    if let Err(error) = lab
        .create(&format.name, file, size, &format.create, None)
        .await
    {
        let why = format!("no image of 256 MiB: {error}");
        return Ok(Verdict::NotCovered(why));
    }
    let disk = lab.disk(file)?;
    disk.set_jitter(3);
    let mut open = Options::new();
    if let Some((option, value)) = cache {
        open.set(option, value);
    }
    let node = match lab.open(&format.name, file, None, &open).await {
        Ok(node) => node,
        Err(error) if cache.is_some() => {
            // What a driver doesn't know it refuses by name.
            let text = error.to_string();
            let named = cache.is_some_and(|(option, _)| text.contains(option));
            if named {
                return Ok(Verdict::NotCovered(text));
            }
            return Err(error.into());
        }
        Err(error) => return Err(error.into()),
    };
    let oracle = crate::oracle::Oracle::new(crate::lab::after_discard(&node));
    let handle = crate::stack::writer(&lab.graph, &node, "guest")?;
    let failed = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..12_u64)
        .map(|n| {
            let guest = crate::lab::Guest::new(&handle, &oracle, GUEST + n as u32);
            let (env, failed) = (lab.env.clone(), failed.clone());
            lab.env.start(async move {
                for step in 0..12 {
                    // Each in its own row: neighbours are in other tables.
                    let at = ((step * 12 + n) * (size / 150)) / unit * unit;
                    let len = 512 * (1 + env.below(8));
                    let done = guest.write(at + 512, len, NONE).await;
                    if done.is_err() {
                        failed.fetch_add(1, Ordering::SeqCst);
                    }
                    if env.below(5) == 0 {
                        let _ = guest.handle().flush().await;
                    }
                    let wrong = guest.read(at, unit.min(8192), NONE).await?;
                    if let Some(wrong) = wrong.first() {
                        return Err(Failure(wrong.to_string()));
                    }
                }
                Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await?;
    }
    if failed.load(Ordering::SeqCst) > 0 {
        return Err("writes failed".into());
    }
    handle.flush().await?;
    drop(handle);
    let counters = node.driver().counters();
    let evictions = counters.iter().find(|(name, _)| *name == "evictions");
    if matches!(cache, Some(("l2-cache-size", _))) && evictions.is_some_and(|(_, n)| *n == 0) {
        return Ok(Verdict::Inconclusive("nothing was evicted".into()));
    }
    crate::stack::check(&lab.graph, &node, true).await?;
    lab.graph.release(&node).await?;
    let node = lab.open(&format.name, file, None, &Options::new()).await?;
    let handle = crate::stack::reader(&lab.graph, &node)?;
    for step in 0..144_u64 {
        let at = (step * (size / 150)) / unit * unit;
        let bytes = handle.read(at, unit.min(8192) as usize).await?;
        if let Some(wrong) = oracle.check(at, &bytes).first() {
            return Err(format!("opened again: {wrong}").into());
        }
    }
    crate::stack::check(&lab.graph, &node, true).await?;
    drop(handle);
    lab.graph.release(&node).await?;
    Ok(Verdict::Passed)
}

async fn nearly_full(scene: Arc<Scene>) -> CaseResult {
    use crate::storage::{Choose, OpKind, Stage};
    let stack = match Stack::new(&scene, 1, Capabilities::DISCARD).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let disk = stack.disk(0)?;
    let end = disk.len();
    disk.set_jitter(2);
    disk.fail(
        Choose::writes()
            .kind(OpKind::Truncate)
            .within(end..u64::MAX),
        block_core::ErrorKind::NoSpace,
        Stage::Before,
    );
    let refused = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let (env, guest) = (scene.lab.env.clone(), stack.guest.clone());
            let (unit, size, refused) = (stack.unit, stack.size, refused.clone());
            let discards = stack.discards();
            scene.lab.env.start(async move {
                for _ in 0..60 {
                    let result = one_request(&env, &guest, unit, (0, size), discards).await;
                    match result {
                        Err(Failure(text)) if text.contains("No space") => {
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                        other => other?,
                    }
                    env.sleep(std::time::Duration::from_micros(100)).await;
                }
                Ok::<(), Failure>(())
            })
        })
        .collect();
    for task in tasks {
        task.await?;
    }
    stack.judge("while the storage is full").await?;
    disk.clear_rules();
    let full = |entry: &crate::storage::LogEntry| {
        entry.result == Some(Err(block_core::ErrorKind::NoSpace))
    };
    // A refusal may have been healed by what a discard gave back.
    let never = refused.load(Ordering::SeqCst) == 0 && !disk.log().iter().any(full);
    if never && stack.capabilities.contains(Capabilities::COMPRESSED) {
        return Ok(Verdict::Inconclusive("the storage was never full".into()));
    }
    // Whatever failed may have leaked, but not corrupted.
    stack.guest.handle().flush().await?;
    stack.close_and_reopen(&layer(0), None, false).await?;
    Ok(Verdict::Passed)
}
