//! What each qemu-io command does. Messages and their place (standard output for results, standard error for usage) are
//! qemu-io's.

use std::{sync::Arc, time::Instant};

use block_core::{
    BlockHandle, Buffer, Capabilities, Error, ErrorKind, IoBuf, IoBufMut, Permissions,
    RequestFlags,
    driver::{Preallocation, Reopen, Truncate},
};

use super::{
    breakpoints, help,
    line::{Given, MAX_REQUEST, number, pattern},
    report,
    session::{OpenHow, Session, cache_mode},
};
use crate::common::output::{complain, put, say};

/// What the shell does after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Goes on.
    Done,
    /// Goes on, and remembers that something failed.
    Failed,
    /// Ends.
    Quit,
}

use Outcome::{Done, Failed, Quit};

/// Why a command wasn't carried out. An empty text asks for the usage line.
struct Refused {
    text: String,
    place: Place,
}

/// Where a refusal is to be read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On standard output, as most of qemu-io's are.
    Output,
    /// On standard error, with the program's name before it.
    Reported,
    /// On standard error.
    Bare,
}

/// A refusal that goes to standard output.
fn refuse<T>(text: impl Into<String>) -> Result<T, Refused> {
    Err(Refused {
        text: text.into(),
        place: Place::Output,
    })
}

/// A refusal that goes to standard error, with the program's name before it.
fn reported(text: impl Into<String>) -> Refused {
    Refused {
        text: text.into(),
        place: Place::Reported,
    }
}

/// A refusal that goes to standard error as it is.
fn on_stderr(text: String) -> Refused {
    Refused {
        text,
        place: Place::Bare,
    }
}

impl From<String> for Refused {
    fn from(text: String) -> Self {
        Self {
            text,
            place: Place::Output,
        }
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self {
            text: error.reason(),
            place: Place::Reported,
        }
    }
}

type Answer = Result<Outcome, Refused>;

/// Runs one command line that has at least one word.
pub async fn run(session: &mut Session, program: &str, words: &[&str]) -> Outcome {
    let Some((name, args)) = words.split_first() else {
        return Done;
    };
    let Some(command) = help::find(name) else {
        complain!("command \"{name}\" not found");
        return Failed;
    };
    let needs_image = !matches!(
        command.name,
        "open" | "help" | "quit" | "sleep" | "abort" | "sigraise"
    );
    if needs_image && session.image.is_none() {
        complain!("no file open, try 'help open'");
        return Failed;
    }
    if command.writes && session.image.as_ref().is_some_and(|image| image.read_only) {
        complain!("{program}: Block node is read-only");
        return Failed;
    }
    if let Err(text) = command.check_count(name, args) {
        complain!("{text}");
        return Failed;
    }
    let given = match Given::parse(command.name, command.options, args) {
        Ok(given) => given,
        Err(text) => {
            complain!("{text}");
            say!("{}", command.usage());
            return Failed;
        }
    };
    let answer = match command.name {
        "read" => read(session, &given, false).await,
        "readv" => read(session, &given, true).await,
        "write" => write(session, &given, WriteCommand::Write).await,
        "writev" => write(session, &given, WriteCommand::Writev).await,
        "aio_read" => aio_read(session, &given),
        "aio_write" => aio_write(session, &given),
        "aio_flush" => {
            session.settle().await;
            Ok(Done)
        }
        "flush" => flush(session).await,
        "discard" => discard(session, &given).await,
        "alloc" => alloc(session, &given).await,
        "map" => map(session).await,
        "length" => length(session),
        "truncate" => truncate(session, &given).await,
        "info" => info(session).await,
        "sleep" => sleep(session, &given).await,
        "sigraise" => raise(&given),
        "abort" => std::process::abort(),
        name if name.starts_with("zone_") => zones(name, &given),
        name @ ("break" | "remove_break" | "resume" | "wait_break") => {
            Ok(breakpoints::run(session, name, &given.rest).await)
        }
        "open" => open(session, program, &given).await,
        "close" => session.close().await.map(|()| Done).map_err(Refused::from),
        "reopen" => reopen(session, program, &given).await,
        "help" => Ok(help::show(given.rest.first().map(String::as_str))),
        _ => Ok(Quit),
    };
    match answer {
        Ok(outcome) => outcome,
        Err(Refused { text, .. }) if text.is_empty() => {
            say!("{}", command.usage());
            Failed
        }
        Err(Refused { text, place }) => {
            match place {
                Place::Output => say!("{text}"),
                Place::Reported => complain!("{program}: {text}"),
                Place::Bare => complain!("{text}"),
            }
            Failed
        }
    }
}

