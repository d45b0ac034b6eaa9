//! Guest I/O on one hosted sparse extent: looking grains up, reading, writing in place, allocating, zeroing, discarding.
//!
//! What keeps it right (design, section 4):
//!
//! - No lock is held while data moves. A grain that is being allocated is claimed; who finds it claimed waits and reads
//!   the mapping again.
//! - A grain is written whole (with what the parent has, or zeroes) before it is linked, and the table that links it
//!   is written after a barrier.
//! - **A place in the file never changes its owner.** A linked grain stays linked to its guest grain for ever: zero writes and
//!   discards happen in place, and no table entry ever goes from data to anything else. So a late write or a late
//!   punch can't hit another guest range, and a mapping needs no pin: there is no free that could wait for it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use block_core::{
    Error, ErrorKind, Result,
    buffer::{IoBuf, IoBufMut},
    flags::RequestFlags,
    request::{Child, Request},
    status::DriverStatus,
};

use crate::{
    claims::{Claim, Claimed, Claims},
    layout::{Entry, Geometry, Grain, HostSector},
    space::Space,
    tables::{Table, Tables},
};

/// The most that is allocated in one go, in bytes (one grain at least).
const MAX_ALLOCATION: u64 = 32 << 20;
/// The largest part of a grain that is copied through one buffer, in bytes.
const COPY_CHUNK: u64 = 1 << 20;

/// One sparse extent.
pub(crate) struct Sparse {
    pub geometry: Geometry,
    pub tables: Tables,
    claims: Claims,
    space: Space,
    /// The image names a parent: what is unallocated isn't known to be zero, whatever the graph has below.
    has_parent: bool,
    allocated: AtomicU64,
    copied: AtomicU64,
    claim_waits: AtomicU64,
}

/// The start of a range, of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// What it is made of. For data, where the first grain lies; the others follow it in the file.
    pub entry: Entry,
    /// For how many bytes.
    pub len: u64,
    /// Where its first byte is in the file; only for data.
    pub host: u64,
}

impl Sparse {
    pub(crate) async fn open(
        geometry: Geometry,
        descriptor: (u64, u64),
        has_parent: bool,
        file: &Child,
    ) -> Result<Self> {
        let sectors = |bytes: u64| bytes.div_ceil(crate::layout::SECTOR);
        let fixed = vec![
            (0, 1),
            (descriptor.0 / crate::layout::SECTOR, sectors(descriptor.1)),
        ];
        let tables = Tables::open(geometry, file, fixed).await?;
        let metadata_end = tables.reserved().end().max(geometry.overhead);
        let space = Space::new(geometry.grain_sectors, file.length(), metadata_end);
        Ok(Self {
            geometry,
            tables,
            claims: Claims::default(),
            space,
            has_parent,
            allocated: AtomicU64::new(0),
            copied: AtomicU64::new(0),
            claim_waits: AtomicU64::new(0),
        })
    }

    /// Counters, by name.
    pub(crate) fn counters(&self) -> Vec<(&'static str, u64)> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (written, evicted) = self.tables.counters();
        vec![
            ("grains-allocated", get(&self.allocated)),
            ("copies-on-write", get(&self.copied)),
            ("claim-waits", get(&self.claim_waits)),
            ("tables-written", written),
            ("tables-evicted", evicted),
        ]
    }

    /// The run at `offset` as the table says, no further than the table and `len` bytes reach.
    fn run_in(&self, table: &Table, offset: u64, len: u64) -> Result<Run> {
        let geometry = &self.geometry;
        let first = geometry.grain(offset);
        let (_, slot) = geometry.table_and_slot(first);
        let inside = offset - geometry.guest_offset(first);
        let entry = self.tables.decode(table.raw(slot))?;
        let mut known = geometry.grain_bytes - inside;
        let mut expected = entry;
        let mut slot = slot + 1;
        while known < len && slot < geometry.gt_entries as usize {
            if let Entry::Data(HostSector(sector)) = expected {
                match sector.checked_add(geometry.grain_sectors) {
                    Some(next) => expected = Entry::Data(HostSector(next)),
                    None => break,
                }
            }
            if self.tables.decode(table.raw(slot)).ok() != Some(expected) {
                break;
            }
            known += geometry.grain_bytes;
            slot += 1;
        }
        let host = match entry {
            Entry::Data(sector) => sector.bytes() + inside,
            _ => 0,
        };
        Ok(Run {
            entry,
            len: known.min(len),
            host,
        })
    }

