//! Reading and writing at an offset, with vectors of segments and per-call flags. One system call per function call:
//! short transfers, EINTR and EAGAIN are the caller's business.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use block_core::buffer::{IoBuf, IoBufMut};
use smallvec::SmallVec;

use super::{check, check_len, kernel_offset};

/// Complete from the page cache or say EAGAIN.
pub(crate) const NOWAIT: i32 = libc::RWF_NOWAIT;

/// The data is durable when the write returns.
pub(crate) const DSYNC: i32 = libc::RWF_DSYNC;

/// The most segments that one call takes.
const IOV_MAX: usize = 1024;

/// The most bytes that the kernel moves in one call.
const MAX_BYTES: usize = 0x7fff_f000;

/// The vector of a call: addresses and lengths of what is left of a buffer. It borrows nothing, so whoever uses it
/// keeps the buffer.
#[derive(Default)]
pub(crate) struct IoVecs(SmallVec<[libc::iovec; 4]>);

// SAFETY: addresses are plain numbers until somebody dereferences them, which nothing in this type does.
unsafe impl Send for IoVecs {}
// SAFETY: as above.
unsafe impl Sync for IoVecs {}

impl IoVecs {
    /// The destination's bytes from `done` on, as far as one call takes them.
    pub(crate) fn of_mut(buf: &IoBufMut, done: usize) -> Self {
        Self::collect(buf.segments(), done)
    }

    /// The source's bytes from `done` on, as far as one call takes them.
    pub(crate) fn of(buf: &IoBuf, done: usize) -> Self {
        Self::collect(buf.segments().map(|(ptr, len)| (ptr.cast_mut(), len)), done)
    }

    #[inline]
    fn collect(segments: impl Iterator<Item = (*mut u8, usize)>, mut skip: usize) -> Self {
        let mut list = SmallVec::new();
        let mut room = MAX_BYTES;
        for (ptr, len) in segments {
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = (len - skip).min(room);
            list.push(libc::iovec {
                iov_base: ptr.wrapping_add(skip).cast(),
                iov_len: take,
            });
            skip = 0;
            room -= take;
            if room == 0 || list.len() == IOV_MAX {
                break;
            }
        }
        Self(list)
    }

    pub(super) fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }
}

/// Reads into `buf` from its byte `done` on; `offset` is the place in the file of that byte. `flags` may be
/// [`NOWAIT`]. Returns how many bytes were read; 0 at the end of the file.
#[inline]
pub(crate) fn read_at(
    fd: BorrowedFd<'_>,
    buf: &mut IoBufMut,
    done: usize,
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let offset = kernel_offset(offset)?;
    let vectors = IoVecs::of_mut(buf, done);
    let list = vectors.as_slice();
    let result = match list {
        // SAFETY: the segment belongs to `buf`, which is borrowed exclusively until the call has returned.
        [one] if flags == 0 => unsafe {
            libc::pread64(fd.as_raw_fd(), one.iov_base, one.iov_len, offset)
        },
        // SAFETY: as above for each segment; `list` outlives the call and is at most IOV_MAX long.
        _ => unsafe {
            libc::preadv2(
                fd.as_raw_fd(),
                list.as_ptr(),
                list.len() as libc::c_int,
                offset,
                flags,
            )
        },
    };
    check_len(result)
}

/// Writes `buf` from its byte `done` on to `offset`, the place in the file of that byte. `flags` may be [`NOWAIT`] or
/// [`DSYNC`]. Returns how many bytes were written.
#[inline]
pub(crate) fn write_at(
    fd: BorrowedFd<'_>,
    buf: &IoBuf,
    done: usize,
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    let offset = kernel_offset(offset)?;
    let vectors = IoVecs::of(buf, done);
    let list = vectors.as_slice();
    let result = match list {
        // SAFETY: the segment is readable as long as `buf` is, which is borrowed until the call has returned.
        [one] if flags == 0 => unsafe {
            libc::pwrite64(fd.as_raw_fd(), one.iov_base, one.iov_len, offset)
        },
        // SAFETY: as above for each segment; `list` outlives the call and is at most IOV_MAX long.
        _ => unsafe {
            libc::pwritev2(
                fd.as_raw_fd(),
                list.as_ptr(),
                list.len() as libc::c_int,
                offset,
                flags,
            )
        },
    };
    check_len(result)
}

/// How a descriptor was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AccessMode {
    ReadOnly,
    WriteOnly,
    ReadWrite,
}

/// How `fd` was opened.
pub(crate) fn access_mode(fd: BorrowedFd<'_>) -> io::Result<AccessMode> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    Ok(match flags & libc::O_ACCMODE {
        libc::O_RDWR => AccessMode::ReadWrite,
        libc::O_WRONLY => AccessMode::WriteOnly,
        _ => AccessMode::ReadOnly,
    })
}

/// Turns O_DIRECT of an open descriptor on or off (for descriptors that were passed in).
pub(crate) fn set_direct(fd: BorrowedFd<'_>, direct: bool) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument and touches no memory of ours.
    let old = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let new = if direct {
        old | libc::O_DIRECT
    } else {
        old & !libc::O_DIRECT
    };
    if new != old {
        // SAFETY: F_SETFL takes a number.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, new) })?;
    }
    Ok(())
}
