//! From passwords to the master key and back: unlocking a slot, filling one, and the header of a new area.

use std::{fmt, sync::Arc, time::Duration};

use block_core::{
    env::{Environment, offload},
    error::{Error, ErrorKind, Result},
    secret::Secret,
};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{
    header::{KeySlot, LuksHeader, SLOTS, slot_sector},
    slots::{Area, Step},
};
use crate::{
    af,
    cipher::{CipherMode, CipherSpec},
    hash::HashAlgorithm,
    pbkdf2,
    sector::SectorCrypto,
};

/// The key that the content is encrypted with.
#[derive(Clone)]
pub struct MasterKey(Secret);

impl MasterKey {
    /// The cipher of the content.
    pub fn crypto(&self, header: &LuksHeader) -> Result<SectorCrypto> {
        SectorCrypto::new(header.spec, self.0.expose())
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(..)")
    }
}

/// What a new area is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateParameters {
    /// How sectors are encrypted.
    pub spec: CipherSpec,
    /// The hash of key derivation.
    pub hash: HashAlgorithm,
    /// How long it takes to unlock, in milliseconds on this machine; 0 for qemu's 2 seconds.
    pub iter_time: u64,
}

impl Default for CreateParameters {
    /// qemu's defaults.
    fn default() -> Self {
        Self {
            spec: CipherSpec::default(),
            hash: HashAlgorithm::Sha256,
            iter_time: DEFAULT_ITER_TIME,
        }
    }
}

/// Milliseconds that a key derivation is to take, unless the options say otherwise.
const DEFAULT_ITER_TIME: u64 = 2000;

/// How long a key derivation is to take.
fn duration(iter_time: u64) -> Duration {
    Duration::from_millis(match iter_time {
        0 => DEFAULT_ITER_TIME,
        given => given,
    })
}

impl CreateParameters {
    /// Bytes that header and key material are going to take.
    pub fn area_len(&self) -> u64 {
        u64::from(slot_sector(self.spec.key_len(), SLOTS)) * 512
    }

    /// Whether an area can be made like this.
    ///
    /// # Errors
    /// EINVAL or ENOTSUP with the reason.
    pub fn check(&self) -> Result<()> {
        self.spec.check()?;
        if self.spec.key_len() == 24 && self.spec.mode != CipherMode::Xts {
            // Such a split key ends in the middle of a sector, where qemu gives up.
            return Err(Error::unsupported(
                "Keys of 192 bits can only be used with cipher mode xts",
            )
            .with_field(
                "encrypt.cipher-alg",
                self.spec.algorithm.name(),
                "128 or 256 bits, or xts",
            ));
        }
        Ok(())
    }
}

/// `len` random bytes that nobody has seen.
pub(crate) fn random(env: &Arc<dyn Environment>, len: usize) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(vec![0; len]);
    for piece in bytes.chunks_mut(8) {
        let word = env.random().to_le_bytes();
        piece.copy_from_slice(&word[..piece.len()]);
    }
    bytes
}

fn random_salt(env: &Arc<dyn Environment>) -> [u8; 32] {
    let mut salt = [0; 32];
    salt.copy_from_slice(&random(env, 32));
    salt
}

/// A random UUID (version 4) as text, zero-padded.
fn random_uuid(env: &Arc<dyn Environment>) -> [u8; 40] {
    let mut raw = random(env, 16);
    raw[6] = raw[6] & 0x0f | 0x40;
    raw[8] = raw[8] & 0x3f | 0x80;
    let mut text = String::new();
    for (at, byte) in raw.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    let mut uuid = [0; 40];
    uuid[..text.len()].copy_from_slice(text.as_bytes());
    uuid
}

/// Whether a key is the one whose digest the header has.
async fn is_master(env: &Arc<dyn Environment>, header: &LuksHeader, key: &[u8]) -> Result<bool> {
    let (salt, count) = (&header.salt, header.iterations);
    let digest = pbkdf2::derive(env, header.hash, key, salt, count, header.digest.len()).await?;
    Ok(bool::from(digest.ct_eq(&header.digest)))
}

