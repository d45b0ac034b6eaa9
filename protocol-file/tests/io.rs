//! Reading, writing, zeroing, discarding, resizing and layout, on tmpfs and on disk, through both engines.

mod common;

use block_core::{
    buffer::{Buffer, IoBuf, IoBufMut},
    driver::{Preallocation, Truncate},
    error::ErrorKind,
    flags::RequestFlags,
    handle::BlockHandle,
    status::StatusFlags,
};
use common::{Bed, PLACES, Place, Random, counter, engines, note, pattern};
use futures::{executor::block_on, future::join_all};
use serde_json::json;

const NONE: RequestFlags = RequestFlags::empty();

/// Random requests, each compared with what an oracle says; afterwards the file itself is.
fn storm(bed: &Bed, handle: &BlockHandle, name: &str, seed: u64, steps: usize) {
    let mut random = Random(seed);
    let mut oracle = vec![0u8; handle.length() as usize];
    for step in 0..steps {
        let len = oracle.len();
        let offset = random.below(len);
        let count = 1 + random.below((len - offset).min(40_000));
        let end = offset + count;
        match random.below(8) {
            0..=2 => {
                let data = pattern(step, count);
                // In two segments, so that vectors are used.
                let (a, b) = data.split_at(count / 2);
                let mut buf = IoBuf::from(a.to_vec());
                buf.append(IoBuf::from(b.to_vec()));
                let flags = if random.below(8) == 0 {
                    RequestFlags::FUA
                } else {
                    NONE
                };
                block_on(handle.write(offset as u64, buf, flags)).unwrap();
                oracle[offset..end].copy_from_slice(&data);
            }
            3 => {
                let flags = if random.below(2) == 0 {
                    RequestFlags::MAY_UNMAP
                } else {
                    NONE
                };
                block_on(handle.write_zeroes(offset as u64, count as u64, flags)).unwrap();
                oracle[offset..end].fill(0);
            }
            4 => {
                block_on(handle.discard(offset as u64, count as u64)).unwrap();
                // What isn't aligned may stay as it was.
                let align = handle.limits().request_alignment as usize;
                let start = offset.next_multiple_of(align);
                let stop = if end == len { end } else { end - end % align };
                if start < stop {
                    oracle[start..stop].fill(0);
                }
            }
            5 if step % 5 == 0 => {
                let new = (100_000 + random.below(200_000)) & !4095;
                block_on(handle.truncate(new as u64, Truncate::default())).unwrap();
                oracle.resize(new, 0);
                assert_eq!(handle.length(), new as u64);
            }
            _ => {
                let data = block_on(handle.read(offset as u64, count)).unwrap();
                assert!(
                    data[..] == oracle[offset..end],
                    "step {step}: {count} at {offset}"
                );
            }
        }
    }
    block_on(handle.flush()).unwrap();
    assert!(
        std::fs::read(bed.path(name)).unwrap() == oracle,
        "the file differs from the oracle"
    );
}

#[test]
fn every_way_through_the_driver_gives_what_was_written() {
    for place in PLACES {
        for aio in engines() {
            for inline in ["never", "nowait", "always"] {
                let bed = Bed::new(place);
                bed.create(&bed.name("a"), json!({"size": 262_144}))
                    .unwrap();
                let handle =
                    bed.open(json!({"filename": bed.name("a"), "aio": aio, "inline": inline}));
                storm(&bed, &handle, "a", 0x1234_5678, 400);
                let queued = counter(&handle, "queued-reads");
                let inlined = counter(&handle, "inline-reads");
                match inline {
                    "never" => assert!(inlined == 0 && queued > 0),
                    "always" => assert!(inlined > 0 && queued == 0),
                    _ => assert!(inlined + queued > 0),
                }
                if place == Place::Disk && inline == "nowait" {
                    assert!(inlined > 0, "the page cache had the data");
                }
            }
        }
    }
}

