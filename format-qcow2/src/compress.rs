//! The codecs of compressed clusters (digest, section 3): raw deflate with a window of 4 KiB, no header, no trailer; or
//! zstd frames.
//!
//! CPU work only: callers hand it to the environment's workers. Whatever the input is, the output is a cluster and the memory
//! that it takes is bounded by that: a stream that would expand to more is cut off, or refused.

use std::{cell::RefCell, fmt};

use block_core::{
    buffer::Buffer,
    error::{Error, Result},
};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::{bulk, zstd_safe};

/// log2 of the window that writers use; QEMU inflates with no larger one.
const WINDOW_BITS: u8 = 12;
/// log2 of the window that streams are read with: as large as deflate has it, so that every stream is accepted.
const READ_WINDOW_BITS: u8 = 15;
/// As hard as deflate tries. With a window of 4 KiB that costs little more than the levels below, which leave images larger
/// than QEMU's own.
const DEFLATE_LEVEL: Compression = Compression::best();
/// zstd's default, which QEMU uses as well.
const ZSTD_LEVEL: i32 = 3;

/// How the compressed clusters of an image are compressed: the header's `compression_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Codec {
    /// Raw deflate, called zlib.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Whether some bytes are all that a compressed cluster takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// They fill the cluster; bytes behind them don't matter.
    Whole,
    /// The stream goes on behind them.
    InPart,
    /// They don't make sense.
    Damaged,
}

/// Why a cluster can't be filled.
enum Unfit {
    /// The bytes come to an end.
    Short,
    Damaged(Error),
}

impl From<Unfit> for Error {
    fn from(unfit: Unfit) -> Self {
        match unfit {
            Unfit::Short => damaged("the stream ends before the cluster is full"),
            Unfit::Damaged(error) => error,
        }
    }
}

impl Codec {
    /// The codec of a header's `compression_type`; `None` for a number that none has.
    pub const fn from_type(compression_type: u8) -> Option<Self> {
        match compression_type {
            0 => Some(Self::Zlib),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The header's `compression_type`.
    pub const fn to_type(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::Zstd => 1,
        }
    }

    /// The codec that users call `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Zlib, Self::Zstd]
            .into_iter()
            .find(|codec| codec.name() == name)
    }

    /// What users call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// Compresses a whole cluster. `None` when that gains nothing: the result must be smaller than the cluster.
    pub fn compress(self, cluster: &[u8]) -> Option<Vec<u8>> {
        let room = cluster.len().checked_sub(1).filter(|room| *room > 0)?;
        let mut out = vec![0; room];
        // Nothing but lack of room can go wrong with a fresh encoder, and storing the cluster uncompressed is right in
        // any case.
        let len = match self {
            Self::Zlib => deflate(cluster, &mut out)?,
            Self::Zstd => COMPRESSOR.with_borrow_mut(|slot| {
                if slot.is_none() {
                    *slot = bulk::Compressor::new(ZSTD_LEVEL).ok();
                }
                slot.as_mut()?
                    .compress_to_buffer(cluster, &mut out[..])
                    .ok()
            })?,
        };
        out.truncate(len);
        Some(out)
    }

    /// Decompresses the bytes of a run into a cluster of `cluster_size` bytes. Input behind the end of the cluster is
    /// ignored: a run is rounded up to sectors, and its last bytes may belong to the next cluster.
    ///
    /// # Errors
    /// EIO when the stream is damaged or ends before the cluster is full, or when a zstd frame holds more.
    pub fn decompress(self, run: &[u8], cluster_size: usize) -> Result<Buffer> {
        let mut out = Buffer::try_new(cluster_size)?;
        self.fill(run, &mut out)?;
        Ok(out)
    }

    fn fill(self, run: &[u8], out: &mut [u8]) -> std::result::Result<(), Unfit> {
        match self {
            Self::Zlib => inflate(run, out),
            Self::Zstd => unzstd(run, out),
        }
    }

