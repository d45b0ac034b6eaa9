//! `blk resize`: changes the length of an image.

use block_core::driver::{Preallocation, Truncate};

use super::{
    Command,
    args::{FORMAT, IMAGE_OPTS, OBJECT, QUIET, image},
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access},
    output::say,
    session::Session,
    size::MAX_SIZE,
};

pub const COMMAND: Command = Command {
    name: "resize",
    about: "Change the length of an image",
    usage: "[-q] [-f FMT | --image-opts] [--preallocation MODE] [--shrink] FILE [+|-]SIZE",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        Opt::flag(
            ' ',
            "shrink",
            "allow the image to become smaller, losing what lies beyond",
        ),
        Opt::value(
            ' ',
            "preallocation",
            "off|metadata|falloc|full",
            "how the space that is added is reserved",
        ),
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let (name, text) = match parsed.free.as_slice() {
        [name, size] => (name, size),
        [_, _, ..] => {
            return Err(Failure::usage(
                "resize",
                "Extra argument(s) in command line",
            ));
        }
        _ => {
            return Err(Failure::usage(
                "resize",
                "Expecting image file name and size",
            ));
        }
    };
    let preallocation = match parsed.get("preallocation") {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => {
            return Err(Failure::new(format!(
                "Invalid preallocation mode '{other}'"
            )));
        }
    };
    let (sign, digits) = match text.split_at_checked(1) {
        Some((sign @ ("+" | "-"), digits)) => (sign, digits),
        _ => ("", text.as_str()),
    };
    let size = block_core::options::parse_size(digits).map_err(|_| {
        Failure::new(
            "Parameter 'size' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively.",
        )
    })?;
    let image = image(parsed, name, "format")?;
    let access = Access {
        write: true,
        resize: true,
        ..Access::default()
    };
    let handle = open::open(session, image, access).await?;
    let old = handle.length();
    let new = match sign {
        "+" => old.checked_add(size),
        "-" => old.checked_sub(size),
        _ => Some(size),
    };
    let Some(new) = new.filter(|new| *new > 0) else {
        return Err(Failure::new("New image size must be positive"));
    };
    if new > MAX_SIZE {
        return Err(Failure::new(format!("The new size {new} is too large")));
    }
    if new <= old && preallocation != Preallocation::Off {
        return Err(Failure::new(
            "Preallocation can only be used for growing images",
        ));
    }
    if new < old && !parsed.has("shrink") {
        return Err(
            Failure::new("Use the --shrink option to perform a shrink operation.").and(
                "warning: Shrinking an image will delete all data beyond the shrunken image's end. \
             Before performing such an operation, make sure there is no important data there.",
            ),
        );
    }
    let how = Truncate {
        exact: true,
        preallocation,
        zero: false,
    };
    handle.truncate(new, how).await?;
    handle.close().await?;
    if !parsed.has("quiet") {
        say!("Image resized.");
    }
    Ok(0)
}
