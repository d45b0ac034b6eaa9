//! One job as its user and its driver see it: the verbs, the state, progress, waiting. The life of a job from its start to
//! its end is in `life`; what it does, in its driver.

use std::{
    fmt,
    sync::{Arc, Weak},
    task::{Poll, Waker},
    time::Duration,
};

use async_trait::async_trait;
use block_core::{
    env::Environment,
    error::{Error, ErrorKind, Operation, Result},
};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    counters::{Counters, JobCounters},
    error_policy::{ErrorAction, OnError},
    event::{IoSide, JobEvent, JobReport, Listeners},
    manager::JobManager,
    state::{Ending, JobStatus, Machine, Refusal},
    transaction::Transaction,
};

/// What kind of job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Merges layers of a chain downwards.
    Commit,
    /// Merges layers of a chain upwards.
    Stream,
    /// Copies a disk and keeps the copy the same.
    Mirror,
    /// Copies the content that a disk has at the start.
    Backup,
    /// Makes an image.
    Create,
    /// Changes the options of an image.
    Amend,
}

impl JobKind {
    /// The name that QMP uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Stream => "stream",
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
            Self::Amend => "amend",
        }
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What every kind of job can be told when it is started.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// The job's id; the name of the device if there is none.
    pub id: Option<String>,
    /// Speed limit in bytes per second; 0 is none.
    pub speed: u64,
    /// Make the graph changes at the end without waiting for [`Job::finalize`].
    pub auto_finalize: bool,
    /// Forget the job when it has concluded, without waiting for [`Job::dismiss`].
    pub auto_dismiss: bool,
    /// The transaction that it belongs to, if not to one of its own.
    pub transaction: Option<Arc<Transaction>>,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self {
            id: None,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            transaction: None,
        }
    }
}

/// What a kind of job does. The four kinds of this crate are such drivers; a program can bring its own.
///
/// The calls come in this order: `run`; then, when it and every job of the transaction succeeded, `prepare`, `commit`,
/// `clean`; otherwise `abort`, `clean`. A driver whose `prepare` succeeded may still be aborted, when that of another
/// job in its transaction fails.
#[async_trait]
pub trait JobDriver: Send + 'static {
    /// Does the work. It must get to [`Job::pause_point`] often, with nothing in flight, and return soon after
    /// [`Job::is_cancelled`] says so.
    async fn run(&mut self, job: &Arc<Job>) -> Result<()>;

    /// Makes what was worked on take effect: changes of the graph and of headers. The last step that can fail.
    async fn prepare(&mut self, job: &Arc<Job>) -> Result<()> {
        let _ = job;
        Ok(())
    }

    /// Everything succeeded.
    async fn commit(&mut self, job: &Arc<Job>) {
        let _ = job;
    }

    /// It failed or was cancelled: undoes what was set up.
    async fn abort(&mut self, job: &Arc<Job>) {
        let _ = job;
    }

    /// Lets everything go, in either case.
    async fn clean(&mut self, job: &Arc<Job>) {
        let _ = job;
    }
}

/// Whether a job met errors that it stopped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// None.
    Ok,
    /// An error other than a full disk.
    Failed,
    /// A full disk.
    Nospace,
}

/// What `query-jobs` and `query-block-jobs` show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// What kind of job.
    #[serde(rename = "type")]
    pub kind: JobKind,
    /// Where it is.
    pub status: JobStatus,
    /// Bytes done.
    pub current_progress: u64,
    /// Bytes to do, as far as is known.
    pub total_progress: u64,
    /// Speed limit in bytes per second; 0 is none.
    pub speed: u64,
    /// Whether a user or an error paused it.
    pub paused: bool,
    /// Whether it can be completed.
    pub ready: bool,
    /// Errors that it stopped for.
    pub io_status: IoStatus,
    /// Makes its changes by itself.
    pub auto_finalize: bool,
    /// Goes away by itself.
    pub auto_dismiss: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

struct Shared {
    machine: Machine,
    /// Grows with every change that somebody may wait for.
    epoch: u64,
    wakers: Vec<Waker>,
    speed: u64,
    offset: u64,
    len: u64,
    io_status: IoStatus,
    error: Option<Error>,
}

impl Shared {
    fn touch(&mut self) -> Vec<Waker> {
        self.epoch += 1;
        std::mem::take(&mut self.wakers)
    }
}