    /// The run where there is no grain table.
    fn run_without_table(&self, offset: u64, len: u64) -> Run {
        let geometry = &self.geometry;
        let (table, _) = geometry.table_and_slot(geometry.grain(offset));
        let end = geometry.guest_offset(geometry.first_grain(table + 1));
        Run {
            entry: Entry::Unallocated,
            len: len.min(end - offset),
            host: 0,
        }
    }

    /// The run at `offset`, if it takes no I/O to tell. Takes no lock.
    pub(crate) fn cached_run(&self, offset: u64, len: u64) -> Option<Run> {
        let (index, _) = self.geometry.table_and_slot(self.geometry.grain(offset));
        if !self.tables.exists(index) {
            return Some(self.run_without_table(offset, len));
        }
        let table = self.tables.cached(index)?;
        let table = table.as_ref()?;
        // A damaged entry is reported by the long way.
        self.run_in(table, offset, len).ok()
    }

    /// The run at `offset`, and the table that says so.
    pub(crate) async fn run(
        &self,
        file: &Child,
        offset: u64,
        len: u64,
    ) -> Result<(Run, Option<Arc<Table>>)> {
        let (index, _) = self.geometry.table_and_slot(self.geometry.grain(offset));
        if !self.tables.exists(index) {
            return Ok((self.run_without_table(offset, len), None));
        }
        let table = self.tables.load(file, index).await?;
        let run = self.run_in(&table, offset, len)?;
        Ok((run, Some(table)))
    }

    /// Fills `buf`. `parent_ok` says whether the backing child may be read.
    pub(crate) async fn read(
        &self,
        request: &Request,
        offset: u64,
        mut buf: IoBufMut,
        parent_ok: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let file = request.file()?;
        let mut at = offset;
        while !buf.is_empty() {
            let (run, _) = self.run(file, at, buf.len() as u64).await?;
            let mut piece = buf.split_to(run.len as usize);
            match run.entry {
                Entry::Data(_) => file.read(run.host, piece).await?,
                Entry::Zero => piece.fill(0),
                Entry::Unallocated => {
                    parent_ok()?;
                    request.read_backing(at, piece).await?;
                }
            }
            at += run.len;
        }
        Ok(())
    }

    /// Writes `buf`, in place where there is a grain and into new grains elsewhere.
    pub(crate) async fn write(
        &self,
        request: &Request,
        offset: u64,
        mut buf: IoBuf,
        parent_ok: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let file = request.file()?;
        let mut at = offset;
        while !buf.is_empty() {
            let (run, table) = self.run(file, at, buf.len() as u64).await?;
            if run.entry.is_data() {
                let piece = buf.split_to(run.len as usize);
                file.write(run.host, piece, RequestFlags::empty()).await?;
                at += run.len;
                continue;
            }
            let table = table.ok_or_else(|| no_table(at))?;
            let Some((claim, run)) = self.claim(&table, at, run.len).await? else {
                continue;
            };
            let piece = buf.split_to(run.len as usize);
            let new = NewGrains {
                sparse: self,
                request,
                file,
                table: &table,
                run,
                offset: at,
            };
            new.write(claim, piece, &parent_ok).await?;
            at += run.len;
        }
        Ok(())
    }

