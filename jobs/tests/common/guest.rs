//! A guest: several workers that write, zero, discard, flush and read back, each in blocks of its own, and an oracle that knows
//! what every byte has to be.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use block_core::{BlockHandle, Graph, IoBuf, RequestFlags};
use futures::channel::oneshot;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::mem::CLUSTER;

const BLOCK: u64 = 4096;
const WORKERS: u64 = 4;

pub struct Guest {
    pub oracle: Arc<Mutex<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    pub operations: Arc<AtomicU64>,
    ends: Vec<oneshot::Receiver<Result<(), String>>>,
}

impl Guest {
    /// Starts working on `handle`, whose content is `content`.
    pub fn start(
        graph: &Arc<Graph>,
        handle: &Arc<BlockHandle>,
        content: Vec<u8>,
        seed: u64,
    ) -> Self {
        let region = content.len() as u64;
        Self::start_in(graph, handle, content, seed, region)
    }

    /// The same, in the first `region` bytes only.
    pub fn start_in(
        graph: &Arc<Graph>,
        handle: &Arc<BlockHandle>,
        content: Vec<u8>,
        seed: u64,
        region: u64,
    ) -> Self {
        let mut guest = Self {
            oracle: Arc::new(Mutex::new(content)),
            stop: Arc::default(),
            operations: Arc::default(),
            ends: Vec::new(),
        };
        for worker in 0..WORKERS {
            let (tx, rx) = oneshot::channel();
            guest.ends.push(rx);
            let work = Worker {
                handle: handle.clone(),
                oracle: guest.oracle.clone(),
                worker,
                region,
                random: SmallRng::seed_from_u64(seed * 1000 + worker),
            };
            let (stop, operations) = (guest.stop.clone(), guest.operations.clone());
            graph.env().spawn(Box::pin(async move {
                let _ = tx.send(work.run(stop, operations).await);
            }));
        }
        guest
    }

    /// Lets it do at least `more` operations.
    pub async fn work(&self, graph: &Arc<Graph>, more: u64) {
        let until = self.operations.load(Ordering::SeqCst) + more;
        while self.operations.load(Ordering::SeqCst) < until {
            graph.env().sleep(std::time::Duration::from_millis(1)).await;
            assert!(!self.stop.load(Ordering::SeqCst), "a worker gave up");
        }
    }

    /// Stops it and gives back what the disk has to hold.
    pub async fn stop(self) -> Vec<u8> {
        self.stop.store(true, Ordering::SeqCst);
        for end in self.ends {
            end.await.expect("the worker ran").expect("no error");
        }
        self.oracle.lock().clone()
    }
}

struct Worker {
    handle: Arc<BlockHandle>,
    oracle: Arc<Mutex<Vec<u8>>>,
    worker: u64,
    region: u64,
    random: SmallRng,
}

impl Worker {
    async fn run(
        mut self,
        stop: Arc<AtomicBool>,
        operations: Arc<AtomicU64>,
    ) -> Result<(), String> {
        while !stop.load(Ordering::SeqCst) {
            let result = self.step().await;
            operations.fetch_add(1, Ordering::SeqCst);
            if let Err(error) = result {
                stop.store(true, Ordering::SeqCst);
                return Err(error);
            }
        }
        Ok(())
    }

    /// A block of this worker in the first half of the disk (clusters are shared between workers), or a cluster of its own in
    /// the second half.
    async fn step(&mut self) -> Result<(), String> {
        let length = self.region;
        let half = length / 2 / CLUSTER * CLUSTER;
        let shared = self.random.random_bool(0.5);
        let (offset, len) = if shared {
            let blocks = half / BLOCK / WORKERS;
            let block = self.random.random_range(0..blocks) * WORKERS + self.worker;
            (block * BLOCK, BLOCK)
        } else {
            let clusters = (length - half) / CLUSTER / WORKERS;
            let cluster = self.random.random_range(0..clusters) * WORKERS + self.worker;
            (half + cluster * CLUSTER, CLUSTER)
        };
        let fail = |error: block_core::Error| format!("{error}");
        match self.random.random_range(0..10) {
            0..=3 => {
                let byte = self.random.random_range(1..=255);
                // A part of it, now and then unaligned.
                let cut = if self.random.random_bool(0.3) { 100 } else { 0 };
                let data = vec![byte; (len - cut) as usize];
                self.oracle.lock()[offset as usize..(offset + len - cut) as usize].fill(byte);
                self.handle
                    .write(offset, IoBuf::from(data), RequestFlags::empty())
                    .await
                    .map_err(fail)?;
            }
            4 | 5 => {
                self.oracle.lock()[offset as usize..(offset + len) as usize].fill(0);
                let flags = if self.random.random_bool(0.7) {
                    RequestFlags::MAY_UNMAP
                } else {
                    RequestFlags::empty()
                };
                self.handle
                    .write_zeroes(offset, len, flags)
                    .await
                    .map_err(fail)?;
            }
            6 | 7 if !shared => {
                self.oracle.lock()[offset as usize..(offset + len) as usize].fill(0);
                self.handle.discard(offset, len).await.map_err(fail)?;
            }
            8 if self.random.random_bool(0.1) => self.handle.flush().await.map_err(fail)?,
            _ => {
                let data = self.handle.read(offset, len as usize).await.map_err(fail)?;
                let expected =
                    self.oracle.lock()[offset as usize..(offset + len) as usize].to_vec();
                if let Some(at) = data.iter().zip(&expected).position(|(a, b)| a != b) {
                    return Err(format!(
                        "byte {:#x} is {:#x} and should be {:#x}",
                        offset + at as u64,
                        data[at],
                        expected[at]
                    ));
                }
            }
        }
        Ok(())
    }
}
