//! Persistent bitmaps beside the installed qemu tools: what they recorded we read bit for bit, and the other way round; the
//! life cycle on disk; what is refused.

mod bitmap_files;
mod common;

use bitmap_files::{AUTO, IN_USE, StoredBitmap, autoclear, extension, stored};
use block_core::{
    BlockHandle, ErrorKind, RequestFlags,
    bitmap::NewBitmap,
    driver::{Reopen, Truncate},
};
use common::{storage::Storage, *};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::{path::Path, sync::Arc};

const MIB: u64 = 1 << 20;

/// What a node's bitmap holds, as bits.
fn bits_of(handle: &BlockHandle, name: &str) -> Vec<bool> {
    let bitmap = handle.named_bitmaps().find(name).unwrap();
    let bits = bitmap.bits();
    (0..bits.length().div_ceil(bits.granularity()))
        .map(|bit| bits.is_dirty(bit * bits.granularity()))
        .collect()
}

/// The bits that ranges of a disk make dirty.
fn expected(disk: u64, granularity: u64, ranges: &[(u64, u64)]) -> Vec<bool> {
    let mut bits = vec![false; disk.div_ceil(granularity) as usize];
    for (at, len) in ranges.iter().filter(|(_, len)| *len > 0) {
        for bit in at / granularity..=(at + len - 1) / granularity {
            bits[bit as usize] = true;
        }
    }
    bits
}

fn image_with_bitmaps(options: &str, size: u64, bitmaps: &[(&str, &str)]) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    create_by_qemu(&path, options, size);
    for (bitmap, granularity) in bitmaps {
        qemu_img(&["bitmap", "--add", "-g", granularity, name, bitmap]);
    }
    std::fs::read(path).unwrap()
}

async fn write_all(handle: &BlockHandle, ranges: &[(u64, u64)]) {
    for (n, (at, len)) in ranges.iter().enumerate() {
        match n % 4 {
            1 => handle
                .write_zeroes(*at, *len, RequestFlags::empty())
                .await
                .unwrap(),
            2 => handle
                .write_zeroes(*at, *len, RequestFlags::MAY_UNMAP)
                .await
                .unwrap(),
            _ => write(handle, *at, *len, 7).await.unwrap(),
        }
    }
}

fn ranges(rng: &mut SmallRng, disk: u64, count: usize) -> Vec<(u64, u64)> {
    (0..count)
        .map(|_| {
            let at = rng.random_range(0..disk / 512) * 512;
            let len = rng.random_range(1..=64u64) * 512;
            (at, len.min(disk - at))
        })
        .collect()
}

#[test]
fn bits_that_qemu_recorded_are_read_exactly() {
    let mut rng = SmallRng::seed_from_u64(1);
    for (options, granularities) in [
        ("cluster_size=64k", ["512", "65536", "1048576"]),
        ("cluster_size=512", ["512", "4096", "65536"]),
        ("cluster_size=2M", ["512", "2097152", "2147483648"]),
    ] {
        let disk = 20 * MIB + 512 * 3;
        let ranges = ranges(&mut rng, disk, 12);
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        create_by_qemu(&path, options, disk);
        for granularity in granularities {
            qemu_img(&["bitmap", "--add", "-g", granularity, name, granularity]);
        }
        qemu_img(&["bitmap", "--add", "--disable", name, "off"]);
        let commands: Vec<String> = ranges
            .iter()
            .enumerate()
            .map(|(n, (at, len))| {
                let kind = ["write -P 7", "write -z", "discard"][n % 3];
                format!("{kind} {at} {len}")
            })
            .collect();
        let mut args = vec!["-f", "qcow2"];
        for command in &commands {
            args.extend(["-c", command]);
        }
        args.push(name);
        tool("qemu-io", &args);
        let rig = Rig::new();
        rig.block_on(async {
            let before = std::fs::read(&path).unwrap();
            let handle = rig.open(&path, "read-only=on").await.unwrap();
            for text in granularities {
                let granularity = text.parse().unwrap();
                assert!(
                    bits_of(&handle, text) == expected(disk, granularity, &ranges),
                    "{options}, granularity {text}"
                );
            }
            let off = handle.named_bitmaps().find("off").unwrap();
            assert_eq!((off.info().count, off.info().recording), (0, false));
            let error = handle.named_bitmaps().clear("off").unwrap_err();
            assert_eq!(
                error.reason(),
                "Bitmap 'off' is readonly and cannot be modified"
            );
            rig.close(handle).await.unwrap();
            assert!(
                before == std::fs::read(&path).unwrap(),
                "nothing was written"
            );
        });
    }
}

