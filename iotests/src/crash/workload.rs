//! What is going on when the power is cut. Each workload has a few tasks side by side, each with a region of its own, so that
//! what a sector may hold is known whatever the schedule.

use std::{collections::BTreeSet, sync::Arc};

use block_core::{
    BlockHandle, Environment as _, RequestFlags,
    driver::{Capabilities, Truncate},
};
use parking_lot::Mutex;

use super::history::{History, Value};
use crate::{
    case::Failure, lab::after_discard, oracle::AfterDiscard, pattern::stamped, sim::SimEnv,
};

/// Tasks side by side.
pub(super) const TASKS: u64 = 3;
/// Clusters of a task's region.
pub(super) const REGION: u64 = 10;

/// A kind of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Clusters are written for the first time, with a flush now and then.
    Allocating,
    /// Writes, zero writes and discards of the same clusters, whose places are recycled.
    Recycling,
    /// Writes of parts of clusters whose rest comes from the backing file.
    CopyOnWrite,
    /// Compressed clusters are written and written over.
    Compressed,
    /// Every write is acknowledged only when it is durable.
    WriteThrough,
    /// The disk grows while it is written.
    Growing,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Allocating,
        Self::Recycling,
        Self::CopyOnWrite,
        Self::Compressed,
        Self::WriteThrough,
        Self::Growing,
    ];

    /// Its name on the command line and in cases.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allocating => "allocating-writes",
            Self::Recycling => "recycled-clusters",
            Self::CopyOnWrite => "copy-on-write",
            Self::Compressed => "compressed-writes",
            Self::WriteThrough => "write-through",
            Self::Growing => "growing-disk",
        }
    }

    /// Whether the image has a backing file.
    pub(super) const fn has_backing(self) -> bool {
        matches!(self, Self::CopyOnWrite)
    }

    pub(super) fn needs(self) -> Capabilities {
        match self {
            Self::Allocating | Self::WriteThrough => Capabilities::WRITE,
            Self::Recycling => Capabilities::WRITE | Capabilities::DISCARD,
            Self::CopyOnWrite => Capabilities::WRITE | Capabilities::BACKING,
            Self::Compressed => Capabilities::WRITE | Capabilities::COMPRESSED,
            Self::Growing => Capabilities::WRITE | Capabilities::TRUNCATE,
        }
    }
}

/// One task of a workload.
pub(super) struct Task {
    pub(super) workload: Workload,
    pub(super) number: u64,
    pub(super) cluster: u64,
    pub(super) handle: Arc<BlockHandle>,
    pub(super) history: Arc<Mutex<History>>,
    pub(super) env: Arc<SimEnv>,
    pub(super) steps: u64,
}

impl Task {
    fn owner(&self) -> u32 {
        10 + self.number as u32
    }

    fn below(&self, bound: u64) -> u64 {
        self.env.random() % bound.max(1)
    }

    pub(super) async fn run(self) -> Result<(), Failure> {
        // Compressed data goes to clusters that nothing was written to yet.
        let mut touched = BTreeSet::new();
        for step in 1..=self.steps {
            let whole = self.below(10) < 6;
            let start = self.number * REGION + self.below(REGION);
            let (offset, len) = if whole && self.workload != Workload::CopyOnWrite {
                (start * self.cluster, self.cluster)
            } else {
                let sectors = self.cluster / 512;
                let from = self.below(sectors);
                let count = 1 + self.below(sectors - from);
                (start * self.cluster + from * 512, count * 512)
            };
            let kind = self.below(10);
            let untouched = touched.insert(start);
            match self.workload {
                Workload::Recycling if kind < 2 => self.discard(start).await?,
                Workload::Recycling | Workload::CopyOnWrite if kind < 4 => {
                    let unmap = [RequestFlags::empty(), RequestFlags::MAY_UNMAP];
                    self.zero(offset, len, unmap[kind as usize % 2]).await?;
                }
                Workload::Compressed if untouched => {
                    let at = start * self.cluster;
                    let flags = RequestFlags::WRITE_COMPRESSED;
                    self.write(step, at, self.cluster, flags).await?;
                }
                Workload::WriteThrough => self.write(step, offset, len, RequestFlags::FUA).await?,
                Workload::Growing if self.number == 0 && step % 6 == 0 => self.grow().await?,
                _ => self.write(step, offset, len, RequestFlags::empty()).await?,
            }
            if self.workload != Workload::WriteThrough && self.below(8) == 0 {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn write(
        &self,
        seq: u64,
        offset: u64,
        len: u64,
        flags: RequestFlags,
    ) -> Result<(), Failure> {
        let owner = self.owner();
        let request = self
            .history
            .lock()
            .begin(Value::Stamp { owner, seq }, offset, len);
        let data = stamped(owner, seq, offset, len);
        self.handle.write(offset, data, flags).await?;
        let durable = flags.contains(RequestFlags::FUA);
        self.history.lock().end(request, durable);
        Ok(())
    }

    async fn zero(&self, offset: u64, len: u64, flags: RequestFlags) -> Result<(), Failure> {
        let request = self.history.lock().begin(Value::Zero, offset, len);
        self.handle.write_zeroes(offset, len, flags).await?;
        self.history.lock().end(request, false);
        Ok(())
    }

    async fn discard(&self, cluster: u64) -> Result<(), Failure> {
        let value = match after_discard(&self.handle.node()) {
            AfterDiscard::Zeroes => Value::Zero,
            AfterDiscard::Anything => Value::Undefined,
        };
        let (offset, len) = (cluster * self.cluster, self.cluster);
        let request = self.history.lock().begin(value, offset, len);
        self.handle.discard(offset, len).await?;
        self.history.lock().end(request, false);
        Ok(())
    }

    async fn flush(&self) -> Result<(), Failure> {
        let begun = self.history.lock().flush_begins();
        self.handle.flush().await?;
        self.history.lock().flushed(begun);
        Ok(())
    }

    async fn grow(&self) -> Result<(), Failure> {
        let length = self.handle.length() + 2 * self.cluster;
        self.handle.truncate(length, Truncate::default()).await?;
        self.history.lock().resized(length);
        Ok(())
    }
}