    /// Claims the grains of an unmapped run at `offset`, or waits for whoever has the first one. `None`: look again.
    /// What is claimed may be shorter than `len`; the run given back holds as long as the claim does.
    async fn claim(&self, table: &Table, offset: u64, len: u64) -> Result<Option<(Claim, Run)>> {
        let geometry = &self.geometry;
        let first = geometry.grain(offset);
        let last = geometry.grain(offset + len - 1);
        let most = (MAX_ALLOCATION / geometry.grain_bytes).max(1);
        let count = (last.0 - first.0 + 1).min(most);
        match self.claims.claim(first, count) {
            Claimed::Wait(free) => {
                self.claim_waits.fetch_add(1, Ordering::Relaxed);
                // Both outcomes mean that the claim ended.
                let _ = free.await;
                Ok(None)
            }
            Claimed::Mine(mut claim) => {
                let end = geometry.guest_offset(Grain(first.0 + claim.count()));
                // The mapping that made us claim was read before the claim.
                let run = self.run_in(table, offset, len.min(end - offset))?;
                if run.entry.is_data() {
                    return Ok(None);
                }
                let last = geometry.grain(offset + run.len - 1);
                claim.shrink(last.0 - first.0 + 1);
                Ok(Some((claim, run)))
            }
        }
    }

    /// Makes the range read as zeroes, or says ENOTSUP with nothing changed.
    pub(crate) async fn write_zeroes(
        &self,
        request: &Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let file = request.file()?;
        let end = offset + len;
        let hides_something = self.has_parent || request.backing().is_some();
        // A dry run: all or nothing.
        let mut at = offset;
        while at < end {
            let (run, _) = self.run(file, at, end - at).await?;
            if run.entry == Entry::Unallocated && hides_something && !self.can_mark(at, run.len) {
                return Err(Error::from_kind(ErrorKind::NotSupported));
            }
            at += run.len;
        }
        at = offset;
        while at < end {
            let (run, table) = self.run(file, at, end - at).await?;
            match run.entry {
                Entry::Data(_) => file.write_zeroes(run.host, run.len, flags).await?,
                Entry::Zero => {}
                Entry::Unallocated if !hides_something => {}
                Entry::Unallocated => {
                    let table = table.ok_or_else(|| no_table(at))?;
                    let Some((claim, run)) = self.claim(&table, at, run.len).await? else {
                        continue;
                    };
                    if run.entry == Entry::Unallocated {
                        let (_, slot) = self.geometry.table_and_slot(self.geometry.grain(at));
                        for slot in slot..slot + claim.count() as usize {
                            self.tables.link(&table, slot, 0, Entry::ZERO)?;
                        }
                    }
                    drop(claim);
                    at += run.len;
                    continue;
                }
            }
            at += run.len;
        }
        Ok(())
    }

    /// Whether unallocated grains in the range can be marked as zero: whole ones, in an image that has such marks.
    fn can_mark(&self, offset: u64, len: u64) -> bool {
        let grain = self.geometry.grain_bytes;
        let end = offset + len;
        let table = self.geometry.table_and_slot(self.geometry.grain(offset)).0;
        self.geometry.zeroed_grains
            && self.tables.exists(table)
            && offset.is_multiple_of(grain)
            && (end.is_multiple_of(grain) || end == self.geometry.length)
    }

