//! What a node can take in one driver call (digest of block semantics, section 1.3). No behaviour beyond merging.

/// The limits of a node, in bytes unless said otherwise; 0 means "no limit".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Every driver call is a multiple of this; a power of two, at least 1.
    pub request_alignment: u64,
    /// The largest read or write; larger ones are split inside their tracked range.
    pub max_transfer: u64,
    /// What the driver likes best.
    pub opt_transfer: u64,
    /// Bulk zero writes are aligned to this; head and tail go in calls of their own. At least `request_alignment`.
    pub zeroes_alignment: u64,
    /// The largest zero write.
    pub max_zeroes: u64,
    /// Bulk discards are aligned to this.
    pub discard_alignment: u64,
    /// The largest discard.
    pub max_discard: u64,
    /// Addresses of buffers must be multiples of this.
    pub memory_alignment: usize,
    /// The largest number of segments in a buffer.
    pub max_segments: usize,
    /// Serialising requests are rounded out to this: the cluster or grain size, at least `request_alignment`.
    pub serialising_granularity: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            max_transfer: 0,
            opt_transfer: 0,
            zeroes_alignment: 0,
            max_zeroes: 0,
            discard_alignment: 0,
            max_discard: 0,
            memory_alignment: 1,
            max_segments: 1024,
            serialising_granularity: 1,
        }
    }
}

const fn min_non_zero(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, x) | (x, 0) => x,
        (a, b) if a < b => a,
        (_, b) => b,
    }
}

/// The largest multiple of `align` that fits a maximum of `max` bytes: at least one unit, because a call can't be
/// smaller; 0 stays 0, "no limit".
pub(crate) const fn fit_max(max: u64, align: u64) -> u64 {
    if max == 0 || align <= 1 {
        return max;
    }
    if max < align {
        align
    } else {
        max - max % align
    }
}

impl Limits {
    /// The limits that a filter or raw format inherits from a child: the larger alignments, the smaller maxima. The
    /// maxima are multiples of the alignment that every call has to keep.
    #[must_use]
    pub fn merge(self, child: Self) -> Self {
        let align = self.request_alignment.max(child.request_alignment);
        let max = |a, b| fit_max(min_non_zero(a, b), align);
        Self {
            request_alignment: align,
            max_transfer: max(self.max_transfer, child.max_transfer),
            opt_transfer: self.opt_transfer.max(child.opt_transfer),
            zeroes_alignment: self.zeroes_alignment.max(child.zeroes_alignment),
            max_zeroes: max(self.max_zeroes, child.max_zeroes),
            discard_alignment: self.discard_alignment.max(child.discard_alignment),
            max_discard: max(self.max_discard, child.max_discard),
            memory_alignment: self.memory_alignment.max(child.memory_alignment),
            max_segments: self.max_segments.min(child.max_segments),
            serialising_granularity: self
                .serialising_granularity
                .max(child.serialising_granularity),
        }
    }
}
