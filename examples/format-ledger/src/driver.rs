//! The driver: the trait of the core in terms of the other files. Children are taken from each request and never kept, so
//! that the graph can change between any two requests.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use block_core::{
    BlockDriver, Capabilities, ChildRole, DriverKind, Error, ErrorKind, IoBuf, IoBufMut, Request,
    RequestFlags, Result,
    driver::{MapIntent, Mapping, Reopen, Truncate},
    image::{CheckMode, CheckReport, ImageInfo, Progress},
    limits::Limits,
    node::Edges,
    pins::Pins,
    status::DriverStatus,
};
use parking_lot::RwLock;

use crate::{
    NAME, check,
    claims::Claims,
    image::State,
    layout::{Entry, GuestCluster, MAX_CLUSTERS, pieces},
};

/// An open image.
pub struct Ledger {
    /// Bytes of a cluster. Never changes, so it needs no lock.
    pub(crate) cluster_size: u64,
    pub(crate) state: RwLock<State>,
    pub(crate) claims: Claims,
    pub(crate) pins: Pins,
    /// Whose turn it is to write metadata.
    pub(crate) turn: futures::lock::Mutex<()>,
    pub(crate) read_only: AtomicBool,
    /// Clusters that were written with something around the guest's data.
    pub(crate) copied: AtomicU64,
    /// Links that were refused because the cluster had changed hands.
    pub(crate) caught: AtomicU64,
}

impl Ledger {
    fn writable(&self) -> bool {
        !self.read_only.load(Ordering::Acquire)
    }
}

#[async_trait]
impl BlockDriver for Ledger {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    // What is declared here is tested, and relied on. What isn't is answered ENOTSUP by the trait's defaults.
    fn capabilities(&self) -> Capabilities {
        let always = Capabilities::BACKING
            | Capabilities::CHECK
            | Capabilities::ZERO_INIT
            | Capabilities::TRY_MAP;
        if !self.writable() {
            return always;
        }
        always
            | Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::DISCARD_ZEROES
            | Capabilities::TRUNCATE
            | Capabilities::REPAIR
            | Capabilities::CHANGE_BACKING
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.state.read().header.size
    }

    fn limits(&self, edges: &Edges) -> Limits {
        // What the file can take is what we can take: offsets within a cluster are passed on as they are.
        let below = edges
            .primary()
            .map_or(1, |file| file.limits().request_alignment);
        let cluster = self.cluster_size.max(below);
        Limits {
            request_alignment: below,
            zeroes_alignment: cluster,
            discard_alignment: cluster,
            // Whatever must not overlap must not share a cluster either.
            serialising_granularity: cluster,
            ..Limits::default()
        }
    }

