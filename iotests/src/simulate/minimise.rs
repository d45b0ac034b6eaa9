//! From a failure to the shortest scenario and schedule that still fail in the same way: parts are taken away as long as
//! what is left fails with the same kind of failure, first of the scenario, then of the schedule, which ends as the
//! fewest deviations from first come, first served.
//!
//! A smaller scenario meets other schedules: each candidate is tried under several before it is given up.

use block_core::Registry;
use serde::{Deserialize, Serialize};

use super::{
    record::{Failure, FailureKind},
    run::{How, Outcome, run},
    scenario::{Phase, Scenario, Step, StepKind},
};
use crate::sim::Schedule;

/// A failure that can be run again from a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Saved {
    /// What goes wrong.
    pub failure: Failure,
    /// Whether requests wait at the gate.
    pub gate: bool,
    /// Whether the driver has safeguards of its own.
    pub safeguards: bool,
    /// Random numbers that storage and drivers ask for.
    pub values: u64,
    /// Which of the ready tasks is polled, wherever it isn't the one that became ready first; see [`Schedule::Script`].
    pub choices: Vec<u32>,
    /// What is done.
    pub scenario: Scenario,
}

impl Saved {
    /// How it is run.
    pub fn how(&self) -> How {
        How {
            gate: self.gate,
            books: self.failure.kind == FailureKind::Invariant,
            values: self.values,
            schedule: Schedule::Script(self.choices.as_slice().into()),
            timeline: false,
            choices: false,
        }
    }

    /// Runs it again.
    pub fn replay(&self, registry: &Registry, timeline: bool) -> Outcome {
        let mut how = self.how();
        how.timeline = timeline;
        run(registry, &self.scenario, &how)
    }
}

struct Search<'a> {
    registry: &'a Registry,
    kind: FailureKind,
    how: How,
    best: Scenario,
    runs: u64,
    max_runs: u64,
}

