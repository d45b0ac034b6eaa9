//! What an amend asks for, and whether the image can be that. No I/O.

use block_core::{
    error::{Error, ErrorKind, Result},
    options::{Options, parse_size},
    registry::CreateOption,
};
use serde_json::Value;

use crate::{
    create,
    layout::{Autoclear, Compatible, Header, Incompatible, SnapshotEntry},
};

/// The options, for help texts.
pub const OPTIONS: &[CreateOption] = &[
    CreateOption::new("backing_file", "str", "File name of a base image"),
    CreateOption::new("backing_fmt", "str", "Image format of the base image"),
    CreateOption::new(
        "compat",
        "str",
        "Compatibility level (v2 [0.10] or v3 [1.1])",
    ),
    CreateOption::new("data_file", "str", "File name of an external data file"),
    CreateOption::new(
        "data_file_raw",
        "bool (on/off)",
        "The external data file must stay valid as a raw image",
    ),
    CreateOption::new(
        "encrypt.iter-time",
        "num",
        "Time to spend in PBKDF in milliseconds",
    ),
    CreateOption::new(
        "encrypt.keyslot",
        "num",
        "Select a single keyslot to modify explicitly",
    ),
    CreateOption::new(
        "encrypt.new-secret",
        "str",
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    CreateOption::new(
        "encrypt.old-secret",
        "str",
        "Select all keyslots that match this password",
    ),
    CreateOption::new(
        "encrypt.state",
        "str",
        "Select new state of affected keyslots (active/inactive)",
    ),
    CreateOption::new(
        "lazy_refcounts",
        "bool (on/off)",
        "Postpone refcount updates",
    ),
    CreateOption::new(
        "refcount_bits",
        "num",
        "Width of a reference count entry in bits",
    ),
    CreateOption::new("size", "size", "Virtual disk size"),
];

/// What the image is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub version: u32,
    pub refcount_order: u32,
    pub lazy_refcounts: bool,
    /// Another size, in bytes.
    pub size: Option<u64>,
    /// Another name for the data file.
    pub data_file: Option<String>,
    /// The data file needn't be a raw image of the disk any more.
    pub clear_data_file_raw: bool,
    /// The type of compression is one that the image can only lose without compressed clusters.
    pub needs_no_compressed: bool,
}

impl Wanted {
    /// What changes in the header but for tables, the width of refcounts and the size, which are written in place.
    pub fn write_to(&self, header: &mut Header) {
        header.version = self.version;
        header
            .compatible
            .set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        if self.clear_data_file_raw {
            header.autoclear -= Autoclear::RAW_DATA_FILE;
        }
        self.write_data_file(header);
    }

    /// Another name of the data file. An empty one is none: whoever opens the image has to say where its data is.
    pub fn write_data_file(&self, header: &mut Header) {
        if let Some(name) = &self.data_file {
            header.extensions.data_file = (!name.is_empty()).then(|| name.as_bytes().to_vec());
        }
    }

    /// Reads the options; what they don't say stays as `header` has it.
    ///
    /// # Errors
    /// EINVAL for options that are wrong, unknown or for creation only, ENOTSUP for what can't be changed.
    pub fn read(
        mut options: Options,
        header: &Header,
        snapshots: &[SnapshotEntry],
    ) -> Result<Self> {
        let version = match options.take_str("compat")?.as_deref() {
            None => header.version,
            Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => {
                return Err(
                    Error::invalid(format!("Unknown compatibility level {other}")).with_field(
                        "compat",
                        other,
                        "v2 [0.10] or v3 [1.1]",
                    ),
                );
            }
        };
        let lazy = options.take_switch("lazy_refcounts")?;
        let refcount_order = refcount_order(&mut options)?;
        let size = size(&mut options)?;
        let (data_file, clear_data_file_raw) = data_file(&mut options, header)?;
        check_backing(&mut options, header)?;
        if let Some(key) = options.0.keys().next() {
            let name = key.split('.').next().unwrap_or_default();
            let for_creation = create::OPTIONS
                .iter()
                .any(|option| option.name == key || option.name == name);
            return Err(Error::invalid(if for_creation {
                format!(
                    "Invalid parameter '{key}'\nThis option is only supported for image creation"
                )
            } else {
                format!("Invalid parameter '{key}'")
            }));
        }
        let wanted = Self {
            version,
            refcount_order: refcount_order.unwrap_or(header.refcount_order),
            lazy_refcounts: version >= 3 && lazy.unwrap_or(header.lazy_refcounts()),
            size,
            data_file,
            clear_data_file_raw,
            needs_no_compressed: version < 3 && header.compression_type != 0,
        };
        if version < 3 {
            wanted.check_version_2(header, snapshots, refcount_order, lazy)?;
        }
        Ok(wanted)
    }

