//! The text descriptor (digest of VMDK, section 2): reading it, writing a new one, and changing its CID. No I/O.
//!
//! A descriptor is kept as the bytes that were read; everything that isn't understood stays as it is.

use std::ops::Range;

use block_core::{Error, ErrorKind, Result};

use crate::layout::{SECTOR, unsupported_type};

/// `parentCID` of an image without a parent.
pub(crate) const NO_PARENT: u32 = 0xffff_ffff;
/// The longest name of a parent, in bytes.
const MAX_HINT: usize = 1022;
/// The longest name of an extent, in bytes.
const MAX_EXTENT_NAME: usize = 511;
/// The longest text that is read, in bytes.
pub(crate) const MAX_TEXT: usize = (1 << 20) - 1;

/// The kinds of image that this driver knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CreateType {
    /// One sparse extent with the descriptor inside.
    MonolithicSparse,
    /// A descriptor and one flat extent.
    MonolithicFlat,
}

impl CreateType {
    /// As it stands in a descriptor.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
        }
    }

    /// Reads a name; every other one is refused by that name.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        [Self::MonolithicSparse, Self::MonolithicFlat]
            .into_iter()
            .find(|known| known.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| unsupported_type(name))
    }
}

/// The flat extent of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FlatExtent {
    /// Length in bytes.
    pub length: u64,
    /// Name as it stands there.
    pub name: String,
    /// Where the data begins in that file, in bytes.
    pub offset: u64,
}

/// A descriptor that was read.
#[derive(Debug, Clone)]
pub(crate) struct Descriptor {
    /// The text, without the NULs behind it.
    text: Vec<u8>,
    /// Where the digits of the CID are in `text`.
    cid_at: Range<usize>,
    pub cid: u32,
    pub parent_cid: u32,
    /// As it stands there.
    pub create_type: String,
    /// The name of the parent.
    pub parent_hint: Option<String>,
}

/// Whether `head`, the beginning of a file, is the beginning of a descriptor: the first line that is neither a
/// comment nor empty is `version=1`, 2 or 3.
pub(crate) fn looks_like_descriptor(head: &[u8]) -> bool {
    for line in head.split_inclusive(|byte| *byte == b'\n') {
        let complete = line.ends_with(b"\n");
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        return complete && matches!(line, b"version=1" | b"version=2" | b"version=3");
    }
    false
}

fn malformed() -> Error {
    Error::new(ErrorKind::InvalidInput, "invalid VMDK image descriptor")
}

/// A line's key, and where its value (without blanks and quotes) is in the line.
fn key_value(line: &[u8]) -> Option<(&[u8], Range<usize>)> {
    let equals = line.iter().position(|byte| *byte == b'=')?;
    let key = line[..equals].trim_ascii();
    let mut start = equals + 1;
    let mut end = line.len();
    while start < end && line[start].is_ascii_whitespace() {
        start += 1;
    }
    while end > start && line[end - 1].is_ascii_whitespace() {
        end -= 1;
    }
    if end - start >= 2 && line[start] == b'"' && line[end - 1] == b'"' {
        (start, end) = (start + 1, end - 1);
    }
    Some((key, start..end))
}

