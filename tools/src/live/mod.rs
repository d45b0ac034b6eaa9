//! `blk live`: guest I/O on a live chain of images while commit, stream, mirror and backup run, with a verdict on every
//! byte.
//!
//! The user's base image is opened for reading only; everything else is made in a scratch directory and removed.

mod disk;
mod guest;
mod oracle;
mod phases;
mod report;
mod table;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use block_core::{Environment, Options, PermissionSet, Permissions};
use clap::Parser;
use futures::future::{Either, select};
use parking_lot::Mutex;

use self::{
    disk::{Lab, text},
    guest::Load,
    oracle::{SECTOR, fill},
    phases::{Run, Step},
    report::Report,
    table::Table,
};
use crate::common::{
    open::follows_names,
    output::{complain, say},
    program::Program,
    session::Session,
};

/// Bytes of the base image that is made when the user gives none.
const OWN_BASE: u64 = 64 << 20;

/// Runs commit, stream, mirror and backup on a live chain while a guest writes, and verifies every byte.
#[derive(Debug, Parser)]
#[command(name = "blk live", disable_version_flag = true)]
struct Arguments {
    /// The image that the chain starts from; it is never modified. A small one is made when absent.
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// The format of the base image; probed when absent.
    #[arg(long, value_name = "FORMAT", requires = "base")]
    base_format: Option<String>,
    /// The seed of everything that is random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// About how long it runs, verification not counted.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Queues of the guest.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Requests in flight in each queue.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    queue_depth: u16,
    /// The directory in which a scratch directory is made; needs room for several copies of the disk.
    #[arg(long, value_name = "DIRECTORY")]
    scratch: Option<PathBuf>,
    /// Keep the scratch directory.
    #[arg(long)]
    keep: bool,
    /// How the report is printed.
    #[arg(long, default_value = "human", value_parser = ["human", "json"])]
    output: String,
    /// Show nothing but the report.
    #[arg(long, short)]
    quiet: bool,
}

/// Runs the command; gives the exit status: 0 all is right, 1 something is wrong, 2 inconclusive, 130 interrupted.
pub fn run(program: Program, args: &[String]) -> u8 {
    let words = std::iter::once("blk live".to_owned()).chain(args.iter().cloned());
    let arguments = match Arguments::try_parse_from(words) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help goes to standard output, errors to standard error; there is nothing to do if neither is there.
            let _ = error.print();
            return u8::from(error.use_stderr());
        }
    };
    let session = match Session::new(program) {
        Ok(session) => session,
        Err(failure) => {
            failure.report(program);
            return failure.code;
        }
    };
    let name = program.name();
    let parent = arguments.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = match tempfile::Builder::new()
        .prefix("blk-live-")
        .tempdir_in(&parent)
    {
        Ok(directory) => directory,
        Err(error) => {
            complain!(
                "{name}: can't make a scratch directory in '{}': {error}",
                parent.display()
            );
            return 1;
        }
    };
    let status = match session
        .env
        .block_on(live(&session, &arguments, scratch.path()))
    {
        Ok(report) => {
            if arguments.output == "json" {
                match serde_json::to_string_pretty(&report) {
                    Ok(json) => say!("{json}"),
                    Err(error) => complain!("{name}: can't write the report: {error}"),
                }
            } else {
                say!("{}", report.human().trim_end());
            }
            report.status()
        }
        Err(Stopped::Interrupted) => {
            complain!("{name}: interrupted");
            130
        }
        Err(Stopped::Failed(text)) => {
            complain!("{name}: {text}");
            1
        }
    };
    if arguments.keep {
        let path = scratch.keep();
        complain!("{name}: the images are in '{}'", path.display());
    }
    session.end_trace(status)
}

enum Stopped {
    Interrupted,
    Failed(String),
}

