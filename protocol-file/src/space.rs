//! What a file or device can do with ranges besides reading and writing them: zeroing, discarding, layout, copying,
//! resizing. Nearly every function here blocks, and is called on a thread of the pool. "Not supported" (EOPNOTSUPP) is
//! returned only when nothing has been changed. Whatever may make a hole says so to the file's `known_data`.

use std::{io, os::fd::AsFd};

use block_core::{
    buffer::{Buffer, IoBuf, IoBufMut},
    driver::Preallocation,
};

use crate::{
    open_file::{FileKind, OpenFile, is_unsupported},
    sys::{self, Fallocate},
};

/// The size of the buffer that preallocates by writing, and of other copies through memory.
const CHUNK: usize = 1 << 20;

pub(crate) fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}

/// Calls again what a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            result => return result,
        }
    }
}

fn fallocate(file: &OpenFile, what: Fallocate, offset: u64, len: u64) -> io::Result<()> {
    retry(|| sys::fallocate(file.as_fd(), what, offset, len))
}

/// Makes a range read as zeroes, growing the file if it ends beyond it. With `may_unmap` the space may go.
pub(crate) fn write_zeroes(
    file: &OpenFile,
    offset: u64,
    len: u64,
    may_unmap: bool,
) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let _forget = file.known_data.forgotten_at_the_end();
    match file.kind() {
        FileKind::Regular => zero_in_file(file, offset, len, may_unmap),
        FileKind::Block => zero_on_device(file, offset, len, may_unmap),
        FileKind::Character => Err(unsupported()),
    }
}

fn punch(file: &OpenFile, offset: u64, len: u64) -> io::Result<()> {
    if file.refusals.punch_hole.is_set() {
        return Err(unsupported());
    }
    let result = fallocate(file, Fallocate::PunchHole, offset, len);
    file.refusals.punch_hole.note(&result);
    result
}

fn zero_range(file: &OpenFile, offset: u64, len: u64) -> io::Result<()> {
    if file.refusals.zero_range.is_set() {
        return Err(unsupported());
    }
    let result = fallocate(file, Fallocate::ZeroRange, offset, len);
    file.refusals.zero_range.note(&result);
    result
}

fn zero_in_file(file: &OpenFile, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
    let length = file.query_length()?;
    let end = offset
        .checked_add(len)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
    let inside = length.saturating_sub(offset).min(len);
    if may_unmap {
        // What is beyond the end reads as zeroes by growing the file.
        let punched = if inside == 0 {
            Ok(())
        } else {
            punch(file, offset, inside)
        };
        match punched {
            Ok(()) => {
                if end > length {
                    retry(|| file.set_len(end))?;
                }
                return Ok(());
            }
            Err(error) if is_unsupported(&error) => {}
            Err(error) => return Err(error),
        }
    }
    match zero_range(file, offset, len) {
        Err(error) if is_unsupported(&error) => {}
        result => return result,
    }
    if inside != 0 {
        punch(file, offset, inside)?;
    }
    // The range reads as zeroes now, or will when the file has grown. That its space is reserved again is as much as can
    // be done here, and not more than a wish.
    match fallocate(file, Fallocate::Allocate, offset, len) {
        Err(error) if is_unsupported(&error) => {
            if end > length {
                retry(|| file.set_len(end))?;
            }
            Ok(())
        }
        result => result,
    }
}

fn zero_on_device(file: &OpenFile, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
    if may_unmap {
        match punch(file, offset, len) {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
    }
    if !file.refusals.zero_range.is_set() {
        let result = fallocate(file, Fallocate::ZeroRangeKeepSize, offset, len);
        file.refusals.zero_range.note(&result);
        match result {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
    }
    if file.refusals.zero_out.is_set() {
        return Err(unsupported());
    }
    let result = retry(|| sys::zero_out(file.as_fd(), offset, len));
    file.refusals.zero_out.note(&result);
    map_unsupported(result)
}

/// ENOTTY and ENOSYS mean "not supported" as well.
fn map_unsupported<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| {
        if is_unsupported(&error) {
            unsupported()
        } else {
            error
        }
    })
}

