//! One simulated disk: its content now, what of it is durable, its rules, and what happened to it. It outlives the
//! nodes that use it, so that it can be looked at, cut off from power and opened again.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use block_core::{env::Environment, error::ErrorKind};
use parking_lot::Mutex;

use super::{
    content::{BESIDE, Content},
    rules::{Choose, Fate, HoldState, OpInfo, OpKind, Rules, Stage},
};

/// The unit that a power cut never tears, in bytes.
pub const SECTOR: u64 = 512;
/// The most entries that are kept in the log.
const MAX_LOG: usize = 200_000;

/// A change of the content that isn't durable yet.
#[derive(Clone)]
pub(super) enum Change {
    Write(u64, Arc<Vec<u8>>),
    Punch(u64, u64),
    Resize(u64),
}

impl Change {
    /// Where the file begins that it changes.
    fn base(&self) -> u64 {
        let (Self::Write(at, _) | Self::Punch(at, _) | Self::Resize(at)) = self;
        at & BESIDE
    }
}

/// Somebody who sees every request to a disk. Called from within the requests, without any lock of the disk's; must not
/// ask the disk to do anything.
pub trait DiskWatch: Send + Sync {
    /// A request arrives.
    fn begins(&self, disk: &Disk, op: &OpInfo);
    /// A request takes effect.
    fn takes_effect(&self, disk: &Disk, op: &OpInfo);
    /// A request has ended.
    fn ended(&self, disk: &Disk, op: &OpInfo, result: Result<(), ErrorKind>);
}

/// One request in the log.
#[derive(Debug, Clone, Copy)]
pub struct LogEntry {
    /// The request.
    pub op: OpInfo,
    /// How it ended; `None` while it is in flight.
    pub result: Option<Result<(), ErrorKind>>,
}

#[derive(Default)]
struct State {
    now: Content,
    durable: Content,
    track_durability: bool,
    unflushed: Vec<Change>,
    rules: Rules,
    holds: Vec<Arc<HoldState>>,
    next_op: u64,
    in_flight: BTreeMap<u64, (OpInfo, Option<Change>)>,
    log: Vec<LogEntry>,
    counts: BTreeMap<OpKind, u64>,
    jitter: u64,
    watcher: Option<Watcher>,
}

/// Hears of each change of a disk's content.
pub type Watcher = Arc<dyn Fn(&OpInfo) + Send + Sync>;

/// A disk of the simulated storage. Cheap to share.
pub struct Disk {
    name: String,
    state: Mutex<State>,
    watch: OnceLock<Arc<dyn DiskWatch>>,
    /// Guest data on it is encrypted: rules can't tell whose it is.
    encrypted: AtomicBool,
    /// The image on it is being made.
    making: AtomicBool,
}

