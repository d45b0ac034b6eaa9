//! Moves the bytes: several workers, each with a chunk of its own, that read side by side and begin their writes in
//! order, so that the target grows from front to back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use block_core::{
    BlockHandle, Buffer, Environment, Error, ErrorKind, IoBuf, RequestFlags, buffer::is_zero,
    copy_range,
};
use futures::{FutureExt, channel::oneshot, future, lock::Mutex};
use parking_lot::Mutex as SyncMutex;

use super::{
    plan::{CHUNK, Kind, Piece, Plan, Source, ZEROES},
    target::Target,
};
use crate::common::{failure::Failure, output::complain, progress::Meter, session::Session};

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

/// What all workers share.
pub struct Engine {
    plan: Mutex<Plan>,
    sources: Arc<Vec<Source>>,
    target: Arc<Target>,
    settings: Settings,
    meter: Meter,
    turns: Turns,
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
        Self {
            sources: plan.sources(),
            chunk: plan.chunk(),
            plan: Mutex::new(plan),
            target,
            meter,
            turns: Turns::default(),
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

    fn halt(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.turns.open();
    }

    async fn work(&self, env: &Arc<dyn Environment>) -> Result<(), Failure> {
        let mut buffer = Buffer::try_new(self.chunk as usize)?;
        while !self.stop.load(Ordering::SeqCst) {
            let piece = self.plan.lock().await.next().await?;
            let Some(piece) = piece else { break };
            if let Some(pace) = &self.pace
                && piece.kind == Kind::Data
            {
                pace.lock().await.wait(env, piece.len).await;
            }
            buffer = self.copy(piece, buffer).await?;
            self.turns.pass(piece.index);
            self.meter.advance(piece.len);
        }
        Ok(())
    }

    async fn copy(&self, piece: Piece, mut buffer: Buffer) -> Result<Buffer, Failure> {
        let source = &self.sources[piece.source].handle;
        match piece.kind {
            Kind::Below => {}
            Kind::Zero => {
                if self.settings.sparse.is_none() {
                    return self.write_plain_zeroes(piece, buffer).await;
                }
                if !self.target.is_zero {
                    let write = self
                        .target
                        .handle
                        .write_zeroes(piece.offset, piece.len, ZEROES);
                    self.in_turn(piece, write).await?;
                }
            }
            Kind::Data => {
                if self.copy_range.load(Ordering::Relaxed) && self.offload(piece).await? {
                    return Ok(buffer);
                }
                buffer.resize(piece.len as usize);
                buffer = self.read(source, piece, buffer).await?;
                return self.write(piece, buffer).await;
            }
        }
        Ok(buffer)
    }

    /// Lets the storage copy. Not when it can't, which is asked once.
    async fn offload(&self, piece: Piece) -> Result<bool, Failure> {
        let source = &self.sources[piece.source].handle;
        let target = &self.target.handle;
        let copy = copy_range(
            source,
            piece.source_offset,
            target,
            piece.offset,
            piece.len,
            RequestFlags::NO_FALLBACK,
        );
        match self.turns_then(piece, copy).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                self.copy_range.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(writing(piece.offset, &error)),
        }
    }

