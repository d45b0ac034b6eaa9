//! One chunk from the source of a job to its target: admission, block status, data or zeroes. Runs inside the request path
//! like any producer; decides nothing about which chunks there are.

use std::sync::Arc;

use block_core::{
    bitmap::DirtyBitmap,
    buffer::IoBuf,
    chain,
    driver::ChildRole,
    error::{Error, Result},
    flags::RequestFlags,
    handle::{Admission, BlockHandle},
    mutant,
    node::Node,
    request::Child,
    tracked::TrackedRange,
};

use crate::{
    copy::{Chunk, CopyError, CopyResult},
    counters::Copied,
};

/// Sees whether the guest is at a range while it is copied.
pub(crate) struct Watch {
    node: Arc<Node>,
    bitmap: Arc<DirtyBitmap>,
}

impl Watch {
    /// Watches requests at `node`, the one that the guest uses. Chunks are multiples of `granularity` bytes.
    pub(crate) fn new(node: &Arc<Node>, granularity: u64) -> Result<Arc<Self>> {
        let bitmap = Arc::new(DirtyBitmap::new(node.length(), granularity)?);
        node.add_bitmap(bitmap.clone());
        Ok(Arc::new(Self {
            node: node.clone(),
            bitmap,
        }))
    }

    /// Before a chunk is admitted. True if something is in flight there.
    pub(crate) fn begin(&self, chunk: Chunk) -> bool {
        let busy = self.is_busy(chunk);
        self.bitmap.clear(chunk.offset, chunk.len);
        busy
    }

    /// Whether something is in flight there now.
    pub(crate) fn is_busy(&self, chunk: Chunk) -> bool {
        self.node
            .tracker()
            .overlapping(TrackedRange::from_len(chunk.offset, chunk.len))
    }

    /// After it was copied. True if something was written there since.
    pub(crate) fn end(&self, chunk: Chunk) -> bool {
        self.bitmap
            .next_dirty(chunk.offset, chunk.len)
            .is_some_and(|(at, _)| at < chunk.end())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.node.remove_bitmap(&self.bitmap);
    }
}

/// How a range is copied from one node to another.
#[derive(Clone)]
pub(crate) struct Copier {
    /// Only what layers above this one decide.
    pub above: Option<Arc<Node>>,
    /// Skip what no layer (above `above`) decides.
    pub only_allocated: bool,
    /// Zeroes may be deallocated at the target.
    pub unmap: bool,
    /// Store compressed, in units of so many bytes: what the target can compress, and chunks are made of.
    pub compress: Option<u64>,
    /// The target may read as zeroes already: ask it before zeroes are written.
    pub ask_target: bool,
    /// Writes to the target are serialising.
    pub serialise_target: bool,
    /// The target gets a backing file later: zeroes have to be its own, not what nobody has written yet.
    pub must_hide: bool,
}

/// How chunks are copied from the filtered child of a job's filter to its target child.
pub(crate) struct Transfer {
    /// The job's handle at its filter.
    pub handle: BlockHandle,
    /// Chunks hold a serialising ticket at the filter.
    pub serialise: bool,
    pub copier: Copier,
    pub watch: Option<Arc<Watch>>,
}

pub(crate) fn child(admission: &Admission, role: ChildRole) -> Result<Child> {
    admission
        .edges()
        .child(role)
        .cloned()
        .ok_or_else(|| Error::io("the job's filter has lost a child"))
}

impl Transfer {
    /// Admits an operation on a chunk.
    pub(crate) async fn admit(&self, chunk: Chunk) -> Admission {
        if self.serialise && !mutant::is_active("job-chunk-without-ticket") {
            self.handle.admit_serialising(chunk.offset, chunk.len).await
        } else {
            self.handle.admit().await
        }
    }

    /// Copies a chunk; `admitted` is called when it is admitted, before anything is read.
    pub(crate) async fn copy(&self, chunk: Chunk, admitted: impl FnOnce() + Send) -> CopyResult {
        let busy = self.watch.as_ref().is_some_and(|watch| watch.begin(chunk));
        let admission = self.admit(chunk).await;
        let mut admitted = Some(admitted);
        if !mutant::is_active("mirror-dirty-bit-cleared-after-copy")
            && let Some(admitted) = admitted.take()
        {
            admitted();
        }
        let source = child(&admission, ChildRole::Filtered).map_err(CopyError::read)?;
        let target = child(&admission, ChildRole::Target).map_err(CopyError::write)?;
        let mut copied = self.copier.copy(&source, &target, chunk).await?;
        if let Some(admitted) = admitted.take() {
            admitted();
        }
        let wrote = self.watch.as_ref().is_some_and(|watch| watch.end(chunk));
        copied.beside_guest = busy || wrote;
        Ok(copied)
    }
}

