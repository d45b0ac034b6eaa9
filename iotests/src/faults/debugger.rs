//! The state machine of a `blkdebug` node: which rules are active, which requests stand at a breakpoint.
//!
//! An event first makes the rules that wait for it (in the present state) active in place of those that were active
//! before, if there are any; then it changes the state; then it stops the request at each breakpoint that is set for it,
//! the newest first. A breakpoint stops one request. What a request meets is decided by [`Debugger::judge`]. Nothing
//! here does I/O; locks are never held while a request stands still.

use std::{fmt, sync::Arc};

use block_core::{DebugEvent, Error, ErrorKind, Result};
use futures::channel::oneshot;
use parking_lot::Mutex;

use super::rules::{self, Action, Effect, Injection, IoType, Rule};

/// Something that a person at a prompt wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A request stands at the breakpoint with this tag.
    Suspended(String),
    /// It goes on.
    Resuming(String),
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Suspended(tag) => write!(f, "blkdebug: Suspended request '{tag}'"),
            Self::Resuming(tag) => write!(f, "blkdebug: Resuming request '{tag}'"),
        }
    }
}

/// Who is told. Called without any lock held; must not block.
pub type Observer = Arc<dyn Fn(&Notice) + Send + Sync>;

/// What happens to one request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// It fails with this errno; `true`: before anything else gets a turn.
    pub fail: Option<(i32, bool)>,
    /// Milliseconds that it begins later.
    pub delay: u64,
    /// Only so many bytes are done, and then this errno (0: none).
    pub cut: Option<(u64, i32)>,
    /// Bits that are changed, counted from the start of the request.
    pub flips: Vec<u64>,
}

struct Stop {
    id: u64,
    tag: String,
    go: oneshot::Sender<()>,
}

struct State {
    state: u64,
    next_id: u64,
    rules: Vec<(u64, Rule)>,
    active: Vec<(u64, Injection)>,
    /// Requests that stand still, the longest first.
    suspended: Vec<Stop>,
    waiting: Vec<(String, oneshot::Sender<()>)>,
    injected: u64,
    /// Breakpoints are gone for good: the node is being closed.
    closing: bool,
}

/// See the file's header.
pub struct Debugger {
    state: Mutex<State>,
    observer: Option<Observer>,
}

/// A request that stands still; takes its place back when it is dropped there.
struct Standing<'a> {
    debugger: &'a Debugger,
    id: u64,
    go: oneshot::Receiver<()>,
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        let mut state = self.debugger.state.lock();
        state.suspended.retain(|stop| stop.id != self.id);
    }
}

impl Debugger {
    pub(super) fn new(rules: Vec<Rule>, observer: Option<Observer>) -> Self {
        let debugger = Self {
            state: Mutex::new(State {
                state: 1,
                next_id: rules.len() as u64,
                rules: (0..).zip(rules).collect(),
                active: Vec::new(),
                suspended: Vec::new(),
                waiting: Vec::new(),
                injected: 0,
                closing: false,
            }),
            observer,
        };
        // Rules that wait for nothing; there is no request that could stop yet.
        debugger.state.lock().activate(DebugEvent::None);
        debugger
    }

    fn notify(&self, notice: &Notice) {
        if let Some(observer) = &self.observer {
            observer(notice);
        }
    }

    /// Stops the request for which `event` is raised at every breakpoint set for it. Comes back when all of them were
    /// resumed.
    ///
    /// Cancellation: a request that is dropped while it stands still leaves no trace.
    pub async fn event(&self, event: DebugEvent) {
        let stops = {
            let mut state = self.state.lock();
            state.activate(event);
            state.take_breakpoints(event)
        };
        let mut standing = Vec::with_capacity(stops.len());
        for (id, tag, go) in stops {
            standing.push(Standing {
                debugger: self,
                id,
                go,
            });
            self.notify(&Notice::Suspended(tag.clone()));
            // After the notice: whoever waited for it finds it given.
            let mut woken = Vec::new();
            self.state
                .lock()
                .waiting
                .extract_if(.., |(wanted, _)| *wanted == tag)
                .for_each(|(_, waiter)| woken.push(waiter));
            for waiter in woken {
                // A waiter that gave up has dropped its end.
                let _ = waiter.send(());
            }
        }
        for stop in &mut standing {
            // An end that was dropped means the same: go on.
            let _ = (&mut stop.go).await;
        }
    }

    /// Sets a breakpoint: the next request that raises the event called `event` stops there.
    ///
    /// # Errors
    /// ENOENT when there is no such event.
    pub fn set_breakpoint(&self, event: &str, tag: &str) -> Result<()> {
        let event = rules::event(event).map_err(|_| no_such("event", event))?;
        let mut state = self.state.lock();
        let id = state.new_id();
        state.rules.push((
            id,
            Rule {
                event,
                state: 0,
                action: Action::Break(tag.to_owned()),
            },
        ));
        Ok(())
    }

    /// Removes the breakpoints with this tag and resumes all requests that stopped there.
    ///
    /// # Errors
    /// ENOENT when no breakpoint was left to remove; requests were resumed all the same.
    pub fn remove_breakpoint(&self, tag: &str) -> Result<()> {
        let removed = {
            let mut state = self.state.lock();
            let before = state.rules.len();
            state
                .rules
                .retain(|(_, rule)| !matches!(&rule.action, Action::Break(set) if set == tag));
            before != state.rules.len()
        };
        while self.resume(tag).is_ok() {}
        if removed {
            Ok(())
        } else {
            Err(no_such("breakpoint", tag))
        }
    }

