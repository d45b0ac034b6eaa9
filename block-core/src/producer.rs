//! Who a request comes from. A producer is a handle; whatever a driver asks of its children while it carries out a
//! producer's request counts as that producer's as well, down to the storage, whose queues are fair between producers.
//!
//! How it gets down: an edge is shared by all requests, so a child can't know who asks. The future of a driver call is
//! polled by the core alone (`path::Driven`), and while it is being polled its producer is noted for the thread.
//! Nothing waits or is ordered by it, and nothing is ever looked up by it: it is a label.

use std::{cell::Cell, fmt, pin::pin};

/// Tells producers of one graph apart: every [`crate::handle::BlockHandle`] has a number of its own, which no other ever
/// gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ProducerId(u64);

impl ProducerId {
    /// No handle's: what is done on nobody's behalf (opening and closing images, tasks of a driver's own).
    pub const NONE: Self = Self(0);

    /// The producer with a number; numbers of handles begin at 1.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number, for traces.
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ProducerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

thread_local! {
    static CURRENT: Cell<ProducerId> = const { Cell::new(ProducerId::NONE) };
}

/// On whose behalf this thread is polling a driver.
pub(crate) fn current() -> ProducerId {
    CURRENT.get()
}

/// Puts the one before back when it is dropped, also by a panic.
pub(crate) struct ActingFor(ProducerId);

impl Drop for ActingFor {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Until the guard is dropped, this thread acts on behalf of `producer`. Never held across an await.
pub(crate) fn act_for(producer: ProducerId) -> ActingFor {
    ActingFor(CURRENT.replace(producer))
}

/// Runs `work` on behalf of `producer`.
pub(crate) async fn on_behalf_of<T>(producer: ProducerId, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    std::future::poll_fn(|cx| {
        let _acting = act_for(producer);
        work.as_mut().poll(cx)
    })
    .await
}
