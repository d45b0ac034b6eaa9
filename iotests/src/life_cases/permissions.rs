//! Who may use a node beside whom: conflicts are named with both sides and change nothing, and what is given back is free
//! again.

use std::sync::Arc;

use block_core::{
    ErrorKind, RequestFlags,
    driver::Truncate,
    flags::{PermissionSet, Permissions},
};

use crate::{
    bench::{Bench, Outcome, case, must, wrong},
    case::{Case, Group, Scene},
};

const READ: Permissions = Permissions::CONSISTENT_READ;
const WRITE: Permissions = Permissions::WRITE;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Graph,
            "graph-permission-conflict-names-both-sides",
            "a producer that needs what another doesn't share is refused with both names, the node's and the permission's; \
             the first goes on",
            conflict,
        ),
        case(
            Group::Graph,
            "graph-permission-that-a-user-wont-share-is-refused-both-ways",
            "a producer that won't share what another uses already is refused",
            unshared,
        ),
        case(
            Group::Graph,
            "graph-permissions-are-free-when-given-back",
            "what a handle used is free for others when it is dropped or needs less",
            given_back,
        ),
        case(
            Group::Graph,
            "graph-refused-permissions-change-nothing",
            "a handle whose new permissions are refused keeps those it had, and so do all others",
            nothing_changes,
        ),
        case(
            Group::Graph,
            "graph-storage-of-an-image-has-no-second-writer",
            "the storage below an open image can be read by others but neither written nor resized, by the image's name",
            storage,
        ),
        case(
            Group::Graph,
            "graph-backing-file-cant-be-written-below-an-overlay",
            "a backing file in use isn't written: not below a producer that shares writing with nobody, and not as the \
             read-only image that it is",
            backing,
        ),
        case(
            Group::Graph,
            "graph-permission-lost-while-waiting-counts",
            "a request that waited in a drained section is refused when its handle has lost the permission meanwhile",
            lost_meanwhile,
        ),
        case(
            Group::Graph,
            "graph-resize-can-be-kept-from-others",
            "a producer that doesn't share resizing keeps every other handle from it, and writing goes on",
            no_resize,
        ),
    ]
}

/// The refusal of permissions that are in somebody's way.
fn refused<T>(result: block_core::Result<T>, names: &[&str]) -> Outcome {
    let Err(error) = result else {
        return wrong(format!("no conflict was seen: {names:?}"));
    };
    let text = error.to_string();
    let named = names.iter().all(|name| text.contains(name));
    must(error.kind() == ErrorKind::NotPermitted && named, || {
        format!("{names:?} isn't all in: {text}")
    })
}

async fn conflict(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let first = bench.attach(READ | WRITE, READ | Permissions::RESIZE, "alone");
    // The bench's own handle shares everything but uses writing as well.
    refused(first, &["'alone'", "'guest'", "'write'", bench.node.name()])?;
    let set = PermissionSet::new(READ, Permissions::all());
    bench.handle.set_permissions(set)?;
    let first = bench.attach(READ | WRITE, READ | Permissions::RESIZE, "alone")?;
    let second = bench.attach(READ | WRITE, Permissions::all(), "second");
    refused(
        second,
        &["'alone'", "'second'", "'write'", bench.node.name()],
    )?;
    let data = bench.data(0, 4096);
    first.write(0, data.clone(), RequestFlags::empty()).await?;
    bench.expect(0, &data);
    // One that only reads is welcome.
    let reader = bench.attach(READ, Permissions::all(), "reader")?;
    let found = reader.read(0, 4096).await?;
    crate::bench::same(&found, &data, 0, "what the reader sees")?;
    drop((reader, first));
    bench
        .handle
        .set_permissions(crate::lab::all_permissions())?;
    bench.finish().await
}

async fn unshared(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 4).await?;
    let nobody = bench.attach(Permissions::empty(), Permissions::empty(), "loner");
    refused(nobody, &["'loner'", "'guest'"])?;
    let no_readers = bench.attach(
        Permissions::empty(),
        Permissions::all() - READ,
        "no readers",
    );
    refused(no_readers, &["'consistent read'"])?;
    bench.finish().await
}

async fn given_back(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench
        .handle
        .set_permissions(PermissionSet::new(READ, Permissions::all()))?;
    for round in 0..3 {
        let alone = bench.attach(READ | WRITE, READ, "alone")?;
        refused(
            bench.attach(READ | WRITE, Permissions::all(), "second"),
            &["'alone'"],
        )?;
        if round == 1 {
            alone.set_permissions(PermissionSet::new(READ, Permissions::all()))?;
        } else {
            drop(alone);
        }
        let second = bench.attach(READ | WRITE, Permissions::all(), "second")?;
        second
            .write(0, vec![round + 1; 512], RequestFlags::empty())
            .await?;
        bench.model[..512].fill(round + 1);
    }
    bench
        .handle
        .set_permissions(crate::lab::all_permissions())?;
    bench.finish().await
}

