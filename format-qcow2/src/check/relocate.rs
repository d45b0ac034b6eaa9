//! Repairs that need room of their own: copies for the owners of doubly used clusters, a new snapshot table, a new bitmap
//! directory.
//!
//! All of it is written behind the end of the file, where nothing points to; then the refcounts of that room are made
//! durable, and only then entries and header are switched to it. A power cut leaves the image as it was, with some space
//! leaked, or a part of its owners separated. What was in use before and isn't any more has a refcount that is too
//! high until the pass after this one lowers it.

use std::collections::{BTreeMap, HashSet};

use block_core::{
    error::{ErrorKind, Result},
    flags::RequestFlags,
    image::{CheckReport, Progress, Severity},
};

use super::{
    bitmaps::NewDirectory,
    owners::{Claim, Owner, Position},
    rebuild::{self, free_row},
    snapshots::NewTable,
    stored::{BlockPlace, Stored},
    table::compressed_run,
    walk::{Crowded, Walk, stop_if_cancelled},
};
use crate::{
    header_update,
    layout::{
        Autoclear, Header, HostOffset,
        entry::{COPIED, OFFSET_MASK},
        extensions::BitmapsPointer,
    },
};

/// Where `nb_snapshots` and `snapshots_offset` are in the header.
const SNAPSHOTS_FIELD: u64 = 60;

/// Copies are made up to the size that the file had at first, or this many clusters if that is more: garbage that is taken for an
/// L2 table may claim each cluster thousands of times. Who gets no copy shares, as with qemu-img.
const MIN_COPIES: u64 = 256;

/// What is moved for one owner.
struct Move {
    from: u64,
    clusters: u64,
    references: u64,
    owner: Owner,
}

/// Everything that is going to be written.
pub(super) struct Plan {
    moves: Vec<Move>,
    claims: Vec<(u64, Claim)>,
    /// L1 tables that get a place of their own.
    tables: Vec<Crowded>,
    snapshots: Option<NewTable>,
    bitmaps: Option<NewDirectory>,
    /// Clusters that may be used for copies in the rounds after this one.
    pub copies_left: u64,
}

/// The owners of a cluster that have to leave it.
fn leaving(claim: &Claim, host_bound: bool) -> Vec<&Owner> {
    if claim.packed {
        return claim.owners.iter().skip(1).collect();
    }
    let stays_metadata = claim.metadata.iter().any(|kind| !kind.is_refcounts());
    let is_data = |owner: &&Owner| !matches!(owner.position, Position::Table(_));
    if host_bound && claim.owners.iter().any(|owner| is_data(&owner)) {
        // Data whose ciphertext depends on where it is stays; tables can go.
        let tables = claim.owners.iter().filter(|owner| !is_data(owner));
        return tables.collect();
    }
    let mut stays = None;
    if !stays_metadata {
        // Owners are in the order of their kinds: the table, else what is compressed, else the first data.
        stays = claim.owners.first().map(|owner| owner.position);
    }
    claim
        .owners
        .iter()
        .filter(|owner| match (stays, owner.position) {
            (Some(Position::Compressed(_)), Position::Compressed(_)) => false,
            (Some(stays), position) => stays != position,
            (None, _) => true,
        })
        .collect()
}

impl Plan {
    /// What to do about `claims` with at most `copies` clusters for copies, and about what the walk found broken.
    pub fn new(
        walk: &mut Walk<'_>,
        header: &Header,
        claims: &BTreeMap<u64, Claim>,
        packed: &[(u64, Claim)],
        copies: u64,
    ) -> Self {
        let bits = walk.shape.cluster_bits;
        // The initialisation vector of LUKS is the place in the file.
        let host_bound = header.crypt_method == 2;
        let most = walk.clusters().max(MIN_COPIES).min(copies);
        let max = walk.geometry.refcount_max();
        let mut moves: Vec<Move> = Vec::new();
        let mut moved = HashSet::new();
        let mut total = 0;
        let mut separated = Vec::new();
        let packed = packed.iter().map(|(cluster, claim)| (cluster, claim));
        for (cluster, claim) in claims.iter().chain(packed) {
            let mut complete = !claim.owners.is_empty();
            let owners = leaving(claim, host_bound);
            complete &= !owners.is_empty() || claim.metadata.iter().all(|kind| kind.is_refcounts());
            for owner in owners {
                let Some(spot) = owner.spots.first() else {
                    continue;
                };
                if moved.contains(&spot.at) {
                    continue;
                }
                let (from, clusters) = match owner.position {
                    Position::Compressed(_) => {
                        let (offset, len) = compressed_run(spot.raw, bits);
                        (offset, (offset % 512 + len).div_ceil(1 << bits))
                    }
                    _ => (cluster << bits, 1),
                };
                let references = owner.spots.iter().map(|spot| spot.times).sum();
                // All entries of a guest cluster say the same; others are another case of damage.
                let alike = owner
                    .spots
                    .iter()
                    .all(|other| (other.raw ^ spot.raw) & !COPIED == 0);
                let point = matches!(owner.position, Position::Compressed(_));
                if references > max || total + clusters > most || (point && !alike) {
                    complete = false;
                    continue;
                }
                total += clusters;
                moved.extend(owner.spots.iter().map(|spot| spot.at));
                moves.push(Move {
                    from,
                    clusters,
                    references,
                    owner: owner.clone(),
                });
            }
            if complete {
                separated.push((*cluster, claim.clone()));
            }
        }
        let mut snapshots = walk.new_snapshots.take();
        let mut tables = Vec::new();
        for table in &walk.crowded {
            let clusters = table.len.div_ceil(walk.shape.cluster_size());
            // A table that is made anew knows nothing of where entries were: the next round's turn.
            let possible = table.snapshot.is_none() || snapshots.is_none();
            if possible && total + clusters <= most {
                total += clusters;
                tables.push(*table);
            }
        }
        if tables.iter().any(|table| table.snapshot.is_some()) {
            snapshots = Some(std::mem::take(&mut walk.snapshot_table));
        }
        Self {
            moves,
            claims: separated,
            tables,
            snapshots,
            bitmaps: walk.new_bitmaps.take(),
            copies_left: most - total,
        }
    }

