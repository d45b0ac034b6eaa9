//! `blkreplay`: records the order in which requests complete, and forces that order on a later run of the same workload. The
//! name and the child `image` are qemu's; how it works is ours (there it belongs to the replay of a whole machine).
//!
//! The record is text, one completed request a line: kind, offset, length. On replay a request is carried out when it
//! comes, and completes when all that completed before it in the record have. One that isn't in the rest of the record, or
//! whose turn doesn't come in time, fails: the runs differ. Data is neither recorded nor changed.

use std::{
    any::Any,
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    buffer::{IoBuf, IoBufMut},
    driver::{
        BlockDriver, Capabilities, ChildRole, DriverKind, Reopen, Truncate,
        default_child_permissions,
    },
    flags::{PermissionSet, Permissions, RequestFlags},
    limits::Limits,
    node::Edges,
    options::{Number, Options},
    registry::{DriverFactory, OpenContext, Opened},
    request::{Child, Request},
    status::DriverStatus,
};
use futures::{
    channel::oneshot,
    future::{Either, select},
};
use parking_lot::Mutex;
use serde::Deserialize;

use super::pass;

/// How long a request waits for its turn when nothing else was asked for, in milliseconds.
const DEFAULT_PATIENCE: u64 = 10_000;

/// One completed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    kind: Kind,
    offset: u64,
    len: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zeroes,
    Discard,
    Flush,
    Truncate,
}

const KINDS: [(Kind, &str); 6] = [
    (Kind::Read, "read"),
    (Kind::Write, "write"),
    (Kind::Zeroes, "write-zeroes"),
    (Kind::Discard, "discard"),
    (Kind::Flush, "flush"),
    (Kind::Truncate, "truncate"),
];

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = KINDS.iter().find(|(kind, _)| *kind == self.kind);
        let name = name.map_or("", |(_, name)| name);
        write!(f, "{name} {} {}", self.offset, self.len)
    }
}

fn parse_line(line: &str) -> Option<Record> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let (kind, _) = KINDS.iter().find(|(_, known)| *known == name)?;
    let offset = words.next()?.parse().ok()?;
    let len = words.next()?.parse().ok()?;
    let record = Record {
        kind: *kind,
        offset,
        len,
    };
    words.next().is_none().then_some(record)
}

fn parse(text: &str, file: &str) -> Result<VecDeque<Record>> {
    text.lines()
        .enumerate()
        .map(|(index, line)| {
            parse_line(line).ok_or_else(|| {
                Error::invalid("The recorded order can't be read")
                    .with_field(
                        format!("line {}", index + 1),
                        line,
                        "read, write, write-zeroes, discard, flush or truncate, offset, length",
                    )
                    .with_file(file)
            })
        })
        .collect()
}

/// What a node does with the order.
enum Mode {
    /// Where the next line goes, in bytes.
    Record(Mutex<u64>),
    Replay(Mutex<Replay>),
}

struct Replay {
    left: VecDeque<Record>,
    /// Those whose turn hasn't come, in the order in which they were done.
    waiting: Vec<(Record, oneshot::Sender<()>)>,
}

impl Replay {
    /// Takes the head off if it is `record`.
    fn is_next(&mut self, record: Record) -> bool {
        let next = self.left.front() == Some(&record);
        if next {
            self.left.pop_front();
        }
        next
    }

    /// Lets those go whose turn has come.
    fn advance(&mut self) {
        while let Some(head) = self.left.front().copied() {
            let Some(at) = self.waiting.iter().position(|(record, _)| *record == head) else {
                return;
            };
            let (_, go) = self.waiting.remove(at);
            // One that gave up has left its place to the next of its like.
            if go.send(()).is_ok() {
                self.left.pop_front();
            }
        }
    }
}

/// A node that records or forces the order of completions.
pub struct Blkreplay {
    child: Capabilities,
    read_only: AtomicBool,
    mode: Mode,
    patience: Duration,
    held_back: AtomicU64,
}

impl Blkreplay {
    async fn done(&self, request: &Request, kind: Kind, offset: u64, len: u64) -> Result<()> {
        let record = Record { kind, offset, len };
        match &self.mode {
            Mode::Record(end) => {
                let line = format!("{record}\n");
                let at = {
                    let mut end = end.lock();
                    let at = *end;
                    *end += line.len() as u64;
                    at
                };
                let log = request
                    .child(ChildRole::Target)
                    .ok_or_else(|| Error::invalid("Parameter 'log' is missing"))?;
                log.write(at, line.into_bytes(), RequestFlags::empty())
                    .await
            }
            Mode::Replay(replay) => self.take_turn(request, replay, record).await,
        }
    }

    async fn take_turn(
        &self,
        request: &Request,
        replay: &Mutex<Replay>,
        record: Record,
    ) -> Result<()> {
        let turn = {
            let mut replay = replay.lock();
            if replay.is_next(record) {
                replay.advance();
                return Ok(());
            }
            let wanted = replay.left.iter().filter(|next| **next == record).count();
            let claimed = replay
                .waiting
                .iter()
                .filter(|(waiting, go)| *waiting == record && !go.is_canceled())
                .count();
            if wanted <= claimed {
                return Err(Error::io(format!(
                    "blkreplay: '{record}' isn't in the rest of the recorded order"
                )));
            }
            let (go, turn) = oneshot::channel();
            replay.waiting.push((record, go));
            turn
        };
        self.held_back.fetch_add(1, Ordering::Relaxed);
        match select(turn, request.env().sleep(self.patience)).await {
            Either::Left((Ok(()), _)) => Ok(()),
            Either::Left((Err(oneshot::Canceled), _)) => {
                Err(Error::from_kind(ErrorKind::Cancelled))
            }
            Either::Right(((), turn)) => {
                drop(turn);
                let next = replay.lock().left.front().copied();
                let next = next.map_or_else(|| "nothing".to_owned(), |next| next.to_string());
                Err(Error::io(format!(
                    "blkreplay: '{record}' waited in vain for '{next}', which was recorded before it"
                )))
            }
        }
    }
}

