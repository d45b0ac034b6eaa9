//! Opening the images that a command line names.

use block_core::{
    BlockHandle, DriverKind, Options, PermissionSet, Permissions,
    registry::{ImplicitOpens, OpenOptions},
};
use serde_json::Value;

use super::{cache::CacheMode, failure::Failure, image_names, output::complain, session::Session};

/// An image as the command line names it.
#[derive(Debug, Clone, Copy)]
pub struct ImageSpec<'a> {
    /// A file name, or options if `image_opts`.
    pub name: &'a str,
    /// The format, unless it is to be found by probing.
    pub format: Option<&'a str>,
    /// `--image-opts`.
    pub image_opts: bool,
}

impl<'a> ImageSpec<'a> {
    /// A file name and perhaps a format.
    pub const fn file(name: &'a str, format: Option<&'a str>) -> Self {
        Self {
            name,
            format,
            image_opts: false,
        }
    }
}

/// How an image is to be opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Access {
    /// For writing.
    pub write: bool,
    /// For changes of its length.
    pub resize: bool,
    /// Whatever others do with it (`-U`).
    pub force_share: bool,
    /// Without its backing file.
    pub no_backing: bool,
    /// Leave external data files alone.
    pub no_data_file: bool,
    /// For check or repair.
    pub for_check: bool,
    /// Nothing but what the image says of itself is wanted.
    pub metadata_only: bool,
    /// The node takes discards unless its options say otherwise.
    pub unmap: bool,
    /// Cache mode.
    pub cache: CacheMode,
}

/// The warning that qemu prints when a raw image is opened for writing without having been called raw.
pub fn warn_of_probed_raw(name: &str) {
    complain!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
         restricted.\n         Specify the 'raw' format explicitly to remove the restrictions."
    );
}

/// What qemu's programs say of a backing file whose name is empty.
pub fn warn_of_empty_backing(program: Option<&str>, options: &Options) {
    let Some(program) = program else { return };
    for (key, value) in &options.0 {
        match value {
            Value::String(name) if key == "backing" && name.is_empty() => {
                complain!(
                    "{program}: warning: Use of \"backing\": \"\" is deprecated; use \"backing\": null instead"
                );
            }
            Value::Object(inner) => {
                warn_of_empty_backing(Some(program), &Options(inner.clone()));
            }
            _ => {}
        }
    }
}

/// Opens an image and attaches a handle.
pub async fn open(
    session: &Session,
    image: ImageSpec<'_>,
    access: Access,
) -> Result<BlockHandle, Failure> {
    open_nested(session, image, access, Options::new()).await
}

/// The same, with options that nest.
pub async fn open_nested(
    session: &Session,
    image: ImageSpec<'_>,
    access: Access,
    options: Options,
) -> Result<BlockHandle, Failure> {
    attempt(session, image, access, options, &[])
        .await
        .map_err(|error| Failure::open(image.name, &error))
}

/// The same; the error is returned as it is.
pub async fn open_quietly(
    session: &Session,
    image: ImageSpec<'_>,
    access: Access,
) -> block_core::Result<BlockHandle> {
    attempt(session, image, access, Options::new(), &[]).await
}

/// The same, with more options for the node.
pub async fn open_with(
    session: &Session,
    image: ImageSpec<'_>,
    access: Access,
    more: &[(&str, &str)],
) -> block_core::Result<BlockHandle> {
    attempt(session, image, access, Options::new(), more).await
}

/// Files that images name are opened; what such a name may be is for the command line to say.
pub fn follows_names() -> OpenOptions {
    OpenOptions {
        implicit: ImplicitOpens::Permit,
        options_in_names: image_names::are_trusted(),
        ..OpenOptions::default()
    }
}

async fn attempt(
    session: &Session,
    image: ImageSpec<'_>,
    access: Access,
    mut node: Options,
    more: &[(&str, &str)],
) -> block_core::Result<BlockHandle> {
    let how = OpenOptions {
        no_backing: access.no_backing,
        no_data_file: access.no_data_file,
        for_check: access.for_check,
        metadata_only: access.metadata_only,
        ..follows_names()
    };
    let is_protocol = |driver: &str| {
        session
            .registry
            .get(driver)
            .is_ok_and(|factory| factory.kind() == DriverKind::Protocol)
    };
    let qemu = session.program.is_qemu().then(|| session.program.name());
    let opened = if image.image_opts {
        let mut options = parse_image_opts(image.name)?;
        warn_of_empty_backing(qemu, &options);
        for (key, value) in node.0 {
            options.set_default(&key, value);
        }
        if ignores_discards(&options, access) {
            options.set("discard", "ignore");
        }
        let named = options.get_str("driver").map(str::to_owned);
        common(&mut options, access);
        for (key, value) in more {
            options.set(key, *value);
        }
        if named.as_deref().is_some_and(is_protocol) {
            bare(session, &mut options);
        }
        let opened = session.registry.open(&session.graph, options, how).await?;
        (opened, named.is_none())
    } else {
        common(&mut node, access);
        for (key, value) in more {
            node.set(key, *value);
        }
        if image.format.is_some_and(is_protocol) {
            bare(session, &mut node);
        }
        let probed = image.format.is_none() && !image.name.starts_with("json:");
        if let Some(json) = image.name.strip_prefix("json:") {
            let options = Options::from_json(json)?;
            warn_of_empty_backing(qemu, &options);
            if ignores_discards(&options, access) {
                node.set("discard", "ignore");
            }
        }
        let opened = session
            .registry
            .open_file(&session.graph, image.name, image.format, node, how)
            .await?;
        (opened, probed)
    };
    let (opened, probed) = opened;
    if probed && access.write && opened.driver().name() == "raw" {
        warn_of_probed_raw(&opened.filename().unwrap_or_else(|| image.name.to_owned()));
    }
    let mut used = Permissions::CONSISTENT_READ;
    if access.write {
        used |= Permissions::WRITE;
    }
    if access.resize {
        used |= Permissions::RESIZE;
    }
    let permissions = PermissionSet::new(used, Permissions::all());
    match session.graph.attach(&opened, permissions, image.name) {
        Ok(handle) => {
            handle.set_write_through(access.cache.write_through);
            Ok(handle)
        }
        Err(error) => {
            // The image was opened for this command alone.
            let _ = session.graph.release(&opened).await;
            Err(error)
        }
    }
}

/// Whether the node is to ignore discards for want of an option. Most commands of qemu-img have it so. As they send none, it
/// matters only to zeroes that are detected, which can't unmap then: that is refused.
fn ignores_discards(options: &Options, access: Access) -> bool {
    !access.unmap
        && options.get_str("detect-zeroes") == Some("unmap")
        && options.get("discard").is_none()
}

/// `driver=qcow2,file.filename=x`; a first word without a key names a node, as in qemu.
pub fn parse_image_opts(text: &str) -> block_core::Result<Options> {
    let first = text.split(',').next().unwrap_or_default();
    if !text.trim_start().starts_with('{') && !first.contains('=') && !first.is_empty() {
        let rest = text.get(first.len() + 1..).unwrap_or_default();
        let mut options = Options::from_dotted(rest)?;
        options.set("file", first);
        return Ok(options);
    }
    Options::from_text(text)
}

/// Has a protocol's node opened as it is, without a format above it: the core does so for nodes with names.
fn bare(session: &Session, options: &mut Options) {
    let name = format!("file-{}", session.graph.nodes().len());
    options.set_default("node-name", name);
}

fn common(options: &mut Options, access: Access) {
    options.set_default("read-only", !access.write);
    if access.force_share {
        options.set_default("force-share", true);
    }
    access.cache.apply(options);
}
