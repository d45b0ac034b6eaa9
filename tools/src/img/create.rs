//! `blk create`: makes a new image.

use std::path::{Path, PathBuf};

use block_core::{ErrorKind, Options, resolve_name};

use super::{
    Command,
    args::{OBJECT, QUIET, asks_for_help, option_list},
    create_options::CreateOptions,
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access, ImageSpec},
    output::say,
    session::Session,
    size::{MAX_SIZE, parse_number},
};

pub const COMMAND: Command = Command {
    name: "create",
    about: "Create a new image",
    usage: "[-q] [-f FMT] [-o OPTIONS] [-b BACKING_FILE [-F BACKING_FMT]] [-u] FILE [SIZE]",
    options: &[
        QUIET,
        Opt::value(
            'f',
            "format",
            "FMT",
            "format of the new image (default: raw)",
        ),
        Opt::value(
            'o',
            "options",
            "OPTIONS",
            "options of the format; '-o help' lists them",
        ),
        Opt::value('b', "backing", "FILE", "backing file of the new image"),
        Opt::value('F', "backing-format", "FMT", "format of the backing file"),
        Opt::flag(
            'u',
            "backing-unsafe",
            "don't open the backing file; SIZE must be given",
        ),
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// Guessing it later would let a guest that writes a header of its own choose what is opened.
const NO_BACKING_FORMAT: &str = "Backing file specified without backing format";

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let registry = &session.registry;
    let format = parsed.get("format").unwrap_or("raw");
    let list = option_list(parsed, "options")?;
    if asks_for_help(list.as_deref()) {
        let file = parsed.free.first().map(String::as_str);
        CreateOptions::print_help(registry, format, file)?;
        return Ok(0);
    }
    let mut operands = parsed.free.iter();
    let Some(filename) = operands.next() else {
        return Err(Failure::usage("create", "Expecting image file name"));
    };
    let size = match operands.next() {
        Some(text) => Some(parse_number("image size", text, 0, MAX_SIZE)?),
        None => None,
    };
    if let Some(extra) = operands.next() {
        return Err(Failure::usage(
            "create",
            format!("Unexpected argument: {extra}"),
        ));
    }
    let prepared = Request {
        filename,
        format,
        list: list.as_deref(),
        size,
        backing: parsed.get("backing"),
        backing_format: parsed.get("backing-format"),
        check_backing: !parsed.has("backing-unsafe"),
    };
    create(session, &prepared, parsed.has(QUIET.long))
        .await
        .map_err(|failure| failure.prefixed(filename))?;
    Ok(0)
}

/// What is to be made.
struct Request<'a> {
    filename: &'a str,
    format: &'a str,
    list: Option<&'a str>,
    size: Option<u64>,
    backing: Option<&'a str>,
    backing_format: Option<&'a str>,
    check_backing: bool,
}

async fn create(session: &Session, request: &Request<'_>, quiet: bool) -> Result<(), Failure> {
    let registry = &session.registry;
    let Request {
        filename, format, ..
    } = *request;
    let mut options = CreateOptions::of(registry, format, filename, request.list)?;
    if let Some(size) = request.size {
        if options.get("size").is_some() {
            return Err(Failure::new("The image size must be specified only once"));
        }
        options.set("size", &size.to_string())?;
    }
    options.set_backing(request.backing, request.backing_format)?;
    if let Some(backing) = options.get("backing_file").map(str::to_owned) {
        if backing.is_empty() {
            return Err(Failure::new("Expected backing file name, got empty string"));
        }
        if backing == filename {
            return Err(Failure::new(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        if request.check_backing {
            look_at_backing(session, filename, &backing, &mut options).await?;
        } else if options.get("backing_fmt").is_none() {
            return Err(Failure::new(NO_BACKING_FORMAT));
        }
    }
    if options.get("size").is_none() {
        return Err(Failure::new("Image creation needs a size parameter"));
    }
    if !quiet {
        say!("{}", options.describe(filename));
    }
    let too_large = || {
        let hint =
            if options.takes("cluster_size") && options.get_size("cluster_size") != Some(2 << 20) {
                " (try using a larger cluster size)"
            } else {
                ""
            };
        format!("The image size is too large for file format '{format}'{hint}")
    };
    let values = options.for_creation()?;
    make(session, format, filename, values)
        .await
        .map_err(|error| match error.kind() {
            ErrorKind::TooBig => Failure::new(too_large()).with_details(&error),
            _ => error.into(),
        })
}

/// Makes the image. What is half made is removed again, if nothing was there before; options that are refused leave what is there alone.
pub async fn make(
    session: &Session,
    format: &str,
    filename: &str,
    mut options: Options,
) -> block_core::Result<()> {
    let registry = &session.registry;
    if session.program.is_qemu()
        && let Some(name) = options.get_str("data_file")
        && !Path::new(name).is_absolute()
        && !name.contains(':')
    {
        // As qemu-img makes it: where it runs, not beside the image.
        let here = format!("file:{name}");
        options.set("data_file", here);
    }
    let place = registry.filename_options(filename)?;
    let path = match (place.get_str("driver"), place.get_str("filename")) {
        (None | Some("file"), Some(path)) => Some(PathBuf::from(path)),
        _ => None,
    };
    let is_new = path.filter(|path| path.symlink_metadata().is_err());
    let made = registry
        .create(&session.graph, format, filename, options)
        .await;
    if made.is_err()
        && let Some(path) = is_new
        && path.symlink_metadata().is_ok_and(|found| found.is_file())
    {
        // The error that matters is the other one.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// The backing file must be an image, its format must be named, and its size is the default.
async fn look_at_backing(
    session: &Session,
    filename: &str,
    backing: &str,
    options: &mut CreateOptions,
) -> Result<(), Failure> {
    let name = resolve_name(filename, backing);
    let format = options.get("backing_fmt").map(str::to_owned);
    let spec = ImageSpec::file(&name, format.as_deref());
    let handle = open::open_quietly(session, spec, Access::default())
        .await
        .map_err(|error| {
            Failure::new(format!("{}\nCould not open backing image.", error.reason()))
                .with_details(&error)
        })?;
    let (size, found) = (handle.length(), handle.node().driver().name());
    handle.close().await?;
    if format.is_none() {
        return Err(Failure::new(format!(
            "{NO_BACKING_FORMAT}\nDetected format of {found}."
        )));
    }
    if options.get("size").is_none() {
        // Whole sectors, of which the last is padded with zeroes.
        let size = size.checked_next_multiple_of(512).unwrap_or(size);
        options.set("size", &size.to_string())?;
    }
    Ok(())
}
