//! Which cipher an image uses, in which mode, with which IVs: the names in headers and options, the sizes of keys, and the
//! [`SectorCipher`](crate::sector::SectorCrypto) that they make.

use aes::{Aes128, Aes192, Aes256};
use block_core::error::{Error, Result};
use cast5::Cast5;
use cipher::KeyInit;
use serpent::Serpent;
use twofish::Twofish;

use crate::{
    hash::{HashAlgorithm, bad_option},
    modes::{BlockCipher, Cbc, Ctr, Ecb, SectorCipher, Xts},
};

/// A block cipher with the size of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum CipherAlgorithm {
    Aes128,
    Aes192,
    Aes256,
    Cast5_128,
    Serpent128,
    Serpent192,
    Serpent256,
    Twofish128,
    Twofish192,
    Twofish256,
}

impl CipherAlgorithm {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Cast5_128,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
    ];

    /// The name in options, `aes-256`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Cast5_128 => "cast5-128",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
        }
    }

    /// The name in LUKS headers, `aes`.
    pub const fn family(self) -> &'static str {
        match self {
            Self::Aes128 | Self::Aes192 | Self::Aes256 => "aes",
            Self::Cast5_128 => "cast5",
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => "serpent",
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => "twofish",
        }
    }

    /// Bytes of a key.
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Cast5_128 | Self::Serpent128 | Self::Twofish128 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// Bytes of a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Cast5_128 => 8,
            _ => 16,
        }
    }

    /// The cipher of a family with keys of `key_len` bytes.
    pub fn of_family(family: &str, key_len: usize) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|cipher| cipher.family() == family && cipher.key_len() == key_len)
    }

    /// The value of the option `cipher-alg`.
    pub fn from_option(name: &str) -> Result<Self> {
        // qemu knows these names too, but not every build of it has the ciphers.
        if matches!(name, "des" | "3des" | "sm4") {
            return Err(
                Error::unsupported(format!("Algorithm '{name}' not supported")).with_field(
                    "encrypt.cipher-alg",
                    name,
                    Self::ALL.map(Self::name).join(", "),
                ),
            );
        }
        Self::ALL
            .into_iter()
            .find(|cipher| cipher.name() == name)
            .ok_or_else(|| bad_option("cipher-alg", name, &Self::ALL.map(Self::name)))
    }

    /// The cipher that encrypts sector numbers for ESSIV, when the hash's digests are its keys.
    fn for_essiv(self, hash: HashAlgorithm) -> Result<Self> {
        let len = hash.digest_len();
        if len == self.key_len() {
            return Ok(self);
        }
        let family = match self.family() {
            "aes" => "AES",
            "serpent" => "Serpent",
            "twofish" => "Twofish",
            _ => {
                return Err(Error::unsupported(format!(
                    "Cipher {} not supported with essiv",
                    self.name()
                )));
            }
        };
        Self::of_family(self.family(), len).ok_or_else(|| {
            Error::unsupported(format!("No {family} cipher with key size {len} available"))
                .with_field(
                    "ivgen-hash-alg",
                    hash.name(),
                    "a hash whose digests are keys of the cipher",
                )
        })
    }
}

/// A mode of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum CipherMode {
    Ecb,
    Cbc,
    Xts,
    Ctr,
}

impl CipherMode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// Its name, in headers as in options.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }

    /// The mode called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// The value of the option `cipher-mode`.
    pub fn from_option(name: &str) -> Result<Self> {
        Self::from_name(name)
            .ok_or_else(|| bad_option("cipher-mode", name, &Self::ALL.map(Self::name)))
    }
}

/// How a sector's number becomes an IV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum IvGenAlgorithm {
    /// The lower 32 bits, little-endian.
    Plain,
    /// All 64 bits, little-endian.
    Plain64,
    /// All 64 bits, encrypted under a hash of the key.
    Essiv,
}

impl IvGenAlgorithm {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Plain64, Self::Essiv];

    /// Its name, in headers as in options.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv => "essiv",
        }
    }

    /// The generator called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ivgen| ivgen.name() == name)
    }

    /// The value of the option `ivgen-alg`.
    pub fn from_option(name: &str) -> Result<Self> {
        Self::from_name(name)
            .ok_or_else(|| bad_option("ivgen-alg", name, &Self::ALL.map(Self::name)))
    }
}

