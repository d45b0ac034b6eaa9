//! Requests whose future was dropped while they were with a driver.
//!
//! Such a request stays tracked, now as a serialising one, until its I/O has ended: its tickets, pins and buffers stay
//! with it. Dropping only appends it to this list, one per graph, because a waiter at a shared child must be able to
//! finish a dropped request of another branch. The list is worked off by a task of the environment, and by whoever
//! waits at a gate, flushes, drains or closes, so that it ends also where nobody runs that task.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use futures::task::{ArcWake, waker};
use parking_lot::Mutex;

use crate::{env::Environment, path::Driven};

pub(crate) struct DeferredWork {
    env: Arc<dyn Environment>,
    count: AtomicUsize,
    tasks: Mutex<Vec<Arc<Task>>>,
    helpers: Mutex<Vec<Waker>>,
}

struct Task {
    driven: Mutex<Option<Driven>>,
}

struct WakeHelpers(Weak<DeferredWork>);

impl ArcWake for WakeHelpers {
    fn wake_by_ref(this: &Arc<Self>) {
        if let Some(work) = this.0.upgrade() {
            work.wake_helpers();
        }
    }
}

impl DeferredWork {
    pub(crate) fn new(env: Arc<dyn Environment>) -> Arc<Self> {
        Arc::new(Self {
            env,
            count: AtomicUsize::new(0),
            tasks: Mutex::default(),
            helpers: Mutex::default(),
        })
    }

    /// Takes over a request that was dropped.
    pub(crate) fn push(self: &Arc<Self>, driven: Driven) {
        let first = self.count.fetch_add(1, Ordering::SeqCst) == 0;
        self.tasks.lock().push(Arc::new(Task {
            driven: Mutex::new(Some(driven)),
        }));
        if first {
            let work = self.clone();
            self.env.spawn(Box::pin(async move { work.settle().await }));
        } else {
            self.wake_helpers();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    fn wake_helpers(&self) {
        let helpers = std::mem::take(&mut *self.helpers.lock());
        for helper in helpers {
            helper.wake();
        }
    }

    /// Polls what was dropped; the caller is woken when there may be more to do. True when nothing is left.
    pub(crate) fn help(self: &Arc<Self>, cx: &mut Context<'_>) -> bool {
        if self.is_empty() {
            return true;
        }
        {
            let mut helpers = self.helpers.lock();
            if !helpers.iter().any(|helper| helper.will_wake(cx.waker())) {
                helpers.push(cx.waker().clone());
            }
        }
        let shared = waker(Arc::new(WakeHelpers(Arc::downgrade(self))));
        let tasks = self.tasks.lock().clone();
        let mut ended = 0;
        for task in &tasks {
            // Somebody else is polling it; whoever that is also wakes us.
            let Some(mut slot) = task.driven.try_lock() else {
                continue;
            };
            let Some(driven) = slot.as_mut() else {
                continue;
            };
            let mut cx = Context::from_waker(&shared);
            if driven.poll_driven(&mut cx).is_ready() {
                *slot = None;
                ended += 1;
            }
        }
        if ended > 0 {
            self.tasks
                .lock()
                .retain(|task| task.driven.try_lock().is_none_or(|driven| driven.is_some()));
            self.count.fetch_sub(ended, Ordering::SeqCst);
            self.wake_helpers();
        }
        self.is_empty()
    }

    /// Completes when every request that was dropped has ended.
    pub(crate) async fn settle(self: &Arc<Self>) {
        futures::future::poll_fn(|cx| {
            if self.help(cx) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}
