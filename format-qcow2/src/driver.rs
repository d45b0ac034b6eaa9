//! The driver as the core sees it: each method checks, hands over to where the work is done, and judges errors.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use block_core::{
    bitmap::NamedBitmap,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, DriverKind, MapIntent, Mapping, Reopen, Truncate},
    error::{Error, ErrorKind, Operation, Result},
    flags::RequestFlags,
    image::{CheckMode, CheckReport, ImageInfo, Progress},
    limits::Limits,
    node::Edges,
    options::Options,
    request::Request,
    snapshot::{NewSnapshot, SnapshotInfo, SnapshotKey},
    status::DriverStatus,
};
use std::sync::atomic::Ordering;

use crate::{
    bitmaps, check, header_update,
    image::Qcow2,
    info,
    layout::{Header, Incompatible},
    meta::Meta,
    overlap::Kinds,
    snapshots,
};

impl Qcow2 {
    async fn judged<T>(&self, request: &Request, result: Result<T>) -> Result<T> {
        match result {
            Ok(done) => Ok(done),
            Err(error) => Err(self.judge(request, error).await),
        }
    }

    /// Says on disk that refcounts are right again, unless nobody has repaired what the bit announces.
    pub(crate) async fn clear_dirty(&self, request: &Request) -> Result<()> {
        if self.stale.load(Ordering::Acquire) {
            return Ok(());
        }
        let file = request.file()?;
        let mut meta = self.lock_meta(file).await?;
        if meta.header.is_dirty() {
            let bits = meta.header.incompatible - Incompatible::DIRTY;
            let written = header_update::write_incompatible(file, &mut meta.header, bits).await;
            // What failed may have taken effect: nothing may rely on the bit's being there.
            meta.header.incompatible = bits;
            written?;
            self.writeback.failure.flush(file).await?;
        }
        Ok(())
    }

    async fn run_check(
        self: &Arc<Self>,
        request: &Request,
        mode: CheckMode,
        progress: &Progress,
    ) -> Result<CheckReport> {
        if mode != CheckMode::ReadOnly && self.is_read_only() {
            self.check_writable()?;
        }
        let shut = self.shut.load(Ordering::Acquire);
        if !self.is_read_only() && !shut {
            self.settle(request).await?;
        }
        let file = request.file()?;
        let _turn = self.hold_batches().await;
        let mut meta = self.meta.lock().await;
        let mut header = header_update::read_header(file).await?;
        let report = if self.settings.check_compressed() {
            check::run_thoroughly(file, &mut header, mode, progress).await
        } else {
            check::run(file, &mut header, mode, progress).await
        };
        if mode != CheckMode::ReadOnly {
            let reloaded = self.reload(&mut meta, request).await;
            if reloaded.is_err() {
                // What is in memory is of the image before: written back, it would undo the repair by halves.
                self.uncertain.store(true, Ordering::SeqCst);
            }
            self.writeback.failure.note(reloaded)?;
            let whole = |report: &CheckReport| report.corruptions + report.check_errors == 0;
            if report.as_ref().is_ok_and(whole) {
                self.stale.store(false, Ordering::Release);
                if !meta.header.is_corrupt() {
                    self.shut.store(false, Ordering::Release);
                }
            }
        }
        report
    }

    async fn switch_access(self: &Arc<Self>, request: &Request, read_only: bool) -> Result<()> {
        let file = request.file()?;
        if read_only {
            if !self.is_read_only() && !self.shut.load(Ordering::Acquire) {
                self.settle(request).await?;
                let mut stored = self.store_for_good(request).await;
                if stored.is_ok() {
                    stored = self.clear_dirty(request).await;
                }
                if let Err(error) = stored {
                    // Nobody may trust the bitmaps of an image that goes on being written to.
                    if self.take_back_bitmaps(request).await.is_err() {
                        self.shut.store(true, Ordering::Release);
                    }
                    return Err(error);
                }
            }
            self.read_only.store(true, Ordering::Release);
            bitmaps::mark_read_only(request, true);
            return Ok(());
        }
        if !self.is_read_only() {
            return Ok(());
        }
        if self.view.is_some() {
            return Err(Error::new(
                ErrorKind::NotPermitted,
                "An internal snapshot can't be written to",
            ));
        }
        let _turn = self.hold_batches().await;
        let mut meta = self.meta.lock().await;
        let mut header = header_update::read_header(file).await?;
        header.check_open(false, false)?;
        header.check_inside(file.length(), false)?;
        prepare_for_writing(file, &mut header).await?;
        self.reload(&mut meta, request).await?;
        self.take_over_bitmaps(file, &mut meta).await?;
        self.read_only.store(false, Ordering::Release);
        bitmaps::mark_read_only(request, false);
        Ok(())
    }

