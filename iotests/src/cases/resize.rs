//! Resizing is serialising from the lower of both ends on: what waited behind a shrink sees the new end.

use std::sync::Arc;

use block_core::{
    ErrorKind, RequestFlags,
    driver::{Capabilities, Truncate},
    flags::{PermissionSet, Permissions},
};

use super::image::{CLUSTERS, Image, Setup, owner};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict, ended},
    lab::Guest,
    pattern::{Seen, Stamp},
    storage::{Choose, Stage},
};

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        Group::Race,
        "race-write-behind-shrink-fails-cleanly",
        "a write that waited behind a shrink fails, does nothing past the new end, and what was cut off \
         comes back as zeroes",
        behind_shrink,
    )]
}

async fn behind_shrink(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup::default()).await? else {
        return Ok(Verdict::NotCovered("the driver can't write".into()));
    };
    if let Err(verdict) = image.needs(Capabilities::TRUNCATE) {
        return Ok(verdict);
    }
    let cluster = image.cluster;
    let (old_len, new_len) = (CLUSTERS * cluster, (CLUSTERS - 8) * cluster);
    let none = RequestFlags::empty();
    let oracle = image.guest.oracle().clone();

    // A producer that may not resize, so that writing past the end grows nothing.
    let set = PermissionSet::new(
        Permissions::CONSISTENT_READ | Permissions::WRITE,
        Permissions::all(),
    );
    let writer = Arc::new(scene.lab.graph.attach(&image.node, set, "writer")?);
    let writer = Guest::new(&writer, &oracle, owner::LATER);

    let needle = Stamp::needle(owner::PARKED);
    let hold = image
        .disk
        .hold(Choose::writes().containing(&needle), Stage::Before);
    let guest = image.guest.signing(owner::PARKED);
    let first = scene.start(async move { guest.write(new_len + cluster, cluster, none).await });
    scene.rest().await;
    let handle = image.guest.handle().clone();
    let shrink = scene.start(async move { handle.truncate(new_len, Truncate::default()).await });
    scene.rest().await;
    let guest = writer.clone();
    let behind = scene.start(async move { guest.write(new_len + cluster, cluster, none).await });
    // This one begins inside and ends outside.
    let guest = writer.clone();
    let across = scene.start(async move { guest.write(new_len - 512, 1024, none).await });
    scene.rest().await;
    if scene.strict() {
        if hold.waiting().len() != 1 {
            return Err("the first write never reached the storage".into());
        }
        if shrink.is_done() || behind.is_done() || across.is_done() {
            return Err("the shrink or a write behind it didn't wait".into());
        }
    }
    hold.release();
    ended(first).await?;
    let shrunk = match shrink.await {
        Ok(Ok(())) => true,
        Ok(Err(error)) if error.kind() == ErrorKind::NotSupported => {
            let _ = (behind.await, across.await);
            return Ok(Verdict::NotCovered("the driver can't shrink".into()));
        }
        Ok(Err(error)) => return Err(error.into()),
        Err(_) => false,
    };
    let results = [behind.await, across.await];
    if shrunk && scene.strict() {
        for result in &results {
            match result {
                Ok(Err(error)) if error.kind() == ErrorKind::Io => {}
                other => {
                    return Err(format!("a write behind the shrink gave {other:?}").into());
                }
            }
        }
        if image.node.length() != new_len {
            return Err(format!("the image is {} bytes long", image.node.length()).into());
        }
    }
    // A dropped shrink may have happened or not; from here on it has.
    let handle = image.guest.handle().clone();
    handle.flush().await?;
    if image.node.length() != new_len {
        handle.truncate(new_len, Truncate::default()).await?;
    }
    oracle.forget(new_len, old_len - new_len);
    handle.truncate(old_len, Truncate::default()).await?;
    for at in (new_len..old_len).step_by(cluster as usize) {
        if image.sector(at).await? != Seen::Zero {
            return Err(format!("what was cut off at {at:#x} came back").into());
        }
    }
    drop((handle, writer));
    image.finish().await?;
    Ok(Verdict::Passed)
}