#[test]
fn bits_that_we_recorded_are_read_by_qemu_and_stay_through_its_own_writes() {
    let mut rng = SmallRng::seed_from_u64(2);
    for (options, granularity) in [
        ("cluster_size=64k", 512u64),
        ("cluster_size=512", 4096),
        ("cluster_size=4k,refcount_bits=64", 65536),
        ("cluster_size=2M,refcount_bits=1", 1 << 20),
    ] {
        let disk = 30 * MIB;
        let ranges = ranges(&mut rng, disk, 20);
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        create_by_qemu(&path, options, disk);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open(&path, "").await.unwrap();
            let bitmaps = handle.named_bitmaps();
            let new = NewBitmap::named("ours")
                .persistent()
                .with_granularity(granularity);
            bitmaps.add(new).await.unwrap();
            bitmaps.add(NewBitmap::named("lost")).await.unwrap();
            let mut off = NewBitmap::named("off").persistent();
            off.disabled = true;
            bitmaps.add(off).await.unwrap();
            write_all(&handle, &ranges).await;
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        // qemu loads it, merges it, and stores the result.
        qemu_img(&[
            "bitmap",
            "--add",
            "-g",
            "512",
            "--disable",
            "--merge",
            "ours",
            name,
            "theirs",
        ]);
        assert_clean(&path);
        let found = stored(&std::fs::read(&path).unwrap());
        let names: Vec<&str> = found.iter().map(|bitmap| bitmap.name.as_str()).collect();
        assert_eq!(names, ["ours", "off", "theirs"], "{options}");
        let wanted = expected(disk, granularity, &ranges);
        assert!(found[0].bits == wanted, "{options}");
        assert_eq!((found[0].flags, found[1].flags), (AUTO, 0));
        let fine: Vec<bool> = (0..disk / 512)
            .map(|sector| wanted[(sector * 512 / granularity) as usize])
            .collect();
        assert!(found[2].bits == fine, "{options}: as qemu merged it");
    }
}

#[test]
fn a_writable_image_has_its_bitmaps_in_use_until_it_is_closed() {
    let image = image_with_bitmaps(
        "cluster_size=64k",
        10 * MIB,
        &[("a", "65536"), ("b", "512")],
    );
    let storage = Storage::new(image);
    let data = |storage: &Arc<Storage>| storage.state.lock().data.clone();
    let flags = |storage: &Arc<Storage>| -> Vec<u32> {
        stored(&data(storage))
            .iter()
            .map(|bitmap| bitmap.flags)
            .collect()
    };
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        assert_eq!(flags(&storage), [AUTO | IN_USE; 2]);
        assert_eq!(autoclear(&data(&storage)) & 1, 1);
        write(&handle, MIB, 65536, 1).await.unwrap();
        handle.flush().await.unwrap();
        assert_eq!(flags(&storage), [AUTO | IN_USE; 2], "as a crash leaves it");
        let crashed = data(&storage);

        handle.named_bitmaps().store().await.unwrap();
        let kept = stored(&data(&storage));
        assert!(kept[0].bits[16], "stored on request");
        assert_eq!(
            flags(&storage),
            [AUTO | IN_USE; 2],
            "and still not to be trusted"
        );
        rig.close(handle).await.unwrap();
        assert_eq!(flags(&storage), [AUTO; 2]);
        assert_clean_bytes(&data(&storage));

        // What the crash left: listed, not usable, and it can be removed.
        let storage = Storage::new(crashed);
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let bitmaps = handle.named_bitmaps();
        assert!(
            bitmaps
                .list()
                .iter()
                .all(|info| info.inconsistent && !info.recording)
        );
        let error = bitmaps.enable("a").unwrap_err();
        assert_eq!(
            error.reason(),
            "Bitmap 'a' is inconsistent and cannot be used"
        );
        let error = handle
            .truncate(20 * MIB, Truncate::default())
            .await
            .unwrap_err();
        assert_eq!(
            error.reason(),
            "Bitmap 'a' is inconsistent and cannot be used"
        );
        bitmaps.remove("a").await.unwrap();
        rig.close(handle).await.unwrap();
        let left = stored(&data(&storage));
        assert_eq!((left.len(), left[0].name.as_str()), (1, "b"));
        assert_eq!(left[0].flags, AUTO | IN_USE, "still inconsistent");
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle.named_bitmaps().remove("b").await.unwrap();
        assert!(
            extension(&data(&storage)).is_none(),
            "the extension is gone at once"
        );
        assert_eq!(autoclear(&data(&storage)) & 1, 0);
        rig.close(handle).await.unwrap();
        assert_clean_bytes(&data(&storage));
    });
}

