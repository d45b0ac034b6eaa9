//! Metadata that the active tables don't lead to (snapshots, bitmaps, the LUKS header) is never written over either, whatever damaged
//! refcounts and entries say; `overlap-check` says which kinds are looked for, and what is refused is called what qemu-io calls it.

mod common;

use std::sync::Arc;

use block_core::{
    BlockHandle, ErrorKind, Options, RequestFlags, SnapshotKey,
    driver::{Reopen, Truncate},
    image::Progress,
    secret::Secret,
};
use common::{storage::Storage, *};

const C: u64 = 65536;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn be32(data: &[u8], at: u64) -> u64 {
    be64(data, at as usize) >> 32
}

fn get(data: &[u8], at: u64) -> u64 {
    be64(data, at as usize)
}

fn put(data: &mut [u8], at: u64, value: u64) {
    data[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
}

/// Makes the refcount of the cluster at `offset` say that it is free.
fn free(data: &mut [u8], offset: u64) {
    let block = get(data, get(data, 48));
    let at = (block + offset / C * 2) as usize;
    assert_eq!(data[at..at + 2], [0, 1], "{offset:#x}");
    data[at..at + 2].fill(0);
}

/// Data of the header extension of that type.
fn extension(data: &[u8], kind: u64) -> Option<u64> {
    let mut at = be32(data, 100);
    while be32(data, at) != 0 {
        if be32(data, at) == kind {
            return Some(at + 8);
        }
        at += 8 + be32(data, at + 4).next_multiple_of(8);
    }
    None
}

/// Where things are.
#[derive(Debug)]
struct Places {
    active_l1: u64,
    active_l2: u64,
    refcount_table: u64,
    refcount_block: u64,
    /// Snapshot table, L1 and L2 table of the last snapshot.
    snapshots: Option<[u64; 3]>,
    /// Directory, table and first data.
    bitmaps: Option<[u64; 3]>,
}

impl Places {
    fn of(data: &[u8]) -> Self {
        let active_l1 = get(data, 40);
        let refcount_table = get(data, 48);
        let mut last = get(data, 64);
        for _ in 1..be32(data, 60) {
            let strings = (get(data, last + 8) >> 16 & 0xffff) + (get(data, last + 8) & 0xffff);
            last += (40 + be32(data, last + 36) + strings).next_multiple_of(8);
        }
        let snapshots = (be32(data, 60) > 0).then(|| {
            let l1 = get(data, last);
            [get(data, 64), l1, get(data, l1) & OFFSET]
        });
        let bitmaps = extension(data, 0x2385_2875).map(|at| {
            let directory = get(data, at + 16);
            let table = get(data, directory);
            [directory, table, get(data, table) & OFFSET]
        });
        Self {
            active_l1,
            active_l2: get(data, active_l1) & OFFSET,
            refcount_table,
            refcount_block: get(data, refcount_table),
            snapshots,
            bitmaps,
        }
    }
}

/// An image of qemu's with a snapshot, other active tables, and a bitmap with bits.
fn image(scratch: &std::path::Path) -> Vec<u8> {
    let path = scratch.join("made.qcow2");
    let name = path.to_str().unwrap();
    let write = |what: &str| tool("qemu-io", &["-f", "qcow2", "-c", what, name]);
    qemu_img(&["create", "-q", "-f", "qcow2", name, "64M"]);
    write("write -P 7 0 128k");
    qemu_img(&["bitmap", "--add", name, "bits"]);
    qemu_img(&["snapshot", "-c", "one", name]);
    write("write -P 8 0 64k");
    std::fs::read(path).unwrap()
}

/// What qemu-io calls the overlap, if it finds one.
fn theirs(data: &[u8], scratch: &std::path::Path, options: &str, write: &str) -> Option<String> {
    let path = scratch.join("theirs.qcow2");
    std::fs::write(&path, data).unwrap();
    let open = format!("open -o driver=qcow2,{options} {}", path.display());
    let output = run("qemu-io", &["-c", &open, "-c", write, "-c", "flush"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let (_, rest) = text.split_once("Marking image as corrupt: ")?;
    Some(rest.split_once("; further").unwrap().0.to_owned())
}

/// What we call it.
fn ours(data: &[u8], options: &str, at: u64) -> Option<String> {
    let rig = Rig::new();
    let storage = Storage::new(data.to_vec());
    rig.block_on(async {
        let handle = match rig.open_storage(&storage, options).await {
            Ok(handle) => handle,
            // It overlaps something that is written when the image is opened.
            Err(error) => return refusal(Err(error)),
        };
        let reason = refusal(fill(&handle, at).await);
        // A corrupt image has nothing to store.
        let _ = rig.close(handle).await;
        if reason.is_some() {
            assert_eq!(get(&storage.state.lock().data, 72), 2, "{reason:?}");
        }
        reason
    })
}

/// Writes until all space that was free before is used.
async fn fill(handle: &BlockHandle, at: u64) -> block_core::Result<()> {
    for n in 0..24 {
        write(handle, at + n * C, 4096, 9).await?;
    }
    handle.flush().await
}

fn refusal(result: block_core::Result<()>) -> Option<String> {
    let error = result.err()?;
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    Some(error.reason())
}

fn refused(name: &str) -> Option<String> {
    Some(format!(
        "Preventing invalid write on metadata (overlaps with {name})"
    ))
}

#[test]
fn space_that_is_wrongly_called_free_is_not_given_out_where_snapshots_and_bitmaps_are() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image(scratch.path());
    let places = Places::of(&image);
    let [table, l1, l2] = places.snapshots.unwrap();
    let [directory, bitmap_table, bitmap_data] = places.bitmaps.unwrap();
    // The kind's option, its name, where it is, whether `constant` and `cached` look for it, whether qemu does at this moment.
    for (option, name, offset, constant, cached, qemu) in [
        ("snapshot-table", "snapshot table", table, true, true, true),
        ("inactive-l1", "inactive L1 table", l1, false, true, true),
        ("inactive-l2", "inactive L2 table", l2, false, false, true),
        (
            "bitmap-directory",
            "bitmap directory",
            directory,
            true,
            true,
            false,
        ),
        ("", "bitmap table", bitmap_table, false, true, false),
        ("", "bitmap data", bitmap_data, false, true, false),
    ] {
        let mut data = image.clone();
        free(&mut data, offset);
        let off = format!("overlap-check.template=all,overlap-check.{option}=off");
        let only = format!("overlap-check.template=none,overlap-check.{option}=on");
        for (options, found) in [
            ("overlap-check=none", false),
            ("overlap-check=constant", constant),
            ("overlap-check=cached", cached),
            ("overlap-check=all", true),
            (&off, false),
            (&only, true),
        ] {
            if option.is_empty() && options.contains("template") {
                continue;
            }
            let expected = if found { refused(name) } else { None };
            assert_eq!(ours(&data, options, 8 << 20), expected, "{name}: {options}");
            if qemu {
                let theirs = theirs(&data, scratch.path(), options, "write 8M 4k");
                assert_eq!(theirs, expected, "qemu-io: {name}: {options}");
            }
        }
    }
}

#[test]
fn entries_that_point_to_metadata_are_refused_in_qemus_words() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image(scratch.path());
    let places = Places::of(&image);
    let [table, l1, l2] = places.snapshots.unwrap();
    let [directory, bitmap_table, bitmap_data] = places.bitmaps.unwrap();
    for (offset, theirs_too) in [
        (places.refcount_table, true),
        (places.refcount_block, true),
        (places.active_l1, true),
        (places.active_l2, true),
        (table, true),
        (l1, true),
        (l2, true),
        (directory, true),
        (bitmap_table, false),
        (bitmap_data, false),
    ] {
        // Data to be overwritten in place, and L2 tables to be changed in place or copied.
        for (at, entry, target) in [
            (places.active_l2 + 8 * 100, offset | COPIED, 100 * C),
            (places.active_l1, offset | COPIED, 32 << 20),
            (places.active_l1, offset, 32 << 20),
        ] {
            let is_l2 = at == places.active_l1;
            if is_l2 && offset == places.active_l2 {
                continue;
            }
            let mut data = image.clone();
            put(&mut data, at, entry);
            let what = format!("{entry:#x} at {at:#x}");
            let found = ours(&data, "overlap-check=all", target);
            if theirs_too {
                let command = format!("write {target} 4k");
                let theirs = theirs(&data, scratch.path(), "overlap-check=all", &command);
                // A table that is not ours alone is copied before it is changed: nothing is written there.
                let only_copied = is_l2 && entry & COPIED == 0 && offset == l2;
                if only_copied {
                    assert!(theirs.is_some());
                    assert_eq!(found, None, "{what}");
                } else {
                    assert_eq!(found, theirs, "{what}");
                }
            } else if !is_l2 {
                assert!(found.is_some(), "{what}");
            }
        }
    }
}

/// An open image whose storage can be looked at and damaged behind its back.
struct Live {
    rig: Rig,
    storage: Arc<Storage>,
}

impl Live {
    fn new(data: Vec<u8>) -> Self {
        Self {
            rig: Rig::new(),
            storage: Storage::new(data),
        }
    }

    fn places(&self) -> Places {
        Places::of(&self.storage.state.lock().data)
    }

    fn free(&self, offset: u64) {
        free(&mut self.storage.state.lock().data, offset);
    }

    /// Opens the image, lets `change` happen, which forgets the refcounts in memory, then calls the cluster that `find` names free
    /// and expects that it is protected as `name`.
    fn expect(
        data: &[u8],
        options: &str,
        change: impl AsyncFnOnce(&BlockHandle),
        find: impl FnOnce(Places) -> u64,
        name: &str,
    ) {
        let live = Self::new(data.to_vec());
        live.rig.block_on(async {
            let handle = live.rig.open_storage(&live.storage, options).await.unwrap();
            change(&handle).await;
            live.free(find(live.places()));
            assert_eq!(refusal(fill(&handle, 48 << 20).await), refused(name));
            let _ = live.rig.close(handle).await;
        });
    }
}

async fn take(handle: &BlockHandle, name: &str) {
    handle
        .snapshot_create(named(name), Progress::new())
        .await
        .unwrap();
}

#[test]
fn what_is_known_of_snapshots_and_bitmaps_follows_every_change() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image(scratch.path());
    let plain = prepared_plain();
    let key = |name: &str| SnapshotKey::IdOrName(name.to_owned());
    for (kind, name) in ["snapshot table", "inactive L1 table", "inactive L2 table"]
        .into_iter()
        .enumerate()
    {
        let find = |places: Places| places.snapshots.unwrap()[kind];
        let all = "overlap-check=all";
        // Taken.
        Live::expect(
            &image,
            all,
            async |handle| take(handle, "two").await,
            find,
            name,
        );
        // Applied.
        let apply = async |handle: &BlockHandle| {
            take(handle, "two").await;
            write(handle, 1 << 20, 65536, 3).await.unwrap();
            handle
                .snapshot_apply(key("two"), Progress::new())
                .await
                .unwrap();
            write(handle, 2 << 20, 65536, 3).await.unwrap();
            take(handle, "three").await;
        };
        Live::expect(&plain, all, apply, find, name);
        // Another one deleted.
        let delete = async |handle: &BlockHandle| {
            take(handle, "two").await;
            write(handle, 1 << 20, 65536, 3).await.unwrap();
            take(handle, "three").await;
            handle
                .snapshot_delete(key("two"), Progress::new())
                .await
                .unwrap();
        };
        Live::expect(&plain, all, delete, find, name);
        // The option came later.
        let later = async |handle: &BlockHandle| {
            take(handle, "two").await;
            write(handle, 1 << 20, 65536, 3).await.unwrap();
            take(handle, "three").await;
            let options = Options::from_dotted(all).unwrap().0;
            let changes = Reopen {
                read_only: None,
                options,
            };
            handle.reopen(changes).await.unwrap();
        };
        Live::expect(&plain, "", later, find, name);
    }
    for (kind, name) in ["bitmap directory", "bitmap table", "bitmap data"]
        .into_iter()
        .enumerate()
    {
        let find = |places: Places| places.bitmaps.unwrap()[kind];
        // Opened, and not forgotten when a snapshot is taken.
        Live::expect(
            &image,
            "",
            async |handle| take(handle, "two").await,
            find,
            name,
        );
        // Stored elsewhere.
        let store = async |handle: &BlockHandle| {
            write(handle, 3 << 20, 65536, 3).await.unwrap();
            handle.named_bitmaps().store().await.unwrap();
            take(handle, "two").await;
        };
        Live::expect(&image, "", store, find, name);
    }
}

