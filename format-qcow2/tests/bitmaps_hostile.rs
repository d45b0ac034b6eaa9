//! Damaged bitmap directories, tables and extensions are refused with the words of the installed qemu-img, and nothing is
//! written to such an image. What a full or failing storage leaves behind is not to be trusted, but whole.

mod bitmap_files;
mod common;

use bitmap_files::{AUTO, IN_USE, extension, stored};
use block_core::{ErrorKind, bitmap::NewBitmap};
use common::{
    storage::{Event, Fault, Storage},
    *,
};

const MIB: u64 = 1 << 20;

fn image(size: u64) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, &size.to_string()]);
    qemu_img(&["bitmap", "--add", name, "b0"]);
    qemu_img(&["bitmap", "--add", "-g", "512", name, "b1"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 64k", name]);
    std::fs::read(path).unwrap()
}

/// Where things are in an image.
#[derive(Clone, Copy)]
struct Places {
    extension: usize,
    entry: usize,
    table: usize,
}

struct Damage {
    what: &'static str,
    at: fn(Places) -> usize,
    bytes: Vec<u8>,
    reason: &'static str,
    /// qemu-img doesn't notice, or says it otherwise.
    ours_alone: bool,
}

fn damage(
    what: &'static str,
    at: fn(Places) -> usize,
    bytes: impl Into<Vec<u8>>,
    reason: &'static str,
) -> Damage {
    Damage {
        what,
        at,
        bytes: bytes.into(),
        reason,
        ours_alone: false,
    }
}

fn alone(mut damage: Damage) -> Damage {
    damage.ours_alone = true;
    damage
}

fn damages() -> Vec<Damage> {
    let unfit = "Bitmap 'b0' doesn't satisfy the constraints";
    let table = "Could not read bitmap_table table from image for bitmap 'b0': Invalid argument";
    let entry = |n: u64| n.to_be_bytes();
    vec![
        damage("no table", |p| p.entry, entry(0), unfit),
        damage("table unaligned", |p| p.entry, entry(512), unfit),
        alone(damage(
            "table beyond the file",
            |p| p.entry,
            entry(1 << 40),
            table,
        )),
        alone(damage(
            "table beyond 2^56",
            |p| p.entry,
            entry(1 << 56),
            unfit,
        )),
        damage("no table entries", |p| p.entry + 8, [0, 0, 0, 0], unfit),
        damage(
            "too many table entries for the disk",
            |p| p.entry + 8,
            [0, 0, 0, 2],
            "Could not read bitmap 'b0' from image: Invalid argument",
        ),
        damage(
            "too many table entries",
            |p| p.entry + 8,
            [8, 0, 0, 1],
            unfit,
        ),
        damage("too much data", |p| p.entry + 8, [0, 0, 0x20, 1], unfit),
        damage("unknown flag", |p| p.entry + 15, [8 | 2], unfit),
        damage("unknown type", |p| p.entry + 16, [2], unfit),
        damage("granularity too large", |p| p.entry + 17, [64], unfit),
        damage(
            "name too long",
            |p| p.entry + 18,
            [4, 0],
            "Broken bitmap directory",
        ),
        damage(
            "name taken",
            |p| p.entry + 24,
            *b"b1",
            "Bitmap already exists: b1",
        ),
        damage(
            "too few bitmaps announced",
            |p| p.extension,
            [0, 0, 0, 1],
            "More bitmaps found than specified in header extension",
        ),
        damage(
            "too many bitmaps announced",
            |p| p.extension,
            [0, 0, 0, 3],
            "Less bitmaps found than specified in header extension",
        ),
        damage(
            "no bitmaps announced",
            |p| p.extension,
            [0, 0, 0, 0],
            "found bitmaps extension with zero bitmaps",
        ),
        damage(
            "more bitmaps than there can be",
            |p| p.extension,
            [0, 1, 0, 0],
            "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
        ),
        damage(
            "reserved",
            |p| p.extension + 4,
            [1],
            "bitmaps_ext: Reserved field is not zero",
        ),
        damage(
            "empty directory",
            |p| p.extension + 8,
            entry(0),
            "Requested bitmap directory size is zero",
        ),
        damage(
            "directory cut",
            |p| p.extension + 8,
            entry(63),
            "Broken bitmap directory",
        ),
        alone(damage(
            "directory beyond the file",
            |p| p.extension + 16,
            entry(1 << 40),
            "The bitmap directory is beyond the end of the file",
        )),
        damage(
            "directory unaligned",
            |p| p.extension + 16,
            entry(512),
            "bitmaps_ext: invalid bitmap directory offset",
        ),
        damage(
            "directory too large",
            |p| p.extension + 8,
            entry(67_107_841),
            "bitmaps_ext: bitmap directory size (67107841) exceeds the maximum supported size (67107840)",
        ),
        damage(
            "extension of a wrong length",
            |p| p.extension - 4,
            [0, 0, 0, 23],
            "bitmaps_ext: Invalid extension length",
        ),
        damage(
            "reserved bits of a table entry",
            |p| p.table,
            entry(2),
            table,
        ),
        damage(
            "high bits of a table entry",
            |p| p.table,
            entry(1 << 56),
            table,
        ),
        damage("data unaligned", |p| p.table, entry(512), table),
        damage("data and all ones", |p| p.table, entry(0x30001), table),
        alone(damage(
            "data beyond the file",
            |p| p.table,
            entry(1 << 40),
            table,
        )),
    ]
}

fn places(data: &[u8]) -> Places {
    let bitmaps = stored(data);
    let first = bitmaps.iter().find(|bitmap| bitmap.name == "b0").unwrap();
    Places {
        extension: extension(data).unwrap(),
        entry: first.entry,
        table: first.table,
    }
}

#[test]
fn every_damage_is_refused_with_qemus_words_and_nothing_is_written() {
    let good = image(10 * MIB);
    let places = places(&good);
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    for damage in damages() {
        let mut data = good.clone();
        let at = (damage.at)(places);
        data[at..at + damage.bytes.len()].copy_from_slice(&damage.bytes);
        if !damage.ours_alone {
            std::fs::write(&path, &data).unwrap();
            let theirs = run("qemu-img", &["info", path.to_str().unwrap()]);
            let said = String::from_utf8_lossy(&theirs.stderr);
            assert!(said.contains(damage.reason), "{}: {said}", damage.what);
        }
        for options in ["", "read-only=on"] {
            let storage = Storage::new(data.clone());
            storage.state.lock().keep_log = true;
            let rig = Rig::new();
            let error = rig
                .block_on(rig.open_storage(&storage, options))
                .expect_err(damage.what);
            assert!(
                error.reason().contains(damage.reason),
                "{}: {error}",
                damage.what
            );
            assert!(error.field().is_some(), "{}: {error}", damage.what);
            assert!(
                rig.graph.nodes().is_empty(),
                "{}: nothing is left open",
                damage.what
            );
            let state = storage.state.lock();
            let wrote = state
                .log
                .iter()
                .any(|event| matches!(event, Event::Write(..)));
            assert!(!wrote && state.data == data, "{}", damage.what);
        }
    }
}

#[test]
fn a_directory_that_lies_in_other_metadata_is_never_written_to() {
    let mut data = image(10 * MIB);
    let at = extension(&data).unwrap();
    let (len, directory) = (be64(&data, at + 8) as usize, be64(&data, at + 16) as usize);
    // The end of the refcount table's cluster would do for a directory, were it not for the table.
    let table = be64(&data, 48) as usize;
    data.copy_within(directory..directory + len, table);
    data[at + 16..at + 24].copy_from_slice(&(table as u64).to_be_bytes());
    let storage = Storage::new(data.clone());
    let rig = Rig::new();
    let error = rig.block_on(rig.open_storage(&storage, "")).unwrap_err();
    assert!(
        error
            .reason()
            .contains("Preventing invalid write on metadata"),
        "{error}"
    );
    assert!(storage.state.lock().data == data, "nothing was written");
}

#[test]
fn a_cluster_that_two_bitmaps_claim_is_refused() {
    let mut data = image(10 * MIB);
    let found = stored(&data);
    let (first, second) = (found[0].table, found[1].table);
    data.copy_within(first..first + 8, second);
    let rig = Rig::new();
    let error = rig
        .block_on(rig.open_storage(&Storage::new(data), ""))
        .unwrap_err();
    assert!(error.reason().contains("bitmap 'b1'"), "{error}");
}

#[test]
fn all_ones_without_data_are_all_ones_and_bits_beyond_the_end_are_none() {
    let disk = 10 * MIB - 3 * 512;
    let mut data = image(disk);
    let found = stored(&data);
    let (first, second) = (found[0].table, found[1].table);
    data[first..first + 8].copy_from_slice(&1u64.to_be_bytes());
    let at = be64(&data, second) as usize;
    data[at..at + 65536].fill(0xff);
    let storage = Storage::new(data);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let list = handle.named_bitmaps().list();
        assert_eq!(list[0].count, disk.div_ceil(65536) * 65536);
        assert_eq!(list[1].count, disk);
        rig.close(handle).await.unwrap();
    });
    let data = storage.state.lock().data.clone();
    for bitmap in stored(&data) {
        assert!(bitmap.bits.iter().all(|bit| *bit), "{}", bitmap.name);
        let at = be64(&data, bitmap.table) as usize;
        let (whole, rest) = (bitmap.bits.len() / 8, bitmap.bits.len() % 8);
        assert_eq!(
            data[at + whole],
            (1u16 << rest) as u8 - 1,
            "the tail is clear"
        );
    }
}

