//! `blklogwrites`: keeps a log of everything that is written to a node, in the order in which it completed, in the format
//! of `write_log`. Replaying any number of its entries onto an empty file gives what a crash at that moment could have
//! left.
//!
//! An entry is logged after its request has completed, and a flush after everything that completed before it. The
//! superblock counts entries that are wholly in the log only.

use std::{
    any::Any,
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    Error, Result,
    buffer::{IoBuf, IoBufMut},
    driver::{
        BlockDriver, Capabilities, ChildRole, DriverKind, Reopen, Truncate,
        default_child_permissions,
    },
    flags::{PermissionSet, Permissions, RequestFlags},
    limits::Limits,
    node::Edges,
    options::{Number, Options, Size, Switch},
    registry::{DriverFactory, OpenContext, Opened},
    request::{Child, Request},
    status::DriverStatus,
};
use parking_lot::Mutex;
use serde::Deserialize;

use super::{
    pass,
    write_log::{EntryFlags, description, is_sector_size, parse_superblock, superblock},
};

const DEFAULT_SECTOR: u64 = 512;
const DEFAULT_INTERVAL: u64 = 4096;

/// Where the log stands.
struct Position {
    /// Where the next entry goes, in bytes.
    end: u64,
    /// The number of the next entry.
    next: u64,
    /// So many entries from the first on are in the log.
    complete: u64,
    /// Later ones that are, too.
    done: BTreeSet<u64>,
    /// What the superblock says, or is about to say.
    recorded: u64,
}

/// A node that logs what is written to it.
pub struct Blklogwrites {
    child: Capabilities,
    read_only: AtomicBool,
    sector: u64,
    interval: u64,
    position: Mutex<Position>,
    /// One superblock at a time, so that an older one never lands on a newer.
    superblock: futures::lock::Mutex<()>,
}

fn log(request: &Request) -> Result<&Child> {
    request
        .child(ChildRole::Target)
        .ok_or_else(|| Error::invalid("A block device must be specified for \"log\""))
}

/// What follows an entry's description.
enum Content {
    Data(IoBuf),
    Zeroes,
    Nothing,
}

impl Blklogwrites {
    /// Appends an entry, and a superblock when it is time.
    async fn append(
        &self,
        request: &Request,
        offset: u64,
        len: u64,
        flags: EntryFlags,
        content: Content,
    ) -> Result<()> {
        let log = log(request)?;
        let stored = match content {
            Content::Nothing => 0,
            _ => len,
        };
        let (index, at) = {
            let mut position = self.position.lock();
            let (index, at) = (position.next, position.end);
            position.next += 1;
            position.end += self.sector + stored;
            (index, at)
        };
        let (sector, sectors) = (offset / self.sector, len / self.sector);
        let head = IoBuf::from(description(sector, sectors, flags, self.sector));
        let written = async {
            match content {
                Content::Nothing => log.write(at, head, RequestFlags::empty()).await,
                Content::Data(data) => {
                    let mut all = head;
                    all.append(data);
                    log.write(at, all, RequestFlags::empty()).await
                }
                Content::Zeroes => {
                    log.write(at, head, RequestFlags::empty()).await?;
                    log.write_zeroes(at + self.sector, len, RequestFlags::empty())
                        .await
                }
            }
        }
        .await;
        written.map_err(|error| error.context("blklogwrites: the log"))?;
        let due = {
            let mut position = self.position.lock();
            position.done.insert(index);
            let mut complete = position.complete;
            while position.done.remove(&complete) {
                complete += 1;
            }
            position.complete = complete;
            position.complete - position.recorded >= self.interval
        };
        if due {
            self.record(request).await?;
        }
        Ok(())
    }

    /// Writes the superblock, if it says too little.
    async fn record(&self, request: &Request) -> Result<()> {
        let _turn = self.superblock.lock().await;
        let complete = {
            let position = self.position.lock();
            if position.recorded == position.complete {
                return Ok(());
            }
            position.complete
        };
        let bytes = superblock(complete, self.sector);
        log(request)?
            .write(0, bytes, RequestFlags::empty())
            .await
            .map_err(|error| error.context("blklogwrites: the log"))?;
        self.position.lock().recorded = complete;
        Ok(())
    }
}

