//! Opening trees of nodes from options, probing formats, resolving the names that images hold, creating images.

use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::{
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
/// The deepest chain that is opened.
const MAX_DEPTH: usize = 256;

pub(crate) async fn open(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    options: Options,
    how: OpenOptions,
) -> Result<Arc<Node>> {
    let context = OpenContext {
        graph: graph.clone(),
        registry: registry.clone(),
        node: NodeOptions {
            auto_read_only: false,
            ..NodeOptions::default()
        },
        how,
        probed: false,
        chain: Vec::new(),
    };
    open_in(&context, options, false).await
}

pub(crate) async fn open_file(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    filename: &str,
    format: Option<&str>,
    mut node: Options,
    how: OpenOptions,
) -> Result<Arc<Node>> {
    let mut options = filename_options(registry, filename)?;
    if let Some(format) = format {
        registry.get(format)?;
        options = wrap(registry, format, options)?;
    }
    for (key, value) in std::mem::take(&mut node.0) {
        options.set(&key, value);
    }
    open(registry, graph, options, how).await
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
async fn open_in(context: &OpenContext, mut options: Options, is_child: bool) -> Result<Arc<Node>> {
    if context.chain.len() > MAX_DEPTH {
        return Err(Error::invalid(format!(
            "the chain is deeper than {MAX_DEPTH} images"
        )));
    }
    // A bare file name, or a driver with one, is a protocol node; formats are given theirs as a child.
    if !options.0.contains_key("driver")
        && !options.0.contains_key("file")
        && let Some(name) = options.take_str("filename")?
    {
        for (key, value) in filename_options(&context.registry, &name)?.0 {
            options.0.entry(key).or_insert(value);
        }
        if is_child {
            return open_driver(context, options, false).await;
        }
    }
    let driver = options.get_str("driver").map(str::to_owned);
    match driver {
        Some(driver) => {
            let factory = context.registry.get(&driver)?.clone();
            if factory.kind() != DriverKind::Protocol || is_child {
                // `driver=qcow2,filename=x` is short for a file below it.
                if factory.kind() == DriverKind::Format
                    && let Some(name) = options.take_str("filename")?
                {
                    let file = filename_options(&context.registry, &name)?;
                    options.set_default("file", Value::Object(file.0));
                }
                return open_driver(context, options, false).await;
            }
            // A protocol alone at the top of a file name: the format has to be found.
            if options.take_switch("raw-protocol")?.unwrap_or(false) {
                return open_driver(context, options, false).await;
            }
            let explicit =
                context.registry.get(&driver).is_ok() && options.0.contains_key("node-name");
            if explicit {
                return open_driver(context, options, false).await;
            }
            open_probed(context, options).await
        }
        None => {
            let Some(file) = options.take_child("file")? else {
                return Err(Error::invalid("Must specify either driver or file"));
            };
            match file {
                ChildOptions::Inline(file) => {
                    let mut rest = options;
                    let mut merged = file;
                    for (key, value) in std::mem::take(&mut rest.0) {
                        merged.0.insert(format!("\u{0}{key}"), value);
                    }
                    open_probed(context, merged).await
                }
                ChildOptions::Node(name) => {
                    let node = context.graph.node(&name).ok_or_else(|| no_node(&name))?;
                    let driver = probe(context, &node).await?;
                    options.set("driver", driver);
                    options.set("file", name);
                    open_driver(context, options, true).await
                }
                ChildOptions::None => Err(Error::invalid(
                    "A block device must be specified for \"file\"",
                )),
            }
        }
    }
}

/// Opens storage, finds its format, and opens that above it. Common options go to the format; keys that start with a
/// NUL character were given for the format.
async fn open_probed(context: &OpenContext, options: Options) -> Result<Arc<Node>> {
    const COMMON: [&str; 8] = [
        "node-name",
        "discard",
        "detect-zeroes",
        "cache",
        "read-only",
        "auto-read-only",
        "force-share",
        "backing",
    ];
    let mut file = Options::new();
    let mut format = Options::new();
    for (key, value) in options.0 {
        if let Some(key) = key.strip_prefix('\u{0}') {
            format.set(key, value);
        } else if COMMON.contains(&key.as_str()) {
            format.set(&key, value);
        } else {
            file.set(&key, value);
        }
    }
    let mut peek = format.clone();
    let node_options = NodeOptions::take(&mut peek, &context.node)?;
    let mut below = context.clone();
    below.node = node_options.for_child();
    let storage = Box::pin(open_in(&below, file, true)).await?;
    let result = async {
        let driver = probe(context, &storage).await?;
        format.set("driver", driver);
        format.set("file", storage.name());
        open_driver(context, format, true).await
    }
    .await;
    match result {
        Ok(node) => Ok(node),
        Err(error) => {
            let _ = context.graph.release(&storage).await;
            Err(error)
        }
    }
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
    let node_options = NodeOptions::take(&mut options, &context.node)?;
    let mut inner = context.clone();
    inner.node = node_options.clone();
    inner.probed = probed;
    let before: Vec<u64> = context.graph.nodes().iter().map(|node| node.id()).collect();
    let added = async {
        let opened = factory.open(inner, options).await?;
        context.graph.add_node(NodeSpec {
            driver: opened.driver,
            edges: opened.edges,
            options: node_options,
        })
    }
    .await;
    match added {
        Ok(node) => Ok(node),
        Err(error) => {
            // Children that were opened for it are nobody's now.
            for node in context.graph.nodes().into_iter().rev() {
                if !before.contains(&node.id())
                    && !node.kept.load(std::sync::atomic::Ordering::SeqCst)
                {
                    let _ = context.graph.release(&node).await;
                }
            }
            Err(error)
        }
    }
}

fn no_node(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("Cannot find device='' nor node-name='{name}'"),
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
            if key == "backing" {
                below.node.read_only = true;
                below.node.auto_read_only = false;
                return Ok(Some(Box::pin(open_in(&below, options, false)).await?));
            }
            Ok(Some(Box::pin(open_in(&below, options, true)).await?))
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
    below.chain.push(canonical(&overlay_file));
    if let Some(options) = options {
        return child(&below, Some(options), "backing").await;
    }
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    if context.how.no_backing {
        return Ok(None);
    }
    let resolved = permit(context, &overlay_file, name)?;
    below.node = context.node.for_child();
    below.node.read_only = true;
    below.node.auto_read_only = false;
    below.probed = false;
    if below.chain.contains(&canonical(&resolved)) {
        return Err(Error::invalid(format!(
            "Backing file '{resolved}' creates an infinite loop."
        ))
        .with_file(overlay_file)
        .with_field(
            "backing file name",
            name,
            "a file that is not in the chain above",
        ));
    }
    let mut options = filename_options(&context.registry, &resolved)?;
    if let Some(format) = format {
        options = wrap(&context.registry, format, options)?;
    }
    match Box::pin(open_in(&below, options, false)).await {
        Ok(node) => Ok(Some(node)),
        Err(error) => Err(error
            .with_file(resolved)
            .with_field(
                "backing file name",
                name,
                "the name of a file that can be opened",
            )
            .context("Could not open backing file")),
    }
}

/// Opens another file that an image names, as bare storage.
pub(crate) async fn named(context: &OpenContext, owner: &Node, name: &str) -> Result<Arc<Node>> {
    let resolved = permit(context, &owner.filename().unwrap_or_default(), name)?;
    let mut below = context.clone();
    below.node = context.node.for_child();
    below.probed = false;
    let options = filename_options(&context.registry, &resolved)?;
    Box::pin(open_in(&below, options, true))
        .await
        .map_err(|error| error.with_file(resolved))
}

/// Resolves a name that an image holds, and asks whether it may be opened.
fn permit(context: &OpenContext, owner: &str, name: &str) -> Result<String> {
    let refuse = |why: &str| {
        Err(Error::new(
            ErrorKind::AccessDenied,
            format!("opening '{name}' is refused: {why}"),
        )
        .with_file(owner))
    };
    if name.starts_with("json:") {
        return refuse("a JSON file name inside an image");
    }
    let has_protocol = name
        .split_once(':')
        .is_some_and(|(prefix, _)| !prefix.contains('/') && prefix != "file");
    if has_protocol {
        return refuse("a protocol name inside an image");
    }
    let resolved = resolve_name(owner, name);
    match &context.how.implicit {
        ImplicitOpens::Permit => Ok(resolved),
        ImplicitOpens::Ask(ask) if ask(&resolved) => Ok(resolved),
        ImplicitOpens::Ask(_) | ImplicitOpens::Deny => {
            refuse("the caller doesn't allow files that images name")
        }
    }
}

/// A name in an image is relative to the directory of that image.
pub fn resolve_name(owner: &str, name: &str) -> String {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let path = Path::new(name);
    if path.is_absolute() {
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

/// Creates storage and a format in it.
pub(crate) async fn create(
    registry: &Arc<Registry>,
    graph: &Arc<Graph>,
    format: &str,
    filename: &str,
    options: Options,
) -> Result<()> {
    let factory = registry.get(format)?.clone();
    let context = CreateContext {
        graph: graph.clone(),
        registry: registry.clone(),
        filename: filename.to_owned(),
        file: None,
    };
    if factory.kind() == DriverKind::Protocol {
        return factory.create(context, options).await;
    }
    let storage = create_storage(&context, filename, Options::new().with("size", 0)).await?;
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
    created.and(released)
}

async fn create_storage(
    context: &CreateContext,
    filename: &str,
    options: Options,
) -> Result<Arc<Node>> {
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
    };
    protocol.create(create, options).await?;
    let open = OpenContext {
        graph: context.graph.clone(),
        registry: context.registry.clone(),
        node: NodeOptions::default(),
        how: OpenOptions::default(),
        probed: false,
        chain: Vec::new(),
    };
    let options = Options::new().with("driver", driver).with("filename", name);
    open_driver(&open, options, false).await
}

pub(crate) async fn create_sibling(
    context: &CreateContext,
    name: &str,
    options: Options,
) -> Result<Arc<Node>> {
    let path = resolve_name(&context.filename, name);
    create_storage(context, &path, options).await
}
