//! Compressed writes: whole clusters, each compressed on the environment's workers and packed right behind the one before.
//!
//! Clusters are compressed side by side, but placed in the order in which they were handed in, request by request: whoever
//! writes from front to back gets an image that reads from front to back.

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    debug::DebugEvent,
    env::offload,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    request::Request,
};
use futures::{FutureExt, channel::oneshot};
use parking_lot::Mutex;

use super::window::Window;
use crate::{
    counters::Counters,
    image::Qcow2,
    layout::{ClusterIndex, HostCluster, L2Entry, RawEntry},
};

/// Clusters of one request that are compressed at once.
const WINDOW: usize = 8;

/// The queue of those who are going to place a compressed cluster. Nobody holds a pin, claim or lock while in it.
#[derive(Debug, Default)]
pub(crate) struct PackingOrder(Mutex<Option<oneshot::Receiver<()>>>);

/// A place in the queue. It is left, however it ends, when the turn is dropped.
struct Turn {
    /// Resolves when the one before has left.
    before: Option<oneshot::Receiver<()>>,
    /// Dropped when this one leaves.
    left: oneshot::Sender<()>,
}

impl Turn {
    /// Waits for it.
    async fn come(&mut self) {
        if let Some(before) = &mut self.before {
            // Nothing is ever sent.
            let _ = before.await;
            self.before = None;
        }
    }
}

impl PackingOrder {
    /// The end of the queue.
    fn enter(&self) -> Turn {
        let mut last = self.0.lock();
        let (left, next) = oneshot::channel();
        let before = last.replace(next);
        Turn { before, left }
    }
}

impl Qcow2 {
    /// Writes whole clusters compressed; the last one may be cut by the end of the disk.
    ///
    /// # Errors
    /// EINVAL for a range that isn't made of whole clusters, EIO when a cluster is allocated already.
    pub async fn write_compressed(
        self: &Arc<Self>,
        request: &Request,
        offset: u64,
        buf: IoBuf,
    ) -> Result<()> {
        self.check_writable()?;
        self.check_compressible()?;
        if self.geometry.has_data_file() {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        let size = self.geometry.cluster_size();
        let end = offset + buf.len() as u64;
        if offset % size != 0 || (end % size != 0 && end != self.length()) {
            return Err(
                Error::invalid("Compressed writes take whole clusters").with_field(
                    "offset",
                    offset,
                    format!("a multiple of {size}"),
                ),
            );
        }
        // One place for all of it: those who come later follow its last cluster.
        let Turn { mut before, left } = self.packing_order.enter();
        let mut end = Some(left);
        let mut window = Window::new(WINDOW);
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            window.room().await;
            if window.has_failed() {
                break;
            }
            let len = rest.len().min(size as usize);
            let piece = rest.split_to(len);
            let (left, next) = match end.take_if(|_| rest.is_empty()) {
                Some(left) => (left, None),
                None => {
                    let (left, next) = oneshot::channel();
                    (left, Some(next))
                }
            };
            let turn = Turn {
                before: before.take(),
                left,
            };
            before = next;
            window.push(
                self.write_compressed_cluster(request, at, piece, turn)
                    .boxed(),
            );
            at += len as u64;
        }
        window.finish().await
    }

    async fn write_compressed_cluster(
        self: &Arc<Self>,
        request: &Request,
        offset: u64,
        data: IoBuf,
        mut turn: Turn,
    ) -> Result<()> {
        let file = request.file()?;
        let size = self.geometry.cluster_size() as usize;
        let mut bytes = data.to_vec();
        bytes.resize(size, 0);
        let cluster = self.cluster_of(offset);
        let codec = self.codec;
        let packed = offload(request.env(), move || codec.compress(&bytes)).await?;
        turn.come().await;
        let turn = Mutex::new(Some(turn));
        let Some(packed) = packed else {
            let slice = self.slice(file, self.slice_of(cluster)).await?;
            if let Some(slice) = slice {
                self.check_unallocated(slice.load(self.slice_entry(cluster)), cluster)?;
            }
            // In its turn, too: a whole cluster between two packed ones ends the run of bytes, so it shouldn't come twice.
            let placed = || drop(turn.lock().take());
            return self.write_allocating(request, offset, data, &placed).await;
        };
        let packed = IoBuf::from(packed);
        self.reclaiming(request, || {
            self.write_packed(request, cluster, packed.clone(), &turn)
        })
        .await
    }

    /// Stores a cluster's compressed bytes and links them. Leaves the queue as soon as they have a place.
    async fn write_packed(
        self: &Arc<Self>,
        request: &Request,
        cluster: ClusterIndex,
        packed: IoBuf,
        turn: &Mutex<Option<Turn>>,
    ) -> Result<()> {
        let file = request.file()?;
        self.make_room(request).await?;
        let (_claim, waited) = self.claims.claim(cluster, cluster).await;
        Counters::add(&self.counters.claim_waits, u64::from(waited));
        let (run, allocation) = {
            let mut meta = self.lock_meta(file).await?;
            self.check_writable()?;
            self.mark_in_use(&mut meta, file).await?;
            let slice = self
                .slice_for_update(&mut meta, file, self.slice_of(cluster))
                .await?;
            self.check_unallocated(slice.load(self.slice_entry(cluster)), cluster)?;
            let allocated = meta.allocate_bytes(file, packed.len() as u64).await;
            self.note_sizes(&meta);
            allocated?
        };
        drop(turn.lock().take());
        file.debug_event(DebugEvent::WriteCompressed).await;
        file.write(run.offset.0, packed, RequestFlags::empty())
            .await?;

        let mut meta = self.lock_meta(file).await?;
        self.check_writable()?;
        let index = self.slice_of(cluster);
        let slice = self.slice_for_update(&mut meta, file, index).await?;
        let at = self.slice_entry(cluster);
        if self.settings.safeguards {
            self.check_unallocated(slice.load(at), cluster)?;
            let (first, last) = run.clusters(self.geometry);
            for host in first..=last {
                let references = meta.refcounts.get(file, HostCluster(host)).await?;
                if references <= meta.quarantine.pending(host) {
                    Counters::add(&self.counters.ownership_violations, 1);
                    return Err(Error::corrupt(format!(
                        "Linking compressed data at offset {}, which isn't owned by the write",
                        run.offset
                    )));
                }
            }
        }
        file.debug_event(DebugEvent::L2UpdateCompressed).await;
        meta.set_entry(
            index,
            &slice,
            at,
            L2Entry::Compressed(run).encode(self.geometry),
        );
        meta.linked = true;
        Counters::add(&self.counters.allocated, 1);
        allocation.linked();
        Ok(())
    }

    fn check_unallocated(&self, raw: RawEntry, cluster: ClusterIndex) -> Result<()> {
        let entry = self.decode(raw, cluster)?;
        if entry.space().is_some() || matches!(entry, L2Entry::Compressed(_)) {
            return Err(Error::io(
                "Compressed writes need a cluster that isn't allocated yet",
            ));
        }
        Ok(())
    }
}
