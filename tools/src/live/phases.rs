//! What `blk live` does to its disks: the four jobs one after another on one disk, and side by side on others, always
//! with the guest at work.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use block_core::Node;
use jobs::{
    BackupOptions, CommitOptions, CopyMode, Job, JobKind, JobManager, JobOptions, MirrorOptions,
    StreamOptions,
};
use parking_lot::Mutex;

use super::{
    disk::{Disk, Lab},
    guest::Load,
    oracle::Frozen,
    report::{DiskLine, JobLine, Proof},
    table::Table,
};

/// What the phases share.
pub struct Run {
    /// Images and drivers.
    pub lab: Lab,
    /// The jobs.
    pub manager: Arc<JobManager>,
    /// What the user sees meanwhile.
    pub table: Arc<Table>,
    /// How long a job is to last, more or less.
    pub slice: Duration,
    /// How guests behave.
    pub load: Load,
    /// Lines for the report.
    pub jobs: Mutex<Vec<JobLine>>,
    /// Lines for the report.
    pub disks: Mutex<Vec<DiskLine>>,
    /// The last counters of nodes that may be gone, by node.
    pub counters: Mutex<BTreeMap<u64, Proof>>,
    /// Images to be checked when nobody has them open any more.
    pub images: Mutex<Vec<PathBuf>>,
}

/// A job that was started.
struct Running {
    job: Arc<Job>,
    /// When.
    begun: Duration,
}

/// The first thing that went wrong.
pub type Step<T = ()> = Result<T, String>;

