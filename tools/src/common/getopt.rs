//! Command lines as `getopt_long` reads them, with its messages: options and operands in any order, short options
//! in one word, long options by an unambiguous beginning. A command describes its options once; help text comes from the
//! same table. (An argument parser with rules of its own would break the scripts that this crate is for.)

use std::fmt::Write as _;

/// One option of a command.
#[derive(Debug, Clone, Copy)]
pub struct Opt {
    /// `-x`.
    pub short: Option<char>,
    /// `--name`, by which the value is asked for.
    pub long: &'static str,
    /// What its argument is called, if it takes one.
    pub value: Option<&'static str>,
    /// One line for people.
    pub help: &'static str,
}

impl Opt {
    /// An option without an argument. `short` is a space if there is no short form.
    pub const fn flag(short: char, long: &'static str, help: &'static str) -> Self {
        Self {
            short: if short == ' ' { None } else { Some(short) },
            long,
            value: None,
            help,
        }
    }

    /// An option with an argument. `short` is a space if there is no short form.
    pub const fn value(
        short: char,
        long: &'static str,
        value: &'static str,
        help: &'static str,
    ) -> Self {
        Self {
            short: if short == ' ' { None } else { Some(short) },
            long,
            value: Some(value),
            help,
        }
    }
}

/// What a command line said.
#[derive(Debug, Default)]
pub struct Parsed {
    values: Vec<(&'static str, Option<String>)>,
    /// The operands, in order.
    pub free: Vec<String>,
}

impl Parsed {
    /// Whether the option was given.
    pub fn has(&self, long: &str) -> bool {
        self.values.iter().any(|(name, _)| *name == long)
    }

    /// How often the option was given.
    pub fn count(&self, long: &str) -> usize {
        self.values.iter().filter(|(name, _)| *name == long).count()
    }

    /// Its last argument.
    pub fn get(&self, long: &str) -> Option<&str> {
        let mut given = self.values.iter().rev();
        given
            .find(|(name, _)| *name == long)
            .and_then(|(_, value)| value.as_deref())
    }

    /// All options in the order in which they were given, with their arguments.
    pub fn in_order(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.values
            .iter()
            .map(|(name, value)| (*name, value.as_deref()))
    }

    /// All its arguments, in order.
    pub fn all<'a>(&'a self, long: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.values
            .iter()
            .filter(move |(name, _)| *name == long)
            .filter_map(|(_, value)| value.as_deref())
    }
}

/// Why a command line wasn't read to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// `-h` or `--help`.
    Help,
    /// It is wrong; getopt's message.
    Bad(String),
}

/// Reads `args` (without the program's and the command's name). `permute` lets options follow operands.
pub fn parse(options: &[Opt], args: &[String], permute: bool) -> Result<Parsed, Stop> {
    let mut parsed = Parsed::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            parsed.free.extend(args.cloned());
            break;
        }
        if let Some(long) = arg.strip_prefix("--") {
            let (name, inline) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let option = find_long(options, name, arg)?;
            let value = match (option.value, inline) {
                (Some(_), Some(value)) => Some(value),
                (Some(_), None) => Some(args.next().cloned().ok_or_else(|| {
                    Stop::Bad(format!("option '--{}' requires an argument", option.long))
                })?),
                (None, None) => None,
                (None, Some(_)) => {
                    return Err(Stop::Bad(format!(
                        "option '--{}' doesn't allow an argument",
                        option.long
                    )));
                }
            };
            parsed.values.push((option.long, value));
        } else if arg.len() > 1 && arg.starts_with('-') {
            let mut rest = arg[1..].chars();
            while let Some(short) = rest.next() {
                if short == 'h' && !options.iter().any(|option| option.short == Some('h')) {
                    return Err(Stop::Help);
                }
                let option = options
                    .iter()
                    .find(|option| option.short == Some(short))
                    .ok_or_else(|| Stop::Bad(format!("invalid option -- '{short}'")))?;
                if option.value.is_none() {
                    parsed.values.push((option.long, None));
                    continue;
                }
                let value = if rest.as_str().is_empty() {
                    args.next().cloned().ok_or_else(|| {
                        Stop::Bad(format!("option requires an argument -- '{short}'"))
                    })?
                } else {
                    rest.as_str().to_owned()
                };
                parsed.values.push((option.long, Some(value)));
                break;
            }
        } else {
            parsed.free.push(arg.clone());
            if !permute {
                parsed.free.extend(args.cloned());
                break;
            }
        }
    }
    Ok(parsed)
}

