//! Looks for damage in a sparse extent: tables and grains beyond the end of the file or inside of metadata, grains that
//! two guest grains share, and redundant tables that differ from the primary ones. Changes nothing: nothing in this
//! format says which of two owners is the right one.

use std::collections::HashMap;

use block_core::{
    Error, ErrorKind, Result,
    image::{CheckReport, Progress, Severity},
    request::Child,
};

use crate::{
    layout::{Entry, HostSector, SECTOR},
    sparse::Sparse,
};

/// A set of sectors that takes memory only where there are some.
#[derive(Default)]
struct Sectors(HashMap<u64, Box<[u64; 64]>>);

impl Sectors {
    const PER_PART: u64 = 64 * 64;

    /// Adds sectors; true when any was there already.
    fn add(&mut self, start: u64, len: u64) -> bool {
        let mut twice = false;
        let mut at = start;
        let end = start.saturating_add(len);
        while at < end {
            let part = self
                .0
                .entry(at / Self::PER_PART)
                .or_insert_with(|| Box::new([0; 64]));
            let bit = at % Self::PER_PART;
            let word = &mut part[(bit / 64) as usize];
            let from = bit % 64;
            let step = (64 - from).min(end - at);
            let mask = if step == 64 {
                u64::MAX
            } else {
                ((1 << step) - 1) << from
            };
            twice |= *word & mask != 0;
            *word |= mask;
            at += step;
        }
        twice
    }
}

/// Checks the extent in `file`. `progress` counts grain tables.
///
/// # Errors
/// ECANCELED, and what reading the tables gives besides damage.
pub(crate) async fn check(
    sparse: &Sparse,
    file: &Child,
    progress: &Progress,
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let geometry = &sparse.geometry;
    let grain_sectors = u64::from(geometry.grain_sectors);
    let file_length = file.length();
    let disk_sectors = geometry.length / SECTOR;
    let mut used = Sectors::default();
    progress.set_total(geometry.gd_entries as u64);
    for index in 0..geometry.gd_entries {
        if progress.is_cancelled() {
            return Err(Error::from_kind(ErrorKind::Cancelled));
        }
        progress.advance(1);
        let first = geometry.first_grain(index);
        let first_sector = first.0 * grain_sectors;
        if !sparse.tables.exists(index) {
            continue;
        }
        let table = match sparse.tables.load(file, index).await {
            Ok(table) => table,
            Err(error) => {
                let text = format!(
                    "ERROR: could not get cluster_offset for sector {first_sector}: {}",
                    error.reason()
                );
                report.add(Severity::Corruption, false, text);
                continue;
            }
        };
        for slot in 0..geometry.used_entries(index) {
            let raw = table.raw(slot);
            let sector = first_sector + slot as u64 * grain_sectors;
            let Entry::Data(HostSector(place)) = Entry::decode(raw, geometry.zeroed_grains) else {
                continue;
            };
            // The last grain of the disk may be short.
            let wanted = grain_sectors.min(disk_sectors - sector);
            let end = (u64::from(place) + wanted) * SECTOR;
            if sparse.tables.decode(raw).is_err() {
                let text = format!(
                    "ERROR: cluster offset for sector {sector} points into the metadata (sector {place})"
                );
                report.add(Severity::Corruption, false, text);
            } else if u64::from(place) * SECTOR >= file_length || end > file_length {
                let text = format!("ERROR: cluster offset for sector {sector} points after EOF");
                report.add(Severity::Corruption, false, text);
            } else if used.add(u64::from(place), wanted) {
                let text = format!(
                    "ERROR: cluster offset for sector {sector} points to a grain that is used twice (sector {place})"
                );
                report.add(Severity::Corruption, false, text);
            }
        }
        let (primary, redundant) = sparse.tables.places(index);
        if redundant != 0 {
            let main = sparse.tables.read_table(file, primary).await?;
            let same = match sparse.tables.read_table(file, redundant).await {
                Ok(copy) => main[..] == copy[..],
                Err(error) => {
                    // Not known to be bad, but not known to be good either.
                    let text = format!(
                        "ERROR: could not read redundant grain table {index}: {}",
                        error.reason()
                    );
                    report.add(Severity::CheckError, false, text);
                    continue;
                }
            };
            if !same {
                // Whatever a power cut left behind: readers use the primary table.
                let text = format!("redundant grain table {index} differs from the primary one");
                report.add(Severity::Note, false, text);
            }
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_that_is_added_twice_is_noticed() {
        let mut sectors = Sectors::default();
        assert!(!sectors.add(100, 128));
        assert!(!sectors.add(228, 4096));
        assert!(!sectors.add(0, 100));
        assert!(sectors.add(227, 1));
        assert!(sectors.add(4323, 1) && !sectors.add(4324, 1));
    }
}
