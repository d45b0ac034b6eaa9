//! The driver's own options of a node: what they are, what they must not be, and what they say. All of them can be changed
//! on an open image, so requests ask [`Settings`], whose values are atomics.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use block_core::{
    error::{Error, ErrorKind, Result},
    options::{DiscardMode, Number, Options, Size, Switch},
};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    layout::{Geometry, Header},
    overlap::Kinds,
};

/// The L2 cache covers the whole disk, unless that takes more than this.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Bytes of a slice, unless the cluster is smaller or an option says otherwise.
const DEFAULT_SLICE: u64 = 4096;
/// Seconds after which what wasn't used since leaves the caches, where that isn't said and the environment allows for upkeep.
pub(crate) const DEFAULT_CLEAN_INTERVAL: u64 = 600;
/// No option says how often the caches are cleaned.
const UNSAID: u64 = u64::MAX;
/// The fewest refcount blocks and slices that are kept.
const MIN_CACHED: u64 = 4;

/// The names of the options, as [`Qcow2Options`] takes them.
const NAMES: [&str; 12] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "check-compressed",
];

/// The options as they are written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Qcow2Options {
    lazy_refcounts: Option<Switch>,
    pass_discard_request: Option<Switch>,
    pass_discard_snapshot: Option<Switch>,
    pass_discard_other: Option<Switch>,
    discard_no_unref: Option<Switch>,
    overlap_check: Option<Value>,
    cache_size: Option<Size>,
    l2_cache_size: Option<Size>,
    l2_cache_entry_size: Option<Size>,
    refcount_cache_size: Option<Size>,
    cache_clean_interval: Option<Number>,
    check_compressed: Option<Switch>,
}

/// What the options say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Values {
    l2_slices: usize,
    slice_bits: u32,
    refcount_blocks: usize,
    pass_discard_request: bool,
    pass_discard_snapshot: bool,
    pass_discard_other: bool,
    discard_no_unref: bool,
    lazy_refcounts: bool,
    overlap_check: Kinds,
    clean_interval: u64,
    check_compressed: bool,
}

/// What the options of an open image say, now.
#[derive(Debug)]
pub(crate) struct Settings {
    l2_slices: AtomicUsize,
    slice_bits: AtomicU32,
    refcount_blocks: AtomicUsize,
    pass_discard_request: AtomicBool,
    pass_discard_snapshot: AtomicBool,
    pass_discard_other: AtomicBool,
    discard_no_unref: AtomicBool,
    lazy_refcounts: AtomicBool,
    clean_interval: AtomicU64,
    check_compressed: AtomicBool,
    /// As they were given, last.
    given: Mutex<Map<String, Value>>,
    /// The node's discard mode when it was opened, which decides where options don't.
    discard: DiscardMode,
    /// Off in tests only.
    pub safeguards: bool,
}

/// A change of the settings that was found valid.
pub(crate) struct SettingsChange {
    values: Values,
    given: Map<String, Value>,
}

impl SettingsChange {
    /// log2 of the entries in a slice.
    pub fn slice_bits(&self) -> u32 {
        self.values.slice_bits
    }

    /// Which overlaps are looked for.
    pub fn overlap_check(&self) -> Kinds {
        self.values.overlap_check
    }
}

impl Settings {
    /// Reads the options of a node. Gives back which overlaps are to be looked for, too, which the map of metadata keeps.
    ///
    /// # Errors
    /// EINVAL for values that aren't allowed, also for this image, in qemu's words.
    pub fn parse(
        options: Options,
        header: &Header,
        discard: DiscardMode,
        safeguards: bool,
    ) -> Result<(Self, Kinds)> {
        let given = options.0;
        if let Some(key) = given.keys().find(|key| !NAMES.contains(&key.as_str())) {
            return Err(Error::invalid(format!(
                "Block format 'qcow2' does not support the option '{key}'"
            )));
        }
        let values = parse(&given, header, discard)?;
        let settings = Self {
            l2_slices: AtomicUsize::new(values.l2_slices),
            slice_bits: AtomicU32::new(values.slice_bits),
            refcount_blocks: AtomicUsize::new(values.refcount_blocks),
            pass_discard_request: AtomicBool::new(values.pass_discard_request),
            pass_discard_snapshot: AtomicBool::new(values.pass_discard_snapshot),
            pass_discard_other: AtomicBool::new(values.pass_discard_other),
            discard_no_unref: AtomicBool::new(values.discard_no_unref),
            lazy_refcounts: AtomicBool::new(values.lazy_refcounts),
            clean_interval: AtomicU64::new(values.clean_interval),
            check_compressed: AtomicBool::new(values.check_compressed),
            given: Mutex::new(given),
            discard,
            safeguards,
        };
        Ok((settings, values.overlap_check))
    }

