//! Moves the bytes: several workers read side by side; what they have read is written in order, so that the target
//! grows from front to back.
//!
//! There is one writer at a time: the worker that brings the piece whose turn it is goes on writing as long as the next
//! pieces are there, while the others read. Nobody waits for a turn, and no thread is woken for one.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use block_core::{
    BlockHandle, Buffer, Environment, Error, ErrorKind, IoBuf, RequestFlags, copy_range,
};
use futures::{
    FutureExt, StreamExt,
    channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded},
    future,
    lock::Mutex,
    stream::FuturesUnordered,
};
use parking_lot::Mutex as SyncMutex;

use super::{
    pace::Pace,
    plan::{CHUNK, Kind, Piece, Plan, Source, ZEROES},
    runs::{Run, runs},
    target::Target,
};
use crate::common::{failure::Failure, output::complain, progress::Meter, session::Session};

/// The least run of zeroes that becomes a hole, in bytes, unless `-S` says otherwise.
pub const SPARSE: u64 = 4096;
/// How many requests are in flight, unless `-m` says otherwise.
pub const WORKERS: usize = 8;

/// How to copy.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Whose warnings they are.
    pub program: &'static str,
    pub quiet: bool,
    pub compress: bool,
    pub copy_range: bool,
    pub any_order: bool,
    pub salvage: bool,
    /// Least run of zeroes that becomes a hole; `None`: zeroes are written as they are.
    pub sparse: Option<u64>,
    pub workers: usize,
    /// Bytes per second.
    pub rate: Option<u64>,
}

impl Settings {
    /// As `convert` copies when nothing else is asked for.
    pub fn plain(session: &Session) -> Self {
        Self {
            program: session.program.name(),
            quiet: false,
            compress: false,
            copy_range: false,
            any_order: false,
            salvage: false,
            sparse: Some(SPARSE),
            workers: WORKERS,
            rate: None,
        }
    }
}

/// A piece whose turn to be written will come.
struct Job {
    piece: Piece,
    buffer: Buffer,
    /// The storage is to copy it; `buffer` doesn't hold it.
    offload: bool,
}

/// The jobs that wait for their turn.
#[derive(Default)]
struct Queue {
    ready: BTreeMap<u64, Job>,
    next: u64,
    /// Somebody is writing.
    active: bool,
}

/// What all workers share.
pub struct Engine {
    plan: Mutex<Plan>,
    sources: Arc<Vec<Source>>,
    target: Arc<Target>,
    settings: Settings,
    meter: Meter,
    queue: SyncMutex<Queue>,
    /// Buffers that nobody uses. The last one back is the first one out: it is the one in the CPU's caches.
    spare: SyncMutex<Vec<Buffer>>,
    /// One message for each of them.
    spares: (UnboundedSender<()>, Mutex<UnboundedReceiver<()>>),
    pace: Option<Mutex<Pace>>,
    copy_range: AtomicBool,
    stop: AtomicBool,
    /// The first that happened.
    failure: SyncMutex<Option<Failure>>,
    /// The longest piece of data, in bytes.
    chunk: u64,
}

impl Engine {
    pub fn new(plan: Plan, target: Arc<Target>, settings: Settings, meter: Meter) -> Self {
        let (spare, taken) = unbounded();
        Self {
            sources: plan.sources(),
            chunk: plan.chunk(),
            plan: Mutex::new(plan),
            target,
            meter,
            queue: SyncMutex::default(),
            spare: SyncMutex::default(),
            spares: (spare, Mutex::new(taken)),
            pace: settings.rate.map(|rate| Mutex::new(Pace::new(rate))),
            copy_range: AtomicBool::new(settings.copy_range),
            stop: AtomicBool::new(false),
            failure: SyncMutex::new(None),
            settings,
        }
    }

