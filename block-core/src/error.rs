//! The one error type of the block layer.
//!
//! An [`Error`] has a [`ErrorKind`] that maps to an errno, and says on which node and file, in which operation and
//! where it happened; a parse error names the field, its value and what would have been allowed. Libraries
//! return errors and never print them. This file holds no policy about which errors are retried.

use std::{error::Error as StdError, fmt};

/// Result with the block layer's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in terms that map to an errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Input/output error (EIO).
    Io,
    /// A parameter, option or field is invalid (EINVAL).
    InvalidInput,
    /// The image's metadata is damaged or impossible (EIO for the request that met it).
    Corrupt,
    /// Not an image of this format (EINVAL).
    WrongFormat,
    /// A file, node, job or bitmap doesn't exist (ENOENT).
    NotFound,
    /// It exists already (EEXIST).
    AlreadyExists,
    /// The operation isn't permitted: read-only node, or the handle lacks the permission (EPERM).
    NotPermitted,
    /// The operating system refused access (EACCES).
    AccessDenied,
    /// The storage below is read-only (EROFS).
    ReadOnly,
    /// No space left (ENOSPC).
    NoSpace,
    /// The driver can't do this (ENOTSUP).
    NotSupported,
    /// In use by something else (EBUSY).
    Busy,
    /// Somebody else holds a conflicting lock (EAGAIN).
    Locked,
    /// No medium: the node was shut after it was found corrupt, or closed (ENOMEDIUM).
    NoMedium,
    /// Too large (EFBIG).
    TooBig,
    /// Cancelled (ECANCELED).
    Cancelled,
    /// Out of memory, or a bound on memory was hit (ENOMEM).
    OutOfMemory,
    /// Any other errno of the operating system.
    Os(i32),
}

impl ErrorKind {
    /// The errno that this kind stands for (Linux numbering).
    pub const fn errno(self) -> i32 {
        match self {
            Self::Io | Self::Corrupt => 5,
            Self::InvalidInput | Self::WrongFormat => 22,
            Self::NotFound => 2,
            Self::AlreadyExists => 17,
            Self::NotPermitted => 1,
            Self::AccessDenied => 13,
            Self::ReadOnly => 30,
            Self::NoSpace => 28,
            Self::NotSupported => 95,
            Self::Busy => 16,
            Self::Locked => 11,
            Self::NoMedium => 123,
            Self::TooBig => 27,
            Self::Cancelled => 125,
            Self::OutOfMemory => 12,
            Self::Os(errno) => errno,
        }
    }

    /// The kind that an errno stands for (Linux numbering).
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            5 => Self::Io,
            22 => Self::InvalidInput,
            2 => Self::NotFound,
            17 => Self::AlreadyExists,
            1 => Self::NotPermitted,
            13 => Self::AccessDenied,
            30 => Self::ReadOnly,
            28 => Self::NoSpace,
            95 | 38 => Self::NotSupported,
            16 => Self::Busy,
            11 => Self::Locked,
            123 => Self::NoMedium,
            27 => Self::TooBig,
            125 => Self::Cancelled,
            12 => Self::OutOfMemory,
            other => Self::Os(other),
        }
    }

    /// The text that `strerror` gives for this kind's errno, as qemu users know it.
    pub fn strerror(self) -> String {
        match self {
            Self::Io | Self::Corrupt => "Input/output error".into(),
            Self::InvalidInput | Self::WrongFormat => "Invalid argument".into(),
            Self::NotFound => "No such file or directory".into(),
            Self::AlreadyExists => "File exists".into(),
            Self::NotPermitted => "Operation not permitted".into(),
            Self::AccessDenied => "Permission denied".into(),
            Self::ReadOnly => "Read-only file system".into(),
            Self::NoSpace => "No space left on device".into(),
            Self::NotSupported => "Operation not supported".into(),
            Self::Busy => "Device or resource busy".into(),
            Self::Locked => "Resource temporarily unavailable".into(),
            Self::NoMedium => "No medium found".into(),
            Self::TooBig => "File too large".into(),
            Self::Cancelled => "Operation canceled".into(),
            Self::OutOfMemory => "Cannot allocate memory".into(),
            Self::Os(errno) => {
                let text = std::io::Error::from_raw_os_error(errno).to_string();
                match text.rfind(" (os error") {
                    Some(at) => text[..at].to_owned(),
                    None => text,
                }
            }
        }
    }
}

/// The operation during which an error happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Operation {
    Open,
    Create,
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    Truncate,
    BlockStatus,
    CopyRange,
    Check,
    Snapshot,
    Reopen,
    Close,
    Job,
    Graph,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Create => "create",
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write zeroes",
            Self::Discard => "discard",
            Self::Flush => "flush",
            Self::Truncate => "truncate",
            Self::BlockStatus => "block status",
            Self::CopyRange => "copy range",
            Self::Check => "check",
            Self::Snapshot => "snapshot",
            Self::Reopen => "reopen",
            Self::Close => "close",
            Self::Job => "job",
            Self::Graph => "graph change",
        })
    }
}

/// A field of an image or an option whose value isn't allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field's name as the specification (or the option's key) has it.
    pub name: String,
    /// The value found.
    pub value: String,
    /// What would have been allowed.
    pub allowed: String,
}

