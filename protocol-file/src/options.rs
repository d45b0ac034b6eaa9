//! The options of the `file` and `host_device` drivers, beyond those that every node has. Names and messages are qemu's.

use block_core::{
    error::{Error, Result},
    options::{Options, Size, Switch},
};
use serde::Deserialize;

use crate::image_lock::Locking;
use block_core::driver::Preallocation;

/// `aio`: how I/O gets done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
pub enum Aio {
    /// io_uring where the kernel lets us, threads where it doesn't.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// The thread pool.
    #[serde(rename = "threads")]
    Threads,
    /// io_uring, or an error.
    #[serde(rename = "io_uring")]
    IoUring,
    /// Linux AIO's name, which qemu users write for "asynchronous, with O_DIRECT". Like `auto`, but needs
    /// `cache.direct`.
    #[serde(rename = "native")]
    Native,
}

/// `inline`: whether a request may be completed at once, on the task that submits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Inline {
    /// Everything goes through the engine.
    Never,
    /// If the kernel can do it without waiting (RWF_NOWAIT).
    #[default]
    Nowait,
    /// By a plain blocking call, for buffered regular files. For programs that know that they can wait.
    Always,
}

impl Inline {
    /// Its name as an option.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Nowait => "nowait",
            Self::Always => "always",
        }
    }
}

/// Options to open with.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct FileOptions {
    /// The path; `/dev/fdset/N` for a passed descriptor. A leading `file:` or `host_device:` is dropped.
    pub filename: Option<String>,
    /// How I/O gets done.
    pub aio: Aio,
    /// Whether requests may be completed at once; the factory's default if absent.
    pub inline: Option<Inline>,
    /// Image locks.
    pub locking: Locking,
}

/// Options to create with (`-o`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileCreateOptions {
    /// Length of the file.
    pub size: Size,
    /// How its space is reserved.
    pub preallocation: Preallocation,
    /// No copy-on-write (btrfs).
    pub nocow: Switch,
    /// How many bytes the file system reserves at a time, which keeps a file that grows bit by bit in few pieces; 0 leaves that
    /// to the file system. A hint: file systems without extent sizes don't take it.
    pub extent_size_hint: ExtentSizeHint,
}

/// Bytes of `extent_size_hint`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ExtentSizeHint(pub Size);

impl Default for ExtentSizeHint {
    /// 1 MiB, as qemu's.
    fn default() -> Self {
        Self(Size(1 << 20))
    }
}

impl ExtentSizeHint {
    /// The hint as file systems take it.
    ///
    /// # Errors
    /// EINVAL for more than they have bits for.
    pub(crate) fn bytes(self) -> Result<u32> {
        let bytes = self.0.0;
        u32::try_from(bytes).map_err(|_| {
            Error::invalid("Extent size hint is too large").with_field(
                "extent_size_hint",
                bytes,
                format!("at most {}", u32::MAX),
            )
        })
    }
}

const OPEN_KEYS: [&str; 4] = ["filename", "aio", "inline", "locking"];

impl FileOptions {
    /// Reads the options of `driver`.
    pub fn from_options(driver: &str, mut options: Options) -> Result<Self> {
        if let Some(key) = options
            .0
            .keys()
            .find(|key| !OPEN_KEYS.contains(&key.as_str()))
        {
            return Err(Error::invalid(format!(
                "Block protocol '{driver}' doesn't support the option '{key}'"
            )));
        }
        // `locking` is one of qemu's OnOffAuto, which booleans stand for in JSON.
        if let Some(on) = options.get("locking").and_then(serde_json::Value::as_bool) {
            options.set("locking", if on { "on" } else { "off" });
        }
        options.parse()
    }

    /// The path.
    pub fn path(&self, driver: &str) -> Result<String> {
        match self
            .filename
            .as_deref()
            .map(|name| strip_prefix(name).to_owned())
        {
            Some(path) if !path.is_empty() => Ok(path),
            _ => Err(Error::invalid(format!(
                "The '{driver}' block driver requires a file name"
            ))),
        }
    }
}

impl FileCreateOptions {
    /// Reads the options.
    pub fn from_options(options: Options) -> Result<Self> {
        let options: Self = options.parse()?;
        options.extent_size_hint.bytes()?;
        Ok(options)
    }
}

/// A file name without the protocol in front of it.
pub(crate) fn strip_prefix(name: &str) -> &str {
    name.strip_prefix("file:")
        .or_else(|| name.strip_prefix("host_device:"))
        .unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> Result<FileOptions> {
        FileOptions::from_options("file", Options::from_dotted(text)?)
    }

    #[test]
    fn options_read_as_qemu_writes_them() {
        let options =
            open("filename=file:a,,b.raw,aio=io_uring,inline=always,locking=off").unwrap();
        assert_eq!(options.path("file").unwrap(), "a,b.raw");
        assert_eq!(options.aio, Aio::IoUring);
        assert_eq!(options.inline, Some(Inline::Always));
        assert_eq!(options.locking, Locking::Off);
        let json = Options::from_json(r#"{"filename":"a","locking":true}"#).unwrap();
        assert_eq!(
            FileOptions::from_options("file", json).unwrap().locking,
            Locking::On
        );
    }

    #[test]
    fn a_wrong_option_is_named_as_qemu_names_it() {
        let reason = |text| open(text).unwrap_err().reason();
        assert_eq!(
            reason("bogus=1"),
            "Block protocol 'file' doesn't support the option 'bogus'"
        );
        assert_eq!(reason("aio=zz"), "invalid parameter value: zz");
        assert_eq!(reason("locking=zz"), "invalid parameter value: zz");
        let reason = open("aio=threads")
            .unwrap()
            .path("file")
            .unwrap_err()
            .reason();
        assert_eq!(reason, "The 'file' block driver requires a file name");
    }

    #[test]
    fn create_options_read_sizes_with_suffixes() {
        let options = Options::from_dotted("size=1M,preallocation=falloc,nocow=on").unwrap();
        let options = FileCreateOptions::from_options(options).unwrap();
        assert_eq!(options.size.0, 1 << 20);
        assert_eq!(options.preallocation, Preallocation::Falloc);
        assert_eq!(options.extent_size_hint.bytes().unwrap(), 1 << 20);
        let hint = |text: &str| {
            FileCreateOptions::from_options(Options::new().with("extent_size_hint", text))
                .map(|options| options.extent_size_hint.bytes().unwrap())
        };
        assert_eq!(hint("0").unwrap(), 0);
        assert_eq!(hint("4294967295").unwrap(), u32::MAX);
        assert_eq!(
            hint("4G").unwrap_err().reason(),
            "Extent size hint is too large"
        );
        let bad = Options::from_dotted("preallocation=bogus").unwrap();
        let reason = FileCreateOptions::from_options(bad).unwrap_err().reason();
        assert_eq!(reason, "invalid parameter value: bogus");
    }
}
