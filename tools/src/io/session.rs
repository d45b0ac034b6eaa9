//! What a qemu-io session has open: one image, its handle, and the requests that run beside the command line.

use std::{cell::RefCell, future::Future, path::PathBuf, pin::Pin, sync::Arc, task::Poll};

use block_core::{
    BlockHandle, Error, Graph, Node, OpenOptions, Options, PermissionSet, Permissions, Registry,
    Result,
};
use futures::{StreamExt, stream::FuturesUnordered};

use crate::common::open::{follows_names, warn_of_empty_backing, warn_of_probed_raw};

/// How an image is to be opened.
#[derive(Debug, Clone, Default)]
pub struct OpenHow {
    /// The format, or none to probe.
    pub format: Option<String>,
    /// The name is a string of options.
    pub image_opts: bool,
    /// Read-only.
    pub read_only: bool,
    /// Copy what comes from backing files into the image.
    pub copy_on_read: bool,
    /// Share the image with everybody.
    pub force_share: bool,
    /// What is written goes to a temporary file that nobody sees again.
    pub snapshot: bool,
    /// Cache mode.
    pub cache: Option<String>,
    /// `ignore` or `unmap`.
    pub discard: Option<String>,
    /// `threads`, `native` or `io_uring`.
    pub aio: Option<String>,
    /// Options of the driver.
    pub options: Vec<String>,
}

/// An image that is open.
pub struct Image {
    /// The guest's handle.
    pub handle: Arc<BlockHandle>,
    /// It was opened read-only.
    pub read_only: bool,
    /// Every write is flushed.
    pub write_through: bool,
    /// Reads copy into the image.
    pub copy_on_read: bool,
}

type Background = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The state between commands.
pub struct Session {
    graph: Arc<Graph>,
    registry: Arc<Registry>,
    qemu: Option<&'static str>,
    /// The image, if one is open.
    pub image: Option<Image>,
    /// Requests of `aio_read` and `aio_write`; they take their tickets in the order of the commands and are polled
    /// whenever the session waits for anything.
    background: RefCell<FuturesUnordered<Background>>,
}

/// Splits a cache mode into (direct, no-flush, write-through).
///
/// # Errors
/// An unknown mode.
pub fn cache_mode(mode: &str) -> Result<(bool, bool, bool)> {
    match mode {
        "none" | "off" => Ok((true, false, false)),
        "directsync" => Ok((true, false, true)),
        "writeback" => Ok((false, false, false)),
        "unsafe" => Ok((false, true, false)),
        "writethrough" => Ok((false, false, true)),
        _ => Err(Error::invalid(format!("Invalid cache option: {mode}"))),
    }
}

impl OpenHow {
    /// Refuses modes that there aren't.
    ///
    /// # Errors
    /// The mode's name.
    pub fn check(&self) -> Result<()> {
        self.cache.as_deref().map(cache_mode).transpose()?;
        self.discard.as_deref().map(discard_mode).transpose()?;
        self.aio.as_deref().map(aio_engine).transpose()?;
        Ok(())
    }
}

impl Session {
    /// Nothing is open. `qemu` is the program's name if it is one of qemu's.
    pub fn new(graph: Arc<Graph>, registry: Arc<Registry>, qemu: Option<&'static str>) -> Self {
        Self {
            graph,
            registry,
            qemu,
            image: None,
            background: RefCell::default(),
        }
    }

    /// Opens an image. Options may stand in the place of a name.
    ///
    /// # Errors
    /// What the drivers report; the reason names the file.
    pub async fn open(&mut self, name: Option<&str>, how: &OpenHow) -> Result<()> {
        let mut node = Options::new();
        node.set("read-only", how.read_only || how.snapshot);
        if how.force_share {
            node.set("force-share", true);
        }
        if let Some(mode) = &how.discard {
            node.set("discard", discard_mode(mode)?);
        }
        let mut write_through = true;
        if let Some(mode) = &how.cache {
            let (direct, no_flush, through) = cache_mode(mode)?;
            write_through = through;
            let mut cache = Options::new();
            cache.set("direct", direct);
            cache.set("no-flush", no_flush);
            node.set("cache", serde_json::Value::Object(cache.0));
        }
        for text in &how.options {
            for (key, value) in Options::from_text(text)?.0 {
                node.set(&key, value);
            }
        }
        let opens = follows_names();
        let mut probed = how.format.is_none();
        let opened = match name.filter(|_| !how.image_opts) {
            None => {
                let mut options = Options::from_text(name.unwrap_or_default())?;
                for (key, value) in node.0 {
                    options.set(&key, value);
                }
                warn_of_empty_backing(self.qemu, &options);
                probed &= options.get("driver").is_none();
                self.registry.open(&self.graph, options, opens).await?
            }
            Some(name) => {
                let format = match node.take_str("driver")? {
                    Some(driver) => Some(driver),
                    None => how.format.clone(),
                };
                probed &= format.is_none() && !name.starts_with("json:");
                if let Some(json) = name.strip_prefix("json:") {
                    warn_of_empty_backing(self.qemu, &Options::from_json(json)?);
                }
                warn_of_empty_backing(self.qemu, &node);
                if let Some(aio) = &how.aio {
                    let mut file = self.registry.filename_options(name)?;
                    file.set("aio", aio_engine(aio)?);
                    node.set("file", serde_json::Value::Object(file.0));
                    if let Some(format) = &format {
                        node.set("driver", format.as_str());
                    }
                    self.registry.open(&self.graph, node, opens).await?
                } else {
                    let format = format.as_deref();
                    self.registry
                        .open_file(&self.graph, name, format, node, opens)
                        .await?
                }
            }
        };
        if probed && !how.read_only && opened.driver().name() == "raw" {
            let filename = opened.filename();
            warn_of_probed_raw(filename.as_deref().or(name).unwrap_or_default());
        }
        if how.copy_on_read && how.read_only {
            let _ = self.graph.release(&opened).await;
            return Err(Error::invalid("Can't use copy-on-read on read-only device"));
        }
        let opened = if how.snapshot {
            match self.open_overlay(&opened).await {
                Ok(overlay) => overlay,
                Err(error) => {
                    let _ = self.graph.release(&opened).await;
                    return Err(error);
                }
            }
        } else {
            opened
        };
        match self.attach(&opened, how) {
            Ok(handle) => {
                handle.set_write_through(write_through);
                self.image = Some(Image {
                    handle: Arc::new(handle),
                    read_only: how.read_only,
                    write_through,
                    copy_on_read: how.copy_on_read,
                });
                Ok(())
            }
            Err(error) => {
                let _ = self.graph.release(&opened).await;
                Err(error)
            }
        }
    }

