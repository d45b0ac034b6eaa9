//! `blk amend`: changes what an image was made with, such as its compatibility level.

use std::{pin::pin, time::Duration};

use block_core::{Capabilities, image::Progress};
use futures::future::{Either, select};

use super::{
    Command,
    args::{self, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, one_image},
    create_options::CreateOptions,
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access},
    progress::Meter,
    session::Session,
};

pub const COMMAND: Command = Command {
    name: "amend",
    about: "Change format-specific options of an image",
    usage: "[-p] [-q] [-f FMT | --image-opts] [-t CACHE] [--force] -o OPTIONS FILE",
    options: &[
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Opt::value('t', "cache", "CACHE", "cache mode (default: writeback)"),
        Opt::flag(
            ' ',
            "force",
            "allow what may lose data, such as erasing the last key",
        ),
        Opt::value(
            'o',
            "options",
            "OPTIONS",
            "what to change, as name=value,…; `-o help` lists what can be",
        ),
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// Between two looks at how far it is.
const TICK: Duration = Duration::from_millis(100);

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let Some(list) = args::option_list(parsed, "options")? else {
        return Err(Failure::usage("amend", "Must specify options (-o)"));
    };
    let cache = args::cache(
        parsed,
        "cache",
        CacheMode::WRITEBACK,
        "Invalid cache option",
    )?;
    let help = args::asks_for_help(Some(&list));
    if let (true, Some(format)) = (help, parsed.get("format")) {
        return show_help(session, format);
    }
    let [_] = parsed.free.as_slice() else {
        return Err(Failure::new("Expecting one image file name"));
    };
    let image = one_image(parsed, "amend")?;
    let access = Access {
        write: true,
        resize: true,
        cache,
        ..Access::default()
    };
    let handle = open::open(session, image, access).await?;
    let driver = handle.node().driver().name();
    if help {
        handle.close().await?;
        return show_help(session, driver);
    }
    let mut options = options_of(session, driver)?;
    let can = handle.node().driver().capabilities();
    if !can.contains(Capabilities::AMEND) {
        return Err(cannot(driver));
    }
    options.read(&list)?;
    let meter = Meter::new(parsed.has("progress") && !parsed.has("quiet"), 1.0);
    let progress = Progress::new();
    let done = {
        let force = parsed.has("force");
        let work = handle.amend(options.values(), force, progress.clone());
        let mut work = pin!(work);
        let graph = handle.graph()?;
        loop {
            let tick = graph.env().sleep(TICK);
            match select(work.as_mut(), tick).await {
                Either::Left((done, _)) => break done,
                Either::Right(_) => meter.set(progress.current(), progress.total()),
            }
        }
    };
    match &done {
        Ok(()) => meter.finish(),
        Err(_) => meter.end_line(),
    }
    done?;
    handle.close().await?;
    Ok(0)
}

fn cannot(format: &str) -> Failure {
    Failure::new(format!(
        "Format driver '{format}' does not support option amendment"
    ))
}

fn options_of(session: &Session, format: &str) -> Result<CreateOptions, Failure> {
    let factory = session
        .registry
        .get(format)
        .map_err(|_| Failure::new(format!("Unknown file format '{format}'")))?;
    CreateOptions::of_amend(&**factory).ok_or_else(|| cannot(format))
}

fn show_help(session: &Session, format: &str) -> Outcome {
    options_of(session, format)?.print_amend_help();
    Ok(0)
}
