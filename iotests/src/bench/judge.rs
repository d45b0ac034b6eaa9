//! The end of a case: every byte, the driver's own check, the same again after opening anew, untouched backing files,
//! the alignment of every request to the storage, and the installed qemu-img's opinion on what is in the storage.

use std::{
    collections::{HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    sync::{Arc, OnceLock},
};

use block_core::{
    BlockHandle, Capabilities, Node,
    image::{CheckMode, Progress},
};
use parking_lot::Mutex;

use super::{
    Bench, Outcome,
    image::{Layer, open},
    is_zero, must, wrong,
};
use crate::{
    case::{Failure, Scene},
    external,
    laid::Laid,
    storage::{Disk, OpKind},
};

/// Fails when two buffers differ, with the first place.
pub fn same(found: &[u8], expected: &[u8], from: u64, what: &str) -> Outcome {
    if found == expected {
        return Ok(());
    }
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    match differs {
        None => wrong(format!(
            "{what}: {} bytes, not {}",
            found.len(),
            expected.len()
        )),
        Some(at) => wrong(format!(
            "{what}: at {:#x} there is {:#04x}, not {:#04x}",
            from + at as u64,
            found[at],
            expected[at]
        )),
    }
}

/// The driver's own check, if it has one.
pub(super) async fn own_check(node: &Arc<Node>, handle: &BlockHandle) -> Outcome {
    if !node.driver().capabilities().contains(Capabilities::CHECK) {
        return Ok(());
    }
    let report = handle.check(CheckMode::ReadOnly, Progress::new()).await?;
    let found: Vec<&str> = report.findings.iter().map(|f| f.message.as_str()).collect();
    must(report.is_clean(), || {
        format!("check isn't clean: {}", found.join("; "))
    })
}

impl Bench {
    /// What the installed qemu-img prints about the image as it is in the storage now. `None` when it can't be asked.
    pub fn ask_qemu(&self, command: &[&str]) -> Result<Option<String>, super::Stop> {
        let format = self.scene.format.name.as_str();
        if self.has_backing() && !self.scene.lab.records_backing(format) {
            return Ok(None);
        }
        let laid = lay(&self.scene, &self.disk, &self.layers)?;
        match laid.img(self.disk.name(), command)? {
            None => Ok(None),
            Some(said) if said.status == Some(0) => Ok(Some(said.text)),
            Some(said) => wrong(format!("qemu-img: {}", said.text)),
        }
    }

    /// The driver's own check, if it has one.
    pub async fn own_check(&self) -> Outcome {
        own_check(&self.node, &self.handle).await
    }

    /// Flushes and closes the image without judging its content.
    pub async fn close_only(self) -> Outcome {
        self.own_check().await?;
        self.close().await.map(drop)
    }

    /// What block status says of the whole disk is true: it covers every byte once, what it calls zero reads as zeroes, and
    /// where it says that bytes are in the storage, there they are.
    pub async fn truthful(&self) -> Outcome {
        let mut at = 0;
        while at < self.size() {
            let status = self.handle.block_status(at, self.size() - at).await?;
            must(status.len > 0 && status.len <= self.size() - at, || {
                format!("{} bytes of status at {at:#x}", status.len)
            })?;
            let bytes = &self.model[at as usize..(at + status.len) as usize];
            let zero = is_zero(bytes);
            must(zero || !status.is_zero(), || {
                format!(
                    "block status calls {:#x} bytes at {at:#x} zero, which they aren't",
                    status.len
                )
            })?;
            must(zero || status.is_data(), || {
                format!("block status says {:?} of data at {at:#x}", status.flags)
            })?;
            if status.is_data()
                && let Some((node, offset)) = &status.mapped
                && let Some(name) = node.filename()
            {
                let mut there = vec![0; status.len as usize];
                self.scene.lab.file(&name)?.read(*offset, &mut there);
                same(
                    &there,
                    bytes,
                    at,
                    "what is in the storage where block status says",
                )?;
            }
            at += status.len;
        }
        Ok(())
    }

    /// The driver's check finds nothing worse than leaks, which a power cut may leave behind.
    pub async fn only_leaks(&self) -> Outcome {
        if !self.capabilities().contains(Capabilities::CHECK) {
            return Ok(());
        }
        let report = self
            .handle
            .check(CheckMode::ReadOnly, Progress::new())
            .await?;
        must(report.corruptions + report.check_errors == 0, || {
            format!("check: {:?}", report.findings)
        })
    }

    /// The end of every case.
    pub async fn finish(self) -> Outcome {
        self.disk.clear_rules();
        self.check_all("at the end").await?;
        self.handle.flush().await?;
        own_check(&self.node, &self.handle).await?;
        self.check_alignment()?;
        let (scene, disk) = (self.scene.clone(), self.disk.clone());
        let (model, options) = (self.model.clone(), self.options.clone());
        let layers = self.close().await?;
        let node = open(&scene, &layers, &options).await?;
        let handle = scene.lab.attach(&node, "again")?;
        let found = handle.read(0, node.length() as usize).await?;
        same(&found, &model, 0, "after closing and opening again")?;
        drop((found, handle));
        scene.lab.graph.release(&node).await?;
        for layer in &layers {
            let now = scene.lab.disk(&layer.name)?.content();
            must(now.all_bytes() == layer.content.all_bytes(), || {
                format!("the backing file '{}' has changed", layer.name)
            })?;
        }
        ask_qemu(&scene, &disk, &layers, &model)
    }

    /// Every request that the storage got is aligned as it says that requests must be.
    fn check_alignment(&self) -> Outcome {
        let mut bottom = self.node.clone();
        while let Some(child) = bottom.edges().primary() {
            bottom = child.node().clone();
        }
        let align = bottom.limits().request_alignment.max(1);
        let aligned = |entry: &crate::storage::LogEntry| {
            let op = entry.op;
            matches!(op.kind, OpKind::Flush | OpKind::Truncate)
                || (op.offset.is_multiple_of(align) && op.len.is_multiple_of(align))
        };
        match self.disk.log().iter().find(|entry| !aligned(entry)) {
            None => Ok(()),
            Some(entry) => wrong(format!(
                "the storage got {}, its requests must be aligned to {align}",
                entry.op
            )),
        }
    }
}

/// Images that the installed qemu-img has judged already.
fn clean() -> &'static Mutex<HashSet<u64>> {
    static CLEAN: OnceLock<Mutex<HashSet<u64>>> = OnceLock::new();
    CLEAN.get_or_init(Mutex::default)
}

