//! One read, write or flush on its way through an engine. It owns its buffers and its file, and thereby keeps both
//! alive until the kernel is done, whoever has lost interest meanwhile. It knows what a short transfer, the end of
//! the file and an interrupted call mean; it doesn't know how an engine carries it out.

use std::{io, os::fd::AsFd, sync::Arc};

use block_core::{
    buffer::{IoBuf, IoBufMut},
    producer::ProducerId,
};
use futures::channel::oneshot;

use crate::{
    open_file::OpenFile,
    sys::{self, IoVecs},
};

/// How often a transfer is tried again when the kernel asks for it without making progress.
const MAX_RETRIES: u32 = 1000;

/// What is to be done.
pub(crate) enum Kind {
    /// Fill the buffer; what lies beyond the end of the file reads as zeroes.
    Read(IoBufMut),
    /// Write the buffer, durably if `dsync`.
    Write { buf: IoBuf, dsync: bool },
    /// Make everything written before durable.
    Flush,
}

/// A piece of I/O with all that it needs.
pub(crate) struct Transfer {
    file: Arc<OpenFile>,
    kind: Kind,
    /// Where the buffer's first byte is in the file.
    offset: u64,
    /// So many bytes are done.
    done: usize,
    retries: u32,
    reply: oneshot::Sender<io::Result<()>>,
    /// For the kernel, while the transfer is with it.
    pub(crate) vectors: IoVecs,
    /// Whose queue it came from.
    pub(crate) lane: usize,
    /// On whose behalf it is done.
    pub(crate) producer: ProducerId,
}

impl Transfer {
    /// A transfer, and the way to its end.
    pub(crate) fn new(
        file: Arc<OpenFile>,
        kind: Kind,
        offset: u64,
        lane: usize,
        producer: ProducerId,
    ) -> (Box<Self>, oneshot::Receiver<io::Result<()>>) {
        let (reply, end) = oneshot::channel();
        let vectors = IoVecs::default();
        let transfer = Self {
            file,
            kind,
            offset,
            done: 0,
            retries: 0,
            reply,
            vectors,
            lane,
            producer,
        };
        (Box::new(transfer), end)
    }

    pub(crate) fn file(&self) -> &OpenFile {
        &self.file
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    /// Where the next byte to be moved is in the file.
    pub(crate) fn position(&self) -> u64 {
        self.offset.saturating_add(self.done as u64)
    }

    /// Fills in [`Self::vectors`] for what is left.
    pub(crate) fn prepare(&mut self) {
        self.vectors = match &self.kind {
            Kind::Read(buf) => IoVecs::of_mut(buf, self.done),
            Kind::Write { buf, .. } => IoVecs::of(buf, self.done),
            Kind::Flush => IoVecs::default(),
        };
    }

    fn len(&self) -> usize {
        match &self.kind {
            Kind::Read(buf) => buf.len(),
            Kind::Write { buf, .. } => buf.len(),
            Kind::Flush => 0,
        }
    }

    /// Does all of it here and now, blocking.
    pub(crate) fn run(mut self: Box<Self>) {
        loop {
            let position = self.position();
            let result = match &mut self.kind {
                Kind::Read(buf) => sys::read_at(self.file.as_fd(), buf, self.done, position, 0),
                Kind::Write { buf, dsync } => {
                    let flags = if *dsync { sys::DSYNC } else { 0 };
                    sys::write_at(self.file.as_fd(), buf, self.done, position, flags)
                }
                Kind::Flush => self.file.sync_data().map(|()| 0),
            };
            match self.advance(result) {
                Some(again) => self = again,
                None => return,
            }
        }
    }

    /// Takes in the result of a step. `None` when that was the last; otherwise what is left is to be done.
    pub(crate) fn advance(mut self: Box<Self>, result: io::Result<usize>) -> Option<Box<Self>> {
        let left = self.len() - self.done;
        let moved = match result {
            Ok(moved) => moved.min(left),
            Err(error) => {
                // ECANCELED: io_uring cancels what a thread that exits had submitted. We never cancel anything.
                let again = matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED)
                );
                if again && self.retries < MAX_RETRIES {
                    self.retries += 1;
                    return Some(self);
                }
                self.finish(Err(error));
                return None;
            }
        };
        self.retries = 0;
        self.done += moved;
        if moved == left {
            self.finish(Ok(()));
            return None;
        }
        let unit = self.file.transfer_unit();
        match &mut self.kind {
            // With O_DIRECT a read that ends inside a unit has met the end of the file, and couldn't go on anyway.
            Kind::Read(buf) if moved == 0 || !moved.is_multiple_of(unit) => {
                buf.fill_range(self.done.., 0);
                self.finish(Ok(()));
                None
            }
            Kind::Write { .. } if moved == 0 => {
                self.finish(Err(io::Error::from_raw_os_error(libc::ENOSPC)));
                None
            }
            Kind::Write { .. } => {
                self.done -= self.done % unit;
                Some(self)
            }
            Kind::Read(_) | Kind::Flush => Some(self),
        }
    }

    fn finish(self: Box<Self>, result: io::Result<()>) {
        let Self {
            file, kind, reply, ..
        } = *self;
        // The buffers go before the reply: whoever waits may take their memory back at once.
        drop(kind);
        drop(file);
        let _ = reply.send(result);
    }
}
