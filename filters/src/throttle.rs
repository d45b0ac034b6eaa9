//! `throttle`: holds requests back so that rates of bytes and requests per second are kept. It changes nothing else about
//! them; flushes and metadata pass at once.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use async_trait::async_trait;
use block_core::{
    Result,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind},
    flags::RequestFlags,
    limits::Limits,
    node::Edges,
    options::{Options, Size},
    registry::{DriverFactory, OpenContext, Opened},
    request::{Child, Request},
};
use parking_lot::Mutex;
use serde::Deserialize;

use crate::{
    bucket::Bucket,
    passthrough::{self, Base},
};

/// Rates, 0 for none; named as QEMU names the limits of its throttle groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Rates {
    /// Bytes per second, reads and writes together.
    pub bps_total: Size,
    /// Bytes read per second.
    pub bps_read: Size,
    /// Bytes written per second.
    pub bps_write: Size,
    /// Requests per second.
    pub iops_total: Size,
    /// Reads per second.
    pub iops_read: Size,
    /// Writes, zero writes and discards per second.
    pub iops_write: Size,
}

/// One rate at work: whether reads and writes count, whether bytes do.
struct Limit {
    reads: bool,
    writes: bool,
    bytes: bool,
    bucket: Bucket,
}

/// A node that throttles its one child.
pub struct Throttle {
    base: Base,
    limits: Mutex<Vec<Limit>>,
    waits: AtomicU64,
}

impl Throttle {
    /// A throttle to be put over `child`.
    pub fn new(child: &Child, rates: Rates, read_only: bool) -> Self {
        let all = [
            (rates.bps_total, true, true, true),
            (rates.bps_read, true, false, true),
            (rates.bps_write, false, true, true),
            (rates.iops_total, true, true, false),
            (rates.iops_read, true, false, false),
            (rates.iops_write, false, true, false),
        ];
        let limits = all
            .into_iter()
            .filter(|limit| limit.0.0 > 0)
            .map(|(rate, reads, writes, bytes)| Limit {
                reads,
                writes,
                bytes,
                bucket: Bucket::new(rate.0, 0),
            })
            .collect();
        Self {
            base: Base::new(child, read_only),
            limits: Mutex::new(limits),
            waits: AtomicU64::new(0),
        }
    }

    async fn hold_back(&self, request: &Request, len: u64, is_read: bool) {
        let now = request.env().now();
        let mut until = now;
        for limit in &mut *self.limits.lock() {
            if if is_read { limit.reads } else { limit.writes } {
                let units = if limit.bytes { len } else { 1 };
                until = until.max(limit.bucket.take(now, units));
            }
        }
        if until > now {
            self.waits.fetch_add(1, Ordering::Relaxed);
            request.env().sleep(until.saturating_sub(now)).await;
        }
    }
}

#[async_trait]
impl BlockDriver for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn capabilities(&self) -> Capabilities {
        self.base.capabilities() - Capabilities::TRY_MAP
    }

    fn limits(&self, edges: &Edges) -> Limits {
        passthrough::limits(edges)
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        self.hold_back(&request, buf.len() as u64, true).await;
        request.file()?.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        self.hold_back(&request, buf.len() as u64, false).await;
        request.file()?.write(offset, buf, flags).await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.hold_back(&request, len, false).await;
        request.file()?.write_zeroes(offset, len, flags).await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        self.hold_back(&request, len, false).await;
        request.file()?.discard(offset, len).await
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("throttle-waits", self.waits.load(Ordering::Relaxed))]
    }

    passthrough::pass_through!();
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct ThrottleOptions {
    limits: Rates,
}

/// Makes `throttle` nodes: the child `file`, and `limits` with the [`Rates`] in place of a throttle group.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThrottleFactory;

#[async_trait]
impl DriverFactory for ThrottleFactory {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let options: ThrottleOptions = options.parse()?;
        let child = Child::unattached(Arc::clone(&file));
        let driver = Throttle::new(&child, options.limits, context.node.read_only);
        Ok(passthrough::opened(Arc::new(driver), file))
    }
}
