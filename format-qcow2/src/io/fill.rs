//! What an allocating write puts into its clusters: its data, and what surrounds that in the first and the last cluster, from
//! the old view, as far as the new mapping will show it.
//!
//! In ordinary images that is the rest of both clusters. Where entries are extended, it is the rest of the first and the last
//! subcluster, and what a cluster that moves has in its other subclusters. Nothing here touches metadata.

use std::sync::Arc;

use block_core::{
    buffer::{Buffer, IoBuf},
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    request::Request,
};
use futures::FutureExt;

use super::{
    map::Run,
    read::WINDOW,
    subclusters::ALL,
    window::Window,
    write::{Place, Target},
};
use crate::{
    counters::Counters,
    image::Qcow2,
    layout::{ClusterIndex, HostOffset, L2Entry},
};

/// From how many bytes of zeroes around a write on the storage is asked to zero them.
const LARGE_FILL: u64 = 128 << 10;

impl Qcow2 {
    /// The subclusters of the `n`th cluster of a place that have to be written, or are in the way between those.
    fn written(&self, place: &Place, n: usize) -> Result<u32> {
        let cluster = ClusterIndex(place.first.0 + n as u64);
        let touched = self.touched(cluster, place.offset, place.end());
        let old = self.decode(place.old[n], cluster)?.subclusters();
        Ok(match (&place.target, old) {
            (Target::Reserved(_), _) => touched,
            // The cluster moves, with all that it holds.
            (Target::New(_), Some(old)) => touched | old.allocated,
            (Target::New(_), None) => ALL,
        })
    }

    /// Whether a byte may be overwritten without regard to the rest of its subcluster.
    fn is_in_place(&self, place: &Place, n: usize, at: u64) -> Result<bool> {
        let cluster = ClusterIndex(place.first.0 + n as u64);
        let old = self.decode(place.old[n], cluster)?.subclusters();
        let touched = self.touched(cluster, at, at + 1);
        Ok(matches!(place.target, Target::Reserved(_))
            && old.is_some_and(|old| old.allocated & touched == touched))
    }

    /// The guest range that is written for a place: that of the write, enlarged as far as need be.
    fn fill_range(&self, place: &Place) -> Result<(u64, u64)> {
        let last = place.old.len() - 1;
        let start = if self.is_in_place(place, 0, place.offset)? {
            place.offset
        } else {
            let begin = self.geometry.cluster_start(place.first).0;
            begin + self.span(self.written(place, 0)?).0
        };
        let end = if self.is_in_place(place, last, place.end() - 1)? {
            place.end()
        } else {
            let cluster = ClusterIndex(place.first.0 + last as u64);
            let begin = self.geometry.cluster_start(cluster).0;
            begin + self.span(self.written(place, last)?).1
        };
        // Behind the end of the disk a data file has nothing: when the disk grows, the file is extended with zeroes. Encrypted
        // ones have to be written.
        let end = if self.geometry.has_data_file() && self.encryption.is_none() {
            end.min(self.length().max(place.end()))
        } else {
            end
        };
        Ok((start, end))
    }

