//! `blk map`: where the content of an image is.

use std::{fmt::Write, sync::Arc};

use block_core::{
    BlockHandle, DriverKind, Node, PermissionSet,
    status::{BlockStatus, StatusFlags},
};

use super::{
    Command,
    args::{
        FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, OutputFormat, one_image, output_format,
    },
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access},
    output::{say, write_out},
    session::Session,
    size::{MAX_SIZE, parse_number},
};

pub const COMMAND: Command = Command {
    name: "map",
    about: "Show where the content of an image and its backing files is",
    usage: "[-f FMT | --image-opts] [--start-offset N] [--max-length N] [-U] \
            [--output human|json] FILE",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        Opt::value('s', "start-offset", "N", "begin at this byte"),
        Opt::value('l', "max-length", "N", "show so many bytes"),
        FORCE_SHARE,
        OUTPUT,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let output = output_format(parsed, "map")?;
    let start = match parsed.get("start-offset") {
        Some(text) => parse_number("start offset", text, 0, MAX_SIZE)?,
        None => 0,
    };
    let max = match parsed.get("max-length") {
        Some(text) => parse_number("max length", text, 0, MAX_SIZE)?,
        None => MAX_SIZE,
    };
    let image = one_image(parsed, "map")?;
    let access = Access {
        force_share: parsed.has("force-share"),
        ..Access::default()
    };
    let handle = open::open(session, image, access).await?;
    // To qemu-img images are whole sectors.
    let unit = if session.program.is_qemu() { 512 } else { 1 };
    let end = rounded(handle.length(), unit).min(start.saturating_add(max));
    if output == OutputFormat::Human {
        say!("{:16}{:16}{:16}File", "Offset", "Length", "Mapped to");
    }
    let layers = Layers::of(session, &handle, unit)?;
    let mut printer = Printer {
        output,
        first: true,
        text: String::new(),
    };
    let mut current: Option<Extent> = None;
    let mut offset = start;
    while offset < end {
        let next = layers.extent(offset, end - offset).await?;
        offset += next.length;
        match &mut current {
            Some(extent) if extent.continues_with(&next) => extent.length += next.length,
            _ => {
                if let Some(extent) = current.replace(next) {
                    printer.print(&extent, false)?;
                }
            }
        }
    }
    let last = current.unwrap_or(Extent {
        start,
        ..Extent::default()
    });
    printer.print(&last, true)?;
    drop(layers);
    handle.close().await?;
    Ok(0)
}

/// A range whose bytes are all of one kind and in one place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Extent {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    file: Option<String>,
}

/// The image and its backing files, each asked for itself: which layer says what is the point of a map.
struct Layers {
    list: Vec<(BlockHandle, Option<Arc<Node>>)>,
    /// What their lengths are rounded up to, in bytes.
    unit: u64,
}

fn rounded(length: u64, unit: u64) -> u64 {
    length.checked_next_multiple_of(unit).unwrap_or(length)
}

impl Layers {
    fn of(session: &Session, top: &BlockHandle, unit: u64) -> Result<Self, Failure> {
        let mut nodes = vec![top.node()];
        nodes.extend(top.node().chain());
        let mut layers = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            if node.driver().kind() == DriverKind::Filter {
                continue;
            }
            let handle = session.graph.attach(node, PermissionSet::NONE, "map")?;
            layers.push((handle, nodes.get(index + 1).cloned()));
        }
        Ok(Self { list: layers, unit })
    }

    /// Whether a byte isn't there, but would be if the layer were whole sectors.
    fn lacks(&self, layer: &BlockHandle, offset: u64) -> bool {
        let length = layer.length();
        length > 0 && (length..rounded(length, self.unit)).contains(&offset)
    }

    async fn extent(&self, offset: u64, mut len: u64) -> Result<Extent, Failure> {
        let mut found = None;
        for (depth, (layer, below)) in self.list.iter().enumerate() {
            let length = layer.length();
            // The bytes that the last sector lacks are a hole behind the last one.
            let lacks = self.lacks(layer, offset);
            let (from, most) = if lacks {
                (length - 1, 1)
            } else {
                (offset, len)
            };
            let mut status = layer
                .block_status_above(below.as_ref(), from, most)
                .await
                .map_err(|error| Failure::context("Failed to read image metadata", &error))?;
            if status.len == 0 {
                break;
            }
            if lacks {
                status.len = rounded(length, self.unit) - offset;
                status.flags -= StatusFlags::DATA;
                status.flags |= StatusFlags::ZERO;
                status.mapped = status.mapped.map(|(node, at)| (node, at + offset - from));
            }
            len = len.min(status.len);
            // Zeroes behind the end of the backing file are its own as far as its last sector goes.
            let next = self.list.get(depth + 1).map(|(next, _)| next);
            let ends = next
                .filter(|next| self.lacks(next, offset) && status.is_zero())
                .filter(|_| !status.is_allocated());
            if let Some(next) = ends {
                len = len.min(rounded(next.length(), self.unit) - offset);
                continue;
            }
            let decided = status
                .flags
                .intersects(StatusFlags::DATA | StatusFlags::ZERO);
            found = Some((depth as u32, status));
            if decided {
                break;
            }
        }
        match found {
            Some((depth, status)) => Ok(Extent::new(offset, len, depth, &status)),
            None => Err(Failure::new(
                "Failed to read image metadata: the image has shrunk",
            )),
        }
    }
}

