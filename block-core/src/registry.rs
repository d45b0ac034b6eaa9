//! The drivers that a program chose to link, and how images are probed, opened and created with them.
//!
//! There is no global registry: a program makes one and registers what it wants. Opening the files that an image
//! names (backing files, extents) is a decision of the caller, visible in [`OpenOptions::implicit`].

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde::Serialize;

use crate::{
    driver::{BlockDriver, ChildRole, DriverKind},
    error::{Error, ErrorKind, Operation, Result},
    graph::Graph,
    node::Node,
    open::{self, Nest},
    options::{NodeOptions, Options},
    request::Child,
};

/// What a driver's `open` gives back: the driver, and the children that it needs.
pub struct Opened {
    /// The driver.
    pub driver: Arc<dyn BlockDriver>,
    /// Its children: role, name of the edge (`file`, `backing`, `extents.0`), node.
    pub edges: Vec<(ChildRole, String, Arc<Node>)>,
}

/// An option that `create` (`-o`) takes.
#[derive(Debug, Clone, Copy)]
pub struct CreateOption {
    /// Its name, with underscores as `qemu-img -o` spells it.
    pub name: &'static str,
    /// `str`, `size`, `num` or `bool (on/off)`, for help texts.
    pub kind: &'static str,
    /// One line for people.
    pub help: &'static str,
}

impl CreateOption {
    /// The same, in a line.
    pub const fn new(name: &'static str, kind: &'static str, help: &'static str) -> Self {
        Self { name, kind, help }
    }
}

/// Sizes that a new image would need, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measure {
    /// To hold the data that is there.
    pub required: u64,
    /// To hold data everywhere.
    pub fully_allocated: u64,
}

/// Makes drivers of one kind.
#[async_trait]
pub trait DriverFactory: Send + Sync + 'static {
    /// The driver's name.
    fn name(&self) -> &'static str;

    /// What kind of nodes it makes.
    fn kind(&self) -> DriverKind;

    /// How sure it is that `head` (the first 2048 bytes or fewer) begins an image of this format: 0 (not at all) to 100.
    fn probe(&self, head: &[u8], filename: &str) -> u32 {
        let _ = (head, filename);
        0
    }

    /// Opens an image. The options left in `options` are the driver's own: the common ones are in `context`.
    async fn open(&self, context: OpenContext, options: Options) -> Result<Opened>;

    /// The options that the file name `NAME:rest` stands for, where NAME is the driver's own. A protocol's are
    /// understood without this; formats and filters have none unless they say so.
    fn parse_filename(&self, registry: &Registry, rest: &str) -> Option<Result<Options>> {
        let _ = (registry, rest);
        None
    }

    /// Which file a protocol's options name, if it is there: the same for all names of one file. `None` also where that can't be told
    /// without opening it. May look at a directory.
    fn file_identity(&self, options: &Options) -> Option<u128> {
        let _ = options;
        None
    }

    /// Whether images of this format can have a backing file; for others, options of one are refused before
    /// [`Self::open`] sees them. Unless it says otherwise, those that can be created with one.
    fn has_backing(&self) -> bool {
        let mut options = self.create_options().iter();
        options.any(|option| option.name == "backing_file")
    }

    /// The options that `create` takes.
    fn create_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// The options that [`crate::driver::BlockDriver::amend`] takes; none when images can't be amended.
    fn amend_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// Refuses what [`Self::create`] would refuse for its options. It is asked before the storage is made, which empties a file that is
    /// there; `context` has no storage yet.
    fn may_create(&self, context: &CreateContext, options: Options) -> Result<()> {
        let _ = (context, options);
        Ok(())
    }

    /// Makes a new image. For a format, `context.file` is fresh, empty storage; a protocol makes the storage.
    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        let _ = (context, options);
        Err(Error::unsupported(format!(
            "Format driver '{}' does not support image creation",
            self.name()
        )))
    }

    /// How large an image with these create options would get, for `size` virtual bytes of which `data` lists the
    /// allocated extents (offset, length), ascending and disjoint.
    fn measure(&self, size: u64, data: &[(u64, u64)], options: Options) -> Result<Measure> {
        let _ = (size, data, options);
        Err(Error::unsupported(format!(
            "Block driver '{}' does not support size measurement",
            self.name()
        )))
    }
}

/// Who decides whether a file that an image names may be opened.
#[derive(Clone, Default)]
pub enum ImplicitOpens {
    /// Only what the options name.
    #[default]
    Deny,
    /// Whatever the image names.
    Permit,
    /// The function is given the path, or the name as it stands in the image where that isn't one
    /// ([`OpenOptions::options_in_names`]).
    Ask(Arc<dyn Fn(&str) -> bool + Send + Sync>),
}

