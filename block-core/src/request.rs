//! What a driver sees of a request, and how it reaches its children.
//!
//! A [`Request`] captured its node's edges when it was admitted. Everything a driver does to a [`Child`] goes through
//! the same request path as a guest's request, at the child's node.

use std::{fmt, sync::Arc};

use crate::{
    buffer::{Buffer, IoBuf, IoBufMut},
    debug::{self, DebugEvent},
    driver::{BlockDriver, ChildRole, Truncate},
    env::Environment,
    error::{Error, ErrorKind, Operation, Result},
    flags::RequestFlags,
    limits::Limits,
    node::{Edges, Node},
    path::{self, Op, Origin},
    producer::ProducerId,
    status::BlockStatus,
    tracked::{RequestKind, Tracked, TrackedRange},
};

/// The context of one request at one node. Cheap to clone; owns what it needs.
#[derive(Clone)]
pub struct Request {
    node: Arc<Node>,
    edges: Arc<Edges>,
    producer: ProducerId,
}

impl Request {
    pub(crate) fn new(node: Arc<Node>, edges: Arc<Edges>, producer: ProducerId) -> Self {
        Self {
            node,
            edges,
            producer,
        }
    }

    /// On whose behalf it is made: the handle that the topmost request came through, however many layers above.
    /// [`ProducerId::NONE`] for what a driver does by itself.
    pub fn producer(&self) -> ProducerId {
        self.producer
    }

    /// The node that the request is at.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The node's children as they were when the request was admitted.
    pub fn edges(&self) -> &Arc<Edges> {
        &self.edges
    }

    /// The environment.
    pub fn env(&self) -> &Arc<dyn Environment> {
        self.node.env()
    }

    /// Tells a fault injector below the node, if there is one, what is about to happen, and goes on when that lets
    /// it. Costs next to nothing without one.
    ///
    /// Cancellation: a request that was stopped here and is dropped doesn't go on.
    pub async fn debug_event(&self, event: DebugEvent) {
        if self.node.is_debugged() {
            Box::pin(self.tell(event)).await;
        }
    }

    async fn tell(&self, event: DebugEvent) {
        if let Some(child) = debug::told(&self.edges) {
            debug::tell(child.node(), event).await;
        }
    }

    /// The first child in `role`.
    pub fn child(&self, role: ChildRole) -> Option<&Child> {
        self.edges.child(role)
    }

    /// The child that holds the metadata; every format has one.
    pub fn file(&self) -> Result<&Child> {
        self.child(ChildRole::File)
            .or_else(|| self.child(ChildRole::DataFile))
            .or_else(|| self.child(ChildRole::Filtered))
            .ok_or_else(|| {
                Error::new(ErrorKind::NoMedium, "node has no file child")
                    .with_node(self.node.name())
            })
    }

    /// The backing child, if there is one.
    pub fn backing(&self) -> Option<&Child> {
        self.child(ChildRole::Backing)
    }

    /// Fills `buf` with what the backing chain has at `offset`: zeroes beyond its end, or when there is none.
    pub async fn read_backing(&self, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let Some(backing) = self.backing() else {
            buf.fill(0);
            return Ok(());
        };
        let available = backing
            .length()
            .saturating_sub(offset)
            .min(buf.len() as u64) as usize;
        if available < buf.len() {
            let mut tail = buf.split_off(available);
            tail.fill(0);
        }
        if buf.is_empty() {
            Ok(())
        } else {
            backing.read(offset, buf).await
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Request at '{}'", self.node.name())
    }
}

/// A node as its parent sees it. Requests through it are tracked at the child's node like any other.
///
/// Cancellation, for every method here: a request whose future is dropped while it waits at the gate leaves no trace;
/// one that has reached the driver runs to its end and holds back overlapping requests until then.
#[derive(Clone)]
pub struct Child(pub(crate) Arc<Node>);

impl Child {
    /// A way to `node` for a driver that opens, creates or closes an image. It isn't an edge of the graph: it
    /// holds no permissions and must not outlive the call that it was made for.
    pub fn unattached(node: Arc<Node>) -> Self {
        Self(node)
    }

    /// The child's node.
    pub fn node(&self) -> &Arc<Node> {
        &self.0
    }

    /// The child's driver.
    pub fn driver(&self) -> &Arc<dyn BlockDriver> {
        self.0.driver()
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        self.0.length()
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.0.limits()
    }

    /// The file name that a user knows it by.
    pub fn filename(&self) -> Option<String> {
        self.0.filename()
    }

