//! Dropping what wasn't used lately from the caches, from time to time (`cache-clean-interval`).
//!
//! Only what is on disk as it is in memory goes: a dirty slice or refcount block stays, however long nobody looks at it. The
//! timer is the environment's; a task that sleeps keeps nothing of the image alive. Without the option it is qemu's 600 seconds, and
//! there is no timer at all in an environment that doesn't allow for upkeep.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use block_core::env::Environment;

use crate::{counters::Counters, image::Qcow2, settings::DEFAULT_CLEAN_INTERVAL};

impl Qcow2 {
    /// Begins to clean at the interval that the settings say, instead of at the one before.
    pub fn start_cleaning(self: &Arc<Self>, env: &Arc<dyn Environment>) {
        let mine = self.cleaner.fetch_add(1, Ordering::AcqRel) + 1;
        let seconds = match self.settings.clean_interval() {
            Some(0) => return,
            Some(seconds) => seconds,
            None if env.allows_upkeep() => DEFAULT_CLEAN_INTERVAL,
            None => return,
        };
        let (image, timer) = (Arc::downgrade(self), env.clone());
        env.spawn(Box::pin(async move {
            loop {
                timer.sleep(Duration::from_secs(seconds)).await;
                let Some(image) = image.upgrade() else { return };
                if image.cleaner.load(Ordering::Acquire) != mine {
                    return;
                }
                image.clean_caches().await;
            }
        }));
    }

    /// Drops what wasn't used since the last time.
    async fn clean_caches(&self) {
        let mut gone = self.slices.table.evict_unused();
        {
            let mut meta = self.meta.lock().await;
            gone += meta.refcounts.evict_unused();
            self.note_sizes(&meta);
        }
        Counters::add(&self.counters.cleaned, gone as u64);
    }
}
