//! Finds out who uses a cluster that is used too often: which guest clusters, which L2 tables, which other metadata.
//!
//! Sharing that the format knows isn't a finding: snapshots share tables and data at the same place of the disk, and
//! compressed clusters share the cluster that their pieces lie in. What remains is aliasing: a write to one owner has
//! changed, or will change, what the other reads.
//!
//! Only clusters that `compare` found suspicious are looked at, in windows, so that memory doesn't grow with the damage.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
};

use block_core::{
    error::Result,
    image::{Affected, Progress},
};
use futures::StreamExt;

use super::{
    counts::Bits,
    mapping::Tree,
    stored::{BlockPlace, Stored},
    table::{Shape, Table, compressed_run},
    tables::scan_tables,
    walk::{Kind, Walk, stop_if_cancelled},
};
use crate::layout::{
    Header,
    entry::{COMPRESSED, OFFSET_MASK},
};

/// Suspicious clusters that are told apart at once.
const WINDOW: usize = 1 << 18;
/// Aliased clusters whose owners are listed at once, and entries that refer to them.
const MAX_CLAIMS: usize = 1 << 14;
const MAX_SPOTS: usize = 1 << 17;
/// Owners and snapshots that a report names for one cluster.
const MAX_NAMED: usize = 8;

/// What an owner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Position {
    /// The L2 table of this L1 index.
    Table(u64),
    /// Compressed data at this guest offset.
    Compressed(u64),
    /// Data at this guest offset.
    Data(u64),
}

impl Position {
    /// Two owners of one cluster with the same mark share it as the format allows.
    const fn mark(self) -> (u8, u64) {
        match self {
            Self::Table(index) => (0, index),
            Self::Compressed(_) => (1, 0),
            Self::Data(guest) => (2, guest),
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(index) => write!(f, "the L2 table of L1 entry {index}"),
            Self::Compressed(guest) => write!(f, "compressed data at guest offset {guest:#x}"),
            Self::Data(guest) => write!(f, "data at guest offset {guest:#x}"),
        }
    }
}

/// An entry that refers to a cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spot {
    /// Where the entry is in the file.
    pub at: u64,
    pub raw: u64,
    /// References that the entry makes.
    pub times: u64,
    /// Its L2 table, or the number of its L1 table's tree.
    pub within: u64,
}

/// An owner and all entries that make it one.
#[derive(Debug, Clone)]
pub(super) struct Owner {
    pub position: Position,
    pub spots: Vec<Spot>,
    /// The snapshots (`None`: the disk as it is) that it belongs to; not more than a report names.
    pub snapshots: Vec<Option<String>>,
}

/// A cluster with owners that must not share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Claim {
    pub metadata: Vec<Kind>,
    /// Ascending by position.
    pub owners: Vec<Owner>,
    /// All owners are compressed data, whose bytes overlap: each has to have its own.
    pub packed: bool,
}

impl Claim {
    fn add(&mut self, position: Position, spot: Spot) {
        match self
            .owners
            .binary_search_by_key(&position, |owner| owner.position)
        {
            Ok(at) => self.owners[at].spots.push(spot),
            Err(at) => self.owners.insert(
                at,
                Owner {
                    position,
                    spots: vec![spot],
                    snapshots: Vec::new(),
                },
            ),
        }
    }

    fn spots(&self) -> usize {
        self.owners.iter().map(|owner| owner.spots.len()).sum()
    }

    /// All owners in words.
    pub fn describe(&self) -> String {
        let metadata = self.metadata.iter().map(|kind| format!("the {kind}"));
        let owners = self.owners.iter().map(|owner| owner.position.to_string());
        let mut names: Vec<String> = metadata.chain(owners).take(MAX_NAMED + 1).collect();
        if names.len() > MAX_NAMED {
            names[MAX_NAMED] = "others".into();
        }
        names.join(", ")
    }

    /// The ranges of the disk that may have suffered.
    pub fn affected(&self, walk: &Walk<'_>, disk_size: u64, separated: bool) -> Vec<Affected> {
        let mut affected = Vec::new();
        for (own, owner) in self.owners.iter().take(MAX_NAMED).enumerate() {
            let (start, length) = owner.range(walk.shape, disk_size);
            if length == 0 {
                continue;
            }
            for snapshot in &owner.snapshots {
                let mut with = |with: String, with_start, with_snapshot| {
                    affected.push(Affected {
                        start,
                        length,
                        snapshot: snapshot.clone(),
                        with,
                        with_start,
                        with_snapshot,
                        separated,
                    });
                };
                for kind in &self.metadata {
                    with(kind.to_string(), None, None);
                }
                for (number, other) in self.owners.iter().take(MAX_NAMED).enumerate() {
                    let alike = other.position.mark() == owner.position.mark();
                    if number == own || alike && !self.packed {
                        continue;
                    }
                    let snapshot = other.snapshots.first().cloned().flatten();
                    match other.position {
                        Position::Table(_) => with("L2 table".into(), None, snapshot),
                        Position::Compressed(guest) => {
                            with("compressed data".into(), Some(guest), snapshot);
                        }
                        Position::Data(guest) => with("data".into(), Some(guest), snapshot),
                    }
                }
            }
        }
        affected
    }
}

