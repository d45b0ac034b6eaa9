//! What is to be copied, piece by piece: block status of the sources, cut into chunks. No data passes through here.

use std::sync::Arc;

use block_core::{BlockHandle, Node, RequestFlags};

use crate::common::failure::Failure;

/// The longest piece of data that is no compressed cluster, in bytes: what buffered files do without a change of
/// threads. Measured: larger ones are slower, because they fall out of the CPU's caches between read and write.
pub const CHUNK: u64 = 1 << 20;
/// The longest piece of zeroes or nothing, in bytes: the progress bar should move.
const LARGE: u64 = 1 << 30;

/// One image to copy from.
pub struct Source {
    pub handle: Arc<BlockHandle>,
    /// Where the part to copy begins, in bytes.
    offset: u64,
    /// How long that part is, in bytes.
    length: u64,
    /// The target's backing file has what this image's backing file has, which needn't be copied.
    base: Option<Arc<Node>>,
}

impl Source {
    /// An image, whose own layer alone is copied if `above_backing`.
    pub fn new(handle: Arc<BlockHandle>, above_backing: bool) -> Self {
        let base = if above_backing {
            handle.node().backing()
        } else {
            None
        };
        Self {
            offset: 0,
            length: handle.length(),
            handle,
            base,
        }
    }

    /// `length` bytes of an image, from `offset` on.
    pub fn part(handle: Arc<BlockHandle>, offset: u64, length: u64) -> Self {
        Self {
            handle,
            offset,
            length,
            base: None,
        }
    }
}

/// What a piece is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Has to be read.
    Data,
    /// Reads as zeroes.
    Zero,
    /// The target's backing file has it.
    Below,
}

/// A piece of the work.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Number in order.
    pub index: u64,
    /// Which source.
    pub source: usize,
    /// Where in the source, in bytes.
    pub source_offset: u64,
    /// Where in the target, in bytes.
    pub offset: u64,
    /// How long, in bytes.
    pub len: u64,
    /// What it is made of.
    pub kind: Kind,
}

/// The sources, and how far they have been looked at.
pub struct Plan {
    sources: Arc<Vec<Source>>,
    salvage: bool,
    /// Zeroes are not written as data.
    sparse: bool,
    /// Pieces end at multiples of this in the target, where the sources allow it.
    unit: u64,
    source: usize,
    /// Where in the source's part, in bytes.
    at: u64,
    /// Where that source begins in the target, in bytes.
    start: u64,
    /// What is at `at`, and up to where.
    current: Option<(Kind, u64)>,
    index: u64,
}

impl Plan {
    /// A plan for `sources`, one after the other. A `unit` other than 1 is the target's cluster size.
    pub fn new(sources: Vec<Source>, salvage: bool, sparse: bool, unit: u64) -> Self {
        Self {
            sources: Arc::new(sources),
            salvage,
            sparse,
            unit: unit.max(1),
            source: 0,
            at: 0,
            start: 0,
            current: None,
            index: 0,
        }
    }

    /// The sources.
    pub fn sources(&self) -> Arc<Vec<Source>> {
        self.sources.clone()
    }

    /// The longest piece of data, in bytes.
    pub fn chunk(&self) -> u64 {
        (CHUNK / self.unit * self.unit).max(self.unit)
    }

    /// The next piece. `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Piece>, Failure> {
        loop {
            let Some(source) = self.sources.get(self.source) else {
                return Ok(None);
            };
            if self.at < source.length {
                break;
            }
            self.start += source.length;
            self.source += 1;
            self.at = 0;
            self.current = None;
        }
        let (mut kind, mut end) = match self.current {
            Some((kind, end)) if end > self.at => (kind, end),
            _ => {
                let found = self.look().await?;
                self.current = Some(found);
                found
            }
        };
        let offset = self.start + self.at;
        let length = self.sources[self.source].length;
        if self.unit > 1 && end < length {
            // A unit that is only in part zero, or below, is read as a whole.
            let past = (self.start + end) % self.unit;
            if kind != Kind::Data && end - past > self.at {
                end -= past;
            } else if past > 0 {
                kind = Kind::Data;
                end = length.min(end - past + self.unit);
            }
        }
        let chunk = self.chunk();
        let most = match kind {
            Kind::Data => chunk - offset % chunk,
            Kind::Zero if !self.sparse => chunk - offset % chunk,
            Kind::Zero | Kind::Below => LARGE,
        };
        let len = (end - self.at).min(most);
        let piece = Piece {
            index: self.index,
            source: self.source,
            source_offset: self.sources[self.source].offset + self.at,
            offset,
            len,
            kind,
        };
        self.at += len;
        self.index += 1;
        Ok(Some(piece))
    }

    async fn look(&self) -> Result<(Kind, u64), Failure> {
        let source = &self.sources[self.source];
        let len = source.length - self.at;
        let status = source
            .handle
            .block_status_above(source.base.as_ref(), source.offset + self.at, len)
            .await;
        let status = match status {
            Ok(status) if status.len > 0 => status,
            // Reading will tell.
            Ok(_) => return Ok((Kind::Data, source.length)),
            Err(_) if self.salvage => {
                return Ok((Kind::Data, self.at + len.min(CHUNK)));
            }
            Err(error) => {
                return Err(Failure::io(
                    format_args!(
                        "error while reading block status at offset {}",
                        source.offset + self.at
                    ),
                    &error,
                ));
            }
        };
        let kind = if status.is_zero() {
            Kind::Zero
        } else if source.base.is_some() && !status.is_allocated() {
            Kind::Below
        } else {
            Kind::Data
        };
        Ok((kind, self.at + status.len.min(len)))
    }
}

/// How zeroes are written: they may become holes.
pub const ZEROES: RequestFlags = RequestFlags::MAY_UNMAP;
