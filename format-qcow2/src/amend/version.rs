//! Changing the version: to 3 is a new header; to 2 means to get rid of zero clusters first, which it doesn't have.

use std::sync::{Arc, atomic::Ordering};

use block_core::{
    buffer::IoBuf,
    error::Result,
    image::Progress,
    request::{Child, Request},
};

use super::check_cancelled;
use crate::{
    image::Qcow2,
    io::{map::Run, zero::Change},
    layout::{Autoclear, ClusterIndex, Compatible, Incompatible},
};

/// Zeroes written at once.
const STEP: u64 = 4 << 20;

impl Qcow2 {
    /// Makes an image of version 2 one of version 3. It is used as before: what version 2 can is valid in version 3.
    pub(super) async fn upgrade(&self, file: &Child) -> Result<()> {
        self.change_header(file, |header| header.version = 3).await
    }

    /// Makes an image of version 3, which has nothing that version 2 hasn't but zero clusters and lazy refcounts, one of
    /// version 2. The open image can only be closed afterwards.
    pub(super) async fn downgrade(
        self: &Arc<Self>,
        request: &Request,
        progress: &Progress,
    ) -> Result<()> {
        self.expand_zero_clusters(request, progress).await?;
        self.settle(request).await?;
        self.clear_dirty(request).await?;
        self.change_header(request.file()?, |header| {
            header.version = 2;
            header.incompatible = Incompatible::empty();
            header.compatible = Compatible::empty();
            header.autoclear = Autoclear::empty();
            header.unknown_tail.clear();
        })
        .await?;
        self.retire();
        Ok(())
    }

    /// Where clusters read as zeroes by themselves, they become unallocated, or, if a backing file would show then, data.
    async fn expand_zero_clusters(
        self: &Arc<Self>,
        request: &Request,
        progress: &Progress,
    ) -> Result<()> {
        let file = request.file()?;
        let (size, end) = (self.geometry.cluster_size(), self.length());
        let backing = self.has_backing(request);
        progress.add_total(end);
        let mut at = 0;
        while at < end {
            check_cancelled(progress)?;
            let (run, pin) = self.locate(file, at, end - at).await?;
            drop(pin);
            let next = at + run.len();
            if let Run::Zero { .. } = run {
                if backing {
                    self.write_zeroes_as_data(request, at, next).await?;
                } else {
                    // Runs begin where clusters do, as nothing but their ends cuts them.
                    let first = ClusterIndex(at / size);
                    let last = ClusterIndex(next.div_ceil(size));
                    self.change_clusters(request, first, last, Change::Full)
                        .await?;
                }
            }
            progress.advance(next - at);
            at = next;
        }
        self.check_usable()?;
        debug_assert!(!self.is_read_only() && !self.retired.load(Ordering::Acquire));
        Ok(())
    }

    async fn write_zeroes_as_data(
        self: &Arc<Self>,
        request: &Request,
        mut at: u64,
        end: u64,
    ) -> Result<()> {
        while at < end {
            let len = (end - at).min(STEP);
            self.make_room(request).await?;
            self.write_guest(request, at, IoBuf::zeroes(len as usize))
                .await?;
            at += len;
        }
        Ok(())
    }
}
