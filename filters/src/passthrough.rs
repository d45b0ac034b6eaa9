//! What every filter of this crate has in common: it is as its filtered child is, and what it doesn't do itself is done by
//! the child. Nothing here decides anything about a request.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use block_core::{
    Error, Result,
    driver::{BlockDriver, Capabilities, ChildRole, Reopen},
    limits::Limits,
    node::{Edges, Node},
    registry::Opened,
    request::Child,
    status::{DriverStatus, StatusFlags},
};

/// What a filter knows of its child and of how it was opened. A field `base` of this type is what [`pass_through`] needs.
pub(crate) struct Base {
    child: Capabilities,
    read_only: AtomicBool,
}

impl Base {
    pub(crate) fn new(child: &Child, read_only: bool) -> Self {
        Self {
            child: child.driver().capabilities(),
            read_only: AtomicBool::new(read_only),
        }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        capabilities(self.child, self.is_read_only())
    }

    pub(crate) fn reopen(&self, changes: &Reopen) -> Result<()> {
        reopen(&self.read_only, changes)
    }
}

/// A reopen that can change nothing but whether writes are allowed.
pub(crate) fn reopen(read_only: &AtomicBool, changes: &Reopen) -> Result<()> {
    if let Some(key) = changes.options.keys().next() {
        return Err(Error::invalid(format!("Cannot change the option '{key}'")));
    }
    if let Some(now) = changes.read_only {
        read_only.store(now, Ordering::Release);
    }
    Ok(())
}

/// What a factory returns: `driver` over `file`.
pub(crate) fn opened(driver: Arc<dyn BlockDriver>, file: Arc<Node>) -> Opened {
    Opened {
        driver,
        edges: vec![(ChildRole::Filtered, "file".to_owned(), file)],
    }
}

/// Inside of an `impl BlockDriver`: the methods that are the same for every filter. They are written as
/// `async_trait` would rewrite them, because it doesn't look into macros.
macro_rules! pass_through {
    () => {
        fn kind(&self) -> ::block_core::driver::DriverKind {
            ::block_core::driver::DriverKind::Filter
        }

        fn length(&self, edges: &::block_core::node::Edges) -> u64 {
            $crate::passthrough::length(edges)
        }

        fn flush<'a>(
            self: ::std::sync::Arc<Self>,
            request: ::block_core::request::Request,
        ) -> $crate::passthrough::Answer<'a, ()>
        where
            Self: 'a,
        {
            Box::pin(async move { request.file()?.flush().await })
        }

        fn truncate<'a>(
            self: ::std::sync::Arc<Self>,
            request: ::block_core::request::Request,
            length: u64,
            how: ::block_core::driver::Truncate,
        ) -> $crate::passthrough::Answer<'a, ()>
        where
            Self: 'a,
        {
            Box::pin(async move { request.file()?.truncate(length, how).await })
        }

        fn block_status<'a>(
            self: ::std::sync::Arc<Self>,
            _request: ::block_core::request::Request,
            offset: u64,
            len: u64,
        ) -> $crate::passthrough::Answer<'a, ::block_core::status::DriverStatus>
        where
            Self: 'a,
        {
            Box::pin(async move { Ok($crate::passthrough::status(offset, len)) })
        }

        fn reopen<'a>(
            self: ::std::sync::Arc<Self>,
            _request: ::block_core::request::Request,
            changes: ::block_core::driver::Reopen,
        ) -> $crate::passthrough::Answer<'a, ()>
        where
            Self: 'a,
        {
            Box::pin(async move { self.base.reopen(&changes) })
        }

        fn close<'a>(
            self: ::std::sync::Arc<Self>,
            _request: ::block_core::request::Request,
        ) -> $crate::passthrough::Answer<'a, ()>
        where
            Self: 'a,
        {
            Box::pin(async move { Ok(()) })
        }

        fn as_any(&self) -> &dyn ::std::any::Any {
            self
        }
    };
}
pub(crate) use pass_through;

/// What an `async fn` of a driver becomes.
pub(crate) type Answer<'a, T> = std::pin::Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// What a filter can do because requests that the child can't do itself are carried out by the core when they get there.
const ALWAYS: Capabilities = Capabilities::TRY_MAP;
const WRITABLE: Capabilities = Capabilities::WRITE
    .union(Capabilities::WRITE_ZEROES)
    .union(Capabilities::DISCARD)
    .union(Capabilities::FUA)
    .union(Capabilities::TRUNCATE);
/// What a filter can do only if its child can.
const INHERITED: Capabilities = Capabilities::COMPRESSED
    .union(Capabilities::DISCARD_ZEROES)
    .union(Capabilities::ZERO_INIT)
    .union(Capabilities::GROW);

/// Capabilities of a filter over a child with `child`.
fn capabilities(child: Capabilities, read_only: bool) -> Capabilities {
    let inherited = child & INHERITED;
    if read_only {
        ALWAYS | (inherited - Capabilities::COMPRESSED - Capabilities::GROW)
    } else {
        ALWAYS | WRITABLE | inherited
    }
}

/// The length of the filtered child.
pub(crate) fn length(edges: &Edges) -> u64 {
    edges.child(ChildRole::Filtered).map_or(0, Child::length)
}

/// The limits of the filtered child.
pub(crate) fn limits(edges: &Edges) -> Limits {
    let limits = Limits::default();
    edges
        .child(ChildRole::Filtered)
        .map_or(limits, |child| limits.merge(child.limits()))
}

/// "Ask the child."
pub(crate) const fn status(offset: u64, len: u64) -> DriverStatus {
    DriverStatus {
        flags: StatusFlags::RAW.union(StatusFlags::OFFSET_VALID),
        len,
        file_offset: offset,
    }
}

/// The index of the filtered child as `try_map` wants it.
pub(crate) fn edge(edges: &Edges) -> Option<usize> {
    edges.index(ChildRole::Filtered)
}
