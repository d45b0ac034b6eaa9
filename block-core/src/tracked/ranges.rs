//! An index of half-open ranges that answers "which of them overlap this one?".
//!
//! It never decides who waits for whom, and it takes no locks: its owner does both.
//!
//! # How it is built, and what it costs
//!
//! Almost every range that is inserted is removed again without anybody having searched in between
//! (plain requests, no serialising one in sight). So an insertion only appends to an unsorted list of
//! *recent* ranges, and a removal takes it out again: a few nanoseconds each, whatever is in flight.
//!
//! A search pays for the order that it needs. It first moves some recent ranges (at least
//! [`MOVE_AT_LEAST`], at least 1 in [`MOVE_ONE_IN`]) into sorted trees, then looks through the trees and
//! scans what is left. A range moves once in its life, which costs a logarithm, and brings with it
//! at most `MOVE_ONE_IN` steps of scanning: so a search is **logarithmic in what is in flight,
//! amortised over the insertions**, and one search never has a long list to sort. While there are at
//! most [`SCAN_AT_MOST`] ranges nothing is moved at all, a scan is faster.
//!
//! There is one tree for each power of two of length: class `c` holds lengths in `2^c .. 2^(c+1)`,
//! ordered by start. What overlaps `[s, e)` starts in `(s - 2^(c+1), e)`, so one range scan per
//! non-empty class finds it. The scan's near misses (they end at or before `s`) start before
//! `s - 2^c + 1` and are at least `2^c` long, so all of them contain the byte `s - 2^c`: a search visits, per
//! non-empty class, no more useless entries than there are requests on top of one another at one byte.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::TrackedRange;

/// Up to here a search scans and sorts nothing.
const SCAN_AT_MOST: usize = 32;
/// A search that finds more recent ranges than that moves at least so many into the trees, …
const MOVE_AT_LEAST: usize = 64;
/// … and at least one in so many.
const MOVE_ONE_IN: usize = 64;

/// In `place`: the range is in its class's tree.
const IN_TREE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Recent {
    range: TrackedRange,
    key: u32,
}

/// Ranges under small integer keys. Empty ranges may be inserted; nothing ever overlaps them.
#[derive(Debug, Default)]
pub(super) struct RangeIndex {
    recent: Vec<Recent>,
    /// By key: its position in `recent`, or [`IN_TREE`].
    place: Vec<u32>,
    /// Bit `c` is set when `classes[c]` holds anything.
    non_empty: u64,
    /// By class: `(start, key)` to `end`.
    classes: Vec<BTreeMap<(u64, u32), u64>>,
}

fn class_of(range: TrackedRange) -> u32 {
    (range.end - range.start).ilog2()
}

impl RangeIndex {
    pub(super) fn is_empty(&self) -> bool {
        self.recent.is_empty() && self.non_empty == 0
    }

    /// Adds `range` under `key`, which must not be in use.
    #[inline]
    pub(super) fn insert(&mut self, key: u32, range: TrackedRange) {
        if range.is_empty() {
            return;
        }
        let slot = key as usize;
        if slot >= self.place.len() {
            self.place.resize(slot + 1, 0);
        }
        self.place[slot] = self.recent.len() as u32;
        self.recent.push(Recent { range, key });
    }

    /// Takes out what was inserted as (`key`, `range`).
    #[inline]
    pub(super) fn remove(&mut self, key: u32, range: TrackedRange) {
        if range.is_empty() {
            return;
        }
        let place = self.place[key as usize];
        if place == IN_TREE {
            let class = class_of(range);
            let tree = &mut self.classes[class as usize];
            let found = tree.remove(&(range.start, key));
            debug_assert_eq!(found, Some(range.end), "removed under another range");
            if tree.is_empty() {
                self.non_empty &= !(1 << class);
            }
        } else {
            let removed = self.recent.swap_remove(place as usize);
            debug_assert!(
                removed.key == key && removed.range == range,
                "removed under another key"
            );
            if let Some(moved) = self.recent.get(place as usize) {
                self.place[moved.key as usize] = place;
            }
        }
    }

    /// Calls `visit` with the key of every range that overlaps `range`, in no order, until it breaks.
    #[inline]
    pub(super) fn search<B>(
        &mut self,
        range: TrackedRange,
        visit: impl FnMut(u32) -> ControlFlow<B>,
    ) -> Option<B> {
        if range.is_empty() || self.is_empty() {
            return None;
        }
        self.search_some(range, visit)
    }

