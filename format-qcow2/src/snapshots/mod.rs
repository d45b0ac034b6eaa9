//! Internal snapshots (digest, section 7): reading their table, and finding one. Changing them is `change`'s, with the new
//! refcounts in `shadow` and what a snapshot reaches in `tree`. `expand` gets rid of zero clusters in all of them.

mod change;
mod expand;
mod reach;
mod shadow;
mod table;
mod tree;

use block_core::{
    error::{Error, ErrorKind, Result},
    request::Request,
    snapshot::{SnapshotInfo, SnapshotKey},
};

use crate::{image::Qcow2, layout::SnapshotEntry};

pub(crate) use self::{reach::others, table::load};

/// The snapshot that is meant.
///
/// # Errors
/// ENOENT.
pub(crate) fn find(snapshots: &[SnapshotEntry], which: &SnapshotKey) -> Result<usize> {
    // Lossy conversion could make two that differ the same; the first one wins, as always.
    let listed: Vec<SnapshotInfo> = snapshots.iter().map(|entry| entry.info(0)).collect();
    which.find(listed.iter().map(|info| (&*info.id, &*info.name)))
}

impl Qcow2 {
    /// The snapshots of the image.
    pub async fn list_snapshots(&self, request: &Request) -> Result<Vec<SnapshotInfo>> {
        if self.geometry.has_data_file() {
            return Err(unsupported());
        }
        let meta = self.lock_meta(request.file()?).await?;
        let size = meta.header.disk_size();
        Ok(meta
            .snapshots
            .iter()
            .map(|entry| entry.info(size))
            .collect())
    }
}

/// ENOTSUP: the data file isn't the image's alone.
fn unsupported() -> Error {
    Error::from_kind(ErrorKind::NotSupported)
}
