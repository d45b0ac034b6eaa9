//! Opens, creates and measures raw images.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    Error, ErrorKind, Result,
    driver::{Capabilities, ChildRole, DriverKind, Preallocation, Truncate},
    options::Options,
    registry::{CreateContext, CreateOption, DriverFactory, Measure, OpenContext, Opened},
    request::Child,
};

use crate::{
    driver::RawDriver,
    guard::Guard,
    options::{RawCreate, RawOptions, round_up},
};

/// Makes raw nodes.
///
/// Options of a node: `file`, `offset` and `size` (bytes). Options of creation: `size` (rounded up to 512 bytes) and
/// `preallocation` (`off`, `falloc`, `full`). Probing never chooses raw by its content: it is what remains.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawFactory;

#[async_trait]
impl DriverFactory for RawFactory {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let options: RawOptions = options.parse()?;
        let child = Child::unattached(Arc::clone(&file));
        let window = options.window(child.length())?;
        let guard = context
            .probed
            .then(|| Guard::new(Arc::clone(context.registry())));
        // The storage may have fallen back to read-only.
        let writable = child.driver().capabilities().contains(Capabilities::WRITE);
        let read_only = context.node.read_only || (context.node.auto_read_only && !writable);
        let driver = RawDriver::new(window, read_only, &child, guard);
        Ok(Opened {
            driver: Arc::new(driver),
            edges: vec![(ChildRole::DataFile, "file".to_owned(), file)],
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        &[
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
        ]
    }

    fn may_create(&self, _: &CreateContext, options: Options) -> Result<()> {
        let create = RawCreate::parse(options)?;
        if create.preallocation == Preallocation::Metadata {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "Unsupported preallocation mode: metadata",
            ));
        }
        create.size().map(drop)
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        self.may_create(&context, options.clone())?;
        let create = RawCreate::parse(options)?;
        let size = create.size()?;
        let file = context.file()?;
        let how = Truncate {
            exact: true,
            preallocation: create.preallocation,
            zero: false,
        };
        file.truncate(size, how).await?;
        file.flush().await
    }

    fn measure(&self, size: u64, _data: &[(u64, u64)], options: Options) -> Result<Measure> {
        RawCreate::parse(options)?;
        let bytes = round_up(size)?;
        Ok(Measure {
            required: bytes,
            fully_allocated: bytes,
        })
    }
}
