//! What is looked at after every case, whatever the case itself looked at: everything closes; each image that it left on
//! the simulated disks is checked by its driver, and, where the installed qemu-img knows the format, by qemu-img, which
//! also has to read the same content as we do; and nothing of the world is left in memory.
//!
//! It never judges an image that a case damaged on purpose ([`Case::leaves_damage`](crate::case::Case::leaves_damage),
//! [`Scene::leaves_damage`]), and accepts leaked clusters where a crash, a fault or a lost request may leave them.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Weak},
};

use block_core::{
    ErrorKind, Graph, Node, Options, Registry,
    driver::{Capabilities, DriverKind},
    flags::{PermissionSet, Permissions},
    image::{CheckMode, Progress, Severity},
    registry::{ImplicitOpens, OpenOptions},
};
use parking_lot::Mutex;

use crate::{
    case::{Failure, Group, Scene},
    external,
    lab::Lab,
    laid::Laid,
    storage::{Content, Disk},
};

/// Larger images aren't handed to qemu-img, in bytes of their file and of the disk that they show.
const MAX_EXTERNAL: u64 = 64 << 20;

/// Judges what a case left behind. The case's own future has ended.
pub(crate) async fn judge(scene: &Scene, group: Group, external: bool) -> Result<(), Failure> {
    let lab = &scene.lab;
    for disk in lab.disks.all() {
        disk.clear_rules();
    }
    let closed = lab.graph.close_all().await;
    if scene.is_damaged() || !scene.gate {
        return Ok(());
    }
    // After an injected fault an image may be unable to write back what it has: that's told when it is closed.
    if !may_lose(group) {
        closed.map_err(|error| Failure(format!("closing what the case left open: {error}")))?;
    }
    let still_open: Vec<Arc<Node>> = lab.graph.nodes();
    if let Some(node) = still_open.first() {
        let name = node.name();
        return Err(format!("node '{name}' can't be closed after the case").into());
    }
    for disk in lab.disks.all() {
        judge_disk(scene, &disk, group, external).await?;
    }
    Ok(())
}

/// What an image shows to our driver, which qemu-img has to agree with.
#[derive(Hash)]
enum Shown {
    Bytes(Vec<u8>),
    /// It refuses to be read, in these words.
    Refused(String),
}

const fn may_lose(group: Group) -> bool {
    matches!(
        group,
        Group::Crash | Group::Fault | Group::Cancel | Group::Hostile
    )
}

async fn judge_disk(
    scene: &Scene,
    disk: &Arc<Disk>,
    group: Group,
    external: bool,
) -> Result<(), Failure> {
    let (lab, format) = (&scene.lab, &scene.format.name);
    let content = disk.content();
    let mut head = vec![0; 2048.min(content.len() as usize)];
    content.read(0, &mut head);
    if probed(&lab.registry, &head, disk.name()) != Some(format.as_str()) {
        return Ok(());
    }
    let name = disk.name();
    let how = OpenOptions {
        implicit: ImplicitOpens::Permit,
        for_check: true,
        ..OpenOptions::default()
    };
    let read_only = || Options::new().with("read-only", true);
    let options = lab.options_for(format, name, None, &read_only());
    let open = |how| {
        lab.registry
            .open_file(&lab.graph, name, Some(format), options.clone(), how)
    };
    let (node, whole) = match open(how.clone()).await {
        Ok(node) => (node, true),
        // Its backing file may be something that only the case knew how to open.
        Err(error) => match open(OpenOptions {
            no_backing: true,
            ..how
        })
        .await
        {
            Ok(node) => (node, false),
            Err(_) => return Err(format!("image '{name}' can't be opened again: {error}").into()),
        },
    };
    let reads = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let handle = Arc::new(lab.graph.attach(&node, reads, "aftermath")?);
    if node.driver().capabilities().contains(Capabilities::CHECK) {
        let report = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
        let leaks_count = !may_lose(group);
        if report.corruptions + report.check_errors > 0 || (leaks_count && report.leaks > 0) {
            let found: Vec<&str> = report
                .findings
                .iter()
                .filter(|finding| finding.severity != Severity::Note)
                .map(|finding| finding.message.as_str())
                .take(4)
                .collect();
            let found = found.join("; ");
            return Err(format!("after the case, check of image '{name}': {found}").into());
        }
    }
    let small = content.len() <= MAX_EXTERNAL && handle.length() <= MAX_EXTERNAL;
    let shown = if external && small && external::knows(format) {
        match handle.read(0, handle.length() as usize).await {
            Ok(bytes) => Some(Shown::Bytes(bytes.to_vec())),
            // An overlay may say that what is below it isn't what it was made on, as a commit leaves it.
            Err(error) if error.kind() == ErrorKind::InvalidInput && node.backing().is_some() => {
                Some(Shown::Refused(error.to_string()))
            }
            Err(error) => return Err(error.into()),
        }
    } else {
        None
    };
    let backing = node.backing().is_some();
    drop(handle);
    lab.graph.release(&node).await?;
    match shown {
        Some(shown) => ask_qemu(lab, format, name, whole.then_some(&shown), backing),
        None => Ok(()),
    }
}