async fn nothing_changes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    let other = bench.attach(READ, Permissions::all(), "other")?;
    let before = (other.permissions(), bench.node.permissions());
    let greedy = PermissionSet::new(READ | WRITE, Permissions::empty());
    refused(other.set_permissions(greedy), &["'other'", "'guest'"])?;
    let after = (other.permissions(), bench.node.permissions());
    must(before == after, || format!("{before:?} became {after:?}"))?;
    must(
        other
            .write(0, vec![1; 1], RequestFlags::empty())
            .await
            .is_err(),
        || "it may write".into(),
    )?;
    drop(other);
    bench.write(0, 512).await?;
    bench.finish().await
}

async fn storage(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let edges = bench.node.edges();
    // A data file isn't the format's alone to describe.
    let file = edges.child(block_core::ChildRole::File);
    let Some(child) = file.or_else(|| edges.primary()) else {
        return crate::bench::not_covered("the image has no storage of its own");
    };
    let graph = &scene.lab.graph;
    let file = child.node().clone();
    let attach =
        |used, name| graph.attach(&file, PermissionSet::new(used, Permissions::all()), name);
    let reader = attach(READ, "reader")?;
    reader.read(0, 512).await?;
    // What a format shares of its file is its own business where its file is data alone.
    let strict = edges.child(block_core::ChildRole::File).is_some();
    if strict {
        refused(
            attach(READ | WRITE, "writer"),
            &["'writer'", bench.node.name(), "'write'"],
        )?;
    }
    refused(
        attach(Permissions::RESIZE, "resizer"),
        &["'resizer'", bench.node.name(), "'resize'"],
    )?;
    drop((reader, edges, file));
    bench.write(512, 512).await?;
    bench.finish().await
}

async fn backing(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let bench = bench.overlay(4).await?;
    let Some(base) = bench.node.backing() else {
        return wrong("the overlay has no backing file");
    };
    let graph = &scene.lab.graph;
    bench
        .handle
        .set_permissions(PermissionSet::new(READ | WRITE, READ))?;
    let writer = PermissionSet::new(WRITE, Permissions::all());
    refused(
        graph.attach(&base, writer, "writer"),
        &["'writer'", bench.node.name()],
    )?;
    bench
        .handle
        .set_permissions(crate::lab::all_permissions())?;
    // Now it is allowed, as far as the overlay goes; but the image is open read-only.
    let writer = graph.attach(&base, writer, "writer")?;
    for result in [
        writer.write(0, vec![1; 512], RequestFlags::empty()).await,
        writer.discard(0, 512).await,
    ] {
        match result {
            Err(error) if error.kind() == ErrorKind::NotPermitted => {}
            other => return wrong(format!("a change of a backing file: {other:?}")),
        }
    }
    drop((writer, base));
    bench.finish().await
}

async fn lost_meanwhile(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 4096).await?;
    let drained = scene.lab.graph.drain(&bench.node).await;
    let mut running = Vec::new();
    for kind in 0..3 {
        let handle = bench.handle.clone();
        running.push(bench.start(async move {
            match kind {
                0 => handle.write(0, vec![9; 512], RequestFlags::empty()).await,
                1 => handle.write_zeroes(0, 512, RequestFlags::empty()).await,
                _ => handle.truncate(0, Truncate::default()).await,
            }
        }));
    }
    scene.rest().await;
    must(running.iter().all(|request| !request.is_done()), || {
        "a request was let into a drained section".into()
    })?;
    bench
        .handle
        .set_permissions(PermissionSet::new(READ, Permissions::all()))?;
    drop(drained);
    for request in running {
        match request.await {
            Err(error) if error.kind() == ErrorKind::NotPermitted => {}
            other => return wrong(format!("a request without permission: {other:?}")),
        }
    }
    bench
        .handle
        .set_permissions(crate::lab::all_permissions())?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn no_resize(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench
        .handle
        .set_permissions(PermissionSet::new(READ | WRITE, Permissions::all()))?;
    let keeper = bench.attach(READ, Permissions::all() - Permissions::RESIZE, "keeper")?;
    let all = crate::lab::all_permissions();
    refused(
        bench.handle.set_permissions(all),
        &["'keeper'", "'guest'", "'resize'"],
    )?;
    bench.write(0, 5000).await?;
    let length = 2 * bench.size();
    must(
        bench
            .handle
            .truncate(length, Truncate::default())
            .await
            .is_err(),
        || "it was resized".into(),
    )?;
    drop(keeper);
    bench.handle.set_permissions(all)?;
    bench.finish().await
}
