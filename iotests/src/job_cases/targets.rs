//! Copies between images of different geometry: clusters of other sizes, targets that have content or a backing file
//! already, bases that are too short, bitmaps of every granularity.

use std::sync::Arc;

use block_core::{Capabilities, Options};
use jobs::{
    BackupOptions, CommitOptions, CopyMode, JobManager, MirrorOptions, StreamOptions, SyncMode,
};

use super::work::{COPY, Work, close_target, target_with};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    pattern::stamped,
    stack::{LAYER, Load, NONE, Stack, content, layer, same, writer},
};

/// The signature of what a target holds before.
const STALE: u32 = 90;

/// Which of the two copies to another image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copier {
    Mirror,
    Backup,
}

impl Copier {
    const ALL: [Self; 2] = [Self::Mirror, Self::Backup];

    const fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Backup => "backup",
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let jobs = Group::Jobs;
    let mut cases = Vec::new();
    for copier in Copier::ALL {
        let name = copier.name();
        for cluster in ["512", "65536"] {
            cases.push(Case::new(
                jobs,
                format!("jobs-{name}-into-{cluster}-byte-clusters"),
                format!("a {name} beside a guest into an image of {cluster}-byte clusters is whole to the last byte"),
                move |scene| other_clusters(scene, copier, cluster),
            ));
        }
        cases.push(Case::new(
            jobs,
            format!("jobs-{name}-hides-old-content-of-target"),
            format!(
                "a {name} into an image that is full of old data leaves nothing of it, also where the disk is zero or empty"
            ),
            move |scene| stale_target(scene, copier, false),
        ));
        cases.push(Case::new(
            jobs,
            format!("jobs-{name}-hides-backing-file-of-target"),
            format!("a full {name} into an overlay hides what its backing file has where the disk is zero or empty"),
            move |scene| stale_target(scene, copier, true),
        ));
    }
    for granularity in [512, 65536, 1 << 20] {
        cases.push(Case::new(
            jobs,
            format!("jobs-mirror-with-granularity-{granularity}"),
            format!(
                "mirrors in both modes with bitmaps of {granularity} bytes a bit follow a busy guest to the disk's last, \
                 short granule"
            ),
            move |scene| granularity_of(scene, granularity),
        ));
    }
    cases.push(Case::new(
        jobs,
        "jobs-mirror-in-place-of-another-node",
        "a mirror of a layer's disk that is to replace a node below a filter puts its copy there",
        replaces,
    ));
    for cluster in ["512", "65536"] {
        cases.push(Case::new(
            jobs,
            format!("jobs-commit-and-stream-over-{cluster}-byte-clusters"),
            format!(
                "layers whose base has {cluster}-byte clusters are committed into it, or streamed from it, byte for byte"
            ),
            move |scene| other_base(scene, cluster),
        ));
    }
    for active in [false, true] {
        let name = if active { "active" } else { "intermediate" };
        cases.push(Case::new(
            jobs,
            format!("jobs-{name}-commit-grows-short-base"),
            format!(
                "a base that is shorter than the layers grows with an {name} commit, and what it gains reads as the \
                 layers have it"
            ),
            move |scene| short_base(scene, active),
        ));
    }
    cases
}

async fn copy(
    stack: &Stack,
    copier: Copier,
    target: &Arc<block_core::Node>,
) -> Result<(), Failure> {
    let manager = JobManager::new(stack.graph());
    let before = content(stack.graph(), stack.top()).await?;
    match copier {
        Copier::Backup => {
            let options = BackupOptions::new(stack.top(), target);
            let job = manager.backup(options).await?;
            let load = Load::start(stack, 2);
            job.wait().await?;
            load.more(10).await?;
            load.stop().await?;
            let found = content(stack.graph(), target).await?;
            same(&found, &before, "the backup")
        }
        Copier::Mirror => {
            let load = Load::start(stack, 2);
            let options = MirrorOptions::new(stack.top(), target);
            let job = manager.mirror(options).await?;
            job.wait_ready().await?;
            load.more(10).await?;
            load.stop().await?;
            job.cancel(false)?;
            job.wait().await?;
            let now = content(stack.graph(), stack.top()).await?;
            let found = content(stack.graph(), target).await?;
            same(&found, &now, "the mirror")
        }
    }
}

async fn end(scene: &Arc<Scene>, stack: Stack, target: Arc<block_core::Node>) -> CaseResult {
    close_target(scene, Some(target)).await?;
    let backing = (stack.nodes.len() == 2).then(|| layer(0));
    let top = layer(stack.nodes.len() - 1);
    stack.finish(&top, backing.as_deref()).await?;
    Ok(Verdict::Passed)
}

async fn full_stack(scene: &Arc<Scene>) -> Result<Result<Stack, Verdict>, Failure> {
    Work::Backup(SyncMode::Full).stack(scene).await
}

