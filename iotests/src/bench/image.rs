//! An image, the backing files below it, and the model of what a guest sees. One request at a time; the model follows each.

use std::sync::Arc;

use block_core::{
    BlockHandle, Buffer, Capabilities, ChildRole, ErrorKind, Node, NodeSpec, Options, RequestFlags,
    driver::Truncate,
    flags::{PermissionSet, Permissions},
    options::NodeOptions,
    registry::{ImplicitOpens, OpenOptions},
};

use super::{Outcome, Probe, Stop, Topped, is_zero, must, not_covered, pattern, same, wrong};
use crate::{
    case::{Failure, Scene},
    cases::cluster_size,
    lab::after_discard,
    oracle::AfterDiscard,
    pattern::{Stamp, stamped},
    sim::Running,
    storage::{Choose, Content, Disk, Hold, Stage},
};
use serde_json::{Value, json};

/// A backing file, as it has to stay.
pub(super) struct Layer {
    pub name: String,
    pub content: Content,
}

/// An image in the middle of a case.
pub struct Bench {
    /// The world.
    pub scene: Arc<Scene>,
    /// The image's node.
    pub node: Arc<Node>,
    /// The producer that the methods use.
    pub handle: Arc<BlockHandle>,
    /// The image's storage.
    pub disk: Arc<Disk>,
    /// Bytes of a cluster as the cases use it, at least 4096.
    pub cluster: u64,
    /// What a guest sees.
    pub model: Vec<u8>,
    /// What may show through where nothing is allocated.
    pub(super) below: Vec<u8>,
    pub(super) layers: Vec<Layer>,
    pub(super) options: Options,
    seq: u64,
}

/// The file name of the layer at `depth` from the bottom.
fn layer_name(depth: usize) -> String {
    format!("disk{depth}")
}

impl Bench {
    /// A new image of `clusters` clusters.
    pub async fn new(scene: &Arc<Scene>, clusters: u64) -> Result<Self, Stop> {
        Self::with_size(scene, |cluster| clusters * cluster).await
    }

    /// A new image whose size depends on its cluster size.
    pub async fn with_size(
        scene: &Arc<Scene>,
        size: impl FnOnce(u64) -> u64 + Send,
    ) -> Result<Self, Stop> {
        let lab = &scene.lab;
        let format = &scene.format;
        lab.create(&format.name, "probe", 1 << 20, &format.create, None)
            .await?;
        let node = lab
            .open(&format.name, "probe", None, &Options::new())
            .await?;
        let cluster = cluster_size(&lab.attach(&node, "probe")?).await?;
        let writable = node.driver().capabilities().contains(Capabilities::WRITE);
        lab.graph.release(&node).await?;
        if !writable {
            return not_covered("the driver has no write");
        }
        Self::make(scene, cluster, size(cluster), Vec::new(), Vec::new()).await
    }

    async fn make(
        scene: &Arc<Scene>,
        cluster: u64,
        size: u64,
        layers: Vec<Layer>,
        mut below: Vec<u8>,
    ) -> Result<Self, Stop> {
        let (lab, format) = (&scene.lab, &scene.format);
        let name = layer_name(layers.len());
        let base = layers.last().map(|layer| layer.name.clone());
        let backing = base.as_deref().map(|base| (base, format.name.as_str()));
        lab.create(&format.name, &name, size, &format.create, backing)
            .await?;
        let node = open(scene, &layers, &Options::new()).await?;
        // Storage with an alignment may round it up.
        below.resize(node.length() as usize, 0);
        Ok(Self {
            scene: scene.clone(),
            handle: lab.attach(&node, "guest")?,
            disk: lab.disk(&name)?,
            node,
            cluster,
            model: below.clone(),
            below,
            layers,
            options: Options::new(),
            seq: 0,
        })
    }

    /// A node of a case's own, without a model of its bytes.
    pub fn bare(
        scene: &Arc<Scene>,
        node: Arc<Node>,
        handle: Arc<BlockHandle>,
        cluster: u64,
    ) -> Result<Self, Stop> {
        Ok(Self {
            disk: scene.lab.disk(&node.filename().unwrap_or_default())?,
            scene: scene.clone(),
            node,
            handle,
            cluster,
            model: Vec::new(),
            below: Vec::new(),
            layers: Vec::new(),
            options: Options::new(),
            seq: 0,
        })
    }

    /// An empty overlay of `clusters` clusters over this image, which is closed and only read from here on.
    pub async fn overlay(self, clusters: u64) -> Result<Self, Stop> {
        let size = clusters * self.cluster;
        self.overlay_of(size).await
    }

