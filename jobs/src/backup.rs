//! Backup: copies what a disk holds at the moment when the job is set up, whatever the guest writes meanwhile (digest of block
//! semantics, section 9). A copy-before-write filter saves what the guest is about to change; the job copies the rest.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use block_core::{
    bitmap::DirtyBitmap,
    driver::{Capabilities, ChildRole},
    error::Result,
    graph::{Graph, JobClaim},
    node::Node,
};
use futures::future::BoxFuture;

use crate::{
    chain::{self, refused},
    copy::{
        BUFFER_SIZE, Chunk, CopyError, CopyResult, Engine, MAX_CHUNK, MIN_CHUNK, Plan, Policies,
    },
    copy_before_write::{BackupState, CopyBeforeWrite, OnCbwError},
    counters::Counters,
    error_policy::OnError,
    job::{Job, JobDriver, JobKind, JobOptions},
    manager::JobManager,
    mirror::SyncMode,
    transfer::{Copier, Transfer, Watch, child},
};

/// What a backup is told.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// What every job is told.
    pub job: JobOptions,
    /// The disk that is copied.
    pub device: Arc<Node>,
    /// Where it is copied to; of the same length.
    pub target: Arc<Node>,
    /// What is copied. With [`SyncMode::None`] only what is overwritten, until the job is cancelled.
    pub sync: SyncMode,
    /// Store compressed.
    pub compress: bool,
    /// What to do about errors of the source.
    pub on_source_error: OnError,
    /// What to do about errors of the target.
    pub on_target_error: OnError,
    /// What to do when old content can't be copied before a write.
    pub on_cbw_error: OnCbwError,
    /// The name of the filter node.
    pub filter_node_name: Option<String>,
}

impl BackupOptions {
    /// A full backup.
    pub fn new(device: &Arc<Node>, target: &Arc<Node>) -> Self {
        Self {
            job: JobOptions::default(),
            device: device.clone(),
            target: target.clone(),
            sync: SyncMode::default(),
            compress: false,
            on_source_error: OnError::default(),
            on_target_error: OnError::default(),
            on_cbw_error: OnCbwError::default(),
            filter_node_name: None,
        }
    }
}

/// How often a backup that only saves what is overwritten looks whether it broke.
const IDLE: Duration = Duration::from_millis(50);

/// A backup job.
pub(crate) struct Backup {
    graph: Arc<Graph>,
    source: Arc<Node>,
    sync: SyncMode,
    policies: Policies,
    state: Arc<BackupState>,
    filter: Arc<Node>,
    transfer: Option<Arc<Transfer>>,
    claims: Vec<JobClaim>,
    withdrawn: bool,
}

impl Backup {
    /// Checks the options and puts the filter in. What the disk holds when this returns is what is copied.
    pub(crate) async fn set_up(
        manager: &Arc<JobManager>,
        options: BackupOptions,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let graph = manager.graph();
        let (source, target) = (&options.device, &options.target);
        if source.id() == target.id() {
            return Err(refused("Source and target cannot be the same"));
        }
        if source.chain().iter().any(|node| node.id() == target.id()) {
            return Err(refused(format!(
                "Source and target cannot be the same: '{}' is in the chain of '{}'",
                target.name(),
                source.name()
            )));
        }
        if source.length() != target.length() {
            return Err(refused("Source and target image have different sizes"));
        }
        if options.compress
            && !target
                .driver()
                .capabilities()
                .contains(Capabilities::COMPRESSED)
        {
            return Err(refused(format!(
                "Compression is not supported for this drive {}",
                target.name()
            )));
        }
        let claimed = [source.clone(), target.clone()];
        let mut claims = chain::claim(graph, claimed, JobKind::Backup)?;
        let cluster = match chain::cluster_size(graph, target).await {
            Ok(size) => size.unwrap_or(0).max(MIN_CHUNK).next_power_of_two(),
            Err(error) if target.backing().is_some() => {
                tracing::debug!(%error, "the target has a backing file and no known cluster size");
                MIN_CHUNK
            }
            Err(error) => {
                return Err(error.context(
                    "Couldn't determine the cluster size of the target image, which has no backing file",
                ));
            }
        };
        let to_copy = DirtyBitmap::new(source.length(), cluster)?;
        to_copy.set_all();
        let below = match options.sync {
            SyncMode::Top => source.backing(),
            SyncMode::Full | SyncMode::None => None,
        };
        let copier = Copier {
            only_allocated: below.is_some(),
            above: below,
            unmap: true,
            compress: options.compress.then_some(cluster),
            // What shows through from a backing file may change: it has to be hidden.
            ask_target: target.backing().is_none(),
            serialise_target: true,
            must_hide: false,
        };
        let state = BackupState::new(to_copy, copier.clone(), options.on_cbw_error, counters);
        let driver = Arc::new(CopyBeforeWrite {
            state: state.clone(),
        });
        // It works from the moment when it is between the source and its parents.
        let name = options.filter_node_name.as_deref();
        let kind = JobKind::Backup;
        let start = || state.start();
        let (filter, claim) =
            chain::insert_started(graph, driver, name, source, target, kind, start).await?;
        claims.push(claim);
        let mut backup = Self {
            graph: graph.clone(),
            source: source.clone(),
            sync: options.sync,
            policies: Policies {
                read: options.on_source_error,
                write: options.on_target_error,
            },
            state,
            filter,
            transfer: None,
            claims,
            withdrawn: false,
        };
        match backup.connect(copier) {
            Ok(()) => Ok(backup),
            Err(error) => {
                backup.withdraw().await;
                Err(error)
            }
        }
    }

