//! What is refused although the header is valid: images that can't be used the way they are to be used. No I/O; nothing was
//! written by then.

use block_core::error::{Error, ErrorKind, Result};

use super::{
    header::{Autoclear, Header, Incompatible, invalid},
    units::HostOffset,
};

impl Header {
    /// What depends on how the image is opened: refuses a corrupt image for writing and one without refcounts, except
    /// for a check.
    pub fn check_open(&self, read_only: bool, for_check: bool) -> Result<()> {
        if !read_only && !for_check && self.incompatible.contains(Incompatible::CORRUPT) {
            return Err(Error::new(
                ErrorKind::AccessDenied,
                "qcow2: Image is corrupt; cannot be opened read/write",
            )
            .with_field(
                "incompatible_features",
                format!("{:#x}", self.incompatible.bits()),
                "bit 1 (corrupt) clear, or a read-only open",
            ));
        }
        if !for_check && self.refcount_table_clusters == 0 {
            return Err(invalid(
                "Image does not contain a reference count table",
                "refcount_table_clusters",
                0,
                "at least 1",
            ));
        }
        if self.autoclear.contains(Autoclear::RAW_DATA_FILE)
            && !self.incompatible.contains(Incompatible::DATA_FILE)
        {
            return Err(invalid(
                "data-file-raw requires a data file",
                "autoclear_features",
                format!("{:#x}", self.autoclear.bits()),
                "bit 1 only with incompatible feature bit 2",
            ));
        }
        Ok(())
    }

    /// Refuses tables that lie beyond the end of a file of `file_len` bytes by a cluster or more; who only reads needs no refcounts.
    /// QEMU opens such images, reads zeroes there, and fails later.
    pub fn check_inside(&self, file_len: u64, read_only: bool) -> Result<()> {
        // A file may end within the last sector of a table; its rest reads as zeroes.
        let end = file_len.next_multiple_of(512);
        let inside =
            |offset: HostOffset, len: u64| offset.0.checked_add(len).is_some_and(|at| at <= end);
        let allowed = |len: u64| format!("at most {:#x}", end.saturating_sub(len));
        let reftable = self.refcount_table_bytes();
        if !read_only
            && reftable > 0
            && !inside(self.refcount_table_offset, self.geometry().cluster_size())
        {
            return Err(invalid(
                "Reference count table is beyond the end of the file",
                "refcount_table_offset",
                self.refcount_table_offset,
                &allowed(reftable),
            ));
        }
        // Entries that were never written needn't be there: as a check counts them, the table may begin its last cluster where the
        // file ends.
        let l1_last = (self.l1_bytes().saturating_sub(1)) & !(self.geometry().cluster_size() - 1);
        if self.l1_size > 0 && !inside(self.l1_table_offset, l1_last) {
            return Err(invalid(
                "Active L1 table is beyond the end of the file",
                "l1_table_offset",
                self.l1_table_offset,
                &allowed(self.l1_bytes()),
            ));
        }
        Ok(())
    }
}
