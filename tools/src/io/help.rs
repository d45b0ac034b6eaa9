//! The commands of qemu-io: names, options, usage and help texts.

use super::commands::Outcome;
use crate::common::output::say;

/// One command.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// A short name.
    short: &'static str,
    /// Its arguments, as the usage line shows them.
    arguments: &'static str,
    /// One line of help.
    line: &'static str,
    /// Its options, as getopt has them.
    pub options: &'static str,
    /// It changes the image.
    pub writes: bool,
    /// The fewest and most words that may follow it.
    count: (usize, Option<usize>),
    /// More help.
    more: &'static str,
}

const fn command(
    name: &'static str,
    short: &'static str,
    arguments: &'static str,
    line: &'static str,
    options: &'static str,
    writes: bool,
    count: (usize, Option<usize>),
    more: &'static str,
) -> Command {
    Command {
        name,
        short,
        arguments,
        line,
        options,
        writes,
        count,
        more,
    }
}

const READ: &str = "
 reads a range of bytes from the given offset

 Example:
 'read -v 512 1k' - dumps 1 kilobyte read from 512 bytes into the file

 -C, -- report statistics in a machine parsable format
 -l, -- length for pattern verification (only with -P)
 -P, -- use a pattern to verify read data
 -q, -- quiet mode, do not show I/O statistics
 -s, -- start offset for pattern verification (only with -P)
 -v, -- dump buffer to standard output
";
const READV: &str = "
 reads a range of bytes from the given offset into multiple buffers

 Example:
 'readv -v 512 1k 1k ' - dumps 2 kilobytes read from 512 bytes into the file

 -C, -- report statistics in a machine parsable format
 -P, -- use a pattern to verify read data
 -v, -- dump buffer to standard output
 -q, -- quiet mode, do not show I/O statistics
";
const WRITE: &str = "
 writes a range of bytes from the given offset

 Example:
 'write 512 1k' - writes 1 kilobyte at 512 bytes into the open file

 Writes into a segment of the currently open file, using a buffer
 filled with a set pattern (0xcdcdcdcd).
 -c, -- write compressed data
 -C, -- report statistics in a machine parsable format
 -f, -- use Force Unit Access semantics
 -n, -- with -z, don't allow slow fallback
 -P, -- use different pattern to fill file
 -q, -- quiet mode, do not show I/O statistics
 -s, -- use a pattern file to fill the write buffer
 -u, -- with -z, allow unmapping
 -z, -- write zeroes
";
const WRITEV: &str = "
 writes a range of bytes from the given offset source from multiple buffers

 Example:
 'writev 512 1k 1k' - writes 2 kilobytes at 512 bytes into the open file

 -C, -- report statistics in a machine parsable format
 -f, -- use Force Unit Access semantics
 -P, -- use different pattern to fill file
 -q, -- quiet mode, do not show I/O statistics
";
const AIO: &str = "
 The request runs in the background; aio_flush completes all that is
 outstanding. The command is considered successful once the request is
 submitted, independently of potential I/O errors or pattern mismatches.
";

