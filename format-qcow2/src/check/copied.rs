//! Compares the COPIED flags of L1 and L2 entries with the stored refcounts: the flag says that a refcount is exactly
//! 1, and is what allows overwriting in place. Only the active tables count; the tables are read with several in flight.

use std::sync::Arc;

use block_core::{
    error::Result,
    flags::RequestFlags,
    image::{CheckReport, Progress, Severity},
};
use futures::StreamExt;

use super::{
    counts::Bits,
    stored::Stored,
    table::{Table, doubtful_flags},
    tables::scan_tables,
    walk::{Walk, stop_if_cancelled},
};
use crate::layout::{
    Header,
    entry::{COPIED, OFFSET_MASK},
};

/// Checks all flags of the active tables, and corrects them when `fix` is set. The refcounts in `stored` must be the
/// ones that the image keeps, and `unique` the clusters whose refcount among them is 1.
pub(super) async fn check_copied(
    walk: &mut Walk<'_>,
    header: &Header,
    stored: &mut Stored<'_>,
    unique: Bits,
    fix: bool,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<()> {
    let bits = walk.shape.cluster_bits;
    let mut seen = Bits::default();
    let mut tables = Vec::new();
    let verb = if fix { "Repairing" } else { "ERROR" };
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
                            "{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} refcount={refcount}"
                        ),
                    );
                    if fix {
                        walk.l1[index] = raw ^ COPIED;
                        let at = header.l1_table_offset.0 + index as u64 * 8;
                        let bytes = (raw ^ COPIED).to_be_bytes().to_vec();
                        walk.file.write(at, bytes, RequestFlags::empty()).await?;
                    }
                }
            }
            // Counted where the refcounts were compared.
            Err(_) => continue,
        }
        if !walk.shape.is_aligned(offset) || offset >= walk.shape.file_len {
            continue;
        }
        if seen.insert(offset >> bits)? {
            tables.push(Table {
                offset,
                l1_index: index as u64,
            });
        }
    }
    let (shape, known) = (walk.shape, walk.clusters());
    let unique = Arc::new(unique);
    let look = move |bytes: &[u8], _| doubtful_flags(bytes, shape, &unique, known);
    let mut found = scan_tables(walk.file, &tables, shape.cluster_size(), look);
    while let Some(batch) = found.next().await {
        stop_if_cancelled(progress)?;
        for (table, found) in batch? {
            progress.advance(1);
            match found {
                Ok(doubtful) => {
                    for (index, raw) in doubtful {
                        let refcount = if shape.data_file {
                            Ok(1)
                        } else {
                            stored.get((raw & OFFSET_MASK) >> bits).await
                        };
                        let Ok(refcount) = refcount else {
                            continue;
                        };
                        if (refcount == 1) == (raw & COPIED != 0) {
                            continue;
                        }
                        report.add(
                            Severity::Corruption,
                            fix,
                            format!(
                                "{verb} OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={refcount}"
                            ),
                        );
                        if fix {
                            let at = table.offset + (index * shape.entry_size()) as u64;
                            let bytes = (raw ^ COPIED).to_be_bytes().to_vec();
                            walk.file.write(at, bytes, RequestFlags::empty()).await?;
                        }
                    }
                }
                // What the walk couldn't read either is counted; what it could read has flags that nobody looked at.
                Err(error) if !walk.unreadable.contains(table.offset >> bits) => {
                    report.add(
                        Severity::CheckError,
                        false,
                        format!(
                            "ERROR: I/O error while the copied flags were checked: {}",
                            error.reason()
                        ),
                    );
                }
                Err(_) => {}
            }
        }
    }
    Ok(())
}
