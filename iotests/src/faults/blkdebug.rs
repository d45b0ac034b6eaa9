//! `blkdebug`: a filter that fails, delays, tears or changes requests by rules, stops them at breakpoints, and overrides
//! limits. The rules are in `rules` and `config`, their state in `debugger`; this file carries out what they say.
//!
//! It never changes a request that no rule applies to.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use block_core::{
    Buffer, DebugEvent, Error, ErrorKind, Graph, Node, Result,
    buffer::{IoBuf, IoBufMut},
    driver::{
        BlockDriver, Capabilities, ChildRole, DriverKind, Reopen, Truncate,
        default_child_permissions,
    },
    flags::{PermissionSet, Permissions, RequestFlags},
    limits::Limits,
    node::Edges,
    options::{Options, Size},
    registry::{DriverFactory, OpenContext, Opened, Registry},
    request::{Child, Request},
    status::DriverStatus,
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    config,
    debugger::{Debugger, Observer, Verdict},
    pass,
    rules::{InjectError, InjectFault, IoType, Rule, SetState},
};
use crate::sim::yield_now;

/// The largest limit that can be asked for, in bytes.
const MAX_LIMIT: u64 = (1 << 31) - 1;

/// A node whose requests meet the rules of its [`Debugger`].
pub struct Blkdebug {
    debugger: Arc<Debugger>,
    child: Capabilities,
    read_only: AtomicBool,
    /// What was overridden.
    limits: Limits,
    taken: Permissions,
    unshared: Permissions,
}

impl Blkdebug {
    /// The rules and breakpoints.
    pub fn debugger(&self) -> &Arc<Debugger> {
        &self.debugger
    }

    /// What is to be done to a request, after its delay. A request that fails at once does so here.
    async fn meet(&self, request: &Request, io: IoType, offset: u64, len: u64) -> Result<Verdict> {
        let verdict = self.debugger.judge(io, offset, len);
        if verdict.delay > 0 {
            let delay = Duration::from_millis(verdict.delay);
            request.env().sleep(delay).await;
        }
        match verdict.fail {
            None => Ok(verdict),
            Some((errno, immediately)) => {
                if !immediately {
                    yield_now().await;
                }
                Err(injected(errno))
            }
        }
    }
}

fn injected(errno: i32) -> Error {
    Error::from_kind(ErrorKind::from_errno(errno))
}

/// Reads; what lies beyond the end of the child, up to the alignment that was asked for, is zeroes.
async fn read_child(child: &Child, offset: u64, mut buf: IoBufMut) -> Result<()> {
    let inside = child.length().saturating_sub(offset).min(buf.len() as u64) as usize;
    if inside < buf.len() {
        buf.split_off(inside).fill(0);
    }
    if buf.is_empty() {
        return Ok(());
    }
    child.read(offset, buf).await
}

fn flip(bytes: &mut [u8], flips: &[u64]) {
    for bit in flips {
        if let Some(byte) = bytes.get_mut((bit / 8) as usize) {
            *byte ^= 1 << (bit % 8);
        }
    }
}

