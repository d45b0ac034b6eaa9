//! Reading bitmaps when an image is opened, and marking them as in use when it is writable (digest, sections 8.4 and 8.5).

use block_core::{
    bitmap::{DirtyBitmap, NamedBitmap},
    error::{Error, Result},
    flags::RequestFlags,
    request::{Child, Request},
};

use super::{
    layout::{self, BitmapFlags, DirectoryEntry, TableEntry},
    publish,
};
use crate::{
    cache::slice::NumberSet,
    image::Qcow2,
    layout::{Autoclear, Header, HostOffset},
    meta::Meta,
    overlap::{Kinds, range},
};

/// The largest read of a bitmap's data.
const MAX_READ: u64 = 1 << 20;

/// What is said of an image whose autoclear bit is gone.
const STALE: &str = "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent";
/// The same for version 2, which has no such bit.
const STALE_V2: &str = "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without \
                        persistent bitmap support; so now they must all be considered inconsistent";
const STALE_SPACE: &str =
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix.";

impl Qcow2 {
    /// Loads what is stored; in a writable image everything is marked as in use, durably.
    pub(crate) async fn open_bitmaps(&self, request: &Request) -> Result<Vec<NamedBitmap>> {
        let file = request.file()?;
        let mut meta = self.lock_meta(file).await?;
        self.writeback.failure.check()?;
        let writable = !self.is_read_only();
        self.drop_stale(file, &mut meta, writable).await?;
        let entries = read_directory(file, &meta.header).await?;
        if writable {
            check_recordable(&entries)?;
        }
        let mut seen = NumberSet::default();
        let mut loaded = Vec::with_capacity(entries.len());
        for entry in &entries {
            loaded.push(self.load(file, entry, &mut seen).await?);
        }
        let entries = if writable {
            self.claim_directory(&meta.header)?;
            self.protect_bitmaps(file, &meta.header, &entries).await;
            self.take_over(file, &mut meta, entries).await?
        } else {
            for bitmap in &loaded {
                bitmap.set_read_only(true);
            }
            entries
        };
        self.bitmaps.set(entries);
        Ok(loaded)
    }

    /// The image has become writable: nobody else is to trust what is stored from here on. With the image's header read anew.
    pub(crate) async fn take_over_bitmaps(&self, file: &Child, meta: &mut Meta) -> Result<()> {
        if !self.bitmaps.is_loaded() {
            return Ok(());
        }
        self.drop_stale(file, meta, true).await?;
        let entries = read_directory(file, &meta.header).await?;
        check_recordable(&entries)?;
        if self.is_read_only() {
            self.metadata.forget_bitmaps();
            self.claim_directory(&meta.header)?;
            self.protect_bitmaps(file, &meta.header, &entries).await;
        }
        let entries = self.take_over(file, meta, entries).await?;
        self.bitmaps.set(entries);
        Ok(())
    }

    /// Bitmaps that another program made stale are none; the first writer drops the extension.
    async fn drop_stale(&self, file: &Child, meta: &mut Meta, writable: bool) -> Result<()> {
        let header = &mut meta.header;
        if header.extensions.bitmaps.is_none() || header.autoclear.contains(Autoclear::BITMAPS) {
            return Ok(());
        }
        let why = if header.version < 3 { STALE_V2 } else { STALE };
        tracing::warn!(file = self.filename, "{why}. {STALE_SPACE}");
        if !writable {
            return Ok(());
        }
        publish::publish(file, &self.writeback.failure, header, None).await
    }

    /// Sets in_use in the directory, in place: while that is being written, the autoclear bit is clear.
    async fn take_over(
        &self,
        file: &Child,
        meta: &mut Meta,
        mut entries: Vec<DirectoryEntry>,
    ) -> Result<Vec<DirectoryEntry>> {
        let Some(pointer) = meta.header.extensions.bitmaps else {
            return Ok(entries);
        };
        let to_mark = |entry: &DirectoryEntry| entry.is_consistent() && entry.is_ours();
        if !entries.iter().any(to_mark) {
            return Ok(entries);
        }
        let failure = &self.writeback.failure;
        for entry in entries.iter_mut().filter(|entry| to_mark(entry)) {
            entry.flags |= BitmapFlags::IN_USE;
        }
        publish::write_bit(file, failure, &mut meta.header, false).await?;
        let bytes = layout::encode_directory(&entries);
        let written = file
            .write(pointer.directory_offset, bytes, RequestFlags::empty())
            .await;
        failure.note(written)?;
        failure.flush(file).await?;
        publish::write_bit(file, failure, &mut meta.header, true).await?;
        Ok(entries)
    }