#[test]
fn direct_io_works_at_any_offset_and_address() {
    for place in PLACES {
        for aio in engines() {
            let bed = Bed::new(place);
            bed.create(&bed.name("a"), json!({"size": 262_144}))
                .unwrap();
            let options = json!({"filename": bed.name("a"), "aio": aio, "cache": {"direct": true}});
            let node = match bed.try_node(options) {
                Ok(node) => node,
                Err(error) => {
                    assert!(
                        error
                            .reason()
                            .ends_with("filesystem does not support O_DIRECT")
                    );
                    note(&format!(
                        "{place:?} has no O_DIRECT, this part of the test is skipped"
                    ));
                    continue;
                }
            };
            let all = block_core::flags::Permissions::all();
            let handle = bed
                .attach(&node, block_core::flags::PermissionSet::new(all, all))
                .unwrap();
            storm(&bed, &handle, "a", 0xfeed, 300);
            assert_eq!(counter(&handle, "inline-reads"), 0);
            assert!(counter(&handle, "queued-reads") > 0);
        }
    }
}

#[test]
fn a_direct_read_of_a_file_with_a_ragged_end_is_filled_up_with_zeroes() {
    for aio in engines() {
        let bed = Bed::new(Place::Disk);
        let name = bed.file("a", 10_000);
        let handle = bed.open(json!({"filename": name, "aio": aio, "cache": {"direct": true}}));
        assert_eq!(handle.length(), 10_000);
        assert!(block_on(handle.read(0, 10_000)).unwrap()[..] == pattern(0, 10_000)[..]);
        assert!(block_on(handle.read(9_000, 1_000)).unwrap()[..] == pattern(0, 10_000)[9_000..]);
    }
}

#[test]
fn unaligned_memory_is_bounced_for_direct_io_and_aligned_memory_is_not() {
    for aio in engines() {
        let bed = Bed::new(Place::Disk);
        let name = bed.file("a", 65_536);
        let handle = bed.open(json!({"filename": name, "aio": aio, "cache": {"direct": true}}));
        let data = block_on(handle.read(0, 8192)).unwrap();
        assert!(data[..] == pattern(0, 8192)[..]);
        assert_eq!(counter(&handle, "bounced"), 0);

        let (_lent, mut whole) = Buffer::new(8193).lend();
        let buf = whole.split_off(1);
        block_on(handle.readv(4096, buf, NONE)).unwrap();
        assert_eq!(counter(&handle, "bounced"), 1);

        let (head, tail) = IoBuf::from(Buffer::from(&pattern(7, 4097)[..])).split_at(1);
        drop(head);
        block_on(handle.write(4096, tail, NONE)).unwrap();
        assert_eq!(counter(&handle, "bounced"), 2);
        assert!(std::fs::read(bed.path("a")).unwrap()[4096..8192] == pattern(7, 4097)[1..]);
    }
}

#[test]
fn more_segments_than_one_call_takes_are_all_moved() {
    for aio in engines() {
        for inline in ["never", "always"] {
            let bed = Bed::new(Place::Disk);
            bed.create(&bed.name("a"), json!({"size": 40_000})).unwrap();
            let handle = bed.open(json!({"filename": bed.name("a"), "aio": aio, "inline": inline}));
            let data = pattern(3, 30_000);
            let mut buf = IoBuf::new();
            for piece in data.chunks(10) {
                buf.append(IoBuf::from(piece.to_vec()));
            }
            assert_eq!(buf.segment_count(), 3000);
            block_on(handle.write(5, buf, NONE)).unwrap();
            let mut target = IoBufMut::new();
            let mut claims = Vec::new();
            for _ in 0..3000 {
                let (lent, piece) = Buffer::with_alignment(10, 1).lend();
                claims.push(lent);
                target.append(piece);
            }
            block_on(handle.readv(5, target, NONE)).unwrap();
            let back: Vec<u8> = claims
                .into_iter()
                .flat_map(|lent| lent.reclaim().unwrap().to_vec())
                .collect();
            assert!(back == data);
        }
    }
}

