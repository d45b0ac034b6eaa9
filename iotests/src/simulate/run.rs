//! One scenario under one schedule, from making the images to the last judgement.

use std::{collections::BTreeMap, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use block_core::{ErrorKind, Registry, RequestFlags};
use parking_lot::Mutex;

use super::{
    bitmaps::{Bitmap, Bitmaps},
    guest, judge,
    lengths::Lengths,
    progress::Progress,
    record::{Event, Failure, FailureKind, Recorder},
    scenario::{FaultKind, Layer, Phase, Scenario, Where},
    snapshots::{Kept, Snapshots},
    work,
    world::{GUEST, Setup, World, WorldWatch, data_file},
};
use crate::{
    lab::{Lab, after_discard},
    oracle::{AfterDiscard, Ended, Oracle},
    pattern::stamped,
    sim::{Schedule, SimEnv},
    storage::{Choose, Disk, Disks, Stage},
};

/// How a scenario is run.
#[derive(Debug, Clone)]
pub struct How {
    /// Whether requests wait at the gate.
    pub gate: bool,
    /// Whether what must hold at every step is judged. Without, content and checks have to show what goes wrong.
    pub books: bool,
    /// Random numbers that storage and drivers ask for.
    pub values: u64,
    /// Which ready task runs next.
    pub schedule: Schedule,
    /// Keep events in words.
    pub timeline: bool,
    /// Remember the choices that the schedule made.
    pub choices: bool,
}

impl How {
    /// As the seed says.
    pub fn seed(seed: u64) -> Self {
        Self {
            gate: true,
            books: true,
            values: seed,
            schedule: Schedule::Seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 1),
            timeline: false,
            choices: false,
        }
    }

    /// Without the gate.
    #[must_use]
    pub fn without_gate(mut self, without: bool) -> Self {
        self.gate = !without;
        self
    }

    /// With a timeline.
    #[must_use]
    pub fn with_timeline(mut self) -> Self {
        self.timeline = true;
        self
    }
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What went wrong first, if anything did.
    pub failure: Option<Failure>,
    /// Of all that happened: equal for equal runs.
    pub hash: u64,
    /// How many polls it took.
    pub polls: u64,
    /// Counters.
    pub counters: BTreeMap<String, u64>,
    /// What happened, if it was asked for.
    pub events: Vec<Event>,
    /// What the schedule chose, if it was asked for.
    pub choices: Vec<u32>,
}

impl Outcome {
    /// A counter; 0 when it isn't there.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }
}

/// What goes from one phase to the next.
pub(super) struct Carried {
    /// Images of the disk, topmost first.
    pub names: Vec<String>,
    pub oracle: Oracle,
    /// Lengths that the disk may have.
    pub lengths: Vec<u64>,
    pub snapshots: Vec<Kept>,
    pub bitmaps: Vec<Bitmap>,
    /// Images that jobs left unfinished: they may be anything but corrupt.
    pub left: Vec<String>,
    pub after_discard: AfterDiscard,
    /// There was a cut, or worse: clusters may have leaked where no check looks (beyond the end of the file).
    pub may_leak: bool,
    /// Something went wrong with the storage, so that not all of it could be written.
    pub excused: bool,
    pub cut: bool,
}

/// Runs a scenario.
pub fn run(registry: &Registry, scenario: &Scenario, how: &How) -> Outcome {
    let env = SimEnv::scheduled(how.values, &how.schedule);
    if how.choices {
        env.record_choices();
    }
    let recorder = Recorder::new(&env, how.timeline);
    let records_backing = registry.get(&scenario.format).is_ok_and(|factory| {
        let mut options = factory.create_options().iter();
        options.any(|option| option.name == "backing_file")
    });
    let setup = Arc::new(Setup {
        registry: Arc::new(registry.clone()),
        scenario: scenario.clone(),
        gate: how.gate,
        books: how.books,
        records_backing,
        disks: Disks::new(),
        watch: WorldWatch::new(&recorder),
        recorder: recorder.clone(),
        worlds: Mutex::default(),
    });
    let failure = std::panic::catch_unwind(AssertUnwindSafe(|| run_phases(&setup)));
    let failure = match failure {
        Ok(Ok(())) => None,
        Ok(Err(failure)) => Some(failure),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let text = text.unwrap_or_default();
            Some(Failure::new(FailureKind::Panic, text))
        }
    };
    let failure = recorder.failure().or(failure);
    // What still runs in there must not go on while it is taken apart.
    env.shutdown();
    setup.watch.clear();
    let failure = failure.or_else(|| left_behind(setup));
    Outcome {
        failure,
        hash: recorder.hash(),
        polls: env.polls(),
        counters: recorder.counters(),
        events: recorder.events(),
        choices: env.choices(),
    }
}

