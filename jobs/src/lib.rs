//! Block jobs: commit, stream, mirror and backup on live nodes, on one copy engine.
//!
//! A [`JobManager`] belongs to a graph. It starts jobs, each as one task of the graph's environment, and finds them by id.
//! A [`Job`] is controlled by verbs ([`Job::pause`], [`Job::cancel`], [`Job::complete`], …), tells what happens to it by
//! [`JobEvent`]s, and can be waited for.
//!
//! Jobs are producers like a guest: all their I/O takes the one request path, waits at the same gates and stops in drained
//! sections. What they put into the graph (filters) they take out again, whatever way they end.
//!
//! Whoever embeds this and wants a job of another kind writes a [`JobDriver`]:
//!
//! ```
//! use std::sync::Arc;
//!
//! use block_core::{Graph, Result, async_trait};
//! use env_tokio::EnvTokio;
//! use jobs::{Job, JobDriver, JobKind, JobManager, JobOptions};
//!
//! struct Count(u64);
//!
//! #[async_trait]
//! impl JobDriver for Count {
//!     async fn run(&mut self, job: &Arc<Job>) -> Result<()> {
//!         job.set_progress(0, self.0);
//!         for _ in 0..self.0 {
//!             job.pause_point().await?; // may be paused or cancelled here
//!             job.advance(1);
//!         }
//!         Ok(())
//!     }
//! }
//!
//! let env = Arc::new(EnvTokio::new(1)?);
//! let manager = JobManager::new(&Graph::new(env.clone()));
//! let options = JobOptions::default();
//! let (job, future) = manager.create(JobKind::Amend, "disk0", &options, Box::new(Count(10)))?;
//! env.block_on(future); // or `env.spawn(future)`
//! env.block_on(job.wait())?;
//! assert_eq!(job.info().current_progress, 10);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod backup;
mod chain;
mod commit;
mod commit_top;
mod copy;
mod copy_before_write;
mod counters;
mod error_policy;
mod event;
mod job;
mod life;
mod manager;
mod mirror;
mod mirror_top;
mod passthrough;
mod rate;
mod state;
mod stream;
mod transaction;
mod transfer;

pub use self::{
    backup::BackupOptions,
    commit::CommitOptions,
    copy_before_write::OnCbwError,
    counters::JobCounters,
    error_policy::{ErrorAction, OnError},
    event::{IoSide, JobEvent, JobEvents, JobReport},
    job::{IoStatus, Job, JobDriver, JobInfo, JobKind, JobOptions},
    manager::{JobFuture, JobManager},
    mirror::{CopyMode, MirrorOptions, SyncMode, TargetBacking},
    state::{Ending, JobStatus, JobVerb, Machine, Refusal},
    stream::StreamOptions,
    transaction::{CompletionMode, Transaction},
};
