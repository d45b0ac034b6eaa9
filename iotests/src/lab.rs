//! A laboratory: one deterministic world with simulated disks, a registry whose `file` protocol is that storage, and a
//! graph with or without the gate. It sets things up and looks at them; it decides nothing about right and wrong.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Weak},
};

use block_core::{
    BlockHandle, Graph, Node, Options, Registry, RequestFlags, Result,
    driver::Capabilities,
    flags::{PermissionSet, Permissions},
    image::ImageInfo,
    registry::{ImplicitOpens, OpenOptions},
    secret::Secret,
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    oracle::{AfterDiscard, Ended, Mismatch, Oracle},
    parts::{self, ToolImage},
    pattern::stamped,
    sim::{Order, SimEnv},
    storage::{Content, Disk, Disks, TestStorageFactory},
};

/// How a laboratory is set up.
#[derive(Debug, Clone, Copy)]
pub struct LabOptions {
    /// Decides the schedule and every random number.
    pub seed: u64,
    /// In which order ready tasks run.
    pub order: Order,
    /// Whether requests wait at the gate. Without, images are meant to be corrupted.
    pub gate: bool,
    /// The storage's request alignment in bytes.
    pub alignment: u64,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            order: Order::Random,
            gate: true,
            alignment: 1,
        }
    }
}

/// A world of its own.
pub struct Lab {
    /// The environment.
    pub env: Arc<SimEnv>,
    /// The storage.
    pub disks: Disks,
    /// The drivers under test, and simulated storage as `file`.
    pub registry: Arc<Registry>,
    /// The graph.
    pub graph: Arc<Graph>,
    opened: Mutex<Vec<(String, Weak<Node>)>>,
    parts: Mutex<Parts>,
}

/// What the images of a world have beside their own files.
#[derive(Default)]
struct Parts {
    /// The ending of their data files' names.
    ending: Option<String>,
    /// The images that were made here, and name their data files themselves. Others are copies of theirs.
    made: HashSet<String>,
    /// The format whose images need the key.
    encrypted: Option<Encrypted>,
}

#[derive(Default)]
struct Encrypted {
    format: String,
    /// It is known whether compressed data may be stored in its images, unencrypted.
    asked: bool,
    consent: bool,
}

/// What a producer uses and shares in tests: everything.
pub fn all_permissions() -> PermissionSet {
    PermissionSet::new(
        Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE,
        Permissions::all(),
    )
}

impl Lab {
    /// A new world with the drivers of `registry`.
    pub fn new(registry: &Registry, options: LabOptions) -> Self {
        let env = match options.order {
            Order::Fifo => SimEnv::fifo(options.seed),
            Order::Random => SimEnv::new(options.seed),
        };
        Self::with_world(registry, options, env, Disks::new())
    }

    /// The same in a world that was made elsewhere, with disks that may hold images already.
    pub fn with_world(
        registry: &Registry,
        options: LabOptions,
        env: Arc<SimEnv>,
        disks: Disks,
    ) -> Self {
        let storage = TestStorageFactory::new(&disks).with_alignment(options.alignment);
        let registry = Arc::new(registry.clone().with(storage));
        let graph = if options.gate {
            Graph::new(env.clone())
        } else {
            Graph::new_without_gate_for_tests(env.clone())
        };
        let key = Secret::new(parts::PASSPHRASE.as_bytes().to_vec());
        // There is nothing else in a new graph.
        let _ = graph.secrets().add(parts::SECRET, key);
        let (seen, watched) = (disks.clone(), Arc::downgrade(&graph));
        env.add_witness(move || {
            let mut lines = seen.describe();
            for node in watched
                .upgrade()
                .map(|graph| graph.nodes())
                .unwrap_or_default()
            {
                let in_flight = node.tracker().in_flight();
                if in_flight > 0 {
                    lines.push(format!(
                        "node '{}': {in_flight} tracked requests",
                        node.name()
                    ));
                }
            }
            lines
        });
        Self {
            env,
            disks,
            registry,
            graph,
            opened: Mutex::default(),
            parts: Mutex::default(),
        }
    }

    /// Every image that was ever opened here, by the node's name.
    pub(crate) fn opened(&self) -> Vec<(String, Weak<Node>)> {
        self.opened.lock().clone()
    }