fn said(what: &str) -> impl Fn(block_core::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

impl Run {
    async fn sleep(&self, time: Duration) {
        self.lab.graph.env().sleep(time).await;
    }

    fn load(&self, salt: u64) -> Load {
        Load {
            seed: self.load.seed.wrapping_add(salt.wrapping_mul(0x9e37_79b9)),
            ..self.load
        }
    }

    fn file(node: &Arc<Node>) -> PathBuf {
        PathBuf::from(node.filename().unwrap_or_default())
    }

    /// Adds the counters of a node that is about to go.
    fn keep_counters(&self, node: &Arc<Node>) {
        self.counters.lock().insert(node.id(), Proof::of(node));
    }

    /// Counters of all nodes, those that are gone included.
    pub fn proof(&self) -> Proof {
        let mut all = self.counters.lock().clone();
        for node in self.lab.graph.nodes() {
            all.insert(node.id(), Proof::of(&node));
        }
        all.into_values().fold(Proof::default(), Proof::plus)
    }

    /// A speed that makes copying `bytes` last about a slice.
    fn speed(&self, bytes: u64) -> u64 {
        ((bytes as f64 / self.slice.as_secs_f64().max(0.1)) as u64).max(1 << 20)
    }

    /// Watches a job: shows it, lets it run at full speed after its slice, and lets a mirror catch up.
    async fn watch(&self, disk: &Disk, job: &Arc<Job>, until_ready: bool) -> Step {
        let begun = self.lab.graph.env().now();
        let mut hurried = false;
        let wait = async {
            if until_ready {
                job.wait_ready().await
            } else {
                job.wait().await
            }
        };
        let mut wait = std::pin::pin!(wait);
        loop {
            let tick = self.sleep(Duration::from_millis(100));
            match futures::future::select(wait.as_mut(), Box::pin(tick)).await {
                futures::future::Either::Left((result, _)) => {
                    disk.guest.set_gentle(false);
                    return result.map_err(|error| {
                        format!("disk {}: {} failed: {error}", disk.name, job.kind())
                    });
                }
                futures::future::Either::Right(((), _)) => {}
            }
            if let Some(failure) = disk.guest.failure() {
                return Err(format!("disk {}: {failure}", disk.name));
            }
            self.table.job(&disk.name, &job.info());
            let elapsed = self.lab.graph.env().now().saturating_sub(begun);
            if !hurried && elapsed > self.slice {
                hurried = true;
                // The job may just have ended.
                let _ = job.set_speed(0);
            }
            if elapsed > self.slice * 2 {
                disk.guest.set_gentle(true);
            }
        }
    }

    /// Starts a job, by `begin`, at a speed that makes copying `bytes` last about a slice.
    async fn start(
        &self,
        disk: &Disk,
        kind: JobKind,
        bytes: u64,
        begin: impl AsyncFnOnce(JobOptions) -> block_core::Result<Arc<Job>>,
    ) -> Step<Running> {
        let options = JobOptions {
            id: Some(format!("{kind}-{}", disk.name)),
            speed: self.speed(bytes),
            ..JobOptions::default()
        };
        let begun = self.lab.graph.env().now();
        let job = begin(options)
            .await
            .map_err(said(&format!("starting a {kind}")))?;
        Ok(Running { job, begun })
    }

    /// Waits until a job is ready, lets it work for `beyond` longer, and has it switch over.
    async fn complete(&self, disk: &Disk, job: &Arc<Job>, beyond: Duration) -> Step {
        self.watch(disk, job, true).await?;
        self.sleep(beyond).await;
        job.complete()
            .map_err(said(&format!("completing a {}", job.kind())))?;
        self.watch(disk, job, false).await
    }

    fn record(&self, disk: &Disk, running: &Running, mode: &'static str, verified: u64) {
        let Running { job, begun } = running;
        let counters = job.counters();
        let now = self.lab.graph.env().now();
        self.table
            .event(&format!("disk {}: {} ({mode}) done", disk.name, job.kind()));
        self.jobs.lock().push(JobLine {
            disk: disk.name.clone(),
            kind: job.kind().name(),
            mode,
            seconds: now.saturating_sub(*begun).as_secs_f64(),
            bytes_copied: counters.bytes_copied + counters.bytes_copied_before_write,
            bytes_while_guest_wrote: counters.bytes_while_guest_wrote,
            bytes_verified: verified,
        });
    }

    /// A job is going to take these layers out of their chain: their counters are kept, and they are to be checked.
    fn part_with(&self, layers: &[Arc<Node>]) {
        for layer in layers {
            self.keep_counters(layer);
            let file = Self::file(layer);
            if file != self.lab.base.0 {
                self.images.lock().push(file);
            }
        }
    }

    /// Fails if one of `layers` is still in the disk's chain.
    fn are_gone(disk: &Disk, kind: JobKind, layers: &[Arc<Node>]) -> Step {
        let is_old = |layer: &Arc<Node>| layers.iter().any(|old| old.id() == layer.id());
        if disk.layers().iter().any(is_old) {
            return Err(format!(
                "disk {}: {kind} didn't take its layers out",
                disk.name
            ));
        }
        Ok(())
    }

    /// Fails unless the guest works on `node`.
    fn is_on(disk: &Disk, kind: JobKind, node: &Arc<Node>) -> Step {
        if disk.handle.node().skip_filters().id() != node.id() {
            return Err(format!("disk {}: {kind} didn't switch over", disk.name));
        }
        Ok(())
    }

    /// A new image to copy to.
    async fn target(&self, disk: &Disk, what: &str) -> Step<Arc<Node>> {
        self.lab
            .target(&format!("{}-{what}", disk.name))
            .await
            .map_err(said("making a target"))
    }

    /// Gives a target up and compares what it holds.
    async fn settle_target(&self, disk: &Disk, target: &Arc<Node>, frozen: &Frozen) -> Step<u64> {
        let path = Self::file(target);
        self.keep_counters(target);
        self.lab
            .graph
            .release(target)
            .await
            .map_err(said("closing a target"))?;
        let verified = disk.verify_file(&self.lab, &path, frozen).await?;
        self.images.lock().push(path);
        Ok(verified)
    }

    /// A full backup: its target must hold what the disk held when it began.
    pub async fn backup(&self, disk: &Disk) -> Step {
        let target = self.target(disk, "backup").await?;
        disk.guest.pause().await;
        let frozen = disk.oracle.freeze();
        let started = self
            .start(disk, JobKind::Backup, self.lab.size, async |job| {
                let options = BackupOptions::new(&disk.handle.node(), &target);
                self.manager.backup(BackupOptions { job, ..options }).await
            })
            .await;
        disk.guest.resume();
        let running = started?;
        self.watch(disk, &running.job, false).await?;
        let verified = self.settle_target(disk, &target, &frozen).await?;
        self.record(disk, &running, "full", verified);
        Ok(())
    }

    /// Merges the layer at `index` (0 is the top) into the one below it, the guest going on above.
    pub async fn commit_below(&self, disk: &Disk, index: usize) -> Step {
        let layers = disk.layers();
        let Some([top, base]) = layers.get(index..index + 2) else {
            return Err(format!("disk {} has no layer {}", disk.name, index + 1));
        };
        let gone = std::slice::from_ref(top);
        self.part_with(gone);
        let running = self
            .start(disk, JobKind::Commit, self.lab.size / 4, async |job| {
                let options = CommitOptions::new(&disk.handle.node()).top(top).base(base);
                self.manager.commit(CommitOptions { job, ..options }).await
            })
            .await?;
        self.watch(disk, &running.job, false).await?;
        Self::are_gone(disk, JobKind::Commit, gone)?;
        self.record(disk, &running, "intermediate", 0);
        Ok(())
    }

    /// Copies everything between the top and the layer at `index` into the top.
    pub async fn stream(&self, disk: &Disk, index: usize) -> Step {
        let layers = disk.layers();
        let (Some(base), Some(gone)) = (layers.get(index), layers.get(1..index)) else {
            return Err(format!("disk {} has no layer {index}", disk.name));
        };
        self.part_with(gone);
        let running = self
            .start(disk, JobKind::Stream, self.lab.size / 4, async |job| {
                let options = StreamOptions::new(&disk.handle.node()).base(base);
                self.manager.stream(StreamOptions { job, ..options }).await
            })
            .await?;
        self.watch(disk, &running.job, false).await?;
        Self::are_gone(disk, JobKind::Stream, gone)?;
        self.record(disk, &running, "to a base", 0);
        Ok(())
    }

    /// Merges the top layer, on which the guest works, into the one below, and goes on there.
    pub async fn commit_active(&self, disk: &Disk) -> Step {
        let layers = disk.layers();
        let [top, base, ..] = layers.as_slice() else {
            return Err(format!("disk {} has a single layer", disk.name));
        };
        self.part_with(std::slice::from_ref(top));
        let running = self
            .start(disk, JobKind::Commit, self.lab.size / 4, async |job| {
                let options = CommitOptions::new(top).base(base);
                self.manager.commit(CommitOptions { job, ..options }).await
            })
            .await?;
        self.complete(disk, &running.job, Duration::ZERO).await?;
        Self::is_on(disk, JobKind::Commit, base)?;
        self.record(disk, &running, "active", 0);
        Ok(())
    }

    async fn start_mirror(
        &self,
        disk: &Disk,
        target: &Arc<Node>,
        copy_mode: CopyMode,
    ) -> Step<Running> {
        self.start(disk, JobKind::Mirror, self.lab.size, async |job| {
            let options = MirrorOptions {
                job,
                copy_mode,
                ..MirrorOptions::new(&disk.handle.node(), target)
            };
            self.manager.mirror(options).await
        })
        .await
    }

    /// Copies the disk to another image and goes on there.
    pub async fn mirror_and_switch(&self, disk: &Disk, mode: CopyMode) -> Step {
        let (name, shown) = match mode {
            CopyMode::Background => ("mirror", "background, switch-over"),
            CopyMode::WriteBlocking => ("wbmirror", "write-blocking, switch"),
        };
        let target = self.target(disk, name).await?;
        let old = disk.layers();
        let running = self.start_mirror(disk, &target, mode).await?;
        self.complete(disk, &running.job, self.slice / 8).await?;
        Self::is_on(disk, JobKind::Mirror, &target)?;
        // The guest holds it now.
        self.lab
            .graph
            .release(&target)
            .await
            .map_err(said("handing a target over"))?;
        self.part_with(&old);
        self.record(disk, &running, shown, 0);
        Ok(())
    }

    /// Copies the disk in write-blocking mode and leaves it: the target must hold what the disk holds at that moment.
    pub async fn mirror_and_leave(&self, disk: &Disk) -> Step {
        let target = self.target(disk, "copy").await?;
        let mode = CopyMode::WriteBlocking;
        let running = self.start_mirror(disk, &target, mode).await?;
        let job = &running.job;
        self.watch(disk, job, true).await?;
        self.sleep(self.slice / 8).await;
        disk.guest.pause().await;
        let frozen = disk.oracle.freeze();
        let left = job.cancel(false).map_err(said("leaving a mirror"));
        let ended = match left {
            Ok(()) => self.watch(disk, job, false).await,
            Err(error) => Err(error),
        };
        disk.guest.resume();
        ended?;
        let verified = self.settle_target(disk, &target, &frozen).await?;
        self.record(disk, &running, "write-blocking, left", verified);
        Ok(())
    }

    async fn start_disk(&self, name: &str, layers: usize, salt: u64) -> Step<Disk> {
        let disk = self
            .lab
            .disk(name, layers, self.load(salt))
            .await
            .map_err(said("making a disk"))?;
        self.table.disk(name, &disk.handle);
        Ok(disk)
    }

    /// Lets the guest work for a while and puts a new layer under it.
    async fn work_and_snapshot(&self, disk: &Disk, name: &str) -> Step {
        self.sleep(self.slice / 4).await;
        disk.snapshot(&self.lab, name)
            .await
            .map_err(said("taking a snapshot"))?;
        self.sleep(self.slice / 8).await;
        Ok(())
    }

    async fn finish(&self, disk: Disk) -> Step {
        use std::sync::atomic::Ordering::Relaxed;
        disk.guest.stop().await;
        self.part_with(&disk.layers());
        let counts = disk.guest.counts();
        let mut line = DiskLine {
            disk: disk.name.clone(),
            reads: counts.reads.load(Relaxed),
            writes: counts.writes.load(Relaxed),
            zero_writes: counts.zeroes.load(Relaxed),
            discards: counts.discards.load(Relaxed),
            flushes: counts.flushes.load(Relaxed),
            bytes: counts.bytes.load(Relaxed),
            bytes_verified: 0,
        };
        self.table.close(&disk.name);
        let verdict = disk.finish(&self.lab).await?;
        line.bytes_verified = verdict.verified;
        self.disks.lock().push(line);
        Ok(())
    }

    /// One disk, all jobs, one after another.
    pub async fn one_after_another(&self) -> Step {
        let disk = self.start_disk("A", 1, 1).await?;
        self.sleep(self.slice / 4).await;
        self.backup(&disk).await?;
        self.work_and_snapshot(&disk, "A-s1").await?;
        self.work_and_snapshot(&disk, "A-s2").await?;
        self.commit_below(&disk, 1).await?;
        // Onto an empty layer, or a busy guest would have overwritten all there is to copy.
        self.work_and_snapshot(&disk, "A-s3").await?;
        self.stream(&disk, disk.layers().len() - 1).await?;
        self.work_and_snapshot(&disk, "A-s4").await?;
        self.commit_active(&disk).await?;
        self.mirror_and_switch(&disk, CopyMode::Background).await?;
        self.mirror_and_leave(&disk).await?;
        self.finish(disk).await
    }

    /// Four jobs at the same time: on three disks, and two of them on disjoint parts of one chain.
    pub async fn side_by_side(&self) -> Step {
        let (b, c, d) = (
            self.start_disk("B", 2, 2).await?,
            self.start_disk("C", 1, 3).await?,
            self.start_disk("D", 2, 4).await?,
        );
        for name in ["C-s1", "C-s2", "C-s3", "C-s4"] {
            self.work_and_snapshot(&c, name).await?;
        }
        // Disk C, from the top: s4 s3 s2 s1 0 base. The stream works on s4 and s3, the commit on s1 and 0.
        let results = futures::future::join4(
            self.backup(&b),
            self.stream(&c, 2),
            self.commit_below(&c, 3),
            self.mirror_and_switch(&d, CopyMode::WriteBlocking),
        )
        .await;
        results.0?;
        results.1?;
        results.2?;
        results.3?;
        for disk in [b, c, d] {
            self.finish(disk).await?;
        }
        Ok(())
    }
}

impl Proof {
    fn of(node: &Arc<Node>) -> Self {
        let mut proof = Self {
            gate_waits: node.stats().snapshot().gate_waits,
            ..Self::default()
        };
        for (name, count) in node.driver().counters() {
            match name {
                "frees-deferred-by-pins" => proof.frees_deferred_by_pins = count,
                "copies-on-write" => proof.copies_on_write = count,
                "clusters-freed" => proof.clusters_freed = count,
                _ => {}
            }
        }
        proof
    }

    fn plus(self, other: Self) -> Self {
        Self {
            gate_waits: self.gate_waits + other.gate_waits,
            frees_deferred_by_pins: self.frees_deferred_by_pins + other.frees_deferred_by_pins,
            copies_on_write: self.copies_on_write + other.copies_on_write,
            clusters_freed: self.clusters_freed + other.clusters_freed,
        }
    }
}
