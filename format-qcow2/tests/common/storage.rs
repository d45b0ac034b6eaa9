//! Storage in memory that logs what reaches it, dawdles so that requests overlap, and fails when told to.

use std::{
    any::Any,
    collections::HashMap,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
};

use block_core::{
    async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Reopen, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    limits::Limits,
    node::Edges,
    options::Options,
    registry::{DriverFactory, OpenContext, Opened},
    request::Request,
    status::DriverStatus,
};
use parking_lot::Mutex;

/// What reached the storage.
#[derive(Debug, Clone)]
pub enum Event {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Length(u64),
    Flush,
}

impl Event {
    pub fn apply(&self, data: &mut Vec<u8>) {
        match self {
            Self::Write(at, bytes) => {
                let (at, end) = (*at as usize, *at as usize + bytes.len());
                if data.len() < end {
                    data.resize(end, 0);
                }
                data[at..end].copy_from_slice(bytes);
            }
            Self::Zero(at, len) => {
                let end = (*at + *len).min(data.len() as u64) as usize;
                if (*at as usize) < end {
                    data[*at as usize..end].fill(0);
                }
            }
            Self::Length(len) => data.resize(*len as usize, 0),
            Self::Flush => {}
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    #[default]
    None,
    /// The storage can't grow beyond this many bytes.
    Full(u64),
    /// Writes fail.
    Writes,
    /// Reads fail.
    Reads,
    /// Flushes fail.
    Flushes,
    /// Reads and writes that begin at this offset fail, at once.
    At(u64),
    /// The read with this number fails, once; the first has number 0.
    NthRead(u64),
}

#[derive(Default)]
pub struct State {
    pub data: Vec<u8>,
    pub log: Vec<Event>,
    pub keep_log: bool,
    pub fault: Fault,
}

/// The storage. Clones of the `Arc` see the same bytes, also after the node is closed.
#[derive(Default)]
pub struct Storage {
    pub state: Mutex<State>,
    random: AtomicU64,
    /// How often a request lets others go first, at most.
    dawdle: AtomicU64,
    /// Polls that a flush takes.
    slow_flush: AtomicU64,
    trap: Mutex<Trap>,
    /// A log that several storages keep together, and which of them this one is.
    joint: Mutex<Option<(usize, JointLog)>>,
    parking: Mutex<Parking>,
    reading: Mutex<Parking>,
    asking: Mutex<Parking>,
    /// It says which ranges are nothing but zeroes.
    tells_holes: AtomicBool,
}

/// A place of the storage whose requests are held back.
#[derive(Default)]
struct Parking {
    held: Option<std::ops::Range<u64>>,
    parked: usize,
    wakers: Vec<std::task::Waker>,
}

/// What reached several storages, in order.
pub type JointLog = Arc<Mutex<Vec<(usize, Event)>>>;

/// A flush that fails once, when there was a write at a certain place before it.
#[derive(Default)]
enum Trap {
    #[default]
    None,
    Set(u64),
    Sprung,
}

impl Storage {
    pub fn new(data: Vec<u8>) -> Arc<Self> {
        let storage = Self::default();
        storage.state.lock().data = data;
        Arc::new(storage)
    }

    /// From now on what reaches it is logged there, as the events of storage `which`.
    pub fn log_to(&self, which: usize, log: &JointLog) {
        *self.joint.lock() = Some((which, log.clone()));
    }

    pub fn set_dawdle(&self, most: u64) {
        self.dawdle.store(most, Ordering::Relaxed);
    }

    pub fn set_fault(&self, fault: Fault) {
        self.state.lock().fault = fault;
    }

    pub fn set_slow_flush(&self, polls: u64) {
        self.slow_flush.store(polls, Ordering::Relaxed);
    }

    /// After the next write at `offset` a flush fails, once.
    pub fn fail_flush_after_write_at(&self, offset: u64) {
        *self.trap.lock() = Trap::Set(offset);
    }

    /// Holds back writes that begin within a range, until [`Self::release`].
    pub fn hold(&self, range: std::ops::Range<u64>) {
        self.parking.lock().held = Some(range);
    }

    /// The same for reads.
    pub fn hold_reads(&self, range: std::ops::Range<u64>) {
        self.reading.lock().held = Some(range);
    }

    /// The same for block status; from now on the storage tells of holes.
    pub fn hold_status(&self, range: std::ops::Range<u64>) {
        self.tells_holes.store(true, Ordering::Relaxed);
        self.asking.lock().held = Some(range);
    }

    /// Lets all of them go.
    pub fn release(&self) {
        for parking in [&self.parking, &self.reading, &self.asking] {
            let mut parking = parking.lock();
            parking.held = None;
            parking.wakers.drain(..).for_each(std::task::Waker::wake);
        }
    }

    /// Requests that are held back now.
    pub fn parked(&self) -> usize {
        let all = [&self.parking, &self.reading, &self.asking];
        all.iter().map(|parking| parking.lock().parked).sum()
    }

    async fn park(&self, parking: &Mutex<Parking>, offset: u64) {
        let mut counted = false;
        poll_fn(|context| {
            let mut parking = parking.lock();
            let held = parking.held.as_ref();
            if held.is_some_and(|range| range.contains(&offset)) {
                if !counted {
                    counted = true;
                    parking.parked += 1;
                }
                parking.wakers.push(context.waker().clone());
                return Poll::Pending;
            }
            if counted {
                parking.parked -= 1;
            }
            Poll::Ready(())
        })
        .await;
    }

    pub fn position(&self) -> usize {
        self.state.lock().log.len()
    }

    async fn pause(&self) {
        let most = self.dawdle.load(Ordering::Relaxed);
        if most == 0 {
            return;
        }
        let n = self
            .random
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let left = (n ^ (n >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
        yield_for(left % (most + 1)).await;
    }

    fn fail_at(&self, offset: u64) -> Result<()> {
        if self.state.lock().fault == Fault::At(offset) {
            return Err(Error::io("injected"));
        }
        Ok(())
    }

    fn event(&self, event: Event) -> Result<()> {
        let state = &mut *self.state.lock();
        match (state.fault, &event) {
            (Fault::Full(limit), Event::Write(at, bytes)) if at + bytes.len() as u64 > limit => {
                return Err(Error::from_kind(ErrorKind::NoSpace));
            }
            (Fault::Writes, Event::Write(..)) | (Fault::Flushes, Event::Flush) => {
                return Err(Error::io("injected"));
            }
            _ => {}
        }
        let trap = &mut *self.trap.lock();
        match (&*trap, &event) {
            (Trap::Set(offset), Event::Write(at, _)) if offset == at => *trap = Trap::Sprung,
            (Trap::Sprung, Event::Flush) => {
                *trap = Trap::None;
                return Err(Error::io("injected"));
            }
            _ => {}
        }
        event.apply(&mut state.data);
        if let Some((which, log)) = &*self.joint.lock() {
            log.lock().push((*which, event.clone()));
        }
        if state.keep_log {
            state.log.push(event);
        }
        Ok(())
    }
}

/// Lets others go first, that many times.
async fn yield_for(mut polls: u64) {
    poll_fn(|context| {
        if polls == 0 {
            return Poll::Ready(());
        }
        polls -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The node over a storage.
pub struct StorageDriver(pub Arc<Storage>);

#[async_trait]
impl BlockDriver for StorageDriver {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::TRUNCATE
            | Capabilities::GROW
    }
    fn length(&self, _: &Edges) -> u64 {
        self.0.state.lock().data.len() as u64
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, _: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        self.0.fail_at(offset)?;
        self.0.pause().await;
        self.0.park(&self.0.reading, offset).await;
        {
            let mut state = self.0.state.lock();
            if let Fault::NthRead(left) = state.fault {
                let Some(left) = left.checked_sub(1) else {
                    state.fault = Fault::None;
                    return Err(Error::io("injected"));
                };
                state.fault = Fault::NthRead(left);
            }
            if state.fault == Fault::Reads {
                return Err(Error::io("injected"));
            }
            let end = offset as usize + buf.len();
            buf.copy_from_slice(0, &state.data[offset as usize..end]);
        }
        self.0.pause().await;
        Ok(())
    }
    async fn write(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        buf: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        self.0.fail_at(offset)?;
        self.0.pause().await;
        self.0.park(&self.0.parking, offset).await;
        self.0.event(Event::Write(offset, buf.to_vec()))?;
        self.0.pause().await;
        Ok(())
    }
    async fn write_zeroes(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
        _: RequestFlags,
    ) -> Result<()> {
        self.0.pause().await;
        self.0.event(Event::Write(offset, vec![0; len as usize]))
    }
    async fn discard(self: Arc<Self>, _: Request, offset: u64, len: u64) -> Result<()> {
        self.0.pause().await;
        self.0.event(Event::Zero(offset, len))
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        yield_for(self.0.slow_flush.load(Ordering::Relaxed)).await;
        self.0.event(Event::Flush)
    }
    async fn truncate(self: Arc<Self>, _: Request, length: u64, _: Truncate) -> Result<()> {
        self.0.event(Event::Length(length))
    }
    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        self.0.park(&self.0.asking, offset).await;
        let state = self.0.state.lock();
        let here = state.data.iter().skip(offset as usize).take(len as usize);
        let hole =
            self.0.tells_holes.load(Ordering::Relaxed) && here.copied().all(|byte| byte == 0);
        Ok(if hole {
            DriverStatus::zero(len)
        } else {
            DriverStatus::data_at(len, offset)
        })
    }
    /// Nothing is remembered of a flush that failed, so there is nothing to forget.
    async fn reopen(self: Arc<Self>, _: Request, _: Reopen) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Opens storages by name: `{"driver": "memory", "name": "a"}`.
#[derive(Default, Clone)]
pub struct StorageFactory(pub Arc<Mutex<HashMap<String, Arc<Storage>>>>);

impl StorageFactory {
    pub fn add(&self, name: &str, storage: &Arc<Storage>) {
        self.0.lock().insert(name.to_owned(), storage.clone());
    }
}

#[async_trait]
impl DriverFactory for StorageFactory {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    async fn open(&self, _: OpenContext, mut options: Options) -> Result<Opened> {
        let name = options.take_str("name")?.unwrap_or_default();
        let storage = self.0.lock().get(&name).cloned();
        let storage = storage.ok_or_else(|| Error::new(ErrorKind::NotFound, name))?;
        Ok(Opened {
            driver: Arc::new(StorageDriver(storage)),
            edges: Vec::new(),
        })
    }
}
