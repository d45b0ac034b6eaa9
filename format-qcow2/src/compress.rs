//! The codec of compressed clusters (digest, section 3): raw deflate with a window of 4 KiB, no header, no trailer.
//!
//! CPU work only: callers hand it to the environment's workers.

use block_core::{
    buffer::Buffer,
    error::{Error, Result},
};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// log2 of the window that writers use; QEMU inflates with no larger one.
const WINDOW_BITS: u8 = 12;
/// log2 of the window that streams are read with: as large as deflate has it, so that every stream is accepted.
const READ_WINDOW_BITS: u8 = 15;

/// Compresses a whole cluster. `None` when that gains nothing: the result must be smaller than the cluster.
pub fn compress(cluster: &[u8]) -> Option<Vec<u8>> {
    let room = cluster.len().checked_sub(1).filter(|room| *room > 0)?;
    let mut out = vec![0; room];
    let mut deflate = Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
    match deflate.compress(cluster, &mut out, FlushCompress::Finish) {
        Ok(Status::StreamEnd) if deflate.total_in() == cluster.len() as u64 => {
            out.truncate(usize::try_from(deflate.total_out()).ok()?);
            Some(out)
        }
        // No room left: the stream isn't smaller. Nothing else can go wrong with a fresh encoder, and storing the
        // cluster uncompressed is right in any case.
        _ => None,
    }
}

/// Decompresses the bytes of a run into a cluster of `cluster_size` bytes. Input behind the end of the cluster is
/// ignored: a run is rounded up to sectors, and its last bytes may belong to the next cluster.
///
/// # Errors
/// EIO when the stream is damaged or ends before the cluster is full.
pub fn decompress(run: &[u8], cluster_size: usize) -> Result<Buffer> {
    let mut out = Buffer::try_new(cluster_size)?;
    let mut inflate = Decompress::new_with_window_bits(false, READ_WINDOW_BITS);
    loop {
        let (read, written) = (inflate.total_in() as usize, inflate.total_out() as usize);
        if written >= cluster_size {
            return Ok(out);
        }
        let (Some(input), Some(output)) = (run.get(read..), out.get_mut(written..)) else {
            return Err(damaged("the stream has no end"));
        };
        let status = inflate
            .decompress(input, output, FlushDecompress::None)
            .map_err(|error| damaged("the stream is damaged").with_source(error))?;
        let (now_read, now_written) = (inflate.total_in() as usize, inflate.total_out() as usize);
        if now_written < cluster_size
            && (status == Status::StreamEnd || (now_read, now_written) == (read, written))
        {
            return Err(damaged("the stream ends before the cluster is full"));
        }
    }
}

fn damaged(what: &str) -> Error {
    Error::io(format!("Could not decompress a cluster: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that repeat at all distances and compress somewhat.
    fn sample(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        (0..len)
            .map(|index| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if index % 16 == 0 {
                    (state >> 24) as u8
                } else {
                    (index / 7) as u8
                }
            })
            .collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect()
    }

    #[test]
    fn what_is_compressed_decompresses_for_every_cluster_size() {
        for bits in 9..=21 {
            for cluster in [sample(1 << bits), vec![0; 1 << bits], vec![7; 1 << bits]] {
                let packed = compress(&cluster).expect("it compresses");
                assert!(packed.len() < cluster.len());
                assert_eq!(decompress(&packed, cluster.len()).unwrap()[..], cluster[..]);
            }
        }
    }

    #[test]
    fn a_window_of_4_kib_reads_what_is_written() {
        // 8 KiB of noise twice: a larger window would refer back across 8 KiB.
        let mut cluster = noise(8192);
        cluster.extend(noise(8192));
        cluster.extend(vec![0; 65536 - 16384]);
        let packed = compress(&cluster).unwrap();
        let mut out = vec![0; cluster.len()];
        let mut narrow = Decompress::new_with_window_bits(false, WINDOW_BITS);
        let status = narrow
            .decompress(&packed, &mut out, FlushDecompress::Finish)
            .unwrap();
        assert_eq!(status, Status::StreamEnd);
        assert_eq!(out, cluster);
        // The noise was stored twice.
        assert!(packed.len() > 16384);
    }

    #[test]
    fn noise_is_not_compressed() {
        for bits in [9, 12, 16] {
            assert_eq!(compress(&noise(1 << bits)), None);
        }
        assert_eq!(compress(&[]), None);
        assert_eq!(compress(&[1]), None);
    }

    #[test]
    fn input_behind_the_end_is_ignored() {
        let cluster = sample(65536);
        let mut packed = compress(&cluster).unwrap();
        packed.extend(noise(600));
        assert_eq!(decompress(&packed, 65536).unwrap()[..], cluster[..]);
        // Neither does a stream that would go on matter.
        assert_eq!(decompress(&packed, 4096).unwrap()[..], cluster[..4096]);
    }

    #[test]
    fn a_damaged_or_short_stream_is_an_io_error() {
        let packed = compress(&sample(65536)).unwrap();
        for len in [0, 1, packed.len() / 2, packed.len() - 64] {
            assert_eq!(
                decompress(&packed[..len], 65536).unwrap_err().errno(),
                5,
                "{len}"
            );
        }
        assert_eq!(decompress(&packed, 131_072).unwrap_err().errno(), 5);
        assert_eq!(decompress(&[0xff; 512], 65536).unwrap_err().errno(), 5);
        for seed in 0..50u8 {
            let mut broken = packed.clone();
            let at = usize::from(seed) * broken.len() / 50;
            broken[at] ^= 0x55;
            // Either an error or some cluster of the right size; never a panic.
            if let Ok(out) = decompress(&broken, 65536) {
                assert_eq!(out.len(), 65536);
            }
        }
    }
}