    /// Writes the data, with what surrounds it in the first and the last cluster, to its place.
    pub(super) async fn fill(
        self: &Arc<Self>,
        request: &Request,
        place: &Place,
        data: IoBuf,
    ) -> Result<()> {
        // The child that the clusters are in.
        let file = self.data(request)?;
        let size = self.geometry.cluster_size();
        let base = self.geometry.cluster_start(place.first).0;
        let (start, stop) = self.fill_range(place)?;
        let (head_len, tail_len) = (place.offset - start, stop - place.end());
        let last = place.old.len() - 1;
        if head_len + tail_len > 0 {
            file.debug_event(DebugEvent::CowRead).await;
        }
        let mut all = IoBuf::new();
        let mut tail = IoBuf::new();
        let tail_within = stop - tail_len - base - last as u64 * size;
        if last == 0 && head_len > 0 && tail_len > 0 && self.is_compressed(place, 0) {
            // Decompress once for both ends.
            let whole = self.old_view(request, place, 0, 0, size).await?;
            all = whole.slice(..head_len as usize);
            tail = whole.slice((size - tail_len) as usize..);
        } else {
            if head_len > 0 && mutant::is_active("qcow2-cow-head-zeroed") {
                all = IoBuf::zeroes(head_len as usize);
            } else if head_len > 0 {
                all = self
                    .old_view(request, place, 0, start - base, head_len)
                    .await?;
            }
            if tail_len > 0 {
                let last = if mutant::is_active("qcow2-cow-tail-of-first-cluster") {
                    0
                } else {
                    last
                };
                tail = self
                    .old_view(request, place, last, tail_within, tail_len)
                    .await?;
            }
        }
        let copied =
            u64::from(head_len > 0) + u64::from(tail_len > 0 && (last > 0 || head_len == 0));
        Counters::add(&self.counters.copies_on_write, copied);
        // In large clusters the storage zeroes faster than zeroes can be written.
        let surrounded_by_zeroes = head_len + tail_len >= LARGE_FILL
            && self.encryption.is_none()
            && all.is_zero()
            && tail.is_zero();
        let data_range = head_len as usize..(head_len + place.len) as usize;
        all.append(data);
        all.append(tail);
        if copied > 0 {
            // In one go with the data.
            file.debug_event(DebugEvent::CowWrite).await;
        }
        file.debug_event(DebugEvent::WriteAio).await;
        match &place.target {
            Target::Reserved(first) => {
                let host = self.geometry.host_start(*first).0 + (start - base);
                self.write_sealed(request, start, HostOffset(host), all)
                    .await
            }
            Target::New(allocation) if surrounded_by_zeroes && allocation.runs().len() == 1 => {
                let host = self.geometry.host_start(allocation.first()).0 + (start - base);
                let zeroes = RequestFlags::MAY_UNMAP | RequestFlags::NO_FALLBACK;
                match file.write_zeroes(host, stop - start, zeroes).await {
                    Ok(()) => {
                        file.write(
                            host + head_len,
                            all.slice(data_range),
                            RequestFlags::empty(),
                        )
                        .await
                    }
                    Err(error) if error.kind() == ErrorKind::NotSupported => {
                        file.write(host, all, RequestFlags::empty()).await
                    }
                    Err(error) => Err(error),
                }
            }
            Target::New(allocation) => {
                let mut window = Window::new(WINDOW);
                let mut guest = base;
                for (first, count) in allocation.runs() {
                    window.room().await;
                    if window.has_failed() {
                        break;
                    }
                    let (from, to) = (guest.max(start), (guest + count * size).min(stop));
                    let piece = all.split_to((to - from) as usize);
                    let host = HostOffset(self.geometry.host_start(*first).0 + (from - guest));
                    guest += count * size;
                    let write = self.write_sealed(request, from, host, piece);
                    if all.is_empty() && window.is_idle() {
                        return write.await;
                    }
                    window.push(write.boxed());
                }
                window.finish().await
            }
        }
    }

    fn is_compressed(&self, place: &Place, n: usize) -> bool {
        matches!(
            L2Entry::decode(place.old[n], self.geometry),
            Ok(L2Entry::Compressed(_))
        )
    }

    /// What a part of a guest cluster held when the plan was made, as far as it is going to be shown.
    async fn old_view(
        &self,
        request: &Request,
        place: &Place,
        n: usize,
        within: u64,
        len: u64,
    ) -> Result<IoBuf> {
        let cluster = ClusterIndex(place.first.0 + n as u64);
        let entry = self.decode(place.old[n], cluster)?;
        let mut view = IoBuf::new();
        let mut at = within;
        let end = within + len;
        while at < end {
            let run = self.run_of(entry, cluster, at, end - at);
            view.append(self.old_run(request, place, run, cluster, at).await?);
            at += run.len();
        }
        Ok(view)
    }

    async fn old_run(
        &self,
        request: &Request,
        place: &Place,
        run: Run,
        cluster: ClusterIndex,
        within: u64,
    ) -> Result<IoBuf> {
        let len = run.len() as usize;
        let guest = self.geometry.cluster_start(cluster).0 + within;
        match run {
            Run::Zero { .. } => Ok(IoBuf::zeroes(len)),
            Run::Unallocated { .. } => {
                let shown = self.touched(cluster, place.offset, place.end())
                    & self.touched(cluster, guest, guest + run.len());
                if shown == 0
                    || request.backing().is_none()
                    || mutant::is_active("qcow2-cow-ignores-backing-file")
                {
                    return Ok(IoBuf::zeroes(len));
                }
                let (lent, buf) = Buffer::try_new(len)?.lend();
                request.read_backing(guest, buf).await?;
                Ok(lent.reclaim().map_err(|_| kept())?.into())
            }
            Run::Data { host, .. } => {
                let (lent, buf) = Buffer::try_new(len)?.lend();
                self.read_opened(request, guest, host, buf).await?;
                Ok(lent.reclaim().map_err(|_| kept())?.into())
            }
            Run::Compressed { run, .. } => {
                let whole = IoBuf::from(self.read_compressed(request, run).await?);
                Ok(whole.slice(within as usize..within as usize + len))
            }
        }
    }
}

fn kept() -> Error {
    Error::io("a driver kept a part of a read buffer")
}
