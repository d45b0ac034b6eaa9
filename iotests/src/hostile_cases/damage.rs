//! Kinds of damage, each over every place that it can be done to, or as many as seeds reach.

use std::sync::Arc;

use block_core::Capabilities;

use super::victim::{Fared, Use, Victim};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    storage::Content,
};

/// Bytes at the front in which every word is a header's field, or might be.
const HEADER: u64 = 128;
/// How many words are taken for pointers.
const POINTERS: usize = 96;
/// How many images get flipped bits, for each use.
const FLIPS: u64 = 250;

pub(super) fn cases() -> Vec<Case> {
    let hostile = Group::Hostile;
    let mut cases = Vec::new();
    for how in [Use::Look, Use::Write] {
        let name = if how == Use::Look { "read" } else { "written" };
        for width in [4, 8] {
            cases.push(Case::new(
                hostile,
                format!("hostile-header-words-of-{width}-bytes-{name}"),
                format!(
                    "with any {width}-byte word of the header 0, 1, the largest, or off by one the image is refused by \
                     name and left alone, or can be {name} without harm"
                ),
                move |scene| header_words(scene, how, width),
            ));
            cases.push(Case::new(
                hostile,
                format!("hostile-pointers-of-{width}-bytes-{name}"),
                format!(
                    "with any {width}-byte word of the tables unaligned, beyond the end, at the header or at itself, the \
                     image can be {name} or is refused"
                ),
                move |scene| pointers(scene, how, width),
            ));
        }
        cases.push(Case::new(
            hostile,
            format!("hostile-file-cut-off-and-{name}"),
            format!("an image that was cut off anywhere is refused by name, or can be {name} as far as it goes"),
            move |scene| cut_off(scene, how),
        ));
        for part in 0..2 {
            cases.push(Case::new(
                hostile,
                format!("hostile-flipped-bits-{name}-{part}"),
                format!(
                    "{FLIPS} images with one to eight bits of their metadata flipped are refused by name, or can be {name}"
                ),
                move |scene| flips(scene, how, part),
            ));
        }
    }
    cases.push(Case::new(
        hostile,
        "hostile-noise-for-tables",
        "images in which a whole sector or cluster of metadata is noise or ones are refused by name, or can be used",
        noise,
    ));
    cases.push(Case::new(
        hostile,
        "hostile-repair-of-flipped-bits",
        "the repair of an image with flipped bits ends, and what it calls repaired is clean when it is checked again",
        |scene| flips(scene, Use::Repair, 7),
    ));
    cases.push(Case::new(
        hostile,
        "hostile-repair-of-pointers",
        "the repair of an image with wild pointers ends, and what it calls repaired is clean when it is checked again",
        |scene| pointers(scene, Use::Repair, 8),
    ));
    cases.push(Case::new(
        hostile,
        "hostile-repair-of-cut-off-file",
        "the repair of an image that was cut off ends, and what it calls repaired is clean when it is checked again",
        |scene| cut_off(scene, Use::Repair),
    ));
    cases
}

async fn victim(scene: &Arc<Scene>, how: Use) -> Result<Result<Victim, Verdict>, Failure> {
    let needs = match how {
        Use::Repair => Capabilities::REPAIR,
        _ => Capabilities::empty(),
    };
    Victim::new(scene, needs).await
}

/// A word of the image, both ways round.
fn word(content: &Content, at: u64, width: usize) -> (u64, u64) {
    let mut bytes = [0; 8];
    content.read(at, &mut bytes[..width]);
    let big = bytes[..width]
        .iter()
        .fold(0, |n, byte| n << 8 | u64::from(*byte));
    let little = bytes[..width]
        .iter()
        .rev()
        .fold(0, |n, byte| n << 8 | u64::from(*byte));
    (big, little)
}

fn with_word(content: &Content, at: u64, width: usize, value: u64, big: bool) -> Content {
    let mut damaged = content.clone();
    let bytes = if big {
        value.to_be_bytes()[8 - width..].to_vec()
    } else {
        value.to_le_bytes()[..width].to_vec()
    };
    damaged.write(at, &bytes);
    damaged
}

/// The verdict: some must have been refused, or nothing was looked at.
fn verdict(refused: u64, used: u64) -> CaseResult {
    if refused + used == 0 {
        return Ok(Verdict::Inconclusive("nothing was damaged".into()));
    }
    Ok(Verdict::Passed)
}

async fn header_words(scene: Arc<Scene>, how: Use, width: usize) -> CaseResult {
    let victim = match victim(&scene, how).await? {
        Ok(victim) => victim,
        Err(verdict) => return Ok(verdict),
    };
    let (mut refused, mut used) = (0, 0);
    let most = u64::MAX >> (64 - 8 * width);
    for at in (0..HEADER.min(victim.whole.len())).step_by(width) {
        let (big, little) = word(&victim.whole, at, width);
        let values = [
            (0, true),
            (1, true),
            (most, true),
            (most >> 1, true),
            (big.wrapping_add(1) & most, true),
            (big.wrapping_sub(1) & most, true),
            (1, false),
            (little.wrapping_add(1) & most, false),
            (little.wrapping_sub(1) & most, false),
        ];
        for (value, is_big) in values {
            let old = if is_big { big } else { little };
            if value == old {
                continue;
            }
            let damaged = with_word(&victim.whole, at, width, value, is_big);
            let what = format!("the word at {at} is {value:#x}, not {old:#x}");
            match victim.try_out(damaged, how, &what).await? {
                Fared::Refused => refused += 1,
                Fared::Used => used += 1,
            }
        }
    }
    if refused == 0 {
        return Err("not one field of the header is checked".into());
    }
    verdict(refused, used)
}

