//! The raw format: guest bytes lie in the file as they are, from `offset` on, `size` bytes or all that there are.
//!
//! [`RawFactory`] is what a program registers. The driver never interprets content, with one exception: when the
//! format was guessed by probing, it refuses writes that would make the file look like another format
//! (see `guard.rs`).

#![forbid(unsafe_code)]

mod driver;
mod factory;
mod guard;
mod options;

#[cfg(test)]
mod tests;

pub use self::{driver::RawDriver, factory::RawFactory};
