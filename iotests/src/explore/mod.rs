//! Exploration: every schedule of a small scenario, up to so many deviations from the usual one, over the shipped drivers.
//!
//! A few requests, three or four tasks, one image. An execution is steered ([`crate::sim::Steering`]): usually the task
//! that was polled last goes on, and each point at which another is polled instead is a **deviation**. What is run is
//! *all* lists of choices with at most k deviations, level by level, so that a failure is found with the fewest; nothing is
//! left out, as there is no reduction: two polls that look independent may meet in the allocator, the cache or the gate.
//!
//! What a schedule decides: which task is polled next, and with it the order in which requests of different tasks to the
//! storage take effect and end; when a request is dropped; when the power is cut. What it doesn't: the order among parts of one
//! request that wait together in one task.
//!
//! | file | what it is |
//! | --- | --- |
//! | [`scenario`] | a small scenario as plain data |
//! | [`mod@catalogue`] | those that there are |
//! | `world`, `guest`, `judge` | one execution: its world, who does what in it, and what has to be right afterwards |
//! | [`search`] | all schedules of one scenario |
//! | [`cli`] | the command |

pub mod catalogue;
pub mod cli;
mod guest;
mod judge;
pub mod scenario;
pub mod search;
mod world;

pub use self::{
    catalogue::catalogue,
    scenario::Small,
    search::{Found, Limits, Report, explore},
    world::{Execution, Prepared, Start},
};
