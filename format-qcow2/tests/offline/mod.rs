//! Storage in memory that remembers every write and flush, and the installed qemu-img, for tests of the code that
//! works on an image without its driver: create, check and repair.
#![allow(dead_code, clippy::unwrap_used)]

use std::{
    any::Any,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use block_core::{
    async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Truncate},
    env::Environment,
    error::{Error, Result},
    flags::RequestFlags,
    graph::{Graph, NodeSpec},
    image::{CheckMode, CheckReport, Progress},
    limits::Limits,
    node::{Edges, Node},
    options::Options,
    request::{Child, Request},
};
use format_qcow2::{check, create, header_update, layout::Header};
use futures::{executor::block_on, future::BoxFuture};
use parking_lot::Mutex;
use serde_json::Value;

struct Threads;

impl Environment for Threads {
    fn now(&self) -> Duration {
        Duration::ZERO
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(async move { std::thread::sleep(duration) })
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        std::thread::spawn(move || block_on(task));
    }
    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        std::thread::spawn(work);
    }
    fn random(&self) -> u64 {
        4
    }
}

/// What reached the storage.
#[derive(Debug, Clone)]
pub enum Event {
    Write(u64, Vec<u8>),
    Length(u64),
    Flush,
}

impl Event {
    /// What the event does to the storage.
    pub fn apply(&self, data: &mut Vec<u8>) {
        match self {
            Self::Write(offset, bytes) => {
                let (at, end) = (*offset as usize, *offset as usize + bytes.len());
                if data.len() < end {
                    data.resize(end, 0);
                }
                data[at..end].copy_from_slice(bytes);
            }
            Self::Length(length) => data.resize(*length as usize, 0),
            Self::Flush => {}
        }
    }
}

#[derive(Default)]
struct State {
    data: Vec<u8>,
    log: Vec<Event>,
    fail_reads: Option<std::ops::Range<u64>>,
    /// Asks this to stop after so many reads and events.
    cancel: Option<(usize, Progress)>,
}

impl State {
    fn count(&mut self) {
        if let Some((left, progress)) = &mut self.cancel {
            if *left == 0 {
                progress.cancel();
            }
            *left = left.saturating_sub(1);
        }
    }
}

/// The storage.
#[derive(Default)]
pub struct Storage(Mutex<State>);

impl Storage {
    fn event(&self, event: Event) {
        let state = &mut *self.0.lock();
        event.apply(&mut state.data);
        state.log.push(event);
        state.count();
    }
}

