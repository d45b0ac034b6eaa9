//! Changing the version: to 3 is a new header; to 2 means to get rid of what it doesn't have first: zero clusters, in the disk and
//! in snapshots, and bitmaps, which nobody could trust there.

use std::sync::Arc;

use block_core::{error::Result, image::Progress, request::Request};

use super::check_cancelled;
use crate::{
    image::Qcow2,
    layout::{Autoclear, Compatible, Incompatible},
};

impl Qcow2 {
    /// Makes an image of version 2 one of version 3. It is used as before: what version 2 can is valid in version 3, but for snapshots whose
    /// entries are too short, as old programs wrote them.
    pub(super) async fn upgrade(
        self: &Arc<Self>,
        request: &Request,
        progress: &Progress,
    ) -> Result<()> {
        let has_snapshots = {
            let meta = self.lock_meta(request.file()?).await?;
            meta.header.nb_snapshots > 0
        };
        if has_snapshots {
            self.complete_snapshots(request, progress).await?;
        }
        self.change_header(request.file()?, |header| header.version = 3)
            .await
    }

    /// Makes an image of version 3, which has nothing that version 2 hasn't but zero clusters, bitmaps and lazy refcounts, one of
    /// version 2. The bitmaps are lost, their space is free. The open image can only be closed afterwards.
    pub(super) async fn downgrade(
        self: &Arc<Self>,
        request: &Request,
        progress: &Progress,
    ) -> Result<()> {
        self.expand_zero_clusters(request, progress).await?;
        check_cancelled(progress)?;
        self.drop_all_bitmaps(request).await?;
        self.settle(request).await?;
        self.clear_dirty(request).await?;
        self.change_header(request.file()?, |header| {
            header.version = 2;
            header.incompatible = Incompatible::empty();
            header.compatible = Compatible::empty();
            header.autoclear = Autoclear::empty();
            header.compression_type = 0;
            header.unknown_tail.clear();
        })
        .await?;
        self.retire();
        Ok(())
    }
}
