//! The filter that an intermediate commit puts above the topmost layer that it merges. It passes everything through, and
//! asks nobody below for a consistent disk: while the base is written there is none.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind},
    error::Result,
    flags::{PermissionSet, Permissions, RequestFlags},
    limits::Limits,
    node::Edges,
    request::Request,
    status::DriverStatus,
};

use crate::passthrough;

const SETTING_UP: u8 = 0;
const WORKING: u8 = 1;
const STOPPED: u8 = 2;

/// The `commit_top` driver. Its target is the base.
pub(crate) struct CommitTop {
    /// The base has to grow.
    grow: bool,
    phase: AtomicU8,
}

impl CommitTop {
    pub(crate) fn new(grow: bool) -> Arc<Self> {
        Arc::new(Self {
            grow,
            phase: AtomicU8::new(SETTING_UP),
        })
    }

    /// It is in its place: from the next change of permissions on it needs its target.
    pub(crate) fn start(&self) {
        self.phase.store(WORKING, Ordering::SeqCst);
    }

    /// The job is over: it needs what its parents need, and nothing of the base.
    pub(crate) fn stop(&self) {
        self.phase.store(STOPPED, Ordering::SeqCst);
    }
}

#[async_trait]
impl BlockDriver for CommitTop {
    fn name(&self) -> &'static str {
        "commit_top"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        passthrough::CAPABILITIES
    }

    fn length(&self, edges: &Edges) -> u64 {
        passthrough::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        passthrough::limits(edges, 1)
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        let works = self.phase.load(Ordering::SeqCst) == WORKING;
        match role {
            ChildRole::Target if works => {
                let mut used = Permissions::CONSISTENT_READ | Permissions::WRITE;
                if self.grow {
                    used |= Permissions::RESIZE;
                }
                let shared = Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
                PermissionSet::new(used, shared)
            }
            ChildRole::Target => PermissionSet::NONE,
            _ if works => PermissionSet::new(Permissions::empty(), Permissions::all()),
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
        passthrough::filtered(&request)?
            .write_zeroes(offset, len, flags)
            .await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        passthrough::filtered(&request)?.discard(offset, len).await
    }

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
