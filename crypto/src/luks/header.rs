//! The LUKS1 header on disk (592 bytes, big-endian) and everything that is checked before a word of it is believed. No I/O.

use block_core::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::{
    cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenAlgorithm},
    hash::HashAlgorithm,
    sector::SECTOR_SIZE,
};

/// Bytes of the header.
pub const HEADER_LEN: usize = 592;
/// Key slots of a header.
pub const SLOTS: usize = 8;
/// Stripes that a key is split into.
pub const STRIPES: u32 = 4000;
/// The header's share of the area, in sectors; key material is aligned to as many.
pub(crate) const HEADER_SECTORS: u32 = 8;
const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const SLOTS_AT: usize = 208;
const SLOT_LEN: usize = 48;
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// The longest key that is believed: twice that of the largest cipher in XTS mode.
const MAX_KEY_LEN: u32 = 128;

/// A key slot: where the master key is kept, encrypted with one password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether it holds a key.
    pub active: bool,
    /// Iterations of PBKDF2.
    pub iterations: u32,
    /// Salt of PBKDF2.
    pub salt: [u8; 32],
    /// Where the key material is, in sectors from the header's start.
    pub material_sector: u32,
}

/// A header whose fields were checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuksHeader {
    /// How sectors are encrypted.
    pub spec: CipherSpec,
    /// The hash of key derivation.
    pub hash: HashAlgorithm,
    /// Where the payload begins, in sectors from the header's start.
    pub payload_sector: u32,
    /// Digest of the master key.
    pub digest: [u8; 20],
    /// Salt of that digest.
    pub salt: [u8; 32],
    /// Iterations of that digest.
    pub iterations: u32,
    /// The UUID's text, zero-padded.
    pub uuid: [u8; 40],
    /// The key slots.
    pub slots: [KeySlot; SLOTS],
}

fn refused(message: String, field: &str, value: impl std::fmt::Display, allowed: &str) -> Error {
    Error::invalid(message).with_field(format!("LUKS {field}"), value, allowed)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Text of a field of 32 bytes.
fn text<'a>(bytes: &'a [u8], at: usize, field: &str) -> Result<std::borrow::Cow<'a, str>> {
    let raw = &bytes[at..at + 32];
    let Some(end) = raw.iter().position(|byte| *byte == 0) else {
        return Err(refused(
            format!("LUKS header {field} is not NUL terminated"),
            field,
            "32 bytes without NUL",
            "text of at most 31 bytes",
        ));
    };
    Ok(String::from_utf8_lossy(&raw[..end]))
}

/// Sectors that the split key takes.
fn material_sectors(key_len: u64) -> u64 {
    (key_len * u64::from(STRIPES)).div_ceil(SECTOR_SIZE as u64)
}

/// Where a new header of keys of `key_len` bytes puts a slot's material; slot 8 is the payload. In sectors.
pub(crate) fn slot_sector(key_len: usize, slot: usize) -> u32 {
    let room = (material_sectors(key_len as u64) as u32).next_multiple_of(HEADER_SECTORS);
    HEADER_SECTORS + slot as u32 * room
}