#[async_trait]
impl BlockDriver for Blklogwrites {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        // The order of overlapping writes in the log has to be the order in which they took effect.
        let all = pass::capabilities(self.child, self.read_only.load(Ordering::Acquire));
        all | Capabilities::SERIALISE_WRITES
    }

    fn length(&self, edges: &Edges) -> u64 {
        pass::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let own = Limits {
            request_alignment: self.sector,
            ..Limits::default()
        };
        pass::limits(edges, own)
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        if role == ChildRole::Target {
            let used = Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE;
            return PermissionSet::new(used, Permissions::CONSISTENT_READ);
        }
        default_child_permissions(role, parents, self.read_only.load(Ordering::Acquire))
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let file = request.file()?;
        // The last sector may reach beyond the end of the file.
        let inside = file.length().saturating_sub(offset).min(buf.len() as u64) as usize;
        buf.split_off(inside).fill(0);
        if buf.is_empty() {
            return Ok(());
        }
        file.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let len = buf.len() as u64;
        request.file()?.write(offset, buf.clone(), flags).await?;
        let kind = entry_flags(flags);
        self.append(&request, offset, len, kind, Content::Data(buf))
            .await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        request.file()?.write_zeroes(offset, len, flags).await?;
        let kind = entry_flags(flags);
        self.append(&request, offset, len, kind, Content::Zeroes)
            .await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        request.file()?.discard(offset, len).await?;
        self.append(&request, offset, len, EntryFlags::DISCARD, Content::Nothing)
            .await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await?;
        self.append(&request, 0, 0, EntryFlags::FLUSH, Content::Nothing)
            .await?;
        self.record(&request).await?;
        log(&request)?.flush().await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        request.file()?.truncate(length, how).await
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(pass::status(offset, len))
    }

    async fn reopen(self: Arc<Self>, _request: Request, changes: Reopen) -> Result<()> {
        if let Some(read_only) = pass::reopen(&changes)? {
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        self.record(&request).await?;
        log(&request)?.flush().await
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("blklogwrites-entries", self.position.lock().complete)]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn entry_flags(flags: RequestFlags) -> EntryFlags {
    if flags.contains(RequestFlags::FUA) {
        EntryFlags::FUA
    } else {
        EntryFlags::empty()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct BlklogwritesOptions {
    log_sector_size: Option<Size>,
    log_append: Switch,
    log_super_update_interval: Option<Number>,
}

/// Makes `blklogwrites` nodes, with the children `file` and `log` and the options `log-sector-size`, `log-append` and
/// `log-super-update-interval`.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlklogwritesFactory;

/// Where a log that is there ends: entries, sector size, end in bytes.
async fn find_end(log: &Child) -> Result<(u64, u64, u64)> {
    let head = log.read_padded(0, 512).await?;
    let (entries, size) = parse_superblock(&head)?;
    let mut at = size;
    for index in 0..entries {
        if at >= log.length() {
            return Err(
                Error::invalid("The write log ends within an entry").with_field(
                    "nr_entries",
                    entries,
                    format!("at most {index}, from what is there"),
                ),
            );
        }
        let head = log.read_padded(at, 32).await?;
        let number = |at: usize| {
            let bytes = head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let (sectors, flags) = (number(8), EntryFlags::from_bits_truncate(number(16)));
        let stored = if flags.contains(EntryFlags::DISCARD) {
            0
        } else {
            sectors
        };
        at = stored
            .checked_add(1)
            .and_then(|sectors| sectors.checked_mul(size))
            .and_then(|len| at.checked_add(len))
            .ok_or_else(|| Error::invalid("An entry of the write log is too long"))?;
    }
    Ok((entries, size, at))
}

#[async_trait]
impl DriverFactory for BlklogwritesFactory {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let mut log_context = context.clone();
        // The log is written whatever is done with the file.
        log_context.node.read_only = false;
        let log = pass::required(&log_context, &mut options, "log").await?;
        let options: BlklogwritesOptions = options.parse()?;
        let access = Child::unattached(log.clone());
        let (entries, sector, end) = if options.log_append.0 {
            if options.log_sector_size.is_some() {
                return Err(Error::invalid(
                    "log-append and log-sector-size are mutually exclusive",
                ));
            }
            find_end(&access).await?
        } else {
            let sector = options
                .log_sector_size
                .map_or(DEFAULT_SECTOR, |size| size.0);
            if !is_sector_size(sector) {
                return Err(Error::invalid(format!("Invalid log sector size {sector}"))
                    .with_field(
                        "log-sector-size",
                        sector,
                        "a power of two from 512 on, below 8M",
                    ));
            }
            let first = superblock(0, sector);
            access.write(0, first, RequestFlags::empty()).await?;
            (0, sector, sector)
        };
        let interval =
            match options.log_super_update_interval {
                None => DEFAULT_INTERVAL,
                Some(Number(0)) => {
                    return Err(Error::invalid("Invalid log superblock update interval 0")
                        .with_field("log-super-update-interval", 0, "1 and more"));
                }
                Some(number) => number.0,
            };
        let driver = Blklogwrites {
            child: file.driver().capabilities(),
            read_only: AtomicBool::new(context.node.read_only),
            sector,
            interval,
            position: Mutex::new(Position {
                end,
                next: entries,
                complete: entries,
                done: BTreeSet::new(),
                recorded: entries,
            }),
            superblock: futures::lock::Mutex::new(()),
        };
        Ok(Opened {
            driver: Arc::new(driver),
            edges: vec![
                (ChildRole::Filtered, "file".to_owned(), file),
                (ChildRole::Target, "log".to_owned(), log),
            ],
        })
    }
}
