//! The qcow2 image format: versions 2 and 3.
//!
//! What is where on disk is in [`layout`], free of I/O. The driver keeps L2 slices and refcount blocks in caches
//! (`cache`), allocates and frees host clusters (`alloc`), carries out requests (`io`), and writes its metadata back in
//! an order that a power cut can't turn into corruption (`writeback`). Nothing here opens files or names a runtime.
//!
//! [`Qcow2Factory`] is what a program registers.
#![forbid(unsafe_code)]

mod alloc;
mod cache;
pub mod check;
mod claims;
pub mod compress;
mod counters;
pub mod create;
mod driver;
pub mod header_update;
mod image;
pub mod info;
mod io;
pub mod layout;
pub mod measure;
mod meta;
mod open;
mod overlap;
mod preallocate;
mod resize;
mod writeback;

pub use open::Qcow2Factory;
