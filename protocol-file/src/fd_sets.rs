//! Descriptors that the embedding program passes in, under names of the form `/dev/fdset/N`: for programs that open the
//! files themselves (or get them from somebody with more rights) and hand over nothing but descriptors.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use block_core::error::{Error, Result};
use parking_lot::Mutex;

use crate::{open_file::OpenFile, sys};

const PREFIX: &str = "/dev/fdset/";

/// Sets of descriptors, each set for one file, with different access modes. Cheap to clone; clones share the sets.
///
/// A descriptor that is opened through its set is duplicated: it shares the open file description, and with it the
/// image locks, with the original.
#[derive(Debug, Clone, Default)]
pub struct FdSets(Arc<Mutex<BTreeMap<u64, Vec<OwnedFd>>>>);

impl FdSets {
    /// No sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a descriptor to the set `set`, or to a new one. Returns the set's number.
    pub fn add(&self, set: Option<u64>, fd: OwnedFd) -> u64 {
        let mut sets = self.0.lock();
        let set = set.unwrap_or_else(|| sets.keys().next_back().map_or(0, |last| last + 1));
        sets.entry(set).or_default().push(fd);
        set
    }

    /// Removes a set. Files that were opened through it stay open. Returns whether it existed.
    pub fn remove(&self, set: u64) -> bool {
        let removed = self.0.lock().remove(&set);
        removed.is_some()
    }

    /// The file name that stands for a set.
    pub fn name(set: u64) -> String {
        format!("{PREFIX}{set}")
    }

    /// The set that a file name stands for, if it is such a name.
    pub(crate) fn parse(path: &str) -> Option<Result<u64>> {
        let number = path.strip_prefix(PREFIX)?;
        Some(number.parse().map_err(|_| {
            Error::invalid(format!(
                "Could not open '{path}': not the name of a descriptor set"
            ))
            .with_file(path)
        }))
    }

    /// A duplicate of the set's descriptor that fits best. EACCES when none allows writing though it is wanted.
    pub(crate) fn duplicate(&self, set: u64, writable: bool) -> io::Result<File> {
        let sets = self.0.lock();
        let fds = sets
            .get(&set)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        let mut fallback = None;
        for fd in fds {
            match sys::access_mode(fd.as_fd())? {
                sys::AccessMode::ReadWrite if writable => return fd.try_clone().map(File::from),
                sys::AccessMode::ReadOnly if !writable => return fd.try_clone().map(File::from),
                sys::AccessMode::ReadWrite => fallback = Some(fd),
                _ => {}
            }
        }
        match fallback {
            Some(fd) => fd.try_clone().map(File::from),
            None => Err(io::Error::from_raw_os_error(libc::EACCES)),
        }
    }

    /// Checks that `fd` can be read from, and tells whether it can be written to.
    pub(crate) fn inspect(fd: OwnedFd) -> io::Result<(File, bool)> {
        let file = File::from(fd);
        let writable = OpenFile::can_write(&file)?;
        if !writable && sys::access_mode(file.as_fd())? == sys::AccessMode::WriteOnly {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        Ok((file, writable))
    }
}