    /// The same with a size in bytes.
    pub async fn overlay_of(self, size: u64) -> Result<Self, Stop> {
        self.needs(Capabilities::BACKING)?;
        let (scene, cluster, model) = (self.scene.clone(), self.cluster, self.model.clone());
        let name = layer_name(self.layers.len());
        let disk = self.disk.clone();
        let mut layers = self.close().await?;
        layers.push(Layer {
            name,
            content: disk.content(),
        });
        Self::make(&scene, cluster, size, layers, model).await
    }

    /// Flushes and closes the image without judging it.
    pub(super) async fn close(self) -> Result<Vec<Layer>, Stop> {
        let Self {
            scene,
            node,
            handle,
            layers,
            ..
        } = self;
        handle.flush().await?;
        drop(handle);
        let name = node.name().to_owned();
        scene.lab.graph.release(&node).await?;
        must(scene.lab.graph.node(&name).is_none(), || {
            format!("node '{name}' is still in use at the end of the case")
        })?;
        Ok(layers)
    }

    /// Closes the image and opens it again, with `options` from here on.
    pub async fn reopen_with(self, options: Options) -> Result<Self, Stop> {
        self.again(options, None).await
    }

    /// The same, closed by `closer`, which is the last to hold it.
    pub async fn closed_by(self, closer: BlockHandle) -> Result<Self, Stop> {
        let (scene, cluster, seq) = (self.scene.clone(), self.cluster, self.seq);
        let Self {
            node,
            handle,
            disk,
            model,
            below,
            layers,
            options,
            ..
        } = self;
        drop((handle, node));
        closer.close().await?;
        let node = open(&scene, &layers, &options).await?;
        Ok(Self {
            handle: scene.lab.attach(&node, "guest")?,
            scene,
            node,
            disk,
            cluster,
            model,
            below,
            layers,
            options,
            seq,
        })
    }

    /// Closes the image and opens it again as it was opened before.
    pub async fn reopen(self) -> Result<Self, Stop> {
        let options = self.options.clone();
        self.reopen_with(options).await
    }

    /// The same image with another content of its storage (after a power cut). The image is closed first.
    pub async fn restored(self, content: Content) -> Result<Self, Stop> {
        let options = self.options.clone();
        self.again(options, Some(content)).await
    }

    async fn again(self, options: Options, content: Option<Content>) -> Result<Self, Stop> {
        let (scene, cluster, seq) = (self.scene.clone(), self.cluster, self.seq);
        let (model, below) = (self.model.clone(), self.below.clone());
        let disk = self.disk.clone();
        let layers = self.close().await?;
        if let Some(content) = content {
            disk.restore(content);
        }
        let node = open(&scene, &layers, &options).await?;
        Ok(Self {
            handle: scene.lab.attach(&node, "guest")?,
            scene,
            node,
            disk,
            cluster,
            model,
            below,
            layers,
            options,
            seq,
        })
    }

    /// Closes the image and opens it again with a probe between it and the storage of its data.
    pub async fn over(self, probe: &Arc<Probe>) -> Result<Self, Stop> {
        let (scene, cluster, seq) = (self.scene.clone(), self.cluster, self.seq);
        let (model, below) = (self.model.clone(), self.below.clone());
        let disk = self.disk.clone();
        if self.has_backing() {
            return wrong("a probe below is for images without a backing file");
        }
        self.close().await?;
        let lab = &scene.lab;
        let data = lab.data_file(disk.name());
        let data = data.filter(|_| disk.content().beside_len().is_some());
        let storage = Options::new()
            .with("driver", "file")
            .with("filename", data.as_deref().unwrap_or(disk.name()));
        let how = OpenOptions {
            implicit: ImplicitOpens::Permit,
            ..OpenOptions::default()
        };
        let file = lab.registry.open(&lab.graph, storage, how.clone()).await?;
        let spec = NodeSpec::new(probe.clone()).named("below");
        lab.graph
            .add_node(spec.with_child(ChildRole::Filtered, "file", &file))?;
        let format = scene.format.name.as_str();
        let mut image = lab
            .options_for(format, disk.name(), None, &Options::new())
            .with("driver", format)
            .with("file", "below");
        if data.is_some() {
            image.set("data-file", "below");
            image.set("file", json!({ "driver": "file", "filename": disk.name() }));
        }
        let node = lab.registry.open(&lab.graph, image, how).await?;
        Ok(Self {
            handle: lab.attach(&node, "guest")?,
            scene,
            node,
            disk,
            cluster,
            model,
            below,
            layers: Vec::new(),
            options: Options::new(),
            seq,
        })
    }

    /// A probe above the image, with a handle on it. It has to be taken off again ([`Self::take_off`]).
    pub fn top(&self, probe: Probe) -> Result<Topped, Stop> {
        self.top_with(probe, &[])
    }