/// Gives the space of a range back. A file's range reads as zeroes afterwards, a device's as anything.
pub(crate) fn discard(file: &OpenFile, offset: u64, len: u64) -> io::Result<()> {
    let _forget = file.known_data.forgotten_at_the_end();
    let result = match file.kind() {
        FileKind::Regular => {
            let len = file.query_length()?.saturating_sub(offset).min(len);
            if len == 0 {
                return Ok(());
            }
            punch(file, offset, len)
        }
        FileKind::Block if file.refusals.discard.is_set() => Err(unsupported()),
        FileKind::Block => {
            let result = retry(|| sys::discard_device(file.as_fd(), offset, len));
            file.refusals.discard.note(&result);
            result
        }
        FileKind::Character => Err(unsupported()),
    };
    map_unsupported(result)
}

/// What the start of a range of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    Data(u64),
    Hole(u64),
}

/// Whether there is data or a hole at `offset`, and for how many of the next `len` bytes.
pub(crate) fn extent_at(file: &OpenFile, offset: u64, len: u64) -> Extent {
    if !file.is_regular() || file.refusals.seek_data.is_set() {
        return Extent::Data(len);
    }
    let unit = file.offset_alignment();
    let look = file.known_data.look();
    match sys::seek_data(file.as_fd(), offset) {
        // Nothing but a hole up to the end of the file, or beyond it.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Extent::Hole(len),
        Err(_) => {
            file.refusals.seek_data.set();
            Extent::Data(len)
        }
        Ok(data) if data > offset => {
            // A hole is only reported as far as whole units go.
            let hole = (data - offset).min(len);
            let whole = if hole < len { hole - hole % unit } else { hole };
            if whole == 0 {
                Extent::Data(unit.min(len))
            } else {
                Extent::Hole(whole)
            }
        }
        Ok(_) => match sys::seek_hole(file.as_fd(), offset) {
            Ok(hole) if hole > offset => {
                file.known_data.learn(look, offset..hole);
                known_data(offset, hole, unit, len)
            }
            // Somebody punched it in between, or the file system makes no sense: data is always safe to say.
            _ => Extent::Data(len),
        },
    }
}

/// What a file is at `offset`, as far as that is known without looking at it.
pub(crate) fn known_extent_at(file: &OpenFile, offset: u64, len: u64) -> Option<Extent> {
    let end = file.known_data.end(offset)?;
    Some(known_data(offset, end, file.offset_alignment(), len))
}

fn known_data(offset: u64, end: u64, unit: u64, len: u64) -> Extent {
    Extent::Data((end - offset).next_multiple_of(unit).min(len))
}

/// Copies between files in the kernel, sharing blocks where the file system can.
pub(crate) fn copy_range(
    from: &OpenFile,
    from_offset: u64,
    to: &OpenFile,
    to_offset: u64,
    len: u64,
) -> io::Result<()> {
    let _forget = to.known_data.forgotten_at_the_end();
    if !from.is_regular() || !to.is_regular() || to.refusals.copy_range.is_set() {
        return Err(unsupported());
    }
    let block = to.block_size().max(from.block_size());
    let aligned = [from_offset, to_offset, len]
        .iter()
        .all(|number| number.is_multiple_of(block));
    // Sharing within one file is left to copy_file_range, which knows about overlaps.
    if aligned
        && !to.refusals.clone_range.is_set()
        && from.identity() != to.identity()
        && from_offset.saturating_add(len) <= from.query_length()?
    {
        let result =
            retry(|| sys::clone_range(from.as_fd(), from_offset, to.as_fd(), to_offset, len));
        match result {
            Ok(()) => return Ok(()),
            // Not this file system, not these files, or not this alignment.
            Err(_) => to.refusals.clone_range.set(),
        }
    }
    let mut done = 0;
    while done < len {
        let step = (len - done).min(1 << 30) as usize;
        let result = retry(|| {
            sys::copy_file_range(
                from.as_fd(),
                from_offset + done,
                to.as_fd(),
                to_offset + done,
                step,
            )
        });
        match result {
            // The source ends here: the rest reads as zeroes.
            Ok(0) => {
                return match write_zeroes(to, to_offset + done, len - done, true) {
                    Err(error) if is_unsupported(&error) => {
                        write_buffer_zeroes(to, to_offset + done, len - done)
                    }
                    result => result,
                };
            }
            Ok(copied) => done += copied as u64,
            Err(error) => {
                let refused = is_unsupported(&error)
                    || matches!(
                        error.raw_os_error(),
                        Some(libc::EXDEV | libc::EINVAL | libc::ETXTBSY)
                    );
                if !refused {
                    return Err(error);
                }
                if error.raw_os_error() != Some(libc::EINVAL) {
                    to.refusals.copy_range.set();
                }
                if done == 0 {
                    return Err(unsupported());
                }
                // "Not supported" must mean that nothing happened, so the rest goes the plain way.
                return copy_through_memory(
                    from,
                    from_offset + done,
                    to,
                    to_offset + done,
                    len - done,
                );
            }
        }
    }
    Ok(())
}

