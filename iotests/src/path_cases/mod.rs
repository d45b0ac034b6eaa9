//! The request path, one branch after the other: what is refused, how requests are padded and split, what each flag does,
//! what is recorded, and what a flush covers. A probe above the image tells which calls the core made of a request; the
//! content is compared with an exact model. Nothing here depends on what a cluster is made of.

mod align;
mod buffers;
mod busy;
mod compressed;
mod flags;
mod flush;
mod range;
mod record;
mod split;
mod storage;
mod zeroes;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = range::cases();
    cases.extend(align::cases());
    cases.extend(split::cases());
    cases.extend(zeroes::cases());
    cases.extend(flags::cases());
    cases.extend(compressed::cases());
    cases.extend(busy::cases());
    cases.extend(buffers::cases());
    cases.extend(record::cases());
    cases.extend(flush::cases());
    cases.extend(storage::cases());
    cases
}
