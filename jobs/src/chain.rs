//! What all jobs do to the graph around them: they put a filter in, they take it out again, they claim and freeze what they
//! work on, they rewrite backing strings. No data is copied here.

use std::sync::Arc;

use block_core::{
    driver::{BlockDriver, ChildRole, DriverKind, Reopen},
    error::{Error, Operation, Result},
    flags::{PermissionSet, Permissions},
    graph::{FreezeGuard, Graph, JobClaim, NodeSpec},
    handle::BlockHandle,
    node::Node,
};

use crate::{job::JobKind, manager::Turns};

/// What jobs hold at the node that they read.
pub(crate) const READER: PermissionSet = PermissionSet::new(
    Permissions::CONSISTENT_READ,
    Permissions::all().difference(Permissions::RESIZE),
);

/// What keeps others from taking a layer for a whole disk that is being merged into another.
const INCONSISTENT: PermissionSet = PermissionSet::new(
    Permissions::empty(),
    Permissions::WRITE.union(Permissions::WRITE_UNCHANGED),
);

/// An error in what a job was asked to do.
pub(crate) fn refused(message: impl Into<String>) -> Error {
    Error::invalid(message).with_operation(Operation::Job, 0, 0)
}

/// Claims nodes for a job; the message of the first that is taken is the error.
pub(crate) fn claim(
    graph: &Arc<Graph>,
    nodes: impl IntoIterator<Item = Arc<Node>>,
    kind: JobKind,
) -> Result<Vec<JobClaim>> {
    let mut claims = Vec::new();
    let mut seen = Vec::new();
    for node in nodes {
        if !seen.contains(&node.id()) {
            seen.push(node.id());
            claims.push(graph.claim_for_job(&node, kind.name())?);
        }
    }
    Ok(claims)
}

/// Claims the chain from `top` down to `base` (or to its end), and what else a job works on, and freezes it. Whatever else
/// works on it then is refused at its start, and the job finds at its end what it has seen here.
pub(crate) fn hold(
    graph: &Arc<Graph>,
    top: &Arc<Node>,
    base: Option<&Arc<Node>>,
    also: impl IntoIterator<Item = Arc<Node>>,
    kind: JobKind,
) -> Result<(Vec<JobClaim>, FreezeGuard)> {
    let now = || match base {
        Some(base) => layers(top, base),
        None => Some(std::iter::once(top.clone()).chain(top.chain()).collect()),
    };
    let also: Vec<Arc<Node>> = also.into_iter().collect();
    loop {
        let Some(seen) = now() else {
            return Err(refused(format!(
                "Node '{}' is not a backing image of '{}'",
                base.map_or("", |base| base.name()),
                top.name()
            )));
        };
        // Images before filters: who is refused is told of a node that they know.
        let mut nodes: Vec<_> = also.iter().chain(&seen).cloned().collect();
        nodes.sort_by_key(|node| node.driver().kind() == DriverKind::Filter);
        let claims = claim(graph, nodes, kind)?;
        let frozen = graph.freeze_chain(top, base, kind.name())?;
        // It may have changed before it was claimed.
        let ids = |nodes: &[Arc<Node>]| nodes.iter().map(|node| node.id()).collect::<Vec<_>>();
        if now().is_some_and(|now| ids(&now) == ids(&seen)) {
            return Ok((claims, frozen));
        }
    }
}

/// Puts a filter over `source`, with `target` as its other child. It is claimed for the job: nobody else may take it for a
/// disk, or build on it, since it goes away with the job.
pub(crate) async fn insert(
    graph: &Arc<Graph>,
    driver: Arc<dyn BlockDriver>,
    name: Option<&str>,
    source: &Arc<Node>,
    target: &Arc<Node>,
    kind: JobKind,
) -> Result<(Arc<Node>, JobClaim)> {
    insert_started(graph, driver, name, source, target, kind, || ()).await
}

/// The same; `start` is called when nothing is in flight, right before it is put in.
pub(crate) async fn insert_started(
    graph: &Arc<Graph>,
    driver: Arc<dyn BlockDriver>,
    name: Option<&str>,
    source: &Arc<Node>,
    target: &Arc<Node>,
    kind: JobKind,
    start: impl FnOnce(),
) -> Result<(Arc<Node>, JobClaim)> {
    let mut spec = NodeSpec::new(driver)
        .with_child(ChildRole::Filtered, "file", source)
        .with_child(ChildRole::Target, "target", target);
    if let Some(name) = name {
        spec = spec.named(name);
    }
    let filter = graph.add_node(spec)?;
    let claim = match graph.claim_filter_for_job(&filter, kind.name()) {
        Ok(claim) => claim,
        Err(error) => {
            retire(graph, &filter, true).await;
            return Err(error);
        }
    };
    let drained = graph.drain(source).await;
    start();
    let inserted = graph.insert_filter(&filter).await;
    drop(drained);
    if let Err(error) = inserted {
        retire(graph, &filter, true).await;
        return Err(error);
    }
    Ok((filter, claim))
}

