//! Finds compressed clusters whose bytes overlap although they share their host clusters as the refcounts say: one has been written
//! over the other.
//!
//! Pieces are packed tightly, and an entry says only in which sector a piece ends: two that meet in a sector are neighbours. What is
//! certain is that a piece begins where its entry says, and that it has at least a byte in its last sector. Another piece that
//! begins before that is a finding, and so is one piece for two guest clusters. (Where a piece ends within its last sector only its
//! decompression says: `tails` does that where it is asked for.) The pieces are looked at in windows of the file, so that memory is bounded; an image whose pieces lie
//! in order takes one more pass over its L2 tables, and an image without compressed clusters none.

use std::collections::BTreeMap;

use block_core::{
    error::{Error, Result},
    image::{CheckReport, Progress, Severity},
};
use futures::StreamExt;

use super::{
    counts::Bits,
    owners::{Claim, Owner, Position, Spot, name_snapshots},
    table::{Shape, Table, compressed_run},
    tables::scan_tables,
    tails::{self, Doubt},
    walk::{Walk, stop_if_cancelled},
};
use crate::{
    compress::Codec,
    layout::entry::{COMPRESSED, COPIED},
};

/// Pieces that are held against each other at once.
const WINDOW: usize = 1 << 18;
/// Pieces that are dealt with at once, and entries that refer to them.
const MAX_PIECES: usize = 1 << 12;
const MAX_SPOTS: usize = 1 << 16;

/// A piece: where it begins, the end of what is certainly its own, whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    start: u64,
    guest: u64,
    end: u64,
}

/// Where a piece begins, and the end of what is certainly its own.
fn certain(raw: u64, shape: Shape) -> Option<(u64, u64)> {
    let (start, len) = compressed_run(raw, shape.cluster_bits);
    if raw & COMPRESSED == 0 || shape.data_file || shape.is_outside(start, len) {
        return None;
    }
    let last_sector = (start + len - 1) / 512 * 512;
    Some((start, start.max(last_sector) + 1))
}

/// Calls `visit` with the compressed entries that begin in `from..until`: guest offset, entry, the tables' place and the entry's.
/// What can't be read now, although it could when the mapping was walked, is reported.
async fn visit(
    walk: &Walk<'_>,
    (from, until): (u64, u64),
    report: &mut CheckReport,
    progress: &Progress,
    mut visit: impl FnMut(u64, u64, Table, u64) -> u64,
) -> Result<()> {
    let shape = walk.shape;
    let mut visited = Bits::default();
    let mut until = until;
    for tree in &walk.trees {
        stop_if_cancelled(progress)?;
        let l1 = match walk.read_l1(tree).await {
            Ok(l1) => l1,
            Err(error) => {
                unread(report, &error);
                continue;
            }
        };
        let mut tables = Vec::new();
        for (index, raw) in l1.iter().enumerate() {
            if let Some(offset) = walk.leads_to_table(*raw)
                && visited.insert(offset >> shape.cluster_bits)?
            {
                tables.push(Table {
                    offset,
                    l1_index: index as u64,
                });
            }
        }
        let look = move |bytes: &[u8], _| -> Vec<(u64, u64)> {
            let entries = shape.entries(bytes).enumerate();
            let wanted =
                |raw| certain(raw, shape).is_some_and(|(start, _)| (from..until).contains(&start));
            entries
                .filter(|(_, (raw, _))| wanted(*raw))
                .map(|(index, (raw, _))| (index as u64, raw))
                .collect()
        };
        let mut found = scan_tables(walk.file, &tables, shape.cluster_size(), look);
        let mut least = until;
        while let Some(batch) = found.next().await {
            stop_if_cancelled(progress)?;
            for (table, entries) in batch? {
                if let Err(error) = &entries
                    && !walk.unreadable.contains(table.offset >> shape.cluster_bits)
                {
                    unread(report, error);
                }
                for (index, raw) in entries.into_iter().flatten() {
                    least = visit(shape.guest(table, index), raw, table, index).min(least);
                }
            }
        }
        drop(found);
        until = least;
    }
    Ok(())
}

