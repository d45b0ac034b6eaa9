//! The driver over one open file or device: what the core calls. It decides which way a request goes (inline, engine,
//! bounce) and keeps the node's length; the ways themselves are in `inline`, `engine` and `space`.

use std::{
    any::Any,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use block_core::{
    buffer::{BufferPool, IoBuf, IoBufMut},
    driver::{Attempt, BlockDriver, Capabilities, DriverKind, Reopen, Truncate},
    error::{Error, ErrorKind, Operation, Result},
    flags::{PermissionSet, RequestFlags},
    image::ImageInfo,
    limits::Limits,
    node::Edges,
    producer::ProducerId,
    request::Request,
    status::{DriverStatus, StatusFlags},
};

use crate::{
    counters::Counters,
    create::check_preallocation,
    engine::Engine,
    fd_sets::FdSets,
    image_lock::{ImageLock, Locking},
    inline,
    open_file::{FileKind, OpenFile, OpenHow, is_unsupported},
    options::Inline,
    space::{self, Extent},
};

/// The longest piece that goes through a bounce buffer at once, in bytes.
const BOUNCE_MAX: usize = 4 << 20;
/// How much of bounce buffers is kept while nobody uses it, in bytes.
const BOUNCE_IDLE: usize = 8 << 20;

/// How a driver is set up, apart from its file and engine.
pub(crate) struct Settings {
    pub(crate) how: OpenHow,
    pub(crate) fd_sets: FdSets,
    pub(crate) inline: Inline,
    pub(crate) locking: Locking,
    pub(crate) no_flush: bool,
    pub(crate) force_share: bool,
}

/// A regular file or host device as a node's storage.
pub struct FileDriver {
    how: OpenHow,
    fd_sets: FdSets,
    file: ArcSwap<OpenFile>,
    engine: Engine,
    inline: Inline,
    no_flush: bool,
    lock: ImageLock,
    /// Bits of [`Capabilities`], which change when the file is reopened or its file system refuses something.
    capabilities: AtomicU32,
    /// In bytes.
    length: AtomicU64,
    /// A flush failed: what was written before may be lost, and no later flush may say otherwise.
    flush_failed: AtomicBool,
    bounce: BufferPool,
    counters: Counters,
}

fn capabilities_of(file: &OpenFile) -> Capabilities {
    let mut capabilities = Capabilities::empty();
    if file.is_writable() {
        capabilities |= Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::FUA
            | Capabilities::TRUNCATE
            | Capabilities::COPY_RANGE;
    }
    if file.is_regular() {
        capabilities |= Capabilities::ZERO_INIT;
        if file.is_writable() {
            capabilities |= Capabilities::DISCARD_ZEROES | Capabilities::GROW;
        }
    }
    capabilities
}

impl FileDriver {
    pub(crate) fn new(file: OpenFile, engine: Engine, settings: Settings) -> Result<Self> {
        let Settings {
            how,
            fd_sets,
            inline,
            locking,
            no_flush,
            force_share,
        } = settings;
        let length = file
            .query_length()
            .map_err(|error| Error::from(error).with_file(&how.path))?;
        Ok(Self {
            lock: ImageLock::new(locking, &how.path, force_share),
            capabilities: AtomicU32::new(capabilities_of(&file).bits()),
            length: AtomicU64::new(length),
            file: ArcSwap::from_pointee(file),
            how,
            fd_sets,
            engine,
            inline,
            no_flush,
            flush_failed: AtomicBool::new(false),
            bounce: BufferPool::new(BOUNCE_IDLE),
            counters: Counters::default(),
        })
    }

    /// The engine in use: `io_uring` or `threads`.
    pub fn aio(&self) -> &'static str {
        self.engine.name()
    }

    /// Bytes that the file system has allocated for it.
    pub fn allocated_bytes(&self) -> Result<u64> {
        self.file
            .load()
            .allocated()
            .map_err(|error| self.error(error, Operation::BlockStatus, 0, 0))
    }

    #[cold]
    fn error(&self, error: io::Error, operation: Operation, offset: u64, len: u64) -> Error {
        Error::from(error)
            .with_file(&self.how.path)
            .with_operation(operation, offset, len)
    }

    /// A write has ended at `end`.
    #[inline]
    fn grown_to(&self, end: u64) {
        if end > self.length.load(Ordering::Acquire) && self.file.load().is_regular() {
            self.length.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// What came of a write.
    #[inline]
    fn wrote(&self, result: io::Result<()>, offset: u64, len: u64) -> Result<()> {
        match result {
            Ok(()) => {
                self.grown_to(offset + len);
                Ok(())
            }
            Err(error) => {
                self.refresh_length();
                Err(self.error(error, Operation::Write, offset, len))
            }
        }
    }

    /// After a failure nobody knows how far the file has grown: look.
    fn refresh_length(&self) {
        if let Ok(length) = self.file.load().query_length() {
            self.length.store(length, Ordering::Release);
        }
    }

    fn drop_capabilities(&self, capabilities: Capabilities) {
        self.capabilities
            .fetch_and(!capabilities.bits(), Ordering::AcqRel);
    }

    /// Runs `work` on the file, away from the tasks.
    async fn blocking<T: Send + 'static>(
        &self,
        producer: ProducerId,
        work: impl FnOnce(&OpenFile) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let file = self.file.load_full();
        self.engine.call(producer, move || work(&file)).await?
    }

    /// Reads through memory that O_DIRECT accepts.
    async fn read_bounced(
        &self,
        producer: ProducerId,
        file: &Arc<OpenFile>,
        mut offset: u64,
        mut buf: IoBufMut,
    ) -> io::Result<()> {
        while !buf.is_empty() {
            let mut piece = buf.split_to(buf.len().min(BOUNCE_MAX));
            self.counters.bounced.add();
            let len = piece.len();
            let (lent, whole) = self
                .bounce
                .try_get(len)
                .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?
                .lend();
            self.engine
                .read(producer, file.clone(), offset, whole)
                .await?;
            let bounce = lent
                .reclaim()
                .map_err(|_| io::Error::from_raw_os_error(libc::EIO))?;
            piece.copy_from_slice(0, &bounce);
            self.bounce.put(bounce);
            offset += len as u64;
        }
        Ok(())
    }

    /// Writes through memory that O_DIRECT accepts.
    async fn write_bounced(
        &self,
        producer: ProducerId,
        file: &Arc<OpenFile>,
        mut offset: u64,
        mut buf: IoBuf,
        dsync: bool,
    ) -> io::Result<()> {
        while !buf.is_empty() {
            let piece = buf.split_to(buf.len().min(BOUNCE_MAX));
            self.counters.bounced.add();
            let len = piece.len();
            let mut bounce = self
                .bounce
                .try_get(len)
                .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
            piece.copy_to_slice(0, &mut bounce);
            let data = IoBuf::from(bounce);
            self.engine
                .write(producer, file.clone(), offset, data.clone(), dsync)
                .await?;
            if let Ok(bounce) = data.try_into_buffer() {
                self.bounce.put(bounce);
            }
            offset += len as u64;
        }
        Ok(())
    }

    async fn write_queued(
        &self,
        producer: ProducerId,
        offset: u64,
        buf: IoBuf,
        dsync: bool,
    ) -> io::Result<()> {
        let file = self.file.load_full();
        self.counters.queued_writes.add();
        let needs_bounce =
            file.is_direct() && !buf.is_aligned(file.memory_alignment(), file.transfer_unit());
        if needs_bounce {
            return self
                .write_bounced(producer, &file, offset, buf, dsync)
                .await;
        }
        self.engine.write(producer, file, offset, buf, dsync).await
    }

    /// A durable write. Where the kernel has no RWF_DSYNC here, a flush follows the write.
    async fn write_durable(&self, producer: ProducerId, offset: u64, buf: IoBuf) -> io::Result<()> {
        let file = self.file.load_full();
        if !file.refusals.dsync.is_set() {
            match self.write_queued(producer, offset, buf.clone(), true).await {
                Err(error) if is_unsupported(&error) => file.refusals.dsync.set(),
                Err(error) => {
                    // The kernel tells an error of write-back once: this write may have been told of one that
                    // concerns others. Running out of space is told by the write itself.
                    let of_this_write = matches!(
                        error.raw_os_error(),
                        Some(
                            libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::EINVAL | libc::ENOMEM
                        )
                    );
                    if !of_this_write {
                        self.flush_failed.store(true, Ordering::Release);
                    }
                    return Err(error);
                }
                done => return done,
            }
        }
        self.write_queued(producer, offset, buf, false).await?;
        self.sync(producer).await
    }

    /// `fdatasync`, whose failure is remembered.
    async fn sync(&self, producer: ProducerId) -> io::Result<()> {
        self.counters.flushes.add();
        let result = self.engine.flush(producer, self.file.load_full()).await;
        if result.is_err() {
            self.flush_failed.store(true, Ordering::Release);
        }
        result
    }

    fn check_flushable(&self) -> Result<()> {
        if self.flush_failed.load(Ordering::Acquire) {
            return Err(Error::io(
                "an earlier flush failed: data written before it may be lost, reopen the image",
            )
            .with_file(&self.how.path)
            .with_operation(Operation::Flush, 0, 0));
        }
        Ok(())
    }
}

impl Drop for FileDriver {
    fn drop(&mut self) {
        self.lock.release(&self.file.load());
    }
}

impl std::fmt::Debug for FileDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileDriver")
            .field("path", &self.how.path)
            .field("aio", &self.aio())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl BlockDriver for FileDriver {
    fn name(&self) -> &'static str {
        if self.how.device {
            "host_device"
        } else {
            "file"
        }
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    #[inline]
    fn capabilities(&self) -> Capabilities {
        Capabilities::from_bits_retain(self.capabilities.load(Ordering::Acquire))
    }

    #[inline]
    fn length(&self, _edges: &Edges) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    fn limits(&self, _edges: &Edges) -> Limits {
        let file = self.file.load();
        let alignment = file.offset_alignment();
        Limits {
            request_alignment: alignment,
            zeroes_alignment: alignment,
            discard_alignment: alignment,
            memory_alignment: file.memory_alignment(),
            serialising_granularity: alignment,
            ..Limits::default()
        }
    }

    fn filename(&self) -> Option<String> {
        Some(self.how.path.clone())
    }

    fn prepare_permissions(&self, wanted: PermissionSet) -> Result<()> {
        self.lock.prepare(&self.file.load(), wanted)
    }

    fn commit_permissions(&self) {
        self.lock.commit(&self.file.load());
    }

    fn abort_permissions(&self) {
        self.lock.abort(&self.file.load());
    }

    #[inline]
    fn try_read(&self, offset: u64, buf: &mut IoBufMut) -> Attempt {
        let attempt = inline::read(&self.file.load(), self.inline, offset, buf);
        match attempt {
            inline::Attempt::Done(Ok(())) => {
                self.counters.inline_reads.add();
                Attempt::Done(Ok(()))
            }
            inline::Attempt::Done(Err(error)) => {
                let len = buf.len() as u64;
                Attempt::Done(Err(self.error(error, Operation::Read, offset, len)))
            }
            inline::Attempt::Left(done) => Attempt::Left(done),
        }
    }

    #[inline]
    fn try_write(&self, offset: u64, buf: &IoBuf, flags: RequestFlags) -> Attempt {
        if flags.contains(RequestFlags::FUA) && !self.no_flush {
            return Attempt::Left(0);
        }
        let attempt = inline::write(&self.file.load(), self.inline, offset, buf);
        match attempt {
            inline::Attempt::Done(result) => {
                self.counters.inline_writes.add();
                Attempt::Done(self.wrote(result, offset, buf.len() as u64))
            }
            inline::Attempt::Left(done) => {
                if done > 0 {
                    self.grown_to(offset + done as u64);
                }
                Attempt::Left(done)
            }
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        let file = self.file.load_full();
        let (producer, len) = (request.producer(), buf.len() as u64);
        self.counters.queued_reads.add();
        let needs_bounce =
            file.is_direct() && !buf.is_aligned(file.memory_alignment(), file.transfer_unit());
        let result = if needs_bounce {
            self.read_bounced(producer, &file, offset, buf).await
        } else {
            self.engine.read(producer, file, offset, buf).await
        };
        result.map_err(|error| self.error(error, Operation::Read, offset, len))
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let len = buf.len() as u64;
        let producer = request.producer();
        let durable = flags.contains(RequestFlags::FUA) && !self.no_flush;
        let result = if durable {
            self.check_flushable()?;
            self.write_durable(producer, offset, buf).await
        } else {
            self.write_queued(producer, offset, buf, false).await
        };
        self.wrote(result, offset, len)
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let durable = flags.contains(RequestFlags::FUA) && !self.no_flush;
        if durable {
            self.check_flushable()?;
        }
        self.counters.zeroes.add();
        let may_unmap = flags.contains(RequestFlags::MAY_UNMAP);
        let mut result = self
            .blocking(request.producer(), move |file| {
                space::write_zeroes(file, offset, len, may_unmap)
            })
            .await;
        if result.is_ok() && durable {
            result = self.sync(request.producer()).await;
        }
        match result {
            Ok(()) => {
                self.grown_to(offset + len);
                Ok(())
            }
            Err(error) => {
                self.refresh_length();
                Err(self.error(error, Operation::WriteZeroes, offset, len))
            }
        }
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        self.counters.discards.add();
        let result = self
            .blocking(request.producer(), move |file| {
                space::discard(file, offset, len)
            })
            .await;
        result.map_err(|error| {
            if is_unsupported(&error) {
                self.drop_capabilities(Capabilities::DISCARD | Capabilities::DISCARD_ZEROES);
            }
            self.error(error, Operation::Discard, offset, len)
        })
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        if self.no_flush || !self.file.load().is_writable() {
            return Ok(());
        }
        self.check_flushable()?;
        self.sync(request.producer())
            .await
            .map_err(|error| self.error(error, Operation::Flush, 0, 0))
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        let old = self.length.load(Ordering::Acquire);
        let refuse = |text: &str| {
            Err(Error::invalid(text)
                .with_file(&self.how.path)
                .with_operation(Operation::Truncate, length, 0))
        };
        let file = self.file.load_full();
        if !file.is_regular() {
            let device = file.query_length().unwrap_or(old);
            self.length.store(device, Ordering::Release);
            if length != device && how.exact {
                return refuse("Cannot resize device files");
            }
            if length > device {
                return refuse("Cannot grow device files");
            }
            return Ok(());
        }
        check_preallocation(how.preallocation, old, length)
            .map_err(|error| error.with_file(&self.how.path))?;
        let result = self
            .blocking(request.producer(), move |file| {
                space::resize(file, length, how.preallocation)
            })
            .await;
        self.refresh_length();
        result.map_err(|error| {
            self.error(error, Operation::Truncate, length, 0)
                .context(space::resize_failure(how.preallocation))
        })
    }

    async fn block_status(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let file = self.file.load_full();
        let extent = if let Some(known) = space::known_extent_at(&file, offset, len) {
            self.counters.known_data.add();
            known
        } else if inline::may_wait(&file, self.inline) {
            space::extent_at(&file, offset, len)
        } else if file.is_regular() && !file.refusals.seek_data.is_set() {
            self.blocking(request.producer(), move |file| {
                Ok(space::extent_at(file, offset, len))
            })
            .await
            .map_err(|error| self.error(error, Operation::BlockStatus, offset, len))?
        } else {
            Extent::Data(len)
        };
        let (flags, len) = match extent {
            Extent::Data(len) => (StatusFlags::DATA, len),
            Extent::Hole(len) => (StatusFlags::ZERO, len),
        };
        Ok(DriverStatus {
            flags: flags | StatusFlags::OFFSET_VALID,
            len,
            file_offset: offset,
        })
    }

    async fn copy_range_from(
        self: Arc<Self>,
        request: Request,
        source: Arc<dyn BlockDriver>,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let Some(source) = source.as_any().downcast_ref::<Self>() else {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        };
        self.counters.copies.add();
        let from = source.file.load_full();
        let result = self
            .blocking(request.producer(), move |to| {
                space::copy_range(&from, source_offset, to, offset, len)
            })
            .await;
        match result {
            Ok(()) => {
                self.grown_to(offset + len);
                Ok(())
            }
            Err(error) => {
                self.refresh_length();
                Err(self.error(error, Operation::CopyRange, offset, len))
            }
        }
    }

    async fn info(self: Arc<Self>, _request: Request) -> Result<ImageInfo> {
        let file = self.file.load_full();
        let mut data = serde_json::Map::new();
        data.insert("aio".into(), self.aio().into());
        data.insert("inline".into(), self.inline.name().into());
        data.insert("locking".into(), self.lock.describe().into());
        if file.is_direct() {
            data.insert("direct-alignment".into(), file.offset_alignment().into());
            data.insert("memory-alignment".into(), file.memory_alignment().into());
        }
        let allocated = file
            .allocated()
            .map_err(|error| self.error(error, Operation::BlockStatus, 0, 0))?;
        Ok(ImageInfo {
            actual_size: Some(allocated),
            format_specific: Some(("file".into(), data.into())),
            ..ImageInfo::default()
        })
    }

    /// Opens the same file again, read-only or read-write, and forgets that a flush failed. Image locks move with it.
    async fn reopen(self: Arc<Self>, request: Request, changes: Reopen) -> Result<()> {
        for (key, value) in &changes.options {
            let same = match key.as_str() {
                "filename" => value.as_str() == Some(&self.how.path),
                "driver" => value.as_str() == Some(BlockDriver::name(&*self)),
                // The core's own.
                "discard" | "detect-zeroes" => true,
                _ => false,
            };
            if !same {
                return Err(Error::invalid(format!("Cannot change the option '{key}'"))
                    .with_file(&self.how.path)
                    .with_operation(Operation::Reopen, 0, 0));
            }
        }
        let old = self.file.load_full();
        let mut how = self.how.clone();
        how.read_only = changes.read_only.unwrap_or(!old.is_writable());
        let (sets, old_file) = (self.fd_sets.clone(), old.clone());
        let new = self
            .engine
            .call(request.producer(), move || how.open_again(&old_file, &sets))
            .await
            .map_err(|error| self.error(error, Operation::Reopen, 0, 0))??;
        self.lock.carry_over(&new)?;
        let length = new
            .query_length()
            .map_err(|error| self.error(error, Operation::Reopen, 0, 0))?;
        self.length.store(length, Ordering::Release);
        self.capabilities
            .store(capabilities_of(&new).bits(), Ordering::Release);
        self.file.store(Arc::new(new));
        self.lock.release_descriptor(&old);
        self.flush_failed.store(false, Ordering::Release);
        Ok(())
    }

    /// Gives the image locks back. The descriptor goes with the driver.
    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        self.lock.release(&self.file.load());
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl FileDriver {
    /// Whether it is over a block or character device.
    pub fn is_device(&self) -> bool {
        self.file.load().kind() != FileKind::Regular
    }
}
