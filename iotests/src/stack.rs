//! Disks with known content for the cases about jobs, faults and load: a chain of layers of the format under test, a guest at
//! its top whose every request the oracle knows, producers that keep it busy, and the final judgement. No case is here.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use block_core::{
    BlockHandle, ErrorKind, Graph, Node, Options, PermissionSet, Permissions, RequestFlags,
    driver::{Capabilities, DriverKind, Reopen},
    env::Environment,
    image::{CheckMode, CheckReport, Progress},
};

use crate::{
    case::{Failure, Scene, Verdict},
    cases::cluster_size,
    lab::{Guest, after_discard},
    laid::Laid,
    oracle::{AfterDiscard, Oracle},
    pattern::stamped,
    sim::{Running, SimEnv, yield_now},
    storage::Disk,
};

/// No flags.
pub(crate) const NONE: RequestFlags = RequestFlags::empty();
/// What the guest's stamps are signed with.
pub(crate) const GUEST: u32 = 50;
/// What layer `n` was filled with is signed with this and `n`.
pub(crate) const LAYER: u32 = 10;
/// The end of a stack's disk isn't the end of a cluster.
const TAIL: u64 = 1536;
/// Stacks have at least so many bytes, so that jobs have several chunks.
const LEAST: u64 = 320 << 10;

/// The file name of a layer; 0 is the lowest.
pub(crate) fn layer(n: usize) -> String {
    format!("layer{n}")
}

/// "The driver has no …", if it lacks any of them.
pub(crate) fn lacks(have: Capabilities, wanted: Capabilities) -> Option<Verdict> {
    let missing = wanted - have;
    if missing.is_empty() {
        return None;
    }
    let names: Vec<String> = missing
        .iter_names()
        .map(|(name, _)| name.to_lowercase())
        .collect();
    let names = names.join(", ");
    Some(Verdict::NotCovered(format!("the driver has no {names}")))
}

/// What an open, empty image of the format says of itself: its capabilities and the bytes of a cluster.
pub(crate) async fn probe(scene: &Scene) -> Result<(Capabilities, u64), Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, "probe", 1 << 20, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "probe", None, &Options::new())
        .await?;
    let cluster = cluster_size(&lab.attach(&node, "probe")?).await?;
    let capabilities = node.driver().capabilities();
    lab.graph.release(&node).await?;
    Ok((capabilities, cluster))
}

/// Why an open image of the format can't become writable, as a job needs it of a base.
pub(crate) async fn cannot_reopen(scene: &Scene) -> Result<Option<Verdict>, Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    probe(scene).await?;
    let options = Options::new().with("read-only", true);
    let node = lab.open(&format.name, "probe", None, &options).await?;
    let changes = Reopen {
        read_only: Some(false),
        ..Reopen::default()
    };
    let reopened = lab.graph.reopen(&node, changes).await;
    lab.graph.release(&node).await?;
    match reopened {
        Err(error) if error.kind() == ErrorKind::NotSupported => Ok(Some(Verdict::NotCovered(
            "the driver can't be reopened".into(),
        ))),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(None),
    }
}

/// A handle that reads and writes and lets others do anything.
pub(crate) fn writer(
    graph: &Arc<Graph>,
    node: &Arc<Node>,
    name: &str,
) -> Result<Arc<BlockHandle>, Failure> {
    let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let set = PermissionSet::new(used, Permissions::all());
    Ok(Arc::new(graph.attach(node, set, name)?))
}

/// A handle that reads.
pub(crate) fn reader(graph: &Arc<Graph>, node: &Arc<Node>) -> Result<Arc<BlockHandle>, Failure> {
    let set = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    Ok(Arc::new(graph.attach(node, set, "reader")?))
}

/// All that a node shows.
pub(crate) async fn content(graph: &Arc<Graph>, node: &Arc<Node>) -> Result<Vec<u8>, Failure> {
    let handle = reader(graph, node)?;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < handle.length() {
        let at = bytes.len() as u64;
        let len = (handle.length() - at).min(1 << 20);
        bytes.extend_from_slice(&handle.read(at, len as usize).await?);
    }
    Ok(bytes)
}

/// Fails when two contents differ, with the first place.
pub(crate) fn same(found: &[u8], expected: &[u8], what: &str) -> Result<(), Failure> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} bytes, not {}", found.len(), expected.len()).into());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        Some(at) => {
            let sector = at / 512 * 512;
            let seen = |bytes: &[u8]| {
                crate::pattern::Seen::of(&bytes[sector..bytes.len().min(sector + 512)])
            };
            Err(Failure(format!(
                "{what}: at {at:#x} there is {}, not {}",
                seen(found),
                seen(expected)
            )))
        }
        None => Ok(()),
    }
}