async fn other_clusters(scene: Arc<Scene>, copier: Copier, cluster: &'static str) -> CaseResult {
    let stack = match full_stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let Some(target) = target_with(&stack, "cluster_size", cluster).await? else {
        return Ok(Verdict::NotCovered("images have no cluster_size".into()));
    };
    copy(&stack, copier, &target).await?;
    end(&scene, stack, target).await
}

async fn stale_target(scene: Arc<Scene>, copier: Copier, below: bool) -> CaseResult {
    let stack = match full_stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    if below && !stack.capabilities.contains(Capabilities::BACKING) {
        return Ok(Verdict::NotCovered("the driver has no backing".into()));
    }
    let (lab, format) = (&scene.lab, &scene.format);
    let file = if below { "stale" } else { COPY };
    let stale = stack.target(file, &format.create).await?;
    let handle = writer(&lab.graph, &stale, "stale")?;
    handle
        .write(0, stamped(STALE, 1, 0, stack.size), NONE)
        .await?;
    handle.flush().await?;
    drop(handle);
    let target = if below {
        lab.graph.release(&stale).await?;
        let backing = Some((file, format.name.as_str()));
        lab.create(&format.name, COPY, stack.size, &format.create, backing)
            .await?;
        let node = lab
            .open(&format.name, COPY, backing, &Options::new())
            .await?;
        lab.graph.keep(&node);
        node
    } else {
        stale
    };
    copy(&stack, copier, &target).await?;
    end(&scene, stack, target).await
}

async fn granularity_of(scene: Arc<Scene>, granularity: u64) -> CaseResult {
    let stack = match full_stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let target = stack.target(COPY, &scene.format.create).await?;
    let manager = JobManager::new(stack.graph());
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let load = Load::start(&stack, 2);
        let options = MirrorOptions {
            granularity: Some(granularity),
            copy_mode,
            unmap: copy_mode == CopyMode::Background,
            buffer_size: 4096,
            ..MirrorOptions::new(stack.top(), &target)
        };
        let job = manager.mirror(options).await?;
        job.wait_ready().await?;
        load.more(20).await?;
        load.stop().await?;
        stack.guest.write(stack.size - 512, 512, NONE).await?;
        job.cancel(false)?;
        job.wait().await?;
        let now = content(stack.graph(), stack.top()).await?;
        let found = content(stack.graph(), &target).await?;
        same(&found, &now, "the mirror")?;
    }
    end(&scene, stack, target).await
}

async fn replaces(scene: Arc<Scene>) -> CaseResult {
    let stack = match full_stack(&scene).await? {
        Ok(stack) => stack,
        Err(verdict) => return Ok(verdict),
    };
    let lab = &scene.lab;
    // A disk with the same content beside the guest's, which the copy takes the place of.
    let old = stack.target("replaced", &scene.format.create).await?;
    let user = writer(&lab.graph, &old, "user")?;
    let target = stack.target(COPY, &scene.format.create).await?;
    let manager = JobManager::new(stack.graph());
    let options = MirrorOptions {
        replaces: Some(old.clone()),
        ..MirrorOptions::new(stack.top(), &target)
    };
    let job = manager.mirror(options).await?;
    job.wait_ready().await?;
    stack.guest.write(512, 512, NONE).await?;
    job.complete()?;
    job.wait().await?;
    if user.node().id() != target.id() {
        return Err(format!("the user is at '{}'", user.node().name()).into());
    }
    if stack.guest.handle().node().id() != stack.top().id() {
        return Err("the guest was moved as well".into());
    }
    let now = content(stack.graph(), stack.top()).await?;
    same(&content(stack.graph(), &target).await?, &now, "the copy")?;
    drop(user);
    close_target(&scene, Some(old)).await?;
    end(&scene, stack, target).await
}

/// Two layers by hand, the lower of which has other options or another length.
async fn two_layers(
    scene: &Arc<Scene>,
    base: &Options,
    base_size: u64,
    size: u64,
) -> Result<(Vec<u8>, u64), Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    let unit = 4096;
    let mut shown = vec![0; size as usize];
    lab.create(&format.name, &layer(0), base_size, base, None)
        .await?;
    let node = lab
        .open(&format.name, &layer(0), None, &Options::new())
        .await?;
    let handle = writer(&lab.graph, &node, "maker")?;
    for at in (0..base_size).step_by(3 * unit as usize) {
        let len = (2 * unit).min(base_size - at);
        let data = stamped(LAYER, 1, at, len);
        shown[at as usize..(at + len) as usize].copy_from_slice(&data);
        handle.write(at, data, NONE).await?;
    }
    handle.flush().await?;
    drop(handle);
    lab.graph.release(&node).await?;
    let backing = Some(("layer0", format.name.as_str()));
    lab.create(&format.name, &layer(1), size, &format.create, backing)
        .await?;
    let node = lab
        .open(&format.name, &layer(1), backing, &Options::new())
        .await?;
    let handle = writer(&lab.graph, &node, "maker")?;
    for at in (512..size - unit).step_by(5 * unit as usize) {
        let data = stamped(LAYER + 1, 1, at, 1024);
        shown[at as usize..at as usize + 1024].copy_from_slice(&data);
        handle.write(at, data, NONE).await?;
        let hole = at + 2 * unit;
        if hole + 1024 <= size {
            shown[hole as usize..hole as usize + 1024].fill(0);
            handle.write_zeroes(hole, 1024, NONE).await?;
        }
    }
    handle.flush().await?;
    drop(handle);
    lab.graph.release(&node).await?;
    Ok((shown, size))
}