fn handle(session: &Session) -> Result<Arc<BlockHandle>, Refused> {
    session
        .handle()
        .cloned()
        .ok_or_else(|| "no file open, try 'help open'".to_owned().into())
}

fn failed(what: &str, error: &Error) -> Outcome {
    say!("{what} failed: {}", error.kind().strerror());
    tracing::debug!("{what}: {error}");
    Failed
}

/// How many bytes a command may ask for in one request.
#[derive(Clone, Copy)]
enum Limit {
    /// Of each of the lengths, and of their sum.
    Vector,
    /// Of the one length; the text is what the message says of an exception.
    One(&'static str),
    /// None.
    Unbounded,
}

/// Offset, and the sum and parts of the lengths that follow.
fn ranges(given: &Given, limit: Limit) -> Result<(u64, u64, Vec<u64>), Refused> {
    let (offset, lengths) = match given.rest.as_slice() {
        [offset, lengths @ ..]
            if !lengths.is_empty() && (matches!(limit, Limit::Vector) || lengths.len() == 1) =>
        {
            (number(offset)?, lengths)
        }
        _ => return refuse(""),
    };
    let mut parts = Vec::with_capacity(lengths.len());
    let mut total = 0u64;
    for text in lengths {
        let len = number(text)?;
        match limit {
            Limit::Vector if len > MAX_REQUEST => {
                return refuse(format!(
                    "Argument '{text}' exceeds maximum size {MAX_REQUEST}"
                ));
            }
            Limit::Vector if total + len > MAX_REQUEST => {
                return refuse(format!(
                    "The total number of bytes exceed the maximum size {MAX_REQUEST}"
                ));
            }
            Limit::One(but) if len > MAX_REQUEST => {
                return refuse(format!(
                    "length cannot exceed {MAX_REQUEST}{but}, given {text}"
                ));
            }
            _ => {}
        }
        total += len;
        parts.push(len);
    }
    Ok((offset, total, parts))
}

/// What a read is to be compared with.
#[derive(Clone, Copy)]
struct Verify {
    byte: u8,
    start: usize,
    len: usize,
}

/// Everything that a read prints after it has ended.
struct ReadReport {
    offset: u64,
    total: u64,
    verify: Option<Verify>,
    dump: bool,
    quiet: bool,
    machine: bool,
    begun: Instant,
}

impl ReadReport {
    fn finish(&self, data: &[u8]) -> Outcome {
        let elapsed = self.begun.elapsed();
        let mut outcome = Done;
        if let Some(verify) = self.verify {
            let part = &data[verify.start..verify.start + verify.len];
            if part.iter().any(|byte| *byte != verify.byte) {
                say!(
                    "Pattern verification failed at offset {}, {} bytes",
                    self.offset + verify.start as u64,
                    verify.len
                );
                outcome = Failed;
            }
        }
        if !self.quiet {
            if self.dump {
                put!("{}", report::dump(data, self.offset));
            }
            let (offset, total) = (self.offset, self.total);
            put!(
                "{}",
                report::request("read", elapsed, offset, total, total, 1, self.machine)
            );
        }
        outcome
    }
}

fn prepare_read(given: &Given, vectored: bool) -> Result<(ReadReport, Vec<usize>), Refused> {
    let byte = given.value('P').map(pattern).transpose()?;
    let limit = if vectored {
        Limit::Vector
    } else {
        Limit::One("")
    };
    let (offset, total, parts) = ranges(given, limit)?;
    let parts = parts.into_iter().map(|len| len as usize).collect();
    if (given.has('s') || given.has('l')) && byte.is_none() {
        return refuse("");
    }
    let verify = match byte {
        None => None,
        Some(byte) => {
            let start = given.value('s').map(number).transpose()?.unwrap_or(0);
            let len = given.value('l').map(number).transpose()?;
            let len = len.unwrap_or(total.saturating_sub(start));
            if start.checked_add(len).is_none_or(|end| end > total) {
                return refuse("pattern verification range exceeds end of read data");
            }
            Some(Verify {
                byte,
                start: start as usize,
                len: len as usize,
            })
        }
    };
    let report = ReadReport {
        offset,
        total,
        verify,
        dump: given.has('v'),
        quiet: given.has('q'),
        machine: given.has('C'),
        begun: Instant::now(),
    };
    Ok((report, parts))
}

/// Reads into separate buffers, one per part, and joins them.
async fn read_parts(
    handle: &BlockHandle,
    offset: u64,
    parts: &[usize],
    flags: RequestFlags,
) -> block_core::Result<Vec<u8>> {
    let mut lent = Vec::with_capacity(parts.len());
    let mut all = IoBufMut::new();
    for len in parts {
        let (keep, buf) = Buffer::try_new(*len)?.lend();
        lent.push(keep);
        all.append(buf);
    }
    handle.readv(offset, all, flags).await?;
    let mut data = Vec::with_capacity(parts.iter().sum());
    for keep in lent {
        let buffer = keep
            .reclaim()
            .map_err(|_| Error::io("a read buffer is still in use"))?;
        data.extend_from_slice(&buffer);
    }
    Ok(data)
}

async fn read(session: &Session, given: &Given, vectored: bool) -> Answer {
    let handle = handle(session)?;
    let (mut report, parts) = prepare_read(given, vectored)?;
    if given.has('b') {
        check_sectors(report.offset, report.total)?;
        report.begun = Instant::now();
        let len = report.total as usize;
        return match session
            .drive(handle.read_vm_state(report.offset, len))
            .await
        {
            Ok(data) => Ok(report.finish(&data)),
            Err(error) => Ok(failed("read", &error)),
        };
    }
    let flags = if session
        .image
        .as_ref()
        .is_some_and(|image| image.copy_on_read)
    {
        RequestFlags::COPY_ON_READ
    } else {
        RequestFlags::empty()
    };
    report.begun = Instant::now();
    match session
        .drive(read_parts(&handle, report.offset, &parts, flags))
        .await
    {
        Ok(data) => Ok(report.finish(&data)),
        Err(error) => Ok(failed(if vectored { "readv" } else { "read" }, &error)),
    }
}

fn aio_read(session: &Session, given: &Given) -> Answer {
    let handle = handle(session)?;
    if given.has('i') {
        say!("injecting invalid read request");
        return Ok(Done);
    }
    let (report, parts) = prepare_read(given, true)?;
    session.start(async move {
        match read_parts(&handle, report.offset, &parts, RequestFlags::empty()).await {
            Ok(data) => {
                report.finish(&data);
            }
            Err(error) => say!("readv failed: {}", error.kind().strerror()),
        }
    });
    Ok(Done)
}

/// VM state is read and written in whole sectors.
fn check_sectors(offset: u64, count: u64) -> Result<(), Refused> {
    for (value, name) in [(offset, "offset"), (count, "count")] {
        if value % 512 != 0 {
            return refuse(format!(
                "{value} is not a sector-aligned value for '{name}'"
            ));
        }
    }
    Ok(())
}

/// What a write writes.
enum Payload {
    Data(IoBuf),
    Zeroes,
    VmState(IoBuf),
}

struct WritePlan {
    offset: u64,
    total: u64,
    payload: Payload,
    flags: RequestFlags,
    quiet: bool,
    machine: bool,
}

impl WritePlan {
    async fn run(self, handle: &BlockHandle, failure: &str) -> Outcome {
        let begun = Instant::now();
        let result = match self.payload {
            Payload::Zeroes => {
                handle
                    .write_zeroes(self.offset, self.total, self.flags)
                    .await
            }
            Payload::Data(data) => handle.write(self.offset, data, self.flags).await,
            Payload::VmState(data) => handle.write_vm_state(self.offset, data).await,
        };
        match result {
            Err(error) => {
                let can = handle.node().driver().capabilities();
                if self.flags.contains(RequestFlags::WRITE_COMPRESSED)
                    && error.kind() == ErrorKind::NotSupported
                    && can.contains(Capabilities::COMPRESSED)
                    && error.reason() != error.kind().strerror()
                {
                    // A format that can, and doesn't want to: it says what would have to be different.
                    complain!("{}", error.reason());
                }
                failed(failure, &error)
            }
            Ok(()) => {
                if !self.quiet {
                    let (offset, total) = (self.offset, self.total);
                    let elapsed = begun.elapsed();
                    put!(
                        "{}",
                        report::request("wrote", elapsed, offset, total, total, 1, self.machine)
                    );
                }
                Done
            }
        }
    }
}

/// Which of the commands that write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WriteCommand {
    Write,
    Writev,
    AioWrite,
}

