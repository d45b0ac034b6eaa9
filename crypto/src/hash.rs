//! The hash functions that LUKS headers name, by that name. Nothing here knows where they are used.

use block_core::error::{Error, Result};
use cipher::KeyInit;
use hmac::{Hmac, Mac};
use sha1::Digest;

/// A hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum HashAlgorithm {
    Md5,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
    Sm3,
}

/// Runs `$body` with `$Hash` standing for the type that implements `$algorithm`.
macro_rules! with_hash {
    ($algorithm:expr, $Hash:ident => $body:expr) => {
        match $algorithm {
            $crate::hash::HashAlgorithm::Md5 => {
                type $Hash = md5::Md5;
                $body
            }
            $crate::hash::HashAlgorithm::Sha1 => {
                type $Hash = sha1::Sha1;
                $body
            }
            $crate::hash::HashAlgorithm::Sha224 => {
                type $Hash = sha2::Sha224;
                $body
            }
            $crate::hash::HashAlgorithm::Sha256 => {
                type $Hash = sha2::Sha256;
                $body
            }
            $crate::hash::HashAlgorithm::Sha384 => {
                type $Hash = sha2::Sha384;
                $body
            }
            $crate::hash::HashAlgorithm::Sha512 => {
                type $Hash = sha2::Sha512;
                $body
            }
            $crate::hash::HashAlgorithm::Ripemd160 => {
                type $Hash = ripemd::Ripemd160;
                $body
            }
            $crate::hash::HashAlgorithm::Sm3 => {
                type $Hash = sm3::Sm3;
                $body
            }
        }
    };
}
pub(crate) use with_hash;

impl HashAlgorithm {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// Its name, in headers as in options.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// The function called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name() == name)
    }

    /// The value of a create option called `option`.
    ///
    /// # Errors
    /// EINVAL with qemu's words.
    pub fn from_option(option: &str, name: &str) -> Result<Self> {
        Self::from_name(name).ok_or_else(|| bad_option(option, name, &Self::ALL.map(Self::name)))
    }

    /// Bytes of a digest.
    pub fn digest_len(self) -> usize {
        with_hash!(self, H => H::output_size())
    }

    /// The digest of `parts`, one after the other.
    pub fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        with_hash!(self, H => {
            let mut hash = H::new();
            for part in parts {
                hash.update(part);
            }
            hash.finalize().to_vec()
        })
    }

    /// HMAC with this hash, keyed.
    pub(crate) fn keyed(self, key: &[u8]) -> Box<dyn Prf> {
        with_hash!(self, H => {
            // Any length of key will do for HMAC.
            let mac = <Hmac<H> as KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
            Box::new(Keyed(mac))
        })
    }
}

/// What an option says that takes one of a few names.
pub(crate) fn bad_option(option: &str, value: &str, allowed: &[&str]) -> Error {
    Error::invalid(format!(
        "Parameter '{option}' does not accept value '{value}'"
    ))
    .with_field(format!("encrypt.{option}"), value, allowed.join(", "))
}

/// A keyed pseudo-random function, for PBKDF2.
pub(crate) trait Prf: Send {
    /// Bytes of its result.
    fn len(&self) -> usize;
    /// `U_1` of a block: the function of the salt and the block's number.
    fn first(&self, salt: &[u8], block: u32, u: &mut [u8]);
    /// `rounds` more of `U_i`, each added to `sum`.
    fn rounds(&self, u: &mut [u8], sum: &mut [u8], rounds: u32);
}

struct Keyed<M>(M);

impl<M: Mac + Clone + Send> Prf for Keyed<M> {
    fn len(&self) -> usize {
        M::output_size()
    }

    fn first(&self, salt: &[u8], block: u32, u: &mut [u8]) {
        let mut mac = self.0.clone();
        mac.update(salt);
        mac.update(&block.to_be_bytes());
        u.copy_from_slice(&mac.finalize().into_bytes());
    }

    fn rounds(&self, u: &mut [u8], sum: &mut [u8], rounds: u32) {
        for _ in 0..rounds {
            let mut mac = self.0.clone();
            mac.update(u);
            u.copy_from_slice(&mac.finalize().into_bytes());
            for (sum, u) in sum.iter_mut().zip(u.iter()) {
                *sum ^= u;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hash_is_found_by_its_name_and_has_the_length_it_says() {
        for hash in HashAlgorithm::ALL {
            assert_eq!(HashAlgorithm::from_name(hash.name()), Some(hash));
            assert_eq!(hash.digest(&[b"a", b"b"]).len(), hash.digest_len());
            assert_eq!(hash.digest(&[b"a", b"b"]), hash.digest(&[b"ab"]));
        }
        assert_eq!(HashAlgorithm::from_name("SHA256"), None);
    }
}
