//! A table of numbers in memory: the map or the ledger. It remembers which of its blocks the file doesn't have yet, and
//! never does I/O itself.

use std::collections::BTreeSet;

use crate::layout::ENTRY_BYTES;

/// Bytes of the file that are written at once. The entries in it are independent of each other, so it doesn't matter if a
/// power cut tears it.
const BLOCK_BYTES: u64 = 4096;
const BLOCK_ENTRIES: u64 = BLOCK_BYTES / ENTRY_BYTES;

/// A block to be written.
#[derive(Debug)]
pub struct Block {
    number: u64,
    /// Where it goes in the file.
    pub offset: u64,
    /// What goes there: a copy, because the table may change while it is being written.
    pub bytes: Vec<u8>,
}

/// A table.
#[derive(Debug)]
pub struct Table {
    /// Where it begins in the file.
    at: u64,
    entries: Vec<u64>,
    dirty: BTreeSet<u64>,
}

impl Table {
    /// The table that begins at `at` in the file and has these bytes there.
    pub fn from_bytes(at: u64, bytes: &[u8]) -> Self {
        let entries = bytes.chunks_exact(ENTRY_BYTES as usize).map(|raw| {
            let mut number = [0; ENTRY_BYTES as usize];
            number.copy_from_slice(raw);
            u64::from_le_bytes(number)
        });
        Self {
            at,
            entries: entries.collect(),
            dirty: BTreeSet::new(),
        }
    }

    /// The entries, in order.
    pub fn entries(&self) -> &[u64] {
        &self.entries
    }

    /// An entry; 0 for one that isn't there.
    pub fn get(&self, index: u64) -> u64 {
        self.entries.get(index as usize).copied().unwrap_or(0)
    }

    /// Changes an entry in memory.
    pub fn set(&mut self, index: u64, value: u64) {
        if let Some(entry) = self.entries.get_mut(index as usize)
            && *entry != value
        {
            *entry = value;
            self.dirty.insert(index / BLOCK_ENTRIES);
        }
    }

    /// Whether there is something that the file doesn't have.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Copies of the dirty blocks, which count as clean from now on: a change from now on makes its block dirty again.
    pub fn take_dirty(&mut self) -> Vec<Block> {
        let dirty = std::mem::take(&mut self.dirty);
        let copy = |number: u64| {
            let first = (number * BLOCK_ENTRIES) as usize;
            let last = (first + BLOCK_ENTRIES as usize).min(self.entries.len());
            let entries = &self.entries[first..last];
            let mut bytes: Vec<u8> = entries
                .iter()
                .flat_map(|entry| entry.to_le_bytes())
                .collect();
            bytes.resize(BLOCK_BYTES as usize, 0);
            Block {
                number,
                offset: self.at + number * BLOCK_BYTES,
                bytes,
            }
        };
        dirty.into_iter().map(copy).collect()
    }

    /// These could not be written.
    pub fn give_back(&mut self, blocks: &[Block]) {
        self.dirty.extend(blocks.iter().map(|block| block.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_changes_while_it_is_written_is_dirty_again() {
        let mut table = Table::from_bytes(8192, &[0; 8 * 1000]);
        table.set(600, 7);
        let blocks = table.take_dirty();
        assert_eq!((blocks.len(), blocks[0].offset), (1, 8192 + 4096));
        assert_eq!(blocks[0].bytes.len(), 4096);
        assert!(!table.is_dirty());
        table.set(600, 8);
        assert_eq!(blocks[0].bytes[88 * 8], 7);
        assert!(table.is_dirty());
    }

    #[test]
    fn what_could_not_be_written_stays_dirty() {
        let mut table = Table::from_bytes(0, &[0; 64]);
        table.set(1, 1);
        let blocks = table.take_dirty();
        table.give_back(&blocks);
        assert!(table.is_dirty());
    }
}
