//! A power cut between any two writes, or within one, while bitmaps are loaded, stored or removed: the image opens, nothing is
//! corrupt, at worst clusters have leaked, and no bitmap that says it can be trusted lacks a write.

mod bitmap_files;
mod common;

use bitmap_files::IN_USE;
use block_core::{BlockHandle, OpenOptions, Result, bitmap::NewBitmap};
use common::{
    cuts::after_cut,
    storage::{Event, Storage},
    *,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::{collections::BTreeMap, sync::Arc};

const DISK: u64 = 8 << 20;
const GRANULE: u64 = 4096;

/// What a bitmap may say after a cut if it says that it can be trusted.
type Bits = Vec<bool>;

/// A name of so many bytes, an odd number, for the file `b`.
fn base_name(len: usize) -> String {
    "./".repeat(len / 2) + "b"
}

/// An image with the bitmaps `names`, made by qemu.
fn start_image(options: &str, backing: usize, names: &[&str]) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    let size = DISK.to_string();
    let base = base_name(backing);
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if backing > 0 {
        args.extend(["-u", "-F", "raw", "-b", &base]);
    }
    args.extend([name, &size]);
    qemu_img(&args);
    let granularity = GRANULE.to_string();
    for bitmap in names {
        qemu_img(&["bitmap", "--add", "-g", &granularity, name, bitmap]);
    }
    if backing == 0 {
        tool(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 1 64k 64k", name],
        );
    }
    std::fs::read(path).unwrap()
}

struct Run {
    start: Vec<u8>,
    log: Vec<Event>,
    /// What is written when so much of the log had reached the storage.
    written: Vec<(usize, u64, u64)>,
    /// Bitmaps that were there at first, and what they said.
    before: BTreeMap<String, Bits>,
    /// The backing file's name, which stays whatever happens.
    name: Option<Vec<u8>>,
}

/// Opens the image without its backing file, which doesn't exist.
async fn open(rig: &Rig, storage: &Arc<Storage>, read_only: bool) -> Result<BlockHandle> {
    let how = OpenOptions {
        no_backing: true,
        ..OpenOptions::default()
    };
    let options = format!("read-only={read_only}");
    rig.open_storage_how(storage, &options, how).await
}

async fn guest_write(handle: &BlockHandle, storage: &Storage, run: &mut Run, at: u64, len: u64) {
    // Whatever follows this position may be in the file.
    run.written.push((storage.position(), at, len));
    write(handle, at, len, 9).await.unwrap();
}

fn backing_name(data: &[u8]) -> Option<Vec<u8>> {
    let at = be64(data, 8) as usize;
    let len = u32::from_be_bytes(data[16..20].try_into().unwrap()) as usize;
    (at != 0).then(|| data[at..at + len].to_vec())
}

/// Looks at what every cut leaves.
fn judge(run: &Run, what: &str, cuts: usize, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    std::fs::write(scratch.path().join("b"), []).unwrap();
    let mut seen = [0; 3];
    for n in 0..cuts {
        // Every position at least once, as far as it goes.
        let cut = if n <= run.log.len() {
            run.log.len() - n
        } else {
            rng.random_range(0..=run.log.len())
        };
        let data = after_cut(&run.start, &run.log, cut, &mut rng);
        let what = format!("{what}, cut at {cut} of {}", run.log.len());
        assert_eq!(backing_name(&data), run.name, "{what}");
        std::fs::write(&path, &data).unwrap();
        let checked = common::run(
            "qemu-img",
            &["check", "-f", "qcow2", path.to_str().unwrap()],
        );
        let text = String::from_utf8_lossy(&checked.stdout).into_owned()
            + &String::from_utf8_lossy(&checked.stderr);
        assert!(
            matches!(checked.status.code(), Some(0 | 3)),
            "{what}: {text}"
        );
        let rig = Rig::new();
        rig.block_on(async {
            let storage = Storage::new(data.clone());
            let handle = match open(&rig, &storage, true).await {
                Ok(handle) => handle,
                Err(error) => panic!("{what}: {error}"),
            };
            for bitmap in handle.named_bitmaps().all() {
                if bitmap.is_inconsistent() {
                    seen[1] += 1;
                    continue;
                }
                seen[0] += 1;
                let bits = bitmap.bits();
                for (position, at, len) in &run.written {
                    if *position >= cut {
                        continue;
                    }
                    for granule in at / GRANULE..(at + len).div_ceil(GRANULE) {
                        assert!(
                            bits.is_dirty(granule * GRANULE),
                            "{what}: bitmap '{}' lacks {granule}",
                            bitmap.name()
                        );
                    }
                }
                for (granule, _) in run
                    .before
                    .get(bitmap.name())
                    .into_iter()
                    .flatten()
                    .enumerate()
                    .filter(|(_, dirty)| **dirty)
                {
                    assert!(
                        bits.is_dirty(granule as u64 * GRANULE),
                        "{what}: lost {granule}"
                    );
                }
            }
            if handle.named_bitmaps().list().is_empty() {
                seen[2] += 1;
            }
            rig.close(handle).await.unwrap();
        });
    }
    assert!(seen[0] > 0 && seen[1] + seen[2] > 0, "{what}: {seen:?}");
}

