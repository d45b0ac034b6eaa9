//! Requests whose future was dropped while they were with a driver.
//!
//! Such a request stays tracked, now as a serialising one, until its I/O has ended: its tickets, pins and buffers stay
//! with it. Dropping only appends it to this list, one per graph, because a waiter at a shared child must be able to
//! finish a dropped request of another branch. The list is worked off by a task of the environment, and by whoever
//! waits at a gate, flushes, drains or closes, so that it ends also where nobody runs that task.
//!
//! When the graph is gone, and the environment has dropped the task (its runtime was shut down), nobody is left to end what is
//! on the list. It is given up then: it would hold its nodes, and they the list, for ever.

use std::{
    cell::Cell,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use futures::task::{ArcWake, waker};
use parking_lot::Mutex;

use crate::{env::Environment, path::Driven};

thread_local! {
    /// This thread is polling dropped requests. One that waits somewhere must not poll the others from within.
    static HELPING: Cell<bool> = const { Cell::new(false) };
}

pub(crate) struct DeferredWork {
    env: Arc<dyn Environment>,
    count: AtomicUsize,
    tasks: Mutex<Vec<Arc<Task>>>,
    /// Those who wait for anything, and want to hear when there is something to be polled.
    watchers: Mutex<Vec<(u64, Waker)>>,
    next_watcher: AtomicU64,
    /// What dropped requests are polled with: wakes all watchers.
    waker: Waker,
    /// Tasks of the environment that work the list off.
    workers: AtomicUsize,
    graph_is_gone: AtomicBool,
}

/// A task of the environment works the list off as long as this is there.
struct Worker(Arc<DeferredWork>);

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.workers.fetch_sub(1, Ordering::SeqCst);
        self.0.give_up_if_abandoned();
    }
}

struct Task {
    driven: Mutex<Option<Driven>>,
    /// Somebody wanted to poll it while another one did.
    missed: AtomicBool,
}

struct WakeWatchers(Weak<DeferredWork>);

impl ArcWake for WakeWatchers {
    fn wake_by_ref(this: &Arc<Self>) {
        if let Some(work) = this.0.upgrade() {
            work.wake_watchers();
        }
    }
}

/// A place among those who are woken when a dropped request can go on. Dropping it gives the place up.
pub(crate) struct Watch {
    work: Arc<DeferredWork>,
    key: u64,
}

impl Watch {
    /// Polls what was dropped; the caller is woken when there may be more to do, also by requests that are dropped only
    /// later. True when nothing is left.
    pub(crate) fn help(&self, cx: &mut Context<'_>) -> bool {
        if HELPING.get() {
            // Inside a dropped request's own poll: whoever polls it polls the others as well.
            return false;
        }
        {
            let mut watchers = self.work.watchers.lock();
            match watchers.iter_mut().find(|(key, _)| *key == self.key) {
                Some((_, waker)) => waker.clone_from(cx.waker()),
                None => watchers.push((self.key, cx.waker().clone())),
            }
        }
        self.work.poll_all()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.work
            .watchers
            .lock()
            .retain(|(key, _)| *key != self.key);
    }
}

impl DeferredWork {
    pub(crate) fn new(env: Arc<dyn Environment>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            env,
            count: AtomicUsize::new(0),
            tasks: Mutex::default(),
            watchers: Mutex::default(),
            next_watcher: AtomicU64::new(0),
            waker: waker(Arc::new(WakeWatchers(this.clone()))),
            workers: AtomicUsize::new(0),
            graph_is_gone: AtomicBool::new(false),
        })
    }

    /// The graph is being dropped.
    pub(crate) fn graph_is_gone(&self) {
        self.graph_is_gone.store(true, Ordering::SeqCst);
        self.give_up_if_abandoned();
    }

    fn give_up_if_abandoned(&self) {
        let abandoned = || {
            self.graph_is_gone.load(Ordering::SeqCst) && self.workers.load(Ordering::SeqCst) == 0
        };
        while abandoned() {
            // What is dropped here may append what it asked of its children.
            let tasks = std::mem::take(&mut *self.tasks.lock());
            if tasks.is_empty() {
                break;
            }
            for task in tasks {
                let driven = task.driven.lock().take();
                if let Some(driven) = driven {
                    self.count.fetch_sub(1, Ordering::SeqCst);
                    driven.give_up();
                }
            }
        }
    }

    /// Takes over a request that was dropped.
    pub(crate) fn push(self: &Arc<Self>, driven: Driven) {
        let first = {
            let mut tasks = self.tasks.lock();
            let task = Task {
                driven: Mutex::new(Some(driven)),
                missed: AtomicBool::new(false),
            };
            tasks.push(Arc::new(task));
            self.count.fetch_add(1, Ordering::SeqCst) == 0
        };
        if first {
            self.workers.fetch_add(1, Ordering::SeqCst);
            let worker = Worker(self.clone());
            self.env
                .spawn(Box::pin(async move { worker.0.settle().await }));
        }
        self.wake_watchers();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// A place for somebody who is going to wait.
    pub(crate) fn watch(self: &Arc<Self>) -> Watch {
        Watch {
            work: self.clone(),
            key: self.next_watcher.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn wake_watchers(&self) {
        let wakers: Vec<Waker> = self
            .watchers
            .lock()
            .iter()
            .map(|(_, waker)| waker.clone())
            .collect();
        for waker in wakers {
            waker.wake();
        }
    }

    fn poll_all(&self) -> bool {
        if self.is_empty() {
            return true;
        }
        struct Reset;
        impl Drop for Reset {
            fn drop(&mut self) {
                HELPING.set(false);
            }
        }
        HELPING.set(true);
        let reset = Reset;
        let tasks = self.tasks.lock().clone();
        let mut ended = 0;
        for task in &tasks {
            loop {
                let Some(mut slot) = task.driven.try_lock() else {
                    // Somebody else is at it. Either they see the mark and poll again, or they are done already.
                    task.missed.store(true, Ordering::SeqCst);
                    if task.driven.try_lock().is_none() {
                        break;
                    }
                    continue;
                };
                task.missed.store(false, Ordering::SeqCst);
                if let Some(driven) = slot.as_mut() {
                    let mut cx = Context::from_waker(&self.waker);
                    if driven.poll_driven(&mut cx).is_ready() {
                        *slot = None;
                        ended += 1;
                    }
                }
                drop(slot);
                if !task.missed.swap(false, Ordering::SeqCst) {
                    break;
                }
            }
        }
        drop(reset);
        if ended > 0 {
            self.tasks
                .lock()
                .retain(|task| task.driven.try_lock().is_none_or(|driven| driven.is_some()));
            self.count.fetch_sub(ended, Ordering::SeqCst);
            self.wake_watchers();
        }
        self.is_empty()
    }

    /// Completes when every request that was dropped has ended.
    pub(crate) async fn settle(self: &Arc<Self>) {
        let watch = self.watch();
        futures::future::poll_fn(|cx| {
            if watch.help(cx) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// Waits for `work`, and meanwhile polls what was dropped: it may be that which is waited for.
    pub(crate) async fn help_until<T>(self: &Arc<Self>, work: impl Future<Output = T>) -> T {
        let watch = self.watch();
        let mut work = std::pin::pin!(work);
        futures::future::poll_fn(|cx| {
            watch.help(cx);
            work.as_mut().poll(cx)
        })
        .await
    }
}
