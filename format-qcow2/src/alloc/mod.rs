//! Where new clusters come from, and where freed ones wait until they may be given out again.

pub(crate) mod allocator;
pub(crate) mod quarantine;
