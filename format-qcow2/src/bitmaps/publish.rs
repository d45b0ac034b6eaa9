//! Switching the header to another bitmap directory, or to none, so that a power cut between any two sectors leaves an image
//! that opens and whose bitmaps are the old ones, the new ones, or considered inconsistent.
//!
//! The extension may lie in more than one sector, and its coming and going moves what stands behind it, the backing
//! file's name above all. So the change is made sector by sector, each durable before the next, in an order for
//! which every state in between is a header that says the same as before apart from the bitmaps, while the autoclear bit
//! says that these aren't to be trusted. What states there are is tried out on a copy before anything is written.

use block_core::{
    buffer::Buffer,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    request::Child,
};

use crate::{
    header_plan::{self, SECTOR, Step},
    layout::{Autoclear, Header, extensions::BitmapsPointer, header::field},
    meta::Failure,
};

/// More sectors than this are not worth the trouble of ordering them.
const MAX_SECTORS: usize = 32;

/// Writes the autoclear bit of the bitmaps in place, durably.
///
/// # Errors
/// Whatever the storage reports; it is unknown then what is on disk, and no metadata is written any more.
pub(super) async fn write_bit(
    file: &Child,
    failure: &Failure,
    header: &mut Header,
    on: bool,
) -> Result<()> {
    let mut bits = header.autoclear;
    bits.set(Autoclear::BITMAPS, on);
    if bits == header.autoclear {
        return Ok(());
    }
    let bytes = bits.bits().to_be_bytes().to_vec();
    crate::meta::write_header_field(file, failure, field::AUTOCLEAR, bytes).await?;
    header.autoclear = bits;
    Ok(())
}

/// Makes the header point to another directory (with the autoclear bit set), or to none (with it clear), durably.
///
/// # Errors
/// ENOSPC when the extension doesn't fit into the header cluster, or can't be written there safely, with nothing changed. After an error of the
/// storage it is unknown what is on disk, and no metadata is written any more.
pub(super) async fn publish(
    file: &Child,
    failure: &Failure,
    header: &mut Header,
    pointer: Option<BitmapsPointer>,
) -> Result<()> {
    let mut wanted = header.clone();
    wanted.extensions.bitmaps = pointer;
    wanted.autoclear.set(Autoclear::BITMAPS, pointer.is_some());
    let target = wanted.encode()?;
    let current = file.read_padded(0, target.len()).await?;
    if differing(&current, &target).len() > 1 {
        let mut start = copy(&current);
        set_bit(&mut start, false);
        let mut target = target;
        set_bit(&mut target, false);
        let steps = plan(&start, target).ok_or_else(|| {
            Error::new(
                ErrorKind::NoSpace,
                "The header's cluster is too small to change the bitmaps in it safely",
            )
        })?;
        write_bit(file, failure, header, false).await?;
        for (index, sector) in steps {
            write_at(file, failure, index * SECTOR, sector).await?;
        }
        wanted.autoclear.set(Autoclear::BITMAPS, false);
        write_bit(file, failure, &mut wanted, pointer.is_some()).await?;
    } else if let Some(&index) = differing(&current, &target).first() {
        write_at(
            file,
            failure,
            index * SECTOR,
            sector(&target, index).to_vec(),
        )
        .await?;
    }
    *header = wanted;
    Ok(())
}

async fn write_at(file: &Child, failure: &Failure, at: usize, bytes: Vec<u8>) -> Result<()> {
    let written = file.write(at as u64, bytes, RequestFlags::empty()).await;
    failure.note(written)?;
    failure.flush(file).await
}

fn copy(buffer: &Buffer) -> Vec<u8> {
    buffer.to_vec()
}

fn sector(bytes: &[u8], index: usize) -> &[u8] {
    &bytes[index * SECTOR..(index + 1) * SECTOR]
}

fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
    (0..a.len().min(b.len()) / SECTOR)
        .filter(|index| sector(a, *index) != sector(b, *index))
        .collect()
}

fn set_bit(bytes: &mut [u8], on: bool) {
    // The last byte of the field has bits 0 to 7.
    let byte = &mut bytes[field::AUTOCLEAR as usize + 7];
    *byte = *byte & !1 | u8::from(on);
}

/// What a header says, apart from the bitmaps and from names that are only for people.
fn meaning(bytes: &[u8]) -> Option<Header> {
    let mut header = Header::decode(bytes).ok()?;
    header.extensions.bitmaps = None;
    header.extensions.feature_names.clear();
    Some(header)
}

/// Writes that lead from `start` to `target`, or to a header that says the same. `None`: no order is harmless.
fn plan(start: &[u8], target: Vec<u8>) -> Option<Vec<Step>> {
    let wanted = meaning(start);
    if wanted.is_some() {
        let moved = with_moved_name(start, &target);
        let candidates = [
            orders(start, &target),
            moved.map_or_else(Vec::new, |(first, second)| {
                // The name is copied to where nothing is, before the header points to it there.
                orders(start, &first)
                    .into_iter()
                    .flat_map(|to_first| {
                        orders(&first, &second)
                            .into_iter()
                            .map(move |to_second| [to_first.clone(), to_second].concat())
                    })
                    .collect()
            }),
        ];
        for steps in candidates.into_iter().flatten() {
            if is_harmless(start, &steps, wanted.as_ref()) {
                return Some(steps);
            }
        }
    }
    header_plan::plan(start, &Header::decode(&target).ok()?)
}

