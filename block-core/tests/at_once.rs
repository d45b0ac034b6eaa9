//! Requests that a driver ends at once: they take the same way as any other, short of a future.

mod common;

use std::{
    any::Any,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use block_core::{
    ErrorKind, async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{Attempt, BlockDriver, Capabilities, DriverKind},
    error::{Error, Result},
    flags::RequestFlags,
    graph::{Graph, NodeSpec},
    handle::BlockHandle,
    limits::Limits,
    node::{Edges, Node},
    request::Request,
};
use common::{ALL, env, poll_once};
use futures::executor::block_on;
use parking_lot::Mutex;

/// Memory that does the first `at_once` bytes of a request at once, and the rest in a future.
struct Quick {
    data: Mutex<Vec<u8>>,
    limits: Limits,
    writable: AtomicBool,
    at_once: AtomicUsize,
    fail: AtomicBool,
    log: Mutex<Vec<String>>,
}

impl Quick {
    fn note(&self, what: &str, offset: u64, len: usize) {
        self.log.lock().push(format!("{what} {offset}+{len}"));
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock())
    }

    fn attempt(&self, len: usize, copy: impl FnOnce(&mut Vec<u8>, usize)) -> Attempt {
        if self.fail.load(Ordering::SeqCst) {
            return Attempt::Done(Err(Error::io("on purpose")));
        }
        let done = self.at_once.load(Ordering::SeqCst).min(len);
        copy(&mut self.data.lock(), done);
        if done == len {
            Attempt::Done(Ok(()))
        } else {
            Attempt::Left(done)
        }
    }
}

