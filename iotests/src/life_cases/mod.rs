//! The life of an image: it grows and shrinks with I/O going on, changes between read-only and writable, is closed with
//! everything in place, and is used by several at once as far as they allow each other.

mod close;
mod permissions;
mod reopen;
mod resize;
mod resize_io;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = resize::cases();
    cases.extend(resize_io::cases());
    cases.extend(reopen::cases());
    cases.extend(close::cases());
    cases.extend(permissions::cases());
    cases
}