#[test]
fn a_hundred_requests_at_once_all_end_with_their_own_data() {
    for aio in engines() {
        let bed = Bed::new(Place::Disk);
        bed.create(&bed.name("a"), json!({"size": 100 * 8192}))
            .unwrap();
        let handle = bed.open(json!({"filename": bed.name("a"), "aio": aio, "inline": "never"}));
        let results =
            block_on(join_all((0..100).map(|at| {
                handle.write(at * 8192, pattern(at as usize, 8192), NONE)
            })));
        assert!(results.iter().all(Result::is_ok));
        let results = block_on(join_all((0..100).map(|at| handle.read(at * 8192, 8192))));
        for (at, data) in results.into_iter().enumerate() {
            assert!(data.unwrap()[..] == pattern(at, 8192)[..]);
        }
        if aio == "threads" {
            let threads = bed.files.engines().threads();
            assert!((1..=64).contains(&threads), "{threads} threads");
        }
    }
}

#[test]
fn writing_past_the_end_grows_the_node_and_the_gap_reads_as_zeroes() {
    for place in PLACES {
        for inline in ["never", "always"] {
            let bed = Bed::new(place);
            let name = bed.file("a", 1000);
            let handle = bed.open(json!({"filename": name, "inline": inline}));
            block_on(handle.write(5000, pattern(0, 100), NONE)).unwrap();
            assert_eq!(handle.length(), 5100);
            block_on(handle.write_zeroes(6000, 4000, RequestFlags::MAY_UNMAP)).unwrap();
            assert_eq!(handle.length(), 10_000);
            block_on(handle.write_zeroes(12_000, 100, NONE)).unwrap();
            assert_eq!(handle.length(), 12_100);
            let mut wanted = pattern(0, 1000);
            wanted.resize(12_100, 0);
            wanted[5000..5100].copy_from_slice(&pattern(0, 100));
            assert!(std::fs::read(bed.path("a")).unwrap() == wanted);
        }
    }
}

#[test]
fn discards_and_unmapping_zero_writes_give_space_back() {
    for place in PLACES {
        let bed = Bed::new(place);
        let name = bed.file("a", 1 << 20);
        let handle = bed.open(json!({"filename": name}));
        block_on(handle.flush()).unwrap();
        let allocated = || block_on(handle.info()).unwrap().actual_size.unwrap();
        let full = allocated();
        assert!(full >= 1 << 20);
        block_on(handle.discard(0, 256 << 10)).unwrap();
        assert_eq!(full - allocated(), 256 << 10);
        block_on(handle.write_zeroes(512 << 10, 256 << 10, RequestFlags::MAY_UNMAP)).unwrap();
        assert_eq!(full - allocated(), 512 << 10);
        // Zeroes that may not be unmapped take their space (again).
        block_on(handle.write_zeroes(0, 256 << 10, NONE)).unwrap();
        assert_eq!(full - allocated(), 256 << 10);
        assert_eq!(handle.length(), 1 << 20);
    }
}

#[test]
fn block_status_follows_holes_and_data() {
    for place in PLACES {
        let bed = Bed::new(place);
        bed.create(&bed.name("a"), json!({"size": 1 << 20}))
            .unwrap();
        let handle = bed.open(json!({"filename": bed.name("a")}));
        block_on(handle.write(256 << 10, pattern(0, 128 << 10), NONE)).unwrap();
        let mut at = 0;
        let mut seen = Vec::new();
        while at < 1 << 20 {
            let status = block_on(handle.block_status(at, (1 << 20) - at)).unwrap();
            let (node, offset) = status.mapped.clone().unwrap();
            assert_eq!((node.id(), offset), (handle.node().id(), at));
            assert_eq!(status.flags.contains(StatusFlags::ZERO), status.is_zero());
            seen.push((at, status.len, status.is_data()));
            at += status.len;
        }
        let (k128, k256) = (128 << 10, 256 << 10);
        assert_eq!(
            seen,
            [
                (0, k256, false),
                (k256, k128, true),
                (k256 + k128, (1 << 20) - k256 - k128, false)
            ]
        );
    }
}

