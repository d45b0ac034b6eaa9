//! Getting rid of zero clusters, which version 2 hasn't, in the disk and in every snapshot at once: where nothing would show they
//! become unallocated, where a backing file would show they become data.
//!
//! As with snapshots, nothing is changed in place (see `change`): L2 tables with zero clusters are copied, L1 tables that point to
//! them as well, and one write of the header switches to all of it. A table that several L1 tables share stays shared.

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    error::Result,
    image::Progress,
    request::{Child, Request},
};
use futures::StreamExt;

use super::{
    change::{Change, Draft},
    reach,
    tree::{self, TableUse},
};
use crate::{
    cache::slice::NumberMap,
    image::Qcow2,
    layout::{Geometry, HostCluster, HostOffset, L1Entry, L2Entry, RawEntry, entry::COPIED},
};

/// Bytes of zeroes that are written at once.
const PIECE: u64 = 1 << 20;

/// How zero clusters are replaced.
pub(super) struct Expansion<'a> {
    pub request: &'a Request,
    /// What is unallocated may read as something else than zeroes.
    pub backing: bool,
    /// What has become of the tables that were seen: where each is now.
    fates: NumberMap<HostOffset>,
}

/// The zero clusters of a table: the number of each entry, and its reservation if it has one.
fn zeroes(bytes: &[u8], geometry: Geometry) -> Vec<(usize, Option<HostOffset>)> {
    RawEntry::parse(bytes, geometry)
        .enumerate()
        .filter_map(|(index, raw)| match L2Entry::decode(raw, geometry).ok()? {
            L2Entry::ZeroPlain => Some((index, None)),
            L2Entry::ZeroAllocated { host, .. } => Some((index, Some(host))),
            _ => None,
        })
        .collect()
}

impl<'a> Expansion<'a> {
    pub fn new(request: &'a Request, backing: bool) -> Self {
        Self {
            request,
            backing,
            fates: NumberMap::default(),
        }
    }
}

