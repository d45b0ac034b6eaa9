//! What the filters of jobs have in common: they are as their filtered child is, for everything that they don't do
//! themselves.

use block_core::{
    driver::{Capabilities, ChildRole},
    error::{Error, Result},
    limits::Limits,
    node::Edges,
    request::{Child, Request},
    status::{DriverStatus, StatusFlags},
};

/// What a job's filter can do; requests that the child can't do are refused when they get there.
pub(crate) const CAPABILITIES: Capabilities = Capabilities::WRITE
    .union(Capabilities::WRITE_ZEROES)
    .union(Capabilities::DISCARD)
    .union(Capabilities::FUA)
    .union(Capabilities::COMPRESSED);

/// The length of the filtered child.
pub(crate) fn length(edges: &Edges) -> u64 {
    edges.child(ChildRole::Filtered).map_or(0, Child::length)
}

/// The limits of the filtered child, with serialising requests rounded out to at least `granularity` bytes.
pub(crate) fn limits(edges: &Edges, granularity: u64) -> Limits {
    let limits = Limits::default();
    let mut limits = edges
        .child(ChildRole::Filtered)
        .map_or(limits, |child| limits.merge(child.limits()));
    limits.serialising_granularity = limits.serialising_granularity.max(granularity);
    limits
}

/// "Ask the child."
pub(crate) const fn status(offset: u64, len: u64) -> DriverStatus {
    DriverStatus {
        flags: StatusFlags::RAW.union(StatusFlags::OFFSET_VALID),
        len,
        file_offset: offset,
    }
}

/// The filtered child of the request's node.
pub(crate) fn filtered(request: &Request) -> Result<&Child> {
    request.child(ChildRole::Filtered).ok_or_else(|| {
        Error::io("the filter has no filtered child").with_node(request.node().name())
    })
}

/// The target child of the request's node.
pub(crate) fn target(request: &Request) -> Result<&Child> {
    request
        .child(ChildRole::Target)
        .ok_or_else(|| Error::io("the filter has no target child").with_node(request.node().name()))
}