impl Disk {
    /// A disk with that content, all of it durable.
    pub fn new(name: &str, content: Content) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            state: Mutex::new(State {
                durable: content.clone(),
                now: content,
                ..State::default()
            }),
            watch: OnceLock::new(),
            encrypted: AtomicBool::new(false),
            making: AtomicBool::new(false),
        })
    }

    /// Whether what is written can be told from what is in the storage.
    pub fn shows_data(&self) -> bool {
        !self.encrypted.load(Ordering::Relaxed)
    }

    fn visible(&self, choose: Choose) -> Choose {
        if self.shows_data() {
            choose
        } else {
            choose.on_noise()
        }
    }

    /// From now on `watch` sees every request. There can be one.
    pub fn set_watch(&self, watch: Arc<dyn DiskWatch>) {
        let _ = self.watch.set(watch);
    }

    /// Whether what was written since the last flush is kept apart.
    pub fn is_tracking_durability(&self) -> bool {
        self.state.lock().track_durability
    }

    /// How many changes a cut of the power could undo now.
    pub fn unflushed(&self) -> usize {
        let state = self.state.lock();
        state.unflushed.len() + state.in_flight.values().filter(|op| op.1.is_some()).count()
    }

    /// Its file name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length of the image file in bytes.
    pub fn len(&self) -> u64 {
        self.state.lock().now.len()
    }

    /// Length of the file at `base` in bytes.
    pub(super) fn len_of(&self, base: u64) -> u64 {
        let state = self.state.lock();
        if base == BESIDE {
            state.now.beside_len().unwrap_or(0)
        } else {
            state.now.len()
        }
    }

    /// Makes a second file of so many bytes beside the image, durably, in place of the one that was there.
    pub(super) fn create_beside(&self, len: u64) {
        let mut beside = Content::default();
        beside.set_len(len);
        let mut state = self.state.lock();
        state.unflushed.retain(|change| change.base() != BESIDE);
        state.durable = std::mem::take(&mut state.durable).with_beside(&beside);
        state.now = std::mem::take(&mut state.now).with_beside(&beside);
    }

    /// Whether there is no byte on it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is on it now. Shares pages; later writes don't show.
    pub fn content(&self) -> Content {
        self.state.lock().now.clone()
    }

    /// Replaces everything on it, durably. Nobody may have it open.
    pub fn restore(&self, content: Content) {
        let mut state = self.state.lock();
        state.durable = content.clone();
        state.now = content;
        state.unflushed.clear();
    }

    /// From now on remembers what isn't durable, as [`Self::power_cut`] needs it. What is there now counts as durable.
    pub fn track_durability(&self) {
        let mut state = self.state.lock();
        state.track_durability = true;
        state.durable = state.now.clone();
        state.unflushed.clear();
    }

    /// What might be found after a cut of the power now: all that is durable, and of everything else any subset,
    /// torn at sector boundaries. Durability must be tracked.
    pub fn power_cut(&self, env: &dyn Environment) -> Content {
        self.power_cut_with(&mut || env.random())
    }

    /// [`Self::power_cut`] with luck from elsewhere: always 0 loses all that can be lost, always 1 keeps all of it.
    pub fn power_cut_with(&self, random: &mut dyn FnMut() -> u64) -> Content {
        let state = self.state.lock();
        let mut content = state.durable.clone();
        let in_flight = state
            .in_flight
            .values()
            .filter_map(|(_, change)| change.as_ref());
        for change in state.unflushed.iter().chain(in_flight) {
            // A quarter is lost, a quarter arrives, half is torn.
            let luck = random() % 4;
            if luck == 0 {
                continue;
            }
            let mut keep = || luck == 1 || random() % 2 == 0;
            match change {
                Change::Resize(len) => {
                    if keep() {
                        content.set_len(*len);
                    }
                }
                Change::Write(offset, data) => {
                    for (piece, at) in sectors(*offset, data.len() as u64) {
                        if keep() {
                            let from = (at - offset) as usize;
                            content.write(at, &data[from..from + piece as usize]);
                        }
                    }
                }
                Change::Punch(offset, len) => {
                    for (piece, at) in sectors(*offset, *len) {
                        if keep() {
                            content.punch(at, piece);
                        }
                    }
                }
            }
        }
        content
    }

    /// Every request yields up to so many further times, as the environment's random numbers say.
    pub fn set_jitter(&self, jitter: u64) {
        self.state.lock().jitter = jitter;
    }

    /// Stops the chosen requests until they are let go. Dropping the [`Hold`] lets everything go.
    pub fn hold(self: &Arc<Self>, choose: Choose, stage: Stage) -> Hold {
        let hold = Arc::new(HoldState::default());
        let choose = self.visible(choose);
        let mut state = self.state.lock();
        let rule = state.rules.add(choose, Fate::Hold(stage, hold.clone()));
        state.holds.push(hold.clone());
        Hold {
            disk: self.clone(),
            rule,
            hold,
        }
    }

    /// Makes the chosen requests take longer.
    pub fn delay(&self, choose: Choose, by: Duration) -> u64 {
        let choose = self.visible(choose);
        self.state.lock().rules.add(choose, Fate::Delay(by))
    }

    /// Makes the chosen requests fail.
    pub fn fail(&self, choose: Choose, kind: ErrorKind, stage: Stage) -> u64 {
        let choose = self.visible(choose);
        self.state.lock().rules.add(choose, Fate::Fail(kind, stage))
    }

    /// Ends a rule.
    pub fn remove_rule(&self, rule: u64) {
        self.state.lock().rules.remove(rule);
    }

    /// Ends all rules and lets everything go that was held.
    pub fn clear_rules(&self) {
        let holds = {
            let mut state = self.state.lock();
            state.rules.clear();
            std::mem::take(&mut state.holds)
        };
        for hold in holds {
            hold.open();
        }
    }

    /// What happened, oldest first; bounded.
    pub fn log(&self) -> Vec<LogEntry> {
        self.state.lock().log.clone()
    }

    /// Where the log is now, for [`Self::log_since`].
    pub fn log_position(&self) -> usize {
        self.state.lock().log.len()
    }

    /// What happened since.
    pub fn log_since(&self, position: usize) -> Vec<LogEntry> {
        let state = self.state.lock();
        state.log.get(position..).unwrap_or_default().to_vec()
    }

    /// How many requests of that kind there have been.
    pub fn count(&self, kind: OpKind) -> u64 {
        self.state.lock().counts.get(&kind).copied().unwrap_or(0)
    }

    /// The offsets of all sectors on it that begin with `needle`.
    pub fn find(&self, needle: &[u8]) -> Vec<u64> {
        self.state.lock().now.find(needle)
    }

    /// What is in flight, in words.
    pub fn describe(&self) -> Vec<String> {
        let state = self.state.lock();
        state
            .in_flight
            .values()
            .map(|(op, _)| {
                let held = state.holds.iter().any(|hold| hold.is_holding(op.id));
                let why = if held {
                    "held by the test"
                } else {
                    "in flight"
                };
                format!("{op} of '{}': {why}", self.name)
            })
            .collect()
    }

    pub(super) fn jitter(&self) -> u64 {
        self.state.lock().jitter
    }

    /// Takes note of a request and decides what happens to it.
    pub(super) fn begin(
        &self,
        kind: OpKind,
        offset: u64,
        len: u64,
        change: Option<Change>,
    ) -> (OpInfo, Vec<Fate>) {
        let mut state = self.state.lock();
        let op = OpInfo {
            id: state.next_op,
            kind,
            offset,
            len,
        };
        state.next_op += 1;
        *state.counts.entry(kind).or_default() += 1;
        if state.log.len() < MAX_LOG {
            state.log.push(LogEntry { op, result: None });
        }
        let fates = {
            let data = match &change {
                Some(Change::Write(_, data)) => Some(data.as_slice()),
                _ => None,
            };
            let making = self.making.load(Ordering::Relaxed);
            state.rules.judge(&op, data, making)
        };
        state.in_flight.insert(op.id, (op, change));
        drop(state);
        if let Some(watch) = self.watch.get() {
            watch.begins(self, &op);
        }
        (op, fates)
    }

    /// A request is about to take effect.
    pub(super) fn takes_effect(&self, op: &OpInfo) {
        if let Some(watch) = self.watch.get() {
            watch.takes_effect(self, op);
        }
    }

    pub(super) fn end(&self, op: &OpInfo, result: Result<(), ErrorKind>) {
        let mut state = self.state.lock();
        state.in_flight.remove(&op.id);
        // Requests are logged in the order of their ids, none is left out before the log is full.
        if let Some(entry) = state.log.get_mut(op.id as usize) {
            entry.result = Some(result);
        }
        drop(state);
        if let Some(watch) = self.watch.get() {
            watch.ended(self, op, result);
        }
    }

    /// The effect of a request that changes something.
    pub(super) fn apply(&self, op: &OpInfo) {
        let watcher = {
            let mut state = self.state.lock();
            let Some(change) = state.in_flight.get_mut(&op.id).and_then(|(_, c)| c.take()) else {
                return;
            };
            change_content(&mut state.now, &change);
            if state.track_durability {
                state.unflushed.push(change);
            }
            state.watcher.clone()
        };
        if let Some(watcher) = watcher {
            watcher(op);
        }
    }

    /// From now on calls `watcher` after each change of the content has taken effect, or nobody with `None`. It may look
    /// at every disk, and mustn't hold this one (it would keep itself alive).
    pub fn watch_changes(&self, watcher: Option<Watcher>) {
        self.state.lock().watcher = watcher;
    }

    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        self.state.lock().now.read(offset, out);
    }

    pub(super) fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        self.state.lock().now.run(offset, len)
    }

    pub(super) fn allocated_of(&self, base: u64) -> u64 {
        self.state.lock().now.allocated_of(base)
    }

    /// Makes everything durable that has taken effect in the file at `base`.
    pub(super) fn flush(&self, base: u64) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let of_file = |change: &mut Change| change.base() == base;
        for change in state.unflushed.extract_if(.., of_file) {
            change_content(&mut state.durable, &change);
        }
    }
}

