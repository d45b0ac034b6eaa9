//! The kinds and modes of jobs, each started in the same way on a [`Stack`], and what must be there when one has ended.

use std::sync::Arc;

use block_core::{Capabilities, Node, Options};
use jobs::{
    BackupOptions, CommitOptions, CopyMode, Job, JobManager, JobOptions, MirrorOptions, OnError,
    StreamOptions, SyncMode, TargetBacking,
};

use crate::{
    case::{Failure, Scene, Verdict},
    stack::{Stack, content, layer, reader, same},
};

/// The name of the file that a copy goes to.
pub(super) const COPY: &str = "copy";

/// A kind of job in one of its modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// The guest's layer into the one below it, or all down to the lowest.
    CommitActive,
    /// The two layers below the guest's into the lowest.
    CommitMiddle,
    /// Everything into the guest's image.
    StreamAll,
    /// The layers between the guest's image and the lowest.
    StreamTo,
    Mirror(SyncMode, CopyMode),
    Backup(SyncMode),
}

impl Work {
    pub(super) const ALL: [Self; 13] = [
        Self::CommitActive,
        Self::CommitMiddle,
        Self::StreamAll,
        Self::StreamTo,
        Self::Mirror(SyncMode::Full, CopyMode::Background),
        Self::Mirror(SyncMode::Top, CopyMode::Background),
        Self::Mirror(SyncMode::None, CopyMode::Background),
        Self::Mirror(SyncMode::Full, CopyMode::WriteBlocking),
        Self::Mirror(SyncMode::Top, CopyMode::WriteBlocking),
        Self::Mirror(SyncMode::None, CopyMode::WriteBlocking),
        Self::Backup(SyncMode::Full),
        Self::Backup(SyncMode::Top),
        Self::Backup(SyncMode::None),
    ];

    /// One of each code path that copies.
    pub(super) const KINDS: [Self; 6] = [
        Self::CommitActive,
        Self::CommitMiddle,
        Self::StreamAll,
        Self::Mirror(SyncMode::Full, CopyMode::Background),
        Self::Mirror(SyncMode::Full, CopyMode::WriteBlocking),
        Self::Backup(SyncMode::Full),
    ];

    pub(super) fn name(self) -> String {
        let sync = |sync| match sync {
            SyncMode::Full => "full",
            SyncMode::Top => "top",
            SyncMode::None => "none",
        };
        match self {
            Self::CommitActive => "active-commit".into(),
            Self::CommitMiddle => "intermediate-commit".into(),
            Self::StreamAll => "stream".into(),
            Self::StreamTo => "stream-to-base".into(),
            Self::Mirror(mode, CopyMode::Background) => format!("mirror-{}", sync(mode)),
            Self::Mirror(mode, CopyMode::WriteBlocking) => {
                format!("write-blocking-mirror-{}", sync(mode))
            }
            Self::Backup(mode) => format!("backup-{}", sync(mode)),
        }
    }

    /// Ready before it ends, so that somebody has to complete it.
    pub(super) const fn gets_ready(self) -> bool {
        matches!(self, Self::CommitActive | Self::Mirror(..))
    }

    /// Writes to an image of its own.
    pub(super) const fn has_target(self) -> bool {
        matches!(self, Self::Mirror(..) | Self::Backup(_))
    }

    const fn needs(self) -> Capabilities {
        match self {
            Self::CommitActive => Capabilities::BACKING,
            Self::Mirror(SyncMode::Full, _) | Self::Backup(SyncMode::Full | SyncMode::None) => {
                Capabilities::empty()
            }
            Self::Backup(SyncMode::Top) => Capabilities::BACKING,
            _ => Capabilities::BACKING.union(Capabilities::CHANGE_BACKING),
        }
    }

    /// Why a commit that ends without a switch-over can't be judged: what it wrote into its base makes an overlay whose
    /// header says what the base was like (and can't be rewritten) refuse it.
    pub(super) fn leaves_base_changed(self, stack: &Stack) -> Option<Verdict> {
        match self {
            Self::CommitActive => {
                crate::stack::lacks(stack.capabilities, Capabilities::CHANGE_BACKING)
            }
            _ => None,
        }
    }