impl Search<'_> {
    fn is_over(&self) -> bool {
        self.runs >= self.max_runs
    }

    fn fails(&mut self, scenario: &Scenario, how: &How) -> bool {
        self.runs += 1;
        let outcome = run(self.registry, scenario, how);
        outcome
            .failure
            .is_some_and(|failure| failure.kind == self.kind)
    }

    /// Takes `candidate` for the best if it fails under some schedule.
    fn try_it(&mut self, candidate: Scenario) -> bool {
        if candidate == self.best || self.is_over() {
            return false;
        }
        // Small ones are cheap, and their failures rarer.
        let tries = (400 / (candidate.weight() as u64 + 4)).clamp(4, 40);
        for n in 0..tries {
            let mut how = self.how.clone();
            if n > 0 {
                let seed = self.how.values.wrapping_add(n * 7919);
                how.values = seed;
                how.schedule = Schedule::Seed(seed);
            }
            if self.fails(&candidate, &how) {
                self.best = candidate;
                self.how = how;
                return true;
            }
            if self.is_over() {
                break;
            }
        }
        false
    }

    /// Tries the best with `change`, which says whether there was anything to change.
    fn change(&mut self, change: impl FnOnce(&mut Scenario) -> bool) -> bool {
        let mut candidate = self.best.clone();
        change(&mut candidate) && self.try_it(candidate)
    }

    /// Takes elements away from a list, many at once first.
    fn thin<T: Clone>(&mut self, list: impl Fn(&mut Scenario) -> Option<&mut Vec<T>>) -> bool {
        let len = |scenario: &mut Scenario| list(scenario).map_or(0, |list| list.len());
        let mut changed = false;
        let mut chunk = len(&mut self.best.clone()).max(1);
        while chunk > 0 {
            let mut at = 0;
            while at < len(&mut self.best.clone()) {
                let taken = self.change(|scenario| {
                    let Some(list) = list(scenario) else {
                        return false;
                    };
                    let end = (at + chunk).min(list.len());
                    list.drain(at..end);
                    true
                });
                changed |= taken;
                if !taken {
                    at += chunk;
                }
                if self.is_over() {
                    return changed;
                }
            }
            chunk /= 2;
        }
        changed
    }

    fn each_phase(&mut self, mut change: impl FnMut(&mut Self, usize) -> bool) -> bool {
        let mut changed = false;
        let mut n = 0;
        while n < self.best.phases.len() {
            changed |= change(self, n);
            n += 1;
        }
        changed
    }

    fn structure(&mut self) -> bool {
        let mut changed = self.thin(|scenario| Some(&mut scenario.phases));
        changed |= self.each_phase(|search, n| {
            let phase = move |scenario: &mut Scenario| -> bool {
                scenario
                    .phases
                    .get(n)
                    .is_some_and(|phase| phase.cut.is_some())
            };
            let mut changed = search.change(|scenario| {
                phase(scenario) && {
                    scenario.phases[n].cut = None;
                    true
                }
            });
            changed |=
                search.thin(|scenario| scenario.phases.get_mut(n).map(|phase| &mut phase.jobs));
            changed |=
                search.thin(|scenario| scenario.phases.get_mut(n).map(|phase| &mut phase.faults));
            changed |=
                search.thin(|scenario| scenario.phases.get_mut(n).map(|phase| &mut phase.queues));
            let queues = search
                .best
                .phases
                .get(n)
                .map_or(0, |phase| phase.queues.len());
            for queue in 0..queues {
                changed |= search.thin(|scenario| {
                    let phase = scenario.phases.get_mut(n)?;
                    phase.queues.get_mut(queue).map(|queue| &mut queue.steps)
                });
            }
            let jobs = search
                .best
                .phases
                .get(n)
                .map_or(0, |phase| phase.jobs.len());
            for job in 0..jobs {
                changed |= search.thin(|scenario| {
                    let phase = scenario.phases.get_mut(n)?;
                    phase.jobs.get_mut(job).map(|job| &mut job.verbs)
                });
            }
            changed
        });
        if self.best.layers.len() > 1 {
            changed |= self.change(|scenario| {
                scenario.layers.remove(0);
                true
            });
        }
        for layer in 0..self.best.layers.len() {
            changed |=
                self.thin(|scenario| scenario.layers.get_mut(layer).map(|layer| &mut layer.fill));
            changed |= self.thin(|scenario| {
                scenario
                    .layers
                    .get_mut(layer)
                    .map(|layer| &mut layer.options)
            });
        }
        changed |= self.thin(|scenario| Some(&mut scenario.open));
        changed
    }

    /// One value of a scenario: `get` finds it, `simpler` gives what to try instead.
    fn simplify<T: Clone + PartialEq>(
        &mut self,
        get: impl Fn(&mut Scenario) -> Option<&mut T>,
        simpler: impl Fn(&T) -> Vec<T>,
    ) -> bool {
        let Some(now) = get(&mut self.best.clone()).cloned() else {
            return false;
        };
        for value in simpler(&now) {
            if value == now {
                continue;
            }
            let changed = self.change(|scenario| {
                get(scenario).is_some_and(|place| {
                    *place = value;
                    true
                })
            });
            if changed {
                return true;
            }
        }
        false
    }

    fn values(&mut self) -> bool {
        let mut changed = self.simplify(|s| Some(&mut s.jitter), |_| vec![0]);
        changed |= self.each_phase(|search, n| {
            let mut changed = search.simplify(
                |s| s.phases.get_mut(n).map(|phase| &mut phase.cut),
                |cut| {
                    cut.map_or(Vec::new(), |at| {
                        vec![Some(at / 2), Some(at.saturating_sub(1))]
                    })
                },
            );
            let sizes: Vec<usize> = search.best.phases[n]
                .queues
                .iter()
                .map(|q| q.steps.len())
                .collect();
            for (queue, steps) in sizes.into_iter().enumerate() {
                changed |= search.simplify(
                    |s| {
                        s.phases
                            .get_mut(n)?
                            .queues
                            .get_mut(queue)
                            .map(|queue| &mut queue.depth)
                    },
                    |depth| vec![1, depth / 2],
                );
                for step in 0..steps {
                    changed |= search.simplify(
                        |s| {
                            s.phases
                                .get_mut(n)?
                                .queues
                                .get_mut(queue)?
                                .steps
                                .get_mut(step)
                        },
                        simpler_steps,
                    );
                }
            }
            for job in 0..search.best.phases[n].jobs.len() {
                changed |= search.simplify(
                    |s| {
                        s.phases
                            .get_mut(n)?
                            .jobs
                            .get_mut(job)
                            .map(|job| &mut job.start)
                    },
                    |start| vec![0, start / 2],
                );
                changed |= search.simplify(
                    |s| {
                        s.phases
                            .get_mut(n)?
                            .jobs
                            .get_mut(job)
                            .map(|job| &mut job.speed)
                    },
                    |_| vec![0],
                );
            }
            for fault in 0..search.best.phases[n].faults.len() {
                changed |= search.simplify(
                    |s| {
                        s.phases
                            .get_mut(n)?
                            .faults
                            .get_mut(fault)
                            .map(|fault| &mut fault.skip)
                    },
                    |skip| vec![0, skip / 2, skip.saturating_sub(1)],
                );
            }
            changed
        });
        for layer in 0..self.best.layers.len() {
            for fill in 0..self.best.layers[layer].fill.len() {
                changed |= self.simplify(
                    |s| s.layers.get_mut(layer)?.fill.get_mut(fill),
                    |fill| {
                        let half = (fill.len / 2).next_multiple_of(512);
                        let mut shorter = *fill;
                        shorter.len = half.min(fill.len);
                        let mut later = shorter;
                        later.offset += fill.len - later.len;
                        vec![shorter, later]
                    },
                );
            }
        }
        changed
    }

    /// Writes the schedule down, and takes deviations from first come, first served out of it.
    fn schedule(&mut self) -> Vec<u32> {
        let mut how = self.how.clone();
        how.choices = true;
        let recorded = run(self.registry, &self.best, &how).choices;
        let mut best = recorded;
        let fails = |search: &mut Self, choices: &[u32]| {
            let how = How {
                schedule: Schedule::Script(choices.into()),
                choices: false,
                ..search.how.clone()
            };
            let scenario = search.best.clone();
            search.fails(&scenario, &how)
        };
        let mut chunk = best.len().next_power_of_two();
        while chunk > 0 && !self.is_over() {
            for at in (0..best.len()).step_by(chunk) {
                let end = (at + chunk).min(best.len());
                if best[at..end].iter().all(|choice| *choice == 0) {
                    continue;
                }
                let mut candidate = best.clone();
                candidate[at..end].fill(0);
                if fails(self, &candidate) {
                    best = candidate;
                }
            }
            chunk /= 2;
        }
        while best.last() == Some(&0) {
            best.pop();
        }
        best
    }
}

