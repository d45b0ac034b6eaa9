//! The speed limit: how long a job has to wait before it may begin its next chunk. Arithmetic on times that are handed
//! in; it never reads a clock.

use std::time::Duration;

/// Bytes are let through in slices of this length: what was begun in one slice is paid for in the next ones.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

/// A leaky bucket that holds one slice.
#[derive(Debug, Default)]
pub(crate) struct RateLimit {
    /// When all that was let through so far is paid for.
    paid_until: Duration,
}

impl RateLimit {
    /// How long to wait at `now`, with a limit of `speed` bytes per second (0 is none).
    pub(crate) fn delay(&self, now: Duration, speed: u64) -> Option<Duration> {
        if speed == 0 {
            return None;
        }
        let ahead = self.paid_until.saturating_sub(now);
        (ahead >= SLICE).then(|| ahead.saturating_sub(SLICE) + Duration::from_millis(1))
    }

    /// `bytes` are let through at `now`.
    pub(crate) fn account(&mut self, now: Duration, speed: u64, bytes: u64) {
        if speed == 0 {
            self.paid_until = now;
            return;
        }
        self.paid_until = self.paid_until.max(now).saturating_add(price(speed, bytes));
    }

    /// `bytes` of what was let through turned out not to be moved.
    pub(crate) fn give_back(&mut self, speed: u64, bytes: u64) {
        if speed != 0 {
            self.paid_until = self.paid_until.saturating_sub(price(speed, bytes));
        }
    }

    /// The limit was changed: what is owed under the old one is forgotten.
    pub(crate) fn reset(&mut self, now: Duration) {
        self.paid_until = self.paid_until.min(now);
    }
}

fn price(speed: u64, bytes: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(speed);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_time_exactly_the_limit_gets_through() {
        for (speed, chunk) in [(1 << 20, 65_536), (10_000, 65_536), (1 << 30, 1 << 20)] {
            let mut limit = RateLimit::default();
            let mut now = Duration::from_secs(5);
            let start = now;
            let mut sent = 0_u64;
            while now.saturating_sub(start) < Duration::from_secs(100) {
                match limit.delay(now, speed) {
                    Some(wait) => now += wait,
                    None => {
                        limit.account(now, speed, chunk);
                        sent += chunk;
                    }
                }
            }
            let wanted = speed * 100;
            let slack = wanted / 50 + 2 * chunk + speed / 5;
            assert!(
                sent.abs_diff(wanted) <= slack,
                "{sent} of {wanted} at {speed}"
            );
        }
    }

    #[test]
    fn without_a_limit_nothing_waits_and_nothing_is_owed_later() {
        let mut limit = RateLimit::default();
        let now = Duration::from_secs(1);
        limit.account(now, 0, u64::MAX);
        assert_eq!(limit.delay(now, 0), None);
        assert_eq!(limit.delay(now, 1000), None);
        limit.account(now, 1, 1000);
        assert!(limit.delay(now, 1).is_some());
        limit.reset(now);
        assert_eq!(limit.delay(now, 1), None);
    }
}
