//! Images of version 2 with snapshot entries as old programs wrote them, which say less than version 3 asks for, become version 3.

mod common;

use block_core::{Options, RequestFlags, image::Progress};
use common::{
    cuts::{Look, prepared, record},
    *,
};

const DISK: u64 = 256 << 10;

/// Shortens the extra data of every snapshot entry to `extra` bytes.
fn shorten(image: &mut [u8], extra: usize) {
    let count = u32::from_be_bytes(image[60..64].try_into().unwrap());
    let table = be64(image, 64) as usize;
    let mut entries = Vec::new();
    let mut at = table;
    for _ in 0..count {
        let half = |from: usize| u16::from_be_bytes(image[from..from + 2].try_into().unwrap());
        let old = u32::from_be_bytes(image[at + 36..at + 40].try_into().unwrap()) as usize;
        let strings = usize::from(half(at + 12)) + usize::from(half(at + 14));
        let start = entries.len();
        entries.extend_from_slice(&image[at..at + 36]);
        entries.extend_from_slice(&(extra as u32).to_be_bytes());
        entries.extend_from_slice(&image[at + 40..at + 40 + extra]);
        entries.extend_from_slice(&image[at + 40 + old..at + 40 + old + strings]);
        entries.resize(start + (40 + extra + strings).next_multiple_of(8), 0);
        at += (40 + old + strings).next_multiple_of(8);
    }
    image[table..at].fill(0);
    image[table..table + entries.len()].copy_from_slice(&entries);
}

/// A disk of threes, with snapshots of it full of ones and full of twos.
fn with_short_entries(extra: usize) -> Vec<u8> {
    let mut image = prepared("cluster_size=4096,compat=0.10", DISK, async |handle| {
        for (value, name) in [(1, "one"), (2, "two")] {
            write(handle, 0, DISK, value).await?;
            handle.snapshot_create(named(name), Progress::new()).await?;
        }
        handle
            .write(0, vec![3; DISK as usize], RequestFlags::empty())
            .await
    });
    shorten(&mut image, extra);
    image
}

fn to_version_3() -> Options {
    Options::new().with("compat", "1.1")
}

#[test]
fn short_snapshot_entries_are_completed_when_an_image_becomes_version_3() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    for extra in [0, 8, 16, 24] {
        std::fs::write(&image, with_short_entries(extra)).unwrap();
        assert_clean(&image);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open(&image, "").await.unwrap();
            handle
                .amend(to_version_3(), false, Progress::new())
                .await
                .unwrap();
            for snapshot in handle.snapshot_list().await.unwrap() {
                assert_eq!(snapshot.disk_size, DISK);
            }
            rig.close(handle).await.unwrap();
        });
        assert_clean(&image);
        let info = qemu_img(&["info", image.to_str().unwrap()]);
        assert!(info.contains("compat: 1.1"), "{info}");
        assert!(
            contents(&image, scratch.path())
                .iter()
                .all(|byte| *byte == 3)
        );
        for (value, name) in [(1, "one"), (2, "two")] {
            let held = snapshot_contents(&image, scratch.path(), name);
            assert_eq!(held.len() as u64, DISK);
            assert!(held.iter().all(|byte| *byte == value), "{extra}: {name}");
        }
    }
}

#[test]
fn a_power_cut_during_an_upgrade_leaves_the_old_or_the_new_image() {
    let upgraded = record(with_short_entries(0), "", async |handle| {
        handle.amend(to_version_3(), false, Progress::new()).await
    });
    assert_eq!((upgraded.start[7], upgraded.end[7]), (2, 3));
    upgraded.cut("short entries", Look::AsItIs, 200, |disk, what| {
        assert_eq!(disk.len() as u64, DISK);
        assert!(disk.iter().all(|byte| *byte == 3), "{what}");
    });
}
