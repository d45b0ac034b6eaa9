//! In which order the sectors of the first cluster are written when the header changes, so that a power cut between any two of them
//! leaves a header that says what it said before or what it is to say. No I/O.
//!
//! A storage writes sectors whole, but a header may take several: the extensions of one must not go on with those of another, nor a
//! backing file's name with another name. So what the first sector is to refer to is written to where nothing is, then the first
//! sector is switched, then the rest is tidied up. The name may lie anywhere behind the extensions; extensions that don't fit into
//! the first sector are written behind everything, and for a moment an extension of no meaning skips what lies in between. Every
//! state in between is decoded on a copy before anything is written. Where none of that works out there is no plan.

use crate::layout::{Header, header::field};

/// What a power cut leaves whole, in bytes.
pub(crate) const SECTOR: usize = 512;
/// The type of the extension that skips a part of the cluster. Whoever rewrites a header drops it.
pub(crate) const SKIP: u32 = 0x736b_6970;
/// Clusters up to this size are searched for a place for the name byte by byte.
const SMALL: usize = 4096;
/// More sectors than this aren't written one by one.
const MAX_SECTORS: usize = 128;

/// A sector's number and its new content. Each is to be durable before the next is written.
pub(crate) type Step = (usize, Vec<u8>);

fn sector(bytes: &[u8], index: usize) -> &[u8] {
    &bytes[index * SECTOR..(index + 1) * SECTOR]
}

/// Bytes up to the last one that isn't zero.
fn used(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1)
}

/// What a header says, apart from names that are only for people.
pub(crate) fn meaning(bytes: &[u8]) -> Option<Header> {
    Header::decode(bytes).ok().map(essence)
}

fn essence(mut header: Header) -> Header {
    header.extensions.feature_names.clear();
    header
        .extensions
        .unknown
        .retain(|extension| extension.kind != SKIP);
    header
}

/// The writes that lead from the cluster `old` to one that says what `new` says. `None` when there is no harmless way.
pub(crate) fn plan(old: &[u8], new: &Header) -> Option<Vec<Step>> {
    let mut new = new.clone();
    new.extensions
        .unknown
        .retain(|extension| extension.kind != SKIP);
    let allowed = Allowed {
        old: meaning(old),
        new: meaning(&new.encode().ok()?)?,
    };
    candidates(old, &new)
        .flat_map(|milestones| {
            let ways = 1u32 << milestones.len();
            (0..ways).map(move |way| (milestones.clone(), way))
        })
        .find_map(|(milestones, way)| {
            let steps = steps(old, &milestones, way)?;
            allowed.permits(old, &steps).then_some(steps)
        })
}

/// What a header may say on the way.
struct Allowed {
    /// `None`: nobody could read it before either.
    old: Option<Header>,
    new: Header,
}

impl Allowed {
    fn permits(&self, start: &[u8], steps: &[Step]) -> bool {
        let mut state = start.to_vec();
        let all = steps.iter().all(|(index, bytes)| {
            state[index * SECTOR..][..SECTOR].copy_from_slice(bytes);
            let now = meaning(&state);
            self.old.is_none() || now == self.old || now.as_ref() == Some(&self.new)
        });
        all && meaning(&state).as_ref() == Some(&self.new)
    }
}

/// From one milestone to the next the sectors that differ are written from the end to the front, or, where bit n of `way` is set,
/// from the front to the end.
fn steps(old: &[u8], milestones: &[Vec<u8>], way: u32) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut from = old;
    for (n, to) in milestones.iter().enumerate() {
        let mut indexes: Vec<usize> = (0..to.len() / SECTOR)
            .filter(|index| sector(from, *index) != sector(to, *index))
            .collect();
        if way >> n & 1 == 0 {
            indexes.reverse();
        }
        let parts = indexes
            .into_iter()
            .map(|index| (index, sector(to, index).to_vec()));
        steps.extend(parts);
        from = to;
    }
    (steps.len() <= MAX_SECTORS).then_some(steps)
}

/// States to go through, the simplest first; whether they are harmless is seen when they are tried.
fn candidates(old: &[u8], new: &Header) -> impl Iterator<Item = Vec<Vec<u8>>> {
    let straight = layout(new, true, None).into_iter().map(|last| vec![last]);
    let positions = name_positions(old, new);
    let moved = {
        let (old, new) = (old.to_vec(), new.clone());
        positions
            .into_iter()
            .filter_map(move |at| with_name_at(&old, &new, at))
    };
    let skipping = {
        let (old, new) = (old.to_vec(), new.clone());
        skip_positions(&old, &new)
            .into_iter()
            .filter_map(move |at| with_skip(&old, &new, at))
    };
    straight.chain(moved).chain(skipping)
}

