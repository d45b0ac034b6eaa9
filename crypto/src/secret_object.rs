//! Secrets as a command line defines them: `secret,id=ID,data=TEXT|file=PATH[,format=raw|base64][,keyid=ID,iv=BASE64]`.
//! With `keyid` the data is encrypted (AES-256-CBC, padded) under another secret. The caller reads the file; errors never
//! show what it or `data` held.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use block_core::{
    error::{Error, Result},
    options::Options,
    secret::{Secret, Secrets},
};
use zeroize::Zeroizing;

use crate::cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenAlgorithm};

/// As forgiving about padding as qemu's.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);
/// Bytes of the key that other secrets are encrypted with.
const KEY_LEN: usize = 32;
/// Bytes of a block, and of an IV.
const BLOCK: usize = 16;

fn decode_base64(text: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let packed: Zeroizing<Vec<u8>> = Zeroizing::new(
        text.iter()
            .copied()
            .filter(|byte| !matches!(byte, b'\n' | b'\r' | b' ' | b'\t'))
            .collect(),
    );
    // The cause would quote the data.
    BASE64
        .decode(&*packed)
        .map(Zeroizing::new)
        .map_err(|_| Error::invalid("Base64 data contains invalid characters"))
}

/// The id and the content of a secret that `options` (without the type's name) describe. `read` reads a file.
///
/// # Errors
/// EINVAL with qemu's words; what `read` says.
pub fn load(
    mut options: Options,
    secrets: &Secrets,
    read: impl FnOnce(&str) -> Result<Vec<u8>>,
) -> Result<(String, Secret)> {
    let Some(id) = options.take_str("id")? else {
        return Err(Error::invalid("Parameter 'id' is missing"));
    };
    let is_identifier = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if !is_identifier {
        return Err(Error::invalid(
            "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', starting \
             with a letter.",
        ));
    }
    let data = take_secret_text(&mut options, "data")?;
    let file = options.take_str("file")?;
    let format = options.take_str("format")?;
    let key_id = options.take_str("keyid")?;
    let iv = options.take_str("iv")?;
    if let Some(key) = options.0.keys().next() {
        return Err(Error::invalid(format!("Parameter '{key}' is unexpected")));
    }
    let is_base64 = match format.as_deref() {
        None | Some("raw") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(Error::invalid(format!(
                "Parameter 'format' does not accept value '{other}'"
            ))
            .with_field("format", other, "raw, base64"));
        }
    };
    let mut bytes = match (data, file) {
        (Some(_), Some(_)) => {
            return Err(Error::invalid("'file' and 'data' are mutually exclusive"));
        }
        (None, None) => return Err(Error::invalid("Either 'file' or 'data' must be provided")),
        (Some(data), None) => data,
        (None, Some(file)) => Zeroizing::new(read(&file)?),
    };
    if let Some(key_id) = key_id {
        if is_base64 {
            bytes = decode_base64(&bytes)?;
        }
        bytes = decrypt(&bytes, &secrets.get(&key_id)?, iv.as_deref())?;
    } else if is_base64 {
        bytes = decode_base64(&bytes)?;
    }
    Ok((id, bytes.into()))
}

/// Takes a text out without leaving a copy of it.
fn take_secret_text(options: &mut Options, key: &str) -> Result<Option<Zeroizing<Vec<u8>>>> {
    match options.take(key) {
        None => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(Zeroizing::new(text.into_bytes()))),
        Some(_) => Err(Error::invalid(format!(
            "Invalid parameter type for '{key}', expected: string"
        ))),
    }
}

