//! One phase's world: the images opened in a fresh graph over the disks that outlive it, everything watched. It sets up and
//! takes down; what is asked of it is in `guest` and `work`, and what is right in `judge`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use block_core::{
    BlockHandle, Graph, Node, Options, PermissionSet, Permissions, Registry, Result,
    driver::DriverKind,
    error::ErrorKind,
    registry::{ImplicitOpens, OpenOptions},
};
use parking_lot::Mutex;
use serde_json::Value;

use super::{
    bitmaps::Bitmaps,
    books::Books,
    lengths::Lengths,
    progress::Progress,
    record::Recorder,
    scenario::{Layer, Phase, Scenario},
    snapshots::Snapshots,
};
use crate::{
    lab::{Lab, LabOptions},
    oracle::Oracle,
    parts::{self, DATA_FILE, ENCRYPTION, SECRET},
    storage::{Disk, DiskWatch, Disks, OpInfo},
};

/// What guests use and share. Resizes have a handle of their own.
pub(super) const GUEST: PermissionSet = PermissionSet::new(
    Permissions::CONSISTENT_READ.union(Permissions::WRITE),
    Permissions::all(),
);

/// Options of creation whose use is counted.
const COUNTED: [&str; 7] = [
    DATA_FILE,
    ENCRYPTION,
    "compression_type",
    "data_file_raw",
    "extended_l2",
    "lazy_refcounts",
    "preallocation",
];

/// The name of an image's data file, which is a disk of its own here.
pub(super) fn data_file(image: &str) -> String {
    parts::data_file(image, "data")
}

/// What is the same in all phases of a run.
pub(super) struct Setup {
    pub registry: Arc<Registry>,
    pub scenario: Scenario,
    pub gate: bool,
    pub books: bool,
    pub records_backing: bool,
    pub disks: Disks,
    pub recorder: Arc<Recorder>,
    pub watch: Arc<WorldWatch>,
    /// The graph of each laboratory that there was: none may be left in the end.
    pub worlds: Mutex<Vec<Weak<Graph>>>,
}

/// Sees every request to every disk, for the recorder and for the books of the image on it.
pub(super) struct WorldWatch {
    recorder: Arc<Recorder>,
    books: Mutex<BTreeMap<String, Arc<Books>>>,
}

impl WorldWatch {
    pub fn new(recorder: &Arc<Recorder>) -> Arc<Self> {
        Arc::new(Self {
            recorder: recorder.clone(),
            books: Mutex::default(),
        })
    }

    fn books_of(&self, image: &str) -> Option<Arc<Books>> {
        self.books.lock().get(image).cloned()
    }

    /// Nothing is open any more.
    pub fn clear(&self) {
        self.books.lock().clear();
    }

    /// Everything has come to rest.
    pub fn check_books(&self) {
        let books: Vec<Arc<Books>> = self.books.lock().values().cloned().collect();
        for books in &books {
            books.check();
        }
    }
}

impl DiskWatch for WorldWatch {
    fn begins(&self, disk: &Disk, op: &OpInfo) {
        self.recorder.begins(disk, op);
        if let Some(books) = self.books_of(disk.name()) {
            books.disk_op(op);
        }
    }

    fn takes_effect(&self, disk: &Disk, op: &OpInfo) {
        self.recorder.takes_effect(disk, op);
    }

    fn ended(&self, disk: &Disk, op: &OpInfo, result: Result<(), ErrorKind>) {
        self.recorder.ended(disk, op, result);
    }
}

/// A phase's world.
pub(super) struct World {
    pub setup: Arc<Setup>,
    pub lab: Lab,
    pub phase: Phase,
    /// Tells the producers of different phases apart.
    pub number: u32,
    pub oracle: Oracle,
    pub handle: Mutex<Option<Arc<BlockHandle>>>,
    pub progress: Progress,
    /// Which length the disk has, had, or may have had, in this phase.
    pub lengths: Lengths,
    pub snapshots: Snapshots,
    pub bitmaps: Bitmaps,
    /// Where the jobs' targets are; the first of them suffers the faults.
    pub targets: Mutex<Vec<String>>,
    pub manager: Arc<jobs::JobManager>,
}

impl Setup {
    /// A laboratory over the disks of this run.
    pub fn lab(&self) -> Lab {
        let env = self.recorder.env().clone();
        env.reopen();
        let options = LabOptions {
            gate: self.gate,
            ..LabOptions::default()
        };
        self.watch.clear();
        let lab = Lab::with_world(&self.registry, options, env, self.disks.clone());
        self.worlds.lock().push(Arc::downgrade(&lab.graph));
        if self.recorder.keeps_events() {
            super::timeline::watch_gates(&self.recorder, &lab.graph);
        }
        lab
    }

    /// Makes an image on a new disk.
    pub async fn create(
        &self,
        lab: &Lab,
        name: &str,
        layer: &Layer,
        backing: Option<&str>,
    ) -> Result<()> {
        let mut options = Options::new().with("size", layer.size);
        for (key, value) in &layer.options {
            if key == DATA_FILE {
                options.set(key, data_file(name));
            } else {
                options.set(key, value.as_str());
            }
        }
        if layer.has(ENCRYPTION) {
            options.set("encrypt.key-secret", SECRET);
        }
        if let Some(backing) = backing
            && self.records_backing
        {
            options.set("backing_file", backing);
            options.set("backing_fmt", self.scenario.format.as_str());
        }
        lab.registry
            .create(&lab.graph, &self.scenario.format, name, options)
            .await?;
        for name in [name.to_owned(), data_file(name)] {
            if let Some(disk) = self.disks.get(&name) {
                disk.set_jitter(self.scenario.jitter);
                disk.track_durability();
                disk.set_watch(self.watch.clone());
            }
        }
        for option in COUNTED {
            let on = |(key, value): &(String, String)| key == option && value != "off";
            if layer.options.iter().any(on) {
                self.recorder.count(&format!("images-with-{option}"), 1);
            }
        }
        Ok(())
    }

