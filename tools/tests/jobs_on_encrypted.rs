//! Commit, stream, mirror and backup between encrypted qcow2 images, each with a key and a method of its own, while a guest
//! writes, zeroes and discards; then every byte is compared, by qemu's tools, too, and no plain text is in any file.

#[path = "../../jobs/tests/common/guest.rs"]
#[allow(dead_code, reason = "another test's guest")]
mod guest;
mod support;

/// What the guest takes for the size of a cluster.
mod mem {
    pub const CLUSTER: u64 = 16 << 10;
}

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use block_core::{
    BlockHandle, Environment, Graph, Node, Options, PermissionSet, Permissions, Registry,
    RequestFlags, driver::ChildRole, registry::OpenOptions, secret::Secret,
};
use env_tokio::EnvTokio;
use format_qcow2::Qcow2Factory;
use guest::Guest;
use jobs::{BackupOptions, CommitOptions, CopyMode, Job, JobManager, MirrorOptions, StreamOptions};
use mem::CLUSTER;
use protocol_file::FileFactory;

/// The length of the disks.
const LENGTH: u64 = 160 * CLUSTER;

/// Methods of the layers of a chain, the lowest first, and of the target.
const METHODS: [[&str; 4]; 3] = [
    ["luks", "luks", "luks", "luks"],
    ["aes", "luks", "aes", "luks"],
    ["luks", "aes", "none", "aes"],
];

