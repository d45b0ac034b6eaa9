//! What tasks of the simulated world wait for: a timer, rest, the result of another task, their next turn. Scheduling
//! itself is in the parent.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;

use super::Shared;

pub(super) struct Sleep {
    pub(super) shared: Weak<Shared>,
    pub(super) until: Duration,
    pub(super) key: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(shared) = self.shared.upgrade() else {
            return Poll::Ready(());
        };
        let mut state = shared.state.lock();
        if state.now >= self.until {
            return Poll::Ready(());
        }
        let key = match self.key {
            Some(key) => key,
            None => {
                state.next_id += 1;
                state.next_id - 1
            }
        };
        state.timers.insert((self.until, key), cx.waker().clone());
        drop(state);
        self.key = Some(key);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let (Some(key), Some(shared)) = (self.key, self.shared.upgrade()) {
            let waker = shared.state.lock().timers.remove(&(self.until, key));
            drop(waker);
        }
    }
}

/// See [`super::SimEnv::idle`].
pub struct Idle {
    pub(super) shared: Weak<Shared>,
    pub(super) asked: bool,
    pub(super) came: Arc<AtomicBool>,
}

impl Future for Idle {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.came.load(Ordering::SeqCst) {
            return Poll::Ready(());
        }
        let Some(shared) = self.shared.upgrade() else {
            return Poll::Ready(());
        };
        if !self.asked {
            self.asked = true;
            let entry = (self.came.clone(), cx.waker().clone());
            shared.state.lock().idle.push(entry);
        }
        Poll::Pending
    }
}

pub(super) struct Slot<T> {
    pub(super) value: Option<T>,
    pub(super) done: bool,
    pub(super) waker: Option<Waker>,
}

/// A task's result, to be awaited or looked at. Dropping it doesn't stop the task.
pub struct Running<T>(pub(super) Arc<Mutex<Slot<T>>>);

impl<T> Running<T> {
    /// Whether the task has ended.
    pub fn is_done(&self) -> bool {
        self.0.lock().done
    }
}

impl<T> Future for Running<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut slot = self.0.lock();
        match slot.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                slot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Lets everyone else who is ready go first, or not: as the schedule says.
pub fn yield_now() -> impl Future<Output = ()> + Send {
    let mut yielded = false;
    futures::future::poll_fn(move |cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}
