//! The options of a new image: reading them, their defaults, and which of them go together (digest, section 6).
//!
//! What the format could do but this driver can't yet is refused by name. No I/O.

use block_core::{
    driver::Preallocation,
    error::{Error, Result},
    options::{Options, parse_size},
};
use crypto::EncryptionFormat;
use serde_json::Value;

use crate::{
    compress::Codec,
    layout::{Geometry, extensions::MAX_BACKING_FORMAT, header::MAX_BACKING_NAME},
};

/// The parameters of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// Bytes of the virtual disk, a multiple of 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the refcount width.
    pub refcount_order: u32,
    /// Whether refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// How compressed clusters are going to be compressed.
    pub codec: Codec,
    /// Whether L2 entries are extended: 32 subclusters in each cluster.
    pub extended_l2: bool,
    /// The external data file: made beside the image, as `file:PATH` where the program runs. The header gets the path.
    pub data_file: Option<String>,
    /// Whether the data file by itself has to be a raw image of the disk.
    pub data_file_raw: bool,
    /// What is allocated from the start.
    pub preallocation: Preallocation,
    /// The backing file's name for the header.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// How guest data is encrypted.
    pub encryption: Option<EncryptionFormat>,
    /// The id of the secret that it opens with.
    pub key_secret: Option<String>,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            lazy_refcounts: false,
            codec: Codec::Zlib,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            backing_file: None,
            backing_format: None,
            encryption: None,
            key_secret: None,
        }
    }
}

fn not_accepted(key: &str, value: &str, allowed: &str) -> Error {
    Error::invalid(format!("Parameter '{key}' does not accept value '{value}'"))
        .with_field(key, value, allowed)
}

/// Takes a number of bytes or a plain number out.
fn take_number(options: &mut Options, key: &str) -> Result<Option<u64>> {
    let expected = |value: &str| {
        Error::invalid(format!(
            "Parameter '{key}' expects a non-negative number below 2^64"
        ))
        .with_field(
            key,
            value,
            "a number with an optional suffix k, M, G, T, P or E",
        )
    };
    match options.take(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => match number.as_u64() {
            Some(number) => Ok(Some(number)),
            None => Err(expected(&number.to_string())),
        },
        Some(Value::String(text)) => parse_size(&text)
            .map(Some)
            .map_err(|error| expected(&text).with_source(error)),
        Some(other) => Err(expected(&other.to_string())),
    }
}

/// A power of two as the number of its bit.
fn log2_within(value: u64, least: u32, most: u32) -> Option<u32> {
    let bits = value.trailing_zeros();
    (value.is_power_of_two() && (least..=most).contains(&bits)).then_some(bits)
}

impl Parameters {
    /// Reads the options of a new image; `size` must be among them.
    pub fn from_options(mut options: Options) -> Result<Self> {
        let size = take_number(&mut options, "size")?
            .ok_or_else(|| Error::invalid("Image creation needs a size parameter"))?;
        Self::for_size(size, options)
    }

