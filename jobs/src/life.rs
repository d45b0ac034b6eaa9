//! The life of a job: from its start over its work to its conclusion, in the order of the digest of block semantics,
//! section 5. Knows no kind of job.

use std::sync::Arc;

use block_core::error::{Error, ErrorKind, Result};

use crate::{
    event::JobEvent,
    job::{Job, JobDriver, cancelled},
    state::JobStatus,
    transaction::Step,
};

/// Concludes a job whose task was dropped (the environment is shutting down), so that nobody waits for it in vain.
struct Abandoned(Arc<Job>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        if self.0.status().is_over() {
            return;
        }
        self.0.set_error(Error::new(
            ErrorKind::Cancelled,
            "the environment dropped the job",
        ));
        self.0.transaction().fail(&self.0);
        for step in [
            JobStatus::Running,
            JobStatus::Ready,
            JobStatus::Aborting,
            JobStatus::Concluded,
        ] {
            self.0.transition(step);
        }
    }
}

/// Runs a job from `created` to its end.
pub(crate) async fn live(job: Arc<Job>, mut driver: Box<dyn JobDriver>) {
    let guard = Abandoned(job.clone());
    let result = work(&job, &mut *driver).await;
    match result {
        Ok(()) => {
            driver.commit(&job).await;
            driver.clean(&job).await;
            let report = job.report();
            job.emit(&JobEvent::Completed {
                report,
                error: None,
            });
        }
        Err(error) => {
            job.transaction().fail(&job);
            job.transition(JobStatus::Aborting);
            driver.abort(&job).await;
            driver.clean(&job).await;
            let is_cancel = error.kind() == ErrorKind::Cancelled && job.is_cancelled();
            let event = if is_cancel {
                JobEvent::Cancelled(job.report())
            } else {
                JobEvent::Completed {
                    report: job.report(),
                    error: Some(error.reason()),
                }
            };
            job.set_error(error);
            job.emit(&event);
        }
    }
    drop(driver);
    job.transition(JobStatus::Concluded);
    if job.auto_dismiss() {
        job.vanish();
    }
    drop(guard);
}

async fn work(job: &Arc<Job>, driver: &mut dyn JobDriver) -> Result<()> {
    let transaction = job.transaction().clone();
    transaction.started(job).await?;
    job.transition(JobStatus::Running);
    // A job may be paused before it starts.
    job.pause_point().await?;
    driver.run(job).await?;
    if job.is_cancelled() {
        return Err(cancelled());
    }
    job.transition(JobStatus::Waiting);
    transaction.arrive(job, Step::Worked).await?;
    job.transition(JobStatus::Pending);
    if !job.auto_finalize() {
        job.emit(&JobEvent::Pending {
            kind: job.kind(),
            id: job.id().to_owned(),
        });
    }
    transaction.finalized(job).await?;
    driver.prepare(job).await?;
    transaction.arrive(job, Step::Prepared).await
}
