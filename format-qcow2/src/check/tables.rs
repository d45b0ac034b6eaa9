//! Reads many L2 tables with several in flight, and has each looked at by the environment's CPU workers. What was found
//! comes back in the order of the list, so that reports don't depend on timing.

use block_core::{
    buffer::Buffer,
    env::offload,
    error::{Error, Result},
    request::Child,
};
use futures::{Stream, StreamExt, stream};

use super::table::Table;

/// Bytes of tables that one task reads and looks at.
const BATCH: u64 = 512 << 10;
/// Tasks in flight.
const IN_FLIGHT: usize = 8;
/// What takes less isn't worth the way to a worker and back.
const INLINE: u64 = 128 << 10;
/// Tables that follow each other in the file are read together, up to this many bytes.
const MERGE: u64 = 2 << 20;

/// Bytes with the tables in them: where each begins.
struct Piece {
    bytes: Result<Buffer>,
    tables: Vec<(Table, usize)>,
}

async fn read(file: &Child, tables: &[Table], len: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = tables;
    while let Some(first) = rest.first() {
        let most = (MERGE as usize / len).max(1);
        let follows =
            |(at, table): (usize, &Table)| table.offset == first.offset + (at * len) as u64;
        let mut row = rest
            .iter()
            .enumerate()
            .take(most)
            .take_while(|pair| follows(*pair))
            .count();
        let mut bytes = file.read_padded(first.offset, row * len).await;
        if bytes.is_err() && row > 1 {
            // One bad sector must not hide its neighbours.
            row = 1;
            bytes = file.read_padded(first.offset, len).await;
        }
        let found = rest[..row].iter().enumerate();
        pieces.push(Piece {
            bytes,
            tables: found.map(|(at, table)| (*table, at * len)).collect(),
        });
        rest = &rest[row..];
    }
    pieces
}

fn look<T>(
    pieces: Vec<Piece>,
    len: usize,
    scan: impl Fn(&[u8], Table) -> T,
) -> Vec<(Table, Result<T>)> {
    let mut found = Vec::new();
    for piece in pieces {
        match piece.bytes {
            Ok(bytes) => found.extend(
                piece
                    .tables
                    .iter()
                    .map(|(table, at)| (*table, Ok(scan(&bytes[*at..at + len], *table)))),
            ),
            Err(error) => {
                let failed = |error: &Error| error.duplicate();
                found.extend(
                    piece
                        .tables
                        .iter()
                        .map(|(table, _)| (*table, Err(failed(&error)))),
                );
            }
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
    let batch = (BATCH / len).max(1) as usize;
    let tasks = tables.chunks(batch).map(move |tables| {
        let scan = scan.clone();
        async move {
            let pieces = read(file, tables, len as usize).await;
            if tables.len() as u64 * len <= INLINE {
                return Ok(look(pieces, len as usize, scan));
            }
            offload(file.node().env(), move || look(pieces, len as usize, scan)).await
        }
    });
    Box::pin(stream::iter(tasks).buffered(IN_FLIGHT))
}
