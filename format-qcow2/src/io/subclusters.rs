//! Subclusters of images with extended L2 entries: runs of them, and which of them a range touches.
//!
//! What holds for both kinds of images is written in terms of subclusters; an ordinary cluster counts as one whose 32
//! subclusters are always alike. Nothing here does I/O.

use super::map::Run;
use crate::{
    cache::slice::Slice,
    image::Qcow2,
    layout::{ClusterIndex, HostOffset, L2Entry, Space, SubclusterKind, Subclusters},
};
use block_core::error::{Error, Result};

/// All subclusters of a cluster; the one that an ordinary cluster counts as.
pub(crate) const ALL: u32 = u32::MAX;

/// The subclusters from `first` to `last`.
const fn mask(first: u64, last: u64) -> u32 {
    ((1u64 << (last + 1)) - (1u64 << first)) as u32
}

impl Qcow2 {
    /// The subclusters of a guest cluster that the guest range from `start` to `end` touches, one bit each. The range
    /// has a part in the cluster.
    pub fn touched(&self, cluster: ClusterIndex, start: u64, end: u64) -> u32 {
        if !self.geometry.has_extended_l2() {
            return ALL;
        }
        let begin = self.geometry.cluster_start(cluster).0;
        let stop = begin + self.geometry.cluster_size();
        let bits = self.geometry.subcluster_bits();
        let first = (start.max(begin) - begin) >> bits;
        let last = (end.min(stop) - 1 - begin) >> bits;
        mask(first, last)
    }

    /// The part of a cluster, in bytes from its start, from the first to the last of some subclusters.
    pub fn span(&self, mask: u32) -> (u64, u64) {
        if !self.geometry.has_extended_l2() {
            return (0, self.geometry.cluster_size());
        }
        let bits = self.geometry.subcluster_bits();
        let end = u32::BITS - mask.leading_zeros();
        (
            u64::from(mask.trailing_zeros()) << bits,
            u64::from(end) << bits,
        )
    }

    /// See [`Self::run_in`].
    pub fn run_in_extended(&self, slice: &Slice, offset: u64, len: u64) -> Result<Run> {
        let size = self.geometry.cluster_size();
        let within = self.geometry.within(offset);
        let first = self.cluster_of(offset);
        let at = self.slice_entry(first);
        let entry = self.decode(slice.load(at), first)?;
        let mut run = self.run_of(entry, first, within, len);
        let mut next = 1;
        // As long as it reaches the end of a cluster it may go on in the next one.
        while run.len() < len && (within + run.len()) % size == 0 && at + next < slice.len() {
            // A damaged entry ends the run; whoever gets to it meets the error.
            let Ok(entry) = L2Entry::decode(slice.load(at + next), self.geometry) else {
                break;
            };
            let cluster = ClusterIndex(first.0 + next as u64);
            match run.joined(self.run_of(entry, cluster, 0, len - run.len())) {
                Some(joined) => run = joined,
                None => break,
            }
            next += 1;
        }
        Ok(run)
    }

    /// The run at `within` of a cluster, as far as that cluster and `len` go.
    pub fn run_of(&self, entry: L2Entry, cluster: ClusterIndex, within: u64, len: u64) -> Run {
        let left = (self.geometry.cluster_size() - within).min(len);
        let subclusters = match entry {
            L2Entry::Compressed(run) => {
                return Run::Compressed {
                    run,
                    cluster,
                    len: left,
                };
            }
            entry => entry.subclusters().unwrap_or(Subclusters::UNALLOCATED),
        };
        // All subclusters of an ordinary cluster are alike, whichever is asked for.
        let bits = self.geometry.subcluster_bits();
        let index = within >> bits;
        let (kind, count) = subclusters.run(index as u32);
        let len = if self.geometry.has_extended_l2() {
            (((index + u64::from(count)) << bits) - within).min(left)
        } else {
            left
        };
        let at = |space: Space| HostOffset(space.host.0 + within);
        match (kind, entry.space()) {
            (SubclusterKind::Allocated, Some(space)) => Run::Data {
                host: at(space),
                len,
                copied: space.copied,
            },
            (SubclusterKind::Zero, space) => Run::Zero {
                len,
                host: space.map(at),
            },
            // Decoding refuses data without space.
            (SubclusterKind::Unallocated | SubclusterKind::Allocated, space) => Run::Unallocated {
                len,
                host: space.map(at),
            },
        }
    }

    /// What an entry becomes when the subclusters of `mask` hold data, in space at `host` that is this cluster's alone.
    /// A compressed cluster was unpacked into that space as a whole.
    pub fn with_data(entry: L2Entry, host: HostOffset, mask: u32) -> L2Entry {
        let subclusters = entry
            .subclusters()
            .map_or(Subclusters::ALLOCATED, |old| old.with_data(mask));
        let space = Space { host, copied: true };
        L2Entry::from_parts(Some(space), subclusters)
    }

    /// What an entry becomes when the subclusters of `mask`, not all of them, read as zeroes. Space is kept.
    ///
    /// # Errors
    /// ENOTSUP for a compressed cluster.
    pub fn with_zeroes(entry: L2Entry, mask: u32) -> Result<L2Entry> {
        let old = entry
            .subclusters()
            .ok_or_else(|| Error::from_kind(block_core::ErrorKind::NotSupported))?;
        Ok(L2Entry::from_parts(entry.space(), old.with_zeroes(mask)))
    }
}

impl Run {
    /// This run and the one right behind it as one, if they are of one kind and, as far as they have space, that is in one piece.
    fn joined(self, next: Self) -> Option<Self> {
        match (self, next) {
            (
                Self::Data { host, len, copied },
                Self::Data {
                    host: there,
                    len: more,
                    copied: same,
                },
            ) if there.0 == host.0 + len && same == copied => Some(Self::Data {
                host,
                len: len + more,
                copied,
            }),
            (
                Self::Zero { len, host },
                Self::Zero {
                    len: more,
                    host: there,
                },
            ) if there == host.map(|host| HostOffset(host.0 + len)) => Some(Self::Zero {
                len: len + more,
                host,
            }),
            (
                Self::Unallocated { len, host },
                Self::Unallocated {
                    len: more,
                    host: there,
                },
            ) if there == host.map(|host| HostOffset(host.0 + len)) => Some(Self::Unallocated {
                len: len + more,
                host,
            }),
            _ => None,
        }
    }
}
