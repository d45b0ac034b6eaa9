//! The contract between the core and a driver: what a format, protocol or filter implements.
//!
//! The core promises (design, sections 2 to 4): every call is inside a tracked request, aligned to the driver's
//! [`Limits`], inside the node's length, and no discard, zero write or other serialising request that overlaps it is
//! with the driver at the same time. Plain overlapping reads and writes may be: a driver orders allocations of the
//! same cluster itself. A driver may drop its locks during data I/O; it takes its children from the [`Request`] and
//! never keeps them.
//!
//! A future that a driver returns is polled to its end even when the user dropped the request, so a driver may
//! assume that its own code is not cut off between two awaits, short of the process ending.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use bitflags::bitflags;

use crate::{
    bitmap::NamedBitmap,
    buffer::{IoBuf, IoBufMut},
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::{PermissionSet, Permissions, RequestFlags},
    image::{CheckMode, CheckReport, ImageInfo, Progress},
    limits::Limits,
    node::Edges,
    options::Options,
    request::Request,
    snapshot::{NewSnapshot, SnapshotInfo, SnapshotKey},
    status::{DriverStatus, StatusFlags},
};

/// What kind of node a driver makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DriverKind {
    /// Storage: has no children that hold its data.
    Protocol,
    /// An image format over a file child.
    Format,
    /// Passes its one filtered child through.
    Filter,
}

/// What a child is to its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChildRole {
    /// Holds the format's metadata, and its data unless there is a data file.
    File,
    /// Holds guest data only (raw's file, an external data file, a flat extent).
    DataFile,
    /// What isn't allocated in the parent is read from here.
    Backing,
    /// The node that a filter filters.
    Filtered,
    /// Something a filter writes to besides its filtered child (copy-before-write's or a mirror's target).
    Target,
}

bitflags! {
    /// What a driver can do beyond reading. What isn't declared is answered ENOTSUP, never faked.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Capabilities: u32 {
        /// `write`.
        const WRITE = 1 << 0;
        /// `write_zeroes`.
        const WRITE_ZEROES = 1 << 1;
        /// `discard`.
        const DISCARD = 1 << 2;
        /// `write` and `write_zeroes` honour FUA; otherwise the core flushes after them.
        const FUA = 1 << 3;
        /// `write` with WRITE_COMPRESSED.
        const COMPRESSED = 1 << 4;
        /// May have a backing child.
        const BACKING = 1 << 5;
        /// `check`.
        const CHECK = 1 << 6;
        /// `check` can repair.
        const REPAIR = 1 << 7;
        /// `truncate`.
        const TRUNCATE = 1 << 8;
        /// `copy_range_from` for another node of the same driver.
        const COPY_RANGE = 1 << 9;
        /// A discarded range reads as zeroes afterwards.
        const DISCARD_ZEROES = 1 << 10;
        /// A new image of this kind reads as zeroes where nothing was written.
        const ZERO_INIT = 1 << 11;
        /// `change_backing`.
        const CHANGE_BACKING = 1 << 12;
        /// `make_empty`.
        const MAKE_EMPTY = 1 << 13;
        /// Every write, zero write and discard at this node is serialising (a write-blocking mirror's top,
        /// copy-before-write), because the driver does more than one thing for each.
        const SERIALISE_WRITES = 1 << 14;
        /// `try_map` may answer something other than `NotCached`.
        const TRY_MAP = 1 << 15;
        /// Reads with COPY_ON_READ are left to the driver (a filter that passes the flag on).
        const COPY_ON_READ = 1 << 16;
        /// A write past the end grows the node.
        const GROW = 1 << 17;
        /// `amend`.
        const AMEND = 1 << 20;
        /// `debug_event` wants to be told what drivers above do (a fault injector). Set once and for all.
        const DEBUG_EVENTS = 1 << 18;
        /// Internal snapshots: `snapshot_create`, `snapshot_apply` and `snapshot_delete`.
        const SNAPSHOTS = 1 << 19;
        /// `load_bitmaps`, `check_new_bitmap`, `store_bitmaps` and `remove_bitmap`.
        const PERSISTENT_BITMAPS = 1 << 21;
    }
}

/// What [`BlockDriver::try_map`] is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapIntent {
    /// The range is going to be read.
    Read,
    /// The range is going to be written in place: only what may be overwritten where it lies counts as mapped.
    Overwrite,
}