    /// Nothing needs room.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty()
            && self.tables.is_empty()
            && self.snapshots.is_none()
            && self.bitmaps.is_none()
    }

    /// Snapshots were given up: what looks leaked afterwards may be theirs.
    pub fn discards_snapshots(&self) -> bool {
        self.snapshots.as_ref().is_some_and(|table| table.discarded)
    }

    fn clusters(&self, cluster_size: u64) -> u64 {
        let moves: u64 = self.moves.iter().map(|part| part.clusters).sum();
        let table = self.snapshots.as_ref().map_or(0, |table| table.bytes.len());
        let directory = self
            .bitmaps
            .as_ref()
            .map_or(0, |directory| directory.bytes.len());
        let tables: u64 = self
            .tables
            .iter()
            .map(|table| table.len.div_ceil(cluster_size))
            .sum();
        moves
            + tables
            + (table as u64).div_ceil(cluster_size)
            + (directory as u64).div_ceil(cluster_size)
    }

    /// Carries it out; `stored` is out of date afterwards. `false` when there is no room for it that refcounts could be given to; nothing was changed then.
    ///
    /// # Errors
    /// Those of the storage; the image is then as after a power cut.
    pub async fn execute(
        &self,
        walk: &Walk<'_>,
        stored: &mut Stored<'_>,
        header: &mut Header,
        rebuild: bool,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<bool> {
        let (file, bits) = (walk.file, walk.shape.cluster_bits);
        let cluster_size = walk.shape.cluster_size();
        let total = self.clusters(cluster_size);
        let mut fresh = BTreeMap::new();
        let mut links = Vec::new();
        let mut next = match free_row(walk, 0, total) {
            Ok(next) => next,
            Err(error) if error.kind() == ErrorKind::InvalidInput => return Ok(false),
            Err(error) => return Err(error),
        };
        for part in &self.moves {
            stop_if_cancelled(progress)?;
            let to = (next << bits) + part.from % 512;
            let from = part.from;
            let whole = (part.clusters * cluster_size) as usize;
            let (len, at) = match part.owner.position {
                Position::Compressed(_) => (whole - (to % 512) as usize, to),
                _ => (whole, to),
            };
            let bytes = file.read_padded(from, len).await?;
            file.write(at, bytes, RequestFlags::empty()).await?;
            for cluster in next..next + part.clusters {
                fresh.insert(cluster, part.references);
            }
            next += part.clusters;
            for spot in &part.owner.spots {
                let raw = match part.owner.position {
                    Position::Compressed(_) => spot.raw - from + to,
                    _ => {
                        let copied = if part.references == 1 { COPIED } else { 0 };
                        spot.raw & !(OFFSET_MASK | COPIED) | to | copied
                    }
                };
                links.push((spot.at, raw));
            }
        }
        let mut place = |len: usize| {
            let first = next;
            let clusters = (len as u64).div_ceil(cluster_size);
            fresh.extend((first..first + clusters).map(|cluster| (cluster, 1)));
            next += clusters;
            first << bits
        };
        let table_at = self
            .snapshots
            .as_ref()
            .map(|table| place(table.bytes.len()));
        let directory_at = self
            .bitmaps
            .as_ref()
            .map(|directory| place(directory.bytes.len()));
        let mut snapshots = self
            .snapshots
            .as_ref()
            .map_or_else(Vec::new, |table| table.bytes.clone());
        let mut active = None;
        for table in &self.tables {
            stop_if_cancelled(progress)?;
            let at = place(table.len as usize);
            let bytes = file.read_padded(table.offset, table.len as usize).await?;
            write_padded(walk, at, &bytes).await?;
            match table.snapshot {
                None => active = Some(at),
                Some(field) => {
                    if let Some(pointer) = snapshots.get_mut(field..field + 8) {
                        pointer.copy_from_slice(&at.to_be_bytes());
                    }
                }
            }
        }
        if let Some(at) = table_at {
            write_padded(walk, at, &snapshots).await?;
        }
        if let (Some(directory), Some(at)) = (&self.bitmaps, directory_at) {
            write_padded(walk, at, &directory.bytes).await?;
        }
        if !make_used(walk, stored, header, &fresh, rebuild, progress).await? {
            return Ok(false);
        }
        for (at, raw) in links {
            let bytes = raw.to_be_bytes().to_vec();
            file.write(at, bytes, RequestFlags::empty()).await?;
        }
        file.flush().await?;
        if let Some(at) = active {
            let size = header.l1_size;
            header_update::write_l1_pointer(file, header, HostOffset(at), size).await?;
            file.flush().await?;
        }
        if let (Some(table), Some(at)) = (&self.snapshots, table_at) {
            let at = if table.count == 0 { 0 } else { at };
            let mut bytes = table.count.to_be_bytes().to_vec();
            bytes.extend_from_slice(&at.to_be_bytes());
            file.write(SNAPSHOTS_FIELD, bytes, RequestFlags::empty())
                .await?;
            header.nb_snapshots = table.count;
            header.snapshots_offset = HostOffset(at);
        }
        if let (Some(directory), Some(at)) = (&self.bitmaps, directory_at) {
            publish_bitmaps(walk, header, directory, at).await?;
        }
        file.flush().await?;
        for (cluster, claim) in &self.claims {
            report.add(
                Severity::Corruption,
                true,
                format!(
                    "Repairing cluster {cluster}: doubly used by {}; each has its own copy now",
                    claim.describe()
                ),
            );
        }
        for (_, claim) in &self.claims {
            for affected in claim.affected(walk, header.disk_size(), true) {
                report.affect(affected);
            }
        }
        Ok(true)
    }
}