fn prepared_plain() -> Vec<u8> {
    cuts::prepared("cluster_size=64k", 64 << 20, async |handle| {
        write(handle, 0, 131_072, 7).await
    })
}

/// What a snapshot or a bitmap had is free space again, and called so.
#[test]
fn space_that_snapshots_and_bitmaps_gave_back_is_used_again() {
    let scratch = tempfile::tempdir().unwrap();
    let live = Live::new(image(scratch.path()));
    live.rig.block_on(async {
        let handle = live
            .rig
            .open_storage(&live.storage, "overlap-check=all")
            .await
            .unwrap();
        let key = SnapshotKey::IdOrName("one".into());
        handle.snapshot_delete(key, Progress::new()).await.unwrap();
        handle.named_bitmaps().remove("bits").await.unwrap();
        for round in 0..8 {
            take(&handle, "again").await;
            for n in 0..64 {
                write(&handle, n * C, C, round + 1).await.unwrap();
            }
            let key = SnapshotKey::IdOrName("again".into());
            handle.snapshot_delete(key, Progress::new()).await.unwrap();
        }
        handle.flush().await.unwrap();
        live.rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&live.storage), (0, 0));
    let len = live.storage.state.lock().data.len() as u64;
    assert!(len < 200 * C, "space isn't used again: {len:#x}");
}