/// The two orders that make sense: from the end to the front, and from the front to the end.
fn orders(from: &[u8], to: &[u8]) -> Vec<Vec<(usize, Vec<u8>)>> {
    let indexes = differing(from, to);
    if indexes.len() > MAX_SECTORS {
        return Vec::new();
    }
    let steps = |indexes: &mut dyn Iterator<Item = usize>| {
        indexes
            .map(|index| (index, sector(to, index).to_vec()))
            .collect::<Vec<_>>()
    };
    vec![
        steps(&mut indexes.iter().rev().copied()),
        steps(&mut indexes.iter().copied()),
    ]
}

fn is_harmless(start: &[u8], steps: &[(usize, Vec<u8>)], wanted: Option<&Header>) -> bool {
    let mut state = start.to_vec();
    steps.iter().all(|(index, bytes)| {
        state[index * SECTOR..][..bytes.len()].copy_from_slice(bytes);
        meaning(&state).as_ref() == wanted
    })
}

/// The same headers as `start` and as `target` (that is, with its extensions), but with the backing file's name in sectors
/// of its own behind all that either has. `None` when there is no name, or no room.
fn with_moved_name(start: &[u8], target: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let place = |bytes: &[u8]| {
        let at = u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?);
        let len = u32::from_be_bytes(bytes.get(16..20)?.try_into().ok()?);
        let (at, len) = (usize::try_from(at).ok()?, len as usize);
        (at != 0 && at.checked_add(len)? <= bytes.len()).then_some((at, len))
    };
    let ((old, len), (new, _)) = (place(start)?, place(target)?);
    let used = |bytes: &[u8]| {
        bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |at| at + 1)
    };
    let at = used(start).max(used(target)).next_multiple_of(SECTOR);
    if at + len > start.len() {
        return None;
    }
    let name = start[old..old + len].to_vec();
    let moved = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        bytes[at..at + len].copy_from_slice(&name);
        bytes
    };
    let mut second = moved(target);
    second[new..new + len].fill(0);
    Some((moved(start), second))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{Parameters, Plan};

    fn header(change: impl FnOnce(&mut Header)) -> Header {
        let parameters = Parameters::default();
        let mut header = Plan::new(&parameters).unwrap().header(&parameters);
        change(&mut header);
        header
    }

    fn with_bitmaps(header: &Header) -> Header {
        let mut header = header.clone();
        header.extensions.bitmaps = Some(BitmapsPointer {
            count: 3,
            directory_size: 96,
            directory_offset: 0x50000,
        });
        header
    }

    /// Every state on the way, between any two sectors, says the same about all but the bitmaps.
    fn assert_harmless(from: &Header, to: &Header, what: &str) {
        let (start, target) = (from.encode().unwrap(), to.encode().unwrap());
        let steps = plan(&start, target.clone()).unwrap();
        let mut state = start.clone();
        for (index, bytes) in &steps {
            assert!(
                bytes.len() == SECTOR,
                "{what}: one write for the whole cluster"
            );
            state[index * SECTOR..][..SECTOR].copy_from_slice(bytes);
            assert_eq!(meaning(&state), meaning(&start), "{what}: sector {index}");
        }
        let end = Header::decode(&state).unwrap();
        assert_eq!(end.extensions.bitmaps, to.extensions.bitmaps, "{what}");
        assert_eq!(end, Header::decode(&target).unwrap(), "{what}");
    }

    #[test]
    fn bitmaps_come_and_go_without_a_harmful_state_whatever_else_the_header_has() {
        let name = |len: usize| Some(vec![b'n'; len]);
        for len in [0, 1, 8, 100, 470, 1023] {
            for format in [None, Some("raw"), Some("qcow2-very-long")] {
                for unknown in [None, Some(1usize), Some(40), Some(700)] {
                    let plain = header(|header| {
                        header.backing_file = name(len).filter(|name| !name.is_empty());
                        if header.backing_file.is_some() {
                            header.extensions.backing_format = format.map(str::to_owned);
                        }
                        if let Some(len) = unknown {
                            header.extensions.unknown.push(
                                crate::layout::extensions::UnknownExtension {
                                    kind: 0x1234_5678,
                                    data: vec![7; len],
                                },
                            );
                        }
                    });
                    let stored = with_bitmaps(&plain);
                    let what = format!("name of {len}, format {format:?}, unknown {unknown:?}");
                    if unknown.is_none() {
                        assert_harmless(&plain, &stored, &what);
                        assert_harmless(&stored, &plain, &what);
                    }
                    let mut other = stored.clone();
                    if let Some(pointer) = &mut other.extensions.bitmaps {
                        pointer.count = 0x100;
                        pointer.directory_offset = 0xffff_0000;
                    }
                    assert_harmless(&stored, &other, &what);
                }
            }
        }
    }

    #[test]
    fn an_image_of_qemu_img_takes_two_single_sectors() {
        let plain = header(|_| {});
        let stored = with_bitmaps(&plain);
        let steps = plan(&plain.encode().unwrap(), stored.encode().unwrap()).unwrap();
        let sectors: Vec<usize> = steps.iter().map(|(index, _)| *index).collect();
        assert_eq!(sectors, [1, 0]);
    }
}
