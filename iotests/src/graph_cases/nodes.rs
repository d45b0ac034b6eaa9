//! Nodes: their names, how long they live, and changes that are refused: loops, frozen edges, nodes that are going.

use std::sync::Arc;

use block_core::{ChildRole, ErrorKind, Options, RequestFlags};

use crate::{
    bench::{Bench, Outcome, Probe, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
    lab::all_permissions,
    storage::{Content, Disk},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Graph,
            "graph-node-names-are-unique",
            "a second node of the same name is refused by that name, whatever is no name is refused too, nothing is left \
             open, and the name is free again when the node has gone",
            names,
        ),
        case(
            Group::Graph,
            "graph-node-in-use-isnt-closed",
            "releasing a node that a handle or a parent still uses closes nothing; the last one to go closes it",
            in_use,
        ),
        case(
            Group::Graph,
            "graph-kept-node-stays-until-it-is-released",
            "a node that is kept survives the last handle, and a released one doesn't",
            kept,
        ),
        case(
            Group::Graph,
            "graph-closed-node-takes-no-handle",
            "nobody can attach to a node that was closed",
            closed,
        ),
        case(
            Group::Graph,
            "graph-loop-is-refused",
            "a change that would make a node its own ancestor is refused and changes nothing",
            loops,
        ),
        case(
            Group::Graph,
            "graph-frozen-chain-cant-be-changed",
            "edges of a frozen chain aren't changed, by either of several holders, and are again when the last has gone",
            frozen,
        ),
        case(
            Group::Graph,
            "graph-node-is-claimed-by-one-job",
            "a second job on a node is refused by the first one's name, and let in when that has gone",
            claimed,
        ),
        case(
            Group::Graph,
            "graph-handle-moves-to-another-node-under-io",
            "moving a handle waits for its write in flight, which lands in the old image; later writes land in the new one",
            moved,
        ),
        case(
            Group::Graph,
            "graph-node-is-replaced-by-its-copy-under-io",
            "when an image is replaced by a copy of it while a write is in flight, everything written before is in the copy's \
             source and everything later in the copy",
            replaced,
        ),
    ]
}

const NONE: RequestFlags = RequestFlags::empty();

async fn names(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 512).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    let mut bench = bench
        .reopen_with(Options::new().with("node-name", "mine"))
        .await?;
    must(bench.node.name() == "mine", || {
        format!("it is called {}", bench.node.name())
    })?;
    let found = lab.graph.node("mine").map(|node| node.id());
    must(found == Some(bench.node.id()), || {
        "it isn't found by its name".into()
    })?;
    lab.create(&format.name, "second", 1 << 20, &format.create, None)
        .await?;
    let nodes = lab.graph.nodes().len();
    for name in [
        "mine",
        "",
        "1st",
        "a b",
        "#block1",
        "name-that-is-longer-than-thirty-one-bytes",
    ] {
        let options = Options::new().with("node-name", name);
        let opened = lab.open(&format.name, "second", None, &options).await;
        let Err(error) = opened else {
            return wrong(format!("a node could be called '{name}'"));
        };
        must(error.to_string().contains(name), || {
            format!("the refusal says {error}")
        })?;
        must(lab.graph.nodes().len() == nodes, || {
            format!("'{name}' left a node behind")
        })?;
    }
    // Names that are made up never collide.
    let other = lab
        .open(&format.name, "second", None, &Options::new())
        .await?;
    must(other.name() != bench.node.name(), || {
        "two nodes have one name".into()
    })?;
    lab.graph.release(&other).await?;
    bench.write(512, 512).await?;
    let bench = bench.reopen().await?;
    bench.finish().await
}

async fn in_use(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let graph = &scene.lab.graph;
    let second = scene.lab.attach(&bench.node, "second")?;
    graph.release(&bench.node).await?;
    bench.write(0, 512).await?;
    drop(second);
    graph.release(&bench.node).await?;
    bench.check_all("released, but in use").await?;
    // Its storage is in use by it.
    let storage = bench
        .node
        .edges()
        .primary()
        .map(|child| child.node().clone());
    if let Some(storage) = storage {
        graph.release(&storage).await?;
        bench.write(512, 512).await?;
        bench.handle.flush().await?;
    }
    bench.finish().await
}

async fn kept(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 4).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, "kept", 1 << 20, &format.create, None)
        .await?;
    let options = Options::new().with("node-name", "kept");
    let node = lab.open(&format.name, "kept", None, &options).await?;
    lab.graph.keep(&node);
    for byte in 1..3 {
        let handle = lab.graph.attach(&node, all_permissions(), "guest")?;
        handle.write(0, vec![byte; 512], NONE).await?;
        handle.close().await?;
        must(lab.graph.node("kept").is_some(), || {
            "it went with its handle".into()
        })?;
        lab.graph.collect(&node).await?;
        must(lab.graph.node("kept").is_some(), || {
            "it was collected".into()
        })?;
    }
    lab.graph.release(&node).await?;
    must(lab.graph.node("kept").is_none(), || {
        "it is still there".into()
    })?;
    bench.finish().await
}

async fn closed(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 4).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, "gone", 1 << 20, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "gone", None, &Options::new())
        .await?;
    lab.graph.release(&node).await?;
    match lab.graph.attach(&node, all_permissions(), "late") {
        Err(error) if error.kind() == ErrorKind::NoMedium => {}
        other => return wrong(format!("attaching to a closed node: {other:?}")),
    }
    // Released twice, it isn't closed twice.
    lab.graph.release(&node).await?;
    bench.finish().await
}

