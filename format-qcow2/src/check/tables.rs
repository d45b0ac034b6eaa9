//! Reads many L2 tables with several in flight, neighbours in the file at once, and has each looked at by the environment's CPU workers. What was found
//! comes back in the order of the list, so that reports don't depend on timing.

use std::sync::Arc;

use block_core::{
    buffer::Buffer,
    env::offload,
    error::{Error, Result},
    request::Child,
};
use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;

use super::table::Table;

/// Bytes of tables that one task reads and looks at.
const BATCH: u64 = 512 << 10;
/// Tasks in flight.
const IN_FLIGHT: usize = 8;
/// What takes less isn't worth the way to a worker and back.
const INLINE: u64 = 128 << 10;

/// Buffers that are used again: allocating and freeing large aligned ones all the time leaves holes that nothing fits into.
#[derive(Default)]
struct Pool(Mutex<Vec<Buffer>>);

impl Pool {
    fn take(&self, len: usize) -> Result<Buffer> {
        let known = self.0.lock().pop();
        known.map_or_else(|| Buffer::try_new(len), Ok)
    }

    fn give(&self, buffer: Buffer) {
        self.0.lock().push(buffer);
    }
}

/// Where the bytes of some tables are.
enum Bytes {
    /// In the batch's buffer, from here on.
    Shared(usize),
    /// Read once more.
    Own(Buffer),
    Failed(Error),
}

/// Tables that were read together: where each begins in the bytes.
struct Piece {
    bytes: Bytes,
    tables: Vec<(Table, usize)>,
}

/// Reads `tables` into `buffer`, which has room for all of them.
async fn read(
    file: &Child,
    tables: &[Table],
    len: usize,
    buffer: Buffer,
) -> Result<(Buffer, Vec<Piece>)> {
    let mut pieces = Vec::new();
    let mut rest = tables;
    let (lent, mut free) = buffer.lend();
    let mut used = 0;
    while let Some(first) = rest.first() {
        let follows =
            |(at, table): (usize, &Table)| table.offset == first.offset + (at * len) as u64;
        let row = rest
            .iter()
            .enumerate()
            .take_while(|pair| follows(*pair))
            .count();
        let mut part = free.split_to(row * len);
        let inside = file.length().saturating_sub(first.offset);
        let inside = inside.min(part.len() as u64) as usize;
        let mut behind = part.split_off(inside);
        behind.fill(0);
        drop(behind);
        let done = if part.is_empty() {
            drop(part);
            Ok(())
        } else {
            file.read(first.offset, part).await
        };
        let start = used;
        used += row * len;
        match done {
            Ok(()) => pieces.push(Piece {
                bytes: Bytes::Shared(start),
                tables: rest[..row]
                    .iter()
                    .enumerate()
                    .map(|(at, table)| (*table, at * len))
                    .collect(),
            }),
            Err(error) if row == 1 => pieces.push(Piece {
                bytes: Bytes::Failed(error),
                tables: vec![(*first, 0)],
            }),
            Err(_) => {
                // One bad sector must not hide its neighbours.
                for table in &rest[..row] {
                    let bytes = file.read_padded(table.offset, len).await;
                    pieces.push(Piece {
                        bytes: bytes.map_or_else(Bytes::Failed, Bytes::Own),
                        tables: vec![(*table, 0)],
                    });
                }
            }
        }
        rest = &rest[row..];
    }
    drop(free);
    let buffer = lent
        .reclaim()
        .map_err(|_| Error::io("a driver kept a part of a read buffer"))?;
    Ok((buffer, pieces))
}

fn look<T>(
    buffer: &[u8],
    pieces: Vec<Piece>,
    len: usize,
    scan: impl Fn(&[u8], Table) -> T,
) -> Vec<(Table, Result<T>)> {
    let mut found = Vec::new();
    for piece in pieces {
        for (table, at) in piece.tables {
            let bytes = match &piece.bytes {
                Bytes::Shared(start) => &buffer[start + at..start + at + len],
                Bytes::Own(bytes) => &bytes[at..at + len],
                Bytes::Failed(error) => {
                    found.push((table, Err(error.duplicate())));
                    continue;
                }
            };
            found.push((table, Ok(scan(bytes, table))));
        }
    }
    found
}

/// Reads each of `tables`, `len` bytes long, and gives back what `scan` says of it, or why it can't be read. What lies
/// beyond the end of the file counts as zeroes.
pub(super) fn scan_tables<'a, T: Send + 'static>(
    file: &'a Child,
    tables: &'a [Table],
    len: u64,
    scan: impl Fn(&[u8], Table) -> T + Clone + Send + 'static,
) -> impl Stream<Item = Result<Vec<(Table, Result<T>)>>> + Unpin + 'a {
    let batch = ((BATCH / len).max(1) as usize).min(tables.len().max(1));
    let pool = Arc::new(Pool::default());
    let tasks = tables.chunks(batch).map(move |tables| {
        let (scan, pool) = (scan.clone(), pool.clone());
        async move {
            let len = len as usize;
            let buffer = pool.take(batch * len)?;
            let (buffer, pieces) = read(file, tables, len, buffer).await?;
            let work = move || {
                let found = look(&buffer, pieces, len, scan);
                pool.give(buffer);
                found
            };
            if (tables.len() * len) as u64 <= INLINE {
                return Ok(work());
            }
            offload(file.node().env(), work).await
        }
    });
    Box::pin(stream::iter(tasks).buffered(IN_FLIGHT))
}