impl Descriptor {
    /// Reads a descriptor; what follows the first NUL is not part of it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let end = bytes
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(bytes.len());
        let text = bytes[..end].to_vec();
        if !looks_like_descriptor(&text) {
            return Err(malformed());
        }
        let mut cid = None;
        let mut parent_cid = None;
        let mut create_type = None;
        let mut parent_hint = None;
        let mut at = 0;
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let start = at;
            at += line.len();
            if line.trim_ascii_start().starts_with(b"#") {
                continue;
            }
            let Some((key, value)) = key_value(line) else {
                continue;
            };
            let place = start + value.start..start + value.end;
            if key.eq_ignore_ascii_case(b"CID") && cid.is_none() {
                cid = Some((hex(&line[value])?, place));
            } else if key.eq_ignore_ascii_case(b"parentCID") && parent_cid.is_none() {
                parent_cid = Some(hex(&line[value])?);
            } else if key.eq_ignore_ascii_case(b"createType") && create_type.is_none() {
                create_type = Some(utf8("createType", &line[value])?);
            } else if key.eq_ignore_ascii_case(b"parentFileNameHint") && parent_hint.is_none() {
                parent_hint = Some(hint(line, value)?);
            }
        }
        let (Some((cid, cid_at)), Some(parent_cid)) = (cid, parent_cid) else {
            return Err(malformed().with_field("CID", "missing", "CID and parentCID"));
        };
        let create_type = create_type.ok_or_else(|| {
            malformed().with_field("createType", "missing", "monolithicSparse, monolithicFlat")
        })?;
        Ok(Self {
            text,
            cid_at,
            cid,
            parent_cid,
            create_type,
            parent_hint,
        })
    }

    /// The text with another CID, as long as the old one if that is possible.
    pub(crate) fn with_cid(&self, cid: u32) -> Self {
        let digits = format!("{cid:0width$x}", width = self.cid_at.len().min(8));
        let mut text = self.text[..self.cid_at.start].to_vec();
        text.extend_from_slice(digits.as_bytes());
        text.extend_from_slice(&self.text[self.cid_at.end..]);
        let cid_at = self.cid_at.start..self.cid_at.start + digits.len();
        Self {
            text,
            cid_at,
            cid,
            ..self.clone()
        }
    }

    /// The text, without NULs behind it.
    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    /// The one flat extent of a `monolithicFlat` image.
    ///
    /// # Errors
    /// EINVAL for a line that can't be understood, ENOTSUP for a kind of extent that isn't FLAT and for several.
    pub(crate) fn flat_extent(&self) -> Result<FlatExtent> {
        let mut found = None;
        for line in self.text.split(|byte| *byte == b'\n') {
            let line = line.trim_ascii();
            let first = line
                .split(u8::is_ascii_whitespace)
                .next()
                .unwrap_or_default();
            if !matches!(first, b"RW" | b"RDONLY" | b"NOACCESS") {
                continue;
            }
            let extent = parse_extent(&utf8("extent", line)?)?;
            if found.replace(extent).is_some() {
                return Err(Error::unsupported(
                    "monolithicFlat images with more than one extent are not supported",
                ));
            }
        }
        found.ok_or_else(|| malformed().with_field("extent", "missing", "RW n FLAT \"name\" n"))
    }
}

fn hex(digits: &[u8]) -> Result<u32> {
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or_else(|| {
            malformed().with_field(
                "CID",
                String::from_utf8_lossy(digits),
                "32 bits, hexadecimal",
            )
        })
}

fn utf8(field: &str, bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec())
        .map_err(|_| malformed().with_field(field, String::from_utf8_lossy(bytes), "text in UTF-8"))
}

fn hint(line: &[u8], value: Range<usize>) -> Result<String> {
    let quoted = value.start > 0
        && line[value.start - 1] == b'"'
        && line.get(value.end).is_some_and(|byte| *byte == b'"');
    let name = &line[value];
    if !quoted || name.is_empty() || name.len() > MAX_HINT {
        return Err(malformed().with_field(
            "parentFileNameHint",
            String::from_utf8_lossy(name),
            format!("a quoted name of at most {MAX_HINT} bytes"),
        ));
    }
    utf8("parentFileNameHint", name)
}

/// `RW 131072 FLAT "disk-flat.vmdk" 0`.
fn parse_extent(line: &str) -> Result<FlatExtent> {
    let bad = || Error::invalid(format!("Invalid extent line: {line}"));
    let (fields, rest) = match line.split_once('"') {
        Some((fields, rest)) => (fields, Some(rest)),
        None => (line, None),
    };
    let mut fields = fields.split_ascii_whitespace();
    let (access, sectors, kind) = (
        fields.next().unwrap_or_default(),
        fields.next(),
        fields.next().unwrap_or_default(),
    );
    if kind != "FLAT" {
        return Err(
            Error::unsupported(format!("Unsupported extent type '{kind}'")).with_field(
                "extent",
                line,
                "RW n FLAT \"name\" n",
            ),
        );
    }
    if access != "RW" {
        return Err(
            Error::unsupported(format!("Unsupported extent access '{access}'")).with_field(
                "extent",
                line,
                "RW n FLAT \"name\" n",
            ),
        );
    }
    let (name, offset) = rest.and_then(|rest| rest.split_once('"')).ok_or_else(bad)?;
    let mut offsets = offset.split_ascii_whitespace();
    let in_bytes = |sectors: Option<&str>| {
        sectors
            .and_then(|sectors| sectors.parse::<u64>().ok())
            .and_then(|sectors| sectors.checked_mul(SECTOR))
            .filter(|bytes| *bytes <= 1 << 62)
            .ok_or_else(bad)
    };
    let length = in_bytes(sectors)?;
    let offset = in_bytes(offsets.next())?;
    let surplus = fields.next().is_some() || offsets.next().is_some();
    if surplus || length == 0 || name.is_empty() || name.len() > MAX_EXTENT_NAME {
        return Err(bad());
    }
    Ok(FlatExtent {
        length,
        name: name.to_owned(),
        offset,
    })
}

