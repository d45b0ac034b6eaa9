//! Every kind of job in every mode on live disks of the format under test: beside a guest that never rests, in every state,
//! with errors on either side, into targets of other geometry. `cases::with_jobs` has the races at one cluster; here is
//! everything else.

mod control;
mod durable;
mod errors;
mod live;
mod points;
mod refused;
mod targets;
mod work;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = live::cases();
    cases.extend(control::cases());
    cases.extend(durable::cases());
    cases.extend(errors::cases());
    cases.extend(points::cases());
    cases.extend(refused::cases());
    cases.extend(targets::cases());
    cases
}
