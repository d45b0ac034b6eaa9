//! The small language of qemu-io's command lines: words, options, numbers, patterns. No I/O happens here.

use block_core::options::parse_size;

/// The longest data request, in bytes, as qemu-io has it.
pub const MAX_REQUEST: u64 = 2_147_483_136;

/// Splits a line into words at blanks.
pub fn words(line: &str) -> Vec<&str> {
    line.split_ascii_whitespace().collect()
}

/// What a command was given: options with their values, and the rest in order.
#[derive(Debug, Default)]
pub struct Given {
    options: Vec<(char, Option<String>)>,
    /// Arguments that are no options.
    pub rest: Vec<String>,
}

impl Given {
    /// Reads `args` as getopt does: `spec` lists the letters, a colon behind one says that it takes a value; options
    /// may stand anywhere.
    ///
    /// # Errors
    /// The message that getopt prints.
    pub fn parse(command: &str, spec: &str, args: &[&str]) -> Result<Self, String> {
        let mut given = Self::default();
        if spec.is_empty() {
            // Such commands don't look for any.
            given.rest = args.iter().map(|arg| (*arg).to_owned()).collect();
            return Ok(given);
        }
        let mut args = args.iter();
        let mut only_rest = false;
        while let Some(arg) = args.next() {
            let Some(letters) = arg
                .strip_prefix('-')
                .filter(|l| !l.is_empty() && !only_rest)
            else {
                given.rest.push((*arg).to_owned());
                continue;
            };
            if letters == "-" {
                only_rest = true;
                continue;
            }
            for (index, letter) in letters.char_indices() {
                let place = spec.find(letter).filter(|_| letter != ':');
                let Some(place) = place else {
                    return Err(format!("{command}: invalid option -- '{letter}'"));
                };
                if spec[place + letter.len_utf8()..].starts_with(':') {
                    let inline = &letters[index + letter.len_utf8()..];
                    let value = if inline.is_empty() {
                        args.next()
                            .map(|value| (*value).to_owned())
                            .ok_or_else(|| {
                                format!("{command}: option requires an argument -- '{letter}'")
                            })?
                    } else {
                        inline.to_owned()
                    };
                    given.options.push((letter, Some(value)));
                    break;
                }
                given.options.push((letter, None));
            }
        }
        Ok(given)
    }

    /// Whether an option was given.
    pub fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(given, _)| *given == letter)
    }

    /// The last value of an option.
    pub fn value(&self, letter: char) -> Option<&str> {
        self.options
            .iter()
            .rev()
            .find(|(given, _)| *given == letter)
            .and_then(|(_, value)| value.as_deref())
    }
}

/// A byte count as qemu-io reads it.
///
/// # Errors
/// The message that qemu-io prints.
pub fn number(text: &str) -> Result<u64, String> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let too_large = || Err(format!("Parsing error: argument too large -- {text}"));
    match parse_size(digits) {
        Ok(value) if i64::try_from(value).is_ok() && (!negative || value == 0) => Ok(value),
        Ok(_) => too_large(),
        Err(error) if error.kind() == block_core::ErrorKind::TooBig => too_large(),
        Err(_) => Err(format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        )),
    }
}

/// A pattern byte, decimal, octal or hexadecimal.
///
/// # Errors
/// The message that qemu-io prints.
pub fn pattern(text: &str) -> Result<u8, String> {
    let parsed = if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        u8::from_str_radix(hex, 16)
    } else if text.len() > 1 && text.starts_with('0') {
        u8::from_str_radix(text, 8)
    } else {
        text.parse()
    };
    parsed.map_err(|_| format!("{text} is not a valid pattern byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_may_stand_anywhere_and_be_joined() {
        let given = Given::parse("write", "zuP:", &["0", "-zu", "64k", "-P7"]).unwrap();
        assert!(given.has('z') && given.has('u'));
        assert_eq!(given.value('P'), Some("7"));
        assert_eq!(given.rest, ["0", "64k"]);
        assert_eq!(
            Given::parse("read", "qP:", &["0", "-5"]).unwrap_err(),
            "read: invalid option -- '5'"
        );
        assert_eq!(
            Given::parse("read", "qP:", &["-P"]).unwrap_err(),
            "read: option requires an argument -- 'P'"
        );
    }

    #[test]
    fn numbers_and_patterns_are_refused_as_qemu_io_refuses_them() {
        assert_eq!(number("64k"), Ok(65536));
        assert!(number("1x").unwrap_err().contains("-- 1x"));
        assert_eq!(pattern("0xff"), Ok(255));
        assert_eq!(
            pattern("300").unwrap_err(),
            "300 is not a valid pattern byte"
        );
        assert_eq!(number("+1k"), Ok(1024));
        assert_eq!(
            number("-1").unwrap_err(),
            "Parsing error: argument too large -- -1"
        );
    }
}
