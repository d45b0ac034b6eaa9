//! Step 5: zero clusters, discard, and clusters that are used again. The ledger says which are free.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use block_core::{
    BlockDriver, Buffer, Capabilities, DriverKind, Error, ErrorKind, IoBuf, IoBufMut, Request,
    RequestFlags, Result, image::ImageInfo, limits::Limits, node::Edges, pins::Pins,
    status::DriverStatus,
};
use format_ledger::{
    claims::{Claim, Claims},
    layout::{Entry, GuestCluster, Header, HostCluster, Piece, pieces},
    space::{Freed, Space},
    table::Table,
};
use futures::channel::oneshot;
use parking_lot::Mutex;

use crate::tables::OverTables;

/// What changes while the image is open. The lock is held for a look or a change, and never over an await.
struct State {
    map: Table,
    space: Space,
}

/// An open image.
pub struct Driver {
    size: u64,
    cluster_size: u64,
    read_only: bool,
    state: Mutex<State>,
    claims: Claims,
    pins: Pins,
}

/// What a write to one cluster has to do.
enum Plan {
    InPlace(HostCluster),
    Allocate(Claim, HostCluster, Entry),
    Wait(oneshot::Receiver<()>),
}

impl OverTables for Driver {
    const NAME: &'static str = "step5";

    fn new(header: &Header, map: Table, ledger: Table, read_only: bool) -> Self {
        Self {
            size: header.size,
            cluster_size: header.cluster_size,
            read_only,
            state: Mutex::new(State {
                map,
                space: Space::new(ledger),
            }),
            claims: Claims::default(),
            pins: Pins::new(),
        }
    }
}

impl Driver {
    fn entry(&self, guest: GuestCluster) -> Entry {
        Entry::decode(self.state.lock().map.get(guest.0))
    }

    fn place(&self, host: HostCluster, piece: &Piece) -> u64 {
        host.0 * self.cluster_size + piece.within
    }

    fn plan(&self, guest: GuestCluster) -> Result<Plan> {
        let mut state = self.state.lock();
        let old = Entry::decode(state.map.get(guest.0));
        if let Entry::Data(host) = old {
            return Ok(Plan::InPlace(host));
        }
        // Two writes may be here for the same cluster: one allocates, the other waits and looks again.
        let claim = match self.claims.claim(guest) {
            Ok(claim) => claim,
            Err(released) => return Ok(Plan::Wait(released)),
        };
        match state.space.allocate(guest) {
            Some(host) => Ok(Plan::Allocate(claim, host, old)),
            None => Err(Error::from_kind(ErrorKind::NoSpace)),
        }
    }

    async fn write_piece(&self, request: &Request, piece: Piece, data: IoBuf) -> Result<()> {
        let file = request.file()?;
        let none = RequestFlags::empty();
        loop {
            // Before the look at the map: whoever frees what we find waits until the pin is dropped.
            let pin = self.pins.pin();
            match self.plan(piece.cluster)? {
                Plan::InPlace(host) => {
                    let written = file.write(self.place(host, &piece), data, none).await;
                    drop(pin);
                    return written;
                }
                Plan::Wait(released) => {
                    drop(pin);
                    let _ = released.await;
                }
                Plan::Allocate(claim, host, old) => {
                    drop(pin);
                    let place = host.0 * self.cluster_size;
                    let written = match self.whole_cluster(request, &piece, old, data).await {
                        Ok(content) => file.write(place, content, none).await,
                        Err(error) => Err(error),
                    };
                    let mut state = self.state.lock();
                    match written {
                        // Only now, when the data is there, does the map say so.
                        Ok(()) => state.map.set(piece.cluster.0, Entry::Data(host).encode()),
                        // It was never linked, so nobody can be at it.
                        Err(_) => state.space.free(host),
                    }
                    drop(state);
                    drop(claim);
                    return written;
                }
            }
        }
    }

    /// Whether the piece covers its cluster, or all of it that the disk has.
    fn covers_cluster(&self, piece: &Piece) -> bool {
        let start = piece.cluster.0 * self.cluster_size;
        piece.within == 0 && (piece.len == self.cluster_size || start + piece.len == self.size)
    }

    /// Makes the whole clusters in a range zero, and gives up their places.
    fn zero_clusters(&self, offset: u64, len: u64) {
        let mut state = self.state.lock();
        for piece in pieces(self.cluster_size, offset, len) {
            if !self.covers_cluster(&piece) {
                continue;
            }
            let old = Entry::decode(state.map.get(piece.cluster.0));
            // Not "unallocated": the backing file would show.
            state.map.set(piece.cluster.0, Entry::Zero.encode());
            if let Entry::Data(host) = old {
                // Unlinked first, retired after it: a request that pins from now on doesn't find the cluster.
                let grace = self.pins.retire();
                state.space.unlinked.push(Freed { host, grace });
            }
        }
    }