    /// The same with options of the probe's node.
    pub fn top_with(&self, probe: Probe, options: &[(&str, &str)]) -> Result<Topped, Stop> {
        let graph = &self.scene.lab.graph;
        let probe = Arc::new(probe);
        let mut spec =
            NodeSpec::new(probe.clone()).with_child(ChildRole::Filtered, "file", &self.node);
        let mut given = Options::new();
        for (key, value) in options {
            given.set(key, *value);
        }
        spec.options = NodeOptions::take(&mut given, &NodeOptions::default())?;
        let node = graph.add_node(spec)?;
        let handle = self.scene.lab.attach(&node, "above the probe")?;
        Ok(Topped {
            probe,
            node,
            handle,
        })
    }

    /// From here on the methods work through a probe above the image.
    pub fn through(&mut self, probe: Probe) -> Result<Topped, Stop> {
        self.through_with(probe, &[])
    }

    /// The same with options of the probe's node.
    pub fn through_with(&mut self, probe: Probe, options: &[(&str, &str)]) -> Result<Topped, Stop> {
        let topped = self.top_with(probe, options)?;
        self.handle = topped.handle.clone();
        Ok(topped)
    }

    /// Ends that: the methods work on the image itself, and the probe's node goes.
    pub async fn take_off(&mut self, topped: Topped) -> Outcome {
        let Topped { node, handle, .. } = topped;
        handle.flush().await?;
        self.handle = self.scene.lab.attach(&self.node, "guest")?;
        drop(handle);
        self.scene.lab.graph.release(&node).await?;
        Ok(())
    }

    /// Another producer, with these permissions.
    pub fn attach(
        &self,
        used: Permissions,
        shared: Permissions,
        name: &str,
    ) -> block_core::Result<BlockHandle> {
        let set = PermissionSet::new(used, shared);
        self.scene.lab.graph.attach(&self.node, set, name)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.model.len() as u64
    }

    /// What the image's driver can do.
    pub fn capabilities(&self) -> Capabilities {
        self.node.driver().capabilities()
    }

    /// Ends the case unless the driver has all of them.
    pub fn needs(&self, wanted: Capabilities) -> Outcome {
        let missing = wanted - self.capabilities();
        if missing.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = missing
            .iter_names()
            .map(|(name, _)| name.to_lowercase())
            .collect();
        not_covered(format!("the driver has no {}", names.join(", ")))
    }

    /// Whether a discarded cluster reads as zeroes.
    pub fn discard_zeroes(&self) -> bool {
        after_discard(&self.node) == AfterDiscard::Zeroes
    }

    /// How many nodes an image without a backing file is made of: its own, and its storage.
    pub fn own_nodes(&self) -> usize {
        let edges = self.node.edges();
        let below = edges
            .into_iter()
            .filter(|edge| edge.role != ChildRole::Backing);
        1 + below.count()
    }

    /// Whether there is a backing file.
    pub fn has_backing(&self) -> bool {
        !self.layers.is_empty()
    }

    /// The disk has this length now; what is new reads as zeroes.
    pub fn resized(&mut self, length: u64) {
        self.model.resize(length as usize, 0);
        self.below.resize(length as usize, 0);
    }

