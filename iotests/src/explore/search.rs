//! All schedules of one scenario, level by level: those with no deviation, with one, with two. A list of choices is run
//! once: it is its parent's list with one deviation more, behind the last one. What was run before is never run again, and a
//! run that doesn't see at each of its parent's points as many tasks as its parent did is a failure of its own: something
//! wasn't decided by the schedule.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use block_core::Registry;
use serde::Serialize;

use super::{
    scenario::Small,
    world::{Execution, Prepared, Start},
};
use crate::{case::FormatUnderTest, simulate::Failure};

/// How far a search goes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most deviations.
    pub bound: usize,
    /// The most executions.
    pub executions: u64,
    /// The most time.
    pub time: Option<Duration>,
}

impl Limits {
    /// As many executions as there are up to that bound.
    pub const fn bound(bound: usize) -> Self {
        Self {
            bound,
            executions: u64::MAX,
            time: None,
        }
    }
}

/// A schedule that fails, with the fewest deviations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Found {
    /// What is wrong.
    pub failure: Failure,
    /// The choices, without the usual ones at the end.
    pub schedule: Vec<u32>,
}

/// What came of a scenario.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The scenario.
    pub scenario: String,
    /// The format with its options.
    pub format: String,
    /// `passed`, `failed`, `inconclusive` or `not-covered`.
    pub verdict: &'static str,
    /// What there is to say about that.
    pub detail: String,
    /// How many schedules were run.
    pub executions: u64,
    /// How many of them differ in what storage, allocator and guests saw.
    pub distinct: u64,
    /// The most points of one execution.
    pub deepest: usize,
    /// All schedules with so many deviations were run.
    pub bound: Option<usize>,
    /// There are no schedules with more deviations.
    pub complete: bool,
    /// Requests that waited at the gate, of all executions.
    pub waits: u64,
    /// Freed clusters that were handed out again, of all executions; `None` when the driver doesn't tell.
    pub reused: Option<u64>,
    /// The schedule that fails.
    pub found: Option<Found>,
}

/// A schedule that was run, as the parent of others.
struct Parent {
    choices: Vec<u32>,
    /// At each point, how many tasks were ready.
    ready: Vec<u32>,
}

struct Search {
    prepared: Arc<Prepared>,
    limits: Limits,
    began: Instant,
    seen: HashSet<u64>,
    report: Report,
}

/// Why a search ends before it has come to its end.
enum Stop {
    Failed(Found),
    Budget,
}

impl Search {
    fn run(&mut self, choices: &[u32], parent: Option<&Parent>) -> Result<Execution, Stop> {
        let late = |time| self.began.elapsed() >= time;
        let over = self.report.executions >= self.limits.executions;
        if over || self.limits.time.is_some_and(late) {
            return Err(Stop::Budget);
        }
        let execution = self.prepared.execute(choices, false);
        let report = &mut self.report;
        report.executions += 1;
        report.deepest = report.deepest.max(execution.points.len());
        report.waits += execution.waits;
        if let Some(reused) = execution.reused {
            *report.reused.get_or_insert(0) += reused;
        }
        self.seen.insert(execution.hash);
        report.distinct = self.seen.len() as u64;
        let found = |failure| {
            Stop::Failed(Found {
                failure,
                schedule: choices.to_vec(),
            })
        };
        let strays = parent.is_some_and(|parent| {
            let points = execution.points.iter().map(|point| point.ready);
            points
                .take(choices.len())
                .ne(parent.ready.iter().copied().take(choices.len()))
        });
        if strays || execution.misfit.is_some() {
            return Err(found(Failure::new(
                crate::simulate::FailureKind::Error,
                "the same choices led elsewhere: something isn't decided by the schedule",
            )));
        }
        match &execution.failure {
            Some(failure) => Err(found(failure.clone())),
            None => Ok(execution),
        }
    }

    fn levels(&mut self) -> Result<(), Stop> {
        let first = self.run(&[], None)?;
        self.report.bound = Some(0);
        let mut parents = vec![parent(Vec::new(), &first)];
        for bound in 1..=self.limits.bound {
            let mut children = Vec::new();
            let keep = bound < self.limits.bound;
            let before = self.report.executions;
            for parent_of in &parents {
                for at in parent_of.choices.len()..parent_of.ready.len() {
                    for other in 1..parent_of.ready[at] {
                        let mut choices = parent_of.choices.clone();
                        choices.resize(at, 0);
                        choices.push(other);
                        let execution = self.run(&choices, Some(parent_of))?;
                        if keep {
                            children.push(parent(choices, &execution));
                        }
                    }
                }
            }
            self.report.bound = Some(bound);
            if self.report.executions == before {
                self.report.complete = true;
                break;
            }
            parents = children;
        }
        Ok(())
    }
}

fn parent(choices: Vec<u32>, execution: &Execution) -> Parent {
    Parent {
        choices,
        ready: execution.points.iter().map(|point| point.ready).collect(),
    }
}

/// Runs all schedules of a scenario within the limits.
///
/// # Errors
/// The scenario's images can't be made, in words.
pub fn explore(
    registry: &Registry,
    format: &FormatUnderTest,
    scenario: &Small,
    gate: bool,
    limits: Limits,
) -> Result<Report, String> {
    let mut report = Report {
        scenario: scenario.name.clone(),
        format: format.label(),
        verdict: "passed",
        detail: String::new(),
        executions: 0,
        distinct: 0,
        deepest: 0,
        bound: None,
        complete: false,
        waits: 0,
        reused: None,
        found: None,
    };
    let prepared = match Prepared::make(registry, format, scenario, gate)? {
        Start::Ready(prepared) => Arc::new(*prepared),
        Start::NotCovered(why) => {
            report.verdict = "not-covered";
            report.detail = why;
            return Ok(report);
        }
    };
    let mut search = Search {
        prepared,
        limits,
        began: Instant::now(),
        seen: HashSet::new(),
        report,
    };
    let ended = search.levels();
    let mut report = search.report;
    let mut doubts = Vec::new();
    match ended {
        Err(Stop::Failed(found)) => {
            report.verdict = "failed";
            report.detail = found.failure.to_string();
            report.found = Some(found);
            return Ok(report);
        }
        Err(Stop::Budget) => {
            doubts.push(format!(
                "the budget is exhausted; asked for bound {}",
                limits.bound
            ));
        }
        Ok(()) => {}
    }
    // One deviation at least is needed for anything to meet.
    if gate && limits.bound > 0 {
        if scenario.waits && report.waits == 0 {
            doubts.push("no request ever waited at the gate".to_owned());
        }
        if scenario.reuses && report.reused == Some(0) {
            doubts.push("no freed cluster was ever handed out again".to_owned());
        }
    }
    if !doubts.is_empty() {
        report.verdict = "inconclusive";
        report.detail = doubts.join("; ");
    }
    Ok(report)
}
