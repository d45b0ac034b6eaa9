//! Claims on guest clusters: two writes that would allocate the same guest cluster take turns.
//!
//! A claim covers a run of guest clusters and waits for every overlapping claim that was made before it, and only for
//! those; so there is no cycle and no starvation. Whoever waited reads the mapping again: the claim says nothing about
//! whether the one before succeeded. This file knows nothing of mappings, and holds no lock while anyone waits.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
};

use parking_lot::Mutex;

use crate::layout::ClusterIndex;

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// By ticket, which is the order of arrival.
    claims: BTreeMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    first: u64,
    last: u64,
    waker: Option<Waker>,
}

impl State {
    fn must_wait(&self, ticket: u64, first: u64, last: u64) -> bool {
        self.claims
            .range(..ticket)
            .any(|(_, other)| other.first <= last && first <= other.last)
    }
}

/// The claims on the guest clusters of one image.
#[derive(Debug, Default, Clone)]
pub(crate) struct Claims(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// How many claims there are, for a look without the lock.
    count: AtomicUsize,
}

/// Clusters that one allocating write has for itself. Dropping it lets the next one go on.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Arc<Shared>,
    ticket: u64,
}

impl Claims {
    /// Whether there is any claim.
    pub fn any(&self) -> bool {
        self.0.count.load(Ordering::Acquire) != 0
    }

    /// Claims the clusters `first..=last`; says also whether it had to wait.
    ///
    /// Cancellation: dropping the future withdraws the claim.
    pub async fn claim(&self, first: ClusterIndex, last: ClusterIndex) -> (Claim, bool) {
        let (first, last) = (first.0, last.0);
        let ticket = {
            let mut state = self.0.state.lock();
            let ticket = state.next;
            state.next += 1;
            state.claims.insert(
                ticket,
                Entry {
                    first,
                    last,
                    waker: None,
                },
            );
            self.0.count.fetch_add(1, Ordering::Release);
            ticket
        };
        let claim = Claim {
            claims: self.0.clone(),
            ticket,
        };
        let mut waited = false;
        poll_fn(|context| {
            let mut state = claim.claims.state.lock();
            if !state.must_wait(ticket, first, last) {
                return Poll::Ready(());
            }
            waited = true;
            if let Some(entry) = state.claims.get_mut(&ticket) {
                entry.waker = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
        (claim, waited)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let wakers: Vec<Waker> = {
            let mut state = self.claims.state.lock();
            let Some(gone) = state.claims.remove(&self.ticket) else {
                return;
            };
            self.claims.count.fetch_sub(1, Ordering::Release);
            state
                .claims
                .range_mut(self.ticket..)
                .filter(|(_, other)| other.first <= gone.last && gone.first <= other.last)
                .filter_map(|(_, other)| other.waker.take())
                .collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, executor::block_on, pin_mut};

    fn c(n: u64) -> ClusterIndex {
        ClusterIndex(n)
    }

    #[test]
    fn an_overlapping_claim_waits_until_the_first_is_dropped() {
        let claims = Claims::default();
        let (first, waited) = block_on(claims.claim(c(3), c(5)));
        assert!(!waited);
        let second = claims.claim(c(5), c(9));
        pin_mut!(second);
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        let (_second, waited) = block_on(second);
        assert!(waited);
    }

    #[test]
    fn a_claim_that_overlaps_nothing_does_not_wait() {
        let claims = Claims::default();
        let (_first, _) = block_on(claims.claim(c(3), c(5)));
        let (_second, waited) = block_on(claims.claim(c(6), c(9)));
        assert!(!waited);
    }

    #[test]
    fn a_waiter_that_is_dropped_leaves_no_trace() {
        let claims = Claims::default();
        let (first, _) = block_on(claims.claim(c(0), c(1)));
        {
            let second = claims.claim(c(1), c(2));
            pin_mut!(second);
            assert!(second.as_mut().now_or_never().is_none());
            let third = claims.claim(c(2), c(3));
            pin_mut!(third);
            assert!(
                third.as_mut().now_or_never().is_none(),
                "the second came before it"
            );
        }
        let (_fourth, waited) = block_on(claims.claim(c(2), c(3)));
        assert!(!waited);
        drop(first);
        assert_eq!(claims.0.state.lock().claims.len(), 1);
    }
}
