//! The bits of one dirty bitmap, and what the request path and jobs do with them. In memory only; it knows neither a name
//! nor where it might be stored.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use super::tree::Tree;
use crate::error::{Error, Result};

/// One bit per granule; set by the request path after every write, zero write and discard, whether it succeeded or not.
///
/// Memory is taken for what is neither all clear nor all set: half a kilobyte for every 4096 granules around it.
pub struct DirtyBitmap {
    granularity_bits: u32,
    enabled: AtomicBool,
    state: RwLock<State>,
    dirty: AtomicU64,
}

struct State {
    length: u64,
    tree: Tree,
}

impl DirtyBitmap {
    /// A clear, enabled bitmap for a node of `length` bytes. `granularity` (bytes) is a power of two, at least 512.
    ///
    /// # Errors
    /// EINVAL for another granularity.
    pub fn new(length: u64, granularity: u64) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < super::MIN_GRANULARITY {
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
                tree: Tree::new(length.div_ceil(granularity)),
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
        let range = |length: u64| {
            let end = offset.saturating_add(len).min(length);
            (offset < end).then(|| {
                (
                    offset >> self.granularity_bits,
                    (end - 1) >> self.granularity_bits,
                )
            })
        };
        {
            let state = self.state.read();
            let Some((first, last)) = range(state.length) else {
                return;
            };
            let (changed, done) = state.tree.change_shared(first, last, on);
            self.count(changed, on);
            if done {
                return;
            }
        }
        let mut state = self.state.write();
        // The length may have changed meanwhile.
        if let Some((first, last)) = range(state.length) {
            let changed = state.tree.change(first, last, on);
            self.count(changed, on);
        }
    }

    /// With the lock held that the bits were changed under.
    fn count(&self, changed: u64, on: bool) {
        if changed == 0 {
            return;
        }
        if on {
            self.dirty.fetch_add(changed, Ordering::SeqCst);
        } else {
            self.dirty.fetch_sub(changed, Ordering::SeqCst);
        }
    }