fn prepare_write(given: &Given, command: WriteCommand) -> Result<WritePlan, Refused> {
    let mut flags = RequestFlags::empty();
    let zero = given.has('z');
    for (letter, flag) in [
        ('f', RequestFlags::FUA),
        ('u', RequestFlags::MAY_UNMAP),
        ('n', RequestFlags::NO_FALLBACK),
        ('c', RequestFlags::WRITE_COMPRESSED),
    ] {
        if given.has(letter) {
            flags |= flag;
        }
    }
    if given.has('b') && zero {
        return refuse("-b and -z cannot be specified at the same time");
    }
    if given.has('f') && (given.has('b') || given.has('c')) {
        return refuse("-f and -b or -c cannot be specified at the same time");
    }
    if given.has('n') && !zero {
        return refuse("-n requires -z to be specified");
    }
    if given.has('u') && !zero {
        return refuse("-u requires -z to be specified");
    }
    let sources = usize::from(zero) + usize::from(given.has('P')) + usize::from(given.has('s'));
    if sources > 1 && command == WriteCommand::Write {
        return refuse("Only one of -z, -P, and -s can be specified at the same time");
    }
    if zero {
        // There is nothing to compress.
        flags -= RequestFlags::WRITE_COMPRESSED;
    }
    let byte = given.value('P').map(pattern).transpose()?.unwrap_or(0xcd);
    if zero && command == WriteCommand::AioWrite && given.rest.len() > 2 {
        return refuse("-z supports only a single length parameter");
    }
    let limit = match command {
        WriteCommand::Write if given.has('n') => Limit::Unbounded,
        WriteCommand::Write => Limit::One(" without -n"),
        WriteCommand::AioWrite if zero => Limit::Unbounded,
        WriteCommand::Writev | WriteCommand::AioWrite => Limit::Vector,
    };
    let (offset, total, parts) = ranges(given, limit)?;
    if given.has('b') {
        check_sectors(offset, total)?;
    }
    let payload = if zero {
        Payload::Zeroes
    } else if let Some(name) = given.value('s') {
        Payload::Data(IoBuf::from(pattern_file(name, total as usize)?))
    } else {
        let mut all = IoBuf::new();
        for len in parts {
            let mut part = Buffer::try_new(len as usize)?;
            part.fill(byte);
            all.append(IoBuf::from(part));
        }
        Payload::Data(all)
    };
    let payload = match payload {
        Payload::Data(data) if given.has('b') => {
            // That isn't compressed.
            flags -= RequestFlags::WRITE_COMPRESSED;
            Payload::VmState(data)
        }
        other => other,
    };
    Ok(WritePlan {
        offset,
        total,
        payload,
        flags,
        quiet: given.has('q'),
        machine: given.has('C'),
    })
}

