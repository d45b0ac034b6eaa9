//! The filter that a mirror or an active commit puts above its source. In background mode it passes everything through; in
//! write-blocking mode every write goes to the source and then to the target under one serialising ticket.
//!
//! It never copies what was there before: that is the job's part, under a ticket of the same node.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    bitmap::DirtyBitmap,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind},
    error::{Error, Result},
    flags::{PermissionSet, Permissions, RequestFlags},
    limits::Limits,
    mutant,
    node::Edges,
    request::Request,
    status::DriverStatus,
};
use parking_lot::Mutex;

use crate::{counters::Counters, passthrough};

/// What the filter and its job share.
pub(crate) struct MirrorState {
    /// What the target doesn't have yet. The core marks it when a write of the source has ended.
    pub bitmap: Arc<DirtyBitmap>,
    pub write_blocking: bool,
    /// The target is in the source's own chain.
    pub is_commit: bool,
    /// The target has to grow.
    pub grow: bool,
    pub unmap: bool,
    /// A clean granule is the same in source and target. Not so when only a part of the disk is copied: what is clean then
    /// may be something that the target doesn't have.
    pub clean_is_common: bool,
    pub counters: Arc<Counters>,
    phase: AtomicU8,
    error: Mutex<Option<Error>>,
}

/// The filter is being put in: it needs nothing yet.
const SETTING_UP: u8 = 0;
/// The job works; guests' writes only mark the bitmap.
const WORKING: u8 = 1;
/// What is to be copied is known: guests' writes may write through.
const WRITING_THROUGH: u8 = 2;
/// The job is over.
const STOPPED: u8 = 3;

impl MirrorState {
    pub(crate) fn new(
        bitmap: Arc<DirtyBitmap>,
        write_blocking: bool,
        is_commit: bool,
        grow: bool,
        unmap: bool,
        clean_is_common: bool,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            bitmap,
            write_blocking,
            is_commit,
            grow,
            unmap,
            clean_is_common,
            counters,
            phase: AtomicU8::new(SETTING_UP),
            error: Mutex::new(None),
        })
    }

    /// The filter is in its place: from the next change of permissions on it needs its target.
    pub(crate) fn start(&self) {
        self.phase.store(WORKING, Ordering::SeqCst);
    }

    /// The bitmap holds all that is to be copied: before, a write mustn't take a granule for clean.
    pub(crate) fn write_through(&self) {
        if self.write_blocking {
            self.phase.store(WRITING_THROUGH, Ordering::SeqCst);
        }
    }

    /// The job is over: the filter needs nothing of the target any more, and from its source what its parents need.
    pub(crate) fn stop(&self) {
        self.phase.store(STOPPED, Ordering::SeqCst);
    }

    fn is_working(&self) -> bool {
        matches!(self.phase.load(Ordering::SeqCst), WORKING | WRITING_THROUGH)
    }

    /// The last error that a guest's write met at the target.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.lock().take()
    }

    /// The granules that source and target have in common again when both have been written in `[offset, offset + len)`:
    /// those that are written whole, and those that were in common before. As a range of bytes.
    fn common_after(&self, offset: u64, len: u64, length: u64) -> (u64, u64) {
        let granularity = self.bitmap.granularity();
        let end = offset + len;
        let mut from = offset - offset % granularity;
        let mut to = end.next_multiple_of(granularity);
        let is_common = |at: u64| {
            self.clean_is_common && !self.bitmap.is_dirty(at)
                || mutant::is_active("mirror-partial-write-cleans-granule")
        };
        let head_is_whole = offset == from && (end >= from + granularity || end >= length);
        if !head_is_whole && !is_common(offset) {
            from += granularity;
        }
        let last = to - granularity;
        let tail_is_whole = (end == to || end >= length) && offset <= last;
        if !tail_is_whole && !is_common(end - 1) {
            to -= granularity;
        }
        (from, to)
    }
}

/// The `mirror_top` driver.
pub(crate) struct MirrorTop {
    pub state: Arc<MirrorState>,
}

impl MirrorTop {
    fn writes_through(&self) -> bool {
        self.state.phase.load(Ordering::SeqCst) == WRITING_THROUGH
    }

    fn written(&self, result: Result<()>, common: (u64, u64), len: u64) {
        match result {
            Ok(()) => {
                self.state.counters.written_through(len);
                if common.1 > common.0 {
                    self.state.bitmap.clear(common.0, common.1 - common.0);
                }
            }
            // The granules stay dirty: the job copies them, or fails.
            Err(_) if mutant::is_active("mirror-target-error-swallowed") => {
                self.state
                    .bitmap
                    .clear(common.0, common.1.saturating_sub(common.0));
            }
            Err(error) => *self.state.error.lock() = Some(error),
        }
    }
}

