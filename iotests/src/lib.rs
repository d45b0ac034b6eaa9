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
//! | [`cases`] | the deterministic races |
//! | [`basic`] | what every driver must do |
//! | [`job_cases`] | all jobs in all modes on live disks |
//! | [`fault_cases`] | the n-th request to the storage fails, for all n |
//! | [`concurrent_cases`] | everything at once, and what is left in memory afterwards |
//! | [`hostile_cases`] | damaged and malicious images |
//! | [`interop_cases`] | the installed qemu tools on the other side |
//! | [`race`] | storms: thousands of interleaved commands |
//! | [`cancel`] | any case again, with one request dropped at each of its await points |
//! | [`external`] | the installed qemu tools as a second opinion |
//! | [`cli`] | the program |
//!
//! A case never names a format: what a driver declares selects the cases, and what it doesn't declare is reported as not
//! covered, never as passed. The crate links no driver but its own; drivers come in a [`block_core::Registry`].

#![forbid(unsafe_code)]

pub mod basic;
pub mod cancel;
pub mod case;
pub mod cases;
pub mod cli;
pub mod concurrent_cases;
pub mod external;
pub mod fault_cases;
pub mod hostile_cases;
pub mod interop_cases;
pub mod job_cases;
pub mod lab;
pub mod memdriver;
pub mod oracle;
pub mod pattern;
pub mod race;
pub mod relay;
pub mod sim;
mod stack;
pub mod storage;

/// Runs the program with the drivers of `registry`, on the process's arguments; gives its exit status.
pub fn main(registry: &block_core::Registry) -> std::process::ExitCode {
    cli::main(registry)
}
