//! The list of segments below [`IoBuf`](super::IoBuf) and [`IoBufMut`](super::IoBufMut). Which of its bytes may be written
//! to is for those two to know; here they are addresses with an owner each.

use std::{
    any::Any,
    mem,
    ops::{Bound, Range, RangeBounds},
    ptr,
    sync::Arc,
};

use smallvec::SmallVec;

use super::{
    is_zero,
    memory::Memory,
    zero::{ZERO_BLOCK, ZERO_BLOCK_LEN},
};

/// What keeps a segment's memory alive.
#[derive(Clone)]
pub(super) enum Owner {
    /// The block of zeroes, as often as it takes: the segment may be longer than the block, and every part of it
    /// begins at the block's beginning.
    Zeroes,
    /// Memory that is never freed and never written to.
    Static,
    /// Memory of ours.
    Own(Arc<Memory>),
    /// Somebody else's memory, which may change at any time: no references to it.
    Foreign(#[expect(dead_code, reason = "held, never looked at")] Arc<dyn Any + Send + Sync>),
}

/// Bytes `ptr .. ptr + len`, readable as long as `owner` is alive. Not `Clone`: in an `IoBufMut` it is unique.
pub(super) struct Segment {
    ptr: *mut u8,
    /// Never 0 inside a list.
    len: usize,
    owner: Owner,
}

// SAFETY: a segment is an address in memory that its owner keeps alive, and all owners are `Send` and `Sync`. Bytes of
// ours are written to through an `&mut IoBufMut` only, to which they belong exclusively; foreign ones may change at any
// time anyway, which `from_raw_parts` made its caller vouch for.
unsafe impl Send for Segment {}
// SAFETY: as above; through `&Segment` bytes are only read.
unsafe impl Sync for Segment {}

impl Segment {
    pub(super) fn zeroes(len: usize) -> Self {
        Self {
            ptr: (&raw const ZERO_BLOCK.0).cast::<u8>().cast_mut(),
            len,
            owner: Owner::Zeroes,
        }
    }

    pub(super) fn from_static(bytes: &'static [u8]) -> Self {
        Self {
            ptr: bytes.as_ptr().cast_mut(),
            len: bytes.len(),
            owner: Owner::Static,
        }
    }

    /// The first `len` bytes of `memory`.
    pub(super) fn own(memory: Arc<Memory>, len: usize) -> Self {
        assert!(len <= memory.capacity());
        Self {
            ptr: memory.ptr(),
            len,
            owner: Owner::Own(memory),
        }
    }

    /// # Safety
    ///
    /// The bytes are readable as long as `owner` or a clone of it lives.
    pub(super) unsafe fn foreign(
        ptr: *mut u8,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            ptr,
            len,
            owner: Owner::Foreign(owner),
        }
    }

    fn is_zeroes(&self) -> bool {
        matches!(self.owner, Owner::Zeroes)
    }

    fn is_foreign(&self) -> bool {
        matches!(self.owner, Owner::Foreign(_))
    }

    /// `len` bytes from `at` on, which the caller knows to be inside.
    fn part(&self, at: usize, len: usize) -> Part<'_> {
        debug_assert!(at <= self.len && len <= self.len - at);
        let ptr = if self.is_zeroes() {
            self.ptr
        } else {
            self.ptr.wrapping_add(at)
        };
        Part {
            ptr,
            len,
            segment: self,
        }
    }

    /// Cuts off everything from `at` on.
    fn split_off(&mut self, at: usize) -> Self {
        let tail = self.part(at, self.len - at).share();
        self.len = at;
        tail
    }

    /// Takes in `next` if it follows right behind in the same memory.
    fn merge(&mut self, next: Segment) -> Result<(), Segment> {
        let adjoins = match (&self.owner, &next.owner) {
            (Owner::Zeroes, Owner::Zeroes) => true,
            // A pointer into `Memory` may be used for all of it. Of a foreign pointer (or a static one) we know that
            // for its own segment only, so those stay apart even if they touch.
            (Owner::Own(a), Owner::Own(b)) => {
                Arc::ptr_eq(a, b) && self.ptr.wrapping_add(self.len) == next.ptr
            }
            _ => false,
        };
        if !adjoins {
            return Err(next);
        }
        self.len += next.len;
        Ok(())
    }

    fn is_aligned(&self, addr_align: usize, len_align: usize) -> bool {
        let chunks_fit = !self.is_zeroes()
            || self.len <= ZERO_BLOCK_LEN
            || ZERO_BLOCK_LEN.is_multiple_of(len_align);
        self.ptr.addr().is_multiple_of(addr_align)
            && self.len.is_multiple_of(len_align)
            && chunks_fit
    }
}

