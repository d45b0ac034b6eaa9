//! The states of a job and what may happen in each (digest of block semantics, section 5): two tables, and the small
//! machine that obeys them. Pure: no I/O, no clock, no lock, nobody is woken from here.

use std::fmt;

use serde::Serialize;

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// Not yet made.
    Undefined,
    /// Made, not started.
    Created,
    /// At work.
    Running,
    /// Paused while it was running; nothing of its I/O is in flight.
    Paused,
    /// In sync: it can be completed.
    Ready,
    /// Paused while it was ready.
    Standby,
    /// Its work is done; waits for the other jobs of its transaction.
    Waiting,
    /// All of its transaction are done; waits to be finalized.
    Pending,
    /// Failed or cancelled; undoes what it set up.
    Aborting,
    /// Over; waits to be dismissed.
    Concluded,
    /// Gone.
    Null,
}

impl JobStatus {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Undefined,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// The name that QMP uses.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from here to `next`.
    pub const fn may_become(self, next: Self) -> bool {
        use JobStatus as S;
        match self {
            S::Undefined => matches!(next, S::Created),
            S::Created => matches!(next, S::Running | S::Aborting | S::Null),
            S::Running => matches!(next, S::Paused | S::Ready | S::Waiting | S::Aborting),
            S::Paused => matches!(next, S::Running),
            S::Ready => matches!(next, S::Standby | S::Waiting | S::Aborting),
            S::Standby => matches!(next, S::Ready),
            S::Waiting => matches!(next, S::Pending | S::Aborting),
            S::Pending => matches!(next, S::Aborting | S::Concluded),
            S::Aborting => matches!(next, S::Aborting | S::Concluded),
            S::Concluded => matches!(next, S::Null),
            S::Null => false,
        }
    }

    /// Whether a job in this state takes `verb`.
    pub const fn accepts(self, verb: JobVerb) -> bool {
        use JobStatus as S;
        match verb {
            JobVerb::Cancel => matches!(
                self,
                S::Created
                    | S::Running
                    | S::Paused
                    | S::Ready
                    | S::Standby
                    | S::Waiting
                    | S::Pending
            ),
            JobVerb::Pause | JobVerb::Resume | JobVerb::SetSpeed | JobVerb::Change => matches!(
                self,
                S::Created | S::Running | S::Paused | S::Ready | S::Standby
            ),
            JobVerb::Complete => matches!(self, S::Ready | S::Standby),
            JobVerb::Finalize => matches!(self, S::Pending),
            JobVerb::Dismiss => matches!(self, S::Concluded),
        }
    }

    /// Whether the job has ended, successfully or not.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Concluded | Self::Null)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a user can ask of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobVerb {
    /// Stop.
    Cancel,
    /// Stop for a while.
    Pause,
    /// Go on.
    Resume,
    /// Another speed limit.
    SetSpeed,
    /// Bring a ready job to its end.
    Complete,
    /// Let a pending job make its changes.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Change other parameters of a job that is at work.
    Change,
}

impl JobVerb {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Cancel,
        Self::Pause,
        Self::Resume,
        Self::SetSpeed,
        Self::Complete,
        Self::Finalize,
        Self::Dismiss,
        Self::Change,
    ];

    /// The name that refusals use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }
}

impl fmt::Display for JobVerb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a verb was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The state doesn't take it.
    State(JobStatus, JobVerb),
    /// A pause on top of a pause.
    AlreadyPaused,
    /// A resume without a pause.
    NotPaused,
    /// It is ready, but on its way out already.
    CantComplete,
}

impl Refusal {
    /// The message that a user of job `id` gets.
    pub fn message(self, id: &str) -> String {
        match self {
            Self::State(status, verb) => {
                format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")
            }
            Self::AlreadyPaused => "Job is already paused".into(),
            Self::NotPaused => "Can't resume a job that was not paused".into(),
            Self::CantComplete => format!("The active block job '{id}' cannot be completed"),
        }
    }
}

/// How a job was asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// `complete`: with switch-over.
    Complete,
    /// Cancelled when it was ready: finish what is begun, without switch-over.
    SoftCancel,
}

/// The state of one job and what was asked of it.
#[derive(Debug, Clone)]
pub struct Machine {
    status: JobStatus,
    user_paused: bool,
    /// Paused by an error whose policy is `stop`; a user's resume ends it.
    error_paused: bool,
    cancelled: bool,
    ending: Option<Ending>,
    finalize: bool,
    dismissed: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A job that isn't made yet.
    pub const fn new() -> Self {
        Self {
            status: JobStatus::Undefined,
            user_paused: false,
            error_paused: false,
            cancelled: false,
            ending: None,
            finalize: false,
            dismissed: false,
        }
    }

