//! [`IoBuf`], the source of a write.

use std::{any::Any, fmt, ops::RangeBounds, slice, sync::Arc};

use super::{
    Buffer,
    segment::{Segment, SegmentList},
};

/// The source of a write: segments of memory that nobody writes to (guest memory excepted, see
/// [`from_raw_parts`](Self::from_raw_parts)).
///
/// Cloning, slicing and joining copy no content, and allocate nothing for up to two segments.
///
/// ```
/// use block_core::buffer::{Buffer, IoBuf};
///
/// let mut data = IoBuf::from(vec![1; 3]); // adopted
/// data.append(IoBuf::from(&b"static"[..])); // referred to
/// data.append(IoBuf::zeroes(2)); // one block of zeroes that all share
/// data.append(Buffer::from(&[9][..]).into());
/// assert_eq!(data.to_vec(), b"\x01\x01\x01static\0\0\x09");
/// assert_eq!(data.slice(2..5).to_vec(), b"\x01st");
/// ```
///
/// Methods that take an offset or a range panic if it lies outside.
#[derive(Default)]
pub struct IoBuf {
    segments: SegmentList,
}

impl IoBuf {
    /// An empty one, to [`append`](Self::append) to.
    pub fn new() -> Self {
        Self::default()
    }

    /// `len` zeroes, of any length and without an allocation: they are the same 64 KiB over and over.
    ///
    /// ```
    /// # use block_core::buffer::IoBuf;
    /// let zeroes = IoBuf::zeroes(1 << 30);
    /// assert!(zeroes.is_zero() && zeroes.is_aligned(4096, 4096));
    /// assert_eq!(zeroes.segments().map(|(_, len)| len).sum::<usize>(), 1 << 30);
    /// ```
    pub fn zeroes(len: usize) -> Self {
        Self {
            segments: Segment::zeroes(len).into(),
        }
    }

    /// Wraps memory of somebody else, such as a guest's. `owner` is dropped with the last clone or slice.
    /// [`IoBufMut::from_raw_parts`](super::IoBufMut::from_raw_parts) has an example.
    ///
    /// # Safety
    ///
    /// For each segment, as long as `owner` or a clone of it lives:
    ///
    /// - the pointer is valid for reads of its length, which is at most `isize::MAX`, from any thread, and the bytes are
    ///   initialised; a segment of length 0 may have any pointer;
    /// - no exclusive Rust reference to these bytes exists while a method of this buffer, or the I/O that it was handed
    ///   to, reads them;
    /// - others may write to the bytes at the same time (a guest's processor, a device, the kernel), but only in ways for
    ///   which that is no undefined behaviour. What is read then is arbitrary, and may differ each time.
    pub unsafe fn from_raw_parts(
        segments: impl IntoIterator<Item = (*const u8, usize)>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let mut list = SegmentList::default();
        for (ptr, len) in segments {
            // SAFETY: the caller vouches for exactly that. An `IoBuf` never writes, so the cast does no harm.
            list.push(unsafe { Segment::foreign(ptr.cast_mut(), len, Arc::clone(&owner)) });
        }
        Self { segments: list }
    }

    pub(super) fn from_list(segments: SegmentList) -> Self {
        Self { segments }
    }

