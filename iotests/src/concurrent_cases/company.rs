//! Requests in company, each of which a sweep drops at each of its await points: afterwards the others have ended well, what
//! they said is so, and nothing is held by the one that is gone.

use std::sync::Arc;

use block_core::{
    Capabilities, Options, RequestFlags,
    driver::Truncate,
    image::{CheckMode, Progress},
};

use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict, ended},
    cases::{Image, Setup},
    lab::Guest,
    stack::{NONE, at_rest, probe},
};

/// The write that a company has in common.
const WRITER: u32 = 60;

pub(super) fn cases() -> Vec<Case> {
    let cancel = Group::Cancel;
    vec![
        Case::new(
            cancel,
            "cancel-one-of-writers-in-one-cluster",
            "whichever of three writers that fill one new cluster is dropped wherever, the others' data is there",
            writers,
        ),
        Case::new(
            cancel,
            "cancel-write-discard-or-flush-in-company",
            "a copy on write, a discard and a flush of one table run at once, and any of them may be dropped",
            mixed,
        ),
        Case::new(
            cancel,
            "cancel-growth-beside-writes",
            "a resize that is dropped leaves the old or the new length, and writes beside it last",
            growth,
        ),
        Case::new(
            cancel,
            "cancel-check-beside-writes",
            "a check that is dropped leaves nothing locked: the next one is clean",
            checks,
        ),
        Case::new(
            cancel,
            "cancel-compressed-write-and-its-overwrite",
            "a compressed write and a plain one into the same cluster, either of which may be dropped, leave one of the two",
            compressed,
        ),
        Case::new(
            cancel,
            "cancel-drain-under-load",
            "a drain that is dropped before it is complete lets the producers go on",
            drains,
        ),
        Case::new(
            cancel,
            "cancel-open",
            "an open that is dropped leaves no node, and the image can be opened and written",
            opens,
        ),
        Case::new(
            cancel,
            "cancel-create",
            "a creation that is dropped leaves no node, and can be done again",
            creates,
        ),
        Case::new(
            cancel,
            "cancel-read-gives-its-buffer-back",
            "a read that is dropped gives its buffer back when its I/O has ended, and not before",
            buffers,
        ),
    ]
}

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
    Ok(image.needs(needs).map(|()| image))
}

async fn finish(scene: &Arc<Scene>, image: Image) -> CaseResult {
    drop(scene.lab.graph.drain_all().await);
    at_rest(&scene.lab.graph)?;
    for guest in [&image.guest, &image.job] {
        if guest.handle().in_flight() > 0 {
            return Err("a dropped request still counts at its handle".into());
        }
    }
    image.finish().await?;
    Ok(Verdict::Passed)
}

/// A write of so many sectors of a guest of its own.
fn write(
    scene: &Arc<Scene>,
    guest: &Guest,
    owner: u32,
    offset: u64,
    len: u64,
) -> crate::sim::Running<Result<block_core::Result<()>, crate::sim::Cancelled>> {
    let guest = guest.signing(owner);
    scene.start(async move { guest.write(offset, len, NONE).await })
}

async fn writers(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, true, Capabilities::empty()).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let at = image.target();
    let writes = [0, 1, 2].map(|n| {
        let owner = WRITER + n as u32;
        write(&scene, &image.guest, owner, at + n * 1024, 1024)
    });
    let mut done = Vec::new();
    for write in writes {
        done.push(ended(write).await?);
    }
    for (n, done) in done.into_iter().enumerate() {
        let (place, owner) = (at + n as u64 * 1024, WRITER + n as u32);
        if done && !image.holds(place, owner).await? {
            return Err(format!("the write of sector {} is lost", 2 * n).into());
        }
    }
    finish(&scene, image).await
}

async fn mixed(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, false, Capabilities::DISCARD).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (at, unit) = (image.target(), image.cluster);
    image.guest.write(at, unit, NONE).await?;
    let first = write(&scene, &image.guest, WRITER, at + 20 * unit + 512, 1024);
    let guest = image.job.clone();
    let discard = scene.start(async move { guest.discard(at, unit).await });
    let guest = image.job.clone();
    let flush = scene.start(async move { guest.handle().flush().await });
    let last = write(&scene, &image.guest, WRITER + 1, at + 512, 512);
    ended(first).await?;
    ended(discard).await?;
    ended(flush).await?;
    ended(last).await?;
    finish(&scene, image).await
}

async fn growth(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, false, Capabilities::TRUNCATE).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (old, unit) = (image.node.length(), image.cluster);
    let new = old + 2 * unit;
    let handle = image.job.handle().clone();
    let resize = scene.start(async move { handle.truncate(new, Truncate::default()).await });
    let first = write(&scene, &image.guest, WRITER, image.target() + 512, 512);
    let second = write(&scene, &image.guest, WRITER, old - unit, unit);
    let resized = ended(resize).await?;
    ended(first).await?;
    ended(second).await?;
    drop(scene.lab.graph.drain_all().await);
    let length = image.node.length();
    if length != new && (resized || length != old) {
        return Err(format!("{length} bytes after a resize from {old} to {new}").into());
    }
    if length == new {
        image.guest.write(new - unit, unit, NONE).await?;
    }
    finish(&scene, image).await
}

