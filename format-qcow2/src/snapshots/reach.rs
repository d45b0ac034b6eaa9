//! Where the metadata is that only snapshots have, and the LUKS header: for the map of metadata, which no write may touch.
//!
//! L1 tables of snapshots are read here, and only when their L2 tables are looked for (`overlap-check=all`, or
//! `overlap-check.inactive-l2`): each byte of the file once, however many snapshots claim it, in pieces of bounded size. An
//! entry that can't be a table's place protects nothing; saying so is the check's business.

use block_core::{error::Result, request::Child};

use crate::{
    layout::{Header, HostOffset, L1Entry, SnapshotEntry, entry::be64s},
    overlap::{Kinds, Others, range},
};

/// Bytes of L1 tables that are read at once.
const WINDOW: u64 = 1 << 20;

/// Finds it: the image has `snapshots`, and `header` says where their table is. `wanted` is what is looked for.
///
/// # Errors
/// Whatever the storage reports.
pub(crate) async fn others(
    file: &Child,
    header: &Header,
    snapshots: &[SnapshotEntry],
    wanted: Kinds,
) -> Result<Others> {
    let geometry = header.geometry();
    let mut others = Others::default();
    if let Some(luks) = header.extensions.luks {
        let row = range(geometry, luks.offset, luks.len);
        others.rows.push((row, Kinds::LUKS_HEADER));
    }
    let table: u64 = snapshots
        .iter()
        .map(|entry| entry.stored_len() as u64)
        .sum();
    let row = range(geometry, header.snapshots_offset.0, table);
    others.rows.push((row, Kinds::SNAPSHOT_TABLE));
    let mut tables = Vec::new();
    for entry in snapshots {
        if entry.check_l1(geometry).is_err() {
            continue;
        }
        let (at, len) = (entry.l1_table_offset.0, entry.l1_bytes());
        others
            .rows
            .push((range(geometry, at, len), Kinds::INACTIVE_L1));
        tables.push(at..at + len);
    }
    if !wanted.contains(Kinds::INACTIVE_L2) {
        return Ok(others);
    }
    tables.sort_unstable_by_key(|table| table.start);
    let mut done = 0;
    let end = file.length();
    for table in tables {
        let mut at = table.start.max(done);
        let until = table.end.min(end);
        while at < until {
            let len = WINDOW.min(until - at);
            let bytes = file.read_padded(at, len as usize).await?;
            for raw in be64s(&bytes) {
                if let Ok(L1Entry { l2: Some(host), .. }) = L1Entry::decode(raw, geometry) {
                    others.inactive_l2.insert(geometry.host_cluster_of(host).0);
                }
            }
            at += len;
        }
        done = done.max(until);
    }
    Ok(others)
}

/// Place and length of every L1 table: the active one first.
///
/// # Errors
/// For a table of impossible size or place.
pub(super) fn trees<'a>(
    header: &Header,
    snapshots: &'a [SnapshotEntry],
) -> impl Iterator<Item = Result<(HostOffset, u64)>> + use<'a> {
    let geometry = header.geometry();
    let active = (header.l1_table_offset, header.l1_bytes());
    let others = snapshots.iter().map(move |entry| {
        entry.check_l1(geometry)?;
        Ok((entry.l1_table_offset, entry.l1_bytes()))
    });
    std::iter::once(Ok(active)).chain(others)
}
