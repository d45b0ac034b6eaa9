//! A range of a file of which it is known that it holds data. Who asks about a fragmented image asks for the same long extent of its file
//! thousands of times; a call of the kernel for each would cost more than all the rest.
//!
//! Only data is remembered: it is always safe to say, as reading gives the right bytes, whoever else may have made a hole there. Holes that we
//! make ourselves are seen at once, for whatever may make one calls [`KnownData::forgotten_at_the_end`].

use std::ops::Range;

use parking_lot::Mutex;

/// The range that was last found.
#[derive(Debug, Default)]
pub(crate) struct KnownData(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    range: Range<u64>,
    /// How often it was forgotten.
    times: u64,
}

/// When a look at the file began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look(u64);

/// Forgets what is known when it goes.
#[must_use]
pub(crate) struct Forget<'a>(&'a KnownData);

impl KnownData {
    /// Where the data at `offset` ends, if there is known to be any.
    pub(crate) fn end(&self, offset: u64) -> Option<u64> {
        let state = self.0.lock();
        state.range.contains(&offset).then_some(state.range.end)
    }

    /// To be called before the file is looked at.
    pub(crate) fn look(&self) -> Look {
        Look(self.0.lock().times)
    }

    /// That look found data here. Not remembered if a hole may have been made since it began.
    pub(crate) fn learn(&self, look: Look, range: Range<u64>) {
        let mut state = self.0.lock();
        if look == Look(state.times) {
            state.range = range;
        }
    }

    /// For who may make a hole: forgets everything when that has been done.
    pub(crate) fn forgotten_at_the_end(&self) -> Forget<'_> {
        Forget(self)
    }
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let mut state = self.0.0.lock();
        state.range = 0..0;
        state.times += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_while_a_hole_was_made_is_not_remembered() {
        let known = KnownData::default();
        assert_eq!(known.end(0), None);
        let look = known.look();
        known.learn(look, 10..20);
        assert_eq!(
            [9, 10, 19, 20].map(|at| known.end(at)),
            [None, Some(20), Some(20), None]
        );
        let early = known.look();
        let hole = known.forgotten_at_the_end();
        let during = known.look();
        assert_eq!(known.end(10), Some(20));
        drop(hole);
        assert_eq!(known.end(10), None);
        for look in [early, during] {
            known.learn(look, 10..20);
            assert_eq!(known.end(10), None);
        }
        known.learn(known.look(), 30..40);
        assert_eq!(known.end(30), Some(40));
    }
}
