//! How far the guest has come, for those who wait for it: jobs begin, and are interfered with, after so many requests. No
//! clock is involved, so that a scenario can be cut down without everything moving.

use std::task::{Poll, Waker};

use parking_lot::Mutex;

#[derive(Default)]
struct State {
    begun: u64,
    over: bool,
    waiting: Vec<Waker>,
}

/// See the file's header.
#[derive(Default)]
pub(super) struct Progress(Mutex<State>);

impl Progress {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let wakers = {
            let mut state = self.0.lock();
            change(&mut state);
            std::mem::take(&mut state.waiting)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The guest begins a request.
    pub fn begin(&self) {
        self.change(|state| state.begun += 1);
    }

    /// The guest has come to its end.
    pub fn finish(&self) {
        self.change(|state| state.over = true);
    }

    pub fn begun(&self) -> u64 {
        self.0.lock().begun
    }

    /// Completes when the guest has begun so many requests, or has come to its end.
    pub async fn reached(&self, begun: u64) {
        futures::future::poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.over || state.begun >= begun {
                return Poll::Ready(());
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Completes when the guest has come to its end.
    pub async fn finished(&self) {
        self.reached(u64::MAX).await;
    }
}