    /// Reads the options of a new image of `size` bytes, which are rounded up to a multiple of 512.
    pub fn for_size(size: u64, mut options: Options) -> Result<Self> {
        options.take("size");
        let size = size.checked_next_multiple_of(512).ok_or_else(|| {
            Error::new(block_core::ErrorKind::TooBig, "Image size is too large").with_field(
                "size",
                size,
                "below 2^63",
            )
        })?;
        let version = match options.take_str("compat")?.as_deref() {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => return Err(not_accepted("version", other, "v2 [0.10] or v3 [1.1]")),
        };
        let cluster_size = take_number(&mut options, "cluster_size")?.unwrap_or(65536);
        let cluster_bits =
            log2_within(
                cluster_size,
                Geometry::MIN_CLUSTER_BITS,
                Geometry::MAX_CLUSTER_BITS,
            )
            .ok_or_else(|| {
                Error::invalid("Cluster size must be a power of two between 512 and 2048k")
                    .with_field("cluster_size", cluster_size, "512..=2097152")
            })?;
        let refcount_bits = take_number(&mut options, "refcount_bits")?.unwrap_or(16);
        let refcount_order = log2_within(refcount_bits, 0, Geometry::MAX_REFCOUNT_ORDER)
            .ok_or_else(|| {
                Error::invalid("Refcount width must be a power of two and may not exceed 64 bits")
                    .with_field("refcount_bits", refcount_bits, "1, 2, 4, 8, 16, 32 or 64")
            })?;
        if version < 3 && refcount_order != 4 {
            return Err(Error::invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use \
                 version=v3 or greater)",
            )
            .with_field("refcount_bits", refcount_bits, "16"));
        }
        let lazy_refcounts = options.take_switch("lazy_refcounts")?.unwrap_or(false);
        if version < 3 && lazy_refcounts {
            return Err(Error::invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or \
                 greater)",
            )
            .with_field("lazy_refcounts", "on", "off"));
        }
        let codec = take_codec(&mut options, version)?;
        let extended_l2 = take_extended_l2(&mut options, version, cluster_size)?;
        let (data_file, data_file_raw) = take_data_file(&mut options, version)?;
        let preallocation = match options.take_str("preallocation")?.as_deref() {
            None | Some("off") => Preallocation::Off,
            Some("metadata") => Preallocation::Metadata,
            Some("falloc") => Preallocation::Falloc,
            Some("full") => Preallocation::Full,
            Some(other) => {
                return Err(not_accepted(
                    "preallocation",
                    other,
                    "off, metadata, falloc or full",
                ));
            }
        };
        let (encryption, key_secret) = take_encryption(&mut options)?;
        let backing_file = options.take_str("backing_file")?;
        let backing_format = options
            .take_str("backing_fmt")?
            .filter(|format| !format.is_empty());
        check_backing(
            backing_file.as_deref(),
            backing_format.as_deref(),
            preallocation,
            extended_l2,
        )?;
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        if encryption.is_some() && version < 3 && preallocation != Preallocation::Off {
            // Such clusters can't be marked as zeroes, and what is in them would be decrypted.
            return Err(Error::unsupported(
                "Preallocation of encrypted images is only supported with compatibility level 1.1 and above (use \
                 version=v3 or greater)",
            )
            .with_field("preallocation", "on", "off"));
        }
        if let Some(name) = &backing_file
            && data_file_raw
        {
            return Err(Error::invalid(
                "Backing file and data-file-raw cannot be used at the same time",
            )
            .with_field("backing_file", name, "none with data_file_raw"));
        }
        Ok(Self {
            size,
            version,
            cluster_bits,
            refcount_order,
            lazy_refcounts,
            codec,
            extended_l2,
            data_file,
            data_file_raw,
            preallocation,
            backing_file,
            backing_format,
            encryption,
            key_secret,
        })
    }

    /// The sizes that follow.
    ///
    /// # Panics
    /// If fields were set to what the format doesn't allow.
    pub fn geometry(&self) -> Geometry {
        let ordinary = Geometry::new(self.cluster_bits, self.refcount_order, self.version);
        let geometry = if self.extended_l2 {
            ordinary.and_then(Geometry::with_extended_l2)
        } else {
            ordinary
        };
        match geometry {
            Some(geometry) => geometry.with_data_file(self.data_file.is_some()),
            None => panic!("the parameters were checked when they were read"),
        }
    }
}

fn take_codec(options: &mut Options, version: u32) -> Result<Codec> {
    let Some(name) = options.take_str("compression_type")? else {
        return Ok(Codec::Zlib);
    };
    match Codec::from_name(&name) {
        Some(codec) if codec != Codec::Zlib && version < 3 => Err(Error::invalid(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)",
        )
        .with_field("compression_type", name, "zlib")),
        Some(codec) => Ok(codec),
        None => Err(not_accepted("compression-type", &name, "zlib or zstd")),
    }
}

/// Whether L2 entries are to be extended, if this version and cluster size allow it.
fn take_extended_l2(options: &mut Options, version: u32, cluster_size: u64) -> Result<bool> {
    let wanted = options.take_switch("extended_l2")?.unwrap_or(false);
    if wanted && cluster_size < 1 << Geometry::MIN_EXTENDED_CLUSTER_BITS {
        return Err(Error::invalid(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        )
        .with_field("cluster_size", cluster_size, "at least 16384"));
    }
    if wanted && version < 3 {
        return Err(Error::invalid(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)",
        )
        .with_field("compat", "0.10", "1.1 with extended L2 entries"));
    }
    Ok(wanted)
}

