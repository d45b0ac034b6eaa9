//! Dirty bitmaps: which granules of a node were written (digest of block semantics, section 10). In memory only;
//! storing them is a format's business.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::error::{Error, Result};

/// One bit per granule; set by the request path after every write, zero write and discard, whether it succeeded or not.
pub struct DirtyBitmap {
    granularity_bits: u32,
    enabled: AtomicBool,
    state: RwLock<State>,
    dirty: AtomicU64,
}

struct State {
    length: u64,
    words: Vec<AtomicU64>,
}

impl DirtyBitmap {
    /// A clear, enabled bitmap for a node of `length` bytes. `granularity` (bytes) is a power of two, at least 512.
    ///
    /// # Errors
    /// EINVAL for another granularity.
    pub fn new(length: u64, granularity: u64) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < 512 {
            return Err(
                Error::invalid("Granularity must be power of 2 and at least 512").with_field(
                    "granularity",
                    granularity,
                    "a power of two, at least 512",
                ),
            );
        }
        let granularity_bits = granularity.trailing_zeros();
        Ok(Self {
            granularity_bits,
            enabled: AtomicBool::new(true),
            state: RwLock::new(State {
                length,
                words: words(length, granularity_bits),
            }),
            dirty: AtomicU64::new(0),
        })
    }

    /// Bytes per bit.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Length of what it covers, in bytes.
    pub fn length(&self) -> u64 {
        self.state.read().length
    }

    /// The number of granules that are dirty.
    pub fn dirty_granules(&self) -> u64 {
        self.dirty.load(Ordering::SeqCst)
    }

    /// Dirty granules in bytes, at most the length.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_granules()
            .saturating_mul(self.granularity())
            .min(self.length())
    }

    /// Switches recording on or off.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::SeqCst);
    }

    /// Whether writes are recorded.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// What the request path calls: sets the granules that `[offset, offset + len)` touches, if recording is on.
    pub fn mark(&self, offset: u64, len: u64) {
        if self.is_enabled() {
            self.set(offset, len);
        }
    }

    /// Sets the granules that `[offset, offset + len)` touches.
    pub fn set(&self, offset: u64, len: u64) {
        self.change(offset, len, true);
    }

    /// Clears the granules that lie wholly inside `[offset, offset + len)`; the last, short granule of the node
    /// counts as whole when the range reaches the end.
    pub fn clear(&self, offset: u64, len: u64) {
        let length = self.length();
        let Some(start) = offset.checked_next_multiple_of(self.granularity()) else {
            return;
        };
        let end = offset.saturating_add(len);
        let end = if end >= length {
            length
        } else {
            end & !(self.granularity() - 1)
        };
        if end > start {
            self.change(start, end - start, false);
        }
    }

    fn change(&self, offset: u64, len: u64, on: bool) {
        let state = self.state.read();
        let end = offset.saturating_add(len).min(state.length);
        if offset >= end {
            return;
        }
        let first = offset >> self.granularity_bits;
        let last = (end - 1) >> self.granularity_bits;
        let mut at = first;
        while at <= last {
            let word = (at / 64) as usize;
            let low = at % 64;
            let high = (last - (at - low)).min(63);
            let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
            if on {
                let old = state.words[word].fetch_or(mask, Ordering::SeqCst);
                self.dirty
                    .fetch_add(u64::from((mask & !old).count_ones()), Ordering::SeqCst);
            } else {
                let old = state.words[word].fetch_and(!mask, Ordering::SeqCst);
                self.dirty
                    .fetch_sub(u64::from((mask & old).count_ones()), Ordering::SeqCst);
            }
            at = (at - low) + 64;
        }
    }

    /// Whether the granule that holds `offset` is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        let state = self.state.read();
        let bit = offset >> self.granularity_bits;
        state
            .words
            .get((bit / 64) as usize)
            .is_some_and(|word| word.load(Ordering::SeqCst) >> (bit % 64) & 1 == 1)
    }

    /// The first dirty run at or after `offset`: its offset and length in bytes, at most `max` bytes, cut at the
    /// node's end.
    pub fn next_dirty(&self, offset: u64, max: u64) -> Option<(u64, u64)> {
        let state = self.state.read();
        let bits = state.length.div_ceil(self.granularity());
        let find = |from: u64, want: bool| -> Option<u64> {
            let mut at = from;
            while at < bits {
                let mut word = state.words[(at / 64) as usize].load(Ordering::SeqCst);
                if !want {
                    word = !word;
                }
                let rest = word >> (at % 64);
                if rest != 0 {
                    let found = at + u64::from(rest.trailing_zeros());
                    return (found < bits).then_some(found);
                }
                at = (at / 64 + 1) * 64;
            }
            None
        };
        let first = find(offset >> self.granularity_bits, true)?;
        let end = find(first, false).unwrap_or(bits);
        let start = first << self.granularity_bits;
        let cap = max.max(self.granularity()) & !(self.granularity() - 1);
        let stop = end
            .saturating_mul(self.granularity())
            .min(start.saturating_add(cap))
            .min(state.length);
        Some((start, stop - start))
    }

    /// Sets every granule.
    pub fn set_all(&self) {
        let length = self.state.read().length;
        self.change(0, length, true);
    }

    /// Clears every granule.
    pub fn clear_all(&self) {
        let length = self.state.read().length;
        self.change(0, length, false);
    }

    /// Adds what is dirty in `other`.
    ///
    /// # Errors
    /// EINVAL when the lengths differ.
    pub fn merge(&self, other: &Self) -> Result<()> {
        if self.state.read().length != other.state.read().length {
            return Err(Error::invalid(
                "Bitmaps are of different sizes and can't be merged",
            ));
        }
        let mut at = 0;
        while let Some((offset, len)) = other.next_dirty(at, u64::MAX) {
            self.set(offset, len);
            at = offset + len;
        }
        Ok(())
    }

    /// Follows a resize of the node; what is new is clean.
    pub fn resize(&self, length: u64) {
        self.set_length(&mut self.state.write(), length);
    }

    /// Follows a node that was written past its end, if it is longer than what the bitmap covers: never shortens.
    pub fn grow(&self, length: u64) {
        let mut state = self.state.write();
        if length > state.length {
            self.set_length(&mut state, length);
        }
    }

    /// Nobody else changes bits meanwhile: that takes the lock for reading.
    fn set_length(&self, state: &mut State, length: u64) {
        let mut new = words(length, self.granularity_bits);
        for (to, from) in new.iter_mut().zip(&state.words) {
            *to.get_mut() = from.load(Ordering::SeqCst);
        }
        let rest = length.div_ceil(self.granularity()) % 64;
        if rest != 0
            && let Some(last) = new.last_mut()
        {
            *last.get_mut() &= u64::MAX >> (64 - rest);
        }
        let dirty = new
            .iter_mut()
            .map(|word| u64::from(word.get_mut().count_ones()))
            .sum();
        self.dirty.store(dirty, Ordering::SeqCst);
        state.words = new;
        state.length = length;
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "DirtyBitmap of {} bytes, {} dirty",
            self.granularity(),
            self.dirty_granules()
        )
    }
}