#[async_trait]
impl BlockDriver for MirrorTop {
    fn name(&self) -> &'static str {
        "mirror_top"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        if self.state.write_blocking {
            passthrough::CAPABILITIES | Capabilities::SERIALISE_WRITES
        } else {
            passthrough::CAPABILITIES
        }
    }

    fn length(&self, edges: &Edges) -> u64 {
        passthrough::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        passthrough::limits(edges, self.state.bitmap.granularity())
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        match role {
            ChildRole::Target if !self.state.is_working() => PermissionSet::NONE,
            ChildRole::Target => {
                let mut used = Permissions::WRITE;
                if self.state.grow {
                    used |= Permissions::RESIZE;
                }
                let shared = if self.state.is_commit {
                    Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED | Permissions::WRITE
                } else {
                    Permissions::WRITE_UNCHANGED
                };
                PermissionSet::new(used, shared)
            }
            // What lies between source and base isn't a disk any more while the base is written.
            _ if self.state.is_commit && self.state.is_working() => PermissionSet::new(
                parents.used - Permissions::CONSISTENT_READ,
                Permissions::all() - Permissions::RESIZE,
            ),
            _ => parents,
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        passthrough::filtered(&request)?.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let source = passthrough::filtered(&request)?;
        if !self.writes_through() {
            return source.write(offset, buf, flags).await;
        }
        let target = passthrough::target(&request)?;
        let len = buf.len() as u64;
        let common = self.state.common_after(offset, len, source.length());
        source.write(offset, buf.clone(), flags).await?;
        let result = target.write(offset, buf, RequestFlags::empty()).await;
        self.written(result, common, len);
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let source = passthrough::filtered(&request)?;
        // When only a part of the disk is copied, what is below the target in the end isn't there yet: the job knows how
        // to hide it.
        if !self.writes_through() || !self.state.clean_is_common {
            return source.write_zeroes(offset, len, flags).await;
        }
        let target = passthrough::target(&request)?;
        let common = self.state.common_after(offset, len, source.length());
        source.write_zeroes(offset, len, flags).await?;
        let unmap = if self.state.unmap {
            flags & RequestFlags::MAY_UNMAP
        } else {
            RequestFlags::empty()
        };
        let result = if mutant::is_active("mirror-zero-write-not-written-through") {
            Ok(())
        } else {
            target.write_zeroes(offset, len, unmap).await
        };
        self.written(result, common, len);
        Ok(())
    }

    /// What is read afterwards is the source's choice, so that the job has to look: the granules stay dirty.
    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        passthrough::filtered(&request)?.discard(offset, len).await
    }

    /// The job flushes the target when it matters.
    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        passthrough::filtered(&request)?.flush().await
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(passthrough::status(offset, len))
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 10 * 4096 + 100;

    fn state_of(clean_is_common: bool) -> Arc<MirrorState> {
        let bitmap = Arc::new(DirtyBitmap::new(LENGTH, 4096).expect("a power of two"));
        let counters = Arc::default();
        MirrorState::new(bitmap, true, false, false, true, clean_is_common, counters)
    }

    fn state() -> Arc<MirrorState> {
        state_of(true)
    }

    #[test]
    fn when_only_a_part_is_copied_a_partial_write_leaves_its_granule_to_the_job() {
        let state = state_of(false);
        let (from, to) = state.common_after(100, 50, LENGTH);
        assert!(to <= from);
        assert_eq!(state.common_after(100, 8092, LENGTH), (4096, 8192));
    }

    #[test]
    fn a_partial_write_makes_a_clean_granule_common_and_leaves_a_dirty_one_dirty() {
        let state = state();
        assert_eq!(state.common_after(100, 50, LENGTH), (0, 4096));
        state.bitmap.set(0, 1);
        assert_eq!(state.common_after(100, 50, LENGTH), (4096, 0));
        assert_eq!(state.common_after(100, 8000, LENGTH), (4096, 8192));
        assert_eq!(state.common_after(0, 4096, LENGTH), (0, 4096));
    }

    #[test]
    fn the_short_granule_at_the_end_counts_as_whole() {
        let state = state();
        state.bitmap.set(10 * 4096, 100);
        assert_eq!(
            state.common_after(10 * 4096, 100, LENGTH),
            (10 * 4096, 11 * 4096)
        );
        let (from, to) = state.common_after(10 * 4096, 99, LENGTH);
        assert!(to <= from, "not all of it is written: {from}..{to}");
    }
}
