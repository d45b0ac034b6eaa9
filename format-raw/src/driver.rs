//! The raw node: shifts every request by `offset` and passes it on to the file.

use std::{
    any::Any,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    buffer::{IoBuf, IoBufMut},
    debug::DebugEvent,
    driver::{
        BlockDriver, Capabilities, ChildRole, DriverKind, MapIntent, Mapping, Reopen, Truncate,
    },
    flags::RequestFlags,
    image::ImageInfo,
    limits::Limits,
    node::Edges,
    options::Options,
    request::{Child, Request},
    status::{DriverStatus, StatusFlags},
};

use crate::{
    guard::{self, Guard, PROBED},
    options::{RawOptions, Window},
};

/// No fixed size.
const WHOLE: u64 = u64::MAX;

/// A raw image. The only edge is `file`, in the data role.
pub struct RawDriver {
    /// Where the disk begins in the file. Changes only under drain.
    offset: AtomicU64,
    /// How long it is, or [`WHOLE`]. Changes only under drain.
    size: AtomicU64,
    read_only: AtomicBool,
    /// What of the file's capabilities matters to those above, as it was on opening.
    inherited: Capabilities,
    filename: OnceLock<String>,
    /// There when the format was guessed.
    guard: Option<Guard>,
}

impl RawDriver {
    pub(crate) fn new(window: Window, read_only: bool, file: &Child, guard: Option<Guard>) -> Self {
        let inherited = file.driver().capabilities()
            & (Capabilities::DISCARD_ZEROES | Capabilities::ZERO_INIT | Capabilities::GROW);
        let filename = OnceLock::new();
        if window
            == (Window {
                offset: 0,
                size: None,
            })
            && let Some(name) = file.filename()
        {
            let _ = filename.set(name);
        }
        Self {
            offset: AtomicU64::new(window.offset),
            size: AtomicU64::new(window.size.unwrap_or(WHOLE)),
            read_only: AtomicBool::new(read_only),
            inherited,
            filename,
            guard,
        }
    }

    fn window(&self) -> Window {
        let size = self.size.load(Ordering::Acquire);
        Window {
            offset: self.offset.load(Ordering::Acquire),
            size: (size != WHOLE).then_some(size),
        }
    }

    fn set_window(&self, window: Window) {
        self.offset.store(window.offset, Ordering::Release);
        self.size
            .store(window.size.unwrap_or(WHOLE), Ordering::Release);
    }
}

#[async_trait]
impl BlockDriver for RawDriver {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn decisive_options(&self) -> Options {
        let Window { offset, size } = self.window();
        let mut options = Options::new();
        if offset != 0 {
            options.set("offset", offset);
        }
        if let Some(size) = size {
            options.set("size", size);
        }
        options
    }

    fn capabilities(&self) -> Capabilities {
        // What the file itself can't do, the core does in its place when the request gets there.
        let mut all = (self.inherited - Capabilities::GROW) | Capabilities::TRY_MAP;
        if !self.read_only.load(Ordering::Acquire) {
            all |= Capabilities::WRITE
                | Capabilities::WRITE_ZEROES
                | Capabilities::DISCARD
                | Capabilities::FUA;
            if self.window().size.is_none() {
                all |= Capabilities::TRUNCATE | (self.inherited & Capabilities::GROW);
            }
        }
        all
    }

    fn length(&self, edges: &Edges) -> u64 {
        let file = edges.child(ChildRole::DataFile).map_or(0, Child::length);
        self.window().length(file)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let limits = Limits::default();
        edges
            .child(ChildRole::DataFile)
            .map_or(limits, |file| limits.merge(file.limits()))
    }

    fn filename(&self) -> Option<String> {
        self.filename.get().cloned()
    }

    fn try_map(&self, _edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        if intent == MapIntent::Overwrite && self.guard.is_some() && offset < PROBED {
            return Mapping::NotCached;
        }
        match self.window().locate(offset, len) {
            Ok(offset) => Mapping::Data {
                edge: 0,
                offset,
                len,
                pin: None,
            },
            Err(_) => Mapping::NotCached,
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        let offset = self.window().locate(offset, buf.len() as u64)?;
        let file = request.file()?;
        file.debug_event(DebugEvent::ReadAio).await;
        file.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let offset = self.window().locate(offset, buf.len() as u64)?;
        guard::write(self.guard.as_ref(), &request, offset, buf, flags).await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let offset = self.window().locate(offset, len)?;
        guard::write_zeroes(self.guard.as_ref(), &request, offset, len, flags).await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        let offset = self.window().locate(offset, len)?;
        guard::discard(self.guard.as_ref(), &request, offset, len).await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        let window = self.window();
        if window.size.is_some() {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "Cannot resize fixed-size raw disks",
            ));
        }
        let length = length
            .checked_add(window.offset)
            .filter(|length| i64::try_from(*length).is_ok())
            .ok_or_else(|| Error::invalid("Disk size too large for the chosen offset"))?;
        request.file()?.truncate(length, how).await
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(DriverStatus {
            flags: StatusFlags::RAW | StatusFlags::OFFSET_VALID,
            len,
            file_offset: self.window().locate(offset, len)?,
        })
    }

    async fn info(self: Arc<Self>, _request: Request) -> Result<ImageInfo> {
        Ok(ImageInfo::default())
    }

    async fn reopen(self: Arc<Self>, request: Request, changes: Reopen) -> Result<()> {
        let window = if changes.options.is_empty() {
            self.window()
        } else {
            let options: RawOptions = Options(changes.options).parse()?;
            options.window(request.file()?.length())?
        };
        self.set_window(window);
        if let Some(read_only) = changes.read_only {
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        // Nothing is cached here, so there is nothing to write back; the file's own close follows.
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