    /// The disk with that file name.
    pub fn disk(&self, name: &str) -> Result<Arc<Disk>> {
        self.disks.get(name).ok_or_else(|| {
            block_core::Error::new(block_core::ErrorKind::NotFound, format!("no disk '{name}'"))
        })
    }

    /// The options to create the image `name` with: its own data file and the key, where `options` ask for that.
    pub fn create_options(&self, format: &str, name: &str, options: &Options) -> Options {
        let mut parts = self.parts.lock();
        if let Some(ending) = parts::ending(options) {
            self.disks.keep_beside(ending);
            parts.ending = Some(ending.to_owned());
            parts.made.insert(name.to_owned());
        }
        if parts::is_encrypted(options) {
            self.disks.hide_data();
            let encrypted = parts.encrypted.get_or_insert_default();
            format.clone_into(&mut encrypted.format);
        }
        parts::of_image(options, name)
    }

    /// What the file with that name holds now: an image's, or its data file's.
    pub fn file(&self, name: &str) -> Result<Content> {
        self.disks.file(name).ok_or_else(|| {
            block_core::Error::new(block_core::ErrorKind::NotFound, format!("no file '{name}'"))
        })
    }

    /// Creates an image. A backing file is recorded in it if the format can. Where the options ask for a data file, each
    /// image gets its own, which is the second file of its disk; where they ask for encryption, the key is the suite's.
    pub async fn create(
        &self,
        format: &str,
        name: &str,
        size: u64,
        options: &Options,
        backing: Option<(&str, &str)>,
    ) -> Result<()> {
        let mut options = self
            .create_options(format, name, options)
            .with("size", size);
        if let Some((file, backing_format)) = backing
            && self.records_backing(format)
        {
            options.set("backing_file", file);
            options.set("backing_fmt", backing_format);
        }
        let making = self.disks.make(name);
        self.registry
            .create(&self.graph, format, name, options)
            .await?;
        drop(making);
        self.learn_consent(format, name);
        Ok(())
    }

    /// Whether images of the format name their backing file themselves.
    pub fn records_backing(&self, format: &str) -> bool {
        self.registry.get(format).is_ok_and(|factory| {
            factory
                .create_options()
                .iter()
                .any(|option| option.name == "backing_file")
        })
    }

    /// The options to open an image with. `backing` is among them for formats that don't record it.
    pub fn open_options(
        &self,
        format: &str,
        backing: Option<(&str, &str)>,
        extra: &Options,
    ) -> Options {
        let mut options = extra.clone();
        if let Some((file, backing_format)) = backing
            && !self.records_backing(format)
        {
            let file = Options::new().with("driver", "file").with("filename", file);
            let backing = Options::new()
                .with("driver", backing_format)
                .with("file", Value::Object(file.0));
            options.set("backing", Value::Object(backing.0));
        }
        options
    }

    /// The options to open the image `name` with: those of [`Self::open_options`], its data file if it doesn't name that
    /// itself, and the key for it and all below it.
    pub fn options_for(
        &self,
        format: &str,
        name: &str,
        backing: Option<(&str, &str)>,
        extra: &Options,
    ) -> Options {
        let mut options = self.open_options(format, backing, extra);
        self.add_parts(format, name, false, &mut options);
        options
    }

    /// Adds what the image `name` needs, and what those below it need that it names itself.
    fn add_parts(&self, format: &str, name: &str, for_tools: bool, options: &mut Options) {
        let (own, matters) = self.own_parts(format, name, for_tools);
        if matters && options.get("backing").is_none() {
            let mut chain = Vec::new();
            let mut next = self.backing_of(format, name);
            // The files may name one another in a circle.
            while let Some((file, of)) = next.take()
                && chain.len() < Registry::MAX_DEPTH + 8
            {
                next = self.backing_of(&of, &file);
                chain.push(self.own_parts(&of, &file, for_tools).0);
            }
            let below = chain.into_iter().rev().fold(None, |below, mut own| {
                if let Some(below) = below {
                    own.set("backing", below);
                }
                (!own.0.is_empty()).then_some(Value::Object(own.0))
            });
            if let Some(below) = below {
                options.set("backing", below);
            }
        }
        for (key, value) in own.0 {
            options.set_default(&key, value);
        }
    }

