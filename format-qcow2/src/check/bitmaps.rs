//! Persistent bitmaps (digest, section 8): reads directory and tables, holds them against every rule of the format, counts
//! their clusters, and makes the directory that a repair puts in the place of a broken one.
//!
//! A bitmap that breaks a rule can't be trusted, and without its directory entry nobody needs it: repair drops it, and
//! keeps the others. What the bits say isn't looked at, but for those behind the end of the disk, which say nothing and have to be
//! zero: repair clears them.

use std::collections::HashSet;

use block_core::{
    error::Result,
    image::{CheckReport, Progress, Severity},
};

use super::walk::{Claimed, Kind, Walk, stop_if_cancelled};
use crate::layout::{
    Autoclear, Header,
    entry::{OFFSET_MASK, be64s},
    extensions::BitmapsPointer,
};

/// Bytes of a directory entry without extra data and name.
const FIXED: usize = 24;
const IN_USE: u32 = 1;
const EXTRA_DATA_COMPATIBLE: u32 = 4;
const KNOWN_FLAGS: u32 = 0b111;
/// The largest granularity, as a power of two; larger and smaller ones than what can be used are valid.
const MAX_GRANULARITY: u8 = 63;
const MAX_TABLE: u32 = 0x0800_0000;
/// The most bytes of a bitmap's data.
const MAX_DATA: u64 = 0x2000_0000;
/// Bytes of a table that are read at once.
const WINDOW: u64 = 256 << 10;

/// What takes the place of a broken directory. With no bitmaps left, the extension goes.
#[derive(Debug, Default)]
pub(super) struct NewDirectory {
    pub bytes: Vec<u8>,
    pub count: u32,
}

/// A directory entry.
struct Entry {
    raw: Vec<u8>,
    table_offset: u64,
    table_size: u32,
    flags: u32,
    kind: u8,
    granularity: u8,
    extra_size: u32,
    name: Vec<u8>,
}

impl Entry {
    /// The entry at the beginning of `bytes`. `None` when they end before it does.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let be32 = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let name_size = u16::from_be_bytes(bytes.get(18..20)?.try_into().ok()?);
        let extra_size = be32(20)?;
        let name_at = FIXED.checked_add(extra_size as usize)?;
        let end = name_at.checked_add(name_size.into())?;
        let len = end.next_multiple_of(8);
        let name = bytes.get(name_at..end)?.to_vec();
        Some(Self {
            raw: bytes.get(..len)?.to_vec(),
            table_offset: u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?),
            table_size: be32(8)?,
            flags: be32(12)?,
            kind: *bytes.get(16)?,
            granularity: *bytes.get(17)?,
            extra_size,
            name,
        })
    }

    fn label(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// How many of the bits in the last cluster of data are about the disk, if not all.
    fn bits_in_last(&self, disk_size: u64, cluster_size: u64) -> Option<u64> {
        if self.extra_size != 0 && self.flags & EXTRA_DATA_COMPATIBLE == 0 {
            // Nobody knows what they say.
            return None;
        }
        let bits = disk_size.div_ceil(1 << self.granularity);
        let before = (u64::from(self.table_size) - 1) * cluster_size * 8;
        let last = bits.checked_sub(before)?;
        (last < cluster_size * 8).then_some(last)
    }

    /// The first rule that the entry breaks: field, value, what is allowed.
    fn problem(&self, walk: &Walk<'_>, disk_size: u64) -> Option<String> {
        let rule = |broken: bool, field: &str, value: u64, allowed: &str| {
            broken.then(|| format!("{field} {value:#x}, must be {allowed}"))
        };
        let cluster_size = walk.shape.cluster_size();
        let data = u64::from(self.table_size) * cluster_size;
        rule(
            self.table_offset == 0 || !walk.shape.is_aligned(self.table_offset),
            "bitmap_table_offset",
            self.table_offset,
            "the offset of a cluster",
        )
        .or_else(|| {
            rule(
                self.table_size == 0 || self.table_size > MAX_TABLE || data > MAX_DATA,
                "bitmap_table_size",
                self.table_size.into(),
                "at least 1, and not more than a bitmap can have",
            )
        })
        .or_else(|| {
            rule(
                self.flags & !KNOWN_FLAGS != 0,
                "flags",
                self.flags.into(),
                "in_use (bit 0), auto (bit 1) and extra_data_compatible (bit 2)",
            )
        })
        .or_else(|| {
            rule(
                self.kind != 1,
                "type",
                self.kind.into(),
                "1 (dirty tracking)",
            )
        })
        .or_else(|| {
            rule(
                self.granularity > MAX_GRANULARITY,
                "granularity_bits",
                self.granularity.into(),
                "0 to 63",
            )
        })
        .or_else(|| {
            rule(
                self.name.is_empty(),
                "name_size",
                self.name.len() as u64,
                "at least 1",
            )
        })
        .or_else(|| {
            let bits = disk_size.div_ceil(1 << self.granularity);
            let needed = bits.div_ceil(8).div_ceil(cluster_size);
            rule(
                self.flags & IN_USE == 0 && u64::from(self.table_size) != needed,
                "bitmap_table_size",
                self.table_size.into(),
                &format!("{needed} for a disk of this size"),
            )
        })
    }
}

