//! Any case again, with one of its requests dropped at each of its await points in turn: at once, and again when
//! everything else has come to rest. The case itself judges what is left.

use block_core::Registry;
use serde::Serialize;

use crate::{
    case::{CancelPlan, Case, FormatUnderTest, Verdict, run},
    sim::DropWhen,
};

/// The most await points of one request that are tried.
const MAX_POINTS: usize = 400;

/// What a sweep found.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sweep {
    /// The case.
    pub case: String,
    /// The verdict on the run in which nothing was dropped.
    pub undisturbed: Verdict,
    /// Requests that were dropped one after the other.
    pub requests: usize,
    /// Await points at which a request was really dropped.
    pub dropped: usize,
    /// The plans that failed: what was dropped, and what came of it.
    pub failures: Vec<String>,
}

impl Sweep {
    /// The verdict on the whole.
    pub fn verdict(&self) -> Verdict {
        match &self.undisturbed {
            Verdict::Passed => {}
            other => return other.clone(),
        }
        if let Some(first) = self.failures.first() {
            return Verdict::Failed(format!("{} points failed; {first}", self.failures.len()));
        }
        if self.dropped == 0 {
            return Verdict::Inconclusive("nothing was dropped".into());
        }
        Verdict::Passed
    }
}

/// Runs `case` once undisturbed, and then once for every await point of every request that it starts.
pub fn sweep(registry: &Registry, format: &FormatUnderTest, case: &Case, seed: u64) -> Sweep {
    let first = run(registry, format, case, seed, None);
    let mut sweep = Sweep {
        case: case.name.clone(),
        undisturbed: first.verdict.clone(),
        requests: first.requests,
        dropped: 0,
        failures: Vec::new(),
    };
    if first.verdict != Verdict::Passed {
        return sweep;
    }
    for request in 0..first.requests {
        for when in [DropWhen::AtOnce, DropWhen::AtRest] {
            for polls in 0..MAX_POINTS {
                let plan = CancelPlan {
                    request,
                    polls,
                    when,
                };
                let run = run(registry, format, case, seed, Some(plan));
                if let Verdict::Failed(text) = &run.verdict {
                    sweep.failures.push(format!("{plan:?}: {text}"));
                }
                if !run.dropped {
                    break;
                }
                sweep.dropped += 1;
            }
        }
    }
    sweep
}
