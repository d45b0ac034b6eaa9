//! `blk compare`: do two images have the same content.

use block_core::{
    BlockHandle, Buffer,
    buffer::is_zero,
    status::{BlockStatus, StatusFlags},
};

use super::{
    Command,
    args::{self, FORCE_SHARE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET},
};
use crate::common::{
    cache::CacheMode,
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access, ImageSpec},
    output::say,
    progress::Meter,
    session::Session,
};

pub const COMMAND: Command = Command {
    name: "compare",
    about: "Compare the content of two images. Exit status: 0 same, 1 different, 2 not opened, \
            3 block status not read, 4 content not read.",
    usage: "[-q] [-p] [-s] [-f FMT] [-F FMT] [-T CACHE] [--image-opts] [-U] FILE1 FILE2",
    options: &[
        QUIET,
        PROGRESS,
        Opt::flag(
            's',
            "strict",
            "also compare lengths and which ranges are allocated",
        ),
        Opt::value(
            'f',
            "a-format",
            "FMT",
            "format of FILE1 (default: found by probing)",
        ),
        Opt::value(
            'F',
            "b-format",
            "FMT",
            "format of FILE2 (default: found by probing)",
        ),
        Opt::value('T', "cache", "CACHE", "cache mode (default: writeback)"),
        IMAGE_OPTS,
        FORCE_SHARE,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

const DIFFERENT: u8 = 1;
const NOT_OPENED: u8 = 2;
const NO_STATUS: u8 = 3;
const NOT_READ: u8 = 4;

/// Bytes that are read of each image at a time.
const CHUNK: u64 = 1 << 20;
/// Mismatches are reported to this many bytes.
const SECTOR: u64 = 512;
/// The statuses that strict mode compares.
const STRICT: StatusFlags = StatusFlags::DATA
    .union(StatusFlags::ZERO)
    .union(StatusFlags::OFFSET_VALID)
    .union(StatusFlags::ALLOCATED)
    .union(StatusFlags::EOF)
    .union(StatusFlags::COMPRESSED);

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let cache = args::cache(
        parsed,
        "cache",
        CacheMode::WRITEBACK,
        "Invalid source cache option",
    )
    .map_err(|failure| failure.with_code(NOT_OPENED))?;
    let [first, second] = parsed.free.as_slice() else {
        return Err(Failure::usage("compare", "Expecting two image file names"));
    };
    let image_opts = parsed.has("image-opts");
    let formats = (parsed.get("a-format"), parsed.get("b-format"));
    if image_opts && (formats.0.is_some() || formats.1.is_some()) {
        return Err(args::exclusive().with_code(NOT_OPENED));
    }
    let access = Access {
        force_share: parsed.has("force-share"),
        cache,
        ..Access::default()
    };
    let open = async |name, format| {
        open::open(
            session,
            ImageSpec {
                name,
                format,
                image_opts,
            },
            access,
        )
        .await
        .map_err(|failure| failure.with_code(NOT_OPENED))
    };
    let a = open(first, formats.0).await?;
    let b = open(second, formats.1).await?;
    let meter = Meter::new(parsed.has("progress"), 2.0);
    session.signals.show(&meter);
    let quiet = parsed.has("quiet");
    let comparison = Comparison {
        a: Side {
            handle: &a,
            name: first,
        },
        b: Side {
            handle: &b,
            name: second,
        },
        strict: parsed.has("strict"),
        // To qemu-img images are whole sectors.
        unit: if session.program.is_qemu() { SECTOR } else { 1 },
        quiet,
        meter: &meter,
    };
    let verdict = comparison.run().await;
    meter.finish();
    let verdict = verdict?;
    if !quiet {
        match &verdict {
            Verdict::Same => say!("Images are identical."),
            Verdict::Different(text) => say!("{text}"),
        }
    }
    a.close().await?;
    b.close().await?;
    Ok(match verdict {
        Verdict::Same => 0,
        Verdict::Different(_) => DIFFERENT,
    })
}

enum Verdict {
    Same,
    Different(String),
}

struct Side<'a> {
    handle: &'a BlockHandle,
    name: &'a str,
}

impl Side<'_> {
    async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus, Failure> {
        let status = self.handle.block_status(offset, len).await;
        status.map_err(|error| {
            Failure::new(format!(
                "Sector allocation test failed for {}: {}",
                self.name,
                error.reason()
            ))
            .with_details(&error)
            .with_code(NO_STATUS)
        })
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer, Failure> {
        self.handle
            .read_into(offset, buffer)
            .await
            .map_err(|error| {
                Failure::new(format!(
                    "Error while reading offset {offset} of {}: {}",
                    self.name,
                    error.reason()
                ))
                .with_details(&error)
                .with_code(NOT_READ)
            })
    }
}