/// `len` bytes of the file, over and over.
fn pattern_file(name: &str, len: usize) -> Result<Buffer, Refused> {
    use std::io::Read;
    let mut content = Vec::new();
    std::fs::File::open(name)
        .and_then(|file| file.take(len as u64).read_to_end(&mut content))
        .map_err(|error| on_stderr(format!("{name}: {}", Error::from(error).kind().strerror())))?;
    if content.is_empty() {
        return Err(on_stderr(format!("{name}: file is empty")));
    }
    let mut data = Buffer::try_new(len)?;
    for chunk in data.chunks_mut(content.len()) {
        chunk.copy_from_slice(&content[..chunk.len()]);
    }
    Ok(data)
}

async fn write(session: &Session, given: &Given, command: WriteCommand) -> Answer {
    let handle = handle(session)?;
    let plan = prepare_write(given, command)?;
    Ok(session.drive(plan.run(&handle, "write")).await)
}

fn aio_write(session: &Session, given: &Given) -> Answer {
    let handle = handle(session)?;
    if given.has('i') {
        say!("injecting invalid write request");
        return Ok(Done);
    }
    let plan = prepare_write(given, WriteCommand::AioWrite)?;
    session.start(async move {
        plan.run(&handle, "aio_write").await;
    });
    Ok(Done)
}

