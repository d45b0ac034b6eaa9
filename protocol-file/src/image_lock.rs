//! Image locks between processes (digest of locking): bytes 100 to 103 of the image say which permissions its openers
//! use, bytes 200 to 203 which they refuse to others. All locks are read locks, which never conflict; conflicts are
//! found by testing after publishing, so that of two racing openers both may fail, but never both succeed.
//!
//! This file never touches data, and never takes a write lock.

use std::{fs::File, io, os::fd::AsFd};

use block_core::{
    error::{Error, ErrorKind, Operation, Result},
    flags::{PermissionSet, Permissions},
};
use parking_lot::Mutex;
use serde::Deserialize;

use crate::sys::{self, LockKind};

/// The first "I use it" byte.
const USED: u64 = 100;
/// The first "I do not share it" byte.
const REFUSED: u64 = 200;
/// Permissions that have bytes.
const COUNT: u64 = 4;

/// `locking=auto|on|off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Locking {
    /// Lock if the kernel has OFD locks.
    #[default]
    Auto,
    /// Lock in any case, with POSIX locks if need be.
    On,
    /// Never lock.
    Off,
}

/// One bit per byte of the digest's section 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct LockSet {
    used: u8,
    refused: u8,
}

impl LockSet {
    fn of(wanted: PermissionSet) -> Self {
        Self {
            used: wanted.used.bits(),
            refused: (Permissions::all() - wanted.shared).bits(),
        }
    }

    fn union(self, other: Self) -> Self {
        Self {
            used: self.used | other.used,
            refused: self.refused | other.refused,
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            used: self.used & !other.used,
            refused: self.refused & !other.refused,
        }
    }

    fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn bytes(self) -> impl Iterator<Item = u64> {
        let bits = |bits: u8, base: u64| {
            (0..COUNT)
                .filter(move |bit| bits & (1 << bit) != 0)
                .map(move |bit| base + bit)
        };
        bits(self.used, USED).chain(bits(self.refused, REFUSED))
    }
}

#[derive(Debug, Default)]
struct State {
    /// What is locked, apart from what a change has added.
    held: LockSet,
    /// A change that is prepared: `held ∪ wanted` is locked.
    wanted: Option<LockSet>,
}

/// The locks of one node.
#[derive(Debug)]
pub(crate) struct ImageLock {
    /// `None`: no locking.
    kind: Option<LockKind>,
    name: String,
    force_share: bool,
    state: Mutex<State>,
}

impl ImageLock {
    /// Locks nothing yet. `name` is what messages call the image.
    pub(crate) fn new(locking: Locking, name: &str, force_share: bool) -> Self {
        let kind = match locking {
            Locking::Off => None,
            Locking::Auto => sys::ofd_locks_available().then_some(LockKind::Ofd),
            Locking::On if sys::ofd_locks_available() => Some(LockKind::Ofd),
            Locking::On => {
                tracing::warn!(
                    "File lock requested but OFD locking syscall is unavailable, falling back to POSIX file locks"
                );
                tracing::warn!("Due to the implementation, locks can be lost unexpectedly.");
                Some(LockKind::Posix)
            }
        };
        Self {
            kind,
            name: name.to_owned(),
            force_share,
            state: Mutex::default(),
        }
    }

