//! Compressed clusters of both codecs: what the installed tools wrote is read, what is written is read by them; clusters lie
//! in guest order however many are compressed at once; damaged or hostile data fails the read of its cluster alone.

mod common;

use block_core::{BlockHandle, RequestFlags};
use common::*;
use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::SmallRng};

const COMPRESSED: RequestFlags = RequestFlags::WRITE_COMPRESSED;

/// Text-like bytes that compress to about a third, differently in each cluster.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let words: Vec<Vec<u8>> = (0..200)
        .map(|_| {
            (0..rng.random_range(2..10))
                .map(|_| rng.random_range(b'a'..=b'z'))
                .collect()
        })
        .collect();
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        bytes.extend_from_slice(&words[rng.random_range(0..words.len())]);
        bytes.push(b' ');
    }
    bytes.truncate(len);
    bytes
}

/// (guest cluster, host offset) of all compressed clusters, in guest order, as far as one L2 table goes.
fn places(image: &[u8], cluster_bits: u32) -> Vec<(u64, u64)> {
    let mask = 0x00ff_ffff_ffff_fe00;
    let l1 = be64(image, 40) as usize;
    let mut found = Vec::new();
    let entries = 1u64 << (cluster_bits - 3);
    for at in 0..u64::from(u32::from_be_bytes(image[36..40].try_into().unwrap())) {
        let table = (be64(image, l1 + 8 * at as usize) & mask) as usize;
        if table == 0 {
            continue;
        }
        for n in 0..entries {
            let place = table + 8 * n as usize;
            if place + 8 > image.len() {
                break;
            }
            let raw = be64(image, place);
            if raw & (1 << 62) != 0 {
                let bits = 70 - cluster_bits;
                found.push((at * entries + n, raw & ((1 << bits) - 1)));
            }
        }
    }
    found
}

#[test]
fn both_codecs_are_read_and_written_as_the_installed_tools_do() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let text_of = |name: &str| path(name).to_str().unwrap().to_owned();
    for codec in ["zlib", "zstd"] {
        for bits in [9, 12, 16, 21] {
            let size = 1usize << bits;
            // The last cluster is cut by the end of the disk.
            let mut raw = text(bits, size * 5 + ((size / 2) & !511));
            raw[size..size * 2].fill(0);
            let mut rng = SmallRng::seed_from_u64(7);
            rng.fill(&mut raw[size * 3..size * 4]);
            std::fs::write(path("a.raw"), &raw).unwrap();
            let options = format!("compression_type={codec},cluster_size={size}");
            qemu_img(&[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                &text_of("a.raw"),
                &text_of("theirs.qcow2"),
            ]);
            let rig = Rig::new();
            rig.block_on(async {
                let theirs = rig.open(&path("theirs.qcow2"), "").await.unwrap();
                let read = theirs.read(0, raw.len()).await.unwrap();
                assert_same(&read, &raw, &format!("{codec} {bits}: theirs"));
                // Overwritten in part: decompressed, merged, stored plainly.
                let new = text(99, size / 2);
                theirs
                    .write(size as u64 / 4, new.clone(), RequestFlags::empty())
                    .await
                    .unwrap();
                let mut changed = raw.clone();
                changed[size / 4..size / 4 + size / 2].copy_from_slice(&new);
                let read = theirs.read(0, raw.len()).await.unwrap();
                assert_same(&read, &changed, &format!("{codec} {bits}: overwritten"));
                rig.close(theirs).await.unwrap();
            });
            assert_clean(&path("theirs.qcow2"));

            create_by_qemu(&path("ours.qcow2"), &options, raw.len() as u64);
            let rig = Rig::new();
            rig.block_on(async {
                let ours = rig.open(&path("ours.qcow2"), "").await.unwrap();
                ours.write(0, raw.clone(), COMPRESSED).await.unwrap();
                // A cluster is compressed once only.
                let again = ours.write(0, raw[..size].to_vec(), COMPRESSED).await;
                assert_eq!(again.unwrap_err().errno(), 5);
                let odd = ours
                    .write(size as u64 / 2, raw[..size].to_vec(), COMPRESSED)
                    .await;
                assert_eq!(odd.unwrap_err().errno(), 22);
                rig.close(ours).await.unwrap();
            });
            assert_clean(&path("ours.qcow2"));
            let read = contents(&path("ours.qcow2"), scratch.path());
            assert_same(&read, &raw, &format!("{codec} {bits}: ours"));
        }
    }
}

