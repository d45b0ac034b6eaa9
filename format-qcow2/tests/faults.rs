//! Full storage, failing I/O, damaged metadata: clear errors, and nothing that was written before is lost.

mod common;

use block_core::{ErrorKind, RequestFlags, driver::Reopen};
use common::{
    storage::{Fault, Storage},
    *,
};
use std::sync::Arc;

const C: u64 = 65536;

fn cluster(value: u8) -> Vec<u8> {
    vec![value; C as usize]
}

fn fresh(options: &str, clusters: u64) -> Arc<Storage> {
    Storage::new(image_bytes(options, clusters * C))
}

#[test]
fn a_full_disk_fails_the_write_and_loses_nothing() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        for n in 0..8 {
            handle
                .write(n * C, cluster(n as u8 + 1), RequestFlags::empty())
                .await
                .unwrap();
        }
        handle.flush().await.unwrap();
        let full = storage.state.lock().data.len() as u64;
        storage.set_fault(Fault::Full(full));
        let error = handle
            .write(20 * C, cluster(9), RequestFlags::empty())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        // What is there may be overwritten, and freed space be used again before ENOSPC is reported.
        handle
            .write(3 * C, cluster(33), RequestFlags::empty())
            .await
            .unwrap();
        handle.discard(5 * C, C).await.unwrap();
        handle
            .write(20 * C, cluster(9), RequestFlags::empty())
            .await
            .unwrap();
        assert!(counter(&handle, "reclaims") > 0);
        let error = handle
            .write(21 * C, cluster(9), RequestFlags::empty())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        for (n, value) in [(0, 1), (3, 33), (5, 0), (7, 8), (20, 9), (21, 0)] {
            assert_eq!(
                handle.read(n * C, C as usize).await.unwrap()[..],
                cluster(value)[..],
                "{n}"
            );
        }
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn a_failed_write_leaves_the_old_content_and_a_clean_image() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle
            .write(0, cluster(1), RequestFlags::empty())
            .await
            .unwrap();
        storage.set_fault(Fault::Writes);
        for at in [C, 40 * C + 5] {
            let error = handle
                .write(at, vec![2; 700], RequestFlags::empty())
                .await
                .unwrap_err();
            assert_eq!(error.errno(), 5);
        }
        assert!(handle.flush().await.is_err());
        storage.set_fault(Fault::None);
        assert_eq!(handle.read(C, 700).await.unwrap()[..], [0; 700]);
        assert_eq!(
            handle.read(0, C as usize).await.unwrap()[..],
            cluster(1)[..]
        );
        handle
            .write(2 * C, cluster(3), RequestFlags::empty())
            .await
            .unwrap();
        let _ = handle.close().await;
        let _ = rig.graph.close_all().await;
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

#[test]
fn after_a_failed_flush_every_flush_fails_until_the_image_is_reopened() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle
            .write(0, cluster(1), RequestFlags::empty())
            .await
            .unwrap();
        handle.flush().await.unwrap();
        handle
            .write(C, cluster(2), RequestFlags::empty())
            .await
            .unwrap();
        storage.set_fault(Fault::Flushes);
        assert!(handle.flush().await.is_err());
        storage.set_fault(Fault::None);
        assert!(
            handle.flush().await.is_err(),
            "a lost write isn't retried into success"
        );
        let node = handle.node();
        rig.graph.reopen(&node, Reopen::default()).await.unwrap();
        let file = node.edges().iter().next().unwrap().child.node().clone();
        let _ = rig.graph.reopen(&file, Reopen::default()).await;
        assert_eq!(
            handle.read(0, C as usize).await.unwrap()[..],
            cluster(1)[..]
        );
        drop(node);
        let _ = handle.close().await;
        let _ = rig.graph.close_all().await;
    });
    let (corruptions, _) = check_bytes(&storage);
    assert_eq!(corruptions, 0);
}

/// The offset of the L2 table of an image with one.
fn l2_offset(data: &[u8]) -> usize {
    let be = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap());
    let l1 = be(40) as usize;
    (be(l1) & 0x00ff_ffff_ffff_fe00) as usize
}

