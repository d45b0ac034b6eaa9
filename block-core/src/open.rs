//! Opening trees of nodes from options, probing formats, resolving the names that images hold, creating images.

use std::{
    path::{Component, Path, PathBuf},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use futures::{
    channel::{mpsc, oneshot},
    future::BoxFuture,
    stream::{FuturesUnordered, Stream, StreamExt},
};
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    bitmap,
    driver::DriverKind,
    error::{Error, ErrorKind, Operation, Result},
    graph::{Graph, NodeSpec},
    node::Node,
    options::{ChildOptions, NodeOptions, Options},
    registry::{CreateContext, DriverFactory, ImplicitOpens, OpenContext, OpenOptions, Registry},
    request::Child,
};

/// How much of a file is looked at to tell its format, in bytes.
const PROBE_LEN: usize = 2048;
/// How deep other children than backing files may lie below the last image of the longest chain.
const MORE_DEPTH: usize = 16;

/// Where the children of a node are opened: side by side with their parent's own opening, not inside of it, so that a
/// deep chain needs no deep stack.
#[derive(Clone)]
pub(crate) struct Nest(mpsc::UnboundedSender<BoxFuture<'static, ()>>);

impl Nest {
    /// Runs `opening`, and what it and its children put into the nest that it is given.
    async fn run<T, F: Future<Output = T>>(opening: impl FnOnce(Self) -> F) -> T {
        let (sender, mut queue) = mpsc::unbounded();
        let mut opening = pin!(opening(Self(sender)));
        let mut children = FuturesUnordered::new();
        futures::future::poll_fn(move |cx| {
            loop {
                if let Poll::Ready(value) = opening.as_mut().poll(cx) {
                    return Poll::Ready(value);
                }
                let mut idle = true;
                while let Poll::Ready(Some(child)) = Pin::new(&mut queue).poll_next(cx) {
                    children.push(child);
                    idle = false;
                }
                while let Poll::Ready(Some(())) = children.poll_next_unpin(cx) {
                    idle = false;
                }
                if idle {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    /// Opens a child.
    async fn open(
        &self,
        graph: &Arc<Graph>,
        opening: impl Future<Output = Result<Arc<Node>>> + Send + 'static,
    ) -> Result<Arc<Node>> {
        let (sender, answer) = oneshot::channel();
        let graph = graph.clone();
        let child = Box::pin(async move {
            // Whoever wanted it may be gone.
            let opened = opening.await.map(|node| Fresh::new(&graph, node));
            let _ = sender.send(opened);
        });
        if let Err(refused) = self.0.unbounded_send(child) {
            // The node above is open already, and its driver still opens others.
            refused.into_inner().await;
        }
        match answer.await {
            Ok(opened) => opened.and_then(Fresh::keep),
            Err(oneshot::Canceled) => Err(Error::io("the opening of a child was given up")),
        }
    }
}

/// A node that is nobody's yet: if it isn't kept, it is left to the graph to close.
struct Fresh {
    graph: Arc<Graph>,
    node: Option<Arc<Node>>,
}

impl Fresh {
    fn new(graph: &Arc<Graph>, node: Arc<Node>) -> Self {
        Self {
            graph: graph.clone(),
            node: Some(node),
        }
    }

    fn keep(mut self) -> Result<Arc<Node>> {
        self.node
            .take()
            .ok_or_else(|| Error::io("a node was taken twice"))
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            self.graph.orphan(node);
        }
    }
}

/// The children that were opened for a node that isn't open yet: left to the graph to close if its opening is given up.
struct FreshChildren<'a> {
    graph: &'a Arc<Graph>,
    list: Arc<Mutex<Vec<Arc<Node>>>>,
}

impl FreshChildren<'_> {
    /// They belong to a node now.
    fn keep(&self) {
        self.list.lock().clear();
    }

    /// The file that the node was to be opened on: whoever reads an error of its driver wants to know which it was.
    fn filename(&self) -> Option<String> {
        self.list.lock().first()?.filename()
    }

    /// Closes them, the last first.
    async fn release(&self) {
        loop {
            let last = self.list.lock().last().cloned();
            let Some(child) = last else { return };
            // There is another error already, which the user has to see.
            let _ = self.graph.release(&child).await;
            self.list.lock().pop();
        }
    }
}

impl Drop for FreshChildren<'_> {
    fn drop(&mut self) {
        for child in self.list.lock().drain(..).rev() {
            self.graph.orphan(child);
        }
    }
}

fn top_context(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    how: OpenOptions,
    nest: Nest,
) -> OpenContext {
    OpenContext {
        graph: graph.clone(),
        registry: registry.clone(),
        node: NodeOptions::default(),
        how,
        probed: false,
        chain: Vec::new(),
        depth: 0,
        opened: Arc::default(),
        nest,
    }
}

pub(crate) async fn open(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    options: Options,
    how: OpenOptions,
) -> Result<Arc<Node>> {
    graph.collect_orphans().await;
    Nest::run(|nest| async move {
        let context = top_context(registry, graph, how, nest);
        open_in(&context, options, Wanted::Image).await
    })
    .await
}

pub(crate) async fn open_file(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    filename: &str,
    format: Option<&str>,
    node: Options,
    how: OpenOptions,
) -> Result<Arc<Node>> {
    graph.collect_orphans().await;
    Nest::run(|nest| async move {
        let context = top_context(registry, graph, how, nest);
        open_name(&context, filename, format, node).await
    })
    .await
}

/// Opens the image in file `filename` with the options in `node`; the format is probed when it isn't given.
async fn open_name(
    context: &OpenContext,
    filename: &str,
    format: Option<&str>,
    node: Options,
) -> Result<Arc<Node>> {
    let storage = filename_options(&context.registry, filename)?;
    if filename.starts_with("json:") {
        let mut options = storage;
        // The format that the user names beside them wins over theirs.
        if let Some(format) = format {
            options.set("driver", format);
        }
        for (key, value) in node.0 {
            options.set(&key, value);
        }
        return open_in(context, options, Wanted::Image).await;
    }
    open_storage(context, storage, format, node).await
}

/// Opens the image in `storage` with the options in `node`; the format is probed when it isn't given.
async fn open_storage(
    context: &OpenContext,
    storage: Options,
    format: Option<&str>,
    node: Options,
) -> Result<Arc<Node>> {
    let Some(format) = format else {
        return open_probed(context, storage, node).await;
    };
    let mut options = wrap(&context.registry, format, storage)?;
    for (key, value) in node.0 {
        options.set(&key, value);
    }
    open_in(context, options, Wanted::Image).await
}

/// What options without a driver stand for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// An image, whose format is probed. It has its file below it.
    Image,
    /// Bare storage.
    Storage,
}

/// Puts `format` above the options of a protocol, unless they are options of that format already.
fn wrap(registry: &Registry, format: &str, inner: Options) -> Result<Options> {
    let inner_driver = inner.get_str("driver").unwrap_or_default().to_owned();
    if inner_driver == format {
        return Ok(inner);
    }
    if registry.get(format)?.kind() == DriverKind::Protocol {
        let mut inner = inner;
        inner.set("driver", format);
        return Ok(inner);
    }
    Ok(Options::new()
        .with("driver", format)
        .with("file", Value::Object(inner.0)))
}

pub(crate) fn filename_options(registry: &Registry, filename: &str) -> Result<Options> {
    if let Some(json) = filename.strip_prefix("json:") {
        return Options::from_json(json);
    }
    if let Some((prefix, rest)) = filename.split_once(':')
        && !prefix.contains('/')
    {
        let driver = match prefix {
            "host_device" => "host_device",
            "file" => "file",
            _ => {
                if let Ok(factory) = registry.get(prefix)
                    && let Some(options) = factory.parse_filename(registry, rest)
                {
                    return options;
                }
                return match registry.get(prefix) {
                    Ok(factory) if factory.kind() == DriverKind::Protocol => {
                        Ok(Options::new().with("driver", prefix).with("filename", rest))
                    }
                    _ => Err(Error::new(
                        ErrorKind::NotFound,
                        format!("Unknown protocol '{prefix}'"),
                    )),
                };
            }
        };
        return Ok(Options::new().with("driver", driver).with("filename", rest));
    }
    Ok(Options::new()
        .with("driver", "file")
        .with("filename", filename))
}

/// Opens one node and everything that its options and its image name.
async fn open_in(context: &OpenContext, mut options: Options, wanted: Wanted) -> Result<Arc<Node>> {
    if context.depth > Registry::MAX_DEPTH + MORE_DEPTH {
        return Err(Error::invalid("Nodes are nested too deeply"));
    }
    if options.get_str("driver").is_some() {
        return open_driver(context, options, false).await;
    }
    // A file name is an option of storage: an image has it below.
    if wanted == Wanted::Storage
        && let Some(name) = options.take_str("filename")?
    {
        let mut storage = filename_options(&context.registry, &name)?;
        for (key, value) in options.0 {
            storage.set(&key, value);
        }
        return open_driver(context, storage, false).await;
    }
    match options.take_child("file")? {
        Some(ChildOptions::Inline(storage)) => open_probed(context, storage, options).await,
        Some(ChildOptions::Node(name)) => {
            let node = context.graph.node(&name).ok_or_else(|| no_node(&name))?;
            probe_over(context, &node, options).await
        }
        Some(ChildOptions::None) => Err(Error::invalid(
            "A block device must be specified for \"file\"",
        )),
        None => Err(Error::invalid("Must specify either driver or file")),
    }
}

/// Opens storage, finds its format, and opens that, with the options in `format`, above it.
async fn open_probed(
    context: &OpenContext,
    storage: Options,
    format: Options,
) -> Result<Arc<Node>> {
    let mut peek = format.clone();
    let node_options = NodeOptions::take(&mut peek, &context.node)?;
    let mut below = context.clone();
    below.node = node_options.for_child();
    below.depth += 1;
    let storage = Box::pin(open_in(&below, storage, Wanted::Storage)).await?;
    // Held until the format above it has it.
    let fresh = Fresh::new(&context.graph, storage.clone());
    let opened = probe_over(context, &storage, format).await;
    if opened.is_err() {
        // The first error is what the user has to see.
        let _ = context.graph.release(&storage).await;
    }
    fresh.keep()?;
    opened
}

/// Finds the format of what is in `storage`, and opens it.
async fn probe_over(
    context: &OpenContext,
    storage: &Arc<Node>,
    mut format: Options,
) -> Result<Arc<Node>> {
    let driver = probe(context, storage).await?;
    format.set("driver", driver);
    format.set("file", storage.name());
    open_driver(context, format, true).await
}

/// The format of what is in `storage`.
async fn probe(context: &OpenContext, storage: &Arc<Node>) -> Result<&'static str> {
    let child = Child::unattached(storage.clone());
    let len = storage.length().min(PROBE_LEN as u64) as usize;
    let head = child.read_padded(0, len).await?;
    let name = storage.filename().unwrap_or_default();
    Ok(context.registry.probe(&head, &name))
}

