//! A cached 4 KiB read through the driver against a bare `pread` of the same bytes, and an overwrite likewise.

use std::{fs::File, hint::black_box, os::unix::fs::FileExt, sync::Arc, time::Duration};

use block_core::{
    buffer::{Buffer, IoBuf},
    env::Environment,
    flags::{PermissionSet, Permissions, RequestFlags},
    graph::Graph,
    handle::BlockHandle,
    options::Options,
    registry::{OpenOptions, Registry},
};
use criterion::Criterion;
use futures::{executor::block_on, future::BoxFuture};
use protocol_file::FileFactory;

const LEN: usize = 4096;
const BLOCKS: u64 = 1024;

/// Nothing in these benchmarks needs time, tasks or chance.
struct Bare;

impl Environment for Bare {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        Box::pin(async {})
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        block_on(task);
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        work();
    }

    fn random(&self) -> u64 {
        4
    }
}

fn open(path: &str, inline: &str, aio: &str) -> BlockHandle {
    let graph = Graph::new(Arc::new(Bare));
    // The handle finds its graph by a weak reference.
    std::mem::forget(graph.clone());
    let registry = Arc::new(Registry::new().with(FileFactory::new()));
    let options = Options::new()
        .with("driver", "file")
        .with("node-name", "file0")
        .with("filename", path)
        .with("inline", inline)
        .with("aio", aio)
        .with("locking", "off");
    let node = block_on(registry.open(&graph, options, OpenOptions::default())).expect("opens");
    let all = Permissions::all();
    graph
        .attach(&node, PermissionSet::new(all, all), "bench")
        .expect("attaches")
}

fn next(at: &mut u64) -> u64 {
    *at = (*at + 7) % BLOCKS;
    *at * LEN as u64
}

fn cached(c: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = dir.path().join("data");
    std::fs::write(&path, vec![1; LEN * BLOCKS as usize]).expect("data");
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("opens");
    let name = path.to_str().expect("a plain name");

    let mut group = c.benchmark_group("cached 4 KiB read");
    group.bench_function("bare pread", |b| {
        let mut buffer = Buffer::new(LEN);
        let mut at = 0;
        b.iter(|| file.read_exact_at(black_box(&mut buffer[..]), next(&mut at)));
    });
    for (inline, aio) in [
        ("always", "threads"),
        ("nowait", "threads"),
        ("never", "io_uring"),
        ("never", "threads"),
    ] {
        let handle = open(name, inline, aio);
        group.bench_function(format!("inline={inline} aio={aio}"), |b| {
            let mut buffer = Some(Buffer::new(LEN));
            let mut at = 0;
            b.iter(|| {
                let given = buffer.take().expect("it came back");
                let read = block_on(handle.read_into(next(&mut at), given));
                buffer = Some(read.expect("reads"));
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("cached 4 KiB overwrite");
    let data = IoBuf::from(Buffer::new(LEN));
    group.bench_function("bare pwrite", |b| {
        let buffer = Buffer::new(LEN);
        let mut at = 0;
        b.iter(|| file.write_all_at(black_box(&buffer[..]), next(&mut at)));
    });
    for (inline, aio) in [
        ("always", "threads"),
        ("nowait", "io_uring"),
        ("nowait", "threads"),
    ] {
        let handle = open(name, inline, aio);
        group.bench_function(format!("inline={inline} aio={aio}"), |b| {
            let mut at = 0;
            b.iter(|| {
                block_on(handle.write(next(&mut at), data.clone(), RequestFlags::empty()))
                    .expect("writes");
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    cached(&mut criterion);
    criterion.final_summary();
}
