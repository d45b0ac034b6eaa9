//! Transactions: jobs that start together and, in `grouped` mode, end together: all of them or none. Knows jobs only by
//! their states; what they do is their drivers' business.

use std::{
    fmt,
    sync::{Arc, Weak},
    task::Poll,
};

use block_core::error::Result;
use parking_lot::Mutex;

use crate::job::{Job, cancelled};

/// How the members of a transaction end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CompletionMode {
    /// Each by itself.
    #[default]
    Individual,
    /// All together: the failure or cancellation of one cancels the others.
    Grouped,
}

/// How far a member has come. Nobody goes beyond a step before everybody is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    Begun,
    Worked,
    Finalized,
    Prepared,
}

struct Member {
    job: Weak<Job>,
    step: Step,
}

#[derive(Default)]
struct State {
    started: bool,
    failed: bool,
    finalized: bool,
    members: Vec<Member>,
}

/// Jobs that belong together. Make one, start jobs with it in their options (they stay in `created`), then
/// [`start`](Self::start) them all; or [`abort`](Self::abort) them if one couldn't be set up.
///
/// ```
/// use jobs::{CompletionMode, Transaction};
///
/// let transaction = Transaction::new(CompletionMode::Grouped);
/// // manager.backup(BackupOptions { job: JobOptions { transaction: Some(transaction.clone()), .. }, .. }).await?;
/// transaction.start();
/// ```
pub struct Transaction {
    mode: CompletionMode,
    state: Mutex<State>,
}

impl Transaction {
    /// One without members.
    pub fn new(mode: CompletionMode) -> Arc<Self> {
        Arc::new(Self {
            mode,
            state: Mutex::default(),
        })
    }

    /// The transaction of a job that belongs to no other.
    pub(crate) fn of_one() -> Arc<Self> {
        let transaction = Self::new(CompletionMode::Individual);
        transaction.state.lock().started = true;
        transaction
    }

    /// Lets all members run.
    pub fn start(&self) {
        self.state.lock().started = true;
        self.notify();
    }

    /// Cancels all members.
    pub fn abort(&self) {
        self.state.lock().failed = true;
        for job in self.jobs() {
            job.abort();
        }
    }

    pub(crate) fn add(&self, job: &Arc<Job>) {
        self.state.lock().members.push(Member {
            job: Arc::downgrade(job),
            step: Step::Begun,
        });
    }

    fn jobs(&self) -> Vec<Arc<Job>> {
        self.state
            .lock()
            .members
            .iter()
            .filter_map(|member| member.job.upgrade())
            .collect()
    }

    fn notify(&self) {
        for job in self.jobs() {
            job.notify();
        }
    }

    /// A member was cancelled; those that wait for it look again.
    pub(crate) fn member_changed(&self) {
        self.notify();
    }

    /// A member was finalized by its user, and that finalizes all.
    pub(crate) fn finalize(&self) {
        if self.mode == CompletionMode::Grouped {
            self.state.lock().finalized = true;
        }
        self.notify();
    }

    /// A member failed or was cancelled.
    pub(crate) fn fail(&self, job: &Job) {
        if self.mode == CompletionMode::Individual {
            return;
        }
        self.state.lock().failed = true;
        for other in self.jobs() {
            if other.id() != job.id() {
                other.abort();
            }
        }
    }

    /// Waits until the members may run.
    pub(crate) async fn started(&self, job: &Job) -> Result<()> {
        self.until(job, |state| state.started).await
    }

    /// `job` has come to `step`; waits until all have.
    pub(crate) async fn arrive(&self, job: &Job, step: Step) -> Result<()> {
        let grouped = self.mode == CompletionMode::Grouped;
        {
            let mut state = self.state.lock();
            for member in &mut state.members {
                if member.job.as_ptr() == std::ptr::from_ref(job) {
                    member.step = step;
                }
            }
        }
        self.notify();
        self.until(job, |state| {
            !grouped || state.members.iter().all(|member| member.step >= step)
        })
        .await
    }

    /// Waits until `job` was finalized, by itself, by its user, or through another member.
    pub(crate) async fn finalized(&self, job: &Job) -> Result<()> {
        self.until(job, |state| state.finalized || job.is_finalized())
            .await?;
        self.arrive(job, Step::Finalized).await
    }

    async fn until(&self, job: &Job, check: impl Fn(&State) -> bool) -> Result<()> {
        futures::future::poll_fn(|cx| {
            loop {
                let seen = job.epoch();
                if job.is_cancelled() {
                    return Poll::Ready(Err(cancelled()));
                }
                if check(&self.state.lock()) {
                    return Poll::Ready(Ok(()));
                }
                if job.poll_changed(seen, cx).is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await
    }
}

impl fmt::Debug for Transaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction")
            .field("mode", &self.mode)
            .field("members", &self.state.lock().members.len())
            .finish_non_exhaustive()
    }
}
