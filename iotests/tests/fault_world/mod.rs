//! A simulated world with the fault injectors in its registry, for their tests.
#![allow(dead_code)]

use std::sync::Arc;

use block_core::{
    BlockHandle, OpenOptions, Options, Registry, RequestFlags, Result, registry::ImplicitOpens,
};
use iotests::{
    faults,
    lab::{Lab, LabOptions},
    sim::Order,
    storage::{Content, Disk},
};

pub const PLAIN: RequestFlags = RequestFlags::empty();

/// A world in which tasks run in their order.
pub fn world() -> Lab {
    seeded(0, Order::Fifo)
}

pub fn seeded(seed: u64, order: Order) -> Lab {
    let mut registry = Registry::new()
        .with(format_raw::RawFactory)
        .with(format_qcow2::Qcow2Factory::default());
    faults::register(&mut registry);
    let options = LabOptions {
        seed,
        order,
        ..LabOptions::default()
    };
    Lab::new(&registry, options)
}

/// A disk with that content.
pub fn disk(lab: &Lab, name: &str, bytes: &[u8]) -> Arc<Disk> {
    let disk = Disk::new(name, Content::from_bytes(bytes));
    lab.disks.insert(disk.clone());
    disk
}

pub fn how() -> OpenOptions {
    OpenOptions {
        implicit: ImplicitOpens::Permit,
        ..OpenOptions::default()
    }
}

/// Opens what `options` (JSON or dotted keys) say.
pub async fn open(lab: &Lab, options: &str) -> Result<Arc<BlockHandle>> {
    let options = Options::from_text(options)?;
    let node = lab.registry.open(&lab.graph, options, how()).await?;
    lab.attach(&node, "test")
}

/// `blkdebug` over the disk `a`, with more options.
pub async fn debug(lab: &Lab, more: &str) -> Arc<BlockHandle> {
    debug_or_error(lab, more).await.unwrap()
}

pub async fn debug_or_error(lab: &Lab, more: &str) -> Result<Arc<BlockHandle>> {
    let base = "driver=blkdebug,image.driver=file,image.filename=a";
    let comma = if more.is_empty() { "" } else { "," };
    open(lab, &format!("{base}{comma}{more}")).await
}

/// `raw` over `blkdebug` over the disk `a`; `more` are options of `blkdebug`, with `file.` before each.
pub async fn raw_over_debug(lab: &Lab, more: &str) -> Arc<BlockHandle> {
    let base = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=a";
    open(lab, &format!("{base},{more}")).await.unwrap()
}

/// The errno of what went wrong, 0 for nothing.
pub fn errno<T>(result: &Result<T>) -> i32 {
    result.as_ref().map_or_else(|error| error.errno(), |_| 0)
}

/// Closes a handle that nobody else has.
pub async fn close(handle: Arc<BlockHandle>) -> Result<()> {
    Arc::try_unwrap(handle)
        .unwrap_or_else(|_| panic!("the handle is still in use"))
        .close()
        .await
}
