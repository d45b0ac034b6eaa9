//! Commit: merges the layers from `top` down to above `base` into `base` (digest of block semantics, section 7). When `top`
//! is the layer that the guest writes, that is a mirror into the base; otherwise a walk over layers that don't change,
//! after which they are dropped from the chain.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    driver::{ChildRole, DriverKind, Truncate},
    error::{Error, Result},
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::{FreezeGuard, Graph, JobClaim},
    handle::BlockHandle,
    mutant,
    node::Node,
};
use futures::future::BoxFuture;

use crate::{
    chain::{self, refused},
    commit_top::CommitTop,
    copy::{BUFFER_SIZE, Chunk, CopyResult, Cursor, Engine, Plan, Policies},
    counters::Counters,
    error_policy::OnError,
    job::{Job, JobDriver, JobKind, JobOptions},
    manager::{JobManager, Turns, check_root},
    mirror::{CopyMode, Mirror, MirrorOptions, SyncMode},
    transfer::{Copier, Transfer, Watch, child},
};

/// Chunks are this long.
const CHUNK: u64 = 512 << 10;
/// Guest writes are watched with this granularity; chunks are multiples of it.
const WATCH: u64 = 64 << 10;

/// What a commit is told.
#[derive(Debug, Clone)]
pub struct CommitOptions {
    /// What every job is told.
    pub job: JobOptions,
    /// The topmost node of the chain, or any node above `top`.
    pub device: Arc<Node>,
    /// The topmost layer that is merged; `device` if there is none.
    pub top: Option<Arc<Node>>,
    /// The layer that is merged into; the lowest of the chain if there is none.
    pub base: Option<Arc<Node>>,
    /// What the overlay of `top` shall call its new backing file; the base's own file name if there is none.
    pub backing_file: Option<String>,
    /// What to do about errors.
    pub on_error: OnError,
    /// The name of the filter node.
    pub filter_node_name: Option<String>,
}

impl CommitOptions {
    /// Merges the whole chain of `device` into its lowest layer.
    pub fn new(device: &Arc<Node>) -> Self {
        Self {
            job: JobOptions::default(),
            device: device.clone(),
            top: None,
            base: None,
            backing_file: None,
            on_error: OnError::default(),
            filter_node_name: None,
        }
    }

    /// Merges from this layer on.
    #[must_use]
    pub fn top(mut self, top: &Arc<Node>) -> Self {
        self.top = Some(top.clone());
        self
    }

    /// Merges into this layer.
    #[must_use]
    pub fn base(mut self, base: &Arc<Node>) -> Self {
        self.base = Some(base.clone());
        self
    }
}

fn is_below(device: &Arc<Node>, node: &Arc<Node>) -> bool {
    device.chain().iter().any(|below| below.id() == node.id())
}

fn not_in_chain(node: &Node) -> Error {
    refused(format!(
        "'{}' is not in this backing file chain",
        node.name()
    ))
}

/// Checks the options and puts the filter in.
pub(crate) async fn set_up(
    manager: &Arc<JobManager>,
    options: CommitOptions,
    counters: Arc<Counters>,
) -> Result<Box<dyn JobDriver>> {
    let graph = manager.graph();
    let device = options.device.clone();
    let top = options.top.clone().unwrap_or_else(|| device.clone());
    let base = match &options.base {
        Some(base) => base.clone(),
        None => top
            .chain()
            .into_iter()
            .rfind(|node| node.driver().kind() != DriverKind::Filter)
            .filter(|base| base.id() != top.skip_filters().id())
            .ok_or_else(|| refused("There is no backimg image"))?,
    };
    if top.id() == base.id() {
        return Err(refused("cannot commit an image into itself"));
    }
    if top.id() != device.id() && !is_below(&device, &top) {
        return Err(not_in_chain(&top));
    }
    let Some(layers) = chain::layers(&top, &base) else {
        return Err(not_in_chain(&base));
    };
    let is_device = top.skip_filters().id() == device.skip_filters().id();
    let is_active = is_device
        || graph.parents(&top).is_empty()
        || top.permissions().used.contains(Permissions::WRITE);
    // The guest's own node is the one to put the filter over.
    let top = if is_device && graph.parents(&device).is_empty() {
        device.clone()
    } else {
        top
    };
    // An intermediate commit leaves the guest's node alone: other jobs may work above it.
    let mut claimed = if is_active {
        vec![device.clone()]
    } else {
        Vec::new()
    };
    claimed.push(base.clone());
    if is_active {
        if options.backing_file.is_some() {
            return Err(refused(
                "'backing-file' specified, but 'top' is the active layer",
            ));
        }
        let (claims, frozen) = chain::hold(graph, &top, Some(&base), claimed, JobKind::Commit)?;
        check_root(graph, &top)?;
        let turn = manager.turns().reopening.lock().await;
        let was_read_only = chain::make_writable(graph, &base).await?;
        let mirror = MirrorOptions {
            sync: SyncMode::Full,
            copy_mode: CopyMode::Background,
            buffer_size: BUFFER_SIZE,
            on_source_error: options.on_error,
            on_target_error: options.on_error,
            filter_node_name: options.filter_node_name,
            ..MirrorOptions::new(&top, &base)
        };
        let mirror = Mirror::set_up_commit(manager, mirror, claims, counters, was_read_only).await;
        // From the filter down it is frozen by the mirror now.
        drop(frozen);
        if mirror.is_err() && was_read_only {
            chain::make_read_only(graph, &base).await;
        }
        drop(turn);
        return Ok(Box::new(mirror?));
    }
    let (claims, frozen) = chain::hold(graph, &top, Some(&base), claimed, JobKind::Commit)?;
    let commit = Commit::set_up(manager, options, top, base, layers, claims).await?;
    // From the filter down it is frozen by the commit now.
    drop(frozen);
    Ok(Box::new(commit))
}

