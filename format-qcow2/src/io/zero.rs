//! Zero writes and discards: what each kind of entry becomes (digest, section 5), one slice at a time.
//!
//! The core sees to it that nothing else that overlaps is with the driver meanwhile; entries change under the metadata lock
//! all the same, and what they referred to goes to the quarantine.

use std::sync::Arc;

use block_core::{
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::Request,
};

use crate::{
    alloc::quarantine::{Freed, merge_clusters},
    image::Qcow2,
    layout::{ClusterIndex, HostOffset, L2Entry},
    meta::Meta,
};

/// What happens to whole clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// They read as zeroes; their space is kept.
    Zero,
    /// They read as zeroes, and take no space.
    Unmap,
    /// Their content isn't needed.
    Discard,
    /// The backing file shows again.
    Full,
}

/// What an entry becomes, `None` for no change. `zero_flag` tells version 3, `backing` whether anything may show through.
fn changed(entry: L2Entry, change: Change, zero_flag: bool, backing: bool) -> Option<L2Entry> {
    let reveals = mutant::is_active("qcow2-unmap-reveals-backing") && change == Change::Unmap;
    let gone = if zero_flag && change != Change::Full && !reveals {
        L2Entry::ZeroPlain
    } else {
        L2Entry::Unallocated
    };
    match (entry, change) {
        (L2Entry::Unallocated, Change::Zero | Change::Unmap) => Some(gone),
        (L2Entry::Unallocated, Change::Discard) => backing.then_some(gone),
        (L2Entry::ZeroPlain, Change::Full) => Some(gone),
        (L2Entry::ZeroPlain, _) => None,
        (L2Entry::ZeroAllocated { .. }, Change::Zero) => None,
        (L2Entry::Normal { host, copied }, Change::Zero) if zero_flag => {
            Some(L2Entry::ZeroAllocated { host, copied })
        }
        (L2Entry::Unallocated, Change::Full) => None,
        (_, _) => Some(gone),
    }
    .filter(|new| *new != entry)
}

/// The place of a cluster that nothing else refers to.
fn own_place(entry: L2Entry) -> Option<HostOffset> {
    match entry {
        L2Entry::Normal { host, copied: true } | L2Entry::ZeroAllocated { host, copied: true } => {
            Some(host)
        }
        _ => None,
    }
}

