//! Opening, where it once went wrong: names inside images, deep chains, opens that are given up.

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use block_core::{
    ChildRole, IoBufMut, Options, async_trait,
    driver::{BlockDriver, Capabilities, DriverKind},
    error::{ErrorKind, Result},
    graph::Graph,
    limits::Limits,
    node::{Edges, Node},
    registry::{DriverFactory, ImplicitOpens, OpenContext, OpenOptions, Opened, Registry},
    request::Request,
};
use common::{env, poll_once};
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

/// The name of the backing file that the image of this name has.
type Next = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// A format whose images have backing files.
struct Overlay {
    next: Next,
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

async fn open(house: &House, name: &str) -> Result<Arc<Node>> {
    house
        .registry
        .open_file(&house.graph, name, None, Options::new(), permit())
        .await
}

#[test]
fn a_name_in_an_image_never_becomes_json_or_another_protocol() {
    for (name, path) in [
        (
            r#"file:json:{"driver":"host_device","filename":"/dev/sda"}"#,
            r#"./json:{"driver":"host_device","filename":"/dev/sda"}"#,
        ),
        ("file:host_device:/dev/sda", "./host_device:/dev/sda"),
        ("file:file:next", "./file:next"),
    ] {
        let house = house(move |file| (file == "top").then(|| name.to_owned()));
        block_on(open(&house, "top")).unwrap();
        let opened = house.opened.lock().clone();
        assert_eq!(opened, ["file top".to_owned(), format!("file {path}")]);
    }
    for name in [r#"json:{"driver":"file"}"#, "host_device:/dev/sda"] {
        let house = house(move |file| (file == "top").then(|| name.to_owned()));
        let error = block_on(open(&house, "top")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AccessDenied, "{error}");
        assert_eq!(*house.opened.lock(), ["file top"]);
        assert_eq!(house.graph.nodes().len(), 0);
    }
}

#[test]
fn names_that_choose_what_is_opened_are_followed_where_images_are_trusted() {
    let json = r#"json:{"driver":"host_device","filename":"/dev/sda"}"#;
    for (name, opened) in [
        (json, "host_device /dev/sda"),
        (r#"json:{"driver":"overlay","file.filename":"b"}"#, "file b"),
        ("host_device:/dev/sda", "host_device /dev/sda"),
        ("a:b", ""),
    ] {
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let house = house(move |file| (file == "dir/top").then(|| name.to_owned()));
        let told = asked.clone();
        let how = |is_allowed: bool| {
            let told = told.clone();
            OpenOptions {
                implicit: ImplicitOpens::Ask(Arc::new(move |name| {
                    told.lock().push(name.to_owned());
                    is_allowed
                })),
                options_in_names: true,
                ..OpenOptions::default()
            }
        };
        let open = |how| {
            let options = Options::new();
            let opening = house
                .registry
                .open_file(&house.graph, "dir/top", None, options, how);
            block_on(opening)
        };
        let error = open(how(false)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AccessDenied, "{error}");
        assert_eq!(house.opened.lock().split_off(0), ["file dir/top"]);
        match open(how(true)) {
            Ok(_) => assert_eq!(*house.opened.lock(), ["file dir/top", opened]),
            Err(error) => {
                assert!(opened.is_empty(), "{error}");
                assert!(
                    error.to_string().contains("Unknown protocol 'a'"),
                    "{error}"
                );
            }
        }
        assert_eq!(*asked.lock(), [name, name]);
    }
}

#[test]
fn who_is_asked_about_a_name_is_told_the_path_that_is_opened() {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let house = house(|file| (file == "dir/top").then(|| "file:a:b".to_owned()));
    let told = asked.clone();
    let how = OpenOptions {
        implicit: ImplicitOpens::Ask(Arc::new(move |name| {
            told.lock().push(name.to_owned());
            true
        })),
        ..OpenOptions::default()
    };
    let opening = house
        .registry
        .open_file(&house.graph, "dir/top", None, Options::new(), how);
    block_on(opening).unwrap();
    // As it has a protocol before it, it isn't relative to the image.
    assert_eq!(*asked.lock(), ["./a:b"]);
    assert_eq!(*house.opened.lock(), ["file dir/top", "file ./a:b"]);
}

#[test]
fn an_open_that_is_given_up_leaves_no_nodes_to_the_next() {
    // Images 0, 1 and 2, of which the last never gets open; and one called 7.
    let house = house(|file| match file {
        "0" => Some("1".to_owned()),
        "1" => Some("2".to_owned()),
        _ => None,
    });
    house.stuck.store(true, Ordering::SeqCst);
    {
        let mut opening = Box::pin(open(&house, "0"));
        assert!(poll_once(opening.as_mut()).is_pending());
        assert_eq!(house.graph.nodes().len(), 3, "{:?}", house.graph);
    }
    house.stuck.store(false, Ordering::SeqCst);
    let node = block_on(open(&house, "7")).unwrap();
    assert_eq!(house.graph.nodes().len(), 2, "{:?}", house.graph);
    block_on(house.graph.release(&node)).unwrap();
    assert_eq!(house.graph.nodes().len(), 0);
}

#[test]
fn closing_everything_closes_what_an_open_that_was_given_up_has_left() {
    let house = house(|_| None);
    house.stuck.store(true, Ordering::SeqCst);
    {
        let mut opening = Box::pin(open(&house, "0"));
        assert!(poll_once(opening.as_mut()).is_pending());
    }
    block_on(house.graph.close_all()).unwrap();
    assert_eq!(house.graph.nodes().len(), 0);
}

/// Image `0`, over `1`, and so on to `last`.
fn chain(last: usize) -> House {
    house(move |file| {
        let at: usize = file.parse().unwrap();
        (at < last).then(|| (at + 1).to_string())
    })
}

fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .stack_size(2 << 20)
        .spawn(work)
        .unwrap()
        .join()
        .unwrap();
}

#[test]
fn the_deepest_chain_opens_reads_and_closes_on_a_small_stack() {
    on_a_small_stack(|| {
        let house = chain(Registry::MAX_DEPTH);
        let node = block_on(open(&house, "0")).unwrap();
        let handle = house.graph.attach(&node, common::ALL, "guest").unwrap();
        block_on(async {
            handle.read(0, 512).await.unwrap();
            handle.block_status(0, 512).await.unwrap();
            handle.close().await.unwrap();
        });
        assert_eq!(house.graph.nodes().len(), 0);
    });
}

#[test]
fn a_chain_that_is_too_deep_is_refused_in_one_short_sentence() {
    on_a_small_stack(|| {
        let house = chain(Registry::MAX_DEPTH + 1);
        let error = block_on(open(&house, "0")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(
            error.reason(),
            format!(
                "The backing chain is deeper than {} images",
                Registry::MAX_DEPTH
            )
        );
        assert_eq!(house.graph.nodes().len(), 0);
    });
}
