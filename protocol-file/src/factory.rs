//! What programs register: the `file` and `host_device` drivers. They share engines and passed descriptors.

use std::{
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    sync::Arc,
};

use async_trait::async_trait;
use block_core::{
    driver::{BlockDriver, DriverKind},
    error::{Error, ErrorKind, Operation, Result},
    options::Options,
    producer::ProducerId,
    registry::{CreateContext, CreateOption, DriverFactory, OpenContext, Opened},
};

use crate::{
    create,
    driver::{FileDriver, Settings},
    engine::{Engine, Engines},
    fd_sets::FdSets,
    open_file::{OpenHow, open_error},
    options::{Aio, FileCreateOptions, FileOptions, Inline, strip_prefix},
};

/// Makes nodes over regular files (driver `file`). Given the path of a device it makes a `host_device` node, as qemu's
/// tools do for plain file names.
#[derive(Debug, Clone, Default)]
pub struct FileFactory {
    engines: Engines,
    fd_sets: FdSets,
    inline: Inline,
}

/// Makes nodes over block and character devices (driver `host_device`).
#[derive(Debug, Clone, Default)]
pub struct HostDeviceFactory(FileFactory);

/// The common options that matter to a file.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileMode {
    /// Open read-only.
    pub read_only: bool,
    /// Fall back to read-only.
    pub auto_read_only: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes don't reach the disk.
    pub no_flush: bool,
    /// Share the image with writers.
    pub force_share: bool,
}

impl FileFactory {
    /// A factory with engines of its own.
    pub fn new() -> Self {
        Self::default()
    }

    /// Uses `engines`, which other factories may use as well.
    #[must_use]
    pub fn with_engines(mut self, engines: Engines) -> Self {
        self.engines = engines;
        self
    }

    /// Opens names of the form `/dev/fdset/N` through `sets`.
    #[must_use]
    pub fn with_fd_sets(mut self, sets: FdSets) -> Self {
        self.fd_sets = sets;
        self
    }

    /// What `inline` is when the options don't say. A library's default is [`Inline::Nowait`].
    #[must_use]
    pub fn with_inline(mut self, inline: Inline) -> Self {
        self.inline = inline;
        self
    }

    /// The factory for devices with the same engines and descriptors.
    pub fn host_device(&self) -> HostDeviceFactory {
        HostDeviceFactory(self.clone())
    }

    /// The engines.
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    /// The passed descriptors.
    pub fn fd_sets(&self) -> &FdSets {
        &self.fd_sets
    }

    /// Makes a driver over a descriptor that the embedding program has opened, readable and, unless
    /// `mode.read_only`, writable. `name` is what messages and `info` call it. The driver goes into a graph as
    /// [`block_core::graph::NodeSpec::new`].
    ///
    /// Blocks on metadata at most.
    pub fn open_fd(
        &self,
        fd: OwnedFd,
        name: &str,
        options: &FileOptions,
        mode: FileMode,
    ) -> Result<Arc<FileDriver>> {
        let (file, writable) = FdSets::inspect(fd).map_err(|error| open_error(name, error))?;
        if !writable && !mode.read_only && !mode.auto_read_only {
            return Err(open_error(
                name,
                std::io::Error::from_raw_os_error(libc::EACCES),
            ));
        }
        let device = !file.metadata().is_ok_and(|metadata| metadata.is_file());
        let how = OpenHow {
            path: name.to_owned(),
            device,
            read_only: mode.read_only,
            auto_read_only: mode.auto_read_only,
            direct: mode.direct,
        };
        let file = how.adopt(file, writable && !mode.read_only)?;
        let engine = self
            .engine(options.aio, mode.direct)
            .map_err(|error| error.with_file(&how.path))?;
        FileDriver::new(file, engine, self.settings(how, options, mode)).map(Arc::new)
    }

    fn settings(&self, how: OpenHow, options: &FileOptions, mode: FileMode) -> Settings {
        Settings {
            how,
            fd_sets: self.fd_sets.clone(),
            inline: options.inline.unwrap_or(self.inline),
            locking: options.locking,
            no_flush: mode.no_flush,
            force_share: mode.force_share,
        }
    }