#[test]
fn an_image_that_becomes_read_only_has_its_bitmaps_stored_and_the_other_way_round() {
    let storage = Storage::new(image_with_bitmaps(
        "cluster_size=4k",
        10 * MIB,
        &[("a", "4096")],
    ));
    let look =
        |storage: &Arc<Storage>| -> StoredBitmap { stored(&storage.state.lock().data).remove(0) };
    let mode = |read_only| Reopen {
        read_only: Some(read_only),
        ..Reopen::default()
    };
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, 4096, 1).await.unwrap();
        handle.reopen(mode(true)).await.unwrap();
        let bitmap = look(&storage);
        assert_eq!((bitmap.flags, bitmap.bits[0]), (AUTO, true));
        let error = handle.named_bitmaps().clear("a").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotPermitted);
        assert_clean_bytes(&storage.state.lock().data);

        handle.reopen(mode(false)).await.unwrap();
        assert_eq!(look(&storage).flags, AUTO | IN_USE);
        write(&handle, 8192, 1, 1).await.unwrap();
        rig.close(handle).await.unwrap();
        let bitmap = look(&storage);
        assert_eq!(bitmap.flags, AUTO);
        assert_eq!(bitmap.bits[..4], [true, false, true, false]);
        assert_clean_bytes(&storage.state.lock().data);
    });
}

#[test]
fn bitmaps_of_an_image_that_another_program_wrote_to_are_dropped_by_the_first_writer() {
    let mut image = image_with_bitmaps("cluster_size=64k", 10 * MIB, &[("a", "65536")]);
    image[95] &= !1;
    let storage = Storage::new(image.clone());
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
        assert!(handle.named_bitmaps().list().is_empty());
        let info = handle.info().await.unwrap().format_specific.unwrap().1;
        assert!(info.get("bitmaps").is_none());
        rig.close(handle).await.unwrap();
        assert!(
            storage.state.lock().data == image,
            "a reader writes nothing"
        );

        let handle = rig.open_storage(&storage, "").await.unwrap();
        assert!(handle.named_bitmaps().list().is_empty());
        assert!(extension(&storage.state.lock().data).is_none());
        let new = NewBitmap::named("a").persistent();
        handle.named_bitmaps().add(new).await.unwrap();
        rig.close(handle).await.unwrap();
        assert_eq!(stored(&storage.state.lock().data)[0].flags, AUTO);
    });
}

#[test]
fn a_reader_that_becomes_a_writer_drops_stale_bitmaps_too() {
    let mut image = image_with_bitmaps("cluster_size=64k", 10 * MIB, &[("a", "65536")]);
    image[95] &= !1;
    let storage = Storage::new(image);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
        let writable = Reopen {
            read_only: Some(false),
            ..Reopen::default()
        };
        handle.reopen(writable).await.unwrap();
        assert!(extension(&storage.state.lock().data).is_none());
        rig.close(handle).await.unwrap();
    });
}

#[test]
fn bitmaps_that_were_taken_along_to_version_2_are_dropped_by_the_first_writer() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    std::fs::write(
        &path,
        image_with_bitmaps("cluster_size=64k", 10 * MIB, &[("a", "65536")]),
    )
    .unwrap();
    qemu_img(&["amend", "-f", "qcow2", "-o", "compat=0.10", name]);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        assert!(handle.named_bitmaps().list().is_empty());
        write(&handle, 0, 65536, 1).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let checked = qemu_img(&["info", name]);
    assert!(!checked.contains("contains bitmaps"), "{checked}");
    let checked = run("qemu-img", &["check", name]);
    assert_eq!(checked.status.code(), Some(3), "leaks are all that is left");
}

