//! Another width of refcounts: new blocks and a new table are written aside, with everything that is counted now, and the
//! header is switched to them, and to their width, in one write. Until then a power cut leaves the old ones in charge, and the
//! new ones are free space to them. The old ones are given back afterwards.

use std::{collections::BTreeSet, sync::Arc};

use block_core::{
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    image::Progress,
    request::{Child, Request},
};

use super::check_cancelled;
use crate::{
    alloc::allocator::Allocation,
    image::Qcow2,
    layout::{Extensions, Geometry, Header, HostCluster, Refcounts, header::field},
    meta::Meta,
};

/// A refcount table may not be larger than this.
const MAX_TABLE_BYTES: u64 = 8 << 20;
/// Host clusters looked at between two looks at whether to go on.
const STEP: u64 = 1 << 20;

/// Space for the new structures.
struct Space {
    /// Table indexes that get a block, ascending, and where those go.
    blocks: Vec<(u64, HostCluster)>,
    table: Allocation,
    others: Vec<Allocation>,
}

impl Qcow2 {
    /// Changes the width to `1 << order` bits.
    ///
    /// # Errors
    /// EINVAL, with nothing changed, if some refcount is too large for it; ENOSPC; whatever the storage reports.
    pub(super) async fn change_refcount_width(
        self: &Arc<Self>,
        request: &Request,
        order: u32,
        progress: &Progress,
    ) -> Result<()> {
        self.settle(request).await?;
        {
            let file = request.file()?;
            let _turn = self.hold_batches().await;
            let mut meta = self.lock_meta(file).await?;
            self.writeback.failure.check()?;
            self.metadata.check_sound()?;
            let mut header = meta.header.clone();
            header.refcount_order = order;
            let new = header.geometry();
            progress.add_total(2 * meta.refcounts.table_covers());
            check_width(&mut meta, file, new, progress).await?;
            let space = find_space(&mut meta, file, new, progress).await?;
            write_blocks(&mut meta, file, new, &space, progress).await?;
            self.switch_refcounts(&mut meta, request, space, order)
                .await?;
        }
        self.write_back(request).await
    }

    /// Has the header point to the new structures, and gives the old ones back.
    async fn switch_refcounts(
        self: &Arc<Self>,
        meta: &mut Meta,
        request: &Request,
        space: Space,
        order: u32,
    ) -> Result<()> {
        let file = request.file()?;
        let place = meta.refcounts.place();
        let first = meta.geometry.host_cluster_of(place.offset).0;
        let mut old: Vec<HostCluster> = (first..first + u64::from(place.clusters))
            .map(HostCluster)
            .collect();
        for index in 0..meta.refcounts.blocks_end() {
            if let Some(host) = meta.refcounts.block_offset(index) {
                old.push(meta.geometry.host_cluster_of(host));
            }
        }
        // What the header lacks of the old ones (it may have grown a table on the way) doesn't matter any more.
        let mut header = meta.header.clone();
        header.refcount_order = order;
        header.refcount_table_offset = meta.geometry.host_start(space.table.first());
        header.refcount_table_clusters =
            u32::try_from(space.table.count()).map_err(|_| too_large())?;
        let failure = self.writeback.failure.clone();
        failure.flush(file).await?;
        // From here on the header may point to them, whatever happens.
        for allocation in std::iter::once(space.table).chain(space.others) {
            for cluster in allocation.clusters() {
                meta.unlinked.remove(&cluster.0);
            }
            allocation.linked();
        }
        let bytes = switched_fields(&header)?;
        let written = file
            .write(field::REFCOUNT_TABLE, bytes, RequestFlags::empty())
            .await;
        failure.note(written)?;
        failure.flush(file).await?;
        failure.note(self.reload(meta, request).await)?;
        for cluster in old {
            if let Err(error) = meta.drop_reference(file, cluster).await {
                tracing::warn!("qcow2: a cluster of the old refcount structures leaks: {error}");
            }
        }
        Ok(())
    }
}

/// The bytes from the refcount table's pointer to the width of refcounts, all of which are in the first sector. What stands behind them in
/// the cluster stays as it is, however full that is.
fn switched_fields(header: &Header) -> Result<Vec<u8>> {
    let bare = Header {
        backing_file: None,
        extensions: Extensions::default(),
        unknown_tail: Vec::new(),
        ..header.clone()
    };
    let bytes = bare.encode()?;
    Ok(bytes[field::REFCOUNT_TABLE as usize..field::REFCOUNT_ORDER as usize + 4].to_vec())
}

fn too_large() -> Error {
    Error::new(ErrorKind::NoSpace, "Reference count table too large")
}

