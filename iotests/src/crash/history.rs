//! What each sector may hold after a power cut: every version that it was given, when each began and was acknowledged, and
//! when flushes began and were acknowledged. It knows nothing of storage.

use std::collections::BTreeMap;

use crate::pattern::{Seen, Stamp};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// What a request left in a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    Stamp {
        owner: u32,
        seq: u64,
    },
    Zero,
    /// Zeroes, or whatever was there before.
    Undefined,
}

#[derive(Debug, Clone, Copy)]
struct Version {
    value: Value,
    begun: u64,
    /// `None` while it is in flight, and for good when it failed.
    ended: Option<u64>,
    /// It was durable when it was acknowledged.
    durable: bool,
}

/// All that a workload did. Times are counts of events.
#[derive(Debug, Default)]
pub(super) struct History {
    now: u64,
    sectors: BTreeMap<u64, Vec<Version>>,
    /// When it began, when it was acknowledged.
    flushes: Vec<(u64, u64)>,
    /// The disk's lengths: from when, in bytes, and since when durable.
    lengths: Vec<(u64, u64)>,
}

/// A request that is in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    begun: u64,
    from: u64,
    to: u64,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// The time of the last event.
    pub(super) fn now(&self) -> u64 {
        self.now
    }

    pub(super) fn begin(&mut self, value: Value, offset: u64, len: u64) -> Begun {
        let begun = self.tick();
        let (from, to) = (offset / SECTOR, (offset + len) / SECTOR);
        for sector in from..to {
            self.sectors.entry(sector).or_default().push(Version {
                value,
                begun,
                ended: None,
                durable: false,
            });
        }
        Begun { begun, from, to }
    }

    pub(super) fn end(&mut self, request: Begun, durable: bool) {
        let now = self.tick();
        for sector in request.from..request.to {
            let versions = self.sectors.entry(sector).or_default();
            for version in versions.iter_mut().filter(|v| v.begun == request.begun) {
                version.ended = Some(now);
                version.durable = durable;
            }
        }
    }

    pub(super) fn flush_begins(&mut self) -> u64 {
        self.tick()
    }

    pub(super) fn flushed(&mut self, begun: u64) {
        let now = self.tick();
        self.flushes.push((begun, now));
    }

    /// The length from now on, which a flush makes durable.
    pub(super) fn resized(&mut self, length: u64) {
        let now = self.tick();
        self.lengths.push((now, length));
    }

    /// The last moment whose acknowledged requests are durable at `cut`.
    fn durable(&self, cut: u64) -> u64 {
        self.flushes
            .iter()
            .filter(|(_, ended)| *ended <= cut)
            .map(|(begun, _)| *begun)
            .max()
            .unwrap_or(0)
    }

    /// The least length that a disk has after a cut.
    pub(super) fn length(&self, cut: u64) -> u64 {
        let durable = self.durable(cut);
        self.lengths
            .iter()
            .filter(|(ended, _)| *ended <= durable)
            .map(|(_, length)| *length)
            .max()
            .unwrap_or(0)
    }

    /// What is wrong with a sector after a cut at that time; `initial` is what it held in the beginning.
    pub(super) fn judge(
        &self,
        cut: u64,
        sector: u64,
        found: &[u8],
        initial: Value,
    ) -> Option<String> {
        let durable = self.durable(cut);
        let mut allowed = vec![initial];
        for version in self.sectors.get(&sector).into_iter().flatten() {
            if version.begun > cut {
                break;
            }
            let kept = version
                .ended
                .is_some_and(|ended| ended <= durable || (version.durable && ended <= cut));
            if kept && version.value != Value::Undefined {
                allowed.clear();
            }
            allowed.push(version.value);
        }
        let seen = Seen::of(found);
        let fits = allowed.iter().any(|value| match (value, &seen) {
            (Value::Stamp { owner, seq }, Seen::Stamp(stamp)) => {
                let wanted = Stamp {
                    owner: *owner,
                    seq: *seq,
                    sector,
                };
                *stamp == wanted
            }
            (Value::Zero | Value::Undefined, Seen::Zero) => true,
            _ => false,
        });
        if fits {
            return None;
        }
        let last: Vec<String> = allowed
            .iter()
            .rev()
            .take(3)
            .map(|v| format!("{v:?}"))
            .collect();
        Some(format!(
            "sector {sector} (offset {:#x}) holds {seen}, may hold {}",
            sector * SECTOR,
            last.join(" or ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::stamped;

    fn stamp(seq: u64) -> Value {
        Value::Stamp { owner: 1, seq }
    }

    fn holds(history: &History, cut: u64, seq: Option<u64>) -> bool {
        let bytes = match seq {
            Some(seq) => stamped(1, seq, 0, 512).to_vec(),
            None => vec![0; 512],
        };
        history.judge(cut, 0, &bytes, Value::Zero).is_none()
    }

    #[test]
    fn what_was_flushed_is_the_least_and_what_had_begun_is_the_most() {
        let mut history = History::default();
        let first = history.begin(stamp(1), 0, 512);
        history.end(first, false);
        let before = history.now();
        let flush = history.flush_begins();
        let second = history.begin(stamp(2), 0, 512);
        history.flushed(flush);
        let during = history.now();
        history.end(second, false);
        assert!(holds(&history, before, None) && holds(&history, before, Some(1)));
        assert!(!holds(&history, before, Some(2)), "not begun yet");
        assert!(!holds(&history, during, None), "the first was flushed");
        assert!(holds(&history, during, Some(1)) && holds(&history, during, Some(2)));
    }

    #[test]
    fn a_durable_write_needs_no_flush_and_an_undefined_one_forgets_nothing() {
        let mut history = History::default();
        let fua = history.begin(stamp(1), 0, 512);
        history.end(fua, true);
        assert!(!holds(&history, history.now(), None));
        let discard = history.begin(Value::Undefined, 0, 512);
        history.end(discard, true);
        assert!(holds(&history, history.now(), None) && holds(&history, history.now(), Some(1)));
        assert!(!holds(&history, history.now(), Some(3)));
    }
}