fn words(length: u64, granularity_bits: u32) -> Vec<AtomicU64> {
    let bits = length.div_ceil(1 << granularity_bits);
    (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_rounded_out_and_clears_are_rounded_in() {
        let bitmap = DirtyBitmap::new(1 << 20, 4096).unwrap();
        bitmap.mark(4095, 2);
        assert_eq!(bitmap.dirty_granules(), 2);
        bitmap.clear(1, 8000);
        assert_eq!(bitmap.dirty_granules(), 2);
        bitmap.clear(0, 4096);
        assert_eq!(bitmap.next_dirty(0, u64::MAX), Some((4096, 4096)));
    }

    #[test]
    fn runs_cross_words_and_stop_at_the_end() {
        let bitmap = DirtyBitmap::new(512 * 200 + 10, 512).unwrap();
        bitmap.set(512 * 60, 512 * 200);
        assert_eq!(
            bitmap.next_dirty(0, u64::MAX),
            Some((512 * 60, 512 * 140 + 10))
        );
        assert_eq!(bitmap.next_dirty(512 * 70, 1024), Some((512 * 70, 1024)));
        bitmap.clear(512 * 60, u64::MAX);
        assert_eq!(bitmap.dirty_granules(), 0);
        assert_eq!(bitmap.next_dirty(0, u64::MAX), None);
    }

    #[test]
    fn a_resize_keeps_what_is_dirty_and_adds_clean_space() {
        let bitmap = DirtyBitmap::new(1 << 16, 512).unwrap();
        bitmap.set_all();
        bitmap.resize(1 << 15);
        assert_eq!(bitmap.dirty_granules(), 64);
        bitmap.resize(1 << 17);
        assert_eq!(bitmap.dirty_granules(), 64);
        assert!(!bitmap.is_dirty(1 << 15));
    }

    #[test]
    fn a_shrink_into_a_granule_keeps_that_granule_and_counts_right() {
        let bitmap = DirtyBitmap::new(512 * 100, 512).unwrap();
        bitmap.set_all();
        bitmap.resize(512 * 70 + 1);
        assert_eq!(bitmap.dirty_granules(), 71);
        bitmap.resize(512 * 100);
        assert_eq!(bitmap.next_dirty(0, u64::MAX), Some((0, 512 * 71)));
    }

    #[test]
    fn growing_never_shortens() {
        let bitmap = DirtyBitmap::new(4096, 512).unwrap();
        bitmap.grow(1024);
        assert_eq!(bitmap.length(), 4096);
        bitmap.grow(8192);
        bitmap.mark(8191, 1);
        assert!(bitmap.is_dirty(8191));
        assert_eq!(bitmap.dirty_granules(), 1);
    }

    #[test]
    fn offsets_at_the_end_of_the_number_space_are_no_trouble() {
        let bitmap = DirtyBitmap::new(4096, 512).unwrap();
        bitmap.set_all();
        bitmap.clear(u64::MAX, 1);
        bitmap.clear(u64::MAX - 1, u64::MAX);
        bitmap.set(u64::MAX, u64::MAX);
        assert_eq!(bitmap.dirty_granules(), 8);
    }

    #[test]
    fn a_disabled_bitmap_records_nothing() {
        let bitmap = DirtyBitmap::new(1 << 16, 512).unwrap();
        bitmap.set_enabled(false);
        bitmap.mark(0, 512);
        assert_eq!(bitmap.dirty_granules(), 0);
    }
}
