//! The image that the race cases work on: a cluster that everything is about (the *target*), victims around it, room for
//! new clusters that want to recycle what gets freed, and the final judgement. No case is here.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use block_core::{
    BlockHandle, ChildRole, Node, Options, RequestFlags,
    driver::Capabilities,
    image::{CheckMode, Progress},
};

use crate::{
    case::{Failure, Scene, Verdict},
    lab::{Guest, after_discard},
    laid,
    oracle::Oracle,
    pattern::{Seen, Stamp, stamped},
    storage::{Content, Disk, OpKind},
};

/// Owners in stamps.
pub mod owner {
    /// What the image held before.
    pub const OLD: u32 = 1;
    /// Ranges that must never change.
    pub const VICTIM: u32 = 2;
    /// The backing file.
    pub const BASE: u32 = 3;
    /// New clusters that recycle freed ones.
    pub const NEW: u32 = 4;
    /// The request that is parked.
    pub const PARKED: u32 = 100;
    /// The one that comes after it.
    pub const LATER: u32 = 101;
}

/// Why a case about recycled clusters isn't covered ([`Image::keeps_places`]).
pub(super) const KEEPS_PLACES: &str =
    "each cluster of a data file has a place of its own, and none is recycled";

/// What the target cluster is before the race.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterKind {
    /// Allocated, with data.
    Data,
    /// Reads as zeroes, but has its place.
    ZeroAllocated,
    /// Never written.
    Unallocated,
    /// Stored compressed.
    Compressed,
    /// Only the backing file has it: a write copies it.
    Shared,
}

impl ClusterKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Data,
        Self::ZeroAllocated,
        Self::Unallocated,
        Self::Compressed,
        Self::Shared,
    ];

    /// Its name in case names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::ZeroAllocated => "zero-allocated",
            Self::Unallocated => "unallocated",
            Self::Compressed => "compressed",
            Self::Shared => "shared",
        }
    }
}

/// How an image is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Setup {
    /// With a backing file that has data everywhere.
    pub backing: bool,
}

const FILE: &str = "image";
/// The backing file's name.
pub(super) const BASE: &str = "base";
/// Clusters of the image.
pub(super) const CLUSTERS: u64 = 48;
/// The cluster that everything is about.
const TARGET: u64 = 8;
/// Victims are the four clusters before the target and the four after it.
const VICTIMS: u64 = 4;
/// From here on clusters are written for the first time during a case.
const FRESH: u64 = 24;

/// An image in the middle of a case.
pub struct Image {
    scene: Arc<Scene>,
    setup: Setup,
    /// The node.
    pub node: Arc<Node>,
    /// The guest device.
    pub guest: Guest,
    /// Another producer, as a job is.
    pub job: Guest,
    /// The storage of the image.
    pub disk: Arc<Disk>,
    /// Bytes of a cluster, at least 4096.
    pub cluster: u64,
    fresh: AtomicU64,
    /// What the backing file's storage holds.
    base: Option<Content>,
}

impl Image {
    /// Makes and opens the image. `None` when the format can't have what the setup asks for.
    pub async fn new(scene: &Arc<Scene>, setup: Setup) -> Result<Option<Self>, Failure> {
        let lab = &scene.lab;
        let format = &scene.format;
        // The cluster size is known when an image is open.
        let probe = "probe";
        lab.create(&format.name, probe, 1 << 20, &format.create, None)
            .await?;
        let node = lab.open(&format.name, probe, None, &Options::new()).await?;
        let cluster = cluster_size(&lab.attach(&node, "probe")?).await?;
        let capabilities = node.driver().capabilities();
        lab.graph.release(&node).await?;
        if !capabilities.contains(Capabilities::WRITE)
            || (setup.backing && !capabilities.contains(Capabilities::BACKING))
        {
            return Ok(None);
        }
        let size = CLUSTERS * cluster;
        let mut base = None;
        let mut backing = None;
        if setup.backing {
            base = Some(make_base(scene, size).await?);
            backing = Some((BASE, format.name.as_str()));
        }
        let initial = setup
            .backing
            .then(|| stamped(owner::BASE, 0, 0, size).to_vec());
        let image = Self::make(
            scene,
            setup,
            backing,
            size,
            cluster,
            initial.as_deref(),
            base,
        );
        image.await.map(Some)
    }

    /// Makes and opens the image over the backing file (name and format), which shows `initial`. Nobody looks in the end
    /// whether that has changed.
    pub(super) async fn over(
        scene: &Arc<Scene>,
        backing: (&str, &str),
        size: u64,
        cluster: u64,
        initial: &[u8],
    ) -> Result<Self, Failure> {
        let setup = Setup { backing: true };
        Self::make(
            scene,
            setup,
            Some(backing),
            size,
            cluster,
            Some(initial),
            None,
        )
        .await
    }

