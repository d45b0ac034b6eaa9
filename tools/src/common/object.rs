//! `--object`: the secrets that a command line defines (`secret,id=…,data=…|file=…`, or the same as JSON), put where the
//! drivers look them up. There are no other objects here. What a secret holds shows in no message.

use std::io::ErrorKind as IoErrorKind;

use block_core::{Error, Graph, Options};

/// Defines all objects, in order.
///
/// # Errors
/// The first that can't be, in qemu's words.
pub fn define<'a>(
    graph: &Graph,
    definitions: impl Iterator<Item = &'a str>,
) -> block_core::Result<()> {
    definitions
        .into_iter()
        .try_for_each(|text| define_one(graph, text))
}

fn define_one(graph: &Graph, text: &str) -> block_core::Result<()> {
    let mut options = if text.trim_start().starts_with('{') {
        // The parser's message would quote the text.
        Options::from_json(text)
            .map_err(|_| Error::invalid("Could not parse the JSON of --object"))?
    } else {
        let (first, rest) = text.split_once(',').unwrap_or((text, ""));
        if first.contains('=') {
            Options::from_dotted(text)?
        } else {
            Options::from_dotted(rest)?.with("qom-type", first)
        }
    };
    match options.take_str("qom-type")?.as_deref() {
        Some("secret") => {}
        None => return Err(Error::invalid("Parameter 'qom-type' is missing")),
        Some(other) => {
            return Err(Error::invalid(format!(
                "Parameter 'qom-type' does not accept value '{other}'"
            ))
            .with_field("qom-type", other, "secret"));
        }
    }
    let secrets = graph.secrets();
    let (id, secret) = crypto::secret_object::load(options, secrets, read_file)?;
    secrets.add(&id, secret)
}

fn read_file(name: &str) -> block_core::Result<Vec<u8>> {
    std::fs::read(name).map_err(|error| {
        let why = match error.kind() {
            IoErrorKind::IsADirectory => "Is a directory".to_owned(),
            _ => Error::from(error).reason(),
        };
        Error::invalid(format!(
            "Unable to read {name}: Failed to open file \u{201c}{name}\u{201d}: {why}"
        ))
    })
}
