//! The raw format: guest bytes lie in the file as they are, from `offset` on, `size` bytes or all that there are.
//!
//! [`RawFactory`] is what a program registers. The driver never interprets content, with one exception: when the
//! format was guessed by probing, it refuses writes that would make the file look like another format
//! (see `guard.rs`).
//!
//! ```
//! use std::sync::Arc;
//!
//! use block_core::{Graph, OpenOptions, Options, PermissionSet, Permissions, Registry};
//! use env_tokio::EnvTokio;
//! use protocol_file::FileFactory;
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("disk.raw");
//! let name = path.to_str().ok_or("not UTF-8")?;
//! let env = Arc::new(EnvTokio::new(1)?);
//! let graph = Graph::new(env.clone());
//! let drivers = Registry::new().with(FileFactory::new()).with(format_raw::RawFactory);
//! let registry = Arc::new(drivers);
//! env.block_on(async {
//!     let size = Options::new().with("size", 1 << 20);
//!     registry.create(&graph, "raw", name, size).await?;
//!     let (options, how) = (Options::new(), OpenOptions::default());
//!     let node = registry.open_file(&graph, name, Some("raw"), options, how).await?;
//!     let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
//!     let disk = graph.attach(&node, reader, "reader")?;
//!     assert_eq!(disk.length(), 1 << 20);
//!     disk.close().await
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod driver;
mod factory;
mod guard;
mod options;

#[cfg(test)]
mod tests;

pub use self::{driver::RawDriver, factory::RawFactory};
