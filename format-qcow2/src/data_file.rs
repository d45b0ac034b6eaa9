//! The external data file (digest, section 10): opening it, and what zeroes, discards and a change of the size mean for it.
//!
//! Each guest cluster has its place in it, at the guest's offset, and nothing counts references to that. So nothing is ever
//! allocated or moved there, and a place never changes hands: what is unlinked can be punched at once. A *raw* data
//! file holds what the guest sees, by itself: there zeroes go to the file, and its clusters stay mapped.

use std::sync::{Arc, atomic::Ordering};

use block_core::{
    driver::{Preallocation, Truncate},
    error::{Error, Result},
    flags::RequestFlags,
    node::Node,
    options::Options,
    registry::OpenContext,
    request::Request,
};

use crate::{
    image::Qcow2,
    layout::{ClusterIndex, Header, HostOffset, Incompatible, L2Entry},
    preallocate::zero_host,
};

/// Opens the data file of an image that has one: the node in the options, or the file that the header names, if the caller
/// permits that. `None` for an image without one, and where it is to be left alone.
///
/// # Errors
/// EINVAL when the image has a data file that nothing names, or has none and the options name one.
pub(crate) async fn open(
    context: &OpenContext,
    options: &mut Options,
    file: &Arc<Node>,
    header: &Header,
) -> Result<Option<Arc<Node>>> {
    if !header.incompatible.contains(Incompatible::DATA_FILE) {
        return match options.take("data-file") {
            None | Some(serde_json::Value::Null) => Ok(None),
            // No data file is looked at anyway.
            Some(_) if context.how.no_data_file => Ok(None),
            Some(_) => Err(Error::invalid(
                "'data-file' can only be set for images with an external data file",
            )),
        };
    }
    let name = match &header.extensions.data_file {
        Some(name) => Some(std::str::from_utf8(name).map_err(|error| {
            Error::invalid("The data file's name is not UTF-8")
                .with_field(
                    "data file name",
                    String::from_utf8_lossy(name).into_owned(),
                    "UTF-8",
                )
                .with_source(error)
        })?),
        None => None,
    };
    let node = context.open_data_file(options, file, name).await?;
    if node.is_none() && !context.how.no_data_file {
        return Err(
            Error::invalid("'data-file' is required for this image").with_field(
                "data-file",
                "none",
                "a node, or a name in the image's header",
            ),
        );
    }
    Ok(node)
}

impl Qcow2 {
    /// Whether the data file by itself is what the guest sees.
    pub fn has_raw_data(&self) -> bool {
        self.geometry.has_data_file()
            && self.raw_data.load(Ordering::Acquire)
            // What such a file holds isn't what the guest sees, zeroes least of all.
            && self.encryption.is_none()
    }

    /// Refuses what an image with a data file can't hold.
    pub fn check_data_entry(&self, entry: L2Entry, cluster: ClusterIndex) -> Result<()> {
        let guest = self.geometry.cluster_start(cluster);
        let index = self.geometry.l2_index(cluster);
        if matches!(entry, L2Entry::Compressed(_)) {
            return Err(Error::corrupt(format!(
                "Compressed cluster entry found in image with external data file (guest offset: {guest}, L2 index: \
                 {index:#x})"
            )));
        }
        match entry.space() {
            Some(space) if space.host.0 != guest.0 => Err(Error::corrupt(format!(
                "External data file host cluster offset {} does not match guest cluster offset: {guest} (L2 index: \
                 {index:#x})",
                space.host
            ))),
            _ => Ok(()),
        }
    }

    /// Zeroes in a raw data file. What is mapped stays mapped, what reads as zeroes goes on doing so: at no moment, not even
    /// after a power cut, does the guest see anything else than the file holds.
    pub async fn zero_raw_data(
        &self,
        request: &Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let data = self.data(request)?;
        let len = len.min(self.length().saturating_sub(offset));
        let flags = flags & (RequestFlags::MAY_UNMAP | RequestFlags::NO_FALLBACK);
        data.write_zeroes(offset, len, flags).await
    }

