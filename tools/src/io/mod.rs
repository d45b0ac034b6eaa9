//! `blk io`, also as `qemu-io`: reads and writes images command by command, from `-c` or from standard input.

mod breakpoints;
mod commands;
mod help;
mod line;
mod report;
mod session;

use std::{
    io::{BufRead, IsTerminal, Write},
    sync::Arc,
};

use block_core::{Error, Graph, Registry, secret::Secret};
use futures::{StreamExt, channel::mpsc};

use crate::common::output::{complain, put, say};
use crate::common::{object, program::Program};

use self::{
    commands::Outcome,
    session::{OpenHow, Session},
};

const USAGE: &str = "\
Usage: qemu-io [OPTIONS]... [-c STRING]... [file]
QEMU Disk exerciser

  --object OBJECTDEF   define an object such as 'secret' for
                       passwords and/or encryption keys
  --image-opts         treat file as option string
  -c, --cmd STRING     execute command with its arguments
                       from the given string
  -f, --format FMT     specifies the block driver to use
  -r, --read-only      export read-only
  -n, --nocache        disable host cache, short for -t none
  -C, --copy-on-read   enable copy-on-read
  -k, --native-aio     use kernel AIO implementation
                       (Linux only, prefer use of -i)
  -i, --aio=MODE       use AIO mode (threads, native or io_uring)
  -t, --cache=MODE     use the given cache mode for the image
  -d, --discard=MODE   use the given discard mode for the image
  -U, --force-share    force shared permissions
  -h, --help           display this help and exit
  -V, --version        output version information and exit

See 'qemu-io -c help' for information on available commands.
";

/// What the command line asked for.
#[derive(Debug, Default)]
struct Arguments {
    commands: Vec<String>,
    /// They may hold passwords.
    objects: Vec<Secret>,
    how: OpenHow,
    file: Option<String>,
}

enum Parsed {
    Run(Box<Arguments>),
    Help,
    Version,
}

/// Why the command line was refused.
struct Wrong {
    text: String,
    /// It is told how to call the program.
    usage: bool,
}

impl From<String> for Wrong {
    fn from(text: String) -> Self {
        Self { text, usage: true }
    }
}

/// getopt_long, as far as this program needs it.
fn parse(program: &str, args: &[String]) -> Result<Parsed, Wrong> {
    const LONG: [(&str, char, bool); 15] = [
        ("object", 'O', true),
        ("image-opts", 'I', false),
        ("cmd", 'c', true),
        ("format", 'f', true),
        ("read-only", 'r', false),
        ("snapshot", 's', false),
        ("nocache", 'n', false),
        ("copy-on-read", 'C', false),
        ("native-aio", 'k', false),
        ("aio", 'i', true),
        ("cache", 't', true),
        ("discard", 'd', true),
        ("force-share", 'U', false),
        ("help", 'h', false),
        ("version", 'V', false),
    ];
    const SHORT_WITH_VALUE: &str = "cfitd";
    const SHORT: &str = "rsnCkUhVm";
    let mut options: Vec<(char, String)> = Vec::new();
    let mut rest = Vec::new();
    let mut at = args.iter();
    while let Some(arg) = at.next() {
        if arg == "--" {
            rest.extend(at.by_ref().cloned());
        } else if let Some(long) = arg.strip_prefix("--") {
            let (name, inline) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let matches: Vec<_> = LONG
                .iter()
                .filter(|(full, ..)| full.starts_with(name))
                .collect();
            let Some((_, letter, takes)) =
                matches
                    .iter()
                    .find(|(full, ..)| *full == name)
                    .or(if matches.len() == 1 {
                        matches.first()
                    } else {
                        None
                    })
            else {
                return Err(format!("{program}: unrecognized option '{arg}'").into());
            };
            let value = match (takes, inline) {
                (true, Some(value)) => value,
                (true, None) => at
                    .next()
                    .cloned()
                    .ok_or_else(|| format!("{program}: option '--{name}' requires an argument"))?,
                (false, _) => String::new(),
            };
            options.push((*letter, value));
        } else if let Some(letters) = arg.strip_prefix('-').filter(|letters| !letters.is_empty()) {
            for (index, letter) in letters.char_indices() {
                if SHORT_WITH_VALUE.contains(letter) {
                    let inline = &letters[index + 1..];
                    let value = if inline.is_empty() {
                        at.next().cloned().ok_or_else(|| {
                            format!("{program}: option requires an argument -- '{letter}'")
                        })?
                    } else {
                        inline.to_owned()
                    };
                    options.push((letter, value));
                    break;
                }
                if !SHORT.contains(letter) {
                    return Err(format!("{program}: invalid option -- '{letter}'").into());
                }
                options.push((letter, String::new()));
            }
        } else {
            rest.push(arg.clone());
        }
    }
    let mut parsed = Arguments::default();
    for (letter, value) in options {
        match letter {
            'h' => return Ok(Parsed::Help),
            'V' => return Ok(Parsed::Version),
            'c' => parsed.commands.push(value),
            'f' => parsed.how.format = Some(value),
            'r' => parsed.how.read_only = true,
            'n' => parsed.how.cache = Some("none".into()),
            'C' => parsed.how.copy_on_read = true,
            'k' => parsed.how.aio = Some("native".into()),
            'i' => parsed.how.aio = Some(value),
            't' => parsed.how.cache = Some(value),
            'd' => parsed.how.discard = Some(value),
            'U' => parsed.how.force_share = true,
            'I' => parsed.how.image_opts = true,
            'O' => parsed.objects.push(Secret::new(value)),
            's' => parsed.how.snapshot = true,
            _ => {}
        }
    }
    if parsed.how.image_opts && parsed.how.format.is_some() {
        return Err(Wrong {
            text: format!("{program}: --image-opts and -f are mutually exclusive"),
            usage: false,
        });
    }
    if rest.len() > 1 {
        return Err(String::new().into());
    }
    parsed.file = rest.pop();
    Ok(Parsed::Run(Box::new(parsed)))
}

