//! Tests of the header codec.

use super::*;

/// A valid header of version 3 for a 64 MiB disk.
fn header() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 64 << 20,
        crypt_method: 0,
        l1_size: 1,
        l1_table_offset: HostOffset(3 << 16),
        refcount_table_offset: HostOffset(1 << 16),
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: Incompatible::empty(),
        compatible: Compatible::empty(),
        autoclear: Autoclear::empty(),
        refcount_order: 4,
        compression_type: 0,
        unknown_tail: Vec::new(),
        backing_file: None,
        extensions: Extensions::default(),
    }
}

fn decode_with(change: impl FnOnce(&mut [u8])) -> Result<Header> {
    let mut bytes = header().encode().unwrap();
    change(&mut bytes);
    Header::decode(&bytes)
}

fn put32(at: usize, value: u32) -> impl FnOnce(&mut [u8]) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes())
}

fn put64(at: usize, value: u64) -> impl FnOnce(&mut [u8]) {
    move |bytes| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes())
}

#[test]
fn a_header_survives_encoding() {
    let mut full = header();
    full.backing_file = Some(b"base.raw".to_vec());
    full.extensions.backing_format = Some("raw".into());
    full.unknown_tail = b"a tail of 24 more bytes.".to_vec();
    full.compatible = Compatible::from_bits_retain(1 | 1 << 30);
    full.autoclear = Autoclear::from_bits_retain(1 << 40);
    full.incompatible = Incompatible::DIRTY;
    let read = Header::decode(&full.encode().unwrap()).unwrap();
    assert_eq!(read.extensions.feature_names.len(), 8);
    let mut without_names = read.clone();
    without_names.extensions.feature_names.clear();
    assert_eq!(without_names, full);
    assert_eq!(read.encode().unwrap(), full.encode().unwrap());
}

#[test]
fn version_2_has_no_features_and_refcounts_of_16_bits() {
    let mut old = header();
    old.version = 2;
    old.backing_file = Some(b"x".to_vec());
    let bytes = old.encode().unwrap();
    assert_eq!(u64::from_be_bytes(bytes[8..16].try_into().unwrap()), 80);
    assert_eq!(Header::decode(&bytes).unwrap(), old);
}

#[test]
fn every_limit_has_its_error_and_names_its_field() {
    type Change = Box<dyn FnOnce(&mut [u8])>;
    let cases: Vec<(Change, i32, &str, &str)> = vec![
        (
            Box::new(put32(0, 0x5146_49fc)),
            22,
            "Image is not in qcow2 format",
            "magic",
        ),
        (
            Box::new(put32(4, 4)),
            95,
            "Unsupported qcow2 version 4",
            "version",
        ),
        (
            Box::new(put32(4, 1)),
            95,
            "Unsupported qcow2 version 1",
            "version",
        ),
        (
            Box::new(put32(20, 8)),
            22,
            "Unsupported cluster size: 2^8",
            "cluster_bits",
        ),
        (
            Box::new(put32(20, 22)),
            22,
            "Unsupported cluster size: 2^22",
            "cluster_bits",
        ),
        (
            Box::new(put32(20, 63)),
            22,
            "Unsupported cluster size: 2^63",
            "cluster_bits",
        ),
        (
            Box::new(put32(100, 103)),
            22,
            "qcow2 header too short",
            "header_length",
        ),
        (
            Box::new(put32(100, 65537)),
            22,
            "qcow2 header exceeds cluster size",
            "header_length",
        ),
        (
            Box::new(put64(8, 65537)),
            22,
            "Invalid backing file offset",
            "backing_file_offset",
        ),
        (
            Box::new(|bytes: &mut [u8]| {
                put64(8, 1024)(bytes);
                put32(16, 1024)(bytes);
            }),
            22,
            "Backing file name too long",
            "backing_file_size",
        ),
        (
            Box::new(|bytes: &mut [u8]| {
                put64(8, 65535)(bytes);
                put32(16, 2)(bytes);
            }),
            22,
            "Backing file name too long",
            "backing_file_size",
        ),
        (
            Box::new(put64(72, 1 << 63)),
            95,
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000",
            "incompatible_features",
        ),
        (
            Box::new(|bytes: &mut [u8]| bytes[104] = 1),
            22,
            "qcow2: Compression type incompatible feature bit must be set",
            "compression_type",
        ),
        (
            Box::new(put64(72, 8)),
            22,
            "qcow2: Compression type incompatible feature bit must not be set",
            "compression_type",
        ),
        (
            Box::new(|bytes: &mut [u8]| {
                put64(72, 8)(bytes);
                bytes[104] = 2;
            }),
            95,
            "qcow2: unknown compression type: 2",
            "compression_type",
        ),
        (
            Box::new(put32(96, 7)),
            22,
            "Reference count entry width too large; may not exceed 64 bits",
            "refcount_order",
        ),
        (
            Box::new(put32(32, 3)),
            22,
            "Unsupported encryption method 3",
            "crypt_method",
        ),
        (
            Box::new(put32(32, 2)),
            22,
            "Missing CRYPTO header for crypt method 2",
            "crypt_method",
        ),
        (
            Box::new(put32(56, 129)),
            27,
            "Reference count table too large",
            "refcount_table_clusters",
        ),
        (
            Box::new(put32(56, u32::MAX)),
            27,
            "Reference count table too large",
            "refcount_table_clusters",
        ),
        (
            Box::new(put64(48, 65537)),
            22,
            "Reference count table offset invalid",
            "refcount_table_offset",
        ),
        (
            Box::new(put64(48, 0x7fff_ffff_ffff_0000)),
            22,
            "Reference count table offset invalid",
            "refcount_table_offset",
        ),
        (
            Box::new(put32(60, 65537)),
            27,
            "Snapshot table too large",
            "nb_snapshots",
        ),
        (
            Box::new(put64(64, 512)),
            22,
            "Snapshot table offset invalid",
            "snapshots_offset",
        ),
        (
            Box::new(put32(36, 4_194_305)),
            27,
            "Active L1 table too large",
            "l1_size",
        ),
        (
            Box::new(put32(36, u32::MAX)),
            27,
            "Active L1 table too large",
            "l1_size",
        ),
        (
            Box::new(put64(40, 512)),
            22,
            "Active L1 table offset invalid",
            "l1_table_offset",
        ),
        (
            Box::new(put64(40, !0xffff)),
            22,
            "Active L1 table offset invalid",
            "l1_table_offset",
        ),
        (
            Box::new(put64(24, u64::MAX)),
            27,
            "Image is too big",
            "size",
        ),
        (
            Box::new(put64(24, (512 << 20) + 1)),
            22,
            "L1 table is too small",
            "l1_size",
        ),
    ];
    for (change, errno, message, field) in cases {
        let error = decode_with(change).expect_err(message);
        assert_eq!(error.reason(), message);
        assert_eq!(error.errno(), errno, "{message}");
        assert_eq!(error.field().expect(message).name, field, "{message}");
    }
}

