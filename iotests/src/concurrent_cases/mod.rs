//! Everything at once: many queues with status queries, checks, resizes, reopens and flushes between them; writers that meet
//! in one cluster, one table, one full cache, one nearly full disk; requests dropped at each of their await points in such
//! company; and what is left in memory when all is over.

mod company;
mod crowd;
mod leaks;

use crate::case::Case;

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = crowd::cases();
    cases.extend(company::cases());
    cases.extend(leaks::cases());
    cases
}

/// Small workloads in which each request is worth being dropped at each of its await points.
pub fn worth_dropping() -> Vec<Case> {
    company::cases()
}