/// What a step may become that is easier to understand.
fn simpler_steps(step: &Step) -> Vec<Step> {
    let mut all = Vec::new();
    if step.dropped.is_some() || step.fua {
        all.push(Step {
            dropped: None,
            fua: false,
            ..*step
        });
    }
    if let Some(dropped) = step.dropped {
        let mut sooner = dropped;
        sooner.polls /= 2;
        all.push(Step {
            dropped: Some(sooner),
            ..*step
        });
    }
    if step.kind.has_range() && step.len > 512 && step.kind != StepKind::WriteCompressed {
        let half = (step.len / 2).next_multiple_of(512);
        let front = Step { len: half, ..*step };
        let back = Step {
            offset: step.offset + step.len - half,
            len: half,
            ..*step
        };
        all.extend([front, back]);
    }
    if step.kind == StepKind::ZeroUnmap || step.kind == StepKind::Zero {
        all.push(Step {
            kind: StepKind::Discard,
            ..*step
        });
    }
    all
}

/// Makes a failing scenario as small as so many runs of it allow, and its schedule with as many more. `None` when it doesn't fail at all.
pub fn minimise(
    registry: &Registry,
    scenario: &Scenario,
    how: &How,
    safeguards: bool,
    runs: u64,
) -> Option<Saved> {
    let failure = run(registry, scenario, how).failure?;
    // Whether what must hold at every step is looked at decides which failure comes first.
    let books = failure.kind == FailureKind::Invariant;
    let mut search = Search {
        registry,
        kind: failure.kind,
        how: How {
            books,
            timeline: false,
            choices: false,
            ..how.clone()
        },
        best: scenario.clone(),
        runs: 0,
        max_runs: runs,
    };
    loop {
        let structure = search.structure();
        let values = search.values();
        if !(structure || values) || search.is_over() {
            break;
        }
    }
    search.change(|scenario| {
        let before = scenario.phases.len();
        scenario.phases.retain(|phase: &Phase| {
            phase.cut.is_some() || !phase.queues.is_empty() || !phase.jobs.is_empty()
        });
        scenario.phases.len() < before
    });
    // The schedule is short by now: it gets the time that it takes.
    search.max_runs = search.runs + runs;
    let choices = search.schedule();
    let mut saved = Saved {
        failure,
        gate: how.gate,
        safeguards,
        values: search.how.values,
        choices,
        scenario: search.best,
    };
    saved.failure = saved.replay(registry, false).failure?;
    Some(saved)
}