#[test]
fn info_lists_what_is_stored_as_qemu_img_does() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let image = image_with_bitmaps("cluster_size=64k", MIB, &[("a", "512"), ("b", "65536")]);
    std::fs::write(&path, image).unwrap();
    let text = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    let theirs: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open(&path, "read-only=on").await.unwrap();
        let ours = handle.info().await.unwrap().format_specific.unwrap().1;
        assert_eq!(ours, theirs["format-specific"]["data"]);
        rig.close(handle).await.unwrap();
    });
}

#[test]
fn what_the_format_cant_store_is_refused_when_it_is_added() {
    let rig = Rig::new();
    rig.block_on(async {
        let reason = async |options: &str, size: u64, new: NewBitmap| {
            let storage = Storage::new(image_bytes(options, size));
            let handle = rig.open_storage(&storage, "").await.unwrap();
            let error = handle.named_bitmaps().add(new).await.unwrap_err();
            rig.close(handle).await.unwrap();
            error.reason()
        };
        let new = || NewBitmap::named("b").persistent();
        for (options, size, new, text) in [
            (
                "compat=0.10",
                MIB,
                new(),
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ),
            (
                "compat=1.1",
                0,
                new(),
                "An empty disk has nothing to record",
            ),
            (
                "cluster_size=2M",
                1 << 50,
                new(),
                "Too much space will be occupied by the bitmap",
            ),
            (
                "compat=1.1",
                MIB,
                NewBitmap::named("n".repeat(1024)).persistent(),
                "Name length exceeds maximum (1023 characters)",
            ),
            (
                "compat=1.1",
                MIB,
                NewBitmap::named(""),
                "Bitmap name cannot be empty",
            ),
            (
                "compat=1.1",
                MIB,
                new().with_granularity(256),
                "Granularity must be power of 2",
            ),
            (
                "compat=1.1",
                MIB,
                new().with_granularity(1 << 32),
                "Granularity must be power of 2",
            ),
            (
                "compat=1.1",
                MIB,
                new().with_granularity(1000),
                "Granularity must be power of 2",
            ),
        ] {
            let found = reason(options, size, new).await;
            assert!(found.contains(text), "{options}: {found}");
        }
        let longest = NewBitmap::named("n".repeat(1023)).persistent();
        let storage = Storage::new(image_bytes("compat=1.1", MIB));
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle.named_bitmaps().add(longest.clone()).await.unwrap();
        let error = handle.named_bitmaps().add(longest).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        rig.close(handle).await.unwrap();
        assert_eq!(stored(&storage.state.lock().data)[0].name.len(), 1023);
        assert_clean_bytes(&storage.state.lock().data);
    });
}

#[test]
fn bitmaps_follow_a_resize_and_are_stored_with_the_new_size() {
    let image = image_with_bitmaps("cluster_size=512", 4 * MIB, &[("a", "512"), ("b", "65536")]);
    let storage = Storage::new(image);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 4 * MIB - 512, 512, 1).await.unwrap();
        write(&handle, MIB, 512, 1).await.unwrap();
        handle.truncate(9 * MIB, Truncate::default()).await.unwrap();
        write(&handle, 9 * MIB - 1, 1, 1).await.unwrap();
        rig.close(handle).await.unwrap();
        assert_clean_bytes(&storage.state.lock().data);
        let ranges = [(MIB, 512), (4 * MIB - 512, 512), (9 * MIB - 1, 1)];
        for (bitmap, granularity) in stored(&storage.state.lock().data).iter().zip([512, 65536]) {
            assert!(
                bitmap.bits == expected(9 * MIB, granularity, &ranges),
                "{granularity}"
            );
        }
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle.truncate(2 * MIB, Truncate::default()).await.unwrap();
        rig.close(handle).await.unwrap();
        assert_clean_bytes(&storage.state.lock().data);
        for (bitmap, granularity) in stored(&storage.state.lock().data).iter().zip([512, 65536]) {
            assert!(
                bitmap.bits == expected(2 * MIB, granularity, &[(MIB, 512)]),
                "{granularity}"
            );
        }
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let error = handle.truncate(0, Truncate::default()).await.unwrap_err();
        assert!(error.reason().contains("can't follow"), "{error}");
        rig.close(handle).await.unwrap();
    });
}