async fn other_base(scene: Arc<Scene>, cluster: &'static str) -> CaseResult {
    let (capabilities, _) = crate::stack::probe(&scene).await?;
    let needs = Capabilities::BACKING | Capabilities::CHANGE_BACKING;
    if let Some(verdict) = crate::stack::lacks(capabilities, needs) {
        return Ok(verdict);
    }
    let format = scene.format.name.clone();
    let known = scene.lab.registry.get(&format)?.create_options();
    if !known.iter().any(|option| option.name == "cluster_size") {
        return Ok(Verdict::NotCovered("images have no cluster_size".into()));
    }
    let graph = scene.lab.graph.clone();
    for stream in [false, true] {
        let mut base = scene.format.create.clone().with("cluster_size", cluster);
        // qcow2 has none in small clusters.
        base.take("extended_l2");
        let size = (300 << 10) + 1536;
        let (shown, size) = two_layers(&scene, &base, size, size).await?;
        let top = scene
            .lab
            .open(&format, &layer(1), None, &Options::new())
            .await?;
        let handle = writer(&graph, &top, "guest")?;
        let manager = JobManager::new(&graph);
        if stream {
            manager
                .stream(StreamOptions::new(&top))
                .await?
                .wait()
                .await?;
        } else {
            let job = manager.commit(CommitOptions::new(&top)).await?;
            job.wait_ready().await?;
            job.complete()?;
            job.wait().await?;
        }
        let found = handle.read(0, size as usize).await?;
        same(
            &found,
            &shown,
            if stream { "streamed" } else { "committed" },
        )?;
        let node = handle.node();
        crate::stack::check(&graph, &node, true).await?;
        if node.backing().is_some() {
            return Err("a backing file is left".into());
        }
        drop((handle, top, node));
        graph.close_all().await?;
    }
    Ok(Verdict::Passed)
}

async fn short_base(scene: Arc<Scene>, active: bool) -> CaseResult {
    let (capabilities, _) = crate::stack::probe(&scene).await?;
    let mut needs = Capabilities::BACKING | Capabilities::TRUNCATE;
    if !active {
        needs |= Capabilities::CHANGE_BACKING;
    }
    if let Some(verdict) = crate::stack::lacks(capabilities, needs) {
        return Ok(verdict);
    }
    if let Some(verdict) = crate::stack::cannot_reopen(&scene).await? {
        return Ok(verdict);
    }
    let (lab, format) = (&scene.lab, scene.format.name.clone());
    let graph = lab.graph.clone();
    let size = (300 << 10) + 1536;
    let (shown, size) = two_layers(&scene, &scene.format.create, 100 << 10, size).await?;
    let mut file = layer(1);
    if !active {
        let backing = Some(("layer1", format.as_str()));
        lab.create(&format, &layer(2), size, &scene.format.create, backing)
            .await?;
        file = layer(2);
    }
    let below = (!lab.records_backing(&format)).then_some(("layer0", format.as_str()));
    let top = lab.open(&format, &file, below, &Options::new()).await?;
    let handle = writer(&graph, &top, "guest")?;
    let manager = JobManager::new(&graph);
    let mut options = CommitOptions::new(&top);
    if !active {
        let chain = top.chain();
        options = options.top(&chain[0]).base(&chain[1]);
    }
    let job = manager.commit(options).await?;
    if active {
        job.wait_ready().await?;
        job.complete()?;
    }
    job.wait().await?;
    let found = handle.read(0, size as usize).await?;
    same(&found, &shown, "the disk")?;
    let base = handle.node().backing().unwrap_or_else(|| handle.node());
    if base.filename() != Some(layer(0)) || base.length() != size {
        let (name, len) = (base.filename(), base.length());
        return Err(format!("the base is {name:?} with {len} bytes").into());
    }
    same(&content(&graph, &base).await?, &shown, "the base")?;
    crate::stack::check(&graph, &base, true).await?;
    drop((handle, top, base));
    graph.close_all().await?;
    Ok(Verdict::Passed)
}
