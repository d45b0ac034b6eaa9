//! Amending: every pair of values, checked by the installed qemu-img; what can't be is refused with nothing changed; a power
//! cut between any two writes leaves the image as it was or as it was to be.

mod common;

use block_core::{BlockHandle, ErrorKind, Options, RequestFlags, Result, image::Progress};
use common::{
    cuts::{Look, prepared, record},
    *,
};

const SIZE: u64 = 1 << 20;

async fn amend(handle: &BlockHandle, options: &str) -> Result<()> {
    let options = Options::from_dotted(options)?;
    handle.amend(options, false, Progress::new()).await
}

/// Data, zero clusters of both kinds, holes.
async fn fill(handle: &BlockHandle) -> Result<()> {
    write(handle, 0, 300_000, 1).await?;
    handle
        .write_zeroes(100_000, 90_000, RequestFlags::empty())
        .await?;
    handle
        .write_zeroes(500_000, 200_000, RequestFlags::MAY_UNMAP)
        .await?;
    write(handle, 900_000, 10_000, 2).await
}

fn expected() -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    disk[..300_000].fill(1);
    disk[100_000..190_000].fill(0);
    disk[900_000..910_000].fill(2);
    disk
}

fn info(path: &std::path::Path) -> serde_json::Value {
    let text = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    serde_json::from_str(&text).unwrap()
}

#[test]
fn every_pair_of_values_makes_an_image_that_qemu_img_finds_clean_and_reads_the_same() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let sets = [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,refcount_bits=1",
        "compat=1.1,refcount_bits=8,lazy_refcounts=on",
        "compat=1.1,refcount_bits=64,lazy_refcounts=off",
        "compat=1.1,refcount_bits=16,lazy_refcounts=on",
    ];
    for from in sets {
        for to in sets {
            let cluster = if to.contains("64") || from.contains('8') {
                512
            } else {
                4096
            };
            let options = format!("{from},cluster_size={cluster}");
            std::fs::write(&path, prepared(&options, SIZE, fill)).unwrap();
            // Version 2 has other defaults than what the image may have.
            let to = match to {
                "compat=0.10" => "compat=0.10,refcount_bits=16",
                other => other,
            };
            rig.block_on(async {
                let handle = rig.open(&path, "").await.unwrap();
                amend(&handle, to).await.unwrap();
                let downgraded = from != "compat=0.10" && to.starts_with("compat=0.10");
                if downgraded {
                    let error = handle.read(0, 512).await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::NoMedium, "{error}");
                } else {
                    // The open image goes on.
                    write(&handle, 400_000, 5000, 0).await.unwrap();
                    let disk = handle.read(0, SIZE as usize).await.unwrap();
                    assert_same(&disk, &expected(), "still open");
                }
                rig.close(handle).await.unwrap();
            });
            let what = format!("from {options} to {to}");
            assert_clean(&path);
            assert_same(&contents(&path, scratch.path()), &expected(), &what);
            let data = info(&path)["format-specific"]["data"].clone();
            for pair in to.split(',') {
                let (key, value) = pair.split_once('=').unwrap();
                let found = match key {
                    "compat" => data["compat"].as_str().unwrap().to_owned(),
                    "refcount_bits" => data["refcount-bits"].to_string(),
                    _ if data["lazy-refcounts"] == true => "on".to_owned(),
                    _ => "off".to_owned(),
                };
                assert_eq!(found, value, "{what}: {key}");
            }
        }
    }
}

