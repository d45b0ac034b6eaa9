//! Dirty bitmaps: which granules of a node were written (digest of block semantics, section 10).
//!
//! * [`DirtyBitmap`] is the bits: one per granule, sparse, marked by the request path after every write, zero write,
//!   discard and copy, whether it succeeded or not. Jobs use it as it is, without a name.
//! * [`NamedBitmap`] is a bitmap that users know by name: it can be busy, read-only, inconsistent, and persistent, which
//!   means that the image stores it.
//! * [`Bitmaps`] is what an embedder works with: adds, removes, clears, enables, disables and merges the named bitmaps of
//!   a node. Get it from a handle, a graph or a node (`named_bitmaps()`).
//!
//! How bitmaps are stored is a format's business ([`crate::driver::Capabilities::PERSISTENT_BITMAPS`]).

mod dirty;
mod named;
mod ops;
mod tree;

pub use dirty::DirtyBitmap;
pub use named::{BitmapInfo, BitmapUse, BusyBitmap, NamedBitmap};
pub(crate) use ops::load;
pub use ops::{Bitmaps, NewBitmap};

/// The longest name of a bitmap, in bytes.
pub const MAX_NAME: usize = 1023;
/// The smallest granularity, in bytes.
pub const MIN_GRANULARITY: u64 = 512;
/// The largest granularity that a named bitmap may have, in bytes.
pub const MAX_GRANULARITY: u64 = 1 << 31;
