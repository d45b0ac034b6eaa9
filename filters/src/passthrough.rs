//! What every filter of this crate has in common: it is as its filtered child is.

use block_core::{
    driver::{Capabilities, ChildRole},
    limits::Limits,
    node::Edges,
    request::Child,
    status::{DriverStatus, StatusFlags},
};

/// What a filter can do because requests that the child can't do itself are carried out by the core when they get there.
const ALWAYS: Capabilities = Capabilities::TRY_MAP;
const WRITABLE: Capabilities = Capabilities::WRITE
    .union(Capabilities::WRITE_ZEROES)
    .union(Capabilities::DISCARD)
    .union(Capabilities::FUA)
    .union(Capabilities::TRUNCATE);
/// What a filter can do only if its child can.
const INHERITED: Capabilities = Capabilities::COMPRESSED
    .union(Capabilities::DISCARD_ZEROES)
    .union(Capabilities::ZERO_INIT)
    .union(Capabilities::GROW);

/// Capabilities of a filter over a child with `child`.
pub(crate) fn capabilities(child: Capabilities, read_only: bool) -> Capabilities {
    let inherited = child & INHERITED;
    if read_only {
        ALWAYS | (inherited - Capabilities::COMPRESSED - Capabilities::GROW)
    } else {
        ALWAYS | WRITABLE | inherited
    }
}

/// The length of the filtered child.
pub(crate) fn length(edges: &Edges) -> u64 {
    edges.child(ChildRole::Filtered).map_or(0, Child::length)
}

/// The limits of the filtered child.
pub(crate) fn limits(edges: &Edges) -> Limits {
    let limits = Limits::default();
    edges
        .child(ChildRole::Filtered)
        .map_or(limits, |child| limits.merge(child.limits()))
}

/// "Ask the child."
pub(crate) const fn status(offset: u64, len: u64) -> DriverStatus {
    DriverStatus {
        flags: StatusFlags::RAW.union(StatusFlags::OFFSET_VALID),
        len,
        file_offset: offset,
    }
}

/// The index of the filtered child as `try_map` wants it.
pub(crate) fn edge(edges: &Edges) -> Option<usize> {
    edges.index(ChildRole::Filtered)
}
