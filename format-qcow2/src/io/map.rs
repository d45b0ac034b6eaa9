//! From guest offsets to where the bytes are: runs of clusters of one kind within a slice, and the synchronous look at the
//! caches that the core uses.

use std::sync::Arc;

use block_core::{
    driver::{MapIntent, Mapping},
    error::{Error, Result},
    mutant,
    node::Edges,
    pins::Pin,
    request::Child,
};

use crate::{
    cache::slice::Slice,
    image::Qcow2,
    layout::{
        ClusterIndex, CompressedRun, EntryProblem, HostOffset, L2Entry, RawEntry, units::hex,
    },
};

/// How the first bytes of a range are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Run {
    /// At `host`, to the byte. `copied`: it may be overwritten there.
    Data {
        host: HostOffset,
        len: u64,
        copied: bool,
    },
    /// Zeroes; `host` is the reservation of the first byte, if there is one.
    Zero { len: u64, host: Option<HostOffset> },
    /// Nothing here; `host` is where the first byte would go, if its cluster has space for other subclusters' sake.
    Unallocated { len: u64, host: Option<HostOffset> },
    /// A part of one compressed cluster.
    Compressed {
        run: CompressedRun,
        cluster: ClusterIndex,
        len: u64,
    },
}

impl Run {
    pub const fn len(self) -> u64 {
        match self {
            Self::Data { len, .. }
            | Self::Zero { len, .. }
            | Self::Unallocated { len, .. }
            | Self::Compressed { len, .. } => len,
        }
    }
}

impl Qcow2 {
    /// Decodes an entry of a guest cluster.
    pub fn decode(&self, raw: RawEntry, cluster: ClusterIndex) -> Result<L2Entry> {
        let entry = L2Entry::decode(raw, self.geometry)
            .map_err(|problem| self.bad_entry(problem, cluster))?;
        if self.geometry.has_data_file() {
            self.check_data_entry(entry, cluster)?;
        }
        Ok(entry)
    }

    fn bad_entry(&self, problem: EntryProblem, cluster: ClusterIndex) -> Error {
        let index = self.geometry.l2_index(cluster);
        let table = self.table_of(self.slice_of(cluster));
        let table = table.ok().and_then(|entry| entry.l2).map_or(0, |l2| l2.0);
        let place = format!("L2 offset: {}, L2 index: {}", hex(table), hex(index));
        Error::corrupt(match problem {
            EntryProblem::Unaligned(offset) => {
                format!("Cluster allocation offset {offset} unaligned ({place})")
            }
            EntryProblem::Subclusters(bitmap) => {
                format!("Invalid cluster entry found ({place}, subclusters: {bitmap:#018x})")
            }
            other => format!("{other} ({place})"),
        })
    }

    /// The longest run of one kind at the start of a range that lies within `slice`.
    pub fn run_in(&self, slice: &Slice, offset: u64, len: u64) -> Result<Run> {
        if self.geometry.has_extended_l2() {
            return self.run_in_extended(slice, offset, len);
        }
        let size = self.geometry.cluster_size();
        let within = self.geometry.within(offset);
        let first = self.cluster_of(offset);
        let at = self.slice_entry(first);
        let entry = self.decode(slice.load(at), first)?;
        let clusters = (within + len).div_ceil(size) as usize;
        // How many entries from the first on satisfy `goes_on`, given their distance and meaning.
        let extent = |goes_on: &dyn Fn(u64, L2Entry) -> bool| {
            let mut count = 1;
            while count < clusters && at + count < slice.len() {
                // A damaged entry ends the run; whoever gets to it meets the error.
                match L2Entry::decode(slice.load(at + count), self.geometry) {
                    Ok(next) if goes_on(count as u64, next) => count += 1,
                    _ => break,
                }
            }
            (count as u64 * size - within).min(len)
        };
        Ok(match entry {
            L2Entry::Normal { host, copied } => Run::Data {
                host: HostOffset(host.0 + within),
                len: extent(&|n, next| {
                    next == L2Entry::Normal {
                        host: HostOffset(host.0 + n * size),
                        copied,
                    }
                }),
                copied,
            },
            L2Entry::ZeroPlain => Run::Zero {
                len: extent(&|_, next| next == L2Entry::ZeroPlain),
                host: None,
            },
            L2Entry::ZeroAllocated { host, .. } => Run::Zero {
                len: extent(&|n, next| {
                    matches!(next, L2Entry::ZeroAllocated { host: there, .. }
                        if there.0 == host.0 + n * size)
                }),
                host: Some(HostOffset(host.0 + within)),
            },
            L2Entry::Unallocated => Run::Unallocated {
                len: extent(&|_, next| next == L2Entry::Unallocated),
                host: None,
            },
            L2Entry::Compressed(run) => Run::Compressed {
                run,
                cluster: first,
                len: (size - within).min(len),
            },
            L2Entry::Mixed { .. } => {
                return Err(Error::corrupt("subclusters in an ordinary L2 entry"));
            }
        })
    }