async fn flush(session: &Session) -> Answer {
    let handle = handle(session)?;
    session.drive(handle.flush()).await?;
    Ok(Done)
}

async fn discard(session: &Session, given: &Given) -> Answer {
    let handle = handle(session)?;
    let [offset, len] = given.rest.as_slice() else {
        return refuse("");
    };
    let (offset, len) = (number(offset)?, number(len)?);
    if len > MAX_REQUEST {
        let text = format!(
            "length cannot exceed {}, given {}",
            MAX_REQUEST, given.rest[1]
        );
        return refuse(text);
    }
    let begun = Instant::now();
    match session.drive(handle.discard(offset, len)).await {
        Err(error) => Ok(failed("discard", &error)),
        Ok(()) => {
            if !given.has('q') {
                let elapsed = begun.elapsed();
                let machine = given.has('C');
                put!(
                    "{}",
                    report::request("discard", elapsed, offset, len, len, 1, machine)
                );
            }
            Ok(Done)
        }
    }
}

async fn alloc(session: &Session, given: &Given) -> Answer {
    let handle = handle(session)?;
    let (offset, count) = match given.rest.as_slice() {
        [offset] => (number(offset)?, 512),
        [offset, count] => (number(offset)?, number(count)?),
        _ => return refuse(""),
    };
    let node = handle.node();
    let count = count.min(handle.length().saturating_sub(offset));
    let mut at = offset;
    let end = offset.saturating_add(count);
    let mut sum = 0;
    while at < end {
        let found = block_core::chain::is_allocated_at(&node, at, end - at);
        let (allocated, run) = session.drive(found).await?;
        if run == 0 {
            break;
        }
        if allocated {
            sum += run;
        }
        at += run;
    }
    say!(
        "{sum}/{count} bytes allocated at offset {}",
        report::size(offset as f64)
    );
    Ok(Done)
}

