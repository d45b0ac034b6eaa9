//! One execution of a small scenario: a world of its own on copies of images that were made once, one task for each guest
//! and for whatever can happen at any time, and the schedule that was asked for.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use block_core::{
    BlockHandle, Node, PermissionSet, Permissions, Registry, RequestFlags, Result,
    driver::Capabilities,
    error::ErrorKind,
    space::{SpaceEvent, SpaceWatch},
};
use parking_lot::Mutex;

use super::{
    guest::{self, Copy, Droppable, Latch},
    judge,
    scenario::{Kind, Small, What},
};
use crate::{
    case::FormatUnderTest,
    lab::{Lab, LabOptions, after_discard},
    memdriver,
    oracle::{AfterDiscard, Oracle},
    panics,
    pattern::stamped,
    sim::{Order, Point, Schedule, SimEnv, Steering},
    simulate::{
        books::Books,
        record::{Event, Failure, FailureKind, Recorder},
        timeline,
    },
    storage::{Content, Disk, DiskWatch, Disks, OpInfo},
};

/// The image's file, and a job's target's.
pub(super) const DISK: &str = "disk";
pub(super) const TARGET: &str = "target";
/// Signs what is there at the beginning.
const MAKER: u32 = 1000;
/// Clusters of formats that have none, in bytes.
const PLAIN_CLUSTER: u64 = 4096;

/// What guests use and share.
pub(super) const GUEST: PermissionSet = PermissionSet::new(
    Permissions::CONSISTENT_READ.union(Permissions::WRITE),
    Permissions::all(),
);

/// A scenario whose images are made; every execution begins with copies of them.
pub struct Prepared {
    pub(super) registry: Arc<Registry>,
    pub(super) format: FormatUnderTest,
    pub(super) scenario: Small,
    pub(super) gate: bool,
    /// Bytes.
    pub(super) cluster: u64,
    disks: Vec<(String, Content)>,
    initial: Vec<u8>,
    rule: AfterDiscard,
}

/// What an attempt to begin comes to.
pub enum Start {
    /// It can be run.
    Ready(Box<Prepared>),
    /// The driver doesn't have what the scenario is about.
    NotCovered(String),
}

/// One execution.
#[derive(Debug, Clone)]
pub struct Execution {
    /// What went wrong first.
    pub failure: Option<Failure>,
    /// Where there was a choice, and what was chosen.
    pub points: Vec<Point>,
    /// The first choice that doesn't belong to this scenario.
    pub misfit: Option<usize>,
    /// Of everything that the storage, the allocator and the guests saw, in its order.
    pub hash: u64,
    /// Requests that waited for others at the image's gate.
    pub waits: u64,
    /// Clusters that were handed out after they had been freed; `None` when the driver doesn't tell.
    pub reused: Option<u64>,
    /// What happened, if it was asked for.
    pub events: Vec<Event>,
}

/// What an execution works with.
pub(super) struct World {
    pub prepared: Arc<Prepared>,
    pub lab: Lab,
    pub oracle: Oracle,
    pub recorder: Arc<Recorder>,
    pub watch: Arc<Watch>,
    pub steering: Steering,
    pub guests: Arc<Latch>,
    /// The power has gone.
    pub cut: AtomicBool,
    pub waits: AtomicU64,
}

/// Sees every request to the disk, and every step of its allocator.
pub(super) struct Watch {
    recorder: Arc<Recorder>,
    books: Mutex<Option<Arc<Books>>>,
    space: Mutex<BTreeMap<u64, bool>>,
    reused: AtomicU64,
}

impl Watch {
    /// Nothing is open any more.
    pub fn clear(&self) {
        self.books.lock().take();
    }

    /// Everything has come to rest.
    pub fn check_books(&self) {
        let books = self.books.lock().clone();
        if let Some(books) = books {
            books.check();
        }
    }
}

impl DiskWatch for Watch {
    fn begins(&self, disk: &Disk, op: &OpInfo) {
        self.recorder.begins(disk, op);
        if disk.name() == DISK {
            let books = self.books.lock().clone();
            if let Some(books) = books {
                books.disk_op(op);
            }
        }
    }

