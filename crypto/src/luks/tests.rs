use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    env::Environment,
    error::{Error, Result},
    secret::Secret,
};
use env_tokio::EnvTokio;
use futures::{FutureExt, executor::block_on};

use super::{slots::Area, *};
use crate::cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenAlgorithm};
use crate::hash::HashAlgorithm;

/// An area in memory. Nobody writes while it is read.
struct Memory(std::sync::Mutex<Vec<u8>>);

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self(std::sync::Mutex::new(bytes))
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

#[async_trait]
impl Area for Memory {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let bytes = self.0.lock().unwrap();
        let at = offset as usize;
        bytes
            .get(at..at + len)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| Error::io("beyond the end"))
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<()> {
        let at = offset as usize;
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

fn environment() -> Arc<dyn Environment> {
    Arc::new(EnvTokio::new(1).unwrap())
}

fn secret(text: &str) -> Secret {
    Secret::new(text)
}

/// An area whose keys are found quickly.
fn quick(env: &Arc<dyn Environment>, spec: CipherSpec, password: &str) -> (LuksHeader, Memory) {
    let parameters = CreateParameters {
        spec,
        iter_time: 1,
        ..CreateParameters::default()
    };
    block_on(async {
        let (header, _, steps) = create(env, &parameters, &secret(password)).await.unwrap();
        let area = Memory::new(vec![0; header.area_len() as usize]);
        run(env, &area, steps).await.unwrap();
        (header, area)
    })
}

fn small() -> CipherSpec {
    CipherSpec {
        algorithm: CipherAlgorithm::Aes128,
        mode: CipherMode::Cbc,
        ivgen: IvGenAlgorithm::Essiv,
        ivgen_hash: Some(HashAlgorithm::Sha256),
    }
}

fn opens(env: &Arc<dyn Environment>, bytes: &[u8], password: &str) -> bool {
    let Ok(header) = LuksHeader::decode(bytes) else {
        return false;
    };
    let area = Memory::new(bytes.to_vec());
    block_on(unlock(env, &header, &area, &secret(password))).is_ok()
}

#[test]
fn a_new_area_opens_with_its_password_and_no_other() {
    let env = environment();
    let (header, area) = quick(&env, CipherSpec::default(), "letmein");
    let bytes = area.bytes();
    assert_eq!(LuksHeader::decode(&bytes).unwrap(), header);
    assert_eq!(header.area_len(), 2_068_480);
    assert!(opens(&env, &bytes, "letmein"));
    let wrong = block_on(unlock(&env, &header, &area, &secret("LETMEIN"))).unwrap_err();
    assert_eq!(
        wrong.reason(),
        "Invalid password, cannot unlock any keyslot"
    );
}

#[test]
fn a_key_of_192_bits_outside_xts_is_read_but_not_made() {
    // Its split key ends within a sector, which cryptsetup fills up and qemu stumbles over.
    let env = environment();
    let spec = CipherSpec {
        algorithm: CipherAlgorithm::Aes192,
        ..small()
    };
    let parameters = CreateParameters {
        spec,
        iter_time: 1,
        ..CreateParameters::default()
    };
    let password = secret("one");
    assert!(block_on(create(&env, &parameters, &password)).is_err());
    let (header, _, steps) = block_on(keys::make(&env, &parameters, &password)).unwrap();
    let area = Memory::new(vec![0; header.area_len() as usize]);
    block_on(run(&env, &area, steps)).unwrap();
    assert!(header.material_len() > header.split_len());
    assert!(opens(&env, &area.bytes(), "one") && !opens(&env, &area.bytes(), "two"));
}

#[test]
fn keys_are_added_found_and_erased() {
    let env = environment();
    let (mut header, area) = quick(&env, small(), "one");
    let change = |activate, new: Option<&str>, old: Option<&str>, slot| SlotChange {
        activate,
        new_secret: new.map(secret),
        old_secret: old.map(secret),
        slot,
        iter_time: activate.then_some(1),
        force: false,
    };
    let (_, master) = block_on(unlock(&env, &header, &area, &secret("one"))).unwrap();
    let mut apply = |change: &SlotChange| {
        block_on(async {
            let steps = amend(&env, &mut header, &area, &master, change).await?;
            run(&env, &area, steps).await?;
            assert_eq!(LuksHeader::decode(&area.bytes())?, header);
            Ok::<_, Error>(header.active_slots())
        })
    };
    assert_eq!(
        apply(&change(true, Some("two"), None, None)).unwrap(),
        [0, 1]
    );
    assert_eq!(
        apply(&change(true, Some("six"), None, Some(6))).unwrap(),
        [0, 1, 6]
    );
    for password in ["one", "two", "six"] {
        assert!(opens(&env, &area.bytes(), password));
    }
    let refusals = [
        (
            change(true, None, None, None),
            "'new-secret' is required to activate a keyslot",
        ),
        (
            change(true, Some("x"), Some("one"), None),
            "'old-secret' must not be given when activating keyslots",
        ),
        (
            change(true, Some("x"), None, Some(1)),
            "Refusing to overwrite active keyslot 1 - please erase it first",
        ),
        (
            change(true, Some("x"), None, Some(8)),
            "Invalid keyslot 8 specified, must be between 0 and 7",
        ),
        (
            change(true, Some("x"), None, Some(u64::MAX)),
            "Invalid keyslot 4294967295 specified, must be between 0 and 7",
        ),
        (
            change(false, None, None, None),
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be \
             given",
        ),
        (
            change(false, Some("x"), None, Some(1)),
            "'new-secret' must not be given when erasing keyslots",
        ),
        (
            change(false, None, None, Some(5)),
            "Given keyslot 5 is already erased (inactive) ",
        ),
        (
            change(false, None, Some("one"), Some(1)),
            "Given keyslot 1 doesn't contain the given old password for erase operation",
        ),
        (
            change(false, None, Some("nobody"), None),
            "No keyslots match given (old) password for erase operation",
        ),
    ];
    for (change, message) in refusals {
        let before = area.bytes();
        assert_eq!(apply(&change).unwrap_err().reason(), message);
        assert!(area.bytes() == before, "what is refused changes nothing");
    }
    let old_material = {
        let bytes = area.bytes();
        let at = LuksHeader::decode(&bytes).unwrap().material_offset(0) as usize;
        (at, bytes[at..at + 64_000].to_vec())
    };
    assert_eq!(
        apply(&change(false, None, Some("one"), None)).unwrap(),
        [1, 6]
    );
    assert_eq!(apply(&change(false, None, None, Some(6))).unwrap(), [1]);
    let bytes = area.bytes();
    let (at, old) = old_material;
    let kept = bytes[at..at + 64_000]
        .iter()
        .zip(&old)
        .filter(|(a, b)| a == b)
        .count();
    assert!(kept < 1000, "key material survived in {kept} bytes");
    assert!(!opens(&env, &bytes, "one") && !opens(&env, &bytes, "six"));
    assert!(opens(&env, &bytes, "two"));
    let last = apply(&change(false, None, None, Some(1))).unwrap_err();
    assert!(
        last.reason()
            .starts_with("Attempt to erase the only active keyslot 1 which")
    );
    let last = apply(&change(false, None, Some("two"), None)).unwrap_err();
    assert!(last.reason().starts_with("All the active keyslots match"));
    let forced = SlotChange {
        force: true,
        ..change(false, None, None, Some(1))
    };
    assert!(apply(&forced).unwrap().is_empty());
    for slot in 0..8 {
        assert_eq!(
            apply(&change(true, Some("again"), None, None))
                .unwrap()
                .len(),
            slot + 1
        );
    }
    let full = apply(&change(true, Some("x"), None, None)).unwrap_err();
    assert_eq!(
        full.reason(),
        "Can't add a keyslot - all keyslots are in use"
    );
}

/// Every state that a power cut can leave: all that was flushed, and any of the sectors that were written since.
fn cuts(before: &[u8], steps: &[Step], mut judge: impl FnMut(&[u8], usize)) {
    let mut durable = before.to_vec();
    let mut pending: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Flush => {
                for (at, data) in pending.drain(..) {
                    durable[at..at + data.len()].copy_from_slice(&data);
                }
            }
            Step::Write { offset, data } => {
                // Cut at the borders of sectors.
                let (mut at, mut rest) = (*offset as usize, &data[..]);
                while !rest.is_empty() {
                    let len = rest.len().min(512 - at % 512);
                    pending.push((at, rest[..len].to_vec()));
                    (at, rest) = (at + len, &rest[len..]);
                }
            }
            Step::Wipe { offset, len } => {
                let (at, len) = (*offset as usize, *len);
                durable[at..at + len / 2].fill(0x55);
                judge(&durable, number);
                durable[at..at + len].fill(0x55);
            }
        }
        for _ in 0..4 {
            let mut cut = durable.clone();
            for (at, data) in &pending {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                if random & 1 == 1 {
                    cut[*at..*at + data.len()].copy_from_slice(data);
                }
            }
            judge(&cut, number);
            if pending.is_empty() {
                break;
            }
        }
    }
    assert!(pending.is_empty(), "the last step makes everything durable");
}

