//! Stamped sectors: every 512 bytes that a test writes say who wrote them, in which request, and where they belong. So
//! data in the wrong place isn't just different, it has a name. No I/O.

use std::fmt;

use block_core::buffer::Buffer;

/// Bytes of a stamped sector.
pub const SECTOR: u64 = 512;

const MAGIC: [u8; 4] = *b"IOTS";
/// Bytes of one stamp; a sector repeats it.
const STAMP: usize = 32;

/// Who wrote a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stamp {
    /// The producer.
    pub owner: u32,
    /// Which of all requests.
    pub seq: u64,
    /// The guest sector that it belongs to.
    pub sector: u64,
}

impl Stamp {
    fn bytes(self) -> [u8; STAMP] {
        let mut bytes = [0; STAMP];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.owner.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seq.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sector.to_le_bytes());
        let mix = (self.seq ^ (self.sector << 20) ^ u64::from(self.owner) << 50)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes[24..].copy_from_slice(&mix.to_le_bytes());
        bytes
    }

    /// What every sector of this owner begins with.
    pub fn needle(owner: u32) -> Vec<u8> {
        let stamp = Self {
            owner,
            seq: 0,
            sector: 0,
        };
        stamp.bytes()[..8].to_vec()
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "data of owner {}, request {}, guest sector {}",
            self.owner, self.seq, self.sector
        )
    }
}

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Seen {
    /// Zeroes.
    Zero,
    /// One whole stamp.
    Stamp(Stamp),
    /// Neither: torn, or not a guest's data at all. With its first 8 bytes.
    Garbage([u8; 8]),
}

impl Seen {
    /// What `sector` holds.
    pub fn of(sector: &[u8]) -> Self {
        if block_core::buffer::is_zero(sector) {
            return Self::Zero;
        }
        let garbage = || {
            let mut first = [0; 8];
            let len = sector.len().min(8);
            first[..len].copy_from_slice(&sector[..len]);
            Self::Garbage(first)
        };
        if sector.len() < STAMP || sector[..4] != MAGIC {
            return garbage();
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&sector[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let mut owner = [0; 4];
        owner.copy_from_slice(&sector[4..8]);
        let stamp = Stamp {
            owner: u32::from_le_bytes(owner),
            seq: number(8),
            sector: number(16),
        };
        let expected = stamp.bytes();
        if sector
            .chunks(STAMP)
            .all(|chunk| *chunk == expected[..chunk.len()])
        {
            Self::Stamp(stamp)
        } else {
            garbage()
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Stamp(stamp) => stamp.fmt(f),
            Self::Garbage(first) => write!(f, "garbage beginning {first:02x?}"),
        }
    }
}

/// A buffer of `len` bytes for guest offset `offset`, stamped.
pub fn stamped(owner: u32, seq: u64, offset: u64, len: u64) -> Buffer {
    let mut buffer = Buffer::new(len as usize);
    for (at, sector) in buffer.chunks_mut(SECTOR as usize).enumerate() {
        let stamp = Stamp {
            owner,
            seq,
            sector: offset / SECTOR + at as u64,
        }
        .bytes();
        for chunk in sector.chunks_mut(STAMP) {
            chunk.copy_from_slice(&stamp[..chunk.len()]);
        }
    }
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamped_sector_names_its_writer_and_a_torn_one_does_not() {
        let mut buffer = stamped(3, 99, 1024, 1024);
        let stamp = Stamp {
            owner: 3,
            seq: 99,
            sector: 3,
        };
        assert_eq!(Seen::of(&buffer[512..]), Seen::Stamp(stamp));
        assert!(buffer[512..].starts_with(&Stamp::needle(3)));
        buffer[1000] ^= 1;
        assert!(matches!(Seen::of(&buffer[512..]), Seen::Garbage(_)));
        assert_eq!(Seen::of(&[0; 512]), Seen::Zero);
    }
}
