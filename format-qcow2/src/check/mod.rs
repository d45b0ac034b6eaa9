//! Checking and repairing an image (digest, section 12).
//!
//! An offline check: it works on the file below the driver, which has written back and quiesced its caches before and
//! reads everything again afterwards. One pass walks the metadata and counts references (`walk`), compares them with
//! the stored refcounts (`compare`), and looks at the COPIED flags (`copied`); when the refcount structures
//! are broken they are made anew (`rebuild`). After a repair a second pass, which changes nothing, decides what is
//! left.
//!
//! Memory is bounded by two bytes per cluster of the file (and the L1 and refcount tables, whose size the header
//! check limits); a hostile image costs no more time than its file has bytes.

mod compare;
mod copied;
mod counts;
mod rebuild;
mod stored;
mod walk;

use block_core::{
    error::{Error, ErrorKind, Operation, Result},
    image::{CheckMode, CheckReport, Progress, Severity},
    request::Child,
};

use crate::{
    header_update,
    layout::{Header, Incompatible},
};
use compare::Fix;
use stored::Stored;
use walk::Walk;

/// Checks the image in `file` and repairs what `mode` allows. `header` is what the file holds, and is updated when
/// the repair changes it.
///
/// The findings have the texts that qemu-img prints, in its order: `ERROR …` and `Leaked …` for what was found,
/// `Repairing …` for what is being repaired. The counts are those of a pass after the repair, plus what was fixed.
///
/// # Errors
/// ENOTSUP for images with features whose metadata isn't understood here (their clusters would look like leaks);
/// ECANCELED; errors of the storage while repairing. Metadata that can't be read is counted as a check error.
///
/// # Cancellation
/// [`Progress::cancel`] stops at the next safe place: what was repaired until then stays, nothing is half done. A
/// future that is dropped is as good as a power cut at that moment: repairs are written in an order that never makes
/// things worse.
pub async fn run(
    file: &Child,
    header: &mut Header,
    mode: CheckMode,
    progress: &Progress,
) -> Result<CheckReport> {
    refuse(header)?;
    let (first, changed) = pass(file, header, mode, progress).await?;
    if mode == CheckMode::ReadOnly {
        return Ok(first);
    }
    let last = if changed {
        let (mut last, _) = pass(file, header, CheckMode::ReadOnly, progress).await?;
        last.corruptions_fixed = first.corruptions_fixed;
        last.leaks_fixed = first.leaks_fixed;
        last.findings = first.findings;
        last
    } else {
        first
    };
    clear_bits(file, header, &last).await?;
    Ok(last)
}

/// Refuses an image whose references can't all be counted.
fn refuse(header: &Header) -> Result<()> {
    let snapshots = if header.nb_snapshots == 0 {
        Ok(())
    } else {
        Err(Error::unsupported("internal snapshots").with_field(
            "nb_snapshots",
            header.nb_snapshots,
            "0 for a check in this version of the driver",
        ))
    };
    header
        .check_open(false, true)
        .and(snapshots)
        .map_err(|error| {
            let kind = error.kind();
            let reason = error.reason();
            let refused = Error::new(kind, format!("The image can't be checked: {reason}"))
                .with_operation(Operation::Check, 0, 0);
            match error.field() {
                Some(field) => refused.with_field(
                    field.name.clone(),
                    field.value.clone(),
                    field.allowed.clone(),
                ),
                None => refused,
            }
        })
}

