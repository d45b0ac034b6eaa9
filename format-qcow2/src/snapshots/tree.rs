//! What an L1 table reaches: its L2 tables, and the host clusters that their entries refer to, in runs.

use block_core::{
    buffer::Buffer,
    debug::DebugEvent,
    error::{Error, Result},
    request::Child,
};
use futures::{Stream, StreamExt, stream};

use crate::layout::{Geometry, HostOffset, L1Entry, L2Entry, RawEntry, entry::COPIED};

/// L2 tables that are read ahead, and the bytes that they may take.
const WINDOW: u64 = 8;
const WINDOW_BYTES: u64 = 8 << 20;

/// An L2 table, and how many entries of the L1 table point to it: one, in a sound image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableUse {
    pub offset: HostOffset,
    pub times: u64,
}

/// References to consecutive host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reference {
    pub first: u64,
    pub count: u64,
    /// To each of them.
    pub times: u64,
}

/// The L2 tables that an L1 table points to, each once, in the order of the file.
///
/// # Errors
/// `Corrupt` for an entry that isn't where a table can be.
pub(super) fn tables(l1: &[u64], geometry: Geometry) -> Result<Vec<TableUse>> {
    let mut offsets = Vec::new();
    for (index, raw) in l1.iter().enumerate() {
        let entry = L1Entry::decode(*raw, geometry).map_err(|problem| {
            Error::corrupt(format!("L2 table {problem} (L1 index: {index:#x})"))
        })?;
        offsets.extend(entry.l2);
    }
    offsets.sort_unstable();
    let mut uses: Vec<TableUse> = Vec::new();
    for offset in offsets {
        match uses.last_mut() {
            Some(last) if last.offset == offset => last.times += 1,
            _ => uses.push(TableUse { offset, times: 1 }),
        }
    }
    Ok(uses)
}

/// Reads L2 tables one after the other, some ahead.
pub(super) fn read<'a>(
    file: &'a Child,
    uses: &'a [TableUse],
    geometry: Geometry,
) -> impl Stream<Item = Result<(TableUse, Buffer)>> + 'a {
    let window = (WINDOW_BYTES >> geometry.cluster_bits()).clamp(1, WINDOW);
    stream::iter(uses)
        .map(move |table| async move {
            if table.offset.0 >= file.length() {
                return Err(Error::corrupt(format!(
                    "L2 table at offset {} is beyond the end of the file",
                    table.offset
                )));
            }
            file.debug_event(DebugEvent::L2Load).await;
            let len = geometry.cluster_size() as usize;
            let bytes = file.read_padded(table.offset.0, len).await?;
            Ok((*table, bytes))
        })
        .buffered(window as usize)
}

/// The entries of a table, and where each begins.
fn entries(bytes: &[u8], geometry: Geometry) -> impl Iterator<Item = (usize, RawEntry)> + '_ {
    let size = geometry.l2_entry_size() as usize;
    RawEntry::parse(bytes, geometry)
        .enumerate()
        .map(move |(index, raw)| (index * size, raw))
}

/// What the entries of a table refer to: data, reservations, and the clusters that compressed runs touch.
///
/// # Errors
/// `Corrupt` for an entry that makes no sense.
pub(super) fn references(
    table: TableUse,
    bytes: &[u8],
    geometry: Geometry,
) -> Result<Vec<Reference>> {
    let mut runs: Vec<Reference> = Vec::new();
    for (at, raw) in entries(bytes, geometry) {
        let entry = L2Entry::decode(raw, geometry).map_err(|problem| {
            Error::corrupt(format!(
                "L2 entry {problem} (L2 table: {}, offset in it: {at:#x})",
                table.offset
            ))
        })?;
        let (first, last) = match entry {
            L2Entry::Compressed(run) => run.clusters(geometry),
            entry => {
                let Some(space) = entry.space() else {
                    continue;
                };
                let cluster = geometry.host_cluster_of(space.host).0;
                (cluster, cluster)
            }
        };
        for cluster in first..=last {
            match runs.last_mut() {
                Some(run) if run.first + run.count == cluster && run.times == table.times => {
                    run.count += 1;
                }
                // Many compressed clusters in one host cluster.
                Some(run) if run.count == 1 && run.first == cluster => run.times += table.times,
                _ => runs.push(Reference {
                    first: cluster,
                    count: 1,
                    times: table.times,
                }),
            }
        }
    }
    Ok(runs)
}

