//! The engines by themselves: with pipes that keep a transfer pending, and calls that keep threads busy.

use std::{
    fs::File,
    io::Write,
    os::fd::OwnedFd,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use block_core::{
    buffer::{Buffer, Lent},
    producer::ProducerId,
};
use futures::{executor::block_on, future::join_all, task::noop_waker};

use super::{Engine, EngineConfig, Engines, Reactor};
use crate::open_file::OpenFile;

fn ring_engine(config: EngineConfig) -> Option<(Engines, Engine)> {
    let engines = Engines::new(config);
    match engines.engine(true) {
        Ok(engine) => Some((engines, engine)),
        Err(error) => {
            eprintln!("NOTE: no io_uring here ({error}), the test is skipped");
            None
        }
    }
}

fn pipe() -> (Arc<OpenFile>, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = OpenFile::for_tests(File::from(OwnedFd::from(reader)));
    (Arc::new(reader), File::from(OwnedFd::from(writer)))
}

fn reclaim_soon(mut lent: Lent) -> Buffer {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match lent.reclaim() {
            Ok(buffer) => return buffer,
            Err(back) => lent = back,
        }
        assert!(Instant::now() < end, "the buffer never came back");
        thread::sleep(Duration::from_millis(1));
    }
}

fn poll_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    future.poll(&mut Context::from_waker(&noop_waker()))
}

#[test]
fn the_ring_keeps_the_buffer_of_a_dropped_read_until_the_kernel_is_done() {
    let Some((_engines, engine)) = ring_engine(EngineConfig::default()) else {
        return;
    };
    let (reader, mut writer) = pipe();
    let (lent, buf) = Buffer::new(4096).lend();
    {
        let mut read = pin!(engine.read(ProducerId::NONE, reader, 0, buf));
        assert!(poll_once(read.as_mut()).is_pending());
    }
    // The future is gone; the kernel may still write to the memory, so nobody else gets it.
    thread::sleep(Duration::from_millis(50));
    let lent = lent.reclaim().expect_err("the kernel still has the buffer");
    writer.write_all(&[7; 4096]).unwrap();
    assert!(reclaim_soon(lent).iter().all(|byte| *byte == 7));
}

#[test]
fn the_pool_keeps_the_buffer_of_a_dropped_read_until_it_is_done() {
    let engines = Engines::new(EngineConfig {
        max_threads: 1,
        ..EngineConfig::default()
    });
    let engine = engines.engine(false).unwrap();
    let (release, wait) = mpsc::channel::<()>();
    let mut busy = pin!(engine.call(ProducerId::NONE, move || wait.recv()));
    assert!(poll_once(busy.as_mut()).is_pending());
    let zero = Arc::new(OpenFile::for_tests(File::open("/dev/zero").unwrap()));
    let mut buffer = Buffer::new(4096);
    buffer.fill(9);
    let (lent, buf) = buffer.lend();
    {
        let mut read = pin!(engine.read(ProducerId::NONE, zero, 0, buf));
        assert!(poll_once(read.as_mut()).is_pending());
    }
    let lent = lent
        .reclaim()
        .expect_err("the queued transfer still has the buffer");
    release.send(()).unwrap();
    assert!(reclaim_soon(lent).iter().all(|byte| *byte == 0));
}

#[test]
fn what_a_thread_submitted_is_done_even_if_the_thread_has_gone() {
    let Some((engines, engine)) = ring_engine(EngineConfig::default()) else {
        return;
    };
    let (reader, mut writer) = pipe();
    let (lent, buf) = Buffer::new(4096).lend();
    // The future is polled first, and thereby submitted, by a thread that ends at once.
    let mut read = Box::pin(async move { engine.read(ProducerId::NONE, reader, 0, buf).await });
    let read = thread::spawn(move || {
        assert!(poll_once(read.as_mut()).is_pending());
        read
    })
    .join()
    .unwrap();
    thread::sleep(Duration::from_millis(20));
    writer.write_all(&[3; 4096]).unwrap();
    block_on(read).unwrap();
    assert!(lent.reclaim().unwrap().iter().all(|byte| *byte == 3));
    drop(engines);
}

#[test]
fn short_reads_go_on_where_they_stopped() {
    let Some((_engines, engine)) = ring_engine(EngineConfig::default()) else {
        return;
    };
    let (reader, mut writer) = pipe();
    let feeder = thread::spawn(move || {
        for piece in 0..16u8 {
            writer.write_all(&[piece; 256]).unwrap();
            thread::sleep(Duration::from_millis(1));
        }
    });
    let (lent, buf) = Buffer::new(4096).lend();
    block_on(engine.read(ProducerId::NONE, reader, 0, buf)).unwrap();
    feeder.join().unwrap();
    let buffer = lent.reclaim().unwrap();
    assert!(
        buffer
            .iter()
            .enumerate()
            .all(|(at, byte)| at / 256 == *byte as usize)
    );
}

#[test]
fn an_executor_can_turn_the_ring_itself() {
    let config = EngineConfig {
        reactor: Reactor::External,
        ..EngineConfig::default()
    };
    let Some((engines, engine)) = ring_engine(config) else {
        return;
    };
    let handle = engines.ring_handle().unwrap();
    let (reader, mut writer) = pipe();
    let (lent, buf) = Buffer::new(100).lend();
    let mut read = pin!(engine.read(ProducerId::NONE, reader, 0, buf));
    assert!(poll_once(read.as_mut()).is_pending());
    assert_eq!(handle.turn(), 0);
    writer.write_all(&[1; 100]).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while handle.turn() == 0 {
        // No other thread completes it.
        assert!(poll_once(read.as_mut()).is_pending());
        assert!(Instant::now() < end);
        thread::yield_now();
    }
    assert!(matches!(poll_once(read.as_mut()), Poll::Ready(Ok(()))));
    assert!(lent.reclaim().unwrap().iter().all(|byte| *byte == 1));
}

