//! Block status through layers: the walk down filters and backing files (digest of block semantics, section 2).

use std::sync::Arc;

use crate::{
    driver::{Capabilities, DriverKind},
    error::{Error, Operation, Result},
    node::Node,
    path,
    status::{BlockStatus, DriverStatus, StatusFlags},
};

/// What one layer says, with where its bytes are.
struct Layer {
    flags: StatusFlags,
    len: u64,
    mapped: Option<(Arc<Node>, u64)>,
}

/// Asks the driver of `node` alone. A length of 0 with EOF says that `offset` is beyond the end.
async fn ask_driver(node: &Arc<Node>, offset: u64, len: u64) -> Result<Option<DriverStatus>> {
    let length = node.length();
    if offset >= length || len == 0 {
        return Ok(None);
    }
    let len = len.min(length - offset);
    let limits = node.limits();
    let align = limits.request_alignment.max(1);
    let start = offset - offset % align;
    let end = (offset + len).next_multiple_of(align);
    let driver = node.driver().clone();
    let mut status = path::unranged(node, None, move |request| {
        driver.block_status(request, start, end - start)
    })
    .await?;
    if status.len <= offset - start {
        return Err(
            Error::io("a driver gave an empty answer to a status request")
                .with_operation(Operation::BlockStatus, offset, len)
                .with_node(node.name()),
        );
    }
    status.file_offset += offset - start;
    status.len = (status.len - (offset - start)).min(len);
    if offset + status.len >= length {
        status.flags |= StatusFlags::EOF;
    }
    Ok(Some(status))
}

/// One layer, with RAW resolved at the child that holds the bytes, and DATA refined by holes in the storage when
/// `want_zero` is set.
async fn layer(node: &Arc<Node>, offset: u64, len: u64, want_zero: bool) -> Result<Layer> {
    let Some(status) = ask_driver(node, offset, len).await? else {
        return Ok(Layer {
            flags: StatusFlags::EOF,
            len: 0,
            mapped: None,
        });
    };
    let edges = node.edges();
    let DriverStatus {
        mut flags,
        mut len,
        file_offset,
    } = status;
    let eof = flags & StatusFlags::EOF;
    if flags.contains(StatusFlags::RAW) {
        let Some(child) = edges.primary() else {
            return Ok(Layer {
                flags: eof | StatusFlags::DATA | StatusFlags::ALLOCATED,
                len,
                mapped: None,
            });
        };
        let below = Box::pin(layer(child.node(), file_offset, len, want_zero)).await?;
        if below.len == 0 {
            // Beyond the end of the storage.
            return Ok(Layer {
                flags: eof | StatusFlags::ZERO | StatusFlags::ALLOCATED,
                len,
                mapped: None,
            });
        }
        let reaches = below.len >= len;
        return Ok(Layer {
            flags: (below.flags - StatusFlags::EOF)
                | if reaches { eof } else { StatusFlags::empty() },
            len: below.len.min(len),
            mapped: below.mapped,
        });
    }
    if flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
        flags |= StatusFlags::ALLOCATED;
    } else if node.driver().capabilities().contains(Capabilities::BACKING) {
        match edges.child(crate::driver::ChildRole::Backing) {
            None => flags |= StatusFlags::ZERO,
            Some(backing) if offset >= backing.length() => flags |= StatusFlags::ZERO,
            Some(_) => {}
        }
    } else if node.driver().kind() == DriverKind::Format {
        // No backing file is possible: what isn't allocated reads as zeroes.
        flags |= StatusFlags::ZERO;
    }
    let mut mapped = None;
    if flags.contains(StatusFlags::OFFSET_VALID) {
        mapped = match edges.primary() {
            Some(child) if node.driver().kind() != DriverKind::Protocol => {
                Some((child.node().clone(), file_offset))
            }
            _ => Some((node.clone(), file_offset)),
        };
    }
    if want_zero
        && flags.contains(StatusFlags::RECURSE | StatusFlags::DATA | StatusFlags::OFFSET_VALID)
        && !flags.contains(StatusFlags::ZERO)
        && let Some((below, at)) = &mapped
        && below.id() != node.id()
    {
        let status = Box::pin(layer(below, *at, len, want_zero)).await?;
        if status.len == 0 {
            flags |= StatusFlags::ZERO;
        } else {
            if status.flags.contains(StatusFlags::ZERO) {
                flags |= StatusFlags::ZERO;
            }
            if status.len < len {
                len = status.len;
                flags -= StatusFlags::EOF;
            }
        }
    }
    // Where the bytes are in the storage at the bottom: raw layers between add their offset.
    if let Some((below, at)) = &mapped
        && below.id() != node.id()
        && below.driver().kind() != DriverKind::Protocol
        && let Some(resolved) = resolve(below, *at, len).await?
    {
        mapped = Some(resolved);
    }
    Ok(Layer {
        flags: flags - StatusFlags::RECURSE,
        len,
        mapped,
    })
}

