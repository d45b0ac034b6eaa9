//! The table of internal snapshots (digest, section 7): reads its entries, says what is wrong with them, and makes the
//! table that a repair puts in its place.
//!
//! Entries are read as far as the file has bytes for them, whatever the header claims. Their L1 tables are followed in
//! `mapping`.

use block_core::{
    buffer::Buffer,
    error::Result,
    image::{CheckReport, Severity},
    request::Child,
};

use super::walk::{Claimed, Kind, Walk};
use crate::layout::{Header, header::MAX_L1_BYTES};

/// Bytes of an entry without extra data and names.
const FIXED: usize = 40;
/// The most extra data that an entry may have.
const MAX_EXTRA: u32 = 1024;
/// Extra data that version 3 asks for.
const V3_EXTRA: u32 = 16;
/// The most bytes of all entries.
const MAX_TABLE: u64 = 64 << 20;
/// Bytes of the table that are read at once.
const WINDOW: u64 = 256 << 10;

/// A snapshot whose L1 table can be followed.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub l1_offset: u64,
    pub l1_size: u32,
    pub id: String,
    pub name: String,
    /// Where its entry is in a table that is written anew.
    pub field: usize,
}

impl Snapshot {
    /// What a user knows it by.
    pub fn label(&self) -> String {
        if self.name.is_empty() {
            self.id.clone()
        } else {
            self.name.clone()
        }
    }
}

/// What takes the place of a broken table.
#[derive(Debug, Default, Clone)]
pub(super) struct NewTable {
    pub bytes: Vec<u8>,
    pub count: u32,
    /// Entries were given up: what only they referenced isn't freed in the same repair.
    pub discarded: bool,
}

/// Reads a table front to back through a window.
struct Reader<'a> {
    file: &'a Child,
    end: u64,
    at: u64,
    window: Option<(u64, Buffer)>,
}

impl Reader<'_> {
    /// The next `len` bytes; `None` when the file ends before them.
    async fn take(&mut self, len: u64) -> Result<Option<Vec<u8>>> {
        if self.end.saturating_sub(self.at) < len {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            let (start, window) = match &self.window {
                Some((start, window))
                    if self.at >= *start && self.at < start + window.len() as u64 =>
                {
                    (*start, window)
                }
                _ => {
                    let most = WINDOW.min(self.end - self.at) as usize;
                    let window = self.file.read_padded(self.at, most).await?;
                    let (start, window) = self.window.insert((self.at, window));
                    (*start, &*window)
                }
            };
            let from = (self.at - start) as usize;
            let until = window.len().min(from + (len - bytes.len() as u64) as usize);
            bytes.extend_from_slice(&window[from..until]);
            self.at += (until - from) as u64;
        }
        Ok(Some(bytes))
    }
}

/// An entry as the table has it.
struct Entry {
    fixed: Vec<u8>,
    /// At most 1024 bytes of it.
    extra: Vec<u8>,
    extra_size: u32,
    id: Vec<u8>,
    name: Vec<u8>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u16::from_be_bytes)
}

impl Entry {
    async fn read(reader: &mut Reader<'_>) -> Result<Option<Self>> {
        let Some(fixed) = reader.take(FIXED as u64).await? else {
            return Ok(None);
        };
        let extra_size = be32(&fixed, 36);
        let kept = extra_size.min(MAX_EXTRA);
        let Some(extra) = reader.take(kept.into()).await? else {
            return Ok(None);
        };
        reader.at = reader.at.saturating_add((extra_size - kept).into());
        let Some(id) = reader.take(be16(&fixed, 12).into()).await? else {
            return Ok(None);
        };
        let Some(name) = reader.take(be16(&fixed, 14).into()).await? else {
            return Ok(None);
        };
        reader.at = reader.at.next_multiple_of(8);
        Ok(Some(Self {
            fixed,
            extra,
            extra_size,
            id,
            name,
        }))
    }

    fn snapshot(&self, field: usize) -> Snapshot {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut offset = [0; 8];
        offset.copy_from_slice(&self.fixed[..8]);
        Snapshot {
            l1_offset: u64::from_be_bytes(offset),
            l1_size: be32(&self.fixed, 8),
            id: text(&self.id),
            name: text(&self.name),
            field,
        }
    }

    /// Nothing but zeroes: no snapshot was ever there.
    fn is_empty(&self) -> bool {
        self.id.is_empty() && self.name.is_empty() && self.fixed.iter().all(|byte| *byte == 0)
    }