    fn takes_effect(&self, disk: &Disk, op: &OpInfo) {
        self.recorder.takes_effect(disk, op);
    }

    fn ended(&self, disk: &Disk, op: &OpInfo, result: std::result::Result<(), ErrorKind>) {
        self.recorder.ended(disk, op, result);
    }
}

/// Counts reuse without judging: for executions without the gate, whose corruption is to be seen in the content.
impl SpaceWatch for Watch {
    fn space(&self, event: SpaceEvent) {
        let mut space = self.space.lock();
        match event {
            SpaceEvent::Free { host, .. } => {
                space.insert(host, true);
            }
            SpaceEvent::Taken { host, .. } if space.insert(host, false) == Some(true) => {
                self.reused.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// The books, and the count beside them.
struct Both(Arc<Books>, Arc<Watch>);

impl SpaceWatch for Both {
    fn space(&self, event: SpaceEvent) {
        self.1.space(event);
        self.0.space(event);
    }
}

fn can_run(scenario: &Small, format: &FormatUnderTest, can: Capabilities) -> Option<&'static str> {
    let lacks = |capability| !can.contains(capability);
    if scenario.does(What::Discard) && lacks(Capabilities::DISCARD) {
        return Some("discards");
    }
    if scenario.does(What::Resize) && lacks(Capabilities::TRUNCATE) {
        return Some("shrinking");
    }
    if scenario.fill.iter().any(|fill| fill.1 == Kind::Compressed)
        && lacks(Capabilities::COMPRESSED)
    {
        return Some("compressed clusters");
    }
    if scenario.cut && format.name == memdriver::NAME {
        return Some("being safe against power cuts");
    }
    None
}

impl Prepared {
    /// Makes the images.
    ///
    /// # Errors
    /// They can't be made, in words.
    pub fn make(
        registry: &Registry,
        format: &FormatUnderTest,
        scenario: &Small,
        gate: bool,
    ) -> std::result::Result<Start, String> {
        let lab = Lab::new(
            registry,
            LabOptions {
                order: Order::Fifo,
                ..LabOptions::default()
            },
        );
        let made = lab
            .env
            .try_run(make(&lab, format, scenario))
            .map_err(|stuck| stuck.to_string())?
            .map_err(|error| format!("{}: {error}", scenario.name))?;
        let (cluster, initial, rule) = match made {
            Made::Images {
                cluster,
                initial,
                rule,
            } => (cluster, initial, rule),
            Made::NotCovered(what) => {
                return Ok(Start::NotCovered(format!("{} has no {what}", format.name)));
            }
        };
        let disks = lab.disks.all();
        let disks = disks
            .iter()
            .filter(|disk| disk.name() != "probe")
            .map(|disk| (disk.name().to_owned(), disk.content()))
            .collect();
        Ok(Start::Ready(Box::new(Self {
            registry: Arc::new(registry.clone()),
            format: format.clone(),
            scenario: scenario.clone(),
            gate,
            cluster,
            disks,
            initial,
            rule,
        })))
    }

    /// Runs the scenario once, choosing as the list says and then as usual.
    pub fn execute(self: &Arc<Self>, choices: &[u32], events: bool) -> Execution {
        let steering = Steering::new(choices);
        let env = SimEnv::scheduled(1, &Schedule::Steered(steering.clone()));
        let recorder = Recorder::new(&env, events);
        let watch = Arc::new(Watch {
            recorder: recorder.clone(),
            books: Mutex::default(),
            space: Mutex::default(),
            reused: AtomicU64::new(0),
        });
        let disks = Disks::new();
        for (name, content) in &self.disks {
            let disk = Disk::new(name, content.clone());
            disk.set_watch(watch.clone());
            if self.scenario.cut {
                disk.track_durability();
            }
            disks.insert(disk);
        }
        let oracle = Oracle::new(self.rule);
        oracle.set_initial(0, &self.initial);
        let victim = (self.scenario.clusters - 1) * self.cluster;
        if !self.scenario.does(What::Resize) {
            oracle.protect(victim, self.cluster);
        }
        if self.scenario.cut {
            oracle.expect_power_cut();
        }
        let options = LabOptions {
            gate: self.gate,
            ..LabOptions::default()
        };
        let lab = Lab::with_world(&self.registry, options, env.clone(), disks);
        if events {
            timeline::watch_gates(&recorder, &lab.graph);
        }
        let world = Arc::new(World {
            prepared: self.clone(),
            lab,
            oracle,
            recorder: recorder.clone(),
            watch: watch.clone(),
            steering: steering.clone(),
            guests: Latch::new(self.scenario.guests.len()),
            cut: AtomicBool::new(false),
            waits: AtomicU64::new(0),
        });
        let failure = match panics::catch(|| run(&world)) {
            Ok(failure) => failure,
            Err(panic) => Some(Failure::new(FailureKind::Panic, panic)),
        };
        let failure = recorder.failure().or(failure);
        let execution = Execution {
            failure,
            points: steering.points(),
            misfit: steering.misfit(),
            hash: recorder.hash() ^ env.schedule_hash(),
            waits: world.waits.load(Ordering::Relaxed),
            reused: watch_reuse(&watch),
            events: recorder.events(),
        };
        watch.clear();
        env.shutdown();
        execution
    }
}

fn watch_reuse(watch: &Watch) -> Option<u64> {
    let told = !watch.space.lock().is_empty();
    told.then(|| watch.reused.load(Ordering::Relaxed))
}

enum Made {
    Images {
        cluster: u64,
        initial: Vec<u8>,
        rule: AfterDiscard,
    },
    NotCovered(&'static str),
}

async fn make(lab: &Lab, format: &FormatUnderTest, scenario: &Small) -> Result<Made> {
    let none = block_core::Options::new();
    let probe_size = 1 << 20;
    lab.create(&format.name, "probe", probe_size, &format.create, None)
        .await?;
    let node = lab.open(&format.name, "probe", None, &none).await?;
    let probe = lab.graph.attach(&node, GUEST, "probe")?;
    let cluster = probe.info().await?.cluster_size.unwrap_or(PLAIN_CLUSTER);
    let can = node.driver().capabilities();
    let rule = after_discard(&node);
    probe.close().await?;
    drop(node);
    if let Some(what) = can_run(scenario, format, can) {
        return Ok(Made::NotCovered(what));
    }
    let size = scenario.clusters * cluster;
    lab.create(&format.name, DISK, size, &format.create, None)
        .await?;
    if scenario.job.is_some() {
        lab.create(&format.name, TARGET, size, &format.create, None)
            .await?;
    }
    let node = lab.open(&format.name, DISK, None, &none).await?;
    let handle = lab.graph.attach(&node, GUEST, "maker")?;
    drop(node);
    let plain = RequestFlags::empty();
    let victim = (scenario.clusters - 1, Kind::Data);
    for (at, kind) in scenario.fill.iter().copied().chain([victim]) {
        let offset = at * cluster;
        let data = || stamped(MAKER, at + 1, offset, cluster);
        match kind {
            Kind::Unallocated => {}
            Kind::Data => handle.write(offset, data(), plain).await?,
            Kind::Zero => {
                handle.write(offset, data(), plain).await?;
                handle.write_zeroes(offset, cluster, plain).await?;
            }
            Kind::Compressed => {
                handle
                    .write(offset, data(), RequestFlags::WRITE_COMPRESSED)
                    .await?;
            }
        }
    }
    let initial = handle.read(0, size as usize).await?.to_vec();
    handle.close().await?;
    Ok(Made::Images {
        cluster,
        initial,
        rule,
    })
}

/// From opening the image to the last judgement.
fn run(world: &Arc<World>) -> Option<Failure> {
    let recorder = &world.recorder;
    let stuck = |text: String| Failure::new(FailureKind::Stuck, text);
    let ended = world.lab.env.try_run(live(world));
    world.steering.close();
    if let Some(failure) = recorder.failure() {
        return Some(failure);
    }
    let cut = world.cut.load(Ordering::SeqCst);
    let copy = match ended {
        Ok(Ok(copy)) => copy,
        Ok(Err(failure)) => return Some(failure),
        Err(end) if end.interrupted && cut => None,
        Err(end) => return Some(stuck(end.to_string())),
    };
    if cut {
        return judge::after_cut(world).err();
    }
    match world.lab.env.try_run(judge::at_rest(world, copy)) {
        Ok(result) => result.err(),
        Err(end) => Some(recorder.failure().unwrap_or_else(|| stuck(end.to_string()))),
    }
}

/// What runs under the schedule that is explored. Gives the job's copy, if there is a job.
async fn live(world: &Arc<World>) -> std::result::Result<Option<(Arc<Node>, Copy)>, Failure> {
    let prepared = &world.prepared;
    let scenario = &prepared.scenario;
    let lab = &world.lab;
    let env = &lab.env;
    let failed = |what: &'static str| {
        move |error: block_core::Error| Failure::new(FailureKind::Error, format!("{what}: {error}"))
    };
    let none = block_core::Options::new();
    let node = lab
        .open(&prepared.format.name, DISK, None, &none)
        .await
        .map_err(failed("the image can't be opened"))?;
    let books = Books::unheard(&world.recorder, &node, DISK, prepared.cluster, true);
    match books.filter(|_| prepared.gate) {
        Some(books) => {
            let both = Both(books.clone(), world.watch.clone());
            let told = node.driver().watch_space(Arc::new(both));
            *world.watch.books.lock() = told.then_some(books);
        }
        None => {
            node.driver().watch_space(world.watch.clone());
        }
    }
    let attach = |name: String| {
        lab.graph
            .attach(&node, GUEST, &name)
            .map(Arc::new)
            .map_err(failed("the image can't be used"))
    };
    let all_ended = world.guests.listen();
    let for_job = world.guests.listen();
    let first = scenario.dropped.then(Arc::<Droppable>::default);
    let mut handles: Vec<Arc<BlockHandle>> = Vec::new();
    for number in 0..scenario.guests.len() {
        handles.push(attach(format!("guest {number}"))?);
    }
    let mut target = None;
    let mut job = None;
    if let Some(kind) = scenario.job {
        let copy = lab
            .open(&prepared.format.name, TARGET, None, &none)
            .await
            .map_err(failed("the target can't be opened"))?;
        lab.graph.keep(&copy);
        // Its beginning drains the disk, so nothing can meet before it is over.
        let begun = guest::begin_job(world, kind, &node, &copy)
            .await
            .map_err(failed("the job can't begin"))?;
        job = Some(env.start_named("job", guest::end_job(begun, for_job)));
        target = Some(copy);
    }
    for (number, handle) in handles.into_iter().enumerate() {
        let first = first.clone().filter(|_| number == 0);
        let task = guest::run(world.clone(), number, handle, first);
        drop(env.start_named(&format!("guest {number}"), task));
    }
    if let Some(first) = first {
        let recorder = world.recorder.clone();
        let dropper = async move {
            if first.drop_it() {
                recorder.note([23, 0, 0], || "guest 0's request is dropped".to_owned());
            }
        };
        drop(env.start_named("dropper", dropper));
    }
    if scenario.cut {
        let power = world.clone();
        drop(env.start_named("power", async move { power.cut_power() }));
    }
    world.steering.open();
    // A latch that is gone has let everybody through.
    let _ = all_ended.await;
    let copy = match job {
        Some(job) => Some(job.await.map_err(failed("the job"))?),
        None => None,
    };
    world.steering.close();
    if scenario.cut {
        world.cut_power();
    }
    let waits = world.lab.graph.nodes();
    let waits = waits.iter().map(|node| node.tracker().waits()).sum();
    world.waits.store(waits, Ordering::Relaxed);
    Ok(target.zip(copy))
}

impl World {
    /// The run ends with this poll.
    fn cut_power(&self) {
        self.cut.store(true, Ordering::SeqCst);
        self.recorder
            .note([2, 0, 0], || "THE POWER IS CUT".to_owned());
        self.recorder.env().interrupt();
    }
}
