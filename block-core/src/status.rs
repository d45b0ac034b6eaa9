//! Block status: what a range of a node is made of (digest of block semantics, section 2). The walk down a
//! backing chain lives with the request path.

use std::sync::Arc;

use bitflags::bitflags;

use crate::node::Node;

bitflags! {
    /// What is known about a range.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct StatusFlags: u16 {
        /// This layer has data there (which may be zeroes).
        const DATA = 0x01;
        /// It reads as zeroes.
        const ZERO = 0x02;
        /// `file_offset` locates the bytes in the child node.
        const OFFSET_VALID = 0x04;
        /// Ask the child that holds the bytes instead (raw format, filters).
        const RAW = 0x08;
        /// The content is decided at this layer.
        const ALLOCATED = 0x10;
        /// The range reaches this layer's end.
        const EOF = 0x20;
        /// Refine DATA by looking for holes at the mapped place in the child.
        const RECURSE = 0x40;
        /// Stored compressed.
        const COMPRESSED = 0x80;
    }
}

/// What a driver says about the start of a range. It may cover less than was asked, never nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverStatus {
    /// What is there.
    pub flags: StatusFlags,
    /// For how many bytes, at least one.
    pub len: u64,
    /// Where the bytes are in the file or data-file child, when `OFFSET_VALID` or `RAW` is set.
    pub file_offset: u64,
}

impl DriverStatus {
    /// Nothing here: the backing file decides.
    pub const fn unallocated(len: u64) -> Self {
        Self {
            flags: StatusFlags::empty(),
            len,
            file_offset: 0,
        }
    }

    /// Reads as zeroes, decided here.
    pub const fn zero(len: u64) -> Self {
        Self {
            flags: StatusFlags::ZERO,
            len,
            file_offset: 0,
        }
    }

    /// Data at `file_offset` of the child.
    pub const fn data_at(len: u64, file_offset: u64) -> Self {
        Self {
            flags: StatusFlags::DATA
                .union(StatusFlags::OFFSET_VALID)
                .union(StatusFlags::RECURSE),
            len,
            file_offset,
        }
    }

    /// Data whose place can't be told.
    pub const fn data(len: u64) -> Self {
        Self {
            flags: StatusFlags::DATA,
            len,
            file_offset: 0,
        }
    }
}

/// Status of the start of a range, found by walking a chain.
#[derive(Debug, Clone)]
pub struct BlockStatus {
    /// What is there, as the guest of the top node sees it.
    pub flags: StatusFlags,
    /// For how many bytes; 0 only beyond the end.
    pub len: u64,
    /// The node whose bytes they are and the offset in it, when `OFFSET_VALID` is set.
    pub mapped: Option<(Arc<Node>, u64)>,
    /// The layer that decides: 0 is the node asked. `None` when no layer does.
    pub depth: u32,
}

impl BlockStatus {
    /// Whether it reads as zeroes.
    pub fn is_zero(&self) -> bool {
        self.flags.contains(StatusFlags::ZERO)
    }

    /// Whether some layer that was asked decides the content.
    pub fn is_allocated(&self) -> bool {
        self.flags.contains(StatusFlags::ALLOCATED)
    }

    /// Whether there is data that has to be read.
    pub fn is_data(&self) -> bool {
        self.flags.contains(StatusFlags::DATA) && !self.is_zero()
    }
}
