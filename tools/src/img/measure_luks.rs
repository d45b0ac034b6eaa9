//! How large a disk gets as a LUKS container of its own: the header and the key material, then the disk. Such containers are only
//! measured here (there is no driver for them); qcow2 has LUKS inside.

use block_core::{
    Options,
    error::{Error, ErrorKind, Result},
    registry::{CreateOption, Measure},
    secret::Secrets,
};
use crypto::{EncryptionFormat, passphrase};

/// The create options of the target.
pub const OPTIONS: [CreateOption; 9] = [
    option("cipher-alg", "str", "Name of encryption cipher algorithm"),
    option("cipher-mode", "str", "Name of encryption cipher mode"),
    option("hash-alg", "str", "Name of encryption hash algorithm"),
    option("iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    option("ivgen-alg", "str", "Name of IV generator algorithm"),
    option(
        "ivgen-hash-alg",
        "str",
        "Name of IV generator hash algorithm",
    ),
    option(
        "key-secret",
        "str",
        "ID of the secret that provides the keyslot passphrase",
    ),
    option(
        "preallocation",
        "str",
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    option("size", "size", "Virtual disk size"),
];

const fn option(name: &'static str, kind: &'static str, help: &'static str) -> CreateOption {
    CreateOption { name, kind, help }
}

/// Bytes of a container for a disk of `size` bytes.
///
/// # Errors
/// EINVAL for options that a container can't be made with and for a secret that isn't there, as if it were made.
pub fn measure(secrets: &Secrets, size: u64, mut options: Options) -> Result<Measure> {
    // Neither changes the size, and qemu-img looks at neither.
    options.take("preallocation");
    options.take("size");
    options.set("format", "luks");
    let (format, id) = EncryptionFormat::parse(options)?;
    let Some(id) = id else {
        let error = Error::invalid("Parameter 'key-secret' is required for cipher");
        return Err(error.with_field("key-secret", "missing", "the id of a secret"));
    };
    passphrase(secrets, Some(&id))?;
    let bytes = size.checked_add(format.area_len()).ok_or_else(|| {
        Error::new(
            ErrorKind::TooBig,
            "The image size is too large for file format 'luks'",
        )
        .with_field("size", size, "less than 2^64 with the header")
    })?;
    Ok(Measure {
        required: bytes,
        fully_allocated: bytes,
    })
}
