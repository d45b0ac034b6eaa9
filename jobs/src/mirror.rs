//! Mirror: copies a disk to another node, keeps the copy the same while the guest writes, and switches over to it
//! (digest of block semantics, section 6). An active commit is a mirror into the source's own base.
//!
//! What isn't in the target yet is in a dirty bitmap of the source. A bit is cleared *before* its granule is read, and set by
//! the core when a write ends, so that a write that comes between reading and writing is copied again. In write-blocking
//! mode copies hold a ticket of the filter, and so never land on top of a newer write.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use block_core::{
    bitmap::DirtyBitmap,
    chain::is_allocated_above,
    driver::{ChildRole, Truncate},
    error::Result,
    flags::PermissionSet,
    graph::{FreezeGuard, Graph, JobClaim},
    handle::BlockHandle,
    mutant,
    node::Node,
};
use futures::future::BoxFuture;

use crate::{
    chain::{self, refused},
    copy::{BUFFER_SIZE, Chunk, CopyError, CopyResult, Engine, MAX_CHUNK, Plan, Policies},
    counters::{Copied, Counters},
    error_policy::OnError,
    job::{Job, JobDriver, JobKind, JobOptions},
    manager::{JobManager, Turns, check_root},
    mirror_top::{MirrorState, MirrorTop},
    state::Ending,
    transfer::{Copier, Transfer, Watch, advance, child},
};

/// Which part of a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SyncMode {
    /// Everything that can be read.
    #[default]
    Full,
    /// What the topmost layer holds.
    Top,
    /// Nothing of what is there: only what is written from now on (mirror), or overwritten (backup).
    None,
}

/// What a mirror does about a guest's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CopyMode {
    /// It is copied later.
    #[default]
    Background,
    /// It is written to both before it completes.
    WriteBlocking,
}

/// What becomes of the target's backing file at the switch-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TargetBacking {
    /// It stays as it is.
    #[default]
    Keep,
    /// It becomes that of the source (`top`), or the source itself (`none`), in the graph and in the header.
    FromSource,
}

/// What a mirror is told.
#[derive(Debug, Clone)]
pub struct MirrorOptions {
    /// What every job is told.
    pub job: JobOptions,
    /// The disk that is copied. No other node may have it as a child.
    pub device: Arc<Node>,
    /// Where it is copied to; of the same length.
    pub target: Arc<Node>,
    /// The node that the target takes the place of at the end, if not `device`.
    pub replaces: Option<Arc<Node>>,
    /// What is copied.
    pub sync: SyncMode,
    /// What happens to writes.
    pub copy_mode: CopyMode,
    /// Bytes per bit of the dirty bitmap, a power of two from 512 to 64 MiB. By default the target's cluster size,
    /// from 4 KiB to 64 KiB.
    pub granularity: Option<u64>,
    /// The most bytes in flight.
    pub buffer_size: u64,
    /// Zeroes may be deallocated in the target.
    pub unmap: bool,
    /// What to do about errors of the source.
    pub on_source_error: OnError,
    /// What to do about errors of the target.
    pub on_target_error: OnError,
    /// What becomes of the target's backing file.
    pub target_backing: TargetBacking,
    /// The name of the filter node.
    pub filter_node_name: Option<String>,
}

impl MirrorOptions {
    /// A full mirror in the background.
    pub fn new(device: &Arc<Node>, target: &Arc<Node>) -> Self {
        Self {
            job: JobOptions::default(),
            device: device.clone(),
            target: target.clone(),
            replaces: None,
            sync: SyncMode::default(),
            copy_mode: CopyMode::default(),
            granularity: None,
            buffer_size: BUFFER_SIZE,
            unmap: true,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
            target_backing: TargetBacking::default(),
            filter_node_name: None,
        }
    }
}