impl LuksHeader {
    /// Reads a header of which at least [`HEADER_LEN`] bytes are given.
    ///
    /// # Errors
    /// EINVAL or ENOTSUP with qemu's words and the field, for the first field that isn't right.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER_LEN {
            return Err(refused(
                "LUKS header is cut short".into(),
                "header length",
                bytes.len(),
                "592",
            ));
        }
        if &bytes[..6] != MAGIC {
            return Err(Error::new(
                ErrorKind::WrongFormat,
                "Volume is not in LUKS format",
            ));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            return Err(
                Error::unsupported(format!("LUKS version {version} is not supported")).with_field(
                    "LUKS version",
                    version,
                    "1",
                ),
            );
        }
        let cipher_name = text(bytes, 8, "cipher name")?;
        let cipher_mode = text(bytes, 40, "cipher mode")?;
        let hash_spec = text(bytes, 72, "hash spec")?;
        let payload_sector = be32(bytes, 104);
        let key_len = be32(bytes, 108);
        let iterations = be32(bytes, 164);
        if payload_sector < HEADER_SECTORS {
            return Err(refused(
                "LUKS payload is overlapping with the header".into(),
                "payload offset",
                payload_sector,
                "at least 8 sectors",
            ));
        }
        if iterations == 0 {
            return Err(refused(
                "LUKS key iteration count is zero".into(),
                "master key iterations",
                0,
                "at least 1",
            ));
        }
        let mut slots = Vec::with_capacity(SLOTS);
        for index in 0..SLOTS {
            slots.push(decode_slot(bytes, index, key_len, payload_sector)?);
        }
        let slots: [KeySlot; SLOTS] = slots.try_into().expect("there are eight");
        check_overlaps(&slots, key_len)?;
        let (spec, hash) = decode_spec(&cipher_name, &cipher_mode, &hash_spec, key_len)?;
        Ok(Self {
            spec,
            hash,
            payload_sector,
            digest: array(bytes, 112),
            salt: array(bytes, 132),
            iterations,
            uuid: array(bytes, 168),
            slots,
        })
    }

    /// The header as it is on disk.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..6].copy_from_slice(MAGIC);
        bytes[6..8].copy_from_slice(&1u16.to_be_bytes());
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(8, self.spec.algorithm.family().as_bytes());
        put(40, self.spec.mode_text().as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &self.payload_sector.to_be_bytes());
        put(108, &(self.key_len() as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.salt);
        put(164, &self.iterations.to_be_bytes());
        put(168, &self.uuid);
        for (index, slot) in self.slots.iter().enumerate() {
            put(SLOTS_AT + index * SLOT_LEN, &slot.encode());
        }
        bytes
    }

    /// Bytes of the master key.
    pub const fn key_len(&self) -> usize {
        self.spec.key_len()
    }

    /// Bytes of the area that header and key material take: up to the payload.
    pub fn area_len(&self) -> u64 {
        u64::from(self.payload_sector) * SECTOR_SIZE as u64
    }

    /// Where a slot's entry is in the header, in bytes.
    pub(crate) const fn slot_offset(slot: usize) -> u64 {
        (SLOTS_AT + slot * SLOT_LEN) as u64
    }

    /// Where a slot's key material is, in bytes from the header's start.
    pub fn material_offset(&self, slot: usize) -> u64 {
        u64::from(self.slots[slot].material_sector) * SECTOR_SIZE as u64
    }

    /// Bytes of a slot's key material, in whole sectors.
    pub fn material_len(&self) -> usize {
        material_sectors(self.key_len() as u64) as usize * SECTOR_SIZE
    }

    /// Bytes of the split key in there.
    pub(crate) fn split_len(&self) -> usize {
        self.key_len() * STRIPES as usize
    }

    /// Slots that hold keys.
    pub fn active_slots(&self) -> Vec<usize> {
        (0..SLOTS).filter(|slot| self.slots[*slot].active).collect()
    }

    /// The UUID.
    pub fn uuid_text(&self) -> String {
        let end = self.uuid.iter().position(|byte| *byte == 0);
        String::from_utf8_lossy(&self.uuid[..end.unwrap_or(self.uuid.len())]).into_owned()
    }

    /// What `qemu-img info` shows of a qcow2 image with this header, with its keys in its order.
    pub fn info(&self) -> Value {
        let slots: Vec<Value> = (0..SLOTS)
            .map(|slot| {
                let offset = self.material_offset(slot);
                if self.slots[slot].active {
                    json!({
                        "active": true,
                        "iters": self.slots[slot].iterations,
                        "key-offset": offset,
                        "stripes": STRIPES,
                    })
                } else {
                    json!({ "active": false, "key-offset": offset })
                }
            })
            .collect();
        let mut info = json!({
            "ivgen-alg": self.spec.ivgen.name(),
            "detached-header": false,
            "hash-alg": self.hash.name(),
            "cipher-alg": self.spec.algorithm.name(),
            "uuid": self.uuid_text(),
        });
        let rest = json!({
            "format": "luks",
            "cipher-mode": self.spec.mode.name(),
            "slots": slots,
            "payload-offset": self.area_len(),
            "master-key-iters": self.iterations,
        });
        if let (Some(map), Value::Object(rest)) = (info.as_object_mut(), rest) {
            if let (IvGenAlgorithm::Essiv, Some(hash)) = (self.spec.ivgen, self.spec.ivgen_hash) {
                map.insert("ivgen-hash-alg".into(), hash.name().into());
            }
            map.extend(rest);
        }
        info
    }
}

impl KeySlot {
    pub(crate) fn encode(&self) -> [u8; SLOT_LEN] {
        let mut bytes = [0; SLOT_LEN];
        let active = if self.active { ACTIVE } else { INACTIVE };
        bytes[..4].copy_from_slice(&active.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.iterations.to_be_bytes());
        bytes[8..40].copy_from_slice(&self.salt);
        bytes[40..44].copy_from_slice(&self.material_sector.to_be_bytes());
        bytes[44..].copy_from_slice(&STRIPES.to_be_bytes());
        bytes
    }
}

