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
    options::{Number, Options, Size, Switch},
    pins::Pins,
    registry::{CreateContext, CreateOption, DriverFactory, Measure, OpenContext, Opened},
    request::Child,
    snapshot::SnapshotKey,
    space::SpaceTap,
};
use serde::Deserialize;

use crate::{
    alloc::allocator::Orphans,
    bitmaps::Stored,
    cache::slices::{SliceCache, load_refcounts},
    claims::Claims,
    compress::Codec,
    counters::Counters,
    create, data_file,
    driver::prepare_for_writing,
    encryption::Encryption,
    header_update,
    image::{Qcow2, Settings},
    io::compressed::PackingOrder,
    layout::{Geometry, Header, header},
    measure,
    meta::Meta,
    overlap::MetadataMap,
    snapshots,
    writeback::Writeback,
};

/// The L2 cache covers the whole disk, unless that takes more than this.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Bytes of a slice, unless the cluster is smaller or an option says otherwise.
const DEFAULT_SLICE: u64 = 4096;
/// The fewest refcount blocks and slices that are kept.
const MIN_CACHED: u64 = 4;

/// Opens, creates and measures qcow2 images.
///
/// Options of a node besides `file`, `backing` and `data-file`: `lazy-refcounts`, `pass-discard-request`, `pass-discard-snapshot`,
/// `pass-discard-other`, `cache-size`, `l2-cache-size`, `l2-cache-entry-size`, `refcount-cache-size` (bytes),
/// `cache-clean-interval` and `overlap-check` (accepted, without effect); `snapshot` (an identifier, or a name),
/// `snapshot-id`, `snapshot-name`: the disk is what it was when that internal snapshot was taken, read-only. Options of
/// creation: see [`create::OPTIONS`].
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

/// The driver's own options.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Qcow2Options {
    lazy_refcounts: Option<Switch>,
    pass_discard_request: Option<Switch>,
    pass_discard_snapshot: Option<Switch>,
    pass_discard_other: Option<Switch>,
    discard_no_unref: Option<Switch>,
    overlap_check: Option<serde_json::Value>,
    cache_size: Option<Size>,
    l2_cache_size: Option<Size>,
    l2_cache_entry_size: Option<Size>,
    refcount_cache_size: Option<Size>,
    cache_clean_interval: Option<Number>,
    snapshot: Option<serde_json::Value>,
    snapshot_id: Option<serde_json::Value>,
    snapshot_name: Option<serde_json::Value>,
}

impl Qcow2Options {
    fn settings(&self, header: &Header, safeguards: bool) -> Result<Settings> {
        if self.discard_no_unref.is_some_and(|on| on.0) {
            return Err(Error::unsupported("discard-no-unref=on is not supported"));
        }
        let lazy = self.lazy_refcounts.map(|on| on.0);
        if lazy == Some(true) && header.version < 3 {
            return Err(Error::invalid(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ));
        }
        let geometry = header.geometry();
        let (l2_bytes, refcount_bytes) = self.cache_sizes(header, geometry)?;
        let slice = self.slice_size(geometry)?;
        let slices = l2_bytes.div_ceil(slice).max(MIN_CACHED);
        let blocks = (refcount_bytes / geometry.cluster_size()).max(MIN_CACHED);
        Ok(Settings {
            l2_slices: usize::try_from(slices).unwrap_or(usize::MAX),
            slice_bits: slice.trailing_zeros() - geometry.l2_entry_bits(),
            refcount_blocks: usize::try_from(blocks).unwrap_or(usize::MAX),
            pass_discard: self.pass_discard_request.is_none_or(|on| on.0),
            pass_discard_snapshot: self.pass_discard_snapshot.is_none_or(|on| on.0),
            pass_discard_other: self.pass_discard_other.is_some_and(|on| on.0),
            lazy_refcounts: lazy.unwrap_or(header.lazy_refcounts()) && header.version >= 3,
            safeguards,
        })
    }

    /// The internal snapshot that is to be read.
    fn snapshot(&self) -> Result<Option<SnapshotKey>> {
        let text = |value: &Option<serde_json::Value>| match value {
            None | Some(serde_json::Value::Null) => Ok(None),
            Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
            Some(serde_json::Value::Number(number)) => Ok(Some(number.to_string())),
            Some(other) => Err(
                Error::invalid("A snapshot is named by its identifier or its name")
                    .with_field("snapshot", other, "a text"),
            ),
        };
        let any = text(&self.snapshot)?;
        match (any, text(&self.snapshot_id)?, text(&self.snapshot_name)?) {
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

    fn slice_size(&self, geometry: Geometry) -> Result<u64> {
        let size = geometry.cluster_size();
        let slice = self
            .l2_cache_entry_size
            .map_or(DEFAULT_SLICE.min(size), |size| size.0);
        if !slice.is_power_of_two() || !(512..=size).contains(&slice) {
            return Err(Error::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({size})"
            ))
            .with_field("l2-cache-entry-size", slice, format!("a power of two, 512..={size}")));
        }
        Ok(slice)
    }

