//! The simulator: one seed is one world, in which a guest's queues, jobs, faults, dropped requests and cuts of the power
//! meet under one schedule, and everything is judged.
//!
//! | file | what it is |
//! | --- | --- |
//! | [`scenario`] | what a world is asked to do, as plain data |
//! | [`generate()`] | from a seed to a scenario |
//! | [`run()`] | one scenario under one schedule, to the last judgement |
//! | `world`, `guest`, `work`, `progress` | a phase's world, the guest's queues, the jobs, how far the guest has come |
//! | `snapshots`, `bitmaps` | internal snapshots and persistent bitmaps: what is asked for, and what they must hold |
//! | `lengths` | which length the disk may have |
//! | `judge` | content, metadata and length at the end and when opened again |
//! | [`books`] | what must hold at every step |
//! | [`record`], [`timeline`] | what is left of a run, and how it is read |
//! | [`minimise()`] | the shortest scenario and schedule that still fail |
//! | [`campaign`] | many seeds, and what they covered |
//! | [`cli`] | the commands |

mod bitmaps;
pub mod books;
pub mod campaign;
pub mod cli;
mod generate;
mod guest;
mod judge;
mod lengths;
mod meter;
mod minimise;
mod progress;
pub mod record;
mod run;
pub mod scenario;
mod snapshots;
pub mod timeline;
mod work;
mod world;

pub use self::{
    campaign::{Campaign, Totals, profile},
    generate::{Profile, generate},
    minimise::{Saved, minimise},
    record::{Event, Failure, FailureKind},
    run::{How, Outcome, run},
    scenario::Scenario,
};
