//! The VMDK node: what is common to sparse and flat images, the content identifiers (CIDs), and the driver trait.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, MapIntent, Mapping, Reopen},
    flags::RequestFlags,
    image::{CheckMode, CheckReport, ImageInfo, Progress},
    limits::Limits,
    node::{Edges, Node},
    request::{Child, Request},
    status::DriverStatus,
};
use futures::lock::Mutex as AsyncMutex;

use crate::{
    check,
    descriptor::{CreateType, Descriptor, FlatExtent},
    info,
    layout::{Entry, SECTOR},
    sparse::Sparse,
};

/// The edge of a flat image's data.
pub(crate) const FLAT_EDGE: &str = "extents.0";

/// Where the guest's data is.
pub(crate) enum Layout {
    /// In the file itself, in grains.
    Sparse(Box<Sparse>),
    /// In another file, as it is.
    Flat(FlatExtent),
}

/// Where the descriptor is in the file, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DescriptorPlace {
    pub offset: u64,
    /// Room for it; `None` when it may grow.
    pub room: Option<u64>,
}

/// A VMDK image.
///
/// Edges: `file`; a flat image has its data at `extents.0`; a sparse one may have `backing`.
pub struct VmdkDriver {
    pub(crate) layout: Layout,
    place: DescriptorPlace,
    descriptor: AsyncMutex<Descriptor>,
    cid: AtomicU32,
    parent_cid: u32,
    parent_hint: Option<String>,
    create_type: CreateType,
    read_only: AtomicBool,
    /// A new CID was written since the image was opened for writing.
    cid_written: AtomicBool,
    /// The id of the node below the filters whose CID was found to be the one recorded, plus one.
    parent_checked: AtomicU64,
    zero_init: bool,
}

impl VmdkDriver {
    pub(crate) fn new(
        layout: Layout,
        place: DescriptorPlace,
        descriptor: Descriptor,
        create_type: CreateType,
        read_only: bool,
        zero_init: bool,
    ) -> Self {
        Self {
            layout,
            place,
            cid: AtomicU32::new(descriptor.cid),
            parent_cid: descriptor.parent_cid,
            parent_hint: descriptor.parent_hint.clone(),
            descriptor: AsyncMutex::new(descriptor),
            create_type,
            read_only: AtomicBool::new(read_only),
            cid_written: AtomicBool::new(false),
            parent_checked: AtomicU64::new(0),
            zero_init,
        }
    }

    /// The content identifier that an overlay made now would record.
    pub fn cid(&self) -> u32 {
        self.cid.load(Ordering::Acquire)
    }

    /// The parent's content identifier as it was when this image was made; all ones without a parent.
    pub fn parent_cid(&self) -> u32 {
        self.parent_cid
    }

    pub(crate) const fn create_type(&self) -> CreateType {
        self.create_type
    }

    pub(crate) fn parent_hint(&self) -> Option<&str> {
        self.parent_hint.as_deref()
    }

    pub(crate) fn is_writable(&self) -> bool {
        !self.read_only.load(Ordering::Acquire)
    }

    fn parent_matches(&self, edges: &Edges) -> bool {
        edges.child(ChildRole::Backing).is_none_or(|backing| {
            let checked = self.parent_checked.load(Ordering::Acquire);
            let is_it = |node: &Node| checked == node.id().wrapping_add(1);
            is_it(backing.node()) || is_it(&backing.node().skip_filters())
        })
    }

    /// Whether what is below may be read through to: a parent that changed since this image was made would show data
    /// that never belonged together. The check is made once per backing node, as soon as it is the parent (see
    /// [`BlockDriver::limits`] below): a job that writes into the parent later, as an active commit does, gives it a new CID
    /// and changes nothing that is seen through this image. Filters that a job inserts between the two are no other parent.
    fn check_parent(&self, edges: &Edges) -> Result<()> {
        if self.parent_matches(edges) {
            return Ok(());
        }
        let Some(backing) = edges.child(ChildRole::Backing) else {
            return Ok(());
        };
        let below = backing.node().skip_filters();
        let Some(parent) = below.driver().as_any().downcast_ref::<Self>() else {
            return Err(
                Error::invalid("the parent of a VMDK image must be a VMDK image").with_field(
                    "backing",
                    below.driver().name(),
                    "vmdk",
                ),
            );
        };
        if parent.cid() != self.parent_cid {
            return Err(Error::invalid(
                "the parent image was changed after this image was made: their content IDs differ",
            )
            .with_field(
                "parentCID",
                format!("{:x}", self.parent_cid),
                format!("{:x}", parent.cid()),
            ));
        }
        self.parent_checked
            .store(below.id().wrapping_add(1), Ordering::Release);
        Ok(())
    }