    /// Whether the bytes of `run` are all that a cluster takes.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn fills(self, run: &[u8], cluster_size: usize) -> Result<Filled> {
        let mut out = Buffer::try_new(cluster_size)?;
        Ok(match self.fill(run, &mut out) {
            Ok(()) => Filled::Whole,
            Err(Unfit::Short) => Filled::InPart,
            Err(Unfit::Damaged(_)) => Filled::Damaged,
        })
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

thread_local! {
    /// zstd's tables take some hundred KiB, which aren't to be made anew for each cluster.
    static COMPRESSOR: RefCell<Option<bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn deflate(cluster: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut deflate = Compress::new_with_window_bits(DEFLATE_LEVEL, false, WINDOW_BITS);
    match deflate.compress(cluster, out, FlushCompress::Finish) {
        Ok(Status::StreamEnd) if deflate.total_in() == cluster.len() as u64 => {
            usize::try_from(deflate.total_out()).ok()
        }
        _ => None,
    }
}

/// Fills `out`; what the stream holds beyond that isn't looked at.
fn inflate(run: &[u8], out: &mut [u8]) -> std::result::Result<(), Unfit> {
    let mut inflate = Decompress::new_with_window_bits(false, READ_WINDOW_BITS);
    loop {
        let (read, written) = (inflate.total_in() as usize, inflate.total_out() as usize);
        if written >= out.len() {
            return Ok(());
        }
        let (Some(input), Some(output)) = (run.get(read..), out.get_mut(written..)) else {
            return Err(Unfit::Short);
        };
        let status = inflate
            .decompress(input, output, FlushDecompress::None)
            .map_err(|error| Unfit::Damaged(damaged("the stream is damaged").with_source(error)))?;
        let (now_read, now_written) = (inflate.total_in() as usize, inflate.total_out() as usize);
        if now_written < out.len() && status == Status::StreamEnd {
            let what = "the stream ends before the cluster is full";
            return Err(Unfit::Damaged(damaged(what)));
        }
        if now_written < out.len() && (now_read, now_written) == (read, written) {
            return Err(Unfit::Short);
        }
    }
}

/// What zstd calls a frame whose end isn't there.
const CUT_OFF: &str = "Src size is incorrect";

/// Fills `out` from as many frames as that takes. Each frame goes straight to its place, so that no window has to be kept,
/// however large a one the frame asks for.
fn unzstd(run: &[u8], out: &mut [u8]) -> std::result::Result<(), Unfit> {
    let failed = |code| match zstd_safe::get_error_name(code) {
        CUT_OFF => Unfit::Short,
        name => Unfit::Damaged(damaged(&format!("a zstd frame is damaged: {name}"))),
    };
    let torn = |error: std::io::Error| {
        Unfit::Damaged(damaged("a zstd frame is damaged or too long").with_source(error))
    };
    let (mut read, mut written) = (0, 0);
    while written < out.len() {
        let rest = run.get(read..).unwrap_or_default();
        if rest.is_empty() {
            return Err(Unfit::Short);
        }
        // At least the bytes of a frame's header, so that it goes on.
        let len = zstd_safe::find_frame_compressed_size(rest).map_err(failed)?;
        let frame = rest
            .get(..len)
            .filter(|frame| !frame.is_empty())
            .ok_or(Unfit::Short)?;
        let room = out.get_mut(written..).unwrap_or_default();
        written += DECOMPRESSOR
            .with_borrow_mut(|slot| {
                if slot.is_none() {
                    *slot = Some(bulk::Decompressor::new()?);
                }
                slot.as_mut()
                    .map_or(Ok(0), |decoder| decoder.decompress_to_buffer(frame, room))
            })
            .map_err(torn)?;
        read += len;
    }
    Ok(())
}

fn damaged(what: &str) -> Error {
    Error::io(format!("Could not decompress a cluster: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Codec; 2] = [Codec::Zlib, Codec::Zstd];

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
        for codec in BOTH {
            for bits in 9..=21 {
                for cluster in [sample(1 << bits), vec![0; 1 << bits], vec![7; 1 << bits]] {
                    let packed = codec.compress(&cluster).expect("it compresses");
                    assert!(packed.len() < cluster.len());
                    let out = codec.decompress(&packed, cluster.len()).unwrap();
                    assert_eq!(out[..], cluster[..]);
                }
            }
        }
    }

    #[test]
    fn a_window_of_4_kib_reads_what_is_written() {
        // 8 KiB of noise twice: a larger window would refer back across 8 KiB.
        let mut cluster = noise(8192);
        cluster.extend(noise(8192));
        cluster.extend(vec![0; 65536 - 16384]);
        let packed = Codec::Zlib.compress(&cluster).unwrap();
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
        for codec in BOTH {
            for bits in [9, 12, 16] {
                assert_eq!(codec.compress(&noise(1 << bits)), None);
            }
            assert_eq!(codec.compress(&[]), None);
            assert_eq!(codec.compress(&[1]), None);
        }
    }

    #[test]
    fn input_behind_the_end_is_ignored() {
        let cluster = sample(65536);
        for codec in BOTH {
            let mut packed = codec.compress(&cluster).unwrap();
            packed.extend(noise(600));
            assert_eq!(codec.decompress(&packed, 65536).unwrap()[..], cluster[..]);
        }
        // Neither does a deflate stream that would go on matter.
        let packed = Codec::Zlib.compress(&cluster).unwrap();
        let front = Codec::Zlib.decompress(&packed, 4096).unwrap();
        assert_eq!(front[..], cluster[..4096]);
    }

    #[test]
    fn a_damaged_or_short_stream_is_an_io_error() {
        for codec in BOTH {
            let packed = codec.compress(&sample(65536)).unwrap();
            let errno = |run: &[u8], size| codec.decompress(run, size).unwrap_err().errno();
            for len in [0, 1, packed.len() / 2, packed.len() - 64] {
                assert_eq!(errno(&packed[..len], 65536), 5, "{codec} {len}");
            }
            assert_eq!(errno(&packed, 131_072), 5);
            assert_eq!(errno(&[0xff; 512], 65536), 5);
            assert_eq!(errno(&[0; 512], 65536), 5);
            for seed in 0..50u8 {
                let mut broken = packed.clone();
                let at = usize::from(seed) * broken.len() / 50;
                broken[at] ^= 0x55;
                // Either an error or some cluster of the right size; never a panic.
                if let Ok(out) = codec.decompress(&broken, 65536) {
                    assert_eq!(out.len(), 65536);
                }
            }
        }
    }

    #[test]
    fn bytes_that_a_cluster_needs_are_told_from_those_behind_it() {
        for codec in BOTH {
            for len in [512, 4096, 65536] {
                let packed = codec.compress(&sample(len)).unwrap();
                let mut more = packed.clone();
                more.extend(noise(500));
                assert_eq!(codec.fills(&packed, len).unwrap(), Filled::Whole);
                assert_eq!(codec.fills(&more, len).unwrap(), Filled::Whole);
                // The last bytes of a deflate stream may be nothing but the end's mark.
                for missing in [5, packed.len() / 2, packed.len() - 1, packed.len()] {
                    let part = &packed[..packed.len() - missing];
                    let filled = codec.fills(part, len).unwrap();
                    assert_eq!(filled, Filled::InPart, "{codec} {len} {missing}");
                }
                assert_eq!(codec.fills(&[0xff; 512], len).unwrap(), Filled::Damaged);
            }
        }
    }

    #[test]
    fn several_frames_make_one_cluster() {
        let cluster = sample(65536);
        let mut run = Vec::new();
        // A skippable frame, an empty one, and two with a half each.
        run.extend([0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4]);
        for part in [&cluster[..0], &cluster[..30000], &cluster[30000..]] {
            run.extend(bulk::compress(part, 1).unwrap());
        }
        let whole = run.len();
        run.extend([0; 100]);
        let out = Codec::Zstd.decompress(&run, 65536).unwrap();
        assert_eq!(out[..], cluster[..]);
        let cut = Codec::Zstd.decompress(&run[..whole - 5], 65536);
        assert_eq!(cut.unwrap_err().errno(), 5);
    }

    #[test]
    fn a_frame_that_expands_beyond_the_cluster_is_an_io_error_and_takes_no_memory() {
        // 1 GiB of zeroes in some ten KiB, with a window of 128 MiB.
        let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        let zeroes = vec![0; 1 << 20];
        for _ in 0..1024 {
            std::io::Write::write_all(&mut encoder, &zeroes).unwrap();
        }
        let bomb = encoder.finish().unwrap();
        assert!(bomb.len() < 1 << 20);
        let error = Codec::Zstd.decompress(&bomb, 65536).unwrap_err();
        assert_eq!(error.errno(), 5, "{error}");
        // A deflate stream is simply not read any further.
        let mut deflated = Vec::new();
        let mut deflate = Compress::new_with_window_bits(DEFLATE_LEVEL, false, WINDOW_BITS);
        deflated.reserve(1 << 20);
        for _ in 0..64 {
            deflate
                .compress_vec(&zeroes, &mut deflated, FlushCompress::None)
                .unwrap();
        }
        let out = Codec::Zlib.decompress(&deflated, 65536).unwrap();
        assert!(out.iter().all(|byte| *byte == 0));
    }
}