    pub(super) fn list(&self) -> &SegmentList {
        &self.segments
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part of it.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Self {
        Self {
            segments: self.segments.share(self.segments.range(&range)),
        }
    }

    /// The first `at` bytes, and the others.
    ///
    /// ```
    /// # use block_core::buffer::IoBuf;
    /// let (head, tail) = IoBuf::from(&b"headtail"[..]).split_at(4);
    /// assert_eq!((&head.to_vec()[..], &tail.to_vec()[..]), (&b"head"[..], &b"tail"[..]));
    /// ```
    pub fn split_at(&self, at: usize) -> (Self, Self) {
        (self.slice(..at), self.slice(at..))
    }

    /// Cuts off and returns the first `at` bytes; `self` keeps the rest.
    #[must_use = "the bytes are cut off"]
    pub fn split_to(&mut self, at: usize) -> Self {
        Self {
            segments: self.segments.split_to(at),
        }
    }

    /// Cuts off and returns everything from `at` on; `self` keeps the first `at` bytes.
    #[must_use = "the bytes are cut off"]
    pub fn split_off(&mut self, at: usize) -> Self {
        Self {
            segments: self.segments.split_off(at),
        }
    }

    /// Puts `other` behind the last byte. Neighbours in memory of ours become one segment again.
    pub fn append(&mut self, other: Self) {
        self.segments.append(other.segments);
    }

    /// Copies the bytes from `at` on to `dst`, as many as that holds.
    pub fn copy_to_slice(&self, at: usize, dst: &mut [u8]) {
        self.segments.copy_to_slice(at, dst);
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut vec = Vec::with_capacity(self.len());
        // SAFETY: the vector has room for `self.len()` bytes, all of which `copy_to` writes.
        unsafe {
            self.segments.copy_to(0..self.len(), vec.as_mut_ptr());
            vec.set_len(self.len());
        }
        vec
    }

    /// Whether all bytes are zero. For [`zeroes`](Self::zeroes) nothing is looked at. About guest memory the answer
    /// may be out of date at once.
    pub fn is_zero(&self) -> bool {
        self.segments.is_zero()
    }

    /// Address and length of each segment, for whoever makes the system call. None has length 0.
    ///
    /// A pointer is good for reads as long as this `IoBuf`, or a clone or slice with the same bytes, exists. Whoever
    /// passes it on must keep one until the I/O has ended.
    pub fn segments(&self) -> impl Iterator<Item = (*const u8, usize)> + Clone {
        self.segments
            .chunks()
            .map(|(ptr, len)| (ptr.cast_const(), len))
    }

    /// How many items [`segments`](Self::segments) yields.
    pub fn segment_count(&self) -> usize {
        self.segments.chunk_count()
    }

    /// Whether every segment's address is a multiple of `addr_align`, and its length one of `len_align`: what O_DIRECT
    /// asks for.
    pub fn is_aligned(&self, addr_align: usize, len_align: usize) -> bool {
        self.segments.is_aligned(addr_align, len_align)
    }

    /// The content as slices, unless some of it is guest memory, which can only be copied.
    ///
    /// ```
    /// # use block_core::buffer::IoBuf;
    /// let mut data = IoBuf::from(vec![1, 2]);
    /// data.append(IoBuf::zeroes(3));
    /// let sum: usize = data.chunks().unwrap().map(|chunk| chunk.len()).sum();
    /// assert_eq!(sum, 5);
    /// ```
    pub fn chunks(&self) -> Option<impl Iterator<Item = &[u8]> + Clone> {
        if self.segments.has_foreign() {
            return None;
        }
        // SAFETY: own or static memory, initialised, and kept alive by the segment, which `self` lends out as long as the
        // slice lives. Nobody writes to it: an `IoBuf`'s bytes of ours belong to no `IoBufMut` and no `Buffer`.
        Some(
            self.segments()
                .map(|(ptr, len)| unsafe { slice::from_raw_parts(ptr, len) }),
        )
    }

    /// The content as one slice, if it is one segment (or none) and not guest memory.
    pub fn as_contiguous(&self) -> Option<&[u8]> {
        let mut chunks = self.chunks()?;
        match (chunks.next(), chunks.next()) {
            (None, _) => Some(&[]),
            (Some(chunk), None) => Some(chunk),
            _ => None,
        }
    }

    /// The memory, to be used again: if it is ours and in one piece from its beginning on, and nobody else holds a part
    /// of it. Otherwise the `IoBuf` as it was.
    ///
    /// ```
    /// # use block_core::buffer::{Buffer, IoBuf};
    /// let data = IoBuf::from(Buffer::new(4096));
    /// let other = data.clone();
    /// let data = data.try_into_buffer().expect_err("`other` reads from it");
    /// drop(other);
    /// assert_eq!(data.try_into_buffer().unwrap().len(), 4096);
    /// ```
    pub fn try_into_buffer(self) -> Result<Buffer, Self> {
        let (memory, len) = self.segments.try_into_memory().map_err(Self::from_list)?;
        Buffer::from_unique(memory, len).map_err(|memory| Self {
            segments: Segment::own(memory, len).into(),
        })
    }
}

/// Another handle on the same bytes.
impl Clone for IoBuf {
    fn clone(&self) -> Self {
        Self {
            segments: self.segments.share(0..self.len()),
        }
    }
}

/// Takes over the memory.
impl From<Buffer> for IoBuf {
    fn from(buffer: Buffer) -> Self {
        let (memory, len) = buffer.into_memory();
        Self {
            segments: Segment::own(memory, len).into(),
        }
    }
}

/// Adopts the vector's memory without a copy.
impl From<Vec<u8>> for IoBuf {
    fn from(vec: Vec<u8>) -> Self {
        Buffer::from(vec).into()
    }
}

/// Refers to the bytes where they are.
impl From<&'static [u8]> for IoBuf {
    fn from(bytes: &'static [u8]) -> Self {
        Self {
            segments: Segment::from_static(bytes).into(),
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBuf")
            .field("len", &self.len())
            .field("segments", &self.segment_count())
            .finish_non_exhaustive()
    }
}