/// How sectors are encrypted, except for the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: CipherAlgorithm,
    /// Its mode.
    pub mode: CipherMode,
    /// What the IVs are.
    pub ivgen: IvGenAlgorithm,
    /// The hash of ESSIV; without meaning for the others.
    pub ivgen_hash: Option<HashAlgorithm>,
}

impl Default for CipherSpec {
    /// AES-256-XTS with plain64, as qemu creates.
    fn default() -> Self {
        Self {
            algorithm: CipherAlgorithm::Aes256,
            mode: CipherMode::Xts,
            ivgen: IvGenAlgorithm::Plain64,
            ivgen_hash: None,
        }
    }
}

impl CipherSpec {
    /// Bytes of the key: two of the cipher's for XTS.
    pub const fn key_len(&self) -> usize {
        match self.mode {
            CipherMode::Xts => 2 * self.algorithm.key_len(),
            _ => self.algorithm.key_len(),
        }
    }

    /// What the cipher mode of a LUKS header says: `xts-plain64`, `cbc-essiv:sha256`.
    pub fn mode_text(&self) -> String {
        let (mode, ivgen) = (self.mode.name(), self.ivgen.name());
        match self.ivgen_hash {
            Some(hash) => format!("{mode}-{ivgen}:{}", hash.name()),
            None => format!("{mode}-{ivgen}"),
        }
    }

    /// Whether the parts go together.
    ///
    /// # Errors
    /// EINVAL or ENOTSUP with qemu's words.
    pub fn check(&self) -> Result<()> {
        if self.mode == CipherMode::Xts && self.algorithm.block_len() != 16 {
            return Err(
                Error::unsupported("Unsupported cipher mode xts").with_field(
                    "cipher-mode",
                    "xts",
                    "any but xts with blocks of 8 bytes",
                ),
            );
        }
        self.essiv().map(|_| ())
    }

    /// The hash and the cipher of ESSIV, if that is how IVs are made.
    pub(crate) fn essiv(&self) -> Result<Option<(HashAlgorithm, CipherAlgorithm)>> {
        if self.ivgen != IvGenAlgorithm::Essiv {
            return Ok(None);
        }
        let hash = self.ivgen_hash.ok_or_else(|| {
            Error::invalid("Missing IV generator hash specification").with_field(
                "cipher mode",
                self.mode_text(),
                "essiv with a hash",
            )
        })?;
        Ok(Some((hash, self.algorithm.for_essiv(hash)?)))
    }

    /// The keyed cipher in its mode.
    pub(crate) fn keyed(&self, key: &[u8]) -> Result<Box<dyn SectorCipher>> {
        self.check()?;
        match self.algorithm {
            CipherAlgorithm::Aes128 => in_mode::<Aes128>(self.mode, key),
            CipherAlgorithm::Aes192 => in_mode::<Aes192>(self.mode, key),
            CipherAlgorithm::Aes256 => in_mode::<Aes256>(self.mode, key),
            CipherAlgorithm::Cast5_128 => in_mode::<Cast5>(self.mode, key),
            CipherAlgorithm::Serpent128
            | CipherAlgorithm::Serpent192
            | CipherAlgorithm::Serpent256 => in_mode::<Serpent>(self.mode, key),
            CipherAlgorithm::Twofish128
            | CipherAlgorithm::Twofish192
            | CipherAlgorithm::Twofish256 => in_mode::<Twofish>(self.mode, key),
        }
    }
}

/// The bare cipher, for single blocks.
pub(crate) fn block_cipher(
    algorithm: CipherAlgorithm,
    key: &[u8],
) -> Result<Box<dyn SectorCipher>> {
    CipherSpec {
        algorithm,
        mode: CipherMode::Ecb,
        ivgen: IvGenAlgorithm::Plain,
        ivgen_hash: None,
    }
    .keyed(key)
}

fn in_mode<C: BlockCipher>(mode: CipherMode, key: &[u8]) -> Result<Box<dyn SectorCipher>> {
    let keyed = |key: &[u8]| {
        <C as KeyInit>::new_from_slice(key).map_err(|_| {
            Error::invalid("The key doesn't fit the cipher").with_field(
                "key bytes",
                key.len(),
                "the cipher's key length",
            )
        })
    };
    Ok(match mode {
        CipherMode::Ecb => Box::new(Ecb(keyed(key)?)),
        CipherMode::Cbc => Box::new(Cbc(keyed(key)?)),
        CipherMode::Ctr => Box::new(Ctr(keyed(key)?)),
        CipherMode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            Box::new(Xts {
                data: keyed(data)?,
                tweak: keyed(tweak)?,
            })
        }
    })
}