/// The status of a 4 KiB block: whether there is data, and how often that was known without looking.
fn is_data(handle: &BlockHandle, at: u64) -> (bool, u64) {
    let status = block_on(handle.block_status(at, 4096)).unwrap();
    assert_eq!(status.len, 4096);
    (status.is_data(), counter(handle, "known-data"))
}

#[test]
fn data_that_is_known_isnt_looked_for_again_until_something_may_have_made_a_hole() {
    const K64: u64 = 64 << 10;
    for place in PLACES {
        for inline in ["never", "always"] {
            let bed = Bed::new(place);
            let name = bed.file("a", 1 << 20);
            let handle = bed.open(json!({"filename": name, "inline": inline}));
            let from_memory = || is_data(&handle, 0).1;
            let zero = |at, flags| block_on(handle.write_zeroes(at, K64, flags)).unwrap();
            let resize = |length| {
                let how = Truncate {
                    preallocation: Preallocation::Off,
                    exact: true,
                    zero: false,
                };
                block_on(handle.truncate(length, how)).unwrap();
            };
            type Change<'a> = (&'a str, Box<dyn Fn() + 'a>, u64);
            let changes: [Change<'_>; 4] = [
                (
                    "discard",
                    Box::new(|| block_on(handle.discard(K64, K64)).unwrap()),
                    K64,
                ),
                (
                    "zeroes",
                    Box::new(|| zero(2 * K64, RequestFlags::MAY_UNMAP)),
                    2 * K64,
                ),
                ("zeroes kept", Box::new(|| zero(3 * K64, NONE)), 3 * K64),
                (
                    "resize",
                    Box::new(|| {
                        resize(10 * K64);
                        resize(16 * K64);
                    }),
                    12 * K64,
                ),
            ];
            for (what, change, at) in changes {
                // A second time there is no look.
                block_on(handle.write(0, pattern(0, 1 << 20), NONE)).unwrap();
                let before = is_data(&handle, at).1;
                assert_eq!(
                    is_data(&handle, at),
                    (true, before + 1),
                    "{place:?}, {what}"
                );
                change();
                let (found, times) = is_data(&handle, at);
                // Where a file system knows no zeroes without a hole the data may stay.
                assert!(!found || what == "zeroes kept", "{place:?}, {what}");
                assert_eq!(times, before + 1, "{place:?}, {what}: not looked at again");
                // Writing makes no holes.
                let before = (from_memory(), from_memory()).1;
                block_on(handle.write(K64 / 2, pattern(1, 512), NONE)).unwrap();
                assert_eq!(from_memory(), before + 1, "{place:?}, {what}");
            }
        }
    }
}

#[test]
fn truncate_with_preallocation_reserves_space_and_reads_as_zeroes() {
    for place in PLACES {
        let bed = Bed::new(place);
        let name = bed.file("a", 5000);
        let handle = bed.open(json!({"filename": name}));
        let resize = |length, preallocation| {
            let how = Truncate {
                preallocation,
                ..Truncate::default()
            };
            block_on(handle.truncate(length, how))
        };
        let allocated = || block_on(handle.info()).unwrap().actual_size.unwrap();
        resize(1 << 20, Preallocation::Off).unwrap();
        assert!(allocated() < 100 << 10);
        resize(2 << 20, Preallocation::Falloc).unwrap();
        assert!(allocated() >= 1 << 20);
        resize(3 << 20, Preallocation::Full).unwrap();
        assert!(allocated() >= 2 << 20);
        let error = resize(4 << 20, Preallocation::Metadata).unwrap_err();
        assert_eq!(error.reason(), "Unsupported preallocation mode: metadata");
        let error = resize(1 << 20, Preallocation::Falloc).unwrap_err();
        assert_eq!(
            error.reason(),
            "Preallocation can only be used for growing images"
        );
        assert_eq!(handle.length(), 3 << 20);
        let mut wanted = pattern(0, 5000);
        wanted.resize(3 << 20, 0);
        assert!(std::fs::read(bed.path("a")).unwrap() == wanted);
        resize(100, Preallocation::Off).unwrap();
        assert_eq!(std::fs::metadata(bed.path("a")).unwrap().len(), 100);
    }
}