/// Opens a node whose driver is known.
async fn open_driver(
    context: &OpenContext,
    mut options: Options,
    probed: bool,
) -> Result<Arc<Node>> {
    let name = options
        .take_str("driver")?
        .ok_or_else(|| Error::invalid("Parameter 'driver' is missing"))?;
    let factory: Arc<dyn DriverFactory> = context.registry.get(&name)?.clone();
    check_backing(context, &*factory, &mut options)?;
    let node_options = NodeOptions::take(&mut options, &context.node)?;
    let mut inner = context.clone();
    inner.node = node_options.clone();
    inner.probed = probed;
    let children = FreshChildren {
        graph: &context.graph,
        list: Arc::default(),
    };
    inner.opened = children.list.clone();
    let added = match factory.open(inner, options).await {
        Ok(opened) => context.graph.add_node(NodeSpec {
            driver: opened.driver,
            edges: opened.edges,
            options: node_options,
        }),
        Err(error) => Err(error),
    };
    match added {
        Ok(node) => {
            children.keep();
            with_bitmaps(context, node).await
        }
        Err(error) => {
            let file = match error.file() {
                None => children.filename(),
                Some(_) => None,
            };
            children.release().await;
            Err(match file {
                Some(file) => error.with_file(file),
                None => error,
            })
        }
    }
}

