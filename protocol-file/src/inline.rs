//! Completing a request on the task that submits it, when that is the fastest way: the page cache has the data
//! (`nowait`), or the program said that it may wait (`always`). Bounded by size, because whoever else runs on that
//! thread waits meanwhile. Never with O_DIRECT, which never finds anything in the page cache.

use std::{io, os::fd::AsFd};

use block_core::buffer::{IoBuf, IoBufMut};

use crate::{
    open_file::{Known, OpenFile, is_unsupported},
    options::Inline,
    sys,
};

/// The longest request that is tried without waiting, in bytes.
const NOWAIT_MAX: usize = 256 << 10;
/// The longest request that is done by a blocking call, in bytes.
const ALWAYS_MAX: usize = 1 << 20;

/// What came of it.
#[derive(Debug)]
pub(crate) enum Attempt {
    /// It is done.
    Done(io::Result<()>),
    /// The engine has to do what is left from this byte of the buffer on.
    Left(usize),
}

/// Whether a short blocking call may be made on the task that asks.
pub(crate) fn may_wait(file: &OpenFile, mode: Inline) -> bool {
    mode == Inline::Always && file.is_regular() && !file.is_direct()
}

/// How requests of `len` bytes are to be tried: the flags of the call, or not at all.
#[inline]
fn flags(file: &OpenFile, mode: Inline, len: usize, refused: bool) -> Option<i32> {
    if file.is_direct() {
        return None;
    }
    match mode {
        Inline::Nowait if len <= NOWAIT_MAX && !refused => Some(sys::NOWAIT),
        Inline::Always if len <= ALWAYS_MAX && file.is_regular() => Some(0),
        _ => None,
    }
}

/// Tries to fill `buf` from `offset`.
#[inline]
pub(crate) fn read(file: &OpenFile, mode: Inline, offset: u64, buf: &mut IoBufMut) -> Attempt {
    let len = buf.len();
    let refused = file.refusals.nowait_read.is_set();
    let Some(flags) = flags(file, mode, len, refused) else {
        return Attempt::Left(0);
    };
    let mut done = 0;
    loop {
        match sys::read_at(file.as_fd(), buf, done, offset + done as u64, flags) {
            Ok(read) if read == len - done => return Attempt::Done(Ok(())),
            Ok(0) => {
                buf.fill_range(done.., 0);
                return Attempt::Done(Ok(()));
            }
            Ok(read) => {
                done += read;
                if flags != 0 {
                    return Attempt::Left(done);
                }
            }
            Err(error) => match failed(&error, flags, &file.refusals.nowait_read) {
                Next::Again => {}
                Next::Engine => return Attempt::Left(done),
                Next::Fail => return Attempt::Done(Err(error)),
            },
        }
    }
}

/// Tries to write `buf` at `offset`.
#[inline]
pub(crate) fn write(file: &OpenFile, mode: Inline, offset: u64, buf: &IoBuf) -> Attempt {
    let len = buf.len();
    let refused = file.refusals.nowait_write.is_set();
    let Some(flags) = flags(file, mode, len, refused) else {
        return Attempt::Left(0);
    };
    let mut done = 0;
    loop {
        match sys::write_at(file.as_fd(), buf, done, offset + done as u64, flags) {
            Ok(written) if written == len - done => {
                if flags != 0 && !file.nowait_write_works.is_set() {
                    file.nowait_write_works.set();
                }
                return Attempt::Done(Ok(()));
            }
            // What a write of nothing means is the engine's business.
            Ok(0) => return Attempt::Left(done),
            Ok(written) => {
                done += written;
                if flags != 0 {
                    return Attempt::Left(done);
                }
            }
            Err(error) => match failed(&error, flags, &file.refusals.nowait_write) {
                Next::Again => {}
                Next::Engine => return Attempt::Left(done),
                Next::Fail => return Attempt::Done(Err(error)),
            },
        }
    }
}

enum Next {
    Again,
    Engine,
    Fail,
}

#[cold]
fn failed(error: &io::Error, flags: i32, refused: &Known) -> Next {
    match error.raw_os_error() {
        Some(libc::EINTR) => Next::Again,
        // Whatever a call without waiting says, the engine's word is the last.
        _ if flags != 0 => {
            if is_unsupported(error) {
                refused.set();
            }
            Next::Engine
        }
        Some(libc::EAGAIN) => Next::Engine,
        _ => Next::Fail,
    }
}