/// An intermediate commit.
struct Commit {
    graph: Arc<Graph>,
    device: Arc<Node>,
    top: Arc<Node>,
    base: Arc<Node>,
    base_was_read_only: bool,
    backing_file: Option<String>,
    on_error: OnError,
    driver: Arc<CommitTop>,
    filter: Arc<Node>,
    transfer: Option<Arc<Transfer>>,
    freeze: Option<FreezeGuard>,
    inconsistent: Vec<BlockHandle>,
    claims: Vec<JobClaim>,
    turns: Arc<Turns>,
    merged: bool,
    withdrawn: bool,
}

impl Commit {
    async fn set_up(
        manager: &Arc<JobManager>,
        options: CommitOptions,
        top: Arc<Node>,
        base: Arc<Node>,
        layers: Vec<Arc<Node>>,
        mut claims: Vec<JobClaim>,
    ) -> Result<Self> {
        let graph = manager.graph();
        let turn = manager.turns().reopening.lock().await;
        let base_was_read_only = chain::make_writable(graph, &base).await?;
        let driver = CommitTop::new(base.length() < top.length());
        let name = options.filter_node_name.as_deref();
        let kind = JobKind::Commit;
        let filter = match chain::insert(graph, driver.clone(), name, &top, &base, kind).await {
            Ok((filter, claim)) => {
                claims.push(claim);
                filter
            }
            Err(error) => {
                if base_was_read_only {
                    chain::make_read_only(graph, &base).await;
                }
                return Err(error);
            }
        };
        let mut commit = Self {
            freeze: None,
            graph: graph.clone(),
            device: options.device,
            top,
            base,
            base_was_read_only,
            backing_file: options.backing_file,
            on_error: options.on_error,
            driver,
            filter,
            transfer: None,
            inconsistent: Vec::new(),
            claims,
            turns: manager.turns().clone(),
            merged: false,
            withdrawn: false,
        };
        let connected = commit.connect(&layers);
        drop(turn);
        match connected {
            Ok(()) => Ok(commit),
            Err(error) => {
                commit.withdraw().await;
                Err(error)
            }
        }
    }

    fn connect(&mut self, layers: &[Arc<Node>]) -> Result<()> {
        let kind = JobKind::Commit.name();
        self.freeze = Some(
            self.graph
                .freeze_chain(&self.filter, Some(&self.base), kind)?,
        );
        self.driver.start();
        let handle = self.graph.attach(&self.filter, PermissionSet::NONE, "")?;
        self.inconsistent = chain::mark_inconsistent(&self.graph, layers)?;
        self.transfer = Some(Arc::new(Transfer {
            handle,
            serialise: false,
            copier: Copier {
                above: Some(self.base.clone()),
                only_allocated: true,
                unmap: true,
                compress: None,
                ask_target: false,
                serialise_target: false,
                must_hide: false,
            },
            watch: Some(Watch::new(&self.device, WATCH)?),
        }));
        Ok(())
    }

    fn transfer(&self) -> Result<Arc<Transfer>> {
        self.transfer
            .clone()
            .ok_or_else(|| refused("the commit is over"))
    }