/// A part of a segment. For [`Owner::Zeroes`] it may be longer than the memory behind it, see [`chunks`](Self::chunks).
pub(super) struct Part<'a> {
    pub(super) ptr: *mut u8,
    pub(super) len: usize,
    segment: &'a Segment,
}

impl Part<'_> {
    pub(super) fn is_zeroes(&self) -> bool {
        self.segment.is_zeroes()
    }

    /// A segment of its own.
    fn share(&self) -> Segment {
        Segment {
            ptr: self.ptr,
            len: self.len,
            owner: self.segment.owner.clone(),
        }
    }

    /// Pointers and lengths that may be dereferenced.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (*mut u8, usize)> + Clone + use<> {
        let step = if self.is_zeroes() {
            ZERO_BLOCK_LEN
        } else {
            usize::MAX
        };
        let (ptr, mut left) = (self.ptr, self.len);
        std::iter::from_fn(move || {
            let len = left.min(step);
            left -= len;
            (len != 0).then_some((ptr, len))
        })
    }

    /// Copies the part to `dst`.
    ///
    /// # Safety
    ///
    /// `dst` is valid for writing `self.len` bytes.
    unsafe fn copy_to(&self, dst: *mut u8) {
        if self.is_zeroes() {
            // SAFETY: the caller vouches for `dst`.
            unsafe { dst.write_bytes(0, self.len) }
        } else {
            // SAFETY: the owner keeps `self.ptr` readable; the caller vouches for `dst`. `copy` minds no overlap
            // (both may be the same guest's memory), and makes no reference.
            unsafe { ptr::copy(self.ptr.cast_const(), dst, self.len) }
        }
    }

    fn is_zero(&self) -> bool {
        if self.is_zeroes() {
            true
        } else if self.segment.is_foreign() {
            // No reference to memory that may change: by way of a small copy, which stays in the first-level cache.
            let mut copy = [0; 1024];
            let mut at = 0;
            while at < self.len {
                let len = copy.len().min(self.len - at);
                // SAFETY: `at + len <= self.len`, and the owner keeps these bytes readable; `copy` is as long as `len`
                // at least.
                unsafe { ptr::copy(self.ptr.cast_const().add(at), copy.as_mut_ptr(), len) }
                if !is_zero(&copy[..len]) {
                    return false;
                }
                at += len;
            }
            true
        } else {
            // SAFETY: own or static memory, kept alive by the segment that `self` borrows. Own memory is written to
            // only through the `IoBufMut` that it belongs to, which is borrowed, too, if this is one.
            is_zero(unsafe { std::slice::from_raw_parts(self.ptr, self.len) })
        }
    }
}

/// Segments in order. Up to two are stored in place, without an allocation.
#[derive(Default)]
pub(super) struct SegmentList {
    list: SmallVec<[Segment; 2]>,
    /// The sum of all lengths.
    len: usize,
}

impl From<Segment> for SegmentList {
    fn from(segment: Segment) -> Self {
        let mut list = Self::default();
        list.push(segment);
        list
    }
}

