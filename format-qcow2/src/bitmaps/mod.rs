//! Persistent dirty bitmaps (digest, section 8).
//!
//! While an image is open, its bitmaps live in the node (`block_core::bitmap`), where the request path marks them; what is on
//! disk is marked as in use and trusted by nobody. This module reads them when the image is opened (`load`), writes them when
//! it is closed or becomes read-only (`store`), and switches the header from one directory to the next (`publish`). What is
//! where is in `layout`. It never looks at guest data, and a guest's request never comes here.
//!
//! After a crash at any moment a stored bitmap is complete, or marked as in use, or hidden by a clear autoclear bit; and
//! at worst clusters have leaked.

pub mod layout;
mod load;
mod publish;
mod store;

use parking_lot::Mutex;
use serde_json::{Value, json};

use self::layout::{BitmapFlags, DirectoryEntry};
pub(crate) use self::store::mark_read_only;

/// The directory as it is on disk.
#[derive(Debug, Default)]
pub(crate) struct Stored(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Bitmaps have been loaded: the node has them all. They aren't when an image is opened for a check.
    loaded: bool,
    /// There is an extension to be seen to when the image is opened.
    pending: bool,
    entries: Vec<DirectoryEntry>,
}

impl Stored {
    /// `pending`: the header has the extension, which even in version 2 has to be looked at.
    pub fn new(pending: bool) -> Self {
        let stored = Self::default();
        stored.0.lock().pending = pending;
        stored
    }

    /// Whether the extension that the image was opened with hasn't been looked at yet.
    pub fn is_pending(&self) -> bool {
        self.0.lock().pending
    }

    fn set(&self, entries: Vec<DirectoryEntry>) {
        *self.0.lock() = State {
            loaded: true,
            pending: false,
            entries,
        };
    }

    /// The image was read anew.
    pub fn replace(&self, entries: Vec<DirectoryEntry>) {
        self.0.lock().entries = entries;
    }

    fn is_loaded(&self) -> bool {
        self.0.lock().loaded
    }

    fn entries(&self) -> Vec<DirectoryEntry> {
        self.0.lock().entries.clone()
    }

    /// Bytes of the directory that extra data takes, at most.
    fn extra_len(&self) -> u64 {
        let state = self.0.lock();
        let lens = state.entries.iter().map(|entry| entry.extra.len());
        lens.map(|len| len.next_multiple_of(8) as u64).sum()
    }

    /// What `info` shows of them, with qemu-img's keys; `None` when there are none.
    pub fn info(&self) -> Option<Value> {
        let entries = self.entries();
        let list = entries.iter().map(|entry| {
            let flags = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
            let flags: Vec<&str> = flags
                .into_iter()
                .filter(|(flag, _)| entry.flags.contains(*flag))
                .map(|(_, name)| name)
                .collect();
            json!({
                "flags": flags,
                "name": entry.display_name(),
                "granularity": 1u64 << entry.granularity_bits,
            })
        });
        let list: Vec<Value> = list.collect();
        (!list.is_empty()).then(|| list.into())
    }
}
