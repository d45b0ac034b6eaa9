//! `blkverify`: does every write on two images and compares every read. `test` is the image under suspicion, `raw` the one
//! that is believed. A read that differs fails and is counted; nothing is ever repaired.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    Buffer, Error, Result,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, Reopen, default_child_permissions},
    flags::{PermissionSet, RequestFlags},
    limits::Limits,
    node::Edges,
    options::Options,
    registry::{DriverFactory, OpenContext, Opened, Registry},
    request::{Child, Request},
    status::DriverStatus,
};
use futures::future::join;
use serde::Deserialize;
use serde_json::Value;

use super::pass;

/// How many bytes of each side an error shows.
const SHOWN: usize = 16;

/// A node over two images that ought to be the same.
pub struct Blkverify {
    child: Capabilities,
    read_only: AtomicBool,
    mismatches: AtomicU64,
    compared: AtomicU64,
}

/// The believed image.
fn raw(request: &Request) -> Result<&Child> {
    request
        .child(ChildRole::Target)
        .ok_or_else(|| Error::invalid("A block device must be specified for \"raw\""))
}

/// Both, whatever becomes of the first; the image under suspicion is the first to be heard.
async fn both(
    test: impl Future<Output = Result<()>>,
    raw: impl Future<Output = Result<()>>,
) -> Result<()> {
    let (test, raw) = join(test, raw).await;
    test.and(raw.map_err(|error| error.context("blkverify: the raw image")))
}

fn hex(bytes: &[u8]) -> String {
    let list: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    list.join(" ")
}

impl Blkverify {
    /// Reads that differed.
    pub fn mismatches(&self) -> u64 {
        self.mismatches.load(Ordering::Relaxed)
    }

    fn compare(&self, offset: u64, test: &[u8], raw: &[u8]) -> Result<()> {
        self.compared.fetch_add(1, Ordering::Relaxed);
        let Some(at) = test.iter().zip(raw).position(|(a, b)| a != b) else {
            return Ok(());
        };
        self.mismatches.fetch_add(1, Ordering::Relaxed);
        let shown = at..(at + SHOWN).min(test.len());
        Err(Error::io(format!(
            "blkverify: contents mismatch at offset {}: raw has {}, test has {}",
            offset + at as u64,
            hex(&raw[shown.clone()]),
            hex(&test[shown])
        )))
    }
}

#[async_trait]
impl BlockDriver for Blkverify {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        // What is discarded may differ; and a change of the size of one of them can't be taken back when the other's
        // fails.
        let differ = Capabilities::DISCARD
            | Capabilities::DISCARD_ZEROES
            | Capabilities::TRUNCATE
            | Capabilities::GROW;
        // Overlapping writes must not take effect in a different order on either side.
        let all = pass::capabilities(self.child, self.read_only.load(Ordering::Acquire));
        (all - differ) | Capabilities::SERIALISE_WRITES
    }

    fn length(&self, edges: &Edges) -> u64 {
        pass::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let raw = edges.child(ChildRole::Target).map(Child::limits);
        pass::limits(edges, raw.unwrap_or_default())
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        // The raw image is read and written just like the other.
        let role = match role {
            ChildRole::Target => ChildRole::Filtered,
            other => other,
        };
        default_child_permissions(role, parents, self.read_only.load(Ordering::Acquire))
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let (test, test_buf) = Buffer::try_new(buf.len())?.lend();
        let (believed, raw_buf) = Buffer::try_new(buf.len())?.lend();
        both(
            request.file()?.read(offset, test_buf),
            raw(&request)?.read(offset, raw_buf),
        )
        .await?;
        let test = test.reclaim().map_err(|_| kept())?;
        let believed = believed.reclaim().map_err(|_| kept())?;
        buf.copy_from_slice(0, &test);
        self.compare(offset, &test, &believed)
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        both(
            request.file()?.write(offset, buf.clone(), flags),
            raw(&request)?.write(offset, buf, flags),
        )
        .await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        // One side may be able to do it in a fast way and the other not.
        let flags = flags - RequestFlags::NO_FALLBACK;
        both(
            request.file()?.write_zeroes(offset, len, flags),
            raw(&request)?.write_zeroes(offset, len, flags),
        )
        .await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        both(request.file()?.flush(), raw(&request)?.flush()).await
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(pass::status(offset, len))
    }

    async fn reopen(self: Arc<Self>, _request: Request, changes: Reopen) -> Result<()> {
        if let Some(read_only) = pass::reopen(&changes)? {
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("blkverify-compared", self.compared.load(Ordering::Relaxed)),
            ("blkverify-mismatches", self.mismatches()),
        ]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn kept() -> Error {
    Error::io("a driver kept a part of a read buffer")
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BlkverifyOptions {}

/// Makes `blkverify` nodes, with the children `test` and `raw`. File name: `blkverify:RAW:TEST`, where the format of TEST is
/// found by probing.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlkverifyFactory;

#[async_trait]
impl DriverFactory for BlkverifyFactory {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn parse_filename(&self, registry: &Registry, rest: &str) -> Option<Result<Options>> {
        Some(rest.split_once(':').map_or_else(
            || {
                Err(Error::invalid(
                    "blkverify requires raw copy and original image path",
                ))
            },
            |(raw, test)| {
                let raw = registry.filename_options(raw)?;
                let storage = registry.filename_options(test)?;
                // Without a driver, the format above the storage is found by probing.
                let test = Options::new().with("file", Value::Object(storage.0));
                Ok(Options::new()
                    .with("driver", "blkverify")
                    .with("raw", Value::Object(raw.0))
                    .with("test", Value::Object(test.0)))
            },
        ))
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let raw = pass::required(&context, &mut options, "raw").await?;
        let test = pass::required(&context, &mut options, "test").await?;
        let BlkverifyOptions {} = options.parse()?;
        let child = Child::unattached(test.clone());
        if raw.length() != child.length() {
            return Err(Error::invalid(format!(
                "blkverify: the raw image has {} bytes, the image to be tested {}",
                raw.length(),
                child.length()
            )));
        }
        let driver = Blkverify {
            child: child.driver().capabilities() & raw.driver().capabilities(),
            read_only: AtomicBool::new(context.node.read_only),
            mismatches: AtomicU64::new(0),
            compared: AtomicU64::new(0),
        };
        Ok(Opened {
            driver: Arc::new(driver),
            edges: vec![
                (ChildRole::Target, "raw".to_owned(), raw),
                (ChildRole::Filtered, "test".to_owned(), test),
            ],
        })
    }
}
