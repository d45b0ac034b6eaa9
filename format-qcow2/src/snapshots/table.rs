//! Reading and encoding the snapshot table as a whole.

use block_core::{
    error::{Error, ErrorKind, Result},
    request::Child,
};

use crate::layout::{
    Header, SnapshotEntry,
    header::MAX_SNAPSHOTS,
    snapshot::{MAX_ENTRY, MAX_TABLE_BYTES},
};

/// Read at once: any entry fits.
const CHUNK: usize = 256 << 10;

/// Reads the table that a header points to. Bytes beyond the end of the file count as zeroes.
///
/// # Errors
/// EFBIG for a table or an entry's extra data beyond the limits; whatever the storage reports.
pub(crate) async fn load(file: &Child, header: &Header) -> Result<Vec<SnapshotEntry>> {
    const { assert!(MAX_ENTRY <= CHUNK) };
    let mut snapshots = Vec::new();
    let mut done = 0;
    let mut chunk = Vec::new();
    let mut at = 0;
    for index in 0..header.nb_snapshots {
        let entry = match SnapshotEntry::decode(&chunk[at..], index)? {
            Some(decoded) => Some(decoded),
            None => {
                let from = header.snapshots_offset.0 + done;
                chunk = file.read_padded(from, CHUNK).await?.to_vec();
                at = 0;
                SnapshotEntry::decode(&chunk, index)?
            }
        };
        let (entry, len) =
            entry.ok_or_else(|| Error::io("a snapshot table entry is longer than it can be"))?;
        done += len as u64;
        at = (at + len).min(chunk.len());
        check_size(done)?;
        snapshots.push(entry);
    }
    Ok(snapshots)
}

fn check_size(bytes: u64) -> Result<()> {
    if bytes > MAX_TABLE_BYTES {
        return Err(
            Error::new(ErrorKind::TooBig, "Snapshot table is too big").with_field(
                "snapshot table",
                bytes,
                format!("at most {MAX_TABLE_BYTES} bytes"),
            ),
        );
    }
    Ok(())
}

/// The bytes of a table.
///
/// # Errors
/// EFBIG beyond the limits; EINVAL for names that are too long.
pub(super) fn encode(snapshots: &[SnapshotEntry]) -> Result<Vec<u8>> {
    if snapshots.len() > MAX_SNAPSHOTS as usize {
        return Err(
            Error::new(ErrorKind::TooBig, "Snapshot table too large").with_field(
                "nb_snapshots",
                snapshots.len(),
                format!("at most {MAX_SNAPSHOTS}"),
            ),
        );
    }
    let mut bytes = Vec::new();
    for entry in snapshots {
        entry.encode(&mut bytes)?;
        check_size(bytes.len() as u64)?;
    }
    Ok(bytes)
}