#[test]
fn images_are_created_with_either_codec_and_say_so() {
    let scratch = tempfile::tempdir().unwrap();
    let rig = Rig::new();
    for codec in ["zlib", "zstd"] {
        let path = scratch.path().join(format!("{codec}.qcow2"));
        let name = path.to_str().unwrap();
        let options = format!("size=1M,compression_type={codec}");
        rig.block_on(async {
            let options = block_core::Options::from_dotted(&options).unwrap();
            rig.registry
                .create(&rig.graph, "qcow2", name, options)
                .await
                .unwrap();
            let handle = rig.open(&path, "").await.unwrap();
            let info = handle.info().await.unwrap();
            assert_eq!(info.format_specific.unwrap().1["compression-type"], codec);
            handle.write(0, text(1, 1 << 20), COMPRESSED).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_clean(&path);
        let info = qemu_img(&["info", "--output=json", name]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["format-specific"]["data"]["compression-type"], codec);
        assert_same(&contents(&path, scratch.path()), &text(1, 1 << 20), codec);
    }
}

#[test]
fn clusters_that_are_compressed_side_by_side_lie_in_the_order_of_the_disk() {
    const CLUSTER: usize = 65536;
    let size = 12 << 20;
    let raw = text(3, size);
    let storage = storage::Storage::new(image_bytes("cluster_size=65536", size as u64));
    storage.set_dawdle(20);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        // Requests of different lengths, all in flight at once.
        let mut writes = Vec::new();
        let mut at = 0;
        while at < size {
            let len = (CLUSTER * (1 + at / CLUSTER % 7)).min(size - at);
            let data = raw[at..at + len].to_vec();
            writes.push(handle.write(at as u64, data, COMPRESSED));
            at += len;
        }
        for done in join_all(writes).await {
            done.unwrap();
        }
        assert_same(&handle.read(0, size).await.unwrap(), &raw, "read back");
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
    let state = storage.state.lock();
    let places = places(&state.data, 16);
    assert_eq!(places.len(), size / CLUSTER);
    assert!(
        places.is_sorted_by_key(|(_, host)| *host),
        "guest order is host order: {places:x?}"
    );
}

/// qemu-io 10.0.2 goes on filling the cluster that it put compressed data in last, even when that has been freed and is
/// somebody else's: the second owner's data is gone.
#[test]
fn compressed_data_stays_out_of_a_cluster_that_was_freed_and_has_a_new_owner() {
    const SIZE: u64 = 1 << 16;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    std::fs::write(&path, image_bytes("cluster_size=64k", 16 * SIZE)).unwrap();
    let rig = Rig::new();
    let host_of_second = || {
        let image = std::fs::read(&path).unwrap();
        let mask = 0x00ff_ffff_ffff_fe00;
        let table = be64(&image, be64(&image, 40) as usize) & mask;
        be64(&image, table as usize + 8) & mask
    };
    rig.block_on(async {
        let handle = rig.open(&path, "").await.unwrap();
        let compressed = vec![1; SIZE as usize];
        handle.write(0, compressed, COMPRESSED).await.unwrap();
        handle.flush().await.unwrap();
        let (_, packed) = places(&std::fs::read(&path).unwrap(), 16)[0];
        write(&handle, 0, SIZE, 2).await.unwrap();
        handle.flush().await.unwrap();
        write(&handle, SIZE, SIZE, 3).await.unwrap();
        handle.flush().await.unwrap();
        assert_eq!(
            host_of_second(),
            packed / SIZE * SIZE,
            "not the case that is meant"
        );
        let compressed = vec![4; SIZE as usize];
        handle
            .write(2 * SIZE, compressed, COMPRESSED)
            .await
            .unwrap();
        handle.flush().await.unwrap();
        for (cluster, value) in [(0, 2), (1, 3), (2, 4)] {
            let read = handle.read(cluster * SIZE, SIZE as usize).await.unwrap();
            assert_same(&read, &vec![value; SIZE as usize], "what was written");
        }
        rig.close(handle).await.unwrap();
    });
    assert_clean(&path);
}

#[test]
fn compressed_writes_beside_other_requests_lose_nothing() {
    for (seed, options) in [
        (1, "cluster_size=4096"),
        (2, "cluster_size=4096,compression_type=zstd"),
    ] {
        let storage = storage::Storage::new(image_bytes(options, 8 << 20));
        storage.set_dawdle(12);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig
                .open_storage(&storage, "l2-cache-size=8k,l2-cache-entry-size=512")
                .await
                .unwrap();
            let packed = text(seed, 4 << 20);
            let compress = async {
                let writes = (0..64).map(|n| {
                    let at = n * 65536;
                    handle.write(at as u64, packed[at..at + 65536].to_vec(), COMPRESSED)
                });
                join_all(writes)
                    .await
                    .into_iter()
                    .for_each(|done| done.unwrap());
            };
            let plain = guest(&handle, 4 << 20, seed);
            let (disk, ()) = futures::join!(plain, compress);
            assert_same(
                &handle.read(0, 4 << 20).await.unwrap(),
                &packed,
                "compressed",
            );
            assert_same(
                &handle.read(4 << 20, 4 << 20).await.unwrap(),
                &disk,
                "plain",
            );
            // Discarded and compressed anew: space in clusters that were shared is used again.
            handle.discard(0, 2 << 20).await.unwrap();
            handle
                .write(0, packed[..2 << 20].to_vec(), COMPRESSED)
                .await
                .unwrap();
            assert_same(&handle.read(0, 4 << 20).await.unwrap(), &packed, "again");
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "{options}");
    }
}

/// Random plain requests in the second half of the disk; what it holds in the end.
async fn guest(handle: &BlockHandle, start: u64, seed: u64) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut disk = vec![0; 4 << 20];
    for _ in 0..200 {
        let len = rng.random_range(1..=16) * 512;
        let at = rng.random_range(0..(disk.len() - len) / 512) * 512;
        if rng.random_bool(0.8) {
            let data = pattern(&mut rng, len);
            handle
                .write(start + at as u64, data.clone(), RequestFlags::empty())
                .await
                .unwrap();
            disk[at..at + len].copy_from_slice(&data);
        } else {
            let (at, len) = (at & !4095, 8192.min(disk.len() - (at & !4095)));
            handle.discard(start + at as u64, len as u64).await.unwrap();
            disk[at..at + len].fill(0);
        }
    }
    disk
}

