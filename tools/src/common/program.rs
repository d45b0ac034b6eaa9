//! Which program this is: `blk`, or one of qemu's when it was called by that name. Messages begin with it.

use std::{path::Path, sync::OnceLock};

/// `argv[0]`, which goes into hints on how to call the program.
static ARGV0: OnceLock<String> = OnceLock::new();

/// The program that this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `blk SUBCOMMAND`.
    Blk,
    /// `qemu-img`.
    QemuImg,
    /// `qemu-io`.
    QemuIo,
}

impl Program {
    /// The program that `argv[0]` names.
    pub fn from_argv0(argv0: &str) -> Self {
        let name = Path::new(argv0).file_name().and_then(|name| name.to_str());
        match name.unwrap_or_default() {
            "qemu-img" => Self::QemuImg,
            "qemu-io" => Self::QemuIo,
            _ => Self::Blk,
        }
    }

    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::QemuImg => "qemu-img",
            Self::QemuIo => "qemu-io",
        }
    }

    /// Remembers what it was called as.
    pub fn set_argv0(argv0: &str) {
        let _ = ARGV0.set(argv0.to_owned());
    }

    /// What it was called as.
    pub fn argv0(self) -> &'static str {
        ARGV0.get().map_or(self.name(), String::as_str)
    }

    /// Whether it says what qemu's program says and no more.
    pub const fn is_qemu(self) -> bool {
        !matches!(self, Self::Blk)
    }

    /// What `-V` prints.
    pub fn version(self) -> String {
        let version = env!("CARGO_PKG_VERSION");
        match self {
            Self::Blk => format!("blk {version}"),
            other => format!("{} version 10.0.2 (blk {version})", other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_what_it_was_called_as() {
        assert_eq!(Program::from_argv0("/usr/bin/qemu-img"), Program::QemuImg);
        assert_eq!(Program::from_argv0("qemu-io"), Program::QemuIo);
        assert_eq!(Program::from_argv0("target/debug/blk"), Program::Blk);
        assert_eq!(Program::from_argv0(""), Program::Blk);
    }
}
