//! A worked example of a driver: the *ledger* format, as somebody outside of the project would write it, who has read
//! the driver contract (`block_core::driver`) and `docs/writing-a-driver.md`. Small, and whole: nothing is left out that keeps
//! a disk from being corrupted.
//!
//! A guest's disk is cut into clusters. Two tables in the file say where they are:
//!
//! - the **map** has an entry per guest cluster: nothing here, zeroes, or the host cluster that holds its data;
//! - the **ledger** has an entry per host cluster: the guest cluster that owns it, the format itself, or nobody.
//!
//! The two say the same thing twice, so that a check can compare them, and so that a power cut between the write of one
//! and the write of the other leaves something that can be told apart: a cluster with an owner that doesn't link
//! to it is *leaked*, which wastes space and hurts nobody.
//!
//! | file | what it is |
//! | --- | --- |
//! | `layout.rs` | the bytes on disk: the header, the entries. No I/O |
//! | `table.rs` | a table in memory, and which of its blocks the file doesn't have yet. No I/O |
//! | `space.rs` | the ledger, what is free, and what is on its way to be. No I/O |
//! | `claims.rs` | guest clusters that somebody is allocating right now |
//! | `image.rs` | an open image: how pieces of requests find, get and give back clusters |
//! | `write_back.rs` | how changes get to the disk, in an order that survives a power cut |
//! | `check.rs` | comparing the two tables, and repair |
//! | `driver.rs` | the driver trait, in terms of all these |
//! | `factory.rs` | probe, open, create |
//!
//! What it doesn't have: compression, snapshots, tables larger than memory. It never says that it does.

#![forbid(unsafe_code)]

mod check;
pub mod claims;
mod driver;
mod factory;
mod image;
pub mod layout;
pub mod space;
pub mod table;
mod write_back;

pub use self::{driver::Ledger, factory::LedgerFactory};

/// The driver's name, as in `"driver": "ledger"`.
pub const NAME: &str = "ledger";
