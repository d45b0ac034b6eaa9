//! Power cuts: a workload runs, and after every n-th change of the storage several contents are kept that a power cut at
//! that moment might have left (all of the unflushed writes lost, all kept, or any subset, torn at sectors). Each is opened
//! again: nothing is corrupt, everything that was flushed is there, everything else is old or new, and the image can be
//! written on without harm to what is in it.

mod grown;
mod history;
mod workload;

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use block_core::{
    Options, RequestFlags,
    driver::Capabilities,
    image::{CheckMode, Progress},
};
use parking_lot::Mutex;
use rand::{RngCore as _, SeedableRng as _, rngs::SmallRng};

pub use self::workload::Workload;
use self::{
    history::{History, SECTOR, Value},
    workload::{REGION, TASKS, Task},
};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    cases::{cluster_size, owner},
    laid,
    pattern::{Seen, stamped},
    storage::{Content, Disk, Watcher},
};

const FILE: &str = "image";
const BASE: &str = "base";

/// How thoroughly the power is cut.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    /// After every so many changes of the storage.
    pub every: u64,
    /// So many contents for each moment.
    pub subsets: u64,
    /// Requests of each task.
    pub steps: u64,
    /// Also ask the installed qemu-img, about one content in so many; 0 for none.
    pub ask_qemu_every: usize,
}

impl Default for Cuts {
    fn default() -> Self {
        Self {
            every: 7,
            subsets: 3,
            steps: 24,
            ask_qemu_every: 0,
        }
    }
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counters {
    /// Changes of the storage while the workload ran.
    pub storage_writes: u64,
    /// Moments at which the power was cut.
    pub moments: u64,
    /// Images that were opened again.
    pub images: u64,
    /// Moments at which there was something that hadn't been flushed and could be lost or torn.
    pub unflushed: u64,
}

/// One content of all disks, and when the power was cut.
struct Cut {
    /// After so many changes of the storage.
    at: u64,
    /// The history's time.
    time: u64,
    contents: BTreeMap<String, Content>,
}

/// The sweeps as cases of group `crash`.
pub fn cases() -> Vec<Case> {
    let case = |workload: Workload| {
        let name = format!("crash-{}", workload.name());
        let proves = format!(
            "after a power cut at any write of the storage ({}) nothing is corrupt, what was flushed is there, and the \
             rest is old or new",
            workload.name().replace('-', " ")
        );
        let run = move |scene| as_case(scene, workload);
        Case::new(Group::Crash, name, proves, run).slow()
    };
    let mut cases: Vec<Case> = Workload::ALL.into_iter().map(case).collect();
    cases.extend(grown::cases());
    cases
}

async fn as_case(scene: Arc<Scene>, workload: Workload) -> CaseResult {
    Ok(match sweep(scene, workload, Cuts::default()).await? {
        Ok(counters) => counters.verdict(),
        Err(not_covered) => not_covered,
    })
}

impl Counters {
    /// The verdict on a sweep that found nothing wrong: it proves something only if something could be lost.
    pub fn verdict(&self) -> Verdict {
        if self.unflushed == 0 || self.images == 0 {
            let why = format!("there was nothing that a cut could lose: {self:?}");
            return Verdict::Inconclusive(why);
        }
        Verdict::Passed
    }
}

/// Runs the workload in the scene's world and judges every cut. The inner error is that the driver doesn't cover it.
///
/// # Errors
/// What a cut did that it mustn't.
pub async fn sweep(
    scene: Arc<Scene>,
    workload: Workload,
    cuts: Cuts,
) -> Result<Result<Counters, Verdict>, Failure> {
    if !scene.format.crash_safe {
        let why = "the driver doesn't claim to survive power cuts";
        return Ok(Err(Verdict::NotCovered(why.into())));
    }
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, "probe", 1 << 20, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "probe", None, &Options::new())
        .await?;
    let cluster = cluster_size(&lab.attach(&node, "probe")?).await?;
    let missing = workload.needs() - node.driver().capabilities();
    lab.graph.release(&node).await?;
    if !missing.is_empty() {
        let names: Vec<String> = missing
            .iter_names()
            .map(|(name, _)| name.to_lowercase())
            .collect();
        let why = format!("the driver has no {}", names.join(", "));
        return Ok(Err(Verdict::NotCovered(why)));
    }
    let image = Image {
        scene: scene.clone(),
        workload,
        cluster,
        size: TASKS * REGION * cluster,
    };
    image.make().await?;
    let (history, kept) = image.work(cuts).await?;
    let mut counters = kept.counters;
    for (number, cut) in kept.cuts.iter().enumerate() {
        let ask = cuts.ask_qemu_every > 0 && number % cuts.ask_qemu_every == 0;
        image.judge(&history, cut, ask).await.map_err(|failure| {
            Failure(format!(
                "power cut after storage write {}: {failure}",
                cut.at
            ))
        })?;
        counters.images += 1;
    }
    Ok(Ok(counters))
}