impl fmt::Debug for ImplicitOpens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deny => "Deny",
            Self::Permit => "Permit",
            Self::Ask(_) => "Ask",
        })
    }
}

/// How an image is to be opened, beyond its options.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// May files that images name be opened?
    pub implicit: ImplicitOpens,
    /// May the names in images be more than paths: `json:{…}`, or `PROTOCOL:…`? Whoever wrote such an image chooses drivers and their
    /// options, and so what is opened (a device, a server); they are refused unless this is set, whatever `implicit` says.
    pub options_in_names: bool,
    /// Don't open backing files.
    pub no_backing: bool,
    /// Don't open external data files: the image says what it says of itself, but its guest data can't be had.
    pub no_data_file: bool,
    /// Open for check or repair: dirty and corrupt images are accepted as they are.
    pub for_check: bool,
    /// Nothing but what the image says of itself is wanted: encrypted images are opened without their keys, and fail all
    /// requests for encrypted data.
    pub metadata_only: bool,
}

impl OpenOptions {
    /// The file name that [`Registry::open_file`] takes for `name`, which stands in the image `owner`: what the opening of that image
    /// would do with it.
    ///
    /// # Errors
    /// `AccessDenied` for a file that the opening would refuse.
    pub fn permitted_name(&self, owner: &str, name: &str) -> Result<String> {
        open::permitted_name(self, owner, name)
    }
}

/// What a driver's `open` may use.
#[derive(Clone)]
pub struct OpenContext {
    pub(crate) graph: Arc<Graph>,
    pub(crate) registry: Arc<Registry>,
    /// The common options of the node that is being opened.
    pub node: NodeOptions,
    /// How the image is opened.
    pub how: OpenOptions,
    /// The format was guessed by probing, not named by the user.
    pub probed: bool,
    /// The files of the overlays above, outermost first, to recognise loops.
    pub(crate) chain: Vec<Arc<str>>,
    /// How many nodes there are on the way from the top to this one.
    pub(crate) depth: usize,
    /// Children opened for this node so far: released when its own opening fails.
    pub(crate) opened: Arc<Mutex<Vec<Arc<Node>>>>,
    /// Where children are opened.
    pub(crate) nest: Nest,
}

impl OpenContext {
    /// The graph that the node will be in.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The registry.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Opens (or finds) the child that `options` hold under `key`. `None` when they hold nothing or `null`.
    pub async fn open_child(&self, options: &mut Options, key: &str) -> Result<Option<Arc<Node>>> {
        open::child(self, options.take_child(key)?, key).await
    }

    /// Opens (or finds) the `file` child, which must be there.
    pub async fn open_file(&self, options: &mut Options) -> Result<Arc<Node>> {
        self.open_child(options, "file")
            .await?
            .ok_or_else(|| Error::invalid("A block device must be specified for \"file\""))
    }