/// With no more than this left (and a whole pass behind it), a mirror whose guest never rests counts as in sync: what is
/// left is copied while the guest waits. Bytes.
const NEARLY_NOTHING: u64 = 4 << 20;
/// How often a mirror that is in sync looks whether it still is.
const IDLE: Duration = Duration::from_millis(10);
/// How often what is left is copied before the guest has to wait for the rest.
const CATCH_UP: usize = 8;

/// A mirror job.
pub(crate) struct Mirror {
    graph: Arc<Graph>,
    source: Arc<Node>,
    target: Arc<Node>,
    replaces: Option<Arc<Node>>,
    sync: SyncMode,
    target_backing: TargetBacking,
    /// For a commit: the base is the target, and was read-only.
    target_was_read_only: bool,
    state: Arc<MirrorState>,
    filter: Arc<Node>,
    transfer: Option<Arc<Transfer>>,
    freeze: Option<FreezeGuard>,
    inconsistent: Vec<BlockHandle>,
    claims: Vec<JobClaim>,
    policies: Policies,
    buffer_size: u64,
    turns: Arc<Turns>,
    pivoted: bool,
    withdrawn: bool,
}

impl Mirror {
    /// Checks the options and puts the filter in.
    pub(crate) async fn set_up(
        manager: &Arc<JobManager>,
        options: MirrorOptions,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let (source, target) = (&options.device, &options.target);
        if source.id() == target.id() {
            return Err(refused("Can't mirror node into itself"));
        }
        if source.chain().iter().any(|node| node.id() == target.id()) {
            return Err(refused(format!(
                "Can't mirror node into itself: '{}' is in the chain of '{}'",
                target.name(),
                source.name()
            )));
        }
        if source.length() != target.length() {
            return Err(refused("Source and target image have different sizes"));
        }
        if let Some(replaces) = &options.replaces
            && replaces.length() != target.length()
        {
            return Err(refused(
                "cannot replace image with a mirror image of different size",
            ));
        }
        let claimed = [source.clone(), target.clone()];
        let claims = chain::claim(manager.graph(), claimed, JobKind::Mirror)?;
        // Whoever comes second is told of the job that was first, rather than of its filter.
        check_root(manager.graph(), source)?;
        Self::begin(manager, options, None, claims, counters, false).await
    }

    /// An active commit: `options.target` is in the chain of `options.device`.
    pub(crate) async fn set_up_commit(
        manager: &Arc<JobManager>,
        options: MirrorOptions,
        claims: Vec<JobClaim>,
        counters: Arc<Counters>,
        target_was_read_only: bool,
    ) -> Result<Self> {
        let base = options.target.clone();
        Self::begin(
            manager,
            options,
            Some(base),
            claims,
            counters,
            target_was_read_only,
        )
        .await
    }

