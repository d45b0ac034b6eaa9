//! The grain directory and the cache of grain tables of one sparse extent.
//!
//! A table that is in memory is there as one object, whose entries are atomics: looking one up takes no lock. Entries
//! change in memory first. Dirty tables are written back in batches: what they refer to is made durable by a barrier
//! before, so that after a power cut no table refers to a grain whose data isn't there. A batch writes the primary
//! tables, then the redundant ones; it ends with the flush of whoever asked for it.
//!
//! No guest data is read or written here.

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::{ArcSwapOption, Guard};
use block_core::{
    Error, ErrorKind, Result,
    buffer::{Buffer, IoBuf},
    flags::RequestFlags,
    request::Child,
};
use futures::lock::Mutex as AsyncMutex;
use parking_lot::Mutex;

use crate::layout::{Entry, Geometry, HostSector, Reserved, SECTOR};

/// How many tables are kept (2 KiB each).
const MAX_RESIDENT: usize = 4096;
/// Slots per lazily made part of the slot array.
const PART: usize = 256;
const LOADERS: usize = 16;
/// The largest piece in which a directory is read.
const DIRECTORY_CHUNK: u64 = 1 << 20;

/// One grain table.
#[derive(Debug)]
pub(crate) struct Table {
    index: usize,
    entries: Box<[AtomicU32]>,
    /// Changed since it was last copied for write-back. Whoever sets it appends the table to `Tables::dirty`.
    dirty: AtomicBool,
}

impl Table {
    /// The raw entry.
    pub(crate) fn raw(&self, slot: usize) -> u32 {
        // Slots come from a division by the number of entries.
        self.entries
            .get(slot)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }
}

type Slot = ArcSwapOption<Table>;

/// A directory with its tables.
pub(crate) struct Tables {
    geometry: Geometry,
    gd: Vec<u32>,
    rgd: Vec<u32>,
    reserved: Reserved,
    slots: Vec<OnceLock<Box<[Slot]>>>,
    /// Held while a table is loaded or thrown out, by its number.
    loaders: [AsyncMutex<()>; LOADERS],
    /// Tables in memory, oldest first.
    resident: Mutex<VecDeque<usize>>,
    max_resident: usize,
    dirty: Mutex<Vec<Arc<Table>>>,
    /// One write-back at a time: an older copy of a table must not land on top of a newer one.
    write_back: AsyncMutex<()>,
    written: AtomicU64,
    evicted: AtomicU64,
}

impl Tables {
    /// Reads the directories. `fixed` are ranges of metadata (start and length in sectors) besides directories and tables.
    pub(crate) async fn open(
        geometry: Geometry,
        file: &Child,
        mut fixed: Vec<(u64, u64)>,
    ) -> Result<Self> {
        let gd = read_directory(&geometry, file, geometry.gd_offset)
            .await
            .map_err(|error| error.context("Could not read l1 table from extent"))?;
        let rgd = match geometry.rgd_offset {
            None => Vec::new(),
            Some(offset) => read_directory(&geometry, file, offset)
                .await
                .map_err(|error| error.context("Could not read l1 backup table from extent"))?,
        };
        let directory_sectors = (geometry.gd_entries as u64 * 4).div_ceil(SECTOR);
        fixed.push((geometry.gd_offset / SECTOR, directory_sectors));
        if let Some(offset) = geometry.rgd_offset {
            fixed.push((offset / SECTOR, directory_sectors));
        }
        let table_sectors = (geometry.table_bytes() as u64).div_ceil(SECTOR);
        fixed.reserve(gd.len() + rgd.len());
        fixed.extend(
            gd.iter()
                .chain(&rgd)
                .filter(|sector| **sector != 0)
                .map(|sector| (u64::from(*sector), table_sectors)),
        );
        let parts = geometry.gd_entries.div_ceil(PART);
        Ok(Self {
            geometry,
            gd,
            rgd,
            reserved: Reserved::new(fixed),
            slots: std::iter::repeat_with(OnceLock::new).take(parts).collect(),
            loaders: std::array::from_fn(|_| AsyncMutex::new(())),
            resident: Mutex::default(),
            max_resident: MAX_RESIDENT,
            dirty: Mutex::default(),
            write_back: AsyncMutex::new(()),
            written: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        })
    }

    /// Keeps fewer tables in memory.
    #[cfg(test)]
    pub(crate) fn limit_for_tests(&mut self, tables: usize) {
        self.max_resident = tables;
    }

    /// Where metadata is.
    pub(crate) const fn reserved(&self) -> &Reserved {
        &self.reserved
    }

