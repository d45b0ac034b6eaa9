//! What the layers cost: a 4 KiB read, and an overwrite, of a mapped cluster through qcow2 on raw on a file in the page
//! cache, beside a bare `pread` and `pwrite` of a
//! plain file of the same size.

use std::{hint::black_box, os::unix::fs::FileExt, sync::Arc};

use block_core::{
    BlockHandle, Buffer, Environment, Graph, IoBuf, OpenOptions, Options, PermissionSet,
    Permissions, Registry, RequestFlags,
};
use criterion::{Criterion, criterion_main};
use env_tokio::EnvTokio;
use serde_json::json;

const DISK: u64 = 64 << 20;
const BLOCK: usize = 4096;

struct Stack {
    env: Arc<EnvTokio>,
    handle: BlockHandle,
    file: std::fs::File,
    _directory: tempfile::TempDir,
}

fn stack() -> Stack {
    let env = Arc::new(EnvTokio::new(2).expect("a runtime"));
    let graph = Graph::new(env.clone() as Arc<dyn Environment>);
    let registry = Arc::new(
        Registry::new()
            .with(protocol_file::FileFactory::default())
            .with(format_raw::RawFactory)
            .with(format_qcow2::Qcow2Factory::default()),
    );
    let directory = tempfile::tempdir_in(".").expect("a directory");
    let path = directory.path().join("bench.qcow2");
    let name = path.to_string_lossy().into_owned();
    let handle = env.block_on(async {
        let size = Options::new().with("size", DISK);
        registry
            .create(&graph, "qcow2", &name, size)
            .await
            .expect("an image");
        let options = json!({
            "driver": "qcow2",
            "file": {
                "driver": "raw",
                "file": {"driver": "file", "filename": name, "inline": "always"},
            },
        });
        let options = Options::from_json(&options.to_string()).expect("options");
        let node = registry
            .open(&graph, options, OpenOptions::default())
            .await
            .expect("a node");
        let set = PermissionSet::new(
            Permissions::CONSISTENT_READ | Permissions::WRITE,
            Permissions::all(),
        );
        let handle = graph.attach(&node, set, "bench").expect("a handle");
        let mut at = 0;
        while at < DISK {
            let data = vec![7u8; 1 << 20];
            handle
                .write(at, data, RequestFlags::empty())
                .await
                .expect("a write");
            at += 1 << 20;
        }
        handle.flush().await.expect("a flush");
        handle
    });
    let bare = directory.path().join("bare.raw");
    std::fs::write(&bare, vec![7u8; DISK as usize]).expect("a plain file");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&bare)
        .expect("the file");
    Stack {
        env,
        handle,
        file,
        _directory: directory,
    }
}

fn next(at: &mut u64) -> u64 {
    *at = (*at * 5 + 4096 * 7919) % DISK;
    *at - *at % BLOCK as u64
}

fn bench(criterion: &mut Criterion) {
    let stack = stack();
    let mut group = criterion.benchmark_group("4 KiB of a mapped cluster");
    let mut at = 1;
    group.bench_function("read: bare pread", |bencher| {
        let mut buffer = vec![0u8; BLOCK];
        bencher.iter(|| {
            stack
                .file
                .read_exact_at(&mut buffer, next(&mut at))
                .expect("a read");
            black_box(&buffer);
        });
    });
    group.bench_function("read: qcow2 on raw on file", |bencher| {
        let mut buffer = Some(Buffer::new(BLOCK));
        stack.env.block_on(async {
            bencher.iter(|| {
                let mine = buffer.take().expect("the buffer");
                let read = stack.handle.read_into(next(&mut at), mine);
                let back = futures::executor::block_on(read).expect("a read");
                buffer = Some(black_box(back));
            });
        });
    });
    group.bench_function("overwrite: bare pwrite", |bencher| {
        let buffer = vec![9u8; BLOCK];
        bencher.iter(|| {
            stack
                .file
                .write_all_at(&buffer, next(&mut at))
                .expect("a write");
        });
    });
    group.bench_function("overwrite: qcow2 on raw on file", |bencher| {
        let data = IoBuf::from(Buffer::from(vec![9u8; BLOCK]));
        bencher.iter(|| {
            let write = stack
                .handle
                .write(next(&mut at), data.clone(), RequestFlags::empty());
            futures::executor::block_on(write).expect("a write");
        });
    });
    group.finish();
}

mod groups {
    #![allow(missing_docs, reason = "made by a macro")]
    criterion::criterion_group!(benches, super::bench);
}

criterion_main!(groups::benches);
