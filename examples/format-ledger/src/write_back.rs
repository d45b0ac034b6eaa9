//! How changes get to the disk. One batch, in an order such that a power cut between any two writes leaves leaked clusters at
//! worst:
//!
//! 1. new owners in the ledger (the data itself has been written before) — **barrier**
//! 2. links and unlinks in the map — **barrier**
//! 3. what was unlinked may be freed.
//!
//! Without the first barrier the map could refer to a cluster whose data or whose owner never arrived; without the second,
//! a cluster could be given to somebody else while the map on disk still leads to it. A barrier costs a flush of the
//! storage, so they are paid per batch: when the guest flushes, and when space runs out.

use block_core::{Error, ErrorKind, Request, RequestFlags, Result};

use crate::{driver::Ledger, layout::Header, space::Freed};

impl Header {
    /// Nothing is written to an image that is known to be corrupt.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.corrupt {
            let text = "The image is marked corrupt: repair it with 'check -r all'";
            return Err(Error::corrupt(text).with_field("flags", "corrupt", "none"));
        }
        Ok(())
    }
}

impl Ledger {
    /// Makes everything durable that was there when this was called.
    pub(crate) async fn write_back(&self, request: &Request) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.batch(request).await
    }

    /// Like [`Self::write_back`], until the file has everything: the last frees of a batch are written by the next one.
    pub(crate) async fn write_back_all(&self, request: &Request) -> Result<()> {
        let _turn = self.turn.lock().await;
        loop {
            self.batch(request).await?;
            if !self.state.read().space.ledger.is_dirty() {
                return Ok(());
            }
        }
    }

    /// One batch. The caller has the turn: there is one at a time.
    async fn batch(&self, request: &Request) -> Result<()> {
        let file = request.file()?;
        // Both tables are copied under one lock, so that no link is in the copy whose owner isn't.
        let (ledger, map, unlinked) = {
            let mut state = self.state.write();
            let ledger = state.space.ledger.take_dirty();
            let map = state.map.take_dirty();
            (ledger, map, std::mem::take(&mut state.space.unlinked))
        };
        let none = RequestFlags::empty();
        let written = async {
            for block in &ledger {
                file.write(block.offset, block.bytes.clone(), none).await?;
            }
            // Barrier: data and owners are durable before anything refers to them.
            file.flush().await?;
            for block in &map {
                file.write(block.offset, block.bytes.clone(), none).await?;
            }
            // Barrier: what was unlinked is unlinked on disk before anybody else may have it.
            file.flush().await
        };
        let written: Result<()> = written.await;
        {
            let mut state = self.state.write();
            if let Err(error) = written {
                // Nothing is lost from memory, and nothing is freed. The core fails every later flush.
                state.space.ledger.give_back(&ledger);
                state.map.give_back(&map);
                state.space.unlinked.extend(unlinked);
                return Err(error);
            }
            state.space.parked.extend(unlinked);
        }
        self.free_parked(request).await
    }

    /// Frees those parked clusters that nobody's I/O is at any more. The others stay for the next time.
    async fn free_parked(&self, request: &Request) -> Result<()> {
        let ready: Vec<Freed> = {
            let mut state = self.state.write();
            let parked = state.space.parked.iter_mut();
            let over: Vec<bool> = parked
                .map(|freed| self.pins.observe(&mut freed.grace))
                .collect();
            let mut over = over.into_iter();
            let parked = std::mem::take(&mut state.space.parked);
            let (ready, stay) = parked.into_iter().partition(|_| over.next() == Some(true));
            state.space.parked = stay;
            ready
        };
        for freed in ready {
            self.punch_and_free(request, freed).await?;
        }
        Ok(())
    }

    /// Gives a cluster's space back to the storage, and then, when that has ended, lets it be allocated.
    async fn punch_and_free(&self, request: &Request, freed: Freed) -> Result<()> {
        let place = freed.host.0 * self.cluster_size;
        // Advice to the storage: it doesn't matter whether it takes it, only that it isn't at it any more.
        let _ = request.file()?.discard(place, self.cluster_size).await;
        self.state.write().space.free(freed.host);
        Ok(())
    }

    /// Called when there is no free cluster: turns those into free ones that are on their way to be, or fails with ENOSPC.
    /// The caller holds no pin, or this might wait for its own.
    pub(crate) async fn make_room(&self, request: &Request) -> Result<()> {
        let _turn = self.turn.lock().await;
        let (free, on_their_way) = {
            let space = &self.state.read().space;
            let on_their_way = space.unlinked.len() + space.parked.len();
            (space.free_clusters(), on_their_way)
        };
        if free > 0 {
            return Ok(());
        }
        if on_their_way == 0 {
            return Err(Error::new(ErrorKind::NoSpace, "The image's ledger is full"));
        }
        self.batch(request).await?;
        let waiting = {
            let space = &mut self.state.write().space;
            if space.free_clusters() > 0 {
                Vec::new()
            } else {
                std::mem::take(&mut space.parked)
            }
        };
        for freed in waiting {
            self.pins.wait(freed.grace).await;
            let grace = self.pins.retire();
            let host = freed.host;
            self.punch_and_free(request, Freed { host, grace }).await?;
        }
        Ok(())
    }

    /// Writes the header, durably.
    pub(crate) async fn write_header(&self, request: &Request) -> Result<()> {
        let _turn = self.turn.lock().await;
        let bytes = self.state.read().header.to_bytes()?;
        let file = request.file()?;
        file.write(0, bytes, RequestFlags::empty()).await?;
        file.flush().await
    }
}