    /// Whether the granule that holds `offset` is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        let state = self.state.read();
        state.tree.is_set(offset >> self.granularity_bits)
    }

    /// The first dirty run at or after the granule that holds `offset`: its offset and length in bytes, at most `max` bytes, cut at the
    /// node's end. `None` from the end on: the last granule may reach beyond it, and who goes on behind a run that was cut there
    /// mustn't be given it again.
    pub fn next_dirty(&self, offset: u64, max: u64) -> Option<(u64, u64)> {
        let state = self.state.read();
        if offset >= state.length {
            return None;
        }
        let bits = state.tree.bits();
        let first = state.tree.find(offset >> self.granularity_bits, true)?;
        let cap = max.max(self.granularity()) & !(self.granularity() - 1);
        let end = state.tree.find(first, false).unwrap_or(bits);
        let start = first << self.granularity_bits;
        let stop = end
            .saturating_mul(self.granularity())
            .min(start.saturating_add(cap))
            .min(state.length);
        Some((start, stop - start))
    }

    /// Sets every granule.
    pub fn set_all(&self) {
        self.change(0, u64::MAX, true);
    }

    /// Clears every granule.
    pub fn clear_all(&self) {
        self.change(0, u64::MAX, false);
    }

    /// Adds what is dirty in `other`, whose granules may be larger or smaller: a granule becomes dirty when any part of it is
    /// dirty there. Writes that are recorded meanwhile aren't lost in either; whether those that are recorded in `other`
    /// come along is open.
    ///
    /// # Errors
    /// EINVAL when the lengths differ.
    pub fn merge(&self, other: &Self) -> Result<()> {
        let (to, from) = (self.length(), other.length());
        if to != from {
            return Err(Error::invalid(format!(
                "Bitmaps are of different sizes (destination size is {to}, source size is {from}) and can't be merged"
            )));
        }
        if std::ptr::eq(self, other) {
            return Ok(());
        }
        let mut at = 0;
        while let Some((offset, len)) = other.next_dirty(at, u64::MAX) {
            self.set(offset, len);
            at = offset + len;
        }
        Ok(())
    }

    /// Bytes that [`Self::store_bytes`] makes of the whole bitmap: one bit per granule, rounded up.
    pub fn stored_len(&self) -> u64 {
        self.state.read().tree.bits().div_ceil(8)
    }

    /// The first byte at or after `from` of what [`Self::store_bytes`] makes that isn't zero.
    pub fn next_stored(&self, from: u64) -> Option<u64> {
        let state = self.state.read();
        Some(state.tree.find(from.checked_mul(8)?, true)? / 8)
    }

    /// Fills `bytes` with the bitmap's bits from byte `from` on, a multiple of 8: granule `n` is bit `n % 8`, counted from
    /// the least significant, of byte `n / 8`. What is beyond the end is zero.
    pub fn store_bytes(&self, from: u64, bytes: &mut [u8]) {
        let state = self.state.read();
        for (n, chunk) in bytes.chunks_mut(8).enumerate() {
            let word = state.tree.word(from / 8 + n as u64).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// Sets the granules whose bits are set in `bytes`, as [`Self::store_bytes`] has them from byte `from` on, a multiple
    /// of 8. Bits beyond the end are left out.
    pub fn load_bytes(&self, from: u64, bytes: &[u8]) {
        for (n, part) in bytes.chunks(512).enumerate() {
            // Others get their turn in between.
            let mut state = self.state.write();
            for (m, chunk) in part.chunks(8).enumerate() {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                let index = from / 8 + (n * 64 + m) as u64;
                let changed = state.tree.or_word(index, u64::from_le_bytes(word));
                self.count(changed, true);
            }
        }
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
        state.tree.resize(length.div_ceil(self.granularity()));
        state.length = length;
        self.dirty.store(state.tree.count(), Ordering::SeqCst);
    }

    /// About how many bytes of memory the bits take.
    pub fn memory(&self) -> usize {
        self.state.read().tree.leaves() * 520
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

    #[test]
    fn a_huge_disk_costs_what_was_written_to_it() {
        let bitmap = DirtyBitmap::new(1 << 62, 512).unwrap();
        bitmap.set_all();
        assert_eq!(bitmap.dirty_granules(), 1 << 53);
        assert_eq!(bitmap.memory(), 0);
        bitmap.clear((1 << 61) - 512, 1024);
        assert_eq!(bitmap.dirty_granules(), (1 << 53) - 2);
        assert!(bitmap.memory() < 4096);
        assert_eq!(
            bitmap.next_dirty((1 << 61) - 512, u64::MAX),
            Some(((1 << 61) + 512, (1 << 61) - 512))
        );
        bitmap.clear_all();
        assert_eq!((bitmap.dirty_granules(), bitmap.memory()), (0, 0));
        assert_eq!(bitmap.next_dirty(0, u64::MAX), None);
    }

    #[test]
    fn the_tree_does_what_a_plain_list_of_bits_does() {
        let mut seed = 1u64;
        let mut random = move |below: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for bits in [1u64, 63, 64, 65, 4096, 4097, 300_000] {
            let bitmap = DirtyBitmap::new(bits * 512, 512).unwrap();
            let mut plain = vec![false; bits as usize];
            for step in 0..200 {
                let first = random(bits);
                let most = if step % 3 == 0 { bits } else { 200 };
                let last = (first + random(most)).min(bits - 1);
                let on = random(2) == 0;
                let (at, len) = (first * 512, (last - first + 1) * 512);
                if on {
                    bitmap.set(at, len);
                } else {
                    bitmap.clear(at, len);
                }
                plain[first as usize..=last as usize].fill(on);
                if step % 20 != 0 {
                    continue;
                }
                let dirty = plain.iter().filter(|bit| **bit).count() as u64;
                assert_eq!(bitmap.dirty_granules(), dirty);
                let mut bytes = vec![0; bits.div_ceil(8) as usize];
                bitmap.store_bytes(0, &mut bytes);
                for (n, bit) in plain.iter().enumerate() {
                    assert_eq!(bytes[n / 8] >> (n % 8) & 1 == 1, *bit, "bit {n} of {bits}");
                }
                let copy = DirtyBitmap::new(bits * 512, 512).unwrap();
                copy.load_bytes(0, &bytes);
                assert_eq!(copy.dirty_granules(), dirty);
                let from = random(bits);
                let expected = (from..bits).find(|bit| plain[*bit as usize]);
                let found = bitmap.next_dirty(from * 512, 512);
                assert_eq!(found.map(|(at, _)| at / 512), expected);
                let byte = bitmap.next_stored(from / 8);
                let plain_byte = (from / 8 * 8..bits).find(|bit| plain[*bit as usize]);
                assert_eq!(byte, plain_byte.map(|bit| bit / 8));
            }
        }
    }

    #[test]
    fn stored_bits_are_least_significant_first_and_end_with_the_disk() {
        let bitmap = DirtyBitmap::new((20 << 16) - 1, 1 << 16).unwrap();
        bitmap.set(16 << 16, 1);
        let mut bytes = [0xff; 16];
        bitmap.store_bytes(0, &mut bytes);
        assert_eq!(bytes[..4], [0, 0, 1, 0]);
        assert_eq!(bitmap.stored_len(), 3);
        bitmap.load_bytes(0, &[0xff; 64]);
        assert_eq!(bitmap.dirty_granules(), 20);
        bitmap.store_bytes(0, &mut bytes);
        assert_eq!(bytes[..4], [0xff, 0xff, 0x0f, 0]);
    }

    #[test]
    fn bitmaps_of_different_granularity_are_merged_by_rounding_out() {
        let fine = DirtyBitmap::new(1 << 20, 512).unwrap();
        let coarse = DirtyBitmap::new(1 << 20, 65536).unwrap();
        fine.set(65536 + 1000, 1);
        coarse.merge(&fine).unwrap();
        assert_eq!(coarse.next_dirty(0, u64::MAX), Some((65536, 65536)));
        fine.merge(&coarse).unwrap();
        assert_eq!(fine.dirty_granules(), 128);
        let other = DirtyBitmap::new(2 << 20, 512).unwrap();
        assert_eq!(
            fine.merge(&other).unwrap_err().reason(),
            "Bitmaps are of different sizes (destination size is 1048576, source size is 2097152) and can't be merged"
        );
    }

    #[test]
    fn the_last_granule_is_found_once_however_short_it_is() {
        for (length, granularity) in [(1_049_088, 65536), (100 << 20, 16 << 20), (512, 65536)] {
            let bitmap = DirtyBitmap::new(length, granularity).unwrap();
            bitmap.set(length - 1, 1);
            let start = (length - 1) / granularity * granularity;
            let run = bitmap.next_dirty(0, u64::MAX);
            assert_eq!(run, Some((start, length - start)));
            assert_eq!(bitmap.next_dirty(length, u64::MAX), None);
            assert_eq!(bitmap.next_dirty(u64::MAX, u64::MAX), None);
            for other in [512, 4096, granularity, 1 << 31] {
                let merged = DirtyBitmap::new(length, other).unwrap();
                merged.merge(&bitmap).unwrap();
                assert!(merged.is_dirty(length - 1));
            }
        }
    }

    #[test]
    fn nothing_recorded_is_lost_between_clears_and_merges_by_other_threads() {
        let bitmap = DirtyBitmap::new(1 << 26, 512).unwrap();
        let taken = DirtyBitmap::new(1 << 26, 512).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let bitmap = &bitmap;
                scope.spawn(move || {
                    for n in 0..20_000u64 {
                        bitmap.mark((n * 4 + thread) * 512, 512);
                    }
                });
            }
            let (bitmap, taken) = (&bitmap, &taken);
            scope.spawn(move || {
                for _ in 0..200 {
                    // As a backup does it: what is taken over is cleared first, then counted as taken.
                    while let Some((at, len)) = bitmap.next_dirty(0, 1 << 20) {
                        bitmap.clear(at, len);
                        taken.set(at, len);
                    }
                }
            });
        });
        taken.merge(&bitmap).unwrap();
        assert_eq!(taken.next_dirty(0, u64::MAX), Some((0, 80_000 * 512)));
        assert_eq!(taken.dirty_granules(), 80_000);
    }
}
