//! `blk rebase`: gives an image another backing file. In safe mode the content stays what it was: what the new backing
//! file says differently is copied into the image first. Unsafe mode rewrites the header alone.

use std::sync::Arc;

use block_core::{BlockHandle, Buffer, IoBuf, Node, RequestFlags, resolve_name};

use super::{
    Command,
    args::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, one_image},
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access, ImageSpec},
    progress::Meter,
    session::Session,
};

pub const COMMAND: Command = Command {
    name: "rebase",
    about: "Give an image another backing file, or none",
    usage: "[-q] [-p] [-f FMT | --image-opts] [-t CACHE] [-T CACHE] [-u] [-c] [-U] \
            [-b BACKING_FILE [-F BACKING_FMT]] FILE",
    options: &[
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        Opt::value(
            't',
            "cache",
            "CACHE",
            "cache mode of FILE (default: writeback)",
        ),
        Opt::value(
            'b',
            "backing",
            "FILE",
            "the new backing file; an empty name for none",
        ),
        Opt::value(
            'F',
            "backing-format",
            "FMT",
            "format of the new backing file",
        ),
        Opt::value(
            'T',
            "backing-cache",
            "CACHE",
            "cache mode of the backing files",
        ),
        Opt::flag(
            'u',
            "backing-unsafe",
            "rewrite the header alone; content may change",
        ),
        Opt::flag('c', "compress", "compress what is copied"),
        FORCE_SHARE,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// Bytes that are compared at a time.
const CHUNK: u64 = 1 << 20;

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let cache = args::cache(
        parsed,
        "cache",
        CacheMode::WRITEBACK,
        "Invalid cache option",
    )?;
    let backing_cache = args::cache(
        parsed,
        "backing-cache",
        CacheMode::WRITEBACK,
        "Invalid source cache option",
    )?;
    let image = one_image(parsed, "rebase")?;
    let hollow = parsed.has("backing-unsafe");
    let new = parsed.get("backing");
    if !hollow && new.is_none() {
        return Err(Failure::usage(
            "rebase",
            "Must specify backing file (-b) or use unsafe mode (-u)",
        ));
    }
    let name = new.filter(|name| !name.is_empty());
    let format = parsed.get("backing-format");
    if let Some(format) = format
        && session.registry.get(format).is_err()
    {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    let access = Access {
        write: true,
        no_backing: hollow,
        cache,
        ..Access::default()
    };
    let top = open::open(session, image, access).await?;
    let meter = Meter::new(parsed.has("progress") && !parsed.has("quiet"), 1.0);
    session.signals.show(&meter);
    if !hollow {
        let access = Access {
            cache: backing_cache,
            force_share: parsed.has("force-share"),
            ..Access::default()
        };
        let new = match name {
            None => None,
            Some(name) => {
                let owner = top.node().filename().unwrap_or_default();
                let full = resolve_name(&owner, name);
                let spec = ImageSpec::file(&full, format);
                let opened = open::open_quietly(session, spec, access).await;
                Some(opened.map_err(|error| {
                    Failure::context(
                        format_args!("Could not open new backing file '{name}'"),
                        &error,
                    )
                })?)
            }
        };
        let old = match top.node().backing() {
            None => None,
            Some(node) => Some(session.graph.attach(
                &node,
                block_core::PermissionSet::NONE,
                "old backing file",
            )?),
        };
        let rebase = Rebase {
            top: &top,
            shared: shared_base(old.as_ref(), new.as_ref()),
            old,
            new,
            compress: parsed.has("compress"),
        };
        rebase.run(&meter).await?;
        if let Some(new) = rebase.new {
            new.close().await?;
        }
    }
    let change = match name {
        Some(name) if format.is_none() => Err(Failure::new(format!(
            "Could not change the backing file to '{name}': backing format must be specified"
        ))),
        _ => top
            .change_backing(name, format.filter(|_| name.is_some()))
            .await
            .map_err(|error| {
                let target = name.unwrap_or_default();
                Failure::context(
                    format_args!("Could not change the backing file to '{target}'"),
                    &error,
                )
            }),
    };
    change?;
    meter.finish();
    top.close().await?;
    Ok(0)
}

/// The node of the old chain that is the new backing file, if there is one: what lies below it needn't be looked at.
fn shared_base(old: Option<&BlockHandle>, new: Option<&BlockHandle>) -> Option<Arc<Node>> {
    let wanted = std::fs::canonicalize(new?.node().filename()?).ok()?;
    let old = old?.node();
    std::iter::once(old.clone())
        .chain(old.chain())
        .find(|node| {
            node.filename()
                .and_then(|name| std::fs::canonicalize(name).ok())
                .is_some_and(|name| name == wanted)
        })
}

struct Rebase<'a> {
    top: &'a BlockHandle,
    old: Option<BlockHandle>,
    new: Option<BlockHandle>,
    shared: Option<Arc<Node>>,
    compress: bool,
}

impl Rebase<'_> {
    async fn run(&self, meter: &Meter) -> Result<(), Failure> {
        let length = self.top.length();
        meter.set_total(length);
        let below = self.top.node().backing();
        let cluster = self.top.info().await?.cluster_size.unwrap_or(512).max(512);
        let chunk = (CHUNK / cluster * cluster).max(cluster);
        let mut old_data = Buffer::try_new(chunk as usize)?;
        let mut new_data = Buffer::try_new(chunk as usize)?;
        let mut offset = 0;
        while offset < length {
            let (mine, len) = self
                .top
                .is_allocated_above(below.as_ref(), false, offset, length - offset)
                .await
                .map_err(|error| status_failed(offset, &error))?;
            let len = len.max(1).min(length - offset);
            if mine || self.is_shared(offset, len).await? {
                offset += len;
                meter.advance(len);
                continue;
            }
            let len = len.min(chunk - offset % chunk);
            old_data.resize(len as usize);
            new_data.resize(len as usize);
            old_data = read(self.old.as_ref(), offset, old_data, "old").await?;
            new_data = read(self.new.as_ref(), offset, new_data, "new").await?;
            if old_data[..] != new_data[..] {
                old_data = self.keep(offset, old_data, &new_data, cluster).await?;
                old_data.resize(0);
            }
            offset += len;
            meter.advance(len);
        }
        self.top.flush().await?;
        Ok(())
    }

    /// Whether old and new chain get the range from the same layer.
    async fn is_shared(&self, offset: u64, len: u64) -> Result<bool, Failure> {
        let (Some(old), Some(shared)) = (&self.old, &self.shared) else {
            return Ok(self.old.is_none() && self.new.is_none());
        };
        if offset + len > old.length() || offset + len > shared.length() {
            return Ok(false);
        }
        let (decided, known) = if old.node().id() == shared.id() {
            (false, len)
        } else {
            old.is_allocated_above(Some(shared), false, offset, len)
                .await
                .map_err(|error| status_failed(offset, &error))?
        };
        Ok(!decided && known >= len)
    }

    /// Writes those clusters of the old content that the new backing file has differently.
    async fn keep(
        &self,
        offset: u64,
        old: Buffer,
        new: &Buffer,
        cluster: u64,
    ) -> Result<Buffer, Failure> {
        let len = old.len();
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        let mut at = 0;
        while at < len {
            let to_boundary = cluster - (offset + at as u64) % cluster;
            let end = len.min(at + to_boundary as usize);
            if old[at..end] != new[at..end] {
                match ranges.last_mut() {
                    Some(last) if last.1 == at && !self.compress => last.1 = end,
                    _ => ranges.push((at, end)),
                }
            }
            at = end;
        }
        let data = IoBuf::from(old);
        for (start, end) in ranges {
            let place = offset + start as u64;
            let whole = place % cluster == 0
                && ((end - start) as u64 == cluster || offset + end as u64 == self.top.length());
            let flags = if self.compress && whole {
                RequestFlags::WRITE_COMPRESSED
            } else {
                RequestFlags::empty()
            };
            self.top
                .write(place, data.slice(start..end), flags)
                .await
                .map_err(|error| Failure::io("Error while writing to COW image", &error))?;
        }
        match data.try_into_buffer() {
            Ok(buffer) => Ok(buffer),
            Err(_) => Ok(Buffer::try_new(len)?),
        }
    }
}

fn status_failed(offset: u64, error: &block_core::Error) -> Failure {
    Failure::io(
        format_args!("error while reading image metadata at offset {offset}"),
        error,
    )
}

/// What a chain has; zeroes beyond its end, or without a chain.
async fn read(
    chain: Option<&BlockHandle>,
    offset: u64,
    mut buffer: Buffer,
    which: &str,
) -> Result<Buffer, Failure> {
    let available = chain.map_or(0, |chain| chain.length().saturating_sub(offset));
    let available = available.min(buffer.len() as u64) as usize;
    buffer[available..].fill(0);
    let (Some(chain), true) = (chain, available > 0) else {
        return Ok(buffer);
    };
    let (lent, mut whole) = buffer.lend();
    drop(whole.split_off(available));
    chain
        .readv(offset, whole, RequestFlags::empty())
        .await
        .map_err(|error| {
            Failure::io(
                format_args!("error while reading from {which} backing file"),
                &error,
            )
        })?;
    lent.reclaim()
        .map_err(|_| Failure::new("a driver kept a part of a read buffer"))
}