    fn connect(&mut self, copier: Copier) -> Result<()> {
        let handle = self.graph.attach(&self.filter, chain::READER, "")?;
        let granularity = self.state.to_copy.granularity();
        self.transfer = Some(Arc::new(Transfer {
            handle,
            serialise: true,
            copier,
            watch: Some(Watch::new(&self.filter, granularity)?),
        }));
        Ok(())
    }

    async fn copy_all(&self, job: &Arc<Job>, transfer: &Arc<Transfer>) -> Result<()> {
        let mut engine = Engine::new(job, self.policies, BUFFER_SIZE);
        let mut plan = BackupPlan {
            state: self.state.clone(),
            transfer: transfer.clone(),
            cursor: 0,
        };
        engine.pass(&mut plan).await?;
        self.state.check()
    }

    /// Only what the guest overwrites is saved, until somebody says that it is enough.
    async fn save_only(&self, job: &Arc<Job>) -> Result<()> {
        loop {
            job.pause_point().await?;
            let seen = job.epoch();
            self.state.check()?;
            job.changed(seen, Some(IDLE)).await;
        }
    }

    async fn withdraw(&mut self) {
        if self.withdrawn {
            return;
        }
        self.withdrawn = true;
        self.state.stop();
        self.transfer = None;
        chain::withdraw(&self.graph, &self.filter).await;
        self.claims.clear();
    }
}

#[async_trait]
impl JobDriver for Backup {
    async fn run(&mut self, job: &Arc<Job>) -> Result<()> {
        let transfer = self
            .transfer
            .clone()
            .ok_or_else(|| refused("the backup is over"))?;
        job.set_progress(0, self.source.length());
        if self.sync == SyncMode::None {
            self.save_only(job).await?;
        } else {
            self.copy_all(job, &transfer).await?;
        }
        let admission = transfer.handle.admit().await;
        child(&admission, ChildRole::Target)?.flush().await
    }

    async fn prepare(&mut self, _job: &Arc<Job>) -> Result<()> {
        self.state.check()
    }

    async fn clean(&mut self, _job: &Arc<Job>) {
        self.withdraw().await;
    }
}

/// What isn't copied yet, from the start to the end of the disk.
struct BackupPlan {
    state: Arc<BackupState>,
    transfer: Arc<Transfer>,
    cursor: u64,
}

impl Plan for BackupPlan {
    fn next(&mut self) -> Option<Chunk> {
        let max = MAX_CHUNK.max(self.state.to_copy.granularity());
        let (offset, len) = self.state.to_copy.next_dirty(self.cursor, max)?;
        self.cursor = offset + len;
        Some(Chunk { offset, len })
    }

    fn copy(&self, chunk: Chunk) -> BoxFuture<'static, CopyResult> {
        let (transfer, state) = (self.transfer.clone(), self.state.clone());
        Box::pin(async move {
            let watch = transfer.watch.clone();
            let busy = watch.as_ref().is_some_and(|watch| watch.begin(chunk));
            let admission = transfer.admit(chunk).await;
            let source = child(&admission, ChildRole::Filtered).map_err(CopyError::read)?;
            let target = child(&admission, ChildRole::Target).map_err(CopyError::write)?;
            let mut copied = state.copy(&source, &target, chunk).await?;
            drop(admission);
            let waited = watch.as_ref().is_some_and(|watch| watch.is_busy(chunk));
            copied.beside_guest = busy || waited;
            Ok(copied)
        })
    }

    fn check(&self) -> Result<()> {
        self.state.check()
    }
}