/// The findings of a report, in words.
pub(crate) fn findings(report: &CheckReport) -> String {
    let found: Vec<&str> = report
        .findings
        .iter()
        .take(5)
        .map(|finding| finding.message.as_str())
        .collect();
    found.join("; ")
}

/// The driver's own check of a node, if it has one. Leaks count only when `leaks` says so.
pub(crate) async fn check(
    graph: &Arc<Graph>,
    node: &Arc<Node>,
    leaks: bool,
) -> Result<(), Failure> {
    let capabilities = node.driver().capabilities();
    if !capabilities.contains(Capabilities::CHECK) {
        return Ok(());
    }
    let handle = reader(graph, node)?;
    let report = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
    let bad = report.corruptions + report.check_errors > 0 || (leaks && report.leaks > 0);
    if bad {
        let what = findings(&report);
        return Err(format!("check of '{}' isn't clean: {what}", node.name()).into());
    }
    Ok(())
}

/// The graph in words: every node with its children. Filters and names that a job made would show.
pub(crate) fn shape(graph: &Arc<Graph>) -> Vec<String> {
    let nodes = graph.nodes();
    let mut lines: Vec<String> = nodes
        .iter()
        .map(|node| {
            let edges = node.edges();
            let edges: Vec<String> = edges
                .iter()
                .map(|edge| format!("{}={}", edge.name, edge.child.node().name()))
                .collect();
            let (name, driver) = (node.name(), node.driver().name());
            let read_only = node.driver().is_read_only();
            format!("{name} {driver} ro={read_only} {}", edges.join(" "))
        })
        .collect();
    lines.sort();
    lines
}

/// Whether the driver of a node keeps what an I/O request needs after it has ended.
pub(crate) fn at_rest(graph: &Arc<Graph>) -> Result<(), Failure> {
    for node in graph.nodes() {
        let tickets = node.tracker().in_flight();
        if tickets > 0 {
            return Err(format!("{tickets} tracked requests are left at '{}'", node.name()).into());
        }
    }
    Ok(())
}

/// A chain of images, and the guest at its top.
pub(crate) struct Stack {
    pub scene: Arc<Scene>,
    /// The guest device, signing as [`GUEST`].
    pub guest: Guest,
    /// The layers, lowest first.
    pub nodes: Vec<Arc<Node>>,
    /// Bytes of a cluster, at least 4096.
    pub unit: u64,
    /// Bytes of the disk; its last cluster isn't whole.
    pub size: u64,
    /// What the driver can do.
    pub capabilities: Capabilities,
}

impl Stack {
    /// Makes and opens `layers` images, each with data, zeroes and nothing in turns. The verdict says why not.
    pub async fn new(
        scene: &Arc<Scene>,
        layers: usize,
        needs: Capabilities,
    ) -> Result<Result<Self, Verdict>, Failure> {
        Self::with_options(scene, layers, needs, &Options::new()).await
    }

    /// The same with the top image opened with these options.
    pub async fn with_options(
        scene: &Arc<Scene>,
        layers: usize,
        mut needs: Capabilities,
        open: &Options,
    ) -> Result<Result<Self, Verdict>, Failure> {
        let (lab, format) = (&scene.lab, &scene.format);
        let (capabilities, unit) = probe(scene).await?;
        needs |= Capabilities::WRITE;
        if layers > 1 {
            needs |= Capabilities::BACKING;
        }
        if let Some(verdict) = lacks(capabilities, needs) {
            return Ok(Err(verdict));
        }
        if layers > 2 && !lab.records_backing(&format.name) {
            let why = "images of the format don't name their backing files";
            return Ok(Err(Verdict::NotCovered(why.into())));
        }
        let units = (LEAST / unit).max(20);
        let size = units * unit + TAIL;
        let mut initial = vec![0; size as usize];
        for n in 0..layers {
            make_layer(scene, n, unit, size, &mut initial).await?;
        }
        let below = (layers > 1).then(|| layer(layers - 2));
        let backing = below.as_deref().map(|name| (name, format.name.as_str()));
        let node = lab
            .open(&format.name, &layer(layers - 1), backing, open)
            .await?;
        let mut nodes = node.chain();
        nodes.reverse();
        nodes.push(node.clone());
        let oracle = Oracle::new(after_discard(&node));
        oracle.set_initial(0, &initial);
        let guest = Guest::new(&writer(&lab.graph, &node, "guest")?, &oracle, GUEST);
        let stack = Self {
            scene: scene.clone(),
            guest,
            nodes,
            unit,
            size,
            capabilities,
        };
        stack.judge("at the start").await?;
        Ok(Ok(stack))
    }