/// Refuses options of a backing file where there is none to have, and takes out that there be none.
fn check_backing(
    context: &OpenContext,
    factory: &dyn DriverFactory,
    options: &mut Options,
) -> Result<()> {
    let (key, is_some) = match options.get("backing") {
        None => return Ok(()),
        Some(Value::Null) => (String::new(), false),
        Some(Value::String(name)) => ("backing".to_owned(), !name.is_empty()),
        Some(value @ Value::Object(inner)) => (first_key("backing", value), !inner.is_empty()),
        Some(_) => ("backing".to_owned(), true),
    };
    let has_backing = factory.has_backing();
    if !is_some {
        if !has_backing {
            options.take("backing");
        } else if key == "backing" {
            options.set("backing", Value::Null);
        }
        return Ok(());
    }
    if context.how.no_backing && !context.how.for_check {
        let name = factory.name();
        let is_protocol = factory.kind() == DriverKind::Protocol
            || factory.parse_filename(&context.registry, "").is_some();
        return Err(Error::invalid(if is_protocol {
            format!("Block protocol '{name}' doesn't support the option '{key}'")
        } else {
            format!("Block format '{name}' does not support the option '{key}'")
        }));
    }
    if !has_backing {
        return Err(Error::new(
            ErrorKind::NotSupported,
            "Driver doesn't support backing files",
        ));
    }
    Ok(())
}

