//! Debug events: places in a driver's work that a fault injector below it can be told of, by the names that qemu's
//! `blkdebug` gave them.
//!
//! A driver raises an event with [`Request::debug_event`](crate::Request::debug_event) or
//! [`Child::debug_event`](crate::Child::debug_event) just before it does what the name says, and waits until that
//! returns: a breakpoint stops the request right there. The nearest node below that declares
//! [`Capabilities::DEBUG_EVENTS`](crate::Capabilities) is told. Where there is none, which each node knows from its
//! edges, raising an event costs a look at the node. Events change nothing by themselves, and no driver may depend on them.

use std::{fmt, sync::Arc};

use crate::{
    driver::{Capabilities, ChildRole},
    node::{Edges, Node},
    request::Child,
};

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Something that a driver, or the core, is about to do or has done.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum DebugEvent {
            $($(#[$doc])* $variant,)*
        }

        impl DebugEvent {
            /// All events, in the order of this list.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name that users know.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

events! {
    /// An L1 entry is written.
    L1Update = "l1_update",
    /// Space for a larger L1 table is allocated.
    L1GrowAllocTable = "l1_grow_alloc_table",
    /// The larger L1 table is written.
    L1GrowWriteTable = "l1_grow_write_table",
    /// The header is made to point to the larger L1 table.
    L1GrowActivateTable = "l1_grow_activate_table",
    /// A part of an L2 table is read.
    L2Load = "l2_load",
    /// A part of an L2 table is written.
    L2Update = "l2_update",
    /// An entry for a compressed cluster is set.
    L2UpdateCompressed = "l2_update_compressed",
    /// An L2 table is read to be copied.
    L2AllocCowRead = "l2_alloc_cow_read",
    /// A new L2 table is written.
    L2AllocWrite = "l2_alloc_write",
    /// Guest data is read from a cluster.
    ReadAio = "read_aio",
    /// Guest data is read from the backing file.
    ReadBackingAio = "read_backing_aio",
    /// A compressed cluster is read.
    ReadCompressed = "read_compressed",
    /// Guest data is written to a cluster.
    WriteAio = "write_aio",
    /// A compressed cluster is written.
    WriteCompressed = "write_compressed",
    /// The state of a virtual machine is loaded.
    VmstateLoad = "vmstate_load",
    /// The state of a virtual machine is saved.
    VmstateSave = "vmstate_save",
    /// What surrounds a write in its clusters is read.
    CowRead = "cow_read",
    /// What surrounds a write in its clusters is written.
    CowWrite = "cow_write",
    /// The refcount table is read.
    ReftableLoad = "reftable_load",
    /// A larger refcount table is made.
    ReftableGrow = "reftable_grow",
    /// An entry of the refcount table is written.
    ReftableUpdate = "reftable_update",
    /// A refcount block is read.
    RefblockLoad = "refblock_load",
    /// A refcount block is written.
    RefblockUpdate = "refblock_update",
    /// A part of a refcount block is written.
    RefblockUpdatePart = "refblock_update_part",
    /// A refcount block is allocated.
    RefblockAlloc = "refblock_alloc",
    /// The refcount table gets an entry for a new block.
    RefblockAllocHookup = "refblock_alloc_hookup",
    /// A new refcount block is written.
    RefblockAllocWrite = "refblock_alloc_write",
    /// The refcount blocks of a larger refcount table are written.
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    /// The larger refcount table is written.
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    /// The header is made to point to the larger refcount table.
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    /// Clusters are allocated.
    ClusterAlloc = "cluster_alloc",
    /// Bytes for a compressed cluster are allocated.
    ClusterAllocBytes = "cluster_alloc_bytes",
    /// Clusters are freed.
    ClusterFree = "cluster_free",
    /// A flush hands what is cached to the storage.
    FlushToOs = "flush_to_os",
    /// A flush asks the storage to make it durable.
    FlushToDisk = "flush_to_disk",
    /// The first block of a padded write is read.
    PwritevRmwHead = "pwritev_rmw_head",
    /// The first block of a padded write has been read.
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    /// The last block of a padded write is read.
    PwritevRmwTail = "pwritev_rmw_tail",
    /// The last block of a padded write has been read.
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    /// A write goes to the driver.
    Pwritev = "pwritev",
    /// A zero write goes to the driver.
    PwritevZero = "pwritev_zero",
    /// A write or zero write came back from the driver.
    PwritevDone = "pwritev_done",
    /// An image is emptied.
    EmptyImagePrepare = "empty_image_prepare",
    /// The L1 table is cut.
    L1ShrinkWriteTable = "l1_shrink_write_table",
    /// L2 tables beyond a cut are freed.
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    /// Copy-on-read writes what it read.
    CorWrite = "cor_write",
    /// Storage is prepared for a newly allocated cluster.
    ClusterAllocSpace = "cluster_alloc_space",
    /// Nothing happened: an injector that waits for this event is active from the beginning.
    None = "none",
}

impl DebugEvent {
    /// The event called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|event| event.name() == name)
    }
}

impl fmt::Display for DebugEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The child that is told of a node's events: not the backing file, which has events of its own.
pub(crate) fn told(edges: &Edges) -> Option<&Child> {
    edges
        .child(ChildRole::File)
        .or_else(|| edges.child(ChildRole::Filtered))
        .or_else(|| edges.child(ChildRole::DataFile))
}

pub(crate) fn listens(node: &Node) -> bool {
    node.driver()
        .capabilities()
        .contains(Capabilities::DEBUG_EVENTS)
}

/// Whether events at a node with these edges are heard by anybody. The children know it of themselves already.
pub(crate) fn heard(edges: &Edges) -> bool {
    told(edges).is_some_and(|child| listens(child.node()) || child.node().is_debugged())
}

/// Tells the nearest listener, `node` itself included.
pub(crate) async fn tell(node: &Arc<Node>, event: DebugEvent) {
    let mut at = node.clone();
    while !listens(&at) {
        let next = told(&at.edges()).map(|child| child.node().clone());
        let Some(next) = next else { return };
        at = next;
    }
    at.driver().clone().debug_event(event).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_is_found_by_its_name() {
        for event in DebugEvent::ALL {
            assert_eq!(DebugEvent::from_name(event.name()), Some(*event));
        }
        assert_eq!(DebugEvent::from_name("L1_UPDATE"), None);
        assert_eq!(DebugEvent::ALL.len(), 48);
    }
}