#[async_trait]
impl BlockDriver for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        let all = pass::capabilities(self.child, self.read_only.load(Ordering::Acquire));
        all | Capabilities::DEBUG_EVENTS
    }

    fn length(&self, edges: &Edges) -> u64 {
        pass::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        pass::limits(edges, self.limits)
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        let read_only = self.read_only.load(Ordering::Acquire);
        let mut set = default_child_permissions(role, parents, read_only);
        set.used |= self.taken;
        set.shared -= self.unshared;
        set
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, mut buf: IoBufMut) -> Result<()> {
        let len = buf.len() as u64;
        let verdict = self.meet(&request, IoType::Read, offset, len).await?;
        let file = request.file()?;
        if let Some((bytes, errno)) = verdict.cut {
            let mut rest = buf.split_off(bytes as usize);
            if !buf.is_empty() {
                read_child(file, offset, buf).await?;
            }
            if errno != 0 {
                return Err(injected(errno));
            }
            rest.fill(0);
            return Ok(());
        }
        if verdict.flips.is_empty() {
            return read_child(file, offset, buf).await;
        }
        let (lent, whole) = Buffer::try_new(buf.len())?.lend();
        read_child(file, offset, whole).await?;
        let mut bytes = lent.reclaim().map_err(|_| kept())?;
        flip(&mut bytes, &verdict.flips);
        buf.copy_from_slice(0, &bytes);
        Ok(())
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let len = buf.len() as u64;
        let verdict = self.meet(&request, IoType::Write, offset, len).await?;
        let file = request.file()?;
        let mut data = buf;
        if !verdict.flips.is_empty() {
            let mut bytes = data.to_vec();
            flip(&mut bytes, &verdict.flips);
            data = IoBuf::from(bytes);
        }
        let Some((bytes, errno)) = verdict.cut else {
            return file.write(offset, data, flags).await;
        };
        let front = data.slice(..bytes as usize);
        if !front.is_empty() {
            file.write(offset, front, flags).await?;
        }
        if errno == 0 {
            Ok(())
        } else {
            Err(injected(errno))
        }
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let verdict = self
            .meet(&request, IoType::WriteZeroes, offset, len)
            .await?;
        let file = request.file()?;
        let Some((bytes, errno)) = verdict.cut else {
            return file.write_zeroes(offset, len, flags).await;
        };
        if bytes > 0 {
            file.write_zeroes(offset, bytes, flags).await?;
        }
        if errno == 0 {
            Ok(())
        } else {
            Err(injected(errno))
        }
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        self.meet(&request, IoType::Discard, offset, len).await?;
        request.file()?.discard(offset, len).await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        self.meet(&request, IoType::Flush, 0, 0).await?;
        request.file()?.flush().await
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        request.file()?.truncate(length, how).await
    }

    async fn block_status(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        self.meet(&request, IoType::BlockStatus, offset, len)
            .await?;
        Ok(pass::status(offset, len))
    }

    async fn reopen(self: Arc<Self>, _request: Request, changes: Reopen) -> Result<()> {
        if let Some(read_only) = pass::reopen(&changes)? {
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn debug_event(self: Arc<Self>, event: DebugEvent) {
        self.debugger.event(event).await;
    }

    async fn close(self: Arc<Self>, _request: Request) -> Result<()> {
        self.debugger.resume_all();
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("blkdebug-injected", self.debugger.injected())]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn kept() -> Error {
    Error::io("a driver kept a part of a read buffer")
}

/// The debugger that hears the events of `node`: that of the nearest `blkdebug` node at or below it.
pub fn debugger_below(node: &Arc<Node>) -> Option<Arc<Debugger>> {
    let mut at = node.clone();
    loop {
        if let Some(found) = at.driver().as_any().downcast_ref::<Blkdebug>() {
            return Some(found.debugger.clone());
        }
        let edges = at.edges();
        let next = edges.child(ChildRole::File).or_else(|| edges.primary())?;
        at = next.node().clone();
    }
}

/// Removes all breakpoints of a graph and lets all requests go on that stand at one: to be called before nodes are
/// closed, which waits for requests.
pub fn resume_all(graph: &Graph) {
    for node in graph.nodes() {
        if let Some(found) = node.driver().as_any().downcast_ref::<Blkdebug>() {
            found.debugger.resume_all();
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct BlkdebugOptions {
    config: Option<String>,
    align: Size,
    max_transfer: Size,
    opt_write_zero: Size,
    max_write_zero: Size,
    opt_discard: Size,
    max_discard: Size,
    inject_error: Vec<InjectError>,
    set_state: Vec<SetState>,
    inject_fault: Vec<InjectFault>,
    take_child_perms: Vec<String>,
    unshare_child_perms: Vec<String>,
}

fn permissions(key: &str, names: &[String]) -> Result<Permissions> {
    const NAMES: &str = "consistent-read, write, write-unchanged or resize";
    names
        .iter()
        .map(|name| {
            Ok(match name.as_str() {
                "consistent-read" => Permissions::CONSISTENT_READ,
                "write" => Permissions::WRITE,
                "write-unchanged" => Permissions::WRITE_UNCHANGED,
                "resize" => Permissions::RESIZE,
                _ => {
                    let text = format!("Parameter '{key}' does not accept value '{name}'");
                    return Err(Error::invalid(text).with_field(key, name, NAMES));
                }
            })
        })
        .collect()
}

impl BlkdebugOptions {
    fn rules(&mut self) -> Result<Vec<Rule>> {
        let errors = self.inject_error.drain(..).map(InjectError::rule);
        let states = self.set_state.drain(..).map(SetState::rule);
        let faults = self.inject_fault.drain(..).map(InjectFault::rule);
        errors.chain(states).chain(faults).collect()
    }

    /// What is overridden, after a look at whether it fits together and fits the child.
    fn limits(&self, child: &Limits) -> Result<Limits> {
        let refuse = |name: &str, value: u64, allowed: String| {
            Err(
                Error::invalid(format!("Cannot meet constraints with {name} {value}"))
                    .with_field(name, value, allowed),
            )
        };
        let align = self.align.0;
        if align != 0
            && (align > MAX_LIMIT
                || !align.is_power_of_two()
                || align % child.request_alignment.max(1) != 0)
        {
            let allowed = format!(
                "a power of two that is a multiple of {}",
                child.request_alignment.max(1)
            );
            return refuse("align", align, allowed);
        }
        let align = align.max(child.request_alignment).max(1);
        let zeroes = self.opt_write_zero.0.max(align);
        let discard = self.opt_discard.0.max(align);
        for (name, value, unit) in [
            ("max-transfer", self.max_transfer.0, align),
            ("opt-write-zero", self.opt_write_zero.0, align),
            ("max-write-zero", self.max_write_zero.0, zeroes),
            ("opt-discard", self.opt_discard.0, align),
            ("max-discard", self.max_discard.0, discard),
        ] {
            if value % unit != 0 || value > MAX_LIMIT {
                let allowed = format!("a multiple of {unit}, at most {MAX_LIMIT}");
                return refuse(name, value, allowed);
            }
        }
        Ok(Limits {
            request_alignment: align,
            max_transfer: self.max_transfer.0,
            zeroes_alignment: self.opt_write_zero.0,
            max_zeroes: self.max_write_zero.0,
            discard_alignment: self.opt_discard.0,
            max_discard: self.max_discard.0,
            ..Limits::default()
        })
    }
}

/// Makes `blkdebug` nodes. File names: `blkdebug:CONFIG:FILE` and `blkdebug::FILE`.
#[derive(Clone, Default)]
pub struct BlkdebugFactory {
    observer: Option<Observer>,
}

impl BlkdebugFactory {
    /// A factory whose nodes tell `observer` when a request stops and goes on.
    #[must_use]
    pub fn with_observer(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }
}

#[async_trait]
impl DriverFactory for BlkdebugFactory {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn parse_filename(&self, registry: &Registry, rest: &str) -> Option<Result<Options>> {
        Some(rest.split_once(':').map_or_else(
            || {
                Err(Error::invalid(
                    "blkdebug requires both config file and image path",
                ))
            },
            |(config, image)| {
                let image = registry.filename_options(image)?;
                let mut options = Options::new()
                    .with("driver", "blkdebug")
                    .with("image", Value::Object(image.0));
                if !config.is_empty() {
                    options.set("config", config);
                }
                Ok(options)
            },
        ))
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let image = pass::required(&context, &mut options, "image").await?;
        let mut options: BlkdebugOptions = options.parse()?;
        let mut rules = options.rules()?;
        if let Some(name) = &options.config {
            let bytes = pass::read_file(&context, name)
                .await
                .map_err(|error| unreadable(&error, name))?;
            let text = String::from_utf8(bytes).map_err(|_| {
                Error::invalid("The blkdebug config file is not text").with_file(name)
            })?;
            rules.extend(config::parse(&text, name)?);
        }
        let child = Child::unattached(image.clone());
        let driver = Blkdebug {
            limits: options.limits(&child.limits())?,
            taken: permissions("take-child-perms", &options.take_child_perms)?,
            unshared: permissions("unshare-child-perms", &options.unshare_child_perms)?,
            debugger: Arc::new(Debugger::new(rules, self.observer.clone())),
            child: child.driver().capabilities(),
            read_only: AtomicBool::new(context.node.read_only),
        };
        Ok(Opened {
            driver: Arc::new(driver),
            edges: vec![(ChildRole::Filtered, "image".to_owned(), image)],
        })
    }
}

fn unreadable(error: &Error, name: &str) -> Error {
    Error::new(
        error.kind(),
        format!(
            "Could not read blkdebug config file: {}",
            error.kind().strerror()
        ),
    )
    .with_file(name)
}