/// The first of the options under `key`, as a dotted key.
fn first_key(key: &str, value: &Value) -> String {
    let inner = value.as_object().and_then(|inner| inner.iter().next());
    match inner {
        Some((next, value)) => format!("{key}.{}", first_key(next, value)),
        None => key.to_owned(),
    }
}

/// Lets a node that was just opened load its bitmaps; without them it isn't open.
async fn with_bitmaps(context: &OpenContext, node: Arc<Node>) -> Result<Arc<Node>> {
    if context.how.for_check {
        return Ok(node);
    }
    let fresh = Fresh::new(&context.graph, node.clone());
    let loaded = bitmap::load(&node).await;
    fresh.keep()?;
    match loaded {
        Ok(()) => Ok(node),
        Err(error) => {
            // The first error is what the user has to see.
            let _ = context.graph.release(&node).await;
            Err(error)
        }
    }
}

fn no_node(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("Cannot find device='{name}' nor node-name='{name}'"),
    )
    .with_operation(Operation::Open, 0, 0)
}

/// Opens or finds a child.
pub(crate) async fn child(
    context: &OpenContext,
    options: Option<ChildOptions>,
    key: &str,
) -> Result<Option<Arc<Node>>> {
    match options {
        None | Some(ChildOptions::None) => Ok(None),
        Some(ChildOptions::Node(name)) => context
            .graph
            .node(&name)
            .map(Some)
            .ok_or_else(|| no_node(&name)),
        Some(ChildOptions::Inline(options)) => {
            let mut below = context.clone();
            below.node = context.node.for_child();
            below.probed = false;
            below.depth += 1;
            let mut wanted = Wanted::Storage;
            if key == "backing" {
                below.node.read_only = true;
                below.node.auto_read_only = false;
                wanted = Wanted::Image;
            }
            let opening = async move { open_in(&below, options, wanted).await };
            let node = context.nest.open(&context.graph, opening).await?;
            context.opened.lock().push(node.clone());
            Ok(Some(node))
        }
    }
}