async fn map(session: &Session) -> Answer {
    let handle = handle(session)?;
    let node = handle.node();
    let end = handle.length();
    let mut at = 0;
    let mut run: Option<(u64, u64, bool)> = None;
    while at < end {
        let found = block_core::chain::is_allocated_at(&node, at, end - at);
        let (allocated, len) = session.drive(found).await?;
        if len == 0 {
            break;
        }
        run = match run {
            Some((start, sum, same)) if same == allocated => Some((start, sum + len, same)),
            Some(done) => {
                print_run(done);
                Some((at, len, allocated))
            }
            None => Some((at, len, allocated)),
        };
        at += len;
    }
    if let Some(run) = run {
        print_run(run);
    }
    Ok(Done)
}

fn print_run((start, len, allocated): (u64, u64, bool)) {
    say!(
        "{} ({len:#x}) bytes {} at offset {} ({start:#x})",
        report::size(len as f64),
        if allocated {
            "    allocated"
        } else {
            "not allocated"
        },
        report::size(start as f64),
    );
}

fn length(session: &Session) -> Answer {
    say!("{}", report::size(handle(session)?.length() as f64));
    Ok(Done)
}

async fn truncate(session: &Session, given: &Given) -> Answer {
    let handle = handle(session)?;
    let [length, ..] = given.rest.as_slice() else {
        return refuse("");
    };
    let preallocation = match given.value('m') {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => {
            return Err(reported(format!("Invalid preallocation mode '{other}'")));
        }
    };
    let length = number(length)?;
    let before = handle.permissions();
    let mut wanted = before;
    wanted.used |= Permissions::RESIZE;
    handle.set_permissions(wanted)?;
    let how = Truncate {
        exact: false,
        preallocation,
        zero: false,
    };
    let result = session.drive(handle.truncate(length, how)).await;
    handle.set_permissions(before)?;
    result?;
    Ok(Done)
}

async fn info(session: &Session) -> Answer {
    let handle = handle(session)?;
    let node = handle.node();
    let info = session.drive(handle.info()).await?;
    let cluster = info.cluster_size.unwrap_or(0);
    say!("format name: {}", node.driver().name());
    say!("cluster size: {}", report::size(cluster as f64));
    say!(
        "vm state offset: {}",
        report::size(vm_state_offset(&handle, cluster) as f64)
    );
    if let Some((_, data)) = &info.format_specific
        && node.driver().kind() == block_core::DriverKind::Format
    {
        say!("Format specific information:");
        print_tree(data, 1);
    }
    Ok(Done)
}

/// qcow2 keeps the VM state behind the last L1 entry of the disk; others have none.
fn vm_state_offset(handle: &BlockHandle, cluster: u64) -> u64 {
    if handle.node().driver().name() != "qcow2" || cluster == 0 {
        return 0;
    }
    let coverage = cluster / 8 * cluster;
    handle.length().div_ceil(coverage) * coverage
}

fn print_tree(value: &serde_json::Value, depth: usize) {
    let serde_json::Value::Object(map) = value else {
        return;
    };
    for (key, value) in map {
        let (pad, key) = ("    ".repeat(depth), key.replace('-', " "));
        match value {
            serde_json::Value::Object(_) => {
                say!("{pad}{key}:");
                print_tree(value, depth + 1);
            }
            serde_json::Value::Array(items) => {
                say!("{pad}{key}:");
                for (index, item) in items.iter().enumerate() {
                    say!("{pad}    [{index}]:");
                    print_tree(item, depth + 2);
                }
            }
            serde_json::Value::String(text) => say!("{pad}{key}: {text}"),
            other => say!("{pad}{key}: {other}"),
        }
    }
}

/// Whoever raises a signal wants to see what becomes of the image.
fn raise(given: &Given) -> Answer {
    let [signal] = given.rest.as_slice() else {
        return refuse("");
    };
    let signal = number(signal)?;
    crate::common::output::flush_out();
    if let Some(signal) = i32::try_from(signal).ok().filter(|signal| *signal > 0) {
        signal_hook::low_level::raise(signal).map_err(Error::from)?;
    }
    Ok(Done)
}

