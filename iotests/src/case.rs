//! What a case is, how one is run, and what comes out.
//!
//! A case is a name, a group, and a function from a [`Scene`] to a [`Verdict`]. Everything about the driver that it needs
//! it asks the scene for, and answers [`Verdict::NotCovered`] when the driver doesn't have it. One run of a case is one
//! world; a case keeps nothing between runs.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use block_core::{Options, Registry};
use futures::{FutureExt, TryFutureExt as _, future::BoxFuture};
use serde::Serialize;

use crate::{
    aftermath,
    duties::Duty,
    lab::{Lab, LabOptions},
    panics, parts,
    sim::{CancelAt, Cancelled, DropWhen, Order, Running, Stuck},
};

/// A format to be tested, and how its images are made.
#[derive(Debug, Clone)]
pub struct FormatUnderTest {
    /// The driver's name in the registry.
    pub name: String,
    /// Options of creation, without the size. Each image has its own data file where `data_file=ENDING` is among them
    /// (`IMAGE.ENDING`); the key of encrypted ones (`encrypt.format=…`) is the suite's.
    pub create: Options,
    /// The driver claims safeguards of its own: it must keep other ranges whole also when there is no gate.
    pub safeguards: bool,
    /// The driver claims what the contract says of power cuts: no corruption, and everything there that was flushed.
    pub crash_safe: bool,
}

impl FormatUnderTest {
    /// A format with its default options.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            create: Options::new(),
            safeguards: false,
            crash_safe: true,
        }
    }

    /// With an option of creation.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<serde_json::Value>) -> Self {
        self.create.set(key, value);
        self
    }

    /// See [`Self::safeguards`].
    #[must_use]
    pub fn with_safeguards(mut self) -> Self {
        self.safeguards = true;
        self
    }

    /// See [`Self::crash_safe`].
    #[must_use]
    pub fn without_crash_safety(mut self) -> Self {
        self.crash_safe = false;
        self
    }

    /// Name and options, for tables: `qcow2:cluster_size=4k,compat=0.10`.
    pub fn label(&self) -> String {
        if self.create.0.is_empty() {
            return self.name.clone();
        }
        format!("{}:{}", self.name, self.create_text())
    }

    /// The options as `-o` takes them.
    pub fn create_text(&self) -> String {
        parts::text(&self.create)
    }
}

/// Why a case failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure(pub String);

/// Begins the text of a failure that isn't one. No message begins like that.
const NOT_COVERED: &str = "\0not covered: ";

impl Failure {
    /// Ends a case from within a helper because the driver doesn't have what the case is about: no failure, but
    /// [`Verdict::NotCovered`].
    pub fn not_covered(why: &str) -> Self {
        Self(format!("{NOT_COVERED}{why}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<block_core::Error> for Failure {
    fn from(error: block_core::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// Waits for a request that the scene started. False when it was dropped on the way.
pub async fn ended<T, E: Into<Failure>>(
    running: Running<Result<Result<T, E>, Cancelled>>,
) -> Result<bool, Failure> {
    match running.await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) => Err(error.into()),
        Err(Cancelled) => Ok(false),
    }
}

/// What comes out of a case that didn't fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "detail")]
pub enum Verdict {
    /// Everything was as it must be, and what the case is about did happen.
    Passed,
    /// The driver doesn't have what the case is about.
    NotCovered(String),
    /// Nothing went wrong, but what the case is about didn't happen.
    Inconclusive(String),
    /// Something went wrong.
    Failed(String),
}

impl Verdict {
    /// Whether it says "failed".
    pub fn is_failed(&self) -> bool {
        matches!(self, Self::Failed(_))
    }

    /// The word for tables.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::NotCovered(_) => "not covered",
            Self::Inconclusive(_) => "INCONCLUSIVE",
            Self::Failed(_) => "FAILED",
        }
    }

    /// What there is to say beyond the word.
    pub fn detail(&self) -> &str {
        match self {
            Self::Passed => "",
            Self::NotCovered(text) | Self::Inconclusive(text) | Self::Failed(text) => text,
        }
    }
}

/// What a case's function gives.
pub type CaseResult = Result<Verdict, Failure>;

/// What a case is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Group {
    Rw,
    Status,
    Backing,
    Graph,
    Jobs,
    Race,
    Crash,
    Cancel,
    Fault,
    Hostile,
    Interop,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Rw,
        Self::Status,
        Self::Backing,
        Self::Graph,
        Self::Jobs,
        Self::Race,
        Self::Crash,
        Self::Cancel,
        Self::Fault,
        Self::Hostile,
        Self::Interop,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rw => "rw",
            Self::Status => "status",
            Self::Backing => "backing",
            Self::Graph => "graph",
            Self::Jobs => "jobs",
            Self::Race => "race",
            Self::Crash => "crash",
            Self::Fault => "fault",
            Self::Hostile => "hostile",
            Self::Interop => "interop",
            Self::Cancel => "cancel",
        }
    }
}

