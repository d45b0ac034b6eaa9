//! The steps of `docs/writing-a-driver.md`: one module for each, whole drivers all of them. `diff` between two shows
//! what a step adds. The last step is the crate `format-ledger`.

#![forbid(unsafe_code)]

pub mod step1;
