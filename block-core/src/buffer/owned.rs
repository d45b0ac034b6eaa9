//! [`Buffer`], the memory of a user, and [`Lent`], the claim on it while a read fills it.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    slice,
    sync::Arc,
};

use super::{IoBufMut, memory::Memory};
use crate::error::{Error, ErrorKind, Result};

/// Alignment of memory that [`Buffer::new`] allocates: enough for O_DIRECT on anything in use.
pub const DEFAULT_ALIGNMENT: usize = 4096;

/// Contiguous memory that its holder alone can reach.
///
/// ```
/// use block_core::buffer::Buffer;
///
/// let mut buffer = Buffer::new(512);
/// assert_eq!(buffer.as_ptr().addr() % 4096, 0);
/// buffer[..3].copy_from_slice(b"QFI");
/// assert_eq!(buffer.iter().filter(|byte| **byte != 0).count(), 3);
///
/// let copied = Buffer::from(&b"text"[..]);
/// assert_eq!(copied.alignment(), 4096);
///
/// let adopted = Buffer::from(vec![7; 3]); // no copy, and therefore no alignment
/// assert_eq!((&adopted[..], adopted.alignment()), (&[7, 7, 7][..], 1));
/// ```
///
/// To read into it, [`lend`](Self::lend) it; to write it, make it an [`IoBuf`](super::IoBuf).
pub struct Buffer {
    /// Nobody else holds it.
    memory: Arc<Memory>,
    /// At most `memory.capacity()`.
    len: usize,
}

impl Buffer {
    /// `len` zeroes, aligned to [`DEFAULT_ALIGNMENT`].
    ///
    /// # Panics
    ///
    /// If there is no memory. For a length that comes from outside there is [`try_new`](Self::try_new).
    pub fn new(len: usize) -> Self {
        Self::with_alignment(len, DEFAULT_ALIGNMENT)
    }

    /// `len` zeroes, aligned to `align`.
    ///
    /// # Panics
    ///
    /// If there is no memory or `align` isn't a power of two.
    pub fn with_alignment(len: usize, align: usize) -> Self {
        match Self::try_with_alignment(len, align) {
            Ok(buffer) => buffer,
            Err(error) => panic!("{error}"),
        }
    }

    /// `len` zeroes, aligned to [`DEFAULT_ALIGNMENT`], or an error of kind [`ErrorKind::OutOfMemory`].
    ///
    /// ```
    /// use block_core::{buffer::Buffer, error::ErrorKind};
    ///
    /// assert_eq!(Buffer::try_new(4096)?.len(), 4096);
    /// assert_eq!(Buffer::try_new(usize::MAX).unwrap_err().kind(), ErrorKind::OutOfMemory);
    /// # Ok::<(), block_core::error::Error>(())
    /// ```
    pub fn try_new(len: usize) -> Result<Self> {
        Self::try_with_alignment(len, DEFAULT_ALIGNMENT)
    }

    /// `len` zeroes, aligned to `align`; fails with [`ErrorKind::OutOfMemory`], or with [`ErrorKind::InvalidInput`] if
    /// `align` isn't a power of two.
    pub fn try_with_alignment(len: usize, align: usize) -> Result<Self> {
        if !align.is_power_of_two() {
            return Err(Error::invalid(format!(
                "buffer alignment {align} isn't a power of two"
            )));
        }
        let memory = Memory::zeroed(len, align).ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfMemory,
                format!("cannot allocate {len} bytes"),
            )
        })?;
        Ok(Self {
            memory: Arc::new(memory),
            len,
        })
    }

    /// The buffer of `memory`'s first `len` bytes, if nobody else holds that memory any more.
    pub(super) fn from_unique(mut memory: Arc<Memory>, len: usize) -> Result<Self, Arc<Memory>> {
        assert!(len <= memory.capacity());
        // `get_mut` acquires what the last holder of a piece released by dropping it, so that everything which
        // was written through pieces happened before what the new `Buffer`'s holder does.
        if Arc::get_mut(&mut memory).is_some() {
            Ok(Self { memory, len })
        } else {
            Err(memory)
        }
    }

    pub(super) fn into_memory(self) -> (Arc<Memory>, usize) {
        (self.memory, self.len)
    }

    /// The alignment that the memory was allocated with. (Its address may happen to be aligned better.)
    pub fn alignment(&self) -> usize {
        self.memory.alignment()
    }

    /// The length up to which [`resize`](Self::resize) works.
    pub fn capacity(&self) -> usize {
        self.memory.capacity()
    }

    /// Changes the length, within the capacity, without touching content: what comes into view when a shortened
    /// buffer grows again is what was there before.
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let mut buffer = Buffer::new(8192);
    /// buffer.resize(100);
    /// assert_eq!((buffer.len(), buffer.capacity()), (100, 8192));
    /// ```
    ///
    /// # Panics
    ///
    /// If `len` exceeds the capacity.
    pub fn resize(&mut self, len: usize) {
        assert!(
            len <= self.capacity(),
            "length {len} exceeds capacity {}",
            self.capacity()
        );
        self.len = len;
    }

    /// Gives the memory to a read. It comes back with [`Lent::reclaim`], when every piece of the [`IoBufMut`] is gone.
    ///
    /// ```
    /// # use block_core::buffer::Buffer;
    /// let (lent, mut destination) = Buffer::new(3).lend();
    /// destination.copy_from_slice(0, b"abc");
    /// drop(destination);
    /// assert_eq!(&lent.reclaim().unwrap()[..], b"abc");
    /// ```
    pub fn lend(self) -> (Lent, IoBufMut) {
        let (memory, len) = self.into_memory();
        (
            Lent {
                memory: Arc::clone(&memory),
                len,
            },
            IoBufMut::own(memory, len),
        )
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` is at most the memory's capacity, so these bytes are initialised and allocated as long as
        // `self.memory` is; nobody else holds the memory, so none is written to while `self` is borrowed.
        unsafe { slice::from_raw_parts(self.memory.ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `self` is borrowed exclusively, so there is no other reference either.
        unsafe { slice::from_raw_parts_mut(self.memory.ptr(), self.len) }
    }
}

/// Adopts the vector's memory without a copy; it keeps whatever alignment it has.
impl From<Vec<u8>> for Buffer {
    fn from(vec: Vec<u8>) -> Self {
        let len = vec.len();
        Self {
            memory: Arc::new(Memory::adopt(vec)),
            len,
        }
    }
}

/// Copies into aligned memory.
impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("len", &self.len)
            .field("alignment", &self.alignment())
            .finish_non_exhaustive()
    }
}

/// The claim on a [`Buffer`] that was [lent](Buffer::lend) to a read.
///
/// Dropping it gives up the memory, which is freed when its last piece goes. Nothing that happens to a `Lent` or to the
/// request (dropped, forgotten, leaked) lets anyone reach memory that the kernel may still write to.
#[must_use = "the memory comes back with `reclaim` only"]
pub struct Lent {
    memory: Arc<Memory>,
    len: usize,
}

impl Lent {
    /// The buffer, or the claim back if a piece of the [`IoBufMut`] (or an [`IoBuf`](super::IoBuf) that one was frozen
    /// into) still exists. Never waits.
    pub fn reclaim(self) -> Result<Buffer, Lent> {
        let Self { memory, len } = self;
        Buffer::from_unique(memory, len).map_err(|memory| Self { memory, len })
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}
