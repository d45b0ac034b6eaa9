//! Storage that loses power: what was written since the last completed flush is there, or not, sector by sector.

use std::{any::Any, sync::Arc, task::Poll};

use async_trait::async_trait;
use block_core::{
    Capabilities, DriverKind, Error, IoBuf, IoBufMut, Request, RequestFlags, Result,
    driver::BlockDriver, limits::Limits, node::Edges,
};
use parking_lot::Mutex;

use super::Numbers;

/// The content of one file.
#[derive(Default)]
pub(super) struct Disk {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last flush, each with what it was given, oldest first.
    unflushed: Vec<(u64, Vec<u8>)>,
    pub flushes: u64,
    /// Fails every write from now on.
    pub broken: bool,
    /// Writes let others go first.
    pub yielding: bool,
    /// With it, power is cut at random moments between two writes, and what is found then kept in `cuts`.
    pub cutting: Option<Numbers>,
    pub cuts: Vec<Vec<u8>>,
}

/// A protocol driver over a [`Disk`].
pub(super) struct Storage(pub Arc<Mutex<Disk>>);

impl Disk {
    pub(super) fn new(bytes: Vec<u8>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            now: bytes.clone(),
            durable: bytes,
            ..Self::default()
        }))
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.now.len() < end {
            self.now.resize(end, 0);
        }
        self.now[offset as usize..end].copy_from_slice(data);
        for sector in offset / 512..(end as u64).div_ceil(512) {
            let from = (sector * 512) as usize;
            let to = (from + 512).min(self.now.len());
            self.unflushed.push((sector, self.now[from..to].to_vec()));
        }
        if let Some(mut numbers) = self.cutting.take() {
            if numbers.below(4) == 0 {
                let cut = self.cut(&mut numbers);
                self.cuts.push(cut);
            }
            self.cutting = Some(numbers);
        }
    }

    /// What may be found after a power cut now: of the writes to each sector since the last flush any one (or none) was
    /// the last to reach the disk.
    pub(super) fn cut(&self, numbers: &mut Numbers) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let keep = numbers.below(4);
        for (sector, data) in &self.unflushed {
            if numbers.below(4) >= keep {
                continue;
            }
            let from = (sector * 512) as usize;
            if bytes.len() < from + data.len() {
                bytes.resize(from + data.len(), 0);
            }
            bytes[from..from + data.len()].copy_from_slice(data);
        }
        bytes
    }
}

async fn yield_once() {
    let mut yielded = false;
    futures::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[async_trait]
impl BlockDriver for Storage {
    fn name(&self) -> &'static str {
        "storage"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::WRITE | Capabilities::WRITE_ZEROES | Capabilities::GROW
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.0.lock().now.len() as u64
    }

    fn limits(&self, _edges: &Edges) -> Limits {
        Limits::default()
    }

    async fn read(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        mut buf: IoBufMut,
    ) -> Result<()> {
        let disk = self.0.lock();
        let from = offset as usize;
        buf.copy_from_slice(0, &disk.now[from..from + buf.len()]);
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        buf: IoBuf,
        _flags: RequestFlags,
    ) -> Result<()> {
        if self.0.lock().yielding {
            yield_once().await;
        }
        let mut disk = self.0.lock();
        if disk.broken {
            return Err(Error::io("broken"));
        }
        disk.put(offset, &buf.to_vec());
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
        _flags: RequestFlags,
    ) -> Result<()> {
        self.0.lock().put(offset, &vec![0; len as usize]);
        Ok(())
    }

    async fn flush(self: Arc<Self>, _request: Request) -> Result<()> {
        let mut disk = self.0.lock();
        if disk.broken {
            return Err(Error::io("broken"));
        }
        disk.durable = disk.now.clone();
        disk.unflushed.clear();
        disk.flushes += 1;
        Ok(())
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
