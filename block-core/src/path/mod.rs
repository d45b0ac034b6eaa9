//! The one choke point: every request of every producer to every node goes through [`submit`].
//!
//! In order (design, section 2): validate, shape, track and wait, validate again, drive, record, release. Filters such as
//! copy-before-write are nodes in the graph and no steps of this path. Where a driver's `try_map` tells where the
//! bytes are, the walk goes on at the child in a loop, and what was taken on the way (tickets, pins) travels with the
//! one future at the bottom.

mod apart;
mod copy_range;
mod drive;
mod driven;
mod ranged;
mod walk;

use std::sync::Arc;

use smallvec::SmallVec;

pub use self::copy_range::copy_range;
use self::walk::{Look, Step, Walk};
pub(crate) use self::{
    driven::{Completion, Driven, Held, Ticket},
    ranged::{ask, exclusive, flush, unranged},
};
use crate::{
    buffer::{IoBuf, IoBufMut},
    driver::{Capabilities, MapIntent, Truncate},
    error::{Error, ErrorKind, Operation, Result},
    flags::RequestFlags,
    handle::RootGuard,
    mutant,
    node::{Edges, Node, View},
    observe::Arrival,
    options::{DetectZeroes, DiscardMode},
    producer::ProducerId,
    stats::Counted,
    tracked::{Pending, RequestKind, Tracked, TrackedRange},
};

/// No request may end beyond this, so that rounding up never overflows.
pub(crate) const MAX_END: u64 = (1 << 63) - (1 << 30);
/// A single data request is at most this long, in bytes.
pub(crate) const MAX_DATA: u64 = (1 << 31) - 512;

/// Who asks.
pub(crate) enum Origin {
    /// A producer, through its handle.
    Root(RootGuard),
    /// A driver, on behalf of a request that was admitted further up.
    Parent,
    /// Somebody who holds this ticket at this very node; the request waits for nothing.
    Nested(Arc<Tracked>),
}

/// What is to be done.
pub(crate) enum Action {
    Read(IoBufMut),
    Write(IoBuf),
    Zero,
    Discard,
    Truncate(Truncate),
}

/// One request.
pub(crate) struct Op {
    pub action: Action,
    pub offset: u64,
    pub len: u64,
    pub flags: RequestFlags,
    /// The producer may write past the end and thereby grow the node.
    pub may_grow: bool,
}

impl Op {
    pub(crate) fn read(offset: u64, buf: IoBufMut, flags: RequestFlags) -> Self {
        let len = buf.len() as u64;
        Self {
            action: Action::Read(buf),
            offset,
            len,
            flags,
            may_grow: false,
        }
    }

    /// A write; with ZERO_WRITE among the flags it is the same request as [`Self::zero`].
    pub(crate) fn write(offset: u64, buf: IoBuf, flags: RequestFlags) -> Self {
        let len = buf.len() as u64;
        if flags.contains(RequestFlags::ZERO_WRITE) {
            let mut zero = Self::zero(offset, len, flags);
            if mutant::is_active("gate-not-for-zero-flag") {
                zero.flags -= RequestFlags::ZERO_WRITE;
            }
            if mutant::is_active("gate-not-for-write-zeroes") {
                zero.flags |= RequestFlags::SERIALISING;
            }
            return zero;
        }
        Self {
            action: Action::Write(buf),
            offset,
            len,
            flags,
            may_grow: true,
        }
    }

    pub(crate) fn zero(offset: u64, len: u64, flags: RequestFlags) -> Self {
        let flags = flags | RequestFlags::ZERO_WRITE;
        Self {
            action: Action::Zero,
            offset,
            len,
            flags,
            may_grow: true,
        }
    }

    pub(crate) fn discard(offset: u64, len: u64) -> Self {
        let flags = RequestFlags::empty();
        Self {
            action: Action::Discard,
            offset,
            len,
            flags,
            may_grow: false,
        }
    }

    pub(crate) fn truncate(length: u64, how: Truncate) -> Self {
        Self {
            action: Action::Truncate(how),
            offset: length,
            len: 0,
            flags: RequestFlags::empty(),
            may_grow: true,
        }
    }

    pub(crate) fn operation(&self) -> Operation {
        match self.action {
            Action::Read(_) => Operation::Read,
            Action::Write(_) => Operation::Write,
            Action::Zero => Operation::WriteZeroes,
            Action::Discard => Operation::Discard,
            Action::Truncate(_) => Operation::Truncate,
        }
    }

    fn kind(&self) -> RequestKind {
        match self.action {
            Action::Read(_) => RequestKind::Read,
            Action::Write(_) => RequestKind::Write,
            Action::Zero => RequestKind::ZeroWrite,
            Action::Discard => RequestKind::Discard,
            Action::Truncate(_) => RequestKind::Truncate,
        }
    }

    fn counted(&self) -> Counted {
        match self.action {
            Action::Read(_) => Counted::Read,
            Action::Write(_) => Counted::Write,
            Action::Zero => Counted::Zero,
            Action::Discard => Counted::Discard,
            Action::Truncate(_) => Counted::Truncate,
        }
    }

