//! The options of a raw node and of raw image creation, and the rules they obey. No I/O here.

use block_core::{
    Error, ErrorKind, Result,
    driver::Preallocation,
    options::{Options, Size},
};
use serde::Deserialize;

/// Virtual sizes are multiples of this, as in QEMU.
pub(crate) const SECTOR: u64 = 512;

/// What stands beside `"driver": "raw"`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawOptions {
    /// Where the disk begins in the file, in bytes.
    offset: Option<Size>,
    /// How long it is, in bytes; everything up to the file's end when absent.
    size: Option<Size>,
}

/// A part of the file that is the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes, when that is fixed.
    pub size: Option<u64>,
}

impl RawOptions {
    /// The window that these options ask for in a file of `file_length` bytes.
    pub(crate) fn window(self, file_length: u64) -> Result<Window> {
        let offset = self.offset.map_or(0, |size| size.0);
        let size = self.size.map(|size| size.0);
        if offset > file_length {
            return Err(Error::invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({file_length})"
            ))
            .with_field("offset", offset, format!("0..={file_length}")));
        }
        if let Some(size) = size {
            if size > file_length - offset {
                return Err(Error::invalid(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size \
                     of the containing file ({file_length})"
                ))
                .with_field("size", size, format!("0..={}", file_length - offset)));
            }
            if size % SECTOR != 0 {
                return Err(
                    Error::invalid(format!("Specified size is not multiple of {SECTOR}"))
                        .with_field("size", size, format!("a multiple of {SECTOR}")),
                );
            }
        }
        Ok(Window { offset, size })
    }
}

impl Window {
    /// Its length in a file of `file_length` bytes.
    pub(crate) fn length(self, file_length: u64) -> u64 {
        self.size
            .unwrap_or_else(|| file_length.saturating_sub(self.offset))
    }

    /// The offset in the file of `offset` in the window, when `len` bytes from there fit 64 bits and the window.
    pub(crate) fn locate(self, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len);
        if self
            .size
            .is_some_and(|size| end.is_none_or(|end| end > size))
        {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "request leaves the fixed-size raw disk",
            ));
        }
        end.and_then(|end| end.checked_add(self.offset))
            .map(|end| end - len)
            .ok_or_else(|| Error::invalid("offset overflow"))
    }
}

/// What `-o` takes.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawCreate {
    size: Option<Size>,
    #[serde(default)]
    pub preallocation: Preallocation,
}

impl RawCreate {
    pub(crate) fn parse(options: Options) -> Result<Self> {
        options.parse()
    }

    /// The virtual size, rounded up to sectors.
    pub(crate) fn size(&self) -> Result<u64> {
        round_up(self.size.map_or(0, |size| size.0))
    }
}

/// Rounds a virtual size up to sectors.
pub(crate) fn round_up(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(SECTOR)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::new(ErrorKind::TooBig, "The image size is too large"))
}