/// What was kept while a workload ran.
#[derive(Default)]
struct Kept {
    counters: Counters,
    cuts: Vec<Cut>,
}

/// What hears of every change of every disk, and cuts the power.
fn watcher(
    disks: Vec<Weak<Disk>>,
    history: Arc<Mutex<History>>,
    kept: Arc<Mutex<Kept>>,
    cuts: Cuts,
    seed: u64,
) -> Watcher {
    Arc::new(move |_| {
        let mut kept = kept.lock();
        kept.counters.storage_writes += 1;
        let at = kept.counters.storage_writes;
        if at % cuts.every.max(1) != 0 {
            return;
        }
        let disks: Vec<Arc<Disk>> = disks.iter().filter_map(Weak::upgrade).collect();
        kept.counters.moments += 1;
        kept.counters.unflushed += u64::from(disks.iter().any(|disk| disk.unflushed() > 0));
        let time = history.lock().now();
        for subset in 0..cuts.subsets {
            let mut rng = SmallRng::seed_from_u64(seed ^ (at << 8) ^ subset);
            // First all that can be lost, then all that can be kept, then anything.
            let mut luck = || match subset {
                0 | 1 => subset,
                _ => rng.next_u64(),
            };
            let contents = disks
                .iter()
                .map(|disk| (disk.name().to_owned(), disk.power_cut_with(&mut luck)))
                .collect();
            kept.cuts.push(Cut { at, time, contents });
        }
    })
}

struct Image {
    scene: Arc<Scene>,
    workload: Workload,
    cluster: u64,
    size: u64,
}

impl Image {
    fn backing(&self) -> Option<(&str, &str)> {
        let format = self.scene.format.name.as_str();
        self.workload.has_backing().then_some((BASE, format))
    }

    fn initial(&self) -> impl Fn(u64) -> Value {
        let (backing, size) = (self.workload.has_backing(), self.size);
        move |sector| {
            if backing && sector * SECTOR < size {
                Value::Stamp {
                    owner: owner::BASE,
                    seq: 0,
                }
            } else {
                Value::Zero
            }
        }
    }

    async fn make(&self) -> Result<(), Failure> {
        let (lab, format) = (&self.scene.lab, &self.scene.format);
        if self.workload.has_backing() {
            lab.create(&format.name, BASE, self.size, &format.create, None)
                .await?;
            let node = lab.open(&format.name, BASE, None, &Options::new()).await?;
            let handle = lab.attach(&node, "base")?;
            let data = stamped(owner::BASE, 0, 0, self.size);
            handle.write(0, data, RequestFlags::empty()).await?;
            handle.flush().await?;
            drop(handle);
            lab.graph.release(&node).await?;
        }
        let backing = self.backing();
        lab.create(&format.name, FILE, self.size, &format.create, backing)
            .await?;
        Ok(())
    }

