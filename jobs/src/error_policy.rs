//! What a job does about an I/O error: the policies `report`, `ignore`, `stop`, `enospc` and `auto`. Decides only; the
//! copy engine acts.

use block_core::error::{Error, ErrorKind};
use serde::{Deserialize, Serialize};

/// `on-error`, `on-source-error`, `on-target-error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The job tries again later (stream: goes on, and fails at its end).
    Ignore,
    /// `stop` when the disk is full, `report` otherwise.
    Enospc,
    /// The job pauses; when it is resumed it tries again.
    Stop,
    /// For a job the same as `enospc`.
    Auto,
}

/// What is done about one error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The job goes on.
    Ignore,
    /// The job pauses.
    Stop,
}

impl OnError {
    /// What to do about `error`.
    pub fn action(self, error: &Error) -> ErrorAction {
        match self {
            Self::Report => ErrorAction::Report,
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
            Self::Enospc | Self::Auto => {
                if error.kind() == ErrorKind::NoSpace {
                    ErrorAction::Stop
                } else {
                    ErrorAction::Report
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_disk_stops_a_job_under_enospc_and_auto() {
        let full = Error::from_kind(ErrorKind::NoSpace);
        let broken = Error::from_kind(ErrorKind::Io);
        for policy in [OnError::Enospc, OnError::Auto] {
            assert_eq!(policy.action(&full), ErrorAction::Stop);
            assert_eq!(policy.action(&broken), ErrorAction::Report);
        }
        for (policy, action) in [
            (OnError::Report, ErrorAction::Report),
            (OnError::Ignore, ErrorAction::Ignore),
            (OnError::Stop, ErrorAction::Stop),
        ] {
            assert_eq!(policy.action(&full), action);
            assert_eq!(policy.action(&broken), action);
        }
    }
}
