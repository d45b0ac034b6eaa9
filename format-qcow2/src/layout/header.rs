//! The header of a qcow2 image (digest, sections 1 and 11): what its fields mean, what they may hold, how they are
//! written. Free of I/O: [`Header::cluster_size_of`] says how many bytes are needed, [`Header::decode`] takes them.
//!
//! Every limit is checked before anything is allocated by a value from the image; the errors name the field.

use bitflags::bitflags;
use block_core::error::{Error, ErrorKind, Result};

use super::{
    extensions::{self, ExtensionContext, Extensions, FeatureKind, describe_features},
    units::{Geometry, HostOffset},
};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a header of version 2.
pub const V2_LENGTH: u32 = 72;
/// Bytes of the smallest header of version 3.
pub const V3_MIN_LENGTH: u32 = 104;
/// Bytes of the header that is written in version 3, without an unknown tail.
pub const V3_LENGTH: u32 = 112;
/// The fewest bytes that [`Header::cluster_size_of`] needs.
pub const MIN_HEAD: usize = 72;
/// Longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;
/// Largest L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;

/// Byte offsets of fields that are updated in place.
pub mod field {
    /// `size`, 8 bytes.
    pub const SIZE: u64 = 24;
    /// `l1_size` and `l1_table_offset`, 4 + 8 bytes.
    pub const L1: u64 = 36;
    /// `refcount_table_offset` and `refcount_table_clusters`, 8 + 4 bytes.
    pub const REFCOUNT_TABLE: u64 = 48;
    /// `nb_snapshots` and `snapshots_offset`, 4 + 8 bytes: the end of what every version has.
    pub const SNAPSHOTS: u64 = 60;
    /// `incompatible_features`, 8 bytes.
    pub const INCOMPATIBLE: u64 = 72;
    /// `compatible_features`, 8 bytes.
    pub const COMPATIBLE: u64 = 80;
    /// `autoclear_features`, 8 bytes.
    pub const AUTOCLEAR: u64 = 88;
}

bitflags! {
    /// Features without which the image can't be understood. Unknown bits are kept.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Incompatible: u64 {
        /// Refcounts may be stale; L1 and L2 tables hold the truth.
        const DIRTY = 1 << 0;
        /// Metadata may be wrong.
        const CORRUPT = 1 << 1;
        /// Guest data is in another file.
        const DATA_FILE = 1 << 2;
        /// `compression_type` isn't 0.
        const COMPRESSION = 1 << 3;
        /// L2 entries of 16 bytes with subclusters.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }
}

bitflags! {
    /// Features that may be ignored.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Compatible: u64 {
        /// Refcount updates may be postponed while the dirty bit is set.
        const LAZY_REFCOUNTS = 1 << 0;
        const _ = !0;
    }
}

bitflags! {
    /// Features whose bit a program that doesn't know them drops before it writes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1 << 0;
        /// The data file alone equals the disk.
        const RAW_DATA_FILE = 1 << 1;
        const _ = !0;
    }
}

impl Incompatible {
    /// The bits that this file knows the meaning of.
    pub const KNOWN: u64 = 0x1f;
}

impl Autoclear {
    /// The bits that this driver keeps on a writable open; all others are dropped.
    pub const KNOWN: u64 = 0x3;
}

/// A header that was found valid, with its extensions and the backing file's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk, as the field has it.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where it is.
    pub l1_table_offset: HostOffset,
    /// Where the refcount table is.
    pub refcount_table_offset: HostOffset,
    /// Its clusters.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub nb_snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: HostOffset,
    /// Incompatible features.
    pub incompatible: Incompatible,
    /// Compatible features.
    pub compatible: Compatible,
    /// Autoclear features.
    pub autoclear: Autoclear,
    /// log2 of the refcount width, 0 to 6.
    pub refcount_order: u32,
    /// 0 zlib, 1 zstd.
    pub compression_type: u8,
    /// Header bytes beyond those that are known here.
    pub unknown_tail: Vec<u8>,
    /// The backing file's name, as its bytes are in the image.
    pub backing_file: Option<Vec<u8>>,
    /// The extensions.
    pub extensions: Extensions,
}

