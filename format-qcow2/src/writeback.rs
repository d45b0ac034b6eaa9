//! Writing metadata back in an order that a power cut can't turn into corruption.
//!
//! A batch works on a snapshot, taken under the metadata lock and written without it:
//!
//! 1. refcount blocks (data, copy-on-write fill and zeroed new tables were written when the requests did them),
//!    then a barrier (before any of it an external data file is flushed); entries of the refcount table for new blocks, then a barrier if there were any;
//! 2. L2 slices and L1 entries: links and unlinks; then a barrier;
//! 3. references whose unlink is durable by now leave the quarantine: their clusters are punched if that was asked for,
//!    then their refcounts are lowered in memory, which reaches the disk with the next batch at the earliest.
//!
//! With lazy refcounts, and once the dirty bit is durable, a guest's flush leaves step 1 out: the bit says that refcounts on
//! disk aren't to be trusted. Everything else (closing, making room, getting space back) writes them.
//!
//! So no entry on disk ever refers to a cluster whose refcount on disk says that it is free, and no cluster is used again
//! while an entry on disk still refers to it. One batch runs at a time; those who ask while one runs share the next.
//! Requests go on meanwhile: what they change stays dirty.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use block_core::{
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::{Child, Request},
    space::SpaceEvent,
};
use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    alloc::quarantine::{Freed, FreedRun, merge_clusters},
    cache::{
        refcounts::BlockCopy,
        slice::{NumberMap, Slice, SliceIndex},
    },
    counters::Counters,
    image::Qcow2,
    layout::{HostCluster, L1Entry},
    meta::{Failure, Meta},
};

/// Metadata writes in flight at once.
const WINDOW: usize = 16;
/// Bytes that the quarantine holds before a request that frees more has to run a batch.
const QUARANTINE_BYTES: u64 = 256 << 20;
/// Rounds in which nothing leaves the quarantine, after which settling is given up. What was dropped last is written in the
/// next round, so a few are in order.
const MAX_IDLE_ROUNDS: u32 = 8;
/// The largest merged metadata write.
const MAX_MERGED: usize = 1 << 20;

/// Whose turn it is, and what went wrong for good (shared with [`Meta`]).
#[derive(Default)]
pub(crate) struct Writeback {
    turn: futures::lock::Mutex<Turn>,
    /// Batches begun.
    begun: AtomicU64,
    /// What made all later batches fail.
    pub failure: Arc<Failure>,
}

#[derive(Default)]
struct Turn {
    /// The last batch.
    any: Ended,
    /// The last one that wrote refcounts as well.
    whole: Ended,
}

/// A batch that ended.
#[derive(Default)]
struct Ended {
    number: u64,
    error: Option<Error>,
}

/// What a batch is to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    Everything,
    /// Refcounts may stay behind if the dirty bit says so.
    Lazily,
}

/// What one batch writes.
struct Snapshot {
    batch: u64,
    blocks: Vec<BlockCopy>,
    slices: Vec<SliceCopy>,
    l1: Vec<(u64, u64)>,
    /// Where the L1 table was.
    l1_offset: u64,
    linked: bool,
}

struct SliceCopy {
    index: SliceIndex,
    slice: Arc<Slice>,
    version: u64,
    host: u64,
    bytes: Vec<u8>,
}

impl Qcow2 {
    /// Clusters that the quarantine may hold.
    pub fn quarantine_limit(&self) -> u64 {
        (QUARANTINE_BYTES / self.geometry.cluster_size()).clamp(512, 65536)
    }

    /// Makes everything that completed before durable.
    ///
    /// # Errors
    /// Whatever the storage reports: all that wasn't written stays dirty. After a failed barrier every later call fails.
    pub async fn write_back(self: &Arc<Self>, request: &Request) -> Result<()> {
        self.take_turn(request, Extent::Everything).await
    }

    /// The same for a guest's flush: with lazy refcounts it is enough that the dirty bit is durable.
    pub async fn write_back_for_guest(self: &Arc<Self>, request: &Request) -> Result<()> {
        let extent = if self.settings.lazy_refcounts() {
            Extent::Lazily
        } else {
            Extent::Everything
        };
        self.take_turn(request, extent).await
    }

    async fn take_turn(self: &Arc<Self>, request: &Request, extent: Extent) -> Result<()> {
        let seen = self.writeback.begun.load(Ordering::SeqCst);
        let mut turn = self.writeback.turn.lock().await;
        let ended = match extent {
            Extent::Everything => &turn.whole,
            Extent::Lazily => &turn.any,
        };
        if ended.number > seen {
            // A batch that began after this call did has ended meanwhile.
            return match &ended.error {
                Some(error) => Err(error.duplicate()),
                None => Ok(()),
            };
        }
        let number = self.writeback.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let result = self.run_batch(request, extent).await;
        let ended = || Ended {
            number,
            error: result.as_ref().err().map(Error::duplicate),
        };
        turn.any = ended();
        if extent == Extent::Everything {
            turn.whole = ended();
        }
        result
    }

