//! A power cut after every write that taking, applying and deleting a snapshot makes: the image is as it was or as it was to be,
//! with not even a leak.

mod common;

use std::path::Path;

use block_core::{BlockHandle, RequestFlags, SnapshotKey, image::Progress};
use common::{
    cuts::after_cut,
    storage::{Event, Storage},
    *,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const SIZE: u64 = 512 << 10;

/// What an image holds: its disk, and its snapshots by name.
#[derive(Clone, PartialEq)]
struct State {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl State {
    fn describe(&self) -> String {
        let names: Vec<&str> = self.snapshots.iter().map(|(name, _)| &**name).collect();
        format!("disk {:x?}…, snapshots {names:?}", &self.disk[..4])
    }
}

async fn read_all(handle: &BlockHandle) -> Vec<u8> {
    let len = handle.length() as usize;
    handle.read(0, len).await.unwrap().to_vec()
}

fn read_state(data: &[u8]) -> State {
    let rig = Rig::new();
    let storage = Storage::new(data.to_vec());
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "read-only=on").await.unwrap();
        let disk = read_all(&handle).await;
        let listed = handle.snapshot_list().await.unwrap();
        let report = checked(&handle).await;
        assert!(report.is_clean(), "{:?}", report.findings);
        rig.close(handle).await.unwrap();
        let mut snapshots = Vec::new();
        for info in listed {
            let options = format!("read-only=on,snapshot-id={}", info.id);
            let handle = rig.open_storage(&storage, &options).await.unwrap();
            snapshots.push((info.name, read_all(&handle).await));
            rig.close(handle).await.unwrap();
        }
        State { disk, snapshots }
    })
}

/// Not even a leak, says the installed qemu-img.
fn assert_sound(data: &[u8], scratch: &Path, what: &str) {
    let path = scratch.join("cut.qcow2");
    std::fs::write(&path, data).unwrap();
    let output = run(
        "qemu-img",
        &["check", "-f", "qcow2", path.to_str().unwrap()],
    );
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{what}: {text}");
}

