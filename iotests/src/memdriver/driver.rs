//! The driver: how the third party does I/O. Its lock is never held over an await.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use async_trait::async_trait;
use block_core::{
    buffer::{Buffer, IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::{CheckMode, CheckReport, ImageInfo, Progress},
    limits::Limits,
    node::Edges,
    request::Request,
    status::DriverStatus,
};
use parking_lot::Mutex;

use super::{
    NAME,
    table::{Entry, Table},
};

/// An open image of the third party's format.
pub struct ThirdParty {
    table: Mutex<Table>,
    cluster: u64,
    read_only: bool,
    snapshot_at_check: AtomicBool,
}

/// What a write to one cluster does.
enum Plan {
    InPlace(u64),
    Allocate(u64, Entry),
}

impl ThirdParty {
    pub(super) fn new(table: Table, read_only: bool) -> Self {
        Self {
            cluster: table.cluster,
            table: Mutex::new(table),
            read_only,
            snapshot_at_check: AtomicBool::new(false),
        }
    }

    /// The next check takes a snapshot, kept in memory until the image is closed: what has data then is copied before it
    /// is written. (A check is a request over the whole node, as an internal snapshot is, and a test can send one.)
    pub fn snapshot_at_next_check(&self) {
        self.snapshot_at_check.store(true, Ordering::SeqCst);
    }

    /// Where in the file the snapshot's cluster at `offset` is, if it has data there.
    pub fn snapshot_host(&self, offset: u64) -> Option<u64> {
        let table = self.table.lock();
        match table.snapshot.get((offset / self.cluster) as usize) {
            Some(Entry::Data(host)) => Some(*host),
            _ => None,
        }
    }

    /// Splits a range at cluster boundaries: (cluster, offset within, length).
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = (usize, u64, u64)> + use<> {
        let cluster = self.cluster;
        let end = offset + len;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let within = at % cluster;
            let step = (cluster - within).min(end - at);
            let piece = ((at / cluster) as usize, within, step);
            at += step;
            Some(piece)
        })
    }

    fn entry(&self, at: usize) -> Entry {
        let table = self.table.lock();
        table.entries.get(at).copied().unwrap_or(Entry::Unallocated)
    }

    /// Decides how to write to a cluster, and waits while somebody else allocates it.
    async fn plan(&self, at: usize) -> Result<Plan> {
        futures::future::poll_fn(|cx| {
            let mut table = self.table.lock();
            match table.entries.get(at).copied() {
                None => Poll::Ready(Err(Error::io("write beyond the end of the image"))),
                Some(Entry::Data(host)) if !table.shared.contains(&host) => {
                    Poll::Ready(Ok(Plan::InPlace(host)))
                }
                Some(old) => {
                    if let Some(waiting) = table.allocating.get_mut(&at) {
                        waiting.push(cx.waker().clone());
                        return Poll::Pending;
                    }
                    table.allocating.insert(at, Vec::new());
                    let host = table.allocate();
                    Poll::Ready(Ok(Plan::Allocate(host, old)))
                }
            }
        })
        .await
    }

    /// The allocation of a cluster has come to its end.
    fn allocated(&self, at: usize, host: u64, ok: bool) {
        let mut table = self.table.lock();
        if ok && at < table.entries.len() {
            table.set(at, Entry::Data(host));
        } else {
            table.free(host);
        }
        let waiting = table.allocating.remove(&at).unwrap_or_default();
        drop(table);
        for waker in waiting {
            waker.wake();
        }
    }

    /// Writes a whole new cluster: what was there before, with `data` over it.
    async fn fill(
        &self,
        request: &Request,
        at: usize,
        host: u64,
        old: Entry,
        within: u64,
        data: IoBuf,
    ) -> Result<()> {
        let file = request.file()?;
        let len = data.len() as u64;
        if within == 0 && len == self.cluster {
            return file.write(host, data, RequestFlags::empty()).await;
        }
        let (lent, mut buf) = Buffer::try_new(self.cluster as usize)?.lend();
        match old {
            Entry::Unallocated => request.read_backing(at as u64 * self.cluster, buf).await?,
            Entry::Data(shared) => file.read(shared, buf).await?,
            Entry::Zero => {
                buf.fill(0);
                drop(buf);
            }
        }
        let whole = lent
            .reclaim()
            .map_err(|_| Error::io("a read buffer was kept"))?;
        let whole = IoBuf::from(whole);
        let mut out = whole.slice(..within as usize);
        out.append(data);
        out.append(whole.slice((within + len) as usize..));
        file.write(host, out, RequestFlags::empty()).await
    }

    /// Unlinks whole clusters; the allocator may hand theirs out from now on.
    fn unlink(&self, offset: u64, len: u64, to: impl Fn(Entry) -> Entry) {
        let mut table = self.table.lock();
        for (at, within, step) in self.pieces(offset, len) {
            let end_of_disk = at as u64 * self.cluster + step == table.size;
            if within != 0 || (step != self.cluster && !end_of_disk) {
                continue;
            }
            if let Some(old) = table.entries.get(at).copied()
                && let Some(host) = table.set(at, to(old))
            {
                table.free(host);
            }
        }
    }

    /// Zeroes what the last cluster has, or would show of the backing file, behind the end of a disk that is going to grow.
    async fn zero_behind_end(&self, request: &Request, length: u64) -> Result<()> {
        let old = self.table.lock().size;
        let (at, within) = ((old / self.cluster) as usize, old % self.cluster);
        if length <= old || within == 0 || self.entry(at) == Entry::Zero {
            return Ok(());
        }
        let rest = self.cluster - within;
        match self.plan(at).await? {
            Plan::InPlace(host) => {
                let flags = RequestFlags::empty();
                let file = request.file()?;
                file.write_zeroes(host + within, rest, flags).await
            }
            Plan::Allocate(host, old) => {
                let zeroes = IoBuf::zeroes(rest as usize);
                let filled = self.fill(request, at, host, old, within, zeroes).await;
                self.allocated(at, host, filled.is_ok());
                filled
            }
        }
    }

    async fn write_back(&self, request: &Request) -> Result<()> {
        let bytes = {
            let mut table = self.table.lock();
            if !table.changed || self.read_only {
                None
            } else {
                table.changed = false;
                Some(table.to_bytes())
            }
        };
        let file = request.file()?;
        if let Some(bytes) = bytes
            && let Err(error) = file.write(0, bytes, RequestFlags::empty()).await
        {
            self.table.lock().changed = true;
            return Err(error);
        }
        file.flush().await
    }
}

