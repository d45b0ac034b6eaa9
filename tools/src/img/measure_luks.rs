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
    CreateOption::new("cipher-alg", "str", "Name of encryption cipher algorithm"),
    CreateOption::new("cipher-mode", "str", "Name of encryption cipher mode"),
    CreateOption::new("hash-alg", "str", "Name of encryption hash algorithm"),
    CreateOption::new("iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    CreateOption::new("ivgen-alg", "str", "Name of IV generator algorithm"),
    CreateOption::new(
        "ivgen-hash-alg",
        "str",
        "Name of IV generator hash algorithm",
    ),
    CreateOption::new(
        "key-secret",
        "str",
        "ID of the secret that provides the keyslot passphrase",
    ),
    CreateOption::new(
        "preallocation",
        "str",
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    CreateOption::new("size", "size", "Virtual disk size"),
];

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