fn decrypt(data: &[u8], key: &Secret, iv: Option<&str>) -> Result<Zeroizing<Vec<u8>>> {
    let key = key.expose();
    if key.len() != KEY_LEN {
        return Err(
            Error::invalid("Key should be 32 bytes in length").with_field(
                "keyid",
                "a secret of another length",
                "one of 32 bytes",
            ),
        );
    }
    let Some(iv) = iv else {
        return Err(Error::invalid("IV is required to decrypt secret"));
    };
    let iv = decode_base64(iv.as_bytes())?;
    if iv.len() != BLOCK {
        return Err(Error::invalid(format!(
            "IV should be 16 bytes in length not {}",
            iv.len()
        )));
    }
    if !data.len().is_multiple_of(BLOCK) {
        return Err(Error::invalid(format!(
            "Length {} must be a multiple of block size 16",
            data.len()
        )));
    }
    let spec = CipherSpec {
        algorithm: CipherAlgorithm::Aes256,
        mode: CipherMode::Cbc,
        ivgen: IvGenAlgorithm::Plain,
        ivgen_hash: None,
    };
    let cipher = spec.keyed(key)?;
    let mut plain = Zeroizing::new(data.to_vec());
    let mut chained = iv;
    for (piece, encrypted) in plain.chunks_mut(BLOCK).zip(data.chunks(BLOCK)) {
        cipher.decrypt(&chained, piece);
        chained = Zeroizing::new(encrypted.to_vec());
    }
    let padding = plain.last().map_or(0, |byte| usize::from(*byte));
    if !(1..=BLOCK).contains(&padding) || padding > plain.len() {
        return Err(Error::invalid("Incorrect padding found on decrypted data"));
    }
    let len = plain.len() - padding;
    plain.truncate(len);
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_with(secrets: &Secrets, text: &str) -> Result<(String, Secret)> {
        load(Options::from_dotted(text)?, secrets, |name| {
            if name == "pw" {
                Ok(b"abc\n".to_vec())
            } else {
                Err(Error::invalid(format!("Unable to read {name}")))
            }
        })
    }

    #[test]
    fn secrets_come_from_data_files_and_base64() {
        let none = Secrets::new();
        for (text, expected) in [
            ("id=s,data=abc", &b"abc"[..]),
            ("id=s,data=", b""),
            ("id=s,file=pw", b"abc\n"),
            ("id=s,data=YWJj,format=base64", b"abc"),
            ("id=s,data=YWI,format=base64", b"ab"),
            ("id=s,data=abc,format=raw", b"abc"),
        ] {
            assert_eq!(
                load_with(&none, text).unwrap().1.expose(),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn a_secret_may_be_encrypted_with_another() {
        let secrets = Secrets::new();
        secrets
            .add("k", Secret::new("0123456789abcdef0123456789abcdef"))
            .unwrap();
        // openssl enc -aes-256-cbc -K <the key in hex> -iv <the IV in hex>
        let text = "id=s,data=BY/kmTbwLfYHQ0vFJiP7e2iNI/Sr9FCbR8tM3IRB84I=,format=base64,keyid=k,iv=MDEyMzQ1Njc4OWFiY2RlZg==";
        let (_, secret) = load_with(&secrets, text).unwrap();
        assert_eq!(secret.expose(), b"letmein, please, now");
    }

    #[test]
    fn a_bad_definition_is_refused_without_showing_the_data() {
        let secrets = Secrets::new();
        secrets.add("short", Secret::new("hush")).unwrap();
        secrets.add("k", Secret::new([7; 32])).unwrap();
        for (text, message) in [
            ("data=hush", "Parameter 'id' is missing"),
            ("id=1s,data=hush", "Parameter 'id' expects an identifier"),
            ("id=s", "Either 'file' or 'data' must be provided"),
            (
                "id=s,data=hush,file=pw",
                "'file' and 'data' are mutually exclusive",
            ),
            ("id=s,data=hush,foo=1", "Parameter 'foo' is unexpected"),
            (
                "id=s,data=hush,format=hex",
                "Parameter 'format' does not accept value 'hex'",
            ),
            (
                "id=s,data=hush%,format=base64",
                "Base64 data contains invalid characters",
            ),
            ("id=s,data=hush,keyid=x", "No secret with id 'x'"),
            (
                "id=s,data=hush,keyid=short",
                "Key should be 32 bytes in length",
            ),
            ("id=s,data=hush,keyid=k", "IV is required to decrypt secret"),
            (
                "id=s,data=hush,keyid=k,iv=YWJj",
                "IV should be 16 bytes in length not 3",
            ),
            (
                "id=s,data=hush,keyid=k,iv=MDEyMzQ1Njc4OWFiY2RlZg==",
                "Length 4 must be a multiple of block size 16",
            ),
            (
                "id=s,data=hushhushhushhush,keyid=k,iv=MDEyMzQ1Njc4OWFiY2RlZg==",
                "Incorrect padding found on decrypted data",
            ),
        ] {
            let error = load_with(&secrets, text).unwrap_err();
            assert!(error.reason().starts_with(message), "{text}: {error}");
            assert!(!format!("{error:?}").contains("hush"), "{error:?}");
        }
    }
}
