//! `blk info`: what an image says of itself. The files that it names are opened only for `--backing-chain`.

use std::sync::Arc;

use block_core::{
    BlockHandle, ChildRole, DriverKind, Node, Options, PermissionSet, Registry, image::ImageInfo,
    resolve_name,
};
use serde_json::{Map, Value, json};

use super::{
    Command,
    args::{
        FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, OutputFormat, one_image, output_format,
    },
    shown_name::{below, shown_name},
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    json,
    open::{self, Access, ImageSpec},
    output::say,
    session::Session,
    size::human_size,
    snapshots,
};

pub const COMMAND: Command = Command {
    name: "info",
    about: "Show what an image says of itself. Files that it names are not opened.",
    usage: "[-f FMT | --image-opts] [--backing-chain] [-U] [--output human|json] FILE",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        Opt::flag(
            'b',
            "backing-chain",
            "also show the backing file, its backing file, …",
        ),
        FORCE_SHARE,
        OUTPUT,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// The longest chain that is followed: as long as one that can be opened.
const MAX_CHAIN: usize = Registry::MAX_DEPTH + 1;

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let output = output_format(parsed, "info")?;
    let image = one_image(parsed, "info")?;
    let follow = parsed.has("backing-chain");
    let access = Access {
        no_backing: true,
        metadata_only: true,
        no_data_file: true,
        force_share: parsed.has("force-share"),
        ..Access::default()
    };
    let mut seen: Vec<String> = Vec::new();
    let mut layers = Vec::new();
    let mut next = Some((image.name.to_owned(), image.format.map(str::to_owned)));
    while let Some((name, format)) = next.take() {
        if seen.len() == MAX_CHAIN {
            let most = Registry::MAX_DEPTH;
            return Err(Failure::new(format!(
                "The backing chain is deeper than {most} images"
            )));
        }
        if seen.contains(&name) {
            return Err(Failure::new(format!(
                "Backing file '{name}' creates an infinite loop."
            )));
        }
        let spec = ImageSpec {
            name: &name,
            format: format.as_deref(),
            image_opts: image.image_opts && seen.is_empty(),
        };
        let handle = open::open(session, spec, access).await?;
        let options = if spec.image_opts {
            open::parse_image_opts(&name)?.0
        } else if let Some(json) = name.strip_prefix("json:") {
            Options::from_json(json)?.0
        } else {
            options_in_name(session, &name, format.as_deref())
        };
        let layer = Layer::read(session, &handle, &options).await?;
        let owner = handle.node().filename().unwrap_or_default();
        handle.close().await?;
        if follow && let Some(backing) = &layer.info.backing_filename {
            let backing = open::follows_names()
                .permitted_name(&owner, backing)
                .map_err(|error| Failure::open(&name, &error))?;
            next = Some((backing, layer.info.backing_format.clone()));
        }
        seen.push(name);
        layers.push(layer);
    }
    match output {
        OutputFormat::Json => {
            let mut list: Vec<Value> = layers.iter().map(Layer::to_json).collect();
            let value = if follow {
                Value::Array(list)
            } else {
                list.remove(0)
            };
            say!("{}", json::pretty(&value));
        }
        OutputFormat::Human => {
            for (index, layer) in layers.iter().enumerate() {
                if index > 0 {
                    say!("");
                }
                layer.print("", "");
            }
        }
    }
    Ok(0)
}

/// What the name of a filter says of it and of what is below: `blkdebug:CONFIG:FILE`.
fn options_in_name(session: &Session, name: &str, format: Option<&str>) -> Map<String, Value> {
    let Ok(named) = session.registry.filename_options(name) else {
        return Map::new();
    };
    if format.is_some() && named.get_str("driver") == format {
        return named.0;
    }
    Map::from_iter([("file".to_owned(), Value::Object(named.0))])
}

/// What is shown of one node.
struct Layer {
    filename: String,
    driver: &'static str,
    kind: DriverKind,
    length: u64,
    actual_size: Option<u64>,
    /// Something is stored at all.
    may_be_dirty: bool,
    full_backing: Option<String>,
    info: ImageInfo,
    children: Vec<(String, Layer)>,
}

impl Layer {
    async fn read(
        session: &Session,
        handle: &BlockHandle,
        options: &Map<String, Value>,
    ) -> Result<Self, Failure> {
        let info = handle.info().await?;
        Self::of_node(session, &handle.node(), info, options).await
    }

    async fn of_node(
        session: &Session,
        node: &Arc<Node>,
        mut info: ImageInfo,
        options: &Map<String, Value>,
    ) -> Result<Self, Failure> {
        let mut children = Vec::new();
        // What all of it takes; what can't be told of one part can't be told of the whole.
        let mut sum: Option<u64> = None;
        let mut is_known = true;
        let driver = node.driver().name();
        let is_qemu = session.program.is_qemu();
        // Latest first, as qemu lists them.
        let edges: Vec<_> = node.edges().iter().cloned().collect();
        for edge in edges
            .iter()
            .rev()
            .filter(|edge| edge.role != ChildRole::Backing)
        {
            let child = edge.child.node();
            let handle = session.graph.attach(child, PermissionSet::NONE, "info")?;
            let layer = Box::pin(Self::read(session, &handle, &below(options, &edge.name))).await?;
            drop(handle);
            match layer.actual_size {
                Some(size) => sum = Some(sum.unwrap_or(0).saturating_add(size)),
                None => is_known = false,
            }
            children.push((edge.name.clone(), layer));
        }
        // qemu takes these two for protocols that don't know.
        is_known &= !(is_qemu && matches!(driver, "blkdebug" | "blkverify"));
        if driver.starts_with("null-") {
            sum = Some(0);
        }
        let mut may_be_dirty = !driver.starts_with("null-");
        if let Some(disk) = Self::passed_through(driver, node.driver().kind(), &children) {
            may_be_dirty &= disk.may_be_dirty;
            if info.cluster_size.is_none() {
                info.cluster_size = disk.info.cluster_size;
            }
            if info.snapshots.is_empty() {
                info.snapshots.clone_from(&disk.info.snapshots);
            }
        }
        if is_qemu
            && let Some((kind, data)) = &mut info.format_specific
            && matches!(kind.as_str(), "file" | "host_device")
        {
            // How our own storage works is nothing that qemu-img would show.
            *data = Value::Object(Map::new());
        }
        let filename = node.filename().unwrap_or_default();
        Ok(Self {
            full_backing: info
                .backing_filename
                .as_deref()
                .map(|name| resolve_name(&filename, name)),
            actual_size: info.actual_size.or(sum.filter(|_| is_known)),
            may_be_dirty,
            filename: shown_name(node, options),
            driver,
            kind: node.driver().kind(),
            length: if is_qemu {
                // qemu counts in sectors.
                node.length().next_multiple_of(512)
            } else {
                node.length()
            },
            info,
            children,
        })
    }

