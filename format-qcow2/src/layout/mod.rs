//! What is where in a qcow2 image, free of I/O: units, the header and its extensions, table entries, refcounts.
//!
//! The files here decode and encode bytes and say what is allowed; none of them reads or writes a file.

pub mod entry;
pub mod extensions;
pub mod header;
pub mod refcount;
mod refusal;
pub mod snapshot;
pub mod units;

pub use entry::{
    CompressedRun, EntryProblem, L1Entry, L2Entry, RawEntry, Space, SubclusterKind, Subclusters,
};
pub use extensions::Extensions;
pub use header::{Autoclear, Compatible, Header, Incompatible};
pub use refcount::Refcounts;
pub use snapshot::SnapshotEntry;
pub use units::{ClusterIndex, Geometry, GuestOffset, HostCluster, HostOffset};