impl Qcow2 {
    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// ENOTSUP, with nothing changed, when zeroes have to be written as data.
    pub async fn zero_guest(
        self: &Arc<Self>,
        request: &Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.check_writable()?;
        if !self.geometry.has_zero_flag() && self.has_backing(request) {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let first = offset / size;
        let mut last = end / size;
        if offset % size != 0 {
            self.check_partial(request, ClusterIndex(first), offset, end)
                .await?;
        }
        if end % size != 0 {
            if end < self.length() && (offset % size == 0 || first != last) {
                self.check_partial(request, ClusterIndex(last), offset, end)
                    .await?;
            }
            last += 1;
        }
        let change = if flags.contains(RequestFlags::MAY_UNMAP)
            || mutant::is_active("qcow2-zero-always-unmaps")
        {
            Change::Unmap
        } else {
            Change::Zero
        };
        self.change_clusters(request, ClusterIndex(first), ClusterIndex(last), change)
            .await
    }

    /// A cluster that is zeroed in part: allowed when its rest reads as zeroes already and no space is in use for data.
    async fn check_partial(
        self: &Arc<Self>,
        request: &Request,
        cluster: ClusterIndex,
        offset: u64,
        end: u64,
    ) -> Result<()> {
        let start = self.geometry.cluster_start(cluster).0;
        let stop = (start + self.geometry.cluster_size()).min(self.length());
        let (run, _pin) = self.locate(request.file()?, start, stop - start).await?;
        let zero = match run {
            super::map::Run::Zero { .. } => true,
            super::map::Run::Unallocated { .. } => {
                mutant::is_active("qcow2-partial-zero-takes-whole-cluster")
                    || backing_is_zero(request, start, offset.max(start)).await?
                        && backing_is_zero(request, end.min(stop), stop).await?
            }
            _ => false,
        };
        if zero {
            Ok(())
        } else {
            Err(Error::from_kind(ErrorKind::NotSupported))
        }
    }

    /// Tells that a range isn't needed. Clusters that it covers in part stay as they are.
    pub async fn discard_guest(
        self: &Arc<Self>,
        request: &Request,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.check_writable()?;
        if !self.geometry.has_zero_flag() && self.has_backing(request) {
            // Old content of the backing file would show: better to keep what is there.
            return Ok(());
        }
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let first = if mutant::is_active("qcow2-discard-enlarged") {
            offset / size
        } else {
            offset.div_ceil(size)
        };
        let last = if end >= self.length() {
            end.div_ceil(size)
        } else {
            end / size
        };
        self.change_clusters(
            request,
            ClusterIndex(first),
            ClusterIndex(last),
            Change::Discard,
        )
        .await
    }

    /// Changes the clusters from `first` up to, but not including, `end`.
    pub async fn change_clusters(
        self: &Arc<Self>,
        request: &Request,
        first: ClusterIndex,
        end: ClusterIndex,
        change: Change,
    ) -> Result<()> {
        let file = request.file()?;
        let backing = self.has_backing(request);
        let zero_flag = self.geometry.has_zero_flag();
        let without_table = changed(L2Entry::Unallocated, change, zero_flag, backing);
        let mut at = first;
        while at < end {
            let offset = self.geometry.cluster_start(at).0;
            let index = self.slice_of(at);
            if without_table.is_none() && self.table_of(index)?.l2.is_none() {
                at = ClusterIndex(
                    at.0 + (self.left_in_table(offset) >> self.geometry.cluster_bits()),
                );
                continue;
            }
            let stop =
                (at.0 + (self.left_in_slice(offset) >> self.geometry.cluster_bits())).min(end.0);
            self.make_room(request).await?;
            // Read it before the lock is taken, as far as that is possible.
            self.slice(file, index).await?;
            // A table may have to be made or copied.
            let step = || async move {
                let mut meta = self.lock_meta(file).await?;
                self.check_writable()?;
                let changed = self
                    .change_slice(&mut meta, request, at, stop, change, backing)
                    .await;
                self.note_sizes(&meta);
                changed
            };
            let late = self.reclaiming(request, step).await?;
            self.punch(file, &late).await;
            at = ClusterIndex(stop);
        }
        self.make_room(request).await
    }

    /// Changes clusters of one slice. Gives back what is to be punched right away: what keeps its place, and (without
    /// safeguards) what doesn't.
    async fn change_slice(
        self: &Arc<Self>,
        meta: &mut Meta,
        request: &Request,
        first: ClusterIndex,
        end: u64,
        change: Change,
        backing: bool,
    ) -> Result<Vec<(u64, u64)>> {
        let file = request.file()?;
        let zero_flag = self.geometry.has_zero_flag();
        let index = self.slice_of(first);
        let punch = match change {
            Change::Zero | Change::Unmap | Change::Discard => self.settings.pass_discard_request(),
            Change::Full => self.settings.pass_discard_snapshot(),
        };
        let keep = zero_flag
            && self.settings.discard_no_unref()
            && matches!(change, Change::Unmap | Change::Discard);
        let mut emptied = Vec::new();
        self.mark_in_use(meta, file).await?;
        let slice = self.slice_for_update(meta, file, index).await?;
        let mut freed = Freed::default();
        let mut result = Ok(());
        for cluster in (first.0..end).map(ClusterIndex) {
            let at = self.slice_entry(cluster);
            let raw = slice.load(at);
            let changes = async {
                let entry = self.decode(raw, cluster)?;
                if keep && let Some(host) = own_place(entry) {
                    // Punched before the request ends, and so before the place is written to again.
                    if punch {
                        emptied.push(self.geometry.host_cluster_of(host).0);
                    }
                    let kept = L2Entry::ZeroAllocated { host, copied: true };
                    return Ok((kept != entry).then_some(kept));
                }
                let Some(new) = changed(entry, change, zero_flag, backing) else {
                    return Ok(None);
                };
                if !matches!(new, L2Entry::ZeroAllocated { .. })
                    && !mutant::is_active("qcow2-discard-leaks")
                {
                    self.unlink(meta, request, raw, cluster, punch, &mut freed)
                        .await?;
                }
                Ok(Some(new))
            };
            match changes.await {
                Ok(Some(new)) => meta.set_entry(index, &slice, at, new.encode(self.geometry)),
                Ok(None) => {}
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let mut late = merge_clusters(emptied);
        if self.settings.safeguards {
            let batch = meta.batch;
            meta.quarantine.close(freed, batch, &self.pins);
        } else {
            let freed = freed.runs().iter().filter(|run| run.punch);
            late.extend(freed.map(|run| (run.first, run.count)));
        }
        result.map(|()| late)
    }
}

/// Whether the backing chain reads as zeroes from `start` to `end`.
pub(crate) async fn backing_is_zero(request: &Request, start: u64, end: u64) -> Result<bool> {
    let Some(backing) = request.backing() else {
        return Ok(true);
    };
    let end = end.min(backing.length());
    let mut at = start;
    while at < end {
        let status = backing.block_status(at, end - at).await?;
        if !status.is_zero() {
            return Ok(false);
        }
        if status.len == 0 {
            break;
        }
        at += status.len;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{CompressedRun, HostOffset};

    const NORMAL: L2Entry = L2Entry::Normal {
        host: HostOffset(0x50000),
        copied: true,
    };
    const RESERVED: L2Entry = L2Entry::ZeroAllocated {
        host: HostOffset(0x50000),
        copied: true,
    };
    const PACKED: L2Entry = L2Entry::Compressed(CompressedRun {
        offset: HostOffset(0x50000),
        len: 512,
    });

    #[test]
    fn entries_change_as_the_table_of_the_digest_says() {
        use Change::{Discard, Unmap, Zero};
        use L2Entry::{Unallocated, ZeroPlain};
        let v3 = |entry, change, backing| changed(entry, change, true, backing).unwrap_or(entry);
        let rows = [
            (Unallocated, ZeroPlain, ZeroPlain, Unallocated),
            (NORMAL, RESERVED, ZeroPlain, ZeroPlain),
            (RESERVED, RESERVED, ZeroPlain, ZeroPlain),
            (ZeroPlain, ZeroPlain, ZeroPlain, ZeroPlain),
            (PACKED, ZeroPlain, ZeroPlain, ZeroPlain),
        ];
        for (entry, zero, unmap, discard) in rows {
            assert_eq!(v3(entry, Zero, false), zero, "{entry:?}");
            assert_eq!(v3(entry, Unmap, false), unmap, "{entry:?}");
            assert_eq!(v3(entry, Discard, false), discard, "{entry:?}");
        }
        assert_eq!(v3(Unallocated, Discard, true), ZeroPlain);
        for entry in [Unallocated, NORMAL, PACKED] {
            for change in [Zero, Unmap, Discard] {
                let new = changed(entry, change, false, false).unwrap_or(entry);
                assert_eq!(new, Unallocated, "version 2, {entry:?}");
            }
        }
        for entry in [Unallocated, NORMAL, RESERVED, ZeroPlain, PACKED] {
            assert_eq!(v3(entry, Change::Full, true), Unallocated);
        }
    }
}