fn take_data_file(options: &mut Options, version: u32) -> Result<(Option<String>, bool)> {
    let name = options.take_str("data_file")?;
    let raw = options.take_switch("data_file_raw")?.unwrap_or(false);
    if let Some(name) = &name
        && version < 3
    {
        return Err(Error::invalid(
            "External data files are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)",
        )
        .with_field("data_file", name, "none"));
    }
    if raw && name.is_none() {
        return Err(
            Error::invalid("data-file-raw requires data-file").with_field(
                "data_file_raw",
                "on",
                "off",
            ),
        );
    }
    Ok((name, raw))
}

/// Takes out what is said below `encrypt`, as an object or as dotted keys.
///
/// # Errors
/// EINVAL when `encrypt` is something else.
pub(crate) fn take_below_encrypt(options: &mut Options) -> Result<Options> {
    let mut encrypt = match options.take("encrypt") {
        None | Some(Value::Null) => Options::new(),
        Some(Value::Object(map)) => Options(map),
        Some(other) => {
            return Err(
                Error::invalid("Parameter 'encrypt' expects an object").with_field(
                    "encrypt",
                    other,
                    "an object",
                ),
            );
        }
    };
    let flat: Vec<String> = options.0.keys().cloned().collect();
    for key in flat {
        if let Some(name) = key.strip_prefix("encrypt.")
            && let Some(value) = options.take(&key)
        {
            encrypt.set(name, value);
        }
    }
    Ok(encrypt)
}

/// Takes `encrypt.*` and `encryption` out: how the image is encrypted, and the id of the secret.
fn take_encryption(options: &mut Options) -> Result<(Option<EncryptionFormat>, Option<String>)> {
    let legacy = options.take_switch("encryption")?;
    let mut encrypt = take_below_encrypt(options)?;
    if let Some(legacy) = legacy {
        if encrypt.get("format").is_some() {
            return Err(Error::invalid(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
            ));
        }
        if legacy {
            encrypt.set("format", "aes");
        }
    }
    if encrypt.0.is_empty() {
        return Ok((None, None));
    }
    let (format, secret) = EncryptionFormat::parse(encrypt)?;
    Ok((Some(format), secret))
}

