//! One request on its way down: level by level, without a future per layer, until a driver has to work or there is an
//! answer. Everything here is synchronous; what has to be waited for is handed to [`super::submit`].

use std::sync::Arc;

use arc_swap::Guard;
use futures::future::BoxFuture;

use super::{
    Action, Completion, Held, Op, Origin, Shape, Ticket, apply_node_options, arrival, drive,
    may_map, shape, validate,
};
use crate::{
    buffer::{IoBuf, IoBufMut},
    driver::{Attempt, Capabilities, ChildRole, MapIntent, Mapping},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    handle::RootGuard,
    node::{Node, View},
    producer,
    request::Request,
    tracked::{Pending, Tracked},
};

/// What a request goes by at one node. The epoch is loaded first: if it is still the same once the request has its
/// ticket, so is everything else.
pub(super) struct Look {
    epoch: u64,
    pub view: Guard<Arc<View>>,
    pub capabilities: Capabilities,
    pub length: u64,
}

impl Look {
    #[inline]
    fn at(node: &Node) -> Self {
        let epoch = node.epoch();
        let view = node.view();
        let capabilities = node.driver().capabilities();
        let length = node.driver().length(&view.edges);
        Self {
            epoch,
            view,
            capabilities,
            length,
        }
    }
}

/// What is to be done next.
pub(super) enum Step {
    /// It has ended.
    End(Result<()>),
    /// To be waited for; then [`Walk::step`] is called with the ticket.
    Wait(Pending),
    /// A driver has it.
    Drive(BoxFuture<'static, Result<()>>),
}

/// Where a level leads.
enum Way {
    Down {
        child: Arc<Node>,
        offset: u64,
        intent: MapIntent,
        look: Look,
    },
    /// It reads as zeroes.
    Zeroes,
    /// The driver has to do it.
    Drive,
}

/// The request, and what it has taken so far.
pub(super) struct Walk {
    /// Where it is.
    pub node: Arc<Node>,
    pub held: Held,
    op: Op,
    root: Option<RootGuard>,
    nested: Option<Arc<Tracked>>,
    /// A driver asks, or a level above led here.
    by_parent: bool,
}

impl Walk {
    pub fn new(node: Arc<Node>, origin: Origin, op: Op) -> Self {
        let (root, nested) = match origin {
            Origin::Root(guard) => (Some(guard), None),
            Origin::Parent => (None, None),
            Origin::Nested(ticket) => (None, Some(ticket)),
        };
        let producer = root
            .as_ref()
            .map_or_else(producer::current, RootGuard::producer);
        Self {
            node,
            held: Held::new(producer),
            op,
            by_parent: root.is_none(),
            root,
            nested,
        }
    }

    /// Goes on. `waited`: the ticket at this node that was waited for.
    pub fn step(&mut self, mut waited: Option<Tracked>) -> Step {
        if let Some(tracked) = &waited {
            self.node.tell(|to| to.admitted(tracked.id()));
        }
        let mut look = Look::at(&self.node);
        // Refused, or read as zeroes, or mapped: at most one turn per layer, and one more where something changed.
        loop {
            if let Err(error) = validate(&self.node, &self.op, &look, self.by_parent) {
                return Step::End(Err(error));
            }
            if self.by_parent {
                self.op.clip(&look);
            }
            if self.op.len == 0 && !self.op.is_truncate() {
                self.held.finish(&Ok(()));
                return Step::End(Ok(()));
            }
            if apply_node_options(&look.view, &mut self.op) {
                return Step::End(Ok(()));
            }
            let now = shape(&self.op, &look);

            // Step 3.
            let ticket = match self.nested.take() {
                Some(ticket) => Ticket::Shared(ticket),
                None => match waited.take() {
                    // Looked at after the ticket was taken.
                    Some(tracked) if now.is_covered_by(&tracked) => Ticket::Own(tracked),
                    // What we hold doesn't suffice any more: queue again.
                    Some(tracked) => {
                        self.node.tell(|to| to.ended(tracked.id(), false));
                        drop(tracked);
                        look = Look::at(&self.node);
                        continue;
                    }
                    None => {
                        let tracked = match self.enter(&now) {
                            Ok(tracked) => tracked,
                            Err(step) => return step,
                        };
                        if self.node.epoch() != look.epoch {
                            // What was looked at before the ticket was taken may have changed.
                            look = Look::at(&self.node);
                            waited = Some(tracked);
                            continue;
                        }
                        Ticket::Own(tracked)
                    }
                },
            };

            // Step 4.
            match self.way(&look, &now) {
                Way::Down {
                    child,
                    offset,
                    intent,
                    look: below,
                } => {
                    let node = std::mem::replace(&mut self.node, child);
                    self.hold(node, ticket);
                    self.op.descend(offset, intent);
                    self.by_parent = true;
                    look = below;
                }
                Way::Zeroes => {
                    self.hold(self.node.clone(), ticket);
                    if let Action::Read(buf) = &mut self.op.action {
                        buf.fill(0);
                    }
                    self.held.finish(&Ok(()));
                    return Step::End(Ok(()));
                }
                Way::Drive => {
                    self.hold(self.node.clone(), ticket);
                    return self.drive(&look, &now);
                }
            }
        }
    }