    /// The disk that it works on.
    pub(super) async fn stack(self, scene: &Arc<Scene>) -> Result<Result<Stack, Verdict>, Failure> {
        let (capabilities, _) = crate::stack::probe(scene).await?;
        if matches!(
            self,
            Self::CommitActive | Self::CommitMiddle | Self::StreamAll | Self::StreamTo
        ) && let Some(verdict) = crate::stack::cannot_reopen(scene).await?
        {
            return Ok(Err(verdict));
        }
        let names = scene.lab.records_backing(&scene.format.name);
        let layers = match self {
            Self::CommitMiddle | Self::StreamTo => 4,
            Self::StreamAll => 3,
            Self::CommitActive if names => 3,
            _ if capabilities.contains(Capabilities::BACKING) => 2,
            Self::CommitActive => 2,
            _ => 1,
        };
        Stack::new(scene, layers, self.needs()).await
    }

    /// Starts it; the second is the image that it writes to, if it has one of its own.
    pub(super) async fn start(
        self,
        stack: &Stack,
        manager: &Arc<JobManager>,
        job: JobOptions,
    ) -> Result<(Arc<Job>, Option<Arc<Node>>), Failure> {
        self.start_with(stack, manager, job, OnError::Report).await
    }

    /// The same with a policy for errors of either side.
    pub(super) async fn start_with(
        self,
        stack: &Stack,
        manager: &Arc<JobManager>,
        job: JobOptions,
        on_error: OnError,
    ) -> Result<(Arc<Job>, Option<Arc<Node>>), Failure> {
        let (top, base) = (stack.top(), &stack.nodes[0]);
        let target = if self.has_target() {
            Some(stack.target(COPY, &stack.scene.format.create).await?)
        } else {
            None
        };
        let started = match (self, &target) {
            (Self::Mirror(sync, copy_mode), Some(target)) => {
                let options = MirrorOptions {
                    job,
                    sync,
                    copy_mode,
                    granularity: Some(4096),
                    on_source_error: on_error,
                    on_target_error: on_error,
                    target_backing: match sync {
                        SyncMode::Full => TargetBacking::Keep,
                        _ => TargetBacking::FromSource,
                    },
                    ..MirrorOptions::new(top, target)
                };
                manager.mirror(options).await
            }
            (Self::Backup(sync), Some(target)) => {
                let options = BackupOptions {
                    job,
                    sync,
                    on_source_error: on_error,
                    on_target_error: on_error,
                    ..BackupOptions::new(top, target)
                };
                manager.backup(options).await
            }
            (Self::CommitActive, _) => {
                let mut options = CommitOptions::new(top);
                (options.job, options.on_error) = (job, on_error);
                manager.commit(options).await
            }
            (Self::CommitMiddle, _) => {
                let mut options = CommitOptions::new(top).top(&stack.nodes[2]).base(base);
                (options.job, options.on_error) = (job, on_error);
                manager.commit(options).await
            }
            (Self::StreamTo, _) => {
                let mut options = StreamOptions::new(top).base(base);
                (options.job, options.on_error) = (job, on_error);
                manager.stream(options).await
            }
            _ => {
                let mut options = StreamOptions::new(top);
                (options.job, options.on_error) = (job, on_error);
                manager.stream(options).await
            }
        };
        Ok((started?, target))
    }

    /// The file that the guest uses after a successful end, and what it has below.
    pub(super) fn outcome(self, stack: &Stack) -> (String, Vec<String>) {
        let top = layer(stack.nodes.len() - 1);
        let below = |count: usize| (0..count).rev().map(layer).collect::<Vec<_>>();
        match self {
            Self::CommitActive => (layer(0), Vec::new()),
            Self::CommitMiddle | Self::StreamTo => (top, vec![layer(0)]),
            Self::StreamAll => (top, Vec::new()),
            Self::Mirror(SyncMode::Full, _) => (COPY.into(), Vec::new()),
            Self::Mirror(SyncMode::Top, _) => (COPY.into(), below(stack.nodes.len() - 1)),
            Self::Mirror(SyncMode::None, _) => (COPY.into(), below(stack.nodes.len())),
            Self::Backup(_) => (top, below(stack.nodes.len() - 1)),
        }
    }
}

