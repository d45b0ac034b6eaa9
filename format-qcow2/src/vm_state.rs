//! VM state: bytes that the image keeps behind the end of the disk, in clusters of their own from the first L1 entry on that the disk
//! doesn't need. They are no part of the disk: no request of a guest reaches them, the backing file never shows there, and
//! a change of the disk's size drops them, as they would show or be found elsewhere. Snapshots keep them with all else
//! that the L1 table refers to (specification, "Snapshots").
//!
//! The core sees to it that nothing else is under way.

use std::sync::{Arc, atomic::Ordering};

use block_core::{
    buffer::{Buffer, IoBuf, IoBufMut},
    debug::DebugEvent,
    error::{Error, ErrorKind, Result},
    request::Request,
};

use crate::{
    image::Qcow2,
    io::{map::Run, zero::Change},
    layout::ClusterIndex,
};

/// Bytes that are written at once.
const STEP: u64 = 4 << 20;

impl Qcow2 {
    /// Where VM state begins, in bytes from the start of the disk.
    fn vm_state_start(&self) -> u64 {
        self.geometry.l1_entries_for(self.length()) * self.geometry.l2_coverage()
    }

    /// Where a byte of VM state is, in bytes from the start of the disk.
    fn vm_state_offset(&self, position: u64, len: u64) -> Result<u64> {
        self.vm_state_start()
            .checked_add(position)
            .filter(|start| start.checked_add(len).is_some_and(|end| end < 1 << 63))
            .ok_or_else(|| Error::new(ErrorKind::TooBig, "VM state too large"))
    }

    /// Where the L1 table ends, in bytes from the start of the disk.
    fn mappable(&self) -> u64 {
        let entries = self.l1.load().entries.len() as u64;
        entries.saturating_mul(self.geometry.l2_coverage())
    }

    /// See [`block_core::driver::BlockDriver::read_vm_state`].
    pub async fn load_vm_state(
        self: &Arc<Self>,
        request: &Request,
        position: u64,
        mut buf: IoBufMut,
    ) -> Result<()> {
        request.debug_event(DebugEvent::VmstateLoad).await;
        let mut at = self.vm_state_offset(position, buf.len() as u64)?;
        let end = self.mappable();
        while !buf.is_empty() {
            if at >= end {
                buf.fill(0);
                return Ok(());
            }
            let wanted = (buf.len() as u64).min(end - at);
            let (run, pin) = self.locate(request.file()?, at, wanted).await?;
            let len = run.len();
            let mut piece = buf.split_to(len as usize);
            match run {
                // The backing file has no VM state, however long it is.
                Run::Unallocated { .. } => piece.fill(0),
                _ => self.read_run(request, run, at, piece, pin).await?,
            }
            at += len;
        }
        Ok(())
    }

    /// See [`block_core::driver::BlockDriver::write_vm_state`].
    pub async fn save_vm_state(
        self: &Arc<Self>,
        request: &Request,
        position: u64,
        buf: IoBuf,
    ) -> Result<()> {
        self.check_writable()?;
        request.debug_event(DebugEvent::VmstateSave).await;
        if self.has_raw_data() {
            let error = Error::unsupported(
                "VM state can't be kept in a raw external data file, which holds the disk and nothing else",
            );
            return Err(error.with_field("data_file_raw", "on", "off"));
        }
        let start = self.vm_state_offset(position, buf.len() as u64)?;
        let end = start + buf.len() as u64;
        self.make_room(request).await?;
        let entries = self.geometry.l1_entries_for(end);
        self.reclaiming(request, || self.grow_l1(request, entries))
            .await?;
        // Whole clusters: nothing may be filled up from the backing file.
        let size = self.geometry.cluster_size();
        let origin = self.vm_state_start();
        let head = start % size;
        let tail = end.next_multiple_of(size) - end;
        let mut all = IoBuf::new();
        all.append(
            self.vm_state_piece(request, start - head - origin, head)
                .await?,
        );
        all.append(buf);
        all.append(self.vm_state_piece(request, end - origin, tail).await?);
        let mut at = start - head;
        while !all.is_empty() {
            let step = (all.len() as u64).min(STEP);
            let piece = all.split_to(step as usize);
            self.write_guest(request, at, piece).await?;
            at += step;
        }
        Ok(())
    }

    /// `len` bytes of VM state as they are, less than a cluster.
    async fn vm_state_piece(
        self: &Arc<Self>,
        request: &Request,
        position: u64,
        len: u64,
    ) -> Result<IoBuf> {
        if len == 0 {
            return Ok(IoBuf::new());
        }
        let (lent, buf) = Buffer::try_new(len as usize)?.lend();
        self.load_vm_state(request, position, buf).await?;
        let piece = lent
            .reclaim()
            .map_err(|_| Error::io("a read buffer is still in use"))?;
        Ok(IoBuf::from(piece))
    }

    /// Unlinks all that lies behind the end of a disk of `old` bytes, of which the size is about to change: it would show in the disk, or
    /// never be found again. Gives back whether there was anything; it is for the caller to make that durable.
    pub(crate) async fn drop_vm_state(
        self: &Arc<Self>,
        request: &Request,
        old: u64,
    ) -> Result<bool> {
        let first = self.geometry.l1_entries_for(old) as usize;
        let l1 = self.l1.load_full();
        let mut behind = l1.entries.iter().skip(first);
        if !behind.any(|entry| entry.load(Ordering::SeqCst) != 0) {
            return Ok(false);
        }
        let size = self.geometry.cluster_size();
        let first = ClusterIndex(old.div_ceil(size));
        let end = ClusterIndex(self.mappable() / size);
        self.change_clusters(request, first, end, Change::Full)
            .await?;
        Ok(true)
    }
}