#[test]
fn unknown_features_are_named_from_the_images_own_table() {
    let mut named = header();
    named
        .extensions
        .feature_names
        .push(extensions::FeatureName {
            kind: 0,
            bit: 9,
            name: b"time travel".to_vec(),
        });
    let mut bytes = named.encode().unwrap();
    put64(72, 1 << 9)(&mut bytes);
    let error = Header::decode(&bytes).unwrap_err();
    assert_eq!(error.reason(), "Unsupported qcow2 feature(s): time travel");
}

#[test]
fn subclusters_need_large_clusters() {
    let mut small = header();
    small.cluster_bits = 12;
    small.l1_size = 64;
    let mut bytes = small.encode().unwrap();
    put64(72, 16)(&mut bytes);
    let error = Header::decode(&bytes).unwrap_err();
    assert_eq!(error.reason(), "Unsupported subcluster size: 128");
}

#[test]
fn a_corrupt_image_opens_for_reading_and_for_checks_only() {
    let mut corrupt = header();
    corrupt.incompatible = Incompatible::CORRUPT;
    let error = corrupt.check_open(false, false).unwrap_err();
    assert_eq!(error.errno(), 13);
    assert_eq!(
        error.reason(),
        "qcow2: Image is corrupt; cannot be opened read/write"
    );
    corrupt.check_open(true, false).unwrap();
    corrupt.check_open(false, true).unwrap();
    let mut bare = header();
    bare.refcount_table_clusters = 0;
    assert_eq!(
        bare.check_open(true, false).unwrap_err().reason(),
        "Image does not contain a reference count table"
    );
    bare.check_open(false, true).unwrap();
}

#[test]
fn a_raw_data_file_without_a_data_file_is_refused() {
    let mut raw = header();
    raw.autoclear = Autoclear::RAW_DATA_FILE;
    let error = raw.check_open(true, false).unwrap_err();
    assert_eq!(error.reason(), "data-file-raw requires a data file");
    assert_eq!(error.field().unwrap().name, "autoclear_features");
}

#[test]
fn tables_beyond_the_file_are_named() {
    let fine = header();
    fine.check_inside(196_616, false).unwrap();
    let mut beyond = header();
    beyond.refcount_table_offset = HostOffset(1 << 30);
    let error = beyond.check_inside(196_616, false).unwrap_err();
    assert_eq!(error.field().unwrap().name, "refcount_table_offset");
    beyond.check_inside(196_616, true).unwrap();
    fine.check_inside(65536 * 3, false).unwrap();
    let error = fine.check_inside(65536 * 3 - 512, true).unwrap_err();
    assert_eq!(error.field().unwrap().name, "l1_table_offset");
}

#[test]
fn a_truncated_header_is_too_short() {
    let bytes = header().encode().unwrap();
    for len in 24..104 {
        let error = Header::decode(&bytes[..len]).expect_err("too short");
        assert_eq!(error.reason(), "qcow2 header too short", "{len}");
    }
    for len in 0..24 {
        assert!(Header::decode(&bytes[..len]).is_err());
    }
}

#[test]
fn there_is_no_room_for_everything_in_a_small_cluster() {
    let mut small = header();
    small.cluster_bits = 9;
    small.l1_size = 2048;
    small.backing_file = Some(vec![b'x'; 392]);
    assert!(small.encode().is_ok());
    small.backing_file = Some(vec![b'x'; 393]);
    assert_eq!(small.encode().unwrap_err().errno(), 28);
    small.backing_file = Some(vec![b'x'; 1024]);
    assert_eq!(small.encode().unwrap_err().errno(), 22);
}

#[test]
fn probing_wants_the_magic_and_a_version() {
    assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), 100);
    assert_eq!(probe(b"QFI\xfb\0\0\0\x01"), 0);
    assert_eq!(probe(b"QFI\xfb\0\0\0"), 0);
    assert_eq!(probe(b""), 0);
}
