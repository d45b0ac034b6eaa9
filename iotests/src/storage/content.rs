//! The bytes of a simulated disk: sparse, copy-on-write pages. No I/O, no faults, no time.
//!
//! An image may have a second file, which holds its guest data (an external data file). Both are in one content, the second
//! at offsets from [`BESIDE`] on, so that whoever keeps, cuts, damages or restores an image has both at one moment.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// Bytes of a page; holes are tracked at this granularity.
pub const PAGE: u64 = 4096;

/// Where an image's second file begins in its content. No image file is as long as that.
pub const BESIDE: u64 = 1 << 62;

type Page = Arc<[u8; PAGE as usize]>;

/// Sparse content. Cloning shares the pages.
#[derive(Clone, Default)]
pub struct Content {
    len: u64,
    /// Bytes of the second file, if there is one.
    beside: Option<u64>,
    pages: BTreeMap<u64, Page>,
}

/// Splits a range at page boundaries: (page, range within the page, position in the range).
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, Range<usize>, usize)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let page = at / PAGE;
        let from = at % PAGE;
        let to = PAGE.min(from + (end - at));
        let piece = (page, from as usize..to as usize, (at - offset) as usize);
        at += to - from;
        Some(piece)
    })
}

impl Content {
    /// `bytes`, with holes where whole pages are zero.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut content = Self::default();
        content.set_len(bytes.len() as u64);
        for (at, page) in bytes.chunks(PAGE as usize).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                content.write(at as u64 * PAGE, page);
            }
        }
        content
    }

    /// Length of the first file in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of both files that are not in holes.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Bytes of the file at `base` (0 or [`BESIDE`]) that are not in holes.
    pub(super) fn allocated_of(&self, base: u64) -> u64 {
        let first = base / PAGE;
        self.pages.range(first..first + BESIDE / PAGE).count() as u64 * PAGE
    }

    /// The length of the second file, if there is one.
    pub fn beside_len(&self) -> Option<u64> {
        self.beside
    }

    /// The second file alone.
    pub fn beside(&self) -> Option<Self> {
        let pages = self.pages.range(BESIDE / PAGE..);
        Some(Self {
            len: self.beside?,
            beside: None,
            pages: pages
                .map(|(page, bytes)| (page - BESIDE / PAGE, bytes.clone()))
                .collect(),
        })
    }

    /// The same with `other`'s first file as its second.
    #[must_use]
    pub fn with_beside(mut self, other: &Self) -> Self {
        self.pages.split_off(&(BESIDE / PAGE));
        let pages = other.pages.range(..BESIDE / PAGE);
        self.pages
            .extend(pages.map(|(page, bytes)| (page + BESIDE / PAGE, bytes.clone())));
        self.beside = Some(other.len);
        self
    }

    /// The bytes of both files, to compare them with others.
    pub fn all_bytes(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        (
            self.to_bytes(),
            self.beside().map(|beside| beside.to_bytes()),
        )
    }

    /// The file that a change ends in at `end` is at least as long as that.
    fn reaches(&mut self, end: u64) {
        if end > BESIDE {
            self.beside = Some(self.beside.unwrap_or(0).max(end - BESIDE));
        } else {
            self.len = self.len.max(end);
        }
    }

    /// Cuts off, or grows with a hole. From [`BESIDE`] on it is the second file's length, which begins to be with it.
    pub fn set_len(&mut self, len: u64) {
        let (base, old) = if len >= BESIDE {
            (BESIDE, BESIDE + self.beside.unwrap_or(0))
        } else {
            (0, self.len)
        };
        if len < old {
            let mut cut = self.pages.split_off(&len.div_ceil(PAGE));
            if base == 0 {
                let mut beside = cut.split_off(&(BESIDE / PAGE));
                self.pages.append(&mut beside);
            }
            if len % PAGE != 0
                && let Some(page) = self.pages.get_mut(&(len / PAGE))
            {
                Arc::make_mut(page)[(len % PAGE) as usize..].fill(0);
            }
        }
        if base == 0 {
            self.len = len;
        } else {
            self.beside = Some(len - BESIDE);
        }
    }

    /// Fills `out` from `offset`; zeroes beyond the end.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (page, range, at) in pieces(offset, out.len() as u64) {
            let out = &mut out[at..at + range.len()];
            match self.pages.get(&page) {
                Some(page) => out.copy_from_slice(&page[range]),
                None => out.fill(0),
            }
        }
    }

    /// All of the first file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.read(0, &mut bytes);
        bytes
    }

    /// Writes, and grows if need be.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.reaches(offset + data.len() as u64);
        for (page, range, at) in pieces(offset, data.len() as u64) {
            let page = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE as usize]));
            let data = &data[at..at + range.len()];
            Arc::make_mut(page)[range].copy_from_slice(data);
        }
    }

    /// Zeroes a range, grows if need be, and makes a hole of the pages that it covers.
    pub fn punch(&mut self, offset: u64, len: u64) {
        self.reaches(offset + len);
        for (page, range, _) in pieces(offset, len) {
            if range.len() as u64 == PAGE {
                self.pages.remove(&page);
            } else if let Some(page) = self.pages.get_mut(&page) {
                Arc::make_mut(page)[range].fill(0);
            }
        }
    }

    /// Whether there is data at `offset` (a hole otherwise), and for how many of the next `len` bytes that holds.
    pub fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        let first = offset / PAGE;
        let data = self.pages.contains_key(&first);
        let end = offset + len;
        let mut page = first + 1;
        while page * PAGE < end && self.pages.contains_key(&page) == data {
            page += 1;
        }
        (data, (page * PAGE).min(end) - offset)
    }

    /// The offsets of all 512-byte sectors that begin with `needle`.
    pub fn find(&self, needle: &[u8]) -> Vec<u64> {
        let mut found = Vec::new();
        for (number, page) in &self.pages {
            for (at, sector) in page.chunks(512).enumerate() {
                if sector.starts_with(needle) {
                    found.push(number * PAGE + at as u64 * 512);
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back_across_pages_and_punched_pages_are_holes() {
        let mut content = Content::default();
        let data: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8 + 1).collect();
        content.write(3000, &data);
        assert_eq!(content.len(), 13_000);
        let mut back = vec![0; 10_000];
        content.read(3000, &mut back);
        assert_eq!(back, data);
        content.punch(4096, 4096);
        assert_eq!(content.run(4096, 1 << 20), (false, 4096));
        assert_eq!(content.run(0, 4096), (true, 4096));
        content.read(3000, &mut back);
        assert_eq!(back[..1096], data[..1096]);
        assert!(back[1096..5192].iter().all(|byte| *byte == 0));
        assert_eq!(back[5192..], data[5192..]);
    }

    #[test]
    fn what_was_cut_off_reads_as_zeroes_when_the_disk_grows_again() {
        let mut content = Content::from_bytes(&[7; 9000]);
        content.set_len(5000);
        content.set_len(9000);
        let bytes = content.to_bytes();
        assert!(bytes[..5000].iter().all(|byte| *byte == 7));
        assert!(bytes[5000..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn two_files_of_an_image_grow_shrink_and_are_told_apart() {
        let mut content = Content::from_bytes(&[1; 9000]);
        assert!(content.beside().is_none());
        content.set_len(BESIDE);
        assert_eq!(content.beside_len(), Some(0));
        content.write(BESIDE + 5000, &[2; 5000]);
        content.set_len(100);
        assert_eq!(content.len(), 100);
        let beside = content.beside().unwrap();
        assert_eq!((beside.len(), beside.allocated()), (10_000, 2 * PAGE));
        assert_eq!(beside.to_bytes()[5000..], [2; 5000]);
        assert_eq!(content.allocated_of(0), PAGE);
        content.punch(BESIDE + 4096, 8192);
        assert_eq!(content.allocated_of(BESIDE), 0);
        assert_eq!(content.beside_len(), Some(12_288));
        let copy = Content::from_bytes(&[3; 10]).with_beside(&beside);
        assert_eq!(copy.all_bytes(), (vec![3; 10], Some(beside.to_bytes())));
        content.set_len(BESIDE + 1);
        assert_eq!((content.len(), content.beside_len()), (100, Some(1)));
    }

    #[test]
    fn a_clone_doesnt_see_later_writes() {
        let mut content = Content::from_bytes(&[1; 4096]);
        let before = content.clone();
        content.write(0, &[2; 10]);
        assert_eq!(before.to_bytes(), [1; 4096]);
    }
}
