//! Block devices: their sizes, and the requests that only devices know.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::check;

/// The length of a block device in bytes.
pub(crate) fn device_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // The request code is defined with `size_t` as its type, but the kernel writes a 64-bit number.
    const BLKGETSIZE64: libc::Ioctl = libc::_IOR::<libc::size_t>(0x12, 114);
    let mut size: u64 = 0;
    // SAFETY: BLKGETSIZE64 writes one 64-bit number, into a local of that size.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// The smallest unit that the device can address, in bytes.
pub(crate) fn logical_sector_size(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one `int`, into a local of that size.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::BLKSSZGET, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn range_request(
    fd: BorrowedFd<'_>,
    request: libc::Ioctl,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD and BLKZEROOUT read two 64-bit numbers, which outlive the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, range.as_ptr()) }).map(drop)
}

/// BLKDISCARD: the content of the range isn't needed.
pub(crate) fn discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    range_request(fd, libc::_IO(0x12, 119), offset, len)
}

/// BLKZEROOUT: the range reads as zeroes afterwards.
pub(crate) fn zero_out(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    range_request(fd, libc::_IO(0x12, 127), offset, len)
}
