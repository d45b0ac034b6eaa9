//! The outcomes of a run, for people and for programs. Nothing here decides a verdict.

mod human;
mod json;
mod junit;

use std::ops::Range;

pub use self::{
    human::{line, matrix, summary},
    json::json,
    junit::junit,
};
use crate::{case::Verdict, runner::Outcome};

/// A run: what was asked for, and what came out.
#[derive(Debug, Clone)]
pub struct Report {
    /// The formats, in the order of the matrix's columns.
    pub formats: Vec<String>,
    /// The schedules.
    pub seeds: Range<u64>,
    /// What was left out although it was asked for, and why, in sentences.
    pub notes: Vec<String>,
    /// One per case and format.
    pub outcomes: Vec<Outcome>,
}

/// How many there are of each verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Totals {
    /// Passed.
    pub passed: usize,
    /// Not covered by the driver.
    pub not_covered: usize,
    /// Proved nothing.
    pub inconclusive: usize,
    /// Failed.
    pub failed: usize,
}

impl Totals {
    /// The totals of some outcomes.
    pub fn of<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> Self {
        let mut totals = Self::default();
        for outcome in outcomes {
            match outcome.verdict {
                Verdict::Passed => totals.passed += 1,
                Verdict::NotCovered(_) => totals.not_covered += 1,
                Verdict::Inconclusive(_) => totals.inconclusive += 1,
                Verdict::Failed(_) => totals.failed += 1,
            }
        }
        totals
    }

    /// All of them.
    pub const fn all(&self) -> usize {
        self.passed + self.not_covered + self.inconclusive + self.failed
    }
}