    /// Gives it the extra data that version 3 asks for.
    fn complete(&mut self, disk_size: u64) {
        if self.extra.len() < 8 {
            // The state's size then counts in the field of 32 bits.
            self.extra = u64::from(be32(&self.fixed, 32)).to_be_bytes().to_vec();
        }
        self.extra.truncate(8);
        self.extra.extend_from_slice(&disk_size.to_be_bytes());
    }

    fn append_to(&self, table: &mut Vec<u8>) {
        table.extend_from_slice(&self.fixed[..36]);
        table.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        table.extend_from_slice(&self.extra);
        table.extend_from_slice(&self.id);
        table.extend_from_slice(&self.name);
        table.resize(table.len().next_multiple_of(8), 0);
    }
}

impl Walk<'_> {
    /// Reads the snapshot table and counts its clusters. Gives back the snapshots whose L1 table can be followed.
    pub(super) async fn snapshot_table(
        &mut self,
        header: &Header,
        report: &mut CheckReport,
    ) -> Result<Vec<Snapshot>> {
        if header.nb_snapshots == 0 {
            return Ok(Vec::new());
        }
        let fix = self.shape.repair;
        let start = header.snapshots_offset.0;
        let mut reader = Reader {
            file: self.file,
            end: self.shape.file_len.min(start.saturating_add(MAX_TABLE)),
            at: start,
            window: None,
        };
        let mut snapshots = Vec::new();
        let mut new = NewTable::default();
        let mut changed = false;
        let verb = if fix { "Repairing" } else { "ERROR" };
        for index in 0..header.nb_snapshots {
            let entry = match Entry::read(&mut reader).await {
                Ok(entry) => entry,
                Err(error) => {
                    report.add(
                        Severity::CheckError,
                        false,
                        format!(
                            "ERROR failed to read the snapshot table: {}",
                            error.reason()
                        ),
                    );
                    self.note_unread();
                    return Ok(snapshots);
                }
            };
            let Some(mut entry) = entry else {
                let rest = header.nb_snapshots - index;
                report.add(
                    Severity::Corruption,
                    fix,
                    if fix {
                        format!("Discarding {rest} overhanging snapshots")
                    } else {
                        format!(
                            "ERROR snapshot table entry {index} lies beyond the end of the file or of the table's \
                             largest size; {rest} snapshots can't be read"
                        )
                    },
                );
                self.incomplete = true;
                changed = true;
                new.discarded = true;
                break;
            };
            if entry.is_empty() {
                report.add(
                    Severity::Corruption,
                    fix,
                    format!("{verb} snapshot table entry {index} is empty"),
                );
                changed = true;
                new.discarded = true;
                self.incomplete = true;
                continue;
            }
            if entry.extra_size > MAX_EXTRA {
                report.add(
                    Severity::Corruption,
                    fix,
                    format!(
                        "{} too much extra metadata in snapshot table entry {index} ({} > {MAX_EXTRA})",
                        if fix { "Discarding" } else { "ERROR" },
                        entry.extra_size
                    ),
                );
                changed = true;
            }
            if header.version >= 3 && entry.extra_size < V3_EXTRA {
                report.add(
                    Severity::Corruption,
                    fix,
                    format!("{verb} snapshot table entry {index} is incomplete"),
                );
                entry.complete(header.size);
                changed = true;
            }
            let snapshot = entry.snapshot(new.bytes.len());
            entry.append_to(&mut new.bytes);
            new.count += 1;
            if self.can_follow(&snapshot, report) {
                snapshots.push(snapshot);
            } else {
                self.incomplete = true;
            }
        }
        let len = reader.at.min(reader.end.max(start)) - start;
        let len = if len == 0 { FIXED as u64 } else { len };
        let claimed = self.claim_metadata(Kind::SnapshotTable, start, len, 1, report)?;
        changed |= claimed == Claimed::Shared;
        if changed && fix {
            self.new_snapshots = Some(new);
        } else if fix {
            self.snapshot_table = new;
        }
        Ok(snapshots)
    }

    fn can_follow(&self, snapshot: &Snapshot, report: &mut CheckReport) -> bool {
        let Snapshot {
            l1_offset,
            l1_size,
            id,
            name,
            ..
        } = snapshot;
        let problem = if !self.shape.is_aligned(*l1_offset) {
            format!("l1_offset={l1_offset:#x}: L1 table is not cluster aligned")
        } else if u64::from(*l1_size) * 8 > MAX_L1_BYTES {
            format!("l1_size={l1_size:#x}: L1 table is too large")
        } else {
            return true;
        };
        report.add(
            Severity::Corruption,
            false,
            format!("ERROR snapshot {id} ({name}) {problem}; snapshot table entry corrupted"),
        );
        false
    }
}