async fn live(session: &Session, arguments: &Arguments, scratch: &Path) -> Result<Report, Stopped> {
    let failed = |text: String| Stopped::Failed(text);
    let env: Arc<dyn Environment> = session.env.clone();
    let begun = env.now();
    let base = match &arguments.base {
        Some(file) => file.clone(),
        None => own_base(scratch, arguments.seed).map_err(failed)?,
    };
    let (format, size) = inspect(session, &base, arguments.base_format.as_deref())
        .await
        .map_err(failed)?;
    let before = fingerprint(&base).map_err(failed)?;
    let table = Table::new(arguments.quiet);
    table.event(&format!(
        "base '{}': {format}, {} MiB; seed {}; images in '{}'",
        base.display(),
        size >> 20,
        arguments.seed,
        scratch.display()
    ));
    table.start(&env);
    let load = Load {
        queues: usize::from(arguments.queues),
        depth: usize::from(arguments.queue_depth),
        seed: arguments.seed,
        cluster: 64 << 10,
    };
    let run = Run {
        lab: Lab {
            graph: session.graph.clone(),
            registry: session.registry.clone(),
            scratch: scratch.to_owned(),
            base: (
                std::path::absolute(&base).unwrap_or_else(|_| base.clone()),
                format,
            ),
            size,
            cluster: load.cluster,
        },
        manager: session.jobs.clone(),
        table: table.clone(),
        // Six jobs one after another, and two slices for those side by side.
        slice: Duration::from_secs(arguments.seconds.max(1)) / 10,
        load,
        jobs: Mutex::default(),
        disks: Mutex::default(),
        counters: Mutex::default(),
        images: Mutex::default(),
    };
    let outcome = {
        let work = Box::pin(all(&run));
        match select(work, Box::pin(session.signals.interrupted())).await {
            Either::Left((outcome, _)) => Some(outcome),
            // Dropping the work drops the disks, and with them the guests.
            Either::Right(((), _)) => None,
        }
    };
    table.end();
    let mut report = Report {
        seed: arguments.seed,
        base: text(&base),
        size,
        proof: run.proof(),
        ..Report::default()
    };
    if !matches!(outcome, Some(Ok(()))) {
        // Whatever still runs is brought to its end, so that every image is closed.
        run.manager.cancel_all().await;
        for _ in 0..5000 {
            if session.graph.nodes().is_empty() || session.graph.close_all().await.is_err() {
                break;
            }
            env.sleep(Duration::from_millis(1)).await;
        }
    }
    match outcome {
        None => return Err(Stopped::Interrupted),
        Some(Err(text)) => report.failures.push(text),
        Some(Ok(())) => {}
    }
    if report.failures.is_empty()
        && let Err(error) = session.graph.close_all().await
    {
        report.failures.push(format!("closing images: {error}"));
    }
    check_all(&run, &mut report).await;
    report.base_unchanged = fingerprint(&base).is_ok_and(|after| after == before);
    if !report.base_unchanged {
        report
            .failures
            .push(format!("the base image '{}' was modified", base.display()));
    }
    report.jobs = std::mem::take(&mut *run.jobs.lock());
    report.disks = std::mem::take(&mut *run.disks.lock());
    report.seconds = env.now().saturating_sub(begun).as_secs_f64();
    report.judge();
    Ok(report)
}

async fn all(run: &Run) -> Step {
    run.one_after_another().await?;
    run.side_by_side().await
}

/// Runs check on every image of the run.
async fn check_all(run: &Run, report: &mut Report) {
    let mut images = std::mem::take(&mut *run.images.lock());
    images.sort();
    images.dedup();
    for image in images {
        match run.lab.check(&image).await {
            Ok(result) if result.is_clean() => report.images_checked += 1,
            Ok(result) => {
                let first = result
                    .findings
                    .first()
                    .map_or("", |finding| finding.message.as_str());
                report.failures.push(format!(
                    "check of '{}': {} corruptions, {} leaks, {} errors; {first}",
                    image.display(),
                    result.corruptions,
                    result.leaks,
                    result.check_errors
                ));
            }
            Err(error) => report
                .failures
                .push(format!("check of '{}': {error}", image.display())),
        }
    }
}

/// Makes a raw base image with data in two thirds of it.
fn own_base(scratch: &Path, seed: u64) -> Step<PathBuf> {
    use std::os::unix::fs::FileExt;
    let path = scratch.join("base.raw");
    let failed = |error: std::io::Error| format!("can't make '{}': {error}", path.display());
    let file = std::fs::File::create(&path).map_err(failed)?;
    file.set_len(OWN_BASE).map_err(failed)?;
    let piece = 1u64 << 20;
    let mut data = vec![0; piece as usize];
    for at in (0..OWN_BASE).step_by(piece as usize) {
        if at / piece % 3 == 2 {
            continue;
        }
        for (index, sector) in data.chunks_mut(SECTOR as usize).enumerate() {
            fill(sector, !seed, 1, at / SECTOR + index as u64);
        }
        file.write_all_at(&data, at).map_err(failed)?;
    }
    Ok(path)
}

/// The base image's format and its size in bytes, cut to whole sectors.
async fn inspect(session: &Session, base: &Path, format: Option<&str>) -> Step<(String, u64)> {
    let failed = |error: block_core::Error| format!("Could not open '{}': {error}", base.display());
    let node = session
        .registry
        .open_file(
            &session.graph,
            &text(base),
            format,
            Options::new().with("read-only", true),
            follows_names(),
        )
        .await
        .map_err(failed)?;
    let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let handle = session
        .graph
        .attach(&node, reader, "base")
        .map_err(failed)?;
    let found = (
        node.driver().name().to_owned(),
        handle.length() / SECTOR * SECTOR,
    );
    handle.close().await.map_err(failed)?;
    if found.1 < 8 << 20 {
        return Err(format!(
            "'{}' is too small: at least 8 MiB are needed",
            base.display()
        ));
    }
    Ok(found)
}

/// Length, time of modification, and a checksum of the content.
fn fingerprint(file: &Path) -> Step<(u64, std::time::SystemTime, u32)> {
    use std::io::Read;
    let failed = |error: std::io::Error| format!("can't read '{}': {error}", file.display());
    let mut input = std::fs::File::open(file).map_err(failed)?;
    let meta = input.metadata().map_err(failed)?;
    let mut sum = crc32fast::Hasher::new();
    let mut data = vec![0; 1 << 20];
    loop {
        let got = input.read(&mut data).map_err(failed)?;
        if got == 0 {
            break;
        }
        sum.update(&data[..got]);
    }
    let modified = meta.modified().map_err(failed)?;
    Ok((meta.len(), modified, sum.finalize()))
}
