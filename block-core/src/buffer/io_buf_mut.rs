//! [`IoBufMut`], the destination of a read.

use std::{any::Any, fmt, ops::RangeBounds, ptr, slice, sync::Arc};

use super::{
    Buffer, IoBuf,
    memory::Memory,
    segment::{Segment, SegmentList},
};

/// The destination of a read: segments of memory that nobody else can reach.
///
/// It is not `Clone`. It can be cut into pieces, which may go to different tasks and threads and be filled there at the
/// same time; each of them keeps the memory alive.
///
/// ```
/// use block_core::buffer::{Buffer, IoBuf};
///
/// let (lent, mut front) = Buffer::new(10).lend();
/// let back = front.split_off(5);
/// std::thread::scope(|scope| {
///     for (mut piece, text) in [(front, b"01234"), (back, b"56789")] {
///         scope.spawn(move || piece.copy_from(0, &IoBuf::from(&text[..])));
///     }
/// });
/// assert_eq!(&lent.reclaim().unwrap()[..], b"0123456789");
/// ```
///
/// Methods that take an offset or a range panic if it lies outside.
#[derive(Default)]
pub struct IoBufMut {
    /// Own or foreign segments only, whose bytes are valid for writes and belong to this `IoBufMut` alone.
    segments: SegmentList,
}

impl IoBufMut {
    /// An empty one, to [`append`](Self::append) to.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wraps memory of somebody else, such as a guest's. `owner` is dropped with the last piece.
    ///
    /// ```
    /// use std::{cell::UnsafeCell, sync::Arc};
    /// use block_core::buffer::IoBufMut;
    ///
    /// struct GuestMemory(UnsafeCell<[u8; 4096]>);
    /// unsafe impl Sync for GuestMemory {}
    ///
    /// let guest = Arc::new(GuestMemory(UnsafeCell::new([0; 4096])));
    /// let base: *mut u8 = guest.0.get().cast();
    /// let segments = [(base, 512), (base.wrapping_add(2048), 512)];
    /// // SAFETY: `guest` keeps the memory, which is accessed by raw pointers only.
    /// let mut destination = unsafe { IoBufMut::from_raw_parts(segments, guest.clone()) };
    /// destination.fill(0xff);
    /// assert!(destination.as_contiguous_mut().is_none(), "no references to guest memory");
    /// drop(destination);
    /// # let _guest = Arc::into_inner(guest).unwrap();
    /// # let bytes = _guest.0.into_inner();
    /// # assert_eq!((bytes[511], bytes[512], bytes[2048], bytes[2560]), (0xff, 0, 0xff, 0));
    /// ```
    ///
    /// # Safety
    ///
    /// For each segment, as long as `owner` or a clone of it lives:
    ///
    /// - the pointer is valid for reads and writes of its length, which is at most `isize::MAX`, from any thread, and
    ///   the bytes are initialised; a segment of length 0 may have any pointer;
    /// - no Rust reference to these bytes exists while a method of this buffer, or the I/O that it was handed to,
    ///   accesses them;
    /// - others may access the bytes at the same time (a guest's processor, a device, the kernel), but only in ways for
    ///   which that is no undefined behaviour. What is read or left behind then is arbitrary.
    pub unsafe fn from_raw_parts(
        segments: impl IntoIterator<Item = (*mut u8, usize)>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let mut list = SegmentList::default();
        for (ptr, len) in segments {
            // SAFETY: the caller vouches for exactly that.
            list.push(unsafe { Segment::foreign(ptr, len, Arc::clone(&owner)) });
        }
        Self { segments: list }
    }

