//! Request flags and permissions: the small vocabularies that every layer shares. No behaviour lives here.

use bitflags::bitflags;

bitflags! {
    /// How a request is to be carried out (digest of block semantics, section 1.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RequestFlags: u32 {
        /// Wait for every overlapping request that began before, hold back every one that begins later.
        const SERIALISING = 1 << 0;
        /// Write zeroes; there is no data buffer. Always serialising.
        const ZERO_WRITE = 1 << 1;
        /// With `ZERO_WRITE`: the range may be deallocated if it still reads as zeroes.
        const MAY_UNMAP = 1 << 2;
        /// The data is durable before the request completes.
        const FUA = 1 << 3;
        /// With `ZERO_WRITE` or copy-range: ENOTSUP rather than the slow way.
        const NO_FALLBACK = 1 << 4;
        /// Store compressed; whole clusters only.
        const WRITE_COMPRESSED = 1 << 5;
        /// The write doesn't change what is visible; the weaker permission suffices.
        const WRITE_UNCHANGED = 1 << 6;
        /// Read: what comes from below the node is written into the node before the read returns.
        const COPY_ON_READ = 1 << 7;
        /// With `COPY_ON_READ`: only make sure that the copy happens, no data is returned.
        const PREFETCH = 1 << 8;
        /// EBUSY rather than wait at the gate.
        const NO_WAIT = 1 << 9;
        /// The buffers lie in memory that was registered with the storage beforehand.
        const REGISTERED_BUF = 1 << 10;
    }
}

bitflags! {
    /// What a parent does with a child, or allows others to do (digest of block semantics, section 3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Permissions: u8 {
        /// Reads, and needs the content to be a complete, self-consistent disk.
        const CONSISTENT_READ = 1 << 0;
        /// Changes visible content.
        const WRITE = 1 << 1;
        /// Writes without changing visible content.
        const WRITE_UNCHANGED = 1 << 2;
        /// Changes the length.
        const RESIZE = 1 << 3;
    }
}

impl Permissions {
    /// The name used in error messages; `self` is a single bit.
    pub const fn name(self) -> &'static str {
        if self.contains(Self::CONSISTENT_READ) {
            "consistent read"
        } else if self.contains(Self::WRITE) {
            "write"
        } else if self.contains(Self::WRITE_UNCHANGED) {
            "write unchanged"
        } else {
            "resize"
        }
    }
}

/// The permissions a parent uses, and those it lets other parents of the same node use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PermissionSet {
    /// What this parent uses.
    pub used: Permissions,
    /// What this parent lets others use.
    pub shared: Permissions,
}

impl PermissionSet {
    /// Uses nothing and allows everything.
    pub const NONE: Self = Self {
        used: Permissions::empty(),
        shared: Permissions::all(),
    };

    /// A new set.
    pub const fn new(used: Permissions, shared: Permissions) -> Self {
        Self { used, shared }
    }
}
