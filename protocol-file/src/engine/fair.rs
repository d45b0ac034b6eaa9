//! A queue with one lane per node: lanes take turns, and each may have only so many items running. So a node that
//! has filled its lane (a job on another disk, say) delays the others by at most one item each.

use std::collections::VecDeque;

/// The queue. It does no locking and no waking.
pub(crate) struct FairQueue<T> {
    lanes: Vec<Lane<T>>,
    /// Lanes that have something which may run, in the order of their turns.
    turns: VecDeque<usize>,
    /// Indices of lanes that nobody uses.
    free: Vec<usize>,
    /// The most items of one lane that run at the same time.
    lane_limit: usize,
    queued: usize,
}

struct Lane<T> {
    items: VecDeque<T>,
    running: usize,
    /// Whether it stands in `turns`.
    listed: bool,
    /// Whether its user is gone; it is freed with its last item.
    closed: bool,
}

impl<T> FairQueue<T> {
    /// An empty queue whose lanes may each have `lane_limit` items running.
    pub(crate) fn new(lane_limit: usize) -> Self {
        Self {
            lanes: Vec::new(),
            turns: VecDeque::new(),
            free: Vec::new(),
            lane_limit: lane_limit.max(1),
            queued: 0,
        }
    }

    /// A lane for a new node.
    pub(crate) fn open_lane(&mut self) -> usize {
        let lane = Lane {
            items: VecDeque::new(),
            running: 0,
            listed: false,
            closed: false,
        };
        match self.free.pop() {
            Some(index) => {
                self.lanes[index] = lane;
                index
            }
            None => {
                self.lanes.push(lane);
                self.lanes.len() - 1
            }
        }
    }

    /// The node is gone. What it has queued still runs.
    pub(crate) fn close_lane(&mut self, index: usize) {
        self.lanes[index].closed = true;
        self.free_if_empty(index);
    }

    fn free_if_empty(&mut self, index: usize) {
        let lane = &self.lanes[index];
        if lane.closed && lane.items.is_empty() && lane.running == 0 && !lane.listed {
            self.free.push(index);
        }
    }

    fn list(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        if !lane.listed && !lane.items.is_empty() && lane.running < self.lane_limit {
            lane.listed = true;
            self.turns.push_back(index);
        }
    }

    /// Adds an item at the end of its lane.
    pub(crate) fn push(&mut self, index: usize, item: T) {
        self.lanes[index].items.push_back(item);
        self.queued += 1;
        self.list(index);
    }

    /// Puts an item that was running back to the front of its lane.
    pub(crate) fn push_back_running(&mut self, index: usize, item: T) {
        let lane = &mut self.lanes[index];
        lane.running -= 1;
        lane.items.push_front(item);
        self.queued += 1;
        self.list(index);
    }

    /// The item whose turn it is; it counts as running until [`Self::done`].
    pub(crate) fn pop(&mut self) -> Option<(usize, T)> {
        let index = self.turns.pop_front()?;
        let lane = &mut self.lanes[index];
        lane.listed = false;
        let item = lane.items.pop_front()?;
        lane.running += 1;
        self.queued -= 1;
        self.list(index);
        Some((index, item))
    }

    /// An item of the lane has ended.
    pub(crate) fn done(&mut self, index: usize) {
        self.lanes[index].running -= 1;
        self.list(index);
        self.free_if_empty(index);
    }

    /// Items that wait.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Whether [`Self::pop`] would give something.
    pub(crate) fn is_ready(&self) -> bool {
        !self.turns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_take_turns_however_full_one_of_them_is() {
        let mut queue = FairQueue::new(100);
        let (busy, quiet) = (queue.open_lane(), queue.open_lane());
        for item in 0..50 {
            queue.push(busy, item);
        }
        queue.push(quiet, 1000);
        queue.push(quiet, 1001);
        let order: Vec<_> = (0..5)
            .filter_map(|_| queue.pop().map(|(_, item)| item))
            .collect();
        assert_eq!(order, [0, 1000, 1, 1001, 2]);
    }

    #[test]
    fn a_lane_never_has_more_running_than_its_limit() {
        let mut queue = FairQueue::new(2);
        let lane = queue.open_lane();
        for item in 0..4 {
            queue.push(lane, item);
        }
        assert!(queue.pop().is_some() && queue.pop().is_some());
        assert!(queue.pop().is_none() && !queue.is_ready() && queue.queued() == 2);
        queue.done(lane);
        assert_eq!(queue.pop(), Some((lane, 2)));
    }

    #[test]
    fn an_item_that_comes_back_is_next_in_its_lane() {
        let mut queue = FairQueue::new(1);
        let lane = queue.open_lane();
        queue.push(lane, 'a');
        queue.push(lane, 'b');
        let (_, item) = queue.pop().unwrap();
        queue.push_back_running(lane, item);
        assert_eq!(queue.pop(), Some((lane, 'a')));
    }

    #[test]
    fn a_closed_lane_is_used_again_after_its_last_item_ended() {
        let mut queue = FairQueue::new(1);
        let first = queue.open_lane();
        queue.push(first, ());
        queue.close_lane(first);
        assert_ne!(queue.open_lane(), first);
        assert!(queue.pop().is_some());
        queue.done(first);
        assert_eq!(queue.open_lane(), first);
    }
}