    async fn read(
        &self,
        source: &BlockHandle,
        piece: Piece,
        buffer: Buffer,
    ) -> Result<Buffer, Failure> {
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
    async fn write(&self, piece: Piece, buffer: Buffer) -> Result<Buffer, Failure> {
        let runs = self.runs(piece, &buffer);
        let data = IoBuf::from(buffer);
        let write = async {
            for run in &runs {
                let at = piece.offset + run.start as u64;
                let len = run.end - run.start;
                if run.zero {
                    if !self.target.is_zero {
                        self.target
                            .handle
                            .write_zeroes(at, len as u64, ZEROES)
                            .await
                            .map_err(|error| (at, error))?;
                    }
                    continue;
                }
                let flags = if self.settings.compress && self.is_whole(at, len as u64) {
                    RequestFlags::WRITE_COMPRESSED
                } else {
                    RequestFlags::empty()
                };
                self.target
                    .handle
                    .write(at, data.slice(run.start..run.end), flags)
                    .await
                    .map_err(|error| (at, error))?;
            }
            Ok::<(), (u64, Error)>(())
        };
        self.turns_then(piece, write)
            .await
            .map_err(|(at, error)| writing(at, &error))?;
        match data.try_into_buffer() {
            Ok(buffer) => Ok(buffer),
            // A driver still holds a part: it keeps all of it.
            Err(_) => Ok(Buffer::try_new(self.chunk as usize)?),
        }
    }

    /// Whether a range is a whole cluster, or all that there is of the last one.
    fn is_whole(&self, offset: u64, len: u64) -> bool {
        let cluster = self.target.cluster;
        offset % cluster == 0 && (len == cluster || offset + len == self.target.handle.length())
    }

    /// Cuts a chunk into runs of zeroes and of data.
    fn runs(&self, piece: Piece, bytes: &[u8]) -> Vec<Run> {
        let end = bytes.len();
        if self.settings.compress {
            return runs(bytes, piece.offset, self.target.cluster, 1, true);
        }
        match self.settings.sparse {
            None => vec![Run {
                start: 0,
                end,
                zero: false,
            }],
            Some(least) => runs(bytes, piece.offset, self.target.zero_unit, least, false),
        }
    }

    async fn write_plain_zeroes(&self, piece: Piece, buffer: Buffer) -> Result<Buffer, Failure> {
        let write = async {
            let zeroes = IoBuf::zeroes(CHUNK.min(piece.len) as usize);
            let mut done = 0;
            while done < piece.len && !self.stop.load(Ordering::SeqCst) {
                let step = (piece.len - done).min(CHUNK);
                let at = piece.offset + done;
                self.target
                    .handle
                    .write(at, zeroes.slice(..step as usize), RequestFlags::empty())
                    .await?;
                done += step;
            }
            Ok(())
        };
        self.in_turn(piece, write).await?;
        Ok(buffer)
    }

    async fn in_turn(
        &self,
        piece: Piece,
        write: impl Future<Output = block_core::Result<()>>,
    ) -> Result<(), Failure> {
        self.turns_then(piece, write)
            .await
            .map_err(|error| writing(piece.offset, &error))
    }

    /// Begins `write` when all pieces before have begun theirs.
    async fn turns_then<T>(&self, piece: Piece, write: impl Future<Output = T>) -> T {
        if self.settings.any_order || self.settings.workers == 1 {
            return write.await;
        }
        self.turns.wait(piece.index).await;
        let mut write = Box::pin(write);
        // Once polled it has claimed its place; the next may begin.
        let first = write.as_mut().now_or_never();
        self.turns.pass(piece.index);
        match first {
            Some(done) => done,
            None => write.await,
        }
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

/// A part of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: usize,
    end: usize,
    zero: bool,
}

/// Cuts `bytes`, which begin at `offset` of the target, into runs. Zeroes count in whole multiples of `unit` of the
/// target, and in runs of at least `least` bytes. With `each`, every unit of data is a run of its own.
fn runs(bytes: &[u8], offset: u64, unit: u64, least: u64, each: bool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let to_boundary = unit - (offset + start as u64) % unit;
        let end = bytes.len().min(start + to_boundary as usize);
        let zero = is_zero(&bytes[start..end]);
        match runs.last_mut() {
            Some(last) if last.zero == zero && (zero || !each) => last.end = end,
            _ => runs.push(Run { start, end, zero }),
        }
        start = end;
    }
    if runs
        .iter()
        .any(|run| run.zero && ((run.end - run.start) as u64) < least)
    {
        // Short holes aren't worth a request each.
        let mut merged: Vec<Run> = Vec::new();
        for mut run in runs {
            run.zero = run.zero && (run.end - run.start) as u64 >= least;
            match merged.last_mut() {
                Some(last) if last.zero == run.zero && (run.zero || !each) => last.end = run.end,
                _ => merged.push(run),
            }
        }
        return merged;
    }
    runs
}

/// Whose turn it is to begin writing.
#[derive(Default)]
struct Turns(SyncMutex<TurnState>);

#[derive(Default)]
struct TurnState {
    next: u64,
    /// Turns that were passed before they came.
    passed: Vec<u64>,
    waiting: Vec<(u64, oneshot::Sender<()>)>,
    open: bool,
}

impl Turns {
    /// Waits for the turn of `index`.
    async fn wait(&self, index: u64) {
        let rx = {
            let mut state = self.0.lock();
            if state.open || state.next >= index {
                return;
            }
            let (tx, rx) = oneshot::channel();
            state.waiting.push((index, tx));
            rx
        };
        let _ = rx.await;
    }

