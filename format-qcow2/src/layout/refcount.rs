//! Refcounts in a refcount block (digest, section 2): widths of 1 to 64 bits, read and written in a buffer.
//!
//! Nothing here does I/O or knows which cluster a refcount is for; see [`Geometry`] for that arithmetic.

use block_core::error::{Error, Result};

use super::units::Geometry;

/// How refcounts of one width are stored in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refcounts {
    order: u32,
}

impl Refcounts {
    /// For `1 << order` bits.
    ///
    /// # Panics
    /// If `order` exceeds 6; a header with such a value was refused before.
    pub const fn new(order: u32) -> Self {
        assert!(order <= Geometry::MAX_REFCOUNT_ORDER);
        Self { order }
    }

    /// The width in bits.
    pub const fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest value.
    pub const fn max(self) -> u64 {
        if self.order == 6 {
            u64::MAX
        } else {
            (1 << self.bits()) - 1
        }
    }

    /// How many fit into `block_len` bytes.
    pub const fn capacity(self, block_len: usize) -> usize {
        (block_len * 8) >> self.order
    }

    /// The refcount at `index` of `block`.
    ///
    /// # Panics
    /// If `index` lies outside the block.
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        match self.order {
            order @ 0..=2 => {
                let per_byte = 8 >> order;
                let shift = (index % per_byte) << order;
                (u64::from(block[index / per_byte]) >> shift) & self.max()
            }
            3 => block[index].into(),
            4 => u16::from_be_bytes([block[2 * index], block[2 * index + 1]]).into(),
            5 => {
                let mut word = [0; 4];
                word.copy_from_slice(&block[4 * index..4 * index + 4]);
                u32::from_be_bytes(word).into()
            }
            _ => {
                let mut word = [0; 8];
                word.copy_from_slice(&block[8 * index..8 * index + 8]);
                u64::from_be_bytes(word)
            }
        }
    }

    /// Stores a refcount at `index` of `block`.
    ///
    /// # Errors
    /// EINVAL when `value` needs more bits than there are; nothing was changed then.
    ///
    /// # Panics
    /// If `index` lies outside the block.
    pub fn set(self, block: &mut [u8], index: usize, value: u64) -> Result<()> {
        if value > self.max() {
            return Err(Error::invalid(format!(
                "Refcount {value} does not fit into {} bits",
                self.bits()
            ))
            .with_field("refcount", value, format!("0..={}", self.max())));
        }
        match self.order {
            order @ 0..=2 => {
                let per_byte = 8 >> order;
                let shift = (index % per_byte) << order;
                let byte = &mut block[index / per_byte];
                *byte = (*byte & !((self.max() as u8) << shift)) | ((value as u8) << shift);
            }
            3 => block[index] = value as u8,
            4 => block[2 * index..2 * index + 2].copy_from_slice(&(value as u16).to_be_bytes()),
            5 => block[4 * index..4 * index + 4].copy_from_slice(&(value as u32).to_be_bytes()),
            _ => block[8 * index..8 * index + 8].copy_from_slice(&value.to_be_bytes()),
        }
        Ok(())
    }

    /// Adds `by` and gives back the new value.
    ///
    /// # Errors
    /// EINVAL when the result doesn't fit; nothing was changed then.
    pub fn increment(self, block: &mut [u8], index: usize, by: u64) -> Result<u64> {
        let old = self.get(block, index);
        let new = old
            .checked_add(by)
            .filter(|new| *new <= self.max())
            .ok_or_else(|| {
                Error::invalid(format!(
                    "Refcount {old} + {by} does not fit into {} bits",
                    self.bits()
                ))
                .with_field("refcount", old, format!("0..={}", self.max()))
            })?;
        self.set(block, index, new)?;
        Ok(new)
    }

    /// Subtracts `by` and gives back the new value.
    ///
    /// # Errors
    /// EINVAL when the refcount would become negative: a reference is freed that was never counted. Nothing was
    /// changed then.
    pub fn decrement(self, block: &mut [u8], index: usize, by: u64) -> Result<u64> {
        let old = self.get(block, index);
        let new = old.checked_sub(by).ok_or_else(|| {
            Error::invalid(format!("Refcount {old} can't be lowered by {by}")).with_field(
                "refcount",
                old,
                format!("at least {by}"),
            )
        })?;
        self.set(block, index, new)?;
        Ok(new)
    }
}

impl From<Geometry> for Refcounts {
    fn from(geometry: Geometry) -> Self {
        Self::new(geometry.refcount_order())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_block_of_four_clusters_looks_like_the_specification() {
        let block = |order: u32| {
            let refcounts = Refcounts::new(order);
            let mut block = vec![0; 64];
            for index in 0..4 {
                refcounts.set(&mut block, index, 1).unwrap();
            }
            block
        };
        assert_eq!(block(0)[..2], [0x0f, 0]);
        assert_eq!(block(1)[..2], [0x55, 0]);
        assert_eq!(block(2)[..3], [0x11, 0x11, 0]);
        assert_eq!(block(3)[..5], [1, 1, 1, 1, 0]);
        assert_eq!(block(4)[..9], [0, 1, 0, 1, 0, 1, 0, 1, 0]);
        assert_eq!(block(5)[..5], [0, 0, 0, 1, 0]);
        assert_eq!(block(6)[..9], [0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn neighbours_are_not_touched() {
        for order in 0..=6 {
            let refcounts = Refcounts::new(order);
            let mut block = vec![0; 64];
            let count = refcounts.capacity(block.len());
            assert_eq!(count, 512 >> order);
            for index in 0..count {
                refcounts.set(&mut block, index, refcounts.max()).unwrap();
            }
            assert!(block.iter().all(|byte| *byte == 0xff));
            refcounts.set(&mut block, 3, 0).unwrap();
            for index in 0..count {
                let expected = if index == 3 { 0 } else { refcounts.max() };
                assert_eq!(refcounts.get(&block, index), expected);
            }
        }
    }

    #[test]
    fn overflow_and_underflow_change_nothing() {
        for order in 0..=6 {
            let refcounts = Refcounts::new(order);
            let mut block = vec![0; 64];
            refcounts.set(&mut block, 2, refcounts.max()).unwrap();
            let before = block.clone();
            assert_eq!(
                refcounts.increment(&mut block, 2, 1).unwrap_err().errno(),
                22
            );
            assert_eq!(
                refcounts.decrement(&mut block, 1, 1).unwrap_err().errno(),
                22
            );
            if order < 6 {
                assert!(refcounts.set(&mut block, 0, refcounts.max() + 1).is_err());
            }
            assert_eq!(block, before);
            assert_eq!(
                refcounts.decrement(&mut block, 2, 1).unwrap(),
                refcounts.max() - 1
            );
        }
    }
}
