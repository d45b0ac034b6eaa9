//! Changes of the graph with I/O going on: filters come and go, nodes are replaced, and no request sees a stale edge.

mod common;

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use block_core::{
    ChildRole, IoBuf, IoBufMut, NodeSpec, Options, RequestFlags, async_trait,
    driver::{BlockDriver, Capabilities, DriverKind},
    error::{ErrorKind, Result},
    graph::Graph,
    limits::Limits,
    node::{Edges, Node},
    registry::{DriverFactory, ImplicitOpens, OpenContext, OpenOptions, Opened, Registry},
    request::Request,
};
use common::{ALL, Memory, disk, env};
use futures::executor::block_on;

const NONE: RequestFlags = RequestFlags::empty();

/// Passes everything through and counts.
#[derive(Default)]
struct Counting {
    writes: AtomicU64,
    closed: AtomicBool,
}

#[async_trait]
impl BlockDriver for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::WRITE_ZEROES | Capabilities::DISCARD
    }
    fn length(&self, edges: &Edges) -> u64 {
        edges.primary().map_or(0, |child| child.length())
    }
    fn limits(&self, edges: &Edges) -> Limits {
        edges
            .primary()
            .map_or_else(Limits::default, |child| child.limits())
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        assert!(
            !self.closed.load(Ordering::SeqCst),
            "a request reached a filter that was closed"
        );
        request.file()?.read(offset, buf).await
    }
    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        assert!(
            !self.closed.load(Ordering::SeqCst),
            "a request reached a filter that was closed"
        );
        self.writes.fetch_add(1, Ordering::SeqCst);
        request.file()?.write(offset, buf, flags).await
    }
    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        request.file()?.write_zeroes(offset, len, flags).await
    }
    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        request.file()?.discard(offset, len).await
    }
    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn filter_over(graph: &Arc<Graph>, node: &Arc<Node>) -> (Arc<Counting>, Arc<Node>) {
    let driver = Arc::new(Counting::default());
    let spec = NodeSpec::new(driver.clone()).with_child(ChildRole::Filtered, "file", node);
    (driver, graph.add_node(spec).unwrap())
}

#[test]
fn filters_come_and_go_while_io_goes_on() {
    let disk = disk(Memory::new(1 << 16));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let handle = disk.handle.clone();
            let stop = &stop;
            scope.spawn(move || {
                let mut step = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    step += 1;
                    let at = thread * 16384 + (step * 512) % 16384;
                    block_on(async {
                        if step % 7 == 0 {
                            handle.discard(at, 512).await.unwrap();
                        }
                        handle.write(at, vec![step as u8; 512], NONE).await.unwrap();
                        let back = handle.read(at, 512).await.unwrap();
                        assert!(back.iter().all(|b| *b == step as u8));
                    });
                }
            });
        }
        let mut seen = 0;
        for _ in 0..60 {
            let (driver, filter) = filter_over(&disk.graph, &disk.node);
            block_on(disk.graph.insert_filter(&filter)).unwrap();
            assert_eq!(disk.handle.node().id(), filter.id());
            std::thread::sleep(std::time::Duration::from_millis(2));
            block_on(async {
                disk.graph.remove_filter(&filter).await.unwrap();
                disk.graph.release(&filter).await.unwrap();
            });
            seen += driver.writes.load(Ordering::SeqCst);
            assert!(driver.closed.load(Ordering::SeqCst));
            assert_eq!(disk.handle.node().id(), disk.node.id());
        }
        stop.store(true, Ordering::SeqCst);
        assert!(seen > 0, "no write ever went through a filter");
    });
    assert_eq!(disk.graph.nodes().len(), 1);
}