/// A job. Shared between its user, its manager and its driver; see [`JobManager`] for how one is made.
///
/// All verbs answer at once. What they ask for happens soon after, and is told by events.
pub struct Job {
    id: String,
    kind: JobKind,
    auto_finalize: bool,
    auto_dismiss: bool,
    env: Arc<dyn Environment>,
    listeners: Arc<Listeners>,
    manager: Weak<JobManager>,
    transaction: Arc<Transaction>,
    shared: Mutex<Shared>,
    counters: Arc<Counters>,
}

impl Job {
    pub(crate) fn new(
        id: String,
        kind: JobKind,
        options: &JobOptions,
        env: Arc<dyn Environment>,
        listeners: Arc<Listeners>,
        manager: Weak<JobManager>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let transaction = options
            .transaction
            .clone()
            .unwrap_or_else(Transaction::of_one);
        let job = Arc::new(Self {
            id,
            kind,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            env,
            listeners,
            manager,
            transaction: transaction.clone(),
            shared: Mutex::new(Shared {
                machine: Machine::new(),
                epoch: 0,
                wakers: Vec::new(),
                speed: options.speed,
                offset: 0,
                len: 0,
                io_status: IoStatus::Ok,
                error: None,
            }),
            counters,
        });
        job.transition(JobStatus::Created);
        transaction.add(&job);
        job
    }

    /// Its id, unique among the jobs of the manager.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What kind of job it is.
    pub fn kind(&self) -> JobKind {
        self.kind
    }

    /// Where it is.
    pub fn status(&self) -> JobStatus {
        self.shared.lock().machine.status()
    }

    /// What `query-jobs` shows.
    pub fn info(&self) -> JobInfo {
        let shared = self.shared.lock();
        let status = shared.machine.status();
        JobInfo {
            id: self.id.clone(),
            kind: self.kind,
            status,
            current_progress: shared.offset,
            total_progress: shared.len,
            speed: shared.speed,
            paused: shared.machine.wants_pause(),
            ready: matches!(status, JobStatus::Ready | JobStatus::Standby),
            io_status: shared.io_status,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            error: shared.error.as_ref().map(Error::reason),
        }
    }

    /// What it did so far.
    pub fn counters(&self) -> JobCounters {
        self.counters.snapshot()
    }