#[async_trait]
impl BlockDriver for ThirdParty {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        let always = Capabilities::BACKING | Capabilities::CHECK;
        if self.read_only {
            return always;
        }
        always
            | Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::DISCARD_ZEROES
            | Capabilities::TRUNCATE
            | Capabilities::ZERO_INIT
    }

    fn length(&self, _: &Edges) -> u64 {
        self.table.lock().size
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let alignment = edges
            .primary()
            .map_or(1, |child| child.limits().request_alignment);
        Limits {
            request_alignment: alignment,
            zeroes_alignment: self.cluster,
            discard_alignment: self.cluster,
            serialising_granularity: self.cluster,
            ..Limits::default()
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let file = request.file()?;
        for (at, within, step) in self.pieces(offset, buf.len() as u64) {
            let mut piece = buf.split_to(step as usize);
            match self.entry(at) {
                Entry::Data(host) => file.read(host + within, piece).await?,
                Entry::Zero => piece.fill(0),
                Entry::Unallocated => {
                    let offset = at as u64 * self.cluster + within;
                    request.read_backing(offset, piece).await?;
                }
            }
        }
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        mut buf: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        let file = request.file()?;
        for (at, within, step) in self.pieces(offset, buf.len() as u64) {
            let data = buf.split_to(step as usize);
            match self.plan(at).await? {
                Plan::InPlace(host) => {
                    file.write(host + within, data, RequestFlags::empty())
                        .await?;
                }
                Plan::Allocate(host, old) => {
                    let filled = self.fill(&request, at, host, old, within, data).await;
                    self.allocated(at, host, filled.is_ok());
                    filled?;
                }
            }
        }
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
        _: RequestFlags,
    ) -> Result<()> {
        let whole = self.pieces(offset, len).all(|(at, within, step)| {
            let stop = at as u64 * self.cluster + step;
            within == 0 && (step == self.cluster || stop == self.table.lock().size)
        });
        if !whole {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        self.unlink(offset, len, |_| Entry::Zero);
        Ok(())
    }

    async fn discard(self: Arc<Self>, _: Request, offset: u64, len: u64) -> Result<()> {
        self.unlink(offset, len, |_| Entry::Zero);
        Ok(())
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.write_back(&request).await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        // What is cut off within the last cluster must not come back when the image grows again.
        let within = length % self.cluster;
        if within != 0
            && length < self.table.lock().size
            && let Entry::Data(host) = self.entry((length / self.cluster) as usize)
        {
            let flags = RequestFlags::empty();
            let rest = self.cluster - within;
            request
                .file()?
                .write_zeroes(host + within, rest, flags)
                .await?;
        }
        let room = self.table.lock().max_clusters;
        if length.div_ceil(self.cluster) > room {
            return Err(Error::new(
                ErrorKind::TooBig,
                "no room in the mapping table",
            ));
        }
        if how.zero {
            self.zero_behind_end(&request, length).await?;
        }
        let mut table = self.table.lock();
        let old = table.size.div_ceil(self.cluster) as usize;
        table.resize(length);
        if how.zero {
            for entry in table.entries.iter_mut().skip(old) {
                *entry = Entry::Zero;
            }
        }
        Ok(())
    }

    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let within = offset % self.cluster;
        let len = len.min(self.cluster - within);
        Ok(match self.entry((offset / self.cluster) as usize) {
            Entry::Unallocated => DriverStatus::unallocated(len),
            Entry::Zero => DriverStatus::zero(len),
            Entry::Data(host) => DriverStatus::data_at(len, host + within),
        })
    }

    async fn check(
        self: Arc<Self>,
        _: Request,
        mode: CheckMode,
        _: Progress,
    ) -> Result<CheckReport> {
        if mode != CheckMode::ReadOnly {
            return Err(Error::unsupported(
                "This image format does not support repair",
            ));
        }
        let mut table = self.table.lock();
        if self.snapshot_at_check.swap(false, Ordering::SeqCst) {
            table.take_snapshot();
        }
        Ok(table.check())
    }

    async fn info(self: Arc<Self>, _: Request) -> Result<ImageInfo> {
        Ok(ImageInfo {
            cluster_size: Some(self.cluster),
            ..ImageInfo::default()
        })
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        self.write_back(&request).await
    }

    fn watch_space(&self, watch: Arc<dyn block_core::space::SpaceWatch>) -> bool {
        let table = self.table.lock();
        let set = table.tap.set(watch);
        if set {
            table.tell_all();
        }
        set
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
