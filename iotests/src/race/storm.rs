//! One storm in-process, and what it left behind.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Poll, Waker},
};

use block_core::{
    BlockHandle, Error, Options, Registry, RequestFlags,
    driver::Capabilities,
    image::{CheckMode, Progress},
    registry::{ImplicitOpens, OpenOptions},
};
use parking_lot::Mutex;
use serde::Serialize;

use super::commands::{Command, Layout, generate};
use crate::{
    case::{Failure, FormatUnderTest},
    cases::cluster_size,
    lab::{Guest, Lab, LabOptions, after_discard},
    laid,
    oracle::{Mismatch, Oracle},
    sim::{CancelAt, DropWhen, Order},
    storage::{Content, Disk},
};

const FILE: &str = "storm";
const CUT: &str = "cut";

/// A storm to be run.
#[derive(Debug, Clone)]
pub struct StormConfig {
    /// Decides the commands and the schedule.
    pub seed: u64,
    /// How many commands go to the region.
    pub commands: usize,
    /// Clusters of the region.
    pub region: u64,
    /// How many commands are in flight at once.
    pub depth: usize,
    /// A flush is begun after so many commands.
    pub flush_every: usize,
    /// Whether requests wait at the gate.
    pub gate: bool,
    /// So many in a hundred commands have their future dropped on the way.
    pub drop_percent: u64,
    /// So many times the power is cut: each leaves an image that is judged after the storm.
    pub power_cuts: usize,
    /// Also ask the installed qemu-img.
    pub ask_qemu: bool,
}

impl StormConfig {
    /// The storm that the project's own tests run.
    pub const fn new(seed: u64, region: u64) -> Self {
        Self {
            seed,
            commands: 5000,
            region,
            depth: 48,
            flush_every: 64,
            gate: true,
            drop_percent: 0,
            power_cuts: 0,
            ask_qemu: false,
        }
    }

    /// With requests that are dropped on the way.
    #[must_use]
    pub const fn with_drops(mut self, percent: u64) -> Self {
        self.drop_percent = percent;
        self
    }

    /// With cuts of the power.
    #[must_use]
    pub const fn with_power_cuts(mut self, cuts: usize) -> Self {
        self.power_cuts = cuts;
        self
    }

    /// Without the gate.
    #[must_use]
    pub const fn without_gate(mut self) -> Self {
        self.gate = false;
        self
    }
}

/// What a storm left behind.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StormReport {
    /// The seed.
    pub seed: u64,
    /// Clusters of the region.
    pub region: u64,
    /// What the driver's own check calls a corruption or couldn't look at.
    pub check_corruptions: Vec<String>,
    /// Leaks that it found.
    pub check_leaks: u64,
    /// What the installed qemu-img said, if it was asked and wasn't content.
    pub qemu_check: Option<String>,
    /// Sectors with content that they may not have; the victims among them are counted below as well.
    pub mismatches: Vec<String>,
    /// Places in victims that have changed.
    pub victims_changed: u64,
    /// Places that hold another range's data.
    pub foreign: u64,
    /// Commands that failed, and how the first of them did.
    pub failed_commands: u64,
    /// How the first of them failed.
    pub first_failure: Option<String>,
    /// The storm itself didn't come to its end: no progress, a panic, an image that can't be opened again.
    pub broke_down: Option<String>,
    /// Commands that ended.
    pub ended_commands: u64,
    /// Counters: `gate-waits` and those of the driver.
    pub counters: BTreeMap<String, u64>,
    /// Polls: a measure of the schedule, equal for equal runs.
    pub polls: u64,
}

impl StormReport {
    /// A counter; 0 when it isn't there.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// Metadata or content is wrong. Failed commands alone are none: refusing is better than corrupting.
    pub fn is_corrupt(&self) -> bool {
        !self.check_corruptions.is_empty()
            || self.qemu_check.is_some()
            || !self.mismatches.is_empty()
            || self.broke_down.is_some()
    }

    /// Nothing at all is wrong.
    pub fn is_clean(&self) -> bool {
        !self.is_corrupt() && self.check_leaks == 0 && self.failed_commands == 0
    }

