//! The conformance suite for block drivers: a deterministic world, storage that misbehaves on command, a content oracle,
//! and the cases that use them.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`sim`] | the deterministic environment: one seed is one schedule |
//! | [`storage`] | simulated storage: hold, delay, fail and reorder requests, cut the power |
//! | [`pattern`], [`oracle`] | stamped sectors, and what each sector may hold |
//! | [`lab`] | a world set up for a test, and producers that tell the oracle what they do |
//! | [`memdriver`] | a third party's copy-on-write format without safeguards of its own |
//! | [`case`] | what a case is, how it is run, and what comes out |
//! | [`aftermath`] | what is looked at after every case |
//! | [`cases`] | the deterministic races |
//! | [`basic`] | what every driver must do |
//! | [`duties`] | what the contract leaves to a driver, duty by duty: a failure says which was forgotten |
//! | [`mod@bench`] | an image beside an exact model of its bytes, and a probe that sees what the core makes of a request |
//! | [`path_cases`], [`chain_cases`], [`cluster_cases`], [`life_cases`], [`graph_cases`] | the request path; status and backing files; zero writes and discards by kind of cluster; resize, reopen and permissions; drain and graph changes |
//! | [`job_cases`] | all jobs in all modes on live disks |
//! | [`fault_cases`] | the n-th request to the storage fails, for all n |
//! | [`concurrent_cases`] | everything at once, and what is left in memory afterwards |
//! | [`hostile_cases`] | damaged and malicious images |
//! | [`interop_cases`] | the installed qemu tools on the other side |
//! | [`race`] | storms: thousands of interleaved commands |
//! | [`crash`] | power cuts after every storage write, and what must be there afterwards |
//! | [`cancel`] | any case again, with one request dropped at each of its await points |
//! | [`trace`] | what live nodes were asked, recorded and run again |
//! | [`faults`] | nodes that misbehave on command: `blkdebug`, `blkverify`, `blklogwrites`, `blkreplay` |
//! | [`simulate`] | the simulator: a seed decides guests, jobs, faults, power cuts and the schedule |
//! | [`explore`] | every schedule of a small scenario, up to so many deviations |
//! | [`external`] | the installed qemu tools as a second opinion |
//! | [`suite`] | all cases, and the drivers that they are run on |
//! | [`runner`] | cases × formats × schedules, on several threads |
//! | [`report`] | the outcomes: a table, JSON, JUnit |
//! | [`cli`] | the program |
//! | [`conformance!`] | one test per case in a driver's own crate |
//!
//! A case never names a format: what a driver declares selects the cases, and what it doesn't declare is reported as not
//! covered, never as passed. The crate links no driver but its own; drivers come in a [`block_core::Registry`].

#![forbid(unsafe_code)]

pub mod aftermath;
pub mod basic;
pub mod bench;
pub mod cancel;
pub mod case;
pub mod cases;
pub mod chain_cases;
pub mod cli;
pub mod cluster_cases;
pub mod concurrent_cases;
#[doc(hidden)]
pub mod conformance;
pub mod crash;
pub mod duties;
pub mod explore;
pub mod external;
pub mod fault_cases;
pub mod faults;
pub mod graph_cases;
pub mod hostile_cases;
#[cfg(feature = "mutants")]
pub mod hunt;
pub mod interop_cases;
pub mod job_cases;
pub mod lab;
mod laid;
pub mod life_cases;
pub mod memdriver;
pub mod oracle;
mod panics;
mod parts;
pub mod path_cases;
pub mod pattern;
pub mod race;
pub mod relay;
pub mod report;
pub mod runner;
mod say;
pub mod sim;
pub mod simulate;
mod stack;
pub mod storage;
pub mod suite;
pub mod trace;

pub use self::{
    conformance::Subject,
    suite::{Suite, all_cases},
};

/// The whole program with the drivers of `registry`, on the process's arguments; gives its exit status. [`Suite`] has
/// more to choose.
///
/// ```no_run
/// # use iotests::memdriver::ThirdPartyFactory as MyDriver;
/// use block_core::Registry;
///
/// fn main() -> std::process::ExitCode {
///     iotests::main(&Registry::new().with(MyDriver))
/// }
/// ```
pub fn main(registry: &block_core::Registry) -> std::process::ExitCode {
    Suite::new(registry).main()
}
