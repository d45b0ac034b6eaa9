//! The anti-forensic splitter of LUKS: a key becomes many stripes, all of which are needed to get it back, so that a slot is
//! erased for certain if only a part of it can be overwritten.

use sha1::Digest;
use zeroize::Zeroizing;

use crate::hash::{HashAlgorithm, with_hash};

/// Spreads every bit of `block` over pieces of the hash's length.
fn diffuse(hash: HashAlgorithm, block: &mut [u8]) {
    with_hash!(hash, H => {
        let len = H::output_size();
        for (number, piece) in block.chunks_mut(len).enumerate() {
            let mut state = H::new();
            state.update((number as u32).to_be_bytes());
            state.update(&*piece);
            let digest = state.finalize();
            piece.copy_from_slice(&digest[..piece.len()]);
        }
    });
}

fn xor(block: &mut [u8], with: &[u8]) {
    for (byte, with) in block.iter_mut().zip(with) {
        *byte ^= with;
    }
}

/// What all stripes but the last come to.
fn chain(hash: HashAlgorithm, stripes: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_len]);
    for stripe in stripes.chunks_exact(key_len) {
        xor(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    block
}

/// The key that is split into `material`, whose length is a multiple of `key_len`.
pub fn merge(hash: HashAlgorithm, material: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
    let (stripes, last) = material.split_at(material.len() - key_len);
    let mut key = chain(hash, stripes, key_len);
    xor(&mut key, last);
    key
}

/// Splits `key`: `material` holds random bytes for all stripes; its last one is computed.
pub fn split(hash: HashAlgorithm, key: &[u8], material: &mut [u8]) {
    let (stripes, last) = material.split_at_mut(material.len() - key.len());
    let block = chain(hash, stripes, key.len());
    last.copy_from_slice(&block);
    xor(last, key);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_merged_from_its_stripes_for_every_hash_and_length() {
        for hash in HashAlgorithm::ALL {
            for len in [16, 20, 32, 48, 64] {
                let key: Vec<u8> = (0..len as u8).collect();
                let mut material: Vec<u8> = (0..len * 10).map(|n| (n * 7) as u8).collect();
                split(hash, &key, &mut material);
                assert_eq!(*merge(hash, &material, len), key);
                material[3] ^= 1;
                assert_ne!(*merge(hash, &material, len), key);
            }
        }
    }
}