#[test]
fn a_storage_that_is_full_leaves_bitmaps_that_nobody_trusts() {
    let storage = Storage::new(image(64 * MIB));
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, 65536, 1).await.unwrap();
        handle.flush().await.unwrap();
        let length = storage.state.lock().data.len() as u64;
        storage.set_fault(Fault::Full(length));
        let error = rig.close(handle).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    });
    storage.set_fault(Fault::None);
    let data = storage.state.lock().data.clone();
    assert!(
        stored(&data)
            .iter()
            .all(|bitmap| bitmap.flags == AUTO | IN_USE)
    );
    assert_clean_bytes(&data);
}

#[test]
fn a_storage_that_fails_at_any_flush_or_write_leaves_bitmaps_that_nobody_trusts_wrongly() {
    for fault in [Fault::Writes, Fault::Flushes] {
        let storage = Storage::new(image(10 * MIB));
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            write(&handle, 5 * MIB, 512, 1).await.unwrap();
            handle.flush().await.unwrap();
            let new = NewBitmap::named("new").persistent();
            handle.named_bitmaps().add(new).await.unwrap();
            storage.set_fault(fault);
            let error = handle.named_bitmaps().remove("b0").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(
                handle.named_bitmaps().find("b0").is_ok(),
                "it is still there"
            );
            assert!(rig.close(handle).await.is_err());
        });
        let data = storage.state.lock().data.clone();
        assert!(
            stored(&data)
                .iter()
                .all(|bitmap| bitmap.flags & IN_USE != 0)
        );
    }
}
