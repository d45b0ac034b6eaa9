//! LUKS version 1: the header, unlocking, creating, and changes of key slots.
//!
//! What has to be written for a change is a list of [`Step`]s, so that the order on disk can be tested without one; only
//! [`run`] does I/O, through an [`Area`] that the caller provides.

mod header;
mod keys;
mod slots;
#[cfg(test)]
mod tests;

pub use header::{HEADER_LEN, KeySlot, LuksHeader, SLOTS, STRIPES};
pub use keys::{CreateParameters, MasterKey, create, unlock, unlock_slot};
pub use slots::{Area, SlotChange, Step, add_key, amend, erase_key, run};