    async fn make(
        scene: &Arc<Scene>,
        setup: Setup,
        backing: Option<(&str, &str)>,
        size: u64,
        cluster: u64,
        initial: Option<&[u8]>,
        base: Option<Content>,
    ) -> Result<Self, Failure> {
        let (lab, format) = (&scene.lab, &scene.format);
        lab.create(&format.name, FILE, size, &format.create, backing)
            .await?;
        let node = lab
            .open(&format.name, FILE, backing, &Options::new())
            .await?;
        let oracle = Oracle::new(after_discard(&node));
        if let Some(initial) = initial {
            oracle.set_initial(0, initial);
        }
        let guest = Guest::new(&lab.attach(&node, "guest")?, &oracle, owner::OLD);
        let job = Guest::new(&lab.attach(&node, "job")?, &oracle, owner::OLD);
        let disk = lab.disk(FILE)?;
        let image = Self {
            scene: scene.clone(),
            setup,
            node,
            guest,
            job,
            disk,
            cluster,
            fresh: AtomicU64::new(FRESH),
            base,
        };
        let victims = image.guest.signing(owner::VICTIM);
        for at in (TARGET - VICTIMS..TARGET).chain(TARGET + 1..=TARGET + VICTIMS) {
            victims
                .write(at * cluster, cluster, RequestFlags::empty())
                .await?;
            image.guest.oracle().protect(at * cluster, cluster);
        }
        image.guest.handle().flush().await?;
        Ok(image)
    }

    /// Closes the image without judging it, and gives what its storage holds.
    pub(super) async fn close(self) -> Result<Content, Failure> {
        let Self {
            scene,
            node,
            disk,
            guest,
            job,
            ..
        } = self;
        // While somebody has a handle, the node stays open, and would be closed over whatever is at its place by then.
        drop((guest, job));
        scene.lab.graph.release(&node).await?;
        Ok(disk.content())
    }

    /// The setup that a kind of cluster needs.
    pub const fn setup_for(kind: ClusterKind) -> Setup {
        Setup {
            backing: matches!(kind, ClusterKind::Shared),
        }
    }

    /// Where the target begins.
    pub fn target(&self) -> u64 {
        TARGET * self.cluster
    }

    fn capabilities(&self) -> Capabilities {
        self.node.driver().capabilities()
    }

    /// Whether the driver has all of them, or else what to answer.
    pub fn needs(&self, wanted: Capabilities) -> Result<(), Verdict> {
        let missing = wanted - self.capabilities();
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = missing
            .iter_names()
            .map(|(name, _)| name.to_lowercase())
            .collect();
        Err(Verdict::NotCovered(format!(
            "the driver has no {}",
            names.join(", ")
        )))
    }

    /// Makes the cluster at `offset` one of `kind`, durably. The verdict says why it can't be had.
    pub async fn prepare(
        &self,
        kind: ClusterKind,
        offset: u64,
    ) -> Result<Result<(), Verdict>, Failure> {
        let none = RequestFlags::empty();
        match kind {
            ClusterKind::Data => self.guest.write(offset, self.cluster, none).await?,
            ClusterKind::ZeroAllocated => {
                if let Err(verdict) = self.needs(Capabilities::WRITE_ZEROES) {
                    return Ok(Err(verdict));
                }
                self.guest.write(offset, self.cluster, none).await?;
                self.guest.zero(offset, self.cluster, none).await?;
            }
            ClusterKind::Unallocated | ClusterKind::Shared => {}
            ClusterKind::Compressed => {
                if let Err(verdict) = self.needs(Capabilities::COMPRESSED) {
                    return Ok(Err(verdict));
                }
                let flags = RequestFlags::WRITE_COMPRESSED;
                self.guest.write(offset, self.cluster, flags).await?;
            }
        }
        self.guest.handle().flush().await?;
        Ok(Ok(()))
    }

    /// How many requests ever waited at the gate of the image's node.
    pub fn gate_waits(&self) -> u64 {
        self.node.tracker().waits()
    }

    /// Guest data has its own place in a data file, which never goes to anybody else: nothing is recycled.
    pub fn keeps_places(&self) -> bool {
        self.node.edges().child(ChildRole::DataFile).is_some()
    }