/// What is still in memory of a run that has ended: nothing must be. A run that failed was cut off anywhere, and isn't asked.
fn left_behind(setup: Arc<Setup>) -> Option<Failure> {
    let graphs = std::mem::take(&mut *setup.worlds.lock());
    let disks: Vec<_> = setup.disks.all().iter().map(Arc::downgrade).collect();
    let weak = Arc::downgrade(&setup);
    drop(setup);
    let graphs = graphs
        .iter()
        .filter(|graph| graph.strong_count() > 0)
        .count();
    let disks = disks.iter().filter(|disk| disk.strong_count() > 0).count();
    let setups = weak.strong_count();
    (graphs + disks + setups > 0).then(|| {
        let text = format!(
            "still in memory when all is over: {graphs} graphs, {disks} disks, {setups} users of the world"
        );
        Failure::new(FailureKind::Memory, text)
    })
}

fn run_phases(setup: &Arc<Setup>) -> Result<(), Failure> {
    let lab = setup.lab();
    let mut carried = stage(setup, &lab, make(setup, &lab))??;
    drop(lab);
    for (number, phase) in setup.scenario.phases.iter().enumerate() {
        carried = run_phase(setup, number as u32, phase, carried)?;
        let lab = setup.lab();
        carried = stage(setup, &lab, judge::look_again(setup, &lab, carried))??;
        drop(lab);
    }
    Ok(())
}

/// Runs a part of the run that can't be interrupted but by a failure.
fn stage<T>(setup: &Setup, lab: &Lab, future: impl Future<Output = T>) -> Result<T, Failure> {
    let result = lab.env.try_run(future);
    if let Some(failure) = setup.recorder.failure() {
        return Err(failure);
    }
    result.map_err(|stuck| Failure::new(FailureKind::Stuck, stuck.to_string()))
}

/// Makes the images and fills them.
async fn make(setup: &Arc<Setup>, lab: &Lab) -> Result<Carried, Failure> {
    let failed = |error: block_core::Error| {
        Failure::new(
            FailureKind::Unmade,
            format!("the images can't be made: {error}"),
        )
    };
    let mut names: Vec<String> = Vec::new();
    let mut oracle = None;
    let mut rule = AfterDiscard::Zeroes;
    let count = setup.scenario.layers.len();
    for (number, layer) in setup.scenario.layers.iter().enumerate() {
        let name = if number + 1 == count {
            "top".to_owned()
        } else {
            format!("layer{number}")
        };
        let backing = names.first().map(String::as_str);
        setup
            .create(lab, &name, layer, backing)
            .await
            .map_err(failed)?;
        names.insert(0, name);
        let node = setup.open(lab, &names).await.map_err(failed)?;
        rule = after_discard(&node);
        let layers = &setup.scenario.layers;
        let mut options = layers.iter().flat_map(|layer| &layer.options);
        if options.any(|(_, value)| value == "0.10") {
            // What its discards leave behind depends on whether it has a backing file; jobs change that, and which of
            // the images is the topmost.
            rule = AfterDiscard::Anything;
        }
        let oracle = oracle.get_or_insert_with(|| Oracle::new(AfterDiscard::Zeroes));
        // What a layer below has beyond this one's end doesn't show.
        let below = setup.scenario.layers[..number]
            .iter()
            .map(|layer| layer.size);
        let beyond = below.max().unwrap_or(0).saturating_sub(layer.size);
        if beyond > 0 {
            oracle.zero(layer.size, beyond).end(Ended::Done);
        }
        let handle = lab.graph.attach(&node, GUEST, "maker").map_err(failed)?;
        fill(layer, number as u32, oracle, &handle)
            .await
            .map_err(failed)?;
        handle.close().await.map_err(failed)?;
        setup.watch.clear();
    }
    let oracle = oracle.unwrap_or_else(|| Oracle::new(rule));
    let length = setup.scenario.layers.last().map_or(0, |layer| layer.size);
    Ok(Carried {
        names,
        oracle: oracle.with_rule(rule),
        lengths: vec![length],
        snapshots: Vec::new(),
        bitmaps: Vec::new(),
        left: Vec::new(),
        after_discard: rule,
        may_leak: false,
        excused: false,
        cut: false,
    })
}