/// The format of an image, if there is one that the registry's drivers know by its first bytes.
fn probed(registry: &Registry, head: &[u8], name: &str) -> Option<&'static str> {
    registry
        .factories()
        .iter()
        .filter(|factory| factory.kind() == DriverKind::Format)
        .map(|factory| (factory.probe(head, name), factory.name()))
        .filter(|(score, _)| *score > 1)
        .max_by_key(|(score, _)| *score)
        .map(|(_, name)| name)
}

/// The second opinion. What was found clean once isn't asked about again: most cases leave some image that another case
/// has left before.
fn ask_qemu(
    lab: &Lab,
    format: &str,
    name: &str,
    shown: Option<&Shown>,
    backing: bool,
) -> Result<(), Failure> {
    static CLEAN: Mutex<Option<HashSet<u64>>> = Mutex::new(None);
    let named: Vec<(String, Content)> = lab
        .disks
        .all()
        .iter()
        .filter(|disk| disk.content().len() <= MAX_EXTERNAL)
        .filter(|disk| backing || disk.name() == name || !is_image(lab, disk))
        .map(|disk| (disk.name().to_owned(), disk.content()))
        .collect();
    if named.iter().any(|(name, _)| !external::is_plain_name(name)) {
        return Ok(());
    }
    let mut hasher = DefaultHasher::new();
    (format, name, shown).hash(&mut hasher);
    for (name, content) in &named {
        (name, content.all_bytes()).hash(&mut hasher);
    }
    let key = hasher.finish();
    if CLEAN
        .lock()
        .as_ref()
        .is_some_and(|clean| clean.contains(&key))
    {
        return Ok(());
    }
    let laid = Laid::new(lab, format)?;
    for (name, content) in &named {
        laid.put(name, content)?;
    }
    let after = |Failure(text)| Failure(format!("after the case, of '{name}': {text}"));
    // Leaks alone have been judged by our own check.
    laid.check(name, true).map_err(after)?;
    if let Some(Shown::Refused(why)) = shown {
        let into = laid.path("iotests-read.raw");
        let into = into.to_string_lossy();
        let image = laid.image(name);
        let mut arguments = image.arguments(&["convert", "-O", "raw"]);
        arguments.push(&into);
        let said = external::run("qemu-img", &arguments, "");
        let said = said.map_err(|error| Failure(format!("a temporary directory: {error}")))?;
        if said.is_some_and(|said| said.status == Some(0)) {
            return Err(
                format!("after the case, qemu-img reads '{name}', and we don't: {why}").into(),
            );
        }
    }
    if let Some(Shown::Bytes(shown)) = shown {
        laid.compare(name, shown).map_err(after)?;
    }
    CLEAN.lock().get_or_insert_default().insert(key);
    Ok(())
}

fn is_image(lab: &Lab, disk: &Arc<Disk>) -> bool {
    let content = disk.content();
    let mut head = vec![0; 2048.min(content.len() as usize)];
    content.read(0, &mut head);
    probed(&lab.registry, &head, disk.name()).is_some()
}

/// What has to be gone when a world is: held weakly while the world ends.
pub(crate) struct Leaks {
    graph: Weak<Graph>,
    nodes: Vec<(String, Weak<Node>)>,
    disks: Vec<(String, Weak<Disk>)>,
    scene: Weak<Scene>,
}

impl Leaks {
    /// Takes note of what there is.
    pub(crate) fn watch(scene: &Arc<Scene>) -> Self {
        let lab = &scene.lab;
        let mut nodes = lab.opened();
        for node in lab.graph.nodes() {
            nodes.push((node.name().to_owned(), Arc::downgrade(&node)));
        }
        Self {
            graph: Arc::downgrade(&lab.graph),
            nodes,
            disks: lab
                .disks
                .all()
                .iter()
                .map(|disk| (disk.name().to_owned(), Arc::downgrade(disk)))
                .collect(),
            scene: Arc::downgrade(scene),
        }
    }

    /// What is still there, in words. The world has been dropped.
    pub(crate) fn found(&self) -> Option<String> {
        if self.scene.strong_count() > 0 {
            return Some("leak: something of the case still holds its scene".into());
        }
        if let Some((name, _)) = self.nodes.iter().find(|(_, node)| node.strong_count() > 0) {
            return Some(format!(
                "leak: node '{name}' is still in memory after its world has ended"
            ));
        }
        if self.graph.strong_count() > 0 {
            return Some("leak: the graph is still in memory after its world has ended".into());
        }
        let disk = self.disks.iter().find(|(_, disk)| disk.strong_count() > 0);
        disk.map(|(name, _)| {
            format!("leak: storage '{name}' is still held after its world has ended")
        })
    }
}
