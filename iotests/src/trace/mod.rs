//! Traces: what a live node was asked, recorded at little cost, and run again in the deterministic world.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`format`](mod@format) | the records of a trace, to bytes and back |
//! | [`recorder`] | an observer of nodes that writes a trace |
//! | [`cli`] | what `iotests replay` does with a trace |
//! | [`mod@replay`] | runs a trace again under the simulator, with the content oracle |
//!
//! A trace holds no data of the guest: at most a hash of what was written.

pub mod cli;
pub mod format;
pub mod recorder;
pub mod replay;

pub use self::{
    format::{Event, NodeInfo, Record, Trace},
    recorder::Recorder,
    replay::{Replay, Replayed, replay},
};