async fn fill(
    layer: &Layer,
    number: u32,
    oracle: &Oracle,
    handle: &block_core::BlockHandle,
) -> block_core::Result<()> {
    let none = RequestFlags::empty();
    for fill in &layer.fill {
        if fill.zero {
            let change = oracle.zero(fill.offset, fill.len);
            handle.write_zeroes(fill.offset, fill.len, none).await?;
            change.end(Ended::Done);
        } else {
            let owner = 1000 + number;
            let change = oracle.write(owner, fill.offset, fill.len);
            let data = stamped(owner, change.seq(), fill.offset, fill.len);
            handle.write(fill.offset, data, none).await?;
            change.end(Ended::Done);
        }
    }
    handle.flush().await
}

/// Has the faults of the phase that are meant for it happen to a disk.
pub(super) fn apply_faults(world: &World, at: Where, disk: &str) {
    for disk in [disk.to_owned(), data_file(disk)] {
        if let Some(disk) = world.setup.disks.get(&disk) {
            apply_to(world, at, &disk);
        }
    }
}

fn apply_to(world: &World, at: Where, disk: &Arc<Disk>) {
    for fault in world.phase.faults.iter().filter(|fault| fault.at == at) {
        let mut choose = Choose::any().after(fault.skip).times(fault.times);
        for kind in fault.op.kinds() {
            choose = choose.kind(*kind);
        }
        match fault.what {
            FaultKind::Io => disk.fail(choose, ErrorKind::Io, Stage::Before),
            FaultKind::NoSpace => disk.fail(choose, ErrorKind::NoSpace, Stage::Before),
            FaultKind::IoAfter => disk.fail(choose, ErrorKind::Io, Stage::After),
            FaultKind::Delay(micros) => disk.delay(choose, Duration::from_micros(micros)),
        };
        world.setup.recorder.count("faults-set", 1);
    }
}

fn run_phase(
    setup: &Arc<Setup>,
    number: u32,
    phase: &Phase,
    mut carried: Carried,
) -> Result<Carried, Failure> {
    let lab = setup.lab();
    let recorder = &setup.recorder;
    let manager = jobs::JobManager::new(&lab.graph);
    if recorder.keeps_events() {
        recorder.listen_to(manager.subscribe());
    }
    if phase.cut.is_some() || !phase.faults.is_empty() {
        carried.oracle.expect_power_cut();
    }
    let world = Arc::new(World {
        setup: setup.clone(),
        phase: phase.clone(),
        number: number + 1,
        oracle: carried.oracle.clone(),
        handle: Mutex::default(),
        progress: Progress::default(),
        lengths: Lengths::new(carried.lengths.first().copied().unwrap_or(0)),
        snapshots: Snapshots::new(std::mem::take(&mut carried.snapshots)),
        bitmaps: Bitmaps::new(std::mem::take(&mut carried.bitmaps)),
        targets: Mutex::default(),
        manager,
        lab,
    });
    let ended = world.lab.env.try_run(live(&world, &carried.names));
    recorder.disarm();
    if let Some(failure) = recorder.failure() {
        return Err(failure);
    }
    let carried = match ended {
        Ok(Ok((names, clean))) => {
            recorder.count("clean-ends", u64::from(clean));
            Carried {
                names,
                excused: !clean,
                lengths: world.lengths.now(),
                snapshots: world.snapshots.take(),
                bitmaps: world.bitmaps.take(),
                left: Vec::new(),
                ..carried
            }
        }
        Ok(Err(failure)) => return Err(failure),
        Err(stuck) if stuck.interrupted && recorder.was_cut() => cut(&world, carried),
        Err(stuck) => return Err(Failure::new(FailureKind::Stuck, stuck.to_string())),
    };
    take_apart(world);
    setup.watch.clear();
    recorder.power_is_back();
    Ok(carried)
}