/// The host cluster that the COPIED flag of an entry is about, if the entry has one.
fn flagged_cluster(raw: RawEntry, geometry: Geometry) -> Option<u64> {
    let space = L2Entry::decode(raw, geometry).ok()?.space()?;
    Some(geometry.host_cluster_of(space.host).0)
}

/// The host clusters that the COPIED flags of a table's entries are about, with the place of each entry.
pub(super) fn flagged(bytes: &[u8], geometry: Geometry) -> Vec<(usize, u64)> {
    entries(bytes, geometry)
        .filter_map(|(at, raw)| Some((at, flagged_cluster(raw, geometry)?)))
        .collect()
}

/// Sets or clears the COPIED flag of the entry at `at`; says whether that changed it.
pub(super) fn set_flag(bytes: &mut [u8], at: usize, copied: bool) -> bool {
    let Some(high) = bytes.get_mut(at) else {
        return false;
    };
    let flag = (COPIED >> 56) as u8;
    let new = if copied { *high | flag } else { *high & !flag };
    let changed = *high != new;
    *high = new;
    changed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{CompressedRun, entry::be64s};

    fn geometry() -> Geometry {
        Geometry::new(16, 4, 3).unwrap()
    }

    fn table(entries: &[L2Entry]) -> Vec<u8> {
        let mut bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.encode(geometry()).descriptor.to_be_bytes())
            .collect();
        bytes.resize(65536, 0);
        bytes
    }

    #[test]
    fn references_come_in_runs_and_compressed_neighbours_add_up() {
        let host = |n: u64| HostOffset(n << 16);
        let packed = |offset: u64| {
            L2Entry::Compressed(CompressedRun::new(HostOffset(offset), 600, geometry()).unwrap())
        };
        let bytes = table(&[
            L2Entry::Normal {
                host: host(5),
                copied: true,
            },
            L2Entry::ZeroAllocated {
                host: host(6),
                copied: false,
            },
            L2Entry::ZeroPlain,
            L2Entry::Normal {
                host: host(7),
                copied: true,
            },
            packed(9 << 16),
            packed((9 << 16) + 600),
            packed((10 << 16) - 300),
        ]);
        let reference = |first, count, times| Reference {
            first,
            count,
            times,
        };
        let offset = HostOffset(0x40000);
        let runs = references(TableUse { offset, times: 1 }, &bytes, geometry()).unwrap();
        assert_eq!(
            runs,
            [reference(5, 3, 1), reference(9, 1, 3), reference(10, 1, 1)]
        );
        let found = flagged(&bytes, geometry());
        assert_eq!(found, [(0, 5), (8, 6), (24, 7)]);
        let mut changed = bytes.clone();
        assert!(set_flag(&mut changed, 8, true));
        assert!(!set_flag(&mut changed, 8, true));
        assert_eq!(be64s(&changed).nth(1).unwrap(), (6 << 16) | COPIED | 1);
    }

    #[test]
    fn tables_are_found_once_however_many_entries_point_to_them() {
        let l1 = [0x50000 | COPIED, 0, 0x40000, 0x50000];
        let found = tables(&l1, geometry()).unwrap();
        let table = |offset, times| TableUse {
            offset: HostOffset(offset),
            times,
        };
        assert_eq!(found, [table(0x40000, 1), table(0x50000, 2)]);
        assert!(tables(&[0x50200], geometry()).is_err());
    }
}