    /// The options that the image `name` itself needs, and whether images below it may need any. Copies don't name their own
    /// data file. The tools look for what an image names in their own directory, not in the image's: they are told of all
    /// (`for_tools`).
    fn own_parts(&self, format: &str, name: &str, for_tools: bool) -> (Options, bool) {
        let parts = self.parts.lock();
        let needs_file = |disk: &Arc<Disk>| {
            (for_tools || !parts.made.contains(disk.name()))
                && disk.content().beside_len().is_some()
        };
        let mut own = Options::new();
        let disk = self.disks.get(name).filter(needs_file);
        if let Some(ending) = &parts.ending
            && disk.is_some()
        {
            let data = parts::data_file(name, ending);
            own.set("data-file", json!({ "driver": "file", "filename": data }));
        }
        let encrypted = parts.encrypted.as_ref();
        let encrypted = encrypted.filter(|encrypted| encrypted.format == format);
        if let Some(encrypted) = encrypted {
            own.set("encrypt", parts::key(encrypted.consent && !for_tools));
        }
        let copies = parts.ending.is_some() && self.disks.all().iter().any(needs_file);
        (own, copies || encrypted.is_some())
    }

    /// What an image says of itself. It is looked at in a world of its own, so that nothing of this one is touched.
    fn look_at(&self, format: &str, name: &str, options: &Options) -> Option<ImageInfo> {
        let disks = Disks::new();
        disks.insert(Disk::new(name, self.disks.get(name)?.content()));
        let (options, env) = (options.clone(), SimEnv::fifo(0));
        let other = Self::with_world(&self.registry, LabOptions::default(), env, disks);
        let how = OpenOptions {
            no_backing: true,
            no_data_file: true,
            for_check: true,
            metadata_only: true,
            ..OpenOptions::default()
        };
        let look = async {
            let (registry, graph) = (&other.registry, &other.graph);
            let options = options.with("read-only", true);
            let opening = registry.open_file(graph, name, Some(format), options, how);
            let node = opening.await.ok()?;
            let handle = graph.attach(&node, PermissionSet::NONE, "look").ok()?;
            handle.info().await.ok()
        };
        other.env.try_run(look).ok()?
    }

    /// The backing file that an image names, and its format.
    pub(crate) fn backing_of(&self, format: &str, name: &str) -> Option<(String, String)> {
        if !self.records_backing(format) {
            return None;
        }
        let info = self.look_at(format, name, &Options::new())?;
        Some((info.backing_filename?, info.backing_format?))
    }

    /// Finds out whether a driver stores compressed data in encrypted images when it is asked to, without encrypting it.
    fn learn_consent(&self, format: &str, name: &str) {
        let asked = |parts: &Parts| {
            let encrypted = parts.encrypted.as_ref()?;
            (encrypted.format == format && !encrypted.asked).then_some(())
        };
        if asked(&self.parts.lock()).is_none() {
            return;
        }
        let options = Options::new().with("encrypt", parts::key(true));
        let consent = self.look_at(format, name, &options).is_some();
        if let Some(encrypted) = &mut self.parts.lock().encrypted {
            (encrypted.asked, encrypted.consent) = (true, consent);
        }
    }

    /// Opens an image. `backing` is given explicitly to formats that don't record it. An image with a data file is opened
    /// with its own, an encrypted one with the suite's key.
    pub async fn open(
        &self,
        format: &str,
        name: &str,
        backing: Option<(&str, &str)>,
        extra: &Options,
    ) -> Result<Arc<Node>> {
        let options = self.options_for(format, name, backing, extra);
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            ..OpenOptions::default()
        };
        let node = self
            .registry
            .open_file(&self.graph, name, Some(format), options, how)
            .await?;
        let watched = (node.name().to_owned(), Arc::downgrade(&node));
        self.opened.lock().push(watched);
        Ok(node)
    }

    /// The name of an image's data file, where images have them.
    pub(crate) fn data_file(&self, name: &str) -> Option<String> {
        let parts = self.parts.lock();
        Some(parts::data_file(name, parts.ending.as_deref()?))
    }

    /// The files of an image: its own, and its data file if it has one.
    pub(crate) fn files_of(&self, name: &str, content: &Content) -> Vec<(String, Content)> {
        let mut files = vec![(name.to_owned(), content.clone())];
        if let Some(beside) = content.beside()
            && let Some(data) = self.data_file(name)
        {
            files.push((data, beside));
        }
        files
    }

    /// The image `name`, whose files are in `dir` under their own names, for programs of qemu's: with what is below it, or
    /// alone for those that don't open that.
    pub(crate) fn tool_image(
        &self,
        format: &str,
        name: &str,
        dir: &Path,
        alone: bool,
    ) -> ToolImage {
        let mut options = Options::new();
        self.add_parts(format, name, true, &mut options);
        if alone {
            options.take("backing");
        }
        if options.0.is_empty() {
            return ToolImage::plain(format, &dir.join(name));
        }
        options.set("driver", format);
        options.set("file", json!({ "driver": "file", "filename": name }));
        let mut options = Value::Object(options.0);
        settle(&mut options, dir);
        ToolImage::with_options(&options)
    }

    /// A producer's handle.
    pub fn attach(&self, node: &Arc<Node>, name: &str) -> Result<Arc<BlockHandle>> {
        self.graph
            .attach(node, all_permissions(), name)
            .map(Arc::new)
    }
}

