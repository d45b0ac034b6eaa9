//! Which of the ready tasks is polled next: by seed, as written down, or as somebody says who explores all of them
//! ([`super::steering`]). A written schedule is what makes a failure small: wherever it says nothing, the task that became
//! ready first is the one.

use std::{collections::VecDeque, sync::Arc};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::Steering;

/// In which order tasks are polled.
#[derive(Debug, Clone)]
pub enum Schedule {
    /// Any of the ready tasks, as this seed says. Random numbers that tasks ask for don't change it.
    Seed(u64),
    /// The n-th time that more than one task is ready, the one at this place in the order in which they became ready (modulo
    /// how many there are); the first one when the list has come to its end.
    Script(Arc<[u32]>),
    /// As an explorer says.
    Steered(Steering),
}

/// What makes the choice.
pub(super) enum Chooser {
    Fifo,
    /// From the numbers that tasks get, too.
    Values,
    Own {
        rng: SmallRng,
        recorded: Option<Vec<u32>>,
    },
    Script {
        choices: Arc<[u32]>,
        at: usize,
    },
    Steered(Steering),
}

impl Chooser {
    pub(super) fn new(schedule: &Schedule) -> Self {
        match schedule {
            Schedule::Seed(seed) => Self::Own {
                rng: SmallRng::seed_from_u64(*seed),
                recorded: None,
            },
            Schedule::Script(choices) => Self::Script {
                choices: choices.clone(),
                at: 0,
            },
            Schedule::Steered(steering) => Self::Steered(steering.clone()),
        }
    }

    /// The place of one of the `tasks` that are ready; there is at least one.
    pub(super) fn choose(&mut self, tasks: &VecDeque<u64>, values: &mut SmallRng) -> usize {
        let ready = tasks.len();
        match self {
            Self::Steered(steering) => steering.choose(tasks),
            Self::Fifo => 0,
            Self::Values => values.random_range(0..ready),
            Self::Own { .. } | Self::Script { .. } if ready == 1 => 0,
            Self::Own { rng, recorded } => {
                let chosen = rng.random_range(0..ready);
                if let Some(recorded) = recorded {
                    recorded.push(chosen as u32);
                }
                chosen
            }
            Self::Script { choices, at } => {
                let chosen = choices.get(*at).copied().unwrap_or(0);
                *at += 1;
                chosen as usize % ready
            }
        }
    }

    pub(super) fn record(&mut self) {
        if let Self::Own { recorded, .. } = self {
            recorded.get_or_insert_default();
        }
    }

    pub(super) fn recorded(&self) -> Vec<u32> {
        match self {
            Self::Own { recorded, .. } => recorded.clone().unwrap_or_default(),
            Self::Script { choices, at } => choices[..choices.len().min(*at)].to_vec(),
            Self::Steered(steering) => steering.choices(),
            Self::Fifo | Self::Values => Vec::new(),
        }
    }
}
