//! Where the references of unlinked clusters wait before they are dropped.
//!
//! A reference is dropped, and with it perhaps a cluster made allocatable, only when (a) its unlink is durable, (b) every
//! pin from before the unlink has ended, (c) its host range was punched, if a discard or zero write asked for that. Until
//! then the refcount, in memory and on disk, still counts it. This file keeps the books; `writeback` does the I/O.

use std::collections::VecDeque;

use block_core::{
    mutant,
    pins::{Grace, Pins},
};

use crate::cache::slice::NumberMap;

/// References to consecutive host clusters, one each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FreedRun {
    pub first: u64,
    pub count: u64,
    /// Whether the range is to be punched when nothing refers to it any more.
    pub punch: bool,
}

/// What one step under the metadata lock unlinked.
#[derive(Debug, Default)]
pub(crate) struct Freed(Vec<FreedRun>);

impl Freed {
    /// Adds one cluster.
    pub fn push(&mut self, cluster: u64, punch: bool) {
        match self.0.last_mut() {
            Some(run) if run.first + run.count == cluster && run.punch == punch => run.count += 1,
            _ => self.0.push(FreedRun {
                first: cluster,
                count: 1,
                punch,
            }),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn runs(&self) -> &[FreedRun] {
        &self.0
    }
}

struct Group {
    runs: Vec<FreedRun>,
    /// The batch whose success makes the unlinks durable.
    batch: u64,
    grace: Grace,
    /// It was found waiting for a pin before.
    deferred: bool,
}

/// References that wait.
#[derive(Default)]
pub(crate) struct Quarantine {
    groups: VecDeque<Group>,
    /// How many references to a cluster wait, for those where any do.
    pending: NumberMap<u64>,
    clusters: u64,
}

impl Quarantine {
    /// References that wait for a cluster.
    pub fn pending(&self, cluster: u64) -> u64 {
        self.pending.get(&cluster).copied().unwrap_or(0)
    }

    /// Notes one more; the step that unlinks it goes on to [`Self::close`].
    pub fn note(&mut self, cluster: u64) {
        *self.pending.entry(cluster).or_insert(0) += 1;
        self.clusters += 1;
    }

    /// Ends a step: its unlinks were made (in memory), `batch` is the next to write them.
    pub fn close(&mut self, freed: Freed, batch: u64, pins: &Pins) {
        if !freed.is_empty() {
            self.groups.push_back(Group {
                runs: freed.0,
                batch,
                grace: pins.retire(),
                deferred: false,
            });
        }
    }

    /// References that wait, in all.
    pub fn len(&self) -> u64 {
        self.clusters
    }

    pub fn is_empty(&self) -> bool {
        self.clusters == 0
    }

    /// Takes what may be dropped when the batches up to `durable` have succeeded. Also says for how many references a
    /// pin was in the way for the first time.
    pub fn take_ready(&mut self, durable: u64, pins: &Pins) -> (Vec<FreedRun>, u64) {
        let (mut ready, mut deferred) = (Vec::new(), 0);
        let mut left = VecDeque::with_capacity(self.groups.len());
        for mut group in self.groups.drain(..) {
            if group.batch > durable && !mutant::is_active("qcow2-free-before-unlink-is-durable") {
                left.push_back(group);
            } else if pins.observe(&mut group.grace) || mutant::is_active("qcow2-free-ignores-pins")
            {
                ready.extend_from_slice(&group.runs);
            } else {
                if !group.deferred {
                    group.deferred = true;
                    deferred += group.runs.iter().map(|run| run.count).sum::<u64>();
                }
                left.push_back(group);
            }
        }
        self.groups = left;
        (ready, deferred)
    }

    /// One reference was dropped.
    pub fn dropped(&mut self, cluster: u64) {
        self.clusters = self.clusters.saturating_sub(1);
        if let Some(count) = self.pending.get_mut(&cluster) {
            *count -= 1;
            if *count == 0 {
                self.pending.remove(&cluster);
            }
        }
    }
}

/// Consecutive clusters out of a list in any order: first and count, ascending.
pub(crate) fn merge_clusters(mut clusters: Vec<u64>) -> Vec<(u64, u64)> {
    clusters.sort_unstable();
    clusters.dedup();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for cluster in clusters {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == cluster => *count += 1,
            _ => runs.push((cluster, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_waits_for_its_batch_and_for_pins() {
        let pins = Pins::new();
        let mut quarantine = Quarantine::default();
        let pin = pins.pin();
        let mut freed = Freed::default();
        for cluster in [5, 6, 9] {
            quarantine.note(cluster);
            freed.push(cluster, true);
        }
        quarantine.close(freed, 3, &pins);
        assert_eq!(quarantine.len(), 3);
        assert!(quarantine.take_ready(2, &pins).0.is_empty());
        let (ready, deferred) = quarantine.take_ready(3, &pins);
        assert!(ready.is_empty());
        assert_eq!(deferred, 3);
        drop(pin);
        let (ready, deferred) = quarantine.take_ready(3, &pins);
        assert_eq!(deferred, 0);
        let run = |first, count| FreedRun {
            first,
            count,
            punch: true,
        };
        assert_eq!(ready, [run(5, 2), run(9, 1)]);
        assert_eq!(
            quarantine.pending(5),
            1,
            "still counted until it is dropped"
        );
        for cluster in [5, 6, 9] {
            quarantine.dropped(cluster);
        }
        assert!(quarantine.is_empty());
        assert_eq!(quarantine.pending(5), 0);
    }

    #[test]
    fn clusters_in_any_order_merge() {
        assert_eq!(merge_clusters(vec![7, 3, 4, 9, 8, 4]), [(3, 2), (7, 3)]);
    }
}
