//! Amending: changing what an image was made with (digest, sections 1 and 6).
//!
//! `options` reads what is wanted and refuses what can't be, before anything is changed. Then step by step, each of which
//! leaves a whole image behind: version 3 first, as other things need it; the data file; the width of refcounts
//! (`refcounts`); lazy refcounts; the size; version 2 last (`version`).

mod options;
mod refcounts;
mod version;

use std::sync::{Arc, atomic::Ordering};

use block_core::{
    driver::Truncate,
    error::{Error, ErrorKind, Result},
    image::Progress,
    options::Options,
    request::{Child, Request},
};

use self::options::Wanted;
use crate::{
    create::take_below_encrypt,
    header_update,
    image::Qcow2,
    layout::{Autoclear, Compatible, Header},
};

pub use self::options::OPTIONS;

impl Qcow2 {
    /// Makes the image what `options` say. `force` allows a change of key slots that may lose the last key.
    ///
    /// # Errors
    /// EINVAL or ENOTSUP, with nothing changed, for what isn't possible; whatever the storage reports. What was done by then
    /// stays, and the image is whole.
    pub async fn amend_image(
        self: &Arc<Self>,
        request: &Request,
        mut options: Options,
        force: bool,
        progress: &Progress,
    ) -> Result<()> {
        self.check_writable()?;
        let file = request.file()?;
        let slots = take_below_encrypt(&mut options)?;
        self.settle(request).await?;
        let wanted = {
            let meta = self.lock_meta(file).await?;
            let wanted = Wanted::read(options, &meta.header, &meta.snapshots)?;
            // Before anything is changed: a header that is too full for what the steps are going to write there.
            let mut header = meta.header.clone();
            if header.version <= wanted.version {
                wanted.write_to(&mut header);
                if header != meta.header {
                    header_update::prepare(file, &header).await?;
                }
            }
            wanted
        };
        if wanted.needs_no_compressed && self.has_compressed_clusters(file).await? {
            return Err(Error::unsupported(
                "Cannot downgrade an image with zstd compression type and existing compressed clusters",
            ));
        }
        progress.set_total(1);
        if !slots.0.is_empty() {
            self.amend_encryption(request, slots, force).await?;
        }
        let result = self.amend_steps(request, file, &wanted, progress).await;
        if result.is_ok() {
            progress.advance(1);
        }
        result
    }

    async fn amend_steps(
        self: &Arc<Self>,
        request: &Request,
        file: &Child,
        wanted: &Wanted,
        progress: &Progress,
    ) -> Result<()> {
        let (version, order, lazy) = {
            let meta = self.lock_meta(file).await?;
            let header = &meta.header;
            (
                header.version,
                header.refcount_order,
                header.lazy_refcounts(),
            )
        };
        if version < wanted.version {
            self.upgrade(request, progress).await?;
        }
        if wanted.data_file.is_some() {
            self.change_header(file, |header| wanted.write_data_file(header))
                .await?;
        }
        if wanted.clear_data_file_raw {
            self.change_header(file, |header| header.autoclear -= Autoclear::RAW_DATA_FILE)
                .await?;
        }
        if order != wanted.refcount_order {
            self.change_refcount_width(request, wanted.refcount_order, progress)
                .await?;
        }
        if lazy != wanted.lazy_refcounts {
            self.change_lazy_refcounts(request, wanted.lazy_refcounts)
                .await?;
        }
        if let Some(size) = wanted.size {
            let longer = |backing: &Child| backing.length() > self.length();
            let how = Truncate {
                exact: true,
                zero: request.backing().is_some_and(longer),
                ..Truncate::default()
            };
            self.resize(request, size, how).await?;
        }
        if version > wanted.version {
            self.downgrade(request, progress).await?;
        }
        Ok(())
    }

    /// Writes a changed header, durably, so that a power cut leaves the old or the new one.
    async fn change_header(&self, file: &Child, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _turn = self.hold_batches().await;
        let mut meta = self.lock_meta(file).await?;
        self.writeback.failure.check()?;
        let mut header = meta.header.clone();
        change(&mut header);
        if header == meta.header {
            return Ok(());
        }
        // The options that the node was opened with have to fit the new one, too.
        let settings = self.settings.changed(&serde_json::Map::new(), &header)?;
        let rewrite = header_update::prepare(file, &header).await?;
        // Until it is flushed it is unknown which one is there.
        self.writeback.failure.note(rewrite.write(file).await)?;
        self.writeback.failure.flush(file).await?;
        meta.header = header;
        self.raw_data
            .store(meta.header.has_raw_data_file(), Ordering::Release);
        self.settings.apply(settings);
        Ok(())
    }

    async fn change_lazy_refcounts(self: &Arc<Self>, request: &Request, on: bool) -> Result<()> {
        let file = request.file()?;
        if !on {
            self.settle(request).await?;
        }
        self.change_header(file, |header| {
            header.compatible.set(Compatible::LAZY_REFCOUNTS, on);
        })
        .await?;
        if !self.settings.lazy_refcounts() {
            self.clear_dirty(request).await?;
        }
        Ok(())
    }

    /// From here on the open image can only be closed: what is in memory isn't what is on disk any more.
    fn retire(&self) {
        self.retired.store(true, Ordering::Release);
        self.shut.store(true, Ordering::Release);
    }
}

/// Refuses to go on when it was asked to stop.
fn check_cancelled(progress: &Progress) -> Result<()> {
    if progress.is_cancelled() {
        return Err(Error::from_kind(ErrorKind::Cancelled));
    }
    Ok(())
}
