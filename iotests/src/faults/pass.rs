//! What the fault injectors have in common: each is as the node that it filters is, and sees every request, because
//! it never tells the core where the bytes are.

use block_core::{
    Error, Node, Result,
    driver::{Capabilities, ChildRole, Reopen},
    limits::Limits,
    node::Edges,
    options::Options,
    registry::{OpenContext, OpenOptions},
    request::Child,
    status::{DriverStatus, StatusFlags},
};
use serde_json::Value;
use std::sync::Arc;

/// The most of a small file (rules, a recorded order) that is read, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Capabilities of a filter over a child with `child`, which passes everything on.
pub(super) fn capabilities(child: Capabilities, read_only: bool) -> Capabilities {
    let inherited =
        child & (Capabilities::DISCARD_ZEROES | Capabilities::ZERO_INIT | Capabilities::GROW);
    if read_only {
        return inherited - Capabilities::GROW;
    }
    inherited
        | Capabilities::WRITE
        | Capabilities::WRITE_ZEROES
        | Capabilities::DISCARD
        | Capabilities::FUA
        | Capabilities::TRUNCATE
}

/// The length of the filtered child.
pub(super) fn length(edges: &Edges) -> u64 {
    edges.child(ChildRole::Filtered).map_or(0, Child::length)
}

/// The limits of the filtered child, merged with `own`.
pub(super) fn limits(edges: &Edges, own: Limits) -> Limits {
    edges
        .child(ChildRole::Filtered)
        .map_or(own, |child| own.merge(child.limits()))
}

/// "Ask the child."
pub(super) const fn status(offset: u64, len: u64) -> DriverStatus {
    DriverStatus {
        flags: StatusFlags::RAW.union(StatusFlags::OFFSET_VALID),
        len,
        file_offset: offset,
    }
}

/// Only the read-only switch can be changed.
pub(super) fn reopen(changes: &Reopen) -> Result<Option<bool>> {
    match changes.options.keys().next() {
        Some(key) => Err(Error::invalid(format!("Cannot change the option '{key}'"))),
        None => Ok(changes.read_only),
    }
}

/// Opens a child that must be there.
pub(super) async fn required(
    context: &OpenContext,
    options: &mut Options,
    key: &str,
) -> Result<Arc<Node>> {
    context
        .open_child(options, key)
        .await?
        .ok_or_else(|| Error::invalid(format!("A block device must be specified for \"{key}\"")))
}

/// Reads a whole file through the registry's own protocols.
pub(super) async fn read_file(context: &OpenContext, name: &str) -> Result<Vec<u8>> {
    let options = context
        .registry()
        .filename_options(name)?
        .with("read-only", true);
    let how = OpenOptions::default();
    let node = context
        .registry()
        .open(context.graph(), options, how)
        .await?;
    let read = async {
        let len = node.length();
        if len > MAX_FILE {
            return Err(Error::invalid(format!(
                "'{name}' is larger than {MAX_FILE} bytes"
            )));
        }
        Child::unattached(node.clone())
            .read_padded(0, len as usize)
            .await
    }
    .await;
    let released = context.graph().release(&node).await;
    let bytes = read?.to_vec();
    released?;
    Ok(bytes)
}

/// Opens a file for writing, made new and empty, through the registry's own protocols.
pub(super) async fn create_file(context: &OpenContext, name: &str) -> Result<Arc<Node>> {
    let (registry, graph) = (context.registry(), context.graph());
    let options = registry.filename_options(name)?;
    let driver = options.get_str("driver").unwrap_or("file").to_owned();
    let path = options.get_str("filename").unwrap_or(name).to_owned();
    registry
        .create(graph, &driver, &path, Options::new().with("size", 0))
        .await?;
    let mut holder = Options::new().with("log", Value::Object(options.with("read-only", false).0));
    required(context, &mut holder, "log").await
}