/// An error of the block layer. One pointer wide, so that `Result`s stay small.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    node: Option<String>,
    file: Option<String>,
    operation: Option<Operation>,
    range: Option<(u64, u64)>,
    field: Option<FieldError>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` with a message for people. An empty message stands for `strerror`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            node: None,
            file: None,
            operation: None,
            range: None,
            field: None,
            source: None,
        }))
    }

    /// An error that says no more than its kind.
    pub fn from_kind(kind: ErrorKind) -> Self {
        Self::new(kind, String::new())
    }

    /// EINVAL with a message.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    /// ENOTSUP with a message.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotSupported, message)
    }

    /// EIO with a message.
    pub fn io(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Io, message)
    }

    /// Damaged metadata.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// The field `name` has the value `value`, where `allowed` says what could have stood there.
    #[must_use]
    pub fn with_field(
        mut self,
        name: impl Into<String>,
        value: impl fmt::Display,
        allowed: impl Into<String>,
    ) -> Self {
        self.0.field = Some(FieldError {
            name: name.into(),
            value: value.to_string(),
            allowed: allowed.into(),
        });
        self
    }

    /// Names the node, unless one further down was named already.
    #[must_use]
    pub fn with_node(mut self, node: impl Into<String>) -> Self {
        self.0.node.get_or_insert_with(|| node.into());
        self
    }

    /// Names the file, unless one further down was named already.
    #[must_use]
    pub fn with_file(mut self, file: impl Into<String>) -> Self {
        self.0.file.get_or_insert_with(|| file.into());
        self
    }

    /// Says which operation failed and where, in bytes, unless that is known already.
    #[must_use]
    pub fn with_operation(mut self, operation: Operation, offset: u64, len: u64) -> Self {
        if self.0.operation.is_none() {
            self.0.operation = Some(operation);
            self.0.range = Some((offset, len));
        }
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Puts `context` and a colon before the message, as in `Could not open 'a.qcow2': reason`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        let reason = self.reason();
        self.0.message = format!("{context}: {reason}");
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno that a guest sees.
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }

    /// The message alone, without node, file and range: what the tools print after the file's name.
    pub fn reason(&self) -> String {
        if self.0.message.is_empty() {
            self.0.kind.strerror()
        } else {
            self.0.message.clone()
        }
    }

    /// The node on which it happened.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The file on which it happened.
    pub fn file(&self) -> Option<&str> {
        self.0.file.as_deref()
    }

    /// The operation that failed.
    pub fn operation(&self) -> Option<Operation> {
        self.0.operation
    }

    /// Offset and length in bytes of the request that failed.
    pub fn range(&self) -> Option<(u64, u64)> {
        self.0.range
    }

    /// The field that was wrong.
    pub fn field(&self) -> Option<&FieldError> {
        self.0.field.as_ref()
    }

    /// A copy without the source, for those who share one failed operation (a flush, an allocation).
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self(Box::new(Inner {
            kind: self.0.kind,
            message: self.0.message.clone(),
            node: self.0.node.clone(),
            file: self.0.file.clone(),
            operation: self.0.operation,
            range: self.0.range,
            field: self.0.field.clone(),
            source: None,
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.write_str(&self.reason())?;
        if let Some(field) = &inner.field {
            write!(
                f,
                " (field '{}' is {}, allowed: {})",
                field.name, field.value, field.allowed
            )?;
        }
        let mut open = false;
        let mut sep = |f: &mut fmt::Formatter<'_>| {
            let text = if open { ", " } else { " [" };
            open = true;
            f.write_str(text)
        };
        if let Some(operation) = inner.operation {
            sep(f)?;
            write!(f, "{operation}")?;
            // Opening, flushing and the like have no range.
            if let Some((offset, len)) = inner.range.filter(|range| *range != (0, 0)) {
                write!(f, " at {offset:#x}+{len:#x}")?;
            }
        }
        if let Some(node) = &inner.node {
            sep(f)?;
            write!(f, "node '{node}'")?;
        }
        if let Some(file) = &inner.file {
            sep(f)?;
            write!(f, "file '{file}'")?;
        }
        if open { f.write_str("]") } else { Ok(()) }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(errno) => ErrorKind::from_errno(errno),
            None => match error.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                std::io::ErrorKind::InvalidInput => ErrorKind::InvalidInput,
                std::io::ErrorKind::StorageFull => ErrorKind::NoSpace,
                std::io::ErrorKind::Unsupported => ErrorKind::NotSupported,
                _ => ErrorKind::Io,
            },
        };
        Self::from_kind(kind).with_source(error)
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self::from_kind(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_file_field_and_range() {
        let error = Error::invalid("Unsupported cluster size: 2^99")
            .with_field("cluster_bits", 99, "9..=21")
            .with_operation(Operation::Open, 0, 104)
            .with_node("disk0")
            .with_file("a.qcow2");
        assert_eq!(
            error.to_string(),
            "Unsupported cluster size: 2^99 (field 'cluster_bits' is 99, allowed: 9..=21) \
             [open at 0x0+0x68, node 'disk0', file 'a.qcow2']"
        );
        assert_eq!(error.errno(), 22);
    }

    #[test]
    fn the_innermost_node_and_file_win() {
        let error = Error::io("").with_node("file0").with_node("disk0");
        assert_eq!(error.node(), Some("file0"));
        assert_eq!(error.reason(), "Input/output error");
    }

    #[test]
    fn errno_round_trips() {
        for errno in 1..=133 {
            let back = ErrorKind::from_errno(errno).errno();
            assert!(
                back == errno || (errno == 38 && back == 95),
                "{errno} became {back}"
            );
        }
    }
}