struct Bench {
    env: Arc<EnvTokio>,
    graph: Arc<Graph>,
    registry: Arc<Registry>,
    manager: Arc<JobManager>,
    dir: tempfile::TempDir,
    methods: [&'static str; 4],
}

/// An image's number in [`Bench::methods`] is also that of its key.
const TARGET: usize = 3;

impl Bench {
    fn new(methods: [&'static str; 4]) -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let graph = Graph::new(env.clone());
        for key in 0..4 {
            let secret = Secret::new(format!("passphrase {key}"));
            graph.secrets().add(&format!("key{key}"), secret).unwrap();
        }
        Self {
            manager: JobManager::new(&graph),
            registry: Arc::new(
                Registry::new()
                    .with(FileFactory::new())
                    .with(Qcow2Factory::default()),
            ),
            env,
            graph,
            dir: tempfile::tempdir().unwrap(),
            methods,
        }
    }

    fn path(&self, image: usize) -> PathBuf {
        self.dir.path().join(format!("{image}.qcow2"))
    }

    /// The options that open an image, each key with `prefix` before it.
    fn opening(&self, image: usize, prefix: &str) -> String {
        let file = self.path(image);
        let key = match self.methods[image] {
            "none" => String::new(),
            _ => format!(",{prefix}encrypt.key-secret=key{image}"),
        };
        format!(
            "{prefix}driver=qcow2,{prefix}file.driver=file,{prefix}file.filename={}{key}",
            file.display()
        )
    }

    async fn create(&self, image: usize, below: Option<usize>) {
        let mut options = format!("size={LENGTH},cluster_size={CLUSTER}");
        match self.methods[image] {
            "none" => {}
            "aes" => options += &format!(",encrypt.format=aes,encrypt.key-secret=key{image}"),
            method => {
                options += &format!(
                    ",encrypt.format={method},encrypt.key-secret=key{image},encrypt.iter-time=1"
                );
            }
        }
        if let Some(below) = below {
            let below = self.path(below);
            options += &format!(",backing_file={},backing_fmt=qcow2", below.display());
        }
        let options = Options::from_dotted(&options).unwrap();
        let path = self.path(image);
        self.registry
            .create(&self.graph, "qcow2", path.to_str().unwrap(), options)
            .await
            .unwrap();
    }

    /// Opens images, the first over the second and so on. They are called `n0`, `n1`, ….
    async fn open(&self, images: &[usize]) -> Arc<Node> {
        let mut prefix = String::new();
        let mut text = Vec::new();
        for image in images {
            text.push(self.opening(*image, &prefix));
            text.push(format!("{prefix}node-name=n{image}"));
            prefix += "backing.";
        }
        let options = Options::from_dotted(&text.join(",")).unwrap();
        self.registry
            .open(&self.graph, options, OpenOptions::default())
            .await
            .unwrap()
    }

    fn handle(&self, node: &Arc<Node>) -> Arc<BlockHandle> {
        let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
        let shared = Permissions::all() - Permissions::WRITE;
        let handle = self
            .graph
            .attach(node, PermissionSet::new(used, shared), "guest");
        Arc::new(handle.unwrap())
    }

    /// Makes a chain of three, each with content of its own, and opens it. Gives the topmost node, those below it, and what
    /// the disk holds.
    async fn chain(&self) -> ([Arc<Node>; 3], Vec<u8>) {
        let mut content = vec![0; LENGTH as usize];
        for image in 0..3 {
            self.create(image, image.checked_sub(1)).await;
            let chain: Vec<usize> = (0..=image).rev().collect();
            let node = self.open(&chain).await;
            let handle = self.handle(&node);
            for cluster in 0..LENGTH / CLUSTER {
                let at = cluster * CLUSTER;
                let range = at as usize..(at + CLUSTER) as usize;
                match (cluster * 7 + image as u64 * 3) % 5 {
                    0 => {
                        let byte = (cluster % 200) as u8 + image as u8 + 1;
                        content[range].fill(byte);
                        let data = vec![byte; CLUSTER as usize];
                        let flags = RequestFlags::empty();
                        handle.write(at, data, flags).await.unwrap();
                    }
                    1 if image > 0 => {
                        content[range].fill(0);
                        let flags = RequestFlags::MAY_UNMAP;
                        handle.write_zeroes(at, CLUSTER, flags).await.unwrap();
                    }
                    _ => {}
                }
            }
            drop(handle);
            self.graph.close_all().await.unwrap();
        }
        let top = self.open(&[2, 1, 0]).await;
        let below = |node: &Arc<Node>| {
            let edge = node
                .edges()
                .iter()
                .find(|edge| edge.role == ChildRole::Backing)
                .cloned();
            edge.expect("it has a backing file").child.node().clone()
        };
        let middle = below(&top);
        let base = below(&middle);
        ([top, middle, base], content)
    }

    async fn target(&self) -> Arc<Node> {
        self.create(TARGET, None).await;
        self.open(&[TARGET]).await
    }

    /// Closes everything; then the images, the first over the second and so on, are what they are to be, to qemu as well.
    async fn finish(&self, images: &[usize], expected: &[u8], what: &str) {
        self.graph.close_all().await.unwrap();
        let node = self.open(images).await;
        let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
        let handle = self.graph.attach(&node, reader, "reader").unwrap();
        let found = handle.read(0, LENGTH as usize).await.unwrap();
        assert_same(&found, expected, what);
        drop(handle);
        drop(node);
        self.graph.close_all().await.unwrap();
        if support::qemu_is_installed() {
            self.ask_qemu(images, expected, what);
        }
        for image in 0..4 {
            if self.methods[image] != "none" && self.path(image).exists() {
                assert_no_plain_text(&self.path(image));
            }
        }
    }

    fn ask_qemu(&self, images: &[usize], expected: &[u8], what: &str) {
        let objects = (0..4)
            .flat_map(|key| {
                let object = format!("secret,id=key{key},data=passphrase {key}");
                ["--object".to_owned(), object]
            })
            .collect::<Vec<_>>();
        // Whoever opens an image has to bring the keys of those below it.
        let chain = |images: &[usize]| {
            let levels = images.iter().enumerate();
            let levels = levels.map(|(n, image)| self.opening(*image, &"backing.".repeat(n)));
            levels.collect::<Vec<_>>().join(",")
        };
        let raw = self.dir.path().join("read.raw");
        let run = |args: &[&str]| {
            let done = Command::new("qemu-img")
                .arg(args[0])
                .args(&objects)
                .args(&args[1..])
                .output()
                .unwrap();
            assert!(done.status.success(), "{what}: {args:?}: {done:?}");
        };
        for n in 0..images.len() {
            run(&["check", "--image-opts", &chain(&images[n..])]);
        }
        let target = raw.to_str().unwrap();
        run(&[
            "convert",
            "--image-opts",
            &chain(images),
            "-O",
            "raw",
            target,
        ]);
        assert_same(&std::fs::read(&raw).unwrap(), expected, what);
        std::fs::remove_file(raw).unwrap();
    }
}

#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!(
            "{what}: byte {at:#x} is {:#x} and should be {:#x}",
            found[at], expected[at]
        );
    }
}

/// All that is written as data is runs of one byte: none of them may be found in a file.
fn assert_no_plain_text(path: &Path) {
    let file = std::fs::read(path).unwrap();
    let plain = file.chunks_exact(512).position(|sector| {
        sector[0] != 0 && sector[0] != 0xff && sector.iter().all(|byte| *byte == sector[0])
    });
    assert_eq!(plain, None, "{}: a sector of plain text", path.display());
}

/// Runs `test` with every mixture of methods, at most two minutes long each.
fn with_every_method<F: Future<Output = ()>>(test: impl Fn(Arc<Bench>) -> F) {
    for methods in METHODS {
        let bench = Arc::new(Bench::new(methods));
        let env = bench.env.clone();
        env.block_on(async {
            let timer = env.sleep(Duration::from_secs(120));
            match futures::future::select(Box::pin(test(bench)), timer).await {
                futures::future::Either::Left(_) => {}
                futures::future::Either::Right(_) => panic!("{methods:?}: the test hangs"),
            }
        });
    }
}

