//! A queue with one lane per node, and in each lane a line per producer: lanes take turns, and so do the producers within a
//! lane; each lane may have only so many items running. So a node that has filled its lane delays the others by at most
//! one item each, and so does a job that has queued hundreds of requests on the disk that the guest uses.

use std::collections::VecDeque;

use block_core::producer::ProducerId;

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
    /// Producers that wait, in the order of their turns. None of the lines is empty.
    lines: VecDeque<Line<T>>,
    /// What a producer's line left behind, so that one that comes and goes allocates nothing.
    spare: VecDeque<T>,
    running: usize,
    /// Whether it stands in `turns`.
    listed: bool,
    /// Whether its user is gone; it is freed with its last item.
    closed: bool,
}

/// What one producer has queued in a lane.
struct Line<T> {
    producer: ProducerId,
    items: VecDeque<T>,
}

impl<T> Lane<T> {
    fn new() -> Self {
        Self {
            lines: VecDeque::new(),
            spare: VecDeque::new(),
            running: 0,
            listed: false,
            closed: false,
        }
    }

    /// The producer's place among the turns.
    fn find(&self, producer: ProducerId) -> Option<usize> {
        self.lines.iter().position(|line| line.producer == producer)
    }

    fn new_line(&mut self, producer: ProducerId, item: T) -> Line<T> {
        let mut items = std::mem::take(&mut self.spare);
        items.push_back(item);
        Line { producer, items }
    }

    fn push(&mut self, producer: ProducerId, item: T) {
        match self.find(producer) {
            Some(at) => self.lines[at].items.push_back(item),
            None => {
                let line = self.new_line(producer, item);
                self.lines.push_back(line);
            }
        }
    }

    /// Next in the lane, whoever else waits.
    fn push_front(&mut self, producer: ProducerId, item: T) {
        let line = match self.find(producer).and_then(|at| self.lines.remove(at)) {
            Some(mut line) => {
                line.items.push_front(item);
                line
            }
            None => self.new_line(producer, item),
        };
        self.lines.push_front(line);
    }

    fn pop(&mut self) -> Option<T> {
        let mut line = self.lines.pop_front()?;
        let item = line.items.pop_front()?;
        if line.items.is_empty() {
            self.spare = line.items;
        } else {
            self.lines.push_back(line);
        }
        Some(item)
    }
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
        match self.free.pop() {
            Some(index) => {
                self.lanes[index] = Lane::new();
                index
            }
            None => {
                self.lanes.push(Lane::new());
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
        if lane.closed && lane.lines.is_empty() && lane.running == 0 && !lane.listed {
            self.free.push(index);
        }
    }

    fn list(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        if !lane.listed && !lane.lines.is_empty() && lane.running < self.lane_limit {
            lane.listed = true;
            self.turns.push_back(index);
        }
    }

    /// Adds an item at the end of its producer's line.
    pub(crate) fn push(&mut self, index: usize, producer: ProducerId, item: T) {
        self.lanes[index].push(producer, item);
        self.queued += 1;
        self.list(index);
    }

    /// Puts an item that was running back to the front of its lane.
    pub(crate) fn push_back_running(&mut self, index: usize, producer: ProducerId, item: T) {
        let lane = &mut self.lanes[index];
        lane.running -= 1;
        lane.push_front(producer, item);
        self.queued += 1;
        self.list(index);
    }

    /// The item whose turn it is; it counts as running until [`Self::done`].
    pub(crate) fn pop(&mut self) -> Option<(usize, T)> {
        let index = self.turns.pop_front()?;
        let lane = &mut self.lanes[index];
        lane.listed = false;
        let item = lane.pop()?;
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

    const JOB: ProducerId = ProducerId::new(1);
    const GUEST: ProducerId = ProducerId::new(2);

    #[test]
    fn lanes_take_turns_however_full_one_of_them_is() {
        let mut queue = FairQueue::new(100);
        let (busy, quiet) = (queue.open_lane(), queue.open_lane());
        for item in 0..50 {
            queue.push(busy, JOB, item);
        }
        queue.push(quiet, JOB, 1000);
        queue.push(quiet, JOB, 1001);
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
            queue.push(lane, JOB, item);
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
        queue.push(lane, JOB, 'a');
        queue.push(lane, JOB, 'b');
        let (_, item) = queue.pop().unwrap();
        queue.push_back_running(lane, JOB, item);
        assert_eq!(queue.pop(), Some((lane, 'a')));
    }

    #[test]
    fn a_closed_lane_is_used_again_after_its_last_item_ended() {
        let mut queue = FairQueue::new(1);
        let first = queue.open_lane();
        queue.push(first, JOB, ());
        queue.close_lane(first);
        assert_ne!(queue.open_lane(), first);
        assert!(queue.pop().is_some());
        queue.done(first);
        assert_eq!(queue.open_lane(), first);
    }

    #[test]
    fn a_producer_with_a_full_queue_delays_another_one_on_the_same_node_by_one_item() {
        let mut queue = FairQueue::new(1000);
        let lane = queue.open_lane();
        for item in 0..256 {
            queue.push(lane, JOB, item);
        }
        queue.push(lane, GUEST, 1000);
        queue.push(lane, GUEST, 1001);
        let order: Vec<_> = (0..6)
            .filter_map(|_| queue.pop().map(|(_, item)| item))
            .collect();
        assert_eq!(order, [0, 1000, 1, 1001, 2, 3]);
        assert_eq!(queue.queued(), 252);
    }

    #[test]
    fn a_second_producer_gives_its_node_no_second_turn_among_the_nodes() {
        let mut queue = FairQueue::new(1000);
        let (shared, other) = (queue.open_lane(), queue.open_lane());
        for item in 0..4 {
            queue.push(shared, JOB, item);
            queue.push(shared, GUEST, 10 + item);
            queue.push(other, JOB, 100 + item);
        }
        let order: Vec<_> = (0..6)
            .filter_map(|_| queue.pop().map(|(_, item)| item))
            .collect();
        assert_eq!(order, [0, 100, 10, 101, 1, 102]);
    }

    #[test]
    fn an_item_that_comes_back_goes_before_the_other_producers() {
        let mut queue = FairQueue::new(1);
        let lane = queue.open_lane();
        queue.push(lane, JOB, 'a');
        queue.push(lane, JOB, 'b');
        queue.push(lane, GUEST, 'c');
        let (_, item) = queue.pop().unwrap();
        queue.push_back_running(lane, JOB, item);
        let mut order = String::new();
        while let Some((lane, item)) = queue.pop() {
            order.push(item);
            queue.done(lane);
        }
        assert_eq!(order, "acb");
    }
}