fn session(
    options: &str,
    backing: usize,
    names: &[&str],
    work: impl AsyncFnOnce(&BlockHandle, &Storage, &mut Run),
) -> Run {
    let start = start_image(options, backing, names);
    let storage = Storage::new(start.clone());
    storage.state.lock().keep_log = true;
    let before = bitmap_files::stored(&start)
        .into_iter()
        .filter(|bitmap| bitmap.flags & IN_USE == 0)
        .map(|bitmap| (bitmap.name, bitmap.bits))
        .collect();
    let mut run = Run {
        name: backing_name(&start),
        start,
        log: Vec::new(),
        written: Vec::new(),
        before,
    };
    let rig = Rig::new();
    rig.block_on(async {
        let handle = open(&rig, &storage, false).await.unwrap();
        work(&handle, &storage, &mut run).await;
        rig.close(handle).await.unwrap();
    });
    run.log = std::mem::take(&mut storage.state.lock().log);
    run
}

const IMAGES: [(&str, usize); 6] = [
    ("cluster_size=64k", 0),
    ("cluster_size=512", 0),
    ("cluster_size=4k,refcount_bits=64", 0),
    ("cluster_size=64k", 21),
    ("cluster_size=64k", 201),
    ("cluster_size=8k", 901),
];

#[test]
fn opening_writing_and_closing_leave_nothing_that_is_trusted_wrongly() {
    for (seed, (options, backing)) in IMAGES.into_iter().enumerate() {
        let run = session(
            options,
            backing,
            &["a", "bb"],
            async |handle, storage, run| {
                guest_write(handle, storage, run, 1 << 20, 65536).await;
                guest_write(handle, storage, run, 3 << 20, 512).await;
                handle.flush().await.unwrap();
                guest_write(handle, storage, run, 64 << 10, 512).await;
            },
        );
        judge(
            &run,
            &format!("{options}, name of {backing}"),
            90,
            seed as u64,
        );
    }
}

#[test]
fn the_first_bitmap_of_an_image_comes_and_the_last_one_goes_without_harm() {
    for (seed, (options, backing)) in IMAGES.into_iter().enumerate() {
        let run = session(options, backing, &[], async |handle, storage, run| {
            let new = NewBitmap::named("first")
                .persistent()
                .with_granularity(GRANULE);
            handle.named_bitmaps().add(new).await.unwrap();
            guest_write(handle, storage, run, 1 << 20, 4096).await;
        });
        judge(
            &run,
            &format!("first: {options}, name of {backing}"),
            60,
            seed as u64,
        );
        let run = session(options, backing, &["last"], async |handle, _, _| {
            handle.named_bitmaps().remove("last").await.unwrap();
        });
        judge(
            &run,
            &format!("last: {options}, name of {backing}"),
            60,
            seed as u64,
        );
    }
}

#[test]
fn storing_on_request_and_removing_one_of_several_leave_the_others_alone() {
    for (seed, (options, backing)) in IMAGES.into_iter().enumerate() {
        let run = session(
            options,
            backing,
            &["a", "b", "c"],
            async |handle, storage, run| {
                guest_write(handle, storage, run, 2 << 20, 4096).await;
                handle.named_bitmaps().store().await.unwrap();
                guest_write(handle, storage, run, 4 << 20, 4096).await;
                handle.named_bitmaps().remove("b").await.unwrap();
                run.before.remove("b");
            },
        );
        judge(
            &run,
            &format!("{options}, name of {backing}"),
            90,
            seed as u64,
        );
    }
}
