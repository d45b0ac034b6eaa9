//! Images that name others: themselves, each other, what isn't there, what isn't a file, and more than anybody can open.

use std::sync::Arc;

use block_core::{Capabilities, Options};

use super::victim::IMAGE;
use crate::{
    case::{Case, CaseResult, Failure, Group, Scene, Verdict},
    stack::{lacks, probe, writer},
    storage::Disk,
};

pub(super) fn cases() -> Vec<Case> {
    let hostile = Group::Hostile;
    vec![
        Case::new(
            hostile,
            "hostile-image-that-backs-itself",
            "an image that names itself, or whose backing file names it, is refused by name and leaves no node",
            loops,
        ),
        Case::new(
            hostile,
            "hostile-backing-files-that-are-no-files",
            "names of backing files that are missing, empty of sense, protocols or JSON are refused by name, and nothing \
             else than a file of that name is looked for",
            strange_names,
        ),
        Case::new(
            hostile,
            "hostile-chain-without-end",
            "a chain that is longer than can be opened is refused, and leaves no node",
            deep,
        ),
    ]
}

/// An empty image of that name whose header names that backing file.
async fn naming(scene: &Arc<Scene>, file: &str, backing: &str) -> Result<(), Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    lab.create(&format.name, file, 1 << 20, &format.create, None)
        .await?;
    let node = lab.open(&format.name, file, None, &Options::new()).await?;
    let handle = writer(&lab.graph, &node, "maker")?;
    handle
        .change_backing(Some(backing), Some(&format.name))
        .await?;
    drop(handle);
    lab.graph.release(&node).await?;
    Ok(())
}

async fn can(scene: &Arc<Scene>) -> Result<Option<Verdict>, Failure> {
    let (capabilities, _) = probe(scene).await?;
    let needs = Capabilities::BACKING | Capabilities::CHANGE_BACKING;
    Ok(lacks(capabilities, needs))
}

/// Opening the image is refused with an error that names `names`.
async fn refused(scene: &Arc<Scene>, file: &str, names: &str) -> Result<(), Failure> {
    let (lab, format) = (&scene.lab, &scene.format);
    let opened = lab.open(&format.name, file, None, &Options::new()).await;
    match opened {
        Ok(node) => {
            lab.graph.release(&node).await?;
            Err(format!("'{file}', which names '{names}', was opened").into())
        }
        Err(error) => {
            let text = error.to_string();
            if !text.contains(names) && !text.contains(file) {
                return Err(format!("the error names no file: {text}").into());
            }
            match lab.graph.nodes().first() {
                Some(node) => Err(format!("'{}' is left ({text})", node.name()).into()),
                None => Ok(()),
            }
        }
    }
}

async fn loops(scene: Arc<Scene>) -> CaseResult {
    if let Some(verdict) = can(&scene).await? {
        return Ok(verdict);
    }
    naming(&scene, IMAGE, IMAGE).await?;
    refused(&scene, IMAGE, IMAGE).await?;
    naming(&scene, "one", "two").await?;
    naming(&scene, "two", "three").await?;
    naming(&scene, "three", "one").await?;
    for file in ["one", "two", "three"] {
        refused(&scene, file, "one").await?;
    }
    Ok(Verdict::Passed)
}

async fn strange_names(scene: Arc<Scene>) -> CaseResult {
    if let Some(verdict) = can(&scene).await? {
        return Ok(verdict);
    }
    let long = "x".repeat(1000);
    let names = [
        "missing",
        "json:{\"driver\":\"file\",\"filename\":\"probe\"}",
        "nbd://localhost/disk",
        "../../../etc/passwd",
        "/dev/zero",
        " ",
        "probe\u{7f}\u{1}",
        &long,
    ];
    let mut tried = 0;
    for name in names {
        // The driver may refuse to write it down.
        if naming(&scene, IMAGE, name).await.is_err() {
            scene.lab.graph.close_all().await?;
            continue;
        }
        tried += 1;
        refused(&scene, IMAGE, name).await?;
    }
    if tried == 0 {
        return Ok(Verdict::Inconclusive("no name was written down".into()));
    }
    // A backing file of another format than the one that is named.
    naming(&scene, IMAGE, "garbage").await?;
    let noise: Vec<u8> = (0..8192_u32).map(|n| (n * 7 + 3) as u8).collect();
    let content = crate::storage::Content::from_bytes(&noise);
    scene.lab.disks.insert(Disk::new("garbage", content));
    refused(&scene, IMAGE, "garbage").await?;
    Ok(Verdict::Passed)
}

async fn deep(scene: Arc<Scene>) -> CaseResult {
    if let Some(verdict) = can(&scene).await? {
        return Ok(verdict);
    }
    let count = block_core::Registry::MAX_DEPTH + 4;
    naming(&scene, "deep0", "deep1").await?;
    for n in 1..count {
        naming(&scene, &format!("deep{n}"), &format!("deep{}", n + 1)).await?;
    }
    let format = &scene.format;
    let last = format!("deep{count}");
    scene
        .lab
        .create(&format.name, &last, 1 << 20, &format.create, None)
        .await?;
    refused(&scene, "deep0", "deep").await?;
    // A part of it that isn't too long can be opened and read through.
    let short = format!("deep{}", count - 10);
    let node = scene
        .lab
        .open(&format.name, &short, None, &Options::new())
        .await?;
    let shown = crate::stack::content(&scene.lab.graph, &node).await?;
    if shown.iter().any(|byte| *byte != 0) {
        return Err("an empty chain shows something".into());
    }
    drop(shown);
    scene.lab.graph.release(&node).await?;
    match scene.lab.graph.nodes().first() {
        Some(node) => Err(format!("'{}' is left", node.name()).into()),
        None => Ok(Verdict::Passed),
    }
}