/// Prints why an image can't be opened: as `qemu-io` in its words, as `blk` with all that the error knows.
fn print_open_error(program: &str, name: Option<&str>, error: &Error) {
    let device = name.map_or(String::new(), |name| format!(" device {name}"));
    if program == Program::QemuIo.name() {
        complain!("{program}: can't open{device}: {}", error.reason());
    } else {
        complain!("{program}: can't open{device}: {error}");
    }
}

/// Runs the program with `args` (without its name) and gives back its exit status.
pub fn run(program: Program, args: &[String]) -> u8 {
    let session = match crate::common::session::Session::new(program) {
        Ok(session) => session,
        Err(failure) => {
            failure.report(program);
            return failure.code;
        }
    };
    let (graph, registry) = (session.graph.clone(), session.registry.clone());
    session.run(async { Ok(main(program.name(), args, graph, registry).await) })
}

async fn main(program: &str, args: &[String], graph: Arc<Graph>, registry: Arc<Registry>) -> u8 {
    let arguments = match parse(program, args) {
        Ok(Parsed::Run(arguments)) => arguments,
        Ok(Parsed::Help) => {
            put!("{USAGE}");
            return 0;
        }
        Ok(Parsed::Version) => {
            say!("{program} version {}", env!("CARGO_PKG_VERSION"));
            return 0;
        }
        Err(Wrong { text, usage }) => {
            if !text.is_empty() {
                complain!("{text}");
            }
            if usage {
                put!("{USAGE}");
            }
            return 1;
        }
    };
    let objects = arguments.objects.iter();
    let objects = objects.map(|text| std::str::from_utf8(text.expose()).unwrap_or_default());
    if let Err(error) = object::define(&graph, objects) {
        complain!("{program}: {}", error.reason());
        return 1;
    }
    if let Err(error) = arguments.how.check() {
        complain!("{program}: {}", error.reason());
        return 1;
    }
    let qemu = (program == Program::QemuIo.name()).then_some("qemu-io");
    let mut session = Session::new(graph, registry, qemu);
    if let Some(name) = &arguments.file
        && let Err(error) = session.open(Some(name), &arguments.how).await
    {
        // Options have no name.
        let name = (!arguments.how.image_opts).then_some(name.as_str());
        print_open_error(program, name, &error);
        return 1;
    }
    let mut status = if arguments.commands.is_empty() {
        from_input(&mut session, program).await
    } else {
        let mut status = 0;
        for line in &arguments.commands {
            match one_line(&mut session, program, line).await {
                Outcome::Done => {}
                Outcome::Failed => status = 1,
                Outcome::Quit => break,
            }
        }
        status
    };
    // An image that was found corrupt has said so when it was, and has nothing left that could be flushed.
    if let Err(error) = session.close().await
        && error.kind() != block_core::ErrorKind::NoMedium
    {
        complain!("{program}: {error}");
        status = 1;
    }
    let _ = std::io::stdout().flush();
    status
}

async fn one_line(session: &mut Session, program: &str, line: &str) -> Outcome {
    let words = line::words(line);
    if words.is_empty() {
        Outcome::Done
    } else {
        commands::run(session, program, &words).await
    }
}

/// Commands from standard input, with a prompt as qemu-io prints it. What runs in the background goes on while the
/// next line is waited for.
async fn from_input(session: &mut Session, program: &str) -> u8 {
    let (tx, mut lines) = mpsc::unbounded();
    // A blocking read of a terminal can't be cancelled: it has a thread of its own, which ends with the process.
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if tx.unbounded_send(line).is_err() {
                break;
            }
        }
    });
    let mut status = 0;
    loop {
        put!("{program}> ");
        let _ = std::io::stdout().flush();
        let Some(line) = session.drive(lines.next()).await else {
            if std::io::stdin().is_terminal() {
                say!("");
            }
            return status;
        };
        match one_line(session, program, &line).await {
            Outcome::Done => {}
            Outcome::Failed => status = 1,
            Outcome::Quit => return status,
        }
    }
}