async fn write_padded(walk: &Walk<'_>, at: u64, bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(
        bytes
            .len()
            .next_multiple_of(walk.shape.cluster_size() as usize),
        0,
    );
    walk.file.write(at, bytes, RequestFlags::empty()).await
}

/// Makes the refcounts of new room durable: in the blocks that exist, or in new structures.
async fn make_used(
    walk: &Walk<'_>,
    stored: &mut Stored<'_>,
    header: &mut Header,
    fresh: &BTreeMap<u64, u64>,
    rebuild: bool,
    progress: &Progress,
) -> Result<bool> {
    let per_block = walk.geometry.refcounts_per_block();
    let in_place = !rebuild
        && fresh
            .keys()
            .all(|cluster| matches!(stored.place(cluster / per_block), BlockPlace::At(_)));
    if in_place {
        for (cluster, references) in fresh {
            stored.set(*cluster, *references).await?;
        }
        stored.write_back().await?;
        walk.file.flush().await?;
        return Ok(true);
    }
    match rebuild::rebuild(walk.file, walk, stored, header, fresh, progress).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(error),
    }
}

async fn publish_bitmaps(
    walk: &Walk<'_>,
    header: &mut Header,
    directory: &NewDirectory,
    at: u64,
) -> Result<()> {
    let mut changed = header.clone();
    if directory.count == 0 {
        changed.extensions.bitmaps = None;
        changed.autoclear -= Autoclear::BITMAPS;
    } else {
        changed.extensions.bitmaps = Some(BitmapsPointer {
            count: directory.count,
            directory_size: directory.bytes.len() as u64,
            directory_offset: at,
        });
    }
    header_update::rewrite(walk.file, &changed).await?;
    *header = changed;
    Ok(())
}

/// Drops the bitmaps that another program made worthless, before their clusters are freed.
pub(super) async fn drop_stale_bitmaps(walk: &Walk<'_>, header: &mut Header) -> Result<()> {
    let stale = header.version < 3 || !header.autoclear.contains(Autoclear::BITMAPS);
    if header.extensions.bitmaps.is_none() || !stale {
        return Ok(());
    }
    let mut changed = header.clone();
    changed.extensions.bitmaps = None;
    header_update::rewrite(walk.file, &changed).await?;
    walk.file.flush().await?;
    *header = changed;
    Ok(())
}
