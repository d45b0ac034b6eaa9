//! Grains that somebody is allocating right now.
//!
//! A plain write may overlap another one that reaches the driver at the same time; when both find a grain unallocated,
//! one of them gets the claim and the other waits until that ended, however it ended, and then looks at the mapping
//! again. A request holds the claims of one run of grains at most, taken in ascending order, and never waits while it
//! holds one. Nothing here knows what a claim is for.

use std::{collections::BTreeMap, sync::Arc};

use futures::channel::oneshot;
use parking_lot::Mutex;

use crate::layout::Grain;

#[derive(Debug, Default)]
struct Table {
    /// The claimed grains, and those who wait for each.
    claimed: BTreeMap<Grain, Vec<oneshot::Sender<()>>>,
}

/// The claims of one extent.
#[derive(Debug, Default)]
pub(crate) struct Claims(Arc<Mutex<Table>>);

/// What [`Claims::claim`] gives.
#[derive(Debug)]
pub(crate) enum Claimed {
    /// The first grains that were asked for, at least one.
    Mine(Claim),
    /// The first one is somebody else's. Completes, with whatever result, when it is free again; which says nothing about
    /// the mapping.
    Wait(oneshot::Receiver<()>),
}

/// A run of claimed grains. Dropping it lets go of them and wakes those who wait.
#[derive(Debug)]
pub(crate) struct Claim {
    table: Arc<Mutex<Table>>,
    first: Grain,
    count: u64,
}

impl Claims {
    /// Claims grains from `first` on: `count` of them or as many as are free in a row.
    pub(crate) fn claim(&self, first: Grain, count: u64) -> Claimed {
        let mut table = self.0.lock();
        if let Some(waiters) = table.claimed.get_mut(&first) {
            let (sender, receiver) = oneshot::channel();
            waiters.retain(|waiter| !waiter.is_canceled());
            waiters.push(sender);
            return Claimed::Wait(receiver);
        }
        let end = table
            .claimed
            .range(first..Grain(first.0.saturating_add(count)))
            .next()
            .map_or(first.0.saturating_add(count), |(grain, _)| grain.0);
        for grain in first.0..end {
            table.claimed.insert(Grain(grain), Vec::new());
        }
        drop(table);
        Claimed::Mine(Claim {
            table: Arc::clone(&self.0),
            first,
            count: end - first.0,
        })
    }

    /// How many grains are claimed.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.lock().claimed.len()
    }
}

impl Claim {
    /// How many grains it holds.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// Lets go of all but the first `count` grains.
    pub(crate) fn shrink(&mut self, count: u64) {
        if count < self.count {
            release(&self.table, self.first.0 + count..self.first.0 + self.count);
            self.count = count;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        release(&self.table, self.first.0..self.first.0 + self.count);
    }
}

fn release(table: &Mutex<Table>, grains: std::ops::Range<u64>) {
    let waiters: Vec<_> = {
        let mut table = table.lock();
        grains
            .filter_map(|grain| table.claimed.remove(&Grain(grain)))
            .collect()
    };
    // Dropping the senders wakes the waiters, outside of the lock.
    drop(waiters);
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn mine(claims: &Claims, first: u64, count: u64) -> Claim {
        match claims.claim(Grain(first), count) {
            Claimed::Mine(claim) => claim,
            Claimed::Wait(_) => panic!("grain {first} is claimed"),
        }
    }

    #[test]
    fn a_run_ends_before_the_next_claimed_grain() {
        let claims = Claims::default();
        let _other = mine(&claims, 5, 1);
        assert_eq!(mine(&claims, 2, 10).count(), 3);
        assert_eq!(mine(&claims, 6, 10).count(), 10);
        assert_eq!(claims.len(), 1);
    }

    #[test]
    fn waiters_are_woken_by_release_shrink_and_drop() {
        let claims = Claims::default();
        let mut claim = mine(&claims, 0, 3);
        let (Claimed::Wait(mut first), Claimed::Wait(mut last)) =
            (claims.claim(Grain(0), 1), claims.claim(Grain(2), 1))
        else {
            panic!("both are claimed")
        };
        assert!((&mut first).now_or_never().is_none());
        claim.shrink(1);
        assert!((&mut last).now_or_never().is_some());
        assert!((&mut first).now_or_never().is_none());
        drop(claim);
        assert!(first.now_or_never().is_some());
        assert_eq!(claims.len(), 0);
    }
}
