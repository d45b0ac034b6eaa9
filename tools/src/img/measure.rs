//! `blk measure`: how large a new image would get.

use serde_json::json;

use super::{
    Command,
    args::{
        self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, OutputFormat, asks_for_help,
        option_list, output_format,
    },
    create_options::CreateOptions,
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

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let output = output_format(parsed, "measure")?;
    let size = match parsed.get("size") {
        Some(text) => Some(parse_number("image size", text, 0, MAX_SIZE)?),
        None => None,
    };
    let list = option_list(parsed, "options")?;
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
    let format = parsed.get("target-format").unwrap_or("raw");
    let mut data = Vec::new();
    let mut length = size.unwrap_or(0);
    let mut has_bitmaps = false;
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
        let info = handle.info().await?;
        has_bitmaps = handle.node().driver().name() == "qcow2"
            && info
                .format_specific
                .is_some_and(|(_, data)| data["compat"] != "0.10");
        handle.close().await?;
    }
    let factory = session
        .registry
        .get(format)
        .map_err(|_| Failure::new(format!("Unknown file format '{format}'")))?;
    let mut options = CreateOptions::new(&**factory, None);
    if asks_for_help(list.as_deref()) {
        options.print_help(false);
        return Ok(0);
    }
    if let Some(list) = &list {
        options.read(list).map_err(|failure| {
            failure.and(format!("Invalid options for file format '{format}'"))
        })?;
    }
    let measure = factory.measure(length, &data, options.for_format()?)?;
    let bitmaps = has_bitmaps && format == "qcow2";
    match output {
        OutputFormat::Human => {
            say!("required size: {}", measure.required);
            say!("fully allocated size: {}", measure.fully_allocated);
            if bitmaps {
                say!("bitmaps size: 0");
            }
        }
        OutputFormat::Json => {
            let mut value = json!({
                "required": measure.required,
                "fully-allocated": measure.fully_allocated,
            });
            if bitmaps {
                value["bitmaps"] = json!(0);
            }
            say!("{}", json::pretty(&value));
        }
    }
    Ok(0)
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
