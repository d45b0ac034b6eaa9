//! Preallocation of clusters beyond the end of the disk, before it grows over them.
//!
//! The clusters become ordinary data clusters, so their host ranges are made to read as zeroes before they are linked:
//! a recycled cluster must not show what it held before. With extended L2 entries the space is only reserved.

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    driver::Preallocation,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    request::{Child, Request},
};

use crate::{
    counters::Counters,
    image::Qcow2,
    layout::{ClusterIndex, HostOffset, L2Entry},
};

/// Zeroes written at once.
const ZERO_STEP: u64 = 4 << 20;

impl Qcow2 {
    /// Allocates every cluster from `old` to `new` that has no space yet; zero entries with a reservation are left alone. New ones
    /// read as zeroes then. Nothing but this request is at that range.
    pub async fn preallocate(
        self: &Arc<Self>,
        request: &Request,
        old: u64,
        new: u64,
        how: Preallocation,
    ) -> Result<()> {
        if self.encryption.is_some()
            && !self.geometry.has_zero_flag()
            && !self.geometry.has_extended_l2()
        {
            return Err(Error::unsupported(
                "Preallocation of encrypted images is only supported with compatibility level 1.1 and above",
            ));
        }
        // The cluster that the old end lies in shows the backing file, which zeroes must not cover. Where L2 entries are
        // extended, space covers nothing.
        let mut at = if self.has_backing(request) && !self.geometry.has_extended_l2() {
            self.geometry.clusters_for(old)
        } else {
            old >> self.geometry.cluster_bits()
        };
        let end = self.geometry.clusters_for(new);
        while at < end {
            self.make_room(request).await?;
            at = self
                .reclaiming(request, || self.preallocate_run(request, at, end, how))
                .await?;
        }
        Ok(())
    }

    /// Allocates a run of clusters from `at` on, within one slice; gives back where to go on.
    async fn preallocate_run(
        self: &Arc<Self>,
        request: &Request,
        at: u64,
        end: u64,
        how: Preallocation,
    ) -> Result<u64> {
        let file = request.file()?;
        let bits = self.geometry.cluster_bits();
        let index = self.slice_of(ClusterIndex(at));
        let left = self.left_in_slice(at << bits) >> bits;
        let stop = (at + left).min(end);
        if self.geometry.has_data_file() {
            return self.map_data(request, at, stop, how).await;
        }
        // Where the run of clusters without space is, and what it gets.
        let (start, allocation) = {
            let mut meta = self.lock_meta(file).await?;
            self.mark_in_use(&mut meta, file).await?;
            let slice = self.slice_for_update(&mut meta, file, index).await?;
            let free = |cluster: &u64| {
                let raw = slice.load(self.slice_entry(ClusterIndex(*cluster)));
                // Whoever gets to a damaged entry meets the error.
                L2Entry::decode(raw, self.geometry).is_ok_and(|entry| {
                    entry.space().is_none() && !matches!(entry, L2Entry::Compressed(_))
                })
            };
            let Some(start) = (at..stop).find(free) else {
                return Ok(stop);
            };
            let want = (start..stop).take_while(free).count() as u64;
            let allocation = meta.allocate(file, want).await;
            self.note_sizes(&meta);
            (start, allocation?)
        };
        for (host, count) in allocation.runs() {
            zero_host(
                self.data(request)?,
                self.geometry.host_start(*host),
                count << bits,
                how,
            )
            .await?;
        }
        let mut meta = self.lock_meta(file).await?;
        let slice = self.slice_for_update(&mut meta, file, index).await?;
        for (n, host) in allocation.clusters().enumerate() {
            let entry = self.slice_entry(ClusterIndex(start + n as u64));
            let host = self.geometry.host_start(host);
            let new = if self.geometry.has_extended_l2() {
                // What the subclusters show stays what it is.
                let old = self.decode(slice.load(entry), ClusterIndex(start + n as u64))?;
                Self::with_data(old, host, 0)
            } else if self.encryption.is_some() {
                // Zeroes in the file are noise once they are decrypted.
                L2Entry::ZeroAllocated { host, copied: true }
            } else {
                L2Entry::Normal { host, copied: true }
            };
            meta.set_entry(index, &slice, entry, new.encode(self.geometry));
            meta.unlinked.remove(&(host.0 >> bits));
        }
        meta.linked = true;
        Counters::add(&self.counters.allocated, allocation.count());
        let next = start + allocation.count();
        allocation.linked();
        Ok(next)
    }
}

/// Makes a host range read as zeroes, with as much space behind it as `how` asks for.
pub(crate) async fn zero_host(
    file: &Child,
    host: HostOffset,
    len: u64,
    how: Preallocation,
) -> Result<()> {
    let flags = match how {
        Preallocation::Off | Preallocation::Metadata => RequestFlags::MAY_UNMAP,
        Preallocation::Falloc | Preallocation::Full => RequestFlags::empty(),
    };
    if how != Preallocation::Full {
        match file.write_zeroes(host.0, len, flags).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {}
            done => return done,
        }
    }
    let mut at = host.0;
    let end = host.0 + len;
    while at < end {
        let step = (end - at).min(ZERO_STEP);
        file.write(at, IoBuf::zeroes(step as usize), RequestFlags::empty())
            .await?;
        at += step;
    }
    Ok(())
}