    /// Gives the image a new CID before the first change of its content, durably: overlays made before must notice.
    async fn touch(&self, request: &Request, flags: RequestFlags) -> Result<()> {
        if self.cid_written.load(Ordering::Acquire) || flags.contains(RequestFlags::WRITE_UNCHANGED)
        {
            return Ok(());
        }
        let mut descriptor = self.descriptor.lock().await;
        if self.cid_written.load(Ordering::Acquire) {
            return Ok(());
        }
        let file = request
            .child(ChildRole::File)
            .ok_or_else(|| Error::new(ErrorKind::NoMedium, "node has no file child"))?;
        let cid = fresh_cid(|| request.env().random(), descriptor.cid);
        let new = descriptor.with_cid(cid);
        let (old_text, new_text) = (descriptor.text(), new.text());
        if self
            .place
            .room
            .is_some_and(|room| new_text.len() as u64 > room)
        {
            return Err(Error::new(ErrorKind::NoSpace, "the descriptor is full"));
        }
        // Whole sectors from the first that changes to the last: mostly a single one.
        let (mut old_text, mut new_text) = (old_text.to_vec(), new_text.to_vec());
        let mut len = old_text.len().max(new_text.len());
        if self.place.room.is_some() {
            len = len.next_multiple_of(SECTOR as usize);
        }
        old_text.resize(len, 0);
        new_text.resize(len, 0);
        let changes = |index: &usize| old_text[*index] != new_text[*index];
        if let (Some(first), Some(last)) = ((0..len).find(changes), (0..len).rfind(changes)) {
            let start = first - first % SECTOR as usize;
            let end = (last + 1).next_multiple_of(SECTOR as usize).min(len);
            let at = self.place.offset + start as u64;
            file.write(at, new_text[start..end].to_vec(), RequestFlags::empty())
                .await?;
        }
        file.flush().await?;
        *descriptor = new;
        self.cid.store(cid, Ordering::Release);
        self.cid_written.store(true, Ordering::Release);
        Ok(())
    }

    fn flat(request: &Request) -> Result<&Child> {
        request
            .edges()
            .named(FLAT_EDGE)
            .map(|edge| &edge.child)
            .ok_or_else(|| Error::new(ErrorKind::NoMedium, "node has no extents.0 child"))
    }
}

/// A new CID: neither of the values that mean "none", nor the old one.
pub(crate) fn fresh_cid(random: impl Fn() -> u64, old: u32) -> u32 {
    let mut cid = random() as u32;
    while cid >= 0xffff_fffe || cid == old {
        cid = cid.wrapping_mul(0x9e37_79b1).wrapping_add(1);
    }
    cid
}

