//! A leaky bucket: how long a request has to be held back so that a rate is kept on the average. Pure arithmetic, no clock
//! of its own.

use std::time::Duration;

/// One limit of so many units (bytes, requests) per second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    per_second: u64,
    /// Units that may pass at once after a pause.
    burst: u64,
    /// When what was let through so far will have drained.
    empty_at: Duration,
}

impl Bucket {
    /// A bucket for `per_second` units; up to `burst` of them pass at once (0: a tenth of a second's worth).
    pub(crate) fn new(per_second: u64, burst: u64) -> Self {
        let burst = if burst == 0 { per_second / 10 } else { burst };
        Self {
            per_second,
            burst: burst.max(1),
            empty_at: Duration::ZERO,
        }
    }

    fn time_for(&self, units: u64) -> Duration {
        let nanos = u128::from(units) * 1_000_000_000 / u128::from(self.per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `units` at the time `now`, and tells when the request may go on.
    pub(crate) fn take(&mut self, now: Duration, units: u64) -> Duration {
        let begin = self.empty_at.max(now);
        self.empty_at = begin.saturating_add(self.time_for(units));
        begin.saturating_sub(self.time_for(self.burst)).max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_rules() {
        let mut bucket = Bucket::new(1000, 100);
        let at = Duration::from_secs(5);
        // Until a burst is in the bucket nobody waits.
        assert_eq!(bucket.take(at, 60), at);
        assert_eq!(bucket.take(at, 60), at);
        assert_eq!(bucket.take(at, 1000), at + Duration::from_millis(20));
        assert_eq!(bucket.take(at, 1), at + Duration::from_millis(1020));
        // Idle time is not saved up beyond the burst.
        let later = Duration::from_secs(100);
        assert_eq!(bucket.take(later, 100), later);
        assert_eq!(bucket.take(later, 100), later);
        assert_eq!(bucket.take(later, 100), later + Duration::from_millis(100));
    }
}