    async fn load(
        &self,
        file: &Child,
        entry: &DirectoryEntry,
        seen: &mut NumberSet,
    ) -> Result<NamedBitmap> {
        let name = entry.display_name();
        let (least, most) = layout::GRANULARITY.into_inner();
        let granularity_bits = entry.granularity_bits.clamp(least, most);
        let bits = DirtyBitmap::new(self.length(), 1 << granularity_bits)?;
        if !entry.is_consistent() || !entry.is_ours() {
            // It can be listed and removed.
            return Ok(NamedBitmap::new(name, bits).persistent().inconsistent());
        }
        let table = read_table(file, entry, self.geometry, seen).await?;
        self.load_data(file, &table, &bits)
            .await
            .map_err(|error| error.context(format!("Could not read bitmap '{name}' from image")))?;
        bits.set_enabled(entry.flags.contains(BitmapFlags::AUTO));
        Ok(NamedBitmap::new(name, bits).persistent())
    }

    async fn load_data(
        &self,
        file: &Child,
        table: &[TableEntry],
        bits: &DirtyBitmap,
    ) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let most = (MAX_READ / cluster).max(1) as usize;
        let mut at = 0;
        while at < table.len() {
            let from = at as u64 * cluster;
            match table[at] {
                TableEntry::Clear => at += 1,
                TableEntry::Set => {
                    let reach = cluster.saturating_mul(8).saturating_mul(bits.granularity());
                    bits.set((at as u64).saturating_mul(reach), reach);
                    at += 1;
                }
                TableEntry::Data(first) => {
                    // Neighbours in the file are read at once.
                    let run = table[at..]
                        .iter()
                        .take(most)
                        .enumerate()
                        .take_while(|(n, entry)| {
                            let next = HostOffset(first.0 + *n as u64 * cluster);
                            **entry == TableEntry::Data(next)
                        })
                        .count();
                    let bytes = file.read_padded(first.0, run * cluster as usize).await?;
                    bits.load_bytes(from, &bytes);
                    at += run;
                }
            }
        }
        Ok(())
    }

    /// Before the first write to the directory: it must not lie where other metadata is.
    ///
    /// # Errors
    /// `Corrupt`.
    fn claim_directory(&self, header: &Header) -> Result<()> {
        if let Some(range) = self.directory_clusters(header) {
            let count = range.end - range.start;
            self.metadata.check(range.start, count, self.geometry)?;
        }
        Ok(())
    }

    /// No data and no table is to be written over the directory and what it leads to. What can't be read isn't known.
    pub(super) async fn protect_bitmaps(
        &self,
        file: &Child,
        header: &Header,
        entries: &[DirectoryEntry],
    ) {
        if let Some(range) = self.directory_clusters(header) {
            self.metadata.add(Kinds::BITMAP_DIRECTORY, range);
        }
        let mut seen = NumberSet::default();
        for entry in entries {
            let table = range(self.geometry, entry.table.0, entry.table_bytes());
            self.metadata.add(Kinds::BITMAP_TABLE, table);
            let Ok(table) = read_table(file, entry, self.geometry, &mut seen).await else {
                continue;
            };
            let data = table.iter().filter_map(|entry| match entry {
                TableEntry::Data(offset) => Some(self.geometry.host_cluster_of(*offset).0),
                TableEntry::Clear | TableEntry::Set => None,
            });
            self.metadata.add(Kinds::BITMAP_DATA, data);
        }
    }

    /// The clusters of the directory, if there is one that counts.
    pub(super) fn directory_clusters(&self, header: &Header) -> Option<std::ops::Range<u64>> {
        let pointer = header.extensions.bitmaps?;
        if !header.autoclear.contains(Autoclear::BITMAPS) {
            return None;
        }
        let first = pointer.directory_offset >> self.geometry.cluster_bits();
        Some(first..first + self.geometry.clusters_for(pointer.directory_size))
    }
}