/// Options for a job that is found by its name.
pub(super) fn named(id: &str) -> JobOptions {
    JobOptions {
        id: Some(id.into()),
        ..JobOptions::default()
    }
}

/// The chain of the guest's disk, as file names: in the graph, and as the headers have it.
pub(super) async fn expect_chain(
    stack: &Stack,
    top: &str,
    below: &[String],
) -> Result<(), Failure> {
    let node = stack.guest.handle().node();
    let found: Vec<String> = std::iter::once(node.clone())
        .chain(node.chain())
        .filter_map(|node| node.filename())
        .collect();
    let expected: Vec<String> = std::iter::once(top.to_owned())
        .chain(below.iter().cloned())
        .collect();
    if found != expected {
        return Err(format!("the guest's chain is {found:?}, not {expected:?}").into());
    }
    if !stack.scene.lab.records_backing(&stack.scene.format.name) {
        return Ok(());
    }
    let info = reader(stack.graph(), &node)?.info().await?;
    if info.backing_filename.as_ref() != below.first() {
        return Err(format!(
            "the header of '{top}' names {:?} as its backing file, not {:?}",
            info.backing_filename,
            below.first()
        )
        .into());
    }
    Ok(())
}

/// For each sector, whether layers from the guest's down to above the one below it decide what it holds.
pub(super) async fn own_sectors(stack: &Stack) -> Result<Vec<bool>, Failure> {
    let below = stack.top().backing();
    let mut own = Vec::new();
    let mut at = 0;
    while at < stack.size {
        let (allocated, run) = stack
            .guest
            .handle()
            .is_allocated_above(below.as_ref(), false, at, stack.size - at)
            .await?;
        own.extend(std::iter::repeat_n(allocated, (run / 512) as usize));
        at += run;
    }
    Ok(own)
}

/// The content of a backup, which was taken when the disk showed `before`; `own` are the sectors that mode `top` copies.
pub(super) async fn expect_backup(
    stack: &Stack,
    target: &Arc<Node>,
    sync: SyncMode,
    before: &[u8],
    own: &[bool],
) -> Result<u64, Failure> {
    let saved = content(stack.graph(), target).await?;
    if sync == SyncMode::Full {
        same(&saved, before, "the backup")?;
        return Ok(saved.len() as u64 / 512);
    }
    let now = content(stack.graph(), &stack.guest.handle().node()).await?;
    let mut changed = 0;
    for (n, old) in before.chunks(512).enumerate() {
        let range = n * 512..n * 512 + old.len();
        let overwritten = now[range.clone()] != *old;
        let is_due = match sync {
            SyncMode::Top => own[n],
            _ => overwritten,
        };
        changed += u64::from(overwritten);
        if is_due {
            same(&saved[range], old, &format!("the backup, sector {n}"))?;
        }
    }
    Ok(changed)
}

/// Closes a target that was kept.
pub(super) async fn close_target(scene: &Scene, target: Option<Arc<Node>>) -> Result<(), Failure> {
    if let Some(target) = target {
        crate::stack::check(&scene.lab.graph, &target, true).await?;
        scene.lab.graph.release(&target).await?;
    }
    Ok(())
}

/// A target with other options than the format's own.
pub(super) async fn target_with(
    stack: &Stack,
    key: &str,
    value: impl Into<serde_json::Value>,
) -> Result<Option<Arc<Node>>, Failure> {
    let format = &stack.scene.format;
    let known = stack.scene.lab.registry.get(&format.name)?;
    if !known
        .create_options()
        .iter()
        .any(|option| option.name == key)
    {
        return Ok(None);
    }
    let mut create: Options = format.create.clone().with(key, value);
    if key == "cluster_size" {
        // qcow2 has none in small clusters.
        create.take("extended_l2");
    }
    stack.target(COPY, &create).await.map(Some)
}
