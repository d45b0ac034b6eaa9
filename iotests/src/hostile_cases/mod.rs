//! Damaged and malicious images: whatever is in the storage, opening, reading, writing, checking and repairing it ends, within
//! bounds, in success or in an error that names the file; never in a panic, never in a hang; and an image that is refused
//! isn't changed. The damage is made without knowing the format: in the words of the header, in what may be pointers, in
//! single bits, and by cutting the file off.

mod backing;
mod damage;
mod victim;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = damage::cases();
    cases.extend(backing::cases());
    // What is left is the damage.
    cases.into_iter().map(Case::leaves_damage).collect()
}
