//! Storms: thousands of interleaved writes, zero writes and discards on a handful of clusters, with victims around them
//! and new clusters that want to recycle what gets freed.
//!
//! A storm is one seed. It runs in-process over simulated storage ([`storm`]), with the gate or without, and as a file
//! of commands for a program that reads them on standard input ([`commands`]). [`via`] plays those files, and the
//! deterministic races of [`scenes`], to a program as a black box.

pub mod commands;
mod matrix;
pub mod scenes;
mod storm;
pub mod via;

pub use self::{
    matrix::{Cell, Expect, Matrix, matrix},
    storm::{StormConfig, StormReport, storm},
};
