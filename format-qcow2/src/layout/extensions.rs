//! The header extension area (digest, section 1.4): what stands between the header and the backing file's name.
//!
//! Extensions that this driver doesn't know are kept byte for byte and written back. Nothing here decides whether a
//! feature is supported; [`super::header`] does.

use block_core::error::{Error, ErrorKind, Result};

/// End of the area.
pub const END: u32 = 0;
/// Name of the backing file's format.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Pointer to the directory of persistent bitmaps.
pub const BITMAPS: u32 = 0x2385_2875;
/// Pointer to the LUKS header.
pub const LUKS: u32 = 0x0537_be77;
/// Name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Longest name of a backing format.
pub const MAX_BACKING_FORMAT: usize = 15;
/// Bytes of an entry of the feature name table.
const FEATURE_ENTRY: usize = 48;
/// Bytes of a name in it.
const FEATURE_NAME: usize = 46;
/// The most bitmaps that an image may have.
pub const MAX_BITMAPS: u32 = 65535;
/// The largest bitmap directory, in bytes.
pub const MAX_BITMAP_DIRECTORY: u64 = 65535 * 1024;

/// Which of the three feature fields a bit is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FeatureKind {
    /// `incompatible_features`.
    Incompatible = 0,
    /// `compatible_features`.
    Compatible = 1,
    /// `autoclear_features`.
    Autoclear = 2,
}

/// An entry of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// The number of the field; see [`FeatureKind`]. Numbers that mean nothing are kept.
    pub kind: u8,
    /// The bit.
    pub bit: u8,
    /// The name's bytes without padding, at most 46.
    pub name: Vec<u8>,
}

/// The names that are written into every image of version 3 with clusters larger than 4 KiB.
pub const KNOWN_FEATURES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// The bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsPointer {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Bytes in the directory.
    pub directory_size: u64,
    /// Where the directory is; cluster aligned.
    pub directory_offset: u64,
}

/// The full disk encryption header pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LuksPointer {
    /// Where the LUKS header is; cluster aligned.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// An extension that isn't known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownExtension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// All extensions of a header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extensions {
    /// Name of the backing file's format.
    pub backing_format: Option<String>,
    /// Name of the external data file, as its bytes are in the image.
    pub data_file: Option<Vec<u8>>,
    /// Where the LUKS header is.
    pub luks: Option<LuksPointer>,
    /// The feature names that the image brought along.
    pub feature_names: Vec<FeatureName>,
    /// Where the bitmap directory is.
    pub bitmaps: Option<BitmapsPointer>,
    /// Everything else, in the order of the image.
    pub unknown: Vec<UnknownExtension>,
}

/// What the area's content is checked against.
#[derive(Debug, Clone, Copy)]
pub struct ExtensionContext {
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// `crypt_method` of the header.
    pub crypt_method: u32,
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(
        bytes.get(at..at.checked_add(4)?)?.try_into().ok()?,
    ))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(
        bytes.get(at..at.checked_add(8)?)?.try_into().ok()?,
    ))
}

/// Walks the extensions of `area`: type and data of each, an error for one that is longer than the area.
fn walk(area: &[u8]) -> impl Iterator<Item = Result<(u32, &[u8])>> {
    let mut at = 0;
    let mut ended = false;
    std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let (kind, len) = (be32(area, at)?, be32(area, at + 4)? as usize);
        if kind == END {
            ended = true;
            return None;
        }
        let data = at + 8;
        if len > area.len() - data {
            ended = true;
            return Some(Err(Error::invalid("Header extension too large")
                .with_field(
                    format!("header extension {kind:#010x} length"),
                    len,
                    format!("at most {}", area.len() - data),
                )));
        }
        at = data + len.next_multiple_of(8);
        Some(Ok((kind, &area[data..data + len])))
    })
}

fn decode_feature_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks_exact(FEATURE_ENTRY)
        .map(|entry| {
            let name = &entry[2..];
            let end = name
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(FEATURE_NAME);
            FeatureName {
                kind: entry[0],
                bit: entry[1],
                name: name[..end].to_vec(),
            }
        })
        .collect()
}

/// The feature name table alone, from an area that may otherwise be damaged: for the error message about features
/// that aren't known.
pub fn find_feature_names(area: &[u8]) -> Vec<FeatureName> {
    walk(area)
        .map_while(Result::ok)
        .filter(|(kind, _)| *kind == FEATURE_NAMES)
        .flat_map(|(_, data)| decode_feature_names(data))
        .collect()
}

