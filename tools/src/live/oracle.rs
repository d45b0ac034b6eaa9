//! What every sector of a disk must hold: the oracle of `blk live`.
//!
//! The guest orders its own requests, as guests do: it claims a range before it touches it and never has two requests
//! in flight that overlap. So the content of every sector is known at every moment, whatever jobs do beside the guest.
//! Nothing here does I/O.

use parking_lot::Mutex;

/// Bytes per sector, the unit of everything here.
pub const SECTOR: u64 = 512;

/// Whose content a sector has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// That of the base image.
    Base,
    /// Zeroes.
    Zero,
    /// What the guest's write with this number put there.
    Written(u32),
}

const BASE: u32 = 0;
const ZERO: u32 = 1;
const FIRST: u32 = 2;

impl Content {
    fn decode(version: u32) -> Self {
        match version {
            BASE => Self::Base,
            ZERO => Self::Zero,
            other => Self::Written(other),
        }
    }
}

/// A frozen copy of the oracle: what a point-in-time copy must hold.
#[derive(Clone)]
pub struct Frozen {
    versions: Vec<u32>,
}

impl Frozen {
    /// The content of a sector.
    pub fn content(&self, sector: u64) -> Content {
        self.versions
            .get(sector as usize)
            .map_or(Content::Zero, |v| Content::decode(*v))
    }

    /// The sectors, in number.
    pub fn sectors(&self) -> u64 {
        self.versions.len() as u64
    }
}

struct State {
    versions: Vec<u32>,
    busy: Vec<(u64, u64)>,
    next: u32,
}

/// The oracle of one disk.
pub struct Oracle {
    seed: u64,
    state: Mutex<State>,
}

/// A range that nobody else of the guest touches, in sectors. Dropping it lets it go.
pub struct Claim<'a> {
    oracle: &'a Oracle,
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub count: u64,
}

impl Oracle {
    /// A disk of `length` bytes that holds what its base image holds.
    pub fn new(length: u64, seed: u64) -> Self {
        let sectors = length.div_ceil(SECTOR) as usize;
        let state = State {
            versions: vec![BASE; sectors],
            busy: Vec::new(),
            next: FIRST,
        };
        Self {
            seed,
            state: Mutex::new(state),
        }
    }

    /// The seed of the patterns.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Claims a range, unless some request of the guest is in it.
    pub fn claim(&self, start: u64, count: u64) -> Option<Claim<'_>> {
        let mut state = self.state.lock();
        let end = start + count;
        if end > state.versions.len() as u64
            || state
                .busy
                .iter()
                .any(|(from, to)| start < *to && *from < end)
        {
            return None;
        }
        state.busy.push((start, end));
        Some(Claim {
            oracle: self,
            start,
            count,
        })
    }

    /// A copy of what is known now. The guest must be paused.
    pub fn freeze(&self) -> Frozen {
        Frozen {
            versions: self.state.lock().versions.clone(),
        }
    }

    /// A number for a new write.
    pub fn next_write(&self) -> u32 {
        let mut state = self.state.lock();
        let number = state.next;
        state.next = state.next.checked_add(1).unwrap_or(FIRST);
        number
    }
}

impl Claim<'_> {
    /// What the sectors hold.
    pub fn contents(&self) -> Vec<Content> {
        let state = self.oracle.state.lock();
        let range = self.start as usize..(self.start + self.count) as usize;
        state.versions[range]
            .iter()
            .map(|version| Content::decode(*version))
            .collect()
    }

    /// The sectors hold this now.
    pub fn set(&self, content: Content) {
        let version = match content {
            Content::Base => BASE,
            Content::Zero => ZERO,
            Content::Written(number) => number,
        };
        let range = self.start as usize..(self.start + self.count) as usize;
        self.oracle.state.lock().versions[range].fill(version);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let range = (self.start, self.start + self.count);
        let mut state = self.oracle.state.lock();
        if let Some(at) = state.busy.iter().position(|busy| *busy == range) {
            state.busy.swap_remove(at);
        }
    }
}

/// Fills `sector` (512 bytes) with the pattern that write `number` has at sector `index`: it names both, so that foreign
/// data is recognised for what it is.
pub fn fill(sector: &mut [u8], seed: u64, number: u32, index: u64) {
    let mut word = seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(number) << 32);
    for (at, bytes) in sector.chunks_mut(8).enumerate() {
        let value = match at {
            0 => u64::from_le_bytes(*b"blklive\0"),
            1 => index,
            2 => u64::from(number),
            _ => {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                word
            }
        };
        bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
    }
}

/// Says what a sector seems to hold, for a failure's message.
pub fn describe(sector: &[u8]) -> String {
    if sector.iter().all(|byte| *byte == 0) {
        return "zeroes".into();
    }
    let word = |at: usize| {
        sector
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    };
    if sector.starts_with(b"blklive\0") {
        return format!("write {} of sector {}", word(16), word(8));
    }
    format!(
        "unknown data beginning {:02x?}",
        &sector[..sector.len().min(8)]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_dont_overlap_and_end_when_dropped() {
        let oracle = Oracle::new(1 << 20, 1);
        let claim = oracle.claim(8, 8).unwrap();
        assert!(oracle.claim(15, 1).is_none());
        assert!(oracle.claim(16, 1).is_some());
        drop(claim);
        assert!(oracle.claim(15, 1).is_some());
        assert!(oracle.claim(2047, 2).is_none());
    }

    #[test]
    fn a_frozen_copy_keeps_what_was() {
        let oracle = Oracle::new(1 << 20, 1);
        oracle.claim(0, 4).unwrap().set(Content::Written(7));
        let frozen = oracle.freeze();
        oracle.claim(0, 2).unwrap().set(Content::Zero);
        assert_eq!(frozen.content(0), Content::Written(7));
        assert_eq!(oracle.freeze().content(0), Content::Zero);
        assert_eq!(frozen.content(4), Content::Base);
    }

    #[test]
    fn a_pattern_names_its_write_and_sector() {
        let mut sector = [0; 512];
        fill(&mut sector, 5, 9, 1234);
        assert_eq!(describe(&sector), "write 9 of sector 1234");
        assert_eq!(describe(&[0; 512]), "zeroes");
    }
}