#[async_trait]
impl BlockDriver for Quick {
    fn name(&self) -> &'static str {
        "quick"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        let writes = Capabilities::WRITE | Capabilities::WRITE_ZEROES | Capabilities::DISCARD;
        if self.writable.load(Ordering::SeqCst) {
            writes
        } else {
            Capabilities::empty()
        }
    }
    fn length(&self, _: &Edges) -> u64 {
        self.data.lock().len() as u64
    }
    fn limits(&self, _: &Edges) -> Limits {
        self.limits
    }
    fn try_read(&self, offset: u64, buf: &mut IoBufMut) -> Attempt {
        self.note("try-read", offset, buf.len());
        self.attempt(buf.len(), |data, done| {
            buf.copy_from_slice(0, &data[offset as usize..][..done]);
        })
    }
    fn try_write(&self, offset: u64, buf: &IoBuf, _: RequestFlags) -> Attempt {
        self.note("try-write", offset, buf.len());
        self.attempt(buf.len(), |data, done| {
            buf.slice(..done)
                .copy_to_slice(0, &mut data[offset as usize..][..done]);
        })
    }
    async fn read(self: Arc<Self>, _: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        self.note("read", offset, buf.len());
        let len = buf.len();
        buf.copy_from_slice(0, &self.data.lock()[offset as usize..][..len]);
        Ok(())
    }
    async fn write(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        buf: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        self.note("write", offset, buf.len());
        buf.copy_to_slice(0, &mut self.data.lock()[offset as usize..][..buf.len()]);
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        self.note("flush", 0, 0);
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

const LEN: usize = 65536;

fn disk(limits: Limits, at_once: usize) -> (Arc<Quick>, Arc<Node>, Arc<BlockHandle>) {
    let graph = Graph::new(env());
    let quick = Arc::new(Quick {
        data: Mutex::new((0..LEN).map(|at| (at % 251) as u8).collect()),
        limits,
        writable: AtomicBool::new(true),
        at_once: AtomicUsize::new(at_once),
        fail: AtomicBool::new(false),
        log: Mutex::default(),
    });
    let node = graph.add_node(NodeSpec::new(quick.clone())).unwrap();
    let handle = Arc::new(graph.attach(&node, ALL, "guest").unwrap());
    // The handle finds its graph by a weak reference.
    std::mem::forget(graph);
    (quick, node, handle)
}

#[test]
fn a_request_that_ends_at_once_is_recorded_and_leaves_nothing_behind() {
    let (quick, node, handle) = disk(Limits::default(), LEN);
    let read = block_on(handle.read(1000, 500)).unwrap();
    assert_eq!(read[..], quick.data.lock()[1000..1500]);
    block_on(handle.write(2000, vec![9; 300], RequestFlags::empty())).unwrap();
    assert_eq!(quick.log(), ["try-read 1000+500", "try-write 2000+300"]);
    let stats = node.stats().snapshot();
    assert_eq!((stats.read_ops, stats.read_bytes), (1, 500));
    assert_eq!((stats.write_ops, stats.write_bytes), (1, 300));
    assert_eq!((node.tracker().in_flight(), handle.in_flight()), (0, 0));
    // The write counts: the flush after it reaches the driver.
    block_on(handle.flush()).unwrap();
    assert_eq!(quick.log(), ["flush 0+0"]);
}

#[test]
fn what_was_not_done_at_once_is_left_to_the_drivers_future() {
    for limits in [
        Limits::default(),
        Limits {
            max_transfer: 300,
            ..Limits::default()
        },
    ] {
        let (quick, _, handle) = disk(limits, 100);
        let before = quick.data.lock().clone();
        let read = block_on(handle.read(1000, 1000)).unwrap();
        assert_eq!(read[..], before[1000..2000]);
        let data: Vec<u8> = (0..1000).map(|at| (at % 7) as u8 + 1).collect();
        block_on(handle.write(5000, data.clone(), RequestFlags::empty())).unwrap();
        let mut expected = before;
        expected[5000..6000].copy_from_slice(&data);
        assert!(*quick.data.lock() == expected);
        let log = quick.log();
        assert!(
            log.iter().any(|line| line.starts_with("read 1100+")),
            "{log:?}"
        );
        assert!(
            log.iter().any(|line| line.starts_with("write 5100+")),
            "{log:?}"
        );
    }
}

#[test]
fn a_failure_at_once_names_node_operation_and_range() {
    let (quick, node, handle) = disk(Limits::default(), LEN);
    quick.fail.store(true, Ordering::SeqCst);
    let error = block_on(handle.write(4096, vec![1; 512], RequestFlags::empty())).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(error.node(), Some(node.name()), "{text}");
    assert!(text.contains("0x1000+0x200"), "{text}");
    assert_eq!(node.stats().snapshot().failed_ops, 1);
    assert_eq!(node.tracker().in_flight(), 0);
}

#[test]
fn nothing_is_tried_before_it_was_validated_and_its_turn_came() {
    let (quick, node, handle) = disk(Limits::default(), LEN);
    assert!(block_on(handle.read(LEN as u64 - 1, 2)).is_err());
    quick.writable.store(false, Ordering::SeqCst);
    let refused = block_on(handle.write(0, vec![1; 512], RequestFlags::empty())).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotPermitted);
    quick.writable.store(true, Ordering::SeqCst);
    assert_eq!(quick.log(), [""; 0], "neither has reached the driver");

    let held = block_on(handle.admit_serialising(0, 4096));
    let mut read = pin!(handle.read(512, 512));
    assert!(poll_once(read.as_mut()).is_pending());
    assert_eq!(quick.log(), [""; 0], "it waits at the gate");
    drop(held);
    block_on(read).unwrap();
    assert_eq!(quick.log(), ["try-read 512+512"]);
    assert_eq!(node.stats().snapshot().gate_waits, 1);
}

#[test]
fn a_durable_write_that_ended_at_once_is_flushed_before_it_completes() {
    let (quick, _, handle) = disk(Limits::default(), LEN);
    block_on(handle.write(0, vec![1; 512], RequestFlags::FUA)).unwrap();
    assert_eq!(quick.log(), ["try-write 0+512", "flush 0+0"]);
}