#[test]
fn zero_clusters_over_a_backing_file_become_data_and_stay_zeroes() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let (base, path) = (scratch.path().join("base"), scratch.path().join("a.qcow2"));
    let (base_name, name) = (base.to_str().unwrap(), path.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", base_name, "1M"]);
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 9 0 1M", base_name],
    );
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        base_name,
        "-F",
        "qcow2",
        name,
    ]);
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        fill(&handle).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let before = contents(&path, scratch.path());
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        amend(&handle, "compat=v2").await.unwrap();
        rig.close(handle).await.unwrap();
    });
    assert_clean(&path);
    assert_same(&contents(&path, scratch.path()), &before, "as version 2");
    assert_eq!(info(&path)["format-specific"]["data"]["compat"], "0.10");
    assert_eq!(info(&path)["backing-filename"], base_name);
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        amend(&handle, "compat=v3,size=2M").await.unwrap();
        assert_eq!(handle.length(), 2 << 20);
        rig.close(handle).await.unwrap();
    });
    assert_clean(&path);
    let after = contents(&path, scratch.path());
    assert_same(&after[..1 << 20], &before, "as version 3 again");
    assert!(after[1 << 20..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_cant_be_is_refused_in_qemus_words_with_nothing_changed() {
    let rig = Rig::new();
    for (made, wanted, message) in [
        ("compat=0.10", "compat=9", "Unknown compatibility level 9"),
        (
            "compat=0.10",
            "lazy_refcounts=on",
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
        ),
        (
            "compat=0.10",
            "refcount_bits=8",
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or \
             greater)",
        ),
        (
            "refcount_bits=8",
            "compat=0.10",
            "compat=0.10 requires refcount_bits=16",
        ),
        (
            "compat=1.1",
            "refcount_bits=3",
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            "compat=1.1",
            "data_file=x",
            "data-file can only be set for images that use an external data file",
        ),
        (
            "compat=1.1",
            "data_file_raw=on",
            "data-file-raw cannot be set on existing images",
        ),
        (
            "compat=1.1",
            "size=1000",
            "The new size must be a multiple of 512",
        ),
        ("compat=1.1", "nonsense=1", "Invalid parameter 'nonsense'"),
    ] {
        let image = image_bytes(made, SIZE);
        let storage = storage::Storage::new(image.clone());
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            // What goes with it isn't done either.
            let options = match wanted {
                "compat=9" | "compat=0.10" | "lazy_refcounts=on" | "refcount_bits=8" => {
                    wanted.to_owned()
                }
                other => format!("{other},lazy_refcounts=on"),
            };
            let error = amend(&handle, &options).await.unwrap_err();
            assert_eq!(error.reason(), message);
            rig.close(handle).await.unwrap();
        });
        assert_eq!(storage.state.lock().data, image, "{made}: {wanted}");
    }
    // Packed compressed clusters share a host cluster.
    let storage = storage::Storage::new(image_bytes("compat=1.1", SIZE));
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for n in 0..6 {
            handle
                .write(
                    n << 16,
                    vec![n as u8 + 1; 65536],
                    RequestFlags::WRITE_COMPRESSED,
                )
                .await
                .unwrap();
        }
        let error = amend(&handle, "refcount_bits=2").await.unwrap_err();
        assert!(
            error.reason().starts_with(
                "Cannot decrease refcount entry width to 2 bits: Cluster at offset 0x"
            ) && error.reason().ends_with("has a refcount of 6"),
            "{error}"
        );
        amend(&handle, "refcount_bits=4").await.unwrap();
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn a_power_cut_during_an_amend_leaves_the_old_or_the_new_image_and_only_leaks() {
    for (made, wanted) in [
        ("compat=0.10,cluster_size=512", "compat=1.1"),
        (
            "compat=0.10,cluster_size=4096",
            "compat=1.1,refcount_bits=64,size=2M",
        ),
        ("compat=1.1,cluster_size=512", "compat=0.10"),
        ("compat=1.1,cluster_size=4096", "compat=0.10"),
        ("cluster_size=512", "refcount_bits=1"),
        (
            "cluster_size=512,refcount_bits=1",
            "refcount_bits=64,lazy_refcounts=on",
        ),
        (
            "cluster_size=4096,lazy_refcounts=on",
            "lazy_refcounts=off,refcount_bits=32",
        ),
    ] {
        let start = prepared(made, SIZE, fill);
        let lazy = made.contains("lazy");
        let done = record(start, "", async |handle| {
            if lazy {
                // It is dirty when the amend begins.
                write(handle, 900_000, 10_000, 2).await?;
            }
            amend(handle, wanted).await
        });
        let what = format!("{made} to {wanted}");
        let look = if lazy { Look::Reopened } else { Look::AsItIs };
        let expected = expected();
        done.cut(&what, look, 60, |disk, what| {
            for (at, byte) in disk.iter().enumerate() {
                let wanted = expected.get(at).copied().unwrap_or(0);
                assert_eq!(*byte, wanted, "{what}: {at:#x}");
            }
        });
    }
}

#[test]
fn guest_requests_wait_for_an_amend_and_go_on_after_it() {
    let rig = Rig::new();
    let storage = storage::Storage::new(prepared("cluster_size=512", SIZE, fill));
    storage.set_dawdle(6);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let guest = async {
            for n in 0..200u64 {
                let at = 300_032 + n * 512;
                write(&handle, at, 512, (n % 250) as u8 + 1).await.unwrap();
            }
        };
        let amends = async {
            for options in [
                "refcount_bits=64",
                "lazy_refcounts=on",
                "refcount_bits=1",
                "refcount_bits=8",
            ] {
                amend(&handle, options).await.unwrap();
            }
        };
        futures::join!(guest, amends);
        // Snapshots count as wide as the image does by now.
        for name in ["one", "two"] {
            let taken = handle.snapshot_create(named(name), Progress::new());
            taken.await.unwrap();
            write(&handle, 0, 4096, 1).await.unwrap();
        }
        let gone = block_core::SnapshotKey::IdOrName("one".into());
        handle.snapshot_delete(gone, Progress::new()).await.unwrap();
        let read = handle.read(300_032, 200 * 512).await.unwrap();
        for (n, block) in read.chunks(512).enumerate() {
            assert!(block.iter().all(|byte| *byte == (n % 250) as u8 + 1));
        }
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// An image whose header's cluster is full to the last byte with an extension that nobody knows.
fn with_full_header() -> Vec<u8> {
    let mut image = image_bytes("cluster_size=512", 1 << 20);
    let start = be64(&image, 96) as u32 as usize;
    assert!((104..=112).contains(&start), "{start}");
    image[start..512].fill(0x5a);
    image[start..start + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    let len = 512 - start as u32 - 8;
    image[start + 4..start + 8].copy_from_slice(&len.to_be_bytes());
    image
}

#[test]
fn a_full_header_leaves_room_for_another_width_of_refcounts_and_nothing_half_done() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("a.qcow2");
    let start = with_full_header();
    std::fs::write(&image, &start).unwrap();
    let rig = Rig::new();
    let amend = |text: &str| {
        let options = Options::from_dotted(text).unwrap();
        rig.block_on(async {
            let handle = rig.open(&image, "").await.unwrap();
            let amended = handle.amend(options, false, Progress::new()).await;
            rig.close(handle).await.unwrap();
            amended
        })
    };
    let error = amend("lazy_refcounts=on,refcount_bits=64").unwrap_err();
    assert!(std::fs::read(&image).unwrap() == start, "{error}");
    assert!(error.to_string().contains("header"), "{error}");
    amend("refcount_bits=32").unwrap();
    assert_clean(&image);
    let end = std::fs::read(&image).unwrap();
    assert_eq!(end[96..100], 5u32.to_be_bytes());
    assert!(end[112..512] == start[112..512]);
}
