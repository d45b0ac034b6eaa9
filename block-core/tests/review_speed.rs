//! How long a 4 KiB read through mapped layers takes, without the storage's own work. Run with --release --ignored.

mod common;

use std::{any::Any, sync::Arc, time::Instant};

use block_core::{
    ChildRole, IoBufMut, NodeSpec, async_trait,
    buffer::Buffer,
    driver::{BlockDriver, Capabilities, DriverKind, MapIntent, Mapping},
    error::Result,
    graph::Graph,
    limits::Limits,
    node::Edges,
    request::Request,
};
use common::{ALL, env};
use futures::executor::block_on;

struct Instantly;
#[async_trait]
impl BlockDriver for Instantly {
    fn name(&self) -> &'static str {
        "instantly"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
    }
    fn length(&self, _: &Edges) -> u64 {
        1 << 30
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, _: Request, _: u64, buf: IoBufMut) -> Result<()> {
        drop(buf);
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Mapped;
#[async_trait]
impl BlockDriver for Mapped {
    fn name(&self) -> &'static str {
        "mapped"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::TRY_MAP
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges.primary().map_or(0, |child| child.length())
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    fn try_map(&self, _: &Edges, offset: u64, len: u64, _: MapIntent) -> Mapping {
        Mapping::Data {
            edge: 0,
            offset,
            len,
            pin: None,
        }
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        request.file()?.read(offset, buf).await
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
#[ignore = "a measurement"]
fn reads_through_layers() {
    for layers in 0..5 {
        let graph = Graph::new(env());
        let mut node = graph.add_node(NodeSpec::new(Arc::new(Instantly))).unwrap();
        for _ in 0..layers {
            let spec =
                NodeSpec::new(Arc::new(Mapped)).with_child(ChildRole::Filtered, "file", &node);
            node = graph.add_node(spec).unwrap();
        }
        let handle = graph.attach(&node, ALL, "guest").unwrap();
        let mut best = f64::MAX;
        for _ in 0..7 {
            best = best.min(block_on(async {
                let mut buffer = Buffer::new(4096);
                let start = Instant::now();
                for at in 0..200_000u64 {
                    buffer = handle
                        .read_into(at * 4096 % (1 << 29), buffer)
                        .await
                        .unwrap();
                }
                start.elapsed().as_nanos() as f64 / 200_000.0
            }));
        }
        let state = handle.node();
        let time = |f: &dyn Fn()| {
            let start = Instant::now();
            for _ in 0..1_000_000 {
                f();
            }
            start.elapsed().as_nanos() as f64 / 1e6
        };
        let length = time(&|| {
            std::hint::black_box(state.length());
        });
        let limits = time(&|| {
            std::hint::black_box(state.limits());
        });
        let edges = time(&|| {
            std::hint::black_box(state.edges());
        });
        let clone = time(&|| {
            std::hint::black_box(state.clone());
        });
        println!(
            "{} nodes: {best:.0} ns; length {length:.1} limits {limits:.1} edges {edges:.1} clone {clone:.1}",
            layers + 1
        );
        let future = handle.read(0, 4096);
        println!("  future: {} bytes", size_of_val(&future));
        if layers == 0 {
            let tracker = state.tracker();
            let t = time(&|| {
                drop(tracker.try_begin(
                    block_core::tracked::TrackedRange::from_len(0, 4096),
                    false,
                    block_core::tracked::RequestKind::Read,
                ));
            });
            let slot = std::cell::Cell::new(Some(Buffer::new(4096)));
            let lend = time(&|| {
                let (lent, buf) = slot.take().unwrap().lend();
                drop(buf);
                slot.set(lent.reclaim().ok());
            });
            println!("  ticket {t:.1}, lend and reclaim {lend:.1}");
        }
    }
}
