//! Zero writes, discards and writes by kind of cluster: what each kind becomes, what is left of it, and what happens to the
//! place that it had. Every kind meets every operation; then ranges over many clusters of all kinds, and reuse.

mod kinds;
mod ranges;
mod reuse;
mod snapshots;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = kinds::cases();
    cases.extend(ranges::cases());
    cases.extend(reuse::cases());
    cases.extend(snapshots::cases());
    cases
}
