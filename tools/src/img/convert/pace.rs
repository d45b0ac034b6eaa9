//! Keeps a copy to a rate.

use std::{sync::Arc, time::Duration};

use block_core::Environment;

/// Keeps to so many bytes per second.
pub struct Pace {
    rate: u64,
    /// When the next byte may go.
    free_at: Option<Duration>,
}

impl Pace {
    /// At most `rate` bytes per second.
    pub fn new(rate: u64) -> Self {
        Self {
            rate,
            free_at: None,
        }
    }

    /// Waits until `bytes` more may go.
    pub async fn wait(&mut self, env: &Arc<dyn Environment>, bytes: u64) {
        let now = env.now();
        let start = self.free_at.map_or(now, |at| at.max(now));
        self.free_at = Some(start + Duration::from_secs_f64(bytes as f64 / self.rate as f64));
        if start > now {
            env.sleep(start.saturating_sub(now)).await;
        }
    }
}
