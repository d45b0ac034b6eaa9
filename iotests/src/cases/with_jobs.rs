//! Races in which the other producer is a job: one side is parked in the storage, the other arrives at the same range,
//! and both have to come to the right end. Guests' requests are what a sweep drops; the job must succeed all the same.

use std::sync::Arc;

use block_core::{
    BlockHandle, ErrorKind, Node, Options, PermissionSet, Permissions, RequestFlags,
    driver::Capabilities,
};
use jobs::{
    BackupOptions, CommitOptions, CopyMode, Job, JobManager, MirrorOptions, StreamOptions, SyncMode,
};

use super::{
    gate::Arrival,
    image::{BASE, ClusterKind, Image, Setup, owner},
};
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    lab::Guest,
    pattern::Stamp,
    sim::{Cancelled, Running},
    storage::{Choose, Disk, Hold, Stage},
};

/// What the guest sends to the range that a job is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Write,
    Other(Arrival),
}

impl Sent {
    const ALL: [Self; 4] = [
        Self::Write,
        Self::Other(Arrival::Discard),
        Self::Other(Arrival::ZeroUnmap),
        Self::Other(Arrival::Zero),
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Other(arrival) => arrival.name(),
        }
    }

    const fn needs(self) -> Capabilities {
        match self {
            Self::Write => Capabilities::empty(),
            Self::Other(arrival) => arrival.needs(),
        }
    }

    async fn send(self, guest: Guest, offset: u64, len: u64) -> Result<(), Failure> {
        match self {
            Self::Write => {
                let guest = guest.signing(owner::LATER);
                guest
                    .write(offset + 2048, 1024, RequestFlags::empty())
                    .await?;
            }
            Self::Other(arrival) => arrival.send(&guest, offset, len).await?,
        }
        Ok(())
    }
}

/// At which of its two sides a job is parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Read,
    Write,
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

const COPY: &str = "copy";
const MIDDLE: &str = "middle";

/// All of them.
pub fn cases() -> Vec<Case> {
    let race = Group::Race;
    let mut cases = vec![Case::new(
        race,
        "race-stream-behind-parked-write",
        "a stream's copy of a cluster waits for a guest's write in flight there, and never covers it",
        stream_behind_write,
    )];
    for sent in Sent::ALL {
        let name = sent.name();
        cases.push(Case::new(
            race,
            format!("race-{name}-behind-parked-stream-copy"),
            format!("a guest's {name} waits for a stream's copy in flight, and lasts"),
            move |scene| behind_stream(scene, sent),
        ));
        for (sync, by) in [(SyncMode::None, "guest"), (SyncMode::Full, "job")] {
            cases.push(Case::new(
                race,
                format!("race-{name}-behind-parked-backup-copy-by-{by}"),
                format!(
                    "a guest's {name} waits while a backup saves the cluster on behalf of the {by}, \
                     and the backup holds what was there before"
                ),
                move |scene| behind_backup(scene, sent, sync),
            ));
        }
        cases.push(Case::new(
            race,
            format!("race-{name}-beside-parked-commit-write"),
            format!("a guest's {name} doesn't wait for a commit below it, and both last"),
            move |scene| beside_commit(scene, sent),
        ));
        cases.push(Case::new(
            race,
            format!("race-{name}-behind-parked-mirrored-write"),
            format!(
                "a guest's {name} waits for a write that hasn't reached a write-blocking mirror's \
                 target, and disk and target end the same"
            ),
            move |scene| behind_mirrored_write(scene, sent),
        ));
        for side in [Side::Read, Side::Write] {
            cases.push(Case::new(
                race,
                format!("race-{name}-beside-parked-mirror-{}", side.name()),
                format!(
                    "a guest's {name} in a granule that a mirror has half copied is copied again"
                ),
                move |scene| beside_mirror(scene, sent, side),
            ));
        }
    }
    for zero in [false, true] {
        for arrival in Arrival::ALL {
            let what = if zero { "zeroes" } else { "data" };
            let name = arrival.name();
            cases.push(Case::new(
                race,
                format!("race-commit-of-{what}-below-parked-write-and-{name}"),
                format!(
                    "a commit writes {what} into the base while a write and a {name} of the guest are \
                     under way above, and ends when they have ended"
                ),
                move |scene| commit_below(scene, zero, arrival),
            ));
        }
    }
    cases
}

