//! Arguments that many commands have.

use crate::common::{
    cache::CacheMode,
    failure::Failure,
    getopt::{Opt, Parsed},
    object,
    open::ImageSpec,
    session::Session,
};

pub const QUIET: Opt = Opt::flag('q', "quiet", "print nothing but errors");
pub const PROGRESS: Opt = Opt::flag('p', "progress", "show progress");
pub const FORMAT: Opt = Opt::value(
    'f',
    "format",
    "FMT",
    "format of FILE (default: found by probing)",
);
pub const IMAGE_OPTS: Opt = Opt::flag(
    ' ',
    "image-opts",
    "FILE is a list of options (driver=qcow2,file.filename=x)",
);
pub const FORCE_SHARE: Opt = Opt::flag(
    'U',
    "force-share",
    "open FILE even if others are writing to it",
);
pub const OUTPUT: Opt = Opt::value(' ', "output", "human|json", "how to print (default: human)");
pub const OBJECT: Opt = Opt::value(
    ' ',
    "object",
    "OBJDEF",
    "define a secret: secret,id=ID,data=TEXT|file=PATH[,format=raw|base64]",
);

/// How the result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    Human,
    Json,
}

/// `--output`.
pub fn output_format(parsed: &Parsed, command: &'static str) -> Result<OutputFormat, Failure> {
    match parsed.get("output") {
        None | Some("human") => Ok(OutputFormat::Human),
        Some("json") => Ok(OutputFormat::Json),
        Some(other) => Err(Failure::usage(
            command,
            format!("--output expects 'human' or 'json' not '{other}'"),
        )),
    }
}

/// The one operand.
pub fn one_file<'a>(parsed: &'a Parsed, command: &'static str) -> Result<&'a str, Failure> {
    match parsed.free.as_slice() {
        [file] => Ok(file),
        _ => Err(Failure::usage(command, "Expecting one image file name")),
    }
}

/// The image that the one operand, `-f` and `--image-opts` name.
pub fn one_image<'a>(parsed: &'a Parsed, command: &'static str) -> Result<ImageSpec<'a>, Failure> {
    let name = one_file(parsed, command)?;
    image(parsed, name, "format")
}

/// The image `name`, with the format given by the option `format`.
pub fn image<'a>(
    parsed: &'a Parsed,
    name: &'a str,
    format: &str,
) -> Result<ImageSpec<'a>, Failure> {
    let image_opts = parsed.has("image-opts");
    let format = parsed.get(format);
    if image_opts && format.is_some() {
        return Err(exclusive());
    }
    Ok(ImageSpec {
        name,
        format,
        image_opts,
    })
}

pub fn exclusive() -> Failure {
    Failure::new("--image-opts and --format are mutually exclusive")
}

/// The cache mode given by `option`; `message` goes before a name that isn't one.
pub fn cache(
    parsed: &Parsed,
    option: &str,
    default: CacheMode,
    message: &str,
) -> Result<CacheMode, Failure> {
    match parsed.get(option) {
        None => Ok(default),
        Some(name) => {
            CacheMode::parse(name).ok_or_else(|| Failure::new(format!("{message}: {name}")))
        }
    }
}

/// All `-o` as one list; `None` if there was none.
pub fn option_list(parsed: &Parsed, option: &str) -> Result<Option<String>, Failure> {
    let mut list: Option<String> = None;
    for text in parsed.all(option) {
        if text.is_empty() || starts_alone(text.chars()) || starts_alone(text.chars().rev()) {
            return Err(Failure::new(format!("Invalid option list: {text}")));
        }
        match &mut list {
            None => list = Some(text.to_owned()),
            Some(list) => {
                list.push(',');
                list.push_str(text);
            }
        }
    }
    Ok(list)
}

/// Whether the list begins with a comma that isn't part of a name (an escaped comma can't begin one either).
fn starts_alone(mut chars: impl Iterator<Item = char>) -> bool {
    chars.next() == Some(',')
}

/// Whether an option list asks for help.
pub fn asks_for_help(list: Option<&str>) -> bool {
    list.is_some_and(|list| list.split(',').any(|item| item == "help" || item == "?"))
}

/// Defines what `--object` says.
pub fn define_objects(session: &Session, parsed: &Parsed) -> Result<(), Failure> {
    Ok(object::define(&session.graph, parsed.all(OBJECT.long))?)
}
