//! Encryption of disk images: LUKS version 1, qcow2's legacy AES, and the secrets that a command line defines.
//!
//! The primitives come from the `RustCrypto` crates; what is here is how images use them. No file is opened here: whoever
//! has the storage hands in an [`luks::Area`]. Time, CPU workers and randomness come from the core's environment, whose
//! randomness must be fit for keys.
//!
//! Keys and passwords are wiped when they are dropped and appear in no `Debug` and no error.

#![forbid(unsafe_code)]

mod af;
pub mod cipher;
pub mod hash;
pub mod luks;
mod modes;
pub mod options;
mod pbkdf2;
pub mod secret_object;
pub mod sector;

pub use options::{EncryptionFormat, passphrase};
pub use sector::{SECTOR_SIZE, SectorCrypto, legacy_aes};
