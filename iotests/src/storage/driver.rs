//! The protocol driver over a [`Disk`]. It carries out what the disk's rules decided.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Preallocation, Reopen, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::ImageInfo,
    limits::Limits,
    node::Edges,
    options::{Options, parse_size},
    registry::{CreateContext, DriverFactory, OpenContext, Opened},
    request::Request,
    status::{DriverStatus, StatusFlags},
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    content::Content,
    disk::{Change, Disk, Disks},
    rules::{Fate, OpInfo, OpKind, Stage},
};
use crate::sim::yield_now;

/// A node of simulated storage.
pub struct TestStorage {
    disk: Arc<Disk>,
    name: String,
    /// Where in the disk's content the file begins.
    base: u64,
    read_only: AtomicBool,
    alignment: u64,
}

impl TestStorage {
    /// Storage on `disk`, whose requests must be aligned to `alignment` bytes.
    pub fn new(disk: Arc<Disk>, read_only: bool, alignment: u64) -> Self {
        let name = disk.name().to_owned();
        Self::of_file(disk, name, 0, read_only, alignment)
    }

    fn of_file(disk: Arc<Disk>, name: String, base: u64, read_only: bool, alignment: u64) -> Self {
        Self {
            disk,
            name,
            base,
            read_only: AtomicBool::new(read_only),
            alignment,
        }
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// One request, from its arrival to its end. `effect` is what it does between its two halves.
    async fn carry_out(
        &self,
        request: &Request,
        kind: OpKind,
        offset: u64,
        len: u64,
        change: Option<Change>,
        effect: impl FnOnce(&Disk, &OpInfo) + Send,
    ) -> Result<()> {
        let (op, fates) = self.disk.begin(kind, offset, len, change);
        let ended = Ended {
            disk: &self.disk,
            op,
        };
        self.pass_time(request).await;
        let result = async {
            self.suffer(request, &op, &fates, Stage::Before).await?;
            self.disk.takes_effect(&op);
            effect(&self.disk, &op);
            self.suffer(request, &op, &fates, Stage::After).await
        }
        .await;
        self.pass_time(request).await;
        ended.end(result)
    }

    async fn pass_time(&self, request: &Request) {
        let jitter = self.disk.jitter();
        let more = if jitter == 0 {
            0
        } else {
            request.env().random() % (jitter + 1)
        };
        for _ in 0..=more {
            yield_now().await;
        }
    }

    async fn suffer(
        &self,
        request: &Request,
        op: &OpInfo,
        fates: &[Fate],
        stage: Stage,
    ) -> Result<()> {
        for fate in fates {
            match fate {
                Fate::Hold(at, hold) if *at == stage => hold.stop(*op).await,
                Fate::Delay(by) if stage == Stage::Before => request.env().sleep(*by).await,
                Fate::Fail(kind, at) if *at == stage => {
                    return Err(Error::from_kind(*kind).with_file(&self.name));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A request that is over when this is dropped, also when its future was.
struct Ended<'a> {
    disk: &'a Arc<Disk>,
    op: OpInfo,
}

impl Ended<'_> {
    fn end(self, result: Result<()>) -> Result<()> {
        let short = match &result {
            Ok(()) => Ok(()),
            Err(error) => Err(error.kind()),
        };
        self.disk.end(&self.op, short);
        std::mem::forget(self);
        result
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.disk.end(&self.op, Err(ErrorKind::Cancelled));
    }
}

#[async_trait]
impl BlockDriver for TestStorage {
    fn name(&self) -> &'static str {
        "file"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn capabilities(&self) -> Capabilities {
        let always = Capabilities::ZERO_INIT | Capabilities::DISCARD_ZEROES;
        if self.read_only.load(Ordering::SeqCst) {
            return always;
        }
        always
            | Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::TRUNCATE
            | Capabilities::GROW
    }

    fn length(&self, _: &Edges) -> u64 {
        self.disk.len_of(self.base).next_multiple_of(self.alignment)
    }

    fn limits(&self, _: &Edges) -> Limits {
        Limits {
            request_alignment: self.alignment,
            ..Limits::default()
        }
    }

    fn filename(&self) -> Option<String> {
        Some(self.name.clone())
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let (len, offset) = (buf.len(), self.base + offset);
        self.carry_out(
            &request,
            OpKind::Read,
            offset,
            len as u64,
            None,
            |disk, _| {
                let mut bytes = vec![0; len];
                disk.read(offset, &mut bytes);
                buf.copy_from_slice(0, &bytes);
            },
        )
        .await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        let (len, offset) = (buf.len() as u64, self.base + offset);
        let change = Change::Write(offset, Arc::new(buf.to_vec()));
        self.carry_out(
            &request,
            OpKind::Write,
            offset,
            len,
            Some(change),
            Disk::apply,
        )
        .await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        _: RequestFlags,
    ) -> Result<()> {
        let offset = self.base + offset;
        let change = Change::Punch(offset, len);
        self.carry_out(
            &request,
            OpKind::WriteZeroes,
            offset,
            len,
            Some(change),
            Disk::apply,
        )
        .await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        let offset = self.base + offset;
        let change = Change::Punch(offset, len);
        self.carry_out(
            &request,
            OpKind::Discard,
            offset,
            len,
            Some(change),
            Disk::apply,
        )
        .await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        let base = self.base;
        self.carry_out(&request, OpKind::Flush, base, 0, None, |disk, _| {
            disk.flush(base);
        })
        .await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        if how.preallocation == Preallocation::Metadata {
            return Err(Error::unsupported(
                "Unsupported preallocation mode: metadata",
            ));
        }
        let length = self.base + length;
        let change = Change::Resize(length);
        self.carry_out(
            &request,
            OpKind::Truncate,
            length,
            0,
            Some(change),
            Disk::apply,
        )
        .await
    }

    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        yield_now().await;
        let (data, len) = self.disk.run(self.base + offset, len);
        let kind = if data {
            StatusFlags::DATA
        } else {
            StatusFlags::ZERO
        };
        Ok(DriverStatus {
            flags: kind | StatusFlags::OFFSET_VALID,
            len,
            file_offset: offset,
        })
    }

    async fn info(self: Arc<Self>, _: Request) -> Result<ImageInfo> {
        Ok(ImageInfo {
            actual_size: Some(self.disk.allocated_of(self.base)),
            ..ImageInfo::default()
        })
    }

    async fn reopen(self: Arc<Self>, _: Request, changes: Reopen) -> Result<()> {
        if let Some(read_only) = changes.read_only {
            self.read_only.store(read_only, Ordering::SeqCst);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Opens and creates disks of a simulated world under the name of the real protocol, so that images and their backing
/// files are found by plain file names.
///
/// Options of a node: `filename`, and `alignment` (bytes). Options of creation: `size`.
#[derive(Clone)]
pub struct TestStorageFactory {
    disks: Disks,
    alignment: u64,
}

impl TestStorageFactory {
    /// A factory for `disks`.
    pub fn new(disks: &Disks) -> Self {
        Self {
            disks: disks.clone(),
            alignment: 1,
        }
    }

    /// Storage whose requests must be aligned, unless the node's options say otherwise.
    #[must_use]
    pub fn with_alignment(mut self, alignment: u64) -> Self {
        self.alignment = alignment;
        self
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeOptions {
    filename: String,
    alignment: Option<u64>,
    #[allow(dead_code)]
    locking: Option<Value>,
}

#[async_trait]
impl DriverFactory for TestStorageFactory {
    fn name(&self) -> &'static str {
        "file"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    async fn open(&self, context: OpenContext, options: Options) -> Result<Opened> {
        let options: NodeOptions = options.parse()?;
        let place = self.disks.place(&options.filename);
        let there =
            place.filter(|(disk, base)| *base == 0 || disk.content().beside_len().is_some());
        let (disk, base) = there.ok_or_else(|| {
            Error::from_kind(ErrorKind::NotFound)
                .context(format_args!("Could not open '{}'", options.filename))
        })?;
        let alignment = options.alignment.unwrap_or(self.alignment);
        let (name, read_only) = (options.filename, context.node.read_only);
        let driver = TestStorage::of_file(disk, name, base, read_only, alignment);
        Ok(Opened {
            driver: Arc::new(driver),
            edges: Vec::new(),
        })
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        let size = match options.get("size") {
            None => 0,
            Some(Value::String(text)) => parse_size(text)?,
            Some(value) => value
                .as_u64()
                .ok_or_else(|| Error::invalid("Parameter 'size' expects a size"))?,
        };
        let mut content = Content::default();
        content.set_len(size);
        match self.disks.place(&context.filename) {
            Some((disk, 0)) => disk.restore(content),
            Some((disk, _)) => disk.create_beside(size),
            None => self.disks.insert(Disk::new(&context.filename, content)),
        }
        Ok(())
    }
}