    /// Holds back batches, for whoever moves tables.
    pub async fn hold_batches(&self) -> impl Drop + '_ {
        struct Held<'a>(#[expect(dead_code)] futures::lock::MutexGuard<'a, Turn>);
        impl Drop for Held<'_> {
            fn drop(&mut self) {}
        }
        Held(self.writeback.turn.lock().await)
    }

    async fn run_batch(self: &Arc<Self>, request: &Request, extent: Extent) -> Result<()> {
        self.writeback.failure.check()?;
        let file = request.file()?;
        Counters::add(&self.counters.batches, 1);
        self.settle_size(file).await?;
        let snapshot = {
            let mut meta = self.lock_meta(file).await?;
            self.snapshot(&mut meta, extent)?
        };
        if self.geometry.has_data_file() {
            // What the snapshot links was written before it was taken. Guests flush for their data's sake, so
            // this isn't only for batches that link something.
            let data = self.data(request)?;
            if let Err(error) = self.writeback.failure.flush(data).await {
                self.meta.lock().await.linked |= snapshot.linked;
                return Err(error);
            }
        }
        if let Err(error) = self.write_snapshot(file, &snapshot).await
            && !mutant::is_active("qcow2-write-back-error-swallowed")
        {
            self.meta.lock().await.linked |= snapshot.linked;
            return Err(error);
        }
        {
            let mut meta = self.meta.lock().await;
            self.commit(&mut meta, &snapshot);
        }
        match self.release_quarantine(file).await {
            Err(error) if error.kind() != ErrorKind::Corrupt => {
                // All that was asked for is durable; the space is released by a later batch.
                tracing::warn!("qcow2: freed clusters could not be released yet: {error}");
                Ok(())
            }
            done => done,
        }
    }

    fn snapshot(&self, meta: &mut Meta, extent: Extent) -> Result<Snapshot> {
        let batch = meta.batch;
        meta.batch += 1;
        let l1 = self.l1.load_full();
        let mut slices = Vec::with_capacity(meta.dirty_slices.len());
        let has_table = |index: u64| {
            matches!(
                self.table_of(SliceIndex(index)),
                Ok(L1Entry { l2: Some(_), .. })
            )
        };
        meta.dirty_slices.retain(|index, _| has_table(*index));
        for (index, slice) in &meta.dirty_slices {
            let index = SliceIndex(*index);
            let Some(table) = self.table_of(index)?.l2 else {
                continue;
            };
            let version = slice.version();
            let host = self.slice_host(index, table).0;
            slices.push(SliceCopy {
                index,
                slice: slice.clone(),
                version,
                host,
                bytes: slice.to_bytes(self.geometry),
            });
        }
        slices.sort_by_key(|copy| copy.host);
        let entries = meta.dirty_l1.iter().map(|at| (*at, l1.load(*at))).collect();
        Ok(Snapshot {
            batch,
            // The bit in memory is the one on disk: whoever sets it takes it back when that fails.
            blocks: if extent == Extent::Lazily && meta.header.is_dirty() {
                Counters::add(&self.counters.lazy_batches, 1);
                Vec::new()
            } else {
                meta.refcounts.dirty_copies()
            },
            slices,
            l1: entries,
            l1_offset: l1.offset.0,
            linked: std::mem::take(&mut meta.linked),
        })
    }

    async fn write_snapshot(&self, file: &Child, snapshot: &Snapshot) -> Result<()> {
        if mutant::is_active("qcow2-links-written-before-refcounts") {
            let slices = snapshot
                .slices
                .iter()
                .map(|copy| (copy.host, copy.bytes.clone()));
            write_all(file, slices).await?;
            self.barrier(file).await?;
        }
        if !snapshot.blocks.is_empty() {
            file.debug_event(DebugEvent::RefblockUpdate).await;
        }
        self.tap.tell(|| SpaceEvent::WriteBack("refcounts"));
        let blocks = snapshot
            .blocks
            .iter()
            .map(|copy| (copy.host.0, copy.bytes.clone()));
        write_all(file, blocks).await?;
        let publishes = !snapshot.blocks.is_empty() && {
            let meta = self.meta.lock().await;
            meta.refcounts.has_unpublished()
        };
        if (snapshot.linked || publishes)
            && !mutant::is_active("qcow2-no-barrier-between-data-and-links")
        {
            self.barrier(file).await?;
        }
        if publishes {
            let published = {
                let mut meta = self.meta.lock().await;
                // The table isn't to be written while it is unknown which one the header points to.
                self.writeback.failure.check()?;
                self.tap.tell(|| SpaceEvent::WriteBack("refcount-table"));
                meta.refcounts.publish(file, &snapshot.blocks).await?
            };
            if published {
                self.barrier(file).await?;
            }
        }
        let slices = snapshot
            .slices
            .iter()
            .map(|copy| (copy.host, copy.bytes.clone()));
        let l1 = snapshot
            .l1
            .iter()
            .map(|(at, raw)| (snapshot.l1_offset + at * 8, raw.to_be_bytes().to_vec()));
        if !snapshot.slices.is_empty() {
            file.debug_event(DebugEvent::L2Update).await;
        }
        self.tap.tell(|| SpaceEvent::WriteBack("links"));
        write_all(file, slices).await?;
        if !snapshot.l1.is_empty() {
            file.debug_event(DebugEvent::L1Update).await;
        }
        write_all(file, l1).await?;
        if mutant::is_active("qcow2-no-barrier-after-links") {
            return Ok(());
        }
        self.barrier(file).await?;
        self.tap.tell(|| SpaceEvent::WriteBack("data"));
        Ok(())
    }

    async fn barrier(&self, file: &Child) -> Result<()> {
        Counters::add(&self.counters.barriers, 1);
        self.writeback.failure.flush(file).await?;
        // Another flush may have failed meanwhile.
        self.writeback.failure.check()
    }

    /// The snapshot is durable: what hasn't changed since is clean.
    fn commit(&self, meta: &mut Meta, snapshot: &Snapshot) {
        for copy in &snapshot.blocks {
            meta.refcounts.wrote(copy);
        }
        for copy in &snapshot.slices {
            let version = if mutant::is_active("qcow2-slice-clean-although-changed") {
                copy.slice.version()
            } else {
                copy.version
            };
            copy.slice.wrote(version);
            if !copy.slice.is_dirty() {
                meta.dirty_slices.remove(&copy.index.0);
            }
        }
        let l1 = self.l1.load_full();
        for (at, raw) in &snapshot.l1 {
            if l1.load(*at) == *raw {
                meta.dirty_l1.remove(at);
            }
        }
        meta.durable = meta.durable.max(snapshot.batch);
    }

    /// Step 3 of the file's header: drops the references that nothing holds back any more.
    ///
    /// # Errors
    /// Whatever the storage reports when refcounts can't be read; those references stay in quarantine.
    pub(crate) async fn release_quarantine(self: &Arc<Self>, file: &Child) -> Result<()> {
        let (ready, punches) = {
            let mut meta = self.meta.lock().await;
            let durable = meta.durable;
            let (ready, deferred) = meta.quarantine.take_ready(durable, &self.pins);
            Counters::add(&self.counters.frees_deferred, deferred);
            let punches = meta.punchable(file, &ready).await.unwrap_or_else(|error| {
                tracing::debug!("qcow2: freed clusters are not punched: {error}");
                Vec::new()
            });
            (ready, punches)
        };
        if ready.is_empty() {
            return Ok(());
        }
        let late = mutant::is_active("qcow2-publish-before-punch");
        if !late {
            self.punch(file, &punches).await;
        }
        let mut meta = self.meta.lock().await;
        let mut result = Ok(());
        let mut kept = Freed::default();
        // The refcount block that couldn't be read last.
        let mut unreadable = None;
        for (cluster, punch) in ready
            .iter()
            .flat_map(|run| (run.first..run.first + run.count).map(|cluster| (cluster, run.punch)))
        {
            let host = HostCluster(cluster);
            let block = meta.geometry.refcount_table_index(host);
            if unreadable == Some(block) {
                kept.push(cluster, punch);
                continue;
            }
            match meta.refcounts.get(file, host).await {
                Err(error) if error.kind() != ErrorKind::Corrupt => {
                    unreadable = Some(block);
                    kept.push(cluster, punch);
                    if result.is_ok() {
                        result = Err(error);
                    }
                    continue;
                }
                _ => {}
            }
            meta.quarantine.dropped(cluster);
            Counters::add(&self.counters.freed, 1);
            if let Err(error) = meta.drop_reference(file, host).await {
                // The refcounts are damaged, and the space leaks.
                result = Err(error);
            }
        }
        // Their unlinks are durable already.
        meta.quarantine.close(kept, 0, &self.pins);
        self.note_sizes(&meta);
        drop(meta);
        if late {
            self.punch(file, &punches).await;
        }
        result
    }

    /// Gives host ranges back to the storage. Advisory: an error changes nothing for the guest.
    pub async fn punch(&self, file: &Child, runs: &[(u64, u64)]) {
        let bits = self.geometry.cluster_bits();
        for (first, count) in runs {
            let end = ((first + count) << bits).min(file.length());
            let start = first << bits;
            if start < end && file.discard(start, end - start).await.is_ok() {
                Counters::add(&self.counters.punches, 1);
            }
        }
    }

    /// Gets back all space that can be had: a batch, then a wait for every pin there is. The caller holds none.
    pub async fn reclaim(self: &Arc<Self>, request: &Request) -> Result<()> {
        Counters::add(&self.counters.reclaims, 1);
        self.write_back(request).await?;
        let grace = self.pins.retire();
        self.pins.wait(grace).await;
        self.release_quarantine(request.file()?).await
    }

    /// Takes a step that allocates, and takes it again when the storage was full and what is in quarantine has been
    /// released meanwhile. The step must hold no pin, claim or lock when it fails, and be repeatable then.
    pub async fn reclaiming<T, F>(
        self: &Arc<Self>,
        request: &Request,
        mut step: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        match step().await {
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                if self.reclaim(request).await.is_err() {
                    return Err(error);
                }
                step().await
            }
            done => done,
        }
    }

    /// Brings disk and memory together: nothing dirty, nothing in quarantine. For close, check and reopen, while no
    /// request is under way.
    ///
    /// # Errors
    /// What kept a round from getting any nearer to that.
    pub async fn settle(self: &Arc<Self>, request: &Request) -> Result<()> {
        let mut idle_rounds = 0;
        loop {
            let waiting = self.meta.lock().await.quarantine.len();
            let reclaimed = self.reclaim(request).await;
            self.writeback.failure.check()?;
            let meta = self.lock_meta(request.file()?).await?;
            self.note_sizes(&meta);
            if meta.quarantine.len() < waiting {
                idle_rounds = 0;
                continue;
            }
            reclaimed?;
            if !meta.is_dirty() && meta.quarantine.is_empty() {
                return Ok(());
            }
            idle_rounds += 1;
            if idle_rounds > MAX_IDLE_ROUNDS {
                return Err(Error::io("Metadata doesn't settle"));
            }
        }
    }

    /// Runs a batch when more is in quarantine, or more refcount blocks are in memory, than should be.
    pub async fn bound_metadata(self: &Arc<Self>, request: &Request) -> Result<()> {
        let limit = self.quarantine_limit();
        if self.quarantined.load(Ordering::Relaxed) > limit {
            self.write_back(request).await?;
            if self.quarantined.load(Ordering::Relaxed) > 2 * limit {
                self.reclaim(request).await?;
            }
        }
        let blocks = self.settings.refcount_blocks();
        if self.cached_refcount_blocks.load(Ordering::Relaxed) > blocks {
            for attempt in 0..2 {
                {
                    let mut meta = self.meta.lock().await;
                    meta.refcounts.evict(blocks - blocks / 4);
                    self.note_sizes(&meta);
                    if meta.refcounts.cached() <= blocks || attempt == 1 {
                        break;
                    }
                }
                self.write_back(request).await?;
            }
        }
        Ok(())
    }
}