/// The answer of [`BlockDriver::try_map`], about the whole range or a leading part of it.
pub enum Mapping {
    /// The first `len` bytes are at `offset` of the child at `edge` (an index into the request's [`Edges`]). `pin`
    /// keeps them from being freed and reused; the core holds it until the data I/O has ended.
    Data {
        /// Index of the child in the edges that were passed in.
        edge: usize,
        /// Offset in that child, in bytes.
        offset: u64,
        /// For how many bytes.
        len: u64,
        /// Held until the I/O has ended.
        pin: Option<crate::pins::Pin>,
    },
    /// The first `len` bytes read as zeroes. Never for [`MapIntent::Overwrite`].
    Zero {
        /// For how many bytes.
        len: u64,
    },
    /// The first `len` bytes come from the backing child, or are zeroes if there is none. Never for
    /// [`MapIntent::Overwrite`].
    Backing {
        /// For how many bytes.
        len: u64,
    },
    /// It takes more than a look at the cache: call `read` or `write`.
    NotCached,
}

/// How far [`BlockDriver::try_read`] or [`BlockDriver::try_write`] got.
#[derive(Debug)]
pub enum Attempt {
    /// It is done, or has failed for good.
    Done(Result<()>),
    /// So many bytes at the front are done, a multiple of the request alignment. The rest takes the driver's own
    /// future; 0 when nothing was tried.
    Left(usize),
}

/// How storage is to be preallocated when an image grows or is made.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Metadata only.
    Metadata,
    /// Space is reserved, without writing.
    Falloc,
    /// Space is written with zeroes.
    Full,
}

/// How a node is to be resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Truncate {
    /// Fail if exactly this length can't be had.
    pub exact: bool,
    /// Preallocation of the grown part.
    pub preallocation: Preallocation,
    /// The grown part must read as zeroes even if a longer backing file shows through.
    pub zero: bool,
}

/// What can be changed on an open driver.
#[derive(Debug, Clone, Default)]
pub struct Reopen {
    /// Switch to read-only (`true`) or read-write (`false`).
    pub read_only: Option<bool>,
    /// Other options, by their name.
    pub options: serde_json::Map<String, serde_json::Value>,
}

