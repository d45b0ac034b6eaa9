//! One disk of `blk live`: a chain of qcow2 overlays over the base image, its guest, its oracle, and the verdict on it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use block_core::{
    BlockHandle, Error, Graph, Node, OpenOptions, Options, PermissionSet, Permissions, Registry,
    Result,
    image::{CheckMode, CheckReport, Progress},
};
use serde_json::{Value, json};

use crate::common::open::follows_names;

use super::{
    guest::{Guest, Load, check},
    oracle::{Content, Frozen, Oracle, SECTOR},
};

/// How much is read at once when a disk is verified, in bytes.
const VERIFY_CHUNK: u64 = 1 << 20;

/// Where everything is.
#[derive(Clone)]
pub struct Lab {
    /// The graph that all disks are in.
    pub graph: Arc<Graph>,
    /// The drivers.
    pub registry: Arc<Registry>,
    /// The directory for all images but the base.
    pub scratch: PathBuf,
    /// The base image and its format.
    pub base: (PathBuf, String),
    /// Virtual size in bytes.
    pub size: u64,
    /// Cluster size of the overlays in bytes.
    pub cluster: u64,
}

/// A disk with a guest on it.
pub struct Disk {
    /// Its name in tables and reports.
    pub name: String,
    /// The guest's handle.
    pub handle: Arc<BlockHandle>,
    /// The guest.
    pub guest: Guest,
    /// What it must hold.
    pub oracle: Arc<Oracle>,
    base: Arc<BlockHandle>,
}

const READER: PermissionSet = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());

/// What a guest device uses and shares.
fn device() -> PermissionSet {
    PermissionSet::new(
        Permissions::CONSISTENT_READ | Permissions::WRITE,
        Permissions::all(),
    )
}

impl Lab {
    /// The path of an image of this run.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.qcow2"))
    }

    /// Makes an empty qcow2 image, over `backing` (file and format) if there is one.
    ///
    /// # Errors
    /// It can't be made.
    pub async fn create(&self, name: &str, backing: Option<(&Path, &str)>) -> Result<PathBuf> {
        let path = self.path(name);
        let mut options = Options::new()
            .with("size", self.size)
            .with("cluster_size", self.cluster);
        if let Some((file, format)) = backing {
            let file = std::path::absolute(file).map_err(Error::from)?;
            options.set("backing_file", text(&file));
            options.set("backing_fmt", format);
        }
        self.registry
            .create(&self.graph, "qcow2", &text(&path), options)
            .await?;
        Ok(path)
    }

    /// Opens an image with the chain that its header names.
    ///
    /// # Errors
    /// It can't be opened.
    pub async fn open(&self, path: &Path, format: &str, read_only: bool) -> Result<Arc<Node>> {
        let node = Options::new().with("read-only", read_only);
        self.registry
            .open_file(
                &self.graph,
                &text(path),
                Some(format),
                node,
                follows_names(),
            )
            .await
    }

    /// Opens the base image for reading.
    ///
    /// # Errors
    /// It can't be opened.
    pub async fn open_base(&self) -> Result<Arc<BlockHandle>> {
        let node = self.open(&self.base.0, &self.base.1, true).await?;
        Ok(Arc::new(self.graph.attach(&node, READER, "oracle")?))
    }

    /// A new image for a job to copy to, kept until it is released.
    ///
    /// # Errors
    /// It can't be made or opened.
    pub async fn target(&self, name: &str) -> Result<Arc<Node>> {
        let path = self.create(name, None).await?;
        let node = self.open(&path, "qcow2", false).await?;
        self.graph.keep(&node);
        Ok(node)
    }

    /// Makes a disk: `layers` overlays over the base image, topmost last, with a guest on the top.
    ///
    /// # Errors
    /// An image can't be made or opened.
    pub async fn disk(&self, name: &str, layers: usize, load: Load) -> Result<Disk> {
        let (mut below, mut format) = (self.base.0.clone(), self.base.1.clone());
        for layer in 0..layers {
            let made = self
                .create(&format!("{name}-{layer}"), Some((&below, &format)))
                .await?;
            (below, format) = (made, "qcow2".to_owned());
        }
        let top = self.open(&below, "qcow2", false).await?;
        let handle = Arc::new(self.graph.attach(&top, device(), name)?);
        let oracle = Arc::new(Oracle::new(self.size, load.seed));
        let base = self.open_base().await?;
        let guest = Guest::start(
            handle.clone(),
            base.clone(),
            oracle.clone(),
            self.graph.env(),
            load,
        );
        Ok(Disk {
            name: name.to_owned(),
            handle,
            guest,
            oracle,
            base,
        })
    }

    /// Runs check over an image that nobody has open.
    ///
    /// # Errors
    /// It can't be opened or checked.
    pub async fn check(&self, path: &Path) -> Result<CheckReport> {
        let how = OpenOptions {
            no_backing: true,
            for_check: true,
            ..follows_names()
        };
        let node = self
            .registry
            .open_file(
                &self.graph,
                &text(path),
                Some("qcow2"),
                Options::new().with("read-only", true),
                how,
            )
            .await?;
        let handle = self.graph.attach(&node, READER, "check")?;
        let report = handle.check(CheckMode::ReadOnly, Progress::new()).await;
        handle.close().await?;
        report
    }
}

