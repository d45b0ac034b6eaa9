//! Modes of operation over one sector: ECB, CBC, XTS and CTR, on top of the block ciphers of their crates. What the IV is
//! made of is in `ivgen`.

use cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use zeroize::Zeroize;

/// The largest sector, in bytes: the buffers for masks are as large.
pub(crate) const SECTOR: usize = 512;

/// A keyed cipher in a mode, for data of up to [`SECTOR`] bytes that is made of whole blocks.
pub(crate) trait SectorCipher: Send + Sync {
    /// Bytes of an IV: those of a cipher block.
    fn block_len(&self) -> usize;
    /// Encrypts in place.
    fn encrypt(&self, iv: &[u8], data: &mut [u8]);
    /// Decrypts in place.
    fn decrypt(&self, iv: &[u8], data: &mut [u8]);
}

/// What all block ciphers here can do.
pub(crate) trait BlockCipher:
    BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + KeyInit + Send + Sync + 'static
{
}

impl<C> BlockCipher for C where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + KeyInit + Send + Sync + 'static
{
}

fn blocks<C: BlockCipher>(data: &mut [u8]) -> &mut [Block<C>] {
    let (blocks, rest) = Array::slice_as_chunks_mut(data);
    debug_assert!(rest.is_empty(), "sectors are made of whole cipher blocks");
    blocks
}

fn xor(data: &mut [u8], mask: &[u8]) {
    for (byte, mask) in data.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

pub(crate) struct Ecb<C>(pub C);

impl<C: BlockCipher> SectorCipher for Ecb<C> {
    fn block_len(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, _iv: &[u8], data: &mut [u8]) {
        self.0.encrypt_blocks(blocks::<C>(data));
    }

    fn decrypt(&self, _iv: &[u8], data: &mut [u8]) {
        self.0.decrypt_blocks(blocks::<C>(data));
    }
}

pub(crate) struct Cbc<C>(pub C);

impl<C: BlockCipher> SectorCipher for Cbc<C> {
    fn block_len(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, iv: &[u8], data: &mut [u8]) {
        let mut before: Option<Block<C>> = None;
        for block in blocks::<C>(data) {
            xor(block, before.as_ref().map_or(iv, |block| &block[..]));
            self.0.encrypt_block(block);
            before = Some(block.clone());
        }
    }

    fn decrypt(&self, iv: &[u8], data: &mut [u8]) {
        let mut masks = [0; SECTOR];
        let len = C::block_size();
        masks[..len].copy_from_slice(&iv[..len]);
        masks[len..data.len()].copy_from_slice(&data[..data.len() - len]);
        self.0.decrypt_blocks(blocks::<C>(data));
        xor(data, &masks);
    }
}

/// Counter mode; the counter is the whole IV, big-endian.
pub(crate) struct Ctr<C>(pub C);

impl<C: BlockCipher> Ctr<C> {
    fn apply(&self, iv: &[u8], data: &mut [u8]) {
        let mut stream = [0; SECTOR];
        let len = C::block_size();
        let stream = &mut stream[..data.len()];
        let mut counter = [0; 16];
        let counter = &mut counter[..len];
        counter.copy_from_slice(&iv[..len]);
        for block in stream.chunks_exact_mut(len) {
            block.copy_from_slice(counter);
            for byte in counter.iter_mut().rev() {
                *byte = byte.wrapping_add(1);
                if *byte != 0 {
                    break;
                }
            }
        }
        self.0.encrypt_blocks(blocks::<C>(stream));
        xor(data, stream);
        stream.zeroize();
    }
}

impl<C: BlockCipher> SectorCipher for Ctr<C> {
    fn block_len(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, iv: &[u8], data: &mut [u8]) {
        self.apply(iv, data);
    }

    fn decrypt(&self, iv: &[u8], data: &mut [u8]) {
        self.apply(iv, data);
    }
}

/// XTS (IEEE 1619), for ciphers with blocks of 16 bytes and data of whole blocks.
pub(crate) struct Xts<C> {
    pub data: C,
    pub tweak: C,
}

impl<C: BlockCipher> Xts<C> {
    /// The masks of all blocks: the encrypted IV, multiplied by x once more for each block.
    fn masks(&self, iv: &[u8], masks: &mut [u8]) {
        let mut first = Block::<C>::default();
        first.copy_from_slice(&iv[..C::block_size()]);
        self.tweak.encrypt_block(&mut first);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&first);
        let mut tweak = u128::from_le_bytes(bytes);
        for mask in masks.chunks_exact_mut(16) {
            mask.copy_from_slice(&tweak.to_le_bytes());
            let carry = tweak >> 127;
            tweak = (tweak << 1) ^ (carry * 0x87);
        }
    }
}

impl<C: BlockCipher> SectorCipher for Xts<C> {
    fn block_len(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, iv: &[u8], data: &mut [u8]) {
        let mut masks = [0; SECTOR];
        let masks = &mut masks[..data.len()];
        self.masks(iv, masks);
        xor(data, masks);
        self.data.encrypt_blocks(blocks::<C>(data));
        xor(data, masks);
    }

    fn decrypt(&self, iv: &[u8], data: &mut [u8]) {
        let mut masks = [0; SECTOR];
        let masks = &mut masks[..data.len()];
        self.masks(iv, masks);
        xor(data, masks);
        self.data.decrypt_blocks(blocks::<C>(data));
        xor(data, masks);
    }
}