fn unread(report: &mut CheckReport, error: &Error) {
    let reason = error.reason();
    let message = format!("ERROR: I/O error while compressed clusters were compared: {reason}");
    report.add(Severity::CheckError, false, message);
}

/// Pieces in a window of the file.
struct Window {
    pieces: Vec<Piece>,
    /// Pieces that begin here or later aren't among them.
    until: u64,
}

impl Window {
    fn add(&mut self, piece: Piece) {
        if piece.start >= self.until {
            return;
        }
        self.pieces.push(piece);
        if self.pieces.len() >= 2 * WINDOW {
            self.settle();
            if let Some(behind) = self.pieces.get(WINDOW) {
                self.until = behind.start;
                self.pieces.truncate(WINDOW);
                self.pieces.retain(|piece| piece.start < self.until);
            }
        }
    }

    /// Sorts, and forgets what says nothing new: two owners of one piece are enough to tell.
    fn settle(&mut self) {
        self.pieces.sort_unstable();
        self.pieces.dedup_by_key(|piece| (piece.start, piece.guest));
        let mut last = (u64::MAX, 0);
        self.pieces.retain(|piece| {
            let times = if piece.start == last.0 { last.1 + 1 } else { 0 };
            last = (piece.start, times);
            times < 2
        });
    }
}