struct Comparison<'a> {
    a: Side<'a>,
    b: Side<'a>,
    strict: bool,
    /// What sizes are rounded up to before they are compared, in bytes.
    unit: u64,
    quiet: bool,
    meter: &'a Meter,
}

impl Comparison<'_> {
    async fn run(&self) -> Result<Verdict, Failure> {
        let (length_a, length_b) = (self.a.handle.length(), self.b.handle.length());
        let (common, longest) = (length_a.min(length_b), length_a.max(length_b));
        let counted = |length: u64| length.checked_next_multiple_of(self.unit).unwrap_or(length);
        let same_size = counted(length_a) == counted(length_b);
        self.meter.set_total(longest);
        if self.strict && !same_size {
            return Ok(Verdict::Different(
                "Strict mode: Image size mismatch!".into(),
            ));
        }
        let mut offset = 0;
        while offset < common {
            let (a, b) = futures::join!(
                self.a.status(offset, common - offset),
                self.b.status(offset, common - offset)
            );
            let (a, b) = (a?, b?);
            if self.strict && a.flags & STRICT != b.flags & STRICT {
                return Ok(Verdict::Different(format!(
                    "Strict mode: Offset {offset} block status mismatch!"
                )));
            }
            let len = a.len.min(b.len).max(1).min(common - offset);
            let mismatch = match (a.is_zero(), b.is_zero()) {
                (true, true) => None,
                (false, false) => self.compare(offset, len).await?,
                (true, false) => self.look_for_data(&self.b, offset, len).await?,
                (false, true) => self.look_for_data(&self.a, offset, len).await?,
            };
            if let Some(at) = mismatch {
                return Ok(different_at(at));
            }
            if a.is_zero() && b.is_zero() {
                self.meter.advance(len);
            }
            offset += len;
        }
        if length_a == length_b {
            return Ok(Verdict::Same);
        }
        if !self.quiet && !same_size {
            say!("Warning: Image size mismatch!");
        }
        let longer = if length_a > length_b {
            &self.a
        } else {
            &self.b
        };
        while offset < longest {
            let status = longer.status(offset, longest - offset).await?;
            let len = status.len.max(1).min(longest - offset);
            if status.is_zero() {
                self.meter.advance(len);
            } else if let Some(at) = self.look_for_data(longer, offset, len).await? {
                return Ok(different_at(at));
            }
            offset += len;
        }
        Ok(Verdict::Same)
    }

    /// Where a range of one image isn't zero.
    async fn look_for_data(
        &self,
        side: &Side<'_>,
        offset: u64,
        len: u64,
    ) -> Result<Option<u64>, Failure> {
        let mut buffer = Buffer::try_new(len.min(CHUNK) as usize)?;
        let mut done = 0;
        while done < len {
            let step = (len - done).min(CHUNK);
            buffer.resize(step as usize);
            buffer = side.read(offset + done, buffer).await?;
            if !is_zero(&buffer) {
                let sector = buffer
                    .chunks(SECTOR as usize)
                    .position(|sector| !is_zero(sector));
                return Ok(Some(offset + done + sector.unwrap_or(0) as u64 * SECTOR));
            }
            self.meter.advance(step);
            done += step;
        }
        Ok(None)
    }

    /// Where a range differs.
    async fn compare(&self, offset: u64, len: u64) -> Result<Option<u64>, Failure> {
        let capacity = len.min(CHUNK) as usize;
        let (mut a, mut b) = (Buffer::try_new(capacity)?, Buffer::try_new(capacity)?);
        let mut done = 0;
        while done < len {
            let step = (len - done).min(CHUNK);
            a.resize(step as usize);
            b.resize(step as usize);
            let at = offset + done;
            let (read_a, read_b) = futures::join!(self.a.read(at, a), self.b.read(at, b));
            (a, b) = (read_a?, read_b?);
            if a[..] != b[..] {
                let sectors = a.chunks(SECTOR as usize).zip(b.chunks(SECTOR as usize));
                let sector = sectors.into_iter().position(|(a, b)| a != b);
                return Ok(Some(at + sector.unwrap_or(0) as u64 * SECTOR));
            }
            self.meter.advance(step);
            done += step;
        }
        Ok(None)
    }
}

fn different_at(offset: u64) -> Verdict {
    Verdict::Different(format!("Content mismatch at offset {offset}!"))
}