impl Owner {
    /// First byte and length of what it holds of the disk. A snapshot's may lie behind the disk's end.
    fn range(&self, shape: Shape, disk_size: u64) -> (u64, u64) {
        let (start, length) = match self.position {
            Position::Table(index) => (index.saturating_mul(shape.coverage()), shape.coverage()),
            Position::Compressed(guest) | Position::Data(guest) => (guest, shape.cluster_size()),
        };
        let active = self.snapshots.iter().any(Option::is_none);
        if active || start < disk_size {
            (start, length.min(disk_size.saturating_sub(start)))
        } else {
            (start, length)
        }
    }
}

/// The entries of a table that touch one of `wanted`.
fn touching(bytes: &[u8], shape: Shape, wanted: &Bits) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for (index, (raw, _)) in shape.entries(bytes).enumerate() {
        let touched = clusters(raw, shape).is_some_and(|(first, last)| {
            wanted.contains(first)
                || (last != first && (first + 1..=last).any(|at| wanted.contains(at)))
        });
        if touched {
            found.push((index as u64, raw));
        }
    }
    found
}

/// The clusters that an L2 entry refers to, first and last.
fn clusters(raw: u64, shape: Shape) -> Option<(u64, u64)> {
    let (offset, len) = if raw & COMPRESSED != 0 {
        compressed_run(raw, shape.cluster_bits)
    } else {
        (raw & OFFSET_MASK, shape.cluster_size())
    };
    let bits = shape.cluster_bits;
    let standard = raw & COMPRESSED == 0;
    // A misaligned entry owns nothing: nobody can read through it.
    let nowhere = standard && (offset == 0 || !shape.is_aligned(offset));
    if shape.data_file || nowhere || shape.is_outside(offset, len) {
        return None;
    }
    Some((offset >> bits, (offset + len - 1) >> bits))
}