#[test]
fn more_transfers_than_the_ring_has_room_for_all_end() {
    let config = EngineConfig {
        ring_entries: 8,
        ..EngineConfig::default()
    };
    let Some((_engines, engine)) = ring_engine(config) else {
        return;
    };
    let zero = Arc::new(OpenFile::for_tests(File::open("/dev/zero").unwrap()));
    let reads = (0..500).map(|_| {
        let mut buffer = Buffer::new(512);
        buffer.fill(1);
        let (lent, buf) = buffer.lend();
        let read = engine.read(ProducerId::NONE, zero.clone(), 0, buf);
        async move {
            read.await.unwrap();
            lent.reclaim().unwrap()
        }
    });
    let buffers = block_on(join_all(reads));
    assert!(
        buffers
            .iter()
            .all(|buffer| buffer.iter().all(|byte| *byte == 0))
    );
}

#[test]
fn threads_that_submit_at_once_lose_no_wake_up() {
    for use_ring in [false, true] {
        let engines = Engines::new(EngineConfig {
            ring_entries: 4,
            ..EngineConfig::default()
        });
        if use_ring && engines.engine(true).is_err() {
            eprintln!("NOTE: no io_uring here, half of the test is skipped");
            continue;
        }
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let engine = engines.engine(use_ring).unwrap();
                thread::spawn(move || {
                    let zero = Arc::new(OpenFile::for_tests(File::open("/dev/zero").unwrap()));
                    for _ in 0..2000 {
                        let (_lent, buf) = Buffer::new(64).lend();
                        block_on(engine.read(ProducerId::NONE, zero.clone(), 0, buf)).unwrap();
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_flood_from_one_file_does_not_starve_another() {
    let engines = Engines::new(EngineConfig {
        max_threads: 4,
        ..EngineConfig::default()
    });
    let (flood, quiet) = (
        engines.engine(false).unwrap(),
        engines.engine(false).unwrap(),
    );
    let done = Arc::new(AtomicUsize::new(0));
    let mut calls: Vec<_> = (0..400)
        .map(|_| {
            let done = done.clone();
            Box::pin(flood.call(ProducerId::NONE, move || {
                thread::sleep(Duration::from_millis(2));
                done.fetch_add(1, Ordering::SeqCst);
            }))
        })
        .collect();
    for call in &mut calls {
        assert!(poll_once(call.as_mut()).is_pending());
    }
    let before = block_on(quiet.call(ProducerId::NONE, {
        let done = done.clone();
        move || done.load(Ordering::SeqCst)
    }))
    .unwrap();
    assert!(before < 40, "{before} of 400 calls went first");
    for result in block_on(join_all(calls)) {
        result.unwrap();
    }
}

#[test]
fn a_pool_never_has_more_threads_than_it_may() {
    let engines = Engines::new(EngineConfig {
        max_threads: 3,
        ..EngineConfig::default()
    });
    assert_eq!(engines.threads(), 0);
    let engine = engines.engine(false).unwrap();
    let calls =
        (0..30).map(|_| engine.call(ProducerId::NONE, || thread::sleep(Duration::from_millis(2))));
    block_on(join_all(calls));
    assert!((1..=3).contains(&engines.threads()));
}

#[test]
fn a_call_that_panics_fails_and_leaves_the_pool_working() {
    let engines = Engines::new(EngineConfig {
        max_threads: 1,
        ..EngineConfig::default()
    });
    let engine = engines.engine(false).unwrap();
    let result: std::io::Result<()> =
        block_on(engine.call(ProducerId::NONE, || panic!("on purpose")));
    let error = result.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(block_on(engine.call(ProducerId::NONE, || 5)).unwrap(), 5);
}

#[test]
fn a_producer_that_fills_the_queue_of_a_file_does_not_starve_another_one_there() {
    let (job, guest) = (ProducerId::new(1), ProducerId::new(2));
    // One thread: what it does, it does in the order of the queue.
    let engines = Engines::new(EngineConfig {
        max_threads: 1,
        ..EngineConfig::default()
    });
    let engine = engines.engine(false).unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    let (release, held) = mpsc::channel::<()>();
    let mut first = pin!(engine.call(job, move || held.recv()));
    assert!(poll_once(first.as_mut()).is_pending());
    let mut calls: Vec<_> = (0..256)
        .map(|_| {
            let done = done.clone();
            Box::pin(engine.call(job, move || {
                done.fetch_add(1, Ordering::SeqCst);
            }))
        })
        .collect();
    for call in &mut calls {
        assert!(poll_once(call.as_mut()).is_pending());
    }
    let mut single = pin!(engine.call(guest, {
        let done = done.clone();
        move || done.load(Ordering::SeqCst)
    }));
    assert!(poll_once(single.as_mut()).is_pending());
    release.send(()).unwrap();
    let before = block_on(single).unwrap();
    for result in block_on(join_all(calls)) {
        result.unwrap();
    }
    assert!(before <= 1, "{before} of 256 calls went first");
}
