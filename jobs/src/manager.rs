//! The jobs of one graph: their ids, how they are started, found and listened to. What they do is in their drivers.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use block_core::{
    error::{Error, ErrorKind, Operation, Result},
    graph::Graph,
    node::Node,
};
use futures::future::BoxFuture;
use parking_lot::Mutex;

use crate::{
    backup::{Backup, BackupOptions},
    commit::{self, CommitOptions},
    counters::Counters,
    event::{JobEvents, Listeners},
    job::{Job, JobDriver, JobInfo, JobKind, JobOptions},
    life,
    mirror::{Mirror, MirrorOptions},
    stream::{Stream, StreamOptions},
};

/// Runs a job: poll it to its end.
pub type JobFuture = BoxFuture<'static, ()>;

/// The jobs of one graph.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use block_core::{graph::Graph, node::Node};
/// use jobs::{JobManager, MirrorOptions};
///
/// # async fn example(graph: Arc<Graph>, disk: Arc<Node>, copy: Arc<Node>) -> block_core::Result<()> {
/// let manager = JobManager::new(&graph);
/// let job = manager.mirror(MirrorOptions::new(&disk, &copy)).await?;
/// job.wait_ready().await?;
/// job.complete()?; // the guest uses `copy` from here on
/// job.wait().await?;
/// # Ok(())
/// # }
/// ```
pub struct JobManager {
    graph: Arc<Graph>,
    listeners: Arc<Listeners>,
    jobs: Mutex<BTreeMap<String, Arc<Job>>>,
    reserved: Mutex<BTreeSet<String>>,
    next: AtomicU64,
    turns: Arc<Turns>,
}

/// What jobs do one at a time.
#[derive(Default)]
pub(crate) struct Turns {
    /// Their ends: the last I/O inside a drained section (two would wait for each other), and the changes of the graph.
    pub finalising: futures::lock::Mutex<()>,
    /// Making a read-only image writable for a while, and read-only again: between finding it writable and having the permission to
    /// write nobody else may take it back. Taken after `finalising`, if both are.
    pub reopening: futures::lock::Mutex<()>,
}

/// An id that nobody else can take until this is dropped.
pub(crate) struct Reserved {
    manager: Arc<JobManager>,
    id: String,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.manager.reserved.lock().remove(&self.id);
    }
}

