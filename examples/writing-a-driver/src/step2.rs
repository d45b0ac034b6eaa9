//! Step 2: the guest's bytes lie in the file as they are, behind the header. Everything that is written is flushed when the
//! guest flushes, and by nobody else.

use std::{any::Any, sync::Arc};

use async_trait::async_trait;
use block_core::{
    BlockDriver, Capabilities, Child, ChildRole, DriverFactory, DriverKind, Error, ErrorKind,
    IoBuf, IoBufMut, Options, Request, RequestFlags, Result,
    driver::Truncate,
    limits::Limits,
    node::Edges,
    registry::{CreateContext, CreateOption, OpenContext, Opened},
    status::{DriverStatus, StatusFlags},
};

use crate::step1::take_size;

const MAGIC: &[u8; 8] = b"STEP 2\r\n";
const HEADER_BYTES: usize = 16;
/// Where the guest's bytes begin. More than a header needs: whatever alignment the file asks for, it is kept.
const DATA_AT: u64 = 4096;

/// Makes nodes of this format.
#[derive(Debug, Clone, Copy, Default)]
pub struct Factory;

#[async_trait]
impl DriverFactory for Factory {
    fn name(&self) -> &'static str {
        "step2"
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
            let text = "Image is not in step2 format";
            return Err(Error::new(ErrorKind::WrongFormat, text));
        };
        let size = size.try_into().map(u64::from_le_bytes);
        let driver = Driver {
            size: size.map_err(|_| Error::invalid("The header is cut off"))?,
            read_only: context.node.read_only,
        };
        if file.length().checked_sub(DATA_AT) < Some(driver.size) {
            let text = "The file is shorter than the disk in it";
            return Err(Error::invalid(text).with_field(
                "size",
                driver.size,
                format!("at most {}", file.length().saturating_sub(DATA_AT)),
            ));
        }
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
        let end = size.saturating_add(DATA_AT);
        file.truncate(end, Truncate::default()).await?;
        file.write(0, header, RequestFlags::empty()).await?;
        file.flush().await
    }
}

/// An open image.
pub struct Driver {
    size: u64,
    read_only: bool,
}

#[async_trait]
impl BlockDriver for Driver {
    fn name(&self) -> &'static str {
        "step2"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn capabilities(&self) -> Capabilities {
        if self.read_only {
            return Capabilities::ZERO_INIT;
        }
        Capabilities::ZERO_INIT | Capabilities::WRITE
    }

    fn length(&self, _edges: &Edges) -> u64 {
        self.size
    }

    fn limits(&self, edges: &Edges) -> Limits {
        // What is passed on as it is must be aligned as the file wants it. The core sees to that, if it is told.
        let below = edges
            .primary()
            .map_or(1, |file| file.limits().request_alignment);
        Limits {
            request_alignment: below,
            ..Limits::default()
        }
    }

    async fn read(self: Arc<Self>, request: Request, offset: u64, buf: IoBufMut) -> Result<()> {
        request.file()?.read(DATA_AT + offset, buf).await
    }

    async fn write(
        self: Arc<Self>,
        request: Request,
        offset: u64,
        buf: IoBuf,
        flags: RequestFlags,
    ) -> Result<()> {
        request.file()?.write(DATA_AT + offset, buf, flags).await
    }

    async fn flush(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await
    }

    async fn block_status(
        self: Arc<Self>,
        _: Request,
        offset: u64,
        len: u64,
    ) -> Result<DriverStatus> {
        // The file knows where its holes are.
        Ok(DriverStatus {
            flags: StatusFlags::RAW | StatusFlags::OFFSET_VALID,
            len,
            file_offset: DATA_AT + offset,
        })
    }

    async fn close(self: Arc<Self>, request: Request) -> Result<()> {
        request.file()?.flush().await
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