    /// Bytes of the L2 cache and of the refcount cache.
    fn cache_sizes(&self, header: &Header, geometry: Geometry) -> Result<(u64, u64)> {
        let wanted = |size: Option<Size>| size.map(|size| size.0);
        let total = wanted(self.cache_size);
        let (l2, refcount) = (wanted(self.l2_cache_size), wanted(self.refcount_cache_size));
        // What it takes to hold all L2 tables.
        let all = geometry
            .clusters_for(header.size)
            .saturating_mul(geometry.l2_entry_size());
        let least_refcount = MIN_CACHED * geometry.cluster_size();
        if let Some(total) = total {
            for (name, part) in [("l2-cache-size", l2), ("refcount-cache-size", refcount)] {
                if part.is_some_and(|part| part > total) {
                    return Err(Error::invalid(format!("{name} may not exceed cache-size")));
                }
            }
            return match (l2, refcount) {
                (Some(_), Some(_)) => Err(Error::invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                )),
                (Some(l2), None) => Ok((l2, total - l2)),
                (None, Some(refcount)) => Ok((total - refcount, refcount)),
                (None, None) => {
                    let l2 = total.saturating_sub(least_refcount).min(all);
                    Ok((l2, total - l2))
                }
            };
        }
        let l2 = l2.unwrap_or(all.min(DEFAULT_L2_CACHE));
        Ok((l2, refcount.unwrap_or(least_refcount)))
    }
}

async fn open_image(
    context: &OpenContext,
    options: &mut Options,
    file: &Arc<Node>,
    safeguards: bool,
) -> Result<(Qcow2, Header, Option<Arc<Node>>)> {
    let child = Child::unattached(file.clone());
    let mut header = header_update::read_header(&child).await?;
    let read_only = context.node.read_only || file.driver().is_read_only();
    header.check_open(read_only, context.how.for_check)?;
    // Before anything is written to the image: it may be missing, or not be permitted.
    let data = data_file::open(context, options, file, &header).await?;
    if !context.how.for_check {
        header.check_inside(child.length())?;
    }
    let backing = options.take("backing");
    let encryption = Encryption::open(context, options, &header, &child).await?;
    let parsed: Qcow2Options = std::mem::take(options).parse()?;
    if let Some(backing) = backing {
        options.set("backing", backing);
    }
    let settings = parsed.settings(&header, safeguards)?;
    let wanted = parsed.snapshot()?;
    if wanted.is_some() && !read_only {
        return Err(Error::invalid(
            "An internal snapshot can only be opened read-only",
        ));
    }
    if !read_only && !context.how.for_check {
        prepare_for_writing(&child, &mut header).await?;
    }
    let refcounts = load_refcounts(&child, &header, settings.refcount_blocks).await?;
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
    let is_view = view.is_some();
    let metadata = Arc::new(MetadataMap::new(safeguards));
    metadata.rebuild(&header, &l1, &refcounts);
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
        filename: child.filename().unwrap_or_else(|| file.name().to_owned()),
        size: AtomicU64::new(size),
        is_view,
        uncertain: AtomicBool::new(false),
        raw_data: AtomicBool::new(header.has_raw_data_file()),
        codec: Codec::from_type(header.compression_type).unwrap_or_default(),
        packing_order: PackingOrder::default(),
        read_only: AtomicBool::new(read_only),
        names_backing: AtomicBool::new(header.backing_file.is_some()),
        shut: AtomicBool::new(false),
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
    };
    Ok((image, header, data))
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
        let (image, header, data) = open_image(&context, &mut options, &file, self.safeguards)
            .await
            .map_err(named)?;
        let name = header.backing_file_name();
        let format = header.extensions.backing_format.as_deref();
        let backing = context
            .open_backing(&mut options, &file, name.as_deref(), format)
            .await?;
        let mut edges = vec![(ChildRole::File, "file".to_owned(), file.clone())];
        if let Some(data) = data {
            edges.push((ChildRole::DataFile, "data-file".to_owned(), data));
        }
        if let Some(backing) = backing {
            edges.push((ChildRole::Backing, "backing".to_owned(), backing));
        }
        Ok(Opened {
            driver: Arc::new(image),
            edges,
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::OPTIONS
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        create::create(context, options).await
    }

    fn measure(&self, size: u64, data: &[(u64, u64)], options: Options) -> Result<Measure> {
        measure::measure(size, data, options)
    }
}