/// A guest was at work where the job was.
fn assert_met(job: &Job) {
    let counters = job.counters();
    assert!(counters.bytes_while_guest_wrote > 0, "{counters:?}");
}

#[test]
fn a_commit_of_encrypted_layers_beside_a_live_guest_makes_the_base_the_disk_under_its_own_key() {
    with_every_method(|bench| async move {
        let ([top, _, _], content) = bench.chain().await;
        let handle = bench.handle(&top);
        let guest = Guest::start(&bench.graph, &handle, content, 1);
        guest.work(&bench.graph, 20).await;
        let options = CommitOptions::new(&top);
        drop(top);
        let job = bench.manager.commit(options).await.unwrap();
        job.wait_ready().await.unwrap();
        guest.work(&bench.graph, 50).await;
        job.complete().unwrap();
        job.wait().await.unwrap();
        guest.work(&bench.graph, 50).await;
        let expected = guest.stop().await;
        assert_eq!(handle.node().name(), "n0");
        assert_met(&job);
        drop(handle);
        bench.finish(&[0], &expected, "the base").await;
    });
}

#[test]
fn a_commit_below_the_top_of_encrypted_layers_beside_a_live_guest_keeps_every_byte() {
    with_every_method(|bench| async move {
        let ([top, middle, base], content) = bench.chain().await;
        let handle = bench.handle(&top);
        let guest = Guest::start(&bench.graph, &handle, content, 2);
        guest.work(&bench.graph, 20).await;
        let options = CommitOptions::new(&top).top(&middle).base(&base);
        let job = bench.manager.commit(options).await.unwrap();
        job.wait().await.unwrap();
        guest.work(&bench.graph, 50).await;
        let expected = guest.stop().await;
        assert_met(&job);
        drop((handle, top, middle, base));
        bench.finish(&[2, 0], &expected, "top over base").await;
    });
}

#[test]
fn a_stream_of_encrypted_layers_beside_a_live_guest_leaves_the_top_alone_with_every_byte() {
    with_every_method(|bench| async move {
        let ([top, middle, base], content) = bench.chain().await;
        drop((middle, base));
        let handle = bench.handle(&top);
        let guest = Guest::start(&bench.graph, &handle, content, 3);
        guest.work(&bench.graph, 20).await;
        let options = StreamOptions::new(&top);
        let job = bench.manager.stream(options).await.unwrap();
        job.wait().await.unwrap();
        guest.work(&bench.graph, 50).await;
        let expected = guest.stop().await;
        assert_met(&job);
        drop((handle, top));
        bench.finish(&[2], &expected, "the top").await;
    });
}

#[test]
fn mirrors_to_an_encrypted_target_follow_a_live_guest_and_take_over() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_every_method(|bench| async move {
            let ([top, middle, base], content) = bench.chain().await;
            drop((middle, base));
            let target = bench.target().await;
            let handle = bench.handle(&top);
            let guest = Guest::start(&bench.graph, &handle, content, 4);
            guest.work(&bench.graph, 20).await;
            let mut options = MirrorOptions::new(&top, &target);
            options.copy_mode = copy_mode;
            let job = bench.manager.mirror(options).await.unwrap();
            drop((top, target));
            job.wait_ready().await.unwrap();
            guest.work(&bench.graph, 100).await;
            job.complete().unwrap();
            job.wait().await.unwrap();
            guest.work(&bench.graph, 50).await;
            let expected = guest.stop().await;
            assert_eq!(handle.node().name(), "n3");
            assert_met(&job);
            drop(handle);
            bench.finish(&[TARGET], &expected, "the mirror").await;
        });
    }
}

#[test]
fn a_backup_to_an_encrypted_target_holds_what_was_there_at_its_start() {
    with_every_method(|bench| async move {
        let ([top, middle, base], content) = bench.chain().await;
        drop((middle, base));
        let target = bench.target().await;
        let handle = bench.handle(&top);
        let mut options = BackupOptions::new(&top, &target);
        // Slow at first, so that the guest is there before the job.
        options.job.speed = 64 << 10;
        let job = bench.manager.backup(options).await.unwrap();
        let before = content.clone();
        let guest = Guest::start(&bench.graph, &handle, content, 5);
        guest.work(&bench.graph, 100).await;
        job.set_speed(0).unwrap();
        job.wait().await.unwrap();
        guest.work(&bench.graph, 20).await;
        let expected = guest.stop().await;
        assert_met(&job);
        assert!(job.counters().bytes_copied_before_write > 0);
        drop((handle, top, target));
        bench.finish(&[TARGET], &before, "the backup").await;
        bench
            .finish(&[2, 1, 0], &expected, "the guest's disk")
            .await;
    });
}