    /// Where it is.
    pub const fn status(&self) -> JobStatus {
        self.status
    }

    /// Goes to `next`. False, with nothing changed, if the table forbids it.
    pub const fn become_status(&mut self, next: JobStatus) -> bool {
        if !self.status.may_become(next) {
            return false;
        }
        self.status = next;
        true
    }

    const fn take(&self, verb: JobVerb) -> Result<(), Refusal> {
        if self.status.accepts(verb) {
            Ok(())
        } else {
            Err(Refusal::State(self.status, verb))
        }
    }

    /// The user pauses it.
    pub const fn pause(&mut self) -> Result<(), Refusal> {
        if let Err(refusal) = self.take(JobVerb::Pause) {
            return Err(refusal);
        }
        if self.user_paused {
            return Err(Refusal::AlreadyPaused);
        }
        self.user_paused = true;
        Ok(())
    }

    /// The user lets it go on, after a pause or after an error that stopped it.
    pub const fn resume(&mut self) -> Result<(), Refusal> {
        if !self.user_paused && !self.error_paused {
            return Err(Refusal::NotPaused);
        }
        if let Err(refusal) = self.take(JobVerb::Resume) {
            return Err(refusal);
        }
        self.user_paused = false;
        self.error_paused = false;
        Ok(())
    }

    /// The user cancels it. Only a ready job can be cancelled softly.
    pub const fn cancel(&mut self, force: bool) -> Result<(), Refusal> {
        if let Err(refusal) = self.take(JobVerb::Cancel) {
            return Err(refusal);
        }
        let is_ready = matches!(self.status, JobStatus::Ready | JobStatus::Standby);
        if is_ready && !force {
            if self.ending.is_none() {
                self.ending = Some(Ending::SoftCancel);
            }
        } else {
            self.cancelled = true;
        }
        self.user_paused = false;
        self.error_paused = false;
        Ok(())
    }

    /// The user brings a ready job to its end.
    pub const fn complete(&mut self) -> Result<(), Refusal> {
        if let Err(refusal) = self.take(JobVerb::Complete) {
            return Err(refusal);
        }
        if self.cancelled || matches!(self.ending, Some(Ending::SoftCancel)) {
            return Err(Refusal::CantComplete);
        }
        self.ending = Some(Ending::Complete);
        Ok(())
    }

    /// The user lets a pending job make its changes.
    pub const fn finalize(&mut self) -> Result<(), Refusal> {
        if let Err(refusal) = self.take(JobVerb::Finalize) {
            return Err(refusal);
        }
        self.finalize = true;
        Ok(())
    }

    /// The user forgets a concluded job.
    pub const fn dismiss(&mut self) -> Result<(), Refusal> {
        if let Err(refusal) = self.take(JobVerb::Dismiss) {
            return Err(refusal);
        }
        self.dismissed = true;
        Ok(())
    }

    /// The user sets the speed limit (kept elsewhere).
    pub const fn set_speed(&self) -> Result<(), Refusal> {
        self.take(JobVerb::SetSpeed)
    }

    /// Another member of the transaction failed, or the manager is shutting down: not a user's verb, never refused.
    pub const fn abort(&mut self) {
        self.cancelled = true;
        self.user_paused = false;
        self.error_paused = false;
    }

    /// An I/O error with policy `stop` pauses it.
    pub const fn pause_for_error(&mut self) {
        if !self.cancelled {
            self.error_paused = true;
        }
    }

    /// Whether it is to stop at its next pause point.
    pub const fn wants_pause(&self) -> bool {
        self.user_paused || self.error_paused
    }

    /// Whether the user paused it.
    pub const fn is_user_paused(&self) -> bool {
        self.user_paused
    }

    /// Whether it was cancelled outright.
    pub const fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    /// How a ready job was asked to end.
    pub const fn ending(&self) -> Option<Ending> {
        self.ending
    }

    /// Whether `finalize` was accepted.
    pub const fn is_finalized(&self) -> bool {
        self.finalize
    }

    /// Whether `dismiss` was accepted.
    pub const fn is_dismissed(&self) -> bool {
        self.dismissed
    }
}

#[cfg(test)]
mod tests {
    use super::{JobStatus as S, JobVerb as V, *};