fn read_all(file: &OpenFile, mut buf: IoBufMut, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match retry(|| sys::read_at(file.as_fd(), &mut buf, done, offset + done as u64, 0))? {
            0 => {
                buf.fill_range(done.., 0);
                return Ok(());
            }
            read => done += read,
        }
    }
    Ok(())
}

fn write_all(file: &OpenFile, buf: &IoBuf, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match retry(|| sys::write_at(file.as_fd(), buf, done, offset + done as u64, 0))? {
            0 => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            written => done += written,
        }
    }
    Ok(())
}

fn copy_through_memory(
    from: &OpenFile,
    from_offset: u64,
    to: &OpenFile,
    to_offset: u64,
    len: u64,
) -> io::Result<()> {
    let out_of_memory = |_| io::Error::from_raw_os_error(libc::ENOMEM);
    let mut done = 0;
    while done < len {
        let step = (len - done).min(CHUNK as u64);
        let (lent, buf) = Buffer::try_new(step as usize)
            .map_err(out_of_memory)?
            .lend();
        read_all(from, buf, from_offset + done)?;
        let data = lent
            .reclaim()
            .map_err(|_| io::Error::from_raw_os_error(libc::EIO))?;
        write_all(to, &IoBuf::from(data), to_offset + done)?;
        done += step;
    }
    Ok(())
}

/// Writes zeroes the plain way.
pub(crate) fn write_buffer_zeroes(file: &OpenFile, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let step = (len - done).min(CHUNK as u64);
        write_all(file, &IoBuf::zeroes(step as usize), offset + done)?;
        done += step;
    }
    Ok(())
}

/// Changes the length of a regular file. What is added reads as zeroes. When the space can't be had, the file has its
/// old length again.
pub(crate) fn resize(file: &OpenFile, length: u64, preallocation: Preallocation) -> io::Result<()> {
    let _forget = file.known_data.forgotten_at_the_end();
    let old = file.query_length()?;
    if length <= old || preallocation == Preallocation::Off {
        return retry(|| file.set_len(length));
    }
    let grown = match preallocation {
        Preallocation::Full => fill(file, old, length),
        _ => match fallocate(file, Fallocate::Allocate, old, length - old) {
            // As glibc does it where the file system has no such call.
            Err(error) if is_unsupported(&error) => fill(file, old, length),
            result => result,
        },
    };
    if grown.is_err() {
        // The first error is the one to be told.
        let _ = retry(|| file.set_len(old));
    }
    grown
}

/// What [`resize`] couldn't do, in qemu's words.
pub(crate) const fn resize_failure(preallocation: Preallocation) -> &'static str {
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => "Could not resize file",
        Preallocation::Falloc => "Could not preallocate new data",
        Preallocation::Full => "Could not write zeros for preallocation",
    }
}

fn fill(file: &OpenFile, old: u64, length: u64) -> io::Result<()> {
    if !file.is_direct() {
        write_buffer_zeroes(file, old, length - old)?;
    } else {
        // O_DIRECT writes whole units only: what is cut is put right by the length.
        let unit = file.offset_alignment();
        let start = old - old % unit;
        retry(|| file.set_len(length.next_multiple_of(unit)))?;
        let first = if start < old { start + unit } else { start };
        let end = length.next_multiple_of(unit);
        if first < end {
            write_buffer_zeroes(file, first, end - first)?;
        }
        retry(|| file.set_len(length))?;
    }
    file.sync_all()
}