    /// A discard in a raw data file: the range reads as zeroes afterwards.
    pub async fn discard_raw_data(&self, request: &Request, offset: u64, len: u64) -> Result<()> {
        let flags = if self.settings.pass_discard_request() {
            RequestFlags::MAY_UNMAP
        } else {
            RequestFlags::empty()
        };
        self.zero_raw_data(request, offset, len, flags).await
    }

    /// Before the disk grows from `old` to `new` bytes: the data file gets the new length. What it has behind the old end, which
    /// nobody was to see, mustn't show: neither in the cluster that the end was in nor, in a raw file, anywhere.
    pub async fn grow_data(
        &self,
        request: &Request,
        old: u64,
        new: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let data = self.data(request)?;
        let shown = if self.has_raw_data() {
            new
        } else {
            old.next_multiple_of(self.geometry.cluster_size()).min(new)
        };
        let stale = data.length().min(shown);
        if old < stale {
            data.write_zeroes(old, stale - old, RequestFlags::MAY_UNMAP)
                .await?;
        }
        if data.length() != new {
            let how = Truncate {
                exact: false,
                preallocation: match preallocation {
                    Preallocation::Falloc | Preallocation::Full if data.length() < new => {
                        preallocation
                    }
                    _ => Preallocation::Off,
                },
                zero: false,
            };
            data.truncate(new, how).await?;
        }
        Ok(())
    }

    /// Before the disk becomes smaller: a data file that doesn't even reach the new end gets to it, as a raw one has to be as
    /// long as the disk by itself. Only ever longer.
    pub async fn reach_data(&self, request: &Request, new: u64) -> Result<()> {
        let data = self.data(request)?;
        if data.length() < new {
            data.truncate(new, Truncate::default()).await?;
        }
        Ok(())
    }

    /// After the disk has become smaller, durably: cuts the data file off.
    pub async fn shrink_data(&self, request: &Request, new: u64) -> Result<()> {
        let data = self.data(request)?;
        if data.length() > new {
            data.truncate(new, Truncate::default()).await?;
        }
        Ok(())
    }

    /// Maps the clusters from `at` to `stop`, within one slice, that aren't mapped to the data file, which is made to read as
    /// zeroes there first. Gives back where to go on.
    pub async fn map_data(
        self: &Arc<Self>,
        request: &Request,
        at: u64,
        stop: u64,
        how: Preallocation,
    ) -> Result<u64> {
        let (file, data) = (request.file()?, self.data(request)?);
        let bits = self.geometry.cluster_bits();
        let index = self.slice_of(ClusterIndex(at));
        let (start, next) = {
            let mut meta = self.lock_meta(file).await?;
            self.mark_in_use(&mut meta, file).await?;
            let slice = self.slice_for_update(&mut meta, file, index).await?;
            let free = |cluster: &u64| {
                let raw = slice.load(self.slice_entry(ClusterIndex(*cluster)));
                L2Entry::decode(raw, self.geometry).is_ok_and(|entry| entry.space().is_none())
            };
            let Some(start) = (at..stop).find(free) else {
                return Ok(stop);
            };
            (start, start + (start..stop).take_while(free).count() as u64)
        };
        let from = start << bits;
        let to = (next << bits).min(data.length());
        if from < to {
            zero_host(data, HostOffset(from), to - from, how).await?;
        }
        let mut meta = self.lock_meta(file).await?;
        let slice = self.slice_for_update(&mut meta, file, index).await?;
        for cluster in (start..next).map(ClusterIndex) {
            let entry = self.slice_entry(cluster);
            let host = HostOffset(cluster.0 << bits);
            let old = self.decode(slice.load(entry), cluster)?;
            let new = if self.geometry.has_extended_l2() && !self.has_raw_data() {
                // What the subclusters show stays what it is.
                Self::with_data(old, host, 0)
            } else if self.encryption.is_some() {
                // Zeroes in the file are noise once they are decrypted.
                L2Entry::ZeroAllocated { host, copied: true }
            } else {
                L2Entry::Normal { host, copied: true }
            };
            meta.set_entry(index, &slice, entry, new.encode(self.geometry));
        }
        meta.linked = true;
        Ok(next)
    }
}
