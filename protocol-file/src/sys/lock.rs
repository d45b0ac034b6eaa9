//! Advisory byte-range locks of one byte. What the bytes mean is in `image_lock`.

use std::{
    fs::File,
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use super::check;

/// Whose a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// The open file description's.
    Ofd,
    /// The process's: lost when it closes any descriptor of the file.
    Posix,
}

fn request(kind: libc::c_short, first: u64, len: u64) -> libc::flock {
    // SAFETY: `flock` is plain old data for which all zeroes is a valid value. (`l_pid` must be 0 for OFD locks.)
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    lock.l_type = kind;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = first as libc::off_t;
    lock.l_len = len as libc::off_t;
    lock
}

fn set(fd: BorrowedFd<'_>, kind: LockKind, lock: &libc::flock) -> io::Result<()> {
    let command = match kind {
        LockKind::Ofd => libc::F_OFD_SETLK,
        LockKind::Posix => libc::F_SETLK,
    };
    // SAFETY: the command reads one `flock`, which outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_ref(lock)) }).map(drop)
}

/// Takes a read lock on one byte, or says EAGAIN or EACCES at once.
pub(crate) fn set_read_lock(fd: BorrowedFd<'_>, kind: LockKind, byte: u64) -> io::Result<()> {
    set(fd, kind, &request(libc::F_RDLCK as libc::c_short, byte, 1))
}

/// Releases one byte.
pub(crate) fn unset_lock(fd: BorrowedFd<'_>, kind: LockKind, byte: u64) -> io::Result<()> {
    set(fd, kind, &request(libc::F_UNLCK as libc::c_short, byte, 1))
}

/// Whether somebody else holds a lock on the byte, so that a write lock couldn't be had.
pub(crate) fn test_write_lock(fd: BorrowedFd<'_>, kind: LockKind, byte: u64) -> io::Result<bool> {
    let command = match kind {
        LockKind::Ofd => libc::F_OFD_GETLK,
        LockKind::Posix => libc::F_GETLK,
    };
    let mut lock = request(libc::F_WRLCK as libc::c_short, byte, 1);
    // SAFETY: the command reads and writes one `flock`, a local that outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) })?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Whether this kernel knows OFD locks.
pub(crate) fn ofd_locks_available() -> bool {
    File::open("/dev/null")
        .and_then(|file| test_write_lock(file.as_fd(), LockKind::Ofd, 0))
        .is_ok()
}
