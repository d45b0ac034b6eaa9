//! Stream: copies into an image what the layers below it hold, down to a base or all of them, and drops them from its chain
//! then (digest of block semantics, section 8). Every chunk is a copy-on-read prefetch at the image's own node, so that
//! the guest's writes always win.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    buffer::Buffer,
    driver::DriverKind,
    error::Result,
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::{FreezeGuard, Graph, JobClaim},
    handle::BlockHandle,
    mutant,
    node::Node,
};
use futures::future::BoxFuture;

use crate::{
    chain::{self, refused},
    copy::{BUFFER_SIZE, Chunk, CopyError, CopyResult, Cursor, Engine, Plan, Policies},
    counters::Copied,
    error_policy::OnError,
    event::IoSide,
    job::{Job, JobDriver, JobKind, JobOptions},
    manager::{JobManager, Turns},
    transfer::{Watch, advance},
};

/// Chunks are this long.
const CHUNK: u64 = 512 << 10;
/// Guest writes are watched with this granularity; chunks are multiples of it.
const WATCH: u64 = 64 << 10;

/// What a stream is told.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// What every job is told.
    pub job: JobOptions,
    /// The image that is copied into. It may be any layer of a chain.
    pub device: Arc<Node>,
    /// The first layer that stays: nothing is copied from it. `None` means that none stays.
    pub base: Option<Arc<Node>>,
    /// The last layer that is copied from; another way to say what stays.
    pub bottom: Option<Arc<Node>>,
    /// What `device` shall call its new backing file; the base's own file name if there is none.
    pub backing_file: Option<String>,
    /// What to do about errors.
    pub on_error: OnError,
}

impl StreamOptions {
    /// Copies the whole chain below `device` into it.
    pub fn new(device: &Arc<Node>) -> Self {
        Self {
            job: JobOptions::default(),
            device: device.clone(),
            base: None,
            bottom: None,
            backing_file: None,
            on_error: OnError::default(),
        }
    }

    /// Stops above this layer.
    #[must_use]
    pub fn base(mut self, base: &Arc<Node>) -> Self {
        self.base = Some(base.clone());
        self
    }
}

const PERMISSIONS: PermissionSet = PermissionSet::new(
    Permissions::CONSISTENT_READ.union(Permissions::WRITE_UNCHANGED),
    Permissions::all().difference(Permissions::RESIZE),
);

/// A stream job.
pub(crate) struct Stream {
    graph: Arc<Graph>,
    top: Arc<Node>,
    top_was_read_only: bool,
    base: Option<Arc<Node>>,
    backing_file: Option<String>,
    on_error: OnError,
    handle: Option<Arc<BlockHandle>>,
    /// Keeps `top` open to the end, also when the disk that it was a layer of goes away.
    keeper: Option<BlockHandle>,
    /// It is a layer of a disk, not the disk itself.
    is_layer: bool,
    turns: Arc<Turns>,
    freeze: Option<FreezeGuard>,
    claims: Vec<JobClaim>,
}

impl Stream {
    /// Checks the options.
    pub(crate) async fn set_up(manager: &Arc<JobManager>, options: StreamOptions) -> Result<Self> {
        let graph = manager.graph();
        let top = options.device.skip_filters();
        let mut base = options.base.clone();
        if let Some(bottom) = &options.bottom {
            if base.is_some() {
                return Err(refused(
                    "'base' and 'bottom' cannot be specified at the same time",
                ));
            }
            let is_there = top.chain().iter().any(|node| node.id() == bottom.id());
            if !is_there {
                return Err(refused(format!(
                    "Node '{}' is not in a chain starting from '{}'",
                    bottom.name(),
                    options.device.name()
                )));
            }
            if bottom.driver().kind() == DriverKind::Filter {
                return Err(refused(format!(
                    "Node '{}' is a filter, use a non-filter node as 'bottom'",
                    bottom.name()
                )));
            }
            base = bottom.backing();
        }
        if let Some(base) = &base
            && chain::layers(&top, base).is_none()
        {
            return Err(refused(format!(
                "Node '{}' is not a backing image of '{}'",
                base.name(),
                options.device.name()
            )));
        }
        if base.is_none() && options.backing_file.is_some() {
            return Err(refused(
                "backing file specified, but streaming the entire chain",
            ));
        }
        let device = [options.device.clone()];
        let (claims, freeze) = chain::hold(graph, &top, base.as_ref(), device, JobKind::Stream)?;
        let turn = manager.turns().reopening.lock().await;
        let top_was_read_only = chain::make_writable(graph, &top).await?;
        let is_layer = !graph.parents(&top).is_empty();
        let attached = graph
            .attach(&top, PERMISSIONS, "")
            .and_then(|handle| Ok((handle, graph.attach(&top, PermissionSet::NONE, "")?)));
        let (handle, keeper) = match attached {
            Ok(handles) => handles,
            Err(error) => {
                if top_was_read_only {
                    chain::make_read_only(graph, &top).await;
                }
                return Err(error);
            }
        };
        drop(turn);
        Ok(Self {
            graph: graph.clone(),
            top,
            top_was_read_only,
            base,
            backing_file: options.backing_file,
            on_error: options.on_error,
            handle: Some(Arc::new(handle)),
            keeper: Some(keeper),
            is_layer,
            turns: manager.turns().clone(),
            freeze: Some(freeze),
            claims,
        })
    }
}