fn check_backing(
    file: Option<&str>,
    format: Option<&str>,
    preallocation: Preallocation,
    extended_l2: bool,
) -> Result<()> {
    let Some(file) = file else {
        return match format {
            Some(format) => Err(Error::invalid(
                "Backing format cannot be used without backing file",
            )
            .with_field("backing_fmt", format, "none without backing_file")),
            None => Ok(()),
        };
    };
    if file.is_empty() {
        return Err(Error::invalid(
            "Expected backing file name, got empty string",
        ));
    }
    if file.len() > MAX_BACKING_NAME {
        return Err(Error::invalid("Backing file name too long").with_field(
            "backing_file",
            file.len(),
            format!("at most {MAX_BACKING_NAME} bytes"),
        ));
    }
    let Some(format) = format else {
        return Err(
            Error::invalid("Backing file specified without backing format").with_field(
                "backing_fmt",
                "absent",
                "the format of the backing file",
            ),
        );
    };
    if format.len() > MAX_BACKING_FORMAT {
        return Err(Error::invalid("Backing format name too long").with_field(
            "backing_fmt",
            format,
            format!("at most {MAX_BACKING_FORMAT} bytes"),
        ));
    }
    if preallocation != Preallocation::Off && !extended_l2 {
        return Err(Error::invalid(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        )
        .with_field(
            "preallocation",
            format!("{preallocation:?}").to_lowercase(),
            "off",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Parameters> {
        Parameters::from_options(Options::from_dotted(text)?)
    }

    #[test]
    fn the_defaults_are_qemus() {
        assert_eq!(
            read("size=64M").unwrap(),
            Parameters {
                size: 64 << 20,
                ..Parameters::default()
            }
        );
        assert_eq!(read("size=1000").unwrap().size, 1024);
    }

    #[test]
    fn every_option_is_read() {
        let all = read(
            "size=1G,compat=1.1,cluster_size=4k,refcount_bits=1,lazy_refcounts=on,compression_type=zstd,\
             extended_l2=off,data_file_raw=off,encryption=off,backing_file=a,backing_fmt=raw",
        )
        .unwrap();
        assert_eq!(
            all,
            Parameters {
                size: 1 << 30,
                version: 3,
                cluster_bits: 12,
                refcount_order: 0,
                lazy_refcounts: true,
                codec: Codec::Zstd,
                extended_l2: false,
                data_file: None,
                data_file_raw: false,
                preallocation: Preallocation::Off,
                backing_file: Some("a".into()),
                backing_format: Some("raw".into()),
                encryption: None,
                key_secret: None,
            }
        );
        for (text, version) in [("0.10", 2), ("v2", 2), ("1.1", 3), ("v3", 3)] {
            assert_eq!(
                read(&format!("size=0,compat={text}")).unwrap().version,
                version
            );
        }
        for (text, mode) in [
            ("off", Preallocation::Off),
            ("metadata", Preallocation::Metadata),
            ("falloc", Preallocation::Falloc),
            ("full", Preallocation::Full),
        ] {
            let read = read(&format!("size=0,preallocation={text}")).unwrap();
            assert_eq!(read.preallocation, mode);
        }
    }

    #[test]
    fn preallocation_goes_with_a_backing_file_if_l2_entries_are_extended() {
        let parameters =
            read("size=1M,extended_l2=on,preallocation=metadata,backing_file=a,backing_fmt=raw")
                .unwrap();
        assert!(parameters.extended_l2 && parameters.geometry().has_extended_l2());
        assert_eq!(parameters.preallocation, Preallocation::Metadata);
    }

    #[test]
    fn numbers_may_be_json_numbers() {
        let options = Options::new()
            .with("size", 1024u64)
            .with("cluster_size", 4096u64);
        assert_eq!(Parameters::from_options(options).unwrap().cluster_bits, 12);
    }

    #[test]
    fn every_error_has_qemus_text() {
        for (text, message) in [
            ("", "Image creation needs a size parameter"),
            (
                "size=1,compat=9",
                "Parameter 'version' does not accept value '9'",
            ),
            (
                "size=1,cluster_size=1000",
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                "size=1,cluster_size=4M",
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                "size=1,cluster_size=256",
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                "size=1,refcount_bits=3",
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                "size=1,refcount_bits=128",
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                "size=1,refcount_bits=0",
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                "size=1,preallocation=xyz",
                "Parameter 'preallocation' does not accept value 'xyz'",
            ),
            (
                "size=1,compression_type=foo",
                "Parameter 'compression-type' does not accept value 'foo'",
            ),
            (
                "size=1,compression_type=zstd,compat=0.10",
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use \
                 version=v3 or greater)",
            ),
            (
                "size=1,lazy_refcounts=on,compat=v2",
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or \
                 greater)",
            ),
            (
                "size=1,refcount_bits=8,compat=v2",
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use \
                 version=v3 or greater)",
            ),
            (
                "size=1,backing_fmt=raw",
                "Backing format cannot be used without backing file",
            ),
            (
                "size=1,backing_file=a",
                "Backing file specified without backing format",
            ),
            (
                "size=1,backing_file=",
                "Expected backing file name, got empty string",
            ),
            (
                "size=1,preallocation=full,backing_file=a,backing_fmt=raw",
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ),
            (
                "size=1,data_file_raw=on",
                "data-file-raw requires data-file",
            ),
            (
                "size=1,extended_l2=on,cluster_size=8k",
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ),
            (
                "size=1,extended_l2=on,compat=v2",
                "Extended L2 entries are only supported with compatibility level 1.1 and above (use \
                 version=v3 or greater)",
            ),
            (
                "size=1,lazy_refcounts=maybe",
                "Parameter 'lazy_refcounts' expects 'on' or 'off'",
            ),
            ("size=1,nonsense=1", "Invalid parameter 'nonsense'"),
        ] {
            assert_eq!(read(text).expect_err(text).reason(), message);
        }
    }
}
