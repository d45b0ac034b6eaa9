//! `blk check`: is the image consistent, and repairs.

use std::{pin::pin, time::Duration};

use block_core::{
    BlockHandle, Environment, ErrorKind,
    image::{Affected, CheckMode, CheckReport, Finding, Progress},
};
use futures::future::{Either, select};
use serde_json::{Map, Value, json};

use super::{
    Command,
    args::{
        self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, OutputFormat, PROGRESS, QUIET,
        one_image, output_format,
    },
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    json,
    open::{self, Access},
    output::{complain, flush_out, say},
    progress::Meter,
    session::Session,
};

pub const COMMAND: Command = Command {
    name: "check",
    about: "Check whether an image is consistent. Exit status: 0 consistent, 1 not completed, \
            2 corrupted, 3 leaked clusters only, 63 the format has no check.",
    usage: "[-q] [-p] [-f FMT | --image-opts] [-r leaks|all] [--compressed] [-T CACHE] [-U] [--output human|json] FILE",
    options: &[
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Opt::value(
            'r',
            "repair",
            "leaks|all",
            "repair leaks only, or all that can be repaired",
        ),
        Opt::flag(
            ' ',
            "compressed",
            "also decompress clusters that meet in a sector, as -r all does",
        ),
        Opt::value('T', "cache", "CACHE", "cache mode (default: writeback)"),
        FORCE_SHARE,
        OUTPUT,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

const CORRUPTED: u8 = 2;
const LEAKS: u8 = 3;
const NO_CHECK: u8 = 63;

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(200);

/// Asks the check to stop where that does no harm when nobody waits for it any more.
struct StopOnDrop(Progress);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

fn no_check() -> Failure {
    Failure::new("This image format does not support checks").with_code(NO_CHECK)
}

/// Checks or repairs, and shows how far that is.
async fn run(
    session: &Session,
    handle: &BlockHandle,
    mode: CheckMode,
    meter: &Meter,
) -> Result<CheckReport, Failure> {
    let progress = Progress::new();
    let _stop = StopOnDrop(progress.clone());
    let mut check = pin!(handle.check(mode, progress.clone()));
    loop {
        let tick = session.env.sleep(TICK);
        match select(check.as_mut(), tick).await {
            Either::Left((report, _)) => {
                return report.map_err(|error| match error.kind() {
                    // Of a repair of images that can be checked alone.
                    ErrorKind::NotSupported if !session.program.is_qemu() => {
                        Failure::from(error).with_code(NO_CHECK)
                    }
                    ErrorKind::NotSupported => no_check(),
                    _ => Failure::context("Check failed", &error),
                });
            }
            Either::Right(_) => meter.set(progress.current(), progress.total()),
        }
    }
}

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let output = output_format(parsed, "check")?;
    let mode = match parsed.get("repair") {
        None => CheckMode::ReadOnly,
        Some("leaks") => CheckMode::RepairLeaks,
        Some("all") => CheckMode::RepairAll,
        Some(other) => {
            return Err(Failure::usage(
                "check",
                format!("--repair (-r) expects 'leaks' or 'all' not '{other}'"),
            ));
        }
    };
    let cache = args::cache(
        parsed,
        "cache",
        CacheMode::WRITEBACK,
        "Invalid source cache option",
    )?;
    let image = one_image(parsed, "check")?;
    let quiet = parsed.has("quiet");
    let access = Access {
        write: mode != CheckMode::ReadOnly,
        resize: mode != CheckMode::ReadOnly,
        force_share: parsed.has("force-share"),
        // The backing file has no part in it; qemu-img insists on it all the same.
        no_backing: !session.program.is_qemu(),
        no_data_file: !session.program.is_qemu(),
        for_check: true,
        metadata_only: false,
        unmap: false,
        cache,
    };
    let more: &[(&str, &str)] = if parsed.has("compressed") {
        &[("check-compressed", "on")]
    } else {
        &[]
    };
    let handle = open::open_with(session, image, access, more)
        .await
        .map_err(|error| Failure::open(image.name, &error))?;
    let node = handle.node();
    let can_check = node
        .driver()
        .capabilities()
        .contains(block_core::Capabilities::CHECK);
    if !can_check {
        handle.close().await?;
        return Err(no_check());
    }
    let meter = Meter::new(parsed.has("progress") && !quiet, 1.0);
    session.signals.show(&meter);
    let mut report = run(session, &handle, mode, &meter).await?;
    meter.finish();
    tell(&report.findings);
    if let Some(kind) = report.refused {
        let why = kind.strerror();
        return Err(Failure::new(format!("Check failed: {why}")));
    }
    if report.leaks_fixed > 0 || report.corruptions_fixed > 0 {
        let fixed = (report.leaks_fixed, report.corruptions_fixed);
        if output == OutputFormat::Human && !quiet {
            say!(
                "The following inconsistencies were found and repaired:\n\n    \
                 {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...",
                fixed.0,
                fixed.1
            );
        }
        let affected = report.affected;
        report = run(session, &handle, CheckMode::ReadOnly, &meter).await?;
        tell(&report.findings);
        (report.leaks_fixed, report.corruptions_fixed) = fixed;
        report.affected = affected;
    }
    if !quiet {
        match output {
            OutputFormat::Human => print(&report),
            OutputFormat::Json => {
                let value = to_json(&report, image.name, node.driver().name());
                say!("{}", json::pretty(&value));
            }
        }
    }
    drop(node);
    handle.close().await?;
    if report.check_errors > 0 {
        return Err(Failure::new("Check failed"));
    }
    Ok(if report.corruptions > 0 {
        CORRUPTED
    } else if report.leaks > 0 {
        LEAKS
    } else {
        0
    })
}

/// Findings go to standard error, where they don't disturb JSON.
fn tell(findings: &[Finding]) {
    flush_out();
    for finding in findings {
        complain!("{}", finding.message);
    }
}

fn print(report: &CheckReport) {
    if report.is_clean() {
        say!("No errors were found on the image.");
    } else {
        if report.corruptions > 0 {
            say!(
                "\n{} errors were found on the image.\n\
                 Data may be corrupted, or further writes to the image may corrupt it.",
                report.corruptions
            );
        }
        if report.leaks > 0 {
            say!(
                "\n{} leaked clusters were found on the image.\n\
                 This means waste of disk space, but no harm to data.",
                report.leaks
            );
        }
        if report.uncertain > 0 {
            say!(
                "\n{} clusters are leaked, or belong to what could not be read.",
                report.uncertain
            );
        }
        if report.check_errors > 0 {
            say!(
                "\n{} internal errors have occurred during the check.",
                report.check_errors
            );
        }
    }
    if !report.affected.is_empty() {
        say!("");
    }
    for affected in &report.affected {
        say!("{affected}");
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total > 0 && allocated > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        say!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if let Some(end) = report.image_end_offset.filter(|end| *end > 0) {
        say!("Image end offset: {end}");
    }
}

fn to_json(report: &CheckReport, filename: &str, format: &str) -> Value {
    let mut map = Map::new();
    let mut count = |key: &str, value: u64, always: bool| {
        if value > 0 || always {
            map.insert(key.to_owned(), value.into());
        }
    };
    count(
        "image-end-offset",
        report.image_end_offset.unwrap_or(0),
        false,
    );
    count("compressed-clusters", report.compressed_clusters, false);
    count("total-clusters", report.total_clusters, false);
    count("corruptions", report.corruptions, false);
    count("corruptions-fixed", report.corruptions_fixed, false);
    count("check-errors", report.check_errors, true);
    count("leaks", report.leaks, false);
    count("uncertain-leaks", report.uncertain, false);
    count("leaks-fixed", report.leaks_fixed, false);
    count("allocated-clusters", report.allocated_clusters, false);
    count("fragmented-clusters", report.fragmented_clusters, false);
    if !report.affected.is_empty() {
        let ranges = report.affected.iter().map(affected_to_json).collect();
        map.insert("affected".into(), Value::Array(ranges));
    }
    map.insert("filename".into(), filename.into());
    map.insert("format".into(), format.into());
    Value::Object(map)
}

/// `snapshot` and `with-snapshot` are null for the disk as it is; `with-start` is there when the other owner is data.
fn affected_to_json(affected: &Affected) -> Value {
    let mut value = json!({
        "start": affected.start,
        "length": affected.length,
        "snapshot": affected.snapshot,
        "with": affected.with,
        "separated": affected.separated,
    });
    if let Some(start) = affected.with_start {
        value["with-start"] = start.into();
        value["with-snapshot"] = json!(affected.with_snapshot);
    }
    value
}