    /// The first `len` bytes of a [`Buffer`]'s memory, which nobody else may reach. (A [`Lent`](super::Lent) may hold it,
    /// which has no access.)
    pub(super) fn own(memory: Arc<Memory>, len: usize) -> Self {
        Self {
            segments: Segment::own(memory, len).into(),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    /// Whether there is nothing to fill.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cuts off and returns the first `at` bytes; `self` keeps the rest.
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let (_lent, mut buf) = Buffer::new(100).lend();
    /// let head = buf.split_to(30);
    /// assert_eq!((head.len(), buf.len()), (30, 70));
    /// ```
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
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let (_lent, mut buf) = Buffer::new(100).lend();
    /// let tail = buf.split_off(50);
    /// buf.append(tail);
    /// assert_eq!(buf.segment_count(), 1);
    /// buf.append(Buffer::new(10).into());
    /// assert_eq!((buf.len(), buf.segment_count()), (110, 2));
    /// ```
    pub fn append(&mut self, other: Self) {
        self.segments.append(other.segments);
    }

    /// Fills it with `byte`.
    pub fn fill(&mut self, byte: u8) {
        self.fill_range(.., byte);
    }

    /// Fills a part with `byte`.
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let (lent, mut buf) = Buffer::new(5).lend();
    /// buf.fill_range(1..=2, b'x');
    /// drop(buf);
    /// assert_eq!(&lent.reclaim().unwrap()[..], b"\0xx\0\0");
    /// ```
    pub fn fill_range(&mut self, range: impl RangeBounds<usize>, byte: u8) {
        for part in self.segments.parts(self.segments.range(&range)) {
            // SAFETY: these bytes are valid for writes, are kept alive by their segment, and belong to `self` alone,
            // which is borrowed exclusively.
            unsafe { part.ptr.write_bytes(byte, part.len) }
        }
    }

    /// Copies `src` to the bytes from `at` on.
    pub fn copy_from_slice(&mut self, at: usize, mut src: &[u8]) {
        for part in self.segments.parts(self.segments.range_at(at, src.len())) {
            let (now, rest) = src.split_at(part.len);
            // SAFETY: as in `fill_range`; `now` is as long as the part.
            unsafe { ptr::copy(now.as_ptr(), part.ptr, part.len) }
            src = rest;
        }
    }

    /// Copies all of `src` to the bytes from `at` on.
    pub fn copy_from(&mut self, at: usize, src: &IoBuf) {
        let range = self.segments.range_at(at, src.len());
        let mut targets = self.segments.parts(range);
        let (mut to, mut room) = (ptr::null_mut::<u8>(), 0);
        for part in src.list().parts(0..src.len()) {
            let (mut from, mut left) = (part.ptr, part.len);
            while left != 0 {
                if room == 0 {
                    let target = targets.next().expect("the range is as long as the source");
                    (to, room) = (target.ptr, target.len);
                }
                let len = left.min(room);
                if part.is_zeroes() {
                    // SAFETY: `to` and the `room` bytes from there on are as in `fill_range`.
                    unsafe { to.write_bytes(0, len) }
                } else {
                    // SAFETY: as before for `to`; `from` and the `left` bytes from there on are kept readable by
                    // `src`. Both may be the same guest's memory, hence no `copy_nonoverlapping`.
                    unsafe { ptr::copy(from.cast_const(), to, len) }
                    from = from.wrapping_add(len);
                }
                to = to.wrapping_add(len);
                (left, room) = (left - len, room - len);
            }
        }
    }

    /// Copies the bytes from `at` on to `dst`, as many as that holds.
    pub fn copy_to_slice(&self, at: usize, dst: &mut [u8]) {
        self.segments.copy_to_slice(at, dst);
    }

    /// Whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        self.segments.is_zero()
    }

    /// Address and length of each segment, for whoever makes the system call. None has length 0.
    ///
    /// A pointer is good for reads and writes as long as this `IoBufMut`, or whatever it was split or frozen into,
    /// exists. Whoever passes it on must keep that until the I/O has ended.
    pub fn segments(&self) -> impl Iterator<Item = (*mut u8, usize)> + Clone {
        self.segments.chunks()
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

    /// The bytes, if they are one segment of our own memory (or none).
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let (lent, mut buf) = Buffer::new(4).lend();
    /// buf.as_contiguous_mut().unwrap().reverse();
    /// ```
    pub fn as_contiguous_mut(&mut self) -> Option<&mut [u8]> {
        if self.segments.has_foreign() {
            return None;
        }
        let mut chunks = self.segments.chunks();
        match (chunks.next(), chunks.next()) {
            (None, _) => Some(&mut []),
            // SAFETY: own memory (an `IoBufMut` has nothing else but foreign), initialised and kept alive by the segment;
            // these bytes belong to `self` alone, which is borrowed exclusively as long as the slice is.
            (Some((ptr, len)), None) => Some(unsafe { slice::from_raw_parts_mut(ptr, len) }),
            _ => None,
        }
    }

    /// Makes it the source of a write: immutable and shared from here on.
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let (lent, mut buf) = Buffer::new(4).lend();
    /// buf.fill(1);
    /// let source = buf.freeze();
    /// let lent = lent.reclaim().expect_err("the source still reads from it");
    /// drop(source);
    /// assert!(lent.reclaim().is_ok());
    /// ```
    pub fn freeze(self) -> IoBuf {
        IoBuf::from_list(self.segments)
    }
}

/// For memory that needn't come back as a [`Buffer`]; otherwise see [`Buffer::lend`].
impl From<Buffer> for IoBufMut {
    fn from(buffer: Buffer) -> Self {
        let (memory, len) = buffer.into_memory();
        Self::own(memory, len)
    }
}

impl fmt::Debug for IoBufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBufMut")
            .field("len", &self.len())
            .field("segments", &self.segment_count())
            .finish_non_exhaustive()
    }
}
