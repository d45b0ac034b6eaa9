//! Nodes that misbehave on command, or watch what passes: fault injectors and checkers that are put into any graph by
//! options, with the option names that qemu's users know.
//!
//! | driver | what it does |
//! | --- | --- |
//! | `blkdebug` ([`BlkdebugFactory`]) | fails, delays, tears or changes requests by rules; stops them at breakpoints; overrides limits |
//! | `blkverify` ([`BlkverifyFactory`]) | does everything on two images and fails reads that differ |
//! | `blklogwrites` ([`BlklogwritesFactory`]) | keeps a log of all writes that can be replayed up to any point |
//! | `blkreplay` ([`BlkreplayFactory`]) | records the order of completions, and forces it on a later run |
//!
//! None of them is ever put into a graph unless the options say so. `docs/fault-injection.md` has all options, with
//! examples. [`register`] adds them all to a registry.

mod blkdebug;
mod blklogwrites;
mod blkreplay;
mod blkverify;
mod config;
mod debugger;
mod pass;
mod rules;
mod write_log;

use std::sync::Arc;

use block_core::registry::Registry;

pub use self::{
    blkdebug::{Blkdebug, BlkdebugFactory, debugger_below, resume_all},
    blklogwrites::{Blklogwrites, BlklogwritesFactory},
    blkreplay::{Blkreplay, BlkreplayFactory},
    blkverify::{Blkverify, BlkverifyFactory},
    debugger::{Debugger, Notice, Observer},
    rules::{FaultKind, InjectError, InjectFault, IoType, SetState},
    write_log::{EntryFlags, LogEntry, WriteLog},
};

/// Adds the drivers of this module to `registry`.
pub fn register(registry: &mut Registry) {
    registry.register(Arc::new(BlkdebugFactory::default()));
    registry.register(Arc::new(BlkverifyFactory));
    registry.register(Arc::new(BlklogwritesFactory));
    registry.register(Arc::new(BlkreplayFactory));
}
