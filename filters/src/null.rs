//! `null-co`, also called `null-aio`: storage that isn't there. Writes are swallowed; reads give zeroes or, unless that was asked for, whatever the
//! buffer held. For benchmarks of what lies above, and for tests.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use block_core::{
    Result,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Reopen},
    flags::RequestFlags,
    limits::Limits,
    node::Edges,
    options::{Number, Options, Size, Switch},
    registry::{DriverFactory, OpenContext, Opened, Registry},
    request::Request,
    status::{DriverStatus, StatusFlags},
};
use serde::Deserialize;

use crate::passthrough;

/// The length when none is given, as in QEMU.
const DEFAULT_SIZE: u64 = 1 << 30;

/// The name that is used unless another was asked for.
const CO: &str = "null-co";

/// A protocol node without storage.
pub struct Null {
    name: &'static str,
    size: u64,
    latency: Option<Duration>,
    read_zeroes: bool,
    read_only: AtomicBool,
}

impl Null {
    /// One of `size` bytes that reads as zeroes if `read_zeroes`.
    pub fn new(size: u64, read_zeroes: bool) -> Self {
        Self {
            name: CO,
            size,
            latency: None,
            read_zeroes,
            read_only: AtomicBool::new(false),
        }
    }

    /// Makes every request take at least `latency`.
    #[must_use]
    pub fn with_latency(mut self, latency: Duration) -> Self {
        self.latency = (!latency.is_zero()).then_some(latency);
        self
    }

    async fn take_time(&self, request: &Request) {
        if let Some(latency) = self.latency {
            request.env().sleep(latency).await;
        }
    }
}

#[async_trait]
impl BlockDriver for Null {
    fn name(&self) -> &'static str {
        self.name
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn capabilities(&self) -> Capabilities {
        let mut all = Capabilities::empty();
        if self.read_zeroes {
            all |= Capabilities::ZERO_INIT | Capabilities::DISCARD_ZEROES;
        }
        if !self.read_only.load(Ordering::Acquire) {
            all |= Capabilities::WRITE
                | Capabilities::WRITE_ZEROES
                | Capabilities::DISCARD
                | Capabilities::FUA;
        }
        all
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.size
    }

    fn limits(&self, _edges: &Edges) -> Limits {
        Limits::default()
    }

    fn filename(&self) -> Option<String> {
        Some(format!("{}://", self.name))
    }

    async fn read(
        self: Arc<Self>,
        request: Request,
        _offset: u64,
        mut buf: IoBufMut,
    ) -> Result<()> {
        if self.read_zeroes {
            buf.fill(0);
        }
        self.take_time(&request).await;
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        _offset: u64,
        _buf: IoBuf,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.take_time(&request).await;
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        _offset: u64,
        _len: u64,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.take_time(&request).await;
        Ok(())
    }

    async fn discard(self: Arc<Self>, request: Request, _offset: u64, _len: u64) -> Result<()> {
        self.take_time(&request).await;
        Ok(())
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.take_time(&request).await;
        Ok(())
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let flags = if self.read_zeroes {
            StatusFlags::ZERO
        } else {
            StatusFlags::DATA
        };
        Ok(DriverStatus {
            flags: flags | StatusFlags::OFFSET_VALID,
            len,
            file_offset: offset,
        })
    }

    async fn reopen(self: Arc<Self>, _request: Request, changes: Reopen) -> Result<()> {
        passthrough::reopen(&self.read_only, &changes)
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct NullOptions {
    /// Length in bytes.
    size: Option<Size>,
    /// Nanoseconds that a request takes.
    latency_ns: Number,
    /// Reads give zeroes.
    read_zeroes: Switch,
}

/// Makes `null-co` nodes, with the options `size`, `latency-ns` and `read-zeroes`; or `null-aio` nodes, which are the same here.
#[derive(Debug, Clone, Copy)]
pub struct NullFactory {
    name: &'static str,
}

impl Default for NullFactory {
    fn default() -> Self {
        Self { name: CO }
    }
}

impl NullFactory {
    /// One for `null-aio`.
    pub const fn aio() -> Self {
        Self { name: "null-aio" }
    }
}

#[async_trait]
impl DriverFactory for NullFactory {
    fn name(&self) -> &'static str {
        self.name
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn parse_filename(&self, _: &Registry, rest: &str) -> Option<Result<Options>> {
        (rest == "//").then(|| Ok(Options::new().with("driver", self.name())))
    }

    async fn open(&self, context: OpenContext, options: Options) -> Result<Opened> {
        let options: NullOptions = options.parse()?;
        let size = options.size.map_or(DEFAULT_SIZE, |size| size.0);
        let mut driver = Null::new(size, options.read_zeroes.0)
            .with_latency(Duration::from_nanos(options.latency_ns.0));
        driver.name = self.name;
        driver
            .read_only
            .store(context.node.read_only, Ordering::Release);
        Ok(Opened {
            driver: Arc::new(driver),
            edges: Vec::new(),
        })
    }
}