/// All commands, in the order of `help`.
pub const COMMANDS: &[Command] = &[
    command(
        "abort",
        "",
        "",
        "simulate a program crash using abort(3)",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "aio_flush",
        "",
        "",
        "completes all outstanding aio requests",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "aio_read",
        "",
        "[-Ciqrv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
        "CiP:qrv",
        false,
        (2, None),
        AIO,
    ),
    command(
        "aio_write",
        "",
        "[-Cfiqruz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
        "CfiP:qruz",
        true,
        (2, None),
        AIO,
    ),
    command(
        "alloc",
        "",
        "offset [count]",
        "checks if offset is allocated in the file",
        "",
        false,
        (1, Some(2)),
        "",
    ),
    command(
        "break",
        "",
        "event tag",
        "sets a breakpoint on event and tags the stopped request as tag",
        "",
        false,
        (2, Some(2)),
        "",
    ),
    command(
        "close",
        "c",
        "",
        "close the current open file",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "discard",
        "d",
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        "Cq",
        true,
        (2, None),
        "
 discards a range of bytes from the given offset

 Example:
 'discard 512 1k' - discards 1 kilobyte from 512 bytes into the file
",
    ),
    command(
        "flush",
        "f",
        "",
        "flush all in-core file state to disk",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "help",
        "?",
        "[command]",
        "help for one or all commands",
        "",
        false,
        (0, Some(1)),
        "",
    ),
    command(
        "info",
        "i",
        "",
        "prints information about the current file",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "length",
        "l",
        "",
        "gets the length of the current file",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "map",
        "",
        "",
        "prints the allocated areas of a file",
        "",
        false,
        (0, Some(0)),
        "",
    ),
    command(
        "open",
        "o",
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
        "rsCnkUt:d:i:o:",
        false,
        (1, None),
        "",
    ),
    command(
        "quit",
        "q",
        "",
        "exit the program",
        "",
        false,
        (0, None),
        "",
    ),
    command(
        "read",
        "r",
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
        "abCl:pP:qrs:v",
        false,
        (2, None),
        READ,
    ),
    command(
        "readv",
        "",
        "[-Cqrv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
        "CP:qrv",
        false,
        (2, None),
        READV,
    ),
    command(
        "remove_break",
        "",
        "tag",
        "remove a breakpoint by tag",
        "",
        false,
        (1, Some(1)),
        "",
    ),
    command(
        "reopen",
        "",
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
        "rwc:o:",
        false,
        (0, None),
        "",
    ),
    command(
        "resume",
        "",
        "tag",
        "resumes the request tagged as tag",
        "",
        false,
        (1, Some(1)),
        "",
    ),
    command(
        "sigraise",
        "",
        "signal",
        "raises a signal",
        "",
        false,
        (1, Some(1)),
        "",
    ),
    command(
        "sleep",
        "",
        "",
        "waits for the given value in milliseconds",
        "",
        false,
        (1, Some(1)),
        "",
    ),
    command(
        "truncate",
        "t",
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
        "m:",
        true,
        (1, Some(3)),
        "",
    ),
    command(
        "wait_break",
        "",
        "tag",
        "waits for the suspension of a request",
        "",
        false,
        (1, Some(1)),
        "",
    ),
    command(
        "write",
        "w",
        "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
        "bcCfnpP:qrs:uz",
        true,
        (2, None),
        WRITE,
    ),
    command(
        "writev",
        "",
        "[-Cfqr] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        "CfqrP:",
        true,
        (2, None),
        WRITEV,
    ),
    command(
        "zone_append",
        "zap",
        "offset len [len..]",
        "append write a number of bytes at a specified offset",
        "",
        false,
        (3, Some(4)),
        "",
    ),
    command(
        "zone_close",
        "zc",
        "offset len",
        "close a range of zones in zone block device",
        "",
        false,
        (2, Some(2)),
        "",
    ),
    command(
        "zone_finish",
        "zf",
        "offset len",
        "finish a range of zones in zone block device",
        "",
        false,
        (2, Some(2)),
        "",
    ),
    command(
        "zone_open",
        "zo",
        "offset len",
        "explicit open a range of zones in zone block device",
        "",
        false,
        (2, Some(2)),
        "",
    ),
    command(
        "zone_report",
        "zrp",
        "offset number",
        "report zone information",
        "",
        false,
        (2, Some(2)),
        "",
    ),
    command(
        "zone_reset",
        "zrs",
        "offset len",
        "reset a zone write pointer in zone block device",
        "",
        false,
        (2, Some(2)),
        "",
    ),
];

/// The command called `name`.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| {
        command.name == name || (!command.short.is_empty() && command.short == name)
    })
}

impl Command {
    /// The usage line.
    pub fn usage(&self) -> String {
        self.usage_as(self.name)
    }

    /// The usage line of the command that was called by this one of its names.
    fn usage_as(&self, name: &str) -> String {
        let space = if self.arguments.is_empty() && self.name != "map" {
            ""
        } else {
            " "
        };
        format!("{name}{space}{} -- {}", self.arguments, self.line)
    }

    /// Whether as many words follow `name`, one of the command's, as may.
    pub fn check_count(&self, name: &str, args: &[&str]) -> Result<(), String> {
        let count = args.len();
        let (least, most) = self.count;
        if count < least && most.is_none() {
            return Err(format!(
                "bad argument count {count} to {name}, expected at least {least} arguments"
            ));
        }
        if let Some(most) = most
            && (count < least || count > most)
        {
            let expected = if least == most {
                format!("{least} arguments")
            } else {
                format!("between {least} and {most} arguments")
            };
            return Err(format!(
                "bad argument count {count} to {name}, expected {expected}"
            ));
        }
        Ok(())
    }
}

/// Prints help for one command, or for all.
pub fn show(name: Option<&str>) -> Outcome {
    let Some(name) = name else {
        for command in COMMANDS {
            say!("{}", command.usage());
        }
        say!("\nUse 'help commandname' for extended help.");
        return Outcome::Done;
    };
    let Some(command) = find(name) else {
        say!("command {name} not found");
        return Outcome::Failed;
    };
    say!("{}", command.usage_as(name));
    if !command.more.is_empty() {
        say!("{}", command.more);
    }
    Outcome::Done
}