/// Some life, so that clusters are shared, compressed, zero and free.
async fn live(handle: &BlockHandle, rng: &mut SmallRng, cluster: u64) {
    for _ in 0..12 {
        let at = rng.random_range(0..SIZE / cluster) * cluster;
        let len = (rng.random_range(1..=8) * cluster).min(SIZE - at);
        match rng.random_range(0..10) {
            0..6 => write(handle, at, len, rng.random_range(1..=255))
                .await
                .unwrap(),
            6 => handle.discard(at, len).await.unwrap(),
            7 => {
                let flags = RequestFlags::empty();
                handle.write_zeroes(at, len, flags).await.unwrap();
            }
            _ => {
                let data = vec![rng.random_range(1..=255); cluster as usize];
                let _ = handle.write(at, data, RequestFlags::WRITE_COMPRESSED).await;
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Create,
    Apply,
    Delete,
}

/// Says how many cuts came before and how many after the switch.
fn cut_everywhere(options: &str, open: &str, operation: Operation, seed: u64) -> (u64, u64) {
    let what = format!("{options}, {operation:?}, seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let storage = Storage::new(image_bytes(options, SIZE));
    let cluster = 1 << u32::from_be_bytes(storage.state.lock().data[20..24].try_into().unwrap());
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, open).await.unwrap();
        for name in ["a", "b"] {
            live(&handle, &mut rng, cluster).await;
            handle
                .snapshot_create(named(name), Progress::new())
                .await
                .unwrap();
        }
        live(&handle, &mut rng, cluster).await;
        rig.close(handle).await.unwrap();
    });
    let start = storage.state.lock().data.clone();
    let before = read_state(&start);
    storage.state.lock().keep_log = true;
    rig.block_on(async {
        let handle = rig.open_storage(&storage, open).await.unwrap();
        let key = SnapshotKey::Name("a".into());
        let progress = Progress::new();
        match operation {
            Operation::Create => handle.snapshot_create(named("c"), progress).await.map(drop),
            Operation::Apply => handle.snapshot_apply(key, progress).await,
            Operation::Delete => handle.snapshot_delete(key, progress).await,
        }
        .unwrap();
        rig.close(handle).await.unwrap();
    });
    let (end, log) = {
        let mut state = storage.state.lock();
        (state.data.clone(), std::mem::take(&mut state.log))
    };
    let after = read_state(&end);
    let mut expected = before.clone();
    match operation {
        Operation::Create => expected.snapshots.push(("c".into(), before.disk.clone())),
        Operation::Apply => expected.disk.clone_from(&before.snapshots[0].1),
        Operation::Delete => drop(expected.snapshots.remove(0)),
    }
    assert!(after == expected, "{what}: {}", after.describe());
    let scratch = tempfile::tempdir().unwrap();
    assert_sound(&end, scratch.path(), &what);
    let (mut old, mut new) = (0, 0);
    for cut in 0..=log.len() {
        for _ in 0..3 {
            let data = after_cut(&start, &log, cut, &mut rng);
            let what = format!("{what}, cut at {cut} of {}", log.len());
            let found = read_state(&data);
            if found == before {
                old += 1;
            } else if found == after {
                new += 1;
            } else {
                panic!("{what}: {}", found.describe());
            }
            // qemu-img takes its time: all cuts around barriers, and some of the others.
            let near = log[cut.saturating_sub(2)..log.len().min(cut + 2)]
                .iter()
                .any(|event| matches!(event, Event::Flush));
            if near || rng.random_bool(0.1) {
                assert_sound(&data, scratch.path(), &what);
            }
        }
    }
    (old, new)
}

#[test]
fn a_power_cut_during_a_snapshot_operation_leaves_the_old_or_the_new_state_and_no_leak() {
    let kinds = [
        ("cluster_size=4096", ""),
        ("cluster_size=512,refcount_bits=8", "refcount-cache-size=2k"),
        ("cluster_size=4096,compat=0.10", "pass-discard-snapshot=off"),
        ("cluster_size=65536,lazy_refcounts=on", ""),
    ];
    for (n, (options, open)) in kinds.into_iter().enumerate() {
        for operation in [Operation::Create, Operation::Apply, Operation::Delete] {
            let (old, new) = cut_everywhere(options, open, operation, n as u64);
            assert!(old > 5 && new > 0, "{options}, {operation:?}: {old} {new}");
        }
    }
}

#[test]
fn a_failed_write_before_the_switch_leaves_no_trace_and_one_of_the_switch_stops_all_writes() {
    let storage = Storage::new(image_bytes("cluster_size=4096", SIZE));
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open_storage(&storage, "").await.unwrap();
        write(&handle, 0, SIZE / 2, 1).await.unwrap();
        handle
            .snapshot_create(named("a"), Progress::new())
            .await
            .unwrap();
        write(&handle, 0, SIZE / 4, 2).await.unwrap();
        handle.flush().await.unwrap();

        storage.set_fault(storage::Fault::Writes);
        let failed = handle.snapshot_create(named("b"), Progress::new()).await;
        assert!(failed.is_err());
        storage.set_fault(storage::Fault::None);
        write(&handle, SIZE / 2, 4096, 3).await.unwrap();
        handle.flush().await.unwrap();
        assert_eq!(handle.snapshot_list().await.unwrap().len(), 1);

        // The header is written, but whether that is durable is unknown.
        storage.fail_flush_after_write_at(24);
        let failed = handle.snapshot_create(named("b"), Progress::new()).await;
        assert!(failed.is_err());
        for at in [0, SIZE / 2, SIZE - 4096] {
            assert!(write(&handle, at, 4096, 9).await.is_err(), "{at:#x}");
        }
        assert!(handle.flush().await.is_err());
        assert_eq!(handle.read(0, 1).await.unwrap()[..], [2]);
        // Reopened, what is on disk counts.
        handle
            .reopen(block_core::driver::Reopen::default())
            .await
            .unwrap();
        assert_eq!(handle.snapshot_list().await.unwrap().len(), 2);
        write(&handle, 0, 4096, 4).await.unwrap();
        rig.close(handle).await.unwrap();
    });
    let data = storage.state.lock().data.clone();
    let scratch = tempfile::tempdir().unwrap();
    assert_sound(&data, scratch.path(), "after the reopen");
    let state = read_state(&data);
    assert_eq!((state.disk[0], state.snapshots[1].1[0]), (4, 2));
}