async fn checks(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, false, Capabilities::CHECK).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let handle = image.job.handle().clone();
    let check =
        scene.start(async move { handle.check(CheckMode::ReadOnly, Progress::new()).await });
    let write = write(&scene, &image.guest, WRITER, image.target() + 512, 1024);
    if let Ok(report) = check.await
        && !report?.is_clean()
    {
        return Err("a check beside a write isn't clean".into());
    }
    ended(write).await?;
    finish(&scene, image).await
}

async fn compressed(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, false, Capabilities::COMPRESSED).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (at, unit) = (image.target(), image.cluster);
    let guest = image.guest.signing(WRITER);
    let packed = scene.start(async move {
        let flags = RequestFlags::WRITE_COMPRESSED;
        guest.write(at, unit, flags).await
    });
    ended(packed).await?;
    let plain = write(&scene, &image.guest, WRITER + 1, at + 1024, 512);
    let guest = image.job.signing(WRITER + 2);
    let again = scene.start(async move {
        let flags = RequestFlags::WRITE_COMPRESSED;
        guest.write(at + unit * 20, unit, flags).await
    });
    ended(plain).await?;
    ended(again).await?;
    finish(&scene, image).await
}

async fn drains(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, false, Capabilities::empty()).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let first = write(&scene, &image.guest, WRITER, image.target() + 512, 512);
    let (graph, node) = (scene.lab.graph.clone(), image.node.clone());
    let drain = scene.start(async move {
        let guard = graph.drain(&node).await;
        let left = node.tracker().in_flight();
        drop(guard);
        left
    });
    let second = write(&scene, &image.job, WRITER, image.target() + 1536, 512);
    ended(first).await?;
    if let Ok(left) = drain.await
        && left > 0
    {
        return Err(format!("{left} requests in a drained section").into());
    }
    // It comes through, whether or not somebody gave up a drain.
    ended(second).await?;
    finish(&scene, image).await
}

async fn opens(scene: Arc<Scene>) -> CaseResult {
    let (lab, format) = (&scene.lab, &scene.format);
    probe(&scene).await?;
    let length = lab.disk("probe")?.content().len();
    let (registry, graph, name) = (lab.registry.clone(), lab.graph.clone(), format.name.clone());
    let options = lab.options_for(&name, "probe", None, &Options::new());
    let open = scene.start(async move {
        let how = block_core::registry::OpenOptions {
            implicit: block_core::registry::ImplicitOpens::Permit,
            ..block_core::registry::OpenOptions::default()
        };
        let opened = registry.open_file(&graph, "probe", Some(&name), options, how);
        let node = opened.await?;
        graph.release(&node).await
    });
    let done = ended(open).await?;
    drop(lab.graph.drain_all().await);
    lab.graph.close_all().await?;
    if let Some(node) = lab.graph.nodes().first() {
        return Err(format!("'{}' is left of an open that was dropped", node.name()).into());
    }
    let names = format.create.get("lazy_refcounts").is_none();
    if !done && names && lab.disk("probe")?.content().len() != length {
        return Err("an open that was dropped changed the image's length".into());
    }
    let node = lab
        .open(&format.name, "probe", None, &Options::new())
        .await?;
    let handle = crate::stack::writer(&lab.graph, &node, "guest")?;
    if node.driver().capabilities().contains(Capabilities::WRITE) {
        handle.write(512, vec![7; 512], NONE).await?;
        handle.flush().await?;
    }
    drop(handle);
    crate::stack::check(&lab.graph, &node, true).await?;
    lab.graph.release(&node).await?;
    Ok(Verdict::Passed)
}

async fn creates(scene: Arc<Scene>) -> CaseResult {
    let (lab, format) = (&scene.lab, &scene.format);
    let options = lab
        .create_options(&format.name, "probe", &format.create)
        .with("size", 1 << 20);
    let (registry, graph, name) = (lab.registry.clone(), lab.graph.clone(), format.name.clone());
    let create = scene.start(async move { registry.create(&graph, &name, "probe", options).await });
    ended(create).await?;
    drop(lab.graph.drain_all().await);
    lab.graph.close_all().await?;
    if let Some(node) = lab.graph.nodes().first() {
        return Err(format!("'{}' is left of a creation that was dropped", node.name()).into());
    }
    probe(&scene).await?;
    Ok(Verdict::Passed)
}

async fn buffers(scene: Arc<Scene>) -> CaseResult {
    let image = match image(&scene, false, Capabilities::empty()).await? {
        Ok(image) => image,
        Err(verdict) => return Ok(verdict),
    };
    let (at, unit) = (image.target(), image.cluster);
    image.guest.write(at, unit, NONE).await?;
    let (lent, buf) = block_core::Buffer::try_new(3 * unit as usize)?.lend();
    let handle = image.guest.handle().clone();
    let read = scene.start(async move { handle.readv(at - unit, buf, NONE).await });
    let done = ended(read).await?;
    drop(scene.lab.graph.drain_all().await);
    let Ok(bytes) = lent.reclaim() else {
        return Err("the buffer of a read that is over isn't given back".into());
    };
    if done {
        let wrong = image.guest.oracle().check(at - unit, &bytes);
        if let Some(wrong) = wrong.first() {
            return Err(format!("read: {wrong}").into());
        }
    }
    finish(&scene, image).await
}