    /// The option `backing`, for formats that don't name it in the image, and for images that need a key.
    fn backing_options(&self, below: &[String]) -> Option<Value> {
        let (first, rest) = below.split_first()?;
        let file = Options::new()
            .with("driver", "file")
            .with("filename", first.as_str());
        let mut options = Options::new()
            .with("driver", self.scenario.format.as_str())
            .with("file", Value::Object(file.0));
        if let Some(backing) = self.backing_options(rest) {
            options.set("backing", backing);
        }
        self.set_key(&mut options);
        Some(Value::Object(options.0))
    }

    /// Images that aren't encrypted don't mind.
    fn set_key(&self, options: &mut Options) {
        if self.scenario.is_encrypted() {
            options.set("encrypt", parts::key(false));
        }
    }

    /// Opens the topmost of `names` over the others.
    pub async fn open(&self, lab: &Lab, names: &[String]) -> Result<Arc<Node>> {
        self.open_with(lab, names, Options::new()).await
    }

    /// Opens an image without the backing file that it may name.
    pub async fn open_alone(&self, lab: &Lab, name: &str) -> Result<Arc<Node>> {
        let mut options = Options::new();
        if self.records_backing {
            options.set("backing", Value::Null);
        }
        self.open_with(lab, &[name.to_owned()], options).await
    }

    /// Opens the topmost of `names` as it was when an internal snapshot was taken.
    pub async fn open_snapshot(
        &self,
        lab: &Lab,
        names: &[String],
        snapshot: &str,
    ) -> Result<Arc<Node>> {
        let options = Options::new()
            .with("snapshot-name", snapshot)
            .with("read-only", true);
        self.open_with(lab, names, options).await
    }

    async fn open_with(
        &self,
        lab: &Lab,
        names: &[String],
        mut options: Options,
    ) -> Result<Arc<Node>> {
        let Some((top, below)) = names.split_first() else {
            return Err(block_core::Error::invalid("a chain of no images"));
        };
        for (key, value) in &self.scenario.open {
            options.set(key, value.as_str());
        }
        self.set_key(&mut options);
        if (!self.records_backing || self.scenario.is_encrypted())
            && let Some(backing) = self.backing_options(below)
        {
            options.set("backing", backing);
        }
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            ..OpenOptions::default()
        };
        let format = Some(self.scenario.format.as_str());
        let node = lab
            .registry
            .open_file(&lab.graph, top, format, options, how)
            .await?;
        self.keep_books(lab, &node).await?;
        Ok(node)
    }

    /// Begins to keep books of an image and those below it.
    pub async fn keep_books(&self, lab: &Lab, top: &Arc<Node>) -> Result<()> {
        let mut nodes = top.chain();
        nodes.insert(0, top.clone());
        for node in nodes {
            if node.driver().kind() != DriverKind::Format {
                continue;
            }
            let Some(name) = node.filename() else {
                continue;
            };
            if self.watch.books.lock().contains_key(&name) {
                continue;
            }
            let handle = lab.graph.attach(&node, PermissionSet::NONE, "books")?;
            let Some(unit) = handle.info().await?.cluster_size else {
                continue;
            };
            if let Some(books) = Books::open(&self.recorder, &node, &name, unit, self.books) {
                self.recorder.count("images-with-books", 1);
                self.watch.books.lock().insert(name, books);
            }
        }
        Ok(())
    }
}

impl World {
    /// The guest's handle, as long as the phase lasts.
    pub fn guest(&self) -> Result<Arc<BlockHandle>> {
        self.handle
            .lock()
            .clone()
            .ok_or_else(|| block_core::Error::new(ErrorKind::NoMedium, "the phase is over"))
    }

    /// The files of the images that the guest's disk is made of now, topmost first.
    pub fn names(&self) -> Vec<String> {
        let Some(handle) = self.handle.lock().clone() else {
            return Vec::new();
        };
        let top = handle.node();
        let mut nodes = top.chain();
        nodes.insert(0, top);
        nodes
            .iter()
            .filter(|node| node.driver().kind() == DriverKind::Format)
            .filter_map(|node| node.filename())
            .collect()
    }

    /// Whether a failed request may be the doing of a fault.
    pub fn may_fail(&self) -> bool {
        !self.setup.gate || self.setup.recorder.disk_errors() > 0
    }

    /// Adds up what the nodes of the graph count.
    pub fn collect_counters(&self) {
        let recorder = &self.setup.recorder;
        for node in self.lab.graph.nodes() {
            recorder.count("gate-waits", node.tracker().waits());
            recorder.count("dropped-at-driver", node.stats().snapshot().dropped);
            for (name, value) in node.driver().counters() {
                if !name.ends_with("peak") {
                    recorder.count(name, value);
                }
            }
        }
    }
}
