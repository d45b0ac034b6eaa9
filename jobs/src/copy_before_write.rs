//! The filter that a backup puts above its source: before a guest changes a cluster that isn't copied yet, its old content is
//! copied to the target.
//!
//! Every request that changes something is serialising here and rounded out to whole clusters, and the job's own copies
//! hold tickets of the same node: so nobody changes a cluster while it is being copied, and nobody copies it twice.

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
    request::{Child, Request},
    status::DriverStatus,
};
use parking_lot::Mutex;

use crate::{
    copy::{Chunk, CopyResult, MAX_CHUNK},
    counters::{Copied, Counters},
    passthrough,
    transfer::Copier,
};

/// What happens when the old content can't be copied before a guest's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnCbwError {
    /// The guest's write fails, the backup goes on.
    #[default]
    BreakGuestWrite,
    /// The guest's write goes on, the backup fails.
    BreakSnapshot,
}

const SETTING_UP: u8 = 0;
const WORKING: u8 = 1;
const STOPPED: u8 = 2;

/// What the filter and its job share.
pub(crate) struct BackupState {
    /// Clusters that aren't copied. Changed only by those who hold a ticket over them at the filter.
    pub to_copy: DirtyBitmap,
    pub copier: Copier,
    pub counters: Arc<Counters>,
    on_error: OnCbwError,
    phase: AtomicU8,
    broken: Mutex<Option<Error>>,
}

impl BackupState {
    pub(crate) fn new(
        to_copy: DirtyBitmap,
        copier: Copier,
        on_error: OnCbwError,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            to_copy,
            copier,
            counters,
            on_error,
            phase: AtomicU8::new(SETTING_UP),
            broken: Mutex::new(None),
        })
    }

    /// The filter is in its place: the point in time is now.
    pub(crate) fn start(&self) {
        self.phase.store(WORKING, Ordering::SeqCst);
    }

    /// The job is over: writes pass.
    pub(crate) fn stop(&self) {
        self.phase.store(STOPPED, Ordering::SeqCst);
    }

    /// The error that broke the backup: it can't succeed any more.
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.broken.lock() {
            Some(error) => Err(error.duplicate()),
            None => Ok(()),
        }
    }

    /// Copies what isn't copied yet of a range that the caller holds a ticket over.
    pub(crate) async fn copy(&self, source: &Child, target: &Child, range: Chunk) -> CopyResult {
        let mut total = Copied::default();
        let mut at = range.offset;
        while let Some((offset, len)) = self.to_copy.next_dirty(at, MAX_CHUNK) {
            if offset >= range.end() {
                break;
            }
            let chunk = Chunk {
                offset,
                len: len.min(range.end() - offset),
            };
            let early = mutant::is_active("backup-cluster-marked-before-copied");
            if early {
                self.to_copy.clear(chunk.offset, chunk.len);
            }
            let copied = self.copier.copy(source, target, chunk).await?;
            self.to_copy.clear(chunk.offset, chunk.len);
            total.copied += copied.copied;
            total.zeroed += copied.zeroed;
            total.skipped += copied.skipped;
            at = chunk.end();
        }
        Ok(total)
    }
}

/// The `copy-before-write` driver.
pub(crate) struct CopyBeforeWrite {
    pub state: Arc<BackupState>,
}

impl CopyBeforeWrite {
    async fn before_change(&self, request: &Request, offset: u64, len: u64) -> Result<()> {
        let state = &self.state;
        if state.phase.load(Ordering::SeqCst) != WORKING {
            return Ok(());
        }
        let source = passthrough::filtered(request)?;
        let target = passthrough::target(request)?;
        let cluster = state.to_copy.granularity();
        let start = offset - offset % cluster;
        let end = (offset + len)
            .next_multiple_of(cluster)
            .min(source.length());
        let range = Chunk {
            offset: start,
            len: end.saturating_sub(start),
        };
        match state.copy(source, target, range).await {
            Ok(copied) => {
                let bytes = copied.copied + copied.zeroed;
                if bytes > 0 {
                    state.counters.copied_before_write(bytes);
                }
                Ok(())
            }
            Err(error) => match state.on_error {
                OnCbwError::BreakGuestWrite if mutant::is_active("backup-error-ignored") => Ok(()),
                OnCbwError::BreakGuestWrite => Err(before_write(error.error)),
                OnCbwError::BreakSnapshot => {
                    state.stop();
                    state.broken.lock().get_or_insert(error.error);
                    Ok(())
                }
            },
        }
    }
}

fn before_write(error: Error) -> Error {
    error.context("the old content can't be copied before the write")
}

#[async_trait]
impl BlockDriver for CopyBeforeWrite {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        if mutant::is_active("backup-filter-not-serialising") {
            return passthrough::CAPABILITIES;
        }
        passthrough::CAPABILITIES | Capabilities::SERIALISE_WRITES
    }

    fn length(&self, edges: &Edges) -> u64 {
        passthrough::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        passthrough::limits(edges, self.state.to_copy.granularity())
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        let phase = self.state.phase.load(Ordering::SeqCst);
        match role {
            ChildRole::Target if phase == STOPPED => PermissionSet::NONE,
            ChildRole::Target => PermissionSet::new(Permissions::WRITE, Permissions::all()),
            // While it is put in or taken out nobody uses it, and others may write.
            _ if phase != WORKING || parents.used.is_empty() => parents,
            // All writers have to come this way.
            _ => PermissionSet::new(
                parents.used | Permissions::CONSISTENT_READ,
                parents.shared - Permissions::WRITE - Permissions::RESIZE,
            ),
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
        self.before_change(&request, offset, buf.len() as u64)
            .await?;
        passthrough::filtered(&request)?
            .write(offset, buf, flags)
            .await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        if !mutant::is_active("backup-zero-write-not-copied-before") {
            self.before_change(&request, offset, len).await?;
        }
        passthrough::filtered(&request)?
            .write_zeroes(offset, len, flags)
            .await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        if !mutant::is_active("backup-discard-not-copied-before") {
            self.before_change(&request, offset, len).await?;
        }
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