/// Follows RAW layers down to the node that holds the bytes.
async fn resolve(node: &Arc<Node>, offset: u64, len: u64) -> Result<Option<(Arc<Node>, u64)>> {
    let mut node = node.clone();
    let mut offset = offset;
    loop {
        if node.driver().kind() == DriverKind::Protocol {
            return Ok(Some((node, offset)));
        }
        match ask_driver(&node, offset, len).await? {
            Some(status) if status.flags.contains(StatusFlags::RAW) => {
                let Some(child) = node.edges().primary().cloned() else {
                    return Ok(None);
                };
                offset = status.file_offset;
                node = child.node().clone();
            }
            _ => return Ok(None),
        }
    }
}

/// Walks from `top` down, stopping at (before) `base`, to the first layer that decides the content at `offset`.
pub(crate) async fn block_status(
    top: &Arc<Node>,
    base: Option<&Arc<Node>>,
    offset: u64,
    len: u64,
    want_zero: bool,
) -> Result<BlockStatus> {
    let mut node = top.clone();
    let mut len = len;
    let mut depth = 0;
    let mut eof = StatusFlags::empty();
    loop {
        let is_filter = node.driver().kind() == DriverKind::Filter;
        let found = if is_filter {
            if node.id() == top.id() && offset + len >= node.length() {
                eof = StatusFlags::EOF;
            }
            Layer {
                flags: StatusFlags::empty(),
                len,
                mapped: None,
            }
        } else {
            layer(&node, offset, len, want_zero).await?
        };
        if node.id() == top.id() {
            if found.len == 0 {
                return Ok(BlockStatus {
                    flags: StatusFlags::EOF,
                    len: 0,
                    mapped: None,
                    depth: 0,
                });
            }
            if !is_filter {
                eof = found.flags & StatusFlags::EOF;
            }
        } else if found.len == 0 {
            // A short layer hides what is below it.
            let flags = StatusFlags::ZERO | StatusFlags::ALLOCATED | eof;
            return Ok(BlockStatus {
                flags,
                len,
                mapped: None,
                depth,
            });
        }
        if found.len < len {
            eof = StatusFlags::empty();
            if node.id() == top.id() {
                eof = found.flags & StatusFlags::EOF;
            }
        }
        len = len.min(found.len);
        let flags = (found.flags - StatusFlags::EOF) | eof;
        let decided = flags.contains(StatusFlags::ALLOCATED);
        let next = node.edges().chain_child().map(|child| child.node().clone());
        let at_end = match (&next, base) {
            (None, _) => true,
            (Some(next), Some(base)) => next.id() == base.id(),
            (Some(_), None) => false,
        };
        if decided || at_end {
            return Ok(BlockStatus {
                flags,
                len,
                mapped: found.mapped,
                depth,
            });
        }
        // The layer below may end within the range: the rest reads as zeroes, and is asked for separately.
        if let Some(next) = next {
            let below = next.length();
            if offset < below && offset + len > below {
                len = below - offset;
                eof = StatusFlags::empty();
            }
            node = next;
            depth += 1;
        }
    }
}

/// Whether `node` itself (filters passed through) decides the content at `offset`, and for how many bytes.
///
/// # Errors
/// What the drivers report.
pub async fn is_allocated_at(node: &Arc<Node>, offset: u64, len: u64) -> Result<(bool, u64)> {
    let node = node.skip_filters();
    let found = layer(&node, offset, len, false).await?;
    Ok((found.flags.contains(StatusFlags::ALLOCATED), found.len))
}

/// Whether a layer from `top` down to above `base` (or including it) decides the content at `offset`, and for how many
/// bytes the answer holds. A layer that ends before `offset` counts as deciding.
///
/// # Errors
/// What the drivers report.
pub async fn is_allocated_above(
    top: &Arc<Node>,
    base: Option<&Arc<Node>>,
    include_base: bool,
    offset: u64,
    len: u64,
) -> Result<(bool, u64)> {
    let mut node = Some(top.clone());
    let mut len = len;
    while let Some(at) = node {
        let is_base = base.is_some_and(|base| base.id() == at.id());
        if is_base && !include_base {
            break;
        }
        if at.driver().kind() != DriverKind::Filter {
            let found = layer(&at, offset, len, false).await?;
            if found.len == 0 {
                return Ok((
                    at.id() != top.id(),
                    if at.id() == top.id() { 0 } else { len },
                ));
            }
            len = len.min(found.len);
            if found.flags.contains(StatusFlags::ALLOCATED) {
                return Ok((true, len));
            }
        }
        if is_base {
            break;
        }
        node = at.edges().chain_child().map(|child| child.node().clone());
        // What a shorter layer below doesn't reach is asked for separately.
        if let Some(below) = &node {
            let end = below.length();
            if offset < end && offset + len > end {
                len = end - offset;
            }
        }
    }
    Ok((false, len))
}
