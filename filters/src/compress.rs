//! `compress`: what is written is stored compressed, whoever writes it. Each write is made one of whole clusters first (the core
//! reads what is missing), since only those can be compressed. Zero writes, discards and reads pass.
//!
//! Formats compress a cluster once, when it is first written: what is written to it again is stored as it is.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind},
    flags::RequestFlags,
    limits::Limits,
    node::Edges,
    options::Options,
    registry::{DriverFactory, OpenContext, Opened},
    request::{Child, Request},
    status::{BlockStatus, StatusFlags},
};
use serde::Deserialize;

use crate::passthrough::{self, Base};

/// A node that compresses what is written to its one child.
pub struct Compress {
    base: Base,
    /// Bytes that were written compressed.
    compressed: AtomicU64,
}

impl Compress {
    /// A filter to be put over `child`.
    ///
    /// # Errors
    /// ENOTSUP for a child that stores nothing compressed.
    pub fn new(child: &Child, read_only: bool) -> Result<Self> {
        let driver = child.driver();
        if !driver.capabilities().contains(Capabilities::COMPRESSED) && !read_only {
            let text = format!(
                "Compression is not supported for underlying format: {}",
                driver.name()
            );
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        Ok(Self {
            base: Base::new(child, read_only),
            compressed: AtomicU64::new(0),
        })
    }
}

fn cluster_size(limits: &Limits) -> u64 {
    limits
        .serialising_granularity
        .max(limits.request_alignment)
        .max(1)
}

/// Whether the child has a place for any of the cluster at `offset` already, and for how many bytes that holds: whole clusters of the
/// next `left` bytes, or all of them.
async fn find_place(file: &Child, offset: u64, left: u64, cluster: u64) -> Result<(bool, u64)> {
    let status = file.block_status(offset, left).await?;
    let len = status.len.min(left);
    if len == left || len >= cluster {
        let whole = if len == left {
            len
        } else {
            len - len % cluster
        };
        return Ok((has_place(&status), whole));
    }
    // Of parts.
    let end = cluster.min(left);
    let (mut is_there, mut done) = (has_place(&status), len);
    while done < end {
        let status = file.block_status(offset + done, end - done).await?;
        is_there |= has_place(&status);
        done += status.len.clamp(1, end - done);
    }
    Ok((is_there, end))
}

/// Whether the child has a place for a range already, if only one that reads as zeroes.
fn has_place(status: &BlockStatus) -> bool {
    let is_used = status.flags.contains(StatusFlags::DATA) || status.mapped.is_some();
    status.is_allocated() && status.depth == 0 && is_used
}

#[async_trait]
impl BlockDriver for Compress {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn capabilities(&self) -> Capabilities {
        // Nothing may be written past this, not even where the child says that a range is its own.
        self.base.capabilities() - Capabilities::TRY_MAP
    }

    /// Requests are whole clusters.
    fn limits(&self, edges: &Edges) -> Limits {
        let limits = passthrough::limits(edges);
        Limits {
            request_alignment: cluster_size(&limits),
            ..limits
        }
    }

    /// What lies in the last cluster beyond the end of the disk reads as zeroes.
    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let file = request.file()?;
        let inside = file.length().saturating_sub(offset).min(buf.len() as u64) as usize;
        buf.fill_range(inside.., 0);
        drop(buf.split_off(inside));
        if buf.is_empty() {
            return Ok(());
        }
        file.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        mut buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let file = request.file()?;
        let inside = file.length().saturating_sub(offset).min(buf.len() as u64) as usize;
        drop(buf.split_off(inside));
        let cluster = cluster_size(&file.limits());
        let mut at = offset;
        while !buf.is_empty() {
            let (is_there, len) = find_place(file, at, buf.len() as u64, cluster).await?;
            let piece = buf.split_to(len as usize);
            if is_there {
                file.write(at, piece, flags).await?;
            } else {
                self.compressed.fetch_add(len, Ordering::Relaxed);
                let flags = flags | RequestFlags::WRITE_COMPRESSED;
                file.write(at, piece, flags).await?;
            }
            at += len;
        }
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let file = request.file()?;
        let inside = file.length().saturating_sub(offset).min(len);
        file.write_zeroes(offset, inside, flags).await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        let file = request.file()?;
        let inside = file.length().saturating_sub(offset).min(len);
        file.discard(offset, inside).await
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("compressed-bytes", self.compressed.load(Ordering::Relaxed))]
    }

    passthrough::pass_through!();
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CompressOptions {}

/// Makes `compress` nodes: the child `file`, an image whose format compresses.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompressFactory;

#[async_trait]
impl DriverFactory for CompressFactory {
    fn name(&self) -> &'static str {
        "compress"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let CompressOptions {} = options.parse()?;
        let child = Child::unattached(Arc::clone(&file));
        let driver = Compress::new(&child, context.node.read_only)?;
        Ok(passthrough::opened(Arc::new(driver), file))
    }
}
