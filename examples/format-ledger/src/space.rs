//! The ledger, what is free, and what is on its way to be free. No I/O.
//!
//! A cluster that the guest gave up goes a long way before somebody else may have it:
//!
//! 1. *unlinked*: the map in memory doesn't refer to it any more. The map on disk still may;
//! 2. *parked*: now the map on disk doesn't either. A request that found it before may still be at it;
//! 3. *punched*: the last such request has ended, and the storage was told that it can have the space back;
//! 4. *free*: the ledger in memory says "nobody", and it is handed out again.
//!
//! Each shortcut is a corruption. Free before 2: after a power cut the old link leads to the new owner's data. Free
//! before 3: a late write lands in, or a late punch wipes, the new owner's data.

use block_core::pins::Grace;

use crate::{
    layout::{GuestCluster, HostCluster, Owner},
    table::Table,
};

/// A cluster that was unlinked, and the pins that must end before it can be used again.
#[derive(Debug)]
pub struct Freed {
    /// Which.
    pub host: HostCluster,
    /// What has to be over.
    pub grace: Grace,
}

/// Who has which cluster of the file.
#[derive(Debug)]
pub struct Space {
    /// The table of owners.
    pub ledger: Table,
    /// What can be handed out. The last one is the next one.
    free: Vec<HostCluster>,
    /// Stage 1, see above.
    pub unlinked: Vec<Freed>,
    /// Stage 2.
    pub parked: Vec<Freed>,
}

impl Space {
    /// What the ledger says.
    pub fn new(ledger: Table) -> Self {
        let mut space = Self {
            ledger,
            free: Vec::new(),
            unlinked: Vec::new(),
            parked: Vec::new(),
        };
        space.find_free();
        space
    }

    /// Works out anew what is free. The lowest cluster is handed out first, which keeps the file short.
    pub fn find_free(&mut self) {
        let entries = self.ledger.entries().iter().enumerate().rev();
        let free = entries.filter(|(_, owner)| **owner == Owner::Nobody.encode());
        self.free = free.map(|(host, _)| HostCluster(host as u64)).collect();
    }

    /// Who has a cluster.
    pub fn owner(&self, host: HostCluster) -> Owner {
        Owner::decode(self.ledger.get(host.0))
    }

    /// How many clusters can be handed out.
    pub fn free_clusters(&self) -> u64 {
        self.free.len() as u64
    }

    /// A cluster for `guest`. `None` when there is none, or none *yet*.
    pub fn allocate(&mut self, guest: GuestCluster) -> Option<HostCluster> {
        let host = self.free.pop()?;
        self.ledger.set(host.0, Owner::Guest(guest).encode());
        Some(host)
    }

    /// Stage 4. The caller has seen to stages 1 to 3, or the cluster was never linked.
    pub fn free(&mut self, host: HostCluster) {
        self.ledger.set(host.0, Owner::Nobody.encode());
        self.free.push(host);
    }

    /// Whether the cluster is in stage 1 or 2.
    pub fn is_on_its_way(&self, host: HostCluster) -> bool {
        let mut all = self.unlinked.iter().chain(&self.parked);
        all.any(|freed| freed.host == host)
    }
}