/// One pass over the image, repairing as `mode` says. Says also whether the image was changed.
async fn pass(
    file: &Child,
    header: &mut Header,
    mode: CheckMode,
    progress: &Progress,
) -> Result<(CheckReport, bool)> {
    let mut report = CheckReport::default();
    // Findings about refcounts and what holds them: what a rebuild makes good.
    let mut refcounts = CheckReport::default();
    let mut stored = Stored::open(file, header).await?;
    let mut walk = Walk::run(
        file,
        header,
        &stored,
        mode,
        &mut report,
        &mut refcounts,
        progress,
    )
    .await?;
    if walk.repaired {
        // Entries that gave up a reservation are durable before the reservation is freed.
        file.flush().await?;
    }
    let mut rebuild = mode != CheckMode::ReadOnly && walk.rebuild;
    let mut fix = Fix::NOTHING;
    if mode != CheckMode::ReadOnly && !rebuild {
        // Nothing is patched before all is known: whether refcounts are missing altogether.
        let mut found = CheckReport::default();
        let compared = compare::compare(&walk, header, &mut stored, fix, &mut found, progress);
        rebuild = compared.await?.rebuild;
        if !rebuild {
            fix = Fix::allowed(mode, &walk);
            // What is told here is counted when it is told again, as repaired or left.
            for mut finding in found.findings {
                finding.repaired = match finding.severity {
                    Severity::Leak => fix.leaks,
                    Severity::Corruption => fix.errors,
                    Severity::CheckError | Severity::Note => false,
                };
                report.note(finding);
            }
        }
    }
    compare::compare(&walk, header, &mut stored, fix, &mut refcounts, progress).await?;
    report.image_end_offset = refcounts.image_end_offset;
    if rebuild {
        if mode == CheckMode::RepairLeaks {
            absorb(&mut report, refcounts, false);
            report.add(
                Severity::CheckError,
                false,
                "ERROR need to rebuild refcount structures",
            );
            report.refused = Some(ErrorKind::Io);
            return Ok((report, walk.repaired));
        }
        match rebuild::rebuild(file, &walk, &mut stored, header, progress).await {
            Ok(()) => {}
            // The image can't be rebuilt; it is as it was.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                absorb(&mut report, refcounts, false);
                report.add(
                    Severity::CheckError,
                    false,
                    format!("ERROR {}", error.reason()),
                );
                return Ok((report, walk.repaired));
            }
            Err(error) => return Err(error),
        }
        absorb(&mut report, refcounts, true);
        report.add(Severity::Note, true, "Rebuilding refcount structure");
        stored = Stored::open(file, header).await?;
    } else {
        absorb(&mut report, refcounts, false);
        if walk.incomplete && mode != CheckMode::ReadOnly && report.leaks > 0 {
            report.add(
                Severity::Note,
                false,
                "Leaks are not repaired while a part of the mapping can't be followed",
            );
        }
        stored.write_back().await?;
    }
    let fix_flags = match mode {
        CheckMode::ReadOnly => false,
        CheckMode::RepairLeaks => report.corruptions == 0 && report.check_errors == 0,
        CheckMode::RepairAll => true,
    };
    if mode != CheckMode::ReadOnly {
        // A flag that allows overwriting in place never gets ahead of the refcount that it stands for.
        file.flush().await?;
    }
    copied::check_copied(
        &mut walk,
        header,
        &mut stored,
        fix_flags,
        &mut report,
        progress,
    )
    .await?;
    let changed = report.corruptions_fixed + report.leaks_fixed > 0 || rebuild;
    if changed {
        file.flush().await?;
    }
    Ok((report, changed))
}

/// Adds the counts and findings of `other`; with `repaired`, all of them are gone by now.
fn absorb(report: &mut CheckReport, other: CheckReport, repaired: bool) {
    report.corruptions_fixed += other.corruptions_fixed;
    report.leaks_fixed += other.leaks_fixed;
    if repaired {
        report.corruptions_fixed += other.corruptions;
        report.leaks_fixed += other.leaks;
    } else {
        report.corruptions += other.corruptions;
        report.leaks += other.leaks;
        report.check_errors += other.check_errors;
    }
    for mut finding in other.findings {
        finding.repaired |= repaired;
        report.note(finding);
    }
}

/// Clears the dirty and corrupt bits when nothing is wrong any more.
async fn clear_bits(file: &Child, header: &mut Header, report: &CheckReport) -> Result<()> {
    if report.check_errors > 0 || report.corruptions > 0 {
        return Ok(());
    }
    let clean = header.incompatible - (Incompatible::DIRTY | Incompatible::CORRUPT);
    if clean != header.incompatible {
        file.flush().await?;
        header_update::write_incompatible(file, header, clean).await?;
        file.flush().await?;
    }
    Ok(())
}