#[async_trait]
impl BlockDriver for Blkreplay {
    fn name(&self) -> &'static str {
        "blkreplay"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    fn capabilities(&self) -> Capabilities {
        pass::capabilities(self.child, self.read_only.load(Ordering::Acquire))
    }

    fn length(&self, edges: &Edges) -> u64 {
        pass::length(edges)
    }

    fn limits(&self, edges: &Edges) -> Limits {
        pass::limits(edges, Limits::default())
    }

    fn child_permissions(&self, role: ChildRole, parents: PermissionSet) -> PermissionSet {
        if role == ChildRole::Target {
            let used = Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE;
            return PermissionSet::new(used, Permissions::CONSISTENT_READ);
        }
        default_child_permissions(role, parents, self.read_only.load(Ordering::Acquire))
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        let len = buf.len() as u64;
        let result = image(&request)?.read(offset, buf).await;
        self.done(&request, Kind::Read, offset, len).await?;
        result
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        let len = buf.len() as u64;
        let result = image(&request)?.write(offset, buf, flags).await;
        self.done(&request, Kind::Write, offset, len).await?;
        result
    }

    async fn write_zeroes(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<()> {
        let result = image(&request)?.write_zeroes(offset, len, flags).await;
        self.done(&request, Kind::Zeroes, offset, len).await?;
        result
    }

    async fn discard(self: Arc<Self>, request: Request, offset: u64, len: u64) -> Result<()> {
        let result = image(&request)?.discard(offset, len).await;
        self.done(&request, Kind::Discard, offset, len).await?;
        result
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        let result = image(&request)?.flush().await;
        self.done(&request, Kind::Flush, 0, 0).await?;
        result
    }

    async fn truncate(self: Arc<Self>, request: Request, length: u64, how: Truncate) -> Result<()> {
        let result = image(&request)?.truncate(length, how).await;
        self.done(&request, Kind::Truncate, length, 0).await?;
        result
    }

    async fn block_status(
        self: Arc<Self>,
        _request: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        Ok(pass::status(offset, len))
    }

    async fn reopen(self: Arc<Self>, _request: Request, changes: Reopen) -> Result<()> {
        if let Some(read_only) = pass::reopen(&changes)? {
            self.read_only.store(read_only, Ordering::Release);
        }
        Ok(())
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        match request.child(ChildRole::Target) {
            Some(log) => log.flush().await,
            None => Ok(()),
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let held_back = self.held_back.load(Ordering::Relaxed);
        let left = match &self.mode {
            Mode::Record(_) => 0,
            Mode::Replay(replay) => replay.lock().left.len() as u64,
        };
        vec![("blkreplay-held-back", held_back), ("blkreplay-left", left)]
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn image(request: &Request) -> Result<&Child> {
    request.file()
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeOption {
    Record,
    Replay,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct BlkreplayOptions {
    mode: ModeOption,
    log: String,
    #[serde(default)]
    timeout_ms: Option<Number>,
}

/// Makes `blkreplay` nodes: the child `image`; `mode`, `record` or `replay`; `log`, the name of the file with the order;
/// `timeout-ms`, how long a request waits for its turn.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlkreplayFactory;

#[async_trait]
impl DriverFactory for BlkreplayFactory {
    fn name(&self) -> &'static str {
        "blkreplay"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Filter
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let image = pass::required(&context, &mut options, "image").await?;
        let options: BlkreplayOptions = options.parse()?;
        let mut edges = vec![(ChildRole::Filtered, "image".to_owned(), image.clone())];
        let mode = match options.mode {
            ModeOption::Record => {
                let log = pass::create_file(&context, &options.log).await?;
                edges.push((ChildRole::Target, "log".to_owned(), log));
                Mode::Record(Mutex::new(0))
            }
            ModeOption::Replay => {
                let bytes = pass::read_file(&context, &options.log).await?;
                let text = String::from_utf8(bytes).map_err(|_| {
                    Error::invalid("The recorded order is not text").with_file(&*options.log)
                })?;
                Mode::Replay(Mutex::new(Replay {
                    left: parse(&text, &options.log)?,
                    waiting: Vec::new(),
                }))
            }
        };
        let patience = options.timeout_ms.map_or(DEFAULT_PATIENCE, |given| given.0);
        let driver = Blkreplay {
            child: image.driver().capabilities(),
            read_only: AtomicBool::new(context.node.read_only),
            mode,
            patience: Duration::from_millis(patience),
            held_back: AtomicU64::new(0),
        };
        Ok(Opened {
            driver: Arc::new(driver),
            edges,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written() {
        for text in ["read 0 4096", "write-zeroes 512 1024", "flush 0 0"] {
            assert_eq!(parse_line(text).unwrap().to_string(), text);
        }
        for text in ["", "read", "read 1", "read 1 x", "read 1 2 3", "bogus 1 2"] {
            assert!(parse_line(text).is_none(), "{text}");
        }
        let error = parse("read 0 1\nbogus\n", "order.log").unwrap_err();
        assert_eq!(error.field().unwrap().name, "line 2");
    }
}
