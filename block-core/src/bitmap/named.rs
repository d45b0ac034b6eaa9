//! Bitmaps that users know by name, and what may be done to them when. What is done is in `ops`; the bits are in `dirty`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use serde::{Deserialize, Serialize};

use super::DirtyBitmap;
use crate::error::{Error, ErrorKind, Result};

/// A bitmap of a node with a name that no other bitmap of that node has.
///
/// Its state is four flags beside the bits' own "enabled" (which says whether writes are recorded):
/// * *persistent*: the image stores it when it is closed or becomes read-only;
/// * *inconsistent*: what the image stores was not kept up to date (a crash, a program that died), so it has no bits and may
///   only be removed;
/// * *read-only*: loaded from an image that can't be written to;
/// * *busy*: an operation ([`BusyBitmap`]) has it for itself.
#[derive(Debug)]
pub struct NamedBitmap {
    name: String,
    bits: Arc<DirtyBitmap>,
    persistent: AtomicBool,
    inconsistent: AtomicBool,
    read_only: AtomicBool,
    busy: AtomicBool,
}

/// What somebody wants of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapUse {
    /// To read its bits.
    Read,
    /// To change its bits or whether it records.
    Change,
    /// To remove it.
    Remove,
}

/// What is to be told of a bitmap, with QMP's keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Dirty bytes, in whole granules.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Writes are recorded.
    pub recording: bool,
    /// An operation has it for itself.
    pub busy: bool,
    /// The image stores it.
    pub persistent: bool,
    /// What the image stores can't be trusted.
    pub inconsistent: bool,
}

impl NamedBitmap {
    /// A bitmap that is neither persistent nor anything else.
    pub fn new(name: impl Into<String>, bits: DirtyBitmap) -> Self {
        Self {
            name: name.into(),
            bits: Arc::new(bits),
            persistent: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            busy: AtomicBool::new(false),
        }
    }

    /// The same, stored by the image. What a driver loads is made with this.
    #[must_use]
    pub fn persistent(self) -> Self {
        self.persistent.store(true, Ordering::SeqCst);
        self
    }

    /// The same, with contents that can't be trusted: it records nothing and has no bits.
    #[must_use]
    pub fn inconsistent(self) -> Self {
        self.bits.set_enabled(false);
        self.inconsistent.store(true, Ordering::SeqCst);
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its bits. Whoever changes them asks [`Self::check`] first.
    pub fn bits(&self) -> &Arc<DirtyBitmap> {
        &self.bits
    }

    /// Whether the image stores it.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Ordering::SeqCst)
    }

    /// Whether what the image stores can't be trusted.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent.load(Ordering::SeqCst)
    }

    /// Whether it belongs to an image that can't be written to.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    /// For drivers: the image has become read-only, or writable.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::SeqCst);
    }

    /// Whether an operation has it for itself.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    /// Refuses what its state doesn't allow.
    ///
    /// # Errors
    /// EBUSY for a busy one, EPERM for a read-only one, EINVAL for an inconsistent one, with qemu's messages.
    pub fn check(&self, purpose: BitmapUse) -> Result<()> {
        let name = &self.name;
        if self.is_busy() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "Bitmap '{name}' is currently in use by another operation and cannot be used"
                ),
            ));
        }
        if purpose != BitmapUse::Read && self.is_read_only() {
            return Err(Error::new(
                ErrorKind::NotPermitted,
                format!("Bitmap '{name}' is readonly and cannot be modified"),
            ));
        }
        if purpose != BitmapUse::Remove && self.is_inconsistent() {
            return Err(Error::invalid(format!(
                "Bitmap '{name}' is inconsistent and cannot be used"
            )));
        }
        Ok(())
    }

    /// Has it for oneself until the guard is dropped: everybody else is refused.
    ///
    /// # Errors
    /// As [`Self::check`] for `purpose`.
    pub fn hold(self: &Arc<Self>, purpose: BitmapUse) -> Result<BusyBitmap> {
        self.check(purpose)?;
        if self.busy.swap(true, Ordering::SeqCst) {
            // Somebody was faster; `check` says so now.
            self.check(purpose)?;
            return self.hold(purpose);
        }
        Ok(BusyBitmap(self.clone()))
    }

    /// What is to be told of it.
    pub fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.name.clone(),
            count: self
                .bits
                .dirty_granules()
                .saturating_mul(self.bits.granularity()),
            granularity: self.bits.granularity(),
            recording: self.bits.is_enabled() && !self.is_inconsistent(),
            busy: self.is_busy(),
            persistent: self.is_persistent(),
            inconsistent: self.is_inconsistent(),
        }
    }
}

/// A bitmap that an operation has for itself. It goes on recording.
#[derive(Debug)]
pub struct BusyBitmap(Arc<NamedBitmap>);

impl BusyBitmap {
    /// The bitmap.
    pub fn bitmap(&self) -> &Arc<NamedBitmap> {
        &self.0
    }
}

impl Drop for BusyBitmap {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap() -> NamedBitmap {
        NamedBitmap::new("b", DirtyBitmap::new(1 << 20, 512).unwrap())
    }

    #[test]
    fn each_state_refuses_what_it_has_to_with_qemus_words() {
        let reason = |bitmap: &NamedBitmap, purpose| bitmap.check(purpose).unwrap_err().reason();
        let bad = bitmap().persistent().inconsistent();
        let unusable = "Bitmap 'b' is inconsistent and cannot be used";
        assert_eq!(reason(&bad, BitmapUse::Read), unusable);
        assert_eq!(reason(&bad, BitmapUse::Change), unusable);
        bad.check(BitmapUse::Remove).unwrap();
        assert!(!bad.info().recording);

        let fixed = bitmap();
        fixed.set_read_only(true);
        fixed.check(BitmapUse::Read).unwrap();
        let readonly = "Bitmap 'b' is readonly and cannot be modified";
        assert_eq!(reason(&fixed, BitmapUse::Change), readonly);
        assert_eq!(reason(&fixed, BitmapUse::Remove), readonly);
    }

    #[test]
    fn one_operation_at_a_time_holds_a_bitmap() {
        let bitmap = Arc::new(bitmap());
        let held = bitmap.hold(BitmapUse::Read).unwrap();
        assert!(bitmap.info().busy);
        let error = bitmap.hold(BitmapUse::Read).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        bitmap.bits().mark(0, 1);
        drop(held);
        bitmap.hold(BitmapUse::Change).unwrap();
        assert_eq!(bitmap.info().count, 512);
    }
}
