//! An open file or device: its descriptor, how it was opened, and what its file system turned out not to support.
//! No I/O beyond what opening takes.

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Deref,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    sync::atomic::{AtomicBool, Ordering},
};

use block_core::{
    buffer::{Buffer, IoBufMut},
    error::{Error, ErrorKind, Operation, Result},
};

use crate::{
    fd_sets::FdSets,
    known_data::KnownData,
    sys::{self, AccessMode},
};

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    Block,
    Character,
}

/// Something that was found out about a file system: that it doesn't support a call, for one, which isn't worth trying
/// again then.
#[derive(Debug, Default)]
pub(crate) struct Known(AtomicBool);

impl Known {
    #[inline]
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Remembers that `result` was a refusal, if it was one.
    pub(crate) fn note<T>(&self, result: &io::Result<T>) {
        if let Err(error) = result
            && is_unsupported(error)
        {
            self.set();
        }
    }
}

/// Whether an error means that the file system or device can't do this at all.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

/// All that a file system may refuse.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    pub(crate) nowait_read: Known,
    pub(crate) nowait_write: Known,
    pub(crate) dsync: Known,
    pub(crate) punch_hole: Known,
    pub(crate) zero_range: Known,
    pub(crate) discard: Known,
    pub(crate) zero_out: Known,
    pub(crate) seek_data: Known,
    pub(crate) clone_range: Known,
    pub(crate) copy_range: Known,
}

/// How a file is to be opened.
#[derive(Debug, Clone)]
pub(crate) struct OpenHow {
    /// As the user wrote it, without `file:`.
    pub(crate) path: String,
    /// For `host_device`.
    pub(crate) device: bool,
    pub(crate) read_only: bool,
    pub(crate) auto_read_only: bool,
    /// O_DIRECT.
    pub(crate) direct: bool,
}

/// The file.
#[derive(Debug)]
pub(crate) struct OpenFile {
    file: File,
    kind: FileKind,
    writable: bool,
    direct: bool,
    /// What offsets and lengths must be multiples of.
    offset_alignment: u64,
    /// What addresses must be multiples of.
    memory_alignment: usize,
    /// The file system's block size.
    block_size: u64,
    identity: (u64, u64),
    pub(crate) refusals: Refusals,
    pub(crate) known_data: KnownData,
    /// Buffered writes with RWF_NOWAIT are known to work.
    pub(crate) nowait_write_works: Known,
}

/// The reason as qemu gives it, with kind, file and cause.
pub(crate) fn open_error(path: &str, error: io::Error) -> Error {
    Error::from(error)
        .context(format_args!("Could not open '{path}'"))
        .with_file(path)
        .with_operation(Operation::Open, 0, 0)
}

