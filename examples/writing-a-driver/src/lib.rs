//! The steps of `docs/writing-a-driver.md`: one module for each, whole drivers all of them. `diff` between two shows
//! what a step adds. The last step is the crate `format-ledger`.

#![forbid(unsafe_code)]

pub mod step1;
pub mod step2;
pub mod step3;
pub mod step4;
pub mod step5;
mod tables;

pub use tables::{Factory, OverTables};