impl Walk<'_> {
    /// Looks at all persistent bitmaps and counts their clusters.
    pub(super) async fn bitmaps(
        &mut self,
        header: &Header,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<()> {
        let usable = header.version >= 3 && header.autoclear.contains(Autoclear::BITMAPS);
        let Some(pointer) = header.extensions.bitmaps else {
            return Ok(());
        };
        if !usable {
            report.add(
                Severity::Note,
                false,
                "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent",
            );
            return Ok(());
        }
        let fix = self.shape.repair;
        let mut new = NewDirectory::default();
        let complete = self
            .directory(header, pointer, &mut new, report, progress)
            .await?;
        if !complete && fix {
            self.new_bitmaps = Some(new);
        }
        Ok(())
    }

    /// Reports that a rule is broken; says that the directory has to be replaced.
    fn bitmap_problem(&self, what: String, report: &mut CheckReport) {
        let fix = self.shape.repair;
        let verb = if fix { "Discarding" } else { "ERROR" };
        report.add(Severity::Corruption, fix, format!("{verb} {what}"));
    }

    /// Walks the directory; `new` gets the entries that are good. `false` when not all are.
    async fn directory(
        &mut self,
        header: &Header,
        pointer: BitmapsPointer,
        new: &mut NewDirectory,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<bool> {
        if pointer.directory_size == 0 {
            self.bitmap_problem(
                "bitmap directory: bitmap_directory_size is 0".into(),
                report,
            );
            return Ok(false);
        }
        let (start, len) = (pointer.directory_offset, pointer.directory_size);
        let claimed = self.claim_metadata(Kind::BitmapDirectory, start, len, 1, report)?;
        if claimed == Claimed::Outside {
            // What there may have been is out of reach.
            self.made_good(report);
            return Ok(false);
        }
        // At most 64 MiB, and within the file.
        let inside = len.min(self.shape.file_len.saturating_sub(start)) as usize;
        let directory = match self.file.read_padded(start, inside).await {
            Ok(directory) => directory,
            Err(error) => {
                report.add(
                    Severity::CheckError,
                    false,
                    format!(
                        "ERROR failed to read the bitmap directory: {}",
                        error.reason()
                    ),
                );
                self.note_unread();
                return Ok(true);
            }
        };
        let mut good = claimed == Claimed::Alone;
        let mut names: HashSet<Vec<u8>> = HashSet::new();
        let (mut at, mut found) = (0, 0u32);
        while at < directory.len() && found < pointer.count {
            stop_if_cancelled(progress)?;
            let Some(entry) = Entry::decode(&directory[at..]) else {
                break;
            };
            at += entry.raw.len();
            found += 1;
            let mut problem = entry.problem(self, header.disk_size());
            if problem.is_none() && !names.insert(entry.name.clone()) {
                problem = Some("name, must be unique".into());
            }
            let whole = match problem {
                Some(problem) => {
                    let label = entry.label();
                    self.bitmap_problem(format!("bitmap '{label}': {problem}"), report);
                    false
                }
                None => {
                    let size = header.disk_size();
                    self.bitmap_table(&entry, size, report, progress).await?
                }
            };
            if whole {
                new.bytes.extend_from_slice(&entry.raw);
                new.count += 1;
            }
            good &= whole;
        }
        if at != len as usize || found != pointer.count {
            let count = pointer.count;
            self.bitmap_problem(
                format!(
                    "bitmap directory: {found} bitmaps in {at} bytes, the header extension says {count} in {len}"
                ),
                report,
            );
            good = false;
        }
        if self.bitmaps_overlap {
            // Who wrote there last is unknown.
            *new = NewDirectory::default();
            good = false;
        }
        Ok(good)
    }

    /// The last finding is one that a repair makes good.
    fn made_good(&self, report: &mut CheckReport) {
        if self.shape.repair {
            report.corruptions -= 1;
            report.corruptions_fixed += 1;
            if let Some(finding) = report.findings.last_mut() {
                finding.repaired = true;
            }
        }
    }

    /// Counts the clusters of one bitmap. `false` when a rule is broken.
    async fn bitmap_table(
        &mut self,
        entry: &Entry,
        disk_size: u64,
        report: &mut CheckReport,
        progress: &Progress,
    ) -> Result<bool> {
        let cluster_size = self.shape.cluster_size();
        let (start, len) = (entry.table_offset, u64::from(entry.table_size) * 8);
        match self.claim_metadata(Kind::BitmapTable, start, len, 1, report)? {
            Claimed::Outside => {
                self.made_good(report);
                return Ok(false);
            }
            Claimed::Shared => self.bitmaps_overlap = true,
            Claimed::Alone => {}
        }
        let mut good = true;
        let end = self.shape.file_len.min(start + len);
        let mut at = start;
        while at < end {
            stop_if_cancelled(progress)?;
            let window = WINDOW.min(end - at);
            let bytes = match self.file.read_padded(at, window as usize).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    report.add(
                        Severity::CheckError,
                        false,
                        format!(
                            "ERROR failed to read the table of bitmap '{}': {}",
                            entry.label(),
                            error.reason()
                        ),
                    );
                    self.note_unread();
                    return Ok(true);
                }
            };
            for (index, raw) in be64s(&bytes).enumerate().filter(|(_, raw)| *raw > 1) {
                let offset = raw & OFFSET_MASK;
                let reserved = raw & !(OFFSET_MASK | 1);
                let problem = if reserved != 0 {
                    "reserved bits are set"
                } else if raw & 1 != 0 {
                    "bit 0 is set beside an offset"
                } else if !self.shape.is_aligned(offset) {
                    "the offset isn't where a cluster begins"
                } else {
                    let last = (at - start) / 8 + index as u64 + 1 == u64::from(entry.table_size);
                    match self.claim_metadata(Kind::BitmapData, offset, cluster_size, 1, report)? {
                        Claimed::Outside => {
                            self.made_good(report);
                            good = false;
                        }
                        Claimed::Shared => self.bitmaps_overlap = true,
                        Claimed::Alone if last => {
                            self.bitmap_tail(entry, offset, disk_size, report).await?;
                        }
                        Claimed::Alone => {}
                    }
                    continue;
                };
                let index = (at - start) / 8 + index as u64;
                self.bitmap_problem(
                    format!(
                        "bitmap '{}': table entry {index} is {raw:#x}: {problem}",
                        entry.label()
                    ),
                    report,
                );
                good = false;
            }
            at += window;
        }
        Ok(good)
    }

    /// Looks at the bits behind the end of the disk, in the last cluster of a bitmap's data, which is at `offset`.
    async fn bitmap_tail(
        &mut self,
        entry: &Entry,
        offset: u64,
        disk_size: u64,
        report: &mut CheckReport,
    ) -> Result<()> {
        let cluster_size = self.shape.cluster_size();
        let Some(bits) = entry.bits_in_last(disk_size, cluster_size) else {
            return Ok(());
        };
        if entry.flags & IN_USE != 0 || self.counts.get(offset >> self.shape.cluster_bits) > 1 {
            // Nobody trusts it, or it isn't the bitmap's alone.
            return Ok(());
        }
        let at = offset + bits / 8;
        let len = (cluster_size - bits / 8) as usize;
        let mut tail = match self.file.read_padded(at, len).await {
            Ok(tail) => tail.to_vec(),
            Err(error) => {
                report.add(
                    Severity::CheckError,
                    false,
                    format!(
                        "ERROR failed to read the data of bitmap '{}': {}",
                        entry.label(),
                        error.reason()
                    ),
                );
                return Ok(());
            }
        };
        let kept = tail
            .first()
            .map_or(0, |first| first & ((1 << (bits % 8)) - 1));
        let is_clear = tail.first() == Some(&kept) && tail[1..].iter().all(|byte| *byte == 0);
        if is_clear {
            return Ok(());
        }
        let fix = self.shape.repair;
        report.add(
            Severity::Corruption,
            fix,
            format!(
                "{} bitmap '{}': bits behind the end of the disk are set",
                if fix { "Repairing" } else { "ERROR" },
                entry.label()
            ),
        );
        if fix {
            tail.fill(0);
            tail[0] = kept;
            self.patch(at, tail).await?;
        }
        Ok(())
    }
}
