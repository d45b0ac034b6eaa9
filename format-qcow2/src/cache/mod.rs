//! What is kept of an image's metadata in memory: slices of L2 tables, looked up by anyone at any time, and refcount
//! blocks, which only the holder of the metadata lock touches.

#[cfg(not(loom))]
pub(crate) mod refcounts;
pub(crate) mod slice;
#[cfg(not(loom))]
pub(crate) mod slices;