    /// What is wrong, in a line.
    pub fn summary(&self) -> String {
        let mut parts = Vec::new();
        if let Some(text) = &self.broke_down {
            parts.push(format!("broke down: {text}"));
        }
        if let Some(first) = self.check_corruptions.first() {
            parts.push(format!("check: {} ({first})", self.check_corruptions.len()));
        }
        if self.check_leaks > 0 {
            parts.push(format!("leaks: {}", self.check_leaks));
        }
        if let Some(text) = &self.qemu_check {
            parts.push(format!(
                "qemu-img: {}",
                text.lines().next().unwrap_or_default()
            ));
        }
        if let Some(first) = self.mismatches.first() {
            parts.push(format!("content: {} ({first})", self.mismatches.len()));
        }
        if self.failed_commands > 0 {
            let first = self.first_failure.clone().unwrap_or_default();
            parts.push(format!(
                "{} commands failed ({first})",
                self.failed_commands
            ));
        }
        if parts.is_empty() {
            return "clean".to_owned();
        }
        parts.join("; ")
    }

    fn add_mismatches(&mut self, when: &str, wrong: &[Mismatch]) {
        for mismatch in wrong {
            self.victims_changed += u64::from(mismatch.victim);
            self.foreign += u64::from(mismatch.foreign);
            self.mismatches.push(format!("{when}: {mismatch}"));
        }
    }
}

/// Runs one storm.
///
/// With the gate every sector must hold what the order of requests allows. Without, any value that was ever written
/// to that sector, or zeroes, will do, but victims must be what they were.
pub fn storm(registry: &Registry, format: &FormatUnderTest, config: &StormConfig) -> StormReport {
    let lab = Lab::new(
        registry,
        LabOptions {
            seed: config.seed,
            order: Order::Random,
            gate: config.gate,
            alignment: 1,
        },
    );
    let report = Arc::new(Mutex::new(StormReport {
        seed: config.seed,
        region: config.region,
        ..StormReport::default()
    }));
    let env = lab.env.clone();
    let future = run(&lab, format, config, report.clone());
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| env.try_run(future)));
    let broke = match result {
        Ok(Ok(Ok(()))) => None,
        Ok(Ok(Err(failure))) => Some(failure.0),
        Ok(Err(stuck)) => Some(stuck.to_string()),
        Err(panic) => Some(format!(
            "panic: {}",
            panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_default()
        )),
    };
    if config.ask_qemu
        && broke.is_none()
        && let Some(disk) = lab.disks.get(FILE)
        && let Err(text) = laid::check(&lab, &format.name, FILE, &disk.content(), false)
    {
        report.lock().qemu_check = Some(text.0);
    }
    drop(lab);
    let mut report = report.lock().clone();
    report.broke_down = broke;
    report.polls = env.polls();
    report
}

