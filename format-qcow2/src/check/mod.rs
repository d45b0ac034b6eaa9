//! Checking and repairing an image (digest, section 12).
//!
//! An offline check: it works on the file below the driver, which has written back and quiesced its caches before and
//! reads everything again afterwards. One pass walks the metadata and counts references (`walk`, `mapping`, `snapshots`,
//! `bitmaps`), compares them with the stored refcounts (`compare`), and looks at the COPIED flags (`copied`); when the
//! refcount structures are broken they are made anew (`rebuild`). Clusters with owners that must not share are told
//! apart by `owners`, and given copies by `relocate`. After a repair a last pass, which changes nothing, decides what is
//! left.
//!
//! Memory is bounded by two bytes per cluster of the file, or a refcount's width where that is more (and the L1 and refcount tables,
//! whose size the header check limits); a hostile image costs no more time than its file has bytes. Tables are read with several in flight, and
//! looked at by the environment's CPU workers (`tables`, `table`).

mod bitmaps;
mod compare;
mod copied;
mod counts;
mod mapping;
mod owners;
mod packed;
mod rebuild;
mod relocate;
mod snapshots;
mod stored;
mod table;
mod tables;
mod tails;
mod walk;

use std::collections::BTreeMap;

use block_core::{
    error::{Error, ErrorKind, Operation, Result},
    image::{CheckMode, CheckReport, Progress, Severity},
    request::Child,
};

use crate::{
    compress::Codec,
    header_update,
    layout::{Header, Incompatible},
};
use compare::Fix;
use relocate::Plan;
use stored::Stored;
use walk::Walk;

/// Rounds of separating doubly used clusters: each deals with thousands of them, and separated L2 tables uncover their
/// data.
const MAX_ROUNDS: u32 = 64;

/// Checks the image in `file` and repairs what `mode` allows. `header` is what the file holds, and is updated when
/// the repair changes it.
///
/// The findings have the texts that qemu-img prints, in its order: `ERROR …` and `Leaked …` for what was found,
/// `Repairing …` for what is being repaired. The counts are those of a pass after the repair, plus what was fixed.
///
/// # Errors
/// Those of [`Header::check_open`] for a check; ECANCELED; errors of the storage while repairing. Metadata that can't be read is counted as a check error.
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
    run_as(file, header, mode, Depth::of(mode), progress).await
}

/// As [`run`], and compressed clusters are decompressed where their entries don't tell whether they overlap: as in every repair with
/// [`CheckMode::RepairAll`].
///
/// # Errors
/// Those of [`run`].
///
/// # Cancellation
/// As with [`run`].
pub async fn run_thoroughly(
    file: &Child,
    header: &mut Header,
    mode: CheckMode,
    progress: &Progress,
) -> Result<CheckReport> {
    run_as(file, header, mode, Depth::Data, progress).await
}

/// Repairs an image of which [`is_merely_stale`] is true. Nobody has asked for it, so what can't be read is no reason to make anything
/// anew: it ends the repair.
///
/// # Errors
/// Those of [`run`]; EIO for metadata that can't be read, before anything is written.
///
/// # Cancellation
/// As with [`run`].
pub async fn repair_stale(
    file: &Child,
    header: &mut Header,
    progress: &Progress,
) -> Result<CheckReport> {
    run_as(file, header, CheckMode::RepairAll, Depth::Stale, progress).await
}

/// How far a check goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Metadata; what can't be read ends it, with nothing written.
    Stale,
    /// Metadata.
    Metadata,
    /// Compressed data as well, where metadata doesn't tell enough.
    Data,
}

impl Depth {
    fn of(mode: CheckMode) -> Self {
        match mode {
            CheckMode::RepairAll => Self::Data,
            CheckMode::ReadOnly | CheckMode::RepairLeaks => Self::Metadata,
        }
    }
}

