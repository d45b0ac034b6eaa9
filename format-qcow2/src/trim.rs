//! What a shrink gives back once the disk is smaller: L2 tables of the part that was cut off, refcount blocks that count
//! nothing any more, and the end of the file.
//!
//! It never touches guest data: by the time it runs, nothing on disk maps the part that was cut off and the size is the new
//! one, durably. Whatever fails here leaks space and harms nothing, so only damaged metadata makes the shrink fail.

use std::sync::{Arc, atomic::Ordering};

use block_core::{
    driver::Truncate,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    request::Request,
};
use futures::FutureExt;

use crate::{
    alloc::quarantine::Freed,
    cache::slice::SliceIndex,
    counters::Counters,
    image::Qcow2,
    layout::{HostCluster, L1Entry, units::hex},
    meta::Meta,
    overlap::Kinds,
};

impl Qcow2 {
    /// Gives back what a disk of `size` bytes doesn't need. Nobody else is at what lies beyond that.
    ///
    /// # Errors
    /// `Corrupt` only.
    pub async fn trim(self: &Arc<Self>, request: &Request, size: u64) -> Result<()> {
        match self.trim_all(request, size).await {
            Err(error) if error.kind() != ErrorKind::Corrupt => {
                tracing::warn!("qcow2: space behind the new end of the disk leaks: {error}");
                Ok(())
            }
            done => done,
        }
    }

    async fn trim_all(self: &Arc<Self>, request: &Request, size: u64) -> Result<()> {
        self.drop_tables(request, size).await?;
        self.write_back(request).await?;
        // Reads and writes in front of the cut may be in flight, and a shrink doesn't wait for them: then what was cut off is freed by
        // later batches, and the file keeps its length.
        let grace = self.pins.retire();
        if self.pins.wait(grace).now_or_never().is_none() {
            return Ok(());
        }
        // After this the references are gone, and so are those of the data that was cut off.
        self.release_quarantine(request.file()?).await?;
        {
            // Nobody may be writing blocks, and nobody may allocate.
            let _turn = self.hold_batches().await;
            let mut meta = self.lock_meta(request.file()?).await?;
            self.writeback.failure.check()?;
            self.drop_empty_blocks(&mut meta, request).await?;
            self.cut_file(&mut meta, request).await?;
            self.note_sizes(&meta);
        }
        self.write_back(request).await
    }

    /// Unlinks the L2 tables that map nothing of a disk of `size` bytes.
    async fn drop_tables(self: &Arc<Self>, request: &Request, size: u64) -> Result<()> {
        let file = request.file()?;
        let mut meta = self.lock_meta(file).await?;
        let l1 = self.l1.load_full();
        let per_table = self.geometry.l2_entries() >> self.settings.slice_bits();
        let punch = self.settings.pass_discard_other();
        let mut freed = Freed::default();
        let mut result = Ok(());
        let first = self.geometry.l1_entries_for(size);
        for (at, slot) in l1.entries.iter().enumerate().skip(first as usize) {
            let at = at as u64;
            let old = match L1Entry::decode(slot.load(Ordering::SeqCst), self.geometry) {
                Ok(L1Entry { l2: None, .. }) => continue,
                Ok(L1Entry { l2: Some(old), .. }) => self.geometry.host_cluster_of(old),
                Err(problem) => {
                    result = Err(Error::corrupt(format!(
                        "L2 table {problem} (L1 index: {})",
                        hex(at)
                    )));
                    break;
                }
            };
            let dropped = async {
                let references = meta.refcounts.get(file, old).await?;
                meta.unreference(file, old.0, old.0, punch, &mut freed)
                    .await?;
                Ok(references)
            };
            let references = match dropped.await {
                Ok(references) => references,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            let still_used = references > meta.quarantine.pending(old.0);
            self.slices.change_tables(|table| {
                slot.store(0, Ordering::SeqCst);
                for n in 0..per_table {
                    table.remove(SliceIndex(at * per_table + n));
                    meta.dirty_slices.remove(&(at * per_table + n));
                }
            });
            meta.dirty_l1.insert(at);
            if !still_used {
                self.metadata.remove(Kinds::ACTIVE_L2, [old.0]);
            }
            Counters::add(&self.counters.tables_dropped, 1);
        }
        let batch = meta.batch;
        meta.quarantine.close(freed, batch, &self.pins);
        self.note_sizes(&meta);
        result
    }

    /// Takes refcount blocks that count nothing but themselves out of the table. With the write-back's turn and the
    /// metadata lock held.
    async fn drop_empty_blocks(&self, meta: &mut Meta, request: &Request) -> Result<()> {
        let file = request.file()?;
        let failure = &self.writeback.failure;
        // A block that goes may have been the last thing that another one counted.
        loop {
            let mut gone = Vec::new();
            for index in (1..meta.refcounts.blocks_end()).rev() {
                if meta.refcounts.counts_nothing_else(file, index).await?
                    && let Some(host) = meta.refcounts.block_offset(index)
                {
                    gone.push((index, self.geometry.host_cluster_of(host)));
                }
            }
            if gone.is_empty() {
                return Ok(());
            }
            for (index, _) in &gone {
                let at = meta.refcounts.place().offset.0 + index * 8;
                let zero = 0u64.to_be_bytes().to_vec();
                failure.note(file.write(at, zero, RequestFlags::empty()).await)?;
            }
            failure.flush(file).await?;
            // The table has no entry for them, durably: all that they counted is free, themselves included.
            for (index, cluster) in gone {
                meta.refcounts.remove_block(index);
                self.metadata.remove(Kinds::REFCOUNT_BLOCK, [cluster.0]);
                if meta.geometry.refcount_table_index(cluster) != index {
                    meta.drop_reference(file, cluster).await?;
                } else {
                    meta.hint = meta.hint.min(cluster.0);
                }
                Counters::add(&self.counters.refblocks_dropped, 1);
            }
        }
    }

    /// Cuts off the end of the file that nothing is in. As [`Self::drop_empty_blocks`].
    async fn cut_file(&self, meta: &mut Meta, request: &Request) -> Result<()> {
        let file = request.file()?;
        let last = meta.refcounts.last_used(file).await?;
        let end = self.geometry.host_start(HostCluster(last + 1)).0;
        if file.length() <= end {
            return Ok(());
        }
        file.truncate(end, Truncate::default()).await
    }
}