    fn try_map(&self, edges: &Edges, offset: u64, len: u64, intent: MapIntent) -> Mapping {
        let Some(file) = edges.index(ChildRole::File) else {
            return Mapping::NotCached;
        };
        let Some(piece) = pieces(self.cluster_size, offset, len).next() else {
            return Mapping::NotCached;
        };
        // As in `read`: the pin first. The core holds it as long as its I/O takes.
        let pin = self.pins.pin();
        let state = self.state.read();
        if intent == MapIntent::Overwrite && state.header.corrupt {
            return Mapping::NotCached;
        }
        match (state.entry(piece.cluster), intent) {
            (Entry::Data(host), _) => Mapping::Data {
                edge: file,
                offset: self.place(host, &piece),
                len: piece.len,
                pin: Some(pin),
            },
            (Entry::Zero, MapIntent::Read) => Mapping::Zero { len: piece.len },
            (Entry::Unallocated, MapIntent::Read) => Mapping::Backing { len: piece.len },
            // A write that has to allocate.
            (_, MapIntent::Overwrite) => Mapping::NotCached,
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let file = request.file()?;
        for piece in pieces(self.cluster_size, offset, buf.len() as u64) {
            let mut part = buf.split_to(piece.len as usize);
            let pin = self.pins.pin();
            match self.entry(piece.cluster) {
                Entry::Data(host) => file.read(self.place(host, &piece), part).await?,
                Entry::Zero => part.fill(0),
                Entry::Unallocated => {
                    // Nothing of ours is read, and the backing file may take its time.
                    drop(pin);
                    let offset = piece.cluster.0 * self.cluster_size + piece.within;
                    request.read_backing(offset, part).await?;
                }
            }
        }
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        mut buf: IoBuf,
        _flags: RequestFlags,
    ) -> Result<()> {
        for piece in pieces(self.cluster_size, offset, buf.len() as u64) {
            let data = buf.split_to(piece.len as usize);
            self.write_piece(&request, piece, data).await?;
        }
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
        _flags: RequestFlags,
    ) -> Result<()> {
        if !self.is_whole(offset, len) {
            // Nothing has been changed, so the core may write the zeroes as data.
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        self.zero_clusters(offset, len)
    }

    async fn discard(self: Arc<Self>, _request: Request, offset: u64, len: u64) -> Result<()> {
        self.zero_clusters(offset, len)
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.write_back(&request).await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        let (old, room) = {
            let header = &self.state.read().header;
            header.check_writable()?;
            (header.size, header.map_entries * self.cluster_size)
        };
        if length < old {
            let text = "Ledger images can't shrink";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        if length > room {
            let text = "The image's map has no room for that";
            let most = format!("at most {room}, of {MAX_CLUSTERS} clusters in any image");
            return Err(Error::new(ErrorKind::TooBig, text).with_field("size", length, most));
        }
        if how.zero {
            // The rest of the last cluster, if there is a part of one that the backing file still shows …
            let within = old % self.cluster_size;
            let last = GuestCluster(old / self.cluster_size);
            if within != 0 && self.entry(last) == Entry::Unallocated {
                let rest = pieces(self.cluster_size, old, self.cluster_size - within).next();
                if let Some(rest) = rest {
                    let zeroes = IoBuf::zeroes(rest.len as usize);
                    self.write_piece(&request, rest, zeroes).await?;
                }
            }
            // … and all that come after it.
            let mut state = self.state.write();
            for guest in old.div_ceil(self.cluster_size)..length.div_ceil(self.cluster_size) {
                state.map.set(guest, Entry::Zero.encode());
            }
        }
        // What the new part reads as is durable before the new size is.
        self.write_back(&request).await?;
        self.state.write().header.size = length;
        self.write_header(&request).await
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        let Some(piece) = pieces(self.cluster_size, offset, len).next() else {
            return Ok(DriverStatus::unallocated(len));
        };
        Ok(match self.entry(piece.cluster) {
            Entry::Unallocated => DriverStatus::unallocated(piece.len),
            Entry::Zero => DriverStatus::zero(piece.len),
            Entry::Data(host) => DriverStatus::data_at(piece.len, self.place(host, &piece)),
        })
    }

    async fn check(
        self: Arc<Self>,
        request: Request,
        mode: CheckMode,
        _progress: Progress,
    ) -> Result<CheckReport> {
        let repair = check::Repair {
            leaks: mode != CheckMode::ReadOnly,
            corruptions: mode == CheckMode::RepairAll,
        };
        if repair.leaks && !self.writable() {
            return Err(Error::new(ErrorKind::ReadOnly, "The image is read-only"));
        }
        let report = check::examine(&mut self.state.write(), repair);
        if repair.leaks {
            self.write_back_all(&request).await?;
            let was_corrupt = self.state.read().header.corrupt;
            if was_corrupt && repair.corruptions && report.corruptions == 0 {
                self.state.write().header.corrupt = false;
                self.write_header(&request).await?;
            }
        }
        Ok(report)
    }

    async fn change_backing(
        self: Arc<Self>,
        request: Request,
        file: Option<String>,
        format: Option<String>,
    ) -> Result<()> {
        {
            let header = &mut self.state.write().header;
            header.check_writable()?;
            let backing = file.map(|file| (file, format.unwrap_or_default()));
            let old = std::mem::replace(&mut header.backing, backing);
            if let Err(error) = header.to_bytes() {
                header.backing = old;
                return Err(error);
            }
        }
        self.write_header(&request).await
    }

    async fn info(self: Arc<Self>, _request: Request) -> Result<ImageInfo> {
        let state = self.state.read();
        let (backing_filename, backing_format) = state.header.backing.clone().unzip();
        let specific = serde_json::json!({
            "map-entries": state.header.map_entries,
            "ledger-entries": state.header.ledger_entries,
            "free-clusters": state.space.free_clusters(),
            "corrupt": state.header.corrupt,
        });
        Ok(ImageInfo {
            cluster_size: Some(self.cluster_size),
            backing_filename,
            backing_format: backing_format.filter(|format| !format.is_empty()),
            format_specific: Some((NAME.to_owned(), specific)),
            ..ImageInfo::default()
        })
    }

    async fn reopen(self: Arc<Self>, request: Request, changes: Reopen) -> Result<()> {
        if let Some(key) = changes.options.keys().next() {
            return Err(Error::invalid(format!("Cannot change the option '{key}'")));
        }
        if let Some(read_only) = changes.read_only {
            if read_only && self.writable() {
                self.write_back_all(&request).await?;
            } else if !read_only {
                self.state.read().header.check_writable()?;
            }
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        if self.writable() {
            self.write_back_all(&request).await?;
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("copies-on-write", self.copied.load(Ordering::Relaxed)),
            ("frees-deferred-by-pins", self.pins.deferred()),
            (
                "ownership-violations-caught",
                self.caught.load(Ordering::Relaxed),
            ),
        ]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
