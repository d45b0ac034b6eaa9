//! x

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    Vec::new()
}