impl OpenHow {
    fn driver(&self) -> &'static str {
        if self.device { "host_device" } else { "file" }
    }

    fn wrong_kind(&self) -> Error {
        let wanted = if self.device {
            "either a character or block device"
        } else {
            "a regular file"
        };
        Error::invalid(format!(
            "'{}' driver requires '{}' to be {wanted}",
            self.driver(),
            self.path
        ))
        .with_file(&self.path)
        .with_operation(Operation::Open, 0, 0)
    }

    fn check_kind(&self, kind: Option<FileKind>) -> Result<FileKind> {
        match kind {
            Some(kind) if (kind == FileKind::Regular) != self.device => Ok(kind),
            _ => Err(self.wrong_kind()),
        }
    }

    /// Opens the file. Blocks.
    pub(crate) fn open(&self, sets: &FdSets) -> Result<OpenFile> {
        let open = |writable: bool| -> Result<io::Result<File>> {
            if let Some(set) = FdSets::parse(&self.path) {
                return Ok(sets.duplicate(set?, writable));
            }
            // Looked at before it is opened: opening a pipe may block for ever, opening a tape may rewind it.
            match fs::metadata(&self.path) {
                Ok(metadata) => drop(self.check_kind(kind_of(&metadata))?),
                Err(error) => return Ok(Err(error)),
            }
            Ok(open_path(&self.path, writable, self.direct))
        };
        let mut writable = !self.read_only;
        let mut file = open(writable)?;
        if let Err(error) = &file
            && writable
            && self.auto_read_only
            && matches!(
                error.raw_os_error(),
                Some(libc::EACCES | libc::EROFS | libc::EPERM)
            )
        {
            writable = false;
            file = open(false)?;
        }
        let file = file.map_err(|error| self.explain(error))?;
        self.adopt(file, writable)
    }

    fn explain(&self, error: io::Error) -> Error {
        if self.direct && error.raw_os_error() == Some(libc::EINVAL) {
            return Error::invalid(format!(
                "Could not open '{}': filesystem does not support O_DIRECT",
                self.path
            ))
            .with_file(&self.path)
            .with_operation(Operation::Open, 0, 0)
            .with_source(error);
        }
        open_error(&self.path, error)
    }

    /// Makes an open descriptor one of ours.
    pub(crate) fn adopt(&self, file: File, writable: bool) -> Result<OpenFile> {
        let fail = |error| self.explain(error);
        let metadata = file.metadata().map_err(fail)?;
        let kind = self.check_kind(kind_of(&metadata))?;
        sys::set_direct(file.as_fd(), self.direct).map_err(fail)?;
        let block_size = metadata.blksize().clamp(512, 1 << 20);
        let sector = match kind {
            FileKind::Block => {
                u64::from(sys::logical_sector_size(file.as_fd()).map_err(fail)?).max(1)
            }
            _ => 1,
        };
        let (offset_alignment, memory_alignment) = if self.direct {
            let (offset, memory) = probe_direct(&file, sector.max(512));
            (offset.max(sector), memory)
        } else {
            (sector, 1)
        };
        if !offset_alignment.is_power_of_two() || !memory_alignment.is_power_of_two() {
            return Err(Error::unsupported(format!(
                "Could not find working O_DIRECT alignment for '{}'",
                self.path
            ))
            .with_file(&self.path)
            .with_field("alignment", offset_alignment, "a power of two"));
        }
        Ok(OpenFile {
            kind,
            writable,
            direct: self.direct,
            offset_alignment,
            memory_alignment,
            block_size,
            identity: (metadata.dev(), metadata.ino()),
            refusals: probe_nowait(&file, self.direct),
            known_data: KnownData::default(),
            nowait_write_works: Known::default(),
            file,
        })
    }

    /// Opens the very same file once more, by way of its open descriptor: whatever has been renamed or replaced
    /// since, this is the file that was meant.
    pub(crate) fn open_again(&self, old: &OpenFile, sets: &FdSets) -> Result<OpenFile> {
        let link = format!("/proc/self/fd/{}", old.as_raw_fd());
        let writable = !self.read_only;
        let opened = match open_path(&link, writable, self.direct) {
            Ok(file) => self.adopt(file, writable),
            // No /proc, or the rights that the descriptor has are more than ours.
            Err(error) => match self.open(sets) {
                Ok(file) => Ok(file),
                Err(_) => Err(self.explain(error)),
            },
        }?;
        if opened.identity != old.identity {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "Could not reopen '{}': another file has taken its place",
                    self.path
                ),
            )
            .with_file(&self.path)
            .with_operation(Operation::Reopen, 0, 0));
        }
        Ok(opened)
    }
}

fn kind_of(metadata: &fs::Metadata) -> Option<FileKind> {
    let kind = metadata.file_type();
    if kind.is_file() {
        Some(FileKind::Regular)
    } else if kind.is_block_device() {
        Some(FileKind::Block)
    } else if kind.is_char_device() {
        Some(FileKind::Character)
    } else {
        None
    }
}

fn open_path(path: &str, writable: bool, direct: bool) -> io::Result<File> {
    let mut flags = libc::O_NOCTTY;
    if direct {
        flags |= libc::O_DIRECT;
    }
    OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(flags)
        .open(path)
}

