//! Images that lie.

use block_core::{
    ErrorKind, RequestFlags,
    image::{CheckMode, Progress, Severity},
};
use futures::executor::block_on;

use super::{World, permit, read, write};

/// Where the primary grain tables of a small image are, in bytes (see `layout::tests`): one table.
const GD: usize = 26 * 512;
const GT: usize = 27 * 512;
const RGT: usize = 22 * 512;

fn image(change: impl FnOnce(&mut Vec<u8>)) -> World {
    let world = World::new();
    world.create("a.vmdk", "size=1M");
    let handle = world.open("a.vmdk");
    write(&handle, 0, vec![1; 65536]);
    write(&handle, 65536, vec![2; 65536]);
    block_on(handle.close()).unwrap();
    let mut bytes = world.bytes("a.vmdk");
    assert_eq!(bytes[GD..GD + 4], 27_u32.to_le_bytes());
    assert_eq!(bytes[GT..GT + 4], 128_u32.to_le_bytes());
    change(&mut bytes);
    world.put("a.vmdk", &bytes);
    world
}

fn set(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn a_grain_inside_of_the_tables_can_not_be_reached() {
    for place in [1, 20, 21, 22, 26, 27, 30] {
        let world = image(|bytes| set(bytes, GT, place));
        let before = world.bytes("a.vmdk");
        let handle = world.open("a.vmdk");
        assert_eq!(
            block_on(handle.read(0, 512)).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
        let written = block_on(handle.write(0, vec![0xee; 512], RequestFlags::empty()));
        assert_eq!(written.unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(block_on(handle.write_zeroes(0, 65536, RequestFlags::empty())).is_err());
        assert!(block_on(handle.discard(0, 65536)).is_err());
        // The neighbour is fine.
        assert_eq!(read(&handle, 65536, 4), [2; 4]);
        let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
        assert_eq!(report.corruptions, 1, "{:?}", report.findings);
        block_on(handle.close()).unwrap();
        // Nothing but the CID changed.
        let after = world.bytes("a.vmdk");
        assert!(before[..512] == after[..512] && before[21 * 512..] == after[21 * 512..]);
    }
}

#[test]
fn grains_and_tables_beyond_the_end_are_errors_and_found_by_check() {
    for (at, value) in [(GT, 0xffff_ff80), (GT, 1000), (GD, 0xffff_ff80), (GD, 5000)] {
        let world = image(|bytes| set(bytes, at, value));
        let handle = world.open("a.vmdk");
        assert_eq!(block_on(handle.read(0, 512)).unwrap_err().errno(), 5);
        let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
        assert_eq!(report.corruptions, 1, "{:?}", report.findings);
        assert!(report.findings[0].message.starts_with("ERROR: "));
    }
}

#[test]
fn a_grain_that_is_used_twice_is_found_by_check() {
    let world = image(|bytes| set(bytes, GT, 256));
    let handle = world.open("a.vmdk");
    let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
    assert_eq!(report.corruptions, 1);
    assert!(
        report.findings[0].message.contains("used twice"),
        "{:?}",
        report.findings
    );
}

#[test]
fn a_redundant_table_that_differs_is_noted() {
    let world = image(|bytes| set(bytes, RGT, 0));
    let handle = world.open("a.vmdk");
    let report = block_on(handle.check(CheckMode::ReadOnly, Progress::new())).unwrap();
    assert!(report.is_clean());
    assert_eq!(report.findings.len(), 1);
    assert_eq!(report.findings[0].severity, Severity::Note);
}

type Damage = fn(&mut Vec<u8>);

#[test]
fn damaged_headers_and_descriptors_are_refused_before_anything_is_written() {
    let cases: [(&str, Damage); 10] = [
        ("Unsupported VMDK version 9", |bytes| bytes[4] = 9),
        ("VMDK version 3 must be read only", |bytes| bytes[4] = 3),
        ("Invalid granularity, image may be corrupt", |bytes| {
            bytes[20] = 3;
        }),
        ("L2 table size too big", |bytes| bytes[45] = 4),
        ("Unsupported image type 'streamOptimized'", |bytes| {
            bytes[10] = 3;
        }),
        ("File truncated, expecting at least 65536 bytes", |bytes| {
            bytes.truncate(60000);
        }),
        ("Image not in VMDK format", |bytes| bytes.truncate(100)),
        ("Image not in VMDK format", |bytes| bytes.truncate(3)),
        ("invalid VMDK image descriptor", |bytes| {
            bytes[512..1024].fill(0);
        }),
        ("Unsupported image type 'vmfsSparse'", |bytes| {
            bytes[..4].copy_from_slice(b"COWD");
        }),
    ];
    for (reason, change) in cases {
        let world = image(change);
        let before = world.bytes("a.vmdk");
        let error = world.try_open("a.vmdk", "", permit()).unwrap_err();
        assert_eq!(error.reason(), reason);
        assert!(world.bytes("a.vmdk") == before, "{reason}");
    }
}

#[test]
fn version_3_can_be_read() {
    let world = image(|bytes| bytes[4] = 3);
    for options in ["read-only=on", "auto-read-only=on,read-only=on"] {
        let handle = world.try_open("a.vmdk", options, permit()).unwrap();
        assert_eq!(read(&handle, 0, 4), [1; 4]);
        block_on(handle.close()).unwrap();
    }
}

#[test]
fn a_parent_loop_ends() {
    let world = World::new();
    world.create("a.vmdk", "size=1M");
    world.create("b.vmdk", "size=1M,backing_file=a.vmdk");
    // a → b → a
    let mut bytes = world.bytes("a.vmdk");
    let text = String::from_utf8(bytes[512..512 + 10240].to_vec()).unwrap();
    let text = text.replace("Sparse\"\n", "Sparse\"\nparentFileNameHint=\"b.vmdk\"\n");
    bytes[512..512 + 10240].copy_from_slice(&text.as_bytes()[..10240]);
    world.put("a.vmdk", &bytes);
    let error = world.try_open("a.vmdk", "", permit()).unwrap_err();
    assert!(error.reason().contains("infinite loop"), "{error}");
}

#[test]
fn a_flat_extent_that_is_too_short_or_missing_is_refused() {
    let world = World::new();
    world.create("a.vmdk", "size=1M,subformat=monolithicFlat");
    world.put("a-flat.vmdk", &[0; 1000]);
    let error = world.try_open("a.vmdk", "", permit()).unwrap_err();
    assert_eq!(
        error.reason(),
        "File truncated, expecting at least 1048576 bytes"
    );
    std::fs::remove_file(world.path("a-flat.vmdk")).unwrap();
    let error = world.try_open("a.vmdk", "", permit()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn random_damage_never_panics() {
    let world = image(|_| {});
    let good = world.bytes("a.vmdk");
    let mut numbers = super::Numbers(99);
    for _ in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=numbers.below(3) {
            let at = match numbers.below(3) {
                0 => numbers.below(80),
                1 => 512 + numbers.below(400),
                _ => 21 * 512 + numbers.below(10 * 512),
            };
            bytes[at as usize] = numbers.next() as u8;
        }
        world.put("a.vmdk", &bytes);
        let Ok(handle) = world.try_open("a.vmdk", "", permit()) else {
            continue;
        };
        for offset in [0, 65536, 500_000] {
            let _ = block_on(handle.read(offset, 1000));
            let _ = block_on(handle.write(offset, vec![3; 1000], RequestFlags::empty()));
            let _ = block_on(handle.write_zeroes(offset, 70000, RequestFlags::empty()));
        }
        let _ = block_on(handle.check(CheckMode::ReadOnly, Progress::new()));
        let _ = block_on(handle.close());
    }
    assert_eq!(world.env.panics(), 0);
}