#[test]
fn a_luks_header_is_not_written_over() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("luks.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=s,data=letmein",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        name,
        "64M",
    ]);
    let data = std::fs::read(&path).unwrap();
    let area = get(&data, extension(&data, 0x0537_be77).unwrap());
    let before = data[area as usize..][..2 * C as usize].to_vec();
    for at in [area, area + C] {
        let mut damaged = data.clone();
        free(&mut damaged, at);
        for (options, found) in [("", true), ("overlap-check=constant", true)] {
            let storage = Storage::new(damaged.clone());
            let rig = Rig::new();
            rig.block_on(async {
                rig.graph
                    .secrets()
                    .add("s", Secret::new("letmein"))
                    .unwrap();
                let options = format!("encrypt.key-secret=s,{options}");
                let handle = rig.open_storage(&storage, &options).await.unwrap();
                let written = refusal(write(&handle, 8 << 20, 4096, 9).await);
                assert_eq!(written.is_some(), found);
                assert_eq!(written, refused("LUKS header"));
                let _ = rig.close(handle).await;
            });
            let after = storage.state.lock().data[area as usize..][..2 * C as usize].to_vec();
            assert!(after == before, "the header has changed");
        }
    }
}

/// The kinds of metadata that a new table must not land on, wherever their cluster is wrongly called free.
fn kinds(places: &Places) -> Vec<(&'static str, u64)> {
    let [table, l1, l2] = places.snapshots.unwrap();
    let [directory, bitmap_table, bitmap_data] = places.bitmaps.unwrap();
    vec![
        ("active L1 table", places.active_l1),
        ("active L2 table", places.active_l2),
        ("refcount table", places.refcount_table),
        ("refcount block", places.refcount_block),
        ("snapshot table", table),
        ("inactive L1 table", l1),
        ("inactive L2 table", l2),
        ("bitmap directory", directory),
        ("bitmap table", bitmap_table),
        ("bitmap data", bitmap_data),
    ]
}