/// The pieces that overlap, in groups, with the cluster that each group begins in; not more than are dealt with at once. With a codec,
/// pieces that meet another in their last sector are decompressed to see whether they end before it.
pub(super) async fn find(
    walk: &Walk<'_>,
    codec: Option<Codec>,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<Vec<(u64, Claim)>> {
    let mut groups = Vec::new();
    if !walk.compressed {
        return Ok(groups);
    }
    let overlapping = overlapping(walk, codec, report, progress).await?;
    if overlapping.is_empty() {
        return Ok(groups);
    }
    let first = overlapping.first_key_value().map_or(0, |(start, _)| *start);
    let behind = overlapping
        .last_key_value()
        .map_or(0, |(start, _)| start + 1);
    let mut owners: Vec<(u64, u64, Owner)> = Vec::new();
    let shape = walk.shape;
    visit(
        walk,
        (first, behind),
        report,
        progress,
        |guest, raw, table, index| {
            if let Some((start, end)) = certain(raw, shape)
                && let Some(reach) = overlapping.get(&start)
                && owners.len() < MAX_SPOTS
            {
                let spot = Spot {
                    at: table.offset + index * shape.entry_size() as u64,
                    raw: raw & !COPIED,
                    times: walk.l2_references.get(table.offset >> shape.cluster_bits),
                    within: table.offset,
                };
                let position = Position::Compressed(guest);
                owners.push((
                    start,
                    end.max(*reach),
                    Owner {
                        position,
                        spots: vec![spot],
                        snapshots: Vec::new(),
                    },
                ));
            }
            u64::MAX
        },
    )
    .await?;
    // Several entries for one piece of one guest cluster are snapshots of it.
    owners.sort_by_key(|(start, _, owner)| (*start, owner.position));
    owners.dedup_by(|(start, end, next), (before, kept_end, kept)| {
        let same = start == before && next.position == kept.position;
        if same {
            kept.spots.append(&mut next.spots);
            *kept_end = (*kept_end).max(*end);
        }
        same
    });
    let mut reach = 0;
    for (start, end, owner) in owners {
        if start >= reach {
            let claim = Claim {
                packed: true,
                ..Claim::default()
            };
            groups.push((start >> shape.cluster_bits, claim));
        }
        reach = reach.max(end);
        if let Some((_, claim)) = groups.last_mut() {
            claim.owners.push(owner);
        }
    }
    groups.retain(|(_, claim)| claim.owners.len() > 1);
    name_snapshots(walk, groups.iter_mut().map(|(_, claim)| claim).collect()).await;
    Ok(groups)
}

/// Where pieces begin that overlap another one, and the end of what they are known to have.
async fn overlapping(
    walk: &Walk<'_>,
    codec: Option<Codec>,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<BTreeMap<u64, u64>> {
    let shape = walk.shape;
    let mut overlapping: BTreeMap<u64, u64> = BTreeMap::new();
    let mut reach: Option<Piece> = None;
    let mut previous: Option<Piece> = None;
    let mut from = 0;
    loop {
        let mut window = Window {
            pieces: Vec::new(),
            until: u64::MAX,
        };
        visit(
            walk,
            (from, u64::MAX),
            report,
            progress,
            |guest, raw, _, _| {
                if let Some((start, end)) = certain(raw, shape) {
                    window.add(Piece { start, guest, end });
                }
                window.until
            },
        )
        .await?;
        window.settle();
        let mut doubts = Vec::new();
        for piece in &window.pieces {
            if codec.is_some()
                && let Some(before) = previous
                && (before.end..before.end.next_multiple_of(512)).contains(&piece.start)
            {
                doubts.push(Doubt {
                    start: before.start,
                    until: piece.start,
                });
            }
            previous = Some(*piece);
            if let Some(before) = reach
                && piece.start < before.end
                && (piece.start, piece.guest) != (before.start, before.guest)
            {
                overlapping.extend([(before.start, before.end), (piece.start, piece.end)]);
                if overlapping.len() >= MAX_PIECES {
                    return Ok(overlapping);
                }
            }
            if reach.is_none_or(|before| piece.end >= before.end) {
                reach = Some(*piece);
            }
        }
        if let Some(codec) = codec {
            let size = shape.cluster_size() as usize;
            let found = tails::settle(walk.file, codec, size, &doubts, report, progress).await?;
            for doubt in found {
                overlapping.insert(doubt.start, doubt.until + 1);
                overlapping.entry(doubt.until).or_insert(doubt.until + 1);
                if overlapping.len() >= MAX_PIECES {
                    return Ok(overlapping);
                }
            }
        }
        if window.until == u64::MAX {
            return Ok(overlapping);
        }
        from = window.until;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            cluster_bits: 16,
            extended: false,
            zero_flag: true,
            data_file: false,
            file_len: 1 << 40,
            repair: false,
        }
    }

    /// An entry for `len` bytes at `offset`.
    fn raw(offset: u64, len: u64) -> u64 {
        let sectors = (offset + len - 1) / 512 - offset / 512;
        COMPRESSED | sectors << 54 | offset
    }

    #[test]
    fn a_piece_certainly_has_all_up_to_its_last_sector() {
        assert_eq!(certain(raw(0x5000, 10), shape()), Some((0x5000, 0x5001)));
        assert_eq!(certain(raw(0x51f0, 0x20), shape()), Some((0x51f0, 0x5201)));
        assert_eq!(certain(raw(0x5010, 1024), shape()), Some((0x5010, 0x5401)));
        assert_eq!(certain(0x50000, shape()), None);
    }

    #[test]
    fn a_window_forgets_what_lies_behind_and_what_says_nothing_new() {
        let mut window = Window {
            pieces: Vec::new(),
            until: u64::MAX,
        };
        let piece = |start, guest| Piece {
            start,
            guest,
            end: start + 1,
        };
        // Many owners of one piece, as damage may make them, and more pieces than a window holds.
        for guest in 0..2 * WINDOW as u64 {
            window.add(piece(7, guest));
        }
        assert_eq!(window.pieces.len(), 2);
        for start in (0..3 * WINDOW as u64).rev() {
            window.add(piece(100 + start, start));
        }
        window.settle();
        assert!(window.pieces.len() <= 2 * WINDOW);
        assert!(window.until < 100 + 3 * WINDOW as u64);
        assert_eq!(window.pieces[0], piece(7, 0));
        assert!(window.pieces.iter().all(|piece| piece.start < window.until));
    }
}
