//! Observers: somebody who is told of every request of a node, for traces and simulators. They see requests, they never
//! change, delay or refuse one. A node without an observer pays one load of a flag for each request.

use crate::{buffer::IoBuf, flags::RequestFlags, producer::ProducerId, tracked::RequestKind};

/// A request as it arrives at a node.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// The number of its ticket, which no other request of the node ever has.
    pub ticket: u64,
    /// What it does.
    pub kind: RequestKind,
    /// How.
    pub flags: RequestFlags,
    /// Whose it is.
    pub producer: ProducerId,
    /// Where it begins, in bytes; for truncates the new length.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// What a write writes.
    pub data: Option<&'a IoBuf>,
    /// It has to wait at the gate.
    pub waits: bool,
}

/// Is told of the requests of one node, by whichever thread carries them out: implementations must be quick and must
/// not call back into the node.
///
/// Sub-requests under an ancestor's ticket at the same node have no ticket of their own and aren't reported. A request that
/// is withdrawn while it waits is reported as arrived and never as ended.
pub trait Observer: Send + Sync {
    /// A request has taken its ticket.
    fn arrived(&self, arrival: &Arrival<'_>);

    /// A request that had to wait has been let in.
    fn admitted(&self, ticket: u64);

    /// A request has ended, and its ticket is about to be given back.
    fn ended(&self, ticket: u64, ok: bool);
}
