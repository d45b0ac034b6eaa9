//! A filter that writes down every call that the core makes to it, and can be told to have other limits, other capabilities,
//! to refuse calls and to keep them waiting. With it above an image a case sees what the request path makes of a request;
//! with it below, what a format asks of its storage. It changes no data.

use std::{
    any::Any,
    collections::BTreeMap,
    sync::Arc,
    task::{Poll, Waker},
};

use async_trait::async_trait;
use block_core::{
    BlockHandle, Node,
    buffer::{IoBuf, IoBufMut},
    driver::{BlockDriver, Capabilities, ChildRole, DriverKind, Truncate},
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    limits::Limits,
    node::Edges,
    request::{Child, Request},
    status::{DriverStatus, StatusFlags},
};
use parking_lot::Mutex;

/// What kind of call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum CallKind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
    Truncate,
}

/// A call that the driver got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// What it asks for.
    pub kind: CallKind,
    /// Offset in bytes; the new length for truncates.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Its flags.
    pub flags: RequestFlags,
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    /// How many calls still succeed, how many fail after that, and how.
    failing: BTreeMap<CallKind, (u64, u64, ErrorKind)>,
    /// Zero writes shorter than this are refused as not supported.
    least_zeroes: u64,
    waiting: BTreeMap<CallKind, Vec<Waker>>,
    /// A length of its own, which truncates change at once and nothing below hears of.
    own_length: Option<u64>,
    /// After so many further looks at the length something happens.
    at_look: Option<(u64, Box<dyn FnOnce() + Send>)>,
}

/// The filter.
pub struct Probe {
    limits: Limits,
    capabilities: Capabilities,
    state: Mutex<State>,
}

/// A probe that stands above an image, with a handle on it.
pub struct Topped {
    /// The driver.
    pub probe: Arc<Probe>,
    /// Its node.
    pub node: Arc<Node>,
    /// A producer above it.
    pub handle: Arc<BlockHandle>,
}

impl Probe {
    /// A probe that can all that a filter can, without FUA.
    pub fn new() -> Self {
        Self {
            limits: Limits::default(),
            capabilities: Capabilities::WRITE
                | Capabilities::WRITE_ZEROES
                | Capabilities::DISCARD
                | Capabilities::TRUNCATE,
            state: Mutex::default(),
        }
    }

