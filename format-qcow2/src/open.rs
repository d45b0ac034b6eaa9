//! Opening an image: options, the checks before anything is trusted, and what a writable open has to do first.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize},
};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use block_core::{
    driver::{ChildRole, DriverKind},
    error::{Error, Operation, Result},
    node::Node,
    options::Options,
    pins::Pins,
    registry::{CreateContext, CreateOption, DriverFactory, Measure, OpenContext, Opened},
    request::Child,
    snapshot::SnapshotKey,
    space::SpaceTap,
};

use crate::{
    alloc::allocator::Orphans,
    amend,
    bitmaps::Stored,
    cache::{
        refcounts::RefcountStore,
        slices::{SliceCache, load_refcounts},
    },
    claims::Claims,
    compress::Codec,
    counters::Counters,
    create, data_file,
    driver::prepare_for_writing,
    encryption::Encryption,
    header_update,
    image::Qcow2,
    io::compressed::PackingOrder,
    layout::{Header, header},
    measure,
    meta::Meta,
    overlap::{Kinds, MetadataMap, Others},
    settings::Settings,
    snapshots,
    writeback::Writeback,
};

/// Opens, creates and measures qcow2 images.
///
/// Options of a node besides `file`, `backing` and `data-file`, which [`block_core::BlockHandle::reopen`] can change:
///
/// - `lazy-refcounts`: refcounts may be stale on disk while the dirty bit says so; as the header has it by default;
/// - `pass-discard-request` (as `discard`), `pass-discard-snapshot` (on), `pass-discard-other` (off): which freed space is
///   given back to the storage; `discard-no-unref` (off): a discarded cluster keeps its place in the file;
/// - `cache-size`, `l2-cache-size`, `l2-cache-entry-size`, `refcount-cache-size`: bytes;
/// - `cache-clean-interval`: seconds after which what wasn't used leaves the caches, 0 for never (by default 600, where the
///   environment [allows upkeep](block_core::Environment::allows_upkeep));
/// - `overlap-check`: `none`, `constant`, `cached` (the default) or `all`, also as `overlap-check.template`, and switches for
///   single kinds of metadata, such as `overlap-check.active-l2`;
/// - `check-compressed` (off): a check decompresses clusters that meet another in their last sector, to see whether they overlap; a
///   repair of everything does so anyway.
///
/// And, not to be changed: `snapshot` (an identifier, or a name), `snapshot-id`, `snapshot-name`: the disk is what it was when
/// that internal snapshot was taken, read-only.
///
/// Options of creation: see [`create::OPTIONS`].
#[derive(Debug, Clone, Copy)]
pub struct Qcow2Factory {
    safeguards: bool,
}

impl Default for Qcow2Factory {
    fn default() -> Self {
        Self::new()
    }
}

impl Qcow2Factory {
    /// The factory that programs register.
    pub const fn new() -> Self {
        Self { safeguards: true }
    }

    /// A factory whose images have no pins, no ownership checks and no quarantine: freed clusters are allocatable at once
    /// and punched afterwards. Such images are corrupted by overlapping requests unless the core's gate holds those back;
    /// tests show with it that the gate and the safeguards are what prevents that.
    #[doc(hidden)]
    pub const fn without_safeguards_for_tests() -> Self {
        Self { safeguards: false }
    }
}

/// Takes the internal snapshot that is to be read out of the options.
fn wanted_snapshot(options: &mut Options) -> Result<Option<SnapshotKey>> {
    let mut text = |key: &str| match options.take(key) {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(text)),
        Some(serde_json::Value::Number(number)) => Ok(Some(number.to_string())),
        Some(other) => Err(
            Error::invalid("A snapshot is named by its identifier or its name")
                .with_field(key, other, "a text"),
        ),
    };
    let any = text("snapshot")?;
    match (any, text("snapshot-id")?, text("snapshot-name")?) {
        (None, None, None) => Ok(None),
        (Some(any), None, None) => Ok(Some(SnapshotKey::IdOrName(any))),
        (None, Some(id), None) => Ok(Some(SnapshotKey::Id(id))),
        (None, None, Some(name)) => Ok(Some(SnapshotKey::Name(name))),
        (None, Some(id), Some(name)) => Ok(Some(SnapshotKey::IdAndName(id, name))),
        (Some(_), _, _) => Err(Error::invalid(
            "'snapshot' can't be combined with 'snapshot-id' and 'snapshot-name'",
        )),
    }
}

