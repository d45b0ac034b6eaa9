//! The guest of `blk live`: several queues of reads, writes, discards, zero writes and flushes on one disk, checked
//! against the oracle as they go. It can be paused (to take a point-in-time copy of the oracle) and slowed down (so that
//! a mirror can catch up).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use block_core::{BlockHandle, Buffer, Environment, IoBuf, RequestFlags};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::oracle::{Claim, Content, Oracle, SECTOR, describe, fill};

/// What the guest has done so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// Reads, each checked against the oracle.
    pub reads: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
    /// Zero writes.
    pub zeroes: AtomicU64,
    /// Discards.
    pub discards: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Bytes read and written.
    pub bytes: AtomicU64,
}

/// How a guest behaves.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Queues; each goes its own way through the disk.
    pub queues: usize,
    /// Requests that each queue keeps in flight.
    pub depth: usize,
    /// The seed of all its choices.
    pub seed: u64,
    /// Cluster size in bytes: discards are aligned to it.
    pub cluster: u64,
}

/// A guest at work.
pub struct Guest {
    shared: Arc<Shared>,
    env: Arc<dyn Environment>,
    workers: usize,
}

struct Shared {
    handle: Arc<BlockHandle>,
    base: Arc<BlockHandle>,
    oracle: Arc<Oracle>,
    load: Load,
    counts: Counts,
    stop: AtomicBool,
    paused: AtomicBool,
    gentle: AtomicBool,
    /// Workers that are paused, and workers that have ended.
    idle: AtomicUsize,
    ended: AtomicUsize,
    failure: Mutex<Option<String>>,
}

impl Guest {
    /// Starts the guest on `handle`. `base` reads the untouched base image.
    pub fn start(
        handle: Arc<BlockHandle>,
        base: Arc<BlockHandle>,
        oracle: Arc<Oracle>,
        env: &Arc<dyn Environment>,
        load: Load,
    ) -> Self {
        let shared = Arc::new(Shared {
            handle,
            base,
            oracle,
            load,
            counts: Counts::default(),
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            gentle: AtomicBool::new(false),
            idle: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            failure: Mutex::default(),
        });
        let workers = load.queues * load.depth;
        for queue in 0..load.queues {
            for slot in 0..load.depth {
                let shared = shared.clone();
                let timer = env.clone();
                env.spawn(Box::pin(async move {
                    let result = shared.worker(queue, slot, &timer).await;
                    if let Err(text) = result {
                        shared.failure.lock().get_or_insert(text);
                        shared.stop.store(true, Ordering::SeqCst);
                    }
                    shared.ended.fetch_add(1, Ordering::SeqCst);
                }));
            }
        }
        Self {
            shared,
            env: env.clone(),
            workers,
        }
    }