    fn search_some<B>(
        &mut self,
        range: TrackedRange,
        mut visit: impl FnMut(u32) -> ControlFlow<B>,
    ) -> Option<B> {
        if self.recent.len() > SCAN_AT_MOST {
            self.sort_some();
        }
        for recent in &self.recent {
            if recent.range.overlaps(range)
                && let ControlFlow::Break(found) = visit(recent.key)
            {
                return Some(found);
            }
        }
        let mut left = self.non_empty;
        while left != 0 {
            let class = left.trailing_zeros();
            left &= left - 1;
            // Lengths in this class are below 2^(class + 1), which saturates for the last one.
            let longest = u64::MAX >> (63 - class);
            let first = (range.start.saturating_sub(longest), 0);
            for (&(_, key), &end) in self.classes[class as usize].range(first..(range.end, 0)) {
                if end > range.start
                    && let ControlFlow::Break(found) = visit(key)
                {
                    return Some(found);
                }
            }
        }
        None
    }

    pub(super) fn overlaps(&mut self, range: TrackedRange) -> bool {
        self.search(range, |_| ControlFlow::Break(())).is_some()
    }

    #[cold]
    fn sort_some(&mut self) {
        let count = MOVE_AT_LEAST
            .max(self.recent.len() / MOVE_ONE_IN)
            .min(self.recent.len());
        for Recent { range, key } in self.recent.drain(self.recent.len() - count..) {
            let class = class_of(range);
            if class as usize >= self.classes.len() {
                self.classes.resize_with(class as usize + 1, BTreeMap::new);
            }
            self.classes[class as usize].insert((range.start, key), range.end);
            self.non_empty |= 1 << class;
            self.place[key as usize] = IN_TREE;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn found(index: &mut RangeIndex, range: TrackedRange) -> Vec<u32> {
        let mut keys = Vec::new();
        index.search::<()>(range, |key| {
            keys.push(key);
            ControlFlow::Continue(())
        });
        keys.sort_unstable();
        keys
    }

    fn any_range() -> impl Strategy<Value = TrackedRange> {
        prop_oneof![
            4 => (0u64..200, 0u64..40).prop_map(|(s, l)| TrackedRange::new(s, s + l)),
            1 => (0u64..200).prop_map(|s| TrackedRange::new(s, u64::MAX)),
            1 => (0u64..200, 0u32..60)
                .prop_map(|(s, c)| TrackedRange::new(s << 3, (s << 3) + (1 << c) + s)),
            1 => Just(TrackedRange::new(u64::MAX - 1, u64::MAX)),
            1 => Just(TrackedRange::EVERYTHING),
        ]
    }

    proptest! {
        #[test]
        fn a_search_finds_exactly_what_overlaps(
            ops in proptest::collection::vec((any_range(), 0u8..8), 1..400)
        ) {
            let mut index = RangeIndex::default();
            let mut naive: Vec<Option<TrackedRange>> = Vec::new();
            for (n, (range, op)) in ops.into_iter().enumerate() {
                match op {
                    0..=4 => {
                        let key = naive.iter().position(Option::is_none).unwrap_or(naive.len());
                        if key == naive.len() {
                            naive.push(None);
                        }
                        naive[key] = Some(range);
                        index.insert(key as u32, range);
                    }
                    5 | 6 if !naive.is_empty() => {
                        let key = n * 7 % naive.len();
                        if let Some(old) = naive[key].take() {
                            index.remove(key as u32, old);
                        }
                    }
                    _ => {
                        let expected: Vec<u32> = (0..naive.len() as u32)
                            .filter(|&key| naive[key as usize].is_some_and(|r| r.overlaps(range)))
                            .collect();
                        prop_assert_eq!(index.overlaps(range), !expected.is_empty());
                        prop_assert_eq!(found(&mut index, range), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn a_search_among_many_sorts_them_and_still_finds_the_one() {
        let mut index = RangeIndex::default();
        for key in 0..10_000u32 {
            index.insert(key, TrackedRange::from_len(u64::from(key) * 8192, 4096));
        }
        for _ in 0..2_000 {
            let got = found(
                &mut index,
                TrackedRange::new(5000 * 8192 + 4095, 5001 * 8192),
            );
            assert_eq!(got, [5000]);
        }
        assert!(
            index.recent.len() <= SCAN_AT_MOST,
            "searches ought to have sorted the ranges"
        );
        for key in 0..10_000u32 {
            index.remove(key, TrackedRange::from_len(u64::from(key) * 8192, 4096));
        }
        assert!(index.is_empty());
    }
}