fn layout(header: &Header, feature_names: bool, name_at: Option<usize>) -> Option<Vec<u8>> {
    let bytes = header.lay_out(feature_names, name_at).ok()?;
    Some(header.padded(bytes))
}

/// Where the backing file's name may be put; `None` for right behind the extensions.
fn name_positions(old: &[u8], new: &Header) -> Vec<Option<usize>> {
    let mut positions = vec![None];
    let (Some(name), Ok(short)) = (&new.backing_file, new.lay_out(false, None)) else {
        return positions;
    };
    let Some(last) = old.len().checked_sub(name.len()) else {
        return positions;
    };
    let last = last / 8 * 8;
    let behind = (short.len() - name.len()).next_multiple_of(8);
    if old.len() <= SMALL {
        positions.extend((behind..=last).rev().step_by(8).map(Some));
        return positions;
    }
    let whole = new.lay_out(true, None).map_or(0, |bytes| bytes.len());
    let free = used(old).max(whole).next_multiple_of(SECTOR);
    positions.extend([last, free].into_iter().filter(|at| *at <= last).map(Some));
    positions
}

/// The name is written to its place first, then the first sector refers to it.
fn with_name_at(old: &[u8], new: &Header, at: Option<usize>) -> Option<Vec<Vec<u8>>> {
    let short = layout(new, false, at)?;
    let last = layout(new, true, at).unwrap_or_else(|| short.clone());
    let mut first = old.to_vec();
    if let Some(name) = &new.backing_file {
        let at = usize::try_from(u64::from_be_bytes(short.get(8..16)?.try_into().ok()?)).ok()?;
        let end = at.checked_add(name.len())?;
        let from = at.max(SECTOR).min(end);
        first[from..end].copy_from_slice(&short[from..end]);
    }
    let mut switched = first.clone();
    switched[..SECTOR].copy_from_slice(&short[..SECTOR]);
    Some(vec![first, switched, last])
}

/// Where the extensions may be for a moment.
fn skip_positions(old: &[u8], new: &Header) -> Vec<usize> {
    let last = new.lay_out(true, None).map_or(0, |bytes| bytes.len());
    let short = new.lay_out(false, None).map_or(0, |bytes| bytes.len());
    [
        used(old).max(last).next_multiple_of(SECTOR),
        used(old).max(short).next_multiple_of(8),
    ]
    .into_iter()
    .filter(|at| at + short <= old.len())
    .collect()
}

/// All that follows the header's fields is written to `at` first; then the first sector skips what lies in between; then all goes
/// to where it belongs.
fn with_skip(old: &[u8], new: &Header, at: usize) -> Option<Vec<Vec<u8>>> {
    let short = new.lay_out(false, None).ok()?;
    let last = layout(new, true, None)?;
    let length = if new.version == 2 {
        field::INCOMPATIBLE as usize
    } else {
        new.encoded_length() as usize
    };
    if length + 8 > SECTOR {
        return None;
    }
    let tail = &short[length..];
    let mut first = old.to_vec();
    let from = at.max(SECTOR);
    first
        .get_mut(from..at + tail.len())?
        .copy_from_slice(&tail[from - at..]);
    let mut switched = first.clone();
    switched[..length].copy_from_slice(&short[..length]);
    switched[length..length + 4].copy_from_slice(&SKIP.to_be_bytes());
    let skipped = u32::try_from(at.checked_sub(length + 8)?).ok()?;
    switched[length + 4..length + 8].copy_from_slice(&skipped.to_be_bytes());
    if at < SECTOR {
        switched[at..SECTOR].copy_from_slice(&tail[..SECTOR - at]);
    }
    if new.backing_file.is_some() {
        let name = u64::from_be_bytes(short.get(8..16)?.try_into().ok()?);
        let moved = name - length as u64 + at as u64;
        switched[8..16].copy_from_slice(&moved.to_be_bytes());
    }
    // The copy stays until nothing needs it.
    let mut settled = last.clone();
    settled[at..at + tail.len()].copy_from_slice(&switched[at..at + tail.len()]);
    Some(vec![first, switched, settled, last])
}

#[cfg(test)]
#[path = "header_plan_tests.rs"]
mod tests;