/// An image that has what is needed, or why not.
async fn image(
    scene: &Arc<Scene>,
    backing: bool,
    needs: Capabilities,
) -> Result<Result<Image, Verdict>, Failure> {
    let Some(image) = Image::new(scene, Setup { backing }).await? else {
        return Ok(Err(Verdict::NotCovered(
            "the driver has no backing files".into(),
        )));
    };
    no_resize(&image)?;
    Ok(image.needs(needs).map(|()| image))
}

/// Jobs don't share a disk with somebody who may resize it.
fn no_resize(image: &Image) -> Result<(), Failure> {
    let used = Permissions::CONSISTENT_READ | Permissions::WRITE;
    for guest in [&image.guest, &image.job] {
        let set = PermissionSet::new(used, Permissions::all());
        guest.handle().set_permissions(set)?;
    }
    Ok(())
}

/// A request of the guest that may be dropped.
type Request = Running<Result<Result<(), Failure>, Cancelled>>;

fn send(scene: &Arc<Scene>, image: &Image, sent: Sent) -> Request {
    let (guest, target, cluster) = (image.job.clone(), image.target(), image.cluster);
    scene.start(sent.send(guest, target, cluster))
}

/// A write of the guest to sectors 1 and 2 of the target.
fn write(scene: &Arc<Scene>, image: &Image) -> Request {
    let (guest, target) = (image.guest.signing(owner::PARKED), image.target());
    scene.start(async move {
        let none = RequestFlags::empty();
        guest.write(target + 512, 1024, none).await?;
        Ok(())
    })
}

fn hold_writes(disk: &Arc<Disk>, owner: u32) -> Hold {
    let choose = Choose::writes().containing(&Stamp::needle(owner));
    disk.hold(choose, Stage::Before)
}

/// How many requests ever waited at the node that the guest uses now.
fn waits_at(guest: &Guest) -> u64 {
    guest.handle().node().tracker().waits()
}

fn insist(scene: &Scene, what: bool, otherwise: &str) -> Result<(), Failure> {
    if scene.strict() && !what {
        return Err(otherwise.into());
    }
    Ok(())
}

/// Another image of the same size, for a job to write to.
async fn second(scene: &Arc<Scene>, image: &Image) -> Result<Arc<Node>, Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    let size = image.node.length();
    lab.create(&format.name, COPY, size, &format.create, None)
        .await?;
    let node = lab.open(&format.name, COPY, None, &Options::new()).await?;
    lab.graph.keep(&node);
    Ok(node)
}

fn reader(scene: &Scene, node: &Arc<Node>) -> Result<Arc<BlockHandle>, Failure> {
    let reads = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    Ok(Arc::new(scene.lab.graph.attach(node, reads, "reader")?))
}

async fn content(scene: &Scene, node: &Arc<Node>) -> Result<Vec<u8>, Failure> {
    let handle = reader(scene, node)?;
    Ok(handle.read(0, node.length() as usize).await?.to_vec())
}

fn same(found: &[u8], expected: &[u8], what: &str) -> Result<(), Failure> {
    if found.len() != expected.len() {
        return Err(format!("{what} has {} bytes", found.len()).into());
    }
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        Some(at) => Err(format!("{what} differs at {at:#x}").into()),
        None => Ok(()),
    }
}

/// The job's end, for the target of a mirror or backup: its image is checked and closed.
async fn close_second(scene: &Scene, node: &Arc<Node>) -> Result<(), Failure> {
    let handle = reader(scene, node)?;
    if node.driver().capabilities().contains(Capabilities::CHECK) {
        let mode = block_core::image::CheckMode::ReadOnly;
        let progress = block_core::image::Progress::new();
        if !handle.check(mode, progress).await?.is_clean() {
            return Err("the target's check isn't clean".into());
        }
    }
    drop(handle);
    scene.lab.graph.release(node).await?;
    Ok(())
}

async fn stream_behind_write(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, true, Capabilities::CHANGE_BACKING).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let manager = JobManager::new(&scene.lab.graph);
    let hold = hold_writes(&image.disk, owner::PARKED);
    let write = write(&scene, &image);
    scene.rest().await;
    insist(&scene, hold.waiting().len() == 1, "no write was parked")?;
    let waits = image.gate_waits();
    let job = manager.stream(StreamOptions::new(&image.node)).await?;
    scene.rest().await;
    insist(&scene, !job.status().is_over(), "the stream overtook it")?;
    insist(
        &scene,
        image.gate_waits() > waits,
        "the stream's copy didn't wait at the gate",
    )?;
    hold.release();
    let written = ended(write).await?;
    job.wait().await?;
    if written && !image.holds(image.target() + 512, owner::PARKED).await? {
        return Err("the stream covered the guest's write".into());
    }
    finish_stream(&scene, image, &job).await
}

