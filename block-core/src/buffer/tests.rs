//! Tests of the buffers: splitting and joining, lending, guest memory, and a model that everything is compared with.
#![allow(clippy::single_range_in_vec_init)] // a list of segments may well have one

use std::{
    any::Any,
    cell::UnsafeCell,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use proptest::prelude::*;

use super::{Buffer, BufferPool, DEFAULT_ALIGNMENT, IoBuf, IoBufMut, Lent, is_zero};
use crate::error::ErrorKind;

const MIB: usize = 1 << 20;

/// Bytes that tell where they came from.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 + 1).collect()
}

fn content(buf: &IoBufMut) -> Vec<u8> {
    let mut bytes = vec![0xee; buf.len()];
    buf.copy_to_slice(0, &mut bytes);
    bytes
}

/// Memory that others (the guest) may write to.
struct Guest {
    bytes: Box<[UnsafeCell<u8>]>,
    dropped: Arc<AtomicBool>,
}

// SAFETY: the tests access the bytes through raw pointers, and never from two threads at once.
unsafe impl Sync for Guest {}

impl Drop for Guest {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

impl Guest {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        let bytes = bytes.into_iter().map(UnsafeCell::new).collect();
        Arc::new(Self {
            bytes,
            dropped: Arc::default(),
        })
    }

    fn base(&self) -> *mut u8 {
        // Writing through it is allowed, `UnsafeCell` is for that.
        self.bytes.as_ptr().cast::<u8>().cast_mut()
    }

    fn write(&self, at: usize, byte: u8) {
        // SAFETY: one thread, and tests stay inside the bytes.
        unsafe { self.base().add(at).write(byte) }
    }

    fn read(&self, at: usize) -> u8 {
        // SAFETY: as above.
        unsafe { self.base().add(at).read() }
    }

    fn source(self: &Arc<Self>, ranges: &[Range<usize>]) -> IoBuf {
        let segments = ranges
            .iter()
            .map(|r| (self.base().wrapping_add(r.start).cast_const(), r.len()));
        // SAFETY: the owner keeps the bytes, to which no references exist.
        unsafe { IoBuf::from_raw_parts(segments, Arc::clone(self) as Arc<dyn Any + Send + Sync>) }
    }

    fn target(self: &Arc<Self>, ranges: &[Range<usize>]) -> IoBufMut {
        let segments = ranges
            .iter()
            .map(|r| (self.base().wrapping_add(r.start), r.len()));
        // SAFETY: as above.
        unsafe {
            IoBufMut::from_raw_parts(segments, Arc::clone(self) as Arc<dyn Any + Send + Sync>)
        }
    }
}

#[test]
fn every_type_crosses_threads() {
    fn send<T: Send + 'static>() {}
    fn sync<T: Sync>() {}
    send::<Buffer>();
    send::<IoBufMut>();
    send::<Lent>();
    send::<IoBuf>();
    send::<BufferPool>();
    sync::<IoBuf>();
    sync::<BufferPool>();
}

#[test]
fn memory_is_zeroed_and_aligned_as_asked() {
    for align in [1, 16, 512, 4096, 65536] {
        for len in [0, 1, 511, 4096, 10_000] {
            let buffer = Buffer::with_alignment(len, align);
            assert_eq!((buffer.len(), buffer.alignment()), (len, align));
            assert_eq!(buffer.as_ptr().addr() % align, 0);
            assert!(is_zero(&buffer));
            let source = IoBuf::from(buffer);
            assert_eq!(source.len(), len);
            assert!(source.is_aligned(align, len.max(1)));
        }
    }
}