    /// What `info` shows.
    pub(crate) fn describe(&self) -> &'static str {
        match self.kind {
            None => "off",
            Some(LockKind::Ofd) => "ofd",
            Some(LockKind::Posix) => "posix",
        }
    }

    /// Publishes and tests what is wanted, on top of what is held.
    pub(crate) fn prepare(&self, file: &File, mut wanted: PermissionSet) -> Result<()> {
        let Some(kind) = self.kind else { return Ok(()) };
        if self.force_share {
            wanted.used &= Permissions::CONSISTENT_READ;
            wanted.shared = Permissions::all();
        }
        let wanted = LockSet::of(wanted);
        let mut state = self.state.lock();
        let locked = state
            .wanted
            .map_or(state.held, |before| before.union(state.held));
        let added = wanted.minus(locked);
        if let Err(error) = self.lock(file, kind, added) {
            self.unlock(file, kind, added);
            return Err(error);
        }
        // Using and refusing less than before can't conflict with anyone.
        if !wanted.minus(state.held).is_empty()
            && let Err(error) = self.test(file, kind, wanted)
        {
            self.unlock(file, kind, added);
            return Err(error);
        }
        if let Some(before) = state.wanted {
            self.unlock(file, kind, before.minus(state.held.union(wanted)));
        }
        state.wanted = Some(wanted);
        Ok(())
    }

    /// Releases what the new set doesn't need.
    pub(crate) fn commit(&self, file: &File) {
        let Some(kind) = self.kind else { return };
        let mut state = self.state.lock();
        if let Some(wanted) = state.wanted.take() {
            self.unlock(file, kind, state.held.minus(wanted));
            state.held = wanted;
        }
    }

    /// Releases what the old set didn't have.
    pub(crate) fn abort(&self, file: &File) {
        let Some(kind) = self.kind else { return };
        let mut state = self.state.lock();
        if let Some(wanted) = state.wanted.take() {
            self.unlock(file, kind, wanted.minus(state.held));
        }
    }

    /// Takes on `new` what is locked on `old`. There is no test: read locks never conflict, and one on a second
    /// descriptor would meet our own.
    pub(crate) fn carry_over(&self, new: &File) -> Result<()> {
        let Some(kind) = self.kind else { return Ok(()) };
        let state = self.state.lock();
        let locked = state
            .wanted
            .map_or(state.held, |wanted| wanted.union(state.held));
        self.lock(new, kind, locked)
    }

    /// Releases, on a descriptor that is given up, everything that may be locked there. The descriptor may live on in
    /// other hands (a duplicate, an I/O in flight), so that closing it isn't enough.
    pub(crate) fn release_descriptor(&self, old: &File) {
        if let Some(kind) = self.kind {
            let all = (1 << COUNT) - 1;
            self.unlock(
                old,
                kind,
                LockSet {
                    used: all,
                    refused: all,
                },
            );
        }
    }

    /// Releases everything.
    pub(crate) fn release(&self, file: &File) {
        let held = {
            let mut state = self.state.lock();
            let locked = state
                .wanted
                .map_or(state.held, |wanted| wanted.union(state.held));
            *state = State::default();
            locked
        };
        if !held.is_empty() {
            self.release_descriptor(file);
        }
    }

    fn lock(&self, file: &File, kind: LockKind, set: LockSet) -> Result<()> {
        for byte in set.bytes() {
            sys::set_read_lock(file.as_fd(), kind, byte)
                .map_err(|error| self.error(format!("Failed to lock byte {byte}"), error))?;
        }
        Ok(())
    }

    fn unlock(&self, file: &File, kind: LockKind, set: LockSet) {
        for byte in set.bytes() {
            if let Err(error) = sys::unset_lock(file.as_fd(), kind, byte) {
                tracing::warn!(image = self.name, byte, %error, "Failed to unlock byte");
            }
        }
    }

    /// First whether anyone refuses what is used, then whether anyone uses what is refused.
    fn test(&self, file: &File, kind: LockKind, wanted: LockSet) -> Result<()> {
        for (bits, base, shared) in [
            (wanted.used, REFUSED, ""),
            (wanted.refused, USED, "shared "),
        ] {
            for bit in (0..COUNT).filter(|bit| bits & (1 << bit) != 0) {
                let conflict = match sys::test_write_lock(file.as_fd(), kind, base + bit) {
                    Ok(false) => continue,
                    Ok(true) => io::Error::from_raw_os_error(libc::EAGAIN),
                    Err(error) => error,
                };
                let name = Permissions::from_bits_truncate(1 << bit).name();
                return Err(self.error(format!("Failed to get {shared}\"{name}\" lock"), conflict));
            }
        }
        Ok(())
    }

    /// The message with qemu's hint line below it.
    fn error(&self, message: String, error: io::Error) -> Error {
        let held = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
        let (kind, reason) = if held {
            (ErrorKind::Locked, String::new())
        } else {
            let kind = ErrorKind::from_errno(error.raw_os_error().unwrap_or(libc::EIO));
            (kind, format!(": {}", kind.strerror()))
        };
        Error::new(
            kind,
            format!(
                "{message}{reason}\nIs another process using the image [{}]?",
                self.name
            ),
        )
        .with_file(&self.name)
        .with_operation(Operation::Open, 0, 0)
        .with_source(error)
    }
}