#[async_trait]
impl BlockDriver for Storage {
    fn name(&self) -> &'static str {
        "storage"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::TRUNCATE
            | Capabilities::GROW
    }
    fn length(&self, _: &Edges) -> u64 {
        self.0.lock().data.len() as u64
    }
    fn limits(&self, _: &Edges) -> Limits {
        Limits::default()
    }
    async fn read(self: Arc<Self>, _: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let mut state = self.0.lock();
        state.count();
        let end = offset + buf.len() as u64;
        if state
            .fail_reads
            .as_ref()
            .is_some_and(|bad| offset < bad.end && bad.start < end)
        {
            return Err(Error::io(""));
        }
        buf.copy_from_slice(0, &state.data[offset as usize..end as usize]);
        Ok(())
    }
    async fn write(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        buf: IoBuf,
        _: RequestFlags,
    ) -> Result<()> {
        self.event(Event::Write(offset, buf.to_vec()));
        Ok(())
    }
    async fn write_zeroes(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
        _: RequestFlags,
    ) -> Result<()> {
        self.event(Event::Write(offset, vec![0; len as usize]));
        Ok(())
    }
    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        self.event(Event::Flush);
        Ok(())
    }
    async fn truncate(self: Arc<Self>, _: Request, length: u64, _: Truncate) -> Result<()> {
        self.event(Event::Length(length));
        Ok(())
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An image in memory.
pub struct Image {
    pub storage: Arc<Storage>,
    pub child: Child,
    _graph: Arc<Graph>,
    _node: Arc<Node>,
}

impl Image {
    pub fn new(data: Vec<u8>) -> Self {
        let storage = Arc::new(Storage::default());
        storage.0.lock().data = data;
        let graph = Graph::new(Arc::new(Threads));
        let node = graph.add_node(NodeSpec::new(storage.clone())).unwrap();
        let child = Child::unattached(node.clone());
        Self {
            storage,
            child,
            _graph: graph,
            _node: node,
        }
    }

    pub fn load(path: &Path) -> Self {
        Self::new(std::fs::read(path).unwrap())
    }

    /// A new image with these options.
    pub fn create(options: &str) -> Result<Self> {
        let parameters = create::Parameters::from_options(Options::from_dotted(options)?)?;
        let image = Self::new(Vec::new());
        block_on(create::create_in(&image.child, &parameters))?;
        Ok(image)
    }

    pub fn data(&self) -> Vec<u8> {
        self.storage.0.lock().data.clone()
    }

    pub fn log(&self) -> Vec<Event> {
        self.storage.0.lock().log.clone()
    }

    pub fn save(&self, path: &Path) {
        std::fs::write(path, &self.storage.0.lock().data).unwrap();
    }

    /// Reads of this range fail from here on.
    pub fn fail_reads(&self, range: std::ops::Range<u64>) {
        self.storage.0.lock().fail_reads = Some(range);
    }

    /// Cancels `progress` when the storage has served so many more requests.
    pub fn cancel_after(&self, requests: usize, progress: Progress) {
        self.storage.0.lock().cancel = Some((requests, progress));
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let data = &mut self.storage.0.lock().data;
        data[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn put64(&self, offset: u64, value: u64) {
        self.put(offset, &value.to_be_bytes());
    }

    pub fn get64(&self, offset: u64) -> u64 {
        let data = &self.storage.0.lock().data;
        u64::from_be_bytes(
            data[offset as usize..offset as usize + 8]
                .try_into()
                .unwrap(),
        )
    }

    pub fn header(&self) -> Result<Header> {
        block_on(header_update::read_header(&self.child))
    }

    pub fn check(&self, mode: CheckMode) -> Result<CheckReport> {
        let mut header = self.header()?;
        block_on(check::run(&self.child, &mut header, mode, &Progress::new()))
    }
}

/// A place for files, and qemu-img to make and judge them. Tests that need it do nothing where it isn't installed.
pub struct Lab(tempfile::TempDir);

impl Lab {
    pub fn new() -> Option<Self> {
        let installed = Command::new("qemu-img").arg("--version").output().is_ok();
        if !installed {
            eprintln!("qemu-img isn't installed: nothing compared");
        }
        installed.then(|| Self(tempfile::tempdir().unwrap()))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program)
            .args(args)
            .current_dir(self.0.path())
            .output()
            .unwrap()
    }

    /// Makes an image with the installed qemu-img.
    pub fn create(&self, options: &str, name: &str, size: &str) {
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, size]);
    }

    /// Runs qemu-img, which must succeed, and gives back what it printed.
    pub fn qemu_img(&self, args: &[&str]) -> String {
        let output = self.run("qemu-img", args);
        assert!(
            output.status.success(),
            "qemu-img {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs qemu-img and gives back its exit status.
    pub fn status(&self, args: &[&str]) -> i32 {
        self.run("qemu-img", args).status.code().unwrap()
    }

    /// Runs qemu-io with these commands, which must succeed.
    pub fn qemu_io(&self, file: &str, commands: &[&str]) {
        // Nothing here has to survive a power cut of the machine that runs the tests.
        let mut args = vec!["-t", "unsafe"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(file);
        let output = self.run("qemu-io", &args);
        assert!(
            output.status.success(),
            "qemu-io {args:?}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }

    /// As [`Self::check`], of an image named with options and opened with the secret `s`.
    pub fn check_json(&self, name: &str) -> Value {
        let secret = "secret,id=s,data=letmein";
        let output = self.run(
            "qemu-img",
            &["check", "--output=json", "--object", secret, name],
        );
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
    }

    /// `qemu-img check --output=json`, whatever it finds.
    pub fn check(&self, file: &str) -> Value {
        let output = self.run("qemu-img", &["check", "-f", "qcow2", "--output=json", file]);
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
    }
}

/// The exit status that qemu-img would have for a report.
pub fn exit_status(report: &CheckReport) -> i32 {
    if report.check_errors > 0 {
        1
    } else if report.corruptions > 0 {
        2
    } else if report.leaks > 0 {
        3
    } else {
        0
    }
}

/// Compares all counts of a report with those of qemu-img.
pub fn assert_same_counts(report: &CheckReport, theirs: &Value, what: &str) {
    for (name, ours) in [
        ("check-errors", report.check_errors),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("image-end-offset", report.image_end_offset.unwrap_or(0)),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
    ] {
        let theirs = theirs.get(name).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(
            ours, theirs,
            "{what}: {name}, findings {:?}",
            report.findings
        );
    }
}