#[test]
fn a_frozen_edge_doesnt_change() {
    let disk = disk(Memory::new(4096));
    let (_, filter) = filter_over(&disk.graph, &disk.node);
    block_on(disk.graph.insert_filter(&filter)).unwrap();
    let other = disk
        .graph
        .add_node(NodeSpec::new(Arc::new(Memory::new(4096))))
        .unwrap();
    let frozen = disk
        .graph
        .freeze_chain(&filter, Some(&disk.node), "commit")
        .unwrap();
    let change = disk
        .graph
        .set_child(&filter, ChildRole::Filtered, "file", Some(&other));
    let error = block_on(change).unwrap_err();
    assert_eq!(
        error.reason(),
        format!(
            "Cannot change frozen 'file' link from '{}' to '{}': in use by block job: commit",
            filter.name(),
            disk.node.name()
        )
    );
    drop(frozen);
    block_on(
        disk.graph
            .set_child(&filter, ChildRole::Filtered, "file", Some(&other)),
    )
    .unwrap();
}

#[test]
fn a_link_to_a_filter_that_goes_away_with_its_job_cant_be_frozen() {
    let disk = disk(Memory::new(4096));
    let (_, filter) = filter_over(&disk.graph, &disk.node);
    let (_, above) = filter_over(&disk.graph, &filter);
    let claim = disk.graph.claim_filter_for_job(&filter, "backup").unwrap();
    // Its own link to what it is over is none of them.
    drop(
        disk.graph
            .freeze_chain(&filter, Some(&disk.node), "backup")
            .unwrap(),
    );
    for base in [Some(&disk.node), Some(&filter), None] {
        let error = disk
            .graph
            .freeze_chain(&above, base, "stream")
            .expect_err("the filter goes away");
        assert_eq!(
            error.reason(),
            format!(
                "Cannot freeze 'file' link from '{}' to '{}': node is in use by block job: backup",
                above.name(),
                filter.name()
            )
        );
    }
    // The refusals have left nothing frozen.
    block_on(disk.graph.remove_filter(&filter)).unwrap();
    drop(claim);
    disk.graph
        .freeze_chain(&above, Some(&disk.node), "stream")
        .unwrap();
}

#[test]
fn a_loop_is_refused_and_changes_nothing() {
    let disk = disk(Memory::new(4096));
    let (_, lower) = filter_over(&disk.graph, &disk.node);
    let (_, upper) = filter_over(&disk.graph, &lower);
    let change = disk
        .graph
        .set_child(&lower, ChildRole::Filtered, "file", Some(&upper));
    assert!(block_on(change).is_err());
    assert_eq!(lower.edges().primary().unwrap().node().id(), disk.node.id());
}

#[test]
fn a_second_job_on_a_node_is_refused() {
    let disk = disk(Memory::new(4096));
    let claim = disk.graph.claim_for_job(&disk.node, "commit").unwrap();
    let error = disk.graph.claim_for_job(&disk.node, "stream").unwrap_err();
    assert_eq!(
        error.reason(),
        "Node '#block001' is busy: block device is in use by block job: commit"
    );
    drop(claim);
    disk.graph.claim_for_job(&disk.node, "stream").unwrap();
}

#[test]
fn copy_on_read_holds_its_range_while_a_discard_waits() {
    // A layer over a backing file, as simple as can be: what was written is its own.
    let disk = disk(Memory::new(1 << 16));
    let node = disk.node.clone();
    let reservation =
        block_on(block_core::Child::unattached(node.clone()).reserve(0, 4096)).unwrap();
    let mut discard = std::pin::pin!(disk.handle.discard(0, 4096));
    assert!(common::poll_once(discard.as_mut()).is_pending());
    block_on(async {
        reservation
            .write(0, vec![1u8; 4096], RequestFlags::WRITE_UNCHANGED)
            .await
            .unwrap();
        assert_eq!(
            reservation
                .write(4096, vec![1u8; 1], NONE)
                .await
                .unwrap_err()
                .kind(),
            ErrorKind::InvalidInput
        );
    });
    assert!(common::poll_once(discard.as_mut()).is_pending());
    drop(reservation);
    block_on(discard).unwrap();
    assert_eq!(*disk.memory.log.lock(), ["write 0+4096", "discard 0+4096"]);
}

/// A protocol whose files are sizes, and a format that names a backing file.
struct Sized;
struct Naming;

