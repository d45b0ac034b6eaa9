//! `blk commit`: writes what an overlay holds into the image below it.
//!
//! Nobody else uses the images meanwhile, so that no filter is needed: the edge to the base is taken out, the base is
//! opened for writing, and what the layers above decide is copied into it.

use std::sync::Arc;

use block_core::{
    BlockHandle, Buffer, ErrorKind, Node, PermissionSet, Permissions, RequestFlags,
    driver::{Reopen, Truncate},
};

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

/// Bytes that are copied at a time.
const CHUNK: u64 = 1 << 20;

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
        cache,
        ..Access::default()
    };
    let top = open::open(session, image, access).await?;
    let chain = top.node().chain();
    let (base, drop_only) = match parsed.get("base") {
        Some(name) => match chain.iter().find(|node| is_called(node, name)) {
            Some(base) => (base.clone(), true),
            None => {
                return Err(Failure::new(format!(
                    "Did not find '{name}' in the backing chain of '{}'",
                    image.name
                )));
            }
        },
        None => match chain.first() {
            Some(base) => (base.clone(), parsed.has("drop")),
            None => return Err(Failure::new("Image does not have a backing file")),
        },
    };
    let meter = Meter::new(parsed.has("progress") && !quiet, 1.0);
    session.signals.show(&meter);
    let job = Commit {
        session,
        top: &top,
        base: &base,
        rate,
    };
    let result = job.run(&meter, !drop_only).await;
    meter.finish();
    // It was kept while it had no parent. From here on it is closed with the image above it, or now.
    let released = session.graph.release(&base).await;
    result?;
    released?;
    drop(base);
    drop(chain);
    top.close().await?;
    if !quiet {
        say!("Image committed.");
    }
    Ok(0)
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

struct Commit<'a> {
    session: &'a Session,
    top: &'a BlockHandle,
    base: &'a Arc<Node>,
    /// Bytes per second, or 0.
    rate: u64,
}

impl Commit<'_> {
    async fn run(&self, meter: &Meter, empty: bool) -> Result<(), Failure> {
        let graph = &self.session.graph;
        // The layer just above the base.
        let mut lowest = self.top.node();
        for node in self.top.node().chain() {
            if node.id() == self.base.id() {
                break;
            }
            lowest = node;
        }
        let about =
            |error: &block_core::Error| Failure::context("Error while committing image", error);
        graph.keep(self.base);
        graph
            .set_backing(&lowest, None)
            .await
            .map_err(|error| about(&error))?;
        graph
            .reopen(
                self.base,
                Reopen {
                    read_only: Some(false),
                    ..Reopen::default()
                },
            )
            .await
            .map_err(|error| about(&error))?;
        let used = Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE;
        let target = graph
            .attach(
                self.base,
                PermissionSet::new(used, Permissions::all()),
                "commit",
            )
            .map_err(|error| about(&error))?;
        target.set_write_through(false);
        if target.length() < self.top.length() {
            target
                .truncate(self.top.length(), Truncate::default())
                .await
                .map_err(|error| about(&error))?;
        }
        self.copy(&target, meter).await?;
        target.flush().await.map_err(|error| about(&error))?;
        drop(target);
        if empty {
            match self.top.make_empty().await {
                // It then still says the same as its backing file.
                Err(error) if error.kind() == ErrorKind::NotSupported => {}
                other => other.map_err(|error| {
                    Failure::context("Could not empty the committed image", &error)
                })?,
            }
        }
        graph
            .set_backing(&lowest, Some(self.base))
            .await
            .map_err(|error| about(&error))?;
        Ok(())
    }

    /// Copies all that the layers above the base decide.
    async fn copy(&self, target: &BlockHandle, meter: &Meter) -> Result<(), Failure> {
        let length = self.top.length();
        meter.set_total(length);
        let env = &self.session.graph.env().clone();
        let mut buffer = Buffer::try_new(length.min(CHUNK) as usize)?;
        let (start, mut sent) = (env.now(), 0u64);
        let mut offset = 0;
        while offset < length {
            let status = self
                .top
                .block_status(offset, length - offset)
                .await
                .map_err(|error| {
                    Failure::io(
                        format_args!("error while reading block status at offset {offset}"),
                        &error,
                    )
                })?;
            let mut len = status.len.max(1).min(length - offset);
            if !status.is_allocated() {
            } else if status.is_zero() {
                target
                    .write_zeroes(offset, len, RequestFlags::MAY_UNMAP)
                    .await
                    .map_err(|error| writing(offset, &error))?;
            } else {
                len = len.min(CHUNK);
                buffer.resize(len as usize);
                buffer = self.top.read_into(offset, buffer).await.map_err(|error| {
                    Failure::io(format_args!("error while reading at byte {offset}"), &error)
                })?;
                let data = block_core::IoBuf::from(buffer);
                target
                    .write(offset, data.clone(), RequestFlags::empty())
                    .await
                    .map_err(|error| writing(offset, &error))?;
                buffer = match data.try_into_buffer() {
                    Ok(buffer) => buffer,
                    Err(_) => Buffer::try_new(length.min(CHUNK) as usize)?,
                };
                sent += len;
                if self.rate > 0 {
                    let due = std::time::Duration::from_secs_f64(sent as f64 / self.rate as f64);
                    let passed = env.now().saturating_sub(start);
                    if due > passed {
                        env.sleep(due.saturating_sub(passed)).await;
                    }
                }
            }
            offset += len;
            meter.advance(len);
        }
        Ok(())
    }
}

fn writing(offset: u64, error: &block_core::Error) -> Failure {
    Failure::io(format_args!("error while writing at byte {offset}"), error)
}