async fn finish_stream(scene: &Scene, image: Image, job: &Job) -> CaseResult {
    insist(scene, job.counters().bytes_copied > 0, "nothing was copied")?;
    if image.node.backing().is_some() {
        return Err("the stream left a backing file".into());
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn behind_stream(scene: Arc<Scene>, sent: Sent) -> CaseResult {
    let needs = Capabilities::CHANGE_BACKING | sent.needs();
    let image = match image(&scene, true, needs).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    // Everything before the target is the image's own: the first that is copied is the target.
    for at in (0..image.target()).step_by(image.cluster as usize) {
        if !image.holds(at, owner::VICTIM).await? {
            image
                .guest
                .write(at, image.cluster, RequestFlags::empty())
                .await?;
        }
    }
    let manager = JobManager::new(&scene.lab.graph);
    // All of them, as encryption hides which is the target's.
    let copies = Choose::writes().containing(&Stamp::needle(owner::BASE));
    let hold = image.disk.hold(copies.times(u64::MAX), Stage::Before);
    let job = manager.stream(StreamOptions::new(&image.node)).await?;
    scene.rest().await;
    // With large clusters copies of other places are on the way as well.
    insist(&scene, !hold.waiting().is_empty(), "no copy was parked")?;
    let waits = image.gate_waits();
    let request = send(&scene, &image, sent);
    scene.rest().await;
    insist(&scene, !request.is_done(), "the request overtook the copy")?;
    insist(
        &scene,
        image.gate_waits() == waits + 1,
        "it waits, but not at the gate",
    )?;
    hold.release();
    let done = ended(request).await?;
    job.wait().await?;
    if done && sent == Sent::Write && !image.holds(image.target() + 2048, owner::LATER).await? {
        return Err("the stream covered the guest's write".into());
    }
    finish_stream(&scene, image, &job).await
}

async fn behind_backup(scene: Arc<Scene>, sent: Sent, sync: SyncMode) -> CaseResult {
    let image = match image(&scene, false, sent.needs()).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    if let Err(verdict) = image.prepare(ClusterKind::Data, image.target()).await? {
        return Ok(verdict);
    }
    let before = content(&scene, &image.node).await?;
    let target = second(&scene, &image).await?;
    let hold = hold_writes(&scene.lab.disk(COPY)?, owner::OLD);
    let manager = JobManager::new(&scene.lab.graph);
    let options = BackupOptions {
        sync,
        ..BackupOptions::new(&image.node, &target)
    };
    let job = manager.backup(options).await?;
    let first = (sync == SyncMode::None).then(|| write(&scene, &image));
    scene.rest().await;
    insist(&scene, hold.waiting().len() == 1, "no copy was parked")?;
    let waits = waits_at(&image.guest);
    let request = send(&scene, &image, sent);
    scene.rest().await;
    insist(&scene, !request.is_done(), "the request overtook the copy")?;
    insist(
        &scene,
        waits_at(&image.guest) == waits + 1,
        "it waits, but not at the filter's gate",
    )?;
    hold.release();
    if let Some(first) = first {
        ended(first).await?;
    }
    ended(request).await?;
    if sync == SyncMode::None {
        // What was dropped while it was in flight has ended as well.
        drop(scene.lab.graph.drain_all().await);
        let saved = job.counters().bytes_copied_before_write;
        insist(&scene, saved > 0, "nothing was copied before the write")?;
        job.cancel(true)?;
        match job.wait().await {
            Err(error) if error.kind() == ErrorKind::Cancelled => {}
            other => return Err(format!("the cancelled backup ended with {other:?}").into()),
        }
    } else {
        job.wait().await?;
    }
    let found = content(&scene, &target).await?;
    let range = if sync == SyncMode::None {
        image.target() as usize..(image.target() + image.cluster) as usize
    } else {
        0..before.len()
    };
    same(&found[range.clone()], &before[range], "the backup")?;
    close_second(&scene, &target).await?;
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn behind_mirrored_write(scene: Arc<Scene>, sent: Sent) -> CaseResult {
    let image = match image(&scene, false, sent.needs()).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    if let Err(verdict) = image.prepare(ClusterKind::Data, image.target()).await? {
        return Ok(verdict);
    }
    let target = second(&scene, &image).await?;
    let manager = JobManager::new(&scene.lab.graph);
    let options = MirrorOptions {
        copy_mode: CopyMode::WriteBlocking,
        ..MirrorOptions::new(&image.node, &target)
    };
    let job = manager.mirror(options).await?;
    job.wait_ready().await?;
    let hold = hold_writes(&scene.lab.disk(COPY)?, owner::PARKED);
    let write = write(&scene, &image);
    scene.rest().await;
    insist(&scene, hold.waiting().len() == 1, "no write was parked")?;
    let waits = waits_at(&image.guest);
    let request = send(&scene, &image, sent);
    scene.rest().await;
    insist(&scene, !request.is_done(), "the request overtook the write")?;
    insist(
        &scene,
        waits_at(&image.guest) == waits + 1,
        "it waits, but not at the filter's gate",
    )?;
    hold.release();
    ended(write).await?;
    ended(request).await?;
    let through = job.counters().bytes_written_through;
    insist(&scene, through > 0, "nothing was written through")?;
    finish_mirror(&scene, image, &target, &job).await
}

async fn finish_mirror(
    scene: &Arc<Scene>,
    image: Image,
    target: &Arc<Node>,
    job: &Job,
) -> CaseResult {
    job.wait_ready().await?;
    job.cancel(false)?;
    job.wait().await?;
    let copy = Guest::new(&reader(scene, target)?, image.guest.oracle(), owner::OLD);
    if let Some(wrong) = copy.verify(false).await?.first() {
        return Err(format!("the mirror's target: {wrong}").into());
    }
    drop(copy);
    let source = content(scene, &image.node).await?;
    same(&content(scene, target).await?, &source, "the mirror")?;
    close_second(scene, target).await?;
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn beside_mirror(scene: Arc<Scene>, sent: Sent, side: Side) -> CaseResult {
    let image = match image(&scene, false, sent.needs()).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    if let Err(verdict) = image.prepare(ClusterKind::Data, image.target()).await? {
        return Ok(verdict);
    }
    let target = second(&scene, &image).await?;
    let host = image.host_of_target().await?;
    // What it has read is what was there before.
    let hold = match side {
        Side::Read => {
            let reads = Choose::reads().within(host..host + image.cluster);
            image.disk.hold(reads.times(1), Stage::After)
        }
        Side::Write => hold_writes(&scene.lab.disk(COPY)?, owner::OLD),
    };
    let manager = JobManager::new(&scene.lab.graph);
    let options = MirrorOptions::new(&image.node, &target);
    let job = manager.mirror(options).await?;
    scene.rest().await;
    insist(&scene, hold.waiting().len() == 1, "no copy was parked")?;
    let waits = image.gate_waits();
    let request = send(&scene, &image, sent);
    scene.rest().await;
    let waits_for_read = side == Side::Read && sent != Sent::Write;
    if waits_for_read {
        insist(&scene, !request.is_done(), "it overtook the job's read")?;
        insist(
            &scene,
            image.gate_waits() == waits + 1,
            "it waits, but not at the source's gate",
        )?;
    } else {
        insist(&scene, request.is_done(), "it waits for the job's copy")?;
    }
    hold.release();
    ended(request).await?;
    job.wait_ready().await?;
    let beside = job.counters().bytes_while_guest_wrote;
    // What waited may come after the copy, and is then copied as if nobody had been there.
    insist(
        &scene,
        waits_for_read || beside > 0,
        "the job didn't see the guest",
    )?;
    finish_mirror(&scene, image, &target, &job).await
}

/// A chain of three: the base with data everywhere, a layer with data at cluster 0 and data or zeroes at the target, and
/// the guest's. Gives what the layers below the guest's hold together.
async fn chain(
    scene: &Arc<Scene>,
    zero: bool,
    needs: Capabilities,
) -> Result<Result<(Image, Vec<u8>), Verdict>, Failure> {
    let needs = needs | Capabilities::CHANGE_BACKING;
    let (lab, format) = (&scene.lab, scene.format.name.as_str());
    let below = Image::new(scene, Setup { backing: true }).await?;
    let Some(below) = below else {
        return Ok(Err(Verdict::NotCovered(
            "the driver has no backing files".into(),
        )));
    };
    if let Err(verdict) = below.needs(needs) {
        return Ok(Err(verdict));
    }
    let (cluster, target, none) = (below.cluster, below.target(), RequestFlags::empty());
    below.guest.write(0, cluster, none).await?;
    if zero {
        below.guest.zero(target, cluster, none).await?;
    } else {
        below.guest.write(target, cluster, none).await?;
    }
    below.guest.handle().flush().await?;
    let initial = content(scene, &below.node).await?;
    let bytes = below.close().await?;
    lab.disks.insert(Disk::new(MIDDLE, bytes));
    let node = lab.open(format, MIDDLE, None, &Options::new()).await?;
    let size = node.length();
    lab.graph.release(&node).await?;
    let image = Image::over(scene, (MIDDLE, format), size, cluster, &initial).await?;
    no_resize(&image)?;
    Ok(Ok((image, initial)))
}

/// Starts a commit of the middle layer into the base.
async fn commit(scene: &Scene, image: &Image) -> Result<Arc<Job>, Failure> {
    let layers = image.node.chain();
    let [middle, base] = layers.as_slice() else {
        return Err(format!("{} layers below the guest's", layers.len()).into());
    };
    let options = CommitOptions::new(&image.node).top(middle).base(base);
    let manager = JobManager::new(&scene.lab.graph);
    Ok(manager.commit(options).await?)
}

async fn finish_commit(scene: &Scene, image: Image, initial: &[u8], job: &Job) -> CaseResult {
    job.wait().await?;
    let Some(base) = image.node.backing() else {
        return Err("the commit left no backing file".into());
    };
    if base.backing().is_some() {
        return Err("the commit didn't drop the layer".into());
    }
    same(&content(scene, &base).await?, initial, "the base")?;
    drop(base);
    image.finish().await?;
    Ok(Verdict::Passed)
}

async fn commit_below(scene: Arc<Scene>, zero: bool, arrival: Arrival) -> CaseResult {
    let (image, initial) = match chain(&scene, zero, arrival.needs()).await? {
        Ok(chain) => chain,
        Err(verdict) => return Ok(verdict),
    };
    // The commit is held at cluster 0, before it comes to the target.
    let needle = Stamp::needle(owner::OLD);
    let choose = Choose::writes().containing(&needle).times(1);
    let commit_hold = scene.lab.disk(BASE)?.hold(choose, Stage::Before);
    let job = commit(&scene, &image).await?;
    scene.rest().await;
    insist(
        &scene,
        commit_hold.waiting().len() == 1,
        "the commit wasn't parked",
    )?;
    let hold = hold_writes(&image.disk, owner::PARKED);
    let write = write(&scene, &image);
    scene.rest().await;
    insist(&scene, hold.waiting().len() == 1, "no write was parked")?;
    let waits = image.gate_waits();
    let request = send(&scene, &image, Sent::Other(arrival));
    scene.rest().await;
    insist(&scene, !request.is_done(), "the request overtook the write")?;
    insist(
        &scene,
        image.gate_waits() == waits + 1,
        "it waits, but not at the gate",
    )?;
    commit_hold.release();
    scene.rest().await;
    let counters = job.counters();
    let copied = counters.bytes_copied + counters.bytes_zeroed;
    insist(
        &scene,
        copied >= 2 * image.cluster,
        "the commit waited for the guest's requests above it",
    )?;
    insist(
        &scene,
        !job.status().is_over(),
        "the chain was changed while a request was under way",
    )?;
    hold.release();
    ended(write).await?;
    ended(request).await?;
    finish_commit(&scene, image, &initial, &job).await
}

async fn beside_commit(scene: Arc<Scene>, sent: Sent) -> CaseResult {
    let (image, initial) = match chain(&scene, false, sent.needs()).await? {
        Ok(chain) => chain,
        Err(verdict) => return Ok(verdict),
    };
    // Its second write of data is that of the target.
    let needle = Stamp::needle(owner::OLD);
    let choose = Choose::writes().containing(&needle).after(1);
    let hold = scene.lab.disk(BASE)?.hold(choose, Stage::Before);
    let job = commit(&scene, &image).await?;
    scene.rest().await;
    insist(&scene, hold.waiting().len() == 1, "no write was parked")?;
    let request = send(&scene, &image, sent);
    scene.rest().await;
    insist(&scene, request.is_done(), "it waits for the commit")?;
    insist(&scene, !job.status().is_over(), "the commit is over")?;
    hold.release();
    ended(request).await?;
    finish_commit(&scene, image, &initial, &job).await
}