    /// Takes the ticket.
    #[inline]
    fn enter(&self, shape: &Shape) -> Result<Tracked, Step> {
        let (op, node, kind) = (&self.op, &self.node, self.op.kind());
        let tracker = node.tracker();
        let arrived = |ticket, waits| {
            node.tell(|to| to.arrived(&arrival(op, ticket, self.held.producer, waits)));
        };
        let entered = if op.flags.contains(RequestFlags::NO_WAIT) {
            tracker
                .try_begin(shape.range, shape.serialising, kind)
                .ok_or_else(|| {
                    Step::End(Err(Error::from_kind(ErrorKind::Busy)
                        .with_operation(op.operation(), op.offset, op.len)
                        .with_node(node.name())))
                })
        } else {
            let begun = tracker.begin(shape.range, shape.serialising, kind);
            begun.into_ready().map_err(Step::Wait)
        };
        match &entered {
            Ok(tracked) => arrived(Some(tracked.id()), false),
            Err(Step::Wait(pending)) => arrived(pending.id(), true),
            Err(_) => {}
        }
        entered
    }

    /// What this level leaves to be done at the end.
    #[inline]
    fn hold(&mut self, node: Arc<Node>, ticket: Ticket) {
        self.held.completions.push(Completion {
            node,
            ticket: Some(ticket),
            counted: self.op.counted(),
            offset: self.op.offset,
            len: self.op.len,
            root: self.root.take(),
        });
    }

    /// The short way: ask where it is, and go on there.
    #[inline]
    fn way(&mut self, look: &Look, shape: &Shape) -> Way {
        let Some(intent) = may_map(&self.op, look, shape.padded) else {
            return Way::Drive;
        };
        if self.node.is_debugged() {
            // Somebody below wants to know what the driver does.
            return Way::Drive;
        }
        let op = &self.op;
        let edges = &look.view.edges;
        match self.node.driver().try_map(edges, op.offset, op.len, intent) {
            Mapping::Data {
                edge,
                offset,
                len,
                pin,
            } if len >= op.len => {
                let Some(edge) = edges.get(edge) else {
                    return Way::Drive;
                };
                let child = edge.child.node();
                let below = Look::at(child);
                // A read past the end of a short file takes the long way, which pads it.
                let inside = intent == MapIntent::Overwrite
                    || offset
                        .checked_add(op.len)
                        .is_some_and(|end| end <= below.length);
                if !inside {
                    return Way::Drive;
                }
                self.held.pins.extend(pin);
                Way::Down {
                    child: child.clone(),
                    offset,
                    intent,
                    look: below,
                }
            }
            Mapping::Zero { len } if len >= op.len && intent == MapIntent::Read => Way::Zeroes,
            Mapping::Backing { len } if len >= op.len && intent == MapIntent::Read => {
                let Some(backing) = edges.child(ChildRole::Backing) else {
                    return Way::Zeroes;
                };
                let child = backing.node();
                let below = Look::at(child);
                if op.offset + op.len > below.length {
                    return Way::Drive;
                }
                Way::Down {
                    child: child.clone(),
                    offset: op.offset,
                    intent,
                    look: below,
                }
            }
            _ => Way::Drive,
        }
    }

    /// The long way: the driver does it, at once if it can.
    fn drive(&mut self, look: &Look, shape: &Shape) -> Step {
        let limits = &look.view.limits;
        let fits = limits.max_transfer == 0 || self.op.len <= limits.max_transfer;
        let special = RequestFlags::FUA
            | RequestFlags::WRITE_COMPRESSED
            | RequestFlags::COPY_ON_READ
            | RequestFlags::PREFETCH;
        let plain = !shape.padded && !self.op.flags.intersects(special);
        if fits && plain && !self.node.is_debugged() {
            let driver = self.node.driver();
            let attempt = match &mut self.op.action {
                Action::Read(buf) => driver.try_read(self.op.offset, buf),
                Action::Write(buf) => {
                    let flags = drive::driver_flags(self.op.flags, look.capabilities);
                    driver.try_write(self.op.offset, buf, flags)
                }
                _ => Attempt::Left(0),
            };
            match attempt {
                Attempt::Done(result) => {
                    let result = result.map_err(|error| self.held.describe(error));
                    self.held.finish(&result);
                    return Step::End(result);
                }
                Attempt::Left(0) => {}
                Attempt::Left(done) => self.op.skip(done),
            }
        }
        let request = Request::new(
            self.node.clone(),
            look.view.edges.clone(),
            self.held.producer,
        );
        Step::Drive(drive::drive(
            request,
            &mut self.held,
            self.op.take(),
            limits,
            look.capabilities,
            shape.padded,
        ))
    }
}

impl Op {
    /// A parent reads whole blocks of its own size: what of the last one lies beyond this node's own last block is
    /// filled in here.
    #[inline]
    fn clip(&mut self, look: &Look) {
        let end = self.offset + self.len;
        if end > look.length
            && let Action::Read(buf) = &mut self.action
        {
            let align = look.view.limits.request_alignment.max(1);
            let own = look.length.next_multiple_of(align);
            let keep = own.saturating_sub(self.offset).min(self.len);
            buf.split_off(keep as usize).fill(0);
            self.len = keep;
        }
    }

    /// The front of the buffer is done.
    #[cold]
    fn skip(&mut self, done: usize) {
        match &mut self.action {
            Action::Read(buf) => drop(buf.split_to(done)),
            Action::Write(buf) => drop(buf.split_to(done)),
            _ => return,
        }
        self.offset += done as u64;
        self.len -= done as u64;
    }

    /// Leaves nothing behind that would be worth anything.
    fn take(&mut self) -> Self {
        let action = match &mut self.action {
            Action::Read(buf) => Action::Read(std::mem::replace(buf, IoBufMut::new())),
            Action::Write(buf) => Action::Write(std::mem::replace(buf, IoBuf::new())),
            Action::Zero => Action::Zero,
            Action::Discard => Action::Discard,
            Action::Truncate(how) => Action::Truncate(*how),
        };
        Self { action, ..*self }
    }
}
