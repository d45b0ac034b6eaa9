//! Compares the COPIED flags of L1 and L2 entries with the stored refcounts: the flag says that a refcount is exactly
//! 1, and is what allows overwriting in place.

use std::collections::HashSet;

use block_core::{
    buffer::Buffer,
    error::Result,
    flags::RequestFlags,
    image::{CheckReport, Progress, Severity},
    request::Child,
};

use super::{
    stored::Stored,
    walk::{Walk, stop_if_cancelled},
};
use crate::layout::{
    Header, HostOffset,
    entry::{COMPRESSED, COPIED, OFFSET_MASK, be64s},
};

/// Bytes of the L1 table that are written at once: sectors hold it whole.
const L1_SECTOR: usize = 512;

/// Checks all flags of the active tables, and corrects them when `fix` is set. The refcounts in `stored` must be the
/// ones that the image keeps.
pub(super) async fn check_copied(
    walk: &mut Walk<'_>,
    header: &Header,
    stored: &mut Stored<'_>,
    fix: bool,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<()> {
    let bits = walk.geometry.cluster_bits();
    let mut seen = HashSet::new();
    let mut changed = Vec::new();
    for index in 0..walk.l1.len() {
        let raw = walk.l1[index];
        let offset = raw & OFFSET_MASK;
        if offset == 0 {
            continue;
        }
        stop_if_cancelled(progress)?;
        match stored.get(offset >> bits).await {
            Ok(refcount) => {
                if (refcount == 1) != (raw & COPIED != 0) {
                    report.add(
                        Severity::Corruption,
                        fix,
                        format!(
                            "{} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} refcount={refcount}",
                            if fix { "Repairing" } else { "ERROR" }
                        ),
                    );
                    if fix {
                        walk.l1[index] = raw ^ COPIED;
                        changed.push(index);
                    }
                }
            }
            // Counted where the refcounts were compared.
            Err(_) => continue,
        }
        if !walk.geometry.is_aligned(HostOffset(offset)) || offset >= walk.file_len {
            continue;
        }
        if seen.insert(offset) {
            l2_table(walk, offset, stored, fix, report).await?;
            progress.advance(1);
        }
    }
    write_l1(walk.file, header, &walk.l1, &changed).await
}

async fn l2_table(
    walk: &Walk<'_>,
    offset: u64,
    stored: &mut Stored<'_>,
    fix: bool,
    report: &mut CheckReport,
) -> Result<()> {
    let bits = walk.geometry.cluster_bits();
    let len = walk.geometry.cluster_size() as usize;
    let mut table = match walk.file.read_padded(offset, len).await {
        Ok(table) => table,
        Err(error) => {
            // What the walk couldn't read either is counted; what it could read has flags that nobody looked at.
            if !walk.unreadable.contains(&offset) {
                let reason = error.reason();
                report.add(
                    Severity::CheckError,
                    false,
                    format!("ERROR: I/O error while the copied flags were checked: {reason}"),
                );
            }
            return Ok(());
        }
    };
    let mut changed = false;
    for at in (0..len).step_by(8) {
        let Some(raw) = be64s(&table[at..at + 8]).next() else {
            continue;
        };
        let data = raw & OFFSET_MASK;
        if data == 0 || raw & COMPRESSED != 0 {
            continue;
        }
        let Ok(refcount) = stored.get(data >> bits).await else {
            continue;
        };
        if (refcount == 1) == (raw & COPIED != 0) {
            continue;
        }
        report.add(
            Severity::Corruption,
            fix,
            format!(
                "{} OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={refcount}",
                if fix { "Repairing" } else { "ERROR" }
            ),
        );
        if fix {
            table[at..at + 8].copy_from_slice(&(raw ^ COPIED).to_be_bytes());
            changed = true;
        }
    }
    if changed {
        let bytes = Buffer::from(&table[..]);
        walk.file
            .write(offset, bytes, RequestFlags::empty())
            .await?;
    }
    Ok(())
}

/// Writes the sectors of the L1 table that hold changed entries; `changed` is ascending.
async fn write_l1(file: &Child, header: &Header, l1: &[u64], changed: &[usize]) -> Result<()> {
    let per_sector = L1_SECTOR / 8;
    let mut last = None;
    for index in changed {
        let sector = index / per_sector;
        if last == Some(sector) {
            continue;
        }
        last = Some(sector);
        let first = sector * per_sector;
        let entries = &l1[first..l1.len().min(first + per_sector)];
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        let at = header.l1_table_offset.0 + (first * 8) as u64;
        file.write(at, bytes, RequestFlags::empty()).await?;
    }
    Ok(())
}