/// Big-endian fields of the first bytes of an image; a missing byte reads as 0, as an absent field does.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = self.0.get(at + index).copied().unwrap_or(0);
        }
        bytes
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }
}

pub(super) fn invalid(
    message: &str,
    field: &str,
    value: impl std::fmt::Display,
    allowed: &str,
) -> Error {
    Error::invalid(message).with_field(field, value, allowed)
}

fn too_big(message: &str, field: &str, value: impl std::fmt::Display, allowed: &str) -> Error {
    Error::new(ErrorKind::TooBig, message).with_field(field, value, allowed)
}

/// How sure it is that `head` begins a qcow2 image: 100 for its magic with a version that exists, else 0.
pub fn probe(head: &[u8]) -> u32 {
    let fields = Fields(head);
    if head.len() >= 8 && fields.u32(0) == MAGIC && fields.u32(4) >= 2 {
        100
    } else {
        0
    }
}

impl Header {
    /// The cluster size in bytes that the first bytes of an image tell, for reading the whole first cluster: that is
    /// what [`Self::decode`] needs. Bytes beyond the end of the file count as zeroes.
    pub fn cluster_size_of(head: &[u8]) -> Result<usize> {
        let fields = Fields(head);
        if fields.u32(0) != MAGIC {
            return Err(
                Error::new(ErrorKind::WrongFormat, "Image is not in qcow2 format").with_field(
                    "magic",
                    format!("{:#010x}", fields.u32(0)),
                    "0x514649fb",
                ),
            );
        }
        let version = fields.u32(4);
        if !(2..=3).contains(&version) {
            return Err(
                Error::unsupported(format!("Unsupported qcow2 version {version}"))
                    .with_field("version", version, "2 or 3"),
            );
        }
        let bits = fields.u32(20);
        if !(Geometry::MIN_CLUSTER_BITS..=Geometry::MAX_CLUSTER_BITS).contains(&bits) {
            return Err(invalid(
                &format!("Unsupported cluster size: 2^{bits}"),
                "cluster_bits",
                bits,
                "9..=21",
            ));
        }
        Ok(1 << bits)
    }