    /// The guest's image.
    pub fn top(&self) -> &Arc<Node> {
        &self.nodes[self.nodes.len() - 1]
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.scene.lab.graph
    }

    /// The storage of a layer.
    pub fn disk(&self, n: usize) -> Result<Arc<Disk>, Failure> {
        Ok(self.scene.lab.disk(&layer(n))?)
    }

    /// Whether what a discard leaves behind is known, with layers below.
    pub fn discards(&self) -> bool {
        self.capabilities.contains(Capabilities::DISCARD)
            && (self.nodes.len() == 1 || after_discard(self.top()) == AfterDiscard::Zeroes)
    }

    /// Another image for a job to write to, kept open until it is released.
    pub async fn target(&self, name: &str, create: &Options) -> Result<Arc<Node>, Failure> {
        let (lab, format) = (&self.scene.lab, &self.scene.format.name);
        lab.create(format, name, self.size, create, None).await?;
        let node = lab.open(format, name, None, &Options::new()).await?;
        lab.graph.keep(&node);
        Ok(node)
    }

    /// What the guest sees against the oracle.
    pub async fn judge(&self, when: &str) -> Result<(), Failure> {
        judge(&self.guest, when).await
    }

    /// Everything settles; content, metadata and what is left over are judged; all is closed, and the image in the file
    /// `top` opened from the storage again and judged again.
    pub async fn finish(self, top: &str, backing: Option<&str>) -> Result<(), Failure> {
        self.guest.handle().flush().await?;
        drop(self.graph().drain_all().await);
        at_rest(self.graph())?;
        self.judge("at the end").await?;
        self.close_and_reopen(top, backing, true).await
    }

    /// The second half of [`Self::finish`].
    pub async fn close_and_reopen(
        self,
        top: &str,
        backing: Option<&str>,
        leaks: bool,
    ) -> Result<(), Failure> {
        let Self {
            scene,
            guest,
            nodes,
            ..
        } = self;
        let graph = scene.lab.graph.clone();
        let formats = graph.nodes().into_iter();
        for node in formats.filter(|node| node.driver().kind() == DriverKind::Format) {
            check(&graph, &node, leaks).await?;
        }
        let oracle = guest.oracle().clone();
        drop((guest, nodes));
        graph.close_all().await?;
        if let Some(node) = graph.nodes().first() {
            return Err(format!("'{}' is left when all is closed", node.name()).into());
        }
        let format = scene.format.name.as_str();
        let backing = backing.map(|name| (name, format));
        let node = scene
            .lab
            .open(format, top, backing, &Options::new())
            .await?;
        let again = Guest::new(&writer(&graph, &node, "again")?, &oracle, GUEST);
        judge(&again, "opened again").await?;
        check(&graph, &node, leaks).await?;
        drop(again);
        graph.release(&node).await?;
        drop(node);
        if scene.strict() && leaks && scene.lab.env.seed() == 0 {
            ask_qemu(&scene, top)?;
        }
        Ok(())
    }
}

/// What the installed qemu-img says of an image among its backing files.
pub(crate) fn ask_qemu(scene: &Scene, top: &str) -> Result<(), Failure> {
    let laid = Laid::new(&scene.lab, &scene.format.name)?;
    for disk in scene.lab.disks.all() {
        laid.put(disk.name(), &disk.content())?;
    }
    laid.check(top, false)
}

async fn judge(guest: &Guest, when: &str) -> Result<(), Failure> {
    let wrong = guest.verify(false).await?;
    if wrong.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = wrong.iter().take(6).map(ToString::to_string).collect();
    Err(Failure(format!("{when}: {}", lines.join("; "))))
}