impl Extensions {
    /// Reads the area: the bytes of the first cluster from the end of the header to the backing file's name.
    pub fn decode(area: &[u8], context: ExtensionContext) -> Result<Self> {
        let mut all = Self::default();
        for extension in walk(area) {
            let (kind, data) = extension?;
            match kind {
                BACKING_FORMAT => {
                    if data.len() > MAX_BACKING_FORMAT {
                        return Err(Error::invalid(format!(
                            "ERROR: ext_backing_format: len={} too large (>={})",
                            data.len(),
                            MAX_BACKING_FORMAT + 1
                        ))
                        .with_field(
                            "backing format length",
                            data.len(),
                            format!("0..={MAX_BACKING_FORMAT}"),
                        ));
                    }
                    let end = data
                        .iter()
                        .position(|byte| *byte == 0)
                        .unwrap_or(data.len());
                    let name = std::str::from_utf8(&data[..end]).map_err(|error| {
                        Error::invalid("Backing format name is not valid UTF-8")
                            .with_field(
                                "backing format",
                                String::from_utf8_lossy(data),
                                "the name of a format",
                            )
                            .with_source(error)
                    })?;
                    all.backing_format = Some(name.to_owned());
                }
                FEATURE_NAMES => all.feature_names = decode_feature_names(data),
                BITMAPS => all.bitmaps = Some(decode_bitmaps(data, context)?),
                LUKS => all.luks = Some(decode_luks(data, context)?),
                DATA_FILE => all.data_file = Some(data.to_vec()),
                kind => all.unknown.push(UnknownExtension {
                    kind,
                    data: data.to_vec(),
                }),
            }
        }
        Ok(all)
    }