/// Whether `id` can be a job's: a letter, then letters, digits, `-`, `.` and `_`.
fn is_valid_id(id: &str) -> bool {
    let mut chars = id.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

impl JobManager {
    /// The jobs of `graph`; one manager per graph, or jobs can get in each other's way.
    pub fn new(graph: &Arc<Graph>) -> Arc<Self> {
        Arc::new(Self {
            graph: graph.clone(),
            listeners: Listeners::new(),
            jobs: Mutex::default(),
            reserved: Mutex::default(),
            next: AtomicU64::new(0),
            turns: Arc::default(),
        })
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// A stream of all events from now on.
    pub fn subscribe(&self) -> JobEvents {
        self.listeners.subscribe()
    }

    /// The job called `id`.
    ///
    /// # Errors
    /// ENOENT.
    pub fn job(&self, id: &str) -> Result<Arc<Job>> {
        self.jobs
            .lock()
            .get(id)
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "Job not found"))
    }

    /// All jobs that aren't dismissed, by id.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.jobs.lock().values().cloned().collect()
    }

    /// What `query-jobs` shows.
    pub fn query(&self) -> Vec<JobInfo> {
        self.jobs().iter().map(|job| job.info()).collect()
    }

    /// Cancels all jobs and waits until they are gone.
    pub async fn cancel_all(&self) {
        loop {
            let jobs = self.jobs();
            if jobs.is_empty() {
                return;
            }
            for job in jobs {
                // One that is over, or about to be, can't be cancelled; that is what is wanted.
                let _ = job.cancel(true);
                let _ = job.wait().await;
                let _ = job.dismiss();
            }
        }
    }

    pub(crate) fn forget(&self, id: &str) {
        self.jobs.lock().remove(id);
    }

    /// Takes the id that the options ask for, or one made from the device's name.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        options: &JobOptions,
        device: &str,
    ) -> Result<Reserved> {
        let jobs = self.jobs.lock();
        let mut reserved = self.reserved.lock();
        let taken =
            |id: &str, reserved: &BTreeSet<String>| jobs.contains_key(id) || reserved.contains(id);
        let id =
            match &options.id {
                Some(id) => {
                    if !is_valid_id(id) {
                        return Err(Error::invalid(format!("Invalid job ID '{id}'"))
                            .with_operation(Operation::Job, 0, 0));
                    }
                    if taken(id, &reserved) {
                        return Err(Error::new(
                            ErrorKind::AlreadyExists,
                            format!("Job ID '{id}' already in use"),
                        )
                        .with_operation(Operation::Job, 0, 0));
                    }
                    id.clone()
                }
                None if is_valid_id(device) && !taken(device, &reserved) => device.to_owned(),
                None => loop {
                    let id = format!("job{}", self.next.fetch_add(1, Ordering::Relaxed));
                    if !taken(&id, &reserved) {
                        break id;
                    }
                },
            };
        reserved.insert(id.clone());
        drop(jobs);
        Ok(Reserved {
            manager: self.clone(),
            id,
        })
    }

    fn adopt(
        self: &Arc<Self>,
        reserved: Reserved,
        kind: JobKind,
        options: &JobOptions,
        driver: Box<dyn JobDriver>,
        counters: Arc<Counters>,
    ) -> (Arc<Job>, JobFuture) {
        let job = Job::new(
            reserved.id.clone(),
            kind,
            options,
            self.graph.env().clone(),
            self.listeners.clone(),
            Arc::downgrade(self),
            counters,
        );
        self.jobs.lock().insert(reserved.id.clone(), job.clone());
        drop(reserved);
        let future = Box::pin(life::live(job.clone(), driver));
        (job, future)
    }

    /// Makes a job with a driver of the caller's, who polls the future that runs it. `device` is the name that the id
    /// is made from if the options have none.
    ///
    /// # Errors
    /// The id is no id, or taken.
    pub fn create(
        self: &Arc<Self>,
        kind: JobKind,
        device: &str,
        options: &JobOptions,
        driver: Box<dyn JobDriver>,
    ) -> Result<(Arc<Job>, JobFuture)> {
        let reserved = self.reserve(options, device)?;
        Ok(self.adopt(reserved, kind, options, driver, Arc::default()))
    }

    fn spawn(
        self: &Arc<Self>,
        reserved: Reserved,
        kind: JobKind,
        options: &JobOptions,
        driver: Box<dyn JobDriver>,
        counters: Arc<Counters>,
    ) -> Arc<Job> {
        let (job, future) = self.adopt(reserved, kind, options, driver, counters);
        self.graph.env().spawn(future);
        job
    }

    /// Starts a mirror: copies a disk, keeps the copy the same, and switches over to it when it is completed.
    ///
    /// # Errors
    /// Nothing has been changed then. What the options refer to doesn't fit together, or is in use.
    pub async fn mirror(self: &Arc<Self>, options: MirrorOptions) -> Result<Arc<Job>> {
        let job = options.job.clone();
        let reserved = self.reserve(&job, options.device.name())?;
        let counters = Arc::<Counters>::default();
        let driver = Mirror::set_up(self, options, counters.clone()).await?;
        Ok(self.spawn(reserved, JobKind::Mirror, &job, Box::new(driver), counters))
    }

    /// Starts a commit: merges layers of a chain into the one below them.
    ///
    /// # Errors
    /// As with [`Self::mirror`].
    pub async fn commit(self: &Arc<Self>, options: CommitOptions) -> Result<Arc<Job>> {
        let job = options.job.clone();
        let reserved = self.reserve(&job, options.device.name())?;
        let counters = Arc::<Counters>::default();
        let driver = commit::set_up(self, options, counters.clone()).await?;
        Ok(self.spawn(reserved, JobKind::Commit, &job, driver, counters))
    }

    /// Starts a stream: copies what the layers below an image hold into it, so that they aren't needed any more.
    ///
    /// # Errors
    /// As with [`Self::mirror`].
    pub async fn stream(self: &Arc<Self>, options: StreamOptions) -> Result<Arc<Job>> {
        let job = options.job.clone();
        let reserved = self.reserve(&job, options.device.name())?;
        let driver = Stream::set_up(self, options).await?;
        let counters = Arc::default();
        Ok(self.spawn(reserved, JobKind::Stream, &job, Box::new(driver), counters))
    }

    /// Starts a backup: copies what a disk holds now, whatever is written to it meanwhile.
    ///
    /// # Errors
    /// As with [`Self::mirror`].
    pub async fn backup(self: &Arc<Self>, options: BackupOptions) -> Result<Arc<Job>> {
        let job = options.job.clone();
        let reserved = self.reserve(&job, options.device.name())?;
        let counters = Arc::<Counters>::default();
        let driver = Backup::set_up(self, options, counters.clone()).await?;
        Ok(self.spawn(reserved, JobKind::Backup, &job, Box::new(driver), counters))
    }
}

/// Refuses a node that has other nodes as parents.
pub(crate) fn check_root(graph: &Arc<Graph>, node: &Node) -> Result<()> {
    if graph.parents(node).is_empty() {
        Ok(())
    } else {
        Err(Error::invalid("Need a root block node")
            .with_operation(Operation::Job, 0, 0)
            .with_node(node.name()))
    }
}

impl fmt::Debug for JobManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.jobs()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_is_a_letter_and_then_letters_digits_and_three_signs() {
        for good in ["a", "Z9", "job-0.x_y"] {
            assert!(is_valid_id(good), "{good}");
        }
        for bad in ["", "0a", "_a", "#block001", "a b", "ä", "a/b"] {
            assert!(!is_valid_id(bad), "{bad}");
        }
    }
}