#[test]
fn damaged_compressed_data_fails_the_read_of_its_cluster_alone() {
    for codec in ["zlib", "zstd"] {
        let options = format!("cluster_size=65536,compression_type={codec}");
        let storage = storage::Storage::new(image_bytes(&options, 4 << 16));
        let raw = text(5, 4 << 16);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            handle.write(0, raw.clone(), COMPRESSED).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        let place = places(&storage.state.lock().data, 16)[1].1 as usize;
        // A zip bomb: a frame that says it holds a terabyte, and a deflate block that is nothing but garbage.
        let bomb: &[u8] = match codec {
            "zstd" => &[
                0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0xf8, 0, 0, 0, 0, 0, 1, 0, 0, 0,
            ],
            _ => &[0xff; 16],
        };
        storage.state.lock().data[place..place + bomb.len()].copy_from_slice(bomb);
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            for n in [0, 2, 3] {
                let read = handle.read(n << 16, 1 << 16).await.unwrap();
                assert_same(&read, &raw[n as usize * 65536..][..65536], "a neighbour");
            }
            let error = handle.read(1 << 16, 1 << 16).await.unwrap_err();
            assert_eq!(error.errno(), 5, "{codec}: {error}");
            // A write in part needs the old content, one over the whole cluster doesn't.
            let part = handle
                .write(1 << 16, vec![1; 512], RequestFlags::empty())
                .await;
            assert_eq!(part.unwrap_err().errno(), 5);
            handle
                .write(1 << 16, vec![1; 65536], RequestFlags::empty())
                .await
                .unwrap();
            assert_same(
                &handle.read(1 << 16, 1 << 16).await.unwrap(),
                &vec![1; 65536],
                codec,
            );
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "{codec}");
    }
}
