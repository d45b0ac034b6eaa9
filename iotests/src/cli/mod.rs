//! The program's command line: what can be asked, and the exit status. Each command has a file of its own; everything but
//! printing is left to the library.
//!
//! Exit status: 0 when all passed (or weren't covered), 1 when something failed, 2 when something proved nothing, 3 for
//! wrong usage.

mod crash;
mod race;
mod run;
mod select;

use std::{ops::Range, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::{explore, simulate, suite::Suite};

/// The exit status for wrong usage.
const USAGE: u8 = 3;

#[derive(Parser)]
#[command(
    name = "iotests",
    version,
    about = "Conformance, race, crash and cancellation tests for block drivers",
    after_help = "Exit status: 0 all passed or not covered, 1 something failed, 2 something proved nothing, 3 usage."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs cases and prints a matrix of cases against formats
    Run(run::RunArgs),
    /// Lists cases: name, group, and the sentence that each proves
    List(run::ListArgs),
    /// Runs storms with and without the gate and the driver's own safeguards
    Race(race::RaceArgs),
    Simulate(simulate::cli::Simulate),
    Minimise(simulate::cli::Minimise),
    Replay(simulate::cli::Replay),
    Explore(explore::cli::Explore),
    #[cfg(feature = "mutants")]
    Mutants(crate::hunt::Hunt),
    /// Cuts the power after every n-th write of the storage, opens what is left, and judges it
    Crash(crash::CrashArgs),
    /// Prints a storm as commands for `blk io` and `qemu-io` on standard input
    StormCommands(race::StormArgs),
}

/// What a command comes to: the exit status, or what was wrong with its usage.
type Status = Result<u8, String>;

/// Runs the program with the drivers of `suite` on the process's arguments.
pub fn main(suite: &Suite) -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nobody is left to be told when the terminal has gone.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    let status = match arguments.command {
        Command::Run(args) => run::run(suite, &args),
        Command::List(args) => run::list(suite, &args),
        Command::Race(args) => race::race(suite, &args),
        Command::Simulate(args) => args.run(suite.registry(), suite.bare()),
        Command::Minimise(args) => args.run(suite.registry(), suite.bare()),
        Command::Replay(args) => args.run(suite.registry(), suite.bare()),
        #[cfg(feature = "mutants")]
        Command::Mutants(args) => args.run(suite),
        Command::Crash(args) => crash::crash(suite, &args),
        Command::Explore(args) => args.run(suite),
        Command::StormCommands(args) => race::storm_commands(&args),
    };
    match status {
        Ok(status) => ExitCode::from(status),
        Err(text) => {
            eprintln!("iotests: {text}");
            ExitCode::from(USAGE)
        }
    }
}

/// Seeds as the command line has them: `17`, or `0..100` without its end.
///
/// # Errors
/// What isn't a number, and what is empty.
pub fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_| format!("'{text}' is no number"))
    };
    let seeds = match text.split_once("..") {
        Some((from, to)) => number(from)?..number(to)?,
        None => {
            let seed = number(text)?;
            let end = seed.checked_add(1).ok_or("the seed is too large")?;
            seed..end
        }
    };
    if seeds.is_empty() {
        return Err(format!("there is no seed in '{text}'"));
    }
    Ok(seeds)
}

/// A value that holds JSON for programs, on standard output.
fn print_json(value: &impl serde::Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| error.to_string())?;
    print_text(&text);
    Ok(())
}

/// Standard output that may be closed at any time, as with `| head`.
fn print_text(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn seeds_are_one_or_a_range_and_never_none() {
        assert_eq!(parse_seeds("7"), Ok(7..8));
        assert_eq!(parse_seeds("2..5"), Ok(2..5));
        assert!(parse_seeds("5..5").is_err());
        assert!(parse_seeds("x").is_err());
        assert!(parse_seeds("18446744073709551615").is_err());
    }
}
