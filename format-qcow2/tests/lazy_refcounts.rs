//! Lazy refcounts: the dirty bit is durable before anything is linked, what it announces is repaired by the next writable open
//! (ours and the installed tools'), and closing takes it back.

mod common;

use block_core::{
    OpenOptions, RequestFlags,
    driver::{Reopen, Truncate},
    image::{CheckMode, Progress},
};
use common::{
    cuts::{Look, look_at, prepared, record},
    storage::Event,
    *,
};

const SIZE: u64 = 1 << 20;

fn is_dirty(image: &[u8]) -> bool {
    be64(image, 72) & 1 != 0
}

async fn work(handle: &block_core::BlockHandle) -> block_core::Result<()> {
    write(handle, 0, 200_000, 1).await?;
    handle.flush().await?;
    write(handle, 400_000, 100_000, 2).await?;
    handle.discard(0, 65536).await?;
    handle.flush().await?;
    handle
        .write_zeroes(100_000, 50_000, RequestFlags::empty())
        .await?;
    write(handle, 800_000, 70_000, 3).await?;
    handle.flush().await?;
    handle.truncate(SIZE / 2, Truncate::default()).await?;
    write(handle, 0, 4096, 4).await
}

#[test]
fn a_power_cut_with_lazy_refcounts_is_repaired_by_the_next_writable_open() {
    for options in [
        "lazy_refcounts=on,cluster_size=512,refcount_bits=64",
        "lazy_refcounts=on,cluster_size=4096",
    ] {
        let done = record(image_bytes(options, SIZE), "", work);
        let bit = done
            .log
            .iter()
            .position(|event| matches!(event, Event::Write(72, _)))
            .unwrap();
        assert!(
            matches!(done.log[bit + 1], Event::Flush),
            "the bit is durable before anything else is written"
        );
        assert!(!is_dirty(&done.end), "closed properly");
        let mut dirty = 0;
        done.cut(options, Look::Reopened, 60, |disk, what| {
            dirty += 1;
            let old = disk.len() as u64 == SIZE;
            assert!(old || disk.len() as u64 == SIZE / 2, "{what}");
            for (at, byte) in disk.iter().enumerate() {
                assert!([0, 1, 2, 3, 4].contains(byte), "{what}: {at:#x}");
            }
        });
        assert!(dirty > 20);
    }
}

#[test]
fn flushes_leave_refcounts_behind_and_qemu_img_repairs_what_a_crash_leaves() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "8M"]);
    rig.block_on(async {
        let handle = rig.open(&path, "lazy-refcounts=on").await.unwrap();
        write(&handle, 0, 1 << 20, 7).await.unwrap();
        handle.flush().await.unwrap();
        write(&handle, 4 << 20, 1 << 20, 8).await.unwrap();
        handle.flush().await.unwrap();
        assert!(counter(&handle, "lazy-batches") >= 2);
        let crashed = std::fs::read(&path).unwrap();
        assert!(is_dirty(&crashed));
        let copy = scratch.path().join("crashed.qcow2");
        std::fs::write(&copy, &crashed).unwrap();
        // The installed qemu-io opens it for writing, which repairs it.
        tool(
            "qemu-io",
            &[
                "-f",
                "qcow2",
                "-c",
                "read -P 7 0 1M",
                copy.to_str().unwrap(),
            ],
        );
        assert_clean(&copy);
        assert!(!is_dirty(&std::fs::read(&copy).unwrap()));
        // And so do we; a read-only open leaves it as it is.
        std::fs::write(&copy, &crashed).unwrap();
        let other = rig.open(&copy, "read-only=on").await.unwrap();
        other.close().await.unwrap();
        assert_eq!(std::fs::read(&copy).unwrap(), crashed);
        let other = rig.open(&copy, "").await.unwrap();
        let read = other.read(4 << 20, 1 << 20).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 8));
        other.close().await.unwrap();
        assert_clean(&copy);
        rig.close(handle).await.unwrap();
    });
    assert!(!is_dirty(&std::fs::read(&path).unwrap()));
    assert_clean(&path);
}