    /// The child whose disk is a raw image's or a filter's own, with all that is known of it.
    fn passed_through<'a>(
        driver: &str,
        kind: DriverKind,
        children: &'a [(String, Self)],
    ) -> Option<&'a Self> {
        let passes = driver == "raw" || (kind == DriverKind::Filter && driver != "blkverify");
        let disk = |name: &str| matches!(name, "file" | "image");
        let mut found = children.iter().filter(|(name, _)| passes && disk(name));
        found.next().map(|(_, child)| child)
    }

    fn to_json(&self) -> Value {
        let info = &self.info;
        let mut map = Map::new();
        let children: Vec<Value> = self
            .children
            .iter()
            .map(|(name, child)| json!({"name": name, "info": child.to_json()}))
            .collect();
        map.insert("children".into(), children.into());
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                map.insert(key.to_owned(), value);
            }
        };
        set(
            "backing-filename-format",
            info.backing_format.clone().map(Into::into),
        );
        set(
            "snapshots",
            (!info.snapshots.is_empty()).then(|| snapshots::to_json(&info.snapshots)),
        );
        set("virtual-size", Some(self.length.into()));
        set("filename", Some(self.filename.clone().into()));
        set("cluster-size", info.cluster_size.map(Into::into));
        set("format", Some(self.driver.into()));
        set("actual-size", self.actual_size.map(Into::into));
        set("encrypted", info.encrypted.then(|| true.into()));
        set("compressed", info.compressed.then(|| true.into()));
        if let Some((kind, data)) = &info.format_specific {
            set("format-specific", Some(json!({"type": kind, "data": data})));
        }
        set(
            "full-backing-filename",
            self.full_backing.clone().map(Into::into),
        );
        set(
            "backing-filename",
            info.backing_filename.clone().map(Into::into),
        );
        set("dirty-flag", self.may_be_dirty.then(|| info.dirty.into()));
        Value::Object(map)
    }

    /// Prints it; storage that is a child of something in fewer words.
    fn print(&self, indent: &str, path: &str) {
        let info = &self.info;
        let is_storage = !path.is_empty() && self.kind == DriverKind::Protocol;
        let [name, kind, size] = if is_storage {
            ["filename", "protocol type", "file length"]
        } else {
            ["image", "file format", "virtual size"]
        };
        say!("{indent}{name}: {}", self.filename);
        say!("{indent}{kind}: {}", self.driver);
        say!(
            "{indent}{size}: {} ({} bytes)",
            human_size(self.length),
            self.length
        );
        let disk = self
            .actual_size
            .map_or("unavailable".to_owned(), human_size);
        say!("{indent}disk size: {disk}");
        if info.encrypted {
            say!("{indent}encrypted: yes");
        }
        if let Some(size) = info.cluster_size {
            say!("{indent}cluster_size: {size}");
        }
        if info.dirty {
            say!("{indent}cleanly shut down: no");
        }
        if let Some(name) = &info.backing_filename {
            match &self.full_backing {
                Some(full) if full != name => {
                    say!("{indent}backing file: {name} (actual path: {full})");
                }
                _ => say!("{indent}backing file: {name}"),
            }
        }
        if let Some(format) = &info.backing_format {
            say!("{indent}backing file format: {format}");
        }
        if !info.snapshots.is_empty() {
            snapshots::print(indent, &info.snapshots);
        }
        self.print_specific(indent);
        for (name, child) in &self.children {
            let path = format!("{path}/{name}");
            say!("{indent}Child node '{path}':");
            child.print(&format!("{indent}    "), &path);
        }
    }

    fn print_specific(&self, indent: &str) {
        if let Some((_, Value::Object(data))) = &self.info.format_specific
            && !data.is_empty()
        {
            say!("{indent}Format specific information:");
            let indent = format!("{indent}    ");
            for (key, value) in data {
                print_value(&indent, &key.replace('-', " "), value);
            }
        }
    }
}

fn print_value(indent: &str, key: &str, value: &Value) {
    let inner = format!("{indent}    ");
    match value {
        Value::Object(map) => {
            say!("{indent}{key}:");
            for (key, value) in map {
                print_value(&inner, &key.replace('-', " "), value);
            }
        }
        Value::Array(list) => {
            say!("{indent}{key}:");
            for (index, value) in list.iter().enumerate() {
                print_value(&inner, &format!("[{index}]"), value);
            }
        }
        Value::String(text) => say!("{indent}{key}: {text}"),
        other => say!("{indent}{key}: {other}"),
    }
}
