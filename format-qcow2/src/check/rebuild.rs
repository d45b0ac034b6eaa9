//! Makes new refcount structures from the references that were counted.
//!
//! Crash-safe: blocks and table are written to fresh space behind the end of the file and flushed; then the header is
//! switched to them in one write. Until then the image is what it was, and what was written is space that nobody
//! refers to. The old structures are free afterwards.

use std::collections::{BTreeMap, BTreeSet};

use block_core::{
    error::{Error, Result},
    flags::RequestFlags,
    image::Progress,
    request::Child,
};

use super::{
    counts::Bits,
    stored::Stored,
    walk::{Walk, stop_if_cancelled},
};
use crate::{
    header_update,
    layout::{
        Header, HostCluster, HostOffset, Refcounts, entry::REFCOUNT_TABLE_MASK,
        header::MAX_REFCOUNT_TABLE_BYTES,
    },
};

/// The most refcount blocks that a table can hold.
const MAX_BLOCKS: u64 = MAX_REFCOUNT_TABLE_BYTES / 8;

/// Where the new structures go, in clusters: first the blocks, then the table.
struct Place {
    start: u64,
    /// The table index of each block, ascending.
    blocks: Vec<u64>,
    table_clusters: u64,
}

impl Place {
    fn len(&self) -> u64 {
        self.blocks.len() as u64 + self.table_clusters
    }
}

/// Writes new refcount structures and switches `header` to them. `fresh` are refcounts of clusters behind the end of the
/// file that nothing references yet.
///
/// # Errors
/// EINVAL when the image is too damaged or too large to be rebuilt; the image is unchanged then.
pub(super) async fn rebuild(
    file: &Child,
    walk: &Walk<'_>,
    old: &mut Stored<'_>,
    header: &mut Header,
    fresh: &BTreeMap<u64, u64>,
    progress: &Progress,
) -> Result<()> {
    let geometry = walk.geometry;
    let cluster_size = geometry.cluster_size();
    let bits = geometry.cluster_bits();
    let kept = kept_clusters(walk, old).await?;
    let place = find_place(walk, &kept, fresh)?;
    let refcounts = Refcounts::from(geometry);
    let per_block = geometry.refcounts_per_block();
    let own = place.start..place.start + place.len();

    let table_len = place.table_clusters * cluster_size;
    let mut table = vec![0u8; table_len as usize];
    for (at, index) in place.blocks.iter().enumerate() {
        stop_if_cancelled(progress)?;
        let offset = (place.start + at as u64) << bits;
        let mut block = vec![0u8; cluster_size as usize];
        let (first, last) = (index * per_block, (index + 1) * per_block);
        let mut set = |cluster: u64, value: u64| {
            let slot = geometry.refcount_block_index(HostCluster(cluster)) as usize;
            // What doesn't fit stays at the most that does; the check reports it again.
            refcounts.set(&mut block, slot, value.min(refcounts.max()))
        };
        let mut from = first;
        while let Some(cluster) = walk.counts.next_used(from, last) {
            from = cluster + 1;
            let references = walk.counts.get(cluster);
            // The old structures are free once the new ones are in use.
            let ending = walk.structures.get(cluster);
            set(cluster, references.saturating_sub(ending))?;
        }
        for cluster in kept.from(first).take_while(|cluster| *cluster < last) {
            set(cluster, 1)?;
        }
        for (cluster, value) in fresh.range(first..last) {
            set(*cluster, *value)?;
        }
        for cluster in own.start.max(first)..own.end.min(last) {
            set(cluster, 1)?;
        }
        let slot = *index as usize * 8;
        table[slot..slot + 8].copy_from_slice(&(offset & REFCOUNT_TABLE_MASK).to_be_bytes());
        file.write(offset, block, RequestFlags::empty()).await?;
    }
    let table_offset = (place.start + place.blocks.len() as u64) << bits;
    file.write(table_offset, table, RequestFlags::empty())
        .await?;
    file.flush().await?;
    stop_if_cancelled(progress)?;
    let clusters = place.table_clusters as u32;
    let offset = HostOffset(table_offset);
    header_update::write_refcount_table_pointer(file, header, offset, clusters).await?;
    file.flush().await
}