    /// `index` needs its turn no more.
    fn pass(&self, index: u64) {
        let mut state = self.0.lock();
        if index < state.next || state.passed.contains(&index) {
            return;
        }
        state.passed.push(index);
        while let Some(at) = state.passed.iter().position(|passed| *passed == state.next) {
            state.passed.swap_remove(at);
            state.next += 1;
        }
        let next = state.next;
        let mut at = 0;
        while at < state.waiting.len() {
            if state.waiting[at].0 <= next {
                let (_, tx) = state.waiting.swap_remove(at);
                let _ = tx.send(());
            } else {
                at += 1;
            }
        }
    }

    /// From here on nobody waits.
    fn open(&self) {
        let mut state = self.0.lock();
        state.open = true;
        state.waiting.clear();
    }
}

/// Keeps to so many bytes per second.
struct Pace {
    rate: u64,
    /// When the next byte may go.
    free_at: Option<Duration>,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self {
            rate,
            free_at: None,
        }
    }

    async fn wait(&mut self, env: &Arc<dyn Environment>, bytes: u64) {
        let now = env.now();
        let start = self.free_at.map_or(now, |at| at.max(now));
        self.free_at = Some(start + Duration::from_secs_f64(bytes as f64 / self.rate as f64));
        if start > now {
            env.sleep(start.saturating_sub(now)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: usize, end: usize, zero: bool) -> Run {
        Run { start, end, zero }
    }

    #[test]
    fn zeroes_count_in_whole_units_of_the_target() {
        let mut bytes = vec![0; 4096 * 4];
        bytes[4096] = 1;
        bytes[4096 * 2 - 1] = 1;
        assert_eq!(
            runs(&bytes, 0, 4096, 4096, false),
            [
                run(0, 4096, true),
                run(4096, 8192, false),
                run(8192, 16384, true)
            ]
        );
        // The chunk begins in the middle of a unit.
        assert_eq!(
            runs(&bytes, 2048, 4096, 4096, false),
            [run(0, 10240, false), run(10240, 16384, true)]
        );
    }

    #[test]
    fn short_runs_of_zeroes_are_data() {
        let mut bytes = vec![0; 512 * 8];
        bytes[0] = 1;
        bytes[1024] = 1;
        assert_eq!(
            runs(&bytes, 0, 512, 2048, false),
            [run(0, 1536, false), run(1536, 4096, true)]
        );
        assert_eq!(runs(&bytes, 0, 512, 4096, false), [run(0, 4096, false)]);
    }

    #[test]
    fn each_unit_of_data_can_be_a_run_of_its_own() {
        let mut bytes = vec![1; 1024 * 3];
        bytes[1024..2048].fill(0);
        assert_eq!(
            runs(&bytes, 0, 512, 1, true),
            [
                run(0, 512, false),
                run(512, 1024, false),
                run(1024, 2048, true),
                run(2048, 2560, false),
                run(2560, 3072, false)
            ]
        );
    }

    #[test]
    fn turns_come_in_order_however_they_are_passed() {
        let turns = Turns::default();
        let mut second = Box::pin(turns.wait(2));
        assert!(second.as_mut().now_or_never().is_none());
        turns.pass(1);
        let mut second = Box::pin(turns.wait(2));
        assert!(second.as_mut().now_or_never().is_none());
        turns.pass(0);
        assert!(turns.wait(2).now_or_never().is_some());
        assert!(turns.wait(3).now_or_never().is_none());
        turns.open();
        assert!(turns.wait(9).now_or_never().is_some());
    }
}
