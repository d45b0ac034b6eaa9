//! What each kind of request does. None of it holds the metadata lock during data I/O, and all of it takes the children
//! from the request.

pub(crate) mod compressed;
pub(crate) mod fill;
pub(crate) mod map;
pub(crate) mod read;
pub(crate) mod status;
pub(crate) mod subclusters;
pub(crate) mod window;
pub(crate) mod write;
pub(crate) mod zero;
