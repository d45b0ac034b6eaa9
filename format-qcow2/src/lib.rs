//! The qcow2 image format: versions 2 and 3.
//!
//! What is where on disk is in `layout`, free of I/O. The driver keeps L2 slices and refcount blocks in caches
//! (`cache`), allocates and frees host clusters (`alloc`), carries out requests (`io`), and writes its metadata back in
//! an order that a power cut can't turn into corruption (`writeback`). Nothing here opens files or names a runtime.
//!
//! `Qcow2Factory` is what a program registers.
//!
//! ```
//! use std::sync::Arc;
//!
//! use block_core::{Graph, OpenOptions, Options, PermissionSet, Permissions, Registry};
//! use env_tokio::EnvTokio;
//! use protocol_file::FileFactory;
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("disk.qcow2");
//! let name = path.to_str().ok_or("not UTF-8")?;
//! let env = Arc::new(EnvTokio::new(1)?);
//! let graph = Graph::new(env.clone());
//! let drivers = Registry::new().with(FileFactory::new()).with(format_qcow2::Qcow2Factory::default());
//! let registry = Arc::new(drivers);
//! env.block_on(async {
//!     let size = Options::new().with("size", 1 << 20);
//!     registry.create(&graph, "qcow2", name, size).await?;
//!     let (options, how) = (Options::new(), OpenOptions::default());
//!     let node = registry.open_file(&graph, name, Some("qcow2"), options, how).await?;
//!     let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
//!     let disk = graph.attach(&node, reader, "reader")?;
//!     assert_eq!(disk.length(), 1 << 20);
//!     disk.close().await
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

#[cfg(not(loom))]
mod alloc;
#[cfg(not(loom))]
mod amend;
#[cfg(not(loom))]
pub mod bitmaps;
// The model checker only looks at the slice table: nothing else here is free of locks.
#[cfg_attr(loom, allow(dead_code))]
mod cache;
#[cfg(not(loom))]
pub mod check;
#[cfg(not(loom))]
mod claims;
#[cfg(not(loom))]
mod clean;
#[cfg(not(loom))]
pub mod compress;
#[cfg(not(loom))]
mod counters;
#[cfg(not(loom))]
pub mod create;
#[cfg(not(loom))]
mod data_file;
#[cfg(not(loom))]
mod driver;
#[cfg(not(loom))]
mod encryption;
#[cfg(not(loom))]
mod header_plan;
#[cfg(not(loom))]
pub mod header_update;
#[cfg(not(loom))]
mod image;
#[cfg(not(loom))]
pub mod info;
#[cfg(not(loom))]
mod io;
pub mod layout;
#[cfg(not(loom))]
pub mod measure;
#[cfg(not(loom))]
mod meta;
#[cfg(not(loom))]
mod open;
#[cfg(not(loom))]
mod overlap;
#[cfg(not(loom))]
mod preallocate;
#[cfg(not(loom))]
mod resize;
#[cfg(not(loom))]
mod settings;
#[cfg(not(loom))]
mod snapshots;
#[cfg(not(loom))]
mod trim;
#[cfg(not(loom))]
mod vm_state;
#[cfg(not(loom))]
mod writeback;

#[cfg(not(loom))]
pub use open::Qcow2Factory;