/// A path as text; what isn't UTF-8 is replaced.
pub fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

impl Disk {
    /// Puts a new, empty overlay under the guest, as a snapshot does.
    ///
    /// # Errors
    /// It can't be made.
    pub async fn snapshot(&self, lab: &Lab, name: &str) -> Result<Arc<Node>> {
        let below = self.handle.node();
        let file = below.filename().unwrap_or_default();
        let path = lab.create(name, Some((Path::new(&file), "qcow2"))).await?;
        let options = Options(
            [
                ("driver".to_owned(), json!("qcow2")),
                ("backing".to_owned(), Value::from(below.name())),
                (
                    "file".to_owned(),
                    json!({"driver": "file", "filename": text(&path)}),
                ),
            ]
            .into_iter()
            .collect(),
        );
        let node = lab
            .registry
            .open(&lab.graph, options, follows_names())
            .await?;
        lab.graph.move_handle(&self.handle, &node).await?;
        Ok(node)
    }

    /// The layers, topmost first.
    pub fn layers(&self) -> Vec<Arc<Node>> {
        let top = self.handle.node().skip_filters();
        let mut layers = vec![top.clone()];
        layers.extend(top.chain());
        layers
    }

    /// Compares every byte of what `handle` reads with `frozen`.
    ///
    /// # Errors
    /// The first difference.
    pub async fn verify(
        &self,
        handle: &BlockHandle,
        frozen: &Frozen,
        what: &str,
    ) -> std::result::Result<u64, String> {
        verify(handle, frozen, self.oracle.seed(), &self.base)
            .await
            .map_err(|text| format!("{what}: {text}"))
    }

    /// Compares what an image holds that nobody has open.
    ///
    /// # Errors
    /// It can't be opened, or the first difference.
    pub async fn verify_file(
        &self,
        lab: &Lab,
        path: &Path,
        frozen: &Frozen,
    ) -> std::result::Result<u64, String> {
        let what = text(path);
        let failed = |error: Error| format!("{what}: {error}");
        let node = lab.open(path, "qcow2", true).await.map_err(failed)?;
        let handle = lab.graph.attach(&node, READER, "verify").map_err(failed)?;
        let result = self.verify(&handle, frozen, &what).await;
        handle.close().await.map_err(failed)?;
        result
    }

    /// Ends the guest, compares the whole disk with the oracle, closes it, and compares it again as it is on the disk.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub async fn finish(self, lab: &Lab) -> std::result::Result<Verdict, String> {
        self.guest.stop().await;
        if let Some(failure) = self.guest.failure() {
            return Err(format!("disk {}: {failure}", self.name));
        }
        let frozen = self.oracle.freeze();
        let name = format!("disk {}", self.name);
        let mut verified = self.verify(&self.handle, &frozen, &name).await?;
        let top = self.handle.node().filename().unwrap_or_default();
        self.handle
            .flush()
            .await
            .map_err(|error| format!("{name}: {error}"))?;
        let Self {
            handle,
            guest,
            oracle,
            base,
            ..
        } = self;
        drop(guest);
        match Arc::try_unwrap(handle) {
            Ok(handle) => handle
                .close()
                .await
                .map_err(|error| format!("{name}: {error}"))?,
            Err(_) => return Err(format!("{name}: the guest still has a request in flight")),
        }
        // As somebody would find it who opens it tomorrow.
        let node = lab
            .open(Path::new(&top), "qcow2", true)
            .await
            .map_err(|error| format!("{name}: {error}"))?;
        let handle = lab
            .graph
            .attach(&node, READER, "verify")
            .map_err(|error| format!("{name}: {error}"))?;
        verified += verify(&handle, &frozen, oracle.seed(), &base)
            .await
            .map_err(|text| format!("{name} after it was closed: {text}"))?;
        handle
            .close()
            .await
            .map_err(|error| format!("{name}: {error}"))?;
        if let Ok(base) = Arc::try_unwrap(base) {
            base.close()
                .await
                .map_err(|error| format!("the base image: {error}"))?;
        }
        Ok(Verdict { verified })
    }
}

/// What was found to be right.
#[derive(Debug, Clone, Copy)]
pub struct Verdict {
    /// Bytes compared.
    pub verified: u64,
}

async fn verify(
    handle: &BlockHandle,
    frozen: &Frozen,
    seed: u64,
    base: &BlockHandle,
) -> std::result::Result<u64, String> {
    let length = frozen.sectors() * SECTOR;
    if handle.length() != length {
        return Err(format!(
            "it is {} bytes long, not {length}",
            handle.length()
        ));
    }
    let mut at = 0;
    while at < length {
        let step = (length - at).min(VERIFY_CHUNK);
        let data = handle
            .read(at, step as usize)
            .await
            .map_err(|error| format!("read failed: {error}"))?;
        let start = at / SECTOR;
        let content = |index: u64| -> Content { frozen.content(start + index) };
        check(&data, start, seed, content, base).await?;
        at += step;
    }
    Ok(length)
}