    /// The same bytes as seen by a child. What was asked of this node's gate isn't asked of the child's.
    fn descend(&mut self, offset: u64, intent: MapIntent) {
        self.offset = offset;
        self.may_grow = intent == MapIntent::Overwrite;
        self.flags -= RequestFlags::SERIALISING | RequestFlags::NO_WAIT;
    }

    fn is_truncate(&self) -> bool {
        matches!(self.action, Action::Truncate(_))
    }
}

/// The range that a serialising request over `[offset, offset + len)` holds: rounded out to the serialising granularity.
pub(crate) fn round_out(node: &Node, offset: u64, len: u64) -> TrackedRange {
    let limits = node.limits();
    rounded(
        offset,
        len,
        limits.serialising_granularity.max(limits.request_alignment),
    )
}

fn rounded(offset: u64, len: u64, granularity: u64) -> TrackedRange {
    if granularity <= 1 {
        return TrackedRange::from_len(offset, len);
    }
    let start = offset - offset % granularity;
    let end = offset.saturating_add(len);
    let end = end
        .checked_next_multiple_of(granularity)
        .unwrap_or(u64::MAX);
    TrackedRange::new(start, end)
}

/// Step 1. An error here has touched nothing.
///
/// A driver above may read up to the end of the block in which the node ends: what lies beyond it reads as zeroes.
#[inline]
fn validate(node: &Node, op: &Op, look: &Look, by_parent: bool) -> Result<()> {
    let (capabilities, length) = (look.capabilities, look.length);
    let fail = |kind: ErrorKind, text: &str| {
        Err(Error::new(kind, text)
            .with_operation(op.operation(), op.offset, op.len)
            .with_node(node.name()))
    };
    let Some(end) = op.offset.checked_add(op.len).filter(|end| *end <= MAX_END) else {
        return fail(
            ErrorKind::Io,
            "request ends beyond the largest offset possible",
        );
    };
    let is_data = matches!(op.action, Action::Read(_) | Action::Write(_));
    if is_data && op.len > MAX_DATA {
        return fail(ErrorKind::Io, "request is longer than 2 GiB");
    }
    let modifies = !matches!(op.action, Action::Read(_));
    if modifies && !capabilities.contains(Capabilities::WRITE) {
        return fail(ErrorKind::NotPermitted, "");
    }
    if end > length && !op.is_truncate() {
        let align = node.tail_alignment(&look.view.limits);
        let padded = || end <= length.next_multiple_of(align);
        if by_parent && !modifies && padded() {
            return Ok(());
        }
        let grows = op.may_grow && capabilities.contains(Capabilities::GROW);
        if !grows {
            return fail(
                ErrorKind::Io,
                &format!("request ends at {end}, beyond the end of the node at {length}"),
            );
        }
    }
    if op.flags.contains(RequestFlags::WRITE_COMPRESSED) {
        if op.flags.contains(RequestFlags::ZERO_WRITE) {
            return fail(ErrorKind::InvalidInput, "a zero write can't be compressed");
        }
        if !capabilities.contains(Capabilities::COMPRESSED) {
            return fail(
                ErrorKind::NotSupported,
                "the format can't store compressed data",
            );
        }
    }
    Ok(())
}

/// What step 2 found out: what is tracked, and whether a plain driver call will do.
struct Shape {
    range: TrackedRange,
    serialising: bool,
    /// The request isn't aligned to the node's request alignment.
    padded: bool,
}

impl Shape {
    fn is_covered_by(&self, tracked: &Tracked) -> bool {
        tracked.range().contains(self.range) && (!self.serialising || tracked.is_serialising())
    }
}

/// Step 2.
#[inline]
fn shape(op: &Op, look: &Look) -> Shape {
    let (limits, capabilities, length) = (&look.view.limits, look.capabilities, look.length);
    let align = limits.request_alignment;
    if op.is_truncate() {
        let from = if mutant::is_active("gate-truncate-holds-new-end-only") {
            op.offset.max(length)
        } else {
            op.offset.min(length)
        };
        return Shape {
            range: TrackedRange::from_start(from),
            serialising: !mutant::is_active("gate-not-for-truncate"),
            padded: false,
        };
    }
    let padded = align > 1 && (op.offset % align != 0 || op.len % align != 0);
    let modifies = !matches!(op.action, Action::Read(_));
    let serialising = op
        .flags
        .intersects(RequestFlags::SERIALISING | RequestFlags::COPY_ON_READ)
        || matches!(op.action, Action::Zero | Action::Discard)
        || (padded && modifies)
        || (modifies && capabilities.contains(Capabilities::SERIALISE_WRITES));
    let serialising = serialising && !unserialised(op, padded, capabilities);
    let granularity = if serialising && !mutant::is_active("gate-range-not-rounded-out") {
        limits.serialising_granularity.max(align)
    } else {
        align
    };
    Shape {
        range: rounded(op.offset, op.len, granularity),
        serialising,
        padded,
    }
}