/// Nothing of the phase goes on: its tasks, and what they hold of it, are dropped.
fn take_apart(world: Arc<World>) {
    for disk in world.lab.disks.all() {
        disk.clear_rules();
    }
    world.lab.env.shutdown();
    world.handle.lock().take();
}

/// The power is off: what is left of each disk is what a cut leaves.
fn cut(world: &World, carried: Carried) -> Carried {
    let setup = &world.setup;
    let recorder = &setup.recorder;
    let names = world.names();
    world.collect_counters();
    recorder.count("power-cuts", 1);
    let changing = u64::from(world.snapshots.are_changing());
    recorder.count("power-cuts-in-changes-of-snapshots", changing);
    if let Some(top) = names.first() {
        let place = recorder.write_back_of(top);
        recorder.count(&format!("power-cuts-in-{place}"), 1);
        let unflushed = setup.disks.get(top).map_or(0, |disk| disk.unflushed());
        recorder.count("power-cuts-with-unflushed", u64::from(unflushed > 0));
    }
    let mut left = world.targets.lock().clone();
    left.retain(|target| !names.contains(target));
    for disk in setup.disks.all() {
        let content = disk.power_cut(&**recorder.env());
        let new = Disk::new(disk.name(), content);
        new.set_jitter(setup.scenario.jitter);
        new.track_durability();
        new.set_watch(setup.watch.clone());
        setup.disks.insert(new);
    }
    Carried {
        names: if names.is_empty() {
            carried.names
        } else {
            names
        },
        left,
        lengths: world.lengths.after_cut(),
        snapshots: world.snapshots.take(),
        bitmaps: world.bitmaps.take(),
        cut: true,
        excused: true,
        ..carried
    }
}

/// What happens in a phase that isn't cut short. Gives the names of the images at its end, and whether all could be
/// written.
async fn live(world: &Arc<World>, names: &[String]) -> Result<(Vec<String>, bool), Failure> {
    let setup = &world.setup;
    let lab = &world.lab;
    let recorder = &setup.recorder;
    let failed = |what: &str, error: block_core::Error| {
        Failure::new(FailureKind::Error, format!("{what}: {error}"))
    };
    let node = setup
        .open(lab, names)
        .await
        .map_err(|error| failed("the disk can't be opened", error))?;
    let handle = lab
        .graph
        .attach(&node, GUEST, "guest")
        .map_err(|error| failed("the disk can't be used", error))?;
    *world.handle.lock() = Some(Arc::new(handle));
    drop(node);
    for (at, name) in [Where::Top, Where::Below].into_iter().zip(names) {
        apply_faults(world, at, name);
    }
    recorder.arm(world.phase.cut);
    recorder.note([40, u64::from(world.number), 0], || {
        format!("phase {} begins on {}", world.number, names.join(" over "))
    });
    let queues: Vec<_> = world
        .phase
        .queues
        .iter()
        .enumerate()
        .map(|(n, queue)| {
            let queue = guest::run_queue(world.clone(), n, queue.clone());
            lab.env.start_named(&format!("queue {n}"), queue)
        })
        .collect();
    let jobs: Vec<_> = world
        .phase
        .jobs
        .iter()
        .enumerate()
        .map(|(n, plan)| {
            let job = work::run_job(world.clone(), n, plan.clone());
            lab.env
                .start_named(&format!("job {n} {}", plan.kind.name()), job)
        })
        .collect();
    futures::future::join_all(queues).await;
    world.progress.finish();
    futures::future::join_all(jobs).await;
    recorder.disarm();
    judge::end_of_phase(world).await
}
