//! Where new grains go: to the end of the file. Nothing is ever freed in a sparse extent, so that there is nothing to
//! look for, except for places whose write failed and which were never linked.

use block_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use crate::layout::{HostSector, SECTOR};

#[derive(Debug)]
struct State {
    /// The first sector behind everything that was ever given out.
    next: u64,
    /// Unlinked places: first sector and number of grains.
    returned: Vec<(u64, u64)>,
}

/// The unused space of one extent.
#[derive(Debug)]
pub(crate) struct Space {
    grain_sectors: u64,
    state: Mutex<State>,
}

/// Grains that were taken and aren't linked yet. Dropping it gives them back: their I/O has ended by then, because a
/// driver's own code is never cut off in the middle.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    space: &'a Space,
    first: u64,
    count: u64,
}

impl Space {
    /// For a file that ends at byte `file_end`, or whose metadata ends at sector `metadata_end` if that is later.
    pub(crate) fn new(grain_sectors: u32, file_end: u64, metadata_end: u64) -> Self {
        let grain_sectors = u64::from(grain_sectors);
        let end = file_end.div_ceil(SECTOR).max(metadata_end);
        let next = end
            .checked_next_multiple_of(grain_sectors)
            .unwrap_or(u64::MAX);
        Self {
            grain_sectors,
            state: Mutex::new(State {
                next,
                returned: Vec::new(),
            }),
        }
    }

    /// Takes `count` grains in a row.
    ///
    /// # Errors
    /// EFBIG when a sector's number wouldn't fit 32 bits: a sparse extent ends at 2 TiB.
    pub(crate) fn take(&self, count: u64) -> Result<Taken<'_>> {
        let mut state = self.state.lock();
        if let Some(index) = state.returned.iter().position(|place| place.1 >= count) {
            let place = &mut state.returned[index];
            let first = place.0;
            place.0 += count * self.grain_sectors;
            place.1 -= count;
            if place.1 == 0 {
                state.returned.swap_remove(index);
            }
            return Ok(Taken {
                space: self,
                first,
                count,
            });
        }
        let first = state.next;
        let end = count
            .checked_mul(self.grain_sectors)
            .and_then(|sectors| sectors.checked_add(first))
            .filter(|end| *end <= 1 << 32)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::TooBig,
                    "a sparse VMDK extent can't grow beyond 2 TiB",
                )
            })?;
        state.next = end;
        Ok(Taken {
            space: self,
            first,
            count,
        })
    }
}

impl Taken<'_> {
    /// The place of the first one.
    pub(crate) const fn first(&self) -> HostSector {
        // `take` made sure that it fits.
        HostSector(self.first as u32)
    }

    /// They are linked, or may be: they stay taken.
    pub(crate) fn keep(mut self) {
        self.count = 0;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.space
                .state
                .lock()
                .returned
                .push((self.first, self.count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grains_are_aligned_and_follow_one_another() {
        let space = Space::new(128, 65536 + 1, 39);
        let first = space.take(2).unwrap();
        assert_eq!(first.first(), HostSector(256));
        first.keep();
        assert_eq!(space.take(1).unwrap().first(), HostSector(512));
    }

    #[test]
    fn what_was_not_linked_is_taken_again() {
        let space = Space::new(128, 0, 128);
        drop(space.take(4).unwrap());
        let one = space.take(1).unwrap();
        let three = space.take(3).unwrap();
        assert_eq!(
            (one.first(), three.first()),
            (HostSector(128), HostSector(256))
        );
        let next = space.take(1).unwrap();
        assert_eq!(next.first(), HostSector(640));
    }

    #[test]
    fn an_extent_ends_at_2_tib() {
        let space = Space::new(128, (1 << 41) - 65536, 0);
        assert_eq!(space.take(2).unwrap_err().kind(), ErrorKind::TooBig);
        space.take(1).unwrap().keep();
        assert!(space.take(1).is_err());
        assert!(Space::new(128, u64::MAX, 0).take(1).is_err());
    }
}