    /// Frees those clusters that nobody's I/O is at any more, when they have been punched. Others stay for next time.
    async fn free(&self, request: &Request, parked: Vec<Freed>) -> Result<()> {
        for mut freed in parked {
            if self.pins.observe(&mut freed.grace) {
                let place = freed.host.0 * self.cluster_size;
                // Advice: it doesn't matter whether the storage takes it, only that it isn't at it any more.
                let _ = request.file()?.discard(place, self.cluster_size).await;
                self.state.lock().space.free(freed.host);
            } else {
                self.state.lock().space.parked.push(freed);
            }
        }
        Ok(())
    }

    /// The content of a new cluster: what the guest sees there now, with `data` over it.
    async fn whole_cluster(
        &self,
        request: &Request,
        piece: &Piece,
        old: Entry,
        data: IoBuf,
    ) -> Result<IoBuf> {
        if piece.len == self.cluster_size {
            return Ok(data);
        }
        let start = piece.cluster.0 * self.cluster_size;
        let (lent, mut buf) = Buffer::try_new(self.cluster_size as usize)?.lend();
        // The disk may end within the cluster, and the backing file go on.
        let inside = (self.size - start).min(self.cluster_size);
        buf.split_off(inside as usize).fill(0);
        if old == Entry::Unallocated {
            request.read_backing(start, buf).await?;
        } else {
            buf.fill(0);
            drop(buf);
        }
        let kept = |_| Error::io("the backing file kept a part of a read buffer");
        let around = IoBuf::from(lent.reclaim().map_err(kept)?);
        let mut content = around.slice(..piece.within as usize);
        content.append(data);
        content.append(around.slice((piece.within + piece.len) as usize..));
        Ok(content)
    }
}

#[async_trait]
impl BlockDriver for Driver {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        let always = Capabilities::ZERO_INIT | Capabilities::BACKING;
        if self.read_only {
            return always;
        }
        always
            | Capabilities::WRITE
            | Capabilities::WRITE_ZEROES
            | Capabilities::DISCARD
            | Capabilities::DISCARD_ZEROES
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.size
    }

    fn limits(&self, edges: &Edges) -> Limits {
        let below = edges
            .primary()
            .map_or(1, |file| file.limits().request_alignment);
        Limits {
            request_alignment: below,
            zeroes_alignment: self.cluster_size,
            discard_alignment: self.cluster_size,
            serialising_granularity: self.cluster_size,
            ..Limits::default()
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        for piece in pieces(self.cluster_size, offset, buf.len() as u64) {
            let mut part = buf.split_to(piece.len as usize);
            let pin = self.pins.pin();
            match self.entry(piece.cluster) {
                Entry::Data(host) => request.file()?.read(self.place(host, &piece), part).await?,
                Entry::Zero => part.fill(0),
                Entry::Unallocated => {
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
        _: RequestFlags,
    ) -> Result<()> {
        for piece in pieces(self.cluster_size, offset, buf.len() as u64) {
            let data = buf.split_to(piece.len as usize);
            self.write_piece(&request, piece, data).await?;
        }
        Ok(())
    }

    async fn write_zeroes(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
        _: RequestFlags,
    ) -> Result<()> {
        if !pieces(self.cluster_size, offset, len).all(|piece| self.covers_cluster(&piece)) {
            // Nothing has been changed, so the core may write the zeroes as data.
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        self.zero_clusters(offset, len);
        Ok(())
    }

    async fn discard(self: Arc<Self>, _: Request, offset: u64, len: u64) -> Result<()> {
        self.zero_clusters(offset, len);
        Ok(())
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        let file = request.file()?;
        let (map, ledger, freed) = {
            let state = &mut *self.state.lock();
            let mut freed = std::mem::take(&mut state.space.unlinked);
            freed.append(&mut state.space.parked);
            (
                state.map.take_dirty(),
                state.space.ledger.take_dirty(),
                freed,
            )
        };
        // In whatever order: step 6 is about that.
        for block in map.iter().chain(&ledger) {
            let bytes = block.bytes.clone();
            if let Err(error) = file.write(block.offset, bytes, RequestFlags::empty()).await {
                let state = &mut *self.state.lock();
                state.map.give_back(&map);
                state.space.ledger.give_back(&ledger);
                state.space.unlinked.extend(freed);
                return Err(error);
            }
        }
        file.flush().await?;
        self.free(&request, freed).await
    }

    async fn block_status(
        self: Arc<Self>,
        _: Request,
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

    async fn info(self: Arc<Self>, _: Request) -> Result<ImageInfo> {
        Ok(ImageInfo {
            cluster_size: Some(self.cluster_size),
            ..ImageInfo::default()
        })
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flush(request).await
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("frees-deferred-by-pins", self.pins.deferred())]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
