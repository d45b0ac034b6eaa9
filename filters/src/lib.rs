//! Nodes that sit between others and belong to no one job, and the null protocol.
//!
//! | driver | what it does |
//! | --- | --- |
//! | `copy-on-read` ([`CopyOnRead`]) | what is read from below its child is written into the child on the way |
//! | `compress` ([`Compress`]) | what is written is stored compressed |
//! | `throttle` ([`Throttle`]) | holds requests back to a rate of bytes and requests per second |
//! | `null-co`, `null-aio` ([`Null`]) | storage that isn't there: swallows writes, for benchmarks and tests |
//!
//! A filter here decides nothing about content and keeps no data. [`register`] adds them all to a registry.
//!
//! ```
//! use std::sync::Arc;
//!
//! use block_core::{Graph, OpenOptions, Options, PermissionSet, Permissions, Registry};
//! use env_tokio::EnvTokio;
//!
//! let env = Arc::new(EnvTokio::new(1)?);
//! let graph = Graph::new(env.clone());
//! let mut registry = Registry::new();
//! filters::register(&mut registry);
//!
//! let registry = Arc::new(registry);
//!
//! let options = Options::from_dotted(
//!     "driver=throttle,limits.iops-total=1000,file.driver=null-co,file.size=1M,file.read-zeroes=on",
//! )?;
//! env.block_on(async {
//!     let node = registry.open(&graph, options, OpenOptions::default()).await?;
//!     let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
//!     let disk = graph.attach(&node, reader, "reader")?;
//!     assert_eq!(disk.length(), 1 << 20);
//!     assert_eq!(disk.read(4096, 4).await?[..], [0; 4]);
//!     disk.close().await
//! })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod bucket;
mod compress;
pub mod copy_on_read;
mod null;
mod passthrough;
mod throttle;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use block_core::registry::Registry;

pub use self::{
    compress::{Compress, CompressFactory},
    copy_on_read::{CopyOnRead, CopyOnReadFactory, Populated},
    null::{Null, NullFactory},
    throttle::{Rates, Throttle, ThrottleFactory},
};

/// Adds the drivers of this crate to `registry`.
pub fn register(registry: &mut Registry) {
    registry.register(Arc::new(CopyOnReadFactory));
    registry.register(Arc::new(ThrottleFactory));
    registry.register(Arc::new(CompressFactory));
    registry.register(Arc::new(NullFactory::default()));
    registry.register(Arc::new(NullFactory::aio()));
}
