//! The refcounts as the image has them: the table in memory, blocks read on demand and kept in a small cache.
//!
//! It says what is stored and can change it. It never decides what is right.

use std::collections::{HashMap, VecDeque};

use block_core::{
    buffer::Buffer,
    error::{Error, Result},
    flags::RequestFlags,
    request::Child,
};

use crate::layout::{
    Geometry, Header, HostCluster, HostOffset, Refcounts,
    entry::{REFCOUNT_TABLE_MASK, be64s},
};

/// Blocks are kept up to this many bytes, and two in any case.
const CACHE_BYTES: u64 = 4 << 20;

struct Block {
    bytes: Buffer,
    dirty: bool,
}

/// The stored refcounts of an image.
pub(super) struct Stored<'a> {
    file: &'a Child,
    geometry: Geometry,
    table: Vec<u64>,
    /// Why there is no table.
    unreadable: Option<String>,
    blocks: HashMap<u64, Block>,
    /// Offsets of the cached blocks, oldest first.
    order: VecDeque<u64>,
}

/// What an entry of the refcount table points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockPlace {
    /// No block: all its refcounts are 0.
    Absent,
    /// A block.
    At(HostOffset),
    /// Nothing that can be read.
    Unaligned(HostOffset),
}

impl<'a> Stored<'a> {
    /// Reads the refcount table. What lies beyond the end of the file counts as zeroes, and so does a table that can't be
    /// read; [`Self::unreadable`] tells.
    pub async fn open(file: &'a Child, header: &Header) -> Result<Self> {
        // A table has at most 8 MiB: the header was checked.
        let offset = header.refcount_table_offset.0;
        let inside = file.length().saturating_sub(offset).next_multiple_of(8);
        let len = header.refcount_table_bytes().min(inside) as usize;
        let (mut table, mut unreadable) = (Vec::new(), None);
        if len > 0 {
            match file.read_padded(offset, len).await {
                Ok(bytes) => table = be64s(&bytes).collect(),
                Err(error) => unreadable = Some(error.reason()),
            }
        }
        Ok(Self {
            file,
            geometry: header.geometry(),
            table,
            unreadable,
            blocks: HashMap::new(),
            order: VecDeque::new(),
        })
    }

    /// Why the table can't be read.
    pub fn unreadable(&self) -> Option<&str> {
        self.unreadable.as_deref()
    }

    /// The entries of the table that the file has.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Where the block of a table index is. An index beyond the table has none.
    pub fn place(&self, index: u64) -> BlockPlace {
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| self.table.get(index));
        let offset = HostOffset(entry.map_or(0, |entry| entry & REFCOUNT_TABLE_MASK));
        match offset.0 {
            0 => BlockPlace::Absent,
            _ if self.geometry.is_aligned(offset) => BlockPlace::At(offset),
            _ => BlockPlace::Unaligned(offset),
        }
    }

    fn index(&self, cluster: u64) -> (u64, usize) {
        let cluster = HostCluster(cluster);
        let at = self.geometry.refcount_block_index(cluster);
        (self.geometry.refcount_table_index(cluster), at as usize)
    }

    /// The stored refcount of a cluster.
    ///
    /// # Errors
    /// EIO when its block can't be read.
    pub async fn get(&mut self, cluster: u64) -> Result<u64> {
        let (index, at) = self.index(cluster);
        let refcounts = Refcounts::from(self.geometry);
        match self.block(index).await? {
            Some(block) => Ok(refcounts.get(&block.bytes, at)),
            None => Ok(0),
        }
    }

    /// The bytes of the block at a table index, `None` when there is no block.
    pub async fn block_bytes(&mut self, index: u64) -> Result<Option<&[u8]>> {
        Ok(self.block(index).await?.map(|block| &block.bytes[..]))
    }

    /// Changes a refcount. It reaches the file with [`Self::write_back`] at the latest.
    ///
    /// # Errors
    /// EINVAL when there is no block for it or the value doesn't fit.
    pub async fn set(&mut self, cluster: u64, value: u64) -> Result<()> {
        let (index, at) = self.index(cluster);
        let refcounts = Refcounts::from(self.geometry);
        let Some(block) = self.block(index).await? else {
            return Err(Error::invalid(format!(
                "cluster {cluster} has no refcount block"
            )));
        };
        refcounts.set(&mut block.bytes, at, value)?;
        block.dirty = true;
        Ok(())
    }

    async fn block(&mut self, index: u64) -> Result<Option<&mut Block>> {
        let offset = match self.place(index) {
            BlockPlace::Absent => return Ok(None),
            BlockPlace::At(offset) => offset.0,
            BlockPlace::Unaligned(offset) => {
                return Err(Error::corrupt(format!(
                    "Refblock offset {offset} unaligned (reftable index: {index:#x})"
                )));
            }
        };
        if !self.blocks.contains_key(&offset) {
            let cluster_size = self.geometry.cluster_size();
            let most = (CACHE_BYTES / cluster_size).max(2) as usize;
            while self.order.len() >= most
                && let Some(oldest) = self.order.pop_front()
            {
                if let Some(block) = self.blocks.remove(&oldest)
                    && block.dirty
                {
                    self.file
                        .write(oldest, block.bytes, RequestFlags::empty())
                        .await?;
                }
            }
            let bytes = self.file.read_padded(offset, cluster_size as usize).await?;
            self.blocks.insert(
                offset,
                Block {
                    bytes,
                    dirty: false,
                },
            );
            self.order.push_back(offset);
        }
        Ok(self.blocks.get_mut(&offset))
    }

    /// Writes all changed blocks, without a flush.
    pub async fn write_back(&mut self) -> Result<()> {
        for offset in &self.order {
            if let Some(block) = self.blocks.get_mut(offset)
                && block.dirty
            {
                let bytes = Buffer::from(&block.bytes[..]);
                self.file
                    .write(*offset, bytes, RequestFlags::empty())
                    .await?;
                block.dirty = false;
            }
        }
        Ok(())
    }
}