/// Makes the refcounts say that all of the file is in use.
fn leak_free_space(data: &mut [u8]) {
    let block = get(data, get(data, 48));
    for cluster in 0..(data.len() as u64).div_ceil(C) {
        let at = (block + cluster * 2) as usize;
        if data[at..at + 2] == [0, 0] {
            data[at + 1] = 1;
        }
    }
}

/// Does something that needs a new table to an image in which the cluster at each of `kinds` is wrongly called free: it is refused, the
/// image is marked corrupt, and the cluster keeps its bytes.
fn endanger(
    image: &[u8],
    mut kinds: Vec<(&'static str, u64)>,
    operation: impl AsyncFn(&BlockHandle) -> block_core::Result<()>,
) {
    // Without damage nothing is refused.
    kinds.push(("", 0));
    for (name, offset) in kinds {
        let mut data = image.to_vec();
        if offset > 0 {
            leak_free_space(&mut data);
            free(&mut data, offset);
        }
        let rig = Rig::new();
        let storage = Storage::new(data.clone());
        let reason = rig.block_on(async {
            let options = "overlap-check=all";
            let handle = match rig.open_storage(&storage, options).await {
                Ok(handle) => handle,
                Err(error) => return refusal(Err(error)),
            };
            let reason = refusal(operation(&handle).await);
            let _ = rig.close(handle).await;
            reason
        });
        if offset == 0 {
            assert_eq!(reason, None);
            continue;
        }
        assert_eq!(reason, refused(name));
        let after = storage.state.lock().data.clone();
        assert_eq!(get(&after, 72) & 2, 2, "{name}: not marked corrupt");
        let place = offset as usize..(offset + C) as usize;
        // Bitmaps are marked as in use when the image is opened, which is a change of a few bits of the directory.
        if name != "bitmap directory" {
            let len = place.end.min(data.len()) - place.start;
            let place = place.start..place.start + len;
            assert!(after[place.clone()] == data[place], "{name} was changed");
        }
    }
}

#[test]
fn a_larger_l1_table_is_not_put_over_other_metadata() {
    let scratch = tempfile::tempdir().unwrap();
    let image = image(scratch.path());
    let kinds = kinds(&Places::of(&image));
    endanger(&image, kinds, async |handle| {
        handle.truncate(1 << 40, Truncate::default()).await?;
        handle.flush().await
    });
}

#[test]
fn a_new_l2_table_is_not_put_over_other_metadata() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("made.qcow2");
    // Room behind the first L2 table, whose L1 entry is there already.
    let mut image = image(scratch.path());
    std::fs::write(&path, &image).unwrap();
    let name = path.to_str().unwrap();
    qemu_img(&["resize", "-q", "-f", "qcow2", name, "2G"]);
    image = std::fs::read(&path).unwrap();
    let kinds = kinds(&Places::of(&image));
    // Zeroes need an L2 table and nothing else.
    endanger(&image, kinds, async |handle| {
        let none = RequestFlags::empty();
        handle.write_zeroes(1 << 30, 4 * C, none).await?;
        handle.flush().await
    });
}

