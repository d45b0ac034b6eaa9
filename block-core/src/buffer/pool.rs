//! [`BufferPool`], memory kept for the next bounce buffer. It bounds what lies idle, not what is in use.
#![deny(unsafe_code)]

use std::fmt;

use parking_lot::Mutex;

use super::{Buffer, DEFAULT_ALIGNMENT};
use crate::error::{Error, ErrorKind, Result};

/// Aligned buffers that are used over and over, for bouncing requests.
///
/// ```
/// use block_core::buffer::{BufferPool, IoBuf};
///
/// let pool = BufferPool::new(1 << 20);
/// let mut bounce = pool.get(5000);
/// bounce.fill(1);
/// let data = IoBuf::from(bounce);
/// // … written …
/// if let Ok(bounce) = data.try_into_buffer() {
///     pool.put(bounce);
/// }
/// assert_eq!(pool.idle_bytes(), 8192);
/// assert_eq!(pool.get(8000).len(), 8000); // the same memory: the content is anything
/// assert_eq!(pool.idle_bytes(), 0);
/// ```
///
/// A buffer that isn't put back is freed like any other.
pub struct BufferPool {
    max_bytes: usize,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// By class: those at index `i` have a capacity of `DEFAULT_ALIGNMENT << i`.
    classes: Vec<Vec<Buffer>>,
    /// The sum of all capacities.
    bytes: usize,
}

/// The index of the smallest class whose capacity is `len` at least.
fn class_of(len: usize) -> usize {
    len.div_ceil(DEFAULT_ALIGNMENT)
        .max(1)
        .checked_next_power_of_two()
        .map_or(usize::BITS as usize, |pages| {
            pages.trailing_zeros() as usize
        })
}

fn capacity_of(class: usize) -> Option<usize> {
    let capacity = DEFAULT_ALIGNMENT.checked_shl(u32::try_from(class).ok()?)?;
    (capacity >> class == DEFAULT_ALIGNMENT).then_some(capacity)
}

impl BufferPool {
    /// A pool that keeps at most `max_bytes` while nobody uses them.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            idle: Mutex::default(),
        }
    }

    /// A buffer of `len` bytes, aligned to [`DEFAULT_ALIGNMENT`], whose content is unspecified, though initialised: it may
    /// be what somebody else left there, so that whoever shows it to a guest overwrites all of it first.
    ///
    /// # Panics
    ///
    /// If there is no memory.
    pub fn get(&self, len: usize) -> Buffer {
        match self.try_get(len) {
            Ok(buffer) => buffer,
            Err(error) => panic!("{error}"),
        }
    }

    /// Like [`get`](Self::get), with an error of kind [`ErrorKind::OutOfMemory`] if there is no memory.
    pub fn try_get(&self, len: usize) -> Result<Buffer> {
        let class = class_of(len);
        let capacity = capacity_of(class).ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfMemory,
                format!("cannot allocate {len} bytes"),
            )
        })?;
        if capacity > self.max_bytes {
            // `put` wouldn't keep it, so there is none, and no reason to round up.
            return Buffer::try_new(len);
        }
        let kept = {
            let mut idle = self.idle.lock();
            let kept = idle.classes.get_mut(class).and_then(Vec::pop);
            idle.bytes -= kept.as_ref().map_or(0, Buffer::capacity);
            kept
        };
        let mut buffer = match kept {
            Some(buffer) => buffer,
            None => Buffer::try_new(capacity)?,
        };
        buffer.resize(len);
        Ok(buffer)
    }

    /// Keeps `buffer` for the next [`get`](Self::get), or frees it if that would be too much, or if it isn't of a size and
    /// alignment that `get` gives out.
    pub fn put(&self, buffer: Buffer) {
        let capacity = buffer.capacity();
        let class = class_of(capacity);
        if capacity_of(class) != Some(capacity) || buffer.alignment() < DEFAULT_ALIGNMENT {
            return;
        }
        let mut idle = self.idle.lock();
        if capacity > self.max_bytes.saturating_sub(idle.bytes) {
            return; // which frees the buffer after the lock: nobody waits for that
        }
        idle.bytes += capacity;
        if idle.classes.len() <= class {
            idle.classes.resize_with(class + 1, Vec::new);
        }
        idle.classes[class].push(buffer);
    }

    /// How many bytes are kept at the moment.
    pub fn idle_bytes(&self) -> usize {
        self.idle.lock().bytes
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool")
            .field("max_bytes", &self.max_bytes)
            .field("idle_bytes", &self.idle_bytes())
            .finish_non_exhaustive()
    }
}