    /// Makes other options hold, while no request is under way.
    async fn change_settings(
        self: &Arc<Self>,
        request: &Request,
        changes: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<()> {
        let writable = !self.is_read_only() && !self.shut.load(Ordering::Acquire);
        if writable {
            self.settle(request).await?;
        }
        let mut clear = false;
        {
            let _turn = self.hold_batches().await;
            let mut meta = self.meta.lock().await;
            let change = self.settings.changed(changes, &meta.header)?;
            let other_slices = change.slice_bits() != self.settings.slice_bits();
            let (kinds, interval) = (change.overlap_check(), self.settings.clean_interval());
            if kinds.contains(Kinds::INACTIVE_L2)
                && !self.metadata.wanted().contains(Kinds::INACTIVE_L2)
                && !self.is_read_only()
            {
                // They weren't looked at yet.
                let others =
                    snapshots::others(request.file()?, &meta.header, &meta.snapshots, kinds)
                        .await?;
                let l1 = self.l1.load_full();
                self.metadata
                    .rebuild(&meta.header, &l1, &meta.refcounts, &others);
            }
            if other_slices {
                // Slices of another size: none of the old ones may be left.
                self.slices.change_tables(|table| {
                    table.clear();
                    self.settings.apply(change);
                });
                meta.dirty_slices.clear();
            } else {
                self.settings.apply(change);
            }
            if kinds != self.metadata.wanted() {
                self.metadata.want(kinds);
            }
            if interval != self.settings.clean_interval() {
                self.start_cleaning(request.env());
            }
            if writable && !self.settings.lazy_refcounts() {
                clear = meta.header.is_dirty();
            }
        }
        if clear {
            self.clear_dirty(request).await?;
        }
        Ok(())
    }

    /// After a failed flush: what is on disk counts.
    async fn recover(&self, request: &Request) -> Result<()> {
        if self.writeback.failure.check().is_ok() {
            return Ok(());
        }
        let _turn = self.hold_batches().await;
        let mut meta: futures::lock::MutexGuard<'_, Meta> = self.meta.lock().await;
        let file = request.file()?;
        let mut header = header_update::read_header(file).await?;
        if !self.is_read_only() && header.is_dirty() {
            // Refcounts that were left behind are lost with what was in memory.
            prepare_for_writing(file, &mut header).await?;
        }
        self.reload(&mut meta, request).await
    }
}

/// What has to happen before an image is written to: unknown autoclear bits go, and an image that wasn't closed properly is
/// repaired. Nothing is written to one in which more is wrong than refcounts.
pub(crate) async fn prepare_for_writing(
    file: &block_core::request::Child,
    header: &mut Header,
) -> Result<()> {
    const HOPELESS: &str = "Could not repair dirty image";
    // An image that is refused stays as it is: whoever rescues it needs all that is there. And where entries make no sense, a bit of
    // the header may be what is wrong: a repair would make rubble of a disk that can still be read.
    if header.is_dirty() {
        let stale = check::is_merely_stale(file, header, &Progress::new()).await;
        if !stale.map_err(|error| error.context(HOPELESS))? {
            return Err(Error::io(HOPELESS));
        }
    }
    if header_update::drop_unknown_autoclear(file, header).await? {
        file.flush().await?;
    }
    if header.is_dirty() {
        let report = check::repair_stale(file, header, &Progress::new()).await;
        match report {
            Ok(report) if report.corruptions == 0 && report.check_errors == 0 => {
                *header = header_update::read_header(file).await?;
            }
            Ok(_) => return Err(Error::io(HOPELESS)),
            Err(error) => return Err(error.context(HOPELESS)),
        }
    }
    Ok(())
}

#[async_trait]
impl BlockDriver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        let mut can = Capabilities::CHECK | Capabilities::TRY_MAP;
        if self.view.is_none() && (self.geometry.has_zero_flag() || self.bitmaps.is_pending()) {
            can |= Capabilities::PERSISTENT_BITMAPS;
        }
        if !self.is_read_only() {
            can |= Capabilities::WRITE
                | Capabilities::WRITE_ZEROES
                | Capabilities::DISCARD
                | Capabilities::REPAIR
                | Capabilities::TRUNCATE
                | Capabilities::AMEND
                | Capabilities::CHANGE_BACKING
                | Capabilities::MAKE_EMPTY;
        }
        if !self.is_read_only() && !self.geometry.has_data_file() {
            // What is in a data file has its own place there, and none for less than a cluster.
            can |= Capabilities::SNAPSHOTS | Capabilities::COMPRESSED;
        }
        let backing = self.names_backing.load(Ordering::Acquire);
        let is_raw = self.geometry.has_data_file() && self.raw_data.load(Ordering::Acquire);
        if backing || !is_raw {
            can |= Capabilities::BACKING;
        }
        if self.geometry.has_zero_flag() || !backing {
            can |= Capabilities::DISCARD_ZEROES;
        }
        if !backing {
            can |= Capabilities::ZERO_INIT;
        }
        can
    }

    fn length(&self, _edges: &Edges) -> u64 {
        Self::length(self)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let size = self.geometry.cluster_size();
        let file = edges
            .primary()
            .map_or_else(Limits::default, block_core::request::Child::limits);
        Limits {
            request_alignment: if self.encryption.is_some() { 512 } else { 1 },
            zeroes_alignment: self.geometry.subcluster_size(),
            discard_alignment: size,
            serialising_granularity: size,
            opt_transfer: size,
            memory_alignment: file.memory_alignment,
            ..Limits::default()
        }
    }

    fn decisive_options(&self) -> Options {
        match &self.view {
            Some(id) => Options::new().with("snapshot-id", id.as_str()),
            None => Options::new(),
        }
    }

    fn filename(&self) -> Option<String> {
        Some(self.filename.clone())
    }

    fn is_read_only(&self) -> bool {
        Self::is_read_only(self)
    }

    fn try_map(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        self.map_cached(edges, offset, len, intent)
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        self.check_usable()?;
        let result = self.read_guest(&request, offset, buf).await;
        self.judged(&request, result).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let result = if flags.contains(RequestFlags::WRITE_COMPRESSED) {
            self.write_compressed(&request, offset, buf).await
        } else {
            self.write_guest(&request, offset, buf).await
        };
        self.judged(&request, result).await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let result = self.zero_guest(&request, offset, len, flags).await;
        self.judged(&request, result).await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        let result = self.discard_guest(&request, offset, len).await;
        self.judged(&request, result).await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        // What an amend that ended the image's use had to do was durable by then.
        if self.is_read_only() || self.retired.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_usable()?;
        let result = self.write_back_for_guest(&request).await;
        self.judged(&request, result).await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        let result = self.resize(&request, length, how).await;
        self.judged(&request, result).await
    }

    async fn block_status(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        self.check_usable()?;
        let result = self.status_guest(&request, offset, len).await;
        self.judged(&request, result).await
    }

    async fn check(
        self: Arc<Self>,
        request: Request,
        mode: CheckMode,
        progress: Progress,
    ) -> Result<CheckReport> {
        let report = self.run_check(&request, mode, &progress).await;
        report.map_err(|error| error.with_file(self.filename.clone()))
    }

    async fn change_backing(
        self: Arc<Self>,
        request: Request,
        file: Option<String>,
        format: Option<String>,
    ) -> Result<()> {
        self.check_writable()?;
        self.write_back(&request).await?;
        let child = request.file()?;
        let mut meta = self.lock_meta(child).await?;
        header_update::change_backing(child, &mut meta.header, file.as_deref(), format.as_deref())
            .await?;
        self.writeback.failure.flush(child).await?;
        self.names_backing
            .store(meta.header.backing_file.is_some(), Ordering::Release);
        Ok(())
    }

    async fn amend(
        self: Arc<Self>,
        request: Request,
        options: Options,
        force: bool,
        progress: Progress,
    ) -> Result<()> {
        let result = self.amend_image(&request, options, force, &progress).await;
        self.judged(&request, result).await
    }

    async fn make_empty(self: Arc<Self>, request: Request) -> Result<()> {
        let result = self.empty(&request).await;
        self.judged(&request, result).await
    }

    async fn snapshot_list(self: Arc<Self>, request: Request) -> Result<Vec<SnapshotInfo>> {
        self.list_snapshots(&request).await
    }

    async fn snapshot_create(
        self: Arc<Self>,
        request: Request,
        new: NewSnapshot,
        progress: Progress,
    ) -> Result<SnapshotInfo> {
        let created = self.create_snapshot(&request, &new, &progress).await;
        self.judged(&request, created).await
    }

    async fn snapshot_apply(
        self: Arc<Self>,
        request: Request,
        which: SnapshotKey,
        progress: Progress,
    ) -> Result<()> {
        let applied = self.apply_snapshot(&request, &which, &progress).await;
        self.judged(&request, applied).await
    }

    async fn snapshot_delete(
        self: Arc<Self>,
        request: Request,
        which: SnapshotKey,
        progress: Progress,
    ) -> Result<()> {
        let deleted = self.delete_snapshot(&request, &which, &progress).await;
        self.judged(&request, deleted).await
    }

    async fn read_vm_state(
        self: Arc<Self>,
        request: Request,
        position: u64,
        buf: IoBufMut,
    ) -> Result<()> {
        self.check_usable()?;
        let read = self.load_vm_state(&request, position, buf).await;
        self.judged(&request, read).await
    }

    async fn write_vm_state(
        self: Arc<Self>,
        request: Request,
        position: u64,
        buf: IoBuf,
    ) -> Result<()> {
        let written = self.save_vm_state(&request, position, buf).await;
        self.judged(&request, written).await
    }

    async fn info(self: Arc<Self>, request: Request) -> Result<ImageInfo> {
        let meta = self.lock_meta(request.file()?).await?;
        let size = meta.header.disk_size();
        let mut info = ImageInfo {
            snapshots: meta
                .snapshots
                .iter()
                .map(|entry| entry.info(size))
                .collect(),
            ..info::image_info(&meta.header)
        };
        if let Some(encryption) = &self.encryption {
            info.compressed_plaintext = encryption.allows_compressed_plaintext();
            if let Some((_, data)) = &mut info.format_specific {
                info::add_encryption(data, encryption.info().await);
            }
        }
        self.bitmaps.add_to(&mut info);
        Ok(info)
    }

    async fn reopen(self: Arc<Self>, request: Request, changes: Reopen) -> Result<()> {
        // An option that is wrong changes nothing at all.
        if !changes.options.is_empty() {
            let meta = self.meta.lock().await;
            self.settings.changed(&changes.options, &meta.header)?;
        }
        self.recover(&request).await?;
        if let Some(read_only) = changes.read_only {
            self.switch_access(&request, read_only).await?;
        }
        if changes.options.is_empty() {
            return Ok(());
        }
        self.change_settings(&request, &changes.options).await
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        if self.is_read_only() || self.shut.load(Ordering::Acquire) {
            return Ok(());
        }
        let settled = self.settle(&request).await;
        self.judged(&request, settled).await?;
        // Bitmaps that can't be stored stay marked as in use; the image is closed cleanly all the same.
        let stored = self.store_for_good(&request).await;
        let stored = self.judged(&request, stored).await;
        self.clear_dirty(&request).await?;
        stored
    }

    async fn load_bitmaps(self: Arc<Self>, request: Request) -> Result<Vec<NamedBitmap>> {
        let loaded = self.open_bitmaps(&request).await;
        loaded.map_err(|error| {
            error
                .with_operation(Operation::Open, 0, 0)
                .with_file(self.filename.clone())
        })
    }

    async fn check_new_bitmap(
        self: Arc<Self>,
        request: Request,
        name: String,
        granularity: u64,
    ) -> Result<()> {
        Self::check_new_bitmap(&self, &request, &name, granularity)
    }

    async fn store_bitmaps(self: Arc<Self>, request: Request) -> Result<()> {
        let result = async {
            self.write_back(&request).await?;
            self.write_bitmaps(&request, true).await?;
            self.write_back(&request).await
        };
        let result = result.await;
        self.judged(&request, result).await
    }

    async fn remove_bitmap(self: Arc<Self>, request: Request, name: String) -> Result<()> {
        let result = self.drop_stored_bitmap(&request, &name).await;
        self.judged(&request, result).await
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    fn watch_space(&self, watch: Arc<dyn block_core::space::SpaceWatch>) -> bool {
        self.tap.set(watch)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
