//! `blk convert`: copies images into a new one (or an existing one) of any format.
//!
//! This file reads the arguments and prepares both ends; [`plan`] finds out what is where, [`copy`] moves the bytes.

mod bitmaps;
mod copy;
mod pace;
mod plan;
mod runs;
mod target;

use std::sync::Arc;

use block_core::BlockHandle;

use self::{
    bitmaps::ToCopy,
    copy::{SPARSE, WORKERS},
};
pub use self::{
    copy::{Engine, Settings},
    plan::{Plan, Source},
    target::{Request, Target},
};
use super::{
    Command,
    args::{self, FORCE_SHARE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, asks_for_help, option_list},
    create_options::CreateOptions,
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access, ImageSpec},
    progress::Meter,
    session::Session,
    size::{MAX_SIZE, parse_number},
    snapshots,
};

pub const COMMAND: Command = Command {
    name: "convert",
    about: "Copy one or more images into another, converting the format",
    usage: "[-q] [-p] [-f FMT | --image-opts] [-T CACHE] [-U] [-l SNAPSHOT] [-O FMT] [-o OPTIONS] [-t CACHE] [-c] \
            [-B FILE -F FMT] [-n [--target-is-zero]] [-S SIZE] [-m N] [-W] [-C] [-r RATE] \
            [--salvage] [--bitmaps [--skip-broken-bitmaps]] FILE... TARGET",
    options: &[
        QUIET,
        PROGRESS,
        IMAGE_OPTS,
        Opt::flag(' ', "source-image-opts", "the same as --image-opts"),
        Opt::value(
            'f',
            "source-format",
            "FMT",
            "format of FILE (default: found by probing)",
        ),
        Opt::value(
            'T',
            "source-cache",
            "CACHE",
            "cache mode of FILE (default: writeback)",
        ),
        FORCE_SHARE,
        Opt::value(
            'l',
            "snapshot",
            "SNAPSHOT",
            "copy FILE as it was then: snapshot.id=ID,snapshot.name=NAME, or either",
        ),
        Opt::value(
            'O',
            "target-format",
            "FMT",
            "format of TARGET (default: raw)",
        ),
        Opt::value(
            'o',
            "target-options",
            "OPTIONS",
            "options of the format; '-o help' lists them",
        ),
        Opt::flag(
            ' ',
            "target-image-opts",
            "TARGET is a list of options; needs -n",
        ),
        Opt::value(
            't',
            "target-cache",
            "CACHE",
            "cache mode of TARGET (default: unsafe)",
        ),
        Opt::flag('c', "compress", "write compressed clusters"),
        Opt::value(
            'B',
            "backing",
            "FILE",
            "backing file of TARGET, with FILE's base as content",
        ),
        Opt::value('F', "backing-format", "FMT", "format of the backing file"),
        Opt::flag('n', "no-create", "TARGET exists"),
        Opt::flag(
            ' ',
            "target-is-zero",
            "TARGET reads as zeroes everywhere; needs -n",
        ),
        Opt::value(
            'S',
            "sparse-size",
            "SIZE",
            "least run of zeroes that becomes a hole (default: 4k); 0 for none",
        ),
        Opt::value(
            'm',
            "parallel",
            "N",
            "requests in flight, 1 to 16 (default: 8)",
        ),
        Opt::flag('W', "oob-writes", "write in any order"),
        Opt::flag(
            'C',
            "copy-range-offloading",
            "let the storage copy by itself where it can",
        ),
        Opt::value('r', "rate", "RATE", "bytes per second, at most"),
        Opt::flag(' ', "salvage", "write zeroes where FILE can't be read"),
        Opt::flag(
            ' ',
            "bitmaps",
            "copy the persistent bitmaps of the one FILE, too",
        ),
        Opt::flag(
            ' ',
            "skip-broken-bitmaps",
            "with --bitmaps: leave out those that can't be trusted",
        ),
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// The largest `-S`.
const MAX_SPARSE: u64 = 16 << 20;

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let list = option_list(parsed, "target-options")?;
    let target_format = parsed.get("target-format").unwrap_or("raw");
    if asks_for_help(list.as_deref()) && !parsed.has("no-create") {
        let file = parsed.free.last().filter(|_| parsed.free.len() > 1);
        CreateOptions::print_help(&session.registry, target_format, file.map(String::as_str))?;
        return Ok(0);
    }
    let arguments = Arguments::read(parsed)?;
    let [sources @ .., target] = parsed.free.as_slice() else {
        return Err(Failure::new("Must specify image file name"));
    };
    if sources.is_empty() {
        return Err(Failure::new("Must specify image file name"));
    }
    let snapshot = parsed.get("snapshot").map(snapshots::parse).transpose()?;
    if snapshot.is_some() && sources.len() > 1 {
        return Err(Failure::new(
            "No support for concatenating multiple snapshot",
        ));
    }
    let access = Access {
        force_share: parsed.has("force-share"),
        cache: arguments.source_cache,
        ..Access::default()
    };
    let mut opened = Vec::new();
    for name in sources {
        let image = ImageSpec {
            name,
            format: parsed.get("source-format"),
            image_opts: arguments.source_image_opts,
        };
        let source = match &snapshot {
            Some(key) => snapshots::open(session, image, access, key).await?,
            None => open::open(session, image, access).await?,
        };
        opened.push(Arc::new(source));
    }
    let bitmaps = match opened.as_slice() {
        _ if !parsed.has("bitmaps") => None,
        [source] => {
            let skip = parsed.has("skip-broken-bitmaps");
            Some(ToCopy::of(source, skip, session.program)?)
        }
        _ => {
            return Err(Failure::new(
                "Copying bitmaps only possible with single source",
            ));
        }
    };
    let failure = format!("error while converting {target_format}");
    let request = Request {
        name: target,
        format: target_format,
        list: list.as_deref(),
        image_opts: parsed.has("target-image-opts"),
        exists: parsed.has("no-create"),
        is_zero: parsed.has("target-is-zero"),
        backing: parsed.get("backing"),
        backing_format: parsed.get("backing-format"),
        compress: parsed.has("compress"),
        bitmaps: parsed.has("bitmaps"),
        cache: arguments.target_cache,
        failure: &failure,
    };
    let length = opened.iter().map(|source| source.length()).sum();
    request.check(session, sources.len())?;
    let target = Target::prepare(session, &request, length).await?;
    let meter = Meter::new(parsed.has("progress") && !parsed.has("quiet"), 1.0);
    meter.set_total(length);
    session.signals.show(&meter);
    let settings = Settings {
        quiet: parsed.has("quiet"),
        compress: request.compress,
        copy_range: parsed.has("copy-range-offloading"),
        any_order: parsed.has("oob-writes"),
        salvage: parsed.has("salvage"),
        sparse: arguments.sparse,
        workers: arguments.workers,
        rate: arguments.rate,
        ..Settings::plain(session)
    };
    let sources = opened
        .iter()
        .map(|handle| Source::new(handle.clone(), target.has_backing && sources.len() == 1))
        .collect();
    let unit = if request.compress { target.cluster } else { 1 };
    let plan = Plan::new(sources, settings.salvage, settings.sparse.is_some(), unit);
    let target = Arc::new(target);
    Engine::new(plan, target.clone(), settings, meter.clone())
        .run(session)
        .await?;
    if let Some(bitmaps) = bitmaps {
        bitmaps.copy(&target.handle).await?;
    }
    close(opened, target).await?;
    meter.finish();
    Ok(0)
}

/// Closes both ends, which nobody uses any more. The target is flushed.
pub async fn close(sources: Vec<Arc<BlockHandle>>, target: Arc<Target>) -> Result<(), Failure> {
    for source in sources {
        if let Ok(source) = Arc::try_unwrap(source) {
            source.close().await?;
        }
    }
    if let Ok(target) = Arc::try_unwrap(target) {
        target.close().await?;
    }
    Ok(())
}

/// What stands in the arguments, beyond names and formats.
struct Arguments {
    source_image_opts: bool,
    source_cache: CacheMode,
    target_cache: CacheMode,
    /// Least run of zeroes that becomes a hole; `None` for none.
    sparse: Option<u64>,
    workers: usize,
    rate: Option<u64>,
}

impl Arguments {
    fn read(parsed: &Parsed) -> Result<Self, Failure> {
        let source_image_opts = parsed.has("image-opts") || parsed.has("source-image-opts");
        if source_image_opts && parsed.has("source-format") {
            return Err(args::exclusive());
        }
        if parsed.has("skip-broken-bitmaps") && !parsed.has("bitmaps") {
            return Err(Failure::new(
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ));
        }
        let sparse = match parsed.get("sparse-size") {
            None => Some(SPARSE),
            Some(text) => {
                let bytes = parse_number("buffer size for sparse output", text, 0, MAX_SIZE);
                // All wrong numbers get the sentence that says what is right.
                match bytes {
                    Ok(0) => None,
                    Ok(bytes) if bytes % 512 == 0 && bytes <= MAX_SPARSE => Some(bytes),
                    Err(failure) if block_core::options::parse_size(text).is_err() => {
                        return Err(failure);
                    }
                    _ => {
                        return Err(Failure::new(
                            "Invalid buffer size for sparse output specified. Valid sizes are multiples of \
                             512 up to 16777216. Select 0 to disable sparse detection (fully allocates \
                             output).",
                        ));
                    }
                }
            }
        };
        let workers = match parsed.get("parallel") {
            Some(text) => parse_number("number of coroutines", text, 1, 16)? as usize,
            None => WORKERS,
        };
        let rate = match parsed.get("rate") {
            Some(text) => Some(parse_number("rate limit", text, 0, MAX_SIZE)?),
            None => None,
        };
        let source_cache = args::cache(
            parsed,
            "source-cache",
            CacheMode::WRITEBACK,
            "Invalid source cache option",
        )?;
        let target_cache = args::cache(
            parsed,
            "target-cache",
            CacheMode::UNSAFE,
            "Invalid cache option",
        )?;
        if parsed.has("copy-range-offloading") {
            for (option, name) in [("sparse-size", "-S"), ("compress", "-c")] {
                if parsed.has(option) {
                    return Err(Failure::new(format!(
                        "Cannot enable copy offloading when {name} is used"
                    )));
                }
            }
        }
        Ok(Self {
            source_image_opts,
            source_cache,
            target_cache,
            sparse,
            workers,
            rate: rate.filter(|rate| *rate > 0),
        })
    }
}