impl Copier {
    /// Copies a chunk of something that was admitted.
    pub(crate) async fn copy(&self, source: &Child, target: &Child, chunk: Chunk) -> CopyResult {
        let mut copied = Copied::default();
        let mut at = chunk.offset;
        while at < chunk.end() {
            let mut len = chunk.end() - at;
            if self.only_allocated {
                let (allocated, run) =
                    chain::is_allocated_above(source.node(), self.above.as_ref(), false, at, len)
                        .await
                        .map_err(CopyError::read)?;
                len = advance(run, len).map_err(CopyError::read)?;
                len = match self.whole(len, chunk.end() - at) {
                    Some(len) => len,
                    None => {
                        at += self.mixed(source, target, at, chunk, &mut copied).await?;
                        continue;
                    }
                };
                if !allocated {
                    copied.skipped += len;
                    at += len;
                    continue;
                }
            }
            let status = source
                .block_status(at, len)
                .await
                .map_err(CopyError::read)?;
            len = advance(status.len, len).map_err(CopyError::read)?;
            len = match self.whole(len, chunk.end() - at) {
                Some(len) => len,
                None => {
                    at += self.mixed(source, target, at, chunk, &mut copied).await?;
                    continue;
                }
            };
            if status.is_zero() && mutant::is_active("job-skips-zeroes") {
                copied.skipped += len;
            } else if status.is_zero() {
                self.zero(target, at, len, &mut copied).await?;
            } else {
                self.data(source, target, at, len, &mut copied).await?;
            }
            at += len;
        }
        Ok(copied)
    }

    /// How much of a run of `len` bytes, of the `left` that a chunk still has, can be copied as one: a target compresses whole
    /// units only. `None` when the run ends in the first of them.
    const fn whole(&self, len: u64, left: u64) -> Option<u64> {
        match self.compress {
            Some(unit) if len < left => match len - len % unit {
                0 => None,
                len => Some(len),
            },
            _ => Some(len),
        }
    }

    /// Copies a unit whose parts are of several kinds; how long it is.
    async fn mixed(
        &self,
        source: &Child,
        target: &Child,
        at: u64,
        chunk: Chunk,
        copied: &mut Copied,
    ) -> Result<u64, CopyError> {
        let left = chunk.end() - at;
        let len = self.compress.map_or(left, |unit| unit.min(left));
        self.data(source, target, at, len, copied).await?;
        Ok(len)
    }

    async fn data(
        &self,
        source: &Child,
        target: &Child,
        at: u64,
        len: u64,
        copied: &mut Copied,
    ) -> Result<(), CopyError> {
        let data = source
            .read_buffer(at, len as usize)
            .await
            .map_err(CopyError::read)?;
        let data = IoBuf::from(data);
        if data.is_zero() {
            return self.zero(target, at, len, copied).await;
        }
        let mut flags = RequestFlags::empty();
        if self.serialise_target {
            flags |= RequestFlags::SERIALISING;
        }
        if self.compress.is_some() {
            flags |= RequestFlags::WRITE_COMPRESSED;
        }
        target
            .write(at, data, flags)
            .await
            .map_err(CopyError::write)?;
        copied.copied += len;
        Ok(())
    }

    async fn zero(
        &self,
        target: &Child,
        at: u64,
        len: u64,
        copied: &mut Copied,
    ) -> Result<(), CopyError> {
        let end = at + len;
        let mut at = at;
        while at < end {
            let mut len = end - at;
            if self.ask_target {
                let status = target
                    .block_status(at, len)
                    .await
                    .map_err(CopyError::write)?;
                len = advance(status.len, len).map_err(CopyError::write)?;
                if status.is_zero() {
                    copied.skipped += len;
                    at += len;
                    continue;
                }
            }
            let flags = if self.unmap {
                RequestFlags::MAY_UNMAP
            } else {
                RequestFlags::empty()
            };
            target
                .write_zeroes(at, len, flags)
                .await
                .map_err(CopyError::write)?;
            if self.must_hide {
                Self::own_zeroes(target, at, len).await?;
            }
            copied.zeroed += len;
            at += len;
        }
        Ok(())
    }
}

impl Copier {
    /// Writes zeroes as data where the target has none of its own after a zero write: an image without a mark for zeroes
    /// leaves what has nothing below it unallocated.
    async fn own_zeroes(target: &Child, offset: u64, len: u64) -> Result<(), CopyError> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let (own, run) = chain::is_allocated_above(target.node(), None, false, at, end - at)
                .await
                .map_err(CopyError::write)?;
            let run = advance(run, end - at).map_err(CopyError::write)?;
            if !own {
                let zeroes = block_core::Buffer::try_new(run as usize).map_err(CopyError::write)?;
                target
                    .write(at, IoBuf::from(zeroes), RequestFlags::empty())
                    .await
                    .map_err(CopyError::write)?;
            }
            at += run;
        }
        Ok(())
    }
}

/// The next step of a walk by block status, which must get on.
pub(crate) fn advance(step: u64, max: u64) -> Result<u64> {
    if step == 0 {
        return Err(Error::io("block status of no bytes"));
    }
    Ok(step.min(max))
}