    /// The digest's table of transitions, written down a second time.
    fn allowed(from: S) -> &'static [S] {
        match from {
            S::Undefined => &[S::Created],
            S::Created => &[S::Running, S::Aborting, S::Null],
            S::Running => &[S::Paused, S::Ready, S::Waiting, S::Aborting],
            S::Paused => &[S::Running],
            S::Ready => &[S::Standby, S::Waiting, S::Aborting],
            S::Standby => &[S::Ready],
            S::Waiting => &[S::Pending, S::Aborting],
            S::Pending => &[S::Aborting, S::Concluded],
            S::Aborting => &[S::Aborting, S::Concluded],
            S::Concluded => &[S::Null],
            S::Null => &[],
        }
    }

    fn at(status: S) -> Machine {
        Machine {
            status,
            ..Machine::new()
        }
    }

    #[test]
    fn every_pair_of_states_is_as_in_the_table() {
        for from in S::ALL {
            for to in S::ALL {
                let mut machine = at(from);
                let went = machine.become_status(to);
                assert_eq!(went, allowed(from).contains(&to), "{from} to {to}");
                assert_eq!(machine.status(), if went { to } else { from });
            }
        }
    }

    #[test]
    fn every_pair_of_state_and_verb_is_as_in_the_table() {
        // Columns: undefined created running paused ready standby waiting pending aborting concluded null.
        let table = [
            (V::Cancel, "nyyyyyyynnn"),
            (V::Pause, "nyyyyynnnnn"),
            (V::Resume, "nyyyyynnnnn"),
            (V::SetSpeed, "nyyyyynnnnn"),
            (V::Complete, "nnnnyynnnnn"),
            (V::Finalize, "nnnnnnnynnn"),
            (V::Dismiss, "nnnnnnnnnyn"),
            (V::Change, "nyyyyynnnnn"),
        ];
        assert_eq!(table.len(), V::ALL.len());
        for (verb, row) in table {
            for (status, answer) in S::ALL.into_iter().zip(row.chars()) {
                assert_eq!(status.accepts(verb), answer == 'y', "{verb} in {status}");
                let mut machine = at(status);
                machine.user_paused = verb == V::Resume;
                let result = match verb {
                    V::Cancel => machine.cancel(true),
                    V::Pause => machine.pause(),
                    V::Resume => machine.resume(),
                    V::SetSpeed => machine.set_speed(),
                    V::Complete => machine.complete(),
                    V::Finalize => machine.finalize(),
                    V::Dismiss => machine.dismiss(),
                    V::Change => continue,
                };
                let expected = if answer == 'y' {
                    Ok(())
                } else {
                    Err(Refusal::State(status, verb))
                };
                assert_eq!(result, expected, "{verb} in {status}");
            }
        }
    }

    #[test]
    fn a_refusal_reads_as_qemus() {
        let refusal = at(S::Running).complete().unwrap_err();
        assert_eq!(
            refusal.message("j0"),
            "Job 'j0' in state 'running' cannot accept command verb 'complete'"
        );
        let mut machine = at(S::Running);
        assert_eq!(machine.resume(), Err(Refusal::NotPaused));
        assert_eq!(
            Refusal::NotPaused.message("j0"),
            "Can't resume a job that was not paused"
        );
        machine.pause().unwrap();
        assert_eq!(
            machine.pause().unwrap_err().message("j0"),
            "Job is already paused"
        );
    }

    #[test]
    fn a_cancelled_job_is_no_longer_paused_and_stays_cancelled() {
        for status in [S::Created, S::Running, S::Paused] {
            let mut machine = at(status);
            machine.pause().unwrap();
            machine.cancel(false).unwrap();
            assert!(machine.is_cancelled() && !machine.wants_pause(), "{status}");
            machine.pause_for_error();
            assert!(!machine.wants_pause());
        }
    }

    #[test]
    fn a_soft_cancel_of_a_ready_job_rules_completion_out_and_a_hard_one_wins_over_it() {
        let mut machine = at(S::Ready);
        machine.cancel(false).unwrap();
        assert_eq!(machine.ending(), Some(Ending::SoftCancel));
        assert!(!machine.is_cancelled());
        assert_eq!(machine.complete(), Err(Refusal::CantComplete));
        machine.cancel(true).unwrap();
        assert!(machine.is_cancelled());
    }

    #[test]
    fn an_error_pause_is_ended_by_a_users_resume_only() {
        let mut machine = at(S::Running);
        machine.pause_for_error();
        assert!(machine.wants_pause() && !machine.is_user_paused());
        assert!(machine.become_status(S::Paused));
        machine.resume().unwrap();
        assert!(!machine.wants_pause());
    }
}