#[test]
fn a_key_slot_is_not_written_where_other_metadata_lies() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("luks.qcow2");
    let name = path.to_str().unwrap();
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let secret = "secret,id=s,data=letmein";
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, name, "64M",
    ]);
    let data = std::fs::read(&path).unwrap();
    let area = get(&data, extension(&data, 0x0537_be77).unwrap());
    let amend = |data: &[u8], options: &str| {
        let storage = Storage::new(data.to_vec());
        let rig = Rig::new();
        let reason = rig.block_on(async {
            for (id, password) in [("s", "letmein"), ("new", "another")] {
                rig.graph.secrets().add(id, Secret::new(password)).unwrap();
            }
            let options = format!("encrypt.key-secret=s,{options}");
            let handle = match rig.open_storage(&storage, &options).await {
                Ok(handle) => handle,
                Err(error) => return refusal(Err(error)),
            };
            let change = "encrypt.state=active,encrypt.new-secret=new,encrypt.keyslot=1,encrypt.iter-time=10";
            let change = Options::from_dotted(change).unwrap();
            let reason = refusal(handle.amend(change, false, Progress::new()).await);
            let _ = rig.close(handle).await;
            reason
        });
        let after = storage.state.lock().data.clone();
        (reason, after)
    };
    // Key slot 1 is 256 KiB behind the area's beginning: an L1 table, a refcount table or a snapshot table in the middle of it.
    let slot = area + 256 * 1024;
    assert!(slot.is_multiple_of(C));
    let place = slot as usize..(slot + C) as usize;
    let (refused_for, after) = amend(&data, "");
    assert_eq!(refused_for, None);
    assert!(
        after[place.clone()] != data[place.clone()],
        "slot 1 isn't there"
    );
    let moved = |field: u64| {
        let mut moved = data.clone();
        let old = get(&data, field) as usize;
        let table = moved[old..(old + 4096).min(data.len())].to_vec();
        moved[place.clone()].fill(0);
        moved[slot as usize..][..table.len()].copy_from_slice(&table);
        put(&mut moved, field, slot);
        moved
    };
    for (field, name) in [(40, "active L1 table"), (48, "refcount table")] {
        let damaged = moved(field);
        let (refused_for, after) = amend(&damaged, "");
        assert_eq!(refused_for, refused("LUKS header"), "{name}");
        assert!(
            after[place.clone()] == damaged[place.clone()],
            "{name} was written over"
        );
    }
}