fn with_one_cluster() -> Arc<Storage> {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64);
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        handle
            .write(0, cluster(1), RequestFlags::empty())
            .await
            .unwrap();
        rig.close(handle).await.unwrap();
    });
    storage
}

#[test]
fn an_impossible_entry_shuts_a_writable_image_and_marks_it_corrupt() {
    let storage = with_one_cluster();
    {
        let data = &mut storage.state.lock().data;
        let at = l2_offset(data) + 8;
        data[at..at + 8].copy_from_slice(&0x8000_0000_0005_0200u64.to_be_bytes());
    }
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
        for _ in 0..2 {
            assert_eq!(handle.read(C, 512).await.unwrap_err().errno(), 5);
        }
        assert_eq!(handle.read(0, 512).await.unwrap()[..], [1; 512]);
        rig.close(handle).await.unwrap();
        assert_eq!(
            storage.state.lock().data[79],
            0,
            "read-only: nothing is written"
        );

        let handle = rig.open_storage(&storage, "").await.unwrap();
        let error = handle
            .write(C, cluster(2), RequestFlags::empty())
            .await
            .unwrap_err();
        assert_eq!(error.errno(), 5, "{error}");
        assert!(error.to_string().contains("unaligned"), "{error}");
        assert_eq!(
            handle.read(0, 512).await.unwrap_err().kind(),
            ErrorKind::NoMedium
        );
        assert_eq!(storage.state.lock().data[79], 2, "the corrupt bit");
        let _ = handle.close().await;
        let _ = rig.graph.close_all().await;
        let error = rig.open_storage(&storage, "").await.unwrap_err();
        assert!(error.to_string().contains("Image is corrupt"), "{error}");
    });
}

#[test]
fn freeing_a_cluster_whose_refcount_is_0_is_caught_when_it_happens() {
    let storage = with_one_cluster();
    {
        let data = &mut storage.state.lock().data;
        let be = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap());
        let host = be(l2_offset(data)) & 0x00ff_ffff_ffff_fe00;
        let table = be(48) as usize;
        let block = be(table) as usize;
        let at = block + 2 * (host / C) as usize;
        data[at..at + 2].copy_from_slice(&[0, 0]);
    }
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        let error = handle.discard(0, C).await.unwrap_err();
        assert_eq!(error.errno(), 5, "{error}");
        assert!(error.to_string().contains("refcount is 0"), "{error}");
        assert!(counter(&handle, "ownership-violations-caught") > 0);
        let error = handle
            .write(C, cluster(2), RequestFlags::empty())
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMedium);
        assert_eq!(storage.state.lock().data[79], 2, "the corrupt bit");
        let _ = handle.close().await;
        let _ = rig.graph.close_all().await;
    });
}

#[test]
fn data_is_never_written_over_metadata_that_an_entry_points_to() {
    for act in ["write", "discard", "zero then write"] {
        let storage = with_one_cluster();
        let before = {
            let data = &mut storage.state.lock().data;
            let be = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap());
            let l1 = be(40) | 1 << 63;
            let at = l2_offset(data) + 8;
            data[at..at + 8].copy_from_slice(&l1.to_be_bytes());
            data.clone()
        };
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "").await.unwrap();
            handle.read(0, 512).await.unwrap();
            let result = match act {
                "write" => handle.write(C, vec![2; 512], RequestFlags::empty()).await,
                "discard" => handle.discard(C, C).await,
                _ => {
                    handle
                        .write_zeroes(C, C, RequestFlags::empty())
                        .await
                        .unwrap();
                    handle.write(C, vec![2; 512], RequestFlags::empty()).await
                }
            };
            let error = result.unwrap_err();
            assert_eq!(error.errno(), 5, "{act}: {error}");
            assert!(
                error.to_string().contains("overlap") || error.to_string().contains("metadata")
            );
            let _ = handle.close().await;
            let _ = rig.graph.close_all().await;
        });
        let after = storage.state.lock().data.clone();
        let l1 = u64::from_be_bytes(before[40..48].try_into().unwrap()) as usize;
        assert_eq!(
            after[l1..l1 + 512],
            before[l1..l1 + 512],
            "{act}: the L1 table"
        );
        assert_eq!(after[79], 2, "{act}: the corrupt bit");
    }
}