/// Refuses a width that some refcount doesn't fit in.
async fn check_width(
    meta: &mut Meta,
    file: &Child,
    new: Geometry,
    progress: &Progress,
) -> Result<()> {
    let max = new.refcount_max();
    let mut found = None;
    visit(meta, file, progress, |cluster, count| {
        if count > max && found.is_none() {
            found = Some((cluster, count));
        }
    })
    .await?;
    match found {
        None => Ok(()),
        Some((cluster, count)) => Err(Error::invalid(format!(
            "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of \
             {count}",
            new.refcount_bits(),
            cluster << new.cluster_bits()
        ))
        .with_field("refcount_bits", new.refcount_bits(), "wide enough for all refcounts")),
    }
}

/// Calls `look` with every cluster that is in use and its refcount.
async fn visit(
    meta: &mut Meta,
    file: &Child,
    progress: &Progress,
    mut look: impl FnMut(u64, u64),
) -> Result<()> {
    let end = meta.refcounts.table_covers();
    let mut at = 0;
    while at < end {
        check_cancelled(progress)?;
        let stop = (at + STEP).min(end);
        meta.refcounts
            .for_each_used(file, at, stop, &mut look)
            .await?;
        at = stop;
    }
    progress.advance(end);
    Ok(())
}

/// Allocates the new blocks and the new table, in clusters that they count, too.
async fn find_space(
    meta: &mut Meta,
    file: &Child,
    new: Geometry,
    progress: &Progress,
) -> Result<Space> {
    let mut others: Vec<Allocation> = Vec::new();
    let mut table: Option<Allocation> = None;
    // Each allocation may lie where there was no need for a block before.
    loop {
        // What an allocation tried on its way counts no more.
        meta.adopt_orphans(file).await?;
        let mut needed = BTreeSet::new();
        let mut last = u64::MAX;
        visit(meta, file, &Progress::new(), |cluster, _| {
            let index = new.refcount_table_index(HostCluster(cluster));
            if index != last {
                needed.insert(index);
                last = index;
            }
        })
        .await?;
        check_cancelled(progress)?;
        let have: u64 = others.iter().map(Allocation::count).sum();
        let missing = (needed.len() as u64).saturating_sub(have);
        if missing > 0 {
            others.push(meta.allocate(file, missing).await?);
            continue;
        }
        let entries = needed.last().map_or(1, |last| last + 1);
        if entries * 8 > MAX_TABLE_BYTES {
            return Err(too_large());
        }
        let clusters = new.clusters_for(entries * 8);
        if let Some(table) = &table
            && table.count() >= clusters
        {
            break;
        }
        // The one that turned out too small goes back first.
        drop(table.take());
        meta.adopt_orphans(file).await?;
        // A cluster more: its own place may be what makes it grow.
        table = Some(meta.allocate_contiguous(file, clusters + 1).await?);
    }
    let table = table.ok_or_else(too_large)?;
    let mut indexes = BTreeSet::new();
    visit(meta, file, &Progress::new(), |cluster, _| {
        indexes.insert(new.refcount_table_index(HostCluster(cluster)));
    })
    .await?;
    let places = others.iter().flat_map(Allocation::clusters);
    let blocks: Vec<(u64, HostCluster)> = indexes.iter().copied().zip(places).collect();
    if blocks.len() != indexes.len() {
        return Err(Error::io("not all new refcount blocks have a place"));
    }
    Ok(Space {
        blocks,
        table,
        others,
    })
}

/// Writes the new blocks and the new table.
async fn write_blocks(
    meta: &mut Meta,
    file: &Child,
    new: Geometry,
    space: &Space,
    progress: &Progress,
) -> Result<()> {
    let codec = Refcounts::new(new.refcount_order());
    let per_block = new.refcounts_per_block();
    let table_bytes = (space.table.count() << new.cluster_bits()) as usize;
    let mut table = vec![0; table_bytes];
    for (index, place) in &space.blocks {
        check_cancelled(progress)?;
        let start = index * per_block;
        let mut bytes = vec![0; new.cluster_size() as usize];
        let mut result = Ok(());
        meta.refcounts
            .for_each_used(file, start, start + per_block, &mut |cluster, count| {
                let set = codec.set(&mut bytes, (cluster - start) as usize, count);
                if set.is_err() {
                    result = set;
                }
            })
            .await?;
        result?;
        let host = new.host_start(*place).0;
        file.write(host, bytes, RequestFlags::empty()).await?;
        let at = *index as usize * 8;
        table[at..at + 8].copy_from_slice(&host.to_be_bytes());
    }
    let host = new.host_start(space.table.first()).0;
    file.write(host, table, RequestFlags::empty()).await?;
    progress.advance(meta.refcounts.table_covers());
    Ok(())
}