async fn run(
    lab: &Lab,
    format: &FormatUnderTest,
    config: &StormConfig,
    report: Arc<Mutex<StormReport>>,
) -> Result<(), Failure> {
    let none = RequestFlags::empty();
    lab.create(&format.name, "probe", 1 << 20, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "probe", None, &Options::new())
        .await?;
    let cluster = cluster_size(&lab.attach(&node, "probe")?).await?;
    lab.graph.release(&node).await?;
    let layout = Layout {
        cluster,
        region: config.region,
        victims: 8,
        fresh: (config.commands as u64 / 25).min(200),
    };
    lab.create(&format.name, FILE, layout.size(), &format.create, None)
        .await?;
    let node = lab.open(&format.name, FILE, None, &Options::new()).await?;
    let oracle = Oracle::new(after_discard(&node));
    let handle = lab.attach(&node, "guest")?;
    let guest = Guest::new(&handle, &oracle, 1);
    let flusher = lab.attach(&node, "flusher")?;
    for at in layout.victim_clusters() {
        guest.signing(2).write(at, cluster, none).await?;
        oracle.protect(at, cluster);
    }
    handle.flush().await?;
    let disk = lab.disk(FILE)?;
    disk.set_jitter(4);
    if config.power_cuts > 0 {
        disk.track_durability();
    }
    let written = Arc::new(Mutex::new(layout.victim_clusters().collect::<Vec<u64>>()));
    let flushed = Arc::new(Mutex::new(written.lock().clone()));
    let mut cuts = Vec::new();

    let window = Arc::new(Window::default());
    let commands = generate(config.seed, config.commands, layout);
    let cut_every = commands.len() / config.power_cuts.max(1);
    for (number, command) in commands.into_iter().enumerate() {
        window.below(config.depth).await;
        window.enter();
        let task = {
            let (guest, report, window, written) = (
                guest.clone(),
                report.clone(),
                window.clone(),
                written.clone(),
            );
            let env = lab.env.clone();
            let dropped = (lab.env.below(100) < config.drop_percent).then(|| {
                let when = [DropWhen::AtOnce, DropWhen::AtRest][lab.env.below(2) as usize];
                (lab.env.below(8) as usize, when)
            });
            async move {
                let request = carry_out(&guest, command);
                let result = match dropped {
                    None => Some(request.await),
                    Some((polls, when)) => {
                        CancelAt::new(&env, request, polls, when, Arc::default())
                            .await
                            .ok()
                    }
                };
                if let (Some(Ok(())), Command::Fresh { offset, len }) = (&result, command) {
                    guest.oracle().protect(offset, len);
                    written.lock().push(offset);
                }
                let mut report = report.lock();
                report.ended_commands += 1;
                if let Some(Err(error)) = result {
                    report.failed_commands += 1;
                    report
                        .first_failure
                        .get_or_insert_with(|| error.to_string());
                }
                drop(report);
                window.leave();
            }
        };
        drop(lab.env.start(task));
        if number % config.flush_every == 0 {
            let flusher = flusher.clone();
            let (written, flushed) = (written.clone(), flushed.clone());
            drop(lab.env.start(async move {
                let before = written.lock().clone();
                // A flush that fails shows in the one at the end.
                if flusher.flush().await.is_ok() {
                    let mut flushed = flushed.lock();
                    if flushed.len() < before.len() {
                        *flushed = before;
                    }
                }
            }));
        }
        if config.power_cuts > 0 && number % cut_every == cut_every - 1 {
            cuts.push((number, disk.power_cut(&*lab.env), flushed.lock().clone()));
        }
    }
    window.below(1).await;
    count(&report, &handle);
    judge(&guest, config, &report, "at the end").await;
    if let Err(error) = handle.flush().await {
        let mut report = report.lock();
        report.failed_commands += 1;
        report
            .first_failure
            .get_or_insert_with(|| error.to_string());
    }
    check(&handle, &report, config).await;
    judge(&guest, config, &report, "after a flush").await;
    count(&report, &handle);
    drop((guest, handle, flusher));
    let closed = lab.graph.release(&node).await;
    drop(node);
    if let Err(error) = closed
        && config.gate
    {
        return Err(error.into());
    }

    // A driver that found its image corrupt refuses to open it for writing; looking must be possible.
    let how = OpenOptions {
        implicit: ImplicitOpens::Permit,
        for_check: true,
        ..OpenOptions::default()
    };
    let read_only = Options::new().with("read-only", true);
    let read_only = lab.options_for(&format.name, FILE, None, &read_only);
    let node = lab
        .registry
        .open_file(&lab.graph, FILE, Some(&format.name), read_only, how)
        .await?;
    let set = block_core::flags::PermissionSet::new(
        block_core::flags::Permissions::CONSISTENT_READ,
        block_core::flags::Permissions::all(),
    );
    let handle = Arc::new(lab.graph.attach(&node, set, "again")?);
    let guest = Guest::new(&handle, &oracle, 1);
    judge(&guest, config, &report, "opened again").await;
    check(&handle, &report, config).await;
    drop((guest, handle));
    lab.graph.release(&node).await?;
    for (number, content, flushed) in cuts {
        let when = format!("after a power cut at command {number}");
        if let Err(failure) = after_cut(
            lab,
            format,
            config,
            &report,
            &oracle,
            cluster,
            (&when, content, flushed),
        )
        .await
        {
            report
                .lock()
                .check_corruptions
                .push(format!("{when}: {failure}"));
        }
    }
    Ok(())
}

