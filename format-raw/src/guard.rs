//! Guessed-raw protection: a guest must not be able to turn its disk into an image of another format.
//!
//! When nobody said that a file is raw, the next start will guess again, from the first bytes, which the guest
//! controls. A guest that writes a qcow2 header with a backing file of its choice there would then be shown that
//! file. So as long as the format was guessed, a write into the probed bytes is let through only when the bytes that
//! result are raw to every registered format. This file never writes anything.

use std::sync::Arc;

use block_core::{
    Error, ErrorKind, Result,
    buffer::IoBuf,
    debug::DebugEvent,
    flags::RequestFlags,
    registry::Registry,
    request::{Child, Request},
};
use futures::lock::{Mutex, MutexGuard};

/// How many bytes probing looks at.
pub(crate) const PROBED: u64 = 2048;

/// What is about to happen to the probed bytes.
#[derive(Clone, Copy)]
pub(crate) enum Change<'a> {
    /// Data is written.
    Data(&'a IoBuf),
    /// That many zeroes are.
    Zeroes(u64),
}

impl Change<'_> {
    fn len(self) -> u64 {
        match self {
            Self::Data(buf) => buf.len() as u64,
            Self::Zeroes(len) => len,
        }
    }
}

/// The guard of one node whose format was guessed.
pub(crate) struct Guard {
    registry: Arc<Registry>,
    /// Held while somebody changes the probed bytes, so that two harmless writes can't make a harmful header together.
    turn: Mutex<()>,
}

impl Guard {
    pub(crate) fn new(registry: Arc<Registry>) -> Self {
        Self {
            registry,
            turn: Mutex::new(()),
        }
    }

    /// Allows the change at `offset` of the file `child`, or refuses it with EPERM. The answer holds as long as what is
    /// returned is kept.
    pub(crate) async fn allow(
        &self,
        child: &Child,
        offset: u64,
        change: Change<'_>,
    ) -> Result<Option<MutexGuard<'_, ()>>> {
        if offset >= PROBED || change.len() == 0 {
            return Ok(None);
        }
        let turn = self.turn.lock().await;
        let mut head = child.read_padded(0, PROBED as usize).await?;
        let at = offset as usize;
        let len = change.len().min(PROBED - offset) as usize;
        match change {
            Change::Data(buf) => buf.slice(..len).copy_to_slice(0, &mut head[at..at + len]),
            Change::Zeroes(_) => head[at..at + len].fill(0),
        }
        // Formats are probed in what there is: a file that stays shorter is judged by its own bytes.
        let end = child
            .length()
            .max(offset.saturating_add(change.len()))
            .min(PROBED) as usize;
        let name = child.filename().unwrap_or_default();
        let format = self.registry.probe(&head[..end], &name);
        if format != "raw" {
            return Err(Error::new(
                ErrorKind::NotPermitted,
                format!(
                    "Image format was not specified for '{name}' and probing guessed raw: a write that turns its \
                     header into one of format '{format}' is refused"
                ),
            ));
        }
        Ok(Some(turn))
    }
}

/// Writes through the guard, if there is one.
pub(crate) async fn write(
    guard: Option<&Guard>,
    request: &Request,
    offset: u64,
    buf: IoBuf,
    flags: RequestFlags,
) -> Result<()> {
    let child = request.file()?;
    let _turn = match guard {
        Some(guard) => guard.allow(child, offset, Change::Data(&buf)).await?,
        None => None,
    };
    child.debug_event(DebugEvent::WriteAio).await;
    child.write(offset, buf, flags).await
}

/// Zeroes through the guard, if there is one.
pub(crate) async fn write_zeroes(
    guard: Option<&Guard>,
    request: &Request,
    offset: u64,
    len: u64,
    flags: RequestFlags,
) -> Result<()> {
    let child = request.file()?;
    let _turn = match guard {
        Some(guard) => guard.allow(child, offset, Change::Zeroes(len)).await?,
        None => None,
    };
    child.write_zeroes(offset, len, flags).await
}

/// Discards what may be: what a discard leaves behind is the storage's choice, so that the probed bytes of a guarded
/// file are left alone.
pub(crate) async fn discard(
    guard: Option<&Guard>,
    request: &Request,
    offset: u64,
    len: u64,
) -> Result<()> {
    let skip = match guard {
        Some(_) => PROBED.saturating_sub(offset).min(len),
        None => 0,
    };
    if skip == len {
        return Ok(());
    }
    request.file()?.discard(offset + skip, len - skip).await
}