impl SegmentList {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, segment: Segment) {
        if segment.len == 0 {
            return;
        }
        self.len = self
            .len
            .checked_add(segment.len)
            .expect("a buffer's length must fit into usize");
        let rest = match self.list.last_mut() {
            Some(last) => last.merge(segment),
            None => Err(segment),
        };
        if let Err(segment) = rest {
            self.list.push(segment);
        }
    }

    pub(super) fn append(&mut self, other: Self) {
        if self.list.is_empty() {
            *self = other;
            return;
        }
        for segment in other.list {
            self.push(segment);
        }
    }

    /// Cuts off everything from `at` on.
    #[track_caller]
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        assert!(
            at <= self.len,
            "cannot split at {at}: the buffer's length is {}",
            self.len
        );
        if at == 0 {
            return mem::take(self);
        }
        let mut tail = Self {
            list: SmallVec::new(),
            len: self.len - at,
        };
        let (mut index, mut within) = (0, at);
        while index < self.list.len() && within >= self.list[index].len {
            within -= self.list[index].len;
            index += 1;
        }
        if within != 0 {
            tail.list.push(self.list[index].split_off(within));
            index += 1;
        }
        tail.list.extend(self.list.drain(index..));
        self.len = at;
        tail
    }

    /// Cuts off everything before `at`.
    #[track_caller]
    pub(super) fn split_to(&mut self, at: usize) -> Self {
        let tail = self.split_off(at);
        mem::replace(self, tail)
    }

    /// Another list of the same bytes. Only for those who never write.
    pub(super) fn share(&self, range: Range<usize>) -> Self {
        let len = range.len();
        Self {
            list: self.parts(range).map(|part| part.share()).collect(),
            len,
        }
    }

    /// The parts of segments that make up `range`, which must be inside.
    pub(super) fn parts(&self, range: Range<usize>) -> impl Iterator<Item = Part<'_>> {
        debug_assert!(range.start <= range.end && range.end <= self.len);
        let (mut skip, mut left) = (range.start, range.len());
        self.list.iter().filter_map(move |segment| {
            if skip >= segment.len {
                skip -= segment.len;
                return None;
            }
            let len = left.min(segment.len - skip);
            let part = segment.part(skip, len);
            (skip, left) = (0, left - len);
            (len != 0).then_some(part)
        })
    }

    /// All of it, as pointers that may be dereferenced.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (*mut u8, usize)> + Clone {
        self.list
            .iter()
            .flat_map(|segment| segment.part(0, segment.len).chunks())
    }

    pub(super) fn chunk_count(&self) -> usize {
        let count = |segment: &Segment| {
            if segment.is_zeroes() {
                segment.len.div_ceil(ZERO_BLOCK_LEN)
            } else {
                1
            }
        };
        self.list.iter().map(count).sum()
    }

    #[cfg(test)]
    pub(super) fn is_inline(&self) -> bool {
        !self.list.spilled()
    }

    /// Whether references to the bytes are out of the question.
    pub(super) fn has_foreign(&self) -> bool {
        self.list.iter().any(Segment::is_foreign)
    }

    pub(super) fn is_aligned(&self, addr_align: usize, len_align: usize) -> bool {
        self.list
            .iter()
            .all(|segment| segment.is_aligned(addr_align, len_align))
    }

    pub(super) fn is_zero(&self) -> bool {
        self.parts(0..self.len).all(|part| part.is_zero())
    }

    /// Copies the bytes from `range` to `dst`.
    ///
    /// # Safety
    ///
    /// `range` is inside, and `dst` is valid for writing `range.len()` bytes.
    pub(super) unsafe fn copy_to(&self, range: Range<usize>, mut dst: *mut u8) {
        for part in self.parts(range) {
            // SAFETY: the parts' lengths add up to `range.len()`, for which the caller vouches.
            unsafe {
                part.copy_to(dst);
                dst = dst.add(part.len);
            }
        }
    }

    #[track_caller]
    pub(super) fn copy_to_slice(&self, at: usize, dst: &mut [u8]) {
        let range = self.range_at(at, dst.len());
        // SAFETY: `range` is checked, and `dst` is exactly as long.
        unsafe { self.copy_to(range, dst.as_mut_ptr()) }
    }

    /// `at .. at + len`, if that is inside.
    #[track_caller]
    pub(super) fn range_at(&self, at: usize, len: usize) -> Range<usize> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => at..end,
            _ => panic!(
                "{len} bytes at {at} exceed the buffer's length {}",
                self.len
            ),
        }
    }

    /// What `range` stands for, if that is inside.
    #[track_caller]
    pub(super) fn range(&self, range: &impl RangeBounds<usize>) -> Range<usize> {
        let start = match range.start_bound() {
            Bound::Included(at) => Some(*at),
            Bound::Excluded(at) => at.checked_add(1),
            Bound::Unbounded => Some(0),
        };
        let end = match range.end_bound() {
            Bound::Included(at) => at.checked_add(1),
            Bound::Excluded(at) => Some(*at),
            Bound::Unbounded => Some(self.len),
        };
        match (start, end) {
            (Some(start), Some(end)) if start <= end && end <= self.len => start..end,
            _ => panic!(
                "range {:?}, {:?} exceeds the buffer's length {}",
                range.start_bound(),
                range.end_bound(),
                self.len
            ),
        }
    }

    /// The memory of ours whose first bytes this list is, and their number; or the list, if it is anything else.
    pub(super) fn try_into_memory(mut self) -> Result<(Arc<Memory>, usize), Self> {
        let len = self.len;
        if let [
            Segment {
                ptr,
                owner: Owner::Own(memory),
                ..
            },
        ] = self.list.as_slice()
            && *ptr == memory.ptr()
            && let Some(Segment {
                owner: Owner::Own(memory),
                ..
            }) = self.list.pop()
        {
            return Ok((memory, len));
        }
        Err(self)
    }
}
