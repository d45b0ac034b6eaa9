//! An open image: how pieces of requests find their clusters, get new ones and give them up.
//!
//! The lock on [`State`] is held for a look or a change in memory, never over an await. What keeps things right while it
//! isn't held: *claims* (one allocation of a guest cluster at a time), *pins* (a cluster that somebody's I/O is at isn't
//! given to somebody else), and the core's promise that no discard or zero write overlaps a request that the driver has.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block_core::{
    Buffer, Error, ErrorKind, IoBuf, Request, RequestFlags, Result, image::CheckReport, pins::Pins,
};
use futures::channel::oneshot;
use parking_lot::RwLock;

use crate::{
    check,
    claims::{Claim, Claims},
    driver::Ledger,
    layout::{Entry, GuestCluster, Header, HostCluster, Owner, Piece, pieces},
    space::{Freed, Space},
    table::Table,
};

/// The image in memory: both tables, whole.
pub(crate) struct State {
    pub header: Header,
    pub map: Table,
    pub space: Space,
}

impl State {
    pub(crate) fn entry(&self, guest: GuestCluster) -> Entry {
        Entry::decode(self.map.get(guest.0))
    }

    /// Whether the piece covers its cluster, or all of it that the disk has.
    fn covers_cluster(&self, piece: &Piece) -> bool {
        let start = piece.cluster.0 * self.header.cluster_size;
        piece.within == 0
            && (piece.len == self.header.cluster_size || start + piece.len == self.header.size)
    }
}

/// What a write to one cluster has to do.
enum Plan {
    /// The guest cluster has its place.
    InPlace(HostCluster),
    /// It gets this one, and had `old` before.
    Allocate(Claim, HostCluster, Entry),
    /// Somebody else is allocating it.
    Wait(oneshot::Receiver<()>),
    /// There is no free cluster now.
    Full,
}

impl Ledger {
    /// An image with these tables.
    pub(crate) fn new(header: Header, map: Table, ledger: Table, read_only: bool) -> Self {
        Self {
            cluster_size: header.cluster_size,
            state: RwLock::new(State {
                header,
                map,
                space: Space::new(ledger),
            }),
            claims: Claims::default(),
            pins: Pins::new(),
            turn: futures::lock::Mutex::default(),
            read_only: AtomicBool::new(read_only),
            copied: AtomicU64::new(0),
            caught: AtomicU64::new(0),
        }
    }

    /// What a check finds in the tables as they were read.
    pub(crate) fn examine(&self) -> CheckReport {
        check::examine(&mut self.state.write(), check::Repair::default())
    }

    pub(crate) fn entry(&self, guest: GuestCluster) -> Entry {
        self.state.read().entry(guest)
    }

    /// Where a piece begins in the file, if its cluster is `host`.
    pub(crate) fn place(&self, host: HostCluster, piece: &Piece) -> u64 {
        host.0 * self.cluster_size + piece.within
    }

    /// Decides how a cluster is to be written.
    fn plan(&self, guest: GuestCluster) -> Result<Plan> {
        // Overwriting is the common case, and takes only a shared lock.
        {
            let state = self.state.read();
            state.header.check_writable()?;
            if let Entry::Data(host) = state.entry(guest) {
                return Ok(Plan::InPlace(host));
            }
        }
        // The map is read again and the claim taken under one lock: whoever held the claim before has linked its
        // cluster, and is found in the map, or has failed, and then it is our turn.
        let mut state = self.state.write();
        let old = state.entry(guest);
        if let Entry::Data(host) = old {
            return Ok(Plan::InPlace(host));
        }
        let claim = match self.claims.claim(guest) {
            Ok(claim) => claim,
            Err(released) => return Ok(Plan::Wait(released)),
        };
        Ok(match state.space.allocate(guest) {
            Some(host) => Plan::Allocate(claim, host, old),
            None => Plan::Full,
        })
    }

