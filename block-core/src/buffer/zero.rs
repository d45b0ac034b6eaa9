//! Zeroes: finding out that bytes are all zero, and the block of zeroes that everyone may write from.
#![deny(unsafe_code)]

/// Whether every byte is zero. Runs at about the speed of memory, and stops early: the first, the middle and the last
/// bytes, which tell most data from zeroes, are looked at first.
///
/// ```
/// use block_core::buffer::is_zero;
///
/// assert!(is_zero(&[0; 100_000]));
/// assert!(!is_zero(b"\0\0\0\0!\0"));
/// assert!(is_zero(&[]));
/// ```
pub fn is_zero(bytes: &[u8]) -> bool {
    if let (Some(first), Some(last)) = (bytes.first(), bytes.last())
        && (*first | *last | bytes[bytes.len() / 2]) != 0
    {
        return false;
    }
    // Blocks large enough that the check for an early exit costs nothing, and of a fixed size, so that the compiler
    // makes vector code of the inner loop.
    let (blocks, rest) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<16>();
        words
            .iter()
            .fold(0, |bits, word| bits | u128::from_ne_bytes(*word))
            == 0
    }) && rest.iter().fold(0, |bits, byte| bits | byte) == 0
}

/// Length of the block of zeroes.
pub(super) const ZERO_BLOCK_LEN: usize = 64 * 1024;

#[repr(align(4096))]
pub(super) struct ZeroBlock(pub(super) [u8; ZERO_BLOCK_LEN]);

/// What the segments of [`IoBuf::zeroes`](super::IoBuf::zeroes) point to.
pub(super) static ZERO_BLOCK: ZeroBlock = ZeroBlock([0; ZERO_BLOCK_LEN]);