    /// Reads the header from the image's first cluster, whose missing bytes count as zeroes.
    ///
    /// All checks of the digest's section 11 that need no knowledge of how the image is to be used are made here; the
    /// others are in `super::refusal`.
    pub fn decode(cluster: &[u8]) -> Result<Self> {
        let cluster_size = Self::cluster_size_of(cluster)?;
        let fields = Fields(cluster);
        let version = fields.u32(4);
        let header_length = if version == 2 {
            V2_LENGTH
        } else {
            fields.u32(100)
        };
        if version > 2 && header_length < V3_MIN_LENGTH {
            return Err(invalid(
                "qcow2 header too short",
                "header_length",
                header_length,
                "at least 104",
            ));
        }
        if header_length as usize > cluster_size {
            return Err(invalid(
                "qcow2 header exceeds cluster size",
                "header_length",
                header_length,
                &format!("at most {cluster_size}"),
            ));
        }
        let backing_offset = fields.u64(8);
        if backing_offset > cluster_size as u64 {
            return Err(invalid(
                "Invalid backing file offset",
                "backing_file_offset",
                backing_offset,
                &format!("at most {cluster_size}"),
            ));
        }
        let backing_offset = backing_offset as usize;

        // Beyond the known fields, and beyond the end of the file, there are zeroes.
        let mut padded;
        let cluster = if cluster.len() < cluster_size {
            padded = cluster.to_vec();
            padded.resize(cluster_size, 0);
            &padded
        } else {
            &cluster[..cluster_size]
        };
        let area_end = if backing_offset == 0 {
            cluster_size
        } else {
            backing_offset
        };
        let area = cluster.get(header_length as usize..area_end).unwrap_or(&[]);

        let v3 = version >= 3;
        let incompatible = if v3 {
            fields.u64(field::INCOMPATIBLE as usize)
        } else {
            0
        };
        let unknown = incompatible & !Incompatible::KNOWN;
        if unknown != 0 {
            let table = extensions::find_feature_names(area);
            let names = describe_features(FeatureKind::Incompatible, unknown, &table);
            return Err(
                Error::unsupported(format!("Unsupported qcow2 feature(s): {names}")).with_field(
                    "incompatible_features",
                    format!("{incompatible:#x}"),
                    format!("bits of {:#x}", Incompatible::KNOWN),
                ),
            );
        }
        let incompatible = Incompatible::from_bits_retain(incompatible);
        let compression_type = if header_length > V3_MIN_LENGTH {
            cluster[104]
        } else {
            0
        };
        check_compression(compression_type, incompatible)?;
        let cluster_bits = fields.u32(20);
        if incompatible.contains(Incompatible::EXTENDED_L2) && cluster_bits < 14 {
            return Err(invalid(
                &format!("Unsupported subcluster size: {}", cluster_size / 32),
                "cluster_bits",
                cluster_bits,
                "14..=21 with extended L2 entries",
            ));
        }
        let refcount_order = if v3 { fields.u32(96) } else { 4 };
        if refcount_order > Geometry::MAX_REFCOUNT_ORDER {
            return Err(invalid(
                "Reference count entry width too large; may not exceed 64 bits",
                "refcount_order",
                refcount_order,
                "0..=6",
            ));
        }
        let crypt_method = fields.u32(32);
        if crypt_method > 2 {
            return Err(invalid(
                &format!("Unsupported encryption method {crypt_method}"),
                "crypt_method",
                crypt_method,
                "0..=2",
            ));
        }
        let mut header = Self {
            version,
            cluster_bits,
            size: fields.u64(24),
            crypt_method,
            l1_size: fields.u32(36),
            l1_table_offset: HostOffset(fields.u64(40)),
            refcount_table_offset: HostOffset(fields.u64(48)),
            refcount_table_clusters: fields.u32(56),
            nb_snapshots: fields.u32(60),
            snapshots_offset: HostOffset(fields.u64(64)),
            incompatible,
            compatible: Compatible::from_bits_retain(if v3 { fields.u64(80) } else { 0 }),
            autoclear: Autoclear::from_bits_retain(if v3 { fields.u64(88) } else { 0 }),
            refcount_order,
            compression_type,
            unknown_tail: cluster
                .get(V3_LENGTH as usize..header_length as usize)
                .unwrap_or(&[])
                .to_vec(),
            backing_file: None,
            extensions: Extensions::default(),
        };
        header.check_tables()?;
        let context = ExtensionContext {
            cluster_size: cluster_size as u64,
            crypt_method,
        };
        header.extensions = Extensions::decode(area, context)?;
        if crypt_method == 2 && header.extensions.luks.is_none() {
            return Err(invalid(
                "Missing CRYPTO header for crypt method 2",
                "crypt_method",
                2,
                "2 only with a LUKS header extension",
            ));
        }
        if backing_offset != 0 {
            let len = fields.u32(16) as usize;
            let most = MAX_BACKING_NAME.min(cluster_size - backing_offset);
            if len > most {
                return Err(invalid(
                    "Backing file name too long",
                    "backing_file_size",
                    len,
                    &format!("at most {most}"),
                ));
            }
            let name = &cluster[backing_offset..backing_offset + len];
            header.backing_file = (len > 0).then(|| name.to_vec());
        }
        Ok(header)
    }

