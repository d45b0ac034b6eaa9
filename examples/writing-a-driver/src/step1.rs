//! Step 1: a format that can be probed, made and opened. Its disk is empty and can't be written.
//!
//! On disk: the magic, the size of the guest's disk as a little-endian number, nothing else.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use block_core::{
    BlockDriver, Capabilities, Child, ChildRole, DriverFactory, DriverKind, Error, ErrorKind,
    IoBufMut, Options, Request, RequestFlags, Result,
    limits::Limits,
    node::Edges,
    options::parse_size,
    registry::{CreateContext, CreateOption, OpenContext, Opened},
};

const MAGIC: &[u8; 8] = b"STEP 1\r\n";
const HEADER_BYTES: usize = 16;

/// Makes nodes of this format.
#[derive(Debug, Clone, Copy, Default)]
pub struct Factory;

#[async_trait]
impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "step1"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u32 {
        if head.starts_with(MAGIC) { 100 } else { 0 }
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let node = context.open_file(&mut options).await?;
        // Whatever is left is a mistake of the user's, and not to be ignored.
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        let file = Child::unattached(node.clone());
        let head = file.read_padded(0, HEADER_BYTES).await?;
        let Some(size) = head.strip_prefix(MAGIC) else {
            let text = "Image is not in step1 format";
            return Err(Error::new(ErrorKind::WrongFormat, text));
        };
        let size = size.try_into().map(u64::from_le_bytes);
        let driver = Driver {
            size: size.map_err(|_| Error::invalid("The header is cut off"))?,
        };
        Ok(Opened {
            driver: Arc::new(driver),
            edges: vec![(ChildRole::File, "file".to_owned(), node)],
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        &[CreateOption {
            name: "size",
            kind: "size",
            help: "Virtual disk size",
        }]
    }

    async fn create(&self, context: CreateContext, mut options: Options) -> Result<()> {
        let size = take_size(&mut options)?;
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&size.to_le_bytes());
        let file = context.file()?;
        file.write(0, header, RequestFlags::empty()).await?;
        file.flush().await
    }
}

/// `size` as a number or as text with a suffix.
pub(crate) fn take_size(options: &mut Options) -> Result<u64> {
    let Some(value) = options.take("size") else {
        return Err(Error::invalid("Image creation needs a size parameter"));
    };
    match value.as_u64() {
        Some(size) => Ok(size),
        None => parse_size(value.as_str().unwrap_or_default()),
    }
}

/// An open image.
pub struct Driver {
    size: u64,
}

#[async_trait]
impl BlockDriver for Driver {
    fn name(&self) -> &'static str {
        "step1"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::ZERO_INIT
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.size
    }

    fn limits(&self, _edges: &Edges) -> Limits {
        Limits::default()
    }

    async fn read(self: Arc<Self>, _: Request, _: u64, mut buf: IoBufMut) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    async fn flush(self: Arc<Self>, _: Request) -> Result<()> {
        // Nothing was written: this is all there is to make durable.
        Ok(())
    }

    async fn close(self: Arc<Self>, _: Request) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
