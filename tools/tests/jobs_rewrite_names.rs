//! A job that takes layers out of a chain has the overlay's header name what is below them. Where that is more than a file (a window of
//! a raw one, a snapshot of a qcow2 image), the header has to say so: who opens the chain again, qemu's tools included, has to see the
//! same disk.

mod support;

use std::{path::Path, process::Command, sync::Arc};

use block_core::{
    BlockHandle, ChildRole, Graph, Node, Options, PermissionSet, Permissions, Registry,
    registry::{ImplicitOpens, OpenOptions},
};
use env_tokio::EnvTokio;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use jobs::{CommitOptions, JobManager, StreamOptions};
use protocol_file::FileFactory;
use support::qemu_is_installed;

/// A guest's disk of 1 MiB in three layers. The lowest one is the window of a file, or a snapshot.
const CHAIN: &str = r"
qemu-img create -q base.raw 2M
qemu-io -f raw -c 'write -P 1 0 2M' -c 'write -P 2 128k 64k' base.raw
qemu-img create -q -f qcow2 base.qcow2 1M
qemu-io -f qcow2 -c 'write -P 3 0 1M' base.qcow2
qemu-img snapshot -c one base.qcow2
qemu-io -f qcow2 -c 'write -P 4 0 1M' base.qcow2
qemu-img create -q -f qcow2 -u -b base.qcow2 -F qcow2 mid.qcow2 1M
qemu-io -c 'open -o backing= mid.qcow2' -c 'write -P 5 512k 64k'
qemu-img create -q -f qcow2 -u -b mid.qcow2 -F qcow2 top.qcow2 1M
qemu-io -c 'open -o backing= top.qcow2' -c 'write -P 6 640k 64k'
";

struct Bench {
    env: Arc<EnvTokio>,
    graph: Arc<Graph>,
    registry: Arc<Registry>,
}

impl Bench {
    fn new() -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let registry = Registry::new()
            .with(FileFactory::new())
            .with(RawFactory)
            .with(Qcow2Factory::default());
        Self {
            graph: Graph::new(env.clone()),
            registry: Arc::new(registry),
            env,
        }
    }

    async fn open(&self, options: Options, trusting: bool) -> block_core::Result<Arc<Node>> {
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            options_in_names: trusting,
            ..OpenOptions::default()
        };
        self.registry.open(&self.graph, options, how).await
    }

    fn guest(&self, node: &Arc<Node>) -> BlockHandle {
        let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
        let shared = Permissions::all() - Permissions::WRITE;
        let set = PermissionSet::new(used, shared);
        self.graph.attach(node, set, "guest").unwrap()
    }
}

fn image(path: &Path) -> Options {
    let file = Options::new()
        .with("driver", "file")
        .with("filename", path.to_str().unwrap());
    Options::new().with("driver", "qcow2").with("file", file.0)
}

fn contents(dir: &Path, name: &str) -> Vec<u8> {
    let out = dir.join("out.raw");
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(dir.join(name))
        .arg(&out)
        .output()
        .unwrap();
    assert!(converted.status.success(), "{converted:?}");
    std::fs::read(out).unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Stream,
    Commit,
}

/// Takes the middle layer out of the chain over `lowest`. Gives the header's new name.
fn take_out(dir: &Path, lowest: &Options, work: Work) -> String {
    let bench = Bench::new();
    bench.env.block_on(async {
        let mid = image(&dir.join("mid.qcow2")).with("backing", lowest.0.clone());
        let top = image(&dir.join("top.qcow2")).with("backing", mid.0);
        let node = bench.open(top, false).await.unwrap();
        let guest = bench.guest(&node);
        let before = guest.read(0, 1 << 20).await.unwrap().to_vec();
        let mid = node.backing().unwrap();
        let base = mid.backing().unwrap();
        let manager = JobManager::new(&bench.graph);
        let job = match work {
            Work::Stream => manager.stream(StreamOptions::new(&node).base(&base)).await,
            Work::Commit => {
                let options = CommitOptions::new(&node).top(&mid).base(&base);
                manager.commit(options).await
            }
        };
        job.unwrap().wait().await.unwrap();
        assert!(Arc::ptr_eq(&node.backing().unwrap(), &base), "{work:?}");
        assert!(
            guest.read(0, 1 << 20).await.unwrap().to_vec() == before,
            "{work:?}"
        );
        let name = guest.info().await.unwrap().backing_filename.unwrap();
        drop((mid, base, node, manager));
        guest.close().await.unwrap();
        bench.graph.close_all().await.unwrap();

        // From what the header says.
        let top = image(&dir.join("top.qcow2"));
        let refused = match bench.open(top.clone(), false).await {
            Ok(node) => bench.graph.release(&node).await.is_err(),
            Err(_) => true,
        };
        assert_eq!(refused, name.starts_with("json:"), "{name}");
        let node = bench.open(top, true).await.unwrap();
        assert!(node.edges().child(ChildRole::Backing).is_some());
        let guest = bench.guest(&node);
        let after = guest.read(0, 1 << 20).await.unwrap().to_vec();
        assert!(
            after == before,
            "{work:?}: another disk than before, {name}"
        );
        drop(node);
        guest.close().await.unwrap();
        name
    })
}

#[test]
fn a_header_that_a_job_rewrites_names_the_same_disk() {
    if !qemu_is_installed() {
        return;
    }
    for work in [Work::Stream, Work::Commit] {
        for lowest in ["window", "file", "snapshot", "image"] {
            // A snapshot is never written to.
            if (work, lowest) == (Work::Commit, "snapshot") {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            let made = Command::new("bash")
                .args(["-ec", CHAIN])
                .current_dir(dir)
                .output()
                .unwrap();
            assert!(made.status.success(), "{made:?}");
            let raw = dir.join("base.raw");
            let qcow2 = dir.join("base.qcow2");
            let file = Options::new()
                .with("driver", "file")
                .with("filename", raw.to_str().unwrap());
            let options = match lowest {
                "window" => Options::new()
                    .with("driver", "raw")
                    .with("offset", 65536)
                    .with("size", 1 << 20)
                    .with("file", file.0),
                "file" => Options::new().with("driver", "raw").with("file", file.0),
                "snapshot" => image(&qcow2).with("snapshot-name", "one"),
                _ => image(&qcow2),
            };
            let name = take_out(dir, &options, work);
            let plain = ["file", "image"].contains(&lowest);
            assert_eq!(!name.starts_with("json:"), plain, "{name}");
            // qemu has no option for a snapshot.
            if lowest != "snapshot" {
                let found = contents(dir, "top.qcow2");
                let at = |offset: usize| found[offset];
                let first = if lowest == "image" { 4 } else { 1 };
                let second = if lowest == "window" { 2 } else { first };
                assert_eq!(
                    [at(0), at(64 << 10), at(512 << 10), at(640 << 10)],
                    [first, second, 5, 6],
                    "{work:?}, {lowest}"
                );
            }
        }
    }
}