async fn pointers(scene: Arc<Scene>, how: Use, width: usize) -> CaseResult {
    let victim = match victim(&scene, how).await? {
        Ok(victim) => victim,
        Err(verdict) => return Ok(verdict),
    };
    let (mut refused, mut used) = (0, 0);
    let big = width == 8;
    // 8-byte words are offsets in bytes, the highest byte of which is flags; 4-byte ones are sectors.
    let scale = if big { 1 } else { 512 };
    let flags = if big { 0xff << 56 } else { 0 };
    let length = victim.whole.len();
    let mut tried = 0;
    for sector in &victim.metadata {
        for at in (*sector..sector + 512).step_by(width) {
            let (be, le) = word(&victim.whole, at, width);
            let old = if big { be } else { le };
            // What could be an offset into the file.
            let place = (old & !flags).saturating_mul(scale);
            if at < HEADER || place == 0 || place >= length || tried >= POINTERS {
                continue;
            }
            tried += 1;
            let own = at / victim.unit * victim.unit;
            let places = [
                place + 512,
                place + 8,
                length.next_multiple_of(victim.unit),
                (1 << 40) + victim.unit,
                0,
                own,
                place + victim.unit,
                1 << 55,
            ];
            for place in places {
                let value = (old & flags) | (place / scale);
                if value == old {
                    continue;
                }
                let damaged = with_word(&victim.whole, at, width, value, big);
                let what = format!("the word at {at:#x} is {value:#x}, not {old:#x}");
                match victim.try_out(damaged, how, &what).await? {
                    Fared::Refused => refused += 1,
                    Fared::Used => used += 1,
                }
            }
        }
    }
    if tried == 0 {
        let why = format!("no {width}-byte word in the metadata looks like a pointer");
        return Ok(Verdict::NotCovered(why));
    }
    verdict(refused, used)
}

async fn cut_off(scene: Arc<Scene>, how: Use) -> CaseResult {
    let victim = match victim(&scene, how).await? {
        Ok(victim) => victim,
        Err(verdict) => return Ok(verdict),
    };
    let length = victim.whole.len();
    let mut lengths: Vec<u64> = [0, 1, 3, 4, 7, 8, 71, 72, 103, 104, 111, 112, 511]
        .into_iter()
        .collect();
    let step = (length / 96).next_multiple_of(512).max(512);
    for at in (0..length).step_by(step as usize) {
        lengths.extend([at, at + 1, (at + step).saturating_sub(1)]);
    }
    for at in (0..length).step_by(victim.unit as usize) {
        lengths.extend([at.saturating_sub(1), at, at + 512]);
    }
    lengths.retain(|at| *at < length);
    lengths.sort_unstable();
    lengths.dedup();
    let (mut refused, mut used) = (0, 0);
    for at in lengths {
        let mut damaged = victim.whole.clone();
        damaged.set_len(at);
        let what = format!("cut off at {at}");
        match victim.try_out(damaged, how, &what).await? {
            Fared::Refused => refused += 1,
            Fared::Used => used += 1,
        }
    }
    if refused == 0 {
        return Err("an empty file was taken for an image".into());
    }
    verdict(refused, used)
}

async fn flips(scene: Arc<Scene>, how: Use, part: u64) -> CaseResult {
    let victim = match victim(&scene, how).await? {
        Ok(victim) => victim,
        Err(verdict) => return Ok(verdict),
    };
    let (mut refused, mut used) = (0, 0);
    let mut number = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(part + 1);
    // Not the world's: the damage is the same whatever the schedule, and a number is enough to do it again.
    let mut below = move |bound: u64| {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number % bound
    };
    for n in 0..FLIPS {
        let mut damaged = victim.whole.clone();
        let mut places = Vec::new();
        for _ in 0..=below(8) {
            let sector = victim.metadata[below(victim.metadata.len() as u64) as usize];
            // A word that holds something, if there is one there: zeroes are dull.
            let at = (0..8)
                .map(|_| sector + below(512))
                .find(|at| word(&damaged, *at, 1).0 != 0)
                .unwrap_or(sector);
            let bit = below(8) as u32;
            let byte = word(&damaged, at, 1).0 as u8 ^ (1 << bit);
            damaged.write(at, &[byte]);
            places.push(format!("{at:#x}.{bit}"));
        }
        damaged.set_len(victim.whole.len());
        let what = format!("image {n} with bits flipped at {}", places.join(", "));
        match victim.try_out(damaged, how, &what).await? {
            Fared::Refused => refused += 1,
            Fared::Used => used += 1,
        }
    }
    verdict(refused, used)
}

async fn noise(scene: Arc<Scene>) -> CaseResult {
    let victim = match victim(&scene, Use::Write).await? {
        Ok(victim) => victim,
        Err(verdict) => return Ok(verdict),
    };
    let (mut refused, mut used) = (0, 0);
    let mut sectors = victim.metadata.clone();
    sectors.truncate(40);
    for sector in sectors {
        for kind in 0..4_u8 {
            let mut damaged = victim.whole.clone();
            let bytes: Vec<u8> = (0..512_u32)
                .map(|n| match kind {
                    0 => (n.wrapping_mul(2_654_435_761) >> 13) as u8,
                    1 => 0xff,
                    2 => u8::from(n % 8 == 7),
                    _ => 0,
                })
                .collect();
            damaged.write(sector, &bytes);
            damaged.set_len(victim.whole.len());
            let what = format!("the sector at {sector:#x} is noise of kind {kind}");
            for how in [Use::Look, Use::Write] {
                match victim.try_out(damaged.clone(), how, &what).await? {
                    Fared::Refused => refused += 1,
                    Fared::Used => used += 1,
                }
            }
        }
    }
    verdict(refused, used)
}
