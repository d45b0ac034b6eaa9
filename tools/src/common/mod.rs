//! What all the programs in this crate share: arguments, sessions, opening images, numbers, progress, messages.

pub mod cache;
pub mod failure;
pub mod getopt;
pub mod image_names;
pub mod json;
pub mod object;
pub mod open;
pub mod output;
pub mod program;
pub mod progress;
pub mod session;
pub mod signals;
pub mod size;
pub mod snapshots;
pub mod trace;
