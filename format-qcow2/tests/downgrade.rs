//! From version 3 to version 2 with all that an image may have: snapshots with zero clusters, bitmaps, a type of compression. What
//! the installed qemu-img does is done, what it refuses is refused in its words; the disk and every snapshot read the same
//! afterwards, and a power cut leaves the old or the new image.

mod common;

use std::path::Path;

use block_core::{BlockHandle, Options, RequestFlags, Result, image::Progress, secret::Secret};
use common::{
    cuts::{Look, record},
    storage::Storage,
    *,
};

async fn downgrade(handle: &BlockHandle) -> Result<()> {
    let options = Options::from_dotted("compat=0.10")?;
    handle.amend(options, false, Progress::new()).await
}

/// What is done to an image before.
enum Step {
    Io(&'static str),
    Snapshot(&'static str),
    Resize(&'static str),
    Bitmap(&'static str),
}
use Step::{Bitmap, Io, Resize, Snapshot};

/// Makes `name` in `dir` with the installed tools, over a backing file of other bytes if that is wanted.
fn make(dir: &Path, name: &str, options: &str, backing: bool, steps: &[Step]) {
    let path = dir.join(name);
    let path = path.to_str().unwrap();
    let base = dir.join("base.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if backing {
        make_base(&base);
        args.extend(["-F", "qcow2", "-b", base.to_str().unwrap()]);
    }
    args.extend([path, "4M"]);
    qemu_img(&args);
    for step in steps {
        match step {
            Io(what) => tool("qemu-io", &["-f", "qcow2", "-c", what, path]),
            Snapshot(name) => qemu_img(&["snapshot", "-c", name, path]),
            Resize(size) => qemu_img(&["resize", "-q", "-f", "qcow2", path, size]),
            Bitmap(name) => qemu_img(&["bitmap", "--add", path, name]),
        };
    }
}

/// A backing file of other bytes, longer than the disk.
fn make_base(path: &Path) {
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "6M"]);
    tool(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 0xee 0 6M", name],
    );
}

const ZEROES: [Step; 4] = [
    Io("write -P 1 0 1M"),
    Io("write -z 256k 128k"),
    Io("write -z -u 512k 192k"),
    Io("discard 896k 64k"),
];

/// Snapshots with zero clusters that are shared, not shared, and shared with another snapshot.
const LAYERS: [Step; 10] = [
    Io("write -P 1 0 1M"),
    Io("write -z 256k 128k"),
    Io("write -z -u 512k 192k"),
    Snapshot("one"),
    Snapshot("two"),
    Io("write -P 2 0 320k"),
    Io("write -z 1M 64k"),
    Snapshot("three"),
    Io("write -P 3 1M 128k"),
    Io("write -z 0 64k"),
];

struct Case {
    what: &'static str,
    options: &'static str,
    steps: &'static [Step],
    snapshots: &'static [&'static str],
}

const CASES: [Case; 9] = [
    Case {
        what: "zero clusters",
        options: "compat=1.1",
        steps: &ZEROES,
        snapshots: &[],
    },
    Case {
        what: "zero clusters in snapshots",
        options: "compat=1.1",
        steps: &LAYERS,
        snapshots: &["one", "two", "three"],
    },
    Case {
        what: "zero clusters in snapshots, small clusters",
        options: "cluster_size=512",
        steps: &LAYERS,
        snapshots: &["one", "two", "three"],
    },
    Case {
        what: "lazy refcounts and snapshots",
        options: "lazy_refcounts=on,cluster_size=4k",
        steps: &LAYERS,
        snapshots: &["one", "two", "three"],
    },
    Case {
        what: "a snapshot of another size",
        options: "compat=1.1",
        steps: &[Io("write -P 1 0 64k"), Snapshot("one"), Resize("8M")],
        snapshots: &["one"],
    },
    Case {
        what: "bitmaps",
        options: "compat=1.1",
        steps: &[
            Bitmap("a"),
            Bitmap("b"),
            Io("write -P 1 0 1M"),
            Io("write -z 0 64k"),
        ],
        snapshots: &[],
    },
    Case {
        what: "zstd, nothing compressed",
        options: "compression_type=zstd",
        steps: &ZEROES,
        snapshots: &[],
    },
    Case {
        what: "zstd, something compressed",
        options: "compression_type=zstd",
        steps: &[Io("write -P 1 -c 0 64k")],
        snapshots: &[],
    },
    Case {
        what: "zlib, something compressed",
        options: "compat=1.1",
        steps: &[
            Io("write -P 1 -c 0 64k"),
            Snapshot("one"),
            Io("write -z 64k 64k"),
        ],
        snapshots: &["one"],
    },
];

/// The disk and the snapshots as qemu-img reads them.
fn all_contents(path: &Path, dir: &Path, snapshots: &[&str]) -> Vec<Vec<u8>> {
    let disk = contents(path, dir);
    let of = |name: &&str| snapshot_contents(path, dir, name);
    std::iter::once(disk)
        .chain(snapshots.iter().map(of))
        .collect()
}

fn compat(path: &Path) -> String {
    // (Of the bitmaps that it left behind it warns on the other stream.)
    let output = run(
        "qemu-img",
        &["info", "--output=json", path.to_str().unwrap()],
    );
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    info["format-specific"]["data"]["compat"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn what_qemu_img_amends_is_amended_and_what_it_refuses_is_refused_in_its_words() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let (ours, theirs) = (dir.join("ours.qcow2"), dir.join("theirs.qcow2"));
    let rig = Rig::new();
    for Case {
        what,
        options,
        steps,
        snapshots,
    } in CASES
    {
        for backing in [false, true] {
            let what = format!("{what}, backing file: {backing}");
            make(dir, "ours.qcow2", options, backing, steps);
            std::fs::copy(&ours, &theirs).unwrap();
            let before = all_contents(&ours, dir, snapshots);
            let output = run(
                "qemu-img",
                &[
                    "amend",
                    "-f",
                    "qcow2",
                    "-o",
                    "compat=0.10",
                    theirs.to_str().unwrap(),
                ],
            );
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            let amended = rig.block_on(async {
                let handle = rig.open(&ours, "").await.unwrap();
                let amended = downgrade(&handle).await;
                rig.close(handle).await.unwrap();
                amended
            });
            match amended {
                Ok(()) => assert!(output.status.success(), "{what}: qemu-img: {words}"),
                Err(error) => assert_eq!(format!("qemu-img: {}", error.reason()), words, "{what}"),
            }
            assert_eq!(compat(&ours), compat(&theirs), "{what}");
            // Not even a leak, where qemu-img leaves the bitmaps' clusters behind.
            assert_clean(&ours);
            for (after, before) in all_contents(&ours, dir, snapshots).iter().zip(&before) {
                assert_same(after, before, &what);
            }
            // It is still an image that snapshots can be applied in.
            if let Some(first) = snapshots.first()
                && output.status.success()
            {
                qemu_img(&["snapshot", "-a", first, ours.to_str().unwrap()]);
                assert_clean(&ours);
                assert_same(&contents(&ours, dir), &before[1], &what);
            }
        }
    }
}

#[test]
fn zeroes_of_an_encrypted_snapshot_stay_zeroes_over_a_backing_file() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let base = dir.join("base.qcow2");
    make_base(&base);
    for format in ["luks", "aes"] {
        let path = dir.join("a.qcow2");
        let name = path.to_str().unwrap();
        let made = format!("encrypt.format={format},encrypt.key-secret=s,cluster_size=4k");
        let secret = "secret,id=s,data=letmein";
        let mut args = vec![
            "create", "-q", "-f", "qcow2", "--object", secret, "-F", "qcow2",
        ];
        args.extend(["-b", base.to_str().unwrap(), "-o", &made, name, "4M"]);
        qemu_img(&args);
        let rig = Rig::new();
        rig.graph
            .secrets()
            .add("s", Secret::new("letmein"))
            .unwrap();
        let key = format!("encrypt.format={format},encrypt.key-secret=s");
        rig.block_on(async {
            let handle = rig.open(&path, &key).await.unwrap();
            write(&handle, 0, 100_000, 1).await.unwrap();
            let keep = RequestFlags::empty();
            handle.write_zeroes(20_000, 40_000, keep).await.unwrap();
            handle
                .write_zeroes(200_000, 40_000, RequestFlags::MAY_UNMAP)
                .await
                .unwrap();
            handle
                .snapshot_create(named("one"), Progress::new())
                .await
                .unwrap();
            write(&handle, 0, 300_000, 2).await.unwrap();
            handle.write_zeroes(250_000, 20_000, keep).await.unwrap();
            downgrade(&handle).await.unwrap();
            rig.close(handle).await.unwrap();
        });
        let mut disk = vec![0xee; 4 << 20];
        disk[..300_000].fill(2);
        disk[250_000..270_000].fill(0);
        let mut one = vec![0xee; 4 << 20];
        one[..100_000].fill(1);
        one[20_000..60_000].fill(0);
        one[200_000..240_000].fill(0);
        for (snapshot, expected) in [(None, disk), (Some("snapshot.name=one"), one)] {
            let open = format!("driver=qcow2,file.filename={name},{key}");
            let raw = dir.join("read.raw");
            let mut args = vec!["convert", "--object", secret, "-O", "raw", "--image-opts"];
            args.extend(snapshot.iter().flat_map(|name| ["-l", name]));
            args.extend([&*open, raw.to_str().unwrap()]);
            qemu_img(&args);
            assert_same(
                &std::fs::read(&raw).unwrap(),
                &expected,
                &format!("{format} {snapshot:?}"),
            );
        }
        let open = format!("driver=qcow2,file.filename={name},{key}");
        qemu_img(&["check", "--object", secret, "--image-opts", &open]);
    }
}

/// Disk and snapshots of an image in memory, and what a check says of it.
fn read_all(data: &[u8], snapshots: &[&str], what: &str) -> Vec<Vec<u8>> {
    let rig = Rig::new();
    let storage = Storage::new(data.to_vec());
    rig.block_on(async {
        let mut all = Vec::new();
        let views = snapshots
            .iter()
            .map(|name| format!("snapshot-name={name},"));
        for view in std::iter::once(String::new()).chain(views) {
            let options = format!("{view}read-only=on");
            let handle = rig.open_storage(&storage, &options).await;
            let handle = handle.unwrap_or_else(|error| panic!("{what}: {error}"));
            if view.is_empty() {
                let report = checked(&handle).await;
                let bad = report.corruptions + report.check_errors;
                assert_eq!(bad, 0, "{what}: {:#?}", report.findings);
            }
            let len = handle.length() as usize;
            all.push(handle.read(0, len).await.unwrap().to_vec());
            rig.close(handle).await.unwrap();
        }
        all
    })
}

#[test]
fn a_power_cut_during_a_downgrade_leaves_the_old_or_the_new_image() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let names = ["one", "two", "three"];
    for (options, steps, snapshots) in [
        ("cluster_size=512", &LAYERS[..], &names[..]),
        ("cluster_size=4k", &LAYERS[..], &names[..]),
        (
            "cluster_size=64k,lazy_refcounts=on",
            &LAYERS[..],
            &names[..],
        ),
        (
            "cluster_size=4k",
            &[
                Bitmap("a"),
                Io("write -P 1 0 1M"),
                Io("write -z 0 512k"),
                Snapshot("one"),
            ][..],
            &names[..1],
        ),
    ] {
        make(dir, "a.qcow2", options, false, steps);
        let start = std::fs::read(dir.join("a.qcow2")).unwrap();
        let expected = read_all(&start, snapshots, options);
        let done = record(start.clone(), "", async |handle| downgrade(handle).await);
        assert_eq!(be64(&done.end, 0) & 0xffff_ffff, 2);
        let mut rng = rand::SeedableRng::seed_from_u64(done.log.len() as u64);
        let step = done.log.len().div_ceil(80).max(1);
        for cut in (0..done.log.len()).step_by(step).chain([done.log.len()]) {
            let what = format!("{options}, cut at {cut} of {}", done.log.len());
            let data = cuts::after_cut(&start, &done.log, cut, &mut rng);
            for (found, expected) in read_all(&data, snapshots, &what).iter().zip(&expected) {
                assert_same(found, expected, &what);
            }
            // It can be written to as well.
            cuts::look_at(&Storage::new(data), Look::Reopened, &what);
        }
    }
}