#[test]
fn becoming_read_only_or_not_lazy_any_more_takes_the_dirty_bit_back() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("lazy_refcounts=on", SIZE));
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let dirty = || is_dirty(&storage.state.lock().data);
        assert!(!dirty());
        write(&handle, 0, 65536, 1).await.unwrap();
        assert!(dirty());
        let reopen = |text: &str, read_only| {
            let options = block_core::Options::from_dotted(text).unwrap().0;
            handle.reopen(Reopen { read_only, options })
        };
        reopen("lazy-refcounts=off", None).await.unwrap();
        assert!(!dirty());
        write(&handle, 65536, 65536, 1).await.unwrap();
        assert!(!dirty());
        reopen("lazy-refcounts=on", None).await.unwrap();
        write(&handle, 131072, 65536, 1).await.unwrap();
        assert!(dirty());
        let mut set = handle.permissions();
        set.used -= block_core::Permissions::WRITE | block_core::Permissions::RESIZE;
        handle.set_permissions(set).unwrap();
        reopen("", Some(true)).await.unwrap();
        assert!(!dirty());
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn a_failed_flush_of_a_lazy_image_is_recovered_from_what_is_on_disk() {
    let rig = Rig::new();
    let storage = storage::Storage::new(prepared("lazy_refcounts=on", SIZE, async |handle| {
        write(handle, 0, 65536, 1).await
    }));
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, 131072, 2).await.unwrap();
        handle.flush().await.unwrap();
        write(&handle, 262144, 131072, 3).await.unwrap();
        storage.set_fault(storage::Fault::Flushes);
        handle.flush().await.unwrap_err();
        storage.set_fault(storage::Fault::None);
        handle.flush().await.unwrap_err();
        handle.reopen(Reopen::default()).await.unwrap();
        let read = handle.read(0, 131072).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 2));
        write(&handle, 524288, 131072, 4).await.unwrap();
        handle.flush().await.unwrap();
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// Who is to rescue such an image needs all that is there.
#[test]
fn a_dirty_image_that_is_refused_in_the_end_stays_as_it_was() {
    const CLUSTER: usize = 65536;
    let put = |data: &mut [u8], at: usize, value: u64| {
        data[at..at + 8].copy_from_slice(&value.to_be_bytes());
    };
    let make = |options: &str| {
        let mut data = prepared(options, SIZE, async |handle| {
            write(handle, 0, 70_000, 1).await?;
            write(handle, 200_000, 5000, 2).await
        });
        // Dirty, with something for a repair to do: data whose refcount is 0, an autoclear bit that nobody knows.
        let features = be64(&data, 72);
        put(&mut data, 72, features | 1);
        put(&mut data, 88, 1 << 40);
        data[2 * CLUSTER + 10..][..2].fill(0);
        data
    };
    let rig = Rig::new();
    let open = |data: &[u8], options: &str| {
        let storage = storage::Storage::new(data.to_vec());
        storage.state.lock().keep_log = true;
        let refused = rig.block_on(async {
            match rig.open_storage(&storage, options).await {
                Ok(handle) => {
                    rig.close(handle).await.unwrap();
                    None
                }
                Err(error) => Some(error.to_string()),
            }
        });
        let written = std::mem::take(&mut storage.state.lock().log);
        (refused, written)
    };
    let plain = make("lazy_refcounts=on");
    let (refused, written) = open(&plain, "");
    assert!(refused.is_none() && !written.is_empty(), "{refused:?}");

    // Entries with subclusters, taken for ordinary ones.
    let mut lost = make("extended_l2=on");
    let features = be64(&lost, 72);
    put(&mut lost, 72, features & !16);
    // Data that can't be where the entry says.
    let mut unaligned = plain.clone();
    let l2 = be64(&unaligned, be64(&unaligned, 40) as usize) & 0xff_ffff_ffff;
    put(&mut unaligned, l2 as usize, 0x8000_0000_0005_0200);
    for (data, options, what) in [
        (&lost, "", "Could not repair dirty image"),
        (&unaligned, "", "Could not repair dirty image"),
        (
            &plain,
            "backing.driver=file,backing.filename=/nonexistent/base",
            "/nonexistent/base",
        ),
        (&plain, "backing=nobody", "nobody"),
    ] {
        let (refused, written) = open(data, options);
        let refused = refused.unwrap_or_else(|| panic!("{what}: opened"));
        assert!(refused.contains(what), "{refused}");
        assert!(written.is_empty(), "{what}: {written:?}");
    }
}

