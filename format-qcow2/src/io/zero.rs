//! Zero writes and discards: what each kind of entry becomes (digest, section 5), one slice at a time. Zeroes are written to
//! whole subclusters where L2 entries are extended; space is only given back by the cluster.
//!
//! The core sees to it that nothing else that overlaps is with the driver meanwhile; entries change under the metadata lock
//! all the same, and what they referred to goes to the quarantine.

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::Request,
};

use super::{map::Run, subclusters::ALL};
use crate::{
    alloc::quarantine::{Freed, merge_clusters},
    image::Qcow2,
    layout::{ClusterIndex, L2Entry, Space},
    meta::Meta,
};

/// What happens to clusters; to parts of them only when they are to read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// They read as zeroes; their space is kept.
    Zero,
    /// They read as zeroes, and whole ones take no space.
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
        // Nothing is in them that could be given back.
        (L2Entry::Unallocated | L2Entry::Mixed { space: None, .. }, Change::Discard) => {
            backing.then_some(gone)
        }
        (L2Entry::ZeroPlain, Change::Full) => Some(gone),
        (L2Entry::ZeroPlain, _) => None,
        (L2Entry::ZeroAllocated { .. }, Change::Zero) => None,
        (L2Entry::Normal { host, copied }, Change::Zero) if zero_flag => {
            Some(L2Entry::ZeroAllocated { host, copied })
        }
        (
            L2Entry::Mixed {
                space: Some(Space { host, copied }),
                ..
            },
            Change::Zero,
        ) => Some(L2Entry::ZeroAllocated { host, copied }),
        (L2Entry::Unallocated, Change::Full) => None,
        (_, _) => Some(gone),
    }
    .filter(|new| *new != entry)
}

