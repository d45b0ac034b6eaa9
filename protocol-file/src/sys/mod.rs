//! The system calls that the standard library doesn't offer, each behind a safe function.
//!
//! This is the only place in the crate where `unsafe` is allowed (design, section 5). Nothing here has a policy: no
//! retries, no fallbacks, no memory of what a file system refused. Every function returns what the kernel said.

// Invariants that all of it rests on:
//  1. A pointer goes to the kernel only while the buffer that it came from is borrowed for the length of the call
//     (`rw`), or is owned by an operation that nobody can reach until the kernel has completed it (`ring`).
//  2. Descriptors are borrowed (`BorrowedFd`) or owned by the operation for as long.
#![allow(unsafe_code)]

mod device;
mod lock;
mod ring;
mod rw;
mod space;

pub(crate) use self::{
    device::{device_size, discard as discard_device, logical_sector_size, zero_out},
    lock::{LockKind, ofd_locks_available, set_read_lock, test_write_lock, unset_lock},
    ring::{Completion, Ring, Submitter},
    rw::{AccessMode, DSYNC, IoVecs, NOWAIT, access_mode, read_at, set_direct, write_at},
    space::{
        Fallocate, clone_range, copy_file_range, direct_alignment, fallocate, seek_data, seek_hole,
        set_extent_size, set_no_cow,
    },
};

use std::io;

/// Turns the −1 of a system call into the errno.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same for calls that return a count of bytes.
fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// An offset as the kernel takes it.
fn kernel_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