    /// Tells the model that these bytes are there now.
    pub fn expect(&mut self, offset: u64, bytes: &[u8]) {
        self.model[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// The next write's data.
    pub fn data(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.seq += 1;
        pattern(self.seq + 1000 * self.layers.len() as u64, offset, len)
    }

    /// Writes new data.
    pub async fn write(&mut self, offset: u64, len: u64) -> Outcome {
        self.write_with(offset, len, RequestFlags::empty()).await
    }

    /// Writes new data with flags.
    pub async fn write_with(&mut self, offset: u64, len: u64, flags: RequestFlags) -> Outcome {
        let data = self.data(offset, len);
        self.handle.write(offset, data.clone(), flags).await?;
        self.expect(offset, &data);
        Ok(())
    }

    /// Writes zeroes.
    pub async fn zero(&mut self, offset: u64, len: u64, flags: RequestFlags) -> Outcome {
        self.handle.write_zeroes(offset, len, flags).await?;
        self.model[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }

    /// Discards, and has the model follow what came of it, as far as it is allowed: clusters that the range covers wholly
    /// read as zeroes if the driver says so; every other byte is zero, what it was, or what is below.
    pub async fn discard(&mut self, offset: u64, len: u64) -> Outcome {
        self.handle.discard(offset, len).await?;
        self.adopt_discard(offset, len).await
    }

    /// The second half of [`Self::discard`].
    pub async fn adopt_discard(&mut self, offset: u64, len: u64) -> Outcome {
        let now = self.handle.read(offset, len as usize).await?;
        let (end, size) = (offset + len, self.size());
        let whole = offset.next_multiple_of(self.cluster)..if end == size {
            end
        } else {
            end - end % self.cluster
        };
        let zeroes = self.discard_zeroes();
        if is_zero(&now) {
            // That is always allowed.
            self.model[offset as usize..end as usize].fill(0);
            return Ok(());
        }
        for (at, byte) in (offset..end).zip(now.iter()) {
            let old = self.model[at as usize];
            let allowed = if zeroes && whole.contains(&at) {
                *byte == 0
            } else {
                *byte == 0 || *byte == old || *byte == self.below[at as usize]
            };
            if !allowed {
                return wrong(format!(
                    "after a discard there is {byte:#04x} at {at:#x}, was {old:#04x}"
                ));
            }
            self.model[at as usize] = *byte;
        }
        Ok(())
    }

    /// Changes the size; what is new reads as zeroes. Ends the case where the driver can't.
    pub async fn truncate(&mut self, length: u64) -> Outcome {
        self.needs(Capabilities::TRUNCATE)?;
        match self.handle.truncate(length, Truncate::default()).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                return not_covered("the driver can't change the size like that");
            }
            other => other?,
        }
        self.resized(length);
        Ok(())
    }

    /// What is there is what the model says.
    pub async fn check_range(&self, offset: u64, len: u64, what: &str) -> Outcome {
        let found = self.handle.read(offset, len as usize).await?;
        let expected = &self.model[offset as usize..(offset + len) as usize];
        same(&found, expected, offset, what)
    }

    /// The same for the whole disk.
    pub async fn check_all(&self, what: &str) -> Outcome {
        must(self.handle.length() == self.size(), || {
            format!(
                "{what}: {} bytes, not {}",
                self.handle.length(),
                self.size()
            )
        })?;
        self.check_range(0, self.size(), what).await
    }

    /// Starts a write that stops at the storage, before it takes effect there. The range is made of whole sectors.
    pub async fn park(&mut self, offset: u64, len: u64) -> Result<Parked, Stop> {
        let handle = self.handle.clone();
        self.park_at(&handle, offset, len).await
    }

    /// The same through another handle.
    pub async fn park_at(
        &mut self,
        handle: &Arc<BlockHandle>,
        offset: u64,
        len: u64,
    ) -> Result<Parked, Stop> {
        self.seq += 1;
        let owner = 7000 + self.seq as u32;
        let data = stamped(owner, self.seq, offset, len);
        self.expect(offset, &data);
        let needle = Stamp::needle(owner);
        let choose = Choose::writes().containing(&needle);
        let hold = self.disk.hold(choose, Stage::Before);
        let handle = handle.clone();
        let running = self.start(async move {
            handle
                .write(offset, data, RequestFlags::empty())
                .await
                .map(|()| Buffer::new(0))
        });
        self.scene.rest().await;
        if hold.waiting().is_empty() {
            return wrong("a write never reached the storage");
        }
        Ok(Parked { hold, running })
    }

    /// Starts a request beside the case's own thread.
    pub fn start<T: Send + 'static>(
        &self,
        request: impl Future<Output = T> + Send + 'static,
    ) -> Running<T> {
        self.scene.lab.env.start(request)
    }
}

/// Opens the topmost image over `layers`. A format that doesn't record its backing file is told all of them.
pub(super) async fn open(
    scene: &Arc<Scene>,
    layers: &[Layer],
    options: &Options,
) -> Result<Arc<Node>, Failure> {
    let format = scene.format.name.as_str();
    let mut options = options.clone();
    if !scene.lab.records_backing(format) {
        let mut below = None;
        for layer in layers {
            let file = Options::new()
                .with("driver", "file")
                .with("filename", layer.name.as_str());
            let mut image = Options::new()
                .with("driver", format)
                .with("file", Value::Object(file.0));
            if let Some(below) = below {
                image.set("backing", below);
            }
            below = Some(Value::Object(image.0));
        }
        if let Some(below) = below {
            options.set("backing", below);
        }
    }
    let name = layer_name(layers.len());
    Ok(scene.lab.open(format, &name, None, &options).await?)
}

/// A write that waits at the storage.
pub struct Parked {
    hold: Hold,
    running: Running<block_core::Result<Buffer>>,
}

impl Parked {
    /// Lets it go, and waits for its end.
    pub async fn land(self) -> Outcome {
        self.hold.release();
        self.running.await?;
        Ok(())
    }

    /// Whether it still waits at the storage.
    pub fn is_waiting(&self) -> bool {
        !self.running.is_done() && !self.hold.waiting().is_empty()
    }
}
