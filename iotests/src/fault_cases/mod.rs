//! The n-th request to the storage fails, for every kind of request and every n: in a workload, and in opening, creating,
//! checking, repairing, resizing and rewriting an image. Each time the error has to reach whoever asked, and what was
//! flushed has to be there, also after a cut of the power.

mod image;
mod model;
mod nth;
mod sticky;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = nth::cases();
    cases.extend(image::cases());
    cases.extend(sticky::cases());
    cases
}
