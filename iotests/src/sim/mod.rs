//! A deterministic world: one thread, one seed, one schedule.
//!
//! [`SimEnv`] is the environment that graphs are given in tests. Tasks, offloaded work and timers run on the caller's
//! thread inside of [`SimEnv::try_run`]; which of the ready tasks is polled next, and every random number, follows from
//! the seed. Time is virtual: it moves only when nothing is ready, straight to the next timer. When nothing is ready and
//! no timer is left, nothing will ever happen again, and the run ends with [`Stuck`], which says what hangs.
//!
//! It never sleeps, never starts a thread, and knows nothing of blocks.

mod cancel;
mod schedule;
mod steering;
mod waits;

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use block_core::env::Environment;
use futures::{
    future::BoxFuture,
    task::{ArcWake, waker},
};
use parking_lot::Mutex;
use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};

use self::{
    schedule::Chooser,
    waits::{Sleep, Slot},
};

pub use self::{
    cancel::{CancelAt, Cancelled, DropWhen},
    schedule::Schedule,
    steering::{Point, Steering},
    waits::{Idle, Running, yield_now},
};

/// The most polls in one run before it counts as one that will never end.
const MAX_POLLS: u64 = 100_000_000;

/// In which order ready tasks are polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they became ready.
    Fifo,
    /// Any of them, as the seed says.
    Random,
}