    /// Runs the workload, and keeps what the cuts leave.
    async fn work(&self, cuts: Cuts) -> Result<(History, Kept), Failure> {
        let (lab, format) = (&self.scene.lab, &self.scene.format);
        let node = lab
            .open(&format.name, FILE, self.backing(), &Options::new())
            .await?;
        let handle = lab.attach(&node, "guest")?;
        let history = Arc::new(Mutex::new(History::default()));
        let kept = Arc::new(Mutex::new(Kept::default()));
        let disks: Vec<Arc<Disk>> = lab.disks.all();
        for disk in &disks {
            disk.set_jitter(3);
            disk.track_durability();
        }
        let weak = disks.iter().map(Arc::downgrade).collect();
        let watcher = watcher(weak, history.clone(), kept.clone(), cuts, lab.env.seed());
        for disk in &disks {
            disk.watch_changes(Some(watcher.clone()));
        }
        drop(watcher);
        let tasks: Vec<_> = (0..TASKS)
            .map(|number| {
                let task = Task {
                    workload: self.workload,
                    number,
                    cluster: self.cluster,
                    handle: handle.clone(),
                    history: history.clone(),
                    env: lab.env.clone(),
                    steps: cuts.steps,
                };
                lab.env.start(task.run())
            })
            .collect();
        for task in tasks {
            task.await?;
        }
        drop(handle);
        lab.graph.release(&node).await?;
        drop(node);
        for disk in &disks {
            disk.watch_changes(None);
            disk.set_jitter(0);
        }
        let history = std::mem::take(&mut *history.lock());
        let kept = std::mem::take(&mut *kept.lock());
        Ok((history, kept))
    }

    /// Opens what a cut left, and goes on with it.
    async fn judge(&self, history: &History, cut: &Cut, ask: bool) -> Result<(), Failure> {
        let (lab, format) = (&self.scene.lab, &self.scene.format);
        let time = cut.time;
        for (name, content) in &cut.contents {
            lab.disk(name)?.restore(content.clone());
        }
        if ask && !self.workload.has_backing() {
            self.ask_qemu(cut)?;
        }
        let node = lab
            .open(&format.name, FILE, self.backing(), &Options::new())
            .await?;
        let handle = lab.attach(&node, "after-cut")?;
        check(&handle, "after the cut").await?;
        let length = handle.length();
        if length < history.length(time).max(self.size) {
            return Err(format!("the disk has {length} bytes, less than was flushed").into());
        }
        let before = handle.read(0, length as usize).await?.to_vec();
        let initial = self.initial();
        for (sector, bytes) in before.chunks(SECTOR as usize).enumerate() {
            let sector = sector as u64;
            if let Some(wrong) = history.judge(time, sector, bytes, initial(sector)) {
                return Err(wrong.into());
            }
        }
        // Somebody goes on with it: what is written now must not share a cluster with anything that is there.
        let at = (cut.at % (self.size / self.cluster)) * self.cluster;
        let data = stamped(owner::NEW, cut.at, at, self.cluster);
        handle.write(at, data, RequestFlags::empty()).await?;
        handle.flush().await?;
        let after = handle.read(0, length as usize).await?;
        let range = at as usize..(at + self.cluster) as usize;
        for (sector, (was, is)) in before.chunks(512).zip(after.chunks(512)).enumerate() {
            let written = range.contains(&(sector * 512));
            let right = if written {
                matches!(Seen::of(is), Seen::Stamp(stamp) if stamp.owner == owner::NEW)
            } else {
                was == is
            };
            if !right {
                let found = Seen::of(is);
                return Err(
                    format!("a write after the cut changed sector {sector} to {found}").into(),
                );
            }
        }
        check(&handle, "after writing on").await?;
        drop(handle);
        lab.graph.release(&node).await?;
        Ok(())
    }

    fn ask_qemu(&self, cut: &Cut) -> Result<(), Failure> {
        for (name, content) in &cut.contents {
            laid::check(
                &self.scene.lab,
                &self.scene.format.name,
                name,
                content,
                true,
            )?;
        }
        Ok(())
    }
}

async fn check(handle: &block_core::BlockHandle, when: &str) -> Result<(), Failure> {
    let capabilities = handle.node().driver().capabilities();
    if !capabilities.contains(Capabilities::CHECK) {
        return Ok(());
    }
    let report = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
    // Leaks are what a power cut may leave behind.
    if report.corruptions + report.check_errors > 0 {
        let lines: Vec<&str> = report
            .findings
            .iter()
            .map(|finding| finding.message.as_str())
            .take(4)
            .collect();
        return Err(format!("check {when}: {}", lines.join("; ")).into());
    }
    Ok(())
}