/// The disks of a case as files, for the installed tools.
fn lay<'a>(scene: &'a Scene, disk: &Disk, layers: &[Layer]) -> Result<Laid<'a>, Failure> {
    let laid = Laid::new(&scene.lab, &scene.format.name)?;
    laid.put(disk.name(), &disk.content())?;
    for layer in layers {
        laid.put(&layer.name, &scene.lab.disk(&layer.name)?.content())?;
    }
    Ok(laid)
}

/// What the installed qemu-img finds: clean, and the same content. An image that it has seen already isn't shown to it again.
fn ask_qemu(scene: &Scene, disk: &Disk, layers: &[Layer], model: &[u8]) -> Outcome {
    let format = scene.format.name.as_str();
    let content = disk.content();
    if format == "raw" {
        // What it could say of a raw image is plain to see.
        let content = content.to_bytes();
        return same(
            &content,
            &model[..content.len().min(model.len())],
            0,
            "the storage",
        );
    }
    // A backing file that the image doesn't name can't be found by others.
    let named = layers.is_empty() || scene.lab.records_backing(format);
    if !named || !external::knows(format) {
        return Ok(());
    }
    let mut hasher = DefaultHasher::new();
    (format, content.all_bytes(), model).hash(&mut hasher);
    for layer in layers {
        layer.content.all_bytes().hash(&mut hasher);
    }
    let key = hasher.finish();
    if clean().lock().contains(&key) {
        return Ok(());
    }
    let laid = lay(scene, disk, layers)?;
    laid.check(disk.name(), false)?;
    laid.compare(disk.name(), model)?;
    clean().lock().insert(key);
    Ok(())
}
