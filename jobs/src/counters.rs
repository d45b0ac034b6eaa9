//! What a job did, in numbers: for people, and for tests that must prove that something happened. Relaxed counters; no
//! decision hangs on them.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Live counters of one job.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    copied: AtomicU64,
    zeroed: AtomicU64,
    skipped: AtomicU64,
    beside_guest: AtomicU64,
    copied_before_write: AtomicU64,
    written_through: AtomicU64,
    chunks: AtomicU64,
    retries: AtomicU64,
    read_errors: AtomicU64,
    write_errors: AtomicU64,
}

/// The counters of a job at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobCounters {
    /// Bytes copied as data.
    pub bytes_copied: u64,
    /// Bytes that were made zero at the target.
    pub bytes_zeroed: u64,
    /// Bytes that needed no copy.
    pub bytes_skipped: u64,
    /// Of the bytes copied and zeroed, those of chunks in which the guest had a request in flight or wrote while they
    /// were being copied.
    pub bytes_while_guest_wrote: u64,
    /// Bytes that were copied on behalf of a guest's write (copy-before-write).
    pub bytes_copied_before_write: u64,
    /// Bytes that guest writes wrote to the target themselves (write-blocking mirror).
    pub bytes_written_through: u64,
    /// Chunks that were worked on.
    pub chunks: u64,
    /// Chunks that were tried again after an error.
    pub retries: u64,
    /// Errors seen while reading.
    pub read_errors: u64,
    /// Errors seen while writing.
    pub write_errors: u64,
}

/// What copying one chunk came to, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    pub copied: u64,
    pub zeroed: u64,
    pub skipped: u64,
    /// The guest was at the same range meanwhile.
    pub beside_guest: bool,
}

impl Copied {
    /// What costs bandwidth.
    pub(crate) const fn moved(&self) -> u64 {
        self.copied
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn chunk(&self, copied: &Copied) {
        add(&self.chunks, 1);
        add(&self.copied, copied.copied);
        add(&self.zeroed, copied.zeroed);
        add(&self.skipped, copied.skipped);
        if copied.beside_guest {
            add(&self.beside_guest, copied.copied + copied.zeroed);
        }
    }

    pub(crate) fn copied_before_write(&self, bytes: u64) {
        add(&self.copied_before_write, bytes);
        add(&self.beside_guest, bytes);
    }

    pub(crate) fn written_through(&self, bytes: u64) {
        add(&self.written_through, bytes);
        add(&self.beside_guest, bytes);
    }

    pub(crate) fn retry(&self) {
        add(&self.retries, 1);
    }

    pub(crate) fn error(&self, write: bool) {
        add(
            if write {
                &self.write_errors
            } else {
                &self.read_errors
            },
            1,
        );
    }

    pub(crate) fn snapshot(&self) -> JobCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        JobCounters {
            bytes_copied: get(&self.copied),
            bytes_zeroed: get(&self.zeroed),
            bytes_skipped: get(&self.skipped),
            bytes_while_guest_wrote: get(&self.beside_guest),
            bytes_copied_before_write: get(&self.copied_before_write),
            bytes_written_through: get(&self.written_through),
            chunks: get(&self.chunks),
            retries: get(&self.retries),
            read_errors: get(&self.read_errors),
            write_errors: get(&self.write_errors),
        }
    }
}