/// Calls `visit` for each entry of any L1 or L2 table that touches one of `wanted`: the cluster, what owns it, the entry.
async fn visit_owners(
    walk: &Walk<'_>,
    wanted: &Arc<Bits>,
    progress: &Progress,
    mut visit: impl FnMut(u64, Position, Spot) -> Result<()>,
) -> Result<()> {
    let shape = walk.shape;
    let bits = shape.cluster_bits;
    let mut visited = Bits::default();
    for (number, tree) in walk.trees.iter().enumerate() {
        stop_if_cancelled(progress)?;
        // What can't be read was counted by the walk.
        let Ok(l1) = walk.read_l1(tree).await else {
            continue;
        };
        let mut tables = Vec::new();
        for (index, raw) in l1.iter().enumerate() {
            let Some(offset) = walk.leads_to_table(*raw) else {
                continue;
            };
            let index = index as u64;
            let cluster = offset >> bits;
            if wanted.contains(cluster) {
                let spot = Spot {
                    at: tree.offset + index * 8,
                    raw: *raw,
                    times: tree.times(),
                    within: number as u64,
                };
                visit(cluster, Position::Table(index), spot)?;
            }
            if visited.insert(cluster)? {
                tables.push(Table {
                    offset,
                    l1_index: index,
                });
            }
        }
        let wanted = wanted.clone();
        let look = {
            let wanted = wanted.clone();
            move |bytes: &[u8], _| touching(bytes, shape, &wanted)
        };
        let mut found = scan_tables(walk.file, &tables, shape.cluster_size(), look);
        while let Some(batch) = found.next().await {
            stop_if_cancelled(progress)?;
            for (table, entries) in batch? {
                let Ok(entries) = entries else {
                    continue;
                };
                let times = walk.l2_references.get(table.offset >> bits);
                for (index, raw) in entries {
                    let guest = shape.guest(table, index);
                    let position = if raw & COMPRESSED != 0 {
                        Position::Compressed(guest)
                    } else {
                        Position::Data(guest)
                    };
                    let spot = Spot {
                        at: table.offset + index * shape.entry_size() as u64,
                        raw,
                        times,
                        within: table.offset,
                    };
                    let Some((first, last)) = clusters(raw, shape) else {
                        continue;
                    };
                    for cluster in (first..=last).filter(|cluster| wanted.contains(*cluster)) {
                        visit(cluster, position, spot)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Those among `suspicious` that really have owners which must not share.
async fn aliased(walk: &Walk<'_>, suspicious: Bits, progress: &Progress) -> Result<Bits> {
    let suspicious = Arc::new(suspicious);
    let mut aliased = Bits::default();
    let mut from = 0;
    loop {
        let window: Vec<u64> = suspicious.from(from).take(WINDOW).collect();
        let (Some(first), Some(last)) = (window.first().copied(), window.last().copied()) else {
            return Ok(aliased);
        };
        let mut marks: HashMap<u64, (u8, u64)> = HashMap::with_capacity(window.len());
        visit_owners(walk, &suspicious, progress, |cluster, position, _| {
            if !(first..=last).contains(&cluster) {
                return Ok(());
            }
            let mark = position.mark();
            if walk.metadata.contains(cluster) || *marks.entry(cluster).or_insert(mark) != mark {
                aliased.insert(cluster)?;
            }
            Ok(())
        })
        .await?;
        from = last + 1;
    }
}

/// The owners of aliased clusters, as many as are dealt with at once. `suspicious` are those to look at.
pub(super) async fn find_claims(
    walk: &Walk<'_>,
    header: &Header,
    stored: &Stored<'_>,
    suspicious: Bits,
    progress: &Progress,
) -> Result<BTreeMap<u64, Claim>> {
    let mut claims: BTreeMap<u64, Claim> = BTreeMap::new();
    if suspicious.is_empty() {
        return Ok(claims);
    }
    let wanted = Arc::new(aliased(walk, suspicious, progress).await?);
    if wanted.is_empty() {
        return Ok(claims);
    }
    let mut end = u64::MAX;
    let mut spots = 0;
    visit_owners(walk, &wanted, progress, |cluster, position, spot| {
        if cluster >= end {
            return Ok(());
        }
        claims.entry(cluster).or_default().add(position, spot);
        spots += 1;
        while claims.len() > 1 && (claims.len() > MAX_CLAIMS || spots > MAX_SPOTS) {
            // The rest has its turn in the next round.
            if let Some((last, claim)) = claims.pop_last() {
                end = last;
                spots -= claim.spots();
            }
        }
        Ok(())
    })
    .await?;
    name_metadata(walk, header, stored, &mut claims);
    name_snapshots(walk, claims.values_mut().collect()).await;
    Ok(claims)
}

fn name_metadata(
    walk: &Walk<'_>,
    header: &Header,
    stored: &Stored<'_>,
    claims: &mut BTreeMap<u64, Claim>,
) {
    for place in &walk.places {
        for claim in claims.range_mut(place.first..=place.last) {
            claim.1.metadata.push(place.kind);
        }
    }
    for index in 0..stored.table().len() as u64 {
        if let BlockPlace::At(offset) = stored.place(index)
            && let Some(claim) = claims.get_mut(&(offset.0 >> header.cluster_bits))
            && !claim.metadata.contains(&Kind::RefcountBlock)
        {
            claim.metadata.push(Kind::RefcountBlock);
        }
    }
    for (cluster, claim) in claims {
        if claim.metadata.is_empty() && walk.metadata.contains(*cluster) {
            claim.metadata.push(Kind::BitmapData);
        }
    }
}

/// Notes which snapshots an owner belongs to.
pub(super) async fn name_snapshots(walk: &Walk<'_>, mut claims: Vec<&mut Claim>) {
    let tables: HashSet<u64> = claims
        .iter()
        .flat_map(|claim| &claim.owners)
        .filter(|owner| !matches!(owner.position, Position::Table(_)))
        .flat_map(|owner| owner.spots.iter().map(|spot| spot.within))
        .collect();
    let mut trees: HashMap<u64, Vec<usize>> = HashMap::new();
    for (number, tree) in walk.trees.iter().enumerate() {
        let Ok(l1) = walk.read_l1(tree).await else {
            continue;
        };
        for raw in l1 {
            if let Some(table) = walk.leads_to_table(raw)
                && tables.contains(&table)
            {
                let of_table = trees.entry(table).or_default();
                if of_table.len() < MAX_NAMED && of_table.last() != Some(&number) {
                    of_table.push(number);
                }
            }
        }
    }
    let names = |tree: &Tree| -> Vec<Option<String>> {
        if tree.is_active() {
            vec![None]
        } else {
            tree.snapshots
                .iter()
                .take(MAX_NAMED)
                .cloned()
                .map(Some)
                .collect()
        }
    };
    for owner in claims.iter_mut().flat_map(|claim| &mut claim.owners) {
        let is_table = matches!(owner.position, Position::Table(_));
        for spot in &owner.spots {
            let own = [spot.within as usize];
            let numbers: &[usize] = if is_table {
                &own
            } else {
                trees.get(&spot.within).map_or(&[], Vec::as_slice)
            };
            for tree in numbers.iter().filter_map(|number| walk.trees.get(*number)) {
                for name in names(tree) {
                    if owner.snapshots.len() < MAX_NAMED && !owner.snapshots.contains(&name) {
                        owner.snapshots.push(name);
                    }
                }
            }
        }
    }
}
