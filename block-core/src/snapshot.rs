//! Internal snapshots: states of a disk that an image keeps inside itself. Plain data and the rules by which one is named;
//! what a snapshot is on disk is the format's.

use crate::error::{Error, ErrorKind, Result};

/// An internal snapshot, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its identifier, unique in a sound image.
    pub id: String,
    /// The name that a user gave it; others may have the same.
    pub name: String,
    /// Bytes of saved VM state.
    pub vm_state_size: u64,
    /// When it was taken: seconds since 1970, UTC.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// The guest's clock, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The guest's instruction count, if one was recorded.
    pub icount: Option<u64>,
    /// Bytes of the disk in that state.
    pub disk_size: u64,
}

/// What the taker of a snapshot says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name.
    pub name: String,
    /// Now, in seconds since 1970, UTC: the libraries have no calendar.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// The guest's clock, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The guest's instruction count.
    pub icount: Option<u64>,
    /// Bytes of VM state that were written for it ([`crate::BlockHandle::write_vm_state`]); 0 for a snapshot of the disk alone.
    pub vm_state_size: u64,
}

/// Which snapshot is meant. The first that matches is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotKey {
    /// The one with this identifier.
    Id(String),
    /// One with this name.
    Name(String),
    /// The one with this identifier, if it has this name.
    IdAndName(String, String),
    /// The one with this identifier; if there is none, one with this name.
    IdOrName(String),
    /// One with this name; if there is none, the one with this identifier.
    NameOrId(String),
}

impl SnapshotKey {
    /// The place of the snapshot that is meant in a list of identifiers and names.
    pub fn position<'a>(
        &self,
        snapshots: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Option<usize> {
        let by_id = |wanted: &str| snapshots.clone().position(|(id, _)| id == wanted);
        let by_name = |wanted: &str| snapshots.clone().position(|(_, name)| name == wanted);
        match self {
            Self::Id(id) => by_id(id),
            Self::Name(name) => by_name(name),
            Self::IdAndName(wanted, called) => snapshots
                .clone()
                .position(|(id, name)| id == wanted && name == called),
            Self::IdOrName(text) => by_id(text).or_else(|| by_name(text)),
            Self::NameOrId(text) => by_name(text).or_else(|| by_id(text)),
        }
    }

    /// The same.
    ///
    /// # Errors
    /// ENOENT, `Can't find snapshot`, when there is none.
    pub fn find<'a>(
        &self,
        snapshots: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Result<usize> {
        self.position(snapshots)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "Can't find snapshot"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_finds_by_id_or_name_in_the_order_that_it_says() {
        let list = [("1", "x"), ("2", "y"), ("3", "1"), ("4", "y")];
        let find = |key: SnapshotKey| key.position(list.iter().copied());
        let text = || "1".to_owned();
        assert_eq!(find(SnapshotKey::Id(text())), Some(0));
        assert_eq!(find(SnapshotKey::Name(text())), Some(2));
        assert_eq!(find(SnapshotKey::IdOrName(text())), Some(0));
        assert_eq!(find(SnapshotKey::NameOrId(text())), Some(2));
        assert_eq!(find(SnapshotKey::Name("y".into())), Some(1));
        let both = |id: &str, name: &str| SnapshotKey::IdAndName(id.into(), name.into());
        assert_eq!(find(both("4", "y")), Some(3));
        assert_eq!(find(both("1", "y")), None);
        let none = SnapshotKey::Id("9".into()).find(list.iter().copied());
        assert_eq!(none.unwrap_err().kind(), ErrorKind::NotFound);
    }
}
