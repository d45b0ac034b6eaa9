//! Chains of images: who decides what a guest sees, what block status says of it, what is copied up and what must stay below,
//! layers of different lengths, and changes of what an image names as its backing file.

mod content;
mod copy;
mod map;
mod populate;
mod status;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = status::cases();
    cases.extend(content::cases());
    cases.extend(populate::cases());
    cases.extend(copy::cases());
    cases.extend(map::cases());
    cases
}