type CaseFn = dyn Fn(Arc<Scene>) -> BoxFuture<'static, CaseResult> + Send + Sync;

/// A case.
#[derive(Clone)]
pub struct Case {
    /// Unique; group first, then what it is about, in words joined by dashes.
    pub name: String,
    /// What it is about.
    pub group: Group,
    /// The sentence that it proves.
    pub proves: String,
    /// Whether its graph has the gate. Cases without are about a driver's own safeguards.
    pub gate: bool,
    /// The request alignment of its storage, in bytes.
    pub alignment: u64,
    /// The one duty of a driver that it is about, if it is about one alone: a failure names it.
    pub duty: Option<Duty>,
    /// It belongs to the subset that runs in a few seconds.
    pub quick: bool,
    /// It leaves images behind that are damaged on purpose.
    pub damages: bool,
    run: Arc<CaseFn>,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Case '{}'", self.name)
    }
}

impl Case {
    /// A case whose graph has the gate.
    pub fn new<F>(
        group: Group,
        name: impl Into<String>,
        proves: impl Into<String>,
        run: impl Fn(Arc<Scene>) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = CaseResult> + Send + 'static,
    {
        Self {
            name: name.into(),
            group,
            proves: proves.into(),
            gate: true,
            alignment: 1,
            duty: None,
            quick: true,
            damages: false,
            run: Arc::new(move |scene| run(scene).boxed()),
        }
    }

    /// In a graph without the gate, to see what a driver's own safeguards do.
    #[must_use]
    pub fn without_gate(mut self) -> Self {
        self.gate = false;
        self
    }

    /// About one duty alone. Whatever makes it fail, the duty was forgotten.
    #[must_use]
    pub fn duty(mut self, duty: Duty) -> Self {
        self.duty = Some(duty);
        self
    }

    /// Takes too long for the quick subset.
    #[must_use]
    pub fn slow(mut self) -> Self {
        self.quick = false;
        self
    }

    /// Leaves images behind that are damaged on purpose: nobody looks at them afterwards.
    #[must_use]
    pub fn leaves_damage(mut self) -> Self {
        self.damages = true;
        self
    }

    /// On storage whose requests must be aligned to so many bytes.
    #[must_use]
    pub fn on_alignment(mut self, alignment: u64) -> Self {
        self.alignment = alignment;
        self
    }
}

/// Which request is dropped, and at which of its await points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CancelPlan {
    /// The how-manieth request that the scene starts.
    pub request: usize,
    /// After how many polls that were answered "pending".
    pub polls: usize,
    /// At once, or when everything else has come to rest.
    pub when: DropWhen,
}

/// What a case works with: a world, the format, and the requests that it starts.
pub struct Scene {
    /// The world.
    pub lab: Lab,
    /// The format under test.
    pub format: FormatUnderTest,
    /// The case's graph has the gate.
    pub gate: bool,
    cancel: Option<CancelPlan>,
    started: AtomicUsize,
    reached: Arc<AtomicBool>,
    damaged: AtomicBool,
}

impl Scene {
    /// Nothing is going to be dropped: the order of everything is known, and can be insisted on.
    pub fn strict(&self) -> bool {
        self.cancel.is_none()
    }

