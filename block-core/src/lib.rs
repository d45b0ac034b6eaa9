//! The core of the block layer: drivers, nodes, tracked requests, and the one path that every request takes.
//!
//! A program makes a [`graph::Graph`] with its [`env::Environment`], a [`registry::Registry`] of the drivers that it
//! links, opens images, and attaches a [`handle::BlockHandle`] to a node. A driver implements
//! [`driver::BlockDriver`] and gets alignment, tracking, serialising, drain, jobs and exports for nothing.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use block_core::{
//!     Environment, Graph, OpenOptions, Options, PermissionSet, Permissions, Registry, RequestFlags,
//! };
//!
//! # async fn example(env: Arc<dyn Environment>, drivers: Arc<Registry>) -> block_core::Result<()> {
//! let graph = Graph::new(env);
//! let how = OpenOptions::default(); // opens no other file that the image names
//! let node = drivers.open_file(&graph, "disk.qcow2", None, Options::new(), how).await?;
//! let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
//! let disk = graph.attach(&node, PermissionSet::new(used, Permissions::all()), "guest")?;
//!
//! disk.write(0, vec![1; 4096], RequestFlags::empty()).await?;
//! disk.write_zeroes(2048, 2048, RequestFlags::MAY_UNMAP).await?; // waits for the write: they overlap
//! disk.flush().await?;
//! assert_eq!(disk.read(2047, 2).await?[..], [1, 0]);
//! disk.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! What is *not* here: file formats, system calls, an async runtime, threads.

pub mod bitmap;
pub mod buffer;
pub mod chain;
pub mod debug;
mod deferred;
mod drain;
pub mod driver;
pub mod env;
pub mod error;
pub mod flags;
pub mod graph;
pub mod handle;
pub mod image;
pub mod limits;
#[doc(hidden)]
pub mod mutant;
pub mod node;
pub mod observe;
mod open;
pub mod options;
mod path;
mod permissions;
pub mod pins;
pub mod producer;
pub mod registry;
mod reopen;
pub mod request;
pub mod secret;
pub mod snapshot;
#[doc(hidden)]
pub mod space;
pub mod stats;
pub mod status;
pub mod sync;
pub mod tracked;

pub use async_trait::async_trait;

pub use crate::{
    buffer::{Buffer, IoBuf, IoBufMut},
    debug::DebugEvent,
    drain::DrainGuard,
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind},
    env::Environment,
    error::{Error, ErrorKind, Operation, Result},
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::{Graph, NodeSpec},
    handle::BlockHandle,
    node::Node,
    open::resolve_name,
    options::Options,
    path::copy_range,
    producer::ProducerId,
    registry::{DriverFactory, OpenOptions, Registry},
    request::{Child, Request},
    snapshot::{NewSnapshot, SnapshotInfo, SnapshotKey},
};