/// The master key in a slot, if `password` opens that slot.
///
/// Cancellation: dropping the future stops the derivation soon.
///
/// # Errors
/// Those of reading the area.
pub async fn unlock_slot(
    env: &Arc<dyn Environment>,
    header: &LuksHeader,
    area: &dyn Area,
    slot: usize,
    password: &Secret,
) -> Result<Option<MasterKey>> {
    let entry = header.slots[slot];
    if !entry.active {
        return Ok(None);
    }
    let key = pbkdf2::derive(
        env,
        header.hash,
        password.expose(),
        &entry.salt,
        entry.iterations,
        header.key_len(),
    )
    .await?;
    let material = area
        .read(header.material_offset(slot), header.material_len())
        .await?;
    let mut material = Zeroizing::new(material);
    if material.len() < header.material_len() {
        return Err(Error::io("The key material is cut short"));
    }
    let (spec, hash, len) = (header.spec, header.hash, header.key_len());
    let split = header.split_len();
    let candidate = offload(env, move || {
        SectorCrypto::new(spec, &key).map(|crypto| {
            crypto.decrypt(0, &mut material);
            af::merge(hash, &material[..split], len)
        })
    })
    .await??;
    if is_master(env, header, &candidate).await? {
        return Ok(Some(MasterKey(candidate.into())));
    }
    Ok(None)
}

/// The master key, from the first slot that `password` opens, and that slot.
///
/// Cancellation: dropping the future stops the derivation soon.
///
/// # Errors
/// EPERM when it opens none.
pub async fn unlock(
    env: &Arc<dyn Environment>,
    header: &LuksHeader,
    area: &dyn Area,
    password: &Secret,
) -> Result<(usize, MasterKey)> {
    for slot in header.active_slots() {
        if let Some(key) = unlock_slot(env, header, area, slot, password).await? {
            return Ok((slot, key));
        }
    }
    Err(Error::new(
        ErrorKind::NotPermitted,
        "Invalid password, cannot unlock any keyslot",
    ))
}

/// A slot's new entry and its key material, for `password`.
pub(super) async fn fill_slot(
    env: &Arc<dyn Environment>,
    header: &LuksHeader,
    slot: usize,
    master: &MasterKey,
    password: &Secret,
    iter_time: u64,
) -> Result<(KeySlot, Vec<u8>)> {
    let time = duration(iter_time);
    let len = header.key_len();
    let iterations = pbkdf2::iterations_for(env, header.hash, len, time, 1).await?;
    let salt = random_salt(env);
    let key = pbkdf2::derive(env, header.hash, password.expose(), &salt, iterations, len).await?;
    let mut split = random(env, header.split_len());
    let (spec, hash, whole) = (header.spec, header.hash, header.material_len());
    let master = master.clone();
    let material = offload(env, move || {
        let crypto = SectorCrypto::new(spec, &key)?;
        af::split(hash, master.0.expose(), &mut split);
        // Encrypted in place: what leaves here is no secret any more.
        let mut material = std::mem::take(&mut *split);
        material.resize(whole, 0);
        crypto.encrypt(0, &mut material);
        Ok::<_, Error>(material)
    })
    .await??;
    let entry = KeySlot {
        active: true,
        iterations,
        salt,
        material_sector: header.slots[slot].material_sector,
    };
    Ok((entry, material))
}

/// A new area with a random master key, whose slot 0 opens with `password`: its header, the key, and what has to be written
/// to an area that is all zeroes.
///
/// # Errors
/// Those of [`CreateParameters::check`].
pub async fn create(
    env: &Arc<dyn Environment>,
    parameters: &CreateParameters,
    password: &Secret,
) -> Result<(LuksHeader, MasterKey, Vec<Step>)> {
    parameters.check()?;
    make(env, parameters, password).await
}

/// [`create`], also of what nothing else may be able to open.
pub(super) async fn make(
    env: &Arc<dyn Environment>,
    parameters: &CreateParameters,
    password: &Secret,
) -> Result<(LuksHeader, MasterKey, Vec<Step>)> {
    let len = parameters.spec.key_len();
    let master = MasterKey(random(env, len).into());
    let unused = |slot| KeySlot {
        active: false,
        iterations: 0,
        salt: [0; 32],
        material_sector: slot_sector(len, slot),
    };
    let mut header = LuksHeader {
        spec: parameters.spec,
        hash: parameters.hash,
        payload_sector: slot_sector(len, SLOTS),
        digest: [0; 20],
        salt: random_salt(env),
        iterations: 0,
        uuid: random_uuid(env),
        slots: std::array::from_fn(unused),
    };
    let (entry, material) =
        fill_slot(env, &header, 0, &master, password, parameters.iter_time).await?;
    header.slots[0] = entry;
    let time = duration(parameters.iter_time);
    header.iterations = pbkdf2::iterations_for(env, header.hash, 20, time, 8).await?;
    let (salt, count) = (header.salt, header.iterations);
    let digest = pbkdf2::derive(env, header.hash, master.0.expose(), &salt, count, 20).await?;
    header.digest.copy_from_slice(&digest);
    let steps = vec![
        Step::Write {
            offset: header.material_offset(0),
            data: material,
        },
        Step::Flush,
        Step::Write {
            offset: 0,
            data: header.encode().to_vec(),
        },
        Step::Flush,
    ];
    Ok((header, master, steps))
}
