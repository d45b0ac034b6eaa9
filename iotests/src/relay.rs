//! A filter that does nothing but take its time: for graph changes under I/O. It keeps no child and no data.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use block_core::{
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, Truncate},
    error::Result,
    flags::RequestFlags,
    limits::Limits,
    node::Edges,
    request::{Child, Request},
    status::{DriverStatus, StatusFlags},
};

use crate::sim::yield_now;

/// The filter.
#[derive(Debug, Default)]
pub struct Relay;

impl Relay {
    async fn child(request: &Request) -> Result<Child> {
        yield_now().await;
        request.file().cloned()
    }
}

#[async_trait]
impl BlockDriver for Relay {
    fn name(&self) -> &'static str {
        "relay"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::TRUNCATE
    }

    fn length(&self, edges: &Edges) -> u64 {
        edges.child(ChildRole::Filtered).map_or(0, Child::length)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let limits = Limits::default();
        edges
            .child(ChildRole::Filtered)
            .map_or(limits, |child| limits.merge(child.limits()))
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        Self::child(&request).await?.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        Self::child(&request).await?.write(offset, buf, flags).await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        Self::child(&request)
            .await?
            .write_zeroes(offset, len, flags)
            .await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        Self::child(&request).await?.discard(offset, len).await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        Self::child(&request).await?.flush().await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        Self::child(&request).await?.truncate(length, how).await
    }

    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(DriverStatus {
            flags: StatusFlags::RAW | StatusFlags::OFFSET_VALID,
            len,
            file_offset: offset,
        })
    }

    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