    /// Lets the request go on that stopped last with this tag.
    ///
    /// # Errors
    /// ENOENT when no request stands there.
    pub fn resume(&self, tag: &str) -> Result<()> {
        let stop = {
            let mut state = self.state.lock();
            let at = state.suspended.iter().rposition(|stop| stop.tag == tag);
            at.map(|at| state.suspended.remove(at))
        };
        let stop = stop.ok_or_else(|| no_such("request", tag))?;
        self.notify(&Notice::Resuming(stop.tag));
        // A request that was dropped meanwhile doesn't care.
        let _ = stop.go.send(());
        Ok(())
    }

    /// Removes all breakpoints, forbids new ones, and resumes all requests: the node is about to be closed.
    pub fn resume_all(&self) {
        let tags: Vec<String> = {
            let mut state = self.state.lock();
            state.closing = true;
            state
                .rules
                .retain(|(_, rule)| !matches!(rule.action, Action::Break(_)));
            state
                .suspended
                .iter()
                .map(|stop| stop.tag.clone())
                .collect()
        };
        for tag in tags {
            // One that was resumed or dropped meanwhile needs nothing.
            let _ = self.resume(&tag);
        }
    }

    /// Whether a request stands at a breakpoint with this tag, or may come to one.
    pub fn may_suspend(&self, tag: &str) -> bool {
        let state = self.state.lock();
        let is_set = state
            .rules
            .iter()
            .any(|(_, rule)| matches!(&rule.action, Action::Break(set) if set == tag));
        is_set || state.suspended.iter().any(|stop| stop.tag == tag)
    }

    /// Whether a request stands at a breakpoint with this tag.
    pub fn is_suspended(&self, tag: &str) -> bool {
        let state = self.state.lock();
        state.suspended.iter().any(|stop| stop.tag == tag)
    }

    /// Comes back when a request stands at a breakpoint with this tag.
    ///
    /// Cancellation: leaves no trace that anybody sees.
    pub async fn wait_suspended(&self, tag: &str) {
        loop {
            let receiver = {
                let mut state = self.state.lock();
                if state.suspended.iter().any(|stop| stop.tag == tag) {
                    return;
                }
                let (sender, receiver) = oneshot::channel();
                state.waiting.push((tag.to_owned(), sender));
                receiver
            };
            if receiver.await.is_err() {
                return;
            }
        }
    }

    /// The present state, 1 at the beginning.
    pub fn state(&self) -> u64 {
        self.state.lock().state
    }

    /// How many requests a rule did something to.
    pub fn injected(&self) -> u64 {
        self.state.lock().injected
    }

    /// What the active rules do to a request.
    pub(super) fn judge(&self, io: IoType, offset: u64, len: u64) -> Verdict {
        let mut verdict = Verdict::default();
        let mut state = self.state.lock();
        let mut spent = Vec::new();
        for (id, injection) in &state.active {
            let Injection {
                matching,
                effect,
                once,
            } = injection;
            if !matching.matches(io, effect.is_usual(io), offset, len) {
                continue;
            }
            let takes_effect = match *effect {
                Effect::Fail { errno, immediately } => {
                    let first = verdict.fail.is_none();
                    if first {
                        verdict.fail = Some((errno, immediately));
                    }
                    first
                }
                Effect::Delay { millis } => {
                    verdict.delay = verdict.delay.saturating_add(millis);
                    true
                }
                Effect::Torn { bytes, errno } | Effect::Short { bytes, errno } => {
                    let first = verdict.cut.is_none();
                    if first {
                        verdict.cut = Some((bytes.min(len), errno));
                    }
                    first
                }
                Effect::Flip { bit } => {
                    let at = bit.saturating_add(matching.place(offset).saturating_mul(8));
                    let inside = at / 8 < len;
                    if inside {
                        verdict.flips.push(at);
                    }
                    inside
                }
            };
            if takes_effect && *once {
                spent.push(*id);
            }
        }
        if verdict != Verdict::default() {
            state.injected += 1;
        }
        if !spent.is_empty() {
            state.active.retain(|(id, _)| !spent.contains(id));
            state.rules.retain(|(id, _)| !spent.contains(id));
        }
        // 0 stands for success.
        if matches!(verdict.fail, Some((0, _))) {
            verdict.fail = None;
        }
        verdict
    }
}

impl State {
    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn activate(&mut self, event: DebugEvent) {
        let now = self.state;
        let mut found = Vec::new();
        let mut next = None;
        for (id, rule) in &self.rules {
            if rule.event != event || (rule.state != 0 && rule.state != now) {
                continue;
            }
            match &rule.action {
                Action::Inject(injection) => found.push((*id, *injection)),
                Action::SetState(state) => next = Some(*state),
                Action::Break(_) => {}
            }
        }
        if !found.is_empty() {
            self.active = found;
        }
        if let Some(state) = next {
            self.state = state;
        }
    }

    /// Removes the breakpoints that are set for `event` and notes that a request stands at each of them, the newest
    /// first.
    fn take_breakpoints(&mut self, event: DebugEvent) -> Vec<(u64, String, oneshot::Receiver<()>)> {
        if self.closing {
            return Vec::new();
        }
        let hit: Vec<String> = self
            .rules
            .extract_if(.., |(_, rule)| {
                rule.event == event && matches!(rule.action, Action::Break(_))
            })
            .filter_map(|(_, rule)| match rule.action {
                Action::Break(tag) => Some(tag),
                _ => None,
            })
            .collect();
        hit.into_iter()
            .rev()
            .map(|tag| {
                let id = self.new_id();
                let (go, wait) = oneshot::channel();
                self.suspended.push(Stop {
                    id,
                    tag: tag.clone(),
                    go,
                });
                (id, tag, wait)
            })
            .collect()
    }
}

fn no_such(what: &str, name: &str) -> Error {
    Error::from_kind(ErrorKind::NotFound).with_field(what, name, format!("a {what} that there is"))
}
