//! Writing bitmaps: all of them anew when the image is closed, becomes read-only, or somebody asks; and a directory with one
//! less when one is removed. The order is data, tables, directory and refcounts, then the header, then the frees.

use std::sync::Arc;

use block_core::{
    bitmap::{MAX_NAME, NamedBitmap},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    request::{Child, Request},
};

use super::{
    layout::{self, BitmapFlags, DirectoryEntry, TableEntry},
    load, publish,
};
use crate::{
    alloc::{allocator::Allocation, quarantine::Freed},
    cache::slice::NumberSet,
    image::Qcow2,
    layout::{Header, HostOffset, extensions},
    meta::Meta,
    overlap::Kinds,
};

/// The largest write of a bitmap's data.
const MAX_WRITE: u64 = 1 << 20;

/// A directory that has been written but isn't pointed to yet.
#[derive(Default)]
struct Written {
    entries: Vec<DirectoryEntry>,
    /// Everything that was allocated for it, and what it holds.
    taken: Vec<(Kinds, Allocation)>,
}

impl Qcow2 {
    /// Whether one more bitmap can be stored.
    pub(crate) fn check_new_bitmap(
        &self,
        request: &Request,
        name: &str,
        granularity: u64,
    ) -> Result<()> {
        self.check_writable()?;
        if !self.geometry.has_zero_flag() {
            return Err(Error::unsupported(
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ));
        }
        if name.len() > MAX_NAME {
            return Err(Error::invalid(format!(
                "Name length exceeds maximum ({MAX_NAME} characters)"
            )));
        }
        let bits = granularity.trailing_zeros() as u8;
        let clusters = layout::table_entries_for(self.geometry, self.length(), bits);
        if clusters == 0 {
            return Err(Error::invalid("An empty disk has nothing to record"));
        }
        if clusters > layout::MAX_DATA / self.geometry.cluster_size() {
            return Err(Error::invalid(
                "Too much space will be occupied by the bitmap. Use larger granularity",
            ));
        }
        let persistent = persistent(request);
        if persistent.len() as u64 >= u64::from(extensions::MAX_BITMAPS) {
            return Err(Error::new(
                ErrorKind::TooBig,
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        let directory = persistent
            .iter()
            .map(|bitmap| layout::entry_len(bitmap.name().len()))
            .sum::<u64>()
            + self.bitmaps.extra_len()
            + layout::entry_len(name.len());
        if directory > extensions::MAX_BITMAP_DIRECTORY {
            return Err(Error::new(
                ErrorKind::TooBig,
                "Not enough space in the bitmap directory",
            ));
        }
        Ok(())
    }

    /// Whether the disk may get another length: all bitmaps must be loaded and consistent, and still fit into the image.
    /// Their bits follow when the request has ended; on disk they are in use.
    ///
    /// # Errors
    /// Those of [`NamedBitmap::check`], EINVAL for a length with which a bitmap can't be stored.
    pub(crate) fn check_bitmaps_follow(&self, request: &Request, length: u64) -> Result<()> {
        if self.bitmaps.is_pending() {
            return Err(Error::invalid(
                "Cannot resize an image whose bitmaps aren't loaded",
            ));
        }
        request.node().check_bitmaps_resizable()?;
        for bitmap in persistent(request) {
            let bits = bitmap.bits().granularity().trailing_zeros() as u8;
            let clusters = layout::table_entries_for(self.geometry, length, bits);
            let most = layout::MAX_DATA / self.geometry.cluster_size();
            if !(1..=most).contains(&clusters) {
                return Err(Error::invalid(format!(
                    "Bitmap '{}' can't follow the new size",
                    bitmap.name()
                ))
                .with_field("bitmap_table_size", clusters, format!("1..={most}")));
            }
        }
        Ok(())
    }

    /// Stores the node's persistent bitmaps. With `in_use` they stay marked so.
    pub(crate) async fn write_bitmaps(
        self: &Arc<Self>,
        request: &Request,
        in_use: bool,
    ) -> Result<()> {
        if !self.bitmaps.is_loaded() || persistent(request).is_empty() {
            return Ok(());
        }
        self.check_writable()?;
        self.reclaiming(request, || self.write_all_bitmaps(request, in_use))
            .await
    }

    async fn write_all_bitmaps(self: &Arc<Self>, request: &Request, in_use: bool) -> Result<()> {
        let file = request.file()?;
        let _turn = self.hold_batches().await;
        let mut meta = self.lock_meta(file).await?;
        self.writeback.failure.check()?;
        let old = self.bitmaps.entries();
        let mut taken = Vec::new();
        let mut entries = Vec::new();
        let mut replaced = Vec::new();
        for bitmap in persistent(request) {
            let known = old
                .iter()
                .find(|entry| entry.display_name() == bitmap.name());
            if bitmap.is_inconsistent() {
                entries.extend(known.cloned());
                continue;
            }
            replaced.extend(known.cloned());
            let mut entry = self
                .write_bitmap(file, &mut meta, &bitmap, in_use, &mut taken)
                .await
                .map_err(|error| {
                    error.context(format!("Can't store bitmap '{}'", bitmap.name()))
                })?;
            if let Some(known) = known {
                // What isn't understood goes along.
                entry.name.clone_from(&known.name);
                entry.extra.clone_from(&known.extra);
                entry.flags |= known.flags & BitmapFlags::EXTRA_DATA_COMPATIBLE;
            }
            entries.push(entry);
        }
        self.switch_directory(request, &mut meta, Written { entries, taken }, &replaced)
            .await
    }

    /// Takes one bitmap out of the directory.
    pub(crate) async fn drop_stored_bitmap(
        self: &Arc<Self>,
        request: &Request,
        name: &str,
    ) -> Result<()> {
        self.check_writable()?;
        self.reclaiming(request, || async {
            let file = request.file()?;
            let _turn = self.hold_batches().await;
            let mut meta = self.lock_meta(file).await?;
            self.writeback.failure.check()?;
            let (removed, entries): (Vec<_>, Vec<_>) = self
                .bitmaps
                .entries()
                .into_iter()
                .partition(|entry| entry.display_name() == name);
            if removed.is_empty() {
                return Ok(());
            }
            let written = Written {
                entries,
                taken: Vec::new(),
            };
            self.switch_directory(request, &mut meta, written, &removed)
                .await
        })
        .await
    }

    /// Empties the directory: the image is going to be one without bitmaps. The node's own are no longer stored.
    pub(crate) async fn drop_all_bitmaps(self: &Arc<Self>, request: &Request) -> Result<()> {
        self.check_writable()?;
        self.reclaiming(request, || async {
            let file = request.file()?;
            let _turn = self.hold_batches().await;
            let mut meta = self.lock_meta(file).await?;
            self.writeback.failure.check()?;
            if meta.header.extensions.bitmaps.is_none() {
                return Ok(());
            }
            tracing::warn!(
                file = self.filename,
                "persistent bitmaps are dropped: images of version 2 can't have any"
            );
            let removed = self.bitmaps.entries();
            self.switch_directory(request, &mut meta, Written::default(), &removed)
                .await
        })
        .await
    }

    /// Writes one bitmap's data and table to new places.
    async fn write_bitmap(
        &self,
        file: &Child,
        meta: &mut Meta,
        bitmap: &NamedBitmap,
        in_use: bool,
        taken: &mut Vec<(Kinds, Allocation)>,
    ) -> Result<DirectoryEntry> {
        let bits = bitmap.bits();
        let cluster = self.geometry.cluster_size();
        let entries = self.geometry.clusters_for(bits.stored_len());
        let table_entries = u32::try_from(entries)
            .ok()
            .filter(|entries| (1..=layout::MAX_DATA / cluster).contains(&u64::from(*entries)))
            .ok_or_else(|| {
                Error::invalid(
                    "Too much space will be occupied by the bitmap. Use larger granularity",
                )
                .with_field(
                    "bitmap_table_size",
                    entries,
                    format!("1..={}", layout::MAX_DATA / cluster),
                )
            })?;
        // Which clusters of bits have any.
        let mut used = Vec::new();
        let mut from = 0;
        while let Some(byte) = bits.next_stored(from) {
            used.push(byte / cluster);
            from = (byte / cluster + 1) * cluster;
        }
        let mut table = vec![TableEntry::Clear; table_entries as usize];
        let mut left = used.as_slice();
        while !left.is_empty() {
            let allocation = meta.allocate(file, left.len() as u64).await?;
            for (first, count) in allocation.runs() {
                let (now, later) = left.split_at((*count as usize).min(left.len()));
                let start = self.geometry.host_start(*first);
                self.write_data(file, bitmap, now, start).await?;
                for (n, index) in now.iter().enumerate() {
                    table[*index as usize] =
                        TableEntry::Data(HostOffset(start.0 + n as u64 * cluster));
                }
                left = later;
            }
            taken.push((Kinds::BITMAP_DATA, allocation));
        }
        let bytes: Vec<u8> = table
            .iter()
            .flat_map(|entry| entry.encode().to_be_bytes())
            .collect();
        let mut flags = BitmapFlags::empty();
        flags.set(BitmapFlags::IN_USE, in_use);
        flags.set(BitmapFlags::AUTO, bits.is_enabled());
        Ok(DirectoryEntry {
            table: self
                .write_new(file, meta, bytes, Kinds::BITMAP_TABLE, taken)
                .await?,
            table_entries,
            flags,
            granularity_bits: bits.granularity().trailing_zeros() as u8,
            name: bitmap.name().as_bytes().to_vec(),
            extra: Vec::new(),
        })
    }

    /// Writes the clusters of bits with these numbers side by side from `start` on.
    async fn write_data(
        &self,
        file: &Child,
        bitmap: &NamedBitmap,
        numbers: &[u64],
        start: HostOffset,
    ) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let at_once = (MAX_WRITE / cluster).max(1);
        let mut at = start.0;
        for some in numbers.chunks(at_once as usize) {
            let mut bytes = vec![0; some.len() * cluster as usize];
            for (number, part) in some.iter().zip(bytes.chunks_mut(cluster as usize)) {
                bitmap.bits().store_bytes(number * cluster, part);
            }
            let len = bytes.len() as u64;
            file.write(at, bytes, RequestFlags::empty()).await?;
            at += len;
        }
        Ok(())
    }

    /// Writes a table to new clusters in one piece.
    async fn write_new(
        &self,
        file: &Child,
        meta: &mut Meta,
        mut bytes: Vec<u8>,
        kind: Kinds,
        taken: &mut Vec<(Kinds, Allocation)>,
    ) -> Result<HostOffset> {
        let clusters = self.geometry.clusters_for(bytes.len() as u64);
        let allocation = meta.allocate_contiguous(file, clusters).await?;
        let place = self.geometry.host_start(allocation.first());
        bytes.resize((clusters * self.geometry.cluster_size()) as usize, 0);
        file.write(place.0, bytes, RequestFlags::empty()).await?;
        taken.push((kind, allocation));
        Ok(place)
    }

    /// Writes the directory, switches to it, and gives back the old one and what only `replaced` had. With the write-back's
    /// turn and the metadata lock held.
    async fn switch_directory(
        &self,
        request: &Request,
        meta: &mut Meta,
        mut written: Written,
        replaced: &[DirectoryEntry],
    ) -> Result<()> {
        let file = request.file()?;
        let mut freed = self.clusters_of(file, replaced).await;
        let old = self.directory_clusters(&meta.header);
        let bytes = layout::encode_directory(&written.entries);
        let pointer = if written.entries.is_empty() {
            None
        } else {
            let directory_size = bytes.len() as u64;
            let count = written.entries.len() as u32;
            let place = self
                .write_new(
                    file,
                    meta,
                    bytes,
                    Kinds::BITMAP_DIRECTORY,
                    &mut written.taken,
                )
                .await?;
            Some(extensions::BitmapsPointer {
                count,
                directory_size,
                directory_offset: place.0,
            })
        };
        // ENOSPC in the header is to be found before anything can't be undone.
        let mut trial = meta.header.clone();
        trial.extensions.bitmaps = pointer;
        trial.encode()?;
        self.write_refcounts(meta, request).await?;
        // From here on the header may point to the new directory: its clusters aren't given out again whatever happens.
        for (kind, allocation) in written.taken {
            for cluster in allocation.clusters() {
                meta.unlinked.remove(&cluster.0);
                self.metadata.add(kind, [cluster.0]);
            }
            allocation.linked();
        }
        publish::publish(file, &self.writeback.failure, &mut meta.header, pointer).await?;
        self.bitmaps.replace(written.entries);
        freed.extend(old.into_iter().flatten());
        self.metadata.remove(Kinds::BITMAPS, freed.iter().copied());
        self.free_bitmap_clusters(file, meta, freed).await;
        Ok(())
    }

    /// The clusters that bitmaps take, without their directory. What can't be read leaks.
    async fn clusters_of(&self, file: &Child, entries: &[DirectoryEntry]) -> Vec<u64> {
        let mut seen = NumberSet::default();
        for entry in entries {
            let mut own = NumberSet::default();
            match load::read_table(file, entry, self.geometry, &mut own).await {
                Ok(_) => seen.extend(own),
                Err(error) => tracing::warn!(
                    file = self.filename,
                    "the space of bitmap '{}' leaks: {error}",
                    entry.display_name()
                ),
            }
        }
        let mut clusters: Vec<u64> = seen.into_iter().collect();
        clusters.sort_unstable();
        clusters
    }

    /// Drops references whose unlink is durable. The image has its new bitmaps: what goes wrong here leaks.
    async fn free_bitmap_clusters(&self, file: &Child, meta: &mut Meta, clusters: Vec<u64>) {
        let mut freed = Freed::default();
        for cluster in clusters {
            let done = if self.metadata.overlaps([cluster]) {
                Err(Error::corrupt("it holds other metadata"))
            } else {
                let punch = self.settings.pass_discard_other();
                meta.unreference(file, cluster, cluster, punch, &mut freed)
                    .await
            };
            if let Err(error) = done {
                tracing::warn!(
                    file = self.filename,
                    "host cluster {cluster:#x} of an old bitmap is not freed: {error}"
                );
            }
        }
        meta.quarantine.close(freed, 0, &self.pins);
        self.note_sizes(meta);
    }

    /// The image becomes read-only or is closed: everything is stored and can be trusted from here on.
    pub(crate) async fn store_for_good(self: &Arc<Self>, request: &Request) -> Result<()> {
        self.write_bitmaps(request, false).await?;
        self.settle(request).await
    }

    /// The image stays writable although its bitmaps have been stored for good.
    pub(crate) async fn take_back_bitmaps(&self, request: &Request) -> Result<()> {
        let file = request.file()?;
        let mut meta = self.lock_meta(file).await?;
        self.take_over_bitmaps(file, &mut meta).await
    }

    /// The image was read anew: so is what is known of its directory.
    pub(crate) async fn reload_directory(&self, file: &Child, header: &Header) {
        let entries = match load::read_directory(file, header).await {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(
                    file = self.filename,
                    "the bitmap directory can't be read: {error}"
                );
                Vec::new()
            }
        };
        if !self.is_read_only() {
            self.protect_bitmaps(file, header, &entries).await;
        }
        self.bitmaps.replace(entries);
    }
}

/// Tells the node's bitmaps what has become of the image.
pub(crate) fn mark_read_only(request: &Request, read_only: bool) {
    for bitmap in persistent(request) {
        bitmap.set_read_only(read_only);
    }
}

/// The bitmaps that the image is to store.
fn persistent(request: &Request) -> Vec<Arc<NamedBitmap>> {
    let mut named = request.node().named();
    named.retain(|bitmap| bitmap.is_persistent());
    named
}