    /// An empty image over `node`, in a file that has no name any more when this returns: in the directory that `TMPDIR` names, or
    /// in /var/tmp.
    async fn open_overlay(&self, node: &Arc<Node>) -> Result<Arc<Node>> {
        let directory = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
        let file = tempfile::Builder::new()
            .prefix("vl.")
            .tempfile_in(&directory);
        let file = file.map_err(|error| {
            let name = PathBuf::from(&directory).join("vl.XXXXXX");
            let context = format!("Could not open temporary file '{}'", name.display());
            Error::from(error).context(context)
        })?;
        let path = file.path().to_string_lossy().into_owned();
        let size = node.length().next_multiple_of(512);
        let create = Options::new().with("size", size);
        self.registry
            .create(&self.graph, "qcow2", &path, create)
            .await?;
        let mut storage = Options::new();
        storage.set("driver", "file");
        storage.set("filename", path);
        let mut cache = Options::new();
        cache.set("no-flush", true);
        let mut options = Options::new();
        options.set("driver", "qcow2");
        options.set("file", serde_json::Value::Object(storage.0));
        options.set("cache", serde_json::Value::Object(cache.0));
        options.set("discard", "unmap");
        options.set("backing", node.name());
        self.registry
            .open(&self.graph, options, OpenOptions::default())
            .await
    }

    fn attach(&self, node: &Arc<Node>, how: &OpenHow) -> Result<BlockHandle> {
        let mut used = Permissions::CONSISTENT_READ;
        if !how.read_only {
            used |= Permissions::WRITE;
        }
        let shared = Permissions::all() - Permissions::RESIZE;
        let shared = if how.force_share {
            Permissions::all()
        } else {
            shared
        };
        // The resize permission is taken by `truncate` alone, so that raw images can be shared.
        self.graph
            .attach(node, PermissionSet::new(used, shared), "")
    }

    /// The environment.
    pub fn env(&self) -> Arc<dyn block_core::Environment> {
        self.graph.env().clone()
    }

    /// The handle.
    pub fn handle(&self) -> Option<&Arc<BlockHandle>> {
        self.image.as_ref().map(|image| &image.handle)
    }

    /// What hears the image's debug events, if anything does.
    pub fn debugger(&self) -> Option<Arc<iotests::faults::Debugger>> {
        iotests::faults::debugger_below(&self.handle()?.node())
    }

    /// Closes the image, after everything in the background has ended.
    ///
    /// # Errors
    /// The last flush or the close failed.
    pub async fn close(&mut self) -> Result<()> {
        iotests::faults::resume_all(&self.graph);
        self.settle().await;
        let Some(image) = self.image.take() else {
            return Ok(());
        };
        match Arc::try_unwrap(image.handle) {
            Ok(handle) => handle.close().await,
            // Nobody keeps a handle beyond its request.
            Err(shared) => shared.flush().await,
        }
    }

    /// Starts a request in the background; it takes its ticket before this returns.
    pub fn start(&self, request: impl Future<Output = ()> + Send + 'static) {
        self.background.borrow_mut().push(Box::pin(request));
        self.pump();
    }

    /// Polls what runs in the background, once.
    fn pump(&self) {
        let waker = futures::task::noop_waker();
        let mut cx = std::task::Context::from_waker(&waker);
        while let Poll::Ready(Some(())) = self.background.borrow_mut().poll_next_unpin(&mut cx) {}
    }

    /// Waits for `work`, and polls what runs in the background meanwhile: an unpolled request holds its ticket.
    pub async fn drive<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        futures::future::poll_fn(|cx| {
            while let Poll::Ready(Some(())) = self.background.borrow_mut().poll_next_unpin(cx) {}
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Waits until nothing runs in the background.
    pub async fn settle(&self) {
        futures::future::poll_fn(|cx| {
            loop {
                match self.background.borrow_mut().poll_next_unpin(cx) {
                    Poll::Ready(Some(())) => {}
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    }
}

/// How discards are treated in a discard mode.
fn discard_mode(mode: &str) -> Result<&'static str> {
    match mode {
        "ignore" | "off" => Ok("ignore"),
        "unmap" | "on" => Ok("unmap"),
        other => Err(Error::invalid(format!("Invalid discard option: {other}"))),
    }
}

/// The engine that an AIO mode of qemu-io's stands for.
fn aio_engine(mode: &str) -> Result<&'static str> {
    match mode {
        "threads" => Ok("threads"),
        "native" | "io_uring" => Ok("io_uring"),
        other => Err(Error::invalid(format!("Invalid aio option: {other}"))),
    }
}
