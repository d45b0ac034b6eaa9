//! Counters that prove that something happened. They decide nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counted since the image was opened.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Frees that had to wait because a pin was still held when their unlink became durable.
    pub frees_deferred: AtomicU64,
    /// Clusters that were filled from their old content because a write covered them in part.
    pub copies_on_write: AtomicU64,
    /// Links or frees of clusters that were no longer the request's own.
    pub ownership_violations: AtomicU64,
    /// L2 slices dropped from the cache.
    pub evictions: AtomicU64,
    /// L2 slices read.
    pub slice_loads: AtomicU64,
    /// Write-back batches.
    pub batches: AtomicU64,
    /// Flushes of the file that order writes.
    pub barriers: AtomicU64,
    /// Host clusters allocated.
    pub allocated: AtomicU64,
    /// References to host clusters dropped.
    pub freed: AtomicU64,
    /// The most clusters that the quarantine ever held.
    pub quarantine_peak: AtomicU64,
    /// Punches passed down, after merging.
    pub punches: AtomicU64,
    /// Writes that waited for another allocation of the same guest cluster.
    pub claim_waits: AtomicU64,
    /// Times that the quarantine was drained because the storage was full.
    pub reclaims: AtomicU64,
    /// L2 tables that a shrink dropped.
    pub tables_dropped: AtomicU64,
    /// Refcount blocks that a shrink dropped.
    pub refblocks_dropped: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub fn max(counter: &AtomicU64, n: u64) {
        counter.fetch_max(n, Ordering::Relaxed);
    }

    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("frees-deferred-by-pins", get(&self.frees_deferred)),
            ("copies-on-write", get(&self.copies_on_write)),
            (
                "ownership-violations-caught",
                get(&self.ownership_violations),
            ),
            ("evictions", get(&self.evictions)),
            ("slice-loads", get(&self.slice_loads)),
            ("batches", get(&self.batches)),
            ("barriers", get(&self.barriers)),
            ("clusters-allocated", get(&self.allocated)),
            ("clusters-freed", get(&self.freed)),
            ("quarantine-peak", get(&self.quarantine_peak)),
            ("punches", get(&self.punches)),
            ("claim-waits", get(&self.claim_waits)),
            ("reclaims", get(&self.reclaims)),
            ("tables-dropped", get(&self.tables_dropped)),
            ("refcount-blocks-dropped", get(&self.refblocks_dropped)),
        ]
    }
}