#[test]
fn storing_again_and_again_uses_the_same_space() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let image = image_with_bitmaps("cluster_size=4k", 64 * MIB, &[("a", "512"), ("b", "65536")]);
    std::fs::write(&path, image).unwrap();
    let rig = Rig::new();
    let cycle = |n: u64| {
        rig.block_on(async {
            let handle = rig.open(&path, "").await.unwrap();
            write(&handle, n % 8 * MIB, 4096, 1).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        std::fs::metadata(&path).unwrap().len()
    };
    let _ = (0..10).map(cycle).max();
    let settled = cycle(10);
    for n in 11..40 {
        assert!(cycle(n) <= settled + 8192, "cycle {n}");
    }
    assert_clean(&path);
}

#[test]
fn bitmaps_are_merged_across_images_and_granularities() {
    let a = Storage::new(image_with_bitmaps(
        "cluster_size=64k",
        10 * MIB,
        &[("a", "512")],
    ));
    let b = Storage::new(image_with_bitmaps(
        "cluster_size=4k",
        10 * MIB,
        &[("b", "65536")],
    ));
    let other = Storage::new(image_with_bitmaps(
        "cluster_size=4k",
        11 * MIB,
        &[("c", "65536")],
    ));
    let (rig, second, third) = (Rig::new(), Rig::new(), Rig::new());
    rig.block_on(async {
        let to = rig.open_storage(&a, "").await.unwrap();
        let from = second.open_storage(&b, "").await.unwrap();
        let wrong = third.open_storage(&other, "read-only=on").await.unwrap();
        write(&from, 3 * MIB, 1, 1).await.unwrap();
        write(&to, 5 * MIB, 1, 1).await.unwrap();
        let bitmaps = to.named_bitmaps();
        let error = bitmaps
            .merge(
                "a",
                &[(from.node(), "b".into()), (wrong.node(), "c".into())],
            )
            .unwrap_err();
        assert!(error.reason().contains("of different sizes"), "{error}");
        assert_eq!(bitmaps.list()[0].count, 512, "nothing was merged");
        bitmaps.merge("a", &[(from.node(), "b".into())]).unwrap();
        let error = bitmaps
            .merge("a", &[(from.node(), "x".into())])
            .unwrap_err();
        assert_eq!(error.reason(), "Dirty bitmap 'x' not found");
        third.close(wrong).await.unwrap();
        second.close(from).await.unwrap();
        rig.close(to).await.unwrap();
    });
    let wanted = expected(10 * MIB, 512, &[(3 * MIB, 65536), (5 * MIB, 1)]);
    assert!(stored(&a.state.lock().data)[0].bits == wanted);
}

#[test]
fn an_image_with_bitmaps_and_a_backing_file_keeps_both() {
    let scratch = tempfile::tempdir().unwrap();
    for len in [1usize, 40, 200, 255] {
        let base = scratch.path().join("b".repeat(len));
        std::fs::write(&base, vec![5; 65536]).unwrap();
        let path = scratch.path().join("a.qcow2");
        let (base, name) = (base.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, name, "1M",
        ]);
        let rig = Rig::new();
        rig.block_on(async {
            let options = format!("backing.driver=file,backing.filename={base}");
            let handle = rig.open(&path, &options).await.unwrap();
            let new = NewBitmap::named("a").persistent();
            handle.named_bitmaps().add(new).await.unwrap();
            write(&handle, 65536, 512, 1).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_eq!(
            stored(&std::fs::read(&path).unwrap())[0].bits[..3],
            [false, true, false]
        );
        assert_clean(&path);
        assert!(
            contents(&path, scratch.path())[..65536]
                .iter()
                .all(|byte| *byte == 5)
        );
        qemu_img(&["bitmap", "--remove", name, "a"]);
        assert_clean(&path);
        assert!(
            contents(Path::new(name), scratch.path())[..65536]
                .iter()
                .all(|byte| *byte == 5)
        );
    }
}
