//! How I/O gets done: through io_uring where the kernel lets us, through a bounded pool of threads where it doesn't.
//! [`Engines`] is what a program has one of; each open file has an `Engine`, its lanes in the shared queues.

mod fair;
mod threads;
mod uring;

#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    os::fd::BorrowedFd,
    sync::{Arc, OnceLock},
};

use block_core::{
    buffer::{IoBuf, IoBufMut},
    producer::ProducerId,
};
use futures::channel::oneshot;

pub use self::uring::Reactor;
use self::{
    threads::{Task, ThreadPool},
    uring::RingEngine,
};
use crate::{
    open_file::OpenFile,
    transfer::{Kind, Transfer},
};

/// How the shared engines are set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// The most threads in the pool.
    pub max_threads: usize,
    /// The most transfers in the ring at once, rounded up to a power of two by the kernel.
    pub ring_entries: u32,
    /// Who collects the ring's completions.
    pub reactor: Reactor,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_threads: 64,
            ring_entries: 256,
            reactor: Reactor::Thread,
        }
    }
}

/// The engines that all files of a program share. Cheap to clone; nothing is started before it is needed.
#[derive(Clone)]
pub struct Engines(Arc<Shared>);

struct Shared {
    config: EngineConfig,
    pool: ThreadPool,
    ring: OnceLock<Result<Arc<RingEngine>, i32>>,
}

impl Engines {
    /// Engines that are set up as `config` says.
    pub fn new(config: EngineConfig) -> Self {
        let pool = ThreadPool::new(config.max_threads);
        Self(Arc::new(Shared {
            config,
            pool,
            ring: OnceLock::new(),
        }))
    }

    fn ring(&self) -> io::Result<&Arc<RingEngine>> {
        self.0
            .ring
            .get_or_init(|| {
                RingEngine::start(self.0.config.ring_entries, self.0.config.reactor)
                    .map_err(|error| error.raw_os_error().unwrap_or(libc::ENOSYS))
            })
            .as_ref()
            .map_err(|errno| io::Error::from_raw_os_error(*errno))
    }

    /// The ring, for an executor that turns it itself.
    ///
    /// # Errors
    /// What the kernel says where it has no io_uring or forbids it.
    pub fn ring_handle(&self) -> io::Result<RingHandle> {
        self.ring().map(|ring| RingHandle {
            ring: ring.clone(),
            _engines: self.clone(),
        })
    }

    /// Threads of the pool that exist now.
    pub fn threads(&self) -> usize {
        self.0.pool.threads()
    }

    /// An engine for one file.
    pub(crate) fn engine(&self, use_ring: bool) -> io::Result<Engine> {
        let ring = if use_ring {
            let ring = self.ring()?.clone();
            let lane = ring.open_lane();
            Some((ring, lane))
        } else {
            None
        };
        let lane = self.0.pool.open_lane();
        Ok(Engine {
            shared: self.0.clone(),
            lane,
            ring,
        })
    }
}

impl Default for Engines {
    fn default() -> Self {
        Self::new(EngineConfig::default())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(Ok(ring)) = self.ring.get() {
            ring.stop();
        }
    }
}

impl fmt::Debug for Engines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engines")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

/// The shared ring in the hands of an executor ([`Reactor::External`]): its own loop watches [`Self::fd`] and calls
/// [`Self::turn`] when that is readable. With [`Reactor::Thread`] this is allowed, too, but needless.
#[derive(Clone)]
pub struct RingHandle {
    ring: Arc<RingEngine>,
    _engines: Engines,
}

impl RingHandle {
    /// Readable (level-triggered) when completions wait.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    /// Completes what the kernel has done, waking the tasks concerned. Never waits. Returns how many steps were
    /// completed.
    pub fn turn(&self) -> usize {
        self.ring.turn()
    }
}

impl fmt::Debug for RingHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RingHandle")
    }
}

/// One file's way to the shared engines.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    lane: usize,
    ring: Option<(Arc<RingEngine>, usize)>,
}

/// The engine went away under a request, or its task panicked.
fn lost() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Engine {
    /// What `aio` stands at.
    pub(crate) fn name(&self) -> &'static str {
        if self.ring.is_some() {
            "io_uring"
        } else {
            "threads"
        }
    }

    async fn transfer(
        &self,
        producer: ProducerId,
        file: Arc<OpenFile>,
        kind: Kind,
        offset: u64,
    ) -> io::Result<()> {
        let asynchronous = match &kind {
            Kind::Read(_) => file.reads_are_asynchronous(),
            Kind::Write { .. } => file.writes_are_asynchronous(),
            // fdatasync never is: io_uring has a thread do it.
            Kind::Flush => false,
        };
        let ring = self.ring.as_ref().filter(|_| asynchronous);
        let end = if let Some((ring, lane)) = ring {
            let (transfer, end) = Transfer::new(file, kind, offset, *lane, producer);
            ring.submit(transfer);
            end
        } else {
            let (transfer, end) = Transfer::new(file, kind, offset, self.lane, producer);
            self.shared
                .pool
                .submit(self.lane, producer, Task::Transfer(transfer))?;
            end
        };
        end.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Fills `buf` from `offset`.
    ///
    /// Cancellation: the transfer runs to its end and keeps the buffer until then.
    pub(crate) async fn read(
        &self,
        producer: ProducerId,
        file: Arc<OpenFile>,
        offset: u64,
        buf: IoBufMut,
    ) -> io::Result<()> {
        self.transfer(producer, file, Kind::Read(buf), offset).await
    }

    /// Writes `buf` at `offset`.
    ///
    /// Cancellation: as with [`Self::read`].
    pub(crate) async fn write(
        &self,
        producer: ProducerId,
        file: Arc<OpenFile>,
        offset: u64,
        buf: IoBuf,
        dsync: bool,
    ) -> io::Result<()> {
        let kind = Kind::Write { buf, dsync };
        self.transfer(producer, file, kind, offset).await
    }

    /// `fdatasync`.
    pub(crate) async fn flush(&self, producer: ProducerId, file: Arc<OpenFile>) -> io::Result<()> {
        self.transfer(producer, file, Kind::Flush, 0).await
    }

    /// Runs a blocking call on a thread of the pool.
    ///
    /// Cancellation: the call runs to its end, its result is dropped.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        producer: ProducerId,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (reply, end) = oneshot::channel();
        let task = Task::Call(Box::new(move || {
            let _ = reply.send(call());
        }));
        self.shared.pool.submit(self.lane, producer, task)?;
        end.await.map_err(|_| lost())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.pool.close_lane(self.lane);
        if let Some((ring, lane)) = &self.ring {
            ring.close_lane(*lane);
        }
    }
}