    /// Starts a request beside the case's own thread. This is what can be dropped.
    pub fn start<T: Send + 'static>(
        &self,
        request: impl Future<Output = T> + Send + 'static,
    ) -> Running<Result<T, Cancelled>> {
        let number = self.started.fetch_add(1, Ordering::SeqCst);
        let env = &self.lab.env;
        match self.cancel {
            Some(plan) if plan.request == number => {
                let reached = self.reached.clone();
                env.start(CancelAt::new(env, request, plan.polls, plan.when, reached))
            }
            _ => env.start(request.map(Ok)),
        }
    }

    /// The images of this run are damaged on purpose: nobody looks at them afterwards.
    pub fn leaves_damage(&self) {
        self.damaged.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::SeqCst)
    }

    /// Everything that can happen by itself has happened.
    pub async fn rest(&self) {
        self.lab.env.idle().await;
    }
}

/// What one run of a case gave.
#[derive(Debug, Clone)]
pub struct Run {
    /// The verdict.
    pub verdict: Verdict,
    /// How many requests it started.
    pub requests: usize,
    /// The request that was to be dropped was dropped before it had ended.
    pub dropped: bool,
    /// How many polls it took.
    pub polls: u64,
}

/// How a case is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct How {
    /// Decides the schedule; 0 is first come first served.
    pub seed: u64,
    /// A request that is dropped on the way.
    pub cancel: Option<CancelPlan>,
    /// Ask the installed qemu-img about the images that the case leaves behind.
    pub external: bool,
}

/// Runs a case once. Without asking qemu-img: [`run_how`] can.
pub fn run(
    registry: &Registry,
    format: &FormatUnderTest,
    case: &Case,
    seed: u64,
    cancel: Option<CancelPlan>,
) -> Run {
    let how = How {
        seed,
        cancel,
        external: false,
    };
    run_how(registry, format, case, how)
}

/// Runs a case once, and judges what it leaves behind ([`crate::aftermath`]).
pub fn run_how(registry: &Registry, format: &FormatUnderTest, case: &Case, how: How) -> Run {
    let options = LabOptions {
        seed: how.seed,
        order: if how.seed == 0 {
            Order::Fifo
        } else {
            Order::Random
        },
        gate: case.gate,
        alignment: case.alignment,
    };
    let scene = Arc::new(Scene {
        lab: Lab::new(registry, options),
        format: format.clone(),
        gate: case.gate,
        cancel: how.cancel,
        started: AtomicUsize::new(0),
        reached: Arc::default(),
        damaged: AtomicBool::new(case.damages),
    });
    let env = scene.lab.env.clone();
    let future = (case.run)(scene.clone());
    let mut verdict = judged(panics::catch(|| env.try_run(future)));
    let polls = env.polls();
    if verdict == Verdict::Passed && how.cancel.is_none() {
        let look = aftermath::judge(&scene, case.group, how.external).map_ok(|()| Verdict::Passed);
        verdict = judged(panics::catch(|| env.try_run(look)));
    }
    let verdict = match (verdict, case.duty) {
        (Verdict::Failed(seen), Some(duty)) => Verdict::Failed(duty.explain(&seen)),
        (verdict, _) => verdict,
    };
    let leaks = aftermath::Leaks::watch(&scene);
    let run = Run {
        verdict,
        requests: scene.started.load(Ordering::SeqCst),
        dropped: scene.reached.load(Ordering::SeqCst),
        polls,
    };
    env.shutdown();
    drop((scene, env));
    match leaks.found() {
        Some(text) if run.verdict == Verdict::Passed => Run {
            verdict: Verdict::Failed(text),
            ..run
        },
        _ => run,
    }
}

fn judged(ended: Result<Result<CaseResult, Stuck>, String>) -> Verdict {
    match ended {
        Ok(Ok(Ok(verdict))) => verdict,
        Ok(Ok(Err(Failure(text)))) => match text.strip_prefix(NOT_COVERED) {
            Some(why) => Verdict::NotCovered(why.to_owned()),
            None => Verdict::Failed(text),
        },
        Ok(Err(stuck)) => Verdict::Failed(stuck.to_string()),
        Err(panic) => Verdict::Failed(panic),
    }
}
