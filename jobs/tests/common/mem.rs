//! A format with its storage in memory, written like a third party's: it drops its lock during data I/O, orders allocations
//! of one cluster itself, and leaves everything else to the core. It can be told to fail.

use std::{
    any::Any,
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Poll, Waker},
};

use block_core::{
    async_trait,
    buffer::{Buffer, IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, Reopen, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::ImageInfo,
    limits::Limits,
    node::Edges,
    request::Request,
    status::DriverStatus,
};
use parking_lot::Mutex;

pub const CLUSTER: u64 = 16 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mapped {
    Data(u64),
    Zero,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    Read,
    Write,
}

#[derive(Clone, Copy)]
struct Fault {
    what: What,
    start: u64,
    end: u64,
    kind: ErrorKind,
    times: u64,
}

#[derive(Default)]
struct State {
    length: u64,
    map: HashMap<u64, Mapped>,
    host: Vec<u8>,
    free: Vec<u64>,
    allocating: HashSet<u64>,
    waiting: Vec<Waker>,
}

pub struct Mem {
    state: Mutex<State>,
    faults: Mutex<Vec<Fault>>,
    read_only: AtomicBool,
    pub closed: AtomicBool,
    pub header: Mutex<(Option<String>, Option<String>)>,
    random: AtomicU64,
    filename: String,
}

impl Mem {
    pub fn new(filename: &str, length: u64) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                length,
                ..State::default()
            }),
            faults: Mutex::default(),
            read_only: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            header: Mutex::default(),
            random: AtomicU64::new(length ^ 0x9e37_79b9),
            filename: filename.to_owned(),
        })
    }

    pub fn read_only(self: Arc<Self>) -> Arc<Self> {
        self.read_only.store(true, Ordering::SeqCst);
        self
    }

    /// The next `times` accesses of that kind to `[start, end)` fail.
    pub fn fail(&self, what: What, start: u64, end: u64, kind: ErrorKind, times: u64) {
        self.faults.lock().push(Fault {
            what,
            start,
            end,
            kind,
            times,
        });
    }

    pub fn heal(&self) {
        self.faults.lock().clear();
    }

    pub fn allocated(&self) -> usize {
        self.state.lock().map.len()
    }

    fn inject(&self, what: What, offset: u64, len: u64) -> Result<()> {
        let mut faults = self.faults.lock();
        for fault in faults.iter_mut() {
            let hit = fault.what == what && offset < fault.end && fault.start < offset + len;
            if hit && fault.times > 0 {
                fault.times -= 1;
                return Err(Error::from_kind(fault.kind));
            }
        }
        Ok(())
    }

    /// Lets others run for a random while.
    async fn linger(&self) {
        let random = self
            .random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mut left = (random >> 61) as u32;
        futures::future::poll_fn(move |cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    async fn store(&self, host: u64, data: &[u8]) {
        let at = host as usize;
        let middle = data.len() / 2;
        self.state.lock().host[at..at + middle].copy_from_slice(&data[..middle]);
        self.linger().await;
        self.state.lock().host[at + middle..at + data.len()].copy_from_slice(&data[middle..]);
    }

    async fn load(&self, host: u64, data: &mut [u8]) {
        let at = host as usize;
        let middle = data.len() / 2;
        data[..middle].copy_from_slice(&self.state.lock().host[at..at + middle]);
        self.linger().await;
        let end = at + data.len();
        data[middle..].copy_from_slice(&self.state.lock().host[at + middle..end]);
    }

    fn allocate(&self) -> u64 {
        let mut state = self.state.lock();
        if let Some(host) = state.free.pop() {
            return host;
        }
        let host = state.host.len() as u64;
        state.host.resize((host + CLUSTER) as usize, 0xee);
        host
    }

    /// Who allocates a cluster does it alone. The mapping if there is one by then.
    async fn claim(&self, cluster: u64) -> Option<u64> {
        futures::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if let Some(Mapped::Data(host)) = state.map.get(&cluster) {
                return Poll::Ready(Some(*host));
            }
            if state.allocating.insert(cluster) {
                return Poll::Ready(None);
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    fn unclaim(&self, cluster: u64, host: u64, linked: bool) {
        let waiting = {
            let mut state = self.state.lock();
            state.allocating.remove(&cluster);
            if linked {
                state.map.insert(cluster, Mapped::Data(host));
            } else {
                state.free.push(host);
            }
            std::mem::take(&mut state.waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }

    async fn write_piece(&self, request: &Request, offset: u64, data: Vec<u8>) -> Result<()> {
        let cluster = offset / CLUSTER;
        let within = offset % CLUSTER;
        if let Some(host) = self.claim(cluster).await {
            self.linger().await;
            self.store(host + within, &data).await;
            return Ok(());
        }
        let host = self.allocate();
        let mut whole = vec![0; CLUSTER as usize];
        let is_zero = self.state.lock().map.get(&cluster) == Some(&Mapped::Zero);
        if !is_zero && (data.len() as u64) < CLUSTER {
            let (lent, buf) = Buffer::new(CLUSTER as usize).lend();
            if let Err(error) = request.read_backing(cluster * CLUSTER, buf).await {
                self.unclaim(cluster, host, false);
                return Err(error);
            }
            whole = lent.reclaim().expect("nobody keeps it").to_vec();
        }
        whole[within as usize..within as usize + data.len()].copy_from_slice(&data);
        self.store(host, &whole).await;
        self.linger().await;
        self.unclaim(cluster, host, true);
        Ok(())
    }

    fn unmap(&self, cluster: u64, to: Option<Mapped>) {
        let mut state = self.state.lock();
        let old = match to {
            Some(to) => state.map.insert(cluster, to),
            None => state.map.remove(&cluster),
        };
        if let Some(Mapped::Data(host)) = old {
            // Freed at once: the next owner's data must not be hit by anything late.
            state.free.push(host);
        }
    }
}

fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = offset;
    let end = offset + len;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let stop = (at - at % CLUSTER + CLUSTER).min(end);
        let piece = (at, stop - at);
        at = stop;
        Some(piece)
    })
}

#[async_trait]
impl BlockDriver for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        let all = Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::BACKING
            | Capabilities::TRUNCATE
            | Capabilities::CHANGE_BACKING;
        if self.read_only.load(Ordering::SeqCst) {
            Capabilities::BACKING
        } else {
            all
        }
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.state.lock().length
    }

    fn limits(&self, _edges: &Edges) -> Limits {
        Limits {
            request_alignment: 512,
            serialising_granularity: CLUSTER,
            zeroes_alignment: CLUSTER,
            discard_alignment: CLUSTER,
            ..Limits::default()
        }
    }

    fn filename(&self) -> Option<String> {
        Some(self.filename.clone())
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        self.inject(What::Read, offset, buf.len() as u64)?;
        let len = buf.len() as u64;
        for (at, len) in pieces(offset, len) {
            let mut piece = buf.split_to(len as usize);
            let mapped = self.state.lock().map.get(&(at / CLUSTER)).copied();
            self.linger().await;
            match mapped {
                None => request.read_backing(at, piece).await?,
                Some(Mapped::Zero) => piece.fill(0),
                Some(Mapped::Data(host)) => {
                    let mut data = vec![0; len as usize];
                    self.load(host + at % CLUSTER, &mut data).await;
                    piece.copy_from_slice(0, &data);
                }
            }
        }
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.inject(What::Write, offset, buf.len() as u64)?;
        let len = buf.len() as u64;
        for (at, len) in pieces(offset, len) {
            let start = (at - offset) as usize;
            let data = buf.slice(start..start + len as usize).to_vec();
            self.write_piece(&request, at, data).await?;
        }
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.inject(What::Write, offset, len)?;
        for (at, len) in pieces(offset, len) {
            self.linger().await;
            if len == CLUSTER && flags.contains(RequestFlags::MAY_UNMAP) {
                self.unmap(at / CLUSTER, Some(Mapped::Zero));
            } else {
                self.write_piece(&request, at, vec![0; len as usize])
                    .await?;
            }
        }
        Ok(())
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        for (at, len) in pieces(offset, len) {
            self.linger().await;
            if len == CLUSTER {
                let has_backing = request.child(ChildRole::Backing).is_some();
                self.unmap(at / CLUSTER, has_backing.then_some(Mapped::Zero));
            }
        }
        Ok(())
    }

    async fn flush(self: Arc<Self>, _request: Request) -> Result<()> {
        self.linger().await;
        Ok(())
    }

    async fn truncate(
        self: Arc<Self>,
        _request: Request,
        length: u64,
        how: Truncate,
    ) -> Result<()> {
        let mut state = self.state.lock();
        if how.zero {
            for cluster in state.length.div_ceil(CLUSTER)..length.div_ceil(CLUSTER) {
                state.map.insert(cluster, Mapped::Zero);
            }
        }
        state.length = length;
        Ok(())
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let state = self.state.lock();
        let kind = |at: u64| match state.map.get(&(at / CLUSTER)) {
            None => 0,
            Some(Mapped::Zero) => 1,
            Some(Mapped::Data(_)) => 2,
        };
        let first = kind(offset);
        let run: u64 = pieces(offset, len)
            .take_while(|(at, _)| kind(*at) == first)
            .map(|(_, len)| len)
            .sum();
        Ok(match first {
            0 => DriverStatus::unallocated(run),
            1 => DriverStatus::zero(run),
            _ => DriverStatus::data(run),
        })
    }

    async fn change_backing(
        self: Arc<Self>,
        _request: Request,
        file: Option<String>,
        format: Option<String>,
    ) -> Result<()> {
        *self.header.lock() = (file, format);
        Ok(())
    }

    async fn info(self: Arc<Self>, _request: Request) -> Result<ImageInfo> {
        Ok(ImageInfo {
            cluster_size: Some(CLUSTER),
            ..ImageInfo::default()
        })
    }

    async fn reopen(self: Arc<Self>, _request: Request, changes: Reopen) -> Result<()> {
        if let Some(read_only) = changes.read_only {
            self.read_only.store(read_only, Ordering::SeqCst);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
