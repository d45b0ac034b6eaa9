//! `blk bitmap`: adds, removes, clears, enables, disables and merges the persistent bitmaps of an image.

use std::sync::Arc;

use block_core::{BlockHandle, Error, Node, bitmap::NewBitmap};

use super::{
    Command,
    args::{self, FORMAT, IMAGE_OPTS, OBJECT},
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access, ImageSpec},
    session::Session,
    size::{MAX_SIZE, parse_number},
};

pub const COMMAND: Command = Command {
    name: "bitmap",
    about: "Change the persistent bitmaps of an image",
    usage: "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-f FMT | --image-opts] \
            [-b SOURCE_FILE [-F SOURCE_FMT]] [-g SIZE] FILE BITMAP",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        Opt::flag(' ', "add", "make BITMAP, which records writes from then on"),
        Opt::value(
            'g',
            "granularity",
            "SIZE",
            "with --add: bytes per bit (default: the cluster size, 4k to 64k)",
        ),
        Opt::flag(' ', "remove", "remove BITMAP"),
        Opt::flag(' ', "clear", "clear BITMAP"),
        Opt::flag(' ', "enable", "let BITMAP record writes"),
        Opt::flag(' ', "disable", "let BITMAP record no more writes"),
        Opt::value(
            ' ',
            "merge",
            "SOURCE",
            "add to BITMAP what is dirty in the bitmap SOURCE",
        ),
        Opt::value(
            'b',
            "source-file",
            "SOURCE_FILE",
            "with --merge: the image that has SOURCE (default: FILE)",
        ),
        Opt::value('F', "source-format", "SOURCE_FMT", "format of SOURCE_FILE"),
        OBJECT,
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// One step, in the order of the command line.
enum Action<'a> {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(&'a str),
}

impl Action<'_> {
    const fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

fn actions(parsed: &Parsed) -> Vec<Action<'_>> {
    let action = |(name, value): (&str, Option<&'_ str>)| {
        Some(match (name, value) {
            ("add", _) => Action::Add,
            ("remove", _) => Action::Remove,
            ("clear", _) => Action::Clear,
            ("enable", _) => Action::Enable,
            ("disable", _) => Action::Disable,
            _ => return None,
        })
    };
    parsed
        .in_order()
        .filter_map(|(name, value)| match (name, value) {
            ("merge", Some(source)) => Some(Action::Merge(source)),
            other => action(other),
        })
        .collect()
}

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let granularity = match parsed.get("granularity") {
        None => None,
        // None is the default.
        Some(text) => {
            Some(parse_number("granularity", text, 0, MAX_SIZE)?).filter(|size| *size > 0)
        }
    };
    let is_given = parsed.has("granularity");
    let actions = actions(parsed);
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let adds = actions.iter().any(|action| matches!(action, Action::Add));
    let merges = actions
        .iter()
        .any(|action| matches!(action, Action::Merge(_)));
    if is_given && !adds {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if parsed.has("source-format") && !parsed.has("source-file") {
        return Err(Failure::new("-F only supported with -b"));
    }
    if parsed.has("source-file") && !merges {
        return Err(Failure::new(
            "Merge bitmap source file only supported with --merge",
        ));
    }
    let [name, bitmap] = parsed.free.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let image = args::image(parsed, name, "format")?;
    let access = Access {
        write: true,
        // Nothing is read through the chain.
        no_backing: true,
        ..Access::default()
    };
    let handle = open::open(session, image, access).await?;
    let source = match parsed.get("source-file") {
        None => None,
        Some(file) => {
            let image = ImageSpec::file(file, parsed.get("source-format"));
            let access = Access {
                no_backing: true,
                ..Access::default()
            };
            Some(open::open(session, image, access).await?)
        }
    };
    let from = source
        .as_ref()
        .map_or_else(|| handle.node(), BlockHandle::node);
    let mut failed = None;
    for action in &actions {
        if let Err(error) = run(&handle, bitmap, action, &from, granularity).await {
            let what = format!("Operation {} on bitmap {bitmap} failed", action.name());
            failed = Some(Failure::context(what, &error));
            break;
        }
    }
    drop(from);
    if let Some(source) = source {
        source.close().await?;
    }
    // What was done before a step that failed stays.
    let closed = handle.close().await;
    match failed {
        Some(failure) => Err(failure),
        None => {
            closed?;
            Ok(0)
        }
    }
}

async fn run(
    handle: &BlockHandle,
    name: &str,
    action: &Action<'_>,
    from: &Arc<Node>,
    granularity: Option<u64>,
) -> block_core::Result<()> {
    let bitmaps = handle.named_bitmaps();
    let done: Result<(), Error> = match action {
        Action::Add => {
            let new = NewBitmap {
                name: name.to_owned(),
                granularity,
                persistent: true,
                disabled: false,
            };
            bitmaps.add(new).await.map(drop)
        }
        Action::Remove => bitmaps.remove(name).await,
        Action::Clear => bitmaps.clear(name),
        Action::Enable => bitmaps.enable(name),
        Action::Disable => bitmaps.disable(name),
        Action::Merge(source) => bitmaps.merge(name, &[(from.clone(), (*source).to_owned())]),
    };
    done
}