    /// Passes a discard on to the places of those grains that have one. They keep them.
    pub(crate) async fn discard(&self, request: &Request, offset: u64, len: u64) -> Result<()> {
        let file = request.file()?;
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let (run, _) = self.run(file, at, end - at).await?;
            if run.entry.is_data() {
                file.discard(run.host, run.len).await?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// What the start of the range is made of.
    pub(crate) async fn status(
        &self,
        request: &Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let (run, _) = self.run(request.file()?, offset, len).await?;
        Ok(match run.entry {
            Entry::Data(_) => DriverStatus::data_at(run.len, run.host),
            Entry::Zero => DriverStatus::zero(run.len),
            Entry::Unallocated => DriverStatus::unallocated(run.len),
        })
    }

    /// Makes everything durable: tables behind a barrier, then all of it.
    pub(crate) async fn flush(&self, file: &Child) -> Result<()> {
        self.tables.write_back(file).await?;
        file.flush().await
    }
}

fn no_table(offset: u64) -> Error {
    Error::new(
        ErrorKind::NotSupported,
        format!("no grain table for offset {offset}: such images can only be read"),
    )
}

/// Unmapped grains that the request has claimed and is about to give a place.
struct NewGrains<'a> {
    sparse: &'a Sparse,
    request: &'a Request,
    file: &'a Child,
    table: &'a Arc<Table>,
    /// Nothing but unmapped grains of one kind.
    run: Run,
    /// Where the run begins on the virtual disk.
    offset: u64,
}

impl NewGrains<'_> {
    /// Writes the grains whole, then links them. The claim is let go of after that, whatever happens.
    async fn write(
        &self,
        claim: Claim,
        data: IoBuf,
        parent_ok: &impl Fn() -> Result<()>,
    ) -> Result<()> {
        let geometry = &self.sparse.geometry;
        let first = geometry.grain(self.offset);
        let start = geometry.guest_offset(first);
        let data_end = self.offset + self.run.len;
        let end = start + claim.count() * geometry.grain_bytes;
        let taken = self.sparse.space.take(claim.count())?;
        let host = taken.first().bytes();

        let from_parent = self.run.entry == Entry::Unallocated && self.request.backing().is_some();
        let head = self.offset - start;
        let tail = end - data_end;
        if from_parent && head + tail > 0 {
            parent_ok()?;
            self.sparse.copied.fetch_add(1, Ordering::Relaxed);
        }
        let mut whole = IoBuf::new();
        let mut at = host;
        if head > COPY_CHUNK {
            self.fill(host, start, head, from_parent).await?;
            at += head;
        } else if head > 0 {
            whole.append(self.fetch(start, head, from_parent).await?);
        }
        whole.append(data);
        if tail > COPY_CHUNK {
            self.fill(host + (data_end - start), data_end, tail, from_parent)
                .await?;
        } else if tail > 0 {
            whole.append(self.fetch(data_end, tail, from_parent).await?);
        }
        self.file.write(at, whole, RequestFlags::empty()).await?;

        let HostSector(mut sector) = taken.first();
        taken.keep();
        let (_, slot) = geometry.table_and_slot(first);
        let old = if self.run.entry == Entry::Zero {
            Entry::ZERO
        } else {
            0
        };
        for slot in slot..slot + claim.count() as usize {
            self.sparse.tables.link(self.table, slot, old, sector)?;
            // `Space::take` made sure that all of them fit.
            sector = sector.wrapping_add(geometry.grain_sectors);
        }
        self.sparse
            .allocated
            .fetch_add(claim.count(), Ordering::Relaxed);
        drop(claim);
        Ok(())
    }

    /// What was visible at `guest` before, a short range; zeroes beyond the end of the disk.
    async fn fetch(&self, guest: u64, len: u64, from_parent: bool) -> Result<IoBuf> {
        let visible = self.sparse.geometry.length.saturating_sub(guest).min(len);
        if !from_parent || visible == 0 {
            return Ok(IoBuf::zeroes(len as usize));
        }
        let (lent, buf) = block_core::buffer::Buffer::try_new(visible as usize)?.lend();
        self.request.read_backing(guest, buf).await?;
        let buffer = lent
            .reclaim()
            .map_err(|_| Error::io("a driver kept a part of a read buffer"))?;
        let mut fetched = IoBuf::from(buffer);
        if visible < len {
            fetched.append(IoBuf::zeroes((len - visible) as usize));
        }
        Ok(fetched)
    }

    /// The same for a long range, straight into the file.
    async fn fill(&self, host: u64, guest: u64, len: u64, from_parent: bool) -> Result<()> {
        if !from_parent {
            return self
                .file
                .write_zeroes(host, len, RequestFlags::empty())
                .await;
        }
        let mut done = 0;
        while done < len {
            let step = (len - done).min(COPY_CHUNK);
            let piece = self.fetch(guest + done, step, true).await?;
            self.file
                .write(host + done, piece, RequestFlags::empty())
                .await?;
            done += step;
        }
        Ok(())
    }
}