#[async_trait]
impl BlockDriver for VmdkDriver {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        let mut all = Capabilities::CHECK | Capabilities::TRY_MAP;
        if self.zero_init {
            all |= Capabilities::ZERO_INIT;
        }
        if self.is_writable() {
            all |= Capabilities::WRITE | Capabilities::WRITE_ZEROES | Capabilities::DISCARD;
        }
        match &self.layout {
            Layout::Sparse(_) => all | Capabilities::BACKING,
            Layout::Flat(_) if self.is_writable() => all | Capabilities::FUA,
            Layout::Flat(_) => all,
        }
    }

    fn length(&self, _edges: &Edges) -> u64 {
        match &self.layout {
            Layout::Sparse(sparse) => sparse.geometry.length,
            Layout::Flat(extent) => extent.length,
        }
    }

    /// The core asks for the limits whenever the edges are new: the moment to look whose child the parent is. A parent that
    /// isn't the right one is told to who reads through to it.
    fn limits(&self, edges: &Edges) -> Limits {
        let _ = self.check_parent(edges);
        match &self.layout {
            Layout::Sparse(sparse) => Limits {
                zeroes_alignment: sparse.geometry.grain_bytes,
                serialising_granularity: sparse.geometry.grain_bytes,
                ..Limits::default()
            },
            Layout::Flat(_) => {
                let limits = Limits::default();
                edges
                    .named(FLAT_EDGE)
                    .map_or(limits, |edge| limits.merge(edge.child.limits()))
            }
        }
    }

    fn try_map(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        if intent == MapIntent::Overwrite && !self.cid_written.load(Ordering::Acquire) {
            return Mapping::NotCached;
        }
        match &self.layout {
            Layout::Flat(extent) => {
                let edge = edges.iter().position(|edge| edge.name == FLAT_EDGE);
                match (edge, extent.offset.checked_add(offset)) {
                    (Some(edge), Some(offset)) => Mapping::Data {
                        edge,
                        offset,
                        len,
                        pin: None,
                    },
                    _ => Mapping::NotCached,
                }
            }
            Layout::Sparse(sparse) => {
                let Some(run) = sparse.cached_run(offset, len) else {
                    return Mapping::NotCached;
                };
                match (run.entry, intent) {
                    (Entry::Data(_), _) => match edges.index(ChildRole::File) {
                        // No pin: a grain's place never changes its owner (see `sparse`).
                        Some(edge) => Mapping::Data {
                            edge,
                            offset: run.host,
                            len: run.len,
                            pin: None,
                        },
                        None => Mapping::NotCached,
                    },
                    (Entry::Zero, MapIntent::Read) => Mapping::Zero { len: run.len },
                    (Entry::Unallocated, MapIntent::Read) if self.parent_matches(edges) => {
                        Mapping::Backing { len: run.len }
                    }
                    _ => Mapping::NotCached,
                }
            }
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        match &self.layout {
            Layout::Sparse(sparse) => {
                sparse
                    .read(&request, offset, buf, || self.check_parent(request.edges()))
                    .await
            }
            Layout::Flat(extent) => {
                Self::flat(&request)?
                    .read(extent.offset + offset, buf)
                    .await
            }
        }
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        self.touch(&request, flags).await?;
        match &self.layout {
            Layout::Sparse(sparse) => {
                sparse
                    .write(&request, offset, buf, || self.check_parent(request.edges()))
                    .await
            }
            Layout::Flat(extent) => {
                Self::flat(&request)?
                    .write(extent.offset + offset, buf, flags)
                    .await
            }
        }
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.touch(&request, flags).await?;
        match &self.layout {
            Layout::Sparse(sparse) => sparse.write_zeroes(&request, offset, len, flags).await,
            Layout::Flat(extent) => {
                Self::flat(&request)?
                    .write_zeroes(extent.offset + offset, len, flags)
                    .await
            }
        }
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        self.touch(&request, RequestFlags::empty()).await?;
        match &self.layout {
            Layout::Sparse(sparse) => sparse.discard(&request, offset, len).await,
            Layout::Flat(extent) => {
                Self::flat(&request)?
                    .discard(extent.offset + offset, len)
                    .await
            }
        }
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        match &self.layout {
            Layout::Sparse(sparse) => sparse.flush(request.file()?).await,
            Layout::Flat(_) => {
                // The descriptor was made durable when it was written.
                Self::flat(&request)?.flush().await
            }
        }
    }

    async fn block_status(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        match &self.layout {
            Layout::Sparse(sparse) => sparse.status(&request, offset, len).await,
            Layout::Flat(extent) => Ok(DriverStatus::data_at(len, extent.offset + offset)),
        }
    }

    async fn check(
        self: Arc<Self>,
        request: Request,
        mode: CheckMode,
        progress: Progress,
    ) -> Result<CheckReport> {
        if mode != CheckMode::ReadOnly {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "This image format does not support repairs",
            ));
        }
        match &self.layout {
            Layout::Sparse(sparse) => {
                let file = request.file()?;
                if self.is_writable() {
                    sparse.flush(file).await?;
                }
                check::check(sparse, file, &progress).await
            }
            // The extent is as long as it must be, or it couldn't have been opened.
            Layout::Flat(_) => Ok(CheckReport::default()),
        }
    }

    async fn info(self: Arc<Self>, request: Request) -> Result<ImageInfo> {
        Ok(info::info(&self, &request))
    }

    async fn reopen(self: Arc<Self>, request: Request, changes: Reopen) -> Result<()> {
        if let Some(key) = changes.options.keys().next() {
            return Err(Error::invalid(format!("Cannot change the option '{key}'")));
        }
        if let Some(read_only) = changes.read_only {
            if read_only && self.is_writable() {
                Arc::clone(&self).flush(request).await?;
            }
            if !read_only {
                if let Layout::Sparse(sparse) = &self.layout {
                    sparse.geometry.check_writable()?;
                }
                // Opened for writing anew: the next change is told by a new CID.
                self.cid_written.store(false, Ordering::Release);
            }
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        if self.is_writable() {
            self.flush(request).await
        } else {
            Ok(())
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        match &self.layout {
            Layout::Sparse(sparse) => sparse.counters(),
            Layout::Flat(_) => Vec::new(),
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