fn change_content(content: &mut Content, change: &Change) {
    match change {
        Change::Write(offset, data) => content.write(*offset, data),
        Change::Punch(offset, len) => content.punch(*offset, *len),
        Change::Resize(len) => content.set_len(*len),
    }
}

/// Splits a range at sector boundaries: (length, offset).
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let stop = (at - at % SECTOR + SECTOR).min(end);
        let piece = (stop - at, at);
        at = stop;
        Some(piece)
    })
}

/// Requests that are stopped, and will be as long as this lives.
pub struct Hold {
    disk: Arc<Disk>,
    rule: u64,
    hold: Arc<HoldState>,
}

impl Hold {
    /// How many requests were ever stopped.
    pub fn arrivals(&self) -> u64 {
        self.hold.arrivals()
    }

    /// Those that are stopped now.
    pub fn waiting(&self) -> Vec<OpInfo> {
        self.hold.waiting()
    }

    /// Completes when at least one request has been stopped.
    pub async fn arrived(&self) {
        futures::future::poll_fn(|cx| self.hold.poll_arrived(cx, 1)).await;
    }

    /// Lets one of those that are stopped go: the others stay, which is how requests are reordered.
    pub fn let_go(&self, op: OpInfo) {
        self.hold.let_go(|held| held.id == op.id);
    }

