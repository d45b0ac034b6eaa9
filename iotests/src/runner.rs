//! Runs cases against formats, several worlds side by side on threads of their own. It decides which schedules a case is
//! run under and what its verdict on all of them is; it prints nothing.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use block_core::Registry;
use serde::Serialize;

use crate::{
    cancel,
    case::{self, Case, FormatUnderTest, Group, How, Verdict},
    panics,
};

/// How cases are run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Each case under so many schedules.
    pub seeds: Range<u64>,
    /// Worlds side by side.
    pub threads: usize,
    /// Ask the installed qemu-img about the images that cases leave behind, under the first schedule.
    pub external: bool,
    /// No further case after the first that failed.
    pub fail_fast: bool,
}

impl Plan {
    /// A plan with as many threads as there are processors.
    pub fn new(seeds: Range<u64>) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            seeds,
            threads,
            external: false,
            fail_fast: false,
        }
    }
}

/// What a case came to on a format.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// The format, with its options of creation.
    pub format: String,
    /// What the case is about.
    pub group: Group,
    /// The case.
    pub case: String,
    /// The verdict on all its schedules: the worst.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// The schedule that the verdict comes from.
    pub seed: u64,
    /// How many schedules it ran under.
    pub schedules: u64,
    /// How long that took.
    #[serde(serialize_with = "millis")]
    pub milliseconds: Duration,
    /// The command that runs it again, under the one schedule.
    pub again: String,
}

fn millis<S: serde::Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(duration.as_millis() as u64)
}

/// Runs one case under the plan's schedules until one of them doesn't pass.
pub fn run_case(
    registry: &Registry,
    format: &FormatUnderTest,
    case: &Case,
    seeds: &Range<u64>,
    external: bool,
) -> (Verdict, u64, u64) {
    let mut schedules = 0;
    for seed in seeds.clone() {
        schedules += 1;
        let verdict = panics::catch(|| match case.group {
            Group::Cancel => cancel::sweep(registry, format, case, seed).verdict(),
            _ => {
                let how = How {
                    seed,
                    cancel: None,
                    external: external && seed == seeds.start,
                };
                case::run_how(registry, format, case, how).verdict
            }
        })
        .unwrap_or_else(Verdict::Failed);
        // One schedule is enough for what isn't covered, and for each point of a cancellation.
        if verdict != Verdict::Passed || case.group == Group::Cancel {
            return (verdict, seed, schedules);
        }
    }
    if schedules == 0 {
        let nothing = Verdict::Inconclusive("no schedule was asked for".into());
        return (nothing, seeds.start, 0);
    }
    (Verdict::Passed, seeds.start, schedules)
}

/// Runs every case on every format. `progress` hears of each as soon as it has ended; the outcomes come back in the
/// order of formats, then cases.
pub fn run_all(
    registry: &Registry,
    formats: &[FormatUnderTest],
    cases: &[Case],
    plan: &Plan,
    again: impl Fn(&FormatUnderTest, &Case, u64) -> String,
    mut progress: impl FnMut(usize, &Outcome),
) -> Vec<Outcome> {
    let work: Vec<(&FormatUnderTest, &Case)> = formats
        .iter()
        .flat_map(|format| cases.iter().map(move |case| (format, case)))
        .collect();
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let mut outcomes: Vec<Option<Outcome>> = Vec::new();
    outcomes.resize_with(work.len(), || None);
    let (report, reports) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..plan.threads.clamp(1, work.len().max(1)) {
            let (report, work, next, stop) = (report.clone(), &work, &next, &stop);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((format, case)) = work.get(number) else {
                        break;
                    };
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let began = Instant::now();
                    let (verdict, seed, schedules) =
                        run_case(registry, format, case, &plan.seeds, plan.external);
                    if plan.fail_fast && verdict.is_failed() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    let ended = (number, verdict, seed, schedules, began.elapsed());
                    if report.send(ended).is_err() {
                        break;
                    }
                }
            });
        }
        drop(report);
        let mut done = 0;
        for (number, verdict, seed, schedules, milliseconds) in reports {
            let (format, case) = work[number];
            let outcome = Outcome {
                format: format.label(),
                group: case.group,
                case: case.name.clone(),
                verdict,
                seed,
                schedules,
                milliseconds,
                again: again(format, case, seed),
            };
            done += 1;
            progress(done, &outcome);
            outcomes[number] = Some(outcome);
        }
    });
    outcomes.into_iter().flatten().collect()
}

/// The exit status for these verdicts: 0 when none is bad, 1 when something failed, 2 when something proved nothing.
pub fn status<'a>(verdicts: impl IntoIterator<Item = &'a Verdict>) -> u8 {
    let mut status = 0;
    for verdict in verdicts {
        match verdict {
            Verdict::Failed(_) => return 1,
            Verdict::Inconclusive(_) => status = 2,
            Verdict::Passed | Verdict::NotCovered(_) => {}
        }
    }
    status
}
