//! Probes and opens VMDK images, and refuses by name what this driver doesn't know.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    driver::{Capabilities, ChildRole, DriverKind},
    node::Node,
    options::Options,
    registry::{CreateContext, CreateOption, DriverFactory, OpenContext, Opened},
    request::Child,
};

use crate::{
    create,
    descriptor::{CreateType, Descriptor, MAX_TEXT, looks_like_descriptor},
    driver::{DescriptorPlace, FLAT_EDGE, Layout, VmdkDriver},
    layout::{Geometry, HEADER_SIZE, Header, Magic, magic, unsupported_type},
    sparse::Sparse,
};

/// Makes `vmdk` nodes: monolithicSparse and monolithicFlat images.
///
/// Options of a node: `file`, and `backing` in place of the parent that the image names. The extent of a flat image is
/// opened only if the caller allows files that images name (`OpenOptions::implicit`).
#[derive(Debug, Clone, Copy, Default)]
pub struct VmdkFactory;

/// What was found out while opening.
struct Found {
    driver: VmdkDriver,
    edges: Vec<(ChildRole, String, Arc<Node>)>,
}

/// Opens whichever of the kinds of image it is.
async fn open_found(
    context: &OpenContext,
    options: &mut Options,
    node: &Arc<Node>,
    file: &Child,
) -> Result<Found> {
    let head = file
        .read_padded(0, HEADER_SIZE.min(file.length() as usize))
        .await?;
    let found = match magic(&head) {
        Magic::HostedSparse => open_sparse(context, options, node, file, &head).await?,
        Magic::Cowd => return Err(unsupported_type("vmfsSparse")),
        Magic::Other if head.len() < 4 => {
            return Err(Error::new(
                ErrorKind::WrongFormat,
                "Image not in VMDK format",
            ));
        }
        Magic::Other => open_text(context, options, node, file).await?,
    };
    if let Some(key) = options.0.keys().next() {
        return Err(Error::invalid(format!("Invalid parameter '{key}'")));
    }
    Ok(found)
}

#[async_trait]
impl DriverFactory for VmdkFactory {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u32 {
        let ours = magic(head) != Magic::Other || looks_like_descriptor(head);
        if ours { 100 } else { 0 }
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let node = context.open_file(&mut options).await?;
        let file = Child::unattached(Arc::clone(&node));
        let mut found = open_found(&context, &mut options, &node, &file)
            .await
            .map_err(|error| match file.filename() {
                Some(name) => error.with_file(name),
                None => error,
            })?;
        found
            .edges
            .insert(0, (ChildRole::File, "file".to_owned(), node));
        Ok(Opened {
            driver: Arc::new(found.driver),
            edges: found.edges,
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::OPTIONS
    }

    fn may_create(&self, _: &CreateContext, options: Options) -> Result<()> {
        create::may_create(options)
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        create::create(context, options).await
    }
}

/// Whether the image is opened read-only: because the user said so, or because its storage fell back to that.
fn is_read_only(context: &OpenContext, storage: &Child) -> bool {
    let writable = storage
        .driver()
        .capabilities()
        .contains(Capabilities::WRITE);
    context.node.read_only || (context.node.auto_read_only && !writable)
}

async fn open_sparse(
    context: &OpenContext,
    options: &mut Options,
    node: &Arc<Node>,
    file: &Child,
    head: &[u8],
) -> Result<Found> {
    let header = Header::parse(head)?;
    let range = if header.is_envelope() {
        // Only the wrapping of a descriptor, which a sparse image can't be.
        let (offset, len) = header.descriptor_range()?;
        let descriptor = Descriptor::parse(&file.read_padded(offset, len as usize).await?)?;
        return Err(unsupported_type(&descriptor.create_type));
    } else {
        header.descriptor_range()
    };
    if !header.newlines_intact() {
        tracing::warn!(
            file = file.filename().unwrap_or_default(),
            "the newline characters in the header are damaged: was the file copied in text mode?"
        );
    }
    let mut read_only = is_read_only(context, file);
    let geometry = match Geometry::new(&header, file.length(), !read_only) {
        Err(_) if !read_only && context.node.auto_read_only => {
            read_only = true;
            Geometry::new(&header, file.length(), false)?
        }
        result => result?,
    };
    let (offset, room) = range?;
    let descriptor = Descriptor::parse(&file.read_padded(offset, room as usize).await?)?;
    let create_type = CreateType::parse(&descriptor.create_type)?;
    if create_type != CreateType::MonolithicSparse {
        return Err(unsupported_type(&descriptor.create_type));
    }
    let backing = context
        .open_backing(
            options,
            node,
            descriptor.parent_hint.as_deref(),
            Some("vmdk"),
        )
        .await?;
    let has_parent = descriptor.parent_hint.is_some();
    let sparse = Sparse::open(geometry, (offset, room), has_parent, file).await?;
    let driver = VmdkDriver::new(
        Layout::Sparse(Box::new(sparse)),
        DescriptorPlace {
            offset,
            room: Some(room),
        },
        descriptor,
        create_type,
        read_only,
        true,
    );
    let edges = backing
        .into_iter()
        .map(|backing| (ChildRole::Backing, "backing".to_owned(), backing))
        .collect();
    Ok(Found { driver, edges })
}

async fn open_text(
    context: &OpenContext,
    options: &mut Options,
    node: &Arc<Node>,
    file: &Child,
) -> Result<Found> {
    let len = file.length().min(MAX_TEXT as u64) as usize;
    let text = file.read_padded(0, len).await?;
    if !looks_like_descriptor(&text) {
        return Err(Error::new(
            ErrorKind::WrongFormat,
            "Image not in VMDK format",
        ));
    }
    let descriptor = Descriptor::parse(&text)?;
    let create_type = CreateType::parse(&descriptor.create_type)?;
    if create_type != CreateType::MonolithicFlat {
        return Err(unsupported_type(&descriptor.create_type));
    }
    if descriptor.parent_hint.is_some() || options.get("backing").is_some_and(|b| !b.is_null()) {
        return Err(Error::new(
            ErrorKind::NotSupported,
            "Flat image can't have backing file",
        ));
    }
    options.take("backing");
    let extent = descriptor.flat_extent()?;
    let data = context.open_named(node, &extent.name).await?;
    let child = Child::unattached(Arc::clone(&data));
    // Both were bounded when they were read.
    let end = extent.offset + extent.length;
    if end > child.length() {
        return Err(
            Error::invalid(format!("File truncated, expecting at least {end} bytes"))
                .with_file(child.filename().unwrap_or_default())
                .with_field("extent", end, format!("0..={}", child.length())),
        );
    }
    let zero_init = child
        .driver()
        .capabilities()
        .contains(Capabilities::ZERO_INIT);
    let driver = VmdkDriver::new(
        Layout::Flat(extent),
        DescriptorPlace {
            offset: 0,
            room: None,
        },
        descriptor,
        create_type,
        is_read_only(context, &child),
        zero_init,
    );
    let edges = vec![(ChildRole::DataFile, FLAT_EDGE.to_owned(), data)];
    Ok(Found { driver, edges })
}