    /// What an image of version 2 can't have.
    fn check_version_2(
        &self,
        header: &Header,
        snapshots: &[SnapshotEntry],
        refcount_order: Option<u32>,
        lazy: Option<bool>,
    ) -> Result<()> {
        if refcount_order.is_some_and(|order| order != 4) {
            return Err(Error::invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use \
                 compat=1.1 or greater)",
            )
            .with_field("refcount_bits", 1u64 << self.refcount_order, "16"));
        }
        // Those that are on already go with the version, whether or not they are asked for.
        if lazy == Some(true) && !header.lazy_refcounts() {
            return Err(Error::invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or \
                 greater)",
            )
            .with_field("lazy_refcounts", "on", "off"));
        }
        if header.version < 3 {
            return Ok(());
        }
        if self.refcount_order != 4 {
            return Err(
                Error::unsupported("compat=0.10 requires refcount_bits=16").with_field(
                    "refcount_bits",
                    1u64 << self.refcount_order,
                    "16",
                ),
            );
        }
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            return Err(Error::unsupported(
                "Cannot downgrade an image with a data file",
            ));
        }
        // The dirty bit goes on the way, the type of compression when nothing is compressed.
        let features = header.incompatible - (Incompatible::DIRTY | Incompatible::COMPRESSION);
        if !features.is_empty() {
            return Err(Error::unsupported(format!(
                "Cannot downgrade an image with incompatible features {:#x} set",
                features.bits()
            )));
        }
        // Version 2 knows no disk size of a snapshot's own, and no VM state of 4 GiB.
        let size = self.size.unwrap_or(header.size);
        let is_lost = |entry: &SnapshotEntry| {
            entry.vm_state_size > u32::MAX.into() || entry.disk_size.is_some_and(|own| own != size)
        };
        if snapshots.len() != header.nb_snapshots as usize || snapshots.iter().any(is_lost) {
            return Err(Error::unsupported(
                "Internal snapshots prevent downgrade of image",
            ));
        }
        Ok(())
    }
}

fn refcount_order(options: &mut Options) -> Result<Option<u32>> {
    let bits = match options.take("refcount_bits") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => text.parse().ok(),
        Some(_) => None,
    };
    let bits = bits.ok_or_else(|| Error::invalid("Parameter 'refcount_bits' expects a number"))?;
    if !bits.is_power_of_two() || bits > 64 {
        return Err(Error::invalid(
            "Refcount width must be a power of two and may not exceed 64 bits",
        )
        .with_field("refcount_bits", bits, "1, 2, 4, 8, 16, 32 or 64"));
    }
    Ok(Some(bits.trailing_zeros()))
}

fn size(options: &mut Options) -> Result<Option<u64>> {
    let size = match options.take("size") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => parse_size(&text).ok(),
        Some(_) => None,
    };
    let size = size.ok_or_else(|| {
        Error::invalid("Parameter 'size' expects a non-negative number below 2^64")
    })?;
    if size % 512 != 0 {
        return Err(
            Error::invalid("The new size must be a multiple of 512").with_field(
                "size",
                size,
                "a multiple of 512",
            ),
        );
    }
    Ok(Some(size))
}

fn data_file(options: &mut Options, header: &Header) -> Result<(Option<String>, bool)> {
    let name = options.take_str("data_file")?;
    let raw = options.take_switch("data_file_raw")?;
    let has_data_file = header.incompatible.contains(Incompatible::DATA_FILE);
    if name.is_some() && !has_data_file {
        return Err(Error::invalid(
            "data-file can only be set for images that use an external data file",
        ));
    }
    let is_raw = header.autoclear.contains(Autoclear::RAW_DATA_FILE);
    if raw == Some(true) && !is_raw {
        return Err(Error::invalid(
            "data-file-raw cannot be set on existing images",
        ));
    }
    Ok((name, raw == Some(false) && is_raw))
}

/// The backing file is a matter of rebase: it may be named here only as it is.
fn check_backing(options: &mut Options, header: &Header) -> Result<()> {
    let file = options.take_str("backing_file")?;
    let format = options.take_str("backing_fmt")?;
    if file.is_none() && format.is_none() {
        return Ok(());
    }
    let same = file == header.backing_file_name() && format == header.extensions.backing_format;
    if !same {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        ));
    }
    Ok(())
}
