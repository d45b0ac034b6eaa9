//! Images that lack a part of their metadata: the end of the L1 table, which was never written and is none (check calls that clean), or the
//! refcounts, which nobody needs who only reads.

mod common;

use block_core::{PermissionSet, Permissions, driver::Reopen};
use common::{
    storage::{Fault, Storage},
    *,
};

#[test]
fn an_l1_table_whose_last_cluster_is_not_there_yet_is_read_and_written() {
    const DISK: u64 = 5 << 20;
    for options in ["cluster_size=512", "cluster_size=512,compat=0.10"] {
        let mut data = image_bytes(options, DISK);
        let entries = u32::from_be_bytes(data[36..40].try_into().unwrap()) as usize;
        let l1 = be64(&data, 40) as usize;
        let clusters = (entries * 8).div_ceil(512);
        assert!(clusters == 3 && l1 + 1536 >= data.len(), "{options}");
        data.truncate(l1 + 1024);
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.qcow2");
        std::fs::write(&path, &data).unwrap();
        assert_clean(&path);

        let storage = Storage::new(data);
        assert_eq!(check_bytes(&storage), (0, 0), "{options}");
        let rig = Rig::new();
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
            let disk = handle.read(0, DISK as usize).await.unwrap();
            assert!(disk.iter().all(|byte| *byte == 0));
            rig.close(handle).await.unwrap();
            let handle = rig.open_storage(&storage, "").await.unwrap();
            write(&handle, 0, DISK, 7).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        assert_eq!(check_bytes(&storage), (0, 0), "{options}");
        std::fs::write(&path, &storage.state.lock().data).unwrap();
        assert_clean(&path);
        let disk = contents(&path, scratch.path());
        assert!(
            disk.len() as u64 == DISK && disk.iter().all(|byte| *byte == 7),
            "{options}"
        );

        // Two clusters missing are a hole in what is known of the disk.
        let mut data = image_bytes(options, DISK);
        data.truncate(l1 + 511);
        let error = rig.block_on(rig.open_storage(&Storage::new(data), "read-only=on"));
        assert_eq!(error.unwrap_err().field().unwrap().name, "l1_table_offset");
    }
}

fn for_writing() -> Reopen {
    Reopen {
        read_only: Some(false),
        options: serde_json::Map::new(),
    }
}

#[test]
fn what_is_only_read_needs_no_refcounts() {
    const DISK: u64 = 1 << 20;
    let full = Storage::new(image_bytes("compat=1.1", DISK));
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&full, "").await.unwrap();
        write(&handle, 0, DISK, 7).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let good = full.state.lock().data.clone();
    let table = be64(&good, 48);
    for beyond in [true, false] {
        let mut data = good.clone();
        if beyond {
            data[48..56].copy_from_slice(&(1_u64 << 40).to_be_bytes());
        }
        let storage = Storage::new(data);
        storage.set_fault(Fault::At(table));
        rig.block_on(async {
            let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
            let disk = handle.read(0, DISK as usize).await.unwrap();
            assert!(disk.iter().all(|byte| *byte == 7));
            // To be written to it has to have them.
            let refused = handle.reopen(for_writing()).await.unwrap_err();
            assert_eq!(
                refused
                    .field()
                    .is_some_and(|field| field.name == "refcount_table_offset"),
                beyond,
                "{refused}"
            );
            assert!(write(&handle, 0, 512, 1).await.is_err());
            let disk = handle.read(0, DISK as usize).await.unwrap();
            assert!(disk.iter().all(|byte| *byte == 7));
            rig.close(handle).await.unwrap();
            assert!(rig.open_storage(&storage, "").await.is_err());

            // Without the fault they are there again.
            storage.set_fault(Fault::None);
            if !beyond {
                let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
                handle.reopen(for_writing()).await.unwrap();
                let all = PermissionSet::new(Permissions::all(), Permissions::all());
                handle.set_permissions(all).unwrap();
                write(&handle, 0, 4096, 8).await.unwrap();
                rig.close(handle).await.unwrap();
            }
        });
        if !beyond {
            assert_eq!(check_bytes(&storage), (0, 0));
        }
    }
}