impl Meta {
    /// Which of the clusters whose references are about to be dropped nothing else refers to, among those that are to be
    /// punched; merged.
    async fn punchable(&mut self, file: &Child, ready: &[FreedRun]) -> Result<Vec<(u64, u64)>> {
        let mut dropping: NumberMap<u64> = NumberMap::default();
        let clusters = |run: &FreedRun| run.first..run.first + run.count;
        if ready.iter().all(|run| !run.punch) {
            return Ok(Vec::new());
        }
        for cluster in ready.iter().flat_map(clusters) {
            *dropping.entry(cluster).or_insert(0) += 1;
        }
        let mut found = Vec::new();
        for cluster in ready.iter().filter(|run| run.punch).flat_map(clusters) {
            let references = self.refcounts.get(file, HostCluster(cluster)).await?;
            if dropping.get(&cluster) == Some(&references) {
                found.push(cluster);
            }
        }
        Ok(merge_clusters(found))
    }
}

/// Writes pieces, given in ascending order, several at once; neighbours become one write.
async fn write_all(file: &Child, pieces: impl Iterator<Item = (u64, Vec<u8>)>) -> Result<()> {
    let mut merged: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, bytes) in pieces {
        match merged.last_mut() {
            Some((start, all))
                if *start + all.len() as u64 == at && all.len() + bytes.len() <= MAX_MERGED =>
            {
                all.extend_from_slice(&bytes);
            }
            _ => merged.push((at, bytes)),
        }
    }
    stream::iter(merged)
        .map(|(at, bytes)| file.write(at, bytes, RequestFlags::empty()))
        .buffer_unordered(WINDOW)
        .try_collect::<()>()
        .await
}