    /// Writes a piece of a request.
    pub(crate) async fn write_piece(
        &self,
        request: &Request,
        piece: Piece,
        data: IoBuf,
    ) -> Result<()> {
        let file = request.file()?;
        loop {
            // The pin comes before the look at the map: whoever frees the cluster that we find waits for the pin.
            let pin = self.pins.pin();
            match self.plan(piece.cluster)? {
                Plan::InPlace(host) => {
                    let place = self.place(host, &piece);
                    let written = file.write(place, data, RequestFlags::empty()).await;
                    drop(pin);
                    return written;
                }
                Plan::Allocate(claim, host, old) => {
                    // Nobody can free what isn't linked, so this needs no pin.
                    drop(pin);
                    let filled = self.write_new(request, &piece, host, old, data).await;
                    let linked = match filled {
                        // Only now, when the data is there, does the map say so.
                        Ok(()) => self.link(piece.cluster, host),
                        Err(error) => {
                            self.state.write().space.free(host);
                            Err(error)
                        }
                    };
                    drop(claim);
                    if matches!(&linked, Err(error) if error.kind() == ErrorKind::Corrupt) {
                        self.write_header(request).await?;
                    }
                    return linked;
                }
                Plan::Wait(released) => {
                    drop(pin);
                    // Released or cancelled, it is over.
                    let _ = released.await;
                }
                Plan::Full => {
                    drop(pin);
                    self.make_room(request).await?;
                }
            }
        }
    }

    /// Writes a whole new cluster: what the guest sees there now, with `data` over it.
    async fn write_new(
        &self,
        request: &Request,
        piece: &Piece,
        host: HostCluster,
        old: Entry,
        data: IoBuf,
    ) -> Result<()> {
        let content = if piece.len == self.cluster_size {
            data
        } else {
            let around = IoBuf::from(self.read_old(request, piece.cluster, old).await?);
            let end = (piece.within + piece.len) as usize;
            let mut content = around.slice(..piece.within as usize);
            content.append(data);
            content.append(around.slice(end..));
            self.copied.fetch_add(1, Ordering::Relaxed);
            content
        };
        let place = host.0 * self.cluster_size;
        let file = request.file()?;
        file.write(place, content, RequestFlags::empty()).await
    }

    /// What the guest sees in a cluster that has no place yet. Beyond the end of the disk that is zeroes, also when the
    /// backing file is longer: they are going to be seen when the disk grows.
    async fn read_old(&self, request: &Request, guest: GuestCluster, old: Entry) -> Result<Buffer> {
        let start = guest.0 * self.cluster_size;
        let inside = (self.state.read().header.size - start).min(self.cluster_size);
        let (lent, mut buf) = Buffer::try_new(self.cluster_size as usize)?.lend();
        buf.split_off(inside as usize).fill(0);
        if old == Entry::Unallocated {
            request.read_backing(start, buf).await?;
        } else {
            buf.fill(0);
            drop(buf);
        }
        let kept = |_| Error::io("the backing file kept a part of a read buffer");
        lent.reclaim().map_err(kept)
    }

    /// Makes the map refer to a cluster that has been written. That it is still ours is checked when it matters, and not
    /// some day by a check.
    fn link(&self, guest: GuestCluster, host: HostCluster) -> Result<()> {
        let mut state = self.state.write();
        let owner = state.space.owner(host);
        let old = state.entry(guest);
        if owner == Owner::Guest(guest) && !matches!(old, Entry::Data(_)) {
            state.map.set(guest.0, Entry::Data(host).encode());
            return Ok(());
        }
        state.header.corrupt = true;
        self.caught.fetch_add(1, Ordering::Relaxed);
        let text =
            "a cluster changed hands while it was being written; the image is marked corrupt";
        Err(Error::corrupt(text).with_field(
            format!("ledger[{}]", host.0),
            format!("{owner:?}, for a guest cluster with {old:?}"),
            format!("{:?}", Owner::Guest(guest)),
        ))
    }

    /// Whether the range is made of whole clusters.
    pub(crate) fn is_whole(&self, offset: u64, len: u64) -> bool {
        let state = self.state.read();
        pieces(self.cluster_size, offset, len).all(|piece| state.covers_cluster(&piece))
    }

    /// Makes the whole clusters in a range read as zeroes, and gives up their places. What is covered in part stays.
    pub(crate) fn zero_clusters(&self, offset: u64, len: u64) -> Result<()> {
        let mut state = self.state.write();
        state.header.check_writable()?;
        for piece in pieces(self.cluster_size, offset, len) {
            if !state.covers_cluster(&piece) {
                continue;
            }
            let old = state.entry(piece.cluster);
            // Not "unallocated": the backing file would show.
            state.map.set(piece.cluster.0, Entry::Zero.encode());
            if let Entry::Data(host) = old {
                // Unlinked first, retired after it: a request that pins from now on doesn't find the cluster.
                let grace = self.pins.retire();
                state.space.unlinked.push(Freed { host, grace });
            }
        }
        Ok(())
    }
}