/// Where refcounts are too low and nothing says so, the next writer gets clusters that are in use.
#[test]
fn a_check_that_leaves_corruptions_leaves_the_dirty_bit_and_a_repair_takes_it_back() {
    let rig = Rig::new();
    let mut crashed = Vec::new();
    let storage = storage::Storage::new(image_bytes("lazy_refcounts=on", SIZE));
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, 300_000, 1).await.unwrap();
        handle.flush().await.unwrap();
        crashed.clone_from(&storage.state.lock().data);
        rig.close(handle).await.unwrap();
    });
    assert!(is_dirty(&crashed));
    for (mode, clean) in [
        (None, false),
        (Some(CheckMode::ReadOnly), false),
        (Some(CheckMode::RepairLeaks), false),
        (Some(CheckMode::RepairAll), true),
    ] {
        let rig = Rig::new();
        let storage = storage::Storage::new(crashed.clone());
        rig.block_on(async {
            let how = OpenOptions {
                for_check: true,
                ..OpenOptions::default()
            };
            let handle = rig.open_storage_how(&storage, "", how).await.unwrap();
            if let Some(mode) = mode {
                // A repair of leaks may say that it can't help.
                let report = handle.check(mode, Progress::new()).await;
                assert!(!clean || report.unwrap().corruptions == 0);
            }
            rig.close(handle).await.unwrap();
        });
        let left = storage.state.lock().data.clone();
        assert_eq!(is_dirty(&left), !clean, "{mode:?}");
        if clean {
            assert_eq!(check_bytes(&storage), (0, 0));
        } else {
            // The next open that may write repairs it.
            let rig = Rig::new();
            rig.block_on(async {
                let handle = rig.open_storage(&storage, "").await.unwrap();
                write(&handle, 700_000, 100_000, 2).await.unwrap();
                let read = handle.read(0, 300_000).await.unwrap();
                assert!(read.iter().all(|byte| *byte == 1), "{mode:?}");
                rig.close(handle).await.unwrap();
            });
            assert_eq!(check_bytes(&storage), (0, 0), "{mode:?}");
        }
    }
}

/// A storage that fails to answer once says nothing about what it holds.
#[test]
fn a_passing_read_error_while_a_dirty_image_is_opened_makes_nothing_anew() {
    const CLUSTER: usize = 65536;
    let rig = Rig::new();
    for (options, refcount) in [
        ("lazy_refcounts=on", 2 * CLUSTER + 11),
        ("lazy_refcounts=on,refcount_bits=64", 2 * CLUSTER + 47),
    ] {
        let mut dirty = prepared(options, SIZE, async |handle| {
            write(handle, 0, 70_000, 1).await?;
            write(handle, 200_000, 5000, 2).await
        });
        // The dirty bit, with something for a repair to do: a refcount that is too high.
        dirty[79] |= 1;
        assert_eq!(std::mem::replace(&mut dirty[refcount], 2), 1);
        let mut refused = 0;
        for number in 0.. {
            let storage = storage::Storage::new(dirty.clone());
            storage.set_fault(storage::Fault::NthRead(number));
            let open = rig.block_on(rig.open_storage(&storage, ""));
            let failed = storage.state.lock().fault == storage::Fault::None;
            storage.set_fault(storage::Fault::None);
            match open {
                Err(error) => {
                    assert!(failed, "{error}");
                    assert_eq!(error.errno(), 5, "{error}");
                    refused += 1;
                }
                // What failed was read again afterwards.
                Ok(handle) => rig.block_on(rig.close(handle)).unwrap(),
            }
            let data = storage.state.lock().data.clone();
            let what = format!("{options}: read {number}");
            assert_eq!(data.len(), dirty.len(), "{what}: new structures");
            assert_eq!(data[48..60], dirty[48..60], "{what}: a new refcount table");
            let read = look_at(&storage, Look::Reopened, &what);
            assert!(read[..70_000].iter().all(|byte| *byte == 1), "{what}");
            if !failed {
                break;
            }
        }
        assert!(refused >= 6, "{options}: {refused} refused");
    }
}

#[test]
fn a_dirty_bit_that_may_be_gone_is_written_again_before_refcounts_stay_behind() {
    let rig = Rig::new();
    let storage = storage::Storage::new(image_bytes("lazy_refcounts=on", SIZE));
    let left = rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let dirty = || is_dirty(&storage.state.lock().data);
        write(&handle, 0, 65536, 1).await.unwrap();
        let mut set = handle.permissions();
        let writable = set;
        set.used -= block_core::Permissions::WRITE | block_core::Permissions::RESIZE;
        handle.set_permissions(set).unwrap();
        // The write that takes the bit back fails, and yet takes effect.
        storage.set_fault(storage::Fault::At(72));
        let read_only = Reopen {
            read_only: Some(true),
            ..Reopen::default()
        };
        handle.reopen(read_only).await.unwrap_err();
        storage.set_fault(storage::Fault::None);
        storage.state.lock().data[79] &= !1;
        assert!(!dirty());
        handle.set_permissions(writable).unwrap();
        write(&handle, 131072, 65536, 2).await.unwrap();
        handle.flush().await.unwrap();
        let left = storage.state.lock().data.clone();
        rig.close(handle).await.unwrap();
        assert!(!dirty());
        left
    });
    // Had the power been cut then:
    let said = is_dirty(&left);
    assert!(said || check_bytes(&storage::Storage::new(left)) == (0, 0));
    assert_eq!(check_bytes(&storage), (0, 0));
}