    /// The sectors of the primary and the redundant table, 0 where there is none.
    pub(crate) fn places(&self, index: usize) -> (u32, u32) {
        let at = |directory: &[u32]| directory.get(index).copied().unwrap_or(0);
        (at(&self.gd), at(&self.rgd))
    }

    /// Tables written back, and thrown out of memory.
    pub(crate) fn counters(&self) -> (u64, u64) {
        (
            self.written.load(Ordering::Relaxed),
            self.evicted.load(Ordering::Relaxed),
        )
    }

    /// What a raw entry means, unless it points at metadata.
    pub(crate) fn decode(&self, raw: u32) -> Result<Entry> {
        let entry = Entry::decode(raw, self.geometry.zeroed_grains);
        if let Entry::Data(HostSector(sector)) = entry
            && self
                .reserved
                .overlaps(u64::from(sector), u64::from(self.geometry.grain_sectors))
        {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("grain at sector {sector} overlaps the image's metadata"),
            )
            .with_field(
                "grain table entry",
                sector,
                "a sector outside of header and tables",
            ));
        }
        Ok(entry)
    }

    fn slot(&self, index: usize) -> Option<&Slot> {
        let part = self.slots.get(index / PART)?;
        let part = part.get_or_init(|| std::iter::repeat_with(Slot::empty).take(PART).collect());
        part.get(index % PART)
    }

    /// The table, if it is in memory. Takes no lock.
    pub(crate) fn cached(&self, index: usize) -> Option<Guard<Option<Arc<Table>>>> {
        let part = self.slots.get(index / PART)?.get()?;
        let table = part.get(index % PART)?.load();
        if table.is_some() { Some(table) } else { None }
    }

    /// Whether there is a table at all; all its grains are unallocated when there is none.
    pub(crate) fn exists(&self, index: usize) -> bool {
        self.gd.get(index).is_some_and(|sector| *sector != 0)
    }

    /// The table, which exists, read from the file if it isn't in memory.
    pub(crate) async fn load(&self, file: &Child, index: usize) -> Result<Arc<Table>> {
        let slot = self
            .slot(index)
            .ok_or_else(|| Error::io("grain table number beyond the grain directory"))?;
        if let Some(table) = slot.load_full() {
            return Ok(table);
        }
        self.make_room(file, index).await?;
        let loading = self.loaders[index % LOADERS].lock().await;
        if let Some(table) = slot.load_full() {
            return Ok(table);
        }
        let (primary, _) = self.places(index);
        let bytes = self.read_table(file, primary).await?;
        let entries = bytes
            .chunks_exact(4)
            .map(|raw| AtomicU32::new(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])))
            .collect();
        let table = Arc::new(Table {
            index,
            entries,
            dirty: AtomicBool::new(false),
        });
        slot.store(Some(Arc::clone(&table)));
        drop(loading);
        self.resident.lock().push_back(index);
        Ok(table)
    }

    /// Reads a table as it stands in the file.
    pub(crate) async fn read_table(&self, file: &Child, sector: u32) -> Result<Buffer> {
        let at = HostSector(sector).bytes();
        let len = self.geometry.table_bytes();
        if at
            .checked_add(len as u64)
            .is_none_or(|end| end > file.length())
        {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("grain table at sector {sector} lies beyond the end of the file"),
            )
            .with_field(
                "grain directory entry",
                sector,
                "a sector inside of the file",
            ));
        }
        file.read_buffer(at, len).await
    }

    /// Throws old clean tables out until there is room for one more. When all are dirty they are written back first;
    /// tables that are in use at the moment stay, so that the bound may be exceeded by those.
    async fn make_room(&self, file: &Child, wanted: usize) -> Result<()> {
        for attempt in 0..2 {
            let excess = (self.resident.lock().len() + 1).saturating_sub(self.max_resident);
            if excess == 0 || self.throw_out(excess, wanted) >= excess {
                return Ok(());
            }
            if attempt == 0 {
                self.write_back(file).await?;
            }
        }
        Ok(())
    }

    fn throw_out(&self, excess: usize, wanted: usize) -> usize {
        let mut thrown = 0;
        let tries = self.resident.lock().len();
        for _ in 0..tries {
            if thrown == excess {
                break;
            }
            let Some(index) = self.resident.lock().pop_front() else {
                break;
            };
            if index != wanted && self.evict(index) {
                thrown += 1;
            } else {
                self.resident.lock().push_back(index);
            }
        }
        self.evicted.fetch_add(thrown as u64, Ordering::Relaxed);
        thrown
    }

    /// Throws a table out if it is clean and nobody has it.
    fn evict(&self, index: usize) -> bool {
        // While this is held nobody loads the table a second time.
        let Some(_loading) = self.loaders[index % LOADERS].try_lock() else {
            return false;
        };
        let Some(slot) = self.slot(index) else {
            return false;
        };
        // After the swap, those who looked it up without a lock are counted like everyone else.
        let Some(table) = slot.swap(None) else {
            return true;
        };
        if Arc::strong_count(&table) == 1 && !table.dirty.load(Ordering::SeqCst) {
            return true;
        }
        slot.store(Some(table));
        false
    }

    /// Changes an entry, in memory. The caller owns the grain's claim.
    ///
    /// # Errors
    /// When the entry isn't `old`: somebody else linked the grain, which the claim should have ruled out.
    pub(crate) fn link(&self, table: &Arc<Table>, slot: usize, old: u32, new: u32) -> Result<()> {
        let swapped = table.entries.get(slot).is_some_and(|entry| {
            entry
                .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        });
        if !swapped {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "grain table {} entry {slot} changed while it was claimed",
                    table.index
                ),
            ));
        }
        self.mark_dirty(table);
        Ok(())
    }

    fn mark_dirty(&self, table: &Arc<Table>) {
        if !table.dirty.swap(true, Ordering::SeqCst) {
            self.dirty.lock().push(Arc::clone(table));
        }
    }

    /// Writes back what was linked before the call. What is written is in the file, but durable only after the
    /// caller's flush. After an error everything is dirty as before.
    pub(crate) async fn write_back(&self, file: &Child) -> Result<()> {
        let _turn = self.write_back.lock().await;
        let mut tables = std::mem::take(&mut *self.dirty.lock());
        if tables.is_empty() {
            return Ok(());
        }
        tables.sort_unstable_by_key(|table| table.index);
        let copies: Vec<IoBuf> = tables
            .iter()
            .map(|table| {
                // Whoever changes an entry after this line marks the table dirty again.
                table.dirty.store(false, Ordering::SeqCst);
                let mut bytes = Buffer::new(self.geometry.table_bytes());
                for (raw, entry) in bytes.chunks_exact_mut(4).zip(&table.entries) {
                    raw.copy_from_slice(&entry.load(Ordering::SeqCst).to_le_bytes());
                }
                IoBuf::from(bytes)
            })
            .collect();
        let written = self.write_copies(file, &tables, &copies).await;
        if written.is_err() {
            for table in &tables {
                self.mark_dirty(table);
            }
        } else {
            self.written
                .fetch_add(tables.len() as u64, Ordering::Relaxed);
        }
        written
    }

    async fn write_copies(
        &self,
        file: &Child,
        tables: &[Arc<Table>],
        copies: &[IoBuf],
    ) -> Result<()> {
        // The grains that the copies refer to were written before they were linked: make them durable first.
        file.flush().await?;
        for directory in [&self.gd, &self.rgd] {
            let mut run: Option<(u64, IoBuf)> = None;
            for (table, copy) in tables.iter().zip(copies) {
                let sector = directory.get(table.index).copied().unwrap_or(0);
                if sector == 0 {
                    continue;
                }
                let at = HostSector(sector).bytes();
                match &mut run {
                    Some((start, buf)) if *start + buf.len() as u64 == at => {
                        buf.append(copy.clone());
                    }
                    _ => {
                        if let Some((start, buf)) = run.replace((at, copy.clone())) {
                            file.write(start, buf, RequestFlags::empty()).await?;
                        }
                    }
                }
            }
            if let Some((start, buf)) = run {
                file.write(start, buf, RequestFlags::empty()).await?;
            }
        }
        Ok(())
    }
}

async fn read_directory(geometry: &Geometry, file: &Child, offset: u64) -> Result<Vec<u32>> {
    let mut directory = Vec::new();
    directory
        .try_reserve_exact(geometry.gd_entries)
        .map_err(|_| Error::new(ErrorKind::OutOfMemory, "no memory for the grain directory"))?;
    // The geometry was checked: the directory lies inside of the file.
    let mut left = geometry.gd_entries as u64 * 4;
    let mut at = offset;
    while left > 0 {
        let len = left.min(DIRECTORY_CHUNK);
        let bytes = file.read_buffer(at, len as usize).await?;
        directory.extend(
            bytes
                .chunks_exact(4)
                .map(|raw| u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])),
        );
        (at, left) = (at + len, left - len);
    }
    Ok(directory)
}