/// Opens the backing file that the options or the image name.
pub(crate) async fn backing(
    context: &OpenContext,
    options: Option<ChildOptions>,
    overlay: &Node,
    name: Option<&str>,
    format: Option<&str>,
) -> Result<Option<Arc<Node>>> {
    let overlay_file = overlay.filename().unwrap_or_default();
    let mut below = context.clone();
    below.chain.push(canonical(&overlay_file).into());
    let name = name.filter(|name| !name.is_empty());
    let mut format = format.map(str::to_owned);
    let mut node = Options::new();
    match options {
        None => {}
        // Options that name no file are about the one that the image names.
        Some(ChildOptions::Inline(mut given))
            if name.is_some() && is_nameless(context, &given)? =>
        {
            format = given.take_str("driver")?.or(format);
            node = given;
        }
        Some(mut options) => {
            within_depth(&below)?;
            if let (ChildOptions::Inline(given), Some(format)) = (&mut options, format) {
                given.set_default("driver", format);
            }
            let opened = child(&below, Some(options), "backing").await;
            return opened.map_err(of_backing);
        }
    }
    let Some(name) = name else {
        return Ok(None);
    };
    if context.how.no_backing {
        return Ok(None);
    }
    within_depth(&below)?;
    let found = permit(&context.how, &overlay_file, name)?;
    below.node = context.node.for_child();
    below.node.read_only = true;
    below.node.auto_read_only = false;
    below.probed = false;
    below.depth += 1;
    let place = canonical(&found.name);
    if found.is_path && below.chain.iter().any(|above| **above == *place) {
        return Err(Error::invalid(format!(
            "Backing file '{}' creates an infinite loop.",
            found.name
        ))
        .with_file(overlay_file)
        .with_field(
            "backing file name",
            name,
            "a file that is not in the chain above",
        ));
    }
    let shown = found.name.clone();
    let opening = async move {
        let format = format.as_deref();
        if found.is_path {
            open_storage(&below, path_options(&found.name), format, node).await
        } else {
            open_name(&below, &found.name, format, node).await
        }
    };
    match context.nest.open(&context.graph, opening).await {
        Ok(node) => {
            context.opened.lock().push(node.clone());
            Ok(Some(node))
        }
        Err(error) if is_too_deep(&error) => Err(error),
        Err(error) => Err(of_backing(error.with_file(shown).with_field(
            "backing file name",
            name,
            "the name of a file that can be opened",
        ))),
    }
}

/// Says that it was a backing file that couldn't be opened; where a chain is too deep, not once for each of its images.
fn of_backing(error: Error) -> Error {
    if is_too_deep(&error) {
        return error;
    }
    error.context("Could not open backing file")
}

/// Whether options are those of an image, but don't say in which file it is.
fn is_nameless(context: &OpenContext, options: &Options) -> Result<bool> {
    let of_image = match options.get_str("driver") {
        None => true,
        Some(driver) => context.registry.get(driver)?.kind() == DriverKind::Format,
    };
    Ok(of_image && options.get("file").is_none())
}

/// What an error calls a chain that is too deep.
const BACKING_CHAIN: &str = "backing chain";

/// Whether the chain has room for one more backing file.
fn within_depth(below: &OpenContext) -> Result<()> {
    let depth = below.chain.len();
    if depth <= Registry::MAX_DEPTH {
        return Ok(());
    }
    let most = Registry::MAX_DEPTH;
    Err(
        Error::invalid(format!("The backing chain is deeper than {most} images")).with_field(
            BACKING_CHAIN,
            depth,
            format!("at most {most}"),
        ),
    )
}

fn is_too_deep(error: &Error) -> bool {
    error
        .field()
        .is_some_and(|field| field.name == BACKING_CHAIN)
}