#[test]
fn power_may_be_cut_anywhere_in_a_change_of_slots_and_a_password_still_opens() {
    let env = environment();
    let (header, area) = quick(&env, small(), "one");
    let (_, master) = block_on(unlock(&env, &header, &area, &secret("one"))).unwrap();
    let before = area.bytes();
    // Slot 6 crosses a sector: its salt may be torn.
    let mut with_two = header.clone();
    let add = block_on(add_key(&env, &mut with_two, 6, &master, &secret("two"), 1)).unwrap();
    cuts(&before, &add, |bytes, step| {
        assert!(opens(&env, bytes, "one"), "step {step}");
    });
    block_on(run(&env, &area, add)).unwrap();

    let before = area.bytes();
    let mut header = with_two.clone();
    let erase = erase_key(&mut header, 0);
    cuts(&before, &erase, |bytes, step| {
        assert!(opens(&env, bytes, "two"), "step {step}");
    });
    block_on(run(&env, &area, erase)).unwrap();

    // The only key is replaced in place, by force.
    let change = SlotChange {
        activate: true,
        new_secret: Some(secret("three")),
        slot: Some(6),
        iter_time: Some(1),
        force: true,
        ..SlotChange::default()
    };
    let before = area.bytes();
    let steps = block_on(amend(&env, &mut header, &area, &master, &change)).unwrap();
    cuts(&before, &steps, |bytes, step| {
        let opened = opens(&env, bytes, "two") || opens(&env, bytes, "three");
        assert!(opened, "step {step}");
    });
    block_on(run(&env, &area, steps)).unwrap();
    assert!(opens(&env, &area.bytes(), "three") && !opens(&env, &area.bytes(), "two"));
}