/// Why a run ended before its future did.
#[derive(Debug, Clone)]
pub struct Stuck {
    /// Virtual time when it happened.
    pub at: Duration,
    /// How many polls there had been.
    pub polls: u64,
    /// What those who were asked ([`SimEnv::add_witness`]) know to be unfinished.
    pub hanging: Vec<String>,
    /// Nothing was ready (a deadlock), or there was no end to it.
    pub endless: bool,
    /// Somebody asked for the run to end here ([`SimEnv::interrupt`]).
    pub interrupted: bool,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.interrupted {
            write!(f, "interrupted after {} polls", self.polls)?;
        } else if self.endless {
            write!(f, "no end after {} polls", self.polls)?;
        } else {
            write!(
                f,
                "no progress: nothing is ready and no timer is set, after {} polls",
                self.polls
            )?;
        }
        for line in &self.hanging {
            write!(f, "\n  hangs: {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Stuck {}

type Witness = Box<dyn Fn() -> Vec<String> + Send + Sync>;

/// What is called after each poll, with the name of the task.
type AfterPoll = Box<dyn FnMut(&str) + Send>;

/// A deterministic environment.
pub struct SimEnv {
    shared: Arc<Shared>,
}

struct Shared {
    seed: u64,
    state: Mutex<State>,
    witnesses: Mutex<Vec<Witness>>,
    interrupted: AtomicBool,
    watched: AtomicBool,
    after_poll: Mutex<Option<AfterPoll>>,
}

struct State {
    rng: SmallRng,
    chooser: Chooser,
    /// The task that is being polled.
    current: Option<Arc<str>>,
    /// Of all that was polled so far.
    hash: u64,
    now: Duration,
    next_id: u64,
    polls: u64,
    ready: VecDeque<u64>,
    tasks: BTreeMap<u64, Task>,
    timers: BTreeMap<(Duration, u64), Waker>,
    idle: Vec<(Arc<AtomicBool>, Waker)>,
    closed: bool,
}

struct Task {
    waker: Arc<TaskWaker>,
    name: Option<Arc<str>>,
    /// `None` while it is being polled, and for the run's own future.
    future: Option<BoxFuture<'static, ()>>,
}

struct TaskWaker {
    id: u64,
    queued: AtomicBool,
    shared: Weak<Shared>,
}

impl ArcWake for TaskWaker {
    fn wake_by_ref(this: &Arc<Self>) {
        if this.queued.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some(shared) = this.shared.upgrade() {
            shared.state.lock().ready.push_back(this.id);
        }
    }
}

thread_local! {
    static MAIN: Arc<str> = Arc::from("main");
}

fn mix(hash: u64, n: u64) -> u64 {
    (hash.rotate_left(5) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What a turn of the executor does.
enum Turn {
    Poll(u64),
    Wake(Vec<Waker>),
    Nothing,
}

impl Shared {
    fn add_task(
        self: &Arc<Self>,
        name: Option<&str>,
        future: Option<BoxFuture<'static, ()>>,
    ) -> Arc<TaskWaker> {
        let mut state = self.state.lock();
        // A task that nobody names is part of what started it.
        let name = name.map_or_else(|| state.current.clone(), |name| Some(Arc::from(name)));
        let id = state.next_id;
        state.next_id += 1;
        let waker = Arc::new(TaskWaker {
            id,
            queued: AtomicBool::new(true),
            shared: Arc::downgrade(self),
        });
        let task = Task {
            waker: waker.clone(),
            name,
            future,
        };
        state.tasks.insert(id, task);
        state.ready.push_back(id);
        waker
    }

    fn turn(&self) -> Turn {
        let mut state = self.state.lock();
        let state = &mut *state;
        if !state.ready.is_empty() {
            let at = state.chooser.choose(&state.ready, &mut state.rng);
            return match state.ready.remove(at) {
                Some(id) => {
                    state.hash = mix(state.hash, id);
                    Turn::Poll(id)
                }
                None => Turn::Nothing,
            };
        }
        if !state.idle.is_empty() {
            let wakers = std::mem::take(&mut state.idle)
                .into_iter()
                .map(|(came, waker)| {
                    came.store(true, Ordering::SeqCst);
                    waker
                })
                .collect();
            return Turn::Wake(wakers);
        }
        match state.timers.pop_first() {
            Some(((at, _), waker)) => {
                state.now = state.now.max(at);
                Turn::Wake(vec![waker])
            }
            None => Turn::Nothing,
        }
    }

    fn poll_task(&self, id: u64) {
        let (waker_arc, mut future) = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let Some(task) = state.tasks.get_mut(&id) else {
                return;
            };
            task.waker.queued.store(false, Ordering::SeqCst);
            let Some(future) = task.future.take() else {
                return;
            };
            state.current.clone_from(&task.name);
            (task.waker.clone(), future)
        };
        let task_waker = waker(waker_arc);
        let done = future
            .as_mut()
            .poll(&mut Context::from_waker(&task_waker))
            .is_ready();
        let mut state = self.state.lock();
        if done || state.closed {
            state.tasks.remove(&id);
            drop(state);
            drop(future);
        } else if let Some(task) = state.tasks.get_mut(&id) {
            task.future = Some(future);
        }
    }

    fn call_after_poll(&self) {
        let name = self.state.lock().current.clone();
        if let Some(hook) = self.after_poll.lock().as_mut() {
            hook(name.as_deref().unwrap_or("?"));
        }
    }

    fn stuck(&self, endless: bool) -> Stuck {
        let hanging = self.witnesses.lock().iter().flat_map(|w| w()).collect();
        let state = self.state.lock();
        Stuck {
            at: state.now,
            polls: state.polls,
            hanging,
            endless,
            interrupted: false,
        }
    }
}

impl SimEnv {
    /// A world whose schedule follows from `seed`.
    pub fn new(seed: u64) -> Arc<Self> {
        Self::with_order(seed, Order::Random)
    }

    /// A world that polls in the order in which tasks become ready; `seed` only feeds its random numbers.
    pub fn fifo(seed: u64) -> Arc<Self> {
        Self::with_order(seed, Order::Fifo)
    }

    fn with_order(seed: u64, order: Order) -> Arc<Self> {
        match order {
            Order::Fifo => Self::with_chooser(seed, Chooser::Fifo),
            Order::Random => Self::with_chooser(seed, Chooser::Values),
        }
    }

    /// A world whose random numbers follow from `seed`, and the order in which it polls from `schedule`.
    pub fn scheduled(seed: u64, schedule: &Schedule) -> Arc<Self> {
        Self::with_chooser(seed, Chooser::new(schedule))
    }

    fn with_chooser(seed: u64, chooser: Chooser) -> Arc<Self> {
        let state = State {
            rng: SmallRng::seed_from_u64(seed),
            chooser,
            current: None,
            hash: 0,
            now: Duration::ZERO,
            next_id: 0,
            polls: 0,
            ready: VecDeque::new(),
            tasks: BTreeMap::new(),
            timers: BTreeMap::new(),
            idle: Vec::new(),
            closed: false,
        };
        Arc::new(Self {
            shared: Arc::new(Shared {
                seed,
                state: Mutex::new(state),
                witnesses: Mutex::default(),
                interrupted: AtomicBool::new(false),
                watched: AtomicBool::new(false),
                after_poll: Mutex::default(),
            }),
        })
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.shared.seed
    }

    /// How many polls there have been: a measure of what happened, equal for equal runs.
    pub fn polls(&self) -> u64 {
        self.shared.state.lock().polls
    }

    /// A hash of which tasks were polled in which order: equal for equal runs.
    pub fn schedule_hash(&self) -> u64 {
        self.shared.state.lock().hash
    }

    /// From now on remembers which of the ready tasks is chosen, for [`Self::choices`].
    pub fn record_choices(&self) {
        self.shared.state.lock().chooser.record();
    }

    /// What was chosen since [`Self::record_choices`], as [`Schedule::Script`] takes it.
    pub fn choices(&self) -> Vec<u32> {
        self.shared.state.lock().chooser.recorded()
    }

    /// The name of the task that is being polled, or of the one that it is part of.
    pub fn current_task(&self) -> Option<Arc<str>> {
        self.shared.state.lock().current.clone()
    }

    /// The run ends, with [`Stuck::interrupted`], when the poll that is under way has ended. So nothing is done after
    /// the moment that somebody wants to look at.
    pub fn interrupt(&self) {
        self.shared.interrupted.store(true, Ordering::SeqCst);
    }

    /// From now on `hook` is called after each poll, with the name of the task. It must not poll anything.
    pub fn after_each_poll(&self, hook: impl FnMut(&str) + Send + 'static) {
        *self.shared.after_poll.lock() = Some(Box::new(hook));
        self.shared.watched.store(true, Ordering::SeqCst);
    }

    /// Somebody who is asked what is unfinished when a run gets stuck.
    pub fn add_witness(&self, witness: impl Fn() -> Vec<String> + Send + Sync + 'static) {
        self.shared.witnesses.lock().push(Box::new(witness));
    }

    /// Runs `future`, and the tasks beside it, until `future` has ended.
    ///
    /// # Errors
    /// [`Stuck`] when no progress is possible any more, or there is no end to it.
    pub fn try_run<F: Future>(&self, future: F) -> Result<F::Output, Stuck> {
        let shared = &self.shared;
        let mut future = pin!(future);
        let main = shared.add_task(Some("main"), None);
        let main_waker = waker(main.clone());
        let limit = shared.state.lock().polls + MAX_POLLS;
        let result = loop {
            match shared.turn() {
                Turn::Poll(id) => {
                    let polls = {
                        let mut state = shared.state.lock();
                        state.polls += 1;
                        state.polls
                    };
                    if polls > limit {
                        break Err(shared.stuck(true));
                    }
                    if id == main.id {
                        main.queued.store(false, Ordering::SeqCst);
                        shared.state.lock().current = Some(MAIN.with(Arc::clone));
                        let mut cx = Context::from_waker(&main_waker);
                        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                            break Ok(output);
                        }
                    } else {
                        shared.poll_task(id);
                    }
                    if shared.watched.load(Ordering::Relaxed) {
                        shared.call_after_poll();
                    }
                    if shared.interrupted.swap(false, Ordering::SeqCst) {
                        let mut stuck = shared.stuck(false);
                        stuck.interrupted = true;
                        break Err(stuck);
                    }
                }
                Turn::Wake(wakers) => {
                    for waker in wakers {
                        waker.wake();
                    }
                }
                Turn::Nothing => break Err(shared.stuck(false)),
            }
        };
        let mut state = shared.state.lock();
        state.tasks.remove(&main.id);
        state.ready.retain(|id| *id != main.id);
        drop(state);
        result
    }

    /// [`Self::try_run`] for tests.
    ///
    /// # Panics
    /// When the run gets stuck, with what hangs.
    pub fn run<F: Future>(&self, future: F) -> F::Output {
        match self.try_run(future) {
            Ok(output) => output,
            Err(stuck) => panic!("seed {}: {stuck}", self.seed()),
        }
    }

    /// Completes when nothing else is ready: everything that can happen without virtual time passing has happened.
    pub fn idle(&self) -> Idle {
        Idle {
            shared: Arc::downgrade(&self.shared),
            asked: false,
            came: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Starts `future` as a task and gives a way to its result.
    pub fn start<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Running<T> {
        self.start_as(None, future)
    }

    /// The same, under a name; what it starts itself bears that name too, unless it has another.
    pub fn start_named<T: Send + 'static>(
        &self,
        name: &str,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Running<T> {
        self.start_as(Some(name), future)
    }

    fn start_as<T: Send + 'static>(
        &self,
        name: Option<&str>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Running<T> {
        let slot = Arc::new(Mutex::new(Slot {
            value: None,
            done: false,
            waker: None,
        }));
        let out = slot.clone();
        let task = async move {
            let value = future.await;
            let mut slot = out.lock();
            slot.value = Some(value);
            slot.done = true;
            if let Some(waker) = slot.waker.take() {
                drop(slot);
                waker.wake();
            }
        };
        self.spawn_as(name, Box::pin(task));
        Running(slot)
    }

    fn spawn_as(&self, name: Option<&str>, task: BoxFuture<'static, ()>) {
        if self.shared.state.lock().closed {
            return;
        }
        self.shared.add_task(name, Some(task));
    }

    /// A number in `0..bound`.
    pub fn below(&self, bound: u64) -> u64 {
        self.shared.state.lock().rng.random_range(0..bound.max(1))
    }

    /// Drops every task that has not ended. Tasks that are spawned from here on are dropped at once.
    pub fn shutdown(&self) {
        loop {
            let tasks = {
                let mut state = self.shared.state.lock();
                state.closed = true;
                state.ready.clear();
                std::mem::take(&mut state.tasks)
            };
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        self.shared.witnesses.lock().clear();
        self.shared.after_poll.lock().take();
    }

    /// After [`Self::shutdown`], tasks can be started again: the power is back. Time goes on, and so does the schedule.
    pub fn reopen(&self) {
        let mut state = self.shared.state.lock();
        state.closed = false;
        state.current = None;
        let (timers, idle) = (
            std::mem::take(&mut state.timers),
            std::mem::take(&mut state.idle),
        );
        drop(state);
        drop((timers, idle));
    }
}

impl Environment for SimEnv {
    fn now(&self) -> Duration {
        self.shared.state.lock().now
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let until = self.now() + duration;
        Box::pin(Sleep {
            shared: Arc::downgrade(&self.shared),
            until,
            key: None,
        })
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.spawn_as(None, task);
    }

    fn offload(&self, work: Box<dyn FnOnce() + Send>) {
        self.spawn(Box::pin(async move {
            yield_now().await;
            work();
        }));
    }

    fn random(&self) -> u64 {
        self.shared.state.lock().rng.next_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(seed: u64) -> Vec<u64> {
        let env = SimEnv::new(seed);
        let trace = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..8)
            .map(|n| {
                let trace = trace.clone();
                env.start(async move {
                    for _ in 0..3 {
                        yield_now().await;
                        trace.lock().push(n);
                    }
                })
            })
            .collect();
        env.run(futures::future::join_all(tasks));
        std::mem::take(&mut *trace.lock())
    }

    #[test]
    fn one_seed_is_one_schedule_and_another_seed_is_another() {
        assert_eq!(trace(7), trace(7));
        assert!((0..8).any(|seed| trace(seed) != trace(7)));
    }

    #[test]
    fn virtual_time_moves_only_when_nothing_is_ready() {
        let env = SimEnv::new(1);
        let other = env.clone();
        let elapsed = env.run(async move {
            other.sleep(Duration::from_secs(3600)).await;
            other.now()
        });
        assert_eq!(elapsed, Duration::from_secs(3600));
    }

    #[test]
    fn waiting_for_nothing_is_reported_with_what_hangs() {
        let env = SimEnv::new(1);
        env.add_witness(|| vec!["write at 0x0 of 'disk'".to_owned()]);
        let stuck = env.try_run(futures::future::pending::<()>()).unwrap_err();
        assert!(!stuck.endless);
        assert!(
            stuck.to_string().contains("hangs: write at 0x0 of 'disk'"),
            "{stuck}"
        );
    }

    #[test]
    fn idle_comes_after_everything_that_is_ready_and_before_time_moves() {
        let env = SimEnv::new(3);
        let inner = env.clone();
        env.run(async move {
            let quick = inner.start(async {
                for _ in 0..50 {
                    yield_now().await;
                }
            });
            let sleeper = inner.clone();
            let slow = inner.start(async move { sleeper.sleep(Duration::from_secs(1)).await });
            inner.idle().await;
            assert!(quick.is_done());
            assert!(!slow.is_done());
        });
    }

    #[test]
    fn a_dropped_sleep_leaves_no_timer() {
        let env = SimEnv::new(1);
        let inner = env.clone();
        env.run(async move {
            let mut sleep = inner.sleep(Duration::from_secs(9));
            let _ = futures::poll!(&mut sleep);
            drop(sleep);
        });
        assert!(env.shared.state.lock().timers.is_empty());
    }
}