/// Seeded bugs: whose tickets aren't serialising although they should be.
#[inline]
fn unserialised(op: &Op, padded: bool, capabilities: Capabilities) -> bool {
    let asked = op.flags.contains(RequestFlags::SERIALISING);
    match op.action {
        Action::Discard => mutant::is_active("gate-not-for-discard"),
        Action::Zero if op.flags.contains(RequestFlags::ZERO_WRITE) => {
            !asked && mutant::is_active("gate-not-for-write-zeroes")
        }
        Action::Zero => mutant::is_active("gate-not-for-zero-flag"),
        Action::Read(_) => {
            op.flags.contains(RequestFlags::COPY_ON_READ)
                && mutant::is_active("gate-not-for-copy-on-read")
        }
        Action::Write(_) if padded => mutant::is_active("gate-not-for-padded-writes"),
        Action::Write(_) => {
            !asked
                && capabilities.contains(Capabilities::SERIALISE_WRITES)
                && mutant::is_active("gate-ignores-serialise-writes")
        }
        Action::Truncate(_) => false,
    }
}

/// Turns a write of nothing but zeroes into a zero write if the node was told to, and drops what the node's discard
/// mode forbids. True when nothing is left to do.
#[inline]
fn apply_node_options(view: &View, op: &mut Op) -> bool {
    let (discard, detect) = (view.discard, view.detect_zeroes);
    if detect != DetectZeroes::Off
        && !op.flags.contains(RequestFlags::WRITE_COMPRESSED)
        && let Action::Write(buf) = &op.action
        && buf.is_zero()
    {
        op.action = Action::Zero;
        op.flags |= RequestFlags::ZERO_WRITE;
        if detect == DetectZeroes::Unmap || mutant::is_active("path-detect-zeroes-unmaps") {
            op.flags |= RequestFlags::MAY_UNMAP;
        }
    }
    if discard == DiscardMode::Ignore && !mutant::is_active("path-discard-mode-ignored") {
        op.flags -= RequestFlags::MAY_UNMAP;
        return matches!(op.action, Action::Discard);
    }
    false
}

/// Waits at the gate, and meanwhile works off what was dropped: it may be that which is waited for.
pub(crate) async fn wait_at_gate(node: &Node, pending: Pending) -> Tracked {
    node.stats().waited();
    node.deferred.help_until(pending).await
}

/// Whether `try_map` may be asked for this request.
#[inline]
fn may_map(op: &Op, look: &Look, padded: bool) -> Option<MapIntent> {
    let (capabilities, limits) = (look.capabilities, &look.view.limits);
    let plain = !op.flags.intersects(
        RequestFlags::FUA
            | RequestFlags::WRITE_COMPRESSED
            | RequestFlags::COPY_ON_READ
            | RequestFlags::PREFETCH,
    );
    if !plain
        || padded
        || !capabilities.contains(Capabilities::TRY_MAP)
        || (limits.max_transfer != 0 && op.len > limits.max_transfer)
    {
        return None;
    }
    match op.action {
        Action::Read(_) => Some(MapIntent::Read),
        Action::Write(_) => Some(MapIntent::Overwrite),
        _ => None,
    }
}

/// What an observer is told of a request.
fn arrival(op: &Op, ticket: Option<u64>, producer: ProducerId, waits: bool) -> Arrival<'_> {
    Arrival {
        ticket: ticket.unwrap_or(u64::MAX),
        kind: op.kind(),
        flags: op.flags,
        producer,
        offset: op.offset,
        len: op.len,
        data: match &op.action {
            Action::Write(buf) => Some(buf),
            _ => None,
        },
        waits,
    }
}

/// Runs one request to its end.
///
/// Cancellation: while it waits at a gate, dropping it leaves no trace; once it is with a driver, it is moved to the
/// graph's list of dropped requests and runs to its end there, serialising.
pub(crate) async fn submit(node: Arc<Node>, origin: Origin, op: Op) -> Result<()> {
    let mut walk = Walk::new(node, origin, op);
    let mut waited = None;
    loop {
        match walk.step(waited.take()) {
            Step::End(result) => return result,
            Step::Wait(pending) => waited = Some(wait_at_gate(&walk.node, pending).await),
            Step::Drive(future) => return Driven::new(future, walk.held).await,
        }
    }
}

/// Completes when every dropped request of the graph has ended, or at once when there is none.
pub(crate) async fn settle(node: &Node) {
    if !node.deferred.is_empty() {
        node.deferred.settle().await;
    }
}

/// Format, raw layer, file, and one more, without an allocation.
pub(crate) type Completions = SmallVec<[Completion; 4]>;

#[allow(dead_code)]
fn assert_submit_is_send(node: Arc<Node>, op: Op) -> impl Send {
    submit(node, Origin::Parent, op)
}

#[allow(dead_code)]
fn assert_edges_are_send(edges: Arc<Edges>) -> impl Send {
    edges
}
