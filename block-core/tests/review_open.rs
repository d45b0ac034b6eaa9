//! Review of opening: names inside images, deep chains, opens that are given up.

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use block_core::{
    ChildRole, IoBufMut, Options, async_trait,
    driver::{BlockDriver, Capabilities, DriverKind},
    error::Result,
    graph::Graph,
    limits::Limits,
    node::Edges,
    registry::{DriverFactory, ImplicitOpens, OpenContext, OpenOptions, Opened, Registry},
    request::Request,
};
use common::{Memory, env, poll_once};
use futures::executor::block_on;
use parking_lot::Mutex;

/// Storage of any name.
struct AnyFile {
    name: &'static str,
    opened: Arc<Mutex<Vec<String>>>,
}

struct Named(String);
#[async_trait]
impl BlockDriver for Named {
    fn name(&self) -> &'static str {
        "file"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::empty()
    }
    fn length(&self, _: &Edges) -> u64 {
        4096
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    fn filename(&self) -> Option<String> {
        Some(self.0.clone())
    }
    async fn read(self: Arc<Self>, _: Request, _: u64, mut buf: IoBufMut) -> Result<()> {
        buf.fill(0);
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[async_trait]
impl DriverFactory for AnyFile {
    fn name(&self) -> &'static str {
        self.name
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    async fn open(&self, _: OpenContext, mut options: Options) -> Result<Opened> {
        let name = options.take_str("filename")?.unwrap_or_default();
        self.opened.lock().push(format!("{} {name}", self.name));
        Ok(Opened {
            driver: Arc::new(Named(name)),
            edges: Vec::new(),
        })
    }
}

/// A format whose every image has a backing file.
struct Overlay {
    next: Arc<dyn Fn(&str) -> Option<String> + Send + Sync>,
    stuck: Arc<AtomicBool>,
}

struct OverlayDriver;
#[async_trait]
impl BlockDriver for OverlayDriver {
    fn name(&self) -> &'static str {
        "overlay"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::BACKING
    }
    fn length(&self, _: &Edges) -> u64 {
        4096
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        request.read_backing(offset, buf).await
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[async_trait]
impl DriverFactory for Overlay {
    fn name(&self) -> &'static str {
        "overlay"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn probe(&self, _: &[u8], _: &str) -> u32 {
        100
    }
    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let name = (self.next)(&file.filename().unwrap_or_default());
        let backing = context
            .open_backing(&mut options, &file, name.as_deref(), None)
            .await?;
        if self.stuck.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let mut edges = vec![(ChildRole::File, "file".to_owned(), file)];
        if let Some(backing) = backing {
            edges.push((ChildRole::Backing, "backing".to_owned(), backing));
        }
        Ok(Opened {
            driver: Arc::new(OverlayDriver),
            edges,
        })
    }
}

struct House {
    graph: Arc<Graph>,
    registry: Arc<Registry>,
    opened: Arc<Mutex<Vec<String>>>,
    stuck: Arc<AtomicBool>,
}

fn house(next: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> House {
    let opened: Arc<Mutex<Vec<String>>> = Arc::default();
    let stuck = Arc::new(AtomicBool::new(false));
    let registry = Registry::new()
        .with(AnyFile {
            name: "file",
            opened: opened.clone(),
        })
        .with(AnyFile {
            name: "host_device",
            opened: opened.clone(),
        })
        .with(Overlay {
            next: Arc::new(next),
            stuck: stuck.clone(),
        });
    House {
        graph: Graph::new(env()),
        registry: Arc::new(registry),
        opened,
        stuck,
    }
}

fn permit() -> OpenOptions {
    OpenOptions {
        implicit: ImplicitOpens::Permit,
        ..OpenOptions::default()
    }
}

#[test]
fn a_name_in_an_image_never_becomes_json_or_another_protocol() {
    for name in [
        r#"file:json:{"driver":"host_device","filename":"/dev/sda"}"#,
        "file:host_device:/dev/sda",
    ] {
        let house = house(move |file| (file == "top").then(|| name.to_owned()));
        let result =
            block_on(
                house
                    .registry
                    .open_file(&house.graph, "top", None, Options::new(), permit()),
            );
        let opened = house.opened.lock().clone();
        assert!(
            !opened.iter().any(|name| name.starts_with("host_device ")),
            "{opened:?} {:?}",
            result.is_ok()
        );
    }
}

#[test]
fn an_open_that_is_given_up_leaves_no_nodes() {
    let house = house(|_| None);
    house.stuck.store(true, Ordering::SeqCst);
    {
        let mut open =
            Box::pin(
                house
                    .registry
                    .open_file(&house.graph, "top", None, Options::new(), permit()),
            );
        assert!(poll_once(open.as_mut()).is_pending());
    }
    assert_eq!(house.graph.nodes().len(), 0, "{:?}", house.graph.nodes());
}

#[test]
fn the_deepest_chain_opens_reads_and_closes_on_a_small_stack() {
    let next = |file: &str| {
        let at: u64 = file.parse().unwrap();
        (at < std::env::var("DEPTH").map_or(block_core::registry::Registry::MAX_DEPTH as u64, |d: String| d.parse().unwrap()))
            .then(|| (at + 1).to_string())
    };
    std::thread::Builder::new()
        .stack_size(std::env::var("STACK").map_or(2 << 20, |d| d.parse().unwrap()))
        .spawn(move || {
            let house = house(next);
            let node = block_on(house.registry.open_file(
                &house.graph,
                "0",
                None,
                Options::new(),
                permit(),
            ))
            .unwrap();
            let handle = house.graph.attach(&node, common::ALL, "g").unwrap();
            block_on(async {
                handle.read(0, 512).await.unwrap();
                handle.block_status(0, 512).await.unwrap();
                handle.close().await.unwrap();
            });
            assert_eq!(house.graph.nodes().len(), 0);
        })
        .unwrap()
        .join()
        .unwrap();
}

#[allow(dead_code)]
fn unused() -> Memory {
    Memory::new(0)
}