/// A format, protocol or filter.
///
/// Methods that take `self: Arc<Self>` return futures that own all that they need: the core keeps such a future
/// until it has ended, also when the user's own future was dropped.
#[async_trait]
pub trait BlockDriver: Send + Sync + 'static {
    /// The driver's name, as in `"driver": "qcow2"`.
    fn name(&self) -> &'static str;

    /// What kind of node it makes.
    fn kind(&self) -> DriverKind;

    /// What it can do, now (a read-only image has no `WRITE`).
    fn capabilities(&self) -> Capabilities;

    /// The length of the node in bytes. `edges` are the node's children now.
    fn length(&self, edges: &Edges) -> u64;

    /// Its limits; `edges` are the node's children, whose limits a raw format or a filter merges in.
    fn limits(&self, edges: &Edges) -> Limits;

    /// The file name that a user knows this by, if it has one.
    fn filename(&self) -> Option<String> {
        None
    }

    /// The options, besides its children, without which its file would be another disk (a window, a snapshot). Who names the node in
    /// an image has to name them as well ([`Node::name_in_images`](crate::Node::name_in_images)).
    fn decisive_options(&self) -> Options {
        Options::new()
    }

    /// Whether the driver was opened read-only.
    fn is_read_only(&self) -> bool {
        !self.capabilities().contains(Capabilities::WRITE)
    }

    /// What the node needs from the child in `role`, given what its own parents use and share together.
    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        default_child_permissions(role, parents, self.is_read_only())
    }

    /// First half of a change of permissions: may fail, changes nothing that `abort_permissions` can't undo.
    fn prepare_permissions(&self, wanted: PermissionSet) -> Result<()> {
        let _ = wanted;
        Ok(())
    }

    /// Second half, after every node agreed. Can't fail.
    fn commit_permissions(&self) {}

    /// Second half, after some node refused. Can't fail.
    fn abort_permissions(&self) {}

    /// Where the range is, if a shared look at what is cached can tell. Never blocks, never does I/O, never takes an
    /// exclusive lock. The pin in the answer is published before the mapping is loaded.
    fn try_map(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        let _ = (edges, offset, len, intent);
        Mapping::NotCached
    }

    /// Fills `buf` with what is at `offset`, if that is a matter of copying: what is in the page cache, or in memory. It
    /// doesn't wait (but see protocol-file's `inline=always`) and asks nothing of any child. The core calls it before every
    /// [`Self::read`], inside the same tracked request, so that a request which ends at once costs no future.
    fn try_read(&self, offset: u64, buf: &mut IoBufMut) -> Attempt {
        let _ = (offset, buf);
        Attempt::Left(0)
    }

    /// The same for [`Self::write`]. Flags that take more than a copy (FUA, WRITE_COMPRESSED) are left to it.
    fn try_write(&self, offset: u64, buf: &IoBuf, flags: RequestFlags) -> Attempt {
        let _ = (offset, buf, flags);
        Attempt::Left(0)
    }

    /// Fills `buf` with what is at `offset`.
    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()>;

    /// Writes `buf` at `offset`. `flags` may hold FUA (if declared), WRITE_COMPRESSED (if declared) and
    /// WRITE_UNCHANGED.
    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let _ = (request, offset, buf, flags);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Makes a range read as zeroes. `flags` may hold MAY_UNMAP and FUA (if declared). ENOTSUP makes the core write
    /// zero buffers instead, so nothing may have been changed by then.
    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let _ = (request, offset, len, flags);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Tells that the content of a range isn't needed. Advisory; what is read afterwards is the format's choice.
    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        let _ = (request, offset, len);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Makes everything that completed before durable: writes back cached metadata in crash-safe order and flushes
    /// the children that it writes to. There is no default: a flush that isn't one loses data.
    async fn flush(self: Arc<Self>, request: Request) -> Result<()>;

    /// Changes the length of the node to `length` bytes.
    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        let _ = (request, length, how);
        Err(Error::new(
            ErrorKind::NotSupported,
            "Image format driver does not support resize",
        ))
    }

    /// What the start of the range is made of, at this layer alone. Formats answer `unallocated` for what the
    /// backing file decides, without looking whether there is one.
    async fn block_status(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let _ = (request, offset);
        Ok(DriverStatus {
            flags: StatusFlags::DATA | StatusFlags::ALLOCATED,
            len,
            file_offset: 0,
        })
    }

    /// Copies from another node of the same driver without passing the data through memory. ENOTSUP (with nothing
    /// changed) makes the caller copy the plain way.
    async fn copy_range_from(
        self: Arc<Self>,
        request: Request,
        source: Arc<dyn BlockDriver>,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let _ = (request, source, source_offset, offset, len);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Checks the image and repairs it as `mode` says. Runs under a serialising request over the whole node.
    async fn check(
        self: Arc<Self>,
        request: Request,
        mode: CheckMode,
        progress: Progress,
    ) -> Result<CheckReport> {
        let _ = (request, mode, progress);
        Err(Error::new(
            ErrorKind::NotSupported,
            "This image format does not support checks",
        ))
    }

    /// Records another backing file in the image's header; the graph's edge is not touched. `None` removes it.
    async fn change_backing(
        self: Arc<Self>,
        request: Request,
        file: Option<String>,
        format: Option<String>,
    ) -> Result<()> {
        let _ = (request, file, format);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Changes what an image was made with, such as its version or the width of its refcounts: the options are those of
    /// [`crate::registry::DriverFactory::amend_options`]. `force` allows what may lose data on purpose (erasing the last
    /// key). Runs under a serialising request over the whole node.
    ///
    /// What can't be is refused before anything is changed. Some changes end the use of the open image: everything but
    /// closing it is refused then, and it has to be opened again.
    async fn amend(
        self: Arc<Self>,
        request: Request,
        options: Options,
        force: bool,
        progress: Progress,
    ) -> Result<()> {
        let _ = (request, options, force, progress);
        Err(Error::new(
            ErrorKind::NotSupported,
            format!(
                "Format driver '{}' does not support option amendment",
                self.name()
            ),
        ))
    }

    /// Drops all data of this layer, so that the backing file shows everywhere.
    async fn make_empty(self: Arc<Self>, request: Request) -> Result<()> {
        let _ = request;
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// The internal snapshots of the image, oldest first.
    async fn snapshot_list(self: Arc<Self>, request: Request) -> Result<Vec<SnapshotInfo>> {
        let _ = request;
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Keeps the present state of the disk as an internal snapshot. Runs, like the two that follow, under a serialising
    /// request over the whole node: no guest request is under way. [`Progress::cancel`] stops it with ECANCELED as long
    /// as nothing has changed for the user.
    async fn snapshot_create(
        self: Arc<Self>,
        request: Request,
        new: NewSnapshot,
        progress: Progress,
    ) -> Result<SnapshotInfo> {
        let _ = (request, new, progress);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Makes the disk what it was when a snapshot was taken, its size included. The snapshot stays.
    async fn snapshot_apply(
        self: Arc<Self>,
        request: Request,
        which: SnapshotKey,
        progress: Progress,
    ) -> Result<()> {
        let _ = (request, which, progress);
        Err(Error::new(
            ErrorKind::NotSupported,
            "Block driver does not support snapshots",
        ))
    }

    /// Removes a snapshot, and gives back the space that only it used.
    async fn snapshot_delete(
        self: Arc<Self>,
        request: Request,
        which: SnapshotKey,
        progress: Progress,
    ) -> Result<()> {
        let _ = (request, which, progress);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Reads VM state, which is kept beside the disk and goes into snapshots: fills `buf` from byte `position` of it. What was never
    /// written reads as zeroes. Runs, like [`Self::write_vm_state`], under a serialising request over the whole node.
    async fn read_vm_state(
        self: Arc<Self>,
        request: Request,
        position: u64,
        buf: IoBufMut,
    ) -> Result<()> {
        let _ = (request, position, buf);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Writes VM state at byte `position` of it. The disk's content and size stay as they are.
    async fn write_vm_state(
        self: Arc<Self>,
        request: Request,
        position: u64,
        buf: IoBuf,
    ) -> Result<()> {
        let _ = (request, position, buf);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// The bitmaps that the image stores, in its order: asked for once, when the node has been opened and before anybody can
    /// write to it, but not for a check. The driver marks them on disk as in use, durably, if the image is
    /// writable; from then on nobody trusts what is stored until the driver, in `close` and when it is reopened
    /// read-only, has stored the node's persistent bitmaps (`request.node().named()`) anew.
    async fn load_bitmaps(self: Arc<Self>, request: Request) -> Result<Vec<NamedBitmap>> {
        let _ = request;
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Whether the image can store one more bitmap of that name with so many bytes per bit. Changes nothing.
    async fn check_new_bitmap(
        self: Arc<Self>,
        request: Request,
        name: String,
        granularity: u64,
    ) -> Result<()> {
        let _ = (request, name, granularity);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Stores the node's persistent bitmaps as they are, durably. In a writable image they stay marked as in use.
    async fn store_bitmaps(self: Arc<Self>, request: Request) -> Result<()> {
        let _ = request;
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Removes a bitmap from what the image stores, durably. One that isn't stored yet is no error.
    async fn remove_bitmap(self: Arc<Self>, request: Request, name: String) -> Result<()> {
        let _ = (request, name);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// What `info` shows.
    async fn info(self: Arc<Self>, request: Request) -> Result<ImageInfo> {
        let _ = request;
        Ok(ImageInfo::default())
    }

    /// Changes options of an open image. The node is drained. All or nothing.
    async fn reopen(self: Arc<Self>, request: Request, changes: Reopen) -> Result<()> {
        let _ = (request, changes);
        Err(Error::from_kind(ErrorKind::NotSupported))
    }

    /// Something happens in a driver above this one, which goes on when this returns. Only with
    /// [`Capabilities::DEBUG_EVENTS`].
    async fn debug_event(self: Arc<Self>, event: DebugEvent) {
        let _ = event;
    }

    /// Last call: writes back everything and marks the image clean. The node is drained. After an error the driver
    /// is closed all the same.
    async fn close(self: Arc<Self>, request: Request) -> Result<()>;

    /// Counters of this driver that prove that something happened (frees deferred by pins, copies on write,
    /// evictions, …), by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// For tests: from now on tells `watch` what happens to the space in its file. False when the driver can't, and then
    /// its books aren't covered by what a simulation checks at every step.
    #[doc(hidden)]
    fn watch_space(&self, watch: Arc<dyn crate::space::SpaceWatch>) -> bool {
        let _ = watch;
        false
    }

    /// For drivers that know each other (copy-range between files, a job and its filter).
    fn as_any(&self) -> &dyn Any;
}

/// The rules of the digest of block semantics, section 3, by role.
pub fn default_child_permissions(
    role: ChildRole,
    parents: PermissionSet,
    read_only: bool,
) -> PermissionSet {
    let mut used = parents.used;
    let mut shared = parents.shared;
    match role {
        ChildRole::Filtered => {}
        ChildRole::DataFile => {
            if used.contains(Permissions::WRITE_UNCHANGED) {
                used |= Permissions::WRITE;
            }
            if used.contains(Permissions::WRITE) {
                used |= Permissions::RESIZE;
            }
            shared -= Permissions::RESIZE;
        }
        ChildRole::File => {
            used |= Permissions::CONSISTENT_READ;
            if !read_only {
                used |= Permissions::WRITE | Permissions::RESIZE;
            } else {
                used -= Permissions::WRITE | Permissions::WRITE_UNCHANGED | Permissions::RESIZE;
            }
            shared -= Permissions::WRITE | Permissions::RESIZE;
        }
        ChildRole::Backing => {
            let parent_shares_write = shared.contains(Permissions::WRITE);
            used &= Permissions::CONSISTENT_READ;
            shared = Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
            if parent_shares_write {
                shared |= Permissions::WRITE | Permissions::RESIZE;
            }
        }
        ChildRole::Target => {
            used = Permissions::WRITE;
            shared = Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
        }
    }
    PermissionSet { used, shared }
}
