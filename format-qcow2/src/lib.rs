//! The qcow2 image format: versions 2 and 3.
//!
//! What is where on disk is in [`layout`], free of I/O. The driver keeps L2 slices and refcount blocks in caches
//! (`cache`), allocates and frees host clusters (`alloc`), carries out requests (`io`), and writes its metadata back in
//! an order that a power cut can't turn into corruption (`writeback`). Nothing here opens files or names a runtime.
#![forbid(unsafe_code)]

pub mod layout;
pub mod compress;
pub mod create;
pub mod header_update;
pub mod info;
pub mod measure;