async fn run_as(
    file: &Child,
    header: &mut Header,
    mode: CheckMode,
    depth: Depth,
    progress: &Progress,
) -> Result<CheckReport> {
    refuse(header)?;
    let mut done = CheckReport::default();
    let mut how = How {
        copies: u64::MAX,
        keep_leaks: false,
        depth,
    };
    let mut round = 0;
    let first = loop {
        let pass = pass(file, header, mode, how, progress).await?;
        if !pass.again {
            break pass;
        }
        done.absorb(pass.report);
        how.keep_leaks |= pass.keep_leaks;
        round += 1;
        how.copies = if round < MAX_ROUNDS { pass.copies } else { 0 };
    };
    let (changed, first) = (first.changed || round > 0, first.report);
    if mode == CheckMode::ReadOnly {
        return Ok(first);
    }
    let mut last = if changed {
        pass(file, header, CheckMode::ReadOnly, how, progress)
            .await?
            .report
    } else {
        CheckReport {
            corruptions_fixed: 0,
            leaks_fixed: 0,
            findings: Vec::new(),
            affected: Vec::new(),
            ..first.clone()
        }
    };
    last.refused = first.refused;
    last.findings.clear();
    last.affected.clear();
    for part in [done, first] {
        last.corruptions_fixed += part.corruptions_fixed;
        last.leaks_fixed += part.leaks_fixed;
        for finding in part.findings {
            last.note(finding);
        }
        for affected in part.affected {
            last.affect(affected);
        }
    }
    clear_bits(file, header, &last).await?;
    Ok(last)
}

/// Whether nothing but refcounts, and flags that depend on them, can be wrong: that is what the dirty bit announces. Other damage may
/// mean that the image isn't what its header says. Nothing is written.
///
/// # Errors
/// Those of [`run`].
pub async fn is_merely_stale(file: &Child, header: &Header, progress: &Progress) -> Result<bool> {
    refuse(header)?;
    let (mut report, mut refcounts) = (CheckReport::default(), CheckReport::default());
    let mut stored = Stored::open(file, header).await?;
    let walk = Walk::run(
        file,
        header,
        &stored,
        CheckMode::ReadOnly,
        &mut report,
        &mut refcounts,
        progress,
    )
    .await?;
    if report.corruptions > 0 {
        return Ok(false);
    }
    refuse_unread(&[&report, &refcounts])?;
    // All refcount blocks are read before anything is written. They may be nonsense, but an error of the storage may pass.
    let outcome = stored_refcounts(&walk, header, &mut stored, progress).await?;
    refuse_unread_refcounts(outcome.unread.as_deref())?;
    Ok(true)
}

/// What a pass may do, besides what the mode allows.
#[derive(Debug, Clone, Copy)]
struct How {
    /// So many clusters may still be used for copies of doubly used ones, over all rounds.
    copies: u64,
    /// Free nothing: what looks leaked may belong to what was given up before.
    keep_leaks: bool,
    depth: Depth,
}

impl How {
    /// What compressed data is to be looked at with, if it is.
    fn codec(self, header: &Header) -> Option<Codec> {
        (self.depth == Depth::Data)
            .then(|| Codec::from_type(header.compression_type))
            .flatten()
    }
}

/// What a pass did.
struct Pass {
    report: CheckReport,
    /// The image was changed.
    changed: bool,
    /// What it did calls for another pass; the report has only what was repaired.
    again: bool,
    keep_leaks: bool,
    /// What is left of [`How::copies`].
    copies: u64,
}