    /// A run at the start of a range, read from disk if need be, with a pin that was published before the entries were
    /// loaded.
    pub async fn locate(
        self: &Arc<Self>,
        file: &Child,
        offset: u64,
        len: u64,
    ) -> Result<(Run, Pin)> {
        let index = self.slice_of(self.cluster_of(offset));
        let Some(slice) = self.slice(file, index).await? else {
            let len = len.min(self.left_in_table(offset));
            return Ok((Run::Unallocated { len, host: None }, self.pins.pin()));
        };
        let len = len.min(self.left_in_slice(offset));
        let pin = self.pins.pin();
        Ok((self.run_in(&slice, offset, len)?, pin))
    }

    /// See [`block_core::driver::BlockDriver::try_map`].
    pub fn map_cached(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        if self.check_usable().is_err() || len == 0 {
            return Mapping::NotCached;
        }
        if intent == MapIntent::Overwrite && (self.is_read_only() || self.is_uncertain()) {
            return Mapping::NotCached;
        }
        let pin = self.pins.pin();
        let here = len.min(self.left_in_slice(offset));
        let index = self.slice_of(self.cluster_of(offset));
        let found = self.slices.table.with(index, |slice| {
            if intent == MapIntent::Overwrite && self.is_suspect(slice) {
                return Err(Error::corrupt(""));
            }
            self.run_in(slice, offset, here)
        });
        let run = match found {
            Some(Ok(run)) => run,
            Some(Err(_)) => return Mapping::NotCached,
            None => match self.table_of(index) {
                Ok(table) if table.l2.is_none() => Run::Unallocated {
                    len: len.min(self.left_in_table(offset)),
                    host: None,
                },
                _ => return Mapping::NotCached,
            },
        };
        match (run, intent) {
            // It has to be decrypted on the way.
            (Run::Data { .. }, _) if self.encryption.is_some() => Mapping::NotCached,
            (Run::Data { host, len, copied }, intent) => {
                let Some(edge) = edges.index(self.data_role()) else {
                    return Mapping::NotCached;
                };
                if intent == MapIntent::Overwrite {
                    // What the file doesn't have yet isn't overwritten. (A read there, whose rest is zeroes, is found
                    // by the core.)
                    let end = edges.get(edge).map_or(0, |edge| edge.child.length());
                    if !copied && !mutant::is_active("qcow2-overwrite-of-shared-cluster")
                        || len < here
                        || self.claims.any()
                        || end < host.0 + len
                    {
                        return Mapping::NotCached;
                    }
                }
                Mapping::Data {
                    edge,
                    offset: host.0,
                    len,
                    pin: (!mutant::is_active("qcow2-mapped-read-not-pinned")).then_some(pin),
                }
            }
            (_, MapIntent::Overwrite) => Mapping::NotCached,
            (Run::Zero { len, .. }, MapIntent::Read) => Mapping::Zero { len },
            (Run::Unallocated { len, .. }, MapIntent::Read) => Mapping::Backing { len },
            (Run::Compressed { .. }, MapIntent::Read) => Mapping::NotCached,
        }
    }
}