impl Draft<'_> {
    /// Replaces all zero clusters. Says whether there were any.
    pub(super) async fn expand(&mut self, how: &mut Expansion<'_>) -> Result<bool> {
        let mut l1 = std::mem::take(&mut self.l1);
        let mut found = self.expand_tree(&mut l1, how).await?;
        if found && let Some(offset) = self.l1_offset.take() {
            self.drop_clusters(offset, l1.len() as u64 * 8).await?;
        }
        self.l1 = l1;
        for index in 0..self.snapshots.len() {
            let entry = self.snapshots[index].clone();
            let mut l1 = self.read_l1(&entry).await?;
            if !self.expand_tree(&mut l1, how).await? {
                continue;
            }
            found = true;
            self.drop_clusters(entry.l1_table_offset, entry.l1_bytes())
                .await?;
            let bytes = l1.iter().flat_map(|raw| raw.to_be_bytes()).collect();
            self.snapshots[index].l1_table_offset = self.write_table(bytes).await?;
        }
        if found {
            self.flag_active().await?;
        }
        Ok(found)
    }

    /// Has the entries of an L1 table point to tables without zero clusters. Says whether any changed.
    async fn expand_tree(&mut self, l1: &mut [u64], how: &mut Expansion<'_>) -> Result<bool> {
        let geometry = self.image.geometry;
        let mut uses = tree::tables(l1, geometry)?;
        uses.retain(|table| how.fates.get(&table.offset.0) != Some(&table.offset));
        self.progress.add_total(uses.len() as u64);
        let mut firsts: NumberMap<u64> = NumberMap::default();
        for (index, raw) in l1.iter().enumerate() {
            if let Ok(L1Entry { l2: Some(host), .. }) = L1Entry::decode(*raw, geometry) {
                firsts.entry(host.0).or_insert(index as u64);
            }
        }
        let file = self.file;
        let mut moved = false;
        let mut reading = std::pin::pin!(tree::read(file, &uses, geometry));
        while let Some(read) = reading.next().await {
            self.check_cancelled()?;
            let (table, bytes) = read?;
            let found = zeroes(&bytes, geometry);
            let fate = if found.is_empty() {
                table.offset
            } else {
                moved = true;
                let first = firsts.get(&table.offset.0).copied().unwrap_or(0);
                self.expand_table(table, &bytes, &found, first, how).await?
            };
            how.fates.insert(table.offset.0, fate);
            self.progress.advance(1);
        }
        for raw in l1.iter_mut() {
            if let Ok(L1Entry { l2: Some(host), .. }) = L1Entry::decode(*raw, geometry)
                && let Some(fate) = how.fates.get(&host.0)
                && *fate != host
            {
                // Whether it is the only one is seen to when all is counted.
                let entry = L1Entry {
                    l2: Some(*fate),
                    copied: false,
                };
                *raw = entry.encode();
            }
        }
        Ok(moved)
    }

    /// Moves the references that an L1 table makes to a table and to its zero clusters over to the table's copy, which is made if
    /// there is none yet.
    async fn expand_table(
        &mut self,
        table: TableUse,
        bytes: &[u8],
        found: &[(usize, Option<HostOffset>)],
        l1_index: u64,
        how: &Expansion<'_>,
    ) -> Result<HostOffset> {
        let geometry = self.image.geometry;
        let size = geometry.l2_entry_size() as usize;
        let cluster = |host: HostOffset| geometry.host_cluster_of(host).0;
        let times = table.times;
        let copy = if let Some(copy) = how.fates.get(&table.offset.0).copied() {
            let len = geometry.cluster_size() as usize;
            let copied = self.file.read_padded(copy.0, len).await?;
            self.shadow.add(cluster(copy), 1, times).await?;
            for (index, _) in found {
                let entry = RawEntry::parse(&copied[index * size..][..size], geometry).next();
                let entry = entry.and_then(|raw| L2Entry::decode(raw, geometry).ok());
                if let Some(L2Entry::Normal { host, .. }) = entry {
                    self.shadow.add(cluster(host), 1, times).await?;
                }
            }
            copy
        } else {
            let mut bytes = bytes.to_vec();
            for (index, _) in found {
                bytes[index * size..][..size].fill(0);
            }
            if how.backing {
                let base = l1_index * geometry.l2_entries();
                self.write_zeroes(&mut bytes, found, base, times, how)
                    .await?;
            }
            let copy = self.shadow.allocate(1).await?;
            if times > 1 {
                self.shadow.add(copy, 1, times - 1).await?;
            }
            let host = geometry.host_start(HostCluster(copy));
            self.file
                .write(host.0, bytes, block_core::RequestFlags::empty())
                .await?;
            host
        };
        self.shadow.sub(cluster(table.offset), 1, times).await?;
        for (_, reservation) in found {
            if let Some(host) = reservation {
                self.shadow.sub(cluster(*host), 1, times).await?;
            }
        }
        Ok(copy)
    }

    /// Gives zero clusters data of their own. `base` is the guest cluster of the table's first entry.
    async fn write_zeroes(
        &mut self,
        bytes: &mut [u8],
        found: &[(usize, Option<HostOffset>)],
        base: u64,
        times: u64,
        how: &Expansion<'_>,
    ) -> Result<()> {
        let geometry = self.image.geometry;
        let bits = geometry.cluster_bits();
        let size = geometry.l2_entry_size() as usize;
        let at_once = (PIECE >> bits).max(1) as usize;
        for part in found.chunks(at_once) {
            self.check_cancelled()?;
            let first = self.shadow.allocate(part.len() as u64).await?;
            if times > 1 {
                self.shadow.add(first, part.len() as u64, times - 1).await?;
            }
            for (n, (index, _)) in part.iter().enumerate() {
                let host = geometry.host_start(HostCluster(first + n as u64));
                let raw = host.0 | if times == 1 { COPIED } else { 0 };
                bytes[index * size..][..8].copy_from_slice(&raw.to_be_bytes());
                if self.image.encryption.is_none() {
                    continue;
                }
                // What is zeroes to the guest depends on the place.
                let guest = (base + *index as u64) << bits;
                let zeroes = IoBuf::zeroes(geometry.cluster_size() as usize);
                self.image
                    .write_sealed(how.request, guest, host, zeroes)
                    .await?;
            }
            if self.image.encryption.is_none() {
                let host = geometry.host_start(HostCluster(first));
                let zeroes = IoBuf::zeroes(part.len() << bits);
                self.file
                    .write(host.0, zeroes, block_core::RequestFlags::empty())
                    .await?;
            }
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Replaces the zero clusters of the disk and of all snapshots: by nothing, or by data of zeroes if there is a backing file.
    /// The guest reads the same before and after.
    ///
    /// # Errors
    /// ENOSPC, ECANCELED, whatever the storage reports; nothing was changed then.
    pub(crate) async fn expand_zero_clusters(
        self: &Arc<Self>,
        request: &Request,
        progress: &Progress,
    ) -> Result<()> {
        let backing = self.has_backing(request);
        let change = Change::Expand { request, backing };
        self.change_snapshots(request, &change, progress)
            .await
            .map(drop)
    }

    /// Whether the disk or a snapshot has compressed clusters. After [`Self::settle`].
    ///
    /// # Errors
    /// `Corrupt` for tables that can't be followed; whatever the storage reports.
    pub(crate) async fn has_compressed_clusters(&self, file: &Child) -> Result<bool> {
        let geometry = self.geometry;
        let (header, snapshots) = {
            let meta = self.lock_meta(file).await?;
            (meta.header.clone(), meta.snapshots.clone())
        };
        let mut seen = crate::cache::slice::NumberSet::default();
        for tree in reach::trees(&header, &snapshots) {
            let (offset, len) = tree?;
            let l1 = Self::read_l1_at(file, offset, len).await?;
            let l1: Vec<u64> = (0..l1.entries.len() as u64).map(|at| l1.load(at)).collect();
            let mut uses = tree::tables(&l1, geometry)?;
            uses.retain(|table| seen.insert(table.offset.0));
            let mut reading = std::pin::pin!(tree::read(file, &uses, geometry));
            while let Some(read) = reading.next().await {
                let (_, bytes) = read?;
                let mut entries = RawEntry::parse(&bytes, geometry);
                if entries.any(|raw| raw.descriptor & crate::layout::entry::COMPRESSED != 0) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
