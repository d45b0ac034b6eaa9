//! I/O buffers: memory that belongs to a request until the last I/O on it has ended.
//!
//! | type | what it is | who holds it |
//! | --- | --- | --- |
//! | [`Buffer`] | contiguous, aligned memory of ours; derefs to a slice | the user, while no I/O runs |
//! | [`IoBufMut`] | destination of a read: a unique list of segments | the read request, then its pieces |
//! | [`IoBuf`] | source of a write: a shared, immutable list of segments | the write request, its copies |
//! | [`Lent`] | the claim on a `Buffer` whose memory a read is filling | whoever began the read |
//!
//! A segment keeps its memory alive. A request that is dropped while the kernel still writes to its buffer
//! therefore frees and aliases nothing: the pieces live on in the operation that the kernel has yet to complete,
//! and the user's [`Lent`] gives nothing back before they are gone.
//!
//! ```
//! use block_core::buffer::{Buffer, IoBuf};
//!
//! // A read: lend the buffer, let others fill the pieces in any order, take it back.
//! let (lent, mut whole) = Buffer::new(8192).lend();
//! let mut first = whole.split_to(4096);
//! first.fill(1);
//! drop(first);
//! let lent = lent.reclaim().expect_err("`whole` still holds the second half");
//! whole.fill(2);
//! drop(whole);
//! let buffer = lent.reclaim().expect("every piece is gone");
//! assert_eq!((buffer[4095], buffer[4096]), (1, 2));
//!
//! // A write: the same memory as a source, sliced and joined without copying.
//! let data = IoBuf::from(buffer);
//! let mut padded = IoBuf::zeroes(512);
//! padded.append(data.slice(..512));
//! assert_eq!(padded.len(), 1024);
//! assert_eq!(padded.slice(511..513).to_vec(), [0, 1]);
//! ```
//!
//! Guest memory is wrapped with [`IoBuf::from_raw_parts`] and [`IoBufMut::from_raw_parts`]. The guest may change it at
//! any time, so that no safe method ever makes a reference to it: content goes in and out by copying.
//!
//! This module never does I/O, never waits, and never prints what is in a buffer.

// Lending memory to a kernel, and wrapping memory that a guest shares, can't be written without raw pointers. This is
// one of the two places where the workspace allows `unsafe` (design, section 5). What it all rests on:
//
//  1. A segment's bytes are valid for reads as long as its owner is alive, and each segment holds its owner.
//  2. The bytes of an `IoBufMut` belong to no other `IoBufMut`, `IoBuf` or `Buffer` (memory of ours), and are valid for
//     writes.
//  3. References are made to memory of ours only, never to foreign (guest) memory.
//  4. A `Buffer` is the only holder of its `Arc<Memory>`. It becomes one only by allocation or after `Arc::get_mut` said
//     that nobody else holds it.
#![allow(unsafe_code)]

mod io_buf;
mod io_buf_mut;
mod memory;
mod owned;
mod pool;
mod segment;
mod zero;

#[cfg(test)]
mod tests;

pub use self::{
    io_buf::IoBuf,
    io_buf_mut::IoBufMut,
    owned::{Buffer, DEFAULT_ALIGNMENT, Lent},
    pool::BufferPool,
    zero::is_zero,
};
