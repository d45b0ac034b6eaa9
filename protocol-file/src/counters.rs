//! What a file driver counts, so that a test can prove that a path was taken. Relaxed: nothing is ordered by them.

use std::sync::atomic::{AtomicU64, Ordering};

/// One count.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) inline_reads: Count,
    pub(crate) inline_writes: Count,
    pub(crate) queued_reads: Count,
    pub(crate) queued_writes: Count,
    pub(crate) bounced: Count,
    pub(crate) flushes: Count,
    pub(crate) zeroes: Count,
    pub(crate) discards: Count,
    pub(crate) copies: Count,
    pub(crate) known_data: Count,
}

impl Counters {
    pub(crate) fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("inline-reads", self.inline_reads.get()),
            ("inline-writes", self.inline_writes.get()),
            ("queued-reads", self.queued_reads.get()),
            ("queued-writes", self.queued_writes.get()),
            ("bounced", self.bounced.get()),
            ("flushes", self.flushes.get()),
            ("zero-writes", self.zeroes.get()),
            ("discards", self.discards.get()),
            ("range-copies", self.copies.get()),
            ("known-data", self.known_data.get()),
        ]
    }
}