/// Opens another file that an image names, as bare storage.
pub(crate) async fn named(context: &OpenContext, owner: &Node, name: &str) -> Result<Arc<Node>> {
    let place = permit(&context.how, &owner.filename().unwrap_or_default(), name)?;
    let options = place.options(&context.registry)?;
    let mut below = context.clone();
    below.node = context.node.for_child();
    below.probed = false;
    below.depth += 1;
    let opening = async move { open_in(&below, options, Wanted::Storage).await };
    let node = context
        .nest
        .open(&context.graph, opening)
        .await
        .map_err(|error| error.with_file(place.name))?;
    context.opened.lock().push(node.clone());
    Ok(node)
}

/// The name to open for the data file `name` of the image `owner`: beside that image or, if it isn't there, where the program runs.
pub(crate) fn data_file(context: &OpenContext, owner: &str, name: &str) -> Result<String> {
    let beside = resolve_name(owner, name);
    if beside == name {
        return Ok(beside);
    }
    let Ok(protocol) = context.registry.get("file") else {
        return Ok(name.to_owned());
    };
    let identity = |path: &str| protocol.file_identity(&path_options(path));
    match (identity(&beside), identity(name)) {
        (None, Some(_)) => Ok(format!("file:{name}")),
        (Some(a), Some(b)) if a != b => {
            let field = "'data-file.filename' that says which";
            let error = Error::invalid(format!(
                "The data file may be '{beside}', beside the image, or '{name}', where the program runs"
            ));
            Err(error
                .with_file(owner)
                .with_field("data file name", name, field))
        }
        _ => Ok(name.to_owned()),
    }
}

/// What an image names, and may be opened.
struct NamedPlace {
    /// The path, or the name as it stands in the image.
    name: String,
    is_path: bool,
}

impl NamedPlace {
    fn options(&self, registry: &Registry) -> Result<Options> {
        if self.is_path {
            return Ok(path_options(&self.name));
        }
        filename_options(registry, &self.name)
    }
}

/// A path, whatever it looks like.
fn path_options(path: &str) -> Options {
    Options::new().with("driver", "file").with("filename", path)
}

/// Finds out what a name that an image holds stands for, and asks whether it may be opened.
fn permit(how: &OpenOptions, owner: &str, name: &str) -> Result<NamedPlace> {
    let refuse = |why: &str| {
        Err(Error::new(
            ErrorKind::AccessDenied,
            format!("opening '{name}' is refused: {why}"),
        )
        .with_file(owner))
    };
    let of_options = |what: &str| {
        let why = format!("{what} inside an image chooses what is opened");
        refuse(&why).map_err(|error| {
            error.with_field(IMAGE_NAME, name, "a path, where the image isn't trusted")
        })
    };
    let place = match prefix(name) {
        None | Some("file") => {
            let mut path = resolve_name(owner, name);
            if let Some(plain) = path.strip_prefix("file:") {
                path = plain.to_owned();
            }
            if prefix(&path).is_some() {
                // A path, also for whoever is asked about it.
                path.insert_str(0, "./");
            }
            NamedPlace {
                name: path,
                is_path: true,
            }
        }
        Some(_) if how.options_in_names => NamedPlace {
            name: name.to_owned(),
            is_path: false,
        },
        Some("json") => return of_options("a JSON file name"),
        Some(_) => return of_options("a protocol name"),
    };
    match &how.implicit {
        ImplicitOpens::Permit => Ok(place),
        ImplicitOpens::Ask(ask) if ask(&place.name) => Ok(place),
        ImplicitOpens::Ask(_) | ImplicitOpens::Deny => {
            refuse("the caller doesn't allow files that images name")
        }
    }
}

/// The file name to open for `name`, which the image `owner` holds.
pub(crate) fn permitted_name(how: &OpenOptions, owner: &str, name: &str) -> Result<String> {
    permit(how, owner, name).map(|place| place.name)
}

/// What an error calls a name in an image that isn't a path.
const IMAGE_NAME: &str = "file name in an image";

/// What stands before the colon of `json:…` or `protocol:…`.
fn prefix(name: &str) -> Option<&str> {
    let (prefix, _) = name.split_once(':')?;
    (!prefix.contains('/')).then_some(prefix)
}