    /// Lets those go that are stopped now; later ones are stopped again.
    pub fn let_all_go(&self) {
        self.hold.let_go(|_| true);
    }

    /// Lets everything go and stops nothing any more.
    pub fn release(&self) {
        self.disk.remove_rule(self.rule);
        self.hold.open();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.release();
        let mut state = self.disk.state.lock();
        state.holds.retain(|hold| !Arc::ptr_eq(hold, &self.hold));
    }
}

/// The disks of one simulated world, by file name.
#[derive(Clone, Default)]
pub struct Disks(Arc<Mutex<World>>);

#[derive(Default)]
struct World {
    disks: BTreeMap<String, Arc<Disk>>,
    beside: Option<String>,
    encrypted: bool,
    /// The image that is being made.
    making: Option<String>,
}

/// As long as this lives, an image is being made.
pub(crate) struct Making(Disks);

impl Drop for Making {
    fn drop(&mut self) {
        let mut world = self.0.0.lock();
        if let Some(name) = world.making.take()
            && let Some(disk) = world.disks.get(&name)
        {
            disk.making.store(false, Ordering::Relaxed);
        }
    }
}

impl Disks {
    /// No disks.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk with that name.
    pub fn get(&self, name: &str) -> Option<Arc<Disk>> {
        self.0.lock().disks.get(name).cloned()
    }

    /// Adds a disk, or replaces the one of that name for those who open it from now on.
    pub fn insert(&self, disk: Arc<Disk>) {
        let mut world = self.0.lock();
        disk.encrypted.store(world.encrypted, Ordering::Relaxed);
        let making = world.making.as_deref() == Some(disk.name());
        disk.making.store(making, Ordering::Relaxed);
        world.disks.insert(disk.name().to_owned(), disk);
    }

    /// All of them, by name.
    pub fn all(&self) -> Vec<Arc<Disk>> {
        self.0.lock().disks.values().cloned().collect()
    }

    /// What is in flight on any of them, in words.
    pub fn describe(&self) -> Vec<String> {
        self.all().iter().flat_map(|disk| disk.describe()).collect()
    }

    /// From now on a file `IMAGE.ending` is the second file of the disk `IMAGE`, if there is one, and no disk of its own.
    pub fn keep_beside(&self, ending: &str) {
        self.0.lock().beside = Some(ending.to_owned());
    }

    /// From now on guest data is stored encrypted: rules that look for what is written find the next write that looks like
    /// noise instead.
    pub fn hide_data(&self) {
        let mut world = self.0.lock();
        world.encrypted = true;
        for disk in world.disks.values() {
            disk.encrypted.store(true, Ordering::Relaxed);
        }
    }

    /// From now on the image `name` is being made: what is written to it may be keys, but no data.
    pub(crate) fn make(&self, name: &str) -> Making {
        let mut world = self.0.lock();
        world.making = Some(name.to_owned());
        if let Some(disk) = world.disks.get(name) {
            disk.making.store(true, Ordering::Relaxed);
        }
        drop(world);
        Making(self.clone())
    }

    /// The disk that a file is on, and where in its content ([`BESIDE`]) the file begins. The second file of an image needn't
    /// be there yet.
    pub fn place(&self, file: &str) -> Option<(Arc<Disk>, u64)> {
        let world = self.0.lock();
        if let Some(disk) = world.disks.get(file) {
            return Some((disk.clone(), 0));
        }
        let ending = world.beside.as_deref()?;
        let image = file.strip_suffix(ending)?.strip_suffix('.')?;
        Some((world.disks.get(image)?.clone(), BESIDE))
    }

    /// What a file holds now, if there is one.
    pub fn file(&self, name: &str) -> Option<Content> {
        let (disk, base) = self.place(name)?;
        match base {
            0 => Some(disk.content()),
            _ => disk.content().beside(),
        }
    }
}
