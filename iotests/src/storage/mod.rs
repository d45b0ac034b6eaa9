//! Simulated storage: a protocol driver whose every request can be held, delayed, failed and reordered, and whose power
//! can be cut.
//!
//! **What is injected:** a request waits before or after its effect until a test lets it go ([`Disk::hold`]), takes
//! longer ([`Disk::delay`]), or fails before or after its effect ([`Disk::fail`]). Every request yields at least once
//! before and once after its effect, so that under a seeded schedule any two requests in flight take effect in either
//! order.
//!
//! **What a power cut keeps** ([`Disk::power_cut`]): everything that was flushed, and any subset of what was written
//! since, including what is still in flight, each write torn at sector boundaries.
//!
//! An image with an external data file is one [`Disk`] with two files ([`Disks::keep_beside`]): rules, the log, a power cut
//! and everything that is kept of it reach both, the second at offsets from [`BESIDE`] on.
//!
//! It never hands out bytes that nobody wrote, and never fails by itself. Discarded ranges read as zeroes at once: the
//! punch that comes too late for its new owner is seen.

mod content;
mod disk;
mod driver;
mod rules;

pub use self::{
    content::{BESIDE, Content, PAGE},
    disk::{Disk, DiskWatch, Disks, Hold, LogEntry, SECTOR, Watcher},
    driver::{TestStorage, TestStorageFactory},
    rules::{Choose, Fate, OpInfo, OpKind, Stage},
};
