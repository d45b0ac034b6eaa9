//! `blk measure`: how large a new image would get.

use block_core::DriverFactory;
use format_qcow2::bitmaps::layout::bitmaps_size;
use serde_json::{Value, json};

use super::{
    Command,
    args::{
        self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, OutputFormat, asks_for_help,
        option_list, output_format,
    },
    create_options::CreateOptions,
    measure_luks,
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    json,
    open::{self, Access},
    output::say,
    session::Session,
    size::{MAX_SIZE, parse_number},
    snapshots,
};

pub const COMMAND: Command = Command {
    name: "measure",
    about: "Show how large a new image would get, of a given size or with the content of FILE",
    usage: "[-O FMT] [-o OPTIONS] [--output human|json] (--size SIZE | [-f FMT | --image-opts] [-l SNAPSHOT] [-U] FILE)",
    options: &[
        Opt::value(
            'O',
            "target-format",
            "FMT",
            "format of the new image (default: raw)",
        ),
        Opt::value('o', "options", "OPTIONS", "its create options"),
        Opt::value('s', "size", "SIZE", "size of the new image"),
        FORMAT,
        IMAGE_OPTS,
        Opt::value(
            'l',
            "snapshot",
            "SNAPSHOT",
            "measure FILE as it was then: snapshot.id=ID,snapshot.name=NAME, or either",
        ),
        OUTPUT,
        FORCE_SHARE,
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// What is measured.
#[derive(Clone, Copy)]
enum Target<'a> {
    Format(&'a dyn DriverFactory),
    /// A LUKS container of its own.
    Luks,
}

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let output = output_format(parsed, "measure")?;
    let size = match parsed.get("size") {
        Some(text) => Some(parse_number("image size", text, 0, MAX_SIZE)?),
        None => None,
    };
    let list = option_list(parsed, "options")?;
    let format = parsed.get("target-format").unwrap_or("raw");
    // To qemu-img `help` is an option like others here.
    if asks_for_help(list.as_deref()) && !session.program.is_qemu() {
        match format {
            "luks" => CreateOptions::print_own(format, &measure_luks::OPTIONS),
            _ => CreateOptions::print_help(&session.registry, format, None)?,
        }
        return Ok(0);
    }
    let file = match parsed.free.as_slice() {
        [] => None,
        [file] => Some(file),
        _ => return Err(Failure::new("At most one filename argument is allowed.")),
    };
    if file.is_none()
        && (parsed.has("image-opts") || parsed.has("format") || parsed.has("snapshot"))
    {
        return Err(Failure::new(
            "--image-opts, -f, and -l require a filename argument.",
        ));
    }
    if file.is_none() && size.is_none() {
        return Err(Failure::new(
            "Either --size N or one filename must be specified.",
        ));
    }
    if file.is_some() && size.is_some() {
        return Err(Failure::new(
            "--size N cannot be used together with a filename.",
        ));
    }
    let snapshot = parsed.get("snapshot").map(snapshots::parse).transpose()?;
    let mut data = Vec::new();
    let mut length = size.unwrap_or(0);
    // Bitmaps; `None` where there can't be any.
    let mut bitmaps: Option<Vec<(u64, usize)>> = None;
    if let Some(name) = file {
        let image = args::image(parsed, name, "format")?;
        let access = Access {
            force_share: parsed.has("force-share"),
            ..Access::default()
        };
        let handle = match &snapshot {
            Some(key) => snapshots::open(session, image, access, key).await?,
            None => open::open(session, image, access).await?,
        };
        length = handle.length();
        data = extents(&handle).await?;
        // Bitmaps can be kept by qcow2 version 3 alone.
        let info = match &snapshot {
            None => handle.info().await?,
            // Bitmaps are the disk's.
            Some(_) => {
                let disk = open::open(session, image, access).await?;
                let info = disk.info().await?;
                disk.close().await?;
                info
            }
        };
        bitmaps = match info.format_specific {
            Some((_, data))
                if handle.node().driver().name() == "qcow2" && data["compat"] != "0.10" =>
            {
                Some(bitmaps_of(&data["bitmaps"]))
            }
            _ => None,
        };
        handle.close().await?;
    }
    let known = |name: &str| {
        let factory = session.registry.get(name).map(|factory| &**factory);
        factory.map_err(|_| Failure::new(format!("Unknown file format '{name}'")))
    };
    let storage = known("file")?;
    let target = match format {
        "luks" => Target::Luks,
        _ => Target::Format(known(format)?),
    };
    if let Target::Format(factory) = target
        && factory.create_options().is_empty()
    {
        return Err(Failure::new(format!(
            "Format driver '{format}' does not support image creation"
        )));
    }
    let mut options = match target {
        Target::Luks => CreateOptions::of_list(format, &measure_luks::OPTIONS, Some(storage)),
        Target::Format(factory) => CreateOptions::new(factory, Some(storage)),
    };
    if let Some(list) = &list {
        options.read(list).map_err(|failure| {
            failure.and(format!("Invalid options for file format '{format}'"))
        })?;
    }
    if file.is_some() && options.get("backing_file").is_some() {
        // Zeroes that hide what a backing file has take clusters where the new image can't say that they are zeroes. As with
        // qemu-img, everything counts, whatever the version.
        data = vec![(0, length)];
    }
    // What is stored where doesn't change the size.
    let values = |known| options.known_to(known);
    let measure = match target {
        Target::Luks => {
            let secrets = session.graph.secrets();
            measure_luks::measure(secrets, length, values(&measure_luks::OPTIONS))?
        }
        Target::Format(factory) => {
            factory.measure(length, &data, values(factory.create_options()))?
        }
    };
    // Neither does an image of version 2 take them.
    let takes = format == "qcow2" && !matches!(options.get("compat"), Some("0.10" | "v2"));
    let cluster = options.get_size("cluster_size").unwrap_or(1 << 16);
    let bitmaps = bitmaps
        .filter(|_| takes)
        .map(|bitmaps| bitmaps_size(cluster, length, bitmaps));
    match output {
        OutputFormat::Human => {
            say!("required size: {}", measure.required);
            say!("fully allocated size: {}", measure.fully_allocated);
            if let Some(bitmaps) = bitmaps {
                say!("bitmaps size: {bitmaps}");
            }
        }
        OutputFormat::Json => {
            let mut value = json!({
                "required": measure.required,
                "fully-allocated": measure.fully_allocated,
            });
            if let Some(bitmaps) = bitmaps {
                value["bitmaps"] = json!(bitmaps);
            }
            say!("{}", json::pretty(&value));
        }
    }
    Ok(0)
}

/// Granularity, and bytes of the name, of each bitmap that `info` lists. As with qemu-img, those that turn out to be inconsistent count.
fn bitmaps_of(listed: &Value) -> Vec<(u64, usize)> {
    let listed = listed.as_array().into_iter().flatten();
    listed
        .map(|bitmap| {
            let name = bitmap["name"].as_str().unwrap_or_default();
            let granularity = bitmap["granularity"].as_u64();
            (granularity.unwrap_or(1 << 16), name.len())
        })
        .collect()
}

/// Where there is data that isn't known to be zero.
async fn extents(handle: &block_core::BlockHandle) -> Result<Vec<(u64, u64)>, Failure> {
    let mut extents: Vec<(u64, u64)> = Vec::new();
    let (mut offset, length) = (0, handle.length());
    while offset < length {
        let status = handle.block_status(offset, length - offset).await?;
        let len = status.len.max(1).min(length - offset);
        if status.is_data() {
            match extents.last_mut() {
                Some(last) if last.0 + last.1 == offset => last.1 += len,
                _ => extents.push((offset, len)),
            }
        }
        offset += len;
    }
    Ok(extents)
}
