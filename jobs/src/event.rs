//! What jobs tell those who listen: QMP's job events as a type, and a channel for each listener. Events are facts about the
//! past; nothing here changes a job.

use std::sync::Arc;

use futures::channel::mpsc::{self, UnboundedReceiver, UnboundedSender};
use parking_lot::Mutex;
use serde::Serialize;

use crate::{error_policy::ErrorAction, job::JobKind, state::JobStatus};

/// Which side of a copy an error happened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoSide {
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

/// How far a job had come when it said something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobReport {
    /// What kind of job.
    #[serde(rename = "type")]
    pub kind: JobKind,
    /// Its id.
    pub device: String,
    /// All its work, in bytes.
    pub len: u64,
    /// What was done of it, in bytes.
    pub offset: u64,
    /// Its speed limit in bytes per second; 0 is none.
    pub speed: u64,
}

/// Something happened to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", content = "data")]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`.
    #[serde(rename = "JOB_STATUS_CHANGE")]
    StatusChange {
        /// The job.
        id: String,
        /// Its new state.
        status: JobStatus,
    },
    /// `BLOCK_JOB_READY`: from now on it can be completed.
    #[serde(rename = "BLOCK_JOB_READY")]
    Ready(JobReport),
    /// `BLOCK_JOB_PENDING`: it waits to be finalized.
    #[serde(rename = "BLOCK_JOB_PENDING")]
    Pending {
        /// What kind of job.
        #[serde(rename = "type")]
        kind: JobKind,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_COMPLETED`: it is over, with or without an error.
    #[serde(rename = "BLOCK_JOB_COMPLETED")]
    Completed {
        /// How far it came.
        #[serde(flatten)]
        report: JobReport,
        /// Why it failed.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`: it is over because it was cancelled.
    #[serde(rename = "BLOCK_JOB_CANCELLED")]
    Cancelled(JobReport),
    /// `BLOCK_JOB_ERROR`: one I/O error was seen, and dealt with as `action` says.
    #[serde(rename = "BLOCK_JOB_ERROR")]
    Error {
        /// The job.
        device: String,
        /// Reading or writing.
        operation: IoSide,
        /// What is done about it.
        action: ErrorAction,
    },
}

impl JobEvent {
    /// The job that it is about.
    pub fn id(&self) -> &str {
        match self {
            Self::StatusChange { id, .. } | Self::Pending { id, .. } => id,
            Self::Ready(report) | Self::Cancelled(report) | Self::Completed { report, .. } => {
                &report.device
            }
            Self::Error { device, .. } => device,
        }
    }
}

/// A stream of events, from the moment of subscription on. Dropping it ends the subscription.
pub type JobEvents = UnboundedReceiver<JobEvent>;

/// Those who listen.
#[derive(Debug, Default)]
pub(crate) struct Listeners(Mutex<Vec<UnboundedSender<JobEvent>>>);

impl Listeners {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn subscribe(&self) -> JobEvents {
        let (sender, receiver) = mpsc::unbounded();
        self.0.lock().push(sender);
        receiver
    }

    pub(crate) fn emit(&self, event: &JobEvent) {
        self.0
            .lock()
            .retain(|listener| listener.unbounded_send(event.clone()).is_ok());
    }
}
