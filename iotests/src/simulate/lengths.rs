//! What length a disk may have, given which resizes were asked for, when, and how they ended: the same rules that the oracle has
//! for a sector. A resize that failed, or that was dropped or cut off, may have happened or not: the disk has the old
//! length or the new one, and never anything else, until a later resize succeeds.
//!
//! It never looks at an image; it answers what may be found there.

use parking_lot::Mutex;

struct Entry {
    id: u64,
    length: u64,
    began: u64,
    ended: Option<u64>,
    /// When a resize that began after this one had ended succeeded.
    superseded: Option<u64>,
}

#[derive(Default)]
struct State {
    clock: u64,
    entries: Vec<Entry>,
    /// When the last flush that succeeded began.
    flushed: u64,
}

/// The lengths of one disk.
pub(super) struct Lengths(Mutex<State>);

impl Lengths {
    /// A disk that has this length, durably.
    pub fn new(length: u64) -> Self {
        let first = Entry {
            id: 0,
            length,
            began: 0,
            ended: Some(0),
            superseded: None,
        };
        Self(Mutex::new(State {
            entries: vec![first],
            ..State::default()
        }))
    }

    /// A resize begins; tell [`Self::end`] what this gives.
    pub fn begin(&self, length: u64) -> u64 {
        let mut state = self.0.lock();
        state.clock += 1;
        let (id, began) = (state.clock, state.clock);
        state.entries.push(Entry {
            id,
            length,
            began,
            ended: None,
            superseded: None,
        });
        id
    }

    /// A resize has ended.
    pub fn end(&self, id: u64, succeeded: bool) {
        let mut state = self.0.lock();
        state.clock += 1;
        let now = state.clock;
        let Some(this) = state.entries.iter_mut().find(|entry| entry.id == id) else {
            return;
        };
        this.ended = Some(now);
        let began = this.began;
        if succeeded {
            for entry in &mut state.entries {
                if entry.ended.is_some_and(|end| end < began) {
                    entry.superseded.get_or_insert(now);
                }
            }
        }
    }

    /// From now on; [`Self::since`] gives what the disk may have had in between.
    pub fn read(&self) -> u64 {
        self.flush_begins()
    }

    /// What the disk has, or had since then, ascending.
    pub fn since(&self, began: u64) -> Vec<u64> {
        self.select(|_, entry| entry.superseded.is_none_or(|at| at > began))
    }

    /// A resize was refused: it has touched nothing.
    pub fn refused(&self, id: u64) {
        self.0.lock().entries.retain(|entry| entry.id != id);
    }

    /// Everything is at rest and written: the disk has this length, and no other.
    pub fn settle(&self, length: u64) {
        *self.0.lock() = Self::new(length).0.into_inner();
    }

    /// A flush begins; when it succeeds, tell [`Self::flushed`] what this gives.
    pub fn flush_begins(&self) -> u64 {
        let mut state = self.0.lock();
        state.clock += 1;
        state.clock
    }

    /// The flush that began then has succeeded.
    pub fn flushed(&self, began: u64) {
        let mut state = self.0.lock();
        state.flushed = state.flushed.max(began);
    }

    /// The shortest that the disk ever was, or may have been.
    pub fn shortest(&self) -> u64 {
        let state = self.0.lock();
        let lengths = state.entries.iter().map(|entry| entry.length);
        lengths.min().unwrap_or(0)
    }

    fn select(&self, may_be: impl Fn(&State, &Entry) -> bool) -> Vec<u64> {
        let state = self.0.lock();
        let entries = state.entries.iter();
        let mut lengths: Vec<u64> = entries
            .filter(|entry| may_be(&state, entry))
            .map(|entry| entry.length)
            .collect();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// What the disk may have when nothing is in flight, ascending.
    pub fn now(&self) -> Vec<u64> {
        self.select(|_, entry| entry.superseded.is_none())
    }

    /// What it may have after a cut of the power now, ascending: what was flushed, or anything that was asked for since.
    pub fn after_cut(&self) -> Vec<u64> {
        self.select(|state, entry| entry.superseded.is_none_or(|at| at >= state.flushed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_resize_leaves_either_length_until_a_later_one_succeeds() {
        let lengths = Lengths::new(10);
        let failed = lengths.begin(20);
        lengths.end(failed, false);
        assert_eq!(lengths.now(), [10, 20]);
        let done = lengths.begin(30);
        assert_eq!(lengths.now(), [10, 20, 30]);
        lengths.end(done, true);
        assert_eq!(lengths.now(), [30]);
        assert_eq!(lengths.shortest(), 10);
    }

    #[test]
    fn a_resize_that_was_refused_allows_nothing_new() {
        let lengths = Lengths::new(10);
        let refused = lengths.begin(20);
        lengths.refused(refused);
        assert_eq!((lengths.now(), lengths.after_cut()), (vec![10], vec![10]));
    }

    #[test]
    fn of_two_resizes_at_the_same_time_either_may_be_the_last() {
        let lengths = Lengths::new(10);
        let (a, b) = (lengths.begin(20), lengths.begin(30));
        lengths.end(b, true);
        lengths.end(a, true);
        assert_eq!(lengths.now(), [20, 30]);
    }

    #[test]
    fn after_a_cut_what_was_flushed_and_all_that_came_later_is_allowed() {
        let lengths = Lengths::new(10);
        let resize = |to| {
            let id = lengths.begin(to);
            lengths.end(id, true);
        };
        resize(20);
        let flush = lengths.flush_begins();
        resize(30);
        assert_eq!(lengths.after_cut(), [10, 20, 30]);
        lengths.flushed(flush);
        assert_eq!(lengths.after_cut(), [20, 30]);
        assert_eq!(lengths.now(), [30]);
    }
}
