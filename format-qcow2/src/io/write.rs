//! Writes: in place where a cluster may be overwritten, else to newly allocated clusters, filled from the old view where the
//! write doesn't cover them, and linked when the data is where it belongs.
//!
//! An allocating write claims its guest clusters, plans under the metadata lock, does all data I/O without it, takes it
//! again and links, after it has made sure that the clusters are still its own and the mapping is the one it planned with.

use std::sync::Arc;

use block_core::{
    buffer::{Buffer, IoBuf},
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    mutant,
    pins::Pin,
    request::Request,
};
use futures::FutureExt;
use smallvec::SmallVec;

use super::{
    map::Run,
    read::{WINDOW, read_host},
    window::Window,
};
use crate::{
    alloc::{allocator::Allocation, quarantine::Freed},
    cache::slice::Slice,
    counters::Counters,
    image::Qcow2,
    layout::{ClusterIndex, HostCluster, HostOffset, L2Entry, RawEntry},
    meta::Meta,
};

/// The most bytes that one allocation step takes.
const MAX_STEP: u64 = 8 << 20;
/// From how many bytes of zeroes around a write on the storage is asked to zero them.
const LARGE_FILL: u64 = 128 << 10;

/// Where a step of a write goes.
enum Plan {
    /// The first bytes may be overwritten where they are.
    InPlace {
        host: HostOffset,
        len: u64,
        pin: Pin,
    },
    /// Into clusters that have to be linked afterwards.
    Place(Place),
}

/// Clusters that are going to hold a run of guest clusters.
struct Place {
    first: ClusterIndex,
    /// The raw entries that the plan was made with, one for each guest cluster.
    old: SmallVec<[RawEntry; 4]>,
    /// Where the clusters go, one piece after the other.
    target: Target,
    /// Bytes of the write that it takes.
    len: u64,
    /// Keeps what `old` refers to.
    pin: Pin,
}

enum Target {
    /// New clusters.
    New(Allocation),
    /// The clusters that zero entries had reserved.
    Reserved(HostCluster),
}

impl Qcow2 {
    /// Writes `buf` at `offset`.
    pub async fn write_guest(
        self: &Arc<Self>,
        request: &Request,
        mut offset: u64,
        mut buf: IoBuf,
    ) -> Result<()> {
        self.check_writable()?;
        let file = request.file()?;
        let data = self.data(request)?;
        let mut window = Window::new(WINDOW);
        while !buf.is_empty() {
            window.room().await;
            if window.has_failed() {
                break;
            }
            let len = (buf.len() as u64)
                .min(self.left_in_slice(offset))
                .min(MAX_STEP);
            let located = async {
                self.make_room(request).await?;
                self.locate(file, offset, len).await
            };
            let (run, pin) = match window.alongside(located).await {
                Ok(located) => located,
                Err(error) => {
                    window.finish().await?;
                    return Err(error);
                }
            };
            let (step, in_place) = match run {
                Run::Data {
                    host,
                    len,
                    copied: true,
                } => (len, Some((host, pin))),
                // Let the plan find out how far it reaches.
                _ => {
                    drop(pin);
                    match window
                        .alongside(self.until_overwritable(file, offset, len))
                        .await
                    {
                        Ok(step) => (step, None),
                        Err(error) => {
                            window.finish().await?;
                            return Err(error);
                        }
                    }
                }
            };
            let piece = buf.split_to(step as usize);
            let whole = buf.is_empty() && window.is_idle();
            match in_place {
                Some((host, pin)) => {
                    let allowed = self.check_target(host, step);
                    let write = async move {
                        allowed?;
                        data.debug_event(DebugEvent::WriteAio).await;
                        let result = data.write(host.0, piece, RequestFlags::empty()).await;
                        drop(pin);
                        result
                    };
                    if whole {
                        return write.await;
                    }
                    window.push(write.boxed());
                }
                None => {
                    let write = self.write_allocating(request, offset, piece);
                    if whole {
                        return write.await;
                    }
                    window.push(write.boxed());
                }
            }
            offset += step;
        }
        window.finish().await
    }

