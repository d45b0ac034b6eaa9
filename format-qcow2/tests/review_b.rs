//! Reviewer's suspicions that need a storage with slow or selectively failing flushes and reads.

mod common;

use std::{
    any::Any,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use block_core::{
    BlockHandle, ErrorKind, Graph, OpenOptions, Options, PermissionSet, Permissions, Registry,
    RequestFlags, async_trait,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, Truncate},
    error::{Error, Result},
    image::{CheckMode, Progress},
    node::Edges,
    registry::{DriverFactory, OpenContext, Opened},
    request::Request,
};
use common::{
    storage::{Fault, Storage, StorageDriver},
    *,
};
use env_tokio::EnvTokio;
use format_qcow2::Qcow2Factory;

/// The storage of the other tests with more ways to misbehave.
#[derive(Clone)]
struct Odd {
    inner: Arc<StorageDriver>,
    /// Polls that a flush takes.
    slow_flush: Arc<AtomicU64>,
    /// After a write at this offset the next flush fails, once.
    trap: Arc<AtomicU64>,
    sprung: Arc<AtomicBool>,
}

#[async_trait]
impl BlockDriver for Odd {
    fn name(&self) -> &'static str {
        "odd"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn length(&self, edges: &Edges) -> u64 {
        self.inner.length(edges)
    }
    fn limits(&self, edges: &Edges) -> block_core::limits::Limits {
        self.inner.limits(edges)
    }
    async fn read(self: Arc<Self>, r: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        self.inner.clone().read(r, offset, buf).await
    }
    async fn write(
        self: Arc<Self>,
        r: Request,
        at: u64,
        buf: IoBuf,
        f: RequestFlags,
    ) -> Result<()> {
        if at == self.trap.load(Ordering::SeqCst) {
            self.sprung.store(true, Ordering::SeqCst);
        }
        self.inner.clone().write(r, at, buf, f).await
    }
    async fn write_zeroes(
        self: Arc<Self>,
        r: Request,
        at: u64,
        len: u64,
        f: RequestFlags,
    ) -> Result<()> {
        self.inner.clone().write_zeroes(r, at, len, f).await
    }
    async fn discard(self: Arc<Self>, r: Request, at: u64, len: u64) -> Result<()> {
        self.inner.clone().discard(r, at, len).await
    }
    async fn flush(self: Arc<Self>, r: Request) -> Result<()> {
        let mut left = self.slow_flush.load(Ordering::SeqCst);
        poll_fn(|context| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        if self.sprung.swap(false, Ordering::SeqCst) {
            return Err(Error::io("injected flush failure"));
        }
        self.inner.clone().flush(r).await
    }
    async fn truncate(self: Arc<Self>, r: Request, length: u64, how: Truncate) -> Result<()> {
        self.inner.clone().truncate(r, length, how).await
    }
    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct OddFactory(Odd);

#[async_trait]
impl DriverFactory for OddFactory {
    fn name(&self) -> &'static str {
        "odd"
    }
    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }
    async fn open(&self, _: OpenContext, _: Options) -> Result<Opened> {
        Ok(Opened {
            driver: Arc::new(self.0.clone()),
            edges: Vec::new(),
        })
    }
}

struct Bed {
    env: Arc<EnvTokio>,
    graph: Arc<Graph>,
    registry: Arc<Registry>,
    odd: Odd,
}

impl Bed {
    fn new(storage: &Arc<Storage>) -> Self {
        let env = Arc::new(EnvTokio::new(2).unwrap());
        let odd = Odd {
            inner: Arc::new(StorageDriver(storage.clone())),
            slow_flush: Arc::default(),
            trap: Arc::new(AtomicU64::new(u64::MAX)),
            sprung: Arc::default(),
        };
        Self {
            graph: Graph::new(env.clone()),
            registry: Arc::new(
                Registry::new()
                    .with(OddFactory(odd.clone()))
                    .with(Qcow2Factory::new()),
            ),
            env,
            odd,
        }
    }