#[test]
fn with_lazy_refcounts_the_dirty_bit_is_there_from_the_first_allocation_to_the_close() {
    let rig = Rig::new();
    let storage = fresh("lazy_refcounts=on", 64);
    let crashed = rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        assert_eq!(storage.state.lock().data[79], 0);
        handle
            .write(0, cluster(1), RequestFlags::empty())
            .await
            .unwrap();
        assert_eq!(storage.state.lock().data[79], 1, "dirty");
        handle.flush().await.unwrap();
        let crashed = storage.state.lock().data.clone();
        rig.close(handle).await.unwrap();
        assert_eq!(storage.state.lock().data[79], 0, "clean");
        crashed
    });
    assert_eq!(check_bytes(&storage), (0, 0));
    // As if the program had died before: the next writable open repairs.
    let storage = Storage::new(crashed);
    {
        let data = &mut storage.state.lock().data;
        let be = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap());
        let host = be(l2_offset(data)) & 0x00ff_ffff_ffff_fe00;
        let block = be(be(48) as usize) as usize;
        let at = block + 2 * (host / C) as usize;
        data[at..at + 2].copy_from_slice(&[0, 0]);
    }
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
        rig.close(handle).await.unwrap();
        assert_eq!(
            storage.state.lock().data[79],
            1,
            "a read-only open does nothing"
        );
        let handle = rig.open_storage(&storage, "").await.unwrap();
        assert_eq!(storage.state.lock().data[79], 0, "repaired");
        assert_eq!(
            handle.read(0, C as usize).await.unwrap()[..],
            cluster(1)[..]
        );
        handle
            .write(C, cluster(2), RequestFlags::empty())
            .await
            .unwrap();
        rig.close(handle).await.unwrap();
    });
    assert_eq!(check_bytes(&storage), (0, 0));
}

/// An image whose first two clusters lie apart in the file, and where the first of them is.
async fn two_pieces(rig: &Rig, storage: &Arc<Storage>) -> (block_core::BlockHandle, u64) {
    let handle = rig.open_storage(storage, "").await.unwrap();
    for (at, value) in [(1, 2), (5, 3), (0, 1)] {
        let none = RequestFlags::empty();
        handle.write(at * C, cluster(value), none).await.unwrap();
    }
    handle.flush().await.unwrap();
    let data = &storage.state.lock().data;
    let mut clusters = data.chunks(C as usize);
    let place = clusters.position(|bytes| bytes == cluster(1));
    (handle, place.expect("it was written") as u64 * C)
}

#[test]
fn a_read_whose_first_piece_fails_while_the_last_is_looked_up_fails() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64);
    rig.block_on(async {
        let (handle, place) = two_pieces(&rig, &storage).await;
        storage.set_fault(Fault::At(place));
        let error = handle.read(0, 2 * C as usize).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        storage.set_fault(Fault::None);
        let bytes = handle.read(0, 2 * C as usize).await.unwrap();
        assert!(bytes[..C as usize] == cluster(1) && bytes[C as usize..] == cluster(2));
        rig.close(handle).await.unwrap();
    });
}

#[test]
fn a_write_whose_first_piece_fails_while_the_last_is_looked_up_fails() {
    let rig = Rig::new();
    let storage = fresh("cluster_size=65536", 64);
    rig.block_on(async {
        let (handle, place) = two_pieces(&rig, &storage).await;
        storage.set_fault(Fault::At(place));
        let both = vec![9; 2 * C as usize];
        let none = RequestFlags::empty();
        let error = handle.write(0, both, none).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        storage.set_fault(Fault::None);
        let first = handle.read(0, C as usize).await.unwrap();
        assert!(first[..] == cluster(1));
        rig.close(handle).await.unwrap();
    });
}
