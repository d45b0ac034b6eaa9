//! The core of the block layer: drivers, nodes, tracked requests, and the one path that every request takes.
//!
//! A program makes a [`graph::Graph`] with its [`env::Environment`], a [`registry::Registry`] of the drivers that it
//! links, opens images, and attaches a [`handle::BlockHandle`] to a node. A driver implements
//! [`driver::BlockDriver`] and gets alignment, tracking, serialising, drain, jobs and exports for nothing.
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
};