    /// A counter of the driver's, if it has one of that name.
    pub fn counter(&self, name: &str) -> Option<u64> {
        let counters = self.node.driver().counters();
        counters
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, value)| *value)
    }

    /// The place of a cluster that was never written.
    pub fn fresh(&self) -> u64 {
        self.fresh.fetch_add(1, Ordering::SeqCst) % CLUSTERS * self.cluster
    }

    /// Writes clusters that were never written: they get whatever the allocator has. From then on they are victims.
    pub async fn write_fresh(&self, count: u64) -> Result<(), Failure> {
        for _ in 0..count {
            let at = self.fresh();
            let guest = self.guest.signing(owner::NEW);
            guest.write(at, self.cluster, RequestFlags::empty()).await?;
            guest.oracle().protect(at, self.cluster);
        }
        Ok(())
    }

    /// What a sector holds.
    pub async fn sector(&self, offset: u64) -> Result<Seen, Failure> {
        let bytes = self.guest.handle().read(offset, 512).await?;
        Ok(Seen::of(&bytes))
    }

    /// Whether a sector holds data of `owner`, written for that place.
    pub async fn holds(&self, offset: u64, owner: u32) -> Result<bool, Failure> {
        Ok(match self.sector(offset).await? {
            Seen::Stamp(stamp) => stamp.owner == owner && stamp.sector == offset / 512,
            _ => false,
        })
    }

    /// Where in the storage the data of `owner` is.
    pub fn host_of(&self, owner: u32) -> Vec<u64> {
        self.disk.find(&Stamp::needle(owner))
    }

    /// Where in the storage the target's data is, which [`Self::prepare`] has put there. Where encryption hides whose it is: where the
    /// driver reads it.
    pub async fn host_of_target(&self) -> Result<u64, Failure> {
        if self.disk.shows_data() {
            let found = self.host_of(owner::OLD);
            return found
                .first()
                .copied()
                .ok_or_else(|| "the target's data isn't in the storage".into());
        }
        let position = self.disk.log_position();
        self.sector(self.target()).await?;
        let read = self.disk.log_since(position).into_iter().rev();
        read.map(|entry| entry.op)
            .find(|op| op.kind == OpKind::Read)
            .map(|op| op.offset)
            .ok_or_else(|| "the target's data isn't read from the storage".into())
    }

    /// The end of every case: everything settles, new clusters are written over what was freed, and then every byte is
    /// judged, the image checked, closed, opened again and judged again.
    pub async fn finish(self) -> Result<(), Failure> {
        self.disk.clear_rules();
        self.guest.handle().flush().await?;
        let drained = self.scene.lab.graph.drain_all().await;
        drop(drained);
        // Twice round, so that what was freed by the first flush is recycled as well.
        for _ in 0..2 {
            self.write_fresh(4).await?;
            self.guest.handle().flush().await?;
        }
        let lenient = !self.scene.gate;
        self.judge("at the end", lenient).await?;
        let Self {
            scene,
            setup,
            node,
            guest,
            job,
            base,
            ..
        } = self;
        if node.driver().capabilities().contains(Capabilities::CHECK) {
            let report = guest
                .handle()
                .check(CheckMode::ReadOnly, Progress::new())
                .await?;
            if !report.is_clean() {
                let found: Vec<String> = report
                    .findings
                    .iter()
                    .map(|finding| finding.message.clone())
                    .collect();
                return Err(Failure(format!("check isn't clean: {}", found.join("; "))));
            }
        }
        let oracle = guest.oracle().clone();
        drop((guest, job));
        scene.lab.graph.release(&node).await?;
        let format = &scene.format;
        let backing = setup.backing.then_some((BASE, format.name.as_str()));
        let node = scene
            .lab
            .open(&format.name, FILE, backing, &Options::new())
            .await?;
        let guest = Guest::new(&scene.lab.attach(&node, "again")?, &oracle, owner::OLD);
        judge(&guest, "after closing and opening again", lenient).await?;
        if let Some(base) = base
            && scene.lab.disk(BASE)?.content().all_bytes() != base.all_bytes()
        {
            return Err("the backing file has changed".into());
        }
        drop(guest);
        scene.lab.graph.release(&node).await?;
        // Not in each of the thousands of runs of a cancellation, and not where a backing file would be missed.
        if scene.strict() && !setup.backing {
            let content = scene.lab.disk(FILE)?.content();
            laid::check(&scene.lab, &format.name, FILE, &content, false)?;
        }
        Ok(())
    }

    /// Every byte, at rest.
    pub async fn judge(&self, when: &str, lenient: bool) -> Result<(), Failure> {
        judge(&self.guest, when, lenient).await
    }
}

async fn judge(guest: &Guest, when: &str, lenient: bool) -> Result<(), Failure> {
    let wrong = guest.verify(lenient).await?;
    if wrong.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = wrong.iter().take(8).map(ToString::to_string).collect();
    Err(Failure(format!("{when}: {}", lines.join("; "))))
}

/// Bytes of a cluster as the cases use it.
pub async fn cluster_size(handle: &Arc<BlockHandle>) -> Result<u64, Failure> {
    let info = handle.info().await?;
    let granularity = handle.limits().serialising_granularity;
    Ok(info
        .cluster_size
        .unwrap_or(granularity)
        .max(granularity)
        .max(4096))
}

/// A backing file with data in every sector. Gives what its storage holds.
async fn make_base(scene: &Arc<Scene>, size: u64) -> Result<Content, Failure> {
    let lab = &scene.lab;
    let format = &scene.format;
    lab.create(&format.name, BASE, size, &format.create, None)
        .await?;
    let node = lab.open(&format.name, BASE, None, &Options::new()).await?;
    let handle = lab.attach(&node, "base")?;
    handle
        .write(0, stamped(owner::BASE, 0, 0, size), RequestFlags::empty())
        .await?;
    handle.flush().await?;
    drop(handle);
    lab.graph.release(&node).await?;
    Ok(lab.disk(BASE)?.content())
}