    async fn begin(
        manager: &Arc<JobManager>,
        options: MirrorOptions,
        base: Option<Arc<Node>>,
        mut claims: Vec<JobClaim>,
        counters: Arc<Counters>,
        target_was_read_only: bool,
    ) -> Result<Self> {
        let graph = manager.graph().clone();
        let (source, target) = (options.device, options.target);
        let cluster = chain::cluster_size(&graph, &target)
            .await?
            .unwrap_or(4096)
            .next_power_of_two();
        let mut granularity = match options.granularity {
            Some(granularity) => check_granularity(granularity)?,
            None => cluster.clamp(4096, 65536),
        };
        if options.sync != SyncMode::Full {
            // A part of a cluster is filled up with what the target has below it now, which isn't what it gets in the end:
            // clusters are copied whole.
            granularity = granularity.max(cluster);
        }
        let bitmap = Arc::new(DirtyBitmap::new(source.length(), granularity)?);
        let state = MirrorState::new(
            bitmap.clone(),
            options.copy_mode == CopyMode::WriteBlocking,
            base.is_some(),
            target.length() < source.length(),
            options.unmap,
            options.sync == SyncMode::Full,
            counters,
        );
        let between = match &base {
            Some(base) => chain::layers(&source, base).unwrap_or_default(),
            None => Vec::new(),
        };
        // From here on no write is missed: one that ended before can be read, and one that ends later is recorded.
        source.add_bitmap(bitmap.clone());
        let driver = Arc::new(MirrorTop {
            state: state.clone(),
        });
        let name = options.filter_node_name.as_deref();
        let kind = if base.is_some() {
            JobKind::Commit
        } else {
            JobKind::Mirror
        };
        let filter = match chain::insert(&graph, driver, name, &source, &target, kind).await {
            Ok((filter, claim)) => {
                claims.push(claim);
                filter
            }
            Err(error) => {
                source.remove_bitmap(&bitmap);
                return Err(error);
            }
        };
        let mut mirror = Self {
            freeze: None,
            graph,
            source,
            target,
            replaces: options.replaces,
            sync: options.sync,
            target_backing: options.target_backing,
            // As long as it isn't set up, that is its caller's business.
            target_was_read_only: false,
            state,
            filter,
            transfer: None,
            inconsistent: Vec::new(),
            claims,
            policies: Policies {
                read: options.on_source_error,
                write: options.on_target_error,
            },
            buffer_size: options.buffer_size,
            turns: manager.turns().clone(),
            pivoted: false,
            withdrawn: false,
        };
        match mirror.connect(base, &between) {
            Ok(()) => {
                mirror.target_was_read_only = target_was_read_only;
                Ok(mirror)
            }
            Err(error) => {
                mirror.withdraw().await;
                Err(error)
            }
        }
    }

    fn connect(&mut self, base: Option<Arc<Node>>, between: &[Arc<Node>]) -> Result<()> {
        if let Some(base) = &base {
            let kind = JobKind::Commit.name();
            self.freeze = Some(self.graph.freeze_chain(&self.filter, Some(base), kind)?);
        }
        self.state.start();
        let handle = self.graph.attach(&self.filter, chain::READER, "")?;
        if between.len() > 1 {
            self.inconsistent = chain::mark_inconsistent(&self.graph, &between[1..])?;
        }
        let granularity = self.state.bitmap.granularity();
        self.transfer = Some(Arc::new(Transfer {
            handle,
            serialise: self.state.write_blocking,
            copier: Copier {
                only_allocated: base.is_some(),
                above: base,
                unmap: self.state.unmap,
                compress: None,
                // What shows through from a backing file may change, or get another one: it has to be hidden.
                ask_target: self.target_backing == TargetBacking::Keep
                    && self.target.backing().is_none(),
                serialise_target: false,
                must_hide: self.target_backing == TargetBacking::FromSource
                    && self.sync != SyncMode::Full,
            },
            watch: Some(Watch::new(&self.source, granularity)?),
        }));
        Ok(())
    }

    fn plan(&self) -> Result<MirrorPlan> {
        let transfer = self
            .transfer
            .clone()
            .ok_or_else(|| refused("the mirror is over"))?;
        Ok(MirrorPlan {
            state: self.state.clone(),
            transfer,
            cursor: 0,
            max: MAX_CHUNK.max(self.state.bitmap.granularity()),
        })
    }

    /// Finds out what has to be copied at all.
    async fn scan(&self, job: &Arc<Job>, transfer: &Transfer) -> Result<()> {
        const STEP: u64 = 1 << 30;
        let bitmap = &self.state.bitmap;
        let end = self.source.length();
        let below = match self.sync {
            SyncMode::Top => self.source.backing(),
            _ => None,
        };
        let mut at = 0;
        while at < end {
            job.pause_point().await?;
            let admission = transfer.handle.admit().await;
            let source = child(&admission, ChildRole::Filtered)?;
            let target = child(&admission, ChildRole::Target)?;
            let mut len = (end - at).min(STEP);
            let above = transfer.copier.above.as_ref().or(below.as_ref());
            let wanted = if transfer.copier.only_allocated || above.is_some() {
                let (allocated, run) =
                    is_allocated_above(source.node(), above, false, at, len).await?;
                len = advance(run, len)?;
                allocated
            } else {
                let status = source.block_status(at, len).await?;
                len = advance(status.len, len)?;
                if status.is_zero() && transfer.copier.ask_target {
                    let there = target.block_status(at, len).await?;
                    len = advance(there.len, len)?;
                    !there.is_zero()
                } else {
                    true
                }
            };
            drop(admission);
            if wanted {
                bitmap.set(at, len);
            }
            at += len;
            job.set_remaining(bitmap.dirty_bytes());
        }
        Ok(())
    }