fn decode_slot(bytes: &[u8], index: usize, key_len: u32, payload: u32) -> Result<KeySlot> {
    let at = SLOTS_AT + index * SLOT_LEN;
    let field = |name: &str| format!("key slot {index} {name}");
    let (active, iterations) = (be32(bytes, at), be32(bytes, at + 4));
    let (material_sector, stripes) = (be32(bytes, at + 40), be32(bytes, at + 44));
    if stripes != STRIPES {
        return Err(refused(
            format!("Keyslot {index} is corrupted (stripes {stripes} != {STRIPES})"),
            &field("stripes"),
            stripes,
            "4000",
        ));
    }
    if active != ACTIVE && active != INACTIVE {
        return Err(refused(
            format!("Keyslot {index} state (active/disable) is corrupted"),
            &field("state"),
            format!("{active:#x}"),
            "0xac71f3 or 0xdead",
        ));
    }
    if active == ACTIVE && iterations == 0 {
        return Err(refused(
            format!("Keyslot {index} iteration count is zero"),
            &field("iterations"),
            0,
            "at least 1",
        ));
    }
    if material_sector < HEADER_SECTORS {
        return Err(refused(
            format!("Keyslot {index} is overlapping with the LUKS header"),
            &field("offset"),
            material_sector,
            "at least 8 sectors",
        ));
    }
    if u64::from(material_sector) + material_sectors(u64::from(key_len)) > u64::from(payload) {
        return Err(refused(
            format!("Keyslot {index} is overlapping with the encrypted payload"),
            &field("offset"),
            material_sector,
            "key material that ends before the payload",
        ));
    }
    Ok(KeySlot {
        active: active == ACTIVE,
        iterations,
        salt: array(bytes, at + 8),
        material_sector,
    })
}

fn check_overlaps(slots: &[KeySlot; SLOTS], key_len: u32) -> Result<()> {
    let len = material_sectors(u64::from(key_len));
    for (i, first) in slots.iter().enumerate() {
        for (j, second) in slots.iter().enumerate().skip(i + 1) {
            let (a, b) = (
                u64::from(first.material_sector),
                u64::from(second.material_sector),
            );
            if a < b + len && b < a + len {
                return Err(refused(
                    format!("Keyslots {i} and {j} are overlapping in the header"),
                    &format!("key slot {j} offset"),
                    b,
                    "key material of its own",
                ));
            }
        }
    }
    Ok(())
}

fn decode_spec(
    name: &str,
    mode_text: &str,
    hash_spec: &str,
    key_len: u32,
) -> Result<(CipherSpec, HashAlgorithm)> {
    let hash_named = |name: &str, field: &str| {
        HashAlgorithm::from_name(name).ok_or_else(|| {
            refused(
                format!("Hash algorithm '{name}' not supported"),
                field,
                name,
                &HashAlgorithm::ALL.map(HashAlgorithm::name).join(", "),
            )
        })
    };
    let Some((mode, ivgen)) = mode_text.split_once('-') else {
        return Err(refused(
            format!("Unexpected cipher mode string format '{mode_text}'"),
            "cipher mode",
            mode_text,
            "MODE-IVGEN[:HASH]",
        ));
    };
    let (ivgen, ivgen_hash) = match ivgen.split_once(':') {
        Some((ivgen, hash)) => (ivgen, Some(hash_named(hash, "cipher mode")?)),
        None => (ivgen, None),
    };
    let mode = CipherMode::from_name(mode).ok_or_else(|| {
        refused(
            format!("Cipher mode '{mode}' not supported"),
            "cipher mode",
            mode_text,
            &CipherMode::ALL.map(CipherMode::name).join(", "),
        )
    })?;
    let per_cipher = match mode {
        CipherMode::Xts => key_len / 2,
        _ => key_len,
    };
    let fits = key_len <= MAX_KEY_LEN && (mode != CipherMode::Xts || key_len.is_multiple_of(2));
    let algorithm = fits
        .then(|| CipherAlgorithm::of_family(name, per_cipher as usize))
        .flatten()
        .ok_or_else(|| {
            refused(
                format!("Algorithm '{name}' with key size {per_cipher} bytes not supported"),
                "cipher name",
                name,
                "aes, serpent, twofish (16, 24 or 32 bytes), cast5 (16 bytes)",
            )
        })?;
    let hash = hash_named(hash_spec, "hash spec")?;
    let ivgen = IvGenAlgorithm::from_name(ivgen).ok_or_else(|| {
        refused(
            format!("IV generator '{ivgen}' not supported"),
            "cipher mode",
            mode_text,
            &IvGenAlgorithm::ALL.map(IvGenAlgorithm::name).join(", "),
        )
    })?;
    let spec = CipherSpec {
        algorithm,
        mode,
        ivgen,
        ivgen_hash,
    };
    spec.check()?;
    Ok((spec, hash))
}
