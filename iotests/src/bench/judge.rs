//! The end of a case: every byte, the driver's own check, the same again after opening anew, untouched backing files,
//! the alignment of every request to the storage, and the installed qemu-img's opinion on what is in the storage.

use std::{
    collections::{HashSet, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
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
    external::{Said, run},
    storage::{Content, Disk, OpKind},
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
        let laid = Laid::new(&self.scene, &self.disk, &self.layers)?;
        let mut arguments = command.to_vec();
        arguments.extend(["-f", format, laid.top.as_str()]);
        match qemu_img(format, &arguments)? {
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
                self.scene
                    .lab
                    .disk(&name)?
                    .content()
                    .read(*offset, &mut there);
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
            let now = scene.lab.disk(&layer.name)?.content().to_bytes();
            must(now == layer.content, || {
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

/// A directory that is removed when this is dropped.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> std::io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("iotests-{}-dir-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn join(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes a disk's content to a file, holes as holes.
fn put(path: &Path, content: &Content) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.set_len(content.len())?;
    let mut at = 0;
    while at < content.len() {
        let (data, len) = content.run(at, content.len() - at);
        if data {
            let mut bytes = vec![0; len as usize];
            content.read(at, &mut bytes);
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&bytes)?;
        }
        at += len;
    }
    Ok(())
}

/// Formats that the installed qemu-img doesn't know, and images that it has judged already.
#[derive(Default)]
struct Asked {
    unknown: HashSet<String>,
    clean: HashSet<u64>,
}

fn asked() -> &'static Mutex<Asked> {
    static ASKED: OnceLock<Mutex<Asked>> = OnceLock::new();
    ASKED.get_or_init(Mutex::default)
}

/// The disks of a case as files, with the topmost's path, for the installed tools.
struct Laid {
    dir: TempDir,
    top: String,
}

impl Laid {
    fn new(scene: &Scene, disk: &Disk, layers: &[Layer]) -> Result<Self, Failure> {
        let out = |error: std::io::Error| Failure(error.to_string());
        let dir = TempDir::new().map_err(out)?;
        put(&dir.0.join(disk.name()), &disk.content()).map_err(out)?;
        for layer in layers {
            let content = scene.lab.disk(&layer.name)?.content();
            put(&dir.0.join(&layer.name), &content).map_err(out)?;
        }
        let top = dir.join(disk.name());
        Ok(Self { dir, top })
    }
}

/// Runs qemu-img. `None` when it isn't installed or doesn't know the format.
fn qemu_img(format: &str, arguments: &[&str]) -> Result<Option<Said>, Failure> {
    if asked().lock().unknown.contains(format) {
        return Ok(None);
    }
    let said = run("qemu-img", arguments, "").map_err(|error| Failure(error.to_string()))?;
    match said {
        Some(said) if !said.text.contains("Unknown driver") => Ok(Some(said)),
        _ => {
            asked().lock().unknown.insert(format.to_owned());
            Ok(None)
        }
    }
}

/// What the installed qemu-img finds: clean, and the same content. An image that it has seen already isn't shown to it again.
fn ask_qemu(scene: &Scene, disk: &Disk, layers: &[Layer], model: &[u8]) -> Outcome {
    let format = scene.format.name.as_str();
    let content = disk.content().to_bytes();
    if format == "raw" {
        // What it could say of a raw image is plain to see.
        return same(
            &content,
            &model[..content.len().min(model.len())],
            0,
            "the storage",
        );
    }
    // A backing file that the image doesn't name can't be found by others.
    let named = layers.is_empty() || scene.lab.records_backing(format);
    if !named || asked().lock().unknown.contains(format) {
        return Ok(());
    }
    let mut hasher = DefaultHasher::new();
    (format, &content, model).hash(&mut hasher);
    for layer in layers {
        layer.content.hash(&mut hasher);
    }
    let key = hasher.finish();
    if asked().lock().clean.contains(&key) {
        return Ok(());
    }
    let laid = Laid::new(scene, disk, layers)?;
    let Some(check) = qemu_img(format, &["check", "-f", format, &laid.top])? else {
        return Ok(());
    };
    must(matches!(check.status, Some(0 | 63)), || {
        format!("qemu-img check: {}", check.text)
    })?;
    let raw = laid.dir.join("model");
    fs::write(&raw, model).map_err(|error| Failure(error.to_string()))?;
    let arguments = ["compare", "-f", format, "-F", "raw", &laid.top, &raw];
    if let Some(compare) = qemu_img(format, &arguments)? {
        must(compare.status == Some(0), || {
            format!("qemu-img compare: {}", compare.text)
        })?;
    }
    asked().lock().clean.insert(key);
    Ok(())
}
