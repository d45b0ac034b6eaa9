//! Guest clusters that somebody is allocating right now. Two plain writes may be at the driver side by side and find the
//! same cluster unallocated: one gets the claim, the other waits until that ended, *however* it ended, and looks at the map
//! again. Nobody waits here while holding a claim, so nobody waits for ever.

use std::{collections::BTreeMap, sync::Arc};

use futures::channel::oneshot;
use parking_lot::Mutex;

use crate::layout::GuestCluster;

type Claimed = BTreeMap<GuestCluster, Vec<oneshot::Sender<()>>>;

/// The claims of one image.
#[derive(Debug, Default)]
pub struct Claims(Arc<Mutex<Claimed>>);

/// A claimed cluster. Dropping it lets go of it and wakes those who wait, so that no way out of a function forgets to.
#[derive(Debug)]
pub struct Claim {
    claims: Arc<Mutex<Claimed>>,
    cluster: GuestCluster,
}

impl Claims {
    /// The claim, or what to wait for if it is somebody else's. (A cancelled wait means the same as a completed one: the
    /// claim is gone.)
    pub fn claim(&self, cluster: GuestCluster) -> Result<Claim, oneshot::Receiver<()>> {
        let mut claimed = self.0.lock();
        if let Some(waiting) = claimed.get_mut(&cluster) {
            let (wake, woken) = oneshot::channel();
            waiting.push(wake);
            return Err(woken);
        }
        claimed.insert(cluster, Vec::new());
        Ok(Claim {
            claims: self.0.clone(),
            cluster,
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let waiting = self.claims.lock().remove(&self.cluster);
        // Dropping the senders wakes the others, which is done outside of the lock.
        drop(waiting);
    }
}
