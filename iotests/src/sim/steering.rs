//! A schedule that an explorer steers: it says at which points another task than usual is polled, and learns how many
//! tasks there were to choose from.
//!
//! **The usual choice** is the task that was polled last, as long as it is ready, and else the one that has been ready
//! for longest. So without a word from the explorer each task runs until it waits for another, and one deviation is
//! enough to stop a request in the middle of its I/O and have everybody else run to their ends meanwhile. A choice is 0
//! for the usual one, and n for the n-th of the others in the order in which they became ready.
//!
//! Choices are only counted between [`Steering::open`] and [`Steering::close`], and where more than one task is ready;
//! anywhere else tasks take turns. It runs nothing itself.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;

/// The most points of one run. From there on tasks take turns, so that one which waits by polling again and again isn't
/// alone for ever.
const MAX_POINTS: usize = 100_000;

/// A moment at which more than one task was ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// How many were ready.
    pub ready: u32,
    /// Which was chosen; 0 is the usual one.
    pub chosen: u32,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    choices: Vec<u32>,
    points: Vec<Point>,
    last: Option<u64>,
    misfit: Option<usize>,
}

/// See the file's header. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Steering(Arc<Mutex<State>>);

impl Steering {
    /// Chooses as the list says, and as usual where it has come to its end. Closed at first.
    pub fn new(choices: &[u32]) -> Self {
        let state = State {
            choices: choices.to_vec(),
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// From now on there are choices.
    pub fn open(&self) {
        self.0.lock().open = true;
    }

    /// From now on there are none.
    pub fn close(&self) {
        self.0.lock().open = false;
    }

    /// The points that there were.
    pub fn points(&self) -> Vec<Point> {
        self.0.lock().points.clone()
    }

    /// The first choice of the list that there was no task for, or no point: this list is not one of this run.
    pub fn misfit(&self) -> Option<usize> {
        let state = self.0.lock();
        let unused = state.choices.len() > state.points.len();
        state.misfit.or(unused.then_some(state.points.len()))
    }

    pub(super) fn choices(&self) -> Vec<u32> {
        let state = self.0.lock();
        state.points.iter().map(|point| point.chosen).collect()
    }

    pub(super) fn choose(&self, tasks: &VecDeque<u64>) -> usize {
        let mut state = self.0.lock();
        let state = &mut *state;
        let at = state.points.len();
        if !state.open || at >= MAX_POINTS {
            return 0;
        }
        let usual = state
            .last
            .and_then(|last| tasks.iter().position(|task| *task == last))
            .unwrap_or(0);
        let mut place = usual;
        if tasks.len() > 1 {
            let mut chosen = state.choices.get(at).copied().unwrap_or(0);
            if chosen as usize >= tasks.len() {
                state.misfit.get_or_insert(at);
                chosen = 0;
            }
            place = match chosen as usize {
                0 => usual,
                n if n <= usual => n - 1,
                n => n,
            };
            let ready = tasks.len() as u32;
            state.points.push(Point { ready, chosen });
        }
        state.last = tasks.get(place).copied();
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks(ids: &[u64]) -> VecDeque<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn the_task_that_ran_last_goes_on_unless_the_list_says_otherwise() {
        let steering = Steering::new(&[0, 2, 0, 1]);
        assert_eq!(steering.choose(&tasks(&[4, 5])), 0);
        assert!(steering.points().is_empty());
        steering.open();
        assert_eq!(steering.choose(&tasks(&[4, 5, 6])), 0);
        assert_eq!(steering.choose(&tasks(&[5, 6, 4])), 1);
        assert_eq!(steering.choose(&tasks(&[6])), 0);
        assert_eq!(steering.choose(&tasks(&[5, 4, 6])), 2);
        assert_eq!(steering.choose(&tasks(&[5, 4, 6])), 0);
        assert_eq!(steering.choose(&tasks(&[4, 6, 5])), 2);
        assert_eq!(steering.misfit(), None);
        assert_eq!(steering.choices(), [0, 2, 0, 1, 0]);
    }

    #[test]
    fn a_list_that_is_not_of_this_run_is_noticed() {
        let steering = Steering::new(&[3]);
        steering.open();
        assert_eq!(steering.choose(&tasks(&[1, 2])), 0);
        assert_eq!(steering.misfit(), Some(0));
        let longer = Steering::new(&[0, 1]);
        longer.open();
        assert_eq!(longer.choose(&tasks(&[1, 2])), 0);
        assert_eq!(longer.misfit(), Some(1));
    }
}
