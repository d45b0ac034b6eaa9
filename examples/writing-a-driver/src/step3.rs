//! Step 3: a cluster gets its place in the file when it is first written. The map says where that is.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use block_core::{
    BlockDriver, Capabilities, DriverKind, Error, ErrorKind, IoBuf, IoBufMut, Request,
    RequestFlags, Result, image::ImageInfo, limits::Limits, node::Edges, status::DriverStatus,
};
use format_ledger::{
    claims::{Claim, Claims},
    layout::{Entry, GuestCluster, Header, HostCluster, Piece, pieces},
    table::Table,
};
use futures::channel::oneshot;
use parking_lot::Mutex;

use crate::tables::OverTables;

/// What changes while the image is open. The lock is held for a look or a change, and never over an await.
struct State {
    map: Table,
    /// The next cluster of the file that was never used, and the first that the file can't have.
    next: u64,
    end: u64,
}

/// An open image.
pub struct Driver {
    size: u64,
    cluster_size: u64,
    read_only: bool,
    state: Mutex<State>,
    claims: Claims,
}

/// What a write to one cluster has to do.
enum Plan {
    InPlace(HostCluster),
    Allocate(Claim, HostCluster),
    Wait(oneshot::Receiver<()>),
}

impl OverTables for Driver {
    const NAME: &'static str = "step3";

    fn new(header: &Header, map: Table, _ledger: Table, read_only: bool) -> Self {
        let last = map.entries().iter().copied().max().unwrap_or(0);
        Self {
            size: header.size,
            cluster_size: header.cluster_size,
            read_only,
            state: Mutex::new(State {
                map,
                next: (last + 1).max(header.first_data().0),
                end: header.ledger_entries,
            }),
            claims: Claims::default(),
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
        if let Entry::Data(host) = Entry::decode(state.map.get(guest.0)) {
            return Ok(Plan::InPlace(host));
        }
        // Two writes may be here for the same cluster: one allocates, the other waits and looks again.
        let claim = match self.claims.claim(guest) {
            Ok(claim) => claim,
            Err(released) => return Ok(Plan::Wait(released)),
        };
        if state.next >= state.end {
            return Err(Error::from_kind(ErrorKind::NoSpace));
        }
        let host = HostCluster(state.next);
        state.next += 1;
        Ok(Plan::Allocate(claim, host))
    }

    async fn write_piece(&self, request: &Request, piece: Piece, data: IoBuf) -> Result<()> {
        let file = request.file()?;
        let none = RequestFlags::empty();
        loop {
            match self.plan(piece.cluster)? {
                Plan::InPlace(host) => {
                    return file.write(self.place(host, &piece), data, none).await;
                }
                Plan::Wait(released) => {
                    let _ = released.await;
                }
                Plan::Allocate(claim, host) => {
                    let mut content = IoBuf::zeroes(piece.within as usize);
                    content.append(data);
                    let rest = self.cluster_size as usize - content.len();
                    content.append(IoBuf::zeroes(rest));
                    file.write(host.0 * self.cluster_size, content, none)
                        .await?;
                    // Only now, when the data is there, does the map say so.
                    let entry = Entry::Data(host).encode();
                    self.state.lock().map.set(piece.cluster.0, entry);
                    drop(claim);
                    return Ok(());
                }
            }
        }
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
        if self.read_only {
            return Capabilities::ZERO_INIT;
        }
        Capabilities::ZERO_INIT | Capabilities::WRITE
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
            serialising_granularity: self.cluster_size,
            ..Limits::default()
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        for piece in pieces(self.cluster_size, offset, buf.len() as u64) {
            let mut part = buf.split_to(piece.len as usize);
            match self.entry(piece.cluster) {
                Entry::Data(host) => request.file()?.read(self.place(host, &piece), part).await?,
                Entry::Zero | Entry::Unallocated => part.fill(0),
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

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        let file = request.file()?;
        let blocks = self.state.lock().map.take_dirty();
        for block in &blocks {
            let bytes = block.bytes.clone();
            if let Err(error) = file.write(block.offset, bytes, RequestFlags::empty()).await {
                self.state.lock().map.give_back(&blocks);
                return Err(error);
            }
        }
        file.flush().await
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

    fn as_any(&self) -> &dyn Any {
        self
    }
}