impl Extent {
    fn new(start: u64, length: u64, depth: u32, status: &BlockStatus) -> Self {
        let (file, place) = match &status.mapped {
            Some((node, at)) if status.flags.contains(StatusFlags::OFFSET_VALID) => {
                (node.filename(), Some(*at))
            }
            _ => (None, None),
        };
        Self {
            start,
            length,
            depth,
            present: status.is_allocated(),
            zero: status.is_zero(),
            data: status.flags.contains(StatusFlags::DATA),
            compressed: status.flags.contains(StatusFlags::COMPRESSED),
            offset: place,
            file,
        }
    }

    fn continues_with(&self, next: &Self) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(at), Some(next)) => at + self.length == next,
            (None, None) => true,
            _ => false,
        };
        follows
            && self.start + self.length == next.start
            && self.depth == next.depth
            && self.present == next.present
            && self.zero == next.zero
            && self.data == next.data
            && self.compressed == next.compressed
            && self.file == next.file
    }
}

/// Writes extents, many at once.
struct Printer {
    output: OutputFormat,
    first: bool,
    /// What wasn't written yet.
    text: String,
}

/// How much is written at once, in bytes.
const BATCH: usize = 64 << 10;

impl Drop for Printer {
    fn drop(&mut self) {
        self.write_out();
    }
}

impl Printer {
    fn write_out(&mut self) {
        write_out(format_args!("{}", self.text));
        self.text.clear();
    }

    fn print(&mut self, extent: &Extent, last: bool) -> Result<(), Failure> {
        if self.text.len() >= BATCH {
            self.write_out();
        }
        match self.output {
            OutputFormat::Human => print_human(&mut self.text, extent),
            OutputFormat::Json => {
                let Extent {
                    start,
                    length,
                    depth,
                    present,
                    zero,
                    data,
                    compressed,
                    ..
                } = extent;
                let place = match extent.offset {
                    Some(offset) => format!(", \"offset\": {offset}"),
                    None => String::new(),
                };
                let _ = writeln!(
                    self.text,
                    "{}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \
                     \"present\": {present}, \"zero\": {zero}, \"data\": {data}, \
                     \"compressed\": {compressed}{place}}}{}",
                    if self.first { "[" } else { "" },
                    if last { "]" } else { "," }
                );
                self.first = false;
                Ok(())
            }
        }
    }
}

fn print_human(text: &mut String, extent: &Extent) -> Result<(), Failure> {
    if !extent.data || extent.zero {
        return Ok(());
    }
    let Some(offset) = extent.offset else {
        return Err(Failure::new(
            "File contains external, encrypted or compressed clusters.",
        ));
    };
    let hex = |value: u64| {
        if value == 0 {
            "0".to_owned()
        } else {
            format!("{value:#x}")
        }
    };
    let _ = writeln!(
        text,
        "{:16}{:16}{:16}{}",
        hex(extent.start),
        hex(extent.length),
        hex(offset),
        extent.file.as_deref().unwrap_or_default()
    );
    Ok(())
}