/// Nobody may write to a disk of which writes are to be recorded in a bitmap that can't be kept up to date here.
fn check_recordable(entries: &[DirectoryEntry]) -> Result<()> {
    let records = |entry: &&DirectoryEntry| {
        entry.is_consistent() && entry.flags.contains(BitmapFlags::AUTO) && !entry.is_ours()
    };
    let Some(entry) = entries.iter().find(records) else {
        return Ok(());
    };
    let error = Error::unsupported(format!(
        "Bitmap '{}' can't be kept up to date: the image can only be opened read-only",
        entry.display_name()
    ));
    let error = if entry.extra.is_empty() {
        let (least, most) = layout::GRANULARITY.into_inner();
        let allowed = format!("granularity_bits of {least}..={most}, a name of 1 to 1023 bytes");
        error.with_field("granularity_bits", entry.granularity_bits, allowed)
    } else {
        let allowed = "0, or the flag extra_data_compatible";
        error.with_field("extra_data_size", entry.extra.len(), allowed)
    };
    Err(error)
}

/// Reads the directory that the header points to; none when the autoclear bit says that it isn't to be trusted.
pub(crate) async fn read_directory(file: &Child, header: &Header) -> Result<Vec<DirectoryEntry>> {
    let Some(pointer) = header.extensions.bitmaps else {
        return Ok(Vec::new());
    };
    if !header.autoclear.contains(Autoclear::BITMAPS) {
        return Ok(Vec::new());
    }
    // The file's last sector may be cut short. What is beyond it is not worth 64 MiB of memory.
    let inside = pointer
        .directory_offset
        .checked_add(pointer.directory_size)
        .is_some_and(|end| end <= file.length().next_multiple_of(512));
    if !inside {
        return Err(
            Error::invalid("The bitmap directory is beyond the end of the file").with_field(
                "bitmap_directory_offset",
                format!("{:#x}", pointer.directory_offset),
                format!("a place for {} bytes in the file", pointer.directory_size),
            ),
        );
    }
    let bytes = file
        .read_padded(pointer.directory_offset, pointer.directory_size as usize)
        .await?;
    layout::decode_directory(&bytes, pointer.count, header.geometry(), header.disk_size())
}

/// Reads and checks a bitmap's table. `seen` are the clusters that other bitmaps take: no cluster may be in two places, so
/// that a small file can't fill the memory.
pub(super) async fn read_table(
    file: &Child,
    entry: &DirectoryEntry,
    geometry: crate::layout::Geometry,
    seen: &mut NumberSet,
) -> Result<Vec<TableEntry>> {
    let failed = |error: Error| {
        error.context(format!(
            "Could not read bitmap_table table from image for bitmap '{}'",
            entry.display_name()
        ))
    };
    let beyond = |field: &str, offset: HostOffset| {
        failed(Error::invalid("Invalid argument").with_field(
            field,
            offset,
            "a place in the file that no other bitmap has",
        ))
    };
    let end = file.length().next_multiple_of(512);
    let table_end = entry.table.0.checked_add(entry.table_bytes());
    let mut take = |offset: HostOffset, len: u64| {
        let first = offset.0 >> geometry.cluster_bits();
        (first..first + geometry.clusters_for(len)).all(|cluster| seen.insert(cluster))
    };
    if table_end.is_none_or(|at| at > end) || !take(entry.table, entry.table_bytes()) {
        return Err(beyond("bitmap_table_offset", entry.table));
    }
    let bytes = file
        .read_padded(entry.table.0, entry.table_bytes() as usize)
        .await
        .map_err(failed)?;
    let mut table = Vec::with_capacity(entry.table_entries as usize);
    for raw in crate::layout::entry::be64s(&bytes) {
        let found = TableEntry::decode(raw, geometry).map_err(failed)?;
        if let TableEntry::Data(offset) = found
            && (offset.0 >= end || !take(offset, 1))
        {
            return Err(beyond("bitmap table entry", offset));
        }
        table.push(found);
    }
    Ok(table)
}