#[async_trait]
impl JobDriver for Stream {
    async fn run(&mut self, job: &Arc<Job>) -> Result<()> {
        let Some(below) = self.top.backing() else {
            return Ok(());
        };
        if self
            .base
            .as_ref()
            .is_some_and(|base| base.id() == below.id())
        {
            return Ok(());
        }
        let handle = self
            .handle
            .clone()
            .ok_or_else(|| refused("the stream is over"))?;
        let len = self.top.length();
        job.set_progress(0, len);
        let policies = Policies {
            read: self.on_error,
            write: self.on_error,
        };
        let mut engine = Engine::new(job, policies, BUFFER_SIZE);
        let mut plan = StreamPlan {
            cursor: Cursor::new(len, CHUNK),
            copier: Arc::new(Prefetch {
                handle: handle.clone(),
                below,
                base: self.base.clone(),
                watch: Watch::new(&self.top, WATCH)?,
            }),
        };
        engine.pass(&mut plan).await?;
        if let Some(error) = engine.skipped {
            return Err(error);
        }
        handle.flush().await
    }

    async fn prepare(&mut self, _job: &Arc<Job>) -> Result<()> {
        let turns = self.turns.clone();
        let _turn = turns.finalising.lock().await;
        let Some(below) = self.top.backing() else {
            return Ok(());
        };
        self.handle = None;
        let (graph, base) = (&self.graph, self.base.as_ref());
        // Both ways show the same content: the header may go first, and a crash in between does no harm.
        let name = self.backing_file.as_deref();
        chain::rewrite_backing(graph, &turns, &self.top, base, name).await?;
        // Frozen until that very change: a job that put a filter over the base meanwhile would be bypassed.
        graph
            .set_frozen_backing(&self.top, base, self.freeze.take())
            .await?;
        if base.is_none_or(|base| base.id() != below.id())
            && let Err(error) = graph.collect(&below).await
        {
            tracing::warn!(%error, node = below.name(), "a dropped layer was closed with an error");
        }
        Ok(())
    }

    async fn clean(&mut self, _job: &Arc<Job>) {
        self.handle = None;
        self.freeze = None;
        if self.top_was_read_only {
            chain::restore_read_only(&self.graph, &self.turns, &self.top).await;
        }
        self.keeper = None;
        if self.is_layer {
            chain::leave(&self.graph, &self.top).await;
        }
        self.claims.clear();
    }
}

/// What copies a chunk.
struct Prefetch {
    handle: Arc<BlockHandle>,
    /// The layer right below the image.
    below: Arc<Node>,
    base: Option<Arc<Node>>,
    watch: Arc<Watch>,
}

impl Prefetch {
    async fn copy(&self, chunk: Chunk) -> CopyResult {
        let mut copied = Copied {
            beside_guest: self.watch.begin(chunk),
            ..Copied::default()
        };
        let mut at = chunk.offset;
        while at < chunk.end() {
            let (wanted, len) = self
                .wanted(at, chunk.end() - at)
                .await
                .map_err(CopyError::read)?;
            if wanted {
                self.prefetch(at, len).await?;
                copied.copied += len;
            } else {
                copied.skipped += len;
            }
            at += len;
        }
        // Copies into the image are writes of the image themselves: what is recorded proves nothing.
        copied.beside_guest |= self.watch.is_busy(chunk);
        Ok(copied)
    }

    /// Whether layers between decide what is at `at`, and for how many bytes.
    async fn wanted(&self, at: u64, len: u64) -> Result<(bool, u64)> {
        let below = Some(&self.below);
        let (own, run) = self
            .handle
            .is_allocated_above(below, false, at, len)
            .await?;
        let len = advance(run, len)?;
        if own {
            return Ok((false, len));
        }
        let (between, run) = self
            .handle
            .is_allocated_above(self.base.as_ref(), false, at, len)
            .await?;
        Ok((between, advance(run, len)?))
    }

    async fn prefetch(&self, at: u64, len: u64) -> Result<(), CopyError> {
        let buffer = Buffer::try_new(len as usize).map_err(CopyError::read)?;
        let (lent, buf) = buffer.lend();
        let mut flags = RequestFlags::COPY_ON_READ | RequestFlags::PREFETCH;
        if mutant::is_active("stream-copies-nothing") {
            flags = RequestFlags::empty();
        }
        let result = self.handle.readv(at, buf, flags).await;
        drop(lent);
        result.map_err(|error| {
            // What failed was a write if the error names one: the copy into the image.
            let is_write = matches!(
                error.operation(),
                Some(
                    block_core::error::Operation::Write | block_core::error::Operation::WriteZeroes
                )
            );
            CopyError {
                side: if is_write {
                    IoSide::Write
                } else {
                    IoSide::Read
                },
                error,
            }
        })
    }
}

struct StreamPlan {
    cursor: Cursor,
    copier: Arc<Prefetch>,
}

impl Plan for StreamPlan {
    fn next(&mut self) -> Option<Chunk> {
        self.cursor.next()
    }

    fn copy(&self, chunk: Chunk) -> BoxFuture<'static, CopyResult> {
        let copier = self.copier.clone();
        Box::pin(async move { copier.copy(chunk).await })
    }

    fn skips_ignored(&self) -> bool {
        true
    }
}