    /// Copies all there is.
    ///
    /// Cancellation: the workers end after the piece that they are at; the session waits for them.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        for _ in 0..=self.settings.workers {
            self.give_back(Buffer::try_new(self.chunk as usize)?);
        }
        let engine = Arc::new(self);
        let guard = StopOnDrop(engine.clone());
        let env: Arc<dyn Environment> = session.env.clone();
        let workers: Vec<_> = (0..engine.settings.workers)
            .map(|_| {
                let (engine, env) = (engine.clone(), env.clone());
                session.spawn(async move {
                    if let Err(failure) = engine.work(&env).await {
                        // Those that follow are mostly its consequences.
                        engine.failure.lock().get_or_insert(failure);
                        engine.halt();
                    }
                })
            })
            .collect();
        let gone = future::join_all(workers).await.iter().any(Result::is_err);
        drop(guard);
        match engine.failure.lock().take() {
            Some(failure) => Err(failure),
            None if gone => Err(Failure::new("a worker is gone")),
            None => Ok(()),
        }
    }

    /// Ends all workers, also those that wait for a buffer.
    fn halt(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for _ in 0..self.settings.workers {
            let _ = self.spares.0.unbounded_send(());
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn give_back(&self, buffer: Buffer) {
        self.spare.lock().push(buffer);
        let _ = self.spares.0.unbounded_send(());
    }

    async fn work(&self, env: &Arc<dyn Environment>) -> Result<(), Failure> {
        loop {
            // First the buffer, then the piece: the piece whose turn it is always has one.
            self.spares.1.lock().await.next().await;
            let buffer = self.spare.lock().pop();
            let (false, Some(buffer)) = (self.is_stopped(), buffer) else {
                return Ok(());
            };
            let Some(piece) = self.plan.lock().await.next().await? else {
                self.give_back(buffer);
                return Ok(());
            };
            if let Some(pace) = &self.pace
                && piece.kind == Kind::Data
            {
                pace.lock().await.wait(env, piece.len).await;
            }
            let job = self.prepare(piece, buffer).await?;
            if self.settings.any_order {
                self.write(job).await?;
            } else {
                self.write_in_order(job).await?;
            }
        }
    }

    /// Reads what has to be read.
    async fn prepare(&self, piece: Piece, buffer: Buffer) -> Result<Job, Failure> {
        if piece.kind != Kind::Data {
            return Ok(Job {
                piece,
                buffer,
                offload: false,
            });
        }
        if self.copy_range.load(Ordering::Relaxed) {
            return Ok(Job {
                piece,
                buffer,
                offload: true,
            });
        }
        let buffer = self.read(piece, buffer).await?;
        Ok(Job {
            piece,
            buffer,
            offload: false,
        })
    }

    /// Leaves a job to whoever writes, or becomes that. Writes begin in order; they end when they end.
    async fn write_in_order(&self, job: Job) -> Result<(), Failure> {
        {
            let mut queue = self.queue.lock();
            queue.ready.insert(job.piece.index, job);
            if queue.active {
                return Ok(());
            }
            queue.active = true;
        }
        let mut begun = FuturesUnordered::new();
        while !self.is_stopped() {
            let job = {
                let mut queue = self.queue.lock();
                let next = queue.next;
                match queue.ready.remove(&next) {
                    Some(job) => {
                        queue.next += 1;
                        job
                    }
                    None => {
                        queue.active = false;
                        break;
                    }
                }
            };
            // Once polled it has claimed its place in the target.
            let mut write = Box::pin(self.write(job));
            match write.as_mut().now_or_never() {
                Some(done) => done?,
                None => begun.push(write),
            }
            while let Some(Some(done)) = begun.next().now_or_never() {
                done?;
            }
        }
        while let Some(done) = begun.next().await {
            done?;
        }
        Ok(())
    }

    async fn write(&self, job: Job) -> Result<(), Failure> {
        let Job {
            piece,
            buffer,
            offload,
        } = job;
        let buffer = match piece.kind {
            Kind::Below => buffer,
            Kind::Zero => {
                self.write_zeroes(piece)
                    .await
                    .map_err(|error| writing(piece.offset, &error))?;
                buffer
            }
            Kind::Data if offload => {
                if self.offload(piece).await? {
                    buffer
                } else {
                    let buffer = self.read(piece, buffer).await?;
                    self.write_data(piece, buffer).await?
                }
            }
            Kind::Data => self.write_data(piece, buffer).await?,
        };
        self.give_back(buffer);
        self.meter.advance(piece.len);
        Ok(())
    }

    /// Lets the storage copy. Not when it can't, which is asked once.
    async fn offload(&self, piece: Piece) -> Result<bool, Failure> {
        if !self.copy_range.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let source = &self.sources[piece.source].handle;
        let target = &self.target.handle;
        let flags = RequestFlags::NO_FALLBACK;
        let copy = copy_range(
            source,
            piece.source_offset,
            target,
            piece.offset,
            piece.len,
            flags,
        )
        .await;
        match copy {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                self.copy_range.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(writing(piece.offset, &error)),
        }
    }

    async fn read(&self, piece: Piece, mut buffer: Buffer) -> Result<Buffer, Failure> {
        let source = &self.sources[piece.source].handle;
        buffer.resize(piece.len as usize);
        match source.read_into(piece.source_offset, buffer).await {
            Ok(buffer) => Ok(buffer),
            Err(error) if !self.settings.salvage => Err(Failure::io(
                format_args!("error while reading at byte {}", piece.source_offset),
                &error,
            )),
            Err(_) => self.salvage(source, piece).await,
        }
    }

    /// Reads sector by sector, with zeroes for those that can't be read.
    async fn salvage(&self, source: &BlockHandle, piece: Piece) -> Result<Buffer, Failure> {
        const SECTOR: usize = 512;
        let mut whole = Buffer::try_new(self.chunk as usize)?;
        whole.resize(piece.len as usize);
        for (index, sector) in whole.chunks_mut(SECTOR).enumerate() {
            let offset = piece.source_offset + (index * SECTOR) as u64;
            match source.read(offset, sector.len()).await {
                Ok(data) => sector.copy_from_slice(&data),
                Err(error) => {
                    if !self.settings.quiet {
                        complain!(
                            "{}: warning: error while reading offset {offset}: {}",
                            self.settings.program,
                            error.reason()
                        );
                    }
                    sector.fill(0);
                }
            }
        }
        Ok(whole)
    }

    /// Writes what isn't zero, and zeroes where the target wouldn't have them by itself.
    async fn write_data(&self, piece: Piece, buffer: Buffer) -> Result<Buffer, Failure> {
        let target = &self.target.handle;
        let runs = self.runs(piece, &buffer);
        let data = IoBuf::from(buffer);
        let write = |run: Run| {
            let data = &data;
            async move {
                let at = piece.offset + run.start as u64;
                let len = (run.end - run.start) as u64;
                let written = if !run.zero {
                    let flags = if self.settings.compress && self.is_whole(at, len) {
                        RequestFlags::WRITE_COMPRESSED
                    } else {
                        RequestFlags::empty()
                    };
                    target
                        .write(at, data.slice(run.start..run.end), flags)
                        .await
                } else if self.target.is_zero {
                    Ok(())
                } else {
                    target.write_zeroes(at, len, ZEROES).await
                };
                written.map_err(|error| writing(at, &error))
            }
        };
        if self.settings.compress {
            // All of them begin before the next chunk's do: compressed data are packed in the order of the file.
            let written = future::join_all(runs.into_iter().map(write)).await;
            written.into_iter().collect::<Result<(), Failure>>()?;
        } else {
            for run in runs {
                write(run).await?;
            }
        }
        match data.try_into_buffer() {
            Ok(buffer) => Ok(buffer),
            // A driver still holds a part: it keeps all of it.
            Err(_) => Ok(Buffer::try_new(self.chunk as usize)?),
        }
    }

    /// Whether a range is made of whole clusters; the last may be cut by the end of the disk.
    fn is_whole(&self, offset: u64, len: u64) -> bool {
        let cluster = self.target.cluster;
        let ends = offset + len == self.target.handle.length();
        offset % cluster == 0 && (len % cluster == 0 || ends)
    }

    /// Cuts a chunk into runs of zeroes and of data.
    fn runs(&self, piece: Piece, bytes: &[u8]) -> Vec<Run> {
        let end = bytes.len();
        if self.settings.compress {
            return runs(bytes, piece.offset, self.target.cluster, 1);
        }
        match self.settings.sparse {
            None => vec![Run {
                start: 0,
                end,
                zero: false,
            }],
            Some(least) => {
                // Parts of pages cost more than they save, unless they were asked for.
                let unit = self.target.zero_unit.max(least.min(4096));
                runs(bytes, piece.offset, unit, least)
            }
        }
    }

    /// Has a range read as zeroes: as data if the target is to be allocated in full.
    async fn write_zeroes(&self, piece: Piece) -> block_core::Result<()> {
        let target = &self.target.handle;
        if self.settings.sparse.is_some() {
            if self.target.is_zero {
                return Ok(());
            }
            return target.write_zeroes(piece.offset, piece.len, ZEROES).await;
        }
        let zeroes = IoBuf::zeroes(CHUNK.min(piece.len) as usize);
        let mut done = 0;
        while done < piece.len && !self.is_stopped() {
            let step = (piece.len - done).min(CHUNK);
            let data = zeroes.slice(..step as usize);
            target
                .write(piece.offset + done, data, RequestFlags::empty())
                .await?;
            done += step;
        }
        Ok(())
    }
}

fn writing(offset: u64, error: &Error) -> Failure {
    Failure::io(format_args!("error while writing at byte {offset}"), error)
}

struct StopOnDrop(Arc<Engine>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.halt();
    }
}