    async fn grow_target(&self, transfer: &Transfer) -> Result<()> {
        let length = self.source.length();
        if !self.state.grow || self.target.length() >= length {
            return Ok(());
        }
        let admission = transfer.handle.admit().await;
        let how = Truncate {
            exact: true,
            ..Truncate::default()
        };
        child(&admission, ChildRole::Target)?
            .truncate(length, how)
            .await
    }

    async fn flush_target(&self, transfer: &Transfer) -> Result<()> {
        let admission = transfer.handle.admit().await;
        child(&admission, ChildRole::Target)?.flush().await
    }

    /// Copies until the guest's writes are all that is left, is ready then, and stays in sync until it is told to end.
    async fn follow(&self, job: &Arc<Job>, engine: &mut Engine) -> Result<()> {
        let mut plan = self.plan()?;
        let mut passes = 0_u32;
        loop {
            let seen = job.epoch();
            plan.cursor = 0;
            let failures = engine.failures();
            engine.pass(&mut plan).await?;
            let dirty = self.state.bitmap.dirty_bytes();
            job.set_remaining(dirty);
            passes = passes.saturating_add(1);
            let clean_pass = engine.failures() == failures;
            let in_sync = dirty == 0 || (passes > 2 && dirty <= NEARLY_NOTHING);
            if clean_pass && in_sync {
                if !job.is_ready() {
                    self.flush_target(&plan.transfer).await?;
                    job.set_ready();
                }
                if job.ending().is_some() {
                    return Ok(());
                }
            }
            if dirty == 0 {
                job.changed(seen, Some(IDLE)).await;
            }
        }
    }

    /// Brings the target to one point in time and, if that was asked for, switches over.
    async fn last_step(&mut self, job: &Arc<Job>, engine: &mut Engine) -> Result<()> {
        let turns = self.turns.clone();
        let _turn = turns.finalising.lock().await;
        let mut plan = self.plan()?;
        let bitmap = self.state.bitmap.clone();
        for _ in 0..CATCH_UP {
            if bitmap.dirty_bytes() <= MAX_CHUNK {
                break;
            }
            plan.cursor = 0;
            engine.rush(&mut plan).await?;
        }
        // The guest waits from here on. All producers are stopped that could write to the source.
        let drained = self
            .graph
            .drain_except(&self.source, &plan.transfer.handle)
            .await;
        while bitmap.dirty_granules() != 0 && !mutant::is_active("mirror-no-last-pass") {
            plan.cursor = 0;
            engine.rush(&mut plan).await?;
        }
        job.set_remaining(0);
        if !mutant::is_active("mirror-target-not-flushed") {
            self.flush_target(&plan.transfer).await?;
        }
        drop(plan);
        if job.ending() == Some(Ending::Complete) {
            self.switch_over().await?;
        }
        drop(drained);
        Ok(())
    }

    async fn switch_over(&mut self) -> Result<()> {
        // First: a filter that has stopped reads these as whole disks for its parents, in everybody's eyes.
        self.inconsistent.clear();
        self.state.stop();
        self.freeze = None;
        self.transfer = None;
        if self.target_backing == TargetBacking::FromSource {
            let backing = match self.sync {
                SyncMode::Full => None,
                SyncMode::Top => self.source.backing(),
                SyncMode::None => Some(self.source.clone()),
            };
            let image = self.target.skip_filters();
            self.graph.set_backing(&image, backing.as_ref()).await?;
            chain::rewrite_backing(&self.graph, &self.turns, &image, backing.as_ref(), None)
                .await?;
        }
        match &self.replaces {
            Some(replaced) if replaced.id() != self.source.id() => {
                self.graph.remove_filter(&self.filter).await?;
                self.graph.replace_node(replaced, &self.target).await?;
            }
            _ => self.graph.replace_node(&self.filter, &self.target).await?,
        }
        self.pivoted = true;
        Ok(())
    }