    pub(crate) fn counters_live(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(crate) fn transaction(&self) -> &Arc<Transaction> {
        &self.transaction
    }

    /// The environment of the graph.
    pub fn env(&self) -> &Arc<dyn Environment> {
        &self.env
    }

    // Verbs.

    fn verb(&self, f: impl FnOnce(&mut Shared) -> Result<(), Refusal>) -> Result<()> {
        let wakers = {
            let mut shared = self.shared.lock();
            f(&mut shared).map_err(|refusal| {
                Error::new(ErrorKind::NotPermitted, refusal.message(&self.id)).with_operation(
                    Operation::Job,
                    0,
                    0,
                )
            })?;
            shared.touch()
        };
        wake(wakers);
        Ok(())
    }

    /// Pauses it at its next pause point; then nothing of its I/O is in flight.
    ///
    /// # Errors
    /// The state doesn't allow it, or it is paused already.
    pub fn pause(&self) -> Result<()> {
        self.verb(|shared| shared.machine.pause())
    }

    /// Lets it go on, after [`Self::pause`] or after an error that stopped it.
    ///
    /// # Errors
    /// The state doesn't allow it, or it isn't paused.
    pub fn resume(&self) -> Result<()> {
        self.verb(|shared| {
            shared.machine.resume()?;
            shared.io_status = IoStatus::Ok;
            Ok(())
        })
    }

    /// Cancels it. A ready mirror or active commit that is cancelled without `force` brings its copy to one consistent
    /// point, doesn't switch over, and completes.
    ///
    /// # Errors
    /// The state doesn't allow it.
    pub fn cancel(&self, force: bool) -> Result<()> {
        self.verb(|shared| shared.machine.cancel(force))?;
        self.transaction.member_changed();
        Ok(())
    }

    /// Brings a ready job to its end, with switch-over.
    ///
    /// # Errors
    /// The state doesn't allow it, or it is on its way out already.
    pub fn complete(&self) -> Result<()> {
        self.verb(|shared| shared.machine.complete())
    }

    /// Lets a pending job, and those of its transaction, make their changes.
    ///
    /// # Errors
    /// The state doesn't allow it.
    pub fn finalize(&self) -> Result<()> {
        self.verb(|shared| shared.machine.finalize())?;
        self.transaction.finalize();
        Ok(())
    }

    /// Forgets a concluded job.
    ///
    /// # Errors
    /// The state doesn't allow it.
    pub fn dismiss(&self) -> Result<()> {
        self.verb(|shared| shared.machine.dismiss())?;
        self.vanish();
        Ok(())
    }

    /// Sets the speed limit in bytes per second; 0 is none.
    ///
    /// # Errors
    /// The state doesn't allow it.
    pub fn set_speed(&self, speed: u64) -> Result<()> {
        self.verb(|shared| {
            shared.machine.set_speed()?;
            shared.speed = speed;
            Ok(())
        })
    }

    // Waiting.

    /// Waits until the job has concluded, and tells how.
    ///
    /// Cancellation: dropping the future changes nothing for the job.
    ///
    /// # Errors
    /// The job's own; ECANCELED when it was cancelled.
    pub async fn wait(&self) -> Result<()> {
        self.until(|shared| {
            shared
                .machine
                .status()
                .is_over()
                .then(|| match &shared.error {
                    Some(error) => Err(error.duplicate()),
                    None => Ok(()),
                })
        })
        .await
    }

    /// Waits until the job is ready to be completed. A job that ends before that gives its error, or EINVAL when it ended
    /// without ever getting ready.
    ///
    /// # Errors
    /// As said.
    pub async fn wait_ready(&self) -> Result<()> {
        self.until(|shared| {
            let status = shared.machine.status();
            if matches!(status, JobStatus::Ready | JobStatus::Standby) {
                return Some(Ok(()));
            }
            status.is_over().then(|| match &shared.error {
                Some(error) => Err(error.duplicate()),
                None => Err(Error::invalid("the job ended without getting ready")),
            })
        })
        .await
    }

    /// Waits until the job is in `status`, or over. True if it is in `status`.
    pub async fn wait_status(&self, status: JobStatus) -> bool {
        self.until(|shared| {
            let now = shared.machine.status();
            (now == status || now.is_over()).then_some(now == status)
        })
        .await
    }

    async fn until<T>(&self, mut check: impl FnMut(&Shared) -> Option<T>) -> T {
        futures::future::poll_fn(|cx| {
            let mut shared = self.shared.lock();
            match check(&shared) {
                Some(value) => Poll::Ready(value),
                None => {
                    add_waker(&mut shared.wakers, cx.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }

    // For drivers.

    /// The speed limit now, in bytes per second; 0 is none.
    pub fn speed(&self) -> u64 {
        self.shared.lock().speed
    }

    /// Whether it was cancelled outright: the driver has to end with ECANCELED.
    pub fn is_cancelled(&self) -> bool {
        self.shared.lock().machine.is_cancelled()
    }

    /// Whether the driver has to get to [`Self::pause_point`].
    pub fn wants_pause(&self) -> bool {
        let shared = self.shared.lock();
        shared.machine.wants_pause() || shared.machine.is_cancelled()
    }

    /// How a ready job was asked to end.
    pub fn ending(&self) -> Option<Ending> {
        self.shared.lock().machine.ending()
    }

    /// Here the job may be paused, with nothing in flight. Returns when it goes on.
    ///
    /// # Errors
    /// ECANCELED when the job was cancelled.
    pub async fn pause_point(&self) -> Result<()> {
        loop {
            if self.is_cancelled() {
                return Err(cancelled());
            }
            let (pauses, from) = {
                let shared = self.shared.lock();
                (shared.machine.wants_pause(), shared.machine.status())
            };
            if !pauses {
                return Ok(());
            }
            let paused = match from {
                JobStatus::Ready => JobStatus::Standby,
                _ => JobStatus::Paused,
            };
            self.transition(paused);
            self.until(|shared| (!shared.machine.wants_pause()).then_some(()))
                .await;
            self.transition(from);
        }
    }

    /// The job is in sync: from now on it can be completed.
    pub fn set_ready(&self) {
        if self.status() == JobStatus::Running {
            self.transition(JobStatus::Ready);
            self.listeners.emit(&JobEvent::Ready(self.report()));
        }
    }

    /// Whether it has been ready.
    pub fn is_ready(&self) -> bool {
        matches!(self.status(), JobStatus::Ready | JobStatus::Standby)
    }

    /// Says how much is done and how much there is to do, in bytes.
    pub fn set_progress(&self, offset: u64, len: u64) {
        let mut shared = self.shared.lock();
        shared.offset = offset;
        shared.len = len;
    }

    /// Some more is done.
    pub fn advance(&self, bytes: u64) {
        let mut shared = self.shared.lock();
        shared.offset = shared.offset.saturating_add(bytes);
        shared.len = shared.len.max(shared.offset);
    }

    /// There is this much left to do.
    pub fn set_remaining(&self, bytes: u64) {
        let mut shared = self.shared.lock();
        shared.len = shared.offset.saturating_add(bytes);
    }

    /// An I/O error was met: tells everybody, pauses the job if the policy says so, and says what the driver has to do.
    pub fn io_error(&self, side: IoSide, error: &Error, policy: OnError) -> ErrorAction {
        let action = policy.action(error);
        self.counters.error(side == IoSide::Write);
        self.listeners.emit(&JobEvent::Error {
            device: self.id.clone(),
            operation: side,
            action,
        });
        if action == ErrorAction::Stop {
            let wakers = {
                let mut shared = self.shared.lock();
                shared.machine.pause_for_error();
                shared.io_status = if error.kind() == ErrorKind::NoSpace {
                    IoStatus::Nospace
                } else {
                    IoStatus::Failed
                };
                shared.touch()
            };
            wake(wakers);
        }
        action
    }

    /// A number that changes whenever a verb was accepted or the state changed.
    pub fn epoch(&self) -> u64 {
        self.shared.lock().epoch
    }

    /// Completes when [`Self::epoch`] is no longer `seen`, or after `at_most`. True in the first case.
    pub async fn changed(&self, seen: u64, at_most: Option<Duration>) -> bool {
        let mut timer = at_most.map(|time| self.env.sleep(time));
        futures::future::poll_fn(|cx| {
            if self.poll_changed(seen, cx).is_ready() {
                return Poll::Ready(true);
            }
            match &mut timer {
                Some(timer) => timer.as_mut().poll(cx).map(|()| false),
                None => Poll::Pending,
            }
        })
        .await
    }

    pub(crate) fn poll_changed(&self, seen: u64, cx: &mut std::task::Context<'_>) -> Poll<()> {
        let mut shared = self.shared.lock();
        if shared.epoch != seen {
            return Poll::Ready(());
        }
        add_waker(&mut shared.wakers, cx.waker());
        Poll::Pending
    }

    // For the job's life.

    pub(crate) fn auto_finalize(&self) -> bool {
        self.auto_finalize
    }

    pub(crate) fn is_finalized(&self) -> bool {
        self.auto_finalize || self.shared.lock().machine.is_finalized()
    }

    /// Goes to `next` and tells everybody. The driver's and the life's code keep to the table; a step outside of it changes
    /// nothing.
    pub(crate) fn transition(&self, next: JobStatus) -> bool {
        let (went, wakers) = {
            let mut shared = self.shared.lock();
            if shared.machine.become_status(next) {
                // Under the lock, so that events come in the order of what they tell.
                self.listeners.emit(&JobEvent::StatusChange {
                    id: self.id.clone(),
                    status: next,
                });
                (true, shared.touch())
            } else {
                (false, Vec::new())
            }
        };
        wake(wakers);
        went
    }

    pub(crate) fn notify(&self) {
        let wakers = self.shared.lock().touch();
        wake(wakers);
    }

    /// Another job of the transaction failed.
    pub(crate) fn abort(&self) {
        let wakers = {
            let mut shared = self.shared.lock();
            shared.machine.abort();
            shared.touch()
        };
        wake(wakers);
    }

    pub(crate) fn set_error(&self, error: Error) {
        self.shared.lock().error.get_or_insert(error);
    }

    pub(crate) fn report(&self) -> JobReport {
        let shared = self.shared.lock();
        JobReport {
            kind: self.kind,
            device: self.id.clone(),
            len: shared.len,
            offset: shared.offset,
            speed: shared.speed,
        }
    }

    pub(crate) fn emit(&self, event: &JobEvent) {
        self.listeners.emit(event);
    }

    pub(crate) fn auto_dismiss(&self) -> bool {
        self.auto_dismiss
    }

    pub(crate) fn vanish(&self) {
        if self.transition(JobStatus::Null)
            && let Some(manager) = self.manager.upgrade()
        {
            manager.forget(&self.id);
        }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} job '{}' ({})", self.kind, self.id, self.status())
    }
}

/// The error of a job that was cancelled.
pub(crate) fn cancelled() -> Error {
    Error::from_kind(ErrorKind::Cancelled).with_operation(Operation::Job, 0, 0)
}

fn add_waker(wakers: &mut Vec<Waker>, waker: &Waker) {
    if !wakers.iter().any(|other| other.will_wake(waker)) {
        wakers.push(waker.clone());
    }
}

fn wake(wakers: Vec<Waker>) {
    for waker in wakers {
        waker.wake();
    }
}
