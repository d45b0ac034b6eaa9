//! The `encrypt.*` options of image creation, with qemu's names, defaults and words.

use block_core::{
    error::{Error, Result},
    options::Options,
    secret::{Secret, Secrets},
};

use crate::{
    cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenAlgorithm},
    hash::HashAlgorithm,
    luks::CreateParameters,
};

/// How a new image is to be encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncryptionFormat {
    /// qcow2's method 1.
    Aes,
    /// LUKS.
    Luks(CreateParameters),
}

impl EncryptionFormat {
    /// Reads `format`, `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg` and `iter-time` out of
    /// `options`, the part below `encrypt`, and the id of the secret, `key-secret`.
    ///
    /// # Errors
    /// EINVAL for an option that is unknown or has no such value.
    pub fn parse(mut options: Options) -> Result<(Self, Option<String>)> {
        let Some(format) = options.take_str("format")? else {
            return Err(
                Error::invalid("Parameter 'encrypt.format' is missing").with_field(
                    "encrypt.format",
                    "missing",
                    "aes, luks",
                ),
            );
        };
        let secret = options.take_str("key-secret")?;
        let format = match format.as_str() {
            "aes" => Self::Aes,
            "luks" => Self::Luks(luks(&mut options)?),
            other => {
                return Err(Error::invalid(format!(
                    "Parameter 'format' does not accept value '{other}'"
                ))
                .with_field("encrypt.format", other, "aes, luks"));
            }
        };
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter 'encrypt.{key}'")));
        }
        Ok((format, secret))
    }

    /// Bytes that the header and the key material take in the image.
    pub fn area_len(&self) -> u64 {
        match self {
            Self::Aes => 0,
            Self::Luks(parameters) => parameters.area_len(),
        }
    }
}

fn luks(options: &mut Options) -> Result<CreateParameters> {
    let mut parameters = CreateParameters::default();
    let mut spec = CipherSpec::default();
    if let Some(name) = options.take_str("cipher-alg")? {
        spec.algorithm = CipherAlgorithm::from_option(&name)?;
    }
    if let Some(name) = options.take_str("cipher-mode")? {
        spec.mode = CipherMode::from_option(&name)?;
    }
    if let Some(name) = options.take_str("ivgen-alg")? {
        spec.ivgen = IvGenAlgorithm::from_option(&name)?;
    }
    if let Some(name) = options.take_str("ivgen-hash-alg")? {
        spec.ivgen_hash = Some(HashAlgorithm::from_option("ivgen-hash-alg", &name)?);
    }
    if let Some(name) = options.take_str("hash-alg")? {
        parameters.hash = HashAlgorithm::from_option("hash-alg", &name)?;
    }
    if let Some(time) = take_number(options, "iter-time")? {
        parameters.iter_time = time;
    }
    if spec.ivgen == IvGenAlgorithm::Essiv {
        spec.ivgen_hash.get_or_insert(HashAlgorithm::Sha256);
    }
    parameters.spec = spec;
    parameters.check()?;
    Ok(parameters)
}

/// Takes a whole number out of the options below `encrypt`.
pub fn take_number(options: &mut Options, key: &str) -> Result<Option<u64>> {
    let Some(value) = options.take(key) else {
        return Ok(None);
    };
    let text = match &value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    // As qemu reads it: a negative number wraps.
    let number = text
        .parse::<u64>()
        .ok()
        .or_else(|| text.parse::<i64>().ok().map(|number| number as u64));
    number.map(Some).ok_or_else(|| {
        Error::invalid(format!("Parameter 'encrypt.{key}' expects a number")).with_field(
            format!("encrypt.{key}"),
            text,
            "a whole number",
        )
    })
}

/// No secret was named for an encrypted image.
pub fn missing_key() -> Error {
    Error::invalid("Parameter 'encrypt.key-secret' is required for cipher").with_field(
        "encrypt.key-secret",
        "missing",
        "the id of a secret",
    )
}

/// The password that the secret `id` holds. Passwords are text.
///
/// # Errors
/// EINVAL when no id was given or the secret isn't UTF-8 without NUL, ENOENT when there is no such secret.
pub fn passphrase(secrets: &Secrets, id: Option<&str>) -> Result<Secret> {
    let id = id.ok_or_else(missing_key)?;
    let secret = secrets.get(id)?;
    if std::str::from_utf8(secret.expose()).is_err() || secret.expose().contains(&0) {
        return Err(Error::invalid(format!(
            "Data from secret {id} is not valid UTF-8"
        )));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(EncryptionFormat, Option<String>)> {
        EncryptionFormat::parse(Options::from_dotted(text)?)
    }

    #[test]
    fn the_defaults_are_those_of_qemu() {
        let (format, secret) = parse("format=luks,key-secret=s").unwrap();
        assert_eq!(format, EncryptionFormat::Luks(CreateParameters::default()));
        assert_eq!(secret.as_deref(), Some("s"));
        assert_eq!(format.area_len(), 2_068_480);
        let EncryptionFormat::Luks(essiv) = parse("format=luks,cipher-mode=cbc,ivgen-alg=essiv")
            .unwrap()
            .0
        else {
            panic!("LUKS was asked for");
        };
        assert_eq!(essiv.spec.mode_text(), "cbc-essiv:sha256");
    }

    #[test]
    fn what_cannot_be_is_refused_in_qemus_words() {
        for (text, message) in [
            ("key-secret=s", "Parameter 'encrypt.format' is missing"),
            (
                "format=foo",
                "Parameter 'format' does not accept value 'foo'",
            ),
            (
                "format=luks,cipher-alg=rot13",
                "Parameter 'cipher-alg' does not accept value 'rot13'",
            ),
            (
                "format=luks,cipher-alg=des",
                "Algorithm 'des' not supported",
            ),
            (
                "format=luks,cipher-alg=cast5-128",
                "Unsupported cipher mode xts",
            ),
            (
                "format=luks,ivgen-alg=essiv,ivgen-hash-alg=sha1",
                "No AES cipher with key size 20 available",
            ),
            (
                "format=luks,cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=essiv",
                "Cipher cast5-128 not supported with essiv",
            ),
            (
                "format=luks,iter-time=x",
                "Parameter 'encrypt.iter-time' expects a number",
            ),
            ("format=luks,foo=1", "Invalid parameter 'encrypt.foo'"),
            (
                "format=aes,hash-alg=md5",
                "Invalid parameter 'encrypt.hash-alg'",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().reason(), message, "{text}");
        }
        assert!(parse("format=luks,cipher-alg=aes-192,cipher-mode=cbc").is_err());
    }

    #[test]
    fn a_password_is_text() {
        let secrets = Secrets::new();
        secrets.add("bad", Secret::new(vec![b'a', 0xff])).unwrap();
        secrets.add("nul", Secret::new(vec![b'a', 0])).unwrap();
        secrets.add("good", Secret::new("päss")).unwrap();
        for id in ["bad", "nul"] {
            let error = passphrase(&secrets, Some(id)).unwrap_err();
            assert_eq!(
                error.reason(),
                format!("Data from secret {id} is not valid UTF-8")
            );
        }
        assert!(passphrase(&secrets, Some("good")).is_ok());
        assert_eq!(
            passphrase(&secrets, None).unwrap_err().reason(),
            "Parameter 'encrypt.key-secret' is required for cipher"
        );
        assert_eq!(
            passphrase(&secrets, Some("x")).unwrap_err().reason(),
            "No secret with id 'x'"
        );
    }
}
