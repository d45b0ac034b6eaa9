//! Finds out whether a compressed cluster ends before its neighbour begins, where both meet in one sector.
//!
//! An entry only says in which sector a cluster's bytes end; where in it, only the decoder can tell. So the bytes up to the neighbour are
//! decompressed: if they fill the cluster, nothing of it was written over. It costs about as much as reading the disk once, with all
//! workers, and is done only when it is asked for. Memory doesn't grow with the image.

use block_core::{
    env::offload,
    error::Result,
    image::{CheckReport, Progress, Severity},
    request::Child,
};
use futures::{StreamExt, stream};

use super::walk::stop_if_cancelled;
use crate::compress::{Codec, Filled};

/// Bytes that one task reads, unless a single cluster takes more.
const BATCH: u64 = 1 << 20;
/// Clusters that one task decompresses: hostile entries begin at every byte.
const MAX_BATCH: usize = 256;
/// Tasks in flight.
const IN_FLIGHT: usize = 8;

/// A compressed cluster that begins at `start`, and the first byte behind it that is another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doubt {
    pub start: u64,
    pub until: u64,
}

/// Doubts, ascending, in groups that are read at once.
fn batches(doubts: &[Doubt]) -> impl Iterator<Item = Vec<Doubt>> + '_ {
    let mut rest = doubts;
    std::iter::from_fn(move || {
        let first = rest.first()?;
        let fits = |doubt: &&Doubt| doubt.until.saturating_sub(first.start) <= BATCH;
        let count = rest.iter().take(MAX_BATCH).take_while(fits).count();
        let (batch, behind) = rest.split_at(count.max(1));
        rest = behind;
        Some(batch.to_vec())
    })
}

/// Those whose bytes go on behind `until`. What can't be read is told; what is damaged before that is another matter.
async fn settle_batch(
    file: Child,
    codec: Codec,
    cluster_size: usize,
    batch: Vec<Doubt>,
) -> Result<Vec<Doubt>> {
    let (Some(first), Some(last)) = (batch.first(), batch.last()) else {
        return Ok(Vec::new());
    };
    let base = first.start;
    let bytes = file.read_padded(base, (last.until - base) as usize).await?;
    offload(file.node().env(), move || {
        let mut overlapped = Vec::new();
        for doubt in batch {
            let run = &bytes[(doubt.start - base) as usize..(doubt.until - base) as usize];
            if codec.fills(run, cluster_size)? == Filled::InPart {
                overlapped.push(doubt);
            }
        }
        Ok(overlapped)
    })
    .await?
}

/// Those of `doubts` (ascending by start) that overlap their neighbour.
///
/// # Errors
/// ECANCELED, ENOMEM.
pub(super) async fn settle(
    file: &Child,
    codec: Codec,
    cluster_size: usize,
    doubts: &[Doubt],
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<Vec<Doubt>> {
    progress.add_total(doubts.len() as u64);
    let tasks = batches(doubts).map(|batch| {
        let (file, count) = (file.clone(), batch.len() as u64);
        async move { (count, settle_batch(file, codec, cluster_size, batch).await) }
    });
    let mut tasks = Box::pin(stream::iter(tasks).buffered(IN_FLIGHT));
    let mut overlapped = Vec::new();
    while let Some((count, settled)) = tasks.next().await {
        stop_if_cancelled(progress)?;
        progress.advance(count);
        match settled {
            Ok(found) => overlapped.extend(found),
            Err(error) => report.add(
                Severity::CheckError,
                false,
                format!(
                    "ERROR: I/O error while compressed clusters were compared: {}",
                    error.reason()
                ),
            ),
        }
    }
    Ok(overlapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_bounded_by_bytes_and_by_number() {
        let doubt = |start, len| Doubt {
            start,
            until: start + len,
        };
        let far: Vec<Doubt> = (0..10).map(|n| doubt(n * BATCH, 100)).collect();
        assert_eq!(batches(&far).count(), 10);
        let dense: Vec<Doubt> = (0..1000).map(|n| doubt(n, 1)).collect();
        let sizes: Vec<usize> = batches(&dense).map(|batch| batch.len()).collect();
        assert_eq!(sizes, [256, 256, 256, 232]);
        let large = [doubt(0, 3 * BATCH), doubt(3 * BATCH, 5)];
        assert_eq!(batches(&large).count(), 2);
    }
}