/// Gives a filter up that has no parents any more. Its target is left alone; its source too, with `keep_source`, and
/// otherwise it is closed if nobody uses it.
pub(crate) async fn retire(graph: &Arc<Graph>, filter: &Arc<Node>, keep_source: bool) {
    let mut result = graph
        .set_child(filter, ChildRole::Target, "target", None)
        .await;
    if keep_source {
        let detached = graph
            .set_child(filter, ChildRole::Filtered, "file", None)
            .await;
        result = result.and(detached);
    }
    let collected = graph.collect(filter).await;
    if let Err(error) = result.and(collected) {
        tracing::warn!(%error, filter = filter.name(), "a filter of a job was given up with an error");
    }
}

/// Takes a filter out of the graph again.
pub(crate) async fn withdraw(graph: &Arc<Graph>, filter: &Arc<Node>) {
    if let Err(error) = graph.remove_filter(filter).await {
        // It stays as a plain pass-through.
        tracing::warn!(%error, filter = filter.name(), "a job's filter can't be taken out");
        return;
    }
    retire(graph, filter, true).await;
}

/// A job has come to its end with `node`, which had others above it: it is closed if they have gone meanwhile.
pub(crate) async fn leave(graph: &Arc<Graph>, node: &Arc<Node>) {
    if let Err(error) = graph.collect(node).await {
        tracing::warn!(%error, node = node.name(), "a layer that nobody uses was closed with an error");
    }
}

/// Marks layers as no whole disks.
pub(crate) fn mark_inconsistent(
    graph: &Arc<Graph>,
    nodes: &[Arc<Node>],
) -> Result<Vec<BlockHandle>> {
    nodes
        .iter()
        .map(|node| graph.attach(node, INCONSISTENT, ""))
        .collect()
}

/// The nodes from `top` down to above `base`, `top` included; `None` if `base` isn't below.
pub(crate) fn layers(top: &Arc<Node>, base: &Arc<Node>) -> Option<Vec<Arc<Node>>> {
    let mut layers = vec![top.clone()];
    for node in top.chain() {
        if node.id() == base.id() {
            return Some(layers);
        }
        layers.push(node);
    }
    None
}

/// Makes `node` writable; true if it wasn't. Whoever calls it has the turn to reopen images, and keeps it until the
/// permission to write is there.
pub(crate) async fn make_writable(graph: &Arc<Graph>, node: &Arc<Node>) -> Result<bool> {
    if !node.driver().is_read_only() {
        return Ok(false);
    }
    reopen(graph, node, false).await?;
    Ok(true)
}

/// Makes `node` read-only again, in a turn of its own.
pub(crate) async fn restore_read_only(graph: &Arc<Graph>, turns: &Turns, node: &Arc<Node>) {
    let _turn = turns.reopening.lock().await;
    make_read_only(graph, node).await;
}

/// Makes `node` read-only again, in the caller's turn. Best effort: it may have got a writer meanwhile.
pub(crate) async fn make_read_only(graph: &Arc<Graph>, node: &Arc<Node>) {
    if let Err(error) = reopen(graph, node, true).await {
        tracing::warn!(%error, node = node.name(), "a node stays writable after a job");
    }
}

async fn reopen(graph: &Arc<Graph>, node: &Arc<Node>, read_only: bool) -> Result<()> {
    let changes = Reopen {
        read_only: Some(read_only),
        ..Reopen::default()
    };
    graph.reopen(node, changes).await
}

/// Has the header of `overlay` name another backing file: `name`, or that of `base`.
pub(crate) async fn rewrite_backing(
    graph: &Arc<Graph>,
    turns: &Turns,
    overlay: &Arc<Node>,
    base: Option<&Arc<Node>>,
    name: Option<&str>,
) -> Result<()> {
    let overlay = overlay.skip_filters();
    let _turn = turns.reopening.lock().await;
    let reopened = make_writable(graph, &overlay).await?;
    let result = match base {
        None => graph.change_backing_file(&overlay, None, None).await,
        Some(base) => {
            let image = base.skip_filters();
            let file = name
                .map(str::to_owned)
                .or_else(|| base.name_in_images())
                .unwrap_or_else(|| image.name().to_owned());
            let format = image.driver().name();
            graph
                .change_backing_file(&overlay, Some(&file), Some(format))
                .await
        }
    };
    if reopened {
        make_read_only(graph, &overlay).await;
    }
    result
}

/// The cluster size that `node` says it has.
pub(crate) async fn cluster_size(graph: &Arc<Graph>, node: &Arc<Node>) -> Result<Option<u64>> {
    let handle = graph.attach(node, PermissionSet::NONE, "")?;
    Ok(handle.info().await?.cluster_size)
}