/// Finds out whether buffered reads know RWF_NOWAIT here.
fn probe_nowait(file: &File, direct: bool) -> Refusals {
    let refusals = Refusals::default();
    if !direct {
        let mut byte = IoBufMut::from(Buffer::with_alignment(1, 1));
        refusals
            .nowait_read
            .note(&sys::read_at(file.as_fd(), &mut byte, 0, 0, sys::NOWAIT));
    }
    refusals
}

/// Offset and memory alignment that O_DIRECT asks for here, in bytes: what the kernel says, or else what reading finds.
/// `least` is what it can't be less than.
fn probe_direct(file: &File, least: u64) -> (u64, usize) {
    if let Some(told) = sys::direct_alignment(file.as_fd()) {
        return (u64::from(told.offset), (told.memory as usize).max(1));
    }
    const LARGEST: usize = 4096;
    let try_read = |len: usize, skip: usize| -> Option<usize> {
        let (_lent, mut whole) = Buffer::try_with_alignment(len + skip, LARGEST).ok()?.lend();
        let mut buf = whole.split_off(skip);
        match sys::read_at(file.as_fd(), &mut buf, 0, 0, 0) {
            Ok(read) => Some(read),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            // Whatever it is, alignment it isn't.
            Err(_) => Some(0),
        }
    };
    let mut offset = least;
    while offset < LARGEST as u64 && try_read(offset as usize, 0).is_none() {
        offset *= 2;
    }
    // An empty file says yes to everything, so that its answer counts for nothing.
    if matches!(try_read(offset as usize, 0), Some(0)) {
        return (LARGEST as u64, LARGEST);
    }
    let mut memory = 512;
    while memory < LARGEST && try_read(offset as usize, memory).is_none() {
        memory *= 2;
    }
    (offset, memory)
}

impl OpenFile {
    /// Something that stays pending for as long as a test wants, a pipe for one.
    #[cfg(test)]
    pub(crate) fn for_tests(file: File) -> Self {
        Self {
            file,
            kind: FileKind::Regular,
            writable: true,
            direct: false,
            offset_alignment: 1,
            memory_alignment: 1,
            block_size: 4096,
            identity: (0, 0),
            refusals: Refusals::default(),
            known_data: KnownData::default(),
            nowait_write_works: Known::default(),
        }
    }

    pub(crate) fn kind(&self) -> FileKind {
        self.kind
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.kind == FileKind::Regular
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(crate) fn offset_alignment(&self) -> u64 {
        self.offset_alignment
    }

    pub(crate) fn memory_alignment(&self) -> usize {
        self.memory_alignment
    }

    pub(crate) fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// A partial transfer is a multiple of this, unless it ended at the end of the file.
    pub(crate) fn transfer_unit(&self) -> usize {
        if self.direct {
            self.offset_alignment as usize
        } else {
            1
        }
    }

    /// Whether reads complete in the ring by themselves. Where they don't, io_uring would hand them to threads of its
    /// own, and the pool's do it with fewer hops.
    pub(crate) fn reads_are_asynchronous(&self) -> bool {
        self.direct || !self.refusals.nowait_read.is_set()
    }

    /// The same for writes.
    pub(crate) fn writes_are_asynchronous(&self) -> bool {
        self.direct || self.nowait_write_works.is_set()
    }

    /// The length now, in bytes. Blocks, if at all, on metadata only.
    pub(crate) fn query_length(&self) -> io::Result<u64> {
        match self.kind {
            FileKind::Regular => self.file.metadata().map(|metadata| metadata.len()),
            FileKind::Block => sys::device_size(self.as_fd()),
            FileKind::Character => Ok(0),
        }
    }

    /// Bytes that the file system has allocated.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        self.file
            .metadata()
            .map(|metadata| metadata.blocks().saturating_mul(512))
    }

    /// Whether the descriptor may be written to, whatever it was asked for.
    pub(crate) fn can_write(file: &File) -> io::Result<bool> {
        sys::access_mode(file.as_fd()).map(|mode| mode == AccessMode::ReadWrite)
    }
}

impl Deref for OpenFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for OpenFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
