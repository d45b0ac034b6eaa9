//! The copy engine that all jobs share: a window of chunks in flight, the speed limit, pause points, what errors do.
//!
//! The engine keeps polling what it began while it awaits anything else, never drops a chunk that is in flight, and
//! never changes the graph. Which chunks there are, and how one is copied, is said by a [`Plan`].

use std::{collections::VecDeque, sync::Arc, task::Poll, time::Duration};

use block_core::{
    error::{Error, Result},
    mutant,
};
use futures::{
    future::BoxFuture,
    stream::{FuturesUnordered, StreamExt},
};

use crate::{
    counters::Copied,
    error_policy::{ErrorAction, OnError},
    event::IoSide,
    job::{Job, cancelled},
    rate::{RateLimit, SLICE},
};

/// The most chunks in flight.
pub(crate) const MAX_IN_FLIGHT: usize = 16;
/// The most bytes in flight, unless a job says otherwise.
pub(crate) const BUFFER_SIZE: u64 = 16 << 20;
/// The smallest chunk that a cursor makes.
pub(crate) const MIN_CHUNK: u64 = 64 << 10;
/// The largest.
pub(crate) const MAX_CHUNK: u64 = 1 << 20;

/// A range that is copied in one go, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub offset: u64,
    pub len: u64,
}

impl Chunk {
    pub(crate) const fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// A chunk that couldn't be copied.
#[derive(Debug)]
pub(crate) struct CopyError {
    pub side: IoSide,
    pub error: Error,
}

impl CopyError {
    pub(crate) fn read(error: Error) -> Self {
        Self {
            side: IoSide::Read,
            error,
        }
    }

    pub(crate) fn write(error: Error) -> Self {
        Self {
            side: IoSide::Write,
            error,
        }
    }
}

pub(crate) type CopyResult = std::result::Result<Copied, CopyError>;

/// What is to be copied, and how.
pub(crate) trait Plan: Send {
    /// The next chunk of this pass. Chunks that are in flight together must not overlap.
    fn next(&mut self) -> Option<Chunk>;

    /// Copies a chunk.
    fn copy(&self, chunk: Chunk) -> BoxFuture<'static, CopyResult>;

    /// A chunk was copied.
    fn copied(&mut self, job: &Job, chunk: Chunk, copied: &Copied) {
        let _ = copied;
        job.advance(chunk.len);
    }

    /// A chunk failed and is to be tried again. True: the plan takes care of that; false: the engine does.
    fn take_back(&mut self, chunk: Chunk) -> bool {
        let _ = chunk;
        false
    }

    /// What an ignored error means: try the chunk again (false), or go on without it (true).
    fn skips_ignored(&self) -> bool {
        false
    }

    /// Whether it makes sense to go on: an error here ends the job whatever the policies say.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// An error that was met elsewhere on behalf of this job (in a filter).
    fn other_error(&mut self) -> Option<CopyError> {
        None
    }
}

/// What to do about errors on either side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policies {
    pub read: OnError,
    pub write: OnError,
}

impl Policies {
    const fn of(self, side: IoSide) -> OnError {
        match side {
            IoSide::Read => self.read,
            IoSide::Write => self.write,
        }
    }
}

/// The engine of one job.
pub(crate) struct Engine {
    job: Arc<Job>,
    policies: Policies,
    buffer_size: u64,
    rate: RateLimit,
    /// The speed that `rate` was used with last.
    speed: u64,
    in_flight: FuturesUnordered<BoxFuture<'static, (Chunk, CopyResult)>>,
    bytes_in_flight: u64,
    again: VecDeque<Chunk>,
    /// No chunk is begun before this time: an error was ignored a moment ago.
    not_before: Duration,
    failures: u64,
    /// The first error that was skipped.
    pub skipped: Option<Error>,
}

enum Woken {
    Ended(Chunk, CopyResult),
    Other,
}

