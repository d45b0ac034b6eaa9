//! Drained sections and changes of the graph while I/O goes on: who is stopped and who isn't, which edges a request uses,
//! what is refused, and that a refused or abandoned change leaves everything as it was.

mod backing;
mod drain;
mod filters;
mod nodes;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = drain::cases();
    cases.extend(filters::cases());
    cases.extend(backing::cases());
    cases.extend(nodes::cases());
    cases
}
