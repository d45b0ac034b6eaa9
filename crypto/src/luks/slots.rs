//! Changes of key slots, as steps that leave an area which opens with at least one of its passwords wherever power is cut
//! between two of them.
//!
//! A slot's state word is written on its own: it never crosses a sector, so a slot is either wholly there or not at all. A
//! slot is filled before it is made active, and made inactive before it is overwritten.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    env::Environment,
    error::{Error, Result},
    secret::Secret,
};

use super::{
    header::{KeySlot, LuksHeader, SLOTS},
    keys::{self, MasterKey, fill_slot},
};

/// How often an erased slot's key material is overwritten.
const WIPES: u32 = 40;

/// Where header and key material are: byte 0 is the header's first.
#[async_trait]
pub trait Area: Send + Sync {
    /// Reads `len` bytes.
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>>;
    /// Writes.
    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<()>;
    /// Makes durable what was written.
    async fn flush(&self) -> Result<()>;
}

/// One thing to do to an area.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write `data`.
    Write {
        /// Where, in bytes from the area's start.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Wait until everything before is durable.
    Flush,
    /// Overwrite with random bytes, several times, each time durably.
    Wipe {
        /// Where, in bytes from the area's start.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
}

/// Carries out steps, one after the other.
///
/// Cancellation: as a power cut between two of them.
pub async fn run(env: &Arc<dyn Environment>, area: &dyn Area, steps: Vec<Step>) -> Result<()> {
    for step in steps {
        match step {
            Step::Write { offset, data } => area.write(offset, data).await?,
            Step::Flush => area.flush().await?,
            Step::Wipe { offset, len } => {
                for _ in 0..WIPES {
                    let noise = std::mem::take(&mut *keys::random(env, len));
                    area.write(offset, noise).await?;
                    area.flush().await?;
                }
            }
        }
    }
    Ok(())
}

fn write_durably(steps: &mut Vec<Step>, offset: u64, data: &[u8]) {
    steps.push(Step::Write {
        offset,
        data: data.to_vec(),
    });
    steps.push(Step::Flush);
}

fn deactivate(header: &mut LuksHeader, slot: usize, steps: &mut Vec<Step>) {
    header.slots[slot].active = false;
    let state = &header.slots[slot].encode()[..4];
    write_durably(steps, LuksHeader::slot_offset(slot), state);
}

/// Puts a key for `password` into `slot`. If that is in use it has to be expendable: it is made inactive first.
///
/// # Errors
/// Those of key derivation.
pub async fn add_key(
    env: &Arc<dyn Environment>,
    header: &mut LuksHeader,
    slot: usize,
    master: &MasterKey,
    password: &Secret,
    iter_time: u64,
) -> Result<Vec<Step>> {
    let (entry, material) = fill_slot(env, header, slot, master, password, iter_time).await?;
    let mut steps = Vec::new();
    if header.slots[slot].active {
        deactivate(header, slot, &mut steps);
    }
    write_durably(&mut steps, header.material_offset(slot), &material);
    header.slots[slot] = entry;
    let (at, bytes) = (LuksHeader::slot_offset(slot), entry.encode());
    write_durably(&mut steps, at + 4, &bytes[4..]);
    write_durably(&mut steps, at, &bytes[..4]);
    Ok(steps)
}

/// Erases a slot, whether or not another one is left.
pub fn erase_key(header: &mut LuksHeader, slot: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    deactivate(header, slot, &mut steps);
    header.slots[slot] = KeySlot {
        active: false,
        iterations: 0,
        salt: [0; 32],
        material_sector: header.slots[slot].material_sector,
    };
    let bytes = header.slots[slot].encode();
    write_durably(&mut steps, LuksHeader::slot_offset(slot) + 4, &bytes[4..40]);
    steps.push(Step::Wipe {
        offset: header.material_offset(slot),
        len: header.material_len(),
    });
    steps
}

/// A change of key slots, as the options of `amend` ask for it.
#[derive(Debug, Clone, Default)]
pub struct SlotChange {
    /// `state`: fill a slot, or erase.
    pub activate: bool,
    /// `new-secret`: the password of the slot to be filled.
    pub new_secret: Option<Secret>,
    /// `old-secret`: erase what opens with it.
    pub old_secret: Option<Secret>,
    /// `keyslot`: this one.
    pub slot: Option<u64>,
    /// `iter-time`, in milliseconds.
    pub iter_time: Option<u64>,
    /// `--force`: also what may lose the data.
    pub force: bool,
}

fn not_given(option: &str, when: &str) -> Error {
    Error::invalid(format!("'{option}' must not be given when {when} keyslots")).with_field(
        format!("encrypt.{option}"),
        "given",
        "nothing",
    )
}

fn named_slot(slot: u64) -> Result<usize> {
    usize::try_from(slot)
        .ok()
        .filter(|slot| *slot < SLOTS)
        .ok_or_else(|| {
            Error::invalid(format!(
                "Invalid keyslot {} specified, must be between 0 and 7",
                slot as u32
            ))
            .with_field("encrypt.keyslot", slot as u32, "0..=7")
        })
}

/// Works out what a change takes; `header` becomes the one that the area has afterwards. What is refused has changed
/// nothing.
///
/// # Errors
/// EINVAL with qemu's words when the change makes no sense or would lose the last key.
pub async fn amend(
    env: &Arc<dyn Environment>,
    header: &mut LuksHeader,
    area: &dyn Area,
    master: &MasterKey,
    change: &SlotChange,
) -> Result<Vec<Step>> {
    if change.activate {
        activate(env, header, master, change).await
    } else {
        erase(env, header, area, change).await
    }
}

async fn activate(
    env: &Arc<dyn Environment>,
    header: &mut LuksHeader,
    master: &MasterKey,
    change: &SlotChange,
) -> Result<Vec<Step>> {
    let Some(password) = &change.new_secret else {
        return Err(
            Error::invalid("'new-secret' is required to activate a keyslot").with_field(
                "encrypt.new-secret",
                "missing",
                "the id of a secret",
            ),
        );
    };
    if change.old_secret.is_some() {
        return Err(not_given("old-secret", "activating"));
    }
    let iter_time = change.iter_time.unwrap_or(0);
    let free = |header: &LuksHeader, but: Option<usize>| {
        (0..SLOTS).find(|slot| !header.slots[*slot].active && Some(*slot) != but)
    };
    let slot = match change.slot {
        Some(slot) => named_slot(slot)?,
        None => free(header, None).ok_or_else(|| {
            Error::invalid("Can't add a keyslot - all keyslots are in use").with_field(
                "key slots",
                "all active",
                "an inactive one",
            )
        })?,
    };
    let overwrites = header.slots[slot].active;
    if overwrites && !change.force {
        return Err(Error::invalid(format!(
            "Refusing to overwrite active keyslot {slot} - please erase it first"
        ))
        .with_field("encrypt.keyslot", slot, "an inactive slot, or force"));
    }
    let mut after = header.clone();
    let mut steps = Vec::new();
    // The only key is never overwritten before another one is there.
    let spare = (overwrites && after.active_slots().len() == 1)
        .then(|| free(&after, Some(slot)))
        .flatten();
    if let Some(spare) = spare {
        steps.extend(add_key(env, &mut after, spare, master, password, iter_time).await?);
    }
    steps.extend(add_key(env, &mut after, slot, master, password, iter_time).await?);
    if let Some(spare) = spare {
        steps.extend(erase_key(&mut after, spare));
    }
    *header = after;
    Ok(steps)
}

async fn erase(
    env: &Arc<dyn Environment>,
    header: &mut LuksHeader,
    area: &dyn Area,
    change: &SlotChange,
) -> Result<Vec<Step>> {
    if change.new_secret.is_some() {
        return Err(not_given("new-secret", "erasing"));
    }
    if change.iter_time.is_some() {
        return Err(not_given("iter-time", "erasing"));
    }
    let active = header.active_slots();
    let slots = match (change.slot, &change.old_secret) {
        (Some(slot), old) => {
            let slot = named_slot(slot)?;
            if let Some(old) = old
                && keys::unlock_slot(env, header, area, slot, old)
                    .await?
                    .is_none()
            {
                return Err(Error::invalid(format!(
                    "Given keyslot {slot} doesn't contain the given old password for erase operation"
                ))
                .with_field("encrypt.old-secret", "another password", "the slot's"));
            }
            if !header.slots[slot].active && !change.force {
                return Err(Error::invalid(format!(
                    "Given keyslot {slot} is already erased (inactive) "
                ))
                .with_field("encrypt.keyslot", slot, "an active slot"));
            }
            if active == [slot] && !change.force {
                return Err(Error::invalid(format!(
                    "Attempt to erase the only active keyslot {slot} which will erase all the data in the image \
                     irreversibly - refusing operation"
                ))
                .with_field("encrypt.keyslot", slot, "a slot beside an active one, or force"));
            }
            vec![slot]
        }
        (None, Some(old)) => {
            let mut matching = Vec::new();
            for slot in &active {
                if keys::unlock_slot(env, header, area, *slot, old)
                    .await?
                    .is_some()
                {
                    matching.push(*slot);
                }
            }
            if matching.is_empty() {
                return Err(Error::invalid(
                    "No keyslots match given (old) password for erase operation",
                )
                .with_field(
                    "encrypt.old-secret",
                    "another password",
                    "that of a slot",
                ));
            }
            if matching == active && !change.force {
                return Err(Error::invalid(
                    "All the active keyslots match the (old) password that was given and erasing them will erase \
                     all the data in the image irreversibly - refusing operation",
                )
                .with_field("encrypt.old-secret", "that of all slots", "not that of all, or force"));
            }
            matching
        }
        (None, None) => {
            return Err(Error::invalid(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them \
                 must be given",
            )
            .with_field("encrypt.keyslot", "missing", "0..=7, or encrypt.old-secret"));
        }
    };
    let mut after = header.clone();
    let steps = slots
        .iter()
        .flat_map(|slot| erase_key(&mut after, *slot))
        .collect();
    *header = after;
    Ok(steps)
}