    async fn copy(&self, job: &Arc<Job>, transfer: &Arc<Transfer>) -> Result<()> {
        let len = self.top.length();
        job.set_progress(0, len);
        if self.base.length() < len {
            let admission = transfer.handle.admit().await;
            let how = Truncate {
                exact: true,
                ..Truncate::default()
            };
            child(&admission, ChildRole::Target)?
                .truncate(len, how)
                .await?;
        }
        self.hide_what_lies_beyond(transfer).await?;
        let policies = Policies {
            read: self.on_error,
            write: self.on_error,
        };
        let mut engine = Engine::new(job, policies, BUFFER_SIZE);
        let mut plan = CommitPlan {
            transfer: transfer.clone(),
            cursor: Cursor::new(len, CHUNK),
        };
        engine.pass(&mut plan).await?;
        if mutant::is_active("commit-base-not-flushed") {
            return Ok(());
        }
        let admission = transfer.handle.admit().await;
        child(&admission, ChildRole::Target)?.flush().await
    }

    /// A longer overlay reads zeroes beyond the end of `top`, whatever a longer base holds there. It has to go on reading
    /// zeroes when `top` is gone.
    async fn hide_what_lies_beyond(&self, transfer: &Arc<Transfer>) -> Result<()> {
        let overlays = self.graph.parents(&self.filter);
        let longest = overlays.iter().map(|overlay| overlay.length()).max();
        let (start, end) = (
            self.top.length(),
            self.base.length().min(longest.unwrap_or(0)),
        );
        if start >= end {
            return Ok(());
        }
        let admission = transfer.handle.admit().await;
        child(&admission, ChildRole::Target)?
            .write_zeroes(start, end - start, RequestFlags::MAY_UNMAP)
            .await
    }

    /// Overlays read from the base from here on.
    async fn drop_layers(&mut self) -> Result<()> {
        // The end of another job may give the filter one more overlay, whose header has to be rewritten, too.
        let turns = self.turns.clone();
        let _turn = turns.finalising.lock().await;
        self.let_go();
        // Both ways show the same content: the header may go first, and a crash in between does no harm.
        for overlay in self.graph.parents(&self.filter) {
            let names_backing = overlay.edges().iter().any(|edge| {
                edge.role == ChildRole::Backing && edge.child.node().id() == self.filter.id()
            });
            if names_backing && !mutant::is_active("commit-header-not-rewritten") {
                let name = self.backing_file.as_deref();
                chain::rewrite_backing(&self.graph, &turns, &overlay, Some(&self.base), name)
                    .await?;
            }
        }
        self.graph.replace_node(&self.filter, &self.base).await?;
        self.merged = true;
        Ok(())
    }

    /// Gives back what the graph was asked for. In this order: a filter that has stopped reads whole disks for its parents, and what
    /// somebody else changes in the graph meanwhile must find nobody who says that there is none.
    fn let_go(&mut self) {
        self.inconsistent.clear();
        self.driver.stop();
        // With this handle gone the filter's permissions are worked out anew.
        self.transfer = None;
        self.freeze = None;
    }

    async fn withdraw(&mut self) {
        if self.withdrawn {
            return;
        }
        self.withdrawn = true;
        self.let_go();
        if self.merged {
            let keeper = self.graph.attach(&self.base, PermissionSet::NONE, "");
            chain::retire(&self.graph, &self.filter, false).await;
            drop(keeper);
        } else {
            chain::withdraw(&self.graph, &self.filter).await;
        }
        if self.base_was_read_only {
            chain::restore_read_only(&self.graph, &self.turns, &self.base).await;
        }
        // The guest may have moved to another disk meanwhile, and have left nothing above.
        let highest = if self.merged { &self.base } else { &self.top };
        chain::leave(&self.graph, highest).await;
        self.claims.clear();
    }
}

#[async_trait]
impl JobDriver for Commit {
    async fn run(&mut self, job: &Arc<Job>) -> Result<()> {
        let transfer = self.transfer()?;
        self.copy(job, &transfer).await
    }

    async fn prepare(&mut self, _job: &Arc<Job>) -> Result<()> {
        self.drop_layers().await
    }

    async fn clean(&mut self, _job: &Arc<Job>) {
        self.withdraw().await;
    }
}

struct CommitPlan {
    transfer: Arc<Transfer>,
    cursor: Cursor,
}

impl Plan for CommitPlan {
    fn next(&mut self) -> Option<Chunk> {
        self.cursor.next()
    }

    fn copy(&self, chunk: Chunk) -> BoxFuture<'static, CopyResult> {
        let transfer = self.transfer.clone();
        Box::pin(async move { transfer.copy(chunk, || ()).await })
    }
}
