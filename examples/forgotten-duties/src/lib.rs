//! Copies of the example driver (`examples/format-ledger`), each with one duty forgotten, as `copies.rs` lists them.
//! They are there to be failed by the suite, with the duty named (`tests/named.rs`). **Never use one.**

#![forbid(unsafe_code)]
#![allow(warnings, clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/copies.rs"));