    /// What it has done.
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// The first thing that went wrong.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.lock().clone()
    }

    /// Waits until no request is in flight, and keeps it so until [`Self::resume`].
    pub async fn pause(&self) {
        self.shared.paused.store(true, Ordering::SeqCst);
        loop {
            let quiet =
                self.shared.idle.load(Ordering::SeqCst) + self.shared.ended.load(Ordering::SeqCst);
            if quiet >= self.workers {
                return;
            }
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }

    /// Goes on.
    pub fn resume(&self) {
        self.shared.paused.store(false, Ordering::SeqCst);
    }

    /// With `true` it leaves time between requests.
    pub fn set_gentle(&self, gentle: bool) {
        self.shared.gentle.store(gentle, Ordering::SeqCst);
    }

    /// Ends it and waits for its last request.
    pub async fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.resume();
        while self.shared.ended.load(Ordering::SeqCst) < self.workers {
            self.env.sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Guest {
    /// Nobody watches it any more: it ends by itself.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.paused.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    async fn worker(
        &self,
        queue: usize,
        slot: usize,
        env: &Arc<dyn Environment>,
    ) -> Result<(), String> {
        let mut rng = StdRng::seed_from_u64(
            self.load.seed ^ ((queue as u64) << 32) ^ (slot as u64) << 48 ^ 0x6775_6573_7400,
        );
        let sectors = self.handle.length() / SECTOR;
        // Odd queues go through the disk in order, even ones jump; half of all goes to a hot part, where requests
        // meet those of jobs.
        let mut next = sectors / self.load.queues as u64 * queue as u64;
        while !self.stop.load(Ordering::SeqCst) {
            if self.paused.load(Ordering::SeqCst) {
                self.idle.fetch_add(1, Ordering::SeqCst);
                while self.paused.load(Ordering::SeqCst) {
                    env.sleep(Duration::from_millis(1)).await;
                }
                self.idle.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            if self.gentle.load(Ordering::SeqCst) {
                env.sleep(Duration::from_millis(rng.random_range(5..20)))
                    .await;
            }
            let sequential = queue % 2 == 1;
            self.one(&mut rng, sectors, sequential, &mut next).await?;
        }
        Ok(())
    }

    /// One request, with what it must find and what it leaves.
    async fn one(
        &self,
        rng: &mut StdRng,
        sectors: u64,
        sequential: bool,
        next: &mut u64,
    ) -> Result<(), String> {
        let kind = rng.random_range(0..100);
        if kind < 2 {
            self.handle
                .flush()
                .await
                .map_err(|error| format!("flush failed: {error}"))?;
            self.counts.flushes.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let cluster = (self.load.cluster / SECTOR).max(1);
        let is_discard = (70..80).contains(&kind);
        let mut count = match rng.random_range(0..10) {
            0..5 => 8,
            5..8 => rng.random_range(1..64),
            8 => rng.random_range(64..256),
            _ => rng.random_range(256..1024),
        };
        if is_discard {
            count = cluster * rng.random_range(1..5);
        }
        count = count.min(sectors);
        let hot = sectors.min(64 * cluster);
        let mut start = if sequential {
            *next
        } else if rng.random_bool(0.5) {
            rng.random_range(0..hot)
        } else {
            rng.random_range(0..sectors)
        };
        if is_discard {
            start -= start % cluster;
        } else if rng.random_bool(0.7) {
            start -= start % 8;
        }
        if start + count > sectors {
            start = sectors - count;
            if is_discard {
                start -= start % cluster;
                count = (sectors - start).min(count);
                count -= count % cluster;
                if count == 0 {
                    *next = 0;
                    return Ok(());
                }
            }
        }
        *next = if start + count >= sectors {
            0
        } else {
            start + count
        };
        let Some(claim) = self.oracle.claim(start, count) else {
            // Somebody else of the guest is there.
            return Ok(());
        };
        let (offset, len) = (start * SECTOR, count * SECTOR);
        let fail = |what: &str, error: &block_core::Error| {
            format!("{what} of {len} bytes at offset {offset} failed: {error}")
        };
        match kind {
            2..40 => {
                let data = self
                    .handle
                    .read(offset, len as usize)
                    .await
                    .map_err(|error| fail("read", &error))?;
                self.compare(&claim, &data).await?;
                self.counts.reads.fetch_add(1, Ordering::Relaxed);
            }
            70..80 => {
                self.handle
                    .discard(offset, len)
                    .await
                    .map_err(|error| fail("discard", &error))?;
                claim.set(Content::Zero);
                self.counts.discards.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            80..90 => {
                let flags = if kind % 2 == 0 {
                    RequestFlags::MAY_UNMAP
                } else {
                    RequestFlags::empty()
                };
                self.handle
                    .write_zeroes(offset, len, flags)
                    .await
                    .map_err(|error| fail("zero write", &error))?;
                claim.set(Content::Zero);
                self.counts.zeroes.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            _ => {
                let number = self.oracle.next_write();
                let mut data =
                    Buffer::try_new(len as usize).map_err(|error| fail("write", &error))?;
                for (at, sector) in data.chunks_mut(SECTOR as usize).enumerate() {
                    fill(sector, self.oracle.seed(), number, start + at as u64);
                }
                let flags = if kind == 99 {
                    RequestFlags::FUA
                } else {
                    RequestFlags::empty()
                };
                self.handle
                    .write(offset, IoBuf::from(data), flags)
                    .await
                    .map_err(|error| fail("write", &error))?;
                claim.set(Content::Written(number));
                self.counts.writes.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.counts.bytes.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    async fn compare(&self, claim: &Claim<'_>, data: &[u8]) -> Result<(), String> {
        let contents = claim.contents();
        check(
            data,
            claim.start,
            self.oracle.seed(),
            |at| contents[at as usize],
            &self.base,
        )
        .await
        .map_err(|text| format!("a read of the guest saw wrong data: {text}"))
    }
}

/// Compares `data`, which begins at sector `start`, with what `content` says (by index from `start`).
///
/// # Errors
/// The first sector that differs, with what it seems to hold.
pub async fn check(
    data: &[u8],
    start: u64,
    seed: u64,
    content: impl Fn(u64) -> Content,
    base: &BlockHandle,
) -> Result<(), String> {
    let sector_len = SECTOR as usize;
    let count = data.len() / sector_len;
    let base_length = base.length();
    let mut expected = [0u8; SECTOR as usize];
    let mut at = 0;
    while at < count {
        let sector = &data[at * sector_len..(at + 1) * sector_len];
        let index = start + at as u64;
        match content(at as u64) {
            Content::Zero => expected.fill(0),
            Content::Written(number) => fill(&mut expected, seed, number, index),
            Content::Base => {
                // A whole run at once.
                let mut run = 1;
                while at + run < count && content((at + run) as u64) == Content::Base {
                    run += 1;
                }
                let offset = index * SECTOR;
                let available = base_length
                    .saturating_sub(offset)
                    .min((run * sector_len) as u64) as usize;
                let mut wanted = vec![0; run * sector_len];
                if available > 0 {
                    let part = base
                        .read(offset, available)
                        .await
                        .map_err(|error| format!("the base image can't be read: {error}"))?;
                    wanted[..available].copy_from_slice(&part);
                }
                let found = &data[at * sector_len..(at + run) * sector_len];
                if found != wanted {
                    let bad = found
                        .chunks(sector_len)
                        .zip(wanted.chunks(sector_len))
                        .position(|(found, wanted)| found != wanted)
                        .unwrap_or(0);
                    return Err(format!(
                        "sector {} (offset {}) should hold the base image's data, holds {}",
                        index + bad as u64,
                        (index + bad as u64) * SECTOR,
                        describe(&found[bad * sector_len..(bad + 1) * sector_len])
                    ));
                }
                at += run;
                continue;
            }
        }
        if sector != expected {
            return Err(format!(
                "sector {index} (offset {}) should hold {}, holds {}",
                index * SECTOR,
                describe(&expected),
                describe(sector)
            ));
        }
        at += 1;
    }
    Ok(())
}
