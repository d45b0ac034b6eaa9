//! Space and layout of files: allocation, holes, cloning, and what O_DIRECT asks for.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{check, check_len, kernel_offset};

/// What `fallocate` is to do with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fallocate {
    /// Reserve space, growing the file as needed.
    Allocate,
    /// Deallocate; the range reads as zeroes and the length stays.
    PunchHole,
    /// Make it read as zeroes with the space kept, growing the file as needed.
    ZeroRange,
    /// Make it read as zeroes with the space kept; the length stays (devices).
    ZeroRangeKeepSize,
}

impl Fallocate {
    const fn mode(self) -> libc::c_int {
        match self {
            Self::Allocate => 0,
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            Self::ZeroRangeKeepSize => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}

/// `fallocate(2)`; `len` must not be 0.
pub(crate) fn fallocate(
    fd: BorrowedFd<'_>,
    what: Fallocate,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let (offset, len) = (kernel_offset(offset)?, kernel_offset(len)?);
    // SAFETY: plain numbers; no memory of ours is touched.
    check(unsafe { libc::fallocate64(fd.as_raw_fd(), what.mode(), offset, len) }).map(drop)
}

fn seek(fd: BorrowedFd<'_>, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = kernel_offset(offset)?;
    // SAFETY: plain numbers. The file position that this moves is used by nobody: all I/O names its offset.
    let result = unsafe { libc::lseek64(fd.as_raw_fd(), offset, whence) };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Where data next begins at or after `offset`. ENXIO when there is none.
pub(crate) fn seek_data(fd: BorrowedFd<'_>, offset: u64) -> io::Result<u64> {
    seek(fd, offset, libc::SEEK_DATA)
}

/// Where a hole (or the end of the file) next begins at or after `offset`.
pub(crate) fn seek_hole(fd: BorrowedFd<'_>, offset: u64) -> io::Result<u64> {
    seek(fd, offset, libc::SEEK_HOLE)
}

/// `copy_file_range(2)`; returns how many bytes were copied, 0 at the source's end.
pub(crate) fn copy_file_range(
    from: BorrowedFd<'_>,
    from_offset: u64,
    to: BorrowedFd<'_>,
    to_offset: u64,
    len: usize,
) -> io::Result<usize> {
    let (mut from_offset, mut to_offset) = (kernel_offset(from_offset)?, kernel_offset(to_offset)?);
    // SAFETY: the two offsets are locals that outlive the call; the kernel writes no other memory of ours.
    let result = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            len,
            0,
        )
    };
    check_len(result)
}

/// Makes `to` share the blocks of `from`. All three numbers are multiples of the file system's block size.
pub(crate) fn clone_range(
    from: BorrowedFd<'_>,
    from_offset: u64,
    to: BorrowedFd<'_>,
    to_offset: u64,
    len: u64,
) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: from_offset,
        src_length: len,
        dest_offset: to_offset,
    };
    // SAFETY: FICLONERANGE reads one `file_clone_range`, which outlives the call.
    check(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) }).map(drop)
}

/// Turns copy-on-write off for an empty file (btrfs).
pub(crate) fn set_no_cow(fd: BorrowedFd<'_>) -> io::Result<()> {
    const FS_NOCOW_FL: libc::c_long = 0x0080_0000;
    let mut flags: libc::c_long = 0;
    // SAFETY: FS_IOC_GETFLAGS writes at most one `long`, into a local of that size.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_GETFLAGS, &raw mut flags) })?;
    flags |= FS_NOCOW_FL;
    // SAFETY: FS_IOC_SETFLAGS reads at most one `long`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FS_IOC_SETFLAGS, &raw const flags) }).map(drop)
}

/// The kernel's `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct FsxAttributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// Asks the file system to reserve space in units of `bytes`. Only for a file without extents.
pub(crate) fn set_extent_size(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f;
    const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
    const FS_XFLAG_EXTSIZE: u32 = 0x0800;
    let mut attributes = FsxAttributes::default();
    // SAFETY: FS_IOC_FSGETXATTR fills a `struct fsxattr`, which is what the local is.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) })?;
    attributes.flags |= FS_XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    // SAFETY: FS_IOC_FSSETXATTR reads a `struct fsxattr`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) })
        .map(drop)
}

/// What O_DIRECT asks of offsets, lengths and addresses, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    pub(crate) memory: u32,
    pub(crate) offset: u32,
}

/// What the file system says of O_DIRECT (`statx`, Linux 6.1 on). `None` when it says nothing.
pub(crate) fn direct_alignment(fd: BorrowedFd<'_>) -> Option<DirectAlignment> {
    // SAFETY: `statx` is plain old data for which all zeroes is a valid value.
    let mut stat: libc::statx = unsafe { mem::zeroed() };
    // SAFETY: the path is an empty C string, and `stat` is a local that the kernel may fill.
    let result = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    let known = check(result).is_ok() && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    (known && stat.stx_dio_offset_align != 0).then_some(DirectAlignment {
        memory: stat.stx_dio_mem_align,
        offset: stat.stx_dio_offset_align,
    })
}
