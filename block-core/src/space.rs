//! What a driver tells a test about the space in its file, at the moment when it happens: which clusters its allocator
//! hands out and takes back, and which guest ranges are linked to them. A test keeps books from it that don't depend on
//! the driver's own, and sees at every step whether a cluster has two owners or a link leads to a free one.
//!
//! It decides nothing, and costs one load when nobody listens.

use std::sync::{Arc, OnceLock};

/// One step. `host` is an offset in the file, `guest` one in the node; lengths are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaceEvent {
    /// The allocator handed it out.
    Taken {
        /// Where.
        host: u64,
        /// How much.
        len: u64,
    },
    /// From now on the allocator may hand it out.
    Free {
        /// Where.
        host: u64,
        /// How much.
        len: u64,
    },
    /// A link that was there before anybody listened, or that was forgotten and is read again.
    Found(Link),
    /// A link was made.
    Linked(Link),
    /// A link was undone.
    Unlinked(Link),
    /// The driver begins this part of writing its metadata back; the name is its own.
    WriteBack(&'static str),
    /// The driver forgot all that it knew, and reads it again.
    Forgotten,
}

/// A guest range and where its data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The guest range begins here.
    pub guest: u64,
    /// Its data is here.
    pub host: u64,
    /// So much of the file.
    pub len: u64,
    /// Other links may lead there too (several compressed clusters in one host cluster).
    pub shared: bool,
}

/// Somebody who listens. Called with locks of the driver's held: must not call the driver, nor block.
pub trait SpaceWatch: Send + Sync {
    /// Something happened.
    fn space(&self, event: SpaceEvent);
}

/// A driver's end.
#[derive(Default)]
pub struct SpaceTap(OnceLock<Arc<dyn SpaceWatch>>);

impl SpaceTap {
    /// From now on `watch` is told; there can be one.
    pub fn set(&self, watch: Arc<dyn SpaceWatch>) -> bool {
        self.0.set(watch).is_ok()
    }

    /// Whether anybody listens.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    /// Tells what happened, if anybody listens.
    #[inline]
    pub fn tell(&self, event: impl FnOnce() -> SpaceEvent) {
        if let Some(watch) = self.0.get() {
            watch.space(event());
        }
    }
}

impl std::fmt::Debug for SpaceTap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SpaceTap({})", self.is_set())
    }
}