    async fn open(&self, options: &str) -> BlockHandle {
        let text = format!("driver=qcow2,file.driver=odd,{options}");
        let options = Options::from_dotted(&text).unwrap();
        let node = self
            .registry
            .open(&self.graph, options, OpenOptions::default())
            .await
            .unwrap();
        let used = Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE;
        self.graph
            .attach(&node, PermissionSet::new(used, Permissions::all()), "test")
            .unwrap()
    }
}

fn within(seconds: u64, work: impl FnOnce() + Send + 'static) {
    let (tx, rx) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        work();
        tx.send(()).unwrap();
    });
    match rx.recv_timeout(Duration::from_secs(seconds)) {
        Ok(()) => thread.join().unwrap(),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
    }
}

async fn write(handle: &BlockHandle, at: u64, len: u64, value: u8) -> Result<()> {
    handle
        .write(at, vec![value; len as usize], RequestFlags::empty())
        .await
}

/// Pieces that wait for every pin must not wait for the pin of a piece that waits for them.
#[test]
fn r01_a_fragmented_write_on_a_full_disk_ends_when_flushes_are_slow() {
    within(30, || {
        const C: u64 = 4096;
        let storage = Storage::new(image_bytes("cluster_size=4096", 256 * C));
        let bed = Bed::new(&storage);
        bed.env.block_on(async {
            let handle = bed.open("").await;
            for n in 0..128 {
                write(&handle, 2 * n * C, C, 1).await.unwrap();
            }
            handle.flush().await.unwrap();
            let full = storage.state.lock().data.len() as u64;
            storage.set_fault(Fault::Full(full));
            bed.odd.slow_flush.store(500, Ordering::SeqCst);
            let error = write(&handle, 0, 256 * C, 2).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        });
    });
}

/// When the header was switched to a new L1 table but that wasn't confirmed durable, its clusters are not given out again.
#[test]
fn r10_a_failed_flush_while_the_l1_table_moves_leaves_a_usable_image() {
    const C: u64 = 512;
    let storage = Storage::new(image_bytes("cluster_size=512", 64 * 1024));
    let bed = Bed::new(&storage);
    bed.env.block_on(async {
        let handle = bed.open("").await;
        write(&handle, 0, 64 * C, 1).await.unwrap();
        handle.flush().await.unwrap();
        bed.odd.trap.store(36, Ordering::SeqCst);
        let failed = handle.truncate(16 << 20, Truncate::default()).await;
        println!("truncate: {failed:?}");
        assert!(failed.is_err());
        for n in 64..128 {
            write(&handle, n * C, C, 0xee).await.unwrap();
        }
    });
    // The process ends here; what reached the storage is there.
    let data = storage.state.lock().data.clone();
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig
            .open_storage(&Storage::new(data), "read-only=on")
            .await
            .unwrap();
        let report = handle
            .check(CheckMode::ReadOnly, Progress::new())
            .await
            .unwrap();
        println!(
            "corruptions {} errors {}: {:#?}",
            report.corruptions,
            report.check_errors,
            report.findings.iter().take(4).collect::<Vec<_>>()
        );
        let read = handle.read(0, (64 * C) as usize).await;
        assert!(
            read.unwrap()[..] == vec![1; (64 * C) as usize][..],
            "flushed data is gone"
        );
        assert_eq!(report.corruptions, 0);
    });
}

/// A read error while space is released doesn't concern what the guest wrote, and the space is released later.
#[test]
fn r11_what_was_made_durable_is_not_reported_as_lost() {
    const C: u64 = 512;
    let storage = Storage::new(image_bytes("cluster_size=512,refcount_bits=64", 2 << 20));
    let bed = Bed::new(&storage);
    bed.env.block_on(async {
        let handle = bed.open("refcount-cache-size=2k").await;
        for n in 0..1024 {
            write(&handle, n * C, C, 1).await.unwrap();
        }
        handle.flush().await.unwrap();
        handle.discard(0, C).await.unwrap();
        for n in 1..16 {
            handle.discard(n * 64 * C, C).await.unwrap();
        }
        storage.set_fault(Fault::Reads);
        let flushed = handle.flush().await;
        storage.set_fault(Fault::None);
        flushed.unwrap();
    });
}