/// What is known of an image before anything is written to it and before its tables are read.
struct Outline {
    child: Child,
    header: Header,
    read_only: bool,
    data: Option<Arc<Node>>,
    encryption: Option<Encryption>,
    settings: Settings,
    kinds: Kinds,
    /// The snapshot that is to be shown.
    wanted: Option<SnapshotKey>,
}

/// Reads header and options and refuses what can't be. Leaves the option `backing`.
async fn outline(
    context: &OpenContext,
    options: &mut Options,
    file: &Arc<Node>,
    safeguards: bool,
) -> Result<Outline> {
    let child = Child::unattached(file.clone());
    let header = header_update::read_header(&child).await?;
    let read_only = context.node.read_only || file.driver().is_read_only();
    header.check_open(read_only, context.how.for_check)?;
    let data = data_file::open(context, options, file, &header).await?;
    if !context.how.for_check {
        header.check_inside(child.length(), read_only)?;
    }
    let backing = options.take("backing");
    let encryption = Encryption::open(context, options, &header, &child).await?;
    let mut own = std::mem::take(options);
    if let Some(backing) = backing {
        options.set("backing", backing);
    }
    let wanted = wanted_snapshot(&mut own)?;
    let (settings, kinds) = Settings::parse(own, &header, context.node.discard, safeguards)?;
    if wanted.is_some() && !read_only {
        return Err(Error::invalid(
            "An internal snapshot can only be opened read-only",
        ));
    }
    Ok(Outline {
        child,
        header,
        read_only,
        data,
        encryption,
        settings,
        kinds,
        wanted,
    })
}