    /// Opens the backing file: what the options say under `backing` wins over what the image names. `name` is as it
    /// stands in the image `overlay`; a relative path is resolved against the overlay's directory, `file:PATH` against the process's.
    /// JSON and other protocols are refused unless [`OpenOptions::options_in_names`] says otherwise.
    pub async fn open_backing(
        &self,
        options: &mut Options,
        overlay: &Node,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<Option<Arc<Node>>> {
        open::backing(self, options.take_child("backing")?, overlay, name, format).await
    }

    /// Opens the external data file as bare storage: what the options say under `data-file` wins over `name`, which stands in
    /// the image `owner`. `None` when neither names one, or none is to be opened.
    ///
    /// A relative name is one in the directory of the image, as a backing file's is, or, where there is no such file, one that is
    /// relative to where the program runs, as QEMU takes it.
    ///
    /// # Errors
    /// Also EINVAL when there are two such files.
    pub async fn open_data_file(
        &self,
        options: &mut Options,
        owner: &Node,
        name: Option<&str>,
    ) -> Result<Option<Arc<Node>>> {
        let explicit = options.take_child("data-file")?;
        if self.how.no_data_file {
            return Ok(None);
        }
        match (explicit, name) {
            (Some(child), _) => open::child(self, Some(child), "data-file").await,
            (None, Some(name)) if !name.is_empty() => {
                let owner_file = owner.filename().unwrap_or_default();
                let place = open::data_file(self, &owner_file, name)?;
                open::named(self, owner, &place).await.map(Some)
            }
            (None, _) => Ok(None),
        }
    }

    /// Opens another file that the image `owner` names (an extent), as bare storage. `name` is always a path.
    pub async fn open_named(&self, owner: &Node, name: &str) -> Result<Arc<Node>> {
        open::named(self, owner, name).await
    }
}

/// What a driver's `create` may use.
#[derive(Clone)]
pub struct CreateContext {
    pub(crate) graph: Arc<Graph>,
    pub(crate) registry: Arc<Registry>,
    /// The name that the user gave.
    pub filename: String,
    /// Fresh, empty storage; protocols get none.
    pub file: Option<Child>,
    /// What the user asked of the storage, for every file that the image is made of.
    pub(crate) storage: Options,
}

impl CreateContext {
    /// The storage that the image goes to.
    pub fn file(&self) -> Result<&Child> {
        self.file
            .as_ref()
            .ok_or_else(|| Error::invalid("create needs a file"))
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The registry.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Makes another file of `length` bytes beside this one (`name` is a path, relative to the image's directory) and
    /// opens it for writing, with what the user asked of the image's storage where `options` says nothing. The caller flushes it and gives it to [`Graph::release`] when it is done.
    pub async fn create_sibling(&self, name: &str, options: Options) -> Result<Arc<Node>> {
        open::create_sibling(self, name, options).await
    }
}

/// The drivers that a program knows.
#[derive(Clone, Default)]
pub struct Registry {
    factories: Vec<Arc<dyn DriverFactory>>,
}

impl Registry {
    /// The longest backing chain that is opened: so many backing files below the top image. A bound for hostile images;
    /// requests get along with a thread's stack of 2 MiB however long the chain is, but every change of a graph looks at
    /// all of its nodes, so that the time that opening takes grows with the square of the length.
    pub const MAX_DEPTH: usize = 512;

    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a driver. A later one of the same name replaces the earlier.
    #[must_use]
    pub fn with(mut self, factory: impl DriverFactory) -> Self {
        self.register(Arc::new(factory));
        self
    }

    /// Adds a driver. A later one of the same name replaces the earlier.
    pub fn register(&mut self, factory: Arc<dyn DriverFactory>) {
        self.factories.retain(|old| old.name() != factory.name());
        self.factories.push(factory);
    }

    /// The drivers, in the order in which they were registered.
    pub fn factories(&self) -> &[Arc<dyn DriverFactory>] {
        &self.factories
    }

    /// The driver called `name`.
    pub fn get(&self, name: &str) -> Result<&Arc<dyn DriverFactory>> {
        self.factories
            .iter()
            .find(|factory| factory.name() == name)
            .ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("Unknown driver '{name}'")).with_operation(
                    Operation::Open,
                    0,
                    0,
                )
            })
    }

    /// The format that `head`, the first bytes of a file, most likely begins; `raw` when no other claims it.
    pub fn probe(&self, head: &[u8], filename: &str) -> &'static str {
        self.factories
            .iter()
            .filter(|factory| factory.kind() == DriverKind::Format)
            .map(|factory| (factory.probe(head, filename), factory.name()))
            .filter(|(score, _)| *score > 0)
            .max_by_key(|(score, _)| *score)
            .map_or("raw", |(_, name)| name)
    }

    /// Opens a tree of nodes. `options` as on `--blockdev`; without `driver` the format of `file` is probed.
    pub async fn open(
        self: &Arc<Self>,
        graph: &Arc<Graph>,
        options: Options,
        how: OpenOptions,
    ) -> Result<Arc<Node>> {
        open::open(self, graph, options, how).await
    }

    /// Opens the image in file `filename`, in the given format or the one that is found by probing. `filename` may be
    /// `json:{…}`.
    pub async fn open_file(
        self: &Arc<Self>,
        graph: &Arc<Graph>,
        filename: &str,
        format: Option<&str>,
        node: Options,
        how: OpenOptions,
    ) -> Result<Arc<Node>> {
        open::open_file(self, graph, filename, format, node, how).await
    }

    /// Creates an image: first its storage, then the format in it. `options` as with `-o`, plus `size`.
    pub async fn create(
        self: &Arc<Self>,
        graph: &Arc<Graph>,
        format: &str,
        filename: &str,
        options: Options,
    ) -> Result<()> {
        open::create(self, graph, format, filename, options).await
    }

    /// The options that stand for a file name: `json:{…}`, `file:…`, `host_device:…` or a plain path.
    pub fn filename_options(&self, filename: &str) -> Result<Options> {
        open::filename_options(self, filename)
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.factories.iter().map(|factory| factory.name()))
            .finish()
    }
}