/// Opens what a power cut left behind: no corruption, everything there that was flushed, and nowhere anything that wasn't
/// written for that place.
async fn after_cut(
    lab: &Lab,
    format: &FormatUnderTest,
    config: &StormConfig,
    report: &Mutex<StormReport>,
    oracle: &Oracle,
    cluster: u64,
    (when, content, flushed): (&str, Content, Vec<u64>),
) -> Result<(), Failure> {
    *report
        .lock()
        .counters
        .entry("power-cuts".to_owned())
        .or_default() += 1;
    if config.ask_qemu {
        laid::check(lab, &format.name, CUT, &content, true)?;
    }
    lab.disks.insert(Disk::new(CUT, content));
    let node = lab.open(&format.name, CUT, None, &Options::new()).await?;
    let handle = lab.attach(&node, "after-cut")?;
    if node.driver().capabilities().contains(Capabilities::CHECK) {
        let found = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
        if found.corruptions + found.check_errors > 0 {
            let lines: Vec<String> = found
                .findings
                .iter()
                .map(|finding| finding.message.clone())
                .collect();
            return Err(Failure(format!("check: {}", lines.join("; "))));
        }
    }
    let length = handle.length();
    let bytes = handle.read(0, length as usize).await?;
    let mut wrong = oracle.check_known(0, &bytes);
    for at in flushed {
        wrong.extend(oracle.check(at, &bytes[at as usize..(at + cluster) as usize]));
    }
    report.lock().add_mismatches(when, &wrong);
    drop(handle);
    lab.graph.release(&node).await?;
    Ok(())
}

/// How many commands are in flight.
#[derive(Default)]
struct Window(Mutex<(usize, Vec<Waker>)>);

impl Window {
    /// Completes when fewer than `limit` are in flight.
    async fn below(&self, limit: usize) {
        futures::future::poll_fn(|cx| {
            let mut inner = self.0.lock();
            if inner.0 < limit {
                return Poll::Ready(());
            }
            inner.1.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn enter(&self) {
        self.0.lock().0 += 1;
    }

    fn leave(&self) {
        let wakers = {
            let mut inner = self.0.lock();
            inner.0 -= 1;
            std::mem::take(&mut inner.1)
        };
        for waker in wakers {
            waker.wake();
        }
    }
}

async fn carry_out(guest: &Guest, command: Command) -> Result<(), Error> {
    let none = RequestFlags::empty();
    match command {
        Command::Write { offset, len } => guest.write(offset, len, none).await,
        Command::Zero { offset, len, unmap } => {
            let flags = if unmap { RequestFlags::MAY_UNMAP } else { none };
            guest.zero(offset, len, flags).await
        }
        Command::Discard { offset, len } => guest.discard(offset, len).await,
        Command::Fresh { offset, len } => guest.signing(3).write(offset, len, none).await,
    }
}

fn count(report: &Mutex<StormReport>, handle: &Arc<BlockHandle>) {
    let node = handle.node();
    let mut report = report.lock();
    report
        .counters
        .insert("gate-waits".to_owned(), node.tracker().waits());
    report.counters.insert(
        "dropped-at-driver".to_owned(),
        node.stats().snapshot().dropped,
    );
    for (name, value) in node.driver().counters() {
        report.counters.insert(name.to_owned(), value);
    }
}

async fn judge(guest: &Guest, config: &StormConfig, report: &Mutex<StormReport>, when: &str) {
    match guest.verify(!config.gate).await {
        Ok(wrong) => report.lock().add_mismatches(when, &wrong),
        Err(error) => report
            .lock()
            .mismatches
            .push(format!("{when}: can't be read: {error}")),
    }
}

async fn check(handle: &Arc<BlockHandle>, report: &Mutex<StormReport>, _: &StormConfig) {
    if !handle
        .node()
        .driver()
        .capabilities()
        .contains(Capabilities::CHECK)
    {
        return;
    }
    let found = handle.check(CheckMode::ReadOnly, Progress::new()).await;
    let mut report = report.lock();
    match found {
        Ok(found) => {
            report.check_leaks = report.check_leaks.max(found.leaks);
            let wrong = found.corruptions + found.check_errors;
            if wrong > 0 {
                let lines = found.findings.iter().filter(|finding| {
                    !matches!(
                        finding.severity,
                        block_core::image::Severity::Leak | block_core::image::Severity::Note
                    )
                });
                report
                    .check_corruptions
                    .extend(lines.map(|finding| finding.message.clone()));
                if report.check_corruptions.is_empty() {
                    report
                        .check_corruptions
                        .push(format!("{wrong} corruptions"));
                }
            }
        }
        Err(error) => report
            .check_corruptions
            .push(format!("check failed: {error}")),
    }
}