    /// How many bytes at the start of a range within one slice can't be overwritten in place.
    async fn until_overwritable(
        self: &Arc<Self>,
        file: &block_core::request::Child,
        offset: u64,
        len: u64,
    ) -> Result<u64> {
        let index = self.slice_of(self.cluster_of(offset));
        let Some(slice) = self.slice(file, index).await? else {
            return Ok(len);
        };
        let mut done = 0;
        while done < len {
            let run = self.run_in(&slice, offset + done, len - done)?;
            if done > 0 && matches!(run, Run::Data { copied: true, .. }) {
                break;
            }
            done += run.len();
        }
        Ok(done)
    }

    /// Writes into clusters that have to be allocated, step by step.
    async fn write_allocating(
        self: &Arc<Self>,
        request: &Request,
        mut offset: u64,
        mut buf: IoBuf,
    ) -> Result<()> {
        let mut reclaimed = false;
        while !buf.is_empty() {
            match self.allocating_step(request, offset, &buf).await {
                Ok(done) => {
                    buf = buf.slice(done as usize..);
                    offset += done;
                }
                Err(error) if error.kind() == ErrorKind::NoSpace && !reclaimed => {
                    // Space that was freed may still be in quarantine.
                    reclaimed = true;
                    if self.reclaim(request).await.is_err() {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One step; gives back how many bytes it wrote, 0 when the mapping changed under it and it has to be made again.
    async fn allocating_step(
        self: &Arc<Self>,
        request: &Request,
        offset: u64,
        buf: &IoBuf,
    ) -> Result<u64> {
        let file = request.file()?;
        let len = (buf.len() as u64)
            .min(self.left_in_slice(offset))
            .min(MAX_STEP);
        self.make_room(request).await?;
        let (claim, waited) = self
            .claims
            .claim(self.cluster_of(offset), self.cluster_of(offset + len - 1))
            .await;
        let _claim = (!mutant::is_active("qcow2-claims-ignored")).then_some(claim);
        Counters::add(&self.counters.claim_waits, u64::from(waited));
        let plan = {
            let mut meta = self.lock_meta(file).await?;
            self.check_writable()?;
            let plan = self.plan(&mut meta, request, offset, len).await;
            self.note_sizes(&meta);
            plan?
        };
        match plan {
            Plan::InPlace { host, len, pin } => {
                let pin = (!mutant::is_active("qcow2-pin-dropped-before-write")).then_some(pin);
                let data = self.data(request)?;
                data.debug_event(DebugEvent::WriteAio).await;
                data.write(host.0, buf.slice(..len as usize), RequestFlags::empty())
                    .await?;
                drop(pin);
                Ok(len)
            }
            Plan::Place(place) => {
                let len = place.len;
                if mutant::is_active("qcow2-link-before-data") {
                    return self.link_first(request, place, offset, buf).await;
                }
                self.fill(request, &place, offset, buf.slice(..len as usize))
                    .await?;
                let linked = self.link(request, place).await?;
                Ok(if linked { len } else { 0 })
            }
        }
    }

    /// A seeded bug: what is linked isn't written yet.
    async fn link_first(
        self: &Arc<Self>,
        request: &Request,
        place: Place,
        offset: u64,
        buf: &IoBuf,
    ) -> Result<u64> {
        let (len, pin) = (place.len, self.pins.pin());
        let target = match &place.target {
            Target::New(allocation) => Target::New(allocation.copy_for_mutant()),
            Target::Reserved(first) => Target::Reserved(*first),
        };
        let again = Place {
            first: place.first,
            old: place.old.clone(),
            target,
            len,
            pin,
        };
        let linked = self.link(request, place).await?;
        let filled = self
            .fill(request, &again, offset, buf.slice(..len as usize))
            .await;
        if let Target::New(allocation) = again.target {
            allocation.linked();
        }
        filled?;
        Ok(if linked { len } else { 0 })
    }

    /// Decides where the start of a range goes. With the metadata lock held.
    async fn plan(
        self: &Arc<Self>,
        meta: &mut Meta,
        request: &Request,
        offset: u64,
        len: u64,
    ) -> Result<Plan> {
        let file = request.file()?;
        let size = self.geometry.cluster_size();
        let first = self.cluster_of(offset);
        self.mark_in_use(meta, file).await?;
        let slice = self
            .slice_for_update(meta, file, self.slice_of(first))
            .await?;
        let pin = self.pins.pin();
        if let Run::Data {
            host,
            len,
            copied: true,
        } = self.run_in(&slice, offset, len)?
        {
            self.check_target(host, len)?;
            return Ok(Plan::InPlace { host, len, pin });
        }
        let at = self.slice_entry(first);
        let wanted = (self.geometry.within(offset) + len).div_ceil(size) as usize;
        let mut old: SmallVec<[RawEntry; 4]> = SmallVec::new();
        let mut reserved = None;
        for n in 0..wanted.min(slice.len() - at) {
            let raw = slice.load(at + n);
            let entry = self.decode(raw, ClusterIndex(first.0 + n as u64))?;
            match (entry, reserved) {
                (L2Entry::ZeroAllocated { host, copied: true }, None) if n == 0 => {
                    reserved = Some(host);
                }
                (L2Entry::ZeroAllocated { host, copied: true }, Some(start))
                    if host.0 == start.0 + n as u64 * size => {}
                (
                    L2Entry::ZeroAllocated { copied: true, .. }
                    | L2Entry::Normal { copied: true, .. },
                    _,
                ) => {
                    break;
                }
                (_, Some(_)) => break,
                (_, None) => {}
            }
            old.push(raw);
        }
        let target = match reserved {
            Some(host) => {
                self.check_target(host, old.len() as u64 * size)?;
                Target::Reserved(self.geometry.host_cluster_of(host))
            }
            None => {
                let allocation = meta.allocate(file, old.len() as u64).await?;
                Counters::add(&self.counters.allocated, allocation.count());
                old.truncate(allocation.count() as usize);
                Target::New(allocation)
            }
        };
        let end = (old.len() as u64 * size - self.geometry.within(offset)).min(len);
        Ok(Plan::Place(Place {
            first,
            old,
            target,
            len: end,
            pin,
        }))
    }

    /// Refuses to write guest data to where metadata is. There is none in a data file.
    fn check_target(&self, host: HostOffset, len: u64) -> Result<()> {
        if self.geometry.has_data_file() {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits();
        let first = host.0 >> bits;
        let last = (host.0 + len - 1) >> bits;
        self.metadata.check(first, last - first + 1, self.geometry)
    }

    /// Writes the data, with what surrounds it in the first and the last cluster, to its place.
    async fn fill(
        self: &Arc<Self>,
        request: &Request,
        place: &Place,
        offset: u64,
        data: IoBuf,
    ) -> Result<()> {
        // The child that the clusters are in.
        let file = self.data(request)?;
        let size = self.geometry.cluster_size();
        let start = self.geometry.cluster_start(place.first).0;
        let stop = start + place.old.len() as u64 * size;
        let end = offset + place.len;
        let (head_len, tail_len) = (offset - start, stop - end);
        let last = place.old.len() - 1;
        if head_len + tail_len > 0 {
            file.debug_event(DebugEvent::CowRead).await;
        }
        let mut all = IoBuf::new();
        let mut tail = IoBuf::new();
        if last == 0 && head_len > 0 && tail_len > 0 && self.is_compressed(place.old[0]) {
            // Decompress once for both ends.
            let whole = self.old_view(request, place, 0, 0, size).await?;
            all = whole.slice(..head_len as usize);
            tail = whole.slice((size - tail_len) as usize..);
        } else {
            if head_len > 0 && mutant::is_active("qcow2-cow-head-zeroed") {
                all = IoBuf::zeroes(head_len as usize);
            } else if head_len > 0 {
                all = self.old_view(request, place, 0, 0, head_len).await?;
            }
            if tail_len > 0 {
                let last = if mutant::is_active("qcow2-cow-tail-of-first-cluster") {
                    0
                } else {
                    last
                };
                tail = self
                    .old_view(request, place, last, size - tail_len, tail_len)
                    .await?;
            }
        }
        let copied =
            u64::from(head_len > 0) + u64::from(tail_len > 0 && (last > 0 || head_len == 0));
        Counters::add(&self.counters.copies_on_write, copied);
        // In large clusters the storage zeroes faster than zeroes can be written.
        let surrounded_by_zeroes =
            head_len + tail_len >= LARGE_FILL && all.is_zero() && tail.is_zero();
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
                let host = self.geometry.host_start(*first);
                file.write(host.0, all, RequestFlags::empty()).await
            }
            Target::New(allocation) if surrounded_by_zeroes && allocation.runs().len() == 1 => {
                let host = self.geometry.host_start(allocation.first());
                let zeroes = RequestFlags::MAY_UNMAP | RequestFlags::NO_FALLBACK;
                match file.write_zeroes(host.0, stop - start, zeroes).await {
                    Ok(()) => {
                        file.write(
                            host.0 + head_len,
                            all.slice(data_range),
                            RequestFlags::empty(),
                        )
                        .await
                    }
                    Err(error) if error.kind() == ErrorKind::NotSupported => {
                        file.write(host.0, all, RequestFlags::empty()).await
                    }
                    Err(error) => Err(error),
                }
            }
            Target::New(allocation) => {
                let mut window = Window::new(WINDOW);
                for (first, count) in allocation.runs() {
                    window.room().await;
                    if window.has_failed() {
                        break;
                    }
                    let piece = all.split_to((count * size) as usize);
                    let host = self.geometry.host_start(*first);
                    if all.is_empty() && window.is_idle() {
                        return file.write(host.0, piece, RequestFlags::empty()).await;
                    }
                    window.push(file.write(host.0, piece, RequestFlags::empty()).boxed());
                }
                window.finish().await
            }
        }
    }

    fn is_compressed(&self, raw: RawEntry) -> bool {
        matches!(
            L2Entry::decode(raw, self.geometry),
            Ok(L2Entry::Compressed(_))
        )
    }

    /// What a part of a guest cluster held when the plan was made.
    async fn old_view(
        &self,
        request: &Request,
        place: &Place,
        n: usize,
        within: u64,
        len: u64,
    ) -> Result<IoBuf> {
        let cluster = ClusterIndex(place.first.0 + n as u64);
        let zeroes = || IoBuf::zeroes(len as usize);
        match self.decode(place.old[n], cluster)? {
            L2Entry::ZeroPlain | L2Entry::ZeroAllocated { .. } => Ok(zeroes()),
            L2Entry::Unallocated => {
                if request.backing().is_none()
                    || mutant::is_active("qcow2-cow-ignores-backing-file")
                {
                    return Ok(zeroes());
                }
                let guest = self.geometry.cluster_start(cluster).0 + within;
                let (lent, buf) = Buffer::try_new(len as usize)?.lend();
                request.read_backing(guest, buf).await?;
                Ok(lent.reclaim().map_err(|_| kept())?.into())
            }
            L2Entry::Normal { host, .. } => {
                let (lent, buf) = Buffer::try_new(len as usize)?.lend();
                read_host(self.data(request)?, HostOffset(host.0 + within), buf).await?;
                Ok(lent.reclaim().map_err(|_| kept())?.into())
            }
            L2Entry::Compressed(run) => {
                let whole = IoBuf::from(self.read_compressed(request, run).await?);
                Ok(whole.slice(within as usize..(within + len) as usize))
            }
        }
    }

    /// Links the clusters, if they are still this write's own and the mapping is still the one that it was planned with;
    /// says whether it did. What the old entries referred to goes to the quarantine.
    async fn link(self: &Arc<Self>, request: &Request, place: Place) -> Result<bool> {
        let file = request.file()?;
        let size = self.geometry.cluster_size();
        let mut meta = self.lock_meta(file).await?;
        self.check_writable()?;
        let index = self.slice_of(place.first);
        let slice = self.slice_for_update(&mut meta, file, index).await?;
        let at = self.slice_entry(place.first);
        if self.settings.safeguards
            && !mutant::is_active("qcow2-mapping-not-checked-before-link")
            && !still_planned(&slice, at, &place.old)
        {
            Counters::add(&self.counters.ownership_violations, 1);
            return Ok(false);
        }
        let hosts: SmallVec<[HostCluster; 8]> = match &place.target {
            Target::New(allocation) => allocation.clusters().collect(),
            Target::Reserved(first) => (0..place.old.len() as u64)
                .map(|n| HostCluster(first.0 + n))
                .collect(),
        };
        if self.settings.safeguards {
            self.check_owned(&mut meta, request, &place, &hosts).await?;
        }
        let mut freed = Freed::default();
        let mut result = Ok(());
        for (n, host) in hosts.iter().enumerate() {
            let raw = slice.load(at + n);
            let cluster = ClusterIndex(place.first.0 + n as u64);
            if matches!(place.target, Target::New(_))
                && !mutant::is_active("qcow2-overwritten-cluster-not-unreferenced")
            {
                result = self
                    .unlink(&mut meta, request, raw, cluster, false, &mut freed)
                    .await;
                if result.is_err() {
                    break;
                }
            }
            let host = HostOffset(host.0 * size);
            let new = L2Entry::Normal { host, copied: true }.encode(self.geometry);
            meta.set_entry(index, &slice, at + n, new);
            meta.unlinked.remove(&(host.0 / size));
        }
        meta.linked = !mutant::is_active("qcow2-link-not-noted-for-barrier");
        let batch = meta.batch;
        if self.settings.safeguards {
            meta.quarantine.close(freed, batch, &self.pins);
        }
        self.note_sizes(&meta);
        if result.is_ok()
            && let Target::New(allocation) = place.target
        {
            allocation.linked();
        } else if let Target::New(allocation) = place.target {
            // Some of it may be linked: rather leak than free it. The image is going to be marked corrupt.
            allocation.linked();
        }
        drop(place.pin);
        result.map(|()| true)
    }

    /// Refuses to link what isn't this write's own any more.
    async fn check_owned(
        &self,
        meta: &mut Meta,
        request: &Request,
        place: &Place,
        hosts: &[HostCluster],
    ) -> Result<()> {
        let file = request.file()?;
        let new = matches!(place.target, Target::New(_));
        for host in hosts {
            let references = meta.refcounts.get(file, *host).await?;
            let waiting = meta.quarantine.pending(host.0);
            if references <= waiting || new && !meta.unlinked.contains(&host.0) {
                Counters::add(&self.counters.ownership_violations, 1);
                return Err(Error::corrupt(format!(
                    "Linking host cluster at offset {}, which isn't owned by the write (refcount {references})",
                    self.geometry.host_start(*host)
                )));
            }
        }
        Ok(())
    }

    /// Notes that what an entry refers to is no longer referred to by it. The caller changes the entry under the same
    /// lock, and closes `freed` afterwards.
    pub async fn unlink(
        &self,
        meta: &mut Meta,
        request: &Request,
        raw: RawEntry,
        cluster: ClusterIndex,
        punch: bool,
        freed: &mut Freed,
    ) -> Result<()> {
        let file = request.file()?;
        let (first, last) = match self.decode(raw, cluster)? {
            L2Entry::Unallocated | L2Entry::ZeroPlain => return Ok(()),
            L2Entry::Normal { host, .. } | L2Entry::ZeroAllocated { host, .. } => {
                let host = self.geometry.host_cluster_of(host).0;
                (host, host)
            }
            L2Entry::Compressed(run) => {
                let (first, last) = run.clusters(self.geometry);
                if mutant::is_active("qcow2-compressed-frees-first-cluster-only") {
                    (first, first)
                } else {
                    (first, last)
                }
            }
        };
        self.metadata
            .check(first, last - first + 1, self.geometry)?;
        let noted = meta.unreference(file, first, last, punch, freed).await;
        if noted.is_err() {
            Counters::add(&self.counters.ownership_violations, 1);
        }
        noted
    }
}

/// Whether a slice's entries from `at` on are still the ones that a plan was made with.
fn still_planned(slice: &Slice, at: usize, old: &[RawEntry]) -> bool {
    old.iter()
        .enumerate()
        .all(|(n, raw)| slice.load(at + n) == *raw)
}

fn kept() -> Error {
    Error::io("a driver kept a part of a read buffer")
}