impl Engine {
    pub(crate) fn new(job: &Arc<Job>, policies: Policies, buffer_size: u64) -> Self {
        Self {
            job: job.clone(),
            policies,
            buffer_size: buffer_size.max(MAX_CHUNK),
            rate: RateLimit::default(),
            speed: 0,
            in_flight: FuturesUnordered::new(),
            bytes_in_flight: 0,
            again: VecDeque::new(),
            not_before: Duration::ZERO,
            failures: 0,
            skipped: None,
        }
    }

    /// How many errors were met so far.
    pub(crate) fn failures(&self) -> u64 {
        self.failures
    }

    /// Copies until the plan has no more chunks; then nothing is in flight.
    ///
    /// # Errors
    /// The first error that is to be reported, or ECANCELED; with nothing in flight as well.
    pub(crate) async fn pass(&mut self, plan: &mut dyn Plan) -> Result<()> {
        let result = self.pass_inner(plan, true).await;
        if result.is_err() {
            self.finish(plan).await;
            self.again.clear();
        }
        result
    }

    /// A pass that doesn't stop for pauses, has no speed limit and reports every error: near or inside a drained section,
    /// where guests wait for it.
    pub(crate) async fn rush(&mut self, plan: &mut dyn Plan) -> Result<()> {
        self.policies = Policies {
            read: OnError::Report,
            write: OnError::Report,
        };
        let result = self.pass_inner(plan, false).await;
        if result.is_err() {
            self.finish(plan).await;
            self.again.clear();
        }
        result
    }

    /// Waits until nothing is in flight; what fails on the way is lost to the job, which is ending.
    async fn finish(&mut self, plan: &mut dyn Plan) {
        while let Some((chunk, result)) = self.in_flight.next().await {
            match result {
                Ok(copied) => {
                    self.job.counters_live().chunk(&copied);
                    plan.copied(&self.job, chunk, &copied);
                }
                Err(_) => {
                    plan.take_back(chunk);
                }
            }
        }
        self.bytes_in_flight = 0;
    }

    async fn pass_inner(&mut self, plan: &mut dyn Plan, gentle: bool) -> Result<()> {
        let mut no_more = false;
        loop {
            let seen = self.job.epoch();
            plan.check()?;
            if let Some(error) = plan.other_error() {
                self.failed(error)?;
                continue;
            }
            let stopping = self.job.is_cancelled() || (gentle && self.job.wants_pause());
            if stopping && self.in_flight.is_empty() {
                self.job.pause_point().await?;
                if self.job.is_cancelled() {
                    return Err(cancelled());
                }
                continue;
            }
            let wait = if gentle { self.delay() } else { None };
            if !stopping && wait.is_none() {
                if self.begin_one(plan, &mut no_more) {
                    continue;
                }
                if self.in_flight.is_empty() && self.again.is_empty() && no_more {
                    return Ok(());
                }
            }
            match self.wait(seen, wait).await {
                Woken::Ended(chunk, result) => self.ended(plan, chunk, result)?,
                Woken::Other => {}
            }
        }
    }

    /// How long no chunk may be begun.
    fn delay(&mut self) -> Option<Duration> {
        let now = self.job.env().now();
        let speed = self.job.speed();
        if speed != self.speed {
            self.rate.reset(now);
            self.speed = speed;
        }
        if self.not_before > now {
            return Some(self.not_before.saturating_sub(now));
        }
        self.rate.delay(now, speed)
    }

    /// Begins a chunk if there is one and room for it.
    fn begin_one(&mut self, plan: &mut dyn Plan, no_more: &mut bool) -> bool {
        if self.in_flight.len() >= MAX_IN_FLIGHT || self.bytes_in_flight >= self.buffer_size {
            return false;
        }
        let chunk = match self.again.pop_front() {
            Some(chunk) => chunk,
            None => match plan.next() {
                Some(chunk) => chunk,
                None => {
                    *no_more = true;
                    return false;
                }
            },
        };
        self.rate
            .account(self.job.env().now(), self.speed, chunk.len);
        let copy = plan.copy(chunk);
        self.bytes_in_flight += chunk.len;
        self.in_flight
            .push(Box::pin(async move { (chunk, copy.await) }));
        true
    }