    fn engine(&self, aio: Aio, direct: bool) -> Result<Engine> {
        let result = match aio {
            Aio::Threads => self.engines.engine(false),
            Aio::IoUring => self.engines.engine(true),
            Aio::Auto => self
                .engines
                .engine(true)
                .or_else(|_| self.engines.engine(false)),
            Aio::Native if !direct => {
                return Err(Error::invalid(
                    "aio=native was specified, but it requires cache.direct=on, which was not specified.",
                ));
            }
            Aio::Native => self
                .engines
                .engine(true)
                .or_else(|_| self.engines.engine(false)),
        };
        result.map_err(|error| {
            let kind = error
                .raw_os_error()
                .map_or(ErrorKind::NotSupported, ErrorKind::from_errno);
            Error::new(kind, format!("Unable to use io_uring: {}", kind.strerror()))
                .with_operation(Operation::Open, 0, 0)
                .with_source(error)
        })
    }

    async fn open(&self, device: bool, context: OpenContext, options: Options) -> Result<Opened> {
        let driver_name = if device { "host_device" } else { "file" };
        let options = FileOptions::from_options(driver_name, options)?;
        let path = options.path(driver_name)?;
        let node = &context.node;
        let mode = FileMode {
            read_only: node.read_only,
            auto_read_only: node.auto_read_only,
            direct: node.cache.direct.0,
            no_flush: node.cache.no_flush.0,
            force_share: node.force_share,
        };
        let engine = self
            .engine(options.aio, mode.direct)
            .map_err(|error| error.with_file(&path))?;
        let how = OpenHow {
            path,
            device,
            read_only: mode.read_only,
            auto_read_only: mode.auto_read_only,
            direct: mode.direct,
        };
        let fd_sets = self.fd_sets.clone();
        let opening = move || {
            let mut how = how;
            how.device = device || (FdSets::parse(&how.path).is_none() && is_device(&how.path));
            let file = how.open(&fd_sets);
            (how, file)
        };
        let (how, file) = engine.call(ProducerId::NONE, opening).await?;
        let settings = self.settings(how, &options, mode);
        let driver: Arc<dyn BlockDriver> = Arc::new(FileDriver::new(file?, engine, settings)?);
        Ok(Opened {
            driver,
            edges: Vec::new(),
        })
    }
}

/// Whether there is a block or character device at `path`. Blocks.
pub fn is_device(path: &str) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| {
        metadata.file_type().is_block_device() || metadata.file_type().is_char_device()
    })
}

const CREATE_OPTIONS: [CreateOption; 4] = [
    CreateOption {
        name: "nocow",
        kind: "bool (on/off)",
        help: "Turn off copy-on-write (valid only on btrfs)",
    },
    CreateOption {
        name: "extent_size_hint",
        kind: "size",
        help: "Extent size hint for the image file, 0 to disable",
    },
    CreateOption {
        name: "preallocation",
        kind: "str",
        help: "Preallocation mode (allowed values: off, falloc, full)",
    },
    CreateOption {
        name: "size",
        kind: "size",
        help: "Virtual disk size",
    },
];

#[async_trait]
impl DriverFactory for FileFactory {
    fn name(&self) -> &'static str {
        "file"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    async fn open(&self, context: OpenContext, options: Options) -> Result<Opened> {
        Self::open(self, false, context, options).await
    }

    fn file_identity(&self, options: &Options) -> Option<u128> {
        let found = std::fs::metadata(strip_prefix(options.get_str("filename")?)).ok()?;
        Some(u128::from(found.dev()) << 64 | u128::from(found.ino()))
    }

    fn create_options(&self) -> &'static [CreateOption] {
        &CREATE_OPTIONS
    }

    /// Makes the file, or empties one that nobody uses. On a device, checks that it is large enough.
    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        let options = FileCreateOptions::from_options(options)?;
        let path = strip_prefix(&context.filename).to_owned();
        let engine = self.engine(Aio::Threads, false)?;
        engine
            .call(ProducerId::NONE, move || {
                if is_device(&path) {
                    create::check_device(&path, &options)
                } else {
                    create::create(&path, &options)
                }
            })
            .await?
    }
}

#[async_trait]
impl DriverFactory for HostDeviceFactory {
    fn name(&self) -> &'static str {
        "host_device"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    /// 100 for the path of a device, 0 for all else.
    fn probe(&self, _head: &[u8], filename: &str) -> u32 {
        if is_device(filename) { 100 } else { 0 }
    }

    async fn open(&self, context: OpenContext, options: Options) -> Result<Opened> {
        self.0.open(true, context, options).await
    }

    fn create_options(&self) -> &'static [CreateOption] {
        &CREATE_OPTIONS[3..]
    }

    /// A device is there already: checks that it is large enough.
    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        let options = FileCreateOptions::from_options(options)?;
        let path = strip_prefix(&context.filename).to_owned();
        let engine = self.0.engine(Aio::Threads, false)?;
        engine
            .call(ProducerId::NONE, move || {
                create::check_device(&path, &options)
            })
            .await?
    }
}