    /// Tells this child, or the nearest fault injector below it, what its parent is about to do to it. See
    /// [`Request::debug_event`].
    pub async fn debug_event(&self, event: DebugEvent) {
        if self.0.is_debugged() || debug::listens(&self.0) {
            Box::pin(debug::tell(&self.0, event)).await;
        }
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// EIO when the range ends beyond the child's length.
    pub async fn read(&self, offset: u64, buf: IoBufMut) -> Result<()> {
        path::submit(
            self.0.clone(),
            Origin::Parent,
            Op::read(offset, buf, RequestFlags::empty()),
        )
        .await
    }

    /// Reads `len` bytes into a new buffer.
    pub async fn read_buffer(&self, offset: u64, len: usize) -> Result<Buffer> {
        let (lent, buf) = Buffer::try_new(len)?.lend();
        self.read(offset, buf).await?;
        lent.reclaim().map_err(|_| {
            Error::io("a driver kept a part of a read buffer").with_node(self.0.name())
        })
    }

    /// Like [`Self::read_buffer`]; what lies beyond the child's end reads as zeroes.
    pub async fn read_padded(&self, offset: u64, len: usize) -> Result<Buffer> {
        let (lent, mut buf) = Buffer::try_new(len)?.lend();
        let available = self.length().saturating_sub(offset).min(len as u64) as usize;
        drop(buf.split_off(available));
        if !buf.is_empty() {
            self.read(offset, buf).await?;
        } else {
            drop(buf);
        }
        lent.reclaim().map_err(|_| {
            Error::io("a driver kept a part of a read buffer").with_node(self.0.name())
        })
    }

    /// Writes `buf` at `offset`. A child whose driver can grow does so when the range ends beyond its length.
    pub async fn write(
        &self,
        offset: u64,
        buf: impl Into<IoBuf>,
        flags: RequestFlags,
    ) -> Result<()> {
        path::submit(
            self.0.clone(),
            Origin::Parent,
            Op::write(offset, buf.into(), flags),
        )
        .await
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        path::submit(self.0.clone(), Origin::Parent, Op::zero(offset, len, flags)).await
    }

    /// Discards a range.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        path::submit(self.0.clone(), Origin::Parent, Op::discard(offset, len)).await
    }

    /// Makes all completed writes durable.
    pub async fn flush(&self) -> Result<()> {
        path::flush(&self.0, None).await
    }

    /// Changes its length.
    pub async fn truncate(&self, length: u64, how: Truncate) -> Result<()> {
        path::submit(self.0.clone(), Origin::Parent, Op::truncate(length, how)).await
    }

    /// What the start of a range is made of, through the child's whole chain.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        crate::chain::block_status(&self.0, None, offset, len, true).await
    }

    /// Takes a serialising ticket over a range of the child and gives a way to do nested requests under it
    /// (copy-on-read's write behind its own read).
    ///
    /// Cancellation: a reservation that is still waiting leaves no trace when dropped.
    pub async fn reserve(&self, offset: u64, len: u64) -> Result<Reservation> {
        let range = path::round_out(&self.0, offset, len);
        let tracked = self
            .0
            .tracker()
            .begin(range, true, RequestKind::Reserve)
            .await;
        Ok(Reservation {
            child: self.clone(),
            tracked: Arc::new(tracked),
        })
    }
}

impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Child '{}'", self.0.name())
    }
}

/// A range of a child, held by a serialising ticket; requests made through it carry that ticket and wait for nothing.
/// The range is let go when the reservation and all its requests have ended.
#[derive(Clone)]
pub struct Reservation {
    child: Child,
    tracked: Arc<Tracked>,
}

impl Reservation {
    /// The range held.
    pub fn range(&self) -> TrackedRange {
        self.tracked.range()
    }

    /// Reads inside the range.
    pub async fn read(&self, offset: u64, buf: IoBufMut) -> Result<()> {
        self.check(offset, buf.len() as u64, Operation::Read)?;
        let op = Op::read(offset, buf, RequestFlags::empty());
        path::submit(
            self.child.node().clone(),
            Origin::Nested(self.tracked.clone()),
            op,
        )
        .await
    }

    /// Writes inside the range.
    pub async fn write(
        &self,
        offset: u64,
        buf: impl Into<IoBuf>,
        flags: RequestFlags,
    ) -> Result<()> {
        let buf = buf.into();
        self.check(offset, buf.len() as u64, Operation::Write)?;
        let op = Op::write(offset, buf, flags);
        path::submit(
            self.child.node().clone(),
            Origin::Nested(self.tracked.clone()),
            op,
        )
        .await
    }

    /// Zeroes inside the range.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<()> {
        self.check(offset, len, Operation::WriteZeroes)?;
        let op = Op::zero(offset, len, flags);
        path::submit(
            self.child.node().clone(),
            Origin::Nested(self.tracked.clone()),
            op,
        )
        .await
    }

    /// Block status, which needs no ticket.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.child.block_status(offset, len).await
    }

    fn check(&self, offset: u64, len: u64, operation: Operation) -> Result<()> {
        let range = self.tracked.range();
        if offset < range.start() || offset.saturating_add(len) > range.end() {
            return Err(Error::invalid("nested request leaves its ancestor's range")
                .with_operation(operation, offset, len)
                .with_node(self.child.node().name()));
        }
        Ok(())
    }
}
