//! Per-node counters. Relaxed: they are for people and for tests that prove that something happened.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// What a request was, for counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counted {
    Read,
    Write,
    Zero,
    Discard,
    Truncate,
    Exclusive,
    Other,
}

/// Live counters of one node.
#[derive(Debug, Default)]
pub struct NodeStats {
    read_ops: AtomicU64,
    read_bytes: AtomicU64,
    write_ops: AtomicU64,
    write_bytes: AtomicU64,
    zero_ops: AtomicU64,
    zero_bytes: AtomicU64,
    discard_ops: AtomicU64,
    discard_bytes: AtomicU64,
    flush_ops: AtomicU64,
    failed_ops: AtomicU64,
    gate_waits: AtomicU64,
    dropped: AtomicU64,
}

/// Counters of a node at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StatsSnapshot {
    /// Reads that ended.
    pub read_ops: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes that ended.
    pub write_ops: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Zero writes that ended.
    pub zero_ops: u64,
    /// Bytes zeroed.
    pub zero_bytes: u64,
    /// Discards that ended.
    pub discard_ops: u64,
    /// Bytes discarded.
    pub discard_bytes: u64,
    /// Flushes that reached the driver.
    pub flush_ops: u64,
    /// Requests that failed.
    pub failed_ops: u64,
    /// Requests that had to wait at the gate.
    pub gate_waits: u64,
    /// Requests whose future was dropped while they were with the driver.
    pub dropped: u64,
}

impl NodeStats {
    pub(crate) fn ended(&self, what: Counted, bytes: u64, ok: bool) {
        let (ops, total) = match what {
            Counted::Read => (&self.read_ops, &self.read_bytes),
            Counted::Write => (&self.write_ops, &self.write_bytes),
            Counted::Zero => (&self.zero_ops, &self.zero_bytes),
            Counted::Discard => (&self.discard_ops, &self.discard_bytes),
            Counted::Truncate | Counted::Exclusive | Counted::Other => {
                if !ok {
                    self.failed_ops.fetch_add(1, Ordering::Relaxed);
                }
                return;
            }
        };
        ops.fetch_add(1, Ordering::Relaxed);
        if ok {
            total.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed_ops.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn flushed(&self) {
        self.flush_ops.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn waited(&self) {
        self.gate_waits.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters now.
    pub fn snapshot(&self) -> StatsSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StatsSnapshot {
            read_ops: get(&self.read_ops),
            read_bytes: get(&self.read_bytes),
            write_ops: get(&self.write_ops),
            write_bytes: get(&self.write_bytes),
            zero_ops: get(&self.zero_ops),
            zero_bytes: get(&self.zero_bytes),
            discard_ops: get(&self.discard_ops),
            discard_bytes: get(&self.discard_bytes),
            flush_ops: get(&self.flush_ops),
            failed_ops: get(&self.failed_ops),
            gate_waits: get(&self.gate_waits),
            dropped: get(&self.dropped),
        }
    }
}