/// No storage that this program opens is zoned.
fn zones(command: &str, given: &Given) -> Answer {
    for text in &given.rest {
        number(text)?;
    }
    let what = command.replace('_', " ");
    say!("{what} failed: {}", ErrorKind::NotSupported.strerror());
    Ok(Failed)
}

async fn sleep(session: &Session, given: &Given) -> Answer {
    let [time] = given.rest.as_slice() else {
        return refuse("");
    };
    let hex = time.strip_prefix("0x").or_else(|| time.strip_prefix("0X"));
    let millis = match hex {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => time.parse(),
    };
    let millis = millis.map_err(|_| format!("{time} is not a valid number"))?;
    let time = std::time::Duration::from_millis(millis);
    session.drive(session.env().sleep(time)).await;
    Ok(Done)
}

async fn open(session: &mut Session, program: &str, given: &Given) -> Answer {
    if session.image.is_some() {
        return Err(reported("file open already, try 'help close'"));
    }
    let name = match given.rest.as_slice() {
        [] if given.has('o') => None,
        [name] => Some(name.as_str()),
        _ => return refuse(""),
    };
    let how = OpenHow {
        read_only: given.has('r'),
        copy_on_read: given.has('C'),
        force_share: given.has('U'),
        snapshot: given.has('s'),
        cache: given
            .value('t')
            .map(str::to_owned)
            .or_else(|| given.has('n').then(|| "none".into())),
        discard: given.value('d').map(str::to_owned),
        aio: given
            .value('i')
            .map(str::to_owned)
            .or_else(|| given.has('k').then(|| "native".into())),
        options: given.value('o').map(str::to_owned).into_iter().collect(),
        ..OpenHow::default()
    };
    how.check()?;
    if let Err(error) = session.open(name, &how).await {
        super::print_open_error(program, name, &error);
        return Ok(Failed);
    }
    Ok(Done)
}

async fn reopen(session: &mut Session, program: &str, given: &Given) -> Answer {
    if given.has('r') && given.has('w') {
        return Err(reported("Only one -r/-w option may be given"));
    }
    if !given.rest.is_empty() {
        return refuse("");
    }
    session.settle().await;
    let Some(image) = session.image.as_mut() else {
        return Ok(Failed);
    };
    let mut changes = Reopen::default();
    if let Some(text) = given.value('o') {
        let options = block_core::Options::from_text(text)?.0;
        if (given.has('r') || given.has('w')) && options.contains_key("read-only") {
            return Err(reported("Cannot set both -r/-w and 'read-only'"));
        }
        if given.has('c') && options.contains_key("cache") {
            return Err(reported("Cannot set both -c and the cache options"));
        }
        changes.options = options;
    }
    if let Some(mode) = given.value('c') {
        let (direct, no_flush, through) = cache_mode(mode)?;
        changes.options.insert("cache.direct".into(), direct.into());
        changes
            .options
            .insert("cache.no-flush".into(), no_flush.into());
        image.write_through = through;
    }
    let read_only = if given.has('r') {
        true
    } else {
        image.read_only && !given.has('w')
    };
    let switch = read_only != image.read_only;
    if switch {
        changes.read_only = Some(read_only);
    }
    let mut set = image.handle.permissions();
    if read_only {
        set.used -= Permissions::WRITE;
        image.handle.set_permissions(set)?;
    }
    if (switch || !changes.options.is_empty())
        && let Err(error) = image.handle.reopen(changes).await
    {
        complain!("{program}: {}", error.reason());
        if read_only && switch {
            set.used |= Permissions::WRITE;
            image.handle.set_permissions(set)?;
        }
        return Ok(Failed);
    }
    if !read_only {
        set.used |= Permissions::WRITE;
        image.handle.set_permissions(set)?;
    }
    image.read_only = read_only;
    image.handle.set_write_through(image.write_through);
    Ok(Done)
}
