//! `blk create`, `info`, `check`, …: the commands of `qemu-img`, one file each.

mod amend;
mod args;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod create_options;
mod dd;
mod info;
mod map;
mod measure;
mod measure_luks;
mod rebase;
mod resize;
mod shown_name;
mod snapshot;

use crate::common::{
    getopt::{self, Opt, Parsed, Stop},
    output::{complain, write_out},
    program::Program,
    session::Session,
};

/// One command.
pub struct Command {
    /// What it is called by.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// Its arguments.
    pub usage: &'static str,
    /// Its options.
    pub options: &'static [Opt],
    /// Runs it; gives the exit status.
    pub run: fn(&Session, &Parsed) -> u8,
}

/// All commands.
pub const COMMANDS: &[Command] = &[
    amend::COMMAND,
    bench::COMMAND,
    bitmap::COMMAND,
    check::COMMAND,
    commit::COMMAND,
    compare::COMMAND,
    convert::COMMAND,
    create::COMMAND,
    dd::COMMAND,
    info::COMMAND,
    map::COMMAND,
    measure::COMMAND,
    rebase::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
];

/// Runs the command `name`. `None` when there is none of that name.
pub fn run(program: Program, name: &str, args: &[String]) -> Option<u8> {
    let command = COMMANDS.iter().find(|command| command.name == name)?;
    // A negative size at the end of the line is no option.
    let (args, last) = match args.split_last() {
        Some((last, rest)) if name == "resize" && is_negative(last) => (rest, Some(last.clone())),
        _ => (args, None),
    };
    let parsed = match getopt::parse(command.options, args, true) {
        Ok(mut parsed) => {
            parsed.free.extend(last);
            parsed
        }
        Err(Stop::Help) => {
            let call = format!("{} {name}", program.argv0());
            let text = getopt::help(&call, command.about, command.usage, command.options);
            write_out(format_args!("{text}"));
            return Some(0);
        }
        Err(Stop::Bad(message)) => {
            let argv0 = program.argv0();
            complain!("{argv0} {name}: {message}");
            complain!("Try '{argv0} {name} --help' for more info");
            return Some(1);
        }
    };
    let started = Session::new(program)
        .and_then(|session| args::define_objects(&session, &parsed).map(|()| session));
    match started {
        Ok(session) => Some((command.run)(&session, &parsed)),
        Err(failure) => {
            failure.report(program);
            Some(failure.code)
        }
    }
}

fn is_negative(text: &str) -> bool {
    text.strip_prefix('-')
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}