#[test]
fn a_derivation_of_four_billion_iterations_can_be_given_up() {
    let env = environment();
    let (mut header, area) = quick(&env, small(), "one");
    header.slots[0].iterations = u32::MAX;
    let key = secret("one");
    let mut unlocking = Box::pin(unlock(&env, &header, &area, &key));
    assert!(unlocking.as_mut().now_or_never().is_none());
    drop(unlocking);
    // The workers are free again.
    let free = block_on(block_core::env::offload(&env, || 7)).unwrap();
    assert_eq!(free, 7);
}

#[test]
fn every_field_of_a_header_is_checked_in_qemus_words() {
    let env = environment();
    let (header, _) = quick(&env, small(), "one");
    let good = header.encode();
    let be = |value: u32| value.to_be_bytes().to_vec();
    let text = |value: &str| {
        let mut field = vec![0; 32];
        field[..value.len()].copy_from_slice(value.as_bytes());
        field
    };
    let cases: Vec<(usize, Vec<u8>, &str)> = vec![
        (0, b"LUKT".to_vec(), "Volume is not in LUKS format"),
        (6, vec![0, 2], "LUKS version 2 is not supported"),
        (
            8,
            vec![b'a'; 32],
            "LUKS header cipher name is not NUL terminated",
        ),
        (
            40,
            vec![b'a'; 32],
            "LUKS header cipher mode is not NUL terminated",
        ),
        (
            72,
            vec![b'a'; 32],
            "LUKS header hash spec is not NUL terminated",
        ),
        (104, be(7), "LUKS payload is overlapping with the header"),
        (
            104,
            be(200),
            "Keyslot 1 is overlapping with the encrypted payload",
        ),
        (
            108,
            be(0),
            "Algorithm 'aes' with key size 0 bytes not supported",
        ),
        (
            108,
            be(8),
            "Algorithm 'aes' with key size 8 bytes not supported",
        ),
        (
            108,
            be(u32::MAX),
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (164, be(0), "LUKS key iteration count is zero"),
        (208, be(1), "Keyslot 0 state (active/disable) is corrupted"),
        (212, be(0), "Keyslot 0 iteration count is zero"),
        (
            208 + 40,
            be(7),
            "Keyslot 0 is overlapping with the LUKS header",
        ),
        (
            208 + 40,
            be(u32::MAX),
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (
            256 + 40,
            be(9),
            "Keyslots 0 and 1 are overlapping in the header",
        ),
        (
            208 + 44,
            be(3999),
            "Keyslot 0 is corrupted (stripes 3999 != 4000)",
        ),
        (
            544 + 44,
            be(0),
            "Keyslot 7 is corrupted (stripes 0 != 4000)",
        ),
        (
            8,
            text("rot13"),
            "Algorithm 'rot13' with key size 16 bytes not supported",
        ),
        (
            40,
            text("cbc"),
            "Unexpected cipher mode string format 'cbc'",
        ),
        (40, text("gcm-plain"), "Cipher mode 'gcm' not supported"),
        (40, text("cbc-null"), "IV generator 'null' not supported"),
        (
            40,
            text("cbc-essiv"),
            "Missing IV generator hash specification",
        ),
        (
            40,
            text("cbc-essiv:crc"),
            "Hash algorithm 'crc' not supported",
        ),
        (72, text("crc"), "Hash algorithm 'crc' not supported"),
        (
            40,
            text("xts-plain64"),
            "Algorithm 'aes' with key size 8 bytes not supported",
        ),
    ];
    for (at, bytes, message) in cases {
        let mut bad = good;
        bad[at..at + bytes.len()].copy_from_slice(&bytes);
        let error = LuksHeader::decode(&bad).unwrap_err();
        assert_eq!(error.reason(), message);
        assert!(error.field().is_some() || at == 0, "{message}: no field");
    }
    assert!(LuksHeader::decode(&good[..591]).is_err());
    assert_eq!(LuksHeader::decode(&good).unwrap(), header);
}

#[test]
fn no_random_header_makes_the_decoder_panic() {
    let env = environment();
    let (header, _) = quick(&env, small(), "one");
    let good = header.encode();
    for at in 0..HEADER_LEN {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = good;
            bad[at] = value;
            if let Ok(header) = LuksHeader::decode(&bad) {
                // Whatever is believed stays within bounds.
                assert!(header.key_len() <= 128 && header.material_len() <= 128 * 4096);
                for slot in 0..SLOTS {
                    let end = header.material_offset(slot) + header.material_len() as u64;
                    assert!(end <= header.area_len());
                }
            }
        }
    }
}

#[test]
fn nothing_that_is_printed_has_a_byte_of_a_key() {
    let env = environment();
    let (mut header, area) = quick(&env, small(), "open sesame");
    let password = secret("open sesame");
    let (_, master) = block_on(unlock(&env, &header, &area, &password)).unwrap();
    let crypto = master.crypto(&header).unwrap();
    let change = SlotChange {
        activate: true,
        new_secret: Some(password.clone()),
        slot: Some(0),
        ..SlotChange::default()
    };
    let error = block_on(amend(&env, &mut header, &area, &master, &change)).unwrap_err();
    let wrong = block_on(unlock(&env, &header, &area, &secret("wrong sesame"))).unwrap_err();
    let shown = format!(
        "{password:?} {master:?} {crypto:?} {change:?} {error} {error:?} {wrong} {wrong:?}"
    );
    assert!(!shown.contains("sesame"), "{shown}");
    assert!(
        shown.contains("MasterKey(..)") && shown.contains("Secret(..)"),
        "{shown}"
    );
}