#[test]
fn ranges_are_copied_between_files_without_passing_through_memory() {
    for place in PLACES {
        let bed = Bed::new(place);
        let source = bed.open(json!({"filename": bed.file("a", 300_000)}));
        bed.create(&bed.name("b"), json!({"size": 300_000}))
            .unwrap();
        let target = bed.open(json!({"filename": bed.name("b")}));
        block_on(block_core::copy_range(
            &source, 1000, &target, 5000, 200_000, NONE,
        ))
        .unwrap();
        assert_eq!(counter(&target, "range-copies"), 1);
        assert_eq!(
            counter(&target, "queued-writes") + counter(&target, "inline-writes"),
            0
        );
        let mut wanted = vec![0; 300_000];
        wanted[5000..205_000].copy_from_slice(&pattern(0, 300_000)[1000..201_000]);
        assert!(std::fs::read(bed.path("b")).unwrap() == wanted);
    }
}

#[test]
fn copying_between_file_systems_falls_back_and_copies_all_the_same() {
    let (disk, shm) = (Bed::new(Place::Disk), Bed::new(Place::Shm));
    let name = shm.file("a", 100_000);
    disk.create(&disk.name("b"), json!({"size": 100_000}))
        .unwrap();
    let source = disk.open(json!({"filename": name}));
    let target = disk.open(json!({"filename": disk.name("b")}));
    block_on(block_core::copy_range(
        &source, 0, &target, 0, 100_000, NONE,
    ))
    .unwrap();
    assert!(std::fs::read(disk.path("b")).unwrap() == pattern(0, 100_000));
}

#[test]
fn no_flush_skips_the_disk_and_a_flush_reaches_it() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    for (no_flush, flushes) in [(false, 1), (true, 0)] {
        let handle = bed.open(json!({"filename": name, "cache": {"no-flush": no_flush}}));
        block_on(handle.write(0, pattern(1, 512), NONE)).unwrap();
        block_on(handle.flush()).unwrap();
        assert_eq!(counter(&handle, "flushes"), flushes);
        bed.close(handle);
    }
}

#[test]
fn a_durable_write_needs_no_flush_of_the_whole_file() {
    for aio in engines() {
        let bed = Bed::new(Place::Disk);
        let handle = bed.open(json!({"filename": bed.file("a", 4096), "aio": aio}));
        block_on(handle.write(0, pattern(1, 512), RequestFlags::FUA)).unwrap();
        assert_eq!(counter(&handle, "flushes"), 0);
        assert_eq!(counter(&handle, "inline-writes"), 0);
        block_on(handle.write_zeroes(0, 512, RequestFlags::FUA)).unwrap();
        assert_eq!(counter(&handle, "flushes"), 1);
    }
}

#[test]
fn requests_outside_the_file_or_the_permissions_touch_nothing() {
    let bed = Bed::new(Place::Disk);
    let name = bed.file("a", 4096);
    let handle = bed.open(json!({"filename": name}));
    assert_eq!(
        block_on(handle.read(4000, 200)).unwrap_err().kind(),
        ErrorKind::Io
    );
    assert_eq!(
        block_on(handle.read(u64::MAX, 1)).unwrap_err().kind(),
        ErrorKind::Io
    );
    bed.close(handle);
    let node = bed.node(json!({"filename": name, "read-only": true}));
    let read = block_core::flags::Permissions::CONSISTENT_READ;
    let all = block_core::flags::Permissions::all();
    let handle = bed
        .attach(&node, block_core::flags::PermissionSet::new(read, all))
        .unwrap();
    assert_eq!(
        block_on(handle.write(0, pattern(0, 10), NONE))
            .unwrap_err()
            .kind(),
        ErrorKind::NotPermitted
    );
    assert!(std::fs::read(bed.path("a")).unwrap() == pattern(0, 4096));
}
