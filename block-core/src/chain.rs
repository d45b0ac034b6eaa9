//! Block status through layers: the walk down filters and backing files (digest of block semantics, section 2).

use std::sync::Arc;

use crate::{
    driver::{Capabilities, DriverKind},
    error::{Error, Operation, Result},
    mutant,
    node::Node,
    path,
    status::{BlockStatus, DriverStatus, StatusFlags},
    tracked::Tracked,
};

/// What one layer says, with where its bytes are.
struct Layer {
    flags: StatusFlags,
    len: u64,
    mapped: Option<(Arc<Node>, u64)>,
}

/// Asks the driver of `node` alone. A length of 0 with EOF says that `offset` is beyond the end. `asking` goes with the question,
/// which may outlive whoever waits for the answer.
async fn ask_driver(
    node: &Arc<Node>,
    asking: &Arc<Tracked>,
    offset: u64,
    len: u64,
) -> Result<Option<DriverStatus>> {
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
    let asking = asking.clone();
    let mut status = path::unranged(node, None, move |request| {
        Box::pin(async move {
            let _asking = asking;
            driver.block_status(request, start, end - start).await
        })
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
///
/// What the driver says of places in the storage holds until it is known what is there: nothing may move meanwhile.
async fn layer(node: &Arc<Node>, offset: u64, len: u64, want_zero: bool) -> Result<Layer> {
    let asking = path::ask(node).await;
    let Some(status) = ask_driver(node, &asking, offset, len).await? else {
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
        // The child as a whole: it may have a chain of its own.
        let below = block_status(child.node(), None, file_offset, len, want_zero);
        let below = Box::pin(below).await?;
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
                | StatusFlags::ALLOCATED
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
            Some(backing)
                if offset >= backing.length()
                    && !mutant::is_active("status-beyond-short-backing-not-zero") =>
            {
                flags |= StatusFlags::ZERO;
            }
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
        let asking = path::ask(&node).await;
        match ask_driver(&node, &asking, offset, len).await? {
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

/// Walks from `top` down, stopping at (before) `base`, to the first layer that decides the content at `offset`. Nothing
/// is above `top` itself: with `top` as the base no layer is asked.
pub(crate) async fn block_status(
    top: &Arc<Node>,
    base: Option<&Arc<Node>>,
    offset: u64,
    len: u64,
    want_zero: bool,
) -> Result<BlockStatus> {
    let length = top.length();
    let answer = |flags: StatusFlags, len: u64, mapped, depth| {
        let at_end = offset.saturating_add(len) >= length;
        let eof = if at_end {
            StatusFlags::EOF
        } else {
            StatusFlags::empty()
        };
        Ok(BlockStatus {
            flags: (flags - StatusFlags::EOF) | eof,
            len,
            mapped,
            depth,
        })
    };
    let mut len = len.min(length.saturating_sub(offset));
    if len == 0 || base.is_some_and(|base| base.id() == top.id()) {
        return answer(StatusFlags::empty(), len, None, 0);
    }
    let mut node = top.clone();
    let mut depth = 0;
    loop {
        let found = if node.driver().kind() == DriverKind::Filter {
            if crate::debug::listens(&node) {
                // A fault injector may have an error for this.
                let asking = path::ask(&node).await;
                ask_driver(&node, &asking, offset, len).await?;
            }
            Layer {
                flags: StatusFlags::empty(),
                len,
                mapped: None,
            }
        } else {
            layer(&node, offset, len, want_zero).await?
        };
        if found.len == 0 {
            if node.id() == top.id() {
                // It was shortened meanwhile.
                return Ok(BlockStatus {
                    flags: StatusFlags::EOF,
                    len: 0,
                    mapped: None,
                    depth: 0,
                });
            }
            // A short layer hides what is below it.
            let flags = StatusFlags::ZERO | StatusFlags::ALLOCATED;
            return answer(flags, len, None, depth);
        }
        len = len.min(found.len);
        let next = node.edges().chain_child().map(|child| child.node().clone());
        let decided = found.flags.contains(StatusFlags::ALLOCATED);
        match next {
            Some(next) if !decided && base.is_none_or(|base| base.id() != next.id()) => {
                // The layer below may end within the range: the rest reads as zeroes, and is asked for separately.
                let below = next.length();
                if offset < below {
                    len = len.min(below - offset);
                }
                node = next;
                depth += 1;
            }
            _ => return answer(found.flags, len, found.mapped, depth),
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
    let mut len = len.min(top.length().saturating_sub(offset));
    if len == 0 {
        return Ok((false, 0));
    }
    let mut node = Some(top.clone());
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
            if offset < end {
                len = len.min(end - offset);
            }
        }
    }
    Ok((false, len))
}
