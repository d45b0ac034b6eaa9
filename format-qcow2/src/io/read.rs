//! Reads: from the image's clusters, from the backing chain, out of compressed clusters, or plain zeroes.

use std::sync::Arc;

use block_core::{
    buffer::IoBufMut,
    debug::DebugEvent,
    env::offload,
    error::Result,
    pins::Pin,
    request::{Child, Request},
};
use futures::FutureExt;

use super::{map::Run, window::Window};
use crate::{
    image::Qcow2,
    layout::{CompressedRun, HostOffset},
};

/// Pieces of one request in flight.
pub(crate) const WINDOW: usize = 16;

/// Reads host bytes of `file`, the child that holds them; what lies beyond its end reads as zeroes.
pub(crate) async fn read_host(file: &Child, host: HostOffset, mut buf: IoBufMut) -> Result<()> {
    let available = file.length().saturating_sub(host.0).min(buf.len() as u64) as usize;
    if available < buf.len() {
        buf.split_off(available).fill(0);
        if available == 0 {
            return Ok(());
        }
    }
    file.read(host.0, buf).await
}

impl Qcow2 {
    /// Fills `buf` with what the guest sees at `offset`.
    pub async fn read_guest(
        self: &Arc<Self>,
        request: &Request,
        mut offset: u64,
        mut buf: IoBufMut,
    ) -> Result<()> {
        let file = request.file()?;
        let mut window = Window::new(WINDOW);
        while !buf.is_empty() {
            window.room().await;
            if window.has_failed() {
                break;
            }
            let located = async {
                self.make_room(request).await.ok();
                self.locate(file, offset, buf.len() as u64).await
            };
            let (run, pin) = match window.alongside(located).await {
                Ok(located) => located,
                Err(error) => {
                    window.finish().await?;
                    return Err(error);
                }
            };
            let piece = buf.split_to(run.len() as usize);
            let read = self.read_run(request, run, offset, piece, pin);
            if buf.is_empty() && window.is_idle() {
                return read.await;
            }
            window.push(read.boxed());
            offset += run.len();
        }
        window.finish().await
    }

    /// Reads one run, at guest offset `offset`, holding `pin` until it is done.
    pub async fn read_run(
        &self,
        request: &Request,
        run: Run,
        offset: u64,
        mut buf: IoBufMut,
        pin: Pin,
    ) -> Result<()> {
        let result = match run {
            Run::Data { host, .. } => {
                self.data(request)?.debug_event(DebugEvent::ReadAio).await;
                self.read_opened(request, offset, host, buf).await
            }
            Run::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Run::Unallocated { .. } => {
                if request.backing().is_some() {
                    request.debug_event(DebugEvent::ReadBackingAio).await;
                }
                request.read_backing(offset, buf).await
            }
            Run::Compressed { run, .. } => {
                let within = self.geometry.within(offset) as usize;
                let cluster = self.read_compressed(request, run).await?;
                buf.copy_from_slice(0, &cluster[within..within + buf.len()]);
                Ok(())
            }
        };
        drop(pin);
        result
    }

    /// A whole compressed cluster, decompressed. A pin must be held.
    pub async fn read_compressed(
        &self,
        request: &Request,
        run: CompressedRun,
    ) -> Result<block_core::buffer::Buffer> {
        let size = self.geometry.cluster_size() as usize;
        request.debug_event(DebugEvent::ReadCompressed).await;
        let bytes = request
            .file()?
            .read_padded(run.offset.0, run.len as usize)
            .await?;
        let codec = self.codec;
        offload(request.env(), move || codec.decompress(&bytes, size)).await?
    }
}