/// What a name in the image `owner` stands for. A path is relative to the directory of that image; `json:…`, and what begins
/// with a protocol (`file:…`, too), stands as it is.
pub fn resolve_name(owner: &str, name: &str) -> String {
    let path = Path::new(name);
    if path.is_absolute() || prefix(name).is_some() {
        return name.to_owned();
    }
    match Path::new(owner).parent() {
        Some(directory) if !directory.as_os_str().is_empty() => {
            directory.join(path).to_string_lossy().into_owned()
        }
        _ => name.to_owned(),
    }
}

/// The name without `.`, `..` and doubled slashes, to recognise a file by. No look at the file system.
fn canonical(name: &str) -> String {
    let mut clean = PathBuf::new();
    for part in Path::new(name).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                if !clean.pop() {
                    clean.push("..");
                }
            }
            other => clean.push(other),
        }
    }
    clean.to_string_lossy().into_owned()
}

/// Creates storage and a format in it. Options that the format doesn't know and the storage does are the storage's.
pub(crate) async fn create(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    format: &str,
    filename: &str,
    mut options: Options,
) -> Result<()> {
    let factory = registry.get(format)?.clone();
    let mut context = CreateContext {
        graph: graph.clone(),
        registry: registry.clone(),
        filename: filename.to_owned(),
        file: None,
        storage: Options::new(),
    };
    if factory.kind() == DriverKind::Protocol {
        return factory.create(context, options).await;
    }
    let place = filename_options(registry, filename)?;
    let protocol = registry.get(place.get_str("driver").unwrap_or("file"))?;
    context.storage = take_storage_options(&mut options, &*factory, &**protocol);
    factory.may_create(&context, options.clone())?;
    let storage = create_storage(&context, filename, Options::new().with("size", 0)).await?;
    let fresh = Fresh::new(graph, storage.clone());
    let created = async {
        let file = Child::unattached(storage.clone());
        factory
            .create(
                CreateContext {
                    file: Some(file.clone()),
                    ..context
                },
                options,
            )
            .await?;
        file.flush().await
    }
    .await;
    let released = graph.release(&storage).await;
    fresh.keep()?;
    created.and(released)
}

/// The options of an image that only its storage knows. Size and preallocation are always the format's.
fn take_storage_options(
    options: &mut Options,
    format: &dyn DriverFactory,
    protocol: &dyn DriverFactory,
) -> Options {
    let mut storage = Options::new();
    let known = format.create_options();
    for option in protocol.create_options() {
        let name = option.name;
        let of_format = ["size", "preallocation"].contains(&name)
            || known.iter().any(|other| other.name == name);
        if !of_format && let Some(value) = options.0.remove(name) {
            storage.set(name, value);
        }
    }
    storage
}

async fn create_storage(
    context: &CreateContext,
    filename: &str,
    mut options: Options,
) -> Result<Arc<Node>> {
    for (name, value) in &context.storage.0 {
        if !options.0.contains_key(name) {
            options.set(name, value.clone());
        }
    }
    let mut place = filename_options(&context.registry, filename)?;
    let driver = place
        .take_str("driver")?
        .unwrap_or_else(|| "file".to_owned());
    let protocol = context.registry.get(&driver)?.clone();
    let name = place.take_str("filename")?.unwrap_or_default();
    let create = CreateContext {
        graph: context.graph.clone(),
        registry: context.registry.clone(),
        filename: name.clone(),
        file: None,
        storage: Options::new(),
    };
    protocol.create(create, options).await?;
    let options = Options::new().with("driver", driver).with("filename", name);
    Nest::run(|nest| async move {
        let how = OpenOptions::default();
        let open = top_context(&context.registry, &context.graph, how, nest);
        open_driver(&open, options, false).await
    })
    .await
}

pub(crate) async fn create_sibling(
    context: &CreateContext,
    name: &str,
    options: Options,
) -> Result<Arc<Node>> {
    let path = resolve_name(&context.filename, name);
    create_storage(context, &path, options).await
}