/// Clusters that nothing references as far as could be seen, but whose stored refcount says that they are in use:
/// while a part of the mapping is unreadable they stay allocated. Where there is no refcount any more, all stay.
async fn kept_clusters(walk: &Walk<'_>, old: &mut Stored<'_>) -> Result<Bits> {
    let mut kept = Bits::default();
    if !walk.incomplete {
        return Ok(kept);
    }
    let per_block = walk.geometry.refcounts_per_block();
    let refcounts = Refcounts::from(walk.geometry);
    let lost = walk.rebuild || old.table().iter().all(|entry| *entry == 0);
    let mut first = 0;
    while first < walk.clusters() {
        let last = walk.clusters().min(first + per_block);
        let block = old.block_bytes(first / per_block).await;
        // A block that isn't there stands for unused clusters, unless it got lost.
        let unknown = lost || block.is_err() || walk.counts.next_used(first, last).is_some();
        let block = block.unwrap_or(None);
        for cluster in first..last {
            let stored = match block {
                Some(block) => refcounts.get(block, (cluster - first) as usize) > 0,
                None => unknown,
            };
            if stored && walk.counts.get(cluster) == 0 {
                kept.insert(cluster)?;
            }
        }
        first = last;
    }
    Ok(kept)
}

/// The first cluster of a row behind the end of the file that nothing references and no damaged entry points to, from
/// `from` on.
///
/// # Errors
/// EINVAL when too many entries point there.
pub(super) fn free_row(walk: &Walk<'_>, from: u64, len: u64) -> Result<u64> {
    let Some(past_end) = &walk.past_end else {
        return Err(Error::invalid(
            "Too many entries point beyond the end of the file to rebuild the refcounts",
        ));
    };
    // A region may reach into the cluster behind the end.
    let mut start = from.max(walk.clusters());
    while walk.counts.get(start) > 0 {
        start += 1;
    }
    while let Some(conflict) = past_end.range(start..start + len).next_back() {
        start = conflict + 1;
    }
    Ok(start)
}

/// Room for the new structures behind the end of the file, where no damaged entry points to.
fn find_place(walk: &Walk<'_>, kept: &Bits, fresh: &BTreeMap<u64, u64>) -> Result<Place> {
    let per_block = walk.geometry.refcounts_per_block();
    let cluster_size = walk.geometry.cluster_size();
    let mut needed = BTreeSet::new();
    let mut from = 0;
    while let Some(cluster) = walk.counts.next_used(from, u64::MAX) {
        needed.insert(cluster / per_block);
        from = (cluster / per_block + 1) * per_block;
    }
    let mut from = 0;
    while let Some(cluster) = kept.from(from).next() {
        needed.insert(cluster / per_block);
        from = (cluster / per_block + 1) * per_block;
    }
    needed.extend(fresh.keys().map(|cluster| cluster / per_block));
    let behind = fresh.last_key_value().map_or(0, |(cluster, _)| cluster + 1);

    let mut start = free_row(walk, behind, 1)?;
    loop {
        let mut len = 1;
        let place = loop {
            let mut blocks = needed.clone();
            blocks.extend(start / per_block..=(start + len - 1) / per_block);
            let highest = blocks.last().copied().unwrap_or(0);
            if highest >= MAX_BLOCKS {
                return Err(Error::invalid(
                    "The image file is too large for a refcount table of this cluster size and refcount width",
                ));
            }
            let table_clusters = ((highest + 1) * 8).div_ceil(cluster_size);
            let place = Place {
                start,
                blocks: blocks.into_iter().collect(),
                table_clusters,
            };
            if place.len() <= len {
                break place;
            }
            len = place.len();
        };
        let free = free_row(walk, start, place.len())?;
        if free == start {
            return Ok(place);
        }
        start = free;
    }
}