    /// What the options would say after `changes`; those that aren't among them stay.
    ///
    /// # Errors
    /// As [`Self::parse`], and EINVAL for an option that isn't the driver's own.
    pub fn changed(&self, changes: &Map<String, Value>, header: &Header) -> Result<SettingsChange> {
        let mut given = self.given.lock().clone();
        for (key, value) in changes {
            let name = key.split('.').next().unwrap_or_default();
            if !NAMES.contains(&name) {
                return Err(Error::new(
                    ErrorKind::NotSupported,
                    format!("Cannot change the option '{key}'"),
                ));
            }
            match value {
                Value::Null => given.shift_remove(key),
                value => given.insert(key.clone(), value.clone()),
            };
        }
        let values = parse(&given, header, self.discard)?;
        Ok(SettingsChange { values, given })
    }

    /// From here on `change` holds. No request is under way.
    pub fn apply(&self, change: SettingsChange) {
        let SettingsChange { values, given } = change;
        self.l2_slices.store(values.l2_slices, Ordering::Relaxed);
        self.slice_bits.store(values.slice_bits, Ordering::Relaxed);
        self.refcount_blocks
            .store(values.refcount_blocks, Ordering::Relaxed);
        self.pass_discard_request
            .store(values.pass_discard_request, Ordering::Relaxed);
        self.pass_discard_snapshot
            .store(values.pass_discard_snapshot, Ordering::Relaxed);
        self.pass_discard_other
            .store(values.pass_discard_other, Ordering::Relaxed);
        self.discard_no_unref
            .store(values.discard_no_unref, Ordering::Relaxed);
        self.lazy_refcounts
            .store(values.lazy_refcounts, Ordering::Relaxed);
        self.clean_interval
            .store(values.clean_interval, Ordering::Relaxed);
        self.check_compressed
            .store(values.check_compressed, Ordering::Relaxed);
        *self.given.lock() = given;
    }

    /// A check decompresses clusters where their entries don't tell whether they overlap.
    pub fn check_compressed(&self) -> bool {
        self.check_compressed.load(Ordering::Relaxed)
    }

    /// L2 slices kept in memory.
    pub fn l2_slices(&self) -> usize {
        self.l2_slices.load(Ordering::Relaxed)
    }

    /// log2 of the entries in a slice.
    #[inline]
    pub fn slice_bits(&self) -> u32 {
        self.slice_bits.load(Ordering::Relaxed)
    }

    /// Refcount blocks kept in memory.
    pub fn refcount_blocks(&self) -> usize {
        self.refcount_blocks.load(Ordering::Relaxed)
    }

    /// Space that a discard, or a zero write that may unmap, frees is given back to the storage.
    pub fn pass_discard_request(&self) -> bool {
        self.pass_discard_request.load(Ordering::Relaxed)
    }

    /// Space that a deleted snapshot or an emptied layer frees is, too.
    pub fn pass_discard_snapshot(&self) -> bool {
        self.pass_discard_snapshot.load(Ordering::Relaxed)
    }

    /// Freed space of other kinds is, too.
    pub fn pass_discard_other(&self) -> bool {
        self.pass_discard_other.load(Ordering::Relaxed)
    }

    /// A discarded cluster keeps its place in the file.
    pub fn discard_no_unref(&self) -> bool {
        self.discard_no_unref.load(Ordering::Relaxed)
    }

    /// The dirty bit is set before the first allocation.
    pub fn lazy_refcounts(&self) -> bool {
        self.lazy_refcounts.load(Ordering::Relaxed)
    }

    /// Seconds after which what wasn't used since is dropped from the caches, 0 for never; `None` when that isn't said.
    pub fn clean_interval(&self) -> Option<u64> {
        Some(self.clean_interval.load(Ordering::Relaxed)).filter(|seconds| *seconds != UNSAID)
    }
}

