//! The power is cut at every request of a growth that takes more room for tables than there was: the old tables and the new
//! ones are both on the storage for a while, and one of them counts.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use block_core::{Capabilities, ErrorKind, Options, RequestFlags, driver::Truncate};

use crate::{
    bench::{Bench, Outcome, case, must, not_covered, same},
    case::{Case, Failure, Group, Scene, ended},
    pattern::stamped,
    storage::{Choose, Content, Disk, Stage},
};

/// What the image is opened as after a cut.
const AFTER: &str = "after-the-cut";
/// Clusters that have data.
const WRITTEN: u64 = 4;
/// Contents for each place: all that can be lost is, all is kept, any of it.
const SUBSETS: u64 = 4;

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        Group::Crash,
        "crash-growth-past-the-tables",
        "wherever the power is cut while a disk grows past what its tables could map, it has its old or its new length, \
         all its data, nothing is corrupt, and it can be written on",
        grown,
    )]
}

/// An image's content, and before which request it was left.
struct Cut {
    content: Content,
    before: String,
}

async fn grown(scene: Arc<Scene>) -> Outcome {
    if !scene.format.crash_safe {
        return not_covered("the driver doesn't claim to survive power cuts");
    }
    let mut bench = Bench::new(&scene, WRITTEN + 1).await?;
    bench.needs(Capabilities::TRUNCATE)?;
    let cluster = bench.cluster;
    bench.write(0, WRITTEN * cluster).await?;
    bench.handle.flush().await?;
    // Three times what a table of one cluster maps whose entries have 8 bytes; clusters can be as large as 2 MiB.
    let (old, new) = (bench.size(), (3 * cluster * cluster / 8).min(1 << 40));
    bench.disk.track_durability();
    let hold = bench.disk.hold(Choose::any(), Stage::Before);
    let handle = bench.handle.clone();
    let too_big = Arc::new(AtomicBool::new(false));
    let refused = too_big.clone();
    let growing = scene.start(async move {
        match handle.truncate(new, Truncate::default()).await {
            Err(error) if error.kind() == ErrorKind::TooBig => {
                refused.store(true, Ordering::SeqCst);
                Ok(())
            }
            grown => grown,
        }
    });
    let mut cuts = Vec::new();
    loop {
        scene.rest().await;
        let next = hold.waiting().first().copied();
        let before = next.map_or_else(|| "it has ended".to_owned(), |op| op.to_string());
        for subset in 0..SUBSETS {
            let mut luck = || match subset {
                0 | 1 => subset,
                _ => block_core::Environment::random(&*scene.lab.env),
            };
            cuts.push(Cut {
                content: bench.disk.power_cut_with(&mut luck),
                before: before.clone(),
            });
        }
        match next {
            Some(op) => hold.let_go(op),
            None => break,
        }
    }
    drop(hold);
    ended(growing).await?;
    if too_big.load(Ordering::SeqCst) {
        return not_covered("the tables of an image don't grow");
    }
    must(bench.handle.length() == new, || {
        format!("it has {} bytes, not {new}", bench.handle.length())
    })?;
    let data = bench.model[..(WRITTEN * cluster) as usize].to_vec();
    for Cut { content, before } in cuts {
        judge(&scene, content, &data, cluster, [old, new])
            .await
            .map_err(|failure| Failure(format!("power cut before {before}: {failure}")))?;
    }
    bench.close_only().await
}

async fn judge(
    scene: &Arc<Scene>,
    content: Content,
    data: &[u8],
    cluster: u64,
    lengths: [u64; 2],
) -> Result<(), Failure> {
    let lab = &scene.lab;
    lab.disks.insert(Disk::new(AFTER, content));
    let node = lab
        .open(&scene.format.name, AFTER, None, &Options::new())
        .await?;
    let handle = lab.attach(&node, "after the cut")?;
    let length = handle.length();
    if !lengths.contains(&length) {
        return Err(format!("it has {length} bytes, neither of {lengths:?}").into());
    }
    let same_data = |found: &[u8], what: &str| {
        same(found, data, 0, what).map_err(|stop| Failure(format!("{stop:?}")))
    };
    same_data(&handle.read(0, data.len()).await?, "opened again")?;
    super::check(&handle, "after the cut").await?;
    // New clusters must not go where a table is that counts.
    let behind = data.len() as u64..length;
    for at in [behind.start, behind.end - cluster.min(behind.end)] {
        let at = at.max(behind.start) / cluster * cluster;
        let len = cluster.min(length - at);
        let written = stamped(crate::cases::owner::NEW, 1, at, len);
        handle.write(at, written, RequestFlags::empty()).await?;
    }
    handle.flush().await?;
    same_data(&handle.read(0, data.len()).await?, "written on")?;
    super::check(&handle, "after writing on").await?;
    drop(handle);
    lab.graph.release(&node).await?;
    Ok(())
}
