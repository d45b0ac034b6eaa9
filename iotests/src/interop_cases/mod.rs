//! The installed qemu tools on the other side: what they make is read alike, what is made here is clean and the same for them,
//! and images go back and forth between the two. Where a tool isn't installed, or doesn't know the format, that is said.

mod bench;
mod ours;
mod theirs;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = theirs::cases();
    cases.extend(ours::cases());
    cases
}