async fn open_image(
    context: &OpenContext,
    outline: Outline,
    name: &str,
    safeguards: bool,
) -> Result<(Qcow2, Option<Arc<Node>>)> {
    let Outline {
        child,
        mut header,
        read_only,
        data,
        encryption,
        settings,
        kinds,
        wanted,
    } = outline;
    if !read_only && !context.how.for_check {
        prepare_for_writing(&child, &mut header).await?;
    }
    let capacity = settings.refcount_blocks();
    let refcounts = match load_refcounts(&child, &header, capacity).await {
        Err(error) if read_only && !context.how.for_check => {
            // Nothing that is only read needs them, and the data may be there: it can be saved. Before the image is written to they
            // are read again.
            tracing::warn!("qcow2: the refcount table of '{name}' can't be read: {error}");
            RefcountStore::unread(header.geometry(), capacity)
        }
        loaded => loaded?,
    };
    let snapshots = match snapshots::load(&child, &header).await {
        // A check looks for itself, and repairs.
        Err(_) if context.how.for_check => Vec::new(),
        loaded => loaded?,
    };
    let view = match wanted {
        Some(key) => {
            let index = snapshots::find(&snapshots, &key)
                .map_err(|error| error.context("Failed to load snapshot"))?;
            snapshots.get(index)
        }
        None => None,
    };
    let (l1, size) = match view {
        Some(entry) => {
            entry.check_l1(header.geometry())?;
            let l1 = Qcow2::read_l1_at(&child, entry.l1_table_offset, entry.l1_bytes()).await?;
            (l1, entry.disk_size.unwrap_or(header.size) & !511)
        }
        None => (Qcow2::read_l1(&child, &header).await?, header.disk_size()),
    };
    let view = view.map(|entry| String::from_utf8_lossy(&entry.id).into_owned());
    let metadata = Arc::new(MetadataMap::new(safeguards, kinds));
    if !read_only {
        let others = match snapshots::others(&child, &header, &snapshots, kinds).await {
            Err(_) if context.how.for_check => Others::default(),
            found => found?,
        };
        metadata.rebuild(&header, &l1, &refcounts, &others);
    }
    let writeback = Writeback::default();
    let tap = Arc::<SpaceTap>::default();
    let mut meta = Meta::new(
        header.clone(),
        refcounts,
        Orphans::default(),
        metadata.clone(),
        writeback.failure.clone(),
        safeguards,
        tap.clone(),
    );
    meta.snapshots = snapshots;
    let image = Qcow2 {
        geometry: header.geometry(),
        settings,
        filename: child.filename().unwrap_or_else(|| name.to_owned()),
        size: AtomicU64::new(size),
        view,
        uncertain: AtomicBool::new(false),
        size_in_doubt: AtomicBool::new(false),
        raw_data: AtomicBool::new(header.has_raw_data_file()),
        codec: Codec::from_type(header.compression_type).unwrap_or_default(),
        packing_order: PackingOrder::default(),
        read_only: AtomicBool::new(read_only),
        names_backing: AtomicBool::new(header.backing_file.is_some()),
        shut: AtomicBool::new(false),
        // Without a check in mind it has been repaired by now.
        stale: AtomicBool::new(!read_only && context.how.for_check && header.is_dirty()),
        retired: AtomicBool::new(false),
        warned_corrupt: AtomicBool::new(false),
        l1: ArcSwap::from_pointee(l1),
        metadata: metadata.clone(),
        slices: SliceCache::new(),
        claims: Claims::default(),
        pins: if safeguards {
            Pins::new()
        } else {
            Pins::new_disabled_for_tests()
        },
        meta: futures::lock::Mutex::new(meta),
        bitmaps: Stored::new(header.extensions.bitmaps.is_some()),
        tap,
        writeback,
        counters: Counters::default(),
        encryption,
        quarantined: AtomicU64::new(0),
        cached_refcount_blocks: AtomicUsize::new(0),
        cleaner: AtomicU64::new(0),
    };
    Ok((image, data))
}

#[async_trait]
impl DriverFactory for Qcow2Factory {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u32 {
        header::probe(head)
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let named = |error: Error| {
            let name = Child::unattached(file.clone()).filename();
            let error = error.with_operation(Operation::Open, 0, 0);
            name.map_or_else(
                || error.duplicate(),
                |name| error.duplicate().with_file(name),
            )
        };
        let outline = outline(&context, &mut options, &file, self.safeguards)
            .await
            .map_err(named)?;
        // All that may be missing, or not be permitted, comes before the first write to the image.
        let name = outline.header.backing_file_name();
        let format = outline.header.extensions.backing_format.clone();
        let backing = context
            .open_backing(&mut options, &file, name.as_deref(), format.as_deref())
            .await?;
        let (image, data) = open_image(&context, outline, file.name(), self.safeguards)
            .await
            .map_err(named)?;
        let mut edges = vec![(ChildRole::File, "file".to_owned(), file.clone())];
        if let Some(data) = data {
            edges.push((ChildRole::DataFile, "data-file".to_owned(), data));
        }
        if let Some(backing) = backing {
            edges.push((ChildRole::Backing, "backing".to_owned(), backing));
        }
        let image = Arc::new(image);
        image.start_cleaning(context.graph().env());
        Ok(Opened {
            driver: image,
            edges,
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::OPTIONS
    }

    fn amend_options(&self) -> &'static [CreateOption] {
        amend::OPTIONS
    }

    fn may_create(&self, context: &CreateContext, options: Options) -> Result<()> {
        create::may_create(context, options)
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        create::create(context, options).await
    }

    fn measure(&self, size: u64, data: &[(u64, u64)], options: Options) -> Result<Measure> {
        measure::measure(size, data, options)
    }
}