/// What goes into a new descriptor.
#[derive(Debug, Clone)]
pub(crate) struct NewDescriptor<'a> {
    pub cid: u32,
    pub parent_cid: u32,
    pub create_type: CreateType,
    pub parent: Option<&'a str>,
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// The extent's file name.
    pub extent: &'a str,
    pub hardware_version: &'a str,
    pub adapter: &'a str,
    pub tools_version: &'a str,
}

impl NewDescriptor<'_> {
    /// The text, byte for byte as QEMU would write it.
    pub(crate) fn text(&self) -> String {
        let heads: u64 = if self.adapter == "ide" { 16 } else { 255 };
        let cylinders = self.size / (63 * heads * SECTOR);
        let parent = self.parent.map_or_else(String::new, |parent| {
            format!("parentFileNameHint=\"{parent}\"")
        });
        let sectors = self.size / SECTOR;
        let extent = match self.create_type {
            CreateType::MonolithicSparse => format!("RW {sectors} SPARSE \"{}\"", self.extent),
            CreateType::MonolithicFlat => format!("RW {sectors} FLAT \"{}\" 0", self.extent),
        };
        format!(
            "# Disk DescriptorFile\n\
             version=1\n\
             CID={:x}\n\
             parentCID={:x}\n\
             createType=\"{}\"\n\
             {parent}\n\
             # Extent description\n\
             {extent}\n\
             \n\
             # The Disk Data Base\n\
             #DDB\n\
             \n\
             ddb.virtualHWVersion = \"{}\"\n\
             ddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"{heads}\"\n\
             ddb.geometry.sectors = \"63\"\n\
             ddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.cid,
            self.parent_cid,
            self.create_type.name(),
            self.hardware_version,
            self.adapter,
            self.tools_version,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(parent: Option<&str>, create_type: CreateType) -> String {
        NewDescriptor {
            cid: 0x00a5_caf2,
            parent_cid: if parent.is_some() { 0x1234 } else { NO_PARENT },
            create_type,
            parent,
            size: 64 << 20,
            extent: "a b.vmdk",
            hardware_version: "4",
            adapter: "ide",
            tools_version: "2147483647",
        }
        .text()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let text = text(Some("../base.vmdk"), CreateType::MonolithicSparse);
        let mut bytes = text.clone().into_bytes();
        bytes.resize(10240, 0);
        let read = Descriptor::parse(&bytes).unwrap();
        assert_eq!((read.cid, read.parent_cid), (0x00a5_caf2, 0x1234));
        assert_eq!(read.parent_hint.as_deref(), Some("../base.vmdk"));
        assert_eq!(read.text(), text.as_bytes());
        assert!(looks_like_descriptor(text.as_bytes()));
    }

    #[test]
    fn another_cid_changes_nothing_else() {
        let old = text(None, CreateType::MonolithicSparse);
        let read = Descriptor::parse(old.as_bytes())
            .unwrap()
            .with_cid(0xffee_0011);
        let new = String::from_utf8(read.text().to_vec()).unwrap();
        assert_eq!(new, old.replace("CID=a5caf2\n", "CID=ffee0011\n"));
        let again = read.with_cid(7);
        assert_eq!(Descriptor::parse(again.text()).unwrap().cid, 7);
        assert_eq!(again.text().len(), new.len());
    }

    #[test]
    fn a_flat_extent_is_read_with_its_offset() {
        let text = text(None, CreateType::MonolithicFlat);
        let extent = Descriptor::parse(text.as_bytes())
            .unwrap()
            .flat_extent()
            .unwrap();
        let wanted = FlatExtent {
            length: 64 << 20,
            name: "a b.vmdk".into(),
            offset: 0,
        };
        assert_eq!(extent, wanted);
    }

    #[test]
    fn hostile_extent_lines_are_refused() {
        for (line, reason) in [
            ("RW 1 FLAT \"a\"", "Invalid extent line"),
            ("RW 1 FLAT \"a\" 0 0", "Invalid extent line"),
            ("RW 0 FLAT \"a\" 0", "Invalid extent line"),
            ("RW -1 FLAT \"a\" 0", "Invalid extent line"),
            (
                "RW 99999999999999999999 FLAT \"a\" 0",
                "Invalid extent line",
            ),
            ("RW 1 FLAT \"a 0", "Invalid extent line"),
            ("RW 1 FLAT \"\" 0", "Invalid extent line"),
            ("RW 1 FLAT \"a\" 36028797018963968", "Invalid extent line"),
            ("RW 1 ZERO", "Unsupported extent type 'ZERO'"),
            ("RW 1 VMFS \"a\"", "Unsupported extent type 'VMFS'"),
            (
                "RDONLY 1 FLAT \"a\" 0",
                "Unsupported extent access 'RDONLY'",
            ),
            (
                "RW 1 FLAT \"a\" 0\nRW 1 FLAT \"b\" 0",
                "monolithicFlat images with more than one",
            ),
            ("", "invalid VMDK image descriptor"),
        ] {
            let text = format!(
                "version=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n{line}\n"
            );
            let error = Descriptor::parse(text.as_bytes())
                .unwrap()
                .flat_extent()
                .unwrap_err();
            assert!(error.reason().starts_with(reason), "{line}: {error}");
        }
    }

    #[test]
    fn hostile_descriptors_are_refused() {
        let long = format!(
            "version=1\nCID=1\nparentCID=2\ncreateType=\"monolithicSparse\"\nparentFileNameHint=\"{}\"\n",
            "a".repeat(1023)
        );
        for text in [
            "",
            "version=4\nCID=1\nparentCID=2\ncreateType=\"x\"\n",
            "version=1\nCID=1\ncreateType=\"x\"\n",
            "version=1\nparentCID=1\ncreateType=\"x\"\n",
            "version=1\nCID=1\nparentCID=2\n",
            "version=1\nCID=123456789\nparentCID=2\ncreateType=\"x\"\n",
            "version=1\nCID=zz\nparentCID=2\ncreateType=\"x\"\n",
            "version=1\nCID=1\nparentCID=2\ncreateType=\"x\"\nparentFileNameHint=\"abc\n",
            "version=1\nCID=1\nparentCID=2\ncreateType=\"x\"\nparentFileNameHint=abc\n",
            &long,
        ] {
            assert!(Descriptor::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(
            Descriptor::parse(b"version=1\nCID=1\nparentCID=2\ncreateType=\"\xff\"\n").is_err()
        );
    }

    #[test]
    fn keys_have_any_case_and_lines_may_end_in_crlf() {
        let text = b"# c\r\n\r\nversion=3\r\ncid = 2A\r\nPARENTCID=ffffffff\r\ncreatetype=\"monolithicFlat\"\r\n";
        let read = Descriptor::parse(text).unwrap();
        assert_eq!((read.cid, read.parent_cid), (0x2a, NO_PARENT));
        assert_eq!(read.create_type, "monolithicFlat");
        assert_eq!(read.with_cid(3).text()[22..26], *b"= 03");
    }

    #[test]
    fn other_kinds_of_image_are_refused_by_name() {
        for name in [
            "streamOptimized",
            "twoGbMaxExtentSparse",
            "vmfs",
            "seSparse",
            "custom",
        ] {
            let reason = CreateType::parse(name).unwrap_err().reason();
            assert_eq!(reason, format!("Unsupported image type '{name}'"));
        }
    }
}