#[test]
fn impossible_allocations_are_errors() {
    for len in [usize::MAX, isize::MAX as usize] {
        assert_eq!(
            Buffer::try_new(len).unwrap_err().kind(),
            ErrorKind::OutOfMemory
        );
        let pool = BufferPool::new(usize::MAX);
        assert_eq!(
            pool.try_get(len).unwrap_err().kind(),
            ErrorKind::OutOfMemory
        );
    }
    for align in [0, 3] {
        let error = Buffer::try_with_alignment(1, align).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn an_adopted_vector_isnt_copied_and_its_spare_room_isnt_shown() {
    let mut vec = Vec::with_capacity(100);
    vec.extend_from_slice(b"abc");
    let address = vec.as_ptr();
    let buffer = Buffer::from(vec);
    assert_eq!(buffer.as_ptr(), address);
    assert_eq!((&buffer[..], buffer.capacity()), (&b"abc"[..], 3));
    let source = IoBuf::from(buffer);
    assert_eq!(source.segments().collect::<Vec<_>>(), [(address, 3)]);
    assert!(IoBuf::from(Vec::new()).is_empty());
}

#[test]
fn alignment_looks_at_every_address_and_length() {
    let (_lent, mut buf) = Buffer::new(8192).lend();
    assert!(buf.is_aligned(4096, 4096));
    let mut tail = buf.split_off(4096);
    assert!(buf.is_aligned(4096, 4096) && tail.is_aligned(4096, 4096));
    let rest = tail.split_off(512);
    assert!(tail.is_aligned(4096, 512) && !tail.is_aligned(4096, 4096));
    assert!(rest.is_aligned(512, 512) && !rest.is_aligned(1024, 512));
    assert!(IoBufMut::new().is_aligned(4096, 4096));

    assert!(
        IoBuf::zeroes(100 * 4096)
            .slice(512..1024)
            .is_aligned(4096, 512)
    );
    assert!(!IoBuf::zeroes(4095).is_aligned(4096, 512));
    assert!(
        !IoBuf::zeroes(3 << 15).is_aligned(4096, 3 << 10),
        "64 KiB is no multiple of 3 KiB"
    );
    assert!(IoBuf::zeroes(1 << 17).is_aligned(4096, 1 << 16));
    assert!(
        !IoBuf::zeroes(1 << 17).is_aligned(4096, 1 << 17),
        "its segments are 64 KiB each"
    );
}

#[test]
fn pieces_that_are_joined_again_are_one_segment() {
    let (lent, mut buf) = Buffer::from(pattern(100)).lend();
    let mut tail = buf.split_off(40);
    let middle = tail.split_to(20);
    assert_eq!((buf.len(), middle.len(), tail.len()), (40, 20, 40));
    assert_eq!(content(&middle), pattern(100)[40..60]);

    buf.append(middle);
    buf.append(tail);
    assert_eq!((buf.len(), buf.segment_count()), (100, 1));
    assert_eq!(buf.as_contiguous_mut().unwrap(), pattern(100));

    let head = buf.split_to(50);
    buf.append(head);
    assert_eq!(
        buf.segment_count(),
        2,
        "the other way round they don't adjoin"
    );
    assert_eq!(
        content(&buf),
        [&pattern(100)[50..], &pattern(100)[..50]].concat()
    );
    assert!(buf.as_contiguous_mut().is_none());
    drop(buf);
    assert_eq!(&lent.reclaim().unwrap()[..], pattern(100));
}

#[test]
fn splitting_at_either_end_leaves_an_empty_buffer() {
    let (lent, mut buf) = Buffer::new(10).lend();
    assert!(buf.split_to(0).is_empty());
    assert!(buf.split_off(10).is_empty());
    let all = buf.split_to(10);
    assert_eq!((all.len(), buf.len(), buf.segment_count()), (10, 0, 0));
    drop(all);
    assert!(lent.reclaim().is_ok(), "an empty piece holds no memory");
    assert_eq!(buf.as_contiguous_mut(), Some(&mut [][..]));
    assert_eq!(IoBuf::new().as_contiguous(), Some(&[][..]));
    assert!(IoBuf::new().is_zero());
}

#[test]
#[should_panic(expected = "cannot split at 11: the buffer's length is 10")]
fn splitting_behind_the_end_panics() {
    let _ = IoBuf::zeroes(10).split_off(11);
}

#[test]
#[should_panic(expected = "exceeds the buffer's length 10")]
fn slicing_behind_the_end_panics() {
    let _ = IoBuf::zeroes(10).slice(..=10);
}

#[test]
#[should_panic(expected = "4 bytes at 7 exceed the buffer's length 10")]
fn copying_behind_the_end_panics() {
    IoBufMut::from(Buffer::new(10)).copy_from_slice(7, &[0; 4]);
}

#[test]
#[should_panic(expected = "exceed the buffer's length 10")]
fn an_offset_that_overflows_panics() {
    IoBuf::zeroes(10).copy_to_slice(usize::MAX, &mut [0; 2]);
}

#[test]
fn a_buffer_isnt_reclaimed_while_a_piece_lives() {
    let (mut lent, mut buf) = Buffer::new(4096 * 8).lend();
    let mut pieces: Vec<_> = (0..7).map(|_| buf.split_to(4096)).collect();
    pieces.push(buf);
    for (index, mut piece) in pieces.into_iter().enumerate() {
        lent = lent.reclaim().expect_err("a piece lives");
        piece.fill(index as u8);
    }
    let buffer = lent.reclaim().expect("every piece is gone");
    for (index, piece) in buffer.chunks(4096).enumerate() {
        assert!(piece.iter().all(|byte| *byte == index as u8));
    }
}

#[test]
fn a_buffer_isnt_reclaimed_while_a_frozen_piece_or_its_clone_lives() {
    let (lent, mut buf) = Buffer::new(100).lend();
    let source = buf.split_to(50).freeze();
    drop(buf);
    let slice = source.slice(10..20);
    drop(source);
    let lent = lent.reclaim().expect_err("the slice lives");
    let slice = slice
        .try_into_buffer()
        .expect_err("neither whole nor unique");
    drop(slice);
    assert_eq!(lent.reclaim().unwrap().len(), 100);
}

#[test]
fn a_forgotten_piece_keeps_the_memory_for_ever() {
    // What the kernel would still be writing to is never freed, even if the claim is given up.
    let (lent, buf) = Buffer::new(16).lend();
    let (ptr, len) = buf.segments().next().unwrap();
    let buf = std::mem::ManuallyDrop::new(buf);
    drop(lent.reclaim().expect_err("a piece was forgotten"));
    // SAFETY: this is the kernel: it may write as long as the piece exists.
    unsafe { ptr.write_bytes(7, len) };
    assert_eq!(content(&buf), [7; 16]);
    drop(std::mem::ManuallyDrop::into_inner(buf));
}

#[test]
fn what_other_threads_filled_is_there_when_the_buffer_is_reclaimed() {
    let (pieces, rounds) = if cfg!(miri) { (3, 3) } else { (8, 200) };
    let mut buffer = Buffer::new(pieces * 64);
    for round in 0..rounds {
        let (mut lent, mut rest) = buffer.lend();
        let threads: Vec<_> = (0..pieces)
            .map(|index| {
                let mut piece = rest.split_to(64);
                thread::spawn(move || piece.fill((round * pieces + index) as u8))
            })
            .collect();
        drop(rest);
        // Not by joining: the reclaim alone must order what was written before what is read here.
        buffer = loop {
            match lent.reclaim() {
                Ok(buffer) => break buffer,
                Err(again) => lent = again,
            }
            thread::yield_now();
        };
        for (index, piece) in buffer.chunks(64).enumerate() {
            assert_eq!(piece, [(round * pieces + index) as u8; 64]);
        }
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn zeroes_may_be_longer_than_the_block_of_zeroes() {
    let len = 3 * 65536 + 5;
    let mut zeroes = IoBuf::zeroes(len);
    assert_eq!((zeroes.len(), zeroes.segment_count()), (len, 4));
    assert_eq!(
        zeroes.segments().map(|(_, len)| len).collect::<Vec<_>>(),
        [65536, 65536, 65536, 5]
    );
    assert!(is_zero(&zeroes.to_vec()) && zeroes.is_zero());
    assert_eq!(
        zeroes.chunks().unwrap().map(<[u8]>::len).sum::<usize>(),
        len
    );
    assert!(zeroes.as_contiguous().is_none());
    assert_eq!(
        zeroes.slice(65530..65546).as_contiguous(),
        Some(&[0; 16][..])
    );

    let tail = zeroes.split_off(100_000);
    assert_eq!((zeroes.len(), tail.len()), (100_000, len - 100_000));
    zeroes.append(tail);
    assert_eq!((zeroes.len(), zeroes.segment_count()), (len, 4));

    let mut target = IoBufMut::from(Buffer::from(vec![1; len + 2]));
    target.copy_from(1, &zeroes);
    assert!(!target.is_zero());
    let bytes = content(&target);
    assert!(bytes[0] == 1 && bytes[len + 1] == 1 && is_zero(&bytes[1..=len]));
    assert_eq!(
        IoBuf::zeroes(usize::MAX).slice(usize::MAX - 3..).to_vec(),
        [0; 3]
    );
}

#[test]
fn memory_is_used_again_only_if_nobody_reads_from_it() {
    let buffer = Buffer::from(&pattern(64)[..]);
    let address = buffer.as_ptr();
    let data = IoBuf::from(buffer);
    let copy = data.clone();
    let data = data.try_into_buffer().expect_err("the clone lives");
    assert_eq!(data.as_contiguous().unwrap(), pattern(64));
    drop(data);
    let tail = copy
        .slice(1..)
        .try_into_buffer()
        .expect_err("not from the beginning");
    assert_eq!(tail.to_vec(), pattern(64)[1..]);
    drop(tail);
    let buffer = copy.try_into_buffer().unwrap();
    assert_eq!((buffer.as_ptr(), buffer.len()), (address, 64));

    for other in [IoBuf::new(), IoBuf::zeroes(5), IoBuf::from(&b"static"[..])] {
        let len = other.len();
        assert_eq!(other.try_into_buffer().unwrap_err().len(), len);
    }
}

#[test]
fn guest_memory_is_read_as_it_is_when_it_is_copied() {
    let guest = Guest::new(pattern(8192));
    let source = guest.source(&[0..100, 4096..4096, 5000..6000]);
    assert_eq!((source.len(), source.segment_count()), (1100, 2));
    assert!(source.chunks().is_none() && source.slice(..10).as_contiguous().is_none());

    let slice = source.slice(50..150);
    guest.write(60, 0xaa);
    let mut expected = [&pattern(8192)[50..100], &pattern(8192)[5000..5050]].concat();
    expected[10] = 0xaa;
    assert_eq!(slice.to_vec(), expected);
    assert!(slice.try_into_buffer().is_err());
}

#[test]
fn guest_memory_is_written_to_in_its_segments_only() {
    let guest = Guest::new(vec![9; 4096]);
    let mut target = guest.target(&[0..10, 20..30, 2000..2010]);
    assert_eq!(target.segment_count(), 3);
    target.copy_from_slice(5, &pattern(20));
    let mut tail = target.split_off(25);
    tail.fill(0);
    assert!(tail.is_zero() && !target.is_zero());
    assert!(tail.as_contiguous_mut().is_none());
    let mut bytes = vec![9; 4096];
    bytes[5..10].copy_from_slice(&pattern(20)[..5]);
    bytes[20..30].copy_from_slice(&pattern(20)[5..15]);
    bytes[2000..2005].copy_from_slice(&pattern(20)[15..]);
    bytes[2005..2010].fill(0);
    assert_eq!(
        (0..4096).map(|at| guest.read(at)).collect::<Vec<_>>(),
        bytes
    );
}

#[test]
fn a_copy_within_the_same_guest_memory_may_overlap() {
    let guest = Guest::new(pattern(100));
    guest
        .target(&[10..60])
        .copy_from(0, &guest.source(&[0..50]));
    let mut expected = pattern(100);
    expected.copy_within(0..50, 10);
    assert_eq!(
        (0..100).map(|at| guest.read(at)).collect::<Vec<_>>(),
        expected
    );
}

#[test]
fn zeroes_in_guest_memory_are_found_across_the_copies() {
    let guest = Guest::new(vec![0; 5000]);
    let source = guest.source(&[0..5000]);
    assert!(source.is_zero());
    for at in [0, 1023, 1024, 2500, 4999] {
        guest.write(at, 1);
        assert!(!source.is_zero(), "byte {at}");
        guest.write(at, 0);
    }
}

#[test]
fn the_guests_memory_is_given_up_with_the_last_piece() {
    let guest = Guest::new(vec![0; 64]);
    let dropped = Arc::clone(&guest.dropped);
    let source = guest.source(&[0..64]);
    let mut target = guest.target(&[0..64]);
    drop(guest);
    let slice = source.slice(60..);
    drop(source);
    let tail = target.split_off(1);
    drop((target, slice));
    assert!(!dropped.load(Ordering::SeqCst));
    drop(tail);
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn guest_memory_and_ours_may_be_joined() {
    let guest = Guest::new(pattern(10));
    let mut data = IoBuf::from(vec![0; 3]);
    data.append(guest.source(&[0..10]));
    assert_eq!(data.to_vec(), [&[0; 3], &pattern(10)[..]].concat());
    assert!(data.chunks().is_none());
    assert!(data.slice(..3).chunks().is_some());
}

#[test]
fn one_byte_anywhere_is_found() {
    let lens: &[usize] = if cfg!(miri) {
        &[1, 17, 300]
    } else {
        &[1, 15, 16, 255, 256, 257, 1000]
    };
    for len in lens {
        let mut bytes = vec![0; *len];
        assert!(is_zero(&bytes));
        for at in 0..*len {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "byte {at} of {len}");
            bytes[at] = 0;
        }
    }
}

#[test]
fn up_to_two_segments_are_stored_without_an_allocation() {
    let mut data = IoBuf::from(vec![1; 10]);
    data.append(IoBuf::from(vec![2; 10]));
    let (mut head, tail) = data.split_at(5);
    assert!(
        [&data, &data.clone(), &head, &tail]
            .iter()
            .all(|buf| buf.list().is_inline())
    );
    assert_eq!(tail.segment_count(), 2);
    head.append(tail);
    assert!(head.list().is_inline(), "the cut segment is one again");
    head.append(IoBuf::zeroes(1));
    assert!(!head.list().is_inline());
    assert!(head.slice(12..).list().is_inline());
    assert!(head.split_off(12).list().is_inline());
    assert!(size_of::<IoBuf>() <= 112, "{}", size_of::<IoBuf>());
}

#[test]
fn debug_output_doesnt_show_content() {
    let secret = || Buffer::from(vec![123; 3]);
    let (lent, buf) = secret().lend();
    for text in [
        format!("{:?}", secret()),
        format!("{buf:?}"),
        format!("{lent:?}"),
        format!("{:?}", IoBuf::from(secret())),
        format!("{:?}", BufferPool::new(5)),
    ] {
        assert!(!text.contains("123"), "{text}");
    }
}

#[test]
fn the_pool_gives_out_what_was_put_back() {
    let pool = BufferPool::new(MIB);
    let buffer = pool.get(5000);
    assert_eq!(
        (buffer.len(), buffer.capacity(), buffer.alignment()),
        (5000, 8192, 4096)
    );
    let address = buffer.as_ptr();
    pool.put(buffer);
    assert_ne!(pool.get(9000).as_ptr(), address);
    let buffer = pool.get(8192);
    assert_eq!((buffer.as_ptr(), buffer.len()), (address, 8192));
    assert_eq!(pool.idle_bytes(), 0);
    assert_eq!(pool.get(0).capacity(), DEFAULT_ALIGNMENT);
}

#[test]
fn the_pool_keeps_no_more_than_its_bound_and_only_what_it_gives_out() {
    let pool = BufferPool::new(3 * 4096);
    let buffers: Vec<_> = (0..4).map(|_| pool.get(4096)).collect();
    for buffer in buffers {
        pool.put(buffer);
    }
    assert_eq!(pool.idle_bytes(), 3 * 4096);

    let pool = BufferPool::new(MIB);
    pool.put(Buffer::from(vec![0; 4096]));
    pool.put(Buffer::with_alignment(4096, 512));
    pool.put(Buffer::new(5000));
    pool.put(Buffer::new(2 * MIB));
    assert_eq!(pool.idle_bytes(), 0);
    assert_eq!(
        pool.get(MIB + 1).capacity(),
        MIB + 1,
        "too large to be kept, so not rounded up"
    );
}

/// What is done to a buffer and to the vector that it is compared with. Positions are taken modulo the length.
#[derive(Debug, Clone)]
enum Step {
    Fill(usize, usize, u8),
    Write(usize, Vec<u8>),
    WriteZeroes(usize, usize),
    Copy(usize, usize, usize),
    /// Cut at two places and put the pieces together again, rotated by one if asked.
    Recut(usize, usize, bool),
    Append(u8, usize),
    AppendGuest(u8, usize, usize),
    Cut(usize, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0usize..1000;
    let step = prop_oneof![
        (at.clone(), at.clone(), any::<u8>()).prop_map(|(a, n, byte)| Step::Fill(a, n, byte)),
        (at.clone(), prop::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(a, bytes)| Step::Write(a, bytes)),
        (at.clone(), at.clone()).prop_map(|(a, n)| Step::WriteZeroes(a, n)),
        (at.clone(), at.clone(), at.clone()).prop_map(|(a, b, n)| Step::Copy(a, b, n)),
        (at.clone(), at.clone(), any::<bool>()).prop_map(|(a, b, turn)| Step::Recut(a, b, turn)),
        (any::<u8>(), 0usize..200).prop_map(|(byte, n)| Step::Append(byte, n)),
        (any::<u8>(), 0usize..100, 0usize..100).prop_map(|(b, n, m)| Step::AppendGuest(b, n, m)),
        (at, any::<bool>()).prop_map(|(a, front)| Step::Cut(a, front)),
    ];
    prop::collection::vec(step, 0..if cfg!(miri) { 8 } else { 40 })
}

fn clamp(at: usize, n: usize, len: usize) -> Range<usize> {
    let at = at % (len + 1);
    at..at + n.min(len - at)
}

fn run(step: &Step, buf: &mut IoBufMut, model: &mut Vec<u8>) {
    let len = model.len();
    match step {
        Step::Fill(at, n, byte) => {
            let range = clamp(*at, *n, len);
            buf.fill_range(range.clone(), *byte);
            model[range].fill(*byte);
        }
        Step::Write(at, bytes) => {
            let range = clamp(*at, bytes.len(), len);
            buf.copy_from_slice(range.start, &bytes[..range.len()]);
            model[range.clone()].copy_from_slice(&bytes[..range.len()]);
        }
        Step::WriteZeroes(at, n) => {
            let range = clamp(*at, *n, len);
            buf.copy_from(range.start, &IoBuf::zeroes(range.len()));
            model[range].fill(0);
        }
        Step::Copy(from, to, n) => {
            let from = clamp(*from, *n, len);
            let to = clamp(*to, from.len(), len);
            let from = from.start..from.start + to.len();
            let copy = content(buf);
            // In two segments that don't match the target's.
            let (head, tail) = copy[from.clone()].split_at(from.len() / 3);
            let mut source = IoBuf::from(head.to_vec());
            source.append(IoBuf::from(tail.to_vec()));
            buf.copy_from(to.start, &source);
            model.copy_within(from, to.start);
        }
        Step::Recut(a, b, turn) => {
            let (a, b) = (a % (len + 1), b % (len + 1));
            let mut front = std::mem::take(buf);
            let back = front.split_off(a.max(b));
            let middle = front.split_off(a.min(b));
            assert_eq!(front.len() + middle.len() + back.len(), len);
            if *turn {
                *buf = back;
                buf.append(front);
                buf.append(middle);
                model.rotate_left(a.max(b));
            } else {
                *buf = front;
                buf.append(middle);
                buf.append(back);
            }
        }
        Step::Append(byte, n) => {
            buf.append(Buffer::from(vec![*byte; *n]).into());
            model.resize(len + n, *byte);
        }
        Step::AppendGuest(byte, n, m) => {
            buf.append(Guest::new(vec![*byte; 200]).target(&[0..*n, 100..100 + *m]));
            model.resize(len + n + m, *byte);
        }
        Step::Cut(at, front) => {
            let at = at % (len + 1);
            if *front {
                drop(buf.split_to(at));
                model.drain(..at);
            } else {
                drop(buf.split_off(at));
                model.truncate(at);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 10 } else { 500 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn buffers_behave_like_a_vector(
        start in 0usize..300,
        steps in steps(),
        (a, b) in (any::<usize>(), any::<usize>()),
    ) {
        let mut model = pattern(start);
        let mut buf = IoBufMut::from(Buffer::from(model.clone()));
        for step in &steps {
            run(step, &mut buf, &mut model);
            prop_assert_eq!(buf.len(), model.len());
            prop_assert_eq!(&content(&buf), &model);
            prop_assert_eq!(buf.is_zero(), model.iter().all(|byte| *byte == 0));
            prop_assert_eq!(buf.segments().map(|(_, len)| len).sum::<usize>(), model.len());
            prop_assert_eq!(buf.segments().count(), buf.segment_count());
            prop_assert!(buf.segments().all(|(_, len)| len != 0));
        }

        let source = buf.freeze();
        let range = clamp(a, b % 500, model.len());
        let slice = source.slice(range.clone());
        prop_assert_eq!(slice.to_vec(), &model[range.clone()]);
        let (mut head, tail) = source.split_at(range.start);
        head.append(tail);
        head.append(slice.clone());
        model.extend_from_within(range);
        prop_assert_eq!(&head.to_vec(), &model);
        if let Some(chunks) = head.chunks() {
            prop_assert_eq!(&chunks.collect::<Vec<_>>().concat(), &model);
        }
    }
}
