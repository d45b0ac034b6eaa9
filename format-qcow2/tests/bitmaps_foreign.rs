//! Bitmaps that the format allows and nobody here understands: the image opens, those with extra data that says so are used, the others
//! are left as they are, and nobody writes to a disk of which they should record the writes.

mod bitmap_files;
mod common;

use bitmap_files::{AUTO, extension, stored};
use block_core::{
    ErrorKind,
    bitmap::NewBitmap,
    image::{CheckMode, Progress},
};
use common::{storage::Storage, *};

const MIB: u64 = 1 << 20;
const EXTRA_DATA_COMPATIBLE: u32 = 4;

fn image() -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "10M"]);
    qemu_img(&["bitmap", "--add", name, "b0"]);
    qemu_img(&["bitmap", "--add", "-g", "512", name, "b1"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 64k", name]);
    let mut data = std::fs::read(path).unwrap();
    data.resize(data.len().next_multiple_of(65536), 0);
    data
}

/// The same image, with `b0`'s entry made anew: flags, granularity, name, and extra data.
fn with_entry(flags: u32, granularity: u8, name: &[u8], extra: &[u8]) -> Vec<u8> {
    let mut data = image();
    let at = extension(&data).unwrap();
    let (len, directory) = (be64(&data, at + 8) as usize, be64(&data, at + 16) as usize);
    let old = &data[directory..directory + len];
    let mut entry = old[..24].to_vec();
    entry[12..16].copy_from_slice(&flags.to_be_bytes());
    entry[17] = granularity;
    entry[18..20].copy_from_slice(&(name.len() as u16).to_be_bytes());
    entry[20..24].copy_from_slice(&(extra.len() as u32).to_be_bytes());
    entry.extend_from_slice(extra);
    entry.extend_from_slice(name);
    entry.resize(entry.len().next_multiple_of(8), 0);
    entry.extend_from_slice(&old[32..]);
    if granularity > 31 {
        // Of a disk this small there is but one bit.
        let bits = be64(&data, stored(&data)[0].table) as usize;
        data[bits..bits + 65536].fill(0);
        data[bits] = 1;
    }
    data[directory..directory + entry.len()].copy_from_slice(&entry);
    data[at + 8..at + 16].copy_from_slice(&(entry.len() as u64).to_be_bytes());
    data
}

/// The directory's entry of `b0`, and the table and the data that it leads to.
fn first(data: &[u8]) -> [Vec<u8>; 3] {
    let found = stored(data);
    let (entry, next) = (found[0].entry, found[1].entry);
    let table = found[0].table;
    let bits = be64(data, table) as usize;
    let cluster = |at: usize| data[at..at + 65536].to_vec();
    [data[entry..next].to_vec(), cluster(table), cluster(bits)]
}

#[test]
fn extra_data_that_may_be_ignored_is_kept_and_the_bitmap_is_used() {
    for extra in [&b""[..], b"x", b"sixteen bytes ...", &[7; 300]] {
        let storage = Storage::new(with_entry(AUTO | EXTRA_DATA_COMPATIBLE, 16, b"b0", extra));
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let report = handle
                .check(CheckMode::ReadOnly, Progress::new())
                .await
                .unwrap();
            assert_eq!(
                report.corruptions + report.leaks,
                0,
                "{:?}",
                report.findings
            );
            write(&handle, 5 * MIB, 65536, 2).await.unwrap();
            let bitmaps = handle.named_bitmaps();
            bitmaps
                .add(NewBitmap {
                    persistent: true,
                    ..NewBitmap::named("b2")
                })
                .await
                .unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0));
        let data = storage.state.lock().data.clone();
        let found = stored(&data);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].flags, AUTO | EXTRA_DATA_COMPATIBLE);
        let dirty: Vec<usize> = (0..160).filter(|bit| found[0].bits[*bit]).collect();
        assert_eq!(dirty, [16, 80]);
        assert_eq!(&data[found[0].entry + 24..][..extra.len()], extra);
    }
}

#[test]
fn what_cannot_be_used_is_left_as_it_is() {
    for (what, data) in [
        (
            "extra data",
            with_entry(0, 16, b"b0", b"says that bits mean something else"),
        ),
        ("a fine granularity", with_entry(0, 8, b"b0", b"")),
        ("a coarse granularity", with_entry(0, 63, b"b0", b"")),
        ("a long name", with_entry(0, 16, &[b'x'; 1024], b"")),
    ] {
        let before = first(&data);
        let name = stored(&data)[0].name.clone();
        let storage = Storage::new(data);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let report = handle
                .check(CheckMode::RepairLeaks, Progress::new())
                .await
                .unwrap();
            assert_eq!(
                report.corruptions + report.leaks,
                0,
                "{what}: {:?}",
                report.findings
            );
            write(&handle, 5 * MIB, 65536, 2).await.unwrap();
            let list = handle.named_bitmaps().list();
            assert_eq!(list.len(), 2, "{what}");
            assert!(list[0].inconsistent && !list[1].inconsistent, "{what}");
            let error = handle.named_bitmaps().enable(&name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{what}: {error}");
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "{what}");
        let data = storage.state.lock().data.clone();
        assert!(first(&data) == before, "{what}");
        assert!(
            stored(&data)[1].bits[10_240],
            "{what}: the other goes on recording"
        );
        // It can be removed, and qemu-img opens the image again.
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            handle.named_bitmaps().remove(&name).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "{what}");
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.qcow2");
        std::fs::write(&path, &storage.state.lock().data).unwrap();
        assert_clean(&path);
    }
}

#[test]
fn a_disk_whose_writes_an_unusable_bitmap_records_is_only_read() {
    for (field, data) in [
        ("extra_data_size", with_entry(AUTO, 16, b"b0", b"unknown")),
        ("granularity_bits", with_entry(AUTO, 8, b"b0", b"")),
    ] {
        let storage = Storage::new(data.clone());
        let rig = Rig::new();
        rig.block_on(async {
            let error = rig.open_storage(&storage, "").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported, "{error}");
            assert_eq!(error.field().unwrap().name, field, "{error}");
            assert!(error.to_string().contains("read-only"), "{error}");
            let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
            let read = handle.read(MIB, 65536).await.unwrap();
            assert!(read.iter().all(|byte| *byte == 1));
            rig.close(handle).await.unwrap();
        });
        assert!(storage.state.lock().data == data, "{field}");
    }
}
