//! `blk bench`: sends requests at a fixed depth and says how long they took.

use std::time::Duration;

use block_core::{BlockHandle, Buffer, IoBuf, Options, RequestFlags};
use futures::{StreamExt, stream::FuturesUnordered};

use super::{
    Command,
    args::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, one_image},
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access, ImageSpec},
    output::{flush_out, say},
    session::Session,
    size::{MAX_SIZE, parse_number},
};

pub const COMMAND: Command = Command {
    name: "bench",
    about: "Send read or write requests to an image and show how long they took",
    usage: "[-q] [-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH] [-o OFFSET] [-s SIZE] \
            [-S STEP] [-i AIO] [-n] [-w [--pattern BYTE] [--flush-interval N [--no-drain]]] [-U] FILE",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        Opt::value('t', "cache", "CACHE", "cache mode (default: writeback)"),
        Opt::value('c', "count", "COUNT", "how many requests (default: 75000)"),
        Opt::value(
            's',
            "buffer-size",
            "SIZE",
            "bytes per request (default: 4096)",
        ),
        Opt::value('d', "depth", "DEPTH", "requests in flight (default: 64)"),
        Opt::value(
            'o',
            "offset",
            "OFFSET",
            "where the first one is (default: 0)",
        ),
        Opt::value(
            'S',
            "step-size",
            "STEP",
            "distance between requests (default: SIZE)",
        ),
        Opt::value('i', "aio", "AIO", "threads, native or io_uring"),
        Opt::flag('n', "native", "the same as -i native"),
        Opt::flag('w', "write", "write instead of reading"),
        Opt::value(' ', "pattern", "BYTE", "write this byte (default: 0)"),
        Opt::value(' ', "flush-interval", "N", "flush after every N requests"),
        Opt::flag(
            ' ',
            "no-drain",
            "don't wait for other requests before a flush",
        ),
        FORCE_SHARE,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// What is to be sent.
#[derive(Debug, Clone, Copy)]
struct Load {
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: u64,
    write: bool,
    pattern: u8,
    flush_interval: u64,
    drain: bool,
}

impl Load {
    fn read(parsed: &Parsed) -> Result<Self, Failure> {
        const INT_MAX: u64 = i32::MAX as u64;
        let number =
            |option: &str, what: &str, default: u64, min: u64, max: u64| match parsed.get(option) {
                Some(text) => parse_number(what, text, min, max),
                None => Ok(default),
            };
        let size = number("buffer-size", "buffer size", 4096, 1, INT_MAX)?;
        let step = number("step-size", "step size", 0, 0, INT_MAX)?;
        let load = Self {
            count: number("count", "request count", 75_000, 1, INT_MAX)?,
            depth: number("depth", "queue depth", 64, 1, INT_MAX)?,
            offset: number("offset", "offset", 0, 0, MAX_SIZE)?,
            size,
            step: if step == 0 { size } else { step },
            write: parsed.has("write"),
            pattern: number("pattern", "pattern byte", 0, 0, 255)? as u8,
            flush_interval: number("flush-interval", "flush interval", 0, 0, INT_MAX)?,
            drain: !parsed.has("no-drain"),
        };
        if load.flush_interval > 0 && !load.write {
            return Err(Failure::new(
                "--flush-interval is only available in write tests",
            ));
        }
        if load.flush_interval > 0 && load.flush_interval < load.depth {
            return Err(Failure::new("Flush interval can't be smaller than depth"));
        }
        Ok(load)
    }
}

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let load = Load::read(parsed)?;
    let cache = match parsed.get("cache") {
        None => CacheMode::WRITEBACK,
        Some(name) => CacheMode::parse(name).ok_or_else(|| Failure::new("Invalid cache mode"))?,
    };
    let aio = match parsed.get("aio") {
        Some(aio @ ("threads" | "native" | "io_uring")) => Some(aio),
        Some(other) => return Err(Failure::new(format!("Invalid aio option: {other}"))),
        None => parsed.has("native").then_some("native"),
    };
    let image = one_image(parsed, "bench")?;
    let access = Access {
        write: load.write,
        force_share: parsed.has("force-share"),
        cache,
        ..Access::default()
    };
    let with_aio = match aio {
        Some(aio) if !image.image_opts => Some(options_with_aio(session, image, aio)?),
        _ => None,
    };
    let handle = match &with_aio {
        Some(options) => {
            let spec = ImageSpec {
                name: options,
                format: None,
                image_opts: true,
            };
            open::open_quietly(session, spec, access)
                .await
                .map_err(|error| Failure::open(image.name, &error))?
        }
        None => open::open(session, image, access).await?,
    };
    say!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        load.count,
        if load.write { "write" } else { "read" },
        load.size,
        load.depth,
        load.offset,
        load.step
    );
    if load.flush_interval > 0 {
        say!("Sending flush every {} requests", load.flush_interval);
    }
    flush_out();
    let env = session.graph.env();
    let start = env.now();
    run(&handle, load)
        .await
        .map_err(|error| Failure::io("Failed request", &error))?;
    let took: Duration = env.now().saturating_sub(start);
    say!("Run completed in {:.3} seconds.", took.as_secs_f64());
    handle.close().await?;
    Ok(0)
}

/// The options of an image whose storage uses `aio`.
fn options_with_aio(session: &Session, image: ImageSpec<'_>, aio: &str) -> Result<String, Failure> {
    let mut file = session.registry.filename_options(image.name)?;
    if file.get_str("driver") != Some("file") && file.get_str("driver") != Some("host_device") {
        return Err(Failure::new("the aio option needs a plain file name"));
    }
    file.set("aio", aio);
    let mut options = Options::new().with("file", serde_json::Value::Object(file.0));
    if let Some(format) = image.format {
        options.set("driver", format);
    }
    Ok(options.to_json())
}

async fn run(handle: &BlockHandle, load: Load) -> block_core::Result<()> {
    let length = handle.length();
    let last = length.saturating_sub(load.size);
    let data = IoBuf::from(vec![
        load.pattern;
        if load.write { load.size as usize } else { 0 }
    ]);
    let mut flying = FuturesUnordered::new();
    let mut spare: Vec<Buffer> = Vec::new();
    let mut offset = load.offset;
    for sent in 0..load.count {
        while flying.len() as u64 >= load.depth {
            if let Some(done) = flying.next().await {
                spare.extend(done?);
            }
        }
        if load.flush_interval > 0 && sent > 0 && sent % load.flush_interval == 0 {
            if load.drain {
                while let Some(done) = flying.next().await {
                    spare.extend(done?);
                }
            }
            handle.flush().await?;
        }
        let at = offset;
        offset += load.step;
        if offset > last {
            offset = if length > 0 { offset % length } else { 0 };
            if offset > last {
                offset = 0;
            }
        }
        let data = data.clone();
        let buffer = if load.write {
            None
        } else {
            Some(match spare.pop() {
                Some(buffer) => buffer,
                None => Buffer::try_new(load.size as usize)?,
            })
        };
        flying.push(async move {
            match buffer {
                Some(buffer) => handle.read_into(at, buffer).await.map(Some),
                None => handle
                    .write(at, data, RequestFlags::empty())
                    .await
                    .map(|()| None),
            }
        });
    }
    while let Some(done) = flying.next().await {
        done?;
    }
    Ok(())
}
