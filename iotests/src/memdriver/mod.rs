//! A small copy-on-write format as somebody outside of the project would write it, who has read the driver contract
//! and nothing else.
//!
//! It has a mapping table, an allocator that hands out a freed cluster at once, copy-on-write from a backing file, zero
//! clusters, and it drops its lock during data I/O. It has **no safeguard of its own** against a discard that overtakes
//! a write: no pins, no ownership checks, no quarantine. That the race tests pass with it all the same proves that the
//! gate of the request path protects any driver; that they fail without the gate proves that the tests see anything.
//!
//! What it does itself, because the contract says so: it orders allocations of the same cluster. What it isn't:
//! crash-safe (the whole table is written at each flush).
//!
//! On disk, little-endian: `IOTESTS3`, cluster size (u32), 4 unused bytes, size (u64), then at 512 one u64 per guest
//! cluster (0: unallocated, 1: zero, else the offset of its data in the file).

mod create;
mod driver;
mod table;

pub use self::{create::ThirdPartyFactory, driver::ThirdParty};

/// The driver's name.
pub const NAME: &str = "thirdparty";