#[async_trait]
impl DriverFactory for Sized {
    fn name(&self) -> &'static str {
        "file"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    async fn open(&self, _: OpenContext, mut options: Options) -> Result<Opened> {
        let name = options.take_str("filename")?.unwrap_or_default();
        if name == "missing" {
            return Err(ErrorKind::NotFound.into());
        }
        let memory = Memory::new(4096);
        memory.data.lock()[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Opened {
            driver: Arc::new(Named(Arc::new(memory), name)),
            edges: vec![],
        })
    }
}

/// Memory with a file name.
struct Named(Arc<Memory>, String);

#[async_trait]
impl BlockDriver for Named {
    fn name(&self) -> &'static str {
        "file"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn filename(&self) -> Option<String> {
        Some(self.1.clone())
    }
    fn length(&self, edges: &Edges) -> u64 {
        self.0.length(edges)
    }
    fn limits(&self, edges: &Edges) -> Limits {
        self.0.limits(edges)
    }
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        self.0.clone().read(request, offset, buf).await
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

#[async_trait]
impl DriverFactory for Naming {
    fn name(&self) -> &'static str {
        "naming"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }
    fn probe(&self, head: &[u8], _: &str) -> u32 {
        if head.starts_with(b"loop") { 100 } else { 0 }
    }
    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let name = file.filename().unwrap_or_default();
        let next = match name.as_str() {
            "loop-a" => "loop-b",
            "loop-b" => "./x/../loop-a",
            "loop-json" => "json:{\"driver\":\"file\"}",
            "loop-missing" => "missing",
            _ => "",
        };
        let backing = context
            .open_backing(&mut options, &file, Some(next), Some("naming"))
            .await?;
        let mut edges = vec![(ChildRole::File, "file".to_owned(), file)];
        edges.extend(backing.map(|node| (ChildRole::Backing, "backing".to_owned(), node)));
        Ok(Opened {
            driver: Arc::new(Counting::default()),
            edges,
        })
    }
}

fn open(name: &str, implicit: ImplicitOpens) -> (Arc<Graph>, Result<Arc<Node>>) {
    let registry = Arc::new(Registry::new().with(Sized).with(Naming));
    let graph = Graph::new(env());
    let how = OpenOptions {
        implicit,
        ..OpenOptions::default()
    };
    let opened = block_on(registry.open_file(&graph, name, None, Options::new(), how));
    (graph, opened)
}

#[test]
fn a_backing_loop_is_recognised_and_everything_is_closed_again() {
    let (graph, opened) = open("loop-a", ImplicitOpens::Permit);
    let error = opened.unwrap_err();
    assert!(
        error.reason().contains("creates an infinite loop"),
        "{error}"
    );
    assert!(graph.nodes().is_empty(), "{graph:?}");
}

#[test]
fn a_missing_backing_file_is_named_and_everything_is_closed_again() {
    let (graph, opened) = open("loop-missing", ImplicitOpens::Permit);
    let error = opened.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("missing"), "{error}");
    assert!(graph.nodes().is_empty(), "{graph:?}");
}

#[test]
fn files_that_images_name_are_opened_only_with_the_callers_consent() {
    let (_, opened) = open("loop-missing", ImplicitOpens::Deny);
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::AccessDenied);
    let (_, opened) = open(
        "loop-missing",
        ImplicitOpens::Ask(Arc::new(|name| name != "missing")),
    );
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::AccessDenied);
    let (_, opened) = open("loop-json", ImplicitOpens::Permit);
    assert_eq!(opened.unwrap_err().kind(), ErrorKind::AccessDenied);
    let (graph, opened) = open("loop-alone", ImplicitOpens::Deny);
    let node = opened.unwrap();
    let handle = graph
        .attach(
            &node,
            block_core::PermissionSet {
                used: ALL.used & block_core::Permissions::CONSISTENT_READ,
                shared: ALL.shared,
            },
            "x",
        )
        .unwrap();
    block_on(handle.close()).unwrap();
    assert!(graph.nodes().is_empty(), "{graph:?}");
}
