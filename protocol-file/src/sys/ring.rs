//! An io_uring that carries [`Transfer`]s. It may be used from several threads at once: what is pushed is submitted
//! by the pushing thread, and whoever looks first collects a completion. It doesn't queue, wake or decide anything.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::atomic::{AtomicUsize, Ordering},
};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use parking_lot::{Mutex, MutexGuard};

use crate::transfer::{Kind, Transfer};

/// The completion of [`Ring::nudge`], which carries nothing.
const NUDGE: u64 = 0;

/// A transfer that the kernel is done with, and what it said.
pub(crate) type Completion = (Box<Transfer>, io::Result<usize>);

/// The ring. Dropping it with transfers in flight leaks their memory rather than freeing it under the kernel's hands;
/// its owner waits for [`Self::in_flight`] to become 0 first.
pub(crate) struct Ring {
    ring: IoUring,
    /// Held by whoever touches the submission queue.
    submission: Mutex<()>,
    /// Held by whoever touches the completion queue.
    completion: Mutex<()>,
    in_flight: AtomicUsize,
    capacity: usize,
}

impl Ring {
    /// A ring for `entries` transfers in flight. Fails where the kernel has no io_uring, forbids it, or lacks one of
    /// the operations needed.
    pub(crate) fn new(entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Nop::CODE,
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        // Without NODROP the kernel could lose completions; without SUBMIT_STABLE it could read a vector later.
        if !needed.iter().all(|code| probe.is_supported(*code))
            || !ring.params().is_feature_nodrop()
            || !ring.params().is_feature_submit_stable()
        {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        // One place is kept for nudges.
        let capacity = (ring.params().sq_entries() as usize)
            .saturating_sub(1)
            .max(1);
        Ok(Self {
            ring,
            submission: Mutex::new(()),
            completion: Mutex::new(()),
            in_flight: AtomicUsize::new(0),
            capacity,
        })
    }

    /// How many transfers may be in flight at once.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many are.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// The right to push, unless another thread has it.
    pub(crate) fn try_submitter(&self) -> Option<Submitter<'_>> {
        self.submission.try_lock().map(|guard| Submitter {
            ring: self,
            _guard: guard,
        })
    }

    /// Waits until there is a completion to be collected.
    pub(crate) fn wait(&self) -> io::Result<()> {
        const IORING_ENTER_GETEVENTS: u32 = 1;
        // SAFETY: nothing is submitted (0 entries), so that no entry has to be valid; there is no argument.
        let result = unsafe {
            self.ring
                .submitter()
                .enter::<libc::sigset_t>(0, 1, IORING_ENTER_GETEVENTS, None)
        };
        result.map(drop)
    }

    /// Collects what the kernel has completed. Returns at once, with nothing if another thread is collecting.
    pub(crate) fn collect(&self, into: &mut Vec<Completion>) {
        let Some(_guard) = self.completion.try_lock() else {
            return;
        };
        // SAFETY: `completion` is held, so there is no other `CompletionQueue`.
        let queue = unsafe { self.ring.completion_shared() };
        for entry in queue {
            if entry.user_data() == NUDGE {
                continue;
            }
            let pointer =
                std::ptr::with_exposed_provenance_mut::<Transfer>(entry.user_data() as usize);
            // SAFETY: the only user data besides NUDGE are the exposed results of `Box::into_raw` in `push`, and the
            // kernel completes each entry exactly once.
            let transfer = unsafe { Box::from_raw(pointer) };
            self.in_flight.fetch_sub(1, Ordering::AcqRel);
            let result = entry.result();
            let result = usize::try_from(result)
                .map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()));
            into.push((transfer, result));
        }
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and closes it when it is dropped, which the borrow rules out.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

/// The right to push and submit.
pub(crate) struct Submitter<'a> {
    ring: &'a Ring,
    _guard: MutexGuard<'a, ()>,
}

impl Submitter<'_> {
    /// Whether another transfer can be pushed.
    pub(crate) fn has_room(&self) -> bool {
        self.ring.in_flight() < self.ring.capacity
    }

    /// Puts a transfer into the submission queue, or gives it back when there is no room.
    pub(crate) fn push(&mut self, mut transfer: Box<Transfer>) -> Result<(), Box<Transfer>> {
        if !self.has_room() {
            return Err(transfer);
        }
        transfer.prepare();
        let pointer = Box::into_raw(transfer);
        // SAFETY: `pointer` is a valid, unshared `Transfer`; it isn't moved from here on.
        let entry = entry_for(unsafe { &*pointer }).user_data(pointer.expose_provenance() as u64);
        // SAFETY: the entry's descriptor, vector and segments belong to the transfer, which now nobody but the kernel
        // can reach: `collect` makes a box of it again after the kernel has completed the entry. The submission queue
        // has no other user, since this type holds its lock.
        let pushed = unsafe { self.ring.ring.submission_shared().push(&entry) };
        if pushed.is_err() {
            // SAFETY: the entry was not queued, so `pointer` is still ours alone.
            return Err(unsafe { Box::from_raw(pointer) });
        }
        self.ring.in_flight.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Pushes an entry that does nothing but complete, to wake a thread in [`Ring::wait`].
    pub(crate) fn nudge(&mut self) {
        let entry = opcode::Nop::new().build().user_data(NUDGE);
        // SAFETY: the entry refers to nothing; the queue's lock is held. When it is full, there are completions to
        // come which wake the waiter as well.
        let _ = unsafe { self.ring.ring.submission_shared().push(&entry) };
    }

    /// Hands what was pushed to the kernel. Returns whether all of it was taken.
    pub(crate) fn submit(&mut self) -> io::Result<bool> {
        // SAFETY: the queue's lock is held, so there is no other `SubmissionQueue`.
        let queued = unsafe { self.ring.ring.submission_shared().len() };
        if queued == 0 {
            return Ok(true);
        }
        self.ring.ring.submit().map(|taken| taken >= queued)
    }
}

/// What is left of a transfer, as the kernel wants it.
fn entry_for(transfer: &Transfer) -> squeue::Entry {
    let fd = types::Fd(transfer.file().as_raw_fd());
    let offset = transfer.position();
    let vectors = transfer.vectors.as_slice();
    let count = vectors.len() as u32;
    match (transfer.kind(), vectors) {
        (Kind::Read(_), [one]) => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32)
            .offset(offset)
            .build(),
        (Kind::Read(_), _) => opcode::Readv::new(fd, vectors.as_ptr(), count)
            .offset(offset)
            .build(),
        (Kind::Write { dsync, .. }, _) => {
            let flags = if *dsync { super::DSYNC } else { 0 };
            match vectors {
                [one] => opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                _ => opcode::Writev::new(fd, vectors.as_ptr(), count)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        (Kind::Flush, _) => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}