/// The same for the subclusters of `mask`.
fn changed_in(
    entry: L2Entry,
    mask: u32,
    change: Change,
    zero_flag: bool,
    backing: bool,
) -> Result<Option<L2Entry>> {
    if mask == ALL || matches!(change, Change::Discard | Change::Full) {
        return Ok(changed(entry, change, zero_flag, backing));
    }
    let new = Qcow2::with_zeroes(entry, mask)?;
    Ok((new != entry).then_some(new))
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
        if self.has_raw_data() {
            return self.zero_raw_data(request, offset, len, flags).await;
        }
        if !self.geometry.has_zero_flag() && self.has_backing(request) {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        let unit = self.geometry.subcluster_size();
        let end = offset + len;
        let mut start = offset - offset % unit;
        let mut stop = end.next_multiple_of(unit);
        if start != offset {
            self.check_partial(request, start, offset, end).await?;
        }
        if stop != end && end < self.length() && (start == offset || stop - start > unit) {
            self.check_partial(request, stop - unit, offset, end)
                .await?;
        }
        if end >= self.length() {
            // Nothing is behind the disk's end that a part of a cluster could be kept for.
            stop = end.next_multiple_of(self.geometry.cluster_size());
        }
        (start, stop) = self
            .without_compressed_edges(request, start, stop, flags)
            .await?;
        let change = if flags.contains(RequestFlags::MAY_UNMAP)
            || mutant::is_active("qcow2-zero-always-unmaps")
        {
            Change::Unmap
        } else {
            Change::Zero
        };
        self.change_range(request, start, stop, change).await
    }

    /// Cuts parts of compressed clusters off both ends of a range that is to be zeroed: zeroes are written there as data.
    ///
    /// # Errors
    /// ENOTSUP when nothing else is to be zeroed, or when that mustn't be done.
    async fn without_compressed_edges(
        self: &Arc<Self>,
        request: &Request,
        mut start: u64,
        mut stop: u64,
        flags: RequestFlags,
    ) -> Result<(u64, u64)> {
        let size = self.geometry.cluster_size();
        let whole = (start, stop);
        let head = (start % size != 0).then(|| (start, stop.min(start.next_multiple_of(size))));
        let tail = (stop % size != 0 && (stop - stop % size > start || start % size == 0))
            .then(|| (start.max(stop - stop % size), stop));
        for (from, to) in [head, tail].into_iter().flatten() {
            let (run, pin) = self.locate(request.file()?, from, to - from).await?;
            drop(pin);
            if !matches!(run, Run::Compressed { .. }) {
                continue;
            }
            if (from, to) == whole || flags.contains(RequestFlags::NO_FALLBACK) {
                return Err(Error::from_kind(ErrorKind::NotSupported));
            }
            let end = to.min(self.length());
            self.write_guest(request, from, IoBuf::zeroes((end - from) as usize))
                .await?;
            if from == start {
                start = to;
            } else {
                stop = from;
            }
        }
        Ok((start, stop))
    }

    /// A cluster (or subcluster), from `start` on, that is zeroed in part: allowed when its rest reads as zeroes already and no
    /// space is in use for data.
    async fn check_partial(
        self: &Arc<Self>,
        request: &Request,
        start: u64,
        offset: u64,
        end: u64,
    ) -> Result<()> {
        let stop = (start + self.geometry.subcluster_size()).min(self.length());
        let (run, _pin) = self.locate(request.file()?, start, stop - start).await?;
        let zero = match run {
            Run::Zero { .. } => true,
            Run::Unallocated { .. } => {
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
        if self.has_raw_data() {
            let (start, end) = (first * size, (last * size).min(self.length()));
            return match end.checked_sub(start) {
                None | Some(0) => Ok(()),
                Some(len) => self.discard_raw_data(request, start, len).await,
            };
        }
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
        let start = self.geometry.cluster_start(first).0;
        let end = self.geometry.cluster_start(end).0;
        self.change_range(request, start, end, change).await
    }

    /// Changes a guest range, made of whole subclusters for zeroes and else of whole clusters.
    async fn change_range(
        self: &Arc<Self>,
        request: &Request,
        start: u64,
        end: u64,
        change: Change,
    ) -> Result<()> {
        let file = request.file()?;
        let backing = self.has_backing(request);
        let zero_flag = self.geometry.has_zero_flag();
        let without_table = changed(L2Entry::Unallocated, change, zero_flag, backing);
        let mut at = start;
        while at < end {
            let index = self.slice_of(self.cluster_of(at));
            if without_table.is_none() && self.table_of(index)?.l2.is_none() {
                at += self.left_in_table(at);
                continue;
            }
            let stop = end.min(at + self.left_in_slice(at));
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
            self.punch(self.data(request)?, &late).await;
            at = stop;
        }
        self.make_room(request).await
    }

    /// Changes clusters of one slice. Gives back what is to be punched right away: what keeps its place, ranges of a data file,
    /// whose owner never changes, and, in a driver without safeguards, everything.
    async fn change_slice(
        self: &Arc<Self>,
        meta: &mut Meta,
        request: &Request,
        start: u64,
        end: u64,
        change: Change,
        backing: bool,
    ) -> Result<Vec<(u64, u64)>> {
        let file = request.file()?;
        let zero_flag = self.geometry.has_zero_flag();
        let index = self.slice_of(self.cluster_of(start));
        let punch = match change {
            Change::Zero | Change::Unmap | Change::Discard => self.settings.pass_discard_request(),
            Change::Full => self.settings.pass_discard_snapshot(),
        };
        // A cut of the power may bring the old link back. Zeroes behind it are noise once they are decrypted, and where the
        // disk was to show what is below, they are nobody's data.
        let early = punch && self.encryption.is_none() && change != Change::Full;
        let keep = zero_flag
            && self.settings.discard_no_unref()
            && !self.geometry.has_data_file()
            && matches!(change, Change::Unmap | Change::Discard);
        let mut emptied = Vec::new();
        self.mark_in_use(meta, file).await?;
        let slice = self.slice_for_update(meta, file, index).await?;
        let mut freed = Freed::default();
        let mut result = Ok(());
        let clusters = self.cluster_of(start).0..self.geometry.clusters_for(end);
        for cluster in clusters.map(ClusterIndex) {
            let at = self.slice_entry(cluster);
            let raw = slice.load(at);
            let changes = async {
                let entry = self.decode(raw, cluster)?;
                let mask = self.touched(cluster, start, end);
                if keep
                    && (mask == ALL || change == Change::Discard)
                    && let Some(Space { host, copied: true }) = entry.space()
                {
                    // Nothing else refers to it. It is punched before the request ends, and so before it is written to again.
                    if early {
                        emptied.push(self.geometry.host_cluster_of(host).0);
                    }
                    let kept = L2Entry::ZeroAllocated { host, copied: true };
                    return Ok((kept != entry).then_some(kept));
                }
                let Some(new) = changed_in(entry, mask, change, zero_flag, backing)? else {
                    return Ok(None);
                };
                if self.geometry.has_data_file() {
                    if entry.space().is_some() && new.space().is_none() {
                        freed.push(cluster.0, early);
                    }
                } else if new.space().is_none() && !mutant::is_active("qcow2-discard-leaks") {
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
        if self.settings.safeguards && !self.geometry.has_data_file() {
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
    use crate::layout::{CompressedRun, HostOffset, Subclusters};

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

    #[test]
    fn zeroes_in_subclusters_keep_the_space_and_the_other_subclusters() {
        let some = |entry, mask| changed_in(entry, mask, Change::Unmap, true, true).unwrap();
        let space = NORMAL.space();
        let mixed = some(NORMAL, 0b110).unwrap();
        let subclusters = Subclusters {
            allocated: !0b110,
            zero: 0b110,
        };
        assert_eq!(mixed, L2Entry::Mixed { space, subclusters });
        assert_eq!(some(mixed, 0b10), None, "no change");
        assert_eq!(
            some(mixed, !0b110),
            Some(RESERVED),
            "all of it reads as zeroes"
        );
        assert_eq!(some(mixed, ALL), Some(L2Entry::ZeroPlain));
        let half = some(L2Entry::Unallocated, 0xffff).unwrap();
        assert_eq!(
            (half.space(), some(half, !0xffff)),
            (None, Some(L2Entry::ZeroPlain))
        );
        let error = changed_in(PACKED, 1, Change::Zero, true, true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);

        let whole = |entry, change, backing| changed(entry, change, true, backing);
        assert_eq!(whole(mixed, Change::Zero, true), Some(RESERVED));
        assert_eq!(
            whole(mixed, Change::Discard, false),
            Some(L2Entry::ZeroPlain)
        );
        assert_eq!(whole(half, Change::Zero, true), Some(L2Entry::ZeroPlain));
        assert_eq!(whole(half, Change::Discard, true), Some(L2Entry::ZeroPlain));
        assert_eq!(
            whole(half, Change::Discard, false),
            None,
            "it reads as zeroes already"
        );
        for entry in [mixed, half] {
            assert_eq!(whole(entry, Change::Full, true), Some(L2Entry::Unallocated));
        }
    }
}
