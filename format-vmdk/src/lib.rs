//! VMware disk images: monolithicSparse (one file of grains, with tables and a text descriptor inside) and
//! monolithicFlat (a descriptor and a file of plain data).
//!
//! [`VmdkFactory`] is what a program registers. Other kinds of image are refused by their name, before anything
//! is written. Where things are on disk stands in `layout.rs` and `descriptor.rs`, which do no I/O; what keeps
//! concurrent requests and power cuts from doing harm is written down at the top of `sparse.rs` and `tables.rs`.
//!
//! ```
//! use std::sync::Arc;
//!
//! use block_core::{Graph, OpenOptions, Options, PermissionSet, Permissions, Registry};
//! use env_tokio::EnvTokio;
//! use protocol_file::FileFactory;
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("disk.vmdk");
//! let name = path.to_str().ok_or("not UTF-8")?;
//! let env = Arc::new(EnvTokio::new(1)?);
//! let graph = Graph::new(env.clone());
//! let drivers = Registry::new().with(FileFactory::new()).with(format_vmdk::VmdkFactory);
//! let registry = Arc::new(drivers);
//! env.block_on(async {
//!     let size = Options::new().with("size", 1 << 20);
//!     registry.create(&graph, "vmdk", name, size).await?;
//!     let (options, how) = (Options::new(), OpenOptions::default());
//!     let node = registry.open_file(&graph, name, Some("vmdk"), options, how).await?;
//!     let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
//!     let disk = graph.attach(&node, reader, "reader")?;
//!     assert_eq!(disk.length(), 1 << 20);
//!     disk.close().await
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod check;
mod claims;
mod create;
mod descriptor;
mod driver;
mod factory;
mod info;
mod layout;
mod space;
mod sparse;
mod tables;

#[cfg(test)]
mod tests;

pub use self::{driver::VmdkDriver, factory::VmdkFactory};
