//! How a command ends when it didn't do what it was asked: messages for people and an exit status for scripts.
//!
//! The first line of a message is qemu's; as `blk`, the field, node and place that the error knows follow.

use std::fmt::Display;

use block_core::{Error, ErrorKind};

use super::{
    output::{complain, flush_out},
    program::Program,
};

/// Result of a command: its exit status.
pub type Outcome = Result<u8, Failure>;

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    /// The exit status.
    pub code: u8,
    messages: Vec<String>,
    details: Vec<String>,
    /// `Try 'blk … --help' for more info`, with the command that it is about.
    help: Option<&'static str>,
}

impl Failure {
    /// Exit status 1 with a message. Lines after the first are printed as they are.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            code: 1,
            messages: vec![message.into()],
            details: Vec::new(),
            help: None,
        }
    }

    /// Wrong usage of `command`.
    pub fn usage(command: &'static str, message: impl Into<String>) -> Self {
        Self {
            help: Some(command),
            ..Self::new(message)
        }
    }

    /// The image `name` couldn't be opened.
    pub fn open(name: &str, error: &Error) -> Self {
        Self::context(format_args!("Could not open '{name}'"), error)
    }

    /// `context: reason`.
    pub fn context(context: impl Display, error: &Error) -> Self {
        Self::new(format!("{context}: {}", with_hint(error))).with_details(error)
    }

    /// A request failed: `context: ` and the words of the errno, which is all that scripts know; the reason follows.
    pub fn io(context: impl Display, error: &Error) -> Self {
        let words = error.kind().strerror();
        let mut failure = Self::new(format!("{context}: {words}"));
        if error.reason() != words {
            failure.details.push(error.reason());
        }
        failure.with_details(error)
    }

    /// Another exit status.
    #[must_use]
    pub fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Puts a name before the first message.
    #[must_use]
    pub fn prefixed(mut self, name: &str) -> Self {
        if let Some(first) = self.messages.first_mut() {
            *first = format!("{name}: {first}");
        }
        self
    }

    /// Another message after the first.
    #[must_use]
    pub fn and(mut self, message: impl Into<String>) -> Self {
        self.messages.push(message.into());
        self
    }

    /// Adds what else the error knows.
    #[must_use]
    pub fn with_details(mut self, error: &Error) -> Self {
        let mut parts = Vec::new();
        if let Some(field) = error.field() {
            parts.push(format!(
                "field '{}' is {}, allowed: {}",
                field.name, field.value, field.allowed
            ));
        }
        if let Some(operation) = error.operation() {
            parts.push(match error.range() {
                Some((offset, len)) if len > 0 => {
                    format!("during {operation} at {offset:#x}+{len:#x}")
                }
                _ => format!("during {operation}"),
            });
        }
        if let Some(file) = error.file() {
            parts.push(format!("in file '{file}'"));
        }
        if !parts.is_empty() {
            self.details.push(parts.join(", "));
        }
        self
    }

    /// Prints it.
    pub fn report(&self, program: Program) {
        flush_out();
        let name = program.name();
        for message in &self.messages {
            complain!("{name}: {message}");
        }
        if !program.is_qemu() {
            for detail in &self.details {
                complain!("     ({detail})");
            }
        }
        if let Some(command) = self.help {
            let space = if command.is_empty() { "" } else { " " };
            complain!(
                "Try '{}{space}{command} --help' for more info",
                program.argv0()
            );
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if error.kind() == ErrorKind::Cancelled {
            return Self::new(error.reason()).with_code(130);
        }
        Self::new(with_hint(&error)).with_details(&error)
    }
}

/// The reason, with what qemu-img advises to do about it.
fn with_hint(error: &Error) -> String {
    let mut reason = error.reason();
    if reason.ends_with("is inconsistent and cannot be used") {
        reason.push_str("\nTry block-dirty-bitmap-remove to delete this bitmap from disk");
    }
    if error.field().is_some_and(|field| field.name == IMAGE_NAME) {
        reason.push_str("\nblk --trust-image-names, or BLK_TRUST_IMAGE_NAMES=1 in the environment, follows such names");
    }
    reason
}

/// What the core calls a name in an image that isn't a path.
const IMAGE_NAME: &str = "file name in an image";