    /// The bytes of the area with its end marker, in QEMU's order. The feature name table is the one of
    /// [`KNOWN_FEATURES`] plus what the image knew of other bits; there is one only in version 3 with clusters larger
    /// than 4 KiB.
    pub fn encode(&self, version: u32, cluster_size: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |kind: u32, data: &[u8]| {
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&(data.len() as u32).to_be_bytes());
            out.extend_from_slice(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        // The area begins wherever the header ends, so padding counts from the extension's own start; each extension
        // has a length that is a multiple of 8, which makes the two the same.
        if let Some(format) = &self.backing_format {
            put(BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            put(DATA_FILE, name);
        }
        if let Some(luks) = &self.luks {
            let mut data = luks.offset.to_be_bytes().to_vec();
            data.extend_from_slice(&luks.len.to_be_bytes());
            put(LUKS, &data);
        }
        if version >= 3 && cluster_size > 4096 {
            put(FEATURE_NAMES, &self.encode_feature_names());
        }
        if let Some(bitmaps) = &self.bitmaps {
            let mut data = bitmaps.count.to_be_bytes().to_vec();
            data.extend_from_slice(&[0; 4]);
            data.extend_from_slice(&bitmaps.directory_size.to_be_bytes());
            data.extend_from_slice(&bitmaps.directory_offset.to_be_bytes());
            put(BITMAPS, &data);
        }
        for unknown in &self.unknown {
            put(unknown.kind, &unknown.data);
        }
        put(END, &[]);
        out
    }

    fn encode_feature_names(&self) -> Vec<u8> {
        let mut table = Vec::with_capacity(KNOWN_FEATURES.len() * FEATURE_ENTRY);
        let mut put = |kind: u8, bit: u8, name: &[u8]| {
            let name = &name[..name.len().min(FEATURE_NAME)];
            table.extend_from_slice(&[kind, bit]);
            table.extend_from_slice(name);
            table.resize(table.len() + FEATURE_NAME - name.len(), 0);
        };
        for (kind, bit, name) in KNOWN_FEATURES {
            put(kind as u8, bit, name.as_bytes());
        }
        for feature in &self.feature_names {
            let known = KNOWN_FEATURES
                .iter()
                .any(|(kind, bit, _)| *kind as u8 == feature.kind && *bit == feature.bit);
            if !known && !feature.name.is_empty() {
                put(feature.kind, feature.bit, &feature.name);
            }
        }
        table
    }
}

/// The names of the bits set in `bits` of one feature field: from the image's own table, else what is known here,
/// else the remaining bits as a hexadecimal mask.
pub fn describe_features(kind: FeatureKind, bits: u64, table: &[FeatureName]) -> String {
    let mut names = Vec::new();
    let mut nameless = 0u64;
    for bit in (0..64u8).filter(|bit| bits >> bit & 1 != 0) {
        let own = table
            .iter()
            .find(|feature| feature.kind == kind as u8 && feature.bit == bit)
            .filter(|feature| !feature.name.is_empty())
            .map(|feature| String::from_utf8_lossy(&feature.name).into_owned());
        let known = || {
            KNOWN_FEATURES
                .iter()
                .find(|(known, at, _)| *known == kind && *at == bit)
                .map(|(_, _, name)| (*name).to_owned())
        };
        match own.or_else(known) {
            Some(name) => names.push(name),
            None => nameless |= 1 << bit,
        }
    }
    if nameless != 0 {
        names.push(format!("Unknown incompatible feature: {nameless:x}"));
    }
    names.join(", ")
}

fn decode_bitmaps(data: &[u8], context: ExtensionContext) -> Result<BitmapsPointer> {
    let fields = (data.len() == 24)
        .then(|| {
            Some((
                be32(data, 0)?,
                be32(data, 4)?,
                be64(data, 8)?,
                be64(data, 16)?,
            ))
        })
        .flatten();
    let Some((count, reserved, directory_size, directory_offset)) = fields else {
        return Err(
            Error::invalid("bitmaps_ext: Invalid extension length").with_field(
                "bitmaps extension length",
                data.len(),
                "24",
            ),
        );
    };
    if reserved != 0 {
        return Err(
            Error::invalid("bitmaps_ext: Reserved field is not zero").with_field(
                "bitmaps extension reserved field",
                reserved,
                "0",
            ),
        );
    }
    if count > MAX_BITMAPS {
        return Err(Error::invalid(format!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        ))
        .with_field("nb_bitmaps", count, format!("1..={MAX_BITMAPS}")));
    }
    if count == 0 {
        return Err(
            Error::invalid("found bitmaps extension with zero bitmaps").with_field(
                "nb_bitmaps",
                count,
                format!("1..={MAX_BITMAPS}"),
            ),
        );
    }
    if directory_offset == 0 || directory_offset & (context.cluster_size - 1) != 0 {
        return Err(
            Error::invalid("bitmaps_ext: invalid bitmap directory offset").with_field(
                "bitmap_directory_offset",
                directory_offset,
                format!("a non-zero multiple of {}", context.cluster_size),
            ),
        );
    }
    if directory_size > MAX_BITMAP_DIRECTORY {
        return Err(Error::invalid(format!(
            "bitmaps_ext: bitmap directory size ({directory_size}) exceeds the maximum supported size \
             ({MAX_BITMAP_DIRECTORY})"
        ))
        .with_field(
            "bitmap_directory_size",
            directory_size,
            format!("at most {MAX_BITMAP_DIRECTORY}"),
        ));
    }
    Ok(BitmapsPointer {
        count,
        directory_size,
        directory_offset,
    })
}

fn decode_luks(data: &[u8], context: ExtensionContext) -> Result<LuksPointer> {
    if context.crypt_method != 2 {
        return Err(Error::invalid(
            "CRYPTO header extension only expected with LUKS encryption method",
        )
        .with_field("crypt_method", context.crypt_method, "2"));
    }
    let fields = (data.len() == 16)
        .then(|| Some((be64(data, 0)?, be64(data, 8)?)))
        .flatten();
    let Some((offset, len)) = fields else {
        return Err(Error::invalid(format!(
            "CRYPTO header extension size {}, but expected size 16",
            data.len()
        ))
        .with_field("LUKS extension length", data.len(), "16"));
    };
    if offset & (context.cluster_size - 1) != 0 {
        return Err(Error::invalid(format!(
            "Encryption header offset '{offset}' is not a multiple of cluster size '{}'",
            context.cluster_size
        ))
        .with_field(
            "LUKS header offset",
            offset,
            format!("a multiple of {}", context.cluster_size),
        ));
    }
    if offset
        .checked_add(len)
        .is_none_or(|end| end > i64::MAX as u64)
    {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Encryption header does not fit the file",
        )
        .with_field("LUKS header length", len, "offset + length below 2^63"));
    }
    Ok(LuksPointer { offset, len })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: ExtensionContext = ExtensionContext {
        cluster_size: 65536,
        crypt_method: 0,
    };

    fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_be_bytes().to_vec();
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn unknown_extensions_and_feature_names_survive_a_rewrite() {
        let mut area = extension(BACKING_FORMAT, b"raw");
        area.extend(extension(0x1234_5678, b"kept as it is"));
        let mut names = vec![0, 40];
        names.extend_from_slice(b"time travel");
        names.resize(48, 0);
        area.extend(extension(FEATURE_NAMES, &names));
        area.extend([0; 64]);
        let read = Extensions::decode(&area, CONTEXT).unwrap();
        assert_eq!(read.backing_format.as_deref(), Some("raw"));
        assert_eq!(read.unknown[0].data, b"kept as it is");
        let again = Extensions::decode(&read.encode(3, 65536), CONTEXT).unwrap();
        assert_eq!(again.unknown, read.unknown);
        assert_eq!(again.backing_format, read.backing_format);
        assert_eq!(again.feature_names.len(), 9);
        assert_eq!(again.feature_names[8], read.feature_names[0]);
        // A second rewrite changes nothing.
        assert_eq!(again.encode(3, 65536), read.encode(3, 65536));
    }

    #[test]
    fn there_is_no_feature_table_in_version_2_or_small_clusters() {
        let all = Extensions::default();
        assert_eq!(all.encode(2, 65536), [0; 8]);
        assert_eq!(all.encode(3, 4096), [0; 8]);
        assert_eq!(all.encode(3, 8192).len(), 8 + 384 + 8);
    }

    #[test]
    fn an_extension_longer_than_the_area_is_refused() {
        let mut area = extension(0x1234_5678, b"");
        area[7] = 1;
        let error = Extensions::decode(&area, CONTEXT).unwrap_err();
        assert_eq!(error.reason(), "Header extension too large");
        area[4] = 0xff;
        assert!(Extensions::decode(&area, CONTEXT).is_err());
    }

    #[test]
    fn a_long_backing_format_is_refused() {
        assert!(Extensions::decode(&extension(BACKING_FORMAT, &[b'a'; 15]), CONTEXT).is_ok());
        let error =
            Extensions::decode(&extension(BACKING_FORMAT, &[b'a'; 16]), CONTEXT).unwrap_err();
        assert_eq!(
            error.reason(),
            "ERROR: ext_backing_format: len=16 too large (>=16)"
        );
    }

    #[test]
    fn every_field_of_the_bitmaps_extension_is_checked() {
        let make = |count: u32, reserved: u32, size: u64, offset: u64| {
            let mut data = count.to_be_bytes().to_vec();
            data.extend(reserved.to_be_bytes());
            data.extend(size.to_be_bytes());
            data.extend(offset.to_be_bytes());
            Extensions::decode(&extension(BITMAPS, &data), CONTEXT)
        };
        assert_eq!(make(1, 0, 32, 65536).unwrap().bitmaps.unwrap().count, 1);
        for (bad, text) in [
            (make(0, 0, 32, 65536), "zero bitmaps"),
            (
                make(65536, 0, 32, 65536),
                "exceeding the QEMU supported maximum",
            ),
            (make(1, 1, 32, 65536), "Reserved field is not zero"),
            (make(1, 0, 67_107_841, 65536), "exceeds the maximum"),
            (make(1, 0, 32, 512), "invalid bitmap directory offset"),
            (make(1, 0, 32, 0), "invalid bitmap directory offset"),
        ] {
            let error = bad.unwrap_err();
            assert!(error.reason().contains(text), "{error}");
            assert!(error.field().is_some());
        }
        let short = Extensions::decode(&extension(BITMAPS, &[0; 23]), CONTEXT).unwrap_err();
        assert_eq!(short.reason(), "bitmaps_ext: Invalid extension length");
    }

    #[test]
    fn a_luks_pointer_without_luks_is_refused() {
        let area = extension(LUKS, &[0; 16]);
        let error = Extensions::decode(&area, CONTEXT).unwrap_err();
        assert!(
            error
                .reason()
                .starts_with("CRYPTO header extension only expected")
        );
        let luks = ExtensionContext {
            crypt_method: 2,
            ..CONTEXT
        };
        assert!(Extensions::decode(&area, luks).is_ok());
        let error = Extensions::decode(&extension(LUKS, &[0; 8]), luks).unwrap_err();
        assert_eq!(
            error.reason(),
            "CRYPTO header extension size 8, but expected size 16"
        );
    }

    #[test]
    fn features_are_named_by_the_image_first() {
        let table = [FeatureName {
            kind: 0,
            bit: 40,
            name: b"time travel".to_vec(),
        }];
        assert_eq!(
            describe_features(FeatureKind::Incompatible, 1 << 40 | 1 << 41 | 4, &table),
            "external data file, time travel, Unknown incompatible feature: 20000000000"
        );
    }

    #[test]
    fn garbage_never_panics() {
        for len in 0..200usize {
            let area: Vec<u8> = (0..len).map(|i| (i * 7 % 11) as u8).collect();
            let _ = Extensions::decode(&area, CONTEXT);
            let _ = find_feature_names(&area);
        }
    }
}