/// Makes layer `n` over the one before, and tells `shown` what the disk shows then.
async fn make_layer(
    scene: &Arc<Scene>,
    n: usize,
    unit: u64,
    size: u64,
    shown: &mut [u8],
) -> Result<(), Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    let below = (n > 0).then(|| layer(n - 1));
    let backing = below.as_deref().map(|name| (name, format.name.as_str()));
    lab.create(&format.name, &layer(n), size, &format.create, backing)
        .await?;
    let node = lab
        .open(&format.name, &layer(n), backing, &Options::new())
        .await?;
    let handle = writer(&lab.graph, &node, "maker")?;
    for k in 0..size.div_ceil(unit) {
        let offset = k * unit;
        let len = unit.min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        let turn = (k + 2 * n as u64) % 6;
        if (n == 0 && turn != 5) || turn == 0 {
            let data = stamped(LAYER + n as u32, k + 1, offset, len);
            shown[range].copy_from_slice(&data);
            handle.write(offset, data, NONE).await?;
        } else if n > 0 && turn == 3 {
            handle.write_zeroes(offset, len, NONE).await?;
            shown[range].fill(0);
        } else if n > 0 && turn == 4 && unit >= 2048 {
            // A part of a cluster: the rest is copied from below.
            let (at, some) = (offset + 512, 1024.min(len - 512));
            let data = stamped(LAYER + n as u32, k + 1, at, some);
            shown[at as usize..(at + some) as usize].copy_from_slice(&data);
            handle.write(at, data, NONE).await?;
        }
    }
    handle.flush().await?;
    drop(handle);
    lab.graph.release(&node).await?;
    Ok(())
}

/// One random request of a guest; reads are judged. Discards cover whole clusters.
pub(crate) async fn one_request(
    env: &SimEnv,
    guest: &Guest,
    unit: u64,
    within: (u64, u64),
    discards: bool,
) -> Result<(), Failure> {
    let (from, to) = within;
    let sectors = (to - from) / 512;
    let at = from + env.below(sectors) * 512;
    let most = (to - at).min(2 * unit);
    let len = (env.below(most / 512) + 1) * 512;
    match env.below(10) {
        0..=3 => guest.write(at, len, NONE).await?,
        4 => guest.write(at, 512, RequestFlags::FUA).await?,
        5 => guest.zero(at, len, NONE).await?,
        6 => guest.zero(at, len, RequestFlags::MAY_UNMAP).await?,
        7 if discards => {
            let start = at / unit * unit;
            if start >= from && start + unit <= to {
                guest.discard(start, unit).await?;
            }
        }
        8 => guest.handle().flush().await?,
        _ => {
            let wrong = guest.read(at, len, NONE).await?;
            if let Some(first) = wrong.first() {
                return Err(format!("while everything runs: {first}").into());
            }
        }
    }
    Ok(())
}

/// Producers that keep a disk busy until they are stopped.
pub(crate) struct Load {
    env: Arc<SimEnv>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    queues: Vec<Running<Result<(), Failure>>>,
}

impl Load {
    /// So many queues at the guest's disk.
    pub fn start(stack: &Stack, queues: usize) -> Self {
        Self::within(stack, queues, (0, stack.size))
    }

    /// The same, at a part of it only.
    pub fn within(stack: &Stack, queues: usize, within: (u64, u64)) -> Self {
        let env = stack.scene.lab.env.clone();
        let (stop, done) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let queues = (0..queues)
            .map(|_| {
                let (env, guest) = (env.clone(), stack.guest.clone());
                let (stop, done) = (stop.clone(), done.clone());
                let (unit, discards) = (stack.unit, stack.discards());
                env.clone().start(async move {
                    while !stop.load(Ordering::SeqCst) {
                        one_request(&env, &guest, unit, within, discards).await?;
                        done.fetch_add(1, Ordering::SeqCst);
                        // Virtual time passes, as it does for timers of jobs.
                        let pause = 50 + env.below(400);
                        env.sleep(std::time::Duration::from_micros(pause)).await;
                    }
                    Ok(())
                })
            })
            .collect();
        Self {
            env,
            stop,
            done,
            queues,
        }
    }

    /// Completes when so many more requests have ended.
    ///
    /// # Errors
    /// A queue has ended, which only an error makes it do.
    pub async fn more(&self, count: u64) -> Result<(), Failure> {
        let until = self.done.load(Ordering::SeqCst) + count;
        while self.done.load(Ordering::SeqCst) < until {
            if self.queues.iter().any(Running::is_done) {
                return Err("a queue of the guest has ended".into());
            }
            self.env.sleep(std::time::Duration::from_micros(100)).await;
        }
        Ok(())
    }

    /// Ends the queues, and gives how many requests ended.
    pub async fn stop(self) -> Result<u64, Failure> {
        self.stop.store(true, Ordering::SeqCst);
        for queue in self.queues {
            queue.await?;
        }
        yield_now().await;
        Ok(self.done.load(Ordering::SeqCst))
    }
}
