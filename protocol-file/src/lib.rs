//! Regular files and host block devices as storage for the block layer: drivers `file` and `host_device`.
//!
//! ```
//! use block_core::registry::Registry;
//! use protocol_file::FileFactory;
//!
//! let files = FileFactory::new();
//! let registry = Registry::new().with(files.host_device()).with(files);
//! assert!(registry.get("host_device").is_ok());
//! ```
//!
//! | where | what |
//! | --- | --- |
//! | [`FileFactory`], [`HostDeviceFactory`] | what a program registers |
//! | [`Engines`] | io_uring with one shared reactor, and a bounded thread pool; [`Engines::ring_handle`] for executors that turn the ring themselves |
//! | [`FdSets`] | descriptors that were passed in, as `/dev/fdset/N` |
//! | [`FileOptions`], [`Inline`], [`Aio`], [`Locking`] | the options |
//! | `sys` | every system call that the standard library doesn't have; the only place with `unsafe` |
//!
//! A request's buffers belong to the engine from the moment it is queued until the kernel is done with them, whatever
//! becomes of the request's future. Nothing here names an async runtime.

mod counters;
mod create;
mod driver;
mod engine;
mod factory;
mod fd_sets;
mod image_lock;
mod inline;
mod known_data;
mod open_file;
mod options;
mod space;
mod sys;
mod transfer;

pub use self::{
    driver::FileDriver,
    engine::{EngineConfig, Engines, Reactor, RingHandle},
    factory::{FileFactory, FileMode, HostDeviceFactory, is_device},
    fd_sets::FdSets,
    image_lock::Locking,
    options::{Aio, FileCreateOptions, FileOptions, Inline},
};
