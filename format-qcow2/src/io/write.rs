//! Writes: in place where a cluster may be overwritten, else to newly allocated clusters, filled from the old view where the
//! write doesn't cover them, and linked when the data is where it belongs.
//!
//! An allocating write claims its guest clusters, plans under the metadata lock, does all data I/O without it, takes it
//! again and links, after it has made sure that the clusters are still its own and the mapping is the one it planned with.

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    mutant,
    pins::Pin,
    request::Request,
};
use futures::FutureExt;
use smallvec::SmallVec;

use super::{map::Run, read::WINDOW, window::Window};
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
pub(super) struct Place {
    pub first: ClusterIndex,
    /// The raw entries that the plan was made with, one for each guest cluster.
    pub old: SmallVec<[RawEntry; 4]>,
    /// Where the clusters go, one piece after the other.
    pub target: Target,
    /// Where the write begins, in the first cluster.
    pub offset: u64,
    /// Bytes of the write that it takes.
    pub len: u64,
    /// Keeps what `old` refers to.
    pin: Pin,
}

impl Place {
    /// Where the part of the write that it takes ends, in the last cluster.
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }
}

pub(super) enum Target {
    /// New clusters.
    New(Allocation),
    /// The clusters' own space, in which some or all subclusters are only reserved.
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
                        let result = self.write_sealed(request, offset, host, piece).await;
                        drop(pin);
                        result
                    };
                    if whole {
                        return write.await;
                    }
                    window.push(write.boxed());
                }
                None => {
                    let write = self.write_allocating(request, offset, piece, &|| ());
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
            let at = offset + done;
            let run = self.run_in(&slice, at, len - done)?;
            done += if done > 0 && matches!(run, Run::Data { copied: true, .. }) {
                let within = self.geometry.within(at);
                if within == 0 {
                    break;
                }
                // Subclusters of the cluster that the run before is in: written in one go with that.
                run.len().min(self.geometry.cluster_size() - within)
            } else {
                run.len()
            };
        }
        Ok(done)
    }

    /// Writes into clusters that have to be allocated, step by step. Calls `placed` each time that a step has its place,
    /// before its data are written.
    pub(super) async fn write_allocating(
        self: &Arc<Self>,
        request: &Request,
        mut offset: u64,
        mut buf: IoBuf,
        placed: &(dyn Fn() + Sync),
    ) -> Result<()> {
        let mut reclaimed = false;
        while !buf.is_empty() {
            match self.allocating_step(request, offset, &buf, placed).await {
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
        placed: &(dyn Fn() + Sync),
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
        placed();
        match plan {
            Plan::InPlace { host, len, pin } => {
                let pin = (!mutant::is_active("qcow2-pin-dropped-before-write")).then_some(pin);
                let data = self.data(request)?;
                data.debug_event(DebugEvent::WriteAio).await;
                self.write_sealed(request, offset, host, buf.slice(..len as usize))
                    .await?;
                drop(pin);
                Ok(len)
            }
            Plan::Place(place) => {
                let len = place.len;
                if mutant::is_active("qcow2-link-before-data") {
                    return self.link_first(request, place, buf).await;
                }
                self.fill(request, &place, buf.slice(..len as usize))
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
            offset: place.offset,
            len,
            pin,
        };
        let linked = self.link(request, place).await?;
        let filled = self.fill(request, &again, buf.slice(..len as usize)).await;
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
            let own = match entry.space() {
                Some(space) if space.copied => Some(space.host),
                // In a data file each guest cluster has its place, whether it is used or not.
                _ if self.geometry.has_data_file() => Some(HostOffset((first.0 + n as u64) * size)),
                _ => None,
            };
            match (own, reserved) {
                (Some(host), None) if n == 0 => reserved = Some(host),
                (Some(host), Some(start))
                    if host.0 == start.0 + n as u64 * size
                        && !matches!(entry, L2Entry::Normal { .. }) => {}
                (None, None) => {}
                _ => break,
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
            offset,
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
        // Unlinking what the plan saw is only right as long as that is what is there.
        let as_planned = mutant::is_active("qcow2-link-frees-what-was-planned");
        if self.settings.safeguards && !as_planned && !still_planned(&slice, at, &place.old) {
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
                let gone = if as_planned { place.old[n] } else { raw };
                result = self
                    .unlink(&mut meta, request, gone, cluster, false, &mut freed)
                    .await;
                if result.is_err() {
                    break;
                }
            }
            let old = match self.decode(raw, cluster) {
                Ok(old) => old,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            // Subclusters that the write doesn't touch stay as they are, whoever changed them.
            let touched = self.touched(cluster, place.offset, place.end());
            let host = HostOffset(host.0 * size);
            let new = Self::with_data(old, host, touched).encode(self.geometry);
            meta.set_entry(index, &slice, at + n, new);
            if !self.geometry.has_data_file() {
                meta.unlinked.remove(&(host.0 / size));
            }
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
        if self.geometry.has_data_file() {
            // There a cluster is its guest cluster's, and nothing counts references to it.
            return Ok(());
        }
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
        if self.geometry.has_data_file() {
            // What is in the data file has no refcount. (Compressed clusters are refused by `decode`.)
            return self.decode(raw, cluster).map(drop);
        }
        let (first, last) = match self.decode(raw, cluster)? {
            L2Entry::Compressed(run) => {
                let (first, last) = run.clusters(self.geometry);
                if mutant::is_active("qcow2-compressed-frees-first-cluster-only") {
                    (first, first)
                } else {
                    (first, last)
                }
            }
            entry => {
                let Some(space) = entry.space() else {
                    return Ok(());
                };
                let host = self.geometry.host_cluster_of(space.host).0;
                (host, host)
            }
        };
        self.metadata
            .check(first, last - first + 1, self.geometry)?;
        let noted = meta.unreference(file, first, last, punch, freed).await;
        if noted
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::Corrupt)
        {
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
