//! `blk commit`: writes what an overlay holds into the image below it. The copying is the commit job's, as for a disk in
//! use; the one thing that is done here is to empty the overlay afterwards.

use std::{pin::pin, time::Duration};

use block_core::{ErrorKind, Node};
use futures::future::{Either, select};
use jobs::{CommitOptions, Job};

use super::{
    Command,
    args::{self, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, one_image},
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access},
    output::say,
    progress::Meter,
    session::Session,
    size::{MAX_SIZE, parse_number},
};

pub const COMMAND: Command = Command {
    name: "commit",
    about: "Write what an overlay holds into its backing file",
    usage: "[-q] [-p] [-f FMT | --image-opts] [-t CACHE] [-b BASE] [-d] [-r RATE] FILE",
    options: &[
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Opt::value('t', "cache", "CACHE", "cache mode (default: writeback)"),
        Opt::value(
            'b',
            "base",
            "BASE",
            "the image of the chain to write to; implies -d",
        ),
        Opt::flag('d', "drop", "don't empty FILE afterwards"),
        Opt::value('r', "rate", "RATE", "bytes per second, at most"),
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(100);

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let cache = args::cache(
        parsed,
        "cache",
        CacheMode::WRITEBACK,
        "Invalid cache option",
    )?;
    let rate = match parsed.get("rate") {
        Some(text) => parse_number("rate limit", text, 0, MAX_SIZE)?,
        None => 0,
    };
    let image = one_image(parsed, "commit")?;
    let quiet = parsed.has("quiet");
    let access = Access {
        write: true,
        unmap: true,
        cache,
        ..Access::default()
    };
    let top = open::open(session, image, access).await?;
    let chain = top.node().chain();
    let (base, drop_only) = match parsed.get("base") {
        Some(name) => match chain.iter().find(|node| is_called(node, name)) {
            Some(base) => (base, true),
            None => {
                return Err(Failure::new(format!(
                    "Did not find '{name}' in the backing chain of '{}'",
                    image.name
                )));
            }
        },
        None => match chain.first() {
            Some(base) => (base, parsed.has("drop")),
            None => return Err(Failure::new("Image does not have a backing file")),
        },
    };
    let meter = Meter::new(parsed.has("progress") && !quiet, 1.0);
    session.signals.show(&meter);
    let mut options = CommitOptions::new(&top.node()).base(base);
    options.job.speed = rate;
    let job = session.jobs.commit(options).await?;
    let failed = |error| Failure::io("Block job failed", &error);
    follow(&job, &meter).await.map_err(failed)?;
    // Both show the same now. Cancelled when it is ready, the job leaves FILE where it is, and in the state it was in.
    job.cancel(false)?;
    job.wait().await.map_err(failed)?;
    if !drop_only {
        match top.make_empty().await {
            // It then still says the same as its backing file.
            Err(error) if error.kind() == ErrorKind::NotSupported => {}
            other => other
                .map_err(|error| Failure::context("Could not empty the committed image", &error))?,
        }
    }
    meter.finish();
    drop(chain);
    top.close().await?;
    if !quiet {
        say!("Image committed.");
    }
    Ok(0)
}

/// Waits until `job` is ready, and shows how far it is.
async fn follow(job: &Job, meter: &Meter) -> block_core::Result<()> {
    let mut ready = pin!(job.wait_ready());
    loop {
        let tick = job.env().sleep(TICK);
        if let Either::Left((result, _)) = select(ready.as_mut(), tick).await {
            return result;
        }
        let info = job.info();
        meter.set(info.current_progress, info.total_progress);
    }
}

/// Whether a user would call `node` by `name`.
fn is_called(node: &Node, name: &str) -> bool {
    let Some(file) = node.filename() else {
        return false;
    };
    if file == name {
        return true;
    }
    match (std::fs::canonicalize(&file), std::fs::canonicalize(name)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