/// Makes the file names in options of a node those of files in `dir`.
fn settle(options: &mut Value, dir: &Path) {
    let Value::Object(map) = options else { return };
    for (key, value) in map {
        match value {
            Value::String(name) if key == "filename" => {
                *name = dir.join(&*name).to_string_lossy().into_owned();
            }
            other => settle(other, dir),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for disk in self.disks.all() {
            disk.clear_rules();
        }
        self.env.shutdown();
    }
}

/// What a discard at this node leaves behind.
pub fn after_discard(node: &Node) -> AfterDiscard {
    let capabilities = node.driver().capabilities();
    if capabilities.contains(Capabilities::DISCARD | Capabilities::DISCARD_ZEROES) {
        AfterDiscard::Zeroes
    } else {
        AfterDiscard::Anything
    }
}

/// A producer that tells the oracle what it does, and stamps what it writes. Cloning shares the handle.
#[derive(Clone)]
pub struct Guest {
    handle: Arc<BlockHandle>,
    oracle: Oracle,
    owner: u32,
}

fn how<T>(result: &Result<T>) -> Ended {
    if result.is_ok() {
        Ended::Done
    } else {
        Ended::Undone
    }
}

impl Guest {
    /// A producer that signs as `owner`.
    pub fn new(handle: &Arc<BlockHandle>, oracle: &Oracle, owner: u32) -> Self {
        Self {
            handle: handle.clone(),
            oracle: oracle.clone(),
            owner,
        }
    }

    /// The same producer under another signature.
    #[must_use]
    pub fn signing(&self, owner: u32) -> Self {
        Self {
            owner,
            ..self.clone()
        }
    }

    /// The handle.
    pub fn handle(&self) -> &Arc<BlockHandle> {
        &self.handle
    }

    /// The oracle.
    pub fn oracle(&self) -> &Oracle {
        &self.oracle
    }

    /// Writes stamped data.
    pub async fn write(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        let change = self.oracle.write(self.owner, offset, len);
        let data = stamped(self.owner, change.seq(), offset, len);
        let result = self.handle.write(offset, data, flags).await;
        change.end(how(&result));
        result
    }

    /// Writes zeroes.
    pub async fn zero(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        let change = self.oracle.zero(offset, len);
        let result = self.handle.write_zeroes(offset, len, flags).await;
        change.end(how(&result));
        result
    }

    /// Discards.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let change = self.oracle.discard(offset, len);
        let result = self.handle.discard(offset, len).await;
        change.end(how(&result));
        result
    }

    /// Reads, and gives what is wrong with it.
    pub async fn read(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<Vec<Mismatch>> {
        let reading = self.oracle.read();
        let (lent, buf) = block_core::Buffer::try_new(len as usize)?.lend();
        self.handle.readv(offset, buf, flags).await?;
        let bytes = lent
            .reclaim()
            .map_err(|_| block_core::Error::io("a driver kept a part of a read buffer"))?;
        Ok(reading.check(offset, &bytes))
    }

    /// The whole disk, at rest, against the oracle.
    pub async fn verify(&self, lenient: bool) -> Result<Vec<Mismatch>> {
        const CHUNK: u64 = 256 << 10;
        let mut wrong = Vec::new();
        let length = self.handle.length();
        let mut at = 0;
        while at < length {
            let step = (length - at).min(CHUNK);
            let bytes = self.handle.read(at, step as usize).await?;
            wrong.extend(if lenient {
                self.oracle.check_lenient(at, &bytes)
            } else {
                self.oracle.check(at, &bytes)
            });
            at += step;
        }
        Ok(wrong)
    }
}
