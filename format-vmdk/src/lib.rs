//! VMware disk images: monolithicSparse (one file of grains, with tables and a text descriptor inside) and
//! monolithicFlat (a descriptor and a file of plain data).
//!
//! [`VmdkFactory`] is what a program registers. Other kinds of image are refused by their name, before anything
//! is written. Where things are on disk stands in `layout.rs` and `descriptor.rs`, which do no I/O; what keeps
//! concurrent requests and power cuts from doing harm is written down at the top of `sparse.rs` and `tables.rs`.

#![forbid(unsafe_code)]

mod check;
mod claims;
mod create;
mod descriptor;
mod driver;
mod factory;
mod info;
mod layout;
mod space;
mod sparse;
mod tables;

#[cfg(test)]
mod tests;

pub use self::{driver::VmdkDriver, factory::VmdkFactory};