async fn loops(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let mut bench = bench.overlay(4).await?;
    let Some(base) = bench.node.backing() else {
        return not_covered("there is no backing file");
    };
    let graph = &scene.lab.graph;
    for (node, below) in [
        (&base, &bench.node),
        (&base, &base),
        (&bench.node, &bench.node),
    ] {
        let before = node.edges().iter().count();
        let result = graph.set_backing(node, Some(below)).await;
        must(result.is_err(), || "a loop was made".into())?;
        must(node.edges().iter().count() == before, || {
            "its edges have changed".into()
        })?;
    }
    bench.check_all("afterwards").await?;
    bench.write(100, 100).await?;
    drop(base);
    bench.finish().await
}

async fn frozen(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let bench = bench.overlay(4).await?;
    let Some(base) = bench.node.backing() else {
        return not_covered("there is no backing file");
    };
    let graph = &scene.lab.graph;
    graph.keep(&base);
    let first = graph.freeze_chain(&bench.node, None, "first")?;
    let second = graph.freeze_chain(&bench.node, Some(&base), "second")?;
    let refused = |result: block_core::Result<()>| match result {
        Err(error)
            if error.kind() == ErrorKind::NotPermitted && error.to_string().contains("frozen") =>
        {
            Ok(())
        }
        other => wrong(format!("a frozen edge: {other:?}")),
    };
    refused(graph.set_backing(&bench.node, None).await)?;
    drop(first);
    refused(graph.set_backing(&bench.node, None).await)?;
    bench.check_all("frozen").await?;
    drop(second);
    graph.set_backing(&bench.node, None).await?;
    graph.set_backing(&bench.node, Some(&base)).await?;
    graph.release(&base).await?;
    drop(base);
    bench.check_all("afterwards").await?;
    bench.finish().await
}

async fn claimed(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 4).await?;
    let graph = &scene.lab.graph;
    let claim = graph.claim_for_job(&bench.node, "job-a")?;
    match graph.claim_for_job(&bench.node, "job-b") {
        Err(error) if error.kind() == ErrorKind::Busy && error.to_string().contains("job-a") => {}
        other => return wrong(format!("a second job: {other:?}")),
    }
    drop(claim);
    drop(graph.claim_for_job(&bench.node, "job-b")?);
    bench.finish().await
}

async fn moved(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, "second", bench.size(), &format.create, None)
        .await?;
    let second = lab
        .open(&format.name, "second", None, &Options::new())
        .await?;
    let mover = lab.attach(&bench.node, "mover")?;
    let parked = bench.park_at(&mover, 512, 512).await?;
    let (graph, handle, to) = (lab.graph.clone(), mover.clone(), second.clone());
    let change = bench.start(async move { graph.move_handle(&handle, &to).await });
    scene.rest().await;
    must(
        !change.is_done() && mover.node().id() == bench.node.id(),
        || "it didn't wait".into(),
    )?;
    let handle = mover.clone();
    let later = bench.start(async move { handle.write(512, vec![3; 512], NONE).await });
    scene.rest().await;
    parked.land().await?;
    change.await?;
    later.await?;
    must(mover.node().id() == second.id(), || {
        "it hasn't moved".into()
    })?;
    let found = mover.read(512, 512).await?;
    crate::bench::same(&found, &[3; 512], 512, "the new image")?;
    bench.check_all("the old image").await?;
    drop(mover);
    lab.graph.release(&second).await?;
    bench.finish().await
}

async fn replaced(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let (lab, format) = (&scene.lab, &scene.format);
    let parked = bench.park(1024, 512).await?;
    let old = bench.model.clone();
    let other = lab.attach(&bench.node, "other")?;
    lab.disks.insert(Disk::new("copy", Content::default()));
    lab.create(&format.name, "copy", bench.size(), &format.create, None)
        .await?;
    let copy = lab
        .open(&format.name, "copy", None, &Options::new())
        .await?;
    let topped = bench.top(Probe::new())?;
    let (graph, from, to) = (lab.graph.clone(), bench.node.clone(), copy.clone());
    let change = bench.start(async move { graph.replace_node(&from, &to).await });
    scene.rest().await;
    must(!change.is_done(), || {
        "it didn't wait for a write in flight".into()
    })?;
    parked.land().await?;
    change.await?;
    // Both handles and the filter above are on the copy now.
    for handle in [&bench.handle, &other] {
        must(handle.node().id() == copy.id(), || {
            "a handle stayed behind".into()
        })?;
    }
    let below = topped
        .node
        .edges()
        .child(ChildRole::Filtered)
        .map(|child| child.node().id());
    must(below == Some(copy.id()), || {
        "the filter stayed behind".into()
    })?;
    other.write(0, vec![8; 512], NONE).await?;
    let found = topped.handle.read(0, 1024).await?;
    let mut expected = vec![8; 512];
    expected.extend([0; 512]);
    crate::bench::same(&found, &expected, 0, "the copy")?;
    let untouched = lab.attach(&bench.node, "old image")?;
    crate::bench::same(
        &untouched.read(0, old.len()).await?,
        &old,
        0,
        "the old image",
    )?;
    lab.graph.keep(&bench.node);
    drop((untouched, other));
    drop(topped.handle);
    lab.graph.release(&topped.node).await?;
    bench.handle.flush().await?;
    bench.handle = lab.attach(&bench.node, "guest")?;
    lab.graph.release(&copy).await?;
    must(lab.graph.nodes().len() == bench.own_nodes(), || {
        format!("left: {:?}", lab.graph.nodes())
    })?;
    bench.finish().await
}