    /// With other limits.
    #[must_use]
    pub fn limits(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.limits);
        self
    }

    /// With requests aligned to so many bytes.
    #[must_use]
    pub fn aligned(self, bytes: u64) -> Self {
        self.limits(|limits| limits.request_alignment = bytes)
    }

    /// With more capabilities.
    #[must_use]
    pub fn with(mut self, more: Capabilities) -> Self {
        self.capabilities |= more;
        self
    }

    /// With fewer.
    #[must_use]
    pub fn without(mut self, less: Capabilities) -> Self {
        self.capabilities -= less;
        self
    }

    /// Says that it can't write fewer than `bytes` zeroes.
    #[must_use]
    pub fn least_zeroes(self, bytes: u64) -> Self {
        self.state.lock().least_zeroes = bytes;
        self
    }

    /// Its limits.
    pub fn own_limits(&self) -> Limits {
        self.limits
    }

    /// Its capabilities.
    pub fn own_capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// The calls since the last time, in their order.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.state.lock().calls)
    }

    /// The calls since the last time, without their flags.
    pub fn take_ranges(&self) -> Vec<(CallKind, u64, u64)> {
        let calls = self.take();
        calls.iter().map(|c| (c.kind, c.offset, c.len)).collect()
    }

    /// The next `times` calls of that kind fail.
    pub fn fail(&self, kind: CallKind, times: u64, error: ErrorKind) {
        self.state.lock().failing.insert(kind, (0, times, error));
    }

    /// After `good` calls of that kind one fails.
    pub fn fail_after(&self, kind: CallKind, good: u64, error: ErrorKind) {
        self.state.lock().failing.insert(kind, (good, 1, error));
    }

    /// Calls of that kind wait from now on, having been written down.
    pub fn block(&self, kind: CallKind) {
        self.state.lock().waiting.entry(kind).or_default();
    }

    /// They wait no longer.
    pub fn unblock(&self, kind: CallKind) {
        let wakers = self.state.lock().waiting.remove(&kind).unwrap_or_default();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// From now on it has a length of its own; truncates change that at once, and reach nothing below. `None`: no longer.
    pub fn own_length(&self, length: Option<u64>) {
        self.state.lock().own_length = length;
    }

    /// After `more` further looks at the length, calls `then` right behind the next one, before whoever looks goes on.
    pub fn after_look(&self, more: u64, then: impl FnOnce() + Send + 'static) {
        self.state.lock().at_look = Some((more, Box::new(then)));
    }

    /// It didn't come to that.
    pub fn forget_look(&self) {
        self.state.lock().at_look = None;
    }

    async fn called(
        &self,
        kind: CallKind,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.state.lock().calls.push(Call {
            kind,
            offset,
            len,
            flags,
        });
        futures::future::poll_fn(|cx| match self.state.lock().waiting.get_mut(&kind) {
            Some(wakers) => {
                wakers.push(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        })
        .await;
        let mut state = self.state.lock();
        if kind == CallKind::Zero && len < state.least_zeroes {
            return Err(Error::from_kind(ErrorKind::NotSupported));
        }
        match state.failing.get_mut(&kind) {
            Some((good, ..)) if *good > 0 => {
                *good -= 1;
                Ok(())
            }
            Some((_, times, error)) if *times > 0 => {
                *times -= 1;
                Err(Error::from_kind(*error))
            }
            _ => Ok(()),
        }
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self::new()
    }
}

/// How much of `len` bytes from `offset` the child has: what the core pads beyond its end isn't there.
fn inside(child: &Child, offset: u64, len: usize) -> usize {
    child.length().saturating_sub(offset).min(len as u64) as usize
}

impl Probe {
    /// The same for what is written: a probe that grows has all of it.
    fn writable(&self, child: &Child, offset: u64, len: usize) -> usize {
        if self.capabilities.contains(Capabilities::GROW) {
            return len;
        }
        inside(child, offset, len)
    }
}

#[async_trait]
impl BlockDriver for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn length(&self, edges: &Edges) -> u64 {
        let (length, then) = {
            let mut state = self.state.lock();
            let then = match &mut state.at_look {
                Some((0, _)) => state.at_look.take().map(|(_, then)| then),
                Some((more, _)) => {
                    *more -= 1;
                    None
                }
                None => None,
            };
            (state.own_length, then)
        };
        let length =
            length.unwrap_or_else(|| edges.child(ChildRole::Filtered).map_or(0, Child::length));
        if let Some(then) = then {
            then();
        }
        length
    }

    fn limits(&self, _: &Edges) -> Limits {
        // Its own and nobody else's: below it the request path shapes requests again, as the child wants them.
        self.limits
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        self.called(
            CallKind::Read,
            offset,
            buf.len() as u64,
            RequestFlags::empty(),
        )
        .await?;
        let child = request.file()?;
        let mut beyond = buf.split_off(inside(child, offset, buf.len()));
        beyond.fill(0);
        drop(beyond);
        if buf.is_empty() {
            return Ok(());
        }
        child.read(offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        mut buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        self.called(CallKind::Write, offset, buf.len() as u64, flags)
            .await?;
        let child = request.file()?;
        drop(buf.split_off(self.writable(child, offset, buf.len())));
        child.write(offset, buf, flags).await
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        self.called(CallKind::Zero, offset, len, flags).await?;
        let child = request.file()?;
        let len = self.writable(child, offset, len as usize) as u64;
        child.write_zeroes(offset, len, flags).await
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        self.called(CallKind::Discard, offset, len, RequestFlags::empty())
            .await?;
        request.file()?.discard(offset, len).await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.called(CallKind::Flush, 0, 0, RequestFlags::empty())
            .await?;
        request.file()?.flush().await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        self.called(CallKind::Truncate, length, 0, RequestFlags::empty())
            .await?;
        if let Some(own) = &mut self.state.lock().own_length {
            *own = length;
            return Ok(());
        }
        request.file()?.truncate(length, how).await
    }

    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(DriverStatus {
            flags: StatusFlags::RAW | StatusFlags::OFFSET_VALID,
            len,
            file_offset: offset,
        })
    }

    async fn reopen(self: Arc<Self>, _: Request, _: block_core::driver::Reopen) -> Result<()> {
        Ok(())
    }

    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
