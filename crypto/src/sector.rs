//! Sectors of 512 bytes, each encrypted on its own under an IV made of its number. The same for disk content and for the
//! key material of LUKS. No I/O.

use std::fmt;

use block_core::error::Result;
use zeroize::{Zeroize, Zeroizing};

use crate::{
    cipher::{CipherSpec, IvGenAlgorithm, block_cipher},
    modes::{SECTOR, SectorCipher},
};

/// Bytes of a sector.
pub const SECTOR_SIZE: usize = SECTOR;

/// A key at work: encrypts and decrypts runs of sectors in place. Wiped when dropped.
pub struct SectorCrypto {
    spec: CipherSpec,
    cipher: Box<dyn SectorCipher>,
    /// Encrypts sector numbers, for ESSIV.
    numbers: Option<Box<dyn SectorCipher>>,
}

impl SectorCrypto {
    /// `spec` with a key of [`CipherSpec::key_len`] bytes.
    ///
    /// # Errors
    /// EINVAL for a key of another length, ENOTSUP for ciphers and modes that don't go together.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Self> {
        let numbers = match spec.essiv()? {
            None => None,
            Some((hash, algorithm)) => {
                let hashed = Zeroizing::new(hash.digest(&[key]));
                Some(block_cipher(algorithm, &hashed)?)
            }
        };
        Ok(Self {
            spec,
            cipher: spec.keyed(key)?,
            numbers,
        })
    }

    /// How it encrypts.
    pub fn spec(&self) -> CipherSpec {
        self.spec
    }

    fn iv(&self, sector: u64) -> [u8; 16] {
        let mut iv = [0; 16];
        match self.spec.ivgen {
            IvGenAlgorithm::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            IvGenAlgorithm::Plain64 | IvGenAlgorithm::Essiv => {
                iv[..8].copy_from_slice(&sector.to_le_bytes());
            }
        }
        if let Some(numbers) = &self.numbers {
            numbers.encrypt(&[], &mut iv[..numbers.block_len()]);
        }
        iv
    }

    /// Encrypts `data`, whose first byte is that of sector `sector`. The last sector may be cut, at a cipher block.
    pub fn encrypt(&self, mut sector: u64, data: &mut [u8]) {
        for piece in data.chunks_mut(SECTOR) {
            self.cipher.encrypt(&self.iv(sector), piece);
            sector = sector.wrapping_add(1);
        }
    }

    /// Decrypts what [`Self::encrypt`] made.
    pub fn decrypt(&self, mut sector: u64, data: &mut [u8]) {
        for piece in data.chunks_mut(SECTOR) {
            self.cipher.decrypt(&self.iv(sector), piece);
            sector = sector.wrapping_add(1);
        }
    }
}

/// Nothing of the key.
impl fmt::Debug for SectorCrypto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCrypto")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

/// The cipher of qcow2's encryption method 1: AES-128-CBC with plain64, whose key is the password itself, cut or filled
/// with zeroes to 16 bytes. Its sector numbers are the guest's.
pub fn legacy_aes(password: &[u8]) -> Result<SectorCrypto> {
    let mut key = [0; 16];
    let len = password.len().min(key.len());
    key[..len].copy_from_slice(&password[..len]);
    let spec = CipherSpec {
        algorithm: crate::cipher::CipherAlgorithm::Aes128,
        mode: crate::cipher::CipherMode::Cbc,
        ivgen: IvGenAlgorithm::Plain64,
        ivgen_hash: None,
    };
    let crypto = SectorCrypto::new(spec, &key);
    key.zeroize();
    crypto
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cipher::{CipherAlgorithm, CipherMode},
        hash::HashAlgorithm,
    };

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len() / 2)
            .map(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn what_was_encrypted_is_decrypted_for_every_cipher_mode_and_iv() {
        for algorithm in CipherAlgorithm::ALL {
            for mode in CipherMode::ALL {
                for ivgen in IvGenAlgorithm::ALL {
                    let spec = CipherSpec {
                        algorithm,
                        mode,
                        ivgen,
                        ivgen_hash: Some(HashAlgorithm::Md5),
                    };
                    let key: Vec<u8> = (0..spec.key_len() as u8).collect();
                    let Ok(crypto) = SectorCrypto::new(spec, &key) else {
                        assert_eq!(
                            (algorithm, mode),
                            (CipherAlgorithm::Cast5_128, CipherMode::Xts)
                        );
                        continue;
                    };
                    let plain: Vec<u8> = (0..2048u32).map(|n| (n / 3) as u8).collect();
                    let mut data = plain.clone();
                    crypto.encrypt(7, &mut data);
                    assert_ne!(data, plain);
                    // Sectors are independent of each other.
                    let mut second = plain[512..1024].to_vec();
                    crypto.encrypt(8, &mut second);
                    assert_eq!(data[512..1024], second[..]);
                    crypto.decrypt(7, &mut data);
                    assert_eq!(data, plain, "{spec:?}");
                }
            }
        }
    }

    #[test]
    fn aes_xts_is_that_of_ieee_1619() {
        // Vector 2: AES-128-XTS, data unit 0x3333333333, 32 bytes.
        let spec = CipherSpec {
            algorithm: CipherAlgorithm::Aes128,
            ..CipherSpec::default()
        };
        let key = hex("1111111111111111111111111111111122222222222222222222222222222222");
        let mut data = vec![0x44; 32];
        SectorCrypto::new(spec, &key)
            .unwrap()
            .encrypt(0x33_3333_3333, &mut data);
        assert_eq!(
            data,
            hex("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0")
        );
    }

    #[test]
    fn a_key_of_the_wrong_length_is_refused_without_being_shown() {
        let error = SectorCrypto::new(CipherSpec::default(), &[0x5a; 33]).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("90") && !shown.contains("5a"), "{shown}");
    }

    #[test]
    fn a_password_is_cut_or_filled_for_legacy_aes() {
        let cipher = |password: &[u8]| {
            let mut data = vec![1; 512];
            legacy_aes(password).unwrap().encrypt(3, &mut data);
            data
        };
        assert_eq!(cipher(b"0123456789abcdefXYZ"), cipher(b"0123456789abcdef"));
        assert_eq!(cipher(b"abc"), cipher(b"abc\0\0"));
        assert_ne!(cipher(b"abc"), cipher(b"abd"));
    }
}