fn find_long<'a>(options: &'a [Opt], name: &str, arg: &str) -> Result<&'a Opt, Stop> {
    if let Some(option) = options.iter().find(|option| option.long == name) {
        return Ok(option);
    }
    let matches: Vec<&Opt> = options
        .iter()
        .filter(|option| option.long.starts_with(name))
        .collect();
    let help = "help".starts_with(name) && !name.is_empty();
    match (matches.as_slice(), help) {
        ([], true) => Err(Stop::Help),
        ([only], false) => Ok(only),
        ([], false) => Err(Stop::Bad(format!("unrecognized option '--{name}'"))),
        (many, _) => {
            let mut text = format!("option '{arg}' is ambiguous; possibilities:");
            for option in many {
                let _ = write!(text, " '--{}'", option.long);
            }
            if help {
                text.push_str(" '--help'");
            }
            Err(Stop::Bad(text))
        }
    }
}

/// The help text of a command: what it does, how it is called, its options.
pub fn help(call: &str, about: &str, usage: &str, options: &[Opt]) -> String {
    let mut text = format!("{about}\n\nUsage: {call} {usage}\n\nOptions:\n");
    let mut line = |left: String, help: &str| {
        if left.len() > 30 {
            let _ = writeln!(text, "  {left}\n  {:30}  {help}", "");
        } else {
            let _ = writeln!(text, "  {left:30}  {help}");
        }
    };
    for option in options {
        let short = match option.short {
            Some(short) => format!("-{short}, "),
            None => "    ".to_owned(),
        };
        let value = option
            .value
            .map_or(String::new(), |value| format!(" {value}"));
        line(format!("{short}--{}{value}", option.long), option.help);
    }
    line("-h, --help".to_owned(), "print this help and exit");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: &[Opt] = &[
        Opt::flag('q', "quiet", "say nothing"),
        Opt::flag('p', "progress", "show progress"),
        Opt::value('o', "options", "OPTS", "options"),
        Opt::value(' ', "output", "FORMAT", "format"),
    ];

    fn read(line: &str) -> Result<Parsed, Stop> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(OPTIONS, &args, true)
    }

    #[test]
    fn options_may_come_in_any_order_and_together() {
        let parsed = read("a -qpo x=1 b --output=json -oy --opt z -- -q").unwrap();
        assert_eq!(parsed.free, ["a", "b", "-q"]);
        assert!(parsed.has("quiet") && parsed.has("progress"));
        assert_eq!(parsed.all("options").collect::<Vec<_>>(), ["x=1", "y", "z"]);
        assert_eq!(parsed.get("output"), Some("json"));
    }

    #[test]
    fn the_messages_are_getopts() {
        for (line, message) in [
            ("-z", "invalid option -- 'z'"),
            ("-qo", "option requires an argument -- 'o'"),
            ("--bogus", "unrecognized option '--bogus'"),
            ("--options", "option '--options' requires an argument"),
            ("--quiet=1", "option '--quiet' doesn't allow an argument"),
            (
                "--o=1",
                "option '--o=1' is ambiguous; possibilities: '--options' '--output'",
            ),
        ] {
            assert_eq!(
                read(line).unwrap_err(),
                Stop::Bad(message.to_owned()),
                "{line}"
            );
        }
        assert_eq!(read("-qh").unwrap_err(), Stop::Help);
        assert_eq!(read("--he").unwrap_err(), Stop::Help);
    }
}
