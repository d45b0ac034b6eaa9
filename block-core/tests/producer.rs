//! Requests say who they come from, at every layer.

mod common;

use std::{any::Any, pin::pin, sync::Arc};

use block_core::{
    ProducerId, async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, MapIntent, Mapping},
    error::Result,
    flags::RequestFlags,
    graph::{Graph, NodeSpec},
    handle::BlockHandle,
    limits::Limits,
    node::{Edges, Node},
    request::Request,
    status::DriverStatus,
};
use common::{ALL, env, poll_once};
use futures::{executor::block_on, future::join};
use parking_lot::Mutex;

/// Storage that notes who asked.
#[derive(Default)]
struct Noting(Mutex<Vec<(&'static str, ProducerId)>>);

impl Noting {
    fn note(&self, what: &'static str, request: &Request) {
        self.0.lock().push((what, request.producer()));
    }

    fn take(&self) -> Vec<(&'static str, ProducerId)> {
        std::mem::take(&mut *self.0.lock())
    }
}

#[async_trait]
impl BlockDriver for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::DISCARD | Capabilities::WRITE_ZEROES
    }
    fn length(&self, _: &Edges) -> u64 {
        1 << 20
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, request: Request, _: u64, mut buf: IoBufMut) -> Result<()> {
        self.note("read", &request);
        buf.fill(0);
        Ok(())
    }
    async fn write(
        self: Arc<Self>,
        request: Request,
        _: u64,
        _: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        self.note("write", &request);
        Ok(())
    }
    async fn block_status(
        self: Arc<Self>,
        request: Request,
        _: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        self.note("status", &request);
        Ok(DriverStatus::data(len))
    }
    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.note("flush", &request);
        Ok(())
    }
    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        self.note("close", &request);
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Passes everything on: through its own futures, which give way once, or by telling the core where it goes.
struct Passing {
    maps: bool,
}

/// Pending once.
async fn give_way() {
    let mut first = true;
    futures::future::poll_fn(|cx| {
        if std::mem::take(&mut first) {
            cx.waker().wake_by_ref();
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(())
    })
    .await;
}

#[async_trait]
impl BlockDriver for Passing {
    fn name(&self) -> &'static str {
        "passing"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        if self.maps {
            Capabilities::WRITE | Capabilities::TRY_MAP
        } else {
            Capabilities::WRITE
        }
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges
            .child(ChildRole::File)
            .map_or(0, |child| child.length())
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    fn try_map(&self, _: &Edges, offset: u64, len: u64, _: MapIntent) -> Mapping {
        if !self.maps {
            return Mapping::NotCached;
        }
        Mapping::Data {
            edge: 0,
            offset,
            len,
            pin: None,
        }
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        give_way().await;
        request.file()?.read(offset, buf).await
    }
    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        give_way().await;
        let file = request.file()?;
        let half = buf.len() / 2;
        let (head, tail) = (buf.slice(..half), buf.slice(half..));
        let (head, tail) = join(
            file.write(offset, head, flags),
            file.write(offset + half as u64, tail, flags),
        )
        .await;
        head.and(tail)
    }
    async fn block_status(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        request.file()?.block_status(offset, len).await?;
        Ok(DriverStatus::data(len))
    }
    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        give_way().await;
        request.file()?.flush().await
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Stack {
    graph: Arc<Graph>,
    storage: Arc<Noting>,
    top: Arc<Node>,
}

/// `maps`: which of the layers above the storage tell the core where they pass requests to, the lowest first.
fn stack(maps: &[bool]) -> Stack {
    let graph = Graph::new(env());
    let storage = Arc::new(Noting::default());
    let mut top = graph.add_node(NodeSpec::new(storage.clone())).unwrap();
    for &maps in maps {
        let spec = NodeSpec::new(Arc::new(Passing { maps }));
        top = graph
            .add_node(spec.with_child(ChildRole::File, "file", &top))
            .unwrap();
    }
    Stack {
        graph,
        storage,
        top,
    }
}

fn attach(stack: &Stack, name: &str) -> BlockHandle {
    let reads = block_core::PermissionSet::new(
        block_core::Permissions::CONSISTENT_READ | block_core::Permissions::WRITE,
        ALL.shared,
    );
    stack.graph.attach(&stack.top, reads, name).unwrap()
}

#[test]
fn every_request_reaches_the_storage_with_the_producer_that_began_it() {
    for maps in [
        vec![],
        vec![true],
        vec![false],
        vec![false, true],
        vec![true, false],
        vec![false, false, false],
    ] {
        let stack = stack(&maps);
        let (guest, job) = (attach(&stack, "guest"), attach(&stack, "job"));
        assert_ne!(guest.producer(), job.producer());
        for handle in [&guest, &job, &guest] {
            block_on(handle.read(0, 512)).unwrap();
            block_on(handle.write(0, vec![1; 512], RequestFlags::FUA)).unwrap();
            block_on(handle.block_status(0, 512)).unwrap();
            let seen = stack.storage.take();
            for what in ["read", "write", "flush", "status"] {
                assert!(
                    seen.iter().any(|(other, _)| *other == what),
                    "no {what} with {maps:?}"
                );
            }
            for (what, producer) in seen {
                assert_eq!(producer, handle.producer(), "{what} with {maps:?}");
            }
        }
    }
}

#[test]
fn producers_that_take_turns_on_one_thread_are_not_mixed_up() {
    let stack = stack(&[false, false]);
    let (guest, job) = (attach(&stack, "guest"), attach(&stack, "job"));
    let mut one = pin!(guest.read(0, 512));
    let mut other = pin!(job.write(4096, vec![1; 512], RequestFlags::empty()));
    loop {
        let one = poll_once(one.as_mut()).is_ready();
        let other = poll_once(other.as_mut()).is_ready();
        assert_eq!(one, other, "both take the same number of turns");
        if one {
            break;
        }
    }
    // Each layer splits the write in two.
    let mut expected = vec![("read", guest.producer())];
    expected.extend([("write", job.producer()); 4]);
    assert_eq!(stack.storage.take(), expected);
}

#[test]
fn a_dropped_request_goes_on_in_its_producers_name() {
    let stack = stack(&[false]);
    let (guest, job) = (attach(&stack, "guest"), attach(&stack, "job"));
    {
        let mut read = pin!(guest.read(0, 512));
        assert!(poll_once(read.as_mut()).is_pending());
    }
    // Works off what the other one dropped.
    block_on(job.flush()).unwrap();
    assert!(stack.storage.take().contains(&("read", guest.producer())));
}

#[test]
fn what_nobody_asked_for_has_no_producer() {
    let stack = stack(&[false]);
    let guest = attach(&stack, "guest");
    block_on(guest.read(0, 512)).unwrap();
    assert_eq!(stack.storage.take(), [("read", guest.producer())]);
    drop(guest);
    block_on(stack.graph.release(&stack.top)).unwrap();
    assert_eq!(stack.storage.take(), [("close", ProducerId::NONE)]);
}