    /// Takes the filter out without a switch-over.
    async fn withdraw(&mut self) {
        if self.withdrawn {
            return;
        }
        self.withdrawn = true;
        // As in `switch_over`.
        self.inconsistent.clear();
        self.state.stop();
        self.transfer = None;
        self.freeze = None;
        if self.pivoted {
            // The old chain may hold the target as its base: it must not go with it.
            let keeper = self.graph.attach(&self.target, PermissionSet::NONE, "");
            chain::retire(&self.graph, &self.filter, false).await;
            drop(keeper);
        } else {
            chain::withdraw(&self.graph, &self.filter).await;
            if self.target_was_read_only {
                chain::restore_read_only(&self.graph, &self.turns, &self.target).await;
            }
        }
        self.source.remove_bitmap(&self.state.bitmap);
        self.claims.clear();
    }
}

#[async_trait]
impl JobDriver for Mirror {
    async fn run(&mut self, job: &Arc<Job>) -> Result<()> {
        let transfer = self.plan()?.transfer;
        self.grow_target(&transfer).await?;
        if self.sync != SyncMode::None || transfer.copier.only_allocated {
            self.scan(job, &transfer).await?;
        }
        self.state.write_through();
        drop(transfer);
        let mut engine = Engine::new(job, self.policies, self.buffer_size);
        self.follow(job, &mut engine).await
    }

    async fn prepare(&mut self, job: &Arc<Job>) -> Result<()> {
        let mut engine = Engine::new(job, self.policies, self.buffer_size);
        self.last_step(job, &mut engine).await
    }

    async fn clean(&mut self, _job: &Arc<Job>) {
        self.withdraw().await;
    }
}

/// What is dirty, from the start to the end of the disk.
struct MirrorPlan {
    state: Arc<MirrorState>,
    transfer: Arc<Transfer>,
    cursor: u64,
    max: u64,
}

impl Plan for MirrorPlan {
    fn next(&mut self) -> Option<Chunk> {
        let (offset, len) = self.state.bitmap.next_dirty(self.cursor, self.max)?;
        self.cursor = offset + len;
        Some(Chunk { offset, len })
    }

    fn copy(&self, chunk: Chunk) -> BoxFuture<'static, CopyResult> {
        let (transfer, state) = (self.transfer.clone(), self.state.clone());
        Box::pin(async move {
            transfer
                .copy(chunk, || state.bitmap.clear(chunk.offset, chunk.len))
                .await
        })
    }

    fn copied(&mut self, job: &Job, chunk: Chunk, _copied: &Copied) {
        job.advance(chunk.len);
        job.set_remaining(self.state.bitmap.dirty_bytes());
    }

    /// The next pass finds it.
    fn take_back(&mut self, chunk: Chunk) -> bool {
        if !mutant::is_active("mirror-failed-chunk-forgotten") {
            self.state.bitmap.set(chunk.offset, chunk.len);
        }
        true
    }

    fn other_error(&mut self) -> Option<CopyError> {
        self.state.take_error().map(CopyError::write)
    }
}

fn check_granularity(granularity: u64) -> Result<u64> {
    if !(512..=64 << 20).contains(&granularity) {
        return Err(refused(
            "Parameter 'granularity' expects a value in range [512B, 64MB]",
        ));
    }
    if !granularity.is_power_of_two() {
        return Err(refused("Parameter 'granularity' expects a power of 2"));
    }
    Ok(granularity)
}