    /// Waits for a chunk to end, for the job's state to change, or for `at_most`.
    async fn wait(&mut self, seen: u64, at_most: Option<Duration>) -> Woken {
        let mut timer = at_most.map(|time| self.job.env().sleep(time));
        let (job, in_flight) = (&self.job, &mut self.in_flight);
        futures::future::poll_fn(|cx| {
            if let Poll::Ready(Some((chunk, result))) = in_flight.poll_next_unpin(cx) {
                return Poll::Ready(Woken::Ended(chunk, result));
            }
            let timed_out = timer
                .as_mut()
                .is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
            if timed_out || job.poll_changed(seen, cx).is_ready() {
                return Poll::Ready(Woken::Other);
            }
            Poll::Pending
        })
        .await
    }

    fn ended(&mut self, plan: &mut dyn Plan, chunk: Chunk, result: CopyResult) -> Result<()> {
        self.bytes_in_flight = self.bytes_in_flight.saturating_sub(chunk.len);
        match result {
            Ok(copied) => {
                self.job.counters_live().chunk(&copied);
                self.rate
                    .give_back(self.speed, chunk.len.saturating_sub(copied.moved()));
                plan.copied(&self.job, chunk, &copied);
                Ok(())
            }
            Err(error) => {
                let action = self.action(&error);
                if action == ErrorAction::Ignore && plan.skips_ignored() {
                    self.skipped.get_or_insert(error.error);
                    plan.copied(&self.job, chunk, &Copied::default());
                    return Ok(());
                }
                if !plan.take_back(chunk)
                    && action != ErrorAction::Report
                    && !mutant::is_active("job-failed-chunk-not-retried")
                {
                    self.again.push_back(chunk);
                }
                if action == ErrorAction::Report {
                    return Err(error.error);
                }
                self.job.counters_live().retry();
                self.not_before = self.job.env().now() + SLICE;
                Ok(())
            }
        }
    }

    fn action(&mut self, error: &CopyError) -> ErrorAction {
        self.failures += 1;
        self.job
            .io_error(error.side, &error.error, self.policies.of(error.side))
    }

    /// What to do about an error that isn't a chunk's.
    fn failed(&mut self, error: CopyError) -> Result<()> {
        match self.action(&error) {
            ErrorAction::Report => Err(error.error),
            ErrorAction::Ignore | ErrorAction::Stop => {
                self.not_before = self.job.env().now() + SLICE;
                Ok(())
            }
        }
    }
}

/// Walks once over `[0, len)` in chunks of `step` bytes that start at multiples of it.
#[derive(Debug)]
pub(crate) struct Cursor {
    at: u64,
    len: u64,
    step: u64,
}

impl Cursor {
    pub(crate) fn new(len: u64, step: u64) -> Self {
        Self { at: 0, len, step }
    }

    pub(crate) fn next(&mut self) -> Option<Chunk> {
        if self.at >= self.len {
            return None;
        }
        let chunk = Chunk {
            offset: self.at,
            len: self.step.min(self.len - self.at),
        };
        self.at = chunk.end();
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_covers_everything_once_and_ends_short() {
        let mut cursor = Cursor::new(1000, 300);
        let chunks: Vec<Chunk> = std::iter::from_fn(|| cursor.next()).collect();
        assert_eq!(chunks.len(), 4);
        assert_eq!(
            chunks[0],
            Chunk {
                offset: 0,
                len: 300
            }
        );
        assert_eq!(
            chunks[3],
            Chunk {
                offset: 900,
                len: 100
            }
        );
        assert!(Cursor::new(0, 300).next().is_none());
    }
}