    /// The limits of every table that the header points to.
    fn check_tables(&self) -> Result<()> {
        let geometry = self.geometry();
        let cluster_size = geometry.cluster_size();
        let multiple = format!("a multiple of {cluster_size}, ending below 2^63");
        let placed = |offset: HostOffset, len: u64| {
            geometry.is_aligned(offset)
                && offset
                    .0
                    .checked_add(len)
                    .is_some_and(|end| i64::try_from(end).is_ok())
        };

        if self.refcount_table_bytes() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_big(
                "Reference count table too large",
                "refcount_table_clusters",
                self.refcount_table_clusters,
                &format!("at most {}", MAX_REFCOUNT_TABLE_BYTES / cluster_size),
            ));
        }
        if !placed(self.refcount_table_offset, self.refcount_table_bytes()) {
            return Err(invalid(
                "Reference count table offset invalid",
                "refcount_table_offset",
                self.refcount_table_offset,
                &multiple,
            ));
        }
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(too_big(
                "Snapshot table too large",
                "nb_snapshots",
                self.nb_snapshots,
                &format!("at most {MAX_SNAPSHOTS}"),
            ));
        }
        // An entry has at least 40 bytes.
        if !placed(self.snapshots_offset, u64::from(self.nb_snapshots) * 40) {
            return Err(invalid(
                "Snapshot table offset invalid",
                "snapshots_offset",
                self.snapshots_offset,
                &multiple,
            ));
        }
        if self.l1_bytes() > MAX_L1_BYTES {
            return Err(too_big(
                "Active L1 table too large",
                "l1_size",
                self.l1_size,
                &format!("at most {}", MAX_L1_BYTES / 8),
            ));
        }
        if !placed(self.l1_table_offset, self.l1_bytes()) {
            return Err(invalid(
                "Active L1 table offset invalid",
                "l1_table_offset",
                self.l1_table_offset,
                &multiple,
            ));
        }
        let needed = self.l1_entries_needed(self.size);
        if needed > i32::MAX as u64 {
            return Err(too_big(
                "Image is too big",
                "size",
                self.size,
                "what an L1 table covers",
            ));
        }
        if u64::from(self.l1_size) < needed {
            return Err(invalid(
                "L1 table is too small",
                "l1_size",
                self.l1_size,
                &format!("at least {needed}"),
            ));
        }
        if self.size > i64::MAX as u64 {
            return Err(too_big(
                "Could not refresh total sector count: File too large",
                "size",
                self.size,
                "below 2^63",
            ));
        }
        Ok(())
    }

    /// The sizes that follow from the header.
    ///
    /// # Panics
    /// If fields were set to what no valid header holds.
    pub fn geometry(&self) -> Geometry {
        let ordinary = Geometry::new(self.cluster_bits, self.refcount_order, self.version);
        let geometry = if self.incompatible.contains(Incompatible::EXTENDED_L2) {
            ordinary.and_then(Geometry::with_extended_l2)
        } else {
            ordinary
        };
        match geometry {
            Some(geometry) => {
                geometry.with_data_file(self.incompatible.contains(Incompatible::DATA_FILE))
            }
            None => panic!("cluster_bits and refcount_order were checked when the header was read"),
        }
    }

    /// Whether the external data file by itself is a raw image of the disk.
    pub fn has_raw_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
            && self.autoclear.contains(Autoclear::RAW_DATA_FILE)
    }

    /// Bytes of the virtual disk that a guest sees: whole sectors of 512.
    pub const fn disk_size(&self) -> u64 {
        self.size & !511
    }

    /// Bytes of the active L1 table.
    pub const fn l1_bytes(&self) -> u64 {
        self.l1_size as u64 * 8
    }

    /// Bytes of the refcount table.
    pub const fn refcount_table_bytes(&self) -> u64 {
        (self.refcount_table_clusters as u64) << self.cluster_bits
    }

    /// Entries of the refcount table.
    pub const fn refcount_table_entries(&self) -> u64 {
        self.refcount_table_bytes() / 8
    }

    /// Entries that an L1 table needs for a disk of `size` bytes.
    pub const fn l1_entries_needed(&self, size: u64) -> u64 {
        let entry_bits = if self.incompatible.contains(Incompatible::EXTENDED_L2) {
            4
        } else {
            3
        };
        size.div_ceil(1 << (2 * self.cluster_bits - entry_bits))
    }

    /// Bytes of the header that [`Self::encode`] writes.
    pub fn encoded_length(&self) -> u32 {
        if self.version == 2 {
            V2_LENGTH
        } else {
            V3_LENGTH + self.unknown_tail.len() as u32
        }
    }

    /// The backing file's name for people and for opening; bytes that aren't UTF-8 are replaced.
    pub fn backing_file_name(&self) -> Option<String> {
        self.backing_file
            .as_ref()
            .map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Whether refcount updates may be postponed.
    pub const fn lazy_refcounts(&self) -> bool {
        self.compatible.contains(Compatible::LAZY_REFCOUNTS)
    }

    /// Whether the dirty bit is set.
    pub const fn is_dirty(&self) -> bool {
        self.incompatible.contains(Incompatible::DIRTY)
    }

    /// Whether the corrupt bit is set.
    pub const fn is_corrupt(&self) -> bool {
        self.incompatible.contains(Incompatible::CORRUPT)
    }

    /// The whole first cluster: header, unknown tail, extensions, backing file's name, zeroes.
    ///
    /// # Errors
    /// ENOSPC when there is no room for all of it, EINVAL when the backing file's name is longer than 1023 bytes or
    /// the backing format longer than 15.
    pub fn encode(&self) -> Result<Vec<u8>> {
        self.lay_out(true, None).map(|bytes| self.padded(bytes))
    }

    /// Bytes of a header, with zeroes up to a whole cluster.
    pub(crate) fn padded(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.resize(1 << self.cluster_bits, 0);
        bytes
    }

    /// The part of the first cluster that is used: with or without the names of the features, which nothing depends on, and
    /// with the backing file's name at `name_at` instead of right behind the extensions.
    ///
    /// # Errors
    /// Those of [`Self::encode`]; ENOSPC also when the extensions go beyond `name_at`.
    pub(crate) fn lay_out(&self, feature_names: bool, name_at: Option<usize>) -> Result<Vec<u8>> {
        let cluster_size = 1usize << self.cluster_bits;
        if let Some(name) = &self.backing_file
            && name.len() > MAX_BACKING_NAME
        {
            return Err(invalid(
                "Backing file name too long",
                "backing_file_size",
                name.len(),
                "at most 1023",
            ));
        }
        if let Some(format) = &self.extensions.backing_format
            && format.len() > extensions::MAX_BACKING_FORMAT
        {
            return Err(invalid(
                "Backing format name too long",
                "backing format",
                format,
                "at most 15 bytes",
            ));
        }
        let mut out = Vec::with_capacity(cluster_size);
        out.extend_from_slice(&MAGIC.to_be_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        // Patched below, when it is known.
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&self.cluster_bits.to_be_bytes());
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.crypt_method.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&self.l1_table_offset.0.to_be_bytes());
        out.extend_from_slice(&self.refcount_table_offset.0.to_be_bytes());
        out.extend_from_slice(&self.refcount_table_clusters.to_be_bytes());
        out.extend_from_slice(&self.nb_snapshots.to_be_bytes());
        out.extend_from_slice(&self.snapshots_offset.0.to_be_bytes());
        if self.version >= 3 {
            out.extend_from_slice(&self.incompatible.bits().to_be_bytes());
            out.extend_from_slice(&self.compatible.bits().to_be_bytes());
            out.extend_from_slice(&self.autoclear.bits().to_be_bytes());
            out.extend_from_slice(&self.refcount_order.to_be_bytes());
            out.extend_from_slice(&self.encoded_length().to_be_bytes());
            out.push(self.compression_type);
            out.extend_from_slice(&[0; 7]);
            out.extend_from_slice(&self.unknown_tail);
        }
        // Small clusters have no room for the names of the features.
        let room = if feature_names {
            cluster_size as u64
        } else {
            0
        };
        out.extend_from_slice(&self.extensions.encode(self.version, room));
        if let Some(name) = &self.backing_file {
            let at = name_at.unwrap_or(out.len());
            if at < out.len() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "The header's extensions leave no room for the backing file name",
                ));
            }
            out.resize(at, 0);
            let at = at as u64;
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend_from_slice(name);
        }
        if out.len() > cluster_size {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "The header with its extensions and the backing file name does not fit into one cluster",
            )
            .with_field("header", out.len(), format!("at most {cluster_size} bytes")));
        }
        Ok(out)
    }
}

fn check_compression(kind: u8, incompatible: Incompatible) -> Result<()> {
    let flagged = incompatible.contains(Incompatible::COMPRESSION);
    let (message, allowed) =
        match (kind, flagged) {
            (0, false) | (1, true) => return Ok(()),
            (0, true) => (
                "qcow2: Compression type incompatible feature bit must not be set",
                "1 while incompatible feature bit 3 is set",
            ),
            (2.., true) => {
                return Err(
                    Error::unsupported(format!("qcow2: unknown compression type: {kind}"))
                        .with_field("compression_type", kind, "0 (zlib) or 1 (zstd)"),
                );
            }
            (_, false) => (
                "qcow2: Compression type incompatible feature bit must be set",
                "0 while incompatible feature bit 3 is clear",
            ),
        };
    Err(invalid(message, "compression_type", kind, allowed))
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