/// Refuses an image whose references can't all be counted.
fn refuse(header: &Header) -> Result<()> {
    header.check_open(false, true).map_err(|error| {
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

/// Fails with the first thing that couldn't be checked.
fn refuse_unread(reports: &[&CheckReport]) -> Result<()> {
    if reports.iter().all(|report| report.check_errors == 0) {
        return Ok(());
    }
    let mut findings = reports.iter().flat_map(|report| &report.findings);
    let first = findings.find(|finding| finding.severity == Severity::CheckError);
    Err(Error::io(match first {
        Some(finding) => finding
            .message
            .trim_start_matches("ERROR")
            .trim_start_matches(':')
            .trim(),
        None => "Metadata can't be read",
    }))
}

fn refuse_unread_refcounts(reason: Option<&str>) -> Result<()> {
    reason.map_or(Ok(()), |reason| {
        Err(Error::io(format!("Refcounts can't be read: {reason}")))
    })
}

/// One pass over the image, repairing as `mode` says.
async fn pass(
    file: &Child,
    header: &mut Header,
    mode: CheckMode,
    how: How,
    progress: &Progress,
) -> Result<Pass> {
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
    let end = |report, changed| Pass {
        report,
        changed,
        again: false,
        keep_leaks: false,
        copies: how.copies,
    };
    // Nothing is patched before all is known: whether refcounts are missing altogether, who shares what.
    let mut found = CheckReport::default();
    let compared = compare::compare(
        &walk,
        header,
        &mut stored,
        Fix::NOTHING,
        &mut found,
        progress,
    );
    let mut outcome = compared.await?;
    if how.depth == Depth::Stale {
        refuse_unread(&[&report, &refcounts])?;
        refuse_unread_refcounts(outcome.unread.as_deref())?;
    }
    let mut rebuild = mode != CheckMode::ReadOnly && (walk.rebuild || outcome.rebuild);
    let suspicious = std::mem::take(&mut outcome.suspicious);
    let claims = owners::find_claims(&walk, header, &stored, suspicious, progress).await?;
    let packed = packed::find(&walk, how.codec(header), &mut report, progress).await?;
    if mode == CheckMode::RepairAll {
        rebuild |= walk.overlaid;
        let none = BTreeMap::new();
        let plan = Plan::new(
            &mut walk,
            header,
            if how.copies > 0 { &claims } else { &none },
            if how.copies > 0 { &packed } else { &[] },
            how.copies,
        );
        if !plan.is_empty() {
            let mut fixed = only_repaired(report.clone());
            if plan
                .execute(&walk, &mut stored, header, rebuild, &mut fixed, progress)
                .await?
            {
                return Ok(Pass {
                    report: fixed,
                    changed: true,
                    again: true,
                    keep_leaks: plan.discards_snapshots(),
                    copies: plan.copies_left,
                });
            }
        }
    }
    let drifted = !found.is_clean();
    if mode == CheckMode::ReadOnly || rebuild || !drifted {
        report.image_end_offset = found.image_end_offset;
        refcounts.absorb(found);
    } else {
        relocate::drop_stale_bitmaps(&walk, header).await?;
        let fix = Fix::allowed(mode, &walk, how.keep_leaks);
        // What is told here is counted when it is told again, as repaired or left.
        for mut finding in found.findings {
            finding.repaired = match finding.severity {
                Severity::Leak => fix.leaks,
                Severity::Corruption => fix.errors,
                Severity::CheckError | Severity::Note => false,
            };
            report.note(finding);
        }
        found = CheckReport::default();
        outcome = compare::compare(&walk, header, &mut stored, fix, &mut found, progress).await?;
        report.image_end_offset = found.image_end_offset;
        refcounts.absorb(found);
    }
    if rebuild {
        if mode == CheckMode::RepairLeaks {
            absorb(&mut report, refcounts, false);
            report.add(
                Severity::CheckError,
                false,
                "ERROR need to rebuild refcount structures",
            );
            report.refused = Some(ErrorKind::Io);
            return Ok(end(report, walk.repaired));
        }
        relocate::drop_stale_bitmaps(&walk, header).await?;
        let fresh = BTreeMap::new();
        match rebuild::rebuild(file, &walk, &mut stored, header, &fresh, progress).await {
            Ok(()) => {}
            // The image can't be rebuilt; it is as it was.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                absorb(&mut report, refcounts, false);
                report.add(
                    Severity::CheckError,
                    false,
                    format!("ERROR {}", error.reason()),
                );
                return Ok(end(report, walk.repaired));
            }
            Err(error) => return Err(error),
        }
        absorb(&mut report, refcounts, true);
        report.add(Severity::Note, true, "Rebuilding refcount structure");
        stored = Stored::open(file, header).await?;
        // Flags are held against the refcounts that were just made.
        walk.unflagged = true;
        outcome = stored_refcounts(&walk, header, &mut stored, progress).await?;
    } else {
        absorb(&mut report, refcounts, false);
        if walk.incomplete && mode != CheckMode::ReadOnly && report.leaks + report.uncertain > 0 {
            report.add(
                Severity::Note,
                false,
                "Leaks are not repaired while a part of the mapping can't be followed",
            );
        }
        stored.write_back().await?;
    }
    for (cluster, claim) in &claims {
        report.add(
            Severity::Note,
            false,
            format!("Cluster {cluster} is doubly used by {}", claim.describe()),
        );
    }
    for (cluster, claim) in &packed {
        let owners = claim.describe();
        report.add(
            Severity::Corruption,
            false,
            format!("ERROR compressed clusters overlap in cluster {cluster}: {owners}"),
        );
    }
    for affected in claims
        .values()
        .chain(packed.iter().map(|(_, claim)| claim))
        .flat_map(|claim| claim.affected(&walk, header.disk_size(), false))
    {
        report.affect(affected);
    }
    drop(claims);
    let fix_flags = match mode {
        CheckMode::ReadOnly => false,
        CheckMode::RepairLeaks => report.corruptions == 0 && report.check_errors == 0,
        CheckMode::RepairAll => true,
    };
    if mode != CheckMode::ReadOnly {
        // A flag that allows overwriting in place never gets ahead of the refcount that it stands for.
        file.flush().await?;
    }
    let past_end = walk.past_end.as_ref().is_none_or(|past| !past.is_empty());
    let flags_known = stored.unreadable().is_none();
    if flags_known && (walk.unflagged || outcome.shared || past_end || !walk.unreadable.is_empty())
    {
        copied::check_copied(
            &mut walk,
            header,
            &mut stored,
            outcome.unique,
            fix_flags,
            &mut report,
            progress,
        )
        .await?;
    }
    let changed = report.corruptions_fixed + report.leaks_fixed > 0 || rebuild;
    if changed {
        file.flush().await?;
    }
    Ok(end(report, changed))
}

/// What the stored refcounts are, without a word about them.
async fn stored_refcounts(
    walk: &Walk<'_>,
    header: &Header,
    stored: &mut Stored<'_>,
    progress: &Progress,
) -> Result<compare::Outcome> {
    let mut unused = CheckReport::default();
    compare::compare(walk, header, stored, Fix::NOTHING, &mut unused, progress).await
}

/// Leaves out what the next pass finds again.
fn only_repaired(mut report: CheckReport) -> CheckReport {
    (report.check_errors, report.corruptions, report.leaks) = (0, 0, 0);
    report.findings.retain(|finding| finding.repaired);
    report.affected.clear();
    report
}

/// Adds the counts and findings of `other`; with `repaired`, all of them are gone by now.
fn absorb(report: &mut CheckReport, other: CheckReport, repaired: bool) {
    if other.image_end_offset.is_some() {
        report.image_end_offset = other.image_end_offset;
    }
    report.corruptions_fixed += other.corruptions_fixed;
    report.leaks_fixed += other.leaks_fixed;
    if repaired {
        report.corruptions_fixed += other.corruptions;
        report.leaks_fixed += other.leaks;
    } else {
        report.corruptions += other.corruptions;
        report.leaks += other.leaks;
        report.uncertain += other.uncertain;
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