fn parse(given: &Map<String, Value>, header: &Header, discard: DiscardMode) -> Result<Values> {
    let options: Qcow2Options = Options(given.clone()).parse()?;
    let no_unref = options.discard_no_unref.is_some_and(|on| on.0);
    if no_unref && header.version < 3 {
        return Err(Error::invalid(
            "discard-no-unref is only supported since qcow2 version 3",
        ));
    }
    let lazy = options.lazy_refcounts.map(|on| on.0);
    if lazy == Some(true) && header.version < 3 {
        return Err(Error::invalid(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ));
    }
    let clean_interval = options
        .cache_clean_interval
        .map_or(UNSAID, |number| number.0);
    if options.cache_clean_interval.is_some() && u32::try_from(clean_interval).is_err() {
        return Err(Error::invalid("Cache clean interval too big").with_field(
            "cache-clean-interval",
            clean_interval,
            "seconds, 0 (never)..=4294967295",
        ));
    }
    let geometry = header.geometry();
    let slice = options.slice_size(geometry)?;
    let (l2_bytes, refcount_bytes) = options.cache_sizes(header, geometry)?;
    let slices = l2_bytes.div_ceil(slice).max(MIN_CACHED);
    let blocks = (refcount_bytes / geometry.cluster_size()).max(MIN_CACHED);
    let count = |count: u64, what: &str, name: &str| {
        i32::try_from(count)
            .map(|count| count as usize)
            .map_err(|_| {
                Error::invalid(format!("{what} cache size too big")).with_field(
                    name,
                    count,
                    "at most 2147483647 entries",
                )
            })
    };
    Ok(Values {
        l2_slices: count(slices, "L2", "l2-cache-size")?,
        slice_bits: slice.trailing_zeros() - geometry.l2_entry_bits(),
        refcount_blocks: count(blocks, "Refcount", "refcount-cache-size")?,
        pass_discard_request: options
            .pass_discard_request
            .map_or(discard == DiscardMode::Unmap, |on| on.0),
        pass_discard_snapshot: options.pass_discard_snapshot.is_none_or(|on| on.0),
        pass_discard_other: options.pass_discard_other.is_some_and(|on| on.0),
        discard_no_unref: no_unref,
        lazy_refcounts: lazy.unwrap_or(header.lazy_refcounts()) && header.version >= 3,
        overlap_check: overlap_check(options.overlap_check)?,
        clean_interval,
        check_compressed: options.check_compressed.is_some_and(|on| on.0),
    })
}

impl Qcow2Options {
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
        let tables = geometry.l1_entries_for(header.size).max(1);
        let all = tables.saturating_mul(geometry.cluster_size());
        let least_refcount = MIN_CACHED * geometry.cluster_size();
        let (l2, refcount) = if let Some(total) = total {
            if l2.is_some() && refcount.is_some() {
                return Err(Error::invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                ));
            }
            for (name, part) in [("l2-cache-size", l2), ("refcount-cache-size", refcount)] {
                if part.is_some_and(|part| part > total) {
                    return Err(Error::invalid(format!("{name} may not exceed cache-size")));
                }
            }
            match (l2, refcount) {
                (Some(l2), _) => (l2, total - l2),
                (None, Some(refcount)) => (total - refcount, refcount),
                (None, None) => {
                    let l2 = total.saturating_sub(least_refcount).min(all);
                    (l2, total - l2)
                }
            }
        } else {
            let l2 = l2.unwrap_or(DEFAULT_L2_CACHE);
            (l2, refcount.unwrap_or(least_refcount))
        };
        // More than there is to hold would only be a number.
        Ok((l2.min(all), refcount))
    }
}

/// Reads `overlap-check`: a mode, or an object with a mode as `template` and switches for single kinds.
fn overlap_check(option: Option<Value>) -> Result<Kinds> {
    let (mode, switches) = match option {
        None => (None, Map::new()),
        Some(Value::Object(mut map)) => {
            // Given beside the others, the plain mode is kept under an empty name.
            let plain = map.shift_remove("");
            let template = map.shift_remove("template");
            if let (Some(plain), Some(template)) = (&plain, &template)
                && plain != template
            {
                return Err(Error::invalid(format!(
                    "Conflicting values for qcow2 options 'overlap-check' ({}) and \
                     'overlap-check.template' ({})",
                    quoted(plain),
                    quoted(template)
                )));
            }
            (template.or(plain), map)
        }
        Some(mode) => (Some(mode), Map::new()),
    };
    let mut kinds = match &mode {
        None => Kinds::CACHED,
        Some(mode) => mode.as_str().and_then(Kinds::of_mode).ok_or_else(|| {
            let allowed = "none, constant, cached, all";
            Error::invalid(format!(
                "Unsupported value {} for qcow2 option 'overlap-check'. Allowed are any of the \
                 following: {allowed}",
                quoted(mode)
            ))
            .with_field("overlap-check", quoted(mode), allowed)
        })?,
    };
    for (name, value) in switches {
        let key = format!("overlap-check.{name}");
        let Some(kind) = Kinds::of_option(&name) else {
            return Err(Error::invalid(format!(
                "Block format 'qcow2' does not support the option '{key}'"
            )));
        };
        let mut one = Options::new().with(&key, value);
        if let Some(on) = one.take_switch(&key)? {
            kinds.set(kind, on);
        }
    }
    Ok(kinds)
}

fn quoted(value: &Value) -> String {
    match value {
        Value::String(text) => format!("'{text}'"),
        other => format!("'{other}'"),
    }
}
