//! The deterministic races: a chosen request to the storage is parked, another request arrives, and then the first is
//! let go. Each case holds for every driver that has what it needs.

mod cancelled;
mod free;
mod gate;
mod graph;
mod image;
mod merge;
mod resize;
pub mod shared;
pub mod with_jobs;

pub use self::image::{ClusterKind, Image, Setup, cluster_size, owner};
use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = gate::cases();
    cases.extend(free::cases());
    cases.extend(merge::cases());
    cases.extend(cancelled::cases());
    cases.extend(resize::cases());
    cases.extend(graph::cases());
    cases
}
